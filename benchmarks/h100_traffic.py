"""Count what PyTorch's compiler makes of train_gpt.py for an H100, on a machine without one.

    python benchmarks/h100_traffic.py [--config X.env] [NAME=VALUE ...] [--tokens 65536]
        [--forward] [--largest 12] [--out FILE.json] [--code FOLDER]

The compiler lowers the forward and backward pass of the model that the settings give, and generates
its code; nothing is run. Counted, for one micro-batch of --tokens tokens: kernels that are
launched, and bytes that they read and write. It needs triton, which is only imported.

How: Dynamo and AOTAutograd trace the model on a CPU, as one without a CUDA build must. Then the
graphs are moved to a pretended H100 and go through Inductor as always. Attention is one opaque
operator, which takes q, k and v and gives the output in the layouts that the model hands over.
rms_norm is the operator that PyTorch has for CUDA, not the formula that it has for CPUs.

What is counted: a kernel reads each element that it needs once and writes it once, as if caches
were perfect; a gather reads at most the whole table. So bytes are a floor too.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import operator
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import measure
from gpu_kit import git

import train_gpt as tg

ROOT = Path(tg.__file__).resolve().parent

# What an H100 reaches in practice. The floor of a kernel is its bytes or its FLOPs over these.
BYTES_PER_S = 3.0e12
PRODUCT_FLOPS_PER_S = 700e12
ATTENTION_FLOPS_PER_S = 500e12

KINDS = {
    "triton": "Triton kernels",
    "product": "matrix products",
    "attention": "attention",
    "other": "other kernels and copies",
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mm_plus_mm"}
COLUMNS = 4096  # of a buffer's rows, where the touched part of them is sampled
SAMPLES = 1 << 16
INDEX_OPS = {
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne", "and_", "or_")
} | {"logical_and": operator.and_, "logical_or": operator.or_}


class TrafficError(Exception):
    """What the user can put right: the message says what was wrong and what to do."""


# ================================== OPERATORS ==================================


@torch.library.custom_op("h100_traffic::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give the output, laid out as q is, and the logsumexp of the scores."""
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("h100_traffic::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of q, k and v, each laid out as its tensor is."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@torch.library.custom_op("h100_traffic::rms_norm", mutates_args=())
def rms_norm(x: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """Give the normed tensor and the reciprocal root of the mean square."""
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("h100_traffic::rms_norm_backward", mutates_args=())
def rms_norm_backward(gradient: Tensor, x: Tensor, width: int, rstd: Tensor) -> Tensor:
    """Give the gradient of x."""
    return torch.empty_like(x)


def keep_attention(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Save what attention's backward pass needs."""
    ctx.save_for_backward(*inputs, *output)


def differentiate_attention(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, ...]:
    """Give the gradients of q, k and v."""
    return attention_backward(gradient, *ctx.saved_tensors)


def keep_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Save what rms_norm's backward pass needs."""
    x, ctx.width, _ = inputs
    ctx.save_for_backward(x, output[1])


def differentiate_norm(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None, None]:
    """Give the gradient of x alone."""
    x, rstd = ctx.saved_tensors
    return rms_norm_backward(gradient, x, ctx.width, rstd), None, None


for own in (attention, attention_backward, rms_norm, rms_norm_backward):
    own.register_fake(own._init_fn)
attention.register_autograd(differentiate_attention, setup_context=keep_attention)
rms_norm.register_autograd(differentiate_norm, setup_context=keep_norm)


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    """Stand in for F.scaled_dot_product_attention."""
    return attention(q, k, v)[0]


def cuda_rms_norm(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Stand in for F.rms_norm, over one dimension and without a weight."""
    if weight is not None or len(shape) != 1:
        raise TrafficError("rms_norm with a weight or over several dimensions: teach cuda_rms_norm")
    return rms_norm(x, shape[0], torch.finfo(x.dtype).eps if eps is None else eps)[0]


def decompositions() -> dict[Any, Callable]:
    """Give the compiler's table, with PyTorch's formulas for rms_norm on CUDA."""
    from torch._decomp import decomposition_table
    from torch._inductor.decomposition import select_decomp_table

    aten = torch.ops.aten
    forward = decomposition_table[aten._fused_rms_norm.default]
    backward = decomposition_table[aten._fused_rms_norm_backward.default]

    def norm(x: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
        return forward(x, [width], None, eps)

    def norm_backward(gradient: Tensor, x: Tensor, width: int, rstd: Tensor) -> Tensor:
        return backward(gradient, x, [width], rstd, None, [True, False])[0]

    operators = torch.ops.h100_traffic
    own = {operators.rms_norm.default: norm, operators.rms_norm_backward.default: norm_backward}
    return {**select_decomp_table(), **own}


# ============================ A MACHINE WITH AN H100 ============================

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)


# The table's name in c10, and the numbers of two types of devices there.
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
CUDA = 1
META = 14


class Driver:
    """What Triton's driver says of the device."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True


def answers() -> list[tuple[Any, str, Any]]:
    """List what is asked of the device: owner, name, and what is answered instead."""
    from torch._dynamo.device_interface import CudaInterface

    def always(value: Any) -> Callable:
        return lambda *_, **__: value

    cuda = {
        "is_available": True,
        "is_initialized": True,
        "_lazy_init": None,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": H100.name,
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "synchronize": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": torch.get_rng_state(),
        "set_rng_state": None,
    }
    interface = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "get_compute_capability": 90,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "is_bf16_supported": True,
        "synchronize": None,
        "set_device": None,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "get_raw_stream": 0,
    }
    worker = {"get_device_properties": H100, "current_device": 0}
    found = [(torch.version, "cuda", "13.0")]
    found += [(torch.cuda, name, always(value)) for name, value in cuda.items()]
    for owner, table in ((CudaInterface, interface), (CudaInterface.Worker, worker)):
        found += [(owner, name, staticmethod(always(value))) for name, value in table.items()]
    return found


def guard_table() -> Any:
    """Give PyTorch's table of what switches devices, by type of device."""
    (path,) = (Path(torch.__file__).parent / "lib").glob("libc10.*")  # .so, on a Mac .dylib
    return (ctypes.c_void_p * (META + 1)).in_dll(ctypes.CDLL(str(path)), GUARDS)


@contextlib.contextmanager
def idle_guard() -> Iterator[None]:
    """Let a PyTorch without CUDA compute the shapes of tensors that are said to be there.

    Some operators switch to their tensor's device first, and fail where there is no way to. Fake
    tensors have PyTorch do nothing then, but only in a CUDA build; this does it in the others.
    """
    table = guard_table()
    before = table[CUDA]
    table[CUDA] = before or table[META]
    try:
        yield
    finally:
        table[CUDA] = before


@contextlib.contextmanager
def pretended_h100() -> Iterator[None]:
    """Answer questions about the device as an H100 would."""
    import torch.utils._triton
    from torch._inductor import scheduler
    from triton.runtime import driver

    with contextlib.ExitStack() as patches:
        for owner, name, answer in answers():
            patches.enter_context(mock.patch.object(owner, name, answer))
        for owner in (torch.utils._triton, scheduler):  # "no" may be cached since the trace
            patches.enter_context(mock.patch.object(owner, "has_triton", return_value=True))
        patches.enter_context(mock.patch.object(driver, "_active", Driver()))
        yield


# ================================== COUNTING ==================================


@dataclasses.dataclass
class Kernel:
    """One launch: its kind, its name in the generated code, what it fuses, and its traffic."""

    kind: str
    name: str
    ops: str
    reads: int
    writes: int
    flops: int = 0


@dataclasses.dataclass
class Graph:
    """The forward or the backward pass as it was compiled."""

    name: str
    kernels: list[Kernel]
    code: str
    inductor_bytes: int


class Unknown:
    """A value that depends on data."""

    def __getitem__(self, _: Any) -> "Unknown":
        return self


def evaluate(index: Any, samples: dict[Any, Any]) -> Any:
    """Give an index at sampled iterations; Unknown if it depends on data."""
    import sympy
    from torch.utils._sympy.functions import Identity

    functions = {
        "FloorDiv": lambda x, by: x // by,
        "ModularIndexing": lambda x, by, size: x // by % size,
    }
    plain = sympy.sympify(index).replace(Identity, lambda inner: inner)
    names = sorted(plain.free_symbols, key=str)
    if not samples.keys() >= {*names}:
        return Unknown()
    values = sympy.lambdify(names, plain, modules=[functions, "numpy"])
    return np.broadcast_to(values(*(samples[name] for name in names)), SAMPLES)


@functools.cache
def column_reader() -> type:
    """Make the class that runs a kernel's body and notes which columns it loads.

    Of what the body computes it knows what masks are made of: indices and their comparison.
    """
    import sympy
    from torch._inductor.ops_handler import DefaultHandler

    class ColumnReader(DefaultHandler):
        def __init__(self, samples: dict[Any, Any], touched: dict[str, Any]) -> None:
            self.samples = samples
            self.touched = touched
            self.masks = [np.ones(SAMPLES, dtype=bool)]

        def _default(self, name: str, args: tuple, kwargs: dict) -> Any:
            known = not any(isinstance(value, Unknown) for value in args)
            return INDEX_OPS[name](*args[:2]) if name in INDEX_OPS and known else Unknown()

        def index_expr(self, index: Any, dtype: Any) -> Any:
            return evaluate(index, self.samples)

        value_expr = index_expr

        def constant(self, value: Any, dtype: Any) -> Any:
            return value

        def to_dtype(self, value: Any, *_: Any, **__: Any) -> Any:
            return value

        def masked(self, mask: Any, body: Callable, other: Any) -> Any:
            within = self.masks[-1] & (True if isinstance(mask, Unknown) else mask)
            self.masks.append(within)
            body()
            self.masks.pop()
            return Unknown()

        def load(self, name: str, index: Any) -> Any:
            if name in self.touched:
                columns = self.touched[name]
                places = evaluate(index, self.samples)
                if isinstance(places, Unknown):
                    columns[:] = True
                else:
                    columns[places[self.masks[-1]] % len(columns)] = True
            return Unknown()

        def indirect_indexing(self, value: Any, *_: Any, **__: Any) -> Any:
            return sympy.Symbol("unknown")

    return ColumnReader


def touched_columns(graph: Any, parts: Sequence[Any], names: set[str]) -> dict[str, float]:
    """Sample which share of the columns of buffers the parts of a kernel load."""
    from torch._inductor.virtualized import V

    rng = np.random.default_rng(0)
    lengths = {name: row_length(graph.get_buffer(name).get_stride()) for name in names}
    touched = {name: np.zeros(length, dtype=bool) for name, length in lengths.items()}
    for part in parts:
        if names & {dep.name for dep in part.read_writes.reads}:
            body = part._body
            ranges = body.var_ranges.items()
            samples = {name: rng.integers(0, int(size), SAMPLES) for name, size in ranges}
            with V.set_ops_handler(column_reader()(samples, touched)):
                body(body.iter_vars, body.reduce_vars, allow_same_symbol_in_index=True)
    return {name: float(columns.mean()) for name, columns in touched.items()}


def row_length(strides: Sequence[Any]) -> int:
    """Give the largest stride that is not over COLUMNS."""
    return max((int(stride) for stride in strides if int(stride) <= COLUMNS), default=1)


def accessed_elements(graph: Any, access: Any, iterations: int) -> int:
    """Count the elements of one access; one through an index reads one in each iteration."""
    elements = int(access.get_numel())
    return min(elements, iterations) if access.is_indirect() else elements


def part_accesses(part: Any) -> Iterator[tuple[bool, Any]]:
    """Yield the accesses of a part of a kernel, and whether each one writes."""
    from torch._inductor.dependencies import MemoryDep, StarDep

    changed = {name for output in part.get_outputs() for name in output.get_mutations()}
    for access in part.read_writes.writes:
        yield True, access
        if dep_mode(access) == "atomic_add":
            yield False, access
    for access in part.read_writes.reads:
        if isinstance(access, MemoryDep):
            yield False, access
        elif isinstance(access, StarDep) and access.name not in changed:
            yield False, access  # of what it changes, it only says that it comes after


def kernel_accesses(graph: Any, parts: Sequence[Any]) -> tuple[dict, dict]:
    """List what the parts of a kernel read and write: for each buffer accesses and elements."""
    local = graph.removed_buffers | graph.inplaced_to_remove  # never stored
    reads: dict[str, dict[Any, int]] = {}
    writes: dict[str, dict[Any, int]] = {}
    for part in parts:
        iterations = math.prod(int(size) for sizes in part.get_ranges() for size in sizes)
        for is_write, access in part_accesses(part):
            if access.name not in local:
                access = access.normalize() if hasattr(access, "normalize") else access
                side = writes if is_write else reads
                elements = accessed_elements(graph, access, iterations)
                side.setdefault(access.name, {})[access] = elements
    made = {name for name in writes if not any(dep_mode(dep) for dep in writes[name])}
    for name in made & reads.keys():  # they are still at hand
        del reads[name]
    return reads, writes


def triton_traffic(graph: Any, node: Any) -> tuple[int, int]:
    """Count the bytes that a Triton kernel reads and writes.

    Accesses to one buffer need no more than their sum and the buffer. Where they are slices of it,
    shifted or masked, only the columns that are loaded tell their union.
    """
    removed = graph.scheduler.removed_ops  # a workspace's sum takes their place
    parts = [part for part in node.get_nodes() if part.get_name() not in removed]
    reads, writes = kernel_accesses(graph, parts)
    masked = any(part._body.has_op("masked") for part in parts)
    unclear = {name for name, accesses in reads.items() if masked or len(accesses) > 1}
    shares = touched_columns(graph, parts, unclear) if unclear else {}
    return buffer_bytes(graph, reads, shares), buffer_bytes(graph, writes, {})


def dep_mode(dep: Any) -> str | None:
    """Give the way in which a dependency is written, if it is a special one."""
    return getattr(dep, "mode", None)


def buffer_bytes(graph: Any, buffers: dict[str, dict], shares: dict[str, float]) -> int:
    """Add up the bytes of accesses to several buffers, of which shares are touched."""
    total = 0
    for name, accesses in buffers.items():
        touched = round(int(graph.get_numel(name)) * shares.get(name, 1.0))
        total += min(sum(accesses.values()), touched) * graph.get_dtype(name).itemsize
    return total


def tensor_bytes(tensor: Any) -> int:
    """Count the bytes of a tensor or a view; an expanded dimension is there once."""
    sizes = zip(tensor.get_size(), tensor.get_stride(), strict=True)
    elements = math.prod(int(size) for size, stride in sizes if int(stride) != 0)
    return elements * tensor.get_dtype().itemsize


def flat(items: Any) -> Iterator[Any]:
    """Yield the tensors of nested lists."""
    for item in items:
        if isinstance(item, list | tuple):
            yield from flat(item)
        elif item is not None:
            yield item


def product_flops(name: str, inputs: Sequence[Any]) -> int:
    """Count two FLOPs for each multiplication of a matrix product."""
    pairs = [inputs[:2], inputs[2:]] if name == "mm_plus_mm" else [inputs[-2:]]
    flops = 0
    for left, right in pairs:
        rows = math.prod(int(size) for size in left.get_size())
        flops += 2 * rows * int(right.get_size()[-1])
    return flops


def extern_kernel(graph: Any, node: Any) -> Kernel:
    """Describe a call of a kernel that Inductor does not generate."""
    kernel = node.node
    inputs = [*flat(kernel.inputs)]
    op = kernel.op_overload
    name = op._overloadpacket.__name__ if op else kernel.get_kernel_name().split(".")[-1]
    kind = "other"
    flops = 0
    if name in PRODUCTS:
        kind = "product"
        flops = product_flops(name, inputs)
    elif op and op.namespace == "h100_traffic":
        kind = "attention"
    outputs = [*flat(getattr(kernel, "outputs", None) or [])] or [kernel]
    changed = [graph.get_buffer(buffer) for buffer in kernel.get_mutation_names()]
    outputs = changed or outputs
    reads = sum(tensor_bytes(tensor) for tensor in inputs)
    writes = sum(tensor_bytes(tensor) for tensor in outputs)
    return Kernel(kind, name, name, reads, writes, flops)


@dataclasses.dataclass
class Launch:
    """A Triton kernel that the code launches, and the sums of what it leaves in a workspace."""

    name: str
    sums: list[Kernel]


def workspace_sum(line: str) -> list[Kernel]:
    """Describe the kernels of a line that adds up a workspace's rows, and may cast the sum."""
    found = re.search(r"= workspace_\d+\[.*\.view\((\d+), (\d+)\)\.(\w+)\(dim=0\)", line)
    if not found:
        return []
    rows = int(found[1])
    columns = int(found[2])
    op = found[3]
    kernels = [Kernel("other", op, f"{op} of a workspace", 4 * rows * columns, 4 * columns)]
    if cast := re.search(r"\.to\(torch\.(\w+)\)", line):
        size = getattr(torch, cast[1]).itemsize
        kernels.append(Kernel("other", "to", "cast of a sum", 4 * columns, size * columns))
    return kernels


def read_launches(code: str) -> list[Launch]:
    """Read the launches of Triton kernels from generated code, in their order."""
    launches: list[Launch] = []
    for line in code.splitlines():
        if found := re.match(r" +(triton_\w+)\.run\(", line):
            launches.append(Launch(found[1], []))
        elif launches:
            launches[-1].sums += workspace_sum(line)
    return launches


def is_launched(graph: Any, node: Any) -> bool:
    """Tell whether a node is more than a name: not empty, unpacked, or made part of a sum."""
    from torch._inductor import ir
    from torch._inductor.scheduler import NopKernelSchedulerNode

    removed = graph.scheduler.removed_ops.issuperset(node.get_operation_names())
    nothing = isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput)
    return not removed and not nothing


def triton_kernels(graph: Any, node: Any, launch: Launch) -> list[Kernel]:
    """Describe a Triton kernel, and the sums over what it leaves in a workspace."""
    from torch._inductor.utils import get_fused_kernel_name

    ops = get_fused_kernel_name(node.get_nodes(), "original_aten").removeprefix("fused_")
    reads, writes = triton_traffic(graph, node)
    writes += sum(kernel.reads for kernel in launch.sums if kernel.name != "to")
    return [Kernel("triton", launch.name, ops, reads, writes), *launch.sums]


def count_kernels(graph: Any, code: str) -> list[Kernel]:
    """Count each kernel of a graph whose code has been generated, in the order of launches."""
    launches = read_launches(code)
    nodes = [node for node in graph.scheduler.nodes if is_launched(graph, node)]
    generated = [node for node in nodes if not node.is_extern()]
    if len(generated) != len(launches):
        problem = f"the code launches {len(launches)} Triton kernels, the graph {len(generated)}"
        raise TrafficError(f"{problem}: teach count_kernels what the compiler does now")
    following = iter(launches)
    kernels = []
    for node in nodes:
        if node.is_extern():
            kernels.append(extern_kernel(graph, node))
        else:
            kernels += triton_kernels(graph, node, next(following))
    return kernels


# ================================== COMPILING ==================================


class RanError(Exception):
    """The compiled model was called: all that was to be compiled has been."""


class GeneratedError(Exception):
    """The code of a graph, which is not to be loaded."""


def stop_at_code(lowering: Any) -> None:
    """Generate a graph's code in place of loading it."""
    code = lowering.codegen()[0].value
    name = "backward" if lowering.is_backward else "forward"
    kernels = count_kernels(lowering, code)
    raise GeneratedError(Graph(name, kernels, code, lowering.count_bytes()[0]))


def move_to_h100(module: Any, inputs: Sequence[Any]) -> list[Any]:
    """Have a graph make its tensors on the H100, and give its inputs there."""
    from torch._dynamo.utils import detect_fake_mode
    from torch.utils._pytree import tree_map_only

    def moved(value: Tensor) -> Tensor:
        options = {"dtype": value.dtype, "device": "cuda"}
        return torch.empty_strided(value.shape, value.stride(), **options)

    for node in module.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    module.recompile()
    with detect_fake_mode(inputs):
        return tree_map_only(Tensor, moved, [*inputs])


def compile_functions(function: Callable, inputs: Sequence[Tensor]) -> list[Graph]:
    """Compile a function of CPU tensors for an H100: its forward and, if needed, backward graph."""
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    graphs = []

    def inner(module: Any, inputs: Sequence[Any], **options: Any) -> Callable:
        placed = move_to_h100(module, inputs)
        loading = mock.patch.object(GraphLowering, "compile_to_module", stop_at_code)
        quiet = V.set_debug_handler(DebugContext())
        options["cudagraphs"] = compile_fx.BoxedBool(False)
        try:
            with pretended_h100(), idle_guard(), loading, quiet:
                compile_fx.fx_codegen_and_compile(module, placed, [], **options)
        except GeneratedError as done:
            graphs.append(done.args[0])
        return run

    def run(*_: Any) -> None:
        raise RanError

    def backend(module: Any, inputs: Sequence[Any]) -> Callable:
        table = decompositions()
        return compile_fx.compile_fx(module, inputs, inner_compile=inner, decompositions=table)

    eager = torch._functorch.config.patch(
        force_non_lazy_backward_lowering=True, enable_autograd_cache=False
    )
    alone = torch._inductor.config.patch(compile_threads=1)
    with eager, alone, contextlib.suppress(RanError):
        torch.compile(function, backend=backend, dynamic=False, fullgraph=True)(*inputs)
    return graphs


@contextlib.contextmanager
def cuda_operators() -> Iterator[None]:
    """Have models call the operators above."""
    functional = torch.nn.functional
    attend = mock.patch.object(
        functional, "scaled_dot_product_attention", scaled_dot_product_attention
    )
    norm = mock.patch.object(functional, "rms_norm", cuda_rms_norm)
    with attend, norm:
        yield


def compile_model(hp: tg.Hyperparameters, tokens: int, forward_only: bool) -> list[Graph]:
    """Compile the model of the settings for one micro-batch."""
    length = hp.train_seq_len
    if tokens < length or tokens % length:
        problem = f"--tokens {tokens}: expected a multiple of TRAIN_SEQ_LEN={length}"
        raise TrafficError(problem)
    model = tg.GPT(hp, torch.bfloat16)
    inputs = torch.zeros(tokens // length, length, dtype=torch.int64)
    with cuda_operators(), torch.set_grad_enabled(not forward_only):
        return compile_functions(model, [inputs, inputs.clone()])


# =================================== REPORT ===================================


def summarize(kernels: Sequence[Kernel]) -> dict[str, dict[str, int]]:
    """Add up kernels by kind."""
    found = {}
    for kind in KINDS:
        same = [kernel for kernel in kernels if kernel.kind == kind]
        found[kind] = {
            "launches": len(same),
            "unique": len({kernel.name for kernel in same}),
            "bytes_read": sum(kernel.reads for kernel in same),
            "bytes_written": sum(kernel.writes for kernel in same),
            "flops": sum(kernel.flops for kernel in same),
        }
    return found


def attention_flops(hp: tg.Hyperparameters, tokens: int, forward_only: bool) -> int:
    """Count attention's part of measure.flops_per_token."""
    forward = measure.attention_flops_per_token(hp) * tokens
    return forward if forward_only else 3 * forward


def product_seconds(kernel: Kernel) -> float:
    """Give the floor of a matrix product: arithmetic or memory."""
    moved = kernel.reads + kernel.writes
    return max(kernel.flops / PRODUCT_FLOPS_PER_S, moved / BYTES_PER_S)


def floor_ms(kernels: Sequence[Kernel], flops: int) -> dict[str, float]:
    """Give the milliseconds that each kind takes at least, attention by its FLOPs."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for kernel in kernels:
        if kernel.kind == "product":
            seconds["product"] += product_seconds(kernel)
        elif kernel.kind != "attention":
            seconds[kernel.kind] += (kernel.reads + kernel.writes) / BYTES_PER_S
    seconds["attention"] = flops / ATTENTION_FLOPS_PER_S
    found = {kind: 1e3 * value for kind, value in seconds.items()}
    return {**found, "all": sum(found.values())}


def group_kernels(graphs: Sequence[Graph]) -> list[dict[str, Any]]:
    """Put kernels that are alike together, those that move most bytes first."""
    alike = Counter()
    for graph in graphs:
        for kernel in graph.kernels:
            alike[graph.name, *dataclasses.astuple(kernel)] += 1
    names = ("graph", *(field.name for field in dataclasses.fields(Kernel)))
    groups = [
        {**dict(zip(names, key, strict=True)), "launches": count} for key, count in alike.items()
    ]
    return sorted(groups, key=lambda group: -group["launches"] * (group["reads"] + group["writes"]))


def commit() -> str:
    """Name the commit of the checkout, and say if files differ from it."""
    changed = git("status", "-s", "-uno")
    return (git("rev-parse", "HEAD") or "unknown") + (" with changes" if changed else "")


def make_report(args: argparse.Namespace, hp: tg.Hyperparameters, graphs: list[Graph]) -> dict:
    """Put together what was counted, of what, and with which versions."""
    import triton

    kernels = [kernel for graph in graphs for kernel in graph.kernels]
    flops = attention_flops(hp, args.tokens, args.forward)
    per_token = measure.flops_per_token(hp, args.forward)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    versions["triton"] = triton.__version__
    totals = summarize(kernels)
    totals["attention"]["flops"] = flops
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": versions,
        "settings": {name: getattr(hp, name.lower()) for name in sorted(hp.given)},
        "tokens": args.tokens,
        "model_flops": per_token * args.tokens,
        "totals": totals,
        "floor_ms": floor_ms(kernels, flops),
        "floor_by": {
            "bytes_per_s": BYTES_PER_S,
            "product_flops_per_s": PRODUCT_FLOPS_PER_S,
            "attention_flops_per_s": ATTENTION_FLOPS_PER_S,
        },
        "inductor_bytes": {graph.name: graph.inductor_bytes for graph in graphs},
        "graphs": {graph.name: summarize(graph.kernels) for graph in graphs},
        "kernels": group_kernels(graphs),
    }


def totals_table(report: dict) -> list[str]:
    """Write the table of kinds."""
    lines = ["| kind | launches | unique | GB read | GB written | TFLOP | floor, ms |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for kind, title in KINDS.items():
        row = report["totals"][kind]
        read = row["bytes_read"] / 1e9
        written = row["bytes_written"] / 1e9
        unique = row["unique"] if kind == "triton" else ""
        cells = f"{row['launches']} | {unique} | {read:.2f} | {written:.2f} | "
        cells += f"{row['flops'] / 1e12:.2f} | {report['floor_ms'][kind]:.1f}"
        lines.append(f"| {title} | {cells} |")
    return lines


def largest_table(report: dict, count: int) -> list[str]:
    """Write the table of the Triton kernels that move most bytes."""
    lines = ["| graph | launches | MB read | MB written | GB in all | fuses |"]
    lines += ["|---|---|---|---|---|---|"]
    triton = [group for group in report["kernels"] if group["kind"] == "triton"]
    for group in triton[:count]:
        reads = group["reads"]
        writes = group["writes"]
        launches = group["launches"]
        cells = f"{launches} | {reads / 1e6:.1f} | {writes / 1e6:.1f} | "
        cells += f"{launches * (reads + writes) / 1e9:.2f} | {group['ops']}"
        lines.append(f"| {group['graph']} | {cells} |")
    return lines


def describe(report: dict, count: int) -> str:
    """Write the report for a reader."""
    counted = sum(row["bytes_read"] + row["bytes_written"] for row in report["totals"].values())
    own = sum(report["inductor_bytes"].values())
    lines = [f"One micro-batch of {report['tokens']:,} tokens, by {report['versions']}", ""]
    lines += totals_table(report)
    lines += [
        "",
        f"{counted / 1e9:.2f} GB in all; Inductor's own count, coarser: {own / 1e9:.2f} GB.",
        f"Model FLOPs, by measure.flops_per_token: {report['model_flops'] / 1e12:.2f} TFLOP.",
        f"Not under {report['floor_ms']['all']:.1f} ms on an H100: a floor, not a time. It takes",
        f"{BYTES_PER_S / 1e12:g} TB/s; for a product the larger of bytes over that and FLOPs over",
        f"{PRODUCT_FLOPS_PER_S / 1e12:g} TFLOP/s; for attention FLOPs over",
        f"{ATTENTION_FLOPS_PER_S / 1e12:g} TFLOP/s; no launch, no gap. Nothing ran on a GPU.",
        "",
        f"The {count} groups of Triton kernels that move most bytes:",
        "",
    ]
    return "\n".join([*lines, *largest_table(report, count)])


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="of train_gpt.py")
    parser.add_argument("--config", help="dotenv file with settings")
    parser.add_argument("--tokens", type=int, default=65536, help="of the micro-batch")
    parser.add_argument("--forward", action="store_true", help="no backward pass, as in scoring")
    parser.add_argument("--largest", type=int, default=12, help="Triton kernels in the table")
    parser.add_argument("--out", type=Path, help="write all that was counted to this JSON file")
    parser.add_argument("--code", type=Path, help="write the generated code to this folder")
    args = parser.parse_args(arguments)
    if wrong := [text for text in args.settings if "=" not in text]:
        parser.error(f"{wrong[0]}: expected NAME=VALUE")
    return args


def main(arguments: list[str]) -> None:
    """Compile, count, print, and write what was asked for."""
    args = read_arguments(arguments)
    if importlib.util.find_spec("triton") is None:
        raise TrafficError("triton cannot be imported: pip install --no-deps triton==3.6.0")
    config = {"CONFIG": args.config} if args.config else {}
    given = dict(text.split("=", 1) for text in args.settings)
    hp = tg.load_settings({**os.environ, **config, **given}, check_places=False)
    graphs = compile_model(hp, args.tokens, args.forward)
    report = make_report(args, hp, graphs)
    print(describe(report, args.largest))
    if args.code:
        args.code.mkdir(parents=True, exist_ok=True)
        for graph in graphs:
            (args.code / f"{graph.name}.py").write_text(graph.code, encoding="utf-8")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (TrafficError, tg.UserError, OSError) as problem:
        sys.exit(f"h100_traffic.py: error: {problem}")
