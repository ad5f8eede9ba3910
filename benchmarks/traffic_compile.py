"""traffic.py's compiler: PyTorch's own, for the pretended H100, stopped when the code is there.

Dynamo and AOTAutograd trace a function on a CPU, as one without a CUDA build must. Then the graphs
are moved to a pretended H100 and go through Inductor as always.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import traffic_lines
from torch import Tensor
from traffic_count import Graph, count_kernels
from traffic_device import (
    TrafficError,
    cuda_operators,
    decompositions,
    idle_guard,
    pretended_h100,
)

NEEDED = ("GPT", "load_settings", "UserError")  # of a script


class RanError(Exception):
    """The compiled model was called: all that was to be compiled has been."""


class GeneratedError(Exception):
    """The code of a graph, which is not to be loaded."""


def load_script(path: Path) -> ModuleType:
    """Import a train_gpt.py by its path, under the name that its companions expect."""
    path = path.resolve()
    if not path.is_file():
        raise TrafficError(f"{path}: there is no such script")
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    if spec is None:
        raise TrafficError(f"{path}: not a Python script: its name should end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    if missing := [name for name in NEEDED if not hasattr(module, name)]:
        names = ", ".join(missing)
        raise TrafficError(f"{path}: not a train_gpt.py of this project: it has no {names}")
    return module


def stop_at_code(lowering: Any, script: str) -> None:
    """Generate a graph's code in place of loading it."""
    code = lowering.codegen()[0].value
    name = "backward" if lowering.is_backward else "forward"
    kernels = count_kernels(lowering, code, script)
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


def saved_bytes(module: Any) -> int:
    """Count the bytes that a backward graph takes from the forward one: no parameter or input."""
    saved = 0
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not node.name.startswith(("primals", "tangents")):
            saved += value.numel() * value.dtype.itemsize
    return saved


def compile_functions(
    function: Callable, inputs: Sequence[Tensor], script: str = "<string>"
) -> list[Graph]:
    """Compile a function of CPU tensors for an H100: its forward and, if needed, backward graph.

    `script` is the file to whose lines the kernels are charged.
    """
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    graphs = []

    def stop(lowering: Any) -> None:
        stop_at_code(lowering, script)

    def inner(module: Any, inputs: Sequence[Any], **options: Any) -> Callable:
        placed = move_to_h100(module, inputs)
        loading = mock.patch.object(GraphLowering, "compile_to_module", stop)
        quiet = V.set_debug_handler(DebugContext())
        noted = traffic_lines.noted_makers()
        options["cudagraphs"] = compile_fx.BoxedBool(False)
        try:
            with pretended_h100(), idle_guard(), loading, quiet, noted:
                compile_fx.fx_codegen_and_compile(module, placed, [], **options)
        except GeneratedError as done:
            graph = done.args[0]
            graph.saved_bytes = saved_bytes(module) if graph.name == "backward" else 0
            graphs.append(graph)
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


def compile_model(tg: ModuleType, hp: Any, tokens: int, forward_only: bool) -> list[Graph]:
    """Compile a script's model, as the settings give it, for one micro-batch."""
    length = hp.train_seq_len
    if tokens < length or tokens % length:
        problem = f"--tokens {tokens}: expected a multiple of TRAIN_SEQ_LEN={length}"
        raise TrafficError(problem)
    model = tg.GPT(hp, torch.bfloat16)
    inputs = torch.zeros(tokens // length, length, dtype=torch.int64)
    with cuda_operators(), torch.set_grad_enabled(not forward_only):
        return compile_functions(model, [inputs, inputs.clone()], tg.__file__)
