"""data/download.py, run as a program against a hub on loopback."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import VOCAB, shard_bytes
from filelock import FileLock
from hub_server import API, Fault, Hub
from hypothesis import given

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "download.py"
TRAINER = SCRIPT.parent.parent / "train_gpt.py"
sys.path.insert(0, str(SCRIPT.parent))

import checks  # noqa: E402
import download  # noqa: E402
import vocabulary  # noqa: E402

REPO = "willdepueoai/parameter-golf"
NAME = "fineweb10B_sp1024"
FOLDER = f"datasets/{NAME}"
MODEL = "tokenizers/fineweb_1024_bpe.model"
AT_ONCE = {"Retry-After": "0"}
TRAIN = 3


def manifest(train: int = TRAIN, **entry: object) -> dict[str, object]:
    """A manifest of the variants sp1024 and byte260."""
    sp = {"name": NAME, "tokenizer_name": "bpe", "stats": {"files_train": train, "files_val": 1}}
    byte = {"name": "fineweb10B_byte260", "tokenizer_name": "bytes"}
    byte["stats"] = {"files_train": 1, "files_val": 1}
    tokenizers = [
        {"name": "bpe", "model_path": MODEL, "vocab_path": "tokenizers/fineweb_1024_bpe.vocab"},
        {"name": "bytes", "model_path": None, "path": "tokenizers/fineweb_pure_byte_260.json"},
    ]
    return {"datasets": [sp | entry, byte], "tokenizers": tokenizers}


def tokens(seed: int, count: int = 15_000) -> bytes:
    """A shard."""
    return shard_bytes(np.random.default_rng(seed).integers(0, VOCAB, count))


def published(model: bytes, train: int = TRAIN, seed: int = 0) -> dict[str, bytes]:
    """The files of a repository below the prefix."""
    shards = {f"{FOLDER}/fineweb_train_{i:06d}.bin": tokens(seed + i) for i in range(train)}
    return {
        "manifest.json": json.dumps(manifest(train)).encode(),
        **shards,
        f"{FOLDER}/fineweb_val_000000.bin": tokens(seed + 100, 3000),
        f"{FOLDER}/fineweb_val_bytes_000000.bin": tokens(seed + 200, 3000),
        MODEL: model,
        "tokenizers/fineweb_1024_bpe.vocab": b"a\t0\n",
        "datasets/fineweb10B_byte260/fineweb_train_000000.bin": tokens(seed + 300, 500),
        "datasets/fineweb10B_byte260/fineweb_val_000000.bin": tokens(seed + 400, 500),
        "tokenizers/fineweb_pure_byte_260.json": json.dumps(
            {"config": vocabulary.BYTE_LEVEL_CONFIG}
        ).encode(),
    }


@dataclass
class Case:
    """A hub, a data folder, and ways to run the program."""

    hub: Hub
    root: Path
    env: dict[str, str]

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def files(self) -> dict[str, bytes]:
        """The repository's files below the default prefix."""
        repo = self.hub.repos[REPO]
        return {p.removeprefix("datasets/"): b for p, b in repo.items()}

    def publish(self, files: dict[str, bytes], repo: str = REPO, prefix: str = "datasets/"):
        self.hub.repos[repo] = {prefix + path: body for path, body in files.items()}

    def start(self, *args: str, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, SCRIPT, "--out", self.out, *args],
            env=self.env | env,
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess:
        process = self.start(*args, **env)
        stdout, stderr = process.communicate(timeout=60)
        assert "Traceback" not in stdout + stderr, stderr
        return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)

    def succeeds(self, *args: str, **env: str) -> str:
        done = self.run(*args, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fails(self, *args: str, **env: str) -> str:
        done = self.run(*args, **env)
        assert done.returncode == 1
        return done.stderr.rpartition("download.py: error: ")[2]

    def here(self) -> dict[str, bytes]:
        """The files in the data folder under their final names, less the records."""
        files = {str(p.relative_to(self.out)): p for p in self.out.rglob("*") if p.is_file()}
        final = {name: p for name, p in files.items() if not p.name.startswith((".", "hub_"))}
        return {name: path.read_bytes() for name, path in final.items()}

    def expected(self, *left_out: str, variant: str = "sp1024") -> dict[str, bytes]:
        """What a whole download of the variant holds, less files whose names end so."""
        names = {"sp1024": ("sp1024/", "fineweb_1024"), "byte260": ("byte260/", "pure_byte")}
        chosen = {p: b for p, b in self.files.items() if any(n in p for n in names[variant])}
        return {p: b for p, b in chosen.items() if not (left_out and p.endswith(left_out))}

    def parts(self) -> list[Path]:
        return sorted(self.out.rglob("*.part"))


@pytest.fixture
def case(dataset, tmp_path):
    hub = Hub()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "100"}
    case = Case(hub, tmp_path, env)
    case.publish(published(dataset.tokenizer.read_bytes()))
    yield case
    hub.close()


# ---- downloads


def test_all_files_arrive_byte_for_byte(case):
    done = case.run()
    assert done.returncode == 0, done.stderr
    assert case.here() == case.expected()
    assert case.parts() == []
    assert "sp1024 has 3 train shards; taking all of them" in done.stdout
    assert "3 train shard(s) of 45,000 tokens and 1 val shard(s)" in done.stdout
    assert done.stdout.endswith(
        f"\nDATA_PATH=out/{FOLDER} TOKENIZER_PATH=out/{MODEL} VOCAB_SIZE={VOCAB} python {TRAINER}\n"
    )
    assert "downloading" in done.stderr
    assert "100%" in done.stderr
    assert not (case.root / "hf").exists()  # no second copy in the hub library's cache


def test_a_second_run_fetches_nothing(case):
    case.succeeds()
    case.hub.forget()
    assert "fetched 0 file(s)" in case.succeeds()
    assert case.hub.bodies() == []


def test_files_that_came_from_elsewhere_are_checked_and_not_fetched(case):
    case.succeeds()
    (case.out / FOLDER / "hub_manifest.json").write_text("damaged")
    case.hub.forget()
    case.succeeds()
    assert [served.name for served in case.hub.bodies()] == ["datasets/manifest.json"]


def test_another_variant_with_its_byte_level_tokenizer(case):
    stdout = case.succeeds("--variant", "byte260", "--out", str(case.out / "a b"))
    here = {name.removeprefix("a b/"): body for name, body in case.here().items()}
    assert here.pop("tokenizers/fineweb_pure_byte_260.model") == vocabulary.byte_level_model()
    assert here == case.expected(variant="byte260")
    assert "TOKENIZER_PATH='out/a b/tokenizers/fineweb_pure_byte_260.model'" in stdout
    assert "DATA_PATH='out/a b/datasets/fineweb10B_byte260'" in stdout
    assert "VOCAB_SIZE=260" in stdout
    assert "warning: a model memorizes a single train shard" in stdout


def test_the_vocabulary_size_is_omitted_if_unknown(case):
    case.hub.repos[REPO]["datasets/" + MODEL] = b"no model"
    assert f"TOKENIZER_PATH=out/{MODEL} python {TRAINER}" in case.succeeds()


def test_the_number_of_train_shards(case):
    stdout = case.succeeds("--train-shards", "0")
    assert case.here() == case.expected(*(f"train_{i:06d}.bin" for i in range(TRAIN)))
    assert "0 train shard(s)" in stdout
    stdout = case.succeeds("--train-shards", "2")
    assert case.here() == case.expected("train_000002.bin")
    assert "taking all" not in stdout
    assert "memorizes" not in stdout


def test_files_are_fetched_at_the_same_time(case):
    barrier = threading.Barrier(TRAIN)
    for i in range(TRAIN):
        case.hub.faults[f"train_{i:06d}.bin"] = [Fault(barrier=barrier)]
    case.succeeds()
    assert not barrier.broken
    assert case.here() == case.expected()


def test_the_documents_too(case):
    docs = b'{"text": "a"}\n' * 1000
    digest = hashlib.sha256(docs).hexdigest()
    source = json.dumps({"docs_sha256": digest}).encode()
    extra = {"docs_selected.jsonl": docs, "docs_selected.source_manifest.json": source}
    case.publish(case.files | extra)
    case.succeeds("--train-shards", "0")
    assert "docs_selected.jsonl" not in case.here()
    case.succeeds("--train-shards", "0", "--with-docs")
    assert extra.items() <= case.here().items()

    wrong = json.dumps({"docs_sha256": "0" * 64}).encode()
    case.publish(case.files | {"docs_selected.source_manifest.json": wrong})
    assert "source_manifest.json states sha256:0000" in case.fails("--with-docs")


def test_the_stated_digest_of_the_documents_is_verified(case):
    """Where the listing has no SHA-256, that of the source manifest is the only one."""
    source = json.dumps({"docs_sha256": "1" * 64}).encode()
    extra = {"docs_selected.jsonl": b"text", "docs_selected.source_manifest.json": source}
    case.publish(case.files | extra)
    case.hub.listed["datasets/docs_selected.jsonl"] = {"lfs": None, "blobId": None}
    assert "docs_selected.jsonl: bad each of 3 times" in case.fails("--with-docs")
    assert case.here() == case.expected() | {"docs_selected.source_manifest.json": source}


def test_documents_without_a_source_manifest(case):
    case.publish(case.files | {"docs_selected.jsonl": b"text"})
    case.succeeds("--with-docs", "--train-shards", "0")
    assert case.here()["docs_selected.jsonl"] == b"text"


# ---- resuming


def test_a_broken_connection_is_continued_where_it_broke(case):
    """As often as it takes, as long as each connection brings something."""
    case.hub.faults["train_000001.bin"] = [Fault(break_after=5000, times=5)]
    case.succeeds()
    assert case.here() == case.expected()
    requests = case.hub.bodies("train_000001.bin")
    starts = [(None, 5000), *((n, 5000) for n in (5000, 10_000, 15_000, 20_000)), (25_000, 6024)]
    assert [(r.start, r.size) for r in requests] == starts


def test_a_server_without_ranges_sends_the_file_again(case):
    faults = [Fault(break_after=9000), Fault(no_ranges=True, break_after=4000)]
    case.hub.faults["train_000001.bin"] = [*faults, Fault(no_ranges=True)]
    assert "fetching it again" not in case.run().stderr  # nothing wrong was put together
    assert case.here() == case.expected()


@pytest.mark.parametrize(
    "fault",
    [{"headers": {"Content-Range": "bytes 5-9/10"}, "body": bytes(31_024)}, {"status": 416}],
    ids=["another", "none"],
)
def test_a_range_other_than_the_one_asked_for_is_not_used(case, fault):
    case.hub.faults["train_000001.bin"] = [Fault(break_after=9000), Fault(**fault)]
    assert "fetching it again" not in case.run().stderr
    assert case.here() == case.expected()


def part_of(case: Case, name: str, body: bytes) -> Path:
    """Leave a part of a file as an earlier run would have."""
    remote = case.hub.info(REPO)["siblings"]
    entry = next(e for e in remote if e["rfilename"] == f"datasets/{FOLDER}/{name}")
    part = case.out / FOLDER / f".{name}.{entry['lfs']['sha256'][:16]}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(body)
    return part


@pytest.mark.parametrize("size", [31_024, 20_000, 40_000])
def test_a_damaged_part_costs_a_download_and_no_more(case, size):
    """As long as the file, shorter, and longer."""
    part = part_of(case, "fineweb_train_000000.bin", b"x" * size)
    case.succeeds()
    assert case.here() == case.expected()
    assert not part.exists()


def test_a_whole_part_is_not_fetched(case):
    name = "fineweb_train_000000.bin"
    part_of(case, name, case.files[f"{FOLDER}/{name}"])
    case.succeeds()
    assert case.here() == case.expected()
    assert case.hub.bodies(name) == []


def test_a_part_of_a_file_that_has_changed_since_is_not_continued(case):
    name = "fineweb_train_000000.bin"
    part_of(case, name, case.files[f"{FOLDER}/{name}"][:20_000])
    case.publish(case.files | {f"{FOLDER}/{name}": tokens(77)})
    case.succeeds()
    assert case.here() == case.expected()
    assert [r.start for r in case.hub.bodies(name)] == [None]
    assert case.parts() == []


def test_without_digests_a_part_is_not_continued(case):
    name = f"{FOLDER}/fineweb_train_000000.bin"
    case.hub.listed[f"datasets/{name}"] = {"lfs": None, "blobId": None, "size": None}
    part = case.out / FOLDER / ".fineweb_train_000000.bin..part"
    part.parent.mkdir(parents=True)
    part.write_bytes(tokens(99)[:5000])
    case.succeeds()
    assert case.here() == case.expected()


def test_without_a_digest_the_size_is_checked(case):
    case.hub.listed["datasets/tokenizers/fineweb_1024_bpe.vocab"] = {"blobId": None}
    case.hub.faults["1024_bpe.vocab"] = [Fault(body=b"a\t0\nb\t0\n")]
    case.succeeds()
    assert case.here() == case.expected()


def test_ctrl_c_ends_at_once_and_the_next_run_goes_on(case):
    case.hub.delay = 0.01
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may ignore it
    process = case.start("--jobs", "2")
    signal.signal(signal.SIGINT, before)
    signals = iter([signal.SIGINT])
    case.hub.on_piece = lambda sent: sent > 50_000 and [process.send_signal(s) for s in signals]
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert stderr.endswith("download.py: interrupted; the same command goes on from here\n")
    assert "Traceback" not in stdout + stderr
    arrived = {p.name[1:].rsplit(".", 2)[0]: p.stat().st_size for p in case.parts()}
    assert arrived
    case.hub.delay, case.hub.on_piece = 0, lambda sent: None
    case.hub.forget()
    case.succeeds()
    assert case.here() == case.expected()
    starts = {r.name.split("/")[-1]: r.start for r in case.hub.bodies()}
    # A file may have arrived whole, but for its name: nothing of it is asked for again.
    asked = {name: size or None for name, size in arrived.items() if name in starts}
    assert {name: starts[name] for name in asked} == asked
    assert asked


def test_killed_at_random_moments_it_ends_byte_identical(case):
    rng = random.Random(0)
    case.hub.delay = 0.001
    for _ in range(20):
        case.hub.sent = 0
        process = case.start("--jobs", "3")
        limit, wait = rng.randint(0, 12_000), rng.random() / 50

        def kill(sent, process=process, limit=limit, wait=wait):
            if sent > limit:
                time.sleep(wait)
                process.kill()

        case.hub.on_piece = kill
        process.communicate(timeout=30)
        expected = case.expected()
        assert case.here().items() <= expected.items()
        if process.returncode == 0:
            break
    case.hub.on_piece = lambda sent: None
    case.succeeds()
    assert case.here() == expected
    assert case.parts() == []
    assert sum(r.size for r in case.hub.bodies()) < 2 * sum(map(len, expected.values()))


# ---- bad files


BAD = {
    "other contents": tokens(99),
    "a page": b"<html>please log in</html>",
    "a longer file": tokens(99, 15_001),
    "nothing": b"",
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
def test_what_arrives_bad_is_fetched_again(case, body):
    case.hub.faults["train_000001.bin"] = [Fault(body=body)]
    case.hub.faults["1024_bpe.vocab"] = [Fault(body=b"b\t0\n")]
    case.succeeds()
    assert case.here() == case.expected()


def test_what_is_always_bad_is_reported_and_the_others_arrive(case):
    case.hub.faults["train_000001.bin"] = [Fault(times=99, body=tokens(99))]
    case.hub.faults["train_000002.bin"] = [Fault(times=99, body=tokens(2)[:999])]
    case.hub.faults["1024_bpe.vocab"] = [Fault(times=99, status=500, headers=AT_ONCE)]
    error = case.fails()
    assert "3 file(s) are missing, the others are here:" in error
    assert f"{FOLDER}/fineweb_train_000001.bin: bad each of 3 times" in error
    assert f"{FOLDER}/fineweb_train_000002.bin: 999 of 31,024 bytes arrived" in error
    assert "1024_bpe.vocab: 127.0.0.1: server error 500" in error
    assert case.here() == case.expected("train_000001.bin", "train_000002.bin", ".vocab")
    assert len(case.hub.bodies("train_000001.bin")) == 3


def test_a_shard_that_was_published_bad_is_refused(case):
    bad = shard_bytes([1, 2, 3], count=4)
    case.publish(case.files | {f"{FOLDER}/fineweb_train_000000.bin": bad})
    assert "truncated or damaged" in case.fails()
    assert case.here() == case.expected("train_000000.bin")


def test_a_damaged_file_that_is_here_is_fetched_again(case):
    case.succeeds()
    shards = [case.out / FOLDER / f"fineweb_train_{i:06d}.bin" for i in range(TRAIN)]
    shards[0].write_bytes(shards[0].read_bytes()[:-2])
    shards[1].write_bytes(b"\0" * shards[1].stat().st_size)
    (case.out / MODEL).write_bytes(b"\0" * len(case.files[MODEL]))
    case.hub.forget()
    case.succeeds()
    assert case.here() == case.expected()
    assert len(case.hub.bodies()) == 3


def test_a_shard_missing_from_the_listing_is_reported_and_the_others_arrive(case):
    files = case.files
    del files[f"{FOLDER}/fineweb_train_000001.bin"]
    case.publish(files)
    assert f"fineweb_train_000001.bin: not in the repository {REPO}" in case.fails()
    assert case.here() == case.expected()


# ---- a repository that changes, or another one


def test_the_manifest_is_asked_for_again(case, dataset):
    case.succeeds()
    case.publish(published(dataset.tokenizer.read_bytes(), train=5))
    assert "5 train shard(s)" in case.succeeds()
    assert case.here() == case.expected()


def test_files_of_the_same_size_but_of_another_commit_are_replaced(case, dataset):
    case.succeeds()
    case.publish(published(dataset.tokenizer.read_bytes(), seed=1000))
    case.succeeds()
    assert case.here() == case.expected()


def test_shards_of_another_commit_beyond_those_asked_for_are_an_error(case, dataset):
    case.succeeds()
    case.publish(published(dataset.tokenizer.read_bytes(), seed=1000))
    error = case.fails("--train-shards", "1")
    assert f"these are not the files of {REPO}" in error
    listed = error.split(":")[-1].split()
    assert listed == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]


def test_a_dataset_that_prepare_made_is_left_alone(case):
    folder = case.out / FOLDER
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "fineweb_val_000000.bin").write_bytes(tokens(5))
    before = case.here()
    assert "made by prepare.py" in case.fails()
    assert case.here() == before


def test_a_tokenizer_of_the_users_own_is_left_alone(case):
    own = case.out / MODEL
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    assert f"{own} is not the published file" in case.fails()
    assert case.here() == {MODEL: b"mine"}


def test_each_variant_knows_its_repository(case):
    body = json.dumps(manifest(name="fineweb10B_sp8192", stats={"files_train": 0, "files_val": 1}))
    files = case.files | {"manifest.json": body.encode()}
    val = files[f"{FOLDER}/fineweb_val_000000.bin"]
    files["datasets/fineweb10B_sp8192/fineweb_val_000000.bin"] = val
    case.publish(files, "kevclark/parameter-golf")
    case.succeeds("--variant", "sp8192")
    assert case.here()["datasets/fineweb10B_sp8192/fineweb_val_000000.bin"] == val


def test_the_environment_and_the_option_choose_the_repository(case):
    case.publish(case.files, "me/env", prefix="")
    case.publish(case.files, "me/option", prefix="a/b/")
    settings = {"MATCHED_FINEWEB_REPO_ID": "me/env", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": ""}
    case.succeeds("--train-shards", "0", **settings)
    assert {r.name for r in case.hub.bodies()} >= {"manifest.json", MODEL}
    case.hub.forget()
    settings["MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"] = "a/b"
    case.succeeds("--repo-id", "me/option", **settings)
    assert {r.name for r in case.hub.bodies("val_000000.bin")} == set()  # the same contents
    assert case.here() == case.expected()
    case.hub.forget()
    assert "there is no datasets/manifest.json" in case.fails("--repo-id", "me/option")


CASEOPS = "sp8192_lossless_caps_caseops_v1_reserved"
CASEOPS_FOLDER = f"datasets/fineweb10B_{CASEOPS}"
CASEOPS_MODEL = f"tokenizers/fineweb_8192_bpe_{CASEOPS.removeprefix('sp8192_')}.model"


def caseops_files(files_val: int = 1, shards: int = 1) -> dict[str, bytes]:
    """The published CaseOps repository, below the prefix."""
    name = f"sp_bpe_{CASEOPS}"
    entry = {"name": f"fineweb10B_{CASEOPS}", "tokenizer_name": name}
    entry["stats"] = {"files_train": 2, "files_val": files_val}
    tokenizers = [{"name": name, "model_path": CASEOPS_MODEL}]
    body = json.dumps({"datasets": [entry], "tokenizers": tokenizers}).encode()
    files = {"manifest.json": body, CASEOPS_MODEL: b"model"}
    for i in range(2):
        files[f"{CASEOPS_FOLDER}/fineweb_train_{i:06d}.bin"] = tokens(i)
    for i in range(shards):
        files[f"{CASEOPS_FOLDER}/fineweb_val_{i:06d}.bin"] = tokens(100 + i)
        files[f"{CASEOPS_FOLDER}/fineweb_val_bytes_{i:06d}.bin"] = tokens(200 + i)
    return files


@pytest.mark.parametrize("variant", ["sp8192_caseops", CASEOPS])
def test_the_published_caseops_data_come_with_their_sidecars(case, variant):
    case.publish(caseops_files(), "romeerp/parameter-golf-caseops-v1")
    stdout = case.succeeds("--variant", variant)
    expected = caseops_files()
    del expected["manifest.json"]
    assert case.here() == expected
    assert "2 train shard(s) of 30,000 tokens and 1 val shard(s)" in stdout
    assert f"DATA_PATH=out/{CASEOPS_FOLDER} TOKENIZER_PATH=out/{CASEOPS_MODEL}" in stdout


@pytest.mark.parametrize("shards", [1, 3])
def test_a_manifest_that_counted_sidecars_as_shards_is_understood(case, shards):
    files = caseops_files(files_val=2 * shards, shards=shards)
    case.publish(files, "romeerp/parameter-golf-caseops-v1")
    assert f"{shards} val shard(s)" in case.succeeds("--variant", "sp8192_caseops")
    assert len(case.here()) == len(files) - 1


def test_a_missing_caseops_sidecar_is_reported(case):
    files = caseops_files(files_val=2, shards=2)
    del files[f"{CASEOPS_FOLDER}/fineweb_val_bytes_000001.bin"]
    case.publish(files, "romeerp/parameter-golf-caseops-v1")
    assert "fineweb_val_bytes_000001.bin: not in the repo" in case.fails("--variant", CASEOPS)


def test_the_checked_folder_of_the_caseops_data_knows_its_tokenizer(case):
    case.publish(caseops_files(), "romeerp/parameter-golf-caseops-v1")
    case.succeeds("--variant", CASEOPS)
    found = checks.find_tokenizer(case.out / CASEOPS_FOLDER, {})
    assert found == case.out / CASEOPS_MODEL


def test_list(case):
    case.publish({"manifest.json": b'{"datasets": [{"name": "fineweb10B_sp8192"}]}'}, "k/p")
    case.hub.repos["kevclark/parameter-golf"] = case.hub.repos.pop("k/p")
    case.publish(caseops_files(), "romeerp/parameter-golf-caseops-v1")
    case.succeeds("--train-shards", "1")
    before = case.here()
    lines = [" ".join(line.split()) for line in case.succeeds("--list").splitlines()]
    assert lines[:3] == [
        f"{REPO}:",
        "sp1024 3 train, 1 val shards",
        "byte260 1 train, 1 val shards",
    ]
    assert lines[3] == "kevclark/parameter-golf:"
    assert "malformed" in lines[4]
    assert lines[5:7] == [
        "romeerp/parameter-golf-caseops-v1:",
        f"{CASEOPS} 2 train, 1 val shards",
    ]
    assert lines[7:] == [f"here, in {case.out}/datasets:", "sp1024 1 train, 1 val shards"]
    assert case.here() == before
    case.hub.close()
    done = case.run("--list")
    assert done.returncode == 1
    assert "cannot reach" in done.stderr
    assert done.stdout.split()[-6:] == ["sp1024", "1", "train,", "1", "val", "shards"]


# ---- what cannot be had


def test_a_variant_that_does_not_exist(case):
    error = case.fails("--variant", "sp1025")
    assert f"{REPO} has no variant 'sp1025'; it has: sp1024, byte260" in error
    assert case.here() == {}


def test_more_train_shards_than_there_are(case):
    assert "--train-shards 4: sp1024 has 3 train shards" in case.fails("--train-shards", "4")
    assert case.here() == {}


@pytest.mark.parametrize("args", ["--variant=../x", "--train-shards=-1", "--jobs=0", "sp1024"])
def test_wrong_usage(args, capsys):
    with pytest.raises(SystemExit) as ended:
        download.main([args])
    assert ended.value.code == 2
    assert "download.py: error: " in capsys.readouterr().err


REFUSALS = {
    "401": (401, {}, "missing, private or gated"),
    "403": (403, {"X-Error-Code": "GatedRepo"}, "missing, private or gated"),
    "404": (404, {"X-Error-Code": "RepoNotFound"}, "missing, private or gated"),
    "418": (418, {}, "answers 418"),
    "429": (429, AT_ONCE, "too many requests"),
    "429, in an hour": (429, {"RateLimit": '"api";r=0;t=3600'}, "too many requests"),
    "503": (503, AT_ONCE, "server error 503"),
    "503, in an hour": (503, {"Retry-After": "3600"}, "server error 503"),
    "a page": (200, {"Content-Type": "text/html"}, "does not answer as the hub does"),
}


@pytest.mark.parametrize(("status", "headers", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_hub_that_refuses(case, status, headers, message):
    case.hub.faults[API] = [Fault(99, status, headers, b"<html>")]
    error = case.fails()
    assert message in error
    assert ("HF_TOKEN" in error) == (status in (401, 403, 404, 429))
    assert case.hub.bodies() == []


def test_passing_failures_of_the_hub_are_passed_over(case):
    for name in (API, "datasets/manifest.json", "train_000000.bin", "val_000000.bin"):
        case.hub.faults[name] = [Fault(2, 503, AT_ONCE), Fault(1, 429, AT_ONCE)]
    case.succeeds()
    assert case.here() == case.expected()


def test_a_thread_that_can_fetch_no_more_stops_by_itself(monkeypatch):
    """Whenever the main thread hears of it."""
    fetched = []

    def fetch(item, transfer):
        fetched.append(item)
        if item == 1:
            raise download.OfflineError

    monkeypatch.setattr(download, "fetch", fetch)
    todo, done = SimpleQueue(), SimpleQueue()
    for item in range(3):
        todo.put(item)
    download.work(todo, done, download.Transfer(None, None, threading.Event()))
    assert fetched == [0, 1]


def test_a_rate_limit_among_the_files_ends_the_run(case):
    case.hub.faults["train_000001.bin"] = [Fault(99, 429, AT_ONCE)]
    error = case.fails("--jobs", "1")
    assert "fineweb_train_000001.bin: 127.0.0.1: too many requests" in error
    assert "the same command goes on from there" in error
    assert case.here() == case.expected("train_000001.bin", "train_000002.bin")


def test_the_token_opens_a_private_repository(case):
    case.hub.token = "hf_abc"
    assert "HF_TOKEN" in case.fails()
    case.succeeds(HF_TOKEN="hf_abc")
    assert case.here() == case.expected()


def test_a_name_that_is_no_repository(case):
    assert "'a/b/c' is no name of a repository" in case.fails("--repo-id", "a/b/c")


# ---- offline


def test_offline_with_nothing_here(case):
    case.hub.close()
    error = case.fails()
    assert f"cannot reach {case.hub.url}" in error
    assert "are you online" in error
    assert "HF_HUB_OFFLINE is set" in case.fails(HF_HUB_OFFLINE="1")
    unknown = case.fails(HF_ENDPOINT="http://hub.invalid")
    assert "cannot reach http://hub.invalid" in unknown


def test_offline_with_all_that_was_asked_for_here(case):
    case.succeeds()
    stdout = case.succeeds(HF_HUB_OFFLINE="1")
    assert "all that was asked for is here and whole" in stdout
    assert "VOCAB_SIZE" in stdout.splitlines()[-1]
    case.hub.faults[API] = [Fault(99, 503, AT_ONCE)]
    assert "all that was asked for is here" in case.succeeds()
    assert "HF_HUB_OFFLINE" in case.fails("--repo-id", "a/b", HF_HUB_OFFLINE="1")
    (case.out / FOLDER / "fineweb_train_000001.bin").write_bytes(tokens(0)[:-2])
    (case.out / MODEL).unlink()
    case.hub.close()
    assert "2 file(s) that were asked for are not here" in case.fails()


def test_offline_with_less_here_than_asked_for(case):
    case.succeeds("--train-shards", "1")
    assert "2 file(s) that were asked for are not here" in case.fails(HF_HUB_OFFLINE="1")
    case.succeeds("--train-shards", "1", HF_HUB_OFFLINE="1")


# ---- the manifest


MALFORMED = {
    "a list": [],
    "no datasets": {"tokenizers": []},
    "datasets of another type": manifest() | {"datasets": {"name": NAME}},
    "no stats": manifest(stats=None),
    "a number as text": manifest(stats={"files_train": "3", "files_val": 1}),
    "a boolean as a number": manifest(stats={"files_train": True, "files_val": 1}),
    "a negative number": manifest(stats={"files_train": -1, "files_val": 1}),
    "an absurd number": manifest(stats={"files_train": 10**7, "files_val": 1}),
    "no validation": manifest(stats={"files_train": 3, "files_val": 0}),
    "no tokenizer": manifest(tokenizer_name=None),
    "an unknown tokenizer": manifest(tokenizer_name="x"),
    "no tokenizers": {"datasets": manifest()["datasets"]},
    "a tokenizer without files": manifest() | {"tokenizers": [{"name": "bpe"}]},
    "a path of another type": manifest() | {"tokenizers": [{"name": "bpe", "path": [1]}]},
}


def catalog_of(value: object) -> download.Catalog:
    return download.Catalog(REPO, "datasets", "main", {}, value)


@pytest.mark.parametrize("value", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_manifest_is_an_error(value):
    with pytest.raises(download.DataError, match="malformed"):
        download.read_variant(catalog_of(value), "sp1024")


PATHS = ["/etc/passwd", "../x", "tokenizers/../../x", "tokenizers", "tokenizers/", "shards.py", ""]
PATHS += ["tokenizers//x", "tokenizers/./x", "tokenizers/.x", "tokenizers\\x", "tokenizers/a\nb"]
PATHS += ["tokenizers/C:\\x", "C:/x", "//host/tokenizers/x", "datasets/x.bin", "tokenizers/a\0b"]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_outside_of_the_tokenizers_is_refused(path):
    value = manifest() | {"tokenizers": [{"name": "bpe", "path": path}]}
    with pytest.raises(download.DataError, match="refused"):
        download.read_variant(catalog_of(value), "sp1024")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.data())
def test_any_manifest_is_understood_or_refused(data):
    """A value anywhere in a good manifest is replaced by any other."""
    value = manifest()
    places = [(value, "datasets"), (value, "tokenizers")]
    for entry in [*value["datasets"], *value["tokenizers"]]:
        places += [(entry, key) for key in entry]
    places += [(value["datasets"][0]["stats"], key) for key in ("files_train", "files_val")]
    holder, key = data.draw(st.sampled_from(places))
    texts = st.text() | st.text(alphabet="./\\tokenizrs")
    holder[key] = data.draw(JSON | texts | st.builds("tokenizers/{}".format, texts))
    catalog = catalog_of(value)
    try:
        variant = download.read_variant(catalog, "sp1024")
    except download.DataError:
        return
    assert variant.train_shards >= 0
    root = Path("/data/tokenizers")
    for path in variant.tokenizer_paths:
        resolved = Path(os.path.normpath(Path("/data") / path))
        assert resolved != root
        assert resolved.is_relative_to(root)


def test_bad_manifests_end_to_end(case):
    for body, message in [
        (b"\xff{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (json.dumps(MALFORMED["no stats"]).encode(), "'stats' should be an object"),
    ]:
        case.publish(case.files | {"manifest.json": body})
        assert message in case.fails()
    assert case.here() == {}


def test_a_manifest_that_arrives_damaged_is_asked_for_again(case):
    case.hub.faults["datasets/manifest.json"] = [Fault(body=b"{}"), Fault(break_after=10)]
    case.succeeds()
    case.hub.faults["datasets/manifest.json"] = [Fault(99, body=b"{}")]
    shutil.rmtree(case.out)
    assert "is not what the repository lists" in case.fails()


# ---- disk and folder


def test_too_little_free_space_is_told_before_anything_big_starts(case):
    lfs = {"sha256": "0" * 64, "size": 10**18, "pointerSize": 134}
    name = f"datasets/{FOLDER}/fineweb_train_000002.bin"
    case.hub.listed[name] = {"size": 10**18, "lfs": lfs}
    error = case.fails()
    assert f"{case.out}: 1,050,000,000.00 GB are needed and " in error
    assert "GB are free" in error
    assert case.hub.bodies(".bin") == []
    case.succeeds("--train-shards", "2")  # what is not asked for does not count


@pytest.fixture
def small_disk(case):
    """The data folder on a file system of 600 KB."""
    case.out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(case.out)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield case
    subprocess.run(["umount", "-l", str(case.out)], check=True)


def test_a_disk_that_fills_up_midway(small_disk):
    case = small_disk
    ballast = case.out / ".ballast"
    case.hub.delay = 0.002

    def fill(sent: int) -> None:
        with case.hub.lock, suppress(OSError), open(ballast, "ab", 0) as file:
            while sent > 20_000:
                file.write(bytes(4096))

    case.hub.on_piece = fill
    error = case.fails()
    assert "No space left on device" in error
    assert "the same command goes on from there" in error
    assert case.here().items() <= case.expected().items()
    assert "bytes are needed and" in case.fails()
    case.hub.on_piece = lambda sent: None
    ballast.unlink()
    case.succeeds()
    assert case.here() == case.expected()


def test_only_what_is_missing_needs_space(small_disk):
    case = small_disk
    case.succeeds()
    free = shutil.disk_usage(case.out).free
    (case.out / ".ballast").write_bytes(b"x" * (free - 30_000))
    (case.out / FOLDER / "fineweb_train_000001.bin").unlink()
    case.succeeds()
    assert case.here() == case.expected()


def test_a_folder_that_cannot_be_written(case):
    case.out.write_text("a file")
    assert str(case.out) in case.fails()
    assert case.out.read_text() == "a file"


def test_two_downloads_into_one_folder(case):
    (case.out / "datasets").mkdir(parents=True)
    with FileLock(case.out / "datasets" / ".download.lock"):
        assert "another download.py is writing there" in case.fails()
    assert case.hub.bodies() == []
    case.succeeds()
