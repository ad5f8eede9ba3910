"""Pack finished runs, one for each seed, into a record folder that runs from within itself.

    python records/submit.py seed1 seed2 seed3 --name "Eleven layers" --author "Ann Example" \\
        --github-id ann --track 10min_16mb

Reads logs/<RUN_ID>.txt and logs/<RUN_ID>/final_model.artifact, and writes
records/track_<track>/<date>_<name>/ with the code exactly as it was logged: train_gpt.py, and
quantizer.py and frontier.py if the run used them. Every number in it is computed from these files.
What cannot be packed is refused before anything is written. At the end the static audit
(records/audit.py) is run on the new folder.

It reads logs by itself, not by records/reading.py: the audit then compares two readings.
"""

import argparse
import ast
import datetime
import difflib
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from statistics import fmean, stdev
from typing import Any, NoReturn

import matplotlib
import program

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from summary import BLUE, RED, ends, running_mean

FORMAT = "birdie-1"
CAP = 16_000_000
SETTINGS_SECONDS = 300  # for a script to import what it needs and tell its defaults
TRACKS = {  # name in submission.json: folder
    "10min_16mb": "track_10min_16mb",
    "non_record_16mb": "track_non_record_16mb",
    "non_record_unlimited_compute_16mb": "track_non_record_16mb",
}
SCRIPT, CONFIG = "train_gpt.py", "config.env"
HELPERS = ("quantizer.py", "frontier.py")  # in a log, they stand behind the script in this order
# It stands behind each source of a log: the script, the helpers that the run used, and keeper.py.
RULER = b"=" * 100 + b"\n"
BETWEEN = b"\n" + RULER  # two sources
SETTING = re.compile(rb"[A-Z][A-Z0-9_]*=")
RUN = re.compile(b"\n" + RULER + SETTING.pattern)
# Settings that say where a run lies, not what it is.
PLACES = ("RUN_ID", "OUT_DIR", "SAVE_NLL", "ARTIFACT")
# Settings that say how a run was protected and watched. keeper.py reads them, and is not packed.
PROTECTION = ("SAVE_EVERY", "SAVE_TOTAL_LIMIT", "RESUME", "RESUME_CHANGED", "WATCH", "REPORT_TO")
DATA = {"DATA_PATH": "data/datasets", "TOKENIZER_PATH": "data/tokenizers"}
UP = "../../../"  # from a record folder to the repository's root
LINES = {
    "start": r"python:(\S+) torch:(\S+) device:(.+?) dtype:(\S+) compile:\S+ world_size:(\d+)\b.*",
    "data": r"val_tokens:(\d+) val_bytes:(\d+)\b(?:.* original_bytes:(\d+))?.*",
    "shards": r"train_shards:(\d+) train_tokens:(\d+)",
    "params": r"model_params:(\d+)",
    "train": r"step:(\d+)/\d+ train_loss:(\d+\.\d+) .*",
    "val": r"step:(\d+)/\d+ val_loss:(\d+\.\d+) val_bpb:(\d+\.\d+) train_time:(\d+)ms .*",
    "final": r"final_(\w+)_roundtrip_exact val_loss:(\d+\.\d+) val_bpb:(\d+\.\d+)",
    "size": r"Total submission size \w+: (\d+) bytes \((\d+) code, (\d+) artifact\)",
}

# What a run has not done whose log has no such line; in the order in which a run does it.
STEPS = {
    "start": "start",
    "data": "read its validation data",
    "params": "build its model",
    "val": "finish training",
    "final": "score its artifact",
    "size": "come to its size",
}


class UserError(Exception):
    """Why the runs cannot be packed, for a person to read; nothing was written."""


@dataclass(frozen=True)
class FinishedRun:
    """One run, as its log and its artifact tell."""

    run_id: str
    log: bytes
    sources: list[bytes]  # the code that counts: the script, then its helpers
    settings: dict[str, str]
    artifact: Path
    lines: dict[str, list[tuple[str, ...]]] = field(repr=False)  # by the names of LINES

    @property
    def seed(self) -> int:
        return int(self.settings["SEED"])

    @property
    def artifact_bytes(self) -> int:
        return self.artifact.stat().st_size

    @property
    def code_bytes(self) -> int:
        return sum(map(len, self.sources))

    @property
    def total_bytes(self) -> int:
        return self.code_bytes + self.artifact_bytes

    def numbers(self) -> dict[str, float]:
        """Collect what submission.json says of this seed, in the field's spellings."""
        _, loss, bpb = self.lines["final"][-1]
        step, raw_loss, raw_bpb, ms = self.lines["val"][-1]
        return {
            "val_loss": float(loss),
            "val_bpb": float(bpb),
            "pre_quant_val_loss": float(raw_loss),
            "pre_quant_val_bpb": float(raw_bpb),
            "artifact_bytes": self.artifact_bytes,
            "bytes_total": self.total_bytes,
            "steps": int(step),
            "step_avg_ms": round(int(ms) / max(int(step), 1), 2),
            "train_time_s": int(ms) / 1000,
        }


# ===================================== READING RUNS =====================================


def find_run(name: str, logs: Path) -> Path:
    """Find the folder of the run that its RUN_ID, its folder, its log or a file of it names."""
    places = [Path(os.path.abspath(place)) for place in (logs / name, name)]
    for place in places:
        if place.suffix == ".txt" and place.is_file():
            place = place.with_suffix("")
        elif place.is_file():
            place = place.parent
        if log_of(place).is_file():
            return place
    return places["/" in name.rstrip("/")]


def log_of(place: Path) -> Path:
    """Name the log of the run whose folder this is."""
    return place.with_name(f"{place.name}.txt") if place.name else place


def read_run(place: Path) -> FinishedRun:
    """Read the last run in the log of the run whose folder is `place`. Raises UserError."""
    log, artifact = log_of(place), place / "final_model.artifact"
    if not log.is_file():
        others = sorted(path.stem for path in place.parent.glob("*.txt"))
        near = difflib.get_close_matches(place.name, others, 1)
        hint = f"did you mean {near[0]}?" if near else f"runs there: {', '.join(others) or 'none'}"
        raise UserError(f"{place.name}: unknown run: no {log}; {hint}")
    data = log.read_bytes()
    ruler = data.rfind(b"\n" + RULER) + 1
    if not ruler:
        raise UserError(f"{place.name}: {log} has no script and settings at its top")
    text = data[ruler + len(RULER) :].decode(errors="surrogateescape")
    settings, printed = split_settings(text)
    lines = {name: re.findall(f"^{form}$", printed, re.M) for name, form in LINES.items()}
    lines = {name: [m if isinstance(m, tuple) else (m,) for m in ms] for name, ms in lines.items()}
    if problem := what_is_missing(settings, lines, printed):
        raise UserError(f"{place.name}: {problem}{what_to_do(place)} ({log})")
    counted = int(lines["size"][-1][1])
    found = find_sources(data[: ruler - 1], counted)
    if found is None:
        raise UserError(
            f"{place.name}: the script in {log} is not the {counted} bytes that it counts"
        )
    start, sources = found
    size = artifact.stat().st_size if artifact.is_file() else None
    if size != int(lines["size"][-1][2]):
        state = "is not there" if size is None else f"has {size} bytes"
        raise UserError(f"{place.name}: {artifact} {state}; its log says {lines['size'][-1][2]}")
    return FinishedRun(place.name, data[start:], sources, settings, artifact, lines)


def split_settings(text: str) -> tuple[dict[str, str], str]:
    """Split off the settings: the first lines NAME=VALUE, in a shell's quoting."""
    block = re.match(r"(?:[A-Z][A-Z0-9_]*=.*\n)*", text)[0]
    try:
        words = [word.split("=", 1) for word in shlex.split(block)]
    except ValueError:
        return {}, text
    return {word[0]: word[-1] for word in words if len(word) == 2}, text[len(block) :]


def find_sources(head: bytes, size: int) -> tuple[int, list[bytes]] | None:
    """Find the code of `size` bytes in what stands before a run's settings, and where it begins.

    It is the script, and up to two helpers with a ruler before each. It ends there, or at a ruler
    behind which keeper.py stands. Before it is nothing, or a run.
    """
    ruler = head.rfind(BETWEEN)
    ends = [len(head)]
    if ruler >= 0 and not SETTING.match(head, ruler + len(BETWEEN)):
        ends.insert(0, ruler)
    for helpers, end in itertools.product(range(len(HELPERS) + 1), ends):
        start = end - size - helpers * len(BETWEEN)
        after_a_run = start > 0 and head[start - 1] == 10 and RUN.search(head, 0, start)
        if (start == 0 or after_a_run) and (sources := split(head[start:end], helpers)):
            return start, sources
    return None


def split(text: bytes, helpers: int) -> list[bytes]:
    """Split a text into the script and so many helpers; [] if it is not that.

    A ruler within Python is within a string, and what stands before it is no Python. So the first
    ruler with Python before it is one between sources.
    """
    if not helpers:
        return [text] if compiles(text) else []
    for ruler in re.finditer(BETWEEN, text):
        if compiles(text[: ruler.start()]):
            rest = split(text[ruler.end() :], helpers - 1)
            return [text[: ruler.start()], *rest] if rest else []
    return []


def compiles(source: bytes) -> bool:
    """Tell whether a source is Python."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def what_is_missing(settings: dict[str, str], lines: dict[str, list], printed: str) -> str:
    """Say why a log is not that of a finished training run; "" if it is one."""
    if not settings.get("SEED", "").isdecimal():
        return "no settings with a SEED in its log"
    if settings.get("EVAL_ONLY", "0") != "0":
        return "it scored an artifact and trained nothing: EVAL_ONLY=1"
    for name, step in STEPS.items():
        if not lines[name]:
            if name in ("val", "final") and re.search(r"\bval_(loss|bpb):-?(nan|inf)", printed):
                return "it did not finish: it diverged, its scores are no numbers"
            return f"it did not finish: it did not {step}"
    *_, size = re.finditer(f"^{LINES['size']}$", printed, re.M)
    if "\nstep:" in printed[size.end() :]:
        return "it did not finish: it trained on after it came to its size"
    return ""


def what_to_do(place: Path) -> str:
    """Say how to go on with a run that did not finish."""
    if not any(place.glob("checkpoint_*.pt")):
        return "; train it again"
    return f"; start it again with RUN_ID={shlex.quote(place.name)} RESUME=auto"


def differences(runs: list[FinishedRun]) -> list[str]:
    """List what keeps the runs from being seeds of one submission."""
    first, problems = runs[0], []
    seeds = [run.seed for run in runs]
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        problems.append(f"more than one run of seed {', '.join(map(str, twice))}")
    for run in runs[1:]:
        both = f"{first.run_id} and {run.run_id}"
        if run.sources != first.sources:
            problems.append(f"{both}: different scripts")
        aside = {"SEED", *PLACES, *PROTECTION}
        for name in sorted({*first.settings, *run.settings} - aside):
            values = [one.settings.get(name, "nothing") for one in (first, run)]
            if values[0] != values[1]:
                problems.append(f"{both}: {name} is {values[0]} and {values[1]}")
        for name, what in (("data", "validation"), ("shards", "training")):
            if run.lines[name] != first.lines[name]:
                problems.append(f"{both}: different {what} data, by the counts in their logs")
    for run in (run for run in runs if run.total_bytes > CAP):
        over = f"{run.total_bytes - CAP:,} bytes over the cap of {CAP:,}"
        problems.append(f"{run.run_id}: {run.total_bytes:,} bytes, {over}")
    return problems


# ===================================== SETTINGS =====================================


def default_settings(code: dict[str, bytes]) -> dict[str, str]:
    """Ask a script for its defaults: what `--settings` prints in an empty environment."""
    problem = "the packed script does not tell its defaults"
    defaults = split_settings(ask_settings(code, "", problem))[0]
    if "SEED" not in defaults:
        raise UserError(f"{problem}: --settings prints no SEED")
    return defaults


def ask_settings(code: dict[str, bytes], config: str, problem: str) -> str:
    """Start a script with `--settings`, and with the file `config` if it holds anything.

    Raises UserError, `problem` and why, if the script fails or does not end.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LD_LIBRARY_PATH")}
        if config:
            env["CONFIG"] = CONFIG
        for name, content in (code | {CONFIG: encode_config(config)}).items():
            Path(folder, name).write_bytes(content)
        command = [sys.executable, str(Path(folder, SCRIPT)), "--settings"]
        options = {"env": env, "cwd": folder, "capture_output": True, "text": True}
        try:
            done = subprocess.run(command, timeout=SETTINGS_SECONDS, **options)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{problem}: {error}") from None
    if done.returncode:
        heard = done.stderr.strip()[-500:] or f"exit code {done.returncode}"
        raise UserError(f"{problem}: {heard}")
    return done.stdout


def data_place(name: str, value: str, root: Path) -> str:
    """Find where the repository keeps what DATA_PATH or TOKENIZER_PATH named, from its root."""
    path = Path(os.path.normpath(root / value))
    if path.is_relative_to(root) and path != root:
        return path.relative_to(root).as_posix()
    return str(PurePosixPath(DATA[name], path.name))


def how_to_get(dataset: str) -> str:
    """Say where the data comes from."""
    if dataset.startswith("sample_"):
        return "It comes from `python data/prepare.py --sample`."
    if dataset.startswith("fineweb10B_"):
        variant = dataset.removeprefix("fineweb10B_")
        return f"It comes from `python data/download.py --variant {shlex.quote(variant)}`."
    return "How such data is made is in `data/README.md`."


def config_env(changed: dict[str, str], places: dict[str, str], seed: int) -> str:
    """Write the runs' settings as a file for CONFIG, paths as seen from the record folder."""
    values = {name: UP + place for name, place in places.items()} | {"SEED": str(seed)} | changed
    rows = [f"{name}={shlex.quote(text) if text else ''}" for name, text in values.items()]
    return "\n".join(["# For CONFIG, from within this folder.", *rows, ""])


def encode_config(text: str) -> bytes:
    """Encode the file for CONFIG: a name that is no UTF-8 is its raw bytes where it is read."""
    return text.encode(errors="surrogateescape")


def requirements(code: dict[str, bytes], torch: str, listed: Iterable[str]) -> str:
    """List what the code's imports require: torch as it was logged, others as they are listed."""
    names = set()
    for node in itertools.chain.from_iterable(ast.walk(ast.parse(s)) for s in code.values()):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    known = {re.split(r"[^\w-]", line)[0]: line.strip() for line in listed if line[:1].isalpha()}
    known["torch"] = f"torch=={torch.split('+')[0]}"
    names -= {*sys.stdlib_module_names, *(Path(name).stem for name in code)}
    return "".join(f"{known.get(name, name)}\n" for name in sorted(names))


def name_sources(sources: list[bytes], config: str) -> dict[str, bytes]:
    """Name the sources: so that the script takes the settings of its run, the file `config`.

    Raises UserError if it takes them with no names.
    """
    problem = "the packed script refuses the settings of its run"
    refusals = []
    for names in itertools.combinations(HELPERS, len(sources) - 1):
        code = dict(zip((SCRIPT, *names), sources, strict=True))
        try:
            ask_settings(code, config, problem)
        except UserError as refusal:
            refusals.append(refusal)
        else:
            return code
    raise refusals[0]


# ===================================== WRITING =====================================


@dataclass(frozen=True)
class Record:
    """All that the files of a record folder are made from."""

    about: dict[str, str]  # name, author, github_id, date, track, blurb, hardware
    runs: list[FinishedRun]
    defaults: dict[str, str]
    root: Path
    with_artifact: bool
    code: dict[str, bytes] = field(default_factory=dict)  # what counts, by the names of its files

    @property
    def folder(self) -> Path:
        name = f"{self.about['date']}_{self.about['name'].replace(' ', '_')}"
        return self.root / "records" / TRACKS[self.about["track"]] / name

    @property
    def changed(self) -> dict[str, str]:
        """The settings that are not the script's defaults."""
        aside = {"SEED", *PLACES, *PROTECTION, *DATA}
        items = [(k, v) for k, v in self.runs[0].settings.items() if k not in aside]
        return {k: v for k, v in items if self.defaults.get(k) != v}

    @property
    def places(self) -> dict[str, str]:
        """Where data and tokenizer are expected, from the root."""
        settings = self.runs[0].settings
        return {k: data_place(k, settings[k], self.root) for k in DATA if settings.get(k)}

    @property
    def config(self) -> str:
        """The file for CONFIG."""
        return config_env(self.changed, self.places, self.runs[0].seed)


def mean_and_deviation(rows: list[dict[str, float]], name: str) -> dict[str, float]:
    """Average over seeds, with the sample deviation (over n - 1) from two seeds on."""
    values = [row[name] for row in rows]
    mean = {name: round(fmean(values), 8)}
    return mean | ({f"{name}_std": round(stdev(values), 8)} if len(values) > 1 else {})


def submission(record: Record) -> dict[str, Any]:
    """Make the content of submission.json."""
    runs, about = record.runs, record.about
    first, rows = runs[0], [run.numbers() for run in runs]
    python, torch, *_ = first.lines["start"][-1]
    tokens, decoded, original = first.lines["data"][-1]  # original: of text that was transformed
    sizes = [run.artifact_bytes for run in runs]
    means = {
        f"{name}_mean": round(fmean(row[name] for row in rows), 3)
        for name in ("artifact_bytes", "steps", "step_avg_ms", "train_time_s")
    }
    return {
        "format": FORMAT,
        **{key: about[key] for key in ("name", "author", "github_id", "date", "track", "blurb")},
        **mean_and_deviation(rows, "val_bpb"),
        **mean_and_deviation(rows, "val_loss"),
        "pre_quant_val_bpb": round(fmean(row["pre_quant_val_bpb"] for row in rows), 8),
        "pre_quant_val_loss": round(fmean(row["pre_quant_val_loss"] for row in rows), 8),
        "seeds": [run.seed for run in runs],
        "seed_results": {str(run.seed): row for run, row in zip(runs, rows, strict=True)},
        "bytes_total": max(run.total_bytes for run in runs),
        "bytes_code": first.code_bytes,
        "artifact_bytes_max": max(sizes),
        **means,
        "artifact_sha256": {str(run.seed): sha256(run.artifact.read_bytes()) for run in runs},
        "code_sha256": sha256(first.sources[0]),
        "model_params": int(first.lines["params"][-1][0]),
        "dataset": PurePosixPath(record.places.get("DATA_PATH", "")).name,
        "val_tokens": int(tokens),
        "val_bytes": int(original or decoded),
        "hardware": about["hardware"],
        "pytorch_version": torch,
        "python_version": python,
    }


def sha256(data: bytes) -> str:
    """Digest data, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def draw_curve(runs: list[FinishedRun], path: Path) -> None:
    """Draw training loss, its mean, validation BPB and artifact scores of all seeds into a PNG."""
    figure, left = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    right = left.twinx()
    losses, scores = [], []
    for run in runs:
        train = [(int(step), float(loss)) for step, loss in run.lines["train"]]
        val = [(int(step), float(bpb)) for step, _, bpb, _ in run.lines["val"]]
        final = run.numbers()["val_bpb"]
        mean = running_mean([loss for _, loss in train])
        steps = [step for step, _ in train]
        left.plot(steps, [loss for _, loss in train], color=BLUE, lw=0.6, alpha=0.35)
        left.plot(steps, mean, color=BLUE, lw=1.4, alpha=0.8)
        right.plot(*zip(*val, strict=True), "o-", color=RED, ms=4, lw=1, alpha=0.6)
        right.plot(val[-1][0], final, "*", color=RED, ms=12, mec="white")
        losses += mean
        scores += [*(bpb for _, bpb in val), final]
    left.set_xlabel("step")
    left.set_ylabel("training loss, nats per token", color=BLUE)
    right.set_ylabel("validation, bits per byte; ★ from the artifact", color=RED)
    left.set_ylim(*ends(losses))
    right.set_ylim(*ends(scores))
    left.grid(alpha=0.3)
    seeds = ", ".join(str(run.seed) for run in runs)
    left.set_title(f"seed{'s' * (len(runs) > 1)} {seeds}", loc="left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(rows: list[list[str]]) -> str:
    """Write a Markdown table; the first row is its head."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def results_table(rows: dict[str, dict[str, float]]) -> str:
    """Write the README's table of results: one row a seed, then mean and deviation."""
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("val_bpb", "val_bpb", "{:.4f}".format),
        ("val_loss", "val_loss", "{:.4f}".format),
        ("pre_quant_val_bpb", "val_bpb before quantization", "{:.4f}".format),
        ("steps", "steps", "{:,.0f}".format),
        ("step_avg_ms", "ms a step", "{:,.2f}".format),
        ("train_time_s", "training, s", "{:,.1f}".format),
        ("artifact_bytes", "artifact, bytes", "{:,.0f}".format),
        ("bytes_total", "with code, bytes", "{:,.0f}".format),
    ]
    lines = [["seed", *(title for _, title, _ in columns)]]
    lines += [[seed, *(show(row[key]) for key, _, show in columns)] for seed, row in rows.items()]
    if len(rows) > 1:
        for word, compute in (("mean", fmean), ("deviation", stdev)):
            values = [
                show(compute([row[key] for row in rows.values()])) for key, _, show in columns
            ]
            lines.append([word, *values])
    return table(lines)


def commands(record: Record) -> str:
    """Write how to train and score again, from within the folder."""
    world = int(record.runs[0].lines["start"][-1][4])
    launch = f"torchrun --standalone --nproc_per_node={world}" if world > 1 else "python"
    up, name = f"{UP}logs", record.folder.name
    lines = [f"cd records/{record.folder.parent.name}/{name}", "pip install -r requirements.txt"]
    for run in record.runs:
        where = f"RUN_ID={name}_seed{run.seed} OUT_DIR={up}"
        lines.append(f"CONFIG=config.env SEED={run.seed} {where} {launch} train_gpt.py")
    made = f"{up}/{name}_seed{record.runs[0].seed}/final_model.artifact"
    artifact = "final_model.artifact" if record.with_artifact else made
    score = f"CONFIG=config.env EVAL_ONLY=1 ARTIFACT={artifact} RUN_ID={name}_score OUT_DIR={up}"
    return "\n".join(f"    {line}" for line in [*lines, f"{score} {launch} train_gpt.py"])


def audit_commands(record: Record) -> str:
    """Write how to audit the folder, from the repository's root."""
    folder, places = f"records/{record.folder.parent.name}/{record.folder.name}", record.places
    made = f"logs/{record.folder.name}_seed{record.runs[0].seed}/final_model.artifact"
    artifact = f"{folder}/final_model.artifact" if record.with_artifact else made
    data = f"--data {shlex.quote(places.get('DATA_PATH', ''))}"
    tokenizer = f"--tokenizer {shlex.quote(places.get('TOKENIZER_PATH', ''))}"
    static = f"    python records/audit.py {folder}"
    return f"{static}\n{static} --artifact {artifact} {data} {tokenizer}"


def readme(record: Record) -> str:
    """Write the content of README.md."""
    facts, first = submission(record), record.runs[0]
    changed = [[k, record.defaults.get(k, ""), v] for k, v in record.changed.items()]
    method = "All settings are the script's defaults."
    if changed:
        head = [["setting", "default", "here"]]
        method = f"What differs from the script's defaults:\n\n{table(head + changed)}"
    artifact = (
        f"`final_model.artifact` is that of seed {first.seed}."
        if record.with_artifact
        else "The artifacts are not in this folder; their SHA-256 digests are in submission.json."
    )
    data = record.places.get("DATA_PATH", "")
    code = "`train_gpt.py` is the script"
    if helpers := " and ".join(f"`{name}`" for name in HELPERS if name in record.code):
        code = f"The code is `train_gpt.py` and what it imports, {helpers},"
    parts = [
        f"# {facts['name']}",
        facts["blurb"],
        results_table(facts["seed_results"]),
        f"Code and largest artifact are {facts['bytes_total']:,} of {CAP:,} bytes, "
        f"{facts['bytes_code']:,} of them code. {facts['model_params']:,} parameters. "
        f"{facts['hardware']}, Python {facts['python_version']}, "
        f"PyTorch {facts['pytorch_version']}. Scored on {facts['val_tokens']:,} tokens, "
        f"{facts['val_bytes']:,} bytes of the validation text in `{data}`. {artifact}",
        "![Loss over the steps](curve.png)",
        "## Method",
        f"{code} exactly as the runs logged it. {method}",
        "## Again",
        f"The data is expected in `{data}` and the tokenizer in "
        f"`{record.places.get('TOKENIZER_PATH', '')}` of the repository. "
        f"{how_to_get(Path(data).name)} From the repository's root:",
        commands(record),
        "The last command scores an artifact only. The claims of this folder are checked by the "
        "first of these, from the repository's root; the second tests an artifact as a black box:",
        audit_commands(record),
    ]
    return "\n\n".join(parts) + "\n"


def write_record(record: Record) -> None:
    """Write the folder: under a hidden name first, then renamed as a whole."""
    record.folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial_", dir=record.folder.parent))
    try:
        first = record.runs[0]
        listed = record.root / "requirements.txt"
        known = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
        torch = first.lines["start"][-1][1]
        texts = {
            "submission.json": json.dumps(submission(record), indent=2, ensure_ascii=False) + "\n",
            "README.md": readme(record),
            "requirements.txt": requirements(record.code, torch, known),
        }
        files = {name: text.encode(errors="replace") for name, text in texts.items()}
        files |= {CONFIG: encode_config(record.config), **record.code}
        for name, content in files.items():
            (partial / name).write_bytes(content)
        for run in record.runs:
            (partial / f"train_seed{run.seed}.log").write_bytes(run.log)
        draw_curve(record.runs, partial / "curve.png")
        if record.with_artifact:
            shutil.copyfile(first.artifact, partial / "final_model.artifact")
        partial.chmod(0o755)
        if record.folder.exists():
            raise UserError(f"{record.folder}: is there already")
        partial.rename(record.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ===================================== COMMAND LINE =====================================


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; exit with 2 if it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN_ID", help="finished runs, one a seed; or their folders")
    add("--name", required=True, help="of the submission; spaces become _ in the folder's name")
    add("--author", required=True)
    add("--github-id", required=True)
    add("--track", required=True, help=f"one of {', '.join(TRACKS)}")
    add("--date", default=str(datetime.datetime.now(datetime.UTC).date()), help="default: today")
    add("--blurb", default="", help="a sentence or two on what is new")
    add("--hardware", default="", help="default: device and number of processes, from the log")
    add("--with-artifact", action="store_true", help="copy the first run's artifact, which the "
        "dynamic audit needs; without it the folder holds its SHA-256 only")  # fmt: skip
    here = Path(__file__).resolve().parent
    add("--logs", type=Path, default=here.parent / "logs", help="default: the repository's logs")
    add("--root", type=Path, default=here.parent, help="repository to write to; default: this one")
    return parser.parse_args(arguments)


def check_about(options: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """Read what the options say of the submission, and list what is wrong with it."""
    problems = []
    track = options.track.lower().replace("-", "_").removeprefix("track_")
    about = {
        "name": options.name.strip(),
        "author": options.author.strip(),
        "github_id": options.github_id.strip().removeprefix("@"),
        "date": options.date,
        "track": track,
        "blurb": " ".join(options.blurb.split()),
    }
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,79}", about["name"]):
        problems.append(f"--name {options.name!r}: use 1 to 80 letters, digits, spaces and . _ + -")
    if not about["author"].isprintable() or not about["author"]:
        problems.append(f"--author {options.author!r}: give a name")
    if not re.fullmatch(r"[A-Za-z0-9](-?[A-Za-z0-9]){0,38}", about["github_id"]):
        problems.append(f"--github-id {options.github_id!r}: no GitHub user name")
    if track not in TRACKS:
        problems.append(f"--track {options.track}: use one of {', '.join(TRACKS)}")
    try:
        about["date"] = datetime.date.fromisoformat(options.date).isoformat()
        if not about["date"].startswith("20"):
            raise ValueError
    except ValueError:
        problems.append(f"--date {options.date}: use YYYY-MM-DD")
    return about, problems


def collect(options: argparse.Namespace) -> Record:
    """Read and check everything. Raises UserError with all that is wrong; writes nothing."""
    about, problems = check_about(options)
    runs = []
    for name in options.runs:
        try:
            runs.append(read_run(find_run(name, options.logs)))
        except (UserError, OSError) as problem:
            problems.append(str(problem))
    if runs:
        problems += differences(runs)
    record = Record(about, runs, {}, options.root.resolve(), options.with_artifact)
    if about["track"] in TRACKS and record.folder.exists():
        problems.append(f"{record.folder}: is there already; use another --name or --date")
    if problems:
        raise UserError("\n  ".join(["nothing was packed:", *problems]))
    defaults = default_settings({SCRIPT: runs[0].sources[0]})
    devices = {f"{run.lines['start'][-1][4]}x {run.lines['start'][-1][2]}" for run in runs}
    about["hardware"] = " ".join(options.hardware.split()) or ", ".join(sorted(devices))
    record = replace(record, defaults=defaults)
    record = replace(record, code=name_sources(runs[0].sources, record.config))
    params, changed = int(runs[0].lines["params"][-1][0]), len(record.changed)
    about["blurb"] = (
        about["blurb"] or f"{params:,} parameters, {changed} settings not the defaults."
    )
    return record


def audit(folder: Path) -> int:
    """Run the static audit on a folder, which prints its table; return its exit code."""
    tool = Path(__file__).with_name("audit.py")
    sys.stdout.flush()
    return subprocess.run([sys.executable, str(tool), str(folder)]).returncode


def refuse(problem: object) -> NoReturn:
    """End the program with a message."""
    raise SystemExit(f"submit.py: error: {problem}")


def main(arguments: list[str]) -> None:
    """Pack the runs that the arguments name, then audit the new folder."""
    try:
        record = collect(parse_arguments(arguments))
        write_record(record)
    except (UserError, OSError) as problem:
        refuse(problem)
    facts = submission(record)
    score = f"val_bpb {facts['val_bpb']:.4f}"
    if "val_bpb_std" in facts:
        score += f" ± {facts['val_bpb_std']:.4f}"
    print(f"{record.folder}\n{score}, {facts['bytes_total']:,} bytes, {len(record.runs)} seed(s)")
    if code := audit(record.folder):
        found = "finds faults in it; see above" if code == 1 else f"could not run: exit code {code}"
        refuse(f"{record.folder} is written, but the static audit {found}")


if __name__ == "__main__":
    program.run(main)
