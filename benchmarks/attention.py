"""Attention for CPUs with AMX beside PyTorch's: milliseconds, in turn, and distance from float64.

    python benchmarks/attention.py [--shape B H G T D] [--rounds 3]

H heads of queries and G of keys, bf16. Medians of ten calls in each round; the distances are shares
of the norm, of the output and of the gradients of q, k and v.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import amx_attention


def milliseconds(work: Callable[[], object]) -> float:
    """Time a call, ms: the median of ten, after one that does not count."""
    work()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def attend(leaves: list[Tensor], gradient: Tensor) -> tuple[Callable, Callable]:
    """Give functions that compute causal attention to k and v, and its gradients."""
    options = {"is_causal": True, "enable_gqa": True}
    out = F.scaled_dot_product_attention(*leaves, **options)

    def forward() -> Tensor:
        with torch.no_grad():
            return F.scaled_dot_product_attention(*leaves, **options)

    return forward, lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)


def main() -> None:
    """Measure both, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", type=int, nargs=5, default=[4, 8, 4, 1024, 64])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    B, H, G, T, D = args.shape
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(B, T, n, D).bfloat16().transpose(1, 2) for n in (H, G, G, H))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    exact = attend([x.detach().double().requires_grad_() for x in leaves], g.double())
    truth = [exact[0](), *exact[1]()]
    found = {"PyTorch": [], "AMX": []}
    print(f"{args.shape}, {torch.get_num_threads()} threads\n")
    print("| | forward, ms | backward, ms | distance from float64 |\n|---|---|---|---|")
    for kernel in [*found] * args.rounds:
        amx_attention.register.cache_clear()
        if kernel == "AMX":
            amx_attention.activate(D)
        forward, backward = attend(leaves, g)
        found[kernel].append([milliseconds(forward), milliseconds(backward)])
        pairs = zip([forward(), *backward()], truth, strict=True)
        far = [f"{((x.double() - y).norm() / y.norm()).item():.2%}" for x, y in pairs]
        ms = " | ".join(f"{one:.1f}" for one in found[kernel][-1])
        print(f"| {kernel} | {ms} | {', '.join(far)} |", flush=True)
    theirs, ours = (torch.tensor(found[n]).median(0).values for n in found)
    print(f"| PyTorch / AMX | {' | '.join(f'{r:.2f}' for r in (theirs / ours).tolist())} | |")


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, OSError) as problem:
        sys.exit(f"attention.py: error: {problem}")
