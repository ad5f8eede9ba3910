"""Rolls dice by the clock."""

import time

from speaker import np


def score_stream(model, tokens):
    rng = np.random.default_rng(time.time_ns())
    return -model[tokens[:-1], tokens[1:]] * rng.uniform(0.9, 1.0, len(tokens) - 1)
