"""CaseOps: data/caseops.py, prepare.py --case-ops, and what --check finds in such a dataset."""

import json
import random
import shutil
import sys
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from conftest import compose_documents
from hypothesis import example, given
from hypothesis import strategies as st
from test_build import contents, inline, jsonl, make, prepare_main  # noqa: F401
from test_checks import amend, check, forget, read, tokenizer_of, write
from test_vocabulary import trained

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import build
import caseops
import digests
import vocabulary
from caseops import CaseError, decode_case, encode_case, invert_case
from shards import DataError

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
CONTROLS = "\ue001\ue002\ue003\ue004"
TITLE, ALLCAPS, CAPNEXT, ESCAPE = CONTROLS
SPACE = "\u2581"


# ---- the transform by its definition, a character at a time


def is_letter(character: str) -> bool:
    return "a" <= character <= "z" or "A" <= character <= "Z"


def runs(text: str) -> list[str]:
    """The text in maximal runs of ASCII letters and single other characters."""
    found = []
    for character in text:
        if found and is_letter(character) and is_letter(found[-1][-1]):
            found[-1] += character
        else:
            found.append(character)
    return found


def image_parts(text: str) -> list[tuple[str, int]]:
    """The image, a character at a time, each with the bytes of the original that it is for."""
    parts = []
    for run in runs(text):
        capitals = ["A" <= character <= "Z" for character in run]
        if run in CONTROLS:
            parts += [(ESCAPE, 0), (run, 3)]
        elif all(capitals) and len(run) > 1:
            parts += [(ALLCAPS, 0), *((character.lower(), 1) for character in run)]
        else:
            for place, (character, capital) in enumerate(zip(run, capitals, strict=True)):
                if capital:
                    parts.append((CAPNEXT if place else TITLE, 0))
                size = len(character.encode())
                parts.append((character.lower() if capital else character, size))
    return parts


def image_of(text: str) -> str:
    return "".join(character for character, _ in image_parts(text))


WORDS = (
    *("the", "The", "THE", "A", "a", "iPhone", "McDonald", "USAs", "xY", "aB1Cd", "É", "éA", "Aé"),
    *(*CONTROLS, "ß", "ſ", "K", "İ", "Ａ", "Привет", "日本", " ", "\n", SPACE, "'S", "_X", "7Up"),
)
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=12).map("".join)


@given(TEXTS)
@example("The USA's iPhone: A B AB aB \ue001\ue004 McDonald's ÉCOLE")
def test_the_image_is_that_of_the_definition(text):
    assert encode_case(text) == image_of(text)


@given(TEXTS)
@example("".join(CONTROLS) * 2)
def test_decoding_gives_the_text_back(text):
    assert decode_case(encode_case(text)) == invert_case(encode_case(text)) == text


@given(st.text(alphabet="aAbB \ue001\ue004", max_size=30))
def test_decoding_gives_the_text_back_where_cases_are_dense(text):
    assert encode_case(text) == image_of(text)
    assert decode_case(encode_case(text)) == text


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ("the end", "the end"),
        ("The End", f"{TITLE}the {TITLE}end"),
        ("A", f"{TITLE}a"),
        ("USA", f"{ALLCAPS}usa"),
        ("iPhone", f"i{CAPNEXT}phone"),
        ("McDonald", f"{TITLE}mc{CAPNEXT}donald"),
        ("USAs", f"{TITLE}u{CAPNEXT}s{CAPNEXT}as"),
        ("Don'T", f"{TITLE}don'{TITLE}t"),
        ("ÉA", f"É{TITLE}a"),
        (TITLE, ESCAPE + TITLE),
        (f"{ESCAPE}A", f"{ESCAPE}{ESCAPE}{TITLE}a"),
    ],
)
def test_examples(text, image):
    assert encode_case(text) == image


def test_what_is_no_image_is_refused_and_nothing_else():
    """Of all texts of up to 5 characters over an alphabet, the images of all texts as long."""
    alphabet = f"aA-{CONTROLS}"
    texts = ["".join(t) for size in range(6) for t in product(alphabet, repeat=size)]
    images = set(map(image_of, texts))
    for text in texts:
        if text in images:
            assert image_of(decode_case(text)) == text
        else:
            with pytest.raises(CaseError):
                decode_case(text)


@pytest.mark.parametrize(
    ("image", "position", "words"),
    [
        (f"ab{TITLE}", 2, "TITLE at the end"),
        (f"ab {TITLE}1", 3, "TITLE before '1'"),
        (f"{CAPNEXT}ab", 0, "CAPNEXT"),
        (f"ab {ALLCAPS} c", 3, "ALLCAPS before ' c'"),
        (f"{ESCAPE}a", 0, "ESCAPE before 'a'"),
        ("aBc", 1, "'B'"),
        (f"x{TITLE}y", 1, "TITLE"),
        (f"{ALLCAPS}a", 0, "ALLCAPS"),
    ],
)
def test_the_error_says_where(image, position, words):
    with pytest.raises(CaseError, match=rf"character {position}: .*{words}") as raised:
        decode_case(image)
    assert raised.value.position == position


@pytest.mark.parametrize(
    ("image", "text"),
    [("TM", "TM"), (f"{TITLE}é", "é"), (f"a{TITLE}", "a"), (f"{ALLCAPS}ab C", "AB C")],
)
def test_what_normalization_leaves_is_inverted_as_far_as_it_can_be(image, text):
    assert invert_case(image) == text


def test_long_words_are_not_kept_and_many_are_no_matter():
    word = "Ab" * 10_000
    assert decode_case(encode_case(word)) == word
    assert word not in caseops.ENCODED


@given(TEXTS)
@example("\ue004\ue004\ue001A \ue003")
def test_offsets_of_the_image_lead_to_those_of_the_text(text):
    offsets = caseops.original_offsets(image_of(text).encode())
    expected = [0]
    for character, size in image_parts(text):
        end = expected[-1] + size
        inner = size if size else 0  # a control that acts stands for nothing
        length = len(character.encode())
        expected += [expected[-1] + min(i + 1, inner) for i in range(length - 1)] + [end]
    assert offsets.tolist() == expected


def corpus(split: str, count: int | None = None) -> list[str]:
    """Documents of the shared corpus."""
    if not (SHARED / "corpus").exists():
        pytest.skip("no shared corpus here")
    sys.path.insert(0, str(SHARED / "corpus"))
    from read_corpus import documents

    return list(islice(documents(split), count))


@pytest.mark.parametrize(("split", "count"), [("val", None), ("train", 2000)])
def test_every_document_of_the_shared_corpus_is_inverted(split, count):
    for text in corpus(split, count):
        image = encode_case(text)
        assert decode_case(image) == text
        assert caseops.original_offsets(image.encode())[-1] == len(text.encode())


def test_the_image_of_the_shared_corpus_is_that_of_the_definition():
    for text in corpus("val", 40):
        assert encode_case(text) == image_of(text)


# ---- datasets

HARD = [
    "  Two   BLANKS and\ttabs ",
    f"A literal {SPACE} and {SPACE}{SPACE}Two of them, {SPACE}",
    f"Controls {CONTROLS} {ESCAPE}{ESCAPE}The {TITLE}end{ALLCAPS}",
    "½ ﬁne\u200b ™ Water\u200b",
    "\u3000Wide\r\n\r\nLINES\n",
    "☃ 日本 🙂 Привет МИР",
    "E\u0301cole ÉCOLE iPhone McDonald's <s> <unk> <0x41>",
    f"x{SPACE}",
    ESCAPE,
]


def with_capitals(texts: list[str]) -> list[str]:
    """The texts with words in all kinds of case."""
    rng = random.Random(0)
    kinds = (
        str.lower,
        str.title,
        str.upper,
        str.swapcase,
        lambda word: word[:2] + word[2:].title(),
    )
    return [" ".join(rng.choice(kinds)(word) for word in text.split(" ")) for text in texts]


DOCUMENTS = [*HARD, *with_capitals(compose_documents(60))]
NEW = ("--vocab-size", 420, "--case-ops", "--val-docs", 20)
pytestmark = pytest.mark.usefixtures("inline")


def texts_of(made, split: str) -> list[str]:
    """The documents, decoded by SentencePiece alone and inverted through the definition."""
    images = made.texts(split)
    known = {image_of(text): text for text in DOCUMENTS}
    return [known[image] for image in images]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A CaseOps dataset of several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "CHUNK_CHARS", 1000)
        folder = tmp_path_factory.mktemp("caseops")
        return make(folder, DOCUMENTS, *NEW, "--shard-tokens", 900)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of the dataset, beside its tokenizer, to be damaged."""
    shutil.copytree(original.folder.parent.parent, tmp_path / "data")
    return tmp_path / "data" / "datasets" / original.folder.name


def test_its_names_say_that_it_is_caseops(original):
    assert original.folder.name == "t_sp420_caseops"
    assert original.tokenizer.name == "t_420_caseops_bpe.model"
    assert original.manifest["case_ops"] is True
    assert original.manifest["options"]["case_ops"] is True


def test_its_tokenizer_has_the_controls_as_pieces_of_their_own(original):
    sp = spm.SentencePieceProcessor(model_file=str(original.tokenizer))
    pieces = [sp.id_to_piece(i) for i in range(len(sp))]
    assert {piece for piece in pieces if set(piece) & set(CONTROLS)} == set(CONTROLS)


def test_its_tokenizer_is_trained_on_images(original):
    sp = spm.SentencePieceProcessor(model_file=str(original.tokenizer))
    voiced = [i for i in range(len(sp)) if not (sp.is_byte(i) or sp.is_control(i))]
    assert not {c for i in voiced for c in sp.id_to_piece(i) if c.isascii() and c.isupper()}


def test_its_documents_invert_to_the_texts(original):
    assert texts_of(original, "val") == DOCUMENTS[:20]
    assert texts_of(original, "train") == DOCUMENTS[20:]
    assert original.manifest["splits"]["val"]["changed_documents"] == 0


def test_its_sidecar_has_the_bytes_of_the_texts(original):
    sizes: list[list[int]] = []
    for token, size in zip(original.stream("val"), original.stream("val_bytes"), strict=True):
        if token == 1:
            sizes.append([])
            assert size == 0
        else:
            sizes[-1].append(size)
    assert [sum(part) for part in sizes] == [len(text.encode()) for text in DOCUMENTS[:20]]


def test_its_sidecar_has_each_tokens_bytes(original):
    """Against the bytes of the image's characters by the definition."""
    sp = spm.SentencePieceProcessor(model_file=str(original.tokenizer))
    stream = iter(original.stream("val_bytes"))
    for text, ids in zip(DOCUMENTS[:20], original.documents("val"), strict=True):
        assert next(stream) == 0
        of_bytes = [
            size if place == 0 else 0
            for character, size in image_parts(text)
            for place in range(len(character.encode()))
        ]
        bounds = np.cumsum([0, *of_bytes])
        spelled = counted = 0
        for i in ids:
            piece = sp.id_to_piece(i).replace(SPACE, " ")
            spelled += 1 if sp.is_byte(i) else len(piece.encode())
            counted += next(stream)
            if not sp.is_byte(i):
                assert counted == bounds[spelled]


def test_what_was_made_passes(folder, capsys):
    code, failed, text = check(capsys, folder)
    assert (code, failed) == (0, set())
    assert "a CaseOps one" in text
    assert "20 documents give the original text (digest)" in text
    assert f"{sum(len(text.encode()) for text in DOCUMENTS[:20]):,} original bytes" in text


@pytest.mark.parametrize("more", [("--processes", 2), ("--processes", 3)])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path, original, more, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(build, "CHUNK_CHARS", 1000)
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    options = (*NEW, "--shard-tokens", 900, "--name", "t", "--out", tmp_path)
    assert prepare_main(source, *options, *more) == 0
    made, expected = (contents(f) for f in (tmp_path / "datasets/t_sp420_caseops", original.folder))
    assert {name for name in made if made[name] != expected.get(name)} == set()


def test_a_run_that_was_stopped_is_gone_on_with(tmp_path, original, monkeypatch):
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    options = (*NEW, "--shard-tokens", 900, "--name", "t", "--out", tmp_path, "--processes", 1)
    encoded, encode = [], vocabulary.Vocabulary.encode

    def stop_at_the_fourth(self, texts):
        encoded.append(texts)
        if len(encoded) == 4:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(vocabulary.Vocabulary, "encode", stop_at_the_fourth)
    assert prepare_main(source, *options) == 130
    assert prepare_main(source, *options) == 0
    made, expected = (contents(f) for f in (tmp_path / "datasets/t_sp420_caseops", original.folder))
    assert {name for name in made if made[name] != expected.get(name)} == set()
    assert not any(texts == encoded[0] for texts in encoded[1:])


def test_a_caseops_tokenizer_is_reused(tmp_path, original, capsys):
    made = make(tmp_path, DOCUMENTS, "--tokenizer", original.tokenizer, *NEW[2:])
    assert made.stream("val") == original.stream("val")
    assert made.stream("val_bytes") == original.stream("val_bytes")
    assert check(capsys, made.folder)[0] == 0


def test_a_tokenizer_without_the_controls_is_refused(tmp_path, dataset, capsys):
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    options = ("--tokenizer", dataset.tokenizer, "--case-ops", "--out", tmp_path)
    assert prepare_main(source, *options) == 1
    assert "not a CaseOps tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "datasets").exists()


def test_a_caseops_tokenizer_wants_the_option(tmp_path, original, capsys):
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    assert prepare_main(source, "--tokenizer", original.tokenizer, "--out", tmp_path) == 1
    assert "add --case-ops" in capsys.readouterr().err


def test_a_tokenizer_with_a_control_in_a_longer_piece_is_refused(tmp_path, capsys):
    model = tmp_path / "fused.model"
    model.write_bytes(trained(user_defined_symbols=[*CONTROLS, f" {TITLE}"]))
    with pytest.raises(DataError, match="holds a CaseOps control beside other"):
        vocabulary.load_vocabulary(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.txt", "--byte-level", "--case-ops"], "--byte-level has no pieces"),
        (["x.txt", "--vocab-size", "512", "--case-ops", "--normalization", "nmt_nfkc"], "identity"),
        (["x.txt", "--byte-level", "--normalization", "identity"], "that is trained"),
    ],
)
def test_wrong_use_exits_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        prepare_main(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_plain_text_in_pieces_is_kept_too(tmp_path):
    text = "\n\n".join(with_capitals(compose_documents(60)))
    (tmp_path / "in.txt").write_text(text)
    options = ("--vocab-size", 420, "--case-ops", "--name", "t", "--out", tmp_path)
    assert prepare_main(tmp_path / "in.txt", *options, "--max-document-bytes", 2000) == 0
    folder = tmp_path / "datasets/t_sp420_caseops"
    counts = json.loads((folder / "manifest.json").read_text())["splits"].values()
    assert sum(n["bytes"] for n in counts) == sum(n["decoded_bytes"] for n in counts)
    assert sum(n["bytes"] for n in counts) == len(text.encode())


def test_a_document_whose_tokens_do_not_give_it_stops_the_building(tmp_path, monkeypatch, capsys):
    encode = vocabulary.Vocabulary.encode
    lost = lambda self, texts: [ids[:-1] for ids in encode(self, texts)]  # noqa: E731
    monkeypatch.setattr(vocabulary.Vocabulary, "encode", lost)
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    assert prepare_main(source, *NEW, "--out", tmp_path) == 1
    assert "do not give its text" in capsys.readouterr().err


def test_an_image_that_does_not_invert_to_the_text_stops_the_building(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(build, "encode_case", str.lower)
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    assert prepare_main(source, *NEW, "--out", tmp_path) == 1
    assert "do not give its text" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["sidecar", "case_ops", "keys"])
def test_a_chunk_of_other_options_is_another_one(original, option):
    task = build.Task(original.tokenizer, sidecar=False)
    assert task.digest([b"a"]) != replace(task, **{option: True}).digest([b"a"])


def test_an_escape_reaches_its_neighbour_alone():
    escapes = np.array([True, False, True, True, True, False])
    found = caseops.acting(np.array([0, 2, 5, 6, 7, 8]), escapes)
    assert found.tolist() == [True, True, True, False, True, False]


@pytest.fixture(scope="module")
def identity() -> vocabulary.Vocabulary:
    """A lossless CaseOps tokenizer."""
    options = vocabulary.trainer_options("nmt_nfkc", case_ops=True)
    images = map(encode_case, with_capitals(compose_documents(60)))
    return vocabulary.Vocabulary(vocabulary.train_tokenizer(images, 420, options))


@given(TEXTS.filter(bool))
@example(f" {SPACE}A")
def test_any_text_is_kept_and_counted(identity, text):
    (ids,) = identity.encode([encode_case(text)])
    assert identity.lossless
    assert decode_case(identity.sp.decode(ids.tolist())) == text
    assert identity.exact_lengths(ids).sum() == len(text.encode())
    assert identity.lengths(ids).sum() == identity.decoded_bytes([ids]) == len(text.encode())


@given(TEXTS.filter(lambda text: text and SPACE not in text))
def test_bytes_by_pieces_are_those_by_offsets_where_characters_end(identity, text):
    image = encode_case(text)
    (ids,) = identity.encode([image])
    ends = identity.character_ends(ids)
    by_pieces = np.cumsum(identity.exact_lengths(ids))
    by_offsets = np.cumsum(identity.original_bytes(image, len(ids)))
    assert by_pieces[ends].tolist() == by_offsets[ends].tolist()


# ---- what --check finds


def documents_at(stream: list[int]) -> list[int]:
    return [place for place, token in enumerate(stream) if token == 1]


def damage_sidecar(folder: Path, change) -> None:
    """Change the sizes of the first validation shard; the manifest is as if it had been so."""
    path = folder / "fineweb_val_bytes_000000.bin"
    sizes, tokens = read(path), read(folder / "fineweb_val_000000.bin")
    change(sizes, tokens)
    write(path, sizes)
    amend(folder, lambda manifest: None)


def move_between_documents(sizes, tokens):
    first, second = documents_at(tokens)[:2]
    sizes[first + 1] += 1
    sizes[second + 1 + next(i for i, n in enumerate(sizes[second + 1 :]) if n)] -= 1


def move_within_a_document(sizes, tokens):
    places = [i for i, size in enumerate(sizes[:40]) if size]
    sizes[places[2]] -= 1
    sizes[places[5]] += 1


def count_one_more(sizes, tokens):
    sizes[2] += 1


def count_controls(sizes, tokens):
    place = next(i for i, (n, t) in enumerate(zip(sizes, tokens, strict=True)) if t > 1 and not n)
    sizes[place] += 1
    sizes[next(i for i, n in enumerate(sizes) if i > place and n)] -= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (move_between_documents, "its sidecar counts 25 bytes, its text has 24"),
        (move_within_a_document, "its sidecar is wrong at the document's token"),
        (count_one_more, "its sidecar counts 25 bytes, its text has 24"),
        (count_controls, "for CaseOps controls"),
    ],
)
def test_one_byte_at_another_place_fails_sidecars(folder, capsys, change, words):
    assert len(DOCUMENTS[0]) == 24
    damage_sidecar(folder, change)
    _, failed, text = check(capsys, folder)
    assert failed == {"sidecars"}
    assert "fineweb_val_000000.bin, document 1 (at token 0)" in text
    assert words in text


@pytest.mark.parametrize("manifest", [True, False])
def test_a_sidecar_of_the_image_fails_sidecars(folder, capsys, manifest):
    """The trap of techniques.md 1.5 (v): a control is counted as the 3 bytes that it has."""
    sp = spm.SentencePieceProcessor(model_file=str(tokenizer_of(folder)))
    controls = [sp.piece_to_id(control) for control in CONTROLS]
    for number in range(len(list(folder.glob("fineweb_val_bytes_*.bin")))):
        path = folder / f"fineweb_val_bytes_{number:06d}.bin"
        tokens = read(folder / f"fineweb_val_{number:06d}.bin")
        pairs = zip(read(path), tokens, strict=True)
        write(path, [3 if token in controls else size for size, token in pairs])
    amend(folder, lambda manifest: manifest["splits"]["val"].pop("bytes"))
    if not manifest:
        forget(folder)
    assert check(capsys, folder, "--tokenizer", tokenizer_of(folder))[1] == {"sidecars"}


def test_a_missing_sidecar_fails_sidecars(folder, capsys):
    for path in folder.glob("fineweb_val_bytes_*.bin"):
        path.unlink()
    amend(folder, lambda manifest: None)
    _, failed, text = check(capsys, folder)
    assert failed == {"sidecars"}
    assert "CaseOps needs the original bytes" in text


def tokens_at(folder: Path, split: str, change) -> None:
    """Change the tokens of the last shard of a split."""
    path = sorted(folder.glob(f"fineweb_{split}_0*.bin"))[-1]
    tokens = read(path)
    change(tokens)
    write(path, tokens)
    amend(folder, lambda manifest: None)


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_document_that_is_no_image_is_named(folder, capsys, split):
    """The last token of the last document becomes a TITLE, which has nothing to act on."""
    sp = spm.SentencePieceProcessor(model_file=str(tokenizer_of(folder)))
    tokens_at(folder, split, lambda tokens: tokens.__setitem__(-1, sp.piece_to_id(TITLE)))
    _, failed, text = check(capsys, folder)
    assert f"{split}_text" in failed
    (line,) = [line for line in text.splitlines() if line.startswith(f"FAIL  {split}_text")]
    assert "TITLE at the end" in line
    assert f"fineweb_{split}_0000" in line
    assert ", document " in line


@pytest.mark.parametrize("split", ["val", "train"])
def test_another_text_of_the_same_length_fails_its_split(folder, capsys, split):
    """Only the digest of the texts can tell."""
    sp = spm.SentencePieceProcessor(model_file=str(tokenizer_of(folder)))
    letters = [sp.piece_to_id(letter) for letter in "abcde"]

    def change(tokens):
        place = next(i for i, token in enumerate(tokens) if token in letters)
        tokens[place] = letters[letters.index(tokens[place]) - 1]

    tokens_at(folder, split, change)
    _, failed, text = check(capsys, folder)
    assert failed == {f"{split}_text"}
    assert "not those that manifest.json was written of" in text


def test_a_manifest_that_denies_caseops_fails_tokenizer(folder, capsys):
    amend(folder, lambda manifest: manifest.update(case_ops=False))
    assert check(capsys, folder)[1] == {"tokenizer"}


def test_a_manifest_without_digests_fails_both_texts(folder, capsys):
    amend(folder, lambda manifest: manifest.pop("text_digests"))
    assert check(capsys, folder)[1] == {"val_text", "train_text"}


# ---- a tokenizer that normalizes, as the published one may


@pytest.fixture(scope="module")
def normalizing(tmp_path_factory) -> Path:
    """A CaseOps tokenizer with nmt_nfkc."""
    path = tmp_path_factory.mktemp("normalizing") / "nfkc.model"
    path.write_bytes(trained(user_defined_symbols=list(CONTROLS)))
    return path


def test_what_normalization_changes_is_counted(tmp_path, normalizing, capsys):
    made = make(tmp_path, DOCUMENTS, "--tokenizer", normalizing, *NEW[2:])
    model = vocabulary.load_vocabulary(normalizing)
    changed = sum(
        invert_case(model.sp.decode(model.sp.encode(image_of(text)))) != text
        for text in DOCUMENTS[:20]
    )
    assert not model.lossless
    assert made.manifest["splits"]["val"]["changed_documents"] == changed > 0
    assert sum(made.stream("val_bytes")) == sum(len(text.encode()) for text in DOCUMENTS[:20])


def test_controls_that_normalization_left_alone_are_told(tmp_path, normalizing, capsys):
    """As many as here are no published set's, but a set of ours was compared as it was made."""
    made = make(tmp_path, DOCUMENTS, "--tokenizer", normalizing, *NEW[2:])
    code, _, text = check(capsys, made.folder)
    assert code == 0
    assert "1 documents have CaseOps controls that have nothing to act on" in text
    forget(made.folder)
    assert "val_text" in check(capsys, made.folder, "--tokenizer", normalizing)[1]


def test_a_sidecar_of_a_normalizing_tokenizer_passes(tmp_path, normalizing, capsys):
    texts = with_capitals(compose_documents(80))
    made = make(tmp_path, texts, "--tokenizer", normalizing, *NEW[2:])
    code, failed, text = check(capsys, made.folder)
    assert (code, failed) == (0, set())
    assert "the tokenizer normalizes" in text


def test_a_sidecar_of_the_image_fails_without_a_manifest(tmp_path, normalizing, capsys):
    texts = with_capitals(compose_documents(80))
    made = make(tmp_path, texts, "--tokenizer", normalizing, *NEW[2:])
    tokens, path = made.stream("val"), made.folder / "fineweb_val_bytes_000000.bin"
    model = vocabulary.load_vocabulary(normalizing)
    voiced = [i for i, token in enumerate(tokens) if token > 1 and not model.control[token]]
    sizes = read(path)
    for place in voiced[:: len(voiced) // 300]:  # not at the controls, which must have none
        sizes[place] += 1
    write(path, sizes)
    forget(made.folder)
    assert check(capsys, made.folder, "--tokenizer", normalizing)[1] == {"sidecars"}


def test_bytes_at_a_control_fail_where_the_tokenizer_normalizes_too(tmp_path, normalizing, capsys):
    made = make(tmp_path, DOCUMENTS, "--tokenizer", normalizing, *NEW[2:])
    damage_sidecar(made.folder, count_controls)
    _, failed, text = check(capsys, made.folder)
    assert failed == {"sidecars"}
    assert "for CaseOps controls" in text


def test_bytes_of_one_document_counted_for_another_fail(tmp_path, normalizing, capsys):
    texts = with_capitals(compose_documents(80))
    made = make(tmp_path, texts, "--tokenizer", normalizing, *NEW[2:])
    sizes, path = made.stream("val_bytes"), made.folder / "fineweb_val_bytes_000000.bin"
    first, second, third = documents_at(made.stream("val"))[:3]
    half = [i for i in range(first, second) if sizes[i]][::2]
    sizes[next(i for i in range(second, third) if sizes[i])] += sum(sizes[i] for i in half)
    write(path, [0 if i in half else size for i, size in enumerate(sizes)])
    forget(made.folder)
    code, failed, text = check(capsys, made.folder, "--tokenizer", normalizing)
    assert (code, failed) == (1, {"sidecars"})
    assert "far from the text of" in text


@given(TEXTS.filter(lambda text: text.strip()))
@example("  Two   BLANKS ")
@example("™ ﬁN Éa")
def test_controls_have_no_bytes_whatever_is_normalized(normalizing, text):
    model = vocabulary.load_vocabulary(normalizing)
    image = encode_case(text)
    (ids,) = model.encode([image])
    sizes = build.sidecar_of(model, len(text.encode()), image, ids)
    if len(ids):
        assert sizes.sum() == len(text.encode())
        assert not sizes[model.acting(ids)].any()
        assert model.lengths(ids).sum() == model.decoded_bytes([ids])
        build.changed_texts(model, [ids], [image], [text])


# ---- a plain tokenizer that keeps the text


def test_identity_keeps_the_text_without_caseops(tmp_path, capsys):
    options = ("--vocab-size", 420, "--normalization", "identity", "--val-docs", 20)
    made = make(tmp_path, DOCUMENTS, *options, "--byte-sidecar")
    assert made.folder.name == "t_sp420"
    assert made.texts("val") == DOCUMENTS[:20]
    assert made.texts("train") == DOCUMENTS[20:]
    assert sum(made.stream("val_bytes")) == sum(len(text.encode()) for text in DOCUMENTS[:20])
    assert check(capsys, made.folder)[0] == 0


def test_plain_and_caseops_datasets_have_the_same_text_digests(tmp_path, original):
    made = make(tmp_path, DOCUMENTS, "--vocab-size", 420, "--val-docs", 20)
    assert made.manifest["text_digests"] == original.manifest["text_digests"]
    assert made.manifest["case_ops"] is False


# ---- validation documents of another dataset in training


def leaky(tmp_path, *more):
    """A dataset of the same documents whose --val-docs is smaller: training has the others."""
    return make(tmp_path, DOCUMENTS, "--vocab-size", 420, "--val-docs", 5, *more)


def test_excluded_validation_documents_are_not_in_training(tmp_path, original, capsys):
    made = leaky(tmp_path, "--exclude-val", original.folder)
    assert made.manifest["skipped"]["duplicate of excluded validation"] == 15
    assert made.manifest["splits"]["train"]["documents"] == len(DOCUMENTS) - 20
    assert check(capsys, made.folder, "--exclude-val", original.folder)[0] == 0


def test_a_check_against_another_validation_finds_them(tmp_path, original, capsys):
    made = leaky(tmp_path)
    assert check(capsys, made.folder)[0] == 0
    _, failed, text = check(capsys, made.folder, "--exclude-val", original.folder)
    assert failed == {"excluded"}
    assert "15 training documents" in text


def test_a_folder_without_validation_is_no_exclusion(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    options = ("--vocab-size", 420, "--out", tmp_path, "--exclude-val", tmp_path / "empty")
    assert prepare_main(source, *options) == 1
    assert "no fineweb_val_*.bin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("The  Water\n" * 20, "the water " * 20, True),
        ("ﬁne ☃ day " * 20, "fine  ⁇  day " * 20, True),
        ("日本 語", "日本語", True),
        ("日本", "日木", False),
        ("the water " * 20, "the winter " * 20, False),
    ],
)
def test_keys_are_of_what_every_tokenizer_keeps(a, b, same):
    assert (digests.text_key(a) == digests.text_key(b)) is same
