"""Verification of a dataset: files, headers, tokens, byte counts, and the border of the splits."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from caseops import CaseError, decode_case, has_stray_control, invert_case
from console import text_name
from digests import combined_digest, text_digest, text_key
from shards import DataError, ProgressBar, WorkerPool, map_tokens, shard_paths, token_count
from vocabulary import Vocabulary, file_digest, load_vocabulary

BATCH = 256  # documents decoded at a time
# The published validation split, 50,000 documents, whatever the tokenizer: text bytes, and tokens.
PUBLISHED_DOCUMENTS, PUBLISHED_BYTES = 50_000, (151_050_000, 151_110_000)
PUBLISHED_CASEOPS = "sp8192_lossless_caps_caseops_v1_reserved"
PUBLISHED_TOKENS = {
    **{"sp1024": 62_020_000, "sp4096": 45_500_000, "sp8192": 40_540_000},
    **{PUBLISHED_CASEOPS: 47_850_000},
}
# Sets that were made of the published text with 10,000 validation documents, so that 40,000 of the
# published 50,000 are in training, have 1,499 train shards (techniques.md 1.5).
PUBLISHED_TRAIN_SHARDS = {PUBLISHED_CASEOPS: 80}
# Where a tokenizer normalizes, a sidecar counts bytes that the tokens do not give back: blanks in
# runs, compatibility characters. On the published export that is under 0.03% of the text, by the
# logs (techniques.md 1.5); of 24 MB of Markdown and prose 0.6%, and 14% of the worst document. A
# sidecar that counts the image is 14% too high in all.
SIDECAR_TOLERANCE = 0.01  # of all bytes
DOCUMENT_TOLERANCE = 0.25  # of a document's bytes, but for a hundredth of the documents
FEW = 0.01  # of the documents: "É" in two characters becomes one, behind its control
SHOWN = 3  # problems of a kind that are told


@dataclass
class Problems:
    """What is wrong with single documents: the number of them, and the first few."""

    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        """Take in what is wrong with a document."""
        self.count += 1
        self.shown = [*self.shown, problem][:SHOWN]

    def extend(self, other: "Problems") -> None:
        """Take in those of another shard."""
        self.count += other.count
        self.shown = [*self.shown, *other.shown][:SHOWN]

    def demand_none(self, what: str) -> None:
        """Raise DataError if there is one."""
        more = f"; ... {self.count:,} in all" if self.count > len(self.shown) else ""
        demand(not self.count, f"{what}: {'; '.join(self.shown)}{more}")


@dataclass
class Findings:
    """What a pass over the documents of a shard, or of a split, has found."""

    documents: int = 0
    tokens: int = 0
    counted_bytes: int = 0
    decoded_bytes: int = 0
    highest: int = 0
    leaked: int = 0
    excluded: int = 0  # documents that are also in the validation of another dataset
    unknown: int = 0
    stray: int = 0  # documents with a control that has nothing to act on
    off: int = 0  # documents whose part of the sidecar is far from what their tokens give back
    digests: set[bytes] = field(default_factory=set)
    texts: bytes = b""  # the digests of the texts, in their order
    malformed: Problems = field(default_factory=Problems)
    sidecar: Problems = field(default_factory=Problems)

    def add(self, other: "Findings") -> None:
        """Take in what was found in another shard."""
        sums = ("documents", "tokens", "counted_bytes", "decoded_bytes", "leaked", "excluded")
        for name in (*sums, "unknown", "stray", "off"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.highest = max(self.highest, other.highest)
        self.digests |= other.digests
        self.texts += other.texts
        self.malformed.extend(other.malformed)
        self.sidecar.extend(other.sidecar)


Span = list[tuple[int, int, int]]  # numbers of shards, and from where to where in each


def document_spans(paths: Sequence[Path], number: int, bos: int) -> Iterator[Span]:
    """Where the documents that begin in shard `number` stand, without their BOS; the last one may
    end in a shard behind it."""
    tokens = map_tokens(paths[number])
    starts = np.flatnonzero(tokens == bos).tolist()
    for start, end in pairwise(starts):
        yield [(number, start + 1, end)]
    if not starts:
        return
    span = [(number, starts[-1] + 1, len(tokens))]
    for behind in range(number + 1, len(paths)):
        following = map_tokens(paths[behind])
        ends = np.flatnonzero(following == bos)
        span.append((behind, 0, int(ends[0]) if len(ends) else len(following)))
        if len(ends):
            break
    yield span


def gather(paths: Sequence[Path], span: Span) -> np.ndarray:
    """What stands in shards at a span, uint16 (N,)."""
    parts = [map_tokens(paths[number])[start:end] for number, start, end in span]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def shard_documents(paths: Sequence[Path], number: int, bos: int) -> Iterator[np.ndarray]:
    """The documents that begin in shard `number`, without their BOS."""
    return (gather(paths, span) for span in document_spans(paths, number, bos))


@dataclass(frozen=True)
class Inspection:
    """What a pass over the shards of a split compares."""

    tokenizer: Path
    paths: Sequence[Path]
    sidecars: Sequence[Path] = ()  # one a shard and as long, or none
    forbidden: Collection[bytes] = frozenset()  # digests of the tokens of validation documents
    keys: Collection[bytes] = frozenset()  # of the texts of another dataset's validation


@dataclass(frozen=True)
class Found:
    """A document: its name for a person, its tokens, and its part of the sidecar, if any."""

    name: str
    ids: np.ndarray
    sizes: np.ndarray | None


def inspect_shard(plan: Inspection, number: int) -> Findings:
    """Count, decode and compare the documents that begin in a shard. Digests are kept if nothing
    is forbidden, that is, of validation documents."""
    vocabulary, found = load_vocabulary(plan.tokenizer), Findings()
    tokens = map_tokens(plan.paths[number])
    found.tokens, found.highest = len(tokens), int(tokens.max())
    batch: list[Found] = []
    for span in document_spans(plan.paths, number, vocabulary.bos):
        ids = gather(plan.paths, span)
        found.highest = max(found.highest, int(ids.max(initial=0)))
        if found.highest >= vocabulary.size:
            return found
        found.documents += 1
        found.unknown += int((ids == vocabulary.unknown).sum())
        digest = hashlib.blake2b(np.ascontiguousarray(ids), digest_size=16).digest()
        found.leaked += digest in plan.forbidden
        if not plan.forbidden:
            found.digests.add(digest)
        where = f"token {span[0][1] - 1:,}"
        name = f"{plan.paths[number].name}, document {found.documents:,} (at {where})"
        sizes = gather(plan.sidecars, span) if plan.sidecars else None
        batch.append(Found(name, ids, sizes))
        if len(batch) == BATCH:
            inspect_batch(vocabulary, plan, batch, found)
            batch = []
    inspect_batch(vocabulary, plan, batch, found)
    return found


def inspect_batch(
    vocabulary: Vocabulary, plan: Inspection, batch: list[Found], found: Findings
) -> None:
    """Add what is found in some documents: bytes, by the pieces' lengths and by decoding, and what
    their texts say."""
    documents = [document.ids for document in batch]
    found.counted_bytes += sum(int(vocabulary.lengths(ids).sum()) for ids in documents)
    found.decoded_bytes += vocabulary.decoded_bytes(documents)
    if not (vocabulary.case_ops or vocabulary.lossless or plan.keys):
        return
    for document, decoded in zip(batch, vocabulary.decode(documents), strict=True):
        text = original_text(vocabulary, document.name, decoded, found)
        found.texts += text_digest(text)
        found.excluded += bool(plan.keys) and text_key(text) in plan.keys
        if document.sizes is not None and (vocabulary.case_ops or vocabulary.lossless):
            size = len(text.encode())
            off = abs(int(document.sizes.sum(dtype=np.int64)) - size)
            found.off += off > DOCUMENT_TOLERANCE * size
            if problem := sidecar_problem(vocabulary, document, size):
                found.sidecar.add(f"{document.name}: {problem}")


def original_text(vocabulary: Vocabulary, name: str, decoded: str, found: Findings) -> str:
    """The text of a document that was decoded: itself, or what CaseOps inverts it to, strictly
    where the tokenizer is lossless."""
    if not vocabulary.case_ops:
        return decoded
    if not vocabulary.lossless:
        found.stray += has_stray_control(decoded)
        return invert_case(decoded)
    try:
        return decode_case(decoded)
    except CaseError as error:
        found.malformed.add(f"{name}: {error}")
        return invert_case(decoded)


def sidecar_problem(vocabulary: Vocabulary, document: Found, text_bytes: int) -> str:
    """Say what is wrong with a document's part of the sidecar, or nothing.

    With a lossless tokenizer each token has the bytes of its piece; those of a character that is
    several byte tokens may stand at any of these.
    """
    ids, sizes = document.ids, document.sizes
    acting = vocabulary.acting(ids)
    if sizes[acting].any():
        return "its sidecar counts bytes for CaseOps controls, which have none"
    if not vocabulary.lossless:
        return ""
    total = int(sizes.sum(dtype=np.int64))
    if total != text_bytes:
        return f"its sidecar counts {total:,} bytes, its text has {text_bytes:,}"
    expected = np.cumsum(vocabulary.exact_lengths(ids))
    counted = np.cumsum(sizes, dtype=np.int64)
    wrong = np.flatnonzero((expected != counted) & vocabulary.character_ends(ids))
    return f"its sidecar is wrong at the document's token {wrong[0] + 1:,}" if len(wrong) else ""


def inspect_split(plan: Inspection, processes: int) -> Findings:
    """`inspect_shard` of all shards of a split."""
    total = Findings()
    task = partial(inspect_shard, plan)
    with WorkerPool(processes) as pool:
        results = pool.map(task, range(len(plan.paths)))
        for found in ProgressBar(results, total=len(plan.paths), desc="checking", unit="shard"):
            total.add(found)
    return total


def validation_keys(folder: Path) -> set[bytes]:
    """The keys of the texts of a dataset's validation documents. Raises DataError."""
    demand(folder.is_dir(), f"{folder}: no such folder (--exclude-val)")
    paths = shard_paths(folder, "val")
    demand(paths, f"{folder}: no fineweb_val_*.bin (--exclude-val)")
    vocabulary = load_vocabulary(find_tokenizer(folder, read_manifest(folder)))
    keys = set()
    for number in range(len(paths)):
        for ids in shard_documents(paths, number, vocabulary.bos):
            demand(ids.max(initial=0) < vocabulary.size, f"{folder}: ids over the tokenizer's")
            (text,) = vocabulary.decode([ids])
            keys.add(text_key(invert_case(text) if vocabulary.case_ops else text))
    demand(keys, f"{folder}: no document in its validation shards (--exclude-val)")
    return keys


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
    name = "fineweb_pure_byte_260.json"  # of the variant byte260
    if variant := re.search(r"_sp(\d+)((?:_\w+)?)$", folder.resolve().name):
        size, kind = variant.groups()
        name = f"fineweb_{size}_bpe{kind}.model"
    path = folder.resolve().parent.parent / "tokenizers" / name
    demand(path.is_file(), f"{folder}: no tokenizer at {path}: name it with --tokenizer")
    return path


def file_records(
    folder: Path, splits: Sequence[str] = ("train", "val", "val_bytes")
) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of the shards and sidecars in a folder, by name."""
    paths = [path for split in splits for path in shard_paths(folder, split)]
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


def check_texts(split: str, found: Findings, vocabulary: Vocabulary, manifest: Any) -> str:
    """Check that the texts are those that the manifest was written of, which a tokenizer that
    normalizes does not tell, and that CaseOps is inverted everywhere."""
    found.malformed.demand_none("not an image of CaseOps")
    share = found.stray / max(1, found.documents)
    stray = f"{found.stray:,} documents have CaseOps controls that have nothing to act on"
    demand(manifest or share <= FEW, stray)
    if not vocabulary.lossless:
        return f"{found.documents:,} documents inverted; {stray}: the tokenizer normalizes"
    digest = combined_digest(found.texts).hexdigest()
    if not manifest:
        return f"{found.documents:,} documents inverted; no manifest.json to compare them with"
    digests = manifest.get("text_digests")
    expected = digests.get(split) if isinstance(digests, dict) else None
    if expected is None and not vocabulary.case_ops:
        return "manifest.json, of an older prepare.py, has no digest of the texts"
    demand(expected, "manifest.json has no digest of the texts; make the dataset again")
    demand(digest == expected, "the texts are not those that manifest.json was written of")
    return f"{found.documents:,} documents give the original text (digest)"


def usable_sidecars(folder: Path) -> list[Path]:
    """The sidecars of a folder, if there is one for each validation shard, as long as that."""
    sidecars = shard_paths(folder, "val_bytes")
    counts = [token_count(path) for path in shard_paths(folder, "val")]
    try:
        same = counts == [token_count(path) for path in sidecars]
    except (DataError, OSError):
        return []
    return sidecars if same else []


def check_sidecars(
    folder: Path, vocabulary: Vocabulary, found: Findings, recorded: dict[str, int]
) -> str:
    """Check that every validation token has its bytes, none at BOS, and their sum."""
    paths, sidecars = shard_paths(folder, "val"), shard_paths(folder, "val_bytes")
    what = f"{len(sidecars)} sidecars for {len(paths)} shards"
    needed = "; CaseOps needs the original bytes of each validation token (fineweb_val_bytes_*.bin)"
    demand(len(sidecars) == len(paths), what + (needed if vocabulary.case_ops else ""))
    total = 0
    for path, sidecar in zip(paths, sidecars, strict=True):
        tokens, sizes = map_tokens(path), map_tokens(sidecar)
        demand(len(tokens) == len(sizes), f"{sidecar}: {len(sizes)} sizes, {len(tokens)} tokens")
        demand(not sizes[tokens == vocabulary.bos].any(), f"{sidecar}: counts bytes for BOS")
        total += int(sizes.sum(dtype=np.int64))
    found.sidecar.demand_none("original bytes")
    expected = recorded.get("bytes", total)
    demand(total == expected, f"{total:,} bytes, manifest.json says {expected:,}")
    if vocabulary.case_ops and "bytes" not in recorded:
        off = abs(total - found.decoded_bytes)
        text = f"{total:,} bytes, but the text without CaseOps has {found.decoded_bytes:,}"
        demand(off <= SIDECAR_TOLERANCE * found.decoded_bytes, text)
        many = f"the sidecar is far from the text of {found.off:,} documents"
        demand(found.off <= FEW * found.documents, many)
    return f"{total:,} original bytes"


def check_leakage(val: Findings, train: Findings, strict: bool) -> str:
    """Check that no validation document is also in training. A published set, which nobody has
    cleaned of duplicates, may have a few (a thousandth of the validation documents)."""
    what = f"{train.leaked:,} training documents are also validation documents"
    demand(train.leaked <= (0 if strict else val.documents // 1000), what)
    return what


def check_excluded(folder: Path, train: Findings) -> str:
    """Check that no validation document of another dataset is in training."""
    what = f"{train.excluded:,} training documents are also in the validation of {folder}"
    demand(not train.excluded, what)
    return what


def check_published(variant: str, found: Findings, train_shards: int = 0) -> str:
    """Compare a validation split with the published one's totals, and the number of train shards
    with the published number (techniques.md 1.5)."""
    low, high = PUBLISHED_BYTES
    counts = (
        f"{found.documents:,} documents, {found.decoded_bytes:,} bytes, {found.tokens:,} tokens"
    )
    whole = found.documents == PUBLISHED_DOCUMENTS and low <= found.decoded_bytes <= high
    expected = f"{PUBLISHED_DOCUMENTS:,} documents and about 151.08 MB of text"
    demand(whole, f"{counts}; the published split has {expected}")
    tokens = PUBLISHED_TOKENS.get(variant, found.tokens)
    demand(abs(found.tokens / tokens - 1) < 2e-3, f"{counts}; published: about {tokens:,} tokens")
    most = PUBLISHED_TRAIN_SHARDS.get(variant, train_shards)
    leak = "validation documents in training mark such a set; download the published one"
    demand(train_shards <= most, f"{train_shards:,} train shards; the export has {most}: {leak}")
    return f"{counts}, as published"


def check_dataset(
    folder: Path, tokenizer: Path | None, processes: int, exclude_val: Path | None = None
) -> bool:
    """Verify a dataset made by prepare.py or downloaded, print a line a rule, and return whether
    all held. Raises DataError if there is nothing to verify."""
    demand(folder.is_dir(), f"{folder}: no such folder")
    manifest = read_manifest(folder)
    model = tokenizer or find_tokenizer(folder, manifest)
    vocabulary, report = load_vocabulary(model), Report()
    keys = validation_keys(exclude_val) if exclude_val else frozenset()
    if manifest:
        report.rule("files", lambda: check_files(folder, manifest, model))
        if manifest.get("case_ops") or vocabulary.case_ops:
            report.rule("tokenizer", lambda: check_kind(manifest, vocabulary))
    report.rule("shards", lambda: check_headers(folder, vocabulary))
    if not report.passed:
        return False
    plan = Inspection(model, shard_paths(folder, "val"), usable_sidecars(folder))
    val = inspect_split(plan, processes)
    plan = Inspection(model, shard_paths(folder, "train"), (), val.digests, keys)
    train = inspect_split(plan, processes)
    for split, found in (("val", val), ("train", train)):
        counts = manifest.get("splits", {}).get(split, {})
        report.rule(split, partial(check_split, found, vocabulary, counts))
        if vocabulary.case_ops or vocabulary.lossless:
            report.rule(f"{split}_text", partial(check_texts, split, found, vocabulary, manifest))
    if shard_paths(folder, "val_bytes") or vocabulary.case_ops:
        counts = manifest.get("splits", {}).get("val", {})
        report.rule("sidecars", lambda: check_sidecars(folder, vocabulary, val, counts))
    report.rule("leakage", lambda: check_leakage(val, train, strict=bool(manifest)))
    if exclude_val:
        report.rule("excluded", lambda: check_excluded(exclude_val, train))
    published = re.fullmatch(r"fineweb10B_(\w+)", folder.resolve().name)
    if published and not manifest:
        shards = len(shard_paths(folder, "train"))
        report.rule("published", lambda: check_published(published[1], val, shards))
    return report.passed


def check_kind(manifest: dict[str, Any], vocabulary: Vocabulary) -> str:
    """Check that manifest and tokenizer agree on CaseOps."""
    told = manifest.get("case_ops", False)
    here = f"the tokenizer is {'a' if vocabulary.case_ops else 'no'} CaseOps one"
    demand(told == vocabulary.case_ops, f"{here}, manifest.json says case_ops: {told}")
    return f"{vocabulary.size:,} pieces; {here}"
