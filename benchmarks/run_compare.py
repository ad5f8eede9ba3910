"""run.py's comparison: the sides in turn, A B A B, and their figures beside each other."""

import statistics
from typing import Any

import numpy as np
import run_process
from measure import number
from run_process import Side, describe

ROWS = {
    "step_ms": "step, ms",
    "tokens_per_s": "tokens/s",
    "mfu": "MFU, %",
    "first_step_s": "to the first step, s",
    "wall_s": "whole process, s",
    "host_mib": "peak host memory, MiB",
    "script_gpu_mib": "peak GPU memory, script, MiB",
    "smi_gpu_mib": "peak GPU memory, nvidia-smi, MiB",
    "bpb_tokens": "BPB after equal tokens",
    "bpb_seconds": "BPB after equal seconds",
}
OF_STEPS = ("step_ms", "tokens_per_s", "mfu")  # a run has many of them


def add_ceilings(sides: list[Side], ceilings: list[list[dict[str, Any]]]) -> None:
    """Measure the ceiling of each side whose settings are known, once if they have the same."""
    seen: dict[tuple, dict[str, Any]] = {}
    for side, found in zip(sides, ceilings, strict=True):
        if side.hp is None:
            continue
        key = (side.hp.device, side.hp.dtype, side.hp.model_dim)
        if key not in seen:
            seen[key] = run_process.worker("ceiling", side.settings)
        found.append(seen[key])


def peak_tflops(ceilings: list[dict[str, Any]], nproc: int) -> float | None:
    """Give the TFLOP/s that all processes could reach."""
    if not ceilings:
        return None
    return nproc * statistics.median(found["tflops"] for found in ceilings)


def compare(sides: list[Side], rounds: int, nproc: int) -> dict[str, Any]:
    """Run the sides in turn, with the ceiling measured around each round."""
    runs: list[list[dict[str, Any]]] = [[] for _ in sides]
    ceilings: list[list[dict[str, Any]]] = [[] for _ in sides]
    for turn in range(rounds):
        add_ceilings(sides, ceilings)
        for letter, side, found in zip("AB", sides, runs, strict=False):
            found.append(run_process.run_once(side, nproc))
            ms = statistics.median(found[-1]["step_ms"])
            print(f"round {turn + 1}, {letter}: {ms:.1f} ms a step", flush=True)
    add_ceilings(sides, ceilings)
    peaks = [peak_tflops(found, nproc) for found in ceilings]
    figures = [
        [describe(side, run, peak) for run in found]
        for side, found, peak in zip(sides, runs, peaks, strict=True)
    ]
    if len(sides) == 2:
        add_bpb(sides, runs, figures)
    return {"ceilings": ceilings, "peak_tflops": peaks, "runs": runs, "figures": figures}


def add_bpb(sides: list[Side], runs: list[list[dict]], figures: list[list[dict]]) -> None:
    """Put the BPB of each round, after equal tokens and seconds, into both sides' figures."""
    rounds = zip(zip(*runs, strict=True), zip(*figures, strict=True), strict=True)
    for round_runs, round_figures in rounds:
        curves = [curve(run, side.batch) for side, run in zip(sides, round_runs, strict=True)]
        for name, values in bpb_at_equal(*curves).items():
            for one, value in zip(round_figures, values, strict=True):
                one[name] = value


def curve(run: dict[str, Any], batch: int) -> np.ndarray:
    """Give the validations of a run, (points, 3): tokens, ms of training, BPB."""
    points = [(step * batch, ms, bpb) for step, ms, bpb in run["val"] if bpb is not None]
    return np.array(points, float).reshape(-1, 3)


def bpb_at_equal(a: np.ndarray, b: np.ndarray) -> dict[str, tuple[float | None, float | None]]:
    """Compare the BPB of two curves, each (points, 3): tokens, ms, BPB.

    After equal tokens: the most that both validated at. After equal seconds: those of the one that
    ended first, on straight lines between validations.
    """
    found = {"bpb_tokens": (None, None), "bpb_seconds": (None, None)}
    if both := set(a[:, 0]) & set(b[:, 0]) - {0.0}:
        last = [float(points[points[:, 0] == max(both), 2][-1]) for points in (a, b)]
        found["bpb_tokens"] = (last[0], last[1])
    if len(a) and len(b):
        ms = min(a[-1, 1], b[-1, 1])
        if ms > 0 and a[0, 1] <= ms and b[0, 1] <= ms:
            at = [float(np.interp(ms, points[:, 1], points[:, 2])) for points in (a, b)]
            found["bpb_seconds"] = (at[0], at[1])
    return found


def spread(key: str, figures: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """Show median and quartiles of all steps; of what a run has one of, median, least and most."""
    values = [f[key] for f in figures if f[key] is not None]
    if not values:
        return "n/a"
    if key == "step_ms":
        values = [ms for run in runs for ms in run["step_ms"]]
    elif key in OF_STEPS:  # a rate: as the median, of each step
        pairs = zip(figures, runs, strict=True)
        values = [f[key] * f["step_ms"] / ms for f, run in pairs for ms in run["step_ms"]]
    low, high = np.quantile(values, (0.25, 0.75) if key in OF_STEPS else (0.0, 1.0))
    return f"{number(statistics.median(values))} ({number(low)} to {number(high)})"


def ratios(key: str, figures: list[list[dict[str, Any]]]) -> str:
    """Show B/A of a figure: the median and the ratio of each round."""
    if len(figures) < 2:
        return ""
    rounds = zip(*figures, strict=True)
    found = [b[key] / a[key] for a, b in rounds if a[key] and b[key]]
    each = " ".join(f"{ratio:.4f}" for ratio in found)
    return f"{statistics.median(found):.4f}: {each}" if found else ""


def comparison_table(found: dict[str, Any]) -> str:
    """Write the figures of each side, and their ratio."""
    figures = found["figures"]
    letters = "AB"[: len(figures)]
    lines = [f"| | {' | '.join(letters)} | B/A, each round |", "|---" * (len(letters) + 2) + "|"]
    for key, title in ROWS.items():
        sides = zip(figures, found["runs"], strict=True)
        cells = [spread(key, side, runs) for side, runs in sides]
        lines.append(f"| {title} | {' | '.join([*cells, ratios(key, figures)])} |")
    peaks = [f"{number(peak)} TFLOP/s" for peak in found["peak_tflops"]]
    return "\n".join([*lines, f"| ceiling of MFU | {' | '.join(peaks)} | |"])
