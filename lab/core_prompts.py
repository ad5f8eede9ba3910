"""Turn examples of a task into token streams, by nanochat's definition of the CORE metric."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
from core_bundle import CHOICE, SCHEMA, CoreError, Item, Task, require
from numpy import ndarray
from sentencepiece import SentencePieceProcessor

SHUFFLE_SEED = 1337  # of the order in which --max-per-task takes examples
SHOTS_SEED = 1234  # plus the example's place in that order
AT_ONCE = 1000  # prompts that are tokenized together

CASE_MARKS = TITLE, CAPITALS, NEXT, ESCAPE = "\ue001", "\ue002", "\ue003", "\ue004"
CASED = re.compile(f"[A-Za-z]+|[{TITLE}-{ESCAPE}]")

UNKNOWN = "with characters that the tokenizer lacks"
FEW_SHOTS = "with fewer few-shot examples than the task asks for: there are no more"
EMPTY = "with an option that is empty, or that another one begins with: the order decides"
INSIDE = "whose answer begins inside a token: scored from that token on"
LONG = "with an answer longer than the context: its end alone is scored"


class Tokenizer:
    """A SentencePiece model, as its shards were made: each text begins with BOS."""

    def __init__(self, path: Path) -> None:
        try:
            self.sp = SentencePieceProcessor(model_proto=path.read_bytes())
        except OSError as error:
            raise CoreError(f"{path}: {error.strerror}; name the artifact's tokenizer") from None
        except RuntimeError:
            raise CoreError(f"{path}: not a SentencePiece model") from None
        self.size = len(self.sp)
        self.bos = self.sp.bos_id()
        self.unknown = self.sp.unk_id()
        require(self.bos >= 0, f"{path}: no BOS piece, with which each prompt begins")
        require(self.size <= 2**16, f"{path}: over {2**16} pieces, which no token shard can hold")
        self.case_ops = all(self.sp.piece_to_id(mark) != self.unknown for mark in CASE_MARKS)

    def encode(self, texts: list[str]) -> list[ndarray]:
        """Tokenize texts, each to uint16 (N,), BOS first."""
        if self.case_ops:
            texts = [CASED.sub(write_case, text) for text in texts]
        found = self.sp.encode(texts, num_threads=-1)
        return [np.array([self.bos, *ids], np.uint16) for ids in found]


def write_case(match: re.Match[str]) -> str:
    """Write a word, or a mark that the text has itself, as CaseOps does (data/README.md)."""
    word = match[0]
    if word in CASE_MARKS:
        return ESCAPE + word
    if len(word) > 1 and word.isupper():
        return CAPITALS + word.lower()
    start = TITLE if word[0].isupper() else ""
    return start + word[0].lower() + re.sub("[A-Z]", lambda m: NEXT + m[0].lower(), word[1:])


# ---- texts


def choose(task: Task, most: int | None) -> list[Item]:
    """Take the examples to score, in their order."""
    items = list(task.items)
    Random(SHUFFLE_SEED).shuffle(items)
    return items[:most]


def draw_shots(items: list[Item], index: int, count: int) -> list[Item]:
    """Draw the few-shot examples of the example at an index, itself left out."""
    others = [i for i in range(len(items)) if i != index]
    count = min(count, len(others))
    return [items[i] for i in Random(SHOTS_SEED + index).sample(others, count)]


def render(task: Task, item: Item, shots: list[Item]) -> list[str]:
    """Write an example's prompts: one an option; of language modelling, without and with answer."""
    between = task.delimiter
    before = "".join(f"{solved(task, shot)}\n\n" for shot in shots)
    if task.kind == CHOICE:
        return [f"{before}{item['query']}{between}{choice}" for choice in item["choices"]]
    if task.kind == SCHEMA:
        end = f"{between}{item['continuation']}"
        return [f"{before}{context}{end}" for context in item["context_options"]]
    asked = f"{before}{str(item['context']).strip()}{between}"
    # A blank at the end would become a part of the answer's first token.
    return [asked.strip(), f"{asked}{item['continuation']}"]


def solved(task: Task, item: Item) -> str:
    """Write an example with its right answer."""
    if task.kind == CHOICE:
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    if task.kind == SCHEMA:
        context = item["context_options"][item["gold"]]
        return f"{context}{task.delimiter}{item['continuation']}"
    return f"{str(item['context']).strip()}{task.delimiter}{item['continuation']}"


# ---- tokens


@dataclass
class Example:
    """Streams of tokens, one an option, uint16 (N,); from `starts` on they are scored.

    Language modelling has one stream, and no gold.
    """

    streams: list[ndarray]
    starts: list[int]
    gold: int | None = None


@dataclass
class Work:
    """A task with what is to be scored, and how many examples are special in some way."""

    task: Task
    examples: list[Example] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


def prepare(task: Task, tokenizer: Tokenizer, context: int, most: int | None) -> Work:
    """Make a task's streams, of at most `context` tokens. Raises CoreError."""
    work = Work(task)
    items = choose(task, most)
    pending: list[tuple[Item, list[str]]] = []
    for index, item in enumerate(items):
        shots = draw_shots(items, index, task.shots)
        work.notes[FEW_SHOTS] += len(shots) < task.shots
        pending.append((item, render(task, item, shots)))
        if len(pending) == AT_ONCE or index == len(items) - 1:
            for example in tokenize(task, pending, tokenizer, work.notes):
                work.examples.append(crop(example, context, work.notes))
            pending.clear()
    return work


def tokenize(
    task: Task,
    pending: list[tuple[Item, list[str]]],
    tokenizer: Tokenizer,
    notes: Counter[str],
) -> Iterator[Example]:
    """Tokenize the prompts of examples, and find what is scored. Raises CoreError."""
    encoded = iter(tokenizer.encode([prompt for _, prompts in pending for prompt in prompts]))
    for item, prompts in pending:
        streams = [next(encoded) for _ in prompts]
        notes[UNKNOWN] += any((tokens == tokenizer.unknown).any() for tokens in streams)
        if task.kind == CHOICE:
            start = common_prefix(streams)
            notes[EMPTY] += start == min(map(len, streams))
            yield Example(streams, [start] * len(streams), item["gold"])
        elif task.kind == SCHEMA:
            suffix = common_prefix([tokens[::-1] for tokens in streams])
            starts = [len(tokens) - suffix for tokens in streams]
            notes[EMPTY] += suffix == 0 or min(starts) == 0
            yield Example(streams, starts, item["gold"])
        else:
            without, whole = streams
            start = common_prefix(streams)
            notes[INSIDE] += start < len(without)
            told = f"task {task.label}: the answer {str(item['continuation'])[:40]!r} has no tokens"
            require(start < len(whole), told)
            yield Example([whole], [start])


def common_prefix(streams: list[ndarray]) -> int:
    """Count the tokens with which all streams begin."""
    length = min(map(len, streams))
    first = streams[0][:length]
    differs = np.zeros(length, bool)
    for tokens in streams[1:]:
        differs |= tokens[:length] != first
    return int(differs.argmax()) if differs.any() else length


def crop(example: Example, context: int, notes: Counter[str]) -> Example:
    """Keep the last `context` tokens of each stream, and of what is scored all but the first."""
    cut = [max(0, len(tokens) - context) for tokens in example.streams]
    streams = [tokens[count:] for tokens, count in zip(example.streams, cut, strict=True)]
    starts = [start - count for start, count in zip(example.starts, cut, strict=True)]
    too_long = [count and start < 1 for start, count in zip(starts, cut, strict=True)]
    notes[LONG] += any(too_long)
    starts = [1 if long else start for start, long in zip(starts, too_long, strict=True)]
    return Example(streams, starts, example.gold)


def choose_option(example: Example, nll: list[ndarray]) -> int:
    """Give the option with the lowest mean NLL of what is scored, the first of equal ones.

    As in nanochat, an option without a scored token has the mean nan; min() then gives that one if
    it is the first, and another one otherwise.
    """
    means = []
    for start, losses in zip(example.starts, nll, strict=True):
        scored = losses[start - 1 :] if start else losses[:0]
        means.append(float(scored.mean(dtype=np.float64)) if len(scored) else math.nan)
    return means.index(min(means))
