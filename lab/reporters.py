"""Forward a run's events to wandb, tensorboard, trackio or aim: reporters.py NAME FOLDER.

lab/watch.py starts one such process for each name of --report-to. So what a reporter does, be it
that it hangs, fails or is not installed, stops nothing else. What its library prints goes to
FOLDER/report_NAME.log; FOLDER/report_NAME.json says how far it came and under which id, so that a
resumed run, or another watcher, goes on with the same one.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from metrics import NAME, STEPPED, Event, Tail, number, parse

NOT_FORWARDED = ("event", "step")
PROJECT = "birdie"


class Sink(Protocol):
    """Take the figures of one run."""

    id: str  # under which the same run can be opened again

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the figures of a step."""

    def resume(self, step: int) -> None:
        """Forget what was logged after a step, from which the run goes on."""

    def close(self, summary: dict[str, float]) -> None:
        """Write all; the summary is the score of the artifact, if there is one."""


class Wandb:
    """Send to Weights & Biases."""

    def __init__(self, folder: Path, run_id: str, config: dict[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or folder.name,
            id=run_id or None,
            dir=str(folder),
            resume="allow",
            config=config,
            settings=settings,
        )
        self.run.define_metric("*", step_metric="step")
        self.id = self.run.id

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the figures of a step; those of a step that is repeated come later, and count."""
        self.run.log({"step": step, **values})

    def resume(self, step: int) -> None:
        """Do nothing: the axis is a figure of its own, which may go back."""

    def close(self, summary: dict[str, float]) -> None:
        """Write all, which may need the network."""
        self.run.summary.update(summary)
        self.run.finish()


class TensorBoard:
    """Write an event file into FOLDER/tensorboard."""

    def __init__(self, folder: Path, run_id: str, config: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.new_event = Event
        self.session = SessionLog
        self.new_summary = Summary
        self.id = run_id or f"{time.time():.0f}"
        self.writer = EventFileWriter(str(folder / "tensorboard" / self.id))
        if not run_id:
            table = "\n".join(f"| {name} | {value} |" for name, value in config.items())
            self.write(0, summary=text_pb("settings", f"| setting | value |\n|---|---|\n{table}"))

    def write(self, step: int, **content: Any) -> None:
        """Write a record."""
        self.writer.add_event(self.new_event(wall_time=time.time(), step=step, **content))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the figures of a step."""
        scalars = [self.new_summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self.write(step, summary=self.new_summary(value=scalars))

    def resume(self, step: int) -> None:
        """Let TensorBoard drop what comes after a step."""
        start = self.session(status=self.session.START)
        self.write(step + 1, session_log=start)

    def close(self, summary: dict[str, float]) -> None:
        """Write all; the score is among the figures already."""
        self.writer.close()


class Trackio:
    """Write to trackio's own folder (TRACKIO_DIR)."""

    def __init__(self, folder: Path, run_id: str, config: dict[str, Any]) -> None:
        import trackio

        self.id = run_id or f"{folder.name}-{time.time():.0f}"
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        quiet = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        self.run = trackio.init(
            project=project, name=self.id, config=config, resume="allow", **quiet
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the figures of a step."""
        self.run.log(values, step=step)

    def resume(self, step: int) -> None:
        """Do nothing: figures of a step that is repeated are kept beside the old ones."""

    def close(self, summary: dict[str, float]) -> None:
        """Write all; the score is among the figures already."""
        self.run.finish()


class Aim:
    """Write to an Aim repository: AIM_REPO, or else the folder of the run's folder."""

    def __init__(self, folder: Path, run_id: str, config: dict[str, Any]) -> None:
        import aim

        repo = os.environ.get("AIM_REPO") or str(folder.parent)
        self.run = aim.Run(
            run_hash=run_id or None,
            repo=aim.Repo.from_path(repo, init=True) if "://" not in repo else repo,
            experiment=os.environ.get("AIM_EXPERIMENT") or PROJECT,
            force_resume=bool(run_id),
            system_tracking_interval=None,
            capture_terminal_logs=False,
        )
        self.run.name = folder.name
        self.run["settings"] = config
        self.id = self.run.hash

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the figures of a step; Aim takes no infinite ones."""
        for name, value in values.items():
            if math.isfinite(value):
                self.run.track(value, name=name, step=step)

    def resume(self, step: int) -> None:
        """Do nothing: figures of a step that is repeated take the place of the old ones."""

    def close(self, summary: dict[str, float]) -> None:
        """Write all; the score is among the figures already."""
        self.run.close()


SINKS = {"wandb": Wandb, "tensorboard": TensorBoard, "trackio": Trackio, "aim": Aim}


def figures(event: Event) -> dict[str, float]:
    """Give the numbers of an event by their names.

    Those of `train` and `val` have the names that docs/logs.md gives them, and others have that of
    the event before them.
    """
    kind = event["event"]
    prefix = "" if kind in ("train", "val") else f"{kind}_"
    if kind not in (*STEPPED, "final"):
        return {}
    numbers = {k: v for k, v in event.items() if isinstance(v, int | float)}
    return {f"{prefix}{k}": number(event, k) for k in numbers if k not in NOT_FORWARDED}


class Forwarder:
    """Forward the last run in a folder, and those that follow it.

    A run is the events from its `start` on; if a `resume` follows, it is the run before that goes
    on. So what belongs to whom is known only at the first step.
    """

    def __init__(self, folder: Path, make: Callable[..., Sink], state_path: Path) -> None:
        self.folder = folder
        self.make = make
        self.state_path = state_path
        self.tail = Tail(folder / NAME)
        self.sink: Sink | None = None
        self.opened = 0  # the run that the sink takes, by the number of its first `start`
        self.restart()

    def restart(self) -> None:
        """Begin at the first event."""
        self.count = 0  # events so far
        self.sent = 0
        self.starts = 0
        self.run = 0
        self.batch: list[tuple[int, Event]] = []  # what is not forwarded yet
        self.earlier = (0, self.batch)
        self.config: dict[str, Any] = {}
        self.summary: dict[str, float] = {}
        self.step = 0

    def look(self, is_last: bool = False) -> None:
        """Forward what is new; at last, a last line without its end too. Raises OSError."""
        place = self.tail.identity
        events = self.tail.read()
        if place not in ((0, 0), self.tail.identity):
            self.close()  # another file has come
            self.restart()
        last = parse(self.tail.rest) if is_last else None
        for event in [*events, last] if last else events:
            self.take(event)
        if any(event["event"] in (*STEPPED, "final") for _, event in self.batch):
            self.send()

    def take(self, event: Event) -> None:
        """Take in an event."""
        self.count += 1
        kind = event["event"]
        if kind == "start":
            if self.sink:
                self.send()
            self.starts += 1
            self.earlier = (self.run, self.batch)
            self.run = self.starts
            self.batch = []
            settings = event.get("settings")
            self.config = dict(settings) if isinstance(settings, dict) else {}
        elif kind == "resume" and self.earlier[0]:
            self.run, batch = self.earlier
            self.batch = [*batch, *self.batch]
        elif kind == "model":
            self.config |= {k: v for k, v in event.items() if k != "event"}
        self.batch.append((self.count, event))

    def send(self) -> None:
        """Forward what has gathered, to the sink of its run."""
        if self.opened != self.run:
            self.close()
            self.open()
        for place, event in self.batch:
            if place > self.sent:
                self.send_event(event)
                self.sent = place
        self.batch = []
        if self.sink:
            self.save()

    def send_event(self, event: Event) -> None:
        """Forward an event."""
        if event["event"] == "resume" and math.isfinite(number(event, "step")):
            self.sink.resume(int(event["step"]))
        values = figures(event)
        if not values:
            return
        step = number(event, "step")
        self.step = int(step) if math.isfinite(step) else self.step
        if event["event"] == "final":
            self.summary = values
        self.sink.log(self.step, values)

    def open(self) -> None:
        """Open the sink of a run, or open it again, where it was left."""
        state: Any = {}
        with contextlib.suppress(OSError, ValueError):
            state = json.loads(self.state_path.read_text())
        known = isinstance(state, dict) and state.get("run") == self.run
        known = known and isinstance(state.get("id"), str)
        self.sent = int(number(state, "sent")) if known else 0
        if self.sent > self.count:  # of a longer file
            known = False
            self.sent = 0
        self.summary = {}
        self.sink = self.make(self.folder, state["id"] if known else "", self.config)
        self.opened = self.run

    def save(self) -> None:
        """Note how far it is. Raises OSError."""
        state = {"run": self.run, "id": self.sink.id, "sent": self.sent}
        part = self.state_path.with_suffix(".partial")
        part.write_text(json.dumps(state))
        part.replace(self.state_path)

    def close(self) -> None:
        """Close the sink, if there is one."""
        if self.sink:
            self.sink.close(self.summary)
        self.sink = None
        self.opened = 0


# ===================================== AS A PROCESS =====================================


class Reporter:
    """Run a reporter as a process of its own, which follows the run until `close`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, __file__, name, str(folder), "--follow"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is not for it
        )
        os.set_blocking(self.process.stdout.fileno(), False)

    def messages(self) -> list[str]:
        """Give what it has said since the last time."""
        data = self.process.stdout.read() or b""
        return data.decode(errors="replace").splitlines()

    def close(self) -> None:
        """Let it forward the rest, and end; it goes on by itself if nobody waits."""
        self.process.stdin.close()

    @property
    def has_ended(self) -> bool:
        """Tell whether it has ended."""
        return self.process.poll() is not None


def follow(forwarder: Forwarder) -> None:
    """Forward until nobody holds the other end of stdin."""
    while True:
        forwarder.look()
        ready, _, _ = select.select([sys.stdin], [], [], 1.0)
        if ready and not os.read(sys.stdin.fileno(), 4096):
            return


def take_console(path: Path) -> Any:
    """Send what libraries print to a file; return the console. Raises OSError.

    The file is locked, so that an event is forwarded once.
    """
    log = open(path, "a", encoding="utf-8")  # noqa: SIM115
    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    console = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
    sys.stdout.flush()
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    return console


def forward(name: str, folder: Path, follows: bool) -> None:
    """Forward a run's events, to its end or as long as it is followed."""
    forwarder = Forwarder(folder, SINKS[name], folder / f"report_{name}.json")
    if follows:
        follow(forwarder)
    forwarder.look(is_last=True)
    forwarder.close()


def why(name: str, error: BaseException) -> str:
    """Say in one line why a reporter does not work."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: pip install {error.name}"
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".")


def main(arguments: list[str]) -> int:
    """Forward a run, and say in one line what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=SINKS)
    parser.add_argument("folder", type=Path, help="a run's folder")
    parser.add_argument("--follow", action="store_true", help="until stdin is closed")
    options = parser.parse_args(arguments)
    path = options.folder / f"report_{options.name}.log"
    try:
        console = take_console(path)
    except BlockingIOError:
        print(f"{options.name}: another process forwards this run already", flush=True)
        return 1
    except OSError as error:
        print(f"{options.name}: {path}: {error.strerror}", flush=True)
        return 1
    sys.path = sys.path[1:]  # no library is to find a module of lab/ by mistake
    try:
        forward(options.name, options.folder, options.follow)
    except KeyboardInterrupt:
        return 130
    except (Exception, SystemExit) as error:
        with contextlib.suppress(OSError):
            print(f"{options.name}: {why(options.name, error)}", file=console, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)
