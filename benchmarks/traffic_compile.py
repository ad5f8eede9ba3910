"""traffic.py's compiler: PyTorch's own, for the pretended H100, stopped when the code is there.

Dynamo and AOTAutograd trace a function on a CPU, as one without a CUDA build must. Then the graphs
are moved to a pretended H100 and go through Inductor as always.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
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

COMPILE = torch.compile
NEEDED = ("GPT", "load_settings", "UserError")  # of a script


class RanError(Exception):
    """The compiled model was called: all that was to be compiled has been."""


class GeneratedError(Exception):
    """The code of a graph, which is not to be loaded."""


WATCHERS: list[Callable[[Callable, tuple, dict], Any]] = []  # of calls of compiled functions


def noted_compile(function: Callable | None = None, **options: Any) -> Callable:
    """Stand in for a script's torch.compile: nothing is compiled, but a watcher sees each call."""
    if function is None:
        return functools.partial(noted_compile, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        if WATCHERS:
            return WATCHERS[-1](function, args, kwargs)
        return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def watched(watcher: Callable[[Callable, tuple, dict], Any]) -> Iterator[None]:
    """Let a watcher see the calls of what a script compiles."""
    WATCHERS.append(watcher)
    try:
        yield
    finally:
        WATCHERS.pop()


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
    with mock.patch.object(torch, "compile", noted_compile):  # for decorators
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


def bytes_of(nodes: Iterable[Any]) -> list[int]:
    """Give the bytes of the tensors that nodes of a graph stand for."""
    values = [node.meta["val"] for node in nodes]
    return [x.numel() * x.dtype.itemsize for x in values if isinstance(x, Tensor)]


def base_of(node: Any) -> Any:
    """Find the node whose memory a node of a graph is, by its views."""
    while getattr(node.target, "is_view", False) and node.op == "call_function":
        node = node.args[0]
    return node


def saved_tensors(forward: Any, backward: Any) -> list[int]:
    """Give the bytes of what a forward graph keeps for the backward one: no parameter or input."""
    taken = {node.name for node in backward.graph.find_nodes(op="placeholder")}
    (output,) = forward.graph.find_nodes(op="output")
    kept = {base_of(node): None for node in output.all_input_nodes if node.name in taken}
    return bytes_of(node for node in kept if node.op != "placeholder")


def gradients(module: Any) -> list[int]:
    """Give the bytes of what a backward graph gives."""
    (output,) = module.graph.find_nodes(op="output")
    return bytes_of(output.all_input_nodes)


def generate(module: Any, inputs: Sequence[Any], options: dict[str, Any], script: str) -> Graph:
    """Lower a graph for the H100, and count the kernels of its code."""
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    def stop(lowering: Any) -> None:
        stop_at_code(lowering, script)

    placed = move_to_h100(module, inputs)
    loading = mock.patch.object(GraphLowering, "compile_to_module", stop)
    quiet = V.set_debug_handler(DebugContext())
    options["cudagraphs"] = compile_fx.BoxedBool(False)
    try:
        with pretended_h100(), idle_guard(), loading, quiet, traffic_lines.noted_makers():
            compile_fx.fx_codegen_and_compile(module, placed, [], **options)
    except GeneratedError as done:
        return done.args[0]
    raise TrafficError("the compiler loads no code: teach generate what it does now")


def compile_functions(
    function: Callable, inputs: Sequence[Any], script: str = "<string>"
) -> list[Graph]:
    """Compile a function of CPU tensors for an H100: its forward and, if needed, backward graph.

    `script` is the file to whose lines the kernels are charged.
    """
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor import compile_fx

    graphs = []
    modules = []

    def inner(module: Any, inputs: Sequence[Any], **options: Any) -> Callable:
        modules.append(module)
        graph = generate(module, inputs, options, script)
        if graph.name == "backward":
            graph.saved = saved_tensors(modules[0], module)
            graph.gradients = gradients(module)
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
        COMPILE(function, backend=backend, dynamic=False, fullgraph=True)(*inputs)
    return graphs


def build(tg: ModuleType, hp: Any, dtype: torch.dtype) -> torch.nn.Module:
    """Make the model of a script, which may be one from before there was frontier.py."""
    return tg.build_model(hp, dtype) if hasattr(tg, "build_model") else tg.GPT(hp, dtype)


def trainer_class(tg: ModuleType, hp: Any) -> type:
    """Find the class that trains the model of a script."""
    return tg.part("Trainer", hp) if hasattr(tg, "part") else tg.Trainer


def model_in_training(tg: ModuleType, hp: Any) -> torch.nn.Module:
    """Make the model as it is in a run on CUDA: the trainer may give it other parameters."""
    run = tg.Run(dataclasses.replace(hp, device="cpu", dtype="bf16"))
    model = build(tg, hp, torch.bfloat16)
    trainer_class(tg, hp)(model, model, None, run)
    if hasattr(tg, "LOGITS"):  # it is traced as one on a CPU
        tg.LOGITS["cpu"] = tg.LOGITS["cuda"]
    return model


def compile_model(tg: ModuleType, hp: Any, tokens: int, forward_only: bool) -> list[Graph]:
    """Compile a script's model, as the settings give it, for one micro-batch."""
    length = hp.train_seq_len
    if tokens < length or tokens % length:
        problem = f"--tokens {tokens}: expected a multiple of TRAIN_SEQ_LEN={length}"
        raise TrafficError(problem)
    model = model_in_training(tg, hp)
    inputs = torch.zeros(tokens // length, length, dtype=torch.int64)
    arguments: list[Any] = [inputs, inputs.clone()]
    if getattr(hp, "train_doc_isolated", 0):
        tg.PACKED["cpu"] = importlib.import_module("amx_attention").attend  # one operator, too
        begins = torch.zeros(inputs.shape, dtype=torch.bool).numpy()
        arguments.append(tg.cut(begins, length, inputs.device))
    with cuda_operators(), torch.set_grad_enabled(not forward_only):
        return compile_functions(model, arguments, tg.__file__)
