"""What a new record must gain: 0.005 nats over the best one, by a test."""

import math
import statistics

from reading import FAIL, NOT_CHECKED, PASS, to_number, track_of
from scipy import stats

from static_rules.files import read_date, read_moment
from static_rules.record import LETTER, Finding, Record, agrees, plural
from static_rules.scores import headline_scores
from static_rules.validation import check_leakage, implied_bytes

NATS, P_VALUE = 0.005, 0.01
LATE_P_VALUE = 0.25  # of any gain at all: as organisers judged the last records
OLDER, YOUNGER, UNSURE = "older", "younger", "unsure"


def check_improvement(record: Record) -> Finding:
    """Check that the score beats the best record's by 0.005 nats with p < 0.01."""
    if record.best is not None:
        rival = Record(record.best)
        if not rival.submission or math.isnan(rival.submission.val_bpb):
            return NOT_CHECKED, f"{record.best} states no val_bpb: {rival.problem}"
        if reason := other_text(record, rival):
            return NOT_CHECKED, f"other validation text: {reason}"
        return compare(record, rival)
    if not record.is_timed:
        return NOT_CHECKED, f"track {record.track or 'unknown'} asks for none; --best FOLDER tests"
    if not record.submission or not read_date(record.submission.date):
        return NOT_CHECKED, "the record has no date; name the record to beat by --best"
    return compare_with_best(record)


def compare_with_best(record: Record) -> Finding:
    """Test against the best of the older records beside this one."""
    found = [rival for rival in rivals(record) if not other_text(record, rival)]
    if not found:
        return NOT_CHECKED, "there is no older record beside it; name one by --best"
    best = found[0]
    if order_in_time(record, best) == UNSURE:
        dates = f"{best.submission.date} and {record.submission.date}"
        reason = f"which of the two came first is not told: {dates}"
        return NOT_CHECKED, f"{best.folder.name} is of the same day, {reason}; --best FOLDER tests"
    return compare(record, best)


def rivals(record: Record) -> list[Record]:
    """List the records beside this one that are not known to be younger, best score first."""
    if not track_of(record.folder):
        return []
    own = record.folder.absolute()
    found = []
    for folder in sorted(own.parent.iterdir()):
        if folder == own or not folder.is_dir():
            continue
        rival = Record(folder)
        if not rival.submission or math.isnan(rival.submission.val_bpb):
            continue
        if order_in_time(record, rival) == YOUNGER or check_leakage(rival)[0] == FAIL:
            continue
        found.append(rival)
    return sorted(found, key=lambda rival: rival.submission.val_bpb)


def order_in_time(record: Record, rival: Record) -> str:
    """Tell whether a rival is older than a record; one without a date never is.

    The time of day decides where both tell it. On the same day it is unsure without.
    """
    own, other = record.submission.date, rival.submission.date
    own_moment, other_moment = read_moment(own), read_moment(other)
    if own_moment and other_moment and own_moment != other_moment:
        return OLDER if other_moment < own_moment else YOUNGER
    own_day = own_moment.date() if own_moment else read_date(own)
    other_day = other_moment.date() if other_moment else read_date(other)
    if not own_day or not other_day:
        return YOUNGER
    if own_day == other_day:
        return UNSURE
    return OLDER if other_day < own_day else YOUNGER


def other_text(record: Record, rival: Record) -> str:
    """Tell that two records' scores are of texts of other sizes; "" if nothing says so."""
    one, two = scored_bytes(record), scored_bytes(rival)
    if one > 0 and two > 0 and abs(one / two - 1) > 0.03:
        return f"scored {one / 1e6:.1f} MB, {rival.folder.name} {two / 1e6:.1f} MB"
    return ""


def scored_bytes(record: Record) -> float:
    """Tell about how many bytes of text the scores are of; nan if nothing says it."""
    sizes = (size for size in map(implied_bytes, record.logs) if math.isfinite(size))
    return next(sizes, to_number(record.raw.get("val_bytes")))


def compare(record: Record, rival: Record) -> Finding:
    """Test the seeds' scores against the rival's, in nats per token of this record."""
    scores, place = headline_scores(record)
    own = [bpb for _, bpb in scores.values() if math.isfinite(bpb)]
    if len(own) < 2:
        return NOT_CHECKED, f"{plural(len(own), 'seed')} with scores; the test needs two or more"
    ratios = [loss / bpb for loss, bpb in scores.values() if loss > 0 and bpb > 0]
    if not ratios and record.submission and record.submission.val_loss > 0:
        ratios = [record.submission.val_loss / record.submission.val_bpb]
    if not ratios:
        return NOT_CHECKED, "neither logs nor submission.json state val_loss: nats are not known"
    nats = statistics.fmean(ratios)  # per token, of a BPB
    other = rival_scores(rival)
    ours, theirs = [nats * bpb for bpb in own], [nats * bpb for bpb in other]
    gain = statistics.fmean(theirs) - statistics.fmean(ours)
    side = "better" if gain >= 0 else "worse"
    known = f"{rival.folder.name} ({statistics.fmean(other):.8f} BPB)"
    text = f"{abs(gain):.5f} nats per token {side} than {known}"
    if len(set(ours)) == 1 and len(set(theirs)) == 1:
        return NOT_CHECKED, f"{text}; all seeds have one score: no noise to test against"
    return judge_gain(record.rules, ours, theirs, text, place)


def judge_gain(
    rules: str, ours: list[float], theirs: list[float], text: str, place: str
) -> Finding:
    """Test the losses by the rules that were asked for, and say which they were."""
    p, test = means_test(ours, theirs, NATS)
    told = f"{text}; better by {NATS} or more: p = {p:.2g} ({test}; scores from {place})"
    if rules == LETTER:
        return PASS if p < P_VALUE else FAIL, f"{told}; by the letter, p < {P_VALUE}"
    late, _ = means_test(ours, theirs, 0)
    told = f"{told}; better at all: p = {late:.2g}; in practice, p < {LATE_P_VALUE} was enough"
    return PASS if p < P_VALUE or late < LATE_P_VALUE else FAIL, told


def rival_scores(rival: Record) -> list[float]:
    """List the rival's scores by seed where they agree with its headline, else that alone."""
    scores = [bpb for _, bpb in headline_scores(rival)[0].values() if math.isfinite(bpb)]
    headline = rival.submission.val_bpb
    if len(scores) < 2 or not agrees(headline, statistics.fmean(scores)):
        return [headline]
    return scores


def means_test(ours: list[float], theirs: list[float], margin: float) -> tuple[float, str]:
    """Test one-sided that our mean is lower by more than a margin; p, and the test in words."""
    shifted = [loss + margin for loss in ours]
    if len(theirs) > 1:
        p = stats.ttest_ind(shifted, theirs, equal_var=False, alternative="less").pvalue
        return p, f"Welch's one-sided test, {len(ours)} and {len(theirs)} seeds"
    p = stats.ttest_1samp(shifted, theirs[0], alternative="less").pvalue
    return p, f"one-sided t-test of {len(ours)} seeds against its one number, its noise unknown"
