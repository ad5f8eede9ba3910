"""WATCH and REPORT_TO: a run starts lab/watch.py beside itself, and is the same without it."""

import time

import pytest
from conftest import events, run_cli, same_bits

import keeper
import train_gpt


def await_that(condition, seconds=60):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_run_reports_by_itself_and_ends_on_the_same_bits(tiny_env, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    logs = tmp_path / "logs"
    watched = tiny_env | {"RUN_ID": "watched", "WATCH": "1", "REPORT_TO": "tensorboard"}
    done = run_cli(watched)
    assert done.rc == 0, done.stderr
    assert run_cli(tiny_env | {"RUN_ID": "plain"}).rc == 0
    assert same_bits(logs / "plain", logs / "watched")
    await_that(lambda: list((logs / "watched").rglob("events.out.tfevents*")))


def test_a_watcher_that_fails_costs_the_run_nothing(tiny_env, tmp_path):
    copy = tmp_path / "copy"
    (copy / "lab").mkdir(parents=True)
    (copy / "lab" / "watch.py").write_text("raise SystemExit('broken')")
    done = run_cli(tiny_env | {"WATCH": "1"}, copy_to=copy, beside=["keeper.py"])
    assert done.rc == 0, done.stderr
    assert events(tmp_path / "logs" / "tiny", "final")


@pytest.mark.parametrize(("name", "value"), [("WATCH", "1"), ("REPORT_TO", "wandb")])
def test_without_the_tool_it_is_refused(tiny_env, monkeypatch, tmp_path, name, value):
    monkeypatch.setattr(keeper, "WATCHER", tmp_path / "watch.py")
    problem = f"{name}={value}: needs lab/watch.py beside keeper.py"
    with pytest.raises(train_gpt.UserError, match=problem):
        train_gpt.load_settings(tiny_env | {name: value})


def test_an_unknown_reporter_is_refused(tiny_env):
    problem = "REPORT_TO=wandb,excel: expected aim, tensorboard, trackio, wandb"
    with pytest.raises(train_gpt.UserError, match=problem):
        train_gpt.load_settings(tiny_env | {"REPORT_TO": "wandb,excel"})
