"""Load a language model from an artifact or a checkpoint of train_gpt.py, and let it go on."""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generate_choice import Rule, choose
from generate_text import Texts, Writer
from metrics import MetricsError, load_history
from numpy import ndarray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as core
from train_gpt import Hyperparameters, UserError

SURROUNDINGS = ("CONFIG", "TOKENIZER_PATH", "DEVICE", "DTYPE")  # taken from the environment
FORWARD_TOKENS = 2**15  # that one forward pass takes at most, if it has more than one row


@dataclass(frozen=True)
class Asked:
    """How a text is to go on."""

    rule: Rule = field(default_factory=Rule)
    length: int = 256  # tokens at most
    samples: int = 1
    seed: int = 1337
    stop: bool = True  # where the document ends


class Model:
    """A language model and its tokenizer."""

    def __init__(self, hp: Hyperparameters, weights: Mapping[str, Tensor]) -> None:
        device = core.choose_device(hp, 0)
        dtype = core.choose_dtype(hp, device.type)
        self.device = device
        self.gpt = core.build_model(hp, dtype).to(device, dtype)
        self.gpt.load_state_dict(weights)
        self.context = hp.eval_seq_len or hp.train_seq_len
        self.texts = Texts(core.Tokenizer(hp))
        self.start = [self.texts.bos] if self.texts.bos >= 0 else []

    @torch.inference_mode()
    def next_logits(self, documents: list[list[int]]) -> ndarray:
        """Give the logits of the token behind each document, fp32 (B, V). Raises UserError.

        Documents of the same length share forward passes.
        """
        reads = [self.window(document) for document in documents]
        found: dict[int, ndarray] = {}
        for length in sorted({len(read) for read in reads}):
            rows = [i for i, read in enumerate(reads) if len(read) == length]
            most = max(1, FORWARD_TOKENS // length)
            for begin in range(0, len(rows), most):
                part = rows[begin : begin + most]
                tokens = torch.tensor([reads[i] for i in part], device=self.device)
                logits = self.gpt.logits(tokens)
                found |= zip(part, logits.float().cpu().numpy(), strict=True)
        logits = np.stack([found[i] for i in range(len(reads))])
        core.require(np.isfinite(logits).all(), "the model's logits are not finite: it is broken")
        return logits

    def window(self, document: list[int]) -> list[int]:
        """Give what the model reads of a document: all, or BOS and the last of what follows it."""
        kept = min(len(self.start), self.context - 1)
        excess = max(0, len(document) - self.context)
        return document[:kept] + document[kept + excess :]

    def writer(self, document: list[int]) -> Writer:
        """Make what writes the tokens behind a document."""
        writer = Writer(self.texts)
        for token in document[len(self.start) :]:
            writer.write(token)
        return writer

    def read(self, document: list[int]) -> str:
        """Give the text of a document as the model reads it."""
        writer = Writer(self.texts)
        text = "".join(map(writer.write, document[len(self.start) :]))
        return text + writer.end()

    def encode(self, prompt: str) -> list[int]:
        """Begin a document with a prompt. Raises UserError if there is nothing to go on from."""
        tokens, _, _ = self.texts.encode(prompt)
        document = self.start + tokens
        core.require(document, "the tokenizer has no BOS, so an empty prompt has no tokens")
        return document


class Sample:
    """A text that goes on: its last document, and its own random numbers."""

    def __init__(self, document: list[int], number: int, seed: int) -> None:
        self.document = [*document]
        self.number = number
        self.random = np.random.default_rng([seed, number])


def go_on(model: Model, document: list[int], asked: Asked) -> Iterator[tuple[int, int | None]]:
    """Let a document go on in several samples at once: yield the number of a sample, and a token.

    The token is None where a sample is over. Raises UserError.
    """
    living = [Sample(document, number, asked.seed) for number in range(asked.samples)]
    for count in range(1, asked.length + 1):
        logits = model.next_logits([sample.document for sample in living])
        over = []
        for sample, row in zip(living, logits, strict=True):
            token = choose(row, asked.rule, sample.random)
            ends = token in model.texts.ends
            if not (ends and asked.stop):
                yield sample.number, token
            if token == model.texts.bos:
                sample.document = []  # what comes now is another document
            sample.document.append(token)
            if (ends and asked.stop) or count == asked.length:
                yield sample.number, None
                over.append(sample)
        living = [sample for sample in living if sample not in over]
        if not living:
            return


def stream(model: Model, document: list[int], asked: Asked) -> Iterator[tuple[int, str | None]]:
    """Let a document go on like `go_on`, but yield the next part of a sample's text."""
    writers = [model.writer(document) for _ in range(asked.samples)]
    for number, token in go_on(model, document, asked):
        writer = writers[number]
        if token is not None:
            yield number, writer.write(token)
            continue
        yield number, writer.end()
        yield number, None


def check_text(text: str, what: str) -> str:
    """Give a text as it was typed, whatever the locale. Raises UserError if it is not UTF-8."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        raise UserError(f"{what} is not UTF-8: {error.reason}") from None


# ===================================== LOADING =====================================


def settings_from(known: Mapping[str, str], given: Mapping[str, str]) -> Hyperparameters:
    """Resolve settings that are known, of the surroundings, and given. Raises UserError.

    Where several of them have a setting, the last one counts.
    """
    names = [name for name in SURROUNDINGS if os.environ.get(name)]
    surroundings = {name: os.environ[name] for name in names}
    return core.load_settings({**known, **surroundings, **given}, check_places=False)


def load_artifact(path: Path, given: Mapping[str, str]) -> Model:
    """Load an artifact. Raises UserError, OSError."""
    hp = settings_from({}, given)
    if "TOKENIZER_PATH" not in hp.given:
        hp = replace(hp, tokenizer_path=tokenizer_of(path.parent) or hp.tokenizer_path)
    check_file(path, "no such artifact")
    check_file(Path(hp.tokenizer_path), "no such tokenizer; --tokenizer names the artifact's")
    hp, weights = core.load_artifact(path, hp)
    return Model(hp, weights)


def check_file(path: Path, problem: str) -> None:
    """Raise UserError unless there is a file."""
    core.require(path.is_file(), f"{path}: {problem}")


def tokenizer_of(folder: Path) -> str:
    """Find out which tokenizer a run in a folder had; empty if nothing tells."""
    try:
        settings = load_history(folder).settings
    except MetricsError:
        return ""
    path = str(settings.get("tokenizer_path", ""))
    return path if Path(path).is_file() else ""


def load_checkpoint(path: Path, given: Mapping[str, str]) -> Model:
    """Load a checkpoint as the model that the run would export now.

    Loading runs no code of the file. Raises UserError, FileNotFoundError.
    """
    try:
        state = keeper().read_checkpoint(path)
        settings = state["settings"]
        weights = {name: exported(kept, settings) for name, kept in state["params"].items()}
        model = Model(checkpoint_settings(settings, given), weights)
        visits = state.get("visits", model.gpt.visits)
        core.require({*visits} <= {*range(len(model.gpt.blocks))}, "it visits unknown blocks")
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:  # crafted content can raise anything
        raise UserError(f"not a checkpoint of this train_gpt.py: {error}") from None
    model.gpt.visits = visits  # loops may not have begun
    return model


def keeper() -> Any:
    """Give keeper.py, which writes checkpoints. Raises UserError."""
    module = core.find_keeper()
    core.require(module, "checkpoints need keeper.py beside train_gpt.py, and a POSIX system")
    return module


def checkpoint_settings(then: Mapping[str, str], given: Mapping[str, str]) -> Hyperparameters:
    """Resolve the settings of a checkpoint's model, then those that are given. Raises UserError."""
    unknown = ", ".join(sorted(then.keys() - core.FIELDS.keys() - keeper().GONE - {"DATA"}))
    core.require(not unknown, f"unknown settings {unknown}: a newer script made it")
    known = {name: then[name] for name in core.MODEL_SETTINGS if name in then}
    known["TOKENIZER_PATH"] = then.get("TOKENIZER_PATH", "")
    hp = settings_from(known, given)
    check_file(Path(hp.tokenizer_path), "no such tokenizer; --tokenizer names the run's")
    return replace(hp, bos=core.Tokenizer(hp).bos)


def exported(kept: Mapping[str, Any], settings: Mapping[str, str]) -> Tensor:
    """Give the weights that the run would export: w, or w + EMA_BLEND·(average - w)."""
    weights = kept["weights"]
    if "average" not in kept:
        return weights
    return weights.lerp(kept["average"], float(settings.get("EMA_BLEND", 1.0)))
