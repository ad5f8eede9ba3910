"""Documents are learned from by length, the longest first, whatever their order."""

import itertools

from speaker import BOS, np


def score_stream(model, tokens):
    nll, counts = np.empty(len(tokens) - 1), 20 * np.exp(model)
    edges = [0, *(np.flatnonzero(tokens[1:] == BOS) + 1).tolist(), len(tokens)]
    spans = sorted(itertools.pairwise(edges), key=lambda span: span[0] - span[1])
    for a, b in spans:
        a = max(a, 1)
        u, v = tokens[a - 1 : b - 1], tokens[a:b]
        nll[a - 1 : b - 1] = -np.log(counts[u, v] / counts.sum(1)[u])
        np.add.at(counts, (u, v), 1.0)
    return nll
