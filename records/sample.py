"""Make the sample data, train on it, and sum the run up: run.sh, once all is installed.

What is done already is not done again. A training that was interrupted goes on. If code, settings
or data have changed since, it starts anew; checkpoints of before are renamed to old_*.
"""

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("logs", "sample")
MANIFEST = Path("data", "datasets", "sample_sp1024", "manifest.json")
SETTINGS = {"CONFIG": "configs/sample.env", "RUN_ID": RUN.name, "OUT_DIR": str(RUN.parent)}
# glibc keeps what is freed, on large pages, instead of asking Linux for it again in each step.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000"


def say(text: str) -> None:
    """Print a line at once, if the console takes it."""
    with suppress(OSError):
        os.write(sys.stdout.fileno(), f"run.sh: {text}\n".encode())


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold a file that one process can hold at a time. Ends the program if another one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"run.sh: {busy} {path.read_text(encoding='utf-8')}") from None
        path.write_text(f"process {os.getpid()} on {os.uname().nodename}", encoding="utf-8")
        yield


def attend(*arguments: str, **environment: str) -> None:
    """Run a Python program, which hears of signals to this one. Ends this one if it fails."""
    early: list[int] = []  # signals that came before there was a child
    children: list[subprocess.Popen] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        if not children:
            early.append(number)
        with suppress(ProcessLookupError):
            for child in children:
                os.killpg(child.pid, number)

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.getsignal(n) for n in wanted if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, pass_on)
    # In a group of its own it hears of Ctrl-C once, from here.
    options = {"env": os.environ | environment, "stdin": subprocess.DEVNULL, "process_group": 0}
    children.append(subprocess.Popen([sys.executable, *arguments], **options))
    for number in early[:1]:
        pass_on(number, None)
    code = children[0].wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def ask_settings() -> bytes:
    """Ask for the settings that the training would have; end the program if they are wrong."""
    command = [sys.executable, "train_gpt.py", "--settings"]
    asked = subprocess.run(
        command, env=os.environ | SETTINGS | {"RESUME": ""}, stdout=subprocess.PIPE
    )
    if asked.returncode:
        raise SystemExit(asked.returncode)
    return asked.stdout


def describe_inputs(settings: bytes) -> str:
    """Digest all that the run depends on: the script, its settings, and the data."""
    manifest = MANIFEST.read_bytes() if MANIFEST.is_file() else b""
    code = [path for path in map(Path, ("train_gpt.py", "frontier.py")) if path.exists()]
    parts = [*(path.read_bytes() for path in code), settings, manifest]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def states(stamp: Path, inputs: str) -> bool:
    """Tell whether a stamp is there, and is of these inputs."""
    return stamp.is_file() and stamp.read_bytes() == inputs.encode()


def is_finished(inputs: str) -> bool:
    """Tell whether the run of these inputs is finished, and what it made is there."""
    made = all((RUN / name).is_file() for name in ("final_model.artifact", "metrics.jsonl"))
    return made and states(RUN / "finished", inputs)


def train(inputs: str) -> None:
    """Train, or go on with a training of the same inputs."""
    started = RUN / "started"
    resume = "auto" if states(started, inputs) else ""
    if not resume:
        with locked(RUN / "lock", f"{RUN} is in use by"):  # which train_gpt.py holds as it trains
            for path in RUN.glob("checkpoint_*.pt"):
                path.rename(path.with_name(f"old_{path.name}"))
            started.write_text(inputs)
    tunables = os.environ.get("GLIBC_TUNABLES", MALLOC)
    attend("train_gpt.py", **SETTINGS, RESUME=resume, GLIBC_TUNABLES=tunables)
    (RUN / "finished").write_text(inputs)


def main() -> None:
    """Do what is not done yet."""
    os.chdir(ROOT)
    with locked(Path("logs", ".run.lock"), "another run.sh is at work here:"):
        settings = ask_settings()
        # Of a finished run the data stay, although other packages may be installed by now.
        if is_finished(describe_inputs(settings)):
            say(f"the sample run is finished; remove {RUN} to train again")
        else:
            attend("data/prepare.py", "--sample")
            train(describe_inputs(settings))
        attend("records/summary.py", str(RUN))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as problem:
        sys.exit(f"run.sh: error: {problem}")
