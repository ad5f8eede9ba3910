"""What benchmarks measure inside a process: model FLOPs, matmul speed, parts of a step, scoring.

    SETTING=... python benchmarks/measure.py ceiling | breakdown | evaluation OUT.json

Settings come from the environment. run.py starts these; alone or under torchrun they work too.
Of train_gpt.py they use what `main` uses, Trainer's step, feed, learn and optimizers, and score.
"""

import contextlib
import copy
import dataclasses
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "broadcast",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
PARTS = ("data", "forward", "backward", "optimizer", "communication", "other")  # of a step


def number(value: float | None) -> str:
    """Show four decimals of small numbers, none of large ones, n/a for what is not known."""
    if value is None:
        return "n/a"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if value >= 10 else f"{value:.4f}"


def visits(hp: tg.Hyperparameters) -> list[int]:
    """List the layers that a token goes through, each as often as it does."""
    layers = [*range(hp.num_layers)]
    repeats = getattr(hp, "loop_repeats", 0)  # scripts of earlier commits have no loops
    again = layers[hp.loop_first : hp.loop_last + 1] * repeats if repeats else []
    return layers + again


def mean_keys(hp: tg.Hyperparameters, layer: int) -> float:
    """Give the keys that a token attends to, on the mean: (T + 1)/2, or fewer with a window."""
    T = hp.train_seq_len
    pattern = getattr(hp, "window_pattern", "") or "L"
    is_short = pattern[layer % len(pattern)] == "S" and layer < hp.num_layers - 1
    window = min(T, hp.window_tokens) if is_short else T
    return sum(min(t + 1, window) for t in range(T)) / T


def attention_flops_per_token(hp: tg.Hyperparameters) -> float:
    """Count attention's FLOPs in a forward pass on one token: 4·D·keys, in each visit."""
    return sum(4 * hp.model_dim * mean_keys(hp, layer) for layer in visits(hp))


def flops_per_token(hp: tg.Hyperparameters, forward_only: bool = False) -> float:
    """Count the model FLOPs of training on one token: 3·(2·W + 4·D·keys), a third forward.

    W are the weights a token is multiplied with: in each visit of a layer D² for q, D² for the
    output, 2·D·Dkv for k and v, 2·D·H for the MLP, and the heads' gates; V·D for the head;
    BigramHash's expanding matrix; the matrices that weigh earlier states. Attention is causal:
    position t has t keys, or a window of them, and a key costs 2·D for its score and 2·D for its
    value. Backward has two products for each one forward. Elementwise work, table lookups, the
    optimizer and whatever is computed again are not counted.
    """
    dim = hp.model_dim
    kv_dim = dim // hp.num_heads * hp.num_kv_heads
    count = len(visits(hp))
    layer = 2 * dim * dim + 2 * dim * kv_dim + 2 * dim * int(hp.mlp_mult * dim)
    layer += getattr(hp, "sparse_attn_gate", 0) * hp.num_heads
    bigram = hp.bigram_dim * dim if hp.bigram_buckets else 0
    mixed = range(2, count, 2) if getattr(hp, "skips", "") == "mudd" else []
    mixers = sum(64 * (dim + states) for states in mixed)
    weights = count * layer + hp.vocab_size * dim + bigram + mixers
    forward = 2 * weights + attention_flops_per_token(hp)
    return forward if forward_only else 3 * forward


def synchronize(run: tg.Run) -> None:
    """Wait until the device has done all that was asked of it."""
    if run.device.type != "cpu":
        getattr(torch, run.device.type).synchronize()


def seconds_each(
    call: Callable[[], Any], wait: Callable[[], None], least: float = 0.1, bursts: int = 3
) -> float:
    """Time a call, s: the best of so many bursts of at least `least` seconds.

    `wait` returns when the device has done its work.
    """
    count = 1
    times: list[float] = []
    call()
    while len(times) < bursts:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        seconds = time.perf_counter() - start
        if seconds < least:
            count *= 2
        else:
            times.append(seconds / count)
    return min(times)


def matmul_tflops(run: tg.Run, rows: int, inner: int, cols: int) -> float:
    """Measure x·Wᵀ in the run's dtype: the best TFLOP/s of five bursts of at least 0.1 s."""
    x, w = (torch.randn(n, inner, device=run.device, dtype=run.dtype) for n in (rows, cols))
    seconds = seconds_each(lambda: x @ w.T, lambda: synchronize(run), bursts=5)
    return 2e-12 * rows * inner * cols / seconds


def ceiling(hp: tg.Hyperparameters) -> dict[str, Any]:
    """Find the fastest matrix product of several shapes, on the run's device, in its dtype."""
    run = tg.Run(hp)
    dim = hp.model_dim
    on_gpu = run.device.type == "cuda"
    rows = 65536 if on_gpu else 4096
    side = 8192 if on_gpu else 2048
    shapes = [(rows, dim, 4 * dim), (rows, 4 * dim, dim), (side, side, side)]
    speeds = {"x".join(map(str, shape)): matmul_tflops(run, *shape) for shape in shapes}
    shape = max(speeds, key=speeds.get)
    about = {"device": run.device.type, "dtype": str(run.dtype), "threads": torch.get_num_threads()}
    return {"tflops": speeds[shape], "shape": shape, "shapes": speeds, **about}


class Stopwatch:
    """Seconds by part; a part inside another one counts as itself alone."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.seconds: dict[str, float] = Counter()
        self.calls: dict[str, int] = Counter()
        self.open: list[str] = []
        self.last = 0.0

    def mark(self) -> None:
        """Give the time since the last mark to the part that is open."""
        self.wait()
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.last
        self.last = now

    def timed(self, part: str, function: Callable) -> Callable:
        """Wrap a function, so that its time counts as that of `part`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.mark()
            self.open.append(part)
            self.calls[part] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.mark()
                self.open.pop()

        return wrapped

    def feed(self, feed: Any) -> Any:
        """Iterate over `feed`, the wait for which counts as data."""
        following = self.timed("data", feed.__next__)
        return iter(lambda: following(), object())


def prepare(hp: tg.Hyperparameters, training: bool) -> tuple[tg.Run, Any, Any, Any]:
    """Set up as train_gpt.main does: run, validation, forward pass, and a primed trainer."""
    run = tg.Run(hp)
    stream = tg.part("TokenStream", hp)("train", run) if training else None
    val = tg.Validation(run)
    run.hp = dataclasses.replace(hp, bos=val.bos)
    run.start()
    model = tg.build_model(run.hp, run.dtype).to(run.device)
    forward = run.keeper.compiled(model) if run.compile else model
    trainer = tg.part("Trainer", hp)(model, forward, stream, run) if training else None
    if trainer:
        trainer.prime()
    return run, val, forward, trainer


def free_running(trainer: tg.Trainer, run: tg.Run, steps: int) -> tuple[float, float]:
    """Time so many steps left to themselves, and the host's wait for data in them, s."""
    watch = Stopwatch(lambda: None)
    with mock.patch.object(trainer, "feed", watch.feed(trainer.feed)):
        synchronize(run)
        start = time.perf_counter()
        for step in range(steps):
            trainer.step(step, 0.0)
        synchronize(run)
    return time.perf_counter() - start, watch.seconds["data"]


def breakdown(hp: tg.Hyperparameters) -> dict[str, Any]:
    """Time each part of ITERATIONS steps, as many steps without any waiting, and an evaluation."""
    run, val, forward, trainer = prepare(hp, training=True)
    trainer.step(0, 0.0)
    alone, stall = free_running(trainer, run, hp.iterations)
    steps = step_parts(trainer, run, hp.iterations)
    return {
        "steps": steps,
        "free_step_s": alone / hp.iterations,
        "free_data_share": stall / alone,
        "evaluation_s": passes(forward, val, run),
        "evaluation_tokens": len(val.tokens) - 1,
    }


def step_parts(trainer: tg.Trainer, run: tg.Run, count: int) -> list[dict[str, float]]:
    """Time each part of so many steps, s, waiting for the device before and after each part."""
    watch = Stopwatch(lambda: synchronize(run))
    steps = []
    parts = [(dist, name, "communication") for name in COLLECTIVES]
    parts += [(trainer, "learn", "forward"), (torch.Tensor, "backward", "backward")]
    parts += [(optimizer, "step", "optimizer") for optimizer in trainer.optimizers]
    with contextlib.ExitStack() as patches:
        for owner, name, part in parts:
            new = watch.timed(part, getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, new))
        patches.enter_context(mock.patch.object(trainer, "feed", watch.feed(trainer.feed)))
        step = watch.timed("other", trainer.step)
        for number in range(count):
            before = watch.seconds.copy()
            step(number, 0.0)
            steps.append({part: s - before[part] for part, s in watch.seconds.items()})
    unseen = {"data", "forward", "backward", "optimizer"} - set(watch.calls)
    if unseen:
        what = f"Trainer.step no longer calls what is timed as {unseen}"
        raise tg.UserError(f"{what}: see step_parts")
    return steps


def mean_parts(steps: list[dict[str, float]]) -> dict[str, float]:
    """Give the mean of each part of the steps that step_parts has timed, ms."""
    return {part: 1e3 * statistics.mean(step.get(part, 0.0) for step in steps) for part in PARTS}


def passes(forward: Any, val: Any, run: tg.Run) -> float:
    """Time the second of two passes over the validation tokens, s: the first may compile."""
    for _ in range(2):
        synchronize(run)
        start = time.perf_counter()
        tg.score(forward, val, run)
        seconds = time.perf_counter() - start
    return seconds


def first_tokens(val: Any, count: int) -> Any:
    """Make a validation over the first tokens of another, as one stream."""
    part = copy.copy(val)
    part.tokens = val.tokens[:count]
    part.starts = np.array([0, len(part.tokens)])
    return part


def evaluation(
    hp: tg.Hyperparameters, tell: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Measure the tokens that each way of scoring scores a second.

    They are a plain pass over the validation tokens, windows of EVAL_STRIDE (default 64), the same
    with each document by itself, and, over 256 windows, a plain loop that reads a window at a time.
    `tell` gets what is known after each of them.
    """
    # The model's table of positions is as long as packed documents need.
    packing = dataclasses.replace(hp, eval_doc_isolated=1)
    run, val, forward, _ = prepare(packing, training=False)
    hp = run.hp
    stride = hp.eval_stride or 64
    context = hp.eval_seq_len or hp.train_seq_len
    cases = {"plain": (0, 0), "sliding": (stride, 0), "documents": (stride, 1), "loop": (stride, 0)}
    rates: dict[str, float] = {}
    found = {"tokens_per_s": rates, "stride": stride, "context": context}
    for name, (step, isolated) in cases.items():
        if name == "loop":
            run.forward_rows = 1
            val = first_tokens(val, context + 255 * stride + 1)
        run.hp = dataclasses.replace(hp, eval_stride=step, eval_doc_isolated=isolated)
        rates[name] = (len(val.tokens) - 1) / passes(forward, val, run)
        tell(found)
    return found


def main(arguments: list[str]) -> None:
    """Measure, and write the result of rank 0."""
    kinds = {f.__name__: f for f in (ceiling, breakdown, evaluation)}
    if len(arguments) != 2 or arguments[0] not in kinds:
        raise tg.UserError(__doc__)
    kind, out = arguments
    hp = tg.load_settings(os.environ, check_places=kind != "ceiling")
    result = kinds[kind](hp)
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(result), encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()
        os._exit(0)  # as train_gpt.py does: gloo's threads now and then abort a regular exit


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (tg.UserError, OSError) as problem:
        sys.exit(f"measure.py: error: {problem}")
