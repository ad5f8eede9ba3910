"""Rules that are checked by running a record's script as a black box on streams of the auditor's.

The script is started a few times in fresh folders. It scores real text, the same again, with
another end, beside hundreds of streams that share a beginning, and with tokens that chance has
replaced. What it must not do then shows in its NLLs, whatever the model inside:

    isolation      it ran without the reviewer's rights
    runs           it scores in EVAL_ONLY, with nothing beside it but the files of the protocol
    once           each token but a stream's first has one NLL: finite, not negative, not left out
    printed_score  the printed loss is the mean of the saved NLLs
    bytes          the printed bits per byte are of the bytes that the tokens decode to, or a
                   sidecar counts, which agrees with the text document by document
    claim          a score in the record's logs comes out again on the real data, or can
    repeatability  two runs on the same tokens agree
    streams        a stream's NLLs do not depend on streams beside it, nor on SCORE_STREAMS
    causality      no NLL before position t moves when everything from t on is replaced
    normalization  the probabilities exp(-NLL) of all ids sum to 1, at every depth
    fixed          they still do when each of these ids is followed by something else
    paid_prefix    validation text is not easier than unseen text of the same source, and is not
                   in the training shards beside it

A rule whose premise another rule found broken is NOT CHECKED: which of two runs to believe is
not known if runs differ, and no sum means anything if predictions move with what follows.

The evidence states what would have been found with a probability of 99%. Time bounds the work, not
a count of tokens. Each audit draws its texts and places anew; its seed is printed.
"""

import secrets
import sys
from pathlib import Path

import numpy as np
from reading import NOT_CHECKED, PASS, WARN, Verdict
from script import SCRIPT, Script
from streams import ByteCounter, read_validation, shard_size, validation_shards

from dynamic_rules.causality import judge_causality, stream_runs
from dynamic_rules.chance import Proposal, chance_runs
from dynamic_rules.claims import claim_run
from dynamic_rules.copies import judge_copies
from dynamic_rules.memory import memory_run, read_unseen
from dynamic_rules.plain import first_runs, with_another_end
from dynamic_rules.plan import Plan
from dynamic_rules.session import Session
from dynamic_rules.sidecars import judge_sidecar
from dynamic_rules.sums import sum_runs
from dynamic_rules.writer import Writer

__all__ = ["RULES", "Plan", "check"]

RULES = (
    *("isolation", "runs", "once", "printed_score", "bytes", "claim", "repeatability"),
    *("streams", "causality", "normalization", "fixed", "paid_prefix"),
)
# What must not have failed for a rule to be checked.
BASIC = ("runs", "once")
NEEDS = {
    "streams": (*BASIC, "repeatability"),
    "causality": (*BASIC, "repeatability"),
    "normalization": (*BASIC, "repeatability", "streams", "causality"),
    "fixed": (*BASIC, "repeatability", "streams", "causality", "normalization"),
    "paid_prefix": (*BASIC, "repeatability", "streams"),
}
CORPUS = 2**20  # tokens of the data that the auditor writes from
SHORTEST = 64  # tokens of validation data


def check(
    folder: Path,
    artifact: Path,
    data: Path,
    tokenizer: Path,
    plan: Plan | None = None,
    seed: int | None = None,
    unseen: Path | None = None,
    isolated: bool = True,
) -> list[Verdict]:
    """Audit the script in `folder` with this artifact.

    `unseen` is a folder of text to compare validation text with; by default the training shards of
    `data`. The costs are told on standard error before it starts. `seed` repeats an audit; by
    default no two are alike.
    """
    plan = plan or Plan()
    seed = secrets.randbits(32) if seed is None else seed
    try:
        tokens, counter = read_validation(data, CORPUS), ByteCounter(tokenizer)
        shards = validation_shards(data)
        whole = sum(map(shard_size, shards))
        script = Script(folder, artifact, tokenizer, data, isolated)
        if len(tokens) < SHORTEST:
            raise ValueError(f"{data}: {len(tokens)} validation tokens; {SHORTEST} are needed")
        counter.count(tokens)
        other, name = read_unseen(data, unseen, CORPUS, counter.size)
    except (OSError, ValueError, RuntimeError) as error:
        return [Verdict(rule, NOT_CHECKED, " ".join(str(error).split())) for rule in RULES]
    joints = counter.borders(tokens) if counter.case_ops else None
    writer = Writer(tokens, counter.size, counter.bos, seed, joints)
    session = Session(script, counter, writer, plan)
    session.shards = len(shards)
    session.note("isolation", PASS if isolated else WARN, script.apart)
    print(
        f"dynamic audit, seed {seed}: {folder / SCRIPT} ({script.apart}), {plan.least:.0f} to "
        f"{max(plan.least, plan.most):.0f} s, the more the slower the script is",
        file=sys.stderr,
    )
    judge_sidecar(session, data)
    judge_copies(session, data)
    all_runs(session, folder, data, whole, other, name)
    runs = f"{session.starts} starts, {session.tokens} tokens, {session.spent:.0f} s; seed {seed}"
    if counter.bos < 0:
        runs += "; the tokenizer has no BOS, so nothing was tried at borders of documents"
    session.say("runs", True, runs)
    return verdicts(session)


def all_runs(
    session: Session, folder: Path, data: Path, whole: int, other: np.ndarray, name: str
) -> None:
    """Go through all starts, each unless a rule before it leaves nothing to learn."""
    if not first_runs(session):
        return
    scored = claim_run(session, folder, data, whole)
    if scored is None:
        return
    real = scored[0][: session.length], scored[1][: session.length - 1]
    with_another_end(session, *real)
    apart = not session.failed(*BASIC) and stream_runs(session)
    if session.failed(*BASIC):
        return
    if not judge_causality(session) or not apart:
        return
    sum_runs(session)
    session.anchor = real
    memory_run(session, data, whole, other, name)
    if not session.failed(*NEEDS["fixed"], "fixed"):
        chance_runs(session, Proposal(read_corpus(session, other), session.counter.size))


def read_corpus(session: Session, other: np.ndarray) -> np.ndarray:
    """Join all text that the auditor has, as far as the vocabulary holds it."""
    text = np.concatenate([session.writer.tokens, other])
    return text[text < session.counter.size]


def verdicts(session: Session) -> list[Verdict]:
    """List what was found, and why the rest was not checked."""
    for rule in RULES:
        broken = [name for name in NEEDS.get(rule, BASIC) if session.failed(name)]
        if rule not in session.verdicts:
            why = f"needs {' and '.join(broken)}" if broken else "not reached"
            session.say(rule, None, why)
    return [session.verdicts[rule] for rule in RULES]
