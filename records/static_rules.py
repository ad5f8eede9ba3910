"""What can be told of a record folder without running it: the static rules of records/audit.py.

A rule returns PASS or FAIL only for what the files decide, and NOT CHECKED, with the reason, for
the rest. Public folders of all ages are understood; nothing in a folder is run or imported.
"""

import ast
import datetime
import hashlib
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jsonschema
from reading import (
    FAIL,
    NOT_CHECKED,
    PASS,
    SPELLINGS,
    Log,
    Submission,
    Verdict,
    first_number,
    read_logs,
    read_submission,
    to_number,
    to_text,
    track_of,
)
from scipy import stats

CAP, MIB_CAP = 16_000_000, 16 * 2**20
LIMIT_S = 600
NATS, P_VALUE = 0.005, 0.01
FINEWEB_BYTES = 151_080_000  # of the whole validation set, whatever the tokenizer
SCHEMA = Path(__file__).with_name("submission.schema.json")
ARTIFACTS = ("*.artifact", "*.ptz", "*.int8.*", "*.int6.*", "final_model*.bin", "final_model*.xz")
HELPERS = {".py", ".cpp", ".cc", ".c", ".cu", ".cuh", ".h", ".hpp", ".so", ".pyx", ".rs"}


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


def check(folder: Path, artifact: Path | None, best: Path | None) -> list[Verdict]:
    """Apply every static rule to a record folder.

    `best` is the folder of the record to beat; without it, the best one beside `folder` is taken.
    """
    record = Record(folder, artifact, best)
    rules = {
        "files": check_files,
        "metadata": check_metadata,
        "script": check_script,
        "source": check_source,
        "finished": check_finished,
        "score": check_score,
        "seeds": check_seeds,
        "size": check_size,
        "sizes_claimed": check_sizes_claimed,
        "digests": check_digests,
        "train_time": check_train_time,
        "eval_time": check_eval_time,
        "val_bytes": check_val_bytes,
        "leakage": check_leakage,
        "improvement": check_improvement,
    }
    verdicts = []
    for name, rule in rules.items():
        state, evidence = rule(record)
        verdicts.append(Verdict(name, state, " ".join(evidence.split())))
    return verdicts


Finding = tuple[str, str]


def plural(number: int, name: str) -> str:
    """1 log, 2 logs."""
    return f"{number} {name}{'s' * (number != 1)}"


def join(parts: Iterable[str]) -> str:
    """Sentences in one line, each once."""
    return "; ".join(dict.fromkeys(filter(None, parts)))


# ------------------------------------ files and metadata ------------------------------------


def check_files(record: Record) -> Finding:
    """README.md, submission.json, train_gpt.py and a training log are there."""
    wanted = ("README.md", "submission.json", "train_gpt.py")
    missing = [name for name in wanted if not (record.folder / name).is_file()]
    missing += [] if record.logs else ["a training log (*.log, *.txt)"]
    if missing:
        return FAIL, f"missing: {', '.join(missing)}"
    return PASS, f"{', '.join(wanted)} and {plural(len(record.logs), 'training log')}"


def schema_problems(raw: Mapping[str, Any]) -> list[str]:
    """What in our own submission.json is not as the schema says."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    errors = sorted(validator.iter_errors(raw), key=lambda error: list(map(str, error.path)))
    return [f"{'.'.join(map(str, e.path)) or 'top level'}: {e.message[:160]}" for e in errors]


def metadata_problems(raw: Mapping[str, Any]) -> list[str]:
    """What a reader of a public submission.json will stumble over."""
    bpb, loss = (first_number(raw, SPELLINGS[name]) for name in ("val_bpb", "val_loss"))
    problems = []
    for name in ("author", "github_id", "name", "date"):
        values = [raw[key] for key in SPELLINGS[name] if key in raw]
        if not any(map(to_text, values)):
            problems.append(f"{name} is missing" if not values else f"{name} is empty")
        elif any(re.fullmatch(r"your[ _].*", to_text(value), re.IGNORECASE) for value in values):
            problems.append(f"{name} is a placeholder, {to_text(values[0])[:40]!r}")
    if bpb <= 0:
        problems.append(f"val_bpb {bpb:g} is not a score")
    if math.isnan(bpb):
        in_loss = 0 < loss < 1.6
        problems.append("val_bpb is missing" + f" and val_loss {loss:g} is a BPB" * in_loss)
    for name in ("val_bpb", "val_bpb_std", "val_loss", "bytes_total", "bytes_code"):
        for key in (key for key in SPELLINGS[name] if key in raw):
            value = raw[key]
            if isinstance(value, str) or (value is not None and math.isnan(to_number(value))):
                problems.append(f"{key} is {to_text(value)[:40]!r}, not a number")
            elif name.startswith("bytes") and 0 < to_number(value) < 1000:
                problems.append(f"{key} {to_number(value):g} is not a number of bytes")
    date = next((to_text(raw[key]) for key in SPELLINGS["date"] if key in raw), "")
    if date and not read_date(date):
        problems.append(f"date {date[:40]!r} is not YYYY-MM-DD")
    return problems


def read_date(text: str) -> datetime.date | None:
    """The day at the head of a date such as 2026-03-18T00:05:35Z."""
    try:
        return datetime.date.fromisoformat(text[:10])
    except ValueError:
        return None


def check_metadata(record: Record) -> Finding:
    """submission.json is readable, complete, and of the right types."""
    if not record.submission:
        return FAIL, record.problem
    raw = record.submission.raw
    if str(raw.get("format", "")).startswith("birdie"):
        problems, scope = schema_problems(raw), f"fits {SCHEMA.name}"
    else:
        problems, scope = metadata_problems(raw), "has author, github_id, name, date and val_bpb"
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        return FAIL, join(problems[:6]) + more
    absent = [n for n in ("val_loss", "bytes_total", "blurb") if not spelled(raw, n)]
    return PASS, scope + (f"; without {', '.join(absent)}, which most have" if absent else "")


def spelled(raw: Mapping[str, Any], name: str) -> bool:
    """Whether a field is there in any spelling."""
    return any(key in raw for key in SPELLINGS.get(name, [name]))


# ------------------------------------ script and logs ------------------------------------


def check_script(record: Record) -> Finding:
    """train_gpt.py compiles."""
    if record.script is None:
        return NOT_CHECKED, "there is no train_gpt.py"
    version = f"Python {'.'.join(map(str, sys.version_info[:2]))}"
    try:
        ast.parse(record.script)
    except (SyntaxError, ValueError) as error:
        state = NOT_CHECKED if sys.version_info < newest_python(record) else FAIL
        newer = "; a newer Python may" if state == NOT_CHECKED else ""
        return state, f"train_gpt.py does not compile with {version}: {error}{newer}"
    except (RecursionError, MemoryError):
        return NOT_CHECKED, f"train_gpt.py is too deeply nested for the parser of {version}"
    lines = record.script.count(b"\n")
    return PASS, f"train_gpt.py, {lines} lines, compiles with {version}; it was not run"


def newest_python(record: Record) -> tuple[int, int]:
    """The newest Python that a log names, else the one that most scripts of the field run on."""
    found = [
        re.findall(r"(?:Running Python |\bpython:)(\d+)\.(\d+)", log.body) for log in record.logs
    ]
    versions = [(int(major[:3]), int(minor[:3])) for pairs in found for major, minor in pairs]
    return max(versions, default=(3, 12))


def same_text(one: str, two: str) -> bool:
    """Whether two scripts are equal but for line ends and blank lines at their ends."""
    return one.replace("\r\n", "\n").strip() == two.replace("\r\n", "\n").strip()


def check_source(record: Record) -> Finding:
    """The script in every log is the shipped one."""
    printed = [log for log in record.logs if log.source]
    if record.script is None or not printed:
        reason = "no log holds its script" if record.script is not None else "no train_gpt.py"
        return NOT_CHECKED, reason
    shipped = record.script.decode("utf-8-sig", errors="replace")
    exact = [log for log in printed if log.source == shipped]
    other = [log for log in printed if not same_text(log.source, shipped)]
    if other:
        sizes = (f"{log.path.name} ({len(log.source.encode()):,} bytes)" for log in other)
        size = f"{len(record.script):,} bytes"
        return FAIL, f"not the shipped script ({size}) is that of {', '.join(sizes)}"
    near = f", {len(printed) - len(exact)} but for line ends" if len(exact) < len(printed) else ""
    of = f"{len(printed)} of {plural(len(record.logs), 'log')}"
    return PASS, f"the script in {of} is train_gpt.py{near}"


def later_bpb(log: Log) -> list[float]:
    """Every number in a log that calls itself a BPB, except those of training steps."""
    found = []
    for line in log.body.split("\n"):
        if "bpb" in line and not re.match(r"[ \t]*(step\b|\d+/\d+)", line):
            match = re.search(r"bpb[\"']?\s{0,9}[:=]?\s{0,9}(\d\.\d{3,20})", line[:1000])
            found += [float(match[1])] if match else []
    return found


def check_finished(record: Record) -> Finding:
    """Every seed has a log that ends with an exact score."""
    if not record.logs:
        return NOT_CHECKED, "no training logs"
    failed, unclear, beside = [], [], []
    done = [seed for seed, logs in record.by_seed.items() if any(log.finished for log in logs)]
    named = named_seeds(record)
    for seed, logs in record.by_seed.items():
        if seed in done:
            continue
        if done and (seed not in named if named else not logs[0].seed):
            beside.append(f"{logs[-1].path.name}, which no claim names, has no exact score")
            continue
        log, name = logs[-1], f"{logs[-1].path.name} (seed {seed})"
        tail = log.body.rstrip()[-2000:]
        if "Traceback (most recent call last)" in tail:
            failed.append(f"{name} ends in an error at step {log.steps}")
        elif log.finals:
            failed.append(f"{name} goes on after its exact score")
        elif later_bpb(log):
            unclear.append(f"{name} ends without a known line of an exact score")
        else:
            failed.append(f"{name} ends at step {log.steps} without a score of the artifact")
    if failed:
        return FAIL, join(failed)
    if unclear:
        return NOT_CHECKED, join(unclear)
    again = [f"{log.path.name} holds {log.runs} runs" for log in record.logs if log.runs > 1]
    return PASS, join([f"{plural(len(done), 'seed')} ended with an exact score", *beside, *again])


def named_seeds(record: Record) -> set[str]:
    """The seeds that submission.json names."""
    listed_seeds = record.submission.raw.get("seeds") if record.submission else None
    numbers = listed_seeds if isinstance(listed_seeds, list) else []
    return set(seed_table(record)) | {to_text(number) for number in numbers}


# ------------------------------------ scores ------------------------------------


def precision(number: float) -> float:
    """One unit of the last decimal that a claim states."""
    text = repr(number)
    if "e" in text or "." not in text:
        return 1e-8
    return 10.0 ** -min(len(text.partition(".")[2]), 8)


def agrees(claim: float, value: float) -> bool:
    """Whether a claim is a value, rounded or cut off as the claim's decimals tell."""
    return abs(claim - value) <= 1.001 * precision(claim) + 1e-9


def scores_of(logs: list[Log]) -> dict[str, float]:
    """scheme -> score, of all logs of a seed; the headline is the last one."""
    return {scheme: bpb for log in logs for scheme, _, bpb in log.finals}


def logged_means(record: Record) -> dict[str, float]:
    """scheme -> mean over the seeds, for schemes that all seeds have; and the mean of the last."""
    seeds = [scores for scores in map(scores_of, record.by_seed.values()) if scores]
    common = [name for name in (seeds[0] if seeds else {}) if all(name in s for s in seeds)]
    means = {name: statistics.fmean(s[name] for s in seeds) for name in common}
    last = [[*scores.values()][-1] for scores in seeds]
    return means | ({"last score of each log": statistics.fmean(last)} if last else {})


def table_scores(record: Record) -> dict[str, float]:
    """seed -> val_bpb that submission.json states."""
    seeds = record.submission.seeds if record.submission else {}
    return {seed: entry["val_bpb"] for seed, entry in seeds.items() if "val_bpb" in entry}


def check_score(record: Record) -> Finding:
    """val_bpb of submission.json is what logs and its own table of seeds say."""
    submission = record.submission
    if not submission or math.isnan(submission.val_bpb):
        return NOT_CHECKED, "submission.json states no val_bpb"
    claim, table = submission.val_bpb, table_scores(record)
    wrong = [
        f"seed {seed}: submission.json has {score}, its logs do not"
        for seed, score in table.items()
        if (own := [log for log in record.logs if log.seed == seed and log.finals])
        and not any(agrees(score, v) for log in own for v in all_scores(log))
    ]
    if wrong:
        return FAIL, join(wrong)
    state, evidence = compare_with_table(claim, table) if table else (PASS, "")
    if state == FAIL:
        return FAIL, evidence
    found_state, found = compare_with_logs(claim, record)
    if found_state == NOT_CHECKED and evidence:
        return NOT_CHECKED, f"{evidence}, but {found}"
    return found_state, join([found, evidence])


def all_scores(log: Log) -> list[float]:
    """Every score that a log states for a whole evaluation, exact ones first."""
    return [bpb for _, _, bpb in log.finals] + later_bpb(log)


def compare_with_table(claim: float, table: Mapping[str, float]) -> Finding:
    """val_bpb against submission.json's own scores of seeds."""
    mean, best = statistics.fmean(table.values()), min(table.values())
    seeds = f"{len(table)} seeds in submission.json"
    if len(table) == 1 and agrees(claim, mean):
        return PASS, ""
    if agrees(claim, mean) or abs(claim - mean) <= min(map(precision, table.values())):
        return PASS, f"{claim} is the mean of the {seeds}"
    if agrees(claim, best):
        return FAIL, f"{claim} is the best of the {seeds}, not their mean {mean:.8f}"
    return FAIL, f"{claim} is not the mean of the {seeds}, {mean:.8f}"


def compare_with_logs(claim: float, record: Record) -> Finding:
    """val_bpb against what the logs say."""
    means, groups = logged_means(record), record.by_seed
    if not means:
        return NOT_CHECKED, "no log states an exact score"
    scored = [seed for seed in groups if scores_of(groups[seed])]
    for scheme, mean in means.items():
        if agrees(claim, mean):
            of = f"the mean of {len(scored)} seeds" if len(scored) > 1 else f"seed {scored[0]}'s"
            return PASS, f"{claim} is {of} by the logs, {mean:.8f} ({scheme})"
    single = {
        log.path.name for log in record.logs if any(agrees(claim, v) for v in all_scores(log))
    }
    mean = [*means.values()][-1]
    if single:
        names = ", ".join(sorted(single))
        lowest = min(scores_of(logs)[s] for logs in groups.values() for s in scores_of(logs))
        best = "the best seed" if agrees(claim, lowest) else "one seed"
        return PASS, (
            f"{claim} is that of {names}: {best} of {len(scored)}, not the mean {mean:.8f}"
            if len(scored) > 1
            else f"{claim} is in {names}, but not its last score {mean:.8f}"
        )
    return FAIL, f"{claim} is in no log, nor a mean of theirs: {listed(means)}"


def listed(scores: Mapping[str, float]) -> str:
    """Up to four scores with their names."""
    return ", ".join(f"{name} {score:.8f}" for name, score in [*scores.items()][-4:])


def headline_scores(record: Record) -> tuple[dict[str, tuple[float, float]], str]:
    """seed -> (val_loss, val_bpb), and where they are from; the loss may be nan.

    Logs come first: of each seed the score that the claims name, else the last one. Logs that no
    claim names, such as those of a baseline, are left out where a table of seeds tells them apart.
    """
    table, found = table_scores(record), {}
    for seed, logs in record.by_seed.items():
        finals = [(loss, bpb) for log in logs for _, loss, bpb in log.finals]
        if finals and (not table or seed in table):
            named = [pair for pair in finals if seed in table and agrees(table[seed], pair[1])]
            found[seed] = (named or finals)[-1]
    if found and (not table or set(found) == set(table)):
        return found, "logs"
    losses = {seed: entry.get("val_loss", math.nan) for seed, entry in seed_table(record).items()}
    return {seed: (losses[seed], bpb) for seed, bpb in table.items()}, "submission.json"


def seed_table(record: Record) -> dict[str, dict[str, float]]:
    """The table of seeds in submission.json."""
    return record.submission.seeds if record.submission else {}


def check_seeds(record: Record) -> Finding:
    """Number of seeds, mean, sample deviation; the deviation claimed is one of them."""
    scores, place = headline_scores(record)
    values = [bpb for _, bpb in scores.values() if math.isfinite(bpb)]
    if not values:
        return NOT_CHECKED, "neither logs nor submission.json state scores of seeds"
    if len(values) == 1:
        return NOT_CHECKED, f"one seed ({place}): {values[0]:.8f}; no deviation can be told"
    mean, sample, population = (
        f(values) for f in (statistics.fmean, statistics.stdev, statistics.pstdev)
    )
    text = f"{len(values)} seeds ({place}): mean {mean:.8f}, sample deviation {sample:.8f}"
    claim = record.submission.val_bpb_std if record.submission else math.nan
    if math.isnan(claim):
        return PASS, text
    if agrees(claim, sample):
        return PASS, f"{text}, as claimed"
    if agrees(claim, population):
        return PASS, f"{text}; the {claim:g} claimed divides by n, not n - 1"
    return FAIL, f"{text}; claimed is {claim:g}"


# ------------------------------------ size ------------------------------------


def used_helpers(record: Record) -> list[Path]:
    """Files of code beside train_gpt.py that it imports or names."""
    text = (record.script or b"").decode("utf-8", errors="replace")
    found = []
    for path in sorted(record.folder.iterdir()):
        if path.suffix in HELPERS and path.name != "train_gpt.py" and path.is_file():
            stem = re.escape(path.stem)
            imports = rf"^[ \t]*(from\s+\.?{stem}\s+import|import\s+(\w+\s*,\s*)*{stem}\b)"
            if re.search(imports, text, re.MULTILINE) or f'"{path.name}"' in text.replace("'", '"'):
                found.append(path)
    return found


def find_artifact(folder: Path) -> Path | None:
    """The artifact in a record folder, if there is just one."""
    found = {path for pattern in ARTIFACTS for path in folder.glob(pattern) if path.is_file()}
    return found.pop() if len(found) == 1 else None


def artifact_bytes(record: Record) -> tuple[int, str]:
    """Size of the largest artifact and where it is from; 0 if nothing tells it."""
    sizes = [(log.artifact_bytes, f"logged in {log.path.name}") for log in record.claimed]
    rests = [(log.total_bytes - log.code_bytes, log) for log in record.claimed if log.code_bytes]
    if not any(size for size, _ in sizes):
        sizes += [(size, f"total less code in {log.path.name}") for size, log in rests if size > 0]
    path, submission = record.artifact or find_artifact(record.folder), record.submission
    if path and path.is_file():
        sizes.append((path.stat().st_size, f"measured, {path.name}"))
    if submission and not any(size for size, _ in sizes):
        claimed = [key for key in submission.raw if str(key).startswith("bytes_model")]
        sizes += [(int_of(submission.raw[key]), f"claimed as {key}") for key in claimed]
        rest = submission.bytes_total - submission.bytes_code
        known = submission.bytes_code and rest > 0
        sizes.append((rest, "claimed, bytes_total - bytes_code") if known else (0, ""))
    return max(sizes, default=(0, ""), key=lambda entry: entry[0])


def int_of(value: Any) -> int:
    """A JSON value as a size; 0 if it is none."""
    number = to_number(value)
    return int(number) if number > 0 else 0


def check_size(record: Record) -> Finding:
    """Code bytes of the shipped files and the artifact's are within 16,000,000."""
    stated = max((log.total_bytes for log in record.claimed), default=0)
    claimed = record.submission.bytes_total if record.submission else 0
    own_words = join(
        f"{place} states {size:,}"
        for place, size in (("a log", stated), ("submission.json", claimed))
        if size > CAP
    )
    model, place = artifact_bytes(record)
    if record.script is None or not model:
        missing = "train_gpt.py" if record.script is None else "the artifact's size"
        if own_words:
            return FAIL, f"{own_words}, over {CAP:,}; {missing} is missing"
        return NOT_CHECKED, f"{missing} is missing; the logs' own total is {stated:,}"
    helpers = used_helpers(record)
    code = len(record.script) + sum(path.stat().st_size for path in helpers)
    named = f", with {', '.join(path.name for path in helpers)}" if helpers else ""
    text = f"{code + model:,} = {code:,} code (measured{named}) + {model:,} artifact ({place})"
    counted = [log.code_bytes for log in record.claimed if log.code_bytes]
    counted += [record.submission.bytes_code] if record.submission else []
    least = min(filter(None, counted), default=0)
    smaller = f"the code was counted as {least:,}" if least and least != code else ""
    left_out = join([smaller, own_words, uncounted(record), binary_units(record)])
    tail = f"; {left_out}" if left_out else ""
    if code + model > CAP:
        mib = ", though under 16 MiB" if code + model <= MIB_CAP else ""
        return FAIL, f"{text}, {code + model - CAP:,} over the cap of {CAP:,}{mib}{tail}"
    return (FAIL if own_words else PASS), f"{text}, cap {CAP:,}{tail}"


def binary_units(record: Record) -> str:
    """Where the script takes 1024 * 1024 for a megabyte of the cap."""
    text = (record.script or b"").decode("utf-8", errors="replace")
    mib = r"\s*\*\s*(?:1024\s*\*\s*1024|1024\s*\*\*\s*2|2\s*\*\*\s*20)\b"
    found = re.search(
        rf"\b(?:1[56](?:\.\d+)?|\w*(?:target|max|budget|limit)\w*mb\w*){mib}", text, re.I
    )
    return f"train_gpt.py takes MiB for MB: {found[0]}" if found else ""


def check_sizes_claimed(record: Record) -> Finding:
    """The sizes in submission.json are those of a log or of the files, or more."""
    submission = record.submission
    if not submission:
        return NOT_CHECKED, "submission.json cannot be read"
    path = record.artifact or find_artifact(record.folder)
    script = len(record.script or b"")
    models = {log.artifact_bytes for log in record.claimed}
    models |= {path.stat().st_size} if path and path.is_file() else set()
    totals = {log.total_bytes for log in record.claimed} | {
        script + size for size in models if size
    }
    claims = [("bytes_code", submission.bytes_code, {log.code_bytes for log in record.claimed})]
    claims[0][2].add(script)
    claims.append(("bytes_total", submission.bytes_total, totals))
    for seed, entry in submission.seeds.items():
        size = int_of(entry.get("artifact_bytes"))
        claims.append((f"artifact_bytes of seed {seed}", size, models | totals))
    known = [(name, size, found - {0}) for name, size, found in claims if size and found - {0}]
    wrong = [
        f"{name} is {size:,}; logs and files say {' or '.join(f'{x:,}' for x in sorted(found)[:6])}"
        for name, size, found in known
        if size not in found and size < max(found)
    ]
    if wrong:
        return FAIL, join(wrong[:4])
    if not known:
        return NOT_CHECKED, "no size is in both submission.json and the logs or files"
    return PASS, f"{', '.join(name for name, *_ in known)}: not less than logs and files have"


def check_digests(record: Record) -> Finding:
    """The files are those whose SHA-256 submission.json states."""
    raw = record.submission.raw if record.submission else {}
    code, models = raw.get("code_sha256"), raw.get("artifact_sha256")
    wrong, right = [], []
    if isinstance(code, str) and record.script is not None:
        same = hashlib.sha256(record.script).hexdigest() == code
        (right if same else wrong).append("train_gpt.py")
    path = record.artifact or find_artifact(record.folder)
    if isinstance(models, dict) and path and path.is_file():
        same = hashlib.sha256(path.read_bytes()).hexdigest() in models.values()
        (right if same else wrong).append(path.name)
    if wrong:
        return FAIL, f"not the file that was packed: {', '.join(wrong)}"
    if right:
        return PASS, f"as submission.json states: {', '.join(right)}"
    return NOT_CHECKED, "submission.json states no SHA-256 of a file that is there"


def uncounted(record: Record) -> str:
    """Files that nobody counts: tokenizers."""
    models = [path for path in sorted(record.folder.rglob("*.model")) if path.is_file()]
    size = sum(path.stat().st_size for path in models)
    return f"not counted: the tokenizer, {size:,}" if models else ""


# ------------------------------------ times ------------------------------------


def fact(log: Log, pattern: str) -> float:
    """The last number that a pattern finds in a log, or nan."""
    found = re.findall(pattern, log.body, re.MULTILINE)
    return to_number(found[-1]) if found else math.nan


def no_limit(record: Record) -> str:
    """Why the limits of ten minutes cannot be applied; "" if they can."""
    if not record.is_timed:
        return f"the limit holds for track 10min_16mb; this is {record.track or 'unknown'}"
    worlds = {fact(log, r"world_size\s*[:=]\s*(\d+)") for log in record.claimed}
    other = sorted(world for world in worlds if not math.isnan(world) and world != 8)
    return f"the limit is for 8 GPUs; a log has world_size {other[0]:g}" if other else ""


def check_train_time(record: Record) -> Finding:
    """Training took at most 600 s, and a step that was under way."""
    timed = [log for log in record.claimed if not math.isnan(log.train_ms)]
    if not timed or no_limit(record):
        longest = max((log.train_ms / 1e3 for log in timed), default=math.nan)
        seen = f"; {longest:.1f} s" if timed else ""
        return NOT_CHECKED, (no_limit(record) or "no log states a train_time") + seen
    log = max(timed, key=lambda log: log.train_ms)
    seconds, step = log.train_ms / 1e3, log.train_ms / 1e3 / max(log.steps, 1)
    text = f"{seconds:.2f} s at most, {log.path.name}, by its own timer"
    outside = ["imports, compilation, warm-up and validation are outside it"]
    calibration = fact(log, r"Hessians in ([\d.]+)\s*s")
    if not math.isnan(calibration):
        outside.append(f"calibration came after, until {seconds + calibration:.1f} s")
    if not re.search(r"train_time:\s*\d+(\.\d+)?\s*m?s\b", log.body) and seconds > LIMIT_S - 6:
        return NOT_CHECKED, f"{text}, which tells minutes with a decimal only"
    if seconds > LIMIT_S + 2 * step:
        return FAIL, f"{text}, over {LIMIT_S} s; {join(outside)}"
    over = f"; {LIMIT_S} s ran out during the last step" if seconds > LIMIT_S else ""
    return PASS, f"{text}{over}; {join(outside)}"


def check_eval_time(record: Record) -> Finding:
    """Evaluation took at most 600 s."""
    timed = [log for log in record.claimed if not math.isnan(log.eval_s)]
    if not timed or no_limit(record):
        longest = max((log.eval_s for log in timed), default=math.nan)
        seen = f"; {longest:.1f} s" if timed else ""
        return NOT_CHECKED, (no_limit(record) or "no log states an eval_time") + seen
    log = max(timed, key=lambda log: log.eval_s)
    text = f"{log.eval_s:.1f} s at most, {log.path.name}, by its own timer"
    whole, rest = max(map(left_out_of_evaluation, timed))
    rest = rest if whole > log.eval_s else "loading and compiling may be outside it"
    over = f", over {LIMIT_S} s" if log.eval_s > LIMIT_S else ""
    return (FAIL if over else PASS), f"{text}{over}; {rest}"


def left_out_of_evaluation(log: Log) -> tuple[float, str]:
    """Seconds of an evaluation with what its own timer leaves out, and that in words."""
    outside = {
        "compiling": fact(log, r"compile warmup done \(([\d.]+)\s*s\)"),
        "decompressing": fact(log, r"decompression done in ([\d.]+)\s*s"),
    }
    known = {name: seconds for name, seconds in outside.items() if not math.isnan(seconds)}
    whole = log.eval_s + sum(known.values())
    named = " and ".join(f"{name} ({seconds:.1f} s)" for name, seconds in known.items())
    over = f", over {LIMIT_S} s" if whole > LIMIT_S else ""
    return whole, f"with {named}, which it leaves out, {whole:.1f} s{over} ({log.path.name})"


# ------------------------------------ validation text ------------------------------------


def is_fineweb(log: Log) -> bool:
    """Whether a log names the challenge's data."""
    names = (*log.settings.values(), *re.findall(r"fineweb10B\w*", log.body))
    return any("fineweb10B" in name for name in names)


def val_tokens(log: Log) -> float:
    """The number of validation tokens that a log states, or nan."""
    own = fact(log, r"\bval_tokens\s*:\s*([\d,]+)")
    return own if own > 0 else fact(log, r"val_loader:.*?\btokens:\s*([\d,]+)")


def implied_bytes(log: Log) -> float:
    """The bytes of text that a log's last score was divided by, or nan."""
    if not log.finals:
        return math.nan
    _, loss, bpb = log.finals[-1]
    return val_tokens(log) * loss / math.log(2) / bpb if bpb > 0 and loss > 0 else math.nan


def check_val_bytes(record: Record) -> Finding:
    """The bytes that the score is per are those of the text."""
    known = [(log, implied_bytes(log)) for log in record.claimed]
    known = [(log, size) for log, size in known if math.isfinite(size)]
    if not known:
        return NOT_CHECKED, "no log states both val_tokens and an exact score"
    findings = [judge_bytes(log, size, record.is_timed) for log, size in known]
    for state in (FAIL, NOT_CHECKED, PASS):
        if chosen := [text for found, text in findings if found == state]:
            return state, join(chosen[:3])
    return NOT_CHECKED, "nothing to compare"


def judge_bytes(log: Log, size: float, timed: bool) -> Finding:
    """One log's bytes against what it states, or against the known size of the whole set."""
    original = fact(log, r"\boriginal_bytes\s*:\s*(\d+)")
    stated = original if original > 0 else fact(log, r"\bval_bytes\s*:\s*(\d+)")
    if stated > 0:  # ours count the first token, which is only context and has no loss
        size = min(size, size * (1 - 1 / val_tokens(log)), key=lambda bytes_: abs(bytes_ - stated))
    text = f"{log.path.name}: loss and BPB are of {size:,.0f} bytes"
    if stated > 0 and abs(size / stated - 1) > 1e-6:
        return FAIL, f"{text}, but it states {stated:,.0f}"
    if not is_fineweb(log):
        state = PASS if stated > 0 else NOT_CHECKED
        same = ", as it states" if stated > 0 else ""
        return state, f"{text}{same}; how much the validation text has is not known here"
    whole, share = f"about {FINEWEB_BYTES:,}", size / FINEWEB_BYTES
    if abs(share - 1) < 0.003:
        return PASS, f"{text}; the whole validation set has {whole}{cut_tail(log)}"
    if 0.975 < share < 1.025:
        return NOT_CHECKED, f"{text}, near {whole}: another export of the data, or a wrong count"
    kind = "only a part was scored, or" if share < 1 else "it cannot be:"
    verdict = FAIL if timed or share > 1 else NOT_CHECKED
    return verdict, f"{text}, the whole set has {whole}: {kind} bytes are counted wrongly"


def cut_tail(log: Log) -> str:
    """What is to say of a number of tokens that was rounded down to whole sequences."""
    tokens, length = val_tokens(log), fact(log, r"(?:train|eval)_seq_len\s*[:=]\s*(\d+)")
    cut = length > 1 and tokens > 0 and tokens % length == 0
    return f"; its tail of up to {length - 1:.0f} tokens was left out" if cut else ""


def check_leakage(record: Record) -> Finding:
    """No known fingerprint of training on validation text."""
    found, seen = [], []
    for log in record.logs:
        name, shards = log.path.name, fact(log, r"\btrain_shards\s*:\s*(\d+)")
        trained_on = re.search(r"^[ \t]*(train_files|train_loader)\b.*fineweb_val", log.body, re.M)
        caseops = re.search(r"caseops|lossless_caps", log.body + log.source, re.IGNORECASE)
        if trained_on:
            found.append(f"{name}: its training files are fineweb_val")
        if shards == 1499 and caseops:
            found.append(
                f"{name}: train_shards 1499, the mark of CaseOps data built with --val-docs 10000, "
                "whose training shards hold 40,000 of the 50,000 validation documents"
            )
        elif is_fineweb(log) and not math.isnan(shards):
            seen.append(f"train_shards {shards:g}")
    found += confessions(record)
    if found:
        return FAIL, join(found)
    lowest = min(
        (bpb for log in record.logs if is_fineweb(log) for *_, bpb in log.finals), default=9
    )
    if lowest < 1:
        reason = "below every score that held; no known fingerprint says why"
        return NOT_CHECKED, join([f"{lowest} BPB is {reason}", *seen])
    if seen:
        return PASS, f"none of the known fingerprints: {join(seen)}"
    return NOT_CHECKED, "no log states the number of training shards of FineWeb"


def confessions(record: Record) -> list[str]:
    """Words of submission.json that say that training used validation text."""
    texts = record.submission.raw.values() if record.submission else ()
    pattern = r"((?:\S+\s+){0,3})\b(train(?:s|ed)? on (?:the )?(?:validation|val\b|fineweb_val)\S*)"
    texts = [text[:10_000] for text in texts if isinstance(text, str)]
    found = [match for text in texts for match in re.finditer(pattern, text, re.IGNORECASE)]
    denied = re.compile(r"\b(no|not|never|nor|without|cannot|nothing)\b|n't\b", re.IGNORECASE)
    return [f"submission.json says {m[2]!r}" for m in found if not denied.search(m[1])]


# ------------------------------------ improvement ------------------------------------


def rivals(record: Record) -> list[Record]:
    """Records beside this one, that are not younger, best score first."""
    found = []
    own_date = read_date(record.submission.date) if record.submission else None
    parent = record.folder.absolute().parent
    for folder in sorted(parent.iterdir()) if track_of(record.folder) else []:
        rival = Record(folder, None, None)
        if folder == record.folder.absolute() or not folder.is_dir() or not rival.submission:
            continue
        date = read_date(rival.submission.date)
        younger = own_date and date and date > own_date
        scored = not math.isnan(rival.submission.val_bpb)
        if scored and not younger and check_leakage(rival)[0] != FAIL:
            found.append(rival)
    return sorted(found, key=lambda rival: rival.submission.val_bpb)


def validation_text(record: Record) -> float:
    """About how many bytes of text the scores are of, or nan."""
    sizes = [size for size in map(implied_bytes, record.logs) if math.isfinite(size)]
    stated = to_number(record.submission.raw.get("val_bytes")) if record.submission else math.nan
    return sizes[0] if sizes else stated


def comparable(record: Record, rival: Record) -> str:
    """Why two records' scores cannot be compared; "" if nothing speaks against it."""
    one, two = validation_text(record), validation_text(rival)
    if one > 0 and two > 0 and abs(one / two - 1) > 0.03:
        return f"scored {one / 1e6:.1f} MB, {rival.folder.name} {two / 1e6:.1f} MB"
    return ""


def check_improvement(record: Record) -> Finding:
    """The score beats the best record's by 0.005 nats with p < 0.01."""
    if record.best is None and not record.is_timed:
        return NOT_CHECKED, f"track {record.track or 'unknown'} asks for none; --best FOLDER tests"
    if record.best is not None:
        chosen = [Record(record.best, None, None)]
        if not chosen[0].submission or math.isnan(chosen[0].submission.val_bpb):
            return NOT_CHECKED, f"{record.best} states no val_bpb: {chosen[0].problem}"
    else:
        chosen = [rival for rival in rivals(record) if not comparable(record, rival)]
    if not chosen:
        return NOT_CHECKED, "there is no older record beside it; name one by --best"
    if reason := comparable(record, chosen[0]):
        return NOT_CHECKED, f"other validation text: {reason}"
    scores, place = headline_scores(record)
    own = [bpb for _, bpb in scores.values() if math.isfinite(bpb)]
    ratios = [loss / bpb for loss, bpb in scores.values() if loss > 0 and bpb > 0]
    if len(own) < 2:
        return NOT_CHECKED, f"{plural(len(own), 'seed')} with scores; the test needs two or more"
    if not ratios and record.submission and record.submission.val_loss > 0:
        ratios = [record.submission.val_loss / record.submission.val_bpb]
    if not ratios:
        return NOT_CHECKED, "neither logs nor submission.json state val_loss: nats are not known"
    return judge_improvement(own, chosen[0], statistics.fmean(ratios), place)


def judge_improvement(own: list[float], rival: Record, nats: float, place: str) -> Finding:
    """One-sided t-test that the mean is lower by more than 0.005 nats per token.

    `nats` are nats per token for a BPB: the rival's scores are put into tokens of this record.
    """
    other = [bpb for _, bpb in headline_scores(rival)[0].values() if math.isfinite(bpb)]
    if len(other) < 2 or not agrees(rival.submission.val_bpb, statistics.fmean(other)):
        other = [rival.submission.val_bpb]
    ours, theirs = ([nats * bpb for bpb in scores] for scores in (own, other))
    gain = statistics.fmean(theirs) - statistics.fmean(ours)
    side = "better" if gain >= 0 else "worse"
    known = f"{rival.folder.name} ({statistics.fmean(other):.8f} BPB)"
    text = f"{abs(gain):.5f} nats per token {side} than {known}"
    if len(set(ours)) == 1 and len(set(theirs)) == 1:
        return NOT_CHECKED, f"{text}; all seeds have one score: no noise to test against"
    shifted = [loss + NATS for loss in ours]
    if len(theirs) > 1:
        p = stats.ttest_ind(shifted, theirs, equal_var=False, alternative="less").pvalue
        test = f"Welch's one-sided test, {len(ours)} and {len(theirs)} seeds"
    else:
        p = stats.ttest_1samp(shifted, theirs[0], alternative="less").pvalue
        test = f"one-sided t-test of {len(ours)} seeds against its one number, its noise unknown"
    state = PASS if p < P_VALUE else FAIL
    return state, f"{text}; better by {NATS} or more: p = {p:.2g} ({test}; scores from {place})"
