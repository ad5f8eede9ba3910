"""traffic.py's counter: launches, bytes and FLOPs of the kernels of a compiled graph.

A kernel reads each element that it needs once and writes it once, as if caches were perfect; a
gather reads at most the whole table. So bytes are a floor.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import traffic_lines
from traffic_device import TrafficError
from traffic_lines import Charge, Ledger, Place

KINDS = {
    "triton": "Triton kernels",
    "product": "matrix products",
    "attention": "attention",
    "other": "other kernels and copies",
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mm_plus_mm"}
ADDING = {"addmm", "baddbmm"}  # PyTorch copies the addend, unless a vector, into the result first
COLUMNS = 4096  # of a buffer's rows, where the touched part of them is sampled
SAMPLES = 1 << 16
INDEX_OPS = {
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne", "and_", "or_")
} | {"logical_and": operator.and_, "logical_or": operator.or_}


@dataclasses.dataclass
class Kernel:
    """One launch: its kind, its name in the generated code, what it fuses, and its traffic."""

    kind: str
    name: str
    ops: str
    reads: int
    writes: int
    flops: int = 0
    charges: list[Charge] = dataclasses.field(default_factory=list, repr=False)


@dataclasses.dataclass
class Graph:
    """The forward or the backward pass as it was compiled."""

    name: str
    kernels: list[Kernel]
    code: str
    inductor_bytes: int
    saved: list[int] = dataclasses.field(default_factory=list)  # bytes, kept from the forward pass
    gradients: list[int] = dataclasses.field(default_factory=list)  # bytes, of the backward pass


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


def triton_traffic(graph: Any, parts: Sequence[Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Count the bytes that a Triton kernel of these parts reads and writes, by buffer.

    Accesses to one buffer need no more than their sum and the buffer. Where they are slices of it,
    shifted or masked, only the columns that are loaded tell their union.
    """
    reads, writes = kernel_accesses(graph, parts)
    masked = any(part._body.has_op("masked") for part in parts)
    unclear = {name for name, accesses in reads.items() if masked or len(accesses) > 1}
    shares = touched_columns(graph, parts, unclear) if unclear else {}
    return buffer_bytes(graph, reads, shares), buffer_bytes(graph, writes, {})


def dep_mode(dep: Any) -> str | None:
    """Give the way in which a dependency is written, if it is a special one."""
    return getattr(dep, "mode", None)


def buffer_bytes(graph: Any, buffers: dict[str, dict], shares: dict[str, float]) -> dict[str, int]:
    """Count the bytes of accesses to each of several buffers, of which shares are touched."""
    found = {}
    for name, accesses in buffers.items():
        touched = round(int(graph.get_numel(name)) * shares.get(name, 1.0))
        found[name] = min(sum(accesses.values()), touched) * graph.get_dtype(name).itemsize
    return found


def tensor_bytes(tensor: Any) -> int:
    """Count the bytes of a tensor or a view; an expanded dimension is there once."""
    sizes = zip(tensor.get_size(), tensor.get_stride(), strict=True)
    elements = math.prod(int(size) for size, stride in sizes if int(stride) != 0)
    return elements * tensor.get_dtype().itemsize


def distinct_bytes(tensors: Sequence[Any]) -> int:
    """Count the bytes of several tensors; a matrix and its transpose are there once."""
    places = {(x.get_name(), str(x.get_layout().offset)): tensor_bytes(x) for x in tensors}
    return sum(places.values())


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


def called_kernel(
    place: Place, kind: str, name: str, reads: int, writes: int, flops: int = 0
) -> Kernel:
    """Describe a kernel of one operator, which is charged to one place."""
    charge = Charge(place, Fraction(1), reads, writes, flops)
    return Kernel(kind, name, name, reads, writes, flops, [charge])


def extern_kernels(graph: Any, node: Any, script: str) -> list[Kernel]:
    """Describe a call of a kernel that Inductor does not generate, and the copy before it."""
    kernel = node.node
    inputs = [*flat(kernel.inputs)]
    op = kernel.op_overload
    name = op._overloadpacket.__name__ if op else kernel.get_kernel_name().split(".")[-1]
    kind = "other"
    flops = 0
    if name in PRODUCTS:
        kind = "product"
        flops = product_flops(name, inputs)
    elif op and op.namespace in ("traffic", "amx_attention"):  # whose is that of packed documents
        kind = "attention"
    outputs = [*flat(getattr(kernel, "outputs", None) or [])] or [kernel]
    changed = [graph.get_buffer(buffer) for buffer in kernel.get_mutation_names()]
    outputs = changed or outputs
    writes = sum(tensor_bytes(tensor) for tensor in outputs)
    copied = name in ADDING and len(inputs[0].get_size()) == len(kernel.get_size())
    reads = writes if copied else 0
    reads += distinct_bytes(inputs[1:] if copied else inputs)
    place = traffic_lines.place_of(traffic_lines.maker(kernel), script)
    kernels = [called_kernel(place, kind, name, reads, writes, flops)]
    if copied:
        addend = tensor_bytes(inputs[0])
        kernels.insert(0, called_kernel(place, "other", f"copy for {name}", addend, writes))
    return kernels


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


def triton_charges(
    parts: Sequence[Any], reads: dict[str, int], writes: dict[str, int], script: str
) -> Ledger:
    """Charge what a Triton kernel reads and writes to the places that load and store it."""
    ledger = Ledger()
    loading = traffic_lines.readers(parts, script)
    storing = traffic_lines.writers(parts, script)
    for name, amount in reads.items():  # what is added to in memory is read by who stores it
        ledger.add(ledger.reads, loading.get(name) or storing.get(name, []), amount)
    for name, amount in writes.items():
        ledger.add(ledger.writes, storing.get(name, []), amount)
    return ledger


def triton_kernels(graph: Any, node: Any, launch: Launch, script: str) -> list[Kernel]:
    """Describe a Triton kernel, and the sums over what it leaves in a workspace."""
    from torch._inductor.utils import get_fused_kernel_name

    ops = get_fused_kernel_name(node.get_nodes(), "original_aten").removeprefix("fused_")
    removed = graph.scheduler.removed_ops  # a workspace's sum takes their place
    parts = [part for part in node.get_nodes() if part.get_name() not in removed]
    summed = [part for part in parts if not part.read_writes.writes] or parts
    places = [traffic_lines.place_of(traffic_lines.maker(part.node), script) for part in summed]
    reads, writes = triton_traffic(graph, parts)
    ledger = triton_charges(parts, reads, writes, script)
    partial = sum(kernel.reads for kernel in launch.sums if kernel.name != "to")
    if partial:
        ledger.add(ledger.writes, places, partial)
    for kernel in launch.sums:
        own = Ledger()
        own.add(own.reads, places, kernel.reads)
        own.add(own.writes, places, kernel.writes)
        kernel.charges = own.charges()
    moved = (sum(reads.values()), sum(writes.values()) + partial)
    return [Kernel("triton", launch.name, ops, *moved, 0, ledger.charges()), *launch.sums]


def count_kernels(graph: Any, code: str, script: str) -> list[Kernel]:
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
            kernels += extern_kernels(graph, node, script)
        else:
            kernels += triton_kernels(graph, node, next(following), script)
    return kernels
