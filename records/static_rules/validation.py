"""What the validation text must be: counted right, and not trained on."""

import math
import re

from reading import FAIL, NOT_CHECKED, PASS, Log

from static_rules.record import Finding, Record, fact, join

FINEWEB_BYTES = 151_080_000  # of the whole validation set, whatever the tokenizer
LEAKY_SHARDS = 1499  # of CaseOps data that was built with --val-docs 10000
LOWEST_BPB = 1  # no score below it has held
TRAINED_ON_VALIDATION = re.compile(
    r"^[ \t]*(train_files|train_loader)\b.*fineweb_val", re.MULTILINE
)
# Up to three words, and then the confession.
CONFESSION = re.compile(
    r"((?:\S+\s+){0,3})\b(train(?:s|ed)? on (?:the )?(?:validation|val\b|fineweb_val)\S*)",
    re.IGNORECASE,
)
DENIAL = re.compile(r"\b(no|not|never|nor|without|cannot|nothing)\b|n't\b", re.IGNORECASE)


def is_fineweb(log: Log) -> bool:
    """Tell whether a log names the challenge's data."""
    names = (*log.settings.values(), *re.findall(r"fineweb10B\w*", log.body))
    return any("fineweb10B" in name for name in names)


# ------------------------------------ bytes ------------------------------------


def check_val_bytes(record: Record) -> Finding:
    """Check that the bytes that the score is per are those of the text."""
    sizes = [(log, implied_bytes(log)) for log in record.claimed]
    findings = [judge(log, size, record.is_timed) for log, size in sizes if math.isfinite(size)]
    for state in (FAIL, NOT_CHECKED, PASS):
        texts = [text for found, text in findings if found == state]
        if texts:
            return state, join(texts[:3])
    return NOT_CHECKED, "no log states both val_tokens and an exact score"


def implied_bytes(log: Log) -> float:
    """Tell the bytes of text that a log's last score was divided by; nan if it does not say.

    BPB = tokens * loss / ln 2 / bytes, solved for the bytes.
    """
    if not log.finals:
        return math.nan
    _, loss, bpb = log.finals[-1]
    if not (bpb > 0 and loss > 0):
        return math.nan
    return val_tokens(log) * loss / math.log(2) / bpb


def val_tokens(log: Log) -> float:
    """Read the number of validation tokens that a log states; nan without one."""
    own = fact(log, r"\bval_tokens\s*:\s*([\d,]+)")
    return own if own > 0 else fact(log, r"val_loader:.*?\btokens:\s*([\d,]+)")


def judge(log: Log, size: float, timed: bool) -> Finding:
    """Compare one log's bytes with what it states, or with the known size of the whole set."""
    stated = stated_bytes(log)
    if stated > 0:
        # Ours count the first token, which is only context and has no loss.
        without_first = size * (1 - 1 / val_tokens(log))
        size = min(size, without_first, key=lambda bytes_: abs(bytes_ - stated))
    text = f"{log.path.name}: loss and BPB are of {size:,.0f} bytes"
    if stated > 0 and abs(size / stated - 1) > 1e-6:
        return FAIL, f"{text}, but it states {stated:,.0f}"
    if is_fineweb(log):
        return judge_fineweb(log, size, timed, text)
    unknown = "how much the validation text has is not known here"
    if stated > 0:
        return PASS, f"{text}, as it states; {unknown}"
    return NOT_CHECKED, f"{text}; {unknown}"


def stated_bytes(log: Log) -> float:
    """Read the bytes of validation text that a log states; nan without them."""
    original = fact(log, r"\boriginal_bytes\s*:\s*(\d+)")
    return original if original > 0 else fact(log, r"\bval_bytes\s*:\s*(\d+)")


def judge_fineweb(log: Log, size: float, timed: bool, text: str) -> Finding:
    """Compare one log's bytes with those of FineWeb's whole validation set."""
    whole, share = f"about {FINEWEB_BYTES:,}", size / FINEWEB_BYTES
    if abs(share - 1) < 0.003:
        return PASS, f"{text}; the whole validation set has {whole}{cut_tail(log)}"
    if 0.975 < share < 1.025:
        return NOT_CHECKED, f"{text}, near {whole}: another export of the data, or a wrong count"
    kind = "only a part was scored, or" if share < 1 else "it cannot be:"
    state = FAIL if timed or share > 1 else NOT_CHECKED
    return state, f"{text}, the whole set has {whole}: {kind} bytes are counted wrongly"


def cut_tail(log: Log) -> str:
    """Tell of a number of tokens that was rounded down to whole sequences."""
    tokens, length = val_tokens(log), fact(log, r"(?:train|eval)_seq_len\s*[:=]\s*(\d+)")
    is_cut = length > 1 and tokens > 0 and tokens % length == 0
    return f"; its tail of up to {length - 1:.0f} tokens was left out" if is_cut else ""


# ------------------------------------ leakage ------------------------------------


def check_leakage(record: Record) -> Finding:
    """Check that there is no known fingerprint of training on validation text."""
    found = [text for log in record.logs for text in fingerprints(log)]
    found += confessions(record)
    if found:
        return FAIL, join(found)
    fineweb = [log for log in record.logs if is_fineweb(log)]
    counts = [fact(log, r"\btrain_shards\s*:\s*(\d+)") for log in fineweb]
    seen = [f"train_shards {count:g}" for count in counts if not math.isnan(count)]
    lowest = min((bpb for log in fineweb for *_, bpb in log.finals), default=math.inf)
    if lowest < LOWEST_BPB:
        reason = "below every score that held; no known fingerprint says why"
        return NOT_CHECKED, join([f"{lowest} BPB is {reason}", *seen])
    if seen:
        return PASS, f"none of the known fingerprints: {join(seen)}"
    return NOT_CHECKED, "no log states the number of training shards of FineWeb"


def fingerprints(log: Log) -> list[str]:
    """List the marks of training on validation text in a log."""
    found, name = [], log.path.name
    if TRAINED_ON_VALIDATION.search(log.body):
        found.append(f"{name}: its training files are fineweb_val")
    caseops = re.search(r"caseops|lossless_caps", log.body + log.source, re.IGNORECASE)
    if caseops and fact(log, r"\btrain_shards\s*:\s*(\d+)") == LEAKY_SHARDS:
        found.append(
            f"{name}: train_shards 1499, the mark of CaseOps data built with --val-docs 10000, "
            "whose training shards hold 40,000 of the 50,000 validation documents"
        )
    return found


def confessions(record: Record) -> list[str]:
    """List words of submission.json that say that training used validation text."""
    texts = [text[:10_000] for text in record.raw.values() if isinstance(text, str)]
    found = [match for text in texts for match in CONFESSION.finditer(text)]
    return [f"submission.json says {m[2]!r}" for m in found if not DENIAL.search(m[1])]
