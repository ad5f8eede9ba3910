"""A cgroup that bounds memory and processes, where this system lets the caller make one."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
# A shell that enters groups and then becomes the command.
ENTER = 'while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs"; shift; done; shift; exec "$@"'
PATIENCE = 5.0  # seconds for the kernel to forget what was ended


def own_groups() -> dict[str, Path]:
    """Find this process's cgroup for each controller; of version 2, under the name ""."""
    found = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            found[name] = ROOT / name / path.lstrip("/")
    if "" in found:
        found[""] = ROOT / found[""].relative_to(ROOT)
    return found


def parents(kind: str, groups: dict[str, Path]) -> Path | None:
    """Find where a group with this controller can be made."""
    if kind in groups:
        return groups[kind]
    start = groups.get("", ROOT)
    for folder in (start, *start.parents):
        if not folder.is_relative_to(ROOT):
            break
        with suppress(OSError):
            if kind in (folder / "cgroup.subtree_control").read_text().split():
                return folder
    return None


@contextmanager
def make(memory: int, processes: int) -> Iterator[list[str]]:
    """Make groups with these limits; give what starts a command in them, nothing if none can be."""
    name, made = f"job-{os.getpid()}-{uuid.uuid4().hex[:12]}", []
    try:
        with suppress(OSError):
            groups = own_groups()
            for kind, files in limits(memory, processes).items():
                parent = parents(kind, groups)
                if parent is None:
                    continue
                folder = parent / name
                if folder not in made:
                    remove_abandoned(parent)
                    folder.mkdir()
                    made.append(folder)
                for file, value in files.items():
                    if (folder / file).exists():
                        (folder / file).write_text(str(value))
        yield ["sh", "-c", ENTER, "sh", *map(str, made), "--"] if made else []
    finally:
        for folder in made:
            remove(folder)


def remove_abandoned(parent: Path) -> None:
    """Remove the groups of auditors that were killed: what ran in them ended with them."""
    for folder in parent.glob("job-*-*"):
        if not Path("/proc", folder.name.split("-")[1]).exists():
            with suppress(OSError):
                folder.rmdir()


def limits(memory: int, processes: int) -> dict[str, dict[str, int]]:
    """Name the files of both versions that hold the limits of each controller."""
    return {
        "memory": {"memory.max": memory, "memory.limit_in_bytes": memory, "memory.swap.max": 0},
        "pids": {"pids.max": processes},
    }


def remove(folder: Path) -> None:
    """Remove a group once the last of its processes is gone."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.005)
        else:
            return
