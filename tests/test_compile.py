"""COMPILE=auto where compiling does not work, and COMPILE=1 there."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPO, packed_operator

import keeper
import train_gpt
from keeper import Compiled
from train_gpt import Hyperparameters, Run, UserError


def compiled(choice: str, monkeypatch, failure: Exception | None = None) -> Compiled:
    """A model that doubles, under a compiler that fails, or compiles it to one that triples."""

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail if failure else (lambda x: 3 * x))
    return Compiled(lambda x: 2 * x, Run(Hyperparameters(device="cpu", compile=choice)))


FAILURES = {
    "a compiler": RuntimeError("CppCompileError: C++ compile error"),
    "a full disk": OSError(28, "No space left on device"),
    "a limit": ValueError("recompile_limit reached"),
    "no words": AssertionError(),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_auto_goes_on_without_and_says_why_once(failure, monkeypatch, capsys):
    model = compiled("auto", monkeypatch, FAILURES[failure])
    monkeypatch.setattr(Run, "log", lambda _, line, *__, **___: print(line))
    assert [model(torch.tensor(1)).item() for _ in range(3)] == [2, 2, 2]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: COMPILE=auto does not work here, going on without: ")
    assert f"{type(FAILURES[failure]).__name__}: {FAILURES[failure]}" in line


@pytest.mark.parametrize("failure", FAILURES)
def test_1_is_one_clear_error(failure, monkeypatch):
    with pytest.raises(UserError, match="COMPILE=1: it does not work here: "):
        compiled("1", monkeypatch, FAILURES[failure])(torch.tensor(1))


@pytest.mark.parametrize("choice", ["auto", "1"])
def test_what_works_is_used(choice, monkeypatch):
    assert compiled(choice, monkeypatch)(torch.tensor(1)).item() == 3


def test_too_little_memory_is_not_the_compilers_fault(monkeypatch):
    """Priming halves the micro-batches then, and compiles again."""
    model = compiled("auto", monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        model(torch.tensor(1))


def test_an_error_of_the_model_itself_is_not_swallowed(monkeypatch):
    model = compiled("auto", monkeypatch, RuntimeError("shapes"))
    model.model = lambda _: 1 / 0
    monkeypatch.setattr(Run, "log", lambda *_, **__: None)
    with pytest.raises(ZeroDivisionError):
        model(torch.tensor(1))


def test_a_gradient_that_cannot_be_compiled_is_found_in_priming(run, monkeypatch, capsys):
    """The forward pass has been compiled by then."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, _):
            raise RuntimeError("CppCompileError: C++ compile error")

    def compile_(model, **_):
        return lambda *inputs: Backward.apply(model(*inputs))

    plain = run("plain", WARMUP_STEPS=1)
    monkeypatch.setattr(torch, "compile", compile_)
    start = Run.__init__

    def with_compiler(self, hp):
        start(self, hp)
        self.compile = True

    monkeypatch.setattr(Run, "__init__", with_compiler)
    folder = run("fallen", COMPILE="auto", WARMUP_STEPS=1)
    assert "going on without: RuntimeError: CppCompileError" in capsys.readouterr().out
    first, second = (
        torch.load(place / "final_model.pt", weights_only=True) for place in (plain, folder)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


REAL = """
import torch
import keeper
from keeper import Compiled
from train_gpt import Hyperparameters, Run
run = Run(Hyperparameters(device="cpu", compile="auto"))
run.rank = 1
model = Compiled(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), run)
run.log = lambda line, *_, **__: print(line)
print(model(torch.ones(2, 4)).shape)
"""


def test_a_real_compiler_that_does_not_run(tmp_path):
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CXX": "/bin/false"}
    env |= {"PYTHONPATH": str(REPO), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", REAL]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    warning, shape = done.stdout.splitlines()
    assert "going on without" in warning
    assert shape == "torch.Size([2, 4])"


def test_out_of_memory_is_known_by_its_words():
    words = ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"]
    assert [keeper.is_out_of_memory(RuntimeError(text)) for text in words] == [True, True]
    assert not keeper.is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


# ---- graphs: one for each shape of a batch, in training and in scoring


@pytest.fixture
def graphs(monkeypatch):
    """Have Dynamo trace what is compiled, without a compiler: how many graphs it has made."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=8):  # PyTorch's own
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("stride", "count"),
    [({}, 2), ({"EVAL_STRIDE": 16}, 3)],
    ids=["plain", "stride"],
)
@pytest.mark.parametrize("isolated", [0, 1])
def test_a_run_makes_one_graph_for_each_kind_of_batch(
    run, graphs, isolated, stride, count, monkeypatch
):
    """Those of training, of windows that are scored whole, and of overlapping ones; for documents
    of any number and length, and in 3 validations."""
    settings = {"VAL_LOSS_EVERY": 2, "WARMUP_STEPS": 2, "EVAL_SEQ_LEN": 128, **stride}
    settings |= {"TRAIN_DOC_ISOLATED": isolated, "EVAL_DOC_ISOLATED": isolated}
    monkeypatch.setitem(train_gpt.PACKED, "cpu", packed_operator())
    run(COMPILE=1, SMEAR_GATE=1, BIGRAM_BUCKETS=64, XSA_LAST_N=1, **settings)
    assert graphs() == count


def test_many_shapes_do_not_pass_the_limit(graphs):
    """PyTorch's own is 8: micro-batches that are halved again and again may pass it."""
    model = Compiled(torch.nn.Linear(2, 2), Run(Hyperparameters(device="cpu", compile="1")))
    for rows in range(2, 22):
        model(torch.zeros(rows, 2))
    assert graphs() == 20


def test_a_limit_that_is_passed_ends_no_run(graphs, monkeypatch):
    monkeypatch.setattr(train_gpt, "GRAPHS", 3)
    told = []
    run = Run(Hyperparameters(device="cpu", compile="auto"))
    run.log = lambda line, *_, **__: told.append(line)
    model = Compiled(torch.nn.Linear(2, 2), run)
    shapes = [model(torch.zeros(rows, 2)).shape for rows in range(2, 8)]
    assert shapes == [(rows, 2) for rows in range(2, 8)]
    assert len(told) == 1
    assert "FailOnRecompileLimitHit" in told[0]
