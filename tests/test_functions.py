"""Functions of the model with a gradient of their own, against float64 and autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, resolve

import train_gpt as tg

SMALL = {
    **{"NUM_LAYERS": 3, "MODEL_DIM": 32, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "VOCAB_SIZE": 48},
    **{"TRAIN_SEQ_LEN": 12, "TRAIN_BATCH_TOKENS": 48, "LOGIT_SOFTCAP": 4},
}


def random(*shape, seed=0):
    """Normal numbers in float64, of which a gradient is wanted."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def plain_norm(x):
    """The norm as it is written in the paper."""
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def plain_rotation(x, rotary):
    """Each pair of channels as a complex number, times exp(-i·angle)."""
    half = rotary.size(-1) // 2
    cos, sin = rotary[:, :, None, :half]
    pair = torch.complex(x[..., :half], x[..., half : 2 * half])
    turned = pair * torch.complex(cos, -sin)
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)


def assert_same(ours, expected, inputs):
    """Equal results, and equal gradients of a random combination of them."""
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    weights = random(*ours.shape, seed=9).detach()
    found, wanted = (torch.autograd.grad((y * weights).sum(), inputs) for y in (ours, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


# ---- Norm


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_the_norm_and_its_gradient_are_those_of_the_formula(scale, size):
    x = (random(3, 5, 16) * size).detach().requires_grad_()
    assert_same(tg.rms_norm(x, scale), scale * plain_norm(x), [x])


@pytest.mark.parametrize("dims", [0, 4])
@pytest.mark.parametrize("gain", [0.0, -0.7, 1.5])
def test_heads_are_normed_scaled_and_rotated(dims, gain):
    hp = resolve(SMALL, ROPE_DIMS=dims)
    rotary = tg.rotary_table(hp, 12)
    x = random(2, 12, 6, 8)
    gains = (gain + random(6, 1, seed=1)).detach().requires_grad_()
    with torch.no_grad():
        gains[0] = gain
    expected = plain_rotation(plain_norm(x) * gains, rotary)
    assert_same(tg.Norm.apply(x, gains, rotary), expected, [x, gains])


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_norm_in_bf16_is_near_that_in_float64(scale):
    exact = random(64, 256)
    rounded = exact.detach().bfloat16().requires_grad_()
    grad = random(64, 256, seed=1).detach()
    results = []
    for x in (rounded.detach().double().requires_grad_(), rounded):
        y = tg.rms_norm(x, scale)
        (dx,) = torch.autograd.grad(y, x, grad.bfloat16().to(x.dtype))
        results.append((y.double(), dx.double()))
    for a, b in zip(*results, strict=True):
        assert ((a - b).norm() / a.norm()).item() < 0.006


def test_the_norm_of_heads_keeps_only_its_input_and_a_number_a_head():
    x = random(2, 12, 6, 8)
    kept = []
    rotary = tg.rotary_table(resolve(SMALL), 12)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tg.Norm.apply(x, random(6, 1), rotary)
    assert sorted(t.numel() for t in kept) == sorted([x.numel(), 2 * 12 * 6, rotary.numel()])


# ---- SquaredRelu


def test_the_squared_relu_and_its_gradient_are_those_of_the_formula():
    x = random(40, 16)
    with torch.no_grad():
        x[0] = 0
    assert_same(tg.SquaredRelu.apply(x), F.relu(x).square(), [x])


def test_the_squared_relu_keeps_its_result_alone():
    x = random(40, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = tg.SquaredRelu.apply(x)
    assert [t.data_ptr() for t in kept] == [y.data_ptr()]


# ---- CappedLoss


def plain_loss(x, weight, targets, c):
    """The loss as in the baseline, with all logits at once."""
    logits = c * torch.tanh(x @ weight.T / c)
    return F.cross_entropy(logits, targets, reduction="none")


def batch(rows=20, width=8, classes=11):
    """States, a head, and targets, some of which do not count."""
    targets = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(3))
    targets[[2, 5, rows - 1]] = tg.IGNORE
    return random(rows, width), random(classes, width, seed=1), targets


def capped_loss(x, weight, targets, c):
    """The loss of one target for each row."""
    return tg.CappedLoss.apply(x, weight, targets[:, None], 1.0, c, None)


@pytest.mark.parametrize("c", [0.5, 4.0, 30.0])
def test_the_loss_and_its_gradients_are_those_of_cross_entropy(c):
    x, weight, targets = batch()
    ours = capped_loss(x, weight, targets, c)
    assert_same(ours, plain_loss(x, weight, targets, c), [x, weight])


def test_several_targets_have_the_weighted_sum_of_their_losses():
    x, weight, targets = batch()
    several = torch.stack([targets.roll(i) for i in range(3)], dim=1)
    weights = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    ours = tg.CappedLoss.apply(x, weight, several, weights, 4.0, None)
    each = [plain_loss(x, weight, t, 4.0) for t in several.T]
    assert_same(ours, sum(w * nll for w, nll in zip(weights, each, strict=True)), [x, weight])


def test_the_loss_bears_logits_that_exp_does_not():
    x, weight, targets = batch()
    with torch.no_grad():
        x *= 1e4
    ours = capped_loss(x, weight, targets, 2000.0)
    assert ours.isfinite().all()
    assert_same(ours, plain_loss(x, weight, targets, 2000.0), [x, weight])


def test_targets_that_do_not_count_have_no_loss_and_no_gradient():
    x, weight, targets = batch()
    targets[:] = tg.IGNORE
    loss = capped_loss(x, weight, targets, 4.0)
    assert (loss == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), [x, weight]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_the_logits_one_tensor_is_kept_in_the_models_dtype(dtype):
    x, weight, targets = batch(rows=64, classes=200)
    x, weight = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        capped_loss(x, weight, targets, 4.0)
    assert [t.dtype for t in kept if t.numel() >= 64 * 200] == [dtype]


def test_without_a_gradient_nothing_is_kept():
    x, weight, targets = batch()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = capped_loss(x.detach(), weight.detach(), targets, 4.0)
    assert not kept
    torch.testing.assert_close(loss, plain_loss(x, weight, targets, 4.0))


@pytest.mark.parametrize("logits", [1, 48 * 5, 48 * 7, 2**20])
def test_chunks_of_the_head_change_nothing(logits, monkeypatch):
    """Of one row, of a divisor of the rows and of none, and all rows at once."""
    hp = resolve(SMALL)
    random_rows = torch.randint(48, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    results = []
    for most in (2**20, logits):
        monkeypatch.setitem(tg.LOGITS, "cpu", most)
        model = random_model(hp).double()
        model.dtype = torch.float64
        nll = model(*random_rows)
        nll.mean().backward()
        results.append([nll.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_loss_of_a_uniform_model_is_the_logarithm_of_its_vocabulary():
    x, weight, targets = batch()
    loss = capped_loss(x * 0, weight, targets.clamp(min=0), 4.0)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(11)))


# ---- together


def test_matrices_together_are_matrices_side_by_side():
    parts = [tg.Matrix(8, n).double() for n in (4, 2, 6)]
    x = random(3, 8)
    expected = torch.cat([x @ m.weight.T for m in parts], -1)
    assert_same(tg.together(x, *parts), expected, [x, *(m.weight for m in parts)])


def test_a_hook_of_one_of_them_is_called():
    parts = [tg.Matrix(8, n).double() for n in (4, 2)]
    seen = []
    parts[1].register_forward_hook(lambda m, inputs, output: seen.append(output))
    x = random(3, 8)
    y = tg.together(x, *parts)
    torch.testing.assert_close(seen, [y[:, 4:]])


# ---- Table


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_of_a_frequent_row_does_not_stop_growing(dtype):
    """In bf16, 256 + 1 is 256."""
    table = tg.Table(3, 4).to(dtype)
    table(torch.ones(8, 512, dtype=torch.int64)).sum().backward()
    assert table.weight.grad.dtype == dtype
    assert table.weight.grad.tolist() == [[0.0] * 4, [4096.0] * 4, [0.0] * 4]


def test_rows_are_looked_up_as_they_are():
    table = tg.Table(5, 4).bfloat16()
    ids = torch.tensor([[4, 0], [2, 4]])
    assert torch.equal(table(ids), table.weight[ids])


def test_a_hook_on_a_gradient_of_one_of_them_is_called():
    parts = [tg.Matrix(8, n).double() for n in (4, 2)]
    seen = []
    parts[1].register_full_backward_hook(lambda m, inputs, outputs: seen.append(outputs[0]))
    tg.together(random(3, 8), *parts).sum().backward()
    assert [g.tolist() for g in seen] == [[[1.0] * 2] * 3]
