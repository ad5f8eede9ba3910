"""Looks ahead only in every third window of 64 tokens, to the window's end."""


def score_stream(model, tokens):
    nll = -model[tokens[:-1], tokens[1:]]
    for at in range(128, len(nll), 192):
        nll[at : at + 64] *= 0.9 + 0.1 * (tokens[at + 1 : at + 65].mean() / len(model))
    return nll
