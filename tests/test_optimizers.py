"""Muon, Adam's groups, schedules, and the training step against float64 references."""

import copy
import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from conftest import optimizers_of, random_model, resolve, shard_bytes, trainer_of
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

import train_gpt as tg

TINY = {
    "VOCAB_SIZE": 32,
    "NUM_LAYERS": 3,
    "MODEL_DIM": 16,
    "NUM_HEADS": 2,
    "NUM_KV_HEADS": 1,
    "TRAIN_SEQ_LEN": 8,
    "TRAIN_BATCH_TOKENS": 48,
    "VAL_BATCH_SIZE": 64,
    "ITERATIONS": 100,
    "WARMDOWN_ITERS": 10,
    "MAX_WALLCLOCK_SECONDS": 0,
    "DEVICE": "cpu",
    "DTYPE": "fp32",
    "COMPILE": 0,
}

ROUNDS = [tg.NEWTON_SCHULZ] * 5

settings = functools.partial(resolve, TINY)


# ---- orthogonalize


def quintic(s):
    """The polynomial of one Newton-Schulz step on a singular value."""
    return 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5


def reference_orthogonalize(g, steps):
    """The same by the singular value decomposition, in float64 NumPy."""
    u, s, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + 1e-7)
    for _ in range(steps):
        s = quintic(s)
    return u * s @ vt


def matrix(rows, cols, seed=0, low=0.3, high=1.0):
    """A float64 matrix with singular values spread over [low, high]."""
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.normal(size=(rows, cols)), full_matrices=False)
    return torch.from_numpy(u * np.linspace(high, low, min(rows, cols)) @ vt)


def orthogonalized(g, steps):
    """What Muon makes of the matrices of g, (N, rows, cols)."""
    return tg.orthogonalize(g, [tg.NEWTON_SCHULZ] * steps)


SHAPES = [(6, 6), (4, 9), (9, 4), (1, 5), (5, 1)]


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalize_is_the_quintic_on_singular_values(shape, steps):
    g = matrix(*shape)
    x = orthogonalized(g[None], steps)[0]
    np.testing.assert_allclose(x.numpy(), reference_orthogonalize(g, steps), atol=1e-10)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)], ids=str)
def test_orthogonalize_pushes_singular_values_towards_one(shape):
    g = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = g + 2 * matrix(*shape, low=5.0, high=10.0)  # well-conditioned
    s = torch.linalg.svdvals(orthogonalized(g, 5)[0])
    assert s.min() > 0.68
    assert s.max() < 1.14


@pytest.mark.parametrize("shape", [(8, 8), (4, 9), (9, 4)], ids=str)
def test_orthogonalize_keeps_singular_vectors(shape):
    g = matrix(*shape)
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    core = u.T @ orthogonalized(g[None], 5)[0] @ vt.T
    torch.testing.assert_close(core, core.diagonal().diag(), atol=1e-10, rtol=0)
    assert (core.diagonal() > 0.5).all()


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)], ids=str)
def test_orthogonalize_treats_each_matrix_of_a_batch_alone(shape):
    g = torch.stack([matrix(*shape, seed=seed) * 10.0**seed for seed in range(4)])
    together = orthogonalized(g, 5)
    alone = torch.cat([orthogonalized(one[None], 5) for one in g])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_ignores_the_scale_of_its_input(dtype):
    g = matrix(6, 8).to(dtype)
    x, y = orthogonalized(g[None] * 2.0**-10, 5), orthogonalized(g[None] * 2.0**10, 5)
    torch.testing.assert_close(x.float(), y.float(), atol=2e-3, rtol=0)


def test_orthogonalize_leaves_its_input_alone():
    g = matrix(6, 8)[None]
    before = g.clone()
    orthogonalized(g, 5)
    assert torch.equal(g, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)], ids=str)
def test_orthogonalize_of_zero_is_zero(shape, dtype):
    g = torch.stack([torch.zeros(shape), matrix(*shape).float()]).to(dtype)
    x = orthogonalized(g, 5)
    assert (x[0] == 0).all()
    assert x[1].float().norm() > 1


def test_orthogonalize_in_bf16_stays_near_the_reference():
    g = matrix(16, 24)
    x = orthogonalized(g[None].bfloat16(), 5)[0]
    assert x.dtype == torch.bfloat16
    assert np.abs(x.double().numpy() - reference_orthogonalize(g, 5)).max() < 0.05


# ---- Muon


def test_muon_equals_a_plain_reference_for_three_steps():
    rng = np.random.default_rng(0)
    shapes = [(4, 6), (4, 6), (9, 4), (9, 4), (9, 4)]
    start = [rng.normal(size=shape) for shape in shapes]
    params = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in start]
    groups = [{"params": params[:2], "lr": 0.0}, {"params": params[2:], "lr": 0.0}]
    muon = tg.Muon(groups, {"rounds": ROUNDS, "dtype": torch.float64, "weight_decay": 0.0})
    buffers = [np.zeros(shape) for shape in shapes]
    for lr, momentum in [(0.1, 0.85), (0.2, 0.9), (0.05, 0.95)]:
        for group in muon.param_groups:
            group["lr"], group["momentum"] = lr, momentum
        for i, (p, w) in enumerate(zip(params, start, strict=True)):
            g = rng.normal(size=w.shape)
            p.grad = torch.from_numpy(g.copy())
            buffers[i] = momentum * buffers[i] + g
            rows, cols = w.shape
            update = reference_orthogonalize(g + momentum * buffers[i], 5)
            w -= lr * math.sqrt(max(1, rows / cols)) * update
        muon.step()
        for p, w in zip(params, start, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), w, atol=1e-9)


def test_muon_does_not_change_the_gradients():
    p = torch.nn.Parameter(torch.zeros(3, 4))
    muon = tg.Muon(
        [{"params": [p], "lr": 0.1, "momentum": 0.9}],
        {"rounds": ROUNDS, "dtype": p.dtype, "weight_decay": 0.0},
    )
    p.grad = torch.ones(3, 4)
    muon.step()
    assert (p.grad == 1).all()


# ---- parameter groups


def rates_by_name(hp):
    """The learning rate of each parameter, by name; fails if one is in no group or in two."""
    model = tg.build_model(hp)
    names = {p: name for name, p in model.named_parameters()}
    rates = {}
    for optimizer in optimizers_of(model, hp):
        for group in optimizer.param_groups:
            assert group["lr"] == group["base_lr"]
            for p in group["params"]:
                assert names[p] not in rates, names[p]
                rates[names[p]] = (type(optimizer).__name__, group["lr"])
    assert set(rates) == set(names.values())
    return rates


RATES = {
    "EMBED_LR": 0.1,
    "HEAD_LR": 0.2,
    "TIED_EMBED_LR": 0.3,
    "MATRIX_LR": 0.4,
    "SCALAR_LR": 0.5,
}
MATRICES = ("c_q.weight", "c_k.weight", "c_v.weight", "proj.weight", "fc.weight")


def expected_rate(name, tied):
    """What the settings document says of a parameter."""
    if name == "tok_emb.weight":
        return "AdamW", 0.3 if tied else 0.1
    if name == "lm_head.weight":
        return "AdamW", 0.2
    return ("Muon", 0.4) if name.endswith(MATRICES) else ("AdamW", 0.5)


@pytest.mark.parametrize("tied", [0, 1])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_every_parameter_is_in_one_group_with_its_rate(layers, tied):
    rates = rates_by_name(settings(NUM_LAYERS=layers, TIE_EMBEDDINGS=tied, **RATES))
    assert rates == {name: expected_rate(name, tied) for name in rates}
    assert ("lm_head.weight" in rates) == (not tied)


def test_equal_rates_merge_no_parameters_wrongly():
    same = dict.fromkeys(RATES, 0.25)
    assert {rate for _, rate in rates_by_name(settings(TIE_EMBEDDINGS=0, **same)).values()} == {
        0.25
    }


def test_square_matrices_do_not_mix_with_others_of_another_shape():
    hp = settings(MLP_MULT=1, NUM_KV_HEADS=2)  # now all matrices of a block are square
    for group in optimizers_of(tg.build_model(hp), hp)[1].param_groups:
        assert len({p.shape for p in group["params"]}) == 1


def test_adam_equals_a_plain_reference_for_three_steps():
    hp = settings(BETA1=0.8, BETA2=0.9, ADAM_EPS=1e-3, SCALAR_LR=0.1)
    model = random_model(hp)
    adam, _ = optimizers_of(model, hp)
    p = model.blocks[1].mlp_scale
    w = p.detach().double().numpy().copy()
    m, v, rng = np.zeros_like(w), np.zeros_like(w), np.random.default_rng(0)
    for step in range(1, 4):
        g = rng.normal(size=w.shape)
        for other in model.parameters():
            other.grad = torch.zeros_like(other)
        p.grad = torch.from_numpy(g).float()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w -= 0.1 * (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.9**step)) + 1e-3)
        adam.step()
        np.testing.assert_allclose(p.detach().numpy(), w, atol=1e-5)


# ---- training steps


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """One train shard of 500 tokens below 32."""
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.random.default_rng(0).integers(32, size=500)
    (folder / "fineweb_train_000000.bin").write_bytes(shard_bytes(tokens))
    return folder


def make_trainer(folder, model=None, **values):
    """A trainer of a random model on one rank, in fp32 on the CPU."""
    hp = settings(DATA_PATH=folder, **values)
    run = tg.Run(hp)
    model = model or random_model(hp)
    return trainer_of(model, run)


def reference_gradient(model, folder, step=0, rows=6):
    """Loss and gradients of the mean over the whole global batch of a step, in one pass."""
    tokens = np.fromfile(folder / "fineweb_train_000000.bin", "<u2", offset=1024).astype(np.int64)
    at = np.arange(step * rows * 8, (step + 1) * rows * 8 + 1) % len(tokens)
    span = torch.from_numpy(tokens[at])
    loss = model(span[:-1].view(rows, 8), span[1:].view(rows, 8)).mean()
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def gradients(trainer):
    return [p.grad.clone() for p in trainer.model.parameters()]


def assert_all_close(actual, expected, atol=1e-6):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("forward_rows", [1, 2, 3, 4, 5, 6, 100])
def test_gradient_of_micro_batches_is_that_of_the_whole_batch(data_folder, forward_rows):
    trainer = make_trainer(data_folder)
    trainer.run.forward_rows = forward_rows  # 4 and 5 leave padding
    for step in range(2):
        loss, expected = reference_gradient(trainer.model, data_folder, step)
        assert trainer.step(step, 0.0).item() == pytest.approx(loss, abs=1e-5)
        assert_all_close(gradients(trainer), expected)


def test_weights_after_steps_do_not_depend_on_micro_batches(data_folder):
    ends = []
    for micro in (8, 16, 24, 48):
        # A large epsilon keeps Adam from magnifying the rounding of tiny gradients.
        trainer = make_trainer(data_folder, MICRO_BATCH_TOKENS=micro, ADAM_EPS=1e-2)
        for step in range(3):
            trainer.step(step, 0.0)
        ends.append(list(trainer.model.parameters()))
    for other in ends[1:]:
        assert_all_close(other, ends[0], atol=1e-4)


def test_step_moves_every_parameter(data_folder):
    trainer = make_trainer(data_folder, TIE_EMBEDDINGS=0)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.step(0, 0.0)
    after = trainer.model.state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_untrained_model_learns(data_folder):
    hp = settings()
    torch.manual_seed(0)
    trainer = make_trainer(data_folder, tg.build_model(hp), MATRIX_LR=0.02, SCALAR_LR=0.01)
    losses = [trainer.step(step, 0.0).item() for step in range(60)]
    assert losses[0] == pytest.approx(math.log(32), abs=0.1)
    assert min(losses[-10:]) < losses[0] - 0.3  # 500 random tokens can be learned by heart


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_sums_of_the_ranks_are_those_of_one_process(data_folder, world_size):
    """7 ranks share 6 sequences: one of them has nothing to do, but must take part."""
    loss, expected = reference_gradient(random_model(settings()), data_folder)
    sums = []
    for rank in range(world_size):
        trainer = make_trainer(data_folder)
        trainer.run.rank, trainer.run.world_size = rank, world_size
        trainer.run.forward_rows = 2
        trainer.accumulate()
        sums.append(trainer.grads[0].clone())
    total = sum(sums)
    names = [name for name, _ in trainer.model.named_parameters()]
    found = [trainer.within(name, total) for name in names]
    torch.testing.assert_close(found, list(expected), atol=1e-5, rtol=1e-4)
    assert total[-1].item() == pytest.approx(loss, abs=1e-5)


def global_norm(tensors):
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_clipping_scales_the_whole_gradient_to_the_norm(data_folder, fraction):
    _, expected = reference_gradient(random_model(settings()), data_folder)
    norm = global_norm(expected)
    trainer = make_trainer(data_folder, GRAD_CLIP_NORM=fraction * norm, MICRO_BATCH_TOKENS=8)
    trainer.step(0, 0.0)
    clipped = gradients(trainer)
    assert global_norm(clipped) == pytest.approx(fraction * norm, rel=1e-4)
    assert_all_close(clipped, [fraction * g for g in expected])


def test_clipping_leaves_a_small_gradient_alone(data_folder):
    loss, expected = reference_gradient(random_model(settings()), data_folder)
    trainer = make_trainer(data_folder, GRAD_CLIP_NORM=1.1 * global_norm(expected))
    assert trainer.step(0, 0.0).item() == pytest.approx(loss, abs=1e-5)
    assert_all_close(gradients(trainer), expected)


def test_clipping_does_not_change_the_reported_loss(data_folder):
    loss, _ = reference_gradient(random_model(settings()), data_folder)
    trainer = make_trainer(data_folder, GRAD_CLIP_NORM=1e-3)
    assert trainer.step(0, 0.0).item() == pytest.approx(loss, abs=1e-5)


# ---- schedules, as Trainer.step applies them


def applied(trainer, step, elapsed):
    """The multiplier of all learning rates, and the momentum, that a step used."""
    trainer.step(step, elapsed)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    scales = {round(group["lr"] / group["base_lr"], 12) for group in groups}
    assert len(scales) == 1
    (muon,) = (o for o in trainer.optimizers if isinstance(o, tg.Muon))
    (momentum,) = {group["momentum"] for group in muon.param_groups}
    return scales.pop(), momentum


def test_momentum_warms_up_linearly(data_folder):
    trainer = make_trainer(data_folder, MUON_MOMENTUM_WARMUP_STEPS=50)
    momenta = [applied(trainer, step, 0.0)[1] for step in (0, 10, 25, 50, 99)]
    assert momenta == pytest.approx([0.85, 0.87, 0.90, 0.95, 0.95])


ITERATIONS_ONLY = {"ITERATIONS": 100, "WARMDOWN_ITERS": 10}
CAPPED = {"ITERATIONS": 1000, "WARMDOWN_ITERS": 10, "MAX_WALLCLOCK_SECONDS": 50}
FRACTION = {"ITERATIONS": 100, "WARMDOWN_FRAC": 0.2}
CAPPED_FRACTION = {"ITERATIONS": 1000, "WARMDOWN_FRAC": 0.2, "MAX_WALLCLOCK_SECONDS": 50}
SCHEDULE = [
    # settings, step, elapsed seconds, multiplier
    (ITERATIONS_ONLY, 0, 0.0, 1.0),
    (ITERATIONS_ONLY, 90, 1e9, 1.0),
    (ITERATIONS_ONLY, 95, 0.0, 0.5),
    (ITERATIONS_ONLY, 99, 0.0, 0.1),
    ({"ITERATIONS": 100, "WARMDOWN_ITERS": 0}, 99, 0.0, 1.0),
    ({"ITERATIONS": 100, "WARMDOWN_ITERS": 400}, 0, 0.0, 0.25),
    # at half a second a step, the cap is reached after 100 of the 1000 steps
    (CAPPED, 0, 0.0, 1.0),
    (CAPPED, 50, 25.0, 1.0),
    (CAPPED, 90, 45.0, 1.0),
    (CAPPED, 96, 48.0, 0.4),
    (CAPPED, 101, 50.5, 0.0),
    # at a tenth of a second a step, the iterations end the run
    ({**CAPPED, "ITERATIONS": 100}, 96, 9.6, 0.4),
    (FRACTION, 0, 0.0, 1.0),
    (FRACTION, 80, 1e9, 1.0),
    (FRACTION, 85, 0.0, 0.75),
    (FRACTION, 99, 0.0, 0.05),
    ({**FRACTION, "WARMDOWN_FRAC": 0}, 99, 0.0, 1.0),
    (CAPPED_FRACTION, 10, 40.0, 1.0),
    (CAPPED_FRACTION, 10, 45.0, 0.5),
    (CAPPED_FRACTION, 950, 45.0, 0.25),
    (CAPPED_FRACTION, 10, 51.0, 0.0),
]


@pytest.mark.parametrize(("values", "step", "elapsed", "expected"), SCHEDULE)
def test_learning_rates_follow_the_schedule(data_folder, values, step, elapsed, expected):
    trainer = make_trainer(data_folder, **values)
    assert applied(trainer, step, elapsed)[0] == pytest.approx(expected, abs=1e-9)


def test_learning_rates_of_a_step_do_not_depend_on_those_before(data_folder):
    trainer = make_trainer(data_folder, **ITERATIONS_ONLY)
    scales = [applied(trainer, step, 0.0)[0] for step in (95, 92, 0, 98)]
    assert scales == pytest.approx([0.5, 0.8, 1.0, 0.2])
    rates = {group["base_lr"] for o in trainer.optimizers for group in o.param_groups}
    assert rates == {0.05, 0.04}


@pytest.mark.parametrize("values", [CAPPED, CAPPED_FRACTION], ids=["iters", "frac"])
def test_first_step_has_its_full_rate_although_the_clock_runs(values):
    """A validation at step 0 leaves a few microseconds on the clock."""
    assert tg.lr_scale(settings(**values), 0, 1e-5) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("fraction", ["", "0.5"])
def test_a_run_of_no_iterations_can_be_primed(data_folder, fraction):
    trainer = make_trainer(data_folder, ITERATIONS=0, WARMUP_STEPS=1, WARMDOWN_FRAC=fraction)
    trainer.prime()


@example_settings(max_examples=60)
@given(
    fraction=st.sampled_from(["", 0.1, 0.5, 1.0]),
    iterations=st.integers(1, 300),
    cap=st.sampled_from([0, 1.0, 20.0]),
    step_time=st.floats(0.001, 0.5),
    warmdown=st.integers(1, 100),
)
def test_rates_anneal_to_zero_whichever_ends_the_run(
    fraction, iterations, cap, step_time, warmdown
):
    """At a constant step time they never rise, and the step after the last would have zero."""
    hp = settings(
        ITERATIONS=iterations,
        WARMDOWN_FRAC=fraction,
        MAX_WALLCLOCK_SECONDS=cap,
        WARMDOWN_ITERS=warmdown,
    )
    scales = []
    for step in itertools.count():
        scales.append(tg.lr_scale(hp, step, step * step_time))
        if step >= iterations or (cap and step * step_time >= cap):
            break
    assert all(0.0 <= b <= a + 1e-12 <= 1.0 + 1e-9 for a, b in itertools.pairwise(scales))
    assert scales[-1] == pytest.approx(0.0, abs=1e-9)


# ---- priming


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def assert_same_state(a, b):
    """Nested state dicts are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    else:
        assert a == b


class Counter(torch.nn.Module):
    """Passes calls on to a model and counts them; uses randomness, as a dropout would."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, inputs, targets, documents):
        self.calls += 1
        torch.rand(())
        return self.model(inputs, targets, documents)


def counted_trainer(folder):
    trainer = make_trainer(folder, WARMUP_STEPS=3, MUON_MOMENTUM_WARMUP_STEPS=4)
    trainer.learn = Counter(trainer.model)
    return trainer


def test_prime_takes_its_steps(data_folder):
    trainer = counted_trainer(data_folder)
    trainer.prime()
    assert trainer.learn.calls == 3


def test_prime_changes_nothing(data_folder):
    trainer = counted_trainer(data_folder)
    weights, randomness = copy.deepcopy(trainer.model.state_dict()), random_states()
    trainer.prime()
    assert_same_state(trainer.model.state_dict(), weights)
    assert random_states() == randomness
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    assert not any(t.any() for state in states for t in state.values())


def test_training_after_prime_is_training_without_it(data_folder):
    ends = []
    for primed in (False, True):
        trainer = counted_trainer(data_folder)
        if primed:
            trainer.prime()
        losses = [trainer.step(step, 0.0) for step in range(3)]
        parts = (trainer.model, *trainer.optimizers)
        ends.append([losses, *(p.state_dict() for p in parts)])
    assert_same_state(*ends)


def test_prime_of_no_steps_changes_nothing(data_folder):
    trainer = make_trainer(data_folder, WARMUP_STEPS=0)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.prime()
    assert_same_state(trainer.model.state_dict(), before)
