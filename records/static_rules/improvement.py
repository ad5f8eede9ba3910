"""What a new record must gain: 0.005 nats over the best one, by a test."""

import math
import statistics

from reading import FAIL, NOT_CHECKED, PASS, to_number, track_of
from scipy import stats

from static_rules.files import read_date
from static_rules.record import Finding, Record, agrees, plural
from static_rules.scores import headline_scores
from static_rules.validation import check_leakage, implied_bytes

NATS, P_VALUE = 0.005, 0.01


def check_improvement(record: Record) -> Finding:
    """The score beats the best record's by 0.005 nats with p < 0.01."""
    if record.best is None and not record.is_timed:
        return NOT_CHECKED, f"track {record.track or 'unknown'} asks for none; --best FOLDER tests"
    if record.best is not None:
        chosen = [Record(record.best, None, None)]
        if not chosen[0].submission or math.isnan(chosen[0].submission.val_bpb):
            return NOT_CHECKED, f"{record.best} states no val_bpb: {chosen[0].problem}"
    else:
        chosen = [rival for rival in rivals(record) if not comparable(record, rival)]
    if not chosen:
        return NOT_CHECKED, "there is no older record beside it; name one by --best"
    if reason := comparable(record, chosen[0]):
        return NOT_CHECKED, f"other validation text: {reason}"
    scores, place = headline_scores(record)
    own = [bpb for _, bpb in scores.values() if math.isfinite(bpb)]
    ratios = [loss / bpb for loss, bpb in scores.values() if loss > 0 and bpb > 0]
    if len(own) < 2:
        return NOT_CHECKED, f"{plural(len(own), 'seed')} with scores; the test needs two or more"
    if not ratios and record.submission and record.submission.val_loss > 0:
        ratios = [record.submission.val_loss / record.submission.val_bpb]
    if not ratios:
        return NOT_CHECKED, "neither logs nor submission.json state val_loss: nats are not known"
    return judge_improvement(own, chosen[0], statistics.fmean(ratios), place)


def judge_improvement(own: list[float], rival: Record, nats: float, place: str) -> Finding:
    """One-sided t-test that the mean is lower by more than 0.005 nats per token.

    `nats` are nats per token for a BPB: the rival's scores are put into tokens of this record.
    """
    other = [bpb for _, bpb in headline_scores(rival)[0].values() if math.isfinite(bpb)]
    if len(other) < 2 or not agrees(rival.submission.val_bpb, statistics.fmean(other)):
        other = [rival.submission.val_bpb]
    ours, theirs = ([nats * bpb for bpb in scores] for scores in (own, other))
    gain = statistics.fmean(theirs) - statistics.fmean(ours)
    side = "better" if gain >= 0 else "worse"
    known = f"{rival.folder.name} ({statistics.fmean(other):.8f} BPB)"
    text = f"{abs(gain):.5f} nats per token {side} than {known}"
    if len(set(ours)) == 1 and len(set(theirs)) == 1:
        return NOT_CHECKED, f"{text}; all seeds have one score: no noise to test against"
    shifted = [loss + NATS for loss in ours]
    if len(theirs) > 1:
        p = stats.ttest_ind(shifted, theirs, equal_var=False, alternative="less").pvalue
        test = f"Welch's one-sided test, {len(ours)} and {len(theirs)} seeds"
    else:
        p = stats.ttest_1samp(shifted, theirs[0], alternative="less").pvalue
        test = f"one-sided t-test of {len(ours)} seeds against its one number, its noise unknown"
    state = PASS if p < P_VALUE else FAIL
    return state, f"{text}; better by {NATS} or more: p = {p:.2g} ({test}; scores from {place})"


def comparable(record: Record, rival: Record) -> str:
    """Why two records' scores cannot be compared; "" if nothing speaks against it."""
    one, two = validation_text(record), validation_text(rival)
    if one > 0 and two > 0 and abs(one / two - 1) > 0.03:
        return f"scored {one / 1e6:.1f} MB, {rival.folder.name} {two / 1e6:.1f} MB"
    return ""


def validation_text(record: Record) -> float:
    """About how many bytes of text the scores are of, or nan."""
    sizes = [size for size in map(implied_bytes, record.logs) if math.isfinite(size)]
    stated = to_number(record.submission.raw.get("val_bytes")) if record.submission else math.nan
    return sizes[0] if sizes else stated


def rivals(record: Record) -> list[Record]:
    """Records beside this one, that are not younger, best score first."""
    found = []
    own_date = read_date(record.submission.date) if record.submission else None
    parent = record.folder.absolute().parent
    for folder in sorted(parent.iterdir()) if track_of(record.folder) else []:
        rival = Record(folder, None, None)
        if folder == record.folder.absolute() or not folder.is_dir() or not rival.submission:
            continue
        date = read_date(rival.submission.date)
        younger = own_date and date and date > own_date
        scored = not math.isnan(rival.submission.val_bpb)
        if scored and not younger and check_leakage(rival)[0] != FAIL:
            found.append(rival)
    return sorted(found, key=lambda rival: rival.submission.val_bpb)
