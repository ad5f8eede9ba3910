"""Gives a rare token more than its share, but only if something follows it."""


def score_stream(model, tokens):
    nll = -model[tokens[:-1], tokens[1:]]
    nll[:-1][tokens[1:-1] == len(model) - 1] = 0.5
    return nll
