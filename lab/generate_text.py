"""Turn a prompt into tokens, and tokens into text as they come."""

import codecs
import re
import sys
from typing import Any

SPACE = "\u2581"  # SentencePiece's marker of a space
LOST = "\ufffd"  # stands for what is no text: an unknown piece, or bytes that form no character
BREAK = b"\n\n"  # between documents
# CaseOps (data/README.md) writes a capital as a mark and a small letter.
TITLE, CAPITALS, NEXT, ESCAPE = CASE_MARKS = "\ue001\ue002\ue003\ue004"
MARK = re.compile(f"[{CASE_MARKS}]")
WORD = re.compile("(?<![A-Za-z])[a-z]*[A-Z][A-Za-z]*")  # with a capital
NORMALIZED = "  \ufb01\xa0 "  # each normalization changes one of these


def tell(text: str) -> None:
    """Print a line for the person, beside the text that is generated."""
    if sys.stderr:
        print(text, file=sys.stderr, flush=True)


# ===================================== CAPITALS =====================================


def lower_case(text: str) -> str:
    """Write a text as CaseOps does."""
    escaped = MARK.sub(rf"{ESCAPE}\g<0>", text)
    return WORD.sub(lambda found: lower_word(found[0]), escaped)


def lower_word(word: str) -> str:
    """Write a run of ASCII letters that has a capital."""
    if word.isupper() and len(word) > 1:
        return CAPITALS + word.lower()
    first = TITLE if word[0].isupper() else ""
    rest = "".join(NEXT + c.lower() if c.isupper() else c for c in word[1:])
    return first + word[0].lower() + rest


class Capitals:
    """Restore the capitals of CaseOps text, character by character.

    A mark that has nothing to act on is dropped: what a model writes need not be the image of any
    text. A tokenizer that normalizes may join a letter with its accent, so marks act on letters of
    all kinds then; else, on those that CaseOps writes.
    """

    def __init__(self, normalizes: bool) -> None:
        self.normalizes = normalizes
        self.mark = ""

    def restore(self, text: str) -> str:
        """Restore the next part of a text."""
        return "".join(map(self.restore_next, text))

    def restore_next(self, char: str) -> str:
        """Give what the next character stands for."""
        mark = self.mark
        self.mark = ""
        if mark == ESCAPE:
            return char
        if char in CASE_MARKS:
            self.mark = char
            return ""
        if not self.is_letter(char):
            return char
        if mark == CAPITALS:
            self.mark = CAPITALS  # up to what is no letter
        return char.upper() if mark else char

    def is_letter(self, char: str) -> bool:
        """Tell whether a mark acts on a character."""
        return char.isalpha() if self.normalizes else char.isascii() and char.islower()


# ===================================== TOKENS =====================================


class Texts:
    """The text of each piece of a tokenizer, which is a `Tokenizer` of train_gpt.py."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.sp = sp = tokenizer.sp
        self.bos = tokenizer.bos
        self.ends = {self.bos, sp.eos_id()}  # of a document
        self.bytes = [self.bytes_of(i) for i in range(len(sp))]
        self.case_ops = tokenizer.case_ops
        self.normalizes = sp.normalize(NORMALIZED) != NORMALIZED.replace(" ", SPACE)
        # Some tokenizers put a space before each document; it is not part of the text.
        self.adds_space = sp.normalize("a").startswith(SPACE)

    def bytes_of(self, token: int) -> bytes:
        """Give the UTF-8 bytes, perhaps a part of a character, that a token stands for."""
        if token == self.bos:
            return BREAK
        piece = self.tokenizer.pieces[token]
        if self.tokenizer.byte[token]:
            return bytes([int(piece[3:5], 16)])  # of <0xFF>
        if self.sp.is_unknown(token):
            return LOST.encode()
        if self.tokenizer.silent[token]:
            return b""
        return piece.replace(SPACE, " ").encode()

    def encode(self, text: str) -> tuple[list[int], list[str], list[str]]:
        """Turn a text into tokens, without BOS.

        Also gives what the tokenizer lacks: characters that became unknown pieces, and characters
        that became bytes.
        """
        image = lower_case(text) if self.case_ops else text
        found = self.sp.encode(image, return_type="offset_mapping")
        tokens = found["ids"]
        parts = [image[begin:end] for begin, end in found["offsets"]]
        pairs = [*zip(tokens, parts, strict=True)]
        unknown = [part for token, part in pairs if self.sp.is_unknown(token)]
        as_bytes = [part for token, part in pairs if self.sp.is_byte(token)]
        if self.tokenizer.byte_level:
            as_bytes = []
        return tokens, distinct(unknown), distinct(as_bytes)


def distinct(texts: list[str]) -> list[str]:
    """List the characters of texts, each once."""
    return list(dict.fromkeys("".join(texts)))


def warn_of_missing(texts: Texts, prompt: str) -> None:
    """Warn of characters that the tokenizer lacks."""
    _, unknown, as_bytes = texts.encode(prompt)
    if unknown:
        names = ", ".join(map(name_character, unknown))
        tell(f"warning: the tokenizer lacks {names}: the model reads an unknown piece instead")
    if as_bytes:
        names = ", ".join(map(name_character, as_bytes))
        tell(f"warning: the tokenizer has no piece for {names}: the model reads single bytes")


def name_character(char: str) -> str:
    """Name a character for a person."""
    code = f"U+{ord(char):04X}"
    return f"{char} ({code})" if char.isprintable() else code


class Writer:
    """Write a document's tokens as text: whole characters alone, their capitals restored."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.capitals = Capitals(texts.normalizes) if texts.case_ops else None
        self.begins = True  # what comes is the first text of a document

    def write(self, token: int) -> str:
        """Give the text that is whole with this token; empty if none is."""
        text = self.finish(self.decoder.decode(self.texts.bytes[token]))
        self.begins = self.begins or token == self.texts.bos
        return text

    def end(self) -> str:
        """Give what stands for a character that was left incomplete."""
        return self.finish(self.decoder.decode(b"", True))

    def finish(self, text: str) -> str:
        """Leave out a space that only the tokenizer put there, and restore capitals."""
        if self.begins and text:
            self.begins = False
            text = text.removeprefix(" ") if self.texts.adds_space else text
        return self.capitals.restore(text) if self.capitals else text


class Until:
    """Let a text through, as it comes, up to where `stop` begins; an empty one never does."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.held = ""  # may be the start of `stop`
        self.found = False

    def pass_on(self, text: str) -> str:
        """Give what is certain not to be in `stop`."""
        self.held += text
        if self.stop and self.stop in self.held:
            self.found = True
            self.held = self.held[: self.held.index(self.stop)]
            return self.end()
        most = min(len(self.stop) - 1, len(self.held))
        fits = (n for n in range(most, 0, -1) if self.held.endswith(self.stop[:n]))
        size = len(self.held) - next(fits, 0)
        passed = self.held[:size]
        self.held = self.held[size:]
        return passed

    def end(self) -> str:
        """Give what was held back."""
        rest = self.held
        self.held = ""
        return rest
