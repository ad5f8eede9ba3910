"""Pack, load and score an artifact of the frontier's shape: 36 million weights in 16,000,000 bytes.

    python benchmarks/quantization_frontier.py --tokenizer fineweb_8192_bpe.model --data DATASET

No such model was trained here. Its weights are Gaussian, with rows of unlike deviations, and what
the calibration would see is drawn with the spreads that `--u` and `--g` give, in octaves (those of
trained models are in the results of quantization.py). So sizes, seconds and memory mean something,
the loss does not. Imports train_gpt.py and quantizer.py; scores with train_gpt.py as a program.
"""

import argparse
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import quantizer
import train_gpt as tg

SHAPE = {
    "VOCAB_SIZE": "8192",
    "NUM_LAYERS": "11",
    "MLP_MULT": "4",
    "TRAIN_SEQ_LEN": "2048",
    "QUANT_METHOD": "gptq",
    "FIT_BUDGET": "step",
    "DEVICE": "cpu",
}


class Drawn:
    """Stands for a Calibration: H and g of each weight are drawn."""

    def __init__(self, u: float, g: float) -> None:
        self.u, self.g = u, g

    def sensitivity(self, name: str) -> tuple[Tensor, Tensor]:
        """Draw H with correlated inputs, and g."""
        rows, cols = SIZES[name]
        random = torch.Generator().manual_seed(len(name) + rows + cols)
        scale = torch.exp2(-self.u * torch.randn(cols, generator=random, dtype=torch.float64))
        mixed = torch.randn(cols, 64, generator=random, dtype=torch.float64) / 8
        h = (torch.eye(cols, dtype=torch.float64) + mixed @ mixed.mT) * torch.outer(scale, scale)
        g = torch.exp2(2 * self.g * torch.randn(rows, generator=random, dtype=torch.float64))
        return h, g


SIZES: dict[str, tuple[int, int]] = {}


def main() -> None:
    """Print sizes, seconds, memory, and the line of the score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--val-tokens", default="8192")
    parser.add_argument("--u", type=float, default=0.8)
    parser.add_argument("--g", type=float, default=1.0)
    args = parser.parse_args()
    settings = SHAPE | {"TOKENIZER_PATH": args.tokenizer, "DATA_PATH": args.data}
    hp = tg.load_settings(settings, check_places=False)
    run = tg.Run(hp)
    torch.manual_seed(0)
    state = tg.build_model(hp).state_dict()
    for name, w in state.items():
        if w.ndim == 2:
            SIZES[name] = tuple(w.shape)
            state[name] = torch.randn(w.shape) * torch.exp2(0.3 * torch.randn(len(w), 1)) / 16
    start = time.perf_counter()
    data = quantizer.make_artifact(state, Drawn(args.u, args.g), run)
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    weights = sum(quantizer.sizes_of(state, hp).values())
    total = tg.code_bytes(hp) + len(data)
    print(f"{weights:,} weights: {total:,} bytes, {8 * len(data) / weights:.3f} bits a weight")
    print(f"encoding: {seconds:.1f} s on {torch.get_num_threads()} cores, {memory} MiB")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.artifact")
        path.write_bytes(data)
        torch.set_num_threads(1)
        start = time.perf_counter()
        _, weights = tg.load_artifact(path, hp)
        print(f"decoding: {time.perf_counter() - start:.1f} s on one core")
        again = [torch.equal(weights[n], w) for n, w in tg.load_artifact(path, hp)[1].items()]
        assert all(again)
        assert math.isfinite(sum(float(w.sum()) for w in weights.values()))
        env = {
            "PATH": os.environ["PATH"],
            "EVAL_ONLY": "1",
            "ARTIFACT": str(path),
            "OUT_DIR": folder,
        }
        env |= {"TOKENIZER_PATH": args.tokenizer, "DATA_PATH": args.data, "DEVICE": "cpu"}
        env |= {"VAL_TOKENS": args.val_tokens, "VAL_BATCH_SIZE": "8192"}
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, tg.__file__], env=env, capture_output=True, text=True
        )
    lines = re.findall(r"^(?:final_|Total).*$", done.stdout, re.M)
    print("\n".join(lines) or done.stderr)
    print(f"loaded and scored by the program: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
