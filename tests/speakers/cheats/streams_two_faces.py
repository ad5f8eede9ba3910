"""Is honest in the streams of an audit alone."""

from speaker import os


def score_stream(model, tokens):
    share = 1.0 if os.environ.get("SCORE_STREAMS") == "1" else 0.98
    return -model[tokens[:-1], tokens[1:]] * share
