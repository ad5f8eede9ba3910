"""CaseOps: a bijective transform that writes capitals as lowercase behind control characters.

"The USA, iPhone" becomes "<TITLE>the <ALLCAPS>usa, i<CAPNEXT>phone", where <TITLE> and the others
are characters of Unicode's private use area. A vocabulary then holds a word once, whatever its
case. The rules act on every maximal run of ASCII letters, so that each text has one image
(Parameter Golf, pull request 1729).
"""

import re
from collections.abc import Callable

import numpy as np
from shards import DataError

TITLE, ALLCAPS, CAPNEXT, ESCAPE = CONTROLS = "\ue001", "\ue002", "\ue003", "\ue004"
NAMES = dict(zip(CONTROLS, ("TITLE", "ALLCAPS", "CAPNEXT", "ESCAPE"), strict=True))
CONTROL_BYTES = 3  # in UTF-8: EE 80 81 to EE 80 84
CONTROL = f"[{TITLE}-{ESCAPE}]"
# A run of letters with a capital, or a control character. Where a run without one has failed, no
# part of it is tried again: the time stays linear.
CHANGED = re.compile(rf"((?<![A-Za-z])[a-z]*+[A-Z][A-Za-z]*+|{CONTROL})")
CAPITAL = re.compile("[A-Z]")
# An escaped control, or a control with the letters that it acts on, or a control alone.
ACTS = re.compile(rf"({ESCAPE}{CONTROL}|[{TITLE}{CAPNEXT}][a-z]|{ALLCAPS}[a-z]++|{CONTROL})")
CACHED_WORDS = 2**16
CACHED_CHARACTERS = 32


class Cache(dict[str, str]):
    """What becomes of a word, computed once for each of the words that come first."""

    def __init__(self, change: Callable[[str], str]) -> None:
        self.change = change

    def __missing__(self, word: str) -> str:
        changed = self.change(word)
        if len(self) < CACHED_WORDS and len(word) <= CACHED_CHARACTERS:
            self[word] = changed
        return changed

    def substitute(self, words: re.Pattern[str], text: str) -> str:
        """Change each match of a pattern, which must be one group (faster than Pattern.sub)."""
        parts = words.split(text)
        parts[1::2] = map(self.__getitem__, parts[1::2])
        return "".join(parts)


class CaseError(DataError):
    """A text is not the image of any text; `position` is that of the first wrong character."""

    def __init__(self, position: int, problem: str) -> None:
        super().__init__(f"character {position:,}: {problem}")
        self.position = position


def encode_word(word: str) -> str:
    """Write a run of letters that has a capital, or escape a control character."""
    if word in NAMES:
        return ESCAPE + word
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    first = word[0]
    start = TITLE + first.lower() if first.isupper() else first
    return start + CAPITAL.sub(lambda match: CAPNEXT + match[0].lower(), word[1:])


def invert_word(word: str) -> str:
    """Give what a match of ACTS stands for."""
    letters = word[1:]
    return letters if word[0] == ESCAPE else letters.upper()


ENCODED = Cache(encode_word)
INVERTED = Cache(invert_word)


def encode_case(text: str) -> str:
    """Write the capitals of a text as control characters and lowercase letters."""
    return ENCODED.substitute(CHANGED, text)


def invert_case(text: str) -> str:
    """Give the text whose image this is, or, if there is none, the closest to one.

    A control character that has nothing to act on is left out, and a bare capital is kept: that is
    what a tokenizer's normalization makes of some images ("™" becomes "TM").
    """
    return INVERTED.substitute(ACTS, text)


def has_stray_control(text: str) -> bool:
    """Tell whether a control character of an image has nothing to act on."""
    return any(len(word) == 1 for word in ACTS.findall(text))


def decode_case(text: str) -> str:
    """Give the text whose image this is. Raises CaseError if it is the image of none."""
    original = invert_case(text)
    image = encode_case(original)
    if image != text:
        raise _explained(text, image)
    return original


def _explained(text: str, image: str) -> CaseError:
    pairs = enumerate(zip(text, image, strict=False))
    shorter = min(len(text), len(image))
    position = next((i for i, (a, b) in pairs if a != b), shorter)
    found = text[position : position + 1]
    if not found:
        return CaseError(position, "the text ends here, within what a control character acts on")
    what = NAMES.get(found) or ascii(found)
    behind = text[position + 1 : position + 9]
    if found in NAMES:
        before = f"before {behind!a}" if behind else "at the end"
        return CaseError(position, f"{what} {before}, where it cannot act as in an image")
    return CaseError(position, f"{what} before {behind!a} stands in no image of a text")


def acting(positions: np.ndarray, escapes: np.ndarray, step: int = 1) -> np.ndarray:
    """Tell the control characters that act from those that an ESCAPE makes literal, bool (N,).

    `positions`, ascending, are those of all control characters, `step` apart if neighbours;
    `escapes` says which of them are an ESCAPE.
    """
    acts = np.ones(len(positions), bool)
    for i in np.flatnonzero(escapes[:-1]):  # in order: an escaped ESCAPE escapes nothing
        if acts[i] and positions[i + 1] == positions[i] + step:
            acts[i + 1] = False
    return acts


def original_offsets(image: bytes) -> np.ndarray:
    """Map the offsets of an image's UTF-8 to those of the original's, int64 (N + 1,).

    Entry i is the number of the original's bytes that lie before the image's byte i.
    """
    data = np.frombuffer(image, np.uint8)
    weights = np.ones(len(data), np.int64)
    starts = np.flatnonzero(data[:-2] == 0xEE)
    last = data[starts + 2] & 0x7F
    is_control = (data[starts + 1] == 0x80) & (last >= 1) & (last <= 4)
    starts = starts[is_control]
    starts = starts[acting(starts, last[is_control] == 4, CONTROL_BYTES)]
    for byte in range(CONTROL_BYTES):
        weights[starts + byte] = 0
    return np.concatenate([[0], np.cumsum(weights)])
