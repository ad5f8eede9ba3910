"""Show runs of train_gpt.py on one page of HTML, which needs no network.

    python lab/report.py RUN_ID [RUN_ID ...]
    python lab/report.py RUN_ID --serve

Curves of all runs lie over each other; docs/report.md says what else is on the page.
"""

import argparse
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import report_artifact
import report_facts
from metrics import NAME, History, MetricsError, find_run, load_history
from report_artifact import Artifact, ArtifactError, Part
from report_curves import curves

HERE = Path(__file__).resolve().parent
PORT = 8321
POLL_SECONDS = 2
COLORS = 8  # that the page's style sheet has


class ReportError(Exception):
    """What the user can put right, in one line."""


@dataclass
class Weights:
    """What is known of a run's artifact, and why the rest is not."""

    parts: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: dict[str, float | None] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Count the bytes of all parts."""
        return sum(part.total for part in self.parts)


def inspect(folder: Path, tokenizer: str) -> Weights:
    """Look into a run's artifact, as far as that is possible."""
    found = Weights()
    try:
        found.parts = Artifact(folder / "final_model.artifact").parts()
    except ArtifactError as error:
        found.notes.append(f"no table of bytes: {error}")
        return found
    try:
        found.errors = report_artifact.errors(folder, tokenizer)
    except ArtifactError as error:
        found.notes.append(f"no quantization error: {error}")
    for part in found.parts:
        part.error = found.errors.get(part.name)
    return found


def stamp(path: Path) -> tuple[int, ...]:
    """Tell a version of a file from others; empty if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_ino, status.st_size, status.st_mtime_ns)


class RunFolder:
    """One run on the page. Reads again what has changed. Raises MetricsError or OSError."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.seen: tuple[Any, ...] = ()
        self.weights = Weights()

    @property
    def path(self) -> Path:
        """Name the file of events."""
        return self.folder / NAME

    def stamps(self) -> list[tuple[int, ...]]:
        """Tell the versions of all files that the page shows."""
        names = (NAME, "samples.jsonl", "final_model.artifact", "final_model.pt")
        return [stamp(self.folder / name) for name in names]

    def tokenizer(self, history: History) -> str:
        """Name the tokenizer of the run, or the one that the environment gives."""
        own = history.settings.get("tokenizer_path", "")
        return os.environ.get("TOKENIZER_PATH") or str(own)

    def look(self, history: History) -> Weights:
        """Look into the artifact; again only when a file of weights is another one."""
        if not history.final:
            return Weights(notes=["no artifact has been scored yet"])
        files = [self.folder / name for name in ("final_model.artifact", "final_model.pt")]
        seen = tuple(map(stamp, files))
        if seen != self.seen:
            self.weights = inspect(self.folder, self.tokenizer(history))
            self.seen = seen
        return self.weights

    def troubles(self, history: History, weights: Weights) -> list[str]:
        """List what went wrong in the run, or with its files."""
        lines = report_facts.problems(history)
        damaged = report_facts.damaged_lines(self.path)
        if damaged:
            lines.append(f"{damaged} of the lines of {NAME} are damaged; what they held is missing")
        final = history.final or {}
        size = final.get("artifact_bytes")
        if weights.parts and size != weights.size:
            lines.append(f"the artifact has {weights.size} bytes, but the one scored had {size}")
        return lines


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Name runs by their folders; by their paths, where those have the same name."""
    names = [folder.resolve().name for folder in folders]
    twice = len(set(names)) < len(names)
    return [str(folder) for folder in folders] if twice else names


@cache
def templates() -> Any:
    """Load the page's templates. Raises ReportError."""
    try:
        import jinja2
    except ImportError:
        raise ReportError("no package jinja2; run 'pip install jinja2'") from None
    loader = jinja2.FileSystemLoader(HERE)
    options = {"autoescape": True, "keep_trailing_newline": True}
    return jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **options)


@cache
def plotly_js() -> str:
    """Give the code of plotly.js. Raises ReportError."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ReportError("no package plotly; run 'pip install plotly'") from None
    return get_plotlyjs()


def json_text(value: Any) -> str:
    """Write JSON that may stand in a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


class Report:
    """The page of some runs, as it is now."""

    def __init__(self, folders: Sequence[Path]) -> None:
        names = unique_names(folders)
        self.runs = [RunFolder(*pair) for pair in zip(folders, names, strict=True)]
        self.lock = threading.Lock()
        self.seen: list[Any] = []
        self.parts: dict[str, Any] = {}

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Give the settings' defaults; none, where train_gpt.py cannot be imported."""
        try:
            fields = report_artifact.trainer().FIELDS
        except ArtifactError:
            return {}
        return {name.lower(): field.default for name, field in fields.items()}

    def settings(self, histories: Sequence[History]) -> dict[str, Any]:
        """Make the table of settings: those that differ between runs, or from the defaults."""
        values = [history.settings for history in histories]
        heads = [run.name for run in self.runs]
        if len(values) == 1:
            known = {name: self.defaults.get(name, "–") for name in values[0]}
            values.append(known)
            heads.append("default")
        return {"heads": heads, "rows": report_facts.differing(values)}

    def current(self) -> dict[str, Any]:
        """Give the parts of the page, made anew if a file has changed: HTML and charts' data."""
        with self.lock:
            seen = [run.stamps() for run in self.runs]
            if seen != self.seen:
                self.parts = self.build()
                self.seen = seen
            return self.parts

    def build(self) -> dict[str, Any]:
        """Make the parts of the page."""
        shown = []
        charts = []
        histories = []
        for run in self.runs:
            history = load_history(run.folder)
            weights = run.look(history)
            histories.append(history)
            shown.append(
                {
                    "card": report_facts.card_of(run.name, history, run.path),
                    "weights": weights,
                    "troubles": run.troubles(history, weights),
                    "samples": report_facts.read_samples(run.folder / "samples.jsonl"),
                }
            )
            tensors = [asdict(part) | {"total": part.total} for part in weights.parts]
            charts.append({"name": run.name, "tensors": tensors, **curves(history)})
        context = {"runs": shown, "settings": self.settings(histories), "colors": COLORS}
        render = templates().get_template
        parts = {
            "top": render("report_top.html.j2").render(context),
            "bottom": render("report_bottom.html.j2").render(context),
            "runs": charts,
        }
        digest = hashlib.sha256(json_text(parts).encode()).hexdigest()
        return parts | {"version": digest[:16]}

    def page(self, poll: float = 0.0) -> bytes:
        """Write the page; one that asks its server for news every `poll` seconds, if not 0."""
        parts = self.current()
        html = templates().get_template("report_page.html.j2")
        charts = {name: parts[name] for name in ("runs", "version")}
        text = html.render(
            title=", ".join(run.name for run in self.runs),
            top=parts["top"],
            bottom=parts["bottom"],
            data=json_text(charts | {"poll": poll}),
            plotly=plotly_js(),
        )
        return text.encode("utf-8", "backslashreplace")


def write(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all. Raises ReportError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ReportError(f"{path}: cannot be written: {error.strerror}") from None


class Handler(BaseHTTPRequestHandler):
    """Answer a browser on this machine: the page, and what is new of it."""

    report: Report
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer a request. Another site's name for this address gets nothing (DNS rebinding)."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        place, _, query = self.path.partition("?")
        if host not in ("127.0.0.1", "localhost"):
            self.answer(403, b"only for this machine\n", "text/plain")
            return
        try:
            if place == "/":
                self.answer(200, self.report.page(POLL_SECONDS), "text/html")
            elif place == "/data.json":
                self.news(query)
            else:
                self.answer(404, b"not here\n", "text/plain")
        except (MetricsError, OSError) as error:
            self.answer(503, f"{error}\n".encode("utf-8", "backslashreplace"), "text/plain")

    def news(self, version: str) -> None:
        """Send what is on the page, unless the browser has that version."""
        parts = self.report.current()
        if parts["version"] == version:
            self.answer(204, b"", "application/json")
        else:
            self.answer(200, json_text(parts).encode(), "application/json")

    def answer(self, status: int, body: bytes, kind: str) -> None:
        """Send an answer; a browser that is gone does not matter."""
        with suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing of each request."""


def serve(report: Report, port: int) -> None:
    """Serve the page to this machine alone, until Ctrl-C. Raises ReportError."""
    kind = type("ReportHandler", (Handler,), {"report": report})
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), kind)
    except OverflowError:
        raise ReportError(f"--serve {port}: a port is 0 to 65535") from None
    except OSError as error:
        raise ReportError(f"--serve {port}: {error.strerror}; try another port") from None
    server.daemon_threads = True
    with server:
        print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends)", flush=True)
        server.serve_forever()


def main(arguments: Sequence[str]) -> None:
    """Write or serve the page. Raises MetricsError or ReportError."""
    about, _, more = (__doc__ or "").partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("report.py", None, about, more, formatter_class=form)
    parser.add_argument("runs", nargs="+", metavar="RUN_ID", help="or a run's folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN_ID's report.html")
    text = f"show it on 127.0.0.1 (port {PORT}) and update it while the runs go on"
    parser.add_argument("--serve", nargs="?", type=int, const=PORT, metavar="PORT", help=text)
    options = parser.parse_args(arguments)
    out_dir = os.environ.get("OUT_DIR", "logs")
    folders = [find_run(name, out_dir) for name in dict.fromkeys(options.runs)]
    report = Report(folders)
    out = options.out
    if out or options.serve is None:
        out = out or folders[0] / "report.html"
        page = report.page()
        write(out, page)
        print(f"{out}  ({len(page) / 1e6:.1f} MB, of which plotly.js {len(plotly_js()) / 1e6:.1f})")
    if options.serve is not None:
        report.page()
        serve(report, options.serve)


def run(start: Callable[[Sequence[str]], None]) -> int | str:
    """Run the tool, and give the exit code or what went wrong."""
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        start(sys.argv[1:])
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
    except (MetricsError, ReportError, OSError) as error:
        return f"report.py: error: {error}"
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
