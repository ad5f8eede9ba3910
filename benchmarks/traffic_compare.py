"""traffic.py's comparison: two scripts, counted with the same settings, each in its own process."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_kit import git
from traffic_count import KINDS
from traffic_device import TrafficError
from traffic_tables import Report, Row, table

TOOL = Path(__file__).with_name("traffic.py")


def script_of(name: str, folder: Path) -> Path:
    """Find a script by its path, or take a commit's train_gpt.py into a folder."""
    if Path(name).is_file():
        return Path(name)
    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if not commit:
        raise TrafficError(f"--vs {name}: neither a file nor a commit, branch or tag")
    source = git("show", f"{commit}:train_gpt.py")
    if source is None:
        raise TrafficError(f"--vs {name}: that commit has no train_gpt.py")
    script = folder / "train_gpt.py"
    script.write_text(source + "\n", encoding="utf-8")
    return script


def options_of(args: argparse.Namespace) -> list[str]:
    """Write the options that both scripts are counted with."""
    options = [*args.settings, "--tokens", str(args.tokens), "--tb-per-s", str(args.tb_per_s)]
    options += ["--product-tflops", str(args.product_tflops)]
    options += ["--attention-tflops", str(args.attention_tflops)]
    options += ["--config", args.config] if args.config else []
    return [*options, "--forward"] if args.forward else options


def count_apart(script: Path, options: list[str], code: Path | None) -> Report:
    """Count what a script causes, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "report.json")
        command = [sys.executable, TOOL, *options, "--script", script, "--out", out]
        command += ["--code", code] if code else []
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if done.returncode:
            problem = done.stderr.strip().removeprefix("traffic.py: error: ")
            raise TrafficError(problem[-2000:])
        return json.loads(out.read_text(encoding="utf-8"))


def count_both(args: argparse.Namespace) -> dict[str, Any]:
    """Count the script of --vs, as before, and that of --script, as after."""
    found: dict[str, Any] = {"vs": args.vs}
    with tempfile.TemporaryDirectory() as folder:
        scripts = {"before": script_of(args.vs, Path(folder)), "after": args.script}
        names = {"before": f"--vs {args.vs}", "after": f"--script {args.script}"}
        for side, script in scripts.items():
            code = args.code / side if args.code else None
            try:
                found[side] = count_apart(script, options_of(args), code)
            except TrafficError as problem:
                raise TrafficError(f"{names[side]}: {problem}") from None
    found["before"]["script"] = args.vs
    return found


# ================================ TABLES ================================


def ratio(before: float, after: float) -> str:
    """Show after over before."""
    return f"{after / before:.3f}" if before else ("1.000" if not after else "n/a")


def cells(before: float, after: float, form: str) -> list[str]:
    """Show two figures and their ratio."""
    return [format(before, form), format(after, form), ratio(before, after)]


def moved(row: Row) -> float:
    """Give the GB that a row reads and writes."""
    return (row["bytes_read"] + row["bytes_written"]) / 1e9


def whole(report: Report) -> dict[str, Row]:
    """Give launches, GB and floor of each kind, and of all."""
    rows = {}
    for kind in KINDS:
        row = report["totals"][kind]
        rows[kind] = {"launches": row["launches"], "gb": moved(row)}
        rows[kind]["ms"] = report["floor_ms"][kind]
    rows["all"] = {
        name: sum(row[name] for row in rows.values()) for name in ("launches", "gb", "ms")
    }
    return rows


def kinds_table(before: Report, after: Report) -> list[str]:
    """Write launches, GB and floor of each kind beside each other."""
    sides = [whole(report) for report in (before, after)]
    rows = []
    for kind, title in {**KINDS, "all": "all"}.items():
        a, b = (side[kind] for side in sides)
        forms = (("launches", "d"), ("gb", ".2f"), ("ms", ".2f"))
        parts = [cell for name, form in forms for cell in cells(a[name], b[name], form)]
        rows.append([title, *parts])
    figures = ("launches", "GB", "floor, ms")
    titles = "|".join(f" {name}, before | after | ratio " for name in figures)
    return table(f" kind |{titles}", rows)


def functions_table(before: Report, after: Report) -> list[str]:
    """Write the GB of each function of the scripts beside each other."""
    sides = [
        {row["function"]: moved(row) for row in report["functions"]} for report in (before, after)
    ]
    names = sorted({*sides[0], *sides[1]}, key=lambda n: -sides[0].get(n, 0) - sides[1].get(n, 0))
    figures = [(name, *(side.get(name, 0.0) for side in sides)) for name in names]
    rows = [[name or "none", *cells(a, b, ".2f")] for name, a, b in figures]
    return table(" function | GB, before | after | ratio ", rows)


def saved_note(before: Report, after: Report) -> str:
    """Say what is kept for the backward pass."""
    a, b = (report["saved_bytes"] / 1e9 for report in (before, after))
    return f"Kept for the backward pass: {a:.2f} GB before, {b:.2f} after."


def optimizer_part(before: Report, after: Report) -> list[str]:
    """Write the table of the rest of a step, where both could be counted."""
    sides: Sequence[Any] = [report["optimizer"] for report in (before, after)]
    if None in sides:
        return []
    problems = [side["problem"] for side in sides if "problem" in side]
    if problems:
        return ["", f"The rest of a step cannot be compared: {problems[0]}"]
    return ["", "The rest of a step, without the loader:", "", *kinds_table(*sides)]


def describe(found: dict[str, Any]) -> str:
    """Write the comparison for a reader."""
    before = found["before"]
    after = found["after"]
    parts = [
        f"Before: {before['script']}; after: {after['script']}; {after['tokens']:,} tokens",
        *["", *kinds_table(before, after)],
        *["", saved_note(before, after), "", *functions_table(before, after)],
        *optimizer_part(before, after),
    ]
    return "\n".join(parts)
