"""data/sources.py: files, compression, records, damage, cutting, memory."""

import argparse
import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import rendering
import sources
from rendering import RecordFormat
from shards import DataError
from sources import Problems, Source

zstandard = pytest.importorskip("zstandard")
MIB = 1 << 20

COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
}
ENDINGS = list(COMPRESS)
PACKED = ENDINGS[1:]


def read(*inputs, strict=False, limit=MIB, format=None, **options):
    """The documents of some inputs, and the source, whose problems hold the counts."""
    source = Source(
        [str(i) for i in inputs], format or RecordFormat(), Problems(strict), limit, **options
    )
    return list(source.documents()), source


def texts(*inputs, **options):
    return [document.text for document in read(*inputs, **options)[0]]


def counts(*inputs, **options):
    return dict(read(*inputs, **options)[1].problems.counts)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def text_lines(*values):
    return jsonl([{"text": value} for value in values])


def stdin_of(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


# ---- kinds of files and compression


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", [".txt", ".md", ".TXT"])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path, kind, ending):
    text = "first\r\nsecond\rthird\n\n\x0b¿日本🙂\n"
    path = write(tmp_path / f"a{kind}{ending}", COMPRESS[ending](text.encode()))
    documents, source = read(path, strict=True)
    assert [(d.text, d.where) for d in documents] == [(text, f"{path}:1")]
    assert not source.problems.notes


@pytest.mark.parametrize("ending", ENDINGS)
def test_jsonl_is_one_document_a_line_with_its_number(tmp_path, ending):
    data = b'{"text": "one"}\r\n\n  \t\n{"text": "two\\n", "x": NaN, "x": 1}\n{"text": "three"}'
    path = write(tmp_path / f"a.jsonl{ending}", COMPRESS[ending](data))
    documents, _ = read(path, strict=True)
    assert [(d.text, d.where) for d in documents] == [
        ("one", f"{path}:1"),
        ("two\n", f"{path}:4"),
        ("three", f"{path}:5"),
    ]


@pytest.mark.parametrize("ending", PACKED)
def test_members_and_frames_are_read_to_the_last(tmp_path, ending):
    parts = [COMPRESS[ending](f"part {n}, ".encode() * n) for n in range(300)]
    path = write(tmp_path / f"a.txt{ending}", b"".join(parts))
    assert texts(path, strict=True) == ["".join(f"part {n}, " * n for n in range(300))]


@pytest.mark.parametrize("ending", [".gz", ".xz"])
def test_zero_padding_between_members_is_no_damage(tmp_path, ending):
    packed = COMPRESS[ending](b"one")
    path = write(tmp_path / f"a.txt{ending}", packed + bytes(1024) + packed + bytes(512))
    assert texts(path, strict=True) == ["oneone"]


def test_a_skippable_zstd_frame_is_skipped(tmp_path):
    frame = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"other"
    packed = zstandard.compress(b"text")
    path = write(tmp_path / "a.txt.zst", frame + packed + frame)
    assert texts(path, strict=True) == ["text"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_byte_order_mark_is_dropped_at_the_start_alone(tmp_path, kind, ending):
    content = b"a\xef\xbb\xbfb" if kind == ".txt" else '{"text": "a\ufeffb"}'.encode()
    path = write(tmp_path / f"a{kind}{ending}", COMPRESS[ending](b"\xef\xbb\xbf" + content))
    assert texts(path, strict=True) == ["a\ufeffb"]


def test_the_mark_is_dropped_from_chunks_of_a_byte():
    chunks = [bytes([b]) for b in b"\xef\xbb\xbfab"]
    assert b"".join(sources.without_bom(chunks)) == b"ab"


def parquet_of(path, columns, **options):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_rows_across_row_groups_and_batches(tmp_path):
    values = [f"text {n}" for n in range(200)]
    columns = {"id": list(range(200)), "text": values, "other": [{"a": n} for n in range(200)]}
    path = parquet_of(tmp_path / "a.parquet", columns, row_group_size=90)
    documents, source = read(path, strict=True)
    assert [d.text for d in documents] == values
    assert [documents[i].where for i in (0, 199)] == [f"{path}:1", f"{path}:200"]
    assert source.read_bytes == source.total_bytes == path.stat().st_size
    assert source.digests == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}


def test_parquet_null_and_invalid_utf8_skip_their_row_alone(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = pa.array([b"one", None, b"\xff", b"four"], pa.binary())
    column = pa.StringArray.from_buffers(4, *raw.buffers()[1:], raw.buffers()[0])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path)
    documents, source = read(path)
    assert [(d.text, d.where) for d in documents] == [("one", f"{path}:1"), ("four", f"{path}:4")]
    assert source.problems.counts == {"not a string": 1, "invalid UTF-8": 1}


def test_parquet_without_the_column_names_those_there_are(tmp_path, capsys):
    path = parquet_of(tmp_path / "a.parquet", {"content": ["x"], "id": [1]})
    assert counts(path) == {"field missing": 1}
    assert "no column 'text'; there is 'content', 'id'" in capsys.readouterr().err


def test_parquet_conversations_leave_out_null_properties(tmp_path):
    messages = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "name": "x"}]
    ]
    path = parquet_of(tmp_path / "a.parquet", {"messages": messages, "other": [1]})
    template = write(tmp_path / "t", "{% for m in messages %}{{ m | length }}{% endfor %}")
    format = RecordFormat(type="conversation", template=str(template))
    assert texts(path, format=format) == ["23"]


# ---- what comes back is what was written


SCALARS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
TEXTS = st.lists(SCALARS.filter(str.strip), max_size=6)


@given(values=TEXTS, ending=st.sampled_from([*ENDINGS, "parquet"]), escaped=st.booleans())
def test_any_texts_come_back_in_order(tmp_path_factory, values, ending, escaped):
    folder = tmp_path_factory.mktemp("round")
    if ending == "parquet":
        pa = pytest.importorskip("pyarrow")
        columns = {"text": pa.array(values, pa.string())}
        path = parquet_of(folder / "a.parquet", columns, row_group_size=2)
    else:
        records = [json.dumps({"text": v}, ensure_ascii=escaped).encode() for v in values]
        path = write(folder / f"a.jsonl{ending}", COMPRESS[ending](b"\n".join(records)))
    assert texts(path, strict=True) == values


def lines_expected(data):
    """What jsonl of any bytes should give: the texts, and how many lines are skipped."""
    good, skipped = [], 0
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode())["text"]
            text.encode()
            if "\0" in text or not text.strip():
                raise ValueError
            good.append(text)
        except (ValueError, TypeError, KeyError, AttributeError):
            skipped += 1
    return good, skipped


JSON_LIKE = st.sampled_from(
    [
        *(
            b'{"text":"a"}',
            b'{"text":"',
            b'"}',
            b"\n",
            b"\r\n",
            b'"\\ud800"',
            b"\xff",
            b"[1]",
            b'"a"',
        ),
        *(b'{"text":"\\u0000"}', b'{"text":" "}', b'{"text":1}', b"{}", b"null", b"\xef\xbb\xbf"),
    ]
)


@settings(max_examples=300)
@given(data=st.one_of(st.binary(), st.lists(JSON_LIKE).map(b"".join)))
def test_any_bytes_as_jsonl_are_kept_or_counted(tmp_path_factory, data):
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", data)
    documents, source = read(path)
    assert ([d.text for d in documents], source.problems.counts.total()) == lines_expected(data)


TEXT_LIKE = st.lists(st.sampled_from([b"a", b" ", b"\n", b"\r", b"\0", b"\xff", "é🙂".encode()]))


@settings(max_examples=300)
@given(
    data=st.one_of(st.binary(), TEXT_LIKE.map(b"".join)).filter(
        lambda data: not data.startswith(b"\xef\xbb\xbf")
    ),
    limit=st.integers(4, 40),
)
def test_any_bytes_as_text_are_kept_or_counted(tmp_path_factory, data, limit):
    path = write(tmp_path_factory.getbasetemp() / "any.txt", data)
    documents, source = read(path, limit=limit)
    pieces = list(sources.cut_pieces([data], limit))
    assert b"".join(pieces) == data
    assert len(documents) + source.problems.counts.total() == len(pieces)
    kept = iter(pieces)
    assert all(d.text.encode() in kept for d in documents)  # in this order


@given(data=st.binary(), ending=st.sampled_from([*PACKED, "parquet"]))
def test_any_bytes_as_a_packed_file_raise_nothing(tmp_path_factory, data, ending):
    name = "any.parquet" if ending == "parquet" else f"any.jsonl{ending}"
    path = write(tmp_path_factory.getbasetemp() / name, data)
    assert counts(path) == {"damaged file": 1}


# ---- damage


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("kept", [0.999, 0.7, 0.3])
def test_of_a_truncated_file_the_whole_lines_are_kept(tmp_path, ending, kept, capsys):
    values = [hashlib.sha512(str(n).encode()).hexdigest() for n in range(3000)]
    packed = COMPRESS[ending](text_lines(*values))
    path = write(tmp_path / f"a.jsonl{ending}", packed[: int(len(packed) * kept)])
    got, source = read(path)
    assert [d.text for d in got] == values[: len(got)]
    # A Zstandard block of 128 KiB and an LZMA2 chunk come whole or not at all.
    assert len(got) > len(values) * (kept - 0.5)
    assert source.problems.counts == {"damaged file": 1}
    assert f"{path}:{len(got) + 1}: damaged file" in capsys.readouterr().err
    assert source.digests == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("ending", PACKED)
def test_a_file_cut_by_one_byte_is_damaged(tmp_path, ending):
    path = write(tmp_path / f"a.txt{ending}", COMPRESS[ending](b"text")[:-1])
    documents, source = read(path)
    assert (documents, source.problems.counts) == ([], {"damaged file": 1})


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("tail", [b"garbage", b""])
def test_garbage_after_the_last_member_or_no_member_at_all(tmp_path, ending, tail):
    packed = COMPRESS[ending](text_lines("one")) if tail else b""
    path = write(tmp_path / f"a.jsonl{ending}", packed + tail)
    documents, source = read(path)
    assert [d.text for d in documents] == (["one"] if tail else [])
    assert source.problems.counts == {"damaged file": 1}


@pytest.mark.parametrize("ending", PACKED)
def test_a_flipped_bit_never_gives_a_wrong_line_silently(tmp_path, ending):
    packer = {".zst": zstandard.ZstdCompressor(write_checksum=True).compress}
    values = [hashlib.sha512(str(n).encode()).hexdigest() for n in range(300)]
    packed = bytearray(packer.get(ending, COMPRESS[ending])(text_lines(*values)))
    packed[len(packed) // 2] ^= 4
    assert counts(write(tmp_path / f"a.jsonl{ending}", packed))["damaged file"] == 1


@pytest.mark.parametrize("ending", PACKED)
def test_pieces_before_the_damage_of_a_long_text_are_kept(tmp_path, ending):
    text = "".join(f"{n} {hashlib.sha512(str(n).encode()).hexdigest()}\n" for n in range(5000))
    packed = COMPRESS[ending](text.encode())
    path = write(tmp_path / f"a.txt{ending}", packed[: len(packed) * 3 // 4])
    documents, source = read(path, limit=4096)
    got = "".join(d.text for d in documents)
    assert len(got) > len(text) // 4
    assert text.startswith(got)
    assert source.problems.counts == {"damaged file": 1}


def test_rows_before_the_damage_of_a_parquet_file_are_kept(tmp_path):
    values = [hashlib.sha512(str(n).encode()).hexdigest() for n in range(1000)]
    path = parquet_of(tmp_path / "a.parquet", {"text": values}, row_group_size=100)
    pq = pytest.importorskip("pyarrow.parquet")
    chunk = pq.ParquetFile(path).metadata.row_group(5).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 100] = b"\xff" * 100
    write(path, data)
    documents, source = read(path)
    assert [d.text for d in documents] == values[:500]
    assert source.problems.counts == {"damaged file": 1}
    assert source.read_bytes == source.total_bytes


def test_a_truncated_parquet_file_is_damaged(tmp_path):
    path = parquet_of(tmp_path / "a.parquet", {"text": ["a"] * 100})
    write(path, path.read_bytes()[:-20])
    assert counts(path) == {"damaged file": 1}


# ---- records that cannot be used


@pytest.mark.parametrize(
    ("line", "kind", "detail"),
    [
        (b"{'text': 1}", "not JSON", "column 2"),
        (b'{"text": ' + b"[" * 100_000, "not JSON", "recursion"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "not JSON", "digits"),
        (b"[1]", "not an object", "[1]"),
        (b'{"body": "a", "id": 1}', "field missing", "no 'text'; there is 'body', 'id'"),
        (b'{"text": 3.5}', "not a string", "'text' is 3.5"),
        (b'{"text": null}', "not a string", "'text' is None"),
        (b'{"text": "\xc3("}', "invalid UTF-8", "byte 0xc3 at 11"),
        (b'{"text": "a\\u0000b"}', "NUL character", "U+0000"),
        (b'{"text": "ab\\udc00"}', "lone surrogate", "U+DC00 at character 3"),
        (b'{"text": " \\n\\u3000"}', "blank", "white space"),
        (b'{"text": ""}', "blank", "white space"),
    ],
)
def test_a_bad_record_is_skipped_and_named(tmp_path, capsys, line, kind, detail):
    path = write(tmp_path / "a.jsonl", b'{"text": "1"}\n\n' + line + b'\n{"text": "2"}\n')
    documents, source = read(path)
    assert [d.text for d in documents] == ["1", "2"]
    assert source.problems.counts == {kind: 1}
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"{path}:3: {kind}: ")
    assert detail in message
    with pytest.raises(DataError, match=kind):
        read(path, strict=True)


@pytest.mark.parametrize(
    ("data", "kind", "line"),
    [(b"a\nb\n\xff\n", "invalid UTF-8", 3), (b"a\n\0", "NUL character", 2), (b" \n", "blank", 1)],
)
def test_a_bad_text_file_is_skipped_and_named(tmp_path, capsys, data, kind, line):
    path = write(tmp_path / "a.txt", data)
    assert counts(path) == {kind: 1}
    assert capsys.readouterr().err.startswith(f"{path}:{line}: {kind}: ")


def test_only_the_piece_with_the_bad_byte_is_lost(tmp_path, capsys):
    lines = [b"%04d\n" % n for n in range(100)]
    lines[50] = b"00\xff0\n"
    path = write(tmp_path / "a.txt", b"".join(lines))
    assert "".join(texts(path, limit=5)).encode() == b"".join(lines[:50] + lines[51:])
    assert f"{path}:51: invalid UTF-8: byte 0xff" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["\n", ""])
def test_a_line_over_the_bound_is_skipped(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(sources, "LINE_BYTES", 100)
    lines = ['{"text": "%s"}' % ("x" * n) for n in (88, 89, 1_000_000)]
    path = write(tmp_path / "a.jsonl", "\n".join([*lines, '{"text": "b"}', lines[1]]) + ending)
    documents, source = read(path)
    assert [d.text for d in documents] == ["x" * 88, "b"]
    assert source.problems.counts == {"line too long": 3}


def test_the_first_of_each_kind_are_shown_and_all_are_counted(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", b"?\n" * 20 + b"[]\n")
    assert counts(path) == {"not JSON": 20, "not an object": 1}
    shown = Counter(line.split(": ")[-2] for line in capsys.readouterr().err.splitlines()[:5])
    assert shown.total() == 5
    source = Source([str(path)], RecordFormat(), Problems(False, shown=2), MIB)
    list(source.documents())
    assert len(capsys.readouterr().err.splitlines()) == 4  # two, a line that says so, another kind


# ---- cutting


def longest_white_space(text):
    """The bytes of the longest run of white space."""
    visible = "".join(c if c.isspace() else "|" for c in text)
    return max(len(run.encode()) for run in visible.split("|"))


CUTTABLE = st.lists(
    st.sampled_from(["a", "bc", "é", "日", "🙂", " ", "\n", "\n\n", "\r\n\r\n", "\u3000", "\xa0"])
).map("".join)


@settings(max_examples=500)
@example(text="abcdefg\n\n\n\n", limit=8, step=3)
@example(text="ab" + " " * 9, limit=10, step=100)
@given(text=CUTTABLE.filter(str.strip), limit=st.integers(4, 30), step=st.integers(1, 50))
def test_pieces_are_the_text_within_the_limit(text, limit, step):
    data = text.encode()
    chunks = [data[i : i + step] for i in range(0, len(data), step)]
    pieces = list(sources.cut_pieces(chunks, limit))
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= limit for piece in pieces)
    assert pieces == list(sources.cut_pieces([data], limit))  # whatever the chunks
    decoded = [piece.decode() for piece in pieces]  # whole characters
    if 2 * longest_white_space(text) + 4 <= limit:
        assert all(piece.strip() for piece in decoded)


@given(data=st.binary(max_size=200), limit=st.integers(4, 30), step=st.integers(1, 50))
def test_pieces_of_invalid_text_lose_nothing_either(data, limit, step):
    chunks = [data[i : i + step] for i in range(0, len(data), step)]
    pieces = list(sources.cut_pieces(chunks, limit))
    assert b"".join(pieces) == data
    assert all(len(piece) <= limit for piece in pieces)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("aaa\n\nbbb\nccc ddd eee", ["aaa\n\n", "bbb\nccc ddd eee"]),
        ("aaa\r\n\r\nbbb\nccc ddd eee", ["aaa\r\n\r\n", "bbb\nccc ddd eee"]),
        ("aaa bbb\nccc ddd eee", ["aaa bbb\n", "ccc ddd eee"]),
        ("aaa\n\nbbb\n\nccc ddd eee", ["aaa\n\nbbb\n\n", "ccc ddd eee"]),
        ("aaa bbb ccc ddd eee", ["aaa bbb ccc ddd ", "eee"]),
        ("aaaaaaaaaaaaaaa日日", ["aaaaaaaaaaaaaaa", "日日"]),
        ("aaaaaaaaaaaaa日b", ["aaaaaaaaaaaaa日", "b"]),
        ("aaaaaaaaaaaaaaaa", ["aaaaaaaaaaaaaaaa"]),
        ("\n\naaaaaaaaaaaaaabbb", ["\n\naaaaaaaaaaaaaa", "bbb"]),
        ("aaaaaaaaaaaa bbb\n\n\n", ["aaaaaaaaaaaa ", "bbb\n\n\n"]),
    ],
)
def test_where_a_document_is_cut_at_16_bytes(tmp_path, text, pieces):
    record = write(tmp_path / "a.jsonl", text_lines(text))
    plain = write(tmp_path / "a.txt", text)
    assert texts(plain, limit=16, strict=True) == pieces
    documents, source = read(record, limit=16, strict=True)
    assert [d.text for d in documents] == pieces
    assert {d.where for d in documents} == {f"{record}:1"}
    assert source.problems.notes == ({"cut": 1} if len(pieces) > 1 else {})


def test_pieces_of_a_text_file_say_the_line_at_which_they_start(tmp_path):
    path = write(tmp_path / "a.txt", "aaaa\nbbb\n\nccccccc")
    documents, source = read(path, limit=10, strict=True)
    assert [d.where for d in documents] == [f"{path}:1", f"{path}:4"]
    assert source.problems.notes == {"cut": 1}


def test_white_space_that_fits_nowhere_is_reported(tmp_path):
    path = write(tmp_path / "a.txt", "a" + " " * 40 + "b")
    documents, source = read(path, limit=8)
    assert [d.text.strip() for d in documents] == ["a", "b"]
    assert set(source.problems.counts) == {"blank"}


# ---- memory


def peak_of(path, **options):
    """The most bytes that reading a file takes, and how many bytes of text it gives."""
    source = Source([str(path)], RecordFormat(), Problems(False), MIB, **options)
    tracemalloc.start()
    try:
        total = sum(len(document.text.encode()) for document in source.documents())
        return tracemalloc.get_traced_memory()[1], total
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind, ending):
    line = text_lines("words " * 1000) if kind == ".jsonl" else b"words " * 1000 + b"\n"
    data = line * (64 * MIB // len(line))
    packed = {"": data, ".gz": gzip.compress(data, 1), ".zst": zstandard.compress(data, 1)}[ending]
    path = write(tmp_path / f"a{kind}{ending}", packed)
    peak, total = peak_of(path)
    assert total > 63 * MIB
    assert peak < 32 * MIB if ending == ".zst" else peak < 16 * MIB


def test_a_decompression_bomb_of_one_line_is_skipped_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LINE_BYTES", MIB)
    bomb = zstandard.ZstdCompressor().compress(b'{"text": "' + bytes(256 * MIB) + b'"}\n')
    assert len(bomb) < 10_000
    peak, total = peak_of(write(tmp_path / "a.jsonl.zst", bomb + COMPRESS[".zst"](b"")))
    assert (peak < 32 * MIB, total) == (True, 0)


def test_an_xz_file_that_asks_for_too_much_memory_is_refused(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.txt.xz", lzma.compress(b"text"))
    monkeypatch.setattr(sources, "MEMORY_BYTES", MIB)  # the default preset takes 9 MiB
    assert counts(path) == {"damaged file": 1}
    assert "Memory usage limit" in capsys.readouterr().err


# ---- finding files


def test_a_folder_is_read_in_the_order_of_its_posix_paths(tmp_path):
    for name in ("b/a.txt", "a.txt", "b.txt", "B.txt", "a/z.txt", "a-b.txt", "ä.txt"):
        write(tmp_path / name, name)
    for name in (".hidden.txt", ".git/x.txt", "b/.y.txt"):
        write(tmp_path / name, "hidden")
    for name in ("c.bin", "readme.rst", "x.parquet.gz"):
        write(tmp_path / name, "other")
    documents, source = read(tmp_path, strict=True)
    expected = sorted(["b/a.txt", "a.txt", "b.txt", "B.txt", "a/z.txt", "a-b.txt", "ä.txt"])
    assert [d.text for d in documents] == [file.name for file in source.files] == expected
    assert source.problems.notes == {"other kind of file": 3}
    assert source.total_bytes == sum(len(name.encode()) for name in expected)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.txt", ["a.txt", "b.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "c/a.txt", "c/d/a.txt"]),
        ("c/**", ["a.txt", "d/a.txt"]),
        ("[b]*", ["b.txt"]),
        ("c/?.txt", ["a.txt"]),
    ],
)
def test_globs(tmp_path, pattern, names):
    for name in ("b.txt", "a.txt", "c/a.txt", "c/d/a.txt", "c/.x.txt"):
        write(tmp_path / name, name)
    _, source = read(tmp_path / pattern)
    prefix = "c/" if pattern.startswith("c/") else ""
    assert [file.name for file in source.files] == names
    assert [file.path for file in source.files] == [tmp_path / (prefix + n) for n in names]


def test_a_relative_glob(tmp_path, monkeypatch):
    write(tmp_path / "x" / "a.txt", "a")
    monkeypatch.chdir(tmp_path)
    assert [(f.name, str(f.path)) for f in read("**/*.txt")[1].files] == [("x/a.txt", "x/a.txt")]


def test_glob_characters_in_the_name_of_a_file_that_exists(tmp_path):
    write(tmp_path / "[a].txt", "literal")
    write(tmp_path / "a.txt", "match")
    assert texts(tmp_path / "[a].txt") == ["literal"]


def test_a_file_reached_twice_is_read_once(tmp_path):
    path = write(tmp_path / "a" / "one.txt", "one")
    (tmp_path / "a" / "two.txt").symlink_to(path)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    documents, source = read(tmp_path / "a", path, tmp_path / "a" / "*.txt", path)
    assert [d.text for d in documents] == ["one"]
    # two.txt in the folder; one.txt; both of the glob. An argument given twice counts apart.
    assert source.problems.notes == {"file found twice": 4, "input given twice": 1}


def test_a_linked_folder_is_read(tmp_path):
    write(tmp_path / "far" / "a.txt", "far")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far")
    assert [f.name for f in read(tmp_path / "near")[1].files] == ["link/a.txt"]


def test_all_that_is_wrong_with_the_inputs_is_said_at_once(tmp_path):
    good = write(tmp_path / "good.txt", "x")
    write(tmp_path / "a.docx", "x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "link.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    names = ["a.docx", "absent.txt", "empty", "no/*.txt", "pipe.txt", "broken"]
    with pytest.raises(DataError) as error:
        read(good, "", *(tmp_path / name for name in names), limit=3, split="test")
    lines = str(error.value).splitlines()
    parts = ["4 bytes", "--split", "an input is empty", "a.docx: unknown kind"]
    parts += ["absent.txt: does not exist", "empty: no file", "no/*.txt: no file"]
    parts += ["pipe.txt: not a regular file", "link.txt: No such file"]
    assert [part for part, line in zip(parts, lines, strict=True) if part not in line] == []


def test_no_input_at_all():
    with pytest.raises(DataError, match="no input"):
        read()


def test_a_pipe_in_a_folder_is_left_out(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    write(tmp_path / "b.txt", "b")
    documents, source = read(tmp_path)
    assert [d.text for d in documents] == ["b"]
    assert source.problems.notes == {"not a regular file": 1}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_vanishes_is_an_error_that_names_it(tmp_path, name):
    path = write(tmp_path / name, "x")
    source = Source([str(path)], RecordFormat(), Problems(False), MIB)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: cannot be read: No such file"):
        list(source.documents())
    assert not source.problems.counts


@pytest.mark.parametrize("name", ["pyarrow", "zstandard"])
def test_a_missing_package_is_said_with_its_install_line(tmp_path, monkeypatch, name):
    path = write(tmp_path / {"pyarrow": "a.parquet", "zstandard": "a.txt.zst"}[name], "x")
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"{name}.parquet", raising=False)
    with pytest.raises(DataError, match=f"pip install {name}"):
        read(path)


# ---- progress, digests, passes, samples


def test_progress_and_digests_are_of_the_stored_bytes_in_every_pass(tmp_path):
    for ending in ENDINGS:
        write(tmp_path / f"a.txt{ending}", COMPRESS[ending](b"some text " * 1000))
    stored = {str(path): path.read_bytes() for path in tmp_path.iterdir()}
    source = Source([str(tmp_path)], RecordFormat(), Problems(True), MIB)
    for _ in range(2):
        assert len(list(source.documents())) == 4
        assert source.read_bytes == source.total_bytes == sum(map(len, stored.values()))
        assert source.digests == {p: hashlib.sha256(d).hexdigest() for p, d in stored.items()}


def test_an_unfinished_pass_has_no_digest(tmp_path):
    path = write(tmp_path / "a.jsonl", text_lines("a", "b"))
    _, source = read(path)
    assert list(source.digests) == [str(path)]
    next(source.documents())
    assert source.digests == {}


@pytest.mark.parametrize("ending", PACKED)
def test_what_follows_the_damage_is_in_progress_and_digest(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(sources, "READ_BYTES", 64)
    packed = COMPRESS[ending](text_lines("one")) + b"damage" + bytes(range(256)) * 4
    path = write(tmp_path / f"a.jsonl{ending}", packed)
    documents, source = read(path)
    assert [d.text for d in documents] == ["one"]
    assert source.read_bytes == source.total_bytes
    assert source.digests == {str(path): hashlib.sha256(packed).hexdigest()}


def test_samples_are_usable_records_of_each_input(tmp_path):
    first = write(tmp_path / "1.jsonl", b"?\n" + text_lines("a", "", "bb bb", "c"))
    second = write(tmp_path / "2.jsonl", text_lines("d"))
    third = write(tmp_path / "3.jsonl", text_lines("e", "f", "g"))
    got, source = read(first, second, third, samples=2, limit=4)
    assert [d.text for d in got] == ["a", "bb ", "bb", "d", "e", "f"]
    assert list(source.digests) == [str(second)]


# ---- standard input


@pytest.mark.parametrize(
    ("data", "kind", "expected"),
    [
        (b"some\ntext", "auto", ["some\ntext"]),
        (b'\n \n{"text": "a"}\n{"text": "b"}', "auto", ["a", "b"]),
        (b'\xef\xbb\xbf{"text": "a"}', "auto", ["a"]),
        (b" " * 2_000_000 + b"{}", "auto", [" " * 2_000_000 + "{}"]),
        (b'{"text": "a"}', "text", ['{"text": "a"}']),
        (b"[1]", "jsonl", []),
        (b"", "auto", []),
    ],
)
def test_standard_input(monkeypatch, data, kind, expected):
    stdin_of(monkeypatch, data)
    documents, source = read("-", stdin_kind=kind, limit=4 * MIB)
    assert [d.text for d in documents] == expected
    assert source.digests == {"<stdin>": hashlib.sha256(data).hexdigest()}
    assert all(d.where.startswith("<stdin>:") for d in documents)


def test_standard_input_is_read_once(monkeypatch):
    stdin_of(monkeypatch, b"text")
    documents, source = read("-", "-")
    assert [d.text for d in documents] == ["text"]
    with pytest.raises(DataError, match="only once"):
        list(source.documents())


# ---- record types


QA = {"q": "{output}?", "i": "{input} {system}", "a": "{{x}} \\1 {instruction}", "s": "sys"}
FIELDS = {"type": "instruction", "instruction_field": "q", "output_field": "a"}


def rendered(record, **options):
    return rendering.Renderer(RecordFormat(**options)).text(record)


def test_placeholders_in_values_and_other_braces_are_text():
    format = "{{a}} {x y} %s {system}|{instruction}|{input}|{output}|{instruction}"
    got = rendered(
        QA,
        **FIELDS,
        input_field="i",
        system_prompt_type="field",
        system_prompt_field="s",
        prompt_format=format,
    )
    expected = "{{a}} {x y} %s sys|{output}?|{input} {system}|{{x}} \\1 {instruction}|{output}?"
    assert got == expected


@given(values=st.lists(st.text(), min_size=4, max_size=4))
def test_any_values_are_put_in_as_they_are(values):
    record = dict(zip("sqia", values, strict=True))
    got = rendered(
        record,
        **FIELDS,
        input_field="i",
        system_prompt_type="field",
        system_prompt_field="s",
        prompt_format="<{system}><{instruction}><{input}><{output}>",
    )
    assert got == "".join(f"<{value}>" for value in values)


@pytest.mark.parametrize(
    ("i", "expected"), [("x", "Q+x=A"), ("", "Q=A"), (None, "Q=A"), (" ", "Q=A")]
)
def test_the_format_without_input(i, expected):
    options = {"prompt_format": "{instruction}+{input}={output}", "input_field": "i"}
    no_input = {"prompt_format_no_input": "{instruction}={output}"}
    record = {"q": "Q", "a": "A", "i": i}
    assert rendered(record, **FIELDS, **options, **no_input) == expected


def test_an_instruction_as_a_conversation():
    record = {"q": "Q", "a": "A", "i": "I", "s": "S"}
    options = {**FIELDS, "system_prompt_type": "fixed", "system_prompt": "Be."}
    assert rendered(record, **options) == "System: Be.\n\nUser: Q\n\nAssistant: A"
    assert rendered(record, **FIELDS) == "User: Q\n\nAssistant: A"
    chatml = rendered(record, **FIELDS, input_field="i", template="chatml")
    assert chatml == "<|im_start|>user\nQ\n\nI<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"


def test_a_conversation_with_other_names_roles_parts_and_tools():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i {{ 1 }}\n"}]
    record = {
        "talk": [{"from": "human", "value": parts}, {"from": "gpt", "value": "<é>"}],
        "sys": "S",
        "tools": '[{"name": "<f>"}]',
    }
    options = {
        "type": "conversation",
        "messages_field": "talk",
        "system_field": "sys",
        "message_property_mappings": {"role": "from", "content": "value"},
    }
    expected = "System: S\n\nUser: hi {{ 1 }}\n\n\nAssistant: <é>"
    assert rendered(record, **options) == expected
    tools = rendered(record, **options, tools_field="tools")
    assert tools == 'Tools: [{"name": "<f>"}]\n\n' + expected
    assert rendered({**record, "tools": [{"name": "<f>"}]}, **options, tools_field="tools") == tools


def test_a_message_that_calls_tools_needs_no_content():
    record = {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"f": 1}]}]}
    assert rendered(record, type="conversation") == 'Assistant: [{"f": 1}]'


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        {"role": "user", "content": "x"},
        ["hi"],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": None}],
        [{"role": 1, "content": "x"}],
        [{"role": "", "content": "x"}],
        [{"role": "user", "content": [{"type": "image", "text": "x"}]}],
        [{"role": "user", "content": ["x"]}],
    ],
)
def test_malformed_conversations_are_skipped(tmp_path, messages):
    path = write(tmp_path / "a.jsonl", jsonl([{"messages": messages}]))
    format = RecordFormat(type="conversation")
    assert counts(path, format=format) == {"malformed conversation": 1}


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"x": 1}, "field missing"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "{"}, "malformed conversation"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": 5}, "malformed conversation"),
        ({"messages": [{"role": "user", "content": "x"}], "s": 5}, "not a string"),
    ],
)
def test_other_faults_of_conversations(record, kind):
    with pytest.raises(rendering.RecordError, match=kind):
        rendered(record, type="conversation", system_field="s", tools_field="tools")


def test_an_optional_field_that_is_missing_is_noted(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl([{"q": "Q", "a": "A"}, {"q": "Q", "a": "A", "i": ""}]))
    format = RecordFormat(**FIELDS, input_field="i")
    documents, source = read(path, format=format, strict=True)
    assert len(documents) == 2
    assert source.problems.notes == {"optional field missing": 1}


# ---- templates


HF_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}
        {{- raise_exception('bad role ' ~ message.role) }}
    {%- endif %}
    {%- if message.content == 'stop' %}{% break %}{% endif %}
    {{- '[' + message['role'] + '] ' + message['content'] | trim + eos_token }}
{% endfor %}
{%- if add_generation_prompt %}{{ 'x' }}{% endif %}{{ tools | tojson(indent=2) }}
"""


def conversation(*contents, role="user"):
    return {"messages": [{"role": role, "content": content} for content in contents]}


def test_a_template_of_a_file(tmp_path):
    template = write(tmp_path / "t.jinja", HF_TEMPLATE)
    options = {"type": "conversation", "template": str(template)}
    assert rendered(conversation(" a ", "b", "stop", "c"), **options) == "[user] a\n[user] b\nnull"


def test_lines_of_a_template_that_hold_only_a_block_leave_no_trace(tmp_path):
    blocks = "{% if not tools %}\nx\n{% endif %}\n  {% for m in messages %}\n{{ m.content }}\n"
    template = write(tmp_path / "t.jinja", blocks + "  {% endfor %}\nend")
    options = {"type": "conversation", "template": str(template)}
    assert rendered(conversation("a", "b"), **options) == "x\na\nb\nend"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (HF_TEMPLATE, "bad role tool"),
        ("{{ messages[0].content.a.b }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
    ],
)
def test_an_error_in_a_template_skips_the_record(tmp_path, capsys, source, message):
    template = write(tmp_path / "t.jinja", source)
    path = write(tmp_path / "a.jsonl", jsonl([conversation("a", role="tool")]))
    format = RecordFormat(type="conversation", template=str(template))
    assert counts(path, format=format) == {"template error": 1}
    assert message in capsys.readouterr().err


# ---- settings


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"type": "chat"}, ["--type chat"]),
        ({"text_field": ""}, ["--text-field"]),
        ({"type": "instruction"}, ["--instruction-field and --output-field"]),
        ({"type": "conversation", "messages_field": ""}, ["--messages-field"]),
        ({"type": "conversation", "template": "nowhere.jinja"}, ["nowhere.jinja: neither plain"]),
        ({**FIELDS, "system_prompt_type": "other"}, ["--system-prompt-type other"]),
        ({**FIELDS, "system_prompt_type": "field"}, ["needs --system-prompt-field"]),
        ({**FIELDS, "system_prompt_type": "fixed"}, ["needs --system-prompt"]),
        ({**FIELDS, "system_prompt": "x"}, ["--system-prompt needs"]),
        ({**FIELDS, "system_prompt_field": "x"}, ["--system-prompt-field needs"]),
        (
            {**FIELDS, "prompt_format": "{foo} {system} {output} {1} {}"},
            ["{foo}: no such placeholder", "{system}: nothing gives it", "has no {instruction}"],
        ),
        ({**FIELDS, "input_field": "i", "prompt_format": "{instruction}{output}"}, ["no {input}"]),
        (
            {**FIELDS, "prompt_format_no_input": "{instruction}{input}{output}"},
            ["needs --prompt-format and --input-field", "{input}: nothing gives it"],
        ),
    ],
)
def test_all_that_is_wrong_with_the_settings(options, parts):
    problems = RecordFormat(**options).problems()
    assert [part for part, p in zip(parts, problems, strict=True) if part not in p] == []


def test_settings_are_checked_before_any_reading(tmp_path):
    template = write(tmp_path / "t.jinja", "a\n{% if %}")
    format = RecordFormat(type="conversation", template=str(template))
    with pytest.raises(DataError, match=r"t\.jinja: line 2.*\n.*does not exist"):
        read(tmp_path / "absent.txt", format=format)


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    rendering.add_options(parser)
    parser.format_help()
    return parser.parse_args(arguments)


def test_options_left_out_have_the_defaults_of_the_format():
    args = parsed()
    assert rendering.format_from(args) == RecordFormat()
    assert (args.subset, args.split, args.samples) == ("", "train", 0)


def test_every_field_of_the_format_has_an_option():
    arguments = ["--type", "instruction", "--instruction-field", "q", "--output-field", "a"]
    arguments += ["--input-field", "i", "--prompt-format", "{system}{instruction}{input}{output}"]
    arguments += ["--prompt-format-no-input", "{system}{instruction}{output}"]
    arguments += ["--system-prompt-type", "fixed", "--system-prompt", "S"]
    expected = RecordFormat(
        **FIELDS,
        input_field="i",
        prompt_format="{system}{instruction}{input}{output}",
        prompt_format_no_input="{system}{instruction}{output}",
        system_prompt_type="fixed",
        system_prompt="S",
    )
    assert rendering.format_from(parsed(*arguments)) == expected
    arguments = ["--type", "conversation", "--messages-field", "m", "--system-field", "s"]
    arguments += ["--tools-field", "t", "--template", "chatml"]
    arguments += ["--message-property-mappings", '{"role": "from"}']
    mapping = {"role": "from"}
    expected = RecordFormat("conversation", messages_field="m", system_field="s", tools_field="t")
    got = rendering.format_from(parsed(*arguments))
    assert got.message_property_mappings == mapping
    assert (got.messages_field, got.system_field, got.tools_field, got.template) == (
        *("m", "s", "t", "chatml"),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-format", "x"], "--prompt-format needs --type instruction"),
        (["--messages-field", "x"], "--messages-field needs --type conversation"),
        (["--type", "conversation", "--text-field", "x"], "--text-field needs --type text"),
        (["--template", "plain"], "--template needs"),
        (["--type", "chat"], "--type chat"),
    ],
)
def test_options_that_do_not_apply_are_an_error(arguments, message):
    with pytest.raises(DataError, match=message):
        rendering.format_from(parsed(*arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--samples", "-1"],
        ["--samples", "1.5"],
        ["--message-property-mappings", "x"],
        ["--message-property-mappings", "[]"],
        ["--message-property-mappings", '{"role": 1}'],
    ],
)
def test_values_that_are_not_right_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


# ---- hf:


HF_SCRIPT = """
import sys
sys.path.insert(0, {data!r})
from shards import DataError
from sources import Problems, RecordFormat, Source
problems = Problems(False)
try:
    source = Source({inputs!r}, RecordFormat(), problems, 1 << 20, **{options!r})
    for _ in range(2):
        print([(d.text, d.where) for d in source.documents()], dict(problems.counts))
except DataError as error:
    print("DataError:", error)
"""


def run_hf(tmp_path, *inputs, **options):
    """What a process without network, and with a cache of its own, prints for some inputs."""
    pytest.importorskip("datasets")
    script = HF_SCRIPT.format(data=sys.path[0], inputs=list(inputs), options=options)
    script = script.replace(sys.path[0], str(Path(sources.__file__).parent))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dataset_of_a_local_folder(tmp_path):
    write(tmp_path / "d" / "train.jsonl", text_lines("a", "", "b", "c"))
    write(tmp_path / "d" / "test.jsonl", text_lines("t"))
    name = f"hf:{tmp_path / 'd'}"
    out = run_hf(tmp_path, name, samples=2)
    documents = [("a", f"{name}:1"), ("b", f"{name}:3")]
    assert out == f"{documents} {{'blank': 1}}\n{documents} {{'blank': 2}}\n"
    assert run_hf(tmp_path, name, split="test").startswith(f"{[('t', f'{name}:1')]} {{}}")


def test_a_dataset_that_cannot_be_had(tmp_path):
    out = run_hf(tmp_path, "hf:nobody/nothing", "hf:also/nothing")
    assert out.startswith("DataError: hf:nobody/nothing: cannot be loaded")
    assert "\nhf:also/nothing: cannot be loaded" in out


def test_without_the_library_hf_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read("hf:some/thing")


def test_an_xz_file_with_a_large_dictionary_is_read(tmp_path):
    """Of 256 MiB, as large archives of text have."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 256 * MIB}]
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"text": "a"}\n', filters=filters))
    assert texts(path) == ["a"]


def test_closed_standard_input_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="closed"):
        read("-")
