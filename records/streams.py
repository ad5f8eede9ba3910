"""What an auditor needs around a scoring script: shards, and a byte count of its own.

Nothing here imports the trainer or knows of any model.
"""

import json
from pathlib import Path

import numpy as np
import sentencepiece as spm

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
# CaseOps text marks capitals by these characters, so that its letters are small (techniques.md
# 2.14). None is in the original text but behind the last one, which says that what follows is.
CASE_MARKS = "\ue001\ue002\ue003\ue004"


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
    paths = sorted(folder.glob("fineweb_val_bytes_[0-9]*.bin"))
    return read_shards(paths, most) if paths else None


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
    """UTF-8 bytes of what tokens decode to, by decoding them: no table of the pieces' lengths.

    `bos` is the id that begins a document; -1 if the tokenizer has none.
    """

    def __init__(self, tokenizer: Path) -> None:
        self.plain, self.size, self.sp = [], 260, None
        if tokenizer.suffix == ".json":  # the published byte-level one: 4 controls, 256 bytes
            config = json.loads(tokenizer.read_bytes())["config"]
            if config["byte_offset"] != 4:
                raise ValueError(f"{tokenizer}: an unknown layout of byte tokens")
            self.bos = int(config.get("bos_id", 1))
            self.edge, self.byte = np.arange(260) < 4, np.arange(260) >= 4
            self.marks = np.zeros(260, bool)
            return
        self.sp = sp = spm.SentencePieceProcessor(model_file=str(tokenizer))
        self.size, self.bos, ids = len(sp), sp.bos_id(), range(len(sp))
        edges = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids]
        self.edge, self.byte = np.array(edges), np.array([sp.is_byte(i) for i in ids])
        marks = [sp.piece_to_id(mark) for mark in CASE_MARKS]
        self.escape = marks[-1]
        is_case_ops = sp.unk_id() not in marks
        self.marks = np.isin(np.arange(self.size), marks) & is_case_ops
        # A word before what is decoded: at the start of a text a space may be stripped.
        self.plain = [i for i in ids if not edges[i] and sp.decode([i]).isalpha()][:1]
        if not self.plain:
            raise ValueError(f"{tokenizer}: no piece is a plain word, so no text can be decoded")

    def count(self, tokens: np.ndarray) -> int:
        """Count bytes of the tokens after the first; ValueError for unknown ids."""
        if len(tokens) and int(tokens.max()) >= self.size:
            raise ValueError(f"token {int(tokens.max())} is not one of the {self.size} pieces")
        return self._total(tokens) - self._total(tokens[:1]) - self._case_marks(tokens)

    def _case_marks(self, tokens: np.ndarray) -> int:
        """Count the bytes of CaseOps' marks after the first token, which no original text has."""
        size, escaped = 0, -1
        for place in np.flatnonzero(self.marks[tokens]).tolist():
            if place == escaped:
                continue
            size += len(CASE_MARKS[0].encode()) * (place > 0)
            escaped = place + 1 if tokens[place] == self.escape else -1
        return size

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
