"""Make a dataset for train_gpt.py: a tokenizer and token shards in the challenge's format.

    python data/prepare.py --sample

needs no download. Its text is the docstrings of the Python standard library and of the packages
that requirements.txt installs, one document a module, read with ast and never imported. Below the
data folder (--out) it writes

    tokenizers/sample_1024_bpe.model               SentencePiece BPE, 1024 pieces
    datasets/sample_sp1024/fineweb_val_000000.bin  and fineweb_train_000000.bin
    datasets/sample_sp1024/manifest.json           what was made, and from what; written last

A second run finds the manifest, checks the files against it and does nothing.
"""

import argparse
import ast
import gc
import hashlib
import io
import json
import os
import platform
import re
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import sentencepiece as spm

DATA = Path(__file__).resolve().parent
VAL_FRACTION = 0.04  # of the documents
MIN_CHARS = 200  # a module with less docstring text makes no document
BATCH = 256  # documents tokenized at a time: bounds the memory, changes no result
TOKENIZER_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": 1024,
    "character_coverage": 0.999,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": False,
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
    "hard_vocab_limit": False,
    "num_threads": 1,  # the model file records it, so it must not follow the machine
}


class DataError(Exception):
    """The data cannot be made; the message says what is wrong, where, and what to do."""


# ---- sources: which files hold the text, and what text they hold


def installed_closure(requirements: Path) -> dict[str, str]:
    """Name -> version of every installed package that a requirements file asks for, directly or
    through dependencies. Optional extras are not followed. Raises OSError if it is unreadable."""
    todo = requirements.read_text(encoding="utf-8").splitlines()
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
    with get_context("spawn").Pool(max(1, processes), gc.disable) as pool:
        return pool.map(module_text, paths, chunksize=16)


# ---- documents: which texts count, in which order, for which split


def select_documents(texts: Iterable[str | None]) -> tuple[list[str], dict[str, int]]:
    """The distinct texts of at least MIN_CHARS characters, ordered by the SHA-256 of their UTF-8
    (so the order depends on nothing else), and how many were skipped, by reason."""
    kept: dict[bytes, str] = {}
    skipped = {"unreadable": 0, "short": 0, "duplicate": 0}
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


def split_documents(documents: Sequence[str]) -> dict[str, Sequence[str]]:
    """The first VAL_FRACTION of the documents (at least one) as "val", the rest as "train"."""
    count = max(1, round(len(documents) * VAL_FRACTION))
    if len(documents) <= count:
        raise DataError(
            f"found {len(documents)} document(s) of {MIN_CHARS} characters or more, but each of "
            "the two splits needs one: is this Python installed without its .py files?"
        )
    return {"val": documents[:count], "train": documents[count:]}


# ---- tokenizer


def train_tokenizer(documents: Iterable[str], options: dict[str, Any]) -> bytes:
    """A SentencePiece model trained on the lines of the documents, as the bytes of its file.
    Raises DataError if they do not suffice for `vocab_size` pieces and a "▁" piece of its own,
    without which every lone space would become three byte tokens."""
    lines = (line for text in documents for line in text.splitlines() if line.strip())
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, minloglevel=2, **options
        )
    except RuntimeError as error:
        raise DataError(f"SentencePiece cannot train a tokenizer on this text: {error}") from None
    tokenizer = spm.SentencePieceProcessor(model_proto=model.getvalue())
    if tokenizer.vocab_size() != options["vocab_size"]:
        raise DataError(
            f"the text gives a tokenizer of {tokenizer.vocab_size()} pieces, "
            f"{options['vocab_size']} were asked for: use more text"
        )
    if tokenizer.piece_to_id("▁") == tokenizer.unk_id():
        raise DataError("the tokenizer has no piece for a lone space (▁): use more text")
    return model.getvalue()


# ---- files


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends without an error: it is
    written under a temporary name in the same folder, synced and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(
    path: Path, documents: Iterable[str], tokenizer: spm.SentencePieceProcessor
) -> dict[str, int]:
    """Write one shard: 256 int32 of header, then BOS and tokens of each document in uint16, all
    little-endian. Returns counts: documents, tokens (with BOS), bytes of the documents' UTF-8, and
    decoded_bytes of what the tokens decode to: what BPB divides by, and less than bytes, because
    the tokenizer folds runs of whitespace."""
    counts = Counter(documents=0, tokens=0, bytes=0, decoded_bytes=0)
    header = np.zeros(256, dtype="<i4")
    remaining = iter(documents)
    with replacing(path) as file:
        file.write(header.tobytes())
        while texts := list(islice(remaining, BATCH)):
            ids = tokenizer.encode(texts, add_bos=True)
            counts["documents"] += len(texts)
            counts["tokens"] += sum(map(len, ids))
            counts["bytes"] += sum(len(text.encode()) for text in texts)
            counts["decoded_bytes"] += sum(len(text.encode()) for text in tokenizer.decode(ids))
            file.write(np.concatenate(ids).astype("<u2").tobytes())
        header[:3] = 20240520, 1, counts["tokens"]  # magic, version
        file.seek(0)
        file.write(header.tobytes())
    return dict(counts)


def dataset_paths(out: Path, name: str, vocab_size: int) -> dict[str, Path]:
    """Where tokenizer, val, train and manifest of a dataset lie below the data folder `out`."""
    folder = out / "datasets" / f"{name}_sp{vocab_size}"
    return {
        "tokenizer": out / "tokenizers" / f"{name}_{vocab_size}_bpe.model",
        "val": folder / "fineweb_val_000000.bin",
        "train": folder / "fineweb_train_000000.bin",
        "manifest": folder / "manifest.json",
    }


def file_records(paths: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Path relative to the manifest, size in bytes and SHA-256 of the files beside the manifest."""
    records = {}
    for role in ("tokenizer", "val", "train"):
        with open(paths[role], "rb") as file:
            records[role] = {
                "path": os.path.relpath(paths[role], paths["manifest"].parent),
                "size": os.fstat(file.fileno()).st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    return records


# ---- from documents to a dataset


def is_current(paths: dict[str, Path], inputs: dict[str, Any]) -> bool:
    """Whether the dataset is there, whole, and made from `inputs`."""
    try:
        manifest = json.loads(paths["manifest"].read_bytes())
        return manifest["inputs"] == inputs and manifest["files"] == file_records(paths)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_dataset(
    paths: dict[str, Path], texts: Iterable[str | None], inputs: dict[str, Any]
) -> dict[str, Any]:
    """Write tokenizer, shards and last the manifest, which is returned. The tokenizer is trained
    on the training documents alone, with inputs["options"]["tokenizer"]."""
    documents, skipped = select_documents(texts)
    splits = split_documents(documents)
    model = train_tokenizer(splits["train"], inputs["options"]["tokenizer"])
    tokenizer = spm.SentencePieceProcessor(model_proto=model)
    paths["manifest"].unlink(missing_ok=True)  # until it is there again, the dataset is not whole
    with replacing(paths["tokenizer"]) as file:
        file.write(model)
    manifest = {
        "inputs": inputs,
        "skipped": skipped,
        "splits": {name: write_shard(paths[name], splits[name], tokenizer) for name in splits},
        "files": file_records(paths),
    }
    with replacing(paths["manifest"]) as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")
    return manifest


def print_summary(paths: dict[str, Path], manifest: dict[str, Any]) -> None:
    """Say what was made."""
    print(f"{'split':<6}{'documents':>10}{'text MB':>10}{'tokens':>12}{'bytes/token':>13}")
    for name, n in manifest["splits"].items():
        megabytes, ratio = n["bytes"] / 1e6, n["decoded_bytes"] / n["tokens"]
        print(f"{name:<6}{n['documents']:>10,}{megabytes:>10.2f}{n['tokens']:>12,}{ratio:>13.3f}")
    print("modules skipped:", ", ".join(f"{n:,} {why}" for why, n in manifest["skipped"].items()))
    print(f"shards     {paths['manifest'].parent}\ntokenizer  {paths['tokenizer']}")


def make_sample(out: Path, requirements: Path, processes: int, force: bool) -> None:
    """Make the docstring sample below `out` unless it is there already, and print the outcome."""
    start = time.perf_counter()
    packages = installed_closure(requirements)
    paths = dataset_paths(out, "sample", TOKENIZER_OPTIONS["vocab_size"])
    options = {"val_fraction": VAL_FRACTION, "min_chars": MIN_CHARS, "tokenizer": TOKENIZER_OPTIONS}
    versions = {"python": platform.python_version(), "sentencepiece": spm.__version__}
    inputs = {"options": options, "versions": versions | {"packages": packages}}
    if not force and is_current(paths, inputs):
        print(f"{paths['manifest'].parent} is up to date (--force makes it again)")
        return
    files = tree_files(Path(sysconfig.get_path("stdlib")))
    files += [file for name in packages for file in package_files(name)]
    sources = f"the standard library and {len(packages)} packages"
    print(f"reading {len(files):,} modules of {sources} ...", flush=True)
    print_summary(paths, write_dataset(paths, read_modules(files, processes), inputs))
    print(f"done in {time.perf_counter() - start:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Make a tokenizer and token shards from text.")
    add, cores, listed = parser.add_argument, os.cpu_count() or 1, DATA.parent / "requirements.txt"
    add("--sample", action="store_true", help="use the docstrings of the installed packages")
    add("--out", type=Path, default=DATA, metavar="DIR", help="data folder (%(default)s)")
    add("--requirements", type=Path, default=listed, help="names the packages (%(default)s)")
    add("--processes", type=int, default=cores, help="that read the modules (%(default)s)")
    add("--force", action="store_true", help="make it again even if it is up to date")
    args = parser.parse_args(argv)
    if not args.sample:
        parser.print_help(sys.stderr)
        parser.exit(2, "\nerror: only the built-in sample can be made so far: add --sample\n")
    if not args.requirements.is_file():
        parser.exit(2, f"error: no file {args.requirements}: name one with --requirements\n")
    try:
        make_sample(args.out, args.requirements, args.processes, args.force)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
