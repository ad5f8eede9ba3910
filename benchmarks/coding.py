"""Bits a weight and seconds of the coders of train_gpt.py, beside the empirical entropy.

    python benchmarks/coding.py logs/RUN/final_model.pt --settings QUANT_BITS_MLP=5 --copies 3

Quantizes the raw weights of a trained model as the settings say and codes the levels with each
COMPRESSOR, and with higher levels of zstd for comparison. The entropy is that of each matrix's own
level counts (order 0). With --copies the matrices are coded several times over, their
elements shuffled, to get the seconds of a larger model. Decoding makes fp32 matrices, as loading
an artifact does. This benchmark imports train_gpt.py: what it measures is inside, or beside it.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

COMPRESSORS = ("zstd", "rans")
Coder = tuple[Callable[[], bytes], Callable[[bytes], list[np.ndarray]]]


def entropy_bits(levels: np.ndarray) -> float:
    """Give the order-0 entropy of one array times its size, bits."""
    counts = np.unique(levels, return_counts=True)[1]
    return float(-(counts * np.log2(counts / levels.size)).sum())


def quantized(path: Path, hp: tg.Hyperparameters, copies: int) -> list[np.ndarray]:
    """Quantize all matrices that are stored as int8; copies after the first are shuffled."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    rng = np.random.default_rng(0)
    levels = [tg.stored_arrays(name, w, hp)[-1] for name, w in state.items()]
    levels = [a for a in levels if a.dtype == np.int8]
    more = [rng.permuted(a) for _ in range(copies - 1) for a in levels]
    return levels + more


def coder(levels: list[np.ndarray], hp: tg.Hyperparameters) -> Coder:
    """Give what codes these matrices by a COMPRESSOR, and what decodes them."""
    scales = [np.ones((len(a), 1), "<f2") for a in levels]
    shapes = [a.shape for a in levels]

    def encode() -> bytes:
        return tg.compress([[*pair] for pair in zip(scales, levels, strict=True)], hp)

    def decode(data: bytes) -> list[np.ndarray]:
        return tg.decompress(data, [[scale] for scale in scales], shapes, hp)

    return encode, decode


def zstd_coder(levels: list[np.ndarray], level: int) -> Coder:
    """Give what compresses and decompresses these matrices by a level of zstd."""
    raw = b"".join(a.tobytes() for a in levels)

    def decode(data: bytes) -> list[np.ndarray]:
        whole = np.frombuffer(zstandard.decompress(data), np.int8)
        parts = np.split(whole, np.cumsum([a.size for a in levels])[:-1])
        return [part.reshape(a.shape) for part, a in zip(parts, levels, strict=True)]

    return partial(zstandard.compress, raw, level), decode


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="final_model.pt of a run")
    parser.add_argument("--settings", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--copies", type=int, default=1)
    args = parser.parse_args()
    texts = dict(item.split("=", 1) for item in args.settings)
    hp = tg.load_settings(texts | {"DEVICE": "cpu"}, check_places=False)
    if hp.quant_method != "round":
        sys.exit(f"QUANT_METHOD={hp.quant_method}: has one coder alone; see quantization.py")
    levels = quantized(args.model, hp, args.copies)
    if not levels:
        sys.exit(f"{args.model}: no matrix over {tg.KEEP_FLOAT_NUMEL['round']} elements")
    count = sum(a.size for a in levels)
    bound = sum(map(entropy_bits, levels)) / count
    coders = {name: coder(levels, replace(hp, compressor=name)) for name in COMPRESSORS}
    for level in (3, 9, 19, 22):
        coders[f"zstd, level {level}"] = zstd_coder(levels, level)
    print(f"{count:,} weights, {' '.join(args.settings) or 'defaults'}; entropy {bound:.4f}\n")
    print("| coder | bits a weight | over the entropy | encode, s | decode, s |")
    print("|---|---|---|---|---|")
    for name, (encode, decode) in coders.items():
        start = time.perf_counter()
        data = encode()
        middle = time.perf_counter()
        back = decode(data)
        end = time.perf_counter()
        assert all(map(np.array_equal, back, levels)), name
        bits = 8 * len(data) / count
        over = f"{bits / bound - 1:+.2%}"
        print(f"| {name} | {bits:.4f} | {over} | {middle - start:.2f} | {end - middle:.2f} |")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
