"""Run a record's script as a black box, in a fresh place, and collect what it saved.

Nothing here imports the trainer or knows of any model.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece as spm
from streams import write_shard

SCRIPT = "train_gpt.py"
FINAL = re.compile(rb"^final_\S*exact val_loss:(\S+) val_bpb:(\S+)", re.MULTILINE)
# What a script may see of the auditor's environment: where programs and the device are.
KEPT = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LANG")


@dataclass(frozen=True)
class Result:
    """What came of one start of the script; `problem` says why, if nothing did."""

    seconds: float
    problem: str = ""
    loss: float = float("nan")
    bpb: float = float("nan")
    nll: list[np.ndarray] = field(default_factory=list)


def separation(hidden: Iterable[Path]) -> tuple[list[str], str]:
    """Find what to put before a command so that it runs apart, and what that is in words.

    It then has no network and does not see the `hidden` folders, as far as this system can do so.
    """
    needed = [sys.executable, os.path.realpath(sys.executable), sys.prefix, sys.base_prefix]
    needed += [spm.__file__, tempfile.gettempdir()]
    folders = {Path(folder).resolve() for folder in hidden}
    folders = {f for f in folders if not any(Path(n).is_relative_to(f) for n in needed)}
    folders = sorted(f for f in folders if not folders.intersection(f.parents))
    mount = 'while [ "$1" != -- ]; do mount -t tmpfs tmpfs "$1" || exit 97; shift; done; shift; '
    for flags in (["-n", "-m"], ["-r", "-n", "-m"], ["-n"], ["-r", "-n"]):
        hide = [*map(str, folders)] if "-m" in flags else []
        command = ["unshare", *flags, "sh", "-c", mount + 'exec "$@"', "sh", *hide, "--"]
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run([*command, "true"], capture_output=True, timeout=20, check=False)
            if done.returncode == 0:
                what = f", {len(hide)} folder(s) beside it hidden" if hide else ""
                return command, "no network" + what
    return [], "the network could not be taken away"


class Script:
    """A record's script and what it needs to score, each start in a folder of its own."""

    def __init__(self, folder: Path, artifact: Path, tokenizer: Path, data: Path) -> None:
        self.files = {SCRIPT: folder / SCRIPT, "final_model.artifact": artifact}
        self.tokenizer, config = tokenizer, folder / "config.env"
        self.files |= {"config.env": config} if config.is_file() else {}
        for path in (*self.files.values(), tokenizer):
            if not path.is_file():
                raise ValueError(f"{path}: no such file; the script cannot be run without it")
        self.before, self.apart = separation([folder, data, artifact.parent])

    @contextmanager
    def _place(self, streams: list[np.ndarray]) -> Iterator[Path]:
        """Make a fresh folder with nothing but the files and the shards."""
        place = Path(tempfile.mkdtemp(prefix="run"))
        try:
            for name, path in self.files.items():
                shutil.copy(path, place / name)
            for name in ("home", "tmp", "logs", "data", "nll"):
                (place / name).mkdir()
            shutil.copy(self.tokenizer, place / "data" / self.tokenizer.name)
            for number, tokens in enumerate(streams):
                write_shard(place / "data" / f"fineweb_val_{number:06d}.bin", tokens)
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _environment(self, place: Path, streams: list[np.ndarray], apart: bool) -> dict[str, str]:
        """Set the protocol's variables, and nothing of the auditor's but where programs are."""
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        config = {"CONFIG": "config.env"} if "config.env" in self.files else {}
        return {
            **kept,
            **config,
            "HOME": str(place / "home"),
            "TMPDIR": str(place / "tmp"),
            "EVAL_ONLY": "1",
            "ARTIFACT": "final_model.artifact",
            "TOKENIZER_PATH": f"data/{self.tokenizer.name}",
            "DATA_PATH": "data",
            "VAL_TOKENS": str(sum(map(len, streams))),
            "SCORE_STREAMS": "1" if apart else "0",
            "SAVE_NLL": "nll" if apart else "nll/nll.npy",
            "OUT_DIR": "logs",
            "RUN_ID": "score",
        }

    def score(self, streams: list[np.ndarray], apart: bool, seconds: float) -> Result:
        """Score streams, `apart` as SCORE_STREAMS does or else as the shards of one.

        What the script does wrong, also if it takes over `seconds`, ends in the result's problem.
        """
        with self._place(streams) as place:
            log, start = place / "console", time.perf_counter()
            with open(log, "wb") as console:
                process = subprocess.Popen(
                    [*self.before, sys.executable, SCRIPT],
                    cwd=place,
                    env=self._environment(place, streams, apart),
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                try:
                    code = process.wait(seconds)
                except subprocess.TimeoutExpired:
                    code = None
                finally:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            took, text = time.perf_counter() - start, _tail(log)
            if code is None:
                return Result(took, f"not finished after {seconds:.0f} s")
            if code:
                last = (text.decode("utf-8", "replace").strip().splitlines() or ["no output"])[-1]
                ended = f"exit status {code}" if code > 0 else f"killed by signal {-code}"
                return Result(took, f"{ended}; the last line: {last[:200]}")
            return _collect(place, text, len(streams), apart, took)


def _tail(path: Path, most: int = 2**20) -> bytes:
    """Read the end of a file."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read()


def _collect(place: Path, text: bytes, count: int, apart: bool, took: float) -> Result:
    """Collect the scores that a run printed and saved."""
    finals, nll = FINAL.findall(text), []
    if not finals:
        return Result(took, "printed no line final_..._exact val_loss:... val_bpb:...")
    try:
        loss, bpb = map(float, finals[-1])
    except ValueError:
        return Result(took, f"printed a score that is no number: {finals[-1]}")
    names = [f"fineweb_val_{number:06d}" for number in range(count)] if apart else ["nll"]
    for name in names:
        path = place / "nll" / f"{name}.npy"
        try:
            nll.append(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError, MemoryError) as error:
            why = "no such file" if not path.exists() else str(error)
            return Result(took, f"SAVE_NLL left no readable {path.relative_to(place)}: {why}")
    return Result(took, "", loss, bpb, nll)
