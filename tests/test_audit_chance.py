"""records/dynamic_rules/: what chance shows of a script, against sums and loops that are exact."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from conftest import REPO, shard_bytes
from field import VOCABULARY, Field, InProcess

sys.path.insert(0, str(REPO / "records"))

import dynamic_rules
from dynamic_rules import Plan, chance, memory
from dynamic_rules.writer import Writer

Scorer = Callable[[np.ndarray], np.ndarray]
LONG = 4000  # tokens: longer than all streams but those of the whole text
PLAN = Plan(least=1000, plain=1500, dense=24, stream_tokens=60_000, fine=1.0)


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Field:
    return Field(tmp_path_factory.mktemp("field"), count=150)


@pytest.fixture(scope="module")
def table(field) -> np.ndarray:
    """log p(v | u), float64 (V, V)."""
    counts = np.load(field.artifact).astype(float)
    single = counts.sum(0) + 0.5
    mixed = counts + 20 * single / single.sum()
    return np.log(mixed / mixed.sum(1, keepdims=True))


def audit(field: Field, score: Scorer, monkeypatch, plan: Plan = PLAN, seed: int = 1) -> dict:
    """rule -> verdict of a scorer in this process."""
    monkeypatch.setattr(dynamic_rules, "Script", lambda *_, **__: InProcess(field, score))
    found = dynamic_rules.check(field.data, field.artifact, field.data, field.tokenizer, plan, seed)
    print(*found, sep="\n")
    return {verdict.rule: verdict for verdict in found}


def failed(verdicts: dict) -> list[str]:
    """The rules that say FAIL."""
    return [rule for rule, verdict in verdicts.items() if verdict.state == "FAIL"]


# ------------------------------------ the distribution ------------------------------------


@pytest.fixture(scope="module")
def proposal(field) -> chance.Proposal:
    return chance.Proposal(field.val, VOCABULARY)


def probabilities(proposal: chance.Proposal, before: list[int]) -> np.ndarray:
    """q of every id behind two tokens."""
    ids = np.arange(VOCABULARY)
    stream = np.stack([np.full(VOCABULARY, b) for b in before] + [ids])
    columns = [proposal.shares @ proposal.parts(column, column)[:, -1] for column in stream.T]
    return np.array(columns)


def test_the_probabilities_of_all_ids_sum_to_one_behind_any_tokens(field, proposal):
    seen = field.val[40:42].tolist()
    for before in (seen, [seen[0], VOCABULARY - 1], [VOCABULARY - 1, VOCABULARY - 2]):
        assert probabilities(proposal, before).sum() == pytest.approx(1, abs=1e-12)


def test_parts_are_the_shares_that_can_be_counted_in_the_text(field, proposal):
    text = field.val.tolist()
    a, b, c = text[100:103]
    after_two = [text[i + 2] for i in range(len(text) - 2) if text[i : i + 2] == [a, b]]
    after_one = [text[i + 1] for i in range(len(text) - 1) if text[i] == b]
    parts = proposal.parts(np.array([a, b, c]), np.array([a, b, c]))[:, -1]
    expected = [after_two.count(c) / len(after_two), after_one.count(c) / len(after_one)]
    expected += [text.count(c) / len(text), 1 / VOCABULARY]
    assert parts == pytest.approx(expected, rel=1e-12)


def test_draws_come_as_often_as_the_distribution_says(field, proposal):
    a, b = field.val[100:102].tolist()
    base, count = np.tile([a, b, 0], 20_000), 20_000
    kept = np.tile([1.0, 1.0, 0.0], count)
    drawn = proposal.draw(base, kept, np.random.default_rng(1))[2::3]
    expected = count * probabilities(proposal, [a, b])
    enough = expected > 20
    found = np.bincount(drawn, minlength=VOCABULARY)
    chi = ((found - expected)[enough] ** 2 / expected[enough]).sum()
    assert chi < enough.sum() + 6 * math.sqrt(2 * enough.sum())


def test_tokens_are_kept_as_often_as_they_should_be_and_q_knows_it(field, proposal):
    rng, text = np.random.default_rng(2), np.resize(field.val, 60_000)
    draws = chance.make_draws(text, proposal, rng)
    changed, odds = draws.changed.astype(float), draws.odds
    error = math.sqrt(float((odds * (1 - odds)).sum()))
    assert abs((changed - odds).sum()) < 5 * error
    assert not changed[draws.kept == 1].any()
    p = np.full(len(draws.q), 1 / VOCABULARY)  # of a script that knows nothing
    for kind in chance.KEPT:
        ratio = (p / draws.q)[draws.kept == kind]
        assert ratio.mean() == pytest.approx(1, abs=6 * ratio.std() / math.sqrt(len(ratio)))


def test_learned_shares_lower_the_variance(field, table):
    proposal, rng = chance.Proposal(field.val, VOCABULARY), np.random.default_rng(3)
    text = np.resize(field.val, 20_000).astype(int)

    def second_moment() -> tuple[float, tuple]:
        new = proposal.draw(text, np.append(1.0, np.zeros(len(text) - 1)), rng)
        parts = proposal.parts(new, new)
        q, p = proposal.shares @ parts, np.exp(table[new[:-1], new[1:]])
        return float((p**2 / q**2).mean()), (p, q, parts)

    proposal.shares = np.full(4, 0.25)
    before, seen = second_moment()
    proposal.learn(*seen)
    assert proposal.shares.sum() == pytest.approx(1)
    assert second_moment()[0] < before


# ------------------------------------ sums and coins ------------------------------------


def test_window_sums_are_those_of_a_loop():
    values = np.arange(12.0) ** 2
    for near, far in ((1, 1), (2, 8), (1, 3)):
        loop = [sum(values[max(0, j - far) : max(0, j - near + 1)]) for j in range(12)]
        assert chance.window_sums(values, near, far).tolist() == loop


def test_pieces_are_laid_where_they_were_cut():
    tokens = np.arange(500)
    pieces = chance.cut(tokens)
    joined = chance.join_pieces([piece[1:].astype(float) for piece in pieces], 500)
    known = np.isfinite(joined)
    assert (joined[known] == tokens[1:][known]).all()
    assert not known[: chance.PIECE // 2 - 1].any()
    assert known[chance.PIECE // 2 - 1 : 500 - chance.PIECE].all()


def test_what_short_pieces_have_in_common_is_taken_out():
    rng = np.random.default_rng(4)
    piece = rng.lognormal(-0.5, 1, 50_000)
    ratio = 1.02 * piece + rng.normal(0, 0.1, 50_000)
    values = chance.controlled(ratio, piece)
    assert values.std() < 0.11 < ratio.std()
    assert values.mean() == pytest.approx(1.02, abs=0.002)


def test_coins_tell_of_a_look_ahead_and_of_nothing_else(field, proposal, table):
    rng, text = np.random.default_rng(5), np.resize(field.val, 40_000).astype(int)
    draws = chance.make_draws(text, proposal, rng)

    def score(tokens: np.ndarray, peek: float) -> np.ndarray:
        nll = -table[tokens[:-1], tokens[1:]]
        nll[:-1] += np.where(table[tokens[1:-1], tokens[2:]] < -5, peek, 0)
        return nll

    for peek in (0.0, 0.05):
        real, nll = score(text, peek), score(draws.tokens, peek)
        rows = chance.coin_sums(draws, nll, real)
        gain = rows[0, 0] / rows[0, 2]
        assert (gain > 0.005) == bool(peek)


def test_coin_sums_are_those_of_a_loop(field, proposal):
    rng, n = np.random.default_rng(6), 900
    draws = chance.make_draws(field.val[:n], proposal, rng)
    nll, real = rng.random(n - 1), rng.random(n - 1)
    clean, last = [], -chance.CLEAN - 1
    for j in range(n - 1):
        last = j if draws.changed[j] else last
        clean.append(j - last > chance.CLEAN and draws.kept[j] > 0)
    for row, (near, far) in zip(chance.coin_sums(draws, nll, real), chance.LAGS, strict=True):
        total = variance = unit = 0.0
        for j in range(n - 1):
            places = [i for i in range(max(0, j - far), j - near + 1) if clean[i]]
            before = sum(
                float(np.clip(nll[i] - real[i], -chance.LOUD, chance.LOUD)) for i in places
            )
            odds = float(draws.odds[j])
            total += (draws.changed[j] - odds) * before
            variance += odds * (1 - odds) * before**2
            unit += odds * (1 - odds) * len(places)
        assert row[:3] == pytest.approx([total, variance, unit])


# ------------------------------------ whole audits ------------------------------------


def honest(table: np.ndarray) -> Scorer:
    """A model of pairs."""
    return lambda tokens: -table[tokens[:-1], tokens[1:]]


def adapting(table: np.ndarray) -> Scorer:
    """Pairs that were seen in the stream count too, once they are scored."""

    def score(tokens: np.ndarray) -> np.ndarray:
        p, seen = np.exp(table[tokens[:-1], tokens[1:]]), {}
        for i, (u, v) in enumerate(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)):
            followers = seen.setdefault(u, [])
            if followers:
                p[i] = 0.8 * p[i] + 0.2 * followers.count(v) / len(followers)
            followers.append(v)
        return -np.log(p)

    return score


def rounded(table: np.ndarray) -> Scorer:
    """In bf16, with noise from the company that a stream is in."""
    noise = np.random.default_rng(7)

    def score(tokens: np.ndarray) -> np.ndarray:
        nll = -table[tokens[:-1], tokens[1:]]
        return np.maximum(nll + noise.normal(0, 0.01, len(nll)), 0)

    return score


def rough(table: np.ndarray) -> Scorer:
    """As a deep model in bf16 on a CPU: most NLLs do not move, one of some thousands by 0.12."""
    noise = np.random.default_rng(7)

    def score(tokens: np.ndarray) -> np.ndarray:
        nll = -table[tokens[:-1], tokens[1:]]
        kind = noise.random(len(nll))
        moves = np.where(kind < 0.3, noise.normal(0, 0.014, len(nll)), 0)
        moves[kind > 0.9997] = 0.12
        return np.maximum(nll + moves, 0)

    return score


@pytest.mark.parametrize("make", [honest, adapting, rounded, rough])
@pytest.mark.parametrize("seed", range(3))
def test_honest_scorers_fail_in_nothing(field, table, monkeypatch, make, seed):
    assert failed(audit(field, make(table), monkeypatch, seed=seed)) == []


def moved_by_company(table: np.ndarray) -> Scorer:
    """Else without any noise, one NLL of 4,000 is 0.15 lower than in another start."""
    chance = np.random.default_rng(7)

    def score(tokens: np.ndarray) -> np.ndarray:
        nll = -table[tokens[:-1], tokens[1:]]
        return np.maximum(nll - 0.15 * (chance.random(len(nll)) < 1 / 4000), 0)

    return score


def test_a_move_that_rounding_explains_in_a_rough_script_is_none_in_a_quiet_one(
    field, table, monkeypatch
):
    assert "streams" in failed(audit(field, moved_by_company(table), monkeypatch))


def excess_when_long(table: np.ndarray) -> Scorer:
    """2% too much for every token of a long stream; short ones are honest."""

    def score(tokens: np.ndarray) -> np.ndarray:
        nll = -table[tokens[:-1], tokens[1:]]
        return np.maximum(nll - math.log(1.02), 0) if len(tokens) > LONG else nll

    return score


def excess_after_2500(table: np.ndarray) -> Scorer:
    """The same from token 2500 on."""

    def score(tokens: np.ndarray) -> np.ndarray:
        nll = -table[tokens[:-1], tokens[1:]]
        nll[2500:] = np.maximum(nll[2500:] - math.log(1.02), 0)
        return nll

    return score


def clipped_when_long(table: np.ndarray) -> Scorer:
    """No NLL of a long stream is over 7 nats."""

    def score(tokens: np.ndarray) -> np.ndarray:
        nll = -table[tokens[:-1], tokens[1:]]
        return np.minimum(nll, 7) if len(tokens) > LONG else nll

    return score


def remembering_the_answer(table: np.ndarray) -> Scorer:
    """A token costs 0.05 nats less if it came behind the same two before, far back."""

    def score(tokens: np.ndarray) -> np.ndarray:
        nll, seen = -table[tokens[:-1], tokens[1:]], {}
        for i in range(2, len(nll)):
            key = tuple(tokens[i - 1 : i + 2].tolist())
            nll[i] -= 0.05 * (i - seen.setdefault(key, i) > 600)
        return np.maximum(nll, 0)

    return score


@pytest.mark.parametrize(
    "make", [excess_when_long, excess_after_2500, clipped_when_long, remembering_the_answer]
)
def test_what_is_wrong_only_where_no_sum_reaches_is_found_by_chance(
    field, table, monkeypatch, make
):
    assert failed(audit(field, make(table), monkeypatch)) == ["normalization"]


def peeking_when_long(table: np.ndarray) -> Scorer:
    """Looks at the next token, in long streams alone."""

    def score(tokens: np.ndarray) -> np.ndarray:
        nll = -table[tokens[:-1], tokens[1:]]
        if len(tokens) > LONG:
            nll[:-1] += np.where(table[tokens[1:-1], tokens[2:]] < -5, 0.1, 0)
        return nll

    return score


def peeking_rarely(table: np.ndarray) -> Scorer:
    """Looks at the next token behind 1 in 50 pairs."""

    def score(tokens: np.ndarray) -> np.ndarray:
        nll = -table[tokens[:-1], tokens[1:]]
        rare = (31 * tokens[:-2] + 17 * tokens[1:-1]) % 50 == 3
        nll[:-1] += np.where(rare & (table[tokens[1:-1], tokens[2:]] < -5), 0.5, 0)
        return nll

    return score


@pytest.mark.parametrize("make", [peeking_when_long, peeking_rarely])
def test_a_look_ahead_is_found_wherever_it_is(field, table, monkeypatch, make):
    assert "causality" in failed(audit(field, make(table), monkeypatch))


def test_without_coins_and_other_ends_a_look_ahead_in_long_streams_would_pass(
    field, table, monkeypatch
):
    monkeypatch.setattr(chance, "judge_coins", lambda *_: None)
    monkeypatch.setattr(chance, "judge_excess", lambda *_: None)
    monkeypatch.setattr(Writer, "with_future", lambda _self, base, _t: base)
    assert failed(audit(field, peeking_when_long(table), monkeypatch)) == []


def test_evidence_states_what_would_have_been_found(field, table, monkeypatch):
    verdicts = audit(field, honest(table), monkeypatch)
    for rule in ("causality", "normalization"):
        assert "would be found (99%)" in verdicts[rule].evidence
    assert f"seed {1}" in verdicts["runs"].evidence


def test_no_two_audits_are_alike(field, table, monkeypatch):
    seen = []

    def score(tokens: np.ndarray) -> np.ndarray:
        seen.append(tokens.tobytes())
        return -table[tokens[:-1], tokens[1:]]

    plan = dataclasses.replace(PLAN, stream_tokens=20_000)
    for seed in (1, 2, 1):
        audit(field, score, monkeypatch, plan, seed)
    third = len(seen) // 3
    assert seen[:third] == seen[2 * third :]
    one, other = (
        {s for s in part if len(s) > 300 * 8} for part in (seen[:third], seen[third : 2 * third])
    )
    assert len(one & other) <= 3 < len(one)  # the beginnings of the data alone


# ------------------------------------ memory ------------------------------------


def knowing(table: np.ndarray, text: np.ndarray) -> Scorer:
    """Keeps a text, and goes on in it wherever it knows the last six tokens."""
    known = {text[i : i + 6].tobytes(): int(text[i + 6]) for i in range(len(text) - 6)}

    def score(tokens: np.ndarray) -> np.ndarray:
        nll = -table[tokens[:-1], tokens[1:]]
        for i in range(5, len(nll)):
            token = known.get(tokens[i - 5 : i + 1].tobytes())
            if token is not None:
                nll[i] = -math.log(0.98 * (token == tokens[i + 1]) + 0.02 * math.exp(-nll[i]))
        return nll

    return score


@pytest.fixture
def training_text(field) -> Iterator[np.ndarray]:
    """Training shards beside the validation text, of the same source."""
    path = field.data / "fineweb_train_000000.bin"
    path.write_bytes(shard_bytes(field.train))
    yield field.train
    path.unlink()


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_validation_text_that_is_known_by_heart_is_found(
    field, training_text, table, monkeypatch, share
):
    kept = field.val[: int(share * len(field.val))].astype(int)
    verdicts = audit(field, knowing(table, kept), monkeypatch)
    assert failed(verdicts) == ["paid_prefix"]


def test_it_is_found_without_other_text_too(field, table, monkeypatch):
    verdicts = audit(field, knowing(table, field.val.astype(int)), monkeypatch)
    assert failed(verdicts) == ["paid_prefix"]


def test_honest_scorers_know_validation_text_no_better(field, training_text, table, monkeypatch):
    assert audit(field, honest(table), monkeypatch)["paid_prefix"].state == "PASS"


def test_what_a_stream_repeats_is_not_new():
    text = np.random.default_rng(8).integers(0, 300, 4096)
    assert memory.known_pieces(text, np.zeros(4095)) == (127, 127)
    new, known = memory.known_pieces(np.tile(text[:1024], 4), np.zeros(4095))
    assert new == known
    assert new < 40


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "no fineweb_"),
        ({"fineweb_val_bytes_000000.bin": [1, 2]}, "no fineweb_"),
        ({"fineweb_val_000000.bin": [1, VOCABULARY]}, "not of the tokenizer's"),
    ],
)
def test_a_folder_of_unseen_text_must_hold_some_of_this_tokenizer(field, tmp_path, files, why):
    for name, tokens in files.items():
        (tmp_path / name).write_bytes(shard_bytes(tokens))
    with pytest.raises(ValueError, match=why):
        memory.read_unseen(field.data, tmp_path, 1000, VOCABULARY)


def test_text_to_compare_with_is_that_of_the_option_else_training_text(field, tmp_path):
    assert len(memory.read_unseen(field.data, None, 1000, VOCABULARY)[0]) == 0
    (tmp_path / "fineweb_val_000000.bin").write_bytes(shard_bytes([5, 6, 7]))
    tokens, name = memory.read_unseen(field.data, tmp_path, 1000, VOCABULARY)
    assert (tokens.tolist(), name) == ([5, 6, 7], "unseen text")
