"""What scores must agree on: submission.json with itself and with the logs."""

import math
import statistics
from collections.abc import Mapping

from reading import FAIL, NOT_CHECKED, PASS, Log

from static_rules.record import Finding, Record, agrees, all_scores, join, precision


def check_score(record: Record) -> Finding:
    """Check that val_bpb of submission.json is what logs and its own table of seeds say."""
    if not record.submission or math.isnan(record.submission.val_bpb):
        return NOT_CHECKED, "submission.json states no val_bpb"
    claim = record.submission.val_bpb
    wrong = [
        f"seed {seed}: submission.json has {score}, its logs do not"
        for seed, score in record.seed_scores.items()
        if contradicts(record.logs, seed, score)
    ]
    if wrong:
        return FAIL, join(wrong)
    state, evidence = compare_with_table(claim, record.seed_scores)
    if state == FAIL:
        return FAIL, evidence
    found_state, found = compare_with_logs(claim, record)
    if found_state == NOT_CHECKED and evidence:
        return NOT_CHECKED, f"{evidence}, but {found}"
    return found_state, join([found, evidence])


def contradicts(logs: list[Log], seed: str, score: float) -> bool:
    """Tell whether a seed has logs with exact scores, and none states this score."""
    own = [log for log in logs if log.seed == seed and log.finals]
    stated = [value for log in own for value in all_scores(log)]
    return bool(own) and not any(agrees(score, value) for value in stated)


def compare_with_table(claim: float, table: Mapping[str, float]) -> Finding:
    """Compare val_bpb with submission.json's own scores of seeds."""
    if not table:
        return PASS, ""
    mean, best = statistics.fmean(table.values()), min(table.values())
    seeds = f"{len(table)} seeds in submission.json"
    if len(table) == 1 and agrees(claim, mean):
        return PASS, ""
    if agrees(claim, mean) or abs(claim - mean) <= min(map(precision, table.values())):
        return PASS, f"{claim} is the mean of the {seeds}"
    if agrees(claim, best):
        return FAIL, f"{claim} is the best of the {seeds}, not their mean {mean:.8f}"
    return FAIL, f"{claim} is not the mean of the {seeds}, {mean:.8f}"


def compare_with_logs(claim: float, record: Record) -> Finding:
    """Compare val_bpb with what the logs say."""
    by_seed = logged_scores(record)
    if not by_seed:
        return NOT_CHECKED, "no log states an exact score"
    means = means_over_seeds(by_seed)
    for scheme, mean in means.items():
        if agrees(claim, mean):
            one = f"seed {next(iter(by_seed))}'s"
            of = one if len(by_seed) == 1 else f"the mean of {len(by_seed)} seeds"
            return PASS, f"{claim} is {of} by the logs, {mean:.8f} ({scheme})"
    holders = {
        log.path.name
        for log in record.logs
        if any(agrees(claim, score) for score in all_scores(log))
    }
    if not holders:
        return FAIL, f"{claim} is in no log, nor a mean of theirs: {listed(means)}"
    names, last = ", ".join(sorted(holders)), [*means.values()][-1]
    if len(by_seed) == 1:
        return PASS, f"{claim} is in {names}, but not its last score {last:.8f}"
    lowest = min(score for scores in by_seed.values() for score in scores.values())
    which = "the best seed" if agrees(claim, lowest) else "one seed"
    return PASS, f"{claim} is that of {names}: {which} of {len(by_seed)}, not the mean {last:.8f}"


def logged_scores(record: Record) -> dict[str, dict[str, float]]:
    """List the exact scores by seed and scheme, of the seeds that have one."""
    found = {}
    for seed, logs in record.by_seed.items():
        scores = {scheme: bpb for log in logs for scheme, _, bpb in log.finals}
        if scores:
            found[seed] = scores
    return found


def means_over_seeds(by_seed: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Average each scheme that all seeds have, and at the end the last score of each."""
    seeds = [*by_seed.values()]
    common = [name for name in seeds[0] if all(name in scores for scores in seeds)]
    means = {name: statistics.fmean(scores[name] for scores in seeds) for name in common}
    last = [[*scores.values()][-1] for scores in seeds]
    return means | {"last score of each log": statistics.fmean(last)}


def listed(scores: Mapping[str, float]) -> str:
    """Write up to four scores with their names."""
    return ", ".join(f"{name} {score:.8f}" for name, score in [*scores.items()][-4:])


def check_seeds(record: Record) -> Finding:
    """Check the deviation that is claimed; tell number of seeds, mean and sample deviation."""
    scores, place = headline_scores(record)
    values = [bpb for _, bpb in scores.values() if math.isfinite(bpb)]
    if not values:
        return NOT_CHECKED, "neither logs nor submission.json state scores of seeds"
    if len(values) == 1:
        return NOT_CHECKED, f"one seed ({place}): {values[0]:.8f}; no deviation can be told"
    mean, sample = statistics.fmean(values), statistics.stdev(values)
    text = f"{len(values)} seeds ({place}): mean {mean:.8f}, sample deviation {sample:.8f}"
    claim = record.submission.val_bpb_std if record.submission else math.nan
    if math.isnan(claim):
        return PASS, text
    if agrees(claim, sample):
        return PASS, f"{text}, as claimed"
    if agrees(claim, statistics.pstdev(values)):
        return PASS, f"{text}; the {claim:g} claimed divides by n, not n - 1"
    return FAIL, f"{text}; claimed is {claim:g}"


def headline_scores(record: Record) -> tuple[dict[str, tuple[float, float]], str]:
    """Find val_loss and val_bpb of each seed, and where they are from; the loss may be nan.

    Logs come first: of each seed the score that the claims name, else the last one. Logs that no
    claim names, such as those of a baseline, are left out where a table of seeds tells them apart.
    """
    table, found = record.seed_scores, {}
    for seed, logs in record.by_seed.items():
        finals = [(loss, bpb) for log in logs for _, loss, bpb in log.finals]
        if finals and (not table or seed in table):
            named = [pair for pair in finals if seed in table and agrees(table[seed], pair[1])]
            found[seed] = (named or finals)[-1]
    if found and (not table or set(found) == set(table)):
        return found, "logs"
    rows = {seed: record.seed_table[seed] for seed in table}
    stated = {seed: (row.get("val_loss", math.nan), row["val_bpb"]) for seed, row in rows.items()}
    return stated, "submission.json"
