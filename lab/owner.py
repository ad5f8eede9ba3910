"""Find the process that a run's folder belongs to, and ask it to end training.

keeper.py locks FOLDER/lock for as long as a run lives, and writes its process and node into it.
Here the lock is never tried, for a try could take it from a run that begins. The process is the
run's if it has that very file open.
"""

import fcntl
import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import psutil
except ModuleNotFoundError:
    psutil = None

JOURNAL = "watch.jsonl"


class OwnerError(Exception):
    """Why it cannot be told from here whether a run lives, or not be asked anything."""


@dataclass(frozen=True)
class Owner:
    """Name the process of a run; a number that is used again begins at another time."""

    pid: int
    began: float

    def __str__(self) -> str:
        """Name it for a person."""
        return f"process {self.pid}"


def find_owner(folder: Path) -> Owner | None:
    """Find the process of a run; None if it has ended. Raises OwnerError."""
    if not psutil:
        raise OwnerError("psutil is not installed: pip install -r lab/requirements.txt")
    lock = folder / "lock"
    try:
        text = lock.read_text()
        status = lock.stat()
    except FileNotFoundError:
        raise OwnerError("it has no lock: it runs without keeper.py, or has not begun") from None
    except (OSError, ValueError) as error:
        raise OwnerError(f"{lock}: cannot be read: {error}") from None
    found = re.fullmatch(r"process (\d{1,9}) on (.*)", text)
    if not found:
        raise OwnerError(f"{lock}: names no process")
    if found[2] != os.uname().nodename:
        raise OwnerError(f"it runs on {found[2]}, not here")
    pid = int(found[1])
    try:
        process = psutil.Process(pid)
        began = process.create_time()
        paths = [file.path for file in process.open_files()]
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return None
    except psutil.AccessDenied:
        raise OwnerError(f"process {pid} is another user's") from None
    return Owner(pid, began) if any(is_same(path, status) for path in paths) else None


def is_same(path: str, status: os.stat_result) -> bool:
    """Tell whether a path leads to the file of a status."""
    try:
        return os.path.samestat(os.stat(path), status)
    except OSError:
        return False


def listens(pid: int) -> bool:
    """Tell whether SIGUSR1 would be heard; else it may kill. Only Linux says so."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", text, re.M)
    return not caught or bool(int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def ask_to_finish(folder: Path, owner: Owner) -> None:
    """Send SIGUSR1 to a run's process: it trains no further, and exports. Raises OwnerError."""
    if find_owner(folder) != owner:
        raise OwnerError(f"{owner} is not the run's any more")
    if not listens(owner.pid):
        raise OwnerError(f"{owner} does not listen to SIGUSR1")
    try:
        process = psutil.Process(owner.pid)
        if process.create_time() == owner.began:
            process.send_signal(signal.SIGUSR1)
    except psutil.Error as error:
        raise OwnerError(f"{owner}: {error}") from None


class Journal:
    """Keep what watchers have found in FOLDER/watch.jsonl; several may write at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL

    def add(self, record: dict[str, Any], *keys: str) -> bool:
        """Append a record, unless one has the same values of these keys. Raises OSError.

        Returns whether it is new.
        """
        with open(self.path, "a+", encoding="utf-8", errors="replace") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            for line in text.splitlines():
                if is_alike(line, record, keys):
                    return False
            cut = "\n" if text and not text.endswith("\n") else ""
            file.write(f"{cut}{json.dumps(record)}\n")
        return True


def is_alike(line: str, record: dict[str, Any], keys: tuple[str, ...]) -> bool:
    """Tell whether a line is a record with the same values of these keys."""
    try:
        other = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(other, dict) and all(other.get(key) == record[key] for key in keys)
