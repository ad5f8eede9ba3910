"""records/summary.py and benchmarks/compressors.py, run as programs."""

import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest

import train_gpt

ROOT = Path(train_gpt.__file__).parent


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a tool of the repository."""
    command = [sys.executable, ROOT / tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


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


def test_compressors_see_the_text_that_the_tokens_decode_to(dataset):
    done = run("benchmarks/compressors.py", dataset.folder, dataset.tokenizer)
    assert done.returncode == 0, done.stderr
    encoded = map(dataset.sp.encode, dataset.val_documents)
    text = "".join(map(dataset.sp.decode, encoded)).encode()
    size = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    assert f"{len(text):,} bytes of validation text" in done.stdout
    assert f"| xz -9e | {size:,} | {8 * size / len(text):.4f} |" in done.stdout
