"""Real runs of train_gpt.py that start at once: forked from a process that has PyTorch loaded.

Each is a process of its own that executes the script as `python train_gpt.py` would, with its own
environment, output and exit code. "Faults" happen inside it at exact moments: a fault is
{"at": "os.replace", "nth": 1, "part": "checkpoint_", "do": "kill"}: before the first call of
os.replace one of whose arguments has "checkpoint_" in it, it kills itself. With a file for a
report, train_gpt is imported instead, and faults are those of faults.py: ["bad_number", ...].
"""

import functools
import gc
import importlib
import json
import os
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"
LIMIT = 60  # seconds after which a run is killed

Fault = dict[str, object] | list[object]

# All techniques at once, at a size that takes a step of 20 ms.
TECHNIQUES = {
    **{"MODEL_DIM": 32, "TRAIN_SEQ_LEN": 32, "TRAIN_BATCH_TOKENS": 256, "ITERATIONS": 8},
    **{"WARMDOWN_ITERS": 4, "VAL_TOKENS": 300, "VAL_LOSS_EVERY": 2, "WARMUP_STEPS": 1},
    **{"EMA_DECAY": 0.8, "MUON_WD": 0.1, "ADAM_WD": 0.1, "EMBED_WD": 0.1, "GRAD_CLIP_NORM": 0.1},
    **{"TIE_EMBEDDINGS": 0, "SMEAR_GATE": 1, "BIGRAM_BUCKETS": 64, "BIGRAM_DIM": 16},
    **{"XSA_LAST_N": 1, "ROPE_DIMS": 4, "LN_SCALE": 1, "ORTHO_INIT": 1},
    **{"MLP_ACT": "leaky_relu2", "MUON_MOMENTUM_WARMUP_STEPS": 6},
}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Program:
    """A run of the script: `returncode` is negative for the signal that killed it."""

    server: "Server"
    pid: int
    printed: Path
    returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None:
            self.returncode = self.server.ask({"poll": self.pid})
        return self.returncode

    def wait(self) -> "Program":
        """Wait until it has ended."""
        self.until(lambda: self.poll() is not None)
        return self

    def until(self, happened: Callable[[], object]) -> None:
        """Wait until something has happened."""
        end = time.monotonic() + LIMIT
        while not happened():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise TimeoutError(self.output)
            time.sleep(0.02)

    def send(self, number: int) -> None:
        """Send it a signal, if it lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def output(self) -> str:
        """What it has printed, errors too."""
        return self.printed.read_text(encoding="utf-8")


class Server:
    """The process that the runs are forked from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], env=env, cwd=folder, **pipes)

    def ask(self, request: dict[str, object]) -> int | None:
        """Send a request, and return the answer."""
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server has ended: {self.process.wait()}")
        return json.loads(answer)

    def start(
        self, env: dict[str, str], *faults: Fault, script: Path = SCRIPT, report: str = ""
    ) -> Program:
        """Start a script, train_gpt.py unless told, in an environment of `env` alone."""
        self.count += 1
        printed = self.folder / f"printed_{self.count}.txt"
        printed.touch()
        basic = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "OMP_NUM_THREADS": "1"}
        request = {"env": basic | env, "faults": faults, "printed": str(printed)}
        request |= {"script": str(script), "report": report}
        return Program(self, self.ask(request), printed)

    def ranks(
        self, env: dict[str, str], *faults: list[Fault], script: Path = SCRIPT, report: str = ""
    ) -> list[Program]:
        """Start one process a rank, each with its list of faults, as torchrun would; the report of
        rank 1 is the file <report>.1.json."""
        port, runs = str(free_port()), []
        for rank, own in enumerate(faults):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(faults))}
            if len(faults) > 1:
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            file = report and f"{report}.{rank}.json"
            runs.append(self.start(env | place, *own, script=script, report=file))
        return runs

    def call(self, command: list[str], env: dict[str, str], cwd: Path) -> tuple[int, str, str]:
        """Run a script with arguments to its end: exit code, what it printed, and its errors."""
        self.count += 1
        files = [self.folder / f"{name}_{self.count}.txt" for name in ("printed", "errors")]
        script, *arguments = command
        request = {"env": env, "faults": [], "script": script, "report": "", "cwd": str(cwd)}
        request |= {"arguments": arguments, "printed": str(files[0]), "errors": str(files[1])}
        program = Program(self, self.ask(request), files[0]).wait()
        printed, errors = (file.read_text(encoding="utf-8") for file in files)
        return program.returncode, printed, errors

    def run(self, env: dict[str, str], *faults: Fault) -> Program:
        """Run the script to its end."""
        return self.start(env, *faults).wait()

    def close(self) -> None:
        """End the server."""
        self.process.stdin.close()
        self.process.wait()


def loss_lines(text: str) -> list[str]:
    """The lines with losses without their times, each once: those of a step that was repeated after
    an interruption must be the same, and the last of them counts."""
    found = re.findall(r"^(step:\d+\S* .*?|final_\S+_exact .*)(?: train_time.*)?$", text, re.M)
    return list(dict.fromkeys(found))


# ---- in the server


def do(action: str) -> None:
    """What happens at a fault."""
    if action == "full":
        raise OSError(28, "No space left on device")
    if action == "unsupported":
        raise OSError(95, "Operation not supported")
    if action.startswith("fill "):  # a disk, but for some bytes
        _, folder, spare = action.split()
        for path in (p for p in Path(folder).rglob("*") if p.suffix in (".txt", ".jsonl")):
            with open(path, "a") as file:  # their last pages have no room either
                file.write("\n" * (-path.stat().st_size % 4096))
        disk = os.statvfs(folder)
        with open(Path(folder, "ballast"), "wb", buffering=0) as file:
            left = disk.f_bavail * disk.f_frsize - int(spare)
            os.posix_fallocate(file.fileno(), 0, left)
        return
    if action.startswith("hold "):  # until a file is there
        path, end = Path(action.removeprefix("hold ")), time.monotonic() + LIMIT
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.02)
        return
    if action.startswith("draw "):  # a random number, into a file
        import torch

        with open(action.removeprefix("draw "), "a") as file:
            print(torch.rand(()).item(), file=file)
        return
    for word in action.split():
        if word == "pause":
            time.sleep(2.1)
        else:
            os.kill(os.getpid(), signal.Signals[word])


def plant(at: str, do_what: str, nth: int = 1, part: str = "") -> None:
    """Make something happen before the nth call, or with nth=0 every call, of a function."""
    path, name = at.rsplit(".", 1)
    module = path.split(".")[0]
    owner = functools.reduce(getattr, path.split(".")[1:], importlib.import_module(module))
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def replacement(*args: object, **kwargs: object) -> object:
        files = [os.readlink(f"/proc/self/fd/{a}") for a in args if type(a) is int]
        if part in " ".join([*map(str, args), *files] if part else []):
            calls.append(1)
            if nth in (0, len(calls)):
                do(do_what)
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def tick() -> None:
    """Replace the clock by one that moves on by a second at each look."""
    seconds: Iterator[float] = iter(map(float, range(10**9)))
    time.perf_counter = lambda: next(seconds)


def plant_all(faults: list[dict]) -> None:
    """Make all faults of a run happen."""
    for fault in faults:
        if fault["do"] == "tick":
            tick()
        elif fault["do"].startswith("ignore "):
            signal.signal(signal.Signals[fault["do"].removeprefix("ignore ")], signal.SIG_IGN)
        elif fault["do"].startswith("limit "):
            limit = int(fault["do"].removeprefix("limit "))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        else:
            plant(fault["at"], fault["do"], fault.get("nth", 1), fault.get("part", ""))


def execute(request: dict) -> int:
    """Run the script, or import it and report what it does; the exit code."""
    if request["report"]:
        from faults import main_with_faults

        return main_with_faults(request["faults"], Path(request["report"]))
    sys.argv = [request["script"], *request.get("arguments", [])]
    sys.path[0] = str(Path(request["script"]).parent)
    plant_all(request["faults"])
    runpy.run_path(request["script"], run_name="__main__")
    return 0


def become_the_script(request: dict) -> None:
    """What a forked process does."""
    printed, errors = request["printed"], request.get("errors", request["printed"])
    files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (printed, errors)]
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (files[0], 1), (files[1], 2)):
        os.dup2(source, target)
    os.chdir(request.get("cwd", "."))
    os.environ.clear()
    os.environ.update(request["env"])
    code = 1
    try:
        code = execute(request)
    except SystemExit as end:
        code = 1 if isinstance(end.code, str) else end.code or 0
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def serve() -> None:
    """Answer requests: start a run and say its process id; say how one ended."""
    import numpy.ma  # noqa: F401
    import sentencepiece  # noqa: F401
    import torch.distributed
    import torch.nn.attention
    import torch.utils.serialization
    import zstandard  # noqa: F401

    torch.set_num_threads(1)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports what it needs
    gc.freeze()  # no page of these modules needs to be copied
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                become_the_script(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
