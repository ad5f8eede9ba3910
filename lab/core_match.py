"""Decide whether an answer's tokens are the most probable ones, from NLLs of single tokens alone.

A script tells the probability p of the token that a stream has, not of the others. That is enough:
p over 1/2 is the highest, p under 1/V is not. In between, other tokens are put in the token's place
and scored as well, those first that are likely: one that is more probable settles it, and so does
it if all that are left have less than p together. In the worst case all V are scored.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from core_bundle import require
from core_prompts import Example
from numpy import ndarray

MARGIN = 1e-3  # of a probability, which rounding may move
FIRST, GROWTH = 16, 16  # candidates of the first round, and how their number grows
CORPUS = 2**22  # tokens from which the order of candidates is learned
EXCESS = 1.05  # the most that probabilities of different tokens may add up to

Score = Callable[[list[ndarray], str], list[ndarray]]


class Guesser:
    """Order tokens by how often they follow a token, then by how often they come at all."""

    def __init__(self, streams: list[ndarray], size: int) -> None:
        self.size = size
        tokens = np.concatenate([np.zeros(0, np.uint16), *streams])[:CORPUS]
        self.before, self.after = tokens[:-1], tokens[1:]
        self.counts = np.bincount(tokens, minlength=size)
        self.known: dict[int, ndarray] = {}

    def order(self, token: int) -> ndarray:
        """List all tokens, the likely ones behind this token first."""
        if token not in self.known:
            followers = self.after[self.before == token]
            often = np.bincount(followers, minlength=self.size)
            self.known[token] = np.lexsort((-self.counts, -often))
        return self.known[token]


@dataclass
class Place:
    """A token of an answer, and what is known of its rivals."""

    prefix: ndarray  # the tokens before it
    token: int
    nll: float
    size: int  # of the vocabulary
    order: ndarray | None = None  # of its rivals
    tried: int = 0
    seen: float = field(init=False)  # the probability of the token and of the tried rivals
    is_best: bool | None = None  # None: not known yet

    def __post_init__(self) -> None:
        self.seen = math.exp(-self.nll)
        if self.nll < math.log(2) - MARGIN:
            self.is_best = True
        elif self.nll > math.log(self.size) + MARGIN:
            self.is_best = False

    def rivals(self, guesser: Guesser, most: int) -> ndarray:
        """Give the rivals to try next, so that `most` will have been tried."""
        if self.order is None:
            order = guesser.order(int(self.prefix[-1]))
            self.order = order[order != self.token]
        return self.order[self.tried : most]

    def learn(self, rivals: ndarray, nll: ndarray) -> None:
        """Take in the NLL of the rivals. Of equal tokens the one with the lowest id is the best."""
        self.tried += len(rivals)
        self.seen += float(np.exp(-nll.astype(np.float64)).sum())
        beaten = (nll < self.nll) | ((nll == self.nll) & (rivals < self.token))
        left = 1 - self.seen
        if beaten.any():
            self.is_best = False
        elif self.tried == self.size - 1 or left < math.exp(-self.nll) * (1 - MARGIN):
            self.is_best = True


@dataclass
class Answer:
    """The tokens of an answer; right if all are the best."""

    places: list[Place]

    @property
    def open(self) -> list[Place]:
        """List the places that must be looked at, the one that is least likely right first."""
        if any(place.is_best is False for place in self.places):
            return []
        left = [place for place in self.places if place.is_best is None]
        return sorted(left, key=lambda place: -place.nll)

    @property
    def is_right(self) -> bool:
        """Tell whether all tokens are the best."""
        return all(place.is_best for place in self.places)


def read_answer(example: Example, nll: ndarray, size: int, unknown: int) -> Answer:
    """Take an answer and the NLL of its stream. A token for unknown characters is never right."""
    tokens = example.streams[0]
    places = []
    for at in range(example.starts[0], len(tokens)):
        place = Place(tokens[:at], int(tokens[at]), float(nll[at - 1]), size)
        if place.token == unknown:
            place.is_best = False
        places.append(place)
    return Answer(places)


def settle(answers: list[Answer], guesser: Guesser, score: Score) -> None:
    """Score rivals until all answers are known to be right or wrong. Raises CoreError."""
    for tokens, most in rounds(guesser.size):
        asked = list(questions(answers, guesser, tokens, most))
        if not asked:
            continue
        streams = []
        for place, rivals in asked:
            streams += [np.append(place.prefix, np.uint16(rival)) for rival in rivals]
        found = iter(score(streams, "rivals of answers"))
        for place, rivals in asked:
            place.learn(rivals, np.array([next(found)[-1] for _ in rivals]))
            told = f"probabilities of {place.tried + 1} tokens add up to {place.seen:.2f}, not 1"
            require(place.seen < EXCESS, f"{told}: the script's NLLs are of no distribution")


def rounds(size: int) -> Iterator[tuple[int, int]]:
    """Yield how many tokens of an answer to look at, and how many rivals to have tried.

    A round is one start of the script. The first one looks at one token of each answer, for one is
    enough to make it wrong.
    """
    yield 1, FIRST
    most = FIRST
    while True:
        yield size, most
        if most >= size - 1:
            return
        most *= GROWTH


def questions(
    answers: list[Answer], guesser: Guesser, tokens: int, most: int
) -> Iterator[tuple[Place, ndarray]]:
    """Yield the places to look at, at most so many an answer, and the rivals to try at each."""
    for answer in answers:
        for place in answer.open[:tokens]:
            rivals = place.rivals(guesser, most)
            if len(rivals):
                yield place, rivals


def count_open(answers: list[Answer]) -> int:
    """Count the answers that are not known to be right or wrong."""
    return sum(bool(answer.open) for answer in answers)
