"""Settings: precedence, validity, typos, relations, roles, dotenv files, --settings, --help."""

import dataclasses
import importlib.util
import os
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import SCRIPT, run_cli, run_main, tiny_settings
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import keeper
import train_gpt
from train_gpt import UserError, load_settings, typo_of

# Typed from reference/hyperparameters.md, not from train_gpt.py.
PUBLISHED = {
    "DATA_PATH": "./data/datasets/fineweb10B_sp1024",
    "TOKENIZER_PATH": "./data/tokenizers/fineweb_1024_bpe.model",
    "RUN_ID": "",  # a random UUID, made when the run starts
    "SEED": 1337,
    "VAL_BATCH_SIZE": 524288,
    "VAL_LOSS_EVERY": 1000,
    "TRAIN_LOG_EVERY": 200,
    "ITERATIONS": 20000,
    "WARMDOWN_ITERS": 1200,
    "WARMUP_STEPS": 20,
    "TRAIN_BATCH_TOKENS": 524288,
    "TRAIN_SEQ_LEN": 1024,
    "MAX_WALLCLOCK_SECONDS": 600.0,
    "QK_GAIN_INIT": 1.5,
    "VOCAB_SIZE": 1024,
    "NUM_LAYERS": 9,
    "NUM_KV_HEADS": 4,
    "MODEL_DIM": 512,
    "NUM_HEADS": 8,
    "MLP_MULT": 2.0,
    "TIE_EMBEDDINGS": 1,
    "ROPE_BASE": 10000.0,
    "LOGIT_SOFTCAP": 30.0,
    "EMBED_LR": 0.6,
    "HEAD_LR": 0.008,
    "TIED_EMBED_LR": 0.05,
    "TIED_EMBED_INIT_STD": 0.005,
    "MATRIX_LR": 0.04,
    "SCALAR_LR": 0.04,
    "MUON_MOMENTUM": 0.95,
    "MUON_BACKEND_STEPS": 5,
    "MUON_MOMENTUM_WARMUP_START": 0.85,
    "MUON_MOMENTUM_WARMUP_STEPS": 500,
    "BETA1": 0.9,
    "BETA2": 0.95,
    "ADAM_EPS": 1e-8,
    "GRAD_CLIP_NORM": 0.0,
}
# The further ones that the issue names.
FURTHER = {
    "CONFIG": "",
    "DEVICE": "auto",
    "DTYPE": "auto",
    "COMPILE": "auto",
    "MICRO_BATCH_TOKENS": 0,
    "WARMDOWN_FRAC": "",
    "VAL_TOKENS": 0,
    "EVAL_ONLY": 0,
    "ARTIFACT": "",
    "SAVE_NLL": "",
    "ARTIFACT_MAX_BYTES": 16_000_000,
    "OUT_DIR": "logs",
}
# Those of pull request 369's techniques, off by default.
STACK = {
    "ATTENTION": "auto",
    "MLP_ACT": "relu2",
    "MLP_LEAKY_SLOPE": 0.5,
    "ROPE_DIMS": 0,
    "ROPE_SCALING": "none",
    "EVAL_SEQ_LEN": 0,
    "EVAL_STRIDE": 0,
    "EVAL_DOC_ISOLATED": 0,
    "XSA_LAST_N": 0,
    "SMEAR_GATE": 0,
    "BIGRAM_BUCKETS": 0,
    "BIGRAM_DIM": 128,
    "LN_SCALE": 0,
    "ORTHO_INIT": 0,
    "MUON_WD": 0.0,
    "ADAM_WD": 0.0,
    "EMBED_WD": 0.0,
    "EMA_DECAY": 0.0,
    "FINAL_LR_FRAC": 0.0,
    "QUANT_BITS_MLP": 8,
    "QUANT_BITS_ATTN": 8,
    "QUANT_BITS_EMBED": 8,
    "QUANT_BITS_BIGRAM": 8,
    "QUANT_CLIP": "rowmax",
    "QUANT_SIGMA": 12.85,
    "COMPRESSOR": "zstd",
    "FIT_BUDGET": "none",
    "SCORE_STREAMS": 0,
    "SAVE_EVERY": 0,
    "SAVE_TOTAL_LIMIT": 2,
    "RESUME": "",
    "RESUME_CHANGED": 0,
    "MAX_BAD_STEPS": 10,
}
# Those of frontier.py's further techniques, off by default.
RECORDS = {
    "LR_SCHEDULE": "linear",
    "LR_WARMUP_STEPS": 0,
    "LR_WARMUP_RATIO": 0.0,
    "EMA_BLEND": 1.0,
    "BATCH_SCHEDULE": "",
    "SEQ_LEN_SCHEDULE": "",
    "LOOP_REPEATS": 0,
    "LOOP_FIRST": 0,
    "LOOP_LAST": 0,
    "LOOP_START": 0.0,
    "SKIPS": "unet",
    "RESID_MIX": 1,
    "CHANNEL_GAINS": 1,
    "PARALLEL_LAST_N": 0,
    "WINDOW_PATTERN": "",
    "WINDOW_TOKENS": 512,
    "SPARSE_ATTN_GATE": 0,
    "MTP_TOKENS": 0,
    "PREFIX_WEIGHT": 0.0,
    "MATRIX_OPTIMIZER": "muon",
    "MUON_COEFFICIENTS": "quintic",
    "NORMUON_BETA2": 0.0,
    "MUON_MOMENTUM_WARMDOWN_FRAC": 0.0,
    "EMA_NESTEROV": 0.0,
    "EMBED_BETA2": 0.0,
    "SCALAR_BETA2": 0.0,
    "WD_SCHEDULE": "constant",
    "CAUTIOUS_WD": 0,
}
DEFAULTS = PUBLISHED | FURTHER | STACK | RECORDS
WHOLE = [name for name, value in DEFAULTS.items() if type(value) is int]
REAL = [*(name for name, value in DEFAULTS.items() if type(value) is float), "WARMDOWN_FRAC"]
BOOLEAN = ["TIE_EMBEDDINGS", "EVAL_ONLY", "EVAL_DOC_ISOLATED", "RESID_MIX", "CHANNEL_GAINS"]
BOOLEAN += ["LN_SCALE", "ORTHO_INIT", "SCORE_STREAMS", "RESUME_CHANGED", "CAUTIOUS_WD"]
TEXT = ["DATA_PATH", "TOKENIZER_PATH", "OUT_DIR", "ARTIFACT", "SAVE_NLL"]


def resolve(environ: dict[str, str]) -> train_gpt.Hyperparameters:
    """The settings of an environment, without a look at files and folders."""
    return load_settings(environ, check_places=False)


def problems(environ: dict[str, str]) -> str:
    """The message with which an environment is refused."""
    with pytest.raises(UserError) as caught:
        resolve(environ)
    return str(caught.value)


def config(folder: Path, text: str) -> dict[str, str]:
    """An environment whose CONFIG is a file of `text`."""
    path = folder / "run.env"
    path.write_text(text, encoding="utf-8")
    return {"CONFIG": str(path)}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


# ---- names, defaults, precedence


def test_there_are_37_published_settings_and_12_further_ones():
    assert (len(PUBLISHED), len(FURTHER)) == (37, 12)


@pytest.mark.parametrize("name", DEFAULTS)
def test_default(name):
    value = getattr(resolve({}), name.lower())
    assert (value, type(value)) == (DEFAULTS[name], type(DEFAULTS[name]))


def test_no_known_setting_is_gone():
    assert set(DEFAULTS) <= set(train_gpt.FIELDS)


def test_environment_wins_over_config_and_config_over_default(tmp_path):
    environ = config(tmp_path, "NUM_LAYERS=5\nMLP_MULT=3\n")
    hp = resolve({**environ, "NUM_LAYERS": "6"})
    assert (hp.num_layers, hp.mlp_mult, hp.model_dim) == (6, 3, 512)


def test_environment_may_put_a_bad_config_value_right(tmp_path):
    assert resolve({**config(tmp_path, "NUM_LAYERS=many\n"), "NUM_LAYERS": "6"}).num_layers == 6


def test_relations_are_checked_between_config_and_environment(tmp_path):
    message = problems({**config(tmp_path, "MODEL_DIM=384\n"), "NUM_HEADS": "5"})
    assert "MODEL_DIM=384" in message
    assert "NUM_HEADS=5" in message


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        resolve({}).num_layers = 3


# ---- values


@pytest.mark.parametrize("name", [*WHOLE, *REAL, "DEVICE", "DTYPE", "COMPILE"])
@pytest.mark.parametrize("text", ["many", "nan", "inf", "-inf", "1,5", "0x10", "--1"])
def test_what_is_no_number_or_choice_is_refused(name, text):
    assert f"{name}={text}: expected" in problems({name: text})


@pytest.mark.parametrize("name", [n for n in DEFAULTS if DEFAULTS[n] != "" and n not in TEXT])
def test_an_empty_value_is_refused(name):
    assert f"{name}=: expected" in problems({name: ""})


@pytest.mark.parametrize("name", [name for name, value in DEFAULTS.items() if value == ""])
def test_an_empty_value_stays_empty_where_empty_is_the_default(name):
    assert getattr(resolve({name: ""}), name.lower()) == ""


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("text", ["1.5", "1.0", "1e3"])
def test_whole_numbers_have_no_fraction(name, text):
    assert f"{name}={text}: expected" in problems({name: text})


@pytest.mark.parametrize("name", BOOLEAN)
@pytest.mark.parametrize("text", ["true", "True", "yes", "on", "false", "2", "-1", "01"])
def test_a_boolean_is_0_or_1(name, text):
    message = problems({name: text})
    assert f"{name}={text}: expected one of 0, 1" in message


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [
        ("DEVICE", "gpu", "auto, cuda, mps, cpu"),
        ("DTYPE", "fp16", "auto, bf16, fp32"),
        ("COMPILE", "2", "auto, 0, 1"),
    ],
)
def test_a_choice_names_all_that_would_be_right(name, text, right):
    assert f"{name}={text}: expected one of {right}" in problems({name: text})


BEYOND = {
    "SEED": ["-1", "4294967296"],
    "VAL_BATCH_SIZE": ["0"],
    "VAL_LOSS_EVERY": ["-1"],
    "TRAIN_LOG_EVERY": ["-1"],
    "VAL_TOKENS": ["-1"],
    "ARTIFACT_MAX_BYTES": ["0"],
    "ITERATIONS": ["-1"],
    "MAX_WALLCLOCK_SECONDS": ["-0.1"],
    "WARMDOWN_ITERS": ["-1"],
    "WARMDOWN_FRAC": ["-0.1", "1.01"],
    "WARMUP_STEPS": ["-1"],
    "TRAIN_BATCH_TOKENS": ["0"],
    "MICRO_BATCH_TOKENS": ["-1"],
    "TRAIN_SEQ_LEN": ["0"],
    "VOCAB_SIZE": ["0", "65537"],
    "NUM_LAYERS": ["0"],
    "MODEL_DIM": ["0"],
    "NUM_HEADS": ["0"],
    "NUM_KV_HEADS": ["0"],
    "MLP_MULT": ["0"],
    "ROPE_BASE": ["0", "-1"],
    "LOGIT_SOFTCAP": ["0", "-30"],
    "EMBED_LR": ["-0.1"],
    "HEAD_LR": ["-0.1"],
    "TIED_EMBED_LR": ["-0.1"],
    "TIED_EMBED_INIT_STD": ["-0.1"],
    "MATRIX_LR": ["-0.1"],
    "SCALAR_LR": ["-0.1"],
    "MUON_MOMENTUM": ["-0.1", "1"],
    "MUON_BACKEND_STEPS": ["0"],
    "MUON_MOMENTUM_WARMUP_START": ["-0.1", "1"],
    "MUON_MOMENTUM_WARMUP_STEPS": ["-1"],
    "BETA1": ["-0.1", "1"],
    "BETA2": ["-0.1", "1"],
    "ADAM_EPS": ["-1e-9"],
    "GRAD_CLIP_NORM": ["-1"],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in BEYOND.items() for text in texts]
)
def test_out_of_range_is_refused(name, text):
    assert f"{name}={text}: expected" in problems({name: text})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("SEED", "0", 0),
        ("SEED", "4294967295", 4294967295),
        ("WARMDOWN_FRAC", "0", 0.0),
        ("WARMDOWN_FRAC", "1", 1.0),
        ("ITERATIONS", "0", 0),
        ("MAX_WALLCLOCK_SECONDS", "0", 0.0),
        ("MUON_MOMENTUM", "0", 0.0),
        ("ADAM_EPS", "1e-15", 1e-15),
        ("QK_GAIN_INIT", "-2", -2.0),
        ("VOCAB_SIZE", "65536", 65536),
        ("TIE_EMBEDDINGS", "0", 0),
        ("COMPILE", "1", "1"),
    ],
)
def test_the_ends_of_a_range_are_right(name, text, value):
    assert getattr(resolve({name: text}), name.lower()) == value


def test_all_problems_of_values_and_names_are_reported_at_once():
    environ = {"NUM_LAYER": "3", "MODEL_DIM": "wide", "BETA1": "1", "EVAL_ONLY": "yes", "SEED": ""}
    message = problems(environ)
    assert [name for name, text in environ.items() if f"{name}={text}: " not in message] == []


def test_all_broken_relations_are_reported_at_once():
    environ = {"MODEL_DIM": "100", "NUM_HEADS": "7", "NUM_KV_HEADS": "2", "VAL_TOKENS": "1"}
    message = problems(environ | {"TRAIN_SEQ_LEN": "1000", "EVAL_ONLY": "1"})
    culprits = ["MODEL_DIM=100", "NUM_HEADS=7", "TRAIN_BATCH_TOKENS=524288", "VAL_TOKENS=1"]
    assert [culprit for culprit in [*culprits, "EVAL_ONLY=1"] if culprit not in message] == []


def test_a_broken_relation_is_reported_beside_an_unrelated_bad_value():
    message = problems({"MODEL_DIM": "100", "NUM_HEADS": "8", "MATRIX_LR": "fast", "SEEED": "1"})
    assert "MATRIX_LR=fast" in message
    assert "SEEED=1" in message
    assert "MODEL_DIM=100" in message


def test_all_missing_places_are_reported_at_once(tmp_path):
    names = ["DATA_PATH", "TOKENIZER_PATH", "ARTIFACT"]
    environ = {name: str(tmp_path / f"no_{name}") for name in names}
    with pytest.raises(UserError) as caught:
        load_settings({**environ, "EVAL_ONLY": "1", "OUT_DIR": str(tmp_path)})
    missing = [name for name in names if f"{name}={environ[name]}" not in str(caught.value)]
    assert missing == []


# ---- typos


def neighbours(word: str, alphabet: str) -> set[str]:
    """Every string one insertion, deletion, substitution or transposition away from `word`."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    inserted = {a + c + b for a, b in cuts for c in alphabet}
    deleted = {a + b[1:] for a, b in cuts if b}
    substituted = {a + c + b[1:] for a, b in cuts if b for c in alphabet}
    transposed = {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    return inserted | deleted | substituted | transposed


def shortened(word: str) -> set[str]:
    """A word, and what is left of it without any one of its characters."""
    return {word} | {word[:i] + word[i + 1 :] for i in range(len(word))}


def are_near(a: str, b: str) -> bool:
    """Whether two words are the same but for at most one character of each."""
    return not shortened(a).isdisjoint(shortened(b))


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_typo_of_a_setting_is_found(name):
    assert [word for word in neighbours(name, "Q1") if not typo_of(word)] == []


@settings(max_examples=300)
@given(st.sampled_from(sorted(DEFAULTS)), st.data())
def test_what_two_typos_make_is_only_found_where_it_is_near(name, data):
    once = data.draw(st.sampled_from(sorted(neighbours(name, "AQ_"))))
    twice = data.draw(st.sampled_from(sorted(neighbours(once, "AQ_"))))
    found = typo_of(twice)
    assert not found or are_near(twice, found)


TYPOS = [
    ("NUM_LAYER", "NUM_LAYERS"),  # deletion
    ("MATRX_LR", "MATRIX_LR"),
    ("EED", "SEED"),
    ("NUM_LAYERSS", "NUM_LAYERS"),  # insertion
    ("MODEL__DIM", "MODEL_DIM"),
    ("_VOCAB_SIZE", "VOCAB_SIZE"),
    ("ITERATION5", "ITERATIONS"),  # substitution
    ("MODEL-DIM", "MODEL_DIM"),
    ("BETA3", "BETA2"),
    ("ITERATOINS", "ITERATIONS"),  # transposition
    ("ESED", "SEED"),
    ("ROPE_BAES", "ROPE_BASE"),
    ("num_layers", "NUM_LAYERS"),  # case
    ("Seed", "SEED"),
    ("matrx_lr", "MATRIX_LR"),
]


@pytest.mark.parametrize(("typo", "meant"), TYPOS)
def test_did_you_mean_in_the_environment(typo, meant):
    message = problems({typo: "7"})
    assert f"{typo}=7" in message
    assert f"did you mean {meant}?" in message


@pytest.mark.parametrize(("typo", "meant"), TYPOS)
def test_did_you_mean_in_the_config_file(typo, meant, tmp_path):
    message = problems(config(tmp_path, f"{typo}=7\n"))
    assert f"{typo}=7" in message
    assert f"did you mean {meant}?" in message


def test_an_exact_name_is_no_typo_of_its_neighbour():
    assert resolve({"BETA1": "0.5", "BETA2": "0.6"}).beta1 == 0.5


UNRELATED = """
PATH HOME LANG SHELL TERM USER PWD EDITOR HOSTNAME LC_ALL TMPDIR DISPLAY PYTHONPATH
VIRTUAL_ENV OMP_NUM_THREADS CUDA_VISIBLE_DEVICES MASTER_ADDR MASTER_PORT GROUP_RANK ROLE_RANK
TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS NCCL_DEBUG NCCL_IB_DISABLE
PYTORCH_CUDA_ALLOC_CONF TORCH_LOGS WANDB_API_KEY HF_TOKEN HF_HOME AWS_SECRET_ACCESS_KEY CI
GITHUB_ACTIONS PYTEST_CURRENT_TEST LD_LIBRARY_PATH SSH_AUTH_SOCK _ A EXPORT_DIR NUM_WORKERS
MODEL DATA TOKENIZER LR BATCH_SIZE DEVICE_ORDINAL TOKENIZERS_PARALLELISM OLDPWD SHLVL LOGNAME MAIL
CUDA_HOME CUDA_DEVICE_ORDER TZ NUMEXPR_NUM_THREADS MKL_NUM_THREADS TRITON_CACHE_DIR CONF ED LANGUAGE
"""


def test_unrelated_environment_variables_pass():
    environ = dict.fromkeys(UNRELATED.split(), "x")
    assert resolve(environ) == resolve({})


@settings(max_examples=200)
@given(st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=20))
def test_only_what_is_near_a_setting_is_a_typo_of_it(name):
    assume(not any(are_near(name.upper(), known) for known in DEFAULTS))
    assert typo_of(name) == ""


def test_an_unrelated_name_in_the_config_file_is_refused(tmp_path):
    assert "WANDB_API_KEY=x" in problems(config(tmp_path, "WANDB_API_KEY=x\n"))


# ---- relations


RELATIONS = {
    "heads divide the model": ({"MODEL_DIM": "500"}, ["MODEL_DIM=500", "NUM_HEADS=8"]),
    "even head dim": ({"MODEL_DIM": "72", "NUM_HEADS": "8"}, ["MODEL_DIM=72", "NUM_HEADS=8"]),
    "kv heads divide heads": ({"NUM_KV_HEADS": "3"}, ["NUM_KV_HEADS=3", "NUM_HEADS=8"]),
    "more kv heads than heads": ({"NUM_KV_HEADS": "16"}, ["NUM_KV_HEADS=16", "NUM_HEADS=8"]),
    "batch of whole sequences": (
        {"TRAIN_BATCH_TOKENS": "1536"},
        ["TRAIN_BATCH_TOKENS=1536", "TRAIN_SEQ_LEN=1024"],
    ),
    "batch under a sequence": (
        {"TRAIN_BATCH_TOKENS": "512"},
        ["TRAIN_BATCH_TOKENS=512", "TRAIN_SEQ_LEN=1024"],
    ),
    "micro-batch of whole sequences": (
        {"MICRO_BATCH_TOKENS": "512"},
        ["MICRO_BATCH_TOKENS=512", "TRAIN_SEQ_LEN=1024"],
    ),
    "batch of whole micro-batches": (
        {"MICRO_BATCH_TOKENS": "3072"},
        ["MICRO_BATCH_TOKENS=3072", "TRAIN_BATCH_TOKENS=524288"],
    ),
    "validation batch of a sequence": (
        {"VAL_BATCH_SIZE": "1023"},
        ["VAL_BATCH_SIZE=1023", "TRAIN_SEQ_LEN=1024"],
    ),
    "validation batch of a longer context": (
        {"VAL_BATCH_SIZE": "1024", "EVAL_SEQ_LEN": "2048"},
        ["VAL_BATCH_SIZE=1024", "EVAL_SEQ_LEN=2048"],
    ),
    "odd rotary channels": ({"ROPE_DIMS": "15"}, ["ROPE_DIMS=15"]),
    "more rotary channels than there are": ({"ROPE_DIMS": "66"}, ["ROPE_DIMS=66"]),
    "ntk of one pair": ({"ROPE_DIMS": "2", "ROPE_SCALING": "ntk"}, ["ROPE_SCALING=ntk"]),
    "an MLP without channels": ({"MLP_MULT": "0.001"}, ["MLP_MULT=0.001", "MODEL_DIM=512"]),
    "bigrams with one row": ({"BIGRAM_BUCKETS": "1"}, ["BIGRAM_BUCKETS=1"]),
    "more exclusive layers than layers": ({"XSA_LAST_N": "10"}, ["XSA_LAST_N=10", "NUM_LAYERS=9"]),
    "a loop that ends before it begins": (
        {"LOOP_REPEATS": "1", "LOOP_FIRST": "3", "LOOP_LAST": "2"},
        ["LOOP_LAST=2: before LOOP_FIRST=3"],
    ),
    "a loop of layers that are not there": (
        {"LOOP_REPEATS": "1", "LOOP_LAST": "9"},
        ["LOOP_LAST=9", "NUM_LAYERS=9"],
    ),
    "a loop that no step trains": ({"LOOP_REPEATS": "1", "LOOP_START": "1"}, ["LOOP_START=1.0"]),
    "mudd of two visits": ({"SKIPS": "mudd", "NUM_LAYERS": "2"}, ["SKIPS=mudd", "three visits"]),
    "more parallel layers than layers": (
        {"PARALLEL_LAST_N": "10"},
        ["PARALLEL_LAST_N=10", "NUM_LAYERS=9"],
    ),
    "windows of other letters": ({"WINDOW_PATTERN": "SX"}, ["WINDOW_PATTERN=SX"]),
    "a gate of more channels than there are": (
        {"SPARSE_ATTN_GATE": "513"},
        ["SPARSE_ATTN_GATE=513", "MODEL_DIM=512"],
    ),
    "a gate by token of few channels": (
        {"SMEAR_GATE": "2", "MODEL_DIM": "8", "NUM_HEADS": "2", "NUM_KV_HEADS": "1"},
        ["SMEAR_GATE=2", "MODEL_DIM"],
    ),
    "AdamW with settings of Muon": (
        {"MATRIX_OPTIMIZER": "adamw", "NORMUON_BETA2": "0.9", "MUON_ROW_NORM": "1"},
        ["MATRIX_OPTIMIZER=adamw", "MUON_ROW_NORM, NORMUON_BETA2"],
    ),
    "cautious decay without decay": ({"CAUTIOUS_WD": "1"}, ["CAUTIOUS_WD=1", "MUON_WD"]),
    "a share of no average": ({"EMA_BLEND": "0.5"}, ["EMA_BLEND=0.5", "EMA_DECAY"]),
    "two ways to warm up": (
        {"LR_WARMUP_STEPS": "3", "LR_WARMUP_RATIO": "0.1"},
        ["LR_WARMUP_STEPS=3", "LR_WARMUP_RATIO=0.1"],
    ),
    "a warmdown where nothing falls": (
        {"LR_SCHEDULE": "constant", "WARMDOWN_ITERS": "9"},
        ["LR_SCHEDULE=constant", "WARMDOWN_ITERS"],
    ),
    "a schedule that cannot be read": ({"BATCH_SCHEDULE": "8192"}, ["BATCH_SCHEDULE=8192"]),
    "a sequence over the longest": (
        {"SEQ_LEN_SCHEDULE": "2048@0.5"},
        ["SEQ_LEN_SCHEDULE=2048@0.5", "TRAIN_SEQ_LEN=1024"],
    ),
    "a batch of no whole sequences": ({"BATCH_SCHEDULE": "1000@0.5"}, ["1000 tokens", "1024"]),
    "a micro-batch that does not fit a stage": (
        {"SEQ_LEN_SCHEDULE": "768@0.5", "TRAIN_BATCH_TOKENS": "3072", "MICRO_BATCH_TOKENS": "1024"},
        ["MICRO_BATCH_TOKENS=1024", "768"],
    ),
    "a stride over the context": ({"EVAL_STRIDE": "1025"}, ["EVAL_STRIDE=1025"]),
    "one validation token has no context": ({"VAL_TOKENS": "1"}, ["VAL_TOKENS=1"]),
    "EVAL_ONLY needs an artifact": ({"EVAL_ONLY": "1"}, ["EVAL_ONLY=1", "ARTIFACT"]),
    "RUN_ID is no path": ({"RUN_ID": "a/b"}, ["RUN_ID=a/b"]),
    "RUN_ID is not absolute": ({"RUN_ID": "/tmp/x"}, ["RUN_ID=/tmp/x"]),
    "RUN_ID does not climb": ({"RUN_ID": ".."}, ["RUN_ID=.."]),
    "RUN_ID is not the folder itself": ({"RUN_ID": "."}, ["RUN_ID=."]),
}


@pytest.mark.parametrize(("environ", "named"), RELATIONS.values(), ids=RELATIONS)
def test_broken_relation(environ, named):
    message = problems(environ)
    assert [culprit for culprit in named if culprit not in message] == []


def test_validation_batch_must_hold_a_sequence_of_every_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "VAL_BATCH_SIZE=2048" in problems({"VAL_BATCH_SIZE": "2048"})


def test_validation_batch_of_exactly_a_sequence_a_rank_is_right(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert resolve({"VAL_BATCH_SIZE": "3072"}).val_batch_size == 3072


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(device, monkeypatch):
    monkeypatch.setattr(getattr(train_gpt.torch, device), "is_available", lambda: False)
    assert f"DEVICE={device}" in problems({"DEVICE": device})


def test_relations_that_hold_are_not_complained_about():
    environ = {"MODEL_DIM": "96", "NUM_HEADS": "6", "NUM_KV_HEADS": "3", "TRAIN_SEQ_LEN": "48"}
    environ |= {"TRAIN_BATCH_TOKENS": "960", "MICRO_BATCH_TOKENS": "96", "VAL_BATCH_SIZE": "48"}
    assert resolve(environ | {"RUN_ID": "2026-01-02_a.b"}).model_dim == 96


# ---- roles


# A value that is not the default, for every setting of the model; the groups are trained apart.
# In matrices as wide as these, with over 65536 elements, weights are quantized.
SHAPE = {"VOCAB_SIZE": 512, "NUM_LAYERS": 2, "MODEL_DIM": 264, "NUM_HEADS": 4, "NUM_KV_HEADS": 2}
SHAPE |= {"TRAIN_SEQ_LEN": 32}
GROUPS = {
    "attention": {
        "ROPE_BASE": 500,
        "ROPE_DIMS": 8,
        "ROPE_SCALING": "ntk",
        "EVAL_SEQ_LEN": 64,
        "XSA_LAST_N": 1,
        "QK_GAIN_INIT": 1.2,
    },
    "blocks": {
        "MLP_MULT": 3,
        "MLP_ACT": "leaky_relu2",
        "MLP_LEAKY_SLOPE": 0.3,
        "LN_SCALE": 1,
        "ORTHO_INIT": 1,
        "TIE_EMBEDDINGS": 0,
        "LOGIT_SOFTCAP": 15,
    },
    "inputs": {"SMEAR_GATE": 1, "BIGRAM_BUCKETS": 2048, "BIGRAM_DIM": 48},
    "visits": {
        "LOOP_REPEATS": 1,
        "LOOP_FIRST": 1,
        "LOOP_LAST": 1,
        "SKIPS": "mudd",
        "RESID_MIX": 0,
        "CHANNEL_GAINS": 0,
        "PARALLEL_LAST_N": 1,
    },
    "windows": {
        "EVAL_STRIDE": 8,
        "EVAL_DOC_ISOLATED": 1,
        "WINDOW_PATTERN": "SL",
        "WINDOW_TOKENS": 12,
        "SPARSE_ATTN_GATE": 12,
    },
    "quantizer": {
        "QUANT_BITS_MLP": 5,
        "QUANT_BITS_ATTN": 6,
        "QUANT_BITS_EMBED": 7,
        "QUANT_BITS_BIGRAM": 4,
        "QUANT_CLIP": "sigma",
        "QUANT_SIGMA": 3,
        "COMPRESSOR": "rans",
        "BIGRAM_BUCKETS": 2048,
        "BIGRAM_DIM": 48,
    },
}


def another_value(name: str) -> object:
    """A value of a setting that is not its default."""
    default, about = train_gpt.FIELDS[name].default, train_gpt.FIELDS[name].metadata
    if not about["valid"]:
        return "S"
    if "least" not in about:
        return next(choice for choice in about["choices"] if choice != str(default))
    return default + 1 if default + 1 <= about["most"] else (about["least"] + about["most"]) / 2


LISTED = SHAPE | {name: value for group in GROUPS.values() for name, value in group.items()}
# A new setting of the model is tested without a word here.
GROUPS["new"] = {n: another_value(n) for n in train_gpt.MODEL_SETTINGS if n not in LISTED}
CHANGES_NO_RESULT = """
CONFIG DATA_PATH TOKENIZER_PATH RUN_ID OUT_DIR DEVICE COMPILE ATTENTION VAL_BATCH_SIZE
VAL_LOSS_EVERY TRAIN_LOG_EVERY MICRO_BATCH_TOKENS WARMUP_STEPS SAVE_EVERY SAVE_TOTAL_LIMIT RESUME
RESUME_CHANGED MAX_BAD_STEPS SAVE_NLL REPORT_TO WATCH
"""


def test_every_setting_of_the_model_has_another_value_in_these_tests():
    values = LISTED | GROUPS["new"]
    assert set(train_gpt.MODEL_SETTINGS) == set(values)
    defaults = {name: train_gpt.FIELDS[name].default for name in values}
    assert [name for name, value in values.items() if value == defaults[name]] == []


@pytest.mark.parametrize("group", GROUPS)
def test_an_artifact_alone_scores_as_the_run_that_made_it(group, dataset, tmp_path):
    quick = {"ITERATIONS": 1, "VAL_TOKENS": 500, "CALIBRATION_TOKENS": 2048}
    trained = tiny_settings(dataset, tmp_path, **SHAPE, **GROUPS[group], **quick)
    run_main(trained | {"SAVE_NLL": str(tmp_path / "trained.npy")})
    bare = ["DATA_PATH", "TOKENIZER_PATH", "OUT_DIR", "DEVICE", "DTYPE", "COMPILE"]
    scored = {name: trained[name] for name in [*bare, "VAL_BATCH_SIZE", "VAL_TOKENS"]}
    scored |= {"EVAL_ONLY": "1", "ARTIFACT": str(tmp_path / "tiny" / "final_model.artifact")}
    run_main(scored | {"SAVE_NLL": str(tmp_path / "scored.npy")})
    assert (tmp_path / "scored.npy").read_bytes() == (tmp_path / "trained.npy").read_bytes()


def test_a_setting_of_the_model_is_carried_wherever_it_is_declared(dataset, tmp_path, monkeypatch):
    source = SCRIPT.read_text(encoding="utf-8")
    last = re.findall(r"^    \w+: .* = \w+_setting\(.*\)$", source, re.M)[-1]
    line = '    brand_new: int = model_setting(0, "[0, 9]", "declared last")'
    path = tmp_path / "changed.py"
    path.write_text(source.replace(last, f"{last}\n{line}"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed", path)
    changed = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "changed", changed)
    spec.loader.exec_module(changed)
    assert [*changed.FIELDS][-1] == "BRAND_NEW"
    environ = tiny_settings(dataset, tmp_path)
    hp = changed.load_settings(environ | {"BRAND_NEW": "7"}, check_places=False)
    artifact = tmp_path / "new.artifact"
    artifact.write_bytes(changed.pack_artifact(changed.GPT(hp).state_dict(), hp))
    bare = changed.load_settings(environ, check_places=False)
    assert changed.load_artifact(artifact, bare)[0].brand_new == 7


# ---- files beside the script


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """train_gpt.py as a module, with no other file beside it."""
    path = shutil.copy(SCRIPT, tmp_path_factory.mktemp("alone"))
    spec = importlib.util.spec_from_file_location("alone", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"alone": module}):
        spec.loader.exec_module(module)
        yield module


OF_FILES = [name for name, f in train_gpt.FIELDS.items() if f.metadata["file"]]


def test_other_files_are_needed_for_techniques_alone():
    assert {name for name in PUBLISHED | FURTHER if name in OF_FILES} == set()
    assert {"SMEAR_GATE", "EMA_DECAY", "COMPRESSOR", *RECORDS} - {*OF_FILES} == {
        *("LOOP_FIRST", "LOOP_LAST", "LOOP_START", "WINDOW_TOKENS")
    }


@pytest.mark.parametrize("name", OF_FILES)
def test_a_setting_whose_file_is_missing_is_one_clear_error(name, alone):
    file = train_gpt.FIELDS[name].metadata["file"]
    with pytest.raises(alone.UserError) as caught:
        alone.load_settings({name: str(another_value(name))}, check_places=False)
    assert str(caught.value) == f"{name}: {file} must lie beside train_gpt.py"


def test_all_settings_that_need_a_file_are_named_at_once(alone):
    given = {"SMEAR_GATE": "1", "LR_SCHEDULE": "wsd", "NUM_LAYERS": "3"}
    with pytest.raises(alone.UserError, match=r"^LR_SCHEDULE, SMEAR_GATE: frontier\.py must lie"):
        alone.load_settings(given, check_places=False)


def test_settings_at_their_defaults_need_no_file(alone):
    given = {name: str(train_gpt.FIELDS[name].default) for name in OF_FILES}
    assert len(alone.code_files(alone.load_settings(given, check_places=False))) == 1


def test_a_schedule_without_its_file_is_one_clear_error_of_a_program(tiny_env, tmp_path):
    """With the keeper, which otherwise looks at what the stages are."""
    given = tiny_env | {"SEQ_LEN_SCHEDULE": "8@0.5"}
    done = run_cli(given, copy_to=tmp_path / "alone", beside=["keeper.py"])
    problem = "SEQ_LEN_SCHEDULE: frontier.py must lie beside train_gpt.py"
    assert (done.rc, done.stderr) == (1, f"train_gpt.py: error: {problem}\n")
    assert not (tmp_path / "logs").exists()


# ---- what is known of settings


def test_what_changes_no_result_is_what_may_differ_at_a_resume():
    assert set(train_gpt.RUN_SETTINGS) == set(CHANGES_NO_RESULT.split())


def test_the_names_of_what_is_given_are_kept(tmp_path):
    """Also where the value is the default's: EVAL_ONLY goes by them."""
    environ = config(tmp_path, "EVAL_STRIDE=0\n") | {"EVAL_DOC_ISOLATED": "0"}
    assert resolve(environ).given == {"CONFIG", "EVAL_STRIDE", "EVAL_DOC_ISOLATED"}
    assert resolve({}).given == set()


# ---- dotenv files


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("DATA_PATH=plain", "plain"),
        ("DATA_PATH='two words'", "two words"),
        ('DATA_PATH="two words"', "two words"),
        ('DATA_PATH="it\'s"', "it's"),
        ("DATA_PATH='say \"hi\"'", 'say "hi"'),
        ("DATA_PATH='a # b'", "a # b"),
        ('DATA_PATH="a # b"', "a # b"),
        ("DATA_PATH=a # a comment, and it's one", "a"),
        ("# first\n\n  # second = 3\nDATA_PATH=a\n# last", "a"),
        ("DATA_PATH=a=b", "a=b"),
        ("DATA_PATH=", ""),
        ("DATA_PATH=''", ""),
        ("DATA_PATH=a\r\nSEED=1\r\n", "a"),
        ("  DATA_PATH=indented", "indented"),
        ("DATA_PATH=first\nDATA_PATH=second", "second"),
        ("DATA_PATH=naïve/日本", "naïve/日本"),
        # In a shell as in dotenv files, # opens a comment only at the start of a word.
        ("DATA_PATH=run#1", "run#1"),
    ],
)
def test_dotenv_text(text, path, tmp_path):
    assert resolve(config(tmp_path, text)).data_path == path


@pytest.mark.parametrize(
    "text",
    ["SEED", "SEED 1", "SEED = 1", "export SEED=1", "DATA_PATH=two words", "DATA_PATH='open"],
)
def test_malformed_dotenv_is_refused_with_the_file_named(text, tmp_path):
    environ = config(tmp_path, f"MLP_MULT=3\n{text}\n")
    assert f"CONFIG={environ['CONFIG']}" in problems(environ)


def test_config_in_a_config_file_is_refused(tmp_path):
    environ = config(tmp_path, "CONFIG=other.env\n")
    assert f"CONFIG={environ['CONFIG']}" in problems(environ)


def test_a_config_file_that_is_missing_is_named(tmp_path):
    path = str(tmp_path / "none.env")
    assert f"CONFIG={path}" in problems({"CONFIG": path})


def test_a_config_file_that_is_a_folder_is_named(tmp_path):
    assert f"CONFIG={tmp_path}" in problems({"CONFIG": str(tmp_path)})


def test_a_path_in_a_config_file_may_be_of_any_bytes(tmp_path):
    path = tmp_path / "latin1.env"
    path.write_bytes("DATA_PATH=café".encode("latin-1"))
    assert os.fsencode(resolve({"CONFIG": str(path)}).data_path) == b"caf\xe9"


def test_a_config_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "windows.env"
    path.write_bytes("SEED=5\r\nNUM_LAYERS=3\r\n".encode("utf-8-sig"))
    hp = resolve({"CONFIG": str(path)})
    assert (hp.seed, hp.num_layers) == (5, 3)


def test_a_config_file_in_utf16_is_named(tmp_path):
    path = tmp_path / "utf16.env"
    path.write_bytes("SEED=5\n".encode("utf-16"))
    message = problems({"CONFIG": str(path)})
    assert f"CONFIG={path}" in message
    assert "UTF-8" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_config_file_that_may_not_be_read_is_named(tmp_path):
    environ = config(tmp_path, "SEED=1\n")
    Path(environ["CONFIG"]).chmod(0)
    assert f"CONFIG={environ['CONFIG']}" in problems(environ)


def test_an_empty_config_file_changes_nothing(tmp_path):
    environ = config(tmp_path, "")
    assert resolve(environ) == dataclasses.replace(resolve({}), config=environ["CONFIG"])


# ---- what nobody set is not what is wrong


def test_an_odd_head_width_is_told_by_what_makes_it():
    message = problems({"MODEL_DIM": "60", "NUM_HEADS": "4", "NUM_KV_HEADS": "2"})
    assert "MODEL_DIM=60: over NUM_HEADS=4 makes heads of 15 channels" in message
    assert "ROPE_DIMS" not in message


def test_a_head_of_one_pair_under_ntk_is_told_without_rope_dims():
    message = problems({"MODEL_DIM": "8", "NUM_HEADS": "4", "ROPE_SCALING": "ntk"})
    assert "ROPE_SCALING=ntk" in message
    assert "ROPE_DIMS" not in message


def test_a_local_rank_without_a_device_is_named(monkeypatch):
    monkeypatch.setattr(train_gpt.torch.cuda, "device_count", lambda: 1)
    job = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
    monkeypatch.setenv("LOCAL_RANK", "1")
    message = problems(job | {"MASTER_PORT": "1"})
    assert "LOCAL_RANK=1: there are 1 CUDA devices" in message


# ---- --settings and --help


def printed(capsys, environ: dict[str, str], *arguments: str) -> str:
    """What the script prints."""
    with mock.patch.object(sys, "argv", ["train_gpt.py", *arguments]):
        keeper.run_program(lambda given: run_main(environ, *given))
    return capsys.readouterr().out


# Environments hold no NUL; a text file changes \r; surrogates are no text.
odd_text = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=20)
numbers = st.one_of(st.floats(0, 1e9), st.floats(0, 1e-9)).map(repr)
environments = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(TEXT, odd_text),
        **dict.fromkeys(["MATRIX_LR", "ADAM_EPS", "GRAD_CLIP_NORM"], numbers),
        "QK_GAIN_INIT": st.floats(-1e9, 1e9).map(repr),
        "WARMDOWN_FRAC": st.one_of(st.just(""), st.floats(0, 1).map(repr)),
        "SEED": st.integers(0, 2**32 - 1).map(str),
        "COMPILE": st.sampled_from(["auto", "0", "1"]),
        "TIE_EMBEDDINGS": st.sampled_from(["0", "1"]),
        "RUN_ID": st.text("ab_-.1", max_size=8).map(lambda text: f"r{text}"),
    },
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(environ=environments)
@example(
    environ={"DATA_PATH": "two words", "OUT_DIR": "it's #1", "SAVE_NLL": '"', "ARTIFACT": "a\nb"}
)
@example(
    environ={
        "DATA_PATH": "$HOME",
        "OUT_DIR": "`ls`",
        "SAVE_NLL": "\\",
        "ARTIFACT": "ends in space ",
    }
)
def test_settings_output_is_a_config_that_gives_the_same_output(environ, tmp_path, capsys):
    first = printed(capsys, environ, "--settings")
    again = printed(capsys, config(tmp_path, first), "--settings")
    assert again == first


def test_settings_output_is_complete(capsys):
    names = [line.split("=")[0] for line in printed(capsys, {}, "--settings").splitlines()]
    assert sorted(names) == sorted(set(train_gpt.FIELDS) - {"CONFIG"})


def test_settings_output_shows_the_resolved_values(tmp_path, capsys):
    environ = {**config(tmp_path, "MLP_MULT=3\nSEED=5"), "SEED": "6"}
    lines = printed(capsys, environ, "--settings").splitlines()
    assert {"MLP_MULT=3.0", "SEED=6", "NUM_LAYERS=9"} <= set(lines)


def test_settings_output_can_be_read_by_a_shell(tmp_path, capsys):
    value = 'it\'s $HOME #1 "q" `x` \\'
    path = tmp_path / "run.env"
    path.write_text(printed(capsys, {"DATA_PATH": value}, "--settings"), encoding="utf-8")
    echo = ["sh", "-c", '. "$1"; printf %s "$DATA_PATH"', "sh", str(path)]
    assert subprocess.run(echo, capture_output=True, text=True, check=True).stdout == value


def test_settings_works_where_nothing_is_there_yet(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed(capsys, {}, "--settings")
    assert list(tmp_path.iterdir()) == []


def test_settings_refuses_what_a_run_would_refuse():
    with pytest.raises(UserError, match="NUM_LAYER=3"):
        run_main({"NUM_LAYER": "3"}, "--settings")


def test_help_lists_every_setting_with_its_default(capsys):
    rows = [re.split(r" *\| *", line)[1:3] for line in help_rows(printed(capsys, {}, "--help"))]
    shown = dict(rows)
    assert {name: shown.get(name) for name in DEFAULTS} == {
        name: str(value) for name, value in DEFAULTS.items()
    }


def help_rows(text: str) -> list[str]:
    """The lines of the table of settings."""
    return [line for line in text.splitlines() if re.match(r"\| *[A-Z]", line)]


def test_help_is_given_in_a_bad_environment_too(capsys):
    assert "NUM_LAYERS" in printed(capsys, {"NUM_LAYER": "x"}, "--help")


def test_help_exits_0(tmp_path):
    done = run_cli({}, "--help", cwd=tmp_path)
    assert (done.rc, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["--hlep"], ["--help", "x"], ["train"], ["--settings", ""]])
def test_an_unknown_argument_is_refused(arguments):
    with pytest.raises(UserError, match=re.escape(arguments[0])):
        run_main({}, *arguments)


def test_an_unknown_argument_exits_1_with_one_line(tmp_path):
    done = run_cli({}, "--hlep", cwd=tmp_path)
    assert done.rc == 1
    assert re.fullmatch(r"train_gpt\.py: error: .*--hlep.*\n", done.stderr)


def test_importing_the_script_runs_nothing(tmp_path):
    code = "import train_gpt; assert not train_gpt.dist.is_initialized()"
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SCRIPT.parent), "NUM_LAYER": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
