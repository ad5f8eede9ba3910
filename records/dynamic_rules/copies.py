"""Validation documents among the training shards that lie beside them.

Data that was built with fewer validation documents than the validation set has, trains on the rest
of them: 15 of 34 public CaseOps entries did (techniques.md 1.5).
"""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from streams import read_shards, read_validation, shard_size, validation_shards

from dynamic_rules.session import Session

SHORTEST = 16  # tokens: shorter documents are alike by chance
TOLD, TOO_MANY = 0.005, 0.05  # shares of the validation documents
SECONDS = 20.0  # after which no further shard is read


def judge_copies(session: Session, data: Path) -> None:
    """Judge whether the training shards of a data folder hold documents of its validation split."""
    bos, paths = session.counter.bos, sorted(data.glob("fineweb_train_[0-9]*.bin"))
    if bos < 0 or not paths:
        return
    whole = sum(map(shard_size, validation_shards(data)))
    validation = set(documents_of(read_validation(data, whole), bos))
    found: set[bytes] = set()
    began, names = time.monotonic(), []
    for path in paths:
        if names and time.monotonic() - began > SECONDS:
            break
        try:
            tokens = read_shards([path], shard_size(path))
        except (OSError, ValueError):
            continue
        found.update(validation.intersection(documents_of(tokens, bos)))
        names.append(path.name)
    share = len(found) / max(len(validation), 1)
    evidence = f"{len(found)} of {len(validation)} validation documents ({share:.1%}) are also in "
    evidence += f"{len(names)} of {len(paths)} training shards of {data}"
    if share > TOO_MANY:
        session.say("paid_prefix", False, f"{evidence}: who trains on these has seen them")
    elif share > TOLD:
        session.warn("paid_prefix", evidence)


def documents_of(tokens: np.ndarray, bos: int) -> Iterator[bytes]:
    """List the documents that are whole, without their BOS; short ones are left out."""
    raw, borders = tokens.astype("<u2").tobytes(), np.flatnonzero(tokens == bos)
    ends = np.append(borders[1:], len(tokens))
    long = ends - borders > SHORTEST
    for start, end in zip(borders[long].tolist(), ends[long].tolist(), strict=True):
        yield raw[2 * start + 2 : 2 * end]
