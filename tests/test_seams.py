"""How techniques come in: one at each seam of the model, without an edit of train_gpt.py."""

import conftest
import pytest
import torch
import torch.nn.functional as F
from conftest import packed_operator, resolve
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_gpt as tg

BOS = 1
CPU = torch.device("cpu")
TINY = {
    "VOCAB_SIZE": 23,
    "NUM_LAYERS": 3,
    "MODEL_DIM": 32,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 2,
    "TRAIN_SEQ_LEN": 12,
    "TRAIN_BATCH_TOKENS": 48,
    "LOGIT_SOFTCAP": 5.0,
    "DEVICE": "cpu",
    "DTYPE": "fp32",
}


def settings(**values):
    """Tiny settings, changed by `values`."""
    return resolve(TINY, **values)


def double_model(kind=tg.build_model, **values):
    """A model of `kind` with these settings."""
    return conftest.double_model(settings(**values), mean=0.3, deviation=0.7, kind=kind)


def tokens(rows=2, length=12, seed=0):
    """Inputs and targets (2, rows, length) without a BOS."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(2, 23, (2, rows, length), generator=random)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-6, rtol=0)  # logits are fp32


def compiled(model):
    """The model as the compiler sees it, in one graph."""
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", dynamic=False, fullgraph=True)


# ---- attention: a gate for the output of each head


class Gated(tg.Attention):
    """Attention whose heads are gated by the first channels of the token (arXiv 2505.06708)."""

    def __init__(self, hp, layer):
        super().__init__(hp, layer)
        self.head_gates = tg.Matrix(12, hp.num_heads)

    def heads(self, x, rotary, last, documents):
        some = tg.tail(x, last, dim=1)[..., :12]
        gates = torch.sigmoid(self.head_gates(some)).mT.unsqueeze(-1)
        return gates * super().heads(x, rotary, last, documents)


@pytest.fixture
def gated(monkeypatch):
    """Let GPT have Gated for its attention."""
    table = tg.parameter_table
    row = tg.Row("*.attn.head_gates.weight", "adam", 0.02, 0.0, 0.95, 0.0, 8)
    monkeypatch.setattr(tg, "parameter_table", lambda hp: [row, *table(hp)])
    monkeypatch.setattr(tg.Block, "Attention", Gated)


def test_a_gate_of_zero_halves_the_output_of_attention(gated, monkeypatch):
    model, batch = double_model(), tokens()
    plain = {name: p for name, p in model.state_dict().items() if "head_gates" not in name}
    with torch.no_grad():
        for block in model.blocks:
            assert block.attn.head_gates.weight.shape == (4, 12)
            block.attn.head_gates.weight.zero_()
        half = model(*batch)
    monkeypatch.setattr(tg.Block, "Attention", tg.Attention)
    other = double_model()
    other.load_state_dict(plain)
    with torch.no_grad():
        assert (other(*batch) - half).abs().max() > 1e-3
        for block in other.blocks:
            block.attn_scale *= 0.5
        close(other(*batch), half)


def test_a_gate_is_learned_and_compiled(gated):
    model, batch = double_model(), tokens()
    with torch.no_grad():
        close(compiled(model)(*batch), model(*batch))
    compiled(model)(*batch).sum().backward()
    assert all(block.attn.head_gates.weight.grad.abs().max() > 0 for block in model.blocks)
    names = dict(model.named_parameters())
    adam = tg.build_optimizers(names, tg.Run(settings()))[0]
    (group,) = (group for group in adam.param_groups if group["lr"] == 0.02)
    assert len(group["params"]) == 3


# ---- head: an auxiliary target


class NextNext(tg.GPT):
    """A model that learns from the next token, and half as much from the one after it."""

    def forward(self, inputs, targets, documents=None):
        if not self.training:
            return super().forward(inputs, targets, documents)
        later = F.pad(targets[:, 1:], (0, 1), value=tg.IGNORE)
        both = torch.stack((targets, later), dim=-1)
        return super().forward(inputs, both, documents, torch.tensor([1.0, 0.5]))


def test_an_auxiliary_target_is_of_the_same_logits():
    model, plain, (inputs, targets) = double_model(NextNext), double_model(), tokens()
    later = torch.cat((targets[:, 1:], targets[:, :1]), 1)
    with torch.no_grad():
        nll, auxiliary = plain(inputs, targets), plain(inputs, later)
        auxiliary[:, -1] = 0
        close(model(inputs, targets), nll + 0.5 * auxiliary)
        close(compiled(model)(inputs, targets), nll + 0.5 * auxiliary)
        assert torch.equal(model.eval()(inputs, targets), nll)


# ---- trunk: a block that is visited twice


class Twice(tg.GPT):
    """A model whose middle block comes twice."""

    def build(self, hp):
        self.visits = [0, 1, 1, 2]
        super().build(hp)


def test_a_block_visited_twice_is_two_blocks_of_the_same_weights():
    model, deeper, batch = double_model(Twice), double_model(NUM_LAYERS=4), tokens()
    weights = model.state_dict()
    for name in list(weights):
        if name.startswith("blocks.2."):
            weights[name.replace("2", "3", 1)] = weights[name]
            weights[name] = weights[name.replace("2", "1", 1)]
    deeper.load_state_dict(weights)
    with torch.no_grad():
        close(model(*batch), deeper(*batch))
        close(compiled(model)(*batch), deeper(*batch))
    model(*batch).sum().backward()
    deeper(*batch).sum().backward()
    once, again = (deeper.blocks[i].fc.weight.grad for i in (1, 2))
    close(model.blocks[1].fc.weight.grad, once + again)


def test_skips_follow_the_visits_of_a_call():
    """The second half of the visits is fed by the first, the last one first."""
    model, (inputs, _) = double_model(Twice), tokens()
    last, first, middle = (model.blocks[i] for i in (2, 0, 1))
    s, rest = model.skip_weights, (model.short, 12, None)
    with torch.no_grad():
        x0 = model.embed(inputs)
        a = last(x0, x0, *rest)
        b = first(a, x0, *rest)
        c = middle(b + s[0] * b, x0, *rest)
        d = first(c + s[1] * a, x0, *rest)
        assert torch.equal(model.trunk(x0, [2, 0, 1, 0], 12), d)
        assert torch.equal(model.trunk(x0, [2], 12), a)


# ---- Matrix: a low-rank delta, by a hook


def low_rank(matrix, rows=None, seed=0):
    """Random A and B for a matrix, the same for all sequences, or one for each of `rows`."""
    random = torch.Generator().manual_seed(seed)
    many = () if rows is None else (rows,)
    shapes = (3, matrix.in_features), (matrix.out_features, 3)
    made = [torch.randn(*many, *s, generator=random).double() / 8 for s in shapes]
    return tuple(x.requires_grad_() for x in made)


def add_delta(matrix, a, b):
    """Let a matrix W be W + BA; what is returned can remove that."""

    def add(matrix, given, y):
        x, *gains = given
        low = x @ a.mT @ b.mT
        return y + (low * gains[0] if gains and gains[0] is not None else low)

    return matrix.register_forward_hook(add)


def matrices(model):
    return [module for module in model.modules() if isinstance(module, tg.Matrix)]


def test_a_delta_equals_its_dense_matrix():
    model, dense, batch = double_model(), double_model(), tokens()
    for i, (matrix, other) in enumerate(zip(matrices(model), matrices(dense), strict=True)):
        a, b = low_rank(matrix, seed=i)
        add_delta(matrix, a, b)
        with torch.no_grad():
            other.weight += b @ a
    with torch.no_grad():
        close(model(*batch), dense(*batch))
        close(compiled(model)(*batch), dense(*batch))
        assert (double_model()(*batch) - dense(*batch)).abs().max() > 1e-3


def test_each_sequence_may_have_its_own_delta():
    model, batch = double_model(), tokens(rows=3)
    deltas = [low_rank(matrix, rows=3, seed=i) for i, matrix in enumerate(matrices(model))]
    pairs = [*zip(matrices(model), deltas, strict=True)]
    hooks = [add_delta(matrix, *delta) for matrix, delta in pairs]
    with torch.no_grad():
        together = model(*batch)
        for row in range(3):
            for hook in hooks:
                hook.remove()
            hooks = [add_delta(matrix, a[row], b[row]) for matrix, (a, b) in pairs]
            close(model(*batch[:, row : row + 1]), together[row : row + 1])


def test_a_delta_learns_while_the_weights_rest():
    model, batch = double_model().requires_grad_(False), tokens()
    matrix = model.blocks[1].attn.proj
    delta = low_rank(matrix)
    add_delta(matrix, *delta)
    model(*batch).sum().backward()
    assert all(x.grad.abs().max() > 0 for x in delta)
    assert all(p.grad is None for p in model.parameters())


# ---- calibration: hooks see the inputs and the gradients of the outputs of matrices


def test_hooks_gather_what_calibration_needs():
    """The Hessian XᵀX; and X with the gradients G of the outputs gives that of the weights, GᵀX."""
    model, inputs, gradients, hessians = double_model(), {}, {}, {}

    def listen(matrix, given):
        inputs[matrix] = given[0].flatten(0, 1).detach()
        hessians[matrix] = hessians.get(matrix, 0) + inputs[matrix].T @ inputs[matrix]

    for matrix in matrices(model):
        matrix.register_forward_pre_hook(listen)
        matrix.register_full_backward_hook(
            lambda m, _, g: gradients.update({m: g[0].flatten(0, 1)})
        )
    model(*tokens()).sum().backward()
    gains = {m.proj: m.mlp_scale for m in model.blocks}
    gains |= {m.attn.proj: m.attn_scale for m in model.blocks}
    assert len(hessians) == 3 * 6
    for matrix, hessian in hessians.items():
        x = inputs[matrix]
        assert x.shape == (24, matrix.in_features)
        assert hessian.trace() == pytest.approx(float(x.square().sum()))
        scale = gains.get(matrix, torch.ones(matrix.out_features))
        found = scale[:, None] * (gradients[matrix].T @ x)
        torch.testing.assert_close(found, matrix.weight.grad, atol=1e-9, rtol=1e-6)


# ---- attend: attention that does not cross the starts of documents


def documents_of(inputs):
    """Where the documents of a batch begin, for attention."""
    return tg.cut((inputs == BOS).numpy(), inputs.size(1), CPU)


@pytest.mark.parametrize("values", [{}, {"NUM_KV_HEADS": 4}, {"XSA_LAST_N": 3}], ids=str)
def test_documents_of_a_row_are_as_if_each_were_alone(values, monkeypatch):
    model, (inputs, targets) = double_model(**values), tokens()
    inputs[0, [0, 5]] = inputs[1, [2, 3]] = BOS
    parts = [(0, 0, 5), (0, 5, 12), (1, 0, 2), (1, 2, 3), (1, 3, 12)]
    with torch.no_grad():
        batch = inputs, targets, documents_of(inputs)
        nll = model(*batch)
        for row, start, stop in parts:
            one = slice(row, row + 1), slice(start, stop)
            close(nll[one], model(inputs[one], targets[one]))
        assert (model(inputs, targets) - nll).abs().max() > 1e-3
        monkeypatch.setitem(tg.PACKED, "cpu", packed_operator())
        close(compiled(model)(*batch), nll)


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_over_documents_equals_brute_force(heads):
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, 9, 8, generator=random, dtype=torch.float64) for h in (4, heads, heads)
    )
    starts = torch.rand(2, 9, generator=random) < 0.3
    y = tg.attend(q, k, v, tg.cut(starts.numpy(), 9, CPU))
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (2, 4, 9))).tolist():
        first = max([0, *(i for i in range(t + 1) if starts[b, i])])
        keys, values = (x[b, h * heads // 4, first : t + 1] for x in (k, v))
        shares = (keys @ q[b, h, t] / 8**0.5).softmax(0)
        torch.testing.assert_close(y[b, h, t], shares @ values)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_kernels_agree_when_compiled(backend, documents, monkeypatch):
    model, batch = double_model(), [*tokens()]
    if documents:
        batch[0][:, 5] = BOS
        batch.append(documents_of(batch[0]))
        monkeypatch.setitem(tg.PACKED, "cpu", packed_operator())
    with torch.no_grad():
        expected = model(*batch)
    with sdpa_kernel(backend):
        nll = compiled(model)(*batch)
        nll.sum().backward()
    close(nll, expected)
    assert model.blocks[0].attn.c_q.weight.grad.abs().max() > 0


# ---- what is off costs nothing


def test_the_graph_has_no_trace_of_what_is_off():
    """As many products and attentions as there must be, and no mask; q, k and v are one product."""
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(double_model(), backend=backend, fullgraph=True, dynamic=False)(*tokens())
    names = " ".join(seen)
    assert names.count("scaled_dot_product_attention") == 3
    assert names.count("linear") == 3 * 4
    assert not [word for word in ("cumsum", "tril", "matmul", "where", "roll") if word in names]
