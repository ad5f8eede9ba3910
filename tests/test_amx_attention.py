"""The attention kernel for CPUs with AMX, against float64 and beside PyTorch's.

Where there is no AMX, the same source runs with its tiles emulated (amx_emulation.h).
"""

import ctypes
import functools
import subprocess
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
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
            library = ctypes.CDLL(str(amx_attention.build()))
        except FileNotFoundError as error:
            pytest.skip(f"no compiler: {error}")
    assert library.amx_permission() == 0
    library.amx_products.restype = ctypes.c_int64
    return library


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


# ===================================== DOCUMENTS =====================================

ROWS = {  # the lengths of the documents in each row
    "of a token": [[1] * 70],
    "one token shorter than a block": [[63, 63, 63]],
    "of a block": [[64, 64, 64]],
    "one token longer than a block": [[65, 65, 65]],
    "of many blocks": [[300, 1, 200, 64]],
    "that go on in the next row": [[100, 50], [30, 120], [150]],
    "that are empty": [[0, 0, 70, 0, 0, 30, 0], [0, 100, 0, 0]],
}


def offsets_of(rows):
    """The starts of all documents, and their end."""
    lengths = torch.tensor([0, *(length for row in rows for length in row)])
    return lengths.cumsum(0).int()


def spans_of(rows):
    """The row, start and end in that row of each document that is not empty."""
    for b, lengths in enumerate(rows):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        yield from ((b, end - n, end) for n, end in zip(lengths, ends, strict=True) if n)


def attend_inside(inputs, offsets):
    """The kernel's output, log-sum-exp and gradients of q, k and v."""
    q, k, v, gradient = inputs
    out, lse = amx_attention.forward(q, k, v, offsets)
    return [out, lse, *amx_attention.backward(gradient, q, k, v, out, lse, offsets)]


def assert_documents_near_truth(rows, H, G, D):
    """Each document is within 2^-7 of its norm in float64, by a dense mask; a gradient that should
    be 0, as that of q in a document of a token, is near 0."""
    T = sum(rows[0])
    inputs = tensors(len(rows), H, G, T, D)
    ours = attend_inside(inputs, offsets_of(rows))
    number = torch.full((len(rows), T), -1)
    for n, (b, start, end) in enumerate(spans_of(rows)):
        number[b, start:end] = n
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    mask = (number[:, :, None] == number[:, None, :]) & causal
    truth = attend(*(x.double() for x in inputs), attn_mask=mask[:, None])
    del ours[1]
    for name, x, y in zip(("out", "dq", "dk", "dv"), ours, truth, strict=True):
        for b, start, end in spans_of(rows):
            part, true = x[b, :, start:end].double(), y[b, :, start:end]
            assert (part - true).norm() <= 2**-7 * true.norm() + 1e-4, (name, b, start, end)


@needs_kernel
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_documents_are_near_a_dense_mask_in_float64(rows):
    assert_documents_near_truth(rows, 2, 1, 64)


@needs_kernel
@pytest.mark.parametrize(("H", "G", "D"), [(8, 4, 64), (6, 1, 32), (3, 3, 96), (4, 2, 128)])
def test_documents_of_any_width_and_groups(H, G, D):
    assert_documents_near_truth([[90, 1, 64], [20, 130, 5]], H, G, D)


@needs_kernel
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_document_has_the_bits_of_itself_alone(rows):
    inputs = tensors(len(rows), 4, 2, sum(rows[0]), 32)
    found = attend_inside(inputs, offsets_of(rows))
    for b, start, end in spans_of(rows):
        alone = attend_inside([x[b : b + 1, :, start:end] for x in inputs], None)
        for x, y in zip(found, alone, strict=True):
            assert x[b : b + 1, :, start:end].equal(y), (b, start, end)


@needs_kernel
def test_whole_rows_as_documents_have_the_bits_of_none():
    inputs = tensors(3, 4, 2, 90, 32)
    given, none = (attend_inside(inputs, x) for x in (offsets_of([[90]] * 3), None))
    assert all(x.equal(y) for x, y in zip(given, none, strict=True))


@needs_kernel
@pytest.mark.parametrize("threads", [2, 4])
def test_the_bits_of_documents_do_not_depend_on_the_threads(threads):
    rows = [[5, 100, 1, 30, 64], [200], [40] * 5]
    inputs, before = tensors(3, 4, 2, 200, 32), torch.get_num_threads()
    torch.set_num_threads(1)
    expected = attend_inside(inputs, offsets_of(rows))
    try:
        torch.set_num_threads(threads)
        found = attend_inside(inputs, offsets_of(rows))
    finally:
        torch.set_num_threads(before)
    assert all(x.equal(y) for x, y in zip(found, expected, strict=True))


@needs_kernel
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_no_document_sees_another_whatever_that_holds(which):
    inputs = tensors(1, 2, 1, 200, 32)
    offsets = offsets_of([[70, 30, 100]])
    before = attend_inside(inputs, offsets)
    inputs[which][:, :, 70:100] = torch.nan
    after = attend_inside(inputs, offsets)
    for x, y in zip(before, after, strict=True):
        assert x[:, :, :70].equal(y[:, :, :70])
        assert x[:, :, 100:].equal(y[:, :, 100:])


@needs_kernel
def test_documents_in_slices_of_one_buffer():
    offsets = offsets_of([[70, 80], [149, 1]])
    q, k, v, gradient = tensors(2, 4, 2, 150, 64)
    buffer = torch.cat((q, k, v), 1).transpose(1, 2).contiguous()  # (B, T, heads, D)
    slices = [x.transpose(1, 2) for x in buffer.split((4, 2, 2), 2)]
    expected = attend_inside([x.contiguous() for x in (q, k, v, gradient)], offsets)
    found = attend_inside([*slices, gradient], offsets)
    assert all(x.equal(y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_blocks_that_are_hidden_are_not_computed(rows, emulation, monkeypatch):
    """A block of 64 x 64 scores takes a head D / 2 products of tiles for each matrix product: two
    forward, five backward."""
    monkeypatch.setattr(amx_attention, "load", lambda: emulation)
    H, D = 4, 64
    q, k, v, gradient = tensors(len(rows), H, 2, sum(rows[0]), D)
    offsets = offsets_of(rows)
    counts = [emulation.amx_products()]
    out, lse = amx_attention.forward(q, k, v, offsets)
    counts.append(emulation.amx_products())
    amx_attention.backward(gradient, q, k, v, out, lse, offsets)
    counts.append(emulation.amx_products())
    tall = [-(-(end - start) // 64) for _, start, end in spans_of(rows)]
    blocks = H * sum(n * (n + 1) // 2 for n in tall)
    assert counts[1] - counts[0] == 2 * blocks * D // 2
    assert counts[2] - counts[1] == 5 * blocks * D // 2


def test_threads_begin_with_the_longest_segments(emulation, monkeypatch, tmp_path):
    """Heads in turn among segments of one length."""
    source = tmp_path / "order.cpp"
    source.write_text(
        f'#include "{amx_attention.SOURCE}"\n'
        'extern "C" int order(const int64_t* starts, int segments, int T, int G, int* out) {\n'
        "  int* next = out;\n"
        "  for (const Work& one : divide(starts, segments, T, G))\n"
        "    for (int x : {one.part.row, one.part.start, one.part.length, one.head}) *next++ = x;\n"
        "  return (next - out) / 4;\n}\n"
    )
    monkeypatch.setattr(amx_attention, "SOURCE", source)
    library = build_emulation(tmp_path, torch.cpu.get_capabilities().get("avx512_bf16"))
    starts = (ctypes.c_int64 * 7)(0, 2, 10, 12, 20, 20, 24)
    numbers = (ctypes.c_int * 40)()
    assert library.order(starts, 6, 12, 2, numbers) == 10
    found = [tuple(numbers[i : i + 4]) for i in range(0, 40, 4)]
    eights, four = [(0, 2, 8), (1, 0, 8)], [(1, 8, 4)]
    twos = [(0, 0, 2), (0, 10, 2)]
    expected = [(*x, g) for some in (eights, four, twos) for g in (0, 1) for x in some]
    assert found == expected


WRONG_OFFSETS = {
    "not 0 first": ([1, 8, 16], "from 0 to B \\* T = 16, but are from 1 to 16"),
    "not the end last": ([0, 8, 15], "from 0 to B \\* T = 16, but are from 0 to 15"),
    "falling": ([0, 5, 4, 8, 16], "fall from 5 to 4 at number 2"),
    "over a row's start": ([0, 3, 16], "have no 8, where a row of 8 tokens starts"),
    "none": ([], "from 0 to B \\* T = 16, but are empty"),
}


@pytest.mark.parametrize(("numbers", "message"), WRONG_OFFSETS.values(), ids=WRONG_OFFSETS)
def test_wrong_offsets_are_refused(numbers, message):
    q, k, v, gradient = tensors(2, 2, 1, 8, 32)
    offsets = torch.tensor(numbers, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"offsets: .*{message}"):
        amx_attention.forward(q, k, v, offsets)
    with pytest.raises(ValueError, match=f"offsets: .*{message}"):
        amx_attention.backward(gradient, q, k, v, q, torch.zeros(2, 2, 8), offsets)


@pytest.mark.parametrize("offsets", [torch.tensor([0, 8]), torch.tensor([[0, 8]]).int()])
def test_offsets_of_another_kind_are_refused(offsets):
    q, k, v, _ = tensors(1, 2, 1, 8, 32)
    with pytest.raises(ValueError, match=r"offsets: must be torch.int32 \(S \+ 1,\) on the CPU"):
        amx_attention.forward(q, k, v, offsets)


WRONG_TENSORS = {
    "fp32": (lambda q, k, v: (q.float(), k, v), "q: must be bf16 on the CPU, not torch.float32"),
    "a narrow one": (lambda q, k, v: (q[..., :24], k, v), "D a multiple of 32, not .*24"),
    "three dimensions": (lambda q, k, v: (q[0], k, v), "q: must be .B, heads, T, D"),
    "strided in D": (lambda q, k, v: (q, k.mT.contiguous().mT, v), "stride of 1 in D, not 8"),
    "a shorter v": (lambda q, k, v: (q, k, v[:, :, :7]), "of one shape: .*'v': .1, 2, 7, 32"),
    "shorter keys": (lambda q, k, v: (q, k[:, :, :7], v[:, :, :7]), "q and k: must be"),
    "a head too many": (lambda q, k, v: (q[:, :3], k, v), "q and k: must be"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_tensors_that_it_cannot_read_are_refused(change, message):
    q, k, v, _ = tensors(1, 4, 2, 8, 32)
    with pytest.raises(ValueError, match=message):
        amx_attention.forward(*change(q, k, v))


def test_a_segment_too_long_is_refused(emulation, monkeypatch):
    monkeypatch.setattr(amx_attention, "load", lambda: emulation)
    monkeypatch.setattr(amx_attention, "LARGEST", 32 * 60)
    q, k, v, _ = tensors(1, 2, 1, 100, 32)
    amx_attention.forward(q, k, v, offsets_of([[60, 40]]))
    with pytest.raises(ValueError, match="a segment of 61 tokens is longer than 60"):
        amx_attention.forward(q, k, v, offsets_of([[61, 39]]))


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


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_operator_for_packed_documents_is_the_kernel(compiled):
    """With its gradients, traced as one graph for any number of documents."""
    run = amx_attention.activate(32)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, backend=graphs, dynamic=False, fullgraph=True)
    q, k, v, gradient = tensors(1, 4, 2, 200, 32)
    for starts in ([0, 200], [0, 70, 71, 200], [0, 1, 2, 64, 200]):
        offsets = torch.tensor(starts, dtype=torch.int32)
        torch._dynamo.mark_dynamic(offsets, 0)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = run(*leaves, offsets)
        out.backward(gradient)
        expected, lse = amx_attention.forward(q, k, v, offsets)
        grads = amx_attention.backward(gradient, q, k, v, expected, lse, offsets)
        for a, b in zip((out, *(x.grad for x in leaves)), (expected, *grads), strict=True):
            assert torch.equal(a, b)
    assert graphs.frame_count == compiled
