"""traffic.py's optimizer: the launches of a step's rest, all but forward, backward and loader.

The script's Trainer takes a step on fake tensors of a CUDA device, which have shapes and no values.
Each operator that reaches the device counts as PyTorch launches it there: a view is free, one on
lists of tensors takes as many launches as its multi-tensor-apply needs. A function that the script
compiles is counted as the compiler's kernels.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import traffic_compile
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from traffic_count import ADDING, PRODUCTS, Kernel, called_kernel
from traffic_device import idle_guard
from traffic_lines import Place, share

CUDA = torch.device("cuda", 0)

# ATen/native/cuda/MultiTensorApply.cuh: elements of a chunk, tensors and chunks of a launch. Builds
# for CUDA 13 put seven times as many into one.
CHUNK = 65536
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # by the number of lists
CHUNKS = 320
CAT_TENSORS = 128  # ATen/native/cuda/Shape.cu: tensors of a launch
NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
NO_KERNEL += ("_unsafe_view", "detach", "lift_fresh", "set_", "resize_", "is_same_size")
NO_READ = ("copy_", "fill_", "zero_", "_foreach_zero_", "_foreach_copy_")  # of what they change


def tensors_of(values: Any) -> list[Tensor]:
    """List the tensors of the CUDA device in nested values, each once."""
    found = {id(x): x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_cuda}
    return [x for x in found.values() if x.numel()]


def size_of(x: Tensor) -> int:
    """Count the bytes of a tensor; an expanded dimension is there once."""
    sizes = zip(x.shape, x.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) * x.dtype.itemsize


def distinct_bytes(tensors: Sequence[Tensor]) -> int:
    """Count the bytes of several tensors; a matrix and its transpose are there once."""
    places = {(x.untyped_storage()._cdata, x.storage_offset()): size_of(x) for x in tensors}
    return sum(places.values())


def list_launches(sizes: Sequence[int], lists: int) -> int:
    """Count the launches of an operator on lists of tensors with these numbers of elements."""
    launches = tensors = chunks = 0
    for size in sizes:
        tensors += 1
        for left in reversed(range(math.ceil(size / CHUNK))):
            chunks += 1
            full = chunks == CHUNKS or (tensors == TENSORS[min(lists, 5)] and not left)
            if full:
                launches += 1
                chunks = 0
                tensors = 1 if left else 0  # the rest of a tensor is in the next launch
    return launches + (chunks > 0)


def is_uniform(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Tell whether lists of tensors fit one kernel: of one dtype, and dense in the same order."""
    groups = [*zip(*lists, strict=True)]
    dtypes = {x.dtype for group in groups for x in group}
    strides = all(len({x.stride() for x in group}) == 1 for group in groups)
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false
    return len(dtypes) == 1 and strides and all(dense(x) for x in groups[0])


def foreach_launches(name: str, args: Sequence[Any], result: Any) -> int:
    """Count the launches of an operator on lists of tensors; one each where they do not fit."""
    lists = [arg for arg in args if isinstance(arg, list | tuple) and tensors_of(arg)]
    lists = [arg for arg in lists if isinstance(arg[0], Tensor)]
    if isinstance(result, list | tuple) and result:
        lists.append(result)
    if name.startswith("_fused"):  # the numbers of steps are no list of the kernel
        lists.pop()
    elif name != "_foreach_copy_" and not is_uniform(lists):
        return len(lists[0])
    launches = list_launches([x.numel() for x in lists[0] if x.numel()], len(lists))
    return launches + (name == "_foreach_norm")  # which adds up what its chunks leave


def product_flops(args: Sequence[Any]) -> int:
    """Count two FLOPs for each multiplication of a matrix product."""
    left, right = [x for x in args if isinstance(x, Tensor)][-2:]
    return 2 * left.numel() * right.size(-1)


def written(func: Any, args: Sequence[Any], result: Any) -> list[Tensor]:
    """List the tensors that an operator changes, or else gives."""
    schema = zip(func._schema.arguments, args, strict=False)
    changed = [arg for about, arg in schema if about.alias_info and about.alias_info.is_write]
    return tensors_of(changed) or tensors_of(result)


def launches_of(func: Any, args: Sequence[Any], result: Any) -> int:
    """Count the launches of an operator that reaches the device."""
    space, _, name = func._schema.name.partition("::")
    if space != "aten" or func.is_view or name in NO_KERNEL:
        return 0
    if name.startswith(("_foreach", "_fused")):
        return foreach_launches(name, args, result)
    if name in ("cat", "stack"):
        return math.ceil(len(args[0]) / CAT_TENSORS)
    return 1


@dataclasses.dataclass(frozen=True)
class Shape:
    """A tensor's shape, strides and type."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> "Shape":
        """Take the shape of a tensor."""
        return cls(tuple(x.shape), tuple(x.stride()), x.dtype)

    def empty(self) -> Tensor:
        """Make a tensor of this shape on the CPU."""
        return torch.empty_strided(self.sizes, self.strides, dtype=self.dtype)


def with_options(function: Callable, options: dict[str, Any], *args: Any) -> Any:
    """Call a function with arguments by name."""
    return function(*args, **options)


class Recorder(TorchDispatchMode):
    """Note the kernels of the operators that are called, with the lines that call them."""

    def __init__(self, script: str) -> None:
        super().__init__()
        self.script = script
        self.kernels: list[Kernel] = []
        self.calls: dict[Any, list[Any]] = {}  # of compiled functions, by their inputs' shapes
        self.paused = False

    def place(self) -> Place:
        """Give the lines of the script that are being run, the innermost one first."""
        lines = []
        frame = sys._getframe(1)
        while frame:
            if frame.f_code.co_filename == self.script:
                lines.append(frame.f_lineno)
            frame = frame.f_back
        return tuple(lines)

    def note(self, kind: str, name: str, launches: int, moved: list[int], flops: int = 0) -> None:
        """Add the launches of an operator that reads and writes so many bytes."""
        place = self.place()
        sides = [share(amount, launches) for amount in (*moved, flops)]
        for reads, writes, work in zip(*sides, strict=True):
            self.kernels.append(called_kernel(place, kind, name, reads, writes, work))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = tensors_of((args, kwargs))
        if self.paused or not (given or tensors_of(result)):
            return result
        if launches := launches_of(func, args, result):
            self.note_operator(func, args, given, result, launches)
        return result

    def note_operator(
        self, func: Any, args: tuple, given: list[Tensor], result: Any, launches: int
    ) -> None:
        """Note the kernels of an operator, and the bytes of the tensors that it takes and gives."""
        name = func._schema.name.partition("::")[2]
        changed = written(func, args, result)
        writes = distinct_bytes(changed)
        unread = {id(x) for x in changed} if name in NO_READ else set()
        made = name.startswith("new_") or name.endswith("_like")  # their input gives the shape
        given = [] if made else [x for x in given if id(x) not in unread]
        if name not in PRODUCTS:
            self.note("other", name, launches, [distinct_bytes(given), writes])
            return
        reads = distinct_bytes(given)
        if name in ADDING and args[0].ndim == args[1].ndim:
            self.note("other", f"copy for {name}", 1, [size_of(args[0]), writes])
            reads = distinct_bytes(args[1:3]) + writes
        self.note("product", name, 1, [reads, writes], product_flops(args))

    def watch(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a function that the script compiles, and note its call alone."""
        shapes = tree_map_only(Tensor, Shape.of, (args, kwargs))
        leaves = tuple(x if isinstance(x, Shape) else repr(x) for x in tree_leaves(shapes))
        self.calls.setdefault((function, leaves), []).append(shapes)
        self.paused = True
        try:
            return function(*args, **kwargs)
        finally:
            self.paused = False

    def add_compiled(self) -> None:
        """Count what the compiler makes of the functions that were called, once for each shape."""
        for (function, _), calls in self.calls.items():
            args, kwargs = tree_map_only(Shape, Shape.empty, calls[0])
            bound = functools.partial(with_options, function, kwargs)
            with torch.no_grad():
                graphs = traffic_compile.compile_functions(bound, args, self.script)
            self.kernels += [k for graph in graphs for k in graph.kernels] * len(calls)


# ============================ A STEP OF THE SCRIPT ============================


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Make a CUDA device of fake tensors."""
    idle = mock.MagicMock()  # a stream or an event, on which nothing waits
    with contextlib.ExitStack() as patches:
        for owner, name, new in (
            (torch, "compile", traffic_compile.noted_compile),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.cuda, "Event", lambda *_, **__: idle),
            (torch.cuda, "Stream", lambda *_, **__: idle),
            (torch.cuda, "current_stream", lambda *_: idle),
            (torch.cuda, "stream", contextlib.nullcontext),
            (torch.cuda, "synchronize", lambda *_: None),
            (Tensor, "pin_memory", lambda tensor: tensor),
            (Tensor, "record_stream", lambda *_: None),
        ):
            patches.enter_context(mock.patch.object(owner, name, new))
        patches.enter_context(idle_guard())
        patches.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def on_cuda(model: torch.nn.Module) -> torch.nn.Module:
    """Move a model of fake tensors, which Module.to cannot."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(p.detach().to(CUDA))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(CUDA)
    return model


def optimizer_step(tg: ModuleType, hp: Any) -> Callable[[int], Any]:
    """Make a function that takes a step with no micro-batch: all that is known of the Trainer."""
    run = tg.Run(dataclasses.replace(hp, device="cuda", attention="sdpa"))
    model = on_cuda(traffic_compile.build(tg, run.hp, run.dtype))
    trainer = traffic_compile.trainer_class(tg, run.hp)(model, model, None, run)
    trainer.batch = []
    trainer.accumulate = trainer.fetch = lambda *_: None
    return lambda step: trainer.step(step, 0.0)


def count_optimizer(tg: ModuleType, hp: Any) -> list[Kernel]:
    """Count the kernels of a step, but for its forward and backward passes and its loader.

    It is the second step, since the first one makes the optimizers' state.
    """
    with fake_cuda():
        step = optimizer_step(tg, hp)
        step(0)
        recorder = Recorder(tg.__file__)
        with traffic_compile.watched(recorder.watch), recorder:
            step(1)
    recorder.add_compiled()
    return recorder.kernels


def operator_rows(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """Add up kernels by operator, the one with most launches first."""
    rows: dict[tuple[str, str], Counter] = {}
    for kernel in kernels:
        row = rows.setdefault((kernel.kind, kernel.ops), Counter())
        row.update(launches=1, bytes_read=kernel.reads, bytes_written=kernel.writes)
    names = ("launches", "bytes_read", "bytes_written")
    found = [
        {"kind": kind, "operator": ops, **{name: row[name] for name in names}}
        for (kind, ops), row in rows.items()
    ]
    return sorted(found, key=lambda row: -row["launches"])
