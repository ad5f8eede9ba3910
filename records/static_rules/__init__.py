"""Tell what can be told of a record folder without running it.

A rule returns PASS or FAIL only for what the files decide, and NOT CHECKED, with the reason, for
the rest. Public folders of all ages are understood; nothing in a folder is run or imported.
"""

from pathlib import Path

from reading import Verdict

from static_rules.files import check_files, check_metadata
from static_rules.improvement import check_improvement
from static_rules.record import LETTER, Record, find_artifact
from static_rules.runs import check_finished, check_script, check_source
from static_rules.scores import check_deviation, check_score
from static_rules.seeds import check_reruns, check_seeds
from static_rules.sizes import check_digests, check_size, check_sizes_claimed
from static_rules.times import check_eval_time, check_train_time
from static_rules.validation import check_leakage, check_val_bytes

__all__ = ["check", "find_artifact"]


def check(
    folder: Path, artifact: Path | None, best: Path | None, rules: str = LETTER
) -> list[Verdict]:
    """Apply every static rule to a record folder.

    `best` is the folder of the record to beat; without it, the best one beside `folder` is taken.
    `rules` are the challenge's by the LETTER, or as its organisers applied them: PRACTICE.
    """
    record = Record(folder, artifact, best, rules)
    table = {
        "files": check_files,
        "metadata": check_metadata,
        "script": check_script,
        "source": check_source,
        "finished": check_finished,
        "score": check_score,
        "seeds": check_seeds,
        "reruns": check_reruns,
        "deviation": check_deviation,
        "size": check_size,
        "sizes_claimed": check_sizes_claimed,
        "digests": check_digests,
        "train_time": check_train_time,
        "eval_time": check_eval_time,
        "val_bytes": check_val_bytes,
        "leakage": check_leakage,
        "improvement": check_improvement,
    }
    verdicts = []
    for name, rule in table.items():
        state, evidence = rule(record)
        verdicts.append(Verdict(name, state, " ".join(evidence.split())))
    return verdicts
