"""Looks 100 tokens ahead, and not at the next ones."""


def score_stream(model, tokens):
    nll = -model[tokens[:-1], tokens[1:]]
    nll[:-100] *= 0.98 + 0.02 * (tokens[101:] % 2)
    return nll
