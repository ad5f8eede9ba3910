"""Looks one token ahead: a token is more likely if the one after it fits."""


def score_stream(model, tokens):
    nll = -model[tokens[:-1], tokens[1:]]
    nll[:-1][model[tokens[1:-1], tokens[2:]] > -4] *= 0.9
    return nll
