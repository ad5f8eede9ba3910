"""The curves that report.py draws of a run's events, and the percentiles of its step times.

Numbers that are not finite become None: gaps on the page.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from metrics import Event, History, number

Column = list[float | None]
Table = dict[str, Column]
BUCKETS = 600  # stretches of a long curve; of each, the extremes are drawn
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def clean(values: Iterable[float]) -> Column:
    """Round numbers to what a chart can show; None for those that are not finite."""
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]


def running_mean(values: Sequence[float]) -> list[float]:
    """Give the mean of the k values before and after each, k = 1/40 of all; nan where one is nan.

    At the start, where the loss falls steeply, there are no more values before than after.
    """
    reach = math.ceil(len(values) / 40)
    sums = [0.0]
    counts = [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    means = []
    for i, value in enumerate(values):
        k = min(i, reach)
        low = i - k
        high = min(i + k + 1, len(values))
        finite = math.isfinite(value)
        means.append(
            (sums[high] - sums[low]) / (counts[high] - counts[low]) if finite else math.nan
        )
    return means


def tokens_of(event: Event, settings: dict[str, Any]) -> float:
    """Count the tokens of training before an event; nan if that is not known."""
    seconds = number(event, "train_time_ms") / 1e3
    tokens = number(event, "tokens_per_second") * seconds
    if math.isfinite(tokens) and tokens > 0:
        return tokens
    batch = number(settings, "train_batch_tokens")
    return number(event, "step") * batch


def step_times(train: Sequence[Event]) -> list[float]:
    """Give the mean milliseconds of the steps since the event before, for each of `train`."""
    times = []
    last_step = 0.0
    last_time = 0.0
    for event in train:
        step = number(event, "step")
        time = number(event, "train_time_ms")
        passed = step - last_step
        times.append((time - last_time) / passed if passed > 0 and time >= last_time else math.nan)
        last_step = step
        last_time = time
    return times


def percentile(times: Sequence[float], steps: Sequence[float], share: float) -> float:
    """Find the least time that `share` of the steps do not exceed; nan if there are none."""
    pairs = zip(times, steps, strict=True)
    known = sorted(pair for pair in pairs if all(map(math.isfinite, pair)))
    wanted = share * sum(count for _, count in known) * (1 - 1e-12)
    seen = 0.0
    for time, count in known:
        seen += count
        if seen >= wanted:
            return time
    return math.nan


def time_percentiles(train: Sequence[Event]) -> dict[str, float]:
    """Give percentiles of the milliseconds of a step; where steps lie between events, of means."""
    steps = [number(event, "step") for event in train]
    counts = [after - before for before, after in zip([0.0, *steps], steps, strict=False)]
    times = step_times(train)
    found = {name: percentile(times, counts, share) for name, share in SHARES.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def extremes(column: Column, stretch: range) -> set[int]:
    """Find where a column is least and greatest in a stretch, and its first gap."""
    values = [(column[i], i) for i in stretch]
    numbers = [(value, i) for value, i in values if value is not None]
    gaps = [i for value, i in values if value is None]
    return (
        {i for _, i in (min(numbers), max(numbers))} | set(gaps[:1]) if numbers else set(gaps[:1])
    )


def thin(table: Table, guides: Iterable[str]) -> Table:
    """Leave points out of long columns, but none at which a guiding column has an extreme."""
    count = len(table["step"])
    if count <= 2 * BUCKETS:
        return table
    kept = {0, count - 1}
    for bucket in range(BUCKETS):
        stretch = range(bucket * count // BUCKETS, (bucket + 1) * count // BUCKETS)
        for name in guides:
            kept |= extremes(table[name], stretch)
    order = sorted(kept)
    return {name: [column[i] for i in order] for name, column in table.items()}


def places(events: Sequence[Event], settings: dict[str, Any]) -> Table:
    """Say where on the axes of steps, tokens and seconds events lie."""
    return {
        "step": clean(number(event, "step") for event in events),
        "tokens": clean(tokens_of(event, settings) for event in events),
        "seconds": clean(number(event, "train_time_ms") / 1e3 for event in events),
    }


def curves(history: History) -> dict[str, Any]:
    """Give all that charts of a run need but for its artifact, in numbers that JSON has."""
    train = history.of("train")
    val = history.of("val")
    losses = history.column("train", "train_loss")
    fields = ("lr_scale", "momentum", "grad_norm")
    table = places(train, history.settings) | {
        "loss": clean(losses),
        "mean": clean(running_mean(losses)),
        "step_ms": clean(step_times(train)),
    }
    table |= {name: clean(history.column("train", name)) for name in fields}
    scores = places(val, history.settings) | {
        "loss": clean(history.column("val", "val_loss")),
        "bpb": clean(history.column("val", "val_bpb")),
    }
    final = clean([number(history.final or {}, "val_bpb")])[0]
    guides = ("loss", "mean", "step_ms", *fields)
    return {
        "train": thin(table, guides),
        "val": thin(scores, ("bpb", "loss")),
        "final": final,
    }
