"""benchmarks/run.py, its subjects and measure.py: log lines, FLOPs, comparisons, parts."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import keeper
import train_gpt as tg

BENCHMARKS = Path(tg.__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_kit  # noqa: E402
import measure  # noqa: E402
import run as benchmark  # noqa: E402
import run_compare  # noqa: E402
import run_machine  # noqa: E402
import run_process  # noqa: E402
import run_scaling  # noqa: E402

LOG = """
starting up
step:0/4 val_loss:6.9000 val_bpb:4.0000 train_time:0ms step_avg:0.02ms
step:1/4 train_loss:6.9 train_time:90ms step_avg:90.20ms tok_s:11
step:2/4 train_loss:6.8 lr:0.1 train_time:100ms step_avg:50.10ms
step:3/4 train_loss:nan train_time:112ms step_avg:37.34ms
step:4/4 train_loss:6.6 train_time:124ms step_avg:31.02ms
step:4/4 val_loss:6.6000 val_bpb:3.5000 train_time:124ms step_avg:31.02ms
peak memory allocated: 10184 MiB reserved: 10588 MiB
step:five/4 train_loss:6.6 train_time:1ms
"""

FAKE = """
import os, sys, time
steps, ms = int(os.environ["ITERATIONS"]), float(os.environ.get("STEP_MS", "10"))
assert os.environ["TRAIN_LOG_EVERY"] == "1"
assert os.path.isabs(os.environ["DATA_PATH"]) and not os.listdir(".")
every = int(os.environ["VAL_LOSS_EVERY"])
for step in range(steps + 1):
    if step:
        print(f"step:{step}/{steps} train_loss:5.0 train_time:{1e3 + ms * step:.0f}ms", flush=True)
    if step == steps or (every and step % every == 0):
        bpb = 4 - float(os.environ.get("GAIN", "0.1")) * step
        print(f"step:{step}/{steps} val_loss:5 val_bpb:{bpb} train_time:{ms * step:.0f}ms")
time.sleep(float(os.environ.get("HOLD", "0")))
with open(os.path.join(os.environ["OUT_DIR"], "left"), "w") as file:
    file.write("x")
"""


def timed(text: str) -> list[tuple[float, str]]:
    """Lines as they would be seen, one a second."""
    return [*enumerate(text.splitlines())]


def test_step_times_are_differences_without_the_first():
    assert run_process.parse_log(timed(LOG))["step_ms"] == pytest.approx([11.82, 12.06])


def test_a_step_average_of_something_else_is_not_used():
    lines = LOG.replace("step_avg:37.34ms", "step_avg:12.00ms")
    assert run_process.parse_log(timed(lines))["step_ms"] == pytest.approx([11.8, 12.08])


def test_steps_between_logged_ones_share_the_time():
    lines = "\n".join(f"step:{s}/9 train_loss:1 train_time:{t}ms" for s, t in ((1, 5), (2, 9)))
    lines += "\nstep:6/9 train_loss:1 train_time:49ms"
    assert run_process.parse_log(timed(lines))["step_ms"] == [10.0]


def test_validations_peak_memory_and_the_first_step_are_read():
    found = run_process.parse_log(timed(LOG))
    assert [(step, bpb) for step, _, bpb in found["val"]] == [(0, 4.0), (4, 3.5)]
    assert found["script_gpu_mib"] == 10184
    assert found["first_step_s"] == 3


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"bigram_buckets": 64, "bigram_dim": 24},
        {"tie_embeddings": 0, "mlp_mult": 2.6},
        {"num_kv_heads": 4, "num_layers": 3, "train_seq_len": 8},
        {"loop_repeats": 2, "loop_first": 1, "loop_last": 1, "skips": "mudd"},
        {"sparse_attn_gate": 12, "channel_gains": 0},
    ],
)
def test_flops_are_those_that_torch_counts(changed):
    """torch counts attention to all T keys, and a causal one has (T + 1)/2 on the mean."""
    small = {"vocab_size": 96, "num_layers": 2, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2}
    hp = tg.Hyperparameters(**{**small, "train_seq_len": 16, **changed})
    T, counter = hp.train_seq_len, FlopCounterMode(display=False)
    inputs, targets = torch.randint(96, (2, 3, T), generator=torch.Generator().manual_seed(0))
    model = random_model(hp)
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(inputs, targets).sum()
        forward = counter.get_total_flops()
        loss.backward()
    masked = 4 * len(model.visits) * hp.model_dim * (T - (T + 1) / 2)
    assert forward == 3 * T * (measure.flops_per_token(hp, forward_only=True) + masked)
    assert counter.get_total_flops() == 3 * T * (measure.flops_per_token(hp) + 3 * masked)


def test_a_window_leaves_the_keys_that_its_mask_has():
    hp = tg.Hyperparameters(num_layers=4, train_seq_len=9, window_pattern="SL", window_tokens=4)
    mask = torch.ones(9, 9).tril().triu(-3)
    keys = [2 * (mask.sum() / 9), 2 * (9 + 1) / 2]
    assert measure.attention_flops_per_token(hp) == pytest.approx(4 * 512 * float(sum(keys)))


def test_the_keeper_counts_the_same_flops():
    hp = tg.Hyperparameters(num_layers=5, loop_repeats=2, loop_first=1, loop_last=2, skips="mudd")
    hp = dataclasses.replace(hp, window_pattern="SSL", window_tokens=40, sparse_attn_gate=12)
    assert measure.flops_per_token(hp) == pytest.approx(keeper.flops_per_token(hp))


def test_time_inside_another_part_counts_once(monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 111.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    watch = measure.Stopwatch(lambda: None)
    watch.timed("outer", lambda: watch.timed("inner", lambda: None)())()
    assert watch.seconds == {"outer": 101.0, "inner": 10.0}


def test_a_part_that_a_step_does_not_have_counts_as_nothing_in_its_mean():
    means = measure.mean_parts([{"forward": 1.0, "data": 0.5}, {"forward": 3.0}])
    others = {"backward": 0.0, "optimizer": 0.0, "communication": 0.0, "other": 0.0}
    assert means == {"data": 250.0, "forward": 2000.0, **others}


def test_bpb_is_compared_after_equal_tokens_and_after_equal_seconds():
    a = np.array([[0, 0, 4.0], [100, 10, 3.0], [200, 20, 2.0]])
    b = np.array([[0, 0, 4.0], [100, 5, 3.5], [150, 16, 1.0]])
    found = run_compare.bpb_at_equal(a, b)
    assert found["bpb_tokens"] == (3.0, 3.5)
    assert found["bpb_seconds"] == pytest.approx((2.4, 1.0))


def test_bpb_after_equal_seconds_is_not_guessed_from_the_last_validation_alone():
    found = run_compare.bpb_at_equal(np.array([[100, 10, 3.0]]), np.array([[100, 5, 3.5]]))
    assert found == {"bpb_tokens": (3.0, 3.5), "bpb_seconds": (None, None)}


@pytest.fixture
def fake(tmp_path) -> Path:
    """A script that prints log lines and trains nothing."""
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return path


@pytest.fixture
def compare(fake, tmp_path, monkeypatch, capsys):
    """Run the tool on the fake script with a ceiling of 2 TFLOP/s: its report and its output."""
    monkeypatch.setattr(run_process, "worker", lambda *_: {"tflops": 2.0})

    def start(*arguments: str) -> tuple[dict, str]:
        out = tmp_path / "results" / "found.json"
        benchmark.main(["--script", str(fake), "--out", str(out), "--steps", "6", *arguments])
        return json.loads(out.read_text()), capsys.readouterr().out

    return start


def test_two_settings_run_in_turn_and_give_their_ratio(compare):
    report, said = compare("VAL_LOSS_EVERY=3", "--vs-env", "STEP_MS=20", "--vs-env", "GAIN=0.2")
    assert [line[:10] for line in said.splitlines()[:4]] == [
        *("round 1, A", "round 1, B", "round 2, A", "round 2, B")
    ]
    assert "| step, ms | 10 (10 to 10) | 20 (20 to 20) | 2.0000: 2.0000 2.0000 |" in said
    assert "| BPB after equal tokens | 3.4000 (3.4000 to 3.4000) | 2.8000 " in said
    assert "| BPB after equal seconds | 3.4000 (3.4000 to 3.4000) | 3.4000 " in said
    figures = report["results"]["figures"]
    assert figures[0][0]["tokens_per_s"] == 524288 / 0.01
    flops = measure.flops_per_token(tg.Hyperparameters())
    assert figures[1][1]["mfu"] == pytest.approx(100 * 524288 / 0.02 * flops / 2e12)


def test_tokens_and_mfu_are_of_the_batch_of_each_side(compare):
    report, _ = compare("TRAIN_BATCH_TOKENS=2048", "--vs-env", "TRAIN_BATCH_TOKENS=4096")
    rates = [side[0]["tokens_per_s"] for side in report["results"]["figures"]]
    assert rates == [204_800, 409_600]


def test_another_script_runs_under_the_settings_of_the_file(compare, fake, tmp_path):
    other, env = tmp_path / "other.py", tmp_path / "b.env"
    other.write_text("import os\nassert os.environ['SECRET'] == 'a b'\n" + FAKE)
    env.write_text("SECRET='a b'\nSTEP_MS=5")
    report, said = compare("--vs", str(other), "--vs-env", str(env), "--rounds", "1")
    assert "| 0.5000: 0.5000 |" in said
    assert [Path(side["script"]) for side in report["sides"].values()] == [fake, other]


def test_the_report_tells_machine_command_and_raw_times(compare):
    report, _ = compare("--rounds", "1", "SEED=7", "--vs-env", "HOLD=0.3")
    assert report["results"]["runs"][0][0]["step_ms"] == [10.0] * 4
    assert report["command"][-2:] == ["--vs-env", "HOLD=0.3"]
    assert report["sides"]["A"]["settings"]["SEED"] == "7"
    assert {"cpu", "cores", "threads", "memory_gib", "torch", "python", "date"} <= {
        *report["machine"]
    }
    assert 1 < report["results"]["figures"][1][0]["host_mib"] < 100


def test_what_is_given_wins_over_the_environment_and_that_over_the_config(
    compare, tmp_path, monkeypatch
):
    config = tmp_path / "a.env"
    config.write_text("SEED=1\nNUM_LAYERS=3\nMLP_MULT=3")
    monkeypatch.setenv("SEED", "2")
    monkeypatch.setenv("NUM_LAYERS", "4")
    report, _ = compare("--rounds", "1", "--config", str(config), "NUM_LAYERS=5", "ITERATIONS=9")
    settings = report["sides"]["A"]["settings"]
    names = ("MLP_MULT", "SEED", "NUM_LAYERS", "ITERATIONS", "VAL_LOSS_EVERY")
    assert [settings[name] for name in names] == ["3.0", "2", "5", "9", "0"]


def test_a_failing_script_shows_what_it_said(compare, fake):
    fake.write_text("import sys\nprint('warming up')\nsys.exit('no kernel for this')")
    with pytest.raises(run_process.BenchmarkError, match=r"code 1[^$]*warming up\n.*no kernel"):
        compare()


def test_a_script_without_log_lines_is_refused(compare, fake):
    fake.write_text("print('step 1, loss 3.0')")
    with pytest.raises(run_process.BenchmarkError, match="TRAIN_LOG_EVERY"):
        compare()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["NUM_LAYERZ=2"], "did you mean|no such setting"),
        (["SECRET=2"], "no such setting"),
        (["--vs", "nowhere.py"], "nowhere.py"),
        (["--config", "nowhere.env"], "nowhere.env"),
    ],
)
def test_wrong_arguments_are_named(arguments, problem, tiny_env, tmp_path):
    places = [f"{name}={tiny_env[name]}" for name in ("DATA_PATH", "TOKENIZER_PATH")]
    with pytest.raises(tg.UserError, match=problem):
        benchmark.main([*places, *arguments, "--out", str(tmp_path / "a.json")])


@pytest.mark.parametrize("arguments", [["--steps", "2"], ["--rounds", "0"], ["what"]])
def test_an_impossible_command_line_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert "error:" in capsys.readouterr().err


@pytest.fixture
def here(tiny_env, monkeypatch):
    """Have measure.py's work done in this process, on the tiny settings, with a known ceiling."""

    def worker(kind: str, settings: dict[str, str], nproc: int = 1) -> dict:
        places = {"OUT_DIR": tiny_env["OUT_DIR"], "RUN_ID": kind}
        hp = tg.load_settings(settings | places)
        return {"tflops": 2.0} if kind == "ceiling" else getattr(measure, kind)(hp)

    monkeypatch.setattr(run_process, "worker", worker)
    kept = [f"{n}={text}" for n, text in tiny_env.items() if n not in ("OUT_DIR", "RUN_ID")]
    return [*kept, "ITERATIONS=3"]


def found_by(arguments: list[str], out: Path) -> dict:
    """What the tool writes into the JSON file."""
    benchmark.main([*arguments, "--out", str(out)])
    return json.loads(out.read_text())["results"]


def test_the_breakdown_adds_up(here, tmp_path, capsys):
    found = found_by([*here, "--breakdown"], tmp_path / "b.json")
    assert sum(found["percent"].values()) == pytest.approx(100)
    parts = {"data", "forward", "backward", "optimizer", "other"}
    assert [step.keys() == parts and min(step.values()) > 0 for step in found["steps"]] == [
        True
    ] * 3
    assert found["ms"]["communication"] == 0
    assert f"| evaluation of {found['evaluation_tokens']:,} tokens |" in capsys.readouterr().out


def test_the_breakdown_sees_communication(tiny_env, tmp_path):
    kept = [f"{n}={text}" for n, text in tiny_env.items() if n not in ("OUT_DIR", "RUN_ID")]
    found = found_by([*kept, "ITERATIONS=3", "--breakdown", "--nproc", "2"], tmp_path / "b.json")
    assert found["ms"]["communication"] > 0


def test_a_part_that_is_no_longer_called_is_missed(here, tmp_path, monkeypatch):
    monkeypatch.setattr(tg.Trainer, "step", lambda self, *_: next(self.feed))
    with pytest.raises(tg.UserError, match="backward"):
        benchmark.main([*here, "--breakdown", "--out", str(tmp_path / "b.json")])


def test_ways_of_scoring_are_compared(here, tmp_path, monkeypatch, capsys):
    scored, score = [], tg.score

    def watched(model, val, run):
        scored.append((run.hp.eval_stride, run.hp.eval_doc_isolated, run.forward_rows))
        return score(model, val, run)

    monkeypatch.setattr(tg, "score", watched)
    found = found_by([*here, "EVAL_STRIDE=8", "--evaluation"], tmp_path / "e.json")
    rows = scored[0][2]
    assert rows > 1
    cases = [(0, 0, rows), (8, 0, rows), (8, 1, rows), (8, 0, 1)]
    assert scored == [case for case in cases for _ in range(2)]
    costs = {n: found["tokens_per_s"]["plain"] / rate for n, rate in found["tokens_per_s"].items()}
    said = capsys.readouterr().out
    assert f"one at a time | {measure.number(found['tokens_per_s']['loop'])} tokens/s, " in said
    assert f", {measure.number(costs['sliding'])} plain passes |" in said


def test_the_first_tokens_are_a_stream_of_their_own():
    val = SimpleNamespace(tokens=np.arange(90), starts=np.array([0, 40, 90]), text_bytes=7)
    part = measure.first_tokens(val, 50)
    assert part.tokens.tolist() == list(range(50))
    assert part.starts.tolist() == [0, 50]
    assert (len(val.tokens), part.text_bytes) == (90, 7)


def test_the_ceiling_is_of_the_fastest_shape(monkeypatch):
    monkeypatch.setattr(measure, "matmul_tflops", lambda run, rows, inner, cols: inner / 1e3)
    hp = tg.Hyperparameters(device="cpu", dtype="fp32")
    found = measure.ceiling(hp)
    assert (found["tflops"], found["shape"], found["dtype"]) == (
        2.048,
        "4096x2048x512",
        "torch.float32",
    )


def test_a_problem_ends_the_program_with_one_line(tmp_path):
    command = [sys.executable, BENCHMARKS / "run.py", "--vs", "nowhere.py", "--script", __file__]
    command += ["--out", tmp_path / "a.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "run.py: error: nowhere.py: no such script\n")


def test_scaling_draws_what_it_finds(compare, monkeypatch, tmp_path):
    sweeps = {"context": ("TRAIN_SEQ_LEN", [512, 1000]), "width": ("MODEL_DIM", [256, 1024])}
    monkeypatch.setattr(run_scaling, "SWEEPS", sweeps)
    report, said = compare("--scaling")
    assert (tmp_path / "results" / "found.png").read_bytes().startswith(b"\x89PNG")
    assert [point["value"] for point in report["results"]["width"]] == [256, 1024]
    assert "| context | 512 | 10 |" in said


def test_a_point_of_scaling_that_fails_says_why(compare, fake, monkeypatch):
    monkeypatch.setattr(run_scaling, "SWEEPS", {"depth": ("NUM_LAYERS", [3, 6])})
    failing = "import os, sys\nif os.environ['NUM_LAYERS'] == '6': sys.exit('out of memory')\n"
    fake.write_text(failing + FAKE)
    report, said = compare("--scaling")
    assert "out of memory" in report["results"]["depth"][1]["problem"]
    assert "| depth | 6 | failed |" in said


def test_a_wider_model_has_more_heads():
    base = {"MODEL_DIM": "512", "NUM_HEADS": "8", "NUM_KV_HEADS": "4"}
    changed = run_scaling.scaling_settings(base, "MODEL_DIM", 768)
    assert (changed["NUM_HEADS"], changed["NUM_KV_HEADS"]) == ("12", "6")


def test_memory_of_all_processes_is_added(tmp_path):
    """A process and its child hold 64 MiB each; this one holds more than both."""
    script = tmp_path / "hold.py"
    child = "import subprocess, sys\nif sys.argv[2:]: subprocess.Popen([*sys.orig_argv[:3]])\n"
    script.write_text(child + "import time\nn = 2**26\nx = b'x' * n\ntime.sleep(0.7)\n")
    one, two = (
        run_process.execute(script, arguments, {}, 1)["host_mib"]
        for arguments in (["a"], ["a", "b"])
    )
    assert 64 < one < 100
    assert 128 < two < 200


NVIDIA_SMI = """#!/bin/sh
if [ -e "{known}" ]; then cat "{known}"; else echo "{unknown}"; fi
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A program of that name which first tells a word, and then what is written to a file."""

    def make(unknown: str) -> Path:
        program, known = tmp_path / "bin" / "nvidia-smi", tmp_path / "known"
        program.parent.mkdir()
        program.write_text(NVIDIA_SMI.format(known=known, unknown=unknown))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        return known

    return make


@pytest.mark.parametrize("answer", ["[N/A]", "[Not Supported]", "Unable to determine the device"])
def test_a_gpu_that_does_not_tell_its_memory_ends_no_measurement(answer, fake, nvidia_smi):
    nvidia_smi(answer)
    settings = {"ITERATIONS": "3", "TRAIN_LOG_EVERY": "1", "DATA_PATH": "/", "VAL_LOSS_EVERY": "0"}
    settings |= {"HOLD": "0.3"}
    found = run_process.execute(fake, [], settings, 1)
    assert found["smi_gpu_mib"] is None
    assert found["host_mib"] > 1


def test_a_gpu_that_ceases_to_tell_its_memory_keeps_its_peak(nvidia_smi):
    known = nvidia_smi("[N/A]")
    known.write_text("100\n")
    watch = run_machine.MemoryWatch(1, run_machine.memory_used())
    known.write_text("350\n")
    while watch.gpu != 250:
        assert watch.is_alive()
    known.write_text("[N/A]\n")
    time.sleep(1.3)
    assert watch.is_alive()
    watch.end()
    assert watch.gpu == 250


def test_a_missing_nvidia_smi_tells_of_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_machine.memory_used() == []
    assert gpu_kit.git("status") is None


def test_what_a_script_prints_is_shown_as_it_comes_if_asked(fake, capfd):
    fake.write_text("import sys\nprint('step:1/2')\nsys.exit('no kernel for this')")
    with pytest.raises(run_process.BenchmarkError, match="no kernel for this") as caught:
        run_process.execute(fake, [], {}, 1, echo=True)
    assert [line for _, line in caught.value.lines] == ["step:1/2", "no kernel for this"]
    assert capfd.readouterr().out == "step:1/2\nno kernel for this\n"


@pytest.mark.parametrize("choice", ["0", "1"])
def test_a_model_is_compiled_as_train_gpt_does_it(choice, tiny_env):
    hp = tg.load_settings(tiny_env | {"COMPILE": choice})
    forward = measure.prepare(hp, training=False)[2]
    assert isinstance(forward, keeper.Compiled) == (choice == "1")


def test_ways_of_scoring_are_told_one_by_one(tiny_env):
    told: list[list[str]] = []
    hp = tg.load_settings(tiny_env | {"VAL_TOKENS": "300"})
    measure.evaluation(hp, lambda found: told.append([*found["tokens_per_s"]]))
    assert told[0] == ["plain"]
    assert told[3] == ["plain", "sliding", "documents", "loop"]


def test_the_start_of_training_is_no_comparison():
    a, b = np.array([[0, 0, 4.0], [100, 10, 3.0]]), np.array([[0, 0, 4.0], [99, 5, 3.5]])
    assert run_compare.bpb_at_equal(a, b)["bpb_tokens"] == (None, None)


def test_each_measurement_has_a_line_and_a_file():
    table = (BENCHMARKS / "README.md").read_text()
    links = re.findall(r"^\| \d{4}-\d\d-\d\d \| \[[^]]+\]\(log/([^)]+)\)", table, re.M)
    assert sorted(links) == sorted(path.name for path in (BENCHMARKS / "log").iterdir())
