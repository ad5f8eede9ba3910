"""What a SentencePiece model's file says of how text is normalized before it is cut into pieces.

The library has no way to ask. The fields are those of sentencepiece_model.proto.
"""

from collections.abc import Iterator
from dataclasses import dataclass

NORMALIZER, NORMAL_FORM, DUMMY_PREFIX, JOINS_BLANKS = 3, 2, 3, 4


@dataclass(frozen=True)
class Normalizer:
    """How a model changes text: `is_exact` if decoding gives every text back (but U+2581)."""

    has_normal_form: bool
    has_dummy_prefix: bool
    joins_blanks: bool

    @property
    def is_exact(self) -> bool:
        """Tell whether a text survives."""
        return not (self.has_normal_form or self.joins_blanks)


def read_normalizer(model: bytes) -> Normalizer:
    """Read the normalizer of a model's file; ValueError if the file is not whole."""
    found: dict[int, int | bytes] = {}
    for number, value in read_fields(model):
        if number == NORMALIZER and isinstance(value, bytes):
            found |= dict(read_fields(value))
    return Normalizer(
        has_normal_form=bool(found.get(NORMAL_FORM, b"")),
        has_dummy_prefix=bool(found.get(DUMMY_PREFIX, 1)),
        joins_blanks=bool(found.get(JOINS_BLANKS, 1)),
    )


def read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Read the fields of a protocol buffer: number and value."""
    place = 0
    while place < len(data):
        key, place = read_number(data, place)
        kind = key & 7
        if kind == 0:
            value, place = read_number(data, place)
            yield key >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError("not a SentencePiece model: an unknown kind of field")
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, place = read_number(data, place)
        if place + size > len(data):
            raise ValueError("not a SentencePiece model: it ends too early")
        yield key >> 3, data[place : place + size]
        place += size


def read_number(data: bytes, place: int) -> tuple[int, int]:
    """Read a number of seven bits a byte; return it and the place behind it."""
    number = shift = 0
    while place < len(data):
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, place
    raise ValueError("not a SentencePiece model: it ends too early")
