"""The artifact: quantization, the file format, and what damaged or malicious files do."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pickle
import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg

# More than 65536 elements, so that the embedding and the MLP are quantized.
SHAPE = {
    "VOCAB_SIZE": 600,
    "NUM_LAYERS": 2,
    "MODEL_DIM": 128,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 2,
    "MLP_MULT": 5,
    "ROPE_BASE": 12345.678,
    "LOGIT_SOFTCAP": 17.5,
    "TRAIN_SEQ_LEN": 16,
    "TRAIN_BATCH_TOKENS": 64,
}
MODEL_SETTINGS = {
    "VOCAB_SIZE",
    "NUM_LAYERS",
    "MODEL_DIM",
    "NUM_HEADS",
    "NUM_KV_HEADS",
    "MLP_MULT",
    "TIE_EMBEDDINGS",
    "ROPE_BASE",
    "LOGIT_SOFTCAP",
    "TRAIN_SEQ_LEN",
}
MATRIX = "blocks.0.fc.weight"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A file that stands for a tokenizer: the artifact knows it only by its digest."""
    path = tmp_path_factory.mktemp("tokenizer") / "some.model"
    path.write_bytes(b"some tokenizer")
    return path


def settings(tokenizer, **values):
    texts = {name: str(value) for name, value in {**SHAPE, "DEVICE": "cpu", **values}.items()}
    return tg.load_settings(texts | {"TOKENIZER_PATH": str(tokenizer)}, check_places=False)


def random_model(hp, seed=0):
    """A model none of whose parameters is as it was initialized."""
    torch.manual_seed(seed)
    model = tg.GPT(hp)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.1, 0.3)
    return model


@pytest.fixture(scope="module")
def packed(tokenizer):
    """An artifact of a random model."""
    hp = settings(tokenizer)
    return tg.pack_artifact(random_model(hp), hp)


@pytest.fixture(scope="module")
def small(tokenizer):
    """A small artifact, of a model as it was initialized."""
    hp = settings(tokenizer, VOCAB_SIZE=8, MODEL_DIM=8, NUM_LAYERS=1)
    torch.manual_seed(0)
    return tg.pack_artifact(tg.GPT(hp), hp)


@functools.cache
def process_settings(tokenizer, **values):
    """The settings of a process that knows nothing of the artifact's."""
    texts = {"TOKENIZER_PATH": str(tokenizer), "DEVICE": "cpu", **values}
    return tg.load_settings(texts, check_places=False)


def load(data, tmp_path, tokenizer, **values):
    """Load an artifact of these bytes in another process."""
    path = tmp_path / "a.artifact"
    path.write_bytes(data)
    return tg.load_artifact(path, process_settings(tokenizer, **values))


def multiplied(arrays):
    """What stored arrays stand for, computed in float64: their product is exact there."""
    return math.prod(a.astype(np.float64) for a in arrays).astype(np.float32)


# ---- which tensors are stored how


@pytest.mark.parametrize(
    ("name", "shape", "dtypes"),
    [
        ("blocks.3.fc.weight", (257, 256), ["<f2", "|i1"]),
        ("blocks.3.attn.c_q.weight", (256, 257), ["<f2", "|i1"]),
        ("tok_emb.weight", (1024, 512), ["<f2", "|i1"]),
        ("lm_head.weight", (1024, 512), ["<f2", "|i1"]),
        ("blocks.3.attn.c_k.weight", (256, 256), ["<f2"]),
        ("tok_emb.weight", (8, 8), ["<f2"]),
        ("skip_weights", (4, 512), ["<f4"]),
        ("skip_weights", (200, 512), ["<f4"]),
        ("blocks.3.attn_scale", (512,), ["<f4"]),
        ("blocks.3.mlp_scale", (512,), ["<f4"]),
        ("blocks.3.resid_mix", (2, 512), ["<f4"]),
        ("blocks.3.attn.q_gain", (8, 1, 1), ["<f4"]),
    ],
)
def test_number_formats_of_tensors(name, shape, dtypes):
    arrays = tg.stored_arrays(name, np.ones(shape, np.float32))
    assert [a.dtype.str for a in arrays] == dtypes
    assert np.broadcast_shapes(*(a.shape for a in arrays)) == shape


def test_int8_scales_are_one_a_row():
    scale, q = tg.stored_arrays(MATRIX, np.ones((257, 300), np.float32))
    assert scale.shape == (257, 1)
    assert q.shape == (257, 300)


def test_control_tensors_are_exact():
    w = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    assert np.array_equal(multiplied(tg.stored_arrays("skip_weights", w)), w)


def test_small_tensors_are_rounded_to_fp16():
    w = np.random.default_rng(0).normal(size=(40, 51)).astype(np.float32)
    stored = multiplied(tg.stored_arrays(MATRIX, w))
    assert np.array_equal(stored, w.astype(np.float16).astype(np.float32))


# ---- the error of quantization


def check_error(w):
    """Every value is within half a step, and steps are no coarser than promised."""
    scale, q = tg.stored_arrays(MATRIX, w)
    step = np.maximum(np.abs(w).max(1), w.astype(np.float64).std(1) * 127 / 40) / 127
    subnormal = 2.0**-25  # the rounding error of the smallest fp16 numbers
    assert (scale[:, 0] <= step * (1 + 2**-10) + subnormal).all()
    # Rounding a scale down cuts the largest values off, which matters for the smallest scales.
    error = np.abs(multiplied([scale, q]) - w.astype(np.float64)).max(1)
    bound = np.maximum(0.5 * scale[:, 0].astype(np.float64) * (1 + 1e-6), 127 * subnormal)
    assert (error <= bound).all()


@given(seed=st.integers(0, 2**32 - 1), exponents=st.tuples(*[st.floats(-12, 6)] * 3))
def test_error_is_at_most_half_a_step(seed, exponents):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(3, 22_000)) * 10.0 ** np.array(exponents)[:, None]
    check_error(w.astype(np.float32))


def test_error_of_rows_with_outliers():
    w = np.random.default_rng(0).normal(size=(40, 2000)).astype(np.float32)
    w[np.arange(40), np.arange(40)] = np.geomspace(10, 1e6, 40)
    check_error(w)
    stored = multiplied(tg.stored_arrays(MATRIX, w))
    np.testing.assert_allclose(stored[np.arange(40), np.arange(40)], w.max(1), rtol=5e-3)


def test_values_are_not_biased():
    w = np.random.default_rng(0).normal(size=(64, 2000)).astype(np.float32)
    scale, q = tg.stored_arrays(MATRIX, w)
    bias = (multiplied([scale, q]) - w).mean() / scale.mean()
    assert abs(bias) < 5e-3  # of a step; that of truncation would be 0.5
    assert abs((q > 0).mean() - (q < 0).mean()) < 0.01


def test_zero_rows_stay_zero():
    w = np.random.default_rng(0).normal(size=(40, 2000)).astype(np.float32)
    w[[0, 7, 39]] = 0
    with np.errstate(divide="raise", invalid="raise"):
        stored = multiplied(tg.stored_arrays(MATRIX, w))
    assert (stored[[0, 7, 39]] == 0).all()
    assert np.isfinite(stored).all()


def test_a_row_of_one_value():
    w = np.full((40, 2000), 0.3, np.float32)
    w[1::2] *= -1
    np.testing.assert_allclose(multiplied(tg.stored_arrays(MATRIX, w)), w, rtol=1e-3)


def test_a_row_does_not_depend_on_the_others():
    w = np.random.default_rng(0).normal(size=(40, 2000)).astype(np.float32)
    before = multiplied(tg.stored_arrays(MATRIX, w))
    w[1:] *= 1000
    after = multiplied(tg.stored_arrays(MATRIX, w))
    assert np.array_equal(after[0], before[0])


# ---- pack and load


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("tied", [0, 1])
def test_loaded_weights_are_those_stored(tmp_path, tokenizer, tied, layers):
    hp = settings(tokenizer, TIE_EMBEDDINGS=tied, NUM_LAYERS=layers)
    model = random_model(hp)
    loaded_hp, weights = load(tg.pack_artifact(model, hp), tmp_path, tokenizer)
    state = model.state_dict()
    assert weights.keys() == state.keys()
    for name, w in state.items():
        assert weights[name].dtype == torch.float32
        stored = multiplied(tg.stored_arrays(name, w.numpy()))
        assert np.array_equal(weights[name].numpy(), stored), name
    tg.GPT(loaded_hp).load_state_dict(weights)


def test_settings_of_the_model_come_from_the_artifact(tmp_path, tokenizer, packed):
    hp, _ = load(packed, tmp_path, tokenizer, NUM_LAYERS="7", LOGIT_SOFTCAP="3")
    expected = settings(tokenizer)
    for name in MODEL_SETTINGS:
        assert getattr(hp, name.lower()) == getattr(expected, name.lower()), name


def test_other_settings_stay_those_of_the_process(tmp_path, tokenizer, packed):
    values = {"VAL_BATCH_SIZE": "32768", "VAL_TOKENS": "77", "SEED": "5"}
    hp, _ = load(packed, tmp_path, tokenizer, **values)
    assert (hp.val_batch_size, hp.val_tokens, hp.seed) == (32768, 77, 5)


@pytest.mark.parametrize("seq_len", [48, 1000, 2048])
def test_any_sequence_length_loads_without_the_settings_of_training(tmp_path, tokenizer, seq_len):
    """EVAL_ONLY needs the artifact alone: the default training batch need not divide."""
    values = {"TRAIN_SEQ_LEN": seq_len, "TRAIN_BATCH_TOKENS": seq_len, "NUM_LAYERS": 1}
    hp = settings(tokenizer, **values)
    loaded, _ = load(tg.pack_artifact(random_model(hp), hp), tmp_path, tokenizer)
    assert loaded.train_seq_len == seq_len


def test_same_model_gives_the_same_bytes(tokenizer, packed):
    hp = settings(tokenizer)
    assert tg.pack_artifact(random_model(hp), hp) == packed


def test_bytes_do_not_depend_on_where_the_run_was(tokenizer, packed, tmp_path):
    copy = tmp_path / "copy.model"
    copy.write_bytes(tokenizer.read_bytes())
    hp = settings(copy, SEED=7, OUT_DIR=tmp_path, RUN_ID="other")
    assert tg.pack_artifact(random_model(hp), hp) == packed


def test_artifact_is_compressed(packed, tokenizer):
    state = random_model(settings(tokenizer)).state_dict()
    stored = [a for name, w in state.items() for a in tg.stored_arrays(name, w.numpy())]
    assert len(packed) < 0.99 * sum(a.nbytes for a in stored)


def test_loading_does_not_change_random_state(tmp_path, tokenizer, packed):
    before = torch.get_rng_state()
    load(packed, tmp_path, tokenizer)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["tok_emb.weight", "skip_weights", "blocks.1.attn.c_k.weight"])
def test_weights_that_are_not_finite_are_refused(tokenizer, name, value):
    hp = settings(tokenizer)
    model = random_model(hp)
    w = dict(model.named_parameters())[name].data
    w.view(-1)[w.numel() // 2] = value
    with pytest.raises(tg.UserError, match=name):
        tg.pack_artifact(model, hp)


@pytest.mark.parametrize("name", ["tok_emb.weight", "blocks.1.attn.c_k.weight"])
def test_weights_that_overflow_as_stored_are_refused(tokenizer, name):
    hp = settings(tokenizer)
    model = random_model(hp)
    dict(model.named_parameters())[name].data[1, 1] = 1e9
    with pytest.raises(tg.UserError, match=name), np.errstate(over="ignore"):
        tg.pack_artifact(model, hp)


# ---- damaged files


def test_every_truncation_is_refused(tmp_path, tokenizer, small):
    load(small, tmp_path, tokenizer)
    lengths = {*range(120), *range(0, len(small), max(1, len(small) // 150)), len(small) - 1}
    for length in sorted(lengths):
        with pytest.raises(tg.UserError):
            load(small[:length], tmp_path, tokenizer)


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_flipped_bit_is_refused(tmp_path, tokenizer, small):
    bits = {*range(60 * 8), *random.Random(0).sample(range(60 * 8, len(small) * 8), 300)}
    for bit in sorted(bits):
        with pytest.raises(tg.UserError):
            load(flipped(small, bit), tmp_path, tokenizer)


def test_what_follows_the_artifact_is_refused(tmp_path, tokenizer, small):
    with pytest.raises(tg.UserError):
        load(small + b"\0", tmp_path, tokenizer)


@pytest.mark.parametrize("version", [0, 2, 65535])
def test_another_version_is_refused_by_its_number(tmp_path, tokenizer, small, version):
    changed = small[:6] + struct.pack("<H", version) + small[8:]
    with pytest.raises(tg.UserError, match=rf"version {version}\b"):
        load(changed, tmp_path, tokenizer)


def test_another_tokenizer_is_refused(tmp_path, small):
    other = tmp_path / "other.model"
    other.write_bytes(b"other tokenizer")
    with pytest.raises(tg.UserError, match=r"other\.model"):
        load(small, tmp_path, other)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("prefix", [0, 20, 52])
def test_a_pickle_is_refused_and_not_run(tmp_path, tokenizer, small, prefix):
    bomb = small[:prefix] + pickle.dumps(Bomb(tmp_path / "exploded"))
    with pytest.raises(tg.UserError):
        load(bomb, tmp_path, tokenizer)
    assert not (tmp_path / "exploded").exists()


def test_a_torch_file_is_refused(tmp_path, tokenizer):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(tg.UserError):
        load((tmp_path / "model.pt").read_bytes(), tmp_path, tokenizer)


# ---- crafted files: their digest is right, their content is not


def sealed(body, header_size, payload_size):
    """An artifact of this body with the right digest."""
    preamble = tg.PREAMBLE.pack(tg.MAGIC, tg.VERSION, header_size, payload_size)
    return preamble + hashlib.sha256(preamble + body).digest() + body


def crafted(header, payload):
    """An artifact of this header (text, or an object for JSON) and this payload."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return sealed(zstandard.ZstdCompressor().compress(text + payload), len(text), len(payload))


def opened(data):
    """The header and the payload of an artifact."""
    header_size, payload_size = tg.PREAMBLE.unpack(data[:20])[2:]
    raw = zstandard.ZstdDecompressor().decompress(data[52:])
    assert len(raw) == header_size + payload_size
    return json.loads(raw[:header_size]), raw[header_size:]


def test_an_artifact_crafted_rightly_loads(tmp_path, tokenizer, small):
    """What the cases below change is the only thing that is wrong in them."""
    load(crafted(*opened(small)), tmp_path, tokenizer)


def changed(path, value):
    """Set header[path[0]][path[1]]... to value."""

    def change(header, payload):
        *outer, last = path
        for key in outer:
            header = header[key]
        header[last] = value
        return payload

    return change


def removed(*path):
    """Delete header[path[0]][path[1]]..."""

    def change(header, payload):
        for key in path[:-1]:
            header = header[key]
        del header[path[-1]]
        return payload

    return change


def digest_key(header):
    """Under which name the header holds the tokenizer's digest."""
    return next(key for key, value in header.items() if isinstance(value, str) and len(value) == 64)


def product(*shapes):
    """Let the embedding be a product of arrays of these shapes, which the payload does hold: fp16
    scales and int8. None is the right shape."""

    def change(header, payload):
        at = 0
        for name, layout in header["tensors"].items():
            size = sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in layout)
            if name == "tok_emb.weight":
                whole = [layout[-1][1] if shape is None else shape for shape in shapes]
                *scales, last = whole
                layout[:] = [*(["<f2", shape] for shape in scales), ["|i1", last]]
                zeros = bytes(2 * sum(map(math.prod, scales)) + math.prod(last))
                return payload[:at] + zeros + payload[at + size :]
            at += size
        raise AssertionError

    return change


def test_a_product_crafted_rightly_loads(tmp_path, tokenizer, small):
    """So the products below are refused for their shapes."""
    header, payload = opened(small)
    payload = product([8, 1], None)(header, payload)
    load(crafted(header, payload), tmp_path, tokenizer)


EMBEDDING = ("tensors", "tok_emb.weight")
CRAFTED = {
    "no settings": removed("settings"),
    "no tokenizer digest": lambda header, payload: header.pop(digest_key(header)) and payload,
    "tokenizer digest null": lambda header, payload: (
        header.update({digest_key(header): None}) or payload
    ),
    "no tensors": removed("tensors"),
    "settings not an object": changed(["settings"], [1, 2]),
    "settings null": changed(["settings"], None),
    "setting missing": removed("settings", "LOGIT_SOFTCAP"),
    "setting a list": changed(["settings", "NUM_LAYERS"], [1]),
    "setting null": changed(["settings", "NUM_LAYERS"], None),
    "setting not a number": changed(["settings", "NUM_LAYERS"], "one"),
    "setting NaN": changed(["settings", "LOGIT_SOFTCAP"], "nan"),
    "setting out of range": changed(["settings", "MODEL_DIM"], "0"),
    "setting absurd": changed(["settings", "NUM_LAYERS"], "1000000000"),
    "setting unknown": changed(["settings", "NUM_LAYER"], "1"),
    "setting too large": changed(["settings", "MODEL_DIM"], "65536"),
    "heads do not divide": changed(["settings", "NUM_HEADS"], "3"),
    "more layers": changed(["settings", "NUM_LAYERS"], "3"),
    "untied": changed(["settings", "TIE_EMBEDDINGS"], "0"),
    "a tensor missing": removed(*EMBEDDING),
    "a tensor more": changed(["tensors", "extra"], [["<f4", [0]]]),
    "tensors a list": changed(["tensors"], []),
    "layout empty": changed(EMBEDDING, []),
    "layout a number": changed(EMBEDDING, 3),
    "layout too deep": changed(EMBEDDING, [[["<f2", [8, 8]]]]),
    "shape wrong": changed(EMBEDDING, [["<f2", [4, 16]]]),
    "shape of one dimension": changed(EMBEDDING, [["<f2", [64]]]),
    "shape a number": changed(EMBEDDING, [["<f2", 64]]),
    "shape negative": changed(EMBEDDING, [["<f2", [-8, -8]]]),
    "shape minus one": changed(EMBEDDING, [["<f2", [-1]]]),
    "shape fractional": changed(EMBEDDING, [["<f2", [8.0, 8.0]]]),
    "shape of text": changed(EMBEDDING, [["<f2", ["8", "8"]]]),
    "shape huge": changed(EMBEDDING, [["<f2", [2**40, 2**40]]]),
    "dtype object": changed(EMBEDDING, [["|O", [8, 8]]]),
    "dtype unknown": changed(EMBEDDING, [["x9", [8, 8]]]),
    "dtype text": changed(EMBEDDING, [["<U1", [8, 4]]]),
    "dtype huge": changed(EMBEDDING, [["<U500000000", [8, 8]]]),
    "dtype a number": changed(EMBEDDING, [[7, [8, 8]]]),
    "dtype structured": changed(EMBEDDING, [["i4,f4", [8, 2]]]),
    "dtype of time": changed(EMBEDDING, [["<m8[s]", [8, 2]]]),
    "dtype complex": changed(EMBEDDING, [["<c8", [8, 2]]]),
    "product of terabytes": product([2**21, 1], [1, 2**21]),
    "product of terabytes, then the shape": product([2**21, 1, 1, 1], [2**21, 1, 1], None),
    "product of one dimension more": product([2, 1, 1], None),
    "product that does not broadcast": product([3, 5], None),
    "payload longer": lambda header, payload: payload + b"\0",
    "payload shorter": lambda header, payload: payload[:-1],
    "payload empty": lambda header, payload: b"",
}


@pytest.mark.parametrize("change", CRAFTED.values(), ids=CRAFTED.keys())
def test_crafted_content_is_refused(tmp_path, tokenizer, small, change):
    header, payload = opened(small)
    payload = change(header, payload)
    with pytest.raises(tg.UserError):
        load(crafted(header, payload), tmp_path, tokenizer)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (4, 3)])
def test_model_that_cannot_run_is_refused(tmp_path, tokenizer, heads, kv_heads):
    """Its tensors are those that its settings ask for, but heads of odd size cannot be rotated,
    and 3 heads of keys cannot be shared among 4 of queries."""
    hp = settings(tokenizer, VOCAB_SIZE=8, MODEL_DIM=8, NUM_LAYERS=1)
    hp = dataclasses.replace(hp, num_heads=heads, num_kv_heads=kv_heads)
    with pytest.raises(tg.UserError):
        load(tg.pack_artifact(tg.GPT(hp), hp), tmp_path, tokenizer)


HEADERS = {
    "empty": b"",
    "not JSON": b"{'settings': 1}",
    "cut off": b'{"settings": ',
    "not UTF-8": b"\xff\xfe\x00",
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "text": b'"settings tensors tokenizer_sha256"',
    "nested too deep": b"[" * 100_000,
    "a long number": b"1" * 10_000,
}


@pytest.mark.parametrize("text", HEADERS.values(), ids=HEADERS.keys())
def test_header_that_is_no_json_object_is_refused(tmp_path, tokenizer, small, text):
    with pytest.raises(tg.UserError):
        load(crafted(text, opened(small)[1]), tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("name", "text"), [("OUT_DIR", "/tmp"), ("VAL_TOKENS", "2"), ("DATA_PATH", "x"), ("SEED", "1")]
)
def test_artifact_cannot_set_more_than_the_model(tmp_path, tokenizer, small, name, text):
    """Else it could choose the data that it is scored on, or where files are written."""
    header, payload = opened(small)
    header["settings"][name] = text
    before = tg.load_settings({}, check_places=False)
    try:
        hp, _ = load(crafted(header, payload), tmp_path, tokenizer)
    except tg.UserError:
        return
    assert getattr(hp, name.lower()) == getattr(before, name.lower())


def frame(content_size, blocks):
    """A zstd frame that promises content_size bytes."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", content_size) + blocks


RAW_END, RLE_BLOCK = b"\x01\x00\x00", b"\x03\x00\x10"  # an empty last block; one of 128 KiB
BODIES = {
    "no zstd": (b"no zstd at all, but long enough", 10, 21),
    "cut frame header": (b"\x28\xb5\x2f\xfd", 2, 2),
    "unknown size": (b"\x28\xb5\x2f\xfd\x00\x58" + RAW_END, 0, 0),
    "no content": (frame(0, RAW_END), 0, 0),
    "less content than promised": (frame(100, RAW_END), 50, 50),
    "more content than promised": (frame(100, RLE_BLOCK + b"x"), 50, 50),
    "no blocks": (frame(100, b""), 50, 50),
    "damaged blocks": (zstandard.compress(bytes(range(256)) * 9)[:-20] + b"\xff" * 20, 4, 2300),
    "a header beyond the content": (zstandard.compress(b"{}"), 2**32 - 1, 2),
    "sizes that overflow": (zstandard.compress(b"{}"), 2**32 - 1, 2**64 - 1),
    "terabytes": (frame(2**42, RAW_END), 10, 2**42 - 10),
    "over two gigabytes": (frame(2**31, RAW_END), 10, 2**31 - 10),
    "exabytes": (frame(2**63, RAW_END), 10, 2**63 - 10),
}


@pytest.mark.parametrize(("body", "header_size", "payload_size"), BODIES.values(), ids=BODIES)
def test_bodies_that_lie_are_refused_and_allocate_little(
    tmp_path, tokenizer, body, header_size, payload_size
):
    data = sealed(body, header_size, payload_size)
    tracemalloc.start()
    try:
        with pytest.raises(tg.UserError):
            load(data, tmp_path, tokenizer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6


# ---- atomic_write


def test_atomic_write_leaves_the_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    tg.atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_replaces_a_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"much longer than the new one")
    tg.atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_failed_write_leaves_the_old_file_whole(tmp_path, failure):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        file.flush()
        assert path.read_bytes() == b"old"  # nobody sees the half
        raise failure

    with pytest.raises(failure):
        tg.atomic_write(path, write)
    assert path.read_bytes() == b"old"


def test_atomic_write_can_be_repeated_after_a_failure(tmp_path):
    path = tmp_path / "a.bin"

    def fail(file):
        file.write(b"a long beginning")
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        tg.atomic_write(path, fail)
    assert not path.exists()
    tg.atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_syncs_before_it_renames(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    tg.atomic_write(tmp_path / "a.bin", lambda file: file.write(b"new"))
    assert events[:2] == ["sync", "rename"]
