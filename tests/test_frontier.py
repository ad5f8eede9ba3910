"""The model and the targets of frontier.py, each against a plain float64 reference."""

import functools
import itertools
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import sentencepiece as spm
import torch
from conftest import (
    BOS,
    compose_documents,
    cut_documents,
    document_stream,
    double_model,
    events,
    load_weights,
    optimizers_of,
    resolve,
    train_tokenizer,
)

import frontier as fr
import train_gpt as tg

TINY = {
    "VOCAB_SIZE": 23,
    "NUM_LAYERS": 4,
    "MODEL_DIM": 32,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 2,
    "TRAIN_SEQ_LEN": 8,
    "TRAIN_BATCH_TOKENS": 64,
    "MICRO_BATCH_TOKENS": 64,
    "VAL_BATCH_SIZE": 1024,
    "ROPE_BASE": 50.0,
    "LOGIT_SOFTCAP": 5.0,
    "DTYPE": "fp32",
}
LOOPS = {"LOOP_REPEATS": 2, "LOOP_FIRST": 1, "LOOP_LAST": 2}
WINDOW = {"WINDOW_PATTERN": "SSL", "WINDOW_TOKENS": 3}
EVERYTHING = {  # that shapes the model
    **LOOPS,
    **WINDOW,
    "NUM_LAYERS": 5,
    "SKIPS": "mudd",
    "SMEAR_GATE": 2,
    "SPARSE_ATTN_GATE": 12,
    "PARALLEL_LAST_N": 2,
    "RESID_MIX": 0,
    "CHANNEL_GAINS": 0,
    "MLP_ACT": "leaky_relu2",
    "XSA_LAST_N": 5,
    "LN_SCALE": 1,
    "ROPE_DIMS": 4,
    "ROPE_SCALING": "yarn",
    "EVAL_SEQ_LEN": 16,
    "EVAL_STRIDE": 3,
    "BIGRAM_BUCKETS": 11,
    "BIGRAM_DIM": 6,
    "ORTHO_INIT": 1,
}

settings = functools.partial(resolve, TINY)


def test_everything_is_on():
    """A new technique of the model must come into EVERYTHING."""
    techniques = [
        name for name in tg.MODEL_SETTINGS if tg.FIELDS[name].metadata["file"] == "frontier.py"
    ]
    hp = settings(**EVERYTHING)
    off = [name for name in techniques if getattr(hp, name.lower()) == tg.FIELDS[name].default]
    assert off == []


def tokens_with_bos(hp, rows=2, length=8, seed=0):
    """Draw inputs and targets (2, rows, length); each row has a BOS in its middle."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(2, hp.vocab_size, (2, rows, length), generator=generator)
    batch[0, :, length // 2] = BOS
    batch[1, :, length // 2 - 1] = BOS
    return batch


# ---- the reference: NumPy in float64, one row of tokens at a time


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def normed(x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 2.0**-23)


def turned(x, base):
    """Turn pairs (i, i + r/2) of x (T, H, r), as complex numbers, by -position·base^(-2i/r)."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * base ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(-1j * angles)
    return np.concatenate((z.real, z.imag), axis=-1)


def attention(w, p, x, hp, window):
    T = len(x)
    group = hp.num_heads // hp.num_kv_heads
    q, k, v = (
        (x @ w[p + f"c_{c}.weight"].T).reshape(T, -1, hp.model_dim // hp.num_heads) for c in "qkv"
    )
    q = turned(normed(q), hp.rope_base) * w[p + "q_gain"].reshape(-1, 1)
    k = turned(normed(k), hp.rope_base)
    k, v = (np.repeat(a, group, axis=1) for a in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    behind = np.arange(T)[:, None] - np.arange(T)
    shares = np.exp(scores) * ((behind >= 0) & (behind < window))
    y = np.einsum("hts,shd->thd", shares / shares.sum(-1, keepdims=True), v)
    if hp.sparse_attn_gate:
        y = y * sigmoid(x[:, : hp.sparse_attn_gate] @ w[p + "gate.weight"].T)[..., None]
    return y.reshape(T, -1) @ w[p + "proj.weight"].T


def block(w, layer, x, x0, hp):
    p = f"blocks.{layer}."
    tiled = (hp.window_pattern or "L") * hp.num_layers
    kind = (tiled[: hp.num_layers - 1] + "L")[layer]
    window = hp.window_tokens if kind == "S" else len(x)
    a, b = (w[p + "attn_scale"], w[p + "mlp_scale"]) if hp.channel_gains else (1.0, 1.0)
    if hp.resid_mix:
        x = w[p + "resid_mix"][0] * x + w[p + "resid_mix"][1] * x0
    read = normed(x)
    attended = x + a * attention(w, p + "attn.", read, hp, window)
    is_parallel = hp.num_layers - layer <= hp.parallel_last_n
    hidden = (read if is_parallel else normed(attended)) @ w[p + "fc.weight"].T
    return attended + b * (np.maximum(hidden, 0) ** 2 @ w[p + "proj.weight"].T)


def skipped(w, x, outputs, x0, count, hp):
    """Bring to x, the input of visit i of `count`, what earlier visits gave."""
    i = len(outputs)
    half = count // 2
    if hp.skips in ("unet", "gated") and half <= i < 2 * half:
        state = w["skip_weights"][i - half] * outputs[2 * half - 1 - i]
        if hp.skips == "unet":
            return x + state
        return state + sigmoid(w["skip_gates"][i - half]) * (x - state)
    if hp.skips == "mudd" and i in range(2, count, 2):
        p = f"mudd.{i}."
        hidden = gelu(x @ w[p + "fc.weight"].T)
        shares = hidden @ w[p + "proj.weight"].T + w[p + "bias"]
        earlier = [x0, *outputs[:-1]]  # x is the last output
        return x + 0.1 * sum(shares[:, [j]] * h for j, h in enumerate(earlier))
    return x


def embedded(w, hp, row):
    e = w["tok_emb.weight"][row]
    if not hp.smear_gate:
        return normed(e)
    x = e.copy()
    for t in range(1, len(row)):
        if row[t] != BOS:
            x[t] += w["smear"][12] * sigmoid(w["smear"][:12] @ e[t, :12]) * e[t - 1]
    return normed(x)


def reference_row(w, hp, row, goals, order):
    """Give the NLL of each target of one row; the blocks are visited in this order."""
    x = x0 = embedded(w, hp, row)
    outputs = []
    for layer in order:
        x = skipped(w, x, outputs, x0, len(order), hp)
        x = block(w, layer, x, x0, hp)
        outputs.append(x)
    cap = hp.logit_softcap
    logits = cap * np.tanh(normed(x) @ w["tok_emb.weight"].T / cap)
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(row)), goals]


def looped_order(hp):
    first, end = hp.loop_first, hp.loop_last + 1
    layers = [*range(hp.num_layers)]
    if not hp.loop_repeats:
        return layers
    return layers[:first] + layers[first:end] * (hp.loop_repeats + 1) + layers[end:]


TOGETHER = {**LOOPS, **WINDOW, "SMEAR_GATE": 2, "SPARSE_ATTN_GATE": 5, "PARALLEL_LAST_N": 2}
CASES = {
    "baseline": {},
    "windows": WINDOW,
    "windows_of_one": {"WINDOW_PATTERN": "S", "WINDOW_TOKENS": 1},
    "long_windows": {"WINDOW_PATTERN": "LS", "WINDOW_TOKENS": 7},
    "gate": {"SPARSE_ATTN_GATE": 5},
    "gate_of_all_channels": {"SPARSE_ATTN_GATE": 32},
    "smear": {"SMEAR_GATE": 2},
    "no_skips": {"SKIPS": "none"},
    "gated": {"SKIPS": "gated"},
    "gated_odd": {"SKIPS": "gated", "NUM_LAYERS": 5},
    "mudd": {"SKIPS": "mudd"},
    "mudd_odd": {"SKIPS": "mudd", "NUM_LAYERS": 7},
    "parallel": {"PARALLEL_LAST_N": 2},
    "all_parallel": {"PARALLEL_LAST_N": 4},
    "no_mix": {"RESID_MIX": 0},
    "no_gains": {"CHANNEL_GAINS": 0},
    "loops": LOOPS,
    "loops_odd": {**LOOPS, "NUM_LAYERS": 5, "LOOP_REPEATS": 1},
    "loop_of_one": {"LOOP_REPEATS": 3, "LOOP_FIRST": 0, "LOOP_LAST": 0},
    "loop_of_all": {"LOOP_REPEATS": 1, "LOOP_FIRST": 0, "LOOP_LAST": 3},
    "loops_gated": {**LOOPS, "SKIPS": "gated"},
    "loops_mudd": {**LOOPS, "SKIPS": "mudd"},
    "together": {**TOGETHER, "SKIPS": "gated"},
    "together_bare": {**TOGETHER, "SKIPS": "mudd", "RESID_MIX": 0, "CHANNEL_GAINS": 0},
}


def check_against_reference(hp, model, order):
    inputs, targets = tokens_with_bos(hp)
    with torch.no_grad():
        nll = model(inputs, targets)
    assert nll.dtype == torch.float64
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    pairs = zip(inputs.numpy(), targets.numpy(), strict=True)
    expected = np.array([reference_row(w, hp, row, goals, order) for row, goals in pairs])
    assert expected.std() > 0.3  # the case is not a trivial one
    np.testing.assert_allclose(nll, expected, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_nll_equals_reference_with(name):
    hp = settings(**CASES[name])
    check_against_reference(hp, double_model(hp), looped_order(hp))


@pytest.mark.parametrize("name", [name for name in CASES if "LOOP_REPEATS" in CASES[name]])
def test_before_the_loops_come_skips_take_the_first_weights(name):
    """A skip's weight is known by its place in the list of visits, looped or not."""
    hp = settings(**CASES[name])
    model = double_model(hp)
    model.visits = model.orders[0]
    check_against_reference(hp, model, range(hp.num_layers))


@pytest.mark.parametrize("name", [name for name in CASES if name != "baseline"])
def test_last_positions_alone_have_the_same_nll(name):
    """So a window of validation, of which the last tokens are scored, is as the whole."""
    hp = settings(**CASES[name])
    model = double_model(hp)
    inputs, targets = tokens_with_bos(hp)
    with torch.no_grad():
        whole = model(inputs, targets)
        torch.testing.assert_close(model(inputs, targets[:, -3:]), whole[:, -3:])


# ---- windows


def masked_attention(q, k, v, piece, window):
    """Attend from q (B, H, S, Dh) by a mask of all pairs of T places, each in a piece (B, T)."""
    B, H, S, D = q.shape
    T = k.size(2)
    mask = torch.zeros(B, 1, S, T, dtype=torch.bool)
    for b, s, there in itertools.product(range(B), range(S), range(T)):
        here = T - S + s
        is_near = here - window < there <= here
        mask[b, 0, s, there] = is_near and piece[b][here] == piece[b][there]
    k, v = (x.repeat_interleave(H // x.size(1), 1) for x in (k, v))
    scores = (q @ k.mT / D**0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def check_attention(S, T, kv_heads, window, piece, documents):
    """Compare values and gradients."""
    generator = torch.Generator().manual_seed(S + T + window)
    shapes = [(2, 4, S, 6), (2, kv_heads, T, 6), (2, kv_heads, T, 6), (2, 4, S, 6)]
    qkv = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    dy = qkv.pop()
    leaves = [x.requires_grad_() for x in qkv]
    ours = fr.attend_window(*qkv, documents, window)
    expected = masked_attention(*qkv, piece, window)
    found = [[y, *torch.autograd.grad((y * dy).sum(), leaves)] for y in (ours, expected)]
    for pair in zip(*found, strict=True):
        torch.testing.assert_close(*pair, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [1, 2, 5, 11, 12, 13, 100])
@pytest.mark.parametrize("S", [12, 5, 1])
def test_window_equals_a_masked_softmax(S, window, kv_heads):
    check_attention(S, 12, kv_heads, window, [[0] * 12] * 2, None)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [1, 3, 7, 8, 9, 100])
def test_window_stays_within_documents(window, kv_heads):
    """Pieces of 3 and 9 tokens, and 10 and 2; of 9 and 10, the first 8 are a piece of their own."""
    piece = [[0] * 3 + [1] * 8 + [2], [3] * 8 + [4] * 2 + [5] * 2]
    documents = cut_documents([3, 9, 10, 2], rows=2, longest=8)
    check_attention(12, 12, kv_heads, window, piece, documents)


def test_pieces_may_be_longer_than_what_they_are_padded_to():
    piece = [[0] * 70, [1] * 64 + [2] * 6]
    check_attention(70, 70, 2, 50, piece, cut_documents([70, 64, 6], rows=2, longest=70))


@pytest.mark.parametrize("window", [12, 0])
def test_no_window_is_the_attention_of_the_baseline(window):
    q, k, v = torch.randn(3, 2, 4, 12, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fr.attend_window(q, k, v, None, window), tg.attend(q, k, v))


@pytest.mark.parametrize(
    ("pattern", "layers", "expected"),
    [
        ("", 3, "LLL"),
        ("L", 3, "LLL"),
        ("S", 4, "SSSL"),
        ("SSL", 8, "SSLSSLSL"),
        ("SSSL", 11, "SSSLSSSLSSL"),
        ("LS", 5, "LSLSL"),
        ("SSLL", 2, "SL"),
        ("S", 1, "L"),
    ],
)
def test_pattern_is_tiled_over_the_layers_and_the_last_is_full(pattern, layers, expected):
    hp = settings(WINDOW_PATTERN=pattern, NUM_LAYERS=layers, XSA_LAST_N=1)
    model = tg.build_model(hp)
    sizes = {"S": hp.window_tokens, "L": 0}
    assert [block.attn.window for block in model.blocks] == [sizes[kind] for kind in expected]


# ---- gates of heads


def fill(model, values):
    """Set parameters by the ends of their names."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            for end, value in values.items():
                if name.endswith(end):
                    p.copy_(torch.as_tensor(value))


def same_weights(target, source):
    """Give a model the weights of another one that it has too."""
    known = source.state_dict()
    target.load_state_dict({name: known[name] for name in target.state_dict()})
    return target


def nll_of(model, **how):
    batch = tokens_with_bos(SimpleNamespace(vocab_size=23), **how)
    with torch.no_grad():
        return model(*batch)


def test_heads_begin_with_a_gate_of_a_half():
    gated = settings(SPARSE_ATTN_GATE=5)
    fresh = tg.build_model(gated)
    assert not any(block.attn.gate.weight.any() for block in fresh.blocks)
    model = double_model(gated)
    fill(model, {"gate.weight": 0.0})
    plain = same_weights(double_model(settings()), model)
    with torch.no_grad():
        for block in plain.blocks:
            block.attn.proj.weight /= 2
    torch.testing.assert_close(nll_of(model), nll_of(plain))


# ---- smearing


def test_second_smear_gate_is_nothing_at_first():
    fresh = tg.build_model(settings(SMEAR_GATE=2))
    inputs, _ = tokens_with_bos(settings())
    assert fresh.smear.shape == (13,)
    plain = tg.rms_norm(fresh.tok_emb(inputs))
    assert torch.equal(fresh.embed(inputs), plain)


def test_second_smear_gate_gets_a_gradient_at_first():
    fresh = tg.build_model(settings(SMEAR_GATE=2))
    fresh(*tokens_with_bos(settings())).sum().backward()
    assert fresh.smear.grad[12] != 0


SMEARS = {
    "smear": {"SMEAR_GATE": 1},
    "by_token": {"SMEAR_GATE": 2},
    "bigram": {"BIGRAM_BUCKETS": 997, "BIGRAM_DIM": 6},
}


@pytest.mark.parametrize("is_cut", [False, True], ids=["rows", "pieces"])
@pytest.mark.parametrize("name", SMEARS)
def test_a_token_reaches_the_next_one_of_its_document_row_and_piece(name, is_cut):
    """Whatever is changed at t, the embedding is another one at t, and t + 1 if that is within."""
    hp = settings(**SMEARS[name])
    model = double_model(hp)
    inputs, _ = tokens_with_bos(hp)  # BOS at 4
    begins = {(0, 0), (0, 4), (1, 0), (1, 4)}
    documents = None
    if is_cut:
        documents = cut_documents([3, 5, 6, 2], rows=2, longest=8)
        begins |= {(0, 3), (1, 6)}
    before = model.embed(inputs, documents)
    for row, t in itertools.product(range(2), range(8)):
        reached = set()
        for other in set(range(2, 23)) - {inputs[row, t].item()}:
            changed = inputs.clone()
            changed[row, t] = other
            differ = (model.embed(changed, documents) != before).any(-1)
            reached |= {*map(tuple, differ.nonzero().tolist())}
        next_one = {(row, t + 1)} if t < 7 and (row, t + 1) not in begins else set()
        assert reached == {(row, t)} | next_one


# ---- ways around blocks


def test_gated_skips_begin_with_the_mean():
    model = tg.build_model(settings(SKIPS="gated"))
    x, first, second = torch.randn(3, 2, 8, 32, generator=torch.Generator().manual_seed(0))
    assert model.skip_gates.shape == (2, 32)
    states = [first, second, x]
    torch.testing.assert_close(model.skip(x, states, 2), (x + x) / 2)
    states = [first, second, first, x]
    torch.testing.assert_close(model.skip(x, states, 2), (x + second) / 2)


def test_mixer_equals_its_formula_where_gelu_bends():
    """In a model of random weights, the inputs of gelu are too large to tell its forms apart."""
    generator = torch.Generator().manual_seed(0)
    mixer = fr.Mixer(6, 3).double()
    w = {name: torch.randn(p.shape, generator=generator) for name, p in mixer.named_parameters()}
    mixer.load_state_dict(w)
    x, *states = torch.randn(4, 2, 5, 6, dtype=torch.float64, generator=generator)
    w = {name: p.double().numpy() for name, p in w.items()}
    hidden = gelu(x.numpy() @ w["fc.weight"].T)
    shares = hidden @ w["proj.weight"].T + w["bias"]
    expected = x.numpy() + 0.1 * sum(shares[..., [j]] * h.numpy() for j, h in enumerate(states))
    with torch.no_grad():
        np.testing.assert_allclose(mixer(x, states), expected, atol=1e-12)


@pytest.mark.parametrize("values", [{}, LOOPS], ids=["once", "loops"])
def test_mixers_are_nothing_at_first(values):
    fresh = tg.build_model(settings(SKIPS="mudd", **values))
    assert [*fresh.mudd] == [str(i) for i in range(2, len(fresh.visits), 2)]
    for i, mixer in fresh.mudd.items():
        x, *states = torch.randn(1 + int(i), 2, 8, 32).unbind()
        assert torch.equal(mixer(x, states), x)
        assert mixer.fc.weight.abs().max() > 0  # or else it would never learn


def test_mixers_get_gradients_at_first():
    model = tg.build_model(settings(SKIPS="mudd"))
    x, *states = torch.randn(3, 2, 8, 32).unbind()
    mixer = model.mudd["2"]
    mixer(x, states).square().sum().backward()
    assert mixer.proj.weight.grad.abs().min() > 0
    assert mixer.bias.grad.abs().min() > 0


@pytest.mark.parametrize("values", [{}, LOOPS], ids=["once", "loops"])
def test_no_weights_of_skips_are_there_without_them(values):
    skips = {
        choice: {
            name.split(".")[0]
            for name, _ in tg.build_model(settings(SKIPS=choice, **values)).named_parameters()
        }
        - {"tok_emb", "blocks"}
        for choice in ("unet", "gated", "mudd", "none")
    }
    gated = {"skip_weights", "skip_gates"}
    assert skips == {"unet": {"skip_weights"}, "gated": gated, "mudd": {"mudd"}, "none": set()}


def test_without_gains_and_mix_a_model_is_the_baseline_with_gains_of_one():
    bare = double_model(settings(RESID_MIX=0, CHANNEL_GAINS=0))
    plain = double_model(settings())
    ends = ("resid_mix", "attn_scale", "mlp_scale")
    neutral = dict(zip(ends, ([[1.0], [0.0]], 1.0, 1.0), strict=True))
    assert {type(bare), type(plain)} == {fr.GPT, tg.GPT}
    assert [name for name, _ in bare.named_parameters() if name.endswith(ends)] == []
    fill(plain, neutral)
    known = {name: p for name, p in plain.state_dict().items() if not name.endswith(ends)}
    bare.load_state_dict(known)
    torch.testing.assert_close(nll_of(bare), nll_of(plain))


# ---- loops


def test_order_of_visits_is_that_of_the_records():
    """Of techniques.md 2.5: 17 visits, of which the first 8 push their outputs."""
    hp = settings(NUM_LAYERS=11, LOOP_FIRST=3, LOOP_LAST=5, LOOP_REPEATS=2)
    once, looped = fr.visit_orders(hp)
    assert once == [*range(11)]
    assert looped == [*[0, 1, 2, 3, 4, 5, 3, 4], *[5, 3, 4, 5, 6, 7, 8, 9, 10]]
    model = tg.build_model(hp)
    assert model.visits == looped
    assert model.skip_weights.shape == (8, 32)


def test_without_loops_both_orders_are_one():
    assert fr.visit_orders(settings(NUM_LAYERS=3)) == [[0, 1, 2]] * 2


@pytest.mark.parametrize("skips", ["unet", "gated", "mudd", "none"])
def test_a_looped_model_is_a_deeper_one_with_shared_weights(skips):
    """Also its gradients: those of a block that is visited again are the sum of the copies'."""
    looped = double_model(settings(SKIPS=skips, SMEAR_GATE=2, **LOOPS))
    deep = double_model(settings(SKIPS=skips, SMEAR_GATE=2, NUM_LAYERS=8))
    visits = [0, 1, 2, 1, 2, 1, 2, 3]
    sources = {}
    for name in deep.state_dict():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str(visits[int(parts[1])])
        sources[name] = ".".join(parts)
    deep.load_state_dict({name: looped.state_dict()[source] for name, source in sources.items()})
    batch = tokens_with_bos(settings())
    nll = [model(*batch) for model in (looped, deep)]
    torch.testing.assert_close(*nll)
    for each in nll:
        each.sum().backward()
    sums = {}
    for name, p in deep.named_parameters():
        sums[sources[name]] = sums.get(sources[name], 0) + p.grad
    for name, p in looped.named_parameters():
        torch.testing.assert_close(p.grad, sums[name], msg=name)


# ---- the table of parameters

RATES = {
    "EMBED_LR": 0.11,
    "HEAD_LR": 0.12,
    "TIED_EMBED_LR": 0.13,
    "MATRIX_LR": 0.14,
    "SCALAR_LR": 0.15,
    "EMBED_WD": 0.21,
    "ADAM_WD": 0.22,
    "MUON_WD": 0.23,
    "BETA1": 0.8,
    "BETA2": 0.91,
    "EMBED_BETA2": 0.92,
    "SCALAR_BETA2": 0.93,
}
MATRICES = tuple(f"{name}.weight" for name in ("c_q", "c_k", "c_v", "proj", "fc", "expand"))


def kind_of(name):
    if name in ("tok_emb.weight", "bigram.table.weight"):
        return "embedding"
    if name == "lm_head.weight":
        return "head"
    if name.startswith("mudd."):
        return "mixer"
    return "matrix" if name.endswith(MATRICES) else "scalar"


@pytest.mark.parametrize("tied", [1, 0])
@pytest.mark.parametrize("skips", ["gated", "mudd"])
@pytest.mark.parametrize("choice", ["muon", "adamw"])
def test_each_parameter_is_trained_once_as_its_kind_is(choice, skips, tied):
    values = {**EVERYTHING, "SKIPS": skips, "CHANNEL_GAINS": tied, "RESID_MIX": tied, **RATES}
    if choice == "muon":
        values["NORMUON_BETA2"] = 0.94
    hp = settings(**values, TIE_EMBEDDINGS=tied, MATRIX_OPTIMIZER=choice)
    model = tg.build_model(hp)
    optimizer = torch.optim.AdamW if choice == "adamw" else fr.Muon
    expected = {
        "embedding": (torch.optim.AdamW, 0.13 if tied else 0.11, 0.21, (0.8, 0.92)),
        "head": (torch.optim.AdamW, 0.12, 0.22, (0.8, 0.91)),
        "matrix": (optimizer, 0.14, 0.23, (0.8, 0.94 if choice == "muon" else 0.91)),
        "scalar": (torch.optim.AdamW, 0.15, 0.22, (0.8, 0.93)),
        "mixer": (torch.optim.AdamW, 0.15 / 4, 0.22, (0.8, 0.93)),  # frontier.md C.1
    }
    names = {p: name for name, p in model.named_parameters()}
    trained = []
    for each in optimizers_of(model, hp):
        for group in each.param_groups:
            how = (type(each), group["base_lr"], group["base_decay"], group["betas"])
            trained += [(names[p], how) for p in group["params"]]
    assert sorted(trained) == sorted((name, expected[kind_of(name)]) for name in names.values())


def test_second_moments_are_of_beta2_if_nothing_else_is_said():
    hp = settings(**EVERYTHING, BETA2=0.91)
    model = tg.build_model(hp)
    betas = {row.beta2 for row in fr.parameter_table(hp) if row.optimizer == "adam"}
    assert betas == {0.91}
    assert {tg.row_of(name, hp).beta2 for name, _ in model.named_parameters()} == {0.91, 0.0}


def added_parameters(skips):
    """List the parameters of gates and mixers, none of them as it starts, and the settings."""
    values = {**EVERYTHING, "SKIPS": skips, "MODEL_DIM": 128, "QUANT_METHOD": "gptq"}
    hp = settings(**values, QUANT_BITS_ATTN=5)
    weights = double_model(hp).float().state_dict()
    return hp, {
        name: w
        for name, w in weights.items()
        if name in ("smear", "skip_gates") or name.startswith("mudd.") or ".gate." in name
    }


@pytest.mark.parametrize("skips", ["gated", "mudd"])
def test_gates_and_biases_are_stored_exactly(skips):
    hp, added = added_parameters(skips)
    matrices = (".fc.weight", ".proj.weight")
    exact = {name: w for name, w in added.items() if not name.endswith(matrices)}
    assert len(exact) == (1 + 5 + 1 if skips == "gated" else 1 + 5 + 4)
    for name, w in exact.items():
        (stored,) = tg.stored_arrays(name, w, hp)
        assert stored.dtype == np.dtype("<f4"), name
        assert np.array_equal(stored, w), name


def test_large_matrices_of_mixers_have_the_bits_of_attention():
    hp, added = added_parameters("mudd")
    bits = {name: tg.bits_of(name, w, hp) for name, w in added.items()}
    large = {name for name in added if name.startswith("mudd.") and ".fc." in name}
    assert len(large) == 4
    assert bits == {name: 5 if name in large else 0 for name in added}


# ---- targets


@pytest.fixture(scope="module")
def tokenizer_of_marks(tmp_path_factory):
    """Train a tokenizer of 400 pieces, with characters of several bytes and users' symbols."""
    path = tmp_path_factory.mktemp("pieces") / "marks.model"
    texts = [
        *compose_documents(40, seed=3),
        "ééé éè éèé naïve naïf 日本語 日本 日光 " * 40,
    ]
    symbols = "<mark>,<mark>s,the"
    return train_tokenizer(path, texts, 400, user_defined_symbols=symbols)


def test_prefixes_are_those_of_brute_force(tokenizer_of_marks):
    sp = spm.SentencePieceProcessor(model_file=str(tokenizer_of_marks))
    ids = range(len(sp))
    texts = {
        i: sp.id_to_piece(i).replace("\u2581", " ").encode()
        for i in ids
        if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i))
    }
    expected = []
    for i in ids:
        shorter = [
            j
            for j, text in texts.items()
            if i in texts and text != texts[i] and texts[i].startswith(text)
        ]
        longest = max(shorter, key=lambda j: len(texts[j]), default=tg.IGNORE)
        expected.append(longest)
    hp = settings(VOCAB_SIZE=400, TOKENIZER_PATH=tokenizer_of_marks)
    table = fr.prefix_table(tg.Tokenizer(hp))
    assert table.dtype == np.int64
    assert table.tolist() == expected
    steps = {len(texts[i]) - len(texts[j]) for i, j in enumerate(expected) if j >= 0}
    assert {1, 2, 3} <= steps  # some prefixes lack a letter, some more
    assert sum(j >= 0 for j in expected) > 50


def test_prefixes_of_known_pieces():
    """The names of control and byte tokens are no text, though they may look like the rest."""
    space = "\u2581"
    pieces = ["<s>", "<0x61>", "a", "ab", space, f"{space}ab", "abcd", "b", f"{space}a{space}b"]
    pieces += ["<", "<s>x", "<0x61>b"]
    kinds = np.arange(len(pieces))
    tokenizer = SimpleNamespace(pieces=pieces, silent=kinds == 0, byte=kinds == 1)
    expected = [-100, -100, -100, 2, -100, 4, 3, -100, 4, -100, 9, 9]
    assert fr.prefix_table(tokenizer).tolist() == expected


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_later_targets_are_those_of_brute_force(count):
    generator = torch.Generator().manual_seed(count)
    targets = torch.randint(1, 6, (50, 7), generator=generator)  # one in five is BOS
    for row, end in enumerate(range(8)):
        targets[row, end:] = tg.IGNORE  # padding
    found = fr.later_targets(targets, count, BOS)
    assert len(found) == count
    for k, later in enumerate(found, 1):
        expected = torch.full_like(targets, tg.IGNORE)
        for row, t in itertools.product(range(50), range(7 - k)):
            if BOS not in targets[row, t : t + k + 1].tolist():
                expected[row, t] = targets[row, t + k]
        assert torch.equal(later, expected)


FALLS = {  # the values at 0, 1/3, 2/3 and 1 of the run
    (0, 0): [[1, 1, 1, 1]],
    (1, 0): [[1, 1, 1, 1], [0.5, 0.25, 0, 0]],
    (2, 0): [[1, 1, 1, 1], [0.5, 0.5, 0, 0], [0.25, 0, 0, 0]],
    (0, 0.25): [[1, 1, 1, 1], [0.25, 0.25, 0, 0]],
    (2, 0.4): [[1, 1, 1, 1], [0.5, 0.5, 0, 0], [0.25, 0, 0, 0], [0.4, 0.4, 0, 0]],
}


@pytest.mark.parametrize(("count", "prefix"), FALLS)
def test_weights_of_targets_fade_in_turn(count, prefix):
    hp = settings(MTP_TOKENS=count, PREFIX_WEIGHT=prefix)
    for done in np.linspace(0, 1, 61):
        thirds = [0, 1 / 3, 2 / 3, 1]
        expected = [np.interp(done, thirds, fall) for fall in FALLS[count, prefix]]
        np.testing.assert_allclose(fr.target_weights(hp, done), expected, atol=1e-12)


def test_of_three_later_targets_each_fades_in_two_ninths_of_the_run():
    hp = settings(MTP_TOKENS=3)
    for done in np.linspace(0, 1, 61):
        ninths = [0, 2 / 9, 4 / 9, 6 / 9]
        falls = [[0.5, 0.5, 0.5, 0], [0.25, 0.25, 0, 0], [0.125, 0, 0, 0]]
        expected = [1.0, *(np.interp(done, ninths, fall) for fall in falls)]
        np.testing.assert_allclose(fr.target_weights(hp, done), expected, atol=1e-12)


def separate_nll(x, weight, targets, cap):
    """Give the NLL of targets (B, T), 0 where they are IGNORE, by plain operations."""
    x = x * (x.square().mean(-1, keepdim=True) + 2.0**-23).rsqrt()
    shares = (cap * torch.tanh(x @ weight.T / cap)).log_softmax(-1)
    nll = -shares.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return nll * (targets != tg.IGNORE)


@pytest.mark.parametrize("at_once", [2**18, 23 * 3], ids=["whole", "parts"])
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5, 0.25), (1.0, 0.0, 0.3)], ids=str)
@pytest.mark.parametrize("tied", [1, 0])
def test_head_gives_the_weighted_sum_of_separate_nlls(tied, weights, at_once, monkeypatch):
    monkeypatch.setitem(tg.LOGITS, "cpu", at_once)
    hp = settings(TIE_EMBEDDINGS=tied, MTP_TOKENS=2)
    model = double_model(hp)
    matrix = model.tok_emb.weight if tied else model.lm_head.weight
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
    x, dy = draw(2, 8, 32, requires_grad=True), draw(2, 8)
    targets = torch.randint(0, 23, (2, 8, len(weights)), generator=generator)
    targets[0, :3] = targets[0, :3, :1]  # the same ones
    targets[0, 2:5, 1:] = tg.IGNORE
    targets[1, 6:] = tg.IGNORE
    how = torch.tensor(weights, dtype=torch.float64)
    parts = [separate_nll(x, matrix, each, hp.logit_softcap) for each in targets.unbind(-1)]
    expected = sum(w * part for w, part in zip(weights, parts, strict=True))
    nll = model.head(x, targets, how)
    torch.testing.assert_close(nll, expected)
    grads = [torch.autograd.grad((y * dy).sum(), [x, matrix]) for y in (nll, expected)]
    for ours, reference in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize(("done", "count"), [(0.0, 4), (0.2, 4), (0.5, 3), (0.9, 1)])
def test_training_learns_from_all_targets(done, count, compiles):
    """What a step's loss is of: next tokens, later ones and prefixes, by their weights.

    Those that have faded cost nothing; but a compiled graph has one number of targets.
    """
    hp = settings(MTP_TOKENS=2, PREFIX_WEIGHT=0.25)
    model = double_model(hp)
    table = [(7 * i + 5) % 23 if i % 3 == 0 else tg.IGNORE for i in range(23)]
    trainer = SimpleNamespace(
        run=SimpleNamespace(hp=hp, compile=compiles),
        prefixes=torch.tensor(table),
        target_weights=fr.target_weights(hp, done),
        forward=mock.Mock(wraps=model),
    )
    inputs, targets = tokens_with_bos(hp)
    targets[1, 5:] = tg.IGNORE
    known = [[table[i] if i >= 0 else tg.IGNORE for i in row] for row in targets.tolist()]
    goals = [targets, *fr.later_targets(targets, 2, BOS), torch.tensor(known)]
    with torch.no_grad():
        parts = [model(inputs, each) for each in goals]
        nll = fr.Trainer.learn_more(trainer, inputs, targets)
    expected = sum(w * part for w, part in zip(trainer.target_weights, parts, strict=True))
    torch.testing.assert_close(nll, expected, atol=1e-6, rtol=1e-6)  # the weights are fp32
    _, given, *_ = trainer.forward.call_args.args
    assert given.shape == (2, 8, 4 if compiles else count)


def mean_nll(folder, tokens, hp):
    """Score a run's weights with the baseline's model, in rows."""
    model = tg.GPT(hp)
    model.load_state_dict(load_weights(folder))
    size = hp.train_seq_len
    ends = range(0, len(tokens) - 1, size)
    rows = [torch.from_numpy(tokens[i : i + size + 1].astype(np.int64))[None] for i in ends]
    with torch.no_grad():
        return torch.cat([model(row[:, :-1], row[:, 1:])[0] for row in rows]).mean().item()


def test_no_score_is_of_other_targets(run, dataset, tiny_env):
    more = {"MTP_TOKENS": 2, "PREFIX_WEIGHT": 0.25, "VAL_LOSS_EVERY": 1, "ITERATIONS": 2}
    folder = run("more", **more)
    plain = run("plain", **more | {"MTP_TOKENS": 0, "PREFIX_WEIGHT": 0})
    first, *_, last = (event["val_loss"] for event in events(folder, "val"))
    assert first == events(plain, "val")[0]["val_loss"]
    losses = [events(each, "train")[0]["train_loss"] for each in (folder, plain)]
    assert losses[0] > 1.5 * losses[1]
    hp = resolve(tiny_env)
    assert last == pytest.approx(mean_nll(folder, dataset.val, hp), abs=2e-5)


# ---- everything together


@pytest.mark.parametrize("length", [8, 16])
@pytest.mark.parametrize("skips", ["gated", "mudd"])
def test_no_nll_depends_on_a_later_token(skips, length):
    hp = settings(**EVERYTHING | {"SKIPS": skips})
    model = double_model(hp)
    inputs, targets = tokens_with_bos(hp, length=length)
    with torch.no_grad():
        before = model(inputs, targets)
        for t, token in itertools.product(range(length), (BOS, 5, 22)):
            changed = inputs.clone()
            changed[0, t] = token
            after = model(changed, targets)
            torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-12, rtol=0)
            assert torch.equal(after[1], before[1])
            if token != inputs[0, t]:
                assert (after[0, t] - before[0, t]).abs() > 1e-9


DOCUMENTS = [5, 1, 3, 7, 8, 14, 2]  # 40 tokens: rows of 20, that the fifth one crosses


def test_isolated_documents_in_training_do_not_reach_each_other():
    hp = settings(**EVERYTHING, TRAIN_DOC_ISOLATED=1)
    model = double_model(hp)
    tokens = torch.from_numpy(document_stream(DOCUMENTS).astype(np.int64)).view(2, 20)
    documents = tg.cut(tokens.numpy() == BOS, hp.train_seq_len, torch.device("cpu"))
    offsets = documents.offsets.tolist()
    assert offsets == [0, 5, 6, 9, 16, 20, 24, 32, 38, 40]
    targets = torch.randint(2, 23, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens, targets, documents).flatten()
        for first, end in itertools.pairwise(offsets):
            changed = tokens.flatten().clone()
            changed[first:end] = (changed[first:end] + 3) % 21 + 2
            after = model(changed.view(2, 20), targets, documents).flatten()
            differ = (after - before).abs() > 1e-9
            assert differ.nonzero().flatten().tolist() == [*range(first, end)]


def test_a_document_has_the_same_nll_alone():
    hp = settings(**EVERYTHING, TRAIN_DOC_ISOLATED=1)
    model = double_model(hp)
    tokens = torch.from_numpy(document_stream(DOCUMENTS).astype(np.int64)).view(2, 20)
    documents = tg.cut(tokens.numpy() == BOS, hp.train_seq_len, torch.device("cpu"))
    targets = torch.randint(2, 23, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        packed = model(tokens, targets, documents).flatten()
        for first, end in itertools.pairwise(documents.offsets.tolist()):
            alone = model(tokens.view(1, -1)[:, first:end], targets.view(1, -1)[:, first:end])
            torch.testing.assert_close(packed[first:end], alone[0])


def score(model, tokens, hp):
    """Give the NLL of each token but the first."""
    val = SimpleNamespace(tokens=tokens, starts=[0, len(tokens)], text_bytes=100)
    return tg.score(model, val, tg.Run(hp))[0]


@pytest.mark.parametrize("isolated", [0, 1])
def test_no_score_depends_on_a_later_token_or_on_another_document(isolated):
    """Of documents that are shorter and longer than the context, in windows that overlap."""
    hp = settings(**EVERYTHING, EVAL_DOC_ISOLATED=isolated)
    model, lengths = double_model(hp), [6, 1, 40, 12, 30]
    tokens = document_stream(lengths)
    begins = np.cumsum([0, *lengths])
    before = score(model, tokens, hp)
    for t in (0, 4, 8, 20, 45, 48, 60, 80):
        changed = tokens.copy()
        changed[t] = (tokens[t] + 3) % 21 + 2 if tokens[t] != BOS else 5
        if tokens[t] == BOS and isolated:
            continue  # that would join two documents
        after = score(model, changed, hp)
        end = begins[np.searchsorted(begins, t, "right")]
        # The NLL of token i stands at i - 1; of the token itself it changes with what is asked.
        np.testing.assert_allclose(after[: max(t - 1, 0)], before[: max(t - 1, 0)], atol=1e-6)
        if isolated:
            np.testing.assert_allclose(after[end:], before[end:], atol=1e-6)
        assert np.abs(after - before).max() > 1e-3


def test_everything_but_isolation_compiles_as_one_graph():
    few = {"NUM_LAYERS": 3, "XSA_LAST_N": 3, "LOOP_LAST": 1, "LOOP_REPEATS": 1}
    hp = settings(**EVERYTHING | few)
    model = double_model(hp)
    assert model.visits == [0, 1, 1, 2]
    assert [*model.mudd] == ["2"]
    torch._dynamo.reset()  # graphs of other tests count towards its limit
    compiled = torch.compile(model, backend="aot_eager", dynamic=False, fullgraph=True)
    inputs, targets = tokens_with_bos(hp)
    goals = torch.stack([targets, *fr.later_targets(targets, 2, BOS)], -1)
    batch = (inputs, goals, None, torch.tensor([1.0, 0.5, 0.25]))
    found = []
    for forward in (model, compiled):
        model.zero_grad()
        nll = forward(*batch)
        nll.sum().backward()
        found.append([nll, *(p.grad.clone() for p in model.parameters())])
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager)
