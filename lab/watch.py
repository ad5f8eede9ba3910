"""Watch runs of train_gpt.py: python lab/watch.py RUN_ID [RUN_ID ...].

A live terminal with the curve, the pace and the time that is left; plain lines where there is no
terminal. Guards warn of a run that is flat, diverges or leaps, or end it with SIGUSR1, so that it
exports. --report-to forwards the events. Nothing here changes a run in any other way.
docs/watch.md says more.
"""

import argparse
import contextlib
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from gpus import CARDS, kind_of
from guards import GUARDS, Finding, Guards
from metrics import (
    NAME,
    Event,
    History,
    MetricsError,
    Tail,
    find_run,
    load_history,
    number,
    parse,
)
from owner import Journal, Owner, OwnerError, ask_to_finish, find_owner
from reporters import SINKS, Reporter

LOOK_SECONDS = 1.0
PATIENCE_SECONDS = 600  # without news of a run of which it cannot be told whether it lives
UPLOAD_SECONDS = 120  # for reporters to finish
LEVELS = ("off", "warn", "act")  # act: warn, and send SIGUSR1
DEFAULT_LEVELS = dict.fromkeys(GUARDS, "warn") | {"early_stop": "off"}


def peak_flops(device: str) -> float:
    """Give a GPU's peak by its name; nan if it is not known."""
    card = CARDS.get(kind_of(device))
    return card.peak if card else math.nan


def duration(seconds: float) -> str:
    """Write seconds for a person."""
    if not math.isfinite(seconds):
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


# ===================================== A RUN =====================================


class Watched:
    """Follow one run: its events, its process, and what the guards find."""

    def __init__(self, folder: Path, levels: dict[str, str], parent: int = 0) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        self.levels = levels
        self.parent = parent  # the run's process, where that has started this one
        self.tail = Tail(folder / NAME)
        self.journal = Journal(folder)
        self.owner: Owner | None = None
        self.unsure = ""  # why it cannot be told whether the run lives
        self.news = time.monotonic()
        self.is_gone = False  # whether its process has certainly ended
        self.asked = False
        self.has_looked = False
        self.restart()

    def restart(self) -> None:
        """Begin at the first event."""
        self.history = History()
        self.guards = Guards()
        self.findings: list[Finding] = []
        self.earlier: list[Finding] = []  # of the run before
        self.starts = 0

    def look(self, is_last: bool = False) -> tuple[list[Event], list[str]]:
        """Read what is new; give the events, and what is to be said of them. Raises OSError."""
        was = self.owner
        self.find_process()  # before reading: a run that has ended writes no more
        place = self.tail.identity
        events = self.tail.read()
        if place not in ((0, 0), self.tail.identity):
            self.restart()  # another file has come
        last = parse(self.tail.rest) if is_last or self.is_gone else None
        events = [*events, last] if last else events
        before = self.guards.step
        fresh = [finding for event in events for finding in self.take(event)]
        lines = [line for finding in fresh if (line := self.note(finding))]
        if events:
            self.news = time.monotonic()
            if self.has_looked:  # what is read first may be the past
                lines += self.act(fresh, before, was)
        self.has_looked = True
        return events, lines

    def take(self, event: Event) -> list[Finding]:
        """Take in an event; give what the guards have found, but for those that are off."""
        kind = event["event"]
        if kind == "start":
            self.starts += 1
            self.earlier = self.findings
            self.findings = []
            self.asked = False
        elif kind == "resume":
            step = number(event, "step")
            self.findings = [f for f in self.earlier if f.step <= step]
        if kind == "start" or self.history.starts:
            self.history.add(event)
        found = [f for f in self.guards.add(event) if self.levels[f.guard] != "off"]
        self.findings += found
        return found

    # ---- the process

    def find_process(self) -> None:
        """Find the run's process."""
        self.owner = None
        self.unsure = ""
        try:
            self.owner = find_owner(self.folder)
        except OwnerError as error:
            self.unsure = str(error)
        self.is_gone = not (self.owner or self.unsure)
        if self.parent:
            self.is_gone = os.getppid() != self.parent

    @property
    def is_over(self) -> bool:
        """Tell whether nothing more is to come."""
        return self.is_gone or bool(self.unsure and not self.parent and self.history.final)

    # ---- what the guards do

    def record(self, finding: Finding, **more: Any) -> dict[str, Any]:
        """Make the line of watch.jsonl on a finding."""
        kind = "alarm" if finding.is_alarm else "note"
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        place = {"event": kind, "run": self.starts, "guard": finding.guard, "step": finding.step}
        return {**place, "text": finding.text, "time": when, **more}

    def note(self, finding: Finding) -> str:
        """Write a finding down; give the line to be said, if nobody has said it yet."""
        try:
            is_new = self.journal.add(self.record(finding), "event", "run", "guard", "step")
        except OSError as error:
            return f"{told(finding)} (not in {self.journal.path}: {error.strerror})"
        return told(finding) if is_new and finding.is_alarm else ""

    def act(self, fresh: list[Finding], before: int, was: Owner | None) -> list[str]:
        """Ask the run to finish, if a guard that may do so holds now; give what is to be said.

        What is new was written by the run's process if that is the same now as before.
        """
        held = [f for f in self.guards.holding.values() if f.step > before]
        alarms = [f for f in [*fresh, *held] if f.is_alarm and self.levels[f.guard] == "act"]
        ending = self.history.of("stopping_early") or self.history.final
        known = self.unsure or (self.owner and self.owner == was)
        if not (alarms and known) or ending or self.asked:
            return []
        self.asked = True
        cause = alarms[0]
        try:
            if not self.owner:
                raise OwnerError(self.unsure)
            # Written first, and once for a process: the run takes a second signal as a kill.
            record = self.record(cause, event="act", process=self.owner.pid, signal="SIGUSR1")
            if not self.journal.add(record, "event", "run", "process"):
                return []
            ask_to_finish(self.folder, self.owner)
        except (OSError, OwnerError) as error:
            return [f"{cause.guard} at step {cause.step}: no SIGUSR1 sent: {error}"]
        return [f"{cause.guard} at step {cause.step}: SIGUSR1 sent to {self.owner}; it exports"]

    # ---- what is shown

    @property
    def state(self) -> str:
        """Say in a word or two where the run is."""
        if self.history.final:
            return "finished"
        stopped = self.history.of("stopping_early")
        if self.is_gone:
            return f"ended by {stopped[-1].get('reason')}" if stopped else "died"
        if stopped:
            return "exporting"
        if not self.unsure:
            return "running"
        return "quiet" if time.monotonic() > self.news + PATIENCE_SECONDS else "running?"

    @property
    def has_failed(self) -> bool:
        """Tell whether it ended without a score."""
        return self.is_gone and not self.history.final

    def warnings(self) -> list[str]:
        """List what is wrong with the run, the newest last."""
        found = [(f.step, told(f)) for f in self.findings if f.is_alarm]
        step = 0
        for event in self.history.events:
            place = number(event, "step")
            step = int(place) if math.isfinite(place) else step
            if event["event"] == "warning":
                found.append((step, str(event.get("text"))))
            elif event["event"] == "lr_reduction":
                text = f"rates x {number(event, 'scale'):g}: {event.get('reason')}"
                found.append((step, f"lr_reduction at step {step}: {text}"))
        return [text for _, text in sorted(found, key=lambda pair: pair[0])]

    def figures(self) -> dict[str, str]:
        """Give what is known of the run now, by names as in the log's lines."""
        events = self.history.events
        train = last_of(events, "train")
        val = last_of(events, "val")
        newest = last_of(events, "train", "val")
        model = last_of(events, "model")
        step = number(newest, "step")
        ms = number(newest, "train_time_ms")
        speed = number(newest, "tokens_per_second")
        total = self.guards.horizon.total(step, ms) if step >= 0 else math.nan
        left = (total - step) * ms / step / 1e3 if step > 0 else math.nan
        over = self.history.of("stopping_early") or self.history.final or self.is_gone
        shown = {
            "step": text_of(step, ".0f", f"/{total:.0f}" if math.isfinite(total) else ""),
            "phase": "" if over or self.levels["phase"] == "off" else self.guards.phase,
            "train_loss": text_of(number(train, "train_loss"), ".4f"),
            "val_loss": text_of(number(val, "val_loss"), ".4f"),
            "val_bpb": text_of(number(val, "val_bpb"), ".4f"),
            "tok_s": text_of(speed, ".0f"),
            "mfu": text_of(100 * mfu(model, speed), ".1f", "%"),
            "left": "" if over else duration(left),
            "memory": text_of(number(train, "memory_mib"), ".0f", "MiB"),
            "grad_norm": text_of(number(train, "grad_norm"), ".3g"),
            "lr_scale": text_of(number(train, "lr_scale"), ".3f"),
            "skipped": str(len(self.history.of("skipped_step")) or ""),
        }
        if final := self.history.final:
            size = number(final, "code_bytes") + number(final, "artifact_bytes")
            shown["final_bpb"] = text_of(number(final, "val_bpb"), ".4f")
            shown["bytes"] = text_of(size, ".0f")
        return {name: text for name, text in shown.items() if text}

    def line(self) -> str:
        """Write its figures in a line."""
        fields = " ".join(f"{name}:{text}" for name, text in self.figures().items())
        return f"{self.name} {self.state} {fields}"


def told(finding: Finding) -> str:
    """Write a finding for a person."""
    return f"{finding.guard} at step {finding.step}: {finding.text}"


def text_of(value: float, form: str, unit: str = "") -> str:
    """Write a number; nothing if it is not known."""
    return "" if math.isnan(value) else f"{value:{form}}{unit}"


def last_of(events: list[Event], *kinds: str) -> Event:
    """Find the newest event of some kinds; an empty one if there is none."""
    return next((e for e in reversed(events) if e["event"] in kinds), {})


def mfu(model: Event, speed: float) -> float:
    """Give the share of the GPUs' peak that training's products and sums take; nan if unknown."""
    peak = peak_flops(str(model.get("device"))) if model.get("dtype") == "bfloat16" else math.nan
    return number(model, "flops_per_token") * speed / (peak * number(model, "world_size"))


# ===================================== WHERE IT IS SHOWN =====================================


class Screen(Protocol):
    """Show runs."""

    def show(self, run: Watched, events: list[Event], lines: list[str]) -> None:
        """Show what is new of a run."""

    def say(self, text: str) -> None:
        """Show a line."""

    def end_look(self) -> None:
        """Bring all on the screen."""

    def close(self) -> None:
        """Leave the last state on the screen."""


class Plain:
    """Print lines: a run's state where it has news, and what was found."""

    def __init__(self) -> None:
        self.known: set[str] = set()  # runs that were shown

    def show(self, run: Watched, events: list[Event], lines: list[str]) -> None:
        """Print what is new of a run."""
        if run.name not in self.known:
            self.known.add(run.name)
            lines = run.warnings()
            if run.unsure:
                lines.append(f"whether it lives cannot be told: {run.unsure}")
        else:
            lines = [*told_events(events), *lines]
        for text in lines:
            self.say(f"{run.name} {text}")
        if any(event["event"] in ("train", "val", "final") for event in events) or run.is_over:
            self.say(run.line())

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, flush=True)

    def end_look(self) -> None:
        """Do nothing: all is printed."""

    close = end_look


class Child(Plain):
    """Print only what the guards find, beside the lines of the run that has started this."""

    def show(self, run: Watched, events: list[Event], lines: list[str]) -> None:
        """Print what was found."""
        for text in lines:
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line; a console that is closed ends nothing here."""
        with contextlib.suppress(OSError):
            print(f"watch: {text}", flush=True)


def told_events(events: list[Event]) -> list[str]:
    """Write the events that are worth a line of their own."""
    lines = []
    for event in events:
        fields = " ".join(f"{k}:{v}" for k, v in event.items() if k != "event")
        if event["event"] in ("skipped_step", "lr_reduction", "stopping_early", "resume"):
            lines.append(f"{event['event']} {fields}")
        elif event["event"] == "warning":
            lines.append(f"warning: {event.get('text')}")
    return lines


def make_screen(options: argparse.Namespace, runs: list[Watched]) -> Screen:
    """Take the terminal, or lines where there is none."""
    if options.child:
        return Child()
    if options.plain or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return Plain()
    try:
        import terminal
    except ModuleNotFoundError as error:
        print(f"no {error.name} here: plain lines; pip install -r lab/requirements.txt")
        return Plain()
    return terminal.Live(runs, options.once)


# ===================================== MAIN =====================================


def watch(runs: list[Watched], screen: Screen, reporters: list[Reporter], once: bool) -> None:
    """Follow runs until all are over. Raises OSError."""
    while True:
        for run in runs:
            events, lines = run.look(is_last=once)
            screen.show(run, events, lines)
        for reporter in reporters:
            tell(reporter, screen)
        screen.end_look()
        if once or all(run.is_over for run in runs):
            return
        time.sleep(LOOK_SECONDS)


def tell(reporter: Reporter, screen: Screen) -> None:
    """Show what a reporter says."""
    for text in reporter.messages():
        screen.say(f"warning: {text}")


def finish(reporters: list[Reporter], screen: Screen) -> None:
    """Let reporters forward the rest, and end."""
    for reporter in reporters:
        reporter.close()
    end = time.monotonic() + UPLOAD_SECONDS
    while time.monotonic() < end and not all(reporter.has_ended for reporter in reporters):
        time.sleep(0.05)
    for reporter in reporters:
        tell(reporter, screen)
        if not reporter.has_ended:
            screen.say(f"{reporter.name} is still at work, and goes on by itself")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(prog="watch.py", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_ID", help="or a run's folder")
    parser.add_argument("--out-dir", default=os.environ.get("OUT_DIR") or "logs")
    parser.add_argument("--once", action="store_true", help="show the present state, and end")
    parser.add_argument("--plain", action="store_true", help="lines, also in a terminal")
    parser.add_argument("--report-to", default="", help=f"some of {','.join(SINKS)}")
    parser.add_argument("--silent", action="store_true", help="all guards that are not named: off")
    for guard in GUARDS:
        name = f"--{guard.replace('_', '-')}"
        parser.add_argument(name, choices=LEVELS, help=f"default: {DEFAULT_LEVELS[guard]}")
    child = {"nargs": "?", "type": int, "const": os.getppid(), "default": 0, "metavar": "PID"}
    parser.add_argument("--child", **child, help="as the run's process starts it; its number")
    options = parser.parse_args(arguments)
    options.reporters = [name.strip() for name in options.report_to.split(",") if name.strip()]
    if wrong := set(options.reporters) - set(SINKS):
        parser.error(f"--report-to {', '.join(sorted(wrong))}: expected {', '.join(SINKS)}")
    return options


def find_folder(name: str, options: argparse.Namespace) -> Path:
    """Find a run's folder. Raises MetricsError."""
    if options.child:
        return Path(name)
    folder = find_run(name, options.out_dir)
    try:
        load_history(folder)
    except MetricsError:
        with contextlib.suppress(OwnerError):
            if find_owner(folder):
                return folder  # it has only begun
        raise
    return folder


def run_all(options: argparse.Namespace) -> int:
    """Watch the runs that the command line names. Raises MetricsError and OSError."""
    if options.child:
        os.nice(10)  # the run comes first
    levels = {
        guard: getattr(options, guard) or ("off" if options.silent else default)
        for guard, default in DEFAULT_LEVELS.items()
    }
    folders = dict.fromkeys(find_folder(name, options).resolve() for name in options.runs)
    runs = [Watched(folder, levels, options.child) for folder in folders]
    reporters = [Reporter(name, run.folder) for run in runs for name in options.reporters]
    screen = make_screen(options, runs)
    try:
        watch(runs, screen, reporters, options.once)
    finally:
        screen.close()
    finish(reporters, screen)
    return int(not options.once and any(run.has_failed for run in runs))


def main(arguments: list[str]) -> int:
    """Watch runs; returns the exit code: 1 if one has ended without a score."""
    options = parse_arguments(arguments)
    try:
        return run_all(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), 1
        )  # nobody reads; at the exit it would fail again
        return 1
    except (MetricsError, OSError) as error:
        print(f"watch.py: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
