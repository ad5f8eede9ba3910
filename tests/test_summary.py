"""records/summary.py, records/console.py and benchmarks/compressors.py, run as programs."""

import json
import lzma
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train_gpt

sys.path.insert(0, str(Path(train_gpt.__file__).parent / "records"))
import summary

ROOT = Path(train_gpt.__file__).parent


def run(tool: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run a tool of the repository."""
    command = [sys.executable, ROOT / tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


EVENTS = [
    {"event": "start"},
    {"event": "val", "step": 0, "train_time_ms": 0.0, "tokens_per_second": 0.0}
    | {"val_loss": 6.9, "val_bpb": 4.2},
    {"event": "train", "step": 1, "train_loss": 6.9},
    {"event": "train", "step": 2, "train_loss": 5.9},
    {"event": "val", "step": 2, "train_time_ms": 1500.0, "tokens_per_second": 1234.5}
    | {"val_loss": 5.5, "val_bpb": 3.25},
    {"event": "final", "val_loss": 5.6, "val_bpb": 3.3125}
    | {"code_bytes": 40_000, "artifact_bytes": 1_000_000, "max_bytes": 16_000_000},
]


def write_run(folder: Path, events: list[dict]) -> Path:
    """A run's folder with the given events."""
    folder.mkdir()
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def test_summary_tells_scores_sizes_and_speed(tmp_path):
    done = run("records/summary.py", write_run(tmp_path / "a_run", EVENTS))
    assert done.returncode == 0, done.stderr
    wanted = ["3.2500 before", "3.3125 after", "1,000,000 bytes", "40,000 bytes", "1,234 tokens/s"]
    wanted += ["1,040,000 of 16,000,000", "2 steps in 1.5 s", str(tmp_path / "a_run" / "loss.png")]
    assert [text for text in wanted if text not in done.stdout] == []


def test_summary_draws_a_picture(tmp_path):
    folder = write_run(tmp_path / "a_run", EVENTS)
    run("records/summary.py", folder)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_summary_is_of_the_last_run(tmp_path):
    changed = [event | {"val_bpb": 1.5} if "val_bpb" in event else event for event in EVENTS]
    done = run("records/summary.py", write_run(tmp_path / "a_run", EVENTS + changed))
    assert "1.5000 after" in done.stdout
    assert "3.3125" not in done.stdout


@pytest.mark.parametrize("events", [[], EVENTS[:-1], [*EVENTS, {"event": "start"}]])
def test_unfinished_run_is_refused(tmp_path, events):
    done = run("records/summary.py", write_run(tmp_path / "a_run", events))
    assert done.returncode == 1
    assert "did not finish" in done.stderr


def test_missing_run_is_refused(tmp_path):
    done = run("records/summary.py", tmp_path / "none")
    assert done.returncode == 1
    assert str(tmp_path / "none") in done.stderr


TORN = json.dumps(EVENTS[2])[:20]


@pytest.mark.parametrize(
    "text",
    [
        "".join(json.dumps(event) + "\n" for event in EVENTS) + TORN,
        TORN + "".join(json.dumps(event) + "\n" for event in EVENTS),
        "\0\0\0\n3\n[]\n{}\n\n" + "".join(json.dumps(event) + "\n" for event in EVENTS),
        "[" * 100_000 + "\n" + "".join(json.dumps(event) + "\n" for event in EVENTS),
    ],
    ids=["at the end", "before the start, in its line", "zeros of a crash", "deep"],
)
def test_torn_lines_are_left_aside(tmp_path, text):
    folder = write_run(tmp_path / "a_run", [])
    (folder / "metrics.jsonl").write_text(text)
    done = run("records/summary.py", folder)
    assert done.returncode == 0, done.stderr
    assert "3.3125 after" in done.stdout


def test_a_torn_final_event_is_no_finished_run(tmp_path):
    folder = write_run(tmp_path / "a_run", EVENTS)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    done = run("records/summary.py", folder)
    assert (done.returncode, "did not finish" in done.stderr) == (1, True)


# ---- the picture


def drawing(monkeypatch, events: list[dict]) -> list:
    """The axes of the picture of these events."""
    monkeypatch.setattr(summary.plt, "close", lambda figure: None)
    assert summary.draw_loss(events, "a_run").startswith(b"\x89PNG")
    figure = summary.plt.gcf()
    monkeypatch.undo()
    summary.plt.close(figure)
    return figure.axes


def test_the_axes_are_those_of_the_data(monkeypatch):
    left, right = drawing(monkeypatch, EVENTS)
    low, high = left.get_ylim()
    assert (low, high) == pytest.approx((5.5 - 0.06 * 1.4, 6.9 + 0.06 * 1.4))
    assert right.get_ylim()[0] > 2


def test_both_axes_show_a_loss_at_the_same_height(monkeypatch):
    left, right = drawing(monkeypatch, EVENTS)
    bpb_per_nat = EVENTS[-1]["val_bpb"] / EVENTS[-1]["val_loss"]
    assert right.get_ylim() == pytest.approx([bpb_per_nat * end for end in left.get_ylim()])


def test_the_score_of_the_artifact_is_drawn_and_told(monkeypatch):
    _, right = drawing(monkeypatch, EVENTS)
    star = right.lines[-1]
    assert (*star.get_xdata(), *star.get_ydata()) == (2, 3.3125)
    assert "3.3125 bits per byte from the artifact" in right.texts[0].get_text()


def test_the_rates_are_drawn_where_they_are_logged(monkeypatch):
    assert len(drawing(monkeypatch, EVENTS)) == 2
    rated = [event | {"lr_scale": 0.5} if event["event"] == "train" else event for event in EVENTS]
    _, below, _ = drawing(monkeypatch, rated)
    assert list(below.lines[0].get_ydata()) == [0.5, 0.5]


def test_the_running_mean_is_that_of_as_many_values_on_both_sides():
    values = [float((7 * i) % 13) for i in range(90)]
    values[40] = math.nan
    reach = 3  # 90 / 40, rounded up
    for i, mean in enumerate(summary.running_mean(values)):
        near = values[i - min(i, reach) : i + min(i, reach) + 1]
        known = [value for value in near if value == value]
        wanted = math.nan if i == 40 else sum(known) / len(known)
        assert mean == pytest.approx(wanted, nan_ok=True)


NAMES = ["costs $5 and $6", "$\\frac{$", "a_b^c", "日本", "ü\udcff", "a\nb", "-x", "100%", "{name}"]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_of_a_run_will_do_on_any_console(tmp_path, name, encoding):
    folder = write_run(tmp_path / name, EVENTS)
    done = run("records/summary.py", folder, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "loss.png").is_file()


@pytest.mark.parametrize("path", [".", "../a_run", "./", "../a_run/", "x/.."])
def test_a_path_without_a_name_is_that_of_its_folder(tmp_path, path):
    folder = write_run(tmp_path / "a_run", EVENTS)
    (folder / "x").mkdir()
    done = run("records/summary.py", path, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "The run a_run:" in done.stdout
    assert "a_run.txt" in done.stdout


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e308, 10**309])
def test_any_loss_is_drawn(tmp_path, value):
    number = {"val_loss": value, "val_bpb": value, "train_loss": value}
    changed = [event | {k: v for k, v in number.items() if k in event} for event in EVENTS]
    folder = write_run(tmp_path / "a_run", changed)
    done = run("records/summary.py", folder)
    assert "Traceback" not in done.stderr
    assert done.returncode == (value == 10**309)


@pytest.mark.parametrize("number", [i for i in range(len(EVENTS)) if len(EVENTS[i]) > 1])
def test_an_event_that_lacks_a_number_is_named(tmp_path, number):
    for name in EVENTS[number]:
        if name == "event":
            continue
        for changed in ({}, {name: None}, {name: "1"}):
            event = {k: v for k, v in EVENTS[number].items() if k != name} | changed
            events = [*EVENTS[:number], event, *EVENTS[number + 1 :]]
            folder = write_run(tmp_path / f"run_{name}_{len(changed)}_{changed.get(name)}", events)
            with pytest.raises(SystemExit, match=f"without a number '{name}'"):
                summary.read_events(folder)


def test_a_folder_that_cannot_be_written_costs_the_picture_alone(tmp_path):
    folder = write_run(tmp_path / "a_run", EVENTS)
    (folder / ".loss.png.partial").mkdir()  # root may write everywhere
    done = run("records/summary.py", folder)
    assert done.returncode == 1
    assert "3.3125 after" in done.stdout
    assert done.stderr == f"{folder}/loss.png: cannot be written: Is a directory\n"


def test_a_picture_of_before_outlives_a_full_disk(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "a_run", EVENTS)
    (folder / "loss.png").write_bytes(b"old")

    def fail(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(SystemExit, match="No space left"):
        summary.main([str(folder)])
    assert (folder / "loss.png").read_bytes() == b"old"
    assert "3.3125 after" in capsys.readouterr().out


TOOLS = {
    "records/summary.py": lambda place: [write_run(place / "run", EVENTS)],
    "records/audit.py": lambda place: [place],
    "records/leaderboard.py": lambda place: ["--records", place],
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("console", ["closed pipe", "full disk", "none", "ascii"])
def test_tools_end_in_words_on_any_console(tmp_path, tool, console):
    place = tmp_path / "ü"
    (place / "track_a" / "2026-01-01_日").mkdir(parents=True)
    arguments = TOOLS[tool](place)
    command = [sys.executable, str(ROOT / tool), *map(str, arguments)]
    end = {"closed pipe": "| true", "full disk": "> /dev/full", "none": ">&-", "ascii": ""}[console]
    if console == "full disk" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    line = f"{shlex.join(command)} {end}"
    done = subprocess.run(line, shell=True, env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert ("error: [Errno 28]" in done.stderr) == (console == "full disk")


def test_compressors_see_the_text_that_the_tokens_decode_to(dataset):
    done = run("benchmarks/compressors.py", dataset.folder, dataset.tokenizer)
    assert done.returncode == 0, done.stderr
    encoded = map(dataset.sp.encode, dataset.val_documents)
    text = "".join(map(dataset.sp.decode, encoded)).encode()
    size = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    assert f"{len(text):,} bytes of validation text" in done.stdout
    assert f"| xz -9e | {size:,} | {8 * size / len(text):.4f} |" in done.stdout
