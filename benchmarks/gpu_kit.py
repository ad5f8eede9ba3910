"""The folder .gpu: what a machine with a GPU, which reaches no network, needs of others.

It holds wheels of the packages that are missing there, datasets, and what the checkout was when it
was made. `python benchmarks/gpu.py --prepare` makes it here; `python benchmarks/gpu.py` uses it
there. Nothing but the standard library is imported, since there the rest may be missing.
"""

import argparse
import gzip
import hashlib
import importlib.util
import json
import lzma
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / ".gpu"
PREPARE = ROOT / "data" / "prepare.py"
PLATFORMS = ["manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1"]
WHEELS = ["zstandard"]  # what the lent machines lack of requirements.txt
SIZES = (1024, 8192)  # pieces of the tokenizers that phases use
MIB = 2**20
AIM, MOST = 56 * MIB, 60 * MIB  # of the whole folder; 64 MiB travel, the checkout included
SAMPLE_BYTES = 10**6  # of text by which the size of a dataset is foreseen
PARTS = ("", "benchmarks", "data", "amx_attention", "tests")  # folders of our programs
Settings = dict[str, str]


class KitError(Exception):
    """What was wrong with the folder, and what to do."""


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name and rename it, so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8", errors="replace")
    os.replace(partial, path)


def sources() -> dict[str, str]:
    """Give the SHA-256 of our programs, by path."""
    paths = [path for part in PARTS for path in sorted((ROOT / part).glob("*.py"))]
    return {
        str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }


def git(*arguments: str) -> str | None:
    """Ask git about this checkout; None where there is no git, or no checkout of it."""
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()


def size_of(folder: Path) -> int:
    """Count the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ===================================== TO MAKE IT =====================================


def call(command: list[str], advice: str) -> None:
    """Run a program and show what it prints. Raises KitError."""
    print("$", " ".join(command), flush=True)
    done = subprocess.run(command)
    if done.returncode:
        raise KitError(f"{' '.join(command[:4])} ... ended with {done.returncode}; {advice}")


def requirement(name: str) -> str:
    """Find the line of requirements.txt for a package, such as zstandard>=0.23,<0.26."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    found = [line.strip() for line in lines if re.match(rf"{re.escape(name)}\b", line)]
    return found[0] if found else name


def plain_name(text: str) -> str:
    """Give the name of a package in a requirement or a wheel's name, as packages are compared."""
    found = re.match(r"[A-Za-z0-9._-]+", text)
    if not found:
        raise KitError(f"--wheels {text!r}: expected NAME==VERSION")
    return re.sub(r"[-_.]+", "_", found[0]).lower()


def fits(wheel: Path, wanted: str, python: str) -> bool:
    """Tell whether a wheel is of the package, version and Python that are wanted."""
    name, version, *_, tag, _, _ = wheel.stem.split("-")
    tags = {f"cp{python.replace('.', '')}", "py3", "py2.py3"}
    exact = wanted.partition("==")[2].strip()
    right_python = tag in tags or "-abi3-" in wheel.name
    same = plain_name(name) == plain_name(wanted)
    return same and right_python and exact in ("", version)


def fetch_wheels(folder: Path, wanted: list[str], python: str) -> None:
    """Fetch the wheels that are not there yet, and remove all others."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        if not any(fits(wheel, each, python) for each in wanted):
            wheel.unlink()
    tags = [word for tag in PLATFORMS for word in ("--platform", f"{tag}_x86_64")]
    options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", *tags]
    options += ["--python-version", python, "--disable-pip-version-check"]
    for each in wanted:
        if not any(fits(wheel, each, python) for wheel in folder.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), each]
            call(command, "is there a network, and a wheel of that version for that Python?")


def opened(path: Path) -> IO[bytes]:
    """Open a corpus, which may be compressed, for reading."""
    kinds = {".xz": lzma.open, ".gz": gzip.open}
    return kinds.get(path.suffix, open)(path, "rb")


def records(path: Path) -> Iterator[str]:
    """Yield the texts of a corpus. Raises KitError."""
    try:
        with opened(path) as lines:
            for line in lines:
                yield json.loads(line)["text"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, lzma.LZMAError) as problem:
        what = 'expected one JSON object a line, {"text": ...}, in .jsonl, .jsonl.xz or .jsonl.gz'
        raise KitError(f"--corpus {path}: {problem!r}; {what}") from None


def tokenizers_of(paths: list[Path]) -> dict[int, tuple[Path, Any]]:
    """Load tokenizers: path and processor, by their number of pieces. Raises KitError."""
    from sentencepiece import SentencePieceProcessor  # not needed to use the folder

    found = {}
    for path in paths:
        try:
            processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as problem:
            raise KitError(f"--tokenizers {path}: not a SentencePiece model: {problem}") from None
        found[len(processor)] = (path.resolve(), processor)
    if sorted(found) != sorted(SIZES):
        what = f"give one of {SIZES[0]} and one of {SIZES[1]} pieces"
        raise KitError(f"--tokenizers: those given have {sorted(found)} pieces; {what}")
    return found


def count_records(corpus: Path, processors: list[Any], room: int) -> int:
    """Count how many of a corpus's first records make datasets that fit into so many bytes.

    What a byte of text takes there is found out on the first of them.
    """
    sample: list[str] = []
    count, size, limit = 0, 0, math.inf
    for text in records(corpus):
        size += len(text.encode())
        if size > limit:
            break
        count += 1
        if limit == math.inf:
            sample.append(text)
            if size >= SAMPLE_BYTES:
                stored = [1 + len(ids) for each in processors for ids in each.encode(sample)]
                limit = 0.95 * room * size / max(1, 2 * sum(stored))
    if not count:
        raise KitError(f"--corpus {corpus}: holds no documents, or the first is too large")
    return count


def make_datasets(folder: Path, corpus: Path | None, models: list[Path], room: int) -> None:
    """Make the datasets, of the built-in sample or of a corpus, unless they are there already."""
    name = "corpus" if corpus else "sample"
    for other in (folder / "datasets").glob("[!.]*_sp*"):
        if not other.name.startswith(f"{name}_sp"):
            shutil.rmtree(other)
    command = [sys.executable, str(PREPARE), "--out", str(folder)]
    advice = "what it printed says why"
    if not corpus:
        for size in SIZES:
            call([*command, "--sample", "--vocab-size", str(size)], advice)
        return
    tokenizers = tokenizers_of(models)
    count = count_records(corpus, [each for _, each in tokenizers.values()], room)
    options = ["--name", name, "--val-fraction", "0.05", "--samples", str(count)]
    for path, _ in tokenizers.values():
        call([*command, str(corpus), *options, "--tokenizer", str(path)], advice)


def prepare(args: argparse.Namespace) -> None:
    """Make .gpu, or what is missing in it. Raises KitError."""
    if bool(args.corpus) != bool(args.tokenizers):
        raise KitError("--corpus and --tokenizers belong together: give both, or none")
    for path in [*([args.corpus] if args.corpus else []), *args.tokenizers]:
        if not path.is_file():
            raise KitError(f"{path}: no such file")
    wanted = args.wheels or [requirement(name) for name in WHEELS]
    fetch_wheels(KIT / "wheels", wanted, args.python)
    room = AIM - size_of(KIT / "wheels")
    make_datasets(KIT / "data", args.corpus, args.tokenizers, room)
    made = {"commit": git("rev-parse", "HEAD") or "unknown", "sources": sources()}
    made["changed"] = (git("status", "--porcelain") or "").splitlines()
    write_whole(KIT / "origin.json", json.dumps(made, indent=1) + "\n")
    sizes = {part: size_of(KIT / part) / MIB for part in ("wheels", "data")}
    whole = size_of(KIT)
    told = ", ".join(f"{part} {size:.1f} MiB" for part, size in sizes.items())
    if whole > MOST:
        what = f"{KIT} holds {whole / MIB:.1f} MiB ({told}), over the {MOST // MIB} that may travel"
        raise KitError(f"{what}; remove it, and give a smaller --corpus or fewer --wheels")
    print(f"\n{KIT}: {whole / MIB:.1f} MiB: {told}\n")
    print("There, in a copy of this checkout with .gpu in it:\n")
    print("    python3 benchmarks/gpu.py")
    print("\nBy the tool `device`, of this checkout:\n")
    call_there = {"command": "python3 benchmarks/gpu.py", "carry": [".gpu"], "timeout_s": 600}
    print(f"    run {json.dumps(call_there)}")


# ===================================== TO USE IT =====================================


def modules_of(wheel: Path) -> set[str]:
    """Give the names under which a wheel's packages and modules are imported."""
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    kept = (top for top in tops if not top.endswith((".dist-info", ".data", ".libs")))
    return {top.partition(".")[0] for top in kept}


def missing_wheels() -> list[Path]:
    """Find the wheels in .gpu of which something cannot be imported here."""

    def is_missing(wheel: Path) -> bool:
        try:
            return any(importlib.util.find_spec(name) is None for name in modules_of(wheel))
        except (OSError, ValueError, ImportError, zipfile.BadZipFile):
            return True  # pip will say what is wrong with it

    return [wheel for wheel in sorted((KIT / "wheels").glob("*.whl")) if is_missing(wheel)]


def install_command(wheels: list[Path], target: Path) -> list[str]:
    """Make the command that installs wheels into a folder, without a network."""
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    options += ["--disable-pip-version-check", "--target", str(target)]
    return [sys.executable, "-m", "pip", "install", "-q", *options, *map(str, wheels)]


def dataset_settings(folder: Path) -> Settings:
    """Give the settings of a dataset, if it is one of prepare.py's and whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        tokenizer = (folder / manifest["tokenizer"]["path"]).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if not tokenizer.is_file() or not any(folder.glob("fineweb_val_[0-9]*.bin")):
        return {}
    return {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(tokenizer)}


def find_datasets(data: Path, pattern: str = "*") -> dict[str, Settings]:
    """Give the settings of the datasets in a data folder, by the number of pieces."""
    found = {}
    for size in SIZES:
        for folder in sorted((data / "datasets").glob(f"{pattern}_sp{size}")):
            if settings := dataset_settings(folder):
                found[str(size)] = settings | {"VOCAB_SIZE": str(size)}
    return found


def origin() -> dict[str, Any]:
    """Tell what the checkout was when .gpu was made, and which of our programs differ."""
    try:
        known = json.loads((KIT / "origin.json").read_text(encoding="utf-8"))
        then, now = known.pop("sources"), sources()
    except (OSError, ValueError, KeyError, AttributeError):
        return {}
    differ = sorted(path for path in {*then, *now} if then.get(path) != now.get(path))
    return known | {"changed_since": differ}
