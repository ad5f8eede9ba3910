"""run.py --evaluation: what the ways of scoring cost."""

from typing import Any

import run_process
from measure import number
from run_process import Side


def evaluation(side: Side) -> dict[str, Any]:
    """Measure the tokens that are scored a second, each way."""
    return run_process.worker("evaluation", side.settings)


def evaluation_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Tell what each way of scoring costs, beside the plain pass."""
    rates = found["tokens_per_s"]
    titles = {
        "plain": "plain pass",
        "sliding": f"windows, stride {found['stride']}",
        "documents": f"documents apart, stride {found['stride']}",
        "loop": "windows one at a time",
    }
    rows = []
    for name, rate in rates.items():
        cost = f"{number(rates['plain'] / rate)} plain passes"
        rows.append((titles[name], f"{number(rate)} tokens/s, {cost}"))
    return rows


def evaluation_table(found: dict[str, Any]) -> str:
    """Write one row a way of scoring."""
    rows = [f"| {what} | {measured} |" for what, measured in evaluation_rows(found)]
    return "\n".join(["| scoring | measured |", "|---|---|", *rows])
