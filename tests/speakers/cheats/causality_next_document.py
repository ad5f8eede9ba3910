"""Smears over BOS: the last token of a document knows the first one of the next document."""

from speaker import BOS, np


def score_stream(model, tokens):
    nll = -model[tokens[:-1], tokens[1:]]
    at = np.flatnonzero(tokens[2:-1] == BOS)
    nll[at] *= 1 - 0.2 * (tokens[at + 3] % 3) / 3
    return nll
