"""What only a CUDA device shows; skipped where there is none. Under two minutes on an H100."""

import functools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    SCRIPT,
    checkpoints,
    cli_env,
    cut_documents,
    dense_attention,
    events,
    load_weights,
    new_run,
    run_cli,
    run_main,
    shard_bytes,
    tiny_settings,
    trainer_of,
)
from programs import TECHNIQUES
from torch.nn.attention import SDPBackend, sdpa_kernel

import keeper
import train_gpt as tg

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA_ENV = {"DEVICE": DEVICE, "DTYPE": "bf16", "MODEL_DIM": "128", "TRAIN_LOG_EVERY": "1"}
LENGTHS = [64, 100, 192, 1024, 2048]
# Heads of 64 channels, half as many for keys, as the baseline's; for any of those lengths.
WIDE = {"MODEL_DIM": 512, "NUM_HEADS": 8, "NUM_KV_HEADS": 4, "NUM_LAYERS": 2}
WIDE |= {"TRAIN_BATCH_TOKENS": 307200, "MICRO_BATCH_TOKENS": 0, "VAL_BATCH_SIZE": 524288}


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
        "DEVICE": DEVICE,
    }
    return new_run(small, DATA_PATH=folder, **values)


def random_model(run):
    """A model on the run's device, none of whose parameters is as it was initialized."""
    torch.manual_seed(0)
    model = tg.build_model(run.hp, run.dtype)
    for name, p in model.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.normal_(p, 0.0, 1.0 if name == "tok_emb.weight" else p.size(-1) ** -0.5)
        else:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model.to(run.device)


def random_tokens(length: int = 64):
    return torch.randint(256, (2, 8, length), generator=torch.Generator().manual_seed(0))


def choose(run) -> str:
    """Choose the kernel of attention; skips where it is not there, but not if it is wrong."""
    try:
        return tg.choose_attention(run)
    except tg.UserError as problem:
        if "needs" in str(problem) or "PyTorch takes" in str(problem) or "module" in str(problem):
            pytest.skip(str(problem))
        raise


def with_gradients(attend, inputs, grad, dtype):
    """The result of attention, and the gradients of q, k and v."""
    x = [y.detach().to(dtype).requires_grad_() for y in inputs]
    y = attend(*x)
    return [y.detach(), *torch.autograd.grad(y, x, grad.to(dtype))]


# ---- forward and backward


def test_bf16_on_cuda_is_close_to_fp32_on_cpu(folder):
    inputs, targets = random_tokens()
    with torch.no_grad():
        exact = random_model(make_run(folder, DEVICE="cpu", DTYPE="fp32"))(inputs, targets)
        fast = random_model(make_run(folder, DTYPE="bf16"))(inputs.to(DEVICE), targets.to(DEVICE))
    assert 0 < (fast.cpu() - exact).abs().mean() < 0.01 * exact.mean()


def test_fp32_on_cuda_equals_fp32_on_cpu(folder):
    inputs, targets = random_tokens()
    with torch.no_grad():
        exact = random_model(make_run(folder, DEVICE="cpu", DTYPE="fp32"))(inputs, targets)
        other = random_model(make_run(folder, DTYPE="fp32"))(inputs.to(DEVICE), targets.to(DEVICE))
    torch.testing.assert_close(other.cpu(), exact, atol=1e-3, rtol=0)


def test_gradients_on_cuda_equal_those_on_cpu(folder):
    cpu = random_model(make_run(folder, DEVICE="cpu", DTYPE="fp32"))
    cuda = random_model(make_run(folder, DTYPE="fp32"))
    inputs, targets = random_tokens()
    cpu(inputs, targets).mean().backward()
    cuda(inputs.to(DEVICE), targets.to(DEVICE)).mean().backward()
    for (name, p), q in zip(cpu.named_parameters(), cuda.parameters(), strict=True):
        similarity = torch.cosine_similarity(p.grad.flatten(), q.grad.cpu().flatten(), 0)
        assert similarity > 0.9999, name


@pytest.mark.parametrize(
    ("length", "compiled"), [(64, False), (100, False), (192, False), (100, True)]
)
def test_gradients_of_the_model_in_bf16_are_those_in_float64(folder, length, compiled):
    """Also where 100 is no multiple of a kernel's tile."""
    model = WIDE | {"XSA_LAST_N": 1, "TRAIN_SEQ_LEN": length}
    exact = random_model(make_run(folder, DEVICE="cpu", DTYPE="fp32", **model)).double()
    exact.dtype = torch.float64
    run = make_run(folder, DTYPE="bf16", **model)
    tg.choose_attention(run)
    ours = random_model(run)
    forward = tg.compile_model(ours) if compiled else ours
    inputs, targets = random_tokens(length)
    exact(inputs, targets).double().mean().backward()
    forward(inputs.to(DEVICE), targets.to(DEVICE)).mean().backward()
    for (name, p), q in zip(exact.named_parameters(), ours.parameters(), strict=True):
        a, b = p.grad.flatten(), q.grad.double().cpu().flatten()
        assert torch.cosine_similarity(a, b, 0) > 0.995, name
        assert 0.95 < b.norm() / a.norm() < 1.05, name


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["sdpa", "cudnn", "fa2"])
def test_gradients_of_attention_in_bf16_are_those_in_float64(folder, name, length):
    """At each position: a kernel may be wrong in its last tile alone."""
    run = make_run(folder, ATTENTION=name, DTYPE="bf16", TRAIN_SEQ_LEN=length, **WIDE)
    choose(run)
    *inputs, grad = (x.repeat(2, 1, 1, 1) for x in keeper.attention_inputs(run))
    attend = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    ours = with_gradients(attend, inputs, grad, torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):
        exact = with_gradients(attend, inputs, grad, torch.float64)
    run.kernels.close()
    for tensor, a, b in zip(("o", "dq", "dk", "dv"), ours, exact, strict=True):
        errors = (a.double() - b).norm(dim=(1, 3)) / b.norm(dim=(1, 3))
        assert errors[:, 1:].max() < 0.03, tensor


# ---- documents
PIECES = [1, 2, 63, 64, 65, 1, 100, 500, 224, 4]  # two rows of 512, of pieces of up to 128


def documents_of(lengths=PIECES):
    return cut_documents(lengths, 2, 128, DEVICE)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_within_documents_in_bf16_is_that_of_a_dense_mask(kv_heads):
    """At each position: a kernel may be wrong at the ends of pieces alone."""
    documents = documents_of()
    heads = (4, kv_heads, kv_heads)
    random = torch.Generator(DEVICE).manual_seed(0)
    made = torch.randn(2, 512, sum(heads), 64, device=DEVICE, generator=random)
    made = made.to(torch.bfloat16).transpose(1, 2)
    grad = torch.randn(2, 4, 512, 64, device=DEVICE, generator=random).to(torch.bfloat16)
    inputs = made.split(heads, dim=1)
    packed = functools.partial(tg.attend, documents=documents)
    ours = with_gradients(packed, inputs, grad, torch.bfloat16)
    dense = functools.partial(dense_attention, offsets=documents.offsets)
    exact = with_gradients(dense, inputs, grad, torch.float64)
    others = torch.ones(2 * 512, dtype=torch.bool, device=DEVICE)
    others[documents.offsets[:-1].long()] = False  # a query with one key has no gradient
    for tensor, a, b in zip(("o", "dq", "dk", "dv"), ours, exact, strict=True):
        errors = (a.double() - b).norm(dim=(1, 3)) / b.norm(dim=(1, 3))
        kept = errors.flatten()[others] if tensor in ("dq", "dk") else errors
        assert kept.max() < 0.03, tensor


def test_nothing_crosses_a_start():
    """A token is changed: what attends before it, and in other pieces, has the same bits."""
    documents = documents_of()
    made = torch.randn(1, 8, 1024, 64, device=DEVICE).to(torch.bfloat16)
    changed = made.clone()
    changed[:, :, 300] += 1
    first, second = (tg.attend(*x.split((4, 2, 2), dim=1), documents) for x in (made, changed))
    differs = (first != second).any(1).any(-1).flatten().nonzero().flatten()
    offsets = documents.offsets.tolist()
    end = min(offset for offset in offsets if offset > 300)
    assert differs.tolist() == [*range(300, end)]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_the_model_with_documents_are_those_in_float64(folder, compiled):
    """Compiled once, for any number of documents."""
    model = WIDE | {"XSA_LAST_N": 1, "TRAIN_SEQ_LEN": 128, "TRAIN_DOC_ISOLATED": 1}
    exact = random_model(make_run(folder, DEVICE="cpu", DTYPE="fp32", **model)).double()
    exact.dtype = torch.float64
    run = make_run(folder, DTYPE="bf16", **model)
    ours = random_model(run)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forward = tg.compile_model(ours) if compiled else ours
    inputs, targets = (x.flatten().unflatten(0, (2, 512)) for x in random_tokens(128))
    for lengths in ([1000, 24], PIECES):
        documents = documents_of(lengths)
        exact.zero_grad()
        ours.zero_grad()
        on_cpu = documents._replace(offsets=documents.offsets.cpu())
        exact(inputs, targets, on_cpu).double().mean().backward()
        forward(inputs.to(DEVICE), targets.to(DEVICE), documents).mean().backward()
        for (name, p), q in zip(exact.named_parameters(), ours.parameters(), strict=True):
            a, b = p.grad.flatten(), q.grad.double().cpu().flatten()
            assert torch.cosine_similarity(a, b, 0) > 0.995, name
            assert 0.95 < b.norm() / a.norm() < 1.05, name
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_training_within_documents_follows_that_on_cpu(folder):
    values = {"TRAIN_DOC_ISOLATED": 1, "DATA_SHUFFLE": 1, "DTYPE": "fp32", "WARMUP_STEPS": 1}
    values |= {"TIED_EMBED_LR": 0.01}
    cuda, cpu = (train(folder, 5, False, DEVICE=d, **values) for d in (DEVICE, "cpu"))
    assert cuda == pytest.approx(cpu, abs=0.02)


def test_compiled_training_within_documents_is_close_to_eager(folder):
    values = {"TRAIN_DOC_ISOLATED": 1, "DTYPE": "bf16", "WARMUP_STEPS": 1}
    eager, compiled = (train(folder, 5, c, **values) for c in (False, True))
    assert compiled == pytest.approx(eager, abs=0.1)


# ---- which kernel runs


def kernels_of_a_step(run, compiled: bool) -> list[str]:
    """The names of what the device does in a forward and backward pass."""
    torch._dynamo.reset()  # what was compiled in this process for another kernel
    model = tg.build_model(run.hp, run.dtype).to(run.device)
    forward = tg.compile_model(model) if compiled else model
    inputs, targets = (x.to(run.device) for x in random_tokens(run.hp.train_seq_len))
    forward(inputs, targets).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        forward(inputs, targets).sum().backward()
        torch.cuda.synchronize()
    return [event.key for event in profile.key_averages()]


@pytest.mark.parametrize("name", ["auto", "cudnn", "fa2", "fa3", "fa4"])
def test_what_attention_names_is_what_runs(folder, name):
    run = make_run(folder, ATTENTION=name, DTYPE="bf16", TRAIN_SEQ_LEN=128, **WIDE)
    chosen = choose(run)
    found = " ".join(kernels_of_a_step(run, compiled=name in ("auto", "fa2"))).lower()
    run.kernels.close()
    words = {"cudnn": "cudnn.*sdpa|sdpa.*cudnn", "fa2": "flash_fwd|flash::", "fa3": "flash|hopper"}
    assert re.search(words.get(chosen, ""), found), found
    if chosen.startswith("fa"):
        assert "cudnn_generated" not in found


def test_auto_is_right_and_takes_a_kernel_of_its_own(folder):
    run = make_run(folder, DTYPE="bf16", TRAIN_SEQ_LEN=1024, **WIDE)
    chosen = tg.choose_attention(run)
    assert chosen.startswith("sdpa") == (torch.cuda.get_device_capability()[0] not in tg.FASTEST)
    assert run.keeper.warnings == []
    run.kernels.close()


# ---- data, training, scoring


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
        for (*pair, cuts), (*same, _) in zip(on_device, on_host, strict=True):
            assert cuts is None
            for a, b in zip(pair, same, strict=True):
                assert a.device.type == DEVICE
                assert torch.equal((a + 0).cpu(), b)


def make_trainer(folder, compiled, **values):
    """A primed trainer of a small model."""
    run = make_run(folder, **values)
    run.log = lambda line, *_, **__: print(line)  # it has no files
    torch.manual_seed(0)
    model = tg.build_model(run.hp, run.dtype).to(run.device)
    forward = tg.compile_model(model) if compiled else model
    trainer = trainer_of(model, run, forward)
    trainer.prime()
    return trainer


def train(folder, steps, compiled, **values):
    """The losses of an untrained model's first steps, without and with torch.compile."""
    trainer = make_trainer(folder, compiled, **values)
    return [trainer.step(step, 0.0).item() for step in range(steps)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled_training_is_close_to_eager(folder, dtype):
    values = {"DTYPE": dtype, "WARMUP_STEPS": 1}
    eager, compiled = (train(folder, 5, c, **values) for c in (False, True))
    assert compiled == pytest.approx(eager, abs=0.1 if dtype == "bf16" else 0.02)


def test_training_on_cuda_follows_training_on_cpu(folder):
    values = {"DTYPE": "fp32", "WARMUP_STEPS": 2, "TIED_EMBED_LR": 0.01}
    cuda, cpu = (train(folder, 5, False, DEVICE=d, **values) for d in (DEVICE, "cpu"))
    assert cuda == pytest.approx(cpu, abs=0.02)
    assert cuda[-1] < cuda[0]


def test_techniques_on_cuda_follow_those_on_cpu(folder):
    """Of pull request 369, but for what scoring and the artifact do."""
    names = ("SMEAR_GATE", "BIGRAM_BUCKETS", "XSA_LAST_N", "ROPE_DIMS", "LN_SCALE", "ORTHO_INIT")
    values = {name: TECHNIQUES[name] for name in names}
    values |= {"EMA_DECAY": 0.8, "MUON_WD": 0.1, "GRAD_CLIP_NORM": 0.3, "MLP_MULT": 3}
    values |= {"DTYPE": "fp32", "WARMUP_STEPS": 1, "TIED_EMBED_LR": 0.01}
    cuda, cpu = (train(folder, 5, False, DEVICE=d, **values) for d in (DEVICE, "cpu"))
    assert cuda == pytest.approx(cpu, abs=0.02)


def test_too_little_memory_on_the_device_halves_the_micro_batches(folder):
    """The logits of the planned micro-batch do not fit; those of an eighth do."""
    values = {"VOCAB_SIZE": 8192, "MICRO_BATCH_TOKENS": 0, "TRAIN_BATCH_TOKENS": 262144}
    total = torch.cuda.get_device_properties(0).total_memory
    free_tokens = 32768
    room = free_tokens * 8192 * 4 * 5  # logits, what the softcap keeps, gradients
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        trainer = make_trainer(folder, False, WARMUP_STEPS=1, DTYPE="bf16", **values)
        loss = trainer.step(0, 0.0).item()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert trainer.run.forward_rows < 65536 // 64
    assert loss == pytest.approx(np.log(8192), abs=0.1)


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    """The folder of a whole run on the device: compiled, with techniques and validations."""
    env = tiny_settings(dataset, tmp_path_factory.mktemp("trained"))
    stack = {"SMEAR_GATE": 1, "BIGRAM_BUCKETS": 64, "XSA_LAST_N": 1, "EMA_DECAY": 0.8}
    stack |= {"EVAL_DOC_ISOLATED": 1, "EVAL_STRIDE": 16, "COMPILE": 1, "WARMUP_STEPS": 2}
    stack |= {"QUANT_BITS_MLP": 5, "QUANT_CLIP": "sigma", "COMPRESSOR": "rans", "ITERATIONS": 12}
    stack |= {"VAL_LOSS_EVERY": 5, "TRAIN_BATCH_TOKENS": 2048, "VAL_TOKENS": 2000}
    run_main(env | CUDA_ENV | {name: str(value) for name, value in stack.items()})
    return Path(env["OUT_DIR"], env["RUN_ID"])


def test_a_whole_run_learns_exports_and_scores(trained):
    val = events(trained, "val")
    (final,) = events(trained, "final")
    assert val[-1]["val_loss"] < val[0]["val_loss"] - 0.5
    assert final["val_loss"] == pytest.approx(val[-1]["val_loss"], abs=0.05)
    start = events(trained, "start")[0]["versions"]
    assert f"device:{device_name()}" in start
    assert "compile:1" in start
    assert "\nwarning: COMPILE" not in (trained.parent / "tiny.txt").read_text()


@pytest.mark.parametrize("other", [CUDA_ENV, {"DTYPE": "fp32"}], ids=["cuda", "cpu"])
def test_its_artifact_alone_gives_the_score(trained, tiny_env, tmp_path, other):
    (final,) = events(trained, "final")
    artifact = {"EVAL_ONLY": "1", "ARTIFACT": str(trained / "final_model.artifact")}
    run_main(tiny_env | other | artifact | {"VAL_TOKENS": "2000"})
    (again,) = events(tmp_path / "logs/tiny", "final")
    assert again["val_loss"] == pytest.approx(final["val_loss"], abs=0.01)


def test_the_raw_weights_are_on_the_disk_and_finite(trained):
    assert all(w.isfinite().all() and not w.is_cuda for w in load_weights(trained).values())


def test_the_nll_of_each_token_by_documents_is_that_of_the_cpu(trained, tiny_env, tmp_path):
    artifact = {"EVAL_ONLY": "1", "ARTIFACT": str(trained / "final_model.artifact")}
    found = []
    for name, dtype in ((DEVICE, "bf16"), (DEVICE, "fp32"), ("cpu", "fp32")):
        place = tmp_path / f"{name}_{dtype}.npy"
        env = tiny_env | artifact | {"DEVICE": name, "DTYPE": dtype, "VAL_TOKENS": "2000"}
        run_main(env | {"SAVE_NLL": str(place), "RUN_ID": place.stem})
        found.append(np.load(place))
    bf16, fp32, cpu = found
    np.testing.assert_allclose(fp32, cpu, atol=2e-3)
    assert np.abs(bf16 - cpu).mean() < 0.02


def device_name() -> str:
    """The device as the log names it."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE


# ---- processes


def test_a_killed_run_goes_on_to_the_same_end(tiny_env, tmp_path):
    env = tiny_env | CUDA_ENV | {"DTYPE": "fp32", "SAVE_EVERY": "5", "ITERATIONS": "40"}
    env |= {"SAVE_TOTAL_LIMIT": "9", "OMP_NUM_THREADS": "1"}
    whole = run_cli(env | {"RUN_ID": "whole"})
    assert whole.rc == 0, whole.stderr
    killed = tmp_path / "logs/killed"
    ids = env | {"RUN_ID": "killed"}
    with subprocess.Popen([sys.executable, SCRIPT], env=cli_env(ids)) as process:
        while process.poll() is None and not checkpoints(killed):
            time.sleep(0.005)
        process.kill()
    resumed = run_cli(ids | {"RESUME": "auto"})
    assert resumed.rc == 0, resumed.stderr
    assert "resume:" in resumed.stdout
    folders = [tmp_path / "logs" / name for name in ("whole", "killed")]
    first, second = (events(folder, "final")[0]["val_loss"] for folder in folders)
    assert second == pytest.approx(first, abs=1e-3)


COLLECTIVES = """
import os, sys
import torch
import torch.distributed as dist
import train_gpt as tg

device, backend = sys.argv[1:]
run = tg.Run(tg.load_settings({"DEVICE": device}, check_places=False))
run.world_size = 1
if device == "cuda":
    torch.cuda.set_device(0)
run.keeper.meet("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
assert backend in str(dist.get_backend_config())
run.world_size = 2  # so that the group of one is asked
assert run.clock() > 0
x = torch.arange(1024.0, device=device)
total = torch.empty_like(x)
dist.all_reduce(x)
dist.reduce_scatter(total, [x])
dist.all_gather([total], x.clone())
dist.broadcast(total, 0)
assert torch.equal(total, torch.arange(1024.0, device=device))
shares = [{}]
dist.gather_object({"a": torch.ones(2)}, shares)
dist.broadcast_object_list(shares)
assert shares[0]["a"].sum() == 2
rows = torch.tensor(3)
dist.all_reduce(rows, dist.ReduceOp.MIN)
dist.barrier()
print("collectives: ok", flush=True)
os._exit(0)
"""


def test_a_group_of_one_over_nccl_does_every_collective(tmp_path):
    job = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    job |= {"MASTER_PORT": "0", "PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "-c", COLLECTIVES, DEVICE, "nccl" if DEVICE == "cuda" else "gloo"]
    done = subprocess.run(command, env=os.environ | job, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "collectives: ok" in done.stdout


def test_torchrun_with_one_process_is_a_run_like_any_other(tiny_env, tmp_path):
    env = {**os.environ, **tiny_env, **CUDA_ENV, "WARMUP_STEPS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    done = subprocess.run([*command, SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "final_int8_zstd_roundtrip_exact" in done.stdout


def test_a_run_is_calibrated_and_quantized_to_the_cap(tiny_env, tmp_path):
    """QUANT_METHOD=gptq: the model is heard on the device, and encoded on the CPU."""
    code = sum(SCRIPT.with_name(name).stat().st_size for name in ("train_gpt.py", "quantizer.py"))
    given = {"QUANT_METHOD": "gptq", "CALIBRATION_TOKENS": "4096", "FIT_BUDGET": "step"}
    given |= {"ARTIFACT_MAX_BYTES": str(code + 150_000), "WARMUP_STEPS": "1"}
    env = {**os.environ, **tiny_env, **CUDA_ENV, **given}
    done = subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^calibration: tokens:4096 backward:1024 ", done.stdout, re.M)
    trained, stored = re.findall(r"val_loss:([\d.]+)", done.stdout)[-2:]
    assert abs(float(stored) - float(trained)) < 0.05
