"""What the runs must have been: of the shipped script, and finished."""

import ast
import re
import sys

from reading import FAIL, NOT_CHECKED, PASS, to_text

from static_rules.record import Finding, Record, join, later_bpb, plural, seed_table


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


def same_text(one: str, two: str) -> bool:
    """Whether two scripts are equal but for line ends and blank lines at their ends."""
    return one.replace("\r\n", "\n").strip() == two.replace("\r\n", "\n").strip()


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
