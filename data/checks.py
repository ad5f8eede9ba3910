"""Verification of a dataset: files, headers, tokens, byte counts, and the border of the splits."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from console import text_name
from shards import DataError, ProgressBar, WorkerPool, map_tokens, shard_paths
from vocabulary import Vocabulary, file_digest, load_vocabulary

BATCH = 256  # documents decoded at a time
# The published validation split, 50,000 documents, whatever the tokenizer: text bytes, and tokens.
PUBLISHED_DOCUMENTS, PUBLISHED_BYTES = 50_000, (151_050_000, 151_110_000)
PUBLISHED_TOKENS = {"sp1024": 62_020_000, "sp4096": 45_500_000, "sp8192": 40_540_000}


@dataclass
class Findings:
    """What a pass over the documents of a shard, or of a split, has found."""

    documents: int = 0
    tokens: int = 0
    counted_bytes: int = 0
    decoded_bytes: int = 0
    highest: int = 0
    leaked: int = 0
    unknown: int = 0
    digests: set[bytes] = field(default_factory=set)

    def add(self, other: "Findings") -> None:
        """Take in what was found in another shard."""
        sums = ("documents", "tokens", "counted_bytes", "decoded_bytes", "leaked", "unknown")
        for name in sums:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.highest = max(self.highest, other.highest)
        self.digests |= other.digests


def shard_documents(paths: list[Path], number: int, bos: int) -> Iterator[np.ndarray]:
    """The documents that begin in shard `number`, without their BOS; the last one may end in a
    shard behind it."""
    tokens = map_tokens(paths[number])
    starts = np.flatnonzero(tokens == bos)
    for start, end in pairwise(starts):
        yield tokens[start + 1 : end]
    if len(starts):
        parts = [tokens[starts[-1] + 1 :]]
        for path in paths[number + 1 :]:
            following = map_tokens(path)
            ends = np.flatnonzero(following == bos)
            parts.append(following[: ends[0]] if len(ends) else following)
            if len(ends):
                break
        yield np.concatenate(parts)


def inspect_shard(
    tokenizer: Path, paths: list[Path], forbidden: set[bytes], number: int
) -> Findings:
    """Count, decode and compare the documents that begin in a shard. Digests are kept if nothing
    is forbidden, that is, of validation documents."""
    vocabulary, found = load_vocabulary(tokenizer), Findings()
    tokens = map_tokens(paths[number])
    found.tokens, found.highest = len(tokens), int(tokens.max())
    batch: list[np.ndarray] = []
    for ids in shard_documents(paths, number, vocabulary.bos):
        found.highest = max(found.highest, int(ids.max(initial=0)))
        if found.highest >= vocabulary.size:
            return found
        found.documents += 1
        found.unknown += int((ids == vocabulary.unknown).sum())
        digest = hashlib.blake2b(np.ascontiguousarray(ids), digest_size=16).digest()
        found.leaked += digest in forbidden
        if not forbidden:
            found.digests.add(digest)
        batch.append(ids)
        if len(batch) == BATCH:
            count_bytes(vocabulary, batch, found)
            batch = []
    count_bytes(vocabulary, batch, found)
    return found


def count_bytes(vocabulary: Vocabulary, documents: list[np.ndarray], found: Findings) -> None:
    """Add the bytes of documents, by the pieces' lengths and by decoding."""
    found.counted_bytes += sum(int(vocabulary.lengths(ids).sum()) for ids in documents)
    found.decoded_bytes += vocabulary.decoded_bytes(documents)


def inspect_split(
    tokenizer: Path, paths: list[Path], forbidden: set[bytes], processes: int
) -> Findings:
    """`inspect_shard` of all shards of a split."""
    total = Findings()
    task = partial(inspect_shard, tokenizer, paths, forbidden)
    with WorkerPool(processes) as pool:
        results = pool.map(task, range(len(paths)))
        for found in ProgressBar(results, total=len(paths), desc="checking", unit="shard"):
            total.add(found)
    return total


class Report:
    """Prints one line a rule, and remembers whether all held."""

    def __init__(self) -> None:
        self.passed = True

    def rule(self, name: str, check: Callable[[], str]) -> None:
        """Run a check, which returns what it saw or raises DataError or OSError."""
        try:
            word, text = "ok", check()
        except (DataError, OSError) as error:
            word, text, self.passed = "FAIL", str(error), False
        print(f"{word:<5} {name:<12} {text}", flush=True)


def demand(condition: Any, problem: str) -> None:
    """Raise DataError with `problem` unless `condition` holds."""
    if not condition:
        raise DataError(problem)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a dataset made by prepare.py, or {} if there is none. Raises DataError if it
    is not one."""
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a manifest of prepare.py: {error}") from None
    demand(is_manifest(manifest), f"{path}: not a manifest of prepare.py: a field is missing")
    return manifest


def is_manifest(value: Any) -> bool:
    """Whether a JSON value has what is read of a manifest, in its types."""
    match value:
        case {
            "files": dict(),
            "splits": {"val": dict(val), "train": dict(train)},
            "tokenizer": {"path": str(path), "sha256": str()},
            "inputs": [*inputs],
        }:
            counts = [*val.values(), *train.values()]
            named = all(isinstance(entry, dict) and "name" in entry for entry in inputs)
            return named and "\0" not in path and all(isinstance(n, int) for n in counts)
    return False


def find_tokenizer(folder: Path, manifest: dict[str, Any]) -> Path:
    """The tokenizer that the manifest names, or that a published dataset's name implies. Raises
    DataError if there is none."""
    if manifest:
        return folder / text_name(manifest["tokenizer"]["path"])
    variant = folder.resolve().name.rpartition("_")[2]
    name = (
        "fineweb_pure_byte_260.json" if variant == "byte260" else f"fineweb_{variant[2:]}_bpe.model"
    )
    path = folder.resolve().parent.parent / "tokenizers" / name
    demand(path.is_file(), f"{folder}: no tokenizer at {path}: name it with --tokenizer")
    return path


def file_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of the shards and sidecars in a folder, by name."""
    paths = [path for split in ("train", "val", "val_bytes") for path in shard_paths(folder, split)]
    return {path.name: {"size": path.stat().st_size, "sha256": file_digest(path)} for path in paths}


def check_files(folder: Path, manifest: dict[str, Any], tokenizer: Path) -> str:
    """Compare the files with the manifest."""
    records = file_records(folder)
    for name in sorted({*records, *manifest["files"]}):
        recorded, here = manifest["files"].get(name), records.get(name)
        demand(recorded, f"{folder / name}: not in manifest.json; remove it, or make the set again")
        demand(here, f"{folder / name}: missing; make the dataset again")
        demand(here == recorded, f"{folder / name}: not the file that manifest.json records")
    same = file_digest(tokenizer) == manifest["tokenizer"]["sha256"]
    demand(same, f"{tokenizer}: not the tokenizer that manifest.json records")
    return f"{len(records)} files and the tokenizer are those of manifest.json (SHA-256)"


def check_headers(folder: Path, vocabulary: Vocabulary) -> str:
    """Check that both splits have whole shards in sequence, each split beginning with BOS."""
    seen = []
    for split in ("train", "val"):
        paths = shard_paths(folder, split)
        demand(paths, f"{folder}: no fineweb_{split}_*.bin")
        expected = [f"fineweb_{split}_{number:06d}.bin" for number in range(len(paths))]
        missing = sorted({*expected} - {path.name for path in paths})
        demand(not missing, f"{folder}: the sequence has a gap: no {', '.join(missing)}")
        tokens = [map_tokens(path) for path in paths]
        first = int(tokens[0][0])
        demand(first == vocabulary.bos, f"{paths[0]}: begins with id {first}, not with BOS")
        seen.append(f"{sum(map(len, tokens)):,} tokens in {len(paths)} {split} shard(s)")
    return ", ".join(seen)


def check_split(found: Findings, vocabulary: Vocabulary, recorded: dict[str, int]) -> str:
    """Check ids, bytes and numbers of a split's documents."""
    top = f"id {found.highest} occurs, the tokenizer has {vocabulary.size}"
    demand(found.highest < vocabulary.size, top)
    counted, decoded = found.counted_bytes, found.decoded_bytes
    demand(counted == decoded, f"pieces count {counted:,} bytes, the text has {decoded:,}")
    here = {"documents": found.documents, "tokens": found.tokens, "decoded_bytes": decoded}
    here["unknown_tokens"] = found.unknown
    for name, value in here.items():
        expected = recorded.get(name, value)
        demand(value == expected, f"{value:,} {name}, manifest.json says {expected:,}")
    ratio = decoded / max(1, found.tokens)
    text = f"{found.documents:,} documents, {decoded:,} bytes decoded, {ratio:.3f} bytes/token"
    if not found.unknown:
        return text
    lost = recorded.get("unknown_bytes")
    of_text = "" if lost is None else f" for {lost:,} bytes of text"
    return f"{text}, {found.unknown:,} unknown pieces{of_text}"


def check_sidecars(folder: Path, bos: int, recorded: dict[str, int]) -> str:
    """Check that every validation token has its bytes, none at BOS, and their sum."""
    total, paths = 0, shard_paths(folder, "val")
    sidecars = shard_paths(folder, "val_bytes")
    demand(len(sidecars) == len(paths), f"{len(sidecars)} sidecars for {len(paths)} shards")
    for path, sidecar in zip(paths, sidecars, strict=True):
        tokens, sizes = map_tokens(path), map_tokens(sidecar)
        demand(len(tokens) == len(sizes), f"{sidecar}: {len(sizes)} sizes, {len(tokens)} tokens")
        demand(not sizes[tokens == bos].any(), f"{sidecar}: counts bytes for BOS")
        total += int(sizes.sum(dtype=np.int64))
    expected = recorded.get("bytes", total)
    demand(total == expected, f"{total:,} bytes, manifest.json says {expected:,}")
    return f"{total:,} original bytes"


def check_leakage(val: Findings, train: Findings, strict: bool) -> str:
    """Check that no validation document is also in training. A published set, which nobody has
    cleaned of duplicates, may have a few (a thousandth of the validation documents)."""
    what = f"{train.leaked:,} training documents are also validation documents"
    demand(train.leaked <= (0 if strict else val.documents // 1000), what)
    return what


def check_published(variant: str, found: Findings) -> str:
    """Compare a validation split with the published one's totals (techniques.md 1.5)."""
    low, high = PUBLISHED_BYTES
    counts = (
        f"{found.documents:,} documents, {found.decoded_bytes:,} bytes, {found.tokens:,} tokens"
    )
    whole = found.documents == PUBLISHED_DOCUMENTS and low <= found.decoded_bytes <= high
    expected = f"{PUBLISHED_DOCUMENTS:,} documents and about 151.08 MB of text"
    demand(whole, f"{counts}; the published split has {expected}")
    tokens = PUBLISHED_TOKENS.get(variant, found.tokens)
    demand(abs(found.tokens / tokens - 1) < 2e-3, f"{counts}; published: about {tokens:,} tokens")
    return f"{counts}, as published"


def check_dataset(folder: Path, tokenizer: Path | None, processes: int) -> bool:
    """Verify a dataset made by prepare.py or downloaded, print a line a rule, and return whether
    all held. Raises DataError if there is nothing to verify."""
    demand(folder.is_dir(), f"{folder}: no such folder")
    manifest = read_manifest(folder)
    model = tokenizer or find_tokenizer(folder, manifest)
    vocabulary, report = load_vocabulary(model), Report()
    if manifest:
        report.rule("files", lambda: check_files(folder, manifest, model))
    report.rule("shards", lambda: check_headers(folder, vocabulary))
    if not report.passed:
        return False
    recorded = manifest.get("splits", {})
    val = inspect_split(model, shard_paths(folder, "val"), set(), processes)
    train = inspect_split(model, shard_paths(folder, "train"), val.digests, processes)
    for split, found in (("val", val), ("train", train)):
        counts = recorded.get(split, {})
        report.rule(split, partial(check_split, found, vocabulary, counts))
    if shard_paths(folder, "val_bytes"):
        counts = recorded.get("val", {})
        report.rule("sidecars", lambda: check_sidecars(folder, vocabulary.bos, counts))
    report.rule("leakage", lambda: check_leakage(val, train, strict=bool(manifest)))
    published = re.fullmatch(r"fineweb10B_(\w+)", folder.resolve().name)
    if published and not manifest:
        report.rule("published", lambda: check_published(published[1], val))
    return report.passed
