"""A validation split with documents as long as FineWeb's, and what that means for packed rows.

    python benchmarks/document_lengths.py DATASET OUT [--mean 811] [--sigma 1.0] [--documents 2000]

DATASET's validation tokens are cut anew, into documents of random lengths: log-normal, with the
published mean for 8192 pieces (811 tokens). How widely FineWeb's lengths spread is not published;
--sigma is the deviation of their logarithm. OUT gets validation shard and training shards, by link.
Printed are, for rows of several sequences, the context that a token has within its piece, beside
the one that it would have if no row ended, and how full the rows of scoring are; then what scoring
documents apart with EVAL_STRIDE=64 costs, in multiply-adds of models with 8192 pieces, beside a
plain pass: if windows that overlap were computed whole, and as they are.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as tg

BOS = 1
FINEWEB = 811.0  # tokens of a document, on the average, of 8192 pieces


def draw_lengths(count: int, mean: float = FINEWEB, sigma: float = 1.0) -> np.ndarray:
    """Draw the lengths of documents, BOS included, int64 (count,)."""
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.maximum(2, drawn.round().astype(np.int64))


def cut_anew(source: Path, split: str, lengths: np.ndarray) -> np.ndarray:
    """Fill documents of these lengths with the tokens of a dataset's split, uint16."""
    paths = sorted(source.glob(f"fineweb_{split}_[0-9]*.bin"))
    text = np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in paths])
    text = np.resize(text[text != BOS], lengths.sum())
    text[lengths.cumsum() - lengths] = BOS
    return text


def write_shard(out: Path, split: str, tokens: np.ndarray) -> None:
    """Write a split of one shard."""
    out.mkdir(parents=True, exist_ok=True)
    header = np.zeros(256, "<i4")
    header[:3] = (20240520, 1, len(tokens))
    data = header.tobytes() + tokens.astype("<u2").tobytes()
    (out / f"fineweb_{split}_000000.bin").write_bytes(data)


def write_dataset(source: Path, out: Path, tokens: np.ndarray) -> None:
    """Write the validation shard, and link the training shards."""
    write_shard(out, "val", tokens)
    for path in source.resolve().glob("fineweb_train_*.bin"):
        link = out / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path)


def mean_context(begins: np.ndarray, longest: int, row: int) -> float:
    """Give the mean number of tokens before a token in its piece, in rows of `row` tokens."""
    part = begins[: len(begins) // row * row].reshape(-1, row).copy()
    offsets = tg.cut(part, longest, torch.device("cpu")).offsets.numpy()
    sizes = np.diff(offsets).astype(float)
    return float((sizes * (sizes - 1) / 2).sum() / sizes.sum())


MODELS = {  # layers, width, heads, key and value heads, MLP
    "9 layers of 512": (9, 512, 8, 4, 2),
    "11 layers of 512, MLP 4x": (11, 512, 8, 4, 4),
    "4 layers of 256": (4, 256, 4, 2, 2),
}


def passes(lengths: np.ndarray, model: tuple[int, ...], T: int, stride: int) -> tuple[float, float]:
    """Count the cost of windows of T tokens in plain passes: all whole; last tokens alone."""
    L, D, H, K, mlp = model
    qkv = D * D + 2 * D * D * K // H
    rest = D * D + 2 * mlp * D * D  # of a layer: what only the targets need of the last one
    head = D * 8192
    layer = qkv + rest
    total = float(lengths.sum())
    plain = total * (L * layer + head + L * T * D)
    whole = np.minimum(lengths, T).astype(float)
    first = (whole * (L * layer + head) + L * D * whole**2).sum()
    overlapping = float(np.ceil(np.maximum(lengths - T, 0) / stride).sum())
    full = T * (L * layer + head) + L * D * T**2
    lean = T * ((L - 1) * layer + qkv) + (L - 1) * D * T**2 + stride * (rest + head + 2 * T * D)
    return (first + overlapping * full) / plain, (first + overlapping * lean) / plain


def main() -> None:
    """Make the dataset, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mean", type=float, default=FINEWEB)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--documents", type=int, default=2000)
    args = parser.parse_args()
    lengths = draw_lengths(args.documents, args.mean, args.sigma)
    tokens = cut_anew(args.dataset, "val", lengths)
    write_dataset(args.dataset, args.out, tokens)
    middle = int(np.median(lengths))
    print(
        f"{len(lengths)} documents, {len(tokens)} tokens, median {middle}, longest {lengths.max()}"
    )
    begins = tokens == BOS
    print("| sequence | " + " | ".join(f"rows of {n}" for n in (1, 2, 4, 8, 16)) + " | rows full |")
    print("|---" * 7 + "|")
    for longest in (1024, 2048):
        whole = mean_context(begins, longest, len(begins))
        kept = [mean_context(begins, longest, longest * n) / whole for n in (1, 2, 4, 8, 16)]
        edges = [*(lengths.cumsum() - lengths), len(tokens)]
        spans = [[a, min(b, a + longest), a] for a, b in itertools.pairwise(edges)]
        rows = tg.fill_rows(np.array(spans), 8 * longest)
        filled = sum(b - a for a, b, _ in spans) / (8 * longest * len(rows))
        print(f"| {longest} | " + " | ".join(f"{k:.1%}" for k in kept) + f" | {filled:.1%} |")

    print("\n| model | context | whole windows | as they are |\n|---|---|---|---|")
    for name, model in MODELS.items():
        for T in (1024, 2048):
            before, after = passes(lengths, model, T, 64)
            print(f"| {name} | {T} | {before:.2f} plain passes | {after:.2f} |")


if __name__ == "__main__":
    main()
