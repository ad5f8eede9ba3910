"""Sums over the whole vocabulary: every id at the same position, with and without a follower."""

import math
from collections.abc import Callable

import numpy as np

from dynamic_rules.plan import ALARM, NEGLIGIBLE, PRINTED
from dynamic_rules.session import Session
from dynamic_rules.writer import Position, Suite, Writer

SHORT = 8  # tokens of the streams at the first position
DEEP = (257, 320)  # tokens before a position that is deep in text
NEEDED = 0.25  # share of the longest audit that this position may take at least
OF_BORDERS = ("after BOS", "at a border", "before a border")


def wanted_positions(writer: Writer) -> list[tuple[str, np.ndarray, int]]:
    """List what to try, in order: the name, the tokens before, and how many follow each id.

    In a text that is repeated, a memory of what was scored is at work.
    """
    phrase = writer.document(7)
    again = np.concatenate([phrase, phrase[1:], phrase[1:], phrase[1:4]])
    text, bordered = writer.document(60), writer.bordered(80)
    last = max(np.flatnonzero(bordered[:60] == writer.bos), default=0)
    border = bordered[max(0, last - 14) : last + 1]
    deep = int(writer.rng.integers(*DEEP))
    wanted = [
        ("early in text", text[:4], 2),
        ("deep in text", writer.document(deep), 0),
        ("after BOS", writer.border, 0),
        ("in a repetition", again, 6),
        ("in a repetition of random ids", np.resize(writer.ids(5), 17), 0),
        ("in text", text[:34], 0),
        ("at a border", border, 0),
        ("in a repetition", again, 0),
        ("before a border", np.append(border, text[1:9]), 3),
        ("late in a repetition", np.concatenate([text, text[1:], text[1:], text[1:20]]), 0),
        ("deeper in text", writer.text(4 * deep), 2),
    ]
    return [row for row in wanted if writer.bos >= 0 or row[0] not in OF_BORDERS]


def build_positions(writer: Writer, fits: Callable[[int, int], bool]) -> Suite:
    """Build streams for normalization and fixed, as many as fit: at each position every id."""
    suite = Suite()
    for what, prefix, more in wanted_positions(writer):
        first, cost = len(suite.streams), writer.vocabulary * (len(prefix) + 1 + more)
        if not fits(suite.tokens + cost, first + writer.vocabulary):
            continue
        for v in range(writer.vocabulary):
            suite.add(np.concatenate([prefix, [v], writer.ids(more)]))
        suite.positions.append(Position(what, len(prefix), first, bool(more)))
    return suite


def sum_runs(session: Session) -> None:
    """Put every id at some positions, and judge the rules normalization and fixed."""
    plan, vocabulary = session.plan, session.counter.size
    first = session.expected(SHORT * vocabulary, vocabulary)
    seconds = max(plan.sums * session.seconds, min(first, NEEDED * plan.most))

    def fits(tokens: int, streams: int) -> bool:
        is_small = tokens <= plan.stream_tokens and streams <= plan.stream_count
        return is_small and session.expected(tokens, streams) <= seconds

    suite = build_positions(session.writer, fits)
    if not suite.positions:
        cost = session.expected(vocabulary * 2, vocabulary)
        why = f"a position with every id takes {cost:.0f} s and more, {seconds:.0f} s were there"
        session.say("normalization", None, why)
        session.say("fixed", None, why)
        return
    scored = session.run_mixed(suite.streams)
    if scored is None:
        return
    for rule, followed in (("normalization", False), ("fixed", True)):
        positions = [p for p in suite.positions if p.followed == followed]
        if positions and not session.failed("normalization"):
            judge_sums(session, rule, positions, scored)


def judge_sums(
    session: Session, rule: str, positions: list[Position], scored: dict[int, np.ndarray]
) -> bool:
    """Judge whether the probabilities of all ids sum to 1 at each position."""
    alike = min(session.noise, ALARM * session.usual)  # a move that all terms have in common
    noise = max(alike, min(session.tolerances()[1], NEGLIGIBLE))
    found = []
    for p in positions:
        values = np.array([scored[p.first + v][p.t - 1] for v in range(session.counter.size)])
        limit = PRINTED + noise + rounding_of_a_sum(values, session.grain)
        found.append((math.fsum(np.exp(-values)), limit, p))
    total, limit, worst = max(found, key=lambda row: abs(math.log(row[0] or 1e-300)) / row[1])
    good = abs(math.log(total or 1e-300)) <= limit
    lengths = ", ".join(f"{p.what} ({p.t})" for _, _, p in found)
    evidence = f"{session.counter.size} probabilities sum to {total:.6f} {worst.what}, after "
    evidence += f"{worst.t} tokens, the worst of {len(found)} positions: {lengths}"
    after = "" if rule == "normalization" else "; each id with another future"
    return session.say(rule, good, f"{evidence}{after} (tolerance {limit:.2g})")


def rounding_of_a_sum(nll: np.ndarray, grain: float) -> float:
    """Tell how far rounded NLLs may move the sum of their probabilities: ALARM standard errors.

    An NLL is off by grain * NLL at the most, evenly spread, and each for itself.
    """
    return ALARM * math.sqrt(float(((np.exp(-nll) * nll * grain) ** 2).sum() / 3))
