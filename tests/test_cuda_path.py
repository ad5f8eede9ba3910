"""The path of a CUDA device without one: fake tensors, which have devices and shapes but no values,
through trainer, score and state."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import REPO, new_run, shard_bytes, trainer_of
from programs import TECHNIQUES
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import keeper
import train_gpt as tg

sys.path.insert(0, str(REPO / "benchmarks"))

import traffic_device
from traffic_optimizer import CUDA, on_cuda

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: test_gpu.py"),
]


class AtOnce:
    """An executor that does its work when asked: modes of PyTorch are a thread's own."""

    def __init__(self, _: int) -> None:
        pass

    def __enter__(self) -> "AtOnce":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable, *arguments: object) -> Future:
        done = Future()
        done.set_result(function(*arguments))
        return done


@pytest.fixture
def fake_cuda() -> Iterator[list[FakeTensor]]:
    """A CUDA device of fake tensors: the tensors whose gradients were asked for. Autograd's engine
    needs a real one."""
    differentiated: list[FakeTensor] = []
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    with contextlib.ExitStack() as patches:
        for owner, name, new in (
            (torch.cuda, "Event", lambda: event),
            (torch.Tensor, "pin_memory", lambda tensor: tensor),
            (tg, "ThreadPoolExecutor", AtOnce),
        ):
            patches.enter_context(mock.patch.object(owner, name, new))
        patches.enter_context(traffic_device.idle_guard())
        patches.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield differentiated


@pytest.fixture
def cuda_run(tmp_path) -> tg.Run:
    """A run with all techniques on a CUDA device that is not here."""
    tokens = np.arange(9000) % 256
    (tmp_path / "fineweb_train_000000.bin").write_bytes(shard_bytes(tokens))
    settings = TECHNIQUES | {"DATA_PATH": tmp_path, "VOCAB_SIZE": 256, "NUM_LAYERS": 4}
    settings |= {"MODEL_DIM": 128, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "TRAIN_SEQ_LEN": 64}
    settings |= {"TRAIN_BATCH_TOKENS": 1024, "MICRO_BATCH_TOKENS": 512, "DTYPE": "bf16"}
    settings |= {"TRAIN_DOC_ISOLATED": 1}
    run = new_run(settings, EVAL_SEQ_LEN=128, EVAL_DOC_ISOLATED=1)
    run.device = CUDA
    return run


@pytest.fixture
def trainer(fake_cuda, cuda_run) -> Iterator[tg.Trainer]:
    """A trainer whose model gets gradients without autograd's engine."""
    model = on_cuda(tg.build_model(cuda_run.hp, cuda_run.dtype))

    def backward(loss: FakeTensor) -> None:
        fake_cuda.append(loss)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    with mock.patch.object(torch.Tensor, "backward", backward):
        yield trainer_of(model, cuda_run)


def test_a_step_stays_on_the_device(trainer, fake_cuda):
    loss = trainer.step(0, 0.0)
    micro_batches = 1024 // 512
    assert [x.device for x in fake_cuda] == [CUDA] * micro_batches
    assert (loss.device, loss.dtype) == (CUDA, torch.float32)


def test_batches_come_to_the_device(trainer):
    trainer.step(0, 0.0)
    for inputs, targets, documents in trainer.batch:
        assert {(x.device, x.dtype) for x in (inputs, targets)} == {(CUDA, torch.int64)}
        assert (documents.offsets.device, documents.offsets.dtype) == (CUDA, torch.int32)


def test_weights_gradients_and_state_are_fp32_on_the_device(trainer):
    trainer.step(0, 0.0)
    kept = [trainer.weights, trainer.average, *(p.grad for p in trainer.params.values())]
    states = [s for p in trainer.params.values() for s in keeper.optimizer_states(trainer, p)]
    kept += [t for state in states for t in state.values()]
    assert {(t.device, t.dtype) for t in kept} == {(CUDA, torch.float32)}
    names = {name for state in states for name in state}
    assert names >= {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}


def test_a_checkpoint_is_of_the_host(trainer):
    state = keeper.gather_state(trainer, 0, 0.0, whole=True)
    kept = [t for tensors in state["params"].values() for t in tensors.values()]
    assert {t.device.type for t in kept} == {"cpu"}


def test_a_resumed_state_comes_to_the_device(trainer):
    keeper.restore_state(trainer, keeper.gather_state(trainer, 3, 1.0, whole=True))
    assert {p.device for p in trainer.params.values()} == {CUDA}


def test_scoring_leaves_the_device_once(trainer, cuda_run, monkeypatch):
    """All NLL stays there until the end."""
    tokens = np.arange(2000).astype(np.uint16) % 256
    val = SimpleNamespace(tokens=tokens, starts=np.array([0, 2000]), text_bytes=5000)
    left = []

    def to_host(tensor: FakeTensor) -> SimpleNamespace:
        left.append((tensor.device, tensor.dtype, tuple(tensor.shape)))
        return SimpleNamespace(numpy=lambda: np.ones(tensor.shape, np.float32))

    monkeypatch.setattr(torch.Tensor, "cpu", to_host)
    _, scored = tg.score(trainer.forward, val, cuda_run)
    assert left == [(CUDA, torch.float32, (1999,))]
    assert scored["val_loss"] == 1.0


def test_the_peak_of_memory_is_logged(trainer, cuda_run, monkeypatch):
    """In the baseline's words, which tools read."""
    lines = []
    monkeypatch.setattr(cuda_run, "log", lambda line, *_: lines.append(line))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10184 * 2**20 + 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 10588 * 2**20)
    cuda_run.keeper.trained(trainer, 8, 1.0)
    assert lines[-1] == "peak memory allocated: 10184 MiB reserved: 10588 MiB"


def test_a_tensor_on_the_host_among_those_of_the_device_is_found(fake_cuda):
    """Or the tests above could not fail."""
    with pytest.raises(RuntimeError, match="cpu"):
        torch.ones(3, device=CUDA) + torch.ones(3)
