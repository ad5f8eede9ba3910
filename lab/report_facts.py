"""What report.py says of a run in words: its score and sizes, settings, troubles, and samples."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import metrics
from metrics import Event, History, number
from report_curves import time_percentiles, tokens_of

PLACES = {"run_id", "out_dir", "config"}  # settings that say nothing of a run


@dataclass
class Card:
    """The first things to know of a run."""

    name: str
    score: str = ""
    score_of: str = "no score yet"
    state: str = ""
    size: dict[str, float] = field(default_factory=dict)  # of code, artifact and cap, in bytes
    rows: dict[str, str] = field(default_factory=dict)


def last(history: History, kind: str) -> Event:
    """Give the last event of a kind; an empty one if there is none."""
    return next(iter(history.of(kind)[::-1]), {})


def duration(seconds: float) -> str:
    """Write a time for a reader."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def state_of(history: History, path: Path) -> str:
    """Say how far a run got."""
    parts = []
    early = last(history, "stopping_early")
    if history.final:
        parts.append("finished")
    else:
        time = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")
        parts.append(f"not finished: it goes on, or it died; last event at {time}")
    if early:
        parts.append(f"ended early: {early.get('reason')}")
    if history.starts > 1:
        times = history.starts - 1
        parts.append(f"resumed {times} time{'s' * (times > 1)}")
    return "; ".join(parts)


def add_score(card: Card, history: History) -> None:
    """Say what the run scored: by its artifact, or else by the last validation."""
    final = history.final or {}
    val = last(history, "val")
    bpb = number(final or val, "val_bpb")
    if math.isfinite(bpb):
        step = val.get("step")
        card.score = f"{bpb:.4f}"
        card.score_of = "bits per byte, " + ("from the artifact" if final else f"at step {step}")
    elif final or val:
        card.score_of = "its score is not finite"
    before = number(val, "val_bpb")
    if final and math.isfinite(before):
        card.rows["before rounding"] = f"{before:.4f} bits per byte"
    loss = number(final or val, "val_loss")
    if math.isfinite(loss):
        card.rows["validation loss"] = f"{loss:.4f} nats per token"


def add_training(card: Card, history: History) -> None:
    """Say how long the run trained, on what, and how fast."""
    stepped = [event for event in history.events if event["event"] in ("train", "val")]
    event = max(stepped, key=lambda e: number(e, "step"), default={})
    seconds = number(event, "train_time_ms") / 1e3
    if math.isfinite(seconds):
        card.rows["training"] = f"{event.get('step')} steps in {duration(seconds)}"
        tokens = tokens_of(event, history.settings)
        if tokens > 0 and seconds > 0:
            card.rows["tokens"] = f"{tokens:,.0f}, {tokens / seconds:,.0f} a second"
    times = time_percentiles(history.of("train"))
    if times:
        texts = [f"{name} {value:,.4g}" for name, value in times.items()]
        card.rows["ms a step"] = " · ".join(texts)
    memory = max(filter(math.isfinite, history.column("train", "memory_mib")), default=math.nan)
    if math.isfinite(memory):
        card.rows["memory at most"] = f"{memory:,.0f} MiB"


def add_model(card: Card, history: History) -> None:
    """Say what trained, and on what machine."""
    model = last(history, "model")
    parameters = number(model, "parameters")
    if math.isfinite(parameters):
        flops = number(model, "flops_per_token")
        card.rows["parameters"] = f"{parameters:,.0f}, {flops:.3g} FLOPs a token"
        card.rows["machine"] = " × ".join(
            [str(model.get("world_size")), f"{model.get('device')} ({model.get('dtype')})"]
        )
    elif history.versions:
        card.rows["machine"] = history.versions


def add_size(card: Card, history: History) -> None:
    """Say how much of the cap code and artifact take, or are expected to."""
    event = history.final or last(history, "forecast")
    code = number(event, "code_bytes")
    artifact = number(event, "artifact_bytes")
    cap = number(event, "max_bytes")
    total = code + artifact
    if not math.isfinite(total) or not cap > 0:
        return
    card.size = {"code": code, "artifact": artifact, "cap": cap, "share": total / cap}
    name = "size" if history.final else "size, forecast"
    card.rows[name] = f"{total:,.0f} of {cap:,.0f} bytes ({100 * total / cap:.1f}%)"
    card.rows["code, artifact"] = f"{code:,.0f} and {artifact:,.0f} bytes"


def card_of(name: str, history: History, path: Path) -> Card:
    """Sum up a run."""
    card = Card(name, state=state_of(history, path))
    for add in (add_score, add_size, add_training, add_model):
        add(card, history)
    return card


def shown(value: Any) -> str:
    """Write a setting's value for a reader."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text or "(empty)"


def differing(runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """List the settings in which runs differ, and each run's value of them."""
    names = dict.fromkeys(name for settings in runs for name in settings if name not in PLACES)
    rows = []
    for name in names:
        values = [shown(settings[name]) if name in settings else "–" for settings in runs]
        if len(set(values)) > 1:
            rows.append((name.upper(), values))
    return rows


def problems(history: History) -> list[str]:
    """List what went otherwise than asked in a run, in the order of its events."""
    lines = []
    if not history.settings:
        lines.append("its settings are not in metrics.jsonl: another version may have written it")
    for event in history.events:
        kind = event["event"]
        step = event.get("step")
        if kind == "warning":
            lines.append(str(event.get("text", "")))
        elif kind == "skipped_step":
            lines.append(f"step {step} was skipped: its loss or gradient was not finite")
        elif kind == "lr_reduction":
            why = event.get("reason")
            lines.append(f"from step {step} on, the rates are times {event.get('scale')}: {why}")
    bad = sum(not math.isfinite(loss) for loss in history.column("train", "train_loss"))
    if bad:
        lines.append(f"{bad} of the logged training losses are not finite: gaps in the curve")
    return lines


def damaged_lines(path: Path) -> int:
    """Count the lines that cannot be read as they stand; the last one may be in the making."""
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]
    return sum(1 for line in lines if line.strip() and is_damaged(line))


def is_damaged(line: bytes) -> bool:
    """Tell whether a line is no event, or is one behind the rest of another."""
    try:
        return not isinstance(json.loads(line), dict) or metrics.parse(line) is None
    except (ValueError, RecursionError):
        return True


def read_samples(path: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """Read samples of text as (step, [(prompt, text), ...]), the latest step first.

    Lines that hold no sample are left out. Raises OSError, but not where there is no file.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    try:
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            sample = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(sample, dict) and isinstance(sample.get("text"), str):
            prompt = str(sample.get("prompt", ""))
            text = sample["text"].removeprefix(prompt)
            found.setdefault(str(sample.get("step", "?")), []).append((prompt, text))
    return list(found.items())[::-1]
