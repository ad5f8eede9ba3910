"""Sum up a finished run: a few lines of text, and a picture of its loss beside its metrics.

    python records/summary.py logs/sample

Reads metrics.jsonl, which train_gpt.py writes into the run's folder, and nothing else.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Event = dict[str, Any]


def read_events(folder: Path) -> list[Event]:
    """The events of the last run in a run's folder.

    Raises SystemExit that says what is missing if there is none, or if it did not finish.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path}: not there; give the folder of a run, such as logs/sample")
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    last = events[starts[-1] :] if starts else []
    kinds = {event["event"] for event in last}
    if not {"val", "final"} <= kinds:
        raise SystemExit(f"{path}: the last run in it did not finish training and scoring")
    return last


def draw_loss(events: list[Event], path: Path) -> None:
    """Draw training loss (nats per token) and validation BPB over the steps into a PNG."""
    train = [event for event in events if event["event"] == "train"]
    val = [event for event in events if event["event"] == "val"]
    final = next(event for event in events if event["event"] == "final")
    figure, left = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    right = left.twinx()
    steps, losses = [e["step"] for e in train], [e["train_loss"] for e in train]
    left.plot(steps, losses, color="#4c72b0", lw=1.5)
    right.plot([e["step"] for e in val], [e["val_bpb"] for e in val], "o-", color="#c44e52", ms=4)
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
    left.set_ylim(0, max([*losses[:1], val[0]["val_loss"]]) * 1.05)
    right.set_ylim(0, val[0]["val_bpb"] * 1.05)
    left.grid(alpha=0.3)
    left.set_title(f"{path.parent.name}: {val[-1]['step']} steps", loc="left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def summarize(folder: Path, events: list[Event], picture: Path) -> str:
    """The run in a few lines."""
    last = [event for event in events if event["event"] == "val"][-1]
    final = next(event for event in events if event["event"] == "final")
    code, model, cap = final["code_bytes"], final["artifact_bytes"], final["max_bytes"]
    share = 100 * (code + model) / cap
    rows = {
        "val_bpb": f"{last['val_bpb']:.4f} before the round trip, {final['val_bpb']:.4f} after it",
        "val_loss": f"{last['val_loss']:.4f} before, {final['val_loss']:.4f} after, nats per token",
        "artifact": f"{model:,} bytes",
        "code": f"{code:,} bytes",
        "total": f"{code + model:,} of {cap:,} bytes ({share:.1f}%)",
        "training": f"{last['step']} steps in {last['train_time_ms'] / 1e3:.1f} s",
        "speed": f"{last['tokens_per_second']:,.0f} tokens/s",
        "log": f"{folder}.txt",
        "files": f"{folder}/final_model.artifact, final_model.pt, metrics.jsonl",
        "picture": str(picture),
    }
    return "\n".join(f"  {name:9} {value}" for name, value in rows.items())


def main(arguments: list[str]) -> None:
    """Print the summary of the run whose folder is the argument, and draw its picture."""
    if len(arguments) != 1:
        raise SystemExit("usage: python records/summary.py logs/RUN_ID")
    folder = Path(arguments[0])
    events, picture = read_events(folder), folder / "loss.png"
    draw_loss(events, picture)
    print(f"\nThe run {folder.name}:\n{summarize(folder, events, picture)}")


if __name__ == "__main__":
    main(sys.argv[1:])
