"""quantizer.py: each piece against independent truth, and what bad input does to it."""

import dataclasses
import fractions
import hashlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from conftest import LoggedRun, double_model, load, resolve
from hypothesis import given, settings
from hypothesis import strategies as st

import quantizer
import train_gpt as tg

GOLDEN = Path(__file__).parent / "golden" / "quantized.artifact"
GOLDEN_WEIGHTS = "83d3afa0b2f00b74c5298ddb7957c59d906c16856fd4bec60d1923b78bbd62b0"
SHAPE = {
    "VOCAB_SIZE": 96,
    "NUM_LAYERS": 2,
    "MODEL_DIM": 64,
    "NUM_HEADS": 2,
    "NUM_KV_HEADS": 1,
    "MLP_MULT": 2,
    "TRAIN_SEQ_LEN": 16,
    "TRAIN_BATCH_TOKENS": 64,
    "QUANT_METHOD": "gptq",
}
PLAIN = {"quant_trellis": 1, "quant_lambda": 0.0}


def hyper(tokenizer, **values):
    return resolve(SHAPE, TOKENIZER_PATH=tokenizer, **values)


def random_products(size, rank=None, seed=0):
    """H of correlated inputs, float64."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rank or 4 * size, size)) * np.exp(random.normal(size=size))
    return torch.from_numpy(x.T @ x / len(x))


def damped(products):
    return products + quantizer.DAMPING * products.diagonal().mean() * torch.eye(len(products))


def work_of(weights, products, rows=None, cols=None):
    """A matrix to store with these steps, in rows and in columns alike by default."""
    u, _ = quantizer.factor(products)
    rows = np.ones(len(weights)) if rows is None else rows
    cols = np.ones(weights.shape[1]) if cols is None else cols
    return quantizer.Work("w", weights.astype(np.float32), u.astype(np.float32), rows, cols)


def weights_of(unit, row, col, sigma, tau, codes):
    """What the arrays of a matrix with classes stand for."""
    levels = quantizer.values_of(codes, quantizer.classes_of(row, col, sigma, tau))
    return quantizer.steps_of(unit, row, col) * levels


def gaussian_state(hp, seed=0):
    """The weights of a model, all Gaussian."""
    torch.manual_seed(seed)
    state = tg.build_model(hp).state_dict()
    return {name: 0.05 * torch.randn(w.shape) for name, w in state.items()}


# ---- U, GPTQ


def test_u_is_the_upper_factor_of_the_inverse():
    products = random_products(24)
    u, dead = quantizer.factor(products)
    assert np.array_equal(u, np.triu(u))
    assert (np.diagonal(u) > 0).all()
    assert not dead.any()
    np.testing.assert_allclose(u.T @ u, np.linalg.inv(damped(products).numpy()), rtol=1e-6)


def test_u_of_few_tokens_is_finite_and_knows_the_columns_that_are_never_used():
    products = random_products(24, rank=3)
    products[5] = products[:, 5] = 0
    u, dead = quantizer.factor(products)
    assert np.isfinite(u).all()
    assert np.flatnonzero(dead).tolist() == [5]


def gptq_by_least_squares(weights, products, step):
    """GPTQ by its definition, in float64: each column is rounded where the columns before it are
    fixed and those behind it are free."""
    h = damped(products).numpy()
    errors = np.zeros(weights.shape)
    levels = np.zeros(weights.shape, int)
    for j in range(weights.shape[1]):
        rest = slice(j, None)
        pull = np.linalg.solve(h[rest, rest], h[rest, :j] @ errors[:, :j].T).T
        target = weights[:, j] - pull[:, 0]
        levels[:, j] = 2 * np.rint(target / (2 * step))
        errors[:, j] = levels[:, j] * step - weights[:, j]
    return levels


@pytest.mark.parametrize("shape", [(5, 12), (70, 40), (3, 150)])
def test_gptq_rounds_as_a_dense_reference_does(tokenizer, shape):
    """Columns of several blocks, rows of several bands, single levels without a price."""
    weights = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    products = random_products(shape[1])
    hp = dataclasses.replace(hyper(tokenizer, QUANT_CLASSES=0), **PLAIN)
    ((_, row, col, *_, levels),) = quantizer.encode([work_of(weights, products)], 0.15, hp).values()
    assert {*row, *col} == {128}
    expected = gptq_by_least_squares(weights.astype(np.float64), products, np.float32(0.15))
    np.testing.assert_array_equal(levels, expected)


def test_wide_matrices_are_read_again(tokenizer):
    """Paths start again after 512 columns."""
    weights = np.random.default_rng(1).normal(size=(70, 600)).astype(np.float32)
    work = work_of(weights, torch.eye(600, dtype=torch.float64))
    (arrays,) = quantizer.encode([work], 0.2, hyper(tokenizer)).values()
    classes = [quantizer.classes_of(*arrays[1:5])]
    data = quantizer.rans_encode(arrays[5:], classes)
    (codes,) = quantizer.rans_decode(data, classes, 8)
    np.testing.assert_array_equal(codes, arrays[5])


def test_gptq_loses_less_than_rounding():
    hp = dataclasses.replace(tg.Hyperparameters(), quant_method="gptq")
    weights = np.random.default_rng(1).normal(size=(64, 48)).astype(np.float32)
    products = random_products(48, rank=30)

    def loss(seen):
        ((unit, row, col, *rest),) = quantizer.encode([work_of(weights, seen)], 0.2, hp).values()
        error = weights_of(unit, row, col, *rest) - weights
        return float((error @ products.numpy() * error).sum())

    assert loss(products) < 0.5 * loss(torch.eye(48, dtype=torch.float64))


# ---- the trellis


def walk(state, bits, states=8):
    """The cosets 2z + u of a path, and its last state."""
    cosets = []
    for u in bits:
        cosets.append(2 * (state & 1) + u)
        state = int(quantizer.TRELLIS[states][2 * state + u])
    return cosets, state


def test_the_trellis_is_ungerboecks():
    """Two branches leave each state, two reach it, from states of one parity, in unlike cosets."""
    before, coset = quantizer.branches(8)
    assert sorted(before.ravel()) == sorted([*range(8)] * 2)
    assert ((before[0] & 1) == (before[1] & 1)).all()
    assert (coset[0] != coset[1]).all()
    for state, u in itertools.product(range(8), (0, 1)):
        follower = quantizer.TRELLIS[8][2 * state + u]
        assert state in before[:, follower]


@pytest.mark.parametrize("states", [1, 8])
@pytest.mark.parametrize("seed", range(4))
def test_best_paths_are_the_cheapest_of_all(states, seed):
    random = np.random.default_rng(seed)
    costs = random.uniform(size=(7, 4, 5)).astype(np.float32)
    first = random.integers(0, states, 5)
    paths, last = quantizer.best_paths(costs, first, states)
    for lane in range(5):
        walks = [
            walk(int(first[lane]), bits, states) for bits in itertools.product((0, 1), repeat=7)
        ]
        totals = [sum(costs[t, c, lane] for t, c in enumerate(cosets)) for cosets, _ in walks]
        cosets, end = walks[int(np.argmin(totals))]
        assert paths[:, lane].tolist() == cosets
        assert last[lane] == end


@pytest.mark.parametrize("price", [0.0, 0.37])
def test_candidates_are_the_best_of_the_two_levels_around(price):
    random = np.random.default_rng(0)
    x = (random.normal(size=200) * 9).astype(np.float32)
    x[:60] /= 20
    classes = random.integers(1, quantizer.CLASSES, 200)
    bits = price * quantizer.bits_by_class()
    codes, levels, costs = quantizer.candidates(x, classes, bits)
    for coset, n in itertools.product(range(4), range(200)):
        z, u = divmod(coset, 2)
        coarse = classes[n] < quantizer.COARSE
        ways = {}
        for k in range(-80 + u, 80, 2):
            level = 2 * k + z * (-np.sign(k) if coarse else 1)
            if abs(x[n] - level) < 4:
                ways[level] = (x[n] - level) ** 2 + bits[classes[n], z, k + quantizer.MOST]
        assert costs[coset, n] == pytest.approx(min(ways.values()), abs=1e-4)
        assert levels[coset, n] in ways
        assert codes[coset, n] & 1 == z
        assert codes[coset, n] >> 1 & 1 == u
        assert quantizer.values_of(codes[coset, n], classes[n]) == levels[coset, n]


def test_the_trellis_is_within_0_7_db_of_the_bound(tokenizer):
    """Gaussian weights at 3 bits: uniform levels are 1.5 dB from rate and distortion's bound."""
    weights = np.random.default_rng(0).normal(size=(1024, 256)).astype(np.float32)
    work = work_of(weights, torch.eye(256, dtype=torch.float64))
    gaps = {}
    for states, lam in ((8, 0.37), (1, 0.0)):
        hp = dataclasses.replace(hyper(tokenizer), quant_trellis=states, quant_lambda=lam)
        (arrays,) = quantizer.encode([work], 0.25, hp).values()
        data = quantizer.rans_encode(arrays[5:], [quantizer.classes_of(*arrays[1:5])])
        error = weights_of(*arrays) - weights
        bits = 8 * len(data) / weights.size
        gaps[states] = 10 * math.log10(float((error**2).mean()) * 4**bits)
    assert gaps[8] < 0.7
    assert 1.5 < gaps[1] < 1.8


def test_coarse_rows_are_no_worse_than_zeros(tokenizer):
    """Rows far under their step: a trellis that counts no bits would put levels ±1 there."""
    random = np.random.default_rng(0)
    weights = random.normal(size=(128, 64)).astype(np.float32)
    weights[64:] *= 0.02
    work = work_of(weights, torch.eye(64, dtype=torch.float64))
    (arrays,) = quantizer.encode([work], 0.25, hyper(tokenizer)).values()
    assert not weights_of(*arrays)[64:].any()


# ---- scales, exact on every machine


def test_scales_are_the_floats_nearest_to_powers_of_two():
    """No other float32 is as near, by far more than a power of two may be wrong in float64."""
    found = quantizer.scale_values(np.arange(256, dtype=np.uint8))
    assert found[0] == 0
    for code in range(1, 256):
        exact = fractions.Fraction(2) ** (code - 128)  # of the fourth power
        value = fractions.Fraction(float(found[code]))
        ulp = fractions.Fraction(float(np.spacing(found[code]))) / 2
        assert (value - ulp * (1 - fractions.Fraction(1, 2**20))) ** 4 < exact
        assert (value + ulp * (1 - fractions.Fraction(1, 2**20))) ** 4 > exact


def test_shares_of_frequencies_are_far_from_a_tie():
    shares = np.exp2(np.arange(16 * 14 + 2) / 16)
    distance = np.abs(shares - np.floor(shares) - 0.5)
    assert distance.min() > 1e-5


def test_a_class_is_the_quotient_of_deviation_and_step():
    random = np.random.default_rng(0)
    row, sigma = random.integers(100, 150, (2, 20)).astype(np.uint8)
    col, tau = random.integers(120, 136, (2, 30)).astype(np.uint8)
    found = quantizer.classes_of(row, col, sigma, tau)
    deviation, step = (
        np.outer(quantizer.scale_values(a), quantizer.scale_values(b))
        for a, b in ((sigma, tau), (row, col))
    )
    expected = np.rint(4 * np.log2(deviation / step)) - quantizer.LOWEST + 1
    np.testing.assert_array_equal(found, expected.clip(1, quantizer.CLASSES - 1))


def test_what_is_tiny_is_not_zero():
    assert quantizer.quarter_octaves(np.array([0.0, 1e-30, 1.0, 1e30])).tolist() == [0, 1, 128, 255]


def test_frequencies_of_few_common_and_many_rare_values_add_up():
    counts = np.ones((1, 4000), np.int64)
    counts[0, :50] = 10**9
    f = quantizer.frequencies(quantizer.logs_of(counts))
    assert f.sum() == quantizer.RANS_TOTAL
    assert f.min() >= 1


def test_quarter_octaves_are_within_an_eighth():
    x = np.exp2(np.random.default_rng(0).uniform(-30, 30, 1000))
    ratio = quantizer.scale_values(quantizer.quarter_octaves(x)) / x
    assert np.abs(np.log2(ratio)).max() <= 0.1251


# ---- rANS with classes


def paths_of_levels(random, classes, spread):
    """Levels that follow the trellis, in lanes: k of these deviations by class."""
    matrices = [quantizer.padded(np.zeros(c.shape, np.int16)) for c in classes]
    kinds = quantizer.lanes([quantizer.padded(c) for c in classes])
    for view, kind in zip(quantizer.lanes(matrices), kinds, strict=True):
        state = 0
        flat = np.zeros(view.size, np.int16)
        for n, c in enumerate(kind.ravel()):
            k = round(random.normal() * spread[c]) if c else 0
            flat[n] = 2 * k + (state & 1)
            state = int(quantizer.TRELLIS[8][2 * state + (k & 1)])
        view[:] = flat.reshape(view.shape)
    return [m[: len(c)] for m, c in zip(matrices, classes, strict=True)]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shapes=st.lists(st.tuples(st.integers(1, 130), st.integers(1, 9)), min_size=1, max_size=3),
    spread=st.sampled_from([0.0, 0.3, 3.0, 100.0, 400.0]),
    most=st.integers(1, 9),
)
def test_rans_gives_back_any_path(seed, shapes, spread, most):
    random = np.random.default_rng(seed)
    classes = [random.integers(0, most + 1, shape).astype(np.uint16) for shape in shapes]
    levels = paths_of_levels(random, classes, [spread * (c + 1) / most for c in range(most + 1)])
    data = quantizer.rans_encode(levels, classes)
    found = quantizer.rans_decode(data, classes, 8)
    for level, back, kind in zip(levels, found, classes, strict=True):
        assert back.dtype == np.int16
        np.testing.assert_array_equal(back[kind > 0], level[kind > 0])


def test_rans_is_within_0_3_percent_of_the_classes_entropies():
    random = np.random.default_rng(0)
    classes = [random.integers(1, 30, (4096, 512)).astype(np.uint16)]
    spread = 2.0 ** (np.arange(31) / 4 - 3)
    k = np.rint(random.normal(size=(4096, 512)) * spread[classes[0]]).astype(np.int16)
    data = quantizer.rans_encode([2 * k], classes)
    bits = 0.0
    for c in range(1, 30):
        _, counts = np.unique(k[classes[0] == c], return_counts=True)
        bits -= (counts * np.log2(counts / counts.sum())).sum()
    assert bits / 8 <= len(data) <= 1.003 * bits / 8


@settings(max_examples=60, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    end=st.integers(0, 10**6),
)
def test_changed_streams_of_rans_are_refused_or_give_as_many_levels(edits, end):
    classes = [np.random.default_rng(0).integers(0, 4, (70, 20)).astype(np.uint16)]
    levels = paths_of_levels(np.random.default_rng(1), classes, [0, 1, 2, 4])
    data = bytearray(quantizer.rans_encode(levels, classes))
    for place, value in edits:
        data[place % len(data)] = value
    data = bytes(data[: 1 + end % len(data)] if end % 3 else data)
    try:
        (found,) = quantizer.rans_decode(data, classes, 8)
    except (tg.UserError, ValueError, zstandard.ZstdError):  # load_artifact makes them UserErrors
        return
    assert found.shape == (70, 20)


# ---- the calibration


def small_model(**changed):
    hp = dataclasses.replace(resolve(SHAPE, **changed), logit_softcap=5.0)
    return double_model(hp, mean=0.0, deviation=0.3)


def tokens_of(hp, rows=2, length=5):
    random = torch.Generator().manual_seed(0)
    return torch.randint(2, hp, (2, rows, length), generator=random)


def calibrated(model, inputs, targets, documents=None):
    seen = quantizer.Calibration(model, torch.device("cpu"))
    for p in model.parameters():
        p.requires_grad_(p is model.tok_emb.weight)
    seen.see((inputs, targets, documents), backward=True)
    seen.close()
    return seen


def nudged_losses(model, module, nudge, inputs, targets):
    """The summed NLL when a hook adds `nudge` to a module's output."""
    handle = module.register_forward_hook(lambda _, __, output: output + nudge(output))
    with torch.no_grad():
        total = model(inputs, targets).double().sum()
    handle.remove()
    return float(total)


@pytest.mark.parametrize("name", ["blocks.0.fc", "blocks.0.attn.c_v", "blocks.0.attn.proj"])
@pytest.mark.parametrize("output", [0, 5])
def test_g_is_the_mean_square_of_finite_differences(name, output):
    """By each token's output; a channel's gain counts as part of what lies behind the matrix."""
    model = small_model()
    inputs, targets = tokens_of(96)
    module = model.get_submodule(name)
    seen = calibrated(model, inputs, targets)
    g = seen.uses[name].squares[output] / inputs.numel()
    gain = float(model.blocks[0].attn_scale[output]) if name.endswith("attn.proj") else 1.0
    squares = 0.0
    for place in itertools.product(*map(range, inputs.shape)):
        losses = []
        for epsilon in (1e-3, -1e-3):

            def nudge(y, place=place, epsilon=epsilon):
                change = torch.zeros_like(y)
                change[place][output] = epsilon * gain
                return change

            losses.append(nudged_losses(model, module, nudge, inputs, targets))
        squares += ((losses[0] - losses[1]) / 2e-3) ** 2
    assert float(g) == pytest.approx(squares / inputs.numel(), rel=1e-3, abs=1e-9)


def test_h_is_the_mean_of_the_inputs_products():
    model = small_model()
    inputs, targets = tokens_of(96)
    kept = []
    handle = model.blocks[0].fc.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    seen = calibrated(model, inputs, targets)
    handle.remove()
    x = kept[0].detach().flatten(0, 1)
    total, g = seen.sensitivity("blocks.0.fc.weight")
    products = (x.mT @ x).double()
    torch.testing.assert_close(total / total.trace(), products / products.trace())
    assert float(g.sum()) == pytest.approx(1.0)


def test_q_k_and_v_share_their_inputs():
    seen = calibrated(small_model(), *tokens_of(96))
    q, k, v = (seen.sensitivity(f"blocks.0.attn.c_{c}.weight")[0] for c in "qkv")
    torch.testing.assert_close(k / k.trace(), q / q.trace())
    torch.testing.assert_close(v / v.trace(), q / q.trace())


def dense_curvature(model, name, inputs, targets):
    """The mean over tokens of squared gradients by each row of a table, times the trace that goes
    with a use: what an isotropic error of that row costs. By autograd on explicit matrices."""
    x = model.tok_emb(inputs).detach().requires_grad_()
    real = model.tok_emb.forward
    model.tok_emb.forward = lambda _: x
    hidden = []
    original = tg.CappedLoss.apply
    tg.CappedLoss.apply = lambda part, *rest: hidden.append(part) or original(part, *rest)
    try:
        model(inputs, targets).sum().backward()
    finally:
        tg.CappedLoss.apply = original
        model.tok_emb.forward = real
    rows = torch.zeros(model.tok_emb.weight.shape[0], dtype=torch.float64)
    rows.index_add_(0, inputs.flatten(), x.grad.flatten(0, 1).square().sum(1).double())
    part = hidden[0].detach()
    logits = (part @ model.tok_emb.weight.detach().mT).requires_grad_()
    capped = model.softcap * torch.tanh(logits / model.softcap)
    torch.nn.functional.cross_entropy(capped, targets.flatten(), reduction="sum").backward()
    heads = logits.grad.square().sum(0).double() * part.square().sum().double() / len(part)
    return (rows + heads) / len(part)


def test_a_tied_tables_rows_count_both_uses():
    model = small_model()
    inputs, targets = tokens_of(96, rows=3, length=7)
    expected = dense_curvature(model, "tok_emb", inputs, targets)
    seen = calibrated(model, inputs, targets)
    total, g = seen.sensitivity("tok_emb.weight")
    expected += expected.sum() / inputs.numel()  # as if each token had come once more
    torch.testing.assert_close(g * total.trace(), expected, rtol=1e-4, atol=1e-9)


def test_an_untied_head_and_table_are_apart():
    model = small_model(TIE_EMBEDDINGS=0)
    inputs, targets = tokens_of(96)
    seen = calibrated(model, inputs, targets)
    _, head = seen.sensitivity("lm_head.weight")
    _, table = seen.sensitivity("tok_emb.weight")
    unused = [i for i in range(96) if i not in inputs]
    assert (head > 0).all()
    assert (table[unused] == table.min()).all()
    assert (table[inputs] > table.min()).all()


def test_rows_that_only_fill_a_batch_are_not_seen():
    model = small_model()
    inputs, targets = tokens_of(96, rows=2)
    filled = torch.cat((inputs, torch.zeros_like(inputs[:1])))
    labels = torch.cat((targets, torch.full_like(targets[:1], tg.IGNORE)))
    starts = torch.tensor([0, 3, 5, 8, 10, 15], dtype=torch.int32)
    plain = calibrated(model, inputs, targets, tg.Documents(starts[:-1], 5))
    found = calibrated(model, filled, labels, tg.Documents(starts, 5))
    assert found.tokens.tolist() == plain.tokens.tolist()
    for name, use in plain.uses.items():
        torch.testing.assert_close(found.uses[name].products, use.products)


def test_listening_leaves_the_model_as_it_was():
    model = small_model()
    inputs, targets = tokens_of(96)
    before = model(inputs, targets)
    calibrated(model, inputs, targets)
    assert model.listen is None
    assert not any(m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    torch.testing.assert_close(model(inputs, targets), before, rtol=0, atol=0)


def test_the_predicted_loss_is_what_a_small_error_costs():
    """½·Σ g·(e·H·eᵀ), against the expected loss where targets are drawn from the model itself."""
    model = small_model()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(2, 96, (64, 8), generator=generator)
    with torch.no_grad():
        logs = [model(inputs, torch.full_like(inputs, token)) for token in range(96)]
    chances = torch.exp(-torch.stack(logs, dim=-1)).double()
    targets = torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view_as(inputs)
    seen = calibrated(model, inputs, targets)
    name = "blocks.0.fc.weight"
    h, g = seen.sensitivity(name)
    e = 0.02 * torch.randn(
        model.blocks[0].fc.weight.shape, generator=generator, dtype=torch.float64
    )
    predicted = 0.5 * float((g[:, None] * (e @ h) * e).sum())
    with torch.no_grad():
        model.blocks[0].fc.weight += e.to(model.blocks[0].fc.weight.dtype)
        logs = [model(inputs, torch.full_like(inputs, token)) for token in range(96)]
    after = torch.stack(logs, dim=-1).double()
    cost = float((chances * (after + chances.log())).sum(-1).mean())
    assert predicted == pytest.approx(cost, rel=0.35)


# ---- artifacts


def test_what_is_packed_is_read_again(tokenizer, tmp_path):
    hp = hyper(tokenizer)
    state = gaussian_state(hp)
    works = [quantizer.prepare(n, w, None, hp) for n, w in state.items() if tg.bits_of(n, w, hp)]
    usual = quantizer.usual_constant(works, 1) / 2
    coded = quantizer.encode(works, usual * hp.quant_step, hp)
    _, weights = load(quantizer.packer(state, hp)(hp), tmp_path, tokenizer)
    assert coded
    for name, arrays in coded.items():
        expected = weights_of(*arrays)
        np.testing.assert_array_equal(weights[name].numpy(), expected)
        error = weights[name] - state[name]
        assert float(error.norm() / state[name].norm()) < 0.15


@pytest.mark.parametrize(
    "changed", [{"QUANT_CLASSES": 0}, {"QUANT_TRELLIS": 1}, {"TIE_EMBEDDINGS": 0}]
)
def test_all_kinds_of_artifacts_are_read_again(tokenizer, tmp_path, changed):
    hp = hyper(tokenizer, **changed)
    state = gaussian_state(hp)
    _, weights = load(quantizer.packer(state, hp)(hp), tmp_path, tokenizer)
    for name, w in state.items():
        assert float((weights[name] - w).norm() / w.norm()) < 0.15


def golden_state():
    """Weights by integer arithmetic: the same on every machine."""
    hp = dataclasses.replace(tg.Hyperparameters(), **{k.lower(): v for k, v in SHAPE.items()})
    state = {}
    for number, (name, w) in enumerate(tg.build_model(hp).state_dict().items()):
        values = (np.arange(w.numel()) * 7919 + 104729 * number) % 1009 - 504
        state[name] = torch.from_numpy((values / 4096).astype(np.float32)).view_as(w)
    return state


def test_a_committed_artifact_decodes_to_the_same_bits(tokenizer, tmp_path):
    _, weights = load(GOLDEN.read_bytes(), tmp_path, tokenizer)
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].numpy().astype("<f4").tobytes())
    assert digest.hexdigest() == GOLDEN_WEIGHTS


def test_a_committed_artifact_is_near_its_weights(tokenizer, tmp_path):
    _, weights = load(GOLDEN.read_bytes(), tmp_path, tokenizer)
    for name, w in golden_state().items():
        assert float((weights[name] - w).norm() / w.norm()) < 0.15


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_one_constant_fills_the_cap_to_0_1_percent(tokenizer, share):
    hp = hyper(tokenizer, FIT_BUDGET="step", VOCAB_SIZE=4096)
    state = gaussian_state(hp)
    cap = tg.code_bytes(hp) + int(share * len(quantizer.packer(state, hp)(hp)))
    hp = dataclasses.replace(hp, artifact_max_bytes=cap)
    run = LoggedRun(hp)
    total = tg.code_bytes(hp) + len(quantizer.make_artifact(state, None, run))
    assert 0.999 * cap <= total <= cap


def test_a_cap_that_no_step_fills_is_said(tokenizer):
    hp = hyper(tokenizer, FIT_BUDGET="step", ARTIFACT_MAX_BYTES=1000)
    run = LoggedRun(hp)
    quantizer.make_artifact(gaussian_state(hp), None, run)
    assert run.lines[0].endswith("(it cannot do more)")


def test_the_forecast_is_near_what_is_packed(tokenizer):
    hp = hyper(tokenizer, FIT_BUDGET="step", VOCAB_SIZE=4096, ARTIFACT_MAX_BYTES=300_000)
    total = tg.code_bytes(hp) + len(quantizer.forecast(gaussian_state(hp), hp))
    assert total == pytest.approx(300_000, rel=0.03)


# ---- bad input


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(tokenizer, value):
    hp = hyper(tokenizer)
    state = gaussian_state(hp)
    state["blocks.0.fc.weight"][3, 4] = value
    with pytest.raises(tg.UserError, match=r"not finite in blocks\.0\.fc\.weight"):
        quantizer.packer(state, hp)


def test_a_calibration_that_met_nan_names_the_matrix_and_where_the_weights_are(tokenizer):
    hp = hyper(tokenizer)
    model = small_model()
    seen = calibrated(model, *tokens_of(96))
    seen.uses["blocks.0.fc"].products[0, 0] = math.nan
    run = LoggedRun(hp)
    what = (
        r"calibration: blocks\.0\.fc\.weight met values that are not finite; .*run/final_model\.pt"
    )
    with pytest.raises(tg.UserError, match=what):
        quantizer.make_artifact(gaussian_state(hp), seen, run)


def test_matrices_and_rows_of_zeros_stay_zeros(tokenizer, tmp_path):
    hp = hyper(tokenizer)
    state = gaussian_state(hp)
    state["blocks.0.proj.weight"].zero_()
    state["blocks.0.fc.weight"][5].zero_()
    _, weights = load(quantizer.packer(state, hp)(hp), tmp_path, tokenizer)
    assert not weights["blocks.0.proj.weight"].any()
    assert not weights["blocks.0.fc.weight"][5].any()
    assert weights["blocks.0.fc.weight"].any()


def test_a_model_that_saw_nothing_but_one_token_is_packed(tokenizer, tmp_path):
    """H has rank 1, and most rows of the table no gradient at all."""
    hp = hyper(tokenizer)
    model = small_model()
    inputs = torch.full((1, 4), 7)
    seen = calibrated(model, inputs, inputs)
    _, weights = load(quantizer.packer(gaussian_state(hp), hp, seen)(hp), tmp_path, tokenizer)
    assert all(w.isfinite().all() for w in weights.values())


def resealed(data):
    """An artifact whose digest is that of its content."""
    return data[:16] + hashlib.sha256(data[:16] + data[48:]).digest() + data[48:]


@settings(max_examples=30, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_a_damaged_artifact_is_refused_or_has_its_shapes(tmp_path_factory, edits):
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "some.model").write_bytes(b"some tokenizer")
    data = bytearray(GOLDEN.read_bytes())
    for place, value in edits:
        data[48 + place % (len(data) - 48)] = value
    changed = bytes(data) != GOLDEN.read_bytes()
    if changed:
        with pytest.raises(tg.UserError, match="truncated or damaged"):
            load(bytes(data), folder, folder / "some.model")
    try:
        _, weights = load(resealed(bytes(data)), folder, folder / "some.model")
    except tg.UserError:
        return
    assert {n: w.shape for n, w in weights.items()} == {
        n: w.shape for n, w in golden_state().items()
    }
