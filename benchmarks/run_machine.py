"""What a machine is, and the memory that its processes and GPUs use."""

import os
import platform
import re
import subprocess
import threading
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from gpu_kit import git


def smi(query: str) -> list[str]:
    """Ask nvidia-smi, one line a GPU; none where it is not there, or does not answer."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.splitlines()
    return []


def memory_used() -> list[float]:
    """Read the MiB that are used on each GPU; nothing if one does not tell it, as by [N/A]."""
    try:
        return [float(line) for line in smi("memory.used")]
    except ValueError:
        return []


class MemoryWatch(threading.Thread):
    """Peak memory of a process and all below it, and of the GPUs, until `end` is called."""

    def __init__(self, pid: int, before: list[float]) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.before = before
        self.done = threading.Event()
        self.host = 0.0
        self.gpu: float | None = None
        self.start()

    def run(self) -> None:
        """Look every 0.05 s, at the GPUs every second."""
        count = 0
        while not self.done.wait(0.05):
            self.host = max(self.host, self.look(self.pid))
            if self.before and count % 20 == 0:
                pairs = zip(self.before, memory_used(), strict=False)
                rises = [now - before for before, now in pairs]
                self.gpu = max([*rises, self.gpu or 0.0])
            count += 1

    def look(self, pid: int) -> float:
        """Read the MiB of the peak so far of a process, and of those of its children that live.

        What wait4 tells would be no less than this tool's own memory, since a new process starts as
        a copy of it.
        """
        total = 0.0
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                total += int(found[1]) / 1024
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                total += sum(self.look(int(child)) for child in path.read_text().split())
        return total

    def end(self) -> None:
        """Stop looking."""
        self.done.set()
        self.join()


def processor() -> str:
    """Name the CPU."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        if found := re.search(r"^model name\s*:\s*(.*)$", text, re.M):
            return found[1]
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Tell what the figures depend on beside the code."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    threads = {
        "torch": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": usable,
        "threads": threads,
        "memory_gib": round(memory / 2**30, 1),
        "load_at_start": os.getloadavg(),
        "gpus": smi("name,memory.total,driver_version"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """Name the commit that is checked out."""
    return git("rev-parse", "HEAD") or "unknown"


def changed_files() -> list[str] | None:
    """List the files that differ from that commit; None where git cannot tell."""
    told = git("status", "--porcelain")
    return None if told is None else told.splitlines()
