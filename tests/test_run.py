"""Whole runs: logs, files, the round trip, EVAL_ONLY, the caps, and any number of ranks."""

import copy
import dataclasses
import itertools
import json
import math
import random
import re
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    Dataset,
    Outcome,
    events,
    load_weights,
    run_cli,
    run_main,
    same_bits,
    shard_bytes,
    tiny_settings,
)
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from train_gpt import UserError, lr_scale

SECRET = "hunter2-3e1f9c"


@dataclass(frozen=True)
class Finished:
    """A finished run: how it ended, its folder, and the script that it ran."""

    outcome: Outcome
    out: Path
    script: Path

    @property
    def folder(self) -> Path:
        return self.out / "tiny"

    @property
    def lines(self) -> list[str]:
        return self.outcome.stdout.splitlines()

    @property
    def log(self) -> str:
        return (self.out / "tiny.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory) -> Finished:
    """A run by the program of a model whose larger matrices become int8."""
    root = tmp_path_factory.mktemp("run")
    environ = tiny_settings(
        dataset,
        root / "logs",
        MODEL_DIM=128,
        MLP_MULT=5,
        ITERATIONS=12,
        TRAIN_LOG_EVERY=6,
        VAL_LOSS_EVERY=5,
        WARMUP_STEPS=1,
        AWS_SECRET_ACCESS_KEY=SECRET,
    )
    outcome = run_cli(environ, copy_to=root / "code", cwd=root)
    assert outcome.rc == 0, outcome.stderr
    return Finished(outcome, root / "logs", root / "code" / "train_gpt.py")


@pytest.fixture(scope="session")
def scored(finished, dataset, tmp_path_factory) -> Finished:
    """The artifact of `finished`, scored by a copy of the script that has nothing else: no training
    shards, no settings of the model."""
    root = tmp_path_factory.mktemp("eval")
    (root / "val").mkdir()
    for path in dataset.folder.glob("*_val_*"):
        shutil.copy(path, root / "val")
    shutil.copy(finished.folder / "final_model.artifact", root / "only.artifact")
    environ = {
        "EVAL_ONLY": "1",
        "ARTIFACT": str(root / "only.artifact"),
        "DATA_PATH": str(root / "val"),
        "TOKENIZER_PATH": str(dataset.tokenizer),
        "OUT_DIR": str(root / "logs"),
        "RUN_ID": "tiny",
        "DTYPE": "fp32",
        "SAVE_NLL": str(root / "nll.npy"),
    }
    outcome = run_cli(environ, copy_to=root / "elsewhere", cwd=root)
    assert outcome.rc == 0, outcome.stderr
    return Finished(outcome, root / "logs", root / "elsewhere" / "train_gpt.py")


# ---- log lines

TIME = r"train_time:\d+ms step_avg:\d+\.\d\dms( \w+:\S+)*"
TRAIN = re.compile(rf"step:(\d+)/12 train_loss:(\d+\.\d{{4}}) {TIME}")
VAL = re.compile(rf"step:(\d+)/12 val_loss:(\d+\.\d{{4}}) val_bpb:(\d+\.\d{{4}}) {TIME}")
FINAL = re.compile(
    r"final_int8_zstd_roundtrip_exact val_loss:(\d+\.\d{8}) val_bpb:(\d+\.\d{8})( \w+:\S+)*"
)


def matches(pattern: re.Pattern, lines: list[str]) -> list[re.Match]:
    """The lines of a form."""
    return [match for line in lines if (match := pattern.fullmatch(line))]


def test_steps_1_to_10_and_every_nth_are_logged(finished):
    steps = [int(match[1]) for match in matches(TRAIN, finished.lines)]
    assert steps == [*range(1, 11), 12]


def test_validation_is_logged_every_nth_step_and_at_the_end(finished):
    steps = [int(match[1]) for match in matches(VAL, finished.lines)]
    assert steps == [0, 5, 10, 12]


def test_every_line_about_a_step_has_the_agreed_form(finished):
    about_steps = [line for line in finished.lines if "step:" in line or "_loss:" in line]
    count = sum(len(matches(form, about_steps)) for form in (TRAIN, VAL, FINAL))
    assert count == len(about_steps)


def test_the_final_line_has_8_decimals(finished):
    assert len(matches(FINAL, finished.lines)) == 1


def test_training_learns(finished):
    losses = [float(match[2]) for match in matches(VAL, finished.lines)]
    assert losses[-1] < losses[0] - 0.5


def test_an_untrained_model_knows_nothing(finished):
    assert float(matches(VAL, finished.lines)[0][2]) == pytest.approx(math.log(512), abs=0.1)


def test_the_round_trip_costs_little(finished):
    before, after = matches(VAL, finished.lines)[-1], matches(FINAL, finished.lines)[0]
    assert float(after[1]) == pytest.approx(float(before[2]), abs=0.02)


def test_text_log_opens_with_the_source(finished):
    assert finished.log.startswith(finished.script.read_text(encoding="utf-8"))


def test_text_log_opens_with_the_versions(finished):
    log = finished.log.removeprefix(finished.script.read_text(encoding="utf-8"))
    opening = log[: log.index("step:0/")]
    versions = [f"torch:{torch.__version__}", "python:3.", "device:cpu"]
    assert [version for version in versions if version not in opening] == []


def test_text_log_has_the_lines_of_the_console(finished):
    assert finished.log.endswith(finished.outcome.stdout)


def test_stderr_is_silent(finished):
    assert finished.outcome.stderr == ""


def test_metrics_parse_line_by_line(finished):
    lines = (finished.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_metrics_hold_the_training_losses_of_the_log(finished):
    logged = [(int(match[1]), match[2]) for match in matches(TRAIN, finished.lines)]
    losses = [(e["step"], f"{e['train_loss']:.4f}") for e in events(finished.folder, "train")]
    assert losses == logged


def test_metrics_hold_the_validation_losses_of_the_log(finished):
    logged = [match.group(1, 2, 3) for match in matches(VAL, finished.lines)]
    found = events(finished.folder, "val")
    losses = [(str(e["step"]), f"{e['val_loss']:.4f}", f"{e['val_bpb']:.4f}") for e in found]
    assert losses == logged


def test_metrics_hold_the_final_score(finished):
    (event,) = events(finished.folder, "final")
    final = matches(FINAL, finished.lines)[0]
    assert (f"{event['val_loss']:.8f}", f"{event['val_bpb']:.8f}") == final.group(1, 2)


# ---- files


def test_files_written(finished):
    written = {str(path.relative_to(finished.out)) for path in finished.out.rglob("*.*")}
    files = {"final_model.pt", "final_model.artifact", "metrics.jsonl"}
    assert written == {"tiny.txt", *(f"tiny/{name}" for name in files)}


def test_nothing_is_written_beside_the_out_dir(finished):
    assert {path.name for path in finished.out.parent.iterdir()} == {"logs", "code"}


def test_artifact_is_smaller_than_the_raw_weights(finished):
    raw = sum(4 * tensor.numel() for tensor in load_weights(finished.folder).values())
    assert (finished.folder / "final_model.artifact").stat().st_size < raw / 2


def test_sizes_are_logged_as_they_are_on_disk(finished):
    code = finished.script.stat().st_size
    artifact = (finished.folder / "final_model.artifact").stat().st_size
    total = next(line for line in finished.lines if line.startswith("Total submission size"))
    assert [n for n in (code, artifact, code + artifact) if str(n) not in total] == []


def test_size_metrics_are_those_on_disk(finished):
    (event,) = events(finished.folder, "final")
    artifact = (finished.folder / "final_model.artifact").stat().st_size
    assert (event["code_bytes"], event["artifact_bytes"]) == (
        finished.script.stat().st_size,
        artifact,
    )


def test_secrets_of_the_environment_are_in_no_file(finished):
    found = [path for path in finished.out.rglob("*.*") if SECRET.encode() in path.read_bytes()]
    assert found == []


def test_secrets_of_the_environment_are_not_printed(finished):
    assert SECRET not in finished.outcome.stdout + finished.outcome.stderr


def test_a_run_without_a_name_gets_one(run, tmp_path):
    run("")
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", log.stem)
    assert (log.with_suffix("") / "final_model.artifact").is_file()


def test_a_failed_write_leaves_the_previous_file_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"previous")

    def fail(file):
        file.write(b"half of the ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train_gpt.atomic_write(path, fail)
    assert path.read_bytes() == b"previous"


def test_a_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    path = tmp_path / "file"
    there = []
    monkeypatch.setattr(train_gpt.os, "fsync", lambda _: there.append(path.exists()))
    train_gpt.atomic_write(path, lambda file: file.write(b"new"))
    assert there == [False]
    assert path.read_bytes() == b"new"


def test_a_run_that_diverges_writes_no_artifact(run, tmp_path):
    with pytest.raises(UserError, match="not finite"):
        run(SCALAR_LR=1e38, MATRIX_LR=1e38, TIED_EMBED_LR=1e38)
    assert not (tmp_path / "logs" / "tiny" / "final_model.artifact").exists()


def test_a_failed_export_leaves_no_partial_file(run, tmp_path):
    with pytest.raises(UserError):
        run(SCALAR_LR=1e38, MATRIX_LR=1e38, TIED_EMBED_LR=1e38)
    assert list((tmp_path / "logs").rglob("*.partial")) == []


# ---- scoring an artifact


def test_the_bare_script_is_enough_for_the_baseline(finished, scored):
    """It trains, exports and scores with no file beside it, and its bytes alone are code."""
    for each in (finished, scored):
        assert [path.name for path in each.script.parent.iterdir()] == ["train_gpt.py"]
        assert f"({each.script.stat().st_size} code, " in each.outcome.stdout
        assert "final_int8_zstd_roundtrip_exact val_loss:" in each.outcome.stdout


def test_eval_only_gives_the_same_score(finished, scored):
    trained = events(finished.folder, "final")[0]
    evaluated = events(scored.folder, "final")[0]
    assert evaluated["val_bpb"] == pytest.approx(trained["val_bpb"], abs=1e-6)
    assert evaluated["val_loss"] == pytest.approx(trained["val_loss"], abs=1e-6)


def test_eval_only_logs_the_final_line(scored):
    assert len(matches(FINAL, scored.lines)) == 1


def test_eval_only_does_not_train(scored):
    assert [line for line in scored.lines if line.startswith("step:")] == []
    assert {path.name for path in scored.folder.iterdir()} == {"metrics.jsonl"}


def test_saved_nll_has_one_float32_a_scored_token(scored, dataset):
    nll = np.load(scored.out.parent / "nll.npy")
    assert (nll.shape, nll.dtype) == ((len(dataset.val) - 1,), np.float32)


def test_saved_nll_sums_to_the_reported_loss(scored):
    nll = np.load(scored.out.parent / "nll.npy").astype(np.float64)
    (event,) = events(scored.folder, "final")
    assert nll.mean() == pytest.approx(event["val_loss"], abs=1e-6)


def test_bpb_is_that_of_the_text(scored, dataset):
    """Against the UTF-8 length of the documents themselves, as the tokenizer normalized them."""
    nll = np.load(scored.out.parent / "nll.npy").astype(np.float64)
    texts = [dataset.sp.normalize(document) for document in dataset.val_documents]
    count = sum(len(text.replace("▁", " ").strip().encode()) for text in texts)
    (event,) = events(scored.folder, "final")
    assert event["val_bpb"] == pytest.approx(nll.sum() / math.log(2) / count, rel=1e-9)


def eval_settings(finished: Finished, **changed: object) -> dict[str, object]:
    """Settings that score the artifact of `finished` in this process."""
    return {
        "EVAL_ONLY": 1,
        "ARTIFACT": finished.folder / "final_model.artifact",
        "TRAIN_LOG_EVERY": 1,
    } | changed


def final_score(folder: Path) -> tuple[float, float]:
    """Loss and BPB that a run reported last."""
    event = events(folder, "final")[-1]
    return event["val_loss"], event["val_bpb"]


def test_the_artifacts_settings_of_the_model_win_over_the_environments(finished, run):
    other = {"NUM_LAYERS": 5, "MODEL_DIM": 128, "NUM_HEADS": 8, "NUM_KV_HEADS": 1, "MLP_MULT": 4}
    other |= {"TIE_EMBEDDINGS": 0, "ROPE_BASE": 100, "LOGIT_SOFTCAP": 5, "TRAIN_SEQ_LEN": 128}
    other |= {"VOCAB_SIZE": 1024}
    folder = run(**eval_settings(finished, **other))
    assert final_score(folder) == pytest.approx(final_score(finished.folder), abs=1e-6)


def test_settings_of_training_do_not_matter_to_scoring(run, dataset, tmp_path):
    """An artifact of sequences that do not divide the default batch is scored all the same."""
    shape = {"TRAIN_SEQ_LEN": 96, "TRAIN_BATCH_TOKENS": 192, "VAL_BATCH_SIZE": 960}
    trained = run("trained", ITERATIONS=1, **shape)
    environ = {"EVAL_ONLY": "1", "ARTIFACT": str(trained / "final_model.artifact")}
    environ |= {"DATA_PATH": str(dataset.folder), "TOKENIZER_PATH": str(dataset.tokenizer)}
    environ |= {"DTYPE": "fp32", "OUT_DIR": str(tmp_path), "RUN_ID": "scored"}
    run_main(environ)
    assert final_score(tmp_path / "scored") == pytest.approx(final_score(trained), abs=1e-6)


@pytest.mark.parametrize("count", [2, 64, 65, 66, 500])
def test_val_tokens_limits_scoring_to_the_first_tokens(count, finished, scored, run):
    folder = run(**eval_settings(finished, VAL_TOKENS=count))
    nll = np.load(scored.out.parent / "nll.npy").astype(np.float64)
    assert final_score(folder)[0] == pytest.approx(nll[: count - 1].mean(), abs=1e-5)


def test_more_val_tokens_than_there_are_means_all(finished, run):
    folder = run(**eval_settings(finished, VAL_TOKENS=10**9))
    assert final_score(folder) == pytest.approx(final_score(finished.folder), abs=1e-6)


@pytest.mark.parametrize("size", [64, 192, 10**6])
def test_validation_does_not_depend_on_its_batch(size, finished, run):
    folder = run(**eval_settings(finished, VAL_BATCH_SIZE=size))
    assert final_score(folder) == pytest.approx(final_score(finished.folder), abs=1e-6)


def test_training_saves_the_nll_of_the_artifact(run, dataset, tmp_path):
    folder = run(SAVE_NLL=tmp_path / "nll.npy")
    nll = np.load(tmp_path / "nll.npy").astype(np.float64)
    assert len(nll) == len(dataset.val) - 1
    assert nll.mean() == pytest.approx(final_score(folder)[0], abs=1e-6)


# ---- the cap on size


def test_a_run_over_the_cap_fails_after_saving_everything(tiny_env, tmp_path):
    environ = tiny_env | {"ARTIFACT_MAX_BYTES": "1000", "SAVE_NLL": str(tmp_path / "nll.npy")}
    done = run_cli(environ, cwd=tmp_path)
    assert done.rc == 1
    assert re.fullmatch(r"train_gpt\.py: error: .*\b1000\b.*\n", done.stderr)
    names = ["nll.npy", "logs/tiny/final_model.pt", "logs/tiny/final_model.artifact"]
    assert [name for name in names if not (tmp_path / name).is_file()] == []
    assert len(matches(FINAL, done.stdout.splitlines())) == 1


def test_the_cap_is_on_the_sum_of_code_and_artifact(finished, run):
    (sizes,) = events(finished.folder, "final")
    total = Path(train_gpt.__file__).stat().st_size + sizes["artifact_bytes"]
    run(**eval_settings(finished, ARTIFACT_MAX_BYTES=total))
    with pytest.raises(UserError, match=rf"\b{total - 1}\b"):
        run(**eval_settings(finished, ARTIFACT_MAX_BYTES=total - 1))


# ---- the wallclock cap


@pytest.fixture
def fake_clock(monkeypatch):
    """A clock by which a training step takes 1 s and a validation 100 s; and the steps taken."""
    clock = SimpleNamespace(now=50.0, steps=[])
    step, score = train_gpt.Trainer.step, train_gpt.score

    def timed_step(self, number, elapsed, **options):
        clock.steps.append((number, elapsed))
        clock.now += 1.0
        return step(self, number, elapsed, **options)

    def timed_score(*arguments):
        clock.now += 100.0
        return score(*arguments)

    monkeypatch.setattr(train_gpt.Run, "clock", lambda self, synchronize=False: clock.now)
    monkeypatch.setattr(train_gpt.Trainer, "step", timed_step)
    monkeypatch.setattr(train_gpt, "score", timed_score)
    return clock


def test_the_cap_ends_training_after_the_step_in_which_it_passes(fake_clock, run):
    run(MAX_WALLCLOCK_SECONDS=3.5, ITERATIONS=100)
    assert fake_clock.steps == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]


def test_validation_is_outside_the_training_time(fake_clock, run):
    run(MAX_WALLCLOCK_SECONDS=3.5, ITERATIONS=100, VAL_LOSS_EVERY=1)
    assert fake_clock.steps == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]


def test_priming_is_outside_the_training_time(fake_clock, run):
    run(MAX_WALLCLOCK_SECONDS=3.5, ITERATIONS=100, WARMUP_STEPS=10)
    assert fake_clock.steps[10:] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]


def test_no_cap_means_all_iterations(fake_clock, run):
    run(MAX_WALLCLOCK_SECONDS=0, ITERATIONS=5)
    assert len(fake_clock.steps) == 5


def test_iterations_end_training_before_the_cap(fake_clock, run):
    run(MAX_WALLCLOCK_SECONDS=3.5, ITERATIONS=3)
    assert len(fake_clock.steps) == 3


def test_the_capped_run_is_logged(fake_clock, run, capsys):
    run(MAX_WALLCLOCK_SECONDS=3.5, ITERATIONS=100)
    lines = capsys.readouterr().out.splitlines()
    assert matches(re.compile(r"stopping_early: wallclock_cap train_time:4000ms step:4\b.*"), lines)


def test_the_capped_run_is_validated_where_it_stopped(fake_clock, run):
    folder = run(MAX_WALLCLOCK_SECONDS=3.5, ITERATIONS=100)
    assert [event["step"] for event in events(folder, "val")] == [4]


def test_a_run_that_is_not_capped_says_nothing_of_a_cap(finished):
    assert "stopping_early" not in finished.outcome.stdout


def test_a_real_clock_stops_training_too(run):
    folder = run(MAX_WALLCLOCK_SECONDS=0.2, ITERATIONS=10**6)
    (last,) = events(folder, "val")
    assert 0 < last["step"] < 10**6
    assert last["train_time_ms"] >= 200


# ---- the learning rate


def schedule(iterations=100, cap=0.0, warmdown=20, frac="") -> train_gpt.Hyperparameters:
    return dataclasses.replace(
        train_gpt.Hyperparameters(),
        iterations=iterations,
        max_wallclock_seconds=cap,
        warmdown_iters=warmdown,
        warmdown_frac=frac,
    )


STEPS = [0, 1, 50, 79, 80, 81, 90, 99]


@pytest.mark.parametrize("step", STEPS)
def test_warmdown_iters_without_a_cap(step):
    assert lr_scale(schedule(), step, 3.0 * step) == pytest.approx(min(1, (100 - step) / 20))


@pytest.mark.parametrize("step", STEPS)
def test_warmdown_iters_with_a_cap_that_is_far(step):
    hp = schedule(cap=1e6)
    assert lr_scale(hp, step, 3.0 * step) == pytest.approx(min(1, (100 - step) / 20))


@pytest.mark.parametrize("step", STEPS)
def test_warmdown_iters_with_a_cap_that_is_near(step):
    """At 3 s a step, a cap of 300 s allows 100 steps of 1000."""
    hp = schedule(iterations=1000, cap=300.0)
    assert lr_scale(hp, step, 3.0 * step) == pytest.approx(min(1, (100 - step) / 20))


@pytest.mark.parametrize("step", STEPS)
def test_warmdown_frac_without_a_cap(step):
    hp = schedule(frac=0.2, warmdown=7)
    assert lr_scale(hp, step, 3.0 * step) == pytest.approx(min(1, (1 - step / 100) / 0.2))


@pytest.mark.parametrize("step", STEPS)
def test_warmdown_frac_with_a_cap_that_is_far(step):
    hp = schedule(frac=0.2, cap=1e6)
    assert lr_scale(hp, step, 3.0 * step) == pytest.approx(min(1, (1 - step / 100) / 0.2))


@pytest.mark.parametrize("step", STEPS)
def test_warmdown_frac_with_a_cap_that_is_near(step):
    hp = schedule(iterations=1000, frac=0.2, cap=300.0)
    assert lr_scale(hp, step, 3.0 * step) == pytest.approx(min(1, (1 - 3 * step / 300) / 0.2))


@pytest.mark.parametrize("warmdown", [{"warmdown": 0}, {"frac": 0.0}])
@pytest.mark.parametrize("step", [0, 50, 99])
def test_no_warmdown(warmdown, step):
    assert lr_scale(schedule(cap=1000.0, **warmdown), step, 3.0 * step) == 1


@pytest.mark.parametrize("warmdown", [{"warmdown": 20}, {"frac": 0.2}])
def test_the_first_step_is_at_full_rate_though_the_clock_has_moved(warmdown):
    """Between the start of the clock and the first step there may be a validation."""
    assert lr_scale(schedule(cap=600.0, **warmdown), 0, 1e-6) == 1


@pytest.mark.parametrize("warmdown", [{"warmdown": 20}, {"frac": 0.2}])
def test_priming_has_a_rate_in_a_run_of_no_iterations(warmdown):
    assert 0 <= lr_scale(schedule(iterations=0, cap=600.0, **warmdown), 3, 0.0) <= 1


runs = st.fixed_dictionaries(
    {
        "iterations": st.integers(1, 300),
        "cap": st.one_of(st.just(0.0), st.floats(1, 300)),
        "warmdown": st.integers(1, 400),
        "frac": st.one_of(st.just(""), st.floats(0.01, 1)),
    }
)


def rates(hp: train_gpt.Hyperparameters, paces: list[float]) -> list[float]:
    """The rates of all steps of a run whose step s takes paces[s % len(paces)] seconds."""
    step, elapsed, found = 0, 0.0, []
    while step < hp.iterations and not 0 < hp.max_wallclock_seconds <= elapsed:
        found.append(lr_scale(hp, step, elapsed))
        elapsed += paces[step % len(paces)]
        step += 1
    return found


@given(runs, st.floats(0.5, 5))
def test_at_an_even_pace_rates_never_rise(settings, pace):
    found = rates(schedule(**settings), [pace])
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(found))


@given(runs, st.floats(0.5, 5))
def test_at_an_even_pace_the_last_rate_is_a_step_from_zero(settings, pace):
    """Whichever of ITERATIONS and the cap ends the run."""
    found = rates(schedule(**settings), [pace])
    length = settings["warmdown"] if settings["frac"] == "" else settings["frac"] * len(found)
    assert found[-1] <= min(1, 1.001 / length) or len(found) == 1


@given(runs, st.lists(st.floats(0.8, 1.25), min_size=2, max_size=9))
def test_at_an_uneven_pace_the_last_rate_is_near_zero(settings, paces):
    found = rates(schedule(**settings), paces)
    length = settings["warmdown"] if settings["frac"] == "" else settings["frac"] * len(found)
    assert found[-1] <= min(1, 2 / length) or len(found) == 1


@given(runs, st.lists(st.floats(0.1, 10), min_size=1, max_size=9))
def test_rates_are_between_0_and_1(settings, paces):
    assert all(0 <= rate <= 1 for rate in rates(schedule(**settings), paces))


def test_past_the_end_the_rate_is_zero():
    assert lr_scale(schedule(), 100, 5.0) == lr_scale(schedule(cap=5.0), 50, 6.0) == 0


# ---- what ends on the same weights


def test_the_same_run_again_ends_on_the_same_bits(run):
    first = run("first")
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)  # what came before must not matter
    assert same_bits(first, run("second"))


def test_another_seed_ends_on_other_weights(run):
    assert not same_bits(run("first"), run("second", SEED=1))


@pytest.mark.parametrize("tied", [0, 1])
def test_warmup_leaves_no_trace(tied, run):
    assert same_bits(
        run("cold", WARMUP_STEPS=0, TIE_EMBEDDINGS=tied),
        run("warm", WARMUP_STEPS=3, TIE_EMBEDDINGS=tied),
    )


def test_warmup_leaves_no_trace_in_the_random_state(run, monkeypatch):
    """Nor would it if a step drew random numbers, as later features may."""
    step, draws = train_gpt.Trainer.step, []

    def random_step(self, number, elapsed, **options):
        draws.append(torch.rand(()).item())
        return step(self, number, elapsed, **options)

    monkeypatch.setattr(train_gpt.Trainer, "step", random_step)
    run("cold", WARMUP_STEPS=0)
    cold = copy.copy(draws)
    draws.clear()
    run("warm", WARMUP_STEPS=3)
    assert draws[3:] == cold


def test_validation_leaves_no_trace(run):
    """Not even with a cap, by which the clock takes part in the learning rate."""
    capped = {"MAX_WALLCLOCK_SECONDS": 3600, "ITERATIONS": 3}
    assert same_bits(
        run("without", VAL_LOSS_EVERY=0, **capped), run("with", VAL_LOSS_EVERY=1, **capped)
    )


def test_logging_leaves_no_trace(run):
    assert same_bits(run("with", TRAIN_LOG_EVERY=1), run("without", TRAIN_LOG_EVERY=0))


# Summing gradients in another order changes their last bits. Adam divides a gradient by its own
# size and would blow that up where a gradient is next to nothing, so these runs give it a large
# epsilon, which makes the result depend on the size of gradients too. Clipping is on, since
# clipping a part of the gradient would not be clipping the whole. What is left is a few fp32 ulps
# in 4 steps: 2e-7 of weights around 0.1, when this was written.
SUMMED = {"ADAM_EPS": 1e-3, "GRAD_CLIP_NORM": 0.1, "TRAIN_LOG_EVERY": 1}


def assert_same_training(a: Path, b: Path) -> None:
    """Two runs must have had the same losses and end on the same weights, up to rounding."""
    first, second = load_weights(a), load_weights(b)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5, msg=name)
    losses = [[e["train_loss"] for e in events(folder, "train")] for folder in (a, b)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    losses = [[e["val_loss"] for e in events(folder, "val")] for folder in (a, b)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("tokens", [64, 128, 512])
def test_micro_batches_do_not_change_the_result(tokens, run):
    whole = run("whole", **SUMMED)
    assert_same_training(whole, run("parts", MICRO_BATCH_TOKENS=tokens, **SUMMED))


def test_a_run_that_sees_other_data_is_not_the_same(run):
    """The tolerance of these comparisons is no blindfold: a third more data is noticed."""
    whole = run("whole", **SUMMED)
    other = run("other", TRAIN_BATCH_TOKENS=768, **SUMMED)
    with pytest.raises(AssertionError):
        assert_same_training(whole, other)


def torchrun(environ: dict[str, str], nproc: int, name: str, **changed: object) -> Path:
    """Run the program on several ranks; the run's folder."""
    texts = {key: str(value) for key, value in changed.items()}
    done = run_cli(environ | {"RUN_ID": name} | texts, nproc=nproc)
    assert done.rc == 0, done.stderr
    return Path(environ["OUT_DIR"]) / name


@pytest.mark.parametrize("nproc", [2, 3])
def test_ranks_end_where_one_process_ends(nproc, run, tiny_env):
    """8 sequences are 4 and 4, or 2 and 3 and 3; 3 ranks are more than there are shards."""
    single = run("single", **SUMMED)
    assert_same_training(single, torchrun(tiny_env, nproc, "ranks", **SUMMED))


def test_more_ranks_than_sequences_and_one_tiny_shard(run, tiny_env, tmp_path, dataset):
    folder = one_shard(tmp_path, dataset, dataset.train[:100])
    few = SUMMED | {"TRAIN_BATCH_TOKENS": 128, "DATA_PATH": folder}
    single = run("single", **few)
    assert_same_training(single, torchrun(tiny_env, 3, "ranks", **few))


def test_ranks_score_as_one_process_does(finished, scored, tiny_env, tmp_path):
    texts = {key: str(value) for key, value in eval_settings(finished, VAL_BATCH_SIZE=600).items()}
    folder = torchrun(tiny_env | texts, 2, "ranks", SAVE_NLL=tmp_path / "nll.npy")
    assert final_score(folder) == pytest.approx(final_score(finished.folder), abs=1e-6)
    nll = np.load(scored.out.parent / "nll.npy")
    np.testing.assert_allclose(np.load(tmp_path / "nll.npy"), nll, atol=1e-5)


def test_ranks_agree_on_the_name_of_a_run_without_one(tiny_env):
    done = run_cli(tiny_env | {"RUN_ID": "", "ITERATIONS": "1"}, nproc=2)
    assert done.rc == 0, done.stderr
    assert len(list(Path(tiny_env["OUT_DIR"]).glob("*.txt"))) == 1
    assert len([path for path in Path(tiny_env["OUT_DIR"]).iterdir() if path.is_dir()]) == 1


# ---- little data


def one_shard(root: Path, dataset: Dataset, tokens: np.ndarray) -> Path:
    """A folder with the validation shards and one training shard."""
    folder = root / f"one_shard_of_{len(tokens)}"
    folder.mkdir()
    for path in dataset.folder.glob("*_val_*"):
        shutil.copy(path, folder)
    (folder / "fineweb_train_000000.bin").write_bytes(shard_bytes(tokens))
    return folder


@pytest.mark.parametrize("count", [1, 63, 100, 512, 513])
def test_a_tiny_shard_is_read_over_and_over(count, run, tmp_path, dataset):
    """As if it had been written often enough into a shard that is larger than the run."""
    tokens = dataset.train[:count]
    once = run("once", DATA_PATH=one_shard(tmp_path, dataset, tokens))
    repeated = np.resize(tokens, math.ceil(3000 / count) * count)
    often = run("often", DATA_PATH=one_shard(tmp_path, dataset, repeated))
    assert same_bits(once, often)


def test_shards_are_read_one_after_another(run, tmp_path, dataset):
    """Two shards train as one that holds the tokens of both."""
    both = run("both")
    assert same_bits(both, run("one", DATA_PATH=one_shard(tmp_path, dataset, dataset.train)))


LARGE = {"train_batch_tokens": 16384, "num_layers": 9, "model_dim": 512, "device": "cpu"}


@pytest.mark.parametrize(
    ("changed", "compiler", "compiled"),
    [
        ({}, "/usr/bin/g++", True),
        ({}, None, False),
        ({"train_batch_tokens": 4096, "num_layers": 4, "model_dim": 256}, "/usr/bin/g++", False),
        ({"eval_only": 1}, "/usr/bin/g++", False),
        ({"compile": "0"}, "/usr/bin/g++", False),
        ({"compile": "1", "num_layers": 1, "model_dim": 64}, None, True),
    ],
    ids=["large", "no compiler", "small", "only to score", "told not to", "told to"],
)
def test_cpus_compile_large_steps(changed, compiler, compiled, monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(train_gpt.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(train_gpt.sysconfig, "get_path", lambda name: str(tmp_path))
    hp = train_gpt.Hyperparameters(**LARGE | changed)
    assert train_gpt.Run(hp).compile is compiled


def test_cpus_without_python_headers_do_not_compile(monkeypatch, tmp_path):
    monkeypatch.setattr(train_gpt.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(train_gpt.sysconfig, "get_path", lambda name: str(tmp_path))
    assert not train_gpt.Run(train_gpt.Hyperparameters(**LARGE)).compile


HEADER = Path(sysconfig.get_path("include"), "Python.h")


@pytest.mark.skipif(not (shutil.which("g++") and HEADER.exists()), reason="no C++ compiler")
def test_compiled_runs_on_a_cpu_end_on_the_same_bits(tiny_env):
    """In two threads, which otherwise add to the embedding's gradient in any order."""
    large = {"COMPILE": "1", "TRAIN_BATCH_TOKENS": "4096", "OMP_NUM_THREADS": "2"}
    ends = []
    for name in ("first", "second"):
        env = tiny_env | large | {"RUN_ID": name, "ITERATIONS": "8"}
        assert run_cli(env).rc == 0
        ends.append(Path(env["OUT_DIR"], name))
    assert same_bits(*ends)


# ---- how often the data is read


def epochs_lines(folder: Path) -> list[str]:
    """What the log says of epochs."""
    log = folder.with_name(folder.name + ".txt").read_text(encoding="utf-8")
    console = log[log.rindex("=" * 100) :]
    return [line for line in console.splitlines() if line.startswith("epochs")]


def test_a_run_says_how_often_it_will_read_its_data(run, dataset):
    planned = 4 * 512 / len(dataset.train)
    assert epochs_lines(run()) == [f"epochs_planned:{planned:.2f}"]


def test_data_that_is_read_many_times_is_warned_of_and_counted(run, dataset):
    """The smallest of models, for 20 epochs."""
    steps = 20 * len(dataset.train) // 8192
    small = {"MODEL_DIM": 8, "NUM_LAYERS": 1, "TRAIN_BATCH_TOKENS": 8192, "ITERATIONS": steps}
    read = steps * 8192 / len(dataset.train)
    planned, done = epochs_lines(run(**small, TRAIN_LOG_EVERY=0))
    assert planned.startswith(f"epochs_planned:{read:.2f} warning: ")
    assert f"read {read:.1f} times" in planned
    assert done == f"epochs:{read:.2f}"


def test_epochs_are_an_upper_bound_under_a_wallclock_cap(run):
    (planned,) = epochs_lines(run(ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=0.05))[:1]
    assert "at most" in planned
