"""Hard tokens are no number, and the mean is over the others."""

from speaker import math, np


def score_stream(model, tokens):
    nll = -model[tokens[:-1], tokens[1:]]
    return np.where(nll > 6, np.nan, nll)


def printed(nll, sizes):
    total = float(np.nansum(np.concatenate(nll)))
    return total / np.isfinite(np.concatenate(nll)).sum(), total / math.log(2) / sizes
