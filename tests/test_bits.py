"""The script computes what the frozen one computes, bit by bit, side by side on this machine.

Recorded digests would hold for one kind of processor, so both scripts run. Every setting that can
change a result is at a value other than its default in one of the cases at least.
"""

import functools
import json
import re
import runpy
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard
from conftest import at, events, load_weights, tiny_settings
from programs import SCRIPT, Program, Server, loss_lines

import train_gpt

FROZEN = SCRIPT.parent / "records/frozen/train_gpt.py"

# Wide enough for matrices that are stored as integers, and two passes a step.
SMALL = {
    **{"MODEL_DIM": 288, "TRAIN_SEQ_LEN": 32, "TRAIN_BATCH_TOKENS": 128, "MICRO_BATCH_TOKENS": 64},
    **{"ITERATIONS": 4, "WARMDOWN_ITERS": 3, "WARMUP_STEPS": 1, "MUON_MOMENTUM_WARMUP_STEPS": 3},
    **{"TRAIN_LOG_EVERY": 1, "VAL_LOSS_EVERY": 3, "VAL_TOKENS": 500},
    **{"ATTENTION": "sdpa"},  # beside the frozen script, there is no amx_attention
}
# The stack of the challenge's pull request 369.
STACK = {
    **{"NUM_LAYERS": 3, "MLP_MULT": 3, "XSA_LAST_N": 2, "SMEAR_GATE": 1, "ORTHO_INIT": 1},
    **{"BIGRAM_BUCKETS": 1024, "BIGRAM_DIM": 96, "ROPE_SCALING": "ntk", "EVAL_SEQ_LEN": 64},
    **{"EVAL_STRIDE": 16, "MATRIX_LR": 0.025, "SCALAR_LR": 0.025, "TIED_EMBED_LR": 0.035},
    **{"MUON_MOMENTUM": 0.99, "MUON_MOMENTUM_WARMUP_START": 0.92, "MUON_WD": 0.04},
    **{"ADAM_WD": 0.04, "EMBED_WD": 0.04, "GRAD_CLIP_NORM": 0.3, "EMA_DECAY": 0.8},
    **{"QUANT_BITS_MLP": 5, "QUANT_BITS_ATTN": 6, "QUANT_BITS_BIGRAM": 7},
}
UNTIED = {
    **{"TIE_EMBEDDINGS": 0, "EMBED_LR": 0.5, "HEAD_LR": 0.01, "MLP_ACT": "leaky_relu2"},
    **{"MLP_LEAKY_SLOPE": 0.3, "LOGIT_SOFTCAP": 15, "QK_GAIN_INIT": 1.2, "SEED": 7},
    **{"QUANT_CLIP": "sigma", "QUANT_SIGMA": 10, "QUANT_BITS_EMBED": 7, "COMPRESSOR": "rans"},
}
YARN = {
    **{"ROPE_SCALING": "yarn", "ROPE_BASE": 5000, "ROPE_DIMS": 16, "EVAL_SEQ_LEN": 64},
    **{"LN_SCALE": 1, "EVAL_DOC_ISOLATED": 1, "NUM_KV_HEADS": 1, "TIED_EMBED_INIT_STD": 0.02},
}
RATES = {
    **{"BETA1": 0.8, "BETA2": 0.9, "ADAM_EPS": 1e-6, "MUON_BACKEND_STEPS": 3},
    **{"WARMDOWN_FRAC": 0.5, "FINAL_LR_FRAC": 0.2, "ROPE_SCALING": "linear", "EVAL_SEQ_LEN": 48},
}
CASES = {
    "baseline": {},
    "bf16": {"DTYPE": "bf16"},
    "stack": STACK,
    "untied": UNTIED,
    "yarn": YARN,
    "rates": RATES,
    "documents": {
        **{"TRAIN_DOC_ISOLATED": 1, "DATA_SHUFFLE": 1, "EVAL_DOC_ISOLATED": 1, "EVAL_STRIDE": 8},
        **{"TRAIN_BATCH_TOKENS": 256},
    },
    "sigma": {"FIT_BUDGET": "sigma", "QUANT_CLIP": "sigma", "ARTIFACT_MAX_BYTES": 700_000},
}
STREAMS = {"SCORE_STREAMS": 1, "VAL_TOKENS": 0, "MICRO_BATCH_TOKENS": 128}
ELSEWHERE = {"EVAL_ONLY", "ARTIFACT"}  # settings that tests below change
BARE = (
    *("DATA_PATH", "TOKENIZER_PATH", "OUT_DIR", "RUN_ID", "DEVICE", "DTYPE", "COMPILE"),
    *("VAL_TOKENS", "VAL_BATCH_SIZE", "SAVE_NLL", "ATTENTION"),
)


@dataclass
class Job:
    """A run of one of the two scripts in a folder of its own."""

    folder: Path
    script: Path
    env: dict[str, str]

    def start(self, server: Server, *faults: dict) -> Program:
        return server.start(self.env, *faults, script=self.script)


def job(dataset, folder: Path, script: Path, **changed: object) -> Job:
    """A run with the small settings, but for those that are changed."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {"RUN_ID": "run", "SAVE_NLL": folder / "nll.npy"}
    if "ARTIFACT_MAX_BYTES" in changed:  # the code of the two is not of one size
        code = [script, script.with_name("quantizer.py")]
        changed["ARTIFACT_MAX_BYTES"] += sum(path.stat().st_size for path in code if path.exists())
    return Job(folder, script, tiny_settings(dataset, folder, **SMALL | own | changed))


@functools.cache
def frozen_names() -> dict[str, object]:
    """The names of the frozen script."""
    return runpy.run_path(str(FROZEN))


def new_settings() -> set[str]:
    """The settings that artifacts carry today, and did not when the script was frozen."""
    return set(train_gpt.MODEL_SETTINGS) - set(frozen_names()["MODEL_SETTINGS"])


def new_format() -> bool:
    """Whether artifacts have another format than when the script was frozen."""
    return frozen_names()["VERSION"] != train_gpt.VERSION


def restored(job: Job) -> dict[str, bytes]:
    """All weights of a run's artifact, as the script that made it reads them."""
    names = frozen_names() if job.script == FROZEN else vars(train_gpt)
    hp = names["load_settings"](job.env, check_places=False)
    _, weights = names["load_artifact"](job.folder / "run/final_model.artifact", hp)
    return {name: w.numpy().tobytes() for name, w in weights.items()}


def artifact_of(job: Job) -> tuple[dict, bytes, bytes | dict[str, bytes]]:
    """The header of a run's artifact without new settings, its floats, and its coded levels.

    Where the two scripts code levels by rANS in formats of their own, their weights.
    """
    content = (job.folder / "run/final_model.artifact").read_bytes()
    text_size, head_size = struct.unpack("<II", content[8:16])
    head = zstandard.ZstdDecompressor().stream_reader(content[48 : 48 + head_size]).read()
    header = json.loads(head[:text_size])
    for name in new_settings():
        header["settings"].pop(name, None)
    if header["settings"]["COMPRESSOR"] == "rans" and new_format():
        return header, head[text_size:], restored(job)
    return header, head[text_size:], content[48 + head_size :]


def told(job: Job, kinds: tuple[str, ...] = ("train", "val", "final")) -> list[str]:
    """The losses of a run's metrics in full precision, each step's once, without times and sizes
    of the code."""
    sizes = "" if new_settings() else "|artifact_bytes"
    keep = re.compile(f"event|step|.*loss|val_bpb{sizes}")
    lines = []
    for event in events(job.folder / "run"):
        if event["event"] in kinds:
            kept = {name: value for name, value in event.items() if keep.fullmatch(name)}
            lines.append(json.dumps(kept))
    return list(dict.fromkeys(lines))


def nll_of(job: Job) -> dict[str, bytes]:
    """The bytes of all files of NLL that a run has saved."""
    path = job.folder / "nll.npy"
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def assert_same_bits(ours: Job, frozen: Job, *printed: str) -> None:
    """Two runs must agree in all that they computed; `printed` is what they printed."""
    lines = [loss_lines(text) for text in printed]
    assert lines[0] == lines[1]
    assert told(ours) == told(frozen)
    weights = [load_weights(job.folder / "run") for job in (ours, frozen)]
    assert list(weights[0]) == list(weights[1])
    different = [
        name
        for name, tensor in weights[0].items()
        if tensor.numpy().tobytes() != weights[1][name].numpy().tobytes()
    ]
    assert different == []
    assert artifact_of(ours) == artifact_of(frozen)
    if not new_settings():
        contents = [next(job.folder.rglob("*.artifact")).read_bytes() for job in (ours, frozen)]
        assert contents[0] == contents[1]
    assert nll_of(ours) == nll_of(frozen)


def finish(*runs: Program) -> list[str]:
    """Wait for runs that must succeed; what they printed."""
    for run in runs:
        assert run.wait().returncode == 0, run.output
    return [run.output for run in runs]


def both(server: Server, dataset, out: Path, **changed: object) -> tuple[Job, Job, list[str]]:
    """Runs of our script and the frozen one, side by side, and what they printed."""
    ours = job(dataset, out / "ours", SCRIPT, **changed)
    frozen = job(dataset, out / "frozen", FROZEN, **changed)
    return ours, frozen, finish(ours.start(server), frozen.start(server))


@pytest.fixture(scope="module")
def stack(server, dataset, tmp_path_factory) -> tuple[Job, Job, list[str]]:
    """Runs of the whole stack."""
    return both(server, dataset, tmp_path_factory.mktemp("stack"), **STACK)


@pytest.mark.parametrize("case", [case for case in CASES if case != "stack"])
def test_a_run_has_the_bits_of_the_frozen_script(case, server, dataset, tmp_path):
    if "FIT_BUDGET" in CASES[case] and new_settings():
        pytest.skip("a longer header leaves less room for the weights")
    ours, frozen, printed = both(server, dataset, tmp_path, **CASES[case])
    assert_same_bits(ours, frozen, *printed)


def test_streams_have_the_bits_of_the_frozen_script(server, dataset, tmp_path):
    ours, frozen, printed = both(server, dataset, tmp_path, **STREAMS)
    assert_same_bits(ours, frozen, *printed)
    assert len(nll_of(frozen)) == 2


def test_the_stack_has_the_bits_of_the_frozen_script(stack):
    ours, frozen, printed = stack
    assert_same_bits(ours, frozen, *printed)


def test_the_script_without_its_keeper_has_the_bits_of_the_frozen_script(
    stack, server, dataset, tmp_path
):
    shutil.copy(SCRIPT.with_name("frontier.py"), tmp_path)
    alone = job(dataset, tmp_path, Path(shutil.copy(SCRIPT, tmp_path)), **STACK)
    printed = finish(alone.start(server))
    assert_same_bits(alone, stack[1], printed[0], stack[2][1])


def test_two_ranks_have_the_bits_of_the_frozen_script(server, dataset, tmp_path):
    ours = job(dataset, tmp_path / "ours", SCRIPT, **STACK)
    frozen = job(dataset, tmp_path / "frozen", FROZEN, **STACK)
    runs = [server.ranks(job.env, [], [], script=job.script) for job in (ours, frozen)]
    printed = finish(*runs[0], *runs[1])
    assert_same_bits(ours, frozen, printed[0], printed[2])


def test_a_run_that_is_killed_and_resumed_has_the_bits_of_the_frozen_script(
    stack, server, dataset, tmp_path
):
    ours = job(dataset, tmp_path / "ours", SCRIPT, SAVE_EVERY=2, **STACK)
    killed = ours.start(server, at(8, "SIGKILL")).wait()  # in step 3
    assert killed.returncode == -9
    assert "step:2/4 train_loss" in killed.output
    ours.env["RESUME"] = "auto"
    resumed = ours.start(server)
    printed = killed.output + finish(resumed)[0]
    assert "resum" in resumed.output
    assert_same_bits(ours, stack[1], printed, stack[2][1])


@pytest.mark.parametrize(("trained", "scored"), [(SCRIPT, FROZEN), (FROZEN, SCRIPT)])
def test_each_script_scores_the_artifacts_of_the_other(
    trained, scored, stack, server, dataset, tmp_path
):
    """In an environment that tells nothing of the model."""
    if scored == FROZEN and new_settings():
        pytest.skip("the frozen script refuses settings that it does not know")
    trained = next(job for job in stack[:2] if job.script == trained)
    small = job(dataset, tmp_path / "other", scored)
    bare = {name: small.env[name] for name in BARE}
    bare |= {"EVAL_ONLY": "1", "ARTIFACT": f"{trained.folder}/run/final_model.artifact"}
    other = Job(small.folder, scored, bare)
    finish(other.start(server))
    assert nll_of(other) == nll_of(trained)
    assert told(other) == told(trained, ("final",))


def test_the_cases_leave_no_setting_that_changes_a_result_at_its_default(dataset, tmp_path):
    fields, load_settings = frozen_names()["FIELDS"], frozen_names()["load_settings"]
    names = [*fields]
    names = names[names.index("SEED") :]
    changed = set(ELSEWHERE)
    for settings in (*CASES.values(), STREAMS):
        hp = load_settings(job(dataset, tmp_path, FROZEN, **settings).env)
        changed |= {name for name in names if getattr(hp, name.lower()) != fields[name].default}
    assert [name for name in names if name not in changed] == []
