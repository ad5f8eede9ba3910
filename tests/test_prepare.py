"""data/prepare.py, the command: interruption, safety, options, memory; and its sample's text."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import compose_documents, train_tokenizer
from test_build import Made, contents, inline, jsonl, prepare_main  # noqa: F401
from test_vocabulary import trained

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import build
import docstrings
import prepare
from shards import DataError

DATA = Path(__file__).resolve().parent.parent / "data"
SCRIPT = DATA / "prepare.py"
# prepare.py with chunks so small that a short text gives many; "more" is a line of Python.
SMALL_CHUNKS = """
import signal, sys
sys.path.insert(0, {data!r})
import build, prepare
build.CHUNK_CHARS = {chars}
{more}
if __name__ == "__main__":
    # Shells let what they start in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(prepare.main())
"""

MODULE = '''#!/usr/bin/env python
"""Module line.

    An indented example.
A flush line.
"""
raise SystemExit("imported")
not_a_docstring = """a plain string"""

@decorator
class Outer(Base):
    """Outer."""

    def method(self):
        "Method, in single quotes."
        """not the docstring"""

        async def inner():
            """
            Inner,
            two lines.
            """

try:
    def in_try():
        """In try."""
except OSError:
    class InExcept:
        """In except."""
else:
    def undocumented():
        return """not a docstring either"""
    if True:
        pass
    elif False:
        def in_elif():
            """In elif."""
finally:
    with x:
        def last():
            """   """
'''
MODULE_TEXT = """Module line.

    An indented example.
A flush line.

Outer.

Method, in single quotes.

Inner,
two lines.

In try.

In except.

In elif."""


# Each process takes half a second to load its tokenizer.
SLOW = """
import time, vocabulary, build, checks
load = vocabulary.load_vocabulary
def slow(path):
    time.sleep(0.5)
    return load(path)
build.load_vocabulary = checks.load_vocabulary = slow
"""


SILENT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def driver(folder: Path, chars: int = 20_000, more: str = "") -> Path:
    """prepare.py as a script of which the tests set the size of chunks."""
    path = folder / "driver.py"
    path.write_text(SMALL_CHUNKS.format(data=str(DATA), chars=chars, more=more))
    return path


def start(script: Path, *arguments: object, **options) -> subprocess.Popen:
    """The script as the leader of a process group of its own."""
    command = [sys.executable, str(script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes)


def run(script: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def living(group: int) -> list[str]:
    """The processes of a group that have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(entry.parent.name)
    return found


def await_(condition, seconds: float = 60) -> bool:
    """Whether a condition comes true; for what takes as long as the machine is slow."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*")}


# ---- the text of the sample


def test_module_text_is_its_docstrings_in_source_order(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(MODULE)
    assert docstrings.module_text(path) == MODULE_TEXT


def test_module_text_drops_nul_and_lone_surrogates(tmp_path):
    path = tmp_path / "m.py"
    path.write_text('"""a\\0b \\ud800c \\U0001f600"""')
    assert docstrings.module_text(path) == "ab c \U0001f600"


@pytest.mark.parametrize("source", [b'"""text"""\ndef', b'"""nul \0"""', b'"""\xff"""'])
def test_module_that_does_not_parse_has_no_text(tmp_path, source):
    path = tmp_path / "m.py"
    path.write_bytes(source)
    assert docstrings.module_text(path) is None


def test_tree_files_leave_out_third_party_packages(tmp_path):
    for name in ("a.py", "deep/b.py", "deep/c.txt", "site-packages/d.py", "x/dist-packages/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(docstrings.tree_files(tmp_path)) == [
        tmp_path / "a.py",
        tmp_path / "deep" / "b.py",
    ]


def install(root: Path, name: str, version: str, requires: list[str], files: list[str]) -> None:
    info = root / f"{name}-{version}.dist-info"
    info.mkdir()
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
    )
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files:
        (root / file).touch()


def test_closure_follows_dependencies_but_not_extras(tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    install(site, "zq_alpha", "1.5", ["ZQ.Beta[fast]>=2 ; python_version > '3'"], [])
    install(site, "zq_beta", "2.0", ["zq-alpha", "zq-gone", 'zq-extra ; extra == "test"'], [])
    install(site, "zq_extra", "3.0", [], [])
    monkeypatch.syspath_prepend(str(site))
    packages = ["ZQ-Alpha==1.5", "zq-absent"]
    assert docstrings.installed_closure(packages) == {"zq-alpha": "1.5", "zq-beta": "2.0"}


def test_package_files_are_the_python_files_of_the_record(tmp_path, monkeypatch):
    install(tmp_path, "zq_gamma", "1", [], ["zq_gamma.py", "zq_gamma.so"])
    monkeypatch.syspath_prepend(str(tmp_path))
    assert docstrings.package_files("zq-gamma") == [tmp_path / "zq_gamma.py"]


def write_tree(root: Path, texts: list[str]) -> Path:
    for i, text in enumerate(texts):
        path = root / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{text}"""\n', encoding="utf-8")
    return root


def test_modules_read_the_same_with_any_number_of_processes(tmp_path):
    texts = compose_documents(40)
    paths = sorted(write_tree(tmp_path, texts).rglob("*.py"), key=lambda p: int(p.stem[6:]))
    paths.insert(7, tmp_path / "missing.py")
    expected = [*texts[:7], None, *texts[7:]]
    assert [docstrings.read_modules(paths, n) for n in (1, 2)] == [expected, expected]


def test_documents_are_ordered_by_hash_alone():
    texts = [f"{i} " * 200 for i in range(9)]
    expected = sorted(texts, key=lambda text: hashlib.sha256(text.encode("utf-8")).hexdigest())
    assert docstrings.select_documents(texts[::-1])[0] == expected


def test_short_duplicate_and_unreadable_modules_are_counted_not_kept():
    texts = ["a" * 200, "b" * 199, "a" * 200, None, "", "a" * 200]
    skipped = {"unreadable": 1, "short": 2, "duplicate": 2}
    assert docstrings.select_documents(texts) == (["a" * 200], skipped)


@pytest.fixture
def tree(tmp_path, monkeypatch) -> list[str]:
    """Texts of modules in the place of the standard library, and no packages."""
    texts = [text * 4 for text in compose_documents(120) if len(text) > 100]
    root = write_tree(tmp_path / "tree", texts)
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda _: str(root))
    monkeypatch.setattr(prepare, "PACKAGES", ())
    return texts


def test_sample_holds_every_document_once(tree, tmp_path):
    assert prepare_main("--sample", "--out", tmp_path / "out", "--processes", 1) == 0
    made = Made(tmp_path / "out/datasets/sample_sp1024")
    in_order = sorted(tree, key=lambda text: hashlib.sha256(text.encode()).digest())
    val = round(0.04 * len(tree))
    assert made.texts("val") == in_order[:val]
    assert made.texts("train") == in_order[val:]
    assert made.tokenizer.name == "sample_1024_bpe.model"
    assert made.manifest["inputs"] == []


def test_sample_takes_another_size_of_vocabulary(tree, tmp_path):
    assert prepare_main("--sample", "--out", tmp_path, "--vocab-size", 600) == 0
    made = Made(tmp_path / "datasets/sample_sp600")
    assert made.manifest["tokenizer"]["vocab_size"] == 600


def test_sample_is_made_again_when_a_package_or_python_changes(tree, tmp_path, monkeypatch, capsys):
    arguments = ("--sample", "--out", tmp_path / "out", "--processes", 1)
    for expected in (False, True):
        assert prepare_main(*arguments) == 0
        assert ("up to date" in capsys.readouterr().out) == expected
    source = docstrings.DocstringSource((), 1)
    job = prepare.sample_job(prepare.parser().parse_args([str(a) for a in arguments]))[0]
    assert build.is_current(job, source)
    source.packages = {"numpy": "99"}
    assert not build.is_current(job, source)
    source.packages = {}
    monkeypatch.setattr(build.platform, "python_version", lambda: "3.99.0")
    assert not build.is_current(job, source)


# ---- interruption


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, dataset) -> dict[str, tuple[object, ...]]:
    """Arguments for two datasets of the same name, and the files that each gives."""
    folder = tmp_path_factory.mktemp("inputs")
    found = {}
    for letter, seed in (("a", 1), ("b", 2)):
        texts = compose_documents(800, seed)
        source = jsonl(folder / f"{letter}.jsonl", texts)
        options = ("--tokenizer", dataset.tokenizer, "--shard-tokens", 100_000)
        found[letter] = (source, *options, "--byte-sidecar", "--processes", 2, "--name", "t")
    return found


def dataset_files(out: Path, name: str = "t_sp512") -> dict[str, bytes]:
    folder = out / "datasets" / name
    return contents(folder) if folder.exists() else {}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_a_run_killed_at_any_moment_is_gone_on_with(tmp_path, inputs):
    """Two datasets take turns at one place, so a killed run has one to replace."""
    script, out, whole, seconds = driver(tmp_path), tmp_path / "out", {}, 0.0
    for letter, arguments in inputs.items():
        begin = time.monotonic()
        assert run(script, *arguments, "--out", tmp_path / letter).returncode == 0
        seconds = time.monotonic() - begin
        whole[letter] = dataset_files(tmp_path / letter)
    groups, moments = [], [seconds * (i + random.Random(i).random()) / 20 for i in range(20)]
    for i, moment in enumerate(moments):
        arguments = (*inputs["ab"[i % 2]], "--out", out)
        for wait in [moment] if i % 3 else [moment, moments[-1 - i]]:
            process = start(script, *arguments, **SILENT)
            time.sleep(wait)
            process.kill()
            process.wait()
            groups.append(process.pid)
            assert dataset_files(out) in ({}, *whole.values())
        done = run(script, *arguments)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False)
        assert dataset_files(out) == whole["ab"[i % 2]]
        assert [p.name for p in (out / "datasets").glob("*") if p.suffix != ".lock"] == ["t_sp512"]
    assert await_(lambda: not any(living(group) for group in groups), 20)


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("former", [True, False])
def test_a_stop_at_any_step_of_publishing_is_gone_on_with(tmp_path, inline, step, former):  # noqa: F811
    def arguments(out, *more):
        return (
            tmp_path / "in.jsonl",
            "--name",
            "t",
            "--vocab-size",
            400,
            "--out",
            tmp_path / out,
            *more,
        )

    jsonl(tmp_path / "in.jsonl", compose_documents(60))
    whole = [{}]
    for out, options in (("out", ()), ("new", ("--val-docs", 9))):
        if former or out == "new":
            assert prepare_main(*arguments(out, *options)) == 0
            whole.append(contents(tmp_path / out / "datasets/t_sp400"))
    left, remove = [step], shutil.rmtree

    def stopping(function):
        def call(*paths, **options):
            left[0] -= 1
            if left[0] < 0:
                if function is remove:  # half of it is gone
                    for path in [p for p in Path(paths[0]).rglob("*") if p.is_file()][:1]:
                        path.unlink()
                raise KeyboardInterrupt
            return function(*paths, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        real = prepare.publish

        def publish(*given):
            for module, name in ((os, "replace"), (os, "rename"), (shutil, "rmtree")):
                patch.setattr(module, name, stopping(getattr(module, name)))
            real(*given)

        patch.setattr(prepare, "publish", publish)
        code = prepare_main(*arguments("out", "--val-docs", 9))
    assert code == (130 if left[0] < 0 else 0)
    assert dataset_files(tmp_path / "out", "t_sp400") in whole
    assert prepare_main(*arguments("out", "--val-docs", 9)) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("mode", ["make", "check"])
def test_processes_end_with_a_killed_parent(tmp_path, inputs, mode):
    arguments = (*inputs["a"], "--out", tmp_path)
    if mode == "check":
        assert run(SCRIPT, *arguments).returncode == 0
        arguments = ("--check", tmp_path / "datasets/t_sp512", "--processes", 2)
    process = start(driver(tmp_path, 2000), *arguments, **SILENT)
    assert await_(lambda: len(living(process.pid)) >= 3)  # it, the resource tracker, and another
    process.kill()
    process.wait()
    assert await_(lambda: not living(process.pid), 20)


def test_shards_of_an_interrupted_run_are_no_part_of_the_next(tmp_path, inline, monkeypatch):  # noqa: F811
    source = jsonl(tmp_path / "in.jsonl", compose_documents(30))
    arguments = (source, "--name", "t", "--byte-level", "--byte-sidecar", "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(build, "file_records", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_main(*arguments, "--shard-tokens", 100)
    assert prepare_main(*arguments) == 0
    assert len(dataset_files(tmp_path / "out", "t_byte260")) == 4


def test_what_is_tokenized_is_not_tokenized_again(tmp_path, inputs, monkeypatch):
    monkeypatch.setattr(build, "CHUNK_CHARS", 50_000)
    real = prepare.publish

    def stop(*_):
        raise DataError("stopped")

    monkeypatch.setattr(prepare, "publish", stop)
    arguments = (*inputs["a"], "--out", tmp_path)
    assert prepare_main(*arguments) == 1
    work = tmp_path / "datasets/.t_sp512.work"

    def chunks():
        return {name: stamp for name, stamp in stamps(work).items() if "chunk_" in name}

    before = chunks()
    assert len(before) > 9
    lost = work / "chunk_000002.index"
    lost.unlink()
    assert prepare_main(*arguments) == 1
    changed = {Path(name).stem for name, stamp in chunks().items() if before[name] != stamp}
    assert changed == {"chunk_000002"}
    monkeypatch.setattr(prepare, "publish", real)
    assert prepare_main(*arguments) == 0
    assert not work.exists()


@pytest.mark.parametrize("mode", ["make", "sample", "check"])
def test_ctrl_c_says_so_and_leaves_no_process(tmp_path, inputs, mode):
    """Ctrl-C reaches every process of the group."""
    arguments = (*inputs["a"], "--out", tmp_path)
    if mode == "sample":
        arguments = ("--sample", "--out", tmp_path, "--processes", 2)
    if mode == "check":
        assert run(SCRIPT, *arguments).returncode == 0
        arguments = ("--check", tmp_path / "datasets/t_sp512", "--processes", 2)
    process = start(driver(tmp_path, 2000, SLOW), *arguments)
    assert await_(lambda: len(living(process.pid)) >= 4)  # both workers are starting
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "prepare.py: interrupted" in errors
    assert "Traceback" not in errors
    assert await_(lambda: not living(process.pid), 20)


def test_a_second_run_on_the_same_dataset_says_so(tmp_path, dataset, inputs):
    reading = start(SCRIPT, "-", *inputs["a"][1:], "--out", tmp_path, stdin=subprocess.PIPE)
    work = tmp_path / "datasets/.t_sp512.work"
    assert await_(work.exists)
    second = run(SCRIPT, *inputs["a"], "--out", tmp_path)
    assert second.returncode == 1
    assert "another prepare.py is making it" in second.stderr
    reading.stdin.write(inputs["a"][0].read_text())
    _, errors = reading.communicate(timeout=60)  # closes its input
    assert reading.returncode == 0, errors


# ---- up to date, or made again


@pytest.fixture
def made(tmp_path, dataset, inline) -> Made:  # noqa: F811
    """A dataset at tmp_path/out, of the texts in tmp_path/in.jsonl."""
    jsonl(tmp_path / "in.jsonl", compose_documents(30))
    shutil.copy(dataset.tokenizer, tmp_path / "my.model")
    assert again(tmp_path) == 0
    return Made(tmp_path / "out/datasets/t_sp512")


def again(root: Path, *more: object) -> int:
    options = ("--name", "t", "--tokenizer", root / "my.model", "--shard-tokens", 800)
    return prepare_main(root / "in.jsonl", *options, "--out", root / "out", *more)


def test_second_run_writes_nothing(tmp_path, made, capsys):
    before = stamps(tmp_path / "out/datasets/t_sp512") | stamps(tmp_path / "out/tokenizers")
    capsys.readouterr()
    assert again(tmp_path) == 0
    after = stamps(tmp_path / "out/datasets/t_sp512") | stamps(tmp_path / "out/tokenizers")
    assert after == before
    assert "is up to date" in capsys.readouterr().out


def test_force_makes_the_same_files_again(tmp_path, made):
    before, manifest = contents(tmp_path / "out"), made.folder / "manifest.json"
    inode = manifest.stat().st_ino
    os.link(manifest, tmp_path / "kept")  # so that the inode is not used again
    assert again(tmp_path, "--force") == 0
    assert contents(tmp_path / "out") == before
    assert manifest.stat().st_ino != inode


def test_a_changed_input_of_the_same_size_is_made_again(tmp_path, made):
    source = tmp_path / "in.jsonl"
    text = source.read_text()
    source.write_text(text.replace("the", "any"))
    assert len(source.read_text()) == len(text)
    before = made.stream("train")
    assert again(tmp_path) == 0
    assert made.stream("train") != before


@pytest.mark.parametrize(
    "change",
    [
        ("--val-docs", 3),
        ("--shuffle-seed", 1),
        ("--shard-tokens", 801),
        ("--byte-sidecar",),
        ("--max-document-bytes", 50),
        ("--samples", 7),
    ],
)
def test_changed_options_make_it_again(tmp_path, made, change):
    before = contents(made.folder)
    assert again(tmp_path, *change) == 0
    assert contents(made.folder).keys() | before.keys()
    assert contents(made.folder) != before
    assert prepare_main("--check", made.folder) == 0


def test_another_tokenizer_makes_it_again(tmp_path, made):
    other = train_tokenizer(tmp_path / "other.model", compose_documents(99, seed=5))
    before = made.stream("train")
    assert again(tmp_path, "--tokenizer", other) == 0
    assert made.tokenizer.read_bytes() == other.read_bytes()
    assert made.stream("train") != before


def test_a_changed_template_makes_it_again(tmp_path, capsys, inline):  # noqa: F811
    records = [{"q": f"question {i}", "a": "answer"} for i in range(9)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    template = tmp_path / "template.jinja"
    fields = ("--type", "instruction", "--instruction-field", "q", "--output-field", "a")
    options = (*fields, "--template", template, "--byte-level", "--out", tmp_path / "out")
    found = []
    for text in (
        "{{ messages[0].content }}",
        "{{ messages[1].content }} {{ messages[0].content }}",
    ):
        template.write_text(text)
        assert prepare_main(source, *options, "--name", "t") == 0
        found.append(Made(tmp_path / "out/datasets/t_byte260").texts("val"))
    assert found == [["question 0"], ["answer question 0"]]
    capsys.readouterr()
    assert prepare_main(source, *options, "--name", "t") == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["fineweb_train_000001.bin", "fineweb_val_000000.bin", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_damaged_file_is_made_again(tmp_path, made, name, damage):
    before, path = contents(made.folder), made.folder / name
    if damage == "change":
        path.write_bytes(path.read_bytes()[:-2] + b"??")
    elif name == "manifest.json":
        path.write_text("{}")
    else:
        path.unlink()
    assert again(tmp_path) == 0
    assert contents(made.folder) == before


def test_a_damaged_trained_tokenizer_is_made_again(tmp_path, inline):  # noqa: F811
    source = jsonl(tmp_path / "in.jsonl", compose_documents(60))
    arguments = (source, "--name", "t", "--vocab-size", 450, "--out", tmp_path / "out")
    assert prepare_main(*arguments) == 0
    before = contents(tmp_path / "out")
    (tmp_path / "out/tokenizers/t_450_bpe.model").write_bytes(b"damaged")
    assert prepare_main(*arguments) == 0
    assert contents(tmp_path / "out") == before


def test_shards_of_a_larger_former_dataset_do_not_survive(tmp_path, made):
    before = len(made.shards("train"))
    jsonl(tmp_path / "in.jsonl", compose_documents(12))
    assert again(tmp_path) == 0
    assert 0 < len(made.shards("train")) < before
    assert prepare_main("--check", made.folder) == 0


# ---- safety: what is not ours stays


@pytest.mark.parametrize("name", ["fineweb_train_000000.bin", "notes.txt", "sub/notes.txt"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_folder_of_foreign_files_is_not_overwritten(tmp_path, dataset, capsys, name, forced):
    source = jsonl(tmp_path / "in.jsonl", compose_documents(9))
    path = tmp_path / "out/datasets/t_sp512" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"precious")
    options = ("--name", "t", "--tokenizer", dataset.tokenizer, "--out", tmp_path / "out")
    assert prepare_main(source, *options, *["--force"][: int(forced)]) == 1
    assert "choose another --name" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {f"datasets/t_sp512/{name}": b"precious"}


def test_a_foreign_file_in_our_folder_is_not_lost(tmp_path, made, capsys):
    (made.folder / "notes.txt").write_text("precious")
    jsonl(tmp_path / "in.jsonl", compose_documents(12))
    before = contents(tmp_path / "out")
    assert again(tmp_path) == 1
    assert "notes.txt" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_an_empty_folder_is_no_obstacle(tmp_path, dataset, inline):  # noqa: F811
    (tmp_path / "out/datasets/t_sp512").mkdir(parents=True)
    jsonl(tmp_path / "in.jsonl", compose_documents(9))
    shutil.copy(dataset.tokenizer, tmp_path / "my.model")
    assert again(tmp_path) == 0


@pytest.mark.parametrize("kind", ["--tokenizer", "--vocab-size", "--byte-level"])
def test_a_tokenizer_of_another_dataset_is_not_overwritten(tmp_path, dataset, capsys, inline, kind):  # noqa: F811
    name, value = {
        "--tokenizer": (dataset.tokenizer.name, [dataset.tokenizer]),
        "--vocab-size": ("t_450_bpe.model", [450]),
        "--byte-level": ("byte_260.model", []),
    }[kind]
    kept = tmp_path / "out/tokenizers" / name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"of another dataset")
    source = jsonl(tmp_path / "in.jsonl", compose_documents(60))
    assert prepare_main(source, "--name", "t", "--out", tmp_path / "out", kind, *value) == 1
    assert "another tokenizer of this name" in capsys.readouterr().err
    assert kept.read_bytes() == b"of another dataset"


def test_datasets_share_a_tokenizer(tmp_path, made):
    for name in ("other", "third"):
        assert again(tmp_path, "--name", name, "--tokenizer", made.tokenizer) == 0
    assert again(tmp_path) == 0
    for name in ("t", "other", "third"):
        assert prepare_main("--check", tmp_path / f"out/datasets/{name}_sp512") == 0


# ---- wrong use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give inputs"),
        (["x.txt"], "choose one of --tokenizer"),
        (["x.txt", "--byte-level", "--vocab-size", "512"], "choose one of --tokenizer"),
        (["x.txt", "--sample"], "give inputs, or --sample"),
        (["--sample", "--byte-level"], "--sample trains a tokenizer of its own"),
        (["x.txt", "--check", "d"], "give inputs, or --sample"),
        (["x.txt", "--tokenizer", "/nowhere/t.model"], "/nowhere/t.model"),
        (["x.txt", "--byte-level", "--name", "a/b"], "--name a/b"),
        (["x.txt", "--byte-level", "--name", "../b"], "--name ../b"),
        (["x.txt", "--byte-level", "--name", "/b"], "--name /b"),
        (["x.txt", "--vocab-size", "259"], "260 to 65,536"),
        (["x.txt", "--vocab-size", "65537"], "260 to 65,536"),
        (["x.txt", "--byte-level", "--val-docs", "0"], "--val-docs"),
        (["x.txt", "--byte-level", "--shard-tokens", "many"], "--shard-tokens"),
        (["x.txt", "--byte-level", "--processes", "0"], "--processes"),
        (["x.txt", "--byte-level", "--shuffle-seed", "-1"], "--shuffle-seed"),
    ],
)
def test_wrong_use_exits_2_and_says_what_to_do(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        prepare_main(*arguments, "--out", tmp_path / "out")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt", "--byte-level"], "missing.txt"),
        (["in.jsonl", "--byte-level", "--template", "plain"], "--template"),
        (["in.jsonl", "--byte-level", "--split", "test"], "--split"),
        (["in.jsonl", "--tokenizer", "broken.model"], "broken.model: not a tokenizer"),
        (["in.jsonl", "--tokenizer", "no_bos.model"], "no_bos.model: shards need a BOS"),
        (["in.jsonl", "--byte-level", "--out", "in.jsonl/x"], "in.jsonl/x"),
        (["in.jsonl", "--byte-level", "--name", "n" * 300], "name too long"),
    ],
)
def test_what_cannot_be_done_exits_1_and_leaves_nothing(
    tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "in.jsonl", compose_documents(9))
    (tmp_path / "broken.model").write_bytes(b"nonsense")
    (tmp_path / "no_bos.model").write_bytes(trained(bos_id=-1))
    before = sorted(tmp_path.iterdir())
    out = () if "--out" in arguments else ("--out", tmp_path / "out")
    assert prepare_main(*arguments, *out) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("prepare.py: error: ")
    assert message.lower() in errors.lower()
    assert [p for p in sorted(tmp_path.rglob("*")) if p.is_file()] == before


@pytest.mark.parametrize("place", ["tokenizers", "datasets/.t_byte260.work"])
def test_a_file_in_the_way_is_an_error(tmp_path, capsys, inline, place):  # noqa: F811
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    source = jsonl(tmp_path / "in.jsonl", compose_documents(9))
    options = ("--name", "t", "--byte-level", "--out", tmp_path / "out")
    assert prepare_main(source, *options) == 1
    assert path.name in capsys.readouterr().err
    assert path.read_text() == "precious"


def test_strict_stops_at_the_first_malformed_record(tmp_path, capsys, inline):  # noqa: F811
    source = jsonl(tmp_path / "in.jsonl", compose_documents(9))
    source.write_text(source.read_text() + "{\n")
    options = ("--name", "t", "--byte-level", "--out", tmp_path / "out")
    assert prepare_main(source, *options, "--strict") == 1
    assert f"{source}:10" in capsys.readouterr().err
    assert prepare_main(source, *options) == 0
    made = Made(tmp_path / "out/datasets/t_byte260")
    assert made.manifest["skipped"] == {"not JSON": 1}


# ---- full disks


@pytest.fixture
def small_disk(tmp_path):
    """A way to mount a file system of some bytes at tmp_path/disk, or to resize it."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(size: int) -> Path:
        remount = "remount," if os.path.ismount(disk) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={size}", "tmpfs", str(disk)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount a small file system here")
        return disk

    yield resize
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_an_error_and_the_next_run_completes(tmp_path, small_disk):
    """Whatever is being written when it is full: the spool, chunks, index, order, shards."""
    source = jsonl(tmp_path / "in.jsonl", [f"{i} {i * i}" for i in range(6000)])
    options = ("--name", "t", "--byte-level", "--byte-sidecar", "--shuffle-seed", 1)
    arguments = (source, *options, "--processes", 1)
    assert run(SCRIPT, *arguments, "--out", tmp_path / "whole").returncode == 0
    for kilobytes in (60, 200, 400, 560, 640, 700, 800):
        done = run(SCRIPT, *arguments, "--out", small_disk(kilobytes * 1024))
        assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
        assert "No space left on device" in done.stderr
        assert not (tmp_path / "disk/datasets/t_byte260").exists()
    assert run(SCRIPT, *arguments, "--out", small_disk(2**25)).returncode == 0
    assert contents(tmp_path / "disk") == contents(tmp_path / "whole")


def test_an_order_that_does_not_fit_the_disk_is_an_error(small_disk):
    disk = small_disk(2**14)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import build, pathlib\n"
    code += "try: build.frozen_order(10**5, 1, pathlib.Path(sys.argv[2]))\n"
    code += "except OSError as error: print(error.strerror)"
    done = subprocess.run([sys.executable, "-c", code, str(DATA), str(disk)], capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"No space left on device\n")


# ---- memory


PEAKS = """
import atexit, resource, tracemalloc
def report():
    largest_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print("peaks", tracemalloc.get_traced_memory()[1] // 1000, largest_child)
if __name__ == "__main__":
    tracemalloc.start()
    atexit.register(report)
"""


def test_memory_does_not_grow_with_the_input(tmp_path):
    """Peaks, in kB, of this process's objects (maps of files are none) and of its largest child,
    at 1 and at 12 MB of text."""
    script, text = driver(tmp_path, 100_000, PEAKS), " ".join(compose_documents(300))
    peaks = []
    for megabytes in (1, 12):
        count = megabytes * 10**6 // 10_000
        source = jsonl(tmp_path / "in.jsonl", [f"{i} {text}"[:10_000] for i in range(count)])
        options = ("--byte-level", "--processes", 1, "--force", "--shard-tokens", 10**6)
        done = run(script, source, *options, "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        peaks.append([int(kb) for kb in done.stdout.rpartition("peaks")[2].split()])
    growth = [after - before for before, after in zip(*peaks, strict=True)]
    assert max(growth) < 3000
