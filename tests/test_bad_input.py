"""Bad input: one clear error that names the culprit, exit code 1, and no file touched.

Each case runs train_gpt.main in this process; a few go through the real program too.
"""

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import (
    BOS,
    VOCAB,
    Outcome,
    compose_documents,
    run_cli,
    run_main,
    shard_bytes,
    snapshot,
    tiny_settings,
    train_tokenizer,
)

from train_gpt import UserError


@pytest.fixture(scope="session")
def artifact(dataset, tmp_path_factory) -> bytes:
    """A whole artifact of a tiny model."""
    out = tmp_path_factory.mktemp("artifact")
    run_main(tiny_settings(dataset, out, ITERATIONS=1, NUM_LAYERS=1))
    return (out / "tiny" / "final_model.artifact").read_bytes()


@pytest.fixture
def job(dataset, tmp_path, monkeypatch) -> dict[str, str]:
    """Good settings, in a folder of their own, with shards and a tokenizer that a test may spoil
    and the files of an earlier run in the way."""
    monkeypatch.chdir(tmp_path)
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in dataset.folder.iterdir():
        (shards / path.name).write_bytes(path.read_bytes())
    tokenizer = tmp_path / "tok.model"
    tokenizer.write_bytes(dataset.tokenizer.read_bytes())
    logs = tmp_path / "logs"
    (logs / "tiny").mkdir(parents=True)
    for name in ("tiny.txt", "tiny/final_model.pt", "tiny/final_model.artifact"):
        (logs / name).write_text("of an earlier run")
    settings = tiny_settings(dataset, logs, ITERATIONS=1, NUM_LAYERS=1)
    return settings | {"DATA_PATH": str(shards), "TOKENIZER_PATH": str(tokenizer)}


def refusal(job: dict[str, str]) -> str:
    """The one error that ends a job before it touches a file: one of the two kinds that the program
    reports without a traceback."""
    folder = Path.cwd()
    before = snapshot(folder)
    with pytest.raises((UserError, OSError)) as caught:
        run_main(job)
    assert snapshot(folder) == before
    return str(caught.value)


def eval_job(job: dict[str, str], data: bytes) -> dict[str, str]:
    """A job that scores an artifact of these bytes."""
    path = Path.cwd() / "given.artifact"
    path.write_bytes(data)
    return job | {"EVAL_ONLY": "1", "ARTIFACT": str(path)}


def test_the_job_that_these_tests_spoil_is_good(job):
    run_main(job)


def test_the_artifact_that_these_tests_spoil_is_good(job, artifact):
    run_main(eval_job(job, artifact))


# ---- settings


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NUM_LAYER", "2"),
        ("matrix_lr", "0.1"),
        ("ITERATIONS", "many"),
        ("MATRIX_LR", "nan"),
        ("MODEL_DIM", "65"),
        ("TRAIN_BATCH_TOKENS", "100"),
        ("DEVICE", "tpu"),
        ("CONFIG", "no.env"),
    ],
)
def test_bad_setting(name, text, job):
    assert f"{name}={text}" in refusal(job | {name: text})


def test_eval_only_without_artifact(job):
    assert "ARTIFACT" in refusal(job | {"EVAL_ONLY": "1"})


def test_eval_only_of_a_missing_artifact(job):
    assert "ARTIFACT=gone.artifact" in refusal(
        job | {"EVAL_ONLY": "1", "ARTIFACT": "gone.artifact"}
    )


# ---- shards


SPLITS = ["train", "val"]


def spoil(job: dict[str, str], split: str, data: bytes, number: int = 1) -> Path:
    """Put `data` in the place of a shard; its path."""
    path = Path(job["DATA_PATH"], f"fineweb_{split}_{number:06d}.bin")
    assert path.exists()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("split", SPLITS)
def test_no_shards_at_the_path(split, job):
    for path in Path(job["DATA_PATH"]).glob(f"*_{split}_*"):
        path.unlink()
    message = refusal(job)
    assert f"DATA_PATH={job['DATA_PATH']}" in message
    assert f"fineweb_{split}_" in message


def test_no_folder_of_shards(job):
    assert "DATA_PATH=nowhere" in refusal(job | {"DATA_PATH": "nowhere"})


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [0, 1, 11, 12, 1023, 1024, -2, -1])
def test_truncated_shard(split, size, job, dataset):
    whole = shard_bytes(dataset.train)
    assert str(spoil(job, split, whole[:size])) in refusal(job)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("extra", [1, 2, 1024])
def test_shard_with_bytes_after_its_tokens(split, extra, job, dataset):
    path = spoil(job, split, shard_bytes(dataset.train) + bytes(extra))
    assert str(path) in refusal(job)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("header", [{"magic": 20240521}, {"magic": 0}, {"version": 2}])
def test_foreign_header(split, header, job, dataset):
    assert str(spoil(job, split, shard_bytes(dataset.train, **header))) in refusal(job)


@pytest.mark.parametrize("split", SPLITS)
def test_a_file_of_another_kind(split, job):
    assert str(spoil(job, split, b"\x93NUMPY" + bytes(4000))) in refusal(job)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("count", [0, -1, -(2**31), 2**31 - 1])
def test_token_count_that_cannot_be(split, count, job, dataset):
    assert str(spoil(job, split, shard_bytes(dataset.train, count=count))) in refusal(job)


@pytest.mark.parametrize("split", SPLITS)
def test_shard_without_tokens(split, job):
    assert str(spoil(job, split, shard_bytes([]))) in refusal(job)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("token", [VOCAB, 65535])
def test_token_id_beyond_the_vocabulary(split, number, token, job, dataset):
    tokens = dataset.train[:700].astype(int)
    tokens[-1] = token
    path = spoil(job, split, shard_bytes(tokens), number)
    message = refusal(job)
    assert str(path) in message
    assert str(token) in message


def test_the_last_id_of_the_vocabulary_is_right(job, dataset):
    tokens = dataset.train[:700].copy()
    tokens[5] = VOCAB - 1
    spoil(job, "train", shard_bytes(tokens))
    run_main(job)


@pytest.mark.parametrize("split", SPLITS)
def test_a_shard_that_is_a_broken_link(split, job):
    path = Path(job["DATA_PATH"], f"fineweb_{split}_000001.bin")
    path.unlink()
    path.symlink_to("gone.bin")
    assert str(path) in refusal(job)


def test_validation_tokens_without_text(job):
    for path in Path(job["DATA_PATH"]).glob("*_val_*"):
        path.write_bytes(shard_bytes(np.full(10, BOS)))
    assert "validation" in refusal(job)


# ---- tokenizer


def test_missing_tokenizer(job):
    assert "TOKENIZER_PATH=gone.model" in refusal(job | {"TOKENIZER_PATH": "gone.model"})


def test_tokenizer_of_another_size(job):
    train_tokenizer(Path(job["TOKENIZER_PATH"]), compose_documents(), vocab_size=400)
    message = refusal(job)
    assert job["TOKENIZER_PATH"] in message
    assert "400" in message
    assert "VOCAB_SIZE" in message


@pytest.mark.parametrize("data", [b"", b"{}", b"no tokenizer at all\n" * 99, bytes(1000)])
def test_file_that_is_no_tokenizer(data, job):
    Path(job["TOKENIZER_PATH"]).write_bytes(data)
    assert job["TOKENIZER_PATH"] in refusal(job)


def test_truncated_tokenizer(job):
    path = Path(job["TOKENIZER_PATH"])
    path.write_bytes(path.read_bytes()[:-1000])
    assert job["TOKENIZER_PATH"] in refusal(job)


def other_tokenizer(job: dict[str, str]) -> None:
    """Another tokenizer of the right size in the place of the right one."""
    words = [document[::-1].lower() for document in compose_documents(seed=1)]
    train_tokenizer(Path(job["TOKENIZER_PATH"]), words)


def test_tokenizer_that_did_not_make_the_shards(job):
    other_tokenizer(job)
    assert "TOKENIZER_PATH" in refusal(job)


# ---- places to write to


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below", "/proc/birdie"])
def test_unwritable_out_dir(place, job):
    Path("file").write_text("a regular file")
    assert place in refusal(job | {"OUT_DIR": place})


def test_out_dir_with_a_file_in_the_place_of_the_runs_folder(job):
    Path(job["OUT_DIR"], "taken").write_text("a regular file")
    assert job["OUT_DIR"] in refusal(job | {"RUN_ID": "taken"})


def test_path_that_is_too_long(job):
    assert "x" * 300 in refusal(job | {"OUT_DIR": "x" * 300})


@pytest.mark.parametrize("place", ["none/x.npy", "file/x.npy", "/proc/none/x.npy", "logs"])
def test_save_nll_where_no_file_can_be_made(place, job):
    Path("file").write_text("a regular file")
    assert f"SAVE_NLL={place}" in refusal(job | {"SAVE_NLL": place})


def test_the_current_folder_need_not_be_writable(job, monkeypatch):
    """An empty SAVE_NLL names no folder."""
    here, access = Path.cwd(), os.access
    here.chmod(0o555)  # which does not stop root
    monkeypatch.setattr(
        os, "access", lambda p, mode: Path(p).absolute() != here and access(p, mode)
    )
    run_main(job)


# ---- artifacts

PREAMBLE = struct.Struct("<6sHII")  # magic, version, bytes of header and head
BODY = PREAMBLE.size + 32  # behind the SHA-256
VERSION = 3


def sealed(version: int, header: bytes, payload: tuple[bytes, bytes]) -> bytes:
    """An artifact of any content with a digest that fits."""
    floats, levels = payload
    head = zstandard.ZstdCompressor().compress(header + floats)
    preamble = PREAMBLE.pack(b"BIRDIE", version, len(header), len(head))
    return preamble + hashlib.sha256(preamble + head + levels).digest() + head + levels


def opened(data: bytes) -> tuple[dict, tuple[bytes, bytes]]:
    """The header of a whole artifact, its floats, and its coded levels."""
    size, head_size = PREAMBLE.unpack(data[: PREAMBLE.size])[2:]
    raw = zstandard.ZstdDecompressor().decompress(data[BODY : BODY + head_size])
    return json.loads(raw[:size]), (raw[size:], data[BODY + head_size :])


@pytest.mark.parametrize("size", [0, 1, 5, 6, 10, 19, 20, 21, 51, 52, 53, 60, 1000, -100, -1])
def test_truncated_artifact(size, job, artifact):
    environ = eval_job(job, artifact[:size])
    assert environ["ARTIFACT"] in refusal(environ)


def test_artifact_with_a_byte_after_its_end(job, artifact):
    environ = eval_job(job, artifact + b"\0")
    assert environ["ARTIFACT"] in refusal(environ)


@pytest.mark.parametrize("place", [*range(0, BODY, 3), BODY, BODY + 1, BODY + 99, "middle", "last"])
@pytest.mark.parametrize("bit", [0, 7])
def test_flipped_bit_in_the_artifact(place, bit, job, artifact):
    place = {"middle": len(artifact) // 2, "last": len(artifact) - 1}.get(place, place)
    damaged = bytearray(artifact)
    damaged[place] ^= 1 << bit
    environ = eval_job(job, bytes(damaged))
    assert environ["ARTIFACT"] in refusal(environ)


@pytest.mark.parametrize("version", [0, 1, VERSION + 1, 256, 65535])
def test_artifact_of_another_version(version, job, artifact):
    header, payload = opened(artifact)
    environ = eval_job(job, sealed(version, json.dumps(header).encode(), payload))
    message = refusal(environ)
    assert environ["ARTIFACT"] in message
    assert f"version {version}" in message


def test_file_that_is_no_artifact(job):
    environ = eval_job(job, b"PK\x03\x04" + bytes(5000))
    assert environ["ARTIFACT"] in refusal(environ)


def test_artifact_of_another_tokenizer(job, artifact):
    other_tokenizer(job)
    environ = eval_job(job, artifact)
    message = refusal(environ)
    assert environ["ARTIFACT"] in message
    assert environ["TOKENIZER_PATH"] in message


@pytest.mark.parametrize("version", [2, VERSION])
def test_the_helper_that_seals_artifacts_makes_good_ones(version, job, artifact):
    header, payload = opened(artifact)
    run_main(eval_job(job, sealed(version, json.dumps(header).encode(), payload)))


def without(header: dict, key: str) -> dict:
    return {name: value for name, value in header.items() if name != key}


def with_settings(header: dict, **changed: str) -> dict:
    return header | {"settings": header["settings"] | changed}


def with_layout(header: dict, layout: list) -> dict:
    first = next(iter(header["tensors"]))
    return header | {"tensors": header["tensors"] | {first: layout}}


def with_scale(header: dict, shape: list[int]) -> dict:
    """A first tensor whose last array is as it should be, but is multiplied by another."""
    return with_layout(header, [["<f2", shape], *next(iter(header["tensors"].values()))[-1:]])


# A digest keeps damage out, not malice or mistakes of other programs.
MALFORMED = {
    "no settings": lambda header: without(header, "settings"),
    "no tensors": lambda header: without(header, "tensors"),
    "no tokenizer": lambda header: {k: v for k, v in header.items() if "tokenizer" not in k},
    "not an object": lambda _: [],
    "a setting missing": lambda h: h | {"settings": without(h["settings"], "MODEL_DIM")},
    "a setting that is no number": lambda header: with_settings(header, MODEL_DIM="wide"),
    "a setting out of range": lambda header: with_settings(header, NUM_LAYERS="0"),
    "settings that contradict": lambda header: with_settings(header, MODEL_DIM="63"),
    "settings of a larger model": lambda header: with_settings(header, NUM_LAYERS="2"),
    "settings of a huge model": lambda header: with_settings(header, MODEL_DIM="65536"),
    "a tensor missing": lambda header: header | {"tensors": {}},
    "a shape too large": lambda header: with_layout(header, [["<f4", [2**40]]]),
    "a negative shape": lambda header: with_layout(header, [["<f4", [-1]]]),
    "a shape of text": lambda header: with_layout(header, [["<f4", ["x"]]]),
    "a type that is none": lambda header: with_layout(header, [["<q9", [1]]]),
    "a type of objects": lambda header: with_layout(header, [["|O", [1]]]),
    "no arrays": lambda header: with_layout(header, []),
    "a scale that does not fit": lambda header: with_scale(header, [2, 1, 1]),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_malformed_artifact_with_a_digest_that_fits(change, job, artifact):
    header, payload = opened(artifact)
    environ = eval_job(job, sealed(VERSION, json.dumps(change(header)).encode(), payload))
    assert environ["ARTIFACT"] in refusal(environ)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("VAL_TOKENS", "100"),
        ("OUT_DIR", "elsewhere"),
        ("ARTIFACT_MAX_BYTES", "999999999"),
        ("SAVE_NLL", "tok.model"),
        ("DATA_PATH", "elsewhere"),
    ],
)
def test_artifact_that_sets_more_than_the_model(name, text, job, artifact):
    """What is scored, and where files go, is not for an artifact to say."""
    header, payload = opened(artifact)
    header = with_settings(header, **{name: text})
    environ = eval_job(job, sealed(VERSION, json.dumps(header).encode(), payload))
    assert environ["ARTIFACT"] in refusal(environ)


def test_artifact_whose_sequences_are_longer_than_the_validation_batch(job, artifact):
    """The settings fit each other, but not the artifact's sequences of 64 tokens."""
    short = {"TRAIN_SEQ_LEN": "32", "VAL_BATCH_SIZE": "32"}
    assert "VAL_BATCH_SIZE=32" in refusal(eval_job(job | short, artifact))


def test_artifact_whose_header_is_no_json(job, artifact):
    environ = eval_job(job, sealed(VERSION, b"{", opened(artifact)[1]))
    assert environ["ARTIFACT"] in refusal(environ)


@pytest.mark.parametrize("sizes", [(0, 0), (1, 1), (2**32 - 1, 2**32 - 1)])
def test_artifact_whose_sizes_are_not_those_of_its_body(sizes, job, artifact):
    preamble = PREAMBLE.pack(b"BIRDIE", VERSION, *sizes)
    body = artifact[BODY:]
    environ = eval_job(job, preamble + hashlib.sha256(preamble + body).digest() + body)
    assert environ["ARTIFACT"] in refusal(environ)


@pytest.mark.parametrize("size", [2**32, 2**40, 2**62])
def test_artifact_that_would_fill_the_memory(size, job):
    body = struct.pack("<IBQ", 0xFD2FB528, 0xE0, size) + b"\1\0\0"  # zstd: magic, flags, size
    assert zstandard.frame_content_size(body) == size
    preamble = PREAMBLE.pack(b"BIRDIE", VERSION, 2, len(body))
    environ = eval_job(job, preamble + hashlib.sha256(preamble + body).digest() + body)
    assert environ["ARTIFACT"] in refusal(environ)


def test_artifact_whose_body_is_not_compressed(job):
    preamble = PREAMBLE.pack(b"BIRDIE", VERSION, 2, 2)
    data = preamble + hashlib.sha256(preamble + b"{}ab").digest() + b"{}ab"
    environ = eval_job(job, data)
    assert environ["ARTIFACT"] in refusal(environ)


# ---- through the real program


def cli_refusal(job: dict[str, str], nproc: int = 1) -> Outcome:
    """How the program ends on a bad job: with code 1, and no file touched."""
    before = snapshot(Path.cwd())
    done = run_cli(job, nproc=nproc, cwd=Path.cwd())
    assert done.rc == 1
    assert snapshot(Path.cwd()) == before
    return done


CLI = {
    "misspelt setting": (lambda job, _: job | {"MATRX_LR": "1"}, "MATRX_LR=1"),
    "non-number": (lambda job, _: job | {"SEED": "x"}, "SEED=x"),
    "no shards": (lambda job, _: job | {"DATA_PATH": "nowhere"}, "DATA_PATH=nowhere"),
    "truncated shard": (
        lambda job, _: spoil(job, "val", shard_bytes([1, 2, 3])[:-1]) and job,
        "fineweb_val_000001.bin",
    ),
    "no tokenizer": (
        lambda job, _: Path("tok.model").write_text("{}") and job,
        "tok.model",
    ),
    "unwritable OUT_DIR": (lambda job, _: job | {"OUT_DIR": "tok.model/x"}, "OUT_DIR=tok.model/x"),
    "truncated artifact": (lambda job, data: eval_job(job, data[:-1]), "given.artifact"),
    "SAVE_NLL": (lambda job, _: job | {"SAVE_NLL": "none/x.npy"}, "SAVE_NLL=none/x.npy"),
}


@pytest.mark.parametrize(("change", "culprit"), CLI.values(), ids=CLI)
def test_program_ends_with_one_clear_error(change, culprit, job, artifact):
    done = cli_refusal(change(job, artifact))
    assert done.stdout == ""
    assert done.stderr.startswith("train_gpt.py: error: ")
    assert done.stderr.count("error: ") == 1
    assert culprit in done.stderr
    assert "Traceback" not in done.stderr


def test_torchrun_ends_with_the_error_once(job):
    """torchrun adds its own report, with a traceback of its own; the script speaks once."""
    done = cli_refusal(job | {"MATRX_LR": "1"}, nproc=2)
    assert done.stderr.count("train_gpt.py: error: ") == 1
    assert done.stderr.count("MATRX_LR=1") == 1
