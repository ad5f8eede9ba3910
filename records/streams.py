"""What an auditor needs around a scoring script: shards, and a byte count of its own.

Nothing here imports the trainer or knows of any model.
"""

import itertools
import json
from pathlib import Path

import case_ops
import numpy as np
import sentencepiece as spm
from sentence_piece import read_normalizer

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024


def shard(values: np.ndarray) -> bytes:
    """Write tokens, or their sizes, in the published format."""
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(values)
    return header.tobytes() + np.asarray(values).astype("<u2").tobytes()


def read_validation(folder: Path, most: int) -> np.ndarray:
    """Read the first `most` validation tokens of a data folder, sidecars left aside.

    Raises ValueError if there is no shard, or one that is not whole.
    """
    return read_shards(validation_shards(folder), most)


def validation_shards(folder: Path) -> list[Path]:
    """List the validation shards of a data folder; ValueError if there is none."""
    paths = sorted(folder.glob("fineweb_val_[0-9]*.bin"))
    if not paths:
        raise ValueError(f"{folder}: no fineweb_val_*.bin; name a folder that holds some")
    return paths


def read_sizes(folder: Path, most: int) -> np.ndarray | None:
    """Read the original bytes of the first `most` validation tokens, if sidecars state them."""
    paths = sidecar_shards(folder)
    return read_shards(paths, most) if paths else None


def sidecar_shards(folder: Path) -> list[Path]:
    """List the sidecars of a data folder."""
    return sorted(folder.glob("fineweb_val_bytes_[0-9]*.bin"))


def read_shards(paths: list[Path], most: int) -> np.ndarray:
    """Read the first `most` tokens of shards; ValueError for one that is not whole."""
    parts, count = [np.zeros(0, np.uint16)], 0
    for path in paths:
        if count >= most:
            break
        size = shard_size(path)
        parts.append(np.fromfile(path, "<u2", min(size, most - count), offset=HEADER_BYTES))
        count += len(parts[-1])
    return np.concatenate(parts)


def shard_size(path: Path) -> int:
    """Read how many tokens a shard holds; ValueError if it is not whole."""
    header = np.fromfile(path, "<i4", 3)
    size = int(header[2]) if len(header) == 3 else -1
    is_whole = path.stat().st_size == HEADER_BYTES + 2 * size
    if header[:2].tolist() != [MAGIC, VERSION] or not is_whole:
        raise ValueError(f"{path}: not a whole token shard; get it again")
    return size


class ByteCounter:
    """UTF-8 bytes of the text that tokens stand for, by decoding them.

    `bos` is the id that begins a document; -1 if the tokenizer has none. `is_exact` if decoding
    gives every text back. `case_ops` if the four marks of CaseOps are pieces of their own: then
    the text that counts is the one before it was written with small letters.
    """

    def __init__(self, tokenizer: Path) -> None:
        self.plain, self.size, self.sp = [], 260, None
        self.case_ops, self.is_exact, self.keeps_first_blank = False, True, True
        if tokenizer.suffix == ".json":  # the published byte-level one: 4 controls, 256 bytes
            config = json.loads(tokenizer.read_bytes())["config"]
            if config["byte_offset"] != 4:
                raise ValueError(f"{tokenizer}: an unknown layout of byte tokens")
            self.bos, self.unknown = int(config.get("bos_id", 1)), int(config.get("unk_id", 3))
            self.edge, self.byte = np.arange(260) < 4, np.arange(260) >= 4
            self.marks, self.letters, self.blank = (np.zeros(260, bool) for _ in range(3))
            self.own = self.byte.astype(np.int64)
            return
        model = tokenizer.read_bytes()
        self.sp = sp = spm.SentencePieceProcessor(model_proto=model)
        self.size, self.bos, self.unknown, ids = len(sp), sp.bos_id(), sp.unk_id(), range(len(sp))
        edges = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids]
        self.edge, self.byte = np.array(edges), np.array([sp.is_byte(i) for i in ids])
        # A word before what is decoded: at the start of a text a space may be stripped.
        self.plain = [i for i in ids if not edges[i] and sp.decode([i]).isalpha()][:1]
        if not self.plain:
            raise ValueError(f"{tokenizer}: no piece is a plain word, so no text can be decoded")
        normalizer = read_normalizer(model)
        self.is_exact = normalizer.is_exact
        self.keeps_first_blank = normalizer.is_exact and not normalizer.has_dummy_prefix
        marks = [sp.piece_to_id(mark) for mark in case_ops.MARKS]
        self.escape = marks[-1]
        self.case_ops = sp.unk_id() not in marks
        self.marks = np.isin(np.arange(self.size), marks) & self.case_ops
        self._measure()

    def _measure(self) -> None:
        """Decode every piece, for the bytes of its own text and what kind of text it is."""
        assert self.sp
        skip = len(self.sp.decode(self.plain))
        found = self.sp.decode([[*self.plain, i] for i in range(self.size)])
        is_text = ~(self.edge | self.byte)
        texts = [text[skip:] if is_text[i] else "" for i, text in enumerate(found)]
        sizes = [len(text.encode()) for text in texts]
        self.own = np.where(self.byte, 1, np.array(sizes))
        self.blank = np.array([" " in text for text in texts])
        self.letters = np.array([text.isascii() and text.isalpha() for text in texts])
        self.lead = np.array([text.startswith(" ") for text in texts])
        if self.case_ops:  # marks that pieces join with text are none either
            joined = [case_ops.MARK_BYTES * case_ops.acting(text) for text in texts]
            self.own -= np.where(self.marks, 0, np.array(joined))

    def count(self, tokens: np.ndarray) -> int:
        """Count bytes of the tokens after the first; ValueError for unknown ids."""
        if len(tokens) and int(tokens.max()) >= self.size:
            raise ValueError(f"token {int(tokens.max())} is not one of the {self.size} pieces")
        if self.case_ops:
            return int(self.sizes(tokens)[1:].sum())
        return self._total(tokens) - self._total(tokens[:1])

    def sizes(self, tokens: np.ndarray) -> np.ndarray:
        """Count each token's bytes of the original text, int64 (N,): what a sidecar should hold.

        Control tokens, unknown ones and marks of CaseOps that act have none, byte tokens 1.
        """
        sizes = self.own[tokens]
        sizes[self.acting(tokens)] = 0
        if self.sp and not self.keeps_first_blank:
            starts = np.append(True, self.edge[tokens[:-1]])[: len(tokens)]
            sizes -= self.lead[tokens] & starts
        return sizes

    def acting(self, tokens: np.ndarray) -> np.ndarray:
        """Find the marks of CaseOps that are no text: all but those behind one that escapes."""
        acts = self.marks[tokens]
        if self.case_ops:
            for place in np.flatnonzero(tokens[:-1] == self.escape).tolist():
                acts[place + 1] &= not acts[place]
        return acts

    def texts(self, documents: list[np.ndarray]) -> list[str]:
        """Decode whole documents of a SentencePiece model, but for tokens without text."""
        assert self.sp
        runs, counts = [], []
        for ids in documents:
            edges = np.flatnonzero(self.edge[ids])
            parts = [part[~self.edge[part]].tolist() for part in np.split(ids, edges)]
            counts.append(len(parts))
            runs += parts
        texts = iter(self.sp.decode(runs))
        return ["".join(itertools.islice(texts, count)) for count in counts]

    def borders(self, tokens: np.ndarray) -> np.ndarray:
        """Find where CaseOps text can be cut, and other text be joined; places in ascending order.

        That is not behind a mark, nor beside a byte token, which may be part of a character. Of
        other text all places are listed. Place i is before tokens[i].
        """
        if not self.case_ops:
            return np.arange(len(tokens) + 1)
        is_open = self.byte[tokens]
        is_bad = np.append(False, is_open | self.marks[tokens]) | np.append(is_open, False)
        return np.flatnonzero(~is_bad)

    def whole(self, tokens: np.ndarray) -> np.ndarray:
        """Drop an end of text that no text has: a mark of CaseOps, or part of a character."""
        return tokens[: self.borders(tokens).max(initial=0) or len(tokens)]

    def _total(self, tokens: np.ndarray) -> int:
        """Count bytes of all tokens.

        1 for a byte token; of others, the text that they decode to, less a space that follows a
        control token or the start.
        """
        edge, byte = self.edge[tokens], self.byte[tokens]
        if self.sp is None or not len(tokens):
            return int(byte.sum())
        kind = edge + 2 * byte
        runs = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(kind)) + 1)
        runs = [run for run in runs if kind[run[0]] == 0]
        texts = self.sp.decode([[*self.plain, *tokens[run].tolist()] for run in runs])
        skip, size = len(self.sp.decode(self.plain)), int(byte.sum())
        for run, text in zip(runs, texts, strict=True):
            starts = run[0] == 0 or bool(edge[run[0] - 1])
            size += len(text[skip:].encode()) - (starts and text[skip : skip + 1] == " ")
        return size
