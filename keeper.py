"""Protect, resume and explain a run of train_gpt.py, beside which this file stands.

Checkpoints and RESUME, signals, the lock of a run's folder, smaller micro-batches where the memory
does not suffice, the search for what is not finite, the forecast of the artifact's size, checks of
places, and the table of settings. Nothing here changes a weight, a byte of the artifact or an NLL:
train_gpt.py alone ends on the same bits. It does without this file, and where that cannot run
(fcntl is for POSIX alone).
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_gpt as core
from train_gpt import UserError, require

# ===================================== SETTINGS =====================================
WATCHER = Path(__file__).resolve().parent / "lab" / "watch.py"
REPORTERS = {"wandb", "tensorboard", "trackio", "aim"}


def launcher_problems(environ: Mapping[str, str]) -> list[str]:
    """Say the first thing wrong with a launcher's variables: often, another job left them."""
    advice = "start the job with torchrun, or unset what is left of another one"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = environ.get(name, "")
        if text and not text.isdecimal():
            return [f"{name}={text}: expected a whole number; {advice}"]
    rank = int(environ.get("RANK") or 0)
    world = int(environ.get("WORLD_SIZE") or 1)
    local = int(environ.get("LOCAL_RANK") or 0)
    here = int(environ.get("LOCAL_WORLD_SIZE") or world)
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environ.get(name)]
    port = environ.get("MASTER_PORT", "")
    port_is_right = port.isdecimal() and 0 < int(port) < 2**16
    rules = [
        (world < 1, f"WORLD_SIZE={world}: expected 1 or more"),
        (rank >= world, f"RANK={rank}: must be under WORLD_SIZE={world}"),
        (world > 1 and missing, f"WORLD_SIZE={world}: needs {', '.join(missing)} too"),
        (world > 1 and not port_is_right, f"MASTER_PORT={port}: expected a port, 1 to 65535"),
        (local > rank, f"LOCAL_RANK={local}: must not be over RANK={rank}"),
        (local >= here, f"LOCAL_RANK={local}: must be under LOCAL_WORLD_SIZE={here}"),
        (here > world, f"LOCAL_WORLD_SIZE={here}: over WORLD_SIZE={world}"),
    ]
    return [f"{text}; {advice}" for broken, text in rules if broken][:1]


def value_rules(hp: core.Hyperparameters, context: int) -> list[tuple[Any, str]]:
    """List rules between settings whose breach fails late, or does not what was asked for."""
    batch = hp.train_batch_tokens
    micro = hp.micro_batch_tokens
    uneven = hp.model_dim % hp.num_heads
    head_dim = hp.model_dim // hp.num_heads
    rotated = hp.rope_dims or head_dim
    odd_rope = hp.rope_dims % 2 or hp.rope_dims > head_dim
    width = f"heads of {head_dim} channels; rotary positions need an even number"
    least = context * core.launched("WORLD_SIZE", 1)
    gptq = hp.quant_method == "gptq"
    unfit = hp.fit_budget == "sigma" and (gptq or hp.quant_clip != "sigma")
    reporters = set(hp.report_to.split(",")) if hp.report_to else set()
    kept = gptq and 0 < hp.max_wallclock_seconds <= hp.calibration_seconds
    return [
        (uneven, "{MODEL_DIM}: not divisible by {NUM_HEADS}"),
        (head_dim % 2 and not uneven, f"{{MODEL_DIM}}: over {{NUM_HEADS}} makes {width}"),
        (odd_rope, f"{{ROPE_DIMS}}: must be even, and at most a head's {head_dim} channels"),
        (hp.rope_scaling == "ntk" and rotated == 2, "{ROPE_SCALING}: ntk needs over 2 channels"),
        (hp.mlp_mult * hp.model_dim < 1, "{MLP_MULT}: under one channel at {MODEL_DIM}"),
        (hp.bigram_buckets == 1, "{BIGRAM_BUCKETS}: use 0, or 2 and more"),
        (hp.xsa_last_n > hp.num_layers, "{XSA_LAST_N}: over {NUM_LAYERS}"),
        (hp.num_heads % hp.num_kv_heads, "{NUM_HEADS}: not divisible by {NUM_KV_HEADS}"),
        (micro % hp.train_seq_len, "{MICRO_BATCH_TOKENS}: not divisible by {TRAIN_SEQ_LEN}"),
        (micro and batch % micro, "{TRAIN_BATCH_TOKENS}: not divisible by {MICRO_BATCH_TOKENS}"),
        (hp.val_batch_size < least, "{VAL_BATCH_SIZE}: under {CONTEXT} a rank"),
        (hp.val_tokens == 1, "{VAL_TOKENS}: the first token is only context; use 0, or 2 and more"),
        (hp.eval_only and not hp.artifact, "{EVAL_ONLY}: needs ARTIFACT, the file to score"),
        (unfit, "{FIT_BUDGET}: needs QUANT_METHOD=round and QUANT_CLIP=sigma"),
        (hp.fit_budget == "step" and not gptq, "{FIT_BUDGET}: needs QUANT_METHOD=gptq"),
        (reporters - REPORTERS, "{REPORT_TO}: expected " + ", ".join(sorted(REPORTERS))),
        (kept, "{CALIBRATION_SECONDS}: all of {MAX_WALLCLOCK_SECONDS}; nothing is left to train"),
        *technique_rules(hp),
        *schedule_rules(hp),
    ]


def changed_settings(hp: core.Hyperparameters) -> set[str]:
    """Name the settings that are not at their defaults, given or not."""
    return {name for name, f in core.FIELDS.items() if getattr(hp, name.lower()) != f.default}


def technique_rules(hp: core.Hyperparameters) -> list[tuple[Any, str]]:
    """List the rules between settings of frontier.py that shape the model or its updates."""
    layers = hp.num_layers
    loops = hp.loop_repeats
    order = loops and hp.loop_last < hp.loop_first
    beyond = loops and hp.loop_last >= layers
    changed = changed_settings(hp)
    visits = layers + loops * (hp.loop_last + 1 - hp.loop_first)
    muon = {"MUON_ROW_NORM", "MUON_COEFFICIENTS", "NORMUON_BETA2", "CAUTIOUS_WD"} & changed
    adamw = hp.matrix_optimizer == "adamw" and muon
    blend = hp.ema_blend < 1 and not hp.ema_decay
    return [
        (order, "{LOOP_LAST}: before {LOOP_FIRST}"),
        (beyond, "{LOOP_LAST}: layers are 0 to {NUM_LAYERS} - 1"),
        (loops and hp.loop_start == 1, "{LOOP_START}: leaves no step that trains the loops"),
        (hp.skips == "mudd" and visits < 3, "{SKIPS}: mudd needs three visits of blocks"),
        (hp.parallel_last_n > layers, "{PARALLEL_LAST_N}: over {NUM_LAYERS}"),
        (set(hp.window_pattern) - {*"SL"}, "{WINDOW_PATTERN}: has other letters than S and L"),
        (hp.sparse_attn_gate > hp.model_dim, "{SPARSE_ATTN_GATE}: over {MODEL_DIM}"),
        (hp.smear_gate == 2 and hp.model_dim < 12, "{SMEAR_GATE}: needs MODEL_DIM=12 or more"),
        (adamw, f"{{MATRIX_OPTIMIZER}}: has no use for {', '.join(sorted(muon))}"),
        (hp.cautious_wd and not hp.muon_wd, "{CAUTIOUS_WD}: needs MUON_WD"),
        (blend, "{EMA_BLEND}: needs EMA_DECAY"),
    ]


def schedule_rules(hp: core.Hyperparameters) -> list[tuple[Any, str]]:
    """List the rules of schedules: each is one that can be read, and none undoes another."""
    both = hp.lr_warmup_steps and hp.lr_warmup_ratio
    falls = {"WARMDOWN_ITERS", "WARMDOWN_FRAC"} & changed_settings(hp)
    idle = hp.lr_schedule in ("cosine", "constant") and falls
    slow = 0 < hp.iterations <= hp.lr_warmup_steps
    fall = float(hp.warmdown_frac or 0)
    early = hp.lr_schedule in ("linear", "wsd") and hp.lr_warmup_ratio + fall > 1
    rules = [
        (slow, "{LR_WARMUP_STEPS}: not under {ITERATIONS}"),
        (early, "{LR_WARMUP_RATIO}: the rates fall before they have risen ({WARMDOWN_FRAC})"),
        (both, "{LR_WARMUP_STEPS}: or {LR_WARMUP_RATIO}, not both"),
        (idle, f"{{LR_SCHEDULE}}: has no use for {', '.join(sorted(falls))}"),
    ]
    if not (hp.seq_len_schedule or hp.batch_schedule):
        return rules
    module = core.find_beside("frontier.py")
    try:
        stages = module.stages_of(hp) if module else []
    except core.UserError as e:
        return [*rules, (True, f"{{SEQ_LEN_SCHEDULE}}, {{BATCH_SCHEDULE}}: {e}")]
    for stage in stages:
        length = stage.hp.train_seq_len
        tokens = stage.hp.train_batch_tokens
        where = f"from {stage.begin:g} of the run on, {tokens} tokens in sequences of {length}"
        long = not 0 < length <= hp.train_seq_len
        uneven = not long and (tokens < length or tokens % length)
        micro = hp.micro_batch_tokens
        unfit = micro and not (long or uneven) and (micro % length or tokens % micro)
        rules += [
            (long, f"{{SEQ_LEN_SCHEDULE}}: {length} is not between 1 and {{TRAIN_SEQ_LEN}}"),
            (uneven, f"{{SEQ_LEN_SCHEDULE}}, {{BATCH_SCHEDULE}}: {where}: not divisible"),
            (unfit, f"{{MICRO_BATCH_TOKENS}}: {where}: does not fit"),
        ]
    return rules


def flops_per_token(hp: core.Hyperparameters, loops: bool = True) -> float:
    """Count the FLOPs of training on one token: 3·(2·W + 4·D·keys), a third of them forward.

    W are the weights that it is multiplied with, in all visits of the blocks and in the head; a
    key costs 2·D for its score and 2·D for its value, and there are (T + 1)/2 on the mean, or what
    a window leaves. Backward has two products for each one forward. Nothing elementwise counts.
    """
    dim = hp.model_dim
    T = hp.train_seq_len
    kv_dim = dim // hp.num_heads * hp.num_kv_heads
    layer = 2 * dim * (dim + kv_dim + int(hp.mlp_mult * dim)) + hp.sparse_attn_gate * hp.num_heads
    visits = [*range(hp.num_layers)]
    windows = [T] * hp.num_layers
    if techniques := core.frontier(hp):
        visits = techniques.visit_orders(hp)[loops]
        windows = [min(T, techniques.window_of(hp, i) or T) for i in range(hp.num_layers)]
    keys = sum(windows[i] * (T - (windows[i] - 1) / 2) for i in visits) / T
    weights = len(visits) * layer + hp.vocab_size * dim
    if hp.bigram_buckets:
        weights += hp.bigram_dim * dim
    if hp.skips == "mudd":
        weights += sum(64 * (dim + i) for i in range(2, len(visits), 2))
    return 3 * (2 * weights + 4 * dim * keys)


def device_problems(hp: core.Hyperparameters) -> list[str]:
    """Say what is wrong with the device that the settings ask for."""
    if not getattr(torch, hp.device, torch.cpu).is_available():
        return [f"DEVICE={hp.device}: PyTorch has none"]
    count = torch.cuda.device_count() if hp.device in ("auto", "cuda") else 0
    local = core.launched("LOCAL_RANK", 0)
    return [f"LOCAL_RANK={local}: there are {count} CUDA devices"] if 0 < count <= local else []


def name_problems(hp: core.Hyperparameters) -> list[str]:
    """Say what is wrong with the name of the run."""
    name = hp.run_id
    if hp.resume == "auto" and not name:
        return ["RESUME=auto: needs RUN_ID, the run to go on with"]
    if name in (".", "..") or re.search(r"[/\x00-\x1f\x7f]", name):
        return [f"RUN_ID={name}: must be a plain file name"]
    return []


def place_problems(hp: core.Hyperparameters) -> list[str]:
    """Say which files and folders that the settings name are not there, or cannot be written."""
    train = hp.eval_only or core.shard_paths(hp, "train")
    kind, _, variant = Path(hp.data_path).name.partition("_")
    download = f"python data/download.py --variant {shlex.quote(variant)}"
    get = f"get it: {download if kind == 'fineweb10B' else 'see data/README.md'}"
    resume = hp.resume in ("", "auto") or Path(hp.resume).is_file()
    watcher = "REPORT_TO" if hp.report_to else "WATCH"
    lonely = (hp.watch or hp.report_to) and not WATCHER.is_file()
    out = Path(hp.out_dir).absolute()
    while not out.exists():
        out = out.parent
    nll = Path(hp.save_nll)
    free = not nll.exists() or (nll.is_dir() if hp.score_streams else nll.is_file())
    # With a slash at its end, what is no folder cannot be written.
    can_save = not hp.save_nll or (free and os.access(f"{nll.parent}/", os.W_OK))
    rules = [
        (not Path(hp.tokenizer_path).is_file(), "TOKENIZER_PATH", f"no such file; {get}"),
        (not train, "DATA_PATH", f"no fineweb_train_*.bin; {get}"),
        (not core.shard_paths(hp, "val"), "DATA_PATH", f"no fineweb_val_*.bin; {get}"),
        (hp.eval_only and not Path(hp.artifact).is_file(), "ARTIFACT", "no such file"),
        (not resume, "RESUME", "no such file"),
        (not os.access(f"{out}/", os.W_OK), "OUT_DIR", "cannot be written to"),
        (not can_save, "SAVE_NLL", "no file can be made there"),
        (lonely, watcher, "needs lab/watch.py beside keeper.py"),
    ]
    return [f"{name}={getattr(hp, name.lower())}: {text}" for broken, name, text in rules if broken]


def settings_table() -> str:
    """Write all settings as a Markdown table that is also readable in a terminal."""
    row = "| {:26} | {:41} | {:20} | {:56} |".format
    rows = [row("variable", "default", "valid", "meaning"), row(*["---"] * 4)]
    for name, field in core.FIELDS.items():
        rows += [row(name, field.default, field.metadata["valid"], field.metadata["doc"])]
    return "\n".join(rows)


def surroundings_problems(
    hp: core.Hyperparameters, environ: Mapping[str, str], check_places: bool
) -> list[str]:
    """Say what is wrong with what surrounds a run: launcher, device, files and folders."""
    problems = launcher_problems(environ) + device_problems(hp) + name_problems(hp)
    return problems + place_problems(hp) if check_places else problems


# ===================================== CONSOLE =====================================
# A console that cannot be written, be it a closed pipe or terminal or a full disk, ends nothing.


def warn(run: core.Run, text: str) -> None:
    """Log a warning."""
    run.log(f"warning: {text}", "warning", text=text)


def flush_console() -> None:
    """Write what is to be printed.

    What cannot be written is dropped: it would fail again at each line, and at the exit.
    """
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            console = os.dup(1)
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            sys.stdout.flush()
            os.dup2(console, 1)
            os.close(console)
            os.close(nothing)


def run_program(main: Callable[[list[str]], None]) -> int:
    """Run a program, with its errors in one line. Returns its exit code, or exits."""
    any_console(sys.argv[1:])
    try:
        main(sys.argv[1:])
        if sys.argv[1:] == ["--help"]:
            print(settings_table(), flush=True)
        return 0
    except SystemExit as end:  # of `Keeper.trained`
        return end.code
    except (UserError, OSError) as problem:
        flush_console()
        if isinstance(problem, BrokenPipeError):
            sys.exit(1)  # nobody reads what was asked for
        # Before they meet, the ranks of a node find the same problems. The first one speaks; the
        # others do if no launcher has ended them by then.
        first = os.environ.get("LOCAL_RANK", "0") in ("", "0")
        time.sleep(0 if first or dist.is_initialized() else 2)
        sys.exit(f"{Path(core.__file__).name}: error: {problem}" if str(problem) else 1)


def any_console(arguments: list[str]) -> None:
    """Let the console take any text: what its encoding lacks is printed as an escape.

    A file of settings is UTF-8, and has the bytes of paths as they are.
    """
    # A file of the run's would get the number of a console that was closed, as by `>&-`.
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(free, True)
    os.close(free)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed when the process started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")
    if arguments == ["--settings"]:
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")


# ===================================== COMPILER AND MEMORY =====================================


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that a device, or the machine, has too little memory."""
    return bool(re.search("out of memory|allocate memory", str(error)))


def free_memory(device: torch.device) -> None:
    """Give memory that PyTorch keeps, but does not use, back to the device."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


class Compiled:
    """Run a compiled model, or the model itself where compiling turns out not to work.

    Then the compiler does not run, its folder of temporary files is full or may hold no programs,
    or a limit is passed.
    """

    def __init__(self, model: nn.Module, run: core.Run) -> None:
        self.model = model
        self.run = run
        self.forward: core.Forward | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        try:
            if self.forward is None:
                self.forward = core.compile_model(self.model)
            return self.forward(*inputs)
        except Exception as error:  # compilers raise what they like
            self.give_up(error)
        return self.forward(*inputs)

    def give_up(self, error: Exception) -> None:
        """Go on without the compiler.

        Raises the error if it is not the compiler's to mend, and UserError with COMPILE=1.
        """
        if self.forward is self.model or is_out_of_memory(error):
            raise error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = [line for line in lines[1:] if re.search("error:|not permitted|No space", line)]
        why = f"{type(error).__name__}: {'; '.join([*lines[:1], *told[:1]])}"
        require(self.run.hp.compile == "auto", f"COMPILE=1: it does not work here: {why}")
        warn(self.run, f"COMPILE=auto does not work here, going on without: {why}")
        self.forward = self.model


# ===================================== CHECKPOINTS =====================================
# SHA-256, then what torch.save makes of tensors and plain values: loading runs no code.
GONE = {"ZERO_LEVEL"}  # settings that there were, and that changed no result
PART_TOKENS = 2**22  # read at once, of a whole split


def checkpoint_name(step: int) -> str:
    """Name the checkpoint of a step."""
    return f"checkpoint_{step:07d}.pt"


def checkpoint_step(path: Path) -> int:
    """Read the step from a checkpoint's name; 0 if it is no checkpoint's name."""
    found = re.fullmatch(r"checkpoint_(\d+)\.pt", path.name)
    return int(found[1]) if found else 0


def checkpoints(run: core.Run) -> list[Path]:
    """List the checkpoints in the run's folder, that of the latest step first.

    The times of files tell nothing: a copy, a restore or a wrong clock changes them.
    """
    found = filter(checkpoint_step, run.dir.glob("checkpoint_*.pt"))
    return sorted(found, key=checkpoint_step, reverse=True)


def write_checkpoint(state: dict[str, Any], run: core.Run) -> None:
    """Write what `gather_state` gave, and delete the oldest. A full disk costs but a warning."""
    path = run.dir / checkpoint_name(state["step"])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    digest = hashlib.sha256(content).digest()
    try:
        core.atomic_write(path, lambda file: file.writelines((digest, content)))
    except OSError as error:
        warn(run, f"no checkpoint of step {state['step']}: {error}")
        return
    for old in checkpoints(run)[run.hp.save_total_limit :]:
        old.unlink()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the state in a checkpoint.

    Raises an Exception of any kind if it is none, or of another step than its name says.
    """
    content = memoryview(path.read_bytes())
    require(hashlib.sha256(content[32:]).digest() == content[:32], "truncated or damaged")
    state = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
    step = checkpoint_step(path)
    require(step in (0, state["step"]), f"it holds step {state['step']}")
    state["settings"] = dict(state["settings"])
    return state


def set_aside(run: core.Run, step: int, resumed: Path | None) -> None:
    """Rename the checkpoints that the training from `step` on does not go on from.

    Else they would be taken for this training's, or deleted in its place.
    """
    ours = resumed.resolve() if resumed else None
    later = [p for p in checkpoints(run) if checkpoint_step(p) >= step and p.resolve() != ours]
    for path in later:
        path.replace(path.with_name(f"old_{path.name}"))
    if later:
        names = ", ".join(path.name for path in later)
        why = "as this training does not go on from it"
        run.log(f"set aside as old_checkpoint_*.pt, {why}: {names}")


def find_checkpoint(run: core.Run) -> tuple[Path | None, dict[str, Any] | None]:
    """Read the checkpoint that RESUME asks for; None if that is auto, and there is none.

    Raises UserError if it cannot be read.
    """
    auto = run.hp.resume == "auto"
    for path in checkpoints(run) if auto else [Path(run.hp.resume)]:
        try:
            return path, read_checkpoint(path)
        except Exception as error:  # crafted content can raise anything
            require(auto, f"{path}: not a checkpoint: {error}")
            warn(run, f"{path}: not a checkpoint: {error}; trying the one before it")
    run.log("resume:auto no checkpoint; starting at step 0")
    return None, None


def check_origin(state: dict[str, Any], path: Path, data: str, run: core.Run) -> str:
    """Log what differs from the settings and data that a checkpoint was made with.

    Returns those lines that change the result. Raises UserError if the run may not go on from it.
    """
    then = state["settings"]
    now = core.setting_texts(run.hp) | {"DATA": data}
    if not then.get("DATA"):
        warn(run, f"{path}: not known with what training data it was made")
        then["DATA"] = now["DATA"]
    unknown = ", ".join(sorted(then.keys() - now.keys() - GONE))
    require(not unknown, f"{path}: unknown settings {unknown}: a newer script made it")
    # A setting that it lacks was at its default: it was made before there was one.
    defaults = core.setting_texts(core.Hyperparameters())
    then = defaults | then
    changed = [name for name, text in now.items() if then[name] != text]
    lines = {name: f"\n  {name}={then[name]}, now {now[name]}" for name in changed}
    grave = "".join(line for name, line in lines.items() if name not in core.RUN_SETTINGS)
    advice = "other settings made it, set them back or set RESUME_CHANGED=1"
    require(not grave or run.hp.resume_changed, f"{path}: {advice}:{grave}")
    over = "it has no optimizer state: its training was over, and only its settings can finish it"
    require(state.get("whole", True) or not grave, f"{path}: {over}{grave}")
    step = state["step"]
    line = f"resume:{path} step:{step}{''.join(lines.values())}"
    run.log(line, "resume", path=str(path), step=step)
    return grave


def optimizer_states(trainer: core.Trainer, p: Tensor) -> list[dict[str, Any]]:
    """List what each of its optimizers keeps for a parameter, empty before the first step."""
    groups = [(optimizer, g) for optimizer in trainer.optimizers for g in optimizer.param_groups]
    return [o.state[p] for o, group in groups if any(p is q for q in group["params"])]


def guard_of(trainer: core.Trainer) -> Any:
    """Give the guard of AUTO_LR_REDUCTION; None if there is none."""
    return getattr(trainer, "guard", None)


def gather_state(trainer: core.Trainer, step: int, elapsed: float, whole: bool) -> dict[str, Any]:
    """Copy all that the rest of the run depends on; on rank 0, of all ranks.

    Unless it is to be `whole`, the optimizers' state is left out: nothing needs it after the last
    step.
    """
    run = trainer.run
    guard = guard_of(trainer)
    params = {}
    for name, p in trainer.owned.items():
        kept = {"weights": p}
        if trainer.average is not None:
            kept["average"] = trainer.within(name, trainer.average)
        if whole:
            for state in optimizer_states(trainer, p):
                kept |= state
        params[name] = {
            key: value.detach().cpu().clone() if isinstance(value, Tensor) else value
            for key, value in kept.items()
        }
    if run.world_size > 1:
        shares = [{}] * run.world_size if run.rank == 0 else None
        dist.gather_object(params, shares)
        params = {}
        for share in shares or []:
            params |= share
    return {
        "step": step,
        "tokens": trainer.tokens,
        "visits": trainer.model.visits,
        "elapsed": elapsed,
        "stop": int(run.stop),
        "whole": whole,
        "random": torch.get_rng_state(),
        "settings": core.setting_texts(run.hp),
        "guard": guard.state.cpu().clone() if guard else None,
        "params": params,
    }


def restore_state(trainer: core.Trainer, state: dict[str, Any]) -> None:
    """Put a state of `gather_state` into a trainer, of which each rank takes what it owns."""
    theirs = {name: kept["weights"].shape for name, kept in state["params"].items()}
    ours = {name: p.shape for name, p in trainer.params.items()}
    require(theirs == ours, "RESUME: the checkpoint is of a model of another shape")
    for name, p in trainer.params.items():
        p.copy_(state["params"][name]["weights"])
    trainer.working.copy_(trainer.weights)
    for name, p in trainer.owned.items():
        kept = dict(state["params"][name])
        weights = kept.pop("weights")
        # An average that was not kept then starts as the weights.
        average = kept.pop("average", weights)
        if trainer.average is not None:
            trainer.within(name, trainer.average).copy_(average)
        restore_optimizer(trainer, p, kept)
    torch.set_rng_state(state["random"])
    trainer.tokens = state.get("tokens", state["step"] * trainer.run.hp.train_batch_tokens)
    trainer.feed_from(state["step"])
    guard = guard_of(trainer)
    if guard and state.get("guard") is not None:
        guard.state.copy_(state["guard"])
        guard.told = int(guard.halvings)
    trainer.model.visits = state.get("visits", trainer.model.visits)


def restore_optimizer(trainer: core.Trainer, p: Tensor, kept: dict[str, Any]) -> None:
    """Put back what its optimizers kept for a parameter, be that made yet or not."""
    states = optimizer_states(trainer, p)
    for key, value in kept.items():
        state = next((state for state in states if key in state), states[0])
        if isinstance(state.get(key), Tensor):
            state[key].detach().copy_(value)  # others may hold views of it
        else:
            state[key] = value.to(p.device) if isinstance(value, Tensor) else value


def parts(stream: core.TokenStream, count: int) -> Iterator[np.ndarray]:
    """Read the first `count` tokens of a split, in parts that take little memory."""
    for start in range(0, count, PART_TOKENS):
        yield core.TokenStream.read(stream, start, min(PART_TOKENS, count - start))


class Identity:
    """Find out what all the training data is, however it lies in shards, beside what follows.

    A checkpoint needs it, and the end of a run may leave no time to read all the data.
    """

    def __init__(self, stream: core.TokenStream) -> None:
        self.text = ""  # until it is known
        self.stream = stream
        self.thread = threading.Thread(target=self.digest, daemon=True)
        self.thread.start()

    def digest(self) -> None:
        """Set the text, unless the data cannot be read: training will tell."""
        digest = hashlib.sha256()
        with contextlib.suppress(OSError, UserError):
            for part in parts(self.stream, self.stream.total):
                digest.update(part)
            self.text = f"{self.stream.total} tokens, sha256 {digest.hexdigest()}"

    def wait(self) -> str:
        """Wait until the text is known, and return it."""
        self.thread.join()
        return self.text


# ===================================== THE TOKENIZER =====================================
AUDITED_TOKENS = 2**20  # of the validation tokens at most are encoded again


def stretches(tokens: np.ndarray) -> list[np.ndarray]:
    """Take the whole stream or, of a long one, AUDITED_TOKENS from all over it."""
    if len(tokens) <= AUDITED_TOKENS:
        return [tokens]
    length = 2**12
    starts = np.random.default_rng(0).integers(len(tokens) - length, size=AUDITED_TOKENS // length)
    return [tokens[start : start + length] for start in starts]


def words(tokenizer: core.Tokenizer, tokens: np.ndarray) -> Iterator[tuple[bool, tuple[int, ...]]]:
    """Yield the words of a stretch, each a space and what follows; and if it begins a text."""
    space = tokenizer.lead | [piece == "<0x20>" for piece in tokenizer.pieces]
    border = tokenizer.silent
    if not any(core.SPACE in piece.lstrip(core.SPACE) for piece in tokenizer.pieces):
        border = border | space  # no piece is of several words
    borders = np.flatnonzero(border[tokens]).tolist()
    for start, end in itertools.pairwise(borders):
        begin = start + int(tokenizer.silent[tokens[start]])
        word = tokens[begin:end].tolist()
        if space[word].all():  # at the end of a text, decoding leaves them out
            continue
        before = tokens[begin - 1] if begin else None
        unknown = before == tokenizer.sp.unk_id()
        if unknown and not space[word[0]]:
            continue
        begins_text = begin > 0 and tokenizer.silent[before] and not unknown
        yield bool(begins_text), tuple(word)


def audit_words(tokenizer: core.Tokenizer, tokens: np.ndarray) -> None:
    """Encode decoded words: 1 in 1000 may differ; of another tokenizer, one in ten would."""
    counts = collections.Counter()
    for stretch in stretches(tokens):
        counts.update(words(tokenizer, stretch))
    judged = 0
    wrong = 0
    example = ""
    before = tokenizer.sp.encode(tokenizer.plain_text)
    for (begins_text, word), count in counts.items():
        text = tokenizer.sp.decode([*tokenizer.plain, *word])
        expected = [*before, *word]
        if begins_text:
            text = text.removeprefix(tokenizer.plain_text)
            expected = [*word]
        size = len(word) * count
        judged += size
        if tokenizer.sp.encode(text) != expected:
            wrong += size
            example = example or text
    what = "of the validation documents are in text that encodes to other tokens"
    problem = f"{wrong} of {judged} tokens {what}, such as {example!r}"
    ours = wrong <= judged / 1000 + 4 and (tokenizer.byte_level or core.SPACE in tokenizer.pieces)
    require(ours, f"byte audit: {problem}; {core.ADVICE}")


# ===================================== SAYING WHY =====================================


# CaseOps (parameter-golf, 2026-04-18) marks capitals. This finds each mark, and what it acts on.
# A mark or a capital that it finds alone makes the text malformed.
CASE_OPS = "[\ue001\ue003][a-z]|\ue002[a-z]+|\ue004[\ue001-\ue004]|[\ue001-\ue004A-Z]"
# Normalization joins letters with accents, and makes capitals of symbols.
NORMAL_CASE_OPS = CASE_OPS.replace("[a-z]", r"[^\W\d_]").replace("A-Z", "")
NORMALIZED = "  \ufb01\xa0 "  # each normalization changes one of these
MOST_NORMALIZED = 0.01  # of the bytes: prose with many blank lines has 0.006


def invert_case(text: str, pattern: str) -> str:
    """Restore the text before CaseOps. Raises UserError if there is none."""

    def act(found: re.Match) -> str:
        what = f"{found[0]!r} at character {found.start()} is not of CaseOps text"
        require(len(found[0]) > 1, f"byte audit: {what}: {text[:40]!r}")
        return found[0][1:].upper()

    return re.sub(pattern, act, text)


def audit_sidecar(val: core.Validation, is_cut: bool) -> str:
    """Compare a sidecar with each document's text before CaseOps; say how far it is off.

    It must agree to the byte, unless the tokenizer normalizes text. Raises UserError.
    """
    tokenizer = val.tokenizer
    exact = tokenizer.sp.normalize(NORMALIZED) == NORMALIZED.replace(" ", core.SPACE)
    pattern = CASE_OPS if exact else NORMAL_CASE_OPS
    starts = 1 + np.flatnonzero(val.tokens[1:] == val.bos)
    documents = np.split(val.tokens, starts)
    counts = [int(part.sum(dtype=np.int64)) for part in np.split(val.sizes, starts)]
    apart = 0
    for number, (ids, count) in enumerate(zip(documents, counts, strict=True)):
        text = tokenizer.sp.decode(tokenizer.plain + ids.tolist())
        text = text.removeprefix(tokenizer.plain_text)
        ends_early = is_cut and number == len(starts)
        if ends_early:
            text = text.rstrip(core.CASE_MARKS)
        size = len(invert_case(text, pattern).encode())
        apart += abs(count - size)
        same = abs(count - size) <= 9 * ends_early  # if cut inside a character
        what = f"document {number}: {count} bytes by the sidecar, {size} by its text"
        require(same or not exact, f"byte audit: {what}")
    total = sum(counts)
    what = f"sidecars and text differ by {apart} bytes, more than normalization explains"
    require(apart <= MOST_NORMALIZED * total + 1000, f"byte audit: {what}")
    return f" sidecar_apart:{apart / max(1, total):.6f}"


def forecast(params: Mapping[str, Tensor], run: core.Run) -> None:
    """Log the artifact's size for the initial weights, with Gaussian ones where they are zero."""
    noise = torch.Generator().manual_seed(0)
    state = dict(params)
    for name, w in params.items():
        if not w.any():
            state[name] = torch.randn(w.shape, generator=noise)
    module = core.quantizer(run.hp)
    make = module.forecast if module else core.pack_artifact
    code = core.code_bytes(run.hp)
    size = len(make(state, run.hp))
    cap = run.hp.artifact_max_bytes
    line = f"forecast: {code + size} bytes ({code} code, {size} artifact) of {cap}"
    if code + size > cap:
        line += f"; warning: over the cap, with FIT_BUDGET={run.hp.fit_budget}"
    run.log(line, "forecast", code_bytes=code, artifact_bytes=size, max_bytes=cap)


def log_model(trainer: core.Trainer, run: core.Run) -> None:
    """Log the FLOPs of training on a token, without elementwise ones, and what trains."""
    flops = flops_per_token(run.hp)
    line = f"flops_per_token:{flops:.4g}"
    if run.hp.loop_repeats:
        line += f" before_loops:{flops_per_token(run.hp, loops=False):.4g}"
    on_cuda = run.device.type == "cuda"
    fields = {
        "parameters": sum(p.numel() for p in trainer.params.values()),
        "flops_per_token": flops,
        "world_size": run.world_size,
        "device": torch.cuda.get_device_name() if on_cuda else run.device.type,
        "dtype": str(run.dtype).removeprefix("torch."),
    }
    run.log(line, "model", **fields)


def start_watcher(run: core.Run) -> None:
    """Let lab/watch.py look on, as WATCH and REPORT_TO ask; it ends when the run does."""
    hp = run.hp
    if not (hp.watch or hp.report_to):
        return
    command = [sys.executable, str(WATCHER), str(run.dir), "--child", str(os.getpid())]
    command += ["--report-to", hp.report_to] if hp.report_to else []
    command += [] if hp.watch else ["--silent"]
    try:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        warn(run, f"{WATCHER} cannot be started: {error}")


def memory_mib(device: torch.device) -> float:
    """Measure the memory that was in use at most: the device's own, or else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if peak:  # getrusage has the parent's, if that was larger
        return int(peak[1]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def unknown_note(folder: Path, count: int, lost: int | None) -> str:
    """Say for how much text `count` unknown pieces stand.

    The sidecar knows (`lost` bytes), or a manifest that counts as many; else each is a character.
    """
    if lost is None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            split = json.loads((folder / "manifest.json").read_bytes())["splits"]["val"]
            lost = int(split["unknown_bytes"]) if split["unknown_tokens"] == count else None
    size = f"at least {count}" if lost is None else str(lost)
    what = "are characters that the tokenizer lacks: val_bytes leaves them out"
    return f"{size} bytes of the validation text {what}"


def planned_tokens(hp: core.Hyperparameters) -> float:
    """Count the tokens of all steps, of which each stage has a share."""
    stages = [(0.0, hp.train_batch_tokens)]
    if module := core.frontier(hp):
        stages = [(stage.begin, stage.hp.train_batch_tokens) for stage in module.stages_of(hp)]
    begins, batches = zip(*stages, strict=True)
    shares = np.diff([*begins, 1.0])
    return hp.iterations * float(shares @ batches)


def log_data(stream: core.TokenStream, run: core.Run) -> None:
    """Log how much training data there is, and how often it will be read."""
    hp = run.hp
    run.log(f"train_shards:{len(stream.paths)} train_tokens:{stream.total}")
    planned = planned_tokens(hp) / stream.total
    line = f"epochs_planned:{planned:.2f}"
    if planned < 2:
        run.log(line)
        return
    text = f"each training token is read {planned:.1f} times"
    if hp.max_wallclock_seconds:
        text += " at most; MAX_WALLCLOCK_SECONDS may end it before"
    run.log(f"{line} warning: {text}", "warning", text=text)


def why_ended(run: core.Run, step: int) -> str:
    """Say why training ended before ITERATIONS; nothing if it did not."""
    if run.stop == FAILED:
        return "failure"
    if run.stop == FINISH:
        return signal.SIGUSR1.name
    if run.stop:
        return signal.Signals(run.stop).name
    return "wallclock_cap" if step < run.hp.iterations else ""


def how_to_go_on(run: core.Run) -> str:
    """Name the settings that let a run go on from its newest checkpoint."""
    return f"RUN_ID={shlex.quote(run.dir.name)} RESUME=auto"


def what_is_not_finite(trainer: core.Trainer, batch: list[core.Batch]) -> str:
    """Find what is not finite in a batch: a weight, or the first activation or gradient."""
    found = [f"weight {n}" for n, p in trainer.params.items() if not p.isfinite().all()]

    def look(name: str, _: nn.Module, inputs: Any, output: Tensor) -> None:
        if not output.isfinite().all():
            found.append(f"output of {name or 'the model'}")

    for name, module in trainer.model.named_modules():
        module.register_forward_hook(functools.partial(look, name))
    trainer.grads.zero_()
    for part in batch:
        trainer.model(*part).sum().backward()
        trainer.collect()
    for name, p in reversed(trainer.params.items()):
        if not p.grad.isfinite().all():
            found.append(f"gradient of {name}")
    return found[0] if found else f"nothing in the batch of rank {trainer.run.rank}"


def attention_inputs(run: core.Run) -> list[Tensor]:
    """Make random q, k, v, (1, H, T, Dh), and a gradient of their result, as the model's."""
    hp = run.hp
    random = torch.Generator().manual_seed(0)
    T = min(max(hp.train_seq_len, 8), 2048)
    H = hp.num_heads
    K = hp.num_kv_heads
    sizes = (H + K, H + 2 * K, H)
    made = [torch.randn(1, T, n, hp.model_dim // H, generator=random) for n in sizes]
    qk, qkv, grad = (x.to(run.device, run.dtype).transpose(1, 2) for x in made)
    q, k = qk.split((H, K), dim=1)
    return [q, k, qkv[:, H + K :], grad]


def attention_backend(run: core.Run) -> str:
    """Ask PyTorch which of its kernels it takes for the model's attention in training."""
    q, k, v = (x.requires_grad_() for x in attention_inputs(run)[:3])
    gqa = q.size(1) != k.size(1)
    return SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=gqa)).name


def attention_problem(run: core.Run, documents: bool = False) -> str:
    """Compare attention and its gradients with plain products in fp32: say what is wrong."""
    if run.dtype == torch.float32:
        return ""  # there is nothing faster than plain products
    *inputs, grad = attention_inputs(run)
    T = grad.size(2)
    begins = np.zeros((1, T), bool)
    begins[0, [T // 3, T // 2]] = documents
    pieces = core.cut(begins, T, run.device)

    def results(dtype: torch.dtype, attend: Callable[..., Tensor]) -> list[Tensor]:
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
        y = attend(q, k, v)
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), grad.to(dtype))]

    attend = functools.partial(core.attend, documents=pieces if documents else None)
    try:
        ours = results(run.dtype, attend)
    except RuntimeError as error:
        return f"does not run here: {error}"
    with sdpa_kernel(SDPBackend.MATH):
        alone = functools.partial(core.attend_by_piece, offsets=pieces.offsets)
        exact = results(torch.float32, alone)
    where = " within documents" if documents else ""
    for name, a, b in zip(("result", "dq", "dk", "dv"), ours, exact, strict=True):
        # At each position: kernels have been wrong at a few alone (PyTorch issue 196678).
        errors = (a.float() - b).norm(dim=(1, 3)) / b.norm(dim=(1, 3))
        if name == "dq":
            errors[:, pieces.offsets[:-1].long()] = 0  # a first query has one key: its dq is 0
        error = float(errors.max())
        if not error < ATTENTION_ERROR:  # or not a number
            off = f"its {name} is {100 * error:.1f}% from that of plain products"
            return f"wrong here{where}: {off}"
    return ""


# ===================================== THE KEEPER =====================================
ATTENTION_ERROR = 0.03  # at any position, of its norm; rounding to bf16 makes up to 0.008
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # save, and stop
FINISH = 10  # what SIGUSR1 asks for: train no further, and export
FAILED = 1000  # over the numbers of all signals: a rank cannot go on
SCAN_TOKENS = 2**27  # at the start of a split, whose ids are checked before the run begins
PATIENCE = 5.0  # seconds after which a wait for other ranks is told


class Keeper:
    """Keep a run, in the places where train_gpt.py calls these methods."""

    source = core.read_once(__file__).decode()

    def __init__(self, run: core.Run) -> None:
        self.run = run
        self.state: dict[str, Any] | None = None  # of the checkpoint to resume, on rank 0
        self.saved = -1  # the step of the newest checkpoint
        self.end: Path | None = None  # a checkpoint for as long as there is no score
        self.lock: IO[str] | None = None  # of the run's folder
        self.room: Path | None = None  # on the disk, for what is exported
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None
        self.noted = 0.0  # when the first signal came
        self.problem = ""  # why this process cannot go on
        self.halved = False  # whether a micro-batch did not fit
        self.warnings: list[str] = []  # from before the log is open

    @staticmethod
    def say(line: str) -> None:
        """Print a line. A console that cannot be written loses the line and ends nothing."""
        with contextlib.suppress(OSError):
            print(line)
        flush_console()

    # ---- before training

    def scan(self, stream: core.TokenStream) -> None:
        """Check the first ids of a split, once a node. Raises UserError at a wrong one."""
        count = min(stream.total, SCAN_TOKENS) if self.run.local_rank == 0 else 1
        for _ in parts(stream, count):
            pass  # reading has checked them

    def begin(self) -> None:
        """Make the run's folder this process's own. Raises UserError if a live process has it."""
        folder = self.run.dir
        path = folder / "lock"
        self.lock = open(path, "a")  # noqa: SIM115
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"RUN_ID={folder.name}: in use by {path.read_text()}") from None
        path.write_text(f"process {os.getpid()} on {os.uname().nodename}")
        for left in folder.glob(".*.partial"):  # by a process that was killed
            left.unlink()

    def meet(self, backend: str) -> None:
        """Form a group with the other ranks. Raises UserError if they do not come."""
        run = self.run
        env = os.environ.get
        where = f"{env('MASTER_ADDR')}:{env('MASTER_PORT')}"
        waiting = f"rank {run.rank} waits for the other {run.world_size - 1} ranks at {where}"
        # torchrun shows ranks that it restarts the addresses of the dead (PyTorch issue 135712). On
        # one node, it counts the restarts alike for all.
        one_node = env("LOCAL_WORLD_SIZE") == env("WORLD_SIZE")
        prefix = env("TORCHELASTIC_RESTART_COUNT", "") if one_node else ""
        timer = self.tell_later(waiting)
        try:
            store, _, _ = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(prefix, store)
            place = {"rank": run.rank, "world_size": run.world_size}
            dist.init_process_group(backend, store=store, **place)
        except RuntimeError as error:  # of which those of torch.distributed are kinds
            raise UserError(f"{waiting}, and cannot meet them: {error}") from None
        finally:
            timer.cancel()

    def tell_later(self, waiting: str) -> threading.Timer:
        """Start to wait for what is to be told if it takes long, and what may be wrong then."""
        advice = "each needs its own RANK and the same WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        if self.run.rank > 0:
            advice += "; rank 0 checks the validation data before it comes"
        # One or two of a node speak for all: on a large validation set each wait is that long.
        patience = PATIENCE * {0: 1, 1: 2}.get(self.run.local_rank, 24)
        timer = threading.Timer(patience, self.say, [f"{waiting}; {advice}"])
        timer.daemon = True
        timer.start()
        return timer

    def explain_validation(self, val: core.Validation) -> None:
        """Tell for how much text unknown pieces stand. Raises UserError if documents are needed."""
        hp = self.run.hp
        for warning in self.warnings:
            warn(self.run, warning)
        is_unknown = val.tokens == val.tokenizer.sp.unk_id()
        if count := int(is_unknown.sum()):
            val.note += f" unknown_tokens:{count}"
            sizes = val.sizes
            lost = None if sizes is None else int(sizes[is_unknown].sum(dtype=np.int64))
            warn(self.run, unknown_note(Path(hp.data_path), count, lost))
        parted = hp.score_streams or (val.tokens == val.bos).any()  # into documents or streams
        isolated = hp.eval_doc_isolated or (hp.train_doc_isolated and not hp.eval_only)
        needed = isolated or hp.smear_gate or hp.bigram_buckets
        what = "*_DOC_ISOLATED, SMEAR_GATE and BIGRAM_BUCKETS need documents that begin with BOS"
        where = f"the tokenizer's is id {val.bos}, and the validation tokens have none"
        require(parted or not needed, f"{hp.data_path}: {what}; {where}")

    def audit_case_ops(self, val: core.Validation, total: int) -> str:
        """Check the sidecar of CaseOps data of `total` tokens; a note. Raises UserError."""
        return audit_sidecar(val, is_cut=len(val.tokens) < total)

    def check_attention(self, kernel: str) -> str:
        """Name a kernel that is in use for the log. Raises UserError if it is not, or is wrong."""
        run = self.run
        on_cuda = run.device.type == "cuda"
        taken = attention_backend(run) if on_cuda else ""
        wanted = core.KERNELS.get(kernel, taken)
        require(taken == wanted, f"PyTorch takes {taken} for this model")
        hp = run.hp
        packed = bool(hp.train_doc_isolated or hp.eval_doc_isolated or hp.score_streams)
        problem = attention_problem(run)
        if packed and not problem:
            problem = attention_problem(run, documents=True)
        if problem:
            self.warnings.append(f"ATTENTION={kernel}: {problem}")
            raise UserError(problem)
        name = f"sdpa:{taken}" if kernel == "sdpa" and on_cuda else kernel
        if packed and on_cuda and run.dtype == torch.bfloat16:  # by varlen_attn
            name += " documents:" + (kernel if kernel in ("fa3", "fa4") else "fa2")
        return name

    def compiled(self, model: core.GPT) -> core.Forward:
        """Compile a model, and go on without where that does not work."""
        return Compiled(model, self.run)

    def prepare(self, trainer: core.Trainer) -> None:
        """Listen to signals, forecast the size, find the checkpoint, and take room on the disk."""
        self.listen()
        log_data(trainer.stream, self.run)
        self.on_first(lambda: self.prepare_first(trainer))

    def prepare_first(self, trainer: core.Trainer) -> None:
        """Do what rank 0 does of `prepare`."""
        run = self.run
        self.data = Identity(trainer.stream)
        log_model(trainer, run)
        start_watcher(run)
        forecast(trainer.params, run)
        path = None
        if run.hp.resume:
            path, self.state = find_checkpoint(run)
        if self.state:
            self.check(trainer, path, self.state)
        self.saved = self.state["step"] if self.state else 0
        set_aside(run, self.saved, path)
        self.room = self.take_room(trainer.model)

    def check(self, trainer: core.Trainer, path: Path, state: dict[str, Any]) -> None:
        """Find out what is left to do after a checkpoint: training, or the export alone."""
        run = self.run
        grave = check_origin(state, path, self.data.wait(), run)
        whole = state.get("whole", True)
        if run.hp.resume == "auto" and not whole:
            self.end = path
        exported = (run.dir / "final_model.artifact").exists()
        over = state.get("stop") == FINISH and not grave
        if over and not (whole and exported):
            self.run.signal = FINISH  # training had been ended; what is left is the export

    def listen(self) -> None:
        """Note signals that ask to stop, for the clock, and exit at once at the second one.

        Those that are ignored, as nohup and a shell's background jobs ask, stay so.
        """
        for number in (*ENDING, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.note)

    def note(self, number: int, _: Any) -> None:
        """Remember the first signal; at a second one, exit."""
        now = time.monotonic()
        if self.noted and now > self.noted + 2:  # torchrun repeats what it gets
            os._exit(128 + number)
        self.noted = self.noted or now
        if not self.run.signal:
            self.run.signal = FINISH if number == signal.SIGUSR1 else number

    @property
    def stopped(self) -> bool:
        """Tell whether what one rank was asked, or found, ends the run without a result."""
        return self.run.stop not in (0, FINISH)

    def fail(self, problem: str) -> None:
        """Let all ranks stop, since this one cannot go on."""
        self.problem = problem
        self.run.signal = FAILED

    def recover(self) -> None:
        """Take back `fail`, on whichever rank it was."""
        if self.run.signal == FAILED:
            self.run.signal = 0
        self.run.stop = 0

    def on_first(self, action: Callable[[], None]) -> None:
        """Call a function on rank 0 alone. If it raises there, all ranks raise UserError."""
        try:
            if self.run.rank == 0:
                action()
        except (OSError, UserError) as error:
            self.fail(str(error))  # only rank 0 has a message
        self.run.clock()
        require(self.run.stop != FAILED, self.problem)

    def take_room(self, model: core.GPT) -> Path:
        """Take room on the disk for artifact and raw weights, until they are written.

        A disk that gets full in hours of training must not cost them. Raises UserError if there is
        none now.
        """
        folder = self.run.dir
        room = folder / ".room.partial"
        need = 2**16 + 6 * sum(p.numel() for p in model.parameters())  # at most 2 + 4 bytes each
        problem = ""
        with open(room, "wb") as file:
            try:
                fill(file, need)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    problem = error.strerror
                file.truncate(0)  # after another error: this disk cannot promise room
        if problem:
            room.unlink()
            free = shutil.disk_usage(folder).free
            what = f"artifact and weights need up to {need} bytes, {free} are free"
            raise UserError(f"{folder}: {problem}: {what}; make room there, or set OUT_DIR")
        return room

    # ---- priming

    def prime(self, trainer: core.Trainer) -> None:
        """Take the priming steps, and let all ranks take micro-batches that fit everywhere."""
        run = self.run
        step = 0
        while step < run.hp.warmup_steps:
            try:
                trainer.step(step, 0.0, dry=True)
                step += 1
            except RuntimeError as error:
                self.retry(trainer, step, error)
        rows = torch.tensor(run.forward_rows)
        if run.world_size > 1:  # validation, too, is divided by it
            dist.all_reduce(rows, dist.ReduceOp.MIN)
        if self.halved or rows < run.forward_rows:
            run.log(f"out of memory: going on with {rows} sequences at a time")
        run.forward_rows = int(rows)

    def retry(self, trainer: core.Trainer, step: int, error: RuntimeError) -> None:
        """Go on from a priming step that failed: without the compiler, or in smaller parts.

        Sums over a batch stay the same, whatever the micro-batches. Raises UserError if a single
        sequence does not fit.
        """
        if not is_out_of_memory(error):
            if not isinstance(trainer.forward, Compiled):
                raise error
            trainer.forward.give_up(error)  # its gradient cannot be compiled
            trainer.feed_from(step)
            return
        self.halved = True
        half = trainer.batch[0][0].numel() // 2
        self.run.forward_rows = half // core.row_length(self.run.hp)
        require(self.run.forward_rows, f"out of memory with a single sequence: {error}")
        trainer.feed_from(step)
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed step
        free_memory(self.run.device)

    def resume(self, trainer: core.Trainer) -> tuple[int, float]:
        """Go on from rank 0's checkpoint, if it has one."""
        given = [self.state]
        if self.run.world_size > 1:
            dist.broadcast_object_list(given)
        self.state = None
        (state,) = given
        self.saved = 0
        if not state:
            return 0, 0.0
        restore_state(trainer, state)
        self.saved = state["step"]
        return state["step"], state["elapsed"]

    # ---- training

    def is_due(self, step: int) -> bool:
        """Tell whether SAVE_EVERY asks for a checkpoint after a step."""
        every = self.run.hp.save_every
        return step > self.saved and bool(every) and step % every == 0

    def fetch(self, feed: Iterator[list[core.Batch]]) -> list[core.Batch] | None:
        """Take the next batch. If a shard cannot be read any more, all ranks will stop."""
        require(not self.problem, self.problem)
        try:
            return next(feed)
        except (OSError, UserError) as error:
            self.fail(f"the training data cannot be read any more: {error}")
        return None

    def save(self, trainer: core.Trainer, step: int, elapsed: float, done: bool) -> None:
        """Copy the state, and write it beside the next steps.

        With SAVE_EVERY=0 the end of training is kept too, without the optimizers' state: if what
        follows fails, RESUME=auto repeats that alone.
        """
        run = self.run
        if done and run.stop == FAILED:
            self.recover()  # no more data is needed
        last = done or run.stop == FINISH
        if step > self.saved:
            self.saved = step
            whole = bool(run.hp.save_every) or not last
            self.end = None if whole else run.dir / checkpoint_name(step)
            state = gather_state(trainer, step, elapsed, whole)
            if run.rank == 0:
                known = self.data.text if self.stopped else self.data.wait()
                state["settings"]["DATA"] = known
                self.wait()
                self.writing = self.writer.submit(write_checkpoint, state, run)
        if last or self.stopped:
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        if self.writing:
            self.writing.result()
        self.writing = None

    def figures(self, trainer: core.Trainer) -> dict[str, float]:
        """Give what metrics.jsonl has of a step beside its loss."""
        groups = [group for o in trainer.optimizers for group in o.param_groups]
        scales = [group["lr"] / group["base_lr"] for group in groups if group["base_lr"]]
        guard = guard_of(trainer)
        reduced = 0.5 ** float(guard.halvings) if guard else 1.0
        _, square = trainer.sums
        found = {"grad_norm": math.sqrt(square), "memory_mib": memory_mib(self.run.device)}
        if scales:
            found |= {"lr_scale": reduced * scales[0], "momentum": groups[0]["momentum"]}
        return found

    def skipped(
        self, trainer: core.Trainer, step: int, in_a_row: int, batch: list[core.Batch]
    ) -> None:
        """Log a step that was skipped. Raises UserError after MAX_BAD_STEPS in a row."""
        line = f"skipped_step:{step} loss or gradient not finite, {in_a_row} in a row"
        self.run.log(line, "skipped_step", step=step, in_a_row=in_a_row)
        if in_a_row >= self.run.hp.max_bad_steps:
            raise UserError(f"{line}; {self.diagnose(trainer, batch)}")

    def diagnose(self, trainer: core.Trainer, batch: list[core.Batch]) -> str:
        """Say what is not finite in a batch, the learning rates, and what to go on from."""
        rates = sorted({g["lr"] for o in trainer.optimizers for g in o.param_groups})
        last = next(iter(checkpoints(self.run)), "none")
        found = what_is_not_finite(trainer, batch)
        return f"first: {found}; learning rates {rates}; checkpoint: {last}"

    # ---- after training

    def trained(self, trainer: core.Trainer, step: int, elapsed: float) -> None:
        """Log why training ended, how often the data was read, and the memory of a GPU.

        Exits after a signal that asks to stop. Raises UserError if a rank cannot go on.
        """
        run = self.run
        if why := why_ended(run, step):
            ms = 1e3 * elapsed
            line = f"stopping_early: {why} train_time:{ms:.0f}ms step:{step}"
            run.log(line, "stopping_early", step=step, train_time_ms=ms, reason=why)
        epochs = trainer.tokens / trainer.stream.total
        if epochs > 1:
            run.log(f"epochs:{epochs:.2f}")
        if run.device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated() >> 20
            reserved = torch.cuda.max_memory_reserved() >> 20
            run.log(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")
        if not self.stopped:
            return
        run.log(f"to go on: {how_to_go_on(run)}")
        run.clock()  # no rank leaves, and lets a launcher end the others, before all is written
        require(run.stop != FAILED, self.problem)
        sys.exit(128 + run.stop)

    def write(self, files: dict[Path, Callable[[IO[bytes]], Any]]) -> None:
        """Write each file even if another cannot be. Raises UserError that says how to go on."""
        run = self.run
        self.leave_room()
        written = [path.name for path in checkpoints(run)[:1]]
        problems = []
        for path, fill_file in files.items():
            try:
                core.atomic_write(path, fill_file)
                written.append(path.name)
            except (OSError, UserError) as error:
                problems.append(f"{path.name}: {error}")
        free = f"{shutil.disk_usage(run.dir).free} bytes are free in {run.dir}"
        advice = f"put it right, and finish with {how_to_go_on(run)}"
        kept = f"kept: {', '.join(written) or 'nothing'}"
        what = f"training is over, but its result is not all written: {'; '.join(problems)}"
        require(not problems, f"{what}; {kept}; {free}; {advice}")

    def scored(self) -> None:
        """Remove the checkpoint that only the export and the score needed."""
        if self.end:
            self.end.unlink(missing_ok=True)

    def close(self) -> None:
        """Give back the room on the disk, and the run's folder."""
        self.leave_room()
        if self.lock:
            self.lock.close()

    def leave_room(self) -> None:
        """Give back the room on the disk."""
        if self.room:
            self.room.unlink(missing_ok=True)
        self.room = None


def fill(file: IO[bytes], size: int) -> None:
    """Let a file take `size` bytes of its disk. Raises OSError."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    file.write(bytes(size))
    file.flush()
