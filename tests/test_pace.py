"""The pace that a run reports on the console and in its metrics: train_time, step_avg, tok_s."""

import re

import pytest
from conftest import events

BATCH = 256
STEP = re.compile(r"^step:(\d+)/.* train_time:(\d+)ms step_avg:([\d.]+)ms tok_s:(\d+)$", re.M)


@pytest.fixture
def told(run, capsys) -> list[tuple[dict, tuple[str, ...]]]:
    """For each report of a run its event, and the step, time, mean and rate in its line."""
    batch = {"TRAIN_BATCH_TOKENS": BATCH, "MICRO_BATCH_TOKENS": 64}
    folder = run(ITERATIONS=5, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=2, WARMUP_STEPS=1, **batch)
    found = [event for event in events(folder) if event["event"] in ("train", "val")]
    return list(zip(found, STEP.findall(capsys.readouterr().out), strict=True))


def test_the_metrics_tell_the_tokens_of_all_steps_a_second(told):
    for event, _ in told:
        seconds = event["train_time_ms"] / 1000
        assert event["tokens_per_second"] * seconds == pytest.approx(event["step"] * BATCH)
    assert {event["step"] for event, _ in told} == {0, 1, 2, 3, 4, 5}


def test_no_step_is_no_token_a_second(told):
    event, line = told[0]
    assert (event["step"], event["tokens_per_second"]) == (0, 0.0)
    assert (line[0], line[-1]) == ("0", "0")


def test_the_line_tells_what_the_metrics_tell(told):
    for event, (step, time, mean, rate) in told[1:]:
        ms = event["train_time_ms"]
        assert int(step) == event["step"]
        assert time == f"{ms:.0f}"
        assert mean == f"{ms / event['step']:.2f}"
        assert rate == f"{event['tokens_per_second']:.0f}"
