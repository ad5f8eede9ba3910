"""Runs with all of frontier.py at once: any number of ranks, stages, what is interrupted, and what
is exported."""

import functools
import io
import re
from pathlib import Path

import pytest
import torch
from conftest import (
    BOS,
    events,
    load_weights,
    resolve,
    run_main,
    same_bits,
    tiny_settings,
    trainer_of,
)
from faults import await_all
from programs import loss_lines

import train_gpt as tg

STEPS = 10
# A step of 5 stages; a large epsilon: see SUMMED in test_run.py.
ALL = {
    "NUM_LAYERS": 4,
    "MODEL_DIM": 32,
    "TRAIN_SEQ_LEN": 32,
    "TRAIN_BATCH_TOKENS": 512,
    "BATCH_SCHEDULE": "256@0.2,384@0.6",
    "SEQ_LEN_SCHEDULE": "16@0.3",
    "LOOP_REPEATS": 2,
    "LOOP_FIRST": 1,
    "LOOP_LAST": 2,
    "LOOP_START": 0.4,
    "ITERATIONS": STEPS,
    "WARMDOWN_ITERS": 4,
    "WARMUP_STEPS": 1,
    "VAL_LOSS_EVERY": 3,
    "TRAIN_LOG_EVERY": 1,
    "VAL_TOKENS": 400,
    "VAL_BATCH_SIZE": 1024,
    "SAVE_EVERY": 1,
    "SAVE_TOTAL_LIMIT": 99,
    "ADAM_EPS": 1e-3,
    # model
    "SPARSE_ATTN_GATE": 12,
    "SMEAR_GATE": 2,
    "SKIPS": "mudd",
    "PARALLEL_LAST_N": 2,
    "RESID_MIX": 0,
    "CHANNEL_GAINS": 0,
    "WINDOW_PATTERN": "SSL",
    "WINDOW_TOKENS": 8,
    "MLP_ACT": "leaky_relu2",
    "XSA_LAST_N": 4,
    "LN_SCALE": 1,
    "ROPE_DIMS": 4,
    "ORTHO_INIT": 1,
    "BIGRAM_BUCKETS": 64,
    "BIGRAM_DIM": 16,
    # data and targets
    "TRAIN_DOC_ISOLATED": 1,
    "EVAL_DOC_ISOLATED": 1,
    "EVAL_STRIDE": 16,
    "DATA_SHUFFLE": 1,
    "MTP_TOKENS": 2,
    "PREFIX_WEIGHT": 0.25,
    # optimizers
    "MUON_ROW_NORM": 1,
    "MUON_COEFFICIENTS": "polar",
    "NORMUON_BETA2": 0.95,
    "CAUTIOUS_WD": 1,
    "MUON_WD": 0.002,  # one more weight that decays, by a rounding, is not noticed
    "EMBED_WD": 0.1,
    "ADAM_WD": 0.1,
    "EMA_NESTEROV": 0.5,
    "EMA_DECAY": 0.7,
    "EMA_BLEND": 0.6,
    "MUON_MOMENTUM_WARMDOWN_FRAC": 0.1,
    "EMBED_BETA2": 0.99,
    "SCALAR_BETA2": 0.98,
    "LR_SCHEDULE": "wsd",
    "LR_WARMUP_STEPS": 3,
    "FINAL_LR_FRAC": 0.1,
    "WD_SCHEDULE": "cosine",
    "GRAD_CLIP_NORM": 0.3,
}
PRIMED = 5  # stages, one after another
TOKENS = [0, 256, 512, 896, 1280, 1664, 2048, 2560, 3072, 3584, 4096]  # read before each step


def test_everything_is_on():
    """A new technique must come into ALL; some exclude others."""
    techniques = [name for name, f in tg.FIELDS.items() if f.metadata.get("file") == "frontier.py"]
    off = [n for n in techniques if n not in ALL or ALL[n] == tg.FIELDS[n].default]
    assert off == ["AUTO_LR_REDUCTION", "LR_WARMUP_RATIO", "ROPE_SCALING", "MATRIX_OPTIMIZER"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("frontier")


@pytest.fixture(scope="module")
def job(dataset, out):
    """The settings of a run of this file."""
    return functools.partial(tiny_settings, dataset, out)


@pytest.fixture(scope="module")
def start(server, job):
    """Run the script in so many processes, to its end; what rank 0 printed."""

    def go(name: str, nproc: int = 1, faults=(), rc: int = 0, **changed: object) -> str:
        env = job(RUN_ID=name, **ALL | changed)
        ranks = server.ranks(env, *([*faults] for _ in range(nproc)))
        await_all(ranks)
        assert [rank.returncode for rank in ranks] == [rc] * nproc, ranks[0].output
        return ranks[0].output

    return go


@pytest.fixture(scope="module")
def whole(start, out) -> Path:
    """The folder of a run of one process, with a checkpoint of each step."""
    (out / "printed.txt").write_text(start("whole"), encoding="utf-8")
    return out / "whole"


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoint_{step:07d}.pt"


def losses(folder: Path, kind: str) -> dict[int, float]:
    """The losses that a run reported, by step."""
    return {e["step"]: e[f"{kind}_loss"] for e in events(folder, kind)}


# ---- ranks


def assert_same_end(a: Path, b: Path) -> None:
    """Two runs must have the same losses and end on the same weights, up to rounding."""
    for kind in ("train", "val"):
        first = losses(a, kind)
        expected = {step: loss for step, loss in losses(b, kind).items() if step in first}
        assert first == pytest.approx(expected, abs=1e-5)
    first, second = load_weights(a), load_weights(b)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("nproc", [2, 3])
def test_ranks_end_where_one_process_ends(nproc, start, whole, out):
    """Three do not divide the sequences of a batch evenly."""
    start(f"ranks{nproc}", nproc, SAVE_EVERY=0)
    assert len(losses(out / f"ranks{nproc}", "train")) == STEPS
    assert_same_end(out / f"ranks{nproc}", whole)


def test_a_checkpoint_of_one_process_serves_two(start, whole, out):
    """In the middle of the stages, with all that the optimizers keep."""
    start("taken_over", 2, SAVE_EVERY=0, RESUME=checkpoint(whole, 5))
    assert [*losses(out / "taken_over", "train")] == [6, 7, 8, 9, 10]
    assert_same_end(out / "taken_over", whole)


# ---- interrupted


def test_a_killed_run_goes_on_to_the_same_bits(start, whole, out):
    """In its fourth step, the first one of full length: loops and larger batches come after it."""
    kill = {"at": "torch.Tensor.backward", "nth": PRIMED + 4, "do": "SIGKILL"}
    printed = start("killed", faults=[kill], rc=-9)
    assert "step:3/10 train_loss" in printed
    assert "step:4/10 train_loss" not in printed
    printed += start("killed", RESUME="auto")
    assert same_bits(out / "killed", whole)
    expected = (out / "printed.txt").read_text(encoding="utf-8")
    assert sorted(loss_lines(printed)) == sorted(loss_lines(expected))


@pytest.fixture(scope="module")
def resumed(start, whole, out) -> Path:
    """The folder of a run that goes on where the last stage begins; blocks loop already."""
    start("resumed", RESUME=checkpoint(whole, 6), SAVE_EVERY=0)
    return out / "resumed"


def test_a_resumed_run_ends_on_the_same_bits(resumed, whole):
    assert same_bits(resumed, whole)


@pytest.mark.parametrize("kind", ["train", "val"])
def test_a_resumed_run_has_the_losses_of_the_whole_one(kind, resumed, whole):
    """To the last bit; it validates once before its first step, with loops as the whole one."""
    found, expected = losses(resumed, kind), losses(whole, kind)
    assert found == {step: expected[step] for step in found}
    assert [*found] == ([7, 8, 9, 10] if kind == "train" else [6, 9, 10])


def saved(path: Path) -> dict:
    """What a checkpoint holds."""
    return torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)


def test_checkpoints_know_the_tokens_that_were_read(whole):
    found = [saved(checkpoint(whole, step))["tokens"] for step in range(1, STEPS + 1)]
    assert found == TOKENS[1:]


# ---- what is told


def test_all_steps_are_told(whole):
    assert [*losses(whole, "train")] == [*range(1, STEPS + 1)]
    assert [*losses(whole, "val")] == [0, 3, 6, 9, STEPS]


@pytest.mark.parametrize("name", ["whole", "resumed"])
def test_the_pace_is_of_the_tokens_that_were_read(name, request):
    """Whatever the batches were, and whoever has read them."""
    folder = request.getfixturevalue(name)
    told = events(folder, "train") + events(folder, "val")
    read = [event["tokens_per_second"] * event["train_time_ms"] / 1e3 for event in told]
    assert read == pytest.approx([TOKENS[event["step"]] for event in told])


def test_epochs_are_of_the_tokens_that_were_read(run, dataset):
    small = {"MODEL_DIM": 16, "NUM_LAYERS": 1, "VAL_TOKENS": 100, "VAL_BATCH_SIZE": 64}
    folder = run(**small, TRAIN_BATCH_TOKENS=8192, BATCH_SCHEDULE="4096@0.5", ITERATIONS=4)
    told = re.search(r"^epochs:(\S+)$", folder.with_suffix(".txt").read_text("utf-8"), re.M)
    assert float(told[1]) == pytest.approx((2 * 4096 + 2 * 8192) / len(dataset.train), abs=0.01)


# ---- what is exported and scored


def test_a_share_of_the_average_is_exported(whole):
    """w + 0.6·(e - w), of the weights and the average that the last checkpoint holds."""
    state = saved(checkpoint(whole, STEPS))["params"]
    exported = load_weights(whole)
    assert exported.keys() == state.keys()
    for name, kept in state.items():
        w, e = kept["weights"].double(), kept["average"].double()
        expected = w + 0.6 * (e - w)
        torch.testing.assert_close(exported[name].double(), expected, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(w, e, atol=1e-4), name


def scores(folder: Path, env: dict[str, str]) -> list[float]:
    """The validation loss of a run's raw weights, without loops and with them."""
    hp = tg.load_settings(env, check_places=False)
    run = tg.Run(hp)
    model = tg.build_model(hp)
    model.load_state_dict(load_weights(folder))
    val = tg.Validation(run)
    found = []
    for order in ([0, 1, 2, 3], [0, 1, 2, 1, 2, 1, 2, 3]):
        model.visits = order
        found.append(tg.score(model, val, run)[1]["val_loss"])
    return found


def test_the_looped_model_is_scored(whole, job):
    once, looped = scores(whole, job(**ALL))
    assert losses(whole, "val")[STEPS] == pytest.approx(looped, abs=1e-6)
    assert abs(once - looped) > 1e-3


def test_the_looped_model_is_scored_though_training_ends_before_loops(job, out):
    """It is not the one that was trained."""
    short = {"LOOP_START": 0.9, "ITERATIONS": 4, "VAL_LOSS_EVERY": 0, "SAVE_EVERY": 0}
    env = job(RUN_ID="short", **ALL | short)
    run_main(env)
    once, looped = scores(out / "short", env)
    assert losses(out / "short", "val")[4] == pytest.approx(looped, abs=1e-6)
    assert abs(once - looped) > 1e-3


def test_the_artifact_alone_gives_the_same_score(whole, job, out):
    env = job(RUN_ID="again", EVAL_ONLY=1, ARTIFACT=whole / "final_model.artifact")
    kept = {"DATA_PATH", "TOKENIZER_PATH", "OUT_DIR", "RUN_ID", "EVAL_ONLY", "ARTIFACT"}
    given = {name: text for name, text in env.items() if name in kept}
    run_main(given | {"DEVICE": "cpu", "DTYPE": "fp32", "VAL_TOKENS": "400"})
    (first,), (second,) = (events(folder, "final") for folder in (whole, out / "again"))
    assert second["val_loss"] == pytest.approx(first["val_loss"], abs=1e-6)
    assert second["val_bpb"] == pytest.approx(first["val_bpb"], abs=1e-6)
    assert second["code_bytes"] == first["code_bytes"]


# ---- what is learnt from


def longest_prefixes(sp) -> dict[int, int]:
    """Find each token's longest proper prefix among the tokens of text, trying all lengths."""
    others = (sp.is_control, sp.is_unknown, sp.is_unused, sp.is_byte)
    text = [i for i in range(len(sp)) if not any(is_other(i) for is_other in others)]
    pieces = {sp.id_to_piece(i).encode(): i for i in text}
    found = {}
    for piece, i in pieces.items():
        cuts = [piece[:size] for size in range(len(piece) - 1, 0, -1)]
        found[i] = next((pieces[part] for part in cuts if part in pieces), tg.IGNORE)
    return found


def more_targets(row: list[int], prefixes: dict[int, int]) -> list[list[int]]:
    """List a row's next tokens, those one and two further on in its document, and prefixes."""
    found = [row]
    for k in (1, 2):
        ends = (row[i : i + k + 1] for i in range(len(row)))
        inside = [len(end) == k + 1 and BOS not in end[1:] for end in ends]
        # A BOS as the next token is the end of what came before it.
        inside = [ok and row[i] != BOS for i, ok in enumerate(inside)]
        found.append([row[i + k] if ok else tg.IGNORE for i, ok in enumerate(inside)])
    return [*found, [prefixes.get(token, tg.IGNORE) for token in row]]


@pytest.mark.parametrize(
    ("step", "weights"),
    [
        (0, [1, 0.5, 0.25, 0.25]),
        (2, [1, 0.5, 0.25 * 0.4, 0.25]),
        (5, [1, 0.5 * 0.5, 0, 0.25 * 0.5]),
        (9, [1, 0, 0, 0]),
    ],
)
def test_a_step_tells_the_loss_that_it_learns_from(step, weights, job, dataset):
    """The mean over a batch of the weighted NLL of all targets; at last, of next tokens alone."""
    hp = resolve(job(**ALL))
    model = tg.build_model(hp)
    trainer = trainer_of(model, tg.Run(hp))
    before = {name: w.clone() for name, w in model.state_dict().items()}
    loss = trainer.step(step, 0.0).item()
    model.load_state_dict(before)
    prefixes = longest_prefixes(dataset.sp)
    total = 0.0
    with torch.no_grad():
        for inputs, targets, documents in trainer.batch:
            rows = [more_targets(row, prefixes) for row in targets.tolist()]
            for weight, labels in zip(weights, zip(*rows, strict=True), strict=True):
                nll = model(inputs, torch.tensor(labels), documents)
                total += weight * nll.double().sum().item()
    assert loss == pytest.approx(total / (TOKENS[step + 1] - TOKENS[step]), abs=1e-5)


def test_logits_are_those_of_the_prediction_with_everything_on(job):
    model = tg.build_model(resolve(job(**ALL)))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.1, 0.3)
    inputs = torch.randint(2, model.tok_emb.num_embeddings, (3, 20))
    inputs[:, 7] = model.bos
    targets = torch.randint(2, model.tok_emb.num_embeddings, (3, 20))
    with torch.no_grad():
        nll = model(inputs, targets)[:, -1]
        logits = model.logits(inputs)
    found = torch.nn.functional.cross_entropy(logits, targets[:, -1], reduction="none")
    torch.testing.assert_close(found, nll, atol=1e-5, rtol=0)


@pytest.mark.parametrize("values", [{}, {"DATA_SHUFFLE": 1}, {"TRAIN_DOC_ISOLATED": 1}], ids=str)
def test_batches_of_a_stage_continue_behind_the_tokens_read_before(values, job, dataset):
    small = {"MODEL_DIM": 16, "NUM_LAYERS": 1, "MICRO_BATCH_TOKENS": 128, "TRAIN_SEQ_LEN": 32}
    names = ("TRAIN_BATCH_TOKENS", "BATCH_SCHEDULE", "SEQ_LEN_SCHEDULE", "ITERATIONS")
    hp = resolve(job(**small, **{name: ALL[name] for name in names}), **values)
    trainer = trainer_of(tg.build_model(hp), tg.Run(hp))
    trainer.prime()
    inputs, targets, lengths = [], [], []
    for step in range(STEPS):
        trainer.step(step, 0.0)
        for x, y, documents in trainer.batch:
            inputs.append(x[y != tg.IGNORE])
            targets.append(y[y != tg.IGNORE])
            lengths.append(documents.longest if documents else x.size(1))
    expected = trainer.stream.read(0, TOKENS[-1] + 1).tolist()
    if not values.get("DATA_SHUFFLE"):
        assert expected == dataset.train[: TOKENS[-1] + 1].tolist()
    assert torch.cat(inputs).tolist() == expected[:-1]
    assert torch.cat(targets).tolist() == expected[1:]
    assert {*lengths[:2]} == {16}
    assert lengths[-1] == 32
