"""traffic.py's machine: operators as CUDA has them, and a pretended H100.

Attention is one opaque operator, which takes q, k and v and gives the output in the layouts that
the model hands over. rms_norm is PyTorch's operator for CUDA, not its formula for CPUs.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor


class TrafficError(Exception):
    """What the user can put right: the message says what was wrong and what to do."""


# ================================== OPERATORS ==================================


@torch.library.custom_op("traffic::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give the output, laid out as q is, and the logsumexp of the scores."""
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("traffic::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of q, k and v, each laid out as its tensor is."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@torch.library.custom_op("traffic::rms_norm", mutates_args=())
def rms_norm(x: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """Give the normed tensor and the reciprocal root of the mean square."""
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("traffic::rms_norm_backward", mutates_args=())
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
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

    operators = torch.ops.traffic
    own = {operators.rms_norm.default: norm, operators.rms_norm_backward.default: norm_backward}
    return {**select_decomp_table(), **own}


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
