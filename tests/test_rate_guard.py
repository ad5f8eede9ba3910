"""AUTO_LR_REDUCTION: rates are halved where loss or gradient leap, on the device, not elsewhere."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import events, new_run, resolve, run_cli, same_bits, trainer_of
from hypothesis import given, settings

import frontier
import keeper
import train_gpt

QUIET = (2.0, 0.05, 1.0)  # loss, its deviation, gradient norm


def guard_of(losses, norms, bad=()):
    """A guard after steps with these losses and norms, and the scale that each step had."""
    guard, scales = frontier.RateGuard(torch.device("cpu")), []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        numbers = torch.tensor([loss, norm**2], dtype=torch.float32)
        scales.append(float(guard.scale(*numbers, step, torch.tensor(step in bad))))
    return guard, scales


def slow_scales(losses, norms, bad=()):
    """The same by the words of its docstring, in float64 and lists."""
    kept, halvings, pause, scales = [], 0, 0, []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if step not in bad:
            last = np.array(kept[-100:], float).reshape(-1, 2)
            leaps = False
            if len(kept) >= 50:
                mean = last.mean(0)
                leaps = loss > mean[0] + max(3 * last[:, 0].std(), 0.5) or norm > 10 * mean[1]
            halves = leaps and pause == 0 and halvings < 5
            halvings += halves
            pause = 50 if halves else max(0, pause - 1)
            if not leaps:
                kept.append((loss, norm))
        scales.append(0.5**halvings)
    return scales


def quiet_steps(count, seed=0):
    """Losses and norms of a healthy run."""
    random = np.random.default_rng(seed)
    loss, deviation, norm = QUIET
    return random.normal(loss, deviation, count), norm * random.lognormal(0, 0.2, count)


@settings(max_examples=30)
@given(
    leaps=st.dictionaries(st.integers(0, 399), st.sampled_from([0.3, 0.8, 5.0, -1.0, 30.0])),
    bad=st.sets(st.integers(0, 399), max_size=20),
    seed=st.integers(0, 9),
)
def test_scales_are_those_of_a_slow_reference(leaps, bad, seed):
    losses, norms = quiet_steps(400, seed)
    for step, size in leaps.items():
        if size == 30.0:
            norms[step] *= size
        else:
            losses[step] += size
    assert guard_of(losses, norms, bad)[1] == slow_scales(losses, norms, bad)


def test_a_healthy_run_of_13780_steps_halves_nothing():
    losses, norms = quiet_steps(13_780)
    assert slow_scales(losses, norms)[-1] == 1.0
    assert guard_of(losses, norms)[1][-1] == 1.0


def test_a_leap_of_the_loss_and_one_of_the_gradient_are_told_with_their_step():
    run = new_run({}, DEVICE="cpu")
    lines = []
    run.log = lambda line, event, **fields: lines.append((event, fields))
    losses, norms = quiet_steps(200)
    losses[80] += 1
    guard, _ = guard_of(losses, norms)
    guard.tell(run)
    guard.tell(run)
    assert lines == [("lr_reduction", {"step": 80, "scale": 0.5, "reason": "loss"})]
    norms[150] *= 20
    guard, _ = guard_of(losses, norms)
    guard.tell(run)
    assert lines[1:] == [("lr_reduction", {"step": 150, "scale": 0.25, "reason": "gradient norm"})]


def test_steps_that_are_not_finite_are_not_remembered():
    losses, norms = quiet_steps(120)
    losses[60] = norms[60] = np.nan
    guard, scales = guard_of(losses, norms, bad={60})
    assert scales[-1] == 1.0
    assert torch.isfinite(guard.state).all()


def trained(settings, halvings, steps=1):
    """The weights after steps of a guarded trainer that has halved the rates so often."""
    run = new_run(settings, AUTO_LR_REDUCTION=1, WARMUP_STEPS=0)
    torch.manual_seed(0)
    trainer = trainer_of(train_gpt.build_model(run.hp), run)
    before = trainer.share.clone()
    trainer.guard.halvings.fill_(halvings)
    for step in range(steps):
        trainer.step(step, 0.0)
    return before, trainer.share


def test_half_the_rates_are_half_the_step(tiny_env):
    before, whole = trained(tiny_env, 0)
    same, half = trained(tiny_env, 1)
    assert torch.equal(before, same)
    torch.testing.assert_close(half - before, (whole - before) / 2, rtol=1e-4, atol=1e-7)


def test_a_run_in_which_nothing_leaps_ends_on_the_bits_of_one_without_it(run):
    plain, guarded = run("plain"), run("guarded", AUTO_LR_REDUCTION=1)
    assert same_bits(plain, guarded)
    assert not events(guarded, "lr_reduction")


def test_a_checkpoint_keeps_what_the_guard_knows(tiny_env):
    run = new_run(tiny_env, AUTO_LR_REDUCTION=1, WARMUP_STEPS=0)
    first = trainer_of(train_gpt.build_model(run.hp), run)
    for step in range(3):
        first.step(step, 0.0)
    first.guard.halvings.fill_(2)
    state = keeper.gather_state(first, 3, 1.0, whole=True)
    first.guard.state.zero_()
    second = trainer_of(train_gpt.build_model(run.hp), run)
    keeper.restore_state(second, state)
    assert second.guard.count == 3
    assert second.guard.halvings == second.guard.told == 2


def test_two_ranks_take_the_same_steps_under_it(tiny_env, tmp_path):
    one = run_cli(tiny_env | {"AUTO_LR_REDUCTION": "1", "RUN_ID": "one"})
    two = run_cli(tiny_env | {"AUTO_LR_REDUCTION": "1", "RUN_ID": "two"}, nproc=2)
    assert (one.rc, two.rc) == (0, 0), one.stderr + two.stderr
    scores = [events(tmp_path / "logs" / name, "final")[-1]["val_bpb"] for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_it_is_refused_beside_a_look_ahead_whose_place_it_would_move(tiny_env):
    run = new_run(tiny_env, AUTO_LR_REDUCTION=1, EMA_NESTEROV=0.5)
    with pytest.raises(train_gpt.UserError, match="AUTO_LR_REDUCTION, EMA_NESTEROV"):
        trainer_of(train_gpt.build_model(run.hp), run)


def test_it_is_off_by_default():
    assert resolve({}).auto_lr_reduction == 0
