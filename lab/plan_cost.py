"""Count what a run takes: parameters, FLOPs, memory, bytes of the artifact, time and money.

Parameters and FLOPs are train_gpt.py's own. The rest are estimates, and say by what.
"""

import contextlib
import math
import re
import resource
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import metrics
import torch
from gpus import CARDS, Card, kind_of
from plan_dial import PlanError, UsageError, core, keeper, resolve, shapes_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Config = core.Hyperparameters
EMBEDDING = "token embedding"
HEAD = "output head"
ATTENTION = "attention"
MLP = "MLP"
PAIRS = "token pairs"
MIXERS = "mixers of states"
SCALARS = "gains, mixes, skips"
ROLES = (  # the first pattern that fits a name counts
    (r"tok_emb\.weight", EMBEDDING),
    (r"lm_head\.weight", HEAD),
    (r"bigram\.", PAIRS),
    (r"blocks\.\d+\.attn\..*\.weight", ATTENTION),
    (r"blocks\.\d+\..*\.weight", MLP),
    (r"mudd\.", MIXERS),
    (r"", SCALARS),
)


def role_of(name: str) -> str:
    """Name what a parameter is for."""
    return next(role for pattern, role in ROLES if re.match(pattern, name))


def parameters_by_role(shapes: Mapping[str, Tensor]) -> Counter[str]:
    """Count parameters by what they are for."""
    counts: Counter[str] = Counter()
    for name, w in shapes.items():
        counts[role_of(name)] += w.numel()
    return counts


# ===================================== DEVICES =====================================
USUAL_MFU = 0.28
WHY_MFU = (
    "assumed: one H200 reached 0.26 to 0.30 of its peak (docs/speed.md); several were not tried"
)


class Devices(NamedTuple):
    """What trains: so many of a kind, of which peak and memory may be known."""

    count: int
    kind: str  # "cuda" or "cpu"
    name: str  # of the card; empty: unknown
    card: Card | None


def parse_devices(text: str) -> Devices:
    """Read GPUS: 8xH100, H100, 8, cpu, 2xcpu. Raises UsageError."""
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?([A-Za-z][\w -]*)|(\d+)", text.strip(), re.I)
    if not found:
        raise UsageError(f"GPUS={text}: expected a number and a kind, such as 8xH100, H100, 8, cpu")
    number, kind, alone = found.groups()
    count = int(alone or number or 1)
    if not count:
        raise UsageError(f"GPUS={text}: expected 1 or more")
    if kind is None:
        return Devices(count, "cuda", "", None)
    name = kind_of(kind)
    if name == "CPU":
        return Devices(count, "cpu", "cpu", None)
    if name not in CARDS:
        raise UsageError(f"GPUS={text}: no such kind; known are {', '.join(CARDS)}, cpu")
    return Devices(count, "cuda", name, CARDS[name])


def devices_here() -> Devices:
    """Tell what this machine would train on."""
    count = torch.cuda.device_count()
    if not count:
        return Devices(1, "cpu", "cpu", None)
    try:
        return parse_devices(f"{count}x{torch.cuda.get_device_name()}")
    except UsageError:  # a card that is not in the table
        return Devices(count, "cuda", "", None)


# ===================================== SPEED =====================================


class Speed(NamedTuple):
    """How fast training is, in tokens a second of all devices, and how that is known."""

    rate: float  # nan: unknown
    why: str
    settings: dict[str, Any] | None = None  # of the run that it was measured on


def measured_speed(hp: Config, folder: str, devices: Devices) -> Speed:
    """Take the speed of a run, scaled by the FLOPs of a token. Raises PlanError."""
    try:
        history = metrics.load_history(metrics.find_run(folder))
    except metrics.MetricsError as error:
        raise PlanError(f"RUN={error}") from None
    rate = steady_rate(history)
    if not rate > 0:
        raise PlanError(f"RUN={folder}: no two train events with a speed; let it run longer")
    models = history.of("model")
    flops = metrics.number(models[-1], "flops_per_token") if models else math.nan
    if math.isnan(flops):
        flops = keeper.flops_per_token(settings_of(history, folder))
    ranks = re.search(r"world_size:(\d+)", history.versions)
    world = int(ranks[1]) if ranks else 1
    ratio = flops / keeper.flops_per_token(hp)
    why = f"{rate:,.0f} tokens/s in {folder}"
    if abs(ratio - 1) > 1e-6:
        why += f" x {ratio:.4g}, its FLOPs a token over this one's"
    if world != devices.count:
        why += f" x {devices.count} / {world} devices"
    return Speed(rate * ratio * devices.count / world, why)


def settings_of(history: metrics.History, folder: str) -> Config:
    """Resolve the settings of a run that does not say its FLOPs. Raises PlanError."""
    kept = {name.upper(): str(value) for name, value in history.settings.items()}
    kept = {name: text for name, text in kept.items() if name in core.FIELDS and name != "CONFIG"}
    try:
        return resolve(kept)
    except PlanError as error:
        raise PlanError(f"RUN={folder}: its settings are not this script's: {error}") from None


def steady_rate(history: metrics.History) -> float:
    """Give tokens a second between the tenth logged step, or the first, and the last; or nan.

    The first steps are slower, and `tokens_per_second` is the mean since step 0.
    """
    marks = []
    for event in history.of("train"):
        seconds = metrics.number(event, "train_time_ms") / 1e3
        tokens = metrics.number(event, "tokens_per_second") * seconds
        if math.isfinite(tokens):
            marks.append((seconds, tokens))
    if len(marks) < 2:
        return math.nan
    first = marks[min(9, len(marks) - 2)]
    last = marks[-1]
    return (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else math.nan


def estimated_speed(hp: Config, devices: Devices, peak: float | None, mfu: float | None) -> Speed:
    """Estimate the speed from the devices' peak, and the share of it that training reaches."""
    if peak is None and devices.card:
        peak = devices.card.peak
    if peak is None:
        text = "unknown: give SPEED, tokens/s, or RUN, the folder of a run; or PEAK and MFU"
        return Speed(math.nan, text)
    flops = keeper.flops_per_token(hp)
    share = USUAL_MFU if mfu is None else mfu
    why = f"{devices.count} x {peak / 1e12:g} TFLOP/s x MFU {share:g} / {flops:.4g} FLOPs a token"
    why += f"\nMFU {share:g} is " + (WHY_MFU if mfu is None else "given")
    return Speed(devices.count * peak * share / flops, why)


# ===================================== MEMORY =====================================


class Meter(TorchDispatchMode):
    """Add up the bytes of the tensors that are alive, and their most, of those made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = 0
        self.most = 0

    def see(self, x: Tensor) -> None:
        """Count the storage of a tensor, until it is gone."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        """Take a storage off."""
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation, and look at what it gives."""
        out = func(*args, **(kwargs or {}))
        pytree.tree_map_only(Tensor, self.see, out)
        return out


@contextlib.contextmanager
def logits_like(kind: str) -> Iterator[None]:
    """Let tensors that are on no device make as many logits at once as those of a kind."""
    usual = core.LOGITS["cpu"]
    core.LOGITS["cpu"] = core.LOGITS[kind]
    try:
        yield
    finally:
        core.LOGITS["cpu"] = usual


def activations(hp: Config, kind: str, dtype: torch.dtype, rows: int) -> tuple[int, int]:
    """Run a micro-batch without memory: bytes alive after the forward pass, and at most.

    Attention is that over whole rows; documents, and targets beyond the next token, are left out.
    """
    T = hp.train_seq_len
    with FakeTensorMode(), logits_like(kind):
        model = core.build_model(hp, dtype)
        for p in model.parameters():
            p.data = p.data.to(dtype)
        tokens = torch.zeros(rows, T, dtype=torch.int64)
        with Meter() as meter:
            loss = model(tokens, tokens).sum()
            held = meter.now
            loss.backward()
        return held, meter.most


# What malloc and oneDNN hold beside the tensors: fitted to four runs on a CPU, within 4% of each.
CPU_SHARE = 0.75
CPU_CODE = 45 * 2**20


@dataclass
class Memory:
    """Bytes that one device needs, by what for."""

    weights: int  # fp32, the gradients, and the model's copy
    state: int  # of the optimizers and the average, the own share
    micro: int  # gradients of a micro-batch
    update: int  # what Muon makes in an update, the own share
    batches: int  # loaded ahead
    activations: int
    process: int = 0  # on a CPU: Python, PyTorch, and what kernels and malloc hold

    @property
    def total(self) -> int:
        """Give the most that is alive at once."""
        passing = max(self.activations + self.micro, self.update)
        return self.weights + self.state + self.batches + passing + self.process


def rows_of(hp: Config, kind: str, world: int) -> int:
    """Count the sequences in a forward pass of a rank, as train_gpt.py's batches have them."""
    tokens = hp.micro_batch_tokens or core.FORWARD_TOKENS[kind]
    most = math.ceil(hp.train_batch_tokens // hp.train_seq_len / world)
    count = math.ceil(most / max(1, tokens // hp.train_seq_len))
    return math.ceil(most / count)


def memory(hp: Config, devices: Devices) -> Memory:
    """Estimate the memory of one device: see docs/memory.md."""
    kind = devices.kind
    on_cpu = kind == "cpu"
    dtype = torch.float32
    if hp.dtype != "fp32" and (not on_cpu or core.choose_dtype(hp, "cpu") == torch.bfloat16):
        dtype = torch.bfloat16
    cast = dtype == torch.bfloat16
    shapes = shapes_of(hp)
    P = sum(w.numel() for w in shapes.values())
    muon = [w.numel() for name, w in shapes.items() if core.row_of(name, hp).optimizer == "muon"]
    M = sum(muon)
    world = devices.count
    kept = 4 * M + 8 * (P - M)
    kept += 4 * P * bool(hp.ema_decay) + 8 * P * bool(hp.ema_nesterov)
    process = process_bytes() if on_cpu else 0
    held, most = activations(hp, kind, dtype, rows_of(hp, kind, world))
    if on_cpu:  # eager: what backward makes on its way counts; compiled, it is mostly fused away
        held = most - 2 * P * cast
        process += CPU_CODE + int(CPU_SHARE * most)
    ahead = (core.LOADED + 1) * 16 * hp.train_batch_tokens
    return Memory(
        weights=(8 + 2 * cast) * P,
        state=kept // world,
        micro=(2 if on_cpu else 4) * P * cast,
        update=14 * M // world,
        batches=ahead // world,
        activations=held,
        process=process,
    )


def process_bytes() -> int:
    """Measure what Python and PyTorch take before there is a model: this process is like that.

    Linux lets a program inherit the most that its parent ever took, so that is no measure of it.
    """
    with contextlib.suppress(OSError, ValueError):
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ===================================== ARTIFACT =====================================
WHOLE = 2**25  # parameters of a model that is made and coded as a whole: 1 to 5 s
SAMPLED = 2**21  # of a larger one, weights that are coded for each kind of matrix
BITS_AT_ONE_STEP = 2.05  # of a Gaussian weight whose step is its deviation


class Artifact(NamedTuple):
    """Bytes of the submission, by what for, and what is to be said of them."""

    parts: Counter[str]
    code: int
    cap: int
    note: str

    @property
    def total(self) -> int:
        """Give all bytes that count."""
        return self.code + sum(self.parts.values())


def first_values(name: str, w: Tensor, hp: Config) -> Tensor:
    """Draw rows of a matrix as keeper.py's forecast has them: as initialized, or Gaussian for 0."""
    x = torch.empty(max(1, SAMPLED // w.size(1)), w.size(1))
    start = core.row_of(name, hp).start
    if callable(start):
        start(x)
    elif start is None and role_of(name) not in (EMBEDDING, PAIRS):
        nn.init.kaiming_uniform_(x, a=math.sqrt(5))
    else:
        nn.init.normal_(x)
    return x


def level_bytes(names: list[str], shapes: Mapping[str, Tensor], hp: Config) -> float:
    """Estimate the bytes of matrices of one kind and shape, from one of them."""
    name = names[0]
    w = shapes[name]
    x = first_values(name, w, hp)
    arrays = core.quantize(x.numpy(), core.bits_of(name, w, hp), hp)
    coded = len(core.compress([arrays], hp)) * w.numel() / x.numel()
    return len(names) * coded


def float_bytes(name: str, w: Tensor, hp: Config) -> int:
    """Count the bytes of a parameter that are not coded as levels, before zstd."""
    arrays = [(kind, shape) for kind, shape in core.layout(name, w, hp) if "i" not in kind]
    return sum(int(kind[-1]) * math.prod(shape) for kind, shape in arrays)


class Listener:
    """What keeper.py's forecast needs of a run: it keeps the event."""

    def __init__(self, hp: Config) -> None:
        self.hp = hp
        self.fields: dict[str, int] = {}

    def log(self, line: str, event: str = "", **fields: int) -> None:
        """Keep the fields of an event."""
        self.fields = fields


def forecast(hp: Config) -> int:
    """Give the bytes that train_gpt.py forecasts for an artifact: its initial weights, coded."""
    listener = Listener(replace(hp, tokenizer_path=__file__))  # only its digest is in there
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(hp.seed)
        keeper.forecast(dict(core.build_model(hp).named_parameters()), listener)
    return listener.fields["artifact_bytes"]


def artifact(hp: Config) -> Artifact:
    """Estimate the bytes of code and artifact."""
    shapes = shapes_of(hp)
    kinds: dict[tuple[str, torch.Size], list[str]] = {}
    for name, w in shapes.items():
        if core.bits_of(name, w, hp):
            kinds.setdefault((core.row_of(name, hp).pattern, w.shape), []).append(name)
    code = core.code_bytes(hp)
    cap = hp.artifact_max_bytes
    parts: Counter[str] = Counter()
    for name, w in shapes.items():
        parts[role_of(name)] += float_bytes(name, w, hp)
    if hp.quant_method == "gptq" or hp.fit_budget != "none":
        coded = [name for names in kinds.values() for name in names]
        bits, note = planned_bits(hp, cap - code - parts.total(), coded, shapes)
        for name in coded:
            parts[role_of(name)] += int(bits[name] * shapes[name].numel() / 8)
        return Artifact(parts, code, cap, note)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for names in kinds.values():
            parts[role_of(names[0])] += int(level_bytes(names, shapes, hp))
    note = "a sample of the initial weights, coded"
    if sum(w.numel() for w in shapes.values()) <= WHOLE:
        whole = forecast(hp)
        share = whole / parts.total()
        parts = Counter({role: int(size * share) for role, size in parts.items()})
        parts[SCALARS] += whole - parts.total()
        note = "train_gpt.py's own forecast: the initial weights, coded"
    return Artifact(parts, code, cap, note)


def planned_bits(
    hp: Config, room: int, names: list[str], shapes: Mapping[str, Tensor]
) -> tuple[dict[str, float], str]:
    """Give the bits of a weight in each matrix, that a budget leaves or a step asks for."""
    if hp.fit_budget == "none":
        bits = max(BITS_AT_ONE_STEP - math.log2(hp.quant_step), 0.3)
        return dict.fromkeys(names, bits), f"QUANT_STEP={hp.quant_step:g}: {bits:.2f} bits a weight"
    most = dict.fromkeys(names, 14.0)
    if hp.fit_budget == "sigma":  # levels end at 2 deviations or more
        levels = {name: 2 ** (core.bits_of(name, shapes[name], hp) - 1) - 1 for name in names}
        most = {name: BITS_AT_ONE_STEP + math.log2(top / 2) for name, top in levels.items()}
    weights = sum(shapes[name].numel() for name in names) or 1
    asked = 8 * (room - 0.0005 * hp.artifact_max_bytes) / weights
    mean = sum(most[name] * shapes[name].numel() for name in names) / weights
    fewer = max(mean - asked, 0.0)
    bits = {name: max(most[name] - fewer, 0.0) for name in names}
    note = f"FIT_BUDGET={hp.fit_budget} fills the cap: {asked:.2f} bits a weight"
    if mean < asked:
        note = f"FIT_BUDGET={hp.fit_budget}: even {mean:.1f} bits a weight do not fill the cap"
    elif asked < 1:
        note += "; that leaves little of it"
    return bits, note
