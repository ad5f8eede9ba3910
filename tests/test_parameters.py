"""The table of parameters: one row says how each starts, is trained and is stored."""

import pytest
import torch
from conftest import optimizers_of, random_model, resolve

import frontier
import train_gpt as tg

TINY = {
    "VOCAB_SIZE": 23,
    "NUM_LAYERS": 3,
    "MODEL_DIM": 16,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 2,
    "TRAIN_SEQ_LEN": 8,
    "TRAIN_BATCH_TOKENS": 16,
    "DEVICE": "cpu",
    "DTYPE": "fp32",
}
EVERYTHING = {"SMEAR_GATE": 1, "BIGRAM_BUCKETS": 11, "BIGRAM_DIM": 6, "TIE_EMBEDDINGS": 0}


def settings(**values):
    """Tiny settings, changed by `values`."""
    return resolve(TINY, **values)


def put_first(monkeypatch, *rows):
    """Let the table begin with `rows`."""
    for module in (tg, frontier):
        table = module.parameter_table
        monkeypatch.setattr(module, "parameter_table", lambda hp, t=table: [*rows, *t(hp)])


def row(pattern, optimizer="adam", lr=0.1, decay=0.2, start=None, bits=0):
    return tg.Row(pattern, optimizer, lr, decay, 0.95, start, bits)


class Extended(tg.GPT):
    """A GPT with a vector and a matrix more, which no row of the table is for."""

    def __init__(self, hp):
        super().__init__(hp)
        self.novel = torch.nn.Parameter(torch.ones(3, 5))
        self.vector = torch.nn.Parameter(torch.ones(5))


# ---- the rows


@pytest.mark.parametrize("values", [{}, {"TIE_EMBEDDINGS": 1}, {"ORTHO_INIT": 1}], ids=str)
def test_every_row_is_of_some_parameter(values):
    choices = {name: tg.FIELDS[name].metadata["choices"] for name in tg.MODEL_SETTINGS}
    switches = {name: 1 for name, both in choices.items() if both == ["0", "1"]}
    used = set()
    for skips in ("gated", "mudd"):
        hp = settings(**switches | EVERYTHING | values | {"SPARSE_ATTN_GATE": 8, "SKIPS": skips})
        used |= {tg.row_of(name, hp).pattern for name, _ in tg.build_model(hp).named_parameters()}
    tied = {"lm_head.weight"} if hp.tie_embeddings else set()
    assert used | tied == {each.pattern for each in frontier.parameter_table(hp)}


def test_every_row_of_the_baseline_is_of_some_parameter():
    hp = settings(TIE_EMBEDDINGS=0)
    used = {tg.row_of(name, hp).pattern for name, _ in tg.GPT(hp).named_parameters()}
    assert used == {each.pattern for each in tg.parameter_table(hp)}


def test_the_first_row_that_fits_counts(monkeypatch):
    hp = settings()
    put_first(monkeypatch, row("blocks.1.*", lr=0.3), row("*.q_gain", lr=0.4))
    assert tg.row_of("blocks.0.attn.q_gain", hp).lr == 0.4
    assert tg.row_of("blocks.1.attn.q_gain", hp).lr == 0.3
    assert tg.row_of("blocks.0.fc.weight", hp).lr == hp.matrix_lr


def test_capitals_count_in_a_name():
    with pytest.raises(tg.UserError, match="parameter SMEAR: no row"):
        tg.row_of("SMEAR", settings())


def test_a_parameter_without_a_row_is_an_error_that_names_it():
    hp = settings()
    with pytest.raises(tg.UserError, match="parameter novel: no row of parameter_table fits"):
        optimizers_of(Extended(hp), hp)


def test_a_model_with_a_parameter_without_a_row_is_not_made(monkeypatch):
    table = tg.parameter_table
    monkeypatch.setattr(tg, "parameter_table", lambda hp: table(hp)[1:])
    with pytest.raises(tg.UserError, match=r"parameter tok_emb\.weight: no row"):
        tg.build_model(settings())


# ---- how it starts


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (0.5, [[0.5, 0.5]] * 2),
        (0.0, [[0.0, 0.0]] * 2),
        ([[1.0], [2.0]], [[1.0, 1.0], [2.0, 2.0]]),
        (torch.nn.init.eye_, [[1.0, 0.0], [0.0, 1.0]]),
        (None, [[7.0, 7.0]] * 2),
    ],
)
def test_what_a_start_means(start, expected):
    parameter = torch.nn.Parameter(torch.full((2, 2), 7.0))
    tg.initialize(parameter, start)
    assert parameter.tolist() == expected
    assert parameter.requires_grad
    assert parameter.grad_fn is None


def test_a_model_starts_as_its_table_says(monkeypatch):
    put_first(monkeypatch, row("skip_weights", start=0.25), row("*.fc.weight", start=-1.0))
    model = tg.build_model(settings())
    assert (model.skip_weights == 0.25).all()
    assert all((block.fc.weight == -1).all() for block in model.blocks)
    assert not model.blocks[0].proj.weight.any()


def test_orthogonal_matrices_are_drawn_after_the_modules_in_the_order_of_their_names():
    """As they were before there was a table: a seed gives the model that it gave."""
    torch.manual_seed(3)
    model = tg.build_model(settings(**EVERYTHING | {"ORTHO_INIT": 1, "TIE_EMBEDDINGS": 1}))
    torch.manual_seed(3)
    expected = tg.build_model(settings(**EVERYTHING | {"TIE_EMBEDDINGS": 1}))
    for name, p in expected.named_parameters():
        if name.startswith("blocks.") and name.endswith(".weight"):
            torch.nn.init.orthogonal_(p, 6**-0.5 if "proj" in name else 1.0)
    for (name, p), q in zip(expected.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_no_parameter_is_left_as_memory_was():
    """Modules take memory for what the table sets: PyTorch fills it with what is not a number."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        for values in (EVERYTHING, {**EVERYTHING, "ORTHO_INIT": 1}, {}):
            for name, p in tg.build_model(settings(**values)).named_parameters():
                assert p.isfinite().all(), name
    finally:
        torch.use_deterministic_algorithms(False)


# ---- who trains it


def test_a_row_says_who_trains_a_parameter_and_how(monkeypatch):
    put_first(monkeypatch, row("novel", "muon", 0.3, 0.4), row("vector", "adam", 0.5, 0.6))
    hp = settings()
    model = Extended(hp)
    adam, muon = optimizers_of(model, hp)
    for optimizer, p, lr, decay in ((muon, model.novel, 0.3, 0.4), (adam, model.vector, 0.5, 0.6)):
        (group,) = (g for g in optimizer.param_groups if any(p is q for q in g["params"]))
        assert (group["lr"], group["base_lr"], group["weight_decay"]) == (lr, lr, decay)
        assert len(group["params"]) == 1


def test_matrices_of_one_shape_with_other_rates_are_not_of_one_group(monkeypatch):
    put_first(monkeypatch, row("blocks.0.fc.weight", "muon", lr=0.7))
    hp = settings()
    muon = optimizers_of(tg.build_model(hp), hp)[1]
    rates = {len(group["params"]): group["lr"] for group in muon.param_groups}
    assert rates[1] == 0.7
    assert set(rates.values()) == {0.7, hp.matrix_lr}


@pytest.mark.parametrize(
    ("name", "shape"), [("skip_weights", r"\(2, 2, 4\)"), ("smear", r"\(16,\)")]
)
def test_muon_is_given_matrices_alone(monkeypatch, name, shape):
    put_first(monkeypatch, row(name, "muon"))
    hp = settings(SMEAR_GATE=1)
    model = tg.build_model(hp)
    model.skip_weights = torch.nn.Parameter(torch.ones(2, 2, 4))
    with pytest.raises(tg.UserError, match=f"parameter {name}: Muon takes matrices, .*{shape}"):
        optimizers_of(model, hp)


def test_some_parameters_alone_have_the_optimizers_that_they_need():
    hp = settings()
    run, params = tg.Run(hp), dict(tg.build_model(hp).named_parameters())
    kinds = {"skip_weights": torch.optim.AdamW, "blocks.0.fc.weight": tg.Muon}
    for name, kind in kinds.items():
        (optimizer,) = tg.build_optimizers({name: params[name]}, run)
        assert type(optimizer) is kind
    assert tg.build_optimizers({}, run) == []


# ---- how it is stored


def test_a_row_says_the_bits_of_a_large_matrix(monkeypatch):
    put_first(monkeypatch, row("novel", bits=3), row("gain", bits=0))
    hp, large = settings(), torch.empty(512, 512, device="meta")
    assert tg.bits_of("novel", large, hp) == 3
    assert tg.bits_of("novel", large[:4], hp) == 0
    assert tg.bits_of("novel", large.flatten(), hp) == 0
    assert tg.bits_of("gain", large, hp) == 0


def test_what_has_no_bits_is_stored_in_fp32(monkeypatch):
    put_first(monkeypatch, row("novel", bits=3), row("gain", bits=0))
    hp = settings()
    small = torch.ones(2, 3)
    assert tg.layout("gain", small, hp) == [["<f4", [2, 3]]]
    assert tg.layout("novel", small, hp) == [["<f2", [2, 3]]]


# ---- the contract of optimizers


def with_gradients(hp, seed=0):
    """A model and its optimizers, ready for a step."""
    model = random_model(hp)
    optimizers = optimizers_of(model, hp)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["momentum"] = 0.9
    give_gradients(model, seed)
    return model, optimizers


def give_gradients(model, seed):
    random = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=random)


def snapshot(model, optimizers):
    """A copy of all weights and all state."""
    states = [o.state[p] for o in optimizers for p in o.state]
    tensors = [*model.parameters(), *(t for state in states for t in state.values())]
    return [t.detach().clone() for t in tensors]


def test_nothing_changes_if_found_inf_is_set():
    hp = settings(MUON_WD=0.1, ADAM_WD=0.1, EMBED_WD=0.1)
    model, optimizers = with_gradients(hp)
    for optimizer in optimizers:
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), None
        optimizer.step()
    give_gradients(model, 1)
    for bad in (0.0, 1.0):
        before = snapshot(model, optimizers)
        for optimizer in optimizers:
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(bad), None
            optimizer.step()
        same = [torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizers), strict=True)]
        assert all(same) if bad else not any(same)
        for p in model.parameters():
            p.grad.zero_()


def test_muon_makes_its_state_in_its_first_step():
    hp = settings()
    _, (_, muon) = with_gradients(hp)
    assert not muon.state
    muon.step()
    params = [p for group in muon.param_groups for p in group["params"]]
    assert set(muon.state) == set(params)
    for p in params:
        assert torch.equal(muon.state[p]["momentum_buffer"], p.grad)


def test_muon_goes_on_from_a_state_that_it_is_given():
    """What a checkpoint kept may be put in place of its own tensors."""
    hp, ends = settings(), []
    for resumed in (False, True):
        model, (_, muon) = with_gradients(hp)
        muon.step()
        if resumed:
            kept = [{k: t.clone() for k, t in state.items()} for state in muon.state.values()]
            weights = model.state_dict()
            model, (_, muon) = with_gradients(hp)
            model.load_state_dict(weights)
            params = [p for group in muon.param_groups for p in group["params"]]
            muon.state.clear()
            muon.state.update(zip(params, kept, strict=True))
        give_gradients(model, 1)
        muon.step()
        ends.append(snapshot(model, [muon]))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
