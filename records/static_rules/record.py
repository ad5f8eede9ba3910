"""The record folder as the rules see it, and the words that they share."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from reading import Log, Submission, read_logs, read_submission, to_number, track_of

Finding = tuple[str, str]


@dataclass(frozen=True)
class Record:
    """A record folder as the rules see it."""

    folder: Path
    artifact: Path | None
    best: Path | None

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

    @cached_property
    def logs(self) -> list[Log]:
        """The training logs."""
        return read_logs(self.folder)

    @cached_property
    def script(self) -> bytes | None:
        """The bytes of train_gpt.py, if it is there."""
        try:
            return (self.folder / "train_gpt.py").read_bytes()
        except OSError:
            return None

    @property
    def track(self) -> str:
        """The track that the folder lies in, or that submission.json names."""
        return track_of(self.folder) or (self.submission.track if self.submission else "")

    @property
    def is_timed(self) -> bool:
        """Whether the track has the limits of ten minutes."""
        return bool(re.match(r"(track_)?10.?min", self.track, re.IGNORECASE))

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
        table, submission = table_scores(self), self.submission
        headline = submission.val_bpb if submission else math.nan
        chosen = []
        for seed, logs in self.by_seed.items():
            claims = [table.get(seed, math.nan), headline]
            scores = [score for log in logs for score in all_scores(log)]
            if any(agrees(claim, score) for claim in claims for score in scores):
                chosen += logs
        return chosen or self.logs


def plural(number: int, name: str) -> str:
    """1 log, 2 logs."""
    return f"{number} {name}{'s' * (number != 1)}"


def join(parts: Iterable[str]) -> str:
    """Sentences in one line, each once."""
    return "; ".join(dict.fromkeys(filter(None, parts)))


def precision(number: float) -> float:
    """One unit of the last decimal that a claim states."""
    text = repr(number)
    if "e" in text or "." not in text:
        return 1e-8
    return 10.0 ** -min(len(text.partition(".")[2]), 8)


def agrees(claim: float, value: float) -> bool:
    """Whether a claim is a value, rounded or cut off as the claim's decimals tell."""
    return abs(claim - value) <= 1.001 * precision(claim) + 1e-9


def later_bpb(log: Log) -> list[float]:
    """Every number in a log that calls itself a BPB, except those of training steps."""
    found = []
    for line in log.body.split("\n"):
        if "bpb" in line and not re.match(r"[ \t]*(step\b|\d+/\d+)", line):
            match = re.search(r"bpb[\"']?\s{0,9}[:=]?\s{0,9}(\d\.\d{3,20})", line[:1000])
            found += [float(match[1])] if match else []
    return found


def all_scores(log: Log) -> list[float]:
    """Every score that a log states for a whole evaluation, exact ones first."""
    return [bpb for _, _, bpb in log.finals] + later_bpb(log)


def seed_table(record: Record) -> dict[str, dict[str, float]]:
    """The table of seeds in submission.json."""
    return record.submission.seeds if record.submission else {}


def table_scores(record: Record) -> dict[str, float]:
    """seed -> val_bpb that submission.json states."""
    seeds = record.submission.seeds if record.submission else {}
    return {seed: entry["val_bpb"] for seed, entry in seeds.items() if "val_bpb" in entry}


def fact(log: Log, pattern: str) -> float:
    """The last number that a pattern finds in a log, or nan."""
    found = re.findall(pattern, log.body, re.MULTILINE)
    return to_number(found[-1]) if found else math.nan
