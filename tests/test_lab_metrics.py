"""lab/metrics.py: the same events, whether a file is read whole or as it grows."""

import importlib
import json
import math
import sys

import hypothesis.strategies as st
import pytest
from conftest import REPO
from hypothesis import given

sys.path.append(str(REPO / "lab"))
metrics = importlib.import_module("metrics")

NUMBERS = st.floats() | st.integers(-(10**400), 10**400)
VALUES = NUMBERS | st.text(max_size=5) | st.none() | st.booleans() | st.just('{"event"')
KINDS = st.sampled_from(["start", "train", "val", "resume", "final", "later"])
EVENTS = st.fixed_dictionaries({"event": KINDS}, optional={"step": VALUES, "text": VALUES})


def same(a, b) -> bool:
    """Whether events are the same; a NaN equals a NaN."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def line(event) -> bytes:
    return json.dumps({"event": event["event"], **event}).encode() + b"\n"


def write(folder, *events, end=b""):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_bytes(b"".join(map(line, events)) + end)
    return path


# ---- lines


@given(EVENTS, st.integers(0, 60))
def test_a_line_that_was_cut_off_hides_no_event_behind_it(event, length):
    first = line({"event": "train", "step": 3, "train_loss": 2.5})[:-1]
    cut = first[: min(length, len(first) - 1)]
    assert same(metrics.parse(cut + line(event)), event)


@given(st.binary(max_size=80) | st.text(max_size=60).map(str.encode))
def test_no_line_raises_an_error(data):
    event = metrics.parse(data)
    assert event is None or isinstance(event["event"], str)


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"event": 3}', b"[" * 10**5, b"\xff"])
def test_what_is_no_event_is_none(data):
    assert metrics.parse(data) is None


@pytest.mark.parametrize(
    ("value", "found"), [(3, 3.0), (2.5, 2.5), (math.inf, math.inf), (-(10**30), -1e30)]
)
def test_a_number_is_given(value, found):
    assert metrics.number({"x": value}, "x") == found


@pytest.mark.parametrize("value", [None, "3", True, [1], 10**400, math.nan])
def test_what_is_no_number_is_nan(value):
    assert math.isnan(metrics.number({"x": value}, "x"))
    assert math.isnan(metrics.number({}, "x"))


# ---- a file that grows


@given(st.lists(EVENTS, max_size=6), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_a_file_that_grows_gives_what_it_gives_as_a_whole(tmp_path_factory, events, pieces):
    path = tmp_path_factory.mktemp("grows") / "metrics.jsonl"
    data = b"".join(map(line, events))
    tail = metrics.Tail(path)
    found = tail.read()  # there is none yet
    place = 0
    with open(path, "wb", buffering=0) as file:
        turn = 0
        while place < len(data):
            length = pieces[turn % len(pieces)]
            file.write(data[place : place + length])
            place += length
            turn += 1
            found += tail.read()
    assert same(found, events)
    assert same(metrics.Tail(path).read(), events)


def test_a_file_that_is_replaced_is_read_from_its_start(tmp_path):
    tail = metrics.Tail(write(tmp_path, {"event": "start"}, {"event": "train", "step": 1}))
    assert len(tail.read()) == 2
    new = [{"event": "start"}, *({"event": "val", "step": step} for step in range(9))]
    write(tmp_path / "other", *new).replace(tail.path)
    assert tail.read() == new


def test_a_file_that_another_one_is_written_over_is_read_from_its_start(tmp_path):
    tail = metrics.Tail(write(tmp_path, {"event": "start", "versions": "a"}))
    assert len(tail.read()) == 1
    new = [{"event": "start", "versions": "b"}, {"event": "train", "step": 1}]
    write(tmp_path, *new)
    assert tail.read() == new


def test_a_file_that_has_become_shorter_is_read_from_its_start(tmp_path):
    written = [{"event": "start"}, *train(*range(60))]
    tail = metrics.Tail(write(tmp_path, *written))
    tail.read()
    write(tmp_path, *written[:40])  # begins with the same bytes
    assert tail.read() == written[:40]


# ---- runs


def history(*events):
    found = metrics.History()
    for event in events:
        found.add(event)
    return found


def steps(found, kind="train"):
    return found.column(kind, "step")


def train(*numbers):
    return [{"event": "train", "step": n, "train_loss": 1.0} for n in numbers]


START = {"event": "start", "versions": "v", "settings": {"seed": 1}}


def test_a_new_run_begins_anew():
    found = history(START, *train(1, 2, 3), START, *train(1))
    assert steps(found) == [1]
    assert found.starts == 1


def test_a_resumed_run_keeps_what_came_up_to_its_step():
    resume = {"event": "resume", "path": "p", "step": 2}
    found = history(START, *train(1, 2, 3), START, resume, *train(3, 4))
    assert steps(found) == [1, 2, 3, 4]
    assert found.starts == 2


def test_a_run_that_is_resumed_twice_is_one_curve():
    resumes = [{"event": "resume", "path": "p", "step": n} for n in (2, 3)]
    found = history(
        *(START, *train(1, 2, 3), START, resumes[0], *train(3, 4, 5)),
        *(START, resumes[1], *train(4)),
    )
    assert steps(found) == [1, 2, 3, 4]
    assert found.starts == 3


def test_a_score_of_the_run_before_is_not_the_resumed_one_s():
    final = {"event": "final", "val_bpb": 1.0}
    found = history(START, *train(1), final, START, {"event": "resume", "step": 1}, *train(2))
    assert found.final is None


@given(st.lists(EVENTS | st.just(START), max_size=12))
def test_any_order_of_events_can_be_taken_in(events):
    found = history(*events)
    assert all(isinstance(value, float) for value in steps(found))


# ---- folders


def test_a_run_is_found_by_its_name_its_folder_and_its_file(tmp_path):
    write(tmp_path / "logs" / "a", START)
    folder = tmp_path / "logs" / "a"
    assert metrics.find_run("a", str(tmp_path / "logs")) == folder
    assert metrics.find_run(str(folder)) == folder
    assert metrics.find_run(str(folder / "metrics.jsonl")) == folder
    with pytest.raises(metrics.MetricsError, match=r"nope: no metrics\.jsonl"):
        metrics.find_run("nope", str(tmp_path / "logs"))


def test_a_last_line_without_its_end_is_loaded(tmp_path):
    write(tmp_path, START, end=line(train(7)[0])[:-1])
    assert steps(metrics.load_history(tmp_path)) == [7]


@pytest.mark.parametrize("end", [b"", b"{", b'{"event": "train", "step": 1}\n', b"\x00" * 99])
def test_a_file_without_a_run_is_refused(tmp_path, end):
    write(tmp_path, end=end)
    with pytest.raises(metrics.MetricsError, match="no event 'start' in it"):
        metrics.load_history(tmp_path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(metrics.MetricsError, match=r"metrics\.jsonl: cannot be read"):
        metrics.load_history(tmp_path)
