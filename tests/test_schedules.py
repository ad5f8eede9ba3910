"""The optimizers and the schedules of frontier.py against float64 references and closed forms."""

import functools
import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import new_run, optimizers_of, resolve
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

import frontier as fr
import keeper
import train_gpt as tg

TINY = {
    "VOCAB_SIZE": 32,
    "NUM_LAYERS": 2,
    "MODEL_DIM": 16,
    "NUM_HEADS": 2,
    "NUM_KV_HEADS": 1,
    "TRAIN_SEQ_LEN": 64,
    "TRAIN_BATCH_TOKENS": 512,
    "VAL_BATCH_SIZE": 64,
    "ITERATIONS": 100,
    "WARMDOWN_ITERS": 20,
    "MAX_WALLCLOCK_SECONDS": 0,
    "DTYPE": "fp32",
    "COMPILE": 0,
}
settings = functools.partial(resolve, TINY)


# ---- coefficients of Newton-Schulz


def pushed(s, rounds):
    """What iterations make of singular values."""
    for a, b, c in rounds:
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("polar", 0.858, 1.142), ("quintic", 0.470, 1.203)]
)
def test_coefficients_push_small_singular_values_towards_one(kind, low, high):
    rounds = fr.newton_schulz(settings(MUON_COEFFICIENTS=kind))
    s = pushed(np.logspace(-3, 0, 20001), rounds)
    assert (s.min(), s.max()) == pytest.approx((low, high), abs=1e-3)


@pytest.mark.parametrize("steps", [1, 3, 5, 6, 9])
def test_polar_iterations_differ_and_the_last_one_is_repeated(steps):
    rounds = fr.newton_schulz(settings(MUON_COEFFICIENTS="polar", MUON_BACKEND_STEPS=steps))
    assert len(rounds) == steps
    assert rounds == [fr.POLAR_EXPRESS[min(i, 4)] for i in range(steps)]
    assert len({*rounds}) == min(steps, 5)


@pytest.mark.parametrize("steps", [1, 5, 9])
def test_quintic_iterations_are_alike(steps):
    rounds = fr.newton_schulz(settings(MUON_BACKEND_STEPS=steps))
    assert rounds == [(3.4445, -4.7750, 2.0315)] * steps


# ---- Muon

SHAPES = [(4, 9), (4, 9), (9, 4), (9, 4), (5, 5)]  # wide, tall and square
POLAR = {"MUON_COEFFICIENTS": "polar"}


def reference_orthogonalize(g, rounds):
    """Orthogonalize by the singular value decomposition, in float64 NumPy."""
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + 1e-7)
    return u * pushed(s, rounds) @ vt


def reference_even_out(x, v, beta):
    """Even out the neurons of an update by NorMuon's definition; the update and its state."""
    rows, cols = x.shape
    mean = (x**2).mean(1, keepdims=True) if rows >= cols else (x**2).mean(0, keepdims=True)
    v = beta * v + (1 - beta) * mean
    even = x / np.sqrt(v)
    return even * np.linalg.norm(x) / np.linalg.norm(even), v


def reference_decay(w, x, share, cautious):
    """Let weights decay one by one; the cautious ones only where their step goes to zero too."""
    decayed = w.copy()
    for at in np.ndindex(*w.shape):
        if not cautious or w[at] * x[at] > 0:
            decayed[at] -= share * w[at]
    return decayed


def reference_muon(hp, start, grads):
    """Take Muon's steps by its definition; the weights after each of them."""
    rounds = fr.newton_schulz(hp)
    weights = [w.copy() for w in start]
    momenta = [np.zeros_like(w) for w in start]
    moments = [0.0 for _ in start]
    found = []
    for lr, mu, step in zip(RATES, MOMENTA, grads, strict=True):
        for i, g in enumerate(step):
            momenta[i] = mu * momenta[i] + g
            u = g + mu * momenta[i]
            if hp.muon_row_norm:
                u = u / np.maximum(np.sqrt((u**2).sum(1, keepdims=True)), 1e-7)
            x = reference_orthogonalize(u, rounds)
            if hp.normuon_beta2:
                x, moments[i] = reference_even_out(x, moments[i], hp.normuon_beta2)
            rows, cols = x.shape
            decayed = reference_decay(weights[i], x, lr * hp.muon_wd, hp.cautious_wd)
            weights[i] = decayed - lr * math.sqrt(max(1, rows / cols)) * x
        found.append([w.copy() for w in weights])
    return found


RATES = (0.1, 0.2, 0.05)
MOMENTA = (0.85, 0.9, 0.95)


def draw(seed):
    """Draw a float64 matrix of each shape, some rows of which are far larger than others."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) * rng.uniform(0.1, 3, (shape[0], 1)) for shape in SHAPES]


def build_muon(hp, start):
    """Make the optimizer of matrices in float64, as a run builds it, and its parameters."""
    named = {
        f"blocks.{i}.fc.weight": torch.nn.Parameter(torch.from_numpy(w.copy()))
        for i, w in enumerate(start)
    }
    (muon,) = tg.build_optimizers(named, tg.Run(hp))
    muon.settings["dtype"] = torch.float64
    return muon, [*named.values()]


def step_muon(muon, params, lr, mu, grads):
    for group in muon.param_groups:
        group.update(lr=lr, momentum=mu)
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.from_numpy(g.copy())
    muon.step()


MUONS = {
    "row_norm": {"MUON_ROW_NORM": 1},
    "polar": POLAR,
    "normuon": {"NORMUON_BETA2": 0.6},
    "cautious": {"MUON_WD": 0.7, "CAUTIOUS_WD": 1},
    "decay": {"MUON_WD": 0.7, "NORMUON_BETA2": 0.6},
    "all": POLAR | {"MUON_ROW_NORM": 1, "NORMUON_BETA2": 0.95, "MUON_WD": 0.7, "CAUTIOUS_WD": 1},
}


@pytest.mark.parametrize("name", MUONS)
def test_muon_equals_a_plain_reference_for_three_steps(name):
    hp = settings(**MUONS[name])
    start, grads = draw(0), [draw(seed) for seed in (1, 2, 3)]
    expected = reference_muon(hp, start, grads)
    muon, params = build_muon(hp, start)
    for lr, mu, step, weights in zip(RATES, MOMENTA, grads, expected, strict=True):
        step_muon(muon, params, lr, mu, step)
        for p, w in zip(params, weights, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), w, atol=1e-6)


def test_a_row_of_zeros_has_no_direction():
    hp = settings(MUON_ROW_NORM=1)
    muon, params = build_muon(hp, draw(0))
    grads = draw(1)
    for g in grads:
        g[1] = 0
    before = [p.detach().clone() for p in params]
    step_muon(muon, params, 0.1, 0.9, grads)
    moves = [p.detach() - w for p, w in zip(params, before, strict=True)]
    assert all(move.isfinite().all() and not move[1].any() for move in moves)


def even_out(muon, group, x, bad=False):
    return muon.even_out(group, x, torch.tensor(bad))


def test_evened_out_updates_keep_their_norms():
    muon, _ = build_muon(settings(NORMUON_BETA2=0.6), draw(0))
    for group in muon.param_groups:
        x = torch.randn(len(group["params"]), *group["params"][0].shape, dtype=torch.float64)
        x[0] *= 100
        even = even_out(muon, group, x)
        torch.testing.assert_close(even.norm(dim=(1, 2)), x.norm(dim=(1, 2)))


def test_an_update_of_zero_stays_zero():
    muon, _ = build_muon(settings(NORMUON_BETA2=0.6), draw(0))
    for group in muon.param_groups:
        x = torch.zeros(len(group["params"]), *group["params"][0].shape, dtype=torch.float64)
        assert not even_out(muon, group, x).any()


def test_each_neuron_has_one_second_moment():
    """Rows of what is tall are the neurons that Newton-Schulz leaves uneven; columns, if wide."""
    muon, params = build_muon(settings(NORMUON_BETA2=0.6), draw(0))
    step_muon(muon, params, 0.1, 0.9, draw(1))
    shapes = [tuple(muon.state[p]["second_moment"].shape) for p in params]
    assert shapes == [(1, 9), (1, 9), (9, 1), (9, 1), (5, 1)]


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_bad_step_changes_nothing(steps_before):
    """As if it had not been: neither at once, nor later."""
    ends = []
    for bad in (False, True):
        muon, params = build_muon(settings(**MUONS["all"]), draw(0))
        for seed in range(steps_before):
            step_muon(muon, params, 0.1, 0.9, draw(1 + seed))
        if bad:
            muon.found_inf = torch.ones(())
            step_muon(muon, params, 0.1, 0.9, [0 * w for w in draw(0)])
            muon.found_inf = torch.zeros(())
        ends.append([p.detach().clone() for p in params])
        step_muon(muon, params, 0.1, 0.9, draw(9))
        ends.append([p.detach().clone() for p in params])
        ends.append([muon.state[p][key] for p in params for key in sorted(muon.state[p])])
    assert len(ends[2]) == 2 * len(SHAPES)
    for ours, theirs in zip(ends[:3], ends[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_second_moments_are_on_only_if_they_are_asked_for():
    muon, params = build_muon(settings(**POLAR), draw(0))
    step_muon(muon, params, 0.1, 0.9, draw(1))
    assert {key for p in params for key in muon.state[p]} == {"momentum_buffer"}


def test_adamw_for_matrices_is_that_of_pytorch():
    values = {"MATRIX_LR": 0.02, "MUON_WD": 0.3, "BETA1": 0.8, "BETA2": 0.9, "ADAM_EPS": 1e-3}
    hp = settings(MATRIX_OPTIMIZER="adamw", SCALAR_BETA2=0.5, **values)
    model = tg.build_model(hp)
    optimizers = optimizers_of(model, hp)
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW]
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and p.shape[0] > 2]
    assert len(matrices) == 2 * 6
    copies = [torch.nn.Parameter(p.detach().clone()) for p in matrices]
    kind = {"lr": 0.02, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-3}
    reference = torch.optim.AdamW(copies, foreach=False, fused=False, **kind)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for p, q in zip(matrices, copies, strict=True):
            q.grad = p.grad.clone()
        optimizers[0].step()
        reference.step()
    for p, q in zip(matrices, copies, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


# ---- looking ahead


def start_ahead(beta):
    """Make two parameters, an optimizer that looks ahead from where they are, and SGD."""
    rng = np.random.default_rng(0)
    start = [rng.normal(size=shape) for shape in ((3, 4), (5,))]
    params = [torch.from_numpy(w.copy()) for w in start]
    return start, params, fr.Lookahead(params, beta), torch.optim.SGD(params, 0.1)


def gradient(w):
    """The gradient of a function that is no parabola."""
    return np.sin(3 * w) + 0.5 * w


def step_ahead(params, ahead, sgd):
    for p in params:
        p.grad = torch.from_numpy(gradient(p.numpy()))
    sgd.step()
    ahead.step()


def test_lookahead_is_sgd_from_points_ahead():
    """x ← A(x + β·d) and d ← 0.99·d + 0.01·(the move of x), for 30 steps."""
    start, params, ahead, sgd = start_ahead(0.5)
    x, d = start, [np.zeros_like(w) for w in start]
    for _ in range(30):
        step_ahead(params, ahead, sgd)
        for i in range(2):
            point = x[i] + 0.5 * d[i]
            new = point - 0.1 * gradient(point)
            d[i] = 0.99 * d[i] + 0.01 * (new - x[i])
            x[i] = new
            np.testing.assert_allclose(params[i].numpy(), x[i] + 0.5 * d[i], atol=1e-8)
    assert max(abs(w).max() for w in d) > 0.01


def test_lookahead_of_zero_does_nothing():
    _, params, ahead, sgd = start_ahead(0.0)
    _, plain, _, other = start_ahead(0.0)
    for _ in range(5):
        step_ahead(params, ahead, sgd)
        step_ahead(plain, SimpleNamespace(step=int), other)
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


def test_lookahead_comes_back_when_its_rate_falls_to_zero():
    """The next step then leads to the point that the mean of past steps does not shift."""
    _, params, ahead, sgd = start_ahead(0.5)
    for _ in range(3):
        step_ahead(params, ahead, sgd)
    points = [p.clone() for p in params]
    ahead.param_groups[0]["lr"] = 0.0
    step_ahead(params, ahead, sgd)
    for p, point in zip(params, points, strict=True):
        expected = point.numpy() - 0.1 * gradient(point.numpy())
        np.testing.assert_allclose(p.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_lookahead_changes_nothing_in_a_bad_step(steps_before):
    _, params, ahead, sgd = start_ahead(0.5)
    for _ in range(steps_before):
        step_ahead(params, ahead, sgd)

    def all_there_is():
        kept = [state[key] for state in ahead.state.values() for key in ("origin", "direction")]
        return [tensor.clone() for tensor in (*params, *kept)]

    before = all_there_is()
    ahead.found_inf = torch.ones(())
    ahead.step()
    assert all(torch.equal(a, b) for a, b in zip(all_there_is(), before, strict=True))


# ---- the rates

FALL = {"ITERATIONS": 100, "WARMDOWN_ITERS": 20}
CAPPED = {"ITERATIONS": 1000, "WARMDOWN_ITERS": 20, "MAX_WALLCLOCK_SECONDS": 50}
FRACTION = {"ITERATIONS": 100, "WARMDOWN_FRAC": 0.2}


@pytest.mark.parametrize("values", [FALL, CAPPED, FRACTION, CAPPED | FRACTION])
@pytest.mark.parametrize("last", [0.0, 0.1])
def test_linear_is_the_schedule_of_the_baseline(values, last):
    hp = settings(FINAL_LR_FRAC=last, **values)
    for step, pace in itertools.product(range(0, 130, 3), (0.1, 0.5, 3.0)):
        assert fr.lr_scale(hp, step, pace * step) == tg.lr_scale(hp, step, pace * step)


def wsd(left):
    return 1 - math.sqrt(1 - left)


@pytest.mark.parametrize(
    ("kind", "step", "share"),
    [
        ("wsd", 0, 1.0),
        ("wsd", 80, 1.0),
        ("wsd", 85, wsd(0.75)),
        ("wsd", 90, wsd(0.5)),
        ("wsd", 100, 0.0),
        ("linear", 85, 0.75),
        ("cosine", 0, 1.0),
        ("cosine", 25, 0.5 + 0.5 * math.cos(math.pi / 4)),
        ("cosine", 50, 0.5),
        ("cosine", 75, 0.5 - 0.5 * math.cos(math.pi / 4)),
        ("cosine", 100, 0.0),
        ("constant", 0, 1.0),
        ("constant", 99, 1.0),
    ],
)
@pytest.mark.parametrize("last", [0.0, 0.2])
def test_rates_have_the_shape_of_their_schedule(kind, step, share, last):
    """By steps, and as much by seconds, if they end the run after as many steps."""
    falls = {} if kind in ("cosine", "constant") else {"WARMDOWN_ITERS": 20}
    default = {"WARMDOWN_ITERS": tg.FIELDS["WARMDOWN_ITERS"].default} | falls
    for cap in ({"ITERATIONS": 100}, {"ITERATIONS": 1000, "MAX_WALLCLOCK_SECONDS": 50}):
        hp = settings(LR_SCHEDULE=kind, FINAL_LR_FRAC=last, **cap, **default)
        scale = fr.lr_scale(hp, step, 0.5 * step)
        assert scale == pytest.approx(share + (1 - share) * last, abs=1e-9)


@pytest.mark.parametrize("kind", ["linear", "wsd", "cosine"])
def test_after_the_cap_the_rate_is_the_last_one(kind):
    default = tg.FIELDS["WARMDOWN_ITERS"].default if kind == "cosine" else 20
    hp = settings(**CAPPED | {"LR_SCHEDULE": kind, "FINAL_LR_FRAC": 0.1, "WARMDOWN_ITERS": default})
    assert fr.lr_scale(hp, 101, 50.5) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [{"LR_WARMUP_STEPS": 8}, {"LR_WARMUP_RATIO": 0.08}])
def test_rates_rise_by_equal_steps(warmup):
    hp = settings(**FALL, **warmup)
    scales = [fr.lr_scale(hp, step, 0.0) for step in range(10)]
    assert scales == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1, 1, 1])


def test_the_rise_is_a_share_of_the_steps_that_the_clock_allows():
    """At half a second a step, of 100."""
    hp = settings(LR_WARMUP_RATIO=0.4, **CAPPED)
    scales = [fr.lr_scale(hp, step, step / 2) for step in (1, 19, 39, 60)]
    assert scales == pytest.approx([2 / 40, 20 / 40, 1, 1])


def test_the_cosine_begins_after_the_rise():
    values = {"LR_SCHEDULE": "cosine", "ITERATIONS": 100, "LR_WARMUP_STEPS": 20}
    hp = settings(**values, WARMDOWN_ITERS=tg.FIELDS["WARMDOWN_ITERS"].default)
    assert fr.lr_scale(hp, 10, 0.0) == pytest.approx(11 / 20)
    assert fr.lr_scale(hp, 20, 0.0) == pytest.approx(1.0)
    assert fr.lr_scale(hp, 60, 0.0) == pytest.approx(0.5)


def test_a_rise_and_a_fall_that_overlap_are_multiplied():
    hp = settings(ITERATIONS=20, WARMDOWN_ITERS=20, LR_WARMUP_STEPS=10, FINAL_LR_FRAC=0.5)
    assert fr.lr_scale(hp, 4, 0.0) == pytest.approx(0.5 * (0.8 + 0.2 * 0.5))


def steepest(kind, share):
    """The most by which the rates fall where so much of their fall passes."""
    if kind == "wsd":
        return math.sqrt(min(1.0, share))  # at once, after the stable part
    return {"linear": 1.0, "cosine": math.pi / 2, "constant": 0.0}[kind] * share


@example_settings(max_examples=150)
@given(
    kind=st.sampled_from(["linear", "cosine", "wsd", "constant"]),
    fraction=st.sampled_from(["", 0.2, 1.0]),
    rise=st.sampled_from([{}, {"lr_warmup_steps": 7}, {"lr_warmup_ratio": 0.1}]),
    iterations=st.integers(2, 200),
    cap=st.sampled_from([0.0, 5.0, 20.0]),
    pace=st.floats(0.02, 0.5),
    warmdown=st.integers(2, 100),
    last=st.sampled_from([0.0, 0.3]),
)
def test_rates_never_jump(kind, fraction, rise, iterations, cap, pace, warmdown, last):
    """At an even pace, whichever ends the run; the second step is the first with a known pace."""
    hp = tg.replace(
        settings(),
        lr_schedule=kind,
        warmdown_frac=fraction,
        iterations=iterations,
        max_wallclock_seconds=cap,
        warmdown_iters=warmdown,
        final_lr_frac=last,
        **rise,
    )
    total = min(iterations, cap / pace) if cap else iterations
    rising = hp.lr_warmup_steps or hp.lr_warmup_ratio * total
    falling = fraction * total if fraction else warmdown
    if kind == "cosine":
        falling = max(total - rising, 1e-9)
    most = steepest(kind, 1 / falling) + (1 / rising if rising else 0.0)
    scales = [fr.lr_scale(hp, step, step * pace) for step in range(1, math.ceil(total) + 1)]
    assert all(0.0 <= scale <= 1.0 for scale in scales)
    assert all(abs(b - a) <= most + 1e-9 for a, b in itertools.pairwise(scales))


@given(
    kind=st.sampled_from(["linear", "cosine", "wsd"]),
    iterations=st.integers(2, 200),
    cap=st.sampled_from([0.0, 5.0, 20.0]),
    pace=st.floats(0.02, 0.5),
)
def test_rates_end_at_the_final_share_whichever_ends_the_run(kind, iterations, cap, pace):
    hp = tg.replace(
        settings(),
        lr_schedule=kind,
        iterations=iterations,
        max_wallclock_seconds=cap,
        final_lr_frac=0.3,
    )
    end = next(
        step for step in itertools.count() if step >= iterations or (cap and step * pace >= cap)
    )
    assert fr.lr_scale(hp, end, end * pace) == pytest.approx(0.3, abs=1e-9)


# ---- other schedules


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0]),
    ],
)
def test_decays_fall_over_the_whole_run(kind, values):
    decay = fr.DECAYS[kind]
    assert [decay(done) for done in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "done", "expected"),
    [
        (0, 0.0, 0.85),
        (25, 0.25, 0.90),
        (50, 0.5, 0.95),
        (80, 0.8, 0.95),
        (90, 0.9, 0.90),
        (95, 0.95, 0.875),
        (100, 1.0, 0.85),
        (25, 0.9, 0.875),  # the clock ends the run in the rise
    ],
)
def test_momentum_rises_and_falls_back(step, done, expected):
    hp = settings(MUON_MOMENTUM_WARMUP_STEPS=50, MUON_MOMENTUM_WARMDOWN_FRAC=0.2)
    assert fr.momentum(hp, step, done) == pytest.approx(expected)


def test_momentum_stays_up_without_its_warmdown():
    hp = settings(MUON_MOMENTUM_WARMUP_STEPS=50)
    assert fr.momentum(hp, 100, 1.0) == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("values", "step", "elapsed", "share"),
    [
        ({}, 0, 0.0, 0.0),
        ({}, 25, 1e9, 0.25),
        ({}, 100, 0.0, 1.0),
        ({"MAX_WALLCLOCK_SECONDS": 50}, 25, 5.0, 0.25),
        ({"MAX_WALLCLOCK_SECONDS": 50}, 25, 30.0, 0.6),
        ({"MAX_WALLCLOCK_SECONDS": 50}, 25, 60.0, 1.0),
        ({"MAX_WALLCLOCK_SECONDS": 50}, 0, 1e-6, 0.0),
        ({"ITERATIONS": 0}, 0, 0.0, 1.0),
    ],
)
def test_progress_is_by_steps_or_seconds_whichever_is_more(values, step, elapsed, share):
    assert fr.progress(settings(**values), step, elapsed) == pytest.approx(share, abs=1e-6)


def test_progress_leaves_the_seconds_of_the_calibration():
    values = {"QUANT_METHOD": "gptq", "MAX_WALLCLOCK_SECONDS": 50, "CALIBRATION_SECONDS": 10}
    assert fr.progress(settings(**values), 1, 20.0) == pytest.approx(0.5)


@given(st.integers(1, 500), st.floats(1e-3, 300), st.integers(1, 500), st.floats(1, 300))
def test_progress_is_the_greater_share(step, elapsed, iterations, cap):
    hp = tg.replace(settings(), iterations=iterations, max_wallclock_seconds=cap)
    share = max(step / iterations, elapsed / cap)
    assert fr.progress(hp, step, elapsed) == pytest.approx(min(1.0, share))


def applied(step, values):
    """What a trainer of these settings sets in its optimizers at a step: by kind of optimizer."""
    hp = settings(**values)
    model = tg.build_model(hp)
    optimizers = optimizers_of(model, hp)
    optimizers.append(fr.Lookahead([*model.parameters()], hp.ema_nesterov or 0.5))
    fr.Trainer.schedule(
        SimpleNamespace(run=new_run(TINY, **values), optimizers=optimizers), step, 0
    )
    return [(o, group) for o in optimizers for group in o.param_groups]


def test_a_step_sets_rates_decays_and_momentum():
    values = FALL | {"MUON_WD": 0.3, "EMBED_WD": 0.2, "ADAM_WD": 0.1, "WD_SCHEDULE": "cosine"}
    values |= {"LR_SCHEDULE": "wsd", "MUON_MOMENTUM_WARMDOWN_FRAC": 0.5}
    left = 1 - 90 / 100
    decay = 0.5 - 0.5 * math.cos(math.pi * left)
    for optimizer, group in applied(90, values):
        if isinstance(optimizer, fr.Lookahead):
            continue
        assert group["lr"] == pytest.approx(group["base_lr"] * wsd(0.5))
        assert group["weight_decay"] == pytest.approx(group["base_decay"] * decay)
        assert group["momentum"] == pytest.approx(0.85 + 0.1 * (90 / 500) * (left / 0.5))
    bases = {group["base_decay"] for _, group in applied(90, values)}
    assert bases == {0.0, 0.1, 0.2, 0.3}


@pytest.mark.parametrize(("step", "beta"), [(12, 0.0), (13, 0.4), (69, 0.4), (70, 0.0), (90, 0.0)])
def test_a_run_looks_ahead_in_its_middle(step, beta):
    (found,) = (
        group["lr"]
        for optimizer, group in applied(step, FALL | {"EMA_NESTEROV": 0.4})
        if isinstance(optimizer, fr.Lookahead)
    )
    assert found == pytest.approx(beta)


def test_looking_ahead_falls_with_the_rates():
    values = {"ITERATIONS": 100, "WARMDOWN_ITERS": 100, "EMA_NESTEROV": 0.4}
    *_, (_, group) = applied(50, values)
    assert group["lr"] == pytest.approx(0.4 * 0.5)


# ---- stages


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("", []),
        ("32@0.3", [(32, 0.3)]),
        ("16@0.25,32@0.5", [(16, 0.25), (32, 0.5)]),
    ],
)
def test_schedules_are_read(text, pairs):
    assert fr.parse_schedule(text) == pairs


BAD = ["32", "32@", "@0.5", "a@0.5", "3.5@0.5", "32@0", "32@1", "32@-0.1", "32@1.5", "32@nan"]
BAD += ["32@0.5,16@0.5", "32@0.5,16@0.4", "32@0.2@0.3", "32@0.5;16@0.7", "32@0,5"]


@pytest.mark.parametrize("text", BAD)
def test_bad_schedules_are_refused(text):
    with pytest.raises(tg.UserError, match=f"^{re.escape(text)}: expected VALUE@SHARE"):
        fr.parse_schedule(text)


@pytest.mark.parametrize("name", ["SEQ_LEN_SCHEDULE", "BATCH_SCHEDULE"])
@pytest.mark.parametrize("text", BAD)
def test_a_bad_schedule_is_one_clear_error(name, text):
    what = re.escape(f"{name}={text}")
    with pytest.raises(tg.UserError, match=f"{what}.*expected VALUE@SHARE"):
        settings(**{name: text})


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"SEQ_LEN_SCHEDULE": "128@0.5"}, "128 is not between 1 and TRAIN_SEQ_LEN=64"),
        ({"SEQ_LEN_SCHEDULE": "0@0.5"}, "0 is not between 1 and TRAIN_SEQ_LEN=64"),
        ({"SEQ_LEN_SCHEDULE": "48@0.5"}, "from 0 of the run on, 512 tokens in sequences of 48"),
        ({"BATCH_SCHEDULE": "96@0.5"}, "from 0 of the run on, 96 tokens in sequences of 64"),
        ({"BATCH_SCHEDULE": "0@0.5"}, "0 tokens in sequences of 64: not divisible"),
        (
            {"BATCH_SCHEDULE": "96@0.5", "SEQ_LEN_SCHEDULE": "32@0.25"},
            "from 0.25 of the run on, 96 tokens in sequences of 64: not divisible",
        ),
        ({"BATCH_SCHEDULE": "64@0.5", "MICRO_BATCH_TOKENS": 128}, "MICRO_BATCH_TOKENS=128: from 0"),
    ],
)
def test_stages_that_do_not_fit_are_refused(values, problem):
    with pytest.raises(tg.UserError, match=re.escape(problem)):
        settings(**values)


@pytest.mark.parametrize(
    ("done", "value"), [(0.0, 16), (0.2499, 16), (0.25, 32), (0.4999, 32), (0.5, 64), (1.0, 64)]
)
def test_values_last_until_their_shares(done, value):
    assert fr.scheduled("16@0.25,32@0.5", done, 64) == value


def shapes(**values):
    """Where each stage of a run begins, its lengths, its tokens a step, and if blocks loop."""
    return [
        (stage.begin, stage.hp.train_seq_len, stage.hp.train_batch_tokens, stage.order)
        for stage in fr.stages_of(settings(**values))
    ]


LOOPS = {"LOOP_REPEATS": 1, "LOOP_LAST": 1}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [(0.0, 64, 512, 1)]),
        ({"SEQ_LEN_SCHEDULE": "16@0.3"}, [(0.0, 16, 512, 1), (0.3, 64, 512, 1)]),
        (
            {"SEQ_LEN_SCHEDULE": "16@0.3", "BATCH_SCHEDULE": "128@0.2,256@0.3"},
            [(0.0, 16, 128, 1), (0.2, 16, 256, 1), (0.3, 64, 512, 1)],
        ),
        (LOOPS, [(0.0, 64, 512, 1)]),
        (LOOPS | {"LOOP_START": 0.4}, [(0.0, 64, 512, 0), (0.4, 64, 512, 1)]),
        (
            LOOPS | {"LOOP_START": 0.4, "BATCH_SCHEDULE": "128@0.2,256@0.6"},
            [(0.0, 64, 128, 0), (0.2, 64, 256, 0), (0.4, 64, 256, 1), (0.6, 64, 512, 1)],
        ),
        (LOOPS | {"LOOP_START": 0.99}, [(0.0, 64, 512, 0), (0.99, 64, 512, 1)]),
    ],
)
def test_stages_are_those_of_all_schedules(values, expected):
    assert shapes(**values) == expected


@pytest.mark.parametrize(
    ("values", "tokens"),
    [
        ({}, 10 * 512),
        ({"SEQ_LEN_SCHEDULE": "32@0.5"}, 10 * 512),
        ({"BATCH_SCHEDULE": "128@0.25,256@0.5"}, 2.5 * 128 + 2.5 * 256 + 5 * 512),
    ],
)
def test_planned_tokens_are_those_of_all_stages(values, tokens):
    hp = settings(ITERATIONS=10, TRAIN_BATCH_TOKENS=512, **values)
    assert keeper.planned_tokens(hp) == tokens


def test_stages_change_nothing_else():
    hp = settings(SEQ_LEN_SCHEDULE="16@0.3", BATCH_SCHEDULE="128@0.2")
    for stage in fr.stages_of(hp):
        whole = tg.replace(stage.hp, train_seq_len=64, train_batch_tokens=512)
        assert whole == hp
