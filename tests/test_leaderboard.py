"""records/leaderboard.py: ranks, deviations, the picture, comparisons, folders of any content."""

import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from conftest import REPO, copy_checkout, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(REPO / "records"))
import leaderboard
from reading import Verdict

TRACK = "track_10min_16mb"


def write_record(
    records: Path, folder: str, scores: list[float], track: str = TRACK, **fields: object
) -> Path:
    """A record folder whose submission.json holds these seeds, with other fields as given."""
    content = {
        "name": folder,
        "author": "Ann",
        "github_id": "ann",
        "date": folder[:10],
        "val_bpb": sum(scores) / len(scores),
        "bytes_total": 15_900_000,
        "seed_results": {str(i): {"val_bpb": v, "val_loss": 2 * v} for i, v in enumerate(scores)},
    }
    place = records / track / folder
    place.mkdir(parents=True)
    content = {name: v for name, v in (content | fields).items() if v is not None}
    (place / "submission.json").write_text(json.dumps(content))
    return place


def write_log(folder: Path, seed: int, words: dict[str, object], bpb: float = 1.25) -> None:
    """A log in the form of our runs."""
    block = "\n".join(f"{name}={text}" for name, text in ({"SEED": seed} | words).items())
    (folder / f"train_seed{seed}.log").write_text(
        f"import os\n{'=' * 100}\n{block}\n"
        f"step:40/40 val_loss:3.0000 val_bpb:1.3000 train_time:{1000 + seed}ms step_avg:1.00ms\n"
        f"final_int8_zstd_roundtrip_exact val_loss:{2 * bpb:.8f} val_bpb:{bpb:.8f}\n"
    )


@pytest.fixture
def records(tmp_path, monkeypatch):
    """An empty records folder; the audit of each folder is one rule that passes."""
    verdict = [Verdict("files", "PASS", ""), Verdict("size", "NOT CHECKED", "")]
    monkeypatch.setattr(leaderboard.static_rules, "check", lambda *arguments: verdict)
    (tmp_path / TRACK).mkdir()
    return tmp_path


def rows(records: Path) -> list[list[str]]:
    """The rows of all tables of the page, without their heads."""
    text = leaderboard.generate(records)["README.md"]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [line for line in lines if line[0] not in ("rank", "---")]


def names(records: Path) -> list[str]:
    """The names of the ranked records, from the top."""
    return [re.match(r"\[(.*)\]\(", row[4])[1] for row in rows(records)]


# ===================================== the page =====================================


def test_the_committed_leaderboard_is_up_to_date(tmp_path):
    copy_checkout(tmp_path)
    command = [sys.executable, tmp_path / "records/leaderboard.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_lowest_score_is_first(records):
    for name, score in (("2026-01-01_a", 1.3), ("2026-01-02_b", 1.1), ("2026-01-03_c", 1.2)):
        write_record(records, name, [score])
    assert [(row[0], row[1]) for row in rows(records)] == [
        *(("1", "1.1000"), ("2", "1.2000"), ("3", "1.3000"))
    ]


def test_equal_scores_share_a_rank_and_the_older_is_first(records):
    for name, score in (("2026-01-02_a", 1.1), ("2026-01-01_z", 1.1), ("2026-01-03_c", 1.2)):
        write_record(records, name, [score])
    assert [row[0] for row in rows(records)] == ["1", "1", "3"]
    assert names(records) == ["2026-01-01_z", "2026-01-02_a", "2026-01-03_c"]


def test_the_deviation_is_that_of_the_seeds(records):
    write_record(records, "2026-01-01_a", [1.1, 1.2, 1.4])
    mean = 3.7 / 3
    deviation = math.sqrt(sum((v - mean) ** 2 for v in (1.1, 1.2, 1.4)) / 2)
    assert rows(records)[0][1:3] == [f"{mean:.4f} ± {deviation:.4f}", "3"]


def test_a_stated_deviation_is_shown(records):
    write_record(records, "2026-01-01_a", [1.1], seed_results=None, val_bpb_std=0.0123)
    assert rows(records)[0][1:3] == ["1.1000 ± 0.0123", "?"]


def test_size_author_and_date_are_shown(records):
    write_record(records, "2026-01-01_a", [1.1])
    (row,) = rows(records)
    assert (row[3], row[5], row[6]) == ("15,900,000", "Ann", "2026-01-01")


def test_unknown_facts_are_question_marks(records):
    unknown = dict.fromkeys(["bytes_total", "seed_results", "author", "github_id", "date"])
    write_record(records, "a", [1.1], **unknown)
    (row,) = rows(records)
    assert (row[2], row[3], row[5], row[6]) == ("?", "?", "?", "?")


@pytest.mark.parametrize("name", ["2026-01-01_a", "2026-01-01_a (b) c", "2026-01-01_é#?%20"])
def test_links_lead_to_the_folders(records, name):
    folder = write_record(records, name, [1.1])
    (row,) = rows(records)
    target = row[4].rpartition("](")[2].removesuffix(")")
    assert not {*target} & {*" ()#?"}
    assert (records / leaderboard.urllib.parse.unquote(target)) == folder


def test_markup_in_names_is_text(records):
    write_record(records, "2026-01-01_a", [1.1], name="*a* `b` [c](d) <e> _f_ g|h ~i~ j_k \\")
    shown = r"\*a\* \`b\` \[c\](d) &lt;e&gt; \_f\_ g\|h \~i\~ j_k \\"
    assert rows(records)[0][4].startswith(f"[{shown}](")


def test_the_rules_that_fail_are_named(records, monkeypatch):
    verdicts = [Verdict(name, "FAIL", "") for name in ("size", "files")]
    verdicts += [Verdict("score", "PASS", ""), Verdict("seeds", "NOT CHECKED", "")]
    monkeypatch.setattr(leaderboard.static_rules, "check", lambda *arguments: verdicts)
    write_record(records, "2026-01-01_a", [1.1])
    assert rows(records)[0][7] == "FAIL: files, size"


def test_the_rules_that_pass_are_counted(records):
    write_record(records, "2026-01-01_a", [1.1])
    assert rows(records)[0][7] == "1 of 2 pass"


def test_an_audit_that_crashes_does_not_stop_the_page(records, monkeypatch):
    monkeypatch.setattr(leaderboard.static_rules, "check", lambda *arguments: 1 / 0)
    write_record(records, "2026-01-01_a", [1.1])
    assert rows(records)[0][7] == "could not run: ZeroDivisionError"


def test_the_real_audit_is_asked(tmp_path):
    write_record(tmp_path, "2026-01-01_a", [1.1])
    assert re.match("FAIL: .*files", rows(tmp_path)[0][7])


def test_only_scores_on_the_same_text_are_ranked_together(records):
    write_record(records, "2026-01-01_a", [1.1])
    write_record(records, "2026-01-02_b", [1.2], val_bytes=151_080_891, dataset="fineweb10B")
    write_record(records, "2026-01-03_c", [0.9], val_bytes=626_693, dataset="sample")
    assert [(row[0], row[1]) for row in rows(records)] == [
        *(("1", "1.1000"), ("2", "1.2000"), ("1", "0.9000"))
    ]


def test_tracks_are_ranked_by_themselves(records):
    write_record(records, "2026-01-01_a", [1.1])
    write_record(records, "2026-01-02_b", [1.0], track="track_non_record_16mb")
    assert [(row[0], row[1]) for row in rows(records)] == [("1", "1.1000"), ("1", "1.0000")]


def test_a_track_without_records_says_so(records):
    assert "No records yet." in leaderboard.generate(records)["README.md"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "not there"),
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        ("{}", "no val_bpb between 0 and 100"),
        ('{"val_bpb": "low"}', "no val_bpb between 0 and 100"),
        ('{"val_bpb": -1}', "no val_bpb between 0 and 100"),
        ('{"val_bpb": 1e308}', "no val_bpb between 0 and 100"),
        ("\0\xff", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_broken_folder_is_named_and_the_others_are_ranked(records, content, reason):
    write_record(records, "2026-01-01_a", [1.1])
    broken = records / TRACK / "2026-01-02_broken"
    broken.mkdir()
    if content is not None:
        (broken / "submission.json").write_bytes(content.encode("latin-1"))
    text = leaderboard.generate(records)["README.md"]
    (line,) = [line for line in text.splitlines() if line.startswith("- ")]
    assert line.startswith(f"- [2026-01-02_broken]({TRACK}/2026-01-02_broken): ")
    assert reason in line.replace("\\", "")
    assert len(rows(records)) == 1


def test_files_and_hidden_folders_are_no_records(records):
    (records / TRACK / ".gitkeep").touch()
    (records / TRACK / ".partial_x").mkdir()
    assert "Not ranked" not in leaderboard.generate(records)["README.md"]


def test_writing_twice_gives_the_same_bytes(records):
    for i in range(5):
        write_record(records, f"2026-01-0{i + 1}_{i}", [1.1 + 0.01 * (i * 7 % 5)])
    leaderboard.main([f"--records={records}"])
    before = snapshot(records)
    leaderboard.main([f"--records={records}"])
    assert snapshot(records) == before


def test_check_is_content_after_writing(records):
    write_record(records, "2026-01-01_a", [1.1])
    leaderboard.main([f"--records={records}"])
    leaderboard.main([f"--records={records}", "--check"])


@pytest.mark.parametrize("name", ["README.md", "best_score.svg"])
def test_check_names_the_file_that_is_out_of_date_and_leaves_it(records, name):
    write_record(records, "2026-01-01_a", [1.1])
    leaderboard.main([f"--records={records}"])
    (records / name).write_text("old\n")
    with pytest.raises(SystemExit, match=f"out of date: {name};"):
        leaderboard.main([f"--records={records}", "--check"])
    assert (records / name).read_text() == "old\n"


def test_a_missing_records_folder_is_told(tmp_path):
    with pytest.raises(SystemExit, match="no such folder"):
        leaderboard.main([f"--records={tmp_path / 'none'}"])


# ===================================== the picture =====================================


def picture(records: Path) -> ElementTree.Element:
    """The picture, parsed."""
    return ElementTree.fromstring(leaderboard.generate(records)["best_score.svg"])


def dots(records: Path, kind: str) -> list[tuple[float, float]]:
    """Where the dots of a kind are, from left to right."""
    found = picture(records).iterfind(".//{*}circle")
    chosen = [dot for dot in found if dot.get("class") == kind]
    return sorted((float(dot.get("cx")), float(dot.get("cy"))) for dot in chosen)


def test_dots_lie_to_scale(records):
    days_and_scores = [(1, 1.4), (3, 1.3), (11, 1.1)]
    for day, score in days_and_scores:
        write_record(records, f"2026-01-{day:02}_x", [score])
    (x0, y0), (x1, y1), (x2, y2) = dots(records, "new")
    assert (x1 - x0) / (x2 - x0) == pytest.approx(2 / 10, abs=1e-3)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(0.1 / 0.3, abs=2e-3)
    assert y2 > y0  # lower scores lie lower


def test_only_records_that_beat_all_before_are_new_ones(records):
    for day, score in ((1, 1.4), (2, 1.5), (3, 1.3), (4, 1.3), (5, 1.2)):
        write_record(records, f"2026-01-{day:02}_x", [score])
    assert (len(dots(records, "new")), len(dots(records, "other"))) == (3, 2)


def test_the_line_steps_down_through_the_new_records(records):
    for day, score in ((1, 1.4), (2, 1.5), (3, 1.3), (6, 1.2)):
        write_record(records, f"2026-01-{day:02}_x", [score])
    (line,) = [p for p in picture(records).iterfind(".//{*}path") if p.get("class") == "best"]
    corners = [[float(n) for n in re.findall(r"[\d.]+", part)] for part in line.get("d").split("H")]
    (x0, y0), (x1, y1), (x2, y2) = dots(records, "new")
    start, first, second, _ = line.get("d").split("H")
    assert start == f"M{x0} {y0}"
    assert (first, second) == (f"{x1}V{y1}", f"{x2}V{y2}")
    assert len(corners) == 4


def test_each_track_and_text_has_a_panel(records):
    write_record(records, "2026-01-01_a", [1.1])
    write_record(records, "2026-01-03_c", [0.9], val_bytes=626_693, dataset="sample")
    write_record(records, "2026-01-02_b", [1.0], track="track_non_record_16mb")
    texts = [text.text for text in picture(records).iterfind(".//{*}text")]
    assert sum("bits per byte" in text for text in texts) == 3


def test_a_name_is_shown_as_text_and_without_control_characters(records):
    write_record(records, "2026-01-01_a", [1.1], name="<b> & \x1b[1m")
    shown = [text.text for text in picture(records).iterfind(".//{*}text")]
    titles = [title.text for title in picture(records).iterfind(".//{*}title")]
    assert "1.1000 <b> & [1m" in shown
    assert titles == ["<b> & [1m: 1.1000"]


def test_a_record_without_a_date_is_ranked_but_not_drawn(records):
    write_record(records, "2026-01-01_a", [1.1], date="last week")
    assert (len(rows(records)), dots(records, "new")) == (1, [])


@given(st.floats(0.001, 99), st.floats(0.001, 99))
def test_ticks_are_few_and_within(a, b):
    low, high = sorted((a, b))
    high += 0.002 * high
    found = leaderboard.ticks(low, high)
    assert 2 <= len(found) <= 7
    assert low - 1e-9 <= found[0] < found[-1] <= high + 1e-9


# ===================================== comparing =====================================


def two_sided_p(t: float, df: float) -> float:
    """P(|T| > |t|) of Student's distribution, by Simpson's rule on its density."""

    def density(x: float) -> float:
        scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2))
        return scale / math.sqrt(df * math.pi) * (1 + x * x / df) ** (-(df + 1) / 2)

    n = 2000
    h = abs(t) / n
    weights = (4 if i % 2 else 2 for i in range(1, n))
    inside = density(0) + density(t) + sum(w * density(i * h) for i, w in enumerate(weights, 1))
    return 1 - 2 * inside * h / 3


SEEDS = st.lists(st.integers(11_000, 12_000).map(lambda n: n / 10_000), min_size=2, max_size=5)


@settings(max_examples=30)
@given(SEEDS.filter(lambda v: len({*v}) > 1), SEEDS)
def test_welch_is_by_the_formula(a, b):
    squares = [sum((v - sum(x) / len(x)) ** 2 for v in x) / (len(x) - 1) / len(x) for x in (a, b)]
    difference = sum(a) / len(a) - sum(b) / len(b)
    t = difference / math.sqrt(sum(squares))
    df = sum(squares) ** 2 / sum(s**2 / (len(x) - 1) for s, x in zip(squares, (a, b), strict=True))
    text = leaderboard.welch(a, b)
    found = re.search(r"difference (\S+), .*t = (\S+), df = (\S+), p = (\S+)$", text)
    assert [*map(float, found.groups()[:3])] == [
        pytest.approx(difference, abs=6e-6),
        pytest.approx(t, abs=6e-3),
        pytest.approx(df, abs=6e-2),
    ]
    assert float(found[4]) == pytest.approx(two_sided_p(t, df), rel=0.06, abs=1e-9)


def test_the_interval_ends_where_p_is_5_percent():
    a, b = [1.20, 1.21, 1.25], [1.10, 1.14]
    low, high = re.search(r"95% from (\S+) to (\S+);", leaderboard.welch(a, b)).groups()
    for end in (float(low), float(high)):
        shifted = leaderboard.welch([value - end for value in a], b)
        assert float(shifted.rpartition("p = ")[2]) == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize("values", [([1.1], [1.2, 1.3]), ([1.2, 1.3], []), ([], [])])
def test_welch_needs_two_seeds_on_each_side(values):
    assert leaderboard.welch(*values) == "Welch's test needs two seeds or more on each side"


def test_welch_needs_some_deviation():
    text = leaderboard.welch([1.1, 1.1], [1.2, 1.2])
    assert text == "difference -0.10000; no deviation on either side, so no test"


def compared(a: Path, b: Path) -> dict[str, list[str]]:
    """The rows of a comparison by their names."""
    lines = leaderboard.compare(a, b).splitlines()
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    return {line[0]: line[1:] for line in cells}


@pytest.fixture
def pair(records):
    """Two records with two logs each, which differ in one setting beside seeds and places."""
    folders = []
    for name, layers in (("2026-01-01_a", 9), ("2026-01-02_b", 11)):
        folder = write_record(records, name, [1.2, 1.3], bytes_code=50_000 + layers)
        for seed in (1, 2):
            words = {"NUM_LAYERS": layers, "MODEL_DIM": 512, "RUN_ID": f"{name}{seed}"}
            write_log(folder, seed, words | {"OUT_DIR": name})
        folders.append(folder)
    return folders


def test_settings_that_differ_are_shown_and_no_others(pair):
    found = {name: cells for name, cells in compared(*pair).items() if name.isupper()}
    assert found == {"NUM_LAYERS": ["9", "11"]}


def test_a_setting_of_one_side_is_shown(pair):
    write_log(pair[1], 1, {"NUM_LAYERS": 9, "MODEL_DIM": 512, "EMA": "'0.5 a'"})
    assert compared(*pair)["EMA"] == ["(none)", "0.5 a"]


def test_sizes_and_times_are_shown(pair):
    found = compared(*pair)
    assert found["bytes of code"] == ["50,009", "50,011"]
    assert found["training, s"] == ["1.0 ± 0.0 (n=2)"] * 2
    assert found["ms a step"] == ["25.04 ± 0.02 (n=2)"] * 2


def test_a_time_without_end_is_left_out(pair):
    write_log(pair[0], 3, {"NUM_LAYERS": 9})
    log = pair[0] / "train_seed3.log"
    log.write_text(log.read_text().replace("train_time:1003ms", f"train_time:{'9' * 400}ms"))
    assert compared(*pair)["training, s"] == ["1.0 ± 0.0 (n=2)"] * 2


def test_scores_are_shown_with_their_deviation(pair):
    assert compared(*pair)["val_bpb, seeds"] == ["1.25000 ± 0.07071 (n=2)"] * 2


def test_scores_come_from_logs_where_no_seeds_are_stated(records, pair):
    other = write_record(records, "2026-01-03_c", [1.1], seed_results=None)
    write_log(other, 1, {"NUM_LAYERS": 9, "MODEL_DIM": 512}, bpb=1.125)
    assert compared(pair[0], other)["val_bpb, seeds"][1] == "1.12500 (n=1)"


def test_settings_that_no_log_states_are_said_to_be_unknown(records, pair):
    other = write_record(records, "2026-01-03_c", [1.1])
    text = leaderboard.compare(pair[0], other)
    assert "Settings not compared: no log states them in 2026-01-03_c" in text


def test_scores_on_different_texts_are_said_not_to_compare(records, pair):
    other = write_record(records, "2026-01-03_c", [1.1], val_bytes=5)
    assert "different texts" in leaderboard.compare(pair[0], other)
    assert "different texts" not in leaderboard.compare(*pair)


def test_scores_on_different_texts_are_not_tested(records, pair):
    other = write_record(records, "2026-01-03_c", [1.1, 1.2], val_bytes=5)
    assert "Welch t" not in leaderboard.compare(pair[0], other)


def with_losses(records: Path, folder: str, nats: float) -> Path:
    """A record whose seeds have so many nats a token of a BPB."""
    scores = {"1": 1.2, "2": 1.3}
    table = {seed: {"val_bpb": v, "val_loss": nats * v} for seed, v in scores.items()}
    return write_record(records, folder, [*scores.values()], seed_results=table)


@pytest.mark.parametrize(
    ("nats", "said"),
    [(2.0, "difference"), (2.001, "difference"), (2.5, "not compared: the tokenizers differ")],
)
def test_losses_are_tested_where_tokens_are_the_same(records, pair, nats, said):
    other = with_losses(records, "2026-01-03_c", nats)
    lines = leaderboard.compare(pair[0], other).splitlines()
    tests = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines if ": " in line}
    assert tests["val_loss"].startswith(said)
    assert "Welch t" in tests["val_bpb"]


def test_losses_are_not_tested_where_tokens_are_not_known(records, pair):
    scores = {"1": 1.2, "2": 1.3}
    other = write_record(records, "2026-01-03_c", [1.2, 1.3], seed_results=scores)
    assert "val_loss: not compared: whether" in leaderboard.compare(pair[0], other)


def test_warnings_of_the_audit_are_on_the_page(records, monkeypatch):
    verdicts = [Verdict("files", "PASS", ""), Verdict("reruns", "WARN", "")]
    monkeypatch.setattr(leaderboard.static_rules, "check", lambda *arguments: verdicts)
    write_record(records, "2026-01-01_a", [1.1])
    assert rows(records)[0][-1] == "1 of 2 pass, WARN: reruns"


def test_comparing_with_a_folder_that_is_no_record_is_refused(pair, tmp_path):
    with pytest.raises(SystemExit, match=r"submission\.json: not there"):
        leaderboard.main(["--compare", str(pair[0]), str(tmp_path)])


# ===================================== any content =====================================

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FIELDS = ["name", "author", "github_id", "date", "val_bpb", "val_bpb_std", "bytes_total"]
FIELDS += ["val_loss", "seeds", "seed_results", "dataset", "val_bytes", "track", "bytes_code"]
LIKELY = st.one_of(JSON, st.floats(0.5, 3), st.dates().map(str), st.text(max_size=30))


@settings(max_examples=200)
@given(st.lists(st.dictionaries(st.sampled_from(FIELDS), LIKELY), min_size=1, max_size=4))
def test_no_submission_stops_the_page_or_breaks_it(tmp_path_factory, contents):
    """Each folder is either in a table, whose rows have all their cells, or named below it."""
    records = tmp_path_factory.mktemp("records")
    for i, content in enumerate(contents):
        folder = records / TRACK / f"r{i}"
        folder.mkdir(parents=True)
        (folder / "submission.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaderboard.static_rules, "check", lambda *arguments: [])
        files = leaderboard.generate(records)
    lines = files["README.md"].encode().decode().split("\n")
    tables = [line for line in lines if line.startswith("|") and f"]({TRACK}/r" in line]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} <= {9}
    named = [line for line in lines if line.startswith("- [")]
    assert len(tables) + len(named) == len(contents)
    ElementTree.fromstring(files["best_score.svg"])


@settings(max_examples=100)
@given(*[st.dictionaries(st.sampled_from(FIELDS), LIKELY)] * 2, st.binary(max_size=200))
def test_anything_that_can_be_read_can_be_compared(tmp_path_factory, one, two, log):
    root = tmp_path_factory.mktemp("records")
    for name, content in (("a", one), ("b", two)):
        (root / name).mkdir()
        (root / name / "submission.json").write_text(json.dumps(content))
        (root / name / "train.log").write_bytes(b"step:1/2 val_loss:1.0 val_bpb:1.0\n" + log)
    assert "val_bpb, claimed" in leaderboard.compare(root / "a", root / "b")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_folder_whose_name_is_no_text_is_ranked(records):
    folder = os.fsencode(records / TRACK) + b"/\xff"
    os.mkdir(folder)
    with open(folder + b"/submission.json", "w") as file:
        json.dump({"val_bpb": 1.1}, file)
    leaderboard.main([f"--records={records}"])
    assert len(rows(records)) == 1
