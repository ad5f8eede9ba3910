"""Rules that are checked by running a record's script as a black box on streams of the auditor's.

The script is started a few times in fresh folders. It scores text from the data folder, the same
again, and several hundred short streams that share a beginning and differ in what follows, or in
one token. What it must not do then shows in its NLLs, whatever the model inside:

    runs           it scores in EVAL_ONLY, with nothing beside it but the files of the protocol
    once           each token but a stream's first has one NLL: finite, not negative, not left out
    score          the printed loss is the mean of the saved NLLs
    bytes          the printed bits per byte are of the bytes that the tokens decode to
    claim          a score in the record's logs comes out again, if DATA is what it was made with
    repeatability  two runs on the same tokens agree
    streams        a stream's NLLs do not depend on streams beside it, nor on SCORE_STREAMS
    causality      no NLL before position t moves when everything from t on is replaced
    normalization  with every id of the vocabulary at t, the probabilities exp(-NLL) sum to 1
    fixed          they still do when each of these ids is followed by something else

A rule whose premise another rule found broken is NOT CHECKED: which of two runs to believe is
not known if runs differ, and no sum means anything if predictions move with what follows.

Tolerances come from what this script does on this machine. NLLs may differ by rounding when a
stream is computed among others: four times the largest difference seen between equal streams in
equal and in other company is allowed, at least ULPS units in the last place of float32. Streams
of other lengths are computed in other shapes: there, eight times the median of the variants is
allowed. NEGLIGIBLE, a tenth of the 0.005 nats by which a record must beat the one before it,
bounds what all tolerances together can hide in a mean.

Not seen are cheats that are active in so few places that no sampled position meets one, and
those that only act on streams longer than the ones that the budget allowed; the evidence says how
many positions and what lengths were tried.
"""

import math
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from reading import FAIL, NOT_CHECKED, PASS, Verdict, read_logs
from script import SCRIPT, Result, Script
from streams import ByteCounter, read_validation

NEGLIGIBLE = 5e-4  # nats in a mean
LOUDEST = 0.1  # nats that one NLL may move by rounding: bf16 does not need more
PRINTED = 1e-4  # that a printed score, or a sum of probabilities, may be off
ULPS = 16
ZEROS = 0.01  # share of NLLs that may be exactly 0
RULES = (
    *("runs", "once", "score", "bytes", "claim", "repeatability"),
    *("streams", "causality", "normalization", "fixed"),
)
# What must not have failed for a rule to be checked.
NEEDS = {
    "streams": ("runs", "once", "repeatability"),
    "causality": ("runs", "once", "repeatability"),
    "normalization": ("runs", "once", "repeatability", "streams", "causality"),
    "fixed": ("runs", "once", "repeatability", "streams", "causality", "normalization"),
}
KINDS = ("ids", "text", "shifted", "same", "border")


@dataclass(frozen=True)
class Plan:
    """How much is tried. Lengths and numbers of streams, in tokens; a time that bounds them."""

    plain: int = 8192  # scored as a whole, three times
    dense: int = 128  # length of streams of which every position is tried
    dense_bases: int = 3
    middle: int = 2048  # length of streams of which some positions are tried
    middle_bases: int = 2
    middle_variants: int = 24
    sum_tokens: int = 400_000  # in streams that differ in one id
    claim: int = 2**20  # the most tokens that a claim is checked on
    seconds: float = 270.0
    patience: float = 600.0  # for any start; slow ones get more

    @property
    def causal_tokens(self) -> int:
        """Tokens in the streams for causality."""
        dense = self.dense_bases * self.dense * (self.dense + 1)
        middle = self.middle_bases * self.middle * (self.middle_variants + 1)
        return dense + middle + 2 * self.plain

    @property
    def causal_streams(self) -> int:
        """The number of these streams."""
        middle = self.middle_bases * (self.middle_variants + 1)
        return self.dense_bases * (self.dense + 1) + middle + 2

    def scaled(self, share: float) -> "Plan":
        """Make a plan of about this share of the cost."""
        bounds = {"plain": 512, "dense": 24, "middle": 256, "middle_variants": 12}
        power = {"plain": 1.0, "dense": 0.5, "middle": 0.6, "middle_variants": 0.4}
        sizes = {
            name: max(min(least, getattr(self, name)), int(getattr(self, name) * share**p))
            for (name, least), p in zip(bounds.items(), power.values(), strict=True)
        }
        return replace(self, **sizes)


@dataclass
class Variant:
    """A stream that begins as another: both agree in their first `shared` tokens."""

    base: int
    stream: int
    shared: int
    what: str
    same_length: bool


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


@dataclass
class Position:
    """Streams first ... first + size - 1 hold every id at position t of the same prefix."""

    what: str
    t: int
    first: int
    followed: bool


@dataclass
class Suite:
    """Streams to be scored together, and what is to be compared in them."""

    streams: list[np.ndarray] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)
    positions: list[Position] = field(default_factory=list)

    def add(self, tokens: np.ndarray) -> int:
        """Add a stream and return its number."""
        self.streams.append(np.asarray(tokens, np.uint16))
        return len(self.streams) - 1

    def add_variant(self, base: int, tokens: np.ndarray, what: str) -> None:
        """Add a stream to be compared with another as far as they agree."""
        old, new = self.streams[base], np.asarray(tokens, np.uint16)
        length = min(len(old), len(new))
        differ = np.flatnonzero(old[:length] != new[:length])
        shared = int(differ[0]) if len(differ) else length
        if shared > 1 and not shared == len(old) == len(new):
            number, same = self.add(new), len(old) == len(new)
            self.variants.append(Variant(base, number, shared, what, same))

    @property
    def tokens(self) -> int:
        """The tokens of all streams."""
        return sum(map(len, self.streams))


class Writer:
    """Makes the auditor's text, from the data and from chance that no script can foresee.

    `bos` is what begins a document; -1 if nothing does.
    """

    def __init__(self, tokens: np.ndarray, vocabulary: int, bos: int, seed: int) -> None:
        self.tokens, self.vocabulary, self.bos = tokens, vocabulary, bos
        self.border = np.array([bos] if bos >= 0 else [], np.uint16)
        self.kinds = KINDS if bos >= 0 else [kind for kind in KINDS if kind != "border"]
        self.rng = np.random.default_rng(seed)
        self.borders = np.flatnonzero(tokens == bos)

    def text(self, length: int, start: int | None = None) -> np.ndarray:
        """Take running text of the data from a random place, or from a given one."""
        start = int(self.rng.integers(len(self.tokens))) if start is None else start
        return self.tokens[(start + np.arange(length)) % len(self.tokens)]

    def document(self, length: int) -> np.ndarray:
        """Take the same from the start of a document."""
        start = int(self.rng.choice(self.borders)) if len(self.borders) else None
        return self.text(length, start)

    def ids(self, length: int) -> np.ndarray:
        """Draw random ids of the whole vocabulary."""
        return self.rng.integers(0, self.vocabulary, length).astype(np.uint16)

    def bordered(self, length: int) -> np.ndarray:
        """Join parts of documents of 8 to 40 tokens, each with its BOS."""
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < length:
            part = self.document(int(self.rng.integers(8, 41)))
            parts += [self.border, part[part != self.bos]]
        return np.concatenate(parts)[:length]

    def future(self, kind: str, base: np.ndarray, t: int, length: int) -> np.ndarray:
        """Write what takes the place of base[t:]; its first token is another one than base[t]."""
        makers: dict[str, Callable[[], np.ndarray]] = {
            "ids": lambda: self.ids(length),
            "text": lambda: self.text(length),
            "shifted": lambda: np.resize(np.append(base[t + 1 :], base[: t + 1]), length),
            "same": lambda: np.full(length, self.rng.integers(0, self.vocabulary), np.uint16),
            "border": lambda: np.append(self.border, self.document(length))[:length],
        }
        new = makers[kind]().astype(np.uint16)
        if t < len(base) and length:
            while new[0] == base[t]:
                new[0] = self.rng.integers(0, self.vocabulary)
        return new


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


def build_causal(writer: Writer, plan: Plan, plain: np.ndarray) -> Suite:
    """Build streams for the rules `streams` and `causality`. The first is `plain`."""
    suite, rng = Suite(), writer.rng
    first = suite.add(plain)
    t = int(rng.integers(3 * len(plain) // 4, len(plain)))
    new = writer.future("text", plain, t, len(plain) - t)
    suite.add_variant(first, np.append(plain[:t], new), "long")
    dense = [writer.bordered, writer.ids, writer.document, writer.text]
    for number in range(plan.dense_bases):
        base = dense[number % 4](plan.dense)
        index = suite.add(base)
        for t in range(2, len(base) + 1):
            kind = writer.kinds[(t + number) % len(writer.kinds)]
            new = writer.future(kind, base, t, len(base) - t)
            tail = writer.ids(8) if t == len(base) else new
            suite.add_variant(index, np.append(base[:t], tail), kind)
    middle = [writer.document, writer.bordered]
    for number in range(plan.middle_bases):
        base = middle[number % 2](plan.middle)
        index = suite.add(base)
        for i, t in enumerate(sample_places(base, plan.middle_variants, writer)):
            kind = writer.kinds[i % len(writer.kinds)]
            short = i % 4 == 3  # cut off soon after t; others keep the length
            new = writer.future(kind, base, t, min(1 + i, 40) if short else len(base) - t)
            suite.add_variant(index, np.append(base[:t], new), kind)
    return suite


def build_positions(writer: Writer, fits: Callable[[int, int], bool]) -> Suite:
    """Build streams for `normalization` and `fixed`, as many as fit: at each position every id.

    In a text that is repeated, a memory of what was scored is at work.
    """
    phrase, suite = writer.document(7), Suite()
    again = np.concatenate([phrase, phrase[1:], phrase[1:], phrase[1:4]])
    text, bordered = writer.document(60), writer.bordered(80)
    last = max(np.flatnonzero(bordered[:60] == writer.bos), default=0)
    border = bordered[max(0, last - 14) : last + 1]
    wanted = [
        ("in a repetition", again, 0),
        ("in a repetition of random ids", np.resize(writer.ids(5), 17), 0),
        ("after BOS", writer.border, 0),
        ("in a repetition", again, 6),
        ("in text", text[:34], 0),
        ("at a border", border, 0),
        ("in text", text[:20], 6),
        ("before a border", np.append(border, text[1:9]), 3),
        ("late in a repetition", np.concatenate([text, text[1:], text[1:], text[1:20]]), 0),
    ]
    of_borders = ("after BOS", "at a border", "before a border")
    for what, prefix, more in wanted:
        if what in of_borders and writer.bos < 0:
            continue
        first, cost = len(suite.streams), writer.vocabulary * (len(prefix) + 1 + more)
        if not fits(suite.tokens + cost, first + writer.vocabulary):
            continue
        for v in range(writer.vocabulary):
            suite.add(np.concatenate([prefix, [v], writer.ids(more)]))
        suite.positions.append(Position(what, len(prefix), first, bool(more)))
    return suite


class Audit:
    """One audit: the runs so far, what they showed, and the verdicts."""

    def __init__(self, script: Script, counter: ByteCounter, writer: Writer, plan: Plan) -> None:
        self.script, self.counter, self.writer, self.plan = script, counter, writer, plan
        self.verdicts: dict[str, Verdict] = {}
        self.starts, self.tokens, self.spent = 0, 0, 0.0
        self.per_start, self.per_token, self.per_stream = 0.0, 0.0, 0.0
        self.noise = 0.0  # the largest difference between equal streams
        self.moves: list[Move] = []

    def say(self, rule: str, passed: bool | None, evidence: str) -> bool:
        """Note a verdict; a FAIL stays. Return whether it passed."""
        state = {True: PASS, False: FAIL, None: NOT_CHECKED}[passed]
        if rule not in self.verdicts or self.verdicts[rule].state != FAIL:
            self.verdicts[rule] = Verdict(rule, state, evidence)
        return passed is True

    def failed(self, *rules: str) -> bool:
        """Tell whether one of these rules failed."""
        return any(r in self.verdicts and self.verdicts[r].state == FAIL for r in rules)

    def expected(self, tokens: int, streams: int = 1) -> float:
        """Estimate the seconds that a start should take."""
        return self.per_start + tokens * self.per_token + streams * self.per_stream

    def left(self) -> float:
        """Tell the seconds of the budget that are not spent."""
        return self.plan.seconds - self.spent

    def run(self, streams: list[np.ndarray], apart: bool) -> list[np.ndarray] | None:
        """Start the script once and judge what holds for every start.

        Returns the NLLs, or None if they are not to be had; a rule has failed then.
        """
        tokens = sum(map(len, streams))
        limit = 3 * self.expected(tokens, len(streams)) + 60
        result = self.script.score(streams, apart, max(limit, self.plan.patience))
        self.starts, self.tokens = self.starts + 1, self.tokens + tokens
        self.spent += result.seconds
        if result.problem:
            how = f"with {len(streams)} SCORE_STREAMS" if apart else f"on {tokens} tokens"
            self.say("runs", False, f"{how}: {result.problem}")
            return None
        whole = streams if apart else [np.concatenate(streams)]
        if not self.judge_once(whole, result, apart):
            return None
        self.judge_score(result, apart)
        if not apart:
            self.judge_bytes(whole[0], result)
        self.seconds = result.seconds
        return [nll.astype(np.float64) for nll in result.nll]

    def judge_once(self, streams: list[np.ndarray], result: Result, apart: bool) -> bool:
        """Judge whether every token but each stream's first has one proper NLL."""
        for tokens, nll in zip(streams, result.nll, strict=True):
            if nll.dtype.kind != "f" or nll.shape != (len(tokens) - 1,):
                what = f"{nll.dtype} {nll.shape}, not float of ({len(tokens) - 1},)"
                return self.say("once", False, f"NLLs for {len(tokens)} tokens are {what}")
            if not np.isfinite(nll).all() or (nll < -NEGLIGIBLE).any():
                at = int(np.flatnonzero(~(nll >= -NEGLIGIBLE) | ~np.isfinite(nll))[0])
                return self.say("once", False, f"the NLL of token {at + 1} is {nll[at]}")
        zeros = max(float((nll == 0).mean()) for nll in result.nll)
        if not apart and zeros > ZEROS:
            return self.say("once", False, f"{zeros:.1%} of the NLLs are exactly 0: not scored")
        count = self.tokens - self.starts
        return self.say("once", True, f"one finite NLL for each of about {count} targets")

    def judge_score(self, result: Result, apart: bool) -> None:
        """Judge whether the printed loss is the mean of the saved NLLs."""
        mean = float(np.concatenate(result.nll).mean(dtype=np.float64))
        good = abs(mean - result.loss) <= PRINTED
        where = "over all streams" if apart else "over the stream"
        relation = f"printed val_loss {result.loss:.6f}, mean of the saved NLLs {mean:.6f}"
        self.say("score", good, f"{relation} {where}")

    def judge_bytes(self, tokens: np.ndarray, result: Result) -> None:
        """Judge whether the printed bits per byte are of the bytes that the tokens decode to.

        With the printed loss or with the saved NLLs: if these differ, that is for the rule `score`.
        """
        count, size = len(tokens) - 1, self.counter.count(tokens)
        sums = count * result.loss, float(result.nll[0].sum(dtype=np.float64))
        bpb = result.bpb * math.log(2)
        implied = [total / bpb if bpb else math.inf for total in sums]
        nearest = min(implied, key=lambda value: abs(value - size))
        good = bool(size) and abs(nearest / size - 1) <= PRINTED
        evidence = f"the score counts {nearest:.1f} bytes, the tokens decode to {size}"
        self.say("bytes", good, evidence)

    def compare(self, old: np.ndarray, new: np.ndarray, shared: int, what: str, same: bool) -> None:
        """Note how far the NLLs of two streams differ within the tokens that they share."""
        change = new[: shared - 1] - old[: shared - 1]
        if len(change):
            at = int(np.abs(change).argmax())
            size, nearest = float(abs(change[at])), float(change[-1])
            self.moves.append(Move(size, at + 1, shared, nearest, what, same))

    # ------------------------------------ the starts, in order ------------------------------------

    def plain_runs(self) -> np.ndarray | None:
        """Start with a little, then score text as a whole, again, and with another end.

        Returns the NLLs of the text, or None if there are none to go on with.
        """
        plan, writer = self.plan, self.writer
        little = writer.tokens[:512]
        first = self.run([little], False)
        if first is None:
            return None
        self.per_start = self.seconds
        size = int(plan.plain * min(1.0, max(0.05, 15 / self.per_start)))
        self.plain = plain = writer.tokens[:size]
        nll = self.run([plain], False)
        if nll is None:
            return None
        self.per_token = max(self.seconds - self.per_start, 0.2 * self.seconds) / len(plain)
        self.per_start = min(self.per_start, self.seconds)
        self.compare(nll[0], first[0], min(len(little), len(plain)), "end of the data", False)
        again = self.run([plain], False)
        if again is None or not self.judge_repeat(nll[0], again[0]):
            return None
        t = int(writer.rng.integers(len(plain) // 2, len(plain)))
        other = np.append(plain[:t], writer.future("text", plain, t, len(plain) - t))
        changed = self.run([other], False)
        if changed is None:
            return None
        self.compare(nll[0], changed[0], t, "text, the whole data", True)
        return nll[0]

    def judge_repeat(self, one: np.ndarray, two: np.ndarray) -> bool:
        """Judge whether two runs on the same tokens agree."""
        most, mean = float(np.abs(two - one).max()), float((two - one).mean())
        self.noise = max(self.noise, most)
        good = most <= LOUDEST and abs(mean) <= NEGLIGIBLE
        evidence = f"two runs on {len(one) + 1} tokens: NLLs differ by {most:.2g} at most"
        return self.say("repeatability", good, f"{evidence}, by {mean:.2g} in the mean")

    def speed_of_streams(self) -> bool:
        """Learn what a stream costs, by short ones."""
        lengths = self.writer.rng.integers(12, 48, 32).tolist()
        streams = [self.writer.document(length) for length in lengths]
        if self.run(streams, True) is None:
            return False
        more = self.seconds - self.expected(sum(lengths))
        self.per_stream = max(more, 0.0) / len(streams) + 1e-4
        return True

    def stream_runs(self, nll: np.ndarray) -> bool:
        """Score the streams for causality together, and half of them in another company.

        Returns whether streams are scored each for itself.
        """
        plan = self.plan
        cost = self.expected(plan.causal_tokens, plan.causal_streams)
        share = min(1.0, 0.3 * self.left() / cost)
        suite = build_causal(self.writer, plan.scaled(share) if share < 1 else plan, self.plain)
        numbers = range(len(suite.streams))
        scored = self.run_mixed(suite, numbers, 0)
        if scored is None:
            return False
        half = self.writer.rng.permutation(numbers[2:])[: len(numbers) // 2].tolist()
        again = self.run_mixed(suite, half, 8)
        if again is None:
            return False
        pairs = [(f"stream {n}", scored[n], again[n]) for n in half]
        pairs.append(("the text with SCORE_STREAMS=1 and without", nll, scored[0]))
        if not self.judge_streams(pairs):
            return False
        for v in suite.variants:
            self.compare(scored[v.base], scored[v.stream], v.shared, v.what, v.same_length)
        return True

    def run_mixed(
        self, suite: Suite, numbers: Sequence[int], strangers: int
    ) -> dict[int, np.ndarray] | None:
        """Score streams of a suite in a random order, and some strangers among them.

        Returns the NLLs by number.
        """
        lengths = self.writer.rng.integers(12, 400, strangers).tolist()
        streams = [suite.streams[n] for n in numbers] + [self.writer.text(n) for n in lengths]
        order = self.writer.rng.permutation(len(streams)).tolist()
        nll = self.run([streams[i] for i in order], True)
        if nll is None:
            return None
        places = {i: place for place, i in enumerate(order)}
        return {n: nll[places[i]] for i, n in enumerate(numbers)}

    def judge_streams(self, pairs: list[tuple[str, np.ndarray, np.ndarray]]) -> bool:
        """Judge whether equal streams in other company have equal NLLs."""
        sizes = [float(np.abs(new - old).max()) for _, old, new in pairs]
        worst = int(np.argmax(sizes))
        mean = float(np.concatenate([new - old for _, old, new in pairs]).mean())
        self.noise = max(self.noise, sizes[worst])
        good = sizes[worst] <= LOUDEST and abs(mean) <= NEGLIGIBLE
        evidence = f"{len(pairs)} streams in other order and company: NLLs differ by "
        evidence += f"{sizes[worst]:.2g} at most ({pairs[worst][0]}), by {mean:.2g} in the mean"
        return self.say("streams", good, evidence)

    def tolerances(self) -> tuple[float, float]:
        """Measure how far rounding moves an NLL: in streams of the same length, and of another."""
        floor = ULPS * float(np.spacing(np.float32(16)))
        same = min(max(4 * self.noise, floor), LOUDEST)
        sizes = [move.size for move in self.moves if not move.same_length]
        typical = 8 * float(np.median(sizes)) if sizes else 0.0
        return same, max(same, min(typical, 0.05))

    def judge_causality(self) -> bool:
        """Judge whether nothing before a replaced future moved."""
        same, other = self.tolerances()
        limits = [same if move.same_length else other for move in self.moves]
        bad = [m for m, limit in zip(self.moves, limits, strict=True) if m.size > limit]
        near = [move.nearest for move in self.moves if move.same_length]
        drift = float(np.mean(near)) if near else 0.0
        tolerance = f"tolerance {same:.2g}, {other:.2g} where lengths differ"
        if bad:
            m = max(bad, key=lambda move: move.size)
            evidence = f"{len(bad)} of {len(limits)} replaced futures moved NLLs before them: from"
            evidence += f" token {m.shared} on ({m.what}) that of token {m.at} by {m.size:.2g}"
            return self.say("causality", False, f"{evidence} ({tolerance})")
        if abs(drift) > max(NEGLIGIBLE, same / 16):
            evidence = f"replaced futures move the NLL just before them by {drift:.2g} in the mean"
            return self.say("causality", False, evidence)
        most, longest = max(m.size for m in self.moves), max(m.shared for m in self.moves)
        evidence = f"{len(limits)} futures replaced after 2 to {longest} tokens: NLLs before them"
        return self.say("causality", True, f"{evidence} moved by {most:.2g} at most ({tolerance})")

    def sum_runs(self) -> None:
        """Put every id at some positions, and judge the rules `normalization` and `fixed`."""
        seconds, most, vocabulary = self.left(), self.plan.sum_tokens, self.counter.size

        def fits(tokens: int, streams: int) -> bool:
            return tokens <= most and self.expected(tokens, streams) <= seconds

        suite = build_positions(self.writer, fits)
        if not suite.positions:
            cost = self.expected(vocabulary * 2, vocabulary)
            why = f"a position takes {cost:.0f} s and more; {max(seconds, 0):.0f} s were left"
            self.say("normalization", None, why)
            return
        scored = self.run_mixed(suite, range(len(suite.streams)), 0)
        if scored is None:
            return
        ends = [p for p in suite.positions if not p.followed]
        if self.judge_sums("normalization", ends, scored):
            followed = [p for p in suite.positions if p.followed]
            if followed:
                self.judge_sums("fixed", followed, scored)
            else:
                self.say("fixed", None, "no time was left for it")

    def judge_sums(
        self, rule: str, positions: list[Position], scored: dict[int, np.ndarray]
    ) -> bool:
        """Whether the probabilities of all ids sum to 1 at each position."""
        same, other = self.tolerances()
        limit, found = PRINTED + max(same, min(other, NEGLIGIBLE)), []
        for p in positions:
            values = [scored[p.first + v][p.t - 1] for v in range(self.counter.size)]
            found.append((math.fsum(np.exp(-np.array(values))), p))
        total, worst = max(found, key=lambda pair: abs(math.log(pair[0] or 1e-300)))
        good = abs(math.log(total or 1e-300)) <= limit
        lengths = ", ".join(f"{p.what} ({p.t})" for _, p in found)
        evidence = f"{self.counter.size} probabilities sum to {total:.6f} {worst.what}, after "
        evidence += f"{worst.t} tokens, the worst of {len(found)} positions: {lengths}"
        after = "" if rule == "normalization" else "; each id with another future"
        return self.say(rule, good, f"{evidence}{after} (tolerance {limit:.2g})")

    def claim_run(self, folder: Path, data: Path, nll: np.ndarray) -> None:
        """Score what a log of the record says it scored, if the data are these, and compare.

        Then once more with another end.
        """
        claims, why = find_claims(folder), "no log states val_tokens, val_bytes and a final score"
        for tokens, _, _, _ in claims[:1]:
            cost = self.expected(tokens)
            if tokens > self.plan.claim or cost > 0.3 * self.left():
                why = f"the logs' score is over {tokens} tokens: about {cost:.0f} s here"
                claims = []
        if not claims:
            self.say("claim", None, why)
            return
        text = read_validation(data, claims[0][0])
        size = self.counter.count(text)
        same = [c for c in claims if (c[0], c[1]) == (len(text), size)]
        if not same:
            why = f"DATA is not what the logs scored: {claims[0][1]} bytes there, {size} here"
            self.say("claim", None, why)
            return
        scored = self.run([text], False)
        if scored is None:
            return
        bpb = float(scored[0].sum()) / math.log(2) / size
        nearest = min(same, key=lambda c: abs(c[2] - bpb))
        good = abs(nearest[2] - bpb) <= NEGLIGIBLE
        self.say("claim", good, f"{bpb:.6f} bits per byte; {nearest[3]} states {nearest[2]:.6f}")
        shared = min(len(text), len(self.plain))
        self.compare(nll, scored[0], shared, "end of the data", len(text) == len(self.plain))
        if len(text) > 1.5 * len(self.plain) and self.expected(len(text)) < 0.2 * self.left():
            t = int(self.writer.rng.integers(len(self.plain), len(text)))
            new = self.writer.future("text", text, t, len(text) - t)
            changed = self.run([np.append(text[:t], new)], False)
            if changed is not None:
                self.compare(scored[0], changed[0], t, "text, all that the logs scored", True)

    def all(self, folder: Path, data: Path) -> None:
        """Go through all starts, each unless a rule before it leaves nothing to learn."""
        nll = self.plain_runs()
        if nll is not None:
            self.claim_run(folder, data, nll)
        if self.failed("once", "runs", "repeatability"):
            return
        apart = self.speed_of_streams() and self.stream_runs(nll)
        if self.failed("once", "runs"):
            return
        if self.judge_causality() and apart:
            self.sum_runs()


def find_claims(folder: Path) -> list[tuple[int, int, float, str]]:
    """Find tokens, bytes, bits per byte and file name of the final scores that logs state."""
    claims = []
    for log in read_logs(folder):
        seen = re.findall(r"^val_tokens:(\d{1,12}) val_bytes:(\d{1,12})", log.body, re.MULTILINE)
        if seen and log.finals:
            name = log.path.name
            claims.append((int(seen[-1][0]), int(seen[-1][1]), log.finals[-1][2], name))
    return claims


def check(
    folder: Path,
    artifact: Path,
    data: Path,
    tokenizer: Path,
    plan: Plan | None = None,
    seed: int | None = None,
    isolated: bool = True,
) -> list[Verdict]:
    """Audit the script in `folder` with this artifact.

    The costs are told on standard error before it starts. `seed` repeats an audit; by default no
    two are alike.
    """
    plan = plan or Plan()
    seed = secrets.randbits(32) if seed is None else seed
    try:
        tokens, counter = read_validation(data, max(plan.plain, 2**20)), ByteCounter(tokenizer)
        script = Script(folder, artifact, tokenizer, data, isolated)
        if len(tokens) < 64:
            raise ValueError(f"{data}: {len(tokens)} validation tokens; at least 64 are needed")
        counter.count(tokens)
    except (OSError, ValueError, RuntimeError) as error:
        return [Verdict(rule, NOT_CHECKED, " ".join(str(error).split())) for rule in RULES]
    audit = Audit(script, counter, Writer(tokens, counter.size, counter.bos, seed), plan)
    most = 4 * plan.plain + 2 * plan.claim + 2 * plan.causal_tokens + plan.sum_tokens
    print(
        f"dynamic audit, seed {seed}: at most 9 starts of {folder / SCRIPT} ({script.apart}) on "
        f"{most} tokens, about {plan.seconds:.0f} s; fewer tokens where the script is slow",
        file=sys.stderr,
    )
    audit.all(folder, data)
    runs = f"{audit.starts} starts, {audit.tokens} tokens, {audit.spent:.0f} s; {script.apart}"
    if counter.bos < 0:
        runs += "; the tokenizer has no BOS, so nothing was tried at borders of documents"
    audit.say("runs", True, f"{runs}; seed {seed}")
    for rule in RULES:
        broken = [name for name in NEEDS.get(rule, RULES[:2]) if audit.failed(name)]
        if rule not in audit.verdicts:
            audit.say(rule, None, f"needs {' and '.join(broken)}" if broken else "not reached")
    return [audit.verdicts[rule] for rule in RULES]
