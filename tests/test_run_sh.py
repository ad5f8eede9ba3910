"""run.sh and records/sample.py: what they do once and again, interrupted, and beside each other.

They run in copies of the repository. There, the Python of .venv notes how it is called and installs
nothing, and train_gpt.py, data/prepare.py and records/summary.py are stubs, if a test does not say
otherwise.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPO, copy_checkout, events, snapshot, tiny_settings

PYTHON = """#!/bin/sh
printf '%s\\n' "$*" >> {calls}
case "$*" in *"-m pip"*|*"-m pytest"*) exit 0;; esac
exec {python} "$@"
"""
TRAIN = """
import os, pathlib, signal, sys, time
if sys.argv[1:] == ["--settings"]:
    sys.exit(print("ITERATIONS=" + os.environ.get("ITERATIONS", "9")))
folder = pathlib.Path(os.environ["OUT_DIR"], os.environ["RUN_ID"])

def stop(number, _):
    (folder / "checkpoint_0000005.pt").write_text("step 5")
    sys.exit(128 + number)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, stop)
there = [path.name for path in folder.glob("checkpoint_*.pt")]
with open("trained", "a") as file:
    print(os.environ["RESUME"] or "anew", *there, file=file)
while pathlib.Path("hold").exists():
    time.sleep(0.01)
(folder / "metrics.jsonl").write_text("")
if not pathlib.Path("full").exists():
    (folder / "final_model.artifact").write_text("")
sys.exit(pathlib.Path("full").exists())
"""
PREPARE = """
import pathlib
folder = pathlib.Path("data/datasets/sample_sp1024")
folder.mkdir(parents=True, exist_ok=True)
if not (folder / "manifest.json").exists():
    (folder / "manifest.json").write_text("{}")
"""
SUMMARY = "print('summed up')"
STUBS = {"train_gpt.py": TRAIN, "data/prepare.py": PREPARE, "records/summary.py": SUMMARY}


class Clone:
    """A copy of the repository with stubs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = copy_checkout(folder)
        for name, text in STUBS.items():
            (folder / name).write_text(text)
        self.write_python(folder / ".venv" / "bin" / "python")
        for name in ("requirements.txt", "lab/requirements.txt", "tests/requirements.txt"):
            stamp = f"installed_{name.replace('/', '_')}"
            shutil.copy(folder / name, folder / ".venv" / stamp)

    def write_python(self, path: Path) -> None:
        """A Python that notes how it is called."""
        path.parent.mkdir(parents=True, exist_ok=True)
        places = {"calls": self.folder / "calls", "python": sys.executable}
        path.write_text(PYTHON.format(**{k: shlex.quote(str(v)) for k, v in places.items()}))
        path.chmod(0o755)

    def start(self, *arguments: str, script: str | Path = "run.sh", **options) -> subprocess.Popen:
        """Start run.sh."""
        env = {"PATH": os.environ["PATH"], "HOME": str(self.folder.parent)}
        options = {"cwd": self.folder, "text": True, "start_new_session": True} | options
        options["env"] = env | options.get("env", {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(["bash", str(script), *arguments], **pipes, **options)

    def run(self, *arguments: str, **options) -> str:
        """Run run.sh to its end, which must be good; what it prints."""
        process = self.start(*arguments, **options)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        return output

    def interrupt(self, number: int = signal.SIGTERM) -> int:
        """Send a signal to a run.sh that trains; its exit code."""
        before = len(self.trained)
        (self.folder / "hold").touch()
        process = self.start()
        wait_until(lambda: len(self.trained) > before)
        process.send_signal(number)
        process.communicate(timeout=120)
        (self.folder / "hold").unlink()
        return process.returncode

    @property
    def trained(self) -> list[str]:
        """How the trainings began: RESUME, and the checkpoints that were there."""
        return self.lines("trained")

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


def wait_until(happened: Callable[[], object]) -> None:
    """Wait, for a minute at most."""
    for _ in range(6000):
        if happened():
            return
        time.sleep(0.01)
    raise TimeoutError("a minute has passed")


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path / "clone")


# ---- once and again


def test_a_finished_run_is_summed_up_and_not_trained_again(clone):
    clone.run()
    clone.run("test")
    second = clone.run()
    assert clone.trained == ["anew"]
    assert "finished" in second
    assert "summed up" in second


@pytest.mark.parametrize("name", ["train_gpt.py", "configs/sample.env", "data/prepare.py"])
def test_other_code_or_data_train_anew(clone, name):
    clone.run()
    if name == "data/prepare.py":  # another sample
        (clone.folder / "data/datasets/sample_sp1024/manifest.json").write_text('{"new": 1}')
    elif name == "configs/sample.env":  # which the stub does not read
        (clone.folder / "train_gpt.py").write_text(TRAIN.replace('"9"', '"8"'))
    else:
        (clone.folder / name).write_text(TRAIN + "# changed")
    clone.run()
    assert clone.trained == ["anew", "anew"]


def test_other_packages_do_not_make_a_finished_run_undone(clone):
    """As run.sh test may install them: the sample's text is that of packages."""
    text = PREPARE.replace('if not (folder / "manifest.json").exists():', "import time\nif True:")
    (clone.folder / "data/prepare.py").write_text(text.replace('"{}"', "str(time.time_ns())"))
    clone.run()
    clone.run("test")
    clone.run()
    assert clone.trained == ["anew"]


def test_other_settings_in_the_environment_train_anew(clone):
    clone.run(env={"ITERATIONS": "3"})
    clone.run()
    assert clone.trained == ["anew", "anew"]


@pytest.mark.parametrize("stamp", ["", "1234 5678", "partial"])
def test_a_stamp_that_is_not_of_these_inputs_is_no_finished_run(clone, stamp):
    clone.run()
    path = clone.folder / "logs/sample/finished"
    path.write_text(path.read_text()[:9] if stamp == "partial" else stamp)
    clone.run()
    assert len(clone.trained) == 2


def test_a_finished_run_without_its_artifact_is_not_finished(clone):
    clone.run()
    (clone.folder / "logs/sample/final_model.artifact").unlink()
    clone.run()
    assert len(clone.trained) == 2


def test_what_lies_beside_a_run_is_kept_when_it_trains_anew(clone):
    clone.run()
    (clone.folder / "logs/sample/notes").write_text("mine")
    (clone.folder / "train_gpt.py").write_text(TRAIN + "# changed")
    clone.run()
    assert (clone.folder / "logs/sample/notes").read_text() == "mine"


# ---- interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_goes_on_from_its_checkpoint(clone, number):
    assert clone.interrupt(number) == 128 + number
    clone.run()
    assert clone.trained == ["anew", "auto checkpoint_0000005.pt"]


def test_ctrl_c_reaches_every_process_of_a_terminal_and_is_heard_once(clone):
    (clone.folder / "hold").touch()
    process = clone.start()
    wait_until(lambda: clone.trained)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[0].count("Traceback") == 0
    assert process.returncode == 130
    assert (clone.folder / "logs/sample/checkpoint_0000005.pt").exists()


def test_nohup_keeps_a_run_going(clone):
    (clone.folder / "hold").touch()
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    (clone.folder / "train_gpt.py").write_text(TRAIN.replace(", signal.SIGHUP", ""))
    process = clone.start(**ignore)
    wait_until(lambda: clone.trained)
    os.killpg(process.pid, signal.SIGHUP)
    (clone.folder / "hold").unlink()
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_run_whose_export_failed_goes_on(clone):
    (clone.folder / "full").touch()
    assert clone.start().wait(60) == 1
    (clone.folder / "full").unlink()
    clone.run()
    assert clone.trained == ["anew", "auto"]


def test_checkpoints_of_other_code_are_set_aside(clone):
    clone.interrupt()
    (clone.folder / "train_gpt.py").write_text(TRAIN + "# changed")
    clone.interrupt()
    assert clone.trained == ["anew", "anew"]
    assert (clone.folder / "logs/sample/old_checkpoint_0000005.pt").read_text() == "step 5"


def test_checkpoints_of_other_code_stay_aside_after_a_stop_before_the_first_step(clone):
    clone.interrupt()
    broken = TRAIN.replace("there =", "sys.exit(3)\nthere =")
    (clone.folder / "train_gpt.py").write_text(broken)
    assert clone.start().wait(60) == 3
    assert list(clone.folder.glob("logs/sample/checkpoint_*.pt")) == []


def test_a_real_run_goes_on_where_it_was_interrupted(clone, dataset):
    for name in ("train_gpt.py", "frontier.py"):
        shutil.copy(REPO / name, clone.folder)
    env = tiny_settings(dataset, Path("logs"), ITERATIONS=100_000, MAX_WALLCLOCK_SECONDS=600)
    env |= {"TRAIN_LOG_EVERY": "1", "OMP_NUM_THREADS": "1", "EVAL_STRIDE": "0"}
    run, log = clone.folder / "logs/sample", clone.folder / "logs/sample.txt"
    process = clone.start(env=env)
    wait_until(lambda: log.exists() and "step:9/" in log.read_text())
    process.send_signal(signal.SIGTERM)
    assert "RESUME=auto" in process.communicate(timeout=60)[0]
    (saved,) = run.glob("checkpoint_*.pt")
    process = clone.start(env=env)
    step = int(saved.stem.split("_")[1])
    wait_until(lambda: f"step:{step + 2}/" in log.read_text())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    steps = [event["step"] for event in events(run, "train")]
    assert steps == sorted(set(steps))


# ---- beside each other


def test_a_second_run_sh_touches_nothing(clone):
    (clone.folder / "hold").touch()
    first = clone.start()
    wait_until(lambda: clone.trained)
    before = snapshot(clone.folder / "logs")
    second = clone.start()
    output = second.communicate(timeout=60)[0]
    assert second.returncode == 1
    assert f"another run.sh is at work here: process {first.pid} on" in output
    assert snapshot(clone.folder / "logs") == before
    clone.run("test")
    (clone.folder / "hold").unlink()
    assert first.wait(60) == 0


def test_a_training_by_hand_is_not_touched(clone):
    clone.interrupt()
    (clone.folder / "train_gpt.py").write_text(TRAIN + "# changed")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(flush=True)"
    lock = clone.folder / "logs/sample/lock"
    command = [sys.executable, "-c", f"{hold}; input()", lock]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        other.stdout.readline()
        lock.write_text("process 12 on here")
        before = snapshot(clone.folder / "logs/sample")
        second = clone.start()
        output = second.communicate(timeout=60)[0]
        assert (second.returncode, snapshot(clone.folder / "logs/sample")) == (1, before)
        other.communicate(b"\n")
    assert "logs/sample is in use by process 12 on here" in output


VENV = """#!/bin/sh
case "$*" in
*"-m venv"*)
  echo venv >> {folder}/made
  while [ ! -e {folder}/go ]; do sleep 0.02; done
  mkdir -p .venv/bin
  cp {folder}/stub .venv/bin/python;;
*) exec {python} "$@";;
esac
"""


def test_first_runs_at_once_install_one_after_the_other(clone, tmp_path):
    shutil.rmtree(clone.folder / ".venv")
    clone.write_python(tmp_path / "stub")
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(VENV.format(folder=tmp_path, python=sys.executable))
    python.chmod(0o755)
    env = {"PATH": f"{python.parent}:/usr/bin:/bin"}
    first = clone.start("test", env=env)
    wait_until((tmp_path / "made").exists)
    second = clone.start("test", env=env)
    assert "waiting for another run.sh" in second.stdout.readline()
    (tmp_path / "go").touch()
    assert (first.wait(60), second.wait(60)) == (0, 0)
    assert (tmp_path / "made").read_text() == "venv\n"
    installs = [line for line in clone.lines("calls") if "pip install" in line]
    assert len(installs) == 3  # the requirements files, once


def test_an_environment_that_works_is_kept_whoever_made_it(clone):
    (clone.folder / ".venv/mine").touch()
    (clone.folder / ".venv/installed_requirements.txt").unlink()
    clone.run("test")
    assert (clone.folder / ".venv/mine").exists()
    assert not [line for line in clone.lines("calls") if "-m venv" in line]


def test_a_venv_whose_python_is_gone_is_made_again(clone, tmp_path):
    (clone.folder / ".venv/bin/python").unlink()
    (clone.folder / ".venv/bin/python").symlink_to("/no/such/python")
    clone.write_python(tmp_path / "stub")
    (tmp_path / "go").touch()
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    script = VENV.format(folder=tmp_path, python=sys.executable)
    python.write_text(script.replace("mkdir -p", "rm -r .venv; mkdir -p"))
    python.chmod(0o755)
    clone.run("test", env={"PATH": f"{python.parent}:/usr/bin:/bin"})
    assert len([line for line in clone.lines("calls") if "pip install" in line]) == 3


# ---- from anywhere


def test_cdpath_leads_nowhere_else(clone, tmp_path):
    other = Clone(tmp_path / "elsewhere" / "clone")
    env = {"CDPATH": str(tmp_path / "elsewhere")}
    for script in ("clone/run.sh", "clone/../clone/run.sh"):
        clone.run(script=script, cwd=tmp_path, env=env)
    assert (clone.trained, other.trained) == (["anew"], [])


@pytest.mark.parametrize("name", ["a clone", "klön", "[a]*?", "-n", "a'b\"c", "$HOME"])
def test_any_name_of_the_clone_will_do(tmp_path, name):
    clone = Clone(tmp_path / name)
    clone.run(script=Path(name) / "run.sh" if name != "-n" else f"./{name}/run.sh", cwd=tmp_path)
    assert clone.trained == ["anew"]


@pytest.mark.parametrize("relative", [False, True])
def test_a_link_to_run_sh_will_do(clone, tmp_path, relative):
    (tmp_path / "bin").mkdir()
    target = "../clone/run.sh" if relative else clone.folder / "run.sh"
    (tmp_path / "bin" / "sample").symlink_to(target)
    (tmp_path / "again").symlink_to("bin/sample")
    clone.run(script="again", cwd=tmp_path)
    assert clone.trained == ["anew"]


@pytest.mark.parametrize(
    "variable",
    [
        *("PYTHONHOME=/nowhere", "PYTHONPATH=wrong", "PYTHONSAFEPATH=1", "PYTHONINSPECT=1"),
        *("VIRTUAL_ENV=/nowhere", "RESUME=/nowhere", "CONFIG=/nowhere", "RUN_ID=x", "OUT_DIR=/x"),
        *("PYTHONIOENCODING=ascii", "LC_ALL=C", "POSIXLY_CORRECT=1"),
    ],
)
def test_variables_that_were_left_behind_change_nothing(clone, variable):
    (clone.folder / "wrong").mkdir()
    (clone.folder / "wrong" / "signal.py").write_text("raise RuntimeError")
    (clone.folder / "data" / "helper.py").touch()
    (clone.folder / "data" / "prepare.py").write_text(f"import helper\n{PREPARE}")
    clone.run(env=dict([variable.split("=")]))
    assert clone.trained == ["anew"]
    assert (clone.folder / "logs/sample/finished").exists()


def test_pip_installs_into_the_environment_alone(clone):
    python = clone.folder / ".venv/bin/python"
    names = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_USER")
    python.write_text(python.read_text().replace("printf '%s\\n'", "env >> env; printf '%s\\n'"))
    (clone.folder / ".venv/installed_requirements.txt").unlink()
    clone.run("test", env=dict.fromkeys(names, "/nowhere") | {"PIP_INDEX_URL": "mine"})
    found = {line.split("=")[0] for line in clone.lines("env")}
    assert found.isdisjoint(names)
    assert "PIP_INDEX_URL" in found


def test_what_is_not_known_is_refused_before_anything_is_made(clone):
    process = clone.start("tset")
    assert "'tset' is not known" in process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert clone.lines("calls") == []


def test_options_of_pytest_are_handed_on(clone):
    clone.run("test", "-k", "a or b")
    assert "-m pytest -n auto -k a or b" in clone.lines("calls")


def test_a_console_that_is_closed_does_not_stop_a_run(clone):
    (clone.folder / "records" / "summary.py").write_text("")
    options = {"shell": True, "executable": "/bin/bash", "cwd": clone.folder, "text": True}
    for _ in range(2):
        done = subprocess.run(
            "bash run.sh | true; (exit ${PIPESTATUS[0]})", stderr=subprocess.PIPE, **options
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert clone.trained == ["anew"]


# ---- .ci/run

MADE = """
cd -- "$(dirname -- "$0")"
echo "$PWD: $*" >> {calls}
mkdir -p data/datasets/sample_sp1024 data/tokenizers logs/sample
for file in data/tokenizers/sample_1024_bpe.model logs/sample.txt; do : >> $file; done
[ ! -e data/datasets/fineweb10B_sp1024 ] || ls data/datasets records/track_10min_16mb >> {calls}
echo "the run is finished"
"""


def test_ci_tests_a_fresh_clone_and_one_where_all_is_made(clone, tmp_path):
    calls, other = tmp_path / "calls", Clone(tmp_path / "elsewhere" / "clone")
    for one in (clone, other):
        (one.folder / "run.sh").write_text(MADE.format(calls=shlex.quote(str(calls))))
        for words in (["init", "--quiet"], ["add", "."]):
            subprocess.run(["git", *words], cwd=one.folder, check=True)
    clone.run()
    calls.unlink()
    before = snapshot(clone.folder)
    clone.run(script="clone/.ci/run", cwd=tmp_path, env={"CDPATH": str(tmp_path / "elsewhere")})
    assert snapshot(clone.folder) == before
    first, *rest = calls.read_text().splitlines()
    assert first == f"{clone.folder}: test"
    (second,) = [line for line in rest if "test_house.py" in line]
    made = Path(second.partition(":")[0])
    assert not made.exists()
    assert f"{made}: " in rest
    assert {"fineweb10B_sp1024", "2026-11-22_Copy"} <= {*rest}
    assert "elsewhere" not in calls.read_text()
