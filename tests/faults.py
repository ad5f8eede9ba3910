"""Faults planted into train_gpt, and ranks that have faults of their own.

A fault is a function of this file that is given `patch` (setattr, or monkeypatch.setattr) and
arguments.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import torch
from programs import Program, Server

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

    def watched(self, number, elapsed, dry=False):
        NOW.step = number
        before(self, number)
        loss = step(self, number, elapsed, dry)
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

    def look(self, inputs, targets, documents=None):
        if NOW.step == step and torch.is_grad_enabled():
            bad.append(inputs)
        reading.it = any(inputs.shape == b.shape and torch.equal(inputs, b) for b in bad)
        return forward(self, inputs, targets, documents)

    def hook(trainer, _):
        if not hooked:
            hooked.append(trainer.model.get_submodule(module).register_forward_hook(spoil))

    patch(train_gpt.GPT, "forward", look)
    around_steps(patch, hook, lambda trainer, step: None)


def little_memory(patch: Patch, rows: int, message: str = "", calls: int = 10**9) -> None:
    """The first forward passes with more than so many rows run out of memory."""
    forward, seen = train_gpt.GPT.forward, []

    def limited(self, inputs, targets, documents=None):
        if self.training and torch.is_grad_enabled() and inputs.size(0) > rows:
            seen.append(1)
            if len(seen) <= calls:
                if message:
                    raise RuntimeError(message)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, inputs, targets, documents)

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
        names = {p: name for name, p in trainer.params.items()}
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


def main_with_faults(planted: list[list], report: Path) -> int:
    """Run train_gpt.main in this process with faults, each [name, *arguments], and write a report;
    the exit code."""
    answer = {"rc": 0, "error": "", "kind": ""}
    for name, *arguments in planted:
        globals()[name](setattr, *arguments)
    answer |= {"prints": fingerprints(setattr), "owned": owned(setattr)}
    try:
        answer["rc"] = train_gpt.main([]) or 0
        if train_gpt.dist.is_initialized():
            train_gpt.dist.barrier()
    except BaseException as error:
        traceback.print_exc()
        answer |= {"rc": 1, "error": str(error), "kind": type(error).__name__}
    report.write_text(json.dumps(answer))
    return answer["rc"]


def await_all(ranks: list[Program]) -> None:
    """Wait for the ranks of a job; the first that fails takes the others down."""
    deadline = time.monotonic() + 100
    while living := [rank for rank in ranks if rank.poll() is None]:
        if any(rank.returncode for rank in ranks):
            deadline = min(deadline, time.monotonic() + 15)
        if time.monotonic() > deadline:
            for rank in living:
                rank.send(signal.SIGKILL)
        time.sleep(0.02)


def forked(server: Server, folder: Path, jobs: dict[str, dict]) -> dict[str, list[dict]]:
    """Run jobs, each {nproc, env, faults}, a fault of which is [name, rank, *arguments]; the
    answers of their ranks, with their output as log."""
    folder.mkdir(parents=True, exist_ok=True)
    answers = {}
    for name, job in jobs.items():
        planted = [[] for _ in range(job["nproc"])]
        for fault, rank, *arguments in job.get("faults", ()):
            planted[rank].append([fault, *arguments])
        ranks = server.ranks(job["env"], *planted, report=str(folder / name))
        await_all(ranks)
        answers[name] = []
        for number, rank in enumerate(ranks):
            path = folder / f"{name}.{number}.json"
            killed = {"rc": -9, "error": "killed", "kind": "", "prints": [], "owned": {}}
            answer = json.loads(path.read_text()) if path.exists() else killed
            answers[name].append(answer | {"log": rank.output})
    return answers
