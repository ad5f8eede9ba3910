"""Documents in packed rows: attention, training, shuffled reading, against dense masks, brute force
and documents alone."""

import dataclasses
import functools
import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (
    cut_documents,
    dense_attention,
    document_stream,
    double_model,
    new_run,
    packed_operator,
    resolve,
    run_main,
    shard_bytes,
    trainer_of,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import keeper
import train_gpt as tg

BOS = 1
CPU = torch.device("cpu")
TINY = {
    "VOCAB_SIZE": 23,
    "NUM_LAYERS": 3,
    "MODEL_DIM": 32,
    "NUM_HEADS": 2,
    "NUM_KV_HEADS": 1,
    "TRAIN_SEQ_LEN": 8,
    "TRAIN_BATCH_TOKENS": 128,
    "MICRO_BATCH_TOKENS": 64,
    "TRAIN_DOC_ISOLATED": 1,
    "DEVICE": "cpu",
    "DTYPE": "fp32",
}
STACK = {
    "XSA_LAST_N": 1,
    "SMEAR_GATE": 1,
    "BIGRAM_BUCKETS": 50,
    "BIGRAM_DIM": 8,
    "LN_SCALE": 1,
    "ROPE_DIMS": 4,
}
settings = functools.partial(resolve, TINY)


def brute_offsets(begins, longest):
    """The same as `cut`, token by token."""
    offsets, since = [], 0
    for at, (place, begin) in enumerate(
        (place, begin) for row in begins.tolist() for place, begin in enumerate(row)
    ):
        if place == 0 or begin or since == longest:
            offsets.append(at)
            since = 0
        since += 1
    return [*offsets, begins.size]


@given(
    rows=st.integers(1, 3),
    marks=st.lists(st.booleans(), min_size=1, max_size=40),
    longest=st.integers(1, 12),
)
def test_cuts_are_at_rows_documents_and_the_longest_piece(rows, marks, longest):
    begins = np.array(marks * rows).reshape(rows, -1)
    documents = tg.cut(begins.copy(), longest, CPU)
    assert documents.offsets.tolist() == brute_offsets(begins, longest)
    assert documents.offsets.dtype == torch.int32
    assert documents.longest == longest


# ---- attention

STREAMS = {  # lengths of documents in two rows of 40, the first of which may go on from before
    "one_token_each": [1] * 80,
    "exactly_the_context": [10] * 8,
    "many_contexts": [35, 45],
    "one": [80],
    "mixed": [1, 2, 17, 1, 30, 10, 19],
}
LONGEST = 10


def documents_of(name):
    return cut_documents(STREAMS[name], 2, LONGEST)


def heads(dtype, T=40):
    """q, k, v as the model has them: parts of one buffer, of which the heads of q are four."""
    made = torch.randn(2, T, 4 + 2 + 2, 32, generator=torch.Generator().manual_seed(0))
    return made.to(dtype).transpose(1, 2).requires_grad_()


def with_gradient(attend, made, grad):
    y = attend(*made.split((4, 2, 2), dim=1))
    (given,) = torch.autograd.grad(y, made, grad)
    return y.detach().double(), given.double()


def fake_varlen(q, k, v, starts, same, longest, again, window_size, **_):
    """PyTorch's varlen attention, by its documentation: tokens (N, H, Dh), pieces by offsets."""
    assert (window_size, same is starts, again) == ((-1, 0), True, longest)
    assert starts.diff().max() <= longest
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return dense_attention(q, k, v, starts).to(q.dtype)[0].transpose(0, 1)


def on_cuda(*args):
    """Attend as on CUDA."""
    with (
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(tg, "varlen_attn", fake_varlen),
    ):
        return tg.attend(*args)


@pytest.mark.parametrize("way", [tg.attend, on_cuda])
@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
@pytest.mark.parametrize("name", STREAMS)
def test_attention_is_that_of_the_dense_mask(name, dtype, near, way):
    documents, made = documents_of(name), heads(dtype)
    grad = torch.randn(2, 4, 40, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = with_gradient(lambda *qkv: way(*qkv, documents), made, grad)
    exact = with_gradient(
        lambda *qkv: dense_attention(*qkv, documents.offsets), made, grad.double()
    )
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= near * b.abs().max()


def test_pieces_of_all_lengths_ask_for_few(monkeypatch):
    """A CPU's library keeps the code of products for each length: 0.8 GB of it in 100 steps."""
    sizes, asked = [*range(1, 200), 64], set()
    attend = tg.attend
    monkeypatch.setattr(tg, "attend", lambda *x: asked.add(x[0].size(2)) or attend(*x))
    made = torch.randn(1, 2, sum(sizes), 8)
    offsets = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)
    tg.attend_by_piece(made, made, made, offsets)
    assert asked == {64, 128, 192, 256}


def test_nothing_crosses_a_start():
    """Not even what is not finite."""
    documents, made = documents_of("mixed"), heads(torch.float32).detach()
    offsets = documents.offsets.tolist()
    before = tg.attend(*made.split((4, 2, 2), dim=1), documents)
    made[:, :, offsets[2] : offsets[3]] = torch.nan
    after = tg.attend(*made.split((4, 2, 2), dim=1), documents)
    changed = (before != after).any(dim=(1, 3))
    assert changed[0].nonzero().flatten().tolist() == [*range(offsets[2], offsets[3])]


@pytest.mark.parametrize("last", [1, 7, 39])
def test_the_last_queries_alone_attend_as_all_do(last):
    q, k, v = heads(torch.float64).detach().split((4, 2, 2), dim=1)
    whole = tg.attend(q, k, v)[:, :, -last:]
    torch.testing.assert_close(tg.attend(q[:, :, -last:], k, v), whole, atol=1e-12, rtol=0)


# ---- the model


def model_of(**values):
    """A model with these settings."""
    return double_model(settings(**values))


def stream(lengths):
    """Documents of these lengths, their BOS included, in a row."""
    return document_stream(lengths).astype(np.int64)


def test_a_packed_row_has_the_loss_and_gradient_of_its_pieces_alone():
    model = model_of(**STACK)
    tokens = stream([3, 1, 8, 20, 9, 23])
    inputs, targets = torch.from_numpy(tokens)[None], torch.from_numpy(np.roll(tokens, -1))[None]
    documents = tg.cut((inputs == BOS).numpy(), 8, CPU)
    packed = model(inputs, targets, documents)
    spans = [*itertools.pairwise(documents.offsets.tolist())]
    alone = torch.cat([model(inputs[:, a:b], targets[:, a:b]) for a, b in spans], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    parameters = [*model.parameters()]
    together = torch.autograd.grad(packed.sum(), parameters)
    apart = torch.autograd.grad(alone.sum(), parameters)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max() + 1), rtol=0)


@pytest.mark.parametrize("values", [{}, STACK | {"XSA_LAST_N": 3}], ids=["plain", "stack"])
@pytest.mark.parametrize("last", [1, 3, 8])
def test_the_last_targets_alone_have_the_same_nll(last, values):
    model = model_of(**values)
    tokens = torch.from_numpy(stream([9, 7])).view(2, 8)
    whole = model(tokens, tokens.roll(-1, 1))
    some = model(tokens, tokens.roll(-1, 1)[:, -last:])
    torch.testing.assert_close(some, whole[:, -last:], atol=1e-6, rtol=0)


def test_the_last_layer_and_the_head_compute_the_last_targets_alone():
    model = model_of()
    tokens = torch.from_numpy(stream([9, 7])).view(2, 8)
    shapes = []
    for block in model.blocks:
        block.proj.register_forward_hook(lambda m, x, y: shapes.append(y.shape[1]))
    model(tokens, tokens[:, -3:])
    assert shapes == [8, 8, 3]


def test_one_graph_serves_any_number_of_documents(monkeypatch):
    """With a kernel that is one operator, as those of CUDA and of CPUs with AMX are."""
    monkeypatch.setitem(tg.PACKED, "cpu", packed_operator())
    model = model_of(**STACK)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=counter)):
        compiled = tg.compile_model(model)
    for lengths in ([64], [8, 56], [1] * 64, [3, 30, 31]):
        tokens = torch.from_numpy(stream(lengths))[None]
        documents = tg.cut((tokens == BOS).numpy(), 8, CPU)
        loss = compiled(tokens, tokens.roll(-1, 1), documents)
        expected = model(tokens, tokens.roll(-1, 1), documents)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
        loss.sum().backward()
    assert counter.frame_count == 1


# ---- batches


def write_shards(path):
    """Three shards of documents; the second and the third begin inside one."""
    tokens = stream(np.random.default_rng(1).integers(1, 60, 200).tolist())
    for number, part in enumerate(np.split(tokens, [1500, 4001])):
        (path / f"fineweb_train_{number:06d}.bin").write_bytes(shard_bytes(part))
    return path


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path)


def loaded(folder, steps, rank=0, world_size=1, **values):
    """Micro-batches of some steps."""
    run = new_run(TINY | {"DATA_PATH": folder}, **values)
    run.rank, run.world_size = rank, world_size
    made = tg.batches(tg.part("TokenStream", run.hp)("train", run), run)
    return [next(made) for _ in range(steps)]


def pieces(steps):
    """All pieces of batches, with their targets, that have any."""
    found = []
    for inputs, targets, documents in itertools.chain(*steps):
        for a, b in itertools.pairwise(documents.offsets.tolist()):
            x, y = inputs.flatten()[a:b], targets.flatten()[a:b]
            if (y != tg.IGNORE).any():
                found.append((tuple(x.tolist()), tuple(y.tolist())))
    return sorted(found)


@pytest.mark.parametrize("shuffle", [0, 1])
@pytest.mark.parametrize("micro", [64, 128])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_pieces_depend_neither_on_ranks_nor_on_micro_batches(folder, ranks, micro, shuffle):
    values = {"TRAIN_BATCH_TOKENS": 256, "DATA_SHUFFLE": shuffle}
    alone = pieces(loaded(folder, 5, **values))
    values["MICRO_BATCH_TOKENS"] = micro
    shares = [pieces(loaded(folder, 5, rank, ranks, **values)) for rank in range(ranks)]
    assert sorted(itertools.chain(*shares)) == alone


def test_pieces_are_of_one_document_and_no_longer_than_a_sequence(folder):
    for x, _ in pieces(loaded(folder, 9)):
        assert BOS not in x[1:]
        assert len(x) <= 8


def test_few_documents_are_cut_by_rows(folder):
    """Rows of eight sequences end inside a document as often as a row of 64 tokens does."""
    (((inputs, _, documents),),) = loaded(folder, 1, TRAIN_BATCH_TOKENS=64)
    assert inputs.shape == (1, 64)
    inner = [a for a in documents.offsets.tolist()[1:-1] if inputs[0, a] != BOS]
    begins = (inputs[0] == BOS).nonzero().flatten().tolist()
    for a in inner:  # only where a document has had a whole sequence
        since = a - max([0, *(b for b in begins if b < a)])
        assert since % 8 == 0


@pytest.mark.parametrize(("sequences", "row"), [(1, 8), (6, 16), (8, 64), (24, 64), (7, 8)])
def test_rows_divide_a_batch(sequences, row):
    assert tg.row_length(settings(TRAIN_BATCH_TOKENS=8 * sequences, MICRO_BATCH_TOKENS=0)) == row
    dense = settings(TRAIN_BATCH_TOKENS=8 * sequences, MICRO_BATCH_TOKENS=0, TRAIN_DOC_ISOLATED=0)
    assert tg.row_length(dense) == 8


# ---- shuffled reading


def shuffled_stream(folder, **values):
    run = new_run(TINY | {"DATA_PATH": folder}, DATA_SHUFFLE=1, **values)
    return tg.part("TokenStream", run.hp)("train", run)


def read_shuffled(stream_, start=0, count=0):
    """Tokens in the order of training; the first epoch by default."""
    return stream_.read(start, count or stream_.total)


def as_text(tokens):
    """Tokens as a text that holds those of each part of them."""
    return "," + ",".join(map(str, tokens)) + ","


def shards_of(folder):
    """The tokens of each training shard."""
    paths = sorted(folder.glob("*_train_*.bin"))
    return [np.fromfile(path, "<u2", offset=1024) for path in paths]


def documents_in(tokens):
    """The documents of a stream, each a tuple."""
    starts = sorted({*np.flatnonzero(tokens == BOS).tolist()} - {0})
    return [tuple(part.tolist()) for part in np.split(tokens, starts)]


def plain_documents(folder):
    """The documents of each shard; what a shard begins with is one of them."""
    return [documents_in(part) for part in shards_of(folder)]


def test_each_epoch_has_every_shard_and_every_document_once(folder):
    """A shard's documents stay together, so that few are in memory at a time."""
    stream_, orders = shuffled_stream(folder), []
    contents = [sorted(itertools.chain(*documents)) for documents in plain_documents(folder)]
    for epoch in range(3):
        tokens = read_shuffled(stream_, epoch * stream_.total)
        for order in itertools.permutations(range(3)):
            ends = stream_.sizes[[*order]].cumsum()[:-1]
            parts = [sorted(part.tolist()) for part in np.split(tokens, ends)]
            if parts == [contents[shard] for shard in order]:
                orders.append(tuple(tokens.tolist()))
    assert len({*orders}) == 3


def test_documents_stay_whole(folder):
    """But for those that go on in the next shard, which are read as two."""
    text = as_text(read_shuffled(shuffled_stream(folder)))
    for document in itertools.chain(*plain_documents(folder)):
        assert as_text(document) in text


def test_the_order_is_not_that_of_the_shards_in_training_alone(folder):
    """Validation, and what identifies the data, read by train_gpt.py's own class."""
    stream_ = shuffled_stream(folder)
    plain = np.concatenate(shards_of(folder))
    assert np.array_equal(tg.TokenStream.read(stream_, 0, stream_.total), plain)
    trained = read_shuffled(stream_)
    assert (trained != plain).mean() > 0.5
    ((first, *_),) = loaded(folder, 1, DATA_SHUFFLE=1)
    assert first[0].flatten().tolist() == trained[: first[0].numel()].tolist()


def test_documents_begin_at_the_bos_that_validation_finds(folder):
    """Which is known after the stream has been scanned."""
    stream_ = shuffled_stream(folder)
    stream_.run.hp = dataclasses.replace(stream_.run.hp, bos=5)
    text = as_text(read_shuffled(stream_))
    for part in shards_of(folder):
        for document in np.split(part, np.flatnonzero(part == 5)):
            assert as_text(document) in text


@given(start=st.integers(0, 20_000), count=st.integers(1, 3000))
def test_any_part_can_be_read_alone(shuffled, start, count):
    """So that ranks and resumed runs read what one run reads in a row."""
    stream_, tokens = shuffled
    assert np.array_equal(read_shuffled(stream_, start, count), tokens[start : start + count])


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory):
    path = write_shards(tmp_path_factory.mktemp("shuffled"))
    stream_ = shuffled_stream(path)
    return stream_, read_shuffled(stream_, 0, 25_000)


def test_the_order_is_the_seeds(folder):
    orders = [read_shuffled(shuffled_stream(folder, SEED=s)).tolist() for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


# ---- a whole run


def test_a_run_resumes_with_the_same_bits(dataset, tiny_env, tmp_path):
    values = {"TRAIN_DOC_ISOLATED": "1", "DATA_SHUFFLE": "1", "EVAL_DOC_ISOLATED": "1"}
    env = {**tiny_env, **values, "ITERATIONS": "6", "SAVE_EVERY": "3", "RUN_ID": "whole"}
    run_main(env)
    folder = tmp_path / "logs" / "whole"
    checkpoint = folder / keeper.checkpoint_name(3)
    run_main({**env, "RUN_ID": "again", "RESUME": str(checkpoint)})
    whole, again = (
        tmp_path / "logs" / name / "final_model.artifact" for name in ("whole", "again")
    )
    assert whole.read_bytes() == again.read_bytes()


def test_a_diagnosis_takes_packed_batches(dataset, tiny_env):
    """keeper.py looks through a batch with its documents."""
    run = new_run(tiny_env, TRAIN_DOC_ISOLATED=1)
    model = tg.build_model(run.hp, run.dtype)
    trainer = trainer_of(model, run)
    trainer.step(0, 0.0)
    assert keeper.what_is_not_finite(trainer, trainer.batch) == "nothing in the batch of rank 0"
