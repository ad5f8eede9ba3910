"""benchmarks/gpu.py: phases that fail apart, results on the disk, .gpu, and what is measured."""

import base64
import hashlib
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO

BENCHMARKS = REPO / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_kit  # noqa: E402
import gpu_phases  # noqa: E402

import train_gpt  # noqa: E402

WORKER = """
import importlib.util, json, os, signal, subprocess, sys, time
name, job, out = sys.argv[1:]


def write(**found):
    with open(out + ".new", "w") as file:
        json.dump(found, file)
    os.replace(out + ".new", out)


if name == "good":
    write(status="ok", headline="fine", rows=[["a | b", "1 ms"]], figures={"x": 1})
if name == "bad":
    write(status="ok", rows=[["before", "2 ms"]])
    sys.exit("no kernel for this")
if name == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "hang":
    write(rows=[["before", "3 ms"]])
    sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
    child = subprocess.Popen(sleep, start_new_session=True)
    print("child", child.pid, flush=True)
    time.sleep(100)
if name == "cuda":
    write(status="needs CUDA", rows=[["kernels", "needs CUDA"]])
if name == "look":
    with open(os.path.join(os.path.dirname(out), "gpu.json")) as file:
        write(status="ok", figures=json.load(file)["phases"])
if name == "tell":
    found = importlib.util.find_spec("birdie_wheel") is not None
    write(status="ok", figures={"env": dict(os.environ), "job": json.load(open(job)), "new": found})
"""

ABOUT = """
import json, sys
with open(sys.argv[1], "w") as file:
    json.dump({about}, file)
"""
CPU = {"versions": {"torch": "2.0"}, "card": {}, "driver": []}
H100 = {"name": "NVIDIA H100", "memory_gib": 79.1}


def alive(pid: int) -> bool:
    """Whether a process runs, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Run the tool with phases of a fake worker, of so many seconds; its report and exit code."""
    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    worker, about = tmp_path / "worker.py", tmp_path / "about.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(gpu, "WORKER", worker)
    monkeypatch.setattr(gpu, "ABOUT", about)
    monkeypatch.setattr(gpu_kit, "KIT", tmp_path / "kit")

    def start(
        names: str, *arguments: str, limit: float = 20, data: bool = False, about_it: dict = CPU
    ) -> tuple[dict, int]:
        about.write_text(ABOUT.format(about=repr(about_it)))
        phases = [gpu.Phase(name, limit, 0.5, data) for name in names.split()]
        monkeypatch.setattr(gpu, "PHASES", tuple(phases))
        out = tmp_path / "out"
        code = gpu.main(["--out", str(out), *arguments])
        return json.loads((out / "gpu.json").read_text()), code

    yield start
    for number, handler in kept.items():
        signal.signal(number, handler)


def statuses(report: dict) -> dict[str, str]:
    return {name: found["status"] for name, found in report["phases"].items()}


# ---- phases


def test_a_phase_that_fails_or_crashes_stops_no_other_and_leaves_what_it_found(bench):
    report, code = bench("bad crash good")
    assert statuses(report) == {"bad": "failed", "crash": "failed", "good": "ok"}
    assert report["phases"]["bad"]["rows"] == [["before", "2 ms"]]
    assert report["phases"]["bad"]["output"] == ["no kernel for this"]
    assert "Segmentation fault" in "".join(report["phases"]["crash"]["output"])
    assert report["phases"]["good"]["figures"] == {"x": 1}
    assert code == 1


def test_a_phase_that_hangs_is_ended_with_all_that_it_started(bench):
    report, code = bench("hang good", limit=1.5)
    assert statuses(report) == {"hang": "timeout", "good": "ok"}
    assert report["phases"]["hang"]["rows"] == [["before", "3 ms"]]
    output = "\n".join(report["phases"]["hang"]["output"])
    assert re.search(r"most recent call first.*\n.*worker.py", output)
    assert not alive(int(re.findall(r"child (\d+)", output)[0]))
    assert code == 1


def test_results_are_on_the_disk_while_a_later_phase_runs(bench):
    report, _ = bench("good look")
    assert report["phases"]["look"]["figures"] == {"good": report["phases"]["good"]}


def test_the_budget_of_the_whole_is_kept(bench):
    start = time.monotonic()
    report, code = bench("hang good", "--seconds", "1.5")
    assert time.monotonic() - start < 6
    assert statuses(report) == {"hang": "timeout", "good": "no time left"}
    assert code == 1


def test_the_exit_code_is_0_if_nothing_failed(bench):
    report, code = bench("good cuda")
    assert statuses(report) == {"good": "ok", "cuda": "needs CUDA"}
    assert code == 0


DRIVER = """
import sys
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
import gpu
gpu.PHASES = tuple(gpu.Phase(name, 60, 0.5) for name in ("good", "hang", "look"))
gpu.WORKER, gpu.ABOUT = Path("worker.py").resolve(), Path("about.py").resolve()
sys.exit(gpu.main(["--out", "out"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_all_results_written(number, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "about.py").write_text(ABOUT.format(about=repr(CPU)))
    command = [sys.executable, "-c", DRIVER.format(benchmarks=str(BENCHMARKS))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "out/running.json").exists() or "good" not in read(tmp_path)["phases"]:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(number)
    printed = process.communicate(timeout=20)[0]
    report = read(tmp_path)
    assert process.returncode == 1
    assert statuses(report) == {"good": "ok", "hang": "failed", "look": "no time left"}
    row = f"interrupted by {number.name} |"
    assert row in printed.partition("# no GPU")[2]
    assert row in (tmp_path / "out/gpu.md").read_text()


def read(folder: Path) -> dict:
    """The report, as far as it is written."""
    path = folder / "out/gpu.json"
    return json.loads(path.read_text()) if path.exists() else {"phases": {}}


def test_a_gpu_that_pytorch_cannot_use_is_told_at_once(bench):
    about = {"driver": ["NVIDIA H100"], "card": {"problem": "driver too old"}}
    report, _ = bench("environment good", about_it=about)
    assert statuses(report)["good"] == "needs CUDA"
    assert "driver too old" in report["problems"][0]


def test_phases_know_whether_there_is_a_gpu(bench, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    told = []
    for card, given in ((H100, []), ({}, []), (H100, ["DEVICE=cpu"])):
        report, _ = bench("tell", *given, about_it={"card": card})
        found = report["phases"]["tell"]["figures"]
        told.append((found["job"]["tiny"], found["env"].get("OMP_NUM_THREADS")))
    assert told == [(False, None), (True, "1"), (True, "1")]


def test_only_what_is_given_reaches_a_phase(bench, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    report, _ = bench("tell", "SEED=5", "DATA_PATH=here")
    found = report["phases"]["tell"]["figures"]
    assert not {"RANK", "MASTER_ADDR"} & found["env"].keys()
    assert found["job"]["given"] == {"SEED": "5", "DATA_PATH": str(Path("here").absolute())}


def test_all_phases_share_an_empty_compile_cache_unless_one_is_named(bench, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # compiling sets it
    report, _ = bench("tell")
    cache = report["phases"]["tell"]["figures"]["env"]["TORCHINDUCTOR_CACHE_DIR"]
    assert (report["compile_cache"], Path(cache).exists()) == ("empty", False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    report, _ = bench("tell")
    assert report["phases"]["tell"]["figures"]["env"]["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    assert report["compile_cache"] == "used before"


def test_a_long_log_keeps_its_beginning_and_end(tmp_path):
    path = tmp_path / "log"
    path.write_text("first" + "x" * 10_000 + "last")
    text = gpu.capped(path, 100)
    assert text.startswith("first")
    assert text.endswith("last")
    assert len(text) < 200
    assert gpu.capped(path, 20_000) == path.read_text()


def test_three_files_come_back(bench, tmp_path):
    bench("good bad")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["all.log", "gpu.json", "gpu.md"]
    assert "==== bad\nno kernel for this" in (tmp_path / "out/all.log").read_text()


def test_the_table_names_the_card_and_breaks_at_no_cell(bench, tmp_path, capsys):
    bench("good bad cuda", about_it={"card": H100})
    text = (tmp_path / "out/gpu.md").read_text()
    assert text.startswith("# NVIDIA H100, 79.1 GiB\n")
    assert "| good | ok | 0 | fine |" in text
    assert "| a \\| b | 1 ms |" in text
    assert "| kernels | needs CUDA |" in text
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--phases", "attention,nap"], "nap: no such phase; there are environment"),
        (["what"], "expected NAME=VALUE"),
        (["--seconds", "0"], "expected a number over 0"),
    ],
)
def test_an_impossible_command_line_is_refused(arguments, problem, capsys):
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert problem in capsys.readouterr().err


# ---- the real thing


def start_real(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", "out", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_the_command_runs_on_a_cpu_and_names_all_that_figures_depend_on(tmp_path):
    done = start_real("--phases", "attention,collectives", "DEVICE=cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    report = read(tmp_path)
    assert statuses(report) == {"attention": "ok", "collectives": "ok"}
    assert report["versions"]["torch"] == metadata.version("torch")
    names = {"python", "torch", "triton", "cuda", "cudnn", "nccl", "numpy", "zstandard"}
    assert names <= report["versions"].keys()
    assert report["versions"]["cuda"] == (torch.version.cuda or "missing")
    assert {"cpu", "cores", "memory_gib"} <= report["machine"].keys()
    assert report["commit"] == (gpu_kit.git("rev-parse", "HEAD") or "unknown")
    rows = dict(report["phases"]["attention"]["rows"])
    assert rows["cudnn against float64"] == "needs CUDA"
    assert rows["default against float64"].startswith("right at T 64, 100, 192, both layouts")
    timed = dict(report["phases"]["collectives"]["rows"])
    assert re.fullmatch(r"[\d.,]+ µs, 16 bytes", timed["clock: all_reduce of 2 doubles"])


def test_a_misspelt_setting_is_told_before_anything_runs(tmp_path):
    done = start_real("NUM_LAYERZ=2", "SEED=x")
    assert done.returncode == 1
    assert "NUM_LAYERZ=2: no such setting" in done.stderr
    assert "SEED=x: expected a whole number" in done.stderr
    assert read(tmp_path)["phases"] == {}


@pytest.fixture
def job(dataset):
    """What gpu.py asks a phase for on a CPU, on the tiny dataset."""
    data = {"DATA_PATH": str(dataset.folder), "TOKENIZER_PATH": str(dataset.tokenizer)}
    given = {"VOCAB_SIZE": "512", "ITERATIONS": "4"}
    return gpu_phases.Job(tiny=True, given=given, data={"1024": data}, tflops=2.0)


@pytest.fixture
def report(tmp_path):
    return gpu_phases.Report(tmp_path / "answer.json")


def test_the_baseline_is_trained_to_its_score(job, report, capfd, monkeypatch):
    monkeypatch.setenv("NUM_LAYERS", "0")
    gpu_phases.baseline(report, job)
    figures, rows = report.found["figures"], dict(report.found["rows"])
    assert report.found["status"] == "ok"
    assert len(figures["steps_ms"]) == 2
    assert figures["mfu"] > 0
    assert figures["artifact_bytes"] > 10_000
    assert abs(figures["val_bpb"] - figures["roundtrip_val_bpb"]) < 0.1
    assert rows["attention"] == figures["attention"] in ("sdpa", "amx")
    assert "step:4/4 train_loss" in capfd.readouterr().out


def test_a_step_is_taken_apart(job, report):
    gpu_phases.profile(report, job)
    rows, figures = dict(report.found["rows"]), report.found["figures"]
    assert report.found["status"] == "ok"
    assert rows["kernels a step"] == rows["peak GPU memory, MiB"] == "needs CUDA"
    assert sum(line["percent"] for line in figures["heaviest"]) <= 100.01
    assert [*figures["parts_ms"]] == [*gpu_phases.measure.PARTS]


def test_attention_within_documents_is_checked_and_timed(report, job):
    gpu_phases.documents(report, job)
    assert report.found["status"] == "ok"
    rows = dict(report.found["rows"])
    assert rows["pieces of up to 192 against float64"].startswith("right; ")
    assert [*report.found["figures"]["milliseconds"]] == ["whole rows, T 192", "pieces, T 192"]


def test_attention_over_the_edges_of_documents_is_found(report, job, monkeypatch):
    def whole(q, k, v, documents=None):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    monkeypatch.setattr(gpu_phases.tg, "attend", whole)
    gpu_phases.check_pieces(report, 192, "cpu")
    assert report.found["status"] == "failed"


def test_a_step_with_documents_apart_is_timed_beside_one_without(report, job):
    gpu_phases.isolation(report, job)
    assert [what for what, _ in report.found["rows"]] == [
        *("a step, dense", "a step, isolated", "a step, isolated, shuffled"),
    ]
    assert all(len(times) == 3 for times in report.found["figures"]["steps_ms"].values())


def test_ways_of_scoring_are_measured_on_documents_as_long_as_finewebs(job, report):
    gpu_phases.evaluation(report, job)
    titles = [what for what, _ in report.found["rows"]]
    assert titles == [
        *("plain pass", "windows, stride 16"),
        *("documents apart, stride 16", "windows one at a time"),
    ]


FAILING = """
import os, sys
print("python:3 torch:2 attention:fa9")
print("warning: slow")
for step in range(1, 5):
    print(f"step:{step}/4 train_loss:5.0 train_time:{10 * step}ms step_avg:10.00ms")
print("peak memory allocated: 77 MiB reserved: 80 MiB")
sys.exit("the disk is full")
"""


def test_a_run_that_fails_at_its_end_leaves_its_step_times(job, report, monkeypatch, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(FAILING)
    monkeypatch.setattr(gpu_phases.run_process, "SCRIPT", script)
    gpu_phases.baseline(report, job)
    rows = dict(report.found["rows"])
    assert report.found["status"] == "failed"
    assert rows["step, ms"] == "10 (10 to 10)"
    assert rows["peak GPU memory (PyTorch's), MiB"] == "needs CUDA"
    assert (rows["attention"], rows["warning"]) == ("fa9", "warning: slow")
    assert "the disk is full" in rows["run"]


def test_the_peak_memory_that_a_run_logs_is_told_where_there_is_a_gpu(
    job, report, monkeypatch, tmp_path
):
    script = tmp_path / "train.py"
    script.write_text(FAILING)
    monkeypatch.setattr(gpu_phases.run_process, "SCRIPT", script)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu_phases.baseline(report, job)
    assert dict(report.found["rows"])["peak GPU memory (PyTorch's), MiB"] == "77"


def test_sizes_of_a_pass_are_compared(job, report, monkeypatch):
    asked = []

    def train(settings, tflops):
        asked.append(settings)
        figures = {"step_ms": 5.0, "tokens_per_s": 1e6, "mfu": None, "host_mib": 9.0}
        figures |= {"smi_gpu_mib": None, "script_gpu_mib": 7.0 if len(asked) == 3 else None}
        return figures, "it broke" if len(asked) == 2 else ""

    monkeypatch.setattr(gpu_phases, "train", train)
    gpu_phases.microbatch(report, job)
    assert [s.get("MICRO_BATCH_TOKENS") for s in asked] == ["256", "512", "1024", None]
    rows = report.found["rows"]
    assert rows[0][1] == "5.0000 ms a step, 1,000,000 tokens/s, 9 MiB of host memory"
    assert rows[1][1] == "failed: it broke"
    assert rows[2][1] == "5.0000 ms a step, 1,000,000 tokens/s, 7 MiB of GPU memory"
    assert rows[4] == ["compiled", "needs CUDA"]
    assert "--prepare" in rows[5][1]


PYTEST = """
import pytest
@pytest.mark.parametrize("n", [1, 2])
def test_good(n): pass
{bad}
@pytest.mark.skip(reason="no CUDA device")
def test_skipped(): pass
"""


@pytest.mark.parametrize(
    ("text", "told", "status"),
    [
        (PYTEST.format(bad=""), "2 passed, 1 skipped", "ok"),
        (PYTEST.format(bad="def test_bad(): assert 0"), "2 passed, 1 failed, 1 skipped", "failed"),
        ("import pytest\n@pytest.mark.skip\ndef test_a(): pass", "1 skipped", "needs CUDA"),
        ("import nothing_of_that_name", "no test ran", "failed"),
    ],
)
def test_the_tests_are_counted(text, told, status, job, report, monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_gpu.py").write_text(text)
    monkeypatch.setattr(gpu_phases, "ROOT", tmp_path)
    gpu_phases.tests(report, job)
    assert report.found["headline"] == told
    assert report.found["status"] == status
    failed = ["tests/test_gpu.py::test_bad"] if "bad" in text else []
    assert report.found["figures"]["failed"] == failed


def test_a_row_that_fails_ends_no_phase(report):
    with report.attempt("first"):
        raise RuntimeError("an illegal memory access\nwas encountered")
    report.row("second", "5 ms")
    assert json.loads(report.path.read_text()) == {
        "status": "failed",
        "headline": "first: an illegal memory access was encountered",
        "rows": [
            ["first", "failed: an illegal memory access was encountered"],
            ["second", "5 ms"],
        ],
        "figures": {},
    }


def test_variables_that_would_be_settings_are_forgotten(monkeypatch):
    for name in ("SEED", "SEEDS", "CONFIG", "HOME"):
        monkeypatch.setenv(name, "1")
    gpu_phases.clean_environment()
    assert {"SEED", "SEEDS", "CONFIG", "HOME"} & os.environ.keys() == {"HOME"}


def test_no_variable_is_forgotten_for_what_is_wrong_elsewhere(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(train_gpt.UserError, match="LOCAL_RANK=3"):
        train_gpt.load_settings({}, check_places=False)
    gpu_phases.clean_environment()
    assert "HOME" in os.environ


def test_what_is_given_wins_but_for_what_a_row_varies(job):
    settings = job.settings({"NUM_LAYERS": "11", "VOCAB_SIZE": "9"}, ITERATIONS="7")
    assert (settings["VOCAB_SIZE"], settings["ITERATIONS"]) == ("512", "7")
    assert settings["NUM_LAYERS"] == gpu_phases.TINY["NUM_LAYERS"]
    large = gpu_phases.Job(False, {}, {}, None).settings({"NUM_LAYERS": "11"})
    assert (large["NUM_LAYERS"], large["ITERATIONS"]) == ("11", "20")


def test_the_settings_of_all_runs_on_a_gpu_are_valid():
    large = gpu_phases.Job(tiny=False, given={}, data={}, tflops=None)
    shapes = [{}, gpu_phases.record_shape(), gpu_phases.WIDE | {"VOCAB_SIZE": "8192"}]
    runs = [large.settings(shape) for shape in shapes]
    runs += [large.settings(**row) for row in gpu_phases.variants(large).values()]
    found = [train_gpt.load_settings(settings, check_places=False) for settings in runs]
    assert [hp.micro_batch_tokens for hp in found[3:6]] == [65536, 131072, 262144]
    assert (found[1].train_seq_len, found[1].xsa_last_n, found[1].eval_stride) == (2048, 4, 0)
    assert {hp.device for hp in found} == {"auto"}


def test_a_kernel_that_does_not_run_here_is_told_and_ends_nothing(report):
    usable = gpu_phases.correctness(report, "cpu", gpu_phases.ON_CUDA, 64)
    rows = dict(report.found["rows"])
    assert rows["cudnn against float64"].startswith("not available: ")
    assert rows["flash against float64"].startswith("right at T 64, both layouts; at worst 0.")
    assert report.found["status"] == "ok"
    assert {"default", "flash"} <= {*usable}
    assert "cudnn" not in usable


def test_a_kernel_that_pytorch_takes_and_is_wrong_fails_the_phase(report, monkeypatch):
    monkeypatch.setattr(gpu_phases, "WRONG", 1e-9)
    gpu_phases.correctness(report, "cpu", ("default",), 64)
    assert "T 64 BHTD: WRONG in o, dq, dk, dv" in report.found["rows"][0][1]
    assert report.found["status"] == "failed"


def test_a_kernel_that_is_wrong_at_the_last_position_alone_is_found():
    inputs = gpu_phases.attention_inputs(1, 64, "BTHD", "cpu")
    exact = gpu_phases.attention_results(inputs, "math", torch.float64)
    ours = gpu_phases.attention_results(inputs, "default", torch.bfloat16)
    assert gpu_phases.verdict(gpu_phases.errors_of(ours, exact)) == "right"
    ours[2][:, -1] *= 1.05
    assert gpu_phases.verdict(gpu_phases.errors_of(ours, exact)) == "WRONG in dk"
    ours[2][:, -1] = float("nan")
    assert gpu_phases.verdict(gpu_phases.errors_of(ours, exact)) == "WRONG in dk"


def test_layouts_differ_in_memory_alone():
    contiguous, views = (gpu_phases.attention_inputs(2, 8, n, "cpu") for n in gpu_phases.LAYOUTS)
    assert contiguous[0].is_contiguous()
    assert not views[0].is_contiguous()
    assert torch.equal(contiguous[0], views[0])


def event(name: str, start: float, end: float, device: str = "CUDA", region: bool = False):
    """An event as the profiler tells it."""
    from torch.autograd.profiler_util import FunctionEvent

    kind = getattr(torch.autograd.DeviceType, device)
    more = {"device_type": kind, "is_user_annotation": region}
    return FunctionEvent(0, name, 0, start, end, **more)


def test_kernels_are_told_from_regions_and_what_the_host_does():
    """The compiler's kernels have the names of what launches them."""
    events = [
        event("triton_poi_0", 0, 1, "CPU"),
        event("triton_poi_0", 5, 9),
        event("Optimizer.step#Muon.step", 0, 90, region=True),
    ]
    assert gpu_phases.device_events(events) == events[1:2]


class Profiler:
    """A profiler that has seen two steps of a GPU."""

    def __init__(self, activities: list) -> None:
        assert torch.profiler.ProfilerActivity.CUDA in activities

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def events(self) -> list:
        kernels = [event("gemm", 0, 4000), event("gemm", 3000, 6000), event("norm", 9000, 10000)]
        return [
            *kernels,
            event("Memcpy HtoD", 10000, 11000),
            event("region", 0, 99000, region=True),
        ]


def test_kernels_and_busy_time_are_those_of_a_step(report, monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(gpu_phases, "synchronize", lambda device: None)
    steps = []
    trainer = SimpleNamespace(step=lambda *arguments: steps.append(arguments))
    gpu_phases.show_kernels(report, trainer, "cuda", free_ms=8.0)
    assert steps == [(0, 0.0), (1, 0.0)]
    rows = dict(report.found["rows"])
    assert rows["kernels a step"] == "2"
    assert rows["GPU busy in a step"] == "4 ms, 50.0% of a free step"
    assert rows["heaviest: gemm"] == "3.500 ms, 77.8%, 1 calls"


class Event:
    """An event of CUDA; there are 40 ms between any two."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    synchronize = record

    def elapsed_time(self, other: "Event") -> float:
        return 40.0


def test_attention_is_timed_by_events_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    inputs = gpu_phases.attention_inputs(1, 32, "BTHD", "cpu")
    assert gpu_phases.attention_ms(inputs, "math", "cuda") == 2.0


def test_time_that_spans_share_counts_once():
    assert gpu_phases.busy([(5, 7), (0, 4), (1, 2), (3, 6)]) == 7
    assert gpu_phases.busy([]) == 0


def test_kernels_are_summed_by_name():
    table = gpu_phases.heaviest([("a", 1000, 1), ("b", 6000, 1), ("a", 1000, 3)], 2)
    assert table[0] == {"name": "b", "ms": 3.0, "percent": 75.0, "calls": 0.5}
    assert table[1] == {"name": "a", "ms": 1.0, "percent": 25.0, "calls": 2.0}


# ---- .gpu


@pytest.fixture
def kit(tmp_path, monkeypatch):
    """An empty .gpu."""
    folder = tmp_path / "kit"
    monkeypatch.setattr(gpu_kit, "KIT", folder)
    return folder


def make_wheel(folder: Path, module: str) -> Path:
    """A wheel of a package of one module."""
    folder.mkdir(parents=True, exist_ok=True)
    path, info = folder / f"{module}-1.0-py3-none-any.whl", f"{module}-1.0.dist-info"
    files = {
        f"{module}/__init__.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()
        record.append(f"{name},sha256={digest.rstrip('=')},{len(text)}\n")
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_wheels_are_installed_only_if_missing(bench, kit):
    make_wheel(kit / "wheels", "json")
    missing = make_wheel(kit / "wheels", "birdie_wheel")
    report, _ = bench("tell")
    assert report["wheels"] == [missing.name]
    assert report["phases"]["tell"]["figures"]["new"]
    assert report["problems"] == []


def test_a_wheel_that_cannot_be_installed_stops_nothing(bench, kit):
    (kit / "wheels").mkdir(parents=True)
    (kit / "wheels/broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    report, _ = bench("tell good")
    assert "wheels were not installed" in report["problems"][0]
    assert statuses(report) == {"tell": "ok", "good": "ok"}


FAKE_PIP = """
import sys
from pathlib import Path
with open(Path(__file__).parents[2] / "calls", "a") as file:
    file.write("pip " + " ".join(sys.argv[1:]) + "\\n")
folder = Path(sys.argv[sys.argv.index("-d") + 1])
name, _, version = sys.argv[-1].replace(">=0.23,<0.26", "==0.25.0").partition("==")
if version == "404":
    sys.exit("no matching distribution")
(folder / f"{name}-{version}-cp312-cp312-manylinux_2_17_x86_64.whl").write_bytes(bytes(1000))
"""
FAKE_PREPARE = """
import json, sys
from pathlib import Path
with open(Path(__file__).with_name("calls"), "a") as file:
    file.write("prepare " + " ".join(sys.argv[1:]) + "\\n")
arguments = sys.argv[1:]
out = Path(arguments[arguments.index("--out") + 1])
size = 1024 if "1024" in arguments[-1] else 8192
name = "sample" if "--sample" in arguments else "corpus"
folder = out / f"datasets/{name}_sp{size}"
folder.mkdir(parents=True, exist_ok=True)
(out / "tokenizers").mkdir(exist_ok=True)
(out / f"tokenizers/{size}.model").write_text("")
(folder / "fineweb_val_000000.bin").write_bytes(bytes(3000))
(folder / "manifest.json").write_text(
    json.dumps({"tokenizer": {"path": f"../../tokenizers/{size}.model"}})
)
"""


@pytest.fixture
def prepare(kit, tmp_path, monkeypatch):
    """Run --prepare with a fake pip and a fake data/prepare.py: what was called."""
    (tmp_path / "modules/pip").mkdir(parents=True)
    (tmp_path / "modules/pip/__init__.py").write_text("")
    (tmp_path / "modules/pip/__main__.py").write_text(FAKE_PIP)
    (tmp_path / "prepare.py").write_text(FAKE_PREPARE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setattr(gpu_kit, "PREPARE", tmp_path / "prepare.py")

    def start(*arguments: object) -> list[str]:
        Path("calls").write_text("")
        gpu.main(["--prepare", *map(str, arguments)])
        return Path("calls").read_text().splitlines()

    return start


def test_prepare_fetches_a_wheel_and_makes_two_datasets(prepare, kit, capsys):
    pip, small, large = prepare()
    assert pip.startswith("pip download --no-deps --only-binary=:all: --implementation cp")
    assert "--platform manylinux_2_17_x86_64 --platform" in pip
    assert "--python-version 3.12 " in pip
    assert pip.endswith("zstandard>=0.23,<0.26")
    assert small.endswith("--sample --vocab-size 1024")
    assert large.endswith("--sample --vocab-size 8192")
    said = capsys.readouterr().out
    assert f"{kit}: 0.0 MiB: wheels 0.0 MiB, data 0.0 MiB" in said
    assert '"carry": [".gpu"]' in said
    found = gpu_kit.find_datasets(kit / "data")
    assert [found[n]["VOCAB_SIZE"] for n in ("1024", "8192")] == ["1024", "8192"]
    assert Path(found["8192"]["TOKENIZER_PATH"]) == (kit / "data/tokenizers/8192.model").resolve()


def test_prepare_fetches_nothing_twice_and_keeps_one_version_of_each(prepare, kit):
    prepare()
    assert [call.split()[0] for call in prepare()] == ["prepare", "prepare"]
    calls = prepare("--wheels", "zstandard==0.24.0", "hypothesis==6.1")
    assert [call.split()[-1] for call in calls[:2]] == ["zstandard==0.24.0", "hypothesis==6.1"]
    assert sorted(p.name.split("-cp")[0] for p in (kit / "wheels").iterdir()) == [
        *("hypothesis-6.1", "zstandard-0.24.0")
    ]
    assert prepare("--python", "3.13")[0].startswith("pip")


def test_prepare_says_what_to_do_if_there_is_no_such_wheel(prepare):
    with pytest.raises(gpu_kit.KitError, match="is there a network, and a wheel of that version"):
        prepare("--wheels", "zstandard==404")


def test_prepare_refuses_what_is_too_large_to_travel(prepare, monkeypatch):
    monkeypatch.setattr(gpu_kit, "MOST", 5000)
    with pytest.raises(gpu_kit.KitError, match=r"over the .* that may travel; remove it"):
        prepare()


def tokenizers(monkeypatch, *sizes: int) -> None:
    """Have tokenizers of any content count as such of these sizes: a token for each letter."""

    class Processor:
        def __init__(self, model_file: str) -> None:
            self.size = sizes[int(Path(model_file).stem[0])]

        def __len__(self) -> int:
            return self.size

        def encode(self, texts: list[str]) -> list[list[int]]:
            return [[1] * len(text) for text in texts]

    monkeypatch.setattr("sentencepiece.SentencePieceProcessor", Processor)


@pytest.fixture
def corpus(tmp_path) -> list[Path]:
    """100 documents of 10 kB, and two files for tokenizers."""
    path = tmp_path / "train.jsonl.xz"
    line = json.dumps({"text": "x" * 10_000}) + "\n"
    path.write_bytes(lzma.compress(line.encode() * 100))
    models = [tmp_path / "0_1024.model", tmp_path / "1_8192.model"]
    for model in models:
        model.write_text("")
    return [path, *models]


def test_a_corpus_is_cut_so_that_its_datasets_fit(prepare, corpus, kit, monkeypatch):
    tokenizers(monkeypatch, 1024, 8192)
    monkeypatch.setattr(gpu_kit, "SAMPLE_BYTES", 50_000)
    monkeypatch.setattr(gpu_kit, "AIM", 1_000_000)
    prepare()
    path, *models = corpus
    calls = prepare("--corpus", path, "--tokenizers", *models)
    # 4 bytes a letter of two datasets: 0.95 of 999 kB hold 237 kB of text, 23 documents.
    options = f"{path} --name corpus --val-fraction 0.05 --samples 23 --tokenizer"
    assert [call.partition(f"{options} ")[2] for call in calls] == [*map(str, models)]
    assert sorted(p.name for p in (kit / "data/datasets").iterdir()) == [
        *("corpus_sp1024", "corpus_sp8192")
    ]


def test_a_small_corpus_is_taken_whole(corpus, tmp_path):
    assert gpu_kit.count_records(corpus[0], [], 10**9) == 100
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(gpu_kit.KitError, match=r"empty\.jsonl: holds no documents"):
        gpu_kit.count_records(tmp_path / "empty.jsonl", [], 10**9)


def test_what_cannot_be_prepared_is_told(prepare, corpus, monkeypatch, tmp_path):
    tokenizers(monkeypatch, 1024, 4096)
    path, *models = corpus
    with pytest.raises(gpu_kit.KitError, match=r"have \[1024, 4096\] pieces; give one of 1024"):
        prepare("--corpus", path, "--tokenizers", *models)
    with pytest.raises(gpu_kit.KitError, match="belong together"):
        prepare("--corpus", path)
    with pytest.raises(gpu_kit.KitError, match=r"nowhere\.xz: no such file"):
        prepare("--corpus", "nowhere.xz", "--tokenizers", *models)
    (tmp_path / "bad.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(gpu_kit.KitError, match=r"bad\.jsonl: KeyError.*one JSON object a line"):
        [*gpu_kit.records(tmp_path / "bad.jsonl")]


def test_a_tokenizer_that_is_none_is_told(corpus):
    with pytest.raises(gpu_kit.KitError, match="not a SentencePiece model"):
        gpu_kit.tokenizers_of(corpus[1:])


def test_a_dataset_of_gpu_is_taken_and_none_is_made(bench, prepare, kit, monkeypatch):
    prepare()
    monkeypatch.setattr(gpu_kit, "PREPARE", kit / "must_not_run.py")
    report, _ = bench("tell", data=True)
    data = report["phases"]["tell"]["figures"]["job"]["data"]
    assert data["8192"]["DATA_PATH"] == str(kit / "data/datasets/sample_sp8192")
    assert report["data"] == data


def test_the_sample_is_made_where_there_is_no_dataset(bench, prepare, kit, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    report, _ = bench("tell", data=True)
    assert "8192" in report["phases"]["tell"]["figures"]["job"]["data"]
    (call,) = Path("calls").read_text().splitlines()
    assert call.startswith("prepare --sample --out")


def test_a_dataset_that_is_given_needs_no_other(bench, kit, monkeypatch):
    monkeypatch.setattr(gpu_kit, "PREPARE", kit / "must_not_run.py")
    report, _ = bench("tell", "DATA_PATH=/here", data=True)
    assert report["phases"]["tell"]["figures"]["job"]["data"] == {}
    assert report["problems"] == []


def test_a_dataset_that_cannot_be_made_stops_nothing(bench, kit, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_kit, "PREPARE", kit / "not_there.py")
    report, _ = bench("good", data=True)
    assert "no dataset (failed)" in report["problems"][0]
    assert statuses(report) == {"good": "ok"}


def test_what_has_changed_since_gpu_was_made_is_told(prepare, monkeypatch):
    prepare()
    assert gpu_kit.origin()["changed_since"] == []
    now = gpu_kit.sources() | {"train_gpt.py": "another"}
    monkeypatch.setattr(gpu_kit, "sources", lambda: now)
    assert gpu_kit.origin()["changed_since"] == ["train_gpt.py"]
    assert gpu_kit.origin()["commit"] == (gpu_kit.git("rev-parse", "HEAD") or "unknown")
