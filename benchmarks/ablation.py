"""What each technique is worth: the same tokens with and without it, several seeds.

    python benchmarks/ablation.py CASES.json --config base.env --seeds 1 2 3 --jobs 2 --out X.json

CASES.json maps a name to the settings that it adds to the CONFIG file; the others are compared with
the first. Every case trains and exports with every seed, in `--jobs` processes of one thread each.
The table has mean and sample deviation of the exported artifact's exact score in bits per byte, and
the difference to the first case with the same seed, "within noise" if it is not over two standard
errors. It also has the median of the milliseconds a step: let no other program run meanwhile. Runs
that --out has already are not done again. GLIBC_TUNABLES is passed on.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"
SCORE = re.compile(r"^final_\S+_roundtrip_exact .*val_bpb:([0-9.]+)", re.M)
SIZE = re.compile(r"^Total submission size .* (\d+) artifact", re.M)
TIME = re.compile(r" step_avg:([0-9.]+)ms")
KEPT = ("PATH", "HOME", "GLIBC_TUNABLES")


def run(name: str, settings: dict[str, str], seed: int, config: Path) -> dict[str, float]:
    """Train one case with one seed: bits per byte, the artifact's bytes, milliseconds a step."""
    env = {key: os.environ[key] for key in KEPT if key in os.environ}
    env |= {"OMP_NUM_THREADS": "1", "CONFIG": str(config), "SEED": str(seed)}
    env |= settings | {"RUN_ID": f"{name.replace('/', '_')}_{seed}"}
    done = subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True)
    score, size = SCORE.search(done.stdout), SIZE.search(done.stdout)
    if not score or not size:
        raise SystemExit(
            f"{name}, seed {seed}: no score\n{done.stdout[-500:]}{done.stderr[-2000:]}"
        )
    step_ms = float(TIME.findall(done.stdout)[-1])
    return {"val_bpb": float(score[1]), "artifact_bytes": int(size[1]), "step_ms": step_ms}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Write a Markdown table of results by case and seed."""
    lines = [
        "| case | val_bpb, mean ± sd | difference, mean ± se | artifact bytes | ms a step |",
        "|---|---|---|---|---|",
    ]
    base = next(iter(results.values()))
    for name, runs in results.items():
        scores = [run["val_bpb"] for run in runs.values()]
        gaps = [runs[seed]["val_bpb"] - base[seed]["val_bpb"] for seed in runs if seed in base]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        gap, deviation = statistics.mean(gaps), statistics.stdev(scores) if len(scores) > 1 else 0
        clear = "" if runs is base else ("" if abs(gap) > 2 * error else " (within noise)")
        change = "" if runs is base else f"{gap:+.4f} ± {error:.4f}{clear}"
        size = statistics.mean(run["artifact_bytes"] for run in runs.values())
        step_ms = statistics.median(run.get("step_ms", math.nan) for run in runs.values())
        score = f"{statistics.mean(scores):.4f} ± {deviation:.4f}"
        lines.append(f"| {name} | {score} | {change} | {size:,.0f} | {step_ms:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, save every result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    cases = json.loads(args.cases.read_text())
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    results = {name: done.get(name, {}) for name in cases}
    todo = [(n, seed) for seed in args.seeds for n in cases if str(seed) not in results[n]]

    def work(job: tuple[str, int]) -> None:
        name, seed = job
        results[name][str(seed)] = run(name, cases[name], seed, args.config)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}, seed {seed}: {results[name][str(seed)]}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, todo))
    print(table(results))


if __name__ == "__main__":
    main()
