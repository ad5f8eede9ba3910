"""Run a record's script as a black box, in a fresh place, and collect what it saved.

Nothing here imports the trainer or knows of any model. A script finds what it would find in a real
evaluation: the same names of files, folders and variables, whatever the reason for the run.
"""

import io
import math
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import isolation
import numpy as np
from helpers import SCRIPT, find_used
from isolation import IsolationError, box
from isolation.layout import python_environment
from reading import read_final
from streams import shard

__all__ = ["SCRIPT", "IsolationError", "Result", "Script", "check_isolation"]

ARTIFACT = "final_model.artifact"
DATASET = "fineweb10B_sp1024"
# What a script may see of the auditor's environment: where libraries and the device are.
KEPT = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LANG")
NOT_APART = "NOT ISOLATED: the script ran with your own rights, by --no-isolation"
# An .npy file's header, and the bytes of the widest number a token that may be read.
HEADER, WIDEST = 4096, 16
LONGEST_LINE = 1000


@dataclass(frozen=True)
class Result:
    """What came of one start of the script; `problem` says why, if nothing did."""

    seconds: float
    problem: str = ""
    loss: float = float("nan")
    bpb: float = float("nan")
    nll: list[np.ndarray] = field(default_factory=list)


def check_isolation() -> None:
    """Raise IsolationError if a script cannot run apart on this machine."""
    isolation.find([])


class Script:
    """A record's script and what it needs to score, each start in a folder of its own.

    `apart` says how far it is kept from what is the auditor's. Raises IsolationError if it is to be
    `isolated` and cannot be.
    """

    def __init__(
        self, folder: Path, artifact: Path, tokenizer: Path, data: Path, isolated: bool = True
    ) -> None:
        self.tokenizer, self.data = tokenizer, data
        self.files = {SCRIPT: folder / SCRIPT, ARTIFACT: artifact}
        if (folder / "config.env").is_file():
            self.files["config.env"] = folder / "config.env"
        for path in find_used(folder):
            self.files[path.relative_to(folder).as_posix()] = path
        for path in (*self.files.values(), tokenizer):
            check_file(path, folder)
        self.isolation: isolation.Isolation | None = None
        self.apart = NOT_APART
        if isolated:
            self.isolation = isolation.find([folder, data, artifact.parent, tokenizer.parent])
            self.apart = self.isolation.words

    def score(
        self,
        streams: list[np.ndarray],
        apart: bool,
        seconds: float,
        sizes: list[np.ndarray] | None = None,
    ) -> Result:
        """Score streams, `apart` as SCORE_STREAMS does or else as the shards of one.

        `sizes` are the original bytes of each token, written beside the shards. What the script
        does wrong, also if it takes over `seconds`, ends in the result's problem.
        """
        lengths = [len(tokens) for tokens in streams] if apart else [sum(map(len, streams))]
        names = [f"nll/{stem(number)}.npy" for number in range(len(lengths))]
        names = names if apart else ["nll/nll.npy"]
        most = [HEADER + WIDEST * length for length in lengths]
        with self._place() as place:
            job = box.Job(
                command=[sys.executable, SCRIPT],
                folder=place,
                environment=self._environment(place, streams, apart),
                items=[*self._items(), *self._shards(streams, sizes or [])],
                folders=["nll", "logs"],
                wanted=dict(zip(names, most, strict=True)),
            )
            ended = box.run(job, seconds, self.isolation)
        return read_result(ended, seconds)

    @contextmanager
    def _place(self) -> Iterator[str]:
        """Name the folder to work in; without isolation, make it and remove it."""
        if self.isolation:
            yield isolation.WORK
            return
        place = tempfile.mkdtemp()
        try:
            for name in ("home", "tmp", "parameter-golf"):
                os.mkdir(f"{place}/{name}")
            yield f"{place}/parameter-golf"
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _items(self) -> Iterator[box.Item]:
        """List the files that are as they were given."""
        for name, path in self.files.items():
            yield box.Item(name, path, path.stat().st_mtime)
        yield box.Item(self._tokenizer_path(), self.tokenizer, self.tokenizer.stat().st_mtime)

    def _shards(self, streams: list[np.ndarray], sizes: list[np.ndarray]) -> Iterator[box.Item]:
        """Write the shards, as old as those of the data folder."""
        given = next(iter(sorted(self.data.glob("fineweb_val_*.bin"))), self.tokenizer)
        when, folder = given.stat().st_mtime, self._data_path()
        for number, tokens in enumerate(streams):
            yield box.Item(f"{folder}/{stem(number)}.bin", shard(tokens), when)
        for number, counts in enumerate(sizes):
            yield box.Item(f"{folder}/{stem(number, 'bytes_')}.bin", shard(counts), when)

    def _data_path(self) -> str:
        """Name the data folder as the one that was given, in the published place."""
        return f"./data/datasets/{plain(self.data.resolve().name, DATASET)}"

    def _tokenizer_path(self) -> str:
        """Name the tokenizer as the one that was given, in the published place."""
        name = self.tokenizer.name
        return f"./data/tokenizers/{plain(name, 'fineweb_1024_bpe' + self.tokenizer.suffix)}"

    def _environment(self, place: str, streams: list[np.ndarray], apart: bool) -> dict[str, str]:
        """Set the protocol's variables and the usual ones, as a person who evaluates has them."""
        around, programs = {"HOME": isolation.HOME}, isolation.PATH
        if not self.isolation:
            beside, programs = os.path.dirname(place), os.environ.get("PATH", isolation.PATH)
            around = {"HOME": f"{beside}/home", "TMPDIR": f"{beside}/tmp"}
        if sys.prefix != sys.base_prefix:
            around["VIRTUAL_ENV"] = sys.prefix
        if "config.env" in self.files:
            around["CONFIG"] = "config.env"
        return {
            "LANG": "C.UTF-8",
            **{name: os.environ[name] for name in KEPT if name in os.environ},
            **python_environment(),
            **around,
            "PATH": f"{os.path.dirname(sys.executable)}:{programs}",
            "USER": "user",
            "LOGNAME": "user",
            "SHELL": "/bin/bash",
            "PWD": place,
            "EVAL_ONLY": "1",
            "ARTIFACT": ARTIFACT,
            "TOKENIZER_PATH": self._tokenizer_path(),
            "DATA_PATH": self._data_path(),
            "VAL_TOKENS": str(sum(map(len, streams))),
            "SCORE_STREAMS": "1" if apart else "0",
            "SAVE_NLL": "nll" if apart else "nll/nll.npy",
            "OUT_DIR": "logs",
            "RUN_ID": str(uuid.uuid4()),
        }


def check_file(path: Path, folder: Path) -> None:
    """Raise ValueError if this is no file, or a link that leads out of the record's folder."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the script cannot be run without it")
    is_inside = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
    if is_inside and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path}: a link out of its folder; put the file there")


def plain(name: str, usual: str) -> str:
    """Keep a name unless it would tell a script that it is audited."""
    return usual if "audit" in name.lower() or not name else name


def stem(number: int, kind: str = "") -> str:
    """Name a validation shard as published, or its sidecar."""
    return f"fineweb_val_{kind}{number:06d}"


# ------------------------------------ what a script left ------------------------------------


def read_result(ended: box.Ended, seconds: float) -> Result:
    """Read the scores that a run printed and saved; or say in a line why there are none."""
    took, lines = ended.seconds, readable(ended.console)
    last = f"the last line: {lines[-1][:200] if lines else 'no output'}"
    if ended.late:
        return Result(took, f"not finished after {seconds:.0f} s")
    if ended.code is None:
        return Result(took, f"it ended without results, out of memory or by force; {last}")
    if ended.code:
        code = ended.code
        how = f"exit status {code}" if code > 0 else f"killed by signal {-code}"
        return Result(took, f"{how}; {last}")
    finals = [final for final in map(read_final, lines) if final]
    if not finals:
        return Result(took, f"printed no line final_..._exact val_loss:... val_bpb:...; {last}")
    nll = []
    for name, content in ended.files.items():
        try:
            nll.append(read_array(content))
        except ValueError as error:
            return Result(took, f"SAVE_NLL left no readable {name}: {error}")
    _, loss, bpb = finals[-1]
    return Result(took, "", loss, bpb, nll)


def readable(console: bytes) -> list[str]:
    """Split what was printed into lines that are safe to show: nothing in them moves a cursor."""
    lines = []
    for line in console.decode("utf-8", "replace").replace("\r", "\n").split("\n"):
        shown = "".join(c if c.isprintable() else "?" for c in line[:LONGEST_LINE]).strip()
        if shown:
            lines.append(shown)
    return lines


def read_array(content: bytes | str) -> np.ndarray:
    """Read the bytes of an .npy file of plain numbers; ValueError if they are something else.

    The header is believed only if the numbers that it promises are all that follows it.
    """
    if isinstance(content, str):
        raise ValueError(content)
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of the format is not known")
    if dtype.kind not in "fiu":
        raise ValueError(f"{str(dtype)[:60]} is no kind of plain number")
    left = len(content) - file.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != left:
        raise ValueError(f"its header promises {str(shape)[:60]} numbers, {left} bytes follow")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape)
