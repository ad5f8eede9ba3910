"""lab/watch.py: what it shows of a run, when it ends, and that it signals a run's process alone."""

import contextlib
import importlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import REPO, cli_env, events

LAB = REPO / "lab"
sys.path.append(str(LAB))
owner = importlib.import_module("owner")
terminal = importlib.import_module("terminal")
watch = importlib.import_module("watch")

SETTINGS = {"iterations": 100, "max_wallclock_seconds": 0.0, "warmdown_iters": 10}
START = {"event": "start", "versions": "v", "settings": SETTINGS}
MODEL = {"event": "model", "parameters": 10, "flops_per_token": 1e8, "world_size": 8}
MODEL |= {"device": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16"}
FINAL = {"event": "final", "val_loss": 2.0, "val_bpb": 1.25, "code_bytes": 100}
FINAL |= {"artifact_bytes": 900, "max_bytes": 16_000_000}
VAL = {"event": "val", "step": 100, "train_time_ms": 1e5, "tokens_per_second": 5e6}
VAL |= {"val_loss": 2.0, "val_bpb": 1.25}


def train(step, loss=2.5, **more):
    event = {"event": "train", "step": step, "train_time_ms": 1e3 * step}
    return {**event, "tokens_per_second": 5e6, "train_loss": loss, **more}


def write(folder: Path, *written, end="") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in written) + end)
    return folder


def run_watch(*arguments, **env):
    """Run watch.py to its end."""
    command = [sys.executable, str(LAB / "watch.py"), *map(str, arguments)]
    texts = {name: str(value) for name, value in env.items()}
    return subprocess.run(
        command, env=cli_env(texts), capture_output=True, text=True, timeout=60, check=False
    )


# A process that has a run's lock, as keeper.py takes it, notes SIGUSR1, and writes what it is told.
RUN = """
import fcntl, os, signal, sys
folder, heard = sys.argv[1:]
if heard != "deaf":
    signal.signal(signal.SIGUSR1, lambda *_: open(folder + "/heard", "a").write("x"))
lock = open(folder + "/lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
open(folder + "/lock", "w").write(f"process {os.getpid()} on {os.uname().nodename}")
print("locked", flush=True)
for line in sys.stdin:
    open(folder + "/metrics.jsonl", "a").write(line)
"""


class Run:
    """A process that a run's folder belongs to."""

    def __init__(self, folder: Path, heard: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        command = [sys.executable, "-c", RUN, str(folder), heard]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)
        assert self.process.stdout.readline() == "locked\n"

    @property
    def signals(self) -> int:
        path = self.folder / "heard"
        return len(path.read_text()) if path.exists() else 0

    def heard(self) -> int:
        """How many signals came, after one had the time to."""
        end = time.monotonic() + 10
        while not self.signals and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        return self.signals

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def start_run(tmp_path):
    """Start processes that runs' folders belong to."""
    started = []

    def start(name="live", heard=""):
        started.append(Run(tmp_path / "logs" / name, heard))
        return started[-1]

    yield start
    for run in started:
        run.end()


def watched(folder: Path, **levels) -> "watch.Watched":
    return watch.Watched(folder, watch.DEFAULT_LEVELS | levels)


def journal(folder: Path) -> list[dict]:
    path = folder / "watch.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- whose process a run is


def test_the_process_that_holds_the_lock_is_the_run_s(start_run):
    run = start_run()
    assert owner.find_owner(run.folder).pid == run.process.pid


def test_a_run_whose_process_has_ended_has_no_owner(start_run):
    run = start_run()
    run.end()
    assert owner.find_owner(run.folder) is None


def test_another_process_with_the_number_of_a_dead_run_s_is_not_its_own(tmp_path):
    (tmp_path / "lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    assert owner.find_owner(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "it has no lock"),
        ("", "names no process"),
        ("process 12 34 on x", "names no process"),
        ("process 1 on another-node", "it runs on another-node"),
    ],
)
def test_what_cannot_be_told_is_said(tmp_path, text, why):
    if text is not None:
        (tmp_path / "lock").write_text(text)
    with pytest.raises(owner.OwnerError, match=why):
        owner.find_owner(tmp_path)


def test_looking_for_the_owner_never_takes_the_lock(start_run):
    run = start_run()
    for _ in range(3):
        owner.find_owner(run.folder)
    run.end()
    assert owner.find_owner(run.folder) is None
    start_run()  # takes the lock at once, or fails


def test_a_process_that_would_be_killed_by_the_signal_gets_none(start_run):
    run = start_run(heard="deaf")
    found = owner.find_owner(run.folder)
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells who listens")
    with pytest.raises(owner.OwnerError, match="does not listen to SIGUSR1"):
        owner.ask_to_finish(run.folder, found)
    assert run.process.poll() is None


def test_a_process_that_is_not_the_run_s_any_more_gets_no_signal(start_run):
    run = start_run()
    found = owner.find_owner(run.folder)
    other = owner.Owner(found.pid, found.began - 1)  # one of that number, before
    with pytest.raises(owner.OwnerError, match="not the run's any more"):
        owner.ask_to_finish(run.folder, other)
    assert run.signals == 0


def test_the_journal_takes_a_record_once(tmp_path):
    book = owner.Journal(tmp_path)
    assert book.add({"a": 1, "b": 1}, "a")
    assert not book.add({"a": 1, "b": 2}, "a")
    with open(book.path, "a") as file:
        file.write('{"a": 3')  # cut off
    assert book.add({"a": 3, "b": 3}, "a")
    lines = book.path.read_text().splitlines()
    assert [json.loads(lines[0]), lines[1], json.loads(lines[2])] == [
        {"a": 1, "b": 1},
        '{"a": 3',
        {"a": 3, "b": 3},
    ]


# ---- acting


def frozen(*steps):
    rng = np.random.default_rng(0)
    return [train(step, 2.5 + 1e-4 * rng.normal()) for step in range(*steps)]


def test_a_guard_that_acts_ends_the_run_once(start_run):
    run = start_run()
    write(run.folder, START, *frozen(1, 50))
    first = watched(run.folder, plateau="act")
    second = watched(run.folder, plateau="act")
    for one in (first, second):
        _, lines = one.look()
        assert not any("SIGUSR1" in text for text in lines)  # that may be the past
    write(run.folder, *frozen(50, 52))
    _, lines = first.look()
    assert lines[-1].startswith("plateau at step 51: SIGUSR1 sent to process")
    assert run.heard() == 1
    write(run.folder, *frozen(52, 54))
    for one in (first, second):
        _, lines = one.look()
        assert not any("SIGUSR1" in text for text in lines)
    assert run.signals == 1
    acts = [record for record in journal(run.folder) if record["event"] == "act"]
    assert [(r["guard"], r["step"], r["process"]) for r in acts] == [
        ("plateau", 51, run.process.pid)
    ]


@pytest.mark.parametrize("level", ["warn", "off"])
def test_a_guard_that_may_not_act_sends_nothing(start_run, level):
    run = start_run()
    write(run.folder, START, *frozen(1, 40))
    one = watched(run.folder, plateau=level)
    said = one.look()[1]
    write(run.folder, *frozen(40, 60))
    said += one.look()[1]
    assert run.signals == 0
    assert any("plateau" in text for text in said) == (level == "warn")
    assert any(r["guard"] == "plateau" for r in journal(run.folder)) == (level == "warn")


def test_a_new_process_gets_no_signal_for_what_the_one_before_it_wrote(start_run):
    run = start_run()
    write(run.folder, START, *frozen(1, 50))
    one = watched(run.folder, plateau="act")
    one.look()
    write(run.folder, *frozen(50, 60))
    run.end()
    new = start_run()
    one.look()
    assert new.signals == 0


def test_a_run_that_is_ending_gets_no_signal(start_run):
    run = start_run()
    write(run.folder, START, *frozen(1, 50))
    one = watched(run.folder, plateau="act")
    one.look()
    write(run.folder, *frozen(50, 60), {"event": "stopping_early", "step": 59, "reason": "cap"})
    one.look()
    assert run.signals == 0


def test_a_process_that_is_not_known_is_refused_with_a_word(tmp_path):
    folder = write(tmp_path / "here", START, *frozen(1, 50))
    (folder / "lock").write_text("process 1 on elsewhere")
    one = watched(folder, plateau="act")
    one.look()
    write(folder, *frozen(50, 60))
    _, lines = one.look()
    assert lines[-1].endswith("no SIGUSR1 sent: it runs on elsewhere, not here")


def test_a_real_run_that_is_frozen_is_ended_and_exports(place):
    rates = dict.fromkeys(("MATRIX_LR", "SCALAR_LR", "EMBED_LR", "HEAD_LR"), 1e-12)
    run = place.start(
        **rates, EMA_DECAY=0, ITERATIONS=4000, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=0, MUON_WD=0,
        ADAM_WD=0, EMBED_WD=0, WARMDOWN_ITERS=1, MAX_WALLCLOCK_SECONDS=0,
    )  # fmt: skip
    run.until((place.folder / "lock").exists)
    one = watched(place.folder, plateau="act")
    # The window would be long: to this watcher the run seems to be a short one.
    one.guards.begin = shorten(one.guards.begin)
    run.until(lambda: any("SIGUSR1 sent" in text for text in one.look()[1]) or run.poll())
    run.wait()
    assert run.returncode == 0, run.output
    assert events(place.folder, "stopping_early")[-1]["reason"] == "SIGUSR1"
    assert (place.folder / "final_model.artifact").exists()
    one.look()
    assert (one.state, one.is_over, one.has_failed) == ("finished", True, False)


def shorten(begin):
    return lambda settings, past=None: begin(settings | {"iterations": 80}, past)


def test_a_real_run_that_is_killed_has_died(place):
    run = place.start(ITERATIONS=100_000, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=0)
    one = watched(place.folder)
    run.until(lambda: (place.folder / "lock").exists() and one.look()[0])
    assert (one.state, one.is_over) == ("running", False)
    run.send(signal.SIGKILL)
    run.wait()
    one.look()
    assert (one.state, one.is_over, one.has_failed) == ("died", True, True)


# ---- what is shown


def test_a_finished_run_is_shown_and_ends_well(tmp_path):
    write(tmp_path / "logs" / "done", START, MODEL, train(1), VAL, FINAL)
    done = run_watch("done", "--out-dir", tmp_path / "logs")
    assert (done.returncode, done.stderr) == (0, "")
    fields = dict(part.split(":") for part in done.stdout.splitlines()[-1].split()[2:])
    assert fields["step"] == "100/100"
    assert fields["val_bpb"] == fields["final_bpb"] == "1.2500"
    assert fields["bytes"] == "1000"
    assert fields["mfu"] == f"{100 * 1e8 * 5e6 / (8 * 989e12):.1f}%"


def test_a_dead_run_is_told_and_ends_with_1(tmp_path):
    folder = write(tmp_path / "logs" / "dead", START, train(1), end='{"event": "train", "st')
    (folder / "lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    done = run_watch("dead", OUT_DIR=tmp_path / "logs")
    assert done.returncode == 1
    assert done.stdout.startswith("dead died step:1/100 ")


def test_a_last_line_without_its_end_is_read_of_a_dead_run(tmp_path):
    end = json.dumps(train(2))
    folder = write(tmp_path / "dead", START, train(1), end=end)
    (folder / "lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    assert "step:2/100" in run_watch(folder).stdout


def test_a_run_that_ended_by_a_signal_is_told(tmp_path):
    stop = {"event": "stopping_early", "step": 1, "train_time_ms": 1.0, "reason": "SIGTERM"}
    folder = write(tmp_path / "stopped", START, train(1), stop)
    (folder / "lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    done = run_watch(folder)
    assert done.returncode == 1
    assert "stopped ended by SIGTERM" in done.stdout


@pytest.mark.parametrize("end", ["", "{", '{"event": "later version"}\n'])
def test_a_file_without_a_run_is_an_error_in_a_line(tmp_path, end):
    folder = write(tmp_path / "none", end=end)
    done = run_watch(folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "no event 'start' in it" in done.stderr


def test_what_is_not_there_is_an_error_in_a_line(tmp_path):
    done = run_watch("nothing")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


@pytest.mark.parametrize("arguments", [[], ["x", "--plateau", "maybe"], ["x", "--report-to", "y"]])
def test_a_wrong_command_line_ends_with_2(arguments):
    assert run_watch(*arguments).returncode == 2


def test_several_runs_are_watched_to_their_ends(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "logs" / name, START, train(1), FINAL)
    done = run_watch("a", "b", OUT_DIR=tmp_path / "logs")
    assert [line.split()[0] for line in done.stdout.splitlines() if "finished" in line] == [
        "a",
        "b",
    ]


def test_a_run_that_grows_is_shown_until_it_ends(start_run):
    run = start_run()
    write(run.folder, START, train(1))
    command = [sys.executable, str(LAB / "watch.py"), str(run.folder)]
    shown = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "step:1/100" in shown.stdout.readline()
    write(run.folder, train(2, math.nan), {"event": "warning", "text": "hot"})
    lines = [shown.stdout.readline() for _ in range(3)]
    assert lines[0] == "live warning: hot\n"
    assert lines[1] == "live divergence at step 2: the loss is nan\n"
    assert "step:2/100" in lines[2]
    write(run.folder, FINAL)
    run.end()
    rest = shown.stdout.read()
    assert shown.wait() == 0
    assert "live finished" in rest


def test_once_shows_a_live_run_and_ends(start_run):
    run = start_run()
    write(run.folder, START, train(1))
    done = run_watch(run.folder, "--once")
    assert done.returncode == 0
    assert done.stdout.startswith("live running step:1/100")


def test_output_that_is_closed_early_ends_it_without_a_word(start_run):
    run = start_run()
    write(run.folder, START, train(1))
    command = f"{sys.executable} {LAB / 'watch.py'} {run.folder} | head -n 1"
    pipe = subprocess.Popen(["sh", "-c", command], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    pipe.stdout.readline()
    for step in range(2, 200):
        write(run.folder, train(step))
        time.sleep(0.05)
        if pipe.poll() is not None:
            break
    assert pipe.communicate(timeout=20)[1] == b""


def test_ctrl_c_ends_it_quietly(start_run):
    run = start_run()
    write(run.folder, START, train(1))
    command = [sys.executable, str(LAB / "watch.py"), str(run.folder)]
    shown = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    shown.stdout.readline()
    shown.send_signal(signal.SIGINT)
    assert (shown.communicate(timeout=20)[1], shown.returncode) == ("", 130)
    assert run.process.poll() is None


# ---- as a child of the run

PARENT = """
import os, pathlib, subprocess, sys, time
folder, watch = sys.argv[1:3]
command = [sys.executable, watch, folder, "--child", *sys.argv[3:]]
child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_silent_child_of_a_process_that_has_ended_ends_too(tmp_path):
    folder = write(tmp_path / "run", START, train(1), train(2, math.nan))
    done = run_watch(folder, "--child", 2**22 + 1, "--silent")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert journal(folder) == []


def test_a_child_says_only_what_it_finds_and_ends_with_its_parent(tmp_path):
    folder = write(tmp_path / "run", START, train(1))
    command = [sys.executable, "-c", PARENT, str(folder), str(LAB / "watch.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    parent = subprocess.Popen(command, **pipes)
    child = psutil.Process(int(parent.stdout.readline()))
    write(folder, train(2), train(3, math.inf))
    assert parent.stdout.readline() == "watch: divergence at step 3: the loss is inf\n"
    write(folder, train(4), FINAL)
    time.sleep(1.5)
    assert child.is_running()
    parent.stdin.close()
    parent.wait()
    child.wait(20)
    assert parent.stdout.read() == ""


# ---- figures


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", math.nan),
        ("NVIDIA L40", math.nan),
        ("cpu", math.nan),
        ("None", math.nan),
    ],
)
def test_peaks_are_known_by_a_gpu_s_whole_name(device, peak):
    assert watch.peak_flops(device) == pytest.approx(peak, nan_ok=True)


@pytest.mark.parametrize("changed", [{"dtype": "float32"}, {"device": "cpu"}, {"world_size": None}])
def test_there_is_no_mfu_where_the_peak_is_not_known(changed):
    assert math.isnan(watch.mfu(MODEL | changed, 1e6))


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, "1m30s"),  # 90 of 100 steps, a second each
        ({"max_wallclock_seconds": 50.0}, "0m40s"),
        ({"iterations": 10_000}, "2h46m"),
    ],
)
def test_the_time_that_is_left_is_to_what_comes_first(tmp_path, start_run, settings, left):
    run = start_run()
    start = START | {"settings": SETTINGS | settings}
    write(run.folder, start, *(train(step) for step in range(1, 11)))
    one = watched(run.folder)
    one.look()
    assert one.figures()["left"] == left


def test_a_run_of_an_older_script_has_fewer_figures(tmp_path):
    folder = write(tmp_path / "old", {"event": "start"}, {"event": "train", "step": 3})
    one = watched(folder)
    one.look()
    assert one.figures() == {"step": "3", "phase": "warmup"}
    assert one.line() == "old running? step:3 phase:warmup"


def test_a_resumed_run_shows_what_was_found_before(tmp_path):
    resume = {"event": "resume", "path": "p", "step": 4}
    folder = write(tmp_path / "again", START, train(1), train(2, math.nan), train(5, math.nan))
    write(folder, START, resume, train(5))
    one = watched(folder)
    one.look()
    assert one.warnings() == ["divergence at step 2: the loss is nan"]


# ---- the terminal


def letters(text) -> list[str]:
    return [line.plain for line in text]


def test_a_curve_is_drawn_where_its_points_are():
    chart = terminal.Chart(4, 2)
    chart.draw([(0.0, 1.0), (1.0, 0.0)], "red")
    rows = letters(chart.rows())
    dots = {
        (2 * column + right, 4 * row + down)
        for row, line in enumerate(rows)
        for column, letter in enumerate(line)
        for right, half in enumerate(terminal.DOTS)
        for down, bit in enumerate(half)
        if letter != " " and ord(letter) - 0x2800 & bit
    }
    assert dots == {(x, x) for x in range(8)}


def test_points_of_a_column_are_drawn_at_their_mean():
    chart = terminal.Chart(1, 1)
    chart.draw([(0.1, 0.0), (0.2, 2 / 3)], "red")
    assert letters(chart.rows()) == [chr(0x2800 + terminal.DOTS[0][2])]


def test_a_terminal_without_unicode_gets_plain_letters():
    chart = terminal.Chart(3, 1, braille=False)
    chart.draw([(0.0, 0.5)], "red")
    chart.mark([(1.0, 0.5)], "red")
    assert letters(chart.rows()) == ["* o"]


@pytest.mark.parametrize("size", [(120, 30), (60, 24), (20, 8)])
def test_the_picture_fits_the_terminal(tmp_path, size):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        write(folder, START, MODEL, *(train(n, 3 - 0.01 * n) for n in range(1, 60)), VAL)
        write(folder, train(61, math.nan))
    runs = [watched(folder) for folder in folders]
    for one in runs:
        one.look()
    console = terminal.Console(width=size[0], height=size[1], record=True, file=io.StringIO())
    console.print(terminal.picture(runs, ["something was said"], console))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= size[0]
    if size[1] >= 24:
        assert len(lines) <= size[1]
        assert "something was said" in lines[-1]
        assert any("2.4" in line for line in lines)  # a label of the axis
