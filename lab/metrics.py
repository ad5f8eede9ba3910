"""Read metrics.jsonl, which train_gpt.py writes into a run's folder: as a whole, or as it grows.

docs/logs.md lists the events. A line that was cut off by a crash is left out; the event that then
follows in the same line is read.
"""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = dict[str, Any]
NAME = "metrics.jsonl"
HEAD = 512  # bytes that a file is known by
STEPPED = ("train", "val", "skipped_step", "lr_reduction")  # events of a place on the curve


class MetricsError(Exception):
    """What is wrong with a run's folder or its metrics, in one line for a person."""


def parse(line: bytes) -> Event | None:
    """Read the event in a line; None if there is none."""
    for start in (0, line.rfind(b'{"event"')):
        try:
            event = json.loads(line[max(start, 0) :])
        except (ValueError, RecursionError):
            continue
        return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
    return None


def number(event: Event, name: str) -> float:
    """Give a field as a number; nan if it is missing or none."""
    value = event.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number else math.nan
    except OverflowError:
        return math.nan


class Tail:
    """Follow a metrics file: each `read` gives the events that were written since the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.identity = (0, 0)  # device and inode: a new file may have come in its place
        self.rest = b""  # a line without its end
        self.head = b""  # of the file: one that is written over it may have the same inode

    def read(self) -> list[Event]:
        """Read what is new. A file that is not there yet has nothing. Raises OSError."""
        try:
            with open(self.path, "rb") as file:
                return self.read_from(file)
        except FileNotFoundError:
            return []

    def read_from(self, file: Any) -> list[Event]:
        """Read from an open file on; from its start, if it is another or shorter one."""
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        is_same = identity == self.identity and file.read(len(self.head)) == self.head
        if not is_same or status.st_size < self.offset:
            self.offset = 0
            self.rest = b""
            self.head = b""
        self.identity = identity
        file.seek(self.offset)
        data = file.read()
        if len(self.head) < HEAD:
            self.head = (self.head + data)[:HEAD]
        self.offset += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [event for event in map(parse, lines) if event]


@dataclass
class History:
    """Hold the events of one run, its earlier parts included where it was resumed."""

    settings: dict[str, Any] = field(default_factory=dict)
    versions: str = ""
    events: list[Event] = field(default_factory=list)
    starts: int = 0  # processes that wrote this curve: 2 after one resume
    earlier: list[Event] = field(default_factory=list)  # of the run before, until it is known
    earlier_starts: int = 0

    def add(self, event: Event) -> None:
        """Take in the next event.

        A `start` begins a new run. If a `resume` follows, what the run before it logged up to that
        step belongs to the same curve.
        """
        kind = event["event"]
        if kind == "start":
            self.earlier = self.events
            self.earlier_starts = self.starts
            self.events = []
            self.starts = 1
            settings = event.get("settings")
            self.settings = settings if isinstance(settings, dict) else {}
            self.versions = str(event.get("versions", ""))
        elif kind == "resume" and self.starts:
            step = number(event, "step")
            kept = [e for e in self.earlier if self.is_before(e, step)]
            self.events = kept + self.events
            self.starts += self.earlier_starts
        self.events.append(event)

    @staticmethod
    def is_before(event: Event, step: float) -> bool:
        """Tell whether an event is of the curve's part up to a step."""
        return event["event"] in STEPPED and number(event, "step") <= step

    def of(self, kind: str) -> list[Event]:
        """List the events of a kind."""
        return [event for event in self.events if event["event"] == kind]

    def column(self, kind: str, name: str) -> list[float]:
        """Give a field of all events of a kind as numbers; nan where one is missing."""
        return [number(event, name) for event in self.of(kind)]

    @property
    def final(self) -> Event | None:
        """Give the score of the artifact, if the run got there."""
        found = self.of("final")
        return found[-1] if found else None


def find_run(name: str, out_dir: str = "logs") -> Path:
    """Find a run's folder: a folder that is named, or one of this RUN_ID in OUT_DIR.

    Raises MetricsError.
    """
    for folder in (Path(name), Path(out_dir, name)):
        if folder.name == NAME:
            folder = folder.parent
        if (folder / NAME).is_file():
            return folder
    raise MetricsError(f"{name}: no {NAME} there or in {Path(out_dir, name)}; name a run's folder")


def load_history(folder: Path) -> History:
    """Read the last run in a folder. Raises MetricsError if there is none."""
    path = folder / NAME
    tail = Tail(path)
    try:
        events = tail.read()
    except OSError as error:
        raise MetricsError(f"{path}: cannot be read: {error.strerror}") from None
    last = parse(tail.rest)
    history = History()
    for event in [*events, last] if last else events:
        if event["event"] == "start" or history.starts:
            history.add(event)
    if not history.starts:
        raise MetricsError(f"{path}: no event 'start' in it; is it written by train_gpt.py?")
    return history
