"""What quantization costs trained models, scheme by scheme, at equal bytes.

    python benchmarks/quantization.py benchmarks/quantization_cases.json \\
        --model logs/A/final_model.pt A.env --model logs/B/final_model.pt B.env \\
        --rates 3.3 --val-tokens 262144 --out results.json

A model comes with the CONFIG file that trained it. CASES.json maps a name to the QUANT_* settings
of a scheme; "CALIBRATED": "0" leaves the calibration out, so that GPTQ rounds to the nearest. Each
case is packed with FIT_BUDGET=step, so that the matrices take `--rates` bits a weight with all that
is stored for them; read again from the file; and scored on held-out text. The table gives the loss
increase over the weights before, in nats a token, its ratio to the first case, and what the
calibration predicts. Imports train_gpt.py and quantizer.py.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import quantizer
import train_gpt as tg

State = dict[str, Tensor]


class Subject:
    """A trained model with what is needed to pack it, to read it again, and to score it."""

    def __init__(self, weights: Path, config: Path, args: argparse.Namespace) -> None:
        settings = {"CONFIG": str(config), "QUANT_METHOD": "gptq", "FIT_BUDGET": "step"}
        settings |= {"VAL_TOKENS": str(args.val_tokens), "DEVICE": "cpu", "DTYPE": "fp32"}
        settings |= {"CALIBRATION_TOKENS": str(args.calibration_tokens), "SAVE_EVERY": "0"}
        self.hp = replace(tg.load_settings(settings, check_places=False), max_wallclock_seconds=0.0)
        self.run = tg.Run(self.hp)
        self.val = tg.Validation(self.run)
        self.run.hp = self.hp = replace(self.hp, bos=self.val.bos)
        self.state: State = torch.load(weights, weights_only=True, map_location="cpu")
        self.model = tg.build_model(self.hp, self.run.dtype)
        sizes = quantizer.sizes_of(self.state, self.hp)
        self.matrices = {n: self.state[n] for n in sizes}
        self.count = sum(sizes.values())
        plain = {n: w for n, w in self.state.items() if n not in sizes}
        self.plain_bytes = len(tg.pack_artifact(plain, self.hp))
        self.loss = self.score(self.state)
        stream = tg.part("TokenStream", self.hp)("train", self.run)
        done = args.calibration_step * self.hp.train_batch_tokens
        trainer = SimpleNamespace(model=self.model, stream=stream, run=self.run, tokens=done)
        self.model.load_state_dict(self.state)
        self.seen = quantizer.calibrate(trainer, args.calibration_step, 0.0)

    def score(self, state: State) -> float:
        """Give the mean NLL of the held-out text by these weights."""
        self.model.load_state_dict(state)
        return tg.score(self.model, self.val, self.run)[1]["val_loss"]

    def measure(self, case: dict[str, str], rate: float) -> dict[str, float]:
        """Pack, read and score the model with a scheme, at a rate."""
        values = {k.lower(): tg.parse_setting(k, v) for k, v in case.items() if k != "CALIBRATED"}
        hp = replace(self.hp, **values)
        room = tg.code_bytes(hp) + self.plain_bytes + round(rate * self.count / 8)
        self.run.hp = replace(hp, artifact_max_bytes=room)
        tries: list[str] = []
        self.run.log = lambda line, *_, **__: tries.append(line)
        seen = self.seen if case.get("CALIBRATED") != "0" else None
        start = time.perf_counter()
        data = quantizer.make_artifact(self.state, seen, self.run)
        middle = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.artifact")
            path.write_bytes(data)
            _, weights = tg.load_artifact(path, self.run.hp)
        end = time.perf_counter()
        return {
            "bits": 8 * (len(data) - self.plain_bytes) / self.count,
            "bytes": len(data),
            "increase": self.score(weights) - self.loss,
            "predicted": self.predict(weights),
            "encode_s": middle - start,
            "decode_s": end - middle,
            "tries": int(tries[0].split("tries:")[1].split()[0]),
        }

    def predict(self, weights: State) -> float:
        """Give the increase by the calibration: ½ Σ_i g_i·(e_i·H·e_iᵀ) over all matrices."""
        total = 0.0
        for name, w in self.matrices.items():
            products, g = self.seen.sensitivity(name)
            error = (weights[name] - w).double()
            total += float((g[:, None] * (error @ products) * error).sum()) / 2
        return total

    def spreads(self) -> dict[str, dict[str, float]]:
        """Describe each matrix: deviations of log2 U_jj and log2 sqrt(g_i), and dead outputs."""
        found = {}
        for name, w in self.matrices.items():
            products, g = self.seen.sensitivity(name)
            u, dead = quantizer.factor(products)
            roots = np.sqrt(g.numpy().clip(quantizer.FLOOR * float(g.mean())))
            found[name] = {
                "weights": w.numel(),
                "u_octaves": float(np.log2(np.diagonal(u)).std()),
                "g_octaves": float(np.log2(roots).std()),
                "dead_outputs": float((g <= quantizer.FLOOR * g.mean()).double().mean()),
                "dead_inputs": float(dead.mean()),
            }
        return found


def table(results: dict[str, Any]) -> str:
    """Write a Markdown table: a line for each rate and case, a pair of columns for each model."""
    models = results["models"]
    head = "".join(
        f" {Path(m['weights']).parent.name}: bits | increase | ratio | predicted |" for m in models
    )
    lines = [f"| rate | case |{head} encode, s | decode, s |", "|" + "---|" * (4 + 4 * len(models))]
    for rate in results["rates"]:
        for name in results["cases"]:
            cells = []
            rows = [m["results"][f"{rate}"] for m in models]
            for row in rows:
                first, one = next(iter(row.values())), row[name]
                ratio = one["increase"] / first["increase"]
                numbers = f" {one['bits']:.3f} | {one['increase']:.5f} | {ratio:.3f} |"
                cells.append(f"{numbers} {one['predicted']:.5f} |")
            times = [
                f" {statistics.mean(row[name][key] for row in rows):.1f} |"
                for key in ("encode_s", "decode_s")
            ]
            lines.append(f"| {rate} | {name} |" + "".join(cells + times))
    return "\n".join(lines)


def spread_table(model: dict[str, Any]) -> str:
    """Write what calibration saw of a model's matrices, by kind, as a Markdown table."""
    kinds: dict[str, list[dict[str, float]]] = {}
    for name, values in model["spreads"].items():
        kinds.setdefault(name.split(".", 2)[-1], []).append(values)
    keys = ("u_octaves", "g_octaves", "dead_outputs", "dead_inputs")
    lines = ["| matrices | log2 U | log2 sqrt g | dead outputs | dead inputs |", "|" + "---|" * 5]
    for kind, values in kinds.items():
        means = (statistics.mean(v[key] for v in values) for key in keys)
        u, g, outputs, inputs = means
        lines.append(f"| {kind} | {u:.2f} | {g:.2f} | {outputs:.1%} | {inputs:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every case of every model, save the results, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("--model", type=Path, nargs=2, action="append", required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[3.3])
    parser.add_argument("--only", nargs="*", help="of the cases")
    parser.add_argument("--val-tokens", type=int, default=262144)
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--calibration-step", type=int, default=0, help="where its tokens begin")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--float", nargs="*", default=[], help="weights that stay fp16")
    args = parser.parse_args()
    bits_of = tg.bits_of
    tg.bits_of = lambda name, w, hp: 0 if name in args.float else bits_of(name, w, hp)
    cases = json.loads(args.cases.read_text())
    cases = {name: case for name, case in cases.items() if not args.only or name in args.only}
    results: dict[str, Any] = {"rates": args.rates, "cases": cases, "models": []}
    for weights, config in args.model:
        subject = Subject(weights, config, args)
        model = {"weights": str(weights), "loss": subject.loss, "matrices": subject.count}
        model |= {"spreads": subject.spreads(), "results": {f"{rate}": {} for rate in args.rates}}
        results["models"].append(model)
        for rate in args.rates:
            for name, case in cases.items():
                model["results"][f"{rate}"][name] = found = subject.measure(case, rate)
                print(weights, rate, name, found, file=sys.stderr, flush=True)
                args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    for model in results["models"]:
        print(f"\n{model['weights']}: loss {model['loss']:.4f}, {model['matrices']:,} weights\n")
        print(spread_table(model))
    print(f"\nmost memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB")


if __name__ == "__main__":
    main()
