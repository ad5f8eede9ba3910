"""The techniques of PR #369 in model and optimizers, each against a plain float64 reference."""

import copy
import functools
import itertools
import math

import conftest
import numpy as np
import pytest
import torch
from conftest import (
    events,
    load_weights,
    optimizers_of,
    random_model,
    resolve,
    run_main,
    shard_bytes,
    trainer_of,
)

import frontier
import train_gpt as tg

BOS = 1
TINY = {
    "VOCAB_SIZE": 23,
    "NUM_LAYERS": 3,
    "MODEL_DIM": 32,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 2,
    "TRAIN_SEQ_LEN": 8,
    "TRAIN_BATCH_TOKENS": 48,
    "VAL_BATCH_SIZE": 64,
    "ITERATIONS": 100,
    "WARMDOWN_ITERS": 10,
    "WARMUP_STEPS": 0,
    "MAX_WALLCLOCK_SECONDS": 0,
    "ROPE_BASE": 50.0,
    "LOGIT_SOFTCAP": 5.0,
    "DEVICE": "cpu",
    "DTYPE": "fp32",
    "COMPILE": 0,
}
LEAKY = {"MLP_ACT": "leaky_relu2", "MLP_LEAKY_SLOPE": 0.4}
BIGRAM = {"BIGRAM_BUCKETS": 11, "BIGRAM_DIM": 6}
STACK = {
    "XSA_LAST_N": 2,
    "SMEAR_GATE": 1,
    "LN_SCALE": 1,
    "ORTHO_INIT": 1,
    "MLP_MULT": 1.3,
    "ROPE_DIMS": 4,
    "ROPE_SCALING": "ntk",
    "EVAL_SEQ_LEN": 16,
    **BIGRAM,
    **LEAKY,
}

settings = functools.partial(resolve, TINY)


double_model = functools.partial(conftest.double_model, mean=0.3, deviation=0.7)


def tokens_with_bos(hp, rows=2, length=8, seed=0):
    """Inputs and targets (2, rows, length); every row has a BOS in its middle, not at its start."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(2, hp.vocab_size, (2, rows, length), generator=generator)
    batch[0, :, length // 2] = BOS
    return batch


# ---- the reference: one token and one head at a time, in float64


def normed(v):
    return v / math.sqrt(float(np.mean(v * v)) + 2.0**-23)


def frequencies(hp, length):
    """The angle by which each rotated pair turns from one position to the next."""
    r = hp.rope_dims or hp.model_dim // hp.num_heads
    s = max(1.0, length / hp.train_seq_len)
    result = []
    for i in range(r // 2):
        base, divisor = hp.rope_base, 1.0
        if hp.rope_scaling == "ntk":
            base = hp.rope_base * s ** (r / (r - 2))
        elif hp.rope_scaling == "linear":
            divisor = s
        elif hp.rope_scaling == "yarn":
            ramp = min(1.0, max(0.0, (2 * i / r - 0.25) / 0.75))
            divisor = 1 + ramp * (s - 1)
        result.append(base ** (-2 * i / r) / divisor)
    return result


def turned(v, position, angles):
    """Pair (i, i + r/2) of the first r channels, as a complex number, turned by -position·angle."""
    n, out = len(angles), v.copy()
    for i, angle in enumerate(angles):
        z = complex(v[i], v[i + n]) * complex(
            math.cos(position * angle), -math.sin(position * angle)
        )
        out[i], out[i + n] = z.real, z.imag
    return out


def attention(w, p, xs, hp, exclusive, angles):
    size, group = hp.model_dim // hp.num_heads, hp.num_heads // hp.num_kv_heads
    rows = []
    for t in range(len(xs)):
        outs = []
        for head in range(hp.num_heads):
            own, kv = slice(head * size, (head + 1) * size), head // group
            shared = slice(kv * size, (kv + 1) * size)
            q = turned(normed(w[p + "c_q.weight"][own] @ xs[t]), t, angles)
            q = q * w[p + "q_gain"][head].item()
            values = [w[p + "c_v.weight"][shared] @ x for x in xs[: t + 1]]
            keys = [normed(w[p + "c_k.weight"][shared] @ x) for x in xs[: t + 1]]
            scores = [q @ turned(k, s, angles) / math.sqrt(size) for s, k in enumerate(keys)]
            shares = np.exp(np.array(scores) - max(scores))
            y = sum(a * v for a, v in zip(shares / shares.sum(), values, strict=True))
            if exclusive:
                v = values[t] / np.linalg.norm(values[t])
                y = y - (y @ v) * v
            outs.append(y)
        rows.append(w[p + "proj.weight"] @ np.concatenate(outs))
    return rows


def activated(hp, h):
    """The MLP's activation of one number."""
    slope = hp.mlp_leaky_slope if hp.mlp_act == "leaky_relu2" else 0.0
    return h * h if h > 0 else (slope * h) ** 2


def embedded(w, hp, row):
    """What the blocks read: one vector for each token."""
    xs = []
    for t, token in enumerate(row):
        x = w["tok_emb.weight"][token]
        if hp.bigram_buckets:
            pair = hp.bigram_buckets - 1
            if t > 0 and token != BOS:
                pair = ((36313 * token) ^ (27191 * row[t - 1])) % (hp.bigram_buckets - 1)
            vector = w["bigram.expand.weight"] @ w["bigram.table.weight"][pair]
            x = x + w["bigram.bigram_scale"] * vector
        xs.append(normed(x))
    if not hp.smear_gate:
        return xs
    gate = 1 / (1 + np.exp(-w["smear"]))
    return [
        x if t == 0 or row[t] == BOS else (1 - gate) * x + gate * xs[t - 1]
        for t, x in enumerate(xs)
    ]


def reference_row(w, hp, row, goals, angles):
    """NLL of each target of one row."""
    half = hp.num_layers // 2
    xs = x0s = embedded(w, hp, row)
    outputs = []
    for i in range(hp.num_layers):
        p, scale = f"blocks.{i}.", 1 / math.sqrt(i + 1) if hp.ln_scale else 1.0
        if 0 <= i - half < half:
            skip = w["skip_weights"][i - half]
            xs = [x + skip * y for x, y in zip(xs, outputs[2 * half - 1 - i], strict=True)]
        m0, m1 = w[p + "resid_mix"]
        xs = [m0 * x + m1 * x0 for x, x0 in zip(xs, x0s, strict=True)]
        exclusive = hp.num_layers - i <= hp.xsa_last_n
        ys = attention(w, p + "attn.", [scale * normed(x) for x in xs], hp, exclusive, angles)
        xs = [x + w[p + "attn_scale"] * y for x, y in zip(xs, ys, strict=True)]
        hidden = [w[p + "fc.weight"] @ (scale * normed(x)) for x in xs]
        acts = [np.array([activated(hp, h) for h in hs]) for hs in hidden]
        mlp = [w[p + "proj.weight"] @ act for act in acts]
        xs = [x + w[p + "mlp_scale"] * y for x, y in zip(xs, mlp, strict=True)]
        outputs.append(xs)
    head = w["tok_emb.weight"] if hp.tie_embeddings else w["lm_head.weight"]
    cap = hp.logit_softcap
    logits = [cap * np.tanh(head @ normed(x) / cap) for x in xs]
    return [math.log(np.exp(z).sum()) - z[goal] for z, goal in zip(logits, goals, strict=True)]


def check_against_reference(length=8, **values):
    hp = settings(**values)
    model = double_model(hp)
    inputs, targets = tokens_with_bos(hp, length=length)
    with torch.no_grad():
        nll = model(inputs, targets).numpy()
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    angles = frequencies(hp, hp.eval_seq_len if length > hp.train_seq_len else length)
    pairs = zip(inputs.tolist(), targets.tolist(), strict=True)
    expected = np.array([reference_row(w, hp, row, goals, angles) for row, goals in pairs])
    assert expected.std() > 0.3  # the case is not a trivial one
    np.testing.assert_allclose(nll, expected, atol=5e-6)
    return nll


# ---- the forward pass as a whole

SINGLE = {
    "none": {},
    "xsa": {"XSA_LAST_N": 1},
    "xsa_everywhere": {"XSA_LAST_N": 3},
    "smear": {"SMEAR_GATE": 1},
    "bigram": BIGRAM,
    "ln_scale": {"LN_SCALE": 1},
    "leaky": LEAKY,
    "wide": {"MLP_MULT": 2.5},
    "narrow": {"MLP_MULT": 0.3},
    "partial_rope": {"ROPE_DIMS": 2},
    "stack": STACK,
    "stack_untied": {**STACK, "TIE_EMBEDDINGS": 0, "NUM_LAYERS": 4},
    "stack_of_one_kv_head": {**STACK, "NUM_KV_HEADS": 1},
    "stack_without_groups": {**STACK, "NUM_KV_HEADS": 4, "NUM_LAYERS": 2},
}


@pytest.mark.parametrize("name", SINGLE)
def test_nll_equals_reference_with(name):
    check_against_reference(**SINGLE[name])


@pytest.mark.parametrize("name", ["xsa", "xsa_everywhere", "ln_scale", "leaky", "partial_rope"])
def test_technique_without_weights_changes_the_nll(name):
    """So that the comparison above is of something."""
    plain, changed = check_against_reference(), check_against_reference(**SINGLE[name])
    assert np.abs(changed - plain).max() > 1e-3


def test_leaky_slope_of_zero_is_relu():
    plain = check_against_reference()
    zero = check_against_reference(MLP_ACT="leaky_relu2", MLP_LEAKY_SLOPE=0)
    np.testing.assert_array_equal(zero, plain)


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "yarn"])
@pytest.mark.parametrize("length", [8, 9, 24])
def test_nll_has_the_scaled_rotary_table_beyond_the_trained_length(scaling, length):
    check_against_reference(length, ROPE_SCALING=scaling, EVAL_SEQ_LEN=24)


def test_context_of_validation_may_be_shorter_than_the_trained_one():
    check_against_reference(5, ROPE_SCALING="ntk", EVAL_SEQ_LEN=5)


# ---- off by default


def baseline_shapes(hp):
    """Names and shapes of the parameters of the baseline, as published, tied."""
    D, V, L = hp.model_dim, hp.vocab_size, hp.num_layers
    kv = D // hp.num_heads * hp.num_kv_heads
    shapes = {"tok_emb.weight": (V, D), "skip_weights": (L // 2, D)}
    for i in range(L):
        block = {"attn.c_q.weight": (D, D), "attn.proj.weight": (D, D), "attn.c_k.weight": (kv, D)}
        block |= {"attn.c_v.weight": (kv, D), "attn.q_gain": (hp.num_heads, 1, 1)}
        block |= {"fc.weight": (2 * D, D), "proj.weight": (D, 2 * D), "resid_mix": (2, D)}
        block |= {"attn_scale": (D,), "mlp_scale": (D,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def shapes_of(model):
    return {name: tuple(p.shape) for name, p in model.state_dict().items()}


def test_with_everything_off_the_parameters_are_the_baselines():
    hp = settings()
    assert shapes_of(tg.build_model(hp)) == baseline_shapes(hp)


def test_with_everything_off_the_initial_values_are_the_baselines():
    """The generator is asked for the same numbers in the same order as before the techniques."""
    hp = settings()
    torch.manual_seed(7)
    model = tg.build_model(hp).state_dict()
    torch.manual_seed(7)
    expected, D, kv = {}, hp.model_dim, hp.model_dim // 2
    torch.nn.Embedding(hp.vocab_size, D)
    for i in range(hp.num_layers):
        sizes = {"attn.c_q": (D, D), "attn.proj": (D, D), "attn.c_k": (D, kv), "attn.c_v": (D, kv)}
        for name, size in {**sizes, "fc": (D, 2 * D), "proj": (2 * D, D)}.items():
            weight = torch.nn.Linear(*size, bias=False).weight.detach()
            expected[f"blocks.{i}.{name}.weight"] = weight * (not name.endswith("proj"))
    expected["tok_emb.weight"] = torch.empty(hp.vocab_size, D).normal_(std=hp.tied_embed_init_std)
    for name, weight in expected.items():
        assert torch.equal(model[name], weight), name


NEW = {
    "SMEAR_GATE": {"smear": (32,)},
    "BIGRAM_BUCKETS": {
        "bigram.table.weight": (11, 6),
        "bigram.expand.weight": (32, 6),
        "bigram.bigram_scale": (),
    },
}


@pytest.mark.parametrize("feature", [*NEW, "both"])
def test_parameters_of_a_feature_exist_only_when_it_is_on(feature):
    on = {"SMEAR_GATE": {"SMEAR_GATE": 1}, "BIGRAM_BUCKETS": BIGRAM}
    chosen = [*NEW] if feature == "both" else [feature]
    hp = settings(**{name: value for f in chosen for name, value in on[f].items()})
    added = {name: shape for f in chosen for name, shape in NEW[f].items()}
    assert shapes_of(tg.build_model(hp)) == baseline_shapes(hp) | added


def test_other_techniques_add_no_parameters():
    values = {"XSA_LAST_N": 2, "LN_SCALE": 1, "ROPE_DIMS": 4, "ROPE_SCALING": "ntk", **LEAKY}
    values |= {"TRAIN_DOC_ISOLATED": 1, "EVAL_DOC_ISOLATED": 1}
    hp = settings(**values, EVAL_SEQ_LEN=16, ORTHO_INIT=1)
    assert shapes_of(tg.build_model(hp)) == baseline_shapes(hp)


@pytest.mark.parametrize(("mult", "hidden"), [(2, 64), (2.5, 80), (1.3, 41), (0.05, 1)])
def test_width_of_the_mlp_is_its_multiple_rounded_down(mult, hidden):
    model = tg.build_model(settings(MLP_MULT=mult))
    assert {block.fc.weight.shape for block in model.blocks} == {(hidden, 32)}
    assert {block.proj.weight.shape for block in model.blocks} == {(32, hidden)}


def test_features_start_neutral_or_as_recorded():
    model = tg.build_model(settings(**STACK))
    assert not model.bigram.table.weight.any()  # so that it starts silent
    assert model.bigram.bigram_scale.item() == pytest.approx(0.05)
    assert model.bigram.expand.weight.all()
    assert not model.smear.any()  # a gate of a half


# ---- exclusive self-attention


def attention_parts(hp):
    """For each layer, the heads' outputs (B, T, H, Dh), and the tokens' own values for each."""
    model, outs, values = double_model(hp), [], []
    size = hp.model_dim // hp.num_heads
    for block in model.blocks:
        block.attn.proj.register_forward_pre_hook(lambda _, args: outs.append(args[0]))
        block.attn.c_v.register_forward_hook(lambda _, args, out: values.append(out))
    with torch.no_grad():
        model(*tokens_with_bos(hp))
    outs = [y.unflatten(-1, (hp.num_heads, size)) for y in outs]
    values = [v.unflatten(-1, (hp.num_kv_heads, size)) for v in values]
    return outs, [v.repeat_interleave(hp.num_heads // hp.num_kv_heads, 2) for v in values]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_xsa_output_is_orthogonal_to_the_tokens_own_value_in_the_last_layers(last, kv_heads):
    outs, values = attention_parts(settings(XSA_LAST_N=last, NUM_KV_HEADS=kv_heads))
    along = [(y * v).sum(-1).abs().max().item() for y, v in zip(outs, values, strict=True)]
    assert all(dot < 1e-12 for dot in along[3 - last :])
    assert all(dot > 0.1 for dot in along[: 3 - last])
    for y in outs[3 - last :]:
        assert y[:, 1:].abs().max() > 0.1  # something is left


def test_xsa_takes_everything_from_the_first_position():
    outs, _ = attention_parts(settings(XSA_LAST_N=3))
    assert all(y[:, 0].abs().max() < 1e-12 for y in outs)


def test_xsa_bears_a_value_of_zero():
    model = double_model(settings(XSA_LAST_N=3))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.c_v.weight.zero_()
    nll = model(*tokens_with_bos(settings()))
    nll.sum().backward()
    assert nll.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---- rotary tables


TABLES = [*itertools.product(["none", "linear", "yarn"], [0, 2, 4, 6]), ("ntk", 0), ("ntk", 4)]


@pytest.mark.parametrize(("scaling", "dims"), TABLES)
@pytest.mark.parametrize("length", [9, 16, 40])
def test_rotary_table_equals_its_closed_form(scaling, dims, length):
    hp = settings(ROPE_SCALING=scaling, ROPE_DIMS=dims, ROPE_BASE=10000.0)
    angles = frequencies(hp, length)
    assert len(angles) == (dims or 8) // 2
    cos = [2 * [math.cos(t * angle) for angle in angles] for t in range(length)]
    sin = [
        [math.sin(t * a) for a in angles] + [-math.sin(t * a) for a in angles]
        for t in range(length)
    ]
    table = tg.rotary_table(hp, length)
    np.testing.assert_allclose(table.numpy(), [cos, sin], atol=1e-13)


def turn_per_position(hp, length):
    """The frequencies in a table, from the angles of position 1."""
    cos, sin = tg.rotary_table(hp, length)[:, 1].chunk(2, dim=1)[0]
    return torch.atan2(sin, cos).tolist()


def test_scaled_frequencies_of_known_settings():
    """Four times the trained length: r = 8, base 256, frequencies 1, 1/4, 1/16, 1/64."""
    known = {
        "none": [1, 1 / 4, 1 / 16, 1 / 64],
        "linear": [1 / 4, 1 / 16, 1 / 64, 1 / 256],
        "ntk": [1, 4 ** (-4 / 3), 4 ** (-8 / 3), 1 / 256],  # the slowest as in linear
        "yarn": [1, 1 / 4, 1 / 16 / 2, 1 / 64 / 3],  # ramp 0, 0, 1/3, 2/3
    }
    for scaling, expected in known.items():
        hp = settings(ROPE_SCALING=scaling, ROPE_BASE=256)
        assert turn_per_position(hp, 32) == pytest.approx(expected, rel=1e-12), scaling


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn"])
@pytest.mark.parametrize("length", [1, 5, 8])
def test_rotary_table_is_unscaled_up_to_the_trained_length(scaling, length):
    scaled = tg.rotary_table(settings(ROPE_SCALING=scaling), length)
    assert torch.equal(scaled, tg.rotary_table(settings(), length))


def test_model_takes_the_trained_table_for_trained_lengths():
    plain, scaled = (
        double_model(settings(ROPE_SCALING=scaling, EVAL_SEQ_LEN=24)) for scaling in ("none", "ntk")
    )
    inputs, targets = tokens_with_bos(settings(), length=24)
    with torch.no_grad():
        for length in (1, 7, 8, 9, 24):
            pair = inputs[:, :length], targets[:, :length]
            assert torch.equal(plain(*pair), scaled(*pair)) == (length <= 8), length


def test_tables_are_no_part_of_the_weights():
    assert not [
        name for name in tg.build_model(settings(**STACK)).state_dict() if name in ("short", "long")
    ]


def test_rotation_leaves_other_channels_alone():
    x = torch.randn(2, 8, 3, 10, generator=torch.Generator().manual_seed(0)).double()
    y = tg.rotate(x, tg.rotary_table(settings(ROPE_DIMS=4), 8))
    assert torch.equal(y[..., 4:], x[..., 4:])
    assert not torch.isclose(y[:, 1:, :, :4], x[:, 1:, :, :4]).all(-1).any()
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("dims", [0, 4])
def test_products_depend_on_relative_positions_only(dims):
    table = tg.rotary_table(settings(ROPE_DIMS=dims), 12)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).double()
    turned_q, turned_k = (tg.rotate(v.expand(1, 12, 1, 8), table)[0, :, 0] for v in (q, k))
    products = turned_q @ turned_k.T
    for distance in range(12):
        line = products.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), atol=1e-12, rtol=0)
    assert products[0].std() > 0.1


# ---- bigrams and smearing


@pytest.mark.parametrize("buckets", [2, 11, 4096])
def test_bigram_rows_are_those_of_python_integers(buckets):
    hp = settings(BIGRAM_BUCKETS=buckets, BIGRAM_DIM=32, VOCAB_SIZE=60000)
    bigram = frontier.BigramHash(hp).double()
    with torch.no_grad():  # each row holds its own number
        bigram.table.weight.copy_(torch.arange(buckets)[:, None].expand(-1, 32))
        bigram.expand.weight.copy_(torch.eye(32))
        bigram.bigram_scale.fill_(1.0)
    rows = torch.randint(2, 60000, (3, 50), generator=torch.Generator().manual_seed(0))
    rows[0, 10] = rows[1, 20] = rows[1, 21] = BOS
    starts = rows == BOS
    starts[:, 0] = True
    found = bigram(rows, starts)[..., 0].long().tolist()
    for row, indices in zip(rows.tolist(), found, strict=True):
        expected = [buckets - 1]
        for before, token in itertools.pairwise(row):
            mixed = (36313 * token) ^ (27191 * before)
            expected.append(buckets - 1 if token == BOS else mixed % (buckets - 1))
        assert indices == expected


def features_only(hp):
    """A model whose attention adds nothing: what mixes positions is smearing and bigrams."""
    model = double_model(hp)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
    return model


@pytest.mark.parametrize(
    ("values", "reach"),
    [({"SMEAR_GATE": 1}, 1), (BIGRAM, 1), (STACK, 2)],  # with both, a pair's vector is smeared
    ids=["smear", "bigram", "stack"],
)
def test_smear_and_bigram_take_the_token_before_but_nothing_over_a_bos(values, reach):
    hp = settings(**values)
    model = features_only(hp)
    inputs, targets = tokens_with_bos(hp, rows=1, length=8)  # BOS at 4
    with torch.no_grad():
        before = model(inputs, targets)
        for t in range(8):
            reached = set()
            for other in range(2, hp.vocab_size):
                changed = inputs.clone()
                changed[0, t] = other
                differ = model(changed, targets) != before
                reached |= set(differ[0].nonzero().flatten().tolist())
            document = range(4) if t < 4 else range(4, 8)
            assert reached == {*range(t, t + reach + 1)} & {*document}, t


def test_smear_gate_equals_its_formula():
    """Seen in the input of the first block, for one gate of a quarter and one of nearly one."""
    hp = settings(SMEAR_GATE=1)
    model, seen = double_model(hp), []
    with torch.no_grad():
        model.smear.fill_(math.log(1 / 3))
        model.smear[0] = 30.0
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    inputs, targets = tokens_with_bos(hp, rows=1)
    with torch.no_grad():
        model(inputs, targets)
    (x, x0, *_), e = seen[0], tg.rms_norm(model.tok_emb(inputs))
    assert torch.equal(x, x0)
    torch.testing.assert_close(x[:, [0, 4]], e[:, [0, 4]])
    for t in (1, 2, 3, 5, 6, 7):
        torch.testing.assert_close(x[:, t, 1:], 0.75 * e[:, t, 1:] + 0.25 * e[:, t - 1, 1:])
        torch.testing.assert_close(x[:, t, 0], e[:, t - 1, 0])


# ---- properties of the whole stack


@pytest.mark.parametrize("length", [8, 16])
def test_nll_depends_on_no_later_token_with_everything_on(length):
    hp = settings(**{**STACK, "XSA_LAST_N": 3, "NUM_LAYERS": 4})
    model = double_model(hp)
    inputs, targets = tokens_with_bos(hp, rows=1, length=length)
    with torch.no_grad():
        before = model(inputs, targets)
        for t, token in itertools.product(range(length - 1), (BOS, 5, 22)):
            changed = inputs.clone()
            changed[0, t + 1 :] = token
            after = model(changed, targets)
            torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], atol=1e-6, rtol=0)
            assert (after[:, t + 1 :] != before[:, t + 1 :]).any()


def test_every_parameter_gets_a_gradient_with_everything_on():
    hp = settings(**{**STACK, "TIE_EMBEDDINGS": 0, "NUM_LAYERS": 5})
    model = random_model(hp)
    model(*tokens_with_bos(hp, rows=8)).sum().backward()
    assert [name for name, p in model.named_parameters() if not p.grad.abs().max() > 0] == []


def test_bf16_stack_is_close_to_fp32():
    hp = settings(**{**STACK, "XSA_LAST_N": 3})
    exact = random_model(hp)
    rounded = tg.build_model(hp, torch.bfloat16)
    rounded.load_state_dict(exact.state_dict())
    batch = tokens_with_bos(hp, rows=16)
    with torch.no_grad():
        assert 0 < (rounded(*batch) - exact(*batch)).abs().mean() < 0.08


def test_tables_serve_scoring_and_training_in_turn_when_compiled():
    """The graphs of both, and of all lengths, in whatever order they are asked for."""
    hp = settings(**STACK)
    model = random_model(hp)
    torch._dynamo.reset()  # graphs of other tests count towards its limit
    compiled = torch.compile(model, backend="eager", dynamic=False, fullgraph=True)
    for length in (16, 8, 16):
        batch = tokens_with_bos(hp, length=length)
        with torch.no_grad():
            expected = model(*batch)
            torch.testing.assert_close(compiled(*batch), expected)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(*batch), expected)
        model.zero_grad()
        compiled(*batch).sum().backward()
        assert model.tok_emb.weight.grad.abs().max() > 0


# ---- initialization


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("mult", [0.5, 2.5])
def test_ortho_init_gives_orthogonal_matrices(layers, mult):
    hp = settings(ORTHO_INIT=1, NUM_LAYERS=layers, MLP_MULT=mult)
    for name, w in tg.build_model(hp).named_parameters():
        if name.startswith("blocks.") and w.ndim == 2 and name.endswith("weight"):
            gain = 1 / math.sqrt(2 * layers) if "proj" in name else 1.0
            narrow = w if w.size(0) <= w.size(1) else w.T
            expected = gain**2 * torch.eye(len(narrow))
            torch.testing.assert_close(narrow @ narrow.T, expected, atol=2e-6, rtol=0)


def test_ortho_init_touches_nothing_else():
    hp = settings(ORTHO_INIT=1, TIE_EMBEDDINGS=0, VOCAB_SIZE=1024, BIGRAM_BUCKETS=64)
    model = tg.build_model(hp)
    assert model.tok_emb.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert not model.lm_head.weight.any()
    assert not model.bigram.table.weight.any()
    for block in model.blocks:
        assert (block.resid_mix[0] == 1).all()
        assert not block.resid_mix[1].any()


def test_ortho_init_draws_each_matrix_anew():
    weights = [block.attn.c_q.weight for block in tg.build_model(settings(ORTHO_INIT=1)).blocks]
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(weights, 2))


# ---- the artifact


def test_every_feature_survives_the_artifact(dataset, tmp_path):
    values = {**STACK, "VOCAB_SIZE": 512, "TIE_EMBEDDINGS": 0, "BIGRAM_BUCKETS": 2048}
    hp = settings(**{**values, "BIGRAM_DIM": 48}, TOKENIZER_PATH=dataset.tokenizer)
    model = random_model(hp)
    path = tmp_path / "all.artifact"
    path.write_bytes(tg.pack_artifact(model.state_dict(), hp))
    loaded_hp, weights = tg.load_artifact(path, settings(TOKENIZER_PATH=dataset.tokenizer))
    # What is asked of validation is the user's; the rest is the model's.
    assert [getattr(loaded_hp, n.lower()) for n in tg.MODEL_SETTINGS] == [
        getattr(hp, n.lower()) for n in tg.MODEL_SETTINGS
    ]
    assert {name: w.shape for name, w in weights.items()} == {
        name: w.shape for name, w in model.state_dict().items()
    }
    for name, w in model.state_dict().items():
        if name in ("smear", "bigram.bigram_scale"):
            assert torch.equal(weights[name], w)
        torch.testing.assert_close(weights[name], w, atol=0.02, rtol=2e-3, msg=name)
    again = tg.build_model(loaded_hp)
    again.load_state_dict(weights)
    batch = tokens_with_bos(hp, length=16)
    with torch.no_grad():
        assert (again(*batch) - model(*batch)).abs().mean() < 0.05


# ---- optimizers

RATES = {
    "EMBED_LR": 0.1,
    "HEAD_LR": 0.2,
    "TIED_EMBED_LR": 0.3,
    "MATRIX_LR": 0.4,
    "SCALAR_LR": 0.5,
    "MUON_WD": 0.04,
    "ADAM_WD": 0.05,
    "EMBED_WD": 0.06,
}


def expected_group(name, tied):
    """Optimizer, learning rate and decay of a parameter, by its part in the model."""
    if name in ("tok_emb.weight", "bigram.table.weight"):
        return "AdamW", 0.3 if tied else 0.1, 0.06
    if name == "lm_head.weight":
        return "AdamW", 0.2, 0.05
    if name.split(".")[-1] == "weight":  # of the blocks, and the bigrams' expansion
        return "Muon", 0.4, 0.04
    return "AdamW", 0.5, 0.05


@pytest.mark.parametrize("tied", [0, 1])
@pytest.mark.parametrize("values", [{}, STACK], ids=["baseline", "stack"])
def test_every_parameter_is_in_one_group_with_its_rate_and_decay(values, tied):
    hp = settings(**{**values, **RATES, "TIE_EMBEDDINGS": tied})
    model, found = tg.build_model(hp), {}
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers_of(model, hp):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[p] not in found
                kind = type(optimizer).__name__
                found[names[p]] = kind, group["lr"], group["weight_decay"]
    assert found == {name: expected_group(name, tied) for name in names.values()}


def test_decay_is_off_by_default():
    hp = settings(**STACK)
    for optimizer in optimizers_of(tg.build_model(hp), hp):
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


DECAYS = {"MUON_WD": 0.3, "ADAM_WD": 0.2, "EMBED_WD": 0.1, "ADAM_EPS": 1e-3}


@pytest.mark.parametrize(
    ("name", "decay", "lr"),
    [
        ("tok_emb.weight", 0.1, 0.05),
        ("bigram.table.weight", 0.1, 0.05),
        ("smear", 0.2, 0.04),
        ("blocks.1.mlp_scale", 0.2, 0.04),
    ],
)
def test_adam_decays_the_weight_itself(name, decay, lr):
    """w ← w - lr·decay·w - lr·m̂/(√v̂ + ε), and the decay has no part in m and v."""
    hp = settings(SMEAR_GATE=1, **BIGRAM, **DECAYS)
    model = random_model(hp)
    adam, _ = optimizers_of(model, hp)
    p = dict(model.named_parameters())[name]
    w = p.detach().double().numpy().copy()
    m, v, rng = np.zeros_like(w), np.zeros_like(w), np.random.default_rng(0)
    for step in range(1, 5):
        g = rng.normal(size=w.shape)
        for other in model.parameters():
            other.grad = torch.zeros_like(other)
        p.grad = torch.from_numpy(g).float()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = (1 - lr * decay) * w
        w -= lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-3)
        adam.step()
        np.testing.assert_allclose(p.detach().numpy(), w, atol=2e-6)


def test_muon_decays_the_weight_itself():
    """Between two models with the same gradients the decay's part is all that differs."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(3, 4, 6))
    moves = {}
    rounds = {"rounds": [tg.NEWTON_SCHULZ] * 5, "dtype": torch.float64}
    for decay in (0.0, 0.3):
        params = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in start]
        group = {"params": params, "weight_decay": decay}
        muon = tg.Muon([group | {"lr": 0.1, "momentum": 0.9}], rounds)
        weights = []
        for step in range(3):
            generator = np.random.default_rng(step)
            muon.param_groups[0]["lr"] = 0.1 / (step + 1)
            for p in params:
                p.grad = torch.from_numpy(generator.normal(size=p.shape))
            muon.step()
            weights.append(np.stack([p.detach().numpy().copy() for p in params]))
        moves[decay] = weights
    expected = start
    updates = np.diff(np.stack([start, *moves[0.0]]), axis=0)
    for step, update in enumerate(updates):
        expected = (1 - 0.1 / (step + 1) * 0.3) * expected + update
        np.testing.assert_allclose(moves[0.3][step], expected, atol=1e-12)


# ---- schedule and average


@pytest.mark.parametrize(
    ("values", "step", "elapsed", "expected"),
    [
        ({}, 0, 0.0, 1.0),
        ({}, 90, 0.0, 1.0),
        ({}, 95, 0.0, 0.6),  # half way from 1 to 0.2
        ({}, 99, 0.0, 0.28),
        ({}, 100, 0.0, 0.2),
        ({"MAX_WALLCLOCK_SECONDS": 50, "ITERATIONS": 1000}, 96, 48.0, 0.52),
        ({"MAX_WALLCLOCK_SECONDS": 50, "ITERATIONS": 1000}, 101, 50.5, 0.2),
        ({"WARMDOWN_FRAC": 0.5}, 75, 0.0, 0.6),
        ({"WARMDOWN_ITERS": 0}, 99, 0.0, 1.0),
        ({"FINAL_LR_FRAC": 1.0}, 99, 0.0, 1.0),
        ({"FINAL_LR_FRAC": 0.0}, 95, 0.0, 0.5),
    ],
)
def test_rates_end_at_the_final_fraction(values, step, elapsed, expected):
    hp = settings(**{"FINAL_LR_FRAC": 0.2, **values})
    assert tg.lr_scale(hp, step, elapsed) == pytest.approx(expected, abs=1e-12)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """One train shard of 500 tokens below 23."""
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.random.default_rng(0).integers(1, 23, size=500)
    (folder / "fineweb_train_000000.bin").write_bytes(shard_bytes(tokens))
    return folder


def make_trainer(folder, **values):
    """A trainer of a random model on one rank."""
    hp = settings(DATA_PATH=folder, **values)
    run, model = tg.Run(hp), random_model(hp)
    return trainer_of(model, run)


def weights_of(trainer):
    return [p.detach().double().clone() for p in trainer.model.parameters()]


def test_average_equals_its_definition(data_folder):
    """e₀ = w₀, then e ← d·e + (1 - d)·w after each step, in float64."""
    trainer = make_trainer(data_folder, EMA_DECAY=0.7, **STACK)
    expected = weights_of(trainer)
    for step in range(5):
        trainer.step(step, 0.0)
        weights = weights_of(trainer)
        expected = [0.7 * e + 0.3 * w for e, w in zip(expected, weights, strict=True)]
        averages = [trainer.within(name, trainer.average) for name in trainer.params]
        for e, average in zip(expected, averages, strict=True):
            assert average.dtype == torch.float32
            torch.testing.assert_close(average.double(), e, atol=1e-6, rtol=0)
    away = [(e - w).abs().max() for e, w in zip(expected, weights, strict=True)]
    assert min(away) > 1e-5


def test_average_does_not_change_the_training(data_folder):
    ends = []
    for decay in (0.0, 0.9):
        trainer = make_trainer(data_folder, EMA_DECAY=decay)
        losses = [trainer.step(step, 0.0).item() for step in range(3)]
        ends.append((losses, [w.tolist() for w in weights_of(trainer)]))
    assert ends[0] == ends[1]


def test_priming_leaves_no_trace_in_the_average(data_folder):
    averages = []
    for steps in (0, 3):
        trainer = make_trainer(data_folder, EMA_DECAY=0.9, WARMUP_STEPS=steps)
        trainer.prime()
        first = copy.deepcopy(trainer.average)
        trainer.step(0, 0.0)
        averages.append([*first, *trainer.average])
    assert all(torch.equal(a, b) for a, b in zip(*averages, strict=True))


def test_without_decay_nothing_is_averaged(data_folder):
    assert make_trainer(data_folder).average is None


def test_average_is_what_a_run_exports_and_validates(tiny_env, tmp_path):
    """Against the raw weights after 0, 1, 2 and 3 steps, from runs that end there."""
    env = tiny_env | {"OUT_DIR": str(tmp_path), "WARMDOWN_ITERS": "0", "ADAM_EPS": "1e-4"}
    trajectory = []
    for steps in range(4):
        run_main({**env, "RUN_ID": f"raw{steps}", "ITERATIONS": str(steps)})
        trajectory.append(load_weights(tmp_path / f"raw{steps}"))
    averaged = {"EMA_DECAY": "0.6", "WARMUP_STEPS": "2", "VAL_LOSS_EVERY": "1"}
    run_main({**env, **averaged, "RUN_ID": "ema", "ITERATIONS": "3"})
    exported = load_weights(tmp_path / "ema")
    for name, start in trajectory[0].items():
        e = start.double()
        for weights in trajectory[1:]:
            e = 0.6 * e + 0.4 * weights[name].double()
        torch.testing.assert_close(exported[name].double(), e, atol=1e-6, rtol=0)
    raw = [
        next(e for e in events(tmp_path / f"raw{steps}") if e["event"] == "val")
        for steps in range(4)
    ]
    losses = [e["val_loss"] for e in events(tmp_path / "ema") if e["event"] == "val"]
    assert losses[:3] == pytest.approx([e["val_loss"] for e in raw[:3]], abs=1e-6)
    assert abs(losses[3] - raw[3]["val_loss"]) > 1e-4
    # The weights that were exported give the loss that was logged, and so does the artifact nearly.
    hp = tg.load_settings(env, check_places=False)
    model, run = tg.build_model(hp), tg.Run(hp)
    model.load_state_dict(exported)
    score = tg.score(model, tg.Validation(run), run)[1]
    assert losses[3] == pytest.approx(score["val_loss"], abs=1e-6)
    final = next(e for e in events(tmp_path / "ema") if e["event"] == "final")
    assert final["val_loss"] == pytest.approx(losses[3], abs=0.01)
