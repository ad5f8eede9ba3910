"""The end of a run: whatever fails after training, nothing of it has to be done again."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SCRIPT, Place, assert_ended_like, at, checkpoints, error, same_bits

FORWARD = "torch.sigmoid"
# With SAVE_EVERY=0 there is a forward pass of priming, 8 steps, validations after 0, 2, 4, 6 and 8
# steps, the last after the export, and then one of the exported model.
LAST_VALIDATION, FINAL_SCORE = 14, 15


def export_of(run) -> str:
    """What a run that resumes a finished training prints, which must not train."""
    assert run.returncode == 0, run.output
    assert "train_loss" not in run.output
    return run.output


# ---- the order


def test_the_artifact_is_written_before_the_weights(place):
    run = place.run(at(1, "SIGKILL", "os.fsync", "final_model.pt"))
    assert run.returncode == -9
    assert (place.folder / "final_model.artifact").exists()


@pytest.mark.parametrize("nth", [LAST_VALIDATION, FINAL_SCORE])
def test_all_is_on_the_disk_before_the_last_scores(nth, place):
    place.run(at(nth, "SIGKILL", FORWARD), SAVE_EVERY=0)
    names = {path.name for path in place.folder.iterdir()}
    assert {"final_model.artifact", "final_model.pt"} <= names


# ---- a finished training is not trained again

MOMENTS = {
    "before the artifact has its name": at(1, "SIGKILL", "os.replace", "final_model.artifact"),
    "while the weights are written": at(1, "SIGKILL", "os.fsync", "final_model.pt"),
    "in the last validation": at(LAST_VALIDATION, "SIGKILL", FORWARD),
    "in the final score": at(FINAL_SCORE, "SIGKILL", FORWARD),
}


@pytest.mark.parametrize("save_every", [0, 3])
@pytest.mark.parametrize("moment", MOMENTS)
def test_resume_of_a_finished_training_goes_to_the_export(moment, save_every, place, whole):
    killed = place.run(MOMENTS[moment], SAVE_EVERY=save_every)
    assert killed.returncode == -9, killed.output
    resumed = place.resume(SAVE_EVERY=save_every)
    export_of(resumed)
    assert_ended_like(place, whole, killed, resumed)
    assert checkpoints(place.folder) == ([6, 8] if save_every else [])


def test_a_training_that_the_clock_ended_goes_to_the_export(place):
    capped = {"MAX_WALLCLOCK_SECONDS": 9, "ITERATIONS": 1000, "SAVE_EVERY": 0, "VAL_LOSS_EVERY": 0}
    kill = at(1, "SIGKILL", "os.fsync", "final_model.pt")
    place.run(kill, {"at": "", "do": "tick"}, **capped)
    export_of(place.resume({"at": "", "do": "tick"}, **capped))


def test_a_training_that_sigusr1_ended_goes_to_the_export(place):
    kill = at(1, "SIGKILL", "os.replace", "final_model.artifact")
    assert place.run(at(6, "SIGUSR1"), kill, SAVE_EVERY=0).returncode == -9
    assert "step:5/8 val_loss" in export_of(place.resume(SAVE_EVERY=0))


def test_a_finished_training_cannot_go_on_under_other_settings(place):
    """Its checkpoint has no optimizer state, and says so; nothing is lost."""
    place.run(MOMENTS["in the final score"], SAVE_EVERY=0)
    message = error(place.resume(ITERATIONS=12, RESUME_CHANGED=1, SAVE_EVERY=0))
    assert "checkpoint_0000008.pt" in message
    assert "ITERATIONS=8, now 12" in message
    assert checkpoints(place.folder) == [8]


def test_the_room_for_the_export_is_given_back(place):
    place.run(at(6, "SIGTERM"))
    assert [path.name for path in place.folder.glob(".*")] == []


# ---- disks


def test_too_little_room_is_told_before_training(disk, server, dataset, whole):
    place = Place(server, dataset, disk(300_000))
    run = place.run(SAVE_EVERY=0)
    message = error(run)
    assert "step:" not in run.output
    assert str(place.folder) in message
    assert re.search(r"need up to \d+ bytes, \d+ are free", message)


def test_a_disk_that_cannot_promise_room_is_used_all_the_same(place, whole):
    """Some file systems know no such promise."""
    refuse = {"at": "os.posix_fallocate", "do": "unsupported"}
    assert_ended_like(place, whole, place.run(refuse, SAVE_EVERY=0))


def test_an_export_that_fails_can_be_finished(place, whole):
    """The message says what is there, what is not, and the next step."""
    run = place.run(at(1, "full", "os.fsync", "final_model.artifact"), SAVE_EVERY=0)
    message = error(run)
    assert str(place.folder / "final_model.artifact") in message
    assert "kept: checkpoint_0000008.pt, final_model.pt" in message
    assert re.search(r"\d+ bytes are free in", message)
    settings = dict(
        word.split("=") for word in re.search(r"(RUN_ID=\S+ RESUME=\S+)", message)[1].split()
    )
    resumed = place.run(SAVE_EVERY=0, **settings)
    export_of(resumed)
    assert_ended_like(place, whole, run, resumed)


def test_an_export_that_fails_ends_all_ranks(server, place):
    full = at(1, "full", "os.fsync", "final_model.artifact")
    runs = [run.wait() for run in server.ranks(place.env(), [full], [])]
    assert [run.returncode for run in runs] == [1, 1], runs[1].output
    assert "Traceback" not in runs[0].output + runs[1].output
    assert "final_model.artifact" in error(runs[0])


def test_a_folder_that_is_removed_meanwhile_is_made_again(place, whole, tmp_path):
    go = tmp_path / "go"
    run = place.start(at(6, f"hold {go}"), SAVE_EVERY=0)
    run.until(lambda: "step:4/8 train" in run.output or run.poll() is not None)
    shutil.rmtree(place.out)
    go.touch()
    assert_ended_like(place, whole, run.wait())


# ---- what a run was started with


def start_copy(place: Place, folder: Path, hold: Path) -> subprocess.Popen:
    """Start a copy of the script, which stops in step 3 until a file is there."""
    folder.mkdir()
    for name in (SCRIPT.name, "frontier.py", "keeper.py"):
        shutil.copy(SCRIPT.with_name(name), folder)
    (folder / "sitecustomize.py").write_text(
        "import os, time\n"
        "replace = os.replace\n"
        "def wait(source, target):\n"
        f"    while 'checkpoint_' in str(target) and not os.path.exists({str(hold)!r}):\n"
        "        time.sleep(0.02)\n"
        "    replace(source, target)\n"
        "os.replace = wait\n"
    )
    basic = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(folder)}
    command = [sys.executable, str(folder / SCRIPT.name)]
    with open(folder / "printed", "wb") as printed:
        return subprocess.Popen(command, env=basic | place.env(), stdout=printed, stderr=printed)


@pytest.mark.parametrize("change", ["edited", "removed"])
def test_the_script_and_the_tokenizer_may_change_meanwhile(change, place, whole, dataset, tmp_path):
    tokenizer, go, folder = tmp_path / "my.model", tmp_path / "go", tmp_path / "code"
    shutil.copy(dataset.tokenizer, tokenizer)
    place.settings["TOKENIZER_PATH"] = str(tokenizer)
    job, end = start_copy(place, folder, go), time.monotonic() + 60
    while "step:3/8 train" not in (folder / "printed").read_text() and time.monotonic() < end:
        time.sleep(0.05)
    counted = (SCRIPT.name, "frontier.py")
    for path in (*(folder / name for name in counted), tokenizer):
        path.unlink() if change == "removed" else path.write_bytes(b"# another\n")
    go.touch()
    assert job.wait(60) == 0, (folder / "printed").read_text()
    assert same_bits(place.folder, whole.folder)
    code = sum(len(SCRIPT.with_name(name).read_bytes()) for name in counted)
    assert f"({code} code, " in place.log.splitlines()[-1]


# ---- data that is lost


def lose_a_shard(place: Place, dataset, folder: Path) -> Path:
    """Let a place read copies of the shards; the second training shard is needed from step 21 on.

    That is later than the batches that are read ahead at step 3.
    """
    shutil.copytree(dataset.folder, folder)
    place.settings |= {"DATA_PATH": str(folder), "TRAIN_BATCH_TOKENS": "256"}
    return folder / "fineweb_train_000001.bin"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("how", ["removed", "cut"])
def test_a_shard_that_is_lost_costs_no_step(how, ranks, server, place, dataset, tmp_path):
    shard, go = lose_a_shard(place, dataset, tmp_path / "shards"), tmp_path / "go"
    hold = at(3, f"hold {go}")
    env = place.env(SAVE_EVERY=0, ITERATIONS=25)
    runs = [server.start(env, hold)] if ranks == 1 else server.ranks(env, [hold], [hold])
    first, content = runs[0], shard.read_bytes()
    first.until(lambda: "step:1/25 train" in first.output or first.poll() is not None)
    shard.unlink() if how == "removed" else shard.write_bytes(content[:1100])
    go.touch()
    assert [run.wait().returncode for run in runs] == [1] * ranks, first.output
    told = "".join(run.output for run in runs)
    assert "Traceback" not in told
    assert re.search(rf"error: the training data cannot be read.*{shard.name}", told)
    (saved,) = checkpoints(place.folder)
    shard.write_bytes(content)
    env = place.env(SAVE_EVERY=0, ITERATIONS=25, TRAIN_LOG_EVERY=1, RESUME="auto")
    again = server.start(env).wait() if ranks == 1 else server.ranks(env, [], [])[0].wait()
    assert again.returncode == 0, again.output
    assert f"step:{saved + 1}/25 train_loss" in again.output


def test_a_shard_that_is_lost_when_it_is_not_needed_any_more_is_not_missed(
    place, dataset, tmp_path
):
    shard, go = lose_a_shard(place, dataset, tmp_path / "shards"), tmp_path / "go"
    steps = 5500 // 256  # in the first shard
    run = place.start(at(3, f"hold {go}"), SAVE_EVERY=0, ITERATIONS=steps)
    run.until(lambda: f"step:1/{steps} train" in run.output or run.poll() is not None)
    shard.unlink()
    go.touch()
    assert run.wait().returncode == 0, run.output


def test_a_signal_is_as_good_as_before_when_data_is_lost(place, dataset, tmp_path):
    """Both at once: the step is saved, whichever comes first."""
    shard, go = lose_a_shard(place, dataset, tmp_path / "shards"), tmp_path / "go"
    run = place.start(at(3, f"hold {go}"), SAVE_EVERY=0, ITERATIONS=25)
    run.until(lambda: "step:1/25 train" in run.output or run.poll() is not None)
    shard.unlink()
    run.send(signal.SIGTERM)
    go.touch()
    assert run.wait().returncode in (1, 143), run.output
    assert len(checkpoints(place.folder)) == 1
