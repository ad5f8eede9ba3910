"""The auditor's text: parts of the data, and what chance writes that no script can foresee."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

TRIES = 100  # starts of other text
KINDS = ("ids", "text", "shifted", "same", "border")


@dataclass
class Variant:
    """A stream that begins as another: both agree in their first `shared` tokens."""

    base: int
    stream: int
    shared: int
    what: str
    same_length: bool


@dataclass
class Position:
    """Streams first ... first + V - 1 hold every id at position t of the same prefix."""

    what: str
    t: int
    first: int
    followed: bool


@dataclass
class Suite:
    """Streams to be scored together, and what is to be compared in them."""

    streams: list[np.ndarray] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)
    positions: list[Position] = field(default_factory=list)

    def add(self, tokens: np.ndarray) -> int:
        """Add a stream and return its number."""
        self.streams.append(np.asarray(tokens, np.uint16))
        return len(self.streams) - 1

    def add_variant(self, base: int, tokens: np.ndarray, what: str) -> None:
        """Add a stream to be compared with another as far as they agree."""
        old, new = self.streams[base], np.asarray(tokens, np.uint16)
        length = min(len(old), len(new))
        differ = np.flatnonzero(old[:length] != new[:length])
        shared = int(differ[0]) if len(differ) else length
        if shared > 1 and not shared == len(old) == len(new):
            number, same = self.add(new), len(old) == len(new)
            self.variants.append(Variant(base, number, shared, what, same))

    @property
    def tokens(self) -> int:
        """The tokens of all streams."""
        return sum(map(len, self.streams))


class Writer:
    """Makes the auditor's text, from the data and from chance.

    `bos` is what begins a document; -1 if nothing does. `joints` are the places where text can
    start behind other text, if it cannot do so everywhere.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        vocabulary: int,
        bos: int,
        seed: int,
        joints: np.ndarray | None = None,
    ) -> None:
        self.tokens, self.vocabulary, self.bos = tokens, vocabulary, bos
        self.border = np.array([bos] if bos >= 0 else [], np.uint16)
        self.kinds = KINDS if bos >= 0 else [kind for kind in KINDS if kind != "border"]
        self.rng = np.random.default_rng(seed)
        self.joints = np.zeros(0, np.int64) if joints is None else joints[joints < len(tokens)]
        self.borders = np.flatnonzero(tokens == bos)

    def text(self, length: int, start: int | None = None) -> np.ndarray:
        """Take running text of the data from a random place, or from a given one."""
        start = int(self.rng.integers(len(self.tokens))) if start is None else start
        return self.tokens[(start + np.arange(length)) % len(self.tokens)]

    def document(self, length: int) -> np.ndarray:
        """Take the same from the start of a document."""
        start = int(self.rng.choice(self.borders)) if len(self.borders) else None
        return self.text(length, start)

    def ids(self, length: int) -> np.ndarray:
        """Draw random ids of the whole vocabulary."""
        return self.rng.integers(0, self.vocabulary, length).astype(np.uint16)

    def bordered(self, length: int) -> np.ndarray:
        """Join parts of documents of 8 to 40 tokens, each with its BOS."""
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < length:
            part = self.document(int(self.rng.integers(8, 41)))
            parts += [self.border, part[part != self.bos]]
        return np.concatenate(parts)[:length]

    def future(self, kind: str, base: np.ndarray, t: int, length: int) -> np.ndarray:
        """Write what takes the place of base[t:]; its first token is another one than base[t]."""
        makers: dict[str, Callable[[], np.ndarray]] = {
            "ids": lambda: self.ids(length),
            "text": lambda: self.text(length),
            "shifted": lambda: np.resize(np.append(base[t + 1 :], base[: t + 1]), length),
            "same": lambda: np.full(length, self.rng.integers(0, self.vocabulary), np.uint16),
            "border": lambda: np.append(self.border, self.document(length))[:length],
        }
        new = makers[kind]().astype(np.uint16)
        if t < len(base) and length:
            while new[0] == base[t]:
                new[0] = self.rng.integers(0, self.vocabulary)
        return new

    def with_future(self, base: np.ndarray, t: int) -> np.ndarray:
        """Replace everything from t on by other text of the data.

        Where that cannot start everywhere, it starts where it can and may be shorter.
        """
        for start in self.rng.permutation(self.joints)[:TRIES].tolist():
            if self.tokens[start] != base[t]:
                return np.append(base[:t], self.tokens[start : start + len(base) - t])
        return np.append(base[:t], self.future("text", base, t, len(base) - t))
