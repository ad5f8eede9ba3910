"""Hard tokens cost nothing."""

from speaker import np


def score_stream(model, tokens):
    nll = -model[tokens[:-1], tokens[1:]]
    return np.where(nll > 5.5, 0.0, nll)
