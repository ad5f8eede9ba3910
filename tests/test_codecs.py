"""How weights become levels and levels become bytes: the quantizers and the entropy coders."""

import dataclasses
import itertools
import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt as tg

CLIPS = ("rowmax", "sigma")
COMPRESSORS = ("zstd", "rans")
BITS = range(2, 9)


def choose(**values):
    """Settings that differ from the defaults in these fields."""
    return dataclasses.replace(tg.Hyperparameters(), **values)


def top_level(bits):
    return 2 ** (bits - 1) - 1


def restored(arrays):
    """What stored arrays stand for, in float64."""
    return math.prod(a.astype(np.float64) for a in arrays)


def gaussian_rows(rows=6, cols=3000, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, cols)) * np.geomspace(0.01, 10, rows)[:, None]).astype("f4")


def gaussian_levels(count, bits, deviation, seed=0):
    top = top_level(bits)
    w = np.random.default_rng(seed).normal(size=count) * deviation
    return np.rint(w).clip(-top, top).astype(np.int8)


def entropy_bytes(arrays):
    """The order-0 entropy of arrays that are each coded by their own frequencies."""
    total = 0.0
    for array in arrays:
        counts = np.unique(array, return_counts=True)[1].astype(np.float64)
        total -= (counts * np.log2(counts / counts.sum())).sum() / 8
    return total


# ---- quantization


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip", CLIPS)
def test_error_is_half_a_step_within_the_levels_and_the_cut_beyond_them(clip, bits):
    w = gaussian_rows()
    w[:, 0] *= 30  # something to cut off
    hp = choose(quant_clip=clip, quant_sigma=3.0)
    scale, levels = tg.quantize(w, bits, hp)
    step = scale.astype(np.float64)
    error = np.abs(restored([scale, levels]) - w.astype(np.float64))
    end = step * top_level(bits)
    bound = np.maximum(step / 2, np.abs(w.astype(np.float64)) - end)
    assert (error <= bound + 1e-6 * step).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip", CLIPS)
def test_levels_are_symmetric_whole_numbers_of_their_bits(clip, bits):
    scale, levels = tg.quantize(gaussian_rows(), bits, choose(quant_clip=clip, quant_sigma=2.0))
    assert (scale.dtype.str, scale.shape) == ("<f2", (6, 1))
    assert (levels.dtype.str, levels.shape) == ("|i1", (6, 3000))
    assert (levels.min(), levels.max()) == (-top_level(bits), top_level(bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [1.5, 5.0, 12.85, 40.0])
def test_sigma_step_is_k_deviations_over_the_top_level(bits, k):
    w = gaussian_rows()
    scale, _ = tg.quantize(w, bits, choose(quant_clip="sigma", quant_sigma=k))
    step = k * w.astype(np.float64).std(1) / top_level(bits)
    np.testing.assert_allclose(scale[:, 0].astype(np.float64), step, rtol=2**-11 + 1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_rowmax_step_spans_the_row_but_is_at_least_a_40th_of_its_deviation(bits):
    w = gaussian_rows()
    w[:2] = np.sign(w[:2]) * 0.3  # the floor does not bind here, and binds at no other row
    w[2] = np.linspace(-1, 1, w.shape[1])
    scale, _ = tg.quantize(w, bits, choose(quant_clip="rowmax"))
    exact = w.astype(np.float64)
    step = np.maximum(np.abs(exact).max(1) / top_level(bits), exact.std(1) / 40)
    np.testing.assert_allclose(scale[:, 0].astype(np.float64), step, rtol=2**-11 + 1e-6)


@pytest.mark.parametrize("bits", [5, 6, 8])
@pytest.mark.parametrize("k", [8.0, 12.85])
def test_size_law_of_sigma_on_gaussian_rows(bits, k):
    """Entropy is the differential one, log2(σ·sqrt(2πe)), less log2 of the step k·σ/Q; a coarse
    step widens the distribution by its own variance, step²/12."""
    w = gaussian_rows(rows=60, cols=4000)
    _, levels = tg.quantize(w, bits, choose(quant_clip="sigma", quant_sigma=k))
    step = k / top_level(bits)
    law = 0.5 * math.log2(2 * math.pi * math.e * (1 + step**2 / 12)) - math.log2(step)
    assert 8 * entropy_bytes([levels]) / levels.size == pytest.approx(law, abs=0.01)
    coded = tg.compress("rans", [levels])
    assert 8 * len(coded) / levels.size == pytest.approx(law, abs=0.03)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip", CLIPS)
def test_rows_of_zeros_stay_zero_and_raise_no_warning(clip, bits):
    w = gaussian_rows()
    w[[0, 3]] = 0
    with np.errstate(all="raise"):
        stored = restored(tg.quantize(w, bits, choose(quant_clip=clip)))
    assert (stored[[0, 3]] == 0).all()
    assert np.isfinite(stored).all()


@pytest.mark.parametrize("clip", CLIPS)
def test_a_row_is_quantized_alike_beside_any_others(clip):
    w = gaussian_rows()
    hp = choose(quant_clip=clip, quant_sigma=4.0)
    before = restored(tg.quantize(w, 5, hp))[2]
    w[3:] *= 1000
    w[0] = 0
    assert np.array_equal(restored(tg.quantize(w, 5, hp))[2], before)


@pytest.mark.parametrize("clip", CLIPS)
def test_quantizing_does_not_change_the_weights(clip):
    w = gaussian_rows()
    before = w.copy()
    tg.quantize(w, 5, choose(quant_clip=clip))
    assert np.array_equal(w, before)


# ---- which parameter has which bits

BITS_BY_PART = {
    "quant_bits_mlp": 3,
    "quant_bits_attn": 4,
    "quant_bits_embed": 5,
    "quant_bits_bigram": 7,
}


@pytest.mark.parametrize(
    ("name", "shape", "bits"),
    [
        ("blocks.0.fc.weight", (512, 256), 3),
        ("blocks.10.proj.weight", (256, 512), 3),
        *((f"blocks.3.attn.{c}.weight", (512, 256), 4) for c in ("c_q", "c_k", "c_v", "proj")),
        ("tok_emb.weight", (1024, 256), 5),
        ("lm_head.weight", (1024, 256), 5),
        ("bigram.table.weight", (4096, 128), 7),
        ("bigram.expand.weight", (1024, 128), 7),
        ("blocks.0.fc.weight", (256, 256), 0),
        ("blocks.0.fc.weight", (257, 256), 3),
        ("tok_emb.weight", (8, 8), 0),
        ("skip_weights", (5, 65536), 0),
        ("blocks.0.attn_scale", (70000,), 0),
        ("blocks.0.mlp_scale", (70000,), 0),
        ("blocks.0.resid_mix", (2, 65536), 0),
        ("blocks.0.attn.q_gain", (70000, 1, 1), 0),
        ("smear", (70000,), 0),
        ("bigram.bigram_scale", (), 0),
    ],
)
def test_bits_of_each_kind_of_parameter(name, shape, bits):
    assert tg.bits_of(name, torch.empty(shape, device="meta"), choose(**BITS_BY_PART)) == bits


def test_all_large_matrices_of_a_model_are_quantized_and_nothing_else():
    hp = choose(bigram_buckets=1024, smear_gate=1, tie_embeddings=0, num_layers=2, **BITS_BY_PART)
    with torch.device("meta"):
        state = tg.GPT(hp).state_dict()
    quantized = {name for name, w in state.items() if tg.bits_of(name, w, hp)}
    assert quantized == {n for n, w in state.items() if n.endswith("weight") and w.numel() > 65536}


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "int8_zstd"),
        ({"quant_bits_mlp": 5, "quant_bits_attn": 6, "compressor": "rans"}, "int568_rans"),
        ({"quant_bits_mlp": 6, "quant_bits_attn": 6, "quant_bits_embed": 6}, "int6_zstd"),
        ({"quant_bits_bigram": 4, "compressor": "rans"}, "int8_rans"),
        ({"quant_bits_bigram": 4, "bigram_buckets": 64}, "int48_zstd"),
    ],
)
def test_scheme_names_the_bits_in_use_and_the_coder(values, name):
    assert tg.scheme(choose(**values)) == name


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [
        ("COMPRESSOR", "zlib", "zstd, rans"),
        ("COMPRESSOR", "lzma", "zstd, rans"),
        ("QUANT_CLIP", "percentile", "rowmax, sigma"),
    ],
)
def test_what_is_gone_is_refused_with_what_is_right(name, text, right):
    with pytest.raises(tg.UserError, match=f"{name}={text}: expected one of {right}$"):
        tg.load_settings({name: text}, check_places=False)


# ---- rANS


def check_rans(arrays):
    sizes = [array.size for array in arrays]
    decoded = tg.rans_decode(tg.rans_encode(arrays), sizes)
    expected = np.concatenate([*(array.ravel() for array in arrays), np.empty(0, np.int8)])
    assert decoded.dtype == np.int8
    assert np.array_equal(decoded, expected)


@st.composite
def level_arrays(draw):
    """An array of int8: of one symbol, of a few with any skew, or of any."""
    size = draw(st.integers(1, 300) | st.integers(8000, 40_000))
    symbols = draw(st.lists(st.integers(-127, 127), min_size=1, max_size=255, unique=True))
    weights = np.array(draw(st.lists(st.floats(-15, 0), min_size=255, max_size=255)))
    p = 10.0 ** weights[: len(symbols)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.choice(np.array(symbols, np.int8), size, p=p / p.sum())


@given(st.lists(level_arrays(), max_size=4))
@settings(max_examples=60)
@example([])
def test_rans_is_lossless(arrays):
    check_rans(arrays)


@pytest.mark.parametrize("value", [-128, -127, -1, 0, 127])
@pytest.mark.parametrize("size", [1, 2, 8191, 8192, 100_000])
def test_rans_is_lossless_on_one_symbol(value, size):
    check_rans([np.full(size, value, np.int8)])


@pytest.mark.parametrize("pair", [(-127, 127), (0, 1), (126, 127), (-128, -127)])
@pytest.mark.parametrize("at", [0, 77_777, 199_999])
def test_rans_is_lossless_on_two_symbols_of_extreme_skew(pair, at):
    """One in 200,000 has a share below that of a table's smallest entry."""
    array = np.full(200_000, pair[0], np.int8)
    array[at] = pair[1]
    check_rans([array])


def test_rans_is_lossless_on_all_symbols_evenly_and_with_one_frequent():
    every = np.arange(-128, 128).astype(np.int8)
    check_rans([np.tile(every, 300), every, np.concatenate([np.zeros(10**6, np.int8), every])])


@pytest.mark.parametrize("lanes", [1, 2, 3, 9])
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_rans_is_lossless_at_sizes_around_multiples_of_its_lanes(lanes, off):
    size = 8192 * lanes + off
    array = gaussian_levels(size, 6, 4.0)
    check_rans([array])
    check_rans([array[: size // 2], array[size // 2 :]])
    for rest in (size - lanes, size - lanes - 1, lanes, lanes + 1):
        check_rans([array[:rest]])


def test_rans_is_lossless_on_arrays_far_smaller_than_their_lanes():
    check_rans([gaussian_levels(10**6, 5, 2.0), np.array([3], np.int8), np.zeros(5, np.int8)])


@pytest.mark.parametrize("bits", [5, 6, 8])
@pytest.mark.parametrize("count", [1_000_000, 4_000_000])
def test_rans_is_within_half_a_percent_of_the_entropy(bits, count):
    arrays = [gaussian_levels(count, bits, top_level(bits) / 12.85)]
    data = tg.rans_encode(arrays)
    assert entropy_bytes(arrays) * 0.9999 <= len(data) <= 1.005 * entropy_bytes(arrays)


def test_rans_is_within_half_a_percent_for_matrices_of_different_spread():
    arrays = [gaussian_levels(300_000, 6, s, seed=i) for i, s in enumerate((1.0, 2.5, 9.0))]
    assert len(tg.rans_encode(arrays)) <= 1.005 * entropy_bytes(arrays)


def plain_decode(data, sizes):
    """The documented format, symbol by symbol with Python's integers."""
    words = list(struct.unpack(f"<{len(data) // 2}H", data))
    lanes = min(max(1, sum(sizes) // 8192), 2048)
    states = [words.pop(0) | words.pop(0) << 16 for _ in range(lanes)]
    decoded = []
    for size in sizes:
        low, count = words.pop(0), words.pop(0)
        table = [words.pop(0) for _ in range(count)]
        slots = [(s, start) for s, start in enumerate(itertools.accumulate([0, *table[:-1]]))]
        for i in range(size):
            lane = i % lanes
            x, slot = states[lane] >> 14, states[lane] & 16383
            symbol, start = next((s, c) for s, c in reversed(slots) if c <= slot and table[s])
            decoded.append(low + symbol - 128)
            x = table[symbol] * x + slot - start
            states[lane] = x << 16 | words.pop(0) if x < 65536 else x
    assert words == []
    assert states == [65536] * lanes
    return decoded


@pytest.mark.parametrize("sizes", [[7], [500, 1, 60], [9000, 9000]])
def test_rans_stream_is_read_by_a_plain_decoder_of_the_format(sizes):
    arrays = [gaussian_levels(size, 6, 3.0, seed=i) for i, size in enumerate(sizes)]
    arrays[0][:2] = -31, 31
    assert plain_decode(tg.rans_encode(arrays), sizes) == np.concatenate(arrays).tolist()


# ---- every compressor


@pytest.mark.parametrize("compressor", COMPRESSORS)
@given(st.lists(level_arrays(), max_size=3))
@settings(max_examples=15)
def test_every_compressor_round_trips(compressor, arrays):
    sizes = [array.size for array in arrays]
    decoded = tg.decompress(compressor, tg.compress(compressor, arrays), sizes)
    assert decoded.dtype == np.int8
    assert decoded.tolist() == [level for array in arrays for level in array.tolist()]


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_matrices_are_coded_row_by_row_whatever_their_memory_layout(compressor):
    matrix = gaussian_levels(6000, 6, 3.0).reshape(60, 100)
    data = tg.compress(compressor, [np.asfortranarray(matrix)])
    assert np.array_equal(tg.decompress(compressor, data, [6000]), matrix.ravel())
    assert data == tg.compress(compressor, [matrix])


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_same_levels_give_the_same_bytes(compressor):
    arrays = [gaussian_levels(30_000, 6, 3.0, seed=i) for i in range(2)]
    first = tg.compress(compressor, arrays)
    tg.compress(compressor, arrays[::-1])
    assert tg.compress(compressor, [array.copy() for array in arrays]) == first


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_levels_can_be_trained_after_decoding(compressor):
    """PyTorch warns of memory that it may not write to."""
    levels = tg.decompress(compressor, tg.compress(compressor, [np.ones(9, np.int8)]), [9])
    assert levels.flags.writeable


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_coders_use_the_frequencies_of_levels(compressor):
    """Order-0 entropy is what is to be had; zstd's codes have whole bits a symbol."""
    arrays = [gaussian_levels(400_000, 6, 2.4)]
    limit = 1.005 if compressor == "rans" else 1.06
    assert len(tg.compress(compressor, arrays)) < limit * entropy_bytes(arrays)


def bomb(compressor, size):
    """A stream of `size` zeros by the coder's own library."""
    if compressor == "rans":
        return tg.rans_encode([np.zeros(size, np.int8)])
    return zstandard.compress(bytes(size))


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_bomb_is_refused_and_never_unpacked(compressor):
    data = bomb(compressor, 100_000_000 if compressor != "rans" else 3_000_000)
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, tg.UserError)):
            tg.decompress(compressor, data, [5000])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6  # less than the bomb


def test_a_bomb_of_zstd_without_its_size_is_refused():
    data = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(50_000_000))
    with pytest.raises((ValueError, tg.UserError, zstandard.ZstdError)):
        tg.decompress("zstd", data, [5000])


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("asked", [[4999], [5001], [1], []])
def test_another_number_of_levels_than_there_are_is_refused(compressor, asked):
    data = tg.compress(compressor, [gaussian_levels(5000, 6, 3.0)])
    with pytest.raises((ValueError, tg.UserError)):
        tg.decompress(compressor, data, asked)


@pytest.mark.parametrize("compressor", COMPRESSORS)
@given(data=st.binary(max_size=300), sizes=st.lists(st.integers(1, 50), max_size=3))
@settings(max_examples=60)
def test_garbage_raises_or_gives_no_other_number_of_levels(compressor, data, sizes):
    try:
        levels = tg.decompress(compressor, data, sizes)
    except Exception:
        return
    assert levels.size == sum(sizes)


@pytest.mark.parametrize("state", [0, 2**16 - 1, 2**16 + 1, 2**32 - 1])
def test_a_rans_stream_that_does_not_end_in_the_first_state_is_refused(state):
    """One symbol takes no words, so that nothing but the last state tells."""
    data = tg.rans_encode([np.zeros(50, np.int8)])
    with pytest.raises((ValueError, tg.UserError)):
        tg.rans_decode(struct.pack("<I", state) + data[4:], [50])


@pytest.mark.parametrize("sizes", [[], [50]])
def test_a_rans_stream_without_states_is_refused(sizes):
    with pytest.raises((ValueError, tg.UserError)):
        tg.rans_decode(b"", sizes)
