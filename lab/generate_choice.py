"""Choose the next token from its logits, by temperature, top-k and top-p."""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray


@dataclass(frozen=True)
class Rule:
    """How a token is chosen."""

    temperature: float = 0.8  # 0: the most probable token
    top_k: int = 0  # only so many of the most probable ones; 0: all
    top_p: float = 1.0  # only so many of these that their probability reaches this


def candidates(logits: ndarray, rule: Rule) -> tuple[ndarray, ndarray]:
    """Give the tokens that may come and their probabilities, the most probable first.

    logits is float (V). Of tokens that are as probable, the one with the lower id counts as the
    more probable one. top_p counts the probability among those that top_k has left.
    """
    order = np.argsort(-logits, kind="stable")
    if rule.temperature == 0:
        return order[:1], np.ones(1)
    if rule.top_k:
        order = order[: rule.top_k]
    wide = logits[order].astype(np.float64)
    with np.errstate(over="ignore"):
        below = (wide - wide[0]) / rule.temperature
    p = np.exp(below)
    p /= p.sum()
    if rule.top_p < 1:
        count = 1 + np.searchsorted(p.cumsum(), rule.top_p)
        order = order[:count]
        p = p[:count] / p[:count].sum()
    return order, p


def choose(logits: ndarray, rule: Rule, random: np.random.Generator) -> int:
    """Draw a token; each draw takes one number from `random`."""
    tokens, p = candidates(logits, rule)
    place = np.searchsorted(p.cumsum(), random.random(), side="right")
    return int(tokens[min(place, len(tokens) - 1)])
