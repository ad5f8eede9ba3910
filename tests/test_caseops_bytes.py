"""The byte audit of CaseOps data: bytes of the text before the transform, document by document."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from conftest import BOS, compose_documents, new_run, shard_bytes
from hypothesis import given
from hypothesis import strategies as st

import keeper
import train_gpt as tg

VOCAB = 420
TITLE, CAPITALS, NEXT, ESCAPE = MARKS = "\ue001\ue002\ue003\ue004"
PLAIN_TEXT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
TEXTS = [
    *compose_documents(30),
    "  Two blanks  and McDonald's iPhone, USA. \n\n\tA a AB Ab aB aBC ÀB éX ﬁ\u00a0½  ",
    f"marks {TITLE}{ESCAPE}{ESCAPE}x{NEXT}Y {CAPITALS}",
    "日本 🚀 ＡＢＣ e\u0301 E\u0301t \u212b",
]


def small_letters(text: str) -> str:
    """A text as CaseOps writes it (techniques.md 2.14), letter by letter."""

    def word(match: re.Match) -> str:
        letters = match[0]
        if letters.isupper() and len(letters) > 1:
            return CAPITALS + letters.lower()
        first = TITLE + letters[0].lower() if letters[0].isupper() else letters[0]
        return first + "".join(NEXT + c.lower() if c.isupper() else c for c in letters[1:])

    return re.sub("[A-Za-z]+", word, re.sub(f"[{MARKS}]", rf"{ESCAPE}\g<0>", text))


def train(**options: object) -> bytes:
    """A CaseOps tokenizer of VOCAB pieces."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=map(small_letters, TEXTS[:30]),
        model_writer=model,
        **{"model_type": "bpe", "vocab_size": VOCAB, "byte_fallback": True},
        **{"add_dummy_prefix": False, "hard_vocab_limit": False, "minloglevel": 2},
        **{"num_threads": 1, "pad_id": 0, "bos_id": BOS, "eos_id": 2, "unk_id": 3},
        **{"user_defined_symbols": list(MARKS), **PLAIN_TEXT} | options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    return {
        "exact": train(),
        "normal": train(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True),
        "three": train(user_defined_symbols=list(MARKS[:3])),
    }


class Case:
    """A data folder whose validation split is `TEXTS`."""

    def __init__(self, folder: Path, model: bytes) -> None:
        self.folder = folder
        (folder / "case.model").write_bytes(model)
        self.sp = spm.SentencePieceProcessor(model_proto=model)
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

    def write(self, sidecar: bool = True, cut: int = 11) -> None:
        """Write two shards, the border inside a document, and their sidecars."""
        border = sum(map(len, self.documents[:cut])) + 5
        kinds = {"val": self.documents, "val_bytes": self.sizes}
        for kind, parts in kinds.items() if sidecar else [("val", self.documents)]:
            stream = np.concatenate(parts)
            for number, part in enumerate((stream[:border], stream[border:])):
                path = self.folder / f"fineweb_{kind}_{number:06d}.bin"
                path.write_bytes(shard_bytes(part))

    def read(self, **changed: object) -> tg.Validation:
        """The validation data as a run reads it."""
        settings = {"DATA_PATH": self.folder, "TOKENIZER_PATH": self.folder / "case.model"}
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
        acts = piece in MARKS and not escaped
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


@given(st.text(st.sampled_from("aBcD é\ufb01▁\n" + MARKS) | st.characters(codec="utf-8")))
def test_the_inverse_gives_any_text_back(text):
    assert keeper.invert_case(small_letters(text), keeper.CASE_OPS) == text
