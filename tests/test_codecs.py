"""How weights become levels and levels become bytes: the quantizers and the entropy coders."""

import dataclasses
import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

import quantizer
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


def gaussian_levels(shape, bits, deviation, seed=0):
    top = top_level(bits)
    w = np.random.default_rng(seed).normal(size=shape) * deviation
    return np.rint(w).clip(-top, top).astype(np.int8)


def ones(shape):
    """The scales with which a matrix of this shape is its levels."""
    return np.ones((shape[0], 1), "<f2")


def compress(compressor, matrices):
    """Code matrices of int8 levels."""
    return tg.compress([[ones(m.shape), m] for m in matrices], choose(compressor=compressor))


def decompress(compressor, data, shapes):
    """Decode matrices of levels, as float32."""
    scales = [[ones(shape)] for shape in shapes]
    return tg.decompress(data, scales, shapes, choose(compressor=compressor))


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
    coded = compress("rans", [levels])
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
    hp = choose(bigram_buckets=1024, **BITS_BY_PART)
    assert tg.bits_of(name, torch.empty(shape, device="meta"), hp) == bits


def test_all_large_matrices_of_a_model_are_quantized_and_nothing_else():
    hp = choose(bigram_buckets=1024, smear_gate=1, tie_embeddings=0, num_layers=2, **BITS_BY_PART)
    with torch.device("meta"):
        state = tg.build_model(hp).state_dict()
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
        ({"quant_method": "gptq", "quant_bits_mlp": 5}, "gptq_rans"),
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


def own_classes(matrices):
    """A class for each matrix: it has a histogram of its own."""
    return [np.full(m.shape, i + 1, np.uint16) for i, m in enumerate(matrices)]


def rans_encode(matrices):
    """Code matrices of int8, each by its own frequencies."""
    return quantizer.rans_encode([2 * m.astype(np.int16) for m in matrices], own_classes(matrices))


def check_rans(matrices):
    decoded = quantizer.rans_decode(rans_encode(matrices), own_classes(matrices), 1)
    for matrix, levels in zip(matrices, decoded, strict=True):
        assert levels.dtype == np.int16
        assert np.array_equal(levels, 2 * matrix.astype(np.int16))


def lanes(shapes):
    """Where the weights of each lane are, in its order: matrix, row, column.

    A lane is 64 rows of 512 columns, column by column. Its last rows may be beyond the matrix.
    """
    found = []
    for i, (rows, cols) in enumerate(shapes):
        for top in range(0, rows, 64):
            for left in range(0, cols, 512):
                columns = range(left, min(left + 512, cols))
                found.append([(i, row, col) for col in columns for row in range(top, top + 64)])
    return found


def next_state(state, u):
    """Ungerboeck's trellis of 8 states, of check polynomials 13 and 4 in octal."""
    odd = state % 2
    return (state // 2) ^ (odd << 2) ^ odd ^ (u << 1)


def levels_of(ks, states):
    """Levels 2k + z of paths through a trellis: z is the state's last bit."""
    shapes = [k.shape for k in ks]
    levels = [2 * k.astype(np.int16) for k in ks]
    if states == 1:
        return levels
    for lane in lanes(shapes):
        state = 0
        for i, row, col in lane:
            k = 0
            if row < shapes[i][0]:
                k = int(ks[i][row, col])
                levels[i][row, col] += state % 2
            state = next_state(state, k % 2)
    return levels


@st.composite
def level_matrices(draw):
    """A matrix of int8: of one symbol, of a few with any skew, or of any."""
    shape = draw(st.tuples(st.integers(1, 200), st.integers(1, 3) | st.integers(20, 40)))
    symbols = draw(st.lists(st.integers(-127, 127), min_size=1, max_size=255, unique=True))
    weights = np.array(draw(st.lists(st.floats(-15, 0), min_size=255, max_size=255)))
    p = 10.0 ** weights[: len(symbols)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.choice(np.array(symbols, np.int8), shape, p=p / p.sum())


@given(st.lists(level_matrices(), min_size=1, max_size=4))
@settings(max_examples=60)
def test_rans_is_lossless(matrices):
    check_rans(matrices)


@given(
    st.lists(level_matrices(), min_size=1, max_size=2),
    st.sampled_from([1, 8]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=30)
def test_rans_is_lossless_on_paths_of_weights_of_any_classes(ks, states, seed):
    rng = np.random.default_rng(seed)
    classes = [rng.integers(0, rng.integers(1, 38) + 1, k.shape).astype(np.uint16) for k in ks]
    ks = [np.where(found > 0, k, 0) for k, found in zip(ks, classes, strict=True)]
    levels = levels_of(ks, states)
    decoded = quantizer.rans_decode(quantizer.rans_encode(levels, classes), classes, states)
    assert all(np.array_equal(a, b) for a, b in zip(decoded, levels, strict=True))


@pytest.mark.parametrize("value", [-128, -127, -1, 0, 127])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (64, 3), (65, 3), (1000, 100)])
def test_rans_is_lossless_on_one_symbol(value, shape):
    check_rans([np.full(shape, value, np.int8)])


@pytest.mark.parametrize("pair", [(-127, 127), (0, 1), (126, 127), (-128, -127)])
@pytest.mark.parametrize("at", [0, 77_777, 199_999])
def test_rans_is_lossless_on_two_symbols_of_extreme_skew(pair, at):
    """One in 200,000 has a share below that of a table's smallest entry."""
    array = np.full(200_000, pair[0], np.int8)
    array[at] = pair[1]
    check_rans([array.reshape(-1, 100)])


def test_rans_is_lossless_on_all_symbols_evenly_and_with_one_frequent():
    every = np.arange(-128, 128).astype(np.int8)
    parts = [np.tile(every, 300), every, np.concatenate([np.zeros(10**6, np.int8), every])]
    check_rans([part.reshape(-1, 64) for part in parts])


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 127, 128, 129])
def test_rans_is_lossless_at_rows_around_multiples_of_its_lanes(rows):
    check_rans([gaussian_levels((rows, 7), 6, 4.0)])
    check_rans([gaussian_levels((100, 3), 6, 4.0), gaussian_levels((rows, 7), 6, 4.0)])


@pytest.mark.parametrize("cols", [511, 512, 513, 1024, 1025])
def test_rans_is_lossless_at_columns_around_multiples_of_its_lanes(cols):
    check_rans([gaussian_levels((65, cols), 6, 4.0)])


def test_rans_is_lossless_on_matrices_far_smaller_than_the_others():
    small = [np.full((1, 1), 3, np.int8), np.zeros((1, 5), np.int8)]
    check_rans([gaussian_levels((10_000, 100), 5, 2.0), *small])


@pytest.mark.parametrize("bits", [5, 6, 8])
@pytest.mark.parametrize("count", [1_000_000, 4_000_000])
def test_rans_is_within_half_a_percent_of_the_entropy(bits, count):
    matrices = [gaussian_levels((count // 1000, 1000), bits, top_level(bits) / 12.85)]
    data = rans_encode(matrices)
    assert entropy_bytes(matrices) * 0.9999 <= len(data) <= 1.005 * entropy_bytes(matrices)


def test_rans_is_within_half_a_percent_for_matrices_of_different_spread():
    spreads = enumerate((1.0, 2.5, 9.0))
    matrices = [gaussian_levels((600, 500), 6, s, seed=i) for i, s in spreads]
    assert len(rans_encode(matrices)) <= 1.005 * entropy_bytes(matrices)


def test_rans_uses_the_frequencies_of_each_class():
    """Weights of two spreads in one matrix cost what they would in two."""
    parts = [gaussian_levels((600, 500), 6, s, seed=i) for i, s in enumerate((1.0, 9.0))]
    mixed, classes = np.empty((2, 600, 1000), np.int16)
    for i, part in enumerate(parts):
        mixed[:, i::2] = part
        classes[:, i::2] = i + 1
    data = quantizer.rans_encode([2 * mixed], [classes.astype(np.uint16)])
    assert len(data) <= 1.005 * entropy_bytes(parts)
    assert len(data) < 0.98 * entropy_bytes([mixed])


def plain_table(codes):
    """The symbol, its frequency and its start of each of 2^14 slots."""
    shares = [round(2 ** ((code - 1) / 16)) if code else 0 for code in codes]
    total = max(sum(shares), 1)
    f = [max(share * 16384 // total, share > 0) for share in shares]
    while rest := 16384 - sum(f):
        most = max(f)
        f[f.index(most)] += max(rest, -(most // 2))
    slots = []
    for symbol, count in enumerate(f):
        slots += [(symbol, count, len(slots))] * count
    return slots


def plain_decode(data, classes, states):
    """The documented format, symbol by symbol with Python's integers."""
    low, width, contexts, size = struct.unpack_from("<hHHI", data)
    codes = zstandard.decompress(data[10 : 10 + size])
    tables = [plain_table(codes[i * width : (i + 1) * width]) for i in range(contexts)]
    paths = lanes([found.shape for found in classes])
    words = list(struct.unpack(f"<{(len(data) - 10 - size) // 2}H", data[10 + size :]))[::-1]
    levels = [np.zeros(found.shape, np.int16) for found in classes]
    for length in sorted({*map(len, paths)}):
        group = [path for path in paths if len(path) == length]
        x = [words.pop() | words.pop() << 16 for _ in group]
        state = [0] * len(group)
        for t in range(length):
            for lane, path in enumerate(group):
                inside = path[t][1] < len(classes[path[t][0]])
                i, *place = path[t] if inside else (0,)
                kind = int(classes[i][*place]) if inside else 0
                slot = x[lane] % 16384
                symbol, count, start = tables[2 * kind + state[lane] % 2][slot]
                x[lane] = count * (x[lane] >> 14) + slot - start
                if x[lane] < 65536:
                    x[lane] = x[lane] << 16 | words.pop()
                k = symbol + low
                if inside:
                    levels[i][*place] = 2 * k + state[lane] % 2
                state[lane] = next_state(state[lane], k % 2) if states == 8 else 0
        assert x == [65536] * len(group)
    assert words == []
    return levels


@pytest.mark.parametrize("states", [1, 8])
@pytest.mark.parametrize("shapes", [[(7, 1)], [(50, 10), (1, 1), (20, 3)], [(65, 20), (3, 513)]])
def test_rans_stream_is_read_by_a_plain_decoder_of_the_format(shapes, states):
    ks = [gaussian_levels(shape, 6, 3.0, seed=i) for i, shape in enumerate(shapes)]
    ks[0][:2, 0] = -31, 31
    levels = levels_of(ks, states)
    data = quantizer.rans_encode(levels, own_classes(ks))
    decoded = plain_decode(data, own_classes(ks), states)
    assert all(np.array_equal(a, b) for a, b in zip(decoded, levels, strict=True))


def test_frequencies_are_the_same_on_every_machine():
    """No power that is rounded to a whole number is near the middle of two."""
    shares = 2 ** (np.arange(255) / 16)
    assert np.abs(shares % 1 - 0.5).min() > 1e-6


# ---- every compressor


def shapes_of(matrices):
    return [m.shape for m in matrices]


@pytest.mark.parametrize("compressor", COMPRESSORS)
@given(st.lists(level_matrices(), max_size=3))
@settings(max_examples=15)
@example([])
def test_every_compressor_round_trips(compressor, matrices):
    data = compress(compressor, matrices)
    decoded = decompress(compressor, data, shapes_of(matrices))
    assert [m.dtype for m in decoded] == [np.float32] * len(matrices)
    assert [m.tolist() for m in decoded] == [m.tolist() for m in matrices]


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_decoded_matrices_are_the_products_with_their_scales(compressor):
    hp = choose(compressor=compressor)
    matrices = [gaussian_levels(shape, 6, 3.0) for shape in ((60, 100), (7, 50))]
    scales = [np.random.default_rng(0).random((len(m), 1)).astype("<f2") for m in matrices]
    data = tg.compress([[*pair] for pair in zip(scales, matrices, strict=True)], hp)
    decoded = tg.decompress(data, [[scale] for scale in scales], shapes_of(matrices), hp)
    for found, *pair in zip(decoded, scales, matrices, strict=True):
        assert np.array_equal(found, restored(pair).astype(np.float32))


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_matrices_are_coded_row_by_row_whatever_their_memory_layout(compressor):
    matrix = gaussian_levels((60, 100), 6, 3.0)
    data = compress(compressor, [np.asfortranarray(matrix)])
    assert np.array_equal(decompress(compressor, data, [(60, 100)])[0], matrix)
    assert data == compress(compressor, [matrix])


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_same_levels_give_the_same_bytes(compressor):
    matrices = [gaussian_levels((300, 100), 6, 3.0, seed=i) for i in range(2)]
    first = compress(compressor, matrices)
    compress(compressor, matrices[::-1])
    assert compress(compressor, [matrix.copy() for matrix in matrices]) == first


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_levels_can_be_trained_after_decoding(compressor):
    """PyTorch warns of memory that it may not write to."""
    data = compress(compressor, [np.ones((3, 3), np.int8)])
    assert decompress(compressor, data, [(3, 3)])[0].flags.writeable


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_coders_use_the_frequencies_of_levels(compressor):
    """Order-0 entropy is what is to be had; zstd's codes have whole bits a symbol."""
    matrices = [gaussian_levels((800, 500), 6, 2.4)]
    limit = 1.005 if compressor == "rans" else 1.06
    assert len(compress(compressor, matrices)) < limit * entropy_bytes(matrices)


REFUSALS = (ValueError, tg.UserError, zstandard.ZstdError, struct.error)


def refused_peak(compressor, data, shapes):
    """How many bytes are allocated at most while this stream is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(REFUSALS):
            decompress(compressor, data, shapes)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bomb(compressor):
    """A stream of far more zeros than are asked for, by the coder's own library."""
    if compressor == "rans":
        return rans_encode([np.zeros((30_000, 100), np.int8)])
    return zstandard.compress(bytes(100_000_000))


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_bomb_is_refused_and_never_unpacked(compressor):
    assert refused_peak(compressor, bomb(compressor), [(50, 100)]) < 2e6  # less than the bomb


def test_a_bomb_of_zstd_without_its_size_is_refused():
    data = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(50_000_000))
    with pytest.raises(REFUSALS):
        decompress("zstd", data, [(50, 100)])


HISTOGRAMS = {  # bytes, whether zstd tells their number, values, contexts
    "a bomb": (10**8, True, 70, 4),
    "a bomb of an unknown size": (10**8, False, 70, 4),
    "a bomb of many contexts": (65_534 * 1500, True, 1500, 65_534),
    "as many values as can be told": (65_535 * 4, True, 65_535, 4),
    "more values than slots": (16_385 * 4, True, 16_385, 4),
    "as many as are allowed": (16_383 * 4, True, 16_383, 4),
    "none": (0, True, 0, 4),
    "no contexts": (0, True, 70, 0),
}


@pytest.mark.parametrize("case", HISTOGRAMS.values(), ids=HISTOGRAMS)
def test_histograms_that_no_levels_need_are_refused_and_allocate_little(case):
    size, told, width, contexts = case
    table = zstandard.ZstdCompressor(write_content_size=told).compress(bytes(size))
    right = rans_encode([gaussian_levels((50, 100), 6, 3.0)])
    behind = right[10 + struct.unpack_from("<I", right, 6)[0] :]
    data = struct.pack("<hHHI", 0, width, contexts, len(table)) + table + behind
    assert refused_peak("rans", data, [(50, 100)]) < 4e6


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("asked", [[(50, 99)], [(50, 101)], [(1, 1)], [], [(50, 100), (1, 1)]])
def test_another_number_of_levels_than_there_are_is_refused(compressor, asked):
    data = compress(compressor, [gaussian_levels((50, 100), 6, 3.0)])
    with pytest.raises(REFUSALS):
        decompress(compressor, data, asked)


@pytest.mark.parametrize("asked", [[(49, 100)], [(51, 100)], [(100, 50)], [(25, 100), (25, 100)]])
def test_levels_of_matrices_of_other_shapes_are_refused_by_rans(asked):
    data = compress("rans", [gaussian_levels((50, 100), 6, 3.0)])
    with pytest.raises(REFUSALS):
        decompress("rans", data, asked)


@pytest.mark.parametrize("compressor", COMPRESSORS)
@given(
    data=st.binary(max_size=300),
    shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), max_size=3),
)
@settings(max_examples=60)
def test_garbage_raises_or_gives_no_other_number_of_levels(compressor, data, shapes):
    try:
        matrices = decompress(compressor, data, shapes)
    except Exception:
        return
    assert shapes_of(matrices) == shapes


def with_state(data, state):
    """A stream with another first state of its first lane."""
    at = 10 + struct.unpack_from("<I", data, 6)[0]
    return data[:at] + struct.pack("<I", state) + data[at + 4 :]


def test_the_helper_that_sets_a_state_leaves_the_right_one_alone():
    data = rans_encode([np.zeros((50, 1), np.int8)])
    assert with_state(data, 2**16) == data


@pytest.mark.parametrize("state", [0, 2**16 - 1, 2**16 + 1, 2**32 - 1])
def test_a_rans_stream_that_does_not_end_in_the_first_state_is_refused(state):
    """One symbol takes no words, so that nothing but the last state tells."""
    data = rans_encode([np.zeros((50, 1), np.int8)])
    with pytest.raises(REFUSALS):
        decompress("rans", with_state(data, state), [(50, 1)])


@pytest.mark.parametrize("shapes", [[(50, 1)], [(1, 1), (1, 1)]])
def test_an_empty_rans_stream_is_refused_where_there_are_levels(shapes):
    with pytest.raises(REFUSALS):
        decompress("rans", b"", shapes)


@pytest.mark.parametrize("data", [b"\0", b"\0" * 14, rans_encode([np.zeros((1, 1), np.int8)])])
def test_a_rans_stream_is_refused_where_there_are_no_levels(data):
    with pytest.raises(REFUSALS):
        decompress("rans", data, [])
