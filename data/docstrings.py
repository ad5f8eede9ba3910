"""The built-in sample's text: the docstrings of the Python standard library and of the packages
that train_gpt.py needs, one document a module, read with ast and never imported."""

import ast
import gc
import hashlib
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from shards import WorkerPool

PACKAGES = ("torch", "numpy", "sentencepiece", "zstandard", "matplotlib")
MIN_CHARS = 200  # a module with less docstring text makes no document


def installed_closure(packages: Iterable[str]) -> dict[str, str]:
    """Name -> version of the installed ones of these packages, and of all that they depend on.
    Optional extras are not followed."""
    todo = list(packages)
    found: dict[str, str] = {}
    while todo:
        match = re.match(r"\s*([A-Za-z0-9][\w.-]*)", todo.pop())
        name = re.sub(r"[-_.]+", "-", match[1]).lower() if match else ""
        if not name or name in found:
            continue
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # such as a dependency for another system
        found[name] = package.version
        todo += [line for line in package.requires or [] if not re.search(r"\bextra\s*==", line)]
    return dict(sorted(found.items()))


def package_files(name: str) -> list[Path]:
    """The Python files of an installed package, as its own record lists them."""
    package = metadata.distribution(name)
    return [Path(package.locate_file(f)) for f in package.files or [] if f.suffix == ".py"]


def tree_files(root: Path) -> list[Path]:
    """Every Python file below `root`, except those of third-party packages."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in ("site-packages", "dist-packages")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return found


def docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module, and of the classes and functions in it, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)  # dedented by inspect.cleandoc
        if text:
            yield text
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            yield from docstrings(child)


def module_text(path: Path) -> str | None:
    """The docstrings of one Python file, joined by blank lines, without NUL and lone surrogates;
    None if it cannot be read or parsed. A file without a triple-quoted string counts as one
    without docstrings: not parsing those halves the time."""
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return ""
        with warnings.catch_warnings(action="ignore"):
            text = "\n\n".join(docstrings(ast.parse(source)))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return text.replace("\0", "").encode("utf-8", "ignore").decode("utf-8")


def read_modules(paths: Sequence[Path], processes: int) -> list[str | None]:
    """`module_text` of every path, in the order of `paths` whatever the number of processes."""
    # Syntax trees hold no cycles: without the collector, parsing is much faster.
    with WorkerPool(processes, gc.disable) as pool:
        return list(pool.map(module_text, paths, chunksize=16))


def select_documents(texts: Iterable[str | None]) -> tuple[list[str], Counter[str]]:
    """The distinct texts of at least MIN_CHARS characters, ordered by the SHA-256 of their UTF-8
    (so the order depends on nothing else), and how many were skipped, by reason."""
    kept: dict[bytes, str] = {}
    skipped = Counter(unreadable=0, short=0, duplicate=0)
    for text in texts:
        if text is None:
            skipped["unreadable"] += 1
        elif len(text) < MIN_CHARS:
            skipped["short"] += 1
        elif (key := hashlib.sha256(text.encode()).digest()) in kept:
            skipped["duplicate"] += 1
        else:
            kept[key] = text
    return [kept[key] for key in sorted(kept)], skipped


class DocstringSource:
    """The sample's documents, as data/prepare.py reads any source (sources.Source)."""

    val_fraction, val_last = 0.04, False

    def __init__(self, packages: Iterable[str], processes: int) -> None:
        self.packages, self.processes = installed_closure(packages), processes
        self.total_bytes = self.read_bytes = 0
        self.skipped: Counter[str] = Counter()

    def inputs(self) -> list[dict[str, str]]:
        """What the documents are made from, for the manifest."""
        return [{"name": name, "version": version} for name, version in self.packages.items()]

    def options(self) -> dict[str, int]:
        """How the documents are made, for the manifest."""
        return {"min_chars": MIN_CHARS}

    def unchanged(self, inputs: list[dict[str, str]]) -> bool:
        """Whether a manifest's inputs are these packages."""
        return inputs == self.inputs()

    def texts(self) -> Iterator[str]:
        """The documents in their frozen order."""
        files = tree_files(Path(sysconfig.get_path("stdlib")))
        files += [file for name in self.packages for file in package_files(name)]
        what = f"the standard library and {len(self.packages)} packages"
        print(f"reading {len(files):,} modules of {what} ...", flush=True)
        documents, self.skipped = select_documents(read_modules(files, self.processes))
        yield from documents
