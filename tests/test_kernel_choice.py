"""Which kernel PyTorch itself takes for attention on an H100, asked where there is none: a build of
PyTorch for CUDA, with a runtime that says it had one (h100_runtime.cpp). Skipped elsewhere, as CI:

    pip install torch==2.11.0      gigabytes, with all of CUDA
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO

PACKAGES = Path(torch.__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(not torch.version.cuda, reason="PyTorch was built without CUDA"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: test_gpu.py"),
    pytest.mark.skipif(not shutil.which("g++"), reason="no g++"),
]
# Fake tensors have no values, so `_fused_sdp_choice` cannot be asked: what is dispatched tells it.
ASK = """
import contextlib, sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
import train_gpt as tg

torch.cuda.is_available = lambda: False  # or fake tensors begin with real ones

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        seen.append(str(operator))
        return operator(*arguments, **options or {})

def backend(run):
    seen.clear()
    with FakeTensorMode():
        options = {"dtype": run.dtype, "device": "cuda", "requires_grad": True}
        made = [torch.empty(1, 64, heads, 64, **options) for heads in (8, 4, 4)]
        with Watch():
            tg.F.scaled_dot_product_attention(
                *[x.transpose(1, 2) for x in made], is_causal=True, enable_gqa=True
            )
    named = [name for name in seen if "_scaled_dot_product_" in name] or ["_product_math_"]
    return named[0].split("_product_")[1].split("_")[0].upper() + "_ATTENTION"

seen = []
kernel, dtype = sys.argv[1:]
torch._fused_sdp_choice = lambda *_: backend(run)
run = tg.Run(tg.Hyperparameters(device="cpu", dtype=dtype))
with contextlib.ExitStack() as undo:
    tg.use_kernel(kernel, run, undo)
    print(backend(run))
"""


@pytest.fixture(scope="session")
def runtime(tmp_path_factory) -> Path:
    """The library that stands in front of CUDA's runtime."""
    library = tmp_path_factory.mktemp("runtime") / "h100_runtime.so"
    headers = [*PACKAGES.glob("nvidia/*/include/cuda_runtime_api.h")]
    rest = [*PACKAGES.glob("triton/backends/nvidia/include/crt/host_defines.h")]
    if not headers or not rest:
        pytest.skip("no headers of CUDA")
    # Of triton's headers, only what the package of the runtime lacks: the others are of CUDA 12.
    (library.parent / "crt").symlink_to(rest[0].parent)
    include = ["-I", headers[0].parent, "-I", library.parent]
    source = REPO / "tests/h100_runtime.cpp"
    subprocess.run(["g++", "-shared", "-fPIC", *include, source, "-o", library], check=True)
    return library


def taken(runtime: Path, kernel: str, dtype: str = "bf16", **environment: str) -> str:
    """What PyTorch takes once ATTENTION is `kernel`."""
    env = os.environ | {"LD_PRELOAD": str(runtime), "PYTHONPATH": str(REPO)} | environment
    command = [sys.executable, "-c", ASK, kernel, dtype]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_fa2_is_flash_attention_although_pytorch_prefers_cudnn(runtime):
    assert taken(runtime, "fa2") == "FLASH_ATTENTION"


def test_cudnn_is_cudnn_although_flash_attention_can_be_preferred(runtime):
    environment = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
    assert taken(runtime, "cudnn", **environment) == "CUDNN_ATTENTION"
    assert taken(runtime, "sdpa", **environment) == "FLASH_ATTENTION"


def test_grouped_heads_in_fp32_have_no_kernel(runtime):
    """So tests in fp32 are of plain products alone."""
    assert taken(runtime, "sdpa", "fp32") == "MATH_ATTENTION"
