"""What a machine is, for benchmarks/gpu.py: versions, card, commit, and whether settings are valid.

    python benchmarks/gpu_about.py OUT.json [NAME=VALUE ...]

A process of its own, since what it looks for may be missing, break, or hang. What cannot be found
out is told as a problem, and ends nothing.
"""

import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_kit import ROOT, write_whole

PACKAGES = ("torch", "triton", "numpy", "sentencepiece", "zstandard", "matplotlib")
PACKAGES += ("pytest", "hypothesis")
MISSING = "missing"


def version(package: str) -> str:
    """Give the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING


def libraries() -> dict[str, str]:
    """Give the versions of CUDA's libraries, as PyTorch was built with them."""
    import torch

    def nccl() -> str:
        found = torch.cuda.nccl.version()
        return ".".join(map(str, found)) if isinstance(found, tuple) else str(found)

    found = {"cuda": torch.version.cuda or MISSING, "cudnn": MISSING, "nccl": MISSING}
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    if torch.cuda.is_available():
        found["nccl"] = nccl()
    return found


def card() -> dict[str, Any]:
    """Describe the GPU that PyTorch sees, if it sees one; else what it says of that."""
    import torch

    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except Exception as problem:
            return {"problem": str(problem)}
        return {}
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(total / 2**30, 2),
        "free_gib": round(free / 2**30, 2),
        "count": torch.cuda.device_count(),
    }


def driver() -> list[str]:
    """List the GPUs that the driver tells, whether or not PyTorch can use them."""
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()


def settings_problems(given: list[str]) -> list[str]:
    """Say what is wrong with the settings that are given, if anything is.

    This imports train_gpt.py, and with it all that a training needs.
    """
    import train_gpt

    problems = []
    known = {}
    for word in given:
        name, _, text = word.partition("=")
        if name in train_gpt.FIELDS:
            known[name] = text
        else:
            problems.append(f"{word}: no such setting; see python train_gpt.py --help")
    try:
        train_gpt.load_settings(known, check_places=False)
    except train_gpt.UserError as problem:
        headline, *each = str(problem).splitlines()
        problems += [line.strip() for line in each] or [headline]
    return problems


def checkout(given: list[str]) -> dict[str, Any]:
    """Tell machine and commit, and what is wrong with the settings that are given."""
    import run_machine

    sys.path.insert(0, str(ROOT))
    return {
        "machine": run_machine.machine(),
        "commit": run_machine.commit(),
        "changed": run_machine.changed_files(),
        "settings_problems": settings_problems(given),
    }


def main(arguments: list[str]) -> None:
    """Find out one thing after the other; write what is known each time."""
    out, *given = arguments
    versions = {"python": platform.python_version()}
    versions |= {package: version(package) for package in PACKAGES}
    found: dict[str, Any] = {"versions": versions, "driver": driver(), "card": {}, "problems": []}
    found["machine"] = {"system": platform.platform(), "cores": os.cpu_count()}

    def add(name: str, look: Callable[[], dict[str, Any]]) -> None:
        try:
            result = look()
        except Exception as problem:
            traceback.print_exc()
            found["problems"].append(f"{name}: {type(problem).__name__}: {problem}")
        else:
            found[name] = result
        write_whole(Path(out), json.dumps(found, default=str))

    add("card", card)
    add("libraries", libraries)
    add("checkout", lambda: checkout(given))


if __name__ == "__main__":
    main(sys.argv[1:])
