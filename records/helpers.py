"""Find the code beside train_gpt.py that it uses: what counts as its size, and what it runs with.

The audit counts these files (static_rules/sizes.py) and shows a script no others (script.py), so
what is not found here is neither counted nor there.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

SCRIPT = "train_gpt.py"
MODULES = {".py", ".so", ".pyx"}
CODE = {".py", ".cpp", ".cc", ".c", ".cu", ".cuh", ".h", ".hpp", ".so", ".pyx", ".rs"}
MOST = 2000  # files that are looked at; a record has a few
LARGEST = 2**24  # bytes of a file that are searched for names

# from a.b import c, d    from . import (c, d)    import a.b as c, d    import_module("a.b")
FROM = re.compile(r"^[ \t]*from[ \t]+([.\w]+)[ \t]+import[ \t]*(\([^()]{0,5000}\)|[^\n(]*)", re.M)
IMPORT = re.compile(r"^[ \t]*import[ \t]+([\w.][^\n]*)", re.M)
BY_NAME = re.compile(r"""(?:import_module|__import__)\([ \t]*["']([.\w]+)["']""")
NAME = re.compile(r"[.\w]+")
QUOTED = re.compile(r"""["'<]([^"'<>\n]{1,200})["'>]""")


def find_used(folder: Path) -> list[Path]:
    """List the files of code in `folder` that train_gpt.py uses, itself or by another of them.

    Used is what is imported, and what is named in quotes. A link out of the folder does not count.
    """
    files = list_code(folder)
    modules, ends = index_modules(files), index_ends(files)
    used: set[str] = set()
    waiting = [SCRIPT]
    while waiting:
        name = waiting.pop()
        text = read(folder / name)
        here = PurePosixPath(name).parent
        found = {*find_imports(text, here, modules), *find_named(text, ends)}
        waiting += found - used - {SCRIPT}
        used |= found - {SCRIPT}
    return sorted(files[name] for name in used)


def list_code(folder: Path) -> dict[str, Path]:
    """List all files of code by their names in the folder, but hidden ones."""
    files: dict[str, Path] = {}
    inside = folder.resolve()
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.suffix not in CODE or any(part.startswith(".") for part in name.parts):
            continue
        if path.is_file() and path.resolve().is_relative_to(inside):
            files[name.as_posix()] = path
        if len(files) == MOST:
            break
    return files


def read(path: Path) -> str:
    """Read the text of a file of code; of what is none, nothing."""
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST).decode("utf-8", errors="replace")
    except OSError:
        return ""


def index_modules(files: Iterable[str]) -> dict[str, list[str]]:
    """Find the files of each module, by its place in the folder: "package/module"."""
    index: dict[str, list[str]] = {}
    for name in files:
        path = PurePosixPath(name)
        if path.suffix in MODULES:
            # helper.cpython-312-x86_64-linux-gnu.so is helper
            place = path.parent / path.name.partition(".")[0]
            place = path.parent if place.name == "__init__" else place
            index.setdefault(str(place), []).append(name)
    return index


def index_ends(files: Iterable[str]) -> dict[str, list[str]]:
    """Find the files whose paths end with a text: "kernels/fast.cu", "fast.cu"."""
    index: dict[str, list[str]] = {}
    for name in files:
        parts = PurePosixPath(name).parts
        for start in range(len(parts)):
            index.setdefault("/".join(parts[start:]), []).append(name)
    return index


def find_imports(text: str, here: PurePosixPath, modules: dict[str, list[str]]) -> Iterator[str]:
    """Find the files behind the imports of a file that lies in the folder `here`."""
    for module in set(imported_modules(text)):
        dots = len(module) - len(module.lstrip("."))
        above = here.parts[: max(0, len(here.parts) - dots + 1)]
        start = PurePosixPath(*above) if dots else PurePosixPath()
        for place in {start, here}:
            for part in ["", *module.strip(".").split(".")]:
                place = place / part
                yield from modules.get(str(place), [])


def imported_modules(text: str) -> Iterator[str]:
    """List the dotted names that a file imports, and those that could be modules."""
    for module, names in FROM.findall(text):
        yield module
        for name in NAME.findall(re.sub(r"#[^\n]*", "", names)):
            yield module.rstrip(".") + "." + name if module.strip(".") else module + name
    for names in IMPORT.findall(text):
        for part in names.split(";")[0].split("#")[0].split(","):
            yield from NAME.findall(part)[:1]
    yield from BY_NAME.findall(text)


def find_named(text: str, ends: dict[str, list[str]]) -> Iterator[str]:
    """Find the files whose names, or the ends of whose paths, stand in quotes in a text."""
    for quoted in set(QUOTED.findall(text)):
        yield from ends.get(PurePosixPath(quoted).as_posix(), [])
