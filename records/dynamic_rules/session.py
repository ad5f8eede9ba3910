"""One audit under way: the script's starts, what they cost, and what they showed."""

import math
import time
from dataclasses import dataclass

import numpy as np
from reading import FAIL, NOT_CHECKED, PASS, WARN, Verdict
from script import Result, Script
from streams import ByteCounter

from dynamic_rules.plan import (
    ALARM,
    LOUDEST,
    NEGLIGIBLE,
    OUTLIER,
    PRINTED,
    ROUGHEST,
    ULPS,
    ZEROS,
    Plan,
)
from dynamic_rules.writer import Writer

LONG_STREAMS = 5  # that the time for real text is shared by
LARGE = 16  # nats, as large as most NLLs are
FARTHEST = 3.0  # factor by which an estimate of time is corrected
STATES = {True: PASS, False: FAIL, None: NOT_CHECKED}


@dataclass(frozen=True)
class Move:
    """How far the NLLs of the first `shared` tokens moved when what follows was replaced.

    The largest change and its token, and the change of the last one of them.
    """

    size: float
    at: int
    shared: int
    nearest: float
    what: str
    same_length: bool


def grain_of(nll: np.ndarray) -> float:
    """Tell by what share of them NLLs are rounded, if all are numbers of a shorter format."""
    values = np.asarray(nll, np.float32)
    if len(values) and not (values.view(np.uint32) & 0xFFFF).any():
        return 2.0**-9  # bf16
    if (values.astype(np.float16) == values).all():
        return 2.0**-12
    return 0.0


class Session:
    """The runs so far, what they showed, and the verdicts."""

    def __init__(self, script: Script, counter: ByteCounter, writer: Writer, plan: Plan) -> None:
        self.script, self.counter, self.writer, self.plan = script, counter, writer, plan
        self.verdicts: dict[str, Verdict] = {}
        self.starts, self.tokens, self.scored = 0, 0, 0
        self.per_start, self.per_token, self.per_stream = 0.0, 0.0, 0.0
        self.pace = 1.0  # of the last start, beside what was expected
        self.grain = 0.0  # by which NLLs are rounded, as a share of them
        self.noise = 0.0  # the largest difference between equal streams
        self.usual = 0.0  # the usual difference between them, the root of their mean square
        self.moves: list[Move] = []
        self.shards = 1  # of the validation data
        self.sidecar = ""  # whose sizes a run is given: the auditor's "own", the "data"'s, or none
        self.recounted = "the tokens decode to"  # how the bytes of text became known
        self.text_bytes = 0  # of all validation data after its first token, where they are counted
        self.anchor: tuple[np.ndarray, np.ndarray] | None = None  # a text and its NLLs, if known
        self.anchored = np.zeros(0)  # its NLLs among other streams, in the last start
        self.began = time.monotonic()
        self.seconds = plan.least  # that the audit may take, once the script's speed is known
        self.took, self.last_tokens = 0.0, 0  # of the last start

    # ------------------------------------ verdicts ------------------------------------

    def say(self, rule: str, passed: bool | None, evidence: str) -> bool:
        """Note a verdict; a worse one stays. Return whether it passed."""
        return self.note(rule, STATES[passed], evidence) and passed is True

    def warn(self, rule: str, evidence: str) -> bool:
        """Note what a reviewer should know and what decides nothing."""
        return self.note(rule, WARN, evidence)

    def note(self, rule: str, state: str, evidence: str) -> bool:
        """Note a verdict, unless a worse one is there. Return True."""
        known = self.verdicts[rule].state if rule in self.verdicts else ""
        if known != FAIL and (known, state) != (WARN, PASS):
            self.verdicts[rule] = Verdict(rule, state, evidence)
        return True

    def add_evidence(self, rule: str, text: str) -> None:
        """Add words to the evidence of a rule, if it has not failed."""
        verdict = self.verdicts.get(rule, Verdict(rule, PASS, ""))
        if verdict.state != FAIL:
            state = WARN if verdict.state == WARN else PASS
            joined = f"{verdict.evidence}; {text}" if verdict.evidence else text
            self.verdicts[rule] = Verdict(rule, state, joined)

    def failed(self, *rules: str) -> bool:
        """Tell whether one of these rules failed."""
        return any(r in self.verdicts and self.verdicts[r].state == FAIL for r in rules)

    # ------------------------------------ time ------------------------------------

    @property
    def spent(self) -> float:
        """Tell the seconds since the audit began."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Tell the seconds of the audit that are left."""
        return self.seconds - self.spent

    @property
    def length(self) -> int:
        """Choose the length of the longest streams, in tokens: so that a few can be scored."""
        plan = self.plan
        tokens = plan.real / LONG_STREAMS * self.seconds / self.per_token
        return min(plan.long, max(int(tokens), plan.little))

    def expected(self, tokens: int, streams: int = 1) -> float:
        """Estimate the seconds that a start should take."""
        known = self.per_start + tokens * self.per_token + streams * self.per_stream
        return self.pace * known

    def note_pace(self, tokens: int, streams: int) -> None:
        """Learn from the last start how far such estimates are off, if it was a long one."""
        if self.per_token and tokens > self.plan.plain:
            known = self.expected(tokens, streams) / self.pace
            self.pace = min(max(self.took / known, 1 / FARTHEST), FARTHEST)

    # ------------------------------------ starts ------------------------------------

    def run(
        self, streams: list[np.ndarray], apart: bool, sizes: list[np.ndarray] | None = None
    ) -> list[np.ndarray] | None:
        """Start the script once and judge what holds for every start.

        `sizes` are the original bytes of each token, for a sidecar; the auditor's own by default,
        where the data has one. Returns the NLLs in float64, or None if they are not to be had; a
        rule has failed then.
        """
        tokens = sum(map(len, streams))
        if sizes is None and self.sidecar:
            sizes = self.own_sizes(streams, apart)
        limit = 3 * self.expected(tokens, len(streams)) + 60
        result = self.script.score(streams, apart, max(limit, self.plan.patience), sizes)
        self.took, self.last_tokens = result.seconds, tokens
        self.starts += 1
        self.tokens += tokens
        self.note_pace(tokens, len(streams))
        if result.problem:
            how = f"with {len(streams)} SCORE_STREAMS" if apart else f"on {tokens} tokens"
            self.say("runs", False, f"{how}: {result.problem}")
            return None
        whole = streams if apart else [np.concatenate(streams)]
        if not self.judge_once(whole, result, apart):
            return None
        self.grain = max(map(grain_of, result.nll))
        self.judge_printed(result, apart)
        if not apart:
            self.judge_bytes(whole[0], result, sizes)
        return [nll.astype(np.float64) for nll in result.nll]

    def own_sizes(self, streams: list[np.ndarray], apart: bool) -> list[np.ndarray]:
        """Count the bytes of each token of streams that are scored apart or as one."""
        if apart:
            return [self.counter.sizes(tokens) for tokens in streams]
        sizes = self.counter.sizes(np.concatenate(streams))
        return np.split(sizes, np.cumsum([len(tokens) for tokens in streams])[:-1])

    def run_plain(self, tokens: np.ndarray, sizes: np.ndarray | None = None) -> np.ndarray | None:
        """Score one stream as a real evaluation does, from as many shards; its NLLs, or None."""
        shards = np.array_split(np.asarray(tokens, np.uint16), self.shards)
        parts = None if sizes is None else np.array_split(sizes, self.shards)
        found = self.run(shards, False, parts)
        return found[0] if found else None

    def run_mixed(
        self, streams: list[np.ndarray], strangers: int = 0
    ) -> dict[int, np.ndarray] | None:
        """Score streams apart, in a random order, and some strangers among them.

        A text whose NLLs in a real evaluation are known is always there: a script that is honest
        only where it meets many streams shows by it. Returns the NLLs by place in `streams`.
        """
        assert self.anchor
        lengths = self.writer.rng.integers(12, 400, strangers).tolist()
        mixed = [*streams, self.anchor[0], *map(self.writer.text, lengths)]
        order = self.writer.rng.permutation(len(mixed)).tolist()
        nll = self.run([np.asarray(mixed[i], np.uint16) for i in order], True)
        if nll is None:
            return None
        by_stream = dict(zip(order, nll, strict=True))
        self.anchored = by_stream[len(streams)]
        if not self.judge_anchor(len(mixed)):
            return None
        return {i: by_stream[i] for i in range(len(streams))}

    def judge_anchor(self, count: int) -> bool:
        """Judge whether a text has the NLLs of a real evaluation among `count` streams as well."""
        assert self.anchor
        change = self.anchored - self.anchor[1]
        what = f"text of {len(change) + 1} tokens, alone and among {count} SCORE_STREAMS"
        return self.judge_equal("streams", change, what)

    def judge_equal(self, rule: str, change: np.ndarray, what: str) -> bool:
        """Judge whether NLLs of the same tokens agree, but for rounding."""
        most, mean = float(np.abs(change).max()), float(change.mean())
        error = float(change.std()) / math.sqrt(len(change))
        self.noise = max(self.noise, most)
        self.usual = max(self.usual, math.sqrt(float((change**2).mean())))
        good = most <= self.loudest and abs(mean) <= max(NEGLIGIBLE, ALARM * error)
        evidence = f"{what}: NLLs differ by {most:.2g} at most, by {mean:.2g} in the mean"
        return self.say(rule, good, evidence)

    def judge_once(self, streams: list[np.ndarray], result: Result, apart: bool) -> bool:
        """Judge whether every token but each stream's first has one proper NLL."""
        for tokens, nll in zip(streams, result.nll, strict=True):
            if nll.dtype.kind != "f" or nll.shape != (len(tokens) - 1,):
                what = f"{nll.dtype} {nll.shape}, not float of ({len(tokens) - 1},)"
                return self.say("once", False, f"NLLs for {len(tokens)} tokens are {what}")
            proper = np.isfinite(nll) & (nll >= -NEGLIGIBLE)
            if not proper.all():
                at = int(np.flatnonzero(~proper)[0])
                return self.say("once", False, f"the NLL of token {at + 1} is {nll[at]}")
        zeros = max(float((nll == 0).mean()) for nll in result.nll)
        if not apart and zeros > ZEROS:
            return self.say("once", False, f"{zeros:.1%} of the NLLs are exactly 0: not scored")
        self.scored += sum(map(len, result.nll))
        return self.say("once", True, f"one finite NLL for each of {self.scored} targets")

    def judge_printed(self, result: Result, apart: bool) -> None:
        """Judge whether the printed loss is the mean of the saved NLLs."""
        mean = float(np.concatenate(result.nll).mean(dtype=np.float64))
        good = abs(mean - result.loss) <= PRINTED
        where = "over all streams" if apart else "over the stream"
        relation = f"printed val_loss {result.loss:.6f}, mean of the saved NLLs {mean:.6f}"
        self.say("printed_score", good, f"{relation} {where}")

    def judge_bytes(
        self, tokens: np.ndarray, result: Result, sizes: list[np.ndarray] | None
    ) -> None:
        """Judge whether the printed bits per byte are of the bytes that the tokens decode to.

        With the printed loss or with the saved NLLs: if these differ, that is for printed_score.
        """
        count, size = len(tokens) - 1, self.counter.count(tokens)
        if sizes is not None:
            size = int(np.concatenate(sizes)[1:].sum())
        sums = count * result.loss, float(result.nll[0].sum(dtype=np.float64))
        bpb = result.bpb * math.log(2)
        implied = [total / bpb if bpb else math.inf for total in sums]
        nearest = min(implied, key=lambda value: abs(value - size))
        good = bool(size) and abs(nearest / size - 1) <= PRINTED
        evidence = f"the score counts {nearest:.1f} bytes, {self.recounted} {size}"
        self.say("bytes", good, evidence)

    # ------------------------------------ changes ------------------------------------

    @property
    def loudest(self) -> float:
        """Tell how far rounding may move one NLL, by how far it usually does."""
        return min(max(LOUDEST, OUTLIER * self.usual), ROUGHEST)

    def compare(self, old: np.ndarray, new: np.ndarray, shared: int, what: str, same: bool) -> None:
        """Note how far the NLLs of two streams differ within the tokens that they share."""
        change = new[: shared - 1] - old[: shared - 1]
        if len(change):
            at = int(np.abs(change).argmax())
            size, nearest = float(abs(change[at])), float(change[-1])
            self.moves.append(Move(size, at + 1, shared, nearest, what, same))

    def tolerances(self) -> tuple[float, float]:
        """Measure how far rounding moves an NLL: in streams of the same length, and of another.

        Four times the largest difference between equal streams, at least ULPS units in the last
        place of float32, or a step of the NLLs' own rounding. Streams of other lengths are computed
        in other shapes: there, eight times the median of the variants.
        """
        floor = max(ULPS * float(np.spacing(np.float32(LARGE))), 2 * self.grain * LARGE)
        same = min(max(4 * self.noise, floor), self.loudest)
        sizes = [move.size for move in self.moves if not move.same_length]
        typical = 8 * float(np.median(sizes)) if sizes else 0.0
        return same, max(same, min(typical, 0.05))
