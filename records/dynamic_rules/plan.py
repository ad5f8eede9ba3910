"""How much an audit tries, and what it lets pass."""

from dataclasses import dataclass

NEGLIGIBLE = 5e-4  # nats in a mean
# Nats that one NLL may move by rounding: OUTLIER times the usual move, the root of the mean square,
# but within these bounds. Rounding moves all NLLs a little, a look at the future moves some of them
# much. In bf16 a logit of 16 or more is a multiple of 0.125.
OUTLIER, LOUDEST, ROUGHEST = 30, 0.1, 0.25
PRINTED = 1e-4  # that a printed score, or a sum of probabilities, may be off
ULPS = 16
ZEROS = 0.01  # share of NLLs that may be exactly 0
# A test says FAIL beyond ALARM standard errors. What lies RECOGNIZED of them farther is found in
# 99 of 100 audits: the 1% quantile of the normal distribution is at -2.33.
ALARM, RECOGNIZED = 4.5, 2.33
FOUND = ALARM + RECOGNIZED


@dataclass(frozen=True)
class Plan:
    """What the parts of an audit may cost; lengths in tokens.

    The time is `least` seconds, that of `starts` starts, and `more` times that of `plain` tokens,
    but at most `most`: a slow script gets more. Of it, `streams` is the share for the rules streams
    and causality, `sums` that for sums over all ids, `real` that for real text as a whole, beside
    `claim` at the most, if that is enough for all that a log claims; what is left is for text in
    which chance has replaced tokens.
    """

    least: float = 75.0
    starts: float = 10.0
    more: float = 40.0
    most: float = 400.0
    patience: float = 240.0  # for any start; slow ones get more
    little: int = 512  # scored first, to learn what a start costs
    plain: int = 8192  # scored as a whole, twice
    long: int = 2**20  # the longest stream
    dense: int = 128  # length of streams of which every position is replaced from
    streams: float = 0.2
    sums: float = 0.25
    real: float = 0.12
    claim: float = 0.2
    stream_tokens: int = 2**23  # the most in one start
    stream_count: int = 2**15
    fine: float = 0.003  # an excess of probability that is found: then there is enough
