"""Causal attention for CPUs with AMX, in the place of PyTorch's, whose backward pass is not for it.

    import amx_attention; amx_attention.activate(64)

From then on F.scaled_dot_product_attention(q, k, v, is_causal=True) is kernel.cpp's for bf16 CPU
tensors (B, H, T, D), D a multiple of 32, heads grouped or not, compiled or not; what has dropout, a
mask, a scale of its own or another shape or type is PyTorch's as before. train_gpt.py does this if
it finds this folder beside itself (ATTENTION=auto or amx), and runs without it.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
import warnings
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


def call(function: Any, *tensors: Tensor) -> None:
    """Call the kernel with tensors (B, H, T, D), or (B, H, T)."""
    strides = [stride for t in tensors for stride in t.stride()[:3]]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    B, H, T, D = tensors[0].shape
    function(*pointers, (ctypes.c_int64 * len(strides))(*strides), B, H, tensors[2].size(1), T, D)


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of bf16 q (B, H, T, D) to k and v (B, G, T, D), H a multiple of G: its
    output, like q, and the log-sum-exp of the scores of each query, fp32 (B, H, T)."""
    B, H, T, _ = q.shape
    out, lse = torch.empty_like(q), q.new_empty(B, T, H, dtype=torch.float32).transpose(1, 2)
    call(load().amx_attention_forward, q, k, v, out, lse)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from that of `out`; all bf16."""
    layout = (0, 2, 1, 3)  # neighbours in memory as PyTorch promises them to the compiler
    dq, dk, dv = (torch.empty_permuted(x.shape, layout, dtype=x.dtype) for x in (q, k, v))
    dout = dout if dout.stride(3) == 1 else dout.contiguous()  # that of a sum is one number
    call(load().amx_attention_backward, dout, q, k, v, out, lse, dq, dk, dv)
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


def activate(width: int) -> None:
    """Use the kernel from now on, for heads of this width. Raises RuntimeError or OSError where
    that cannot be."""
    if width % 32:
        raise RuntimeError(f"heads have a width of {width}, not a multiple of 32")
    load()
    register()
