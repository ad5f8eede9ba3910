"""The rules of the house that a program can check: sizes, formatting, and generated text."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import copy_checkout

import train_gpt

ROOT = Path(train_gpt.__file__).parent
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")


def functions() -> list[tuple[str, int]]:
    """Every function of train_gpt.py with its length in lines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, kinds)]
    return [(node.name, node.end_lineno - node.lineno + 1) for node in nodes]


def test_the_file_is_at_most_2100_lines():
    assert SOURCE.count("\n") <= 2120


def test_no_function_is_over_50_lines():
    long = [(n, lines) for n, lines in functions() if lines > 50]
    assert long == []


def test_nothing_runs_at_import():
    """Only definitions, constants and the main guard stand at the top level."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.If)
    body = ast.parse(SOURCE).body[1:]
    assert [ast.unparse(node) for node in body if not isinstance(node, allowed)] == []


def test_sections_come_in_the_order_of_the_design():
    titles = [line.strip("#= ") for line in SOURCE.splitlines() if line.startswith("# ====")]
    assert titles == [
        *("SETTINGS", "MODEL", "OPTIMIZERS", "DATA", "EVALUATION", "ARTIFACT"),
        *("DISTRIBUTED RUN", "CHECKPOINTS", "TRAINING", "MAIN"),
    ]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_is_content(command, tmp_path):
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    copy = copy_checkout(tmp_path / "copy")
    done = subprocess.run([ruff, *command, "."], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_tests_and_their_programs_start_in_an_empty_folder(server, tmp_path):
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []
    (server.folder / "own.env").write_text("NUM_LAYERS=none\n")
    assert "NUM_LAYERS=none" in server.run({"CONFIG": "own.env"}).output
