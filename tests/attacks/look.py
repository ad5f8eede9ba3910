"""Tell what there is to recognise a place by."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path


def read(path):
    """What the kernel tells, where it has such a file."""
    with suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


print(
    json.dumps(
        {
            "folder": os.getcwd(),
            "files": sorted(str(path) for path in Path().rglob("*") if path.is_file()),
            "times": sorted({path.stat().st_mtime for path in Path().rglob("*.bin")}),
            "environment": dict(os.environ),
            "host": socket.gethostname(),
            "user": __import__("pwd").getpwuid(os.getuid()).pw_name,
            "mounts": read("/proc/self/mountinfo"),
            "groups": read("/proc/self/cgroup"),
            "limits": read("/proc/self/limits"),
            "status": read("/proc/self/status"),
            "root": sorted(os.listdir("/")),
            "processes": [read(p) for p in sorted(Path("/proc").glob("[0-9]*/cmdline"))],
            "seen": [path for path in json.loads(os.environ["SEEK"]) if os.path.exists(path)],
        }
    )
)
