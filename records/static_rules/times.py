"""What times must be: ten minutes for training, and ten for evaluation."""

import math
import re

from reading import FAIL, NOT_CHECKED, PASS, Log

from static_rules.record import Finding, Record, fact, join

LIMIT_S = 600


def check_train_time(record: Record) -> Finding:
    """Training took at most 600 s, and a step that was under way."""
    timed = [log for log in record.claimed if not math.isnan(log.train_ms)]
    if not timed or no_limit(record):
        longest = max((log.train_ms / 1e3 for log in timed), default=math.nan)
        seen = f"; {longest:.1f} s" if timed else ""
        return NOT_CHECKED, (no_limit(record) or "no log states a train_time") + seen
    log = max(timed, key=lambda log: log.train_ms)
    seconds, step = log.train_ms / 1e3, log.train_ms / 1e3 / max(log.steps, 1)
    text = f"{seconds:.2f} s at most, {log.path.name}, by its own timer"
    outside = ["imports, compilation, warm-up and validation are outside it"]
    calibration = fact(log, r"Hessians in ([\d.]+)\s*s")
    if not math.isnan(calibration):
        outside.append(f"calibration came after, until {seconds + calibration:.1f} s")
    if not re.search(r"train_time:\s*\d+(\.\d+)?\s*m?s\b", log.body) and seconds > LIMIT_S - 6:
        return NOT_CHECKED, f"{text}, which tells minutes with a decimal only"
    if seconds > LIMIT_S + 2 * step:
        return FAIL, f"{text}, over {LIMIT_S} s; {join(outside)}"
    over = f"; {LIMIT_S} s ran out during the last step" if seconds > LIMIT_S else ""
    return PASS, f"{text}{over}; {join(outside)}"


def check_eval_time(record: Record) -> Finding:
    """Evaluation took at most 600 s."""
    timed = [log for log in record.claimed if not math.isnan(log.eval_s)]
    if not timed or no_limit(record):
        longest = max((log.eval_s for log in timed), default=math.nan)
        seen = f"; {longest:.1f} s" if timed else ""
        return NOT_CHECKED, (no_limit(record) or "no log states an eval_time") + seen
    log = max(timed, key=lambda log: log.eval_s)
    text = f"{log.eval_s:.1f} s at most, {log.path.name}, by its own timer"
    whole, rest = max(map(left_out_of_evaluation, timed))
    rest = rest if whole > log.eval_s else "loading and compiling may be outside it"
    over = f", over {LIMIT_S} s" if log.eval_s > LIMIT_S else ""
    return (FAIL if over else PASS), f"{text}{over}; {rest}"


def left_out_of_evaluation(log: Log) -> tuple[float, str]:
    """Seconds of an evaluation with what its own timer leaves out, and that in words."""
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
    """Why the limits of ten minutes cannot be applied; "" if they can."""
    if not record.is_timed:
        return f"the limit holds for track 10min_16mb; this is {record.track or 'unknown'}"
    worlds = {fact(log, r"world_size\s*[:=]\s*(\d+)") for log in record.claimed}
    other = sorted(world for world in worlds if not math.isnan(world) and world != 8)
    return f"the limit is for 8 GPUs; a log has world_size {other[0]:g}" if other else ""
