"""What only a CUDA device shows; skipped where there is none."""

import numpy as np
import pytest
import torch
from conftest import shard_bytes

import train_gpt as tg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def folder(tmp_path):
    """Two train shards of tokens with a pattern that can be learned."""
    tokens = np.cumsum(np.random.default_rng(0).integers(1, 4, size=9000)) % 256
    (tmp_path / "fineweb_train_000000.bin").write_bytes(shard_bytes(tokens[:4000]))
    (tmp_path / "fineweb_train_000001.bin").write_bytes(shard_bytes(tokens[4000:]))
    return tmp_path


def make_run(folder, **values):
    """One process that trains a small model on `folder`."""
    small = {
        "DATA_PATH": folder,
        "VOCAB_SIZE": 256,
        "NUM_LAYERS": 4,
        "MODEL_DIM": 128,
        "NUM_HEADS": 4,
        "NUM_KV_HEADS": 2,
        "TRAIN_SEQ_LEN": 64,
        "TRAIN_BATCH_TOKENS": 1024,
        "MICRO_BATCH_TOKENS": 512,
        "ITERATIONS": 100,
        "WARMDOWN_ITERS": 0,
        "DEVICE": "cuda",
    }
    texts = {name: str(value) for name, value in {**small, **values}.items()}
    return tg.Run(tg.load_settings(texts, check_places=False))


def random_model(run):
    """A model on the run's device, none of whose parameters is as it was initialized."""
    torch.manual_seed(0)
    model = tg.GPT(run.hp, run.dtype)
    for name, p in model.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.normal_(p, 0.0, 1.0 if name == "tok_emb.weight" else p.size(-1) ** -0.5)
        else:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model.to(run.device)


def random_tokens():
    return torch.randint(256, (2, 8, 64), generator=torch.Generator().manual_seed(0))


def test_bf16_on_cuda_is_close_to_fp32_on_cpu(folder):
    inputs, targets = random_tokens()
    with torch.no_grad():
        exact = random_model(make_run(folder, DEVICE="cpu", DTYPE="fp32"))(inputs, targets)
        fast = random_model(make_run(folder, DTYPE="bf16"))(inputs.cuda(), targets.cuda()).cpu()
    assert 0 < (fast - exact).abs().mean() < 0.01 * exact.mean()


def test_fp32_on_cuda_equals_fp32_on_cpu(folder):
    inputs, targets = random_tokens()
    with torch.no_grad():
        exact = random_model(make_run(folder, DEVICE="cpu", DTYPE="fp32"))(inputs, targets)
        other = random_model(make_run(folder, DTYPE="fp32"))(inputs.cuda(), targets.cuda()).cpu()
    torch.testing.assert_close(other, exact, atol=1e-3, rtol=0)


def test_gradients_on_cuda_equal_those_on_cpu(folder):
    cpu = random_model(make_run(folder, DEVICE="cpu", DTYPE="fp32"))
    cuda = random_model(make_run(folder, DTYPE="fp32"))
    inputs, targets = random_tokens()
    cpu(inputs, targets).mean().backward()
    cuda(inputs.cuda(), targets.cuda()).mean().backward()
    for (name, p), q in zip(cpu.named_parameters(), cuda.parameters(), strict=True):
        similarity = torch.cosine_similarity(p.grad.flatten(), q.grad.cpu().flatten(), 0)
        assert similarity > 0.9999, name


@pytest.mark.parametrize("forward_rows", [3, 8])
def test_batches_arrive_on_the_device_with_the_right_values(folder, forward_rows):
    run, host = make_run(folder), make_run(folder, DEVICE="cpu")
    run.forward_rows = host.forward_rows = forward_rows
    feeds = [tg.batches(tg.TokenStream("train", r), r) for r in (run, host)]
    busy = torch.randn(2000, 2000, device=run.device)
    for _ in range(12):  # past the end of the data
        busy = torch.tanh(busy @ busy)  # the copies must not be read before they are there
        on_device, on_host = (next(feed) for feed in feeds)
        assert len(on_device) == len(on_host)
        for a, b in zip(on_device, on_host, strict=True):
            assert a.device.type == "cuda"
            assert torch.equal((a + 0).cpu(), b)


def train(folder, steps, compiled, **values):
    """The losses of an untrained model's first steps, without and with torch.compile."""
    run = make_run(folder, **values)
    torch.manual_seed(0)
    model = tg.GPT(run.hp, run.dtype).to(run.device)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
    trainer = tg.Trainer(model, forward, tg.TokenStream("train", run), run)
    trainer.prime()
    return [trainer.step(step, 0.0).item() for step in range(steps)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled_training_is_close_to_eager(folder, dtype):
    values = {"DTYPE": dtype, "WARMUP_STEPS": 1}
    eager, compiled = (train(folder, 5, c, **values) for c in (False, True))
    assert compiled == pytest.approx(eager, abs=0.1 if dtype == "bf16" else 0.02)


def test_training_on_cuda_follows_training_on_cpu(folder):
    values = {"DTYPE": "fp32", "WARMUP_STEPS": 2, "TIED_EMBED_LR": 0.01}
    cuda, cpu = (train(folder, 5, False, DEVICE=d, **values) for d in ("cuda", "cpu"))
    assert cuda == pytest.approx(cpu, abs=0.02)
    assert cuda[-1] < cuda[0]
