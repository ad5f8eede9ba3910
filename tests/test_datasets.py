"""What train_gpt.py accepts beside SentencePiece shards: byte-level data and sidecars of original
bytes; and what it says where a dataset is missing."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import BOS, compose_documents, run_main, shard_bytes, tiny_settings
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg

sys.path.insert(0, str(Path(tg.__file__).parent / "data"))

from vocabulary import byte_level_model

TEXTS = [*compose_documents(20, seed=3), " begins with blanks", "▁ and � and \x01", "two  blanks\n"]


def byte_level(folder: Path) -> Path:
    """The byte-level vocabulary, as data/ writes it."""
    path = folder / "byte_260.model"
    path.write_bytes(byte_level_model())
    return path


def byte_tokens(texts) -> np.ndarray:
    """Documents of BOS and bytes, as published."""
    return np.array(
        [i for text in texts for i in (1, *(byte + 4 for byte in text.encode()))], "<u2"
    )


@pytest.fixture
def byte_env(dataset, tmp_path) -> dict[str, str]:
    """Settings of a tiny run on byte-level shards."""
    shards = tmp_path / "datasets" / "fineweb10B_byte260"
    shards.mkdir(parents=True)
    for split, texts in (("train", TEXTS[:15]), ("val", TEXTS[15:])):
        (shards / f"fineweb_{split}_000000.bin").write_bytes(shard_bytes(byte_tokens(texts)))
    places = {"DATA_PATH": shards, "TOKENIZER_PATH": byte_level(tmp_path), "VOCAB_SIZE": 260}
    return tiny_settings(dataset, tmp_path / "logs", ITERATIONS=1, NUM_LAYERS=1, **places)


def log_of(env) -> str:
    return Path(env["OUT_DIR"], "tiny.txt").read_text().split("=" * 100)[-1]


def final_line(env) -> dict[str, float]:
    """val_loss and val_bpb of the last event."""
    return json.loads(Path(env["OUT_DIR"], "tiny", "metrics.jsonl").read_text().splitlines()[-1])


# ---- byte-level


@given(text=st.text())
def test_byte_level_tokens_are_the_bytes_and_decode_to_the_text(tmp_path_factory, text):
    path = byte_level(tmp_path_factory.mktemp("bytes"))
    tokenizer = tg.Tokenizer(tg.Hyperparameters(tokenizer_path=str(path), vocab_size=260))
    ids = byte_tokens([text])
    assert tokenizer.sp.encode(text) == ids[1:].tolist()
    assert tokenizer.lengths(ids).sum() == len(text.encode())
    assert tokenizer.decoded_bytes(ids) == len(text.encode())


def test_byte_level_shards_train_and_score(byte_env):
    run_main(byte_env)
    val_bytes = sum(len(text.encode()) for text in TEXTS[15:])
    assert f"val_bytes:{val_bytes} byte_audit:ok\n" in log_of(byte_env)
    final = final_line(byte_env)
    nats = final["val_loss"] * (val_bytes + len(TEXTS[15:]) - 1)
    assert final["val_bpb"] == pytest.approx(nats / math.log(2) / val_bytes)


def test_byte_level_tokens_cut_within_a_character_pass_the_audit(byte_env):
    cut = byte_tokens(TEXTS[15:]).tolist().index(4 + 0xEF) + 2
    run_main(byte_env | {"VAL_TOKENS": str(cut)})
    assert f"\nval_tokens:{cut} " in log_of(byte_env)


def test_byte_level_shards_of_another_encoding_fail_the_audit(byte_env):
    """Bytes of UTF-16 where UTF-8 should be."""
    ids = [i for t in TEXTS for i in (1, *(byte + 4 for byte in (t + "ÿ").encode("utf-16")))]
    shard = Path(byte_env["DATA_PATH"], "fineweb_val_000000.bin")
    shard.write_bytes(shard_bytes(ids))
    with pytest.raises(tg.UserError, match="encodes to other tokens"):
        run_main(byte_env)


# ---- sidecars


@pytest.fixture
def sidecar_env(dataset, tmp_path) -> dict[str, str]:
    """Settings of a tiny run whose validation shards have sidecars of 3 bytes a token, 0 at BOS."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in dataset.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
        if "_val_" in path.name:
            tokens = np.fromfile(path, "<u2", offset=1024)
            name = path.name.replace("val", "val_bytes")
            (folder / name).write_bytes(shard_bytes(np.where(tokens == BOS, 0, 3)))
    changes = {"ITERATIONS": 1, "NUM_LAYERS": 1, "DATA_PATH": folder}
    return tiny_settings(dataset, tmp_path / "logs", **changes)


def rewrite(env, number: int, change) -> None:
    """Change the sizes of a sidecar."""
    path = Path(env["DATA_PATH"], f"fineweb_val_bytes_{number:06d}.bin")
    path.write_bytes(shard_bytes(change(np.fromfile(path, "<u2", offset=1024))))


@pytest.mark.parametrize("val_tokens", [0, 200])
def test_a_sidecar_replaces_the_byte_count_and_the_log_says_so(sidecar_env, dataset, val_tokens):
    run_main(sidecar_env | {"VAL_TOKENS": str(val_tokens)})
    tokens = dataset.val[: val_tokens or None]
    original = 3 * int((tokens[1:] != BOS).sum())
    lines = [line for line in log_of(sidecar_env).splitlines() if "byte_audit" in line]
    assert lines[0].endswith(f"byte_audit:ok byte_sidecar:2 original_bytes:{original}")
    final = final_line(sidecar_env)
    nats = final["val_loss"] * (len(tokens) - 1)
    assert final["val_bpb"] == pytest.approx(nats / math.log(2) / original)


def test_sizes_over_the_vocabulary_and_sums_over_16_bits_are_right(sidecar_env):
    rewrite(sidecar_env, 1, lambda sizes: np.where(sizes, 60_000, 0))
    run_main(sidecar_env)
    sizes = [
        np.fromfile(path, "<u2", offset=1024).astype(int)
        for path in tg.shard_paths(
            tg.Hyperparameters(data_path=sidecar_env["DATA_PATH"]), "val_bytes"
        )
    ]
    assert f"original_bytes:{np.concatenate(sizes)[1:].sum()}\n" in log_of(sidecar_env)


def test_without_a_sidecar_the_log_is_silent_about_it(tiny_env):
    run_main(tiny_env | {"ITERATIONS": "0"})
    assert "byte_sidecar" not in log_of(tiny_env)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda sizes: sizes[:-1], "not as long as their shards"),
        (lambda sizes: sizes + 1, "counts bytes for BOS"),
        (lambda sizes: sizes * 0, "or none at all"),
    ],
    ids=["short", "BOS", "zero"],
)
def test_a_wrong_sidecar_is_refused(sidecar_env, change, problem):
    for number in (0, 1):
        rewrite(sidecar_env, number, change)
    with pytest.raises(tg.UserError, match=problem):
        run_main(sidecar_env)


def test_a_sidecar_for_some_of_the_shards_is_refused(sidecar_env):
    Path(sidecar_env["DATA_PATH"], "fineweb_val_bytes_000001.bin").unlink()
    with pytest.raises(tg.UserError, match="not as long as their shards"):
        run_main(sidecar_env)


def test_the_audit_of_the_tokens_holds_beside_a_sidecar(sidecar_env, dataset):
    """A sidecar must not hide that the tokenizer is another one."""
    shard = Path(sidecar_env["DATA_PATH"], "fineweb_val_000001.bin")
    shuffled = np.random.default_rng(0).permutation(np.fromfile(shard, "<u2", offset=1024))
    shard.write_bytes(shard_bytes(shuffled))
    Path(sidecar_env["DATA_PATH"], "fineweb_val_000000.bin").write_bytes(shard_bytes(shuffled))
    with pytest.raises(tg.UserError, match="byte audit"):
        run_main(sidecar_env)


# ---- missing datasets


@pytest.mark.parametrize(
    ("folder", "advice"),
    [
        ("data/datasets/fineweb10B_sp1024", "python data/download.py --variant sp1024"),
        ("./data/datasets/fineweb10B_byte260/", "python data/download.py --variant byte260"),
        ("elsewhere/fineweb10B_sp4096", "python data/download.py --variant sp4096"),
        ("data/datasets/sample_sp1024", "get it: see data/README.md"),
        ("data/datasets/mine_sp1024", "get it: see data/README.md"),
        ("shards", "get it: see data/README.md"),
        ("fineweb10B_x; rm -rf ~", "python data/download.py --variant 'x; rm -rf ~'"),
    ],
)
def test_a_missing_dataset_comes_with_the_command_that_gets_it(tiny_env, folder, advice):
    with pytest.raises(tg.UserError) as error:
        tg.load_settings(tiny_env | {"DATA_PATH": folder})
    lines = [line for line in str(error.value).splitlines() if "DATA_PATH=" in line]
    assert len(lines) == 2
    assert all(line.endswith(advice) for line in lines)


def test_a_missing_tokenizer_comes_with_the_command_too(tiny_env, tmp_path):
    changes = {"TOKENIZER_PATH": "no.model", "DATA_PATH": "data/datasets/fineweb10B_sp2048"}
    with pytest.raises(tg.UserError, match=r"no\.model: no such file; get it: .*sp2048"):
        tg.load_settings(tiny_env | changes)
