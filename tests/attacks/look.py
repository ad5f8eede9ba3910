"""Tell what there is to recognise a place by."""

import json
import os
import socket
from pathlib import Path

print(
    json.dumps(
        {
            "folder": os.getcwd(),
            "files": sorted(str(path) for path in Path().rglob("*") if path.is_file()),
            "times": sorted({path.stat().st_mtime for path in Path().rglob("*.bin")}),
            "environment": dict(os.environ),
            "host": socket.gethostname(),
            "user": __import__("pwd").getpwuid(os.getuid()).pw_name,
            "mounts": Path("/proc/self/mountinfo").read_text(),
            "groups": Path("/proc/self/cgroup").read_text(),
            "limits": Path("/proc/self/limits").read_text(),
            "status": Path("/proc/self/status").read_text(),
            "root": sorted(os.listdir("/")),
            "processes": [p.read_text() for p in sorted(Path("/proc").glob("[0-9]*/cmdline"))],
            "seen": [path for path in json.loads(os.environ["SEEK"]) if os.path.exists(path)],
        }
    )
)
