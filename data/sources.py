"""Documents out of files, standard input and Hugging Face datasets, as a stream.

Everything is read in blocks and in an order that depends on the inputs alone. What cannot be used
is skipped, counted and reported with its file and line; `Problems` decides whether it is fatal.
"""

import codecs
import glob
import hashlib
import json
import lzma
import os
import re
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, BinaryIO

from rendering import RecordError, RecordFormat, Renderer, library
from shards import DataError

KINDS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
CODECS = (".gz", ".zst", ".xz")
KNOWN = ".txt, .md and .jsonl (also .gz, .zst or .xz), and .parquet"
READ_BYTES = 1 << 18
# Zstandard packs up to 128 KiB into 4 bytes: this bounds what one step can unpack to 8 MiB.
UNPACK_BYTES = 256
MEMORY_BYTES = 1 << 30  # what an .xz file may ask for; Zstandard's own limit is a window of 2^27
LINE_BYTES = 1 << 28
PEEK_BYTES = 1 << 20
PARQUET_ROWS = 64
STDIN, HF = "-", "hf:"
STDIN_LABEL = "<stdin>"
# Few plain texts, or large ones, are not documents themselves but hold many. They are cut into
# pieces of this size at least, at most twice that: a document of FineWeb has 3,022 bytes.
PIECE_BYTES = 3000
FEW_TEXTS = 10
LARGE_TEXT = 1 << 20  # bytes as stored, on the average
SPLIT_TEXT = ("auto", "files", "pieces")
BLANK_LINES = re.compile(rb"\n[ \t\r\n]*\n")


@dataclass(frozen=True)
class Document:
    """A text that is not blank, has no NUL and can be encoded as UTF-8, and where it was found:
    "path:line", "path:row" or "<stdin>:line", lines and rows counted from 1."""

    text: str
    where: str


class DamageError(Exception):
    """A file cannot be read to its end, although the disk delivers it; the message says why."""


class Problems:
    """Counts what was skipped, by kind, and prints the first few of each kind to stderr.

    `counts` are of skipped records and damaged files, `notes` of what is worth knowing but no
    fault: documents cut, files left out. `report` raises DataError at the first if `strict`."""

    def __init__(self, strict: bool, shown: int = 5) -> None:
        self.strict, self.shown = strict, shown
        self.counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    def report(self, kind: str, where: str, detail: str) -> None:
        """Count a record or file that is skipped. Raises DataError if strict."""
        if self.strict:
            raise DataError(f"{where}: {kind}: {detail}")
        self._count(self.counts, kind, where, detail)

    def note(self, kind: str, where: str, detail: str) -> None:
        """Count something that is no fault, so never fatal."""
        self._count(self.notes, kind, where, detail)

    def _count(self, counter: Counter[str], kind: str, where: str, detail: str) -> None:
        counter[kind] += 1
        if counter[kind] <= self.shown:
            print(f"{where}: {kind}: {detail}", file=sys.stderr)
        if counter[kind] == self.shown + 1:
            print(f"{kind}: more than {self.shown}; the rest is only counted", file=sys.stderr)


# ---- finding: from inputs to files


@dataclass(frozen=True)
class SourceFile:
    """A file to read: its path, its POSIX path relative to the input that found it, its size in
    bytes as stored, what it holds (text, jsonl or parquet), its compression ("" or an ending)."""

    path: Path
    name: str
    size: int
    kind: str
    codec: str


def file_kind(path: Path) -> tuple[str, str] | None:
    """What a file holds and its compression, by its name; None if it is of no known kind."""
    name = path.name.lower()
    codec = next((ending for ending in CODECS if name.endswith(ending)), "")
    kind = KINDS.get(Path(name.removesuffix(codec)).suffix)
    return None if kind is None or (codec and kind == "parquet") else (kind, codec)


def folder_files(folder: Path) -> list[Path]:
    """Every file below a folder that is not hidden, through links to folders as well, each folder
    once. Raises OSError if one cannot be listed."""

    def stop(error: OSError) -> None:
        raise error

    found: list[Path] = []
    seen = set()
    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return found


def find_files(argument: str, problems: Problems) -> list[SourceFile]:
    """The files that a path or glob stands for, sorted by POSIX path. Raises DataError if there is
    none, or one that was named is of no known kind; OSError if one cannot be examined."""
    path = Path(argument)
    if not argument:
        raise DataError("an input is empty: give a path, a glob, hf:<dataset> or -")
    if path.is_dir():
        root, found = path, folder_files(path)
    elif path.exists():
        if not path.is_file():
            raise DataError(f"{path}: not a regular file; give its contents to the input -")
        if file_kind(path) is None:
            raise DataError(f"{path}: unknown kind of file; known are {KNOWN}")
        root, found = path.parent, [path]
    elif glob.has_magic(argument):
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [p for p in map(Path, glob.glob(argument, recursive=True)) if not p.is_dir()]
    else:
        raise DataError(f"{path}: does not exist")
    files = usable_files(found, root, problems)
    if not files:
        raise DataError(f"{argument}: no file found of the kinds {KNOWN}")
    return files


def usable_files(paths: Iterable[Path], root: Path, problems: Problems) -> list[SourceFile]:
    """The regular files of a known kind, sorted by POSIX path; of others a note is made."""
    files = []
    for path in sorted(set(paths), key=lambda path: path.relative_to(root).as_posix()):
        kind = file_kind(path)
        if kind is None:
            problems.note("other kind of file", str(path), "left out")
            continue
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            problems.note("not a regular file", str(path), "left out")
            continue
        files.append(SourceFile(path, path.relative_to(root).as_posix(), status.st_size, *kind))
    return files


# ---- bytes: from what is stored to lines and pieces of text


def unpack(blocks: Iterable[bytes], codec: str) -> Iterator[bytes]:
    """The contents of a compressed stream of any number of members or frames, in chunks of at
    most 8 MiB. Raises DamageError at its damage or early end."""
    new, failure = decoder(codec)
    current, empty = None, True
    for block in blocks:
        for start in range(0, len(block), UNPACK_BYTES):
            data = block[start : start + UNPACK_BYTES]
            while data:
                # Between members, gzip and xz allow padding with zeros.
                if current is None and not empty and not (data := data.lstrip(b"\0")):
                    break
                current, empty = current or new(), False
                try:
                    chunk = current.decompress(data)
                except failure as error:
                    raise DamageError(f"damaged {codec} data: {error}") from None
                data = b""
                if current.eof:
                    data, current = current.unused_data, None
                if chunk:
                    yield chunk
    if current is not None or empty:
        raise DamageError(f"the {codec} data ends too early: a truncated file?")


def decoder(codec: str) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes a decoder of a member or frame, and what that raises. Raises DataError if the
    package for it is missing."""
    if codec == ".gz":
        return partial(zlib.decompressobj, 16 + zlib.MAX_WBITS), zlib.error
    if codec == ".xz":
        return partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, MEMORY_BYTES), lzma.LZMAError
    zstandard = library("zstandard")
    return zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError


def without_bom(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same stream, without a UTF-8 byte-order mark at its start."""
    start, chunks = b"", iter(chunks)
    for chunk in chunks:
        start += chunk
        if len(start) >= len(codecs.BOM_UTF8):
            break
    yield start.removeprefix(codecs.BOM_UTF8)
    yield from chunks


def peek_kind(chunks: Iterable[bytes]) -> tuple[str, Iterator[bytes]]:
    """Whether a stream is jsonl (its first character that is not white space is "{") or text, and
    the whole of it."""
    start, chunks = b"", iter(chunks)
    for chunk in chunks:
        start += chunk
        if start.strip() or len(start) > PEEK_BYTES:
            break
    return "jsonl" if start.lstrip().startswith(b"{") else "text", chain([start], chunks)


def split_lines(chunks: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
    """The lines of a stream without their "\\n"; None for one that is longer than `limit` bytes."""
    line, too_long = bytearray(), False
    for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            line += chunk[start:end]
            yield None if too_long or len(line) > limit else bytes(line)
            line, too_long, start = bytearray(), False, end + 1
        line += chunk[start:]
        if len(line) > limit:
            line, too_long = bytearray(), True
    if line or too_long:
        yield None if too_long or len(line) > limit else bytes(line)


def is_blank(data: bytes) -> bool:
    """Whether UTF-8, which may be invalid, is empty or white space alone."""
    return not data.decode("utf-8", "surrogateescape").strip()


def cut_position(window: bytes, limit: int) -> int:
    """Where to cut a text that is longer than `limit` bytes: after the last paragraph break within
    the limit, else line break, space, character; never so that one side is blank, where that can
    be helped. `window` is the text's start: all of it, or 2 * limit bytes."""
    text = window.decode("utf-8", "surrogateescape")
    end = limit
    if len(text.strip()) > 1:  # keep the last visible character for the rest
        tail = text[len(text.rstrip()) - 1 :]
        end = min(limit, len(window) - len(tail.encode("utf-8", "surrogateescape")))
    for marks in ((b"\n\n", b"\n\r\n"), (b"\n",), (b" ",)):
        found = [(mark, window.rfind(mark, 0, end)) for mark in marks]
        cut = max((at + len(mark) for mark, at in found if at >= 0), default=0)
        if not is_blank(window[:cut]):
            return cut
    # A character has at most three bytes after its first one.
    starts = (i for i in range(end, max(end - 4, 0), -1) if window[i] & 0xC0 != 0x80)
    return next(starts, end)


def cut_pieces(chunks: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """A stream of text in pieces of at most `limit` bytes (at least 4) that together are the
    stream. None is blank unless runs of white space are almost half as long as `limit`."""
    rest = bytearray()
    for chunk in chunks:
        rest += chunk
        while len(rest) > 2 * limit:
            end = cut_position(bytes(rest[: 2 * limit]), limit)
            yield bytes(rest[:end])
            del rest[:end]
    while len(rest) > limit:
        end = cut_position(bytes(rest), limit)
        yield bytes(rest[:end])
        del rest[:end]
    yield bytes(rest)


def piece_end(text: bytes, size: int) -> int:
    """Where to cut a text of more than 2 * size bytes: at the first blank line behind `size`, else
    line break, space, character; so that both sides get half of `size` at least."""
    window = text[: min(2 * size, len(text) - size // 2)]
    ends = (match.end() for match in BLANK_LINES.finditer(window))
    marks = (window.find(mark, size - 1) + 1 for mark in (b"\n", b" "))
    # A character has at most three bytes after its first one.
    starts = (i for i in range(size, size + 4) if text[i] & 0xC0 != 0x80)
    blank_line = next((end for end in ends if end >= size), 0)
    return blank_line or next(filter(None, marks), 0) or next(starts, size)


def size_pieces(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """A stream of text in pieces of `size` to 2 * size bytes that together are the stream. The
    last two may have half of that, and the only one any size."""
    rest = bytearray()
    for chunk in chain(chunks, [None]):
        rest += chunk or b""
        while len(rest) > (2 * size if chunk is None else 3 * size):
            end = piece_end(bytes(rest[: 3 * size]), size)
            yield bytes(rest[:end])
            del rest[:end]
    yield bytes(rest)


def join_blank(pieces: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """The pieces, where blank ones are part of the one before, or behind, within `limit` bytes."""
    held = bytearray()
    for piece in pieces:
        apart = held and not is_blank(piece) and not is_blank(held)
        if apart or len(held) + len(piece) > limit:
            yield bytes(held)
            held.clear()
        held += piece
    yield bytes(held)


def decode(data: bytes) -> str:
    """UTF-8 as text. Raises RecordError if it is not valid."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"byte 0x{data[error.start]:02x} at {error.start + 1}: {error.reason}"
        raise RecordError("invalid UTF-8", detail) from None


def parse_json(line: bytes) -> object:
    """The value in a line of JSON. Raises RecordError if it holds none."""
    text = decode(line)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        detail = f"{error.msg} at column {error.colno}: {text[error.pos : error.pos + 40]!r}"
        raise RecordError("not JSON", detail) from None
    except (ValueError, RecursionError) as error:
        raise RecordError("not JSON", str(error)) from None


def encode(text: str) -> bytes:
    """The UTF-8 of a text. Raises RecordError if it has lone surrogates."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"U+{ord(text[error.start]):04X} at character {error.start + 1}"
        raise RecordError("lone surrogate", detail) from None


# ---- the source


class Source:
    """The documents of some inputs, in order.

    `files` are the files found. `read_bytes` of `total_bytes` tell how far the pass is, in bytes
    as stored (datasets count none). `digests` are the SHA-256 of what is stored, in hexadecimal,
    by path or "<stdin>", of each file that the last pass read to its end: of all of them unless
    `samples` ended the reading of one earlier.

    Raises DataError, before anything is read, with all that is wrong, one problem a line."""

    def __init__(
        self,
        inputs: Sequence[str],
        format: RecordFormat,
        problems: Problems,
        max_document_bytes: int,
        stdin_kind: str = "auto",
        subset: str = "",
        split: str = "train",
        samples: int = 0,
        split_text: str = "files",
    ) -> None:
        self.format, self.problems, self.limit = format, problems, max_document_bytes
        self.stdin_kind, self.subset, self.split, self.samples = stdin_kind, subset, split, samples
        self.read_bytes, self.digests = 0, dict[str, str]()
        self._found: dict[str, list[SourceFile]] = {}
        self._datasets: dict[str, Any] = {}
        self._seen: dict[tuple[int, int], SourceFile] = {}  # by device and inode
        self._stdin_read = False
        found = format.problems()
        if max_document_bytes < 4:
            found.append("a document must be allowed 4 bytes, the length of a character")
        if not inputs:
            found.append("no input: give files, folders, globs, hf:<dataset> or -")
        if (subset or split != "train") and not any(name.startswith(HF) for name in inputs):
            found.append("--subset and --split need an input hf:<dataset>" + split_hint(split))
        for argument in inputs:
            try:
                self._add(argument)
            except DataError as error:
                found.append(str(error))
            except OSError as error:
                found.append(f"{error.filename or argument}: {error.strerror}")
        if found:
            raise DataError("\n".join(found))
        self._renderer = Renderer(format)
        sizes = [file.size for file in self.files if file.kind == "text"]
        self._text_files, texts = len(sizes), len(sizes) + (STDIN in self._found)
        few_or_large = texts < FEW_TEXTS or sum(sizes) > texts * LARGE_TEXT
        self._cut = texts > 0 and (few_or_large if split_text == "auto" else split_text == "pieces")

    @property
    def files(self) -> list[SourceFile]:
        """The files found, in the order in which they are read."""
        return [file for files in self._found.values() for file in files]

    @property
    def total_bytes(self) -> int:
        """The bytes of the files as stored. Standard input and datasets are not in it."""
        return sum(file.size for file in self.files)

    @property
    def cuts_texts(self) -> bool:
        """Whether plain texts are cut into documents; of standard input alone it is known once
        that is read."""
        return self._cut and (self._text_files > 0 or self.stdin_kind != "jsonl")

    @property
    def is_text(self) -> bool:
        """Whether all inputs are plain text; of standard input it is known once it is read."""
        stdin = STDIN in self._found and self.stdin_kind == "jsonl"
        return not (stdin or self._datasets or any(file.kind != "text" for file in self.files))

    def documents(self) -> Iterator[Document]:
        """Every document, from the beginning. Raises DataError if a file cannot be read, or
        standard input a second time, or at the first problem if the problems are strict."""
        self.read_bytes = 0
        self.digests.clear()
        for argument, files in self._found.items():
            used = 0
            for record in self._records(argument, files):
                pieces = 0
                for document in record:
                    pieces += 1
                    yield document
                used += pieces > 0
                if self.samples and used == self.samples:
                    break

    def _add(self, argument: str) -> None:
        """Find what an input stands for. What was found before is left out."""
        if argument in self._found:
            self.problems.note("input given twice", argument, "read once")
        elif argument == STDIN:
            self._found[argument] = []
        elif argument.startswith(HF):
            self._datasets[argument] = load_dataset(argument, self.subset, self.split)
            self._found[argument] = []
        else:
            self._found[argument] = self._new_files(find_files(argument, self.problems))

    def _new_files(self, files: Iterable[SourceFile]) -> list[SourceFile]:
        """The files that are not among those found, by any path. Raises DataError if the package
        to read them is missing."""
        new = []
        for file in files:
            status = file.path.stat()
            other = self._seen.setdefault((status.st_dev, status.st_ino), file)
            if other is not file:
                detail = f"read once, as {other.path}"
                self.problems.note("file found twice", str(file.path), detail)
                continue
            new.append(file)
        if any(file.kind == "parquet" for file in new):
            library("pyarrow.parquet")
        if any(file.codec == ".zst" for file in new):
            library("zstandard")
        return new

    # -- records: each is an iterator over its documents, to be used up before the next one

    def _records(self, argument: str, files: Sequence[SourceFile]) -> Iterator[Iterator[Document]]:
        """The records of an input."""
        if argument == STDIN:
            yield from self._stdin_records()
        elif argument in self._datasets:
            yield from self._dataset_records(argument)
        for file in files:
            if file.kind == "parquet":
                yield from self._parquet_records(file)
                continue
            label = str(file.path)
            stored = self._stored(label, partial(open, file.path, "rb"))
            chunks = unpack(stored, file.codec) if file.codec else stored
            yield from self._stream_records(without_bom(chunks), file.kind, label)
            for _ in stored:  # what follows damage is part of the digest
                pass

    def _stored(
        self, label: str, opened: Callable[[], AbstractContextManager[BinaryIO]]
    ) -> Iterator[bytes]:
        """The bytes of a file as stored, in blocks, counted and hashed."""
        digest = hashlib.sha256()
        try:
            with opened() as file:
                while block := file.read(READ_BYTES):
                    digest.update(block)
                    self.read_bytes += len(block)
                    yield block
        except OSError as error:
            raise DataError(f"{label}: cannot be read: {error.strerror}") from None
        self.digests[label] = digest.hexdigest()

    def _stdin_records(self) -> Iterator[Iterator[Document]]:
        if self._stdin_read:
            raise DataError("standard input can be read only once: give a file instead of -")
        if sys.stdin is None:
            raise DataError("standard input is closed: there is nothing to read as -")
        self._stdin_read = True
        stored = self._stored(STDIN_LABEL, lambda: nullcontext(sys.stdin.buffer))
        chunks = without_bom(stored)
        if self.stdin_kind == "auto":
            self.stdin_kind, chunks = peek_kind(chunks)
        yield from self._stream_records(chunks, self.stdin_kind, STDIN_LABEL)

    def _stream_records(
        self, chunks: Iterable[bytes], kind: str, label: str
    ) -> Iterator[Iterator[Document]]:
        if kind == "text":
            documents = self._text_documents(chunks, label)
            yield from ((d,) for d in documents) if self.cuts_texts else (documents,)
            return
        number = 0
        try:
            for number, line in enumerate(split_lines(chunks, LINE_BYTES), 1):
                where = f"{label}:{number}"
                if line is None:
                    detail = f"more than {LINE_BYTES:,} bytes"
                    self.problems.report("line too long", where, detail)
                elif line.strip():
                    yield self._record_documents(partial(parse_json, line), where)
        except DamageError as error:
            self.problems.report("damaged file", f"{label}:{number + 1}", str(error))

    def _parquet_records(self, file: SourceFile) -> Iterator[Iterator[Document]]:
        arrow, parquet = library("pyarrow"), library("pyarrow.parquet")
        label, before, row = str(file.path), self.read_bytes, 0
        try:
            with open(file.path, "rb") as handle:
                # Without these two, a whole row group would be read at once.
                table = parquet.ParquetFile(handle, pre_buffer=False, buffer_size=READ_BYTES)
                columns = self._columns(table.schema_arrow.names, label)
                for batch in batches(table, columns) if columns else ():
                    for index in range(len(batch)):
                        row += 1
                        where = f"{label}:{row}"
                        yield self._record_documents(partial(row_of, batch, index), where)
                    self.read_bytes = before + file.size * row // table.metadata.num_rows
        except (arrow.ArrowException, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise DataError(f"{label}: cannot be read: {error.strerror}") from None
            self.problems.report("damaged file", f"{label}:{row + 1}", str(error))
        for _ in self._stored(label, partial(open, file.path, "rb")):
            self.read_bytes = before + file.size

    def _columns(self, names: Sequence[str], label: str) -> list[str]:
        """The columns to read of those there are; none, and a report, if one is missing."""
        missing = [name for name in self.format.required_fields if name not in names]
        if missing:
            detail = f"no column {missing[0]!r}; there is {', '.join(map(repr, names)):.300}"
            self.problems.report("field missing", label, detail)
            return []
        wanted = self.format.required_fields + self.format.optional_fields
        return [name for name in names if name in wanted]

    def _dataset_records(self, argument: str) -> Iterator[Iterator[Document]]:
        dataset, row = self._datasets[argument], 0
        if dataset.column_names is not None:
            columns = self._columns(dataset.column_names, argument)
            if not columns:
                return
            dataset = dataset.select_columns(columns)
        rows = iter(dataset)
        while True:
            try:
                record = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the library lets through those of many others
                raise DataError(f"{argument}: stops after row {row}: {error}") from None
            row += 1
            yield self._record_documents(partial(dict, record), f"{argument}:{row}")

    # -- documents: of a record, or of a text

    def _record_documents(self, load: Callable[[], object], where: str) -> Iterator[Document]:
        try:
            record = load()
            data = encode(self._renderer.text(record))
        except RecordError as error:
            self.problems.report(error.kind, where, error.detail)
            return
        for name in self.format.optional_fields:
            if name not in record:
                self.problems.note("optional field missing", where, f"no {name!r}; taken as empty")
        if len(data) > self.limit:
            self.problems.note("cut", where, f"{len(data):,} bytes are more than {self.limit:,}")
        for piece in cut_pieces([data], self.limit):
            yield from self._checked(piece, where)

    def _text_documents(self, chunks: Iterable[bytes], label: str) -> Iterator[Document]:
        line = 1
        try:
            for number, piece in enumerate(self._pieces(chunks)):
                if number == 1 and not self.cuts_texts:
                    detail = f"longer than {self.limit:,} bytes"
                    self.problems.note("cut", f"{label}:1", detail)
                yield from self._checked(piece, label, line)
                line += piece.count(b"\n")
        except DamageError as error:
            self.problems.report("damaged file", f"{label}:{line}", str(error))

    def _pieces(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """The pieces of a text that are to be documents."""
        if self.cuts_texts and self.limit >= 2 * PIECE_BYTES:
            return join_blank(size_pieces(chunks, PIECE_BYTES), self.limit)
        return cut_pieces(chunks, self.limit)

    def _checked(self, data: bytes, label: str, line: int = 0) -> Iterator[Document]:
        """The document that is made of some bytes; none, and a report, if they cannot be one.
        `line` is the file's line at which they start; 0 if `label` says it already."""

        def where(position: int) -> str:
            breaks = data.count(b"\n", 0, position)
            return f"{label}:{line + breaks}" if line else label

        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            detail = f"byte 0x{data[error.start]:02x}: {error.reason}"
            self.problems.report("invalid UTF-8", where(error.start), detail)
            return
        if (position := data.find(b"\0")) >= 0:
            self.problems.report("NUL character", where(position), "U+0000 has no place in text")
        elif not text.strip():
            self.problems.report(
                "blank", where(0), f"nothing but white space ({len(data):,} bytes)"
            )
        else:
            yield Document(text, where(0))


def split_hint(split: str) -> str:
    """What someone may have meant who gave --split without a dataset."""
    words = {"auto": "auto", "file": "files", "document": "files"}
    meant = words.get(split.removesuffix("s"), "pieces")
    hint = f"; for plain texts: --split-text {meant}, and --val-fraction for validation"
    return "" if split == "train" else hint


def batches(table: Any, columns: Sequence[str]) -> Iterator[Any]:
    """Some columns of a pyarrow ParquetFile as record batches, none across row groups: damage to
    one group must not cost rows of the one before."""
    for group in range(table.num_row_groups):
        yield from table.iter_batches(PARQUET_ROWS, [group], columns)


def row_of(batch: Any, index: int) -> dict[str, object]:
    """A row of a pyarrow record batch. Raises RecordError if a value in it cannot be read."""
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise RecordError("invalid UTF-8", str(error)) from None
    except (ValueError, OverflowError) as error:
        raise RecordError("unreadable value", str(error)) from None


def load_dataset(argument: str, subset: str, split: str) -> Any:
    """A Hugging Face dataset as a stream of rows. Raises DataError if it cannot be had."""
    datasets = library("datasets")
    name = argument.removeprefix(HF)
    try:
        return datasets.load_dataset(name, subset or None, split=split, streaming=True)
    except Exception as error:  # the library lets through those of many others
        detail = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{argument}: cannot be loaded; is the name right, and is there a network? ({detail})"
        ) from None
