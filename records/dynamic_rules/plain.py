"""Real text as one stream: does the script run, repeat itself, and keep its eyes on the past."""

import numpy as np

from dynamic_rules.session import Session


def first_runs(session: Session) -> bool:
    """Score a little, more, and the same again, to learn the script's speed and its noise.

    The longer text becomes the anchor. Returns whether there is something to go on with.
    """
    plan, tokens = session.plan, session.writer.tokens
    beginning = session.counter.whole(tokens[: plan.little])
    little = session.run_plain(beginning)
    if little is None:
        return False
    session.per_start = session.took
    text = tokens[: int(plan.plain * min(1.0, max(0.05, 15 / session.took)))]
    text = session.counter.whole(text)
    nll = session.run_plain(text)
    if nll is None:
        return False
    learn_speed(session, len(text))
    session.compare(nll, little, min(len(beginning), len(text)), "end of the data", False)
    again = session.run_plain(text)
    session.anchor = text, nll
    if again is None:
        return False
    return session.judge_equal("repeatability", again - nll, f"two runs on {len(text)} tokens")


def learn_speed(session: Session, tokens: int) -> None:
    """Estimate the cost of a start and of a token, and from them how long the audit may take."""
    plan, took, little = session.plan, session.took, session.per_start
    more = (took - little) / max(tokens - plan.little, 1)
    session.per_token = max(more, 0.1 * took / tokens)
    session.per_start = max(min(little, took) - plan.little * session.per_token, 0.0)
    wanted = plan.least + plan.starts * session.per_start
    session.seconds = min(plan.most, wanted + plan.more * plan.plain * session.per_token)


def with_another_end(session: Session, text: np.ndarray, nll: np.ndarray) -> None:
    """Score text once more with another end, from a random place in its second half on."""
    writer, borders = session.writer, session.counter.borders(text)
    places = borders[(borders >= len(text) // 2) & (borders < len(text))]
    if not len(places):
        return
    t = int(writer.rng.choice(places))
    other = session.counter.whole(writer.with_future(text, t))
    changed = session.run_plain(other)
    if changed is not None:
        session.compare(nll, changed, t, "text, the whole data", len(other) == len(text))
