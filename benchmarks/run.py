"""How fast a configuration trains, alone or against another script or other settings.

    python benchmarks/run.py --config X.env [NAME=VALUE ...] [--steps 20] [--rounds 2] [--nproc 8]
    python benchmarks/run.py --config X.env --vs other.py [--vs-env NAME=VALUE | --vs-env Y.env]
    python benchmarks/run.py --config X.env --breakdown      parts of a step
    python benchmarks/run.py --config X.env --evaluation     plain passes and sliding windows
    python benchmarks/run.py --config X.env --scaling        context, width, depth, processes

A is train_gpt.py (or --script), B is --vs, by default the same script, with A's settings and those
of --vs-env. They run in turn, A B A B, on the same data, in empty folders. Any script will do that
takes the challenge's environment variables and prints its log lines (step:1/20 train_loss:..
train_time:..ms). Precedence: NAME=VALUE, then what the tool sets (ITERATIONS=--steps,
TRAIN_LOG_EVERY=1, FIT_BUDGET=none, no cap on the artifact), the environment, --config.
VAL_LOSS_EVERY is 0 where nothing says else; a comparison after equal seconds needs more.

Step times are differences of train_time between logged lines, without the first one: median, and
quartiles over all rounds. Logging every step makes a GPU wait for each, alike in A and B. MFU is
measure.flops_per_token over the ceiling: the fastest matrix product in the run's dtype and with its
threads, measured around each round, times the processes. Seconds to the first step are from the
start of the process to its line. Host memory is the largest sum, at one time, of the peaks of its
living processes (VmHWM in /proc every 0.05 s, so what is shared counts in each, torchrun and
compilers count too, and there is none off Linux); GPU memory is what the script prints as peak
memory allocated, and what nvidia-smi sees, once a second, above its reading before, on the fullest
GPU.
"""

import argparse
import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_breakdown
import run_compare
import run_scaling
import run_scoring
from run_machine import commit, machine
from run_process import (
    HERE,
    SCRIPT,
    BenchmarkError,
    Settings,
    Side,
    describe_side,
    make_side,
    read_pairs,
)

import train_gpt as tg

MODES = ("breakdown", "evaluation", "scaling")


def settings_of(args: argparse.Namespace) -> Settings:
    """Resolve A's settings, by the precedence that the docstring of this file tells."""
    environment = {n: os.environ[n] for n in tg.FIELDS if n in os.environ and n != "CONFIG"}
    config = tg.read_dotenv(args.config) if args.config else {}
    tool = {
        "TRAIN_LOG_EVERY": "1",
        "ITERATIONS": str(args.steps),
        "FIT_BUDGET": "none",
        "ARTIFACT_MAX_BYTES": str(10**12),
    }
    if args.mode == "scaling":
        tool["VAL_TOKENS"] = "16384"
    return {"VAL_LOSS_EVERY": "0"} | config | environment | tool | read_pairs(args.settings)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    path = {"type": Path, "metavar": "FILE"}
    add("settings", nargs="*", metavar="NAME=VALUE", help="settings of A, and of B")
    add("--config", default=os.environ.get("CONFIG", ""), help="dotenv file of settings")
    add("--script", default=SCRIPT, **path, help="A, by default train_gpt.py")
    add("--vs", **path, help="B; by default A's script, if --vs-env is given")
    add("--vs-env", action="append", default=[], help="setting or dotenv file of B; repeatable")
    add("--rounds", type=int, default=2, help="how often A and B are run (2)")
    add("--steps", type=int, default=20, help="ITERATIONS of each run (20)")
    add("--nproc", type=int, default=1, help="processes of each run, by torchrun (1)")
    add("--out", **path, help="JSON of all results; by default in benchmarks/results")
    modes = parser.add_mutually_exclusive_group()
    for name in MODES:
        modes.add_argument(f"--{name}", dest="mode", action="store_const", const=name)
    add("--quick", action="store_true", help="--scaling: two points of each kind")
    args = parser.parse_intermixed_args(arguments)
    wrong = [word for word in args.settings if "=" not in word]
    if wrong:
        parser.error(f"{wrong[0]}: expected NAME=VALUE")
    if args.rounds < 1 or args.steps < 3 or args.nproc < 1:
        parser.error("expected --rounds 1+, --steps 3+, --nproc 1+")
    return args


def make_sides(args: argparse.Namespace) -> list[Side]:
    """Resolve A and, if it is asked for, B."""
    sides = [make_side(args.script, settings_of(args))]
    if args.vs or args.vs_env:
        settings = sides[0].settings | read_pairs(args.vs_env)
        sides.append(make_side(args.vs or args.script, settings))
    return sides


def measured(args: argparse.Namespace, sides: list[Side], out: Path) -> tuple[Any, str]:
    """Measure what is asked for: the results, and a table of them."""
    if args.mode == "breakdown":
        found = run_breakdown.breakdown(sides[0], args.nproc)
        return found, run_breakdown.breakdown_table(found)
    if args.mode == "evaluation":
        found = run_scoring.evaluation(sides[0])
        return found, run_scoring.evaluation_table(found)
    if args.mode == "scaling":
        found = run_scaling.scaling(sides[0], args.nproc, args.quick)
        run_scaling.draw_scaling(found, out.with_suffix(".png"))
        return found, run_scaling.scaling_table(found)
    found = run_compare.compare(sides, args.rounds, args.nproc)
    return found, run_compare.comparison_table(found)


def main(arguments: list[str]) -> None:
    """Measure, print a table, and write everything to the JSON file."""
    args = parse_arguments(arguments)
    name = f"{datetime.now():%Y-%m-%d_%H%M%S}_{args.mode or 'run'}.json"
    out = args.out or HERE / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"command": [sys.argv[0], *arguments], "commit": commit(), "machine": machine()}
    sides = make_sides(args)
    report["sides"] = {k: describe_side(s) for k, s in zip("AB", sides, strict=False)}
    report["results"], table = measured(args, sides, out)
    out.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"{table}\n\nall figures: {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BenchmarkError, tg.UserError, OSError) as problem:
        sys.exit(f"run.py: error: {problem}")
