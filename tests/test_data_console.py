"""What prepare.py and download.py print: names of any bytes, consoles of any kind, commands that
can be pasted into a shell."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import compose_documents
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_build import Made, inline, jsonl, prepare_main  # noqa: F401
from test_download import Case, case, published  # noqa: F401

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "prepare.py"
sys.path.insert(0, str(SCRIPT.parent))

import console  # noqa: E402

TRAINER = SCRIPT.parent.parent / "train_gpt.py"
BASH = shutil.which("bash")
# File names whose bytes are no UTF-8, and what a shell would read as something else.
NAMES = [b"plain", b"a b", b"$HOME", b"it's", b'"x"', b"caf\xe9", "données".encode(), b"a\nb", b"~"]
CONSOLES = {
    "utf-8": {},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "strict latin-1": {"PYTHONIOENCODING": "latin-1:strict"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def words(command: bytes) -> list[bytes]:
    """The words that bash makes of a command, assignments as they are."""
    script = b"printf '%s\\0' " + command
    done = subprocess.run([BASH, "-c", script], capture_output=True, check=True, cwd="/")
    return done.stdout.split(b"\0")[:-1]


def settings_of(line: bytes) -> dict[bytes, bytes]:
    """The variables that a line sets for train_gpt.py when it is pasted into a shell, and the
    words after them, as b""."""
    script = b"python() { printf '%s\\0' \"$@\"; env -0; }\n" + line
    done = subprocess.run([BASH, "-c", script], capture_output=True, check=True)
    script_name, *entries = done.stdout.split(b"\0")[:-1]
    found = dict(entry.split(b"=", 1) for entry in entries)
    names = (b"DATA_PATH", b"TOKENIZER_PATH", b"VOCAB_SIZE")
    return {name: found[name] for name in names} | {b"": script_name}


def run(*arguments: object, shell: str = "", **env: str) -> subprocess.CompletedProcess:
    """prepare.py as a program; `shell` is what follows it on a command line of bash."""
    command = [sys.executable, str(SCRIPT), *arguments]
    if shell:
        command = [BASH, "-c", f'"$0" "$@" {shell}; exit ${{PIPESTATUS[0]}}', *command]
    basic = {"PATH": os.environ["PATH"], "HOME": "/", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, env=basic | env, timeout=120, check=False)


@pytest.fixture
def source(tmp_path) -> Path:
    return jsonl(tmp_path / "in.jsonl", compose_documents(30))


# ---- commands


@pytest.mark.skipif(not BASH, reason="needs bash")
@settings(max_examples=40)
@example(raw=b"\xe9\\'$(x)\x7f")
@given(raw=st.binary(min_size=1, max_size=12).filter(lambda raw: b"\0" not in raw))
def test_a_quoted_name_is_that_name_in_a_shell(raw):
    typed = console.quoted(os.fsdecode(raw))
    assert words(typed.encode("utf-8")) == [raw]


@pytest.mark.skipif(not BASH, reason="needs bash")
@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("name", NAMES)
def test_the_line_to_train_with_is_right_in_a_shell(
    tmp_path, source, monkeypatch, capfdbinary, name
):
    monkeypatch.chdir(tmp_path)
    text = os.fsdecode(name)
    assert prepare_main(source, "--byte-level", "--name", text, "--out", text) == 0
    found = settings_of(capfdbinary.readouterr().out.splitlines()[-1])
    assert found == {
        b"DATA_PATH": name + b"/datasets/" + name + b"_byte260",
        b"TOKENIZER_PATH": name + b"/tokenizers/byte_260.model",
        b"VOCAB_SIZE": b"260",
        b"": bytes(TRAINER),
    }


@pytest.mark.usefixtures("inline")
def test_a_dataset_that_is_up_to_date_comes_with_the_line_too(tmp_path, source, capsys):
    lines = []
    for _ in range(2):
        assert prepare_main(source, "--byte-level", "--name", "t", "--out", tmp_path / "o p") == 0
        lines.append(capsys.readouterr().out.splitlines()[-1])
    assert lines[0] == lines[1]
    assert "DATA_PATH='" in lines[0]


@pytest.mark.skipif(not BASH, reason="needs bash")
@pytest.mark.parametrize("name", [b"a b $x", b"caf\xe9 'q'"])
def test_the_line_of_a_download_is_right_in_a_shell(case, name):  # noqa: F811
    place = os.path.join(os.fsencode(case.root), name)
    command = [sys.executable, str(SCRIPT.with_name("download.py")), "--out", place]
    done = subprocess.run(command, env=case.env, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = settings_of(done.stdout.splitlines()[-1])
    assert os.path.abspath(found[b"DATA_PATH"]) == place + b"/datasets/fineweb10B_sp1024"
    tokenizer = os.path.abspath(found[b"TOKENIZER_PATH"])
    assert tokenizer == place + b"/tokenizers/fineweb_1024_bpe.model"
    assert found[b"VOCAB_SIZE"] == b"512"  # read from a file of such a name


# ---- names and locales


@pytest.mark.skipif(not BASH, reason="needs bash")
@pytest.mark.parametrize("made_in", CONSOLES)
def test_names_of_any_bytes_are_written_and_read_in_any_locale(tmp_path, dataset, made_in):
    folder = os.path.join(bytes(tmp_path), b"caf\xe9 \xc3\xa9")
    os.mkdir(folder)
    names = [b"one \xff.jsonl", "zwei é.jsonl".encode()]
    for number, name in enumerate(names):
        text = "".join(json.dumps({"text": t}) + "\n" for t in compose_documents(20, number))
        with open(os.path.join(folder, name), "w") as file:
            file.write(text)
    out = os.path.join(folder, b"out")
    options = ("--vocab-size", "400", "--name", "né".encode() + b"\xe9", "--out", out)
    inputs = [os.path.join(folder, name) for name in names]
    done = run(*inputs, *options, "--processes", "1", **CONSOLES[made_in])
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    made = Made(Path(os.fsdecode(out), "datasets", os.fsdecode("né".encode() + b"\xe9_sp400")))
    found = settings_of(done.stdout.splitlines()[-1])
    assert os.path.abspath(found[b"DATA_PATH"]) == bytes(made.folder)
    assert [entry["name"] for entry in made.manifest["inputs"]] == [
        name.decode("utf-8", "surrogateescape") for name in names
    ]
    for name, env in CONSOLES.items():
        again = run(*inputs, *options, **env)
        assert b"is up to date" in again.stdout, name
        assert run("--check", bytes(made.folder), **env).returncode == 0, name


@pytest.mark.parametrize("env", CONSOLES)
def test_a_text_that_is_typed_is_the_same_in_any_locale(tmp_path, env):
    source = jsonl(tmp_path / "in.jsonl", ["x"])
    records = [{"überschrift": text} for text in compose_documents(20)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ("--byte-level", "--text-field", "überschrift", "--name", "t", "--out", tmp_path)
    done = run(source, *options, **CONSOLES[env])
    assert done.returncode == 0, done.stderr
    made = Made(tmp_path / "datasets/t_byte260")
    assert made.manifest["options"]["records"]["text_field"] == "überschrift"
    assert len(made.documents("train")) == 19


def test_a_typed_text_that_is_no_utf8_is_one_error(tmp_path, source):
    done = run(source, "--byte-level", "--text-field", b"caf\xe9", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert b"is not UTF-8" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("env", CONSOLES)
def test_problems_are_reported_on_any_console(tmp_path, env):
    path = os.path.join(bytes(tmp_path), b"caf\xe9 \xe2\x98\x83.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"täxt": "☃"}\n' * 3)
    done = run(path, "--byte-level", "--out", tmp_path / "out", **CONSOLES[env])
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"field missing") == 3


def test_a_token_that_no_header_can_hold_is_one_error(case):  # noqa: F811
    assert case.fails(HF_TOKEN="hf_é") == "HF_TOKEN, or the login, has '\\xe9': no token has that\n"


# ---- consoles that cannot be written


UNWRITABLE = ["2>&1 | true", "2>&1 | head -1", ">&- 2>&-", ">&-"]
UNWRITABLE += [">/dev/full", ">/dev/full 2>&1"] if Path("/dev/full").exists() else []


@pytest.mark.skipif(not BASH, reason="needs bash")
@pytest.mark.parametrize("shell", [*UNWRITABLE, ">&- 2>&- <&-"])
@pytest.mark.parametrize("env", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_a_console_that_cannot_be_written_costs_no_dataset(tmp_path, source, shell, env):
    options = ("--vocab-size", "400", "--byte-sidecar", "--name", "t", "--processes", "2")
    for out, ending in ((tmp_path / "silent", shell), (tmp_path / "loud", "")):
        done = run(source, *options, "--out", out, shell=ending, **env)
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    folders = [tmp_path / name / "datasets/t_sp400" for name in ("silent", "loud")]
    silent, loud = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert silent == loud
    assert run("--check", folders[0], shell=shell, **env).returncode == 0


@pytest.mark.skipif(not BASH, reason="needs bash")
@pytest.mark.parametrize("shell", UNWRITABLE)
def test_a_console_that_cannot_be_written_costs_no_download(case, shell):  # noqa: F811
    command = [BASH, "-c", f'"$0" "$@" {shell}; exit ${{PIPESTATUS[0]}}', sys.executable]
    command += [str(SCRIPT.with_name("download.py")), "--out", str(case.out)]
    done = subprocess.run(command, env=case.env, capture_output=True, timeout=60, check=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    assert case.here() == case.expected()


@pytest.mark.skipif(not BASH, reason="needs bash")
def test_an_error_is_an_error_on_a_console_that_cannot_be_written(tmp_path):
    done = run("missing.txt", "--byte-level", "--out", tmp_path, shell=">&- 2>&-")
    assert done.returncode == 1
