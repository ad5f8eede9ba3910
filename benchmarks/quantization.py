"""What quantization costs: one trained model exported in several ways, each scored by EVAL_ONLY.

    python benchmarks/quantization.py CASES.json logs/A/final_model.pt logs/B/final_model.pt \\
        --config run.env --out results.json

CASES.json maps a name to the QUANT_* settings, COMPRESSOR and so on that it adds to those of the
CONFIG file that trained the models. The table compares with the first case on the same model: mean
and sample deviation over the models. Imports train_gpt.py to pack; scores it as a program.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

SCORE = re.compile(r"^final_\S+_exact .*val_bpb:([0-9.]+)", re.M)


def export(model: Path, config: Path, settings: dict[str, str]) -> dict[str, float]:
    """Pack the weights of `model` under these settings; bytes of the artifact and its score."""
    hp = tg.load_settings(settings | {"CONFIG": str(config), "DEVICE": "cpu"}, check_places=False)
    data = tg.pack_artifact(torch.load(model, weights_only=True, map_location="cpu"), hp)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder, "a.artifact")
        artifact.write_bytes(data)
        env = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
        env |= {"CONFIG": str(config), "EVAL_ONLY": "1", "ARTIFACT": str(artifact)}
        command = [sys.executable, tg.__file__]
        out = subprocess.run(command, env=env | {"OUT_DIR": folder}, capture_output=True, text=True)
    if not (score := SCORE.search(out.stdout)):
        sys.exit(f"{model}, {settings}: no score\n{out.stderr[-1000:]}")
    return {"val_bpb": float(score[1]), "artifact_bytes": len(data)}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Write a Markdown table of results by case, one entry a model."""
    base = next(iter(results.values()))
    lines = ["| case | artifact bytes | val_bpb | cost, mean ± sd |", "|---|---|---|---|"]
    for name, runs in results.items():
        size, score = (
            statistics.mean(r[key] for r in runs) for key in ("artifact_bytes", "val_bpb")
        )
        costs = [run["val_bpb"] - first["val_bpb"] for run, first in zip(runs, base, strict=True)]
        spread = f" ± {statistics.stdev(costs):.4f}" if len(costs) > 1 else ""
        cost = "" if runs is base else f"{statistics.mean(costs):+.4f}{spread}"
        lines.append(f"| {name} | {size:,.0f} | {score:.4f} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    """Export and score every case of every model, save the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {}
    for name, settings in json.loads(args.cases.read_text()).items():
        results[name] = [export(model, args.config, settings) for model in args.models]
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
