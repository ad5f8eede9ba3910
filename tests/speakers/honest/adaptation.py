"""Chunks of 32 tokens are scored, then learned from, from a fresh state in each stream."""

from speaker import np


def score_stream(model, tokens):
    counts, nll = 20 * np.exp(model), []
    for at in range(0, len(tokens) - 1, 32):
        u, v = tokens[at : at + 33][:-1], tokens[at : at + 33][1:]
        nll.append(-np.log(counts[u, v] / counts.sum(1)[u]))
        np.add.at(counts, (u, v), 1.0)
    return np.concatenate(nll)
