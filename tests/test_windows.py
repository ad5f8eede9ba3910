"""Windows and the score over them, against brute force: one token at a time, in float64."""

import dataclasses
import functools
import itertools
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import VOCAB, double_model, load_weights, packed_operator, resolve, run_main
from conftest import document_stream as stream
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg

BOS = 1
TINY = {
    "VOCAB_SIZE": 23,
    "NUM_LAYERS": 2,
    "MODEL_DIM": 16,
    "NUM_HEADS": 2,
    "NUM_KV_HEADS": 1,
    "TRAIN_SEQ_LEN": 8,
    "TRAIN_BATCH_TOKENS": 16,
    "MICRO_BATCH_TOKENS": 16,
    "VAL_BATCH_SIZE": 1024,
    "ROPE_BASE": 50.0,
    "LOGIT_SOFTCAP": 5.0,
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
    "MLP_ACT": "leaky_relu2",
}

settings = functools.partial(resolve, TINY)


def document_of(tokens, i):
    """First input, and end of the inputs, of the document that holds input i."""
    count = len(tokens) - 1
    begin = next((j for j in range(i, 0, -1) if tokens[j] == BOS), 0)
    end = next((j for j in range(i + 1, count) if tokens[j] == BOS), count)
    return begin, end


def part_of(tokens, i, hp):
    """First input and end of the part of the stream that is scored for itself, of input i."""
    return document_of(tokens, i) if hp.eval_doc_isolated else (0, len(tokens) - 1)


def first_input(tokens, i, hp):
    """Where the context of input i's target begins, by the definition of a sliding window."""
    begin, _ = part_of(tokens, i, hp)
    length = hp.eval_seq_len or hp.train_seq_len
    stride = hp.eval_stride or length
    if i < begin + length:
        return begin
    if stride == length:
        return begin + (i - begin) // length * length
    return begin + ((i - begin - length) // stride + 1) * stride


# ---- windows

CASES = {
    "tokens": st.lists(st.sampled_from([BOS, 2, 3, 4, 5, 6]), min_size=2, max_size=90),
    "length": st.integers(1, 40),
    "share": st.floats(0, 1),
    "isolated": st.booleans(),
}


def window_settings(length, share, isolated):
    stride = round(share * length)
    return settings(EVAL_SEQ_LEN=length, EVAL_STRIDE=stride, EVAL_DOC_ISOLATED=int(isolated))


@given(**CASES)
def test_each_target_is_scored_once_and_in_order(tokens, length, share, isolated):
    tokens = np.array(tokens, np.uint16)
    spans = tg.windows(tokens, window_settings(length, share, isolated))
    scored = [i for _, stop, first in spans.tolist() for i in range(first, stop)]
    assert scored == [*range(len(tokens) - 1)]


@given(**CASES)
def test_windows_are_no_longer_than_the_context(tokens, length, share, isolated):
    hp = window_settings(length, share, isolated)
    for first, stop, scored in tg.windows(np.array(tokens, np.uint16), hp).tolist():
        assert 0 <= first <= scored < stop <= len(tokens) - 1
        assert stop - first <= length


@given(**CASES)
def test_windows_do_not_depend_on_what_follows(tokens, length, share, isolated):
    """Neither on the length of the stream nor on where the document ends."""
    hp, cut = window_settings(length, share, isolated), len(tokens) // 2
    context = {}
    for what in (tokens, tokens[:cut], tokens[:cut] + [2] * 50, tokens[:cut] + [BOS, 2] * 9):
        for first, stop, scored in tg.windows(np.array(what, np.uint16), hp).tolist():
            for i in range(scored, min(stop, cut - 1)):
                assert context.setdefault(i, first) == first


@given(**CASES)
def test_isolated_windows_stay_within_their_document(tokens, length, share, isolated):
    hp = window_settings(length, share, True)
    for first, stop, _ in tg.windows(np.array(tokens, np.uint16), hp).tolist():
        assert BOS not in tokens[first + 1 : stop]


@given(**CASES)
def test_contexts_are_as_long_as_promised(tokens, length, share, isolated):
    hp = window_settings(length, share, isolated)
    tokens, stride = np.array(tokens, np.uint16), hp.eval_stride or length
    for first, stop, scored in tg.windows(tokens, hp).tolist():
        begin, end = part_of(tokens, scored, hp)
        if scored == begin:  # the first window of a document or stream scores all that it holds
            assert (first, stop) == (begin, min(begin + length, end))
        else:
            assert stop - scored == min(stride, end - scored)
            assert scored - first == length - stride


@given(**CASES)
def test_every_context_is_that_of_the_definition(tokens, length, share, isolated):
    hp = window_settings(length, share, isolated)
    tokens = np.array(tokens, np.uint16)
    for first, stop, scored in tg.windows(tokens, hp).tolist():
        for i in range(scored, stop):
            assert first == first_input(tokens, i, hp)


def test_windows_of_a_known_stream():
    tokens = stream([20], head=True)  # 19 targets
    overlapping = [[0, 8, 0], [3, 11, 8], [6, 14, 11], [9, 17, 14], [12, 19, 17]]
    assert tg.windows(tokens, settings(EVAL_STRIDE=3)).tolist() == overlapping
    plain = [[0, 8, 0], [8, 16, 8], [16, 19, 16]]
    assert tg.windows(tokens, settings()).tolist() == plain
    assert tg.windows(tokens, settings(EVAL_STRIDE=8)).tolist() == plain


def test_windows_of_known_documents():
    tokens = stream([1, 8, 9, 4])
    isolated = settings(EVAL_DOC_ISOLATED=1, EVAL_STRIDE=2)
    expected = [[0, 1, 0], [1, 9, 1], [9, 17, 9], [11, 18, 17], [18, 21, 18]]
    assert tg.windows(tokens, isolated).tolist() == expected
    expected[3] = [17, 18, 17]
    assert tg.windows(tokens, settings(EVAL_DOC_ISOLATED=1)).tolist() == expected


def test_what_comes_before_the_first_bos_is_a_document():
    tokens = stream([3, 4], head=False)
    assert tg.windows(tokens, settings(EVAL_DOC_ISOLATED=1)).tolist() == [[0, 3, 0], [3, 6, 3]]


def test_a_bos_at_the_end_of_the_stream_is_a_target_only():
    tokens = stream([3, 1])
    assert tg.windows(tokens, settings(EVAL_DOC_ISOLATED=1)).tolist() == [[0, 3, 0]]


def test_context_of_validation_is_that_of_training_if_not_set():
    tokens = stream([50])
    for stride in (0, 3):
        default = tg.windows(tokens, settings(EVAL_STRIDE=stride))
        same = tg.windows(tokens, settings(EVAL_STRIDE=stride, EVAL_SEQ_LEN=8))
        longer = tg.windows(tokens, settings(EVAL_STRIDE=stride, EVAL_SEQ_LEN=16))
        assert default.tolist() == same.tolist() != longer.tolist()


# ---- the score


def score(model, tokens, hp, rank=0, world_size=1):
    """NLL of each token but the first."""
    run = tg.Run(hp)
    run.rank, run.world_size = rank, world_size
    val = SimpleNamespace(tokens=tokens, starts=[0, len(tokens)], text_bytes=100)
    return tg.score(model, val, run)[0]


def brute_force(model, tokens, hp):
    """The same from a forward pass for each token. What is past it is noise, as many tokens of it
    as take the rotary table of the context's length."""
    nll, noise = [], np.random.default_rng(9)
    length, train = hp.eval_seq_len or hp.train_seq_len, hp.train_seq_len
    for i in range(len(tokens) - 1):
        first = first_input(tokens, i, hp)
        row = noise.integers(2, 23, max(i + 1 - first, length if length > train else 0))
        row[: i + 1 - first] = tokens[first : i + 1]
        goals = np.append(
            tokens[first + 1 : i + 2], noise.integers(2, 23, len(row) - i - 1 + first)
        )
        with torch.no_grad():
            both = torch.from_numpy(row)[None], torch.from_numpy(goals.astype(np.int64))[None]
            nll.append(model(*both)[0, i - first].item())
    return np.array(nll)


STREAMS = {
    "one_document": [53],
    "documents": [5, 1, 1, 30, 8, 9, 17, 2, 16, 4],
    "short_documents": [1, 2, 1, 3, 1, 1],
    "two_tokens": [2],
    "under_a_window": [6],
    "one_window": [9],
}
WINDOWS = {
    "plain": {},
    "stride": {"EVAL_STRIDE": 3},
    "stride_of_one": {"EVAL_STRIDE": 1},
    "isolated": {"EVAL_DOC_ISOLATED": 1},
    "isolated_stride": {"EVAL_DOC_ISOLATED": 1, "EVAL_STRIDE": 3},
    "longer": {"EVAL_SEQ_LEN": 20, "EVAL_STRIDE": 7},
    "longer_plain": {"EVAL_SEQ_LEN": 20},
    "longer_isolated": {"EVAL_SEQ_LEN": 20, "EVAL_STRIDE": 7, "EVAL_DOC_ISOLATED": 1},
    "odd_isolated": {"TRAIN_SEQ_LEN": 5, "EVAL_SEQ_LEN": 23, "EVAL_DOC_ISOLATED": 1},
    "shorter": {"EVAL_SEQ_LEN": 5, "EVAL_STRIDE": 2, "EVAL_DOC_ISOLATED": 1},
}


def scoring_settings(name, **values):
    """Settings of a way to score; with longer contexts, of a scaled rotary table too."""
    hp = settings(**{"TRAIN_BATCH_TOKENS": 40, "MICRO_BATCH_TOKENS": 40, **values, **WINDOWS[name]})
    return dataclasses.replace(hp, rope_scaling="yarn")


@pytest.mark.parametrize("lengths", STREAMS)
@pytest.mark.parametrize("name", WINDOWS)
def test_score_equals_one_token_at_a_time(name, lengths):
    hp, tokens = scoring_settings(name), stream(STREAMS[lengths])
    model = double_model(hp)
    expected = brute_force(model, tokens, hp)
    nll = score(model, tokens, hp)
    assert nll.dtype == np.float32
    np.testing.assert_allclose(nll, expected, atol=2e-6)


@pytest.mark.parametrize("name", ["longer", "longer_isolated", "isolated_stride"])
def test_score_of_the_stack_equals_one_token_at_a_time(name):
    hp, tokens = scoring_settings(name, **STACK), stream(STREAMS["documents"])
    model = double_model(hp)
    np.testing.assert_allclose(score(model, tokens, hp), brute_force(model, tokens, hp), atol=2e-6)


def test_ways_to_score_differ():
    """So that the comparisons above are of something."""
    tokens, scores = stream(STREAMS["documents"]), []
    for name in ("plain", "stride", "stride_of_one", "isolated", "isolated_stride", "longer"):
        hp = scoring_settings(name)
        scores.append(score(double_model(hp), tokens, hp))
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(scores, 2))


def score_on_ranks(model, tokens, hp, world_size, monkeypatch):
    """Every rank's results: first each one's share is recorded, then their sum is given."""
    shares, results = [], []
    for rank in range(world_size):
        monkeypatch.setattr(tg.dist, "all_reduce", lambda t: shares.append(t.clone()))
        score(model, tokens, hp, rank, world_size)
    for rank in range(world_size):
        monkeypatch.setattr(tg.dist, "all_reduce", lambda t: t.copy_(sum(shares)))
        results.append(score(model, tokens, hp, rank, world_size))
    return shares, results


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("lengths", STREAMS)
@pytest.mark.parametrize("name", WINDOWS)
def test_ranks_together_score_as_one_process(name, lengths, world_size, monkeypatch):
    hp, tokens = scoring_settings(name), stream(STREAMS[lengths])
    model = double_model(hp)
    alone = score(model, tokens, hp)
    shares, results = score_on_ranks(model, tokens, hp, world_size, monkeypatch)
    set_by = torch.stack(shares).count_nonzero(0)  # the last one stands for what is not scored
    assert (set_by[:-1] == 1).all()
    assert set_by[-1] == 0
    for nll in results:
        assert np.array_equal(nll, alone)


def test_ranks_share_the_windows_evenly():
    tokens, hp = stream([401]), scoring_settings("stride")
    rows = []
    for rank in range(4):
        counted = CountedForward()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tg.dist, "all_reduce", lambda t: None)
            score(counted, tokens, hp, rank, 4)
        rows.append(sum(shape[0] for shape in counted.shapes))
    assert max(rows) - min(rows) <= 5  # rows of a forward pass


# ---- isolation


@pytest.mark.parametrize("name", ["isolated", "isolated_stride", "longer_isolated"])
def test_nothing_of_other_documents_reaches_a_document(name):
    """Bit for bit, whatever stands before and after; the target that ends a document is the next
    one's BOS, which is known."""
    hp = scoring_settings(name, **STACK)
    model, tokens = double_model(hp), stream([9, 25, 12])
    before = score(model, tokens, hp)
    changed = tokens.copy()
    changed[1:9] = (changed[1:9] + 3) % 21 + 2
    changed[35:] = (changed[35:] + 3) % 21 + 2
    after = score(model, changed, hp)
    assert np.array_equal(after[9:34], before[9:34])
    assert (after[:8] != before[:8]).any()
    assert (after[34:] != before[34:]).any()


def test_a_document_is_scored_alike_wherever_it_stands():
    hp = scoring_settings("longer_isolated", **STACK)
    model, document = double_model(hp), stream([26])
    alone = score(model, document, hp)
    for before in ([1], [3, 40], [8]):
        nll = score(model, np.concatenate([stream(before), document]), hp)
        np.testing.assert_allclose(nll[sum(before) :], alone, atol=1e-6)


def test_without_isolation_documents_see_those_before():
    hp = scoring_settings("stride")
    model, tokens = double_model(hp), stream([9, 25])
    changed = tokens.copy()
    changed[1:9] = (changed[1:9] + 3) % 21 + 2
    assert np.abs(score(model, changed, hp) - score(model, tokens, hp))[9:14].min() > 0


@pytest.mark.parametrize("name", WINDOWS)
def test_no_score_depends_on_a_later_token(name):
    hp = scoring_settings(name, **STACK)
    model, tokens = double_model(hp), stream([6, 1, 30, 12])
    before = score(model, tokens, hp)
    for t in (4, 12, 20, 30, 40):
        changed = tokens.copy()
        changed[t + 1 :] = np.where(tokens[t + 1 :] == BOS, BOS, (tokens[t + 1 :] + 3) % 21 + 2)
        np.testing.assert_allclose(score(model, changed, hp)[:t], before[:t], atol=1e-6)


# ---- cost


class CountedForward:
    """Stands for a model: records the shapes that it is given, and that they are padded rightly."""

    def __init__(self):
        self.shapes, self.goals = [], 0

    def __call__(self, inputs, targets, documents=None):
        self.shapes.append(tuple(inputs.shape))
        self.goals += (targets != tg.IGNORE).sum().item()
        return torch.ones(targets.shape)

    @property
    def tokens(self):
        return sum(math.prod(shape) for shape in self.shapes)


def test_isolation_makes_striding_cheap_on_short_documents():
    rng = np.random.default_rng(0)
    tokens = stream([max(1, int(n)) for n in rng.lognormal(3, 1, 300)])
    big = {"TRAIN_SEQ_LEN": 64, "TRAIN_BATCH_TOKENS": 64, "MICRO_BATCH_TOKENS": 64}
    cost = {}
    for isolated in (0, 1):
        counted = CountedForward()
        hp = settings(**big, EVAL_STRIDE=4, EVAL_DOC_ISOLATED=isolated)
        nll = score(counted, tokens, hp)
        assert (nll == 1).all()
        assert counted.goals == len(nll)
        cost[isolated] = counted.tokens / len(nll)
    assert 15 < cost[0] < 17  # a window of 64 for every 4 tokens
    assert cost[1] < 5


def test_documents_no_longer_than_the_context_are_read_once():
    tokens = stream([*range(1, 65)] * 3)
    big = {"TRAIN_SEQ_LEN": 64, "TRAIN_BATCH_TOKENS": 64, "MICRO_BATCH_TOKENS": 64}
    counted = CountedForward()
    score(counted, tokens, settings(**big, EVAL_STRIDE=1, EVAL_DOC_ISOLATED=1))
    assert counted.tokens < 1.6 * len(tokens)


@pytest.mark.parametrize("values", [{}, {"EVAL_STRIDE": 64}], ids=["plain", "stride"])
@pytest.mark.parametrize("train", [64, 100, 1024])
def test_rows_have_few_lengths_and_fill_a_forward_pass(train, values):
    """Each shape is compiled, and torch.compile bears eight of a module, training's included."""
    tokens = stream([*range(1, 3000, 13)])
    values = {**values, "EVAL_SEQ_LEN": 1024, "EVAL_DOC_ISOLATED": 1, "TRAIN_SEQ_LEN": train}
    batch = {"TRAIN_BATCH_TOKENS": 64 * train, "MICRO_BATCH_TOKENS": 64 * train}
    counted = CountedForward()
    hp = settings(**values, **batch)
    hp = dataclasses.replace(hp, val_batch_size=3 * 1024)
    score(counted, tokens, hp)
    lengths = {shape[1] for shape in counted.shapes}
    assert len({*counted.shapes}) == len(lengths) <= 5
    assert {rows for rows, length in counted.shapes} == {
        min(3 * 1024, 64 * train) // length for length in lengths
    }


def test_compiled_model_scores_documents_of_any_length(monkeypatch):
    """One that may not be compiled more often than that, in training and scoring."""
    hp = scoring_settings("longer_isolated", **STACK, TRAIN_SEQ_LEN=10)
    hp = dataclasses.replace(hp, eval_seq_len=400, eval_stride=0, val_batch_size=1600)
    tokens = stream([500, 3, 1, 300, 200, 100, 60, 40, 20, 12, 9, 5])
    model = double_model(hp)
    expected = score(model, tokens, hp)
    monkeypatch.setitem(tg.PACKED, "cpu", packed_operator())
    torch._dynamo.reset()  # graphs of other tests count towards its limit
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="eager")):
        compiled = tg.compile_model(model)
    batch = torch.randint(2, 23, (2, 4, 10), generator=torch.Generator().manual_seed(0))
    compiled(*batch).sum().backward()
    np.testing.assert_allclose(score(compiled, tokens, hp), expected, atol=1e-6)


# ---- a whole run


def test_run_scores_with_its_windows_and_saves_them_in_order(dataset, tiny_env, tmp_path):
    """And EVAL_ONLY, from the artifact alone, with the same and with other windows."""
    stack = {name: str(value) for name, value in STACK.items() if name != "BIGRAM_BUCKETS"}
    windows = {"EVAL_SEQ_LEN": "96", "EVAL_STRIDE": "40", "EVAL_DOC_ISOLATED": "1"}
    env = {**tiny_env, **stack, "BIGRAM_BUCKETS": "64", "ROPE_SCALING": "ntk", "EMA_DECAY": "0.5"}
    run_main({**env, **windows, "SAVE_NLL": str(tmp_path / "run.npy")})
    artifact = tmp_path / "logs" / "tiny" / "final_model.artifact"
    base = {name: tiny_env[name] for name in ("DATA_PATH", "TOKENIZER_PATH", "OUT_DIR", "DEVICE")}
    base |= {"EVAL_ONLY": "1", "ARTIFACT": str(artifact), "DTYPE": "fp32", "COMPILE": "0"}
    run_main({**base, "SAVE_NLL": str(tmp_path / "again.npy")})
    run_main({**base, "EVAL_STRIDE": "10", "SAVE_NLL": str(tmp_path / "other.npy")})
    saved, again, other = (np.load(tmp_path / f"{n}.npy") for n in ("run", "again", "other"))
    assert np.array_equal(saved, again)
    assert np.abs(other - saved).max() > 0
    hp = tg.load_settings({**env, **windows}, check_places=False)
    model = tg.build_model(hp, torch.float64).double()
    model.load_state_dict(tg.load_artifact(artifact, hp)[1])
    assert hp.vocab_size == VOCAB
    some = dataset.val[:300]
    cut = len(some) - 1 - 40  # where the end of the cut stream moves no window
    np.testing.assert_allclose(saved[:cut], brute_force(model, some, hp)[:cut], atol=2e-5)
    assert load_weights(artifact.parent).keys() == model.state_dict().keys()
