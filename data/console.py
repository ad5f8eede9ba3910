"""What is printed: on any console or none, with names and commands that are right in a shell."""

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO


class Steady:
    """A text stream that passes over what cannot be written: a closed pipe, a full disk. Files are
    what counts, not what is said of them."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text, or nothing."""
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write out what is buffered, or nothing."""
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def steady_console() -> None:
    """Let this process print to any console: one that is closed, full, or knows ASCII alone."""
    while (free := os.open(os.devnull, os.O_RDWR)) < 3:  # or a file of data would get its number
        os.set_inheritable(free, True)
    os.close(free)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Steady(stream))


def quoted(value: object) -> str:
    """A value as one types it in a shell, in characters that the console can show."""
    text = str(value)
    with suppress(UnicodeEncodeError):
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        if text.isprintable():
            return shlex.quote(text)
    plain = [byte for byte in range(32, 127) if byte not in b"'\\"]
    return "$'" + "".join(chr(b) if b in plain else f"\\{b:03o}" for b in os.fsencode(text)) + "'"


def shown(path: Path) -> str:
    """A path as one types it in a shell here."""
    with suppress(OSError):  # this folder may be gone
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return quoted(path)


def training_command(folder: Path, tokenizer: Path, vocab_size: int | None) -> str:
    """The line that trains on a dataset, to be pasted into a shell here."""
    settings = [f"DATA_PATH={shown(folder)}", f"TOKENIZER_PATH={shown(tokenizer)}"]
    settings += [f"VOCAB_SIZE={vocab_size}"] if vocab_size else []
    script = Path(__file__).resolve().parent.parent / "train_gpt.py"
    return " ".join([*settings, "python", shown(script)])


def name_text(name: str) -> str:
    """A file name for a JSON file: the same whatever the locale in which it was typed."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def text_name(text: str) -> str:
    """The file name that `name_text` has written."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))
