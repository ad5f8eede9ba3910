"""Read DCLM's bundle of tasks, from a folder or from where nanochat takes it.

A bundle is a folder: core.yaml lists the tasks, eval_meta_data.csv has their random baselines, and
eval_data/ their examples, one JSON object a line.
"""

import csv
import json
import os
import stat
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

TASKS, BASELINES, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"
FOLDER = "eval_bundle"  # in the archive, and in the cache
URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
LARGEST = 2**32  # bytes of the bundle, packed or not
PIECE = 2**16

CHOICE, SCHEMA, LANGUAGE = "multiple_choice", "schema", "language_modeling"
# What an example of a kind must have, and which of it is a list of options.
FIELDS = {
    CHOICE: ("query", "choices", "gold"),
    SCHEMA: ("context_options", "continuation", "gold"),
    LANGUAGE: ("context", "continuation"),
}
OPTIONS = {CHOICE: "choices", SCHEMA: "context_options"}

Item = dict[str, Any]  # an example as the bundle has it


class CoreError(Exception):
    """What is wrong, where, and what to do, in one line for a person."""


@dataclass(frozen=True)
class Task:
    """A task of the bundle; `baseline` is the share of answers that guessing gets right."""

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    items: list[Item] = field(repr=False)


def require(condition: object, problem: str) -> None:
    """Raise CoreError with the problem unless the condition holds."""
    if not condition:
        raise CoreError(problem)


# ---- a folder


def read_bundle(folder: Path) -> list[Task]:
    """Read all tasks of a bundle. Raises CoreError."""
    if not (folder / TASKS).is_file() and (folder / FOLDER / TASKS).is_file():
        folder = folder / FOLDER
    path = folder / TASKS
    entries = read_entries(path)
    baselines = read_baselines(folder / BASELINES)
    tasks = [read_task(entry, number, folder, baselines) for number, entry in enumerate(entries, 1)]
    labels = [task.label for task in tasks]
    twice = {label for label in labels if labels.count(label) > 1}
    require(not twice, f"{path}: two tasks have the label {min(twice, default='')}")
    return tasks


def read_text(path: Path) -> str:
    """Read a file of the bundle. Raises CoreError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror
        raise CoreError(f"{path}: {reason}; is this a whole DCLM eval_bundle?") from None
    except UnicodeDecodeError as error:
        raise CoreError(f"{path}: byte {error.start} is not UTF-8; get the bundle again") from None


def read_entries(path: Path) -> list[Item]:
    """Read the list of tasks. Raises CoreError."""
    import yaml

    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise CoreError(f"{path}: not YAML: {first}; get the bundle again") from None
    entries = content.get("icl_tasks") if isinstance(content, dict) else None
    is_list = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    require(entries and is_list, f"{path}: no list icl_tasks of tasks in it")
    return entries


def read_baselines(path: Path) -> dict[str, float]:
    """Read the random baseline of each task, in percent. Raises CoreError."""
    baselines = {}
    rows = csv.DictReader(read_text(path).splitlines())
    for row in rows:
        where = f"{path} line {rows.line_num}"
        label, value = row.get("Eval Task"), row.get("Random baseline")
        require(label and value, f"{where}: no columns 'Eval Task' and 'Random baseline' with text")
        try:
            baselines[label] = float(value)
        except ValueError:
            raise CoreError(f"{where}: the baseline {value!r} is no number") from None
        sound = 0 <= baselines[label] < 100
        require(sound, f"{where}: a baseline of {value} is no percentage from 0 to under 100")
    return baselines


def read_task(entry: Item, number: int, folder: Path, baselines: dict[str, float]) -> Task:
    """Read one task and its examples. Raises CoreError."""
    label = entry.get("label")
    where = f"{folder / TASKS}, task {label or number}"
    kind, shots = entry.get("icl_task_type"), entry.get("num_fewshot")
    delimiter, place = entry.get("continuation_delimiter", " "), entry.get("dataset_uri")
    require(isinstance(label, str), f"{where}: no label")
    require(kind in FIELDS, f"{where}: icl_task_type {kind}; known are {', '.join(FIELDS)}")
    is_count = isinstance(shots, list) and shots and isinstance(shots[0], int) and shots[0] >= 0
    require(is_count, f"{where}: num_fewshot {shots} is no list that begins with a number")
    require(isinstance(delimiter, str), f"{where}: continuation_delimiter is no text")
    require(isinstance(place, str), f"{where}: no dataset_uri")
    inside = not PurePosixPath(place).is_absolute() and ".." not in PurePosixPath(place).parts
    require(inside, f"{where}: dataset_uri {place} leads out of {DATA}")
    known = label in baselines
    require(known, f"{where}: no row '{label}' in {folder / BASELINES}, so no random baseline")
    items = read_items(folder / DATA / place, kind)
    return Task(label, kind, shots[0], delimiter, baselines[label] / 100, items)


def read_items(path: Path, kind: str) -> list[Item]:
    """Read the examples of a task. Raises CoreError."""
    items = []
    lines = read_text(path).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        try:
            item = json.loads(line)
        except ValueError:
            raise CoreError(f"{where}: not a whole JSON object; get the bundle again") from None
        require(isinstance(item, dict), f"{where}: not a JSON object")
        check_item(item, kind, where)
        items.append(item)
    return items


def check_item(item: Item, kind: str, where: str) -> None:
    """Raise CoreError unless an example has what its kind needs."""
    missing = [name for name in FIELDS[kind] if name not in item]
    require(not missing, f"{where}: no {' and no '.join(missing)}, which {kind} needs")
    for name in FIELDS[kind]:
        if name == "gold":
            continue
        values = item[name] if name in OPTIONS.values() else [item[name]]
        plain = isinstance(values, list) and all(isinstance(v, str | int | float) for v in values)
        require(plain and values, f"{where}: {name} is not text, or not a list of it")
    if kind in OPTIONS:
        gold, count = item["gold"], len(item[OPTIONS[kind]])
        sound = isinstance(gold, int) and 0 <= gold < count
        require(sound, f"{where}: gold {gold} is none of its {count} options")


# ---- the published archive


def cache_folder() -> Path:
    """Name the folder in which a downloaded bundle stays."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "birdie")


def fetch_bundle(url: str, cache: Path) -> Path:
    """Give the bundle in the cache; download it first, if it is not there. Raises CoreError."""
    from filelock import FileLock

    folder = cache / FOLDER
    if (folder / TASKS).is_file():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{FOLDER}.lock"):
            if not (folder / TASKS).is_file():
                download_bundle(url, cache, folder)
    except OSError as error:
        name = error.filename or cache
        raise CoreError(f"{name}: {error.strerror}; is there room, and may you write?") from None
    return folder


def download_bundle(url: str, cache: Path, folder: Path) -> None:
    """Download and unpack a bundle; it appears whole or not at all. Raises CoreError, OSError."""
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER}.partial-", dir=cache) as place:
        archive = Path(place, "bundle.zip")
        with explained(url):
            download(url, archive)
        unpack(archive, Path(place), url)
        unpacked = Path(place, FOLDER)
        whole = (unpacked / TASKS).is_file()
        require(whole, f"{url}: no {FOLDER}/{TASKS} in the archive; it is no bundle of DCLM")
        unpacked.rename(folder)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Say what a failed download means to a person. Raises CoreError."""
    import httpx2

    elsewhere = "get the archive another way, unpack it, and name its folder with --bundle"
    try:
        yield
    except httpx2.HTTPStatusError as error:
        status = error.response.status_code
        raise CoreError(f"{url}: the server answers {status}; {elsewhere}") from None
    except (httpx2.RequestError, httpx2.InvalidURL) as error:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise CoreError(f"{url}: cannot be downloaded ({reason}); {elsewhere}") from None


def download(url: str, path: Path) -> None:
    """Write what a URL gives into a file. Raises CoreError, OSError and httpx2's errors."""
    import httpx2
    from tqdm import tqdm

    with httpx2.stream("GET", url, follow_redirects=True, timeout=60) as answer:
        answer.raise_for_status()
        length = answer.headers.get("Content-Length", "")
        size = int(length) if length.isdecimal() else None
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=path.name, file=sys.stderr)
        with bar, open(path, "wb") as file:
            for piece in answer.iter_bytes(PIECE):
                file.write(piece)
                bar.update(len(piece))
                require(file.tell() <= LARGEST, f"{url}: over {LARGEST} bytes; it is no bundle")


def unpack(archive: Path, place: Path, url: str) -> None:
    """Unpack the bundle's folder, and nothing beside it. Raises CoreError."""
    try:
        with zipfile.ZipFile(archive) as packed:
            members = packed.infolist()
            size = sum(member.file_size for member in members)
            require(size <= LARGEST, f"{url}: {size} bytes when unpacked; it is no bundle")
            for member in members:
                check_member(member, url)
            packed.extractall(place, [m for m in members if m.filename.startswith(f"{FOLDER}/")])
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise CoreError(f"{url}: not a whole zip archive ({error}); try again") from None


def check_member(member: zipfile.ZipInfo, url: str) -> None:
    """Raise CoreError for a link, or a file that would lie outside of the folder."""
    path = PurePosixPath(member.filename)
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in member.filename
    require(inside and not is_link, f"{url}: {member.filename} leads out of the archive; refused")
