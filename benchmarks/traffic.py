"""Count what PyTorch's compiler makes of train_gpt.py for an H100, on a machine without one.

    python benchmarks/traffic.py [--config X.env] [NAME=VALUE ...] [--tokens 65536] [--forward]
        [--script X.py] [--vs COMMIT|SCRIPT] [--tb-per-s 3] [--product-tflops 700]
        [--attention-tflops 500] [--lines 30] [--callers] [--largest 12] [--out FILE.json]
        [--code FOLDER]

The compiler lowers the forward and backward pass of the model that the settings give, and generates
its code; nothing is run. Counted, for one micro-batch of --tokens tokens: kernels that are
launched, and bytes that they read and write, by kind and by the lines of the script that cause
them; then the launches of the rest of a step, its optimizers. Bytes are a floor, as if caches were
perfect. --vs counts another script too, or that of a commit, and sets both beside each other. It
needs triton, which is only imported.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import traffic_compare
import traffic_lines
import traffic_optimizer
import traffic_tables
from gpu_kit import ROOT, git
from traffic_compile import compile_model, load_script
from traffic_count import KINDS, Graph, Kernel
from traffic_device import TrafficError


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What an H100 reaches in practice; a kernel's floor is its bytes or its FLOPs over these."""

    bytes_per_s: float = 3.0e12
    product_flops_per_s: float = 700e12
    attention_flops_per_s: float = 500e12


def summarize(kernels: Sequence[Kernel]) -> dict[str, dict[str, int]]:
    """Add up kernels by kind."""
    found = {}
    for kind in KINDS:
        same = [kernel for kernel in kernels if kernel.kind == kind]
        found[kind] = {
            "launches": len(same),
            "unique": len({kernel.name for kernel in same}),
            "bytes_read": sum(kernel.reads for kernel in same),
            "bytes_written": sum(kernel.writes for kernel in same),
            "flops": sum(kernel.flops for kernel in same),
        }
    return found


def model_flops(hp: Any, tokens: int, forward_only: bool) -> tuple[float, float]:
    """Count the model's FLOPs, and attention's part, by measure.py's formulas."""
    import measure  # of the script that was loaded

    attention = measure.attention_flops_per_token(hp) * tokens
    attention *= 1 if forward_only else 3
    return measure.flops_per_token(hp, forward_only) * tokens, attention


def floor_ms(kernels: Sequence[Kernel], flops: float, by: Ceilings) -> dict[str, float]:
    """Give the milliseconds that each kind takes at least, attention by its FLOPs."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for kernel in kernels:
        moving = (kernel.reads + kernel.writes) / by.bytes_per_s
        if kernel.kind == "product":
            seconds["product"] += max(kernel.flops / by.product_flops_per_s, moving)
        elif kernel.kind != "attention":
            seconds[kernel.kind] += moving
    seconds["attention"] = flops / by.attention_flops_per_s
    found = {kind: 1e3 * value for kind, value in seconds.items()}
    return {**found, "all": sum(found.values())}


def group_kernels(graphs: Sequence[Graph]) -> list[dict[str, Any]]:
    """Put kernels that are alike together, those that move most bytes first."""
    names = ("kind", "name", "ops", "reads", "writes", "flops")
    alike = Counter()
    for graph in graphs:
        for kernel in graph.kernels:
            alike[graph.name, *(getattr(kernel, name) for name in names)] += 1
    groups = [
        {**dict(zip(("graph", *names), key, strict=True)), "launches": count}
        for key, count in alike.items()
    ]
    return sorted(groups, key=lambda group: -group["launches"] * (group["reads"] + group["writes"]))


def commit() -> str:
    """Name the commit of the checkout, and say if files differ from it."""
    changed = git("status", "-s", "-uno")
    return (git("rev-parse", "HEAD") or "unknown") + (" with changes" if changed else "")


def optimizer_report(args: argparse.Namespace, tg: ModuleType, hp: Any) -> dict[str, Any]:
    """Count the rest of a step. A script whose Trainer is another one has a problem instead."""
    try:
        kernels = traffic_optimizer.count_optimizer(tg, hp)
    except Exception as problem:  # of whatever kind: it is what another script does
        text = f"{type(problem).__name__}: {problem}".splitlines()[0]
        return {"problem": f"{text}; see traffic_optimizer.optimizer_step"}
    charges = [charge for kernel in kernels for charge in kernel.charges]
    return {
        "totals": summarize(kernels),
        "floor_ms": floor_ms(kernels, 0.0, args.ceilings),
        "operators": traffic_optimizer.operator_rows(kernels),
        "lines": traffic_lines.line_rows(charges, tg.__file__, callers=False),
    }


def make_report(
    args: argparse.Namespace, tg: ModuleType, hp: Any, graphs: list[Graph]
) -> dict[str, Any]:
    """Put together what was counted, of what, and with which versions."""
    import triton

    kernels = [kernel for graph in graphs for kernel in graph.kernels]
    charges = [charge for kernel in kernels for charge in kernel.charges]
    flops, attention = model_flops(hp, args.tokens, args.forward)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    versions["triton"] = triton.__version__
    totals = summarize(kernels)
    totals["attention"]["flops"] = attention
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "script": tg.__file__,
        "versions": versions,
        "settings": {name: getattr(hp, name.lower()) for name in sorted(hp.given)},
        "tokens": args.tokens,
        "model_flops": flops,
        "totals": totals,
        "floor_ms": floor_ms(kernels, attention, args.ceilings),
        "floor_by": dataclasses.asdict(args.ceilings),
        "saved_bytes": sum(size for graph in graphs for size in graph.saved),
        "gradients": [size for graph in graphs for size in graph.gradients],
        "inductor_bytes": {graph.name: graph.inductor_bytes for graph in graphs},
        "graphs": {graph.name: summarize(graph.kernels) for graph in graphs},
        "lines": traffic_lines.line_rows(charges, tg.__file__, callers=False),
        "calls": traffic_lines.line_rows(charges, tg.__file__, callers=True),
        "functions": traffic_lines.function_rows(charges, tg.__file__),
        "kernels": group_kernels(graphs),
        "optimizer": None if args.forward else optimizer_report(args, tg, hp),
    }


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("settings", nargs="*", metavar="NAME=VALUE", help="of the script")
    add("--config", help="dotenv file with settings")
    add("--script", type=Path, default=ROOT / "train_gpt.py", help="default: the checkout's")
    add("--vs", metavar="COMMIT|SCRIPT", help="count this one too, as before")
    add("--tokens", type=int, default=65536, help="of the micro-batch")
    add("--forward", action="store_true", help="no backward pass, as in scoring")
    add("--lines", type=int, default=30, help="lines of the script in the table")
    add("--callers", action="store_true", help="lines of functions apart by who calls them")
    add("--largest", type=int, default=12, help="Triton kernels in the table")
    add("--tb-per-s", type=float, default=3.0, help="ceiling of memory")
    add("--product-tflops", type=float, default=700.0, help="ceiling of matrix products")
    add("--attention-tflops", type=float, default=500.0, help="ceiling of attention")
    add("--out", type=Path, help="write all that was counted to this JSON file")
    add("--code", type=Path, help="write the generated code to this folder")
    args = parser.parse_intermixed_args(arguments)
    if wrong := [text for text in args.settings if "=" not in text]:
        parser.error(f"{wrong[0]}: expected NAME=VALUE")
    given = (args.tb_per_s, args.product_tflops, args.attention_tflops)
    if not all(ceiling > 0 for ceiling in given):
        parser.error("--tb-per-s, --product-tflops, --attention-tflops: expected more than 0")
    args.ceilings = Ceilings(*(1e12 * ceiling for ceiling in given))
    return args


def count(args: argparse.Namespace) -> dict[str, Any]:
    """Load the script, compile its model, and put together what was counted."""
    tg = load_script(args.script)
    config = {"CONFIG": args.config} if args.config else {}
    given = dict(text.split("=", 1) for text in args.settings)
    try:
        hp = tg.load_settings({**os.environ, **config, **given}, check_places=False)
    except tg.UserError as problem:
        raise TrafficError(str(problem)) from None
    graphs = compile_model(tg, hp, args.tokens, args.forward)
    if args.code:
        args.code.mkdir(parents=True, exist_ok=True)
        for graph in graphs:
            (args.code / f"{graph.name}.py").write_text(graph.code, encoding="utf-8")
    return make_report(args, tg, hp, graphs)


def main(arguments: list[str]) -> None:
    """Count, print, and write what was asked for."""
    args = read_arguments(arguments)
    if importlib.util.find_spec("triton") is None:
        raise TrafficError("triton cannot be imported: pip install --no-deps triton==3.6.0")
    if args.vs:
        found = traffic_compare.count_both(args)
        print(traffic_compare.describe(found))
    else:
        found = count(args)
        print(traffic_tables.describe(found, args.lines, args.callers, args.largest))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (TrafficError, OSError) as problem:
        sys.exit(f"traffic.py: error: {problem}")
