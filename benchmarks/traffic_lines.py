"""traffic.py's charges: which lines of a script cause the launches and bytes of a kernel.

The compiler fuses operators, but each keeps the place of the call that made it; those of the
backward pass have the place of the forward operator that they differentiate. A read is charged to
the operators that load the buffer, a write to the one that stores it, both evenly where there are
several, and a launch evenly to all operators of the kernel that load or store.
"""

import ast
import contextlib
import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

Place = tuple[int, ...]  # lines of the script: the one that calls the operator, then its callers
ELSEWHERE: Place = ()
FRAME = re.compile(r'File "(.+)", line (\d+), in ')


@dataclasses.dataclass(frozen=True)
class Charge:
    """A place's part of a kernel."""

    place: Place
    launches: Fraction
    reads: int
    writes: int
    flops: int = 0


def share(amount: int, count: int) -> list[int]:
    """Divide a whole number into whole parts that are as even as can be and add up to it."""
    least, more = divmod(amount, count)
    return [least + (index < more) for index in range(count)]


class Ledger:
    """The charges of one kernel, by place."""

    def __init__(self) -> None:
        self.reads: Counter[Place] = Counter()
        self.writes: Counter[Place] = Counter()
        self.flops: Counter[Place] = Counter()

    def add(self, side: Counter[Place], places: Sequence[Place], amount: int) -> None:
        """Charge an amount evenly to places."""
        distinct = sorted(set(places)) or [ELSEWHERE]
        for place, part in zip(distinct, share(amount, len(distinct)), strict=True):
            side[place] += part

    def charges(self) -> list[Charge]:
        """List what each place is charged, and its part of the launch."""
        places = sorted({*self.reads, *self.writes, *self.flops}) or [ELSEWHERE]
        part = Fraction(1, len(places))
        sides = (self.reads, self.writes, self.flops)
        return [Charge(place, part, *(side[place] for side in sides)) for place in places]


# ============================ PLACES OF OPERATORS ============================


def trace_of(node: Any) -> str:
    """Give the stack trace of a graph's node, or of the nearest one that uses it or that it uses.

    What the compiler puts in place of other operators has none.
    """
    seen = {node}
    queue = [node]
    for near in queue:
        if trace := near.meta.get("stack_trace"):
            return trace
        new = [n for n in (*near.users, *near.all_input_nodes) if n not in seen]
        seen.update(new)
        queue += new
    return ""


@functools.cache
def lines_of(trace: str, script: str) -> Place:
    """Read the lines of a script in a stack trace, the innermost one first."""
    found = [int(line) for file, line in FRAME.findall(trace) if file == script]
    return tuple(reversed(found))


def place_of(node: Any, script: str) -> Place:
    """Give the lines that made an operator."""
    return lines_of(trace_of(node), script) if node is not None else ELSEWHERE


@functools.cache
def functions(script: str) -> dict[int, str]:
    """Name the function of each line of a script that is in one."""
    names: dict[int, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{prefix}{child.name}."
                lines = range(child.lineno, child.end_lineno + 1)
                names.update(dict.fromkeys(lines, inner[:-1]))
            visit(child, inner)

    with contextlib.suppress(OSError, SyntaxError):  # a function that was typed in
        visit(ast.parse(Path(script).read_text(encoding="utf-8")), "")
    return names


@functools.cache
def texts(script: str) -> list[str]:
    """Read the lines of a script; none of what is no file."""
    with contextlib.suppress(OSError):
        return Path(script).read_text(encoding="utf-8").splitlines()
    return []


# ========================= OPERATORS OF A FUSED KERNEL =========================

OPEN: list[Any] = []  # nodes whose part of a kernel is being computed, the innermost one last


@dataclasses.dataclass
class Part:
    """The computation of one operator, which may be fused into that of another."""

    function: Callable[..., Any]
    node: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        OPEN.append(self.node)
        try:
            return self.function(*args, **kwargs)
        finally:
            OPEN.pop()


@contextlib.contextmanager
def noted_makers() -> Iterator[None]:
    """Have what the compiler makes of an operator know its node, as `made_by`."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    made = ir.IRNode.__post_init__

    def note(self: Any) -> None:
        made(self)
        node = getattr(V.graph, "current_node", None)
        self._post_init_setattr("made_by", node)
        if isinstance(self, ir.Loops) and not isinstance(self.inner_fn, Part):
            self._post_init_setattr("inner_fn", Part(self.inner_fn, node))

    with mock.patch.object(ir.IRNode, "__post_init__", note):
        yield


def maker(operation: Any) -> Any:
    """Give the node that an operation, or the loops that it consists of, was made by."""
    return getattr(getattr(operation, "data", operation), "made_by", None)


@functools.cache
def load_reader() -> type:
    """Make the class that runs an operation and notes which node loads each buffer."""
    import sympy
    from torch._inductor.ops_handler import DefaultHandler

    class LoadReader(DefaultHandler):
        def __init__(self, loads: dict[str, set[Any]]) -> None:
            self.loads = loads

        def _default(self, name: str, args: tuple, kwargs: dict) -> Any:
            return None

        def load(self, name: str, index: Any) -> None:
            self.loads.setdefault(name, set()).add(OPEN[-1])

        def masked(self, mask: Any, body: Callable, other: Any) -> None:
            body()

        def indirect_indexing(self, value: Any, *_: Any, **__: Any) -> Any:
            return sympy.Symbol("unknown")

    return LoadReader


def loads_of(operation: Any) -> dict[str, set[Any]]:
    """Find which nodes load each buffer that an operation reads."""
    from torch._inductor.ir import FlexibleLayout
    from torch._inductor.virtualized import V

    loads: dict[str, set[Any]] = {}
    indexing = mock.patch.object(FlexibleLayout, "allow_indexing", True)
    with V.set_ops_handler(load_reader()(loads)), indexing:
        operation.data.inner_fn(*operation.data.inner_fn_args())
    return loads


def readers(parts: Sequence[Any], script: str) -> dict[str, list[Place]]:
    """Find the places that load each buffer of a kernel's parts.

    A buffer without one is an index of a scatter, or has another name since it was changed: the
    parts that read it stand for it.
    """
    found: dict[str, list[Place]] = {}
    for part in parts:
        loads = loads_of(part.node)
        own = place_of(maker(part.node), script)
        for name in {access.name for access in part.read_writes.reads}:
            nodes = loads.get(name, ())
            places = [place_of(node, script) for node in nodes] or [own]
            found.setdefault(name, []).extend(places)
    return found


def writers(parts: Sequence[Any], script: str) -> dict[str, list[Place]]:
    """Find the places that store each buffer of a kernel's parts."""
    found: dict[str, list[Place]] = {}
    for part in parts:
        for access in part.read_writes.writes:
            found.setdefault(access.name, []).append(place_of(maker(part.node), script))
    return found


# ================================ TABLES ================================


def add_up(rows: dict[Any, Counter], key: Any, charge: Charge) -> None:
    """Add a charge to the row of a key."""
    row = rows.setdefault(key, Counter())
    row["launches"] += charge.launches
    row["bytes_read"] += charge.reads
    row["bytes_written"] += charge.writes
    row["flops"] += charge.flops


def sorted_rows(rows: dict[Any, Counter]) -> list[tuple[Any, dict[str, Any]]]:
    """Put rows in order, those that move most bytes first, with their share of all bytes."""

    def moved(row: Counter) -> int:
        return row["bytes_read"] + row["bytes_written"]

    total = sum(map(moved, rows.values())) or 1
    found = []
    for key, row in sorted(rows.items(), key=lambda item: (-moved(item[1]), str(item[0]))):
        plain = {name: row[name] for name in ("launches", "bytes_read", "bytes_written", "flops")}
        plain["launches"] = round(float(row["launches"]), 6)
        found.append((key, {**plain, "share": moved(row) / total}))
    return found


def line_rows(charges: Sequence[Charge], script: str, callers: bool) -> list[dict[str, Any]]:
    """Add up charges by the line of the script, or by that and the line that called its function.

    Line 0 is for what no line of the script has made.
    """
    rows: dict[tuple[int, int], Counter] = {}
    for charge in charges:
        line, caller, *_ = (*charge.place, 0, 0)
        add_up(rows, (line, caller if callers else 0), charge)
    source = texts(script)
    found = []
    for (line, caller), row in sorted_rows(rows):
        about = {
            "line": line,
            "function": functions(script).get(line, ""),
            "source": source[line - 1].strip() if 0 < line <= len(source) else "",
            "caller": caller,
        }
        found.append({**about, **row})
    return found


def function_rows(charges: Sequence[Charge], script: str) -> list[dict[str, Any]]:
    """Add up charges by the function of the script."""
    rows: dict[str, Counter] = {}
    for charge in charges:
        add_up(rows, functions(script).get(charge.place[0], "") if charge.place else "", charge)
    return [{"function": name, **row} for name, row in sorted_rows(rows)]
