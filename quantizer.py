"""Store the weights of train_gpt.py in fewer bytes at the same loss: QUANT_METHOD=gptq.

An error e of a matrix costs about ½·Σ_i g_i·(e_i·H·e_iᵀ) nats a token, where H is the mean of x·xᵀ
over its inputs x, and g_i the mean square of the loss's gradient by output i (arXiv 2505.22988).
Calibration measures both on training tokens. GPTQ (2210.17323) rounds column by column, and lets
the later ones make up for it: of H⁻¹ = Uᵀ·U, column j then costs ½·Σ_i g_i·(e_ij / U_jj)².

So the best step of a weight is U_jj / sqrt(g_i), times one constant of the network, with which a
bit saves as much loss anywhere (2603.04956). FIT_BUDGET=step solves for it. The levels of 64 rows
of a column are a path through a trellis (Ungerboeck 1982): 0.6 dB from the bound that rate and
distortion have, where single levels are 1.5 dB or more from it. A path's cost counts its bits too.

train_gpt.py imports this file for QUANT_METHOD=gptq, COMPRESSOR=rans and FIT_BUDGET alone, where
its bytes count as code. Decoding is integer arithmetic, and products of fp32 in one order.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy import ndarray
from torch import Tensor

import train_gpt as core
from train_gpt import Hyperparameters, UserError, require

# ===================================== CODER =====================================
BAND = 64  # rows of a lane: paths of 128 gain under 0.1 dB
SEGMENT = 512  # its columns: with more lanes at once, decoding is faster
TRELLIS = {  # the next state, by 2·state + u
    1: np.zeros(2, int),
    8: np.array([state >> 1 ^ 5 * (state & 1) ^ 2 * u for state in range(8) for u in (0, 1)]),
}
LOWEST = -12  # of class 1: quarter octaves of deviation over step
CLASSES = 38
COARSE = 12  # classes under it, of deviations under 0.84 steps, have a level 0 in all states
RANS_TOTAL = 1 << 14  # sum of frequencies
RANS_START = 1 << 16  # a lane's first state
RANS_HEAD = struct.Struct("<hHHI")  # lowest k, its values, contexts, bytes of their histograms


def scale_values(codes: ndarray) -> ndarray:
    """Give the scales of codes: 2^((code - 128) / 4), and 0 for 0, float32: exact anywhere."""
    octaves = (codes.astype(np.float64) - 128) / 4
    return np.where(codes > 0, np.exp2(octaves), 0).astype(np.float32)


def steps_of(unit: ndarray, row: ndarray, col: ndarray) -> ndarray:
    """Give the steps of a matrix from its unit, (1,), and the codes of its rows and columns."""
    rows = unit * scale_values(row)
    return rows[:, None] * scale_values(col)


def classes_of(row: ndarray, col: ndarray, sigma: ndarray, tau: ndarray) -> ndarray:
    """Tell the class of each weight from its deviation over its step; 0: the step is 0."""
    rows = sigma.astype(int) - row
    cols = tau.astype(int) - col
    octaves = rows[:, None] + cols - LOWEST
    classes = np.clip(octaves + 1, 1, CLASSES - 1)
    classes *= (row > 0)[:, None] & (col > 0)
    return classes.astype(np.uint16)


def padded(array: ndarray) -> ndarray:
    """Fill the last band of rows with zeros."""
    more = -len(array) % BAND
    return np.pad(array, ((0, more), (0, 0)))


def lanes(arrays: list[ndarray]) -> Iterator[ndarray]:
    """View padded matrices in lanes, (columns, 64): each is a path, and a state of rANS."""
    for array in arrays:
        cuts = range(SEGMENT, array.shape[1], SEGMENT)
        for band in np.split(array, len(array) // BAND):
            yield from np.split(band.T, cuts)


def lane_tables(arrays: list[ndarray]) -> list[ndarray]:
    """Put matrices into lanes, and those of one length beside each other: (T, L) each."""
    groups: dict[int, list[ndarray]] = {}
    whole = [padded(array) for array in arrays]
    for view in lanes(whole):
        groups.setdefault(view.size, []).append(view.ravel())
    return [np.stack(groups[size], axis=1) for size in sorted(groups)]


def values_of(codes: ndarray, classes: ndarray) -> ndarray:
    """Give the levels, in steps, that codes 2k + z stand for: int16.

    They are 2k + z. In coarse classes, odd states have 0, ±1, ±3 and so on, as in VVC: a weight is
    not forced to ±1 by what its path does elsewhere.
    """
    k = codes >> 1
    odd = 2 * k - np.sign(k)
    return np.where((codes & 1) * (classes < COARSE), odd, codes)


def logs_of(counts: ndarray) -> ndarray:
    """Round the logarithms of shares of counts (C, K) to sixteenths of octaves: uint8; 0: none."""
    total = counts.sum(1, keepdims=True).clip(1)
    share = np.maximum(counts * RANS_TOTAL / total, 1)
    logs = np.rint(16 * np.log2(share)) + 1
    return np.where(counts > 0, logs, 0).astype(np.uint8)


def frequencies(logs: ndarray) -> ndarray:
    """Give frequencies (C, K) of sum 2^14, in proportion to 2^((log - 1) / 16), or 0 for 0."""
    octaves = (logs.astype(np.float64) - 1) / 16
    shares = np.rint(np.exp2(octaves)) * (logs > 0)
    shares = shares.astype(np.int64)
    total = shares.sum(1, keepdims=True).clip(1)
    f = shares * RANS_TOTAL // total
    f = np.maximum(f, logs > 0)
    context = np.arange(len(f))
    while (rest := RANS_TOTAL - f.sum(1)).any():
        most = f.argmax(1)
        f[context, most] += np.maximum(rest, -(f[context, most] // 2))
    return f


def rans_encode(codes: list[ndarray], classes: list[ndarray]) -> bytes:
    """Code matrices of codes 2k + z by rANS (arXiv 1311.2540): k by a histogram of class and z.

    Of frequencies f (sum 2^14, cumulated c), a lane's state x in [2^16, 2^32) becomes (x // f)·2^14
    + x mod f + c, after 16 bits left it if x ≥ f·2^18. Encoding runs backwards from the end.
    """
    kinds = lane_tables(classes)
    tables = lane_tables(codes)
    each = zip(tables, kinds, strict=True)
    found = [np.where(kind > 0, code >> 1, 0) for code, kind in each]
    low = min(0, *(int(k.min()) for k in found))
    high = max(0, *(int(k.max()) for k in found))
    width = high - low + 1
    contexts = 2 * max(int(kind.max()) for kind in kinds) + 2
    counts = np.zeros(contexts * width, np.int64)
    symbols = []
    for code, kind, k in zip(tables, kinds, found, strict=True):
        context = 2 * kind.astype(np.int32) + (code & 1)
        symbol = context * width + (k - low)
        counts += np.bincount(symbol.ravel(), minlength=len(counts))
        symbols.append(symbol)
    counts = counts.reshape(contexts, width)
    counts[:2, -low] += 1  # where the step is 0, a path goes on with k = 0 from any state
    logs = logs_of(counts)
    f = frequencies(logs)
    c = f.cumsum(1) - f
    f = f.astype(np.uint32)
    c = c.astype(np.uint32)
    words = []
    for symbol in reversed(symbols):
        x = np.full(symbol.shape[1], RANS_START, np.uint32)
        for row in symbol[::-1]:
            freq = f.take(row)
            full = np.flatnonzero(x >> 18 >= freq)
            out = x[full]
            words.append(out.astype("<u2"))
            x[full] = out >> 16
            high = x // freq << 14
            x = high + x % freq + c.take(row)
        words.append(x.astype("<u4").view("<u2"))
    table = core.zstd().compress(logs.tobytes(), 22)
    head = RANS_HEAD.pack(low, width, contexts, len(table))
    return head + table + np.concatenate(words[::-1]).tobytes()


class Decoder:
    """What rans_encode coded, with the tables of all contexts. Raises UserError at other data."""

    def __init__(self, data: bytes, contexts: int) -> None:
        require(len(data) > RANS_HEAD.size, "its levels are cut off")
        self.low, self.width, known, size = RANS_HEAD.unpack_from(data)
        start = RANS_HEAD.size + size
        table = data[RANS_HEAD.size : start]
        count = contexts * self.width
        fits = known == contexts and 0 < self.width < 2**14 and len(table) == size
        fits = fits and core.zstd().frame_content_size(table) == count
        require(fits, "its histograms do not fit")
        logs = core.zstd().ZstdDecompressor().decompress(table, allow_extra_data=False)
        logs = np.frombuffer(logs, np.uint8)
        f = frequencies(logs.reshape(contexts, self.width))
        values = np.arange(self.width, dtype=np.int16)
        values = np.tile(values, contexts)
        self.symbol = np.repeat(values, f.ravel())  # by context and slot
        c = f.cumsum(1) - f
        self.f = f.astype(np.uint32)
        self.c = c.astype(np.uint32)
        require((len(data) - start) % 2 == 0, "its levels are cut off")
        self.words = np.frombuffer(data, "<u2", -1, start)

    def take(self, count: int) -> ndarray:
        """Take the next words."""
        require(count <= len(self.words), "its levels are cut off")
        taken = self.words[:count]
        self.words = self.words[count:]
        return taken

    def codes(self, kind: ndarray, states: int) -> ndarray:
        """Decode the codes, int16, of lanes with these classes, (T, L)."""
        count = kind.shape[1]
        x = self.take(2 * count).view("<u4").astype(np.uint32)
        follow = TRELLIS[states]
        state = np.zeros(count, int)
        codes = np.empty(kind.shape, np.int16)
        for row, found in zip(kind, codes, strict=True):
            z = state & 1
            context = 2 * row.astype(int) + z
            slot = x & RANS_TOTAL - 1
            k = self.symbol.take(context * RANS_TOTAL + slot)
            at = context * self.width + k
            x = self.f.take(at) * (x >> 14) + slot - self.c.take(at)
            hungry = np.flatnonzero(x < RANS_START)
            x[hungry] = x[hungry] << 16 | self.take(len(hungry))
            k = k + self.low
            np.add(2 * k, z, out=found, casting="unsafe")
            state = follow.take(2 * state + (k & 1))
        require((x == RANS_START).all(), "its levels do not decode")
        return codes


def rans_decode(data: bytes, classes: list[ndarray], states: int) -> list[ndarray]:
    """Decode the codes, int16, of matrices of these classes. Raises UserError at other data."""
    kinds = lane_tables(classes)
    decoder = Decoder(data, 2 * max(int(kind.max()) for kind in kinds) + 2)
    matrices = [padded(array).astype(np.int16) for array in classes]
    views = iter(sorted(lanes(matrices), key=lambda view: view.size))
    for kind in kinds:
        codes = decoder.codes(kind, states)
        for lane in codes.T:
            view = next(views)
            view[:] = lane.reshape(view.shape)
    require(not len(decoder.words), "its levels do not decode")
    pairs = zip(matrices, classes, strict=True)
    return [matrix[: len(array)] for matrix, array in pairs]


def layout(shape: list[int], hp: Hyperparameters) -> list[list[Any]]:
    """List NumPy type and shape of a matrix's arrays: its unit, of rows and columns, its levels.

    Rows and columns have the codes of their steps, and with QUANT_CLASSES of their deviations.
    """
    unit = ["<f4", [1]]
    codes = [["|u1", [size]] for size in shape]
    deviations = codes if hp.quant_classes else [["|u1", [0]]] * 2
    levels = ["<i2", shape]
    return [unit, *codes, *deviations, levels]


def contexts_of(
    stored: list[list[ndarray]], shapes: list[list[int]], hp: Hyperparameters
) -> list[ndarray]:
    """Give the classes of matrices: of their weights, or one for each matrix; 0: the step is 0."""
    if hp.quant_method == "gptq" and hp.quant_classes:
        return [classes_of(*arrays[1:5]) for arrays in stored]
    found = [np.full(shape, i + 1, np.uint16) for i, shape in enumerate(shapes)]
    if hp.quant_method == "gptq":
        for classes, (_, row, col, *_) in zip(found, stored, strict=True):
            classes *= (row > 0)[:, None] & (col > 0)
    return found


def compress(matrices: list[list[ndarray]], hp: Hyperparameters) -> bytes:
    """Code the levels of quantized matrices, the last one of the arrays of each."""
    codes = [arrays[-1] for arrays in matrices]
    if not codes:
        return b""
    shapes = [[*code.shape] for code in codes]
    if hp.quant_method == "round":  # a level k has z = 0
        codes = [2 * code.astype(np.int16) for code in codes]
    return rans_encode(codes, contexts_of(matrices, shapes, hp))


def decompress(
    data: bytes, stored: list[list[ndarray]], shapes: list[list[int]], hp: Hyperparameters
) -> list[ndarray]:
    """Decode matrices, float32, the same bits on every machine. Raises UserError."""
    if not shapes:
        require(not data, "there is more than its tensors")
        return []
    classes = contexts_of(stored, shapes, hp)
    if hp.quant_method == "round":
        codes = rans_decode(data, classes, 1)
        each = zip(stored, codes, strict=True)
        return [scale.astype(np.float32) * (code >> 1) for (scale,), code in each]
    levels = rans_decode(data, classes, hp.quant_trellis)
    if hp.quant_classes:
        levels = map(values_of, levels, classes)
    each = zip(stored, levels, strict=True)
    return [steps_of(*arrays[:3]) * level for arrays, level in each]


# ===================================== CALIBRATION =====================================
BACKWARD = 4  # of so many rows, one also goes backward
FLOOR = 1e-3  # of the mean of g: outputs without gradients in few tokens may have some in others
DAMPING = 0.01  # of the mean of H's diagonal, added to it


@dataclass
class Use:
    """What the calibration saw of one use of a matrix (rows, cols): sums over tokens."""

    products: Tensor  # of x·xᵀ, (cols, cols)
    squares: Tensor  # of the gradients by outputs, (rows,)

    def add(self, x: Tensor) -> None:
        """Add the products of x (..., cols)."""
        x = x.detach().flatten(0, -2).float()
        products = x.mT @ x
        self.products += products.to(self.products.dtype)

    def add_squares(self, gradients: Tensor, gains: Tensor | None = None) -> None:
        """Add the squares of gradients (..., rows) by outputs that `gains` (rows,) scale."""
        gradients = gradients.flatten(0, -2).float()
        if gains is not None:
            gradients = gradients * gains.float()
        squares = gradients.square().sum(0)
        self.squares += squares.to(self.squares.dtype)


class Calibration:
    """Listen to a model: to the inputs and the output gradients of its matrices and tables."""

    def __init__(self, model: core.GPT, device: torch.device) -> None:
        self.model = model
        self.wide = torch.float32 if device.type == "mps" else torch.float64
        self.device = device
        self.tokens = torch.zeros(2, dtype=torch.int64, device=device)  # forward, backward
        self.uses: dict[str, Use] = {}
        self.handles: list[Any] = []
        for name, module in model.named_modules():
            if isinstance(module, core.Matrix | core.Table):
                self.uses[name] = self.nothing_yet(module.weight)
                hear = self.hear_matrix if isinstance(module, core.Matrix) else self.hear_table
                hear(name, module)
        self.head = "tok_emb" if model.lm_head is None else "lm_head"
        self.logits = self.nothing_yet(model.get_submodule(self.head).weight)
        model.listen = self.hear_head

    def nothing_yet(self, weight: Tensor) -> Use:
        """Begin the sums of a use."""
        rows, cols = weight.shape
        products = torch.zeros(cols, cols, dtype=self.wide, device=self.device)
        return Use(products, products.new_zeros(rows))

    def hear_head(self, x: Tensor, gradients: Tensor) -> None:
        """Add the inputs of the head, and the gradients of the logits."""
        self.logits.add(x)
        self.logits.add_squares(gradients)

    def hear_matrix(self, name: str, matrix: core.Matrix) -> None:
        """Sum the products of the inputs; q, k and v have the same ones."""
        use = self.uses[name]
        shared = name.endswith((".c_k", ".c_v"))
        gains: list[Tensor | None] = [None]

        def before(_: Any, args: tuple[Any, ...]) -> None:
            gains[0] = args[1] if args[1:] else None
            if not shared:
                use.add(args[0])

        def after(_: Any, __: Any, gradients: tuple[Tensor, ...]) -> None:
            use.add_squares(gradients[0], gains[0])

        self.handles.append(matrix.register_forward_pre_hook(before))
        self.handles.append(matrix.register_full_backward_hook(after))

    def hear_table(self, name: str, table: core.Table) -> None:
        """Sum the products of the outputs' gradients, which tell what an error of a row costs."""
        use = self.uses[name]

        def after(_: Any, args: tuple[Tensor], output: Tensor) -> None:
            ids = args[0].flatten()

            def add(gradients: Tensor) -> None:
                use.add(gradients)
                squares = gradients.flatten(0, -2).float().square().sum(1)
                use.squares.index_add_(0, ids, squares.to(use.squares.dtype))

            if output.requires_grad:
                output.register_hook(add)

        self.handles.append(table.register_forward_hook(after))

    def see(self, batch: core.Batch, backward: bool) -> None:
        """Run a batch, without the rows that only fill it."""
        inputs, targets, documents = batch
        whole = int((targets[:, 0] != core.IGNORE).sum())
        count = whole * inputs.size(1)
        if not count:
            return
        if documents is not None:
            offsets = documents.offsets[documents.offsets <= count]
            documents = core.Documents(offsets, documents.longest)
        with torch.set_grad_enabled(backward):
            nll = self.model(inputs[:whole], targets[:whole], documents)
            if backward:
                nll.sum().backward()
        self.tokens += self.tokens.new_tensor([count, count * backward])

    def close(self) -> None:
        """Stop listening, and add up what all ranks saw."""
        for handle in self.handles:
            handle.remove()
        self.model.listen = None
        if dist.is_initialized():
            dist.all_reduce(self.tokens)
            for use in (self.logits, *self.uses.values()):
                dist.all_reduce(use.products)
                dist.all_reduce(use.squares)

    def sensitivity(self, name: str) -> tuple[Tensor, Tensor]:
        """Give H and g of a weight, float64. Raises UserError if they are not finite.

        A table that is also the head has two pairs, and gets the one pair that is nearest to both:
        their sum, with the same shares of columns for all rows, and of rows for all columns.
        """
        forward, backward = self.tokens.tolist()
        module = name.removesuffix(".weight")
        source = re.sub(r"c_[kv]$", "c_q", module)
        is_table = isinstance(self.model.get_submodule(module), core.Table)
        products = self.uses[source].products.cpu().double()
        products = products / (backward if is_table else forward)
        squares = self.uses[module].squares.cpu().double() / backward
        if is_table:
            squares = squares / products.trace().clamp(min=1e-30)
        total = squares.sum() * products
        rows = squares * products.trace()
        if module == self.head:
            products = self.logits.products.cpu().double() / backward
            squares = self.logits.squares.cpu().double() / backward
            total = total + squares.sum() * products
            rows = rows + squares * products.trace()
        if is_table or module == self.head:
            rows = rows + rows.sum() / backward  # as if each token had come once more (Laplace)
        sound = total.isfinite().all() and rows.isfinite().all()
        require(sound, f"calibration: {name} met values that are not finite")
        return total, rows / total.trace().clamp(min=1e-30)


def evaluation_view(run: core.Run) -> core.Run:
    """Copy a run that reads training tokens as validation reads its own: context, documents.

    It reads single rows, so that the number of ranks does not change how sums are rounded.
    """
    hp = run.hp
    length = hp.eval_seq_len or hp.train_seq_len
    view = copy.copy(run)
    view.hp = replace(
        hp,
        train_seq_len=length,
        train_batch_tokens=max(1, hp.train_batch_tokens // length) * length,
        train_doc_isolated=hp.eval_doc_isolated,
    )
    view.forward_rows = 1
    return view


def calibrate(trainer: core.Trainer, step: int, elapsed: float) -> Calibration:
    """Run training tokens through the model, with the attention of validation, and listen.

    CALIBRATION_TOKENS of them, or what the seconds that are left of MAX_WALLCLOCK_SECONDS allow.
    """
    run = trainer.run
    hp = run.hp
    model = trainer.model
    start = run.clock(synchronize=True)
    view = evaluation_view(run)
    tokens = view.hp.train_batch_tokens
    first = math.ceil(trainer.tokens / tokens)
    feed = core.batches(trainer.stream, view, first)
    wanted = math.ceil(hp.calibration_tokens / tokens)
    cap = hp.max_wallclock_seconds - elapsed if hp.max_wallclock_seconds else math.inf
    seen = Calibration(model, run.device)
    embedding = model.tok_emb.weight  # the only one through which gradients need to flow
    for p in model.parameters():
        p.requires_grad_(p is embedding)
    rows = tokens // core.row_length(view.hp)
    own = rows * run.rank // run.world_size
    for number in range(wanted):
        used = run.clock(synchronize=True) - start
        if number and used >= cap:
            break
        for row, batch in enumerate(next(feed), number * rows + own):
            seen.see(batch, backward=row % BACKWARD == 0)
    feed.close()
    model.requires_grad_(True)
    embedding.grad = None
    seen.close()
    used = run.clock(synchronize=True) - start
    line = f"calibration: tokens:{seen.tokens[0]} backward:{seen.tokens[1]} seconds:{used:.1f}"
    run.log(f"{line} reserved:{hp.calibration_seconds:g}")
    return seen


# ===================================== STEPS =====================================
CAP = 24  # quarter octaves that deviations are over steps, at most
FARTHEST = 4096  # of a level: a class has fewer values than rANS has slots
STEPS = {  # rows by 1 / sqrt(g), or by their deviation; columns by U, or alike
    "sigma": (False, False),
    "columns": (False, True),
    "rows": (True, False),
    "loss": (True, True),
}


def factor(products: Tensor) -> tuple[ndarray, ndarray]:
    """Give U, upper, with H⁻¹ = Uᵀ·U, of H damped, float64; and which columns are never used.

    H = V·Vᵀ with V upper, a Cholesky factor from the last column on, so U = V⁻¹.
    """
    diagonal = products.diagonal()
    dead = diagonal <= 0
    mean = diagonal.mean().clamp(min=1e-30)
    damped = products.clone()
    damped.diagonal().add_(DAMPING * mean)
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    identity = torch.eye(len(products), dtype=torch.float64)
    u = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return u.numpy(), dead.numpy()


def quarter_octaves(x: ndarray) -> ndarray:
    """Round log2(x) to quarters, 1 to 255 with 128 for x = 1; 0 for 0: uint8."""
    with np.errstate(divide="ignore"):
        codes = np.rint(4 * np.log2(x)) + 128
    codes = codes.clip(1, 255)
    return np.where(x > 0, codes, 0).astype(np.uint8)


def geometric_mean(x: ndarray) -> float:
    """Give the geometric mean of what is over 0; 1 if nothing is."""
    logs = np.log(x[x > 0])
    return math.exp(logs.mean()) if logs.size else 1.0


@dataclass
class Work:
    """A matrix that is to be stored: its weights, and what its errors cost."""

    name: str
    weights: ndarray  # float32 (rows, cols), 0 in columns that are never used
    u: ndarray  # of GPTQ, float32 (cols, cols)
    rows: ndarray  # what the steps are in proportion to, float64 (rows,) and (cols,)
    cols: ndarray


def prepare(name: str, w: Tensor, seen: Calibration | None, hp: Hyperparameters) -> Work:
    """Find the steps of a matrix, but for the one constant. Raises UserError."""
    rows, cols = w.shape
    products = torch.eye(cols, dtype=torch.float64)
    g = torch.ones(rows, dtype=torch.float64)
    if seen is not None:
        products, g = seen.sensitivity(name)
    try:
        u, dead = factor(products)
    except torch.linalg.LinAlgError as error:
        raise UserError(f"calibration: {name}: no GPTQ from its inputs: {error}") from None
    weights = w.float().cpu().numpy().copy()
    require(np.isfinite(weights).all(), f"no artifact: values not finite in {name}")
    weights[:, dead] = 0
    deviations = weights.std(1, dtype=np.float64)
    floor = FLOOR * float(g.mean()) or 1.0
    by_loss, by_columns = STEPS[hp.quant_steps]
    row_steps = g.numpy().clip(floor) ** -0.5 if by_loss else deviations
    col_steps = np.diagonal(u) if by_columns else np.ones(cols)
    row_steps = np.where(weights.any(1), row_steps, 0)
    col_steps = np.where(dead, 0, col_steps)
    return Work(name, weights, u.astype(np.float32), row_steps, col_steps)


def deviations_of(x: ndarray) -> tuple[ndarray, ndarray]:
    """Fit σ_i·τ_j to the deviations of x (rows, cols): σ, τ, float64."""
    squares = x.astype(np.float64) ** 2
    rows = squares.mean(1)
    alive = rows > 0
    shares = squares[alive] / rows[alive, None]
    cols = shares.mean(0) if alive.any() else np.ones(x.shape[1])
    return np.sqrt(rows), np.sqrt(cols)


def capped(steps: ndarray, deviations: ndarray) -> ndarray:
    """Raise codes of steps over 0 to those of the deviations less CAP."""
    codes = np.clip(deviations - CAP, steps, 255)
    return np.where(steps > 0, codes, 0).astype(np.uint8)


def scales(work: Work, constant: float, hp: Hyperparameters) -> list[ndarray]:
    """Round a matrix's steps, and its deviations in that unit, to what the artifact stores."""
    row_mean = geometric_mean(work.rows)
    col_mean = geometric_mean(work.cols)
    unit = np.array([constant * row_mean * col_mean], "<f4")
    row = quarter_octaves(work.rows / row_mean)
    col = quarter_octaves(work.cols / col_mean)
    if not hp.quant_classes:
        steps = steps_of(unit, row, col)
        largest = np.max(np.abs(work.weights) / steps, initial=0, where=steps > 0)
        unit *= max(1, largest / (FARTHEST / 2))
        nothing = np.zeros(0, np.uint8)
        return [unit, row, col, nothing, nothing]
    sigma, tau = map(quarter_octaves, deviations_of(work.weights / unit))
    # Steps that are finer than the cap cost bytes, and save nothing that counts.
    rows = sigma.astype(int) - row
    col = capped(col, tau + np.median(rows))
    cols = tau.astype(int) - col
    row = capped(row, sigma + np.median(cols))
    return [unit, row, col, sigma, tau]


# ===================================== LEVELS =====================================
MOST = 255  # of k whose bits are tabulated
BLOCK = 64  # columns whose errors go to the later ones at once
COSETS = np.array([[0], [1], [2], [3]])  # 2z + u


def bits_by_class() -> ndarray:
    """Estimate the bits of level 2k + z, |k| ≤ MOST, in each class and of z: float32 (C, 2, K).

    A class holds weights of one deviation over step, about Gaussian; class 0, what is 0 anyway.
    """
    k = np.arange(-MOST, MOST + 1)
    z = np.array([[0], [1]])
    classes = np.arange(CLASSES)
    octaves = (classes - 1 + LOWEST) / 4
    levels = values_of(2 * k + z, classes[:, None, None])
    ratio = levels / np.exp2(octaves)[:, None, None]
    narrow = np.exp(-0.5 * ratio**2)
    wide = np.exp(-0.5 * (ratio / 4) ** 2) / 4
    chance = 0.98 * narrow + 0.02 * wide + 1e-30
    chance /= chance.sum(-1, keepdims=True)
    bits = -np.log2(chance)
    bits[0] = 1e6 * (k != 0)
    return bits.astype(np.float32)


def branches(states: int) -> tuple[ndarray, ndarray]:
    """List, for each state, the two that lead there, and by which coset 2z + u: (2, states)."""
    if states == 1:
        return np.zeros((2, 1), int), np.array([[0], [1]])
    before = np.empty((2, states), int)
    coset = np.empty((2, states), int)
    filled = np.zeros(states, int)
    for branch, state in enumerate(TRELLIS[states]):
        origin, u = divmod(branch, 2)
        which = filled[state]
        before[which, state] = origin
        coset[which, state] = 2 * (origin & 1) + u
        filled[state] += 1
    return before, coset


def best_paths(costs: ndarray, first: ndarray, states: int) -> tuple[ndarray, ndarray]:
    """Find the cheapest path of each of L lanes by Viterbi's algorithm.

    From `costs` (T, 4, L) of the cosets and the first states (L,): cosets (T, L), last states (L,).
    """
    T, _, L = costs.shape
    before, coset = branches(states)
    lane = np.arange(L)
    total = np.full((states, L), 1e30, np.float32)
    total[first, lane] = 0
    steps = costs[:, coset]
    both = np.empty((2, states, L), np.float32)
    second = np.empty((T, states, L), bool)
    for t in range(T):
        np.take(total, before, axis=0, out=both)
        both += steps[t]
        np.less(both[1], both[0], out=second[t])
        np.minimum(both[0], both[1], out=total)
    last = total.argmin(0)
    state = last
    path = np.empty((T, L), int)
    for t in reversed(range(T)):
        branch = states * second[t].take(state * L + lane) + state
        path[t] = coset.take(branch)
        state = before.take(branch)
    return path, last


def candidates(x: ndarray, classes: ndarray, prices: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Find the best k of parity u, in each coset 2z + u, for targets x (N,), in steps.

    It is one of the two around x: codes, levels, and costs, (4, N), which are the squared error and
    the price of the bits.
    """
    z = COSETS >> 1
    u = COSETS & 1
    shift = np.where(classes < COARSE, -np.sign(x), 1)
    center = (x - shift * z) / 2
    low = 2 * np.floor((center - u) / 2) + u
    k = np.stack((low, low + 2)).astype(int)
    codes = 2 * k + z
    levels = values_of(codes, classes)
    context = 2 * classes + z
    price = context * prices.shape[-1] + k.clip(-MOST, MOST) + MOST
    costs = (x - levels) ** 2
    costs += prices.take(price)
    best = costs.argmin(0)[None]
    codes, levels, costs = (np.take_along_axis(each, best, 0) for each in (codes, levels, costs))
    return codes[0], levels[0], costs[0]


def price_classes(work: Work, arrays: list[ndarray]) -> ndarray:
    """Give the class of each weight by which a path counts its bits."""
    unit, row, col, *deviations = arrays
    if deviations[0].size:
        return classes_of(row, col, *deviations)
    sigma, tau = deviations_of(work.weights / unit)
    rows = np.full_like(row, quarter_octaves(sigma.mean()))
    cols = np.full_like(col, quarter_octaves(tau.mean()))
    classes = classes_of(row, col, rows, cols)
    return np.where(classes > 0, classes.clip(COARSE), 0)  # 2k + z is the level


class Group:
    """Matrices with equally many columns, of which GPTQ rounds the same column at once."""

    def __init__(self, works: list[Work], stored: list[list[ndarray]]) -> None:
        self.works = works
        weights = []
        steps = []
        classes = []
        for work, arrays in zip(works, stored, strict=True):
            weights.append(padded(work.weights))
            steps.append(padded(steps_of(*arrays[:3])))
            classes.append(padded(price_classes(work, arrays)))
        sizes = [len(rows) for rows in weights]
        ends = np.cumsum([0, *sizes]).tolist()
        self.spans = [slice(*span) for span in itertools.pairwise(ends)]
        self.w = np.concatenate(weights)
        self.steps = np.concatenate(steps)
        self.classes = np.concatenate(classes)
        self.codes = np.zeros(self.w.shape, np.int16)
        self.error = np.zeros(len(self.w), np.float32)  # of the last column

    def round_column(self, j: int, state: ndarray, prices: ndarray, states: int) -> ndarray:
        """Choose the levels of a column, by paths that go on from `state` (bands,); their ends."""
        step = self.steps[:, j]
        x = np.zeros_like(step)
        np.divide(self.w[:, j], step, out=x, where=step > 0)
        x = x.clip(-FARTHEST, FARTHEST)
        classes = self.classes[:, j].astype(int)
        codes, levels, costs = candidates(x, classes, prices)
        bands = costs.reshape(4, -1, BAND)
        path, state = best_paths(bands.transpose(2, 0, 1), state, states)
        chosen = (path.T.ravel(), np.arange(len(x)))
        self.codes[:, j] = codes[chosen]
        self.error = self.w[:, j] - levels[chosen] * step
        return state

    def gptq(self, hp: Hyperparameters) -> list[ndarray]:
        """Choose all levels: their codes, int16 of the matrices' shapes.

        A path's levels are final where its 64 rows end, so that the later columns can take up
        their errors; those behind a block of columns do so at once.
        """
        prices = np.float32(hp.quant_lambda) * bits_by_class()
        rows, cols = self.w.shape
        bands = rows // BAND
        for begin in range(0, cols, BLOCK):
            end = min(begin + BLOCK, cols)
            errors = np.zeros((rows, end - begin), np.float32)
            for j in range(begin, end):
                if j % SEGMENT == 0:
                    state = np.zeros(bands, int)
                state = self.round_column(j, state, prices, hp.quant_trellis)
                self.feed_back(j, errors[:, : j + 1 - begin], end)
            for span, work in zip(self.spans, self.works, strict=True):
                u = work.u[begin:end, end:]
                self.w[span, end:] -= errors[span] @ u
        pairs = zip(self.spans, self.works, strict=True)
        return [self.codes[span][: len(work.weights)] for span, work in pairs]

    def feed_back(self, j: int, errors: ndarray, end: int) -> None:
        """Put e_ij / U_jj into the last of `errors`; take it up in the columns before `end`."""
        for span, work in zip(self.spans, self.works, strict=True):
            u = work.u[j, j:end]
            scaled = self.error[span, None] / u[0]
            errors[span, -1:] = scaled
            self.w[span, j + 1 : end] -= scaled * u[1:]


def encode(works: list[Work], constant: float, hp: Hyperparameters) -> dict[str, list[ndarray]]:
    """Quantize matrices with this constant: scales and levels by name."""
    groups: dict[int, list[Work]] = {}
    for work in works:
        groups.setdefault(work.weights.shape[1], []).append(work)
    coded = {}
    for group in groups.values():
        stored = [scales(work, constant, hp) for work in group]
        codes = Group(group, stored).gptq(hp)
        for work, arrays, code in zip(group, stored, codes, strict=True):
            coded[work.name] = [*arrays, code]
    return coded


# ===================================== ARTIFACT =====================================
Pack = Callable[[Hyperparameters], bytes]  # with the QUANT_SIGMA or QUANT_STEP of its settings


def agree(problem: str, ranks: int) -> None:
    """Raise UserError on all ranks if one has a problem."""
    problems = [problem] * ranks
    if ranks > 1:
        dist.all_gather_object(problems, problem)
    found = [*filter(None, problems)]
    require(not found, found[0] if found else "")


def usual_constant(works: list[Work], ranks: int) -> float:
    """Find the constant with which steps are, by geometric mean, deviations of the weights."""
    sums = torch.zeros(2, dtype=torch.float64)
    for work in works:
        size = work.weights.size
        deviations = geometric_mean(work.weights.std(1))
        steps = geometric_mean(work.rows) * geometric_mean(work.cols)
        sums[0] += size * math.log(deviations / steps)
        sums[1] += size
    if ranks > 1:
        dist.all_reduce(sums)
    return math.exp(sums[0] / sums[1].clamp(min=1))


def sizes_of(state: Mapping[str, Tensor], hp: Hyperparameters) -> dict[str, int]:
    """Count the weights of each matrix that is stored as levels."""
    return {name: w.numel() for name, w in state.items() if core.bits_of(name, w, hp)}


def packer(
    state: Mapping[str, Tensor],
    hp: Hyperparameters,
    seen: Calibration | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Pack:
    """Make a function that packs the weights. Raises UserError.

    For gptq, `ranks` processes share out the matrices, and call it together: all but the first get
    as many zeros. Without a calibration, all inputs and outputs are alike.
    """
    if hp.quant_method == "round":
        return partial(core.pack_artifact, state)
    sizes = sizes_of(state, hp)
    places, _ = core.divide(sizes, ranks)
    works = []
    problem = ""
    try:
        mine = [name for name in sizes if places[name][0] == rank]
        works = [prepare(name, state[name], seen, hp) for name in mine]
    except UserError as error:
        problem = str(error)
    agree(problem, ranks)
    # A level's parity is its path's, so that levels to choose from have the double distance.
    usual = usual_constant(works, ranks) / 2

    def pack(hp: Hyperparameters) -> bytes:
        share = encode(works, usual * hp.quant_step, hp)
        shares = [share] * ranks
        if ranks > 1:
            dist.gather_object(share, shares if rank == 0 else None)
        data = b""
        problem = ""
        try:
            if rank == 0:
                coded = {name: arrays for part in shares for name, arrays in part.items()}
                data = core.pack_artifact(state, hp, coded)
        except UserError as error:
            problem = str(error)
        agree(problem, ranks)
        if ranks == 1:
            return data
        size = [len(data)]
        dist.broadcast_object_list(size, 0)
        return data or bytes(size[0])

    return pack


def first_try(state: Mapping[str, Tensor], hp: Hyperparameters) -> Hyperparameters:
    """Guess the QUANT_STEP that fills the cap, from the rate of Gaussian weights."""
    count = sum(sizes_of(state, hp).values())
    if hp.fit_budget != "step" or not count:
        return hp
    room = hp.artifact_max_bytes - core.code_bytes(hp)
    for name, w in state.items():
        (kind, shape), *levels = core.layout(name, w, hp)
        if not levels:
            room -= np.dtype(kind).itemsize * math.prod(shape)
    rate = min(max(8 * room / count, -9.0), 14.0)
    return replace(hp, quant_step=2 ** (2.05 - rate))


def forecast(state: Mapping[str, Tensor], hp: Hyperparameters) -> bytes:
    """Pack weights before training, as they are to be packed after it."""
    pack = packer(state, hp)
    return pack(first_try(state, hp))


def make_artifact(state: Mapping[str, Tensor], seen: Calibration | None, run: core.Run) -> bytes:
    """Pack the weights; with FIT_BUDGET, code and artifact fill 99.9% of the cap, or more."""
    hp = first_try(state, run.hp)
    try:
        pack = packer(state, hp, seen, run.rank, run.world_size)
    except UserError as problem:
        raise UserError(f"{problem}; the raw weights are in {run.dir}/final_model.pt") from None
    if hp.fit_budget == "none":
        return pack(hp)
    count = sum(sizes_of(state, hp).values())
    return fit(pack, count, hp, run)


def fit(pack: Pack, weights: int, hp: Hyperparameters, run: core.Run) -> bytes:
    """Solve for the QUANT_SIGMA or QUANT_STEP that fills the cap, from that of `hp` on.

    An octave of it is at first taken for a bit a weight, then for what the last two tries say.
    """
    name = f"quant_{hp.fit_budget}"
    lowest = -12.0 if hp.fit_budget == "step" else 2.0
    cap = hp.artifact_max_bytes
    code = core.code_bytes(hp)
    most = cap - code
    least = most - 0.001 * cap
    slope = weights / 8 or 1.0
    x = math.log2(getattr(hp, name))
    made: dict[float, bytes] = {}
    size = 0
    change = 0.0
    while not made or (len(made) < 16 and x not in made and not least <= size <= most):
        made[x] = pack(replace(hp, **{name: 2**x}))
        less = size - len(made[x])
        size = len(made[x])
        if less * change > 0:
            slope = less / change
        aim = x + (size - (least + most) / 2) / slope
        aim = min(max(aim, lowest), 12.0)
        change = aim - x
        x = aim
    sizes = {x: len(data) for x, data in made.items()}
    x = max(sizes, key=lambda x: sizes[x] if sizes[x] <= most else -sizes[x])
    fill = (code + sizes[x]) / cap
    further = "" if 0.999 <= fill <= 1 else " (it cannot do more)"
    line = f"fit_budget:{hp.fit_budget} {name}:{2**x:.4f} tries:{len(made)} fill:{fill:.4f}"
    run.log(line + further)
    return made[x]
