"""lab/guards.py: a healthy run raises nothing; frozen, diverging and leaping ones are caught."""

import importlib
import math
import sys

import numpy as np
import pytest
from conftest import REPO

sys.path.append(str(REPO / "lab"))
guards = importlib.import_module("guards")

# The reference run of peers.md 2.3: 13,780 steps, 43.54 ms each, losses with a deviation of 0.0764.
STEPS = 13_780
STEP_MS = 43.54
DEVIATION = 0.0764
SETTINGS = {
    "iterations": 20_000,
    "max_wallclock_seconds": 600.0,
    "warmdown_iters": 1200,
    "warmdown_frac": "",
    "lr_schedule": "linear",
    "quant_method": "round",
}


def healthy() -> np.ndarray:
    """The reference run's losses without noise: its improvement in 50 steps is 0.073% at step
    3,000, 0.025% at 7,000, 0.011% at 11,000 and 0.079% in the warmdown, a power law between."""
    steps = np.arange(1, STEPS + 1)
    x = np.log(steps)
    at = np.log([3000, 7000, 11_000])
    rates = np.log([0.00073, 0.00025, 0.00011])
    slopes = np.diff(rates) / np.diff(at)
    rate = np.interp(x, at, rates)
    rate[x < at[0]] += slopes[0] * (x - at[0])[x < at[0]]
    rate[x > at[2]] += slopes[1] * (x - at[2])[x > at[2]]
    rate = np.exp(rate)
    rate[steps > STEPS - 1200] = 0.00079
    to_come = np.cumsum(rate[::-1])[::-1] / 50
    losses = np.minimum(2.0606 * np.exp(np.minimum(to_come, 3)), 6.93)
    losses[1] = 16.9  # as in the run
    return losses


HEALTHY = healthy()


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, DEVIATION, STEPS)


def replay(losses, every=1, norms=None, vals=None, **changed):
    """What the guards find in a run with these losses, logged as train_gpt.py does."""
    judge = guards.Guards()
    judge.add({"event": "start", "settings": SETTINGS | changed})
    found = []
    trained = {*range(1, 11), *range(every, STEPS + 1, every)}
    validated = set(range(200, STEPS + 1, 200)) if vals is not None else set()
    for step in sorted(trained | validated):
        if step > len(losses):
            break
        event = {"step": step, "train_time_ms": STEP_MS * step}
        if step in trained:
            norm = {} if norms is None else {"grad_norm": float(norms[step - 1])}
            loss = {"train_loss": float(losses[step - 1])}
            found += judge.add({"event": "train", **loss, **norm, **event})
        if step in validated:
            found += judge.add({"event": "val", "val_loss": float(vals[step - 1]), **event})
    return found


def alarms(found, guard=""):
    return [f for f in found if f.is_alarm and guard in ("", f.guard)]


def first(found, guard):
    return next((f.step for f in alarms(found, guard)), math.inf)


def frozen(at: int) -> np.ndarray:
    losses = HEALTHY.copy()
    losses[at:] = losses[at - 1]
    return losses


def rising(at: int, rate: float) -> np.ndarray:
    losses = HEALTHY.copy()
    losses[at:] = losses[at - 1] * (1 + rate * np.arange(1, STEPS - at + 1))
    return losses


# ---- the curve is that of the reference


@pytest.mark.parametrize(
    ("begin", "end", "percent"),
    [(2000, 4000, 0.073), (6000, 8000, 0.025), (10_000, 12_000, 0.011), (12_580, 13_780, 0.079)],
)
def test_the_curve_improves_as_the_reference_run(begin, end, percent):
    rate = -np.log(HEALTHY[end - 1] / HEALTHY[begin]) * 50 / (end - begin)
    assert 100 * rate == pytest.approx(percent, rel=0.15)


# ---- healthy runs


def test_a_healthy_run_raises_nothing_in_20_seeds():
    assert [alarms(replay(HEALTHY + noise(seed))) for seed in range(20)] == 20 * [[]]


@pytest.mark.parametrize("every", [10, 50, 200])
def test_a_healthy_run_that_logs_seldom_raises_nothing_in_20_seeds(every):
    assert [alarms(replay(HEALTHY + noise(seed), every)) for seed in range(20)] == 20 * [[]]


def test_a_healthy_run_with_validation_raises_nothing():
    rng = np.random.default_rng(7)
    vals = HEALTHY + rng.normal(0, 0.001, STEPS)
    assert alarms(replay(HEALTHY + noise(1), 10, vals=vals)) == []


def test_phases_of_a_healthy_run():
    notes = [f.text for f in replay(HEALTHY + noise(0)) if f.guard == "phase"]
    assert notes == ["warmup -> converging", "converging -> warmdown"]


def test_one_spike_of_a_healthy_size_raises_nothing():
    losses = HEALTHY + noise(0)
    losses[7000] += 0.3
    assert alarms(replay(losses)) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_of_small_batches_raises_nothing(seed):
    """Its losses scatter by 11%, and neighbours, of the same text, have a correlation of 0.7."""
    rng = np.random.default_rng(seed)
    shocks = rng.normal(0, 0.11 * (1 - 0.7**2) ** 0.5, STEPS)
    for step in range(1, STEPS):
        shocks[step] += 0.7 * shocks[step - 1]
    assert alarms(replay(HEALTHY * (1 + shocks))) == []
    thousand = (HEALTHY * (1 + shocks))[:1000]
    assert alarms(replay(thousand, iterations=1000, warmdown_frac=0.3)) == []


# ---- plateau


@pytest.mark.parametrize("seed", range(1000, 1004))
def test_a_run_that_is_frozen_at_6000_is_flagged_by_step_12000(seed):
    found = replay(frozen(6000) + noise(seed))
    assert 6000 < first(found, "plateau") <= 12_000
    assert {f.guard for f in alarms(found)} == {"plateau"}


def test_a_run_that_is_frozen_at_6000_is_flagged_by_its_validation_too():
    vals = frozen(6000)
    found = replay(frozen(6000) + noise(0), every=200, vals=vals)
    assert 6000 < first(found, "plateau") <= 9200  # the window of 22% has to be flat


def test_no_plateau_is_flagged_once_the_warmdown_has_begun():
    found = replay(frozen(12_000) + noise(0))
    assert alarms(found) == []
    # Without a warmdown, the same one is flagged.
    found = replay(np.full(STEPS, 2.5) + 0.01 * noise(0), warmdown_iters=STEPS)
    assert alarms(found) == []
    found = replay(np.full(STEPS, 2.5) + 0.01 * noise(0), warmdown_iters=0)
    assert first(found, "plateau") < 0.23 * STEPS


def test_losses_that_are_too_few_to_tell_a_plateau_are_noted_once():
    found = replay(frozen(6000) + noise(0), every=10)
    notes = [f.text for f in found if f.guard == "plateau"]
    assert len(notes) == 1
    assert "TRAIN_LOG_EVERY=1 would do" in notes[0]


# ---- divergence


@pytest.mark.parametrize(
    ("rate", "every", "within"),
    [(0.001, 1, 120), (0.001, 10, 250), (0.001, 200, 1600), (0.0001, 1, 900), (0.01, 1, 40)],
)
def test_a_rising_loss_is_caught(rate, every, within):
    for seed in range(3):
        found = replay((rising(6000, rate) + noise(seed))[:8000], every)
        assert 6000 < first(found, "divergence") <= 6000 + within


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_caught_at_once_even_early(loss):
    losses = HEALTHY + noise(0)
    losses[20] = loss
    found = alarms(replay(losses[:30]))
    assert [(f.guard, f.step) for f in found] == [("divergence", 21)]


def test_nothing_rises_before_a_tenth_of_the_run_is_over():
    losses = np.linspace(2, 4, STEPS // 10 - 1)
    assert alarms(replay(losses)) == []
    assert alarms(replay(np.linspace(2, 4, STEPS // 8)), "divergence")


def test_the_warmup_counts_before_the_tenth():
    losses = np.linspace(2, 4, STEPS // 8)
    assert alarms(replay(losses, lr_warmup_steps=400)) == []
    assert alarms(replay(losses, lr_warmup_ratio=0.03)) == []


def test_losses_that_scatter_are_unstable():
    rng = np.random.default_rng(0)
    losses = HEALTHY + noise(0)
    losses[8000:] += rng.normal(0, 0.6, STEPS - 8000)
    assert 8000 < first(replay(losses), "phase") < 8600


# ---- spikes


def test_a_spike_is_caught_at_its_step():
    losses = HEALTHY + noise(0)
    losses[7000] = HEALTHY[7000] + 0.8
    assert [(f.guard, f.step) for f in alarms(replay(losses))] == [("spikes", 7001)]


def test_a_leap_of_the_gradient_is_caught_at_its_step():
    norms = np.random.default_rng(1).uniform(0.9, 1.1, STEPS)
    norms[5000] = 9.0
    assert alarms(replay(HEALTHY + noise(0), norms=norms)) == []
    norms[5000] = 12.0
    found = alarms(replay(HEALTHY + noise(0), norms=norms))
    assert [(f.guard, f.step) for f in found] == [("spikes", 5001)]


def test_many_spikes_are_told_at_most_every_50_steps():
    losses = HEALTHY + noise(0)
    losses[7000:7100:10] += 0.9
    steps = [f.step for f in alarms(replay(losses), "spikes")]
    assert steps == [7001, 7051]


def test_a_spike_hardly_moves_what_is_usual():
    losses = np.full(4000, 2.0)
    losses[[2000, 2030, 2060]] = 3.0
    judge = guards.Guards()
    judge.add({"event": "start", "settings": SETTINGS})
    for step, loss in enumerate(losses, start=1):
        event = {"event": "train", "step": step, "train_time_ms": STEP_MS * step}
        judge.add({**event, "train_loss": loss})
        if step == 2070:
            assert 2.4 < max(judge.losses) < 2.6


def test_a_skipped_step_is_told():
    judge = guards.Guards()
    judge.add({"event": "start", "settings": SETTINGS})
    found = judge.add({"event": "skipped_step", "step": 7, "in_a_row": 1})
    assert [(f.guard, f.step, f.is_alarm) for f in found] == [("spikes", 7, True)]


# ---- early stop


def test_a_healthy_run_whose_rates_fall_at_the_end_is_not_to_be_stopped():
    vals = np.full(STEPS, 2.2)  # as still as can be
    found = replay(HEALTHY + noise(0), every=10, vals=vals)
    assert alarms(found, "early_stop") == []


def test_a_rise_of_200_steps_is_to_be_stopped():
    found = replay(rising(6000, 0.001) + noise(0))
    since = first(found, "divergence")
    assert since + 200 <= first(found, "early_stop") < since + 230


@pytest.mark.parametrize("changed", [{"lr_schedule": "constant"}, {"warmdown_iters": 0}])
def test_a_plateau_of_500_steps_is_to_be_stopped_where_no_warmdown_comes(changed):
    losses = 2.5 + 0.001 * noise(0)
    found = replay(losses, every=5, **changed)
    assert "flat for 500 steps" in alarms(found, "early_stop")[0].text
    since = first(found, "plateau")
    assert since + 500 <= first(found, "early_stop") < since + 530
    assert alarms(replay(losses, every=5, lr_schedule="cosine"), "early_stop") == []


def test_five_still_evaluations_are_to_be_stopped_where_no_warmdown_comes():
    falling = 3 - 0.0001 * np.arange(STEPS)
    vals = falling.copy()
    vals[3000:] = vals[3000]
    found = alarms(replay(falling, every=50, vals=vals, warmdown_iters=0), "early_stop")
    assert "evaluations" in found[0].text
    assert found[0].step <= 3000 + 200 * 10


def test_half_of_the_best_efficiency_is_to_be_stopped_where_no_warmdown_comes():
    losses = np.concatenate([3 - 0.0001 * np.arange(6000), 2.4 - 0.00002 * np.arange(STEPS - 6000)])
    found = alarms(replay(losses, every=10, warmdown_iters=0), "early_stop")
    assert "gains under 50%" in found[0].text
    assert 6000 < found[0].step < 6000 + 0.25 * STEPS


# ---- resumed runs


def test_a_resumed_run_goes_on_with_the_losses_up_to_its_step():
    judge = guards.Guards()
    start = {"event": "start", "settings": SETTINGS}
    judge.add(start)
    for step in range(1, 101):
        judge.add({"event": "train", "step": step, "train_time_ms": step, "train_loss": step})
    judge.add(start)
    judge.add({"event": "resume", "path": "x", "step": 60})
    judge.add({"event": "train", "step": 61, "train_time_ms": 61, "train_loss": -1})
    assert list(judge.past.train.losses) == [*range(1, 61), -1]
    judge.add(start)
    judge.add({"event": "train", "step": 1, "train_time_ms": 1, "train_loss": 5})
    assert list(judge.past.train.losses) == [5]


@pytest.mark.parametrize(
    "event",
    [
        {"event": "train"},
        {"event": "train", "step": None, "train_loss": "x"},
        {"event": "train", "step": math.inf, "train_time_ms": 1, "train_loss": 1},
        {"event": "train", "step": 5, "train_time_ms": "soon", "train_loss": 1.0},
        {"event": "val", "step": 5, "val_loss": math.nan},
        {"event": "resume", "step": None},
        {"event": "start", "settings": ["iterations"]},
        {"event": "of a later version", "step": 3},
    ],
)
def test_events_that_lack_something_raise_no_error(event):
    judge = guards.Guards()
    judge.add(event)
    judge.add({"event": "start", "settings": SETTINGS})
    assert alarms(judge.add(event)) == []


# ---- parts


@pytest.mark.parametrize(
    ("probability", "freedom", "exact"),
    [(0.95, 6, 1.94318), (0.95, 1000, 1.64638), (0.9999, 6, 8.0248), (0.9999, 25, 4.35165)],
)
def test_quantiles_of_students_t(probability, freedom, exact):
    assert guards.student(probability, freedom) == pytest.approx(exact, rel=0.02)


def test_a_fit_is_that_of_least_squares():
    rng = np.random.default_rng(3)
    steps = np.sort(rng.choice(1000, 40, replace=False)) + 1
    losses = 3 - 0.002 * steps + rng.normal(0, 0.1, 40)
    series = guards.Series()
    for step, loss in zip(steps, losses, strict=True):
        series.add(step, loss)
    fit = series.fit(300, 1000)
    kept = steps > 300
    (slope, _), covariance = np.polyfit(steps[kept], losses[kept], 1, cov=True)
    mean = losses[kept].mean()
    assert fit.count == kept.sum()
    assert fit.change == pytest.approx(slope * 350 / mean)
    assert fit.error == pytest.approx(covariance[0, 0] ** 0.5 * 350 / mean)


@pytest.mark.parametrize(
    ("changed", "step", "ms", "total", "fall"),
    [
        ({}, 1000, 43_540, 600_000 / 43.54, 600_000 / 43.54 - 1200),
        ({"max_wallclock_seconds": 0}, 1000, 43_540, 20_000, 18_800),
        ({"iterations": 2000}, 1000, 43_540, 2000, 800),
        ({"warmdown_frac": 0.75}, 1000, 43_540, 600_000 / 43.54, 150_000 / 43.54),
        ({"lr_schedule": "cosine"}, 1000, 43_540, 600_000 / 43.54, math.inf),
        ({"warmdown_iters": 0}, 0, 0, 20_000, math.inf),
        (
            {"quant_method": "gptq", "calibration_seconds": 100.0},
            *(1000, 43_540, 500_000 / 43.54, 500_000 / 43.54 - 1200),
        ),
    ],
)
def test_how_long_a_run_will_be(changed, step, ms, total, fall):
    horizon = guards.Horizon(SETTINGS | changed)
    assert horizon.total(step, ms) == pytest.approx(total)
    assert horizon.fall(horizon.total(step, ms)) == pytest.approx(fall)
