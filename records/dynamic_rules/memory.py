"""Validation text kept in the artifact ("paid prefix"): is it scored better than unseen text?

An honest model scores unseen text of the same source as it scores the validation text, and text
that it was trained on no worse. And nowhere does it give long pieces of new text for nothing.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from streams import read_shards, read_validation

from dynamic_rules.chance import Proposal
from dynamic_rules.claims import block_means
from dynamic_rules.plan import ALARM, FOUND, NEGLIGIBLE
from dynamic_rules.session import Session

Part = tuple[np.ndarray, np.ndarray]  # tokens and the NLLs of all but the first

PASSAGE = 1024  # tokens of running text
BLOCK = 512  # tokens, whose losses count as independent
PIECE = 32  # tokens of a piece of text that is known by heart
KNOWN = 0.1  # nats a token, in the mean over such a piece, or less
GRAM = 8  # tokens; a piece is new if no such part of it came before
SHARE = 0.005  # of pieces known by heart, where there is no other text to compare with
FEWEST = 8  # blocks
ALIKE = 0.05  # share by which losses of a model of pairs differ in texts of one kind
RARE = 1e-6  # probability of a false alarm


def read_unseen(
    data: Path, unseen: Path | None, most: int, vocabulary: int
) -> tuple[np.ndarray, str]:
    """Read text to compare with, and say what it is: --unseen's, else the training shards of DATA.

    There is none if the array is empty. Raises ValueError if --unseen holds none that the
    vocabulary has.
    """
    if unseen is None:
        tokens = read_shards(sorted(data.glob("fineweb_train_[0-9]*.bin"))[-1:], most)
        fits = len(tokens) and int(tokens.max()) < vocabulary
        return tokens if fits else tokens[:0], "training text"
    paths = sorted(unseen.glob("fineweb_*_[0-9]*.bin"))
    tokens = read_shards([path for path in paths if "bytes" not in path.name], most)
    if not len(tokens):
        raise ValueError(f"{unseen}: no fineweb_*.bin with tokens; name a folder that holds some")
    if int(tokens.max()) >= vocabulary:
        raise ValueError(f"{unseen}: its tokens are not of the tokenizer's {vocabulary} pieces")
    return tokens, "unseen text"


def memory_run(session: Session, data: Path, whole: int, unseen: np.ndarray, name: str) -> None:
    """Score other validation text and unseen text, and compare them with the anchor's."""
    assert session.anchor
    rng, length = session.writer.rng, len(session.anchor[0])
    everything = read_validation(data, whole)
    elsewhere, other = sample(everything, length, rng), sample(unseen, length, rng)
    streams = [elsewhere, other] if len(other) > PIECE else [elsewhere]
    scored = session.run_mixed(streams)
    if scored is None:
        return
    own = [(session.anchor[0], session.anchored), (elsewhere, scored[0])]
    if len(other) <= PIECE:
        judge_alone(session, own)
        return
    easy = Proposal(np.concatenate([everything[: 2**21], other]), session.counter.size)
    pieces = known_pieces(other, scored[1])
    found = [compare(part, (other, scored[1]), pieces, easy) for part in own]
    judge_beside(session, found, name, f"{pieces[1]} of {pieces[0]} there")


def sample(tokens: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Join passages from all over a text."""
    starts = rng.integers(0, max(1, len(tokens) - PASSAGE), -(-length // PASSAGE))
    return np.concatenate([tokens[at : at + PASSAGE] for at in np.sort(starts)])[:length]


def known_pieces(tokens: np.ndarray, nll: np.ndarray) -> tuple[int, int]:
    """Count pieces of new text, and those of them that are known by heart."""
    seen: set[bytes] = set()
    ids, new, known = tokens.astype("<u2"), 0, 0
    for start in range(1, len(ids) - PIECE, PIECE):
        grams = {ids[i : i + GRAM].tobytes() for i in range(start, start + PIECE - GRAM + 1)}
        if seen.isdisjoint(grams):
            new += 1
            known += bool(nll[start - 1 : start - 1 + PIECE].mean() < KNOWN)
        seen |= {ids[i : i + GRAM].tobytes() for i in range(start, start + PIECE)}
    return new, known


def judge_alone(session: Session, own: list[Part]) -> None:
    """Judge by the pieces that are known by heart alone."""
    counts = [known_pieces(tokens, nll) for tokens, nll in own]
    new, known = max(counts, key=lambda pair: pair[1] / max(pair[0], 1))
    evidence = f"{known} of {new} new pieces of {PIECE} tokens cost less than {KNOWN} nats a token"
    if known > 5 and known > SHARE * new:
        session.say("paid_prefix", False, f"{evidence}: they are known by heart")
        return
    reason = "; --unseen DIR, or training shards in DATA, would allow to compare with other text"
    session.say("paid_prefix", None, evidence + reason)


@dataclass(frozen=True)
class Comparison:
    """Validation text beside other text."""

    gain: float  # nats a token that it is easier for the script, beside a model of pairs
    error: float
    is_alike: bool  # whether it is of the same kind for that model
    new: int  # pieces of new text
    known: int  # those of them that are known by heart
    chance: float  # that as many of them would be, if they were so as often as in the other text


def judge_beside(session: Session, found: list[Comparison], name: str, there: str) -> None:
    """Judge whether validation text is easier for the script than other text is."""
    for c in found:
        evidence = f"validation text is {c.gain:+.4f} nats a token easier than {name}, beside what "
        evidence += (
            f"a model of pairs finds easier (standard error {c.error:.4f}); {c.known} of its "
        )
        evidence += f"{c.new} new pieces of {PIECE} tokens cost next to nothing, {there}"
        is_easier = c.gain > ALARM * c.error + NEGLIGIBLE
        if c.chance < RARE or (is_easier and c.is_alike):
            session.say("paid_prefix", False, evidence)
            return
        if is_easier:
            session.warn("paid_prefix", f"{evidence}; the two texts are not of one kind")
            return
    worst = max(found, key=lambda c: c.gain)
    if not math.isfinite(worst.error):
        session.say("paid_prefix", None, f"too little text to compare with {name}")
        return
    evidence = f"validation text is {worst.gain:+.4f} nats a token easier than {name}, beside what "
    evidence += f"a model of pairs finds easier; {FOUND * worst.error:.3f} would be found (99%)"
    session.say("paid_prefix", True, evidence)


def compare(own: Part, other: Part, pieces: tuple[int, int], easy: Proposal) -> Comparison:
    """Compare validation text with other text, whose new and known pieces are counted already."""
    new, known = known_pieces(*own)
    other_new, other_known = pieces
    share = (other_known + 1) / (other_new + 1)
    chance = stats.binomtest(known, max(new, 1), share, alternative="greater").pvalue
    losses = [block_means(nll, BLOCK) for _, nll in (own, other)]
    simple = [block_means(easy.losses(tokens), BLOCK) for tokens, _ in (own, other)]
    counts = [len(part) for part in losses]
    if min(counts) < FEWEST:
        return Comparison(0.0, math.inf, True, new, known, float(chance))
    centred = np.concatenate([part - part.mean() for part in simple])
    moved = np.concatenate([part - part.mean() for part in losses])
    slope = float((centred * moved).sum() / max(float((centred**2).sum()), 1e-12))
    spread = float((moved - slope * centred).var())
    gap = float(simple[1].mean() - simple[0].mean())
    gain = float(losses[1].mean() - losses[0].mean()) - slope * gap
    error = math.sqrt(spread * (1 / counts[0] + 1 / counts[1]))
    is_alike = abs(gap) < ALIKE * float(simple[0].mean())
    return Comparison(gain, error, is_alike, new, known, float(chance))
