"""A tiny tokenizer, validation data, and scripts that speak the scoring protocol on them."""

import sys
from pathlib import Path

import numpy as np
from conftest import REPO, compose_documents, shard_bytes, train_tokenizer

sys.path.insert(0, str(REPO / "records"))

import script
import streams

SPEAKERS = REPO / "tests" / "speakers"
VOCABULARY = 340
# In the one file that a record may have, what the speakers import is above them.
AS_MODULE = '\n\nimport sys\n\nsys.modules["speaker"] = sys.modules[__name__]\n\n'


def can_isolate() -> bool:
    """Whether this system lets a script run apart."""
    try:
        script.check_isolation()
    except script.IsolationError:
        return False
    return True


class Field:
    """A tokenizer, validation data, and an artifact that fits them: bigram counts."""

    def __init__(self, root: Path, **special: int) -> None:
        documents = compose_documents(60)
        self.tokenizer = train_tokenizer(root / "tiny.model", documents, VOCABULARY, **special)
        self.sp = streams.spm.SentencePieceProcessor(model_file=str(self.tokenizer))
        start = [self.sp.bos_id()] if self.sp.bos_id() >= 0 else []
        encoded = [np.array([*start, *ids], np.uint16) for ids in self.sp.encode(documents)]
        self.texts, self.documents = documents[:20], encoded[:20]
        self.val = np.concatenate(self.documents)
        self.data = root / "data"
        self.data.mkdir()
        middle = sum(map(len, encoded[:9]))
        for number, part in enumerate((self.val[:middle], self.val[middle:])):
            (self.data / f"fineweb_val_{number:06d}.bin").write_bytes(shard_bytes(part))
        counts, train = np.zeros((VOCABULARY, VOCABULARY), "<u2"), np.concatenate(encoded[20:])
        np.add.at(counts, (train[:-1], train[1:]), 1)
        self.artifact = root / "counts.npy"
        np.save(self.artifact, counts)


def write_record(folder: Path, speaker: str, **places: Path) -> Path:
    """A record's folder with a speaker as its script, in which the places are filled in."""
    text = (SPEAKERS / "speaker.py").read_text() + AS_MODULE
    text += (SPEAKERS / f"{speaker}.py").read_text()
    for name, path in places.items():
        text = text.replace(name, str(path))
    folder.mkdir(parents=True)
    main = '\n\nif __name__ == "__main__":\n    main()\n'
    (folder / "train_gpt.py").write_text(text + main)
    return folder
