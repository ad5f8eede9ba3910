"""Birdie: train, export and validate a language model that fits in 16,000,000 bytes.

The parameter-golf game: the lowest bits per byte (BPB) on FineWeb validation text, with code and
weights in 16 MB, after ten minutes on 8xH100. It runs on CUDA, MPS and CPUs, in many processes.

    python train_gpt.py                                   one device, the baseline configuration
    torchrun --nproc_per_node=8 train_gpt.py              eight GPUs
    CONFIG=my.env NUM_LAYERS=11 python train_gpt.py       settings from a file and the environment
    EVAL_ONLY=1 ARTIFACT=a.artifact python train_gpt.py   score an artifact, nothing else
    python train_gpt.py --help | --settings               all, by keeper.py | those of this run

Shapes: B batch, T time, D model dim, H heads, K kv heads, Dh head dim, V vocabulary, N tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import fnmatch
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import struct
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy import ndarray
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

# ===================================== SETTINGS =====================================
# A wrong or misspelt setting must stop the run at once, not be ignored for minutes on eight GPUs.


Weights = Mapping[str, Tensor]  # by their names
Listener = Callable[[Tensor, Tensor], None] | None  # to the head's inputs and output gradients


class UserError(Exception):
    """What the user can put right: the message says what was wrong, where, and what to do."""


def require(condition: Any, problem: str) -> None:
    """Raise UserError with `problem` unless `condition` holds."""
    if not condition:
        raise UserError(problem)


def setting(role: str, default: Any, valid: str, doc: str, file: str = "") -> Any:
    """Declare a setting: `valid` is an interval, "a, b, c", or empty; values may need a `file`."""
    about = {"valid": valid, "choices": valid.split(", "), "doc": doc, "role": role, "file": file}
    if valid.startswith(("[", "(")):  # a round bracket leaves its end out
        low, high = map(float, valid[1:-1].split(","))
        about["least"] = math.nextafter(low, math.inf) if valid.startswith("(") else low
        about["most"] = math.nextafter(high, -math.inf) if valid.endswith(")") else high
    return field(default=default, metadata=about)


# Roles: the model or its score (in the artifact); what training gives; speed, logs, safety alone.
model_setting = partial(setting, "model")
result_setting = partial(setting, "result")
run_setting = partial(setting, "run")
model_technique = partial(setting, "model", file="frontier.py")
result_technique = partial(setting, "result", file="frontier.py")


@dataclass(frozen=True)
class Hyperparameters:
    """The resolved settings of one run. A field's environment variable is its name in capitals."""

    config: str = run_setting("", "", "dotenv file with settings; the environment overrides it")
    data_path: str = run_setting("./data/datasets/fineweb10B_sp1024", "", "folder of the shards")
    tokenizer_path: str = run_setting("./data/tokenizers/fineweb_1024_bpe.model", "", "tokenizer")
    run_id: str = run_setting("", "", "name of the run; empty: a random UUID")
    out_dir: str = run_setting("logs", "", "holds <RUN_ID>.txt and the folder <RUN_ID>")
    device: str = run_setting("auto", "auto, cuda, mps, cpu", "auto: the first one that is there")
    compile: str = run_setting("auto", "auto, 0, 1", "torch.compile; auto: CUDA, large CPU steps")
    attention: str = run_setting("auto", "auto, sdpa, amx, cudnn, fa2, fa3, fa4", "auto: fastest")
    val_batch_size: int = run_setting(524288, "[1, inf)", "tokens per validation batch, all ranks")
    val_loss_every: int = run_setting(1000, "[0, inf)", "validate every N steps; 0: at the end")
    train_log_every: int = run_setting(200, "[0, inf)", "log every N steps and steps 1-10; 0: off")
    micro_batch_tokens: int = run_setting(0, "[0, inf)", "tokens per forward pass; 0: by device")
    warmup_steps: int = run_setting(20, "[0, inf)", "steps that prime kernels and change nothing")
    save_every: int = run_setting(0, "[0, inf)", "checkpoint every N steps and at the end; 0: off")
    save_total_limit: int = run_setting(2, "[1, inf)", "checkpoints that are kept")
    resume: str = run_setting("", "", "auto: from RUN_ID's newest checkpoint; or from this file")
    resume_changed: int = run_setting(0, "0, 1", "resume though settings change the result")
    report_to: str = run_setting("", "", "wandb, tensorboard, trackio, aim: by lab/watch.py")
    watch: int = run_setting(0, "0, 1", "lab/watch.py warns of what goes wrong")
    max_bad_steps: int = run_setting(10, "[1, inf)", "give up after N losses in a row not finite")
    save_nll: str = run_setting("", "", ".npy file for the NLL of each scored token, in nats")
    seed: int = result_setting(1337, "[0, 4294967295]", "seeds the initial weights")
    dtype: str = result_setting("auto", "auto, bf16, fp32", "auto: bf16 where it is fast")
    val_tokens: int = result_setting(0, "[0, inf)", "only the first N validation tokens; 0: all")
    eval_only: int = result_setting(0, "0, 1", "score ARTIFACT and exit")
    artifact: str = result_setting("", "", "the artifact that EVAL_ONLY scores")
    score_streams: int = result_setting(0, "0, 1", "each shard alone; SAVE_NLL: a folder of .npy")
    artifact_max_bytes: int = result_setting(16_000_000, "[1, inf)", "cap on code plus artifact")
    iterations: int = result_setting(20000, "[0, inf)", "optimizer steps at most")
    max_wallclock_seconds: float = result_setting(600.0, "[0, inf)", "cap on training; 0: off")
    warmdown_iters: int = result_setting(1200, "[0, inf)", "steps in which the rates fall to 0")
    warmdown_frac: float | str = result_setting("", "[0, 1]", "or: share of the run; empty: off")
    final_lr_frac: float = result_setting(0.0, "[0, 1]", "share of the rates where it ends")
    lr_schedule: str = result_technique("linear", "linear, cosine, wsd, constant", "how it falls")
    auto_lr_reduction: int = result_technique(0, "0, 1", "halve the rates where the loss leaps")
    lr_warmup_steps: int = result_technique(0, "[0, inf)", "steps in which the rates rise")
    lr_warmup_ratio: float = result_technique(0.0, "[0, 1)", "or: share of the run; 0: off")
    ema_decay: float = result_technique(0.0, "[0, 1)", "export the moving average; 0: off")
    ema_blend: float = result_technique(1.0, "[0, 1]", "its share in what is exported")
    train_batch_tokens: int = result_setting(524288, "[1, inf)", "tokens a step, all ranks")
    train_doc_isolated: int = result_setting(0, "0, 1", "train without attention over documents")
    batch_schedule: str = result_technique("", "", "tokens a step until shares: 8192@0.2,16384@0.5")
    seq_len_schedule: str = result_technique("", "", "sequence lengths until shares of the run")
    data_shuffle: int = result_technique(0, "0, 1", "read documents in an order that SEED gives")
    train_seq_len: int = model_setting(1024, "[1, 1048576]", "sequence length in training")
    vocab_size: int = model_setting(1024, "[1, 65536]", "must equal the tokenizer's")
    num_layers: int = model_setting(9, "[1, 1024]", "blocks; first half feeds skips to the second")
    loop_repeats: int = model_technique(0, "[0, 64]", "more visits of LOOP_FIRST to LOOP_LAST")
    loop_first: int = model_setting(0, "[0, 1023]", "first block, from 0, of those")
    loop_last: int = model_setting(0, "[0, 1023]", "last block of those")
    loop_start: float = result_setting(0.0, "[0, 1]", "share of the run before they come")
    skips: str = model_technique("unet", "unet, gated, mudd, none", "ways around blocks")
    resid_mix: int = model_technique(1, "0, 1", "mix each block's input with the first one")
    channel_gains: int = model_technique(1, "0, 1", "scale what blocks add, channel by channel")
    parallel_last_n: int = model_technique(0, "[0, inf)", "last layers whose MLP skips attention")
    model_dim: int = model_setting(512, "[1, 65536]", "width of the residual stream")
    num_heads: int = model_setting(8, "[1, 65536]", "query heads; divides MODEL_DIM")
    num_kv_heads: int = model_setting(4, "[1, 65536]", "key and value heads; divides NUM_HEADS")
    mlp_mult: float = model_setting(2.0, "(0, 64]", "MLP hidden width, in units of MODEL_DIM")
    mlp_act: str = model_technique("relu2", "relu2, leaky_relu2", "the MLP's activation")
    mlp_leaky_slope: float = model_setting(0.5, "[0, 1]", "leaky_relu2: slope of negative side")
    tie_embeddings: int = model_setting(1, "0, 1", "the output head is the token embedding")
    rope_base: float = model_setting(10000.0, "(0, inf)", "base of the rotary frequencies")
    rope_dims: int = model_setting(0, "[0, 65536]", "rotated channels of each head; 0: all")
    rope_scaling: str = model_technique("none", "none, linear, ntk, yarn", "past TRAIN_SEQ_LEN")
    eval_seq_len: int = model_setting(0, "[0, 1048576]", "context in validation; 0: TRAIN_SEQ_LEN")
    eval_stride: int = model_technique(0, "[0, inf)", "tokens that a window moves; 0: no overlap")
    eval_doc_isolated: int = model_setting(0, "0, 1", "validate without attention over documents")
    window_pattern: str = model_technique("", "", "S and L tiled over layers, the last L; empty: L")
    window_tokens: int = model_setting(512, "[1, inf)", "that S attends to, its own included")
    sparse_attn_gate: int = model_technique(0, "[0, inf)", "channels that gate heads; 0: no gate")
    xsa_last_n: int = model_technique(0, "[0, inf)", "last layers with exclusive self-attention")
    smear_gate: int = model_technique(0, "0, 1, 2", "mix each embedding with the last; 2: by token")
    bigram_buckets: int = model_technique(0, "[0, inf)", "rows for hashed pairs of tokens; 0: off")
    bigram_dim: int = model_setting(128, "[1, 65536]", "width of those rows")
    ln_scale: int = model_technique(0, "0, 1", "divide layer i's normed inputs by sqrt(i + 1)")
    ortho_init: int = model_technique(0, "0, 1", "orthogonal matrices; the writing ones scaled")
    logit_softcap: float = model_setting(30.0, "(0, inf)", "c in c*tanh(logits/c)")
    qk_gain_init: float = model_setting(1.5, "(-inf, inf)", "initial gain of each query head")
    quant_bits_mlp: int = model_setting(8, "[2, 8]", "bits of a stored weight, MLP")
    quant_bits_attn: int = model_setting(8, "[2, 8]", "the same, attention")
    quant_bits_embed: int = model_setting(8, "[2, 8]", "the same, token embedding and head")
    quant_bits_bigram: int = model_setting(8, "[2, 8]", "the same, BIGRAM_BUCKETS")
    quant_clip: str = model_setting("rowmax", "rowmax, sigma", "where a row's levels end")
    quant_sigma: float = model_setting(12.85, "(0, inf)", "sigma: they end at N deviations")
    compressor: str = model_setting("zstd", "zstd, rans", "codes the levels", "quantizer.py")
    quant_method: str = model_setting("round", "round, gptq", "gptq: calibrated", "quantizer.py")
    quant_trellis: int = model_setting(8, "1, 8", "gptq: states of the trellis; 1: no trellis")
    quant_classes: int = model_setting(1, "0, 1", "gptq: histograms by deviation; 0: by matrix")
    quant_steps: str = result_setting(
        "loss", "sigma, columns, rows, loss", "gptq: steps by sigma, sigma and U, g, or g and U"
    )
    quant_step: float = result_setting(0.4, "(0, inf)", "gptq: mean step, in deviations")
    quant_lambda: float = result_setting(0.37, "[0, inf)", "gptq: price of a bit, squared steps")
    calibration_tokens: int = result_setting(2**20, "[1, inf)", "gptq: training tokens it sees")
    calibration_seconds: float = result_setting(8.0, "[0, inf)", "gptq: kept from the wallclock")
    fit_budget: str = result_setting("none", "none, sigma, step", "fills the cap", "quantizer.py")
    mtp_tokens: int = result_technique(0, "[0, 8]", "further next tokens to learn from; 0: off")
    prefix_weight: float = result_technique(0.0, "[0, inf)", "for the target's prefix; 0: off")
    embed_lr: float = result_setting(0.6, "[0, inf)", "Adam, token embedding, untied")
    head_lr: float = result_setting(0.008, "[0, inf)", "Adam, output head, untied")
    tied_embed_lr: float = result_setting(0.05, "[0, inf)", "Adam, token embedding, tied")
    tied_embed_init_std: float = result_setting(0.005, "[0, inf)", "initial deviation, if tied")
    matrix_optimizer: str = result_technique("muon", "muon, adamw", "for matrices of the blocks")
    matrix_lr: float = result_setting(0.04, "[0, inf)", "its rate")
    scalar_lr: float = result_setting(0.04, "[0, inf)", "Adam, gains and scales")
    muon_momentum: float = result_setting(0.95, "[0, 1)", "momentum after its warmup")
    muon_backend_steps: int = result_setting(5, "[1, 100]", "Newton-Schulz iterations")
    muon_coefficients: str = result_technique("quintic", "quintic, polar", "polar: Polar Express")
    muon_row_norm: int = result_setting(0, "0, 1", "norm the rows before them (MuonEq-R)")
    normuon_beta2: float = result_technique(0.0, "[0, 1)", "norm neurons after them; 0: off")
    muon_momentum_warmup_start: float = result_setting(0.85, "[0, 1)", "momentum at step 0")
    muon_momentum_warmup_steps: int = result_setting(500, "[0, inf)", "steps of that warmup")
    muon_momentum_warmdown_frac: float = result_technique(0.0, "[0, 1]", "part of the run it falls")
    ema_nesterov: float = result_technique(0.0, "[0, 1)", "look ahead along mean steps; 0: off")
    beta1: float = result_setting(0.9, "[0, 1)", "Adam, first moment")
    beta2: float = result_setting(0.95, "[0, 1)", "Adam, second moment")
    embed_beta2: float = result_technique(0.0, "[0, 1)", "the same, embeddings; 0: BETA2")
    scalar_beta2: float = result_technique(0.0, "[0, 1)", "the same, gains and scales; 0: BETA2")
    adam_eps: float = result_setting(1e-8, "[0, inf)", "Adam, added to the denominator")
    muon_wd: float = result_setting(0.0, "[0, inf)", "decoupled decay, matrices of the blocks")
    adam_wd: float = result_setting(0.0, "[0, inf)", "decoupled decay, gains, scales and head")
    embed_wd: float = result_setting(0.0, "[0, inf)", "decoupled decay, embeddings")
    wd_schedule: str = result_technique("constant", "constant, linear, cosine", "of all decays")
    cautious_wd: int = result_technique(0, "0, 1", "decay a matrix where its step does so too")
    grad_clip_norm: float = result_setting(0.0, "[0, inf)", "cap on the gradient norm; 0: off")
    given: frozenset[str] = field(default=frozenset(), compare=False)  # settings that were given
    bos: int = field(default=1, compare=False)  # the id that begins a document


FIELDS = {f.name.upper(): f for f in dataclasses.fields(Hyperparameters) if "role" in f.metadata}
MODEL_SETTINGS = [name for name, f in FIELDS.items() if f.metadata["role"] == "model"]
RUN_SETTINGS = [name for name, f in FIELDS.items() if f.metadata["role"] == "run"]


def typo_of(name: str) -> str:
    """Find the setting that `name` is but for one character of each; empty if there is none."""
    size = max(len(name), 1)
    similar = [known for known in FIELDS if abs(len(known) - size) <= 1]
    found = difflib.get_close_matches(name.upper(), similar, n=1, cutoff=(size - 1) / size)
    return found[0] if found else ""


def parse_setting(name: str, text: str) -> Any:
    """Parse one setting. Raises ValueError that says what would be right."""
    if name not in FIELDS:
        meant = typo_of(name)
        advice = f"did you mean {meant}?" if meant else "see --help"
        raise ValueError(f"no such setting; {advice}")
    default = FIELDS[name].default
    about = FIELDS[name].metadata
    whole = isinstance(default, int)
    if not about["valid"] or (text == "" and default == ""):
        return text
    if "least" not in about:
        if text not in about["choices"]:
            raise ValueError(f"expected one of {about['valid']}")
        return int(text) if whole else text
    with suppress(ValueError):
        number = int(text) if whole else float(text)
        if about["least"] <= number <= about["most"]:
            return number
    raise ValueError(f"expected {'a whole number' if whole else 'a number'} in {about['valid']}")


def setting_texts(hp: Hyperparameters) -> dict[str, str]:
    """Write all settings, by the names of their variables, as they would be typed."""
    return {name: str(getattr(hp, name.lower())) for name in FIELDS}


def settings_dotenv(hp: Hyperparameters) -> str:
    """Write the settings as a dotenv file that CONFIG accepts."""
    texts = [(name, text) for name, text in setting_texts(hp).items() if name != "CONFIG"]
    return "\n".join(f"{name}={shlex.quote(text) if text else ''}" for name, text in texts)


def read_dotenv(path: str) -> dict[str, str]:
    """Read NAME=VALUE words in the quoting of a shell, with # comments. Raises UserError."""
    try:
        content = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
        if "\0" in content:
            raise ValueError("it has NUL characters; save it as UTF-8")
        hidden = re.sub(r"(?<=\S)#", "\0", content)  # within a word, it begins no comment
        words = [word.replace("\0", "#") for word in shlex.split(hidden, comments=True)]
        for word in words:
            if "=" not in word or word.startswith("CONFIG="):
                raise ValueError(f"{word!r}: expected NAME=VALUE, spaces quoted, and not CONFIG")
    except (OSError, ValueError) as error:
        raise UserError(f"CONFIG={path}: cannot be read as a dotenv file: {error}") from None
    return dict(word.split("=", 1) for word in words)


@cache
def find_beside(name: str) -> ModuleType | None:
    """Import a file of code, if it is beside this one."""
    if not Path(__file__).with_name(name).is_file():
        return None
    if __name__ == "__main__":  # what it imports is this module, not a second one
        sys.modules["train_gpt"] = sys.modules[__name__]
    return importlib.import_module(Path(name).stem)


def find_keeper() -> ModuleType | None:
    """Import keeper.py, which protects, resumes and explains a run, if it is there, and can run."""
    is_posix = importlib.util.find_spec("fcntl")
    return find_beside("keeper.py") if is_posix else None


def extra(name: str, hp: Hyperparameters) -> ModuleType | None:
    """Import a file that these settings need. Raises UserError if it is not beside this one."""
    ours = [key for key, f in FIELDS.items() if f.metadata["file"] == name]
    asking = [key for key in ours if getattr(hp, key.lower()) != FIELDS[key].default]
    if not asking:
        return None
    module = find_beside(name)
    require(module, f"{', '.join(asking)}: {name} must lie beside {Path(__file__).name}")
    return module


quantizer = partial(extra, "quantizer.py")
frontier = partial(extra, "frontier.py")


def part(name: str, hp: Hyperparameters) -> Any:
    """Give frontier.py's class of this name, if settings need that file; or else this file's."""
    return getattr(frontier(hp) or sys.modules[__name__], name)


def code_files(hp: Hyperparameters) -> list[str]:
    """List the files whose code counts."""
    modules = [quantizer(hp), frontier(hp)]
    return [__file__, *(str(module.__file__) for module in modules if module)]


def value_problems(hp: Hyperparameters) -> list[str]:
    """Say what is wrong between settings that are each valid; the keeper has more to say."""
    context = hp.eval_seq_len or hp.train_seq_len
    uneven_batch = hp.train_batch_tokens % hp.train_seq_len
    rules = [
        (hp.eval_stride > context, "{EVAL_STRIDE}: over {CONTEXT}"),
        (uneven_batch, "{TRAIN_BATCH_TOKENS}: not divisible by {TRAIN_SEQ_LEN}"),
    ]
    if keeper := find_keeper():
        rules += keeper.value_rules(hp, context)
    shown = {name: f"{name}={text}" for name, text in setting_texts(hp).items()}
    shown["CONTEXT"] = shown["EVAL_SEQ_LEN" if hp.eval_seq_len else "TRAIN_SEQ_LEN"]
    return [text.format_map(shown) for broken, text in rules if broken]


def load_settings(environ: Mapping[str, str], check_places: bool = True) -> Hyperparameters:
    """Resolve environment, CONFIG file and defaults. Raises UserError with all problems found."""
    config = read_dotenv(environ["CONFIG"]) if environ.get("CONFIG") else {}
    problems = []
    values = {}
    for name, text in {**config, **environ}.items():
        if name in FIELDS or name in config or typo_of(name):
            try:
                values[name.lower()] = parse_setting(name, text)
            except ValueError as error:
                problems.append(f"{name}={text}: {error}")
    hp = Hyperparameters(**values, given=frozenset(name.upper() for name in values))
    problems += value_problems(hp)
    if keeper := find_keeper():
        problems += keeper.surroundings_problems(hp, environ, check_places)
    elif hp.save_every or hp.resume or hp.watch or hp.report_to:
        problems.append("SAVE_EVERY, RESUME, WATCH, REPORT_TO: need keeper.py beside the script")
    require(not problems, "\n  ".join([f"{len(problems)} problem(s) in the settings:", *problems]))
    code_files(hp)
    return hp


# ===================================== MODEL =====================================


def frequencies(hp: Hyperparameters, length: int) -> Tensor:
    """Give the angles by which a position turns pairs of channels, base^(-2i/r): double (r/2)."""
    r = hp.rope_dims or hp.model_dim // hp.num_heads
    return hp.rope_base ** -(torch.arange(r // 2).double() / (r // 2))


def rotary_table(hp: Hyperparameters, length: int, rows: int = 1) -> Tensor:
    """Tabulate cos and ±sin of t·f, positions t of `rows` contexts: double (2, T, r) (RoPE)."""
    f = part("frequencies", hp)(hp, length)
    angles = torch.outer(torch.arange(rows * length).double(), f)
    cos = angles.cos().repeat(1, 2)
    sin = torch.cat((angles.sin(), -angles.sin()), dim=1)
    return torch.stack((cos, sin))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate pairs (i, i + r/2) of x's first r channels, (B, T, H, Dh), by rotary (2, T, r)."""
    cos, sin = rotary[:, :, None]
    r = rotary.size(-1)
    turned = x[..., :r]
    swapped = turned.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    turned = torch.addcmul(turned * cos, swapped, sin)
    return turned if r == x.size(-1) else torch.cat((turned, x[..., r:]), dim=-1)


class Norm(torch.autograd.Function):
    """Norm x (..., D) by its RMS, 1/r, scale it by s, and rotate it: y = R(s·r·x).

    s is a number, or gains (H, 1) of x (B, T, H, Dh). With dy turned back and c = r·sum(x·dy),
    ds = sum(c) and dx = s·r·dy - s·r²·c/D·x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor | float, rotary: Tensor | None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = (norm.square() / x.size(-1) + torch.finfo(torch.float32).eps).rsqrt()
        ctx.s = s
        ctx.save_for_backward(x, r, rotary)
        scale = s * r
        y = x * scale.to(x.dtype)
        return y if rotary is None else rotate(y, rotary)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, r, rotary = ctx.saved_tensors
        if rotary is not None:
            dy = rotate(dy, torch.stack((rotary[0], -rotary[1])))
        c = r * (x * dy).sum(-1, keepdim=True, dtype=r.dtype)
        scale = ctx.s * r
        along = -scale * r * c / x.size(-1)
        dx = dy * scale.to(x.dtype)
        dx.addcmul_(x, along.to(x.dtype))
        ds = c.sum((0, 1)).to(ctx.s.dtype) if ctx.needs_input_grad[1] else None
        return dx, ds, None


def rms_norm(x: Tensor, scale: float = 1.0) -> Tensor:
    """Give scale·x / sqrt(mean(x²)) over the last dimension (arXiv 1910.07467)."""
    return Norm.apply(x, scale, None)


class SquaredRelu(torch.autograd.Function):
    """Give y = relu(x)²; its gradient, 2·sqrt(y)·dy, needs y alone, which is kept anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu().square()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return 2 * y.pow(0.5) * dy


IGNORE = -100  # target of a padding position, whose NLL is 0
LOGITS = {"cuda": 2**29, "mps": 2**24, "cpu": 2**20}  # that are made at once


def squash(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """Give tanh(x·Wᵀ/c), the logits of x (N, D) by W (V, D) over their softcap, in fp32: (N, V)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x, weight).to(wide)
    return torch.tanh(logits / c)


class CappedLoss(torch.autograd.Function):
    """Give the NLL of targets (N, K) by softmax(c·tanh(x·Wᵀ/c)), for x (N, D) and W (V, D): (N).

    It is the sum over K by `weights` (K). Of the logits z the gradient alone is kept, in x's dtype:
    (softmax(z)·sum(weights) - sum(weights·onehot))·(1 - (z/c)²).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor | float,
        c: float,
        listen: Listener,
    ) -> Tensor:
        capped = squash(x, weight, c)
        logits = c * capped
        total = torch.logsumexp(logits, dim=-1, keepdim=True)
        shares = (targets != IGNORE).to(capped.dtype) * weights
        share = shares.sum(1, keepdim=True)
        found = logits.gather(1, targets.clamp(min=0))
        if ctx.needs_input_grad[0]:
            classes = torch.arange(len(weight), device=x.device)
            slope = torch.exp(logits - (total - share.log()))
            for label, part in zip(targets.split(1, 1), shares.split(1, 1), strict=True):
                slope = torch.where(classes == label, slope - part, slope)
            slope = slope * (1 - capped.square())
            ctx.save_for_backward(x, weight, slope.to(x.dtype))
            ctx.listen = listen
        return (shares * (total - found)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, slope = ctx.saved_tensors
        scale = grad[:, None].to(x.dtype)
        if ctx.listen:
            ctx.listen(x, slope * scale)
        dx = (slope @ weight) * scale
        dw = slope.mT @ (x * scale)
        return dx, dw, None, None, None, None


def parameter(*shape: int) -> nn.Parameter:
    """Make a parameter whose first values its row of `parameter_table` will set."""
    return nn.Parameter(torch.empty(shape))


class Matrix(nn.Linear):
    """A linear map by weights that are cast where they are used."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor, gains: Tensor | None = None) -> Tensor:
        """Map x (..., in) to (..., out), whose channels are scaled by `gains` (out)."""
        weight = self.weight
        if gains is not None:
            weight = gains[:, None] * weight
        return F.linear(x, weight.to(x.dtype))


def together(x: Tensor, *parts: Matrix) -> Tensor:
    """Map x by several matrices, side by side: in one product, if none has a hook."""
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in parts):
        return torch.cat([m(x) for m in parts], dim=-1)
    weight = torch.cat([m.weight for m in parts])
    return F.linear(x, weight.to(x.dtype))


def send(array: ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device, without waiting for what it does."""
    x = torch.from_numpy(array)
    x = x.pin_memory() if device.type == "cuda" else x
    return x.to(device, non_blocking=True)


class Documents(NamedTuple):
    """Pieces of documents in a batch of B·T tokens: attention does not cross where one starts."""

    offsets: Tensor  # where they start, and B·T: int32 (S + 1,)
    longest: int  # tokens that one has at most


Cuts = Documents | None  # None: each row is one piece
PACKED = {}  # kernels for pieces, by the type of device
VARLEN = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def cut(begins: ndarray, longest: int, device: torch.device) -> Documents:
    """Cut a batch where a row begins, or a document (`begins`, bool (B, T)), and at `longest`."""
    begins[:, 0] = True
    at = np.arange(begins.size)
    last = np.maximum.accumulate(np.where(begins.ravel(), at, 0))
    starts = np.flatnonzero((at - last) % longest == 0)
    offsets = np.append(starts, at.size).astype(np.int32)
    return Documents(send(offsets, device), longest)


def attend_by_piece(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Attend within each piece of N tokens, from q (1, H, N, Dh) to k and v: like q."""
    sizes = offsets.diff().tolist()
    pieces = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
    found = []
    for size, piece in zip(sizes, pieces, strict=True):
        room = (0, 0, 0, -size % 64)  # oneDNN keeps compiled code for each length
        padded = [F.pad(x, room) for x in piece] if room[-1] else piece
        found.append(attend(*padded).narrow(2, 0, size))
    return torch.cat(found, dim=2)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Cuts = None) -> Tensor:
    """Attend causally from q (B, H, S, Dh), at the last S of T positions, to k and v: like q."""
    sdpa = F.scaled_dot_product_attention
    gqa = q.size(1) != k.size(1)
    S = q.size(2)
    T = k.size(2)
    if documents is None and S == T:
        return sdpa(q, k, v, is_causal=True, enable_gqa=gqa)
    if documents is None:
        mask = q.new_ones(S, T, dtype=torch.bool).tril(T - S)
        return sdpa(q, k, v, attn_mask=mask, enable_gqa=gqa)
    offsets, longest = documents
    qkv = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    if q.is_cuda and q.dtype == torch.bfloat16:
        limits = (offsets, offsets, longest, longest)
        y = varlen_attn(*qkv, *limits, window_size=(-1, 0), **VARLEN)
    else:
        heads = [x.transpose(0, 1)[None] for x in qkv]
        kernel = PACKED.get(q.device.type, attend_by_piece)
        y = kernel(*heads, offsets)[0].transpose(0, 1)
    return y.unflatten(0, (-1, T)).transpose(1, 2)


def tail(x: Tensor, last: int, dim: int) -> Tensor:
    """Take the last positions; all of them as they are, for which a slice would cost traffic."""
    return x if last == x.size(dim) else x.narrow(dim, x.size(dim) - last, last)


class Attention(nn.Module):
    """Causal grouped-query attention with QK-norm and a learned gain of each query head."""

    def __init__(self, hp: Hyperparameters, layer: int) -> None:
        super().__init__()
        dim = hp.model_dim
        self.head_dim = dim // hp.num_heads
        self.c_q = Matrix(dim, dim)
        self.proj = Matrix(dim, dim)
        self.c_k = Matrix(dim, self.head_dim * hp.num_kv_heads)
        self.c_v = Matrix(dim, self.head_dim * hp.num_kv_heads)
        self.q_gain = parameter(hp.num_heads, 1, 1)

    def project(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give q (B, H, T, Dh), and k and v (B, K, T, Dh), of x (B, T, D)."""
        H = self.q_gain.size(0)
        K = self.c_k.out_features // self.head_dim
        qkv = together(x, self.c_q, self.c_k, self.c_v)
        qkv = qkv.unflatten(2, (-1, self.head_dim))
        qk, v = qkv.split((H + K, K), dim=2)
        gains = F.pad(self.q_gain.view(H, 1), (0, 0, 0, K), value=1.0)
        qk = Norm.apply(qk, gains, rotary)
        q, k = qk.transpose(1, 2).split((H, K), dim=1)
        return q, k, v.transpose(1, 2)

    def heads(self, x: Tensor, rotary: Tensor, last: int, documents: Cuts) -> Tensor:
        """Give the output of each head at the last S positions of x (B, T, D): (B, H, S, Dh)."""
        q, k, v = self.project(x, rotary)
        return attend(tail(q, last, dim=2), k, v, documents)

    def forward(
        self, x: Tensor, rotary: Tensor, gains: Tensor | None, last: int, documents: Cuts
    ) -> Tensor:
        """Map x (B, T, D) to what the residual stream gets, (B, S, D), scaled by `gains` (D)."""
        y = self.heads(x, rotary, last, documents)
        return self.proj(y.transpose(1, 2).flatten(2), gains)


class Block(nn.Module):
    """Attention and MLP: x ← m0·x + m1·x0; x ← x + a·Attention(norm x); x ← x + b·MLP(norm x).

    m0, m1, a and b are learned per channel, if they are there. In a parallel block (GPT-J) both
    read the same. MLP(x) = W2·relu(W1·x)² is Primer's (2109.08668).
    """

    Attention = Attention
    activate = staticmethod(SquaredRelu.apply)

    def __init__(self, hp: Hyperparameters, layer: int) -> None:
        super().__init__()
        dim = hp.model_dim
        hidden = int(hp.mlp_mult * dim)
        self.scale = 1.0  # of what is normed
        self.parallel = False
        self.attn = self.Attention(hp, layer)
        self.fc = Matrix(dim, hidden)
        self.proj = Matrix(hidden, dim)
        self.attn_scale = parameter(dim)
        self.mlp_scale = parameter(dim)
        self.resid_mix = parameter(2, dim)

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        rotary: Tensor,
        last: int,
        documents: Cuts,
    ) -> Tensor:
        """Map the residual stream x (B, T, D) to its `last` positions; x0 is what it started as."""
        if self.resid_mix is not None:
            mix = self.resid_mix.to(x.dtype)
            x = mix[0] * x + mix[1] * x0
        y = rms_norm(x, self.scale)
        x = tail(x, last, dim=1) + self.attn(y, rotary, self.attn_scale, last, documents)
        y = tail(y, last, dim=1) if self.parallel else rms_norm(x, self.scale)
        y = self.fc(y)
        return x + self.proj(self.activate(y), self.mlp_scale)


class Table(nn.Embedding):
    """Rows to look up. Their gradients add up in fp32: in bf16, sums outgrow what is added."""

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids int64 (B, T) to rows (B, T, D)."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return F.embedding(ids, self.weight.to(wide)).to(self.weight.dtype)


class Row(NamedTuple):
    """How a kind of parameter starts, is trained, and is stored: a row of `parameter_table`."""

    pattern: str  # of its name; * is any text
    optimizer: str  # "muon", for matrices alone, or "adam"
    lr: float
    decay: float
    beta2: float  # of the second moment
    start: Any  # values, or what draws them; None: as its module drew them
    bits: int  # of a value in the artifact; 0: fp32


def parameter_table(hp: Hyperparameters) -> list[Row]:
    """Describe the parameters of a GPT: the first row that fits a name counts."""
    adam = ("adam", hp.scalar_lr, hp.adam_wd, hp.beta2)
    muon = ("muon", hp.matrix_lr, hp.muon_wd, 0.0)
    head = ("adam", hp.head_lr, hp.adam_wd, hp.beta2)
    embed = ("adam", hp.embed_lr, hp.embed_wd, hp.beta2)
    token = None
    if hp.tie_embeddings:
        embed = ("adam", hp.tied_embed_lr, hp.embed_wd, hp.beta2)
        token = partial(nn.init.normal_, std=hp.tied_embed_init_std)
    return [  # what writes to the residual stream starts silent
        Row("tok_emb.weight", *embed, token, hp.quant_bits_embed),
        Row("lm_head.weight", *head, 0.0, hp.quant_bits_embed),
        Row("skip_weights", *adam, 1.0, 0),
        Row("blocks.*.attn.proj.weight", *muon, 0.0, hp.quant_bits_attn),
        Row("blocks.*.attn.c_*.weight", *muon, None, hp.quant_bits_attn),
        Row("blocks.*.attn.q_gain", *adam, hp.qk_gain_init, 0),
        Row("blocks.*.proj.weight", *muon, 0.0, hp.quant_bits_mlp),
        Row("blocks.*.fc.weight", *muon, None, hp.quant_bits_mlp),
        Row("blocks.*.resid_mix", *adam, [[1.0], [0.0]], 0),
        Row("blocks.*_scale", *adam, 1.0, 0),
    ]


def row_of(name: str, hp: Hyperparameters) -> Row:
    """Find a parameter's row of the table. Raises UserError if there is none."""
    for row in part("parameter_table", hp)(hp):
        if fnmatch.fnmatchcase(name, row.pattern):
            return row
    raise UserError(f"parameter {name}: no row of parameter_table fits its name; add one")


@torch.no_grad()
def initialize(p: Tensor, start: Any) -> None:
    """Set the first values of a parameter, as its row of the table says."""
    if callable(start):
        start(p)
    elif start is not None:
        p.copy_(torch.tensor(start))


class GPT(nn.Module):
    """The baseline model of the challenge; frontier.py adds what its records add."""

    Block = Block

    def __init__(self, hp: Hyperparameters, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        dim = hp.model_dim
        self.dtype = dtype
        self.softcap = hp.logit_softcap
        self.bos = hp.bos
        self.trained = hp.train_seq_len
        self.visits = [*range(hp.num_layers)]
        self.listen: Listener = None
        self.tok_emb = Table(hp.vocab_size, dim)
        self.build(hp)
        self.blocks = nn.ModuleList(self.Block(hp, layer) for layer in range(hp.num_layers))
        self.lm_head = None if hp.tie_embeddings else Matrix(dim, hp.vocab_size)
        for name, p in self.named_parameters():
            initialize(p, row_of(name, hp).start)
        rows = ROW if hp.train_doc_isolated or hp.eval_doc_isolated or hp.score_streams else 1
        for name, length in (("short", hp.train_seq_len), ("long", hp.eval_seq_len)):
            table = rotary_table(hp, length, rows).to(dtype)
            self.register_buffer(name, table, persistent=False)

    def build(self, hp: Hyperparameters) -> None:
        """Make the parameters of what lies around the blocks."""
        self.skip_weights = parameter(len(self.visits) // 2, hp.model_dim)

    def embed(self, inputs: Tensor, documents: Cuts = None) -> Tensor:
        """Map tokens int64 (B, T) to the first residual stream (B, T, D)."""
        return rms_norm(self.tok_emb(inputs).to(self.dtype))

    def skip(self, x: Tensor, states: list[Tensor], half: int) -> Tensor:
        """Add to x (B, T, D), in the second half of the visits, what the first gave, last first."""
        i = len(states) - 1  # visits so far
        if not half <= i < 2 * half:
            return x
        return x + self.skip_weights[i - half].to(x.dtype) * states[2 * half - i]

    def trunk(self, x: Tensor, visits: list[int], last: int, documents: Cuts = None) -> Tensor:
        """Take x (B, T, D) through blocks to its `last` positions."""
        T = x.size(1)
        longest = documents.longest if documents else T
        rotary = self.short if longest <= self.trained else self.long
        rotary = rotary[:, :T]
        states = [x]
        for i, layer in enumerate(visits):
            x = self.skip(x, states, len(visits) // 2)
            needed = T if i < len(visits) - 1 else last
            x = self.blocks[layer](x, states[0], rotary, needed, documents)
            states.append(x)
        return x

    def unembedding(self) -> Tensor:
        """Give the matrix of the output head, (V, D)."""
        head = self.tok_emb if self.lm_head is None else self.lm_head
        return head.weight.to(self.dtype)

    def logits(self, inputs: Tensor) -> Tensor:
        """Give the logits of the token behind inputs, int64 (B, T): fp32 (B, V)."""
        x = self.trunk(self.embed(inputs), self.visits, 1)
        x = rms_norm(x[:, -1])
        return self.softcap * squash(x, self.unembedding(), self.softcap)

    def head(self, x: Tensor, targets: Tensor, weights: Tensor | float = 1.0) -> Tensor:
        """Give the NLL of targets, int64 (B, T): fp32 (B, T); of (B, T, K), the sum by weights."""
        weight = self.unembedding()
        rows = max(1, LOGITS[x.device.type] // len(weight))
        x = rms_norm(x).flatten(0, 1)
        labels = targets.reshape(len(x), -1)
        how = (weights, self.softcap, self.listen)
        pairs = zip(x.split(rows), labels.split(rows), strict=True)
        nll = [CappedLoss.apply(part, weight, label, *how) for part, label in pairs]
        return torch.cat(nll).view(targets.shape[:2])

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        documents: Cuts = None,
        weights: Tensor | float = 1.0,
    ) -> Tensor:
        """Give the NLL of targets, int64 (B, S) or (B, S, K), at the last S inputs: fp32 (B, S)."""
        x = self.embed(inputs, documents)
        x = self.trunk(x, self.visits, targets.size(1), documents)
        return self.head(x, targets, weights)


def build_model(hp: Hyperparameters, dtype: torch.dtype = torch.float32) -> GPT:
    """Make the model that settings ask for."""
    return part("GPT", hp)(hp, dtype)


# ===================================== OPTIMIZERS =====================================
# An optimizer keeps its state in `optimizer.state`, which it may make late, and its step changes
# nothing if `found_inf`, a number on the device, is not 0: all gradients are 0 then.
Group = dict[str, Any]  # parameters and settings of an optimizer
Round = tuple[float, float, float]  # a, b, c of a Newton-Schulz iteration
NEWTON_SCHULZ: Round = (3.4445, -4.7750, 2.0315)


def orthogonalize(g: Tensor, rounds: list[Round]) -> Tensor:
    """Push the singular values of each matrix of g, (N, rows, cols), towards 1, in g's dtype.

    Newton-Schulz: X ← (aI + bA + cA²)X with A = XXᵀ (Muon, kellerjordan.github.io/posts/muon).
    """
    tall = g.size(-2) > g.size(-1)
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    identity = x.new_ones(x.size(-2)).diag()
    for a, b, c in rounds:
        s = x @ x.mT
        x = torch.add(a * identity + b * s, s @ s, alpha=c) @ x
    return x.mT if tall else x


def newton_schulz(hp: Hyperparameters) -> list[Round]:
    """List the coefficients of all iterations."""
    return [NEWTON_SCHULZ] * hp.muon_backend_steps


def directions(
    grads: list[Tensor], momenta: list[Tensor], mu: Tensor, bad: Tensor, settings: Group
) -> list[Tensor]:
    """Move momenta M, (N, rows, cols), unless `bad`; give G + μM orthogonalized, or 0."""
    kept = torch.where(bad, 1.0, mu)
    found = []
    for g, m in zip(grads, momenta, strict=True):
        m.mul_(kept).add_(g)
        x = torch.addcmul(g, m, mu).mul_(~bad)
        if settings.get("row_norm"):  # MuonEq-R (arXiv 2603.28254)
            x = F.normalize(x, dim=-1, eps=1e-7)
        x = x.to(settings["dtype"])
        found.append(orthogonalize(x, settings["rounds"]))
    return found


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalized update; the matrices of a group are of one shape.

    M ← μM + G; W ← (1 - lr·decay)·W - lr·sqrt(max(1, rows/cols))·orthogonalize(G + μM), of one μ.
    """

    def __init__(self, groups: list[Group], defaults: Group) -> None:
        super().__init__(groups, defaults)
        self.found_inf = groups[0]["params"][0].new_zeros(())
        self.settings = defaults
        compiled = defaults.get("compiled")
        self.directions = torch.compile(directions, dynamic=False) if compiled else directions

    def momenta(self, params: list[Tensor]) -> Tensor:
        """Give M of a group, (N, rows, cols), which the states of its matrices are views of."""
        states = [self.state[p] for p in params]
        batch = getattr(states[0].get("momentum_buffer"), "_base", None)
        if batch is None:  # the first step, or the first one with a state that was given
            kept = [self.state[p].get("momentum_buffer", torch.zeros_like(p)) for p in params]
            batch = torch.stack(kept)
            for state, m in zip(states, batch, strict=True):
                state["momentum_buffer"] = m
        return batch

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all matrices from their gradients."""
        bad = self.found_inf > 0
        grads = [torch.stack([p.grad for p in group["params"]]) for group in self.param_groups]
        momenta = [self.momenta(group["params"]) for group in self.param_groups]
        mu = grads[0].new_full((), self.param_groups[0]["momentum"])
        found = self.directions(grads, momenta, mu, bad, self.settings)
        for group, x in zip(self.param_groups, found, strict=True):
            rows, cols = x.shape[-2:]
            x = x.to(grads[0].dtype, memory_format=torch.contiguous_format)
            self.apply(group, x, group["lr"] * max(1.0, rows / cols) ** 0.5, bad)

    def apply(self, group: Group, x: Tensor, rate: float, bad: Tensor) -> None:
        """Let the weights of a group decay, and move them by -rate·x, (N, rows, cols)."""
        params = group["params"]
        if decay := group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * decay * ~bad)
        torch._foreach_add_(params, [*x], alpha=-rate)


def build_optimizers(params: Weights, run: Run) -> list[torch.optim.Optimizer]:
    """Divide the parameters of a GPT, or some of them, among AdamW and Muon by their table."""
    hp = run.hp
    groups = {"adam": {}, "muon": {}}
    for name, p in params.items():
        row = row_of(name, hp)
        key = (row.lr, row.decay, row.beta2)
        if row.optimizer == "muon":
            what = f"parameter {name}: Muon takes matrices, not the shape {tuple(p.shape)}"
            require(p.ndim == 2, f"{what}; let its row of parameter_table say adam")
            key = (*key, p.shape)
        group = {"params": [], "lr": row.lr, "base_lr": row.lr, "weight_decay": row.decay}
        group |= {"base_decay": row.decay, "betas": (hp.beta1, row.beta2)}
        group = groups[row.optimizer].setdefault(key, group)
        group["params"].append(p)
    optimizers = []
    if adam := [*groups["adam"].values()]:
        optimizers.append(torch.optim.AdamW(adam, 0.0, eps=hp.adam_eps, fused=True))
    if muon := [*groups["muon"].values()]:
        settings = {"dtype": run.dtype, "row_norm": hp.muon_row_norm, "cautious": hp.cautious_wd}
        settings["rounds"] = part("newton_schulz", hp)(hp)
        settings["compiled"] = run.compile and run.device.type == "cuda"
        optimizers.append(part("Muon", hp)(muon, settings))
    return optimizers


def training_seconds(hp: Hyperparameters) -> float:
    """Give the cap on training alone, without what calibration keeps of it; 0: none."""
    kept = hp.calibration_seconds if hp.quant_method == "gptq" else 0.0
    return max(hp.max_wallclock_seconds - kept, 0.0)


def steps_left(hp: Hyperparameters, step: int, elapsed: float) -> float:
    """Tell how many steps will come until ITERATIONS, or the wallclock cap at the mean pace."""
    left = hp.iterations - step
    cap = training_seconds(hp)
    return min(left, (cap - elapsed) * step / elapsed) if cap and step and elapsed else left


def warmdown(hp: Hyperparameters, step: int, left: float) -> float:
    """Give the share of the rates' fall that is still to come: 1 before it begins, 0 at the end."""
    steps = hp.warmdown_iters
    if hp.warmdown_frac != "":
        steps = hp.warmdown_frac * (step + left)
    return min(1.0, max(0.0, left / steps)) if steps > 0 else 1.0


def lr_scale(hp: Hyperparameters, step: int, elapsed: float) -> float:
    """Scale all rates: 1, then linearly to FINAL_LR_FRAC at ITERATIONS or the wallclock cap."""
    share = warmdown(hp, step, steps_left(hp, step, elapsed))
    return share + (1 - share) * hp.final_lr_frac


# ===================================== DATA =====================================
# A shard is 256 little-endian int32 (magic, version, number of tokens, zeros), then uint16 tokens.
SHARD_MAGIC = (20240520, 1)
SHARD_HEADER_BYTES = 1024
FORWARD_TOKENS = {"cuda": 65536, "mps": 16384, "cpu": 4096}  # in one forward pass, by default
LOADED = 16  # batches ahead: a new shard takes most of a second to shuffle


def shard_paths(hp: Hyperparameters, split: str) -> list[Path]:
    """List the shards of "train" or "val" in order; sidecars (fineweb_val_bytes_*) are none."""
    return sorted(Path(hp.data_path).glob(f"fineweb_{split}_[0-9]*.bin"))


def shard_size(path: Path) -> int:
    """Read how many tokens a shard has. Raises UserError if the file is not a whole shard."""
    magic, version, count = [*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0][:3]
    known = (magic, version) == SHARD_MAGIC
    require(known, f"{path}: not a token shard: no {SHARD_MAGIC} in it")
    whole = count > 0 and path.stat().st_size == SHARD_HEADER_BYTES + 2 * count
    require(whole, f"{path}: truncated or damaged: not as long as {count} tokens; get it again")
    return count


class TokenStream:
    """The shards of a split in an endless sequence."""

    def __init__(self, split: str, run: Run, ids: int = 0) -> None:
        self.run = run
        self.paths = shard_paths(run.hp, split)
        self.ids = ids or run.hp.vocab_size
        self.sizes = np.array([shard_size(path) for path in self.paths])
        self.total = int(self.sizes.sum())
        if run.keeper:
            run.keeper.scan(self)

    def read(self, start: int, count: int) -> ndarray:
        """Read tokens [start, start + count), uint16 (count,). Raises UserError at a wrong id."""
        pieces = []
        ends = self.sizes.cumsum()
        while count:
            place = start % self.total
            shard = int(np.searchsorted(ends, place, "right"))
            left = int(ends[shard]) - place
            few = min(count, left)
            pieces.append(self.read_in_shard(shard, int(self.sizes[shard]) - left, few))
            start += few
            count -= few
        return np.concatenate(pieces)

    def read_in_shard(self, shard: int, place: int, count: int) -> ndarray:
        """Read `count` tokens of a shard, and check them."""
        path = self.paths[shard]
        piece = np.fromfile(path, "<u2", count, offset=SHARD_HEADER_BYTES + 2 * place)
        require(len(piece) == count, f"{path}: has become shorter; get it again")
        worst = int(piece.max())
        where = f"{path}, token {place + piece.argmax()}"
        require(worst < self.ids, f"{where}: id {worst}, VOCAB_SIZE={self.ids}")
        return piece


ROW = 8  # sequences in a row of isolated documents: its ends cut few
Batch = tuple[Tensor, Tensor, Cuts]  # inputs and targets, int64 (B, T)


def row_length(hp: Hyperparameters) -> int:
    """Count the tokens of a row in training: ranks and micro-batches do not change it."""
    T = hp.train_seq_len
    return T * math.gcd(hp.train_batch_tokens // T, ROW) if hp.train_doc_isolated else T


def batches(
    stream: TokenStream,
    run: Run,
    first: int = 0,
    origin: int = 0,
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each step from `first` on, loaded ahead; step 0 is at `origin`."""
    hp = run.hp
    step_tokens = hp.train_batch_tokens
    T = row_length(hp)
    total = step_tokens // T
    # Each rank has a contiguous share of a step's tokens, in micro-batches of one shape for all.
    start = total * run.rank // run.world_size
    stop = total * (run.rank + 1) // run.world_size
    most = math.ceil(total / run.world_size)
    count = math.ceil(most / run.forward_rows)
    rows = math.ceil(most / count)
    padding = (start - stop) % rows * T

    def load(step: int) -> list[Batch]:
        tokens = (stop - start) * T + 1
        span = stream.read(origin + step * step_tokens + start * T, tokens)
        inputs = np.pad(span[:-1].astype(np.int64), (0, padding))
        targets = np.pad(span[1:].astype(np.int64), (0, padding), constant_values=IGNORE)
        pairs = np.stack((inputs, targets)).reshape(2, -1, rows, T).swapaxes(0, 1)
        documents: list[Cuts] = [None] * len(pairs)
        if hp.train_doc_isolated:
            documents = [cut(x == hp.bos, hp.train_seq_len, run.device) for x, _ in pairs]
        sent = send(pairs, run.device)
        return [(*pair, cuts) for pair, cuts in zip(sent, documents, strict=True)]

    worker = ThreadPoolExecutor(1)  # gc in it cannot join it
    ahead = [worker.submit(load, first + i) for i in range(LOADED)]
    for step in itertools.count(first + LOADED):
        ready = ahead.pop(0).result()
        ahead.append(worker.submit(load, step))
        yield ready


# ===================================== EVALUATION =====================================
# A wrong count of bytes wins leaderboards unnoticed, so it is audited against decoded text first.
SPACE = "\u2581"  # SentencePiece's marker of a space
CASE_MARKS = "\ue001\ue002\ue003\ue004"  # pieces of a tokenizer of CaseOps text
ADVICE = "TOKENIZER_PATH must be the tokenizer of the shards, and have a piece for a single space"


class Tokenizer:
    """A SentencePiece model, and the UTF-8 bytes of text that each of its pieces stands for."""

    def __init__(self, hp: Hyperparameters) -> None:
        path = hp.tokenizer_path
        try:
            self.sp = sp = SentencePieceProcessor(model_proto=read_once(path))
        except Exception as error:
            raise UserError(f"{path}: not a SentencePiece model: {error}") from None
        require(len(sp) == hp.vocab_size, f"{path}: {len(sp)} pieces, not VOCAB_SIZE")
        self.bos = sp.bos_id()
        ids = range(len(sp))
        self.pieces = [sp.id_to_piece(i) for i in ids]
        texts = [piece.removeprefix(SPACE).replace(SPACE, " ") for piece in self.pieces]
        silent = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids]
        self.silent = np.array(silent)  # holds no text; a space behind it does not count
        self.byte = np.array([sp.is_byte(i) for i in ids])
        sizes = np.array([len(text.encode()) for text in texts])
        self.base = np.where(self.byte, 1, sizes) * ~self.silent
        lead = np.array([piece.startswith(SPACE) for piece in self.pieces])
        self.lead = lead & ~self.silent  # begins with a space
        self.byte_level = (self.byte | self.silent).all()  # no piece is more than a byte
        self.case_ops = {*CASE_MARKS} <= {*self.pieces}
        # Decoding strips spaces from the start of a text, so a plain word goes there first.
        plain = [i for i, piece in enumerate(self.pieces) if piece.isalpha() and self.base[i]]
        self.plain = plain[:1]
        self.plain_text = "".join(self.pieces[i] for i in self.plain)

    def lengths(self, tokens: ndarray) -> ndarray:
        """Count the bytes of tokens[1:], each given the one before: (N,) to int64 (N - 1,)."""
        spaces = self.lead[tokens[1:]] & ~self.silent[tokens[:-1]]
        return self.base[tokens[1:]] + spaces

    def audit(self, tokens: ndarray, prose: bool = True) -> None:
        """Compare `lengths` with the text of each document; the keeper encodes prose again."""
        require(self.plain or self.byte_level, f"byte audit: no piece is a plain word; {ADVICE}")
        starts = 1 + np.flatnonzero(tokens[1:] == self.bos)
        for number, ids in enumerate(np.split(tokens, starts)):
            count = self.base[ids[0]] + self.lengths(ids).sum()
            size = self.decoded_bytes(ids)
            what = f"document {number} counts {count} bytes, but decodes to {size}"
            require(count == size, f"byte audit: validation {what}; {ADVICE}")
        keeper = find_keeper()
        if prose and keeper:
            keeper.audit_words(self, tokens)
        require(self.lengths(tokens).any(), "byte audit: the validation tokens hold no text")

    def decoded_bytes(self, ids: ndarray) -> int:
        """Count the UTF-8 bytes that tokens decode to, less spaces that follow a silent token."""
        space = SPACE if self.byte_level or self.case_ops else " "
        size = 0
        for part in np.split(ids, np.flatnonzero(self.silent[ids])):
            part = part[~self.silent[part]]
            text = self.sp.decode(self.plain + part.tolist())
            text = text.removeprefix(self.plain_text).replace(SPACE, space)
            size += len(text.encode()) - int(self.lead[part[:1]].sum())
            if "\ufffd" in text:
                size -= 2 * self.stray_bytes(part)
        return size

    def stray_bytes(self, ids: ndarray) -> int:
        """Count byte tokens that form no character: each decodes to U+FFFD, of three bytes."""
        raw = bytearray(len(ids))
        for place in np.flatnonzero(self.byte[ids]):
            raw[place] = int(self.pieces[ids[place]][3:5], 16)  # of <0xFF>
        text = raw.decode("utf-8", "surrogateescape")
        return sum("\udc80" <= char <= "\udcff" for char in text)


class Validation:
    """The audited tokens, uint16 (N,), in streams that begin at `starts`, and their bytes."""

    def __init__(self, run: Run) -> None:
        hp = run.hp
        tokenizer = self.tokenizer = Tokenizer(hp)
        stream = TokenStream("val", run)
        limit = hp.val_tokens or stream.total
        ends = stream.sizes.cumsum().tolist() if hp.score_streams else [stream.total]
        spans = [(a, min(b - a, limit)) for a, b in pairwise([0, *ends])]
        self.bos = tokenizer.bos
        self.paths = stream.paths
        self.starts = np.cumsum([0, *(count for _, count in spans)])
        self.tokens = np.concatenate([stream.read(*span) for span in spans])
        is_scored = np.ones(len(self.tokens), bool)
        is_scored[self.starts[:-1]] = False
        self.text_bytes = int(tokenizer.lengths(self.tokens)[is_scored[1:]].sum())
        if run.rank == 0:
            tokenizer.audit(self.tokens, prose=not hp.score_streams)
        self.note = f"val_tokens:{len(self.tokens)} val_bytes:{self.text_bytes} byte_audit:ok"
        self.sizes: ndarray | None = None  # of the original text of each token, if known
        if shard_paths(hp, "val_bytes"):
            sidecar = TokenStream("val_bytes", run, ids=2**16)
            first = sidecar.paths[0]
            same = np.array_equal(sidecar.sizes, stream.sizes)
            require(same, f"{first}: the sidecars are not as long as their shards")
            self.sizes = np.concatenate([sidecar.read(*span) for span in spans])
            self.text_bytes = int(self.sizes[is_scored].sum(dtype=np.int64))
            counts_bos = self.sizes[self.tokens == self.bos].any()
            sound = self.text_bytes and not counts_bos
            require(sound, f"{first}: counts bytes for BOS, or none at all")
            self.note += f" byte_sidecar:{len(sidecar.paths)} original_bytes:{self.text_bytes}"
        if tokenizer.case_ops and not hp.score_streams:
            known = self.sizes is not None
            require(known, f"{hp.data_path}: CaseOps data needs its fineweb_val_bytes_*.bin")
            if run.rank == 0 and run.keeper:
                self.note += run.keeper.audit_case_ops(self, stream.total)


def windows(tokens: ndarray, hp: Hyperparameters) -> ndarray:
    """Plan the windows of a stream: first input, end, first one with a scored target, (W, 3)."""
    length = hp.eval_seq_len or hp.train_seq_len
    stride = hp.eval_stride or length
    edges = {0, len(tokens) - 1}
    if hp.eval_doc_isolated:
        edges.update(np.flatnonzero(tokens[:-1] == hp.bos).tolist())
    spans = []
    for begin, end in pairwise(sorted(edges)):
        marks = [begin, *range(begin + length, end, stride), end]
        for scored, stop in pairwise(marks):
            first = max(begin, scored + stride - length)
            spans.append((first, stop, scored))
    return np.array(spans, np.int64).reshape(-1, 3)


def fill_rows(spans: ndarray, most: int) -> Arrays:
    """Put windows into rows of at most `most` tokens: in each, the longest, then short ones."""
    lengths = spans[:, 1] - spans[:, 0]
    order = collections.deque(np.argsort(-lengths, kind="stable").tolist())
    rows = []
    while order:
        row = []
        for end in (0, -1):
            while order and lengths[[*row, order[end]]].sum() <= most:
                row.append(order[end])
                del order[end]
        rows.append(spans[row])
    return rows


def lay(rows: Arrays, at: ndarray) -> ndarray:
    """Lay rows of windows in a batch of places `at`, (B, T); where they begin, bool (B, T)."""
    begins = np.zeros(at.shape, bool)
    for i, row in enumerate(rows):
        ends = (row[:, 1] - row[:, 0]).cumsum()
        at[i, : ends[-1]] = np.concatenate([np.arange(first, stop) for first, stop, _ in row])
        begins[i, ends[ends < at.shape[1]]] = True
    return begins


def scoring_batches(val: Validation, run: Run) -> Iterator[tuple[Batch, Tensor]]:
    """Yield this rank's batches, and the place of each NLL; padding has the last one."""
    hp = run.hp
    length = hp.eval_seq_len or hp.train_seq_len
    share = min(hp.val_batch_size // run.world_size, run.forward_rows * row_length(hp))
    most = max(1, share // length)  # windows in a batch
    isolated = hp.eval_doc_isolated or hp.score_streams
    in_row = min(ROW, most) if isolated else 1
    rows = most // in_row
    streams = pairwise(val.starts)
    spans = np.concatenate([windows(val.tokens[a:b], hp) + a for a, b in streams])
    tokens = np.append(val.tokens.astype(np.int64), IGNORE)
    last = len(val.tokens) - 1

    def batch(at: ndarray, places: ndarray, documents: Cuts) -> tuple[Batch, Tensor]:
        arrays = (tokens[at.clip(max=last)], tokens[places + 1], places)
        inputs, targets, places = (send(array, run.device) for array in arrays)
        return (inputs, targets, documents), places

    is_whole = spans[:, 0] == spans[:, 2]
    whole = fill_rows(spans[is_whole], in_row * length)
    for i in range(run.rank * rows, len(whole), run.world_size * rows):
        at = np.full((rows, in_row * length), last)
        begins = lay(whole[i : i + rows], at)
        yield batch(at, at, cut(begins, length, run.device) if isolated else None)
    if not is_whole.all():  # of them the last EVAL_STRIDE tokens are scored
        turn = (run.rank - math.ceil(len(whole) / rows)) % run.world_size
        for at, places in frontier(hp).overlapping(spans[~is_whole], most, turn, run, last):
            yield batch(at, places, None)


@torch.no_grad()
def score(model: Forward, val: Validation, run: Run) -> tuple[ndarray, dict[str, float]]:
    """Score each token but a stream's first: NLL in nats, float32 (N - 1,); its mean, and BPB."""
    nll = torch.zeros(len(val.tokens), device=run.device)
    for batch, places in scoring_batches(val, run):
        nll[places] = model(*batch).float()
    if run.world_size > 1:
        dist.all_reduce(nll)  # each element is set on one rank and zero on the others
    nll = nll[:-1].cpu().numpy()
    nats = float(nll.sum(dtype=np.float64))
    count = len(val.tokens) - (len(val.starts) - 1)
    bits = nats / math.log(2)
    return nll, {"val_loss": nats / count, "val_bpb": bits / val.text_bytes}


def save_nll(nll: ndarray, val: Validation, hp: Hyperparameters) -> None:
    """Write the NLL that `score` gave to SAVE_NLL; of streams, as <shard>.npy in that folder."""
    path = Path(hp.save_nll)
    if not hp.score_streams:
        atomic_write(path, partial(np.save, arr=nll))
        return
    path.mkdir(exist_ok=True)
    for shard, (start, end) in zip(val.paths, pairwise(val.starts), strict=True):
        write = partial(np.save, arr=nll[start : end - 1])
        atomic_write(path / f"{shard.stem}.npy", write)


# ===================================== ARTIFACT =====================================
# A preamble (magic, version, sizes), SHA-256, zstd(JSON header, floats), coded levels; no pickle.
Arrays = list[ndarray]  # that a parameter is stored as
PREAMBLE = struct.Struct("<6sHII")  # 16 bytes
MAGIC = b"BIRDIE"
VERSION = 3
KEEP_FLOAT_NUMEL = {"round": 65536, "gptq": 4096}  # smaller matrices stay fp16: they cost little


def zstd() -> ModuleType:
    """Import the package zstandard, which nothing but artifacts needs. Raises UserError."""
    try:
        import zstandard
    except ImportError:
        advice = "pip install zstandard, or bring its wheel to where nothing can be fetched"
        raise UserError(f"no package zstandard, which artifacts need: {advice}") from None
    return zstandard


def is_plain(hp: Hyperparameters) -> bool:
    """Tell whether the levels are bytes that zstd compresses."""
    return hp.quant_method == "round" and hp.compressor == "zstd"


def code_bytes(hp: Hyperparameters) -> int:
    """Count the bytes of the code with which an artifact is made and read."""
    return sum(len(read_once(path)) for path in code_files(hp))


def compress(matrices: list[Arrays], hp: Hyperparameters) -> bytes:
    """Code the levels of quantized matrices, the last one of the arrays of each."""
    if not is_plain(hp):
        return quantizer(hp).compress(matrices, hp)
    raw = b"".join(arrays[-1].tobytes() for arrays in matrices)
    return zstd().compress(raw, 1)  # within 0.7% of level 22, in 1/500 of its time


def decompress(data: bytes, scales: list[Arrays], shapes: list[Any], hp: Hyperparameters) -> Arrays:
    """Decode matrices; of other data, never more than these shapes have. Raises an Exception."""
    if not is_plain(hp):
        return quantizer(hp).decompress(data, scales, shapes, hp)
    sizes = [math.prod(shape) for shape in shapes]
    require(zstd().frame_content_size(data) == sum(sizes), "its levels have another size")
    raw = zstd().ZstdDecompressor().decompress(data, allow_extra_data=False)
    levels = np.split(np.frombuffer(raw, np.int8), np.cumsum(sizes)[:-1])
    matrices = []
    for (scale,), level, shape in zip(scales, levels, shapes, strict=False):
        wide = scale.astype(np.float32)
        matrices.append(wide * level.reshape(shape))
    return matrices


def bits_of(name: str, w: Tensor, hp: Hyperparameters) -> int:
    """Give the bits of a parameter's weights in the artifact; 0: they are floats."""
    large = w.ndim == 2 and w.numel() > KEEP_FLOAT_NUMEL[hp.quant_method]
    return row_of(name, hp).bits if large else 0


def quantize(w: ndarray, bits: int, hp: Hyperparameters) -> Arrays:
    """Round rows of fp32 w to levels: fp16 scales (rows, 1), and int8 of w's shape.

    Levels ±Q, Q = 2^(bits-1) - 1, end at the largest value, with steps of σ/40 or more (rowmax), or
    at k·σ, for about log2(Q/k) + 2.05 bits (sigma, SDClip).
    """
    top = 2 ** (bits - 1) - 1
    sigma = w.std(1, keepdims=True)
    if hp.quant_clip == "sigma":
        ends = hp.quant_sigma * sigma
    else:
        ends = np.maximum(np.abs(w).max(1, keepdims=True), sigma * top / 40)
    scale = (ends / top).astype("<f2")  # rounded before use: the levels make up for it
    step = np.where(scale > 0, scale, 1).astype(np.float32)
    levels = np.rint(w / step).clip(-top, top)
    return [scale, levels.astype("|i1")]


def layout(name: str, w: Tensor, hp: Hyperparameters) -> list[list[Any]]:
    """List NumPy type and shape of a parameter's arrays: last a matrix's levels, signed ones."""
    shape = [*w.shape]
    if not bits_of(name, w, hp):
        return [["<f4" if row_of(name, hp).bits == 0 else "<f2", shape]]
    if hp.quant_method == "gptq":
        return quantizer(hp).layout(shape, hp)
    scale = ["<f2", [len(w), 1]]
    return [scale, ["|i1", shape]]


def stored_arrays(name: str, w: Tensor, hp: Hyperparameters) -> Arrays:
    """Make the arrays that stand for a parameter."""
    bits = bits_of(name, w, hp)
    array = w.float().cpu().contiguous().numpy()
    if not bits:
        return [array.astype(layout(name, w, hp)[0][0])]
    return quantize(array, bits, hp)


Coded = Mapping[str, Arrays]  # of matrices: scales, codes of steps and deviations, levels


def pack_artifact(state: Weights, hp: Hyperparameters, coded: Coded | None = None) -> bytes:
    """Pack the weights: `coded` ones, and others. Raises UserError if they cannot be stored."""
    coded = coded or {}
    with np.errstate(over="ignore", invalid="ignore"):
        tensors = {name: coded.get(name) or stored_arrays(name, w, hp) for name, w in state.items()}
    bad = [name for name, arrays in tensors.items() if not np.isfinite(arrays[0]).all()]
    require(not bad, f"no artifact: values not finite or over 65504 in {', '.join(bad)}")
    texts = setting_texts(hp)
    header = {
        "settings": {name: texts[name] for name in MODEL_SETTINGS},
        "tokenizer": sha256(read_once(hp.tokenizer_path)).hexdigest(),
        "bos": hp.bos,
        "tensors": {name: layout(name, w, hp) for name, w in state.items()},
    }
    text = json.dumps(header).encode()
    # The first bytes of all numbers, then the second ones: sign and exponent are often alike.
    kept = [array for arrays in tensors.values() for array in arrays if array.dtype.kind != "i"]
    floats = [array.reshape(-1, 1).view("u1").T.tobytes() for array in kept]
    matrices = [arrays for arrays in tensors.values() if arrays[-1].dtype.kind == "i"]
    head = zstd().compress(text + b"".join(floats), 22)
    preamble = PREAMBLE.pack(MAGIC, VERSION, len(text), len(head))
    body = head + compress(matrices, hp)
    return preamble + sha256(preamble + body).digest() + body


def open_artifact(data: bytes) -> tuple[dict[str, Any], IO[bytes], bytes]:
    """Check the preamble and the digest. Returns header, stream of floats, coded levels."""
    preamble = data[:16]
    digest = data[16:48]
    body = data[48:]
    require(data.startswith(MAGIC) and body, "not an artifact, or cut off at its start")
    _, version, text_size, head_size = PREAMBLE.unpack(preamble)
    require(2 <= version <= VERSION, f"format version {version}; this script reads {VERSION}")
    require(sha256(preamble + body).digest() == digest, "truncated or damaged")
    require(text_size < 2**21 and head_size <= len(body), "its header cannot be that long")
    head = zstd().ZstdDecompressor().stream_reader(body[:head_size])
    header = json.loads(head.read(text_size)) | {"version": version}
    return header, head, body[head_size:]


def read_settings(header: dict[str, Any], hp: Hyperparameters) -> Hyperparameters:
    """Take the model's settings from a header, but for EVAL_* that were given for this score."""
    values = {name: FIELDS[name].default for name in MODEL_SETTINGS}
    for name, text in header["settings"].items():
        require(name in values, f"unknown setting {name:.60}: a newer script made it")
        if text != "percentile":  # of QUANT_CLIP: it chose the levels, which are there
            try:
                values[name] = parse_setting(name, text)
            except ValueError as error:
                raise UserError(f"{name}={text!r:.60}: {error}") from None
    asked = {name for name in hp.given if name.startswith("EVAL_")}
    theirs = {name.lower(): value for name, value in values.items() if name not in asked}
    hp = replace(hp, bos=int(header.get("bos", 1)), **theirs)
    scored = replace(hp, train_batch_tokens=hp.train_seq_len, micro_batch_tokens=0)
    problems = value_problems(scored)
    require(not problems, "; ".join(problems))
    return hp


def read_array(head: IO[bytes], kind: str, shape: list[int]) -> ndarray:
    """Read an array of this NumPy type."""
    width = np.dtype(kind).itemsize
    raw = head.read(width * math.prod(shape))
    planes = np.frombuffer(raw, "u1").reshape(width, math.prod(shape))
    return planes.T.copy().view(kind).reshape(shape)


def load_artifact(path: Path, hp: Hyperparameters) -> tuple[Hyperparameters, dict[str, Tensor]]:
    """Load the settings, the artifact's for the model, and its fp32 weights. Raises UserError."""
    data = path.read_bytes()
    zstd()  # where it is missing, the artifact is not malformed
    try:
        header, head, coded = open_artifact(data)
        hp = read_settings(header, hp)
        with torch.device("meta"):
            state = build_model(hp).state_dict()
        count = sum(w.numel() for w in state.values())
        require(count < 1000 * len(data), "it is too small for its model")
        table = {name: layout(name, w, hp) for name, w in state.items()}
        old = header["version"] < VERSION and not is_plain(hp)
        require(not old, "format version 2, whose rANS is gone")
        require(header["tensors"] == table, "its tensors are not those of its settings")
        shapes = {name: arrays[-1][1] for name, arrays in table.items() if "i" in arrays[-1][0]}
        scales = []
        weights = {}
        for name, arrays in table.items():
            kept = [read_array(head, *array) for array in arrays if "i" not in array[0]]
            if name in shapes:
                scales.append(kept)
            weights[name] = kept[0]
        require(not head.read(1), "there is more than its tensors")
        weights |= zip(shapes, decompress(coded, scales, [*shapes.values()], hp), strict=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # crafted content can raise anything
        raise UserError(f"{path}: malformed, or not for these settings: {error}") from None
    same = sha256(read_once(hp.tokenizer_path)).hexdigest() == header.get("tokenizer")
    require(same, f"{hp.tokenizer_path}: not the tokenizer that {path} was trained with")
    return hp, {name: torch.from_numpy(w.astype(np.float32)) for name, w in weights.items()}


def scheme(hp: Hyperparameters) -> str:
    """Name a quantization for log lines: its bits and its coder, such as int568_zstd."""
    if hp.quant_method == "gptq":
        return "gptq_rans"
    bits = {row.bits for row in part("parameter_table", hp)(hp)} - {0}
    digits = "".join(map(str, sorted(bits)))
    return f"int{digits}_{hp.compressor}"


# ===================================== DISTRIBUTED RUN =====================================
# Rank 0's clock alone decides when training ends. It also tells all ranks what a keeper asks.


def launched(name: str, default: int) -> int:
    """Read what a launcher such as torchrun tells this process; `default` if it is no number."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


@cache
def read_once(path: str) -> bytes:
    """Read a file once: what a run was started with counts, whatever is edited meanwhile."""
    return Path(path).read_bytes()


def atomic_write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file, sync it, and rename it to `path`: all of it or nothing."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


class Run:
    """Hold a process's place in the job (rank, device, dtype) and, on rank 0, the job's logs."""

    def __init__(self, hp: Hyperparameters) -> None:
        self.hp = hp
        self.rank = launched("RANK", 0)
        self.world_size = launched("WORLD_SIZE", 1)
        self.local_rank = launched("LOCAL_RANK", 0)
        self.dir = Path(hp.out_dir, hp.run_id or str(uuid.uuid4()))  # on rank 0 alone
        self.text: IO[str] | None = None  # the text log, once it is open
        self.metrics: IO[str] | None = None
        self.device = choose_device(hp, self.local_rank)
        self.dtype = choose_dtype(hp, self.device.type)
        tokens = hp.micro_batch_tokens or FORWARD_TOKENS[self.device.type]
        self.forward_rows = max(1, tokens // row_length(hp))
        self.compile = chooses_to_compile(hp, self.device.type)
        self.kernels = ExitStack()  # what is set in PyTorch for this run
        self.signal = 0  # that the keeper sets, to end training
        self.stop = 0  # the largest one of all ranks
        keeper = find_keeper()
        self.keeper = keeper.Keeper(self) if keeper else None

    def start(self) -> None:
        """Seed the generators, meet the other ranks, and open the logs."""
        if self.rank == 0:
            self.dir.mkdir(parents=True, exist_ok=True)
            if self.keeper:
                self.keeper.begin()
        torch.manual_seed(self.hp.seed)
        # Compiled for a CPU, the embedding's gradient is otherwise summed in any order.
        torch.use_deterministic_algorithms(self.device.type == "cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        attention = choose_attention(self)
        if self.world_size > 1:  # gloo for what is on the CPU
            meet = self.keeper.meet if self.keeper else dist.init_process_group
            meet("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        if self.rank == 0:
            self.open_logs(attention)

    def open_logs(self, attention: str) -> None:
        """Open the logs, and begin them with what a rerun needs: sources, settings, versions."""
        options = {"buffering": 1, "encoding": "utf-8", "errors": "surrogateescape"}  # of any bytes
        self.text = open(f"{self.dir}.txt", "a", **options)  # noqa: SIM115
        self.metrics = open(self.dir / "metrics.jsonl", "a", **options)  # noqa: SIM115
        parts = [read_once(path).decode() for path in code_files(self.hp)]
        if self.keeper:
            parts.append(self.keeper.source)
        parts.append(settings_dotenv(self.hp))
        print(f"\n{'=' * 100}\n".join(parts), file=self.text)
        device = self.device.type
        if device == "cuda":
            device = torch.cuda.get_device_name()
        line = f"python:{sys.version.split()[0]} torch:{torch.__version__} device:{device} "
        line += f"dtype:{self.dtype} compile:{self.compile:d} world_size:{self.world_size} "
        line += f"attention:{attention}"
        settings = {name.lower(): getattr(self.hp, name.lower()) for name in FIELDS}
        self.log(line, "start", versions=line, settings=settings)

    def log(self, line: str, event: str = "", **fields: Any) -> None:
        """Write a line to console and text log, and an event to metrics.jsonl (rank 0 only)."""
        if self.rank > 0:
            return
        say = self.keeper.say if self.keeper else print
        say(line)
        with suppress(OSError):  # a full disk
            if self.text:
                print(line, file=self.text)
            if self.metrics and event:
                print(json.dumps({"event": event, **fields}), file=self.metrics)

    def clock(self, synchronize: bool = False) -> float:
        """Tell rank 0's seconds to all ranks, which call it together, and set `stop`."""
        if synchronize and self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        seconds = time.perf_counter() if self.rank == 0 else 0.0
        now = torch.tensor([seconds, self.signal], dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(now, dist.ReduceOp.MAX)
        self.stop = int(now[1])
        return now[0].item()


def choose_device(hp: Hyperparameters, local_rank: int) -> torch.device:
    """Take the device that DEVICE names, or the first kind that is there."""
    there = (k for k in ("cuda", "mps", "cpu") if getattr(torch, k).is_available())
    kind = next(there) if hp.device == "auto" else hp.device
    return torch.device(kind, local_rank if kind == "cuda" else None)


def choose_dtype(hp: Hyperparameters, kind: str) -> torch.dtype:
    """Take bf16 where a device multiplies it fast, unless DTYPE says otherwise."""
    if hp.dtype != "auto":
        return torch.bfloat16 if hp.dtype == "bf16" else torch.float32
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:  # other CPUs multiply bf16 no faster than fp32; these, 2 to 8 times as fast
        capabilities = torch.cpu.get_capabilities()
        names = ("amx_bf16", "avx512_bf16")
        fast = kind == "cpu" and any(capabilities.get(name) for name in names)
    return torch.bfloat16 if fast else torch.float32


def chooses_to_compile(hp: Hyperparameters, kind: str) -> bool:
    """Tell whether to compile; on a CPU that takes a minute, and pays for large steps alone."""
    if hp.compile != "auto":
        return hp.compile == "1"
    if kind != "cpu" or hp.eval_only:
        return kind == "cuda"
    large = hp.train_batch_tokens * hp.num_layers * hp.model_dim**2 > 10**10
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return bool(large and shutil.which("g++") and headers.exists())


Forward = Callable[..., Tensor]  # of a batch: the NLL
GRAPHS = 64  # shapes of a batch that a model may be compiled for; PyTorch's own limit is 8


def compile_model(model: GPT) -> Forward:
    """Compile a model, for a batch of any shape when it first comes."""
    torch._dynamo.config.recompile_limit = GRAPHS
    compiled = torch.compile(model, dynamic=False, fullgraph=True)

    def forward(*batch: Any) -> Tensor:
        for x in batch:
            if isinstance(x, Documents):  # one graph for any number of them
                torch._dynamo.mark_dynamic(x.offsets, 0)
        return compiled(*batch)

    return forward


# PyTorch tries the kernel that is asked for, then these. FA 3 and 4 are packages in place of its 2.
BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
KERNELS = {
    "cudnn": "CUDNN_ATTENTION",
    "fa2": "FLASH_ATTENTION",
    "fa3": "FLASH_ATTENTION",
    "fa4": "FLASH_ATTENTION",
}
FASTEST = {  # by the device's major capability
    8: ["fa2"],
    9: ["fa3", "fa4", "cudnn", "fa2"],
    10: ["fa4", "cudnn", "fa2"],
}


def choose_attention(run: Run) -> str:
    """Use the kernel that ATTENTION names, or the fastest right one; its name for the log."""
    place = run.device.type if run.dtype == torch.bfloat16 else "fp32"
    names = [run.hp.attention]
    if run.hp.attention == "auto":
        major = torch.cuda.get_device_capability()[0] if place == "cuda" else 0
        names = [*FASTEST.get(major, ("amx",)), "sdpa"]
    problem = ""
    for kernel in names:
        needs = {"sdpa": place, "amx": "cpu"}.get(kernel, "cuda")
        with ExitStack() as undo:
            try:
                require(place == needs, f"needs DEVICE={needs} and DTYPE=bf16")
                use_kernel(kernel, run, undo)
                name = run.keeper.check_attention(kernel) if run.keeper else kernel
            except Exception as error:  # a missing package, or one built for another machine
                problem = str(error)
                continue
            run.kernels = undo.pop_all()
            torch.compiler.config.cache_key_tag = kernel  # a compiled model holds its own
            return name
    raise UserError(f"ATTENTION={run.hp.attention}: {problem}")


def use_kernel(kernel: str, run: Run, undo: ExitStack) -> None:
    """Let PyTorch use a kernel until `undo`. Raises an Exception if it is not there."""
    if kernel == "amx":
        head_dim = run.hp.model_dim // run.hp.num_heads
        PACKED["cpu"] = importlib.import_module("amx_attention").activate(head_dim)
        undo.callback(PACKED.clear)
    if kernel in ("fa3", "fa4"):
        torch.nn.attention.activate_flash_attention_impl(kernel.upper())
        undo.callback(torch.nn.attention.restore_flash_attention_impl)
    if kernel in KERNELS:
        x = torch.zeros(1, 1, 1, 8, device=run.device)
        torch._fused_sdp_choice(x, x, x)  # at the first question, PyTorch sets its own order
        order = [getattr(SDPBackend, name) for name in (KERNELS[kernel], *BACKENDS)]
        undo.enter_context(sdpa_kernel(order, set_priority=True))


# ===================================== TRAINING =====================================
AHEAD = {"cuda": 2}  # steps that the host asks for, at most, before the device has done them


def divide(sizes: dict[str, int], ranks: int) -> tuple[dict[str, tuple[int, int]], int]:
    """Put tensors whole into equal shares: owners, offsets, a width with one element free."""
    loads = [0] * ranks
    places = {}
    for name in sorted(sizes, key=sizes.get, reverse=True):
        owner = loads.index(min(loads))
        places[name] = (owner, loads[owner])
        loads[owner] += math.ceil(sizes[name] / 64) * 64  # aligned for vector instructions
    return places, max(loads) + 64


def later(number: Tensor) -> Callable[[], float]:
    """Return a function that gives a number on the device, without waiting for later work there."""
    host = number.to("cpu", non_blocking=number.is_cuda)
    if not number.is_cuda:
        return host.item
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> float:
        copied.synchronize()
        return host.item()

    return wait


class Trainer:
    """Train a model on a rank: it owns a row of the weights, fp32 (ranks, width) (ZeRO)."""

    def __init__(self, model: GPT, forward: Forward, stream: TokenStream, run: Run) -> None:
        self.model = model
        self.forward = forward
        self.learn = forward  # with other targets, if there are any
        self.stream = stream
        self.run = run
        self.params = {name: p.detach() for name, p in model.named_parameters()}
        sizes = {name: p.numel() for name, p in self.params.items()}
        self.places, width = divide(sizes, run.world_size)
        self.weights = torch.zeros(run.world_size, width, device=run.device)
        self.grads = torch.zeros_like(self.weights)
        self.working = self.weights.to(run.dtype)  # the same, in fp32
        for name, p in model.named_parameters():
            owner, _ = self.places[name]
            weight = self.within(name, self.weights[owner]).copy_(p.detach())
            weight.grad = self.within(name, self.grads[owner])
            self.params[name] = weight
            p.data = self.within(name, self.working[owner])
            p.grad = weight.grad if p.dtype == weight.dtype else None
        self.working.copy_(self.weights)
        self.share = self.weights[run.rank]
        self.average = None  # like the own share, to be exported
        mine = [name for name in self.params if self.places[name][0] == run.rank]
        self.owned = {name: self.params[name] for name in mine}
        self.optimizers = build_optimizers(self.owned, run)
        self.bad_in_a_row = torch.zeros((), device=run.device)
        self.late: list[Any] = []  # steps, what waits for them, batches
        self.batch_tokens = run.hp.train_batch_tokens
        self.feed_from(0)

    def within(self, name: str, share: Tensor) -> Tensor:
        """View the part of its owner's share that belongs to a parameter."""
        p = self.params[name]
        _, offset = self.places[name]
        return share[offset : offset + p.numel()].view_as(p)

    def collect(self) -> None:
        """Add the gradients of the model's copy of the weights to their gradients."""
        if self.working is self.weights:
            return
        new = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        if self.grads.is_cpu:  # memory costs more than launches
            sums = [self.params[name].grad for name in new]
            torch._foreach_add_(sums, [*new.values()])
        else:
            fresh = torch.zeros_like(self.working)
            places = [self.within(name, fresh[self.places[name][0]]) for name in new]
            torch._foreach_copy_(places, [*new.values()])
            self.grads += fresh
        self.model.zero_grad()  # the next ones are then taken without a sum

    def feed_from(self, step: int) -> None:
        """Read the batches from a step on."""
        self.tokens = step * self.run.hp.train_batch_tokens  # of the steps so far
        self.feed = batches(self.stream, self.run, step)
        self.upcoming: list[Batch] | None = None

    def fetch(self) -> None:
        """Have the next batch ready."""
        keeper = self.run.keeper
        self.upcoming = keeper.fetch(self.feed) if keeper else next(self.feed)

    def step(self, step: int, elapsed: float, dry: bool = False) -> Tensor:
        """Update the weights, unless `dry` or not finite, from a batch; its mean loss, fp32 ()."""
        hp = self.run.hp
        self.accumulate()
        grads = self.grads[self.run.rank]
        square = self.reduce(grads)
        loss = grads[-1].clone()
        self.sums = loss, square
        bad = ~(square + loss).isfinite() | dry
        if hp.grad_clip_norm:
            grads *= (hp.grad_clip_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
        grads.masked_fill_(bad, 0)
        self.update(step, elapsed, bad)
        self.tokens += self.batch_tokens
        gathering = self.gather()
        self.bad_in_a_row = (self.bad_in_a_row + 1) * bad
        self.late.append((step, later(self.bad_in_a_row), self.batch))
        self.fetch()  # meanwhile, the ranks exchange weights
        if gathering:
            gathering.wait()
        self.working.copy_(self.weights)
        return loss

    def accumulate(self) -> None:
        """Add up loss and gradients over the micro-batches of this rank."""
        self.grads.zero_()
        while self.upcoming is None:
            self.fetch()
        self.batch = self.upcoming
        for batch in self.batch:
            loss = self.learn(*batch).sum() / self.batch_tokens
            loss.backward()
            self.collect()
            self.grads[:, -1] += loss.detach()

    def reduce(self, grads: Tensor) -> Tensor:
        """Sum the gradients of the own share over the ranks; the square of the norm of all."""
        if self.run.world_size > 1:
            total = torch.empty_like(grads)
            dist.reduce_scatter(total, [*self.grads])
            grads.copy_(total)
        square = grads[:-1].norm() ** 2
        if self.run.world_size > 1:
            dist.all_reduce(square)
        return square

    def update(self, step: int, elapsed: float, bad: Tensor) -> None:
        """Let the optimizers update the own share."""
        self.schedule(step, elapsed)
        found_inf = bad.float()
        for optimizer in self.optimizers:
            optimizer.found_inf = found_inf
            optimizer.grad_scale = None
            optimizer.step()

    def schedule(self, step: int, elapsed: float) -> None:
        """Set the rates and the momentum of a step."""
        hp = self.run.hp
        scale = lr_scale(hp, step, elapsed)
        ramp = min(1.0, step / max(1, hp.muon_momentum_warmup_steps))
        momentum = (1 - ramp) * hp.muon_momentum_warmup_start + ramp * hp.muon_momentum
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.update(lr=group["base_lr"] * scale, momentum=momentum)

    def gather(self) -> dist.Work | None:
        """Begin to hand the own share of the weights to all ranks."""
        if self.run.world_size == 1:
            return None
        return dist.all_gather([*self.weights], self.share.clone(), async_op=True)

    def finish(self) -> None:
        """Let the weights be those that are exported."""

    def look_back(self, delay: int) -> None:
        """Wait for the step that was `delay` steps ago; the keeper tells if steps were skipped."""
        while len(self.late) > delay:
            step, number, batch = self.late.pop(0)
            in_a_row = int(number())
            if in_a_row and self.run.keeper:
                self.run.keeper.skipped(self, step, in_a_row, batch)

    def prime(self) -> None:
        """Take WARMUP_STEPS steps that compile every kernel and change nothing."""
        with torch.random.fork_rng(devices=[]):
            if self.run.keeper:
                self.run.keeper.prime(self)
            else:
                for step in range(self.run.hp.warmup_steps):
                    self.step(step, 0.0, dry=True)
        self.bad_in_a_row.zero_()
        self.late.clear()
        self.feed_from(0)


def report(
    event: str,
    losses: dict[str, float],
    step: int,
    elapsed: float,
    trainer: Trainer,
) -> None:
    """Log the losses of a step, `elapsed` seconds into training."""
    run = trainer.run
    values = " ".join(f"{name}:{value:.4f}" for name, value in losses.items())
    ms = 1e3 * elapsed
    rate = trainer.tokens / max(elapsed, 1e-9)
    times = f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms tok_s:{rate:.0f}"
    line = f"step:{step}/{run.hp.iterations} {values} {times}"
    if run.keeper and event == "train":
        losses = losses | run.keeper.figures(trainer)
    run.log(line, event, step=step, train_time_ms=ms, tokens_per_second=rate, **losses)


def train(
    trainer: Trainer, val: Validation, run: Run, step: int, elapsed: float
) -> tuple[int, float]:
    """Train until ITERATIONS, the wallclock cap, or `stop`; the last step, and the seconds."""
    hp = run.hp
    keeper = run.keeper
    start = run.clock(synchronize=True) - elapsed
    while True:
        done = step >= hp.iterations or 0 < training_seconds(hp) <= elapsed
        last = done or run.stop
        if last or (keeper and keeper.is_due(step)):
            elapsed = run.clock(synchronize=True) - start
            trainer.look_back(0)
            if keeper:
                keeper.save(trainer, step, elapsed, done)
            start = run.clock() - elapsed
        if last:
            return step, elapsed
        if hp.val_loss_every and step % hp.val_loss_every == 0:
            elapsed = run.clock(synchronize=True) - start
            trainer.look_back(0)
            _, losses = score(trainer.forward, val, run)
            report("val", losses, step, elapsed, trainer)
            start = run.clock(synchronize=True) - elapsed
        loss = trainer.step(step, elapsed)
        step += 1
        early = step <= 10
        logged = hp.train_log_every and (early or step % hp.train_log_every == 0)
        trainer.look_back(0 if early or logged else AHEAD.get(run.device.type, 0))
        # The device will have done all steps by then, if it keeps its mean pace.
        elapsed = (run.clock() - start) * step / (step - len(trainer.late))
        if logged:
            report("train", {"train_loss": loss.item()}, step, elapsed, trainer)


def export(params: Weights, seen: Any, run: Run) -> None:
    """Write the artifact and the raw weights; all ranks quantize, by what was `seen`, for gptq."""
    weights = {name: w.cpu().clone() for name, w in params.items()}  # no views of one buffer
    raw = io.BytesIO()  # torch.save would hide what the disk says
    torch.save(weights, raw)
    files = {run.dir / "final_model.pt": raw.getvalue}
    artifact = run.dir / "final_model.artifact"
    make = partial(pack_artifact, weights, run.hp)
    if module := quantizer(run.hp):
        make = partial(module.make_artifact, weights, seen, run)
    if run.hp.quant_method == "gptq":
        write_files(files, run)
        write_files({artifact: partial(bytes, make())}, run)
    else:
        write_files({artifact: make, **files}, run)


def write_files(makers: dict[Path, Callable[[], bytes]], run: Run) -> None:
    """Let rank 0 write files of what their makers give."""
    files = {path: lambda file, make=make: file.write(make()) for path, make in makers.items()}
    if run.keeper:
        run.keeper.on_first(lambda: run.keeper.write(files))
    elif run.rank == 0:
        for path, fill in files.items():
            atomic_write(path, fill)


def train_and_export(trainer: Trainer, val: Validation, run: Run) -> None:
    """Train, and write artifact and raw weights. The keeper may exit after a checkpoint instead."""
    keeper = run.keeper
    if keeper:
        keeper.prepare(trainer)
    trainer.prime()
    start = keeper.resume(trainer) if keeper else (0, 0.0)
    step, elapsed = train(trainer, val, run, *start)
    if keeper:
        keeper.trained(trainer, step, elapsed)
    trainer.finish()
    seen = None
    if run.hp.quant_method == "gptq":
        seen = quantizer(run.hp).calibrate(trainer, step, elapsed)
    export(trainer.params, seen, run)
    _, losses = score(trainer.forward, val, run)
    report("val", losses, step, elapsed, trainer)


# ===================================== MAIN =====================================
def score_artifact(path: Path, model: GPT, forward: Forward, val: Validation, run: Run) -> None:
    """Log an artifact's score and size, and write SAVE_NLL. Raises UserError if it is too large."""
    model.to(run.dtype)
    if run.rank == 0:
        _, weights = load_artifact(path, run.hp)
        model.load_state_dict(weights)
    if run.world_size > 1:
        for p in model.parameters():
            dist.broadcast(p.detach(), 0)
    nll, final = score(forward, val, run)
    if run.rank > 0:
        return
    name = scheme(run.hp)
    text = " ".join(f"{key}:{value:.8f}" for key, value in final.items())
    run.log(f"final_{name}_roundtrip_exact {text}")
    code = code_bytes(run.hp)
    size = path.stat().st_size
    cap = run.hp.artifact_max_bytes
    sizes = {"code_bytes": code, "artifact_bytes": size, "max_bytes": cap}
    line = f"Total submission size {name}: {code + size} bytes ({code} code, {size} artifact)"
    run.log(line, "final", **final, **sizes)
    if run.keeper:
        run.keeper.scored()
    if run.hp.save_nll:
        save_nll(nll, val, run.hp)
    require(code + size <= cap, f"{line}, over ARTIFACT_MAX_BYTES={cap}; all is saved")


def main(arguments: list[str]) -> None:
    """Train, export and score a model, or only score one."""
    require(arguments in ([], ["--help"], ["--settings"]), f"{arguments}: see --help")
    if arguments == ["--help"]:
        print(__doc__)
        return
    hp = load_settings(os.environ, check_places=not arguments)
    if arguments == ["--settings"]:
        print(settings_dotenv(hp), flush=True)
        return
    artifact = Path(hp.artifact)
    if hp.eval_only:
        hp, _ = load_artifact(artifact, hp)
    run = Run(hp)
    try:
        do_run(run, artifact)
    finally:
        if run.keeper:
            run.keeper.close()


def do_run(run: Run, artifact: Path) -> None:
    """Do what a run's settings ask for."""
    stream = None if run.hp.eval_only else part("TokenStream", run.hp)("train", run)
    val = Validation(run)
    if stream:  # an artifact tells what it was trained with
        run.hp = replace(run.hp, bos=val.bos)
    run.start()
    model = build_model(run.hp, run.dtype).to(run.device)
    forward = model
    if run.compile:
        forward = run.keeper.compiled(model) if run.keeper else compile_model(model)
    if run.keeper:
        run.keeper.explain_validation(val)
    run.log(val.note)
    run.log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    if stream:
        train_and_export(part("Trainer", run.hp)(model, forward, stream, run), val, run)
        artifact = run.dir / "final_model.artifact"
    score_artifact(artifact, model, forward, val, run)


if __name__ == "__main__":
    keeper = find_keeper()
    try:
        code = keeper.run_program(main) if keeper else main(sys.argv[1:])
    except UserError as problem:
        sys.exit(f"{Path(__file__).name}: error: {problem}")
    if dist.is_initialized():
        dist.barrier()
        os._exit(code or 0)  # gloo's threads now and then abort a regular exit
    sys.exit(code)
