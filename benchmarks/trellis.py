"""How far quantized Gaussian weights are from the bound of rate and distortion, with all charged.

    python benchmarks/trellis.py [--shape 2048 512]

Weights of one deviation are quantized without a calibration, by the trellis of 8 states and by
single levels, with and without a price of bits, at several deviations over step. The gap, in dB,
is that of the mean squared error D to D(R) = σ²·2^(-2R), where R are the bits a weight that rANS
takes. Imports train_gpt.py and quantizer.py.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import quantizer
import train_gpt as tg

SCHEMES = {  # states, price of a bit
    "8 states": (8, 0.37),
    "8 states, no price": (8, 0.0),
    "single levels": (1, 0.37),
    "single levels, no price": (1, 0.0),
}


def gap(work: quantizer.Work, deviation: float, hp: tg.Hyperparameters) -> tuple[float, float]:
    """Give the bits a weight, and the distance from the bound in dB."""
    (arrays,) = quantizer.encode([work], 1 / deviation, hp).values()
    shapes = [[*work.weights.shape]]
    data = quantizer.compress([arrays], hp)
    (found,) = quantizer.decompress(data, [arrays[:5]], shapes, hp)
    error = float(np.square(found - work.weights, dtype=np.float64).mean())
    bits = 8 * len(data) / work.weights.size
    return bits, 10 * math.log10(error * 4**bits)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(2048, 512))
    parser.add_argument("--deviations", type=float, nargs="+", default=[0.7, 1, 1.5, 2.5, 4, 8, 16])
    args = parser.parse_args()
    settings = {"QUANT_METHOD": "gptq", "DEVICE": "cpu"}
    hp = tg.load_settings(settings, check_places=False)
    weights = np.random.default_rng(0).normal(size=args.shape)
    work = quantizer.prepare("weights", torch.from_numpy(weights).float(), None, hp)
    print("| deviation over step |" + "".join(f" {name}: bits, dB |" for name in SCHEMES))
    print("|" + "---|" * (1 + len(SCHEMES)))
    for deviation in args.deviations:
        cells = []
        for states, price in SCHEMES.values():
            scheme = replace(hp, quant_trellis=states, quant_lambda=price)
            bits, distance = gap(work, deviation, scheme)
            cells.append(f" {bits:.2f}, {distance:.2f} |")
        print(f"| {deviation:g} |" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
