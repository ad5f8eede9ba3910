"""Say in settings of train_gpt.py what a nanochat command line or a Surogate file asks for.

What has no counterpart is named, with the reason.
"""

import math
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from plan_dial import PlanError, UsageError, Value, Values


class Translated(NamedTuple):
    """What became of a foreign configuration."""

    words: dict[str, str]  # options of the dial
    values: Values  # settings of train_gpt.py
    notes: list[str]  # what has no counterpart, or another meaning


class Rule(NamedTuple):
    """What an option is here: settings or words of the dial, or why it is none."""

    names: tuple[str, ...] = ()
    why: str = ""  # there is no counterpart, or how it differs
    convert: Callable[[Any], Any] = str


def number(value: Any) -> float:
    """Read a number, as YAML or a command line has it. Raises ValueError."""
    found = float(value)
    if isinstance(value, bool) or not math.isfinite(found):
        raise ValueError
    return found


def text_of(x: float) -> str:
    """Write a number as it would be typed."""
    return str(int(x)) if x == int(x) and abs(x) < 1e15 else f"{x:.10g}"


def plain(value: Any) -> str:
    """Pass a number on. Raises ValueError."""
    return text_of(number(value))


def or_off(value: Any) -> str:
    """Pass a number on; what is negative, which means off, as 0. Raises ValueError."""
    return text_of(max(0.0, number(value)))


def unless_off(value: Any) -> str | None:
    """Pass a number on, unless it is negative, which means off. Raises ValueError."""
    x = number(value)
    return None if x < 0 else text_of(x)


def closest(name: str, known: Any) -> str:
    """Say which known name was meant, if one is close."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {found[0]}?" if found else ""


# ===================================== NANOCHAT =====================================
NANOCHAT_ALONE = {  # what nanochat does without being asked
    "DEPTH": "20",
    "TARGET_PARAM_DATA_RATIO": "12",
}
NANOCHAT_SETTINGS = {
    "VOCAB_SIZE": ("32768", "nanochat's tokenizer"),
    "MAX_WALLCLOCK_SECONDS": ("0", "nanochat has no cap on time"),
}
NANOCHAT = {
    "run": Rule(("RUN_ID",), "", lambda text: None if text == "dummy" else text),
    "device-type": Rule(("DEVICE",), "", lambda text: text or "auto"),
    "fp8": Rule(why="products are in bf16 or fp32 here; fp8 does not pay at these widths"),
    "fp8-recipe": Rule(why="there is no fp8 here"),
    "depth": Rule(("DEPTH",)),
    "aspect-ratio": Rule(("ASPECT_RATIO",)),
    "head-dim": Rule(("HEAD_DIM",)),
    "max-seq-len": Rule(("TRAIN_SEQ_LEN",)),
    "window-pattern": Rule(("WINDOW_PATTERN",), "", str.upper),
    "num-iterations": Rule(("ITERATIONS",), "", unless_off),
    "target-flops": Rule(("TARGET_FLOPS",), "", unless_off),
    "target-param-data-ratio": Rule(("TARGET_PARAM_DATA_RATIO",), "", unless_off),
    "device-batch-size": Rule(("MICRO_BATCH_TOKENS",), "", plain),  # times the context, below
    "total-batch-size": Rule(("TRAIN_BATCH_TOKENS",), "", unless_off),
    "embedding-lr": Rule(("BASE_EMBED_LR",)),
    "unembedding-lr": Rule(("BASE_HEAD_LR",)),
    "weight-decay": Rule(("BASE_WD",)),
    "matrix-lr": Rule(("BASE_MATRIX_LR",)),
    "scalar-lr": Rule(why="of per-layer scalars, which are not here; SCALAR_LR is of gains"),
    "adam-beta1": Rule(("BETA1",)),
    "adam-beta2": Rule(("BETA2", "EMBED_BETA2", "SCALAR_BETA2")),
    "warmup-steps": Rule(("LR_WARMUP_STEPS",), "", plain),
    "warmup-ratio": Rule(("LR_WARMUP_RATIO",), "", plain),
    "warmdown-ratio": Rule(("WARMDOWN_FRAC",), "", plain),
    "final-lr-frac": Rule(("FINAL_LR_FRAC",), "", plain),
    "resume-from-step": Rule(why="nanochat's checkpoints cannot be read; RUN_ID and RESUME=auto"),
    "eval-every": Rule(("VAL_LOSS_EVERY",), "", or_off),
    "eval-tokens": Rule(("VAL_TOKENS",), "it limits the final score, too", plain),
    "core-metric-every": Rule(why="lab/core.py scores an artifact or a checkpoint, beside the run"),
    "core-metric-max-per-task": Rule(why="an option of lab/core.py"),
    "sample-every": Rule(why="lab/generate.py --every samples from checkpoints (SAVE_EVERY)"),
    "save-every": Rule(("SAVE_EVERY",), "", or_off),
    "model-tag": Rule(("RUN_ID",)),
}
SWITCHES = ("fp8",)


def flags(words: list[str]) -> dict[str, str]:
    """Read --name value, --name=value and switches. Raises UsageError."""
    found = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--" and not found:
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        if not word.startswith("--") or name not in NANOCHAT:
            advice = closest(name, NANOCHAT)
            raise UsageError(f"{word}: no option of nanochat's base_train{advice}")
        if name not in SWITCHES and not equals:
            if not rest:
                raise UsageError(f"--{name}: expected a value")
            value = rest.pop(0)
        found[name] = value
    return found


def launcher(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take off what starts base_train, such as torchrun; it tells the number of GPUs."""
    ends = [i for i, word in enumerate(words) if re.search(r"base_train(\.py)?$", word)]
    if not ends:
        return words, {}
    start = " ".join(words[: ends[0]])
    count = re.search(r"--nproc[_-]per[_-]node[= ](\d+)", start)
    return words[ends[0] + 1 :], {"GPUS": count[1]} if count else {}


def from_nanochat(words: list[str], dial: Any) -> Translated:
    """Translate a command line of nanochat's scripts/base_train. Raises UsageError."""
    words, gpus = launcher(words)
    given = flags(words)
    result = Translated({**NANOCHAT_ALONE, **gpus}, {}, [])
    for name, (text, why) in NANOCHAT_SETTINGS.items():
        result.values[name] = Value(text, why, "given")
    for name, text in given.items():
        apply(f"--{name}", text, NANOCHAT[name], result, dial, UsageError)
    earlier = "ITERATIONS" in result.values or "TARGET_FLOPS" in result.words
    if earlier and "target-param-data-ratio" not in given:
        del result.words["TARGET_PARAM_DATA_RATIO"]
    if given.get("run", "dummy") != "dummy" and "model-tag" in given:
        result.values["RUN_ID"] = Value(given["run"], "--run", "given")
        result.notes.append(f"--model-tag {given['model-tag']}: RUN_ID is --run already")
    rows = result.values.get("MICRO_BATCH_TOKENS")
    if rows:
        T = result.values.get("TRAIN_SEQ_LEN", Value("2048", ""))
        tokens = text_of(number(rows.text) * number(T.text))
        why = f"--device-batch-size x --max-seq-len = {rows.text} x {T.text}"
        result.values["MICRO_BATCH_TOKENS"] = Value(tokens, why, "given")
    return result


def apply(
    option: str, value: Any, rule: Rule, result: Translated, dial: Any, error: type[PlanError]
) -> None:
    """Put an option's settings into the result, or the reason why there is none."""
    shown = f"{option} {value}".rstrip()
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    if not rule.names:
        what = "no setting" if option in ADAPTED else "no counterpart"
        result.notes.append(f"{shown}: {what}: {rule.why}")
        return
    try:
        text = rule.convert(value)
    except (TypeError, ValueError, OverflowError):
        raise error(f"{shown}: expected a number") from None
    if rule.why:
        result.notes.append(f"{shown}: {rule.why}")
    for name in rule.names:
        if text is None:
            continue
        if name in dial:
            result.words[name] = text
        else:
            result.values[name] = Value(text, shown, "given")


# ===================================== SUROGATE =====================================
ADAPTERS = "weights are trained whole here; there is no LoRA"
CODES = "data/prepare.py makes shards of documents, before training"
CHAT = "data/prepare.py renders conversations into shards, before training"
EXPERTS = "there is no mixture of experts here"
HOST = "all fits on the device: nothing is moved to the host (docs/memory.md)"
ZERO = "optimizer states are divided over ranks always, as at level 1; weights and gradients never"
RUNTIME = "a switch of Surogate's C++ runtime"
VISION = "there are no pictures here"
EXPORT = "the artifact is coded after training: QUANT_BITS_*, QUANT_METHOD"
REPORTS = "lab/watch.py takes the name from RUN_ID"
TIMES = "benchmarks/run.py --breakdown tells it"


def switch(value: Any) -> str:
    """Read a boolean. Raises ValueError."""
    names = {"true": "1", "1": "1", "yes": "1", "on": "1"}
    names |= {"false": "0", "0": "0", "no": "0", "off": "0"}
    try:
        return names[str(value).lower()]
    except KeyError:
        raise ValueError from None


def chosen(**names: str | None) -> Callable[[Any], str | None]:
    """Translate one of some values. What is not among them raises ValueError."""

    def convert(value: Any) -> str | None:
        key = str(value).lower()
        if key not in names:
            raise ValueError
        return names[key]

    return convert


def joined(value: Any) -> str:
    """Write a list as a word."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


NAMED = {  # value by value
    "rope_scaling": {"linear": "linear", "dynamic": "ntk", "ntk": "ntk", "yarn": "yarn"},
    "torch_dtype": {"bfloat16": "bf16", "float32": "fp32"},
    "lr_scheduler_type": {"linear": "linear", "cosine": "cosine", "wsd": "wsd"},
    "optimizer": {"adamw_8bit": "adamw", "normuon": "muon"},
    "recipe": {"bf16": "bf16"},
}
RATES = ("MATRIX_LR", "SCALAR_LR", "TIED_EMBED_LR", "EMBED_LR", "HEAD_LR")
NATIVE = {
    "run_name": Rule(("RUN_ID",)),
    "num_epochs": Rule(("EPOCHS",), "", plain),
    "output_dir": Rule(("OUT_DIR",)),
    "save_steps": Rule(("SAVE_EVERY",), "", plain),
    "save_total_limit": Rule(("SAVE_TOTAL_LIMIT",), "", plain),
    "resume_from_checkpoint": Rule(("RESUME",), "", lambda v: "auto" if switch(v) == "1" else ""),
    "sequence_len": Rule(("TRAIN_SEQ_LEN",), "", plain),
    "max_model_len": Rule(("EVAL_SEQ_LEN",), "the context of validation", plain),
    "rope_scaling": Rule(("ROPE_SCALING",), "", chosen(**NAMED["rope_scaling"])),
    "torch_dtype": Rule(("DTYPE",), "", chosen(**NAMED["torch_dtype"])),
    "recipe": Rule(("DTYPE",), "", chosen(**NAMED["recipe"])),
    "use_cuda_graphs": Rule(("COMPILE",), "torch.compile, without CUDA graphs", switch),
    "optimizer": Rule(("MATRIX_OPTIMIZER",), "", chosen(**NAMED["optimizer"])),
    "learning_rate": Rule(RATES, "", plain),
    "lr_scheduler_type": Rule(("LR_SCHEDULE",), "", chosen(**NAMED["lr_scheduler_type"])),
    "warmup_ratio": Rule(("LR_WARMUP_RATIO",), "", plain),
    "warmup_steps": Rule(("LR_WARMUP_STEPS",), "", plain),
    "cooldown_steps": Rule(("WARMDOWN_ITERS",), "", plain),
    "final_lr_fraction": Rule(("FINAL_LR_FRAC",), "", plain),
    "weight_decay": Rule(("MUON_WD", "EMBED_WD"), "", plain),
    "max_grad_norm": Rule(("GRAD_CLIP_NORM",), "", plain),
    "adamw_beta1": Rule(("BETA1",), "", plain),
    "adamw_beta2": Rule(("BETA2",), "", plain),
    "adamw_epsilon": Rule(("ADAM_EPS",), "", plain),
    "normuon_momentum": Rule(("MUON_MOMENTUM",), "", plain),
    "normuon_beta2": Rule(("NORMUON_BETA2",), "", plain),
    "normuon_cautious_wd": Rule(("CAUTIOUS_WD",), "", switch),
    "per_device_train_batch_size": Rule(("MICRO_BATCH_TOKENS",), "", plain),
    "gradient_accumulation_steps": Rule(("TRAIN_BATCH_TOKENS",), "", plain),
    "max_steps": Rule(("ITERATIONS",), "", unless_off),
    "eval_steps": Rule(("VAL_LOSS_EVERY",), "", plain),
    "train_seed": Rule(
        ("SEED",), "it seeds the weights; the data's order with DATA_SHUFFLE", plain
    ),
    "report_to": Rule(("REPORT_TO",), "", joined),
    "auto_lr_reduction": Rule(("AUTO_LR_REDUCTION",), "", switch),
    "gpus": Rule(("GPUS",), "", plain),
    "distributed.num_nodes": Rule(("GPUS",), "", plain),
    "distributed.gpus_per_node": Rule(("GPUS",), "", plain),
}
ADAPTED = {
    "checkpoint_dir": "checkpoints lie in OUT_DIR/RUN_ID",
    "from_scratch": "training begins from scratch always",
    "epoch_adjustment": "TARGET_PARAM_DATA_RATIO=20 is the same horizon, of nanochat's count",
    "apply_recommended_values": "DEPTH gives such values; Surogate reads the option and drops it",
    "recompute": "activations are kept: MICRO_BATCH_TOKENS sets their memory",
    "master_dtype": "weights that are optimized are fp32 always",
    "gradient_dtype": "gradients add up in fp32; products are in DTYPE",
    "lmhead_chunks": "logits are made in parts always, as many as fit (LOGITS in train_gpt.py)",
    "attn_bwd_chunks": "MICRO_BATCH_TOKENS sets the memory of attention",
    "init_projections_to_zero": "they are zero at first, unless ORTHO_INIT=1",
    "dataloader_num_workers": "one thread loads ahead",
    "sample_packing": "the stream of tokens is packed; TRAIN_DOC_ISOLATED=1 keeps documents apart",
    "padding_free": "there is no padding in the stream of tokens",
    "early_stop": "lab/watch.py ends a run (its guards), with an artifact",
    "debug_time_breakdown": TIMES,
    "debug_memory_breakdown": "lab/plan.py tells the memory by what for",
    "log_file": "the text log is OUT_DIR/RUN_ID.txt",
    "log_gpu_util": "lab/watch.py shows speed, MFU and memory",
    "wandb_project": REPORTS,
    "wandb_name": REPORTS,
    "aim_experiment": REPORTS,
    "aim_repo": REPORTS,
    "aim_name": REPORTS,
    "distributed.worker_output_dir": "DATA_PATH is a folder of each node",
    "validation_split_ratio": "data/prepare.py divides documents, before training",
    "zero_level": ZERO,
    "shard_gradients": ZERO,
    "shard_weights": ZERO,
    "use_fused_rope": "rotary positions are tabled; torch.compile fuses their use",
    **dict.fromkeys(("datasets", "validation_datasets", "path", "type", "subset"), CODES),
    **dict.fromkeys(("split", "samples", "text_field", "max_length"), CODES),
    **dict.fromkeys(("truncation_strategy", "padding_side"), CODES),
    **dict.fromkeys(("instruction_field", "input_field", "output_field"), CHAT),
    **dict.fromkeys(("system_prompt_type", "system_prompt_field", "system_prompt"), CHAT),
    **dict.fromkeys(("prompt_format", "prompt_format_no_input", "messages_field"), CHAT),
    **dict.fromkeys(("system_field", "tools_field", "message_property_mappings"), CHAT),
    **dict.fromkeys(("use_chat_template", "template", "system"), CHAT),
    **dict.fromkeys(("qlora_fp8", "qlora_block_size", "qlora_bnb", "qlora_fp4"), EXPORT),
    **dict.fromkeys(("qlora_bnb_block_size", "qlora_bnb_double_quant"), EXPORT),
    "qlora_four_over_six": EXPORT,
}
ABSENT = {
    "model": "the model is the script's: NUM_LAYERS, MODEL_DIM, or DEPTH",
    "model_type": "the model is the script's",
    "fp8_amax_history": "there is no fp8 here",
    "fp4_backend": "there is no fp4 here",
    "skip_quant_first_layers": "there is no fp8 here; QUANT_BITS_* are of kinds of matrices",
    "skip_quant_last_layers": "there is no fp8 here; QUANT_BITS_* are of kinds of matrices",
    "eval_seed": "validation reads all of its tokens in order",
    "distributed.ray_address": "torchrun starts the ranks",
    "loss_scale": "every token counts alike",
    "sequence_parallel_size": "a sequence fits one device",
    "multimodal_on_the_fly": VISION,
    "max_pixels": VISION,
    "norm_bbox": VISION,
    "agent_template": "there are no agents here",
    "response_prefix": "lab/generate.py takes a prompt",
    **dict.fromkeys(("offload_residual", "offload_master", "offload_quants"), HOST),
    **dict.fromkeys(("offload_optimizer", "offload_grads"), HOST),
    **dict.fromkeys(("persistent_quants", "use_zero_copy", "use_write_combined"), RUNTIME),
    **dict.fromkeys(("use_all_to_all_reduce", "memcpy_all_gather", "memcpy_send_recv"), RUNTIME),
    **dict.fromkeys(("lora", "lora_rank", "lora_alpha", "lora_dropout", "lora_dtype"), ADAPTERS),
    **dict.fromkeys(("lora_target_modules", "adapter_path", "merge_adapter"), ADAPTERS),
    **dict.fromkeys(("router_aux_loss_coef", "router_z_loss_coef", "train_router"), EXPERTS),
    **dict.fromkeys(("qlora_selective_expert_dequant", "qlora_offload_experts"), EXPERTS),
}
SUROGATE = (
    NATIVE
    | {name: Rule(why=why) for name, why in ADAPTED.items()}
    | {name: Rule(why=why) for name, why in ABSENT.items()}
)
SUROGATE_ALONE = {  # its defaults of what shapes training
    "num_epochs": 3,
    "optimizer": "adamw_8bit",
    "learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.1,
    "adamw_beta1": 0.9,
    "adamw_beta2": 0.999,
    "sequence_len": 1024,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "gpus": 1,
    "save_steps": 50,
    "save_total_limit": 5,
    "eval_steps": 100,
    "train_seed": 1234,
}
NORMUON_ALONE = {"normuon_momentum": 0.95, "normuon_beta2": 0.95, "normuon_cautious_wd": True}


def read_yaml(path: str) -> dict[str, Any]:
    """Read a Surogate file, `distributed` flattened. Raises PlanError."""
    try:
        import yaml
    except ImportError:
        raise PlanError("no package PyYAML, which YAML files need: pip install pyyaml") from None
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(text.expandtabs(4))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = "" if line is None else f", line {line + 1}"
        raise PlanError(f"{path}{where}: not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, dict) or not content:
        raise PlanError(f"{path}: expected options, one `name: value` a line")
    flat = {}
    for name, value in content.items():
        if name == "distributed" and isinstance(value, dict):
            flat |= {f"distributed.{key}": inner for key, inner in value.items()}
        else:
            flat[str(name)] = value
    unknown = [name for name in flat if name not in SUROGATE]
    if unknown:
        advice = closest(unknown[0], SUROGATE)
        raise PlanError(f"{path}: {unknown[0]}: no option of Surogate{advice}")
    return {name: value for name, value in flat.items() if value is not None}


def from_surogate(path: str, dial: Any) -> Translated:
    """Translate a Surogate file. Raises PlanError."""
    given = read_yaml(path)
    result = Translated({}, {}, [])
    usual = dict(SUROGATE_ALONE)
    if given.get("optimizer") == "normuon":
        usual |= NORMUON_ALONE
    for name, value in (usual | given).items():
        rule = SUROGATE[name]
        try:
            apply(name, value, rule, result, dial, PlanError)
        except PlanError:
            result.notes.append(unfit(name, value, path))
        if name not in given:
            mark_usual(name, rule, result)
    if "ITERATIONS" in result.values and "num_epochs" not in given:
        del result.words["EPOCHS"]
    result.values["MAX_WALLCLOCK_SECONDS"] = Value("0", "Surogate has no cap on time", "given")
    count = devices(given)
    result.words["GPUS"] = str(count)
    merge_batch(usual | given, count, result)
    merge_schedule(usual | given, given, result)
    merge_decay(usual | given, result)
    return result


def unfit(name: str, value: Any, path: str) -> str:
    """Say why a value has no counterpart. Raises PlanError if it is none of Surogate's either."""
    if name in NAMED:
        why = f"train_gpt.py has {', '.join(NAMED[name].values())}"
        if name in ("recipe", "torch_dtype"):
            why += "; fp8 and fp4 do not pay at these widths, and fp16 needs a scaled loss"
        return f"{name} {value}: no counterpart: {why}"
    raise PlanError(f"{path}: {name}: {value}: expected a number or true or false") from None


def mark_usual(name: str, rule: Rule, result: Translated) -> None:
    """Say of settings that Surogate's default, not its file, gave them."""
    for key in rule.names:
        if key in result.values:
            value = result.values[key]
            result.values[key] = value._replace(why=f"Surogate's default: {value.why}")


def devices(given: dict[str, Any]) -> int:
    """Count the GPUs of all nodes."""
    each = number(given.get("distributed.gpus_per_node") or given.get("gpus", 1))
    return max(1, int(each)) * max(1, int(number(given.get("distributed.num_nodes", 1))))


def merge_batch(options: dict[str, Any], count: int, result: Translated) -> None:
    """Make tokens a step and a forward pass of rows, accumulation and devices."""
    rows = number(options["per_device_train_batch_size"])
    T = number(options["sequence_len"])
    accumulated = number(options["gradient_accumulation_steps"])
    why = f"per_device_train_batch_size x sequence_len = {rows:g} x {T:g}"
    result.values["MICRO_BATCH_TOKENS"] = Value(text_of(rows * T), why, "given")
    why += f", x gradient_accumulation_steps x GPUs = {accumulated:g} x {count}"
    tokens = text_of(rows * T * accumulated * count)
    result.values["TRAIN_BATCH_TOKENS"] = Value(tokens, why, "given")


def merge_schedule(options: dict[str, Any], given: dict[str, Any], result: Translated) -> None:
    """Make the rates' fall of the kind of schedule, warmup and cooldown."""
    values = result.values
    if "LR_WARMUP_STEPS" in values and number(values["LR_WARMUP_STEPS"].text):
        values.pop("LR_WARMUP_RATIO", None)  # steps override the ratio
    else:
        values.pop("LR_WARMUP_STEPS", None)
    kind = options["lr_scheduler_type"]
    cooldown = number(given.get("cooldown_steps", 0))
    if kind == "cosine":
        values.pop("WARMDOWN_ITERS", None)
        if cooldown:
            result.notes.append("cooldown_steps: no counterpart: a cosine falls all the way")
        return
    if cooldown:
        note = "cooldown_steps: the rates stay, then fall linearly; Surogate's fall, leap and fall"
        result.notes.append(note)
        values["LR_SCHEDULE"] = Value("linear", "cooldown_steps", "given")
        return
    values.pop("WARMDOWN_ITERS", None)
    rise = number(options.get("warmup_ratio", 0)) if "LR_WARMUP_RATIO" in values else 0.0
    share = 0.1 if kind == "wsd" else 1.0 - rise
    why = "wsd falls over the last tenth" if kind == "wsd" else "linear falls from the warmup on"
    values["WARMDOWN_FRAC"] = Value(text_of(share), f"Surogate's {why}", "given")


def merge_decay(options: dict[str, Any], result: Translated) -> None:
    """Keep what the optimizer can use."""
    values = result.values
    if options["optimizer"] == "adamw_8bit":
        result.notes.append("optimizer adamw_8bit: its states are fp32 here")
        for name in ("MUON_MOMENTUM", "NORMUON_BETA2", "CAUTIOUS_WD"):
            values.pop(name, None)
    if not number(options["weight_decay"]):
        values.pop("CAUTIOUS_WD", None)
