"""Text of CaseOps data, which marks capitals so that all letters are small (techniques.md 2.14).

This is the auditor's own code: nothing that prepared the data or scored it is used here.
"""

import re

MARKS = "\ue001\ue002\ue003\ue004"
TITLE, CAPITALS, NEXT, ESCAPE = MARKS
MARK_BYTES = len(TITLE.encode())
WORD = re.compile("(?<![A-Za-z])[a-z]*[A-Z][A-Za-z]*")  # with a capital
MARK = re.compile(f"[{MARKS}]")
STRICT = re.compile(f"([{TITLE}{NEXT}][a-z]|{CAPITALS}[a-z]+|{ESCAPE}[{MARKS}])|[{MARKS}A-Z]")
# A tokenizer's normal form joins a letter to its accent, and makes capitals of other characters.
TOLERANT = re.compile(rf"([{TITLE}{NEXT}][^\W\d_]|{CAPITALS}[^\W\d_]+|{ESCAPE}[{MARKS}])|[{MARKS}]")
NEAR = 12  # characters that are shown on each side of what is wrong


class MalformedError(ValueError):
    """Text that no original text becomes."""


def invert(text: str, is_normalized: bool = False) -> str:
    """Restore the original text.

    A mark with nothing that it can act on, or a capital, raises MalformedError: it says where and
    what. Of `is_normalized` text capitals and all kinds of letters are allowed.
    """

    def act(found: re.Match[str]) -> str:
        if not found[1]:
            near = text[max(0, found.start() - NEAR) : found.end() + NEAR]
            raise MalformedError(f"character {found.start()}, {name(found[0])}, in {near!a}")
        return found[1][1:].upper()

    return (TOLERANT if is_normalized else STRICT).sub(act, text)


def name(char: str) -> str:
    """Name a character that is out of place."""
    return f"a capital {char}" if char.isascii() else f"the mark U+{ord(char):04X}"


def write(text: str) -> str:
    """Write a text as CaseOps does."""
    return WORD.sub(write_word, MARK.sub(rf"{ESCAPE}\g<0>", text))


def write_word(found: re.Match[str]) -> str:
    """Write a run of ASCII letters that has a capital."""
    word = found[0]
    if word.isupper() and len(word) > 1:
        return CAPITALS + word.lower()
    first = TITLE if word[0].isupper() else ""
    rest = "".join(NEXT + c.lower() if c.isupper() else c for c in word[1:])
    return first + word[0].lower() + rest


def acting(text: str) -> int:
    """Count the marks in a text that are no text themselves: all but those behind an ESCAPE."""
    return len(MARK.findall(re.sub(f"{ESCAPE}[{MARKS}]", ESCAPE, text)))
