"""The model: its NLL and gradients against a plain float64 reference, and its properties."""

import functools
import math

import numpy as np
import pytest
import torch
from conftest import resolve

import train_gpt as tg

TINY = {
    "VOCAB_SIZE": 23,
    "NUM_LAYERS": 3,
    "MODEL_DIM": 16,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 2,
    "MLP_MULT": 3,
    "TRAIN_SEQ_LEN": 8,
    "TRAIN_BATCH_TOKENS": 16,
    "ROPE_BASE": 50.0,
    "LOGIT_SOFTCAP": 4.0,
    "DEVICE": "cpu",
}

HEADS = ("tok_emb.weight", "lm_head.weight")

settings = functools.partial(resolve, TINY)


def random_model(hp, dtype=torch.float32, seed=0):
    """A model none of whose parameters is as it was initialized."""
    torch.manual_seed(seed)
    model = tg.build_model(hp, dtype)
    for name, p in model.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.normal_(p, 0.0, 1.0 if name in HEADS else p.size(-1) ** -0.5)
        else:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def random_tokens(hp, rows=2, length=7, seed=0):
    """Inputs and targets, independent of each other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(hp.vocab_size, (2, rows, length), generator=generator)


def float64_weights(model):
    """The model's parameters as float64 NumPy arrays."""
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


# ---- the reference: one token, one head, one position at a time, in float64


def normed(v):
    """A vector over its root mean square."""
    return v / math.sqrt(float(np.mean(v * v)) + 2.0**-23)


def turned(v, position, base):
    """Rotary embedding as a product of complex numbers: pair (i, i + n) turns by -position·θᵢ."""
    n = len(v) // 2
    angles = [position * base ** (-i / n) for i in range(n)]
    z = [complex(v[i], v[i + n]) * complex(math.cos(a), -math.sin(a)) for i, a in enumerate(angles)]
    return np.array([c.real for c in z] + [c.imag for c in z])


def attention(w, prefix, xs, hp):
    """Causal attention with grouped keys and values; xs is a list of normalized vectors."""
    size = hp.model_dim // hp.num_heads
    queries_per_kv = hp.num_heads // hp.num_kv_heads
    rows = []
    for t in range(len(xs)):
        outs = []
        for head in range(hp.num_heads):
            own = slice(head * size, (head + 1) * size)
            kv = head // queries_per_kv
            shared = slice(kv * size, (kv + 1) * size)
            q = turned(normed(w[prefix + "c_q.weight"][own] @ xs[t]), t, hp.rope_base)
            q = q * w[prefix + "q_gain"][head].item()
            scores, values = [], []
            for s in range(t + 1):
                k = turned(normed(w[prefix + "c_k.weight"][shared] @ xs[s]), s, hp.rope_base)
                scores.append(float(q @ k) / math.sqrt(size))
                values.append(w[prefix + "c_v.weight"][shared] @ xs[s])
            shares = [math.exp(score - max(scores)) for score in scores]
            outs.append(sum(a * v for a, v in zip(shares, values, strict=True)) / sum(shares))
        rows.append(w[prefix + "proj.weight"] @ np.concatenate(outs))
    return rows


def run_block(w, i, xs, x0s, hp):
    """Block i on a list of vectors."""
    p = f"blocks.{i}."
    m0, m1 = w[p + "resid_mix"]
    xs = [m0 * x + m1 * x0 for x, x0 in zip(xs, x0s, strict=True)]
    ys = attention(w, p + "attn.", [normed(x) for x in xs], hp)
    xs = [x + w[p + "attn_scale"] * y for x, y in zip(xs, ys, strict=True)]
    out = []
    for x in xs:
        hidden = w[p + "fc.weight"] @ normed(x)
        squared = np.array([h * h if h > 0 else 0.0 for h in hidden])
        out.append(x + w[p + "mlp_scale"] * (w[p + "proj.weight"] @ squared))
    return out


def reference_nll(w, hp, inputs, targets):
    """NLL of each target, float64 (B, T)."""
    half, result = hp.num_layers // 2, []
    for row, goals in zip(inputs.tolist(), targets.tolist(), strict=True):
        x0s = [normed(w["tok_emb.weight"][token]) for token in row]
        xs, outputs = x0s, {}
        for i in range(hp.num_layers):
            # Decoder layer half + j is fed by encoder layer half - 1 - j: the innermost first.
            j = i - half
            if 0 <= j < half:
                fed = outputs[half - 1 - j]
                xs = [x + w["skip_weights"][j] * y for x, y in zip(xs, fed, strict=True)]
            xs = outputs[i] = run_block(w, i, xs, x0s, hp)
        head = w["tok_emb.weight"] if hp.tie_embeddings else w["lm_head.weight"]
        nlls = []
        for x, goal in zip(xs, goals, strict=True):
            logits = [hp.logit_softcap * math.tanh(z / hp.logit_softcap) for z in head @ normed(x)]
            nlls.append(math.log(sum(map(math.exp, logits))) - logits[goal])
        result.append(nlls)
    return np.array(result)


# ---- the forward pass


def check_against_reference(**values):
    hp = settings(**values)
    model = random_model(hp)
    inputs, targets = random_tokens(hp)
    with torch.no_grad():
        nll = model(inputs, targets)
    expected = reference_nll(float64_weights(model), hp, inputs, targets)
    assert expected.std() > 0.3  # the case is not a trivial one
    np.testing.assert_allclose(nll.numpy(), expected, atol=3e-5)


@pytest.mark.parametrize("tied", [0, 1])
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_nll_equals_reference_at_any_depth(layers, tied):
    check_against_reference(NUM_LAYERS=layers, TIE_EMBEDDINGS=tied)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (8, 2)])
def test_nll_equals_reference_with_any_heads(heads, kv_heads):
    check_against_reference(NUM_HEADS=heads, NUM_KV_HEADS=kv_heads, NUM_LAYERS=2)


@pytest.mark.parametrize(
    "values",
    [{"ROPE_BASE": 10000.0}, {"LOGIT_SOFTCAP": 30.0}, {"MLP_MULT": 1}],
    ids=lambda values: next(iter(values)),
)
def test_nll_equals_reference_with_setting(values):
    check_against_reference(NUM_LAYERS=2, **values)


def test_sequence_may_be_shorter_than_train_seq_len():
    hp = settings(TRAIN_SEQ_LEN=16)
    model = random_model(hp)
    inputs, targets = random_tokens(hp, length=16)
    with torch.no_grad():
        long, short = model(inputs, targets), model(inputs[:, :5], targets[:, :5])
    torch.testing.assert_close(short, long[:, :5], atol=2e-6, rtol=0)


# ---- properties of a legal, well-defined prediction


def test_nll_depends_on_no_later_token():
    hp = settings(NUM_LAYERS=4)
    model = random_model(hp)
    inputs, targets = random_tokens(hp, rows=1, length=8)
    with torch.no_grad():
        before = model(inputs, targets)
        for t in range(8):
            changed = inputs.clone()
            changed[0, t] = (changed[0, t] + 1) % hp.vocab_size
            after = model(changed, targets)
            torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
            assert (after[:, t:] - before[:, t:]).abs().max() > 1e-3


def test_last_nll_depends_on_every_earlier_token():
    hp = settings(NUM_LAYERS=2)
    model = random_model(hp)
    inputs, targets = random_tokens(hp, rows=1, length=8)
    with torch.no_grad():
        before = model(inputs, targets)[0, -1]
        for t in range(8):
            changed = inputs.clone()
            changed[0, t] = (changed[0, t] + 1) % hp.vocab_size
            assert (model(changed, targets)[0, -1] - before).abs() > 1e-5


def test_rows_do_not_influence_each_other():
    hp = settings()
    model = random_model(hp)
    inputs, targets = random_tokens(hp, rows=3)
    other = inputs.clone()
    other[1] = (other[1] + 1) % hp.vocab_size
    with torch.no_grad():
        a, b = model(inputs, targets), model(other, targets)
    torch.testing.assert_close(a[[0, 2]], b[[0, 2]], atol=1e-6, rtol=0)


def test_prediction_is_one_normalized_distribution():
    hp = settings()
    model = random_model(hp)
    inputs = random_tokens(hp, rows=1)[0]
    V, T = hp.vocab_size, inputs.size(1)
    every_target = torch.arange(V)[:, None].expand(V, T)
    with torch.no_grad():
        nll = model(inputs.expand(V, T), every_target).double()
    torch.testing.assert_close((-nll).exp().sum(0), torch.ones(T).double(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("tied", [0, 1])
def test_logits_are_those_of_the_prediction_behind_the_last_token(tied):
    hp = settings(TIE_EMBEDDINGS=tied)
    model = random_model(hp)
    inputs, targets = random_tokens(hp)
    with torch.no_grad():
        nll = model(inputs, targets)[:, -1]
        logits = model.logits(inputs)
    assert logits.shape == (len(inputs), hp.vocab_size)
    assert logits.abs().max() < hp.logit_softcap
    found = torch.nn.functional.cross_entropy(logits, targets[:, -1], reduction="none")
    torch.testing.assert_close(found, nll, atol=1e-5, rtol=0)


def test_softcap_bounds_the_logits():
    hp = settings(LOGIT_SOFTCAP=3.0, TIE_EMBEDDINGS=0)
    model = random_model(hp)
    with torch.no_grad():
        model.lm_head.weight *= 1000
    inputs = random_tokens(hp, rows=1)[0]
    V, T = hp.vocab_size, inputs.size(1)
    with torch.no_grad():
        nll = model(inputs.expand(V, T), torch.arange(V)[:, None].expand(V, T))
    spread = nll.max(0).values - nll.min(0).values  # of the logits too: nll = constant - logit
    assert spread.max() <= 6.0 + 1e-5
    assert spread.min() > 5.99


# ---- padding


def test_padding_gives_zero_nll():
    hp = settings()
    inputs, targets = random_tokens(hp)
    targets[0, 4:] = tg.IGNORE
    with torch.no_grad():
        nll = random_model(hp)(inputs, targets)
    assert (nll[0, 4:] == 0).all()
    assert (nll[0, :4] > 0).all()
    assert (nll[1] > 0).all()


def test_padding_changes_no_other_nll():
    hp = settings()
    model = random_model(hp)
    inputs, targets = random_tokens(hp, rows=2, length=6)
    padded = torch.tensor([[0], [tg.IGNORE]]).repeat(1, 3 * 8).view(2, 3, 8)
    padded[0, :2, :6], padded[1, :2, :6] = inputs, targets
    with torch.no_grad():
        alone, among = model(inputs, targets), model(*padded)
    torch.testing.assert_close(among[:2, :6], alone, atol=2e-6, rtol=0)
    assert among.count_nonzero() == alone.numel()


def test_padding_gives_no_gradient():
    hp = settings()
    model = random_model(hp)
    inputs, targets = random_tokens(hp)
    padded = torch.tensor([[0], [tg.IGNORE]]).repeat(1, 3 * 7).view(2, 3, 7)
    padded[0, :2], padded[1, :2] = inputs, targets
    params = list(model.parameters())
    plain = torch.autograd.grad(model(inputs, targets).sum(), params)
    for a, b in zip(torch.autograd.grad(model(*padded).sum(), params), plain, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


# ---- gradients


@pytest.mark.parametrize("tied", [0, 1])
def test_gradients_equal_finite_differences(tied):
    hp = settings(TIE_EMBEDDINGS=tied, NUM_LAYERS=3, VOCAB_SIZE=7)
    model = random_model(hp)
    inputs, targets = random_tokens(hp, rows=1, length=4)
    model(inputs, targets).sum().backward()
    weights, rng, step = float64_weights(model), np.random.default_rng(0), 1e-5

    def slope(name, index):
        original, sums = weights[name][index], []
        for moved in (original + step, original - step, original):
            weights[name][index] = moved
            sums.append(reference_nll(weights, hp, inputs, targets).sum())
        return (sums[0] - sums[1]) / (2 * step)

    for name, p in model.named_parameters():
        for _ in range(2):
            index = tuple(int(rng.integers(n)) for n in p.shape)
            if name == "tok_emb.weight":  # a row that is looked up
                index = (int(rng.choice(inputs.flatten().numpy())), index[1])
            expected = pytest.approx(slope(name, index), abs=1e-4, rel=1e-3)
            assert p.grad[index].item() == expected, (name, index)


def test_every_parameter_gets_a_gradient():
    hp = settings(NUM_LAYERS=5, TIE_EMBEDDINGS=0)
    model = random_model(hp)
    model(*random_tokens(hp)).sum().backward()
    silent = [name for name, p in model.named_parameters() if not p.grad.abs().max() > 0]
    assert silent == []


# ---- initial values


def test_parameter_count_at_the_defaults():
    hp = tg.load_settings({}, check_places=False)
    with torch.device("meta"):
        model = tg.build_model(hp)
    assert sum(p.numel() for p in model.parameters()) == 17_059_912


def initial_model(**values):
    torch.manual_seed(0)
    return tg.build_model(settings(**values))


def test_what_writes_to_the_residual_stream_starts_at_zero():
    model = initial_model(TIE_EMBEDDINGS=0)
    zero = {name for name, p in model.named_parameters() if not p.any()}
    expected = {f"blocks.{i}.{part}proj.weight" for i in range(3) for part in ("", "attn.")}
    assert zero == expected | {"lm_head.weight"}


@pytest.mark.parametrize("std", [0.005, 0.02])
def test_tied_embedding_has_its_initial_deviation(std):
    model = initial_model(VOCAB_SIZE=1024, MODEL_DIM=64, TIED_EMBED_INIT_STD=std)
    weight = model.tok_emb.weight
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert abs(weight.mean().item()) < std / 50


def test_untied_embedding_starts_with_deviation_one():
    model = initial_model(VOCAB_SIZE=1024, MODEL_DIM=64, TIE_EMBEDDINGS=0)
    assert model.tok_emb.weight.std().item() == pytest.approx(1.0, rel=0.02)


def test_control_tensors_start_neutral():
    model = initial_model(QK_GAIN_INIT=1.25, NUM_LAYERS=5)
    assert model.skip_weights.shape == (2, 16)
    assert (model.skip_weights == 1).all()
    for block in model.blocks:
        assert (block.attn_scale == 1).all()
        assert (block.mlp_scale == 1).all()
        assert (block.resid_mix[0] == 1).all()
        assert (block.resid_mix[1] == 0).all()
        assert block.attn.q_gain.numel() == 4
        assert (block.attn.q_gain == 1.25).all()


def test_untied_head_starts_uniform():
    hp = settings(TIE_EMBEDDINGS=0)
    nll = tg.build_model(hp)(*random_tokens(hp))
    torch.testing.assert_close(nll, torch.full_like(nll, math.log(hp.vocab_size)))


def test_tied_head_starts_nearly_uniform():
    hp = settings(VOCAB_SIZE=1024, MODEL_DIM=256)
    torch.manual_seed(0)
    inputs = random_tokens(hp, rows=8)[0]
    # A target that is not the input: the tied head prefers the token that it has just read.
    nll = tg.build_model(hp)(inputs, (inputs + 1) % hp.vocab_size)
    assert nll.mean().item() == pytest.approx(math.log(1024), abs=0.05)


def test_same_seed_gives_the_same_model():
    a, b = initial_model().state_dict(), initial_model().state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- number formats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_has_the_eps_of_fp32_in_any_dtype(dtype):
    x = torch.full((4,), 2.0**-12, dtype=dtype)  # its mean square is below eps
    expected = 2.0**-12 / math.sqrt(2.0**-24 + 2.0**-23)
    assert tg.rms_norm(x)[0].item() == pytest.approx(expected, rel=2**-8)


def test_rms_norm_gives_mean_square_one():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 100
    torch.testing.assert_close(tg.rms_norm(x).square().mean(-1), torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_fp32_whatever_the_compute_dtype(dtype):
    model = tg.build_model(settings(TIE_EMBEDDINGS=0), dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}


def test_bf16_forward_is_close_to_fp32():
    hp = settings(LOGIT_SOFTCAP=30.0)
    inputs, targets = random_tokens(hp, rows=8)
    with torch.no_grad():
        exact = random_model(hp)(inputs, targets)
        rounded = random_model(hp, torch.bfloat16)(inputs, targets)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.05


def test_bf16_gradients_are_fp32_and_close():
    hp = settings(LOGIT_SOFTCAP=30.0)
    inputs, targets = random_tokens(hp, rows=8)
    exact, rounded = random_model(hp), random_model(hp, torch.bfloat16)
    for model in (exact, rounded):
        model(inputs, targets).sum().backward()
    for (name, p), q in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        assert torch.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) > 0.98, name
