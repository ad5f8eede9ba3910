"""keeper.py is optional: with it and without it, a run ends on the same bits."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, SCRIPT, events, load_weights, run_cli, run_main, tiny_settings

import keeper
import train_gpt

TRAINED = {"ITERATIONS": 5, "WARMUP_STEPS": 2, "VAL_LOSS_EVERY": 2, "TRAIN_LOG_EVERY": 1}
TRAINED |= {"GRAD_CLIP_NORM": 0.3, "EMA_DECAY": 0.8}
ENDS = ("final_model.pt", "final_model.artifact", "nll.npy")


@pytest.fixture(scope="module")
def folders(dataset, tmp_path_factory):
    """The folders of the same run, with the keeper and by the script alone."""
    made = {}
    for name in ("with", "alone"):
        out = tmp_path_factory.mktemp(name)
        more = TRAINED | {"SAVE_NLL": out / "nll.npy"}
        more |= {"SAVE_EVERY": 2} if name == "with" else {}
        script = out / "script" if name == "alone" else None
        settings = tiny_settings(dataset, out, **more)
        done = run_cli(settings, copy_to=script, beside=["frontier.py"])
        assert done.rc == 0, done.stderr
        made[name] = out
    return made


def losses(out):
    """What was logged of each step, without times."""
    kept = ("event", "step", "train_loss", "val_loss", "val_bpb", "artifact_bytes")
    return [{k: e[k] for k in kept if k in e} for e in events(out / "tiny") if "val" in str(e)]


@pytest.mark.parametrize("name", ENDS)
def test_with_and_without_it_the_files_are_the_same(folders, name):
    places = [next(out.rglob(name)) for out in folders.values()]
    if name == "final_model.pt":  # a zip file, which has times
        first, second = (load_weights(path.parent) for path in places)
        assert all(torch.equal(first[key], second[key]) for key in first)
    else:
        assert places[0].read_bytes() == places[1].read_bytes()


def test_with_and_without_it_the_losses_are_the_same(folders):
    assert losses(folders["with"]) == losses(folders["alone"]) != []


def test_two_ranks_meet_without_it(tiny_env, tmp_path):
    env = tiny_env | {"ITERATIONS": "2", "WARMUP_STEPS": "1"}
    done = run_cli(env, copy_to=tmp_path / "alone", nproc=2)
    assert done.rc == 0, done.stderr
    assert "world_size:2" in done.stdout
    assert "final_int8_zstd_roundtrip_exact" in done.stdout


def test_the_log_has_the_source_of_all_that_ran(folders):
    bar = f"\n{'=' * 100}\n"
    names = ("train_gpt.py", "frontier.py", "keeper.py")
    script, techniques, source = (SCRIPT.with_name(n).read_text(encoding="utf-8") for n in names)
    both = (folders["with"] / "tiny.txt").read_text(encoding="utf-8")
    alone = (folders["alone"] / "tiny.txt").read_text(encoding="utf-8")
    assert both.startswith(f"{script}{bar}{techniques}{bar}{source}{bar}DATA_PATH=")
    assert alone.startswith(f"{script}{bar}{techniques}{bar}DATA_PATH=")


@pytest.mark.parametrize("given", [{"SAVE_EVERY": "2"}, {"RESUME": "auto", "RUN_ID": "x"}])
def test_a_setting_that_needs_it_is_one_clear_error(tiny_env, tmp_path, given):
    done = run_cli(tiny_env | given, copy_to=tmp_path / "alone")
    what = "SAVE_EVERY, RESUME, WATCH, REPORT_TO: need keeper.py beside the script"
    problem = f"train_gpt.py: error: 1 problem(s) in the settings:\n  {what}\n"
    assert (done.rc, done.stderr) == (1, problem)
    assert not (tmp_path / "logs").exists()


def test_help_tells_where_the_table_is(tmp_path):
    alone = run_cli({}, "--help", copy_to=tmp_path / "alone").stdout
    assert "all, by keeper.py" in alone
    assert "| NUM_LAYERS " in run_cli({}, "--help").stdout


# ---- checkpoints of other scripts


def origin(**changed):
    """Ask whether a run may go on from a checkpoint, with these settings changed; None: absent."""
    lines, hp = [], train_gpt.Hyperparameters()
    then = {**train_gpt.setting_texts(hp), "DATA": "tokens", **changed}
    state = {"step": 3, "settings": {name: text for name, text in then.items() if text is not None}}
    run = SimpleNamespace(hp=hp, log=lambda line, *_, **__: lines.append(line))
    grave = keeper.check_origin(state, Path("c.pt"), "tokens", run)
    return grave, lines


def test_a_checkpoint_without_a_setting_was_made_at_its_default():
    assert origin(XSA_LAST_N=None, MUON_WD=None) == ("", ["resume:c.pt step:3"])


def test_a_checkpoint_with_an_unknown_setting_is_refused_by_its_name():
    with pytest.raises(train_gpt.UserError, match="unknown settings HEAD_GATE: a newer script"):
        origin(HEAD_GATE="1")


def test_a_checkpoint_from_before_the_one_distributed_path_is_gone_on_from():
    assert origin(ZERO_LEVEL="1") == ("", ["resume:c.pt step:3"])


# ---- another system

ELSEWHERE = """
import os, signal, sys
import torch  # it runs there, by other means
sys.modules["fcntl"] = None
for module, names in ((signal, ("SIGUSR1", "SIGHUP")), (os, ("uname", "posix_fallocate"))):
    for name in names:
        delattr(module, name)
import train_gpt
assert train_gpt.find_keeper() is None
train_gpt.main([])
"""


def test_the_script_runs_where_there_is_no_posix(tiny_env, tmp_path):
    """As on Windows; the keeper beside it is then not used."""
    env = tiny_env | {"PYTHONPATH": str(REPO), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "final_int8_zstd_roundtrip_exact" in done.stdout


def test_the_keeper_of_a_program_is_not_of_another_copy_of_the_script(tiny_env):
    """Else its errors would not be those that the script catches."""
    assert "train_gpt.py: error: 1 problem" in run_cli(tiny_env | {"RANK": "none"}).stderr


# ---- the contract of optimizers


@pytest.fixture
def nadam(monkeypatch):
    """NAdam in Adam's place: it makes its state in its first step, and has a state of its own."""
    build = train_gpt.build_optimizers

    def built(*arguments):
        optimizers = []
        for optimizer in build(*arguments):
            if isinstance(optimizer, torch.optim.AdamW):
                groups = [
                    {key: group[key] for key in ("params", "lr", "base_lr", "weight_decay")}
                    for group in optimizer.param_groups
                ]
                optimizer = torch.optim.NAdam(groups)
            optimizers.append(optimizer)
        return optimizers

    monkeypatch.setattr(train_gpt, "build_optimizers", built)


@pytest.mark.parametrize("primed", [0, 2])
def test_state_that_is_made_late_survives_a_resume(nadam, tiny_env, tmp_path, primed):
    env = tiny_env | {"ITERATIONS": "6", "SAVE_EVERY": "3", "WARMUP_STEPS": str(primed)}
    run_main(env | {"RUN_ID": "whole"})
    logs = tmp_path / "logs"
    middle = logs / "whole/checkpoint_0000003.pt"
    kept = keeper.read_checkpoint(middle)["params"]["tok_emb.weight"]
    assert "mu_product" in kept
    run_main(env | {"RUN_ID": "resumed", "RESUME": str(middle)})
    first, second = (load_weights(logs / name) for name in ("whole", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.dumps(losses_from(logs / "whole", 3)) == json.dumps(
        losses_from(logs / "resumed", 3)
    )


def losses_from(folder, step):
    """The final score, and the training losses after a step."""
    return [
        e.get("train_loss") or e.get("val_loss") for e in events(folder) if e.get("step", 9) > step
    ]


def test_this_file_has_no_other_keeper():
    assert importlib.util.find_spec("keeper").origin == str(REPO / "keeper.py")
