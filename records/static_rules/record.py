"""A record folder as the rules see it, and the words that they share."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reading import Log, Submission, read_logs, read_submission, seed_name, to_number, track_of

Finding = tuple[str, str]  # PASS, WARN, FAIL or NOT CHECKED, and the evidence

LETTER, PRACTICE = "letter", "practice"  # the challenge's rules, or as they were applied
MOST_ROUNDING = 1e-4  # of a score, however few decimals a claim states

ARTIFACTS = ("*.artifact", "*.ptz", "*.int8.*", "*.int6.*", "final_model*.bin", "final_model*.xz")
# A line of progress, which tells the score so far: step:5, 5/100, ttt_chunk [5/100].
STEP_OF = re.compile(r"\A[ \t]*step\b|\d/\d")
LATER_BPB = re.compile(r"bpb[\"']?\s{0,9}[:=]?\s{0,9}(\d\.\d{3,20})")
LINE = 1000  # as far as a line is read for a score
# Words in the name or folder of a log that is a side experiment's.
SIDE = re.compile(
    r"(?<![a-z])(?:ablat|baseline|control|debug|dry.?run|no.?ttt|proxy|sanity|smoke|sweep)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Record:
    """A record folder, with the artifact and the rival that the command line names, if any."""

    folder: Path
    named_artifact: Path | None = None
    best: Path | None = None
    rules: str = LETTER

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
    def claimed_seeds(self) -> list[str]:
        """The seeds that submission.json names: in its table of scores, and in its list."""
        listed = self.raw.get("seeds")
        names = listed if isinstance(listed, list) else [self.raw.get("seed")]
        found = [*self.seed_table, *(seed_name(name) for name in names if is_plain(name))]
        return [*dict.fromkeys(filter(None, found))]

    def seed_of(self, log: Log) -> str:
        """Tell the seed of a log; of one that names none, a claimed one that fits, or "".

        Its file's name has that number, such as log42.txt, or it states that seed's score.
        """
        if log.seed:
            return log.seed
        numbers = {seed_name(number) for number in re.findall(r"\d{1,20}", log.path.stem)}
        named = numbers & {*self.claimed_seeds}
        if len(named) == 1:
            return named.pop()
        taken = {other.seed for other in self.logs}
        free = [(seed, score) for seed, score in self.seed_scores.items() if seed not in taken]
        return next((seed for seed, score in free if states(log, score)), "")

    def is_aside(self, log: Log) -> bool:
        """Tell whether a log is of a side experiment: by its place, where it states no claim."""
        place = log.path.relative_to(self.folder)
        is_apart = len(place.parts) > 1 and self.is_told_at_the_top
        if not (is_apart or SIDE.search(place.as_posix())):
            return False
        claims = [self.seed_scores.get(log.seed, math.nan)]
        if self.submission:
            claims.append(self.submission.val_bpb)
        return not any(states(log, claim) for claim in claims)

    @cached_property
    def is_told_at_the_top(self) -> bool:
        """Whether every claimed seed has a log in the folder itself, not in one below."""
        told = {log.seed for log in self.logs if log.path.parent == self.folder}
        return bool(self.claimed_seeds) and told >= {*self.claimed_seeds}

    @cached_property
    def claimed(self) -> list[Log]:
        """Every log that speaks for the record: of the seeds it claims; all, if it claims none.

        Nothing is left out by what it says. Side experiments are, and seeds that no claim names;
        a log that tells no seed may be of any.
        """
        main = [log for log in self.logs if not self.is_aside(log)] or self.logs
        names = {*self.claimed_seeds, ""} if self.claimed_seeds else set()
        chosen = [log for log in main if not names or self.seed_of(log) in names]
        return chosen or main

    @cached_property
    def asides(self) -> list[Log]:
        """The other logs, which no claim names."""
        chosen = {log.path for log in self.claimed}
        return [log for log in self.logs if log.path not in chosen]

    @cached_property
    def by_seed(self) -> dict[str, list[Log]]:
        """The claimed logs of each seed; a log without one stands for itself, by its name."""
        groups: dict[str, list[Log]] = {}
        for log in self.claimed:
            groups.setdefault(self.seed_of(log) or log.path.name, []).append(log)
        return groups

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


def tolerance(claim: float) -> float:
    """Tell how far a claim may be from a value by rounding: half a unit, and 1e-4 at most."""
    return min(precision(claim) / 2, MOST_ROUNDING) + 1e-9


def agrees(claim: float, value: float) -> bool:
    """Tell whether a claim is a value, rounded as the claim's decimals tell."""
    return abs(claim - value) <= tolerance(claim)


def is_cut_off(claim: float, value: float) -> bool:
    """Tell whether a claim is a value with its last decimals cut off, where rounding adds one."""
    return 0 < value - claim < min(precision(claim), MOST_ROUNDING)


def states(log: Log, claim: float) -> bool:
    """Tell whether a log states a claimed score."""
    return any(agrees(claim, score) for score in all_scores(log))


def is_plain(value: Any) -> bool:
    """Tell whether a JSON value can name a seed."""
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def all_scores(log: Log) -> list[float]:
    """List every score that a log states for a whole evaluation, exact ones first."""
    return [bpb for _, _, bpb in log.finals] + later_bpb(log)


def later_bpb(log: Log) -> list[float]:
    """List every number in a log that calls itself a BPB, except those of steps and chunks."""
    found = []
    for line in log.body.split("\n"):
        if "bpb" not in line or STEP_OF.search(line[:LINE]):
            continue
        if match := LATER_BPB.search(line[:LINE]):
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
