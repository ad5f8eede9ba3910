"""Packages that a machine may lack: what does not need them runs without."""

import sys

import pytest
from conftest import run_main

import keeper  # noqa: F401 - of this train_gpt, not of the copy that a test imports
import train_gpt as tg


@pytest.fixture
def no_zstandard(monkeypatch):
    """Python's import of zstandard fails, as where it is not installed."""
    monkeypatch.setitem(sys.modules, "zstandard", None)


def test_training_steps_and_scores_need_no_zstandard(no_zstandard, tiny_env, monkeypatch):
    monkeypatch.delitem(sys.modules, "train_gpt")
    script = __import__("train_gpt")
    run = script.Run(script.load_settings(tiny_env))
    model = script.GPT(run.hp)
    trainer = script.Trainer(model, model, script.TokenStream("train", run), run)
    loss = trainer.step(0, 0.0).item()
    _, scored = script.score(model, script.Validation(run), run)
    assert loss == pytest.approx(scored["val_loss"], rel=0.1)


def test_a_run_that_will_need_it_says_so_before_it_trains(no_zstandard, tiny_env, monkeypatch):
    monkeypatch.setattr(tg.Trainer, "step", lambda *_: pytest.fail("it trains"))
    with pytest.raises(tg.UserError, match=r"no package zstandard, .* pip install zstandard"):
        run_main(tiny_env | {"WARMUP_STEPS": "1"})


def test_an_artifact_is_not_called_damaged_for_want_of_it(run, monkeypatch):
    artifact = run() / "final_model.artifact"
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(tg.UserError, match=r"^no package zstandard"):
        run("again", EVAL_ONLY=1, ARTIFACT=artifact)
