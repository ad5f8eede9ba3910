"""records/: bytes of the original text, counted again document by document; sidecars that state
others are refused, each for what is wrong in it."""

import re
import sys
from collections.abc import Callable
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
    REPO,
    SPECIAL_TEXTS,
    TITLE,
    compose_documents,
    shard_bytes,
    small_letters,
    train_tokenizer,
    write_validation,
)
from field import InProcess
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(REPO / "records"))

import case_ops
import dynamic_rules
import script
from dynamic_rules import Plan, sidecars
from dynamic_rules.copies import judge_copies
from dynamic_rules.session import Session
from dynamic_rules.sidecars import judge_sidecar
from dynamic_rules.writer import Writer
from reading import Verdict
from sentence_piece import read_normalizer
from streams import ByteCounter

VOCABULARY = 420
EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
TEXTS = [*compose_documents(60), *SPECIAL_TEXTS, *compose_documents(120, seed=2)]
KINDS = {
    "case_ops": {**EXACT, "user_defined_symbols": list(CASE_MARKS)},
    "case_ops_nfkc": {"user_defined_symbols": list(CASE_MARKS)},
    "plain": EXACT,
    "plain_nfkc": {},
    "no_bytes": {**EXACT, "byte_fallback": False},
    "dummy_prefix": {**EXACT, "add_dummy_prefix": True},
    "three_marks": {**EXACT, "user_defined_symbols": list(CASE_MARKS[:3])},
}
PLAN = Plan(least=1000, plain=1500, dense=24, stream_tokens=20_000, fine=1.0)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    usual = compose_documents(60)
    small = [small_letters(text) for text in usual]
    return {
        kind: train_tokenizer(
            folder / f"{kind}.model", small if is_marked(kind) else usual, VOCABULARY, **options
        )
        for kind, options in KINDS.items()
    }


def is_marked(kind: str) -> bool:
    return "user_defined_symbols" in KINDS[kind]


class Case:
    """A data folder whose validation split is TEXTS, as it should be until a test changes it."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.tokenizer, self.data = tokenizer, folder / "data"
        self.data.mkdir()
        self.sp = spm.SentencePieceProcessor(model_file=str(tokenizer))
        is_case_ops = self.sp.piece_to_id(ESCAPE) != self.sp.unk_id()
        # Of three marks, the data is written with them as well.
        self.written = list(map(small_letters, TEXTS)) if self.has_marks else TEXTS
        self.documents = [[BOS, *ids] for ids in self.sp.encode(self.written)]
        self.sizes = [self.share_out(i) for i in range(len(TEXTS))]
        self.is_case_ops = is_case_ops

    @property
    def has_marks(self) -> bool:
        return self.sp.piece_to_id(TITLE) != self.sp.unk_id()

    def share_out(self, number: int) -> list[int]:
        """A document's original bytes by token: those of its part of the written text, but for what
        acts; what normalization joined is at the token where it was."""
        text, written = TEXTS[number], self.written[number]
        spans = self.sp.encode(written, return_type="offset_mapping", return_bytes=True)["offsets"]
        raw = written.encode()
        sizes, start = [0], 0
        for _, end in spans[:-1]:
            sizes.append(own_bytes(raw, start, end) if self.has_marks else end - start)
            start = end
        return [*sizes, len(text.encode()) - sum(sizes)]

    def write(self, sidecar: bool = True) -> None:
        """Write two shards, the border inside a document, and their sidecars."""
        parts = {"val": self.documents}
        if sidecar:
            parts["val_bytes"] = self.sizes
        write_validation(self.data, parts, sum(map(len, self.documents[:11])) + 5)

    def judge(self) -> tuple[str, str]:
        """Write all and judge the sidecar: state and evidence of the rule "bytes", "" if none."""
        self.write()
        return self.judge_written()

    def judge_written(self) -> tuple[str, str]:
        counter = ByteCounter(self.tokenizer)
        tokens = np.concatenate(self.documents).astype(np.uint16)
        writer = Writer(tokens, counter.size, counter.bos, 1)
        session = Session(InProcess(self, lambda _: np.zeros(0)), counter, writer, PLAN)
        judge_sidecar(session, self.data)
        self.session = session
        found = session.verdicts.get("bytes", Verdict("bytes", "", ""))
        print(found)
        return found.state, found.evidence


def own_bytes(raw: bytes, start: int, end: int) -> int:
    """Bytes of a part of written text, without its marks that act."""
    before, part = raw[:start].decode(errors="ignore"), raw[start:end].decode(errors="ignore")
    escapes = len(before) - len(before.rstrip(ESCAPE))
    size, escaped = end - start, bool(escapes % 2)
    for char in part:
        acts = char in CASE_MARKS and not escaped
        escaped = acts and char == ESCAPE
        size -= 3 * acts
    return size


@pytest.fixture
def case(tokenizers, tmp_path) -> Callable[[str], Case]:
    return lambda kind: Case(tmp_path, tokenizers[kind])


# ------------------------------------ the transform ------------------------------------

ANY_TEXT = st.text(st.sampled_from("aBcD é\ufb01▁\n" + CASE_MARKS) | st.characters(codec="utf-8"))


@given(ANY_TEXT)
def test_the_inverse_gives_any_text_back(text):
    assert case_ops.write(text) == small_letters(text)
    assert case_ops.invert(small_letters(text)) == text
    written = small_letters(text)
    marks = len(written.encode()) - len(text.encode())
    assert case_ops.MARK_BYTES * case_ops.acting(written) == marks


WRONG = {
    "a mark at the end": (f"a {TITLE}", "character 2, the mark U+E001"),
    "an escape at the end": (f"a{ESCAPE}{ESCAPE}{ESCAPE}", "character 3, the mark U+E004"),
    "a mark before a digit": (f"{NEXT}1", "character 0, the mark U+E003"),
    "a mark before another": (f"{CAPITALS}{TITLE}a", "character 0, the mark U+E002"),
    "a mark before a letter of no capital": (f"{TITLE}é", "character 0, the mark U+E001"),
    "an escape before a letter": (f"{ESCAPE}a", "character 0, the mark U+E004"),
    "a capital": ("the A", "character 4, a capital A"),
    "a mark before a capital": (f"{TITLE}A", "character 0, the mark U+E001"),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_no_case_ops_text_is_named_with_its_place(how):
    text, message = WRONG[how]
    with pytest.raises(case_ops.MalformedError, match=re.escape(message)):
        case_ops.invert(text)


def test_normalized_text_may_have_other_letters_and_capitals():
    assert case_ops.invert(f"{TITLE}é™ TM", is_normalized=True) == "É™ TM"
    with pytest.raises(case_ops.MalformedError):
        case_ops.invert(f"{TITLE} a", is_normalized=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_models_file_tells_whether_it_keeps_text(tokenizers, kind):
    found = read_normalizer(tokenizers[kind].read_bytes())
    assert found.is_exact == ("nfkc" not in kind)
    assert found.has_dummy_prefix == (kind == "dummy_prefix")
    with pytest.raises(ValueError, match="SentencePiece model"):
        read_normalizer(tokenizers[kind].read_bytes()[:-1])


@pytest.mark.parametrize("kind", ["case_ops", "plain", "dummy_prefix", "three_marks"])
def test_the_auditors_own_sizes_are_those_of_the_text(case, kind):
    made = case(kind)
    counter = ByteCounter(made.tokenizer)
    originals = TEXTS if kind != "three_marks" else made.written
    for text, ids in zip(originals, made.documents, strict=True):
        assert counter.sizes(np.array(ids)).sum() == len(text.encode())


# ------------------------------------ sidecars that are right ------------------------------------


@pytest.mark.parametrize("kind", ["case_ops", "plain", "dummy_prefix"])
def test_a_right_sidecar_is_believed(case, kind):
    made = case(kind)
    assert made.judge() == ("", "")
    assert made.session.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_how_the_bytes_of_plain_text_are_shared_out_is_free(case):
    made = case("plain")
    for sizes in made.sizes:
        sizes[1], sizes[2:] = sum(sizes), [0] * (len(sizes) - 2)
    assert made.judge() == ("", "")


@pytest.mark.parametrize("kind", ["case_ops_nfkc", "plain_nfkc"])
def test_of_a_tokenizer_that_changes_text_the_difference_is_told(case, kind):
    made = case(kind)
    state, evidence = made.judge()
    assert state == "WARN"
    assert "the tokenizer changes text" in evidence
    counts, decoded = map(int, re.findall(r"(?:counts|has) (\d+)", evidence)[:2])
    assert counts == sum(len(text.encode()) for text in TEXTS)
    texts = [made.sp.decode(ids) for ids in made.documents]
    marks = sum(map(case_ops.acting, texts)) * (kind == "case_ops_nfkc")
    assert decoded == sum(len(text.encode()) for text in texts) - 3 * marks
    assert made.session.sidecar == "data"


def test_text_with_joined_blank_lines_is_told_but_not_refused(case):
    made = case("plain_nfkc")
    blank = ByteCounter(made.tokenizer).blank
    for ids, sizes in zip(made.documents, made.sizes, strict=True):
        place = int(np.flatnonzero(blank[ids])[0])
        sizes[place] += 2
    state, evidence = made.judge()
    assert state == "WARN"
    assert re.search(r"\(\+0\.[45]\d+%\)", evidence), evidence


def test_unknown_pieces_have_what_the_sidecar_says_and_it_is_told(case):
    made = case("no_bytes")
    state, evidence = made.judge()
    unknown = sum(
        size
        for ids, sizes in zip(made.documents, made.sizes, strict=True)
        for i, size in zip(ids, sizes, strict=True)
        if i == made.sp.unk_id()
    )
    assert state == "WARN"
    assert f"{unknown} are of unknown pieces" in evidence
    assert made.session.sidecar == "data"
    place = int(np.flatnonzero(np.array(made.documents[3]) != made.sp.unk_id())[3])
    made.sizes[3][place] += 1
    refused(made, "document 3 counts")


def test_without_a_sidecar_plain_text_is_what_tokens_decode_to(case):
    made = case("plain")
    made.write(sidecar=False)
    assert made.judge_written() == ("", "")
    assert made.session.sidecar == ""


def test_large_data_is_counted_in_parts(case, monkeypatch):
    monkeypatch.setattr(sidecars, "BATCH", 300)
    made = case("case_ops")
    assert made.judge() == ("", "")
    assert made.session.text_bytes == sum(len(text.encode()) for text in TEXTS)
    made.sizes[77][0] += 1
    refused(made, "document 77 counts 1 bytes for a control token.*document 77 counts .* 1 of 183")


# ------------------------------------ attacks ------------------------------------


def refused(made: Case, message: str) -> None:
    state, evidence = made.judge()
    assert state == "FAIL"
    assert re.search(message, evidence), evidence
    assert made.session.sidecar in ("own", "")


@pytest.mark.parametrize("kind", ["case_ops", "case_ops_nfkc"])
def test_without_a_sidecar_case_ops_data_is_refused(case, kind):
    made = case(kind)
    made.write(sidecar=False)
    state, evidence = made.judge_written()
    assert state == "FAIL"
    assert "no sidecar" in evidence


@pytest.mark.parametrize("kind", ["case_ops", "case_ops_nfkc"])
def test_bytes_of_the_written_text_are_refused(case, kind):
    made = case(kind)
    for ids, sizes in zip(made.documents, made.sizes, strict=True):
        for place, i in enumerate(ids):
            sizes[place] += 3 * (sizes[place] == 0 and made.sp.id_to_piece(i) in CASE_MARKS)
    refused(made, "counts 3 bytes for a mark of CaseOps, .*ue001.*, which has 0")


def test_the_same_total_per_document_tells_which_text_was_counted(case):
    made = case("case_ops")
    for text, sizes in zip(made.written, made.sizes, strict=True):
        sizes[1] += len(text.encode()) - sum(sizes)
    refused(made, "as many as with the marks of CaseOps")


@pytest.mark.parametrize("kind", ["case_ops", "plain", "dummy_prefix", "plain_nfkc"])
def test_a_sidecar_with_0_3_percent_too_much_all_over_is_refused(case, kind):
    made = case(kind)
    rng = np.random.default_rng(1)
    extra = 0.003 * sum(map(sum, made.sizes)) / sum(map(len, made.sizes))
    for sizes in made.sizes:
        for place in range(1, len(sizes)):
            sizes[place] += bool(rng.random() < extra)
    wrong = "normalization does not explain it" if "nfkc" in kind else r"document \d+ counts"
    refused(made, wrong)


@pytest.mark.parametrize("kind", ["case_ops_nfkc", "plain_nfkc"])
def test_too_much_at_blanks_is_refused_beyond_what_normalization_does(case, kind):
    made = case(kind)
    blank = ByteCounter(made.tokenizer).blank
    for ids, sizes in zip(made.documents, made.sizes, strict=True):
        for place in np.flatnonzero(blank[ids])[::10].tolist():
            sizes[place] += 1
    refused(made, "more than 1% is not by normalization")


@pytest.mark.parametrize("kind", ["case_ops", "plain"])
@pytest.mark.parametrize("pair", [(0, 1), (7, 60), (len(TEXTS) - 1, 3)])
def test_a_byte_moved_from_one_document_to_another_is_refused(case, kind, pair):
    made = case(kind)
    blank = ByteCounter(made.tokenizer).blank
    for number, change in zip(pair, (1, -1), strict=True):
        place = int(np.flatnonzero(blank[made.documents[number]])[0])
        made.sizes[number][place] += change
    refused(made, f"document {min(pair)} counts .* 2 of {len(TEXTS)} documents differ")


@pytest.mark.parametrize("kind", ["case_ops", "plain", "plain_nfkc"])
def test_bytes_for_bos_are_refused(case, kind):
    made = case(kind)
    made.sizes[4][0] += 1
    made.sizes[4][1] -= 1
    refused(made, "document 4 counts 1 bytes for a control token")


def test_bytes_moved_from_letters_to_blanks_are_refused_in_case_ops_data(case):
    made = case("case_ops")
    counter = ByteCounter(made.tokenizer)
    ids = np.array(made.documents[6])
    letters = np.flatnonzero(counter.letters[ids])[0]
    made.sizes[6][letters] -= 1
    made.sizes[6][np.flatnonzero(counter.blank[ids])[0]] += 1
    refused(made, "document 6 counts .* bytes for small letters")


BROKEN = {
    "at the end": (lambda text: text + TITLE, "cannot be inverted"),
    "before a blank": (lambda text: f"{NEXT} {text}", "cannot be inverted"),
    "before another": (lambda text: f"{CAPITALS}{TITLE}a{text}", "cannot be inverted"),
    "escape before a letter": (lambda text: f"{ESCAPE}a {text}", "cannot be inverted"),
    "a capital": (lambda text: text + "A", "a capital A.* cannot be inverted"),
    "capitals of a single letter": (lambda text: f"{CAPITALS}a {text}", "not what CaseOps makes"),
    "a title within a word": (lambda text: f"b{TITLE}a {text}", "not what CaseOps makes"),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("number", [0, 30, len(TEXTS) - 1])
def test_text_that_no_text_becomes_is_refused(case, how, number):
    change, message = BROKEN[how]
    made = case("case_ops")
    ids = made.sp.encode(change(made.written[number]))
    made.documents[number] = [BOS, *ids]
    made.sizes[number] = ByteCounter(made.tokenizer).sizes(np.array([BOS, *ids])).tolist()
    refused(made, f"document {number} is .*{message}")


def test_dangling_marks_of_a_tokenizer_that_changes_text_are_refused(case):
    made = case("case_ops_nfkc")
    made.documents[5] += [made.sp.piece_to_id(NEXT)]
    made.sizes[5] += [0]
    refused(made, "document 5 is no CaseOps text")


@pytest.mark.parametrize("has_sidecar", [False, True])
def test_marks_of_a_tokenizer_that_has_only_three_are_no_text(case, has_sidecar):
    """It is a plain one, whose marks count as text: three bytes for each capital."""
    made = case("three_marks")
    counter = ByteCounter(made.tokenizer)
    made.sizes = [counter.sizes(np.array(ids)).tolist() for ids in made.documents]
    made.write(sidecar=has_sidecar)
    state, evidence = made.judge_written()
    assert state == "FAIL"
    assert "a tokenizer of its data has four as pieces" in evidence


@pytest.mark.parametrize("fault", ["short", "shard", "damaged", "shifted"])
def test_a_sidecar_that_does_not_fit_its_shards_is_refused(case, fault):
    made = case("case_ops")
    made.write()
    first, second = (made.data / f"fineweb_val_bytes_00000{i}.bin" for i in (0, 1))
    if fault == "short":
        second.unlink()
    if fault == "damaged":
        second.write_bytes(second.read_bytes()[:-1])
    if fault == "shard":
        stream = np.concatenate(made.sizes)
        first.write_bytes(shard_bytes(stream[:100]))
        second.write_bytes(shard_bytes(stream[100:]))
    if fault == "shifted":
        made.sizes[3].insert(0, made.sizes[3].pop())
        made.write()
    state, evidence = made.judge_written()
    assert state == "FAIL"
    words = {"short": "ends after", "damaged": "cannot be read", "shard": "sidecars of"}
    assert words.get(fault, "document 3 counts") in evidence


def test_bytes_that_form_no_character_are_refused(case):
    made = case("plain")
    lone = made.sp.piece_to_id("<0xC3>")
    made.documents[2] += [lone]
    made.sizes[2] += [3]
    refused(made, "document 2 have .* form no character")


# ------------------------------------ what training has seen ------------------------------------


@pytest.mark.parametrize(("copied", "state"), [(0, ""), (2, "WARN"), (20, "FAIL")])
def test_validation_documents_in_training_shards_are_found(case, copied, state):
    made = case("case_ops")
    made.judge()
    other = [[BOS, *made.sp.encode(small_letters(text))] for text in compose_documents(90, seed=9)]
    other[30:30] = made.documents[70 : 70 + copied]
    for number, part in enumerate((other[:40], other[40:])):
        path = made.data / f"fineweb_train_{number:06d}.bin"
        path.write_bytes(shard_bytes(np.concatenate(part)))
    judge_copies(made.session, made.data)
    found = made.session.verdicts.get("paid_prefix", Verdict("", "", ""))
    assert found.state == state
    assert f"{copied} of " in found.evidence or not copied


# ------------------------------------ a whole audit ------------------------------------


@pytest.mark.parametrize("fault", ["", "inflated", "missing"])
def test_a_script_that_believes_the_sidecar_is_audited_with_the_right_one(
    case, tmp_path, monkeypatch, fault
):
    """The script refuses what is no CaseOps text, and a sidecar that does not count it."""
    made = case("case_ops")
    if fault == "inflated":
        made.sizes[7][np.flatnonzero(ByteCounter(made.tokenizer).blank[made.documents[7]])[0]] += 1
    made.write(sidecar=fault != "missing")
    table = np.full((VOCABULARY, VOCABULARY), 0.1)
    stream = np.concatenate(made.documents)
    np.add.at(table, (stream[:-1], stream[1:]), 1)
    table = np.log(table / table.sum(1, keepdims=True))
    seen = []

    class Careful(InProcess):
        def score(self, parts, apart, seconds, sizes=None) -> script.Result:
            assert sizes is not None
            if not apart:
                whole = np.concatenate(parts)
                documents = np.split(whole, 1 + np.flatnonzero(whole[1:] == BOS))
                counts = np.split(np.concatenate(sizes), 1 + np.flatnonzero(whole[1:] == BOS))
                for ids, stated in zip(documents, counts, strict=True):
                    original = case_ops.invert(made.sp.decode(ids.tolist()))
                    assert len(original.encode()) == stated.sum()
                seen.append(len(whole))
            return super().score(parts, apart, seconds, sizes)

    careful = Careful(made, lambda tokens: -table[tokens[:-1], tokens[1:]])
    monkeypatch.setattr(dynamic_rules, "Script", lambda *_, **__: careful)
    found = dynamic_rules.check(tmp_path, tmp_path, made.data, made.tokenizer, PLAN, 1)
    states = {verdict.rule: verdict.state for verdict in found}
    print(*found, sep="\n")
    expected = dict.fromkeys(dynamic_rules.RULES, "PASS") | {"bytes": "FAIL" if fault else "PASS"}
    assert states == expected | dict.fromkeys(("claim", "paid_prefix"), "NOT CHECKED")
    assert len(seen) == 5


def test_an_audit_of_many_seeds_writes_only_case_ops_text(case):
    """What replaces an end starts where text can start, and ends where it can end."""
    made = case("case_ops")
    counter = ByteCounter(made.tokenizer)
    tokens = np.concatenate(made.documents).astype(np.uint16)
    for seed in range(60):
        writer = Writer(tokens, counter.size, BOS, seed, counter.borders(tokens))
        text = counter.whole(tokens[: 3000 + 7 * seed])
        t = int(writer.rng.choice(counter.borders(text)[1:-1]))
        changed = counter.whole(writer.with_future(text, t))
        assert changed[t] != text[t]
        for ids in np.split(changed, 1 + np.flatnonzero(changed[1:] == BOS)):
            original = case_ops.invert(made.sp.decode(ids.tolist()))
            assert len(original.encode()) == counter.sizes(ids).sum()
