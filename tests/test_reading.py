"""records/reading.py: every spelling of submission.json, and logs of all ages."""

import dataclasses
import importlib
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "records"))
reading = importlib.import_module("reading")

BAR = "=" * 100
SOURCE = '"""A script."""\nimport math\n\n[x for x in ()]\nprint("step:1/2 val_loss:1 val_bpb:1")\n'
KEEPER = '''"""Protect a run."""
import os

SEED = 9
print("final_x_exact val_loss:1.0000000 val_bpb:1.0000000")
'''
SAMPLE = ROOT / "records/track_non_record_16mb/2026-11-21_Sample_CPU"

OURS = """DATA_PATH=data/datasets/tiny
SEED=7
NUM_LAYERS=2
val_tokens:100 val_bytes:240 byte_audit:ok
step:0/20 val_loss:6.9290 val_bpb:4.2694 train_time:0ms step_avg:0.00ms tok_s:0
step:10/20 train_loss:4.7068 train_time:500ms step_avg:50.00ms tok_s:13297
step:20/20 val_loss:3.3525 val_bpb:2.0657 train_time:1053ms step_avg:52.65ms tok_s:13537
final_int568_rans_roundtrip_exact val_loss:3.35203351 val_bpb:2.06538093
Total submission size int568_rans: 2717680 bytes (47438 code, 2670242 artifact)
"""
EARLY = """val_loader:shards pattern=/d/fineweb10B_sp1024/fineweb_val_*.bin tokens:62021632
seed:42
warmup_step:20/20
step:1/20000 train_loss:6.9344 train_time:56ms step_avg:55.83ms
step:13235/20000 val_loss:2.0619 val_bpb:1.2212 train_time:599973ms step_avg:45.33ms
stopping_early: wallclock_cap train_time:599973ms step:13235/20000
Serialized model: 67224983 bytes
Code size: 50051 bytes
Total submission size: 67275034 bytes
Serialized model int8+zlib: 15737576 bytes (payload:17178912 raw_torch:17224025)
Total submission size int8+zlib: 15787627 bytes
final_int8_zlib_roundtrip val_loss:2.0537 val_bpb:1.2163 eval_time:67952ms
final_int8_zlib_roundtrip_exact val_loss:2.05372224 val_bpb:1.21632999
"""
SLIDING = EARLY + (
    "final_int6_sliding_window val_loss:1.9110 val_bpb:1.1318 stride:64 eval_time:68889ms\n"
    "final_int6_sliding_window_exact val_loss:1.91095901 val_bpb:1.13178056\n"
)
LATE = """Hyperparameters:
  seed: 43
  train_seq_len: 2048
train_shards: 80
val_tokens: 40540160
0/20000 val_loss: 9.0078 val_bpb: 3.4872
1/20000 train_loss: 9.0098 train_time: 0.0m tok/s: 8414830
4500/20000 train_loss: 2.8444 train_time: 9.5m tok/s: 6228705
4635/20000 val_loss: 2.8108 val_bpb: 1.0882
stopping_early: wallclock_cap train_time: 588096ms step: 4635/20000
pre-quantization post-ema val_loss:2.80772088 val_bpb:1.08695625 eval_time:5942ms
Serialized model: 135431033 bytes
Code size (uncompressed): 171669 bytes
Code size (compressed): 16633 bytes
Serialized model quantized+brotli: 15973708 bytes
Total submission size quantized+brotli: 15990341 bytes
quantized val_loss:2.83713845 val_bpb:1.09834471 eval_time:7117ms
quantized_ttt val_loss:2.79019180 val_bpb:1.08017020 eval_time:277646ms
==== end of the run: Thu Apr 30 23:39:32 UTC 2026 ====
"""


@pytest.fixture
def folder(tmp_path):
    """A record folder without anything in it."""
    made = tmp_path / "track_10min_16mb" / "2026-01-01_a"
    made.mkdir(parents=True)
    return made


def one_log(folder: Path, text: str, name: str = "train.log"):
    """The only log in a folder."""
    (folder / name).write_text(text)
    (log,) = reading.read_logs(folder)
    return log


def submission(folder: Path, **fields: object):
    """What is read of a submission.json of these fields."""
    (folder / "submission.json").write_text(json.dumps(fields))
    return reading.read_submission(folder)


def test_our_log_has_source_settings_scores_and_sizes(folder):
    log = one_log(folder, f"{SOURCE}\n{BAR}\n{OURS}")
    assert log.source == SOURCE
    assert log.settings == {"DATA_PATH": "data/datasets/tiny", "SEED": "7", "NUM_LAYERS": "2"}
    assert log.finals == [("int568_rans", 3.35203351, 2.06538093)]
    assert [val[:3] for val in log.vals] == [(0, 6.929, 4.2694), (20, 3.3525, 2.0657)]
    assert (log.seed, log.steps, log.train_ms, log.finished, log.runs) == ("7", 20, 1053, True, 1)
    assert (log.total_bytes, log.code_bytes, log.artifact_bytes) == (2717680, 47438, 2670242)


def test_the_source_of_the_keeper_is_no_part_of_the_run(folder):
    alone = one_log(folder, f"{SOURCE}\n{BAR}\n{OURS}")
    log = one_log(folder, f"{SOURCE}\n{BAR}\n{KEEPER}\n{BAR}\n{OURS}")
    assert log == alone


@pytest.mark.parametrize("second", ["", f"{KEEPER}\n{BAR}\n"])
@pytest.mark.parametrize("first", ["", f"{KEEPER}\n{BAR}\n"])
def test_a_run_with_a_keeper_and_one_without_are_appended(folder, first, second):
    last = OURS.replace("SEED=7", "SEED=8")
    changed = SOURCE.replace("A script", "Another script")
    log = one_log(folder, f"{SOURCE}\n{BAR}\n{first}{OURS}{changed}\n{BAR}\n{second}{last}")
    assert (log.source, log.seed, log.runs, log.steps) == (changed, "8", 2, 20)
    assert log.settings["NUM_LAYERS"] == "2"


def test_lines_between_two_bars_of_a_public_log_stay(folder):
    log = one_log(folder, f"{SOURCE}\n{BAR}\nRunning Python 3.12.3\n{BAR}\n{EARLY}")
    assert log.source == SOURCE
    assert log.body.startswith(f"Running Python 3.12.3\n{BAR}\nval_loader:")


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_score_that_was_cut_off_is_none(folder, cut):
    """Written while the process was killed: 2.0653 would be another score than 2.06538093."""
    text = f"{SOURCE}\n{BAR}\n{OURS}"
    end = text.index("val_bpb:2.06538093") + len("val_bpb:2.06538093")
    log = one_log(folder, text[: end - cut])
    assert all(abs(score - 2.06538093) < 1e-6 for _, _, score in log.finals)


EXTRA = [
    "epochs_planned:1.50 train_tokens:100000",
    "warning: no checkpoint of step 4: [Errno 28] No space left on device",
    "fit_budget:sigma quant_sigma:9.1000 tries:3 fill:0.9991",
]


@pytest.mark.parametrize("extra", EXTRA)
def test_new_lines_of_a_log_may_stand_anywhere(folder, extra):
    whole = one_log(folder, f"{SOURCE}\n{BAR}\n{OURS}")
    lines = OURS.splitlines()
    for place in range(len(whole.settings), len(lines) + 1):
        text = "\n".join([*lines[:place], extra, *lines[place:]])
        log = one_log(folder, f"{SOURCE}\n{BAR}\n{text}\n")
        assert dataclasses.replace(log, body="") == dataclasses.replace(whole, body="")


def test_a_path_in_a_log_that_is_not_utf8_is_no_reason_to_break(folder):
    text = f"{SOURCE}\n{BAR}\n{OURS}".replace("data/datasets/tiny", "'data/t\udcff'")
    (folder / "train.log").write_bytes(text.encode(errors="surrogateescape"))
    (log,) = reading.read_logs(folder)
    assert log.settings["DATA_PATH"] == "'data/t\ufffd'"
    assert log.finished


def test_the_committed_record_is_read_whole():
    (log,) = reading.read_logs(SAMPLE)
    assert log.source == (SAMPLE / "train_gpt.py").read_text()
    assert (log.total_bytes, log.code_bytes) == (2689333, (SAMPLE / "train_gpt.py").stat().st_size)
    assert log.finals[-1][2] == 2.10115776


def test_early_public_log(folder):
    log = one_log(folder, EARLY)
    assert log.finals == [("int8_zlib", 2.05372224, 1.21632999)]
    assert (log.seed, log.steps, log.train_ms, log.eval_s) == ("42", 13235, 599973, 67.952)
    assert (log.total_bytes, log.code_bytes, log.artifact_bytes) == (15787627, 50051, 15737576)
    assert (log.source, log.settings, log.finished) == ("", {}, True)


def test_late_public_log(folder):
    log = one_log(folder, LATE)
    assert log.finals[-1] == ("quantized_ttt", 2.7901918, 1.0801702)
    assert [scheme for scheme, *_ in log.finals] == ["quantized", "quantized_ttt"]
    assert (log.seed, log.steps, log.train_ms, log.eval_s) == ("43", 4635, 588096, 277.646)
    assert (log.total_bytes, log.code_bytes, log.artifact_bytes) == (15990341, 16633, 15973708)
    assert log.finished


def test_times_in_minutes_are_understood(folder):
    text = "\n".join(line for line in LATE.splitlines() if "stopping_early" not in line)
    assert one_log(folder, text).train_ms == 9.5 * 60_000


def test_several_scores_stay_in_order(folder):
    assert [scheme for scheme, *_ in one_log(folder, SLIDING).finals] == [
        *("int8_zlib", "int6_sliding_window"),
    ]


def test_source_under_a_headline_is_found(folder):
    head = f"{BAR}\nHyperparameters:\n  seed: 43\n{BAR}\nSource code:\n{BAR}\n"
    log = one_log(folder, f"{head}{SOURCE}\n{BAR}\nRunning Python 3.12.3\n{BAR}\n{LATE}")
    assert log.source == SOURCE
    assert log.finals[-1][2] == 1.0801702


def test_numbers_in_the_printed_source_are_not_taken_for_results(folder):
    source = SOURCE + "# final_int8_exact val_loss:1.00000000 val_bpb:0.50000000\n"
    log = one_log(folder, f"{source}\n{BAR}\n{OURS}")
    assert [bpb for *_, bpb in log.finals] == [2.06538093]


@pytest.mark.parametrize("prefix", ["[modal] ", "[rank0]: ", "2026-04-30T20:14:28Z ", "\x1b[32m"])
def test_what_launchers_put_before_lines_is_ignored(folder, prefix):
    log = one_log(folder, "".join(f"{prefix}{line}\n" for line in EARLY.splitlines()))
    assert (log.steps, log.finals[-1][2], log.finished) == (13235, 1.21632999, True)


def test_appended_log_is_that_of_its_last_run(folder):
    second = OURS.replace("SEED=7", "SEED=8").replace("2.06538093", "2.11111111")
    changed = SOURCE.replace("A script", "Another script")
    log = one_log(folder, f"{SOURCE}\n{BAR}\n{OURS}{changed}\n{BAR}\n{second}")
    assert (log.source, log.seed, log.runs) == (changed, "8", 2)
    assert log.finals == [("int568_rans", 3.35203351, 2.11111111)]


def test_run_appended_to_one_that_only_scored_is_seen(folder):
    scored = "\n".join(line for line in OURS.splitlines() if "step:" not in line) + "\n"
    log = one_log(folder, f"{SOURCE}\n{BAR}\n{scored}{SOURCE}\n{BAR}\n{OURS}")
    assert (log.runs, log.source, log.steps) == (2, SOURCE, 20)


def test_counter_that_falls_back_begins_another_run(folder):
    broken_off = EARLY.partition("stopping_early")[0]
    log = one_log(folder, EARLY + broken_off)
    assert (log.runs, log.finals, log.finished) == (2, [], False)


@pytest.mark.parametrize(
    ("end", "finished"),
    [
        ("", True),
        ("Total submission size int8+zlib: 15787627 bytes\n\n", True),
        ("step:13236/20000 train_loss:2.0 train_time:600000ms\n", False),
        ("Traceback (most recent call last):\n", False),
        ("RuntimeError: out of memory\n", False),
    ],
)
def test_only_a_log_that_ends_with_its_score_is_finished(folder, end, finished):
    assert one_log(folder, EARLY + end).finished is finished


def test_log_without_a_score_is_not_finished(folder):
    assert not one_log(folder, EARLY.partition("final_")[0]).finished


@pytest.mark.parametrize(
    ("name", "seed"),
    [("train_seed1337.log", "1337"), ("train_s42.log", "42"), ("seed-7.txt", "7"), ("a.log", "")],
)
def test_seed_in_the_name_of_a_file(folder, name, seed):
    assert one_log(folder, EARLY.replace("seed:42\n", ""), name).seed == seed


TABLE = "Hyperparameters:\n  seed: 43\n  train_seq_len: 2048\n"
SEEDED = SOURCE + "seed = 0\ndef f():\n    seed: 1\n    seed=2\n"


@pytest.mark.parametrize("table", [TABLE, "SEED=43\nNUM_LAYERS=2\nA=1\n"])
def test_settings_and_source_between_two_bars_are_told_apart(folder, table):
    log = one_log(folder, f"{BAR}\n{table}{SEEDED}\n{BAR}\n{EARLY.replace('seed:42', '')}", "a.log")
    assert (log.source, log.seed, log.runs) == (SEEDED, "43", 1)
    assert log.finals[-1][2] == 1.21632999


@pytest.mark.parametrize("head", ["", f"{BAR}\n{TABLE}{BAR}\nSource code:\n{BAR}\n"])
def test_a_seed_in_the_source_is_none(folder, head):
    log = one_log(folder, f"{head}{SEEDED}\n{BAR}\n{EARLY.replace('42', '43')}", "a.log")
    assert (log.source, log.seed) == (SEEDED, "43")


@pytest.mark.parametrize("first", ['"A script in one line"', "x = 1", "#!/usr/bin/env python"])
@pytest.mark.parametrize("head", ["", f"{BAR}\n{TABLE}{BAR}\nSource code:\n{BAR}\n"])
def test_a_source_is_whole_whatever_it_begins_with(folder, head, first):
    source = f"{first}\n\nimport math\n"
    log = one_log(folder, f"{head}{source}\n{BAR}\n{EARLY}")
    assert log.source == source


def test_seed_among_settings_in_one_line_is_found(folder):
    text = EARLY.replace("seed:42", "num_layers=10 seed=43 smear=False")
    assert one_log(folder, text, "log_42.txt").seed == "43"


@pytest.mark.parametrize("line", ["    seed = 0", "    seed=0,", '"seed": 0', "data_seed: 0"])
def test_python_without_any_bar_tells_no_seed(folder, line):
    assert one_log(folder, f"{line}\n{EARLY}\n{line}\n").seed == "42"
    assert one_log(folder, f"{line}\n{EARLY.replace('seed:42', '')}").seed == ""


def test_seed_of_an_appended_run_is_that_of_its_own_table(folder):
    head = f"{BAR}\n{TABLE}{BAR}\nSource code:\n{BAR}\n{SOURCE}\n{BAR}\n"
    one = head + LATE.partition("train_shards")[2]
    log = one_log(folder, one + one.replace("seed: 43", "seed: 44"))
    assert (log.seed, log.runs) == ("44", 2)


def test_seed_of_a_run_that_a_console_appends_is_the_last_one_before_it(folder):
    text = EARLY + EARLY.replace("seed:42", "seed:43")
    assert (one_log(folder, text).seed, one_log(folder, text).runs) == ("43", 2)


def test_seeds_of_content_and_name_are_both_kept(folder):
    log = one_log(folder, EARLY, "train_seed7.log")
    assert (log.seed, log.named_seed) == ("42", "7")


def test_stride_in_a_name_is_no_seed(folder):
    assert one_log(folder, EARLY, "seed7_s64.log").named_seed == "7"


def test_seed_in_the_name_of_a_logs_own_folder(folder):
    (folder / "seed_7").mkdir()
    (folder / "seed_7" / "train.log").write_text(EARLY.replace("seed:42", ""))
    assert reading.read_logs(folder)[0].seed == "7"


def test_setting_of_a_seed_without_end_is_no_reason_to_break(folder):
    log = one_log(folder, f"A=1\nSEED={'9' * 5000}\nB=2\n{EARLY}")
    assert log.seed == "9" * 5000


def test_size_of_the_weights_in_training_is_not_the_submissions(folder):
    text = "\n".join(line for line in EARLY.splitlines() if "int8+zlib" not in line)
    log = one_log(folder, text)
    assert (log.total_bytes, log.code_bytes, log.artifact_bytes) == (0, 50051, 0)


def test_only_training_logs_outside_hidden_folders_are_read(folder):
    (folder / "requirements.txt").write_text("torch==2.13.0\n")
    (folder / "notes.txt").write_text("in step 3 the loss fell; 3/4 of it\n")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "train-checkpoint.log").write_text(EARLY)
    (folder / "logs").mkdir()
    (folder / "logs" / "b.log").write_text(EARLY)
    (folder / "a.txt").write_text(EARLY)
    assert [log.path.name for log in reading.read_logs(folder)] == ["a.txt", "b.log"]


def test_log_in_utf_16_is_read(folder):
    (folder / "train.log").write_text(EARLY, encoding="utf-16")
    assert reading.read_logs(folder)[0].finals[-1][2] == 1.21632999


def test_usual_spellings(folder):
    read = submission(
        folder,
        **{"author": "A", "github_id": "a", "name": "N", "date": "2026-04-09", "track": "x"},
        **{"val_bpb": 1.081, "val_bpb_std": 2e-4, "val_loss": 2.79, "bytes_code": 16633},
        **{"bytes_total": 15991930, "seeds": [42, 314]},
        seed_results={
            "42": {"val_bpb": 1.0808, "artifact_bytes": 15991930},
            "314": {"bpb": 1.0812},
        },
    )
    assert (read.author, read.github_id, read.name, read.date) == ("A", "a", "N", "2026-04-09")
    assert (read.track, read.val_bpb, read.val_bpb_std, read.val_loss) == ("x", 1.081, 2e-4, 2.79)
    assert (read.bytes_total, read.bytes_code) == (15991930, 16633)
    assert {seed: entry["val_bpb"] for seed, entry in read.seeds.items()} == {
        "42": 1.0808,
        "314": 1.0812,
    }


@pytest.mark.parametrize(
    ("field", "names"),
    [(field, names) for field, names in reading.SPELLINGS.items()],
    ids=list(reading.SPELLINGS),
)
def test_every_spelling_of_a_field_is_understood(folder, field, names):
    for name in names:
        value = 1234 if field.startswith("bytes") else 2.5 if "val" in field else "text"
        assert getattr(submission(folder, **{name: value}), field) == value


@pytest.mark.parametrize(
    "table",
    [
        {"seed_results": {"42": {"val_bpb": 1.5}, "7": {"val_bpb": 1.25}}},
        {"seeds": {"42": 1.5, "7": 1.25}},
        {"seed_scores": {"seed_42": 1.5, "seed7": 1.25}},
        {"seed_results": [{"seed": 42, "val_bpb": 1.5}, {"seed": 7, "bpb": "1.25"}]},
        {"seeds": [42, 7], "seed_results": {"42": {"sliding_bpb": 1.5}, "7": {"score": 1.25}}},
    ],
)
def test_every_form_of_a_table_of_seeds_is_understood(folder, table):
    seeds = submission(folder, **table).seeds
    assert {seed: entry["val_bpb"] for seed, entry in seeds.items()} == {"42": 1.5, "7": 1.25}


def test_score_in_the_place_of_the_loss_is_read_as_the_score(folder):
    read = submission(folder, val_loss=1.1428)
    assert read.val_bpb == 1.1428
    assert math.isnan(read.val_loss)


def test_loss_alone_is_not_taken_for_a_score(folder):
    read = submission(folder, val_loss=1.90684)
    assert math.isnan(read.val_bpb)
    assert read.val_loss == 1.90684


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("2026-04-09_A_b", ("2026-04-09", "A b")),
        ("2026-04-09", ("2026-04-09", "")),
        ("A", ("", "")),
    ],
)
def test_name_of_a_folder_tells_day_and_name(tmp_path, name, found):
    (tmp_path / name).mkdir()
    read = submission(tmp_path / name, val_bpb=1.1)
    assert (read.date, read.name) == found


def test_date_and_name_of_the_file_come_before_those_of_the_folder(folder):
    read = submission(folder, date="2026-04-09", name="N")
    assert (read.date, read.name) == ("2026-04-09", "N")


def test_track_is_that_of_the_folder_where_none_is_named(folder):
    assert submission(folder, name="x").track == "10min_16mb"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"[1]", "holds a list"),
        (b'{"a": 1', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"val_bpb": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_unreadable_submission_is_refused_in_a_line(folder, content, message):
    (folder / "submission.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        reading.read_submission(folder)
    assert "\n" not in str(caught.value)
    assert str(folder / "submission.json") in str(caught.value)


def test_missing_submission_is_refused(folder):
    with pytest.raises(ValueError, match="not there"):
        reading.read_submission(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
field_names = st.sampled_from(
    sorted({name for names in reading.SPELLINGS.values() for name in names} | {"seed_results"})
)


@given(fields=st.dictionaries(field_names, json_values, max_size=8))
@example(fields={"seed_results": {"1": {"val_bpb": None}}, "bytes_total": math.inf, "name": {}})
def test_any_object_is_read(tmp_path_factory, fields):
    folder = tmp_path_factory.mktemp("any")
    read = submission(folder, **fields)
    assert isinstance(read.name, str)
    assert isinstance(read.bytes_total, int)
    assert isinstance(read.val_bpb, float)


pieces = st.sampled_from(
    [*EARLY.splitlines(), *LATE.splitlines(), *OURS.splitlines(), SOURCE, BAR, "Source code:", "\r"]
)


@given(parts=st.lists(pieces | st.text(max_size=20), max_size=25), cut=st.binary(max_size=9))
def test_any_mixture_of_log_lines_is_read(tmp_path_factory, parts, cut):
    path = tmp_path_factory.mktemp("any") / "train.log"
    path.write_bytes("\n".join(parts).encode("utf-8", "replace") + cut)
    for log in reading.read_logs(path.parent):
        assert log.steps >= 0
        assert all(len(final) == 3 for final in log.finals)
        assert log.finished <= bool(log.finals)


@given(bpbs=st.lists(st.floats(0.5, 4), min_size=1, max_size=5))
def test_seeds_keep_their_numbers(tmp_path_factory, bpbs):
    folder = tmp_path_factory.mktemp("any")
    read = submission(folder, seed_results={str(i): {"val_bpb": b} for i, b in enumerate(bpbs)})
    found = [read.seeds[str(i)]["val_bpb"] for i in range(len(bpbs))]
    assert statistics.fmean(found) == statistics.fmean(bpbs)


@pytest.mark.parametrize("deep", [33, 900, 100_000])
def test_json_that_is_nested_without_end_is_refused(folder, deep):
    text = '{"name": ' + "[" * deep + "]" * deep + "}"
    (folder / "submission.json").write_text(text)
    with pytest.raises(ValueError, match=r"nested|not JSON"):
        reading.read_submission(folder)
