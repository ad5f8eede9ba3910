"""Score streams of tokens with any script that speaks the protocol of docs/evaluation.md.

The script runs as a program, with the rights of the one who starts it. It sees a folder of
validation shards, each a stream, and leaves the NLL of each token but a stream's first.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from core_bundle import CoreError, require
from metrics import MetricsError, load_history, number
from numpy import ndarray

MAGIC, VERSION = 20240520, 1
MOST_STREAMS = 50_000  # in one start: a shard each, and names have six digits
MOST_TOKENS = 2**27
SHARD_BYTES = 8192  # more than a small file of each kind takes, beside 6 bytes a token
MEMORY = Path("/dev/shm")
RUN = "core"
PATIENCE = 30  # seconds in which a script that is told to end may end


def tell(text: str) -> None:
    """Tell a person how things go."""
    print(text, file=sys.stderr, flush=True)


def counted(count: int, noun: str) -> str:
    """Write a number of things."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def write_shard(path: Path, tokens: ndarray) -> None:
    """Write tokens, uint16 (N,), in the published format."""
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def scratch(size: int) -> Path | None:
    """Name the folder for files of `size` bytes in all: in memory, if there is room to spare.

    A disk takes milliseconds for each of the many small files. None is the usual place.
    """
    usable = MEMORY.is_dir() and os.access(MEMORY, os.W_OK)
    return MEMORY if usable and shutil.disk_usage(MEMORY).free > 4 * size else None


def parcels(streams: list[ndarray]) -> Iterator[list[ndarray]]:
    """Split streams into parts for one start each."""
    part: list[ndarray] = []
    count = 0
    for tokens in streams:
        if part and (len(part) == MOST_STREAMS or count + len(tokens) > MOST_TOKENS):
            yield part
            part, count = [], 0
        part.append(tokens)
        count += len(tokens)
    if part:
        yield part


@dataclass
class Script:
    """A script, what it needs to score, and how long its starts have taken."""

    path: Path
    artifact: Path
    tokenizer: Path
    gpus: int = 1
    context: int = 0  # tokens; 0: as long as the script has it
    starts: list[tuple[int, float]] = field(default_factory=list)  # their tokens and seconds
    streams: int = 0  # that were scored
    told_context: int = 0  # in the events that the script has written; 0: none

    def score(self, streams: list[ndarray], what: str) -> list[ndarray]:
        """Give the NLL of each token but a stream's first, in nats. Raises CoreError."""
        found = []
        for part in parcels(streams):
            tokens = sum(map(len, part))
            about = f", about {self.forecast(tokens):.0f} s" if self.starts else ""
            tell(f"{what}: {counted(len(part), 'stream')}, {counted(tokens, 'token')}{about}")
            begin = time.monotonic()
            found += self.start(part)
            self.starts.append((tokens, time.monotonic() - begin))
            self.streams += len(part)
        return found

    def forecast(self, tokens: int) -> float:
        """Say how many seconds a start takes: the shortest one, and the longest one's pace."""
        _, least = min(self.starts, key=lambda start: start[1])
        most, seconds = max(self.starts)
        return least + (seconds - least) / most * tokens

    def start(self, streams: list[ndarray]) -> list[ndarray]:
        """Run the script on streams, and read what it leaves. Raises CoreError."""
        size = sum(SHARD_BYTES + 6 * len(tokens) for tokens in streams)
        with tempfile.TemporaryDirectory(prefix="core-", dir=scratch(size)) as name:
            place = Path(name)
            data, nll = place / "data", place / "nll"
            data.mkdir()
            nll.mkdir()
            for count, tokens in enumerate(streams):
                write_shard(data / f"{stem(count)}.bin", tokens)
            self.run(place, sum(map(len, streams)))
            self.told_context = self.told_context or read_context(place / "logs" / RUN)
            return [
                self.read(nll / f"{stem(count)}.npy", len(tokens))
                for count, tokens in enumerate(streams)
            ]

    def run(self, place: Path, tokens: int) -> None:
        """Run the script to its end. Raises CoreError if it fails."""
        output = place / "output"
        command = [sys.executable, str(self.path)]
        if self.gpus > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            command[1:1] = [*launcher, f"--nproc_per_node={self.gpus}"]
        environment = self.environment(place, tokens)
        with open(output, "wb") as file:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            with ended(process):
                code = wait(process)
        how = f"exit status {code}" if code > 0 else f"killed by signal {-code}"
        require(code == 0, f"{self.path}: {how}: {last_line(output)}")

    def environment(self, place: Path, tokens: int) -> dict[str, str]:
        """Give the variables of the protocol, besides those of the one who starts it."""
        variables = {
            **os.environ,
            "EVAL_ONLY": "1",
            "ARTIFACT": str(self.artifact.resolve()),
            "TOKENIZER_PATH": str(self.tokenizer.resolve()),
            "DATA_PATH": str(place / "data"),
            "VAL_TOKENS": str(tokens),
            "SCORE_STREAMS": "1",
            "SAVE_NLL": str(place / "nll"),
            "OUT_DIR": str(place / "logs"),
            "RUN_ID": RUN,
        }
        config = self.path.resolve().with_name("config.env")
        if config.is_file():  # a record has its settings there
            variables.setdefault("CONFIG", str(config))
        if self.context:
            variables["EVAL_SEQ_LEN"] = str(self.context)
        return variables

    def read(self, path: Path, count: int) -> ndarray:
        """Read the NLLs of a stream of `count` tokens, float (count - 1,). Raises CoreError."""
        protocol = "does it know SCORE_STREAMS and SAVE_NLL (docs/evaluation.md)?"
        try:
            nll = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            told = f"ended, but left no {path.name} in the folder SAVE_NLL"
            raise CoreError(f"{self.path}: {told}; {protocol}") from None
        except (OSError, ValueError, EOFError):
            told = f"left a {path.name} that is no array of numbers"
            raise CoreError(f"{self.path}: {told}; {protocol}") from None
        is_right = isinstance(nll, ndarray) and nll.shape == (count - 1,) and nll.dtype.kind == "f"
        told = f"{count - 1} NLLs of {count} tokens are due in {path.name}"
        require(is_right, f"{self.path}: {told}, not what it holds; {protocol}")
        sound = np.isfinite(nll).all() and nll.min(initial=0) > -1e-3
        require(sound, f"{self.path}: an NLL in {path.name} is negative or not finite")
        return nll


def stem(count: int) -> str:
    """Name a validation shard as published."""
    return f"fineweb_val_{count:06d}"


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave no process behind, whatever happens."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for a program's exit code; on a terminal, count the seconds."""
    begin = time.monotonic()
    shows = sys.stderr.isatty()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(1)
        if shows:
            print(f"{time.monotonic() - begin:.0f} s", end="\r", file=sys.stderr, flush=True)


def last_line(output: Path) -> str:
    """Give the line of a program's output that most likely says what was wrong."""
    text = output.read_bytes()[-(2**16) :].decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if ": error: " in line]
    line = (errors or lines or ["it printed nothing"])[-1]
    return "".join(char if char.isprintable() else "?" for char in line)[:400]


def read_context(folder: Path) -> int:
    """Read the context from the events of a run of train_gpt.py; 0 if it wrote none."""
    try:
        settings = load_history(folder).settings
    except MetricsError:
        return 0
    lengths = [number(settings, name) for name in ("eval_seq_len", "train_seq_len")]
    return next((int(length) for length in lengths if length >= 1), 0)
