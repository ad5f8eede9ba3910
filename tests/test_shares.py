"""Parameters divided over the ranks, with the results of one process."""

import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import load_weights, tiny_settings
from faults import forked
from hypothesis import given
from hypothesis import strategies as st

import train_gpt

# All techniques, an untied head, and a large epsilon: see SUMMED in test_run.py.
ALL = {
    "TRAIN_DOC_ISOLATED": 1,
    "DATA_SHUFFLE": 1,
    "EVAL_DOC_ISOLATED": 1,
    "NUM_LAYERS": 3,
    "TIE_EMBEDDINGS": 0,
    "SMEAR_GATE": 1,
    "BIGRAM_BUCKETS": 64,
    "BIGRAM_DIM": 16,
    "XSA_LAST_N": 1,
    "ORTHO_INIT": 1,
    "LN_SCALE": 1,
    "MUON_WD": 0.5,
    "ADAM_WD": 0.5,
    "EMBED_WD": 0.5,
    "EMA_DECAY": 0.5,
    "GRAD_CLIP_NORM": 0.1,
    "ADAM_EPS": 1e-3,
    "ITERATIONS": 6,
    "WARMDOWN_ITERS": 4,
    "WARMUP_STEPS": 1,
    "TRAIN_LOG_EVERY": 1,
    "SAVE_EVERY": 3,
    "SAVE_TOTAL_LIMIT": 9,
}
MIDDLE = "checkpoint_0000003.pt"
CASES = {"one": 1, "two": 2, "three": 3}
RESUMED = {
    # from the middle of, on so many ranks
    "2_to_1": ("two", 1),
    "1_to_3": ("one", 3),
    "3_to_2": ("three", 2),
}
TENSORS = 12  # of a model of one layer


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def answers(server, dataset, out) -> dict[str, list[dict]]:
    """All runs of this file, by the name of their RUN_ID: what each rank has to say."""

    def job(name: str, nproc: int, **changed: object) -> dict:
        return {"nproc": nproc, "env": tiny_settings(dataset, out, RUN_ID=name, **changed)}

    jobs = {name: job(name, nproc, **ALL) for name, nproc in CASES.items()}
    for name, (source, nproc) in RESUMED.items():
        jobs[name] = job(name, nproc, RESUME=out / source / MIDDLE, **ALL)
    small = {"NUM_LAYERS": 1, "MODEL_DIM": 16, "ITERATIONS": 2, "TRAIN_LOG_EVERY": 1}
    small |= {"ADAM_EPS": 1e-3, "GRAD_CLIP_NORM": 0.1}
    jobs["few"] = job("few", 1, **small)
    jobs["many"] = job("many", TENSORS + 2, **small)
    return forked(server, out / "answers", jobs)


def ended_well(ranks: list[dict]) -> None:
    """Every rank must have come to its end."""
    assert [rank["rc"] for rank in ranks] == [0] * len(ranks), "\n".join(r["log"] for r in ranks)


def losses(folder: Path, kind: str) -> dict[int, float]:
    """The losses that a run reported, by step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {e["step"]: e[f"{kind}_loss"] for e in lines if e["event"] == kind}


def assert_same_end(a: Path, b: Path) -> None:
    """Two runs must end on the same weights and validation loss, up to rounding."""
    first, second = load_weights(a), load_weights(b)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5, msg=name)
    assert losses(a, "val") == pytest.approx(losses(b, "val"), abs=1e-5)


def assert_same_losses(a: Path, b: Path) -> None:
    assert losses(a, "train") == pytest.approx(losses(b, "train"), abs=1e-5)


# ---- the same results


@pytest.mark.parametrize("case", ["two", "three"])
def test_ranks_end_where_one_process_ends(case, answers, out):
    ended_well(answers[case])
    assert_same_end(out / "one", out / case)


@pytest.mark.parametrize("case", ["two", "three"])
def test_ranks_have_the_losses_of_one_process(case, answers, out):
    ended_well(answers[case])
    assert list(losses(out / case, "train")) == [1, 2, 3, 4, 5, 6]
    assert_same_losses(out / "one", out / case)


@pytest.mark.parametrize("case", ["two", "three", "many"])
def test_all_ranks_have_the_same_weights_after_every_step(case, answers):
    weights = [[step["weights"] for step in rank["prints"]] for rank in answers[case]]
    assert [ours for ours in weights if ours != weights[0]] == []


def test_more_ranks_than_tensors(answers, out):
    ended_well(answers["many"])
    assert_same_end(out / "few", out / "many")
    assert_same_losses(out / "few", out / "many")


def test_these_ranks_are_more_than_the_tensors(answers):
    assert len(answers["few"][0]["owned"]) == TENSORS < len(answers["many"])


# ---- divided state


@pytest.mark.parametrize("case", ["two", "three", "many"])
def test_every_parameter_is_in_the_optimizer_of_exactly_one_rank(case, answers):
    names = [name for rank in answers[case] for name in rank["owned"]]
    whole = "few" if case == "many" else "one"
    assert sorted(names) == sorted(answers[whole][0]["owned"])


def state_elements(rank: dict) -> int:
    """The elements of all moments that a rank keeps."""
    kinds = ("exp_avg", "exp_avg_sq", "momentum_buffer")
    return sum(sizes.get(kind, 0) for sizes in rank["owned"].values() for kind in kinds)


@pytest.mark.parametrize(("case", "most"), [("two", 0.65), ("three", 0.6)])
def test_optimizer_state_is_divided(case, most, answers):
    """Not evenly: a tensor's owner keeps one or two moments, and the embedding is large."""
    whole = state_elements(answers["one"][0])
    shares = [state_elements(rank) for rank in answers[case]]
    assert sum(shares) == whole
    assert 0 < min(shares) <= max(shares) < most * whole


# ---- checkpoints


@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_serves_another_number_of_ranks(case, answers, out):
    ended_well(answers[case])
    assert list(losses(out / case, "train")) == [4, 5, 6]
    assert_same_end(out / "one", out / case)


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_has_the_losses_of_the_whole_one(case, answers, out):
    ended_well(answers[case])
    whole = losses(out / "one", "train")
    rest = {step: whole[step] for step in (4, 5, 6)}
    assert losses(out / case, "train") == pytest.approx(rest, abs=1e-5)


def test_a_checkpoint_holds_the_state_of_all_ranks(answers, out):
    """As one process would have written it."""
    files = [(out / case / MIDDLE).read_bytes()[32:] for case in ("one", "three")]
    loaded = [torch.load(io.BytesIO(data), weights_only=True) for data in files]
    one, three = (state["params"] for state in loaded)
    assert one.keys() == three.keys()
    for name in one:
        assert one[name].keys() == three[name].keys()
        for kind in one[name]:
            what = f"{name} {kind}"
            torch.testing.assert_close(
                one[name][kind], three[name][kind], rtol=1e-3, atol=1e-5, msg=what
            )


# ---- divide

tensors = st.dictionaries(st.text(max_size=3), st.integers(0, 3000), min_size=1, max_size=30)


@given(tensors, st.integers(1, 40))
def test_places_do_not_overlap(sizes, ranks):
    places, width = train_gpt.divide(sizes, ranks)
    starts = {name: owner * width + at for name, (owner, at) in places.items()}
    taken = sorted((at, at + sizes[name]) for name, at in starts.items() if sizes[name])
    assert places.keys() == sizes.keys()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken))


@given(tensors, st.integers(1, 40))
def test_a_tensor_lies_wholly_in_a_share_and_leaves_the_last_element(sizes, ranks):
    places, width = train_gpt.divide(sizes, ranks)
    for name, (owner, at) in places.items():
        assert 0 <= owner < ranks
        assert at >= 0
        assert at + sizes[name] <= width - 1


@given(tensors, st.integers(1, 40))
def test_places_are_aligned_for_vector_instructions(sizes, ranks):
    places, width = train_gpt.divide(sizes, ranks)
    assert {4 * at % 256 for _, at in places.values()} == {0}
    assert 4 * width % 256 == 0


@given(tensors, st.integers(1, 40))
def test_shares_are_balanced(sizes, ranks):
    """No share is fuller than the emptiest by more than the largest tensor, padded."""
    places, width = train_gpt.divide(sizes, ranks)
    loads = [0] * ranks
    for name, (owner, _) in places.items():
        loads[owner] += sizes[name]
    assert max(loads) - min(loads) <= max(sizes.values()) + 64 * len(sizes)
    assert width <= sum(sizes.values()) / ranks + max(sizes.values()) + 64 * (len(sizes) + 2)


@given(tensors, st.integers(1, 40))
def test_places_do_not_depend_on_chance(sizes, ranks):
    """Every rank computes them for itself, and must find the same."""
    assert train_gpt.divide(sizes, ranks) == train_gpt.divide(dict(sizes), ranks)
