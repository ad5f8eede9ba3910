"""What a record folder must hold: its files, and the fields of submission.json."""

import datetime
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
from reading import (
    FAIL,
    HIGHEST_BPB_FOR_SURE,
    PASS,
    SPELLINGS,
    first_number,
    to_number,
    to_text,
)

from static_rules.record import Finding, Record, join, plural

SCHEMA = Path(__file__).parent.with_name("submission.schema.json")
WANTED = ("README.md", "submission.json", "train_gpt.py")
TOLD = 6  # problems of submission.json; more are only counted


def check_files(record: Record) -> Finding:
    """Check that README.md, submission.json, train_gpt.py and a training log are there."""
    missing = [name for name in WANTED if not (record.folder / name).is_file()]
    if not record.logs:
        missing.append("a training log (*.log, *.txt)")
    if missing:
        return FAIL, f"missing: {', '.join(missing)}"
    return PASS, f"{', '.join(WANTED)} and {plural(len(record.logs), 'training log')}"


def check_metadata(record: Record) -> Finding:
    """Check that submission.json is readable, complete, and of the right types."""
    if not record.submission:
        return FAIL, record.problem
    raw = record.raw
    if str(raw.get("format", "")).startswith("birdie"):
        problems, scope = schema_problems(raw), f"fits {SCHEMA.name}"
    else:
        problems = [*field_problems(raw), *score_problems(raw)]
        problems += [*number_problems(raw), *date_problems(raw)]
        scope = "has author, github_id, name, date and val_bpb"
    if problems:
        more = f"; and {len(problems) - TOLD} more" if len(problems) > TOLD else ""
        return FAIL, join(problems[:TOLD]) + more
    absent = [name for name in ("val_loss", "bytes_total", "blurb") if not spelled(raw, name)]
    return PASS, scope + (f"; without {', '.join(absent)}, which most have" if absent else "")


def schema_problems(raw: Mapping[str, Any]) -> list[str]:
    """Tell what in our own submission.json is not as the schema says."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    errors = sorted(validator.iter_errors(raw), key=lambda error: list(map(str, error.path)))
    return [f"{'.'.join(map(str, e.path)) or 'top level'}: {e.message[:160]}" for e in errors]


def field_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Tell which texts of a public submission.json are missing, empty or placeholders."""
    for name in ("author", "github_id", "name", "date"):
        values = [to_text(raw[key]) for key in SPELLINGS[name] if key in raw]
        if not values:
            yield f"{name} is missing"
        elif not any(values):
            yield f"{name} is empty"
        elif any(re.fullmatch(r"your[ _].*", value, re.IGNORECASE) for value in values):
            yield f"{name} is a placeholder, {values[0][:40]!r}"


def score_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Tell what is wrong with the score itself; some put it into val_loss."""
    bpb = first_number(raw, SPELLINGS["val_bpb"])
    loss = first_number(raw, SPELLINGS["val_loss"])
    if bpb <= 0:
        yield f"val_bpb {bpb:g} is not a score"
    elif math.isnan(bpb) and 0 < loss < HIGHEST_BPB_FOR_SURE:
        yield f"val_bpb is missing and val_loss {loss:g} is a BPB"
    elif math.isnan(bpb):
        yield "val_bpb is missing"


def number_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Tell which fields should be numbers and are none, or are too small for a size."""
    for name in ("val_bpb", "val_bpb_std", "val_loss", "bytes_total", "bytes_code"):
        for key in (key for key in SPELLINGS[name] if key in raw):
            value, number = raw[key], to_number(raw[key])
            if isinstance(value, str) or (value is not None and math.isnan(number)):
                yield f"{key} is {to_text(value)[:40]!r}, not a number"
            elif name.startswith("bytes") and 0 < number < 1000:
                yield f"{key} {number:g} is not a number of bytes"


def date_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Tell whether the date is no date."""
    date = next((to_text(raw[key]) for key in SPELLINGS["date"] if key in raw), "")
    if date and not read_date(date):
        yield f"date {date[:40]!r} is not YYYY-MM-DD"


def read_date(text: str) -> datetime.date | None:
    """Read the day at the head of a date such as 2026-03-18T00:05:35Z."""
    try:
        return datetime.date.fromisoformat(text[:10])
    except ValueError:
        return None


def read_moment(text: str) -> datetime.datetime | None:
    """Read a date with its time of day, in UTC; None without one. No zone is taken for UTC."""
    if len(text) <= 10:
        return None
    try:
        moment = datetime.datetime.fromisoformat(text)
        zoned = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
        return zoned.astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        return None


def spelled(raw: Mapping[str, Any], name: str) -> bool:
    """Tell whether a field is there in any spelling."""
    return any(key in raw for key in SPELLINGS.get(name, [name]))
