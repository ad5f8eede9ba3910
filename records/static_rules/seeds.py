"""What seeds must be: enough of them, each with a log, and each told once."""

import statistics

from reading import FAIL, NOT_CHECKED, PASS, WARN

from static_rules.record import Finding, Record, join, plural
from static_rules.scores import Run, headline_runs, last_bpb, runs_by_seed

FEWEST_SEEDS = 3  # on the timed track


def check_seeds(record: Record) -> Finding:
    """Check that every claimed seed has a log, and that there are three on the timed track."""
    if not record.logs:
        return NOT_CHECKED, "no training logs"
    known = [seed for seed in record.by_seed if seed.isdecimal()]
    nameless = [seed for seed in record.by_seed if not seed.isdecimal()]
    doubts = [*conflicts(record), *twins(record)]
    faults = []
    lost = [seed for seed in record.claimed_seeds if seed not in known]
    if len(lost) > len(nameless):
        faults.append(f"claimed without a log: {named(lost)}")
    elif lost:
        doubts.append(f"{named(lost)} may be that of {', '.join(nameless)}, which names no seed")
    number, logs = len(record.by_seed), plural(len(record.claimed), "log")
    if record.is_timed and number < FEWEST_SEEDS:
        faults.append(f"{logs} of {plural(number, 'seed')}, fewer than {FEWEST_SEEDS}")
    elif record.is_timed and len(known) < FEWEST_SEEDS:
        doubts.append(f"no seed is told in {', '.join(nameless[:4])}")
    state = FAIL if faults else WARN if doubts else PASS
    told = f"{logs} of {named(known)}" if known else f"{logs} of seeds without a name"
    return state, join([*faults, told, *doubts, *left_aside(record)])


def named(seeds: list[str]) -> str:
    """Write seed 1, seeds 1, 2 and so on."""
    shown = ", ".join(seed[:20] for seed in seeds[:8])
    more = f" and {len(seeds) - 8} more" if len(seeds) > 8 else ""
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {shown}{more}"


def conflicts(record: Record) -> list[str]:
    """Tell which logs are of another seed than their name says."""
    return [
        f"{log.path.name} is of seed {log.seed[:20]} by its content"
        for log in record.claimed
        if log.named_seed and log.named_seed != log.seed
    ]


def left_aside(record: Record) -> list[str]:
    """Name the logs that speak for no claim."""
    names = [log.path.name for log in record.asides]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return [f"not of the claim: {', '.join(names[:4])}{more}"] if names else []


def twins(record: Record) -> list[str]:
    """Tell which seeds have the same scores to the last digit."""
    found: dict[tuple[float, ...], list[str]] = {}
    for seed, runs in runs_by_seed(record).items():
        scores = tuple(bpb for _, bpb in runs[0].values())
        found.setdefault(scores, []).append(seed)
    same = [seeds for seeds in found.values() if len(seeds) > 1]
    return [f"{named(seeds)} have the same scores to the last digit" for seeds in same]


# ------------------------------------ seeds that ran twice ------------------------------------


def check_reruns(record: Record) -> Finding:
    """Tell of seeds that ran more than once, and what the other runs scored."""
    runs = runs_by_seed(record)
    if not runs:
        return NOT_CHECKED, "no log states an exact score"
    again = {seed: of_seed for seed, of_seed in runs.items() if len(of_seed) > 1}
    if not again:
        return PASS, "no seed has two logs with different scores"
    chosen = headline_runs(record)
    others = [run for seed, of_seed in again.items() for run in of_seed if run != chosen[seed]]
    names = [log.path.name for seed in again for log in record.by_seed[seed] if log.finals]
    spare = [name for name in names if name not in names_of(record, chosen)]
    mean = statistics.fmean(map(last_bpb, others))
    taken = statistics.fmean(last_bpb(chosen[seed]) for seed in again)
    text = f"{named([*again])} ran more than once: {', '.join(spare[:8])} with a mean of {mean:.8f}"
    return WARN, f"{text}, beside {taken:.8f} of the ones that were taken"


def names_of(record: Record, chosen: dict[str, Run]) -> set[str]:
    """Name the logs that tell the chosen run of each seed."""
    return {
        log.path.name
        for seed, logs in record.by_seed.items()
        for log in logs
        if seed in chosen and all(chosen[seed].get(s) == (loss, bpb) for s, loss, bpb in log.finals)
    }
