"""Text in which chance has replaced tokens: normalization and causality at every position at once.

At each position the auditor draws the token x from a distribution q that it knows. Whatever q is, a
script that gives one normalized distribution p, fixed before x is seen, has

    E[p(x) / q(x)] = sum over all ids v of q(v) * p(v) / q(v) = sum of p(v) = 1.

So the mean of exp(-NLL) / q over one long stream tests the sums at all of its positions together,
for any vocabulary, at the cost of scoring it once. For uniform q this is the mean of V * exp(-NLL).
The variance is sum of p^2 / q - 1: q is near p where it follows real text.

Most of what is left of it, a control variate takes away: the same ratio r where the same tokens
stand in short pieces, each a stream of its own. There, sums over all ids show that E[r] = 1. The
mean of p/q - b * (r - 1) has the same expectation, and a variance that is 20 times smaller where
what is far away hardly matters. An excess that both have in common it hides: the plain mean, and
the sums over all ids, do not.

The coin that decides whether a token of real text is kept says nothing of what comes before it. So
the mean of (changed - its probability) * (NLL of the token before) is 0, unless the script looks
ahead: it then loses where the next token was replaced.
"""

import math
from dataclasses import dataclass

import numpy as np

from dynamic_rules.plan import ALARM, FOUND, NEGLIGIBLE, RECOGNIZED
from dynamic_rules.session import Session

SHARES = (0.15, 0.45, 0.34, 0.06)  # of q: of two tokens, of one, of single ones, of all alike
LEAST_SHARE = 0.02  # after learning
KEPT = (0.0, 0.9, 0.98)  # probabilities that a token of the text is kept, by passage
WEIGHTS = (0.55, 0.15, 0.3)  # how often each
PASSAGE = (64, 1024)  # tokens
PIECE = 128  # tokens of a short stream; its second half is looked at
LOUD = 0.25  # nats; what differs by more counts as this
CLEAN = 8  # tokens since the last change: then the NLL is nearly the one of the real text
LAGS = ((1, 1), (2, 8), (9, 64))  # how far before the coin NLLs are looked at
CHANCE = math.log(2e6)  # a false alarm of the coins has a probability of one in a million
FIRST_START = 0.3  # share of the time that is left
ANYWHERE = "at any place"
FEWEST = 1000  # draws that a mean is taken of
DEPTHS = (1, 256, 2048, 16384)


class Followers:
    """What follows a context in a text: contexts are keys of one or two tokens."""

    def __init__(self, contexts: np.ndarray, following: np.ndarray, vocabulary: int) -> None:
        order = np.argsort(contexts, kind="stable")
        self.following, self.vocabulary = following[order], vocabulary
        self.contexts, self.start, self.count = np.unique(
            contexts[order], return_index=True, return_counts=True
        )
        pairs = contexts * vocabulary + following
        self.pairs, self.pair_count = np.unique(pairs, return_counts=True)
        spans = zip(self.start.tolist(), self.count.tolist(), strict=True)
        self.spans = dict(zip(self.contexts.tolist(), spans, strict=True))

    def probability(
        self, contexts: np.ndarray, tokens: np.ndarray, otherwise: np.ndarray
    ) -> np.ndarray:
        """Give the share of tokens behind contexts; `otherwise` behind those that are not there."""
        known = look_up(self.contexts, self.count, contexts)
        times = look_up(self.pairs, self.pair_count, contexts * self.vocabulary + tokens)
        return np.where(known > 0, times / np.maximum(known, 1), otherwise)

    def draw(self, context: int, at: float) -> int | None:
        """Take the follower at a share of all of a context's; None if there is none."""
        span = self.spans.get(context)
        return int(self.following[span[0] + int(at * span[1])]) if span else None


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Give the values of keys, which are sorted; 0 for those that are not there."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


class Proposal:
    """q of a token given the two before it.

    A mixture of what followed two and one in a text, of its single tokens, and of all ids alike.
    """

    def __init__(self, text: np.ndarray, vocabulary: int) -> None:
        self.text, self.vocabulary = text.astype(np.int64), vocabulary
        self.single = np.bincount(self.text, minlength=vocabulary) / len(self.text)
        self.of_one = Followers(self.text[:-1], self.text[1:], vocabulary)
        two = self.text[:-2] * vocabulary + self.text[1:-1]
        self.of_two = Followers(two, self.text[2:], vocabulary)
        self.shares = np.array(SHARES)

    def parts(self, tokens: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Give the probability of tokens but the first by each part of the mixture.

        `before` is the stream that stands before them: tokens[i] comes after before[i - 1].
        """
        last, token = before[:-1], tokens[1:]
        two = np.append(last[:1], last[:-1] * self.vocabulary + last[1:])
        single = self.single[token]
        after_one = self.of_one.probability(last, token, single)
        after_two = self.of_two.probability(two, token, after_one)
        after_two[:1] = after_one[:1]
        return np.stack([after_two, after_one, single, np.full(len(token), 1 / self.vocabulary)])

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """Give the NLL of each token but the first."""
        ids = tokens.astype(np.int64)
        return -np.log(self.shares @ self.parts(ids, ids))

    def draw(self, text: np.ndarray, kept: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Go through a text and replace each token by one of q with probability 1 - kept."""
        n, tokens = len(text), text.tolist()
        part = rng.choice(len(self.shares), size=n, p=self.shares).tolist()
        at = rng.random(n).tolist()
        single = self.text[rng.integers(0, len(self.text), n)].tolist()
        flat = rng.integers(0, self.vocabulary, n).tolist()
        for j in np.flatnonzero(rng.random(n) >= kept).tolist():
            token = None
            if part[j] == 0 and j > 1:
                token = self.of_two.draw(tokens[j - 2] * self.vocabulary + tokens[j - 1], at[j])
            if part[j] < 2 and token is None:
                token = self.of_one.draw(tokens[j - 1], at[j])
            if token is None:
                token = flat[j] if part[j] == 3 else single[j]
            tokens[j] = token
        return np.array(tokens, np.int64)

    def learn(self, p: np.ndarray, q: np.ndarray, parts: np.ndarray) -> None:
        """Choose shares that lower the variance of p / q, by what draws of q showed.

        The second moment under other shares s is the mean of p^2 / (q * s . parts): it is convex,
        and each step of this fixed-point iteration lowers it.
        """
        weight, shares = p**2 / q, self.shares
        for _ in range(100):
            slope = (weight / (shares @ parts) ** 2 * parts).mean(axis=1)
            shares = shares * np.sqrt(slope)
            shares = shares / shares.sum()
        self.shares = (1 - LEAST_SHARE * len(shares)) * shares + LEAST_SHARE


@dataclass
class Draws:
    """One stream of chance; arrays over its tokens but the first.

    `kept` is the probability that a token was kept, 1 where the text is real.
    """

    tokens: np.ndarray
    kept: np.ndarray
    q: np.ndarray
    parts: np.ndarray  # of q where nothing was kept
    changed: np.ndarray
    odds: np.ndarray  # of being changed


def make_draws(text: np.ndarray, proposal: Proposal, rng: np.random.Generator) -> Draws:
    """Replace tokens of a real text by chance; its beginning, of a random length, stays."""
    kept, n = np.ones(len(text)), len(text)
    at = int(rng.integers(1, max(2, n // 4)))
    while at < n:
        end = at + int(rng.integers(*PASSAGE))
        kept[at:end] = rng.choice(KEPT, p=WEIGHTS)
        at = end
    old = text.astype(np.int64)
    new = proposal.draw(old, kept, rng)
    parts, kept = proposal.parts(new, new), kept[1:]
    q = kept * (new[1:] == old[1:]) + (1 - kept) * (proposal.shares @ parts)
    odds = (1 - kept) * (1 - proposal.shares @ proposal.parts(old, new))
    return Draws(new, kept, q, parts, new[1:] != old[1:], odds)


# ------------------------------------ sums ------------------------------------


@dataclass
class Tally:
    """What the draws of all streams showed so far: arrays over tokens, one a stream."""

    ratio: list[np.ndarray]  # p / q in the long stream
    piece: list[np.ndarray]  # the same in short ones
    kept: list[np.ndarray]
    depth: list[np.ndarray]
    coins: list[np.ndarray]  # of each stream, what coin_sums gives

    def add(self, draws: Draws, nll: np.ndarray, short: np.ndarray, real: np.ndarray) -> None:
        """Take a stream's NLLs, those of its pieces, and those of the text that it was made of."""
        drawn = (draws.kept < 1) & np.isfinite(short)
        self.ratio.append(np.exp(-nll[drawn]) / draws.q[drawn])
        self.piece.append(np.exp(-short[drawn]) / draws.q[drawn])
        self.kept.append(draws.kept[drawn])
        self.depth.append(np.flatnonzero(drawn) + 1)
        self.coins.append(coin_sums(draws, nll, real))


def cut(tokens: np.ndarray) -> list[np.ndarray]:
    """Cut a stream into pieces that overlap by half."""
    return [tokens[at : at + PIECE] for at in range(0, len(tokens) - PIECE + 1, PIECE // 2)]


def join_pieces(nll: list[np.ndarray], length: int) -> np.ndarray:
    """Lay NLLs of pieces side by side as those of a stream; nan where no piece looks."""
    half = PIECE // 2
    joined = np.full(length - 1, np.nan)
    for number, piece in enumerate(nll, 1):
        joined[number * half - 1 : number * half - 1 + half] = piece[half - 1 :]
    return joined


def controlled(ratio: np.ndarray, piece: np.ndarray) -> np.ndarray:
    """Take out of p / q what short pieces have in common with it."""
    spread = float(piece.var())
    slope = float(np.cov(ratio, piece)[0, 1]) / spread if spread > 0 else 0.0
    return ratio - slope * (piece - 1)


def pooled(values: np.ndarray, kept: np.ndarray) -> tuple[float, float]:
    """Average values, each kind of passage by its precision; the mean and its error."""
    weights, means = [], []
    for kind in KEPT:
        of_kind = values[kept == kind]
        if len(of_kind) >= FEWEST:
            weights.append(len(of_kind) / max(float(of_kind.var()), 1e-12))
            means.append(float(of_kind.mean()))
    if not weights:
        return math.nan, math.inf
    return float(np.average(means, weights=weights)), 1 / math.sqrt(sum(weights))


def excesses(tally: Tally) -> dict[str, tuple[float, float]]:
    """Give the mean of p / q and its error: of all, and beside short pieces by kind and depth."""
    ratio, piece, kept, depth = map(
        np.concatenate, (tally.ratio, tally.piece, tally.kept, tally.depth)
    )
    found = {ANYWHERE: pooled(ratio, kept)}
    values = np.zeros_like(ratio)
    for kind in KEPT:
        of_kind = kept == kind
        if of_kind.sum() >= FEWEST:
            values[of_kind] = controlled(ratio[of_kind], piece[of_kind])
    for kind in KEPT:
        of_kind = kept == kind
        found[f"where {1 - kind:.0%} was replaced"] = pooled(values[of_kind], kept[of_kind])
    for least in DEPTHS:
        deep = depth >= least
        found[f"from token {least} on"] = pooled(values[deep], kept[deep])
    return {where: row for where, row in found.items() if math.isfinite(row[1])}


def judge_excess(session: Session, tally: Tally) -> None:
    """Judge whether the probabilities of all ids add up to more than 1 at any depth.

    Less than 1 gains nothing, and the mean of a skewed ratio errs to that side.
    """
    found, count = excesses(tally), sum(map(len, tally.ratio))
    if not found:
        why = f"{count} tokens replaced by chance are too few to tell more"
        session.add_evidence("normalization", why)
        return
    where = max(found, key=lambda name: found[name][0] - ALARM * found[name][1])
    mean, error = found[where]
    deepest = max(int(part[-1]) for part in tally.depth if len(part))
    names = [name for name in found if name.startswith("from")]
    power = " and ".join(
        f"{NEGLIGIBLE + FOUND * found[name][1]:.2%} {name}" for name in (names[0], names[-1])
    )
    evidence = f"{count} tokens drawn by chance, up to token {deepest}: the probabilities add up "
    evidence += f"to {mean:.4f} {where}, standard error {error:.4f}; beside short streams, an "
    evidence += f"excess of {power} would be found (99%)"
    if mean - ALARM * error > 1 + NEGLIGIBLE:
        session.say("normalization", False, evidence)
        return
    session.add_evidence("normalization", evidence)
    session.add_evidence("fixed", "each of the tokens drawn by chance was followed by others")


# ------------------------------------ coins ------------------------------------


def coin_sums(draws: Draws, nll: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Add up what NLLs before a coin have to do with it, for each of LAGS.

    Returns rows of the sum, its variance, the sum that an effect of 1 nat would make, and the
    largest step.
    """
    places = np.arange(len(nll))
    last = np.maximum.accumulate(np.where(draws.changed, places, -CLEAN - 1))
    is_clean = (places - last > CLEAN) & (draws.kept > 0)
    response = np.where(is_clean, np.clip(nll - real, -LOUD, LOUD), 0.0)
    surprise = draws.changed - draws.odds
    spread = draws.odds * (1 - draws.odds)
    rows = []
    for near, far in LAGS:
        before = window_sums(response, near, far)
        unit = float((spread * window_sums(is_clean.astype(float), near, far)).sum())
        variance = float((spread * before**2).sum())
        rows.append((float((surprise * before).sum()), variance, unit, float(np.abs(before).max())))
    return np.array(rows)


def window_sums(values: np.ndarray, near: int, far: int) -> np.ndarray:
    """Give for each place j the sum of values[j - far : j - near + 1]."""
    total = np.concatenate([np.zeros(far + 1), np.cumsum(values)])
    places = np.arange(len(values))
    return total[places + far + 1 - near] - total[places]


def judge_coins(session: Session, tally: Tally) -> None:
    """Judge whether NLLs have to do with coins that were thrown after them.

    By Freedman's inequality for martingales, which holds whatever the NLLs are: a sum of variance v
    and steps of at most m passes t by chance with probability exp(-t^2 / (2 v + 2 m t / 3)).
    """
    rows = np.array(tally.coins)
    total, variance, unit = rows[:, :, :3].sum(axis=0).T
    step = rows[:, :, 3].max(axis=0) * CHANCE / 3
    limit = step + np.sqrt(step**2 + 2 * variance * CHANCE)
    told = unit > 0
    effect = total[told] / unit[told]
    bad = (np.abs(total[told]) > limit[told]) & (np.abs(effect) > NEGLIGIBLE)
    if bad.any():
        worst = int(np.argmax(bad * np.abs(effect)))
        near, far = np.array(LAGS)[told][worst]
        evidence = f"where chance replaced a token, the NLLs {near} to {far} tokens before it "
        session.say("causality", False, f"{evidence}are {effect[worst]:+.4f} nats off in the mean")
    elif told[0]:
        gain = max((limit[0] + RECOGNIZED * math.sqrt(variance[0])) / unit[0], NEGLIGIBLE)
        evidence = f"a look at the next token that gains {gain:.2g} nats in the mean would be "
        session.add_evidence("causality", f"{evidence}found (99%) at any place")


# ------------------------------------ starts ------------------------------------


def chance_runs(session: Session, proposal: Proposal) -> None:
    """Score streams of chance until they tell enough or the time is over, and judge them.

    A first start teaches what to draw in the later ones.
    """
    assert session.anchor
    tally, length, share = Tally([], [], [], [], []), len(session.anchor[0]), FIRST_START
    while True:
        count = streams_of_a_start(session, length, share * session.left)
        if count < 1 and tally.ratio:
            break
        if not chance_run(session, proposal, tally, max(count, 1)):
            return
        errors = [error for name, (_, error) in excesses(tally).items() if name != ANYWHERE]
        if errors and FOUND * max(errors) <= session.plan.fine:
            break
        share = 1.0
    judge_coins(session, tally)
    judge_excess(session, tally)


def chance_run(session: Session, proposal: Proposal, tally: Tally, count: int) -> bool:
    """Score some streams of chance and note what they show; whether they could be scored.

    They are made of the text that is scored among them.
    """
    assert session.anchor
    text = session.anchor[0]
    draws = [make_draws(text, proposal, session.writer.rng) for _ in range(count)]
    pieces = [piece for one in draws for piece in cut(one.tokens)]
    scored = session.run_mixed([*(one.tokens for one in draws), *pieces])
    if scored is None:
        return False
    real, share = session.anchored, len(pieces) // count
    for number, one in enumerate(draws):
        first = count + number * share
        short = join_pieces([scored[i] for i in range(first, first + share)], len(text))
        tally.add(one, scored[number], short, real)
        shared = int(np.argmax(one.changed)) + 1
        session.compare(real, scored[number], shared, "by chance", True)
    learn(proposal, draws, [scored[number] for number in range(count)])
    return True


def learn(proposal: Proposal, draws: list[Draws], nll: list[np.ndarray]) -> None:
    """Let the proposal learn from the tokens of which none was kept."""
    drawn = [one.kept == 0 for one in draws]
    p = [np.exp(-values[where]) for values, where in zip(nll, drawn, strict=True)]
    q = [one.q[where] for one, where in zip(draws, drawn, strict=True)]
    parts = [one.parts[:, where] for one, where in zip(draws, drawn, strict=True)]
    if sum(map(len, p)) >= FEWEST:
        proposal.learn(np.concatenate(p), np.concatenate(q), np.concatenate(parts, axis=1))


def streams_of_a_start(session: Session, length: int, seconds: float) -> int:
    """Choose how many streams of chance a start can score in a time, with the text and pieces."""
    pieces = 2 * length // PIECE
    fixed = session.expected(length)
    of_one = session.expected(4 * length, pieces) - fixed
    by_time = (seconds - fixed) / of_one
    plan = session.plan
    return int(min(by_time, plan.stream_tokens / (3 * length), plan.stream_count / pieces))
