"""The rules of the house that a program can check: measures, formatting, and generated text."""

import ast
import io
import os
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import copy_checkout

import train_gpt

ROOT = Path(train_gpt.__file__).parent
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")


NAMES = ("train_gpt.py", "frontier.py", "quantizer.py", "keeper.py")
FILES = [ROOT / name for name in NAMES if (ROOT / name).exists()]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COUNTED = (tokenize.OP, tokenize.NAME, tokenize.NUMBER, tokenize.STRING)


# ---- the four measures of design.md


def docstring_lines(source: str) -> set[int]:
    """The numbers of the lines that docstrings take."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            docstring = node.body[0]
            lines.update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that are neither blank, comment nor docstring."""
    lines = enumerate(map(str.strip, source.splitlines()), start=1)
    return {number for number, line in lines if line and line[0] != "#"} - docstring_lines(source)


def tokens_a_line(source: str) -> float:
    """Operators, names, numbers and strings outside docstrings, for each line of code. A formatted
    string counts as one: since Python 3.12 it comes in parts."""
    docstrings, count, depth = docstring_lines(source), 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":
            count += depth == 0
            depth += 1
        depth -= kind == "FSTRING_END"
        plain = token.type in COUNTED and token.start[0] not in docstrings
        count += plain and depth == 0
    return count / len(code_lines(source))


def tuple_assignments(source: str) -> float:
    """Assignments with tuples on both sides, for each 100 lines of code."""
    found = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    ]
    return 100 * len(found) / len(code_lines(source))


def long_functions(source: str) -> list[str]:
    """The functions of over 50 lines."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)]
    return [node.name for node in functions if node.end_lineno - node.lineno >= 50]


def run_ruff(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run ruff, which lies beside Python."""
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return subprocess.run([ruff, *arguments], capture_output=True, text=True, **options)


@each_file
def test_a_file_is_at_most_2100_lines(path):
    assert path.read_text(encoding="utf-8").count("\n") <= 2100


@each_file
def test_a_line_of_code_has_at_most_11_5_tokens(path):
    assert tokens_a_line(path.read_text(encoding="utf-8")) <= 11.5


@each_file
def test_tuple_assignments_are_rare(path):
    assert tuple_assignments(path.read_text(encoding="utf-8")) <= 1.5


@each_file
def test_no_function_is_over_50_lines(path):
    assert long_functions(path.read_text(encoding="utf-8")) == []


SNIPPET = '''"""Neither this docstring,
nor its second line."""

# nor this comment counts
def double(x: int) -> str:
    """Nor this."""

    return f"{x + x:{x}.{x}} of {f'{x}'}"  # nor this
'''


def test_the_measures_count_code_alone():
    assert code_lines(SNIPPET) == {5, 8}
    assert tokens_a_line(SNIPPET) == (10 + 2) / 2  # a formatted string is one


@pytest.mark.parametrize(
    ("source", "tokens"),
    [("x = 1\n", 3), ("x = f'{y}' 'z'\n", 4), ("f(x, y)\nf(\n    x\n)\n", 10 / 4)],
)
def test_tokens_are_counted_by_the_line(source, tokens):
    assert tokens_a_line(source) == tokens


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("a, b = x, y", 1),
        ("(a, b), c = d = x, y", 1),
        ("a, b = f(x)", 0),
        ("a = x, y", 0),
        ("a = b = x", 0),
    ],
)
def test_tuples_on_both_sides_are_found(line, found):
    assert tuple_assignments(f"{line}\n" + 99 * "x = 1\n") == found


def test_a_function_of_51_lines_is_found():
    body = 49 * "    x = 1\n"
    source = f"def short():\n{body}\nasync def long():\n{body}    x = 1\n"
    assert long_functions(source) == ["long"]


DENSE = "def f(x: int) -> None:\n    {}\n" + 12 * "    if x:\n        x = 0\n"
BROKEN = {
    "C901": DENSE.format('"""Do it."""'),
    "D205": '"""Do this\nand that."""\n',
    "D401": 'def f() -> None:\n    """The function."""\n',
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", BROKEN)
def test_ruff_finds_what_is_hard_to_read(rule, name):
    """Complexity over 12, and docstrings that do not begin with a verb in one short sentence."""
    arguments = ["check", "--output-format=concise", f"--stdin-filename={name}", "-"]
    done = run_ruff(*arguments, input=BROKEN[rule], cwd=ROOT)
    assert f": {rule} " in done.stdout


# ---- the rest


def test_nothing_runs_at_import():
    """Only definitions, constants and the main guard stand at the top level."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.If)
    allowed += (ast.Assign, ast.AnnAssign)
    body = ast.parse(SOURCE).body[1:]
    assert [ast.unparse(node) for node in body if not isinstance(node, allowed)] == []


def test_sections_come_in_the_order_of_the_design():
    titles = [line.strip("#= ") for line in SOURCE.splitlines() if line.startswith("# ====")]
    assert titles == [
        *("SETTINGS", "MODEL", "OPTIMIZERS", "DATA", "EVALUATION", "ARTIFACT"),
        *("DISTRIBUTED RUN", "TRAINING", "MAIN"),
    ]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_is_content(command, tmp_path):
    done = run_ruff(*command, ".", cwd=copy_checkout(tmp_path / "copy"))
    assert done.returncode == 0, done.stdout


def test_tests_and_their_programs_start_in_an_empty_folder(server, tmp_path):
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []
    (server.folder / "own.env").write_text("NUM_LAYERS=none\n")
    assert "NUM_LAYERS=none" in server.run({"CONFIG": "own.env"}).output
