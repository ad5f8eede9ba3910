"""records/script.py: how a record's script is run, what it finds, and what is made of what it left.

Whatever holds with isolation holds without it; each test is made both ways where that is possible.
"""

import json
import os
import shutil
import struct
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from field import Field

sys.path.insert(0, str(REPO / "records"))

import audit
import dynamic_rules
import isolation
import script

ATTACKS = REPO / "tests" / "attacks"
SAID = "print('final_x_exact val_loss:1.5000000 val_bpb:2.25000000')\n"
SAVE = "import numpy, os\nnumpy.save('nll/nll.npy', numpy.ones(8, 'f'))\n"


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Field:
    return Field(tmp_path_factory.mktemp("field"))


@pytest.fixture(scope="module", params=["apart", "with all rights"])
def isolated(request) -> bool:
    if request.param == "apart":
        try:
            script.check_isolation()
        except script.IsolationError as error:
            pytest.skip(str(error))
    return request.param == "apart"


def program(field: Field, folder: Path, text: str, isolated: bool) -> script.Script:
    """A script of this text."""
    folder.mkdir(exist_ok=True)
    (folder / "train_gpt.py").write_text(text)
    return script.Script(folder, field.artifact, field.tokenizer, field.data, isolated)


def run(
    field: Field, folder: Path, text: str, isolated: bool, seconds: float = 60
) -> script.Result:
    """What comes of a script of this text on nine tokens."""
    return program(field, folder, text, isolated).score([field.val[:9]], False, seconds)


# ---- what it finds


def look(field: Field, folder: Path, isolated: bool, data: Path | None = None, **options) -> dict:
    """What a script finds around it."""
    text = "import os\nos.environ.setdefault('SEEK', '[]')\n" + (ATTACKS / "look.py").read_text()
    text = text.replace("print(\n", "raise SystemExit(\n")
    started = program(field, folder, text, isolated)
    started.data = data or field.data
    told = []
    started_read = script.readable
    script.readable = lambda console: told.append(console) or ["x"]
    try:
        result = started.score([field.val[:9], field.val[:5]], True, 60, **options)
    finally:
        script.readable = started_read
    assert result.problem.startswith("exit status 1")
    print(told[0].decode())
    return json.loads(told[0])


def test_a_script_finds_the_files_of_the_protocol_and_no_others(field, tmp_path, isolated):
    (tmp_path / "config.env").write_text("NUM_LAYERS=2")
    (tmp_path / "README.md").write_text("a secret")
    seen = look(field, tmp_path, isolated, sizes=[field.val[:9], field.val[:5]])
    data = f"data/datasets/{field.data.name}"
    shards = [f"{data}/fineweb_val_{kind}00000{n}.bin" for kind in ("", "bytes_") for n in (0, 1)]
    tokenizer = f"data/tokenizers/{field.tokenizer.name}"
    given = ["config.env", "final_model.artifact", "train_gpt.py", tokenizer, *shards]
    assert seen["files"] == sorted(given)
    assert seen["environment"]["CONFIG"] == "config.env"
    assert seen["times"] == [(field.data / "fineweb_val_000000.bin").stat().st_mtime]


def test_its_environment_is_a_persons(field, tmp_path, isolated, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    environment = look(field, tmp_path, isolated)["environment"]
    assert "SECRET" not in environment
    assert "CONFIG" not in environment
    assert uuid.UUID(environment["RUN_ID"]).version == 4
    assert environment["DATA_PATH"] == f"./data/datasets/{field.data.name}"
    assert environment["TOKENIZER_PATH"] == f"./data/tokenizers/{field.tokenizer.name}"
    assert environment["ARTIFACT"] == "final_model.artifact"
    assert environment["VAL_TOKENS"] == "14"
    assert (environment["SCORE_STREAMS"], environment["SAVE_NLL"]) == ("1", "nll")
    assert environment["EVAL_ONLY"] == "1"
    if isolated:
        assert environment["PWD"] == isolation.WORK
        assert environment["HOME"] == isolation.HOME
    else:
        assert not Path(environment["HOME"]).exists()  # it was a place for this run alone


def test_nothing_that_it_finds_speaks_of_an_audit(field, tmp_path, isolated):
    data = tmp_path / "my-audits"
    shutil.copytree(field.data, data)
    seen = look(field, tmp_path / "record", isolated, data)
    seen["environment"].pop("PATH")  # where Python lies is the reviewer's affair
    seen["environment"].pop("VIRTUAL_ENV", None)
    told = [seen[key] for key in ("environment", "files", "folder", "host")]
    assert "audit" not in json.dumps(told)
    assert seen["environment"]["DATA_PATH"] == "./data/datasets/fineweb10B_sp1024"


def test_sidecars_hold_the_given_sizes_in_the_published_format(field, tmp_path, isolated):
    text = "import os, sys\n"
    text += "data = open(os.environ['DATA_PATH'] + '/fineweb_val_bytes_000000.bin', 'rb').read()\n"
    text += "raise SystemExit(data.hex())"
    started = program(field, tmp_path, text, isolated)
    problem = started.score([field.val[:3]], False, 60, [np.array([0, 7, 300])]).problem
    header = struct.pack("<3i", 20240520, 1, 3).hex()
    assert problem.startswith(f"exit status 1; the last line: {header}")
    assert script.shard(np.array([0, 7, 300]))[1024:] == struct.pack("<3H", 0, 7, 300)


def test_helpers_that_it_uses_are_there_and_others_are_not(field, tmp_path, isolated):
    (tmp_path / "kernels").mkdir(parents=True)
    (tmp_path / "kernels" / "__init__.py").write_text("")
    (tmp_path / "kernels" / "fast.py").write_text("import below")
    (tmp_path / "below.py").write_text("")
    (tmp_path / "beside.py").write_text("")
    seen = look(field, tmp_path, isolated)
    assert not [name for name in seen["files"] if name.endswith(".py") and name != "train_gpt.py"]
    (tmp_path / "train_gpt.py").unlink()
    text = "from kernels import fast\n" + SAVE + SAID
    assert run(field, tmp_path, text, isolated).problem == ""
    assert (
        "No module named 'beside'"
        in run(field, tmp_path, f"__import__('be' + 'side')\n{text}", isolated).problem
    )


@pytest.mark.parametrize("name", ["train_gpt.py", "config.env", "x.artifact"])
def test_a_link_out_of_the_record_is_not_followed(field, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text("x")
    record = tmp_path / "record"
    record.mkdir()
    (record / "train_gpt.py").write_text("")
    (record / name).unlink(missing_ok=True)
    (record / name).symlink_to(secret)
    artifact = record / name if name == "x.artifact" else field.artifact
    with pytest.raises(ValueError, match="a link out of its folder"):
        script.Script(record, artifact, field.tokenizer, field.data, False)


def test_many_short_streams_find_room(field, tmp_path, isolated, monkeypatch):
    """Each file takes a page of memory at least."""
    monkeypatch.setattr(isolation, "SCRATCH", 2**20)
    monkeypatch.setattr(isolation, "INODES", 100)
    text = "import glob, os, numpy\n" + SAID
    text += "for path in glob.glob(os.environ['DATA_PATH'] + '/*.bin'):\n"
    text += "    numpy.save('nll/' + os.path.basename(path)[:-4], numpy.ones(2, 'f'))\n"
    started = program(field, tmp_path, text, isolated)
    result = started.score([field.val[:3]] * 2000, True, 60)
    assert result.problem == ""
    assert len(result.nll) == 2000


# ---- what it left


@pytest.mark.parametrize(
    "line",
    [
        "final_int8_zlib_roundtrip_exact val_loss:1.50000000 val_bpb:2.25000000",
        "final_int6_sliding_window_exact val_loss:1.50000000 val_bpb:2.25000000",
        "quantized_ttt val_loss:1.500000 val_bpb:2.250000 eval_time:1ms",
        "legal_ttt_exact val_loss:1.50000000 val_bpb:2.25000000",
    ],
)
def test_public_score_lines_are_understood_and_the_last_counts(field, tmp_path, isolated, line):
    said = "print('final_int8_zlib_roundtrip_exact val_loss:9.0000000 val_bpb:9.00000000')\n"
    result = run(field, tmp_path, f"{SAVE}{said}print({line!r})", isolated)
    assert (result.problem, result.loss, result.bpb) == ("", 1.5, 2.25)
    assert result.nll[0].tolist() == [1.0] * 8


PROBLEMS = {
    "sleep": ("import time; time.sleep(60)", "not finished after 3 s"),
    "killed": ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
    "exit": (
        "raise SystemExit('no such setting')",
        "exit status 1; the last line: no such setting",
    ),
    "no label": ("print('val_loss:1 val_bpb:1')", "printed no line final_"),
    "no number": ("print('final_x_exact val_loss:? val_bpb:1')", "printed no line final_"),
    "nothing": (SAID, "SAVE_NLL left no readable nll/nll.npy: no such file"),
    "no array": (SAID + "open('nll/nll.npy', 'wb').write(b'N')", "SAVE_NLL left no readable nll/"),
    "escapes": (r"raise SystemExit('\x1b[2J\x1b]0;PASS\x07 \u202e \r\n x')", "the last line: x"),
    "fifo": (SAID + "import os; os.mkfifo('nll/nll.npy')", "not a plain file"),
    "folder": (SAID + "import os; os.mkdir('nll/nll.npy')", "not a plain file"),
    "link": (SAID + "import os; os.symlink('/etc/passwd', 'nll/nll.npy')", "not a plain file"),
    "endless": (SAID + "import os; os.symlink('/dev/zero', 'nll/nll.npy')", "not a plain file"),
    "loop": (SAID + "import os; os.symlink('nll.npy', 'nll/nll.npy')", "not a plain file"),
    "a file as folder": (SAID + "import os; os.rmdir('nll'); open('nll', 'w')", "no readable nll/"),
    "socket": (
        SAID + "import socket; socket.socket(socket.AF_UNIX).bind('nll/nll.npy')",
        "not a plain file",
    ),
    "sparse": (
        SAID + "import os; os.truncate(os.open('nll/nll.npy', 65), 2**29)",
        "it is too large",
    ),
    "objects": (
        SAID + "import numpy; numpy.save('nll/nll.npy', numpy.array([{}] * 8, object))",
        "is no kind of plain number",
    ),
    "records": (
        SAID + "import numpy; numpy.save('nll/nll.npy', numpy.zeros(8, 'f,f'))",
        "is no kind of plain number",
    ),
    "shorter than it says": (
        SAVE + SAID + "os.truncate('nll/nll.npy', 150)",
        r"its header promises (8,) numbers, 22 bytes follow",
    ),
    "longer than it says": (
        SAVE + SAID + "open('nll/nll.npy', 'ab').write(bytes(4))",
        r"its header promises (8,) numbers, 36 bytes follow",
    ),
    "huge by its header": (
        SAVE + SAID + "s = open('nll/nll.npy', 'rb').read().replace(b'(8,), }      ', "
        "b'(8**9,), }   ').replace(b'8**9', b'9999')\nopen('nll/nll.npy', 'wb').write(s)",
        "promises (9999,) numbers",
    ),
    "a header that is code": (
        SAVE + SAID + "s = open('nll/nll.npy', 'rb').read().replace(b'(8,)', b'exit')\n"
        "open('nll/nll.npy', 'wb').write(s)",
        "SAVE_NLL left no readable nll/nll.npy",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_goes_wrong_in_a_script_is_told_in_a_line(field, tmp_path, isolated, case):
    body, why = PROBLEMS[case]
    problem = run(field, tmp_path, body, isolated, 3 if case == "sleep" else 60).problem
    assert why in problem
    assert problem.isprintable()
    assert len(problem) < 400


def test_thousands_of_files_are_left_alone(field, tmp_path, isolated):
    text = SAVE + SAID + "for n in range(4000): open(f'nll/{n}.npy', 'w')"
    assert run(field, tmp_path, text, isolated).problem == ""


def test_numbers_of_any_size_are_read(field, tmp_path, isolated):
    for kind in ("f2", "f4", "f8", ">f4"):
        text = SAVE.replace("'f'", repr(kind)) + SAID
        assert run(field, tmp_path, text, isolated).nll[0].tolist() == [1.0] * 8


def test_a_script_cannot_end_or_replace_what_hands_over_its_results(field, tmp_path, isolated):
    """Without isolation it can: then there are no results."""
    text = SAVE + SAID + "import time; os.kill(os.getppid(), 9)"
    problem = run(field, tmp_path, text, isolated).problem
    assert problem == "" or problem.startswith("it ended without results")


def test_a_forged_verdict_does_not_reach_the_auditors_output(field, tmp_path, isolated, capsys):
    forged = json.dumps({"folder": "x", "counts": {"FAIL": 0}, "verdicts": []})
    lines = [forged, "\x1b[2J\x1b[H", "normalization  PASS  forged", "11 rules: 11 PASS"]
    text = (
        f"import sys\nfor line in {lines!r}:\n    print(line)\n    print(line, file=sys.stderr)\n"
    )
    text += "raise SystemExit(3)\n"
    program(field, tmp_path, text, isolated)
    places = ["--artifact", field.artifact, "--data", field.data, "--tokenizer", field.tokenizer]
    words = [tmp_path, *places, "--json", *([] if isolated else ["--no-isolation"])]
    assert audit.main(list(map(str, words))) == 1
    out, err = capsys.readouterr()
    told = json.loads(out)  # one document, the auditor's
    states = {verdict["rule"]: verdict for verdict in told["verdicts"]}
    assert states["runs"]["state"] == "FAIL"
    told = states["runs"]["evidence"]
    assert told.endswith("exit status 3; the last line: 11 rules: 11 PASS")
    assert "\x1b" not in out + err
    assert "counts" not in err


def test_the_evidence_of_an_audit_without_isolation_says_so(field, tmp_path):
    program(field, tmp_path, "raise SystemExit(3)", False)
    places = (tmp_path, field.artifact, field.data, field.tokenizer)
    assert "NOT ISOLATED" in script.Script(*places[:2], field.tokenizer, field.data, False).apart
    first = dynamic_rules.check(*places, seed=1, isolated=False)[0]
    assert (first.rule, first.state) == ("isolation", "WARN")
    assert "NOT ISOLATED" in first.evidence


def test_folders_of_runs_without_isolation_are_removed(field, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    kept = tmp_path / "kept"
    kept.write_text("x")
    text = f"import os; os.symlink({str(tmp_path)!r}, 'nll/out'); os.symlink({str(kept)!r}, 'x')"
    run(field, tmp_path / "record", text, False)
    assert os.listdir(tmp_path / "tmp") == []
    assert kept.read_text() == "x"
