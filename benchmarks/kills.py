"""Kill training with SIGKILL at random moments, resume it each time, and compare with a whole run.

    env $(cat my.env) python benchmarks/kills.py --kills 25 --folder /tmp/kills

Settings come from the environment as for train_gpt.py, but not from a CONFIG file; use DEVICE=cpu,
DTYPE=fp32, SAVE_EVERY, VAL_LOSS_EVERY, TRAIN_LOG_EVERY=1, and a short run. Kills aim in turn at
steps, saves, validations, the export and the score, each after a random time; what each of them hit
is counted. A run goes on with RESUME=auto after each kill; once it has ended, its weights, loss
lines and score must be those of a run that was never killed, and all that it left must be readable;
then the next run starts. Fails at the first difference.
"""

import argparse
import collections
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"

AIMS = ["steps", "saving", "validation", "export", "score", "saving", "validation"]


def environment(folder: Path, name: str) -> dict[str, str]:
    """Give the settings of all runs, and the place of this one."""
    return {**os.environ, "OUT_DIR": str(folder), "RUN_ID": name, "RESUME": "auto"}


def start(folder: Path, name: str) -> tuple[subprocess.Popen, Path]:
    """Start a run, or go on with it; its process, and the file of what it prints."""
    printed = folder / f"{name}_{time.monotonic_ns()}.printed"
    with open(printed, "wb") as file:
        env = environment(folder, name)
        return subprocess.Popen(
            [sys.executable, SCRIPT], env=env, stdout=file, stderr=file
        ), printed


def losses(text: str) -> list[str]:
    """Find the lines with losses, without their times, each once, sorted."""
    found = re.findall(r"^(step:\d+\S* .*?|final_\S+_exact .*)(?: train_time.*)?$", text, re.M)
    return sorted(set(found))


def phase(folder: Path, text: str) -> str:
    """Tell what a run is doing, by its files and by the last line that it has printed."""
    partial = [path.name for path in folder.glob(".*.partial")]
    if partial:
        return "saving" if "checkpoint" in partial[0] else "export"
    lines = re.findall(r"^step:(\d+)/(\d+) (train|val)_loss", text, re.M)
    if not lines:
        return "before the first step"
    step, steps, kind = int(lines[-1][0]), int(lines[-1][1]), lines[-1][2]
    if kind == "val" and step == steps:
        return "export" if "final_model.artifact" not in os.listdir(folder) else "score"
    every = int(os.environ.get("VAL_LOSS_EVERY", "1000"))
    due = step == steps or (every and step % every == 0)
    return "validation" if due and kind == "train" else "steps"


def kill(process: subprocess.Popen, folder: Path, printed: Path, aim: str, wait: float) -> str:
    """Kill a run `wait` seconds after it is seen to do what is aimed at.

    It has at least `wait` * 50 seconds of work before. Gives what it was doing, or nothing if it
    ended before.
    """
    earliest = time.monotonic() + 50 * wait
    while process.poll() is None:
        if time.monotonic() > earliest and phase(folder, printed.read_text()) == aim:
            if aim != "saving":
                time.sleep(wait)
            process.send_signal(signal.SIGSTOP)  # that it goes no further while it is looked at
            doing = phase(folder, printed.read_text())
            process.send_signal(signal.SIGKILL)
            return doing if process.wait() == -signal.SIGKILL else ""
    return ""


def digest(folder: Path) -> str:
    """Digest all raw weights that a run left."""
    weights, total = torch.load(folder / "final_model.pt", weights_only=True), hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode() + weights[name].numpy().tobytes())
    return total.hexdigest()


def unreadable(folder: Path) -> list[str]:
    """List files that a run left and that cannot be read."""
    bad = [path.name for path in folder.glob(".*")]
    for path in folder.glob("checkpoint_*"):
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            bad.append(path.name)
    return bad


def main() -> None:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, chance = options.folder, random.Random(options.seed)
    folder.mkdir(parents=True)
    process, printed = start(folder, "whole")
    if process.wait():
        raise SystemExit(printed.read_text())
    wanted = digest(folder / "whole"), losses(printed.read_text())
    hit, name, texts, finished = collections.Counter(), "run1", [], 0
    while True:
        process, printed = start(folder, name)
        while "forecast:" not in printed.read_text() and process.poll() is None:
            time.sleep(0.01)
        if hit.total() < options.kills:
            aim = AIMS[hit.total() % len(AIMS)]
            doing = kill(process, folder / name, printed, aim, 0.02 * chance.random())
            hit.update([doing] if doing else [])
        code = process.wait()
        texts.append(printed.read_text())
        if code == -signal.SIGKILL:
            continue
        if code:
            raise SystemExit(texts[-1])
        if (digest(folder / name), losses("\n".join(texts))) != wanted:
            raise SystemExit(f"{name}: DIFFERENT, of {len(texts)} processes; see {folder}")
        if bad := unreadable(folder / name):
            raise SystemExit(f"{name}: unreadable: {bad}")
        finished += 1
        print(f"{name}: killed {len(texts) - 1} times; same weights, losses and score", flush=True)
        if hit.total() >= options.kills:
            break
        name, texts = f"run{finished + 1}", []
    hits = ", ".join(f"{count} in {what}" for what, count in hit.most_common())
    print(f"{hit.total()} kills ({hits}), {finished} runs: all bit-identical, nothing unreadable")


if __name__ == "__main__":
    main()
