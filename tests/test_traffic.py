"""benchmarks/traffic.py: what it counts, against closed forms and the architecture."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))

import traffic
import traffic_compile
import traffic_count
import traffic_optimizer

SCRIPT = REPO / "benchmarks" / "traffic.py"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton cannot be imported: pip install --no-deps triton==3.6.0",
)

SMALL = ["MODEL_DIM=128", "NUM_HEADS=4", "NUM_KV_HEADS=2", "VOCAB_SIZE=256", "TRAIN_SEQ_LEN=64"]
SHAPES = {
    "baseline": ["NUM_LAYERS=2"],
    "pr369": ["NUM_LAYERS=3", "MLP_MULT=3", "XSA_LAST_N=2", "SMEAR_GATE=1", "BIGRAM_BUCKETS=64"],
}
LAYERS = {"baseline": 2, "pr369": 3}


def start(*arguments: object) -> subprocess.CompletedProcess:
    """Run the tool."""
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compile a small model once: what the tool printed, its report, and its folder."""
    done = {}

    def compile_once(shape: str) -> tuple[str, dict, Path]:
        if shape not in done:
            folder = tmp_path_factory.mktemp(shape)
            places = ["--out", folder / "found.json", "--code", folder / "code"]
            ended = start(*SMALL, *SHAPES[shape], "--tokens", 512, *places)
            assert ended.returncode == 0, ended.stderr[-3000:]
            report = json.loads((folder / "found.json").read_text())
            done[shape] = ended.stdout, report, folder / "code"
        return done[shape]

    return compile_once


each_shape = pytest.mark.parametrize("shape", SHAPES)


@needs_triton
@each_shape
def test_forward_and_backward_become_code_for_an_h100(compiled, shape):
    folder = compiled(shape)[2]
    assert sorted(path.name for path in folder.iterdir()) == ["backward.py", "forward.py"]
    for path in folder.iterdir():
        code = path.read_text()
        devices = set(re.findall(r"DeviceProperties\(type='(\w+)'.*? cc=(\d+)", code))
        assert devices == {("cuda", "90")}


@needs_triton
@each_shape
def test_every_launch_in_the_code_is_counted(compiled, shape):
    _, report, folder = compiled(shape)
    for name, graph in report["graphs"].items():
        code = (folder / f"{name}.py").read_text()
        assert graph["triton"]["launches"] == code.count(".run(") > 0
        assert graph["triton"]["unique"] == code.count("async_compile.triton(")
        assert graph["product"]["launches"] == code.count("extern_kernels.")


@needs_triton
@each_shape
def test_products_are_those_of_the_architecture(compiled, shape):
    """A layer has q, k, v, the output and two of the MLP; then the head and BigramHash's matrix.
    Each is one product forward; backward, one for the gradient of each factor."""
    maps = 6 * LAYERS[shape] + 1 + (shape == "pr369")
    report = compiled(shape)[1]
    launches = {name: graph["product"]["launches"] for name, graph in report["graphs"].items()}
    assert launches == {"forward": maps, "backward": 2 * maps}


@needs_triton
@each_shape
def test_attention_is_called_once_a_layer(compiled, shape):
    report = compiled(shape)[1]
    launches = {name: graph["attention"]["launches"] for name, graph in report["graphs"].items()}
    assert launches == {"forward": LAYERS[shape], "backward": LAYERS[shape]}


@needs_triton
@each_shape
def test_bytes_of_attention_are_those_of_its_tensors(compiled, shape):
    """q, k, v, the output and their gradients in bf16, and the logsumexp of each head in fp32."""
    q = 512 * 128 * 2
    kv = 512 * 64 * 2
    logsumexp = 512 * 4 * 4
    report = compiled(shape)[1]
    found = {name: graph["attention"] for name, graph in report["graphs"].items()}
    layers = LAYERS[shape]
    assert found["forward"]["bytes_read"] == layers * (q + 2 * kv)
    assert found["forward"]["bytes_written"] == layers * (q + logsumexp)
    assert found["backward"]["bytes_read"] == layers * (3 * q + 2 * kv + logsumexp)
    assert found["backward"]["bytes_written"] == layers * (q + 2 * kv)


@needs_triton
@each_shape
def test_counted_flops_are_those_of_the_model(compiled, shape):
    report = compiled(shape)[1]
    flops = sum(row["flops"] for row in report["totals"].values())
    assert flops == report["model_flops"]


@needs_triton
def test_the_floor_is_the_larger_of_arithmetic_and_memory(compiled):
    report = compiled("baseline")[1]
    assert report["floor_by"] == {
        "bytes_per_s": 3e12,
        "product_flops_per_s": 7e14,
        "attention_flops_per_s": 5e14,
    }
    expected = dict.fromkeys(report["totals"], 0.0)
    for group in report["kernels"]:
        moved = (group["reads"] + group["writes"]) / 3e9
        worked = group["flops"] / 7e11
        expected[group["kind"]] += group["launches"] * max(moved, worked)
    expected["attention"] = report["totals"]["attention"]["flops"] / 5e11
    expected["all"] = sum(expected.values())
    assert report["floor_ms"] == pytest.approx(expected)


@needs_triton
def test_the_tables_say_what_the_report_has(compiled):
    said, report, _ = compiled("baseline")
    triton = report["totals"]["triton"]
    assert f"| Triton kernels | {triton['launches']} | {triton['unique']} | " in said
    assert "a floor, not a time" in said
    first = next(group for group in report["kernels"] if group["kind"] == "triton")
    reads = first["reads"] / 1e6
    writes = first["writes"] / 1e6
    assert f"| {first['launches']} | {reads:.1f} | {writes:.1f} | " in said
    assert f"| {first['ops']} |" in said


@needs_triton
def test_a_forward_pass_alone_has_no_backward_graph(tmp_path):
    out = tmp_path / "found.json"
    ended = start(*SMALL, "NUM_LAYERS=1", "--tokens", 128, "--forward", "--out", out)
    assert ended.returncode == 0, ended.stderr[-3000:]
    report = json.loads(out.read_text())
    assert [*report["graphs"]] == ["forward"]
    assert sum(row["flops"] for row in report["totals"].values()) == report["model_flops"]


@needs_triton
def test_tokens_that_are_no_rows_are_refused():
    ended = start(*SMALL, "--tokens", 100)
    assert ended.returncode == 1
    problem = "--tokens 100: expected a multiple of TRAIN_SEQ_LEN=64"
    assert ended.stderr == f"traffic.py: error: {problem}\n"


# Each entry: the inputs, made by torch.empty; then the function.
TOYS = """
import json, sys
import torch
import torch.nn.functional as F
sys.path.insert(0, sys.argv[1])
import traffic_compile, traffic_device

half = torch.bfloat16
whole = torch.float32
numbers = torch.int64


def norm(x, w):
    return F.rms_norm(x.float() * w, (256,))


def rotation(x):
    return torch.cat((x[:, 32:64], -x[:, :32]), dim=-1)


def two_sums(x):
    return x.float().sum(0).to(half), (x.float() * 2).sum(1)


def two_lines(x, y):
    doubled = x.float() * 2
    return doubled + y


def shared(x):
    more = x + 1
    return more, x * 2


def layer(x, w):
    hidden = x @ w
    return hidden.relu()


def attended(x):
    q, k, v = (part.transpose(1, 2) for part in x.split((4, 2, 2), dim=2))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


cases = {
    "pointwise": (lambda x: x.float() + 1, [(1000, 256, half)]),
    "broadcast": (lambda x, y: x * y, [(1000, 256, half), (256, whole)]),
    "in place": (lambda x: x.add_(1), [(1000, 256, half)]),
    "reduction": (lambda x: x.float().sum(-1), [(1000, 256, half)]),
    "slices": (lambda x: x[:, :64] + x[:, 32:96], [(1000, 256, half)]),
    "rotation": (rotation, [(1000, 1024, half)]),
    "shift": (lambda x: x.roll(1, 1) + x, [(8, 100, 128, half)]),
    "large table": (lambda t, i: t[i] * 2, [(10000, 64, whole), (70, numbers)]),
    "small table": (lambda t, i: t[i] * 2, [(100, 64, whole), (7000, numbers)]),
    "embedding": (lambda w, i: F.embedding(i, w), [(100, 64, whole, True), (7000, numbers)]),
    "product": (lambda a, b: a @ b, [(512, 128, half), (128, 64, half)]),
    "product of a slice": (lambda a, b: a[:, 64:192] @ b, [(512, 512, half), (128, 64, half)]),
    "product of a row": (lambda a, b: a.expand(512, 128) @ b, [(1, 128, half), (128, 64, half)]),
    "norm": (norm, [(65536, 256, half, True), (256, whole)]),
    "two sums": (two_sums, [(65536, 512, half)]),
    "two lines": (two_lines, [(1000, 256, half), (1000, 256, half)]),
    "shared": (shared, [(1000, 256, half)]),
    "attended": (attended, [(8, 100, 8, 64, half, True)]),
    "exp": (torch.exp, [(1000, 256, whole, True)]),
    "addend": (torch.baddbmm, [(4, 64, 32, half), (4, 64, 16, half), (4, 16, 32, half)]),
    "symmetric": (lambda x: x @ x.mT, [(4, 64, 16, half)]),
    "layer": (layer, [(512, 128, half, True), (128, 64, half, True)]),
}


def patched():
    functions = F.rms_norm, F.scaled_dot_product_attention, torch.cuda._exchange_device
    # Fake tensors of their own put an idle guard into a CUDA build.
    guard = not torch.version.cuda and traffic_device.guard_table()[traffic_device.CUDA]
    return torch.cuda.is_available(), torch.version.cuda, guard, *functions


before = patched()
found = {}
charged = {}
kept = {}
for name, (function, inputs) in cases.items():
    tensors = []
    for given in inputs:
        wanted = given[-1] is True
        *shape, dtype = given[:-1] if wanted else given
        tensors.append(torch.zeros(shape, dtype=dtype, requires_grad=wanted))
    with traffic_device.cuda_operators():
        graphs = traffic_compile.compile_functions(function, tensors, __file__)
    for graph in graphs:
        kernels = [(k.kind, k.reads, k.writes, k.flops) for k in graph.kernels]
        found[f"{name}, {graph.name}"] = kernels
        charges = [c for k in graph.kernels for c in k.charges]
        sums = [(c.place[:1], float(c.launches), c.reads, c.writes) for c in charges]
        charged[f"{name}, {graph.name}"] = sums
        kept[f"{name}, {graph.name}"] = [graph.saved, graph.gradients]
print(json.dumps([found, before == patched(), charged, kept]))
"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Compile small functions in one process: (kind, read, written, FLOPs) of their kernels,
    whether the process is as it was, and what their lines are charged."""
    script = tmp_path_factory.mktemp("toys") / "toys.py"
    script.write_text(TOYS)
    command = [sys.executable, script, SCRIPT.parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


N = 1000 * 256
X = 65536 * 256
ROOTS = 65536 * 4
Q = 2 * 8 * 100 * 4 * 64
KV = 2 * 8 * 100 * 2 * 64
LSE = 4 * 8 * 100 * 4
A = 2 * 4 * 64 * 16
B = 2 * 4 * 16 * 32
C = 2 * 4 * 64 * 32
EXPECTED = {
    "pointwise, forward": [["triton", 2 * N, 4 * N, 0]],
    "broadcast, forward": [["triton", 2 * N + 4 * 256, 4 * N, 0]],
    "in place, forward": [["triton", 2 * N, 2 * N, 0]],
    "reduction, forward": [["triton", 2 * N, 4 * 1000, 0]],
    "slices, forward": [["triton", 2 * 96 * 1000, 2 * 64 * 1000, 0]],
    "rotation, forward": [["triton", 2 * 64 * 1000, 2 * 64 * 1000, 0]],
    "shift, forward": [["triton", 2 * 8 * 100 * 128, 2 * 8 * 100 * 128, 0]],
    "large table, forward": [["triton", 4 * 70 * 64 + 8 * 70, 4 * 70 * 64, 0]],
    "small table, forward": [["triton", 4 * 100 * 64 + 8 * 7000, 4 * 7000 * 64, 0]],
    # The gradient is set to 0, and each token's is added to its row: read, and written.
    "embedding, backward": [
        ["triton", 0, 4 * 100 * 64, 0],
        ["triton", 8 * 7000 + 4 * 7000 * 64 + 4 * 100 * 64, 4 * 100 * 64, 0],
    ],
    "product of a row, forward": [
        ["product", 2 * (128 + 128 * 64), 2 * 512 * 64, 2 * 512 * 128 * 64]
    ],
    "product, forward": [["product", 2 * (512 * 128 + 128 * 64), 2 * 512 * 64, 2 * 512 * 128 * 64]],
    "product of a slice, forward": [
        ["product", 2 * (512 * 128 + 128 * 64), 2 * 512 * 64, 2 * 512 * 128 * 64]
    ],
    # Partial sums of 32 rows go through a workspace, which PyTorch's own kernel adds up.
    "two sums, forward": [
        ["triton", 2 * 65536 * 512, 4 * 65536 + 4 * 2048 * 512, 0],
        ["other", 4 * 2048 * 512, 4 * 512, 0],
        ["triton", 4 * 512, 2 * 512, 0],
    ],
    # Slices of one tensor are read where they are; the gradients are tensors of their own.
    "attended, forward": [["attention", Q + 2 * KV, Q + LSE, 0]],
    "attended, backward": [
        ["attention", 3 * Q + 2 * KV + LSE, Q + 2 * KV, 0],
        ["triton", Q + 2 * KV, Q + 2 * KV, 0],
    ],
    # PyTorch copies the addend into the result, and adds to that.
    "addend, forward": [
        ["other", C, C, 0],
        ["product", A + B + C, C, 2 * 4 * 64 * 16 * 32],
    ],
    "symmetric, forward": [["product", A, 2 * 4 * 64 * 64, 2 * 4 * 64 * 16 * 64]],
    "norm, forward": [["triton", 2 * X + 4 * 256, 4 * X + ROOTS, 0]],
    "norm, backward": [["triton", 2 * X + 4 * X + 4 * 256 + ROOTS, 2 * X, 0]],
}


@needs_triton
@pytest.mark.parametrize("name", EXPECTED)
def test_bytes_and_flops_equal_a_closed_form(toys, name):
    assert toys[0][name] == EXPECTED[name]


def line_of(text: str) -> list[int]:
    """The number of the line of the toys that has this text."""
    (found,) = [i for i, line in enumerate(TOYS.splitlines(), 1) if text in line]
    return [found]


def charges_of(toys: list, name: str) -> list[list]:
    """What is charged to the lines of a toy: (place, launches, read, written)."""
    return sorted(toys[2][name])


@needs_triton
def test_a_read_is_charged_to_the_line_that_loads_and_a_write_to_the_one_that_stores(toys):
    first = [line_of("doubled = x"), 0.5, 2 * N, 0]
    second = [line_of("doubled + y"), 0.5, 2 * N, 4 * N]
    assert charges_of(toys, "two lines, forward") == [first, second]


@needs_triton
def test_a_read_for_two_lines_is_charged_to_both(toys):
    first = [line_of("more = x"), 0.5, N, 2 * N]
    second = [line_of("more, x * 2"), 0.5, N, 2 * N]
    assert charges_of(toys, "shared, forward") == [first, second]


@needs_triton
def test_the_backward_pass_is_charged_to_the_lines_of_the_forward_pass(toys):
    """The gradient behind relu goes into two products: for x, and for w."""
    x, w, y = 2 * 512 * 128, 2 * 128 * 64, 2 * 512 * 64
    product = line_of("hidden = x")
    relu = [line_of("hidden.relu()"), 1.0, y + y // 2, y]  # whether it is 0, in a byte each
    assert charges_of(toys, "layer, backward") == sorted(
        [[product, 1.0, y + x, w], [product, 1.0, y + w, x], relu]
    )


@needs_triton
def test_what_is_kept_for_the_backward_pass_is_counted(toys):
    """exp keeps its result; a layer keeps whether relu's is 0, in bytes, beside its inputs."""
    assert toys[3]["exp, backward"] == [[4 * N], [4 * N]]
    assert toys[3]["layer, backward"] == [[512 * 64], [2 * 512 * 128, 2 * 128 * 64]]


@needs_triton
@each_shape
@pytest.mark.parametrize("table", ["lines", "calls", "functions"])
def test_what_lines_are_charged_adds_up_to_the_totals(compiled, shape, table):
    report = compiled(shape)[1]
    for name in ("bytes_read", "bytes_written"):
        charged = sum(row[name] for row in report[table])
        assert charged == sum(kind[name] for kind in report["totals"].values())
    launches = sum(kind["launches"] for kind in report["totals"].values())
    assert sum(row["launches"] for row in report[table]) == pytest.approx(launches)
    assert sum(row["share"] for row in report[table]) == pytest.approx(1)


@needs_triton
@each_shape
def test_all_traffic_is_of_lines_of_the_script(compiled, shape):
    report = compiled(shape)[1]
    source = (REPO / "train_gpt.py").read_text().splitlines()
    for row in report["lines"]:
        assert row["source"] == source[row["line"] - 1].strip()
    assert all(row["line"] and row["function"] for row in report["lines"])


@needs_triton
@each_shape
def test_products_are_charged_to_the_lines_that_call_them(compiled, shape):
    report = compiled(shape)[1]
    lines = [row for row in report["lines"] if row["flops"]]
    assert all("F.linear(" in row["source"] for row in lines)
    assert sum(row["flops"] for row in lines) == report["totals"]["product"]["flops"]


@needs_triton
def test_nothing_stays_patched(toys):
    assert toys[1] is True


def made_kernel(kind: str, reads: int = 0, writes: int = 0, flops: int = 0):
    return traffic_count.Kernel(kind, kind, kind, reads, writes, flops)


def test_given_ceilings_make_the_floor():
    by = traffic.Ceilings(1e9, 2e9, 4e9)
    kernels = [made_kernel("triton", 2_000_000, 1_000_000), made_kernel("product", 7, 0, 8_000_000)]
    floor = traffic.floor_ms(kernels, 8e6, by)
    assert floor == {"triton": 3.0, "product": 4.0, "attention": 2.0, "other": 0.0, "all": 9.0}


def test_ceilings_are_in_tera():
    given = ["--tb-per-s", "2", "--product-tflops", "300", "--attention-tflops", "200"]
    assert traffic.read_arguments(given).ceilings == traffic.Ceilings(2e12, 300e12, 200e12)


def test_a_ceiling_of_0_is_refused():
    ended = start("--tb-per-s", 0)
    assert ended.returncode == 2
    assert "--tb-per-s, --product-tflops, --attention-tflops: expected more than 0" in ended.stderr


# =========================== BEFORE AND AFTER ===========================


@needs_triton
def test_a_script_against_itself_gives_ratios_of_1(tmp_path):
    out = tmp_path / "both.json"
    script = REPO / "train_gpt.py"
    ended = start(*SMALL, "NUM_LAYERS=1", "--tokens", 128, "--vs", script, "--out", out)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(out.read_text())
    for name in ("totals", "floor_ms", "saved_bytes", "lines", "optimizer"):
        assert found["before"][name] == found["after"][name]
    rows = [line.split(" | ") for line in ended.stdout.splitlines() if line.startswith("| all ")]
    assert [[row[i].strip(" |") for i in (3, 6, 9)] for row in rows] == [["1.000"] * 3] * 2


def test_the_script_of_a_commit_is_that_of_git(tmp_path):
    shown = subprocess.run(["git", "-C", REPO, "show", "HEAD:train_gpt.py"], capture_output=True)
    if shown.returncode:
        pytest.skip("a copy of the repository that has no commit")
    script = traffic.traffic_compare.script_of("HEAD", tmp_path)
    assert script.read_bytes() == shown.stdout


OTHER = """
class UserError(Exception):
    pass

class GPT:
    pass

def load_settings(environ, check_places):
    raise UserError("NUM_LAYERS=1: no such setting")
"""


@needs_triton
@pytest.mark.parametrize(
    ("option", "content", "problem"),
    [
        ("--vs", None, "--vs {}: neither a file nor a commit, branch or tag"),
        ("--vs", OTHER, "--vs {}: NUM_LAYERS=1: no such setting"),
        ("--script", None, "{}: there is no such script"),
        (
            "--script",
            "GPT = 1",
            "{}: not a train_gpt.py of this project: it has no load_settings, ",
        ),
    ],
)
def test_another_script_that_cannot_be_counted_is_refused(tmp_path, option, content, problem):
    script = tmp_path / "other.py"
    if content:
        script.write_text(content)
    ended = start(*SMALL, "NUM_LAYERS=1", "--tokens", 128, option, script)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"traffic.py: error: {problem.format(script)}")


# ======================== THE REST OF A STEP ========================


@needs_triton
@each_shape
def test_the_rest_of_a_step_is_counted(compiled, shape):
    found = compiled(shape)[1]["optimizer"]
    assert "problem" not in found
    launches = sum(row["launches"] for row in found["totals"].values())
    assert sum(row["launches"] for row in found["operators"]) == launches > 0
    assert sum(row["launches"] for row in found["lines"]) == pytest.approx(launches)
    assert found["totals"]["product"]["flops"] > 0


def test_a_script_with_another_trainer_has_a_problem():
    args = traffic.read_arguments([])
    tg = SimpleNamespace(__file__="other.py")
    found = traffic.optimizer_report(args, tg, None)
    assert found["problem"].startswith("AttributeError: ")


@pytest.mark.parametrize(
    ("sizes", "lists", "launches"),
    [
        ([10] * 110, 1, 1),
        ([10] * 111, 1, 2),
        ([10] * 65, 2, 2),
        ([10] * 90, 5, 3),
        ([65536 * 320], 1, 1),
        ([65536 * 320 + 1], 1, 2),
        ([65536 * 200, 65536 * 200, 65536 * 200], 3, 2),
        ([], 1, 0),
    ],
)
def test_lists_of_tensors_are_cut_into_launches(sizes, lists, launches):
    """At most 110, 64, 48, 36, 30 tensors, and 320 chunks of 65,536 elements, are in one."""
    assert traffic_optimizer.list_launches(sizes, lists) == launches


def record(function) -> list[tuple[str, int, int]]:
    """Record what a function does on fake tensors of a CUDA device: operator, read, written."""
    with traffic_optimizer.fake_cuda():
        recorder = traffic_optimizer.Recorder(__file__)
        with traffic_compile.watched(recorder.watch), recorder:
            function(lambda *shape, **options: torch.empty(*shape, device="cuda", **options))
    recorder.add_compiled()
    return [(kernel.name, kernel.reads, kernel.writes) for kernel in recorder.kernels]


def two_products(empty):
    a, b, c = empty(2, 8, 4), empty(2, 4, 16), empty(2, 8, 16)
    torch.bmm(a, a.mT)
    torch.baddbmm(c, a, b)


def lists_of(empty, *dtypes):
    x = [empty(10, dtype=dtype) for dtype in dtypes]
    torch._foreach_add_(x, x[::-1])


OPERATORS = {
    "view": (lambda empty: empty(8, 4).view(4, 8).mT, []),
    "in place": (lambda empty: empty(8, 4).add_(1), [("add_", 128, 128)]),
    "fill": (lambda empty: empty(8, 4).zero_(), [("zero_", 0, 128)]),
    "like": (lambda empty: torch.zeros_like(empty(8, 4)), [("zeros_like", 0, 128)]),
    "expanded": (lambda empty: empty(1, 4).expand(8, 4) * 2, [("mul", 16, 128)]),
    "host": (lambda empty: torch.ones(8) + 1, []),
    "products": (
        two_products,
        [("bmm", 256, 512), ("copy for baddbmm", 1024, 1024), ("baddbmm", 1792, 1024)],
    ),
    "list": (
        lambda empty: lists_of(empty, torch.float32, torch.float32),
        [("_foreach_add_", 80, 80)],
    ),
    "list of two types": (
        lambda empty: lists_of(empty, torch.float32, torch.bfloat16),
        [("_foreach_add_", 30, 30)] * 2,
    ),
    "cat": (lambda empty: torch.cat([empty(1)] * 130), [("cat", 2, 260), ("cat", 2, 260)]),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_that_reach_the_device_are_counted(name):
    function, expected = OPERATORS[name]
    assert record(function) == expected


@needs_triton
def test_a_compiled_function_is_counted_as_its_kernels_at_each_call():
    def twice(empty):
        compiled = torch.compile(lambda x, add=0: (x + add) * 2)
        for _ in range(2):
            compiled(empty(8, 4), add=3)

    found = record(twice)
    assert [kernel[1:] for kernel in found] == [(128, 128)] * 2
    assert found[0][0].startswith("triton_")


def test_without_triton_it_says_what_to_install():
    code = "import runpy, sys; sys.modules['triton'] = None; sys.path[0] = sys.argv[1]; "
    code += "sys.argv = ['traffic.py']; runpy.run_module('traffic', run_name='__main__')"
    command = [sys.executable, "-c", code, SCRIPT.parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    problem = "triton cannot be imported: pip install --no-deps triton==3.6.0"
    assert (done.returncode, done.stderr) == (1, f"traffic.py: error: {problem}\n")
