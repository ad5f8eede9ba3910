"""What run.py and gpu.py start: a script under settings, in a process; its figures.

Any script will do that takes the challenge's environment variables and prints its log lines.
"""

import hashlib
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import measure
from run_machine import MemoryWatch, memory_used

import train_gpt as tg

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "train_gpt.py"
STEP = re.compile(r"^step:(\d+)/\d+\s+(.*)$")
NUMBER = re.compile(r"(\w+):\s*([^\s:]+?)(?:ms)?(?=\s|$)")
PEAK = re.compile(r"peak memory allocated:\s*([\d.]+)\s*MiB")
Settings = dict[str, str]
Line = tuple[float, str]  # seconds from the start of the process, and what it printed


class BenchmarkError(Exception):
    """What went wrong in a measurement, and what to do; what the script had printed until then."""

    def __init__(self, problem: str, lines: Iterable[Line] = ()) -> None:
        super().__init__(problem)
        self.lines = [*lines]


# ===================================== SETTINGS =====================================


@dataclass(frozen=True)
class Side:
    """A script and its settings; one of the two that are compared."""

    script: Path
    settings: Settings
    hp: tg.Hyperparameters | None  # None if another script takes settings that ours does not know

    @property
    def batch(self) -> int:
        """Tokens of a step."""
        default = tg.Hyperparameters().train_batch_tokens
        return int(self.settings.get("TRAIN_BATCH_TOKENS", default))


def read_pairs(words: list[str]) -> Settings:
    """Read NAME=VALUE words, and dotenv files, as settings; the later ones win."""
    settings = {}
    for word in words:
        name, equals, text = word.partition("=")
        settings |= {name: text} if equals else tg.read_dotenv(word)
    return settings


def make_side(script: Path, settings: Settings) -> Side:
    """Resolve settings, strictly for our own script; other scripts may know other names."""
    ours = script.resolve() == SCRIPT
    defaults = tg.Hyperparameters()
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        place = Path(settings.get(name, getattr(defaults, name.lower())))
        settings = settings | {name: str(place.absolute())}
    if not script.is_file():
        raise tg.UserError(f"{script}: no such script")
    unknown = [name for name in settings if name not in tg.FIELDS]
    if ours and unknown:
        raise tg.UserError(f"{unknown}: no such setting; see python train_gpt.py --help")
    try:
        hp = tg.load_settings(settings | {"OUT_DIR": tempfile.gettempdir()}, check_places=ours)
    except tg.UserError:
        if ours:
            raise
        hp = None
    return Side(script.resolve(), settings, hp)


def describe_side(side: Side) -> dict[str, Any]:
    """Tell a side for the results: what was run, exactly, and under which settings."""
    resolved = None
    flops = None
    if side.hp:
        resolved = {name: str(getattr(side.hp, name.lower())) for name in tg.FIELDS}
        flops = measure.flops_per_token(side.hp)
    return {
        "script": str(side.script),
        "sha256": hashlib.sha256(side.script.read_bytes()).hexdigest(),
        "given": side.settings,
        "settings": resolved,
        "flops_per_token": flops,
    }


# ===================================== A PROCESS =====================================


def command_of(script: Path, arguments: list[str], nproc: int) -> list[str]:
    """Make the command line that runs a script, by torchrun if in several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return [sys.executable, *(launcher if nproc > 1 else []), str(script), *arguments]


def environment_of(settings: Settings, nproc: int, folder: str) -> Settings:
    """Make the variables of a run that writes to a folder: of ours, no setting but these."""
    env = {name: text for name, text in os.environ.items() if name not in tg.FIELDS}
    if nproc > 1:
        env.setdefault("OMP_NUM_THREADS", "1")
    places = {"OUT_DIR": folder, "RUN_ID": "benchmark", "PYTHONUNBUFFERED": "1"}
    return env | settings | places


def failure(script: Path, code: int, lines: list[Line], shown: int, errors: IO[str]) -> Exception:
    """Make the error that tells how a script ended: its last lines, and those of its errors."""
    errors.seek(0)
    last = [line for _, line in lines][-shown:] + errors.read().splitlines()[-15:]
    said = "\n  ".join(last) or "nothing"
    return BenchmarkError(f"{script} ended with exit code {code}. It said:\n  {said}", lines)


def execute(
    script: Path, arguments: list[str], settings: Settings, nproc: int, echo: bool = False
) -> dict[str, Any]:
    """Run a script in an empty folder; give its timed lines and memory.

    With `echo`, what it prints is printed as it comes, and lines of errors are among them. Raises
    BenchmarkError.
    """
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        before = memory_used()
        start = time.perf_counter()
        process = subprocess.Popen(
            command_of(script, arguments, nproc),
            env=environment_of(settings, nproc, folder),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if echo else errors,
            text=True,
            errors="replace",
        )
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
        if process.returncode:
            raise failure(script, process.returncode, lines, 15 if echo else 3, errors)
    wall = time.perf_counter() - start
    host = watch.host or None
    return {"lines": lines, "host_mib": host, "smi_gpu_mib": watch.gpu, "wall_s": wall}


def worker(kind: str, settings: Settings, nproc: int = 1) -> dict[str, Any]:
    """Have measure.py measure in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        execute(HERE / "measure.py", [kind, str(out)], settings, nproc)
        return json.loads(out.read_text())


# ===================================== ITS FIGURES =====================================


def log_fields(text: str) -> dict[str, float]:
    """Read the numbers of a log line by their names."""
    fields = {}
    for name, value in NUMBER.findall(text):
        with suppress(ValueError):
            fields[name] = float(value)
    return fields


def train_ms(step: int, fields: dict[str, float]) -> float | None:
    """Give the training time at a step, in ms, if its line tells it.

    Early train_time, in whole ms, is coarse: where step_avg agrees with it, steps times step_avg
    is taken instead.
    """
    ms = fields.get("train_time")
    if ms is None or step >= 100:
        return ms
    exact = step * fields.get("step_avg", math.nan)
    rounding = 0.5 + 0.005 * step + 1e-6
    return exact if abs(exact - ms) <= rounding else ms


def parse_log(lines: Iterable[Line]) -> dict[str, Any]:
    """Read step times, validations and peak memory from what a run printed."""
    times: dict[int, float] = {}
    val = []
    first = None
    peak = None
    for seconds, line in lines:
        if found := PEAK.search(line):
            peak = float(found[1])
        found = STEP.match(line)
        if not found:
            continue
        step = int(found[1])
        fields = log_fields(found[2])
        ms = train_ms(step, fields)
        if ms is None:
            continue
        if "val_loss" in fields or "val_bpb" in fields:
            val.append([step, ms, fields.get("val_bpb")])
            continue
        first = seconds if first is None else first
        times[step] = ms
    gaps = [(times[b] - times[a]) / (b - a) for a, b in itertools.pairwise(sorted(times))]
    return {"step_ms": gaps[1:], "val": val, "first_step_s": first, "script_gpu_mib": peak}


def run_once(side: Side, nproc: int) -> dict[str, Any]:
    """Run a side once. Raises BenchmarkError if it fails or tells no step times."""
    found = execute(side.script, [], side.settings, nproc)
    found |= parse_log(found.pop("lines"))
    if not found["step_ms"]:
        what = "printed under 3 lines like step:1/20 train_loss:6.9 train_time:12ms"
        advice = "it must take ITERATIONS and TRAIN_LOG_EVERY from the environment; give --steps 3+"
        raise BenchmarkError(f"{side.script}: {what}; {advice}")
    return found


def describe(side: Side, run: dict[str, Any], peak: float | None) -> dict[str, Any]:
    """Give the figures of one run; MFU from the ceiling `peak`, TFLOP/s of all processes."""
    ms = statistics.median(run["step_ms"])
    rate = side.batch / ms * 1e3
    mfu = None
    if side.hp and peak:
        mfu = 100 * rate * measure.flops_per_token(side.hp) / (peak * 1e12)
    figures = {"step_ms": ms, "tokens_per_s": rate, "mfu": mfu}
    for name in ("first_step_s", "wall_s", "host_mib", "script_gpu_mib", "smi_gpu_mib"):
        figures[name] = run[name]
    last = run["val"][-1][2] if run["val"] else None
    return figures | {"bpb_tokens": last, "bpb_seconds": None}
