"""Let the checkpoints of a run go on with prompts, and keep what they say in samples.jsonl."""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from generate_model import Asked, Model, UserError, load_artifact, load_checkpoint, stream
from generate_text import tell, warn_of_missing
from metrics import NAME, History, MetricsError, Tail, load_history, number
from owner import OwnerError, find_owner

SAMPLES = "samples.jsonl"
LOOK_SECONDS = 2.0
ARTIFACT = "final_model.artifact"
Key = tuple[Any, ...]  # what makes a sample another one: file, its time, prompt


def step_of(path: Path) -> int:
    """Read the step from a checkpoint's name; -1 if it is no checkpoint's."""
    found = re.fullmatch(r"checkpoint_(\d+)\.pt", path.name)
    return int(found[1]) if found else -1


def read_keys(path: Path) -> set[Key]:
    """Read which samples are there already. Raises OSError, but not where there is no file."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return set()
    keys = set()
    for line in lines:
        try:
            sample = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(sample, dict):
            keys.add(tuple(str(sample.get(name)) for name in ("file", "time", "prompt")))
    return keys


def append(path: Path, samples: list[Mapping[str, Any]]) -> None:
    """Append lines to a file, behind a line that a crash has cut off. Raises OSError."""
    text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())


@dataclass
class Sampler:
    """Sample what is in a run's folder, each file once for each prompt."""

    folder: Path
    prompts: list[str]
    asked: Asked
    every: int  # only steps that it divides
    given: Mapping[str, str]  # settings
    show: Callable[[str], None]
    done: set[Key] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    warned: bool = False  # of characters that the tokenizer lacks

    def __post_init__(self) -> None:
        self.path = self.folder / SAMPLES
        self.done = read_keys(self.path)

    def look(self) -> None:
        """Sample the checkpoints that are new. Raises OSError."""
        paths = sorted(self.folder.glob("checkpoint_*.pt"), key=step_of)
        for path in paths:
            step = step_of(path)
            if step >= 0 and step % self.every == 0:
                self.sample(path, step)

    def look_at_artifact(self) -> None:
        """Sample the artifact, if a run that is over has made one. Raises OSError."""
        path = self.folder / ARTIFACT
        history = load_history(self.folder)
        steps = [number(e, "step") for e in history.events if e["event"] in ("train", "val")]
        if history.final and path.is_file():
            self.sample(path, int(max(steps, default=0)))

    def sample(self, path: Path, step: int) -> None:
        """Sample a file, unless it is sampled already. Raises OSError."""
        try:
            time_text = f"{path.stat().st_mtime:.3f}"
            keys = {prompt: (path.name, time_text, prompt) for prompt in self.prompts}
            prompts = [prompt for prompt, key in keys.items() if key not in self.done]
            self.done |= set(keys.values())
            if prompts:
                about = {"step": step, "file": path.name, "time": time_text}
                self.add_samples(self.load(path), prompts, about)
        except FileNotFoundError:  # the run keeps the newest ones alone
            tell(f"warning: {path.name} is gone, and was not sampled")
        except UserError as error:
            self.problems.append(f"{path.name}: {error}")
            tell(f"warning: {self.problems[-1]}")

    def add_samples(self, model: Model, prompts: list[str], about: Mapping[str, Any]) -> None:
        """Let a model go on with each prompt; keep and show it. Raises UserError, OSError."""
        for prompt in prompts:
            if not self.warned:
                warn_of_missing(model.texts, prompt)
            texts = continuations(model, prompt, self.asked)
            append(self.path, [{**about, "prompt": prompt, "text": text} for text in texts])
            for text in texts:
                self.show(f"--- step {about['step']}, {about['file']}\n{prompt}{text}\n")
        self.warned = True

    def load(self, path: Path) -> Model:
        """Load a checkpoint or an artifact. Raises UserError, OSError."""
        if path.name == ARTIFACT:
            return load_artifact(path, self.given)
        return load_checkpoint(path, self.given)


def continuations(model: Model, prompt: str, asked: Asked) -> list[str]:
    """Give what follows a prompt in each sample. Raises UserError."""
    texts = [""] * asked.samples
    for sample, part in stream(model, model.encode(prompt), asked):
        texts[sample] += part or ""
    return texts


def follow(sampler: Sampler) -> None:
    """Sample until the run is over. Raises OSError."""
    for is_over in endings(sampler.folder):
        sampler.look()
        if is_over:
            sampler.look_at_artifact()
            return
        time.sleep(LOOK_SECONDS)


def endings(folder: Path) -> Iterator[bool]:
    """Tell, again and again, whether a run is over."""
    tail = Tail(folder / NAME)
    history = History()
    told = False
    while True:
        for event in tail.read():
            history.add(event)
        try:
            over = find_owner(folder) is None
        except OwnerError as error:
            over = bool(history.final)
            if not (told or over):
                tell(f"waiting for the run's score, for {error}")
            told = True
        yield over


def sample_once(sampler: Sampler) -> None:
    """Sample what is there. Raises OSError, MetricsError."""
    before = len(sampler.done)
    sampler.look()
    sampler.look_at_artifact()
    if not sampler.done:
        raise MetricsError(f"{sampler.folder}: no checkpoints in it; SAVE_EVERY=n makes them")
    if len(sampler.done) == before:
        tell(f"nothing new: {sampler.path} has a sample of each")
