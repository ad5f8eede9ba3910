"""The bytes that a score is per: does the sidecar count those of the text, document by document?

A sidecar is believed by every script, and 0.4% too much in it is worth more than most techniques.
So all of it is compared with what the tokens decode to; of CaseOps data (techniques.md 2.14), with
the text before it was written with small letters.

Of a tokenizer that keeps the text, both must agree in every document. One that normalizes it has
joined blanks and replaced characters by others, and only the original text would tell how many. So
the difference is told, and bounded. Text of the web has 0.01% of it; prose with blank lines and
indented parts 0.6%, all of it in tokens with a blank: in others, 0.01%.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import case_ops
import numpy as np
from streams import ByteCounter, read_sizes, read_validation, shard_size, sidecar_shards
from streams import validation_shards as shards_of

from dynamic_rules.plan import NEGLIGIBLE
from dynamic_rules.session import Session

MOST_NORMALIZED = 0.01  # share of the bytes by which sidecar and text may differ in all
MOST_ELSEWHERE = NEGLIGIBLE  # of which so much may be in tokens without a blank
CUT = 9  # bytes by which a document may be off whose first or last character is cut
BATCH = 2**18  # tokens
RARE = 5e-4  # share of bytes of characters without a meaning, or of marks, that means nothing
PRIVATE = "[\ue000-\uf8ff\U000f0000-\U0010fffd]"


@dataclass
class Recount:
    """What a sidecar states and what its tokens' text has, in bytes."""

    documents: int = 0
    stated: int = 0
    text: int = 0  # of the original, or of what normalization left of it
    apart: int = 0  # the differences of all documents, whatever their sign
    elsewhere: int = 0  # what is too much, and is in tokens without a blank
    unknown: int = 0  # that the sidecar gives to unknown pieces
    wrong: int = 0  # documents
    faults: dict[str, str] = field(default_factory=dict)  # the first of each kind

    def fault(self, kind: str, text: str) -> None:
        """Note a fault, unless there is one of the kind."""
        self.faults.setdefault(kind, text)


@dataclass(frozen=True)
class Part:
    """Some documents: their tokens and sizes, where each starts, and which one is the first."""

    tokens: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    number: int

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Add up each document's values."""
        return np.add.reduceat(values, self.starts)

    def document_of(self, place: int) -> int:
        """Tell the number of the document that a token is of."""
        return self.number + int(np.searchsorted(self.starts, place, "right")) - 1


def judge_sidecar(session: Session, data: Path) -> None:
    """Judge whether the sidecars in a data folder count the bytes of the text.

    Leaves in the session whose sizes its runs are to use, and how many bytes the whole text has.
    """
    counter, whole = session.counter, sum(map(shard_size, shards_of(data)))
    if counter.case_ops:
        session.sidecar = "own"
    else:
        judge_private(session)
    if not sidecar_shards(data):
        if counter.case_ops:
            why = f"{data} has no fineweb_val_bytes_*.bin: CaseOps data needs the original bytes"
            session.say("bytes", False, f"no sidecar: {why} of each token")
        return
    problem = shape_problem(data)
    if problem:
        session.say("bytes", False, problem)
        return
    tokens, sizes = read_validation(data, whole), read_sizes(data, whole)
    assert sizes is not None
    found = recount(counter, tokens, sizes)
    state = judge_recount(session, found)
    if counter.is_exact and not found.unknown:
        session.sidecar = "own"
        session.text_bytes = found.text - int(counter.sizes(tokens[:1])[0])
        of = f"{found.documents} documents' {kind_of(counter)}"
        session.recounted = f"by {of} there are"
    elif state:
        session.sidecar = "data"
        session.recounted = "the sidecar has"
        session.text_bytes = found.stated - int(sizes[0])


def shape_problem(data: Path) -> str:
    """Tell how sidecars do not fit their shards; "" if they do."""
    try:
        stated = list(map(shard_size, sidecar_shards(data)))
    except (OSError, ValueError) as error:
        return f"the sidecar cannot be read: {error}"
    counts = list(map(shard_size, shards_of(data)))
    if sum(stated) != sum(counts):
        return f"the sidecar ends after {sum(stated)} of {sum(counts)} tokens"
    return "" if stated == counts else f"sidecars of {stated} tokens, shards of {counts}"


def judge_recount(session: Session, found: Recount) -> bool:
    """Judge what a sidecar states; whether its numbers can be used."""
    counter = session.counter
    evidence = f"the sidecar counts {found.stated} bytes, the tokens' {kind_of(counter)} has "
    evidence += f"{found.text} ({found.stated / max(found.text, 1) - 1:+.3%})"
    if found.wrong:
        evidence += f"; {found.wrong} of {found.documents} documents differ"
    share = found.apart / max(found.text, 1)
    if not counter.is_exact or found.unknown:
        of = f"; {found.unknown} are of unknown pieces" if found.unknown else ""
        evidence += f"; the tokenizer changes text{of}: the original would tell which is right"
        if share > MOST_NORMALIZED:
            found.fault("bound", f"more than {MOST_NORMALIZED:.0%} is not by normalization")
        elsewhere = found.elsewhere / max(found.text, 1)
        if elsewhere > MOST_ELSEWHERE:
            where = f"{elsewhere:.3%} too much is in tokens without a blank"
            found.fault("elsewhere", f"{where}: normalization does not explain it")
    if found.faults:
        return session.say("bytes", False, "; ".join([*found.faults.values(), evidence]))
    if found.apart:
        session.warn("bytes", evidence)
    return True


def kind_of(counter: ByteCounter) -> str:
    """Tell which text a sidecar should count."""
    return "text before CaseOps" if counter.case_ops else "text"


# ------------------------------------ document by document ------------------------------------


def recount(counter: ByteCounter, tokens: np.ndarray, sizes: np.ndarray) -> Recount:
    """Compare a sidecar with the text of every document."""
    found = Recount()
    for part in parts_of(tokens, sizes, counter.bos):
        check_tokens(found, counter, part)
        check_documents(found, counter, part)
    return found


def parts_of(tokens: np.ndarray, sizes: np.ndarray, bos: int) -> Iterator[Part]:
    """Cut data into parts of whole documents."""
    starts = np.union1d([0], np.flatnonzero(tokens == bos))
    groups = np.flatnonzero(np.diff(starts // BATCH, prepend=-1))
    for first, last in zip(groups, [*groups[1:], len(starts)], strict=True):
        begin = starts[first]
        end = starts[last] if last < len(starts) else len(tokens)
        own = sizes[begin:end].astype(np.int64)
        yield Part(tokens[begin:end], own, starts[first:last] - begin, int(first))


def check_tokens(found: Recount, counter: ByteCounter, part: Part) -> None:
    """Check single tokens: BOS and marks have no bytes, small letters of CaseOps text one each.

    Of normalized text, blanks that were stripped may be at the mark behind them.
    """
    tokens, sizes = part.tokens, part.sizes
    silent = counter.edge[tokens] & (tokens != counter.unknown)
    kinds = {"a control token": silent & (sizes > 0)}
    marks = counter.acting(tokens)
    counted = marks & (sizes > (0 if counter.is_exact else case_ops.MARK_BYTES - 1))
    kinds["a mark of CaseOps"] = counted & (counter.is_exact or counted.sum() > RARE * marks.sum())
    if counter.case_ops and counter.is_exact:
        kinds["small letters"] = counter.letters[tokens] & (sizes != counter.own[tokens])
    for kind, places in kinds.items():
        if places.any():
            place = int(np.flatnonzero(places)[0])
            where = f"document {part.document_of(place)} counts {sizes[place]} bytes for {kind}"
            should = counter.sizes(tokens[: place + 1])[place]
            found.fault(kind, f"{where}, {shown(counter, tokens[place])}, which has {should}")


def shown(counter: ByteCounter, token: int) -> str:
    """Show a token."""
    return f"{counter.sp.id_to_piece(int(token))!a}" if counter.sp else f"id {token}"


def check_documents(found: Recount, counter: ByteCounter, part: Part) -> None:
    """Compare each document's sum with its text, and note where both are unlike."""
    own = counter.sizes(part.tokens)
    stated, natural = part.sums(part.sizes), part.sums(own)
    unknown = part.sums(np.where(part.tokens == counter.unknown, part.sizes, 0))
    rigid = ~(counter.blank | counter.edge)[part.tokens]
    firm = part.sums(np.where(rigid, part.sizes - own, 0))
    documents = np.split(part.tokens, part.starts[1:])
    for i, text in enumerate(decoded_sizes(found, counter, documents, part.number)):
        starts_inside = part.number + i == 0 and documents[i][0] != counter.bos and counter.bos >= 0
        size = int(natural[i]) if text is None else text
        off = int(stated[i]) - size
        found.documents += 1
        found.stated += int(stated[i])
        found.text += size
        found.apart += abs(off)
        found.unknown += int(unknown[i])
        found.elsewhere += max(0, min(off, int(firm[i])))
        found.wrong += off != 0
        if text is not None and text != natural[i] and not starts_inside:
            what = f"the tokens of document {part.number + i} have {natural[i]} bytes, "
            found.fault("letters", f"{what}but decode to {text}: some form no character")
        if counter.is_exact and abs(off - int(unknown[i])) > CUT * starts_inside:
            transformed = size + case_ops.MARK_BYTES * int(counter.acting(documents[i]).sum())
            why = ", as many as with the marks of CaseOps" * bool(stated[i] == transformed)
            what = f"document {part.number + i} counts {stated[i]} bytes{why}, its text has {size}"
            found.fault("document", what)


def decoded_sizes(
    found: Recount, counter: ByteCounter, documents: list[np.ndarray], first: int
) -> Iterator[int | None]:
    """Count the bytes that documents decode to; None for those that tell nothing by it.

    These are what is no CaseOps text, which is noted, and what normalization has changed anyway.
    """
    if counter.sp is None or not (counter.is_exact or counter.case_ops):
        yield from [None] * len(documents)
        return
    for number, text in enumerate(counter.texts(documents), first):
        try:
            original = case_ops.invert(text, not counter.is_exact) if counter.case_ops else text
        except case_ops.MalformedError as error:
            what = f"document {number} is no CaseOps text at {error}: it cannot be inverted"
            found.fault("malformed", what)
            yield None
            continue
        if counter.case_ops and counter.is_exact and case_ops.write(original) != text:
            found.fault("other", f"document {number} is not what CaseOps makes of its text")
        yield len(original.encode()) if counter.is_exact else None


def judge_private(session: Session) -> None:
    """Judge whether characters without a meaning, such as marks of capitals, count as text.

    Three bytes for each mark make a score a sixth better. A tokenizer that lacks one of the four is
    none of CaseOps, and what it counts is text: but no text has as many of these.
    """
    counter, tokens = session.counter, session.writer.tokens
    if counter.sp is None:
        return
    text = "".join(counter.texts(np.array_split(tokens, 1 + len(tokens) // BATCH)))
    found = Counter(re.findall(PRIVATE, text))
    size = sum(len(char.encode()) * count for char, count in found.items())
    share = size / max(len(text.encode()), 1)
    if share <= RARE:
        return
    marks = sum(found[mark] for mark in case_ops.MARKS)
    evidence = f"{share:.2%} of the bytes are of characters that no text has, such as "
    evidence += ", ".join(f"U+{ord(char):04X}" for char, _ in found.most_common(4))
    if 2 * marks > found.total():
        why = "these are marks of CaseOps, of which a tokenizer of its data has four as pieces"
        session.say("bytes", False, f"{evidence}: {why}")
        return
    session.warn("bytes", evidence)
