"""The attention kernel for CPUs with AMX, against float64 and beside PyTorch's.

Where there is no AMX, the same source runs with its tiles emulated (amx_emulation.h).
"""

import ctypes
import functools
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import new_run

import amx_attention
from train_gpt import UserError, choose_attention


def problem() -> str:
    """Why the kernel cannot run here; empty if it can."""
    try:
        amx_attention.load()
    except (RuntimeError, OSError) as error:
        return str(error)
    return ""


PROBLEM = problem()
needs_amx = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)
needs_kernel = pytest.mark.usefixtures("kernel")
EMULATION = Path(__file__).with_name("amx_emulation.h")
EMULATION_NEEDS = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "fma3")


def build_emulation(cache, native_bf16):
    """kernel.cpp with emulated tiles, and with emulated instructions for bf16 if those are not to
    be native."""
    unwanted = ("-mamx",) if native_bf16 else ("-mamx", "-mavx512bf16")
    flags = [flag for flag in amx_attention.FLAGS if not flag.startswith(unwanted)]
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("XDG_CACHE_HOME", str(cache))
        changed.setattr(amx_attention, "FLAGS", (*flags, "-include", str(EMULATION)))
        try:
            return ctypes.CDLL(str(amx_attention.build()))
        except FileNotFoundError as error:
            pytest.skip(f"no compiler: {error}")


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """The kernel for any CPU with AVX-512."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    for name in EMULATION_NEEDS:
        if not has.get(name):
            pytest.skip(f"this CPU has neither AMX nor {name}, which its emulation needs")
    return build_emulation(tmp_path_factory.mktemp("emulation"), has.get("avx512_bf16"))


@pytest.fixture(params=["emulated"] if PROBLEM else ["amx", "emulated"])
def kernel(request, monkeypatch):
    """amx_attention works here: by AMX where it is, and by the emulation everywhere."""
    if request.param == "emulated":
        library = request.getfixturevalue("emulation")
        monkeypatch.setattr(amx_attention, "load", lambda: library)


@pytest.fixture(autouse=True)
def pytorch_again():
    """After each test, attention is PyTorch's again."""
    amx_attention.register.cache_clear()
    yield
    amx_attention.register.cache_clear()


def tensors(B, H, G, T, D, seed=0, dtype=torch.bfloat16):
    """q, k, v and a gradient of the output, laid out as in a model: (B, T, heads, D)."""
    random = torch.Generator().manual_seed(seed)
    heads = (H, G, G, H)
    return [torch.randn(B, T, h, D, generator=random).to(dtype).transpose(1, 2) for h in heads]


def attend(q, k, v, gradient, **options):
    """The output of scaled_dot_product_attention and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, enable_gqa=True, **options)
    out.backward(gradient)
    return [out.detach(), *(x.grad for x in leaves)]


def assert_near_truth(ours, inputs, **options):
    """Within 2^-7 of the norm of float64: bf16, to which P and the output are rounded, is 2^-9."""
    truth = attend(*(x.double() for x in inputs), **options)
    for name, x, y in zip(("out", "dq", "dk", "dv"), ours, truth, strict=True):
        assert (x.double() - y).norm() <= 2**-7 * y.norm() + 1e-6, name


def test_bf16_is_emulated_to_the_bit(emulation, monkeypatch, tmp_path):
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        pytest.skip("this CPU has no AVX512_BF16 to compare with")
    q, k, v, gradient = tensors(1, 2, 1, 70, 32)
    v[0, 0, 3] = torch.inf
    q[0, 1, 50, 2] = torch.nan
    found = []
    for library in (emulation, build_emulation(tmp_path, native_bf16=False)):
        monkeypatch.setattr(amx_attention, "load", lambda it=library: it)
        out, lse = amx_attention.forward(q, k, v)
        found.append([out, lse, *amx_attention.backward(gradient, q, k, v, out, lse)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=0, rtol=0, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("T", [1, 2, 31, 63, 64, 65, 128, 200])
def test_any_length_is_near_float64(T):
    amx_attention.activate(64)
    inputs = tensors(2, 2, 2, T, 64)
    assert_near_truth(attend(*inputs, is_causal=True), inputs, is_causal=True)


@needs_kernel
@pytest.mark.parametrize(("H", "G", "D"), [(8, 4, 64), (6, 1, 32), (3, 3, 96), (4, 2, 128)])
def test_widths_and_groups_are_near_float64(H, G, D):
    amx_attention.activate(D)
    inputs = tensors(2, H, G, 100, D)
    assert_near_truth(attend(*inputs, is_causal=True), inputs, is_causal=True)


@needs_kernel
def test_large_scores_do_not_overflow():
    amx_attention.activate(32)
    q, k, v, gradient = tensors(1, 2, 2, 150, 32)
    inputs = (q * 60, k * 60, v, gradient)
    ours = attend(*inputs, is_causal=True)
    assert all(x.isfinite().all() for x in ours)
    truth = attend(*(x.double() for x in inputs), is_causal=True)
    assert (ours[0].double() - truth[0]).norm() < 0.01 * truth[0].norm()


@needs_kernel
def test_the_log_sum_exp_is_that_of_the_scores():
    q, k, v, _ = tensors(1, 2, 2, 130, 64)
    hidden = torch.ones(130, 130, dtype=torch.bool).triu(1)
    scores = (q.double() @ k.double().mT / 8).masked_fill(hidden, -torch.inf)
    lse = amx_attention.forward(q, k, v)[1]
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-4, rtol=0)


@needs_kernel
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded"])
def test_any_layout_gives_the_same(layout):
    amx_attention.activate(64)
    inputs = tensors(2, 4, 2, 70, 64)
    expected = attend(*inputs, is_causal=True)

    def change(x):
        return x.contiguous() if layout == "contiguous" else torch.cat((x, x), 2)[:, :, :70]

    if layout == "expanded":  # the gradient of a sum
        one = torch.ones((), dtype=torch.bfloat16)
        q, k, v, gradient = inputs
        found = attend(q, k, v, one.expand_as(gradient), is_causal=True)
        expected = attend(q, k, v, torch.ones_like(gradient), is_causal=True)
    else:
        found = attend(*map(change, inputs), is_causal=True)
    assert all(x.equal(y) for x, y in zip(found, expected, strict=True))


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_bits_do_not_depend_on_the_threads(threads):
    amx_attention.activate(32)
    inputs, before = tensors(3, 4, 2, 90, 32), torch.get_num_threads()
    expected = attend(*inputs, is_causal=True)
    try:
        torch.set_num_threads(threads)
        found = attend(*inputs, is_causal=True)
    finally:
        torch.set_num_threads(before)
    assert all(x.equal(y) for x, y in zip(found, expected, strict=True))


@needs_kernel
def test_no_token_sees_a_later_one():
    q, k, v, _ = tensors(1, 2, 1, 140, 32)
    out, lse = amx_attention.forward(q, k, v)
    for x in (q, k, v):
        x[:, :, 77:] = 1e4
    changed, changed_lse = amx_attention.forward(q, k, v)
    assert changed[:, :, :77].equal(out[:, :, :77])
    assert changed_lse[:, :, :77].equal(lse[:, :, :77])


@needs_kernel
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_what_is_not_finite_stays_so(which):
    """A training step must see it, to skip it."""
    amx_attention.activate(32)
    inputs = tensors(1, 2, 2, 70, 32)
    inputs[which][0, 1, 5, 3] = torch.nan
    assert not all(x.isfinite().all() for x in attend(*inputs, is_causal=True))


@needs_kernel
@pytest.mark.parametrize(
    ("width", "dtype", "options"),
    [
        (48, torch.bfloat16, {"is_causal": True}),
        (64, torch.float32, {"is_causal": True}),
        (64, torch.bfloat16, {"is_causal": False}),
        (64, torch.bfloat16, {"is_causal": True, "scale": 0.5}),
        (64, torch.bfloat16, {"attn_mask": torch.ones(70, 70, dtype=torch.bool).tril()}),
    ],
)
def test_all_else_is_pytorchs(width, dtype, options):
    inputs = tensors(2, 4, 2, 70, width, dtype=dtype)
    expected = attend(*inputs, **options)
    amx_attention.activate(64)
    found = attend(*inputs, **options)
    assert all(x.equal(y) for x, y in zip(found, expected, strict=True))


@needs_kernel
def test_it_takes_the_place_of_pytorchs_and_gives_it_back(monkeypatch):
    calls, forward = [], amx_attention.forward
    monkeypatch.setattr(amx_attention, "forward", lambda *x: (calls.append(1), forward(*x))[1])
    inputs = tensors(1, 2, 2, 70, 32)
    amx_attention.activate(32)
    attend(*inputs, is_causal=True)
    assert len(calls) == 1
    amx_attention.register.cache_clear()
    attend(*inputs, is_causal=True)
    assert len(calls) == 1


@needs_kernel
def test_a_batch_of_nothing():
    amx_attention.activate(32)
    assert attend(*tensors(0, 2, 2, 8, 32), is_causal=True)[0].shape == (0, 2, 8, 32)


@needs_kernel
def test_compiled_code_uses_it(monkeypatch):
    amx_attention.activate(32)
    inputs = tensors(1, 4, 2, 64, 32)
    eager, calls, call = attend(*inputs, is_causal=True), [], amx_attention.call
    monkeypatch.setattr(amx_attention, "call", lambda f, *x: (calls.append(f), call(f, *x))[1])
    compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = compiled(*leaves, is_causal=True, enable_gqa=True)
    out.backward(inputs[3])
    assert len(calls) == 2
    assert all(x.equal(y) for x, y in zip([out, *(x.grad for x in leaves)], eager, strict=True))


# ===================================== WHERE IT CANNOT BE =====================================


def test_without_amx_it_says_so(monkeypatch):
    amx_attention.load.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    with pytest.raises(RuntimeError, match="this CPU has no AMX"):
        amx_attention.activate(64)


def test_a_width_that_it_cannot_do():
    with pytest.raises(RuntimeError, match="width of 40, not a multiple of 32"):
        amx_attention.activate(40)


def test_what_the_compiler_says_is_told(monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho no such target >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match=r"compiler .*no such target"):
        amx_attention.build()
    assert not [*(tmp_path / "cache").rglob("*.so")]


def compiler_knows_amx():
    """A compiler with the instructions for tiles is here, whatever the CPU has."""
    command = ["g++", "-mamx-bf16", "-x", "c++", "-E", "/dev/null"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not compiler_knows_amx(), reason="no g++ that knows AMX")
def test_it_is_built_once(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = amx_attention.build()
    monkeypatch.setattr(subprocess, "run", None)
    assert amx_attention.build() == built
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [built]


run_with = functools.partial(new_run, {"DTYPE": "bf16"})


@needs_kernel
@pytest.mark.parametrize("asked", ["auto", "amx"])
def test_a_cpu_run_in_bf16_takes_it(asked):
    assert choose_attention(run_with(ATTENTION=asked)) == "amx"


def test_auto_is_pytorchs_where_it_cannot_be_built(monkeypatch):
    def broken():
        raise RuntimeError("g++: not found")

    monkeypatch.setattr(amx_attention, "load", broken)
    assert choose_attention(run_with()) == "sdpa"
    with pytest.raises(UserError, match=r"ATTENTION=amx: g\+\+: not found"):
        choose_attention(run_with(ATTENTION="amx"))


def test_in_fp32_and_for_other_widths_auto_is_pytorchs():
    assert choose_attention(run_with(DTYPE="fp32")) == "sdpa"
    assert choose_attention(run_with(MODEL_DIM="192", NUM_HEADS="4")) == "sdpa"


def test_a_named_kernel_in_fp32_is_an_error():
    with pytest.raises(UserError, match="ATTENTION=amx: needs DEVICE=cpu and DTYPE=bf16"):
        choose_attention(run_with(ATTENTION="amx", DTYPE="fp32"))
