"""What sizes must be: under the cap, and as files and logs have them."""

import hashlib
import re
import string
from pathlib import Path
from typing import Any

from helpers import find_used
from reading import FAIL, NOT_CHECKED, PASS, Log, to_number

from static_rules.record import PRACTICE, Finding, Record, join

CAP, MIB_CAP = 16_000_000, 16 * 2**20
# 15.9 * 1024 * 1024, target_mb * 1024**2, 16 * 2**20: the factor, and what may stand before it.
MEBIBYTE = re.compile(
    r"\*[ \t]*(?:1024[ \t]*\*[ \t]*1024|1024[ \t]*\*\*[ \t]*2|2[ \t]*\*\*[ \t]*20)\b"
)
SIXTEEN = re.compile(r"1[56](?:\.\d{1,20})?")
LIMIT_WORDS = ("target", "max", "budget", "limit")
LOOK_BACK = 100
WORD = string.ascii_letters + string.digits + "_."


def check_size(record: Record) -> Finding:
    """Check that the code and the artifact are within 16,000,000 bytes.

    By the letter the shipped code counts as it is. In practice the bytes that the record counted
    itself were taken, such as those of a compressed wrapper that was not shipped.
    """
    over = totals_over_the_cap(record)
    model, place = artifact_bytes(record)
    if record.script is None or not model:
        missing = "train_gpt.py" if record.script is None else "the artifact's size"
        if over:
            return FAIL, f"{over}, over {CAP:,}; {missing} is missing"
        stated = max((log.total_bytes for log in record.claimed), default=0)
        return NOT_CHECKED, f"{missing} is missing; the logs' own total is {stated:,}"
    code, how = code_bytes(record)
    text = f"{code + model:,} = {code:,} code ({how}) + {model:,} artifact ({place})"
    asides = join([other_count(record, code), over, uncounted(record), binary_units(record)])
    tail = f"; {asides}" if asides else ""
    if code + model > CAP:
        mib = ", though under 16 MiB" if code + model <= MIB_CAP else ""
        return FAIL, f"{text}, {code + model - CAP:,} over the cap of {CAP:,}{mib}{tail}"
    return (FAIL if over else PASS), f"{text}, cap {CAP:,}{tail}"


def code_bytes(record: Record) -> tuple[int, str]:
    """Count the bytes of code by the rules that were asked for, and tell how."""
    counted = max((log.code_bytes for log in record.claimed), default=0)
    counted = counted or (record.submission.bytes_code if record.submission else 0)
    if record.rules == PRACTICE and counted:
        return counted, "as the record counted it, in practice"
    helpers = used_helpers(record)
    code = len(record.script or b"") + sum(path.stat().st_size for path in helpers)
    named = f", with {', '.join(path.name for path in helpers)}" if helpers else ""
    return code, f"measured{named}"


def totals_over_the_cap(record: Record) -> str:
    """Tell which totals, as the record itself states them, are over the cap."""
    stated = max((log.total_bytes for log in record.claimed), default=0)
    claimed = record.submission.bytes_total if record.submission else 0
    totals = {"a log": stated, "submission.json": claimed}
    return join(f"{place} states {size:,}" for place, size in totals.items() if size > CAP)


def artifact_bytes(record: Record) -> tuple[int, str]:
    """Find the size of the largest artifact and where it is from; 0 if nothing tells it.

    Logs and a file are heard first, submission.json only where they are silent.
    """
    sizes = [logged_artifact(log) for log in record.claimed]
    if record.artifact:
        sizes.append((record.artifact.stat().st_size, f"measured, {record.artifact.name}"))
    if not any(size for size, _ in sizes):
        sizes += claimed_artifact_bytes(record)
    return max(sizes, default=(0, ""), key=lambda entry: entry[0])


def logged_artifact(log: Log) -> tuple[int, str]:
    """Find the artifact's size in a log, as it stands there or as what the code leaves."""
    if log.artifact_bytes or not log.code_bytes:
        return log.artifact_bytes, f"logged in {log.path.name}"
    return max(log.total_bytes - log.code_bytes, 0), f"total less code in {log.path.name}"


def claimed_artifact_bytes(record: Record) -> list[tuple[int, str]]:
    """List the artifact's sizes by submission.json, each with the field that tells it."""
    keys = [key for key in record.raw if str(key).startswith("bytes_model")]
    sizes = [(int_of(record.raw[key]), f"claimed as {key}") for key in keys]
    if record.submission and record.submission.bytes_code:
        rest = record.submission.bytes_total - record.submission.bytes_code
        if rest > 0:
            sizes.append((rest, "claimed, bytes_total - bytes_code"))
    return sizes


def int_of(value: Any) -> int:
    """Read a JSON value as a size; 0 if it is none."""
    number = to_number(value)
    return int(number) if number > 0 else 0


def used_helpers(record: Record) -> list[Path]:
    """List the files of code beside train_gpt.py that it uses, itself or by another of them."""
    return find_used(record.folder)


def other_count(record: Record, code: int) -> str:
    """Tell if the record counted another size of its code; a wrapper's, for one."""
    counted = [log.code_bytes for log in record.claimed]
    counted += [record.submission.bytes_code] if record.submission else []
    least = min(filter(None, counted), default=code)
    return "" if least == code else f"the code was counted as {least:,}"


def uncounted(record: Record) -> str:
    """Tell of files that nobody counts: tokenizers."""
    models = [path for path in sorted(record.folder.rglob("*.model")) if path.is_file()]
    size = sum(path.stat().st_size for path in models)
    return f"not counted: the tokenizer, {size:,}" if models else ""


def binary_units(record: Record) -> str:
    """Tell where the script takes 1024 * 1024 for a megabyte of the cap."""
    text = record.script_text
    for found in MEBIBYTE.finditer(text):
        before = text[max(0, found.start() - LOOK_BACK) : found.start()].rstrip(" \t")
        word = before[len(before.rstrip(WORD)) :]
        if is_of_the_cap(word):
            return f"train_gpt.py takes MiB for MB: {word} {found[0]}"
    return ""


def is_of_the_cap(word: str) -> bool:
    """Tell whether a number or a name is one of the cap in megabytes: 15.9, target_mb."""
    name = word.lower()
    stem, mb, _ = name.rpartition("mb")
    is_limit = bool(mb) and any(limit in stem for limit in LIMIT_WORDS)
    return is_limit or bool(SIXTEEN.fullmatch(word))


def check_sizes_claimed(record: Record) -> Finding:
    """Check that the sizes in submission.json are those of a log or of the files, or more."""
    submission = record.submission
    if not submission:
        return NOT_CHECKED, "submission.json cannot be read"
    script = len(record.script or b"")
    models = {log.artifact_bytes for log in record.claimed}
    if record.artifact:
        models.add(record.artifact.stat().st_size)
    codes = {script, *(log.code_bytes for log in record.claimed)}
    totals = {script + size for size in models if size}
    totals |= {log.total_bytes for log in record.claimed}
    claims = [("bytes_code", submission.bytes_code, codes)]
    claims.append(("bytes_total", submission.bytes_total, totals))
    for seed, entry in submission.seeds.items():
        size = int_of(entry.get("artifact_bytes"))
        claims.append((f"artifact_bytes of seed {seed}", size, models | totals))
    claims = [(name, size, found - {0}) for name, size, found in claims]
    known = [(name, size, found) for name, size, found in claims if size and found]
    wrong = []
    for name, size, found in known:
        if size not in found and size < max(found):
            others = " or ".join(f"{other:,}" for other in sorted(found)[:6])
            wrong.append(f"{name} is {size:,}; logs and files say {others}")
    if wrong:
        return FAIL, join(wrong[:4])
    if not known:
        return NOT_CHECKED, "no size is in both submission.json and the logs or files"
    return PASS, f"{', '.join(name for name, *_ in known)}: not less than logs and files have"


def check_digests(record: Record) -> Finding:
    """Check that the files are those whose SHA-256 submission.json states."""
    code, models = record.raw.get("code_sha256"), record.raw.get("artifact_sha256")
    same = {}
    if isinstance(code, str) and record.script is not None:
        same["train_gpt.py"] = hashlib.sha256(record.script).hexdigest() == code
    if isinstance(models, dict) and record.artifact:
        digest = hashlib.sha256(record.artifact.read_bytes()).hexdigest()
        same[record.artifact.name] = digest in models.values()
    if not same:
        return NOT_CHECKED, "submission.json states no SHA-256 of a file that is there"
    wrong = [name for name, is_same in same.items() if not is_same]
    if wrong:
        return FAIL, f"not the file that was packed: {', '.join(wrong)}"
    return PASS, f"as submission.json states: {', '.join(same)}"
