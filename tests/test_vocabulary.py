"""data/vocabulary.py and data/shards.py: tokens, their bytes, tokenizers, and the file format."""

import functools
import io
import json
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
from conftest import compose_documents
from hypothesis import example, given
from hypothesis import strategies as st

import train_gpt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))

import vocabulary
from shards import DataError, ShardWriter, map_tokens, replacing, shard_paths, token_count
from vocabulary import (
    Vocabulary,
    byte_level_model,
    concatenate,
    fit_sidecar,
    load_vocabulary,
    training_lines,
)

PUBLISHED_JSON = {
    "tokenizer_type": "pure_byte",
    "config": {
        **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3},
        **{"byte_offset": 4, "byte_count": 256},
    },
    "vocab_size": 260,
}
# What normalization changes: blanks, compatibility and zero-width characters, markers, line ends.
FRAGMENTS = (
    *(" ", "  ", "\t", "\n", "\r\n", "\u3000", "\u200b", "\ufeff", "\xad", "½", "ﬁ", "e\u0301"),
    *("▁", "▁▁", "<s>", "<unk>", "<0x41>", "the", " water", "7", "☃", "🙂", "é", "⁇"),
)
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=20).map("".join)
KINDS = ("published", "no byte fallback", "dummy prefix", "identity", "byte level")


def trained(**changes) -> bytes:
    """A small BPE model with the challenge's options but for the changes."""
    options = {
        **{"model_type": "bpe", "vocab_size": 400, "character_coverage": 0.999},
        **{"byte_fallback": True, "split_digits": True, "add_dummy_prefix": False},
        **{"normalization_rule_name": "nmt_nfkc", "hard_vocab_limit": False, "num_threads": 1},
        **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "minloglevel": 2},
    }
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(compose_documents(60)), model_writer=model, **(options | changes)
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def models() -> dict[str, Vocabulary]:
    kept = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    found = {
        "published": trained(),
        "no byte fallback": trained(byte_fallback=False),
        "dummy prefix": trained(add_dummy_prefix=True),
        "identity": trained(**kept),
        "byte level": byte_level_model(),
    }
    return {kind: Vocabulary(model) for kind, model in found.items()}


def bytes_by_the_rule(sp, ids) -> list[int]:
    """Bytes of text of each token, as the design page words it."""
    sizes, after_control = [], True
    for i in ids:
        piece = sp.id_to_piece(i)
        silent = sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
        if silent:
            size = 0
        elif sp.is_byte(i):
            size = 1
        else:
            text = piece[1:] if piece.startswith("▁") else piece
            size = len(text.replace("▁", " ").encode())
            size += piece.startswith("▁") and not after_control
        sizes.append(size)
        after_control = silent
    return sizes


# ---- tokens and their bytes


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(TEXTS, max_size=3))
def test_encoding_is_that_of_sentencepiece(models, kind, texts):
    texts = [text.replace("▁", "_") for text in texts]
    found = models[kind].encode(texts)
    assert [ids.tolist() for ids in found] == [models[kind].sp.encode(text) for text in texts]
    assert all(ids.dtype == np.uint16 for ids in found)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@example(text="  the water")
@example(text="☃ the☃ 日本 water")
def test_lengths_follow_the_rule_and_agree_with_decoding(models, kind, text):
    model = models[kind]
    ids = np.array(model.sp.encode(text), np.uint16)
    assert model.lengths(ids).tolist() == bytes_by_the_rule(model.sp, ids.tolist())
    assert model.decoded_bytes([ids]) == model.lengths(ids).sum()


@pytest.mark.parametrize("kind", ["published", "dummy prefix", "byte level"])
@given(text=TEXTS)
def test_lengths_add_up_to_the_decoded_text(models, kind, text):
    """These tokenizers know every byte, and none of their texts keeps a space at its start."""
    ids = models[kind].sp.encode(text)
    decoded = models[kind].sp.decode(ids)
    assert models[kind].lengths(np.array(ids, np.uint16)).sum() == len(decoded.encode())


@given(ids=st.lists(st.integers(0, 399), min_size=1, max_size=30))
def test_lengths_of_any_tokens_follow_the_rule(models, ids):
    model = models["published"]
    assert model.lengths(np.array(ids, np.uint16)).tolist() == bytes_by_the_rule(model.sp, ids)


@functools.cache
def script_tokenizer(model):
    """train_gpt's tokenizer of the same model."""
    path = Path("script.model").absolute()
    path.write_bytes(model.sp.serialized_model_proto())
    return train_gpt.Tokenizer(SimpleNamespace(tokenizer_path=path, vocab_size=model.size))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_lengths_are_those_that_the_script_counts_behind_a_bos(models, kind, data):
    model = models[kind]
    token = st.integers(0, model.size - 1) | st.integers(0, 3)
    ids = data.draw(st.lists(token, max_size=30))
    counted = script_tokenizer(model).lengths(np.array([model.bos, *ids]))
    assert model.lengths(np.array(ids, np.uint16)).tolist() == counted.tolist()


@given(texts=st.lists(TEXTS, max_size=5))
def test_decoded_bytes_of_documents_add_up(models, texts):
    model = models["no byte fallback"]
    documents = model.encode(texts)
    assert model.decoded_bytes(documents) == sum(model.decoded_bytes([d]) for d in documents)


def test_decoded_bytes_are_found_by_decoding_not_by_the_pieces(models):
    model = Vocabulary(models["published"].sp.serialized_model_proto())
    ids = np.array(model.sp.encode("the water"), np.uint16)
    model.base = model.base + (np.arange(model.size) == ids[-1])  # a wrong table
    assert model.decoded_bytes([ids]) == 9 != model.lengths(ids).sum()


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@example(text="   lead and trail   ")
@example(text="½ﬁ\u200b\t \r\n▁")
def test_original_bytes_add_up_to_the_text(models, kind, text):
    count = len(models[kind].sp.encode(text))
    if count:
        sizes = models[kind].original_bytes(text, count)
        assert len(sizes) == count
        assert sizes.min() >= 0
        assert sizes.sum() == len(text.encode())


def test_original_bytes_stand_where_the_text_does(models):
    model, text = models["published"], "the    water  \t place   "
    pieces = model.sp.encode(text, out_type=str)
    sizes = model.original_bytes(text, len(pieces)).tolist()
    words = "".join(pieces).split("▁")
    ends, bytes_so_far = [], 0
    joined = ""
    for piece, size in zip(pieces, sizes, strict=True):
        joined, bytes_so_far = joined + piece, bytes_so_far + size
        if joined in ("the", "the▁water", "the▁water▁place"):
            ends.append(bytes_so_far)
    assert words == ["the", "water", "place"]
    assert [text.encode()[:end].strip().split()[-1] for end in ends] == [b"the", b"water", b"place"]
    assert ends[-1] == len(text)


LACKING = st.lists(st.sampled_from(["☃", "日本", "🙂", "the", " ", " water", "x1"])).map("".join)


@given(text=LACKING)
@example(text="☃ 日本 the  ☃☃ water日x")
@example(text=" 🙂  ")
def test_unknown_bytes_are_those_of_the_characters_that_are_no_piece(models, text):
    model = models["no byte fallback"]
    ids = np.array(model.sp.encode(text), np.uint16)
    lost = sum(len(char.encode()) for char in text if char in "☃日本🙂")
    assert model.unknown_bytes(text, ids) == lost


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_unknown_bytes_are_within_the_text_and_none_where_every_byte_is_a_piece(models, kind, text):
    model = models[kind]
    lost = model.unknown_bytes(text, np.array(model.sp.encode(text), np.uint16))
    assert 0 <= lost <= (len(text.encode()) if kind == "no byte fallback" else 0)


# ---- sidecars


@given(st.lists(st.integers(0, 30), max_size=8))
def test_fitted_sizes_keep_their_sum_or_are_refused(sizes):
    before = np.array(sizes, np.int64)
    if sum(sizes) > 7 * len(sizes):
        with pytest.raises(DataError, match="do not fit"):
            fit_sidecar(before, limit=7)
        return
    fitted = fit_sidecar(before, limit=7)
    assert fitted.dtype == np.uint16
    assert (fitted.sum(), fitted.max(initial=0) <= 7) == (sum(sizes), True)
    assert before.tolist() == sizes
    if max(sizes, default=0) <= 7:
        assert fitted.tolist() == sizes


@pytest.mark.parametrize(
    ("sizes", "fitted"),
    [([10, 0, 1], [4, 4, 3]), ([1, 0, 10], [3, 4, 4]), ([0, 9, 0], [1, 4, 4]), ([5, 0], [4, 1])],
)
def test_sizes_over_the_limit_go_to_those_behind_then_before(sizes, fitted):
    assert fit_sidecar(np.array(sizes), limit=4).tolist() == fitted


def test_a_run_of_more_than_65535_blanks_fits(models):
    text = "the" + " " * 200_000 + "water place"
    sizes = models["published"].original_bytes(text, len(models["published"].sp.encode(text)))
    assert sizes.max() > 65_535
    assert fit_sidecar(sizes).sum(dtype=np.int64) == len(text)


# ---- the byte-level vocabulary


@given(text=st.text())
@example(text="  \n ▁\u200bﬁ<s>\0")
def test_byte_level_tokens_are_the_bytes(models, text):
    model = models["byte level"]
    assert [i - 4 for i in model.encode([text])[0].tolist()] == list(text.encode())
    assert model.lengths(model.encode([text])[0]).tolist() == [1] * len(text.encode())


def test_byte_level_model_has_260_pieces(tmp_path):
    path = tmp_path / "byte_260.model"
    path.write_bytes(byte_level_model())
    sp = spm.SentencePieceProcessor(model_file=str(path))
    ids = (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id(), len(sp))
    assert ids == (0, 1, 2, 3, 260)
    assert [sp.id_to_piece(4 + b) for b in (0, 255)] == ["<0x00>", "<0xFF>"]
    assert [sp.is_byte(i) for i in range(260)] == [False] * 4 + [True] * 256


def test_published_description_of_byte260_is_that_vocabulary(tmp_path):
    path = tmp_path / "fineweb_pure_byte_260.json"
    path.write_text(json.dumps(PUBLISHED_JSON))
    assert load_vocabulary(path).encode(["é"])[0].tolist() == [4 + 0xC3, 4 + 0xA9]


# ---- files that are no tokenizer


def big_model() -> bytes:
    """The byte-level model with more pieces than 16 bits can number."""
    more = []
    for i in range(2**16 - 259):
        text = f"x{i}".encode()
        more.append(bytes([10, len(text) + 4, 10, len(text)]) + text + bytes([24, 1]))
    return byte_level_model() + b"".join(more)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.model", b""),
        ("m.model", b"no model"),
        ("m.model", byte_level_model()[:-30]),
        ("m.json", b"{"),
        ("m.json", b"[]"),
        ("m.json", b"\xff"),
        ("m.json", b"[" * 200_000),
        ("m.json", b'{"config": {"byte_offset": 3}}'),
        ("m.json", b'{"tokenizer_type": "pure_byte"}'),
        ("m.json", byte_level_model()),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        load_vocabulary(tmp_path / name)


@pytest.mark.parametrize("model", [trained(bos_id=-1), big_model()], ids=["no BOS", "too big"])
def test_a_tokenizer_that_shards_cannot_hold_is_refused(tmp_path, model):
    (tmp_path / "m.model").write_bytes(model)
    with pytest.raises(DataError, match="BOS and at most 65,536"):
        load_vocabulary(tmp_path / "m.model")


# ---- training


@given(
    st.lists(st.text(alphabet="ab é☃\n\r\x0b\u2028", max_size=60), max_size=4), st.integers(1, 40)
)
def test_training_lines_are_the_lines_in_pieces(texts, size):
    limit = 4 * size
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "LINE_BYTES", limit)
        found = list(training_lines(texts))
    assert "".join(found) == "".join(lines)
    assert all(0 < len(line.encode()) <= limit for line in found)
    whole = [line for line in lines if len(line.encode()) <= limit]
    rest = iter(found)
    assert all(line in rest for line in whole)  # in their order


def test_long_lines_are_broken_at_blanks():
    words = "word " * 3000
    found = list(training_lines([words]))
    assert "".join(found) == words
    assert {len(line) % 5 for line in found} <= {0, 1, 4}
    assert all(line.strip().count("word") * 5 >= len(line) - 5 for line in found)


def test_a_line_of_exactly_the_limit_stays_whole():
    assert [len(line) for line in training_lines(["a" * 4000, "b" * 4001])][:2] == [4000, 1000]


@pytest.fixture(scope="module")
def tokenizer() -> spm.SentencePieceProcessor:
    model = vocabulary.train_tokenizer(compose_documents(80), 512)
    return spm.SentencePieceProcessor(model_proto=model)


def test_tokenizer_has_the_published_special_pieces(tokenizer):
    ids = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert (tokenizer.vocab_size(), ids) == (512, (0, 1, 2, 3))


def test_tokenizer_has_a_lone_space_piece(tokenizer):
    assert tokenizer.id_to_piece(tokenizer.piece_to_id("▁")) == "▁"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("☃", ["<0xE2>", "<0x98>", "<0x83>"]),  # byte_fallback
        ("\uff11", ["1"]),  # nmt_nfkc: a full-width digit; no dummy prefix
    ],
)
def test_tokenizer_options_show_in_pieces(tokenizer, text, pieces):
    assert tokenizer.encode(text, out_type=str) == pieces


def test_tokenizer_keeps_digits_apart():
    texts = [text.replace("e", "12") for text in compose_documents(80)]
    model = vocabulary.train_tokenizer(texts, 512)
    pieces = spm.SentencePieceProcessor(model_proto=model).encode("12 12", out_type=str)
    assert [piece.strip("▁") for piece in pieces if piece != "▁"] == ["1", "2", "1", "2"]


def test_tokenizer_training_is_deterministic():
    texts = compose_documents(80)
    first, second = (vocabulary.train_tokenizer(iter(texts), 512) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("text", ["the same few words\n", "  \n", "nospaces\n"])
def test_too_little_text_for_the_tokenizer_is_refused(text):
    with pytest.raises(DataError):
        vocabulary.train_tokenizer([text] * 50, 512)


def test_text_without_a_lone_space_piece_is_refused():
    words = [a + b + c for a in "abcdefgh" for b in "abcdefgh" for c in "abcdefgh"]
    with pytest.raises(DataError, match="lone space"):
        vocabulary.train_tokenizer(words * 3, 300)


# ---- shards


def read_shard(path: Path) -> tuple[tuple[int, ...], list[int]]:
    raw = path.read_bytes()
    return struct.unpack("<256i", raw[:1024]), [n for (n,) in struct.iter_unpack("<H", raw[1024:])]


def in_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(st.lists(st.lists(st.integers(0, 65_535), max_size=9), max_size=6), st.integers(1, 7))
def test_shards_cut_the_stream_at_their_size(tmp_path_factory, parts, size):
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, "val", size) as writer:
        for part in parts:
            writer.write(np.array(part, np.uint16))
    stream = [token for part in parts for token in part]
    expected = [stream[i : i + size] for i in range(0, len(stream), size)]
    found = [read_shard(path) for path in shard_paths(folder, "val")]
    assert [tokens for _, tokens in found] == expected
    assert [header for header, _ in found] == [(20240520, 1, len(e), *[0] * 253) for e in expected]
    names = [f"fineweb_val_{number:06d}.bin" for number in range(len(expected))]
    assert sorted(in_folder(folder)) == names


def test_shard_has_its_name_only_when_it_is_whole(tmp_path):
    with ShardWriter(tmp_path, "train", 10) as writer:
        writer.write(np.arange(15, dtype=np.uint16))
        assert [p.name for p in shard_paths(tmp_path, "train")] == ["fineweb_train_000000.bin"]


def test_failed_shard_leaves_no_file(tmp_path):
    def write_half():
        with ShardWriter(tmp_path, "train", 10) as writer:
            writer.write(np.arange(5, dtype=np.uint16))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert in_folder(tmp_path) == {}


def shard_file(folder: Path, tokens: list[int], **changes: int) -> Path:
    fields = [changes.get("magic", 20240520), changes.get("version", 1)]
    count = changes.get("count", len(tokens))
    path = folder / "s.bin"
    path.write_bytes(struct.pack(f"<256i{len(tokens)}H", *fields, count, *[0] * 253, *tokens))
    return path


def test_tokens_are_read_as_they_are(tmp_path):
    path = shard_file(tmp_path, [1, 65_535, 256])
    assert (token_count(path), map_tokens(path).tolist()) == (3, [1, 65_535, 256])


@pytest.mark.parametrize(
    "changes", [{"magic": 20240521}, {"version": 2}, {"count": 2}, {"count": 4}, {"count": -1}]
)
def test_a_file_that_is_no_whole_shard_is_named(tmp_path, changes):
    with pytest.raises(DataError, match=r"s\.bin"):
        token_count(shard_file(tmp_path, [1, 2, 3], **changes))


@pytest.mark.parametrize("length", [0, 1023, 1024])
def test_a_short_file_is_no_shard(tmp_path, length):
    path = shard_file(tmp_path, [])
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"s\.bin"):
        map_tokens(path)


def test_shards_of_a_split_are_sorted_and_sidecars_apart(tmp_path):
    for name in ("val_000010", "val_000002", "val_bytes_000000", "train_000000", "val_x"):
        (tmp_path / f"fineweb_{name}.bin").touch()
    found = {
        split: [p.name for p in shard_paths(tmp_path, split)] for split in ("val", "val_bytes")
    }
    assert found == {
        "val": ["fineweb_val_000002.bin", "fineweb_val_000010.bin"],
        "val_bytes": ["fineweb_val_bytes_000000.bin"],
    }


@pytest.mark.parametrize(
    ("documents", "stream"), [([], []), ([[5, 6], [], [7]], [1, 5, 6, 1, 1, 7])]
)
def test_documents_follow_their_bos(documents, stream):
    found = concatenate([np.array(ids, np.uint16) for ids in documents], 1)
    assert (found.tolist(), found.dtype) == (stream, np.uint16)


# ---- files


def test_failed_write_leaves_the_previous_file_and_no_other(tmp_path):
    path = tmp_path / "f.bin"
    path.write_bytes(b"previous")

    def write_half():
        with replacing(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert in_folder(tmp_path) == {"f.bin": b"previous"}


def test_file_is_not_under_its_name_while_it_is_written(tmp_path):
    path = tmp_path / "f.bin"
    with replacing(path) as file:
        file.write(b"whole")
        file.flush()
        assert not list(tmp_path.glob("*.bin"))
    assert in_folder(tmp_path) == {"f.bin": b"whole"}


def test_file_takes_the_place_of_another(tmp_path):
    path = tmp_path / "f.bin"
    path.write_bytes(b"previous")
    os.link(path, tmp_path / "kept")
    with replacing(path) as file:
        file.write(b"new")
    assert in_folder(tmp_path) == {"f.bin": b"new", "kept": b"previous"}
