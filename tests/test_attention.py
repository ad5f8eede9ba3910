"""ATTENTION: the kernel that scaled_dot_product_attention is pointed at, on machines not here."""

import contextlib
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import new_run
from torch.nn.attention import SDPBackend

import keeper
import train_gpt as tg

ALL = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


class Machine:
    """A CUDA machine as PyTorch 2.11 would describe it: its compute capability, the packages that
    are there, and the kernels that can do the model's shapes. PyTorch sets an order of its own,
    cuDNN first, at the first question: over any that was set before."""

    def __init__(self) -> None:
        self.capability, self.packages, self.able = 9, (), ALL
        self.wrong: tuple[str, ...] = ()  # kernels whose gradients are wrong
        self.wrong_in_documents = False
        self.order: list[str] = []
        self.asked, self.active = False, ""

    @property
    def taken(self) -> str:
        """The kernel that PyTorch would run."""
        return next(name for name in self.order if name in self.able)

    @contextlib.contextmanager
    def sdpa_kernel(self, order, set_priority=False):
        assert set_priority
        before, self.order = self.order, [backend.name for backend in order]
        yield
        self.order = before

    def choose(self, *_, **__) -> int:
        if not self.asked:
            self.asked, self.order = True, [*ALL]
        return getattr(SDPBackend, self.taken).value

    def activate(self, name: str) -> None:
        if name.lower() not in self.packages:
            raise ModuleNotFoundError(f"No module named '{name}'")
        self.active = name.lower()

    def restore(self) -> None:
        self.active = ""

    def problem(self, _: tg.Run, documents: bool = False) -> str:
        self.choose()
        if documents and self.wrong_in_documents:
            return "wrong within documents"
        return "wrong here" if self.taken in self.wrong or self.active in self.wrong else ""


@pytest.fixture
def machine(monkeypatch) -> Machine:
    made = Machine()
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(shape))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (made.capability, 0))
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", made.activate)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", made.restore)
    monkeypatch.setattr(torch, "_fused_sdp_choice", made.choose)
    monkeypatch.setattr(tg, "sdpa_kernel", made.sdpa_kernel)
    monkeypatch.setattr(keeper, "attention_inputs", lambda _: [zeros(1, 2, 4, 8)] * 4)
    monkeypatch.setattr(keeper, "attention_problem", made.problem)
    return made


def cuda_run(attention: str = "auto", dtype: torch.dtype = torch.bfloat16, **model) -> tg.Run:
    """A run on a CUDA device that is not here."""
    run = new_run({name.upper(): value for name, value in model.items()}, ATTENTION=attention)
    run.device, run.dtype = torch.device("cuda", 0), dtype
    return run


@pytest.mark.parametrize(
    ("capability", "packages", "chosen", "active", "taken"),
    [
        (9, ["fa3", "fa4"], "fa3", "fa3", "FLASH_ATTENTION"),
        (9, ["fa4"], "fa4", "fa4", "FLASH_ATTENTION"),
        (9, [], "cudnn", "", "CUDNN_ATTENTION"),
        (10, ["fa3", "fa4"], "fa4", "fa4", "FLASH_ATTENTION"),
        (10, [], "cudnn", "", "CUDNN_ATTENTION"),
        (8, ["fa3", "fa4"], "fa2", "", "FLASH_ATTENTION"),
    ],
)
def test_auto_takes_the_first_that_is_there(machine, capability, packages, chosen, active, taken):
    machine.capability, machine.packages = capability, packages
    run = cuda_run()
    assert tg.choose_attention(run) == chosen
    assert (machine.active, machine.taken) == (active, taken)
    run.kernels.close()
    assert machine.active == ""


DOCUMENTS = {"EVAL_DOC_ISOLATED": 1}


@pytest.mark.parametrize(("name", "runs"), [("cudnn", "fa2"), ("fa2", "fa2"), ("fa3", "fa3")])
def test_the_kernel_within_documents_is_named_too(machine, name, runs):
    """PyTorch's varlen attention is Flash Attention, whatever whole rows use."""
    machine.packages = ["fa3"]
    run = cuda_run(name, **DOCUMENTS)
    assert tg.choose_attention(run) == f"{name} documents:{runs}"
    run.kernels.close()
    run = cuda_run("sdpa", torch.float32, **DOCUMENTS)
    assert "documents" not in tg.choose_attention(run)


def test_a_kernel_that_is_wrong_within_documents_is_an_error_where_there_are_some(machine):
    machine.wrong_in_documents = True
    tg.choose_attention(cuda_run("cudnn"))
    with pytest.raises(tg.UserError, match="ATTENTION=cudnn: wrong within documents"):
        tg.choose_attention(cuda_run("cudnn", **DOCUMENTS))


@pytest.mark.parametrize("name", ["cudnn", "fa2"])
def test_the_compilers_cache_is_told_the_kernel(machine, name):
    """It would else give a model that was compiled with another one."""
    run = cuda_run(name)
    tg.choose_attention(run)
    run.kernels.close()
    assert torch.compiler.config.cache_key_tag == name


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4"])
def test_flash_attention_runs_although_pytorch_prefers_cudnn(machine, name):
    machine.packages = ["fa3", "fa4"]
    assert tg.choose_attention(cuda_run(name)) == name
    assert machine.taken == "FLASH_ATTENTION"


def test_another_kernel_serves_shapes_that_cudnn_cannot_do(machine):
    """Validation has other lengths than training: without fallback, all T x T scores are held."""
    run = cuda_run("cudnn")
    assert tg.choose_attention(run) == "cudnn"
    machine.able = ALL[1:]
    assert machine.taken == "FLASH_ATTENTION"


def test_a_named_kernel_that_pytorch_does_not_take_is_an_error(machine):
    machine.able = ALL[1:]
    with pytest.raises(tg.UserError, match="ATTENTION=cudnn: PyTorch takes FLASH_ATTENTION"):
        tg.choose_attention(cuda_run("cudnn"))


def test_auto_goes_on_from_a_kernel_that_pytorch_does_not_take(machine):
    machine.able = ALL[1:]
    run = cuda_run()
    assert tg.choose_attention(run) == "fa2"
    assert run.keeper.warnings == []


def test_auto_goes_on_from_a_kernel_that_is_wrong_and_warns(machine):
    machine.packages, machine.wrong = ["fa3"], ("fa3", "CUDNN_ATTENTION")
    run = cuda_run()
    assert tg.choose_attention(run) == "fa2"
    assert (machine.active, machine.taken) == ("", "FLASH_ATTENTION")
    assert run.keeper.warnings == ["ATTENTION=fa3: wrong here", "ATTENTION=cudnn: wrong here"]


@pytest.mark.parametrize("name", ["sdpa", "cudnn", "fa2", "fa3"])
def test_a_named_kernel_that_is_wrong_is_an_error(machine, name):
    machine.packages = ["fa3"]
    machine.wrong = ("CUDNN_ATTENTION", "FLASH_ATTENTION")
    with pytest.raises(tg.UserError, match=f"ATTENTION={name}: wrong here"):
        tg.choose_attention(cuda_run(name))


def test_fp32_has_no_kernel_of_its_own(machine):
    assert tg.choose_attention(cuda_run(dtype=torch.float32)) == "sdpa:CUDNN_ATTENTION"


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_a_named_kernel_that_is_missing_is_an_error(machine, name):
    with pytest.raises(tg.UserError, match=f"ATTENTION={name}: No module named"):
        tg.choose_attention(cuda_run(name))


@pytest.mark.parametrize("name", ["cudnn", "fa2", "fa3", "fa4"])
def test_a_cpu_has_none_of_them(name):
    run = new_run({}, ATTENTION=name, DTYPE="bf16")
    with pytest.raises(tg.UserError, match=f"ATTENTION={name}: needs DEVICE=cuda and DTYPE=bf16"):
        tg.choose_attention(run)


def cpu_run(**changed) -> tg.Run:
    """A run of a small model on this CPU, in bf16."""
    small = {"MODEL_DIM": 64, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "TRAIN_SEQ_LEN": 100}
    small |= {"DTYPE": "bf16", "TRAIN_BATCH_TOKENS": 100}
    return new_run(small, **changed)


def test_a_cpu_uses_what_pytorch_has_without_the_folder_of_the_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "amx_attention", None)
    run = cpu_run()
    assert tg.choose_attention(run) == "sdpa"
    assert run.keeper.warnings == []


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_pytorch_is_asked_with_tensors_like_the_models(dtype):
    assert keeper.attention_backend(cpu_run(DTYPE=dtype)) == "FLASH_ATTENTION"


# ---- attention is compared with plain products before it is used


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_pytorchs_attention_in_bf16_is_right(kv_heads, documents):
    assert keeper.attention_problem(cpu_run(NUM_KV_HEADS=kv_heads), documents) == ""


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7, 8, 100])
def test_attention_within_documents_is_right_for_short_sequences(length):
    """A document of one token has no gradients of q and k, beside which all would be wrong."""
    run = cpu_run(TRAIN_SEQ_LEN=length, TRAIN_BATCH_TOKENS=length, VAL_BATCH_SIZE=length)
    assert keeper.attention_problem(run, documents=True) == ""


class Faulty(torch.autograd.Function):
    """Attention, one of whose tensors is off: 0 the result, 1 to 3 the gradients of q, k and v."""

    @staticmethod
    def forward(ctx, q, k, v, which, fault):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            y = RIGHT(*inputs, is_causal=True, enable_gqa=True)
        ctx.saved = (y, inputs, which, fault)
        return fault(y.detach()) if which == 0 else y.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        y, inputs, which, fault = ctx.saved
        grads = [*torch.autograd.grad(y, inputs, grad)]
        if which:
            grads[which - 1] = fault(grads[which - 1])
        return *grads, None, None


RIGHT = F.scaled_dot_product_attention


def last_position(value: float):
    """A fault at the last position, as of a kernel whose last tile is not full."""

    def damage(x):
        x = x.clone()
        x[:, :, -1] *= value
        return x

    return damage


@pytest.mark.parametrize(("which", "name"), [*enumerate(("result", "dq", "dk", "dv"))])
@pytest.mark.parametrize("value", [0.9, float("nan")])
def test_a_wrong_result_or_gradient_is_found(which, name, value, monkeypatch):
    def attention(q, k, v, is_causal, enable_gqa):
        if q.dtype == torch.bfloat16:
            return Faulty.apply(q, k, v, which, last_position(value))
        return RIGHT(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    assert f"its {name} is " in keeper.attention_problem(cpu_run())


@pytest.mark.parametrize(("which", "name"), [*enumerate(("result", "dq", "dk", "dv"))])
def test_what_is_wrong_within_documents_alone_is_found(which, name, monkeypatch):
    """A kernel that attends over the starts of documents, forward or backward."""

    def whole(q, k, v, offsets):
        return RIGHT(q, k, v, is_causal=True, enable_gqa=True)

    def mixed(q, k, v, offsets):
        right = tg.attend_by_piece(q, k, v, offsets)
        if which == 0:
            return whole(q, k, v, offsets).detach() + right - right.detach()
        inputs = [q.detach(), k.detach(), v.detach()]
        inputs[which - 1] = (q, k, v)[which - 1]
        wrong = whole(*inputs, offsets)
        return right + wrong - wrong.detach()

    monkeypatch.setitem(tg.PACKED, "cpu", mixed)
    run = cpu_run(NUM_HEADS=2, NUM_KV_HEADS=2)
    assert keeper.attention_problem(run) == ""
    assert f"wrong here within documents: its {name} is " in keeper.attention_problem(run, True)


def test_a_kernel_that_fails_when_it_runs_is_told(monkeypatch):
    """Not all that a kernel cannot do is known before."""

    def attention(q, k, v, is_causal, enable_gqa):
        raise RuntimeError("cuDNN Frontend error: no execution plan")

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    assert keeper.attention_problem(cpu_run()) == (
        "does not run here: cuDNN Frontend error: no execution plan"
    )


def test_the_check_has_the_shapes_and_strides_of_the_model():
    """As scaled_dot_product_attention gets them in the forward pass."""
    seen = []

    def watch(q, k, v, **options):
        seen.append([(x.shape[1:], x.stride()[1:], x.dtype) for x in (q, k, v)])
        return RIGHT(q, k, v, **options)

    run = cpu_run(NUM_LAYERS=1)
    tokens = torch.zeros(1, 100, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watch)
        tg.build_model(run.hp, run.dtype)(tokens, tokens)
        keeper.attention_problem(run)
    assert seen[0] == seen[1]


def test_the_check_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    keeper.attention_problem(cpu_run())
    assert torch.equal(torch.get_rng_state(), before)


def test_long_sequences_are_checked_in_part():
    run = cpu_run(TRAIN_SEQ_LEN=16384, TRAIN_BATCH_TOKENS=16384, VAL_BATCH_SIZE=16384)
    assert {x.size(2) for x in keeper.attention_inputs(run)} == {2048}
