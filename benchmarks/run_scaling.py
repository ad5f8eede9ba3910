"""run.py --scaling: time and memory of a step as context, width, depth and processes grow."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from measure import number
from run_process import BenchmarkError, Settings, Side, describe, make_side, run_once

import train_gpt as tg

Point = dict[str, Any]
SWEEPS = {
    "context": ("TRAIN_SEQ_LEN", [512, 1024, 2048, 4096]),
    "width": ("MODEL_DIM", [256, 512, 768, 1024]),
    "depth": ("NUM_LAYERS", [3, 6, 9, 12]),
    "processes": ("WORLD_SIZE", [1, 2, 4]),
}


def scaling_settings(base: Settings, name: str, value: int) -> Settings:
    """Change one setting of the base; a wider model has more heads, not wider ones."""
    if name == "WORLD_SIZE":
        return base
    changed = base | {name: str(value)}
    if name == "MODEL_DIM":
        hp = tg.load_settings(base, check_places=False)
        heads = max(1, value * hp.num_heads // hp.model_dim)
        kv_heads = max(1, heads * hp.num_kv_heads // hp.num_heads)
        changed |= {"NUM_HEADS": str(heads), "NUM_KV_HEADS": str(kv_heads)}
    return changed


def places_for_processes(side: Side) -> int:
    """Count the GPUs, or else the cores, that can each run a process."""
    may_use_gpus = side.settings.get("DEVICE", "auto") in ("auto", "cuda")
    gpus = torch.cuda.device_count() if may_use_gpus else 0
    return gpus or os.cpu_count() or 1


def measure_point(side: Side, name: str, value: int, nproc: int) -> Point:
    """Run a side once with one setting changed; if it fails, the point says why."""
    try:
        other = make_side(side.script, scaling_settings(side.settings, name, value))
        point = describe(other, run_once(other, nproc), None)
    except (BenchmarkError, tg.UserError) as problem:
        point = {"problem": str(problem)}
    return {"value": value} | point


def scaling(side: Side, nproc: int, quick: bool) -> dict[str, list[Point]]:
    """Measure time and memory of runs in which one thing grows."""
    found: dict[str, list[Point]] = {}
    places = places_for_processes(side)
    for title, (name, values) in SWEEPS.items():
        found[title] = []
        for value in values[: 2 if quick else None]:
            processes = value if title == "processes" else nproc
            if title == "processes" and processes > places:
                print(f"{title} {value}: left out, there are {places} places for one")
                continue
            point = measure_point(side, name, value, processes)
            found[title].append(point)
            print(f"{title} {value}: {brief(point)}")
    return found


def brief(point: Point) -> str:
    """Tell a point's step time, or the last line of what went wrong."""
    if "problem" in point:
        return point["problem"].splitlines()[-1]
    return f"{point['step_ms']:.1f} ms a step"


def memory_of(point: Point) -> float | None:
    """Give GPU memory where it is known, else host memory, MiB."""
    return point["script_gpu_mib"] or point["smi_gpu_mib"] or point["host_mib"]


def scaling_table(found: dict[str, list[Point]]) -> str:
    """Write one row a point."""
    lines = ["| what grows | to | step, ms | tokens/s | peak memory, MiB |", "|---" * 5 + "|"]
    for title, points in found.items():
        for point in points:
            cells = ["failed", "", ""]
            if "step_ms" in point:
                figures = (point["step_ms"], point["tokens_per_s"], memory_of(point))
                cells = [number(value) for value in figures]
            lines.append(f"| {title} | {point['value']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_scaling(found: dict[str, list[Point]], path: Path) -> None:
    """Draw step time and peak memory over what grows into a PNG."""
    figure, axes = plt.subplots(2, len(found), figsize=(13, 6), layout="constrained", squeeze=False)
    for column, (title, points) in enumerate(found.items()):
        points = [point for point in points if "step_ms" in point]
        values = [point["value"] for point in points]
        times = [point["step_ms"] for point in points]
        memory = [memory_of(point) or math.nan for point in points]
        for row, (heights, label) in enumerate(((times, "ms a step"), (memory, "MiB"))):
            axis = axes[row, column]
            axis.plot(values, heights, "o-", color="#4c72b0")
            axis.set(xlabel=title, ylabel=label)
            axis.margins(y=0.1)
            axis.autoscale_view()
            axis.set_ylim(bottom=0)
            axis.set_xticks(values, map(str, values), rotation=45)
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
