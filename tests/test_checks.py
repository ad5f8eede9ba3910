"""data/checks.py: prepare.py --check on whole datasets, and on each fault that can be planted."""

import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import sentencepiece as spm
from conftest import compose_documents, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_build import LOSSY, inline, make, prepare_main  # noqa: F401
from test_vocabulary import trained

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import build
import checks
import prepare
import vocabulary
from checks import Findings
from shards import DataError

pytestmark = pytest.mark.usefixtures("inline")
TEXTS = LOSSY + compose_documents(50)
VAL_DOCS, SHARD_TOKENS = 20, 700


def read(path: Path) -> list[int]:
    raw = path.read_bytes()[1024:]
    return list(struct.unpack(f"<{len(raw) // 2}H", raw))


def write(path: Path, tokens: list[int], magic: int = 20240520) -> None:
    fields = (magic, 1, len(tokens), *[0] * 253)
    path.write_bytes(struct.pack(f"<256i{len(tokens)}H", *fields, *tokens))


@pytest.fixture(scope="module")
def original(tmp_path_factory, dataset) -> Path:
    """A dataset of several shards in both splits, with sidecars."""
    options = ("--tokenizer", dataset.tokenizer, "--byte-sidecar", "--val-docs", VAL_DOCS)
    made = make(tmp_path_factory.mktemp("made"), TEXTS, *options, "--shard-tokens", SHARD_TOKENS)
    assert min(len(made.shards(split)) for split in ("val", "train")) >= 3
    return made.folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of the dataset, beside its tokenizer, to be damaged."""
    shutil.copytree(original.parent.parent, tmp_path / "data")
    return tmp_path / "data" / "datasets" / original.name


def tokenizer_of(folder: Path) -> Path:
    return next((folder.parent.parent / "tokenizers").iterdir())


def forget(folder: Path) -> None:
    """Without a manifest, nothing is known but the files."""
    (folder / "manifest.json").unlink()


def amend(folder: Path, change) -> None:
    """Change the manifest, and record the files as they are now."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = checks.file_records(folder)
    change(manifest)
    path.write_text(json.dumps(manifest))


def check(capsys, folder: Path, *options: object) -> tuple[int, set[str], str]:
    """The exit code, the rules that failed, and all that was printed."""
    capsys.readouterr()
    code = prepare_main("--check", folder, "--processes", 1, *options)
    printed = capsys.readouterr()
    failed = {line.split()[1] for line in printed.out.splitlines() if line.startswith("FAIL")}
    assert code == (1 if failed or "error:" in printed.err else 0)
    return code, failed, printed.out + printed.err


# ---- whole datasets


@pytest.mark.parametrize(
    "options",
    [
        ("--vocab-size", 400),
        ("--byte-level",),
        ("--byte-level", "--byte-sidecar", "--shard-tokens", 50),
        ("--vocab-size", 400, "--shard-tokens", 37, "--byte-sidecar", "--shuffle-seed", 1),
    ],
    ids=["trained", "bytes", "documents over many shards", "all"],
)
def test_what_was_made_passes(tmp_path, capsys, options):
    made = make(tmp_path, TEXTS, *options, "--val-docs", VAL_DOCS)
    code, failed, text = check(capsys, made.folder)
    assert (code, failed) == (0, set())
    rules = {"files", "shards", "val", "train", "leakage"}
    rules |= {"sidecars"} if "--byte-sidecar" in options else set()
    rules |= {"val_text", "train_text"} if "--byte-level" in options else set()
    assert {line.split()[1] for line in text.splitlines() if line.startswith("ok ")} == rules


def test_what_was_made_passes_in_processes(folder, capsys, monkeypatch):
    monkeypatch.undo()
    code = prepare_main("--check", folder, "--processes", 2)
    assert (code, capsys.readouterr().out.count("\nok ")) == (0, 5)


def test_a_dataset_without_a_manifest_passes(folder, capsys):
    forget(folder)
    assert check(capsys, folder, "--tokenizer", tokenizer_of(folder))[:2] == (0, set())


def test_the_report_says_what_was_counted(folder, dataset, capsys):
    _, _, text = check(capsys, folder)
    decoded = [dataset.sp.decode(dataset.sp.encode(t)) for t in TEXTS[:VAL_DOCS]]
    assert f"{VAL_DOCS} documents, {sum(len(t.encode()) for t in decoded):,} bytes" in text
    assert f"{sum(len(t.encode()) for t in TEXTS[:VAL_DOCS]):,} original bytes" in text


# ---- faults in a dataset with a manifest: files


def test_unknown_pieces_are_counted_and_their_bytes_are_the_manifests(tmp_path, capsys):
    model = tmp_path / "no_bytes.model"
    model.write_bytes(trained(byte_fallback=False, vocab_size=300))
    made = make(tmp_path, ["the ☃☃ water ☃", *TEXTS], "--tokenizer", model, "--val-docs", 1)
    text = check(capsys, made.folder)[2]
    assert "2 unknown pieces for 9 bytes of text" in text
    amend(made.folder, lambda m: m["splits"]["val"].update(unknown_tokens=3))
    assert check(capsys, made.folder)[:2] == (1, {"val"})
    for name in ("unknown_tokens", "unknown_bytes"):  # as manifests were before they were counted
        amend(made.folder, lambda m, name=name: m["splits"]["val"].pop(name))
    code, _, text = check(capsys, made.folder)
    assert (code, "2 unknown pieces\n" in text) == (0, True)


def flip(folder):
    path = folder / "fineweb_train_000001.bin"
    raw = bytearray(path.read_bytes())
    raw[1500] ^= 1
    path.write_bytes(raw)


def lose_shard(folder):
    sorted(folder.glob("fineweb_train_*"))[-1].unlink()


def lose_sidecar(folder):
    (folder / "fineweb_val_bytes_000001.bin").unlink()


def add_shard(folder):
    number = len(list(folder.glob("fineweb_train_*")))
    shutil.copy(folder / "fineweb_train_000000.bin", folder / f"fineweb_train_{number:06d}.bin")


def change_tokenizer(folder):
    path = tokenizer_of(folder)
    train_tokenizer(path, compose_documents(99, seed=5))


@pytest.mark.parametrize("fault", [flip, lose_shard, lose_sidecar, add_shard, change_tokenizer])
def test_a_file_that_is_not_the_recorded_one_fails_files(folder, capsys, fault):
    fault(folder)
    assert check(capsys, folder)[:2] == (1, {"files"})


def test_another_tokenizer_of_the_same_size_fails_files(folder, tmp_path, capsys):
    other = train_tokenizer(tmp_path / "other.model", compose_documents(99, seed=5))
    assert len(spm.SentencePieceProcessor(model_file=str(other))) == 512
    assert check(capsys, folder, "--tokenizer", other)[:2] == (1, {"files"})


# ---- faults in a dataset without a manifest


def truncate(folder):
    path = folder / "fineweb_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-2])


def cut_header(folder):
    path = folder / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:100])


def lose_middle(folder):
    (folder / "fineweb_train_000001.bin").unlink()


def lose_val(folder):
    for path in folder.glob("fineweb_val_*"):
        path.unlink()


def spoil_magic(folder):
    path = folder / "fineweb_train_000000.bin"
    write(path, read(path), magic=20240521)


def change_token(folder, name, at, token):
    path = folder / name
    tokens = read(path)
    tokens[at] = token
    write(path, tokens)


def spoil_first_bos(folder):
    change_token(folder, "fineweb_train_000000.bin", 0, 5)


@pytest.mark.parametrize(
    "fault", [truncate, cut_header, lose_middle, lose_val, spoil_magic, spoil_first_bos]
)
def test_a_shard_that_is_not_whole_or_missing_fails_shards(folder, capsys, fault):
    forget(folder)
    fault(folder)
    options = ("--tokenizer", tokenizer_of(folder))
    assert check(capsys, folder, *options)[:2] == (1, {"shards"})


@pytest.mark.parametrize(
    ("split", "number"), [("train", 0), ("train", 1), ("train", 2), ("val", 1)]
)
@pytest.mark.parametrize("at", [1, -1])
def test_an_id_over_the_vocabulary_fails_its_split(folder, capsys, split, number, at):
    """Also in a document that begins in the shard before."""
    forget(folder)
    change_token(folder, f"fineweb_{split}_{number:06d}.bin", at, 512)
    code, failed, text = check(capsys, folder, "--tokenizer", tokenizer_of(folder))
    assert (code, failed) == (1, {split})
    assert "id 512 occurs" in text


def test_a_shard_without_any_bos_counts_to_the_document_before(folder, capsys):
    """Three shards, the middle one of which holds a piece of one document alone."""
    forget(folder)
    for path in folder.glob("fineweb_*"):
        path.unlink()
    tokens = [1, *[300] * 20, 1, 301]
    for i in range(3):
        write(folder / f"fineweb_val_{i:06d}.bin", tokens[i * 8 : (i + 1) * 8])
    write(folder / "fineweb_train_000000.bin", [1, 302, 1, *[300] * 19])
    code, _, text = check(capsys, folder, "--tokenizer", tokenizer_of(folder))
    assert code == 0
    assert "2 documents" in text


def test_pieces_that_count_other_bytes_than_the_text_fail_both_splits(folder, capsys, monkeypatch):
    forget(folder)
    monkeypatch.setattr(vocabulary.Vocabulary, "decoded_bytes", lambda *_: 1)
    code, failed, text = check(capsys, folder, "--tokenizer", tokenizer_of(folder))
    assert (code, failed) == (1, {"val", "train"})
    assert "pieces count" in text


# ---- faults in the manifest's counts


@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize("name", ["documents", "tokens", "decoded_bytes"])
def test_wrong_counts_fail_their_split(folder, capsys, split, name):
    def change(manifest):
        manifest["splits"][split][name] += 1

    amend(folder, change)
    assert check(capsys, folder)[:2] == (1, {split})


def sidecar_of_wrong_sum(sizes, _):
    sizes[1] += 1


def sidecar_with_bytes_at_bos(sizes, tokens):
    at = tokens.index(1)
    sizes[at], sizes[at + 1] = sizes[at + 1], 0


def sidecar_of_wrong_length(sizes, _):
    sizes.append(0)


@pytest.mark.parametrize(
    "fault", [sidecar_of_wrong_sum, sidecar_with_bytes_at_bos, sidecar_of_wrong_length]
)
def test_a_wrong_sidecar_fails_sidecars(folder, capsys, fault):
    path = folder / "fineweb_val_bytes_000001.bin"
    sizes = read(path)
    fault(sizes, read(folder / "fineweb_val_000001.bin"))
    write(path, sizes)
    amend(folder, lambda manifest: None)
    assert check(capsys, folder)[:2] == (1, {"sidecars"})


def test_a_missing_sidecar_fails_sidecars(folder, capsys):
    forget(folder)
    lose_sidecar(folder)
    options = ("--tokenizer", tokenizer_of(folder))
    assert check(capsys, folder, *options)[:2] == (1, {"sidecars"})


# ---- leakage


def plant(folder, dataset) -> None:
    """The third validation document at the end of training."""
    ids = dataset.sp.encode(TEXTS[2])
    last = sorted(folder.glob("fineweb_train_*"))[-1]
    write(last, [*read(last), 1, *ids])


def test_a_validation_document_in_training_fails_leakage(folder, dataset, capsys):
    plant(folder, dataset)

    def change(manifest):
        ids = dataset.sp.encode(TEXTS[2])
        counts = manifest["splits"]["train"]
        counts["documents"] += 1
        counts["tokens"] += 1 + len(ids)
        counts["decoded_bytes"] += len(dataset.sp.decode(ids).encode())

    amend(folder, change)
    code, failed, text = check(capsys, folder)
    assert (code, failed) == (1, {"leakage"})
    assert "1 training documents" in text


def test_a_validation_document_in_training_fails_leakage_without_a_manifest(
    folder, dataset, capsys
):
    plant(folder, dataset)
    forget(folder)
    options = ("--tokenizer", tokenizer_of(folder))
    assert check(capsys, folder, *options)[:2] == (1, {"leakage"})


@pytest.mark.parametrize(
    ("leaked", "strict", "passes"),
    [(3, False, True), (4, False, False), (1, True, False), (0, True, True)],
)
def test_a_thousandth_may_leak_where_nobody_looked(leaked, strict, passes):
    val, train = Findings(documents=3999), Findings(leaked=leaked)
    if passes:
        assert f"{leaked} training" in checks.check_leakage(val, train, strict)
    else:
        with pytest.raises(DataError, match=f"{leaked} training"):
            checks.check_leakage(val, train, strict)


# ---- what is no dataset


def test_a_missing_folder_is_an_error(tmp_path, capsys):
    code, failed, text = check(capsys, tmp_path / "nowhere")
    assert (code, failed) == (1, set())
    assert "no such folder" in text


def test_a_missing_tokenizer_is_an_error(folder, capsys):
    tokenizer_of(folder).unlink()
    assert check(capsys, folder)[0] == 1
    forget(folder)
    assert "--tokenizer" in check(capsys, folder)[2]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b"null", b"{}", b"[" * 200_000, b'{"files": {}}']
)
def test_a_malformed_manifest_is_an_error(folder, capsys, content):
    (folder / "manifest.json").write_bytes(content)
    code, failed, text = check(capsys, folder)
    assert (code, failed) == (1, set())
    assert "manifest.json: not a manifest of prepare.py" in text


JSON = st.none() | st.booleans() | st.integers() | st.sampled_from(["", "\0", "x"]) | st.just([])
JSON |= st.just({}) | st.just({"x": 1}) | st.floats()


def places(value, path=()):
    """The way to every part of a JSON value."""
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, part in value.items() if isinstance(value, dict) else ():
        yield from places(part, (*path, key))


def test_any_other_manifest_is_an_error_or_fails_or_passes(original, capsys, tmp_path):
    """A part of the manifest replaced by anything never ends in a traceback, nor does a run that
    finds it as its predecessor's."""
    manifest = json.loads((original / "manifest.json").read_text())
    ways = [way for way in places(manifest) if way]
    data = shutil.copytree(original.parent.parent, tmp_path / "data")
    folder = data / "datasets" / original.name
    source = str(original.parent.parent.parent / "in.jsonl")
    options = ["--tokenizer", str(tokenizer_of(folder)), "--name", "t", "--out", str(data)]
    args = prepare.parser().parse_args([source, *options])

    @settings(max_examples=150)
    @given(way=st.sampled_from(ways), value=JSON)
    def try_it(way, value):
        changed = json.loads(json.dumps(manifest))
        parent = changed
        for key in way[:-1]:
            parent = parent[key]
        parent[way[-1]] = value
        (folder / "manifest.json").write_text(json.dumps(changed))
        assert check(capsys, folder)[0] in (0, 1)
        assert build.is_current(prepare.job_from(args), prepare.TextSource(args)) in (True, False)

    try_it()


# ---- published sets


def test_a_small_set_of_a_published_name_fails_published(folder, capsys):
    forget(folder)
    tokenizer = tokenizer_of(folder)
    tokenizer.rename(tokenizer.with_name("fineweb_512_bpe.model"))
    named = folder.rename(folder.with_name("fineweb10B_sp512"))
    code, failed, text = check(capsys, named)
    assert (code, failed) == (1, {"published"})
    assert "50,000 documents and about 151.08 MB" in text


def test_the_tokenizer_of_byte260_is_its_published_description(tmp_path, capsys):
    made = make(tmp_path, TEXTS, "--byte-level", "--val-docs", VAL_DOCS)
    folder = made.folder.rename(made.folder.with_name("fineweb10B_byte260"))
    forget(folder)
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    config = ids | {"byte_offset": 4, "byte_count": 256}
    path = folder.parent.parent / "tokenizers" / "fineweb_pure_byte_260.json"
    path.write_text(json.dumps({"tokenizer_type": "pure_byte", "config": config}))
    assert check(capsys, folder)[:2] == (1, {"published"})


PUBLISHED = {"documents": 50_000, "tokens": 62_021_846, "decoded_bytes": 151_080_891}
CASEOPS = "sp8192_lossless_caps_caseops_v1_reserved"


@pytest.mark.parametrize("variant", ["sp1024", "byte260"])
def test_the_published_totals_hold(variant):
    found = Findings(**PUBLISHED)
    assert checks.check_published(variant, found).endswith("as published")


@pytest.mark.parametrize("shards", [1, 80])
def test_the_published_caseops_totals_hold(shards):
    found = Findings(**PUBLISHED | {"tokens": 47_851_520})
    assert checks.check_published(CASEOPS, found, shards).endswith("as published")


@pytest.mark.parametrize(
    ("change", "shards", "message"),
    [
        ({}, 1499, "1,499 train shards; the export has 80"),
        ({"documents": 10_000, "decoded_bytes": 30_200_000}, 80, "10,000 documents"),
        ({"tokens": 40_540_160}, 80, "about 47,850,000 tokens"),
    ],
)
def test_a_caseops_set_made_with_fewer_validation_documents_fails(change, shards, message):
    found = Findings(**PUBLISHED | {"tokens": 47_851_520} | change)
    with pytest.raises(DataError, match=message):
        checks.check_published(CASEOPS, found, shards)


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("sp1024", {"documents": 49_999}),
        ("byte260", {"documents": 50_001}),
        ("sp1024", {"decoded_bytes": 150_000_000}),
        ("byte260", {"decoded_bytes": 152_000_000}),
        ("sp1024", {"tokens": 61_000_000}),
        ("sp1024", {"tokens": 63_000_000}),
        ("sp8192", {}),
    ],
)
def test_other_totals_are_not_the_published_ones(variant, change):
    with pytest.raises(DataError, match="publish"):
        checks.check_published(variant, Findings(**PUBLISHED | change))
