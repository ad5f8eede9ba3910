"""Token shards, the challenge's file format: 256 little-endian int32 of header (magic 20240520,
version 1, number of tokens, zeros), then one little-endian uint16 a token."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from tqdm import tqdm

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024


class DataError(Exception):
    """The data cannot be made or is not whole; the message says what, where, and what to do."""


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


def begin_work(prepare: Callable[[], object] | None) -> None:
    """Let this process end when its parent does, even if that was killed; then call `prepare`."""

    def watch() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if prepare:
        prepare()


class WorkerPool(ProcessPoolExecutor):
    """Processes that end with this one, however it ends, and leave Ctrl-C to it. Each calls
    `prepare` first."""

    def __init__(self, processes: int, prepare: Callable[[], object] | None = None) -> None:
        super().__init__(processes, get_context("spawn"), begin_work, (prepare,))

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """As in the base class, which starts processes here: they inherit the blocked signal."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ProgressBar(tqdm):
    """A progress bar without a thread of its own, on which Ctrl-C would arrive while `WorkerPool`
    keeps it from this one."""

    monitor_interval = 0


def shard_name(split: str, number: int) -> str:
    """The file name of a shard; `split` is "train", "val", or "val_bytes" for sidecars."""
    return f"fineweb_{split}_{number:06d}.bin"


def shard_paths(folder: Path, split: str) -> list[Path]:
    """The shards of a split in their order. Sidecars (val_bytes) are not shards of "val"."""
    return sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))


def header(count: int) -> bytes:
    """The header of a shard of `count` tokens."""
    fields = np.zeros(HEADER_BYTES // 4, "<i4")
    fields[:3] = MAGIC, VERSION, count
    return fields.tobytes()


def token_count(path: Path) -> int:
    """The number of tokens in a shard, by its header. Raises DataError if the file is not as long
    as that, has none, or is no shard; OSError if it cannot be read."""
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if len(start) < HEADER_BYTES:
        raise DataError(f"{path}: {size:,} bytes are too few for a shard's header of 1,024")
    magic, version, count = np.frombuffer(start, "<i4", 3).tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise DataError(f"{path}: not a token shard: magic {magic}, version {version}")
    if count < 1 or size != HEADER_BYTES + 2 * count:
        expected = f"{HEADER_BYTES + 2 * count:,} bytes for the {count:,} tokens of its header"
        raise DataError(f"{path}: {size:,} bytes instead of {expected}: truncated or damaged")
    return count


def map_tokens(path: Path) -> np.ndarray:
    """The tokens of a shard, uint16 (N,), mapped from the file. Raises as `token_count`."""
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (token_count(path),))


class ShardWriter:
    """Writes a stream of tokens as shards of `size` tokens; the last one may be shorter. A shard
    has its final name only when it is whole and on disk."""

    def __init__(self, folder: Path, split: str, size: int) -> None:
        self.folder, self.split, self.size = folder, split, size
        self.number = self.filled = 0
        self.file: BinaryIO | None = None

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, uint16 (N,), beginning new shards as they fill up."""
        while len(tokens):
            if self.file is None:
                self.file = open(self._path(".tmp"), "wb")  # noqa: SIM115
                self.file.write(header(0))
            part, tokens = np.split(tokens, [self.size - self.filled])
            self.file.write(part.astype("<u2", copy=False).data)
            self.filled += len(part)
            if self.filled == self.size:
                self._finish()

    def _path(self, ending: str = "") -> Path:
        return self.folder / (shard_name(self.split, self.number) + ending)

    def _finish(self) -> None:
        assert self.file
        self.file.seek(0)
        self.file.write(header(self.filled))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self._path(".tmp"), self._path())
        self.file, self.filled, self.number = None, 0, self.number + 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.file and error is None:
            self._finish()
        elif self.file:
            self.file.close()
            self._path(".tmp").unlink(missing_ok=True)
