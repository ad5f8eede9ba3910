"""Faults planted into train_gpt, and ranks that are forked with faults of their own.

    python tests/faults.py JOBS.json     runs each job's ranks; the answer is a file for each rank

A process that has imported train_gpt forks the ranks of a job, which saves their imports. A fault
is a function of this file that is given `patch` (setattr, or monkeypatch.setattr) and arguments.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import train_gpt  # noqa: E402

Patch = Callable[[object, str, object], None]
NOW = SimpleNamespace(step=-1)  # the training step that runs


class PoisonedGradient(torch.autograd.Function):
    """Passes on what it is given; of the gradient, one element is lost."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad.view(-1)[0] = ctx.value
        return grad, None


def around_steps(patch: Patch, before: Callable, after: Callable) -> None:
    """Call before(trainer, step) and after(trainer, step) around every training step."""
    step = train_gpt.Trainer.step

    def watched(self, number, elapsed, **options):
        NOW.step = number
        before(self, number)
        loss = step(self, number, elapsed, **options)
        after(self, number)
        return loss

    patch(train_gpt.Trainer, "step", watched)


def bad_number(patch: Patch, module: str, kind: str, steps: list[int], value: str = "nan") -> None:
    """In these steps, an element of a module's output, or of its gradient, is not finite."""
    hooked = []

    def spoil(_, __, output):
        if NOW.step not in steps:
            return output
        if kind == "gradient":
            return PoisonedGradient.apply(output, float(value))
        mask = torch.zeros(output.numel(), device=output.device)
        mask[0] = float(value)
        return output + mask.view_as(output)

    def hook(trainer, _):
        if not hooked:
            hooked.append(trainer.model.get_submodule(module).register_forward_hook(spoil))

    around_steps(patch, hook, lambda trainer, step: None)


def bad_batch(patch: Patch, module: str, step: int) -> None:
    """The batch of a step, whenever it is computed, makes a module's output not finite."""
    forward, bad, hooked, reading = train_gpt.GPT.forward, [], [], SimpleNamespace(it=False)

    def spoil(_, __, output):
        return output * float("nan") if reading.it else output

    def look(self, inputs, targets):
        if NOW.step == step and torch.is_grad_enabled():
            bad.append(inputs)
        reading.it = any(inputs.shape == b.shape and torch.equal(inputs, b) for b in bad)
        return forward(self, inputs, targets)

    def hook(trainer, _):
        if not hooked:
            hooked.append(trainer.model.get_submodule(module).register_forward_hook(spoil))

    patch(train_gpt.GPT, "forward", look)
    around_steps(patch, hook, lambda trainer, step: None)


def little_memory(patch: Patch, rows: int, message: str = "", calls: int = 10**9) -> None:
    """The first forward passes with more than so many rows run out of memory."""
    forward, seen = train_gpt.GPT.forward, []

    def limited(self, inputs, targets):
        if self.training and torch.is_grad_enabled() and inputs.size(0) > rows:
            seen.append(1)
            if len(seen) <= calls:
                if message:
                    raise RuntimeError(message)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, inputs, targets)

    patch(train_gpt.GPT, "forward", limited)


def stand_still(patch: Patch, step: int, seconds: float) -> None:
    """At a step, the process is stopped for a while by SIGSTOP."""

    def stop(_, number):
        if number == step:
            waker = f"sleep {seconds}; kill -CONT {os.getpid()}"
            subprocess.Popen(["/bin/sh", "-c", waker], start_new_session=True)
            os.kill(os.getpid(), signal.SIGSTOP)

    around_steps(patch, stop, lambda trainer, step: None)


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of all bits."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def fingerprint(trainer) -> dict[str, str]:
    """The digest of the weights and of each kind of optimizer state."""
    kinds = {"weights": [p for _, p in trainer.model.named_parameters()]}
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            for kind, tensor in state.items():
                kinds.setdefault(kind, []).append(tensor)
    return {kind: digest(tensors) for kind, tensors in kinds.items()}


def fingerprints(patch: Patch) -> list[dict[str, str]]:
    """A list that grows: the fingerprint before the first step, and after each one."""
    found = []

    def first(trainer, _):
        if not found:
            found.append(fingerprint(trainer))

    around_steps(patch, first, lambda trainer, _: found.append(fingerprint(trainer)))
    return found


def owned(patch: Patch) -> dict[str, dict[str, int]]:
    """A dict that is filled: the elements of optimizer state kept here, by parameter and kind."""
    found = {}

    def look(trainer, _):
        found.clear()
        names = {p: name for name, p in trainer.model.named_parameters()}
        for optimizer in trainer.optimizers:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            assert len(held) == len(set(held))
            assert set(held) == set(optimizer.state)
            assert not found.keys() & {names[p] for p in held}
            for p, state in optimizer.state.items():
                found[names[p]] = {kind: tensor.numel() for kind, tensor in state.items()}

    around_steps(patch, lambda trainer, step: None, look)
    return found


# ---- ranks


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def be_rank(job: dict, rank: int, port: int) -> int:
    """Run train_gpt.main as one rank of a job, with its faults; the exit code."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["nproc"]}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if job["nproc"] > 1:
        os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= job["env"]
    answer = {"rc": 0, "error": "", "kind": ""}
    for name, at, *arguments in job["faults"]:
        if at in (rank, None):
            globals()[name](setattr, *arguments)
    answer |= {"prints": fingerprints(setattr), "owned": owned(setattr)}
    with open(f"{job['answer']}.{rank}.log", "w", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            answer["rc"] = train_gpt.main([]) or 0
            if train_gpt.dist.is_initialized():
                train_gpt.dist.barrier()
        except BaseException as error:
            traceback.print_exc()
            answer |= {"rc": 1, "error": str(error), "kind": type(error).__name__}
    Path(f"{job['answer']}.{rank}.json").write_text(json.dumps(answer))
    return answer["rc"]


def run_job(job: dict) -> None:
    """Fork a job's ranks and wait for them; the first that fails takes the others down."""
    port, living = free_port(), {}
    for rank in range(job["nproc"]):
        if (pid := os.fork()) == 0:
            os._exit(be_rank(job, rank, port))
        living[pid] = rank
    deadline, failed = time.monotonic() + 100, 0.0
    while living:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in living:
            failed = failed or (time.monotonic() if status else 0.0)
            del living[pid]
        elif time.monotonic() > deadline or (failed and time.monotonic() > failed + 15):
            for left in living:
                os.kill(left, signal.SIGKILL)
        time.sleep(0.02)


def forked(folder: Path, jobs: dict[str, dict]) -> dict[str, list[dict]]:
    """Run jobs, each {nproc, env, faults}; the answers of their ranks, with their output as log."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = [{"faults": [], **job, "answer": str(folder / name)} for name, job in jobs.items()]
    (folder / "jobs.json").write_text(json.dumps(todo))
    basic = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    command = [sys.executable, __file__, str(folder / "jobs.json")]
    subprocess.run(command, env={**basic, "OMP_NUM_THREADS": "1"}, check=True, timeout=200)
    answers = {}
    for name, job in jobs.items():
        answers[name] = []
        for rank in range(job["nproc"]):
            path = folder / f"{name}.{rank}.json"
            killed = {"rc": -9, "error": "killed", "kind": "", "prints": [], "owned": {}}
            answer = json.loads(path.read_text()) if path.exists() else killed
            log = (folder / f"{name}.{rank}.log").read_text()
            answers[name].append(answer | {"log": log})
    return answers


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports what every rank will need
    for planned in json.loads(Path(sys.argv[1]).read_text()):
        run_job(planned)
