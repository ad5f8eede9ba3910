"""The score that the record's logs claim: does it come out again on the real validation data?"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from reading import Log, read_logs, to_number
from static_rules.validation import implied_bytes, stated_bytes, val_tokens
from streams import ByteCounter, read_sizes, read_validation

from dynamic_rules.chance import Proposal
from dynamic_rules.plan import ALARM, FOUND, NEGLIGIBLE
from dynamic_rules.session import Session

OTHER_MACHINE = 2e-3  # nats in a mean, by which a GPU's bf16 and a CPU may differ
FIRST = 16  # bytes of the first token, that a log may count
ANOTHER = 0.01  # share of the bytes by which a log's text is another text
BLOCK = 1024  # tokens, whose losses count as independent
COARSE = 0.1  # nats: a comparison that finds less than this only is no check
CHUNK = re.compile(r"ttt_chunk\s{0,4}\[(\d{1,9})/(\d{1,9})\]\s{0,4}bpb=(\d{1,2}\.\d{1,12})")
CHUNK_TOKENS = re.compile(r"\b(?:ttt_)?chunk(?:_tokens)?\s{0,4}[=:]\s{0,4}(\d{2,9})\b")


@dataclass(frozen=True)
class Scored:
    """The beginning of the data as it was scored here, with the sizes of a sidecar, if any."""

    text: np.ndarray
    nll: np.ndarray
    sizes: np.ndarray | None
    counter: ByteCounter

    @property
    def size(self) -> int:
        """Count the bytes of all tokens but the first."""
        return self.size_of(len(self.text))

    def size_of(self, count: int) -> int:
        """Count the bytes of the first `count` tokens but the first."""
        if self.sizes is None:
            return self.counter.count(self.text[:count])
        return int(self.sizes[1:count].sum(dtype=np.int64))


@dataclass(frozen=True)
class Claim:
    """What a log says it scored; nan where it does not say."""

    tokens: int
    size: float  # bytes
    loss: float
    bpb: float
    log: Log


def find_claims(folder: Path) -> list[Claim]:
    """Find the final scores that logs state with their number of tokens, the best score first."""
    claims = []
    for log in read_logs(folder):
        tokens = val_tokens(log)
        if log.finals and tokens > 1:
            _, loss, bpb = log.finals[-1]
            stated = stated_bytes(log)
            size = stated if stated > 0 else implied_bytes(log)
            claims.append(Claim(int(tokens), size, loss, bpb, log))
    return sorted(claims, key=lambda claim: claim.bpb)


def claim_run(
    session: Session, folder: Path, data: Path, whole: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Score the beginning of the data as a real evaluation, and compare it with the logs' claims.

    `whole` is the number of validation tokens in the data. Returns the text and its NLLs, or None.
    """
    claims = find_claims(folder)
    text = read_validation(data, tokens_to_score(session, claims, whole))
    text = session.counter.whole(text)
    sizes = session.counter.sizes(text) if session.sidecar == "own" else None
    if session.sidecar == "data":
        sizes = read_sizes(data, len(text))
    nll = session.run_plain(text, sizes)
    if nll is None:
        return None
    scored = Scored(text, nll, sizes, session.counter)
    judge_claim(session, claims, scored, folder, data, whole)
    return text, nll


def tokens_to_score(session: Session, claims: list[Claim], whole: int) -> int:
    """Choose how many tokens to score: all that a claim is of, if there is time for them."""
    plan = session.plan
    if claims and claims[0].tokens * session.per_token <= plan.claim * session.seconds:
        return min(whole, claims[0].tokens)
    return min(whole, 2 * session.length)


def judge_claim(
    session: Session, claims: list[Claim], scored: Scored, folder: Path, data: Path, whole: int
) -> None:
    """Compare what was scored with the logs: all of it, or what is known of its beginning."""
    text, size = scored.text, scored.size
    if not claims:
        session.say("claim", None, "no log states a number of tokens and a final score")
        return
    same = [c for c in claims if c.tokens == len(text) and is_of(c, scored)]
    if same:
        judge_whole(session, same, float(scored.nll.sum()) / math.log(2) / size, size)
        return
    if all(c.tokens == len(text) for c in claims):
        why = f"{claims[0].size:.0f} bytes there, {size} here"
        session.say("claim", None, f"DATA is not what the logs scored: {why}")
        return
    claim = claims[0]
    if not judge_size(session, claim, whole):
        return
    if not judge_saved(session, claim, folder, scored) and not judge_chunks(session, claim, scored):
        judge_beginning(session, claim, scored, data, whole)


def is_of(claim: Claim, scored: Scored) -> bool:
    """Tell whether a claim on as many tokens is of this text: by its bytes, or by its loss."""
    loss = float(scored.nll.mean())
    return abs(claim.size / scored.size - 1) < 1e-4 or abs(claim.loss - loss) <= NEGLIGIBLE


def judge_size(session: Session, claim: Claim, whole: int) -> bool:
    """Judge whether a claim on all of the data is per the bytes of its text; whether it can be.

    Other data with as many tokens would have quite another number.
    """
    text = session.text_bytes
    if claim.tokens != whole or not text:
        return True
    apart = claim.size / text - 1
    if not max(1e-4, FIRST / text) < abs(apart) < ANOTHER:
        return True
    evidence = f"{claim.log.path.name} scores {claim.size:.0f} bytes, the text has {text}"
    bpb = claim.loss * (claim.tokens - 1) / math.log(2) / text
    evidence += f" ({apart:+.3%}): its loss is {bpb:.6f} bits per byte, it states {claim.bpb:.6f}"
    session.say("claim", False, evidence)
    return False


def judge_whole(session: Session, claims: list[Claim], bpb: float, size: int) -> None:
    """Compare the score of all that the logs scored."""
    nearest = min(claims, key=lambda claim: abs(claim.bpb - bpb))
    good = abs(nearest.bpb - bpb) <= NEGLIGIBLE
    evidence = f"{bpb:.6f} bits per byte; {nearest.log.path.name} states {nearest.bpb:.6f}"
    if not good:
        evidence += f"; it is per {nearest.size:.0f} bytes, the text has {size}"
    session.say("claim", good, evidence)


def judge_saved(session: Session, claim: Claim, folder: Path, scored: Scored) -> bool:
    """Compare with NLLs that the record ships; whether it ships some."""
    nll = scored.nll
    for path in sorted(folder.glob("*.npy")):
        if path.stat().st_size > 16 * (claim.tokens + 1024):
            continue
        try:
            saved = np.load(path, allow_pickle=False).astype(np.float64)
        except (OSError, ValueError, EOFError):
            continue
        if saved.shape != (claim.tokens - 1,):
            continue
        own, here, shipped = float(saved.mean()), float(nll.mean()), float(saved[: len(nll)].mean())
        good = abs(own - claim.loss) <= NEGLIGIBLE and abs(here - shipped) <= OTHER_MACHINE
        evidence = (
            f"{path.name}: mean {own:.6f}, {claim.log.path.name} states {claim.loss:.6f}; its "
        )
        evidence += f"first {len(nll)} NLLs have the mean {shipped:.6f}, here {here:.6f}"
        session.say("claim", bool(good), evidence)
        return True
    return False


def judge_chunks(session: Session, claim: Claim, scored: Scored) -> bool:
    """Compare with the running score that a log printed for chunks; whether it printed some."""
    body = claim.log.body
    length = CHUNK_TOKENS.search(body)
    rows = CHUNK.findall(body)
    if not length or not rows:
        return False
    ends = [(int(chunk) * int(length[1]), to_number(bpb)) for chunk, _, bpb in rows]
    within = [(end, bpb) for end, bpb in ends if 0 < end <= len(scored.nll)]
    if not within:
        return False
    end, stated = within[-1]
    size = scored.size_of(end + 1)
    bpb = float(scored.nll[:end].sum()) / math.log(2) / size
    good = abs(bpb - stated) <= OTHER_MACHINE
    evidence = (
        f"the first {end} tokens: {bpb:.5f} bits per byte, {claim.log.path.name} {stated:.5f}"
    )
    session.say("claim", good, evidence)
    return True


def judge_beginning(session: Session, claim: Claim, scored: Scored, data: Path, whole: int) -> None:
    """Tell by the beginning whether the whole can have the score that a log states.

    How hard the rest is, a model of pairs of tokens tells, learned from the last quarter: the
    losses of blocks are regressed on its own, which are known of all the data.
    """
    text, nll = scored.text, scored.nll
    everything = read_validation(data, claim.tokens)
    taught = 3 * len(everything) // 4
    easy = Proposal(everything[taught:], session.counter.size)
    count = min(len(nll), taught - 1)
    losses = block_means(nll[:count], BLOCK)
    simple = block_means(easy.losses(text[: count + 1]), BLOCK)
    target = float(np.mean([easy.losses(part).mean() for part in parts_of(everything[:taught])]))
    expected, error = regress(losses, simple, target)
    name, below = claim.log.path.name, expected - claim.loss
    evidence = f"the first {len(text)} of {claim.tokens} tokens: {expected:.4f} nats a token for "
    evidence += f"the whole, standard error {error:.4f}; {name} states {claim.loss:.4f}; "
    evidence += f"a claim that is {FOUND * error:.3f} nats too good would be found (99%)"
    if whole < claim.tokens:
        evidence += f"; DATA holds {whole} tokens only"
    if not FOUND * error <= COARSE * claim.loss:
        session.say("claim", None, f"too few tokens could be scored: {evidence}")
    elif below < -ALARM * error - NEGLIGIBLE:
        session.warn("claim", f"the script scores better than its log: {evidence}")
    else:
        session.say("claim", below <= ALARM * error + NEGLIGIBLE, evidence)


def parts_of(tokens: np.ndarray) -> list[np.ndarray]:
    """Cut tokens into parts of equal length, small enough to work on."""
    return np.array_split(tokens, 1 + len(tokens) // 2**20)


def block_means(values: np.ndarray, size: int) -> np.ndarray:
    """Average blocks of tokens; a rest is left out."""
    count = len(values) // size
    return values[: count * size].reshape(count, size).mean(axis=1)


def regress(losses: np.ndarray, simple: np.ndarray, target: float) -> tuple[float, float]:
    """Predict the mean loss where the simple model's mean is `target`, with its standard error."""
    count = len(losses)
    if count < 8:
        return math.nan, math.nan
    centred = simple - simple.mean()
    slope = float((centred * losses).sum() / max((centred**2).sum(), 1e-12))
    rest = losses - losses.mean() - slope * centred
    deviation = math.sqrt(float((rest**2).sum()) / (count - 2))
    offset = target - float(simple.mean())
    error = deviation * math.sqrt(1 / count + offset**2 / max(float((centred**2).sum()), 1e-12))
    return float(losses.mean()) + slope * offset, error
