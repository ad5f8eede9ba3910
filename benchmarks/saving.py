"""What checkpoints cost: training time with and without SAVE_EVERY, and against another script.

    python benchmarks/saving.py --config X.env --every 50 --rounds 3 --script OTHER/train_gpt.py

Runs train_gpt.py without checkpoints, with one every so many steps, and, if --script is given, that
script without checkpoints, in turn (A B C A B C ...), so that a change of the machine's load meets
all alike. The time is that of the training clock at the end; beside it are the seconds of the whole
process. Says whether all training losses are the same to 8 digits.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent / "train_gpt.py"


def measure(script: Path, settings: dict[str, str]) -> dict:
    """Run a script: its training and process seconds, and its training losses to 8 digits."""
    with tempfile.TemporaryDirectory() as out:
        places = {"OUT_DIR": out, "RUN_ID": "run", "TRAIN_LOG_EVERY": "1"}
        start = time.perf_counter()
        command = [sys.executable, str(script)]
        environ = {**os.environ, **settings, **places}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"{script}: {done.stderr}")
        lines = (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    losses = [f"{event['train_loss']:.8g}" for event in events if event["event"] == "train"]
    ms = [event["train_time_ms"] for event in events if event["event"] == "val"][-1]
    return {"train": ms / 1e3, "process": seconds, "losses": losses}


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="dotenv file of the run's settings")
    parser.add_argument("--every", type=int, default=50, help="SAVE_EVERY of the second case")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--script", type=Path, help="another train_gpt.py, to compare with")
    args = parser.parse_args()
    cases = {"off": (HERE, {"SAVE_EVERY": "0"})}
    cases[f"SAVE_EVERY={args.every}"] = (HERE, {"SAVE_EVERY": str(args.every)})
    if args.script:
        cases[str(args.script)] = (args.script, {})
    found = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, (script, settings) in cases.items():
            found[name].append(measure(script, {"CONFIG": args.config, **settings}))
    print(
        "| case | training, s, each round | median to off | process, s, median |\n|---|---|---|---|"
    )
    times = {name: [run["train"] for run in runs] for name, runs in found.items()}
    for name, runs in found.items():
        ratios = [a / b - 1 for a, b in zip(times[name], times["off"], strict=True)]
        each = " ".join(f"{seconds:.2f}" for seconds in times[name])
        whole = statistics.median(run["process"] for run in runs)
        print(f"| {name} | {each} | {statistics.median(ratios):+.2%} | {whole:.2f} |")
    losses = {tuple(run["losses"]) for runs in found.values() for run in runs}
    print(f"training losses to 8 digits: {'all the same' if len(losses) == 1 else 'NOT the same'}")


if __name__ == "__main__":
    main()
