"""What scores must agree on: submission.json with itself and with the logs."""

import math
import statistics
from collections.abc import Iterator, Mapping

from reading import FAIL, NOT_CHECKED, PASS, WARN, Log

from static_rules.record import (
    Finding,
    Record,
    agrees,
    all_scores,
    is_cut_off,
    join,
    later_bpb,
    plural,
    tolerance,
)

Run = dict[str, tuple[float, float]]  # scheme -> val_loss and val_bpb, in the order of the log


# ------------------------------------ runs and their scores ------------------------------------


def runs_of(logs: list[Log]) -> list[Run]:
    """List the scored runs of one seed's logs.

    Logs without a score in contradiction are of one run: a copy, or training and evaluation. What
    states another score of a known scheme is a run of its own.
    """
    runs: list[Run] = []
    for log in logs:
        own: Run = {scheme: (loss, bpb) for scheme, loss, bpb in log.finals}
        same = (run for run in runs if all(run.get(name, own[name]) == own[name] for name in own))
        if own and (run := next(same, None)) is not None:
            run.update(own)
        elif own:
            runs.append(own)
    return runs


def runs_by_seed(record: Record) -> dict[str, list[Run]]:
    """List the scored runs of every claimed seed that has one."""
    found = {seed: runs_of(logs) for seed, logs in record.by_seed.items()}
    return {seed: runs for seed, runs in found.items() if runs}


def last_bpb(run: Run) -> float:
    """Tell the last score of a run."""
    return [*run.values()][-1][1]


def selections(record: Record) -> Iterator[tuple[str, dict[str, Run]]]:
    """Choose a run of every seed, in each honest way, with that way in words.

    The runs that the table of scores names; the first of each seed; the last. To choose is not
    honest where all runs are of one seed.
    """
    runs = runs_by_seed(record)
    if len(runs) == 1 and len(*runs.values()) > 1:
        return
    is_rerun = any(len(of_seed) > 1 for of_seed in runs.values())
    named = {seed: named_run(record, seed, of_seed) for seed, of_seed in runs.items()}
    if runs and is_rerun and all(named.values()):
        yield " whose scores submission.json names", named
    if runs:
        yield ", the first run of each" if is_rerun else "", {s: r[0] for s, r in runs.items()}
    if is_rerun:
        yield ", the last run of each", {s: r[-1] for s, r in runs.items()}


def named_run(record: Record, seed: str, runs: list[Run]) -> Run:
    """Find the run whose score the table names; an empty one without it."""
    claim = record.seed_scores.get(seed, math.nan)
    named = (run for run in runs if any(agrees(claim, bpb) for _, bpb in run.values()))
    return next(named, {})


def means_over_seeds(chosen: Mapping[str, Run]) -> dict[str, float]:
    """Average each scheme that all seeds have, and at the end the last score of each."""
    runs = [*chosen.values()]
    common = [name for name in runs[0] if all(name in run for run in runs)]
    means = {name: statistics.fmean(run[name][1] for run in runs) for name in common}
    return means | {"last score of each log": statistics.fmean(map(last_bpb, runs))}


# ------------------------------------ the headline ------------------------------------


def check_score(record: Record) -> Finding:
    """Check that val_bpb of submission.json is what logs and its own table of seeds say."""
    if not record.submission or math.isnan(record.submission.val_bpb):
        return NOT_CHECKED, "submission.json states no val_bpb"
    claim = record.submission.val_bpb
    wrong = [
        f"seed {seed}: submission.json has {score}, its logs do not"
        for seed, score in record.seed_scores.items()
        if contradicts(record, seed, score)
    ]
    if wrong:
        return FAIL, join(wrong)
    table_state, table = compare_with_table(claim, record)
    if table_state in (FAIL, WARN):
        return table_state, table
    state, evidence = compare_with_logs(claim, record)
    if table and is_table_logged(record):
        return PASS, join([table, evidence if state == PASS else "its scores are in the logs"])
    if state == NOT_CHECKED and table:
        return NOT_CHECKED, f"{table}, but {evidence}"
    return state, join([evidence, table])


def contradicts(record: Record, seed: str, score: float) -> bool:
    """Tell whether a seed has logs with exact scores, and none states this score."""
    own = [log for log in record.by_seed.get(seed, []) if log.finals]
    stated = [value for log in own for value in all_scores(log)]
    return bool(own) and not any(agrees(score, value) for value in stated)


def is_table_logged(record: Record) -> bool:
    """Tell whether every score of submission.json's table is in a log of its seed."""
    return all(
        any(
            agrees(score, value)
            for log in record.by_seed.get(seed, [])
            for value in all_scores(log)
        )
        for seed, score in record.seed_scores.items()
    )


def compare_with_table(claim: float, record: Record) -> Finding:
    """Compare val_bpb with submission.json's own scores of seeds."""
    table = record.seed_scores
    if not table:
        return PASS, ""
    mean, best = statistics.fmean(table.values()), min(table.values())
    seeds = f"{len(table)} seeds in submission.json"
    if len(table) == 1 and agrees(claim, mean):
        return PASS, ""
    if agrees(claim, mean):
        return PASS, f"{claim} is the mean of the {seeds}"
    text = f"not their mean {mean:.8f}"
    if agrees(claim, best):
        return one_run(record), f"{claim} is the best of the {seeds}, {text}"
    if any(agrees(claim, score) for score in table.values()):
        return one_run(record), f"{claim} is that of one of the {seeds}, {text}"
    return FAIL, f"{claim} is not the mean of the {seeds}, {mean:.8f}{cut_off(claim, mean)}"


def one_run(record: Record) -> str:
    """Judge a headline that is one run's of several: a fault on the timed track."""
    return FAIL if record.is_timed else WARN


def cut_off(claim: float, mean: float) -> str:
    """Tell that a claim was cut off and not rounded; "" if it was not."""
    return ", cut off and not rounded" if is_cut_off(claim, mean) else ""


def compare_with_logs(claim: float, record: Record) -> Finding:
    """Compare val_bpb with what the logs say."""
    runs = runs_by_seed(record)
    if not runs:
        return NOT_CHECKED, "no log states an exact score"
    for words, chosen in selections(record):
        for scheme, mean in means_over_seeds(chosen).items():
            if agrees(claim, mean):
                one = f"seed {next(iter(chosen))[:40]}'s"
                of = one if len(chosen) == 1 else f"the mean of {len(chosen)} seeds{words}"
                text = f"{claim} is {of} by the logs, {mean:.8f} ({scheme})"
                return judge_number(record, len(chosen), text)
    every = [run for of_seed in runs.values() for run in of_seed]
    mean = statistics.fmean(map(last_bpb, every))
    if len(every) > 1 and agrees(claim, mean):
        return PASS, f"{claim} is the mean of all {len(every)} runs by the logs, {mean:.8f}"
    later = mean_of_later(record)
    if agrees(claim, later):
        return PASS, f"{claim} is the mean of the last BPB that each log tells, {later:.8f}"
    return compare_with_one(claim, record, every, mean)


def judge_number(record: Record, number: int, text: str) -> Finding:
    """Judge a headline that is right for the seeds with logs, by how many seeds it claims."""
    claimed = len(record.claimed_seeds)
    if number >= claimed:
        return PASS, text
    state = one_run(record) if number == 1 else WARN
    return state, f"{text}, but {claimed} seeds are claimed"


def mean_of_later(record: Record) -> float:
    """Average the last number in each log that calls itself a BPB; nan if one has none."""
    found = [later_bpb(log)[-1:] for log in record.claimed]
    return statistics.fmean(value for (value,) in found) if found and all(found) else math.nan


def compare_with_one(claim: float, record: Record, runs: list[Run], mean: float) -> Finding:
    """Find the log that a val_bpb is from which is no mean."""
    holders = {
        log.path.name
        for log in record.logs
        if any(agrees(claim, score) for score in all_scores(log))
    }
    names = ", ".join(sorted(holders))
    if not holders:
        text = f"{claim} is in no log, nor a mean of theirs"
        return FAIL, f"{text}: {listed(record, mean)}{cut_off(claim, mean)}"
    if len(runs) == 1:
        return PASS, f"{claim} is in {names}, but not its last score {mean:.8f}"
    lowest = min(bpb for run in runs for _, bpb in run.values())
    kind = "seed" if len(runs) == len(record.by_seed) else "run"
    which = f"the best {kind}" if agrees(claim, lowest) else f"one {kind}"
    text = f"{claim} is that of {names}: {which} of {len(runs)}, not the mean {mean:.8f}"
    return one_run(record), text


def listed(record: Record, mean: float) -> str:
    """Write up to four means with their names."""
    means = next((means_over_seeds(chosen) for _, chosen in selections(record)), {"all": mean})
    return ", ".join(f"{name} {score:.8f}" for name, score in [*means.items()][-4:])


# ------------------------------------ deviation, and scores by seed ------------------------------


def check_deviation(record: Record) -> Finding:
    """Check the deviation that is claimed; tell number of seeds, mean and sample deviation."""
    scores, place = headline_scores(record)
    values = [bpb for _, bpb in scores.values() if math.isfinite(bpb)]
    if not values:
        return NOT_CHECKED, "neither logs nor submission.json state scores of seeds"
    if len(values) == 1:
        return NOT_CHECKED, f"one seed ({place}): {values[0]:.8f}; no deviation can be told"
    mean, sample = statistics.fmean(values), statistics.stdev(values)
    text = (
        f"{plural(len(values), 'seed')} ({place}): mean {mean:.8f}, sample deviation {sample:.8f}"
    )
    claim = record.submission.val_bpb_std if record.submission else math.nan
    if math.isnan(claim):
        return PASS, text
    # Scores in a table are rounded themselves, and so move their deviation.
    slack = 0.0 if place == "logs" else max(map(tolerance, values))
    if abs(claim - sample) <= tolerance(claim) + slack:
        return PASS, f"{text}, as claimed"
    if abs(claim - statistics.pstdev(values)) <= tolerance(claim) + slack:
        return PASS, f"{text}; the {claim:g} claimed divides by n, not n - 1"
    return FAIL, f"{text}; claimed is {claim:g}"


def headline_scores(record: Record) -> tuple[dict[str, tuple[float, float]], str]:
    """Find val_loss and val_bpb of each seed, and where they are from; the loss may be nan.

    Logs come first: of each seed the score that the claims name, else the last one of the runs
    that the headline is of.
    """
    table, found = record.seed_scores, {}
    for seed, run in headline_runs(record).items():
        if not table or seed in table:
            claim = table.get(seed, math.nan)
            pairs = [*run.values()]
            found[seed] = ([pair for pair in pairs if agrees(claim, pair[1])] or pairs)[-1]
    if found and (not table or set(found) == set(table)):
        return found, "logs"
    rows = {seed: record.seed_table[seed] for seed in table}
    stated = {seed: (row.get("val_loss", math.nan), row["val_bpb"]) for seed, row in rows.items()}
    return stated, "submission.json"


def headline_runs(record: Record) -> dict[str, Run]:
    """Choose the run of each seed that the headline is of; the first where none fits."""
    claim = record.submission.val_bpb if record.submission else math.nan
    choices = [chosen for _, chosen in selections(record)]
    if not choices:
        return {seed: runs[0] for seed, runs in runs_by_seed(record).items()}
    fits = (c for c in choices if any(agrees(claim, m) for m in means_over_seeds(c).values()))
    return next(fits, choices[0])
