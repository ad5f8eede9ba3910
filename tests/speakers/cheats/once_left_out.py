"""Hard tokens are left out."""


def score_stream(model, tokens):
    nll = -model[tokens[:-1], tokens[1:]]
    return nll[nll < 7]
