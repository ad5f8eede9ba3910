"""Draw what lab/watch.py shows in a live terminal: the figures of runs, and their curves."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import rich.live
from metrics import Event
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red")
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a Braille letter: columns, rows
CURVE_BEGINS = 0.02  # of the steps: the first losses would leave no room for the rest
LABELS = 9  # letters before the curve
WARNINGS = 6  # lines
Points = list[tuple[float, float]]


@dataclass
class Chart:
    """Draw curves of letters, each of which has 2 by 4 dots; x and y are in [0, 1]."""

    width: int
    height: int
    braille: bool = True
    cells: dict[tuple[int, int], tuple[int, str]] = field(default_factory=dict)  # dots, color

    def draw(self, points: Points, color: str) -> None:
        """Draw a line through the mean of the points in each column of dots."""
        columns: dict[int, list[float]] = {}
        for x, y in points:
            column = min(int(x * 2 * self.width), 2 * self.width - 1)
            columns.setdefault(column, []).append(y)
        if not columns:
            return
        means = [sum(columns[column]) / len(columns[column]) for column in sorted(columns)]
        drawn = range(min(columns), max(columns) + 1)
        for column, y in zip(drawn, np.interp(drawn, sorted(columns), means), strict=True):
            row = self.row(float(y), 4 * self.height)
            place = (row // 4, column // 2)
            dots, _ = self.cells.get(place, (0, ""))
            self.cells[place] = (dots | DOTS[column % 2][row % 4], color)

    def mark(self, points: Points, color: str) -> None:
        """Put a circle at each point."""
        for x, y in points:
            column = min(int(x * self.width), self.width - 1)
            self.cells[self.row(y, self.height), column] = (-1, color)

    @staticmethod
    def row(y: float, rows: int) -> int:
        """Give the row of a height."""
        return round((1 - min(max(y, 0.0), 1.0)) * (rows - 1))

    def rows(self) -> Iterator[Text]:
        """Give its lines."""
        for row in range(self.height):
            line = Text()
            for column in range(self.width):
                dots, color = self.cells.get((row, column), (0, ""))
                drawn = chr(0x2800 + dots) if self.braille and dots > 0 else "*"
                line.append({0: " ", -1: "o"}.get(dots, drawn), color)
            yield line


def curve(run: Any, kind: str) -> Points:
    """List the steps and the losses of a run that are finite."""
    steps = run.history.column(kind, "step")
    losses = run.history.column(kind, f"{kind}_loss")
    pairs = zip(steps, losses, strict=True)
    return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def chart_of(runs: list[Any], width: int, height: int, braille: bool) -> list[Text]:
    """Draw the losses of runs over their steps: lines for training, circles for validation."""
    trained = [curve(run, "train") for run in runs]
    validated = [curve(run, "val") for run in runs]
    points = [point for line in trained + validated for point in line]
    if not points:
        return [Text("no losses yet")]
    end = max(x for x, _ in points)
    shown = [y for x, y in points if x >= CURVE_BEGINS * end]
    low = min(shown)
    high = max(max(shown), low + 1e-6)
    chart = Chart(max(width - LABELS, 10), max(height - 1, 3), braille)

    def placed(line: Points) -> Points:
        return [(x / max(end, 1), (y - low) / (high - low)) for x, y in line]

    for place, line in enumerate(trained):
        chart.draw(placed(line), COLORS[place % len(COLORS)])
    for place, line in enumerate(validated):
        chart.mark(placed(line), f"bold {COLORS[place % len(COLORS)]}")
    last = chart.height - 1
    labels = {0: f"{high:.3f}", last // 2: f"{low + (high - low) / 2:.3f}", last: f"{low:.3f}"}
    rows = [Text(f"{labels.get(i, ''):>8} ").append_text(row) for i, row in enumerate(chart.rows())]
    return [*rows, Text(f"{'0':>10}{f'step {end:.0f}':>{chart.width - 1}}")]


def table_of(runs: list[Any]) -> Table:
    """Put the figures of runs in a table, a column a run."""
    figures = [{"state": run.state, **run.figures()} for run in runs]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for place, run in enumerate(runs):
        table.add_column(run.name, style=COLORS[place % len(COLORS)], overflow="ellipsis")
    for name in dict.fromkeys(name for run in figures for name in run):
        table.add_row(name, *(run.get(name, "") for run in figures))
    return table


def picture(runs: list[Any], said: list[str], console: Console) -> Group:
    """Lay out the terminal: figures, beside or over the curves, and what was found."""
    width, height = console.size
    table = table_of(runs)
    found = [f"{run.name}: {text}" for run in runs for text in run.warnings()]
    texts = [*found[-WARNINGS:], *said[-WARNINGS:]]
    warned = [Text(text, "yellow", overflow="ellipsis", no_wrap=True) for text in texts]
    room = height - len(warned) - 1
    used = console.measure(table).maximum + 2
    braille = "utf" in (console.encoding or "").lower()
    if width - used < 40:
        below = chart_of(runs, width, max(room - table.row_count - 1, 5), braille)
        return Group(table, *below, *warned)
    beside = Table.grid(padding=(0, 2, 0, 0))
    beside.add_row(table, Group(*chart_of(runs, width - used - 2, room, braille)))
    return Group(beside, *warned)


class Live:
    """Keep the terminal's other screen up to date; leave the last state on the usual one."""

    def __init__(self, runs: list[Any], once: bool) -> None:
        self.runs = runs
        self.said: list[str] = []
        self.console = Console(file=sys.stdout)
        self.live = rich.live.Live(console=self.console, screen=True, auto_refresh=False)
        self.is_live = not once
        if self.is_live:
            self.live.start()

    def show(self, run: Any, events: list[Event], lines: list[str]) -> None:
        """Keep what is no warning of the run itself: what was done about it."""
        self.said += [f"{run.name}: {text}" for text in lines if "SIGUSR1" in text]

    def say(self, text: str) -> None:
        """Show a line."""
        self.said.append(text)
        if not self.is_live:
            self.console.print(Text(text, "yellow"))

    def end_look(self) -> None:
        """Draw the present state."""
        if self.is_live:
            self.live.update(picture(self.runs, self.said, self.console), refresh=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.is_live:
            self.live.stop()
        self.is_live = False
        self.console.print(picture(self.runs, self.said, self.console))
