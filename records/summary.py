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

Event = dict[str, Any]
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


def top(values: Iterable[float]) -> float:
    """Choose the upper end of an axis that starts at 0: a little over the largest number."""
    return 1.05 * max((v for v in values if 0 < v < 1e300), default=1.0)


def draw_loss(events: list[Event], name: str) -> bytes:
    """Draw training loss (nats per token) and validation BPB over the steps; a PNG."""
    train = [event for event in events if event["event"] == "train"]
    val = [event for event in events if event["event"] == "val"]
    final = next(event for event in events if event["event"] == "final")
    figure, left = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    right = left.twinx()
    steps, losses = [e["step"] for e in train], [e["train_loss"] for e in train]
    left.plot(steps, losses, color="#4c72b0", lw=1.5)
    right.plot([e["step"] for e in val], [e["val_bpb"] for e in val], "o-", color="#c44e52", ms=4)
    if math.isfinite(val[-1]["val_bpb"]):
        right.annotate(
            f"{final['val_bpb']:.4f} from the artifact",
            (val[-1]["step"], val[-1]["val_bpb"]),
            xytext=(0, -26),
            textcoords="offset points",
            ha="right",
            color="#c44e52",
        )
    left.set_xlabel("step")
    left.set_ylabel("training loss, nats per token", color="#4c72b0")
    right.set_ylabel("validation, bits per byte", color="#c44e52")
    left.set_ylim(0, top([*losses[:1], val[0]["val_loss"]]))
    right.set_ylim(0, top([val[0]["val_bpb"]]))
    left.grid(alpha=0.3)
    shown = "".join(c if c.isprintable() else "?" for c in name)
    left.set_title(f"{shown}: {val[-1]['step']} steps", loc="left", parse_math=False)
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
