"""Bytes per token, the byte audit, and the score, against decoded text and plain references."""

import copy
import functools
import io
import itertools
import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
from conftest import compose_documents, new_run, random_model, resolve, shard_bytes
from hypothesis import given
from hypothesis import strategies as st

import keeper
import train_gpt as tg

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
VOCAB, PAD, BOS, EOS, UNK = 512, 0, 1, 2, 3
SPACE = "▁"
CHALLENGE = {
    "model_type": "bpe",
    "vocab_size": VOCAB,
    "character_coverage": 0.999,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": False,
    "pad_id": PAD,
    "bos_id": BOS,
    "eos_id": EOS,
    "unk_id": UNK,
    "hard_vocab_limit": False,
    "num_threads": 1,
    "minloglevel": 2,
}
KINDS = {
    "bpe": {},
    "no_bytes": {"byte_fallback": False},
    "unigram": {"model_type": "unigram"},
    "dummy_prefix": {"add_dummy_prefix": True},
    "keeps_spaces": {"remove_extra_whitespaces": False},
    "across_words": {"split_by_whitespace": False},
    "symbols": {"control_symbols": ["[CLS]"], "user_defined_symbols": ["<br>", "e"]},
    "other_names": {"pad_piece": "pad", "unk_piece": "unk", "bos_piece": "begin"},
}


# ---- tokenizers


def train_model(documents, **options):
    """A SentencePiece model as bytes."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_writer=model, **{**CHALLENGE, **options}
    )
    return model.getvalue()


def other_documents():
    """Text of other words than compose_documents has."""
    swap = str.maketrans("abcdefghijklmnopqrstuvwxyz", "qwertyuiopasdfghjklzxcvbnm")
    return [text.translate(swap) for text in compose_documents(seed=1)]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Paths of tokenizers by kind."""
    folder, documents = tmp_path_factory.mktemp("models"), compose_documents()
    contents = {kind: train_model(documents, **options) for kind, options in KINDS.items()}
    repeated = [f"once upon a time there was the {word} of" for word in ("king", "fool")]
    options = {"split_by_whitespace": False, "hard_vocab_limit": True}
    contents["across_words"] = train_model(documents + 300 * repeated, **options)
    assert "was▁the".encode() in contents["across_words"]
    contents["other_text"] = train_model(other_documents())
    # One without a piece for a single space: such a piece's entry is renamed in the model file.
    entry = b"\x0a\x03%b\x15"
    before, after = entry % SPACE.encode(), entry % "◆".encode()
    assert contents["bpe"].count(before) == 1
    contents["no_space"] = contents["bpe"].replace(before, after)
    paths = {kind: folder / f"{kind}.model" for kind in contents}
    for kind, path in paths.items():
        path.write_bytes(contents[kind])
    return paths


@functools.cache
def load(path):
    return spm.SentencePieceProcessor(model_file=str(path))


@functools.cache
def make_tokenizer(path):
    """train_gpt's tokenizer of a model file."""
    return tg.Tokenizer(resolve({}, TOKENIZER_PATH=path, VOCAB_SIZE=len(load(path))))


def wire_fields(data):
    """(number, value) of each field of a protocol-buffer message."""

    def varint(at):
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                return value, at

    at, found = 0, []
    while at < len(data):
        key, at = varint(at)
        if key & 7 == 0:
            value, at = varint(at)
        else:
            size, at = varint(at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = data[at : at + size], at + size
        found.append((key >> 3, value))
    return found


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def read_pieces(path):
    """(piece, type) of each id, from the model file itself."""
    entries = [dict(wire_fields(v)) for n, v in wire_fields(Path(path).read_bytes()) if n == 1]
    return [(entry[1].decode(), entry.get(3, NORMAL)) for entry in entries]


def plain_lengths(pieces, tokens):
    """The bytes of tokens[1:] by the words of design.md, one token at a time."""
    lengths = []
    for before, token in itertools.pairwise(tokens):
        piece, kind = pieces[token]
        if kind in (CONTROL, UNKNOWN, UNUSED):
            lengths.append(0)
        elif kind == BYTE:
            lengths.append(1)
        elif piece.startswith(SPACE):
            after_text = pieces[before][1] not in (CONTROL, UNKNOWN, UNUSED)
            lengths.append(len(piece[1:].replace(SPACE, " ").encode()) + after_text)
        else:
            lengths.append(len(piece.replace(SPACE, " ").encode()))
    return lengths


def encoded(path, documents):
    """The documents' tokens, each after its BOS, as one stream."""
    sp = load(path)
    return np.concatenate([[BOS, *sp.encode(text)] for text in documents]).astype(np.uint16)


# ---- lengths


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_of_a_document_add_up_to_its_text(models, kind):
    tokenizer, sp = make_tokenizer(models[kind]), load(models[kind])
    checked = 0
    for text in compose_documents(60, seed=7):
        ids = sp.encode(text)
        if UNK not in ids:
            checked += 1
            tokens = np.array([BOS, *ids], np.uint16)
            assert tokenizer.lengths(tokens).sum() == len(sp.decode(ids).encode())
    assert checked > 10


TEXT = st.text() | st.text(st.sampled_from("ab e\n\t ▁1é🙂日\u00ad'")) | st.text("the and ")


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
def test_lengths_of_any_text_add_up_to_it(models, kind, text):
    sp = load(models[kind])
    ids = sp.encode(text)
    if UNK not in ids:
        decoded = sp.decode(ids)
        # By the rule, a space between BOS and the first word is not counted.
        expected = len(decoded.encode()) - decoded.startswith(" ")
        tokens = np.array([BOS, *ids], np.uint16)
        assert make_tokenizer(models[kind]).lengths(tokens).sum() == expected


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_lengths_follow_the_rule_for_any_tokens(models, kind, data):
    ids = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40))
    lengths = make_tokenizer(models[kind]).lengths(np.array(ids, np.uint16))
    assert lengths.tolist() == plain_lengths(read_pieces(models[kind]), ids)


def test_lengths_of_known_tokens(models):
    tokenizer, sp = make_tokenizer(models["bpe"]), load(models["bpe"])
    the, e, space = (sp.piece_to_id(piece) for piece in ("▁the", "e", "▁"))
    e2, ff = sp.piece_to_id("<0xE2>"), sp.piece_to_id("<0xFF>")
    assert UNK not in (the, e, space, e2, ff)
    cases = [  # a token, its bytes
        (BOS, None),
        (the, 3),  # no space after a control token
        (the, 4),
        (e, 1),
        (space, 1),
        (space, 1),
        (the, 4),
        (e2, 1),  # a byte counts one, be it part of a character or not
        (ff, 1),
        (the, 4),
        (EOS, 0),
        (the, 3),
        (PAD, 0),
        (e, 1),
        (UNK, 0),
        (the, 3),
        (UNK, 0),
        (UNK, 0),
        (space, 0),
        (the, 4),
        (BOS, 0),
        (space, 0),
        (BOS, 0),
        (e2, 1),
    ]
    lengths = tokenizer.lengths(np.array([token for token, _ in cases], np.uint16))
    assert lengths.tolist() == [size for _, size in cases[1:]]


def test_a_character_of_several_bytes_counts_them(models):
    tokenizer, sp = make_tokenizer(models["no_bytes"]), load(models["no_bytes"])
    e = sp.piece_to_id("é")
    assert e != UNK
    assert tokenizer.lengths(np.array([BOS, e], np.uint16)).tolist() == [2]


def test_one_token_has_no_lengths(models):
    assert make_tokenizer(models["bpe"]).lengths(np.array([BOS], np.uint16)).tolist() == []


def test_lengths_can_be_summed_without_overflow(models):
    lengths = make_tokenizer(models["bpe"]).lengths(np.full(100_000, 300, np.uint16))
    assert lengths.dtype == np.int64


def test_tokenizer_of_another_size_is_refused(models):
    hp = resolve({}, TOKENIZER_PATH=models["bpe"])
    with pytest.raises(tg.UserError, match=r"\b512\b"):
        tg.Tokenizer(hp)


@pytest.mark.parametrize("content", [None, b"", b"no model"], ids=["absent", "empty", "text"])
def test_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "wrong.model"
    if content is not None:
        path.write_bytes(content)
    hp = resolve({}, TOKENIZER_PATH=path)
    with pytest.raises(tg.UserError, match=r"wrong\.model"):
        tg.Tokenizer(hp)


# ---- the audit


def edges(pieces):
    """The ids that hold no text."""
    return {i for i, (_, kind) in enumerate(pieces) if kind in (CONTROL, UNKNOWN, UNUSED)}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_decoded_bytes_of_any_tokens_are_their_lengths(models, kind, data):
    """Bytes that spell a space, or the marker of one, are left out: no text encodes to them."""
    pieces = read_pieces(models[kind])
    blank = [i for i, (piece, _) in enumerate(pieces) if piece in ("<0x20>", "<0x81>")]
    some = st.integers(0, VOCAB - 1) | st.sampled_from(sorted(edges(pieces)))
    some |= st.integers(4, 259)  # bytes, where the model has them
    ids = data.draw(st.lists(some.filter(lambda i: i not in blank), min_size=1, max_size=40))
    expected = sum(plain_lengths(pieces, [BOS, *ids]))
    assert make_tokenizer(models[kind]).decoded_bytes(np.array(ids, np.uint16)) == expected


@pytest.mark.parametrize(
    ("hexadecimal", "size"),
    [
        ("E4B8AD", 3),  # a character
        ("EFBFBD", 3),  # U+FFFD itself
        ("EFBFBDFF", 4),  # U+FFFD and a byte that decodes to it
        ("E4B8", 2),  # half a character
        ("EDA080", 3),  # a surrogate
        ("C0AF", 2),  # a longer form than needed
        ("F4908080", 4),  # beyond Unicode
        ("00", 1),
    ],
)
def test_decoded_bytes_of_bytes(models, hexadecimal, size):
    sp = load(models["bpe"])
    ids = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in bytes.fromhex(hexadecimal)]
    ids = np.array([BOS, sp.piece_to_id("▁the"), *ids, sp.piece_to_id("▁the"), EOS], np.uint16)
    assert make_tokenizer(models["bpe"]).decoded_bytes(ids) == 3 + size + 4


@pytest.mark.parametrize("kind", KINDS)
def test_audit_accepts_a_tokenizers_own_text(models, kind):
    documents = [*compose_documents(40, seed=3), "A word, 中文 and ☃ \n\t two  spaces", "é", ""]
    tokens = encoded(models[kind], documents)
    make_tokenizer(models[kind]).audit(tokens)


def test_audit_accepts_a_stream_that_ends_anywhere(models):
    """VAL_TOKENS may cut a word, or a character of several bytes."""
    tokens = encoded(models["bpe"], ["the end 中文", "of ☃, a snowman é"])
    tokenizer = make_tokenizer(models["bpe"])
    for stop in range(2, len(tokens)):
        tokenizer.audit(tokens[:stop])


def test_audit_accepts_text_without_any_bos(models):
    tokens = encoded(models["bpe"], compose_documents(10, seed=3))
    make_tokenizer(models["bpe"]).audit(tokens[tokens != BOS])


@pytest.mark.parametrize("documents", [1, 3, 300])
def test_audit_refuses_a_tokenizer_without_a_space_piece(models, documents):
    assert load(models["no_space"]).piece_to_id(SPACE) == UNK
    tokens = encoded(models["no_space"], compose_documents(documents, seed=3))
    with pytest.raises(tg.UserError, match="byte audit"):
        make_tokenizer(models["no_space"]).audit(tokens)


def test_audit_refuses_it_even_where_no_single_space_occurs(models):
    with pytest.raises(tg.UserError, match="byte audit"):
        make_tokenizer(models["no_space"]).audit(encoded(models["no_space"], ["the of and the of"]))


@pytest.mark.parametrize("documents", [1, 5, 300])
@pytest.mark.parametrize(("right", "wrong"), [("bpe", "other_text"), ("other_text", "bpe")])
def test_audit_refuses_a_wrong_tokenizer_of_the_same_size(models, right, wrong, documents):
    texts = compose_documents(documents, seed=3) if right == "bpe" else other_documents()
    tokens = encoded(models[right], texts[:documents])
    with pytest.raises(tg.UserError, match=r"byte audit.*document"):
        make_tokenizer(models[wrong]).audit(tokens)


@pytest.mark.parametrize("kind", ["no_bytes", "unigram"])
def test_audit_refuses_tokens_of_another_kind_of_model(models, kind):
    tokens = encoded(models["bpe"], compose_documents(40, seed=3))
    with pytest.raises(tg.UserError, match="byte audit"):
        make_tokenizer(models[kind]).audit(tokens)


@pytest.mark.parametrize(("strange", "accepted"), [(0, True), (1, True), (30, False)])
def test_audit_refuses_if_over_one_word_in_1000_is_not_as_encoded(models, strange, accepted):
    """Here 100 documents, some of them with a word in single bytes at their end."""
    sp, documents = load(models["bpe"]), []
    for number, text in enumerate(compose_documents(100, seed=3)):
        spelled = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in b"words"]
        ids = sp.encode(text)
        documents.append([BOS, *ids, *spelled] if number < strange else [BOS, *ids])
    tokens = np.concatenate(documents).astype(np.uint16)
    if accepted:
        make_tokenizer(models["bpe"]).audit(tokens)
    else:
        with pytest.raises(tg.UserError, match="byte audit"):
            make_tokenizer(models["bpe"]).audit(tokens)


def lacking(documents):
    """Documents each of which has characters early on that the tokenizer lacks."""
    return [f"{number} ☃ café 中文, {text}" for number, text in enumerate(documents)]


def test_audit_accepts_text_with_characters_that_the_tokenizer_lacks(models):
    """Unknown pieces cannot be encoded again; what is around them can be judged."""
    tokens = encoded(models["no_bytes"], lacking(compose_documents(40, seed=3)))
    assert (tokens == UNK).sum() > 100
    make_tokenizer(models["no_bytes"]).audit(tokens)


def test_audit_judges_what_is_around_unknown_pieces(models):
    tokens = encoded(models["no_bytes"], lacking(compose_documents(40, seed=3)))
    chance = np.random.default_rng(0)
    known = np.flatnonzero(tokens > UNK)
    tokens[known] = chance.permutation(tokens[known])
    with pytest.raises(tg.UserError, match="encodes to other tokens"):
        make_tokenizer(models["no_bytes"]).audit(tokens)


DISORDER = {
    "random ids after the first 128 of each document": lambda chance, ids: np.where(
        (np.arange(len(ids)) < 128) | (chance.random(len(ids)) > 0.95),
        ids,
        chance.integers(4, VOCAB, len(ids)),
    ),
    "each document in disorder": lambda chance, ids: np.append(
        ids[:1], chance.permutation(ids[1:])
    ),
    "every third document in disorder": lambda chance, ids: (
        np.append(ids[:1], chance.permutation(ids[1:])) if chance.random() < 0.33 else ids
    ),
    "one token in 20 at random": lambda chance, ids: np.where(
        (ids == BOS) | (chance.random(len(ids)) > 0.05), ids, chance.integers(4, VOCAB, len(ids))
    ),
}


@pytest.mark.parametrize("disorder", DISORDER)
@pytest.mark.parametrize("most", [2**20, 2**14])
def test_audit_refuses_disorder_anywhere(disorder, most, models, monkeypatch):
    """Whether all tokens are looked at, or some from all over the stream."""
    monkeypatch.setattr(keeper, "AUDITED_TOKENS", most)
    texts = compose_documents(400, seed=3)
    texts = [" ".join(texts[i : i + 4]) for i in range(0, 400, 4)]
    tokens, chance = encoded(models["bpe"], texts), np.random.default_rng(1)
    make_tokenizer(models["bpe"]).audit(tokens)
    parts = np.split(tokens, np.flatnonzero(tokens == BOS)[1:])
    tokens = np.concatenate([DISORDER[disorder](chance, ids) for ids in parts])
    with pytest.raises(tg.UserError, match="encodes to other tokens"):
        make_tokenizer(models["bpe"]).audit(tokens.astype(np.uint16))


SPLIT = '{"splits": {"val": {"unknown_tokens": %s, "unknown_bytes": 777}}}'
# Contents of manifest.json, and whether they tell the bytes of the unknown pieces.
UNKNOWN_IN_MANIFESTS = {
    SPLIT % "COUNT": True,
    SPLIT % "1": False,
    '{"splits": {"val": {"tokens": 3}}}': False,
    '{"splits": []}': False,
    "[" * 100_000: False,
    "no JSON": False,
}


def explained(run) -> str:
    """What keeper.py tells of a run's validation text."""
    lines = []
    run.log = lambda line, *_, **__: lines.append(line)
    val = tg.Validation(run)
    run.keeper.explain_validation(val)
    return "\n".join([*lines, val.note])


def test_unknown_pieces_are_told_with_the_bytes_they_stand_for(models, tmp_path):
    """Without a sidecar it is known only that each is a character at least."""
    tokens = encoded(models["no_bytes"], lacking(compose_documents(10, seed=3)))
    run, unknown = make_run(tmp_path, models["no_bytes"], tokens), int((tokens == UNK).sum())
    at_least = f"warning: at least {unknown} bytes of the"
    assert explained(run).startswith(at_least)
    assert explained(run).endswith(f" unknown_tokens:{unknown}")
    manifest = Path(run.hp.data_path, "manifest.json")
    for content, known in UNKNOWN_IN_MANIFESTS.items():
        manifest.write_text(content.replace("COUNT", str(unknown)))
        assert explained(run).startswith("warning: 777 bytes of the" if known else at_least)
    sizes = np.where(tokens == BOS, 0, np.where(tokens == UNK, 5, 2))
    sidecar = Path(run.hp.data_path, "fineweb_val_bytes_000000.bin")
    sidecar.write_bytes(shard_bytes(sizes))
    assert explained(run).startswith(f"warning: {5 * unknown} bytes of the validation text")


def test_unknown_pieces_are_not_mentioned_where_there_are_none(models, tmp_path):
    run = make_run(tmp_path, models["bpe"], encoded(models["bpe"], compose_documents(10, seed=3)))
    assert "\n" not in explained(run)
    assert explained(run).endswith("byte_audit:ok")


def test_audit_refuses_one_document_with_spaces_as_bytes(models):
    sp = load(models["bpe"])
    documents = [[BOS, *ids] for ids in sp.encode(compose_documents(9, seed=3))]
    space = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
    documents.insert(4, [BOS, sp.piece_to_id("▁the"), *space, sp.piece_to_id("e")])
    assert UNK not in documents[4]
    with pytest.raises(tg.UserError, match=r"document 4\b"):
        make_tokenizer(models["bpe"]).audit(np.concatenate(documents).astype(np.uint16))


def test_audit_refuses_tokens_without_text(models):
    with pytest.raises(tg.UserError, match="byte audit"):
        make_tokenizer(models["bpe"]).audit(np.full(50, BOS, np.uint16))


def tampered(path, **tables):
    """The tokenizer with one entry of its tables changed by one, or negated: name=id."""
    tokenizer = copy.copy(make_tokenizer(path))
    for name, token in tables.items():
        table = getattr(tokenizer, name).copy()
        table[token] = ~table[token] if table.dtype == bool else table[token] + 1
        setattr(tokenizer, name, table)
    return tokenizer


@pytest.mark.parametrize("table", ["base", "lead"])
def test_audit_names_the_first_document_with_a_wrong_count(models, table):
    documents = ["the end of it", "of a the", "one cat", "more of it, and the cat", "one cat"]
    token = load(models["bpe"]).encode("one cat")[1]
    stream = encoded(models["bpe"], documents)
    holding = [token in encoded(models["bpe"], [text]) for text in documents]
    assert holding.index(True) == 2
    with pytest.raises(tg.UserError, match=r"document 2\b"):
        tampered(models["bpe"], **{table: token}).audit(stream)


def test_audit_refuses_byte_tokens_counted_wrongly(models):
    token = load(models["bpe"]).piece_to_id("<0xE4>")
    stream = encoded(models["bpe"], ["of a the", "中"])  # E4 B8 AD
    with pytest.raises(tg.UserError, match=r"document 1\b"):
        tampered(models["bpe"], base=token).audit(stream)


def test_audit_refuses_control_tokens_counted_as_text(models):
    stream = encoded(models["bpe"], ["of a the"])
    with pytest.raises(tg.UserError, match=r"document 0\b"):
        tampered(models["bpe"], base=BOS).audit(stream)


# ---- the score


def make_run(folder, tokenizer, tokens, **values):
    """A process that validates on `tokens`, written to a shard in `folder`."""
    (folder / "fineweb_val_000000.bin").write_bytes(shard_bytes(tokens))
    tiny = {
        "NUM_LAYERS": 2,
        "MODEL_DIM": 16,
        "NUM_HEADS": 2,
        "NUM_KV_HEADS": 1,
        "MLP_MULT": 1,
        "TRAIN_SEQ_LEN": 8,
        "TRAIN_BATCH_TOKENS": 16,
        "MICRO_BATCH_TOKENS": 16,
        "VAL_BATCH_SIZE": 1024,
        "TIED_EMBED_INIT_STD": 1.0,
        "LOGIT_SOFTCAP": 5.0,
        "DTYPE": "fp32",
    }
    tiny |= {"VOCAB_SIZE": len(load(tokenizer))} | values
    return new_run(tiny, DATA_PATH=folder, TOKENIZER_PATH=tokenizer)


def sample_tokens(models, count):
    """The first tokens of a validation stream."""
    tokens = encoded(models["bpe"], compose_documents(5, seed=3))
    assert len(tokens) > count
    return tokens[:count]


def token_by_token(model, tokens, T):
    """NLL of every token after the first, from a forward pass of its own over its prefix."""
    tokens, nll = torch.from_numpy(tokens.astype(np.int64)), []
    for i in range(1, len(tokens)):
        start = (i - 1) // T * T
        inputs, targets = tokens[start:i], tokens[start + 1 : i + 1]
        with torch.no_grad():
            nll.append(model(inputs[None], targets[None])[0, -1].item())
    return np.array(nll)


@pytest.mark.parametrize("count", [2, 3, 8, 9, 10, 17, 33, 49, 60])
def test_every_token_after_the_first_is_scored_once(models, tmp_path, count):
    run = make_run(tmp_path, models["bpe"], sample_tokens(models, count))
    model, val = random_model(run.hp), tg.Validation(run)
    nll, _ = tg.score(model, val, run)
    assert nll.dtype == np.float32
    np.testing.assert_allclose(nll, token_by_token(model, val.tokens, 8), atol=1e-5)


def test_reported_loss_and_bpb_are_those_of_the_nll(models, tmp_path):
    tokens = sample_tokens(models, 100)
    run = make_run(tmp_path, models["bpe"], tokens)
    nll, losses = tg.score(random_model(run.hp), tg.Validation(run), run)
    size = sum(plain_lengths(read_pieces(models["bpe"]), tokens.tolist()))
    total = math.fsum(nll.tolist())
    assert losses["val_loss"] == pytest.approx(total / 99, rel=1e-12)
    assert losses["val_bpb"] == pytest.approx(total / math.log(2) / size, rel=1e-12)


def test_a_uniform_model_has_the_bpb_of_counting(models, tmp_path):
    """An untrained untied head gives every token ln V nats, whatever it is."""
    documents = compose_documents(6, seed=3)
    tokens = encoded(models["bpe"], documents)
    run = make_run(tmp_path, models["bpe"], tokens, TIE_EMBEDDINGS=0)
    losses = tg.score(tg.build_model(run.hp), tg.Validation(run), run)[1]
    sp = load(models["bpe"])
    size = sum(len(sp.decode(sp.encode(text)).encode()) for text in documents)
    assert losses["val_bpb"] == pytest.approx((len(tokens) - 1) * 9 / size, rel=1e-6)


def score_on_ranks(run, val, model, world_size, monkeypatch):
    """The results of all ranks: first each one's share is recorded, then their sum is given."""
    shares, results = [], []
    run.world_size = world_size
    for rank in range(world_size):
        run.rank = rank
        monkeypatch.setattr(tg.dist, "all_reduce", lambda t: shares.append(t.clone()))
        tg.score(model, val, run)
    for rank in range(world_size):
        run.rank = rank
        monkeypatch.setattr(tg.dist, "all_reduce", lambda t: t.copy_(sum(shares)))
        results.append(tg.score(model, val, run))
    return shares, results


@pytest.mark.parametrize("count", [2, 17, 90, 97])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_score_as_one_process(models, tmp_path, world_size, count, monkeypatch):
    run = make_run(tmp_path, models["bpe"], sample_tokens(models, count))
    model, val = random_model(run.hp), tg.Validation(run)
    nll, losses = tg.score(model, val, run)
    shares, results = score_on_ranks(run, val, model, world_size, monkeypatch)
    set_by = torch.stack(shares).count_nonzero(0)  # the last one stands for what is not scored
    assert (set_by[:-1] == 1).all()
    assert set_by[-1] == 0
    for rank_nll, rank_losses in results:
        assert np.array_equal(rank_nll, nll)
        assert rank_losses == losses


def test_small_validation_batches_change_no_score(models, tmp_path, monkeypatch):
    tokens = sample_tokens(models, 90)
    run = make_run(tmp_path, models["bpe"], tokens, MICRO_BATCH_TOKENS=0)
    model, val = random_model(run.hp), tg.Validation(run)
    nll = tg.score(model, val, run)[0]
    small = make_run(tmp_path, models["bpe"], tokens, VAL_BATCH_SIZE=40)
    _, results = score_on_ranks(small, val, model, 3, monkeypatch)
    np.testing.assert_allclose(results[0][0], nll, atol=1e-5)


def test_forward_passes_hold_no_more_than_asked_for(models, tmp_path):
    """And all of them have one shape, that one compiled graph serves."""
    run = make_run(tmp_path, models["bpe"], sample_tokens(models, 90), VAL_BATCH_SIZE=24)
    run.forward_rows, shapes = 100, []

    def forward(inputs, targets, documents=None):
        shapes.append(tuple(inputs.shape))
        return torch.ones(targets.shape)

    tg.score(forward, tg.Validation(run), run)
    assert shapes == [(3, 8)] * 4


def test_scoring_leaves_no_gradient(models, tmp_path):
    run = make_run(tmp_path, models["bpe"], sample_tokens(models, 20))
    model = random_model(run.hp)
    tg.score(model, tg.Validation(run), run)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("val_tokens", "used"), [(0, 90), (2, 2), (50, 50), (90, 90), (1000, 90)])
def test_val_tokens_limits_the_stream(models, tmp_path, val_tokens, used):
    tokens = sample_tokens(models, 90)
    val = tg.Validation(make_run(tmp_path, models["bpe"], tokens, VAL_TOKENS=val_tokens))
    assert val.tokens.tolist() == tokens[:used].tolist()
    assert val.text_bytes == sum(plain_lengths(read_pieces(models["bpe"]), tokens[:used].tolist()))


def test_nll_of_fewer_tokens_is_the_beginning_of_that_of_all(models, tmp_path):
    scores = []
    for count in (0, 43):
        run = make_run(tmp_path, models["bpe"], sample_tokens(models, 90), VAL_TOKENS=count)
        scores.append(tg.score(random_model(run.hp), tg.Validation(run), run)[0])
    assert len(scores[1]) == 42
    np.testing.assert_allclose(scores[1], scores[0][:42], atol=1e-6)


@pytest.mark.parametrize("kind", ["no_space", "other_text"])
def test_validation_audits_before_anything_is_scored(models, tmp_path, kind):
    encoder = models["no_space" if kind == "no_space" else "bpe"]
    run = make_run(tmp_path, models[kind], encoded(encoder, compose_documents(10, seed=3)))
    with pytest.raises(tg.UserError, match="byte audit"):
        tg.Validation(run)


# ---- the published tokenizers on real text


def corpus(count):
    """The first validation documents of the shared corpus, that are not long."""
    path = SHARED / "corpus" / "val.jsonl.xz"
    if not path.exists():
        pytest.skip("no shared corpus here")
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        texts = (json.loads(line)["text"] for line in lines)
        return list(itertools.islice((text for text in texts if len(text) < 20_000), count))


@pytest.mark.parametrize("size", [1024, 2048, 4096, 8192])
def test_published_tokenizers_count_real_text_rightly(tmp_path, size):
    path = SHARED / "tokenizers" / f"fineweb_{size}_bpe.model"
    if not path.exists():
        pytest.skip("no published tokenizers here")
    tokens = encoded(path, corpus(20))
    shape = {"TRAIN_SEQ_LEN": 64, "TRAIN_BATCH_TOKENS": 1024, "MICRO_BATCH_TOKENS": 1024}
    run = make_run(tmp_path, path, tokens, **shape, VAL_TOKENS=8000)
    val, pieces = tg.Validation(run), read_pieces(path)
    lengths = make_tokenizer(path).lengths(tokens)
    assert lengths.tolist() == plain_lengths(pieces, tokens.tolist())
    nll, losses = tg.score(random_model(run.hp), val, run)
    text_bytes = sum(plain_lengths(pieces, tokens[:8000].tolist()))
    expected = math.fsum(nll.tolist()) / math.log(2) / text_bytes
    assert losses["val_bpb"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1024, 8192])
def test_published_tokenizers_count_the_bytes_of_the_decoded_text(size):
    path = SHARED / "tokenizers" / f"fineweb_{size}_bpe.model"
    if not path.exists():
        pytest.skip("no published tokenizers here")
    sp, tokenizer, checked = load(path), make_tokenizer(path), 0
    for text in corpus(40):
        ids = sp.encode(text)
        if UNK not in ids:
            checked += 1
            size = tokenizer.lengths(np.array([BOS, *ids], np.uint16)).sum()
            assert size == len(sp.decode(ids).encode())
    assert checked >= 5


def test_audit_tells_the_published_tokenizers_from_others_of_their_size(tmp_path):
    path = SHARED / "tokenizers" / "fineweb_1024_bpe.model"
    if not path.exists():
        pytest.skip("no published tokenizers here")
    wrong = tmp_path / "wrong.model"
    wrong.write_bytes(train_model(compose_documents(), vocab_size=1024, hard_vocab_limit=False))
    run = make_run(tmp_path, wrong, encoded(path, corpus(20)) % len(load(wrong)))
    with pytest.raises(tg.UserError, match="byte audit"):
        tg.Validation(run)
