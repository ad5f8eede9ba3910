"""run.py --breakdown: the parts of a training step."""

from typing import Any

import measure
import run_process
from measure import number
from run_process import Side


def breakdown(side: Side, nproc: int) -> dict[str, Any]:
    """Measure the parts of a step, ms and percent."""
    found = run_process.worker("breakdown", side.settings, nproc)
    means = measure.mean_parts(found["steps"])
    whole = sum(means.values())
    percent = {part: 100 * ms / whole for part, ms in means.items()}
    return found | {"ms": means, "percent": percent}


def breakdown_table(found: dict[str, Any]) -> str:
    """Write the parts of a step, and what one evaluation costs."""
    lines = ["| part | ms | of a step |", "|---|---|---|"]
    for part, ms in found["ms"].items():
        lines.append(f"| {part} | {number(ms)} | {found['percent'][part]:.1f}% |")
    lines.append(f"| step, waiting for each part | {number(sum(found['ms'].values()))} | |")
    lines.append(f"| step, left to itself | {number(1e3 * found['free_step_s'])} | |")
    stall = f"{100 * found['free_data_share']:.2f}%"
    lines.append(f"| there: the host's wait for data | | {stall} |")
    title = f"evaluation of {found['evaluation_tokens']:,} tokens"
    steps = f"{found['evaluation_s'] / found['free_step_s']:.1f} steps"
    lines.append(f"| {title} | {number(1e3 * found['evaluation_s'])} | {steps} |")
    return "\n".join(lines)
