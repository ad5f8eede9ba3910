"""records/submit.py: what it packs, by the runs' own files; what it refuses; the packed folder."""

import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import REPO, SCRIPT, run_cli, snapshot, tiny_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt

import train_gpt

sys.path.insert(0, str(REPO / "records"))
import submit

CAP = 16_000_000
OPTIONS = {
    "--name": "Two seeds",
    "--author": "Ann Example",
    "--github-id": "ann-example",
    "--track": "non_record_16mb",
    "--date": "2026-11-21",
}
FOLDER = Path("records/track_non_record_16mb/2026-11-21_Two_seeds")

# ===================================== real runs =====================================


@pytest.fixture(scope="module")
def packed(dataset, tmp_path_factory):
    """A repository with two real runs, packed by the program with the first one's artifact."""
    root = tmp_path_factory.mktemp("repository")
    data, tokenizer = root / "data/datasets/tiny", root / "data/tokenizers/tiny.model"
    shutil.copytree(dataset.folder, data)
    tokenizer.parent.mkdir()
    shutil.copy(dataset.tokenizer, tokenizer)
    shutil.copy(REPO / "requirements.txt", root)
    for seed in (7, 3):
        env = tiny_settings(dataset, root / "logs", RUN_ID=f"seed{seed}", SEED=seed)
        env |= {"DATA_PATH": "./data/datasets/tiny", "TOKENIZER_PATH": str(tokenizer)}
        assert run_cli(env | {"OUT_DIR": "logs", "VAL_LOSS_EVERY": "2"}, cwd=root).rc == 0
    return root, run_program(root, "seed7", "seed3")


def run_program(root: Path, *runs: str) -> subprocess.CompletedProcess:
    """Pack runs by the program, with the first one's artifact."""
    words = [word for pair in OPTIONS.items() for word in pair]
    command = [sys.executable, REPO / "records/submit.py", *runs, *words]
    command += ["--with-artifact", "--logs", root / "logs", "--root", root]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (root / FOLDER).is_dir(), done.stderr
    return done


def finals(root: Path) -> dict[str, dict]:
    """The final events of the two runs, from their metrics."""
    paths = {seed: root / f"logs/seed{seed}/metrics.jsonl" for seed in ("7", "3")}
    return {seed: json.loads(p.read_text().splitlines()[-1]) for seed, p in paths.items()}


def facts(root: Path) -> dict:
    """The submission.json that was packed."""
    return json.loads((root / FOLDER / "submission.json").read_text())


def run_line(root: Path, wanted: str) -> str:
    """Run the line of the packed README that holds `wanted`, in the folder; what it prints."""
    lines = [line.strip() for line in (root / FOLDER / "README.md").read_text().splitlines()]
    line = next(line for line in lines if wanted in line and line.endswith("train_gpt.py"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"PATH": path, "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, shell=True, cwd=root / FOLDER, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def test_the_script_is_packed_byte_for_byte(packed):
    assert (packed[0] / FOLDER / "train_gpt.py").read_bytes() == SCRIPT.read_bytes()


def test_the_score_is_the_mean_of_the_runs(packed):
    scores = [final["val_bpb"] for final in finals(packed[0]).values()]
    assert facts(packed[0])["val_bpb"] == pytest.approx(sum(scores) / 2, abs=1e-8)


def test_the_scores_of_the_seeds_are_those_of_the_runs(packed):
    seeds = facts(packed[0])["seed_results"]
    wanted = {s: (e["val_bpb"], e["val_loss"]) for s, e in finals(packed[0]).items()}
    found = {s: (row["val_bpb"], row["val_loss"]) for s, row in seeds.items()}
    assert found == {s: pytest.approx(values, abs=1e-8) for s, values in wanted.items()}


def test_sizes_are_those_of_the_files(packed):
    sizes = {s: (packed[0] / f"logs/seed{s}/final_model.artifact").stat().st_size for s in "73"}
    found = {s: row["artifact_bytes"] for s, row in facts(packed[0])["seed_results"].items()}
    total = SCRIPT.stat().st_size + max(sizes.values())
    assert (found, facts(packed[0])["bytes_total"]) == (sizes, total)


def test_the_logs_are_packed_whole(packed):
    root = packed[0]
    for seed in "73":
        log = (root / FOLDER / f"train_seed{seed}.log").read_bytes()
        assert log == (root / f"logs/seed{seed}.txt").read_bytes()


def test_the_static_audit_accepts_the_folder(packed):
    assert packed[1].returncode == 0, packed[1].stdout + packed[1].stderr


def test_the_report_of_the_audit_is_shown(packed):
    assert re.search(r"\bPASS\b", packed[1].stdout)


def test_submission_json_is_valid_by_the_schema(packed):
    schema = json.loads((REPO / "records/submission.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(facts(packed[0]))


def test_the_packed_folder_trains_to_the_same_score(packed):
    printed = run_line(packed[0], "SEED=3")
    bpb = re.search(r"^final_.* val_bpb:(\S+)$", printed, re.M)[1]
    assert float(bpb) == facts(packed[0])["seed_results"]["3"]["val_bpb"]


def test_the_packed_artifact_scores_as_its_seed_did(packed):
    printed = run_line(packed[0], "EVAL_ONLY=1")
    bpb = re.search(r"^final_.* val_bpb:(\S+)$", printed, re.M)[1]
    assert float(bpb) == facts(packed[0])["seed_results"]["7"]["val_bpb"]


def test_the_configuration_is_that_of_the_runs(packed):
    root = packed[0]
    logged = json.loads((root / "logs/seed7/metrics.jsonl").read_text().splitlines()[0])
    config = train_gpt.load_settings({"CONFIG": str(root / FOLDER / "config.env")}, False)
    places = {"config", "data_path", "tokenizer_path", "run_id", "out_dir"}
    names = {name.lower() for name in train_gpt.FIELDS} - places
    found = {name: getattr(config, name) for name in names}
    assert found == {k: v for k, v in logged["settings"].items() if k not in places}


def test_the_method_names_exactly_the_settings_that_are_not_defaults(packed):
    root = packed[0]
    logged = json.loads((root / "logs/seed7/metrics.jsonl").read_text().splitlines()[0])
    aside = {"config", "data_path", "tokenizer_path", "run_id", "out_dir", "seed"}
    default = train_gpt.Hyperparameters()
    wanted = {
        (k.upper(), str(getattr(default, k)), str(v))
        for k, v in logged["settings"].items()
        if v != getattr(default, k) and k not in aside
    }
    text = (root / FOLDER / "README.md").read_text().split("## Method")[1]
    assert {*re.findall(r"^\| ([A-Z_0-9]+) \| (.*) \| (.*) \|$", text, re.M)} == wanted


def test_requirements_are_what_the_script_imports(packed):
    lines = (packed[0] / FOLDER / "requirements.txt").read_text().split()
    version = train_gpt.torch.__version__.split("+")[0]
    assert f"torch=={version}" in lines
    assert {re.split("[<>=]", line)[0] for line in lines} == {
        *("numpy", "sentencepiece", "torch", "zstandard")
    }


def test_the_curve_shows_training_and_validation(packed):
    pixels = plt.imread(packed[0] / FOLDER / "curve.png")[..., :3]
    spread = pixels.max(2) - pixels.min(2)
    strongest = pixels.argmax(2)[spread > 0.2]
    assert {0, 2} <= {*np.unique(strongest).tolist()}


@pytest.mark.parametrize("name", ["quantizer.py", "frontier.py"])
def test_a_file_that_the_runs_did_not_use_is_left_out(packed, name):
    assert (REPO / name).is_file()  # beside the script that ran
    assert not (packed[0] / FOLDER / name).exists()
    assert facts(packed[0])["bytes_code"] == SCRIPT.stat().st_size


USES = {  # settings, and the files that they need beside the script
    "COMPRESSOR=rans": ["quantizer.py"],
    "SMEAR_GATE=2 LOOP_REPEATS=1": ["frontier.py"],
    "SMEAR_GATE=2 COMPRESSOR=rans QUANT_METHOD=gptq": ["quantizer.py", "frontier.py"],
}


@pytest.fixture(scope="module", params=USES)
def helped(dataset, tmp_path_factory, request):
    """A repository with a real run that used other files, packed by the program; and its code."""
    root = tmp_path_factory.mktemp("repository")
    env = tiny_settings(dataset, root / "logs", RUN_ID="seed3", SEED=3, CALIBRATION_TOKENS=4096)
    env |= dict(word.split("=") for word in request.param.split())
    done = run_cli(env, cwd=root)
    assert done.rc == 0, done.stderr
    for name, source in (("datasets", dataset.folder), ("tokenizers", dataset.tokenizer)):
        (root / "data" / name).mkdir(parents=True)
        (root / "data" / name / source.name).symlink_to(source)
    return root, run_program(root, "seed3"), ["train_gpt.py", *USES[request.param]]


def test_the_code_is_packed_byte_for_byte(helped):
    root, _, code = helped
    found = {path.name: path.read_bytes() for path in (root / FOLDER).glob("*.py")}
    assert found == {name: (REPO / name).read_bytes() for name in code}


def test_the_static_audit_accepts_the_code_and_counts_it(helped):
    root, done, (script, *others) = helped
    assert done.returncode == 0, done.stdout + done.stderr
    size = sum((REPO / name).stat().st_size for name in (script, *others))
    table = " ".join(done.stdout.split())
    assert f"{size:,} code (measured, with {', '.join(sorted(others))})" in table
    assert facts(root)["bytes_code"] == size


def test_the_static_audit_compares_the_code_with_the_log(helped):
    _, done, code = helped
    told = f"{len(code) - 1} file{'s' * (len(code) > 2)}"
    assert f"the code behind it is shipped ({told})" in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", ["SEED=3", "EVAL_ONLY=1"])
def test_the_code_trains_and_scores_from_within_the_folder(helped, command):
    printed = run_line(helped[0], command)
    bpb = re.search(r"^final_.* val_bpb:(\S+)$", printed, re.M)[1]
    assert float(bpb) == facts(helped[0])["seed_results"]["3"]["val_bpb"]


# ===================================== made-up runs =====================================

FAKE = """import os
import sys

import numpy

DEFAULTS = {"SEED": 0, "NUM_LAYERS": 9, "EVAL_ONLY": 0, "MODE": "plain", "DATA_PATH": "./data/x"}
if sys.argv[1:] == ["--settings"]:
    for name, value in DEFAULTS.items():
        print(f"{name}={os.environ.get(name, value)}")
"""
KEEPER = '"""Protect a run."""\n\nimport fcntl\nimport psutil\n\nLOCK = fcntl.LOCK_EX\n'
ONE = {"SEED": "1", "NUM_LAYERS": "2", "EVAL_ONLY": "0", "MODE": "plain"}
PLACES = {"DATA_PATH": "./data/datasets/x", "TOKENIZER_PATH": "./data/tokenizers/t.model"}


def fake_log(
    words: dict[str, str],
    source: str = FAKE,
    bpb="1.25",
    loss="3.5",
    artifact=100,
    world=1,
    helpers: Iterable[str] = (),
) -> str:
    """The log of a run, as README.md and design.md describe it; helpers stand behind the source."""
    sources = [source, *helpers]
    code = sum(len(text.encode()) for text in sources)
    source = f"\n{'=' * 100}\n".join(sources)
    block = "\n".join(f"{name}={text}" for name, text in (PLACES | words).items())
    return f"""{source}
{"=" * 100}
{block}
python:3.11.7 torch:2.9.1+cu128 device:NVIDIA H100 80GB HBM3 dtype:torch.bfloat16 compile:1 \
world_size:{world} attention:fa3
val_tokens:5000 val_bytes:12000 byte_audit:ok
model_params:123456
train_shards:1 train_tokens:100000
step:1/20 train_loss:6.5000 train_time:100ms step_avg:100.00ms tok_s:1000
step:20/20 val_loss:3.4900 val_bpb:1.2400 train_time:2500ms step_avg:125.00ms tok_s:1000
final_int8_zstd_roundtrip_exact val_loss:{loss} val_bpb:{bpb}
Total submission size int8_zstd: {code + artifact} bytes ({code} code, {artifact} artifact)
"""


def write_run(root: Path, name: str, log: str | bytes, artifact: int = 100) -> None:
    """Put a run with an artifact of so many zeros into the logs."""
    folder = root / "logs" / name
    folder.mkdir(parents=True, exist_ok=True)
    data = log.encode() if isinstance(log, str) else log
    (root / "logs" / f"{name}.txt").write_bytes(data)
    with open(folder / "final_model.artifact", "wb") as file:
        file.truncate(artifact)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with the runs a and b, which differ in their seed; audits are left out."""
    monkeypatch.setattr(submit, "audit", lambda folder: 0)
    write_run(tmp_path, "a", fake_log(ONE))
    write_run(tmp_path, "b", fake_log(ONE | {"SEED": "2"}, bpb="1.35"))
    return tmp_path


def pack(root: Path, *runs: str, **changed: str) -> Path:
    """Pack runs; options that differ from OPTIONS as keywords. The folder."""
    options = OPTIONS | {f"--{key.replace('_', '-')}": text for key, text in changed.items()}
    words = [f"{name}={text}" for name, text in options.items()]
    before = set(root.glob("records/*/*"))
    submit.main([*runs, *words, f"--logs={root / 'logs'}", f"--root={root}"])
    (made,) = {*root.glob("records/*/*")} - before
    return made


def refusal(root: Path, *runs: str, **changed: str) -> str:
    """The message by which packing is refused, after a check that nothing was written."""
    before = snapshot(root)
    with pytest.raises(SystemExit) as stop:
        pack(root, *runs, **changed)
    assert snapshot(root) == before
    return str(stop.value)


def test_a_run_that_is_not_there_is_refused_with_the_nearest_name(root):
    write_run(root, "baseline", fake_log(ONE))
    message = refusal(root, "baselin")
    assert "baselin: unknown run" in message
    assert "did you mean baseline?" in message


def test_other_sources_are_refused(root):
    write_run(root, "b", fake_log(ONE | {"SEED": "2"}, FAKE + "# changed\n"))
    assert "a and b: different scripts" in refusal(root, "a", "b")


def test_other_settings_are_refused_with_both_values(root):
    write_run(root, "b", fake_log(ONE | {"SEED": "2", "NUM_LAYERS": "3"}))
    assert "NUM_LAYERS is 2 and 3" in refusal(root, "a", "b")


def test_a_setting_that_only_one_run_has_is_refused(root):
    write_run(root, "b", fake_log(ONE | {"SEED": "2", "MORE": "1"}))
    assert "MORE is nothing and 1" in refusal(root, "a", "b")


def test_the_third_run_is_compared_too(root):
    write_run(root, "c", fake_log(ONE | {"SEED": "3", "NUM_LAYERS": "3"}))
    assert "a and c: NUM_LAYERS" in refusal(root, "a", "b", "c")


def test_one_seed_twice_is_refused(root):
    write_run(root, "b", fake_log(ONE))
    assert "more than one run of seed 1" in refusal(root, "a", "b")


def test_other_validation_data_is_refused(root):
    log = fake_log(ONE | {"SEED": "2"}).replace("val_bytes:12000", "val_bytes:12001")
    write_run(root, "b", log)
    assert "different validation data" in refusal(root, "a", "b")


def test_names_and_places_of_runs_may_differ(root):
    places = {"RUN_ID": "b", "OUT_DIR": "'/my logs'", "SAVE_NLL": "b.npy"}
    write_run(root, "b", fake_log(ONE | {"SEED": "2"} | places))
    assert pack(root, "a", "b").is_dir()


def test_how_a_run_was_protected_may_differ_and_is_not_packed(root):
    protected = {"SAVE_EVERY": "500", "RESUME": "auto", "WATCH": "1", "REPORT_TO": "wandb"}
    write_run(root, "b", fake_log(ONE | {"SEED": "2"} | protected))
    folder = pack(root, "b", "a")
    for text in ((folder / name).read_text() for name in ("config.env", "README.md")):
        assert "NUM_LAYERS" in text
        assert not re.search("SAVE_EVERY|RESUME|WATCH|REPORT_TO", text)


LINES = fake_log(ONE).count("\n") - FAKE.count("\n") - 2


@pytest.mark.parametrize("cut", range(1, LINES + 1))
def test_a_log_that_ends_early_is_refused(root, cut):
    log = "".join(fake_log(ONE).splitlines(keepends=True)[:-cut])
    write_run(root, "a", log)
    assert re.search("did not finish|no settings with a SEED", refusal(root, "a"))


MISSING = {
    "python:": "did not start",
    "val_tokens:": "did not read its validation data",
    "model_params:": "did not build its model",
    "step:20/20 val": "did not finish training",
    "final_int8": "did not score its artifact",
    "Total": "did not come to its size",
}


@pytest.mark.parametrize("line", MISSING)
def test_what_a_run_did_not_reach_is_said_in_words(root, line):
    log = fake_log(ONE)
    write_run(root, "a", log[: log.index(f"\n{line}") + 1])
    message = refusal(root, "a")
    assert f"a: it did not finish: it {MISSING[line]}; train it again" in message
    assert "\\" not in message


def test_a_run_with_a_checkpoint_is_to_go_on(root):
    write_run(root, "my run", fake_log(ONE).partition("final_int8")[0])
    (root / "logs/my run/checkpoint_0000004.pt").touch()
    assert "start it again with RUN_ID='my run' RESUME=auto" in refusal(root, "my run")


EXTRA = [
    "epochs_planned:1.50 train_tokens:100000",
    "warning: no checkpoint of step 4: [Errno 28] No space left on device",
    "fit_budget:sigma quant_sigma:9.1 tries:3 fill:0.9991",
    "stopping_early: wallclock_cap train_time:2500ms step:20",
]


@given(places=st.lists(st.integers(0, LINES), min_size=len(EXTRA), max_size=len(EXTRA)))
def test_new_lines_may_stand_anywhere_in_a_log(tmp_path_factory, places):
    root, head = tmp_path_factory.mktemp("root"), len(PLACES | ONE)
    source, block = fake_log(ONE).split("=" * 100 + "\n")
    lines = block.splitlines(keepends=True)
    rest = lines[head:]
    for place, extra in zip(places, EXTRA, strict=True):
        rest.insert(min(place, len(rest)), f"{extra}\n")
    write_run(root, "a", "".join([source, "=" * 100, "\n", *lines[:head], *rest]))
    run = submit.read_run(root / "logs" / "a")
    assert run.numbers()["val_bpb"] == 1.25
    assert run.numbers()["pre_quant_val_bpb"] == 1.24


@pytest.mark.parametrize(
    "meant", ["a/", "logs/a", "logs/a/", "./logs/a", "logs/a.txt", "a.txt", "logs/b/../a/"]
)
def test_a_run_is_found_by_whatever_names_it(root, monkeypatch, meant):
    monkeypatch.chdir(root)
    assert json.loads((pack(root, meant) / "submission.json").read_text())["seeds"] == [1]


@pytest.mark.parametrize("meant", [".", "../a", "final_model.artifact"])
def test_a_run_is_found_from_within_its_folder(root, monkeypatch, meant):
    monkeypatch.chdir(root / "logs" / "a")
    assert json.loads((pack(root, meant) / "submission.json").read_text())["seeds"] == [1]


@pytest.mark.parametrize("meant", [".", "/", "..", "", "nowhere/", "a/b/"])
def test_what_names_no_run_is_refused(root, monkeypatch, meant):
    monkeypatch.chdir(root)
    assert "unknown run" in refusal(root, meant)


def test_a_path_that_is_not_utf8_is_packed_as_its_bytes(root):
    log = fake_log(ONE | {"MODE": "m"}).replace("MODE=m", "MODE=$X")
    write_run(root, "a", log.encode().replace(b"$X", b"'m\xff'"))
    folder = pack(root, "a")
    assert b"MODE='m\xff'\n" in (folder / "config.env").read_bytes()
    assert "m?" in (folder / "README.md").read_text()
    json.loads((folder / "submission.json").read_text())


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_console_can_be_told(root, encoding):
    write_run(root, "ü\udcff", fake_log(ONE))
    words = [f"{name}={text}" for name, text in OPTIONS.items()]
    words += [f"--root={root}", f"--logs={root / 'logs'}"]
    env = os.environ | {"PYTHONIOENCODING": encoding}
    for runs, wanted in ((["a", "ü\udcff"], b"run of seed 1"), (["a", "b"], b"val_bpb 1.3000")):
        command = [sys.executable, REPO / "records/submit.py", *runs, *words]
        done = subprocess.run(command, env=env, capture_output=True)
        assert wanted in done.stdout + done.stderr
        assert b"Traceback" not in done.stderr


def test_a_log_that_goes_on_after_its_score_is_refused(root):
    write_run(root, "a", fake_log(ONE) + "step:1/20 train_loss:6.5000 train_time:1ms\n")
    assert "did not finish" in refusal(root, "a")


@pytest.mark.parametrize("score", ["nan", "inf"])
def test_a_score_that_is_no_number_is_refused(root, score):
    write_run(root, "a", fake_log(ONE, bpb=score))
    assert "did not finish: it diverged" in refusal(root, "a")


def test_a_run_that_only_scored_is_refused(root):
    write_run(root, "a", fake_log(ONE | {"EVAL_ONLY": "1"}))
    assert "trained nothing" in refusal(root, "a")


def test_a_log_without_settings_is_refused(root):
    write_run(root, "a", "step:1/20 train_loss:6.5000\n")
    assert "no script and settings at its top" in refusal(root, "a")


def test_an_artifact_that_is_gone_is_refused(root):
    (root / "logs/a/final_model.artifact").unlink()
    assert "final_model.artifact is not there" in refusal(root, "a")


def test_an_artifact_of_another_size_than_logged_is_refused(root):
    write_run(root, "a", fake_log(ONE), artifact=101)
    assert "has 101 bytes; its log says 100" in refusal(root, "a")


@pytest.mark.parametrize("change", [lambda s: s + "#", lambda s: s[1:], lambda s: "#\n" + s])
def test_a_script_of_another_size_than_counted_is_refused(root, change):
    write_run(root, "a", fake_log(ONE).replace(FAKE, change(FAKE)))
    assert f"is not the {len(FAKE)} bytes that it counts" in refusal(root, "a")


def test_one_byte_over_the_cap_is_refused(root):
    size = CAP - len(FAKE) + 1
    write_run(root, "a", fake_log(ONE, artifact=size), artifact=size)
    assert "a: 16,000,001 bytes, 1 bytes over the cap" in refusal(root, "b", "a")


def test_exactly_the_cap_is_packed(root):
    size = CAP - len(FAKE)
    write_run(root, "a", fake_log(ONE, artifact=size), artifact=size)
    assert json.loads((pack(root, "a") / "submission.json").read_text())["bytes_total"] == CAP


def test_a_script_that_does_not_tell_its_defaults_is_refused(root):
    write_run(root, "a", fake_log(ONE, "raise SystemExit('no such thing')\n"))
    assert "no such thing" in refusal(root, "a")


def test_a_script_that_does_not_know_the_option_is_refused(root):
    write_run(root, "a", fake_log(ONE, "print('training')\n"))
    assert "--settings prints no SEED" in refusal(root, "a")


def test_a_script_that_goes_on_for_ever_is_refused(root, monkeypatch):
    monkeypatch.setattr(submit, "SETTINGS_SECONDS", 0.5)
    write_run(root, "a", fake_log(ONE, "import time\ntime.sleep(60)\n"))
    assert "timed out after 0.5 seconds" in refusal(root, "a")


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "/a", ".hidden", "", " ", "a\nb", "a\0b", "-a", "..", "x" * 81, "é"]
)
def test_a_name_that_is_no_plain_folder_name_is_refused(root, name):
    assert "--name" in refusal(root, "a", name=name)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("author", text) for text in ("", " ", "a\nb")],
        *[("github_id", text) for text in ("", "a b", "-a", "a--b", "a" * 40)],
        *[("track", text) for text in ("", "16mb", "../10min_16mb")],
        *[("date", text) for text in ("", "today", "2026-02-30", "1026-01-01", "21.11.2026")],
    ],
)
def test_a_missing_or_impossible_field_is_refused(root, option, value):
    assert f"--{option.replace('_', '-')}" in refusal(root, "a", **{option: value})


def test_a_folder_that_is_there_is_not_touched(root):
    pack(root, "a")
    assert "is there already" in refusal(root, "b")


def test_a_file_in_the_folders_place_is_not_touched(root):
    (root / FOLDER).parent.mkdir(parents=True)
    (root / FOLDER).touch()
    assert "is there already" in refusal(root, "a")


def test_all_problems_are_told_at_once(root):
    (root / "logs/b/final_model.artifact").unlink()
    message = refusal(root, "b", "nowhere", name="a/b", date="today")
    wanted = ["--name", "--date", "nowhere: unknown run", "final_model.artifact is not there"]
    assert [text for text in wanted if text not in message] == []


@pytest.mark.parametrize("step", ["draw_curve", "readme", "requirements"])
def test_a_failure_on_the_way_leaves_nothing(root, monkeypatch, step):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(submit, step, fail)
    with pytest.raises(SystemExit, match="disk full"):
        pack(root, "a")
    assert [*root.glob("records/*/*")] == []


def test_the_environment_does_not_change_the_defaults(root, monkeypatch):
    monkeypatch.setenv("NUM_LAYERS", "2")
    assert "| NUM_LAYERS | 9 | 2 |" in (pack(root, "a") / "README.md").read_text()


def test_an_audit_that_finds_faults_is_passed_on(root, monkeypatch):
    monkeypatch.setattr(submit, "audit", lambda folder: 1)
    with pytest.raises(SystemExit, match="the static audit finds faults"):
        pack(root, "a")


def test_the_last_run_of_a_reused_name_is_packed(root):
    first, last = fake_log(ONE, FAKE + "# old\n", bpb="1.1"), fake_log(ONE, bpb="1.2")
    write_run(root, "a", first + last)
    folder = pack(root, "a")
    assert (folder / "train_gpt.py").read_text() == FAKE
    assert (folder / "train_seed1.log").read_text() == last
    assert json.loads((folder / "submission.json").read_text())["val_bpb"] == 1.2


def test_a_run_after_one_that_broke_off_is_packed(root):
    broken = "".join(fake_log(ONE).splitlines(keepends=True)[:-3])
    write_run(root, "a", broken + fake_log(ONE))
    assert (pack(root, "a") / "train_seed1.log").read_text() == fake_log(ONE)


def test_a_run_that_broke_off_after_a_finished_one_is_refused(root):
    broken = "".join(fake_log(ONE).splitlines(keepends=True)[:-3])
    write_run(root, "a", fake_log(ONE) + broken)
    assert "did not finish" in refusal(root, "a")


def test_a_cut_script_of_a_reused_name_is_refused(root):
    write_run(root, "a", fake_log(ONE) + fake_log(ONE).replace(FAKE, FAKE[1:]))
    assert f"is not the {len(FAKE)} bytes that it counts" in refusal(root, "a")


def test_a_ruler_within_the_script_does_not_end_it(root):
    source = f'{FAKE}"""\n{"=" * 100}\nSEED=9\n"""\n'
    write_run(root, "a", fake_log(ONE, source))
    assert (pack(root, "a") / "train_gpt.py").read_text() == source


def with_keeper(log: str) -> str:
    """A log whose run had keeper.py beside its script."""
    source, ruler, rest = log.rpartition("=" * 100 + "\n")
    return f"{source}{ruler}{KEEPER}\n{ruler}{rest}"


def test_the_keeper_is_not_packed_and_its_bytes_do_not_count(root):
    log = with_keeper(fake_log(ONE))
    write_run(root, "a", log)
    folder = pack(root, "a")
    assert (folder / "train_gpt.py").read_text() == FAKE
    assert (folder / "train_seed1.log").read_text() == log
    assert json.loads((folder / "submission.json").read_text())["bytes_code"] == len(FAKE)
    assert (folder / "requirements.txt").read_text().split() == ["numpy"]


@pytest.mark.parametrize("first", [fake_log, lambda *words: with_keeper(fake_log(*words))])
@pytest.mark.parametrize("last", [fake_log, lambda *words: with_keeper(fake_log(*words))])
def test_runs_with_and_without_a_keeper_share_a_log(root, first, last):
    source = FAKE.replace("import numpy", "import struct")
    write_run(root, "a", first(ONE) + last(ONE, source))
    folder = pack(root, "a")
    assert (folder / "train_gpt.py").read_text() == source
    assert (folder / "train_seed1.log").read_text() == last(ONE, source)


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_a_cut_script_before_a_keeper_is_refused(root, lines):
    cut = "".join(FAKE.splitlines(keepends=True)[lines:])
    write_run(root, "a", fake_log(ONE) + with_keeper(fake_log(ONE).replace(FAKE, cut)))
    assert f"is not the {len(FAKE)} bytes that it counts" in refusal(root, "a")


def test_a_ruler_within_the_script_does_not_end_it_before_a_keeper(root):
    source = f'{FAKE}"""\n{"=" * 100}\nno settings\n"""\n'
    write_run(root, "a", with_keeper(fake_log(ONE, source)))
    assert (pack(root, "a") / "train_gpt.py").read_text() == source


HELPERS = {
    "quantizer.py": '"""Quantize."""\n\nimport struct\n\n\ndef pack():\n    import zstandard\n',
    "frontier.py": '"""Add."""\n\nimport scipy\nimport train_gpt as core\n\nW = core.DEFAULTS\n',
}
# It imports what its settings name, as the real one does.
USER = f"""{FAKE}MODE = open(os.environ.get("CONFIG", os.devnull)).read().partition("MODE=")[2]
sys.modules["train_gpt"] = sys.modules[__name__]
for name in MODE.split()[0].split("+") if MODE else ():
    __import__(name)
"""
USED = [["quantizer.py"], ["frontier.py"], ["quantizer.py", "frontier.py"]]
EVERY = USED[-1]
REFUSED = "the script in .* is not the [0-9]+ bytes that it counts"


def size_of(used: list[str]) -> int:
    """The size of the code of a run that used some helpers."""
    return len(USER) + sum(len(HELPERS[name]) for name in used)


def helped_log(
    words: dict[str, str] = ONE,
    source: str = USER,
    used: list[str] = EVERY,
    helpers: dict[str, str] = HELPERS,
    **changed: object,
) -> str:
    """The log of a run that used helpers."""
    mode = {"MODE": "+".join(name.removesuffix(".py") for name in used)}
    return fake_log(words | mode, source, helpers=[helpers[name] for name in used], **changed)


@pytest.mark.parametrize("beside", [str, with_keeper])
@pytest.mark.parametrize("used", USED)
def test_all_files_of_a_run_are_packed(root, beside, used):
    log = beside(helped_log(used=used))
    write_run(root, "a", log)
    folder = pack(root, "a")
    found = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert found == {"train_gpt.py": USER, **{name: HELPERS[name] for name in used}}
    assert (folder / "train_seed1.log").read_text() == log


@pytest.mark.parametrize("used", USED)
def test_all_files_count(root, used):
    write_run(root, "a", helped_log(used=used))
    found = json.loads((pack(root, "a") / "submission.json").read_text())
    sizes = (found["bytes_code"], found["bytes_total"], found["seed_results"]["1"]["bytes_total"])
    size = size_of(used)
    assert sizes == (size, size + 100, size + 100)
    assert found["code_sha256"] == hashlib.sha256(USER.encode()).hexdigest()


def test_what_the_files_import_is_required_but_not_the_files(root):
    write_run(root, "a", helped_log())
    lines = (pack(root, "a") / "requirements.txt").read_text().split()
    assert lines == ["numpy", "scipy", "zstandard"]


@pytest.mark.parametrize("used", [[], *USED])
def test_the_text_names_the_files_that_are_there(root, used):
    write_run(root, "a", helped_log(used=used) if used else fake_log(ONE))
    text = (pack(root, "a") / "README.md").read_text()
    assert [name for name in HELPERS if name in text] == used


@pytest.mark.parametrize("used", USED)
def test_one_byte_of_all_files_over_the_cap_is_refused(root, used):
    size = CAP - size_of(used) + 1
    write_run(root, "a", helped_log(used=used, artifact=size), artifact=size)
    assert "a: 16,000,001 bytes, 1 bytes over the cap" in refusal(root, "a")


@pytest.mark.parametrize("name", HELPERS)
def test_seeds_with_other_files_are_refused(root, name):
    changed = HELPERS | {name: f"{HELPERS[name]}# changed\n"}
    write_run(root, "a", helped_log())
    write_run(root, "b", helped_log(ONE | {"SEED": "2"}, helpers=changed))
    assert "a and b: different scripts" in refusal(root, "a", "b")


@pytest.mark.parametrize("beside", [str, with_keeper])
@pytest.mark.parametrize("first", [fake_log, helped_log])
@pytest.mark.parametrize("last", [[], *USED])
def test_runs_with_and_without_other_files_share_a_log(root, beside, first, last):
    older = beside(first(ONE | {"SEED": "9"}, USER.replace("numpy", "struct")))
    log = beside(helped_log(used=last) if last else fake_log(ONE, FAKE))
    write_run(root, "a", older + log)
    folder = pack(root, "a")
    assert (folder / "train_gpt.py").read_text() == (USER if last else FAKE)
    assert (folder / "train_seed1.log").read_text() == log
    assert [name for name in HELPERS if (folder / name).exists()] == last


@pytest.mark.parametrize("beside", [str, with_keeper])
@pytest.mark.parametrize("start", ["SEED=9", "no settings", "import this"])
def test_rulers_within_the_sources_do_not_part_them(root, beside, start):
    ruled = f'"""\n\n{"=" * 100}\n{start}\n"""\n'
    helpers = {name: text + ruled for name, text in HELPERS.items()}
    write_run(root, "a", beside(helped_log(ONE, USER + ruled, helpers=helpers)))
    folder = pack(root, "a")
    found = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert found == {"train_gpt.py": USER + ruled, **helpers}


ALL = size_of(EVERY)
WRONG = [0, len(HELPERS["quantizer.py"]), len(HELPERS["frontier.py"]), ALL - 1, ALL + 1]


@pytest.mark.parametrize("beside", [str, with_keeper])
@pytest.mark.parametrize("counted", [*WRONG, ALL + 102, ALL + 204, 2 * ALL])
def test_sizes_of_files_that_do_not_add_up_are_refused(root, beside, counted):
    log = beside(helped_log()).replace(f"({ALL} code", f"({counted} code")
    write_run(root, "a", log)
    assert re.search(REFUSED.replace("[0-9]+", str(counted)), refusal(root, "a"))


@pytest.mark.parametrize("used", USED)
def test_a_file_that_is_needed_but_not_counted_is_refused(root, used):
    log = helped_log(used=used)
    size = size_of(used)
    write_run(root, "a", log.replace(f"({size} code", f"({size - len(HELPERS[used[-1]])} code"))
    message = refusal(root, "a")
    assert "the packed script refuses the settings of its run" in message
    assert "No module named" in message


FIRST, SECOND = HELPERS.values()


@pytest.mark.parametrize(
    ("whole", "damaged"),
    [
        (FIRST, FIRST[1:]),
        (FIRST, f"{FIRST}\n"),
        (FIRST, FIRST.replace("def pack()", "def pack((")),
        (SECOND, SECOND[1:]),
        (SECOND, f"{SECOND}\n"),
        (SECOND, SECOND.replace("import scipy", "import (((((")),
        (USER, USER[1:]),
        (USER, USER.replace("import numpy", "import ((((((")),
        (f"{USER}\n", USER),
        ("=" * 100 + f"\n{FIRST}", "=" * 99 + f"\n\n{FIRST}"),
        ("=" * 100 + f"\n{SECOND}", "=" * 99 + f"\n\n{SECOND}"),
    ],
)
def test_damaged_sources_are_refused(root, whole, damaged):
    log = helped_log()
    write_run(root, "a", helped_log() + log.replace(whole, damaged))
    assert log.count(whole) == 1
    assert re.search(REFUSED, refusal(root, "a"))


@pytest.mark.parametrize("helper", HELPERS.values())
def test_a_lost_ruler_between_the_sources_is_refused(root, helper):
    log = helped_log().replace(f"\n{'=' * 100}\n{helper}", helper)
    write_run(root, "a", log)
    assert "the packed script refuses the settings of its run" in refusal(root, "a")


def test_bytes_that_are_no_text_are_kept(root):
    log = fake_log(ONE).encode().replace(b"model_params", b"\xff\xfe odd\nmodel_params")
    write_run(root, "a", log)
    assert (pack(root, "a") / "train_seed1.log").read_bytes() == log


def test_one_seed_has_no_deviation(root):
    folder = pack(root, "a")
    assert "deviation" not in (folder / "README.md").read_text()
    names = json.loads((folder / "submission.json").read_text())
    assert [name for name in names if name.endswith("_std")] == []


def test_the_artifact_is_left_out_unless_asked_for(root):
    assert not (pack(root, "a") / "final_model.artifact").exists()


@pytest.mark.parametrize(
    ("track", "folder"),
    [
        ("10min_16mb", "track_10min_16mb"),
        ("track_10min_16mb", "track_10min_16mb"),
        ("non-record-16mb", "track_non_record_16mb"),
        ("non-record-unlimited-compute-16mb", "track_non_record_16mb"),
    ],
)
def test_a_track_goes_by_all_its_spellings(root, track, folder):
    assert pack(root, "a", track=track).parent.name == folder


def test_a_run_on_eight_devices_is_started_on_eight(root):
    write_run(root, "a", fake_log(ONE, world=8))
    folder = pack(root, "a")
    assert "torchrun --standalone --nproc_per_node=8 " in (folder / "README.md").read_text()
    hardware = json.loads((folder / "submission.json").read_text())["hardware"]
    assert hardware == "8x NVIDIA H100 80GB HBM3"


def test_facts_of_data_and_model_are_those_of_the_log(root):
    found = json.loads((pack(root, "a") / "submission.json").read_text())
    names = ("dataset", "val_tokens", "val_bytes", "model_params", "pytorch_version")
    assert [found[name] for name in names] == ["x", 5000, 12000, 123456, "2.9.1+cu128"]


def test_the_bytes_of_transformed_text_are_those_of_the_original(root):
    log = fake_log(ONE).replace("audit:ok", "audit:ok byte_sidecar:1 original_bytes:11000")
    write_run(root, "a", log)
    assert json.loads((pack(root, "a") / "submission.json").read_text())["val_bytes"] == 11000


def test_steps_and_times_are_those_of_the_last_line(root):
    found = json.loads((pack(root, "a") / "submission.json").read_text())["seed_results"]["1"]
    names = ("steps", "step_avg_ms", "train_time_s", "pre_quant_val_bpb", "pre_quant_val_loss")
    assert [found[name] for name in names] == [20, 125.0, 2.5, 1.24, 3.49]


def test_digests_are_those_of_the_files(root):
    found = json.loads((pack(root, "a") / "submission.json").read_text())
    digest = hashlib.sha256((root / "logs/a/final_model.artifact").read_bytes()).hexdigest()
    assert found["artifact_sha256"] == {"1": digest}
    assert found["code_sha256"] == hashlib.sha256(FAKE.encode()).hexdigest()


def test_the_table_has_seeds_mean_and_deviation(root):
    lines = (pack(root, "a", "b") / "README.md").read_text().splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ")[1] for line in lines if " | " in line}
    wanted = {"| 1": "1.2500", "| 2": "1.3500", "| mean": "1.3000", "| deviation": "0.0707"}
    assert {name: cells[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ("./data/datasets/x", "data/datasets/x"),
        ("{root}/data/datasets/x", "data/datasets/x"),
        ("{root}/data/my/../datasets/x/", "data/datasets/x"),
        ("/elsewhere/shards/x", "data/datasets/x"),
        ("../x", "data/datasets/x"),
        ("{root}", "data/datasets/{name}"),
    ],
)
def test_data_is_looked_for_in_the_repository(root, value, place):
    value = value.format(root=root)
    write_run(root, "a", fake_log(ONE | {"DATA_PATH": value}))
    config = train_gpt.read_dotenv(str(pack(root, "a") / "config.env"))
    assert config["DATA_PATH"] == f"../../../{place.format(name=root.name)}"


# ===================================== properties =====================================

SCORES = st.integers(1, 10**9).map(lambda n: f"{Decimal(n) / 10**8:.8f}")


def exact(texts: list[str]) -> tuple[Fraction, Decimal]:
    """Mean and sample deviation without rounding errors."""
    values = [Fraction(text) for text in texts]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, (Decimal(variance.numerator) / Decimal(variance.denominator)).sqrt()


@settings(max_examples=25)
@given(st.lists(st.tuples(SCORES, SCORES), min_size=2, max_size=5))
def test_means_and_deviations_are_exact(tmp_path_factory, scores):
    root = tmp_path_factory.mktemp("runs")
    for seed, (bpb, loss) in enumerate(scores):
        write_run(root, f"r{seed}", fake_log(ONE | {"SEED": str(seed)}, bpb=bpb, loss=loss))
    runs = [submit.read_run(root / f"logs/r{seed}") for seed in range(len(scores))]
    record = submit.Record(dict.fromkeys(ABOUT, "x"), runs, {}, root, False)
    found = submit.submission(record)
    for name, texts in zip(("val_bpb", "val_loss"), zip(*scores, strict=True), strict=True):
        mean, deviation = exact([*texts])
        assert abs(Fraction(found[name]) - mean) < Fraction(1, 10**8)
        assert math.isclose(found[f"{name}_std"], deviation, abs_tol=1e-8)


ABOUT = ["name", "author", "github_id", "date", "track", "blurb", "hardware"]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=6, unique=True))
def test_the_total_is_of_the_largest_seed(tmp_path_factory, sizes):
    root = tmp_path_factory.mktemp("runs")
    for seed, size in enumerate(sizes):
        log = fake_log(ONE | {"SEED": str(seed)}, artifact=size)
        write_run(root, f"r{seed}", log, artifact=size)
    runs = [submit.read_run(root / f"logs/r{seed}") for seed in range(len(sizes))]
    found = submit.submission(submit.Record(dict.fromkeys(ABOUT, "x"), runs, {}, root, False))
    assert found["bytes_total"] == len(FAKE) + max(sizes)
    assert found["artifact_bytes_mean"] == pytest.approx(statistics.mean(sizes), abs=1e-3)


PRINTABLE = st.text(st.characters(min_codepoint=32, exclude_categories=("C", "Z")) | st.just(" "))


@given(st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,9}", fullmatch=True), PRINTABLE))
def test_settings_survive_log_and_configuration(tmp_path_factory, values):
    """As the trainer writes them into its log, and reads them from the packed configuration."""
    values = {name: text for name, text in values.items() if name not in ("SEED", "CONFIG")}
    quoted = [f"{k}={train_gpt.shlex.quote(v) if v else ''}\n" for k, v in values.items()]
    found, rest = submit.split_settings("".join(quoted) + "python:3 x\n")
    config = tmp_path_factory.mktemp("config") / "config.env"
    config.write_text(submit.config_env(found, {}, 4), encoding="utf-8")
    assert train_gpt.read_dotenv(str(config)) == values | {"SEED": "4"}
    assert rest == "python:3 x\n"


LOGS = {
    fake_log(ONE): [FAKE],
    with_keeper(helped_log(used=["frontier.py"])): [USER, HELPERS["frontier.py"]],
    with_keeper(helped_log()): [USER, *HELPERS.values()],
}


@pytest.mark.parametrize("log", LOGS, ids=["one source", "three sources", "four sources"])
@settings(max_examples=200)
@given(data=st.data())
def test_a_log_with_a_hole_is_refused_or_its_code_is_whole(tmp_path_factory, log, data):
    """Whatever piece of a log is lost: a clear refusal, or the code as it was."""
    root, log = tmp_path_factory.mktemp("runs"), log.encode()
    sources = [text.encode() for text in LOGS[log.decode()]]
    start, end = sorted(data.draw(st.integers(0, len(log))) for _ in range(2))
    log = log[:start] + log[end:]
    write_run(root, "a", log)
    try:
        run = submit.read_run(root / "logs/a")
    except submit.UserError:
        return
    assert (run.sources, run.log) == (sources, log)
    assert 0 < run.numbers()["val_bpb"] < math.inf
