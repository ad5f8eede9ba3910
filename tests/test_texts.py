"""Plain texts: what data/prepare.py cuts into documents, where, and which end is for validation."""

import gzip
import io
import json
import random
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece as spm
from conftest import WORDS, compose_documents
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_build import Made, contents, inline, jsonl, prepare_main  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import build
import prepare
import sources
from rendering import RecordFormat
from sources import PIECE_BYTES, Problems, Source, join_blank, size_pieces

pytestmark = pytest.mark.usefixtures("inline")


def speeches(count: int, seed: int = 0) -> list[str]:
    """Paragraphs of about 100 bytes, no two alike, as in a play."""
    rng = random.Random(seed)
    return [
        f"Speaker {i % 7} of {seed}:\n{i} " + " ".join(rng.choices(WORDS, k=rng.randint(3, 30)))
        for i in range(count)
    ]


def play(count: int = 1200, seed: int = 0, between: str = "\n\n") -> str:
    """About 120 kB of text with blank lines between its speeches."""
    return between.join(speeches(count, seed)) + "\n"


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def prepared(out: Path, *arguments: object) -> Made:
    """The byte-level dataset of some inputs: its texts are the documents, byte for byte."""
    assert prepare_main(*arguments, "--byte-level", "--name", "t", "--out", out) == 0
    return Made(out / "datasets/t_byte260")


def documents(made: Made) -> list[str]:
    """Training, then validation documents, which is the order of a text."""
    parts = made.documents("train") + made.documents("val")
    return [bytes(token - 4 for token in ids).decode() for ids in parts]


def read(*inputs: object, **options) -> list[str]:
    """The documents of some inputs as the command line has them read."""
    names = [str(name) for name in inputs]
    options = {"split_text": "auto"} | options
    source = Source(names, RecordFormat(), Problems(strict=False), 2**23, **options)
    return [document.text for document in source.documents()]


def stdin_of(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


# ---- where a text is cut


TEXT = st.lists(
    st.sampled_from(["\n\n", "\n", "\r\n\r\n", " ", "\u3000", "word", "é", "🙂🙂", "x" * 9])
    | st.text(max_size=3),
    max_size=40,
).map("".join)


@settings(max_examples=400)
@example(text="ab" + "\n" * 60, size=4, step=3)
@example(text="\u3000" * 30 + "ab", size=5, step=1)
@example(text="🙂" * 9, size=4, step=1)
@given(text=TEXT, size=st.integers(4, 20), step=st.integers(1, 50))
def test_pieces_are_the_text_in_the_sizes_that_were_asked_for(text, size, step):
    data = text.encode()
    chunks = [data[i : i + step] for i in range(0, len(data), step)]
    pieces = list(size_pieces(chunks, size))
    assert pieces == list(size_pieces([data], size))  # whatever the chunks
    assert b"".join(pieces) == data
    assert [piece.decode() for piece in pieces]  # no character is cut
    assert all(size <= len(piece) <= 2 * size for piece in pieces[:-1])
    assert len(pieces[-1]) >= (size // 2 if len(pieces) > 1 else 0)
    joined = list(join_blank(pieces, 10**6))
    assert b"".join(joined) == data
    assert all(piece.decode().strip() for piece in joined) or not text.strip()


@pytest.mark.parametrize("between", ["\n\n", "\r\n\r\n", "\n \t\n", "\n\n\n\n"])
def test_a_text_is_cut_at_blank_lines(tmp_path, between):
    text = play(between=between)
    found = read(write(tmp_path / "a.txt", text))
    assert "".join(found) == text
    assert len(found) > 20
    assert all(PIECE_BYTES <= len(part.encode()) < PIECE_BYTES + 400 for part in found[:-1])
    assert all(part.endswith(between) for part in found[:-1])
    assert all(part.startswith("Speaker") for part in found)


@pytest.mark.parametrize(
    ("mark", "end"), [("\n", "\n"), (" ", " "), ("", "")], ids=["lines", "spaces", "characters"]
)
def test_without_blank_lines_it_is_cut_at_what_there_is(tmp_path, mark, end):
    words = compose_documents(60) if mark == "\n" else ["日本"] * 9000
    text = mark.join(words)
    found = read(write(tmp_path / "a.txt", text))
    assert "".join(found) == text
    assert len(found) > 5
    assert all(part.endswith(end) for part in found[:-1])
    assert all(PIECE_BYTES <= len(part.encode()) <= 2 * PIECE_BYTES for part in found[:-1])


def test_a_heading_stays_with_what_follows_it(tmp_path):
    parts = [f"Chapter {i}\n\n" + "\n".join(speeches(50, i)) for i in range(9)]
    found = read(write(tmp_path / "a.md", "\n\n".join(parts)))
    assert [part.splitlines()[0] for part in found] == [f"Chapter {i}" for i in range(9)]


def test_a_long_run_of_white_space_costs_no_text_and_is_no_fault(tmp_path):
    text = "\n" * 20_000 + play(100) + "\u3000" * 20_000 + play(100, 1) + "\n" * 20_000
    source = Source(
        [str(write(tmp_path / "a.txt", text))],
        *(RecordFormat(), Problems(strict=True), 2**23),
        split_text="auto",
    )
    found = [document.text for document in source.documents()]
    assert "".join(found) == text
    assert len(found) > 4


def test_documents_say_the_line_at_which_they_start(tmp_path):
    path = write(tmp_path / "a.txt", play())
    source = Source([str(path)], RecordFormat(), Problems(True), 2**23, split_text="auto")
    found = list(source.documents())
    lines = path.read_text().splitlines()
    for document in found:
        number = int(document.where.removeprefix(f"{path}:"))
        assert lines[number - 1] == document.text.splitlines()[0]
    assert len({document.where for document in found}) == len(found) > 9


def test_memory_does_not_grow_with_the_text(tmp_path):
    peaks = []
    for megabytes in (2, 20):
        path = write(tmp_path / "a.txt", play(1000) * (megabytes * 8))
        source = Source([str(path)], RecordFormat(), Problems(True), 2**23, split_text="auto")
        tracemalloc.start()
        assert sum(len(document.text.encode()) for document in source.documents()) > 10**6
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000


def test_of_a_damaged_text_what_precedes_the_damage_is_kept(tmp_path):
    text = play(6000)
    packed = gzip.compress(text.encode())
    found = read(write(tmp_path / "a.txt.gz", packed[: len(packed) // 2]))
    assert text.startswith("".join(found))
    assert len("".join(found)) > len(text) // 3


def test_an_invalid_byte_costs_one_document(tmp_path):
    data = play().encode()
    whole = read(write(tmp_path / "a.txt", data))
    found = read(write(tmp_path / "b.txt", data.replace(b"Speaker 3", b"Speaker \xff", 1)))
    assert found == whole[1:] != []


def test_samples_are_documents_of_a_text(tmp_path):
    path = write(tmp_path / "a.txt", play())
    assert read(path, samples=4) == read(path)[:4]
    assert len(read(path)) > 4


# ---- the end of a text is for validation


def test_one_text_file_becomes_a_dataset_with_its_end_for_validation(tmp_path, capsys):
    text = play(10_000)
    made = prepared(tmp_path / "out", write(tmp_path / "input.txt", text))
    printed = capsys.readouterr().out
    assert "".join(documents(made)) == text
    splits = made.manifest["splits"]
    assert 0.09 < splits["val"]["bytes"] / len(text.encode()) < 0.11
    share = f"{splits['val']['documents']} of {len(documents(made))} documents"
    assert f"the end of the text, {share}, is for validation (--val-fraction)" in printed
    assert "plain text is cut at blank lines: documents of about 3,000 bytes" in printed
    assert prepare_main("--check", made.folder) == 0


def test_two_large_texts_give_a_tenth_for_validation_not_half(tmp_path):
    first, second = play(4000, 1), play(4000, 2)
    inputs = (write(tmp_path / "a.txt", first), write(tmp_path / "b.txt", second))
    made = prepared(tmp_path / "out", *inputs)
    assert "".join(documents(made)) == first + second
    assert 0.09 < made.manifest["splits"]["val"]["bytes"] / len((first + second).encode()) < 0.11


@pytest.mark.parametrize("ending", [".md", ".txt.gz", "-"])
def test_a_text_is_the_same_however_it_comes(tmp_path, monkeypatch, ending):
    text = play()
    expected = read(write(tmp_path / "a.txt", text))
    if ending == "-":
        stdin_of(monkeypatch, b"\xef\xbb\xbf" + text.encode())
        made = prepared(tmp_path / "out", "-")
    else:
        packed = gzip.compress(text.encode()) if ending.endswith("gz") else text.encode()
        made = prepared(tmp_path / "out", write(tmp_path / f"b{ending}", packed))
    assert documents(made) == expected
    assert len(made.documents("val")) == round(len(expected) / 10)


def test_the_tokenizer_is_trained_without_the_end(tmp_path):
    text = play() + " zyzzyvas" * 800
    source = write(tmp_path / "a.txt", text)
    assert prepare_main(source, "--vocab-size", 400, "--name", "t", "--out", tmp_path / "out") == 0
    made = Made(tmp_path / "out/datasets/t_sp400")
    assert "zyzzyvas" in made.texts("val")[-1]
    sp = spm.SentencePieceProcessor(model_file=str(made.tokenizer))
    assert not any("zz" in sp.id_to_piece(i) for i in range(400))


def test_val_fraction_and_val_docs_say_how_much_of_the_end(tmp_path):
    source = write(tmp_path / "a.txt", play())
    count = len(read(source))
    for options, expected in (
        (("--val-fraction", 0.25), round(count / 4)),
        (("--val-docs", 3), 3),
    ):
        made = prepared(tmp_path / "out", source, *options)
        assert len(made.documents("val")) == expected
        assert "".join(documents(made)) == play()


def test_val_fraction_is_of_records_too_and_has_no_upper_bound(tmp_path):
    texts = compose_documents(40)
    made = prepared(tmp_path / "out", jsonl(tmp_path / "a.jsonl", texts), "--val-fraction", 0.5)
    assert documents(made) == texts[20:] + texts[:20]  # the first are for validation
    job = prepare.job_from(prepare.parser().parse_args(["--val-fraction", "0.5"]))
    source = SimpleNamespace(val_fraction=0.01, val_last=False)
    assert build.validation_size(job, source, 10**6) == 500_000


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "nan", "10%", "inf"])
def test_a_fraction_that_is_none_is_refused(capsys, value):
    with pytest.raises(SystemExit):
        prepare_main("a.txt", "--byte-level", "--val-fraction", value)
    assert "expected a number between 0 and 1" in capsys.readouterr().err


def test_a_shuffled_text_has_validation_documents_from_all_of_it(tmp_path):
    source, found = write(tmp_path / "a.txt", play()), []
    for number in range(2):
        made = prepared(tmp_path / f"out{number}", source, "--shuffle-seed", 3)
        found.append(contents(made.folder))
    assert found[0] == found[1]
    whole = read(source)
    assert sorted(documents(made)) == sorted(whole)
    places = [whole.index(bytes(i - 4 for i in ids).decode()) for ids in made.documents("val")]
    assert any(abs(a - b) > 1 for a, b in pairwise(places))


# ---- which texts are cut


@pytest.mark.parametrize(("count", "cut"), [(9, True), (10, False)])
def test_few_texts_are_cut_and_many_are_documents(tmp_path, count, cut):
    texts = [play(200, seed) for seed in range(count)]
    for number, text in enumerate(texts):
        write(tmp_path / f"in/chapter{number}.txt", text)
    made = prepared(tmp_path / "out", tmp_path / "in")
    if cut:
        assert "".join(documents(made)) == "".join(texts)
        assert len(documents(made)) > 3 * count
    else:
        assert documents(made) == texts[1:] + texts[:1]  # the first is for validation


def test_many_texts_are_cut_if_they_are_large(tmp_path, monkeypatch):
    for number in range(12):
        write(tmp_path / f"in/part{number}.txt", play(200, number))
    size = sum(path.stat().st_size for path in (tmp_path / "in").iterdir()) // 12
    for limit, expected in ((size + 1, 12), (size - 1, 72)):
        monkeypatch.setattr(sources, "LARGE_TEXT", limit)
        assert len(read(tmp_path / "in")) >= expected
        assert (len(read(tmp_path / "in")) == 12) == (expected == 12)


@pytest.mark.parametrize("given", ["files", "pieces"])
def test_split_text_says_it_otherwise(tmp_path, given, capsys):
    for number in range(11):
        write(tmp_path / f"in/{number}.txt", play(200, number))
    few = write(tmp_path / "few/a.txt", play())
    expected = {"files": 1, "pieces": len(read(few))}
    assert len(read(few, split_text=given)) == expected[given]
    made = prepared(tmp_path / "out", tmp_path / "in", "--split-text", given)
    assert (len(documents(made)) == 11) == (given == "files")
    assert len(made.documents("val")) == (
        1 if given == "files" else round(len(documents(made)) / 10)
    )
    assert ("cut at blank lines" in capsys.readouterr().out) == (given == "pieces")


def test_a_text_beside_records_is_cut_and_the_first_documents_are_for_validation(tmp_path):
    records = compose_documents(60)
    inputs = (write(tmp_path / "a.txt", play()), jsonl(tmp_path / "b.jsonl", records))
    made = prepared(tmp_path / "out", *inputs)
    whole = read(inputs[0]) + records
    size = round(len(whole) / 100)
    assert len(whole) > 80
    assert documents(made) == whole[size:] + whole[:size]


@pytest.mark.parametrize("piped", [False, True])
def test_records_are_not_cut_and_nothing_is_said_of_it(tmp_path, monkeypatch, capsys, piped):
    texts = [play(100, seed) for seed in range(3)]
    source = jsonl(tmp_path / "a.jsonl", texts)
    stdin_of(monkeypatch, source.read_bytes())
    made = prepared(tmp_path / "out", "-" if piped else source)
    assert documents(made) == texts[1:] + texts[:1]
    assert "cut at blank lines" not in capsys.readouterr().out
    assert "piece_bytes" not in made.manifest["options"]


def test_a_smaller_limit_of_documents_holds_for_pieces(tmp_path):
    made = prepared(
        tmp_path / "out", write(tmp_path / "a.txt", play()), "--max-document-bytes", 500
    )
    assert "".join(documents(made)) == play()
    assert max(len(text.encode()) for text in documents(made)) <= 500


# ---- what cannot be done


@pytest.mark.parametrize("text", ["a few words\n", play(20)])
@pytest.mark.parametrize("option", ["auto", "files"])
def test_a_text_too_small_for_two_splits_is_an_error_that_says_what_to_do(
    tmp_path, capsys, text, option
):
    source = write(tmp_path / "a.txt", text)
    options = ("--byte-level", "--split-text", option, "--out", tmp_path / "out")
    assert prepare_main(source, *options) == 1
    error = capsys.readouterr().err
    assert "1 document(s) and 1 of them for validation" in error
    assert "give more text" in error
    assert "--split-text pieces" in error


@pytest.mark.parametrize(
    ("word", "meant"), [("paragraphs", "pieces"), ("document", "files"), ("auto", "auto")]
)
def test_split_of_a_text_names_the_option_that_is_meant(tmp_path, capsys, word, meant):
    source = write(tmp_path / "a.txt", play())
    assert prepare_main(source, "--byte-level", "--split", word, "--out", tmp_path / "out") == 1
    assert f"--split-text {meant}" in capsys.readouterr().err


def test_val_docs_and_val_fraction_are_one_too_many(capsys):
    with pytest.raises(SystemExit):
        prepare_main("a.txt", "--byte-level", "--val-docs", 3, "--val-fraction", 0.1)
    assert "choose one of --val-docs and --val-fraction" in capsys.readouterr().err


# ---- up to date, or made again


def is_current(capsys, out: Path, *arguments: object) -> bool:
    capsys.readouterr()
    prepared(out, *arguments)
    return "is up to date" in capsys.readouterr().out


def test_a_cut_text_is_made_again_when_an_option_changes(tmp_path, capsys):
    source = write(tmp_path / "a.txt", play())
    assert not is_current(capsys, tmp_path / "out", source)
    assert is_current(capsys, tmp_path / "out", source)
    assert is_current(capsys, tmp_path / "out", source, "--val-fraction", 0.1)  # the default
    assert not is_current(capsys, tmp_path / "out", source, "--val-fraction", 0.2)
    pieces = ("--split-text", "pieces", "--val-fraction", 0.2)
    assert is_current(capsys, tmp_path / "out", source, *pieces)  # what auto has done


def amend(made: Made, change) -> None:
    manifest = made.manifest
    change(manifest)
    (made.folder / "manifest.json").write_text(json.dumps(manifest))


def forget_counts(manifest: dict) -> None:
    """As manifests were before unknown pieces were counted."""
    for counts in manifest["splits"].values():
        del counts["unknown_tokens"], counts["unknown_bytes"]


def test_a_manifest_of_before_is_up_to_date_for_records(tmp_path, capsys):
    source = jsonl(tmp_path / "a.jsonl", compose_documents(30))
    made = prepared(tmp_path / "out", source)
    amend(made, forget_counts)
    assert made.manifest["options"]["val_fraction"] == 0.01
    assert "piece_bytes" not in made.manifest["options"]
    assert is_current(capsys, tmp_path / "out", source)
    assert prepare_main("--check", made.folder) == 0


def test_texts_that_were_whole_before_are_made_again(tmp_path, capsys):
    inputs = [write(tmp_path / f"{i}.txt", play(200, i)) for i in range(2)]
    made = prepared(tmp_path / "out", *inputs, "--split-text", "files")
    amend(made, forget_counts)
    assert not is_current(capsys, tmp_path / "out", *inputs)
    assert len(documents(made)) > 10
