"""How fast a configuration trains, alone or against another script or other settings.

    python benchmarks/run.py --config X.env [NAME=VALUE ...] [--steps 20] [--rounds 2] [--nproc 8]
    python benchmarks/run.py --config X.env --vs other.py [--vs-env NAME=VALUE | --vs-env Y.env]
    python benchmarks/run.py --config X.env --breakdown      parts of a step
    python benchmarks/run.py --config X.env --evaluation     plain passes and sliding windows
    python benchmarks/run.py --config X.env --scaling        context, width, depth, processes

A is train_gpt.py (or --script), B is --vs, by default the same script, with A's settings and those
of --vs-env. They run in turn, A B A B, on the same data, in empty folders. Any script will do that
takes the challenge's environment variables and prints its log lines (step:1/20 train_loss:..
train_time:..ms). Precedence: NAME=VALUE, then what the tool sets (ITERATIONS=--steps,
TRAIN_LOG_EVERY=1, FIT_BUDGET=none, no cap on the artifact), the environment, --config.
VAL_LOSS_EVERY is 0 where nothing says else; a comparison after equal seconds needs more.

Step times are differences of train_time between logged lines, without the first one: median, and
quartiles over all rounds. Logging every step makes a GPU wait for each, alike in A and B. MFU is
measure.flops_per_token over the ceiling: the fastest matrix product in the run's dtype and with its
threads, measured around each round, times the processes. Seconds to the first step are from the
start of the process to its line. Host memory is the largest sum, at one time, of the peaks of its
living processes (VmHWM in /proc every 0.05 s, so what is shared counts in each, torchrun and
compilers count too, and there is none off Linux); GPU memory is what the script prints as peak
memory allocated, and what nvidia-smi sees, once a second, above its reading before, on the fullest
GPU.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import measure
from gpu_kit import git

import train_gpt as tg

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "train_gpt.py"
STEP = re.compile(r"^step:(\d+)/\d+\s+(.*)$")
NUMBER = re.compile(r"(\w+):\s*([^\s:]+?)(?:ms)?(?=\s|$)")
PEAK = re.compile(r"peak memory allocated:\s*([\d.]+)\s*MiB")
Settings = dict[str, str]


class BenchmarkError(Exception):
    """What went wrong in a measurement, and what to do; what the script had printed until then."""

    def __init__(self, problem: str, lines: Iterable[tuple[float, str]] = ()) -> None:
        super().__init__(problem)
        self.lines = [*lines]


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    script: Path
    settings: Settings
    hp: tg.Hyperparameters | None

    @property
    def batch(self) -> int:
        """Tokens of a step."""
        default = tg.FIELDS["TRAIN_BATCH_TOKENS"].default
        return int(self.settings.get("TRAIN_BATCH_TOKENS", default))


# ===================================== ONE RUN =====================================


def parse_log(lines: Iterable[tuple[float, str]]) -> dict[str, Any]:
    """What a run's (seconds, line) tell. Early train_time, in whole ms, is coarse: where step_avg
    agrees with it, the step times it is taken instead."""
    times, val, first, peak = {}, [], None, None
    for seconds, line in lines:
        if found := PEAK.search(line):
            peak = float(found[1])
        if not (found := STEP.match(line)):
            continue
        step, fields = int(found[1]), {}
        for name, text in NUMBER.findall(found[2]):
            with suppress(ValueError):
                fields[name] = float(text)
        ms, exact = fields.get("train_time"), step * fields.get("step_avg", float("nan"))
        if ms is None:
            continue
        if abs(exact - ms) <= 0.5 + 0.005 * step + 1e-6 and step < 100:
            ms = exact
        if "val_loss" in fields or "val_bpb" in fields:
            val.append([step, ms, fields.get("val_bpb")])
        else:
            first = seconds if first is None else first
            times[step] = ms
    steps = sorted(times)
    gaps = [(times[b] - times[a]) / (b - a) for a, b in itertools.pairwise(steps)]
    return {"step_ms": gaps[1:], "val": val, "first_step_s": first, "script_gpu_mib": peak}


def smi(query: str) -> list[str]:
    """Lines of nvidia-smi, one a GPU; none where it is not there, or does not answer."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.splitlines()
    return []


def memory_used() -> list[float]:
    """MiB that are used on each GPU; nothing if one does not tell it, as by [N/A]."""
    try:
        return [float(line) for line in smi("memory.used")]
    except ValueError:
        return []


class MemoryWatch(threading.Thread):
    """Peak memory of a process and all below it, and of the GPUs, until `end` is called."""

    def __init__(self, pid: int, before: list[float]) -> None:
        super().__init__(daemon=True)
        self.pid, self.before, self.done = pid, before, threading.Event()
        self.host, self.gpu = 0.0, None
        self.start()

    def run(self) -> None:
        """Look every 0.05 s, at the GPUs every second."""
        count = 0
        while not self.done.wait(0.05):
            self.host = max(self.host, self.look(self.pid))
            if self.before and count % 20 == 0:
                pairs = zip(self.before, memory_used(), strict=False)
                rises = [now - before for before, now in pairs]
                self.gpu = max([*rises, self.gpu or 0.0])
            count += 1

    def look(self, pid: int) -> float:
        """MiB of the peak so far of a process, and of those of its children that still live. What
        wait4 tells would be no less than this tool's own memory, since a new process starts as a
        copy of it."""
        total = 0.0
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                total += int(found[1]) / 1024
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                total += sum(self.look(int(child)) for child in path.read_text().split())
        return total

    def end(self) -> None:
        """Stop looking."""
        self.done.set()
        self.join()


def execute(
    script: Path, arguments: list[str], settings: Settings, nproc: int, echo: bool = False
) -> dict[str, Any]:
    """Run a script in an empty folder; its timed lines and memory. With `echo`, what it prints is
    printed as it comes, and lines of errors are among them. Raises BenchmarkError."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [sys.executable, *(launcher if nproc > 1 else []), str(script), *arguments]
    env = {name: text for name, text in os.environ.items() if name not in tg.FIELDS}
    env |= {"OMP_NUM_THREADS": "1"} if nproc > 1 and "OMP_NUM_THREADS" not in env else {}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        env |= settings | {"OUT_DIR": folder, "RUN_ID": "benchmark", "PYTHONUNBUFFERED": "1"}
        before, start, lines = memory_used(), time.perf_counter(), []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT if echo else errors}
        options = {"text": True, "errors": "replace"}
        process = subprocess.Popen(command, env=env, cwd=folder, **pipes, **options)
        watch = MemoryWatch(process.pid, before)
        try:
            for line in process.stdout:
                lines.append((time.perf_counter() - start, line.rstrip()))
                if echo:
                    print(line, end="", flush=True)
            process.wait()
        finally:
            watch.end()
            if process.returncode is None:  # interrupted
                process.terminate()
                process.wait()
        errors.seek(0)
        if process.returncode:
            last = [line for _, line in lines][-15 if echo else -3 :]
            said = "\n  ".join(last + errors.read().splitlines()[-15:]) or "nothing"
            problem = f"{script} ended with exit code {process.returncode}. It said:\n  {said}"
            raise BenchmarkError(problem, lines)
    host = watch.host or None
    wall = time.perf_counter() - start
    return {"lines": lines, "host_mib": host, "smi_gpu_mib": watch.gpu, "wall_s": wall}


def run_once(side: Side, nproc: int) -> dict[str, Any]:
    """One run of a side. Raises BenchmarkError if it fails or tells no step times."""
    found = execute(side.script, [], side.settings, nproc)
    found |= parse_log(found.pop("lines"))
    if not found["step_ms"]:
        what = "printed under 3 lines like step:1/20 train_loss:6.9 train_time:12ms"
        advice = "it must take ITERATIONS and TRAIN_LOG_EVERY from the environment; give --steps 3+"
        raise BenchmarkError(f"{side.script}: {what}; {advice}")
    return found


def worker(kind: str, settings: Settings, nproc: int = 1) -> dict[str, Any]:
    """What measure.py finds in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        execute(HERE / "measure.py", [kind, str(out)], settings, nproc)
        return json.loads(out.read_text())


# ===================================== A AND B =====================================


def pairs(words: list[str]) -> Settings:
    """NAME=VALUE words, and dotenv files, as settings; the later ones win."""
    settings = {}
    for word in words:
        name, equals, text = word.partition("=")
        settings |= {name: text} if equals else tg.read_dotenv(word)
    return settings


def make_side(script: Path, settings: Settings) -> Side:
    """Resolve settings, strictly for our own script; other scripts may know other names."""
    ours = script.resolve() == SCRIPT
    default = {name: tg.FIELDS[name].default for name in ("DATA_PATH", "TOKENIZER_PATH")}
    places = {n: str(Path(settings.get(n, text)).absolute()) for n, text in default.items()}
    settings = settings | places
    tg.require(script.is_file(), f"{script}: no such script")
    unknown = [name for name in settings if ours and name not in tg.FIELDS]
    tg.require(not unknown, f"{unknown}: no such setting; see python train_gpt.py --help")
    try:
        hp = tg.load_settings(settings | {"OUT_DIR": tempfile.gettempdir()}, check_places=ours)
    except tg.UserError:
        if ours:
            raise
        hp = None
    return Side(script.resolve(), settings, hp)


def settings_of(args: argparse.Namespace, defaults: Settings | None = None) -> Settings:
    """A's settings, by the precedence that the docstring of this file tells."""
    environment = {n: os.environ[n] for n in tg.FIELDS if n in os.environ and n != "CONFIG"}
    config = tg.read_dotenv(args.config) if args.config else {}
    tool = {"TRAIN_LOG_EVERY": "1", "ITERATIONS": str(args.steps), "FIT_BUDGET": "none"}
    tool |= {"ARTIFACT_MAX_BYTES": str(10**12)} | (defaults or {})
    return {"VAL_LOSS_EVERY": "0"} | config | environment | tool | pairs(args.settings)


def curve(run: dict[str, Any], batch: int) -> np.ndarray:
    """Validations of a run, (points, 3): tokens, ms of training, BPB."""
    points = [(step * batch, ms, bpb) for step, ms, bpb in run["val"] if bpb is not None]
    return np.array(points, float).reshape(-1, 3)


def bpb_at_equal(a: np.ndarray, b: np.ndarray) -> dict[str, tuple[float | None, float | None]]:
    """BPB of two curves after the most tokens that both validated at, and, on straight lines
    between validations, after the seconds of the one that ended first."""
    both = sorted(set(a[:, 0]) & set(b[:, 0]) - {0.0})
    found = {"bpb_tokens": (None, None), "bpb_seconds": (None, None)}
    if both:
        at = [float(c[c[:, 0] == both[-1], 2][-1]) for c in (a, b)]
        found["bpb_tokens"] = (at[0], at[1])
    if len(a) and len(b):
        ms = min(a[-1, 1], b[-1, 1])
        if ms > 0 and a[0, 1] <= ms and b[0, 1] <= ms:
            at = [float(np.interp(ms, c[:, 1], c[:, 2])) for c in (a, b)]
            found["bpb_seconds"] = (at[0], at[1])
    return found


def describe(side: Side, run: dict[str, Any], peak: float | None) -> dict[str, Any]:
    """The figures of one run; MFU from the ceiling `peak`, TFLOP/s of all processes."""
    ms = statistics.median(run["step_ms"])
    rate = side.batch / ms * 1e3
    known = side.hp and peak
    mfu = 100 * rate * measure.flops_per_token(side.hp) / (peak * 1e12) if known else None
    names = ("first_step_s", "wall_s", "host_mib", "script_gpu_mib", "smi_gpu_mib")
    last = run["val"][-1][2] if run["val"] else None
    figures = {"step_ms": ms, "tokens_per_s": rate, "mfu": mfu} | {n: run[n] for n in names}
    return figures | {"bpb_tokens": last, "bpb_seconds": None}


def compare(sides: list[Side], rounds: int, nproc: int) -> dict[str, Any]:
    """Run the sides in turn, with the ceiling measured around each round."""
    runs, ceilings = [[] for _ in sides], [[] for _ in sides]
    for number in range(rounds + 1):
        seen = {}
        for side, found in zip(sides, ceilings, strict=True):
            key = side.hp and (side.hp.device, side.hp.dtype, side.hp.model_dim)
            if key and key not in seen:
                seen[key] = worker("ceiling", side.settings)
            found.extend([seen[key]] if key else [])
        for letter, side, found in zip("AB", sides, runs, strict=False):
            if number < rounds:
                found.append(run_once(side, nproc))
                ms = statistics.median(found[-1]["step_ms"])
                print(f"round {number + 1}, {letter}: {ms:.1f} ms a step", flush=True)
    peaks = [
        nproc * statistics.median(c["tflops"] for c in found) if found else None
        for found in ceilings
    ]
    figures = [
        [describe(side, run, peak) for run in found]
        for side, found, peak in zip(sides, runs, peaks, strict=True)
    ]
    if len(sides) == 2:
        for i in range(rounds):
            curves = [curve(found[i], side.batch) for side, found in zip(sides, runs, strict=True)]
            for name, values in bpb_at_equal(*curves).items():
                for side_figures, value in zip(figures, values, strict=True):
                    side_figures[i][name] = value
    return {"ceilings": ceilings, "peak_tflops": peaks, "runs": runs, "figures": figures}


ROWS = {"step_ms": "step, ms", "tokens_per_s": "tokens/s", "mfu": "MFU, %"}
ROWS |= {"first_step_s": "to the first step, s", "wall_s": "whole process, s"}
ROWS |= {"host_mib": "peak host memory, MiB", "script_gpu_mib": "peak GPU memory, script, MiB"}
ROWS |= {"smi_gpu_mib": "peak GPU memory, nvidia-smi, MiB"}
ROWS |= {"bpb_tokens": "BPB after equal tokens", "bpb_seconds": "BPB after equal seconds"}


def number(value: float | None) -> str:
    """Four decimals for small numbers, none for large ones, n/a for what is not known."""
    if value is None:
        return "n/a"
    return (
        f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if value >= 10 else f"{value:.4f}"
    )


def spread(key: str, figures: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """Median and quartiles of all steps; of what a run has but one of, median, least and most."""
    values = [f[key] for f in figures if f[key] is not None]
    if not values:
        return "n/a"
    if key == "step_ms":
        values = [ms for run in runs for ms in run["step_ms"]]
    elif key in ("tokens_per_s", "mfu"):
        pairs = zip(figures, runs, strict=True)
        values = [f[key] * f["step_ms"] / ms for f, run in pairs for ms in run["step_ms"]]
    many = key in ("step_ms", "tokens_per_s", "mfu")
    ends = np.quantile(values, (0.25, 0.75) if many else (0.0, 1.0))
    return f"{number(statistics.median(values))} ({number(ends[0])} to {number(ends[1])})"


def comparison_table(found: dict[str, Any]) -> str:
    """The figures of each side, and B/A: the median and the ratio of each round."""
    figures, letters = found["figures"], "AB"[: len(found["figures"])]
    lines = [f"| | {' | '.join(letters)} | B/A, each round |", "|---" * (len(letters) + 2) + "|"]
    for key, title in ROWS.items():
        sides = zip(figures, found["runs"], strict=True)
        cells = [spread(key, side, runs) for side, runs in sides]
        rounds = zip(*figures, strict=True) if len(figures) == 2 else ()
        ratios = [b[key] / a[key] for a, b in rounds if a[key] and b[key]]
        each = " ".join(f"{ratio:.4f}" for ratio in ratios)
        cells.append(f"{statistics.median(ratios):.4f}: {each}" if ratios else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    peaks = [f"{number(peak)} TFLOP/s" for peak in found["peak_tflops"]]
    return "\n".join([*lines, f"| ceiling of MFU | {' | '.join(peaks)} | |"])


# ===================================== OTHER MEASUREMENTS =====================================


def breakdown(side: Side, nproc: int) -> dict[str, Any]:
    """Means of the parts of a step, ms and percent."""
    found = worker("breakdown", side.settings, nproc)
    names = ("data", "forward", "backward", "optimizer", "communication", "other")
    steps = found["steps"]
    means = {n: 1e3 * statistics.mean(s.get(n, 0.0) for s in steps) for n in names}
    whole = sum(means.values())
    return found | {"ms": means, "percent": {n: 100 * ms / whole for n, ms in means.items()}}


def breakdown_table(found: dict[str, Any]) -> str:
    """The parts of a step, and what one evaluation costs."""
    lines = ["| part | ms | of a step |", "|---|---|---|"]
    lines += [
        f"| {n} | {number(ms)} | {found['percent'][n]:.1f}% |" for n, ms in found["ms"].items()
    ]
    whole, free = sum(found["ms"].values()), 1e3 * found["free_step_s"]
    lines += [f"| step, waiting for each part | {number(whole)} | |"]
    lines += [f"| step, left to itself | {number(free)} | |"]
    lines += [f"| there: the host's wait for data | | {100 * found['free_data_share']:.2f}% |"]
    steps = f"{found['evaluation_s'] / found['free_step_s']:.1f} steps"
    tokens, ms = found["evaluation_tokens"], number(1e3 * found["evaluation_s"])
    return "\n".join([*lines, f"| evaluation of {tokens:,} tokens | {ms} | {steps} |"])


SWEEPS = {
    "context": ("TRAIN_SEQ_LEN", [512, 1024, 2048, 4096]),
    "width": ("MODEL_DIM", [256, 512, 768, 1024]),
    "depth": ("NUM_LAYERS", [3, 6, 9, 12]),
    "processes": ("WORLD_SIZE", [1, 2, 4]),
}


def scaling_settings(base: Settings, name: str, value: int) -> Settings:
    """The base with one setting changed; a wider model has more heads, not wider ones."""
    if name == "WORLD_SIZE":
        return base
    changed = base | {name: str(value)}
    if name == "MODEL_DIM":
        hp = tg.load_settings(base, check_places=False)
        heads = max(1, value * hp.num_heads // hp.model_dim)
        kv_heads = max(1, heads * hp.num_kv_heads // hp.num_heads)
        changed |= {"NUM_HEADS": str(heads), "NUM_KV_HEADS": str(kv_heads)}
    return changed


def scaling(side: Side, nproc: int, quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Time and memory of runs in which one thing grows; what fails is a point that says why."""
    found = {}
    gpus = torch.cuda.device_count() if side.hp.device in ("auto", "cuda") else 0
    places = gpus or os.cpu_count() or 1
    for title, (name, values) in SWEEPS.items():
        processes = title == "processes"
        found[title] = []
        for value in values[: 2 if quick else None]:
            if processes and value > places:
                print(f"{title} {value}: left out, there are {places} places for one")
                continue
            count = value if processes else nproc
            try:
                other = make_side(side.script, scaling_settings(side.settings, name, value))
                point = describe(other, run_once(other, count), None)
            except (BenchmarkError, tg.UserError) as problem:
                point = {"problem": str(problem)}
            found[title].append({"value": value} | point)
            ms = point.get("step_ms") or point["problem"].splitlines()[-1]
            print(f"{title} {value}: {ms if isinstance(ms, str) else f'{ms:.1f} ms a step'}")
    return found


def memory_of(point: dict[str, Any]) -> float | None:
    """GPU memory where it is known, else host memory, MiB."""
    return point["script_gpu_mib"] or point["smi_gpu_mib"] or point["host_mib"]


def scaling_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """One row a point."""
    lines = ["| what grows | to | step, ms | tokens/s | peak memory, MiB |", "|---" * 5 + "|"]
    for title, points in found.items():
        for p in points:
            cells = ["failed", "", ""]
            if "step_ms" in p:
                cells = [number(v) for v in (p["step_ms"], p["tokens_per_s"], memory_of(p))]
            lines.append(f"| {title} | {p['value']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_scaling(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw step time and peak memory over what grows into a PNG."""
    figure, axes = plt.subplots(2, len(found), figsize=(13, 6), layout="constrained", squeeze=False)
    for column, (title, points) in enumerate(found.items()):
        points = [p for p in points if "step_ms" in p]
        values = [p["value"] for p in points]
        rows = ([p["step_ms"] for p in points], [memory_of(p) or math.nan for p in points])
        for axis, heights, label in zip(axes[:, column], rows, ("ms a step", "MiB"), strict=True):
            axis.plot(values, heights, "o-", color="#4c72b0")
            axis.set(xlabel=title, ylabel=label)
            axis.margins(y=0.1)
            axis.autoscale_view()
            axis.set_ylim(bottom=0)
            axis.set_xticks(values, map(str, values), rotation=45)
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def evaluation_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What ways of scoring cost, beside the plain pass."""
    rates, stride = found["tokens_per_s"], found["stride"]
    titles = {"plain": "plain pass", "sliding": f"windows, stride {stride}"}
    titles |= {"documents": f"documents apart, stride {stride}", "loop": "windows one at a time"}
    cost = {n: f"{number(rates['plain'] / rate)} plain passes" for n, rate in rates.items()}
    return [(titles[n], f"{number(rate)} tokens/s, {cost[n]}") for n, rate in rates.items()]


# ===================================== THE COMMAND =====================================


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    cpu = [platform.processor() or platform.machine()]
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        cpu = re.findall(r"^model name\s*:\s*(.*)$", text, re.M) or cpu
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    threads = {
        "torch": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }
    software = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": cpu[0],
        "cores": usable,
        "threads": threads,
        "memory_gib": round(pages / 2**30, 1),
        "load_at_start": os.getloadavg(),
        "gpus": smi("name,memory.total,driver_version"),
        "system": platform.platform(),
        **software,
    }


def commit() -> str:
    """The commit that is checked out."""
    return git("rev-parse", "HEAD") or "unknown"


def changed_files() -> list[str] | None:
    """Files that differ from that commit, as git tells them, or None where it cannot."""
    told = git("status", "--porcelain")
    return None if told is None else told.splitlines()


def describe_side(side: Side) -> dict[str, Any]:
    """A side for the results: what was run, exactly, and under which settings."""
    digest = hashlib.sha256(side.script.read_bytes()).hexdigest()
    resolved = tg.setting_texts(side.hp) if side.hp else None
    flops = measure.flops_per_token(side.hp) if side.hp else None
    about = {"script": str(side.script), "sha256": digest, "given": side.settings}
    return about | {"settings": resolved, "flops_per_token": flops}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, path = parser.add_argument, {"type": Path, "metavar": "FILE"}
    add("settings", nargs="*", metavar="NAME=VALUE", help="settings of A, and of B")
    add("--config", default=os.environ.get("CONFIG", ""), help="dotenv file of settings")
    add("--script", default=SCRIPT, **path, help="A, by default train_gpt.py")
    add("--vs", **path, help="B; by default A's script, if --vs-env is given")
    add("--vs-env", action="append", default=[], help="setting or dotenv file of B; repeatable")
    add("--rounds", type=int, default=2, help="how often A and B are run (2)")
    add("--steps", type=int, default=20, help="ITERATIONS of each run (20)")
    add("--nproc", type=int, default=1, help="processes of each run, by torchrun (1)")
    add("--out", **path, help="JSON of all results; by default in benchmarks/results")
    modes = parser.add_mutually_exclusive_group()
    for name in ("breakdown", "evaluation", "scaling"):
        modes.add_argument(f"--{name}", dest="mode", action="store_const", const=name)
    add("--quick", action="store_true", help="--scaling: two points of each kind")
    args = parser.parse_intermixed_args(arguments)
    wrong = [word for word in args.settings if "=" not in word]
    if wrong or min(args.rounds, args.steps - 2, args.nproc) < 1:
        parser.error(f"{wrong[0]}: expected NAME=VALUE" if wrong else "--rounds 1+, --steps 3+")
    return args


def main(arguments: list[str]) -> None:
    """Measure, print a table, and write everything to the JSON file."""
    args = parse_arguments(arguments)
    name = f"{datetime.now():%Y-%m-%d_%H%M%S}_{args.mode or 'run'}.json"
    out = args.out or HERE / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"command": [sys.argv[0], *arguments], "commit": commit(), "machine": machine()}
    few = {"VAL_TOKENS": "16384"} if args.mode == "scaling" else None
    sides = [make_side(args.script, settings_of(args, few))]
    if args.vs or args.vs_env:
        sides.append(make_side(args.vs or args.script, sides[0].settings | pairs(args.vs_env)))
    report["sides"] = {k: describe_side(s) for k, s in zip("AB", sides, strict=False)}
    if args.mode == "breakdown":
        found = breakdown(sides[0], args.nproc)
        table = breakdown_table(found)
    elif args.mode == "evaluation":
        found = worker("evaluation", sides[0].settings)
        rows = [f"| {what} | {measured} |" for what, measured in evaluation_rows(found)]
        table = "\n".join(["| scoring | measured |", "|---|---|", *rows])
    elif args.mode == "scaling":
        found = scaling(sides[0], args.nproc, args.quick)
        draw_scaling(found, out.with_suffix(".png"))
        table = scaling_table(found)
    else:
        found = compare(sides, args.rounds, args.nproc)
        table = comparison_table(found)
    report["results"] = found
    out.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"{table}\n\nall figures: {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BenchmarkError, tg.UserError, OSError) as problem:
        sys.exit(f"run.py: error: {problem}")
