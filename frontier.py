"""Add to train_gpt.py what the records of the challenge add to its baseline, by settings.

train_gpt.py holds the baseline and all that runs it. Here are, as subclasses of its classes and
under the same names, the techniques beyond it: of the model (windows, gates, loops, connections),
of the targets, of the optimizers, of the schedules, and of the data's order. Each is off by
default. train_gpt.py imports this file for their settings alone; its bytes count as code then.

Shapes: B batch, T time, S last positions of T, D model dim, H heads, K kv heads, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

import train_gpt as core
from train_gpt import Cuts, Documents, Hyperparameters, Matrix, Row, parameter, tail

# ===================================== MODEL =====================================


def frequencies(hp: Hyperparameters, length: int) -> Tensor:
    """Give the rotary frequencies, double (r/2), where contexts are `length` long.

    If that is s times as long as in training, linear divides them by s, ntk takes the base
    base·s^(r/(r-2)), and yarn divides the slow ones (arXiv 2309.00071).
    """
    r = hp.rope_dims or hp.model_dim // hp.num_heads
    s = max(1.0, length / hp.train_seq_len)
    if hp.rope_scaling == "ntk":
        hp = replace(hp, rope_base=hp.rope_base * s ** (r / (r - 2)))
    f = core.frequencies(hp, length)
    if hp.rope_scaling == "linear":
        f /= s
    elif hp.rope_scaling == "yarn":
        part = torch.arange(r // 2).double() / (r // 2)
        f /= 1 + (s - 1) * ((part - 0.25) / 0.75).clamp(0, 1)
    return f


def window_of(hp: Hyperparameters, layer: int) -> int:
    """Give the tokens that a layer attends to at most; 0: all of them."""
    pattern = hp.window_pattern or "L"
    is_short = pattern[layer % len(pattern)] == "S" and layer < hp.num_layers - 1
    return hp.window_tokens if is_short else 0


def attend_masked(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attend from q (B, H, S, Dh) to the `window` last of T positions, through a mask: like q."""
    S = q.size(2)
    T = k.size(2)
    mask = q.new_ones(S, T, dtype=torch.bool).tril(T - S)
    mask = mask.triu(T - S - window + 1)
    gqa = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, documents: Cuts = None, window: int = 0
) -> Tensor:
    """Attend like `core.attend`, but to the own position and the window - 1 before it."""
    T = k.size(2)
    longest = documents.longest if documents else T
    if not 0 < window < longest:
        return core.attend(q, k, v, documents)
    packs = q.is_cuda and q.dtype == torch.bfloat16
    if documents is None and packs and q.size(2) == T:  # the kernels for pieces need no mask
        offsets = torch.arange(0, len(q) * T + 1, T, dtype=torch.int32, device=q.device)
        documents = Documents(offsets, T)
    if documents is None:
        return attend_masked(q, k, v, window)
    offsets = documents.offsets
    qkv = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    if packs:
        limits = (offsets, offsets, longest, longest)
        y = varlen_attn(*qkv, *limits, window_size=(window - 1, 0), **core.VARLEN)
    else:
        y = window_by_piece(qkv, offsets, window)
    return y.unflatten(0, (-1, T)).transpose(1, 2)


def window_by_piece(qkv: list[Tensor], offsets: Tensor, window: int) -> Tensor:
    """Attend within pieces of N tokens, from q (N, H, Dh) to k and v: like q.

    Pieces are padded to few lengths: oneDNN keeps compiled code for each of them.
    """
    sizes = offsets.diff().tolist()
    pieces = zip(*(x.split(sizes) for x in qkv), strict=True)
    found = []
    for size, piece in zip(sizes, pieces, strict=True):
        room = (0, 0, 0, -size % 64)
        heads = [x.transpose(0, 1)[None] for x in piece]
        padded = [F.pad(x, room) for x in heads]
        y = attend_masked(*padded, window)[0]
        y = y.narrow(1, 0, size)
        found.append(y.transpose(0, 1))
    return torch.cat(found)


def exclude_own(y: Tensor, v: Tensor) -> Tensor:
    """Take from y (B, H, T, Dh) its part along the own v: y - (y·v)v/|v|² (arXiv 2603.09078)."""
    own = F.normalize(v, dim=-1)
    own = own.unsqueeze(2)
    grouped = y.unflatten(1, (v.size(1), -1))
    along = (grouped * own).sum(-1, keepdim=True)
    return (grouped - along * own).flatten(1, 2)


class Attention(core.Attention):
    """Attention with a window, without each token's own value, and with gates of its heads.

    A head's gate is σ(w·x) of the first channels of the input x (2505.06708, modded-nanogpt).
    """

    def __init__(self, hp: Hyperparameters, layer: int) -> None:
        super().__init__(hp, layer)
        self.window = window_of(hp, layer)
        self.exclusive = layer >= hp.num_layers - hp.xsa_last_n
        self.gate = Matrix(hp.sparse_attn_gate, hp.num_heads) if hp.sparse_attn_gate else None

    def heads(self, x: Tensor, rotary: Tensor, last: int, documents: Cuts) -> Tensor:
        """Give the output of each head at the last S positions of x (B, T, D): (B, H, S, Dh)."""
        q, k, v = self.project(x, rotary)
        y = attend_window(tail(q, last, dim=2), k, v, documents, self.window)
        if self.exclusive:
            y = exclude_own(y, tail(v, last, dim=2))
        if self.gate is not None:
            read = tail(x, last, dim=1)
            sums = self.gate(read[..., : self.gate.in_features])
            y = y * torch.sigmoid(sums).mT.unsqueeze(-1)
        return y


def leaky_relu2(x: Tensor, slope: float) -> Tensor:
    """Give leaky_relu(x)²."""
    return F.leaky_relu(x, slope).square()


class Block(core.Block):
    """A block whose activation, scale, gains, mix and order are settings."""

    Attention = Attention

    def __init__(self, hp: Hyperparameters, layer: int) -> None:
        super().__init__(hp, layer)
        self.parallel = layer >= hp.num_layers - hp.parallel_last_n
        if hp.ln_scale:
            self.scale = (layer + 1) ** -0.5
        if hp.mlp_act == "leaky_relu2" and hp.mlp_leaky_slope:
            self.activate = partial(leaky_relu2, slope=hp.mlp_leaky_slope)
        if not hp.resid_mix:
            self.resid_mix = None
        if not hp.channel_gains:
            self.attn_scale = None
            self.mlp_scale = None


class BigramHash(nn.Module):
    """A vector for each pair of tokens: row (36313·t_i XOR 27191·t_{i-1}) mod (N - 1) of N."""

    def __init__(self, hp: Hyperparameters) -> None:
        super().__init__()
        self.table = core.Table(hp.bigram_buckets, hp.bigram_dim)
        self.expand = Matrix(hp.bigram_dim, hp.model_dim)
        self.bigram_scale = parameter()

    def forward(self, inputs: Tensor, starts: Tensor) -> Tensor:
        """Map tokens int64 (B, T) and `starts` bool (B, T) to vectors (B, T, D)."""
        last = self.table.num_embeddings - 1  # for `starts`, where there is no token before
        pairs = 36313 * inputs ^ 27191 * inputs.roll(1, 1)
        rows = torch.where(starts, last, pairs % last)
        return self.bigram_scale * self.expand(self.table(rows))


SMEARED = 12  # channels that the second smear gate reads


def smear_by_token(x: Tensor, smear: Tensor, inside: Tensor) -> Tensor:
    """Add to x (B, T, D) λ·σ(w·x[:12]) times the one before; smear is w and λ, (13)."""
    sums = x[..., :SMEARED] @ smear[:-1, None]
    gate = smear[-1] * torch.sigmoid(sums)
    return x + gate * inside * x.roll(1, 1)


class Mixer(nn.Module):
    """Add earlier states h to the stream x, by weights of each token: x + 0.1·Σ_j w_j(x)·h_j.

    w = W2·gelu(W1·x) + b is 0 at first (MUDD, arXiv 2502.12170).
    """

    def __init__(self, dim: int, states: int) -> None:
        super().__init__()
        self.fc = Matrix(dim, 64)
        self.proj = Matrix(64, states)
        self.bias = parameter(states)

    def forward(self, x: Tensor, states: list[Tensor]) -> Tensor:
        """Map x (B, T, D), and states like it, to x."""
        hidden = F.gelu(self.fc(x))
        w = self.proj(hidden) + self.bias.to(x.dtype)
        parts = w.split(1, -1)
        for part, state in zip(parts, states, strict=True):
            x = torch.addcmul(x, part, state, value=0.1)
        return x


def visit_orders(hp: Hyperparameters) -> list[list[int]]:
    """List the blocks in the order of their visits: without those that come again, and with."""
    once = [*range(hp.num_layers)]
    end = hp.loop_last + 1
    again = once[hp.loop_first : end] * hp.loop_repeats
    return [once, once[:end] + again + once[end:]]


class GPT(core.GPT):
    """The model with other inputs, another order of its blocks, and other ways around them."""

    Block = Block

    def build(self, hp: Hyperparameters) -> None:
        """Make the parameters of what lies around the blocks."""
        dim = hp.model_dim
        self.orders = visit_orders(hp)
        self.visits = self.orders[1]
        self.smear = None
        if hp.smear_gate:
            self.smear = parameter(dim if hp.smear_gate == 1 else SMEARED + 1)
        self.smears_tokens = hp.smear_gate == 2
        self.bigram = BigramHash(hp) if hp.bigram_buckets else None
        count = len(self.visits)
        weighs = hp.skips in ("unet", "gated")
        self.skip_weights = parameter(count // 2, dim) if weighs else None
        self.skip_gates = parameter(count // 2, dim) if hp.skips == "gated" else None
        mixed = range(2, count, 2) if hp.skips == "mudd" else []
        self.mudd = nn.ModuleDict({str(i): Mixer(dim, i) for i in mixed})

    def starts(self, inputs: Tensor, documents: Cuts) -> Tensor:
        """Find where nothing comes before a token: at BOS, first in a row or piece. Bool (B, T)."""
        starts = (inputs == self.bos).index_fill(1, inputs.new_zeros(1), True)
        if documents is None:
            return starts
        marks = F.pad(starts.flatten(), (0, 1))
        marks = marks.index_fill(0, documents.offsets.long(), True)
        return marks[:-1].view_as(starts)

    def embed(self, inputs: Tensor, documents: Cuts = None) -> Tensor:
        """Map tokens int64 (B, T) to the first residual stream (B, T, D)."""
        if self.bigram is None and self.smear is None:
            return super().embed(inputs, documents)
        x = self.tok_emb(inputs)
        starts = self.starts(inputs, documents)
        if self.bigram is not None:
            x = x + self.bigram(inputs, starts)
        x = x.to(self.dtype)
        if self.smear is None:
            return core.rms_norm(x)
        inside = ~starts[..., None]  # nothing of a document reaches the next one
        smear = self.smear.to(x.dtype)
        if self.smears_tokens:
            return core.rms_norm(smear_by_token(x, smear, inside))
        x = core.rms_norm(x)
        return x + torch.sigmoid(smear) * inside * (x.roll(1, 1) - x)

    def skip(self, x: Tensor, states: list[Tensor], half: int) -> Tensor:
        """Bring earlier states to x, both (B, T, D).

        A gated skip is g·x + (1 - g)·w·state, with g = σ of a parameter for each channel.
        """
        i = len(states) - 1  # visits so far
        if str(i) in self.mudd:
            return self.mudd[str(i)](x, states[:i])
        if self.skip_weights is None or not half <= i < 2 * half:
            return x
        if self.skip_gates is None:
            return super().skip(x, states, half)
        weight = self.skip_weights[i - half].to(x.dtype)
        gate = torch.sigmoid(self.skip_gates[i - half])
        return torch.lerp(weight * states[2 * half - i], x, gate.to(x.dtype))


def parameter_table(hp: Hyperparameters) -> list[Row]:
    """Describe the parameters of a GPT: the first row that fits a name counts."""
    rows = [adapted(row, hp) for row in core.parameter_table(hp)]
    known = {row.pattern: row for row in rows}
    scalar = known["skip_weights"]._replace(start=0.0)
    mixer = scalar._replace(lr=hp.scalar_lr / 4, bits=hp.quant_bits_attn)
    matrix = known["blocks.*.fc.weight"]._replace(bits=hp.quant_bits_bigram, start=None)
    table = known["tok_emb.weight"]._replace(bits=hp.quant_bits_bigram, start=0.0)
    added = {
        "smear": scalar,
        "skip_gates": scalar,
        "mudd.*.fc.weight": mixer._replace(start=None),
        "mudd.*.proj.weight": mixer,
        "mudd.*": mixer._replace(bits=0),
        "blocks.*.attn.gate.weight": scalar,
    }
    if hp.bigram_buckets:
        added["bigram.table.weight"] = table
        added["bigram.expand.weight"] = matrix
        added["bigram.bigram_scale"] = scalar._replace(start=0.05)
    return [row._replace(pattern=name) for name, row in added.items()] + rows


def adapted(row: Row, hp: Hyperparameters) -> Row:
    """Change a row of the baseline's table as the settings say."""
    if row.pattern == "tok_emb.weight":
        return row._replace(beta2=hp.embed_beta2 or hp.beta2)
    if row.pattern == "lm_head.weight":
        return row
    if row.optimizer == "adam":
        return row._replace(beta2=hp.scalar_beta2 or hp.beta2)
    row = row._replace(beta2=hp.normuon_beta2)
    if hp.matrix_optimizer == "adamw":
        row = row._replace(optimizer="adam", beta2=hp.beta2)
    if hp.ortho_init:
        gain = (2 * hp.num_layers) ** -0.5 if row.pattern.endswith("proj.weight") else 1.0
        row = row._replace(start=partial(nn.init.orthogonal_, gain=gain))
    return row


# ===================================== OPTIMIZERS =====================================
POLAR_EXPRESS = [  # arXiv 2505.16932; further iterations take the last ones
    (8.1565545, -22.4832929, 15.8787699),
    (4.0429299, -2.8089175, 0.5000178),
    (3.8916678, -2.7724842, 0.5060648),
    (3.2857537, -2.3681295, 0.4644902),
    (2.3465413, -1.7098278, 0.4232355),
]


def newton_schulz(hp: Hyperparameters) -> list[core.Round]:
    """List the coefficients of all iterations."""
    if hp.muon_coefficients == "quintic":
        return core.newton_schulz(hp)
    further = hp.muon_backend_steps - len(POLAR_EXPRESS)
    rounds = POLAR_EXPRESS + POLAR_EXPRESS[-1:] * max(0, further)
    return rounds[: hp.muon_backend_steps]


class Muon(core.Muon):
    """Muon whose updates may be evened out by neuron, and whose decay may be cautious."""

    def apply(self, group: core.Group, x: Tensor, rate: float, bad: Tensor) -> None:
        """Let the weights of a group decay, and move them by -rate·x, (N, rows, cols)."""
        if group["betas"][1]:
            x = self.even_out(group, x, bad)
        decay = group["weight_decay"]
        if not (decay and self.settings["cautious"]):
            super().apply(group, x, rate, bad)
            return
        for p, step in zip(group["params"], x, strict=True):  # arXiv 2510.12402
            shrinks = (step * p > 0) & ~bad
            p.mul_(1 - group["lr"] * decay * shrinks)
            p.sub_(step, alpha=rate)

    def even_out(self, group: core.Group, x: Tensor, bad: Tensor) -> Tensor:
        """Divide x, (N, rows, cols), by the root mean square that its neurons have had.

        v ← β·v + (1 - β)·mean(x²) over the shorter side, where lengths differ: those along the
        longer side are one, after Newton-Schulz. Norms of x stay (NorMuon, arXiv 2510.05491).
        """
        dim = -1 if x.size(-2) >= x.size(-1) else -2
        fresh = x.square().mean(dim, keepdim=True)
        weight = (1 - group["betas"][1]) * ~bad
        moments = []
        for p, moment in zip(group["params"], fresh, strict=True):
            state = self.state[p]
            if "second_moment" not in state:
                state["second_moment"] = torch.zeros_like(moment)
            moments.append(state["second_moment"].lerp_(moment, weight))
        root = torch.stack(moments).sqrt()
        even = x / root.clamp(min=1e-10)
        before = x.norm(dim=(-2, -1), keepdim=True)
        after = even.norm(dim=(-2, -1), keepdim=True)
        return even * (before / after.clamp(min=1e-20))


class Lookahead(torch.optim.Optimizer):
    """Look ahead along the mean of past steps, after other optimizers (arXiv 2605.25395).

    x_{t+1} = A(x_t + β·d_t), where A is their step, and d ← 0.99·d + 0.01·(x_{t+1} - x_t).
    """

    def __init__(self, params: list[Tensor], beta: float) -> None:
        group = {
            "params": params,
            "lr": beta,
            "base_lr": beta,
            "weight_decay": 0.0,
            "base_decay": 0.0,
        }
        super().__init__([group], {})
        self.found_inf = params[0].new_zeros(())
        for p in params:
            self.state[p] = {"origin": p.clone(), "direction": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move the weights from where they are now, x_{t+1}, to x_{t+1} + β·d_{t+1}."""
        (group,) = self.param_groups
        params = group["params"]
        good = (self.found_inf == 0).float()
        origins = [self.state[p]["origin"] for p in params]
        means = [self.state[p]["direction"] for p in params]
        moves = torch._foreach_sub(params, origins)
        torch._foreach_mul_(moves, good)
        torch._foreach_add_(origins, moves)
        torch._foreach_mul_(means, 1 - 0.01 * good)
        torch._foreach_add_(means, moves, alpha=0.01)
        ahead = torch._foreach_mul(means, good * group["lr"])
        torch._foreach_add_(params, ahead)


class RateGuard:
    """Halve all rates where the loss or the gradient leaps, on the device (Surogate's LossGuard).

    A loss leaps that is over mean + 3σ and over mean + 0.5 of the last HISTORY ones; a gradient
    norm, that is over 10 times their mean. What leaps is not remembered.
    """

    HISTORY = 100
    LEAST = 50  # steps before the first halving
    PAUSE = 50  # steps after one, without another
    MOST = 5  # halvings

    def __init__(self, device: torch.device) -> None:
        self.state = torch.zeros(2 * self.HISTORY + 5, device=device)  # all that a resume needs
        self.past = self.state[:-5].view(2, self.HISTORY)  # losses and norms, the last one first
        self.count, self.pause, self.halvings, self.at, self.kind = self.state[-5:].unbind()
        self.told = 0

    def leaps(self, now: Tensor) -> Tensor:
        """Tell whether the loss, and whether the norm, leaps: bool (2,), of fp32 (2,)."""
        known = torch.arange(self.HISTORY, device=now.device) < self.count
        size = self.count.clamp(min=1)
        mean = (self.past * known).sum(1) / size
        away = (self.past - mean[:, None]) * known
        deviation = (away.square().sum(1) / size).sqrt()
        usual = (3 * deviation[0]).clamp(min=0.5)
        limits = torch.stack((mean[0] + usual, 10 * mean[1]))
        return (now > limits) & (self.count >= self.LEAST)

    def scale(self, loss: Tensor, square: Tensor, step: int, bad: Tensor) -> Tensor:
        """Take in a step's loss and squared norm; the scale of the rates from it on, fp32 ()."""
        now = torch.stack((loss, square.sqrt()))
        leaps = self.leaps(now)
        good = ~bad
        leapt = leaps.any() & good
        halves = leapt & (self.pause == 0) & (self.halvings < self.MOST)
        self.halvings += halves
        self.at.masked_fill_(halves, step)
        self.kind.copy_(torch.where(halves, leaps[1], self.kind))
        self.pause -= good.float()
        self.pause.clamp_(min=0)
        self.pause.masked_fill_(halves, self.PAUSE)
        kept = good & ~leapt
        newer = torch.cat((now[:, None], self.past[:, :-1]), dim=1)
        self.past.copy_(torch.where(kept, newer, self.past))
        self.count += kept
        self.count.clamp_(max=self.HISTORY)
        return 0.5**self.halvings

    def tell(self, run: core.Run) -> None:
        """Log the halvings since the last time."""
        if self.halvings > self.told:
            self.told = int(self.halvings)
            step = int(self.at)
            scale = 0.5**self.told
            reason = "gradient norm" if self.kind else "loss"
            line = f"lr_reduction: rates times {scale:g} from step {step} on: the {reason} leapt"
            run.log(line, "lr_reduction", step=step, scale=scale, reason=reason)


# ===================================== SCHEDULES =====================================
LOOKS_AHEAD = (0.125, 0.7)  # shares of the run between which Lookahead does
SHAPES = {  # the rates' fall, by the share of it that is still to come
    "linear": lambda left: left,
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
    "wsd": lambda left: 1 - math.sqrt(1 - left),
    "constant": lambda left: 1.0,
}
DECAYS = {  # by the share of the run that is done
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def progress(hp: Hyperparameters, step: int, elapsed: float) -> float:
    """Give the share of the run that is done, by its steps or its seconds, whichever is more."""
    total = step + core.steps_left(hp, step, elapsed)
    return min(1.0, step / total) if total > 0 else 1.0


def lr_scale(hp: Hyperparameters, step: int, elapsed: float) -> float:
    """Scale all rates: they rise, stay, and fall to FINAL_LR_FRAC, in the shape of LR_SCHEDULE."""
    left = core.steps_left(hp, step, elapsed)
    total = step + left
    rise = hp.lr_warmup_steps or hp.lr_warmup_ratio * total
    if hp.lr_schedule == "cosine":
        share = min(1.0, max(0.0, left / max(total - rise, 1e-9)))
    else:
        share = core.warmdown(hp, step, left)
    share = SHAPES[hp.lr_schedule](share)
    scale = share + (1 - share) * hp.final_lr_frac
    return scale * min(1.0, (step + 1) / rise) if rise else scale


def momentum(hp: Hyperparameters, step: int, done: float) -> float:
    """Give Muon's momentum, which rises at first, and may fall back at the end."""
    ramp = min(1.0, step / max(1, hp.muon_momentum_warmup_steps))
    if hp.muon_momentum_warmdown_frac:
        ramp *= min(1.0, (1 - done) / hp.muon_momentum_warmdown_frac)
    return (1 - ramp) * hp.muon_momentum_warmup_start + ramp * hp.muon_momentum


def parse_schedule(text: str) -> list[tuple[int, float]]:
    """Read values and the shares of the run that they last until. Raises UserError."""
    pairs = []
    form = "expected VALUE@SHARE, ... with whole values, and shares that rise between 0 and 1"
    for part in filter(None, text.split(",")):
        before = pairs[-1][1] if pairs else 0.0
        try:
            value, until = part.split("@")
            pairs.append((int(value), float(until)))
        except ValueError:
            raise core.UserError(f"{text}: {form}") from None
        core.require(before < pairs[-1][1] < 1, f"{text}: {form}")
    return pairs


def scheduled(text: str, done: float, last: int) -> int:
    """Give the value of a schedule where a share of the run is done; `last` comes after it."""
    for value, until in parse_schedule(text):
        if done < until:
            return value
    return last


class Stage(NamedTuple):
    """A part of the run, in which batches and graph have one shape."""

    begin: float  # share of the run
    hp: Hyperparameters  # the run's, but for lengths and batches
    order: int  # of the model's visits: 1 with loops


def stages_of(hp: Hyperparameters) -> list[Stage]:
    """List the stages of a run."""
    begins = {0.0}
    for text in (hp.seq_len_schedule, hp.batch_schedule):
        begins |= {until for _, until in parse_schedule(text)}
    if hp.loop_repeats:
        begins.add(min(hp.loop_start, 1.0))
    stages = []
    for begin in sorted(begins):
        length = scheduled(hp.seq_len_schedule, begin, hp.train_seq_len)
        tokens = scheduled(hp.batch_schedule, begin, hp.train_batch_tokens)
        shaped = replace(hp, train_seq_len=length, train_batch_tokens=tokens)
        stages.append(Stage(begin, shaped, int(begin >= hp.loop_start)))
    return stages


# ===================================== TARGETS =====================================


def prefix_table(tokenizer: core.Tokenizer) -> ndarray:
    """Find each token's longest proper prefix that is a token of text too, or IGNORE: int64 (V,).

    In the order of their bytes, the prefixes of a text are on a stack when it comes.
    """
    texts = {}
    for i, piece in enumerate(tokenizer.pieces):
        if not (tokenizer.byte[i] or tokenizer.silent[i]):
            texts.setdefault(piece.replace(core.SPACE, " ").encode(), i)
    table = np.full(len(tokenizer.pieces), core.IGNORE)
    stack: list[bytes] = []
    for text in sorted(texts):
        while stack and not text.startswith(stack[-1]):
            stack.pop()
        if stack:
            table[texts[text]] = texts[stack[-1]]
        stack.append(text)
    return table


def later_targets(targets: Tensor, count: int, bos: int) -> list[Tensor]:
    """List the targets 1 to `count` further on, int64 (B, T) like `targets`.

    Where BOS is on the way, or nothing follows in the row, it is IGNORE.
    """
    crosses = targets == bos
    found = []
    for k in range(1, count + 1):
        later = F.pad(targets, (0, k), value=core.IGNORE)[:, k:]
        crosses = crosses | (later == bos)
        found.append(later.masked_fill(crosses, core.IGNORE))
    return found


def target_weights(hp: Hyperparameters, done: float) -> list[float]:
    """Weigh the next token, those after it, and the prefix, where a share of the run is done.

    Token k counts 2^-k. In the first two thirds, one after another fades, the farthest first; the
    prefix fades in the second third (modded-nanogpt, pull requests 178 and 337).
    """
    weights = [1.0]
    count = hp.mtp_tokens
    for k in range(1, count + 1):
        fades = done * 1.5 * count - (count - k)
        weights.append(0.5**k * min(1.0, max(0.0, 1 - fades)))
    if hp.prefix_weight:
        weights.append(hp.prefix_weight * min(1.0, max(0.0, 2 - 3 * done)))
    return weights


# ===================================== TRAINING =====================================


class TokenStream(core.TokenStream):
    """The training shards; with DATA_SHUFFLE, they and their documents in an order of SEED."""

    def read(self, start: int, count: int) -> ndarray:
        """Read tokens [start, start + count), uint16 (count,). Raises UserError at a wrong id."""
        if not self.run.hp.data_shuffle:
            return super().read(start, count)
        pieces = []
        while count:
            epoch, place = divmod(start, self.total)
            # A generator whose numbers no version of NumPy changes.
            random = np.random.RandomState([self.run.hp.seed, epoch])
            order = random.permutation(np.arange(len(self.sizes)))
            ends = self.sizes[order].cumsum()
            index = int(np.searchsorted(ends, place, "right"))
            left = int(ends[index]) - place
            few = min(count, left)
            tokens = self.shuffled(int(order[index]), epoch)
            place = len(tokens) - left
            pieces.append(tokens[place : place + few])
            start += few
            count -= few
        return np.concatenate(pieces)

    @lru_cache(1)  # noqa: B019
    def shuffled(self, shard: int, epoch: int) -> ndarray:
        """Read a shard, its documents in an order of SEED and epoch."""
        tokens = self.read_in_shard(shard, 0, int(self.sizes[shard]))
        starts = 1 + np.flatnonzero(tokens[1:] == self.run.hp.bos)
        documents = np.split(tokens, starts)
        random = np.random.RandomState([self.run.hp.seed, epoch, shard])
        order = random.permutation(len(documents))
        return np.concatenate([documents[i] for i in order])


def overlapping(
    spans: ndarray, most: int, turn: int, run: core.Run, last: int
) -> Iterator[tuple[ndarray, ndarray]]:
    """Yield this rank's batches of windows (W, 3) whose last EVAL_STRIDE tokens are scored.

    Their places (most, T), and those that are scored (most, EVAL_STRIDE); `last` fills them up.
    """
    hp = run.hp
    length = hp.eval_seq_len or hp.train_seq_len
    spans = np.pad(spans, ((0, -len(spans) % most), (0, 0)))
    for i in range(turn * most, len(spans), run.world_size * most):
        columns = spans[i : i + most].T
        first, stop, _ = columns[..., None]
        at = first + np.arange(length)
        places = np.where(at < stop, at, last)
        yield at, places[:, -hp.eval_stride :]


class Trainer(core.Trainer):
    """Train in stages, by schedules, with more targets, and an average of weights."""

    def __init__(
        self, model: GPT, forward: core.Forward, stream: core.TokenStream, run: core.Run
    ) -> None:
        hp = run.hp
        self.stages = stages_of(hp)
        self.stage = self.stages[-1]
        super().__init__(model, forward, stream, run)
        if hp.ema_decay:
            self.average = self.share.clone()
        if hp.ema_nesterov and self.owned:
            self.optimizers.append(Lookahead([*self.owned.values()], hp.ema_nesterov))
        self.guard = RateGuard(run.device) if hp.auto_lr_reduction else None
        both = hp.auto_lr_reduction and hp.ema_nesterov
        core.require(not both, "AUTO_LR_REDUCTION, EMA_NESTEROV: only one of them")
        self.prefixes: Tensor | None = None
        if hp.prefix_weight:
            table = prefix_table(core.Tokenizer(hp))
            self.prefixes = torch.from_numpy(table).to(run.device)
        self.weigh(0.0)
        if len(self.target_weights) > 1:
            self.learn = self.learn_more
        self.enter(self.stages[0], 0)

    # ---- stages

    def enter(self, stage: Stage, step: int) -> None:
        """Go on in a stage."""
        old = self.stage
        self.stage = stage
        self.model.visits = self.model.orders[stage.order]
        if stage.hp != old.hp:
            self.feed_from(step)

    def feed_from(self, step: int) -> None:
        """Read the batches from a step on: behind the tokens that were read before it."""
        hp = self.stage.hp
        view = copy.copy(self.run)
        view.hp = hp
        tokens = self.run.forward_rows * core.row_length(self.run.hp)
        view.forward_rows = max(1, tokens // core.row_length(hp))
        if not step:
            self.tokens = 0
        self.batch_tokens = hp.train_batch_tokens
        self.feed = core.batches(self.stream, view, 0, self.tokens)
        self.upcoming = None

    def prime(self) -> None:
        """Take WARMUP_STEPS steps in each stage; the last one needs the most memory."""
        for stage in reversed(self.stages):
            self.enter(stage, 0)
            super().prime()

    def step(self, step: int, elapsed: float, dry: bool = False) -> Tensor:
        """Update the weights, unless `dry` or not finite, from a batch; its mean loss, fp32 ()."""
        if not dry:
            done = progress(self.run.hp, step, elapsed)
            self.weigh(done)
            now = [stage for stage in self.stages if stage.begin <= done][-1]
            if now is not self.stage:
                self.enter(now, step)
        return super().step(step, elapsed, dry)

    def finish(self) -> None:
        """Let the weights be those that are exported: w + EMA_BLEND·(average - w)."""
        if self.stage.order != self.stages[-1].order:
            text = "training ended before LOOP_START: no loop was trained"
            self.run.log(f"warning: {text}", "warning", text=text)
        self.model.visits = self.model.orders[1]
        if self.average is not None:
            self.share.lerp_(self.average, self.run.hp.ema_blend)
            if gathering := self.gather():
                gathering.wait()
            self.working.copy_(self.weights)

    # ---- targets

    def weigh(self, done: float) -> None:
        """Set the targets' weights, for a share of the run that is done."""
        self.target_weights = target_weights(self.run.hp, done)

    def learn_more(self, inputs: Tensor, targets: Tensor, documents: Cuts = None) -> Tensor:
        """Give the NLL of each target and, on the same logits, of later tokens and prefixes."""
        hp = self.run.hp
        found = [targets, *later_targets(targets, hp.mtp_tokens, hp.bos)]
        if self.prefixes is not None:
            known = self.prefixes[targets.clamp(min=0)]
            found.append(known.masked_fill(targets == core.IGNORE, core.IGNORE))
        weights = self.target_weights
        if not self.run.compile:  # a compiled graph has one number of targets
            found = [y for y, weight in zip(found, weights, strict=True) if weight]
            weights = [weight for weight in weights if weight]
        how = core.send(np.array(weights, np.float32), targets.device)
        return self.forward(inputs, torch.stack(found, dim=-1), documents, how)

    # ---- updates

    def update(self, step: int, elapsed: float, bad: Tensor) -> None:
        """Let the optimizers update the own share, and move its average: e ← d·e + (1 - d)·w."""
        if self.guard:
            self.update_guarded(step, elapsed, bad)
        else:
            super().update(step, elapsed, bad)
        if self.average is not None:
            weight = 1 - self.run.hp.ema_decay
            self.average.lerp_(self.share, weight * (~bad).float())

    def update_guarded(self, step: int, elapsed: float, bad: Tensor) -> None:
        """Take of the step, which is linear in the rates, what the guard leaves."""
        before = self.share.clone()
        super().update(step, elapsed, bad)
        scale = self.guard.scale(*self.sums, step, bad)
        if self.run.world_size > 1:  # sums may end on other bits on other ranks
            dist.broadcast(scale, 0)
        self.share.copy_(before.lerp(self.share, scale))

    def look_back(self, delay: int) -> None:
        """Wait for the step that was `delay` steps ago; tell what the guard did."""
        super().look_back(delay)
        if self.guard and not delay:
            self.guard.tell(self.run)

    def schedule(self, step: int, elapsed: float) -> None:
        """Set rates, decays and momentum of a step."""
        hp = self.run.hp
        done = progress(hp, step, elapsed)
        scale = lr_scale(hp, step, elapsed)
        decay = DECAYS[hp.wd_schedule](done)
        mu = momentum(hp, step, done)
        ahead = LOOKS_AHEAD[0] <= done < LOOKS_AHEAD[1]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                rates: dict[str, Any] = {"lr": group["base_lr"] * scale, "momentum": mu}
                if isinstance(optimizer, Lookahead):
                    rates["lr"] *= ahead
                group.update(rates, weight_decay=group["base_decay"] * decay)
