"""Derive settings of train_gpt.py from nanochat's dial: one depth, and how long to train.

The formulas are those of nanochat's base_train.py of 2026. Each value knows why it is what it is.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import keeper
import train_gpt as core

REFERENCE_DEPTH = 12  # whose batch, rates and decay nanochat has tuned
REFERENCE_BATCH = 2**19
REFERENCE_DIM = 768
TIED_DIM = 512  # of the challenge's baseline, whose TIED_EMBED_LR is kept
CHINCHILLA = 20  # tokens a parameter


class PlanError(Exception):
    """What the user can put right, in words."""


class UsageError(PlanError):
    """The same, in the words of the command line."""


class Value(NamedTuple):
    """A setting as it would be typed, and where it comes from."""

    text: str
    why: str
    source: str = "dial"  # or "given", "config"


Values = dict[str, Value]


def whole(text: str) -> int:
    """Read a whole number of 1 or more. Raises ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def amount(text: str) -> float:
    """Read a positive, finite number. Raises ValueError."""
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def rate(text: str) -> float:
    """Read a finite number that is not negative. Raises ValueError."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise ValueError
    return number


class Option(NamedTuple):
    """A word of the command line that is no setting of train_gpt.py."""

    read: Callable[[str], object]
    expected: str
    about: str
    default: object = None


DIAL = {
    "DEPTH": Option(whole, "a whole number from 1", "layers; all that follows comes from it"),
    "ASPECT_RATIO": Option(amount, "a number over 0", "MODEL_DIM a layer", 64),
    "HEAD_DIM": Option(whole, "a whole number from 1", "channels of a head", 128),
    "BASE_MATRIX_LR": Option(rate, "a number from 0", "Muon's rate at depth 12", 0.02),
    "BASE_EMBED_LR": Option(rate, "a number from 0", "of the token embedding, at depth 12", 0.3),
    "BASE_HEAD_LR": Option(rate, "a number from 0", "of the output head, at depth 12", 0.008),
    "BASE_WD": Option(rate, "a number from 0", "Muon's decay at depth 12", 0.28),
    "TARGET_FLOPS": Option(amount, "a number over 0", "horizon: FLOPs in all"),
    "TARGET_PARAM_DATA_RATIO": Option(
        amount, "a number over 0", "horizon: tokens a parameter of blocks and output head"
    ),
    "EPOCHS": Option(amount, "a number over 0", "horizon: passes over the shards in DATA_PATH"),
    "GPUS": Option(str, "8xH100, H100, 8, cpu", "what trains; not given: what is here"),
    "PEAK": Option(amount, "a number over 0", "peak of one of them in bf16, TFLOP/s"),
    "MFU": Option(amount, "a number over 0", "share of that peak that training reaches"),
    "SPEED": Option(amount, "a number over 0", "tokens/s of all, if it is known"),
    "RUN": Option(str, "a run's folder", "whose measured speed is taken"),
    "PRICE": Option(rate, "a number from 0", "what all of them cost an hour"),
}
SHAPED_BY_DEPTH = ("ASPECT_RATIO", "HEAD_DIM", "BASE_MATRIX_LR", "BASE_EMBED_LR")
SHAPED_BY_DEPTH += ("BASE_HEAD_LR", "BASE_WD")
MUON_ALONE = ("MUON_COEFFICIENTS", "MUON_ROW_NORM", "NORMUON_BETA2", "CAUTIOUS_WD")
RECIPE = {  # what nanochat has no flag for, or one whose default is not ours
    "MLP_MULT": ("4", "nanochat's"),
    "TIE_EMBEDDINGS": ("0", "nanochat's output head is a matrix of its own"),
    "ROPE_BASE": ("100000", "nanochat's"),
    "LOGIT_SOFTCAP": ("15", "nanochat's"),
    "QK_GAIN_INIT": ("1.44", "nanochat scales q and k by 1.2 each; here q alone has a gain"),
    "LR_WARMUP_STEPS": ("40", "nanochat's --warmup-steps"),
    "WARMDOWN_FRAC": ("0.65", "nanochat's --warmdown-ratio"),
    "FINAL_LR_FRAC": ("0.05", "nanochat's --final-lr-frac"),
    "MUON_COEFFICIENTS": ("polar", "nanochat's Muon has Polar Express"),
    "MUON_ROW_NORM": ("1", "nanochat's Muon norms rows (MuonEq-R)"),
    "NORMUON_BETA2": ("0.9", "nanochat's Muon evens neurons out (NorMuon)"),
    "MUON_MOMENTUM": ("0.97", "nanochat's"),
    "MUON_MOMENTUM_WARMUP_START": ("0.85", "nanochat's"),
    "MUON_MOMENTUM_WARMUP_STEPS": ("400", "nanochat's"),
    "CAUTIOUS_WD": ("1", "nanochat's decay is cautious"),
    "WD_SCHEDULE": ("cosine", "nanochat's decay falls to 0"),
    "BETA1": ("0.8", "nanochat's, all Adam groups but one"),
    "BETA2": ("0.96", "nanochat's, output head"),
    "EMBED_BETA2": ("0.995", "nanochat's, token embedding"),
    "SCALAR_BETA2": ("0.95", "nanochat's, scalars"),
    "ADAM_EPS": ("1e-10", "nanochat's"),
    "ADAM_WD": ("0.01", "nanochat's, output head; here, gains and scales have it too"),
    "EMBED_WD": ("0.001", "nanochat's, token embedding"),
}
DIFFERENCES = (
    "value embeddings: nanochat looks up values in every second layer; there are none here",
    "per-layer scalars: nanochat has two a layer; here gains, mixes and skips are per channel",
    "SCALAR_LR: those are other parameters, so it is train_gpt.py's default, scaled by the batch",
    "skips: nanochat subtracts one state at the end; here the first half feeds the second (SKIPS)",
    "window: S attends to WINDOW_TOKENS with the own one; nanochat to one more",
    "momentum: nanochat's falls to .90 in the warmdown; here it stays",
    "first values: nanochat draws its token embedding with deviation .8; here it is 1",
)


def width(depth: int, aspect: float, head_dim: int) -> int:
    """Give the model's width, depth x aspect, rounded up to whole heads."""
    return math.ceil(depth * aspect / head_dim) * head_dim


def short_window(T: int) -> int:
    """Give the window of an S layer: a quarter of the context, rounded up to 128s."""
    return math.ceil(T / 4 / 128) * 128


def auto_batch(params: int, reference: int) -> int:
    """Give tokens a step, a power of two, for a model beside the one of depth 12."""
    return 2 ** round(math.log2(REFERENCE_BATCH * (params / reference) ** 0.383))


def resolve(values: Mapping[str, str]) -> core.Hyperparameters:
    """Resolve settings as train_gpt.py does. DEVICE need not be here. Raises PlanError."""
    here = {name: text for name, text in values.items() if name != "DEVICE"}
    try:
        hp = core.load_settings(here, check_places=False)
        device = core.parse_setting("DEVICE", values.get("DEVICE", "auto"))
    except core.UserError as error:
        raise PlanError(str(error)) from None
    except ValueError as error:
        raise PlanError(f"DEVICE={values['DEVICE']}: {error}") from None
    return replace(hp, device=device)


def shapes_of(hp: core.Hyperparameters) -> dict[str, torch.Tensor]:
    """Give the parameters of a model, without their values, by name."""
    with torch.device("meta"):
        return dict(core.build_model(hp).named_parameters())


def scaling_params(hp: core.Hyperparameters) -> int:
    """Count what nanochat's laws count: the matrices of the blocks, and the output head."""
    shapes = shapes_of(hp)
    matrices = [name for name in shapes if name.startswith("blocks.") and name.endswith(".weight")]
    return sum(shapes[name].numel() for name in matrices) + hp.vocab_size * hp.model_dim


def nanochat_flops(hp: core.Hyperparameters) -> float:
    """Count FLOPs a token as nanochat does: it counts the keys of a window as all attended to."""
    keys = hp.num_layers * hp.train_seq_len
    if techniques := core.frontier(hp):
        windows = [techniques.window_of(hp, i) for i in range(hp.num_layers)]
        keys = sum(min(hp.train_seq_len, w or hp.train_seq_len) for w in windows)
    return 6 * scaling_params(hp) + 12 * hp.model_dim * keys


@dataclass
class Deriver:
    """Hold what was given, and derive the rest: values by the names of settings."""

    dial: dict[str, object]  # options that were given
    given: Values  # settings on the command line
    config: Values  # settings of a CONFIG file
    flops: str = "own"  # whose count TARGET_FLOPS is in, or "nanochat"

    def __post_init__(self) -> None:
        """Begin with what was given."""
        self.values: Values = {**self.config, **self.given}
        self.notes: list[str] = []

    def option(self, name: str) -> object:
        """Give an option of the dial, or its default."""
        return self.dial.get(name, DIAL[name].default)

    def put(self, name: str, text: object, why: str) -> None:
        """Derive a setting, unless the command line has it."""
        if name not in self.given:
            self.values[name] = Value(str(text), why)

    def now(self, **changed: object) -> core.Hyperparameters:
        """Resolve what is known so far."""
        texts = {name: value.text for name, value in self.values.items()}
        return resolve(texts | {name: str(text) for name, text in changed.items()})

    def derive(self) -> Values:
        """Derive everything. Raises PlanError."""
        if "DEPTH" in self.dial:
            self.shape()
            self.scale()
        self.horizon()
        if "DEPTH" in self.dial:
            self.warm_up()
        return self.values

    # ---- the dial

    def shape(self) -> None:
        """Derive the model's shape from its depth."""
        depth = self.option("DEPTH")
        head_dim = self.option("HEAD_DIM")
        aspect = self.option("ASPECT_RATIO")
        dim = width(depth, aspect, head_dim)
        heads = dim // head_dim
        self.put("NUM_LAYERS", depth, "DEPTH")
        why = f"DEPTH x ASPECT_RATIO = {depth} x {aspect:g}, up to a multiple of HEAD_DIM"
        self.put("MODEL_DIM", dim, f"{why}={head_dim}")
        self.put("NUM_HEADS", heads, f"MODEL_DIM / HEAD_DIM = {dim} / {head_dim}")
        self.put("NUM_KV_HEADS", heads, "as many as NUM_HEADS: nanochat's dial has no GQA")
        self.put("TRAIN_SEQ_LEN", 2048, "nanochat's --max-seq-len")
        T = int(self.values["TRAIN_SEQ_LEN"].text)
        self.put("WINDOW_PATTERN", "SSSL", "nanochat's --window-pattern; the last layer is L")
        short = f"a quarter of TRAIN_SEQ_LEN={T}, up to a multiple of 128"
        self.put("WINDOW_TOKENS", short_window(T), short)
        for name, (text, why) in RECIPE.items():
            if not self.is_moot(name):
                self.put(name, text, why)
        self.name_data()

    def is_moot(self, name: str) -> bool:
        """Tell whether what was given leaves no use for a part of nanochat's recipe."""
        told = {key: value.text for key, value in self.values.items()}
        if told.get("MATRIX_OPTIMIZER") == "adamw" and name in MUON_ALONE:
            return True
        if told.get("LR_SCHEDULE") in ("cosine", "constant") and name == "WARMDOWN_FRAC":
            return True
        steps = {"WARMDOWN_FRAC": "WARMDOWN_ITERS", "LR_WARMUP_STEPS": "LR_WARMUP_RATIO"}
        return steps.get(name) in told

    def name_data(self) -> None:
        """Name the data as data/download.py does, where a vocabulary is given and it is not."""
        size = self.values.get("VOCAB_SIZE")
        if size and size.source == "given" and "DATA_PATH" not in self.values:
            root = "./data"
            why = "the published name for VOCAB_SIZE"
            self.put("DATA_PATH", f"{root}/datasets/fineweb10B_sp{size.text}", why)
            if "TOKENIZER_PATH" not in self.values:
                model = f"{root}/tokenizers/fineweb_{size.text}_bpe.model"
                self.put("TOKENIZER_PATH", model, why)

    def reference(self) -> core.Hyperparameters:
        """Resolve the model of depth 12 that everything is scaled from: the same but for size."""
        head_dim = self.option("HEAD_DIM")
        dim = width(REFERENCE_DEPTH, self.option("ASPECT_RATIO"), head_dim)
        heads = dim // head_dim
        T = self.values["TRAIN_SEQ_LEN"].text
        return self.now(
            NUM_LAYERS=REFERENCE_DEPTH,
            MODEL_DIM=dim,
            NUM_HEADS=heads,
            NUM_KV_HEADS=heads,
            TRAIN_BATCH_TOKENS=T,
            MICRO_BATCH_TOKENS=0,
            LOOP_REPEATS=0,
            PARALLEL_LAST_N=0,
            XSA_LAST_N=0,
            CAUTIOUS_WD=0,
            BATCH_SCHEDULE="",
            LR_WARMUP_STEPS=0,
        )

    def scale(self) -> None:
        """Derive batch, rates and decay from the number of parameters."""
        T = self.values["TRAIN_SEQ_LEN"].text
        early = {"CAUTIOUS_WD": 0, "TRAIN_BATCH_TOKENS": T, "MICRO_BATCH_TOKENS": 0}
        hp = self.now(**early, BATCH_SCHEDULE="", LR_WARMUP_STEPS=0)
        N = scaling_params(hp)
        reference = scaling_params(self.reference())
        why = f"2^round(log2(2^19 x (N / N12)^0.383)), N = {N:,}, N12 = {reference:,}"
        self.put("TRAIN_BATCH_TOKENS", auto_batch(N, reference), why)
        B = int(self.values["TRAIN_BATCH_TOKENS"].text)
        batch = math.sqrt(B / REFERENCE_BATCH)
        wide = math.sqrt(REFERENCE_DIM / hp.model_dim)
        steps = f"sqrt({B} / 2^19)"
        untied = (
            {} if hp.tie_embeddings else {"EMBED_LR": "BASE_EMBED_LR", "HEAD_LR": "BASE_HEAD_LR"}
        )
        for setting, option in untied.items():
            base = self.option(option)
            why = (
                f"{option} x {steps} x sqrt(768 / MODEL_DIM) = {base:g} x {batch:.4g} x {wide:.4g}"
            )
            self.put(setting, f"{base * batch * wide:.6g}", why)
        base = self.option("BASE_MATRIX_LR")
        why = f"BASE_MATRIX_LR x {steps} = {base:g} x {batch:.4g}"
        self.put("MATRIX_LR", f"{base * batch:.6g}", why)
        ours = core.FIELDS["SCALAR_LR"].default
        why = f"train_gpt.py's default x {steps} = {ours:g} x {batch:.4g}"
        self.put("SCALAR_LR", f"{ours * batch:.6g}", why)
        if hp.tie_embeddings:
            self.tie(hp, batch, steps)
        base = self.option("BASE_WD")
        decay = base * batch * reference / N
        why = f"BASE_WD x {steps} x N12 / N = {base:g} x {batch:.4g} x {reference:,} / {N:,}"
        self.put("MUON_WD", f"{decay:.6g}", why)
        if not float(self.values["MUON_WD"].text):
            self.put("CAUTIOUS_WD", 0, "there is no MUON_WD")

    def tie(self, hp: core.Hyperparameters, batch: float, steps: str) -> None:
        """Derive the rate of a tied embedding, which nanochat does not have."""
        ours = core.FIELDS["TIED_EMBED_LR"].default
        wide = math.sqrt(TIED_DIM / hp.model_dim)
        why = f"train_gpt.py's default x {steps} x sqrt(512 / MODEL_DIM)"
        self.put("TIED_EMBED_LR", f"{ours * batch * wide:.6g}", why)

    # ---- how long

    def horizon(self) -> None:
        """Derive ITERATIONS from the first horizon that is given, in nanochat's order."""
        rules = {
            "ITERATIONS": None,
            "TARGET_FLOPS": self.for_flops,
            "TARGET_PARAM_DATA_RATIO": self.for_ratio,
            "EPOCHS": self.for_epochs,
        }
        asked = [name for name in rules if name in self.dial or name in self.given]
        if not asked:
            return
        first, *others = asked
        for name in others:
            self.notes.append(f"{name} is not used: {first} comes before it")
        if not rules[first]:
            return
        hp = self.now(LR_WARMUP_STEPS=0)
        batch = keeper.planned_tokens(replace(hp, iterations=1))
        steps, why = rules[first](hp, batch)
        if steps < 1:
            raise PlanError(f"{first}={self.dial[first]:g}: under one step of {batch:.0f} tokens")
        self.put("ITERATIONS", steps, why)

    def warm_up(self) -> None:
        """Let a run that is shorter than nanochat's warmup warm up for a quarter of it."""
        rise = self.values.get("LR_WARMUP_STEPS")
        steps = self.now(LR_WARMUP_STEPS=0).iterations
        if rise and 0 < steps <= int(rise.text):
            self.put(
                "LR_WARMUP_STEPS", steps // 4, f"{rise.text} would be all of ITERATIONS={steps}"
            )

    def for_flops(self, hp: core.Hyperparameters, batch: float) -> tuple[int, str]:
        """Give the steps that take TARGET_FLOPS."""
        target = self.dial["TARGET_FLOPS"]
        count = nanochat_flops(hp) if self.flops == "nanochat" else keeper.flops_per_token(hp)
        whose = "nanochat's " if self.flops == "nanochat" else ""
        why = f"round(TARGET_FLOPS / ({whose}FLOPs a token x tokens a step))"
        why += f" = round({target:g} / ({count:.6g} x {batch:.0f}))"
        return round(target / (count * batch)), why

    def for_ratio(self, hp: core.Hyperparameters, batch: float) -> tuple[int, str]:
        """Give the steps whose tokens are TARGET_PARAM_DATA_RATIO times the parameters."""
        ratio = self.dial["TARGET_PARAM_DATA_RATIO"]
        N = scaling_params(hp)
        why = "int(TARGET_PARAM_DATA_RATIO x N) // tokens a step"
        return int(int(ratio * N) // batch), f"{why} = int({ratio:g} x {N:,}) // {batch:.0f}"

    def for_epochs(self, hp: core.Hyperparameters, batch: float) -> tuple[int, str]:
        """Give the steps that read the training shards so often. Raises PlanError."""
        epochs = self.dial["EPOCHS"]
        tokens = shard_tokens(hp)
        if not tokens:
            raise PlanError(
                f"EPOCHS={epochs:g}: no fineweb_train_*.bin in DATA_PATH={hp.data_path}"
            )
        why = f"EPOCHS x tokens of the shards // tokens a step = {epochs:g} x {tokens:,}"
        return int(epochs * tokens // batch), f"{why} // {batch:.0f}"


def shard_tokens(hp: core.Hyperparameters) -> int:
    """Count the tokens of the training shards; 0 without any. Raises PlanError."""
    try:
        return sum(map(core.shard_size, core.shard_paths(hp, "train")))
    except (core.UserError, OSError) as error:
        raise PlanError(str(error)) from None
