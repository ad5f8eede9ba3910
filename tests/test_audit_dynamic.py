"""records/dynamic_rules.py: planted cheats are caught by the rule that they break, and by no other;
honest scripts pass every rule."""

import dataclasses
import functools
import itertools
import json
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import BOS, REPO, run_cli, shard_bytes, tiny_settings
from field import SPEAKERS, VOCABULARY, Field, can_isolate, write_record

sys.path.insert(0, str(REPO / "records"))

import dynamic_rules
import script
import streams
from dynamic_rules import RULES, Plan

HONEST = sorted(path.stem for path in (SPEAKERS / "honest").glob("*.py"))
CHEATS = sorted(path.stem for path in (SPEAKERS / "cheats").glob("*.py"))
ISOLATED = can_isolate()  # where it is not allowed, the rules are tried nevertheless
check = functools.partial(dynamic_rules.check, isolated=ISOLATED)
PLAN = Plan(
    plain=1300,
    dense=26,
    middle=640,
    middle_variants=16,
    sum_tokens=25_500,
    seconds=60.0,
    patience=30.0,
)
TRAINER = Plan(
    plain=700,
    dense=40,
    dense_bases=2,
    middle=300,
    middle_variants=12,
    sum_tokens=38_000,
    seconds=3600,
)
SUMLESS = dataclasses.replace(PLAN, sum_tokens=0)  # that takes half of the time
BORDERS = dataclasses.replace(SUMLESS, dense=60, middle_variants=0)


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Field:
    return Field(tmp_path_factory.mktemp("field"))


def audit(field: Field, folder: Path, seed: int = 1, plan: Plan = PLAN, **how) -> dict[str, str]:
    """The states of all rules, with their evidence where they fail."""
    found = check(folder, field.artifact, field.data, field.tokenizer, plan, seed, **how)
    assert [verdict.rule for verdict in found] == list(RULES)
    print(*found, sep="\n")
    return {verdict.rule: verdict.state for verdict in found}


@pytest.mark.parametrize("name", HONEST)
def test_honest_scripts_pass_every_rule(field, tmp_path, name):
    states = audit(field, write_record(tmp_path / "record", f"honest/{name}"))
    assert states == dict.fromkeys(RULES, "PASS") | {"claim": "NOT CHECKED"}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_are_caught_by_the_rule_that_they_break_and_by_no_other(field, tmp_path, name):
    if name == "claim_answers":
        pytest.skip("has a test of its own")
    places = {"MEMORY.npy": tmp_path / "memory.npy"}
    record = write_record(tmp_path / "record", f"cheats/{name}", **places)
    # A file that is written outside is not there in the next run, where a script runs apart.
    how = {"isolated": False} if name == "repeatability_file" else {}
    plan = PLAN if name.startswith(("norm", "fixed")) else SUMLESS
    states = audit(field, record, plan=plan, **how)
    assert [rule for rule in RULES if states[rule] == "FAIL"] == [name.split("_")[0]]


@pytest.fixture(scope="module")
def other_bos(tmp_path_factory) -> Field:
    """A field whose tokenizer has BOS at 3, and at 1 an id that no text holds."""
    return Field(tmp_path_factory.mktemp("other_bos"), bos_id=3, unk_id=1)


@pytest.mark.parametrize("speaker", ["honest/documents", "cheats/causality_next_document"])
def test_documents_begin_with_the_bos_of_the_tokenizer(other_bos, tmp_path, speaker):
    record = write_record(tmp_path / "record", speaker, **{"BOS = 1": "BOS = 3"})
    states = audit(other_bos, record, plan=BORDERS)
    failed = [rule for rule in RULES if states[rule] == "FAIL"]
    assert failed == (["causality"] if "next_document" in speaker else [])


def test_the_sums_after_bos_are_those_of_the_tokenizers_bos(other_bos):
    writer = dynamic_rules.Writer(other_bos.val, VOCABULARY, 3, 1)
    suite = dynamic_rules.build_positions(writer, lambda *_: True)
    for place in suite.positions:
        if place.what in ("after BOS", "at a border"):
            assert suite.streams[place.first][place.t - 1] == 3


def test_without_a_bos_borders_are_left_out_and_the_evidence_says_so(tmp_path):
    field = Field(tmp_path, bos_id=-1)
    record = write_record(tmp_path / "record", "honest/plain")
    found = check(record, field.artifact, field.data, field.tokenizer, PLAN, 1)
    states = {verdict.rule: verdict.state for verdict in found}
    assert states == dict.fromkeys(RULES, "PASS") | {"claim": "NOT CHECKED"}
    assert "no BOS" in found[0].evidence
    assert "BOS" not in " ".join(verdict.evidence for verdict in found[1:])


def test_the_byte_level_vocabulary_says_its_bos(tmp_path):
    path = tmp_path / "byte.json"
    path.write_text('{"config": {"byte_offset": 4}}')
    assert streams.ByteCounter(path).bos == 1
    path.write_text('{"config": {"byte_offset": 4, "bos_id": 2}}')
    assert streams.ByteCounter(path).bos == 2


def test_the_trainer_itself_passes(dataset, tmp_path):
    record = tmp_path / "record"
    settings = {"NUM_LAYERS": 1, "MODEL_DIM": 32, "TRAIN_SEQ_LEN": 32, "TRAIN_BATCH_TOKENS": 256}
    settings |= {"EVAL_STRIDE": 8, "ITERATIONS": 2, "VAL_TOKENS": 700}
    env = tiny_settings(dataset, record, **settings)
    trained = run_cli(env, copy_to=record)
    assert trained.rc == 0, trained.stderr
    kept = {n: v for n, v in env.items() if n not in ("DATA_PATH", "TOKENIZER_PATH", "OUT_DIR")}
    (record / "config.env").write_text("".join(f"{n}={v}\n" for n, v in kept.items()))
    artifact = record / "tiny" / "final_model.artifact"
    found = check(record, artifact, dataset.folder, dataset.tokenizer, TRAINER, 1)
    assert {verdict.rule: verdict.state for verdict in found} == dict.fromkeys(RULES, "PASS")


# ------------------------------------ the claim ------------------------------------


def write_log(record: Path, tokens: int, size: int, bpb: float) -> None:
    """A training log that states a final score."""
    lines = f"val_tokens:{tokens} val_bytes:{size} byte_audit:ok\nstep:9/9 val_loss:1 val_bpb:1\n"
    lines += f"final_bigram_roundtrip_exact val_loss:1.00000000 val_bpb:{bpb:.8f}\n"
    (record / "train.log").write_text(lines)


def honest_bpb(field: Field, count: int) -> tuple[int, float]:
    """Bytes, and bits per byte of the bigram model, of the first tokens: in float64, from text."""
    table = np.load(field.artifact).astype(float)
    single = table.sum(0) + 0.5
    table = table + 4 * single / single.sum()
    ids = field.val[:count].astype(int)
    nats = -np.log(table[ids[:-1], ids[1:]] / table.sum(1)[ids[:-1]]).sum()
    parts = np.split(ids, np.flatnonzero(ids == BOS))
    size = sum(len(field.sp.decode(part.tolist()).encode()) for part in parts)
    return size, nats / np.log(2) / size


def whole(field: Field, documents: int) -> int:
    """The tokens of the first documents."""
    return sum(map(len, field.documents[:documents]))


QUICK = Plan(plain=600, dense=16, middle=256, middle_variants=12, sum_tokens=0, patience=30.0)


@pytest.mark.parametrize(("documents", "state"), [(6, "PASS"), (20, "PASS"), (20, "FAIL")])
def test_a_claim_on_these_data_must_come_out_again(field, tmp_path, documents, state):
    record, count = write_record(tmp_path / "record", "honest/plain"), whole(field, documents)
    size, bpb = honest_bpb(field, count)
    assert size == sum(len(text.encode()) for text in field.texts[:documents])
    write_log(record, count, size, bpb - 0.002 * (state == "FAIL"))
    assert audit(field, record, plan=QUICK)["claim"] == state


def test_a_claim_on_other_data_is_not_checked(field, tmp_path):
    record = write_record(tmp_path / "record", "honest/plain")
    size, bpb = honest_bpb(field, whole(field, 6))
    write_log(record, whole(field, 6), size + 1, bpb)
    assert audit(field, record, plan=QUICK)["claim"] == "NOT CHECKED"


def test_a_claim_that_costs_too_much_is_not_checked(field, tmp_path):
    record, count = write_record(tmp_path / "record", "honest/plain"), whole(field, 6)
    write_log(record, count, *honest_bpb(field, count))
    plan = dataclasses.replace(QUICK, claim=count - 1)
    assert audit(field, record, plan=plan)["claim"] == "NOT CHECKED"


def test_answers_beside_the_data_are_not_there_in_an_audit(field, tmp_path):
    answers = field.data / "answers.bin"
    record = write_record(tmp_path / "record", "cheats/claim_answers", ANSWERS=answers)
    count = whole(field, 20)
    size, bpb = honest_bpb(field, count)
    write_log(record, count, size, bpb / 2)
    field.val[1:].tofile(answers)
    try:
        states = audit(field, record)
    finally:
        answers.unlink()
    failed = [rule for rule in RULES if states[rule] == "FAIL"]
    # Where nothing can be hidden, the answers help with the true data alone: with futures that
    # were replaced they do not, and the claim comes out again.
    assert failed == ["claim"] if ISOLATED else failed


@pytest.mark.parametrize("missing", ["train_gpt.py", "artifact", "tokenizer", "data"])
def test_a_missing_file_leaves_all_rules_unchecked_and_is_named(field, tmp_path, missing):
    record = write_record(tmp_path / "record", "honest/plain")
    places = [record, field.artifact, field.data, field.tokenizer]
    if missing == "train_gpt.py":
        (record / missing).unlink()
    else:
        places[["", "artifact", "data", "tokenizer"].index(missing)] = tmp_path / missing
    found = check(*places, PLAN, 1)
    assert {verdict.state for verdict in found} == {"NOT CHECKED"}
    assert missing in found[0].evidence


def test_the_cost_is_told_before_the_first_start(field, tmp_path, capsys, monkeypatch):
    record = write_record(tmp_path / "record", "honest/plain")
    told = []

    def score(*_):
        told.append(capsys.readouterr().err)
        return script.Result(1.0, "stop here")

    monkeypatch.setattr(script.Script, "score", score)
    found = check(record, field.artifact, field.data, field.tokenizer, PLAN, 7)
    assert len(told) == 1
    assert "seed 7" in told[0]
    assert "at most 9 starts" in told[0]
    assert found[0].state == "FAIL"


# ------------------------------------ bytes ------------------------------------


def test_bytes_of_documents_are_those_of_their_text(field):
    counter = streams.ByteCounter(field.tokenizer)
    for text, ids in zip(field.texts, field.documents, strict=True):
        assert counter.count(ids) == len(text.encode())


def test_bytes_of_a_stream_that_starts_inside_a_word_leave_out_its_first_token(field):
    counter, ids = streams.ByteCounter(field.tokenizer), field.documents[3][1:]
    first = len(field.sp.decode(ids[:1].tolist()).encode())
    assert counter.count(ids) == len(field.texts[3].encode()) - first


IDS = st.sampled_from([BOS, 2, 3]) | st.integers(0, VOCABULARY - 1)


@hypothesis.given(st.lists(IDS, max_size=60))
def test_bytes_of_any_tokens_are_by_the_definition(field, ids):
    sp, size = field.sp, 0
    for previous, i in itertools.pairwise(ids):
        piece = sp.id_to_piece(i)
        if sp.is_control(i) or sp.is_unknown(i):
            continue
        size += 1 if sp.is_byte(i) else len(piece.removeprefix("▁").replace("▁", " ").encode())
        size += piece.startswith("▁") and not (sp.is_control(previous) or sp.is_unknown(previous))
    assert streams.ByteCounter(field.tokenizer).count(np.array(ids, np.uint16)) == size


def test_ids_beyond_the_vocabulary_are_refused(field):
    with pytest.raises(ValueError, match="340"):
        streams.ByteCounter(field.tokenizer).count(np.array([1, VOCABULARY]))


def test_byte_level_vocabularies_count_a_byte_a_token(tmp_path):
    layout = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": 4}
    path = tmp_path / "bytes.json"
    path.write_text(json.dumps({"config": {**layout, "byte_count": 256}}))
    ids = np.array([1, *("naïve".encode()[i] + 4 for i in range(6)), 1, 100])
    assert streams.ByteCounter(path).count(ids) == 7


# ------------------------------------ shards ------------------------------------


def test_validation_tokens_are_read_in_order_without_sidecars(field, tmp_path):
    for path in field.data.glob("*.bin"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "fineweb_val_bytes_000000.bin").write_bytes(shard_bytes([1, 2]))
    assert streams.read_validation(tmp_path, 10**9).tolist() == field.val.tolist()
    assert streams.read_validation(tmp_path, 77).tolist() == field.val[:77].tolist()


@pytest.mark.parametrize("damage", ["cut", "longer", "magic", "empty"])
def test_damaged_shards_are_named(tmp_path, damage):
    whole = shard_bytes([1, 2, 3], magic=7 if damage == "magic" else 20240520)
    changed = {"cut": whole[:-1], "longer": whole + b"\0\0", "empty": b""}.get(damage, whole)
    (tmp_path / "fineweb_val_000000.bin").write_bytes(changed)
    with pytest.raises(ValueError, match="not a whole token shard"):
        streams.read_validation(tmp_path, 10)


def test_written_shards_are_of_the_published_format(tmp_path):
    streams.write_shard(tmp_path / "a", np.array([1, 65535, 0]))
    assert (tmp_path / "a").read_bytes() == shard_bytes([1, 65535, 0])


# ------------------------------------ what is tried ------------------------------------


def writer_of(field: Field, seed: int) -> dynamic_rules.Writer:
    """The auditor's writer, on the field's data."""
    return dynamic_rules.Writer(field.val, VOCABULARY, BOS, seed)


@pytest.mark.parametrize("seed", range(3))
def test_every_position_of_the_dense_streams_is_replaced_from(field, seed):
    suite = dynamic_rules.build_causal(writer_of(field, seed), PLAN, field.val[: PLAN.plain])
    tried = {}
    for v in suite.variants:
        base, new = suite.streams[v.base].tolist(), suite.streams[v.stream].tolist()
        assert base[: v.shared] == new[: v.shared]
        assert base[v.shared : v.shared + 1] != new[v.shared : v.shared + 1]
        if len(base) == PLAN.dense:
            tried.setdefault(v.base, set()).add(v.shared)
    everywhere = set(range(2, PLAN.dense + 1))
    assert [everywhere - places for places in tried.values()] == [set()] * PLAN.dense_bases


@pytest.mark.parametrize("seed", range(3))
def test_streams_for_sums_differ_in_one_id_alone_and_hold_each(field, seed):
    suite = dynamic_rules.build_positions(writer_of(field, seed), lambda *_: True)
    assert len(suite.positions) == 9
    for p in suite.positions:
        streams_there = suite.streams[p.first : p.first + VOCABULARY]
        assert [int(s[p.t]) for s in streams_there] == list(range(VOCABULARY))
        assert len({s[: p.t].tobytes() for s in streams_there}) == 1
        assert {len(s) > p.t + 1 for s in streams_there} == {p.followed}


def test_scaled_plans_cost_less_and_never_more(field):
    for share in (0.9, 0.5, 0.1, 0.01):
        plan = Plan().scaled(share)
        assert plan.causal_tokens <= max(1.3 * share, 0.06) * Plan().causal_tokens


def test_all_positions_fit_within_the_tokens_that_were_allowed(field):
    suite = dynamic_rules.build_positions(writer_of(field, 1), lambda t, s: t < 40_000 and s < 999)
    assert 0 < suite.tokens < 40_000
    assert 0 < len(suite.streams) < 999
