"""lab/plan.py: nanochat's formulas, the numbers beside real runs, translations, and bad input."""

import contextlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, cli_env, events, run_cli, tiny_settings
from hypothesis import given, settings
from hypothesis import strategies as st

import keeper
import train_gpt

sys.path.insert(0, str(REPO / "lab"))
import plan
import plan_cost
import plan_dial
import plan_foreign
from metrics import History

TOOL = REPO / "lab" / "plan.py"
NANOCHAT_VOCAB = 32768


def derive(*words: str) -> plan_dial.Deriver:
    """What the words of a command line lead to."""
    deriver = plan.make_deriver(plan.parse_arguments(list(words)))
    deriver.derive()
    return deriver


def texts(*words: str) -> dict[str, str]:
    """The settings that they lead to."""
    return {name: value.text for name, value in derive(*words).values.items()}


def resolved(*words: str) -> train_gpt.Hyperparameters:
    """The same, as train_gpt.py reads them."""
    return plan_dial.resolve(texts(*words))


def of_role(words: dict[str, object]) -> list[str]:
    """Words of a command line, of settings."""
    return [f"{name}={text}" for name, text in words.items()]


# ---- nanochat's dial

TABLE = [  # depth, tokens a step as a power of two, steps, decay: HEAD, ratio 12
    (4, 18, 528, 1.89),
    (6, 18, 1062, 0.94),
    (8, 18, 1920, 0.52),
    (10, 19, 1605, 0.44),
    (12, 19, 2520, 0.28),
    (16, 19, 5376, 0.13),
    (20, 20, 4980, 0.10),
    (24, 20, 8352, 0.060),
    (32, 21, 9600, 0.037),
]


@pytest.mark.parametrize(("depth", "power", "steps", "decay"), TABLE)
def test_the_dial_is_that_of_nanochat(depth, power, steps, decay):
    dim = 64 * depth
    found = texts(f"DEPTH={depth}", f"VOCAB_SIZE={NANOCHAT_VOCAB}", "TARGET_PARAM_DATA_RATIO=12")
    heads = dim // 128
    assert int(found["MODEL_DIM"]) == dim
    assert int(found["NUM_HEADS"]) == int(found["NUM_KV_HEADS"]) == heads
    assert int(found["TRAIN_BATCH_TOKENS"]) == 2**power
    assert int(found["ITERATIONS"]) == steps
    assert float(found["MUON_WD"]) == pytest.approx(decay, rel=0.05)
    assert float(found["MATRIX_LR"]) == pytest.approx(0.02 * 2 ** (power / 2 - 9.5), rel=1e-5)
    scale = 2 ** (power / 2 - 9.5) * (dim / 768) ** -0.5
    assert float(found["EMBED_LR"]) == pytest.approx(0.3 * scale, rel=1e-5)
    assert float(found["HEAD_LR"]) == pytest.approx(0.008 * scale, rel=1e-5)


@pytest.mark.parametrize("depth", [4, 12, 20, 32])
def test_scaling_parameters_are_matrices_and_head(depth):
    dim = 64 * depth
    hp = resolved(f"DEPTH={depth}", f"VOCAB_SIZE={NANOCHAT_VOCAB}")
    matrices = depth * (4 * dim**2 + 2 * dim * 4 * dim)
    assert plan_dial.scaling_params(hp) == matrices + NANOCHAT_VOCAB * dim


@pytest.mark.parametrize("depth", [4, 12, 32])
def test_nanochats_flops_are_its_formula(depth):
    dim, T = 64 * depth, 2048
    hp = resolved(f"DEPTH={depth}", f"VOCAB_SIZE={NANOCHAT_VOCAB}")
    windows = [512 if i % 4 < 3 and i < depth - 1 else T for i in range(depth)]
    products = 6 * (depth * 12 * dim**2 + NANOCHAT_VOCAB * dim)
    assert plan_dial.nanochat_flops(hp) == products + sum(12 * dim * w for w in windows)


def test_the_reference_run_takes_nanochats_1e18_flops():
    hp = resolved("DEPTH=12", f"VOCAB_SIZE={NANOCHAT_VOCAB}", "TARGET_PARAM_DATA_RATIO=12")
    tokens = hp.iterations * hp.train_batch_tokens
    assert plan_dial.nanochat_flops(hp) * tokens == pytest.approx(1.0e18, rel=0.01)


@pytest.mark.parametrize(
    ("depth", "aspect", "head_dim", "dim"),
    [(12, 64, 128, 768), (5, 64, 128, 384), (7, 10, 32, 96), (3, 33.3, 2, 100)],
)
def test_the_width_is_nudged_up_to_whole_heads(depth, aspect, head_dim, dim):
    assert plan_dial.width(depth, aspect, head_dim) == dim


@pytest.mark.parametrize(("T", "window"), [(2048, 512), (1024, 256), (513, 256), (2052, 640)])
def test_the_short_window_is_a_quarter_in_tiles_of_128(T, window):
    assert plan_dial.short_window(T) == window == -(-T // 4 // 128) * 128


def test_a_setting_that_is_given_wins_over_the_dial():
    found = texts("DEPTH=4", "MLP_MULT=3", "MUON_WD=0.5", "TRAIN_BATCH_TOKENS=8192")
    assert (found["MLP_MULT"], found["MUON_WD"]) == ("3", "0.5")
    assert float(found["MATRIX_LR"]) == pytest.approx(0.02 * math.sqrt(8192 / 2**19), rel=1e-5)


def test_the_dial_wins_over_the_config_file(tmp_path):
    (tmp_path / "my.env").write_text("MODEL_DIM=512\nSEED=7\n")
    found = texts("CONFIG=my.env", "DEPTH=4")
    assert (found["MODEL_DIM"], found["SEED"]) == ("256", "7")


@pytest.mark.parametrize(
    "words",
    [
        ["TIE_EMBEDDINGS=1"],
        ["MATRIX_OPTIMIZER=adamw"],
        ["LR_SCHEDULE=cosine"],
        ["LR_WARMUP_RATIO=0.1"],
        ["BASE_WD=0"],
        ["ITERATIONS=12"],
        ["SKIPS=mudd", "LOOP_REPEATS=1", "LOOP_FIRST=1", "LOOP_LAST=2"],
        ["PARALLEL_LAST_N=14", "DEPTH=16"],
        ["BATCH_SCHEDULE=8192@0.5", "TARGET_PARAM_DATA_RATIO=20"],
        ["TARGET_FLOPS=3e13"],
    ],
    ids=" ".join,
)
def test_what_the_dial_gives_is_a_valid_configuration(words, tmp_path):
    deriver = derive("DEPTH=4", *words)
    (tmp_path / "my.env").write_text(plan.dotenv(deriver.values, words))
    hp = train_gpt.load_settings({"CONFIG": "my.env"}, check_places=False)
    told = {name: str(getattr(hp, name.lower())) for name in deriver.values}
    for name, value in deriver.values.items():
        assert told[name] == str(train_gpt.parse_setting(name, value.text))


# ---- how long


def test_the_first_horizon_counts():
    words = ["EPOCHS=3", "TARGET_PARAM_DATA_RATIO=20", "TARGET_FLOPS=1e15", "ITERATIONS=77"]
    deriver = derive("DEPTH=4", *words)
    assert deriver.values["ITERATIONS"].text == "77"
    assert [note.split()[0] for note in deriver.notes] == [
        "TARGET_FLOPS",
        "TARGET_PARAM_DATA_RATIO",
        "EPOCHS",
    ]
    by_flops = texts("DEPTH=4", *words[:-1])["ITERATIONS"]
    by_ratio = texts("DEPTH=4", *words[:-2])["ITERATIONS"]
    assert by_flops == texts("DEPTH=4", "TARGET_FLOPS=1e15")["ITERATIONS"]
    assert by_ratio == texts("DEPTH=4", "TARGET_PARAM_DATA_RATIO=20")["ITERATIONS"]


def test_target_flops_are_counted_as_train_gpt_does():
    hp = resolved("DEPTH=4", "TARGET_FLOPS=1e15")
    total = keeper.flops_per_token(hp) * hp.iterations * hp.train_batch_tokens
    step = keeper.flops_per_token(hp) * hp.train_batch_tokens
    assert abs(total - 1e15) <= step / 2


def test_from_nanochat_counts_flops_as_nanochat_does():
    hp = resolved("--from", "nanochat", "--", "--depth", "4", "--target-flops", "1e15")
    step = plan_dial.nanochat_flops(hp) * hp.train_batch_tokens
    assert hp.iterations == round(1e15 / step)


def test_epochs_are_those_of_the_shards(dataset):
    words = [f"DATA_PATH={dataset.folder}", "TRAIN_BATCH_TOKENS=512", "TRAIN_SEQ_LEN=64"]
    steps = int(texts("EPOCHS=2.5", *words)["ITERATIONS"])
    assert steps == int(2.5 * len(dataset.train) // 512)


def test_without_a_horizon_the_number_of_steps_stays():
    assert "ITERATIONS" not in texts("DEPTH=4")


# ---- beside what train_gpt.py measures


@pytest.fixture
def measured(run, tiny_env):
    """A run with a matrix large enough to be coded, and its settings on a command line."""
    shape = {"MODEL_DIM": 160, "MLP_MULT": 4, "ITERATIONS": 40, "WARMDOWN_ITERS": 20}
    folder = run(**shape)
    return folder, of_role(tiny_env | {name: str(text) for name, text in shape.items()})


def test_parameters_flops_and_bytes_are_those_of_a_run(measured):
    folder, words = measured
    (model,) = events(folder, "model")
    (forecast,) = events(folder, "forecast")
    (final,) = events(folder, "final")
    hp = resolved(*words)
    counts = plan_cost.parameters_by_role(plan_cost.shapes_of(hp))
    made = plan_cost.artifact(hp)
    assert counts.total() == model["parameters"]
    assert keeper.flops_per_token(hp) == model["flops_per_token"]
    assert made.code == forecast["code_bytes"]
    assert abs(made.total - made.code - forecast["artifact_bytes"]) < 100
    assert made.total - made.code == pytest.approx(final["artifact_bytes"], rel=0.02)


def test_a_sample_stands_for_a_model_that_is_too_large(monkeypatch):
    hp = plan_dial.resolve({})
    whole = plan_cost.artifact(hp).total
    monkeypatch.setattr(plan_cost, "WHOLE", 0)
    assert plan_cost.artifact(hp).total == pytest.approx(whole, rel=0.03)


def test_parameters_of_a_baseline_block_are_counted_by_role():
    shapes = plan_cost.shapes_of(plan_dial.resolve({}))
    counts = plan_cost.parameters_by_role(shapes)
    assert counts == {
        plan_cost.EMBEDDING: 1024 * 512,
        plan_cost.ATTENTION: 9 * (2 * 512 * 512 + 2 * 512 * 256),
        plan_cost.MLP: 9 * 2 * 512 * 1024,
        plan_cost.SCALARS: 9 * (8 + 2 * 512 + 2 * 512) + 4 * 512,
    }


@pytest.mark.parametrize("fit", [{}, {"FIT_BUDGET": "sigma", "QUANT_CLIP": "sigma"}])
def test_bytes_by_role_add_up(fit):
    made = plan_cost.artifact(plan_dial.resolve({"NUM_LAYERS": "4", **fit}))
    assert made.total == made.code + sum(made.parts.values())
    assert all(size > 0 for size in made.parts.values())


def test_a_fitted_artifact_fills_the_cap():
    gptq = {"QUANT_METHOD": "gptq", "FIT_BUDGET": "step"}
    made = plan_cost.artifact(plan_dial.resolve(gptq))
    assert 0.999 * made.cap < made.total <= made.cap


MEMORY = {
    "NUM_LAYERS": 4,
    "MODEL_DIM": 256,
    "TRAIN_SEQ_LEN": 256,
    "TRAIN_BATCH_TOKENS": 4096,
    "ITERATIONS": 3,
    "TRAIN_LOG_EVERY": 1,
    "RUN_ID": "it's #1",
}


@pytest.fixture(scope="module")
def planned(dataset, tmp_path_factory):
    """What the tool, as a program, plans for a run, and the run of the file that it prints."""
    folder = tmp_path_factory.mktemp("planned")
    words = of_role(tiny_settings(dataset, folder / "logs", **MEMORY))
    done = run_plan(*words)
    assert done.returncode == 0, done.stderr
    path = folder / "my.env"
    path.write_text(done.stdout)
    ran = run_cli({"CONFIG": str(path)})
    assert ran.rc == 0, ran.stderr
    return done.stderr, ran.stdout, folder / "logs" / "it's #1"


def test_memory_on_a_cpu_is_that_of_a_run(planned):
    """Both are new processes: what other tests have taken is in neither."""
    told, _, folder = planned
    used = max(event["memory_mib"] for event in events(folder, "train"))
    memory = re.search(r"^memory a device +([\d,]+) MiB", told, re.M)
    assert float(memory[1].replace(",", "")) == pytest.approx(used, rel=0.15)


def test_what_the_program_tells_is_what_the_run_of_its_file_logs(planned):
    told, logged, _ = planned
    total = re.search(r"^model_params:(\d+)", logged, re.M)[1]
    flops = re.search(r"^flops_per_token:(\S+)", logged, re.M)[1]
    assert re.search(rf"^parameters +{int(total):,}$", told, re.M)
    assert re.search(rf"^FLOPs a token +{re.escape(flops)}$", told, re.M)
    for label in ("speed", "tokens", "memory a device", "code and artifact", "epochs"):
        assert re.search(f"^{label} ", told, re.M), label


@pytest.mark.parametrize(("batch", "micro", "world"), [(512, 0, 1), (1536, 256, 2), (640, 256, 3)])
def test_a_forward_pass_has_the_rows_of_a_batch(dataset, tmp_path, batch, micro, world):
    words = {"TRAIN_BATCH_TOKENS": batch, "MICRO_BATCH_TOKENS": 0}
    hp = plan_dial.resolve(tiny_settings(dataset, tmp_path, **words))
    hp = train_gpt.replace(hp, micro_batch_tokens=micro)
    run = train_gpt.Run(hp)
    run.world_size = world
    stream = train_gpt.TokenStream("train", run)
    first = next(train_gpt.batches(stream, run))
    assert plan_cost.rows_of(hp, "cpu", world) == len(first[0][0])


def test_the_meter_counts_what_is_alive():
    with plan_cost.Meter() as meter:
        a = torch.zeros(1000)
        b = a + 1
        view = b[10:]
        assert meter.now == 8000
        del a
        assert meter.now == 4000
        c = torch.zeros(500) * 2
        assert meter.most == 8000
        del b, view, c
    assert meter.now == 0


@pytest.mark.parametrize(("ranks", "state"), [(1, 4), (8, 0.5)])
def test_memory_of_an_h100_counts_as_docs_memory_does(ranks, state):
    hp = plan_dial.resolve({})
    need = plan_cost.memory(hp, plan_cost.parse_devices(f"{ranks}xH100"))
    P, M = 17059912, 16515072
    assert need.weights == 10 * P
    assert need.state == pytest.approx(state * M + 2 * state * (P - M), abs=8)
    assert need.update == 14 * M // ranks


def test_memory_is_near_what_an_h200_measured():
    """7,559 MiB: benchmarks/log/2026-11-27_h200_documents.md."""
    need = plan_cost.memory(plan_dial.resolve({}), plan_cost.parse_devices("H200"))
    assert need.total / 2**20 == pytest.approx(7559, rel=0.15)


# ---- speed and money


def history(rates: list[float], versions: str = "world_size:1", **model: object) -> History:
    """A run whose steps, of 1000 tokens, went at these rates."""
    found = History()
    found.add({"event": "start", "versions": versions, "settings": {}})
    if model:
        found.add({"event": "model", **model})
    seconds = 0.0
    for step, rate in enumerate(rates, 1):
        seconds += 1000 / rate
        mean = 1000 * step / seconds
        fields = {"train_time_ms": 1e3 * seconds, "tokens_per_second": mean}
        found.add({"event": "train", "step": step, **fields})
    return found


def test_the_speed_leaves_the_first_ten_steps_out():
    assert plan_cost.steady_rate(history([1.0] * 10 + [500.0] * 5)) == pytest.approx(500)


@pytest.mark.parametrize("rates", [[], [5.0]])
def test_too_short_a_run_has_no_speed(rates):
    assert math.isnan(plan_cost.steady_rate(history(rates)))


def write_run(folder: Path, found: History) -> str:
    """Write a run's metrics."""
    folder.mkdir()
    lines = [json.dumps(event) for event in found.events]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_a_measured_speed_is_scaled_by_flops_and_devices(tmp_path):
    hp = plan_dial.resolve({})
    flops = 3 * keeper.flops_per_token(hp)
    run = history([100.0] * 20, "world_size:2 x", flops_per_token=flops)
    folder = write_run(tmp_path / "r", run)
    speed = plan_cost.measured_speed(hp, folder, plan_cost.parse_devices("8xH100"))
    assert speed.rate == pytest.approx(100 * 3 * 8 / 2)


def test_an_estimated_speed_is_peak_times_mfu_over_flops():
    hp = plan_dial.resolve({})
    devices = plan_cost.parse_devices("8xH100")
    speed = plan_cost.estimated_speed(hp, devices, None, 0.5)
    assert speed.rate == pytest.approx(8 * 989e12 * 0.5 / keeper.flops_per_token(hp))
    assert "assumed" in plan_cost.estimated_speed(hp, devices, None, None).why


def rows(*words: str) -> dict[str, str]:
    """What is said of time and money."""
    deriver = derive(*words)
    hp = resolved(*words)
    speed = plan.find_speed(deriver, hp, plan_cost.parse_devices("cpu"))
    return dict(plan.length_rows(hp, speed, deriver.dial.get("PRICE")))


def test_the_cap_ends_what_is_too_long():
    words = ["TRAIN_BATCH_TOKENS=1024", "ITERATIONS=1000", "SPEED=10240", "PRICE=30"]
    told = rows(*words, "MAX_WALLCLOCK_SECONDS=60")
    assert told["steps"] == "600"
    assert "the cap ends it" in told["steps in the cap"]
    assert told["training time"].endswith("0.50 at 30 an hour")


def test_steps_end_what_is_short_enough():
    words = ["TRAIN_BATCH_TOKENS=1024", "ITERATIONS=300", "SPEED=10240", "PRICE=30"]
    told = rows(*words, "MAX_WALLCLOCK_SECONDS=60")
    assert told["steps"] == "300"
    assert "not reached" in told["steps in the cap"]
    assert told["training time"].endswith("0.25 at 30 an hour")


def test_an_unknown_speed_gives_no_time():
    told = rows("ITERATIONS=300", "PRICE=3")
    assert "training time" not in told
    assert told["cost"].startswith("unknown")


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("8xH100", 8, "H100"),
        ("h100", 1, "H100"),
        ("4", 4, ""),
        ("2xcpu", 2, "cpu"),
        ("NVIDIA H100 80GB HBM3", 1, "H100"),
        ("2xNVIDIA A100-SXM4-80GB", 2, "A100"),
        ("NVIDIA GeForce RTX 4090", 1, "RTX4090"),
    ],
)
def test_devices_are_read(text, count, name):
    devices = plan_cost.parse_devices(text)
    assert (devices.count, devices.name) == (count, name)


# ---- translations


def test_every_flag_of_nanochat_becomes_a_setting_or_a_note():
    for flag in plan_foreign.NANOCHAT:
        words = [f"--{flag}"] if flag == "fp8" else [f"--{flag}", "cpu" if "type" in flag else "3"]
        found = plan_foreign.from_nanochat(words, plan_dial.DIAL)
        told = any(note.startswith(f"--{flag} ") or note == flag for note in found.notes)
        told |= any(note.startswith(f"--{flag}:") for note in found.notes)
        values = [value.why for value in found.values.values()]
        becomes = any(f"--{flag}" in why for why in values)
        names = plan_foreign.NANOCHAT[flag].names
        assert told or becomes or any(name in found.words for name in names), flag


def test_a_nanochat_command_line_becomes_settings():
    start = shlex.split("torchrun --nproc_per_node=8 -m scripts.base_train --")
    flags = shlex.split("--depth=6 --matrix-lr .04 --device-batch-size 16 --eval-every=-1 --run=x")
    deriver = derive("--from", "nanochat", "--", *start, *flags)
    found = {name: value.text for name, value in deriver.values.items()}
    assert deriver.dial["GPUS"] == "8"
    assert found["NUM_LAYERS"] == "6"
    assert found["ITERATIONS"] == "1062"
    assert found["MICRO_BATCH_TOKENS"] == str(16 * 2048)
    assert float(found["MATRIX_LR"]) == pytest.approx(0.04 * 2**-0.5, rel=1e-5)
    assert (found["VAL_LOSS_EVERY"], found["RUN_ID"]) == ("0", "x")
    assert found["MAX_WALLCLOCK_SECONDS"] == "0"


def test_what_nanochat_has_alone_is_named_with_the_reason():
    notes = derive("--from", "nanochat", "--", "--fp8", "--sample-every", "9").notes
    assert any(note.startswith("--fp8: no counterpart: ") for note in notes)
    assert any(note.startswith("--sample-every 9: no counterpart: ") for note in notes)


def test_our_words_win_over_a_translation():
    found = texts("VOCAB_SIZE=1024", "--from", "nanochat", "--", "--depth", "4")
    assert found["VOCAB_SIZE"] == "1024"


SUROGATE_OPTIONS = """
run_name apply_recommended_values num_epochs output_dir checkpoint_dir
resume_from_checkpoint save_steps save_total_limit from_scratch model model_type sequence_len
max_model_len rope_scaling torch_dtype recompute offload_residual offload_master offload_quants
offload_optimizer offload_grads persistent_quants use_zero_copy use_write_combined zero_level
shard_weights shard_gradients use_all_to_all_reduce memcpy_all_gather memcpy_send_recv
distributed.ray_address distributed.num_nodes distributed.gpus_per_node
distributed.worker_output_dir gpus use_cuda_graphs recipe gradient_dtype master_dtype
use_fused_rope fp8_amax_history fp4_backend skip_quant_first_layers skip_quant_last_layers
optimizer learning_rate lr_scheduler_type warmup_ratio warmup_steps cooldown_steps
final_lr_fraction weight_decay max_grad_norm adamw_beta1 adamw_beta2 adamw_epsilon
normuon_momentum normuon_beta2 normuon_cautious_wd per_device_train_batch_size
gradient_accumulation_steps max_steps eval_steps multimodal_on_the_fly datasets
validation_datasets validation_split_ratio train_seed eval_seed dataloader_num_workers
sample_packing path type subset split samples text_field instruction_field output_field
input_field system_prompt_type system_prompt_field system_prompt prompt_format
prompt_format_no_input messages_field system_field tools_field message_property_mappings
lmhead_chunks attn_bwd_chunks init_projections_to_zero lora lora_rank lora_alpha lora_dropout
lora_dtype lora_target_modules train_router adapter_path merge_adapter router_aux_loss_coef
router_z_loss_coef qlora_fp4 qlora_fp8 qlora_bnb qlora_block_size qlora_bnb_block_size
qlora_bnb_double_quant qlora_four_over_six qlora_selective_expert_dequant
qlora_offload_experts use_chat_template template system max_length truncation_strategy
padding_side padding_free loss_scale sequence_parallel_size response_prefix max_pixels
norm_bbox agent_template report_to log_file log_gpu_util wandb_project wandb_name
aim_experiment aim_repo aim_name debug_time_breakdown debug_memory_breakdown
auto_lr_reduction early_stop epoch_adjustment
"""
SUROGATE = SUROGATE_OPTIONS.split()


def test_the_table_has_every_option_of_surogate_once():
    assert sorted(plan_foreign.SUROGATE) == sorted(SUROGATE)
    buckets = (plan_foreign.NATIVE, plan_foreign.ADAPTED, plan_foreign.ABSENT)
    assert sum(map(len, buckets)) == len(SUROGATE)


@pytest.mark.parametrize("name", [n for n, r in plan_foreign.SUROGATE.items() if r.names])
def test_what_surogates_options_become_is_there(name):
    known = {*plan_dial.DIAL, *train_gpt.FIELDS}
    assert known.issuperset(plan_foreign.SUROGATE[name].names)


@pytest.fixture
def surogate(tmp_path):
    """Translate the lines of a Surogate file; the deriver."""
    pytest.importorskip("yaml", reason="PyYAML is not installed")

    def translate(content: str, *words: str) -> plan_dial.Deriver:
        (tmp_path / "c.yaml").write_text(content)
        return derive(*words, "--from", "surogate", "c.yaml")

    return translate


def test_a_surogate_file_becomes_settings(surogate):
    content = """
max_steps: 1000
sequence_len: 2048
learning_rate: 2e-4
lr_scheduler_type: cosine
warmup_ratio: 0.03
lora: true
distributed:
  num_nodes: 2
  gpus_per_node: 8
"""
    deriver = surogate(content)
    found = {name: value.text for name, value in deriver.values.items()}
    assert found["ITERATIONS"] == "1000"
    assert found["TRAIN_BATCH_TOKENS"] == str(2 * 4 * 2048 * 16)
    assert found["MICRO_BATCH_TOKENS"] == str(2 * 2048)
    assert float(found["MATRIX_LR"]) == float(found["TIED_EMBED_LR"]) == 2e-4
    assert (found["LR_SCHEDULE"], found["LR_WARMUP_RATIO"]) == ("cosine", "0.03")
    assert (found["MATRIX_OPTIMIZER"], found["BETA2"]) == ("adamw", "0.999")
    assert any(note.startswith("lora True: no counterpart: ") for note in deriver.notes)
    assert plan_dial.resolve(found).iterations == 1000


@pytest.mark.parametrize(
    ("content", "frac"), [("wsd", "0.1"), ("linear", "1"), ("linear\nwarmup_ratio: 0.25", "0.75")]
)
def test_surogates_schedules_fall_where_its_do(surogate, content, frac):
    found = surogate(f"max_steps: 100\nlr_scheduler_type: {content}\n").values
    assert found["WARMDOWN_FRAC"].text == frac


def test_a_cooldown_is_a_warmdown(surogate):
    found = surogate("max_steps: 100\ncooldown_steps: 30\n").values
    assert found["WARMDOWN_ITERS"].text == "30"
    assert "WARMDOWN_FRAC" not in found


def test_tabs_in_a_surogate_file_are_blanks(surogate):
    assert surogate("max_steps: 9\ndatasets:\n  - path: x\n\ttype: text\n").values


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("learning_rat: 1\n", "did you mean learning_rate?"),
        ("learning_rate: fast\n", "expected a number"),
        ("sequence_len: [1]\n", "expected a number"),
        ("max_steps: .nan\n", "expected a number"),
        ("a: b: c\n", "not YAML"),
        ("", "expected options"),
        ("- 1\n", "expected options"),
    ],
)
def test_a_bad_surogate_file_is_told(surogate, content, said):
    with pytest.raises(plan_dial.PlanError, match=re.escape(said)):
        surogate(content)


def test_a_recipe_that_is_not_here_is_named(surogate):
    notes = surogate("max_steps: 9\nrecipe: fp8_hybrid\n").notes
    assert any(note.startswith("recipe fp8_hybrid: no counterpart: ") for note in notes)


# ---- the program


def run_plan(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run the tool as a program that sees nothing of this environment."""
    command = [sys.executable, str(TOOL), *words]
    return subprocess.run(
        command, env=cli_env({}), cwd=cwd, capture_output=True, encoding="utf-8", timeout=120
    )


@pytest.mark.parametrize(
    ("words", "rc", "said"),
    [
        ([], 2, "nothing to plan"),
        (["DEPT=4"], 2, "did you mean DEPTH?"),
        (["NUM_LAYER=4"], 2, "did you mean NUM_LAYERS?"),
        (["depth=4"], 2, "did you mean DEPTH?"),
        (["DEPTH"], 2, "expected NAME=VALUE"),
        (["--dept"], 2, "expected NAME=VALUE"),
        (["DEPTH=0"], 2, "a whole number from 1"),
        (["DEPTH=x"], 2, "a whole number from 1"),
        (["DEPTH=4", "TARGET_FLOPS=inf"], 2, "a number over 0"),
        (["DEPTH=4", "SPEED=nan"], 2, "a number over 0"),
        (["DEPTH=4", "SEED=-1"], 2, "expected a whole number"),
        (["DEPTH=4", "GPUS=8xH10"], 2, "no such kind"),
        (["DEPTH=4", "GPUS=0"], 2, "expected 1 or more"),
        (["HEAD_DIM=64"], 2, "needs DEPTH"),
        (["DEPTH=4", "--explain"], 2, "expected a name"),
        (["DEPTH=4", "--explain", "MUON_W"], 2, "did you mean MUON_WD?"),
        (["--from"], 2, "expected nanochat or surogate"),
        (["--from", "llmc"], 2, "expected nanochat or surogate"),
        (["--from", "surogate"], 2, "expected a YAML file"),
        (["DEPTH=4", "--", "x"], 2, "only --from nanochat"),
        (["--from", "nanochat", "--", "--dept", "4"], 2, "did you mean depth?"),
        (["--from", "nanochat", "--", "--depth"], 2, "expected a value"),
        (["--from", "nanochat", "--", "--depth", "x"], 2, "a whole number"),
        (["--from", "nanochat", "--", "--eval-every", "x"], 2, "expected a number"),
        (["DEPTH=100000"], 1, "NUM_LAYERS=100000"),
        (["DEPTH=4", "NUM_HEADS=7"], 1, "not divisible"),
        (["DEPTH=4", "EPOCHS=1"], 1, "no fineweb_train_"),
        (["DEPTH=4", "TARGET_FLOPS=1"], 1, "under one step"),
        (["DEPTH=4", "RUN=nowhere"], 1, "no metrics.jsonl"),
        (["CONFIG=nowhere"], 1, "cannot be read"),
        (["--from", "surogate", "nowhere"], 1, "cannot be read"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_bad_input_is_told_and_prints_no_file(words, rc, said, capsys):
    assert plan.main(words) == rc
    out, told = capsys.readouterr()
    assert out == ""
    assert told.startswith("plan.py: error: ")
    assert said in told


def test_an_unknown_name_in_a_config_file_is_told(tmp_path, capsys):
    (tmp_path / "my.env").write_text("NUM_LAYER=3\n")
    assert plan.main(["CONFIG=my.env"]) == 1
    assert "did you mean NUM_LAYERS?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "no event 'start'"), ('{"event": "start", "versions": ""}\n', "no two train events")],
)
def test_a_run_without_a_speed_is_told(tmp_path, capsys, content, said):
    (tmp_path / "metrics.jsonl").write_text(content)
    assert plan.main(["NUM_LAYERS=2", f"RUN={tmp_path}"]) == 1
    out, told = capsys.readouterr()
    assert (out, said in told) == ("", True)


def test_a_damaged_shard_is_told(tmp_path, capsys):
    (tmp_path / "fineweb_train_000000.bin").write_bytes(b"x")
    assert plan.main(["EPOCHS=1", f"DATA_PATH={tmp_path}"]) == 1
    assert "not a token shard" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("MUON_WD", "BASE_WD x sqrt(131072 / 2^19) x N12 / N"),
        ("NUM_LAYERS", "NUM_LAYERS=4\n  DEPTH"),
        ("SEED", "train_gpt.py's default"),
        ("BASE_WD", "not given"),
        ("MLP_MULT", "MLP_MULT=3\n  given"),
    ],
)
def test_a_value_is_explained(name, said, capsys):
    assert plan.main(["DEPTH=4", "MLP_MULT=3", "--explain", name]) == 0
    assert said in capsys.readouterr().out


def test_help_names_every_option(capsys):
    assert plan.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in plan_dial.DIAL)


def test_an_output_that_closes_early_ends_without_a_word():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(TOOL), "DEPTH=2", "HEAD_DIM=64", "--explain", "MODEL_DIM"]
    done = subprocess.run(command, env=cli_env({}), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@settings(max_examples=60)
@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_words_are_read_or_refused(words):
    with contextlib.suppress(plan_dial.PlanError):
        plan.make_deriver(plan.parse_arguments(words))


@settings(max_examples=60)
@given(st.lists(st.sampled_from([*(f"--{n}" for n in plan_foreign.NANOCHAT), "--", "3", "x=", ""])))
def test_any_nanochat_words_are_read_or_refused(words):
    with contextlib.suppress(plan_dial.PlanError):
        plan.make_deriver(plan.Request([], [], "nanochat", "", words))


@settings(max_examples=60)
@given(st.text(max_size=20))
def test_any_devices_are_read_or_refused(text):
    with contextlib.suppress(plan_dial.UsageError):
        assert plan_cost.parse_devices(text).count >= 1


@settings(max_examples=40)
@given(st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=20))
def test_any_text_comes_through_the_file(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("d") / "my.env"
    values = {"OUT_DIR": plan_dial.Value(text, "given\nagain", "given")}
    path.write_text(plan.dotenv(values, [f"OUT_DIR={text}"]), encoding="utf-8", newline="")
    assert train_gpt.read_dotenv(str(path)) == {"OUT_DIR": text}
