"""lab/reporters.py: each library gets a run's figures once, and none of them stops anything."""

import fcntl
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, cli_env

LAB = REPO / "lab"
sys.path.append(str(LAB))
reporters = importlib.import_module("reporters")

START = {"event": "start", "versions": "v", "settings": {"seed": 7, "run_id": "a"}}
FINAL = {"event": "final", "val_loss": 2.0, "val_bpb": 1.25, "code_bytes": 100}
FINAL |= {"artifact_bytes": 900, "max_bytes": 16_000_000}


def train(step, loss=2.5):
    return {"event": "train", "step": step, "train_time_ms": 10.0 * step, "train_loss": loss}


def val(step, loss=2.0):
    return {"event": "val", "step": step, "train_time_ms": 10.0 * step, "val_loss": loss}


def resume(step):
    return {"event": "resume", "path": "checkpoint", "step": step}


RUN = [START, {"event": "model", "parameters": 10, "device": "cpu"}, train(1), train(2, math.nan)]
RUN += [{"event": "skipped_step", "step": 3, "in_a_row": 1}, train(4), val(4), FINAL]


def write(folder: Path, *events, end="") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events) + end)
    return folder


class Kept:
    """A sink that keeps what it gets."""

    made: list["Kept"]

    def __init__(self, folder, run_id, config):
        self.given = run_id
        self.id = run_id or f"id{len(self.made)}"
        self.config, self.logged, self.summary = config, [], None
        self.made.append(self)

    def log(self, step, values):
        self.logged.append((step, values))

    def resume(self, step):
        self.logged.append(("resume", step))

    def close(self, summary):
        self.summary = summary

    @property
    def steps(self):
        return [step for step, _ in self.logged]


@pytest.fixture
def kept():
    """The sinks that a test makes, in their order."""
    Kept.made = []
    return Kept.made


def forwarder(folder):
    return reporters.Forwarder(folder, Kept, folder / "report_kept.json")


def forward(folder):
    """Forward what is there, as a process does."""
    one = forwarder(folder)
    one.look(is_last=True)
    one.close()


# ---- what is forwarded


def test_figures_have_the_names_of_the_log():
    assert reporters.figures(train(1)) == {"train_time_ms": 10.0, "train_loss": 2.5}
    assert reporters.figures(FINAL)["final_val_bpb"] == 1.25
    assert reporters.figures({"event": "skipped_step", "step": 3, "in_a_row": 2}) == {
        "skipped_step_in_a_row": 2.0
    }
    assert reporters.figures(START) == {}


def test_a_finished_run_is_forwarded_with_its_settings_and_its_score(tmp_path, kept):
    forward(write(tmp_path, *RUN))
    (sink,) = kept
    assert sink.steps == [1, 2, 3, 4, 4, 4]
    assert sink.config == {"seed": 7, "run_id": "a", "parameters": 10, "device": "cpu"}
    assert sink.summary["final_val_bpb"] == 1.25


def test_a_growing_run_is_forwarded_as_it_comes(tmp_path, kept):
    one = forwarder(write(tmp_path, START))
    one.look()
    assert kept == []  # it is not known yet whether a run before it goes on
    write(tmp_path, train(1))
    one.look()
    write(tmp_path, train(2), end='{"event": "train", "st')
    one.look()
    assert kept[0].steps == [1, 2]


def test_another_process_goes_on_where_one_was_left(tmp_path, kept):
    forward(write(tmp_path, START, train(1), train(2)))
    forward(write(tmp_path, train(3)))
    assert [sink.steps for sink in kept] == [[1, 2], [3]]
    assert kept[1].given == kept[0].id


def test_a_resumed_run_goes_on_with_the_same_id(tmp_path, kept):
    forward(write(tmp_path, START, train(1), train(2)))
    forward(write(tmp_path, START, resume(1), train(2), train(3)))
    assert [sink.steps for sink in kept] == [[1, 2], ["resume", 2, 3]]
    assert kept[1].given == kept[0].id
    assert kept[1].logged[0] == ("resume", 1)


def test_a_run_that_is_resumed_while_it_is_followed_stays_the_same_one(tmp_path, kept):
    one = forwarder(write(tmp_path, START, train(1)))
    one.look()
    write(tmp_path, START)
    one.look()
    write(tmp_path, {"event": "model", "parameters": 3}, resume(1), train(2))
    one.look()
    assert [sink.steps for sink in kept] == [[1, "resume", 2]]


def test_of_a_resumed_run_that_was_not_forwarded_all_is(tmp_path, kept):
    forward(write(tmp_path, START, train(1), train(2), START, resume(2), train(3)))
    assert [sink.steps for sink in kept] == [[1, 2, "resume", 3]]


def test_a_new_run_in_the_folder_is_another_one(tmp_path, kept):
    one = forwarder(write(tmp_path, START, train(1)))
    one.look()
    write(tmp_path, train(2), START, train(1))
    one.look()
    assert [sink.steps for sink in kept] == [[1, 2], [1]]
    assert kept[0].summary == {}  # it was closed
    assert kept[1].id != kept[0].id


def test_only_the_last_run_of_a_folder_is_forwarded(tmp_path, kept):
    forward(write(tmp_path, *RUN, START, train(1)))
    assert [sink.steps for sink in kept] == [[1]]


def test_a_file_that_is_replaced_is_forwarded_from_its_start(tmp_path, kept):
    one = forwarder(write(tmp_path / "a", START, *map(train, range(1, 9))))
    one.look()
    other = write(tmp_path / "b", START, train(1)) / "metrics.jsonl"
    other.replace(tmp_path / "a" / "metrics.jsonl")
    one.look()
    assert [len(sink.steps) for sink in kept] == [8, 1]


@pytest.mark.parametrize("state", ["", "[]", '{"run": 1}', '{"run": 1, "id": 3, "sent": 99}'])
def test_a_spoilt_note_of_how_far_it_came_begins_anew(tmp_path, kept, state):
    (tmp_path / "report_kept.json").write_text(state)
    forward(write(tmp_path, START, train(1)))
    assert [sink.steps for sink in kept] == [[1]]


# ---- the libraries


def report(name, folder, **env):
    """Forward a run in a process."""
    command = [sys.executable, str(LAB / "reporters.py"), name, str(folder)]
    env = cli_env({"HOME": str(folder.parent), **env})
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=100, check=False
    )


def test_tensorboard_files_are_read_back_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    folder = write(tmp_path / "a", START, train(1), train(2, 2.0), train(3, 9.0))
    assert report("tensorboard", folder).stdout == ""
    write(folder, START, resume(2), train(3, 1.5), val(3), FINAL)
    assert report("tensorboard", folder).stdout == ""
    (board,) = (folder / "tensorboard").iterdir()
    found = module.EventAccumulator(str(board)).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train_loss")]
    assert losses == [(1, 2.5), (2, 2.0), (3, 1.5)]
    assert [event.value for event in found.Scalars("final_val_bpb")] == [1.25]
    assert "| seed | 7 |" in str(found.Tensors("settings")[0])


def test_wandb_offline_keeps_the_run(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    folder = write(tmp_path / "a", *RUN)
    done = report("wandb", folder, WANDB_MODE="offline")
    assert (done.returncode, done.stdout) == (0, "")
    run_id = json.loads((folder / "report_wandb.json").read_text())["id"]
    (file,) = (folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    content = file.read_bytes()
    for name in (b"train_loss", b"final_val_bpb", b"seed"):
        assert name in content


def test_a_wandb_that_is_not_logged_in_is_told_in_a_line(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    folder = write(tmp_path / "a", *RUN)
    done = report("wandb", folder)
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert "wandb login" in done.stdout


def test_trackio_keeps_the_figures(tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed")
    folder = write(tmp_path / "a", *RUN)
    place = tmp_path / "trackio"
    done = report("trackio", folder, TRACKIO_DIR=str(place))
    assert (done.returncode, done.stdout) == (0, "")
    content = b"".join(path.read_bytes() for path in place.rglob("*.db*"))
    assert b"train_loss" in content
    assert b"final_val_bpb" in content


READ_AIM = """
import sys
import aim
from aim.sdk.index_manager import RepoIndexManager
folder, run_id = sys.argv[1:]
RepoIndexManager.get_index_manager(aim.Repo(folder)).index(run_id)  # as `aim up` does
for metric in aim.Repo(folder).get_run(run_id).metrics():
    print(metric.name, metric.values.sparse_numpy()[1].tolist())
"""


def test_aim_keeps_the_figures(tmp_path):
    pytest.importorskip("aim", reason="aim is not installed")
    folder = write(tmp_path / "a", *RUN)
    done = report("aim", folder)
    assert (done.returncode, done.stdout) == (0, "")
    run_id = json.loads((folder / "report_aim.json").read_text())["id"]
    read = subprocess.run(
        [sys.executable, "-c", READ_AIM, str(tmp_path), run_id],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "final_val_bpb [1.25]" in read.stdout, read.stderr
    assert "train_loss [2.5, 2.5]" in read.stdout


# ---- what goes wrong


def test_a_library_that_is_not_installed_is_told_in_a_line(tmp_path):
    folder = write(tmp_path / "a", *RUN)
    (tmp_path / "fake" / "wandb").mkdir(parents=True)
    module = tmp_path / "fake" / "wandb" / "__init__.py"
    module.write_text("raise ModuleNotFoundError('none', name='wandb')")
    done = report("wandb", folder, PYTHONPATH=str(tmp_path / "fake"))
    assert done.returncode == 1
    assert done.stdout == "wandb: not installed: pip install wandb\n"


BROKEN = {
    "raises": "raise RuntimeError('a\\nb')",
    "exits": "raise SystemExit('a')",
    "prints": "print('chatter'); raise ValueError('a')",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_library_that_fails_is_told_in_a_line(tmp_path, how):
    folder = write(tmp_path / "a", *RUN)
    (tmp_path / "wandb.py").write_text(BROKEN[how])
    done = report("wandb", folder, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (1, "wandb: a\n", "")
    assert ("chatter" in (folder / "report_wandb.log").read_text()) == (how == "prints")


def test_a_run_is_forwarded_by_one_process_at_a_time(tmp_path):
    folder = write(tmp_path / "a", *RUN)
    with open(folder / "report_tensorboard.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        done = report("tensorboard", folder)
    assert done.returncode == 1
    assert done.stdout == "tensorboard: another process forwards this run already\n"


def test_a_reporter_that_fails_does_not_stop_the_watcher(tmp_path):
    folder = write(tmp_path / "a", START, train(1))
    (folder / "lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")  # it has died
    (tmp_path / "wandb.py").write_text("raise ValueError('it fails')")
    command = [sys.executable, str(LAB / "watch.py"), str(folder), "--report-to"]
    env = cli_env({"PYTHONPATH": str(tmp_path)})
    done = subprocess.run(
        [*command, "wandb,tensorboard"], env=env, capture_output=True, text=True, timeout=60
    )
    assert "warning: wandb: it fails" in done.stdout
    assert "died step:1" in done.stdout
    assert json.loads((folder / "report_tensorboard.json").read_text())["sent"] == 2
