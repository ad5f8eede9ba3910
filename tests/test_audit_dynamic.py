"""records/dynamic_rules/: planted cheats are caught by the rule that they break, and by no other;
honest scripts pass every rule."""

import functools
import itertools
import json
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import (
    BOS,
    CASE_MARKS,
    ESCAPE,
    NEXT,
    REPO,
    TITLE,
    compose_documents,
    run_cli,
    shard_bytes,
    small_letters,
    tiny_settings,
    train_tokenizer,
)
from field import SPEAKERS, VOCABULARY, Field, Spoken, can_isolate, write_record

sys.path.insert(0, str(REPO / "records"))

import dynamic_rules
import script
import streams
from dynamic_rules import RULES, Plan, causality, sums
from dynamic_rules.writer import Suite, Writer

HONEST = sorted(path.stem for path in (SPEAKERS / "honest").glob("*.py"))
CHEATS = sorted(path.stem for path in (SPEAKERS / "cheats").glob("*.py"))
ISOLATED = can_isolate()  # where it is not allowed, the rules are tried nevertheless
check = functools.partial(dynamic_rules.check, isolated=ISOLATED)
UNCHECKED = dict.fromkeys(("claim", "paid_prefix"), "NOT CHECKED")
# Tokens, not the time, end these audits: they try the same on every machine.
PLAN = Plan(least=1000, plain=1300, dense=60, stream_tokens=30_000, fine=1.0)
TRAINER = Plan(least=1000, plain=700, dense=24, stream_tokens=8_000, fine=1.0)


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Field:
    return Field(tmp_path_factory.mktemp("field"))


def audit(field: Field, folder: Path, seed: int = 1, plan: Plan = PLAN) -> dict[str, str]:
    """The states of all rules, with their evidence where they fail."""
    found = check(folder, field.artifact, field.data, field.tokenizer, plan, seed)
    assert [verdict.rule for verdict in found] == list(RULES)
    print(*found, sep="\n")
    return {verdict.rule: verdict.state for verdict in found}


@pytest.fixture
def spoken(monkeypatch) -> None:
    """Scripts run in this process."""
    monkeypatch.setattr(dynamic_rules, "Script", Spoken)


@pytest.mark.parametrize("name", HONEST)
def test_honest_scripts_pass_every_rule(field, tmp_path, spoken, name):
    states = audit(field, write_record(tmp_path / "record", f"honest/{name}"))
    assert states == dict.fromkeys(RULES, "PASS") | UNCHECKED


def rule_of(name: str) -> str:
    """The rule that a cheat breaks, by the beginning of its name."""
    return next(rule for rule in RULES if name.startswith(rule))


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_are_caught_by_the_rule_that_they_break_and_by_no_other(
    field, tmp_path, spoken, name
):
    if name == "claim_answers":
        pytest.skip("has a test of its own")
    places = {"MEMORY.npy": tmp_path / "memory.npy"}
    record = write_record(tmp_path / "record", f"cheats/{name}", **places)
    states = audit(field, record)
    assert [rule for rule in RULES if states[rule] == "FAIL"] == [rule_of(name)]


@pytest.mark.parametrize("name", ["honest/documents", "cheats/normalization_some"])
def test_scripts_in_processes_of_their_own_are_judged_alike(field, tmp_path, name):
    states = audit(field, write_record(tmp_path / "record", name))
    failed = [rule for rule in RULES if states[rule] == "FAIL"]
    assert failed == (["normalization"] if "some" in name else [])
    assert states["isolation"] == ("PASS" if ISOLATED else "WARN")


@pytest.fixture(scope="module")
def other_bos(tmp_path_factory) -> Field:
    """A field whose tokenizer has BOS at 3, and at 1 an id that no text holds."""
    return Field(tmp_path_factory.mktemp("other_bos"), bos_id=3, unk_id=1)


@pytest.mark.parametrize("speaker", ["honest/documents", "cheats/causality_next_document"])
def test_documents_begin_with_the_bos_of_the_tokenizer(other_bos, tmp_path, spoken, speaker):
    record = write_record(tmp_path / "record", speaker, **{"BOS = 1": "BOS = 3"})
    states = audit(other_bos, record, plan=PLAN)
    failed = [rule for rule in RULES if states[rule] == "FAIL"]
    assert failed == (["causality"] if "next_document" in speaker else [])


def test_the_sums_after_bos_are_those_of_the_tokenizers_bos(other_bos):
    writer = Writer(other_bos.val, VOCABULARY, 3, 1)
    suite = sums.build_positions(writer, lambda *_: True)
    for place in suite.positions:
        if place.what in ("after BOS", "at a border"):
            assert suite.streams[place.first][place.t - 1] == 3


def test_without_a_bos_borders_are_left_out_and_the_evidence_says_so(tmp_path, spoken):
    field = Field(tmp_path, bos_id=-1)
    record = write_record(tmp_path / "record", "honest/plain")
    found = check(record, field.artifact, field.data, field.tokenizer, PLAN, 1)
    states = {verdict.rule: verdict.state for verdict in found}
    assert states == dict.fromkeys(RULES, "PASS") | UNCHECKED
    evidence = {verdict.rule: verdict.evidence for verdict in found}
    assert "no BOS" in evidence.pop("runs")
    assert "BOS" not in " ".join(evidence.values())


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
    trained = run_cli(env, copy_to=record, beside=["frontier.py"])
    assert trained.rc == 0, trained.stderr
    kept = {n: v for n, v in env.items() if n not in ("DATA_PATH", "TOKENIZER_PATH", "OUT_DIR")}
    (record / "config.env").write_text("".join(f"{n}={v}\n" for n, v in kept.items()))
    artifact = record / "tiny" / "final_model.artifact"
    found = check(record, artifact, dataset.folder, dataset.tokenizer, TRAINER, 1)
    states = {verdict.rule: verdict.state for verdict in found}
    expected = {"isolation": "PASS" if ISOLATED else "WARN", "paid_prefix": "NOT CHECKED"}
    assert states == dict.fromkeys(RULES, "PASS") | expected


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


QUICK = Plan(least=1000, plain=600, dense=24, stream_tokens=9_000, fine=1.0)


@pytest.mark.parametrize(("documents", "state"), [(6, "PASS"), (20, "PASS"), (20, "FAIL")])
def test_a_claim_on_these_data_must_come_out_again(field, tmp_path, spoken, documents, state):
    record, count = write_record(tmp_path / "record", "honest/plain"), whole(field, documents)
    size, bpb = honest_bpb(field, count)
    assert size == sum(len(text.encode()) for text in field.texts[:documents])
    write_log(record, count, size, bpb - 0.002 * (state == "FAIL"))
    assert audit(field, record, plan=QUICK)["claim"] == state


def test_a_claim_on_other_data_is_not_checked(field, tmp_path, spoken):
    record = write_record(tmp_path / "record", "honest/plain")
    size, bpb = honest_bpb(field, whole(field, 6))
    write_log(record, whole(field, 6), size + 1, bpb)
    assert audit(field, record, plan=QUICK)["claim"] == "NOT CHECKED"


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
    assert "1000 to 1000 s" in told[0]
    assert {verdict.rule: verdict.state for verdict in found}["runs"] == "FAIL"


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


def test_bytes_of_case_ops_text_are_those_of_the_original(tmp_path):
    texts = [*compose_documents(60), f"a {TITLE}B {ESCAPE}{ESCAPE}{NEXT}c DeF GHI"]
    model = train_tokenizer(
        tmp_path / "case.model",
        map(small_letters, texts),
        400,
        user_defined_symbols=list(CASE_MARKS),
    )
    counter, sp = streams.ByteCounter(model), streams.spm.SentencePieceProcessor(str(model))
    ids = [[BOS, *sp.encode(small_letters(text))] for text in texts]
    for text, part in zip(texts, ids, strict=True):
        assert counter.count(np.array(part)) == len(text.encode())
    whole = np.concatenate(ids)
    assert counter.count(whole) == sum(len(text.encode()) for text in texts)


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


def test_written_shards_are_of_the_published_format():
    assert streams.shard(np.array([1, 65535, 0])) == shard_bytes([1, 65535, 0])


def test_a_real_evaluation_has_as_many_shards_as_the_data(field, tmp_path, monkeypatch):
    seen = []

    class Counting(Spoken):
        def score(self, parts, apart, seconds, sizes=None):
            seen.append((apart, len(parts)))
            return super().score(parts, apart, seconds, sizes)

    monkeypatch.setattr(dynamic_rules, "Script", Counting)
    audit(field, write_record(tmp_path / "record", "honest/plain"), plan=QUICK)
    assert {count for apart, count in seen if not apart} == {2}


# ------------------------------------ what is tried ------------------------------------


def writer_of(field: Field, seed: int) -> Writer:
    """The auditor's writer, on the field's data."""
    return Writer(field.val, VOCABULARY, BOS, seed)


@pytest.mark.parametrize("seed", range(3))
def test_every_position_of_the_short_streams_is_replaced_from(field, seed):
    suite = Suite()
    causality.add_short(suite, writer_of(field, seed), PLAN, 30_000)
    tried: dict[int, set[int]] = {}
    for v in suite.variants:
        base, new = suite.streams[v.base].tolist(), suite.streams[v.stream].tolist()
        assert base[: v.shared] == new[: v.shared]
        assert base[v.shared : v.shared + 1] != new[v.shared : v.shared + 1]
        tried.setdefault(v.base, set()).add(v.shared)
    lengths = {base: len(suite.streams[base]) for base in tried}
    assert set(lengths.values()) == {PLAN.dense, causality.SHORTEST}
    assert all(places == set(range(2, lengths[base] + 1)) for base, places in tried.items())


@pytest.mark.parametrize("budget", [3_000, 20_000, 200_000])
def test_streams_for_causality_keep_to_their_budget(field, budget):
    suite, writer = Suite(), writer_of(field, 1)
    causality.add_short(suite, writer, PLAN, budget)
    short = suite.tokens
    assert 0.5 * budget < short < 1.2 * budget + 3_000
    causality.add_long(suite, writer, budget)
    assert suite.tokens - short < 1.2 * budget + 13_000


@pytest.mark.parametrize("seed", range(3))
def test_streams_for_sums_differ_in_one_id_alone_and_hold_each(field, seed):
    suite = sums.build_positions(writer_of(field, seed), lambda *_: True)
    assert len(suite.positions) == 11
    for p in suite.positions:
        streams_there = suite.streams[p.first : p.first + VOCABULARY]
        assert [int(s[p.t]) for s in streams_there] == list(range(VOCABULARY))
        assert len({s[: p.t].tobytes() for s in streams_there}) == 1
        assert {len(s) > p.t + 1 for s in streams_there} == {p.followed}


def test_all_positions_fit_within_the_tokens_that_were_allowed(field):
    suite = sums.build_positions(writer_of(field, 1), lambda t, s: t < 40_000 and s < 999)
    assert 0 < suite.tokens < 40_000
    assert 0 < len(suite.streams) < 999
