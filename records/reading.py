"""Reading record folders of any age: submission.json in all spellings, and training logs.

Nothing here judges; records/static_rules/ and records/dynamic_rules.py do.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

PASS, WARN, FAIL, NOT_CHECKED = "PASS", "WARN", "FAIL", "NOT CHECKED"


@dataclass(frozen=True)
class Verdict:
    """What a rule found: PASS, WARN, FAIL or NOT CHECKED, and the numbers behind it in one line.

    WARN is said of what a reviewer should know and what decides nothing by itself.
    """

    rule: str
    state: str
    evidence: str


@dataclass(frozen=True)
class Log:
    """The last run in a training log; nan, 0 and "" stand for what it does not say."""

    path: Path
    seed: str
    code: tuple[str, ...]  # the script, and what counts with it
    settings: dict[str, str]
    finals: list[tuple[str, float, float]]
    vals: list[tuple[int, float, float, float]]
    steps: int
    train_ms: float
    eval_s: float
    total_bytes: int
    code_bytes: int
    artifact_bytes: int
    finished: bool
    runs: int = 1  # how many runs the file holds
    body: str = field(default="", repr=False)  # the console lines of the last run
    named_seed: str = ""  # the seed that the file's name tells

    @property
    def source(self) -> str:
        """The script."""
        return self.code[0] if self.code else ""


@dataclass(frozen=True)
class Submission:
    """A submission.json; nan, 0, "" and {} stand for what it does not say."""

    folder: Path
    name: str
    author: str
    github_id: str
    date: str
    track: str
    val_bpb: float
    val_bpb_std: float
    val_loss: float
    bytes_total: int
    bytes_code: int
    seeds: dict[str, dict[str, float]]
    raw: dict[str, Any]


# ------------------------------------ submission.json ------------------------------------

# The spellings that were seen in public files, the usual one first.
SPELLINGS = {
    "name": ["name", "run_name", "title", "submission_name"],
    "author": ["author", "authors", "author_name"],
    "github_id": ["github_id", "github", "github_username", "github_user", "author_github"],
    "date": ["date", "timestamp", "submission_date"],
    "track": ["track", "submission_type"],
    "val_bpb": ["val_bpb", "mean_val_bpb", "val_bpb_mean", "mean_bpb", "val_bpb_3seed_mean"],
    "val_bpb_std": ["val_bpb_std", "std_val_bpb", "std_bpb", "val_bpb_3seed_std"],
    "val_loss": [
        *("val_loss", "mean_val_loss", "val_loss_mean", "val_loss_nats", "mean_val_loss_nats")
    ],
    "bytes_total": [
        *("bytes_total", "total_bytes", "bytes_total_max", "artifact_bytes_max"),
        *("artifact_size_bytes", "artifact_bytes"),
    ],
    "bytes_code": ["bytes_code", "code_bytes"],
}
SEED_TABLES = ["seed_results", "seeds", "seed_scores", "results_by_seed", "per_seed"]
SEED_SPELLINGS = {
    "val_bpb": ["val_bpb", "bpb", "post_ttt_val_bpb", "ttt_bpb", "sliding_bpb", "score"],
    "val_loss": ["val_loss", "val_loss_nats", "loss"],
    "artifact_bytes": ["artifact_bytes", "bytes_total", "total_bytes", "artifact_size_bytes"],
}
FOLDER = re.compile(r"(\d{4}-\d\d-\d\d)_?(.*)", re.DOTALL)
# A loss in nats per token of any known tokenizer is above this; a score in bits per byte is below.
HIGHEST_BPB_FOR_SURE = 1.6


def to_number(value: Any) -> float:
    """Read the number that a JSON value states, also as text such as "15,863,489"; else nan."""
    if isinstance(value, str):
        value = value.strip().replace(",", "").replace("_", "")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def to_text(value: Any) -> str:
    """Read a JSON value as one line of text; "" for none."""
    if isinstance(value, list):
        return ", ".join(filter(None, map(to_text, value)))
    if isinstance(value, Mapping):
        return to_text(value.get("name", ""))
    return "" if value is None else " ".join(str(value).split())


def first_text(raw: Mapping[str, Any], names: Iterable[str]) -> str:
    """Find the first of these fields that holds text."""
    return next(filter(None, (to_text(raw.get(name)) for name in names)), "")


def first_number(raw: Mapping[str, Any], names: Iterable[str]) -> float:
    """Find the first of these fields that holds a number, else nan."""
    numbers = (to_number(raw.get(name)) for name in names)
    return next((number for number in numbers if not math.isnan(number)), math.nan)


def whole(number: float) -> int:
    """Turn a number into a count: 0 for nan and for what is below 0."""
    return 0 if math.isnan(number) or number < 0 else int(number)


def seed_entry(value: Any) -> dict[str, float]:
    """Read a seed's entry: val_bpb, val_loss and all other numbers in it."""
    if not isinstance(value, Mapping):
        number = to_number(value)
        return {} if math.isnan(number) else {"val_bpb": number}
    numbers = {str(name): to_number(item) for name, item in value.items()}
    entry = {name: number for name, number in numbers.items() if not math.isnan(number)}
    for name, spellings in SEED_SPELLINGS.items():
        number = first_number(value, spellings)
        if not math.isnan(number):
            entry[name] = number
    return entry


def read_seeds(raw: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Read seed -> numbers, of a table by seed or of a list whose entries name their seed."""
    for name in SEED_TABLES:
        table = raw.get(name)
        if isinstance(table, list):
            named = [row for row in table if isinstance(row, Mapping) and "seed" in row]
            table = {to_text(row["seed"]): {**row, "seed": None} for row in named}
        if isinstance(table, Mapping):
            entries = {seed_name(seed): seed_entry(value) for seed, value in table.items()}
            entries = {seed: entry for seed, entry in entries.items() if seed and entry}
            if entries:
                return entries
    return {}


def seed_name(key: Any) -> str:
    """Read the seed that a key such as "42", "seed_42" or "seed42" means; "" for others."""
    match = re.fullmatch(r"(?:seed)?[\s_:=-]*(\d{1,20})", to_text(key), re.IGNORECASE)
    return str(int(match[1])) if match else ""


def load_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; ValueError says in a line what is wrong."""
    try:
        raw = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds a {type(raw).__name__}; it must be an object, {{...}}")
    if depth(raw) > 32:
        raise ValueError(f"{path}: is nested {depth(raw)} deep; nothing that a record states is")
    return raw


def depth(value: Any) -> int:
    """Count how deep lists and objects are nested in a JSON value."""
    count, level = 0, [value]
    while level := [v for v in level if isinstance(v, dict | list)]:
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
        count += 1
    return count


def read_submission(folder: Path) -> Submission:
    """Read submission.json of a record folder, in any known spelling.

    A score that stands in val_loss, with no val_bpb, is read as the score. The folder's name tells
    the date and the name that the file does not. Raises ValueError, of one line for people, if
    there is no such file or it is not a JSON object.
    """
    path = folder / "submission.json"
    if not path.is_file():
        raise ValueError(f"{path}: not there; a record folder needs one")
    raw = load_json(path)
    numbers = {
        name: first_number(raw, SPELLINGS[name])
        for name in ("val_bpb", "val_bpb_std", "val_loss", "bytes_total", "bytes_code")
    }
    if math.isnan(numbers["val_bpb"]) and 0 < numbers["val_loss"] < HIGHEST_BPB_FOR_SURE:
        numbers["val_bpb"], numbers["val_loss"] = numbers["val_loss"], math.nan
    text = {
        name: first_text(raw, SPELLINGS[name])
        for name in ("name", "author", "github_id", "date", "track")
    }
    day, name = parts_of_name(folder)
    text["date"] = text["date"] or day
    text["name"] = text["name"] or name
    text["track"] = text["track"] or track_of(folder)
    return Submission(
        folder=folder,
        **text,
        val_bpb=numbers["val_bpb"],
        val_bpb_std=numbers["val_bpb_std"],
        val_loss=numbers["val_loss"],
        bytes_total=whole(numbers["bytes_total"]),
        bytes_code=whole(numbers["bytes_code"]),
        seeds=read_seeds(raw),
        raw=raw,
    )


def parts_of_name(folder: Path) -> tuple[str, str]:
    """Read day and name from a folder's name, 2026-04-09_Name; "" for what it does not tell."""
    match = FOLDER.fullmatch(folder.absolute().name)
    return (match[1], " ".join(match[2].split("_"))) if match else ("", "")


def track_of(folder: Path) -> str:
    """Name the track that a folder lies in, such as 10min_16mb; "" if it lies in none."""
    name = folder.absolute().parent.name
    return name.removeprefix("track_") if name.startswith("track_") else ""


# ------------------------------------ logs ------------------------------------

NUMBER = r"(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
BAR = re.compile(r"={60,}\s*")
# A pattern that begins with a repeat is held at the start of its text: no text makes it slow.
SEED_ROW = re.compile(r"\A[ \t]*seed[ \t]*:[ \t]*(\d{1,20})\b", re.IGNORECASE)
SEED_WORD = re.compile(r"(?<!\S)seed=(\d{1,20})(?!\S)", re.IGNORECASE)
STEP = re.compile(r"\A(?:step[:\s]\s*(\d+)(?:\s*/\s*\d+)?|(\d+)\s*/\s*\d+):?\s[^\n]*?loss")
SCORES = re.compile(rf"val_loss:\s*{NUMBER}\s+val_bpb:\s*{NUMBER}")
TRAIN_TIME = re.compile(rf"train_time:\s*{NUMBER}\s*(ms|s|m)\b")
EVAL_TIME = re.compile(rf"eval_time:\s*{NUMBER}\s*(ms|s|m)\b")
UNITS = {"ms": 1.0, "s": 1e3, "m": 6e4}
SIZES = {
    "total": re.compile(r"Total submission size\b"),
    "code": re.compile(r"Code size\b"),
    "artifact": re.compile(r"[Ss]erialized[ _]model[ _](?=[^\s:])"),
}
COLON_SIZE = re.compile(r":\s*([\d,_]+)")
RAW_SIZE = re.compile(r"Serialized model:\s*([\d,_]+)")
OWN_SIZES = re.compile(r"\((\d+) code, (\d+) artifact\)")
# Scores of a whole evaluation that are not those of the artifact.
NOT_FINAL = re.compile(
    r"pre.?quant|post.?ema|diagnostic|trained_validation|raw_model|before|swa:|ema:", re.IGNORECASE
)
# Colours, and what launchers put before a line: [modal], [rank0]:, 2026-04-30T20:14:28Z
NOISE = re.compile(
    r"\x1b\[[0-9;]*[A-Za-z]"
    r"|^[ \t]*\[[^\]\n]{0,60}\]:?[ \t]*"
    r"|^\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?\s+",
    re.MULTILINE,
)
NEW_SOURCE = re.compile(r'"""|\'\'\'|#!/|import \w|from [\w.]+ import ')
IMPORT = re.compile(r"import \w|from [\w.]+ import ")
TABLE_ROW = re.compile(r"\A(?:Hyperparameters|[ \t]*\w+: ?\S|[A-Z][A-Z0-9_]*=)")
SETTING = re.compile(r"\A([A-Z][A-Z0-9_]*)=(.*)")


def read_text(path: Path) -> str:
    """Read a text file, whatever its bytes: bad ones become U+FFFD; "" if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError:
        return ""
    coding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return data.decode(coding, errors="replace")


def find_bars(lines: list[str]) -> list[int]:
    """Find the lines of "=" that part sources, tables and the run from one another."""
    return [i for i, line in enumerate(lines) if BAR.fullmatch(line)]


def find_code(lines: list[str]) -> list[range]:
    """Find the scripts that a log holds: each up to the line of "=" that ends it.

    Scripts of all ages end by such a line. Before them may stand a table of settings, the lines
    of an earlier run, or both. Behind the last line of "=" there is no script.
    """
    found, start = [], 0
    for bar in find_bars(lines):
        part = lines[start:bar]
        if any(IMPORT.match(line) for line in part):
            found.append(range(start + first_of_code(part), bar))
        start = bar + 1
    return found


def first_of_code(part: list[str]) -> int:
    """Find where the script begins in what stands before a line of "=".

    It is all of that, unless a table of settings or an earlier run stands at its head.
    """
    first = next(i for i, line in enumerate(part) if NEW_SOURCE.match(line))
    while first and part[first - 1][:1] in ("#", ""):
        first -= 1
    has_head = any(TABLE_ROW.match(line) or is_mark(line) for line in part[:first])
    return first if has_head else 0


def last_run(lines: list[str]) -> tuple[list[str], list[str], int]:
    """Find the sources and lines of the last run of a log, and count its runs.

    A log that is appended to prints the source again; a console's only begins to count again. Ours
    print quantizer.py and frontier.py behind the script, if they were used, and keeper.py, if it
    was there.
    """
    scripts = find_code(lines)
    sources: list[str] = []
    start, runs, last_mark, i = 0, 1, -1, 0
    for script in scripts:
        marks = [k for k in range(i, script.start) if is_mark(lines[k])]
        last_mark = marks[-1] if marks else last_mark
        if last_mark >= start:
            start, runs = head_of_run(lines, last_mark, script.start), runs + 1
            sources.clear()
        sources.append("\n".join(lines[script.start : script.stop]))
        i = script.stop
    body = outside(lines, scripts, start)
    first = next((k for k, line in enumerate(body) if line.strip(" =\r")), len(body))
    body = NOISE.sub("", "\n".join(body[first:])).replace("\r", "\n").split("\n")
    return sources, body, runs


def sources_that_count(sources: list[str], size: int) -> tuple[str, ...]:
    """Take the first sources, up to the size that a log counts; if no sum is that, the script."""
    sums = accumulate(len(source.encode()) for source in sources)
    counts = (count for count, total in enumerate(sums, 1) if total == size)
    return tuple(sources[: next(counts, 1)])


def is_mark(line: str) -> bool:
    """Tell whether a line shows that a run had begun: it counts a step or states a score."""
    return bool(STEP.match(line) or SCORES.search(line))


def head_of_run(lines: list[str], last_mark: int, script: int) -> int:
    """Find where an appended run begins: at its settings, if "=" opens them, or at its script."""
    return next((k for k in range(last_mark, script) if BAR.fullmatch(lines[k])), script)


def outside(lines: list[str], scripts: list[range], start: int) -> list[str]:
    """List the lines from `start` on that are no script, nor the "=" that ends one."""
    body: list[str] = []
    for script in scripts:
        if script.stop > start:
            body += lines[start : script.start]
            start = script.stop + 1
    return body + lines[start:]


def step_number(match: re.Match) -> int:
    """Read the step that a line is about."""
    return int((match[1] or match[2])[:18])


def count_again(lines: list[str]) -> list[int]:
    """Find where the step counter falls back: there another run begins."""
    starts, last = [], -1
    for i, line in enumerate(lines):
        if match := STEP.match(line):
            step = step_number(match)
            if step < last and step <= 1:
                starts.append(i)
            last = step
    return starts


def read_settings(lines: list[str]) -> dict[str, str]:
    """Read the dotenv block at the head of our logs; {} for others."""
    found: dict[str, str] = {}
    for line in lines:
        match = SETTING.fullmatch(line)
        if not match:
            break
        found[match[1]] = match[2]
    return found if len(found) >= 3 else {}


def milliseconds(match: re.Match) -> float:
    """Read a time in milliseconds."""
    return float(match[1]) * UNITS[match[2]]


def read_final(line: str) -> tuple[str, float, float] | None:
    """Read scheme, loss and score of a line that states the artifact's in full precision."""
    match = SCORES.search(line)
    label = line[: match.start()].strip(" :-") if match else ""
    if not match or not label or label.startswith("step") or NOT_FINAL.search(label):
        return None
    if min(len(number.partition(".")[2]) for number in match.groups()) < 6:  # or cut off
        return None
    scheme = label.removesuffix("_exact").removeprefix("final_").removesuffix("_roundtrip")
    return scheme, float(match[1]), float(match[2])


def labelled_size(line: str, label: re.Pattern[str]) -> int | None:
    """Read the size behind a label and the next colon; None without them.

    In two steps: one pattern for both would go through the line again from every label in it.
    """
    found = label.search(line)
    colon = line.find(":", found.end()) if found else -1
    size = COLON_SIZE.match(line, colon) if colon >= 0 else None
    return whole(to_number(size[1])) if size else None


class Tally:
    """What the lines of one run add up to."""

    def __init__(self) -> None:
        self.finals: list[tuple[str, float, float]] = []
        self.vals: list[tuple[int, float, float, float]] = []
        self.steps, self.train_ms, self.eval_s = 0, math.nan, math.nan
        self.sizes: dict[str, int] = {}
        self.raw_size = 0
        self.broken_off = False  # something other than sizes came after the last score

    def take(self, line: str) -> None:
        """Take note of a line."""
        step, scores, time = STEP.match(line), SCORES.search(line), TRAIN_TIME.search(line)
        if time and not (self.train_ms > milliseconds(time)):
            self.train_ms = milliseconds(time)
        if step:
            self.steps = step_number(step)
            self.broken_off = bool(self.finals)
            if scores:
                ms = milliseconds(time) if time else math.nan
                self.vals.append((self.steps, float(scores[1]), float(scores[2]), ms))
        elif re.match(r"Traceback |\w*(Error|Exception)\b:", line):
            self.broken_off = True
        if final := read_final(line):
            self.finals.append(final)
            self.broken_off = False
        if (spent := EVAL_TIME.search(line)) and not step and not NOT_FINAL.search(line):
            self.eval_s = milliseconds(spent) / 1000
        for name, pattern in SIZES.items():
            if (size := labelled_size(line, pattern)) is not None:
                self.sizes[name] = size
        if match := RAW_SIZE.match(line):
            self.raw_size = whole(to_number(match[1]))
        if self.raw_size and self.sizes.get("total", 0) == self.raw_size + self.sizes.get(
            "code", 0
        ):
            del self.sizes["total"]  # of the weights as they were in training
        if match := OWN_SIZES.search(line):
            self.sizes |= {"code": whole(to_number(match[1]))}
            self.sizes |= {"artifact": whole(to_number(match[2]))}


def find_seed(settings: Mapping[str, str], head: list[str], body: list[str]) -> str:
    """Find the seed that a log itself tells; "" if it does not.

    Settings come first, then lines "seed: 42", of the last run's head before others, then
    the word seed=42. "seed = 42" is Python: a source may stand in a log without any bar.
    """
    if seed := plain_seed(settings.get("SEED", "")):
        return seed
    for lines in (head[::-1], body):
        for pattern in (SEED_ROW, SEED_WORD):
            matches = (pattern.search(line) for line in lines)
            if found := next(filter(None, matches), None):
                return plain_seed(found[1])
    return ""


def plain_seed(text: str) -> str:
    """Write a seed without leading zeros; as it stands if it is no number of usual length."""
    return str(int(text)) if text.isdecimal() and len(text) <= 20 else text


def seed_in_name(path: Path) -> str:
    """Find the seed in the name of a log, train_seed42.log or train_s42.log, or of its folder."""
    for name in (path.stem, path.parent.name):
        for pattern in (r"seed[_-]?(\d{1,20})(?!\d)", r"_s(\d{1,20})(?!\d)"):
            if found := re.findall(pattern, name, re.IGNORECASE):
                return plain_seed(found[-1])
    return ""


def read_log(path: Path) -> Log | None:
    """Read the last run in a training log; None if the file is none."""
    sources, body, runs = last_run(read_text(path).split("\n"))
    settings, tally, again = read_settings(body), Tally(), count_again(body)
    first_step = again[-1] if again else 0
    for line in body[first_step:]:
        tally.take(line.strip())
    if not (tally.steps or tally.vals or tally.finals):
        return None
    named_seed = seed_in_name(path)
    return Log(
        path=path,
        seed=find_seed(settings, body[:first_step], body) or named_seed,
        named_seed=named_seed,
        code=sources_that_count(sources, tally.sizes.get("code", 0)),
        settings=settings,
        finals=tally.finals,
        vals=tally.vals,
        steps=tally.steps,
        train_ms=tally.train_ms,
        eval_s=tally.eval_s,
        total_bytes=tally.sizes.get("total", 0),
        code_bytes=tally.sizes.get("code", 0),
        artifact_bytes=tally.sizes.get("artifact", 0),
        finished=bool(tally.finals) and not tally.broken_off,
        runs=runs + len(again),
        body="\n".join(body),
    )


def read_logs(folder: Path) -> list[Log]:
    """Read every training log (*.log, *.txt) of a folder, sorted, but those in hidden folders."""
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".log", ".txt")
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return [log for log in map(read_log, paths) if log]
