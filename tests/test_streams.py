"""SCORE_STREAMS: every validation shard is scored by itself, as if there were no other."""

import math
import resource
from pathlib import Path

import numpy as np
import pytest
from conftest import BOS, VOCAB, run_cli, run_main, shard_bytes, tiny_settings

import train_gpt as tg

LENGTHS = (1, 2, 63, 64, 65, 66, 200, 7)
RULES = {"plain": {}, "sliding": {"EVAL_STRIDE": 16}, "isolated": {"EVAL_DOC_ISOLATED": 1}}


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> dict[str, str]:
    """Settings that score a trained artifact."""
    env = tiny_settings(dataset, tmp_path_factory.mktemp("trained"), ITERATIONS=8)
    run_main(env)
    artifact = Path(env["OUT_DIR"], "tiny", "final_model.artifact")
    return env | {"EVAL_ONLY": "1", "ARTIFACT": str(artifact)}


def streams(rng=0) -> list[np.ndarray]:
    """Streams of any ids, with a few documents in them."""
    random = np.random.default_rng(rng)
    drawn = [random.integers(0, VOCAB, n) for n in LENGTHS]
    for stream in drawn:
        stream[:: int(random.integers(20, 60))] = BOS
    return drawn


def write(folder: Path, contents) -> Path:
    """The shards of these streams in a new folder."""
    folder.mkdir(parents=True)
    for i, tokens in enumerate(contents):
        (folder / f"fineweb_val_{i:06d}.bin").write_bytes(shard_bytes(tokens))
    return folder


def score(env, place: Path, contents, **settings) -> list[np.ndarray]:
    """The NLL of each stream, all scored in one run."""
    texts = {name: str(value) for name, value in settings.items()}
    texts |= {"DATA_PATH": str(write(place / "data", contents)), "OUT_DIR": str(place)}
    run_main(env | texts | {"SCORE_STREAMS": "1", "SAVE_NLL": str(place / "nll")})
    files = sorted((place / "nll").iterdir())
    assert [file.name for file in files] == [f"fineweb_val_{i:06d}.npy" for i in range(len(files))]
    return [np.load(file) for file in files]


@pytest.mark.parametrize("rule", RULES)
def test_each_stream_is_scored_as_if_alone(trained, tmp_path, rule):
    together = score(trained, tmp_path / "all", streams(), **RULES[rule])
    for i, stream in enumerate(streams()):
        if len(stream) > 1:
            (alone,) = score(trained, tmp_path / str(i), [stream], **RULES[rule])
            np.testing.assert_allclose(together[i], alone, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_stream_is_scored_as_without_score_streams(trained, dataset, tmp_path, rule):
    (whole,) = score(trained, tmp_path / "streams", [dataset.val[:300]], **RULES[rule])
    data = write(tmp_path / "data", [dataset.val[:300]])
    texts = {name: str(value) for name, value in RULES[rule].items()}
    nll = tmp_path / "nll.npy"
    texts |= {"OUT_DIR": str(tmp_path), "DATA_PATH": str(data), "SAVE_NLL": str(nll)}
    run_main(trained | texts)
    np.testing.assert_allclose(whole, np.load(nll), atol=1e-5)


def test_files_have_one_float32_for_each_token_but_the_first(trained, tmp_path):
    found = score(trained, tmp_path, streams())
    assert [len(nll) for nll in found] == [n - 1 for n in LENGTHS]
    assert {nll.dtype for nll in found} == {np.dtype("float32")}


def test_the_score_is_the_mean_over_all_scored_tokens(trained, dataset, tmp_path):
    found = score(trained, tmp_path, streams())
    nats = sum(nll.sum(dtype=np.float64) for nll in found)
    log = (tmp_path / "tiny.txt").read_text()
    final = next(line for line in log.splitlines() if line.startswith("final_int8"))
    values = dict(item.split(":") for item in final.split()[1:])
    assert float(values["val_loss"]) == pytest.approx(nats / sum(n - 1 for n in LENGTHS), rel=1e-6)
    tokenizer = tg.Tokenizer(
        tg.Hyperparameters(tokenizer_path=str(dataset.tokenizer), vocab_size=VOCAB)
    )
    count = sum(tokenizer.lengths(stream).sum() for stream in streams())
    assert float(values["val_bpb"]) == pytest.approx(nats / math.log(2) / count, rel=1e-6)


def test_val_tokens_limits_each_stream(trained, tmp_path):
    whole = score(trained, tmp_path / "whole", streams())
    first = score(trained, tmp_path / "first", streams(), VAL_TOKENS=50)
    assert [len(nll) for nll in first] == [min(n, 50) - 1 for n in LENGTHS]
    for a, b in zip(whole, first, strict=True):
        np.testing.assert_allclose(a[:49], b, atol=1e-5)


def test_without_streams_random_ids_are_still_refused(trained, tmp_path):
    data = write(tmp_path / "data", [np.random.default_rng(0).integers(4, VOCAB, 2000)])
    with pytest.raises(tg.UserError, match="byte audit"):
        run_main(trained | {"DATA_PATH": str(data)})


def test_sidecars_of_streams_leave_out_the_first_token_of_each(trained, dataset, tmp_path):
    contents = [dataset.val[:40], dataset.val[40:100]]
    place = write(tmp_path / "data", contents)
    sizes = [np.where(tokens == BOS, 0, 3) for tokens in contents]
    for i, counts in enumerate(sizes):
        (place / f"fineweb_val_bytes_{i:06d}.bin").write_bytes(shard_bytes(counts))
    run_main(trained | {"DATA_PATH": str(place), "SCORE_STREAMS": "1", "OUT_DIR": str(tmp_path)})
    expected = sum(counts[1:].sum() for counts in sizes)
    assert f"original_bytes:{expected}\n" in (tmp_path / "tiny.txt").read_text()


def test_more_shards_than_files_may_be_open(trained, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        found = score(trained, tmp_path, [np.arange(4, 10)] * 300)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(found) == 300
    np.testing.assert_allclose(found, [found[0]] * 300, atol=1e-5)


def test_two_ranks_write_the_same(trained, tmp_path):
    one = score(trained, tmp_path / "one", streams())
    texts = {"DATA_PATH": str(tmp_path / "one" / "data"), "OUT_DIR": str(tmp_path / "two")}
    texts |= {"SCORE_STREAMS": "1", "SAVE_NLL": str(tmp_path / "two_nll")}
    outcome = run_cli(trained | texts, nproc=2)
    assert outcome.rc == 0, outcome.stderr
    two = [np.load(file) for file in sorted((tmp_path / "two_nll").iterdir())]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("streams_on", "kind"), [(0, "folder"), (1, "file"), (1, "orphan")])
def test_save_nll_must_be_what_the_mode_writes(trained, tmp_path, streams_on, kind):
    place = tmp_path / "x"
    if kind == "folder":
        place.mkdir()
    elif kind == "file":
        place.write_text("")
    else:
        place = tmp_path / "no" / "folder"
    with pytest.raises(tg.UserError, match="SAVE_NLL"):
        run_main(trained | {"SAVE_NLL": str(place), "SCORE_STREAMS": str(streams_on)})
