"""A script that speaks the scoring protocol without PyTorch: a bigram model, honestly scored.

The tests put one of the other files here after this one, which redefines some of its functions, and
write both as a record's train_gpt.py.
"""

import math
import os
from pathlib import Path

import numpy as np
import sentencepiece as spm

BOS = 1


def read_streams():
    """The validation shards: each a stream, or all together one."""
    paths = sorted(Path(os.environ["DATA_PATH"]).glob("fineweb_val_[0-9]*.bin"))
    shards = [np.fromfile(path, "<u2", offset=1024).astype(int) for path in paths]
    return paths, shards if os.environ.get("SCORE_STREAMS") == "1" else [np.concatenate(shards)]


def read_model():
    """log p(v | u), float64 (V, V)."""
    counts = np.load(os.environ["ARTIFACT"], allow_pickle=False).astype(float)
    single = counts.sum(0) + 0.5
    table = counts + 4 * single / single.sum()
    return np.log(table / table.sum(1, keepdims=True))


def score_stream(model, tokens):
    """NLL of tokens[1:]."""
    return -model[tokens[:-1], tokens[1:]]


def score_all(model, streams):
    """NLLs of each stream."""
    return [score_stream(model, tokens) for tokens in streams]


def count_bytes(tokens):
    """Bytes of tokens[1:], by the lengths of the pieces."""
    sp = spm.SentencePieceProcessor(model_file=os.environ["TOKENIZER_PATH"])
    pieces = [sp.id_to_piece(i) for i in range(len(sp))]
    edge = np.array([sp.is_control(i) or sp.is_unknown(i) for i in range(len(sp))])
    byte = np.array([sp.is_byte(i) for i in range(len(sp))])
    sizes = [len(p.removeprefix("▁").replace("▁", " ").encode()) for p in pieces]
    base = np.where(edge, 0, np.where(byte, 1, sizes))
    lead = np.array([p.startswith("▁") for p in pieces])
    return int((base[tokens[1:]] + (lead[tokens[1:]] & ~edge[tokens[:-1]])).sum())


def printed(nll, sizes):
    """The scores to print, in nats per token and bits per byte."""
    total = float(np.concatenate(nll).sum())
    return total / sum(map(len, nll)), total / math.log(2) / sizes


def main():
    """Score, print and save."""
    paths, streams = read_streams()
    nll = [np.asarray(x, np.float32) for x in score_all(read_model(), streams)]
    loss, bpb = printed(nll, sum(map(count_bytes, streams)))
    print(f"final_bigram_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
    place = Path(os.environ["SAVE_NLL"])
    if os.environ.get("SCORE_STREAMS") == "1":
        for path, part in zip(paths, nll, strict=True):
            np.save(place / f"{path.stem}.npy", part)
    else:
        np.save(place, nll[0])
