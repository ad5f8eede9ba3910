"""A record folder as the rules see it, and the words that they share."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reading import Log, Submission, read_logs, read_submission, to_number, track_of

Finding = tuple[str, str]  # PASS, FAIL or NOT CHECKED, and the evidence

ARTIFACTS = ("*.artifact", "*.ptz", "*.int8.*", "*.int6.*", "final_model*.bin", "final_model*.xz")


@dataclass(frozen=True)
class Record:
    """A record folder, with the artifact and the rival that the command line names, if any."""

    folder: Path
    named_artifact: Path | None = None
    best: Path | None = None

    @cached_property
    def problem(self) -> str:
        """Why submission.json cannot be read; "" if it can."""
        try:
            read_submission(self.folder)
        except ValueError as error:
            return str(error)
        return ""

    @cached_property
    def submission(self) -> Submission | None:
        """submission.json, if it can be read."""
        return None if self.problem else read_submission(self.folder)

    @property
    def raw(self) -> dict[str, Any]:
        """The fields of submission.json as they stand there."""
        return self.submission.raw if self.submission else {}

    @property
    def seed_table(self) -> dict[str, dict[str, float]]:
        """Seed -> numbers, as submission.json states them."""
        return self.submission.seeds if self.submission else {}

    @property
    def seed_scores(self) -> dict[str, float]:
        """Seed -> val_bpb, as submission.json states it."""
        table = self.seed_table.items()
        return {seed: entry["val_bpb"] for seed, entry in table if "val_bpb" in entry}

    @cached_property
    def logs(self) -> list[Log]:
        """The training logs."""
        return read_logs(self.folder)

    @cached_property
    def by_seed(self) -> dict[str, list[Log]]:
        """The logs of each seed; a log without one stands for itself, by its name."""
        groups: dict[str, list[Log]] = {}
        for log in self.logs:
            groups.setdefault(log.seed or log.path.name, []).append(log)
        return groups

    @cached_property
    def claimed(self) -> list[Log]:
        """The logs of the seeds whose scores submission.json names; all, if it names none.

        A folder may hold logs of other runs, such as a baseline's, which claim nothing.
        """
        headline = self.submission.val_bpb if self.submission else math.nan
        chosen = []
        for seed, logs in self.by_seed.items():
            claims = [self.seed_scores.get(seed, math.nan), headline]
            scores = [score for log in logs for score in all_scores(log)]
            if any(agrees(claim, score) for claim in claims for score in scores):
                chosen += logs
        return chosen or self.logs

    @cached_property
    def script(self) -> bytes | None:
        """The bytes of train_gpt.py, if it is there."""
        try:
            return (self.folder / "train_gpt.py").read_bytes()
        except OSError:
            return None

    @property
    def script_text(self) -> str:
        """The text of train_gpt.py; "" if it is not there."""
        return (self.script or b"").decode("utf-8", errors="replace")

    @cached_property
    def artifact(self) -> Path | None:
        """The artifact's file: the one that was named, or the only one in the folder."""
        path = self.named_artifact or find_artifact(self.folder)
        return path if path and path.is_file() else None

    @property
    def track(self) -> str:
        """The track that the folder lies in, or that submission.json names."""
        return track_of(self.folder) or (self.submission.track if self.submission else "")

    @property
    def is_timed(self) -> bool:
        """Whether the track has the limits of ten minutes."""
        return bool(re.match(r"(track_)?10.?min", self.track, re.IGNORECASE))


def find_artifact(folder: Path) -> Path | None:
    """Find the artifact in a record folder, if there is just one."""
    found = {path for pattern in ARTIFACTS for path in folder.glob(pattern) if path.is_file()}
    return found.pop() if len(found) == 1 else None


# ------------------------------------ scores and claims ------------------------------------


def precision(number: float) -> float:
    """Tell one unit of the last decimal that a claim states."""
    text = repr(number)
    if "e" in text or "." not in text:
        return 1e-8
    decimals = len(text.partition(".")[2])
    return 10.0 ** -min(decimals, 8)


def agrees(claim: float, value: float) -> bool:
    """Tell whether a claim is a value, rounded or cut off as the claim's decimals tell."""
    return abs(claim - value) <= 1.001 * precision(claim) + 1e-9


def all_scores(log: Log) -> list[float]:
    """List every score that a log states for a whole evaluation, exact ones first."""
    return [bpb for _, _, bpb in log.finals] + later_bpb(log)


def later_bpb(log: Log) -> list[float]:
    """List every number in a log that calls itself a BPB, except those of training steps."""
    found = []
    for line in log.body.split("\n"):
        if "bpb" not in line or re.match(r"[ \t]*(step\b|\d+/\d+)", line):
            continue
        if match := re.search(r"bpb[\"']?\s{0,9}[:=]?\s{0,9}(\d\.\d{3,20})", line[:1000]):
            found.append(float(match[1]))
    return found


def fact(log: Log, pattern: str) -> float:
    """Read the last number that a pattern finds in a log; nan without one."""
    found = re.findall(pattern, log.body, re.MULTILINE)
    return to_number(found[-1]) if found else math.nan


# ------------------------------------ words ------------------------------------


def plural(number: int, name: str) -> str:
    """Write 1 log, 2 logs."""
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def join(parts: Iterable[str]) -> str:
    """Join sentences in one line, each once."""
    return "; ".join(dict.fromkeys(filter(None, parts)))
