"""What the validation text must be: counted right, and not trained on."""

import math
import re

from reading import FAIL, NOT_CHECKED, PASS, Log

from static_rules.record import Finding, Record, fact, join

FINEWEB_BYTES = 151_080_000  # of the whole validation set, whatever the tokenizer


def check_val_bytes(record: Record) -> Finding:
    """The bytes that the score is per are those of the text."""
    known = [(log, implied_bytes(log)) for log in record.claimed]
    known = [(log, size) for log, size in known if math.isfinite(size)]
    if not known:
        return NOT_CHECKED, "no log states both val_tokens and an exact score"
    findings = [judge_bytes(log, size, record.is_timed) for log, size in known]
    for state in (FAIL, NOT_CHECKED, PASS):
        if chosen := [text for found, text in findings if found == state]:
            return state, join(chosen[:3])
    return NOT_CHECKED, "nothing to compare"


def judge_bytes(log: Log, size: float, timed: bool) -> Finding:
    """One log's bytes against what it states, or against the known size of the whole set."""
    original = fact(log, r"\boriginal_bytes\s*:\s*(\d+)")
    stated = original if original > 0 else fact(log, r"\bval_bytes\s*:\s*(\d+)")
    if stated > 0:  # ours count the first token, which is only context and has no loss
        size = min(size, size * (1 - 1 / val_tokens(log)), key=lambda bytes_: abs(bytes_ - stated))
    text = f"{log.path.name}: loss and BPB are of {size:,.0f} bytes"
    if stated > 0 and abs(size / stated - 1) > 1e-6:
        return FAIL, f"{text}, but it states {stated:,.0f}"
    if not is_fineweb(log):
        state = PASS if stated > 0 else NOT_CHECKED
        same = ", as it states" if stated > 0 else ""
        return state, f"{text}{same}; how much the validation text has is not known here"
    whole, share = f"about {FINEWEB_BYTES:,}", size / FINEWEB_BYTES
    if abs(share - 1) < 0.003:
        return PASS, f"{text}; the whole validation set has {whole}{cut_tail(log)}"
    if 0.975 < share < 1.025:
        return NOT_CHECKED, f"{text}, near {whole}: another export of the data, or a wrong count"
    kind = "only a part was scored, or" if share < 1 else "it cannot be:"
    verdict = FAIL if timed or share > 1 else NOT_CHECKED
    return verdict, f"{text}, the whole set has {whole}: {kind} bytes are counted wrongly"


def implied_bytes(log: Log) -> float:
    """The bytes of text that a log's last score was divided by, or nan."""
    if not log.finals:
        return math.nan
    _, loss, bpb = log.finals[-1]
    return val_tokens(log) * loss / math.log(2) / bpb if bpb > 0 and loss > 0 else math.nan


def val_tokens(log: Log) -> float:
    """The number of validation tokens that a log states, or nan."""
    own = fact(log, r"\bval_tokens\s*:\s*([\d,]+)")
    return own if own > 0 else fact(log, r"val_loader:.*?\btokens:\s*([\d,]+)")


def is_fineweb(log: Log) -> bool:
    """Whether a log names the challenge's data."""
    names = (*log.settings.values(), *re.findall(r"fineweb10B\w*", log.body))
    return any("fineweb10B" in name for name in names)


def cut_tail(log: Log) -> str:
    """What is to say of a number of tokens that was rounded down to whole sequences."""
    tokens, length = val_tokens(log), fact(log, r"(?:train|eval)_seq_len\s*[:=]\s*(\d+)")
    cut = length > 1 and tokens > 0 and tokens % length == 0
    return f"; its tail of up to {length - 1:.0f} tokens was left out" if cut else ""


def check_leakage(record: Record) -> Finding:
    """No known fingerprint of training on validation text."""
    found, seen = [], []
    for log in record.logs:
        name, shards = log.path.name, fact(log, r"\btrain_shards\s*:\s*(\d+)")
        trained_on = re.search(r"^[ \t]*(train_files|train_loader)\b.*fineweb_val", log.body, re.M)
        caseops = re.search(r"caseops|lossless_caps", log.body + log.source, re.IGNORECASE)
        if trained_on:
            found.append(f"{name}: its training files are fineweb_val")
        if shards == 1499 and caseops:
            found.append(
                f"{name}: train_shards 1499, the mark of CaseOps data built with --val-docs 10000, "
                "whose training shards hold 40,000 of the 50,000 validation documents"
            )
        elif is_fineweb(log) and not math.isnan(shards):
            seen.append(f"train_shards {shards:g}")
    found += confessions(record)
    if found:
        return FAIL, join(found)
    lowest = min(
        (bpb for log in record.logs if is_fineweb(log) for *_, bpb in log.finals), default=9
    )
    if lowest < 1:
        reason = "below every score that held; no known fingerprint says why"
        return NOT_CHECKED, join([f"{lowest} BPB is {reason}", *seen])
    if seen:
        return PASS, f"none of the known fingerprints: {join(seen)}"
    return NOT_CHECKED, "no log states the number of training shards of FineWeb"


def confessions(record: Record) -> list[str]:
    """Words of submission.json that say that training used validation text."""
    texts = record.submission.raw.values() if record.submission else ()
    pattern = r"((?:\S+\s+){0,3})\b(train(?:s|ed)? on (?:the )?(?:validation|val\b|fineweb_val)\S*)"
    texts = [text[:10_000] for text in texts if isinstance(text, str)]
    found = [match for text in texts for match in re.finditer(pattern, text, re.IGNORECASE)]
    denied = re.compile(r"\b(no|not|never|nor|without|cannot|nothing)\b|n't\b", re.IGNORECASE)
    return [f"submission.json says {m[2]!r}" for m in found if not denied.search(m[1])]
