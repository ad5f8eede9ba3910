"""records/script.py: how a record's script is run, what it finds, and what it cannot do."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO
from field import Field

sys.path.insert(0, str(REPO / "records"))

import script


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Field:
    return Field(tmp_path_factory.mktemp("field"))


SPY = """
import os, json, pathlib, socket
here = sorted(str(p) for p in pathlib.Path(".").rglob("*") if p.is_file())
shards = sorted(pathlib.Path("data").glob("fineweb_val_*.bin"))
try:
    socket.create_connection(("127.0.0.1", {port}), 2)
    network = True
except OSError:
    network = False
seen = [p for p in {paths} if pathlib.Path(p).exists()]
spied = {{"here": here, "env": dict(os.environ), "network": network, "seen": seen}}
raise SystemExit(json.dumps(spied))
"""


class Server:
    """Something that answers on the loopback device of this system."""

    def __enter__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        return self.socket.getsockname()[1]

    def __exit__(self, *_):
        self.socket.close()


def spy(field: Field, folder: Path, monkeypatch, config: str = "") -> dict:
    """What a script finds around it."""
    folder.mkdir(parents=True)
    (folder / "helper.py").write_text("")
    if config:
        (folder / "config.env").write_text(config)
    paths = [str(folder / "helper.py"), str(field.data / "fineweb_val_000000.bin")]
    monkeypatch.setenv("SECRET", "1")
    told = []
    monkeypatch.setattr(script, "_tail", lambda path: told.append(path.read_text()) or b"")
    with Server() as port:
        (folder / "train_gpt.py").write_text(SPY.format(port=port, paths=paths))
        program = script.Script(folder, field.artifact, field.tokenizer, field.data)
        result = program.score([field.val[:9], field.val[:5]], True, 30)
    assert result.problem.startswith("exit status 1")
    return json.loads(told[0].strip().splitlines()[-1]) | {"apart": program.apart}


def test_a_script_finds_nothing_but_what_the_protocol_names(field, tmp_path, monkeypatch):
    spied = spy(field, tmp_path / "record", monkeypatch, "NUM_LAYERS=2")
    tokenizer = f"data/{field.tokenizer.name}"
    shards = ["data/fineweb_val_000000.bin", "data/fineweb_val_000001.bin"]
    given = ["config.env", "final_model.artifact", "train_gpt.py", tokenizer, *shards]
    assert spied["here"] == sorted([*given, "console"])
    assert spied["env"]["CONFIG"] == "config.env"
    assert spied["env"]["TOKENIZER_PATH"] == tokenizer


def test_a_script_does_not_see_the_auditors_environment(field, tmp_path, monkeypatch):
    env = spy(field, tmp_path / "record", monkeypatch)["env"]
    assert "SECRET" not in env
    assert "CONFIG" not in env
    assert not Path(env["HOME"]).exists()  # it was a place for this run alone


def test_network_and_neighbours_are_gone_where_the_evidence_says_so(field, tmp_path, monkeypatch):
    spied = spy(field, tmp_path / "record", monkeypatch)
    assert spied["network"] == ("no network" not in spied["apart"])
    assert bool(spied["seen"]) == ("hidden" not in spied["apart"])


def possible(command: str) -> bool:
    """Whether this system lets a command run in namespaces of its own."""
    tries = [["unshare", *flags, "-n", "-m", "sh", "-c", command] for flags in ([], ["-r"])]
    return any(subprocess.run(words, capture_output=True).returncode == 0 for words in tries)


@pytest.mark.skipif(not shutil.which("unshare"), reason="this system has no unshare")
def test_folders_are_hidden_wherever_that_is_possible(tmp_path):
    evidence = script.separation([tmp_path])[1]
    assert ("1 folder(s) beside it hidden" in evidence) == possible(f"mount -t tmpfs x {tmp_path}")


def test_where_nothing_can_be_taken_away_the_evidence_says_so(field, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no unshare here
    assert script.separation([field.data]) == ([], "the network could not be taken away")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("import time; time.sleep(60)", "not finished after 1 s"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("raise SystemExit('no such setting')", "exit status 1; the last line: no such setting"),
        ("print('val_loss:1 val_bpb:1')", "printed no line final_"),
        ("print('final_x_exact val_loss:? val_bpb:1')", "no number"),
        ("print('final_x_exact val_loss:1 val_bpb:1')", "SAVE_NLL left no readable nll/nll.npy"),
        (
            "print('final_x_exact val_loss:1 val_bpb:1'); open('nll/nll.npy', 'wb').write(b'N')",
            "SAVE_NLL left no readable nll/nll.npy",
        ),
    ],
)
def test_what_goes_wrong_in_a_script_is_told_in_a_line(field, tmp_path, body, why):
    (tmp_path / "train_gpt.py").write_text(body)
    program = script.Script(tmp_path, field.artifact, field.tokenizer, field.data)
    problem = program.score([field.val], False, 1 if "sleep" in body else 30).problem
    assert why in problem
    assert "\n" not in problem


def test_no_process_of_a_script_outlives_its_run(field, tmp_path):
    child = "import subprocess, sys; subprocess.Popen(['sleep', '61.5'])"
    (tmp_path / "train_gpt.py").write_text(child)
    program = script.Script(tmp_path, field.artifact, field.tokenizer, field.data)
    program.score([field.val], False, 30)
    commands = [
        path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)
    ]
    assert b"sleep\x0061.5\x00" not in commands


def readable(path: Path) -> bool:
    """Whether a process is still there to be read of."""
    try:
        return bool(path.read_bytes())
    except OSError:
        return False
