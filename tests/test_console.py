"""Consoles that are closed, full or of another encoding, and names of any bytes: a run's files are
what counts, and they are right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCRIPT, events, run_main

import keeper
import train_gpt


def shell(line: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    """Run a line of bash, in which $run is the script; its exit code is the script's."""
    basic = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", "-c", f"run='{sys.executable} {SCRIPT}'; {line}; exit ${{PIPESTATUS[0]}}"]
    return subprocess.run(command, env=basic | env, capture_output=True, timeout=120)


def assert_finished(folder: Path) -> None:
    """The run has done all, and its log has the lines that the console has not."""
    assert (folder / "final_model.artifact").exists()
    assert len(events(folder, "final")) == 1
    log = folder.with_name(folder.name + ".txt").read_text(encoding="utf-8")
    lines = log[log.rindex("=" * 100) :].splitlines()
    assert lines[-1].startswith("Total submission size")
    assert [line for line in lines if line.startswith("step:4/4 val_loss")]


CONSOLES = {
    "a pipe that is closed after a line": "$run | head -1",
    "a full disk for errors too": "$run > /dev/full 2>&1",
    "closed": "$run >&- 2>&-",
    "all closed": "$run <&- >&- 2>&-",
}


@pytest.mark.parametrize("console", CONSOLES)
def test_a_console_that_cannot_be_written_ends_nothing(console, tiny_env, tmp_path):
    done = shell(CONSOLES[console], tiny_env)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr
    assert_finished(tmp_path / "logs" / "tiny")


def test_lines_are_printed_again_once_the_console_can_be_written(monkeypatch, capfd):
    """What could not be printed is gone; what comes after it is not."""
    console, full = os.dup(1), os.open("/dev/full", os.O_WRONLY)
    with open(1, "w", closefd=False) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        os.dup2(full, 1)
        keeper.Keeper.say("lost")
        os.dup2(console, 1)
        keeper.Keeper.say("printed")
    assert capfd.readouterr().out == "printed\n"


def test_settings_that_cannot_be_written_are_an_error(tiny_env):
    """A file of settings that is cut off would be another run's."""
    done = shell("$run --settings > /dev/full", tiny_env)
    assert done.returncode == 1
    assert done.stderr.startswith(b"train_gpt.py: error: ")


def test_help_into_a_closed_pipe_is_silent(tiny_env):
    assert shell("$run --help | true", tiny_env).stderr == b""


# ---- names and encodings

STRANGE = {
    "latin-1": b"caf\xe9",
    "not UTF-8": b"\xff\xfe",
    "UTF-8": "naïve ☃".encode(),
    "$": b"a$b$",
}


@pytest.mark.parametrize(
    ("name", "encoding"),
    [("latin-1", "ascii"), ("not UTF-8", "utf-8"), ("UTF-8", "ascii"), ("$", "latin-1")],
)
def test_a_name_of_any_bytes_on_any_console(name, encoding, tiny_env, tmp_path):
    run_id, out = os.fsdecode(STRANGE[name]), tmp_path / os.fsdecode(b"out" + STRANGE[name])
    strange = {"RUN_ID": run_id, "OUT_DIR": str(out), "SAVE_EVERY": "2", "RESUME": "auto"}
    done = shell("$run", tiny_env | strange | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert (out / run_id / "final_model.artifact").exists()
    log = Path(out, run_id + ".txt").read_bytes()
    assert STRANGE[name] in log[log.rindex(b"=" * 100) :]
    (start,) = events(out / run_id, "start")
    assert os.fsencode(start["settings"]["run_id"]) == STRANGE[name]


@pytest.mark.parametrize("name", ["latin-1", "UTF-8"])
def test_printed_settings_have_the_bytes_of_names(name, tiny_env, tmp_path):
    config, environ = tmp_path / "my.env", tiny_env | {"RUN_ID": os.fsdecode(STRANGE[name])}
    shell(f"$run --settings > {config}", environ | {"PYTHONIOENCODING": "ascii"})
    assert STRANGE[name] in config.read_bytes()
    assert train_gpt.load_settings({"CONFIG": str(config)}).run_id == environ["RUN_ID"]


@pytest.mark.parametrize("name", ["a\nb", "a/b", "..", "a\x7f"])
def test_a_name_that_no_file_or_line_can_have_is_refused(name, tiny_env, tmp_path):
    with pytest.raises(train_gpt.UserError, match="RUN_ID"):
        run_main(tiny_env | {"RUN_ID": name})
    assert not (tmp_path / "logs").exists()
