"""Vocabularies: text to token ids and back, and how many bytes of text each token stands for.

The count follows the challenge's rule for bits per byte: control, unknown and unused tokens are 0
bytes, byte tokens 1, others the UTF-8 of their piece, where the leading "▁" is a space that counts
unless the previous token is a control token. The ByteTable of train_gpt.py, which stands alone,
has the same rule, and a test holds the two together: to import it here would load PyTorch in every
process that tokenizes or checks, for four times the time and three times the memory of a check.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
from caseops import CONTROLS, ESCAPE, NAMES, acting, invert_case, original_offsets
from shards import DataError

SPACE = "\u2581"  # SentencePiece's marker of a space
LINE_BYTES = 4000  # the trainer ignores longer lines (its max_sentence_length is 4192)
TRAINER_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "character_coverage": 0.999,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": False,
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
    "hard_vocab_limit": False,
    "num_threads": 1,  # the model file records it, so it must not follow the machine
}
NORMALIZATIONS = ("nmt_nfkc", "identity")
BYTE_LEVEL_SIZE = 260
# The published byte-level vocabulary's description, in fineweb_pure_byte_260.json.
BYTE_LEVEL_CONFIG = {
    **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3},
    **{"byte_offset": 4, "byte_count": 256},
}


def byte_level_model() -> bytes:
    """The byte-level vocabulary as a SentencePiece model (a protobuf), which any of its users can
    load: ids 0 to 3 are pad, BOS, EOS and unknown, and id 4 + b is the byte b."""

    def message(tag: int, content: bytes) -> bytes:
        return bytes([tag << 3 | 2, len(content)]) + content

    control, unknown, byte = 3, 2, 6  # types of pieces
    pieces = [("<pad>", control), ("<s>", control), ("</s>", control), ("<unk>", unknown)]
    pieces += [(f"<0x{value:02X}>", byte) for value in range(256)]
    texts = [message(1, text.encode()) + bytes([3 << 3, kind]) for text, kind in pieces]
    # model_type = CHAR, byte_fallback, unk_id, bos_id, eos_id, pad_id
    trainer = bytes.fromhex("1804 980201 c00203 c80201 d00202 d80200")
    # No dummy prefix, no removal of whitespace, no escaping of it.
    normalizer = message(1, b"identity") + bytes.fromhex("1800 2000 2800")
    return (
        b"".join(message(1, text) for text in texts) + message(2, trainer) + message(3, normalizer)
    )


def proto_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Walk the fields of a protobuf message: numbers, and integers or bytes.

    Raises ValueError if it is none. The protobuf package is not needed for the little that is read.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def content(wire: int) -> int | bytes:
        nonlocal at
        if wire == 0:
            return varint()
        if wire not in (1, 2, 5):
            raise ValueError("not a protobuf message")
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        at += size
        return message[at - size : at]

    while at < len(message):
        key = varint()
        yield key >> 3, content(key & 7)


def normalizes(model: bytes) -> bool:
    """Tell whether a SentencePiece model changes a text before it is cut into pieces."""
    normalizer = dict(proto_fields(dict(proto_fields(model)).get(3, b"")))
    rules, dummy_prefix, extra_whitespaces = 2, 3, 4
    flags = (normalizer.get(dummy_prefix, 1), normalizer.get(extra_whitespaces, 1))
    return bool(normalizer.get(rules)) or any(flags)


class Vocabulary:
    """A SentencePiece model. Documents are token arrays, uint16 (N,), without BOS.

    `lossless` tells that any text is what its tokens decode to; `case_ops` that the texts are
    images of CaseOps, whose control characters are pieces.
    """

    def __init__(self, model: bytes) -> None:
        self.sp = sp = spm.SentencePieceProcessor(model_proto=model)
        self.size, self.bos, self.unknown = len(sp), sp.bos_id(), sp.unk_id()
        ids, pieces = range(self.size), [sp.id_to_piece(i) for i in range(self.size)]
        silent = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids]
        sizes = [len(piece.removeprefix(SPACE).replace(SPACE, " ").encode()) for piece in pieces]
        self.silent = np.array(silent)
        self.base = np.where([sp.is_byte(i) for i in ids], 1, sizes) * ~self.silent
        self.lead = np.array([piece.startswith(SPACE) for piece in pieces]) & ~self.silent
        self.plain = [i for i in ids if pieces[i].isalpha() and not silent[i]][:1]
        self.byte_ids = {int(pieces[i][3:5], 16): i for i in ids if sp.is_byte(i)}
        self.continuation = np.zeros(self.size, bool)
        self.continuation[[i for byte, i in self.byte_ids.items() if byte & 0xC0 == 0x80]] = True
        self.lossless = len(self.byte_ids) == 256 and not normalizes(model)
        self.control = np.array([piece in NAMES for piece in pieces])
        self.case_ops = int(self.control.sum()) == len(CONTROLS)
        self.escape = sp.piece_to_id(ESCAPE) if self.case_ops else -1
        self.mixed = [p for p in pieces if len(p) > 1 and any(c in p for c in CONTROLS)]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text."""
        encoded = self.sp.encode(texts, return_type="numpy", num_threads=1)
        documents = [ids.astype(np.uint16) for ids in encoded]
        if self.lossless:
            marked = [i for i, text in enumerate(texts) if SPACE in text]
            for i in marked:
                documents[i] = self._encode_around_markers(texts[i])
        return documents

    def _encode_around_markers(self, text: str) -> np.ndarray:
        # SentencePiece takes a literal "▁" for a space; its bytes as tokens are what keeps it.
        marker = np.array([self.byte_ids[byte] for byte in SPACE.encode()], np.uint16)
        parts = self.sp.encode(text.split(SPACE), return_type="numpy", num_threads=1)
        arrays = [array for part in parts for array in (part.astype(np.uint16), marker)]
        return np.concatenate(arrays[:-1])

    def lengths(self, tokens: np.ndarray) -> np.ndarray:
        """The bytes of text that each token of a stream stands for, int64 (N,); what precedes the
        first token counts as a control token. Of CaseOps tokens, the bytes of the original, where
        a space is kept at the start too if the tokenizer is lossless."""
        if self.case_ops and self.lossless:
            return self.exact_lengths(tokens)
        after_silent = np.append(True, self.silent[tokens[:-1]])[: len(tokens)]
        return self._sizes(tokens, self.lead[tokens] & ~after_silent)

    def exact_lengths(self, tokens: np.ndarray) -> np.ndarray:
        """The bytes of the original text that each token of a lossless vocabulary stands for, int64
        (N,). Their sum over a document is that of the original's UTF-8."""
        return self._sizes(tokens, self.lead[tokens])

    def _sizes(self, tokens: np.ndarray, spaces: np.ndarray) -> np.ndarray:
        sizes = self.base[tokens] + spaces
        sizes[self.acting(tokens)] = 0
        return sizes

    def acting(self, tokens: np.ndarray) -> np.ndarray:
        """The places of the CaseOps controls that act, int64 (N,); none in another vocabulary."""
        if not self.case_ops:
            return np.zeros(0, np.int64)
        places = np.flatnonzero(self.control[tokens])
        return places[acting(places, tokens[places] == self.escape)]

    def character_ends(self, tokens: np.ndarray) -> np.ndarray:
        """Whether a character ends with each token, bool (N,): all but the first byte tokens of
        a character that is several."""
        continued = np.append(self.continuation[tokens[1:]], False)
        return ~continued[: len(tokens)]

    def decode(self, documents: list[np.ndarray]) -> list[str]:
        """The text that each document's tokens give; with CaseOps, the image of the text."""
        return self.sp.decode(documents)

    def decoded_bytes(self, documents: list[np.ndarray]) -> int:
        """UTF-8 bytes of the text that the documents decode to, by decoding it."""
        # Decoding strips leading spaces, so a plain piece goes first, and one space is not counted.
        parts = [part for ids in documents for part in self._voiced(ids)]
        texts = self.sp.decode([[*self.plain, *part.tolist()] for part in parts])
        if self.case_ops:
            texts = map(invert_case, texts)
        counted = self.case_ops and self.lossless
        spaces = 0 if counted else sum(int(self.lead[part[0]]) for part in parts)
        plain = sum(int(self.base[i]) for i in self.plain) * len(parts)
        return sum(len(text.encode()) for text in texts) - spaces - plain

    def _voiced(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """The runs of tokens between those that hold no text."""
        for part in np.split(ids, np.flatnonzero(self.silent[ids])):
            voiced = part[~self.silent[part]]
            if len(voiced):
                yield voiced

    def original_bytes(self, text: str, count: int) -> np.ndarray:
        """The bytes of the original text that each of its `count` tokens stands for, int64 (N,);
        their sum is that of the text's UTF-8, whatever the tokenizer's normalization did. With
        CaseOps, `text` is the image, and the bytes are those of the text whose image it is."""
        ends = np.array([end for _, end in self._spans(text)])
        ends[-1] = len(text.encode())  # the last token stands for what was stripped behind it
        assert len(ends) == count
        if self.case_ops:
            ends = original_offsets(text.encode())[ends]
        return np.diff(ends, prepend=0)

    def unknown_bytes(self, text: str, ids: np.ndarray) -> int:
        """The bytes of the original text that its tokens `ids` hold as unknown pieces."""
        unknown = ids == self.unknown
        if not unknown.any():
            return 0
        spans = np.array(self._spans(text))[unknown]
        return int((spans[:, 1] - spans[:, 0]).sum())

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Where in the text's UTF-8 each of its tokens begins and ends."""
        return self.sp.encode(text, return_type="offset_mapping", return_bytes=True)["offsets"]


@cache
def load_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer in a file: a SentencePiece model, or the JSON of the byte-level one (.json).
    Raises DataError if it is neither, or does not fit the shard format; OSError."""
    model = path.read_bytes()
    try:
        if path.suffix == ".json":
            config = json.loads(model)["config"]
            if config != BYTE_LEVEL_CONFIG:
                raise ValueError(f"{config}: an unknown byte-level layout")
            model = byte_level_model()
        vocabulary = Vocabulary(model)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a tokenizer: {error}") from None
    if vocabulary.size > 2**16 or vocabulary.bos < 0:
        raise DataError(f"{path}: shards need a BOS and at most 65,536 ids")
    if vocabulary.case_ops and vocabulary.mixed:
        raise DataError(
            f"{path}: the piece {vocabulary.mixed[0]!a} holds a CaseOps control beside other "
            "characters; each control must be a piece of its own (a user-defined symbol)"
        )
    return vocabulary


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the texts; long ones broken at spaces, since the trainer ignores them whole."""
    for line in (line for text in texts for line in text.splitlines() if line.strip()):
        start = 0
        while len(line[start : start + LINE_BYTES + 1].encode()) > LINE_BYTES:
            end = start + LINE_BYTES // 4  # a character is at most 4 bytes
            space = line.rfind(" ", start + 1, end)
            end = space if space > 0 else end
            yield line[start:end]
            start = end
        yield line[start:]


def trainer_options(normalization: str, case_ops: bool) -> dict[str, Any]:
    """What SentencePiece's trainer is told, apart from the number of pieces."""
    options = dict(TRAINER_OPTIONS)
    if normalization != NORMALIZATIONS[0] or case_ops:
        options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    if case_ops:
        options["user_defined_symbols"] = list(CONTROLS)
    return options


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, options: dict[str, Any] = TRAINER_OPTIONS
) -> bytes:
    """A SentencePiece model trained on the lines of the texts with these options, as the
    bytes of its file. Raises DataError if they do not suffice for `vocab_size` pieces and a "▁"
    piece of its own, without which every lone space would become three byte tokens."""
    model = io.BytesIO()
    options = {"vocab_size": vocab_size, "minloglevel": 2, **options}
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=training_lines(texts), model_writer=model, **options
        )
    except RuntimeError as error:
        raise DataError(f"SentencePiece cannot train a tokenizer on this text: {error}") from None
    tokenizer = spm.SentencePieceProcessor(model_proto=model.getvalue())
    if tokenizer.vocab_size() != vocab_size:
        raise DataError(
            f"the text gives a tokenizer of {tokenizer.vocab_size()} pieces, "
            f"{vocab_size} were asked for: use more text"
        )
    if tokenizer.piece_to_id(SPACE) == tokenizer.unk_id():
        raise DataError("the tokenizer has no piece for a lone space (▁): use more text")
    return model.getvalue()


def fit_sidecar(sizes: np.ndarray, limit: int = 2**16 - 1) -> np.ndarray:
    """Bytes per token as a sidecar holds them, uint16 (N,): what a token has over `limit` (a run of
    65,536 blanks) goes to those behind it, and at the end to those before. The sum is kept.
    Raises DataError if it cannot be."""
    sizes = sizes.copy()
    for order in (range(len(sizes)), range(len(sizes) - 1, -1, -1)):
        carry = 0
        for i in order if sizes.max(initial=0) > limit else ():
            carry += sizes[i]
            sizes[i] = min(carry, limit)
            carry -= sizes[i]
        if carry:
            sizes[order[-1]] += carry
    if sizes.max(initial=0) > limit:
        raise DataError(f"{sizes.sum():,} bytes in {len(sizes)} tokens do not fit a byte sidecar")
    return sizes.astype(np.uint16)


def concatenate(documents: Sequence[np.ndarray], bos: int) -> np.ndarray:
    """The documents as one stream, each after its BOS, uint16 (N,)."""
    start = np.array([bos], np.uint16)
    parts = [part for ids in documents for part in (start, ids)]
    return np.concatenate(parts) if parts else start[:0]
