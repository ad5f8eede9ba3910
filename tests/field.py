"""A tiny tokenizer, validation data, and scripts that speak the scoring protocol on them."""

import contextlib
import io
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from conftest import REPO, compose_documents, shard_bytes, train_tokenizer

sys.path.insert(0, str(REPO / "records"))

import script
import streams
from isolation import box

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

    def __init__(self, root: Path, count: int = 60, **special: int) -> None:
        documents = compose_documents(count)
        self.tokenizer = train_tokenizer(root / "tiny.model", documents, VOCABULARY, **special)
        self.sp = streams.spm.SentencePieceProcessor(model_file=str(self.tokenizer))
        start = [self.sp.bos_id()] if self.sp.bos_id() >= 0 else []
        encoded = [np.array([*start, *ids], np.uint16) for ids in self.sp.encode(documents)]
        self.texts, self.documents = documents[: count // 3], encoded[: count // 3]
        self.val = np.concatenate(self.documents)
        self.data = root / "data"
        self.data.mkdir()
        middle = sum(map(len, encoded[:9]))
        for number, part in enumerate((self.val[:middle], self.val[middle:])):
            (self.data / f"fineweb_val_{number:06d}.bin").write_bytes(shard_bytes(part))
        self.train = np.concatenate(encoded[count // 3 :])
        counts = np.zeros((VOCABULARY, VOCABULARY), "<u2")
        np.add.at(counts, (self.train[:-1], self.train[1:]), 1)
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


class InProcess:
    """In place of script.Script: scores by a function, as if 10,000 tokens took a second."""

    apart = "in this process"

    def __init__(self, field: Field, score: Callable[[np.ndarray], np.ndarray]) -> None:
        self.counter, self.function = streams.ByteCounter(field.tokenizer), score

    def score(self, parts, apart, seconds, sizes=None) -> script.Result:
        """Score streams, apart or as one."""
        parts = [np.asarray(part).astype(int) for part in parts]
        nll = [np.float32(self.function(p)) for p in (parts if apart else [np.concatenate(parts)])]
        whole = np.concatenate(nll).astype(float)
        size = 1 if apart else self.counter.count(np.concatenate(parts))
        if sizes is not None:
            size = int(np.concatenate(sizes)[1:].sum())
        took = 0.1 + sum(map(len, parts)) / 1e4
        return script.Result(took, "", whole.mean(), whole.sum() / np.log(2) / size, nll)


class Spoken:
    """In place of script.Script: a speaker's main() in this process, which saves the start."""

    apart = "in this process"

    def __init__(self, folder: Path, artifact: Path, tokenizer: Path, *_: object) -> None:
        self.code = compile((folder / "train_gpt.py").read_text(), "speaker", "exec")
        self.given = {"ARTIFACT": str(artifact), "TOKENIZER_PATH": str(tokenizer)}

    def score(self, parts, apart, seconds, sizes=None) -> script.Result:
        """Write the shards, call main() in a fresh folder, and read what it left."""
        console, module = io.StringIO(), types.ModuleType("spoken")
        with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
            for number, part in enumerate(parts):
                Path(f"{script.stem(number)}.bin").write_bytes(shard_bytes(part))
            os.mkdir("nll")
            env = {**self.given, "DATA_PATH": ".", "SCORE_STREAMS": str(int(apart))}
            env["SAVE_NLL"] = "nll" if apart else "nll/nll.npy"
            sys.modules["spoken"] = module
            with mock.patch.dict(os.environ, env), contextlib.redirect_stdout(console):
                try:
                    exec(self.code, module.__dict__)
                    module.main()
                except Exception as error:
                    return script.Result(0.1, f"exit status 1; the last line: {error}")
            names = [script.stem(number) for number in range(len(parts))] if apart else ["nll"]
            files = {name: Path(f"nll/{name}.npy").read_bytes() for name in names}
        took = 0.1 + sum(map(len, parts)) / 1e4
        ended = box.Ended(took, False, 0, console.getvalue().encode(), files)
        return script.read_result(ended, seconds)
