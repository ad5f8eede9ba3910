"""Sum up a finished run: a few lines of text, and a picture of its loss beside its metrics.

    python records/summary.py logs/sample

Reads metrics.jsonl, which train_gpt.py writes into the run's folder, and nothing else.
"""

import io
import json
import math
import os
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib
import program

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Event = dict[str, Any]
BLUE = "#4c72b0"
RED = "#c44e52"
GREEN = "#4f9a63"
NUMBERS = {  # that an event of this kind has
    "train": ("step", "train_loss"),
    "val": ("step", "val_loss", "val_bpb", "train_time_ms", "tokens_per_second"),
    "final": ("val_loss", "val_bpb", "code_bytes", "artifact_bytes", "max_bytes"),
}


def parse(line: bytes) -> Event | None:
    """Read the event in a line; behind one that was cut off, the next may stand."""
    for start in (0, line.rfind(b'{"event"')):
        try:
            event = json.loads(line[max(start, 0) :])
        except (ValueError, RecursionError):
            continue
        return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
    return None


def read_events(folder: Path) -> list[Event]:
    """Read the events of the last run in a run's folder, of the kinds that are needed.

    Raises SystemExit that says what is missing if there is none, or if it did not finish.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path}: not there; give the folder of a run, such as logs/sample")
    events = [event for event in map(parse, path.read_bytes().splitlines()) if event]
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    last = [event for event in events[starts[-1] :] if event["event"] in NUMBERS] if starts else []
    if not {"val", "final"} <= {event["event"] for event in last}:
        raise SystemExit(f"{path}: the last run in it did not finish training and scoring")
    for event in last:
        for name in NUMBERS[event["event"]]:
            value = event.get(name)
            if type(value) is not float and not (type(value) is int and abs(value) < 2**63):
                raise SystemExit(f"{path}: an event {event['event']!r} without a number {name!r}")
    return last


def column(events: list[Event], name: str) -> list[float]:
    """Give a field of events; nan, which is a gap, for what is missing or cannot be drawn."""
    values = [event.get(name) for event in events]
    known = [isinstance(value, int | float) and abs(value) < 1e300 for value in values]
    return [value if there else math.nan for value, there in zip(values, known, strict=True)]


def running_mean(values: list[float]) -> list[float]:
    """Give the mean of the k values before and after each, k = 1/40 of all; nan where one is nan.

    At the start, where the loss falls steeply, there are no more values before than after.
    """
    reach = math.ceil(len(values) / 40)
    means = []
    for i, value in enumerate(values):
        k = min(i, reach)
        near = [v for v in values[i - k : i + k + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if math.isfinite(value) else math.nan)
    return means


def ends(*lines: Iterable[float]) -> tuple[float, float]:
    """Choose the ends of an axis: those of the values, with a little room."""
    values = [value for line in lines for value in line if math.isfinite(value)]
    low = min(values, default=0.0)
    high = max(values, default=1.0)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    return low - room, high + room


def draw_training(left: Axes, train: list[Event], val: list[Event]) -> None:
    """Draw the training loss as logged, and its running mean.

    The axis has room for the mean and for validation; a leap of a single step may leave it.
    """
    steps = column(train, "step")
    losses = column(train, "train_loss")
    mean = running_mean(losses)
    left.plot(steps, losses, color=BLUE, lw=0.8, alpha=0.45)
    left.plot(steps, mean, color=BLUE, lw=1.8)
    least = [min(filter(math.isfinite, losses), default=math.nan)]
    left.set_ylim(*ends(mean, least, column(val, "val_loss")))
    left.set_ylabel("training loss, nats per token", color=BLUE)
    left.grid(alpha=0.3)


def draw_validation(left: Axes, val: list[Event], final: Event) -> None:
    """Draw validation BPB, and a star for the score of the artifact.

    On one validation text, a nat per token is always the same in bits per byte: both axes show the
    same height as the same loss.
    """
    right = left.twinx()
    steps = column(val, "step")
    scores = column(val, "val_bpb")
    (score,) = column([final], "val_bpb")
    (loss,) = column([final], "val_loss")
    right.plot(steps, scores, "o-", color=RED, ms=4, lw=1.2)
    right.set_ylim(*ends(scores, [score]))
    if 0 < score < math.inf and loss > 0:
        right.set_ylim(*(end * score / loss for end in left.get_ylim()))
    right.set_ylabel("validation, bits per byte", color=RED)
    if math.isfinite(score):
        right.plot(steps[-1:], [score], "*", color=RED, ms=13, mec="white")
        text = f"★ {score:.4f} bits per byte from the artifact"
        corner = {"ha": "right", "va": "top", "transform": right.transAxes}
        right.text(0.98, 0.96, text, color=RED, **corner)


def draw_rates(below: Axes, train: list[Event]) -> None:
    """Draw what the learning rates are multiplied by."""
    rates = column(train, "lr_scale")
    below.plot(column(train, "step"), rates, color=GREEN, lw=1.5)
    below.set_ylim(*ends([0.0, 1.0], rates))
    below.set_ylabel("rates, times", color=GREEN)
    below.grid(alpha=0.3)


def draw_loss(events: list[Event], name: str) -> bytes:
    """Draw training loss and validation BPB over the steps, and the rates, if there; a PNG."""
    train = [event for event in events if event["event"] == "train"]
    val = [event for event in events if event["event"] == "val"]
    final = next(event for event in events if event["event"] == "final")
    has_rates = any(map(math.isfinite, column(train, "lr_scale")))
    heights = [4, 1] if has_rates else [4]
    figure = plt.figure(figsize=(7.5, 5.2 if has_rates else 4.2), layout="constrained")
    parts = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    draw_training(parts[0], train, val)
    draw_validation(parts[0], val, final)
    if has_rates:
        draw_rates(parts[1], train)
    parts[-1].set_xlabel("step")
    shown = "".join(c if c.isprintable() else "?" for c in name)
    parts[0].set_title(f"{shown}: {val[-1]['step']} steps", loc="left", parse_math=False)
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # that the font lacks: a box stands there
        figure.savefig(png, dpi=120)
    plt.close(figure)
    return png.getvalue()


def summarize(folder: Path, events: list[Event], picture: str) -> str:
    """Describe the run in a few lines."""
    last = [event for event in events if event["event"] == "val"][-1]
    final = next(event for event in events if event["event"] == "final")
    code, model, cap = final["code_bytes"], final["artifact_bytes"], final["max_bytes"]
    share = 100 * (code + model) / (cap or math.nan)
    rows = {
        "val_bpb": f"{last['val_bpb']:.4f} before the round trip, {final['val_bpb']:.4f} after it",
        "val_loss": f"{last['val_loss']:.4f} before, {final['val_loss']:.4f} after, nats per token",
        "artifact": f"{model:,} bytes",
        "code": f"{code:,} bytes",
        "total": f"{code + model:,} of {cap:,} bytes ({share:.1f}%)",
        "training": f"{last['step']} steps in {last['train_time_ms'] / 1e3:.1f} s",
        "speed": f"{last['tokens_per_second']:,.0f} tokens/s",
        "log": str(folder.with_name(f"{folder.name}.txt")),
        "files": f"{folder}/final_model.artifact, final_model.pt, metrics.jsonl",
        "picture": picture,
    }
    return "\n".join(f"  {name:9} {value}" for name, value in rows.items())


def main(arguments: list[str]) -> None:
    """Print the summary of the run whose folder is the argument, and draw its picture."""
    if len(arguments) != 1:
        raise SystemExit("usage: python records/summary.py logs/RUN_ID")
    folder = Path(arguments[0])
    if folder.name in ("", ".."):  # of . and the like, the name is elsewhere
        folder = folder.resolve()
    events, picture, failed = read_events(folder), folder / "loss.png", ""
    png = draw_loss(events, folder.name)
    partial = picture.with_name(".loss.png.partial")
    try:
        partial.write_bytes(png)
        os.replace(partial, picture)
    except OSError as problem:
        failed = f"{picture}: cannot be written: {problem.strerror}"
        with suppress(OSError):
            partial.unlink()
    shown = "none" if failed else str(picture)
    print(f"\nThe run {folder.name}:\n{summarize(folder, events, shown)}", flush=True)
    if failed:
        raise SystemExit(failed)


if __name__ == "__main__":
    program.run(main)
