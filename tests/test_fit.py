"""The size of the artifact: its forecast, and FIT_BUDGET, which brings it to the cap."""

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LoggedRun, load, resolve, run_cli, tiny_settings

import frontier
import keeper
import quantizer
import train_gpt as tg

ALONE = Path(tg.__file__).stat().st_size  # the code, where quantizer.py is not used
CODE = ALONE + Path(quantizer.__file__).stat().st_size
DIMS = (288, 320, 384)  # at least 257, so that every matrix of a block is quantized


SHAPE = {
    "NUM_LAYERS": 1,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 4,
    "VOCAB_SIZE": 512,
    "TRAIN_SEQ_LEN": 16,
    "TRAIN_BATCH_TOKENS": 64,
}


def settings(tokenizer, **values):
    return resolve(SHAPE, TOKENIZER_PATH=tokenizer, **values)


@functools.cache
def gaussian_model(dim):
    """A model of Gaussian weights of different deviations, as after training."""
    hp = dataclasses.replace(tg.Hyperparameters(), vocab_size=512, num_layers=1, num_heads=4)
    torch.manual_seed(0)
    model = tg.build_model(dataclasses.replace(hp, model_dim=dim, train_seq_len=16))
    for i, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, 0.0, 0.02 * (1 + i % 5))
    return model


def cap_for(model, hp, share):
    """The cap that leaves this share of what the levels take with the settings as they are."""
    state = model.state_dict()
    empty = {n: torch.zeros_like(w) if tg.bits_of(n, w, hp) else w for n, w in state.items()}
    floor, plain = (len(tg.pack_artifact(weights, hp)) for weights in (empty, state))
    return CODE + floor + int(share * (plain - floor))


def fit(model, hp, cap):
    """The artifact of a cap, and the lines that were logged."""
    run = LoggedRun(dataclasses.replace(hp, artifact_max_bytes=cap))
    return quantizer.make_artifact(model.state_dict(), None, run), run.lines


def fit_settings(tokenizer, dim, **values):
    bits = {f"QUANT_BITS_{part}": 6 for part in ("MLP", "ATTN")}
    sigma = {"FIT_BUDGET": "sigma", "QUANT_CLIP": "sigma"}
    return settings(tokenizer, MODEL_DIM=dim, **sigma, **bits, **values)


# ---- filling the cap


@pytest.mark.parametrize("share", [0.4, 0.7, 0.97])
@pytest.mark.parametrize("dim", DIMS)
def test_fit_fills_the_cap_to_within_0_1_percent(tokenizer, dim, share):
    hp = fit_settings(tokenizer, dim)
    model = gaussian_model(dim)
    cap = cap_for(model, hp, share)
    total = CODE + len(fit(model, hp, cap)[0])
    assert 0.999 * cap <= total <= cap


def test_fit_fills_the_cap_with_rans_too(tokenizer):
    hp = fit_settings(tokenizer, 288, COMPRESSOR="rans")
    model = gaussian_model(288)
    cap = cap_for(model, hp, 0.8)
    total = CODE + len(fit(model, hp, cap)[0])
    assert 0.999 * cap <= total <= cap


@pytest.mark.parametrize("share", [1.1, 1.4])
def test_sigma_grows_an_artifact_that_leaves_the_cap_empty(tokenizer, share):
    hp = fit_settings(tokenizer, 320)
    model = gaussian_model(320)
    cap = cap_for(model, hp, share)
    total = CODE + len(fit(model, hp, cap)[0])
    assert 0.999 * cap <= total <= cap


def test_fit_gives_the_same_bytes_twice(tokenizer):
    hp = fit_settings(tokenizer, 288)
    model = gaussian_model(288)
    cap = cap_for(model, hp, 0.8)
    assert fit(model, hp, cap) == fit(model, hp, cap)


def test_fit_does_not_change_the_weights(tokenizer):
    hp = fit_settings(tokenizer, 288)
    model = gaussian_model(288)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    fit(model, hp, CODE + 300_000)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("share", [0.6, 0.85, 1.2])
@pytest.mark.parametrize("dim", DIMS)
def test_sigma_needs_few_tries(tokenizer, dim, share):
    """The size law gives the slope, so that a step or two come close."""
    hp = fit_settings(tokenizer, dim, COMPRESSOR="rans")
    model = gaussian_model(dim)
    cap = cap_for(model, hp, share)
    (line,) = fit(model, hp, cap)[1]
    assert int(re.search(r"tries:(\d+)", line)[1]) <= 5


def test_the_line_of_a_fit_tells_what_was_done(tokenizer, tmp_path):
    hp = fit_settings(tokenizer, 288)
    model = gaussian_model(288)
    cap = cap_for(model, hp, 0.8)
    data, (line,) = fit(model, hp, cap)
    k, fill = re.fullmatch(
        r"fit_budget:sigma quant_sigma:([\d.]+) tries:\d+ fill:([\d.]+)", line
    ).groups()
    assert float(fill) == pytest.approx((CODE + len(data)) / cap, abs=1e-4)
    assert float(k) == pytest.approx(load(data, tmp_path, tokenizer)[0].quant_sigma, abs=1e-4)


def test_the_artifact_of_a_fit_has_the_levels_of_its_sigma(tokenizer, tmp_path):
    hp = fit_settings(tokenizer, 288)
    model = gaussian_model(288)
    data, _ = fit(model, hp, cap_for(model, hp, 0.8))
    solved, weights = load(data, tmp_path, tokenizer)
    assert solved.quant_sigma > 1.02 * hp.quant_sigma
    assert tg.pack_artifact(model.state_dict(), solved) == data
    name = "blocks.0.fc.weight"
    w = model.state_dict()[name].numpy().astype(np.float64)
    step = solved.quant_sigma * w.std(1, keepdims=True) / 31
    assert np.abs(weights[name].numpy() - w).max() <= (0.51 * step).max()


@pytest.mark.parametrize("jump", [3.3, 4.9, 6.1, 8.7, 11.1])
def test_fit_takes_the_largest_that_fits_of_all_it_tried(tokenizer, monkeypatch, jump):
    """Sizes that jump over what would fill the cap: the last try need not be the best."""
    tried = []

    def pack(state, hp):
        x = float(np.log2(hp.quant_sigma))
        tried.append(int(1000 * (900 if x < jump else 500) - x))
        return bytes(tried[-1])

    monkeypatch.setattr(tg, "pack_artifact", pack)
    data, _ = fit(gaussian_model(288), fit_settings(tokenizer, 288), CODE + 700_000)
    assert len(data) == max(size for size in tried if size <= 700_000)


# ---- where nothing is to be done, or not enough can be


def test_without_a_fit_an_artifact_over_the_cap_is_left_to_be_refused(tokenizer):
    hp = settings(tokenizer, MODEL_DIM=288)
    plain = tg.pack_artifact(gaussian_model(288).state_dict(), hp)
    assert fit(gaussian_model(288), hp, CODE + 1000) == (plain, [])


@pytest.mark.parametrize("most", [-CODE + 1, -1, 0, 1, 1000])
def test_a_cap_that_cannot_be_met_gives_the_smallest_and_says_so(tokenizer, most):
    hp = fit_settings(tokenizer, 288)
    model = gaussian_model(288)
    state = model.state_dict()
    smallest = tg.pack_artifact(state, dataclasses.replace(hp, quant_sigma=2.0**12))
    data, (line,) = fit(model, hp, CODE + most)
    assert len(data) <= len(smallest)
    assert line.endswith("(it cannot do more)")


def test_a_cap_that_sigma_cannot_fill_gives_the_largest_and_says_so(tokenizer):
    hp = fit_settings(tokenizer, 288)
    model = gaussian_model(288)
    data, (line,) = fit(model, hp, 50_000_000)
    finest = dataclasses.replace(hp, quant_sigma=4.0)
    assert data == tg.pack_artifact(model.state_dict(), finest)
    assert line.endswith("(it cannot do more)")


@pytest.mark.parametrize("start", [0.001, 1.0, 3.99, 4.0, 4096.0, 5000.0])
def test_sigma_may_start_outside_of_its_search(tokenizer, start):
    hp = fit_settings(tokenizer, 288, QUANT_SIGMA=start)
    model = gaussian_model(288)
    cap = cap_for(model, fit_settings(tokenizer, 288), 0.9)
    total = CODE + len(fit(model, hp, cap)[0])
    assert 0.999 * cap <= total <= cap


def test_sigma_without_its_clip_is_refused(tokenizer):
    message = "FIT_BUDGET=sigma: needs QUANT_METHOD=round and QUANT_CLIP=sigma"
    with pytest.raises(tg.UserError, match=message):
        settings(tokenizer, FIT_BUDGET="sigma", QUANT_CLIP="rowmax")
    with pytest.raises(tg.UserError, match=message):
        settings(tokenizer, FIT_BUDGET="sigma", QUANT_CLIP="sigma", QUANT_METHOD="gptq")


# ---- the steps of gptq

WIDTH = 96


def step_settings(tokenizer, **values):
    gptq = {"QUANT_METHOD": "gptq", "FIT_BUDGET": "step"}
    return settings(tokenizer, MODEL_DIM=WIDTH, **gptq, **values)


def cap_of_rate(rate):
    """The cap that leaves so many bits a weight."""
    return CODE + int(rate * sum(p.numel() for p in gaussian_model(WIDTH).parameters()) / 8)


def restored_error(data, tmp_path, tokenizer):
    """The error of an artifact's weights, relative to their size."""
    _, weights = load(data, tmp_path, tokenizer)
    state = gaussian_model(WIDTH).state_dict()
    error = sum((weights[name] - w).square().sum().item() for name, w in state.items())
    return (error / sum(w.square().sum().item() for w in state.values())) ** 0.5


@pytest.mark.parametrize("rate", [2.0, 4.0, 6.5])
def test_step_fills_the_cap_to_within_0_1_percent_in_few_tries(tokenizer, rate):
    cap = cap_of_rate(rate)
    data, (line,) = fit(gaussian_model(WIDTH), step_settings(tokenizer), cap)
    assert 0.999 * cap <= CODE + len(data) <= cap
    found = re.fullmatch(r"fit_budget:step quant_step:[\d.]+ tries:(\d+) fill:([\d.]+)", line)
    assert int(found[1]) <= 6
    assert float(found[2]) == pytest.approx((CODE + len(data)) / cap, abs=1e-4)


def test_step_needs_no_quant_step(tokenizer):
    """It guesses its first one."""
    cap = cap_of_rate(3.0)
    hp = step_settings(tokenizer)
    expected = fit(gaussian_model(WIDTH), hp, cap)
    assert fit(gaussian_model(WIDTH), dataclasses.replace(hp, quant_step=1e9), cap) == expected


def test_two_bits_a_weight_more_give_a_quarter_of_the_error(tokenizer, tmp_path):
    """By rate and distortion, one halves it."""
    hp = step_settings(tokenizer)
    data = [fit(gaussian_model(WIDTH), hp, cap_of_rate(rate))[0] for rate in (2.5, 4.5)]
    errors = [restored_error(artifact, tmp_path, tokenizer) for artifact in data]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("most", [-CODE + 1, 0, 1])
def test_a_cap_that_steps_cannot_meet_gives_a_small_artifact_and_says_so(tokenizer, tmp_path, most):
    data, (line,) = fit(gaussian_model(WIDTH), step_settings(tokenizer), CODE + most)
    load(data, tmp_path, tokenizer)
    assert len(data) < 0.02 * sum(4 * p.numel() for p in gaussian_model(WIDTH).parameters())
    assert line.endswith("(it cannot do more)")


@pytest.mark.parametrize("classes", [0, 1])
def test_a_cap_that_steps_cannot_fill_gives_fine_ones_and_says_so(tokenizer, tmp_path, classes):
    hp = step_settings(tokenizer, QUANT_CLASSES=classes)
    data, (line,) = fit(gaussian_model(WIDTH), hp, 50_000_000)
    assert restored_error(data, tmp_path, tokenizer) < 0.02
    assert line.endswith("(it cannot do more)")


def test_step_without_gptq_is_refused(tokenizer):
    with pytest.raises(tg.UserError, match="FIT_BUDGET=step: needs QUANT_METHOD=gptq"):
        settings(tokenizer, FIT_BUDGET="step")


# ---- the forecast


@pytest.mark.parametrize("values", [{}, {"QUANT_CLIP": "sigma", "COMPRESSOR": "rans"}], ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_forecast_is_the_size_of_the_initial_model_with_gaussian_for_zero_weights(
    tokenizer, dim, values
):
    hp = settings(tokenizer, MODEL_DIM=dim, BIGRAM_BUCKETS=2048, **values)
    torch.manual_seed(0)
    model = tg.build_model(hp)
    run = LoggedRun(hp)
    keeper.forecast(model.state_dict(), run)
    total, code, size, cap = map(int, re.findall(r"\d+", run.lines[0]))
    state = model.state_dict()
    zero = [name for name, w in state.items() if not w.any()]
    assert "blocks.0.proj.weight" in zero
    filled = {n: 0.3 * torch.randn(w.shape) if n in zero else w for n, w in state.items()}
    assert size == pytest.approx(len(tg.pack_artifact(filled, hp)), rel=0.02)
    files = CODE if hp.compressor == "rans" else ALONE
    files += Path(frontier.__file__).stat().st_size  # of BIGRAM_BUCKETS
    assert (total, code, cap) == (code + size, files, hp.artifact_max_bytes)


def test_forecast_leaves_the_model_and_the_random_state_alone(tokenizer):
    hp = settings(tokenizer, MODEL_DIM=288)
    model = tg.build_model(hp)
    before, state = {n: w.clone() for n, w in model.state_dict().items()}, torch.get_rng_state()
    keeper.forecast(model.state_dict(), LoggedRun(hp))
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_forecast_warns_exactly_if_the_total_is_over_the_cap(tokenizer):
    hp = settings(tokenizer, MODEL_DIM=288)
    model, run = gaussian_model(288), LoggedRun(hp)
    keeper.forecast(model.state_dict(), run)
    total = int(re.search(r"\d+", run.lines[0])[0])
    for cap in (total, total - 1):
        run.hp = dataclasses.replace(hp, artifact_max_bytes=cap)
        keeper.forecast(model.state_dict(), run)
    assert ["warning" in line for line in run.lines] == [False, False, True]


def test_forecast_over_the_cap_names_the_fit_budget(tokenizer):
    hp = fit_settings(tokenizer, 288, ARTIFACT_MAX_BYTES=CODE + 100_000)
    run = LoggedRun(hp)
    keeper.forecast(gaussian_model(288).state_dict(), run)
    assert run.lines[0].endswith("; warning: over the cap, with FIT_BUDGET=sigma")


# ---- whole runs

FITTED = {"MODEL_DIM": 128, "MLP_MULT": 5, "FIT_BUDGET": "sigma", "QUANT_CLIP": "sigma"}


@pytest.fixture(scope="module")
def fitted(dataset, tmp_path_factory):
    """A run by the program that fits its artifact: how it ended, its folder, its settings."""
    root = tmp_path_factory.mktemp("fit")
    texts = tiny_settings(dataset, root / "logs", **FITTED, ARTIFACT_MAX_BYTES=CODE + 300_000)
    outcome = run_cli(texts, cwd=root)
    assert outcome.rc == 0, outcome.stderr
    return outcome, root, texts


def final(outcome):
    """The final score as it was logged."""
    return re.search(r"^final_\w+_roundtrip_exact (.*)$", outcome.stdout, re.MULTILINE)[1]


def test_forecast_is_logged_once_and_before_training(fitted):
    lines = fitted[0].stdout.splitlines()
    assert [line.startswith("forecast: ") for line in lines].count(True) == 1
    first_step = next(i for i, line in enumerate(lines) if line.startswith("step:"))
    assert next(i for i, line in enumerate(lines) if line.startswith("forecast: ")) < first_step


def test_a_run_fills_its_cap(fitted):
    size = (fitted[1] / "logs/tiny/final_model.artifact").stat().st_size
    cap = CODE + 300_000
    assert 0.999 * cap <= CODE + size <= cap


def test_the_artifact_of_a_run_carries_the_sigma_that_was_solved(fitted, dataset):
    solved = float(re.search(r"quant_sigma:([\d.]+)", fitted[0].stdout)[1])
    path = fitted[1] / "logs/tiny/final_model.artifact"
    hp, _ = tg.load_artifact(path, settings(dataset.tokenizer))
    assert hp.quant_sigma == pytest.approx(solved, abs=1e-4)
    assert abs(solved - tg.Hyperparameters().quant_sigma) > 0.1


def test_the_artifact_of_a_fit_scores_as_the_run_did(fitted, tmp_path):
    outcome, root, texts = fitted
    environ = {
        **{n: texts[n] for n in ("DATA_PATH", "TOKENIZER_PATH", "VAL_BATCH_SIZE", "DTYPE")},
        "EVAL_ONLY": "1",
        "ARTIFACT": str(root / "logs/tiny/final_model.artifact"),
        "OUT_DIR": str(tmp_path / "logs"),
        "DEVICE": "cpu",
    }
    again = run_cli(environ, cwd=tmp_path)
    assert again.rc == 0, again.stderr
    assert final(again) == final(outcome)


def test_a_run_that_cannot_be_fitted_ends_with_the_error_of_the_cap(dataset, tmp_path):
    changed = {**FITTED, "ITERATIONS": 1, "ARTIFACT_MAX_BYTES": CODE + 1000}
    outcome = run_cli(tiny_settings(dataset, tmp_path / "logs", **changed), cwd=tmp_path)
    assert outcome.rc == 1
    assert re.fullmatch(r"train_gpt\.py: error: .*ARTIFACT_MAX_BYTES=\d+.*\n", outcome.stderr)
    assert "(it cannot do more)" in outcome.stdout
    assert (tmp_path / "logs/tiny/final_model.artifact").is_file()
