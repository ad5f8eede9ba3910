"""The artifact: quantization, the file format, and what damaged or malicious files do."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import struct
import tracemalloc
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
import zstandard
from conftest import load, resolve
from hypothesis import given
from hypothesis import strategies as st

import quantizer
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
    "QUANT_BITS_MLP",
    "QUANT_CLIP",
    "QUANT_SIGMA",
    "COMPRESSOR",
    "QUANT_METHOD",
    "QUANT_TRELLIS",
    "QUANT_CLASSES",
}
COMPRESSORS = ("zstd", "rans")
CODERS = (*COMPRESSORS, "gptq")
MATRIX = "blocks.0.fc.weight"


def settings(tokenizer, **values):
    return resolve(SHAPE, TOKENIZER_PATH=tokenizer, **values)


def pack(model, hp):
    return tg.pack_artifact(model.state_dict(), hp)


def stored(name, w, **values):
    """The arrays that stand for a parameter, w a NumPy array."""
    hp = dataclasses.replace(tg.Hyperparameters(), **values)
    return tg.stored_arrays(name, torch.from_numpy(w), hp)


def random_model(hp, seed=0):
    """A model none of whose parameters is as it was initialized."""
    torch.manual_seed(seed)
    model = tg.build_model(hp)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.1, 0.3)
    return model


@pytest.fixture(scope="module")
def packed(tokenizer):
    """An artifact of a random model."""
    hp = settings(tokenizer)
    return pack(random_model(hp), hp)


@pytest.fixture(scope="module")
def small(tokenizer):
    """A small artifact, of a model as it was initialized."""
    hp = settings(tokenizer, VOCAB_SIZE=8, MODEL_DIM=8, NUM_LAYERS=1)
    torch.manual_seed(0)
    return pack(tg.build_model(hp), hp)


# Two quantized matrices of few columns, which are fast to decode.
CODED = {
    **{"NUM_LAYERS": 1, "VOCAB_SIZE": 1100, "MODEL_DIM": 64, "MLP_MULT": 1},
    **{"BIGRAM_BUCKETS": 2100, "BIGRAM_DIM": 32, "QUANT_BITS_BIGRAM": 5},
}
CODED_SHAPES = [(1100, 64), (2100, 32)]
LEVELS = sum(map(math.prod, CODED_SHAPES))


@functools.cache
def coded_artifact(tokenizer, coder):
    """An artifact of one layer with quantized matrices, coded by this coder."""
    how = {"QUANT_METHOD": "gptq"} if coder == "gptq" else {"COMPRESSOR": coder}
    hp = settings(tokenizer, **CODED, **how)
    return quantizer.packer(random_model(hp).state_dict(), hp)(hp)


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
        ("bigram.bigram_scale", (), ["<f4"]),
        ("blocks.3.attn_scale", (512,), ["<f4"]),
        ("blocks.3.mlp_scale", (512,), ["<f4"]),
        ("blocks.3.resid_mix", (2, 512), ["<f4"]),
        ("blocks.3.attn.q_gain", (8, 1, 1), ["<f4"]),
    ],
)
def test_number_formats_of_tensors(name, shape, dtypes):
    arrays = stored(name, np.ones(shape, np.float32), bigram_buckets=2)
    assert [a.dtype.str for a in arrays] == dtypes
    assert np.broadcast_shapes(*(a.shape for a in arrays)) == shape


def test_int8_scales_are_one_a_row():
    scale, q = stored(MATRIX, np.ones((257, 300), np.float32))
    assert scale.shape == (257, 1)
    assert q.shape == (257, 300)


def test_control_tensors_are_exact():
    w = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    assert np.array_equal(multiplied(stored("skip_weights", w)), w)


def test_small_tensors_are_rounded_to_fp16():
    w = np.random.default_rng(0).normal(size=(40, 51)).astype(np.float32)
    back = multiplied(stored(MATRIX, w))
    assert np.array_equal(back, w.astype(np.float16).astype(np.float32))


# ---- the error of quantization


def check_error(w):
    """Every value is within half a step, and steps are no coarser than promised."""
    scale, q = stored(MATRIX, w)
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
    back = multiplied(stored(MATRIX, w))
    np.testing.assert_allclose(back[np.arange(40), np.arange(40)], w.max(1), rtol=5e-3)


def test_values_are_not_biased():
    w = np.random.default_rng(0).normal(size=(64, 2000)).astype(np.float32)
    scale, q = stored(MATRIX, w)
    bias = (multiplied([scale, q]) - w).mean() / scale.mean()
    assert abs(bias) < 5e-3  # of a step; that of truncation would be 0.5
    assert abs((q > 0).mean() - (q < 0).mean()) < 0.01


def test_zero_rows_stay_zero():
    w = np.random.default_rng(0).normal(size=(40, 2000)).astype(np.float32)
    w[[0, 7, 39]] = 0
    with np.errstate(divide="raise", invalid="raise"):
        back = multiplied(stored(MATRIX, w))
    assert (back[[0, 7, 39]] == 0).all()
    assert np.isfinite(back).all()


def test_a_row_of_one_value():
    w = np.full((40, 2000), 0.3, np.float32)
    w[1::2] *= -1
    np.testing.assert_allclose(multiplied(stored(MATRIX, w)), w, rtol=1e-3)


def test_a_row_does_not_depend_on_the_others():
    w = np.random.default_rng(0).normal(size=(40, 2000)).astype(np.float32)
    before = multiplied(stored(MATRIX, w))
    w[1:] *= 1000
    after = multiplied(stored(MATRIX, w))
    assert np.array_equal(after[0], before[0])


# ---- pack and load


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("tied", [0, 1])
def test_loaded_weights_are_those_stored(tmp_path, tokenizer, tied, layers):
    hp = settings(tokenizer, TIE_EMBEDDINGS=tied, NUM_LAYERS=layers)
    model = random_model(hp)
    loaded_hp, weights = load(pack(model, hp), tmp_path, tokenizer)
    state = model.state_dict()
    assert weights.keys() == state.keys()
    for name, w in state.items():
        assert weights[name].dtype == torch.float32
        expected = multiplied(tg.stored_arrays(name, w, hp))
        assert np.array_equal(weights[name].numpy(), expected), name
    tg.build_model(loaded_hp).load_state_dict(weights)


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("clip", ["rowmax", "sigma"])
def test_every_clip_and_compressor_survives(tmp_path, tokenizer, clip, compressor):
    bits = {f"QUANT_BITS_{part}": b for part, b in (("MLP", 5), ("ATTN", 6), ("EMBED", 7))}
    values = {"NUM_LAYERS": 1, "QUANT_CLIP": clip, "COMPRESSOR": compressor, "MODEL_DIM": 264}
    hp = settings(tokenizer, **values, **bits)
    state = random_model(hp).state_dict()
    loaded_hp, weights = load(tg.pack_artifact(state, hp), tmp_path, tokenizer)
    assert (loaded_hp.quant_clip, loaded_hp.compressor) == (clip, compressor)
    for name, w in state.items():
        expected = multiplied(tg.stored_arrays(name, w, hp))
        assert np.array_equal(weights[name].numpy(), expected), name


def test_a_parameter_of_no_dimensions_survives(tmp_path, tokenizer):
    hp = settings(tokenizer, BIGRAM_BUCKETS=64, SMEAR_GATE=1)
    state = random_model(hp).state_dict()
    _, weights = load(tg.pack_artifact(state, hp), tmp_path, tokenizer)
    assert weights["bigram.bigram_scale"].shape == ()
    assert torch.equal(weights["bigram.bigram_scale"], state["bigram.bigram_scale"])


def test_memory_layout_and_dtype_of_weights_do_not_matter(tokenizer):
    """Values that bf16 holds exactly give the same bytes in fp32, bf16 and transposed memory."""
    hp = settings(tokenizer)
    state = {n: w.bfloat16() for n, w in random_model(hp).state_dict().items()}
    expected = tg.pack_artifact({n: w.float() for n, w in state.items()}, hp)
    turned = {n: w.float().t().contiguous().t() if w.ndim == 2 else w for n, w in state.items()}
    assert not turned["tok_emb.weight"].is_contiguous()
    assert tg.pack_artifact(state, hp) == expected
    assert tg.pack_artifact(turned, hp) == expected


def test_packing_does_not_change_the_weights(tokenizer):
    hp = settings(tokenizer)
    state = random_model(hp).state_dict()
    before = {name: w.clone() for name, w in state.items()}
    tg.pack_artifact(state, hp)
    assert all(torch.equal(w, before[name]) for name, w in state.items())


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
    loaded, _ = load(pack(random_model(hp), hp), tmp_path, tokenizer)
    assert loaded.train_seq_len == seq_len


def test_same_model_gives_the_same_bytes(tokenizer, packed):
    hp = settings(tokenizer)
    assert pack(random_model(hp), hp) == packed


def test_bytes_do_not_depend_on_where_the_run_was(tokenizer, packed, tmp_path):
    copy = tmp_path / "copy.model"
    copy.write_bytes(tokenizer.read_bytes())
    hp = settings(copy, SEED=7, OUT_DIR=tmp_path, RUN_ID="other")
    assert pack(random_model(hp), hp) == packed


def test_artifact_is_compressed(packed, tokenizer):
    state = random_model(settings(tokenizer)).state_dict()
    hp = settings(tokenizer)
    arrays = [a for name, w in state.items() for a in tg.stored_arrays(name, w, hp)]
    assert len(packed) < 0.99 * sum(a.nbytes for a in arrays)


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
        pack(model, hp)


@pytest.mark.parametrize("name", ["tok_emb.weight", "blocks.1.attn.c_k.weight"])
def test_weights_that_overflow_as_stored_are_refused(tokenizer, name):
    hp = settings(tokenizer)
    model = random_model(hp)
    dict(model.named_parameters())[name].data[1, 1] = 1e9
    with pytest.raises(tg.UserError, match=name), np.errstate(over="ignore"):
        pack(model, hp)


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


@pytest.mark.parametrize("version", [0, 1, tg.VERSION + 1, 65535])
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


@pytest.mark.parametrize("prefix", [0, 16, 48])
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


def sealed(head, levels, header_size, head_size=None, version=tg.VERSION):
    """An artifact of these parts with the right digest."""
    head_size = len(head) if head_size is None else head_size
    preamble = tg.PREAMBLE.pack(tg.MAGIC, version, header_size, head_size)
    return preamble + hashlib.sha256(preamble + head + levels).digest() + head + levels


def crafted(header, payload, levels, version=tg.VERSION):
    """An artifact of this header (text, or an object for JSON), floats, and coded levels."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    head = zstandard.ZstdCompressor().compress(text + payload)
    return sealed(head, levels, len(text), version=version)


def opened(data):
    """The header, the floats and the coded levels of an artifact."""
    header_size, head_size = tg.PREAMBLE.unpack(data[:16])[2:]
    raw = zstandard.ZstdDecompressor().decompress(data[48 : 48 + head_size])
    return json.loads(raw[:header_size]), raw[header_size:], data[48 + head_size :]


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
    "setting of its shape missing": removed("settings", "MODEL_DIM"),
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
    "payload longer": lambda header, payload: payload + b"\0",
    "payload shorter": lambda header, payload: payload[:-1],
    "payload empty": lambda header, payload: b"",
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=5,
)
TEXTS = st.sampled_from(
    ["-1", "0", "1", "2", "64", "65536", "9" * 30, "nan", "1e999", "rans", "gptq", ""]
)


@pytest.mark.parametrize("change", CRAFTED.values(), ids=CRAFTED.keys())
def test_crafted_content_is_refused(tmp_path, tokenizer, small, change):
    header, payload, levels = opened(small)
    payload = change(header, payload)
    with pytest.raises(tg.UserError):
        load(crafted(header, payload, levels), tmp_path, tokenizer)


def places_in(value, path=()):
    """The path to everything that is inside of a JSON value."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield (*path, key)
        yield from places_in(value[key], (*path, key))


def fuzzed(header, edits):
    """Replace some of what is inside of a header by other values."""
    for where, value in edits:
        places = [*places_in(header)]
        if places:
            changed(places[where % len(places)], value)(header, b"")


def load_or_refuse(data, folder, tokenizer):
    """Whatever the bytes are, nothing but UserError may come of it."""
    with contextlib.suppress(tg.UserError):
        load(data, folder, tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for the files of all examples of a property."""
    return tmp_path_factory.mktemp("fuzzed")


@given(edits=st.lists(st.tuples(st.integers(0, 999), TEXTS | JSON), min_size=1, max_size=3))
def test_any_edited_header_is_loaded_or_refused(folder, tokenizer, small, edits):
    header, payload, levels = opened(small)
    fuzzed(header, edits)
    load_or_refuse(crafted(header, payload, levels), folder, tokenizer)


@given(edits=st.dictionaries(st.sampled_from(tg.MODEL_SETTINGS), TEXTS | st.text(max_size=5)))
def test_any_texts_of_settings_are_loaded_or_refused(folder, tokenizer, small, edits):
    header, payload, levels = opened(small)
    header["settings"].update(edits)
    load_or_refuse(crafted(header, payload, levels), folder, tokenizer)


@pytest.mark.parametrize("coder", CODERS)
@given(payload=st.binary(max_size=99), levels=st.binary(max_size=99), keep=st.booleans())
def test_any_floats_and_levels_are_loaded_or_refused(
    folder, tokenizer, coder, payload, levels, keep
):
    header, right, _ = opened(coded_artifact(tokenizer, coder))
    load_or_refuse(crafted(header, right if keep else payload, levels), folder, tokenizer)


@given(head=st.binary(max_size=99), levels=st.binary(max_size=99), sizes=st.integers(0, 200))
def test_any_sealed_bytes_are_refused(folder, tokenizer, head, levels, sizes):
    data = sealed(head, levels, sizes % 20, sizes)
    with pytest.raises(tg.UserError):
        load(data, folder, tokenizer)


@given(data=st.binary(max_size=200), magic=st.booleans())
def test_any_bytes_are_refused(folder, tokenizer, data, magic):
    with pytest.raises(tg.UserError):
        load(tg.MAGIC * magic + data, folder, tokenizer)


LAYOUTS = {
    "rows wrong": ("tok_emb.weight", [["<f2", [1099, 1]], ["|i1", [1100, 64]]]),
    "a scale for all": ("tok_emb.weight", [["<f2", [1, 1]], ["|i1", [1100, 64]]]),
    "scales of terabytes": ("tok_emb.weight", [["<f2", [2**21, 1]], ["|i1", [1, 2**21]]]),
    "levels turned": ("tok_emb.weight", [["<f2", [1100, 1]], ["|i1", [64, 1100]]]),
    "levels of terabytes": ("tok_emb.weight", [["<f2", [1100, 1]], ["|i1", [2**21, 2**21]]]),
    "levels alone": ("tok_emb.weight", [["|i1", [1100, 64]]]),
    "fp32 scales": ("tok_emb.weight", [["<f4", [1100, 1]], ["|i1", [1100, 64]]]),
    "uint8 levels": ("tok_emb.weight", [["<f2", [1100, 1]], ["|u1", [1100, 64]]]),
    "three factors": (
        "tok_emb.weight",
        [["<f2", [1100, 1]], ["<f2", [1100, 1]], ["|i1", [1100, 64]]],
    ),
}


@pytest.mark.parametrize(("name", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_that_no_matrix_has_are_refused(tmp_path, tokenizer, name, layout):
    header, payload, levels = opened(coded_artifact(tokenizer, "zstd"))
    header["tensors"][name] = layout
    data = crafted(header, payload, levels)
    assert refused_peak(data, tmp_path, tokenizer) < 20e6


@pytest.mark.parametrize(
    ("name", "scales", "levels"),
    [
        ("blocks.0.attn_scale", [128, 1], [128]),
        ("blocks.0.attn.q_gain", [4, 1], [4, 1, 1]),
        ("bigram.bigram_scale", [1], []),
    ],
)
def test_levels_of_what_is_no_matrix_are_refused(tmp_path, tokenizer, name, scales, levels):
    """Broadcasting would make of 128 numbers a square of them."""
    hp = settings(tokenizer, NUM_LAYERS=1, BIGRAM_BUCKETS=64)
    state = random_model(hp).state_dict()
    arrays = {n: tg.stored_arrays(n, w, hp) for n, w in state.items()}
    arrays[name] = [np.ones(scales, "<f2"), np.ones(levels, "|i1")]
    header = opened(tg.pack_artifact(state, hp))[0]
    header["tensors"] = {n: [(a.dtype.str, a.shape) for a in v] for n, v in arrays.items()}
    flat = [a for v in arrays.values() for a in v]
    planes = [
        np.frombuffer(a.tobytes(), "u1").reshape(-1, a.itemsize).T.tobytes()
        for a in flat
        if a.itemsize > 1
    ]
    coded = tg.compress([[a] for a in flat if a.itemsize == 1], hp)
    with pytest.raises(tg.UserError):
        load(crafted(header, b"".join(planes), coded), tmp_path, tokenizer)


# ---- crafted levels


def header_of(state, hp):
    """The header of an artifact of these weights."""
    texts = tg.setting_texts(hp)
    return {
        "settings": {name: texts[name] for name in tg.MODEL_SETTINGS},
        "tokenizer": hashlib.sha256(Path(hp.tokenizer_path).read_bytes()).hexdigest(),
        "tensors": {n: tg.layout(n, w, hp) for n, w in state.items()},
    }


def refused_peak(data, tmp_path, tokenizer):
    """How many bytes are allocated at most while this artifact is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(tg.UserError):
            load(data, tmp_path, tokenizer)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@dataclasses.dataclass
class Stream:
    """The parts of levels that rANS has coded."""

    low: int  # k of the first value
    width: int  # values
    contexts: int
    codes: np.ndarray  # of their frequencies
    states: np.ndarray  # of the lanes
    words: np.ndarray
    size: int | None = None  # of the codes' zstd frame, where it is not the right one

    @classmethod
    def of(cls, levels, lanes):
        """Take coded levels apart."""
        low, width, contexts, size = struct.unpack_from("<hHHI", levels)
        codes = np.frombuffer(zstandard.decompress(levels[10 : 10 + size]), "u1")
        rest = np.frombuffer(levels, "<u2", -1, 10 + size).copy()
        states = rest[: 2 * lanes].view("<u4")
        return cls(low, width, contexts, codes.reshape(contexts, width), states, rest[2 * lanes :])

    def sealed(self):
        """The bytes of these parts."""
        table = zstandard.compress(self.codes.astype("u1").tobytes())
        size = len(table) if self.size is None else self.size
        head = struct.pack("<hHHI", self.low, self.width, self.contexts, size)
        states = self.states.astype("<u4").tobytes()
        return head + table + states + self.words.astype("<u2").tobytes()


def lanes_of(shapes):
    """How many lanes rANS has for matrices of these shapes."""
    return sum(math.ceil(rows / 64) * math.ceil(cols / 512) for rows, cols in shapes)


def zeros_coded(compressor, shapes):
    """Zeros as the compressor's own library codes them; by rANS, with no word."""
    if compressor == "zstd":
        return zstandard.compress(bytes(sum(map(math.prod, shapes))))
    codes = np.full((2 * len(shapes) + 2, 1), 225)
    codes[1::2] = 0  # single levels have even parity
    states = np.full(lanes_of(shapes), 2**16)
    return Stream(0, 1, len(codes), codes, states, np.zeros(0)).sealed()


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_the_helper_that_codes_zeros_does_so(compressor):
    hp = dataclasses.replace(tg.Hyperparameters(), compressor=compressor)
    scales = [[np.ones((rows, 1), "<f2")] for rows, _ in CODED_SHAPES]
    data = zeros_coded(compressor, CODED_SHAPES)
    decoded = tg.decompress(data, scales, CODED_SHAPES, hp)
    assert [matrix.shape for matrix in decoded] == CODED_SHAPES
    assert not any(matrix.any() for matrix in decoded)


@functools.cache
def random_coded(compressor, *shapes):
    """Random levels, as the compressor codes them."""
    rng = np.random.default_rng(0)
    hp = dataclasses.replace(tg.Hyperparameters(), compressor=compressor)
    matrices = [rng.integers(-9, 10, shape).astype(np.int8) for shape in shapes]
    return tg.compress([[matrix] for matrix in matrices], hp)


DAMAGE = {
    "empty": lambda levels: b"",
    "a byte less": lambda levels: levels[:-1],
    "two bytes less": lambda levels: levels[:-2],
    "cut in half": lambda levels: levels[: len(levels) // 2],
    "cut at its start": lambda levels: levels[2:],
    "a byte more": lambda levels: levels + b"\0",
    "four bytes more": lambda levels: levels + b"\0" * 4,
    "twice": lambda levels: levels * 2,
    "another part of zstd more": lambda levels: levels + zeros_coded("zstd", [(2, 5)]),
    "another part of rANS more": lambda levels: levels + zeros_coded("rans", [(2, 5)]),
    "garbage": lambda levels: random.Random(0).randbytes(len(levels)),
    "zero bytes": lambda levels: bytes(len(levels)),
    "zeros of zstd, one less": lambda levels: zeros_coded("zstd", [(1, LEVELS - 1)]),
    "zeros of zstd, one more": lambda levels: zeros_coded("zstd", [(1, LEVELS + 1)]),
    "a bomb of zstd": lambda levels: zeros_coded("zstd", [(10_000, 10_000)]),
    "a bomb of rANS": lambda levels: zeros_coded("rans", [(1100, 64), (2**22, 2**9)]),
}


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_crafted_levels_are_refused_and_allocate_little(tmp_path, tokenizer, coder, damage):
    header, payload, levels = opened(coded_artifact(tokenizer, coder))
    data = crafted(header, payload, damage(levels))
    # The model has 0.2 M parameters, 0.7 MB.
    assert refused_peak(data, tmp_path, tokenizer) < 8e6


RESIZED = {
    "a level less": [(1, LEVELS - 1)],
    "a level more": [(1, LEVELS + 1)],
    "a column less": [(1100, 64), (2100, 31)],
    "a column more": [(1100, 64), (2100, 33)],
    "a row less": [(1100, 64), (2099, 32)],
    "a row more": [(1101, 64), (2100, 32)],
    "a band of rows more": [(1100, 64), (2112 + 64, 32)],
    "a matrix less": [(1100, 64)],
    "a matrix more": [(1100, 64), (2100, 32), (1, 1)],
}


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("shapes", RESIZED.values(), ids=RESIZED.keys())
def test_levels_of_other_matrices_are_refused(tmp_path, tokenizer, compressor, shapes):
    header, payload, _ = opened(coded_artifact(tokenizer, compressor))
    data = crafted(header, payload, random_coded(compressor, *shapes))
    assert refused_peak(data, tmp_path, tokenizer) < 8e6


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_levels_of_matrices_of_the_same_shapes_load(tmp_path, tokenizer, compressor):
    """So the cases above are refused for their shapes."""
    header, payload, _ = opened(coded_artifact(tokenizer, compressor))
    load(crafted(header, payload, random_coded(compressor, *CODED_SHAPES)), tmp_path, tokenizer)


@pytest.mark.parametrize("coder", CODERS)
def test_levels_crafted_rightly_load(tmp_path, tokenizer, coder):
    """So the cases above are refused for what they change."""
    data = coded_artifact(tokenizer, coder)
    load(crafted(*opened(data)), tmp_path, tokenizer)


@pytest.mark.parametrize(("coder", "other"), [*itertools.permutations(CODERS, 2)])
def test_levels_of_another_coder_are_refused(tmp_path, tokenizer, coder, other):
    header, payload, _ = opened(coded_artifact(tokenizer, coder))
    levels = opened(coded_artifact(tokenizer, other))[2]
    with pytest.raises(tg.UserError):
        load(crafted(header, payload, levels), tmp_path, tokenizer)


def rans_parts(tokenizer):
    """The header and the floats of an artifact, and the parts of its levels."""
    header, payload, levels = opened(coded_artifact(tokenizer, "rans"))
    return header, payload, Stream.of(levels, lanes_of(CODED_SHAPES))


def test_the_helper_that_takes_levels_apart_puts_them_together(tmp_path, tokenizer):
    header, payload, stream = rans_parts(tokenizer)
    _, expected = load(coded_artifact(tokenizer, "rans"), tmp_path, tokenizer)
    _, weights = load(crafted(header, payload, stream.sealed()), tmp_path, tokenizer)
    assert all(torch.equal(weights[name], w) for name, w in expected.items())
    assert (stream.states[:, None] >= 2**16).all()


def with_parts(**changed):
    """Change parts by functions of them."""
    return lambda stream: dataclasses.replace(
        stream, **{name: change(getattr(stream, name)) for name, change in changed.items()}
    )


def with_code(value):
    """Change the frequency of the most frequent level of the first matrix."""

    def change(codes):
        codes = codes.copy()
        codes[2, codes[2].argmax()] = value
        return codes

    return with_parts(codes=change)


def without_sum(stream):
    """Frequencies that are far more than the slots, of which the largest cannot make up."""
    codes = np.ones((stream.contexts, 16_000))
    codes[:, :8] = 177  # 2^11
    return dataclasses.replace(stream, width=16_000, codes=codes)


def swelled(stream):
    """A table of as many values as are allowed, most of which have no slots, and a word more."""
    codes = np.pad(stream.codes, ((0, 0), (0, 16_383 - stream.width)))
    words = np.append(stream.words, 1)
    return dataclasses.replace(stream, width=16_383, codes=codes, words=words)


def with_state(index, change):
    def replace(states):
        states = states.copy()
        states[index] = change(states[index])
        return states

    return with_parts(states=replace)


RANS_DAMAGE = {
    "frequency zero": with_code(0),
    "frequency too large": with_code(255),
    "frequencies of another matrix": with_parts(codes=lambda codes: np.roll(codes, 2, 0)),
    "frequencies of other levels": with_parts(codes=lambda codes: np.roll(codes, 1, 1)),
    "no frequencies": with_parts(codes=np.zeros_like),
    "frequencies that do not add up": without_sum,
    "table of no values": with_parts(width=lambda _: 0, codes=lambda codes: codes[:, :0]),
    "table with a value less": with_parts(width=lambda width: width - 1),
    "table with a value more": with_parts(width=lambda width: width + 1),
    "table with more values than slots": with_parts(
        width=lambda _: 16_385, codes=lambda codes: np.resize(codes, (len(codes), 16_385))
    ),
    "table of another shape": with_parts(
        width=lambda width: 2 * width, contexts=lambda contexts: contexts // 2
    ),
    "table that tells of a matrix more": with_parts(contexts=lambda contexts: contexts + 2),
    "table with a matrix less": with_parts(
        contexts=lambda contexts: contexts - 2, codes=lambda codes: codes[:-2]
    ),
    "table with a matrix more": with_parts(
        contexts=lambda contexts: contexts + 2, codes=lambda codes: np.pad(codes, ((0, 2), (0, 0)))
    ),
    "table of 16,383 values and a word more": swelled,
    "table of no bytes": with_parts(size=lambda _: 0),
    "table of another size": with_parts(size=lambda _: 30),
    "table beyond the end": with_parts(size=lambda _: 2**32 - 1),
    "a word less": with_parts(words=lambda words: words[:-1]),
    "a word more": with_parts(words=lambda words: np.append(words, words[-1])),
    "a word dropped in the middle": with_parts(
        words=lambda words: np.delete(words, len(words) // 2)
    ),
    "states only": with_parts(words=lambda words: words[:0]),
    "half of the states": with_parts(
        states=lambda states: states[: len(states) // 2], words=lambda words: words[:0]
    ),
    "one state": with_parts(states=lambda states: states[:1], words=lambda words: words[:0]),
    "no state": with_parts(states=lambda states: states[:0], words=lambda words: words[:0]),
    "a state of zero": with_state(0, lambda _: 0),
    "the largest state": with_state(3, lambda _: 2**32 - 1),
    "a state changed a little": with_state(5, lambda state: state ^ 1),
    "a state below its interval": with_state(1, lambda _: 2**16 - 1),
    "two states exchanged": with_parts(states=lambda states: states[::-1]),
}


@pytest.mark.parametrize("change", RANS_DAMAGE.values(), ids=RANS_DAMAGE.keys())
def test_crafted_rans_streams_are_refused_and_allocate_little(tmp_path, tokenizer, change):
    header, payload, stream = rans_parts(tokenizer)
    data = crafted(header, payload, change(stream).sealed())
    assert refused_peak(data, tmp_path, tokenizer) < 8e6


@given(edits=st.lists(st.tuples(st.floats(0, 0.9999), st.integers(1, 255)), min_size=1))
@hypothesis.settings(max_examples=25)
def test_any_changed_bytes_of_rans_raise_or_decode_to_as_many_levels(tokenizer, edits):
    data = bytearray(opened(coded_artifact(tokenizer, "rans"))[2])
    for place, change in edits:
        data[int(place * len(data))] ^= change
    hp = dataclasses.replace(tg.Hyperparameters(), compressor="rans")
    scales = [[np.ones((rows, 1), "<f2")] for rows, _ in CODED_SHAPES]
    try:
        matrices = tg.decompress(bytes(data), scales, CODED_SHAPES, hp)
    except (ValueError, struct.error, zstandard.ZstdError, tg.UserError):
        return
    assert [matrix.shape for matrix in matrices] == CODED_SHAPES


def test_a_thin_matrix_beside_a_wide_one_allocates_little(tmp_path, tokenizer):
    """Lanes have 64 rows; those of one column are far shorter than those of 512."""
    hp = settings(tokenizer, NUM_LAYERS=1, BIGRAM_BUCKETS=2**17, BIGRAM_DIM=1, COMPRESSOR="rans")
    with torch.device("meta"):
        state = tg.build_model(hp).state_dict()
    header = header_of(state, hp)
    kept = [array for name, w in state.items() for array in tg.layout(name, w, hp)]
    kept = [array for array in kept if "i" not in array[0]]
    size = sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in kept)
    data = crafted(header, bytes(size), b"")
    assert refused_peak(data, tmp_path, tokenizer) < 30e6  # of 0.5 M weights


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (4, 3)])
def test_model_that_cannot_run_is_refused(tmp_path, tokenizer, heads, kv_heads):
    """Its tensors are those that its settings ask for, but heads of odd size cannot be rotated,
    and 3 heads of keys cannot be shared among 4 of queries."""
    hp = settings(tokenizer, VOCAB_SIZE=8, MODEL_DIM=8, NUM_LAYERS=1)
    hp = dataclasses.replace(hp, num_heads=heads, num_kv_heads=kv_heads)
    with pytest.raises(tg.UserError):
        load(pack(tg.build_model(hp), hp), tmp_path, tokenizer)


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
        load(crafted(text, *opened(small)[1:]), tmp_path, tokenizer)


@pytest.mark.parametrize("size", [2**20, 2**24 - 1, 2**30])
def test_a_header_that_is_a_bomb_allocates_little(tmp_path, tokenizer, size):
    """Each pair of brackets becomes an object of 60 bytes."""
    text = b"[" + b"{}," * (min(size, 2**24) // 3 - 1) + b"{}]"
    data = sealed(zstandard.compress(text.ljust(min(size, 2**24))), b"", size)
    assert refused_peak(data, tmp_path, tokenizer) < 100e6


@pytest.mark.parametrize(
    ("name", "text"), [("OUT_DIR", "/tmp"), ("VAL_TOKENS", "2"), ("DATA_PATH", "x"), ("SEED", "1")]
)
def test_artifact_cannot_set_more_than_the_model(tmp_path, tokenizer, small, name, text):
    """Else it could choose the data that it is scored on, or where files are written."""
    header, payload, levels = opened(small)
    header["settings"][name] = text
    before = tg.load_settings({}, check_places=False)
    try:
        hp, _ = load(crafted(header, payload, levels), tmp_path, tokenizer)
    except tg.UserError:
        return
    assert getattr(hp, name.lower()) == getattr(before, name.lower())


def frame(content_size, blocks):
    """A zstd frame that promises content_size bytes."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", content_size) + blocks


RAW_END, RLE_BLOCK = b"\x01\x00\x00", b"\x03\x00\x10"  # an empty last block; one of 128 KiB
HEADS = {
    "no zstd": (b"no zstd at all, but long enough", 10, None),
    "cut frame header": (b"\x28\xb5\x2f\xfd", 2, None),
    "unknown size": (b"\x28\xb5\x2f\xfd\x00\x58" + RAW_END, 0, None),
    "no content": (frame(0, RAW_END), 0, None),
    "less content than promised": (frame(100, RAW_END), 50, None),
    "more content than promised": (frame(100, RLE_BLOCK + b"x"), 50, None),
    "no blocks": (frame(100, b""), 50, None),
    "damaged blocks": (zstandard.compress(bytes(range(256)) * 9)[:-20] + b"\xff" * 20, 4, None),
    "a header beyond the content": (zstandard.compress(b"{}"), 2**32 - 1, None),
    "sizes that overflow": (zstandard.compress(b"{}"), 2**32 - 1, 2**32 - 1),
    "a head of nothing": (zstandard.compress(b"{}"), 2, 0),
    "terabytes": (frame(2**42, RAW_END), 10, None),
    "exabytes": (frame(2**63, RAW_END), 10, None),
}


@pytest.mark.parametrize(("head", "header_size", "head_size"), HEADS.values(), ids=HEADS)
def test_heads_that_lie_are_refused_and_allocate_little(
    tmp_path, tokenizer, head, header_size, head_size
):
    data = sealed(head, b"", header_size, head_size)
    assert refused_peak(data, tmp_path, tokenizer) < 50e6


@pytest.mark.parametrize("change", [-1, 1, 5, 2**31])
def test_a_wrong_size_of_the_head_is_refused(tmp_path, tokenizer, small, change):
    """Where no matrix is quantized, little follows the head."""
    header_size, head_size = tg.PREAMBLE.unpack(small[:16])[2:]
    head, levels = small[48 : 48 + head_size], small[48 + head_size :]
    data = sealed(head, levels, header_size, head_size + change)
    with pytest.raises(tg.UserError):
        load(data, tmp_path, tokenizer)


@pytest.mark.parametrize(
    "values",
    [
        {"MODEL_DIM": "65536", "NUM_HEADS": "512", "NUM_KV_HEADS": "512"},
        {"VOCAB_SIZE": "65536", "MODEL_DIM": "32768"},
        {"NUM_LAYERS": "64", "MODEL_DIM": "8192"},
        {"BIGRAM_BUCKETS": "1000000000000"},
        {"BIGRAM_BUCKETS": "9" * 30},
        {"MLP_MULT": "64", "MODEL_DIM": "65536"},
    ],
    ids=str,
)
def test_a_model_too_large_for_its_file_is_refused_before_it_is_made(
    tmp_path, tokenizer, small, values
):
    header, payload, levels = opened(small)
    header["settings"].update(values)
    data = crafted(header, payload, levels)
    assert refused_peak(data, tmp_path, tokenizer) < 100e6


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_huge_model_of_zeros_in_a_small_file_is_refused(tmp_path, tokenizer, compressor):
    """All of it fits its settings; but 20 KB are no file for 34 M weights."""
    values = {"VOCAB_SIZE": 8, "MODEL_DIM": 8, "NUM_LAYERS": 1, "BIGRAM_BUCKETS": 2**18}
    hp = settings(tokenizer, **values, COMPRESSOR=compressor)
    with torch.device("meta"):
        state = tg.build_model(hp).state_dict()
    first = [tg.layout(name, w, hp)[0] for name, w in state.items()]
    size = sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in first)
    data = crafted(header_of(state, hp), bytes(size), zeros_coded(compressor, [(2**18, 128)]))
    assert len(data) < 20_000
    assert refused_peak(data, tmp_path, tokenizer) < 4e6


# ---- artifacts of older and newer scripts


def with_settings(data, gone=(), version=tg.VERSION, **texts):
    """An artifact whose header lacks these settings, or has other texts in them."""
    header, payload, levels = opened(data)
    kept = {name: text for name, text in header["settings"].items() if name not in gone}
    return crafted(header | {"settings": kept | texts}, payload, levels, version)


# Version 2 knew no quantizer.py.
NEW_IN_3 = ("QUANT_METHOD", "QUANT_TRELLIS", "QUANT_CLASSES")


@pytest.mark.parametrize("clip", ["rowmax", "sigma"])
def test_version_2_of_zstd_loads_to_the_same_weights(tmp_path, tokenizer, clip):
    hp = settings(tokenizer, **CODED, QUANT_CLIP=clip)
    data = pack(random_model(hp), hp)
    expected_hp, expected = load(data, tmp_path, tokenizer)
    old = with_settings(data, NEW_IN_3, version=2)
    assert struct.unpack_from("<H", old, 6) == (2,)
    loaded_hp, weights = load(old, tmp_path, tokenizer)
    assert loaded_hp == expected_hp
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], w) for name, w in expected.items())


def test_version_2_with_no_quantized_matrix_loads(tmp_path, tokenizer, small):
    _, expected = load(small, tmp_path, tokenizer)
    _, weights = load(with_settings(small, NEW_IN_3, version=2), tmp_path, tokenizer)
    assert all(torch.equal(weights[name], w) for name, w in expected.items())


@pytest.mark.parametrize("coder", ["rans", "gptq"])
def test_version_2_of_what_has_another_format_now_is_refused(tmp_path, tokenizer, coder):
    """Version 2 coded levels by another rANS, whose bytes might decode to anything."""
    data = with_settings(coded_artifact(tokenizer, coder), version=2)
    with pytest.raises(tg.UserError, match=r"a\.artifact: format version 2\b"):
        load(data, tmp_path, tokenizer)


def test_a_header_cannot_tell_another_version_than_the_preamble(tmp_path, tokenizer):
    header, payload, levels = opened(coded_artifact(tokenizer, "rans"))
    with pytest.raises(tg.UserError, match="format version 2"):
        load(crafted(header | {"version": 3}, payload, levels, version=2), tmp_path, tokenizer)


@pytest.mark.parametrize("name", ["ROPE_BASE", "LOGIT_SOFTCAP", "EVAL_SEQ_LEN", "QUANT_SIGMA"])
def test_a_setting_that_the_header_lacks_is_at_its_default(tmp_path, tokenizer, small, name):
    hp, _ = load(with_settings(small, [name]), tmp_path, tokenizer)
    assert getattr(hp, name.lower()) == getattr(tg.Hyperparameters(), name.lower())


@pytest.mark.parametrize("name", ["ROPE_BASE", "LOGIT_SOFTCAP", "QUANT_SIGMA"])
def test_a_setting_that_the_header_lacks_is_not_that_of_the_process(
    tmp_path, tokenizer, small, name
):
    hp, _ = load(with_settings(small, [name]), tmp_path, tokenizer, **{name: "9.5"})
    assert getattr(hp, name.lower()) == getattr(tg.Hyperparameters(), name.lower())


def test_a_header_may_lack_all_settings_that_are_at_their_default(tmp_path, tokenizer, small):
    defaults = tg.setting_texts(tg.Hyperparameters())
    texts = opened(small)[0]["settings"]
    same = [name for name, text in texts.items() if text == defaults[name]]
    assert len(same) > 15
    expected, weights = load(small, tmp_path, tokenizer)
    hp, found = load(with_settings(small, same), tmp_path, tokenizer)
    assert hp == expected
    assert all(torch.equal(found[name], w) for name, w in weights.items())


def test_settings_may_be_in_any_order(tmp_path, tokenizer, small):
    header, payload, levels = opened(small)
    header["settings"] = dict(reversed(header["settings"].items()))
    hp, _ = load(crafted(header, payload, levels), tmp_path, tokenizer)
    assert hp == load(small, tmp_path, tokenizer)[0]


def test_a_setting_of_a_newer_script_is_refused_by_its_name(tmp_path, tokenizer, small):
    message = r"a\.artifact: unknown setting HEAD_GATE: a newer script made it$"
    with pytest.raises(tg.UserError, match=message):
        load(with_settings(small, HEAD_GATE="0"), tmp_path, tokenizer)


def test_a_value_of_a_newer_script_is_refused_with_its_setting(tmp_path, tokenizer, small):
    message = r"a\.artifact: MLP_ACT='swiglu': expected one of relu2, leaky_relu2$"
    with pytest.raises(tg.UserError, match=message):
        load(with_settings(small, MLP_ACT="swiglu"), tmp_path, tokenizer)


def test_an_artifact_clipped_at_percentiles_loads(tmp_path, tokenizer):
    """The clip only chose the levels: reading them does not need it."""
    data = coded_artifact(tokenizer, "zstd")
    hp, weights = load(with_settings(data, QUANT_CLIP="percentile"), tmp_path, tokenizer)
    expected, expected_weights = load(data, tmp_path, tokenizer)
    assert hp == expected
    assert all(torch.equal(weights[name], w) for name, w in expected_weights.items())


@pytest.mark.parametrize("compressor", ["zlib", "lzma"])
def test_a_coder_that_is_gone_is_refused_by_its_name(tmp_path, tokenizer, small, compressor):
    message = rf"a\.artifact: COMPRESSOR='{compressor}': expected one of zstd, rans$"
    with pytest.raises(tg.UserError, match=message):
        load(with_settings(small, COMPRESSOR=compressor), tmp_path, tokenizer)


# ---- settings that are given for a score


@pytest.mark.parametrize(
    ("name", "own"), [("EVAL_STRIDE", 4), ("EVAL_DOC_ISOLATED", 1), ("EVAL_SEQ_LEN", 32)]
)
@pytest.mark.parametrize("given", [None, 0, 8])
def test_what_is_given_for_a_score_overrides_the_artifact_at_0_too(
    tmp_path, tokenizer, small, name, own, given
):
    if name == "EVAL_DOC_ISOLATED" and given:
        given = 1
    asked = {} if given is None else {name: str(given)}
    hp, _ = load(with_settings(small, **{name: str(own)}), tmp_path, tokenizer, **asked)
    assert getattr(hp, name.lower()) == (own if given is None else given)


def test_what_is_given_for_a_score_counts_where_the_header_lacks_it(tmp_path, tokenizer, small):
    hp, _ = load(with_settings(small, ["EVAL_STRIDE"]), tmp_path, tokenizer, EVAL_STRIDE="8")
    assert hp.eval_stride == 8


def test_a_stride_that_was_trained_with_can_be_switched_off(run, tmp_path):
    """The score is that of a model that never had one, of the same weights."""
    never, own, off = (tmp_path / f"{name}.npy" for name in ("never", "own", "off"))
    run("never", SAVE_NLL=never)
    artifact = run("own", EVAL_STRIDE=16, SAVE_NLL=own) / "final_model.artifact"
    run("off", EVAL_ONLY=1, ARTIFACT=artifact, EVAL_STRIDE=0, SAVE_NLL=off)
    assert off.read_bytes() == never.read_bytes()
    assert own.read_bytes() != never.read_bytes()


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
