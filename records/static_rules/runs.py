"""What the runs must have been: of the shipped script, and finished."""

import ast
import re
import sys

from helpers import find_used
from reading import FAIL, NOT_CHECKED, PASS, WARN, Log, read_text

from static_rules.record import Finding, Record, join, later_bpb, plural

USUAL_PYTHON = (3, 12)  # on which most scripts of the field run
# Python tells its version in these lines of a log.
PYTHON = re.compile(r"(?:Running Python |\bpython:)(\d+)\.(\d+)")


def check_script(record: Record) -> Finding:
    """Check that train_gpt.py compiles."""
    if record.script is None:
        return NOT_CHECKED, "there is no train_gpt.py"
    version = f"Python {'.'.join(map(str, sys.version_info[:2]))}"
    try:
        ast.parse(record.script)
    except (SyntaxError, ValueError) as error:
        text = f"train_gpt.py does not compile with {version}: {error}"
        if sys.version_info < newest_python(record):
            return NOT_CHECKED, f"{text}; a newer Python may"
        return FAIL, text
    except (RecursionError, MemoryError):
        return NOT_CHECKED, f"train_gpt.py is too deeply nested for the parser of {version}"
    lines = record.script.count(b"\n")
    return PASS, f"train_gpt.py, {lines} lines, compiles with {version}; it was not run"


def newest_python(record: Record) -> tuple[int, int]:
    """Find the newest Python that a log names, else the usual one."""
    found = [pair for log in record.logs for pair in PYTHON.findall(log.body)]
    versions = [(int(major[:3]), int(minor[:3])) for major, minor in found]
    return max(versions, default=USUAL_PYTHON)


def check_source(record: Record) -> Finding:
    """Check that the code in every log is the shipped one, and the same for all seeds."""
    if reason := different_code(record):
        return FAIL, reason
    if record.script is None:
        return NOT_CHECKED, "no train_gpt.py"
    printed = [log for log in record.logs if log.source]
    if not printed:
        return code_by_size(record)
    shipped = record.script.decode("utf-8-sig", errors="replace")
    other = [log for log in printed if not same_text(log.source, shipped)]
    if other:
        sizes = (f"{log.path.name} ({len(log.source.encode()):,} bytes)" for log in other)
        size = f"{len(record.script):,} bytes"
        return FAIL, f"not the shipped script ({size}) is that of {', '.join(sizes)}"
    behind = max(len(log.code) - 1 for log in printed)
    helpers = [read_text(path) for path in find_used(record.folder)] if behind else []
    if lost := join(not_shipped(log, helpers) for log in printed):
        return FAIL, lost
    inexact = sum(log.source != shipped for log in printed)
    near = f", {inexact} but for line ends" if inexact else ""
    more = f", and the code behind it is shipped ({plural(behind, 'file')})" if behind else ""
    of = f"{len(printed)} of {plural(len(record.logs), 'log')}"
    return PASS, f"the script in {of} is train_gpt.py{near}{more}"


def not_shipped(log: Log, helpers: list[str]) -> str:
    """Tell which sources a log counts with its script that are no file beside it; ours alone do."""
    sources = [s for s in log.code[1:] if not any(same_text(s, text) for text in helpers)]
    sizes = ", ".join(f"{len(source.encode()):,} bytes" for source in sources)
    return f"{log.path.name} counts code that is not shipped: {sizes}" if sizes else ""


def different_code(record: Record) -> str:
    """Tell that seeds of the claim were run from code that differs; "" if none is known to."""
    groups: list[list[Log]] = []
    for log in (log for log in record.claimed if log.source):
        same = (group for group in groups if same_code(group[0], log))
        found = next(same, None)
        if found is None:
            groups.append([log])
        else:
            found.append(log)
    if len(groups) < 2:
        return ""
    parts = (f"{', '.join(log.path.name for log in group)}" for group in groups[:4])
    return f"the seeds were run from different code: {' | '.join(parts)}"


def same_code(one: Log, two: Log) -> bool:
    """Tell whether two logs print the same sources that count."""
    if len(one.code) != len(two.code):
        return False
    return all(map(same_text, one.code, two.code))


def code_by_size(record: Record) -> Finding:
    """Tell whether logs without a script at least counted the same bytes of code."""
    sizes = {log.path.name: log.code_bytes for log in record.claimed if log.code_bytes}
    if len({*sizes.values()}) < 2:
        return NOT_CHECKED, "no log holds its script"
    told = ", ".join(f"{size:,} in {name}" for name, size in [*sizes.items()][:6])
    return WARN, f"no log holds its script, and the size of the code is not one: {told}"


def same_text(one: str, two: str) -> bool:
    """Tell whether two scripts are equal but for line ends and blank lines at their ends."""
    return one.replace("\r\n", "\n").strip() == two.replace("\r\n", "\n").strip()


def check_finished(record: Record) -> Finding:
    """Check that every seed has a log that ends with an exact score."""
    if not record.logs:
        return NOT_CHECKED, "no training logs"
    done = {seed for seed, logs in record.by_seed.items() if any(log.finished for log in logs)}
    found: dict[str, list[str]] = {FAIL: [], NOT_CHECKED: [], PASS: []}
    for seed, logs in record.by_seed.items():
        if seed in done:
            continue
        if done and not seed.isdecimal():
            found[PASS].append(f"{logs[-1].path.name}, which names no seed, has no exact score")
            continue
        state, text = how_it_ends(logs[-1])
        found[state].append(f"{logs[-1].path.name} (seed {seed[:20]}) {text}")
    for state in (FAIL, NOT_CHECKED):
        if found[state]:
            return state, join(found[state])
    again = [f"{log.path.name} holds {log.runs} runs" for log in record.logs if log.runs > 1]
    ended = f"{plural(len(done), 'seed')} ended with an exact score"
    return PASS, join([ended, *found[PASS], *map(unfinished, record.asides), *again])


def unfinished(log: Log) -> str:
    """Tell that a log which no claim names has no exact score; "" if it has one."""
    return "" if log.finished else f"{log.path.name}, which no claim names, has no exact score"


def how_it_ends(log: Log) -> Finding:
    """Tell what the end of a log is that does not end with an exact score."""
    tail = log.body.rstrip()[-2000:]
    if "Traceback (most recent call last)" in tail:
        return FAIL, f"ends in an error at step {log.steps}"
    if log.finals:
        return FAIL, "goes on after its exact score"
    if later_bpb(log):
        return NOT_CHECKED, "ends without a known line of an exact score"
    return FAIL, f"ends at step {log.steps} without a score of the artifact"
