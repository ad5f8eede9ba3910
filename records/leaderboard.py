"""Write the leaderboard, records/README.md and best_score.svg, from all record folders.

    python records/leaderboard.py                 write both files
    python records/leaderboard.py --check         only tell whether they are up to date
    python records/leaderboard.py --compare A B   put two record folders side by side

The same folders give the same bytes. A folder that cannot be read is named, not ranked.
"""

import argparse
import datetime
import hashlib
import html
import math
import os
import re
import shlex
import urllib.parse
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import program
import scipy.stats
import static_rules
from reading import FAIL, PASS, WARN, Log, Submission, read_logs, read_submission

FULL_SPLIT = range(151_000_000, 151_200_000)  # bytes of FineWeb's validation split, 151.08 MB
FINEWEB = "FineWeb's validation split"
SCORES = ("val_bpb", "val_loss")
SAME_TOKENS = 0.002  # nats a token of a BPB differ by less than this, as rounding does
HIGHEST = 100  # no score and no loss is above this: it is a mistake
ASIDE = {"SEED", "RUN_ID", "OUT_DIR", "SAVE_NLL", "ARTIFACT"}  # say nothing of the method
HEAD = """# Records

This page and its picture are made by `python records/leaderboard.py` from the submission.json of
the folders below; a test compares them. Scores are bits per byte of validation text, lower is
better: the mean over seeds ± the sample deviation. Only scores on the same text are ranked
together. "Audit" is what the static rules of `python records/audit.py FOLDER` find: the rules that
fail; or how many pass of all, and which warn. The rest could not be checked. The audit of an
artifact as a black box takes minutes and is not part of this page.

    python records/submit.py RUN_ID [RUN_ID ...] --name N --author A --github-id G --track T
    python records/audit.py records/TRACK/FOLDER
    python records/leaderboard.py [--compare FOLDER FOLDER]
"""


@dataclass(frozen=True)
class Entry:
    """A record folder that has a score."""

    claim: Submission
    state: str  # of the audit

    @property
    def folder(self) -> Path:
        return self.claim.folder

    @property
    def deviation(self) -> float:
        """The deviation over seeds: as stated, else of the scores stated; nan if there is none."""
        if 0 <= self.claim.val_bpb_std < HIGHEST:
            return self.claim.val_bpb_std
        scores = seed_values(self.claim, "val_bpb")
        return stdev(scores) if len(scores) > 1 else math.nan

    @property
    def day(self) -> datetime.date | None:
        """The day of the record, if its date is one."""
        try:
            return datetime.date.fromisoformat(self.claim.date[:10])
        except ValueError:
            return None


def plausible(value: float) -> bool:
    """Tell whether a number can be a score or a loss."""
    return 0 < value < HIGHEST


def seed_values(claim: Submission, name: str) -> list[float]:
    """List a score or loss of every seed that states it."""
    values = [numbers.get(name, math.nan) for numbers in claim.seeds.values()]
    return [value for value in values if plausible(value)]


def validation_text(claim: Submission) -> str:
    """Name the text a score is on; public records, which do not say it, are on FineWeb's."""
    count, name = claim.raw.get("val_bytes"), claim.raw.get("dataset", "unnamed data")
    if not isinstance(count, int) or count in FULL_SPLIT:
        return FINEWEB
    return plain(f"{count:,} bytes of {name}")


def plain(text: str) -> str:
    """Put text in one line of printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


Tracks = dict[str, tuple[list[Entry], list[tuple[Path, str]]]]  # as read_track reads them


# ===================================== COLLECTING =====================================


def audit_state(folder: Path) -> str:
    """Say what the static audit finds, in a few words."""
    try:
        verdicts = static_rules.check(folder, None, None)
    except Exception as error:  # whatever is in a folder, the page must come out
        return f"could not run: {type(error).__name__}"
    if failed := sorted({verdict.rule for verdict in verdicts if verdict.state == FAIL}):
        return f"FAIL: {', '.join(failed)}"
    passed = f"{sum(verdict.state == PASS for verdict in verdicts)} of {len(verdicts)} pass"
    warned = sorted({verdict.rule for verdict in verdicts if verdict.state == WARN})
    return f"{passed}, WARN: {', '.join(warned)}" if warned else passed


def read_track(track: Path) -> tuple[list[Entry], list[tuple[Path, str]]]:
    """Read a track: entries, best first, and folders without a score, with the reason."""
    entries, broken = [], []
    for folder in sorted(track.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        try:
            claim = read_submission(folder)
        except (ValueError, OSError, RecursionError) as error:
            broken.append((folder, str(error).replace(f"{folder}/", "")))
            continue
        if plausible(claim.val_bpb):
            entries.append(Entry(claim, audit_state(folder)))
        else:
            broken.append((folder, f"submission.json: no val_bpb between 0 and {HIGHEST} in it"))
    entries.sort(key=lambda e: (e.claim.val_bpb, e.claim.date, e.folder.name))
    return entries, broken


def groups(entries: list[Entry]) -> dict[str, list[Entry]]:
    """Group entries by the text that they are scored on, FineWeb's first."""
    texts = sorted({validation_text(e.claim) for e in entries}, key=lambda t: (t != FINEWEB, t))
    return {text: [e for e in entries if validation_text(e.claim) == text] for text in texts}


# ===================================== THE PAGE =====================================


def cell(text: str) -> str:
    """Escape text for a cell of a Markdown table: nothing in it is markup."""
    text = html.escape(plain(text), quote=False)
    return re.sub(r"([\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)  # a_b is no markup


def table(rows: list[list[str]]) -> str:
    """Write a Markdown table of cells; the first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def link(folder: Path, text: str) -> str:
    """Write a link to a record folder, from the page."""
    place = f"{folder.parent.name}/{folder.name}"
    return f"[{cell(text)}]({urllib.parse.quote(os.fsencode(place))})"


def score_text(entry: Entry) -> str:
    """Write a score with its deviation."""
    deviation = "" if math.isnan(entry.deviation) else f" ± {entry.deviation:.4f}"
    return f"{entry.claim.val_bpb:.4f}{deviation}"


def ranking(entries: list[Entry]) -> str:
    """Rank entries that are scored on the same text; equal scores share a rank."""
    rows = [["rank", "val_bpb", "seeds", "bytes", "record", "author", "date", "audit"]]
    scores = [e.claim.val_bpb for e in entries]
    for e in entries:
        claim, seeds = e.claim, len(seed_values(e.claim, "val_bpb"))
        rows.append(
            [
                str(1 + scores.index(claim.val_bpb)),
                score_text(e),
                str(seeds or "?"),
                f"{claim.bytes_total:,}" if claim.bytes_total else "?",
                link(e.folder, claim.name or e.folder.name),
                cell(claim.author or claim.github_id or "?"),
                cell(claim.date[:10] or "?"),
                cell(e.state),
            ]
        )
    return table(rows)


def page(tracks: Tracks, drawn: bool) -> str:
    """Write records/README.md, with the picture if there is something in it."""
    parts = [HEAD.strip()]
    if drawn:
        parts.append("![The best score over time](best_score.svg)")
    for track, (entries, broken) in tracks.items():
        parts.append(f"## {track.removeprefix('track_')}")
        for text, group in groups(entries).items():
            parts += [f"### On {cell(text)}", ranking(group)]
        if broken:
            lines = [f"- {link(folder, folder.name)}: {cell(why)}" for folder, why in broken]
            parts += ["Not ranked:", "\n".join(lines)]
        if not entries and not broken:
            parts.append("No records yet.")
    return "\n\n".join(parts) + "\n"


# ===================================== THE PICTURE =====================================
# Drawn by hand: what matplotlib writes differs from version to version.

WIDTH, PANEL, LEFT, RIGHT, TOP, BOTTOM = 760, 260, 70, 740, 40, 220


def ticks(low: float, high: float) -> list[float]:
    """Choose three to seven round numbers between low and high, of which low is the smaller."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def best_so_far(entries: list[Entry]) -> list[Entry]:
    """List the dated entries that were the best of their day and of all days before."""
    best: list[Entry] = []
    for e in sorted((e for e in entries if e.day), key=lambda e: (e.day, e.claim.val_bpb)):
        if not best or e.claim.val_bpb < best[-1].claim.val_bpb:
            best.append(e)
    return best


def panel(title: str, entries: list[Entry], top: int) -> list[str]:
    """Draw one panel in SVG: a dot for every record, and a line of the best so far."""
    days = [e.day.toordinal() for e in entries]
    scores = [e.claim.val_bpb for e in entries]
    first, last = min(days), max(days)
    margin = max(0.1 * (max(scores) - min(scores)), 0.002 * max(scores))
    low, high = min(scores) - 2 * margin, max(scores) + margin

    def x(day: int) -> float:
        return LEFT + 20 + (RIGHT - LEFT - 40) * ((day - first) / (last - first or 1))

    def y(score: float) -> float:
        return top + BOTTOM - (BOTTOM - TOP) * (score - low) / (high - low)

    def text(at_x: float, at_y: float, words: str, anchor: str) -> str:
        place = f'x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}"'
        return f"<text {place}>{html.escape(plain(words))}</text>"

    parts = [text(LEFT, top + 24, title, "start")]
    for tick in ticks(low, high):
        line = f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>'
        parts += [line, text(LEFT - 8, y(tick) + 4, f"{tick:.4f}", "end")]
    for day in sorted({first, last}):
        date = datetime.date.fromordinal(day).isoformat()
        anchor = "start" if day == first else "end"
        parts.append(text(x(day), top + BOTTOM + 18, date, anchor))
    path, best = "", best_so_far(entries)
    for e in best:
        at = (x(e.day.toordinal()), y(e.claim.val_bpb))
        path += "M{:.1f} {:.1f}".format(*at) if not path else "H{:.1f}V{:.1f}".format(*at)
    parts.append(f'<path class="best" d="{path}H{RIGHT}"/>')
    name = best[-1].claim.name or best[-1].folder.name
    label = f"{best[-1].claim.val_bpb:.4f} {name[:60]}"
    parts.append(text(RIGHT, y(best[-1].claim.val_bpb) + 16, label, "end"))
    for e in sorted(entries, key=lambda e: (e.day, e.folder.name)):
        at = f'cx="{x(e.day.toordinal()):.1f}" cy="{y(e.claim.val_bpb):.1f}"'
        kind = "new" if e in best else "other"
        title_of = html.escape(plain(f"{e.claim.name}: {e.claim.val_bpb:.4f}"))
        parts.append(f'<circle class="{kind}" {at} r="4"><title>{title_of}</title></circle>')
    return parts


def picture(tracks: Tracks) -> str:
    """Draw the best score over time as SVG: a panel for every track and validation text."""
    panels: list[str] = []
    count = 0
    for track, (entries, _) in tracks.items():
        for where, group in groups(entries).items():
            if dated := [e for e in group if e.day]:
                title = f"{track.removeprefix('track_')}: bits per byte, {where}"
                panels += panel(title, dated, count * PANEL)
                count += 1
    size = f'width="{WIDTH}" height="{PANEL * count}" viewBox="0 0 {WIDTH} {PANEL * count}"'
    style = (
        "text{font:12px sans-serif;fill:#444}.grid{stroke:#ddd}.new{fill:#c44e52}"
        ".best{stroke:#c44e52;stroke-width:2;fill:none}.other{fill:#4c72b0}"
    )
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{style}</style>"]
    ground = f'<rect width="{WIDTH}" height="{PANEL * count}" fill="#fff"/>'
    return "\n".join([*head, ground, *panels, "</svg>"]) + "\n"


# ===================================== COMPARING =====================================


@dataclass(frozen=True)
class Side:
    """One of two record folders that are compared."""

    claim: Submission
    logs: list[Log]

    @property
    def name(self) -> str:
        return self.claim.folder.resolve().name

    @property
    def settings(self) -> dict[str, str]:
        """The settings that the logs state, as a shell means them; {} if they do not."""
        stated = next((log.settings for log in self.logs if log.settings), {})
        return {name: unquote(text) for name, text in stated.items()}

    def scores(self, name: str) -> list[float]:
        """List val_bpb or val_loss of every seed: as stated, else the last one of every log."""
        column = {"val_loss": 1, "val_bpb": 2}[name]
        found = [log.finals[-1][column] for log in self.logs if log.finals]
        return seed_values(self.claim, name) or [score for score in found if plausible(score)]

    def nats_a_bpb(self) -> float:
        """Tell the nats a token of a BPB, which depend on text and tokenizer alone; nan if unknown.

        They are the bytes a token, times ln 2.
        """
        losses, scores = self.scores("val_loss"), self.scores("val_bpb")
        if not losses or len(losses) != len(scores):
            losses, scores = [self.claim.val_loss], [self.claim.val_bpb]
        known = plausible(fmean(losses)) and plausible(fmean(scores))
        return fmean(losses) / fmean(scores) if known else math.nan

    def facts(self) -> dict[str, str]:
        """Describe the record: the name of each fact, and its text."""
        claim, stepped = self.claim, [log for log in self.logs if log.steps]
        return {
            "": self.name,
            "validation text": validation_text(claim),
            "script": script_text(claim.folder),
            "val_bpb, claimed": f"{claim.val_bpb:.5f}" if plausible(claim.val_bpb) else "?",
            **{f"{name}, seeds": mean_text(self.scores(name), 5) for name in SCORES},
            "bytes": f"{claim.bytes_total:,}" if claim.bytes_total else "?",
            "bytes of code": f"{claim.bytes_code:,}" if claim.bytes_code else "?",
            "steps": mean_text([log.steps for log in stepped], 0),
            "training, s": mean_text([log.train_ms / 1000 for log in self.logs], 1),
            "ms a step": mean_text([log.train_ms / log.steps for log in stepped], 2),
        }


def compare(a: Path, b: Path) -> str:
    """Put two folders side by side: scores, tests, sizes, times, settings that differ."""
    one, two = (Side(read_submission(folder), read_logs(folder)) for folder in (a, b))
    facts, others = one.facts(), two.facts()
    silent = [side.name for side in (one, two) if not side.settings]
    if not silent:
        facts |= settings_beside(one, two)
        others |= settings_beside(two, one)
    first, second = max(map(len, facts)), max(map(len, facts.values()))
    lines = [f"{n:{first}}  {text:{second}}  {others[n]}".rstrip() for n, text in facts.items()]
    lines += tests_of_scores(one, two)
    if silent:
        lines.append(f"Settings not compared: no log states them in {', '.join(silent)}")
    return "\n".join(lines)


def tests_of_scores(one: Side, two: Side) -> list[str]:
    """Test what can be compared: BPB on one text, and losses a token of one tokenizer on it."""
    if validation_text(one.claim) != validation_text(two.claim):
        return ["The scores are on different texts: they do not compare."]
    lines = [f"val_bpb: {welch(one.scores('val_bpb'), two.scores('val_bpb'))}"]
    rates = one.nats_a_bpb(), two.nats_a_bpb()
    if math.isnan(sum(rates)):
        return [*lines, "val_loss: not compared: whether the tokenizers are the same is not told"]
    if abs(rates[0] / rates[1] - 1) > SAME_TOKENS:
        return [*lines, "val_loss: not compared: the tokenizers differ, and so do tokens"]
    return [*lines, f"val_loss: {welch(one.scores('val_loss'), two.scores('val_loss'))}"]


def settings_beside(side: Side, other: Side) -> dict[str, str]:
    """Tell the settings of one side that are not those of the other."""
    names = sorted({*side.settings, *other.settings} - ASIDE)
    differ = [name for name in names if side.settings.get(name) != other.settings.get(name)]
    return {name: side.settings.get(name, "(none)") for name in differ}


def script_text(folder: Path) -> str:
    """Tell size and the start of the SHA-256 of a folder's script."""
    path = folder / "train_gpt.py"
    if not path.is_file():
        return "?"
    data = path.read_bytes()
    return f"{len(data):,} bytes, SHA-256 {hashlib.sha256(data).hexdigest()[:12]}"


def mean_text(values: list[float], digits: int) -> str:
    """Write mean, deviation and number of values."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return "?"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):,.{digits}f}{deviation} (n={len(values)})"


def welch(a: list[float], b: list[float]) -> str:
    """Test two means by Welch's test, two-sided, and say it in a line."""
    if min(len(a), len(b)) < 2:
        return "Welch's test needs two seeds or more on each side"
    difference = fmean(a) - fmean(b)
    if len({*a}) == len({*b}) == 1:
        return f"difference {difference:+.5f}; no deviation on either side, so no test"
    with warnings.catch_warnings():  # no deviation on one side is no matter
        warnings.simplefilter("ignore", RuntimeWarning)
        test = scipy.stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval()
    return (
        f"difference {difference:+.5f}, 95% from {low:+.5f} to {high:+.5f}; "
        f"Welch t = {test.statistic:.2f}, df = {test.df:.1f}, p = {test.pvalue:.2g}"
    )


def unquote(text: str) -> str:
    """Read a word as a shell means it; as it stands if its quoting is broken."""
    try:
        return " ".join(shlex.split(text))
    except ValueError:
        return text


# ===================================== COMMAND LINE =====================================


def generate(records: Path) -> dict[str, str]:
    """Write the files of a records folder's leaderboard: name and content."""
    tracks = {t.name: read_track(t) for t in sorted(records.glob("track_*")) if t.is_dir()}
    drawing = picture(tracks)
    return {"README.md": page(tracks, "<circle" in drawing), "best_score.svg": drawing}


def main(arguments: list[str]) -> None:
    """Write or check the leaderboard, or compare two records."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two folders")
    here = Path(__file__).resolve().parent
    parser.add_argument("--records", type=Path, default=here, help="default: this folder")
    options = parser.parse_args(arguments)
    if options.compare:
        try:
            return print(compare(*options.compare))
        except (ValueError, OSError) as error:
            raise SystemExit(f"leaderboard.py: error: {error}") from None
    if not options.records.is_dir():
        raise SystemExit(f"leaderboard.py: error: {options.records}: no such folder")
    files = {options.records / name: text for name, text in generate(options.records).items()}
    stale = [p for p, text in files.items() if not p.is_file() or p.read_bytes() != text.encode()]
    if options.check:
        if stale:
            names = ", ".join(path.name for path in stale)
            raise SystemExit(f"out of date: {names}; run python records/leaderboard.py")
        return print("up to date")
    for path in stale:
        path.write_text(files[path], encoding="utf-8", newline="\n")
    print("\n".join(f"wrote {path}" for path in stale) or "up to date")


if __name__ == "__main__":
    program.run(main)
