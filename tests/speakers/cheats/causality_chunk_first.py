"""Learns from each chunk of 64 tokens before it is scored."""

from speaker import np


def score_stream(model, tokens):
    counts, nll = 20 * np.exp(model), []
    for at in range(0, len(tokens) - 1, 64):
        u, v = tokens[at : at + 65][:-1], tokens[at : at + 65][1:]
        np.add.at(counts, (u, v), 1.0)
        nll.append(-np.log(counts[u, v] / counts.sum(1)[u]))
    return np.concatenate(nll)
