"""records/helpers.py: which code beside train_gpt.py is used."""

import sys
from pathlib import Path

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "records"))

import helpers

FILES = {
    "alone.py": "",
    "one.py": "import two\n",
    "two.py": "from package import inner\n",
    "package/__init__.py": "",
    "package/inner.py": "from .deep import thing\nfrom .. import alone\n",
    "package/deep.py": "",
    "package/other.py": "import one\n",
    "kernels/fast.cu": '#include "fast.cuh"\n',
    "kernels/fast.cuh": "",
    "native.cpython-312-x86_64-linux-gnu.so": "",
    ".hidden/alone.py": "",
    "notes.txt": "",
}
PACKAGE = ["package/__init__.py", "package/deep.py", "package/inner.py"]


def used(folder: Path, text: str) -> list[str]:
    """The names of the files that a script of this text uses."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "train_gpt.py").write_text(text)
    return [path.relative_to(folder).as_posix() for path in helpers.find_used(folder)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("alone = 1  # alone.py", []),
        ("import alone", ["alone.py"]),
        ("    import os, alone as a", ["alone.py"]),
        ("import alone; import json", ["alone.py"]),
        ("from alone import *", ["alone.py"]),
        ("from . import (\n    alone,\n)", ["alone.py"]),
        ("import alone.x", ["alone.py"]),
        ("import aloner", []),
        ("open('alone.py')", ["alone.py"]),
        ("importlib.import_module('alone')", ["alone.py"]),
        ("import one", ["alone.py", "one.py", *PACKAGE, "two.py"]),
        ("import package", ["package/__init__.py"]),
        ("import package.deep", ["package/__init__.py", "package/deep.py"]),
        ("from package import (inner)", ["alone.py", *PACKAGE]),
        ("load(sources=['kernels/fast.cu'])", ["kernels/fast.cu", "kernels/fast.cuh"]),
        ("load(Path(x) / 'kernels' / 'fast.cu')", ["kernels/fast.cu", "kernels/fast.cuh"]),
        ("load('./kernels/fast.cuh')", ["kernels/fast.cuh"]),
        ("import native", ["native.cpython-312-x86_64-linux-gnu.so"]),
        ("open('notes.txt')", []),
        ("import train_gpt", []),
    ],
)
def test_what_is_imported_or_named_is_used(tmp_path, text, names):
    assert used(tmp_path, text) == sorted(names)


def test_a_link_out_of_the_folder_is_no_file_of_it(tmp_path):
    (tmp_path / "secret.py").write_text("")
    record = tmp_path / "record"
    record.mkdir()
    (record / "mine.py").symlink_to(tmp_path / "secret.py")
    assert used(record, "import mine, alone") == ["alone.py"]


def test_a_long_hostile_text_is_searched_to_its_end(tmp_path):
    """What is quadratic would take hours."""
    hostile = "from a import (" * 300_000 + "\n" + "import " + "a," * 500_000 + "\n"
    hostile += " " * 1_000_000 + "from\n" + "'\"<" * 500_000 + "\n" + "from x import\n" * 100_000
    assert used(tmp_path, f"{hostile}import alone") == ["alone.py"]
