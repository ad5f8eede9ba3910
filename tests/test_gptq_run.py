"""Runs with QUANT_METHOD=gptq: calibration, FIT_BUDGET, ranks, and what is missing or broken."""

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, load_weights, resolve, run_cli, run_main, tiny_settings

import quantizer
import train_gpt as tg

GPTQ = {"QUANT_METHOD": "gptq", "CALIBRATION_TOKENS": "2048"}
FITTED = GPTQ | {"FIT_BUDGET": "step"}
CALIBRATED = re.compile(
    r"^calibration: tokens:(\d+) backward:(\d+) seconds:[\d.]+ reserved:8$", re.M
)


def cap(extra):
    """A cap that leaves so many bytes beside the code."""
    hp = dataclasses.replace(tg.Hyperparameters(), quant_method="gptq")
    return str(tg.code_bytes(hp) + extra)


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A run that fills its cap, and its checkpoint of the end."""
    out = tmp_path_factory.mktemp("gptq")
    env = tiny_settings(dataset, out, ARTIFACT_MAX_BYTES=cap(75_000), **FITTED)
    done = run_cli(env | {"SAVE_EVERY": "4"})
    assert done.rc == 0, done.stderr
    return env, out / "tiny", done.stdout


def test_calibration_and_fill_are_logged(finished):
    _, _, text = finished
    assert CALIBRATED.search(text).groups() == ("2048", "512")
    fill = re.search(r"fit_budget:step quant_step:[\d.]+ tries:\d+ fill:([\d.]+)$", text, re.M)
    assert 0.999 <= float(fill[1]) <= 1


def test_code_and_artifact_fill_the_cap_by_the_files_on_the_disk(finished):
    env, folder, text = finished
    code = SCRIPT.stat().st_size + SCRIPT.with_name("quantizer.py").stat().st_size
    artifact = (folder / "final_model.artifact").stat().st_size
    most = int(env["ARTIFACT_MAX_BYTES"])
    assert 0.999 * most <= code + artifact <= most
    assert f"{code + artifact} bytes ({code} code, {artifact} artifact)" in text


def test_the_artifact_alone_gives_the_same_score(finished):
    env, folder, text = finished
    given = {name: env[name] for name in ("DATA_PATH", "TOKENIZER_PATH", "OUT_DIR", "DTYPE")}
    given |= {"EVAL_ONLY": "1", "ARTIFACT": str(folder / "final_model.artifact")}
    run_main(given | {"RUN_ID": "again", "VAL_BATCH_SIZE": "4096", "DEVICE": "cpu"})
    score = re.search(r"^final_gptq_rans_roundtrip_exact .*$", text, re.M)[0]
    assert score in (folder.parent / "again.txt").read_text(encoding="utf-8")


def test_the_artifact_costs_little(finished):
    """At 3.5 bits a weight."""
    _, _, text = finished
    trained, stored = (float(loss) for loss in re.findall(r"val_loss:([\d.]+)", text))
    assert abs(stored - trained) < 0.05


def test_the_text_log_has_the_source_of_all_three(finished):
    _, folder, _ = finished
    parts = folder.with_suffix(".txt").read_text(encoding="utf-8").split(f"\n{'=' * 100}\n")
    names = ("train_gpt.py", "quantizer.py", "keeper.py")
    assert parts[:3] == [SCRIPT.with_name(name).read_text(encoding="utf-8") for name in names]


def test_the_forecast_comes_from_the_same_code(finished):
    env, _, text = finished
    total = int(re.search(r"^forecast: (\d+) bytes", text, re.M)[1])
    assert total == pytest.approx(int(env["ARTIFACT_MAX_BYTES"]), rel=0.03)


def test_ranks_write_the_same_bytes_from_the_same_weights(finished, tmp_path):
    """Three of them: 8 rows do not divide evenly."""
    env, folder, _ = finished
    shutil.copytree(folder.parent, tmp_path / "logs")
    artifact = tmp_path / "logs" / "tiny" / "final_model.artifact"
    artifact.unlink()
    done = run_cli(env | {"OUT_DIR": str(tmp_path / "logs"), "RESUME": "auto"}, nproc=3)
    assert done.rc == 0, done.stderr
    assert artifact.read_bytes() == (folder / "final_model.artifact").read_bytes()


def test_without_the_keeper_the_artifact_is_the_same(finished, tmp_path):
    env, folder, _ = finished
    (tmp_path / "alone").mkdir()
    shutil.copy(SCRIPT.with_name("quantizer.py"), tmp_path / "alone")
    done = run_cli(env | {"OUT_DIR": str(tmp_path / "logs")}, copy_to=tmp_path / "alone")
    assert done.rc == 0, done.stderr
    alone = tmp_path / "logs" / "tiny" / "final_model.artifact"
    assert alone.read_bytes() == (folder / "final_model.artifact").read_bytes()


def test_without_quantizer_py_it_is_one_clear_error(tiny_env, tmp_path):
    done = run_cli(tiny_env | GPTQ, copy_to=tmp_path / "alone")
    assert done.rc == 1
    what = "QUANT_METHOD: quantizer.py must lie beside train_gpt.py"
    assert done.stderr == f"train_gpt.py: error: {what}\n"
    assert not (tmp_path / "logs").exists()


def test_an_artifact_that_needs_quantizer_py_says_so(finished, tmp_path):
    env, folder, _ = finished
    given = {name: env[name] for name in ("DATA_PATH", "TOKENIZER_PATH")}
    given |= {"EVAL_ONLY": "1", "ARTIFACT": str(folder / "final_model.artifact")}
    done = run_cli(given | {"OUT_DIR": str(tmp_path)}, copy_to=tmp_path / "alone")
    assert done.rc == 1
    assert "quantizer.py must lie beside train_gpt.py" in done.stderr


# ---- what the calibration sees


def seen_batches(monkeypatch, tiny_env, **changed):
    """The batches of a run's calibration, and whether each went backward."""
    found = []
    see = quantizer.Calibration.see

    def listen(self, batch, backward):
        found.append((batch, backward))
        see(self, batch, backward)

    monkeypatch.setattr(quantizer.Calibration, "see", listen)
    run_main(tiny_env | GPTQ | {name: str(value) for name, value in changed.items()})
    return found


def test_it_reads_the_training_tokens_that_come_next(monkeypatch, tiny_env, dataset):
    found = seen_batches(monkeypatch, tiny_env)
    tokens = torch.cat([inputs.flatten() for (inputs, _, _), _ in found])
    start = 4 * 512
    assert tokens.tolist() == dataset.train[start : start + 2048].tolist()
    assert [backward for _, backward in found] == [True, False, False, False] * 8


def test_it_attends_as_validation_does(monkeypatch, tiny_env):
    found = seen_batches(monkeypatch, tiny_env, EVAL_DOC_ISOLATED=1, EVAL_SEQ_LEN=128)
    for (inputs, _, documents), _ in found:
        assert documents.longest == 128
        begins = 1 + torch.nonzero(inputs.flatten()[1:] == 1).flatten()
        assert {*begins.tolist()} <= {*documents.offsets.tolist()}


def test_it_ends_with_the_wallclock(monkeypatch, tiny_env):
    """The first batch is seen in any case."""
    ticks = itertools.count(0.0, 5.0)
    monkeypatch.setattr(tg.Run, "clock", lambda *_, **__: next(ticks))
    found = seen_batches(monkeypatch, tiny_env, MAX_WALLCLOCK_SECONDS=40)
    assert 1 <= len(found) < 32


def test_training_leaves_it_the_reserved_seconds():
    hp = resolve({"MAX_WALLCLOCK_SECONDS": 100, "CALIBRATION_SECONDS": 30, **GPTQ})
    assert tg.training_seconds(hp) == 70
    assert tg.training_seconds(dataclasses.replace(hp, quant_method="round")) == 100
    assert tg.training_seconds(dataclasses.replace(hp, max_wallclock_seconds=0.0)) == 0


# ---- bad input


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"FIT_BUDGET": "step"}, "FIT_BUDGET=step: needs QUANT_METHOD=gptq"),
        (GPTQ | {"FIT_BUDGET": "sigma"}, "FIT_BUDGET=sigma: needs QUANT_METHOD=round"),
        (
            GPTQ | {"MAX_WALLCLOCK_SECONDS": "8"},
            "CALIBRATION_SECONDS=8.0: all of MAX_WALLCLOCK_SECONDS=8.0",
        ),
        ({"QUANT_TRELLIS": "4"}, "QUANT_TRELLIS=4: expected one of 1, 8"),
        ({"QUANT_STEPS": "both"}, "QUANT_STEPS=both: expected one of sigma, columns, rows, loss"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, problem):
    with pytest.raises(tg.UserError, match=re.escape(problem)):
        resolve(given)


def test_nan_in_the_calibration_ends_the_run_with_the_raw_weights(monkeypatch, tiny_env, tmp_path):
    close = quantizer.Calibration.close

    def spoil(self):
        self.uses["blocks.1.fc"].squares[3] = torch.nan
        close(self)

    monkeypatch.setattr(quantizer.Calibration, "close", spoil)
    what = r"calibration: blocks\.1\.fc\.weight met values that are not finite; .*final_model\.pt"
    with pytest.raises(tg.UserError, match=what):
        run_main(tiny_env | GPTQ)
    folder = Path(tiny_env["OUT_DIR"]) / "tiny"
    assert load_weights(folder)
    assert not (folder / "final_model.artifact").exists()


def test_a_cap_that_cannot_be_met_is_said_and_all_is_saved(tiny_env):
    with pytest.raises(tg.UserError, match="over ARTIFACT_MAX_BYTES"):
        run_main(tiny_env | FITTED | {"ARTIFACT_MAX_BYTES": cap(20_000)})
    folder = Path(tiny_env["OUT_DIR"]) / "tiny"
    text = folder.with_suffix(".txt").read_text(encoding="utf-8")
    assert "(it cannot do more)\n" in text
    assert "warning: over the cap, with FIT_BUDGET=step\n" in text
    assert load_weights(folder)
    assert (folder / "final_model.artifact").exists()


def test_an_event_tells_the_code_of_both_files(finished):
    _, folder, _ = finished
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    final = next(e for e in map(json.loads, lines) if e["event"] == "final")
    assert final["code_bytes"] == tg.code_bytes(resolve(GPTQ))
