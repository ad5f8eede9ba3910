"""What times must be: ten minutes for training, and ten for evaluation."""

import math
import re

from reading import FAIL, NOT_CHECKED, PASS, Log

from static_rules.record import Finding, Record, fact, join

LIMIT_S = 600
MINUTE_STEP_S = 6  # logs that tell minutes tell them with one decimal


def check_train_time(record: Record) -> Finding:
    """Check that training took at most 600 s, and a step that was under way."""
    timed = [log for log in record.claimed if not math.isnan(log.train_ms)]
    if reason := no_limit(record):
        return NOT_CHECKED, reason + longest([log.train_ms / 1e3 for log in timed])
    if not timed:
        return NOT_CHECKED, "no log states a train_time"
    log = max(timed, key=lambda log: log.train_ms)
    seconds = log.train_ms / 1e3
    step = seconds / max(log.steps, 1)
    text = f"{seconds:.2f} s at most, {log.path.name}, by its own timer"
    outside = ["imports, compilation, warm-up and validation are outside it"]
    calibration = fact(log, r"Hessians in ([\d.]+)\s*s")
    if not math.isnan(calibration):
        outside.append(f"calibration came after, until {seconds + calibration:.1f} s")
    is_exact = re.search(r"train_time:\s*\d+(\.\d+)?\s*m?s\b", log.body)
    if not is_exact and seconds > LIMIT_S - MINUTE_STEP_S:
        return NOT_CHECKED, f"{text}, which tells minutes with a decimal only"
    if seconds > LIMIT_S + 2 * step:
        return FAIL, f"{text}, over {LIMIT_S} s; {join(outside)}"
    over = f"; {LIMIT_S} s ran out during the last step" if seconds > LIMIT_S else ""
    return PASS, f"{text}{over}; {join(outside)}"


def check_eval_time(record: Record) -> Finding:
    """Check that evaluation took at most 600 s."""
    timed = [log for log in record.claimed if not math.isnan(log.eval_s)]
    if reason := no_limit(record):
        return NOT_CHECKED, reason + longest([log.eval_s for log in timed])
    if not timed:
        return NOT_CHECKED, "no log states an eval_time"
    log = max(timed, key=lambda log: log.eval_s)
    text = f"{log.eval_s:.1f} s at most, {log.path.name}, by its own timer"
    whole, outside = max(map(left_out_of_evaluation, timed))
    if whole <= log.eval_s:
        outside = "loading and compiling may be outside it"
    if log.eval_s > LIMIT_S:
        return FAIL, f"{text}, over {LIMIT_S} s; {outside}"
    return PASS, f"{text}; {outside}"


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


def no_limit(record: Record) -> str:
    """Tell why the limits of ten minutes cannot be applied; "" if they can."""
    if not record.is_timed:
        return f"the limit holds for track 10min_16mb; this is {record.track or 'unknown'}"
    worlds = {fact(log, r"world_size\s*[:=]\s*(\d+)") for log in record.claimed}
    other = sorted(world for world in worlds if not math.isnan(world) and world != 8)
    return f"the limit is for 8 GPUs; a log has world_size {other[0]:g}" if other else ""


def longest(seconds: list[float]) -> str:
    """Write the longest time, if there is one."""
    return f"; {max(seconds):.1f} s" if seconds else ""
