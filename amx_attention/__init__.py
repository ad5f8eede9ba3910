"""Causal attention for CPUs with AMX, in the place of PyTorch's, whose backward pass is not for it.

    import amx_attention; amx_attention.activate(64)

From then on F.scaled_dot_product_attention(q, k, v, is_causal=True) is kernel.cpp's for bf16 CPU
tensors (B, H, T, D), D a multiple of 32, heads grouped or not, compiled or not; what has dropout, a
mask, a scale of its own or another shape or type is PyTorch's as before. train_gpt.py does this if
it finds this folder beside itself (ATTENTION=auto or amx), and runs without it.

`forward` and `backward`, called directly, take documents too: attention stays inside each, and only
the blocks of 64 x 64 scores that it needs are computed.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernel.cpp")
CPU = "-mamx-tile -mamx-bf16 -mavx512bf16 -mavx512bw -mavx512dq -mavx512vl -mfma"
FLAGS = ("-O3", "-std=c++17", *CPU.split(), "-fopenmp", "-shared", "-fPIC")
FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
LARGEST = 2**26  # elements of a head: a thread holds 28 bytes for one


def build() -> Path:
    """Compile kernel.cpp, once for each version of it; the library, in the user's cache folder.
    Raises RuntimeError with what the compiler says."""
    command = [os.environ.get("CXX") or "g++", *FLAGS]
    version = hashlib.sha256(SOURCE.read_bytes() + repr(command).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "amx_attention")
    library = cache / f"{version}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # renamed, should others build too
            made = Path(folder, "kernel.so")
            done = subprocess.run(
                [*command, str(SOURCE), "-o", str(made)], capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
            os.replace(made, library)
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled kernel. Raises RuntimeError or OSError where it cannot run or be built."""
    if not getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False):
        raise RuntimeError("this CPU has no AMX")
    kernel = ctypes.CDLL(str(build()))
    if kernel.amx_permission():
        raise RuntimeError("the system does not permit the use of AMX")
    return kernel


def check_tensors(heads: dict[str, Tensor], keys: dict[str, Tensor]) -> None:
    """Check that the kernel can read the tensors.

    `heads` are all (B, H, T, D) with a "q", `keys` all (B, K, T, D) with a "k"; H is a multiple
    of K. Raises ValueError.
    """
    for name, x in (heads | keys).items():
        shape = tuple(x.shape)
        if len(shape) != 4 or shape[3] % 32 or not shape[3]:
            raise ValueError(f"{name}: must be (B, heads, T, D), D a multiple of 32, not {shape}")
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            raise ValueError(f"{name}: must be bf16 on the CPU, not {x.dtype} on {x.device}")
        if x.numel() and x.stride(3) != 1:
            raise ValueError(f"{name}: must have a stride of 1 in D, not {x.stride(3)}")
    for like in (heads, keys):
        shapes = {name: tuple(x.shape) for name, x in like.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"must be of one shape: {shapes}")
    B, H, T, D = heads["q"].shape
    K = keys["k"].size(1)
    if keys["k"].shape != (B, K, T, D) or not K or H % K:
        found = f"{(B, H, T, D)} and {tuple(keys['k'].shape)}"
        raise ValueError(f"q and k: must be (B, H, T, D) and (B, K, T, D), not {found}")


def starts_of(offsets: Tensor | None, B: int, T: int) -> Tensor:
    """Give the starts of the segments, and the end of the last, int64.

    They are `offsets` or, without, the starts of the rows. Raises ValueError if they are not what
    `forward` asks for.
    """
    rows = torch.arange(B + 1) * T
    if offsets is None:
        return rows
    if offsets.dtype != torch.int32 or offsets.device.type != "cpu" or offsets.dim() != 1:
        kind = f"{offsets.dtype} {tuple(offsets.shape)} on {offsets.device}"
        raise ValueError(f"offsets: must be torch.int32 (S + 1,) on the CPU, not {kind}")
    starts = offsets.to(torch.int64).contiguous()
    if not len(starts) or starts[0] != 0 or starts[-1] != B * T:
        ends = f"from {starts[0]} to {starts[-1]}" if len(starts) else "empty"
        raise ValueError(f"offsets: must go from 0 to B * T = {B * T}, but are {ends}")
    falls = (starts[1:] < starts[:-1]).nonzero()
    if len(falls):
        at = falls[0].item()
        raise ValueError(f"offsets: fall from {starts[at]} to {starts[at + 1]} at number {at + 1}")
    missing = rows[starts[torch.searchsorted(starts, rows)] != rows]
    if len(missing):
        raise ValueError(f"offsets: have no {missing[0]}, where a row of {T} tokens starts")
    return starts


def call(function: Any, starts: Tensor, *tensors: Tensor) -> None:
    """Call the kernel with tensors (B, H, T, D), or (B, H, T).

    Raises ValueError if a segment is too long.
    """
    T, D = tensors[0].shape[2:]
    longest = int(starts.diff().max()) if len(starts) > 1 else 0
    if longest * D > LARGEST:
        raise ValueError(f"a segment of {longest} tokens is longer than {LARGEST // D}")
    strides = [stride for t in tensors for stride in t.stride()[:3]]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    shape = (tensors[0].size(1), tensors[2].size(1), T, D)
    begin = ctypes.c_void_p(starts.data_ptr())
    function(*pointers, (ctypes.c_int64 * len(strides))(*strides), begin, len(starts) - 1, *shape)


def forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend causally, inside each segment.

    q is (B, H, T, D), k and v are (B, K, T, D) with H a multiple of K, all bf16. Returns the
    output, like q, and the log-sum-exp of the scores of each query, fp32 (B, H, T).

    `offsets`, int32 (S + 1,), are the starts of S segments among all B * T tokens, one row after
    the other, and B * T. They begin with 0 and never fall, and each row's start is one of them. Two
    equal ones hold an empty segment between them. Without offsets, each row is a segment.
    Raises ValueError if an argument is not so.
    """
    check_tensors({"q": q}, {"k": k, "v": v})
    B, H, T, _ = q.shape
    starts = starts_of(offsets, B, T)
    out = torch.empty_like(q)
    lse = q.new_empty(B, T, H, dtype=torch.float32).transpose(1, 2)  # laid out as PyTorch's
    call(load().amx_attention_forward, starts, q, k, v, out, lse)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of q, k and v, from `dout`, that of `out`.

    All are bf16. lse and `offsets` are those of `forward`. Raises ValueError as it does.
    """
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()  # that of a sum is one number
    check_tensors({"q": q, "out": out, "dout": dout}, {"k": k, "v": v})
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32:
        raise ValueError(f"lse is {lse.dtype} {tuple(lse.shape)}, not fp32 {tuple(q.shape[:3])}")
    starts = starts_of(offsets, q.size(0), q.size(2))
    layout = (0, 2, 1, 3)  # neighbours in memory as PyTorch promises them to the compiler
    dq, dk, dv = (torch.empty_permuted(x.shape, layout, dtype=x.dtype) for x in (q, k, v))
    call(load().amx_attention_backward, starts, dout, q, k, v, out, lse, dq, dk, dv)
    return dq, dk, dv


def ours_or_theirs(ours: Any, theirs: Any, given: int, keys: Any, *args: Any, **more: Any) -> Any:
    """Call `ours` with the first tensors of an attention operator's arguments, as many as `given`,
    if it does what the others, (dropout, causal) and mask and scale, ask for; else `theirs`."""
    q, k, v = args[:3] if given == 3 else args[1:4]
    plain = args[given:] == (0.0, True) and not [x for x in more.values() if x is not None]
    B, _, T, D = q.shape
    like = k.shape == v.shape == (B, k.size(1), T, D)
    like = like and all(x.dtype == torch.bfloat16 and x.stride(3) == 1 for x in (q, k, v))
    if plain and like and D % 32 == 0 and 0 < T * D <= LARGEST:
        return ours(*args[:given])
    return theirs.call_boxed(keys, *args, **more)


@functools.cache
def register() -> torch.library.Library:
    """Put the kernel in the place of PyTorch's, for as long as what this returns exists: until
    register.cache_clear()."""
    library = torch.library.Library("aten", "IMPL")
    for name, ours, given in ((FORWARD, forward, 3), (f"{FORWARD}_backward", backward, 6)):
        theirs = torch.library.get_kernel(f"aten::{name}", "CPU")
        replacement = functools.partial(ours_or_theirs, ours, theirs, given)
        with warnings.catch_warnings():  # that a kernel of PyTorch is replaced is what we want
            warnings.simplefilter("ignore", UserWarning)
            library.impl(name, replacement, "CPU", with_keyset=True)
    return library


# To the compiler, attention inside documents is one operator, with results laid out as without.
@torch.library.custom_op("amx_attention::packed", mutates_args=())
def packed(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Call `forward`."""
    return forward(q, k, v, offsets)


@torch.library.custom_op("amx_attention::packed_backward", mutates_args=())
def packed_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Call `backward`."""
    return backward(dout, q, k, v, out, lse, offsets)


@packed.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, _ = q.shape
    return torch.empty_like(q), q.new_empty(B, T, H, dtype=torch.float32).transpose(1, 2)


@packed_backward.register_fake
def _(dout: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    layout = (0, 2, 1, 3)
    made = {"dtype": dout.dtype, "device": dout.device}
    return tuple(torch.empty_permuted(x.shape, layout, **made) for x in inputs[:3])


def keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the backward pass takes."""
    *qkv, offsets = inputs
    ctx.save_for_backward(*qkv, *output, offsets)


def differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """Give the gradients of q, k and v."""
    return *packed_backward(dout, *ctx.saved_tensors), None


packed.register_autograd(differentiate, setup_context=keep)


def attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Attend inside segments, as `forward` does, with gradients, compiled or not."""
    return packed(q, k, v, offsets)[0]


def activate(width: int) -> Callable[..., Tensor]:
    """Use the kernel from now on, for heads of this width; returns `attend`, for documents.

    Raises RuntimeError or OSError where that cannot be.
    """
    if width % 32:
        raise RuntimeError(f"heads have a width of {width}, not a multiple of 32")
    load()
    register()
    return attend
