"""What sizes must be: under the cap, and as files and logs have them."""

import hashlib
import re
from pathlib import Path
from typing import Any

from reading import FAIL, NOT_CHECKED, PASS, to_number

from static_rules.record import Finding, Record, join

CAP, MIB_CAP = 16_000_000, 16 * 2**20
ARTIFACTS = ("*.artifact", "*.ptz", "*.int8.*", "*.int6.*", "final_model*.bin", "final_model*.xz")
HELPERS = {".py", ".cpp", ".cc", ".c", ".cu", ".cuh", ".h", ".hpp", ".so", ".pyx", ".rs"}


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


def find_artifact(folder: Path) -> Path | None:
    """The artifact in a record folder, if there is just one."""
    found = {path for pattern in ARTIFACTS for path in folder.glob(pattern) if path.is_file()}
    return found.pop() if len(found) == 1 else None


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


def uncounted(record: Record) -> str:
    """Files that nobody counts: tokenizers."""
    models = [path for path in sorted(record.folder.rglob("*.model")) if path.is_file()]
    size = sum(path.stat().st_size for path in models)
    return f"not counted: the tokenizer, {size:,}" if models else ""


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


def int_of(value: Any) -> int:
    """A JSON value as a size; 0 if it is none."""
    number = to_number(value)
    return int(number) if number > 0 else 0


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
