"""All that is to be measured on one GPU, in minutes, where none has been at hand.

    python benchmarks/gpu.py --prepare           here: make .gpu, what the machine there lacks
    python benchmarks/gpu.py                     there: measure, in an order of value
    python benchmarks/gpu.py --phases attention,baseline --seconds 200 NUM_LAYERS=11

Each phase is a process of its own with its own limit. One that fails, hangs or crashes stops no
other, and what it had found stays. After each, gpu.json, gpu.md and all.log in --out are written
again. NAME=VALUE are settings of train_gpt.py for all phases; no other setting comes from the
environment. Without CUDA, or with DEVICE=cpu, all is tiny: this tries the tool, and measures
nothing. The exit code is 1 if a phase failed, or the tool was interrupted.

    phase        what it tells
    environment  the fastest matrix product, copies, empty kernels
    attention    which kernel PyTorch takes; each against float64, and its speed
    baseline     the default configuration to its score: step, tokens/s, MFU, memory, first step
    documents    attention within documents: right, and how fast
    isolation    a step with documents apart beside one without
    tests        tests/test_gpu.py
    profile      kernels of a step, how busy they keep the GPU, parts of a step
    pr369        the stack of pull request 369 at T 2048, to its score
    evaluation   ways of scoring
    collectives  what train_gpt.py calls of torch.distributed, in a group of one
    microbatch   tokens a forward pass, compiled or not, 8192 pieces

Statuses: ok; failed; timeout; needs CUDA; no time left. All phases share a compile cache, empty at
the start unless TORCHINDUCTOR_CACHE_DIR names one: the first phase to compile pays for it.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import gpu_kit
from gpu_kit import MIB, ROOT, KitError, Settings, write_whole

HERE = Path(__file__).resolve().parent
WORKER = HERE / "gpu_phases.py"
ABOUT = HERE / "gpu_about.py"
OK, FAILED, TIMEOUT = "ok", "failed", "timeout"
NEEDS_CUDA, NO_TIME = "needs CUDA", "no time left"
LOG_BYTES = 15 * MIB  # of all.log: files of up to 16 MiB come back from the lent machines
TAIL_LINES = 40  # of a failed phase's output, in gpu.json
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MARK = "BIRDIE_GPU_RUN"  # a variable by which all processes of a run are found


@dataclass(frozen=True)
class Phase:
    """A part of the measurements, and how many seconds it may take."""

    name: str
    limit: float
    least: float  # it is not begun with fewer seconds left
    data: bool = False  # whether it needs a dataset


PHASES = (
    Phase("environment", 60, 10),
    Phase("attention", 75, 15),
    Phase("baseline", 150, 40, data=True),
    Phase("documents", 100, 30),
    Phase("isolation", 150, 30, data=True),
    Phase("tests", 240, 20),
    Phase("profile", 100, 30, data=True),
    Phase("pr369", 130, 40, data=True),
    Phase("evaluation", 160, 30, data=True),
    Phase("collectives", 45, 15),
    Phase("microbatch", 270, 40, data=True),
)


# ===================================== PROCESSES =====================================


def marked(mark: str) -> list[int]:
    """Find the processes that have a mark in their environment, whatever group they are in.

    Off Linux there are none.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def end(pid: int, send: Callable[[int, int], None], number: int) -> None:
    """Send a signal to what may have ended already."""
    with suppress(OSError):
        send(pid, number)


def kill_all(process: subprocess.Popen, mark: str) -> None:
    """Kill a process, its group, and all that bears its mark."""
    for _ in range(5):  # what is started meanwhile bears the mark too
        end(process.pid, os.killpg, signal.SIGKILL)
        left = marked(mark)
        for pid in left:
            end(pid, os.kill, signal.SIGKILL)
        if not left:
            break
        time.sleep(0.05)
    with suppress(subprocess.TimeoutExpired):  # a driver can hold a process beyond its end
        process.wait(10)


def capped(path: Path, most: int) -> str:
    """Read a file's text; of a longer one the beginning and the end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= most:
            return file.read().decode(errors="replace")
        head = file.read(most // 2)
        file.seek(size - most // 2)
        tail = file.read()
    gap = f"\n[... {size - most:,} bytes left out ...]\n"
    return head.decode(errors="replace") + gap + tail.decode(errors="replace")


# ===================================== THE MEASUREMENTS =====================================


class Bench:
    """One run of the tool: its clock, its folders, and what it has found so far."""

    def __init__(self, args: argparse.Namespace, out: Path, temporary: Path) -> None:
        self.args, self.out, self.temporary = args, out, temporary
        self.start, self.stopped = time.monotonic(), 0
        self.data: dict[str, Settings] | None = None
        self.tiny = self.blind = False  # blind: there is a GPU, and PyTorch cannot use it
        self.given: Settings = dict(word.split("=", 1) for word in args.settings)
        for name in {"DATA_PATH", "TOKENIZER_PATH"} & self.given.keys():
            self.given[name] = str(Path(self.given[name]).absolute())
        self.environment = {n: text for n, text in os.environ.items() if n not in LAUNCHER}
        self.environment |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        cache = self.environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(temporary / "inductor"))
        self.logs: dict[str, str] = {}
        self.report: dict[str, Any] = {
            "command": sys.argv,
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": args.seconds,
            "settings": self.given,
            "compile_cache": "used before" if Path(cache).exists() else "empty",
            "commit": "unknown",
            "changed": None,
            "prepared": gpu_kit.origin(),
            "problems": [],
            "phases": {},
        }

    def left(self) -> float:
        """Seconds that are left of the whole."""
        return self.args.seconds - (time.monotonic() - self.start)

    def note(self, number: int, _: Any) -> None:
        """Remember a signal that asks to stop."""
        self.stopped = number

    def problem(self, text: str) -> None:
        """Tell what went wrong beside the phases."""
        print(f"gpu.py: {text}", file=sys.stderr, flush=True)
        self.report["problems"].append(text)

    def supervise(self, name: str, command: list[str], limit: float) -> tuple[str, float]:
        """Run a process until it ends, or its limit, or a signal to us: how it went, and seconds.

        What it has printed is kept in `logs`.
        """
        mark, log = uuid.uuid4().hex, self.out / "running.log"
        environment = self.environment | {MARK: mark}
        begin, most = time.monotonic(), min(limit, max(0.0, self.left()))
        with open(log, "wb") as file:
            options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            options |= {"cwd": ROOT, "env": environment, "start_new_session": True}
            process = subprocess.Popen(command, **options)
            try:
                status = self.watch(process, begin + most)
            finally:
                kill_all(process, mark)
        self.logs[name] = capped(log, LOG_BYTES // (len(PHASES) + 3))
        log.unlink()
        return status, time.monotonic() - begin

    def watch(self, process: subprocess.Popen, deadline: float) -> str:
        """Wait for a process: how it went. One that hangs is asked where it is, first."""
        while process.poll() is None:
            if self.stopped:
                return FAILED
            if time.monotonic() > deadline:
                end(process.pid, os.killpg, signal.SIGABRT)  # Python then prints all stacks
                with suppress(subprocess.TimeoutExpired):
                    process.wait(2)
                return TIMEOUT
            time.sleep(0.05)
        return FAILED if process.returncode else OK

    def install(self) -> None:
        """Install the wheels of .gpu that are missing here, for the phases alone."""
        wheels = gpu_kit.missing_wheels()
        self.report["wheels"] = [wheel.name for wheel in wheels]
        if not wheels:
            return
        site = self.temporary / "site"
        status, _ = self.supervise("wheels", gpu_kit.install_command(wheels, site), 60)
        if status != OK:
            self.problem(f"wheels were not installed: {self.tail('wheels', 3)}")
        paths = [str(site), self.environment.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

    def look(self) -> None:
        """Find out what this machine is. Raises KitError if a given setting is wrong."""
        answer = self.temporary / "about.json"
        command = [sys.executable, str(ABOUT), str(answer), *self.args.settings]
        status, _ = self.supervise("about", command, 90)
        about = read_json(answer)
        checkout = about.pop("checkout", {})
        for text in about.pop("problems", []):
            self.problem(text)
        if status != OK:
            self.problem(f"what the machine is could not be found out ({status})")
        about["versions"] = about.get("versions", {}) | about.pop("libraries", {})
        about["machine"] = checkout.get("machine") or about.get("machine", {})
        self.report |= about
        self.report |= {n: checkout[n] for n in ("commit", "changed") if n in checkout}
        if problems := checkout.get("settings_problems"):
            raise KitError("; ".join(problems))
        asked_for_cpu = self.given.get("DEVICE") == "cpu"
        # A machine that does not tell what it is, though it has a driver, has a GPU.
        untold = "card" not in about and shutil.which("nvidia-smi")
        seen = bool(about.get("card", {}).get("name") or untold)
        self.tiny = asked_for_cpu or not seen
        self.blind = not seen and bool(about.get("driver")) and not asked_for_cpu
        self.report["tiny"] = self.tiny
        if self.tiny:  # threads that wait for each other are slow on cores that others use
            self.environment.setdefault("OMP_NUM_THREADS", "1")
        if self.blind:
            why = about.get("card", {}).get("problem", "no reason told")
            self.problem(f"there is a GPU, and PyTorch cannot use it: {why}")

    def find_data(self) -> None:
        """Take the dataset of .gpu, or that of data/, or make the sample."""
        self.data = {}
        if "DATA_PATH" in self.given:
            return
        self.data = gpu_kit.find_datasets(gpu_kit.KIT / "data")
        self.data = self.data or gpu_kit.find_datasets(ROOT / "data", "sample")
        if "1024" not in self.data:
            made = self.temporary / "data"
            command = [sys.executable, str(gpu_kit.PREPARE), "--sample", "--out", str(made)]
            status, seconds = self.supervise("data", command, 120)
            self.data |= gpu_kit.find_datasets(made)
            if status == OK:
                print(f"the sample dataset was made in {seconds:.0f} s", flush=True)
            else:
                self.problem(f"no dataset ({status}): {self.tail('data', 3)}")
        self.report["data"] = self.data

    def tail(self, name: str, count: int) -> str:
        """Give the last lines of what a process printed."""
        return "\n".join(self.logs.get(name, "").rstrip().splitlines()[-count:])

    def measure(self, phase: Phase) -> dict[str, Any]:
        """Run a phase: what is to be told about it."""
        if self.stopped:
            return {"status": NO_TIME, "headline": "interrupted"}
        if self.blind and phase.name != "environment":
            return {"status": NEEDS_CUDA, "headline": "PyTorch cannot use the GPU"}
        if phase.data and self.data is None and self.left() > phase.least:
            self.find_data()
        if self.left() < phase.least:
            return {"status": NO_TIME, "headline": f"{max(0, self.left()):.0f} s were left"}
        job, answer = self.temporary / "job.json", self.out / "running.json"
        ceiling = self.report["phases"].get("environment", {}).get("figures", {}).get("ceiling", {})
        asked = {"tiny": self.tiny, "given": self.given, "data": self.data or {}}
        write_whole(job, json.dumps(asked | {"tflops": ceiling.get("tflops")}))
        answer.unlink(missing_ok=True)
        command = [sys.executable, str(WORKER), phase.name, str(job), str(answer)]
        status, seconds = self.supervise(phase.name, command, phase.limit)
        found = read_json(answer)
        answer.unlink(missing_ok=True)
        found["status"] = found.get("status", OK) if status == OK else status
        found["seconds"] = round(seconds, 1)
        if found["status"] in (FAILED, TIMEOUT):
            found["output"] = self.tail(phase.name, TAIL_LINES).splitlines()
        if self.stopped:
            found["headline"] = f"interrupted by {signal.Signals(self.stopped).name}"
        return found

    def save(self) -> None:
        """Write all that is known so far."""
        text = json.dumps(self.report, indent=1, default=str)
        parts = [f"==== {name}\n{text}\n" for name, text in self.logs.items()]
        try:
            write_whole(self.out / "gpu.json", text + "\n")
            write_whole(self.out / "gpu.md", table(self.report))
            write_whole(self.out / "all.log", "\n".join(parts))
        except OSError as problem:  # what follows is printed, at least
            self.problem(f"results could not be written: {problem}")

    def phases(self, chosen: list[Phase]) -> None:
        """Run the phases, one after the other."""
        print("| phase | status | s | |\n|---|---|---|---|", flush=True)
        for phase in chosen:
            found = self.measure(phase)
            self.report["phases"][phase.name] = found
            self.save()
            print(phase_row(phase.name, found), flush=True)
            if found["status"] in (FAILED, TIMEOUT) and not self.stopped:
                print("    " + "\n    ".join(found["output"][-12:]), flush=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read what a process has written, if it came to that."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# ===================================== THE TABLE =====================================


def cell(text: Any) -> str:
    """Text that breaks no table."""
    return " ".join(str(text).replace("|", "\\|").split())


def phase_row(name: str, found: dict[str, Any]) -> str:
    """Tell a phase in one row."""
    seconds = f"{found['seconds']:.0f}" if "seconds" in found else ""
    return f"| {name} | {found['status']} | {seconds} | {cell(found.get('headline', ''))} |"


def table(report: dict[str, Any]) -> str:
    """Write all that was found, in Markdown."""
    card, versions = report.get("card", {}), report.get("versions", {})
    name = card.get("name") or f"no GPU: {report.get('machine', {}).get('cpu', 'a CPU')}"
    memory = f", {card['memory_gib']} GiB" if "memory_gib" in card else ""
    lines = [f"# {name}{memory}", ""]
    told = ", ".join(f"{package} {text}" for package, text in versions.items())
    commit = report["commit"]
    if commit == "unknown" and report["prepared"]:
        since = report["prepared"]["changed_since"]
        commit = f"{report['prepared'].get('commit')}, since then changed: {since or 'nothing'}"
    elif report["changed"]:
        commit += f", and {len(report['changed'])} changed files"
    lines += [f"{report['date']}; commit {commit}; {told}", ""]
    if report.get("tiny"):
        lines += ["Tiny models on a CPU, to try the tool: no figure here counts.", ""]
    lines += [f"- {cell(text)}" for text in report["problems"]]
    lines += ["", "| phase | status | s | |", "|---|---|---|---|"]
    lines += [phase_row(name, found) for name, found in report["phases"].items()]
    for name, found in report["phases"].items():
        rows = found.get("rows") or []
        if rows:
            lines += ["", f"| {name} | measured |", "|---|---|"]
            lines += [f"| {cell(what)} | {cell(measured)} |" for what, measured in rows]
    return "\n".join(lines) + "\n"


# ===================================== THE COMMAND =====================================


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [phase.name for phase in PHASES]
    add = parser.add_argument
    add("settings", nargs="*", metavar="NAME=VALUE", help="settings of train_gpt.py")
    add("--seconds", type=float, default=540, help="for all together (%(default)s)")
    add("--phases", default=",".join(names), metavar="A,B", help="by default all")
    add("--out", type=Path, metavar="FOLDER", help="$OUT, or one in benchmarks/results")
    add("--prepare", action="store_true", help="make .gpu, and measure nothing")
    kit = parser.add_argument_group("--prepare")
    add = kit.add_argument
    add("--corpus", type=Path, metavar="FILE", help=".jsonl, also .xz or .gz; else the sample")
    add("--tokenizers", type=Path, nargs="+", default=[], metavar="FILE", help="1024, 8192 pieces")
    add("--wheels", nargs="+", default=[], metavar="NAME==VERSION", help="(zstandard)")
    add("--python", default="3.12", help="of the machine there (%(default)s)")
    args = parser.parse_intermixed_args(arguments)
    wrong = [word for word in args.settings if "=" not in word]
    if wrong:
        parser.error(f"{wrong[0]}: expected NAME=VALUE")
    unknown = [name for name in args.phases.split(",") if name not in names]
    if unknown:
        parser.error(f"--phases {unknown[0]}: no such phase; there are {', '.join(names)}")
    if args.seconds <= 0:
        parser.error(f"--seconds {args.seconds}: expected a number over 0")
    return args


def results_folder(args: argparse.Namespace) -> Path:
    """Where the results go; it is made."""
    named = args.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    out = named or HERE / "results" / f"gpu_{datetime.now():%Y-%m-%d_%H%M%S}"
    out.mkdir(parents=True, exist_ok=True)
    return out.resolve()


def run_all(args: argparse.Namespace) -> int:
    """Measure, and tell the results: the exit code."""
    out, temporary = results_folder(args), Path(tempfile.mkdtemp(prefix="birdie_gpu_"))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump of a GPU's memory would take minutes
    bench = Bench(args, out, temporary)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, bench.note)
    chosen = [phase for phase in PHASES if phase.name in args.phases.split(",")]
    try:
        bench.install()
        bench.look()
        bench.save()
        bench.phases(chosen)
    finally:
        bench.report["whole_seconds"] = round(time.monotonic() - bench.start, 1)
        bench.save()
        shutil.rmtree(temporary, ignore_errors=True)
    print(
        f"\n{table(bench.report)}\nall of this: {bench.report['whole_seconds']:.0f} s, in {out}",
        flush=True,
    )
    failed = [f for f in bench.report["phases"].values() if f["status"] in (FAILED, TIMEOUT)]
    return int(bool(failed) or bool(bench.stopped))


def main(arguments: list[str]) -> int:
    """Make .gpu, or measure: the exit code."""
    args = parse_arguments(arguments)
    if args.prepare:
        gpu_kit.prepare(args)
        return 0
    return run_all(args)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (KitError, OSError) as problem:
        sys.exit(f"gpu.py: error: {problem}")
