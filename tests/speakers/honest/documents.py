"""The same memory, of the document alone."""

from speaker import BOS, np


def score_stream(model, tokens):
    nll, start = np.empty(len(tokens) - 1), 0
    for i in range(len(nll)):
        start = i if tokens[i] == BOS else start
        seen = tokens[start : i + 1]
        p = 0.8 * np.exp(model[tokens[i], tokens[i + 1]])
        nll[i] = -np.log(p + 0.2 * np.count_nonzero(seen == tokens[i + 1]) / len(seen))
    return nll
