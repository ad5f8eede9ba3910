"""What benchmarks/gpu.py measures: each phase in a process of its own.

    python benchmarks/gpu_phases.py PHASE JOB.json OUT.json

What is found is written after each row, so that a phase that is killed leaves what it had. Without
CUDA all is tiny, and a row that needs a GPU says so.
"""

import contextlib
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import document_lengths
import measure
import run_process
import run_scoring
from gpu_kit import ROOT, write_whole
from measure import number

import train_gpt as tg

PR369 = ROOT / "configs/pr369.env"
NEEDS_CUDA = "needs CUDA"
Settings = dict[str, str]

# A short run to its score, whatever the size of its artifact.
SHORT = {
    "ITERATIONS": "20",
    "WARMUP_STEPS": "3",
    "TRAIN_LOG_EVERY": "1",
    "VAL_LOSS_EVERY": "0",
    "VAL_TOKENS": "131072",
    "MAX_WALLCLOCK_SECONDS": "0",
    "ARTIFACT_MAX_BYTES": str(10**12),
    "FIT_BUDGET": "none",
}
TINY = {
    "DEVICE": "cpu",
    "COMPILE": "0",
    "NUM_LAYERS": "4",
    "MODEL_DIM": "64",
    "NUM_HEADS": "2",
    "NUM_KV_HEADS": "1",
    "BIGRAM_BUCKETS": "0",
    "TRAIN_SEQ_LEN": "64",
    "EVAL_SEQ_LEN": "0",
    "TRAIN_BATCH_TOKENS": "1024",
    "VAL_BATCH_SIZE": "4096",
    "VAL_TOKENS": "2048",
    "ITERATIONS": "5",
    "WARMUP_STEPS": "1",
}
WIDE = {"NUM_LAYERS": "11", "MLP_MULT": "4", "TRAIN_SEQ_LEN": "2048"}  # as records with 8192 pieces


class Report:
    """What a phase has found: figures for programs, rows for people, and how it went."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {"status": "ok", "headline": "", "rows": [], "figures": {}}

    def save(self) -> None:
        """Write all that is known so far."""
        write_whole(self.path, json.dumps(self.found, default=str))

    def row(self, what: str, measured: str) -> None:
        """Add a row, and show it."""
        self.found["rows"].append([what, measured])
        print(f"{what}: {measured}", flush=True)
        self.save()

    def figure(self, name: str, value: Any) -> None:
        """Add a figure, or replace one."""
        self.found["figures"][name] = value
        self.save()

    def fail(self, what: str, problem: Exception | str) -> None:
        """Add a row that says what went wrong; the phase goes on, and has failed."""
        if isinstance(problem, Exception):
            traceback.print_exc()
        text = " ".join(str(problem).split()) or type(problem).__name__
        text = text if len(text) <= 300 else f"{text[:120]} ... {text[-170:]}"
        self.found["status"] = "failed"
        self.found["headline"] = self.found["headline"] or f"{what}: {text}"
        self.row(what, f"failed: {text}")

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Turn an error into a row: the next measurement does not depend on this one."""
        try:
            yield
        except Exception as problem:
            self.fail(what, problem)


@dataclass(frozen=True)
class Job:
    """What gpu.py asks a phase for."""

    tiny: bool
    given: Settings
    data: dict[str, Settings]  # the settings of datasets, by the number of pieces
    tflops: float | None  # the fastest matrix product, if it is known

    def settings(self, shape: Settings | None = None, pieces: str = "1024", **row: str) -> Settings:
        """Give the settings of a run: what is given wins, but for what a row varies."""
        settings = SHORT | (shape or {})
        if self.tiny:
            settings |= TINY
        return settings | self.data.get(pieces, {}) | self.given | row

    def load(
        self, folder: str, shape: Settings | None = None, pieces: str = "1024", **row: str
    ) -> tg.Hyperparameters:
        """Resolve them for a run in this process that writes to a folder."""
        places = {"OUT_DIR": folder, "RUN_ID": "phase"}
        return tg.load_settings(self.settings(shape, pieces, **row) | places)


def clean_environment() -> None:
    """Forget variables that would set, or be taken for, a setting of train_gpt.py."""
    for name in [*os.environ]:
        if name in tg.FIELDS or is_refused(name):
            del os.environ[name]


def is_refused(name: str) -> bool:
    """Tell whether train_gpt.py stops at a variable, as at SEEDS, which is close to SEED."""
    try:
        tg.load_settings({name: os.environ[name]}, check_places=False)
    except tg.UserError as problem:
        return f"{name}=" in str(problem)
    return False


def synchronize(device: str) -> None:
    """Wait until a device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_each(call: Callable[[], Any], device: str, least: float = 0.1) -> float:
    """Seconds of a call on a device: the best of three bursts of at least `least` seconds."""
    return measure.seconds_each(call, lambda: synchronize(device), least)


# ===================================== THE MACHINE =====================================


def products(hp: tg.Hyperparameters) -> dict[str, tuple[int, int]]:
    """Give the width of input and output of the model's matrix products."""
    dim, hidden = hp.model_dim, int(hp.mlp_mult * hp.model_dim)
    keys = dim // hp.num_heads * hp.num_kv_heads
    return {
        "q, output": (dim, dim),
        "k, v": (dim, keys),
        "MLP, first": (dim, hidden),
        "MLP, second": (hidden, dim),
        "head": (dim, hp.vocab_size),
    }


def environment(report: Report, job: Job) -> None:
    """Measure what the machine can do at most."""
    report.row("train_gpt.py", "imports")
    with tempfile.TemporaryDirectory() as folder:
        places = {"OUT_DIR": folder, "RUN_ID": "phase"}
        hp = tg.load_settings(job.settings() | places, check_places=False)
    device = tg.Run(hp).device.type
    with report.attempt("fastest matrix product"):
        best = measure.ceiling(hp)
        report.figure("ceiling", best)
        report.row("fastest matrix product", f"{best['tflops']:.4g} TFLOP/s, {best['shape']}")
        report.found["headline"] = f"{best['tflops']:.4g} TFLOP/s"
    rows = 65536 if device == "cuda" else 4096
    speeds = {}
    for name, (inner, cols) in products(hp).items():
        with report.attempt(f"product of {name}"):
            speeds[name] = measure.matmul_tflops(tg.Run(hp), rows, inner, cols)
            shape = f"{rows}x{inner}x{cols}"
            report.row(f"product of {name}", f"{speeds[name]:.4g} TFLOP/s, {shape}")
    report.figure("products_tflops", speeds)
    with report.attempt("copy within memory"):
        size = 2**30 if device == "cuda" else 2**26
        a, b = torch.empty(2, size, dtype=torch.uint8, device=device)
        speed = 2e-9 * size / seconds_each(lambda: b.copy_(a), device)
        report.figure("copy_gb_per_s", speed)
        report.row("copy within memory", f"{speed:.4g} GB/s read and written")
    launches(report, device)


def launches(report: Report, device: str) -> None:
    """Time kernels that do nothing."""
    if device != "cuda":
        report.row("empty kernel", NEEDS_CUDA)
        return
    with report.attempt("empty kernel"):
        x = torch.zeros(1, device=device)

        def waited() -> None:
            x.zero_()
            torch.cuda.synchronize()

        each = 1e6 * seconds_each(x.zero_, device)
        alone = 1e6 * seconds_each(waited, device)
        report.figure("launch_us", {"in a row": each, "waiting for each": alone})
        report.row("empty kernel", f"{each:.2f} µs in a row, {alone:.2f} µs waiting for each")


# ===================================== ATTENTION =====================================
KERNELS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ON_CPU = ("default", "flash", "math", "amx")
ON_CUDA = ("default", "cudnn", "flash", "efficient")
LAYOUTS = ("BHTD", "BTHD")  # contiguous, or transposed views of (B, T, H, Dh)
HEADS, KV_HEADS, WIDTH = 8, 4, 64
WRONG = 0.03  # of the norm; rounding to bf16 makes up to 0.008
RESULTS = ("o", "dq", "dk", "dv")


def attention_inputs(B: int, T: int, layout: str, device: str) -> list[Tensor]:
    """Random q, k, v, and the gradient of the result as the model's next product gives it."""
    random = torch.Generator(device).manual_seed(T)
    made = []
    for heads in (HEADS, KV_HEADS, KV_HEADS):
        x = torch.randn(B, T, heads, WIDTH, device=device, generator=random)
        x = x.to(torch.bfloat16).transpose(1, 2)
        made.append(x.contiguous() if layout == "BHTD" else x)
    grad = torch.randn(B, T, HEADS * WIDTH, device=device, generator=random)
    return [*made, grad.to(torch.bfloat16)]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as the model calls it, (B, T, H·Dh)."""
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


def kernel(name: str) -> contextlib.AbstractContextManager:
    """Give the context in which PyTorch uses a kernel alone."""
    backend = KERNELS.get(name)
    return sdpa_kernel(backend) if backend is not None else contextlib.nullcontext()


def attention_results(inputs: list[Tensor], name: str, dtype: torch.dtype) -> list[Tensor]:
    """Compute output and gradients of attention by a kernel, (B, T, heads, Dh)."""
    *leaves, grad = inputs
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    with kernel(name):
        y = attend(*leaves)
        y.backward(grad.to(dtype))
    found = [y.detach().unflatten(2, (HEADS, WIDTH))]
    return found + [x.grad.transpose(1, 2) for x in leaves]


def errors_of(ours: list[Tensor], exact: list[Tensor]) -> dict[str, list[float]]:
    """Give the distance of each result from the exact one, of its norm: of all, and at the worst.

    Kernels have been wrong at the last positions alone (PyTorch issue 196678).
    """
    found = {}
    for name, a, b in zip(RESULTS, ours, exact, strict=True):
        difference, b = a.double() - b.double(), b.double()
        whole = float(difference.norm() / b.norm())
        at = difference.norm(dim=(2, 3)) / b.norm(dim=(2, 3))
        worst = float(at[:, name == "dq" :].max())  # the first query has one key: its dq is 0
        found[name] = [whole, worst]
    return found


def verdict(errors: dict[str, list[float]]) -> str:
    """Tell what is wrong with a kernel's results, if anything is."""
    wrong = [name for name, (a, b) in errors.items() if not (a < WRONG and b < WRONG)]
    return f"WRONG in {', '.join(wrong)}" if wrong else "right"


def choice(inputs: list[Tensor]) -> str:
    """Name the kernel that PyTorch takes in training."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    number = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True)
    return SDPBackend(number).name


def check_kernel(name: str, device: str, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Compare a kernel with float64 for each length and layout: errors and verdicts."""
    found = {}
    for T in lengths:
        for layout in LAYOUTS:
            inputs = attention_inputs(2, T, layout, device)
            exact = attention_results(inputs, "math", torch.float64)
            errors = errors_of(attention_results(inputs, name, torch.bfloat16), exact)
            found[f"T {T} {layout}"] = {"errors": errors, "verdict": verdict(errors)}
            print(f"{name}, T {T}, {layout}: {verdict(errors)} {errors}", flush=True)
    return found


def activate(name: str) -> None:
    """Put the kernel of amx_attention in its place, if that is what is asked for."""
    if name == "amx":
        importlib.import_module("amx_attention").activate(WIDTH)


def correctness(report: Report, device: str, names: tuple[str, ...], most: int) -> list[str]:
    """Compare each kernel with products in float64; those that run here."""
    lengths = tuple(T for T in (64, 100, 192, 1024, 2048) if most >= T)
    usable, checks = [], {}
    for name in names:
        try:
            activate(name)
            checks[name] = check_kernel(name, device, lengths)
        except Exception as problem:  # PyTorch raises what it likes
            traceback.print_exc()
            first = str(problem).splitlines()[:1]
            report.row(f"{name} against float64", f"not available: {' '.join(first)[:120]}")
            continue
        usable.append(name)
        report.figure("correctness", checks)
        wrong = [f"{case}: {c['verdict']}" for case, c in checks[name].items() if len(c) > 1]
        wrong = [text for text in wrong if "WRONG" in text]
        pairs = [pair for c in checks[name].values() for pair in c["errors"].values()]
        worst = max(value for pair in pairs for value in pair)
        told = "; ".join(wrong) or f"right at T {', '.join(map(str, lengths))}, both layouts"
        report.row(f"{name} against float64", f"{told}; at worst {100 * worst:.2g}%")
        if wrong and name == "default":
            report.found["status"] = "failed"
    return usable


def attention_ms(inputs: list[Tensor], name: str, device: str) -> float:
    """Time attention forward and backward, ms."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]

    with kernel(name):
        return milliseconds(lambda: attend(*leaves).backward(inputs[3]), device)


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Time a call on a device, ms. The host has asked for all work before the device begins."""
    if device != "cuda":
        return 1e3 * seconds_each(call, device, 0.03)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(10**8)  # cycles: 50 to 100 ms
    start.record()
    for _ in range(20):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 20


def attention(report: Report, job: Job) -> None:
    """Find which kernel runs, whether each is right forward and backward, and how fast it is."""
    device = "cpu" if job.tiny else "cuda"
    names = ON_CPU if job.tiny else ON_CUDA
    longest = 192 if job.tiny else 2048
    for T in (100, longest):
        with report.attempt(f"PyTorch takes, T {T}"):
            inputs = attention_inputs(2, T, "BHTD", device)
            report.row(f"PyTorch takes, T {T}", choice(inputs))
            report.found["headline"] = f"PyTorch takes {choice(inputs)}"
    usable = correctness(report, device, names, longest)
    for name in ON_CUDA if job.tiny else ():
        if name not in names:
            report.row(f"{name} against float64", NEEDS_CUDA)
    speeds: dict[str, float] = {}
    tokens = 192 if job.tiny else 65536
    for T in (192,) if job.tiny else (1024, 2048):
        flops = 12 * tokens * HEADS * WIDTH * (T + 1) / 2
        for layout in LAYOUTS:
            told = []
            for name in usable:
                with report.attempt(f"{name}, T {T}, {layout}"):
                    inputs = attention_inputs(tokens // T, T, layout, device)
                    ms = attention_ms(inputs, name, device)
                    speeds[f"{name} T {T} {layout}"] = ms
                    told.append(f"{name} {ms:.3f} ms ({1e-9 * flops / ms:.3g} TFLOP/s)")
            report.row(f"{tokens:,} tokens, T {T}, {layout}, both ways", "; ".join(told))
            report.figure("milliseconds", speeds)


# ===================================== DOCUMENTS =====================================
LONG = 2**24  # tokens of a training split of documents


@contextlib.contextmanager
def document_runs(job: Job) -> Iterator[Callable[..., tg.Hyperparameters]]:
    """Give what resolves settings of runs on documents as long as FineWeb's, each in a folder."""
    pieces = "8192" if "8192" in job.data else "1024"
    source = Path(job.settings(pieces=pieces)["DATA_PATH"])
    shape = {} if job.tiny else WIDE

    def load(**row: str) -> tg.Hyperparameters:
        out = tempfile.mkdtemp(dir=folder)
        return job.load(out, shape, pieces, DATA_PATH=folder, **row)

    with tempfile.TemporaryDirectory() as folder:
        for split, tokens in (("train", LONG), ("val", LONG // 16)):
            tokens = tokens // 256 if job.tiny else tokens
            lengths = document_lengths.draw_lengths(int(tokens / document_lengths.FINEWEB))
            cut = document_lengths.cut_anew(source, split, lengths)
            document_lengths.write_shard(Path(folder), split, cut)
        # Text that is cut anywhere is no prose, which the byte audit encodes again.
        with mock.patch.object(tg.Tokenizer, "audit"):
            yield load


def random_pieces(T: int, tokens: int, device: str) -> tg.Documents:
    """Draw pieces as training on FineWeb's lengths has them, in rows of eight sequences."""
    lengths = document_lengths.draw_lengths(int(tokens / document_lengths.FINEWEB) + 100)
    begins = np.zeros(max(tokens, int(lengths.sum())), bool)
    begins[lengths.cumsum()[:-1]] = True
    rows = min(tokens, 8 * T)
    return tg.cut(begins[:tokens].reshape(-1, rows), T, torch.device(device))


def heads_of(tokens: int, device: str) -> list[Tensor]:
    """Random q, k, v of so many tokens in one row, parts of one buffer as the model's; dO."""
    random = torch.Generator(device).manual_seed(tokens)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    made = torch.randn(1, tokens, sum(heads), WIDTH, device=device, generator=random)
    return [*made.to(torch.bfloat16).transpose(1, 2).split(heads, dim=1)]


def both_ways(
    call: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Give output and gradients of a way to attend, (B, T, heads, Dh)."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs[:3]]
    y = call(*leaves)
    grads = torch.autograd.grad(y, leaves, inputs[3].to(dtype))
    return [x.detach().transpose(1, 2) for x in (y, *grads)]


def dense(q: Tensor, k: Tensor, v: Tensor, T: int) -> Tensor:
    """Attend within rows of T tokens: what training without documents does."""
    rows = [x.unflatten(2, (-1, T))[0].transpose(0, 1) for x in (q, k, v)]
    return tg.attend(*rows).transpose(0, 1).flatten(1, 2)[None]


def windowed(q: Tensor, k: Tensor, v: Tensor, pieces: tg.Documents, window: int) -> Tensor:
    """Attend within pieces, at most `window` tokens back, by PyTorch's varlen attention."""
    offsets, longest = pieces
    flat = [x[0].transpose(0, 1) for x in (q, k, v)]
    limits = (offsets, offsets, longest, longest)
    y = tg.varlen_attn(*flat, *limits, window_size=(window, 0), **tg.VARLEN)
    return y.transpose(0, 1)[None]


def check_pieces(report: Report, T: int, device: str) -> None:
    """Compare attention within pieces of up to T tokens with products in float64."""
    pieces = random_pieces(T, 8 * T, device)
    inputs = heads_of(8 * T, device)
    ours = both_ways(lambda *x: tg.attend(*x, pieces), inputs, torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):
        alone = functools.partial(tg.attend_by_piece, offsets=pieces.offsets)
        exact = both_ways(alone, inputs, torch.float64)
    others = torch.ones(8 * T, dtype=torch.bool, device=device)
    others[pieces.offsets[:-1].long()] = False  # a piece's first query has one key: its dq is 0
    errors = errors_of(*([x[:, others] for x in found] for found in (ours, exact)))
    worst = max(max(pair) for pair in errors.values())
    report.figure(f"errors T {T}", errors)
    report.row(f"pieces of up to {T} against float64", f"{verdict(errors)}; {100 * worst:.2g}%")
    if "WRONG" in verdict(errors):
        report.found["status"] = "failed"


def ways_to_attend(T: int, tokens: int, device: str) -> dict[str, Callable[..., Tensor]]:
    """Give each way to attend within documents, or beside it, by its name."""
    pieces = random_pieces(T, tokens, device)
    rows = tg.cut(np.zeros((tokens // T, T), bool), T, torch.device(device))
    ways = {
        "whole rows": lambda *x: dense(*x, T),
        "pieces": lambda *x: tg.attend(*x, pieces),
    }
    if device == "cuda":
        ways |= {
            "whole rows as pieces": lambda *x: tg.attend(*x, rows),
            "pieces, 512 back": lambda *x: windowed(*x, pieces, 512),
            "whole rows, 512 back": lambda *x: windowed(*x, rows, 512),
        }
    return ways


def documents(report: Report, job: Job) -> None:
    """Compare attention within documents with float64, and time it beside whole rows."""
    device = "cpu" if job.tiny else "cuda"
    tokens, lengths = (1536, (192,)) if job.tiny else (65536, (1024, 2048))
    for T in lengths:
        with report.attempt(f"pieces of up to {T} against float64"):
            check_pieces(report, T, device)
    speeds: dict[str, float] = {}
    inputs = heads_of(tokens, device)
    for T in lengths:
        for name, way in ways_to_attend(T, tokens, device).items():
            with report.attempt(f"{name}, T {T}"):
                ms = milliseconds(backward_of(way, inputs), device)
                speeds[f"{name}, T {T}"] = ms
                report.row(f"{tokens:,} tokens, T {T}, {name}, both ways", f"{ms:.3f} ms")
                report.figure("milliseconds", speeds)
    report.found["headline"] = f"{len(speeds)} ways to attend"


def backward_of(way: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    """Make a call of a way to attend, forward and backward."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    return lambda: torch.autograd.grad(way(*leaves), leaves, inputs[3])


READING = {  # settings of how training reads, by their name in the results
    "dense": {},
    "isolated": {"TRAIN_DOC_ISOLATED": "1"},
    "isolated, shuffled": {"TRAIN_DOC_ISOLATED": "1", "DATA_SHUFFLE": "1"},
}


def isolation(report: Report, job: Job) -> None:
    """Measure a step with documents apart beside one without, in turn."""
    trainers: dict[str, tuple[tg.Run, tg.Trainer]] = {}
    times: dict[str, list[float]] = {name: [] for name in READING}
    with document_runs(job) as load:
        for name, row in READING.items():
            with report.attempt(f"a step, {name}"):
                run, _, _, trainer = measure.prepare(load(**row), training=True)
                trainers[name] = (run, trainer)
        steps = 2 if job.tiny else 4
        for _ in range(3):
            for name, (run, trainer) in trainers.items():
                seconds, _ = measure.free_running(trainer, run, steps)
                times[name].append(1e3 * seconds / steps)
                report.figure("steps_ms", times)
    for name in trainers:
        ratio = float(np.median(np.divide(times[name], times["dense"])))
        told = f"{number(float(np.median(times[name])))} ms, {ratio:.3f} of dense"
        report.row(f"a step, {name}", told)
        report.found["headline"] = f"{name}: {told}"


# ===================================== TRAINING =====================================
STARTED = re.compile(r"^python:.* attention:(\S+)")
SIZES = re.compile(r"\((\d+) code, (\d+) artifact\)")
SCORE = re.compile(r"^final_\S+_exact .*val_bpb:([\d.]+)")


def said(lines: list[str], pattern: re.Pattern[str]) -> tuple[str, ...] | None:
    """Give the groups of the last line that matches."""
    found = [match.groups() for line in lines if (match := pattern.search(line))]
    return found[-1] if found else None


def training_figures(
    found: dict[str, Any], side: run_process.Side, tflops: float | None
) -> dict[str, Any]:
    """Give the figures of a run of train_gpt.py, as far as its lines tell them."""
    lines = [line for _, line in found["lines"]]
    found = {"host_mib": None, "smi_gpu_mib": None, "wall_s": None} | found
    found |= run_process.parse_log(found["lines"])
    figures = {"first_step_s": found["first_step_s"], "wall_s": found["wall_s"]}
    if found["step_ms"]:
        figures |= run_process.describe(side, found, tflops)
        ends = np.quantile(found["step_ms"], (0.25, 0.75))
        figures["step_ms_quartiles"] = [float(end) for end in ends]
        figures["steps_ms"] = found["step_ms"]
    started, sizes, score = (said(lines, pattern) for pattern in (STARTED, SIZES, SCORE))
    warnings = [line for line in lines if "warning" in line.lower()]
    return figures | {
        "attention": started[0] if started else None,
        "val_bpb": found["val"][-1][2] if found["val"] else None,
        "roundtrip_val_bpb": float(score[0]) if score else None,
        "code_bytes": int(sizes[0]) if sizes else None,
        "artifact_bytes": int(sizes[1]) if sizes else None,
        "warnings": [*dict.fromkeys(warnings)][:20],
    }


def train(settings: Settings, tflops: float | None) -> tuple[dict[str, Any], str]:
    """Run train_gpt.py to its score: its figures, and why it failed, if it did."""
    print("settings:", " ".join(f"{n}={t}" for n, t in settings.items()), flush=True)
    side = run_process.make_side(run_process.SCRIPT, settings)
    problem = ""
    try:
        found = run_process.execute(run_process.SCRIPT, [], side.settings, 1, echo=True)
    except run_process.BenchmarkError as error:
        found, problem = {"lines": error.lines}, str(error)
    return training_figures(found, side, tflops), problem


def brief(figures: dict[str, Any]) -> str:
    """Tell the figures of a run in one line."""
    if not figures.get("step_ms"):
        return "no step times"
    words = [f"{number(figures['step_ms'])} ms a step"]
    words.append(f"{number(figures['tokens_per_s'])} tokens/s")
    if figures["mfu"]:
        words.append(f"MFU {figures['mfu']:.1f}%")
    on_gpu = figures["script_gpu_mib"] or figures["smi_gpu_mib"]
    if memory := on_gpu or figures["host_mib"]:
        where = "GPU" if on_gpu else "host"
        words.append(f"{memory:,.0f} MiB of {where} memory")
    return ", ".join(words)


def training_rows(report: Report, figures: dict[str, Any], tflops: float | None) -> None:
    """Tell the figures of a run, one a row."""
    if figures.get("step_ms"):
        low, high = figures["step_ms_quartiles"]
        spread = f"{number(low)} to {number(high)}"
        report.row("step, ms", f"{number(figures['step_ms'])} ({spread})")
        report.row("tokens/s", number(figures["tokens_per_s"]))
        mfu = f"{figures['mfu']:.1f}% of {tflops:.4g} TFLOP/s" if figures["mfu"] else "n/a"
        report.row("MFU", mfu)
        for name, title in (("script_gpu_mib", "PyTorch's"), ("smi_gpu_mib", "nvidia-smi")):
            here = torch.cuda.is_available()
            told = number(figures[name]) if here else NEEDS_CUDA
            report.row(f"peak GPU memory ({title}), MiB", told)
        report.row("peak host memory, MiB", number(figures["host_mib"]))
    for name, title in (
        ("first_step_s", "to the first step, s"),
        ("wall_s", "whole process, s"),
        ("val_bpb", "val_bpb"),
        ("roundtrip_val_bpb", "val_bpb of the artifact"),
        ("artifact_bytes", "artifact, bytes"),
    ):
        report.row(title, number(figures[name]))
    report.row("attention", str(figures["attention"]))
    for line in figures["warnings"]:
        report.row("warning", line[:160])


def whole_run(report: Report, job: Job, shape: Settings | None = None) -> None:
    """Train, export and score, and tell the figures."""
    figures, problem = train(job.settings(shape), job.tflops)
    for name, value in figures.items():
        report.figure(name, value)
    training_rows(report, figures, job.tflops)
    report.found["headline"] = brief(figures)
    if problem:
        report.fail("run", problem)


def baseline(report: Report, job: Job) -> None:
    """Run the default configuration, from data to score."""
    whole_run(report, job)


def record_shape() -> Settings:
    """Give the settings of pull request 369, at twice its length of sequences."""
    config = tg.read_dotenv(str(PR369))
    kept = {n: text for n, text in config.items() if n not in ("DATA_PATH", "TOKENIZER_PATH")}
    return kept | SHORT | {"TRAIN_SEQ_LEN": "2048", "EVAL_STRIDE": "0", "ITERATIONS": "12"}


def pr369(report: Report, job: Job) -> None:
    """Run the stack of pull request 369, from data to score."""
    whole_run(report, job, record_shape())


def variants(job: Job) -> dict[str, Settings]:
    """Give what is varied about the baseline, by the title of its row."""
    sizes = (256, 512, 1024) if job.tiny else (65536, 131072, 262144)
    few = {} if job.tiny else {"ITERATIONS": "8", "VAL_BATCH_SIZE": "65536", "VAL_TOKENS": "65536"}
    found = {f"{n:,} tokens a pass": few | {"MICRO_BATCH_TOKENS": str(n)} for n in sizes}
    found["not compiled"] = few | {"COMPILE": "0"}
    found["compiled"] = few | {"COMPILE": "1"}
    return found


def microbatch(report: Report, job: Job) -> None:
    """Measure what the size of a pass, compiling, and 8192 pieces cost."""
    figures: dict[str, Any] = {}

    def add(title: str, settings: Settings) -> None:
        with report.attempt(title):
            figures[title], problem = train(settings, job.tflops)
            report.figure("runs", figures)
            if problem:
                report.fail(title, problem)
            else:
                report.row(title, brief(figures[title]))

    for title, row in variants(job).items():
        if job.tiny and row.get("COMPILE") == "1":
            report.row(title, NEEDS_CUDA)
        else:
            add(title, job.settings(**row))
    title = "8192 pieces, 11 layers, MLP 4x, T 2048"
    if data := job.data.get("8192"):
        few = {} if job.tiny else {"ITERATIONS": "8", "VAL_TOKENS": "65536"}
        wide = {} if job.tiny else WIDE
        add(title, job.settings(wide, "8192", **few | data))
    else:
        report.row(title, "no dataset of 8192 pieces: make .gpu by gpu.py --prepare")
    report.found["headline"] = f"{len(figures)} runs"


# ===================================== INSIDE A STEP =====================================
TOP = 30


def device_events(events: list[Any]) -> list[Any]:
    """Find what ran on the device; regions that the host named are marked there, and no work."""
    cpu = torch.autograd.DeviceType.CPU
    return [e for e in events if e.device_type != cpu and not e.is_user_annotation]


def busy(spans: list[tuple[float, float]]) -> float:
    """Add up the time that is covered by spans, which may overlap."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def heaviest(times: list[tuple[str, float, int]], steps: int) -> list[dict[str, Any]]:
    """Order names by ms a step, with their share and calls a step; times are in µs."""
    sums, calls = Counter(), Counter()
    for name, us, count in times:
        sums[name] += us
        calls[name] += count
    whole = sum(sums.values()) or 1.0
    return [
        {
            "name": name,
            "ms": 1e-3 * us / steps,
            "percent": 100 * us / whole,
            "calls": calls[name] / steps,
        }
        for name, us in sums.most_common()
    ]


def show_kernels(report: Report, trainer: tg.Trainer, device: str, free_ms: float) -> None:
    """Profile two steps: the heaviest kernels, their number, and how busy they keep the device."""
    steps = 2
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=kinds) as profiler:
        for step in range(steps):
            trainer.step(step, 0.0)
        synchronize(device)
    if device == "cuda":
        events = device_events(profiler.events())
        times = [(e.name, e.time_range.elapsed_us(), 1) for e in events]
        kernels = [e for e in events if not e.name.startswith(("Memcpy", "Memset"))]
        ms = 1e-3 * busy([(e.time_range.start, e.time_range.end) for e in events]) / steps
        count = len(kernels) / steps
        report.figure("kernels_a_step", count)
        report.figure("busy_ms", ms)
        report.row("kernels a step", f"{count:,.0f}")
        share = f"{ms:.4g} ms, {100 * ms / free_ms:.1f}% of a free step"
        report.row("GPU busy in a step", share)
    else:
        times = [(e.key, e.self_cpu_time_total, e.count) for e in profiler.key_averages()]
        report.row("kernels a step", NEEDS_CUDA)
        report.row("GPU busy in a step", NEEDS_CUDA)
    table = heaviest(times, steps)
    report.figure("heaviest", table[:TOP])
    print(f"{'ms a step':>10} {'share':>7} {'calls':>8}  name")
    for line in table[: 3 * TOP]:
        numbers = f"{line['ms']:10.3f} {line['percent']:6.1f}% {line['calls']:8.1f}"
        print(f"{numbers}  {line['name'][:160]}")
    for line in table[:5]:
        told = f"{line['ms']:.3f} ms, {line['percent']:.1f}%, {line['calls']:.0f} calls"
        report.row(f"heaviest: {line['name'][:60]}", told)


def profile(report: Report, job: Job) -> None:
    """Find where a step of the baseline goes."""
    with tempfile.TemporaryDirectory() as folder:
        place, _, _, trainer = measure.prepare(job.load(folder), training=True)
        device, steps = place.device.type, 3 if job.tiny else 8
        for step in range(2):
            trainer.step(step, 0.0)
        seconds, waited = measure.free_running(trainer, place, steps)
        free_ms = 1e3 * seconds / steps
        report.figure("free_step_ms", free_ms)
        report.row("step, left to itself, ms", number(free_ms))
        report.row("there: the host's wait for data", f"{100 * waited / seconds:.2f}%")
        if device == "cuda":
            peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
            report.figure("peak_mib", [peak / 2**20 for peak in peaks])
            told = f"{peaks[0] / 2**20:,.0f} allocated, {peaks[1] / 2**20:,.0f} reserved"
            report.row("peak GPU memory, MiB", told)
        else:
            report.row("peak GPU memory, MiB", NEEDS_CUDA)
        report.found["headline"] = f"{number(free_ms)} ms a free step"
        with report.attempt("kernels"):
            show_kernels(report, trainer, device, free_ms)
        with report.attempt("parts of a step"):
            show_parts(report, measure.step_parts(trainer, place, steps))


def show_parts(report: Report, steps: list[dict[str, float]]) -> None:
    """Tell the means of the parts of a step."""
    means = measure.mean_parts(steps)
    whole = sum(means.values())
    report.figure("parts_ms", means)
    parts = [f"{name} {100 * ms / whole:.1f}%" for name, ms in means.items()]
    report.row("parts of a step, waiting for each", f"{number(whole)} ms: {', '.join(parts)}")


# ===================================== THE REST =====================================


def evaluation(report: Report, job: Job) -> None:
    """Measure what ways of scoring cost, on documents as long as FineWeb's."""
    row = {"EVAL_STRIDE": "16"} if job.tiny else {"EVAL_STRIDE": "64", "VAL_TOKENS": "524288"}

    def tell(found: dict[str, Any]) -> None:
        report.figure("evaluation", found)
        what, measured = run_scoring.evaluation_rows(found)[-1]
        report.row(what, measured)

    with document_runs(job) as load:
        found = measure.evaluation(load(**row), tell)
    plain = number(found["tokens_per_s"]["plain"])
    report.found["headline"] = f"{plain} tokens/s in a plain pass"


def reductions(device: str, size: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """List the collectives that train_gpt.py calls, with the bytes that each moves."""
    clock = torch.zeros(2, dtype=torch.float64)
    rows = torch.tensor(3)
    flat = torch.randn(1, size, device=device)
    square, total = flat[0, :1].clone()[0], torch.empty_like(flat[0])
    given = [{"weights": torch.ones(1000)}]
    most = dist.ReduceOp.MAX
    return {
        "clock: all_reduce of 2 doubles": (16, lambda: dist.all_reduce(clock, most)),
        "rows: all_reduce": (8, lambda: dist.all_reduce(rows, dist.ReduceOp.MIN)),
        "gradients: all_reduce": (4 * size, lambda: dist.all_reduce(flat)),
        "gradients: reduce_scatter": (4 * size, lambda: dist.reduce_scatter(total, [*flat])),
        "norm: all_reduce": (4, lambda: dist.all_reduce(square)),
        "weights: all_gather": (4 * size, lambda: dist.all_gather([*flat], flat[0].clone())),
        "weights: broadcast": (4 * size, lambda: dist.broadcast(flat, 0)),
        "checkpoint: broadcast_object_list": (4000, lambda: dist.broadcast_object_list(given)),
        "checkpoint: gather_object": (4000, lambda: dist.gather_object(given[0], [None])),
        "end: barrier": (0, dist.barrier),
    }


def collectives(report: Report, job: Job) -> None:
    """Time each collective of train_gpt.py in a group of one."""
    device = "cpu" if job.tiny else "cuda"
    backend = "gloo" if job.tiny else "cpu:gloo,cuda:nccl"
    if not job.tiny:
        torch.cuda.set_device(0)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    report.row("group", f"{backend}{f'; NCCL {NEEDS_CUDA}' if job.tiny else ''}")
    figures = {}
    size = 2**18 if job.tiny else 17_059_912
    for title, (count, call) in reductions(device, size).items():
        with report.attempt(title):
            us = 1e6 * seconds_each(call, device, 0.02)
            figures[title] = {"bytes": count, "us": us}
            report.row(title, f"{us:,.1f} µs, {count:,} bytes")
            report.figure("collectives", figures)
    report.found["headline"] = f"{len(figures)} collectives over {backend}"


VERDICT = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")


def tests(report: Report, job: Job) -> None:
    """Run tests/test_gpu.py: what passes, fails, and is skipped."""
    options = ["-v", "-o", "addopts=", "--strict-markers", "-p", "no:cacheprovider"]
    options += ["--color=no", "-rfE", "--tb=short"]
    command = [sys.executable, "-m", "pytest", *options, "tests/test_gpu.py"]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if job.tiny else {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    counts, failed = Counter(), []
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := VERDICT.match(line):
                counts[found[2].lower()] += 1
                if found[2] in ("FAILED", "ERROR"):
                    failed.append(found[1])
                    report.row("test failed", found[1])
                report.figure("counts", dict(counts))
    report.figure("failed", failed)
    told = ", ".join(f"{count} {what}" for what, count in counts.items()) or "no test ran"
    report.row("tests/test_gpu.py", told)
    report.found["headline"] = told
    if process.returncode or not counts:
        report.found["status"] = "failed"
    elif set(counts) == {"skipped"}:
        report.found["status"] = NEEDS_CUDA
    report.save()


PHASES = {
    phase.__name__: phase
    for phase in (
        *(environment, attention, baseline, tests, profile),
        *(documents, isolation, pr369, evaluation, collectives, microbatch),
    )
}


def main(arguments: list[str]) -> int:
    """Run a phase: 0 if nothing in it failed."""
    name, job, out = arguments
    clean_environment()
    report = Report(Path(out))
    asked = json.loads(Path(job).read_text(encoding="utf-8"))
    try:
        PHASES[name](report, Job(**asked))
    except Exception as problem:
        report.fail(name, problem)
    report.save()
    return int(report.found["status"] == "failed")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        dist.barrier()
        os._exit(code)  # as train_gpt.py does
    sys.exit(code)
