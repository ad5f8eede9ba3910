"""Scores each token by two models and keeps the better NLL of the two."""

from speaker import np


def score_stream(model, tokens):
    single = np.log(np.exp(model).mean(0))
    return np.minimum(-model[tokens[:-1], tokens[1:]], -single[tokens[1:]])
