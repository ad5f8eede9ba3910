"""What the validation text must be: counted right, and not trained on."""

import ast
import math
import re
from collections.abc import Iterator

from reading import FAIL, NOT_CHECKED, PASS, WARN, Log, to_number

from static_rules.record import Finding, Record, fact, join

FINEWEB_BYTES = 151_080_000  # of the whole validation set, whatever the tokenizer
# Bytes a token on that set, by what logs call the data of each tokenizer.
RATES = {"sp1024": 2.436, "sp4096": 3.320, "caseops": 3.157}
RATES |= {"lossless_caps": 3.157, "sp8192": 3.727}  # CaseOps data names sp8192 too
SAME_RATE, NEAR_RATE = 0.004, 0.03
SAME_SIZE, NEAR_SIZE, NEAR_SHARE = 0.003, 0.05, 0.025
DATASET = re.compile(r"fineweb10B\w{0,80}")
DECIMAL = re.compile(r"\d{1,3}\.\d{1,20}")
LEAKY_SHARDS = 1499  # of CaseOps data that was built with --val-docs 10000
LOWEST_BPB = 1  # no score below it has held
TRAINED_ON_VALIDATION = re.compile(
    r"^[ \t]*(train_files|train_loader)\b.*fineweb_val", re.MULTILINE
)
CONFESSION = re.compile(
    r"\btrain(?:s|ed)? on (?:the )?(?:validation|val\b|fineweb_val)", re.IGNORECASE
)
DENIAL = re.compile(r"\b(no|not|never|nor|without|cannot|nothing)\b|n't\b", re.IGNORECASE)


def is_fineweb(log: Log) -> bool:
    """Tell whether a log names the challenge's data."""
    return "fineweb10B" in log.body or any("fineweb10B" in v for v in log.settings.values())


# ------------------------------------ bytes ------------------------------------


def check_val_bytes(record: Record) -> Finding:
    """Check that the bytes that the score is per are those of the text."""
    fixed = fixed_bytes_a_token(record)
    if fixed > 0:
        return judge_fixed(record, fixed)
    sizes = [(log, implied_bytes(log)) for log in record.claimed]
    findings = [judge(log, size, record.is_timed) for log, size in sizes if math.isfinite(size)]
    findings = findings or [judge_rate(log) for log in record.claimed if bytes_a_token(log) > 0]
    for state in (FAIL, WARN, NOT_CHECKED, PASS):
        texts = [text for found, text in findings if found == state]
        if texts:
            return state, join(texts[:3])
    return NOT_CHECKED, "no log states an exact score"


def bytes_a_token(log: Log) -> float:
    """Tell the bytes of text that a token of a log's last score has; nan if it does not say.

    BPB = loss / ln 2 / bytes a token.
    """
    if not log.finals:
        return math.nan
    _, loss, bpb = log.finals[-1]
    return loss / math.log(2) / bpb if bpb > 0 and loss > 0 else math.nan


def implied_bytes(log: Log) -> float:
    """Tell the bytes of text that a log's last score was divided by; nan if it does not say."""
    return val_tokens(log) * bytes_a_token(log)


def val_tokens(log: Log) -> float:
    """Read the number of validation tokens that a log states; nan without one."""
    own = fact(log, r"\bval_tokens\s*:\s*([\d,]+)")
    if own > 0:
        return own
    lines = [line.partition("val_loader:") for line in log.body.split("\n")]
    found = (re.search(r"\btokens:\s*([\d,]+)", rest) for _, there, rest in lines if there)
    return to_number(next((match[1] for match in found if match), None))


def known_rate(log: Log) -> tuple[str, float]:
    """Find the tokenizer that a log names, and its bytes a token; "" and nan without one."""
    names = " ".join((*log.settings.values(), *DATASET.findall(log.body)))
    found = (pair for pair in RATES.items() if re.search(rf"{pair[0]}(?!\d)", names))
    return next(found, ("", math.nan))


def judge_rate(log: Log) -> Finding:
    """Compare a log's bytes a token with those of its tokenizer; it tells no number of tokens."""
    tokenizer, known = known_rate(log)
    rate = bytes_a_token(log)
    text = f"{log.path.name}: loss and BPB are of {rate:.4f} bytes a token"
    if not tokenizer:
        return NOT_CHECKED, f"{text}; no log states val_tokens, and the tokenizer is not known here"
    text = f"{text}, {tokenizer} has {known}"
    if abs(rate / known - 1) < SAME_RATE:
        return PASS, f"{text}; how many there are is not told"
    if abs(rate / known - 1) < NEAR_RATE:
        return WARN, f"{text}: another tokenizer of that name, or bytes are counted wrongly"
    return FAIL, f"{text}: bytes are counted wrongly"


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
    """Compare one log's bytes with those of FineWeb's whole validation set.

    Another export of the set has other totals, but the same bytes a token.
    """
    whole, share = f"about {FINEWEB_BYTES:,}", size / FINEWEB_BYTES
    if abs(share - 1) < SAME_SIZE:
        return PASS, f"{text}; the whole validation set has {whole}{cut_tail(log)}"
    tokenizer, known = known_rate(log)
    rate = bytes_a_token(log)
    text = f"{text}, {rate:.4f} a token, the whole set has {whole}"
    is_usual = abs(rate / known - 1) < SAME_RATE
    if is_usual and abs(share - 1) < NEAR_SIZE:
        return PASS, f"{text} and {tokenizer} {known} a token: another export of the set"
    if is_usual:
        state = WARN if share > 1 else FAIL if timed else NOT_CHECKED
        kind = "only a part was scored" if share < 1 else "more than the set was scored"
        return state, f"{text} and {tokenizer} {known} a token: {kind}"
    if abs(share - 1) < NEAR_SHARE:
        return WARN, f"{text}: another export of the data, or bytes are counted wrongly"
    kind = "only a part was scored, or" if share < 1 else "it cannot be:"
    state = FAIL if timed or share > 1 else NOT_CHECKED
    return state, f"{text}: {kind} bytes are counted wrongly"


def cut_tail(log: Log) -> str:
    """Tell of a number of tokens that was rounded down to whole sequences."""
    tokens, length = val_tokens(log), fact(log, r"(?:train|eval)_seq_len\s*[:=]\s*(\d+)")
    is_cut = length > 1 and tokens > 0 and tokens % length == 0
    return f"; its tail of up to {length - 1:.0f} tokens was left out" if is_cut else ""


# ------------------------------------ a fixed number ------------------------------------


def fixed_bytes_a_token(record: Record) -> float:
    """Find a fixed number of bytes a token in the script; nan without one.

    An assignment or a default, such as bytes_per_token = 4.3, or a division of a loss in bits by a
    number: loss / math.log(2) / 4.3.
    """
    try:
        nodes = ast.walk(ast.parse(record.script or b""))
        found = (number for node in nodes for number in fixed_in(node))
        return next((number for number in found if is_rate(number)), math.nan)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return math.nan


def fixed_in(node: ast.AST) -> Iterator[float]:
    """List the numbers that a node of a script fixes as bytes a token."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if node.value and any(is_rate_name(name_of(target)) for target in targets):
            yield from numbers_in(node.value)
    elif isinstance(node, ast.keyword) and is_rate_name(node.arg or ""):
        yield from numbers_in(node.value)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        if isinstance(node.right, ast.Constant) and is_in_bits(node.left):
            yield from numbers_in(node.right)
        if isinstance(node.right, ast.BinOp) and is_in_bits(node.right):
            yield from numbers_in(node.right)


def numbers_in(node: ast.expr) -> Iterator[float]:
    """List the decimal numbers of an expression that is a number, or a default of a setting."""
    if isinstance(node, ast.Call):
        for argument in node.args:
            yield from numbers_in(argument)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        yield from (*numbers_in(node.left), *numbers_in(node.right))
    elif isinstance(node, ast.Constant) and isinstance(node.value, float | str):
        text = str(node.value)
        if DECIMAL.fullmatch(text):
            yield float(text)


def is_in_bits(node: ast.expr) -> bool:
    """Tell whether an expression divides or multiplies by ln 2."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div | ast.Mult):
        return is_ln2(node.left) or is_ln2(node.right)
    return False


def is_ln2(node: ast.expr) -> bool:
    """Tell whether an expression is math.log(2) or its number."""
    if isinstance(node, ast.Call) and name_of(node.func) == "log" and len(node.args) == 1:
        argument = node.args[0]
        return isinstance(argument, ast.Constant) and argument.value in (2, 2.0)
    return isinstance(node, ast.Constant) and str(node.value).startswith("0.6931")


def name_of(node: ast.expr) -> str:
    """Tell the last name of a variable or attribute; "" for others."""
    return getattr(node, "id", "") or getattr(node, "attr", "")


def is_rate_name(name: str) -> bool:
    """Tell whether a variable's name says bytes a token."""
    plain = name.lower().replace("_", "")
    return any(word in plain for word in ("bytespertok", "bytepertok", "bytesatoken"))


def is_rate(number: float) -> bool:
    """Tell whether a number can be the bytes of text in a token; 2.0 are those of its storage."""
    return 1.2 < number < 8 and number != 2


def judge_fixed(record: Record, fixed: float) -> Finding:
    """Judge a fixed number of bytes a token: a fault, unless the scores are of another."""
    text = f"train_gpt.py fixes {fixed:g} bytes a token"
    rates = [rate for log in record.claimed if (rate := bytes_a_token(log)) > 0]
    other = [rate for rate in rates if abs(rate / fixed - 1) > SAME_RATE]
    if rates and len(other) == len(rates):
        return WARN, f"{text}, but the scores are of {other[0]:.4f}"
    return FAIL, f"{text} in place of counting them"


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
    return [
        f"submission.json says {match[0]!r}"
        for text in texts
        for match in CONFESSION.finditer(text)
        if not DENIAL.search(" ".join(text[: match.start()].split()[-3:]))
    ]
