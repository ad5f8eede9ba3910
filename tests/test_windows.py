"""Sliding windows and documents by themselves: what is read, what is scored, and the scores."""

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg
from train_gpt import BOS

MODEL = {
    **{"VOCAB_SIZE": 32, "NUM_LAYERS": 2, "MODEL_DIM": 16, "NUM_HEADS": 2, "NUM_KV_HEADS": 1},
    **{
        "TRAIN_SEQ_LEN": 8,
        "TRAIN_BATCH_TOKENS": 16,
        "VAL_BATCH_SIZE": 256,
        "MICRO_BATCH_TOKENS": 16,
    },
    **{"DEVICE": "cpu", "DTYPE": "fp32", "LOGIT_SOFTCAP": 5, "XSA_LAST_N": 1, "SMEAR_GATE": 1},
    **{"BIGRAM_BUCKETS": 64, "BIGRAM_DIM": 4, "ROPE_SCALING": "ntk"},
}
STREAMS = st.lists(st.integers(0, 4), min_size=2, max_size=60).map(np.array)


def make_run(**changes) -> tg.Run:
    settings = {name: str(value) for name, value in (MODEL | changes).items()}
    return tg.Run(tg.load_settings(settings, check_places=False))


class Stream:
    """Validation tokens without shards or a tokenizer."""

    def __init__(self, tokens) -> None:
        self.tokens, self.text_bytes = np.asarray(tokens, np.uint16), 10


def tokens_of(lengths, seed=0) -> np.ndarray:
    """Documents of these lengths, BOS included."""
    rng = np.random.default_rng(seed)
    parts = [[BOS, *rng.integers(2, 32, length - 1)] for length in lengths]
    return np.concatenate(parts).astype(np.uint16)


def brute_force(model, tokens, length, stride, isolated) -> list[float]:
    """NLL of every target from a float64 forward pass of its own, over the context that it is due:
    the window of `length` inputs whose end is the first multiple of the stride behind the first
    window of its document, or the document's end."""
    model, nll = model.double(), []
    model.dtype = torch.float64
    for i in range(len(tokens) - 1):
        begin, end = 0, len(tokens) - 1
        if isolated:
            begin = max((j for j in range(i + 1) if tokens[j] == BOS), default=0)
            end = min([j for j in range(i + 1, end) if tokens[j] == BOS], default=end)
        step = stride or length
        beyond = max(0, i - begin - length + 1)  # inputs behind the first window, up to this one
        stop = min(begin + length + -(-beyond // step) * step, end)
        first = (
            begin if not beyond else (stop - length if step < length else i - (beyond - 1) % step)
        )
        inputs = torch.from_numpy(tokens[first : i + 1].astype(np.int64))[None]
        targets = torch.full_like(inputs, tg.IGNORE)
        targets[0, -1] = int(tokens[i + 1])
        # The rotary table is the scaled one for windows over the trained length.
        trained = MODEL["TRAIN_SEQ_LEN"]
        scaled = length > trained and (stop - first > trained or not isolated)
        pad = length - inputs.size(1) if scaled else 0
        inputs, targets = (torch.nn.functional.pad(t, (0, pad)) for t in (inputs, targets))
        targets[0, i + 1 - first :] = tg.IGNORE
        with torch.no_grad():
            nll.append(model(inputs, targets)[0, i - first].item())
    return nll


@given(STREAMS, st.integers(1, 12), st.integers(0, 12), st.booleans())
def test_each_target_is_scored_once_with_the_context_that_it_is_due(tokens, length, stride, alone):
    stride = min(stride, length)
    hp = make_run(EVAL_SEQ_LEN=length, EVAL_STRIDE=stride, EVAL_DOC_ISOLATED=int(alone)).hp
    scored = []
    for first, stop, start in tg.windows(tokens, hp).tolist():
        assert 0 < stop - first <= length
        assert first <= start < stop <= len(tokens) - 1
        if alone:  # nothing but the first input is a BOS
            assert not (tokens[first + 1 : stop] == BOS).any()
            begins = first == 0 or tokens[first] == BOS
        else:
            begins = first == 0
        if not begins and 0 < stride < length:
            assert stop - first == length
            assert start - first >= length - stride
        scored += range(start, stop)
    assert scored == list(range(len(tokens) - 1))


@pytest.mark.parametrize("isolated", [0, 1])
@pytest.mark.parametrize(("length", "stride"), [(8, 0), (8, 3), (8, 1), (16, 4), (16, 0)])
@pytest.mark.parametrize("lengths", [[40], [5, 23, 1, 9, 17, 2], [1, 1, 1], [2]])
def test_scores_are_those_of_a_forward_pass_for_each_token(lengths, length, stride, isolated):
    run = make_run(EVAL_SEQ_LEN=length, EVAL_STRIDE=stride, EVAL_DOC_ISOLATED=isolated)
    tokens, model = tokens_of(lengths), random_model(run.hp)
    nll, losses = tg.score(model, Stream(tokens), run)
    expected = brute_force(model, tokens, length, stride, isolated)
    np.testing.assert_allclose(nll, expected, rtol=2e-5, atol=2e-5)
    assert losses["val_loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_an_isolated_document_knows_nothing_of_the_one_before():
    run = make_run(EVAL_STRIDE=3, EVAL_DOC_ISOLATED=1)
    tokens, model = tokens_of([11, 20]), random_model(run.hp)
    other = tokens.copy()
    other[1:11] = 31 - other[1:11]
    scores = [tg.score(model, Stream(stream), run)[0] for stream in (tokens, other)]
    assert not np.array_equal(scores[0][:10], scores[1][:10])
    np.testing.assert_array_equal(scores[0][11:], scores[1][11:])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("isolated", [0, 1])
def test_any_number_of_ranks_scores_the_same(monkeypatch, world_size, isolated):
    run = make_run(EVAL_STRIDE=3, EVAL_DOC_ISOLATED=isolated)
    tokens, model = tokens_of([5, 23, 1, 9, 17, 2]), random_model(run.hp)
    alone, total = tg.score(model, Stream(tokens), run)[0], np.zeros(len(tokens) - 1)
    monkeypatch.setattr(tg.dist, "all_reduce", lambda tensor: None)
    for rank in range(world_size):
        run.rank, run.world_size = rank, world_size
        part = tg.score(model, Stream(tokens), run)[0]
        assert not (part.astype(bool) & total.astype(bool)).any()
        total += part
    np.testing.assert_allclose(total, alone, rtol=1e-6)


def test_short_documents_cost_little():
    """A row of an eighth of the context for each."""
    run = make_run(EVAL_SEQ_LEN=1024, EVAL_STRIDE=64, EVAL_DOC_ISOLATED=1, VAL_BATCH_SIZE=4096)
    tokens, model, read = tokens_of([40] * 50), random_model(run.hp), []

    def count(inputs, targets):
        read.append(inputs.numel())
        return model(inputs, targets)

    tg.score(count, Stream(tokens), run)
    assert sum(read) <= 50 * 1024 // 8
