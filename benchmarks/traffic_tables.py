"""traffic.py's tables: what was counted, for a reader."""

from collections.abc import Sequence
from typing import Any

from traffic_count import KINDS

Report = dict[str, Any]
Row = dict[str, Any]


def table(titles: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a table in Markdown; `titles` are divided by bars."""
    heads = titles.split("|")
    lines = [f"|{'|'.join(heads)}|", "|---" * len(heads) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def gigabytes(row: Row, digits: int = 2) -> list[str]:
    """Show what a row reads and writes."""
    return [f"{row[side] / 1e9:.{digits}f}" for side in ("bytes_read", "bytes_written")]


def totals_table(report: Report) -> list[str]:
    """Write the table of kinds."""
    rows = []
    for kind, title in KINDS.items():
        row = report["totals"][kind]
        unique = str(row["unique"]) if kind == "triton" else ""
        work = [f"{row['flops'] / 1e12:.2f}", f"{report['floor_ms'][kind]:.1f}"]
        rows.append([title, str(row["launches"]), unique, *gigabytes(row), *work])
    titles = " kind | launches | unique | GB read | GB written | TFLOP | floor, ms "
    return table(titles, rows)


def amounts(row: Row) -> list[str]:
    """Show launches, bytes and the share of a row."""
    return [f"{row['launches']:.1f}", *gigabytes(row), f"{100 * row['share']:.1f}"]


def others(rows: Sequence[Row], what: str, columns: int) -> list[list[str]]:
    """Make the row for what a table leaves out; none if there is nothing."""
    if not rows:
        return []
    names = ("launches", "bytes_read", "bytes_written", "share")
    total = {name: sum(row[name] for row in rows) for name in names}
    return [["", *amounts(total), f"{len(rows)} other {what}", *[""] * (columns - 2)]]


def lines_table(rows: Sequence[Row], count: int) -> list[str]:
    """Write the table of the lines of the script, those that move most first."""
    cells = []
    for row in rows[:count]:
        place = f"{row['caller']} > {row['line']}" if row["caller"] else str(row["line"])
        source = row["source"].replace("|", "\\|")
        code = [row["function"], f"`{source}`"] if row["line"] else ["made by no line", ""]
        cells.append([place, *amounts(row), *code])
    titles = " line | launches | GB read | GB written | % | function | source "
    return table(titles, cells + others(rows[count:], "lines", 3))


def optimizer_part(report: Report, lines: int) -> list[str]:
    """Write what a step does beside forward, backward and loader."""
    found = report["optimizer"]
    if found is None:
        return []
    if "problem" in found:
        return ["", f"The rest of a step cannot be counted: {found['problem']}"]
    launches = sum(row["launches"] for row in found["totals"].values())
    floor = found["floor_ms"]["all"]
    title = f"The rest of a step, without the loader: {launches} launches, not under {floor:.2f} ms"
    rows = [
        [row["operator"], KINDS[row["kind"]], str(row["launches"]), *gigabytes(row, 3)]
        for row in found["operators"]
    ]
    titles = " operator | kind | launches | GB read | GB written "
    return ["", title, "", *table(titles, rows), "", *lines_table(found["lines"], lines)]


def functions_table(report: Report, count: int) -> list[str]:
    """Write the table of the functions of the script."""
    rows = report["functions"]
    cells = [[row["function"] or "none", *amounts(row)] for row in rows[:count]]
    return table(" function | launches | GB read | GB written | % ", cells)


def largest_table(report: Report, count: int) -> list[str]:
    """Write the table of the Triton kernels that move most bytes."""
    rows = []
    triton = [group for group in report["kernels"] if group["kind"] == "triton"]
    for group in triton[:count]:
        sides = [group["reads"], group["writes"]]
        launches = group["launches"]
        moved = [f"{side / 1e6:.1f}" for side in sides] + [f"{launches * sum(sides) / 1e9:.2f}"]
        rows.append([group["graph"], str(launches), *moved, group["ops"]])
    return table(" graph | launches | MB read | MB written | GB in all | fuses ", rows)


def floor_note(report: Report) -> list[str]:
    """Say what the counted bytes and the floor are."""
    counted = sum(row["bytes_read"] + row["bytes_written"] for row in report["totals"].values())
    own = sum(report["inductor_bytes"].values())
    gradients = report["gradients"]
    by = {name: value / 1e12 for name, value in report["floor_by"].items()}
    return [
        f"{counted / 1e9:.2f} GB in all; Inductor's own count, coarser: {own / 1e9:.2f} GB.",
        f"Kept for the backward pass: {report['saved_bytes'] / 1e9:.2f} GB beside parameters.",
        f"Gradients: {len(gradients)}. Adding them to others is not counted: a launch each, and",
        f"{3 * sum(gradients) / 1e9:.2f} GB for a micro-batch.",
        f"Model FLOPs, by measure.flops_per_token: {report['model_flops'] / 1e12:.2f} TFLOP.",
        f"Not under {report['floor_ms']['all']:.1f} ms on an H100: a floor, not a time. It takes",
        f"{by['bytes_per_s']:g} TB/s; for a product the larger of bytes over that and FLOPs over",
        f"{by['product_flops_per_s']:g} TFLOP/s; for attention FLOPs over",
        f"{by['attention_flops_per_s']:g} TFLOP/s; no launch, no gap. Nothing ran on a GPU.",
    ]


def describe(report: Report, lines: int, callers: bool, largest: int) -> str:
    """Write the report for a reader."""
    parts = [
        f"One micro-batch of {report['tokens']:,} tokens, by {report['versions']}",
        *["", *totals_table(report)],
        *["", *floor_note(report)],
        *["", "By line: forward and backward; a launch counts evenly for all lines in it.", ""],
        *lines_table(report["calls" if callers else "lines"], lines),
        *["", "By function:", "", *functions_table(report, lines)],
        *["", f"The {largest} groups of Triton kernels that move most bytes:", ""],
        *largest_table(report, largest),
        *optimizer_part(report, lines),
    ]
    return "\n".join(parts)
