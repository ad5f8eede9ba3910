"""The byte audit of CaseOps data: bytes of the text before the transform, document by document."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from conftest import (
    BOS,
    CAPITALS,
    CASE_MARKS,
    ESCAPE,
    NEXT,
    SPECIAL_TEXTS,
    TITLE,
    compose_documents,
    new_run,
    small_letters,
    train_tokenizer,
    write_validation,
)
from hypothesis import given
from hypothesis import strategies as st

import keeper
import train_gpt as tg

VOCAB = 420
PLAIN_TEXT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
TEXTS = [*compose_documents(30), *SPECIAL_TEXTS]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    kinds = {
        "exact": PLAIN_TEXT,
        "normal": {},
        "three": {**PLAIN_TEXT, "user_defined_symbols": list(CASE_MARKS[:3])},
    }
    return {
        kind: train_tokenizer(
            folder / f"{kind}.model",
            map(small_letters, TEXTS[:30]),
            VOCAB,
            **{"user_defined_symbols": list(CASE_MARKS)} | options,
        )
        for kind, options in kinds.items()
    }


class Case:
    """A data folder whose validation split is `TEXTS`."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.sp = spm.SentencePieceProcessor(model_file=str(model))
        self.documents = [[BOS, *self.sp.encode(small_letters(text))] for text in TEXTS]
        sizes = []
        for text in TEXTS:
            # One way of many to share a document's bytes out to its tokens.
            spans = self.sp.encode(small_letters(text), return_type="offset_mapping")["offsets"]
            count = len(spans)
            left = len(text.encode())
            own = []
            for number in range(count):
                own.append(left // (count - number))
                left -= own[-1]
            sizes.append([0, *own])
        self.sizes = sizes

    def write(self, sidecar: bool = True) -> None:
        """Write two shards, the border inside a document, and their sidecars."""
        parts = {"val": self.documents}
        if sidecar:
            parts["val_bytes"] = self.sizes
        write_validation(self.folder, parts, sum(map(len, self.documents[:11])) + 5)

    def read(self, **changed: object) -> tg.Validation:
        """The validation data as a run reads it."""
        settings = {"DATA_PATH": self.folder, "TOKENIZER_PATH": self.model}
        settings |= {"VOCAB_SIZE": VOCAB, "OUT_DIR": self.folder / "logs", "TRAIN_SEQ_LEN": 16}
        return tg.Validation(new_run(settings | changed))

    def refuses(self, problem: str, **changed: object) -> None:
        with pytest.raises(tg.UserError, match=problem):
            self.read(**changed)


@pytest.fixture
def exact(models, tmp_path) -> Case:
    return Case(tmp_path, models["exact"])


def test_bytes_are_those_of_the_original_texts(exact):
    exact.write()
    val = exact.read()
    assert val.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert "sidecar_apart:0.000000" in val.note


def test_without_sidecars_case_ops_data_is_refused(exact):
    exact.write(sidecar=False)
    exact.refuses("CaseOps data needs its fineweb_val_bytes_")


@pytest.mark.parametrize("number", [0, 17, len(TEXTS) - 1])
@pytest.mark.parametrize("change", [1, -1])
def test_one_byte_in_one_document_is_named(exact, number, change):
    exact.sizes[number][1] += change
    exact.write()
    exact.refuses(rf"document {number}: \d+ bytes by the sidecar")


def test_a_byte_moved_to_another_document_is_named(exact):
    exact.sizes[4][1] += 1
    exact.sizes[9][1] -= 1
    exact.write()
    exact.refuses("document 4: ")


def test_sidecars_of_the_transformed_text_are_refused(exact):
    exact.sizes = [
        [0, *(len(exact.sp.id_to_piece(i).replace("▁", " ").encode()) for i in ids[1:])]
        for ids in exact.documents
    ]
    exact.write()
    exact.refuses("document 0: ")


BROKEN = {
    "at the end": lambda text: text + TITLE,
    "before a blank": lambda text: text + f"{NEXT} a",
    "before a mark": lambda text: text + f"{CAPITALS}{TITLE}a",
    "escape before a letter": lambda text: text + f"{ESCAPE}a",
    "a bare capital": lambda text: text + "A",
}


@pytest.mark.parametrize("how", BROKEN)
def test_text_that_no_text_becomes_is_refused(exact, how):
    text = BROKEN[how](small_letters(TEXTS[5]))
    exact.documents[5] = [BOS, *exact.sp.encode(text)]
    exact.sizes[5] = [0] * len(exact.documents[5])
    exact.write()
    exact.refuses("is not of CaseOps text")


def test_any_number_of_tokens_can_be_scored(exact):
    """However the last document is cut: inside a character, behind a mark or an escape."""
    exact.sizes = [[0, *token_sizes(exact.sp, ids[1:])] for ids in exact.documents]
    assert [sum(part) for part in exact.sizes] == [len(text.encode()) for text in TEXTS]
    exact.write()
    last = sum(map(len, exact.documents[-3:]))
    whole = sum(map(len, exact.documents))
    sizes = np.concatenate(exact.sizes)
    for count in range(whole - last + 2, whole + 1):
        assert exact.read(VAL_TOKENS=count).text_bytes == sizes[:count].sum()


def token_sizes(sp: spm.SentencePieceProcessor, ids: list[int]) -> list[int]:
    """A token's own bytes: 0 for a mark that acts."""
    sizes, escaped = [], False
    for i in ids:
        piece = sp.id_to_piece(i)
        acts = piece in CASE_MARKS and not escaped
        escaped = acts and piece == ESCAPE
        size = 1 if sp.is_byte(i) else len(piece.replace("▁", " ").encode())
        sizes.append(0 if acts else size)
    return sizes


def test_of_a_tokenizer_that_normalizes_the_difference_is_told(models, tmp_path):
    case = Case(tmp_path, models["normal"])
    case.write()
    val = case.read()
    assert val.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert 0 < float(val.note.split("sidecar_apart:")[1].split()[0]) < 0.02


def test_of_a_tokenizer_that_normalizes_too_much_is_refused(models, tmp_path):
    case = Case(tmp_path, models["normal"])
    case.documents *= 20
    case.sizes = [[0, *(size + 1 for size in part[1:])] for part in case.sizes] * 20
    case.write()
    case.refuses("more than normalization explains")


def test_with_three_of_the_marks_a_tokenizer_is_a_plain_one(models, tmp_path):
    case = Case(tmp_path, models["three"])
    case.write(sidecar=False)
    decoded = sum(len(case.sp.decode(ids).encode()) for ids in case.documents)
    assert case.read().text_bytes == decoded - 1  # a blank behind BOS is no text of a plain one


def test_a_literal_space_marker_is_kept_as_bytes(exact):
    """SentencePiece makes a space of U+2581, unless its bytes are the tokens."""
    literal = [exact.sp.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
    start = exact.documents[0][:4]
    exact.documents[0] = [*start, *literal, *exact.documents[0][4:]]
    exact.sizes[0] = [*exact.sizes[0][:4], 3, 0, 0, *exact.sizes[0][4:]]
    exact.write()
    assert exact.read().text_bytes == sum(len(text.encode()) for text in TEXTS) + 3


@given(st.text(st.sampled_from("aBcD é\ufb01▁\n" + CASE_MARKS) | st.characters(codec="utf-8")))
def test_the_inverse_gives_any_text_back(text):
    assert keeper.invert_case(small_letters(text), keeper.CASE_OPS) == text
