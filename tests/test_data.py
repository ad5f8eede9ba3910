"""Shards, the token stream, and each rank's batches against brute force."""

import itertools
import math
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import new_run
from hypothesis import example, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

import keeper
import train_gpt as tg


def make_run(folder, rank=0, world_size=1, **values):
    """A place in a job of `world_size` processes that reads `folder`."""
    tiny = {
        "VOCAB_SIZE": 1000,
        "TRAIN_SEQ_LEN": 4,
        "TRAIN_BATCH_TOKENS": 28,
        "VAL_BATCH_SIZE": 64,
    }
    run = new_run(tiny, DATA_PATH=folder, **values)
    run.rank = run.local_rank = rank
    run.world_size = world_size
    return run


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """A shard, written field by field."""
    count = len(tokens) if count is None else count
    data = struct.pack("<256i", magic, version, count, *[0] * 253)
    path.write_bytes(data + struct.pack(f"<{len(tokens)}H", *tokens))
    return path


def write_shards(folder, sizes, split="train"):
    """Shards of consecutive numbers; returns all tokens in order."""
    tokens = list(range(sum(sizes)))
    ends = list(itertools.accumulate(sizes, initial=0))
    for i, (a, b) in enumerate(itertools.pairwise(ends)):
        write_shard(Path(folder) / f"fineweb_{split}_{i:06d}.bin", tokens[a:b])
    return tokens


# ---- shard_size


def test_a_shard_is_read_as_struct_reads_it(tmp_path):
    path = write_shard(tmp_path / "fineweb_train_000000.bin", [0, 1, 255, 256, 65535, 7])
    assert tg.shard_size(path) == 6
    tokens = tg.TokenStream("train", make_run(tmp_path), ids=2**16).read(0, 6)
    assert tokens.tolist() == list(struct.unpack("<6H", path.read_bytes()[1024:]))
    assert tokens.dtype == np.uint16


def test_a_shard_that_becomes_shorter_is_an_error(tmp_path):
    """It is read while the run goes on."""
    path = write_shard(tmp_path / "fineweb_train_000000.bin", [1] * 50)
    stream = tg.TokenStream("train", make_run(tmp_path))
    os.truncate(path, 1024 + 60)
    assert stream.read(0, 30).tolist() == [1] * 30
    with pytest.raises(tg.UserError, match=r"fineweb_train_000000.bin: has become shorter"):
        stream.read(20, 20)


def test_the_scan_reads_all_of_a_long_shard(tmp_path, monkeypatch):
    """It does so in pieces, each of which is forgotten."""
    most, read = [], tg.TokenStream.read
    monkeypatch.setattr(tg.TokenStream, "read", lambda *a: (most.append(a[1:]), read(*a))[1])
    header = struct.pack("<256i", 20240520, 1, 5 * 2**20, *[0] * 253)
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(header + np.ones(5 * 2**20, "<u2").tobytes())
    tg.TokenStream("train", make_run(tmp_path))
    assert most == [(0, 2**22), (2**22, 2**20)]


BAD_SHARDS = {
    "empty": b"",
    "five bytes": b"\x18\xd6\x34\x01\x01",
    "header cut": struct.pack("<3i", 20240520, 1, 4),
    "no tokens": struct.pack("<256i", 20240520, 1, 0, *[0] * 253),
    "one byte short": struct.pack("<256i3H", 20240520, 1, 3, *[0] * 253, 1, 2, 3)[:-1],
    "one byte more": struct.pack("<256i3H", 20240520, 1, 3, *[0] * 253, 1, 2, 3) + b"\0",
    "more than counted": struct.pack("<256i3H", 20240520, 1, 2, *[0] * 253, 1, 2, 3),
    "negative count": struct.pack("<256i3H", 20240520, 1, -3, *[0] * 253, 1, 2, 3),
    "foreign magic": struct.pack("<256i3H", 20240521, 1, 3, *[0] * 253, 1, 2, 3),
    "other version": struct.pack("<256i3H", 20240520, 2, 3, *[0] * 253, 1, 2, 3),
    "big-endian": struct.pack(">256i3H", 20240520, 1, 3, *[0] * 253, 1, 2, 3),
    "text": b"once upon a time " * 100,
}


@pytest.mark.parametrize("data", BAD_SHARDS.values(), ids=BAD_SHARDS.keys())
def test_what_is_no_whole_shard_is_refused(tmp_path, data):
    path = tmp_path / "bad_shard.bin"
    path.write_bytes(data)
    with pytest.raises(tg.UserError, match="bad_shard"):
        tg.shard_size(path)


# ---- which files are shards


def test_shards_are_in_the_order_of_their_names(tmp_path):
    for number, tokens in [(10, [5]), (2, [3, 4]), (0, [1, 2]), (11, [6])]:
        write_shard(tmp_path / f"fineweb_val_{number:06d}.bin", tokens)
    stream = tg.TokenStream("val", make_run(tmp_path))
    assert stream.read(0, stream.total).tolist() == [1, 2, 3, 4, 5, 6]


def test_sidecars_and_other_files_are_not_shards(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 2])
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", [7, 7, 7])
    (tmp_path / "fineweb_val_bytes_000001.bin").write_bytes(b"no shard")
    (tmp_path / "fineweb_val_000000.bin.partial").write_bytes(b"no shard")
    (tmp_path / "manifest.json").write_text("{}")
    stream = tg.TokenStream("val", make_run(tmp_path))
    assert [path.name for path in stream.paths] == ["fineweb_val_000000.bin"]
    assert stream.total == 2


def test_splits_do_not_mix(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 2])
    write_shard(tmp_path / "fineweb_train_000000.bin", [3, 4, 5])
    run = make_run(tmp_path)
    assert tg.TokenStream("val", run).read(0, 2).tolist() == [1, 2]
    assert tg.TokenStream("train", run).read(0, 3).tolist() == [3, 4, 5]


# ---- TokenStream


@pytest.mark.parametrize(
    ("start", "count", "expected"),
    [
        (0, 1, [0]),
        (2, 3, [2, 3, 4]),  # over a border
        (1, 8, [1, 2, 3, 4, 5, 6, 7, 8]),  # over two
        (8, 3, [8, 9, 0]),  # over the end
        (10, 2, [0, 1]),  # starts after it
        (29, 12, [9, *range(10), 0]),  # longer than all the data
    ],
)
def test_read_across_borders(tmp_path, start, count, expected):
    write_shards(tmp_path, [3, 1, 6])
    assert tg.TokenStream("train", make_run(tmp_path)).read(start, count).tolist() == expected


@example_settings(max_examples=80)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    reads=st.lists(st.tuples(st.integers(0, 10**12), st.integers(1, 80)), min_size=1, max_size=4),
)
def test_read_equals_brute_force(sizes, reads):
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_shards(folder, sizes)
        stream = tg.TokenStream("train", make_run(folder))
        assert stream.total == len(tokens)
        for start, count in reads:
            expected = [tokens[i % len(tokens)] for i in range(start, start + count)]
            assert stream.read(start, count).tolist() == expected


def test_read_gives_tokens_that_may_be_changed(tmp_path):
    write_shards(tmp_path, [5])
    stream = tg.TokenStream("train", make_run(tmp_path))
    stream.read(0, 5)[:] = 0
    assert stream.read(0, 5).tolist() == [0, 1, 2, 3, 4]


def test_foreign_id_is_reported_before_the_run_begins(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [1, 2])
    write_shard(tmp_path / "fineweb_train_000001.bin", [3, 1000, 4])
    with pytest.raises(tg.UserError, match=r"fineweb_train_000001.bin.* 1\b.*1000"):
        tg.TokenStream("train", make_run(tmp_path))


def test_largest_id_of_the_vocabulary_is_accepted(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [1, 999])
    assert tg.TokenStream("train", make_run(tmp_path)).read(1, 1).tolist() == [999]


def test_foreign_id_beyond_the_scan_is_reported_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper, "SCAN_TOKENS", 8)
    write_shard(tmp_path / "fineweb_train_000000.bin", [0] * 20 + [4321] + [0] * 9)
    stream = tg.TokenStream("train", make_run(tmp_path))
    assert stream.read(0, 20).tolist() == [0] * 20
    with pytest.raises(tg.UserError, match=r"fineweb_train_000000.bin.* 20\b.*4321"):
        stream.read(15, 10)


def test_foreign_id_stops_the_batches(tmp_path, monkeypatch):
    """The reader works ahead in a thread: its error must reach the training loop."""
    monkeypatch.setattr(keeper, "SCAN_TOKENS", 8)
    write_shard(tmp_path / "fineweb_train_000000.bin", [0] * 60 + [4321] + [0] * 40)
    run = make_run(tmp_path)
    feed = tg.batches(tg.TokenStream("train", run), run)
    for _ in range(2):  # tokens 0 to 56
        next(feed)
    with pytest.raises(tg.UserError, match="4321"):
        next(feed)


# ---- rows and batches


def first_steps(folder, steps, rank=0, world_size=1, forward_rows=None, **values):
    """The micro-batches of a rank, for each of the first `steps` steps."""
    run = make_run(folder, rank, world_size, **values)
    run.forward_rows = forward_rows or run.forward_rows
    feed = tg.batches(tg.TokenStream("train", run), run)
    return [next(feed) for _ in range(steps)]


def real_rows(micro_batches):
    """(inputs, targets) of the rows that are not padding."""
    tables = [(x.tolist(), y.tolist()) for x, y, _ in micro_batches]
    rows = [pair for table in tables for pair in zip(*table, strict=True)]
    return [row for row in rows if row[1][0] != tg.IGNORE]


def expected_rows(tokens, step, rows, T):
    """The rows of a global batch: consecutive, and over the end of the data to its start."""
    at = [step * rows * T + row * T for row in range(rows)]
    take = [[tokens[(a + i) % len(tokens)] for i in range(T + 1)] for a in at]
    return [(span[:-1], span[1:]) for span in take]


@pytest.mark.parametrize("forward_rows", [1, 2, 3, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_ranks_share_the_global_batch_in_order(tmp_path, world_size, forward_rows):
    tokens = write_shards(tmp_path, [11, 2, 40])  # the third step passes the end of the data
    ranks = [first_steps(tmp_path, 3, r, world_size, forward_rows) for r in range(world_size)]
    for step in range(3):
        rows = [row for rank in ranks for row in real_rows(rank[step])]
        assert rows == expected_rows(tokens, step, 7, 4)


@example_settings(max_examples=50)
@example(sizes=[30], rows=5, T=2, world_size=1, forward_rows=4)
@example(sizes=[3, 30], rows=11, T=1, world_size=2, forward_rows=5)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    rows=st.integers(1, 12),
    T=st.integers(1, 5),
    world_size=st.integers(1, 6),
    forward_rows=st.integers(1, 13),
)
def test_ranks_share_any_batch(sizes, rows, T, world_size, forward_rows):
    values = {"TRAIN_SEQ_LEN": T, "TRAIN_BATCH_TOKENS": rows * T}
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_shards(folder, sizes)
        ranks = [
            first_steps(folder, 2, rank, world_size, forward_rows, **values)
            for rank in range(world_size)
        ]
    for step in range(2):
        given_rows = [row for rank in ranks for row in real_rows(rank[step])]
        assert given_rows == expected_rows(tokens, step, rows, T)
    micro_batches = [batch for rank in ranks for step in rank for batch in step]
    # All of one shape, that one compiled graph serves; as few as can be, and no larger than needed.
    assert all(documents is None for _, _, documents in micro_batches)
    (shape,) = {tuple(x.shape) for *pair, _ in micro_batches for x in pair}
    most = math.ceil(rows / world_size)
    fewest = math.ceil(most / forward_rows)
    assert max(len(step) for rank in ranks for step in rank) == fewest
    assert shape == (math.ceil(most / fewest), T)


def test_shares_differ_by_one_row_at_most(tmp_path):
    write_shards(tmp_path, [50])
    for world_size in range(1, 9):
        shares = [
            len(real_rows(first_steps(tmp_path, 1, rank, world_size)[0]))
            for rank in range(world_size)
        ]
        assert sum(shares) == 7
        assert max(shares) - min(shares) <= 1


def test_ranks_without_a_row_get_no_micro_batch(tmp_path):
    write_shards(tmp_path, [50])
    lengths = [len(first_steps(tmp_path, 1, rank, 3, TRAIN_BATCH_TOKENS=8)[0]) for rank in range(3)]
    assert sorted(lengths) == [0, 1, 1]


def test_micro_batch_tokens_set_the_size_of_a_forward_pass(tmp_path):
    write_shards(tmp_path, [50])
    values = {"TRAIN_BATCH_TOKENS": 48, "MICRO_BATCH_TOKENS": 16}
    (step,) = first_steps(tmp_path, 1, **values)
    assert [(inputs.shape, targets.shape) for inputs, targets, _ in step] == [((4, 4), (4, 4))] * 3


def test_one_tiny_shard_serves_many_ranks(tmp_path):
    tokens = write_shards(tmp_path, [3])
    ranks = [first_steps(tmp_path, 2, rank, 4) for rank in range(4)]
    for step in range(2):
        rows = [row for rank in ranks for row in real_rows(rank[step])]
        assert rows == expected_rows(tokens, step, 7, 4)
