"""What a script that runs apart sees of this machine: programs, libraries, Python, devices.

All of it is shown where it lies, read-only. Everything else is not there.
"""

import os
import site
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
LIBRARIES = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
ACCELERATORS = ("nvidia*", "kfd", "dri")
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Layout:
    """Folders and files that are shown, links that are made, folders to cover, devices of GPUs."""

    shown: list[str]
    links: dict[str, str]
    covered: list[str]
    accelerators: list[str]


def find_layout(hidden: Iterable[Path]) -> Layout:
    """Find what Python and its packages need here; `hidden` folders stay out of sight.

    Raises ValueError if Python itself lies in one of them.
    """
    shown: list[str] = []
    links: dict[str, str] = {}
    devices = find_accelerators()
    sensors = "/sys" if devices else "/sys/devices/system"
    for path in (*SYSTEM, *LIBRARIES, *python_folders(), *library_path(), sensors):
        if os.path.islink(path) and path in SYSTEM:
            links[path] = os.readlink(path)
        elif os.path.exists(path):
            shown.append(path)
    shown = without_nested(shown)
    for path in python_links():
        if not lies_in(path, shown) and os.path.islink(path):
            links[path] = os.readlink(path)
        elif not lies_in(path, shown) and not lies_in(path, links):
            shown.append(path)
    return Layout(shown, links, find_covered(hidden, shown), devices)


def python_folders() -> list[str]:
    """List the folders of this Python, of its virtual environment, and of a user's packages."""
    folders = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    if python_environment():
        folders.append(site.getusersitepackages())
    return [*folders, *map(os.path.realpath, folders)]


def python_environment() -> dict[str, str]:
    """Name the variable that leads to a user's own packages, if there are any."""
    if site.ENABLE_USER_SITE and os.path.isdir(site.getusersitepackages()):
        return {"PYTHONUSERBASE": site.getuserbase()}
    return {}


def python_links() -> list[str]:
    """List the links that lead to Python's program, and the program."""
    path = os.path.abspath(sys.executable)
    found = [path]
    while os.path.islink(path) and len(found) < 40:
        path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        found.append(path)
    return [*found, os.path.realpath(path)]


def library_path() -> list[str]:
    """List the folders of LD_LIBRARY_PATH."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return [os.path.normpath(folder) for folder in folders if folder.startswith("/")]


def find_accelerators() -> list[str]:
    """List the devices of GPUs, unless CUDA_VISIBLE_DEVICES is empty."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return []
    return sorted(str(path) for name in ACCELERATORS for path in Path("/dev").glob(name))


def lies_in(path: str, folders: Iterable[str]) -> bool:
    """Tell whether a path is one of these folders or beneath one."""
    return any(Path(path).is_relative_to(folder) for folder in folders)


def without_nested(paths: Iterable[str]) -> list[str]:
    """Leave out what lies beneath another path."""
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not lies_in(path, kept):
            kept.append(path)
    return kept


def find_covered(hidden: Iterable[Path], shown: list[str]) -> list[str]:
    """Find which hidden folders would be in sight; ValueError if one holds Python."""
    folders = {Path(folder).resolve() for folder in (*hidden, REPOSITORY, Path.home())}
    places = {Path(path).resolve() for path in shown if path != "/"}
    if "/" in shown:
        raise ValueError("Python's folder is /: use a virtual environment")
    covered = []
    for folder in sorted(folders):
        if folder in places and folder != Path.home():
            raise ValueError(f"Python lies in {folder}, which a script must not see; move it")
        if any(place in folder.parents for place in places):
            covered.append(str(folder))
    return without_nested(covered)
