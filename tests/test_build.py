"""data/build.py: chunks, the frozen order, splits, shards, tokenizers, the manifest."""

import hashlib
import io
import json
import lzma
import random
import struct
import sys
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
from conftest import compose_documents, shard_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vocabulary import trained

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import build
import checks
import prepare
import vocabulary
from shards import DataError

LOSSY = [
    "  two   blanks and\ttabs ",
    "½ ﬁne\u200b water\u200b",
    "\u3000wide\r\n\r\nlines\n",
    "☃ 日本 🙂",
    "e\u0301 ▁ <s> <unk>",
]


class InlinePool:
    """A WorkerPool that works in this process, which is faster."""

    def __init__(self, *_):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def map(self, function, items):
        return map(function, items)

    def shutdown(self, **_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def inline(monkeypatch):
    """No processes, and chunks of about three documents."""
    monkeypatch.setattr(build, "WorkerPool", InlinePool)
    monkeypatch.setattr(checks, "WorkerPool", InlinePool)
    monkeypatch.setattr(build, "CHUNK_CHARS", 1000)


def prepare_main(*arguments: object) -> int:
    """prepare.main as in a fresh process: without tokenizers that were loaded before."""
    vocabulary.load_vocabulary.cache_clear()
    return prepare.main([str(argument) for argument in arguments])


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@dataclass(frozen=True)
class Made:
    """A dataset on disk, read without the code under test."""

    folder: Path

    @property
    def manifest(self) -> dict:
        return json.loads((self.folder / "manifest.json").read_text())

    @property
    def tokenizer(self) -> Path:
        return self.folder / self.manifest["tokenizer"]["path"]

    def shards(self, split: str) -> list[tuple[int, ...]]:
        """The tokens of each shard, whose header must be right."""
        found = []
        for number, path in enumerate(sorted(self.folder.glob(f"fineweb_{split}_0*.bin"))):
            raw = path.read_bytes()
            tokens = struct.unpack(f"<{len(raw) // 2 - 512}H", raw[1024:])
            assert path.name == f"fineweb_{split}_{number:06d}.bin"
            assert struct.unpack("<256i", raw[:1024]) == (20240520, 1, len(tokens), *[0] * 253)
            found.append(tokens)
        return found

    def stream(self, split: str) -> list[int]:
        return [token for shard in self.shards(split) for token in shard]

    def documents(self, split: str, bos: int = 1) -> list[tuple[int, ...]]:
        """The tokens of each document, without BOS."""
        found: list[list[int]] = []
        for token in self.stream(split):
            if token == bos:
                found.append([])
            else:
                found[-1].append(token)
        return [tuple(ids) for ids in found]

    def texts(self, split: str) -> list[str]:
        sp = spm.SentencePieceProcessor(model_file=str(self.tokenizer))
        return [sp.decode(list(ids)) for ids in self.documents(split)]


def make(folder: Path, texts: list[str], *options: object) -> Made:
    """The dataset that prepare.py makes of the texts."""
    folder.mkdir(exist_ok=True)
    source = jsonl(folder / "in.jsonl", texts)
    arguments = (source, "--name", "t", "--out", folder / "out", *options)
    assert prepare_main(*arguments, "--processes", 1) == 0
    (made,) = (folder / "out" / "datasets").glob("t_*")
    return Made(made)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


TEXTS = compose_documents(40) + LOSSY


# ---- the stream


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("size", [100, 1000, 10**8])
def test_shards_hold_bos_and_tokens_of_each_document_in_order(tmp_path, dataset, size):
    options = ("--tokenizer", dataset.tokenizer, "--val-docs", 7, "--shard-tokens", size)
    made = make(tmp_path, TEXTS, *options)
    encoded = [[1, *ids] for ids in dataset.sp.encode(TEXTS)]
    for split, part in (("val", encoded[:7]), ("train", encoded[7:])):
        stream = [token for ids in part for token in ids]
        assert made.stream(split) == stream
        lengths = [len(shard) for shard in made.shards(split)]
        full, rest = divmod(len(stream), size)
        assert lengths == [size] * full + [rest] * (rest > 0)


@pytest.mark.usefixtures("inline")
def test_manifest_counts_what_is_there(tmp_path, dataset):
    made = make(tmp_path, LOSSY + TEXTS, "--tokenizer", dataset.tokenizer, "--val-docs", 6)
    kept = LOSSY + TEXTS[:-5]  # those at the end are in validation
    for split, texts in (("val", kept[:6]), ("train", kept[6:])):
        ids = dataset.sp.encode(texts)
        decoded = [dataset.sp.decode(i) for i in ids]
        assert made.manifest["splits"][split] == {
            "documents": len(texts),
            "tokens": sum(len(i) + 1 for i in ids),
            "bytes": sum(len(text.encode()) for text in texts),
            "decoded_bytes": sum(len(text.encode()) for text in decoded),
            "unknown_tokens": 0,
            "unknown_bytes": 0,
        }
    assert made.manifest["skipped"] == {"duplicate of validation": 5}


@pytest.mark.usefixtures("inline")
def test_manifest_names_and_digests_every_other_file(tmp_path, dataset):
    made = make(tmp_path, TEXTS, "--tokenizer", dataset.tokenizer, "--byte-sidecar")
    manifest = made.manifest
    files = {
        path.name: {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in made.folder.iterdir()
        if path.name != "manifest.json"
    }
    assert manifest["files"] == files
    assert len(files) == 3
    model = dataset.tokenizer.read_bytes()
    assert made.tokenizer.read_bytes() == model
    assert made.tokenizer.resolve() == tmp_path / "out/tokenizers" / dataset.tokenizer.name
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(model).hexdigest()
    assert manifest["tokenizer"]["vocab_size"] == 512
    source = tmp_path / "in.jsonl"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    expected = {"name": "in.jsonl", "size": source.stat().st_size, "sha256": digest}
    assert manifest["inputs"] == [expected]
    assert manifest["versions"]["sentencepiece"] == spm.__version__


@pytest.mark.usefixtures("inline")
def test_text_that_normalizes_to_nothing_is_skipped_and_counted(tmp_path, dataset):
    texts = ["\u200b\ufeff", *TEXTS[:9], "\u200b", TEXTS[9]]
    made = make(tmp_path, texts, "--tokenizer", dataset.tokenizer, "--val-docs", 2)
    assert made.manifest["skipped"] == {"no tokens": 2}
    assert made.texts("val") == TEXTS[:1]  # the first two documents, of which one is empty
    assert made.texts("train") == TEXTS[1:10]


# ---- the same bytes


@pytest.mark.parametrize("options", [(), ("--shuffle-seed", "3", "--byte-sidecar")])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path, dataset, monkeypatch, options):
    monkeypatch.setattr(build, "CHUNK_CHARS", 2000)  # a dozen tasks
    source, found = jsonl(tmp_path / "in.jsonl", TEXTS), []
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        arguments = (source, "--tokenizer", dataset.tokenizer, "--out", out, *options)
        assert prepare_main(*arguments, "--processes", processes) == 0
        found.append(contents(out))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 4 + ("--byte-sidecar" in options)


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("size", [1, 10**9])
def test_chunks_of_any_size_give_the_same_bytes(tmp_path, dataset, monkeypatch, size):
    options = ("--vocab-size", 400, "--shuffle-seed", 1, "--val-docs", 5, "--byte-sidecar")
    make(tmp_path / "a", TEXTS, *options)
    monkeypatch.setattr(build, "CHUNK_CHARS", size)
    make(tmp_path / "b", TEXTS, *options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.usefixtures("inline")
def test_seeds_give_other_orders_of_the_same_documents(tmp_path, dataset):
    texts, orders = compose_documents(60), []
    for seed in ((), ("--shuffle-seed", 0), ("--shuffle-seed", 1)):
        options = ("--tokenizer", dataset.tokenizer, "--val-docs", 20, *seed)
        made = make(tmp_path / f"s{len(orders)}", texts, *options)
        orders.append(made.documents("val") + made.documents("train"))
    assert len({tuple(order) for order in orders}) == 3
    assert [Counter(order) for order in orders] == [Counter(orders[0])] * 3
    assert orders[0] == [tuple(ids) for ids in dataset.sp.encode(texts)]


def test_a_shuffled_order_is_that_of_the_seed_alone(tmp_path):
    first, again = (build.frozen_order(1000, 5, tmp_path).tolist() for _ in range(2))
    assert first == again
    assert sorted(first) == list(range(1000)) != first


@pytest.mark.parametrize("count", [1, 2**20, 2**20 + 1])
def test_an_order_without_a_seed_is_that_of_the_inputs(tmp_path, count):
    assert np.array_equal(build.frozen_order(count, None, tmp_path), np.arange(count))


# ---- duplicates


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("seed", [(), ("--shuffle-seed", 2)])
def test_training_documents_that_are_validation_documents_are_dropped(tmp_path, dataset, seed):
    """Each text stands twice or thrice, so a split without that rule shares some."""
    texts = compose_documents(30)
    texts = texts + texts[::-1] + texts[:7]
    options = ("--tokenizer", dataset.tokenizer, "--val-docs", 12, *seed)
    made = make(tmp_path, texts, *options)
    val, train = made.documents("val"), made.documents("train")
    assert len(val) == 12
    assert not set(val) & set(train)
    copies = Counter(tuple(ids) for ids in dataset.sp.encode(texts))
    assert Counter(val) + Counter(train) == copies - Counter(
        {ids: copies[ids] - Counter(val)[ids] for ids in set(val)}
    )
    dropped = {"duplicate of validation": len(texts) - len(val) - len(train)}
    assert made.manifest["skipped"] == dropped


@pytest.mark.usefixtures("inline")
def test_duplicates_are_those_of_tokens_not_of_text(tmp_path, dataset):
    made = make(
        tmp_path,
        ["the  water", "a place", "the water ", "a house"],
        *("--tokenizer", dataset.tokenizer, "--val-docs", 1),
    )
    assert made.texts("val") == ["the water"]
    assert made.texts("train") == ["a place", "a house"]


@pytest.mark.usefixtures("inline")
def test_duplicates_within_a_split_stay(tmp_path, dataset):
    texts = ["one", "one", "two", "two", "one"]
    made = make(tmp_path, texts, "--tokenizer", dataset.tokenizer, "--val-docs", 2)
    assert (made.texts("val"), made.texts("train")) == (["one", "one"], ["two", "two"])
    assert made.manifest["skipped"] == {"duplicate of validation": 1}


# ---- how many documents are for validation


SOURCE = SimpleNamespace(val_fraction=0.01, val_last=False)


def job(**changes) -> build.Job:
    options = {
        **{"name": "t", "out": Path("nowhere"), "tokenizer": None, "vocab_size": 0},
        **{"byte_level": True, "tokenizer_bytes": 1, "val_docs": None, "val_fraction": None},
        **{"shuffle_seed": None, "shard_tokens": 1, "byte_sidecar": False, "processes": 1},
    }
    return build.Job(**(options | changes))


@pytest.mark.parametrize(
    ("count", "size"),
    [(2, 1), (99, 1), (149, 1), (151, 2), (4999, 50), (5_000_000, 50_000), (10**8, 50_000)],
)
def test_one_percent_is_for_validation_at_most_50000(count, size):
    assert build.validation_size(job(), SOURCE, count) == size


def test_val_docs_says_how_many():
    assert build.validation_size(job(val_docs=60_000), SOURCE, 60_001) == 60_000


@pytest.mark.parametrize(("val_docs", "count"), [(None, 1), (None, 0), (5, 5), (5, 4)])
def test_a_split_without_documents_is_refused(val_docs, count):
    with pytest.raises(DataError, match=r"--val-docs"):
        build.validation_size(job(val_docs=val_docs), SOURCE, count)


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], (), "no document"),
        (["one"], (), "1 document"),
        (["one", "two"], ("--val-docs", 2), "2 of them"),
        (["one", "one"], (), "no training document"),
        (["\u200b", "one"], (), "no validation document"),
    ],
)
def test_too_few_documents_are_an_error(tmp_path, dataset, capsys, texts, options, message):
    source = jsonl(tmp_path / "in.jsonl", texts)
    arguments = (source, "--tokenizer", dataset.tokenizer, "--out", tmp_path, *options)
    assert prepare_main(*arguments) == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "datasets").glob("[!.]*"))


# ---- tokenizers


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("seed", [None, 4])
def test_tokenizer_is_trained_on_the_training_documents_alone(tmp_path, seed):
    """Each document has a word of its own that would be worth a piece."""
    texts = compose_documents(40)
    words = ["".join(random.Random(i).choices("bcdfghjklm", k=9)) for i in range(40)]
    texts = [text + f" {word}" * 60 for text, word in zip(texts, words, strict=True)]
    options = ("--vocab-size", 1024, "--val-docs", 10)
    options += () if seed is None else ("--shuffle-seed", seed)
    made = make(tmp_path, texts, *options)
    sp = spm.SentencePieceProcessor(model_file=str(made.tokenizer))
    known = {word for word in words if sp.piece_to_id("▁" + word) != sp.unk_id()}
    in_split = {
        split: {word for word in words if any(word in text for text in made.texts(split))}
        for split in ("val", "train")
    }
    assert (len(in_split["val"]), len(in_split["train"])) == (10, 30)
    assert known == in_split["train"]


@pytest.mark.usefixtures("inline")
def test_trained_tokenizer_is_as_large_as_asked_and_makes_the_tokens(tmp_path):
    made = make(tmp_path, TEXTS, "--vocab-size", 450)
    sp = spm.SentencePieceProcessor(model_file=str(made.tokenizer))
    assert (len(sp), made.folder.name, made.tokenizer.name) == (450, "t_sp450", "t_450_bpe.model")
    assert made.documents("train") == [tuple(ids) for ids in sp.encode(TEXTS[1:])]


@pytest.mark.parametrize(
    ("limit", "expected"), [(1000, "bcdfghij"), (500, "bdgi"), (300, "bg"), (10, "b")]
)
def test_tokenizer_texts_are_spread_over_the_training_documents(limit, expected):
    chunks = [[100 * letter for letter in part] for part in ("abc", "", "defgh", "ij")]
    found = build.tokenizer_texts(chunks, np.array([0, 4]), 1000, limit)
    assert [text[0] for text in found] == list(expected)


@pytest.mark.usefixtures("inline")
def test_standard_input_is_enough_to_train_a_tokenizer(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    stream = SimpleNamespace(buffer=io.BytesIO(source.read_bytes()))
    monkeypatch.setattr(sys, "stdin", stream)
    options = ("--name", "t", "--vocab-size", 400)
    assert prepare_main("-", "--out", tmp_path / "stdin", *options) == 0
    assert prepare_main(source, "--out", tmp_path / "file", *options) == 0
    piped, read = (Made(tmp_path / name / "datasets/t_sp400") for name in ("stdin", "file"))
    assert piped.stream("train") == read.stream("train")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert piped.manifest["inputs"] == [{"name": "-", "sha256": digest}]


@pytest.mark.usefixtures("inline")
def test_documents_without_line_breaks_train_a_tokenizer(tmp_path):
    """The trainer ignores a line of more than 4192 bytes."""
    texts = [" ".join(compose_documents(60, seed=i)) for i in range(4)]
    assert min(map(len, texts)) > 10_000
    made = make(tmp_path, texts, "--vocab-size", 500)
    assert made.manifest["tokenizer"]["vocab_size"] == 500


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("texts", [["a few words"] * 3, ["\u3000x"] * 9, []])
def test_too_little_text_for_a_tokenizer_is_an_error(tmp_path, capsys, texts):
    source = jsonl(tmp_path / "in.jsonl", texts)
    assert prepare_main(source, "--vocab-size", 1024, "--out", tmp_path) == 1
    assert "prepare.py: error: " in capsys.readouterr().err


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("described", [False, True])
def test_byte_level_tokens_are_the_bytes(tmp_path, described):
    options: tuple[object, ...] = ("--byte-level",)
    if described:
        path = tmp_path / "fineweb_pure_byte_260.json"
        ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
        config = ids | {"byte_offset": 4, "byte_count": 256}
        form = {"tokenizer_type": "pure_byte", "config": config, "vocab_size": 260}
        path.write_text(json.dumps(form))
        options = ("--tokenizer", path)
    made = make(tmp_path, TEXTS, *options, "--val-docs", 5)
    documents = made.documents("val") + made.documents("train")
    assert [bytes(i - 4 for i in ids).decode() for ids in documents] == TEXTS
    assert made.folder.name == "t_byte260"
    name = "fineweb_pure_byte_260.model" if described else "byte_260.model"
    assert made.tokenizer.name == name
    assert made.texts("train") == TEXTS[5:]  # sentencepiece loads the model, as train_gpt.py does


@pytest.mark.usefixtures("inline")
def test_a_dataset_that_names_a_description_is_made_again(tmp_path, capsys):
    """Before, the line to train with named a file that train_gpt.py cannot load."""
    path = tmp_path / "bytes.json"
    path.write_text(json.dumps({"config": vocabulary.BYTE_LEVEL_CONFIG}))
    made = make(tmp_path, TEXTS, "--tokenizer", path)
    whole = contents(made.folder)
    manifest = made.manifest
    old = made.tokenizer.rename(made.tokenizer.with_suffix(".json"))
    manifest["tokenizer"]["path"] = f"../../tokenizers/{old.name}"
    old.write_bytes(path.read_bytes())
    manifest["tokenizer"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (made.folder / "manifest.json").write_text(json.dumps(manifest))
    make(tmp_path, TEXTS, "--tokenizer", path)
    assert contents(made.folder) == whole
    assert "bytes.model" in capsys.readouterr().out.splitlines()[-1]


# ---- sidecars


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("size", [64, 10**8])
def test_sidecar_holds_the_original_bytes_of_each_document(tmp_path, dataset, size):
    texts = ["the" + " " * 70_000 + "water, the place", *LOSSY, *compose_documents(20)]
    options = ("--tokenizer", dataset.tokenizer, "--byte-sidecar", "--shard-tokens", size)
    made = make(tmp_path, texts, *options, "--val-docs", 15)
    sizes, tokens = made.shards("val_bytes"), made.shards("val")
    assert [len(part) for part in sizes] == [len(part) for part in tokens]
    sums: list[int] = []
    for token, count in zip(made.stream("val"), made.stream("val_bytes"), strict=True):
        if token == 1:
            sums.append(0)
            assert count == 0
        sums[-1] += count
    assert sums == [len(text.encode()) for text in texts[:15]]
    assert made.shards("train_bytes") == []


LOSSY_TEXTS = st.lists(
    st.sampled_from(["  ", "\t", "½", "ﬁ", "\u200b", "\n", "the", " water", "☃"])
    | st.text(max_size=4),
    min_size=1,
    max_size=8,
).map("".join)


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("kind", ["tokenizer", "byte level"])
def test_arbitrary_texts_are_kept_or_counted(tmp_path_factory, dataset, kind):
    """From texts to shards, sidecars and counts, whatever is in the texts."""
    chosen = ("--byte-level",) if kind == "byte level" else ("--tokenizer", dataset.tokenizer)

    @settings(max_examples=60)
    @given(texts=st.lists(LOSSY_TEXTS, min_size=2, max_size=12))
    def check(texts):
        folder = tmp_path_factory.mktemp("fuzz")
        source = jsonl(folder / "in.jsonl", texts)
        arguments = (source, "--name", "t", "--out", folder, "--byte-sidecar", *chosen)
        code = prepare_main(*arguments, "--val-docs", 1)
        assert code in (0, 1)
        found = list(folder.glob("datasets/t_*"))
        assert len(found) == (code == 0)
        if code == 0:
            check_against(Made(found[0]), texts)

    def check_against(made, texts):
        usable = [text for text in texts if text.strip() and "\0" not in text]
        manifest = made.manifest
        val, train = manifest["splits"]["val"], manifest["splits"]["train"]
        kept = val["documents"] + train["documents"]
        assert kept + sum(manifest["skipped"].values()) == len(texts)
        sp = spm.SentencePieceProcessor(model_file=str(made.tokenizer))
        encoded = [tuple(sp.encode(text)) for text in usable]
        first, rest = encoded[0], [e for e in encoded[1:] if e and e != encoded[0]]
        assert (made.documents("val"), made.documents("train")) == ([first], rest)
        size = len(usable[0].encode())
        assert sum(made.stream("val_bytes")) == val["bytes"] == size
        pairs = zip(usable[1:], encoded[1:], strict=True)
        total = sum(len(text.encode()) for text, e in pairs if e and e != first)
        assert train["bytes"] == total

    check()


@pytest.mark.usefixtures("inline")
@settings(max_examples=80)
@given(
    lines=st.lists(
        st.binary(max_size=30)
        | st.text(max_size=10).map(lambda t: json.dumps({"text": t}).encode())
        | st.text(max_size=10).map(lambda t: json.dumps({"text": t}, ensure_ascii=False).encode())
        | st.sampled_from([b'{"text": 1}', b"[]", b'{"text": "\\ud800"}', b"{", b'{"text": ""}']),
        max_size=12,
    )
)
def test_arbitrary_lines_never_break_it(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("lines")
    (folder / "in.jsonl").write_bytes(b"\n".join(lines))
    arguments = ("--byte-level", "--name", "t", "--out", folder)
    code = prepare_main(folder / "in.jsonl", *arguments)
    assert code in (0, 1)
    if code == 0:
        made = Made(folder / "datasets/t_byte260")
        nonblank = [line for line in b"\n".join(lines).split(b"\n") if line.strip()]
        counts = made.manifest["splits"].values()
        kept = sum(n["documents"] for n in counts)
        assert kept + sum(made.manifest["skipped"].values()) == len(nonblank)
        tokens = len(made.stream("val") + made.stream("train"))
        assert sum(n["bytes"] for n in counts) == tokens - kept


# ---- tokenizers of other kinds: without byte pieces, with another BOS


UNKNOWN = [
    "the ☃ water",
    "日本",
    "a place",
    "½☃ and☃\u3000☃ the",
    "a house  ",
    "so 🙂🙂 ",
    "e\u0301☃",
]


def unknown_bytes(sp, texts: list[str]) -> int:
    """The bytes of the characters that are no piece; none of them is changed by normalization."""
    chars = [char for text in texts for char in text if char in "☃日本🙂"]
    assert all(sp.piece_to_id(char) == sp.unk_id() for char in chars)
    return sum(len(char.encode()) for char in chars)


@pytest.mark.usefixtures("inline")
def test_bytes_lost_to_unknown_pieces_are_counted_apart(tmp_path, capsys):
    model = tmp_path / "no_bytes.model"
    model.write_bytes(trained(byte_fallback=False, vocab_size=300))
    sp = spm.SentencePieceProcessor(model_file=str(model))
    made = make(tmp_path, UNKNOWN, "--tokenizer", model, "--val-docs", 2, "--byte-sidecar")
    printed = capsys.readouterr().out
    for split, texts in (("val", UNKNOWN[:2]), ("train", UNKNOWN[2:])):
        counts = made.manifest["splits"][split]
        total, lost = sum(len(text.encode()) for text in texts), counts["unknown_bytes"]
        assert counts["bytes"] == total
        assert counts["unknown_tokens"] == sum(ids.count(sp.unk_id()) for ids in sp.encode(texts))
        assert f"{split}: {lost:,} bytes ({lost / total:.2%}) of the text are characters" in printed
    assert made.manifest["splits"]["val"]["unknown_bytes"] == unknown_bytes(sp, UNKNOWN[:2])
    kept = [split["decoded_bytes"] for split in made.manifest["splits"].values()]
    known = sum(n["bytes"] - n["unknown_bytes"] for n in made.manifest["splits"].values())
    assert f"{sum(kept) / known:.2%} of the other bytes (normalization)" in printed
    unknown = [token == sp.unk_id() for token in made.stream("val")]
    sidecar = [n for n, lost in zip(made.stream("val_bytes"), unknown, strict=True) if lost]
    assert sum(sidecar) == unknown_bytes(sp, UNKNOWN[:2])


@pytest.mark.usefixtures("inline")
def test_what_no_unknown_piece_holds_is_normalization(tmp_path, dataset, capsys):
    make(tmp_path, LOSSY + TEXTS, "--tokenizer", dataset.tokenizer)
    printed = capsys.readouterr().out
    assert "unknown pieces" not in printed
    assert "of the text's bytes (normalization)" in printed


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("ids", [{"bos_id": 5}, {"bos_id": 0, "pad_id": 1}, {"bos_id": 300}])
def test_bos_is_the_tokenizers_whatever_its_id(tmp_path, capsys, ids):
    model = tmp_path / "bos.model"
    model.write_bytes(trained(**ids))
    sp = spm.SentencePieceProcessor(model_file=str(model))
    bos = ids["bos_id"]
    options = ("--tokenizer", model, "--val-docs", 6, "--byte-sidecar", "--shard-tokens", 300)
    made = make(tmp_path, LOSSY + compose_documents(30), *options)
    encoded = [tuple(i) for i in sp.encode(LOSSY + compose_documents(30))]
    assert made.documents("val", bos) == encoded[:6]
    assert made.documents("train", bos) == encoded[6:]
    sizes = [[] for _ in range(6)]
    document = -1
    for token, size in zip(made.stream("val"), made.stream("val_bytes"), strict=True):
        document += token == bos
        sizes[document].append(size)
    texts = (LOSSY + compose_documents(30))[:6]
    assert [part[0] for part in sizes] == [0] * 6
    assert [sum(part) for part in sizes] == [len(text.encode()) for text in texts]
    capsys.readouterr()
    assert prepare_main("--check", made.folder) == 0
    assert "6 documents" in capsys.readouterr().out
    shard = made.folder / "fineweb_val_000000.bin"
    shard.write_bytes(shard_bytes([1 + (bos == 1), *made.shards("val")[0][1:]]))
    assert prepare_main("--check", made.folder) == 1
    assert "not with BOS" in capsys.readouterr().out


# ---- resuming


@pytest.mark.usefixtures("inline")
def test_chunks_on_disk_are_not_made_again(tmp_path, dataset, monkeypatch):
    texts, made = compose_documents(8), []
    encode = vocabulary.Vocabulary.encode
    monkeypatch.setattr(
        vocabulary.Vocabulary,
        "encode",
        lambda self, texts: made.append(texts) or encode(self, texts),
    )
    task = build.Task(dataset.tokenizer, sidecar=True)
    first = build.encode_chunk(tmp_path, 3, texts, task)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = build.encode_chunk(tmp_path, 3, texts, task)
    assert made == [texts]
    assert again.tobytes() == first.tobytes()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("change", ["text", "border", "tokenizer", "sidecar"])
def test_chunks_of_something_else_are_made_again(tmp_path, dataset, models_apart, change):
    texts, tokenizer, sidecar = ["the water", "a place"], dataset.tokenizer, False
    build.encode_chunk(tmp_path, 0, texts, build.Task(tokenizer, sidecar))
    if change == "text":
        texts = ["the water", "a plane"]
    elif change == "border":
        texts = ["the watera", " place"]
    elif change == "tokenizer":
        tokenizer = models_apart
    else:
        sidecar = True
    entries = build.encode_chunk(tmp_path, 0, texts, build.Task(tokenizer, sidecar))
    sp = spm.SentencePieceProcessor(model_file=str(tokenizer))
    encoded = sp.encode(texts)
    assert entries["tokens"].tolist() == [len(ids) for ids in encoded]
    stored = np.fromfile(tmp_path / "chunk_000000.tokens", "<u2").tolist()
    assert stored == [token for ids in encoded for token in ids]
    assert (tmp_path / "chunk_000000.bytes").exists() == sidecar


@pytest.fixture
def models_apart(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "other.model"
    path.write_bytes(vocabulary.train_tokenizer(compose_documents(60, seed=9), 400))
    return path


def test_a_document_that_decodes_to_other_bytes_is_an_error():
    build.check_bytes(5, 5)
    with pytest.raises(DataError, match="byte audit"):
        build.check_bytes(5, 6)


@pytest.mark.usefixtures("inline")
def test_validation_documents_are_decoded_while_the_set_is_made(
    tmp_path, dataset, monkeypatch, capsys
):
    monkeypatch.setattr(vocabulary.Vocabulary, "decoded_bytes", lambda *_: 1)
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    assert prepare_main(source, "--tokenizer", dataset.tokenizer, "--out", tmp_path) == 1
    assert "byte audit" in capsys.readouterr().err


# ---- real text


@pytest.mark.parametrize("size", [1024, 8192])
def test_the_shared_corpus_is_as_an_independent_encoding_of_it(tmp_path, size):
    """With the published tokenizers: tokens are SentencePiece's, bytes those of its decoding."""
    shared = Path(__file__).resolve().parent.parent.parent / "shared"
    source, model = shared / "corpus/val.jsonl.xz", shared / f"tokenizers/fineweb_{size}_bpe.model"
    if not (source.exists() and model.exists()):
        pytest.skip("no shared corpus here")
    assert prepare_main(source, "--tokenizer", model, "--out", tmp_path, "--val-docs", 100) == 0
    folder = tmp_path / f"datasets/mine_sp{size}"
    sp = spm.SentencePieceProcessor(model_file=str(model))
    with lzma.open(source) as file:
        texts = [json.loads(line)["text"] for line in file]
    expected = [[sp.bos_id(), *ids] for ids in sp.encode(texts)]
    counts = json.loads((folder / "manifest.json").read_text())["splits"]
    for split, part in (("val", slice(100)), ("train", slice(100, None))):
        tokens = np.fromfile(folder / f"fineweb_{split}_000000.bin", "<u2", offset=1024)
        assert tokens.tolist() == [i for ids in expected[part] for i in ids]
        assert counts[split]["bytes"] == sum(len(text.encode()) for text in texts[part])
        decoded = sp.decode(expected[part])
        if size == 8192:  # the other one has no byte fallback: unknown characters decode to " ⁇ "
            assert counts[split]["decoded_bytes"] == sum(len(text.encode()) for text in decoded)
