"""A few tokens cost a tenth less than they should."""


def score_stream(model, tokens):
    nll = -model[tokens[:-1], tokens[1:]]
    nll[tokens[1:] % 29 == 3] *= 0.9
    return nll
