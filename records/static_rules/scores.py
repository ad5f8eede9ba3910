"""What scores must agree on: submission.json with itself and with the logs."""

import math
import statistics
from collections.abc import Mapping

from reading import FAIL, NOT_CHECKED, PASS, Log

from static_rules.record import (
    Finding,
    Record,
    agrees,
    all_scores,
    join,
    precision,
    seed_table,
    table_scores,
)


def check_score(record: Record) -> Finding:
    """val_bpb of submission.json is what logs and its own table of seeds say."""
    submission = record.submission
    if not submission or math.isnan(submission.val_bpb):
        return NOT_CHECKED, "submission.json states no val_bpb"
    claim, table = submission.val_bpb, table_scores(record)
    wrong = [
        f"seed {seed}: submission.json has {score}, its logs do not"
        for seed, score in table.items()
        if (own := [log for log in record.logs if log.seed == seed and log.finals])
        and not any(agrees(score, v) for log in own for v in all_scores(log))
    ]
    if wrong:
        return FAIL, join(wrong)
    state, evidence = compare_with_table(claim, table) if table else (PASS, "")
    if state == FAIL:
        return FAIL, evidence
    found_state, found = compare_with_logs(claim, record)
    if found_state == NOT_CHECKED and evidence:
        return NOT_CHECKED, f"{evidence}, but {found}"
    return found_state, join([found, evidence])


def compare_with_table(claim: float, table: Mapping[str, float]) -> Finding:
    """val_bpb against submission.json's own scores of seeds."""
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
    """val_bpb against what the logs say."""
    means, groups = logged_means(record), record.by_seed
    if not means:
        return NOT_CHECKED, "no log states an exact score"
    scored = [seed for seed in groups if scores_of(groups[seed])]
    for scheme, mean in means.items():
        if agrees(claim, mean):
            of = f"the mean of {len(scored)} seeds" if len(scored) > 1 else f"seed {scored[0]}'s"
            return PASS, f"{claim} is {of} by the logs, {mean:.8f} ({scheme})"
    single = {
        log.path.name for log in record.logs if any(agrees(claim, v) for v in all_scores(log))
    }
    mean = [*means.values()][-1]
    if single:
        names = ", ".join(sorted(single))
        lowest = min(scores_of(logs)[s] for logs in groups.values() for s in scores_of(logs))
        best = "the best seed" if agrees(claim, lowest) else "one seed"
        return PASS, (
            f"{claim} is that of {names}: {best} of {len(scored)}, not the mean {mean:.8f}"
            if len(scored) > 1
            else f"{claim} is in {names}, but not its last score {mean:.8f}"
        )
    return FAIL, f"{claim} is in no log, nor a mean of theirs: {listed(means)}"


def listed(scores: Mapping[str, float]) -> str:
    """Up to four scores with their names."""
    return ", ".join(f"{name} {score:.8f}" for name, score in [*scores.items()][-4:])


def scores_of(logs: list[Log]) -> dict[str, float]:
    """scheme -> score, of all logs of a seed; the headline is the last one."""
    return {scheme: bpb for log in logs for scheme, _, bpb in log.finals}


def logged_means(record: Record) -> dict[str, float]:
    """scheme -> mean over the seeds, for schemes that all seeds have; and the mean of the last."""
    seeds = [scores for scores in map(scores_of, record.by_seed.values()) if scores]
    common = [name for name in (seeds[0] if seeds else {}) if all(name in s for s in seeds)]
    means = {name: statistics.fmean(s[name] for s in seeds) for name in common}
    last = [[*scores.values()][-1] for scores in seeds]
    return means | ({"last score of each log": statistics.fmean(last)} if last else {})


def check_seeds(record: Record) -> Finding:
    """Number of seeds, mean, sample deviation; the deviation claimed is one of them."""
    scores, place = headline_scores(record)
    values = [bpb for _, bpb in scores.values() if math.isfinite(bpb)]
    if not values:
        return NOT_CHECKED, "neither logs nor submission.json state scores of seeds"
    if len(values) == 1:
        return NOT_CHECKED, f"one seed ({place}): {values[0]:.8f}; no deviation can be told"
    mean, sample, population = (
        f(values) for f in (statistics.fmean, statistics.stdev, statistics.pstdev)
    )
    text = f"{len(values)} seeds ({place}): mean {mean:.8f}, sample deviation {sample:.8f}"
    claim = record.submission.val_bpb_std if record.submission else math.nan
    if math.isnan(claim):
        return PASS, text
    if agrees(claim, sample):
        return PASS, f"{text}, as claimed"
    if agrees(claim, population):
        return PASS, f"{text}; the {claim:g} claimed divides by n, not n - 1"
    return FAIL, f"{text}; claimed is {claim:g}"


def headline_scores(record: Record) -> tuple[dict[str, tuple[float, float]], str]:
    """seed -> (val_loss, val_bpb), and where they are from; the loss may be nan.

    Logs come first: of each seed the score that the claims name, else the last one. Logs that no
    claim names, such as those of a baseline, are left out where a table of seeds tells them apart.
    """
    table, found = table_scores(record), {}
    for seed, logs in record.by_seed.items():
        finals = [(loss, bpb) for log in logs for _, loss, bpb in log.finals]
        if finals and (not table or seed in table):
            named = [pair for pair in finals if seed in table and agrees(table[seed], pair[1])]
            found[seed] = (named or finals)[-1]
    if found and (not table or set(found) == set(table)):
        return found, "logs"
    losses = {seed: entry.get("val_loss", math.nan) for seed, entry in seed_table(record).items()}
    return {seed: (losses[seed], bpb) for seed, bpb in table.items()}, "submission.json"
