"""A run in bf16: the model computes with a copy of the weights, which stay fp32 in the trainer."""

import numpy as np
import pytest
import torch
from conftest import random_model, resolve, shard_bytes, trainer_of

import train_gpt as tg

SMALL = {
    **{"NUM_LAYERS": 2, "MODEL_DIM": 32, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "VOCAB_SIZE": 48},
    **{"TRAIN_SEQ_LEN": 8, "TRAIN_BATCH_TOKENS": 48, "MICRO_BATCH_TOKENS": 16, "ITERATIONS": 9},
    **{"DTYPE": "bf16", "EMA_DECAY": 0.5},
}
ROUNDS = [tg.NEWTON_SCHULZ] * 5


@pytest.fixture
def make_trainer(tmp_path):
    """Make a trainer of a random model on one rank."""
    tokens = np.random.default_rng(0).integers(48, size=500)
    (tmp_path / "fineweb_train_000000.bin").write_bytes(shard_bytes(tokens))

    def make(**values):
        run = tg.Run(resolve({**SMALL, "DATA_PATH": tmp_path}, **values))
        model = tg.build_model(run.hp, run.dtype)
        model.load_state_dict(random_model(run.hp).state_dict())
        return trainer_of(model, run)

    return make


def exact(trainer):
    return {name: p.clone() for name, p in trainer.params.items()}


def assert_copied(trainer):
    """The model's parameters are the trainer's, rounded once."""
    for name, p in trainer.model.named_parameters():
        assert p.dtype == torch.bfloat16
        assert torch.equal(p.detach(), trainer.params[name].bfloat16()), name


def test_the_weights_stay_as_they_were_initialized(make_trainer):
    trainer = make_trainer()
    expected = random_model(trainer.run.hp).state_dict()
    assert trainer.params.keys() == expected.keys()
    for name, p in trainer.params.items():
        assert p.dtype == torch.float32
        assert torch.equal(p, expected[name]), name
    assert_copied(trainer)


def test_in_fp32_there_is_no_copy(make_trainer):
    trainer = make_trainer(DTYPE="fp32")
    for name, p in trainer.model.named_parameters():
        assert p.data_ptr() == trainer.params[name].data_ptr()
        assert p.grad.data_ptr() == trainer.params[name].grad.data_ptr()
    assert trainer.working is trainer.weights


def test_gradients_of_micro_batches_add_up_in_fp32(make_trainer):
    trainer = make_trainer()
    trainer.accumulate()
    sums = {name: torch.zeros_like(p) for name, p in trainer.params.items()}
    assert len(trainer.batch) == 3
    for batch in trainer.batch:
        loss = trainer.model(*batch).sum() / 48
        found = torch.autograd.grad(loss, [*trainer.model.parameters()])
        for name, g in zip(sums, found, strict=True):
            assert g.dtype == torch.bfloat16
            sums[name] += g
    for name, p in trainer.params.items():
        assert torch.equal(p.grad, sums[name]), name
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_step_moves_the_weights_by_less_than_bf16_can_tell(make_trainer):
    """So small steps add up, as they would not in the copy."""
    small = {"MATRIX_LR": 1e-5, "SCALAR_LR": 1e-5, "TIED_EMBED_LR": 1e-5}
    trainer = make_trainer(**small)
    before = exact(trainer)
    for step in range(3):
        trainer.step(step, 0.0)
    for name, p in trainer.params.items():
        assert not torch.equal(p, before[name]), name
    assert_copied(trainer)


def test_the_model_ends_with_the_average(make_trainer):
    trainer = make_trainer()
    for step in range(3):
        trainer.step(step, 0.0)
    before = exact(trainer)
    trainer.finish()
    assert any(not torch.equal(p, before[name]) for name, p in trainer.params.items())
    assert_copied(trainer)


def test_a_dry_step_changes_nothing(make_trainer):
    trainer = make_trainer()
    before = exact(trainer)
    trainer.step(0, 0.0, dry=True)
    assert all(torch.equal(p, before[name]) for name, p in trainer.params.items())
    assert_copied(trainer)


def test_losses_are_those_of_fp32_within_rounding(make_trainer):
    rates = {"MATRIX_LR": 0.01, "SCALAR_LR": 0.01, "TIED_EMBED_LR": 0.01}
    trainers = [make_trainer(DTYPE=dtype, **rates) for dtype in ("fp32", "bf16")]
    for step in range(8):
        exact, rounded = (trainer.step(step, 0.0).item() for trainer in trainers)
        assert rounded == pytest.approx(exact, rel=0.02)


# ---- Muon: all groups in one batch


SHAPES = [(3, 8, 8), (2, 4, 8), (1, 12, 8), (2, 8, 12), (1, 1, 5)]


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[1:2], SHAPES[2:3]], ids=len)
def test_directions_of_all_shapes_are_those_of_each_matrix(shapes, bad):
    """By the formula: M ← μM + G, and G + μM orthogonalized, a matrix at a time; or nothing."""
    random = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    grads = [g * (not bad) for g in grads]
    momenta = [torch.full_like(g, 0.1) for g in grads]
    settings = {"rounds": ROUNDS, "dtype": torch.float64}
    mu = torch.tensor(0.9, dtype=torch.float64)
    found = tg.directions([*grads], momenta, mu, torch.tensor(bad), settings)
    for g, m, x in zip(grads, momenta, found, strict=True):
        moved = torch.full_like(g, 0.1) if bad else 0.9 * 0.1 + g
        torch.testing.assert_close(m, moved, rtol=1e-9, atol=1e-12)
        alone = [tg.orthogonalize(one, ROUNDS) for one in (g + 0.9 * moved) * (not bad)]
        torch.testing.assert_close(x, torch.stack(alone), rtol=1e-9, atol=1e-12)
    if bad:
        assert all((x == 0).all() for x in found)
        assert all((m == 0.1).all() for m in momenta)


def test_a_compiled_step_moves_matrices_as_a_plain_one(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in SHAPES]
    ends = []
    for compiled in (False, True):
        groups = [{"params": [*w.clone()], "lr": 0.1, "momentum": 0.9} for w in start]
        settings = {
            "rounds": ROUNDS,
            "dtype": torch.float64,
            "weight_decay": 0.1,
            "compiled": compiled,
        }
        muon = tg.Muon(groups, settings)
        for step in range(3):
            for group in muon.param_groups:
                for i, p in enumerate(group["params"]):
                    p.grad = torch.cos(p * (i + step))
            muon.step()
        ends.append([p for group in muon.param_groups for p in group["params"]])
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)
    assert not torch.equal(ends[0][0], start[0][0])
