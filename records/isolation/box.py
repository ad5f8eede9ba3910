"""Run a program in a folder of its own, and take from it a bounded amount of bytes.

The program starts as a child of inside.py, in namespaces of its own or without them. What
it prints and what it saves come by pipes. Nothing that it wrote is opened here.
"""

import json
import os
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

INSIDE = Path(__file__).with_name("inside.py")
TAIL = 2**20  # bytes of the console that are kept
CHUNK = 2**16
PAGE = 4096
PATIENCE = 5.0  # seconds for what was ended to be gone
NUMBER = struct.calcsize("<q")
PROBLEMS = {
    -1: "no such file",
    -2: "not a plain file",
    -3: "it is too large",
    -4: "it cannot be read",
}


@dataclass(frozen=True)
class Item:
    """A file that the program finds: its name there, what it holds, when it was written."""

    name: str
    content: bytes | Path
    when: float

    @property
    def size(self) -> int:
        """Its bytes."""
        path = self.content
        return path.stat().st_size if isinstance(path, Path) else len(path)


@dataclass(frozen=True)
class Job:
    """A program, what it finds, and the files that are wanted of it with their largest sizes."""

    command: list[str]
    folder: str
    environment: dict[str, str]
    items: list[Item] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    wanted: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The bytes that all that it finds and all that is wanted take in memory."""
        sizes = [item.size for item in self.items] + [*self.wanted.values()]
        return sum(-(-size // PAGE) * PAGE for size in sizes)

    @property
    def files(self) -> int:
        """The number of all these files."""
        return len(self.items) + len(self.wanted)

    @property
    def most(self) -> int:
        """The most bytes that can rightly come back."""
        return NUMBER + sum(NUMBER + size for size in self.wanted.values())


@dataclass(frozen=True)
class Launch:
    """How to start inside.py: what comes before it, what it inherits, its limits."""

    before: list[str] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    limits: dict[str, int] = field(default_factory=dict)
    apart: bool = False


class Apart(Protocol):
    """Something that prepares a place apart, for as long as a program runs there."""

    def launch(self, size: int, files: int) -> AbstractContextManager[Launch]:
        """Prepare a place with room for so many bytes in so many files."""


@dataclass(frozen=True)
class Ended:
    """What came of a program.

    `code` is None if it was ended, and a negative number names a signal. `console` is the end of
    what it printed. `files` holds the bytes of each wanted file, or why there are none.
    """

    seconds: float
    late: bool
    code: int | None
    console: bytes
    files: dict[str, bytes | str]


def run(job: Job, seconds: float, apart: Apart | None) -> Ended:
    """Run a job for at most so many seconds; without `apart`, with all of the caller's rights."""
    start = time.monotonic()
    with ExitStack() as stack:
        place = apart.launch(job.size, job.files) if apart else nullcontext(Launch())
        launch = stack.enter_context(place)
        source = stack.enter_context(pack(job, launch))
        results, sink = open_pipe(stack)
        console, stdout = open_pipe(stack)
        arguments = [str(source.fileno()), str(sink.fileno())]
        process = subprocess.Popen(
            [*launch.before, sys.executable, "-I", "-S", "-", *arguments],
            cwd="/",
            env=job.environment,
            stdin=stack.enter_context(open(INSIDE, "rb")),
            stdout=stdout,
            stderr=subprocess.STDOUT,
            pass_fds=[source.fileno(), sink.fileno(), *launch.files],
            start_new_session=True,
        )
        stdout.close()
        sink.close()
        listener = Listener(results, console, job.most)
        late = True
        try:
            late = not listener.listen(start + seconds)
        finally:
            end(process, late)
        listener.drain()
    code, files = read_results(bytes(listener.results), job.wanted)
    took = time.monotonic() - start
    return Ended(took, late, None if late else code, bytes(listener.console[-TAIL:]), files)


@contextmanager
def pack(job: Job, launch: Launch) -> Iterator[BinaryIO]:
    """Write what inside.py is to do, and all files, to a file without a name."""
    order = {
        "command": job.command,
        "folder": job.folder,
        "environment": job.environment,
        "folders": job.folders,
        "files": [[item.name, item.size, item.when] for item in job.items],
        "wanted": [*job.wanted.items()],
        "limits": launch.limits,
        "apart": launch.apart,
    }
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps(order).encode() + b"\n")
        for item in job.items:
            if isinstance(item.content, bytes):
                file.write(item.content)
                continue
            with open(item.content, "rb") as content:
                shutil.copyfileobj(content, file)
        file.seek(0)
        yield file


def open_pipe(stack: ExitStack) -> tuple[BinaryIO, BinaryIO]:
    """Make a pipe: the end to read from, which does not wait, and the end to write to."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    ends = os.fdopen(read, "rb", 0), os.fdopen(write, "wb", 0)
    for one in ends:
        stack.enter_context(one)
    return ends


def end(process: subprocess.Popen, late: bool) -> None:
    """End what was started, and its group: all that is in its namespaces ends with it.

    The first process of a namespace is gone when all others in it are, and a launcher waits for it.
    So the launcher is given time to end by itself, once its child is killed or has finished.
    """
    if late:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        with suppress(OSError):  # not every kernel has it
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


class Listener:
    """Reads two pipes: results up to a bound, and the end of the console."""

    def __init__(self, results: BinaryIO, console: BinaryIO, most: int) -> None:
        self.pipes, self.most = {results.fileno(): False, console.fileno(): True}, most
        self.results, self.console = bytearray(), bytearray()

    def take(self, pipe: int) -> bool:
        """Read a part of what is there; tell whether more can come."""
        try:
            part = os.read(pipe, CHUNK)
        except BlockingIOError:
            return True
        if self.pipes[pipe]:
            self.console += part
            if len(self.console) > 2 * TAIL:
                del self.console[:-TAIL]
        else:
            self.results += part
        return bool(part)

    def listen(self, deadline: float) -> bool:
        """Read until the results end or exceed their bound; False if the time was over before."""
        with selectors.DefaultSelector() as selector:
            for pipe in self.pipes:
                selector.register(pipe, selectors.EVENT_READ)
            while len(self.results) <= self.most:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                for key, _ in selector.select(left):
                    more = self.take(key.fd)
                    if not more and not self.pipes[key.fd]:
                        return True
                    if not more:
                        selector.unregister(key.fd)
        return True

    def drain(self) -> None:
        """Read what is left of the console; as long as someone may still print, only so much."""
        pipe = next(pipe for pipe, is_console in self.pipes.items() if is_console)
        for _ in range(2 * TAIL // CHUNK):
            before = len(self.console)
            if not self.take(pipe) or len(self.console) == before:
                return


def read_results(data: bytes, wanted: dict[str, int]) -> tuple[int | None, dict[str, bytes | str]]:
    """Read the status and the files; of a form that is not the agreed one, nothing is believed."""
    if len(data) < NUMBER:
        return None, {}
    code, at = struct.unpack_from("<q", data)[0], NUMBER
    files: dict[str, bytes | str] = {}
    for name, most in wanted.items():
        if len(data) < at + NUMBER:
            files[name] = "it was not handed over"
            continue
        size = struct.unpack_from("<q", data, at)[0]
        at += NUMBER
        if size < 0:
            files[name] = PROBLEMS.get(size, "it cannot be read")
        elif size > most or at + size > len(data):
            files[name] = "it was not handed over"
        else:
            files[name] = data[at : at + size]
            at += size
    return code, files
