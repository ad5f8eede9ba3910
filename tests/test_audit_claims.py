"""records/dynamic_rules/claims.py: what logs claim, beside what comes out on the real data."""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, shard_bytes
from field import Field, InProcess

sys.path.insert(0, str(REPO / "records"))

import dynamic_rules
from dynamic_rules import Plan, claims
from reading import Verdict
from streams import ByteCounter, shard_size

FINAL = "final_bigram_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}\n"
PLAN = Plan(least=1000, plain=1500, dense=24, stream_tokens=20_000, fine=1.0)


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Field:
    return Field(tmp_path_factory.mktemp("field"), count=300)


@pytest.fixture(scope="module")
def table(field) -> np.ndarray:
    """log p(v | u), float64 (V, V)."""
    counts = np.load(field.artifact).astype(float) + 0.05
    return np.log(counts / counts.sum(1, keepdims=True))


class Folder:
    """A record folder whose log claims a score of the field's validation text."""

    def __init__(self, path: Path, field: Field, table: np.ndarray, monkeypatch) -> None:
        self.path, self.field = path, field
        tokens = field.val.astype(int)
        self.nll = -table[tokens[:-1], tokens[1:]]
        self.size = sum(len(text.encode()) for text in field.texts)
        monkeypatch.setattr(dynamic_rules, "Script", self.script)
        self.table = table

    def script(self, *_, **__) -> InProcess:
        """The model that the log is of."""
        return InProcess(self.field, lambda tokens: -self.table[tokens[:-1], tokens[1:]])

    def log(self, text: str, better: float = 0.0) -> None:
        """Write a log; {tokens}, {size} and {final} are filled in, the score better by nats."""
        loss = float(self.nll.mean()) - better
        bpb = loss * len(self.nll) / math.log(2) / self.size
        facts = {"tokens": len(self.nll) + 1, "size": self.size}
        facts["final"] = FINAL.format(loss=loss, bpb=bpb)
        text = "step:9/9 val_loss:1 val_bpb:1\n" + text.format(**facts)
        (self.path / "train.log").write_text(text)

    def audit(self, share: float = 1.0) -> Verdict:
        """The verdict on the claim, if so much of the data can be scored."""
        tokens = share * (len(self.nll) + 1)
        seconds = 2.5 * tokens / 1e4 / PLAN.real  # InProcess takes a second for 10,000 tokens
        time = {"least": seconds, "most": seconds, "more": 0, "starts": 0}
        plan = Plan(**{**vars(PLAN), **time, "claim": 0.2 * (share == 1)})
        field, where = self.field, self.field.data
        found = dynamic_rules.check(self.path, field.artifact, where, field.tokenizer, plan, 1)
        verdict = next(v for v in found if v.rule == "claim")
        print(verdict)
        return verdict


@pytest.fixture
def folder(tmp_path, field, table, monkeypatch) -> Folder:
    return Folder(tmp_path, field, table, monkeypatch)


@contextlib.contextmanager
def sidecars(field: Field, sizes: np.ndarray) -> Iterator[None]:
    """For a while, the field has sidecars of these sizes."""
    counts = [shard_size(path) for path in sorted(field.data.glob("fineweb_val_0*.bin"))]
    parts = np.split(sizes, np.cumsum(counts)[:-1])
    paths = [field.data / f"fineweb_val_bytes_{i:06d}.bin" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(shard_bytes(part))
    try:
        yield
    finally:
        for path in paths:
            path.unlink()


OURS = "val_tokens:{tokens} val_bytes:{size} byte_audit:ok\n{final}"
PUBLIC = "val_loader:shards pattern=/d/fineweb_val_*.bin tokens:{tokens}\n{final}"


@pytest.mark.parametrize("text", [OURS, PUBLIC])
def test_a_claim_of_all_data_must_come_out_again(folder, text):
    folder.log(text)
    assert folder.audit().state == "PASS"
    folder.log(text, better=0.002)
    assert folder.audit().state == "FAIL"


def test_of_more_than_time_allows_a_beginning_tells_what_it_can(folder):
    folder.log(OURS)
    verdict = folder.audit(0.4)
    assert verdict.state == "PASS"
    assert "would be found (99%)" in verdict.evidence
    found = float(verdict.evidence.split("a claim that is ")[1].split()[0])
    folder.log(OURS, better=1.2 * found)
    assert folder.audit(0.4).state == "FAIL"
    folder.log(OURS, better=-1.2 * found)
    assert folder.audit(0.4).state == "WARN"


def test_a_beginning_that_tells_too_little_is_no_check(folder):
    folder.log(OURS)
    assert folder.audit(0.1).state == "NOT CHECKED"


@pytest.mark.parametrize("fault", ["", "own mean", "first tokens"])
def test_shipped_losses_are_compared_token_by_token(folder, fault):
    folder.log(OURS)
    shipped = folder.nll.copy()
    if fault == "own mean":
        shipped[-3000:] -= 0.1
    if fault == "first tokens":
        shipped[:3000] -= 0.1
        shipped[-3000:] += 0.1
    np.save(folder.path / "nll.npy", shipped.astype(np.float32))
    verdict = folder.audit(0.4)
    assert verdict.state == ("FAIL" if fault else "PASS")
    assert "nll.npy" in verdict.evidence


def test_an_array_of_something_else_is_left_aside(folder):
    folder.log(OURS)
    np.save(folder.path / "a.npy", np.zeros(5))
    (folder.path / "b.npy").write_bytes(b"nothing")
    np.save(folder.path / "c.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "npy" not in folder.audit(0.4).evidence


@pytest.mark.parametrize("better", [0.0, 0.05])
def test_running_scores_of_chunks_are_compared(folder, better):
    rows, length = [], 1024
    for chunk in range(1, 9):
        end = chunk * length
        size = dynamic_rules.ByteCounter(folder.field.tokenizer).count(folder.field.val[: end + 1])
        bpb = folder.nll[:end].sum() / math.log(2) / size - better
        rows.append(f"  ttt_chunk [{chunk}/99] bpb={bpb:.6f} time=1.0s")
    folder.log("ttt:start chunks=99 chunk_tokens=1024\n" + "\n".join(rows) + "\n" + OURS)
    verdict = folder.audit(0.4)
    assert verdict.state == ("FAIL" if better else "PASS")
    assert f"the first {8 * length} tokens" in verdict.evidence


def test_a_claim_on_other_data_is_not_checked(folder):
    folder.log(OURS.replace("{size}", "12345"), better=0.1)
    assert folder.audit().state == "NOT CHECKED"


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("more", [0.0, 0.003])
def test_a_claim_per_more_bytes_than_the_text_has_is_found(folder, share, more):
    """The loss is right; its bits are of a sidecar that counted too much."""
    text = folder.size
    folder.size = round(text * (1 + more))
    folder.log(OURS)
    folder.size = text
    sizes = ByteCounter(folder.field.tokenizer).sizes(folder.field.val)
    with sidecars(folder.field, sizes):
        verdict = folder.audit(share)
    assert verdict.state == ("FAIL" if more else "PASS")
    assert ("the text has" in verdict.evidence) == bool(more)


def test_without_a_number_of_tokens_nothing_can_be_compared(folder):
    folder.log("{final}")
    assert folder.audit().state == "NOT CHECKED"


# ------------------------------------ the sidecar ------------------------------------


@pytest.fixture(scope="module")
def true_sizes(field) -> np.ndarray:
    """The bytes of each validation token, counted one by one."""
    counter = dynamic_rules.ByteCounter(field.tokenizer)
    return np.array([0] + [counter.count(field.val[i : i + 2]) for i in range(len(field.val) - 1)])


BRIEF = replace(PLAN, stream_tokens=2000)  # the bytes are judged before any stream


@pytest.mark.parametrize(
    ("change", "state"), [(0, "PASS"), (0.004, "WARN"), (0.03, "FAIL"), (None, "FAIL")]
)
def test_a_sidecar_is_recounted(field, table, folder, true_sizes, change, state):
    sizes = true_sizes
    blank = dynamic_rules.ByteCounter(field.tokenizer).blank[
        field.val
    ]  # where the tokenizer joins blanks
    added = np.random.default_rng(1).random(len(sizes)) < (change or 0) * sizes.sum() / blank.sum()
    sizes = sizes[:-50] if change is None else sizes + added * blank
    with sidecars(field, sizes):
        found = dynamic_rules.check(
            folder.path, field.artifact, field.data, field.tokenizer, BRIEF, 1
        )
    print(found[4])
    assert (found[4].rule, found[4].state) == ("bytes", state)


# ------------------------------------ arithmetic ------------------------------------


def test_the_regression_is_that_of_least_squares():
    rng = np.random.default_rng(1)
    simple = rng.normal(4, 0.5, 200)
    losses = 0.3 + 0.7 * simple + rng.normal(0, 0.1, 200)
    expected, error = claims.regress(losses, simple, 4.5)
    slope, offset = np.polyfit(simple, losses, 1)
    assert expected == pytest.approx(offset + slope * 4.5)
    assert 0.005 < error < 0.02


def test_its_error_is_how_far_it_is_off():
    rng, scores = np.random.default_rng(2), []
    for _ in range(400):
        simple = rng.normal(4, 0.5, 40)
        losses = 0.3 + 0.7 * simple + rng.normal(0, 0.1, 40)
        expected, error = claims.regress(losses, simple, 4.5)
        scores.append((expected - 3.45) / error)
    assert np.std(scores) == pytest.approx(1, abs=0.12)
