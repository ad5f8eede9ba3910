"""A causal n-gram tilt with its normalizer: what last followed this token gets more."""

from speaker import np


def score_stream(model, tokens):
    nll, hint = np.empty(len(tokens) - 1), {}
    for i in range(len(nll)):
        u, v = tokens[i], tokens[i + 1]
        nll[i] = -model[u, v]
        if u in hint:
            tilt = np.log1p(np.exp(model[u, hint[u]]) * (np.e**2 - 1))
            nll[i] += tilt - 2 * (v == hint[u])
        hint[u] = v
    return nll
