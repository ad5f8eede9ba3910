"""What times must be: ten minutes for training, and ten for evaluation."""

import math
import re

from reading import FAIL, NOT_CHECKED, PASS, WARN, Log

from static_rules.record import LETTER, Finding, Record, fact, join

LIMIT_S = 600
MINUTE_STEP_S = 6  # logs that tell minutes tell them with one decimal
UNTIMED_S = 2  # calibration whose time is not told takes at least this
LINE = 500  # as far as a line is read
# What a script does after its last step with data: its own text, training data, or untold.
CALIBRATION = re.compile(
    r"calibrat|hessian|temp_scaling|gptq.{0,40}(?:\bdone\b|generat)", re.IGNORECASE
)
GENERATION = re.compile(r"autoregressive|self.?gen|AR.?gen|generat(?:ed|ing)", re.IGNORECASE)
TRAINING_DATA = re.compile(r"train(?:ing)?[ _-](?:data|tokens|shards|files|set|batches|loader)")
IN_SECONDS = re.compile(r"\b(?:in|took|eval_time)[ :=]*(\d{1,9}(?:\.\d{1,9})?) ?(ms|s)\b")
DONE = re.compile(r"\bdone in\b")
SHOULD_BE = re.compile(r"(\d{1,9}\.?\d{0,9}) ?s \(must be < ?(\d{1,9}\.?\d{0,9})")


def check_train_time(record: Record) -> Finding:
    """Check that training took at most 600 s, and a step that was under way.

    What reads training data belongs to it: where a log tells of calibration after the last step,
    that counts. It fails if the log says that training data is read, and else is a warning.
    """
    timed = [log for log in record.claimed if not math.isnan(log.train_ms)]
    timed.sort(key=lambda log: -log.train_ms)
    limited, reason = under_the_limit(record, timed)
    if not limited:
        return NOT_CHECKED, reason + longest([log.train_ms / 1e3 for log in timed])
    findings = [judge_training(log) for log in limited]
    state, text = worst(findings)
    after = [finding for log in limited if (finding := judge_after(log, record.rules))]
    state = worst([(state, ""), *after])[0]
    told = [words for found, words in after if found == state] or [words for _, words in after]
    outside = "imports, compilation, warm-up and validation are outside it"
    evidence = join([text, *told[:3], outside, reason])
    return NOT_CHECKED if state == PASS and reason else state, evidence


def worst(findings: list[Finding]) -> Finding:
    """Choose the first of the worst findings."""
    return min(findings, key=lambda finding: (FAIL, WARN, NOT_CHECKED, PASS).index(finding[0]))


def judge_training(log: Log) -> Finding:
    """Judge a log's own timer of training."""
    seconds = log.train_ms / 1e3
    step = seconds / max(log.steps, 1)
    text = f"{seconds:.2f} s at most, {log.path.name}, by its own timer"
    is_exact = re.search(r"train_time:\s*\d+(\.\d+)?\s*m?s\b", log.body)
    if not is_exact and seconds > LIMIT_S - MINUTE_STEP_S:
        return NOT_CHECKED, f"{text}, which tells minutes with a decimal only"
    if seconds > LIMIT_S + 2 * step:
        return FAIL, f"{text}, over {LIMIT_S} s"
    over = f"; {LIMIT_S} s ran out during the last step" if seconds > LIMIT_S else ""
    return PASS, f"{text}{over}"


# ------------------------------------ after the last step ------------------------------------


def judge_after(log: Log, rules: str) -> Finding | None:
    """Judge what a log tells of the time after training; None if it tells nothing."""
    lines = after_training(log)
    told = [line for line in lines if CALIBRATION.search(line)]
    seconds, trained = sum_of(told), log.train_ms / 1e3
    name, whole = log.path.name, trained + seconds
    if over := over_by_its_own_words(lines):
        return WARN, f"{name} says itself: {over}"
    if not told:
        return None
    reads = any(TRAINING_DATA.search(line) for line in told)
    kind = "calibration"
    if any(GENERATION.search(line) for line in told):
        kind, reads = "generating text and calibration", False
    if seconds == 0:
        if trained < LIMIT_S - UNTIMED_S:
            return PASS, f"{kind} came after, for a time that is not told"
        return WARN, f"{name}: {kind} came after {trained:.1f} s, for a time that is not told"
    text = f"{name}: {kind} came after, until {whole:.1f} s"
    if whole <= LIMIT_S:
        return PASS, text
    if reads and rules == LETTER:
        return FAIL, f"{text}, over {LIMIT_S} s, on training data"
    data = "on training data" if reads else "on data that is not told"
    data = "on text of the model's own" if kind != "calibration" else data
    return WARN, f"{text}, over {LIMIT_S} s, {data}"


def after_training(log: Log) -> list[str]:
    """List the lines of a log after the last one that tells the time of training."""
    lines = log.body.split("\n")
    last = max((i for i, line in enumerate(lines) if "train_time:" in line), default=-1)
    return [line[:LINE] for line in lines[last + 1 :]]


def sum_of(lines: list[str]) -> float:
    """Add up the seconds of lines of calibration; "done in" tells the sum of the others."""
    parts, whole = 0.0, 0.0
    for line in lines:
        if match := IN_SECONDS.search(line):
            seconds = float(match[1]) * (1e-3 if match[2] == "ms" else 1)
            if DONE.search(line):
                whole += seconds
            else:
                parts += seconds
    return max(parts, whole)


def over_by_its_own_words(lines: list[str]) -> str:
    """Find a line that states a time and the lower one that it should be; "" without one."""
    for line in lines:
        match = SHOULD_BE.search(line)
        if match and float(match[1]) > float(match[2]):
            return " ".join(line.split())[:120]
    return ""


# ------------------------------------ evaluation ------------------------------------


def check_eval_time(record: Record) -> Finding:
    """Check that evaluation took at most 600 s."""
    timed = [log for log in record.claimed if not math.isnan(log.eval_s)]
    limited, reason = under_the_limit(record, timed)
    if not limited:
        return NOT_CHECKED, reason + longest([log.eval_s for log in timed])
    log = max(limited, key=lambda log: log.eval_s)
    text = f"{log.eval_s:.1f} s at most, {log.path.name}, by its own timer"
    whole, outside = max(map(left_out_of_evaluation, limited))
    if whole <= log.eval_s:
        outside = "loading and compiling may be outside it"
    if log.eval_s > LIMIT_S:
        return FAIL, f"{text}, over {LIMIT_S} s; {join([outside, reason])}"
    state = WARN if whole > LIMIT_S else NOT_CHECKED if reason else PASS
    return state, f"{text}; {join([outside, reason])}"


def left_out_of_evaluation(log: Log) -> tuple[float, str]:
    """Tell seconds of an evaluation with what its own timer leaves out, and that in words."""
    outside = {
        "compiling": fact(log, r"compile warmup done \(([\d.]+)\s*s\)"),
        "decompressing": fact(log, r"decompression done in ([\d.]+)\s*s"),
    }
    known = {name: seconds for name, seconds in outside.items() if not math.isnan(seconds)}
    whole = log.eval_s + sum(known.values())
    named = " and ".join(f"{name} ({seconds:.1f} s)" for name, seconds in known.items())
    over = f", over {LIMIT_S} s" if whole > LIMIT_S else ""
    return whole, f"with {named}, which it leaves out, {whole:.1f} s{over} ({log.path.name})"


def under_the_limit(record: Record, timed: list[Log]) -> tuple[list[Log], str]:
    """List the timed logs that the limits of ten minutes hold for, and tell why not for others."""
    if not record.is_timed:
        track = record.track or "unknown"
        return [], f"the limit holds for track 10min_16mb; this is {track}"
    if not timed:
        return [], "no log states this time"
    other = [log for log in timed if not is_on_eight(log)]
    if not other:
        return timed, ""
    reason = (
        f"the limit is for 8 GPUs; {other[0].path.name} has world_size {world_size(other[0]):g}"
    )
    return [log for log in timed if is_on_eight(log)], reason


def is_on_eight(log: Log) -> bool:
    """Tell whether a run had eight GPUs, as far as its log says."""
    return math.isnan(world_size(log)) or world_size(log) == 8


def world_size(log: Log) -> float:
    """Read the number of GPUs of a run; nan if its log does not say."""
    return fact(log, r"world_size\s*[:=]\s*(\d+)")


def longest(seconds: list[float]) -> str:
    """Write the longest time, if there is one."""
    return f"; {max(seconds):.1f} s" if seconds else ""
