"""data/prepare.py: documents from docstrings, tokenizer, shards, manifest."""

import hashlib
import importlib.util
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece as spm

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "prepare.py"
spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
sys.modules["prepare"] = prepare  # worker processes look their function up by this name
spec.loader.exec_module(prepare)

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


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Distinct documents of a few lines of invented words, enough for 1024 pieces."""
    rng = random.Random(seed)
    parts = [a + b for a in "bcdfghklmnprstvz" for b in ("a", "en", "i", "or", "ust")]
    words = ["".join(rng.choices(parts, k=rng.randint(1, 3))) for _ in range(1500)]
    lines = [[" ".join(rng.choices(words, k=12)) for _ in range(8)] for _ in range(count)]
    return ["\n".join(line) for line in lines]


def write_tree(root: Path, texts: list[str]) -> Path:
    for i, text in enumerate(texts):
        path = root / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{text}"""\n', encoding="utf-8")
    return root


def read_shard(path: Path) -> tuple[tuple[int, ...], list[int]]:
    raw = path.read_bytes()
    return struct.unpack("<256i", raw[:1024]), [n for (n,) in struct.iter_unpack("<H", raw[1024:])]


def split_at_bos(tokens: list[int]) -> list[list[int]]:
    documents: list[list[int]] = []
    for token in tokens:
        if token == 1:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Worker processes import prepare by name."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def tokenizer():
    model = prepare.train_tokenizer(some_texts(60), prepare.TOKENIZER_OPTIONS)
    return spm.SentencePieceProcessor(model_proto=model)


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """main() on a small tree in the place of the standard library; returns its data folder."""
    tree = write_tree(tmp_path / "tree", some_texts(60))
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda _: str(tree))
    (tmp_path / "requirements.txt").write_text("# nothing\n")
    out = tmp_path / "out"
    assert run_sample(out) == 0
    return out


def run_sample(out: Path, *more: str) -> int:
    requirements = str(out.parent / "requirements.txt")
    return prepare.main(["--sample", "--out", str(out), "--requirements", requirements, *more])


def made_files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


# ---- sources


def test_module_text_is_its_docstrings_in_source_order(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(MODULE)
    assert prepare.module_text(path) == MODULE_TEXT


def test_module_text_drops_nul_and_lone_surrogates(tmp_path):
    path = tmp_path / "m.py"
    path.write_text('"""a\\0b \\ud800c \\U0001f600"""')
    assert prepare.module_text(path) == "ab c \U0001f600"


@pytest.mark.parametrize("source", [b'"""text"""\ndef', b'"""nul \0"""', b'"""\xff"""'])
def test_module_that_does_not_parse_has_no_text(tmp_path, source):
    path = tmp_path / "m.py"
    path.write_bytes(source)
    assert prepare.module_text(path) is None


def test_tree_files_leave_out_third_party_packages(tmp_path):
    for name in ("a.py", "deep/b.py", "deep/c.txt", "site-packages/d.py", "x/dist-packages/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(prepare.tree_files(tmp_path)) == [tmp_path / "a.py", tmp_path / "deep" / "b.py"]


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
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# zq-extra\n--find-links zq-extra\n\nZQ-Alpha==1.5  # why\n")
    assert prepare.installed_closure(requirements) == {"zq-alpha": "1.5", "zq-beta": "2.0"}


def test_package_files_are_the_python_files_of_the_record(tmp_path, monkeypatch):
    install(tmp_path, "zq_gamma", "1", [], ["zq_gamma.py", "zq_gamma.so"])
    monkeypatch.syspath_prepend(str(tmp_path))
    assert prepare.package_files("zq-gamma") == [tmp_path / "zq_gamma.py"]


def test_modules_read_the_same_with_any_number_of_processes(tmp_path):
    texts = some_texts(40)
    paths = sorted(write_tree(tmp_path, texts).rglob("*.py"), key=lambda p: int(p.stem[6:]))
    paths.insert(7, tmp_path / "missing.py")
    expected = [*texts[:7], None, *texts[7:]]
    assert [prepare.read_modules(paths, n) for n in (1, 2)] == [expected, expected]


# ---- documents


def test_documents_are_ordered_by_hash_alone():
    texts = [f"{i} " * 200 for i in range(9)]
    expected = sorted(texts, key=lambda text: hashlib.sha256(text.encode("utf-8")).hexdigest())
    assert prepare.select_documents(texts[::-1])[0] == expected


def test_short_duplicate_and_unreadable_modules_are_counted_not_kept():
    texts = ["a" * 200, "b" * 199, "a" * 200, None, "", "a" * 200]
    skipped = {"unreadable": 1, "short": 2, "duplicate": 2}
    assert prepare.select_documents(texts) == (["a" * 200], skipped)


@pytest.mark.parametrize(("total", "val"), [(2, 1), (100, 4), (1000, 40)])
def test_split_gives_the_first_documents_to_validation(total, val):
    documents = [str(i) for i in range(total)]
    assert prepare.split_documents(documents) == {"val": documents[:val], "train": documents[val:]}


def test_split_of_one_document_is_refused():
    with pytest.raises(prepare.DataError, match="1 document"):
        prepare.split_documents(["a"])


# ---- tokenizer


def test_tokenizer_has_the_published_special_pieces(tokenizer):
    ids = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert (tokenizer.vocab_size(), ids) == (1024, (0, 1, 2, 3))


def test_tokenizer_has_a_lone_space_piece(tokenizer):
    assert tokenizer.id_to_piece(tokenizer.piece_to_id("▁")) == "▁"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("☃", ["<0xE2>", "<0x98>", "<0x83>"]),  # byte_fallback
        ("\uff11", ["<0x31>"]),  # nmt_nfkc: a full-width digit; no dummy prefix
    ],
)
def test_tokenizer_options_show_in_pieces(tokenizer, text, pieces):
    assert tokenizer.encode(text, out_type=str) == pieces


def test_tokenizer_keeps_digits_apart():
    texts = [text.replace("b", "12") for text in some_texts(60)]
    model = prepare.train_tokenizer(texts, prepare.TOKENIZER_OPTIONS)
    pieces = spm.SentencePieceProcessor(model_proto=model).encode("12 12", out_type=str)
    assert [piece.strip("▁") for piece in pieces if piece != "▁"] == ["1", "2", "1", "2"]


def test_tokenizer_training_is_deterministic():
    texts = some_texts(60)
    models = [prepare.train_tokenizer(texts, prepare.TOKENIZER_OPTIONS) for _ in range(2)]
    assert models[0] == models[1]


@pytest.mark.parametrize("text", ["the same few words\n", "  \n"])
def test_too_little_text_for_the_tokenizer_is_refused(text):
    with pytest.raises(prepare.DataError):
        prepare.train_tokenizer([text] * 50, prepare.TOKENIZER_OPTIONS)


# ---- shards


def test_shard_header_is_that_of_the_challenge(tmp_path, tokenizer):
    path = tmp_path / "s.bin"
    prepare.write_shard(path, some_texts(3), tokenizer)
    header, tokens = read_shard(path)
    assert header == (20240520, 1, len(tokens), *[0] * 253)


def test_shard_documents_are_bos_and_their_tokens(tmp_path, tokenizer):
    # More than one batch; "<s>" written in a text is no BOS; an empty text is a lone BOS.
    texts = ["", "1 <s> 2", "naïve ☃\ttabs\n\n  lines", *some_texts(300)]
    path = tmp_path / "s.bin"
    prepare.write_shard(path, iter(texts), tokenizer)
    documents = split_at_bos(read_shard(path)[1])
    expected = [tokenizer.decode(tokenizer.encode(text)) for text in texts]
    assert [tokenizer.decode(document) for document in documents] == expected


def test_shard_counts(tmp_path, tokenizer):
    counts = prepare.write_shard(tmp_path / "s.bin", ["☃  ☃", " ben\n\n☃ "], tokenizer)
    ben = len(tokenizer.encode("ben"))
    # "☃ ☃" is 3 + 1 + 3 tokens and bytes; "ben ☃" has a space and three bytes after "ben".
    tokens = (1 + 7) + (1 + ben + 4)
    assert counts == {"documents": 2, "tokens": tokens, "bytes": 8 + 10, "decoded_bytes": 7 + 7}


def test_failed_write_leaves_the_previous_file_and_no_other(tmp_path):
    path = tmp_path / "f.bin"
    path.write_bytes(b"previous")

    def write_half():
        with prepare.replacing(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert made_files(tmp_path) == {"f.bin": b"previous"}


def test_file_is_not_under_its_name_while_it_is_written(tmp_path):
    path = tmp_path / "f.bin"
    with prepare.replacing(path) as file:
        file.write(b"whole")
        file.flush()
        assert not list(tmp_path.glob("*.bin"))
    assert path.read_bytes() == b"whole"


# ---- the whole


def test_sample_holds_every_document_once_train_apart_from_val(sample):
    folder = sample / "datasets" / "sample_sp1024"
    model = str(sample / "tokenizers" / "sample_1024_bpe.model")
    tokenizer = spm.SentencePieceProcessor(model_file=model)
    train, val = (
        [tokenizer.decode(d) for d in split_at_bos(read_shard(folder / name)[1])]
        for name in ("fineweb_train_000000.bin", "fineweb_val_000000.bin")
    )
    assert len(val) == 2  # 4% of 60
    assert sorted(train + val) == sorted(" ".join(text.split()) for text in some_texts(60))


def test_tokenizer_is_trained_on_the_training_documents_alone(sample):
    train = prepare.split_documents(prepare.select_documents(some_texts(60))[0])["train"]
    expected = prepare.train_tokenizer(train, prepare.TOKENIZER_OPTIONS)
    assert (sample / "tokenizers" / "sample_1024_bpe.model").read_bytes() == expected


def test_manifest_names_and_digests_every_other_file(sample):
    folder = sample / "datasets" / "sample_sp1024"
    manifest = json.loads((folder / "manifest.json").read_text())
    expected = {
        str(path.resolve()): (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sample.rglob("*")
        if path.suffix in (".bin", ".model")
    }
    recorded = {
        str((folder / record["path"]).resolve()): (record["size"], record["sha256"])
        for record in manifest["files"].values()
    }
    assert len(expected) == 3
    assert recorded == expected


def test_second_run_writes_nothing(sample, capsys):
    def stamps() -> dict[Path, tuple[int, int]]:
        return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in sample.rglob("*")}

    before = stamps()
    capsys.readouterr()
    assert run_sample(sample) == 0
    assert stamps() == before
    assert capsys.readouterr().out.count("\n") == 1


def test_force_makes_the_same_files_again(sample):
    manifest = sample / "datasets" / "sample_sp1024" / "manifest.json"
    before, inode = made_files(sample), manifest.stat().st_ino
    os.link(manifest, sample.parent / "kept")  # so that the inode is not used again
    assert run_sample(sample, "--force", "--processes", "2") == 0
    assert made_files(sample) == before
    assert manifest.stat().st_ino != inode


@pytest.mark.parametrize(
    "damaged",
    [
        "datasets/sample_sp1024/fineweb_train_000000.bin",
        "datasets/sample_sp1024/fineweb_val_000000.bin",
        "datasets/sample_sp1024/manifest.json",
        "tokenizers/sample_1024_bpe.model",
    ],
)
def test_damaged_file_is_made_again(sample, damaged):
    before = made_files(sample)
    path = sample / damaged
    path.write_bytes(path.read_bytes()[:-1] + b"?")  # of the same size
    assert run_sample(sample) == 0
    assert made_files(sample) == before


def test_leftovers_of_an_interrupted_run_are_harmless(sample):
    before = made_files(sample)
    folder = sample / "datasets" / "sample_sp1024"
    (folder / "manifest.json").unlink()
    (folder / "fineweb_train_000000.bin").unlink()
    leftover = folder / f"fineweb_train_000000.bin.{os.getpid()}.tmp"
    leftover.write_bytes(b"x" * 10_000_000)
    assert run_sample(sample) == 0
    assert made_files(sample) == before


def test_failed_run_leaves_no_manifest(sample, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(prepare, "write_shard", full_disk)
    assert run_sample(sample, "--force") == 1
    assert not (sample / "datasets" / "sample_sp1024" / "manifest.json").exists()


def test_other_versions_make_it_again(sample, monkeypatch):
    monkeypatch.setattr(prepare.platform, "python_version", lambda: "3.99.0")
    assert run_sample(sample) == 0
    manifest = json.loads((sample / "datasets/sample_sp1024/manifest.json").read_text())
    assert manifest["inputs"]["versions"]["python"] == "3.99.0"


def test_command_makes_the_sample_of_this_python(tmp_path):
    (tmp_path / "none.txt").touch()  # the standard library alone
    command = [sys.executable, str(SCRIPT), "--sample", "--requirements", "none.txt", "--out", "o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    header, tokens = read_shard(tmp_path / "o/datasets/sample_sp1024/fineweb_train_000000.bin")
    assert header[2] == len(tokens) > 100_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "add --sample"), (["--sample", "--requirements", "/nowhere/r.txt"], "/nowhere/r.txt")],
)
def test_wrong_use_exits_2_and_says_what_to_do(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        prepare.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
