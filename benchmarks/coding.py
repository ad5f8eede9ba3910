"""Bits a weight and seconds of the coders of train_gpt.py, beside the empirical entropy.

    python benchmarks/coding.py logs/RUN/final_model.pt --settings QUANT_BITS_MLP=5 --copies 3

Quantizes the raw weights of a trained model as the settings say and codes the levels with each
COMPRESSOR, and with higher levels of zstd for comparison. The entropy is that of each matrix's own
level counts (order 0). With --copies the matrices are coded several times over, their
elements shuffled, to get the seconds of a larger model. This benchmark imports train_gpt.py: what
it measures is inside.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

COMPRESSORS = ("zstd", "rans")


def entropy_bits(levels: np.ndarray) -> float:
    """Give the order-0 entropy of one array times its size, bits."""
    counts = np.unique(levels, return_counts=True)[1]
    return float(-(counts * np.log2(counts / levels.size)).sum())


def quantized(path: Path, hp: tg.Hyperparameters, copies: int) -> list[np.ndarray]:
    """Quantize all matrices that are stored as int8; copies after the first are shuffled."""
    state, rng = torch.load(path, weights_only=True, map_location="cpu"), np.random.default_rng(0)
    arrays = [tg.stored_arrays(name, w, hp, 0.0) for name, w in state.items()]
    levels = [stored[1] for stored in arrays if len(stored) == 2]
    more = [rng.permuted(a) for _ in range(copies - 1) for a in levels]
    return levels + more


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="final_model.pt of a run")
    parser.add_argument("--settings", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--copies", type=int, default=1)
    args = parser.parse_args()
    texts = dict(item.split("=", 1) for item in args.settings)
    hp = tg.load_settings(texts | {"DEVICE": "cpu"}, check_places=False)
    levels = quantized(args.model, hp, args.copies)
    if not levels:
        sys.exit(f"{args.model}: no matrix over {tg.KEEP_FLOAT_NUMEL} elements")
    sizes, raw = [a.size for a in levels], b"".join(a.tobytes() for a in levels)
    bound = sum(map(entropy_bits, levels)) / len(raw)
    coders: dict[str, tuple[Callable[[], bytes], Callable[[bytes], np.ndarray | bytes]]] = {
        name: (
            lambda name=name: tg.compress(name, levels),
            lambda data, name=name: tg.decompress(name, data, sizes),
        )
        for name in COMPRESSORS
    }
    for level in (3, 9, 19, 22):
        coders[f"zstd, level {level}"] = (
            lambda level=level: zstandard.compress(raw, level),
            zstandard.decompress,
        )
    print(f"{len(raw):,} weights, {' '.join(args.settings) or 'defaults'}; entropy {bound:.4f}\n")
    print("| coder | bits a weight | over the entropy | encode, s | decode, s |")
    print("|---|---|---|---|---|")
    for name, (encode, decode) in coders.items():
        start = time.perf_counter()
        data = encode()
        middle = time.perf_counter()
        back = bytes(decode(data))
        end = time.perf_counter()
        assert back == raw, name
        bits = 8 * len(data) / len(raw)
        over = f"{bits / bound - 1:+.2%}"
        print(f"| {name} | {bits:.4f} | {over} | {middle - start:.2f} | {end - middle:.2f} |")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
