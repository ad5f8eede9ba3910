"""Signals and locks: SIGTERM, SIGINT, SIGUSR1, a second signal, and two runs of one name. All runs
are processes of the real script."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Place, assert_ended_like, at, checkpoints, error, same_bits
from programs import SCRIPT, Program, Server, loss_lines

FORWARD = "torch.sigmoid"  # as listed in test_checkpoints.py
PAUSE = 2.1  # after which a second signal is not the first one, sent on by a launcher
ASK = [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)]


# ---- one signal: save and stop


@pytest.mark.parametrize(("name", "code"), ASK)
def test_the_step_is_finished_and_saved(name, code, place):
    run = place.run(at(6, name), SAVE_EVERY=0)
    assert run.returncode == code, run.output
    assert checkpoints(place.folder) == [5]
    assert "Traceback" not in run.output


@pytest.mark.parametrize(("name", "code"), ASK)
def test_the_log_says_how_to_go_on_and_that_is_right(name, code, place, whole):
    run = place.run(at(6, name), SAVE_EVERY=0)
    (line,) = re.findall(r"^to go on: (.*)$", run.output, re.M)
    resumed = place.run(SAVE_EVERY=0, **dict(word.split("=", 1) for word in line.split()))
    assert_ended_like(place, whole, run, resumed)


def test_a_run_that_was_stopped_exports_and_scores_nothing(place):
    run = place.run(at(6, "SIGTERM"))
    assert list(place.folder.glob("final_model*")) == []
    assert "final_int8" not in run.output


def test_the_log_names_the_signal_and_the_step(place):
    run = place.run(at(6, "SIGTERM"))
    assert re.search(r"^stopping_early: SIGTERM .*\bstep:5$", run.output, re.M)


MOMENTS = {
    "in priming": at(1, "SIGTERM"),
    "in the first step": at(2, "SIGTERM"),
    "in a step after which a checkpoint is due": at(4, "SIGTERM"),
    "in the last step": at(9, "SIGTERM"),
    "in a validation": at(8, "SIGTERM", FORWARD),
    "in the last validation": at(14, "SIGTERM", FORWARD),
    "while a checkpoint is written": at(1, "SIGTERM", "os.fsync", "checkpoint_0000006"),
    "while the weights are written": at(1, "SIGTERM", "os.fsync", "final_model.pt"),
    "in the final score": at(15, "SIGTERM", FORWARD),
}


@pytest.mark.parametrize(
    ("moment", "save_every"),
    [
        *((moment, 0) for moment in MOMENTS if moment != "while a checkpoint is written"),
        ("in a step after which a checkpoint is due", 3),
        ("in the last validation", 3),
        ("while a checkpoint is written", 3),
    ],
)
def test_a_signal_at_any_moment_loses_nothing(moment, save_every, place, whole):
    """What was asked to end after step 2 must not start again at step 0: each training step of the
    whole run is taken once. It may also finish, if nothing but the export was left."""
    stopped = place.run(MOMENTS[moment], SAVE_EVERY=save_every)
    assert stopped.returncode in (0, 143), stopped.output
    runs = [stopped]
    if not (place.folder / "final_model.pt").exists() or stopped.returncode:
        runs.append(place.resume(SAVE_EVERY=save_every))
    assert_ended_like(place, whole, *runs)
    taken = re.findall(r"^step:(\d)/8 train_loss", "".join(run.output for run in runs), re.M)
    assert taken == list("12345678")


# ---- signals that are ignored


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGTERM"])
def test_a_signal_that_was_ignored_when_the_run_started_stays_so(name, place, whole):
    """As under nohup, which is for runs that outlive their terminal, or in a shell's background."""
    run = place.run({"at": "", "do": f"ignore {name}"}, at(6, name), SAVE_EVERY=0)
    assert_ended_like(place, whole, run)
    assert "stopping_early" not in run.output


def test_the_terminal_of_a_run_may_be_closed(place, whole, tmp_path):
    """The console is gone, and the terminal's processes get SIGHUP: the run saves, and goes on."""
    reader, terminal = os.openpty()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env |= place.env(ITERATIONS=10**6, SAVE_EVERY=0, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=0)
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    job = subprocess.Popen([sys.executable, str(SCRIPT)], env=env, process_group=0, **streams)
    os.close(terminal)
    printed = b""
    while b"step:3/" not in printed:
        printed += os.read(reader, 4096)
    os.close(reader)
    os.kill(job.pid, signal.SIGHUP)
    assert job.wait(40) == 129
    (step,) = checkpoints(place.folder)
    assert step >= 3
    assert f"step:{step}" in place.log.splitlines()[-2]


# ---- a second signal: exit at once


@pytest.mark.parametrize(("name", "code"), ASK)
def test_a_second_signal_exits_at_once(name, code, place):
    """In the step itself, which is not finished, nor saved."""
    run = place.run(at(6, f"{name} pause {name}"))
    assert run.returncode in (code, -signal.Signals[name]), run.output
    assert checkpoints(place.folder) == [3]
    assert "step:5/8" not in run.output


def test_a_second_signal_in_a_save_leaves_the_earlier_checkpoint(place, whole):
    """And nothing of the file that was being written is there when the run has been resumed."""
    hold = {"at": "os.fsync", "part": "checkpoint_0000005", "do": "hold never"}
    run = place.start(at(6, "SIGTERM"), hold)
    run.until(lambda: [*place.folder.glob(".*0005*")] or run.poll() is not None)
    time.sleep(PAUSE)
    run.send(signal.SIGTERM)
    assert run.wait().returncode in (143, -15), run.output
    assert checkpoints(place.folder) == [3]
    assert_ended_like(place, whole, run, place.resume())
    assert list(place.folder.glob(".*")) == []


# ---- SIGUSR1: finish now


def test_sigusr1_goes_on_to_the_export_and_the_score(place):
    run = place.run(at(6, "SIGUSR1"), EMA_DECAY=0)
    assert run.returncode == 0, run.output
    assert re.search(r"^stopping_early: SIGUSR1 .*\bstep:5$", run.output, re.M)
    last, final = loss_lines(run.output)[-2:]
    assert last.startswith("step:5/8 val_loss")
    assert final.startswith("final_int8_zstd_roundtrip_exact")
    scores = [float(re.search(r"val_loss:([\d.]+)", line)[1]) for line in (last, final)]
    assert scores[0] == pytest.approx(scores[1], abs=0.01)


def test_sigusr1_leaves_a_checkpoint_from_which_training_can_go_on(place, whole):
    """Its last validation, of the moving average, is one that the whole run does not have."""
    run = place.run(at(6, "SIGUSR1"))
    assert checkpoints(place.folder) == [3, 5]
    assert place.resume().returncode == 0, run.output
    assert same_bits(place.folder, whole.folder)


# ---- ranks


@pytest.fixture(scope="session")
def pair(server, dataset, tmp_path_factory) -> Place:
    """A run of two ranks that no signal has disturbed."""
    place = Place(server, dataset, tmp_path_factory.mktemp("pair"))
    runs = [run.wait() for run in server.ranks(place.settings, [], [])]
    assert [run.returncode for run in runs] == [0, 0], runs[0].output
    place.output = runs[0].output
    return place


def both(server: Server, place: Place, *faults: list, **changed: object) -> list[Program]:
    """Run two ranks to their ends."""
    return [run.wait() for run in server.ranks(place.env(**changed), *faults)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("name", "code"), ASK)
def test_a_signal_to_one_rank_stops_all_after_one_step(name, code, rank, server, place, pair):
    faults = [[at(6, name)] if r == rank else [] for r in (0, 1)]
    runs = both(server, place, *faults)
    assert [run.returncode for run in runs] == [code, code], runs[rank].output
    assert checkpoints(place.folder) == [3, 5]
    resumed = both(server, place, [], [], RESUME="auto")
    assert_ended_like(place, pair, runs[0], resumed[0])


def test_sigusr1_to_one_rank_sends_all_to_the_export(server, place):
    runs = both(server, place, [], [at(6, "SIGUSR1")])
    assert [run.returncode for run in runs] == [0, 0], runs[1].output
    assert re.search(r"^step:5/8 val_loss", runs[0].output, re.M)
    assert "step:6/8" not in runs[0].output
    assert (place.folder / "final_model.artifact").exists()


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("who", ["launcher", "launcher and ranks"])
def test_torchrun_is_stopped_and_resumed(who, place, tmp_path):
    """By SIGTERM to torchrun, which sends it on; or to all processes, as Slurm does, so that each
    rank gets two. The steps are endless, since a launched run cannot be timed."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env |= place.env(ITERATIONS=10**6, SAVE_EVERY=0, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=0)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with open(tmp_path / "printed", "wb") as file:
        command = [*launcher, "--nproc_per_node=2", str(SCRIPT)]
        job = subprocess.Popen(command, env=env, stdout=file, stderr=file)
    printed, end = tmp_path / "printed", time.monotonic() + 60
    while "step:3/" not in printed.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    for pid in [*(children(job.pid) if who != "launcher" else []), job.pid]:
        os.kill(pid, signal.SIGTERM)
    assert job.wait(40) != 0
    saved = checkpoints(place.folder)
    assert len(saved) == 1, printed.read_text()[-3000:]
    assert saved[0] >= 3


# ---- two runs of one name


def test_a_second_run_of_a_name_is_refused_and_the_first_unharmed(place, whole, tmp_path):
    go = tmp_path / "go"
    first = place.start(at(6, f"hold {go}"))
    first.until(lambda: "step:4/8 train" in first.output or first.poll() is not None)
    message = error(place.run(SEED=5))
    go.touch()
    assert "RUN_ID=run" in message
    assert re.search(rf"\b{first.pid}\b", message)
    assert_ended_like(place, whole, first.wait())
    assert place.log.count("final_int8_zstd_roundtrip_exact val") == 1


def test_a_second_run_is_refused_though_it_would_resume(place, tmp_path):
    go = tmp_path / "go"
    first = place.start(at(6, f"hold {go}"))
    first.until(lambda: "step:4/8 train" in first.output or first.poll() is not None)
    message = error(place.resume())
    go.touch()
    assert re.search(rf"\b{first.pid}\b", message)
    assert first.wait().returncode == 0


def test_a_run_of_another_name_may_go_on_beside_it(place, tmp_path):
    go = tmp_path / "go"
    first = place.start(at(6, f"hold {go}"))
    first.until(lambda: "step:4/8 train" in first.output or first.poll() is not None)
    other = place.run(RUN_ID="other")
    go.touch()
    assert (first.wait().returncode, other.returncode) == (0, 0)


def test_the_name_of_a_run_that_was_killed_is_free(place):
    assert place.run(at(6, "SIGKILL")).returncode == -9
    assert place.run().returncode == 0
