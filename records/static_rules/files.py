"""What a record folder must hold: its files, and the fields of submission.json."""

import datetime
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
from reading import FAIL, PASS, SPELLINGS, first_number, to_number, to_text

from static_rules.record import Finding, Record, join, plural

SCHEMA = Path(__file__).parent.with_name("submission.schema.json")


def check_files(record: Record) -> Finding:
    """README.md, submission.json, train_gpt.py and a training log are there."""
    wanted = ("README.md", "submission.json", "train_gpt.py")
    missing = [name for name in wanted if not (record.folder / name).is_file()]
    missing += [] if record.logs else ["a training log (*.log, *.txt)"]
    if missing:
        return FAIL, f"missing: {', '.join(missing)}"
    return PASS, f"{', '.join(wanted)} and {plural(len(record.logs), 'training log')}"


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


def spelled(raw: Mapping[str, Any], name: str) -> bool:
    """Whether a field is there in any spelling."""
    return any(key in raw for key in SPELLINGS.get(name, [name]))
