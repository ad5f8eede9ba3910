"""From documents to a dataset: tokens in parallel, the frozen order, the splits, the shards.

    source -> chunks of text -> tokens and an index of the documents, on disk -> order -> shards

Memory is bounded whatever the input: text is held a few chunks at a time, and the index lies in a
file. A chunk's files name what they were made from, so an interrupted run goes on from them.
"""

import hashlib
import json
import os
import pickle
import platform
import re
import shutil
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece as spm
from caseops import encode_case, invert_case
from checks import check_files, file_records, find_tokenizer, read_manifest, validation_keys
from console import name_text
from digests import combined_digest, text_digest, text_key
from shards import DataError, ProgressBar, ShardWriter, WorkerPool, replacing
from vocabulary import (
    BYTE_LEVEL_SIZE,
    NORMALIZATIONS,
    SPACE,
    Vocabulary,
    byte_level_model,
    concatenate,
    file_digest,
    fit_sidecar,
    load_vocabulary,
    train_tokenizer,
    trainer_options,
)

CHUNK_CHARS = 2**21  # of text in one task of a process: bounds the memory, changes no result
OWN_FILES = r"manifest\.json|fineweb_(train|val|val_bytes)_\d{6}\.bin"
VAL_DOCS = 50_000  # in the challenge's split
COUNTS = (
    "tokens",
    "bytes",
    "decoded_bytes",
    "unknown_tokens",
    "unknown_bytes",
    "changed_documents",
)
# One document: where its tokens lie, its UTF-8 bytes, what its tokens decode to, and a digest of
# the tokens, by which training documents that also stand in validation are found; digests of its
# text, and of what of it any tokenizer keeps; how many of the tokens are the unknown piece, for how
# many of the bytes; and whether CaseOps inverted gives another text (1) or the same (0).
ENTRY = np.dtype(
    {
        "names": ["chunk", "start", "digest", "text", "key", *COUNTS],
        "formats": ["<u4", "<u8", "V16", "V16", "V16", *["<u4"] * len(COUNTS)],
    }
)


class Source(Protocol):
    """Where documents come from."""

    total_bytes: int  # of the inputs as they are stored; 0 if not known
    read_bytes: int
    val_fraction: float  # of the documents, for validation; known when they are read
    val_last: bool  # whether those are the last ones: the end of a text
    skipped: Counter[str]

    def texts(self) -> Iterator[str]:
        """The documents, in order."""

    def inputs(self) -> list[dict[str, Any]]:
        """Names, sizes and digests of what was read, for the manifest."""

    def options(self) -> dict[str, Any]:
        """How the documents are made from it, for the manifest."""

    def unchanged(self, inputs: list[dict[str, Any]]) -> bool:
        """Whether a manifest's inputs are these, before they are read."""


@dataclass(frozen=True)
class Job:
    """What to make from the documents."""

    name: str
    out: Path  # the data folder
    tokenizer: Path | None  # one to reuse
    vocab_size: int  # of one to train, or 0
    byte_level: bool
    tokenizer_bytes: int  # of text at most that a tokenizer is trained on
    val_docs: int | None
    val_fraction: float | None  # None: the source's, but at most VAL_DOCS
    shuffle_seed: int | None
    shard_tokens: int
    byte_sidecar: bool
    processes: int
    case_ops: bool = False
    normalization: str = NORMALIZATIONS[0]
    exclude_val: Path | None = None  # a dataset whose validation is kept out of training

    @property
    def sidecar(self) -> bool:
        """Whether the bytes of validation tokens are written: with CaseOps they must be."""
        return self.byte_sidecar or self.case_ops

    def options(self) -> dict[str, Any]:
        """What shapes the result, for the manifest. What is newer is named where it is used."""
        names = ("val_docs", "val_fraction", "shuffle_seed", "shard_tokens", "byte_sidecar")
        options = {name: getattr(self, name) for name in names}
        options |= {"case_ops": True} if self.case_ops else {}
        if self.exclude_val:
            options["exclude_val"] = file_records(self.exclude_val, ("val",))
        if self.vocab_size:
            trainer = trainer_options(self.normalization, self.case_ops)
            trainer = {"vocab_size": self.vocab_size, **trainer}
            options |= {"tokenizer": trainer, "tokenizer_bytes": self.tokenizer_bytes}
        elif self.byte_level:
            options["tokenizer"] = "byte-level"
        else:
            options["tokenizer"] = {"sha256": file_digest(self.tokenizer)}
        return options


# ---- tokens: chunks of documents, encoded in parallel, and an index of the documents


def chunked(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of about CHUNK_CHARS characters."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def chunk_file(work: Path, number: int, kind: str) -> Path:
    """Where the "tokens", "bytes" (of the sidecar) or "index" of a chunk lie."""
    return work / f"chunk_{number:06d}.{kind}"


@dataclass(frozen=True)
class Task:
    """How the texts of a chunk become tokens."""

    tokenizer: Path
    sidecar: bool
    case_ops: bool = False
    keys: bool = False  # whether documents are compared with those of another dataset

    def digest(self, texts: list[bytes]) -> bytes:
        """Identify the task and the texts, so that what was made of them is known again."""
        options = f"{self.sidecar} {self.case_ops} {self.keys} {ENTRY}"
        key = hashlib.sha256(f"{file_digest(self.tokenizer)} {spm.__version__} {options}".encode())
        lengths = np.array([len(text) for text in texts])
        for part in (lengths.tobytes(), *texts):
            key.update(part)
        return key.digest()


def encode_chunk(work: Path, number: int, texts: list[str], task: Task) -> np.ndarray:
    """Write the tokens of the texts to a chunk's files and return its ENTRY of each text. The index
    is written last and begins with a digest of what it was made from, so that an interrupted run
    can be gone on with. Raises DataError if CaseOps cannot be inverted."""
    encoded_texts = [text.encode() for text in texts]
    key = task.digest(encoded_texts)
    index = chunk_file(work, number, "index")
    if index.exists() and (made := index.read_bytes()).startswith(key):
        return np.frombuffer(made, ENTRY, offset=len(key))
    vocabulary = load_vocabulary(task.tokenizer)
    images = list(map(encode_case, texts)) if task.case_ops else texts
    documents = vocabulary.encode(images)
    entries = np.zeros(len(texts), ENTRY)
    entries["chunk"] = number
    entries["bytes"] = [len(text) for text in encoded_texts]
    entries["tokens"] = [len(ids) for ids in documents]
    entries["start"] = np.cumsum(entries["tokens"]) - entries["tokens"]
    entries["decoded_bytes"] = [vocabulary.lengths(ids).sum() for ids in documents]
    entries["unknown_tokens"] = [(ids == vocabulary.unknown).sum() for ids in documents]
    entries["unknown_bytes"] = list(map(vocabulary.unknown_bytes, images, documents))
    digests = [hashlib.blake2b(ids, digest_size=16).digest() for ids in documents]
    entries["digest"] = np.frombuffer(b"".join(digests), "V16")
    entries["text"] = np.frombuffer(b"".join(map(text_digest, texts)), "V16")
    if task.keys:
        entries["key"] = np.frombuffer(b"".join(map(text_key, texts)), "V16")
    if task.case_ops:
        entries["changed_documents"] = changed_texts(vocabulary, documents, images, texts)
    with replacing(chunk_file(work, number, "tokens")) as file:
        file.writelines(documents)
    if task.sidecar:
        with replacing(chunk_file(work, number, "bytes")) as file:
            for text, image, ids in zip(encoded_texts, images, documents, strict=True):
                file.write(sidecar_of(vocabulary, len(text), image, ids))
    with replacing(index) as file:
        file.write(key + entries.tobytes())
    return entries


def sidecar_of(vocabulary: Vocabulary, size: int, image: str, ids: np.ndarray) -> np.ndarray:
    """Give the original bytes of each of a document's tokens, uint16 (N,), which are `size` in all.

    `image` is what was tokenized: the text, or its CaseOps image.
    """
    if not len(ids):
        return np.zeros(0, np.uint16)
    if vocabulary.lossless:
        sizes = vocabulary.exact_lengths(ids)
    else:
        sizes = vocabulary.original_bytes(image, len(ids))
        move_from_controls(sizes, vocabulary.acting(ids))
    check_bytes(size, int(sizes.sum()))
    return fit_sidecar(sizes)


def move_from_controls(sizes: np.ndarray, acting: np.ndarray) -> None:
    """Give the bytes that stand at acting controls to the tokens behind: blanks that a tokenizer's
    normalization has taken from the start of a document. At the end there are none to move."""
    for place in acting[acting < len(sizes) - 1]:
        sizes[place + 1] += sizes[place]
        sizes[place] = 0


def changed_texts(
    vocabulary: Vocabulary, documents: list[np.ndarray], images: list[str], texts: list[str]
) -> list[bool]:
    """Say of each document whether its tokens, decoded and inverted, give another text.

    A lossless tokenizer must give the same, any other the inverse of the image as it normalizes
    it. Raises DataError if one does not.
    """
    changed = []
    decoded = vocabulary.decode(documents)
    for ids, image, text, given in zip(documents, images, texts, decoded, strict=True):
        if not vocabulary.lossless:
            changed.append(invert_case(given) != text)
            expected = vocabulary.sp.normalize(image).replace(SPACE, " ").strip(" ")
            broken = not (ids == vocabulary.unknown).any() and given.strip(" ") != expected
        else:
            changed.append(False)
            # That the image, of which no other text is the inverse, is decoded as it is.
            broken = given != image or invert_case(image) != text
        if broken:
            raise DataError(
                f"CaseOps: the tokens of a document do not give its text: {text[:60]!a}"
            )
    return changed


def encode_chunks(
    chunks: Iterable[list[str]], job: Job, work: Path, tokenizer: Path, source: Source
) -> Iterator[np.ndarray]:
    """`encode_chunk` of each chunk, in order, in job.processes processes beside this one, with a
    progress bar of the inputs' bytes."""
    bar = ProgressBar(
        total=source.total_bytes or None, unit="B", unit_scale=True, desc="tokenizing"
    )
    pending: deque[tuple[Future[np.ndarray], int]] = deque()

    def first() -> np.ndarray:
        future, read = pending.popleft()
        entries = future.result()
        bar.update(read - bar.n)
        return entries

    task = Task(tokenizer, job.sidecar, job.case_ops, job.exclude_val is not None)
    pool = WorkerPool(job.processes)
    try:
        for number, texts in enumerate(chunks):
            future = pool.submit(encode_chunk, work, number, texts, task)
            pending.append((future, source.read_bytes))
            if len(pending) > 2 * job.processes:
                yield first()
        while pending:
            yield first()
    except BrokenProcessPool:
        raise DataError("a tokenizing process died: out of memory? (fewer --processes)") from None
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)


# ---- splits: the frozen order, and which documents of it go where


def frozen_order(count: int, seed: int | None, work: Path) -> np.ndarray:
    """The order of `count` documents, int64 (N,): as they came, or shuffled. It lies in a file, so
    that it takes no memory that the system cannot have back."""
    with open(work / "order", "wb") as file:  # a full disk is an error here, in a map it kills
        for start in range(0, count, 2**20):
            file.write(np.arange(start, min(start + 2**20, count), dtype="<i8").data)
    order = np.memmap(work / "order", "<i8", "r+", shape=(count,))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order.view(np.ndarray))
    return order


def validation_size(job: Job, source: Source, count: int) -> int:
    """How many of `count` documents are for validation. Raises DataError unless both splits get
    some."""
    size = job.val_docs
    if size is None:
        size = max(1, round(count * (job.val_fraction or source.val_fraction)))
        size = size if job.val_fraction else min(VAL_DOCS, size)
    if not 0 < size < count:
        raise DataError(
            f"{count:,} document(s) and {size:,} of them for validation: each of the two splits "
            "needs one; give more text, fewer --val-docs, or a smaller --val-fraction "
            "(--split-text pieces, --max-document-bytes: how a long text is cut into documents)"
        )
    return size


def split_order(job: Job, source: Source, count: int, work: Path) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the documents for validation, and of those for training, int64 (N,)."""
    order, size = frozen_order(count, job.shuffle_seed, work), validation_size(job, source, count)
    return (order[-size:], order[:-size]) if source.val_last else (order[:size], order[size:])


def tokenizer_texts(
    chunks: Iterable[list[str]], val: np.ndarray, text_bytes: int, limit: int
) -> Iterator[str]:
    """Training documents, spread evenly, of about `limit` bytes; `val` numbers those not to use."""
    every, left_out = -(-text_bytes // limit), np.zeros(val.max() + 1, bool)
    left_out[val] = True
    texts = enumerate(chain.from_iterable(chunks))
    used = (text for n, text in texts if n >= len(left_out) or not left_out[n])
    return islice(used, 0, None, every)


@dataclass(frozen=True)
class LeftOut:
    """What a split must not hold: documents by the digest of their tokens, or by the key of their
    text."""

    digests: Collection[bytes] = frozenset()
    keys: Collection[bytes] = frozenset()

    def reason(self, entry: dict[str, Any]) -> str:
        """Say why a document is left out, or nothing."""
        if not entry["tokens"]:
            return "no tokens"
        if entry["digest"] in self.digests:
            return "duplicate of validation"
        return "duplicate of excluded validation" if entry["key"] in self.keys else ""


@dataclass
class Written:
    """What was written as a split: counts, documents left out by reason, and digests."""

    counts: Counter[str] = field(
        default_factory=lambda: Counter(dict.fromkeys(("documents", *COUNTS), 0))
    )
    skipped: Counter[str] = field(default_factory=Counter)
    digests: set[bytes] = field(default_factory=set)  # of validation documents' tokens
    text_digest: str = ""  # of all texts in their order


def write_split(
    split: str, numbers: np.ndarray, index: np.ndarray, left_out: LeftOut, job: Job, work: Path
) -> Written:
    """Write the shards of a split, and the sidecars of validation, into work/dataset, without the
    documents of `left_out`."""
    vocabulary = load_vocabulary(staged_tokenizer(job, work))
    mapped = lru_cache(256)(
        lambda chunk, kind: np.memmap(chunk_file(work, chunk, kind), "<u2", "r")
    )
    written = Written()
    texts = combined_digest()
    with (
        ShardWriter(work / "dataset", split, job.shard_tokens) as shards,
        ShardWriter(work / "dataset", f"{split}_bytes", job.shard_tokens) as sidecars,
    ):
        for entry in ordered_entries(index, numbers):
            if reason := left_out.reason(entry):
                written.skipped[reason] += 1
                continue
            chunk = entry["chunk"]
            place = slice(entry["start"], entry["start"] + entry["tokens"])
            ids = mapped(chunk, "tokens")[place]
            shards.write(concatenate([ids], vocabulary.bos))
            written.counts.update({name: entry[name] for name in COUNTS})
            written.counts.update(documents=1, tokens=1)  # BOS
            texts.update(entry["text"])
            if split == "val":
                check_bytes(vocabulary.decoded_bytes([ids]), entry["decoded_bytes"])
                written.digests.add(entry["digest"])
                if job.sidecar:
                    sidecars.write(np.append(np.uint16(0), mapped(chunk, "bytes")[place]))
    written.text_digest = texts.hexdigest()
    return written


def ordered_entries(index: np.ndarray, numbers: np.ndarray) -> Iterator[dict[str, Any]]:
    """The ENTRY of each of these documents, by name."""
    for start in range(0, len(numbers), 2**16):
        for entry in index[numbers[start : start + 2**16]].tolist():
            yield dict(zip(ENTRY.names, entry, strict=True))


def check_bytes(decoded: int, counted: int) -> None:
    """Raise DataError unless a document's tokens decode to as many bytes as its pieces have."""
    if decoded != counted:
        raise DataError(f"byte audit: a document counts {counted} bytes but decodes to {decoded}")


# ---- from documents to a dataset


class Spool:
    """A file that holds chunks of text, for when they are read twice: the tokenizer is trained on
    them before they are tokenized, and standard input cannot be read again."""

    def __init__(self, path: Path, chunks: Iterable[list[str]], source: Source) -> None:
        self.path, self.documents, self.text_bytes, self.read_bytes = path, 0, 0, 0
        bar = ProgressBar(
            total=source.total_bytes or None, unit="B", unit_scale=True, desc="reading"
        )
        with open(path, "wb") as file, bar:
            for texts in chunks:
                pickle.dump(texts, file)
                self.documents += len(texts)
                self.text_bytes += sum(len(text.encode()) for text in texts)
                bar.update(source.read_bytes - bar.n)
        self.total_bytes = path.stat().st_size

    def chunks(self) -> Iterator[list[str]]:
        """The chunks, from the start."""
        with open(self.path, "rb") as file:
            while file.tell() < self.total_bytes:
                texts = pickle.load(file)
                self.read_bytes = file.tell()
                yield texts


def tokenizer_name(job: Job) -> str:
    """The file name of the tokenizer that the dataset is made with."""
    if job.vocab_size:
        kind = "_caseops" if job.case_ops else ""
        return f"{job.name}_{job.vocab_size}{kind}_bpe.model"
    if job.byte_level:
        return "byte_260.model"
    described = job.tokenizer.suffix == ".json"  # train_gpt.py loads models alone
    return (job.tokenizer.with_suffix(".model") if described else job.tokenizer).name


def staged_tokenizer(job: Job, work: Path) -> Path:
    """Where the tokenizer lies until the dataset is whole."""
    return work / tokenizer_name(job)


def stage_tokenizer(job: Job, source: Source, work: Path, spool: Spool | None) -> Path:
    """Write the tokenizer, copied, described, or trained on the spool's training documents. Raises
    DataError if it would take the place of one that this dataset does not own."""
    if job.byte_level or (job.tokenizer and job.tokenizer.suffix == ".json"):
        model = byte_level_model()
    elif job.tokenizer:
        model = job.tokenizer.read_bytes()
    else:
        val, _ = split_order(job, source, spool.documents, work)
        print(f"training a tokenizer of {job.vocab_size} pieces ...", flush=True)
        texts = tokenizer_texts(spool.chunks(), val, spool.text_bytes, job.tokenizer_bytes)
        texts = map(encode_case, texts) if job.case_ops else texts
        options = trainer_options(job.normalization, job.case_ops)
        model = train_tokenizer(texts, job.vocab_size, options)
    kept = job.out / "tokenizers" / tokenizer_name(job)
    own = not job.tokenizer and (dataset_folder(job) / "manifest.json").exists()
    if kept.exists() and not own and kept.read_bytes() != model:
        raise DataError(f"{kept}: there is another tokenizer of this name; rename one of them")
    with replacing(staged_tokenizer(job, work)) as file:
        file.write(model)
    return staged_tokenizer(job, work)


def write_index(entries: Iterable[np.ndarray], work: Path) -> np.ndarray:
    """The ENTRY of every document, in a file, since there may be many."""
    with open(work / "index", "wb") as file:
        for part in entries:
            file.write(part.tobytes())
    if not (work / "index").stat().st_size:
        raise DataError("the inputs hold no document; see what was skipped, above")
    return np.memmap(work / "index", ENTRY, "r")


def build(job: Job, source: Source, work: Path) -> dict[str, Any]:
    """Make tokenizer and shards in the folder `work`, and return the manifest."""
    excluded = validation_keys(job.exclude_val) if job.exclude_val else frozenset()
    chunks, progress, spool = chunked(source.texts()), source, None
    if job.vocab_size:
        spool = progress = Spool(work / "texts", chunks, source)
    tokenizer = stage_tokenizer(job, source, work, spool)
    chunks = spool.chunks() if spool else chunks
    index = write_index(encode_chunks(chunks, job, work, tokenizer, progress), work)
    for_val, for_train = split_order(job, source, len(index), work)
    if source.val_last and job.shuffle_seed is None:
        share = f"{len(for_val):,} of {len(index):,} documents"
        print(f"the end of the text, {share}, is for validation (--val-fraction)", flush=True)
    shutil.rmtree(work / "dataset", ignore_errors=True)
    (work / "dataset").mkdir()
    val = write_split("val", for_val, index, LeftOut(), job, work)
    train = write_split("train", for_train, index, LeftOut(val.digests, excluded), job, work)
    splits = {"val": val, "train": train}
    for split, written in splits.items():
        if not written.counts["documents"]:
            name = {"val": "validation", "train": "training"}[split]
            raise DataError(f"no {name} document is left: all are empty or duplicates")
    return {
        **recipe(job, source),
        "case_ops": job.case_ops,
        "skipped": dict(sorted((source.skipped + val.skipped + train.skipped).items())),
        "splits": {split: recorded_counts(job, written) for split, written in splits.items()},
        "text_digests": {split: written.text_digest for split, written in splits.items()},
        "tokenizer": {
            "path": name_text(f"../../tokenizers/{tokenizer.name}"),
            "sha256": file_digest(tokenizer),
            "vocab_size": load_vocabulary(tokenizer).size,
        },
        "files": file_records(work / "dataset"),
    }


def recorded_counts(job: Job, written: Written) -> dict[str, int]:
    """The counts of a split for the manifest."""
    unused = () if job.case_ops else ("changed_documents",)
    return {name: count for name, count in written.counts.items() if name not in unused}


def all_options(job: Job, source: Source) -> dict[str, Any]:
    """What was asked for, or is so by default."""
    options = job.options()
    options["val_fraction"] = job.val_fraction or source.val_fraction
    return options | source.options()


def recipe(job: Job, source: Source) -> dict[str, Any]:
    """What determines a dataset, for its manifest: inputs, options, and versions of the tools."""
    return {
        "inputs": source.inputs(),
        "options": all_options(job, source),
        "versions": {"python": platform.python_version(), "sentencepiece": spm.__version__},
    }


def dataset_folder(job: Job) -> Path:
    """Where the dataset will be."""
    size = load_vocabulary(job.tokenizer).size if job.tokenizer else job.vocab_size
    kind = f"sp{size}" if size and size != BYTE_LEVEL_SIZE else "byte260"
    kind += "_caseops" if job.case_ops else ""
    return job.out / "datasets" / f"{job.name}_{kind}"


def publish(job: Job, work: Path, manifest: dict[str, Any]) -> None:
    """Move tokenizer and dataset to their places; the dataset, in one step, to where nothing or an
    older one was."""
    folder, model = dataset_folder(job), staged_tokenizer(job, work)
    with replacing(work / "dataset" / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")
    (job.out / "tokenizers").mkdir(exist_ok=True)
    os.replace(model, job.out / "tokenizers" / model.name)
    shutil.rmtree(work / "replaced", ignore_errors=True)
    if folder.exists():
        os.rename(folder, work / "replaced")
    os.rename(work / "dataset", folder)
    shutil.rmtree(work)


def check_tokenizer(job: Job) -> None:
    """Raise DataError unless a tokenizer to reuse is a CaseOps one just if CaseOps is asked for."""
    if not job.tokenizer:
        return
    case_ops = load_vocabulary(job.tokenizer).case_ops
    if job.case_ops and not case_ops:
        raise DataError(
            f"{job.tokenizer}: not a CaseOps tokenizer: it lacks pieces of the controls U+E001 to "
            "U+E004; train one (--case-ops --vocab-size N), or leave --case-ops out"
        )
    if case_ops and not job.case_ops:
        raise DataError(
            f"{job.tokenizer}: a CaseOps tokenizer, by its pieces of U+E001 to U+E004; "
            "add --case-ops, so that the text is written as it expects"
        )


def check_place(job: Job) -> None:
    """Raise DataError if something else lies in the dataset's folder, which will be replaced."""
    folder = dataset_folder(job)
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    foreign = sorted(name for name in names if not re.fullmatch(OWN_FILES, name))
    if "manifest.json" not in names:  # then the shards are not ours either
        foreign = sorted(names)
    if foreign:
        what = f"{foreign[0]}, which prepare.py has not made"
        raise DataError(f"{folder}: holds {what}; move it, or choose another --name")


def is_current(job: Job, source: Source) -> bool:
    """Whether the dataset is there, whole, and made from the same."""
    folder = dataset_folder(job)
    try:
        manifest = read_manifest(folder)
        model = find_tokenizer(folder, manifest)
        same = manifest["options"] == all_options(job, source)
        same = same and model.suffix != ".json"  # as it was made before
        same = same and source.unchanged(manifest["inputs"])
        same = same and manifest["versions"] == recipe(job, source)["versions"]
        return same and bool(check_files(folder, manifest, model))
    except (OSError, KeyError, DataError):
        return False
