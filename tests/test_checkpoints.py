"""Checkpoints: what is interrupted and resumed ends where it would have ended; what is broken is
told, and left aside. All runs are processes of the real script."""

import hashlib
import io
import os
import pickle
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Place, assert_ended_like, checkpoints, error, same_bits, shard_bytes
from programs import Program, loss_lines

SECRET = "hunter2-91c07e"
KILL = "SIGKILL"


def checkpoint(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    (path,) = folder.glob(f"checkpoint_*{step:04d}.pt")
    return path


@pytest.fixture(scope="session")
def whole(server, dataset, tmp_path_factory) -> Place:
    """A run that nothing has interrupted, with checkpoints of steps 3, 6 and 8."""
    place = Place(server, dataset, tmp_path_factory.mktemp("whole"))
    run = place.run(SAVE_TOTAL_LIMIT=9, AWS_SECRET_ACCESS_KEY=SECRET)
    assert run.returncode == 0, run.output
    assert checkpoints(place.folder) == [3, 6, 8]
    place.output = run.output
    return place


@pytest.fixture
def interrupted(place, whole) -> Place:
    """A place with the checkpoints that a run wrote before it was interrupted after step 6."""
    place.folder.mkdir(parents=True)
    for step in (3, 6):
        path = Path(shutil.copy(checkpoint(whole.folder, step), place.folder))
        os.utime(path, (-step % 9, -step % 9))  # a copy, a restore or a wrong clock may do that
    return place


def assert_nothing_is_broken(place: Place, limit: int = 2) -> None:
    """All that a run left can be read: no part of a file, every checkpoint whole."""
    names = {re.sub(r"\d+", "N", path.name) for path in place.folder.iterdir()}
    files = {"final_model.pt", "final_model.artifact", "metrics.jsonl", "lock"}
    assert names == files | {"checkpoint_N.pt"}
    assert len(checkpoints(place.folder)) <= limit
    for path in place.folder.glob("checkpoint_*"):
        data = path.read_bytes()
        assert hashlib.sha256(data[32:]).digest() == data[:32]
        torch.load(io.BytesIO(data[32:]), weights_only=True)


# ---- killed and resumed

# Forward passes: 1 of priming, 1 a step, and one each for the validations after 0, 2, 4, 6 and 8
# steps, of the exported model; a scaled loss is computed before each backward pass.
MOMENTS = {
    "in priming": ("torch.Tensor.backward", 1, ""),
    "in the first step": ("torch.Tensor.backward", 2, ""),
    "in step 6": ("torch.Tensor.backward", 6, ""),
    "in a validation": ("torch.sigmoid", 8, ""),
    "while a checkpoint is written": ("os.fsync", 1, "checkpoint_0000006"),
    "before a checkpoint has its name": ("os.replace", 1, "checkpoint_0000006"),
    "before an old checkpoint is deleted": ("os.unlink", 1, "checkpoint_0000003"),
    "in the last validation": ("torch.sigmoid", 14, ""),
    "while the weights are written": ("os.fsync", 1, "final_model.pt"),
    "before the artifact has its name": ("os.replace", 1, "final_model.artifact"),
    "in the final score": ("torch.sigmoid", 15, ""),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_and_resumed_ends_on_the_same_bits(moment, place, whole):
    at, nth, part = MOMENTS[moment]
    limit = {"SAVE_TOTAL_LIMIT": 1}
    killed = place.run({"at": at, "nth": nth, "part": part, "do": KILL}, **limit)
    assert killed.returncode == -9, killed.output
    resumed = place.resume(**limit)
    assert_ended_like(place, whole, killed, resumed)
    assert_nothing_is_broken(place, limit=1)


def test_six_kills_at_random_moments_change_nothing(place, whole):
    chance, runs = random.Random(6), []
    while sum(run.returncode == -9 for run in runs) < 6 and len(runs) < 12:
        run = place.start(RESUME="auto", SAVE_EVERY=1)
        run.until(lambda run=run: "forecast:" in run.output or run.poll() is not None)
        time.sleep(0.4 * chance.random())
        run.send(9)
        runs.append(run.wait())
    runs.append(place.resume(SAVE_EVERY=1))
    assert_ended_like(place, whole, *runs)
    assert_nothing_is_broken(place)


def test_random_numbers_go_on_where_they_were(place, tmp_path):
    """A step that draws some, as a later feature may, draws those of an uninterrupted run."""
    draws = {"at": "torch.Tensor.backward", "nth": 0}
    kill = {"at": "torch.Tensor.backward", "nth": 6, "do": KILL}
    place.run(draws | {"do": f"draw {tmp_path}/whole"}, RUN_ID="whole", WARMUP_STEPS=0)
    place.run(draws | {"do": f"draw {tmp_path}/first"}, kill, WARMUP_STEPS=0)
    place.resume(draws | {"do": f"draw {tmp_path}/second"}, WARMUP_STEPS=0)
    numbers = [(tmp_path / name).read_text().split() for name in ("whole", "first", "second")]
    assert len(numbers[0]) == 8
    assert numbers[0] == numbers[1][:3] + numbers[2]


def test_a_schedule_by_the_clock_goes_on_from_the_time_that_was_saved(place):
    """By a clock that moves on by a second whenever it is read, as in a run of these seconds."""
    capped = {"MAX_WALLCLOCK_SECONDS": 15, "ITERATIONS": 1000, "WARMDOWN_FRAC": 0.8}
    clock = {"at": "", "do": "tick"}
    whole = place.run(clock, RUN_ID="whole", **capped)
    killed = place.run(clock, {"at": "torch.Tensor.backward", "nth": 9, "do": KILL}, **capped)
    resumed = place.resume(clock, **capped)
    assert re.search(r"^stopping_early: wallclock_cap .*step:(9|1\d)$", whole.output, re.M)
    assert same_bits(place.folder, place.out / "whole")
    assert sorted(loss_lines(killed.output + resumed.output)) == sorted(loss_lines(whole.output))


def test_training_time_goes_on_from_that_of_the_checkpoint(interrupted, whole):
    resumed = interrupted.resume(VAL_LOSS_EVERY=1)
    saved = re.search(r"^step:6/8 train_loss.* train_time:(\d+)ms", whole.output, re.M)
    first = re.search(r"^step:6/8 val_loss.* train_time:(\d+)ms", resumed.output, re.M)
    assert int(first[1]) >= int(saved[1])


def test_a_checkpoint_is_written_beside_the_next_steps(place, tmp_path):
    go = tmp_path / "go"
    run = place.start({"at": "os.fsync", "part": "checkpoint_0000003", "do": f"hold {go}"})
    run.until(lambda: "step:5/8 train" in run.output or run.poll() is not None)
    assert checkpoints(place.folder) == []
    go.touch()
    assert run.wait().returncode == 0
    assert checkpoints(place.folder) == [6, 8]


# ---- which checkpoint


def test_resume_auto_without_a_checkpoint_starts_at_step_0(place, whole):
    assert_ended_like(place, whole, place.resume())


def test_resume_auto_needs_the_name_of_a_run(place):
    assert re.search(r"RESUME=auto: needs RUN_ID", error(place.resume(RUN_ID="")))


def test_resume_auto_takes_the_newest(interrupted):
    run = interrupted.resume()
    assert "checkpoint_0000006.pt step:6" in run.output
    assert loss_lines(run.output)[0].startswith("step:6/8 val_loss")


def test_resume_takes_the_file_that_it_names_whatever_the_runs_name(place, whole):
    run = place.run(RESUME=checkpoint(whole.folder, 3), RUN_ID="run")
    assert loss_lines(run.output)[0].startswith("step:4/8 train_loss")
    assert_ended_like(place, whole, *[run_of_first_steps(whole), run])


def run_of_first_steps(whole: Place) -> Program:
    """As if the first three steps of `whole` were a run of their own."""
    path = whole.out / "first_steps.txt"
    path.write_text(whole.output[: whole.output.index("step:4/8")])
    return Program(whole.server, 0, path, 0)


def test_the_checkpoint_of_the_last_step_needs_no_further_step(place, whole):
    run = place.run(RESUME=checkpoint(whole.folder, 8))
    assert "train_loss" not in run.output
    assert same_bits(place.folder, whole.folder)


def test_save_every_0_leaves_no_checkpoint(place, whole):
    run = place.run(SAVE_EVERY=0)
    assert_ended_like(place, whole, run)
    assert checkpoints(place.folder) == []


@pytest.mark.parametrize(("limit", "left"), [(1, [8]), (2, [6, 8]), (3, [4, 6, 8])])
def test_save_total_limit_keeps_the_last(limit, left, place):
    place.run(SAVE_EVERY=2, SAVE_TOTAL_LIMIT=limit, VAL_LOSS_EVERY=0)
    assert checkpoints(place.folder) == left


def test_checkpoints_of_an_earlier_run_do_not_displace_those_of_this_one(interrupted):
    """The same RUN_ID again from step 0, killed as it saves step 6: it resumes what it saved."""
    kill = {"at": "os.replace", "part": "checkpoint_0000006", "nth": 2, "do": KILL}
    interrupted.run(kill, SAVE_EVERY=2, SEED=1, SAVE_TOTAL_LIMIT=2)
    resumed = interrupted.resume(SEED=1)
    assert "checkpoint_0000004.pt step:4" in resumed.output, resumed.output


def test_a_broken_newer_checkpoint_does_not_displace_whole_ones(interrupted):
    """It falls back to step 3, saves step 4, and is killed in step 5."""
    checkpoint(interrupted.folder, 6).write_bytes(b"")
    kill = {"at": "torch.Tensor.backward", "nth": 3, "do": KILL}
    interrupted.resume(kill, SAVE_EVERY=2, SAVE_TOTAL_LIMIT=1)
    resumed = interrupted.resume(SAVE_EVERY=2, SAVE_TOTAL_LIMIT=1)
    assert "checkpoint_0000004.pt step:4" in resumed.output, resumed.output


TIMES = {"backwards": lambda step: 10**9 - step, "all alike": lambda _: 0}
TIMES |= {"in the future": lambda step: 4 * 10**9 - step}


@pytest.mark.parametrize("times", TIMES)
def test_the_times_of_files_say_nothing(times, place, whole):
    """RESUME=auto takes the latest step, and what is saved then is kept."""
    place.folder.mkdir(parents=True)
    for step in (3, 6):
        path = Path(shutil.copy(checkpoint(whole.folder, step), place.folder))
        os.utime(path, (TIMES[times](step),) * 2)
    run = place.resume(SAVE_EVERY=1)
    assert "checkpoint_0000006.pt step:6" in run.output
    assert checkpoints(place.folder) == [7, 8]


def test_steps_are_numbers_not_words(place, whole):
    """Steps of eight digits come after those of seven."""
    place.folder.mkdir(parents=True)
    for name in ("checkpoint_9999999.pt", "checkpoint_10000000.pt"):
        (place.folder / name).write_bytes(b"")
    run = place.resume()
    assert run.output.index("checkpoint_10000000.pt") < run.output.index("checkpoint_9999999.pt")


def test_a_checkpoint_that_holds_another_step_than_its_name_is_not_trusted(interrupted):
    path = checkpoint(interrupted.folder, 3)
    path.rename(path.with_name("checkpoint_0000007.pt"))
    run = interrupted.resume()
    assert re.search(r"warning: .*checkpoint_0000007\.pt.*it holds step 3", run.output)
    assert "checkpoint_0000006.pt step:6" in run.output


def test_what_a_new_training_does_not_go_on_from_is_set_aside_whole(interrupted, whole):
    """The same RUN_ID again from step 0: nothing of the interrupted run is lost, or taken for the
    new one's."""
    before = {step: checkpoint(interrupted.folder, step).read_bytes() for step in (3, 6)}
    kill = {"at": "torch.Tensor.backward", "nth": 7, "do": KILL}
    run = interrupted.run(kill, SEED=1)
    assert "set aside" in run.output
    for step, content in before.items():
        aside = interrupted.folder / f"old_checkpoint_{step:07d}.pt"
        assert aside.read_bytes() == content
    assert [step for step in checkpoints(interrupted.folder) if step <= 3] == [3]
    again = interrupted.run(RESUME=interrupted.folder / "old_checkpoint_0000006.pt")
    assert "step:6" in again.output
    assert same_bits(interrupted.folder, whole.folder)


def test_resume_of_an_earlier_file_sets_later_ones_aside(interrupted):
    kill = {"at": "torch.Tensor.backward", "nth": 3, "do": KILL}
    interrupted.run(kill, RESUME=checkpoint(interrupted.folder, 3), SAVE_EVERY=1)
    assert checkpoints(interrupted.folder) == [3, 4]
    assert "checkpoint_0000004.pt step:4" in interrupted.resume(SAVE_EVERY=1).output


# ---- broken files


def flip(data: bytes) -> bytes:
    """The same with one bit flipped, in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def wrapped(content: object) -> bytes:
    """A file in the form of a checkpoint, with a right digest, of any content."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "a bit flipped": flip,
    "a bit of the digest flipped": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "empty": lambda _: b"",
    "foreign": lambda _: b"PK\x03\x04" + 5000 * b"no checkpoint ",
    "foreign, with a right digest": lambda _: wrapped({"epoch": 3}),
    "a tensor, with a right digest": lambda _: wrapped(torch.zeros(3)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_newest_checkpoint_is_passed_over_with_a_warning(damage, interrupted, whole):
    path = checkpoint(interrupted.folder, 6)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    run = interrupted.resume()
    warnings = [line for line in run.output.splitlines() if "warning" in line]
    assert len([line for line in warnings if path.name in line]) == 1, run.output
    assert "checkpoint_0000003.pt step:3" in run.output
    assert same_bits(interrupted.folder, whole.folder)


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign, with a right digest"])
def test_a_broken_file_that_resume_names_is_refused_by_name(damage, interrupted):
    path = checkpoint(interrupted.folder, 6)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert str(path) in error(interrupted.resume(RESUME=path))


def test_a_file_of_other_contents_that_resume_names_is_refused_by_name(place, whole):
    path = whole.folder / "final_model.pt"
    assert str(path) in error(place.resume(RESUME=path))


def test_a_file_that_is_not_there_is_refused_by_name(place, tmp_path):
    assert str(tmp_path / "nothing.pt") in error(place.resume(RESUME=tmp_path / "nothing.pt"))


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["pickle", "torch.save", "checkpoint"])
def test_loading_a_checkpoint_runs_no_code(form, place, tmp_path):
    marker, path, buffer = tmp_path / "ran", tmp_path / "bomb.pt", io.BytesIO()
    torch.save({"step": Bomb(marker)}, buffer)
    forms = {"pickle": pickle.dumps(Bomb(marker)), "torch.save": buffer.getvalue()}
    path.write_bytes(forms.get(form) or wrapped({"step": Bomb(marker)}))
    run = place.resume(RESUME=path)
    assert not marker.exists()
    assert str(path) in error(run)


# ---- other settings, other data

# Another valid value for each setting that takes part in the result.
OTHERS = {
    **{"SEED": 7, "VAL_TOKENS": 900, "ITERATIONS": 9, "MAX_WALLCLOCK_SECONDS": 50},
    **{"WARMDOWN_ITERS": 5, "WARMDOWN_FRAC": 0.5, "FINAL_LR_FRAC": 0.1, "EMA_DECAY": 0.5},
    **{"TRAIN_BATCH_TOKENS": 512, "TRAIN_SEQ_LEN": 64, "LOGIT_SOFTCAP": 20, "ROPE_BASE": 5000},
    **{"MATRIX_LR": 0.02, "SCALAR_LR": 0.02, "EMBED_LR": 0.3, "HEAD_LR": 0.01, "BETA1": 0.8},
    **{"BETA2": 0.9, "ADAM_EPS": 1e-6, "MUON_MOMENTUM": 0.9, "MUON_BACKEND_STEPS": 4},
    **{"MUON_WD": 0.2, "ADAM_WD": 0.2, "EMBED_WD": 0.2, "GRAD_CLIP_NORM": 0.2},
    **{"XSA_LAST_N": 2, "LN_SCALE": 0, "ROPE_DIMS": 2, "MLP_ACT": "relu2", "EVAL_STRIDE": 16},
    **{"EVAL_DOC_ISOLATED": 1, "EVAL_SEQ_LEN": 64, "QUANT_BITS_MLP": 6, "QUANT_CLIP": "sigma"},
    **{"COMPRESSOR": "rans", "DTYPE": "bf16", "SCORE_STREAMS": 1},
}


def test_every_setting_that_changes_the_result_is_named_and_refused(interrupted):
    message = error(interrupted.resume(**OTHERS))
    before = interrupted.settings
    assert [name for name in OTHERS if not re.search(rf"\b{name}=", message)] == []
    for name in ("SEED", "MATRIX_LR", "MUON_WD", "ITERATIONS"):
        was = before.get(name, {"SEED": 1337, "MATRIX_LR": 0.04}.get(name))
        assert re.search(rf"\b{name}={was}\b.*\b{OTHERS[name]}\b", message)


def test_a_refusal_leaves_the_checkpoints_as_they_were(interrupted):
    paths = sorted(interrupted.folder.glob("checkpoint_*"))
    before = [path.read_bytes() for path in paths]
    error(interrupted.resume(SEED=7))
    assert [path.read_bytes() for path in paths] == before


def test_a_refusal_says_how_to_resume_all_the_same(interrupted):
    assert "RESUME_CHANGED=1" in error(interrupted.resume(SEED=7))


def test_resume_changed_allows_other_settings_and_names_them(interrupted, whole):
    run = interrupted.resume(MATRIX_LR=0.01, RESUME_CHANGED=1)
    assert run.returncode == 0, run.output
    assert re.search(r"\bMATRIX_LR=0\.04\b.*\b0\.01\b", run.output)
    assert not same_bits(interrupted.folder, whole.folder)


def test_settings_that_change_no_result_may_differ(interrupted, whole, dataset, tmp_path):
    """Nor must the data be where they were."""
    moved = shutil.copytree(dataset.folder, tmp_path / "moved")
    neutral = {"DATA_PATH": moved, "VAL_LOSS_EVERY": 5, "TRAIN_LOG_EVERY": 1, "SAVE_EVERY": 1}
    neutral |= {"SAVE_TOTAL_LIMIT": 4, "WARMUP_STEPS": 2, "VAL_BATCH_SIZE": 640}
    run = interrupted.resume(**neutral)
    assert run.returncode == 0, run.output
    assert [name for name in neutral if not re.search(rf"\b{name}=", run.output)] == []
    assert same_bits(interrupted.folder, whole.folder)


@pytest.mark.parametrize("changed", [{"MODEL_DIM": 64}, {"NUM_LAYERS": 1}, {"NUM_LAYERS": 3}])
def test_weights_of_another_shape_are_refused_even_if_changes_are_allowed(changed, interrupted):
    message = error(interrupted.resume(RESUME_CHANGED=1, **changed))
    assert re.search(f"shape|{next(iter(changed))}", message)


def test_a_moving_average_can_begin_at_a_checkpoint_that_has_none(place):
    place.run(EMA_DECAY=0, SAVE_TOTAL_LIMIT=9)
    run = place.resume(RESUME=checkpoint(place.folder, 6), EMA_DECAY=0.5, RESUME_CHANGED=1)
    assert run.returncode == 0, run.output


def shards(folder: Path, dataset, tokens: np.ndarray) -> Path:
    """The validation data, and one shard to train on."""
    folder.mkdir()
    for path in dataset.folder.glob("*_val_*"):
        shutil.copy(path, folder)
    (folder / "fineweb_train_000000.bin").write_bytes(shard_bytes(tokens))
    return folder


@pytest.mark.parametrize("other", ["fewer tokens", "other tokens", "other order"])
def test_other_data_are_refused(other, interrupted, dataset, tmp_path):
    tokens = dataset.train.copy()
    if other == "fewer tokens":
        tokens = tokens[:-1]
    elif other == "other tokens":
        tokens = np.where(tokens == np.bincount(tokens).argmax(), 5, tokens)
    else:
        tokens = np.roll(tokens, len(tokens) // 2)
    folder = shards(tmp_path / "other", dataset, tokens)
    assert re.search("data|token", error(interrupted.resume(DATA_PATH=folder)), re.I)


def long_data(folder: Path, dataset, changed_at: int | None = None) -> Path:
    """Training data of more than 2^22 tokens, one of which may be another."""
    tokens = np.resize(dataset.train, 2**22 + 5000)
    if changed_at is not None:
        tokens[changed_at] = tokens[changed_at] % 500 + 5
    return shards(folder, dataset, tokens)


@pytest.mark.parametrize("at", [0, 2**20 + 7, 2**22 + 4999])
def test_data_that_differ_anywhere_are_refused(at, place, dataset, tmp_path):
    place.run(DATA_PATH=long_data(tmp_path / "long", dataset), ITERATIONS=3, WARMUP_STEPS=0)
    other = long_data(tmp_path / "other", dataset, at)
    message = error(place.resume(DATA_PATH=other, ITERATIONS=3, WARMUP_STEPS=0))
    assert re.search(r"DATA=.*sha256", message)


def test_the_same_tokens_in_other_shards_are_the_same_data(interrupted, whole, dataset, tmp_path):
    folder = shards(tmp_path / "one", dataset, dataset.train)
    resumed = interrupted.resume(DATA_PATH=folder)
    assert resumed.returncode == 0, resumed.output
    assert same_bits(interrupted.folder, whole.folder)


# ---- a full disk


def test_a_disk_that_fills_up_costs_a_warning_and_not_the_run(disk, server, dataset, whole):
    """It has room for the log, the results and one checkpoint and a half."""
    size = checkpoint(whole.folder, 3).stat().st_size
    place = Place(server, dataset, disk(int(1.5 * size) + 350_000))
    run = place.run()
    assert_ended_like(place, whole, run)
    assert len(re.findall(r"^warning: .*No space left on device.*", run.output, re.M)) == 2
    assert checkpoints(place.folder) == [3]
    assert "checkpoint_0000003.pt step:3" in place.resume(SAVE_EVERY=0).output


@pytest.mark.parametrize("spare", [100_000, 0])
def test_a_disk_that_is_full_stops_no_training(spare, disk, server, dataset, whole):
    """With or without room for the lines of the log, from step 5 on. What the export writes has had
    its room since the start, and the checkpoint of step 3 is still whole."""
    place = Place(server, dataset, disk(4_000_000))
    fill = {"at": "torch.Tensor.backward", "nth": 6, "do": f"fill {place.out} {spare}"}
    run = place.run(fill)
    assert "No space left on device" in run.output
    assert checkpoints(place.folder) == [3]
    assert_ended_like(place, whole, run)
    (place.out / "ballast").unlink()
    assert_ended_like(place, whole, run, place.resume())


@pytest.mark.parametrize("name", ["final_model.pt", "final_model.artifact"])
def test_an_export_that_fails_names_the_file_and_keeps_the_checkpoint(name, place, whole):
    run = place.run({"at": "os.fsync", "part": name, "nth": 1, "do": "full"})
    assert str(place.folder / name) in error(run)
    assert not (place.folder / name).exists()
    resumed = place.resume()
    assert_ended_like(place, whole, run, resumed)
    assert_nothing_is_broken(place)


def test_a_file_size_limit_costs_a_warning_too(place):
    """No checkpoint can be written at all, but the log and the results can."""
    run = place.run({"at": "", "do": "limit 400000"})
    assert run.returncode == 0, run.output
    assert (
        len(re.findall(r"^warning: no checkpoint of step \d: .*too large", run.output, re.M)) == 3
    )
    assert checkpoints(place.folder) == []


# ---- secrets


def test_variables_that_are_no_settings_are_in_no_file_nor_line(whole):
    assert SECRET not in whole.output
    paths = [path for path in whole.out.rglob("*") if path.is_file()]
    assert len(paths) >= 8
    assert [path for path in paths if SECRET.encode() in path.read_bytes()] == []
    assert [path for path in paths if b"AWS_SECRET" in path.read_bytes()] == []
