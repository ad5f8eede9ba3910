"""Streams that share a beginning: what follows must not move an NLL before it."""

import math
from collections.abc import Iterator

import numpy as np

from dynamic_rules.plan import ALARM, NEGLIGIBLE, Plan
from dynamic_rules.session import Session
from dynamic_rules.writer import Suite, Writer

SHORTEST = 24  # tokens of a stream
LENGTHS = (2048, 512, 8192, 2048, 32768, 2048, 131072)  # of the longer streams, in turn
VARIANTS = 24  # of each of them
USUAL = 0.003  # seconds that a stream costs, until it is known
MOST_SHORT = 200_000  # tokens in streams of which every position is replaced from
FEW = 100  # streams, to learn what one costs


def sample_places(base: np.ndarray, count: int, writer: Writer) -> list[int]:
    """Choose positions to replace from.

    Half of them are at and after borders of documents and at powers of two, their multiples and
    neighbours, where windows and chunks may end; the others anywhere.
    """
    n, marked, rng = len(base), [], writer.rng
    powers = [2**k for k in range(4, 17) if 2**k < n]
    multiples = [m for p in powers[3:] for m in range(2 * p, n, p)]
    borders = np.flatnonzero(base == writer.bos).tolist()
    for places in (powers, multiples, borders):
        near = {p + d for p in places for d in (-1, 0, 1)}
        near = sorted(p for p in near if 2 <= p < n)
        some = rng.permutation(np.array(near, int)).tolist()
        marked += some[: max(1, count // 6)]
    free = rng.integers(2, n, max(1, count - len(marked))).tolist()
    return [*marked, *free][:count]


def add_short(suite: Suite, writer: Writer, plan: Plan, budget: int) -> None:
    """Add streams of about `budget` tokens, of which every position is replaced from.

    One of each kind is of some length. The others are as short as they can be: a position of a
    stream costs as many tokens as the stream has.
    """
    makers = [writer.bordered, writer.ids, writer.document]
    dense = min(plan.dense, max(SHORTEST, math.isqrt(budget // (2 * len(makers)))))
    lengths = [dense] * len(makers)
    lengths += [SHORTEST] * max(0, (budget - len(makers) * dense**2) // SHORTEST**2)
    for number, length in enumerate(lengths):
        add_dense(suite, writer, makers[number % len(makers)](length), number)


def add_long(suite: Suite, writer: Writer, budget: int) -> None:
    """Add longer streams of about `budget` tokens, of which some positions are replaced from."""
    makers = [writer.document, writer.bordered]
    for number, length in enumerate(affordable_lengths(budget, len(writer.tokens))):
        add_longer(suite, writer, makers[number % 2](length))


def affordable_lengths(budget: int, most: int) -> Iterator[int]:
    """Choose lengths of longer streams, as many as the budget allows; two at least."""
    count, left = 0, budget
    while count < 2 or left > 0:
        length = LENGTHS[count % len(LENGTHS)]
        if length > most or length * (VARIANTS + 1) > left:
            length = max(256, min(left // (2 * VARIANTS), 2048, most))
        yield length
        left -= length * (VARIANTS + 1)
        count += 1


def add_dense(suite: Suite, writer: Writer, base: np.ndarray, number: int) -> None:
    """Add a stream and its variants from each position on."""
    index = suite.add(base)
    for t in range(2, len(base) + 1):
        kind = writer.kinds[(t + number) % len(writer.kinds)]
        new = writer.future(kind, base, t, len(base) - t)
        tail = writer.ids(8) if t == len(base) else new
        suite.add_variant(index, np.append(base[:t], tail), kind)


def add_longer(suite: Suite, writer: Writer, base: np.ndarray) -> None:
    """Add a stream and some variants; every fourth is cut off soon after its change."""
    index = suite.add(base)
    for i, t in enumerate(sample_places(base, VARIANTS, writer)):
        kind = writer.kinds[i % len(writer.kinds)]
        short = i % 4 == 3
        new = writer.future(kind, base, t, min(1 + i, 40) if short else len(base) - t)
        suite.add_variant(index, np.append(base[:t], new), kind)


def stream_runs(session: Session) -> bool:
    """Score some streams for causality, and then all of them in another company.

    Returns whether streams are scored each for itself.
    """
    suite, writer, plan = Suite(), session.writer, session.plan
    seconds = plan.streams * session.seconds - session.per_start
    budget = min(plan.stream_tokens, tokens_in(session, seconds / 2), MOST_SHORT)
    add_short(suite, writer, plan, budget)
    some = writer.rng.permutation(len(suite.streams))[:FEW].tolist()
    first = session.run_mixed([suite.streams[n] for n in some], strangers=8)
    if first is None:
        return False
    note_stream_cost(session, len(some))
    seconds -= session.took + session.expected(suite.tokens, len(suite.streams))
    add_long(suite, writer, min(plan.stream_tokens - suite.tokens, tokens_in(session, seconds)))
    scored = session.run_mixed(suite.streams)
    if scored is None:
        return False
    note_stream_cost(session, len(suite.streams))
    change = np.concatenate([scored[n] - first[i] for i, n in enumerate(some)])
    what = f"{len(some)} streams in other order and company"
    if not session.judge_equal("streams", change, what):
        return False
    for v in suite.variants:
        session.compare(scored[v.base], scored[v.stream], v.shared, v.what, v.same_length)
    return True


def tokens_in(session: Session, seconds: float) -> int:
    """Tell how many tokens of streams of a usual length can be scored in a time."""
    of_a_token = session.per_token + max(session.per_stream, USUAL) / SHORTEST
    return max(0, int(seconds / of_a_token))


def note_stream_cost(session: Session, count: int) -> None:
    """Estimate the cost of a stream from the last start."""
    known = session.per_start + session.last_tokens * session.per_token
    session.per_stream = max(session.took - known, 0.0) / count + 1e-4


def judge_causality(session: Session) -> bool:
    """Judge whether nothing before a replaced future moved.

    The evidence tells what share of positions could look ahead unseen: n of them, taken at random,
    all miss a share s with probability (1 - s)^n, which is 1% for s = 1 - 0.01^(1/n).
    """
    same, other = session.tolerances()
    limits = [same if move.same_length else other for move in session.moves]
    bad = [m for m, limit in zip(session.moves, limits, strict=True) if m.size > limit]
    near = [move.nearest for move in session.moves if move.same_length]
    drift = float(np.mean(near)) if near else 0.0
    error = float(np.std(near)) / math.sqrt(len(near)) if near else 0.0
    tolerance = f"tolerance {same:.2g}, {other:.2g} where lengths differ"
    if bad:
        m = max(bad, key=lambda move: move.size)
        evidence = f"{len(bad)} of {len(limits)} replaced futures moved NLLs before them: from"
        evidence += f" token {m.shared} on ({m.what}) that of token {m.at} by {m.size:.2g}"
        return session.say("causality", False, f"{evidence} ({tolerance})")
    if abs(drift) > max(NEGLIGIBLE, min(same / 16, ALARM * error)):
        evidence = f"replaced futures move the NLL just before them by {drift:.2g} in the mean"
        return session.say("causality", False, evidence)
    most, longest = max(m.size for m in session.moves), max(m.shared for m in session.moves)
    share = 1 - 0.01 ** (1 / len(limits))
    evidence = f"{len(limits)} futures replaced after 2 to {longest} tokens: NLLs before them "
    evidence += (
        f"moved by {most:.2g} at most ({tolerance}); a script that looks ahead at {share:.2%}"
    )
    return session.say("causality", True, f"{evidence} of the positions would be found (99%)")
