"""Measure the CORE metric of an artifact: the mean centred accuracy of DCLM's tasks.

    python lab/core.py logs/sample/final_model.artifact --tokenizer some_1024_bpe.model
    python lab/core.py a.artifact --tokenizer t.model --script train_gpt.py --bundle eval_bundle
    python lab/core.py a.artifact --tokenizer t.model --max-per-task 100 --out core.json

It scores with the script alone, by SCORE_STREAMS: with any script that speaks the protocol of
docs/evaluation.md. Without --bundle it takes the bundle that nanochat takes, and keeps it in
~/.cache/birdie. See docs/core.md.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_bundle import (
    LANGUAGE,
    URL,
    CoreError,
    Task,
    cache_folder,
    fetch_bundle,
    read_bundle,
    require,
)
from core_match import Guesser, count_open, read_answer, settle
from core_prompts import Tokenizer, Work, choose_option, prepare, render
from core_script import Script, counted, tell
from numpy import ndarray

CONTEXT = 1024  # tokens, of a script that does not tell its own: that of the challenge's baseline
SAMPLED = 16  # one stream in so many is scored first, to know the pace
SMALL = 100_000  # tokens whose seconds need no forecast


@dataclass(frozen=True)
class Result:
    """How a task was solved."""

    task: Task
    count: int
    right: int
    notes: dict[str, int]

    @property
    def accuracy(self) -> float:
        """Give the share of right answers."""
        return self.right / self.count

    @property
    def centred(self) -> float:
        """Give the accuracy on a scale where guessing is 0 and perfection 1."""
        return (self.accuracy - self.task.baseline) / (1 - self.task.baseline)

    @property
    def error(self) -> float:
        """Give the standard error of the centred accuracy, by the binomial distribution."""
        variance = self.accuracy * (1 - self.accuracy) / self.count
        return math.sqrt(variance) / (1 - self.task.baseline)


def core_metric(results: list[Result]) -> tuple[float, float]:
    """Give the mean centred accuracy of all tasks, and its standard error."""
    mean = sum(result.centred for result in results) / len(results)
    variance = sum(result.error**2 for result in results)
    return mean, math.sqrt(variance) / len(results)


# ---- scoring


def evaluate(
    tasks: list[Task], tokenizer: Tokenizer, script: Script, most: int | None
) -> list[Result]:
    """Solve the tasks. Raises CoreError."""
    begin = time.monotonic()
    context = try_script(tasks[0], tokenizer, script)
    works = [prepare(task, tokenizer, context, most) for task in tasks]
    streams = [tokens for work in works for one in work.examples for tokens in one.streams]
    announce(works, streams, script)
    nll = script.score(streams, "all prompts")
    found = iter(nll)
    split = [[[next(found) for _ in one.streams] for one in work.examples] for work in works]
    right = count_right(works, split, tokenizer, script, Guesser(streams, tokenizer.size))
    tell(f"{script.streams:,} streams in {time.monotonic() - begin:.0f} s")
    return [
        Result(work.task, len(work.examples), score, {k: v for k, v in work.notes.items() if v})
        for work, score in zip(works, right, strict=True)
    ]


def try_script(task: Task, tokenizer: Tokenizer, script: Script) -> int:
    """Score one prompt, to see whether the script can; its context. Raises CoreError."""
    first = render(task, task.items[0], [])[-1]
    script.score(tokenizer.encode([first]), "a first prompt")
    context = script.context or script.told_context
    if not context:
        context = CONTEXT
        tell(f"context: {context} tokens; the script does not tell it, --context does")
    require(context >= 2, f"a context of {context} tokens holds no prompt")
    return context


def announce(works: list[Work], streams: list[ndarray], script: Script) -> None:
    """Tell what is to be done, and how long it will take. Raises CoreError."""
    examples = sum(len(work.examples) for work in works)
    tokens = sum(map(len, streams))
    answers = sum(len(work.examples) for work in works if work.task.kind == LANGUAGE)
    sample = streams[::SAMPLED]
    if tokens > SMALL:
        script.score(sample, "a sample of the prompts")
    seconds = script.forecast(tokens)
    more = f"; {answers:,} answers in free text need some more" if answers else ""
    tell(
        f"{len(works)} tasks, {examples:,} examples, {len(streams):,} streams, {tokens:,} tokens: "
        f"about {seconds:.0f} s{more}"
    )


def count_right(
    works: list[Work],
    nll: list[list[list[ndarray]]],
    tokenizer: Tokenizer,
    script: Script,
    guesser: Guesser,
) -> list[int]:
    """Count the right answers of each task. Raises CoreError."""
    size, unknown = tokenizer.size, tokenizer.unknown
    judged: list[list[Any]] = []
    for work, losses in zip(works, nll, strict=True):
        pairs = list(zip(work.examples, losses, strict=True))
        if work.task.kind == LANGUAGE:
            judged.append([read_answer(one, of[0], size, unknown) for one, of in pairs])
        else:
            judged.append([choose_option(one, of) == one.gold for one, of in pairs])
    spoken = [work.task.kind == LANGUAGE for work in works]
    answers = [a for many, free in zip(judged, spoken, strict=True) if free for a in many]
    if answers:
        tell(f"free text: {count_open(answers):,} of {len(answers):,} answers need rivals scored")
        settle(answers, guesser, script.score)
    return [
        sum(answer.is_right for answer in many) if free else sum(many)
        for many, free in zip(judged, spoken, strict=True)
    ]


# ---- results


def print_table(results: list[Result]) -> None:
    """Print the tasks, what is special in them, and the metric."""
    width = max(len(result.task.label) for result in results)
    head = f"{'task':{width}}  shots  examples  accuracy  guessing   centred   error"
    print(head)
    for result in results:
        numbers = f"{result.accuracy:8.4f}  {result.task.baseline:8.4f}  {result.centred:8.4f}"
        sizes = f"{result.task.shots:5}  {result.count:8,}"
        print(f"{result.task.label:{width}}  {sizes}  {numbers}  {result.error:6.4f}")
    mean, error = core_metric(results)
    print(f"CORE {mean:.4f}, standard error {error:.4f}")
    for result in results:
        for note, count in result.notes.items():
            print(f"note: {result.task.label}: {counted(count, 'example')} {note}")


def write_results(path: Path, results: list[Result], given: dict[str, Any]) -> None:
    """Write the results as JSON; the file appears whole. Raises OSError."""
    mean, error = core_metric(results)
    tasks = {
        result.task.label: {
            "kind": result.task.kind,
            "shots": result.task.shots,
            "examples": result.count,
            "right": result.right,
            "accuracy": result.accuracy,
            "baseline": result.task.baseline,
            "centred": result.centred,
            "standard_error": result.error,
            "notes": result.notes,
        }
        for result in results
    }
    content = {"core": mean, "standard_error": error, **given, "tasks": tasks}
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


# ---- command line


def positive(text: str) -> int:
    """Read a number of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="core.py",
        description=f"{first}\n{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    beside = Path(__file__).resolve().parent.parent / "train_gpt.py"
    option = parser.add_argument
    option("artifact", type=Path, help="what the script scores with")
    option("--tokenizer", type=Path, required=True, help="the artifact's SentencePiece model")
    option("--script", type=Path, default=beside, help="train_gpt.py, or any that speaks like it")
    option("--bundle", type=Path, help="DCLM's eval_bundle, unpacked; default: download it")
    option("--bundle-url", default=URL, help="where it is downloaded from")
    option("--max-per-task", type=positive, help="examples of each task; default: all")
    option("--context", type=positive, default=0, help="tokens; default: as the script tells")
    option("--gpus", type=positive, default=1, help="processes that torchrun starts, one a GPU")
    option("--out", type=Path, help="a JSON file for the results")
    return parser.parse_args(arguments)


def check_files(args: argparse.Namespace) -> None:
    """Raise CoreError for a file that is missing, before anything takes time."""
    for path in (args.artifact, args.tokenizer, args.script):
        require(path.is_file(), f"{path}: no such file")
    if args.bundle:
        require(args.bundle.is_dir(), f"{args.bundle}: no such folder")
    if args.out:
        folder = args.out.parent
        can_write = folder.is_dir() and os.access(folder, os.W_OK) and not args.out.is_dir()
        require(can_write, f"{args.out}: no file can be made there")


def measure(args: argparse.Namespace) -> None:
    """Do what the command line asks for. Raises CoreError, OSError."""
    check_files(args)
    tokenizer = Tokenizer(args.tokenizer)
    bundle = args.bundle or fetch_bundle(args.bundle_url, cache_folder())
    tasks = read_bundle(bundle)
    script = Script(args.script, args.artifact, args.tokenizer, args.gpus, args.context)
    results = evaluate(tasks, tokenizer, script, args.max_per_task)
    if args.out:
        given = {
            "artifact": str(args.artifact),
            "tokenizer": str(args.tokenizer),
            "script": str(args.script),
            "bundle": str(bundle),
            "max_per_task": args.max_per_task,
            "context": script.context or script.told_context or CONTEXT,
        }
        write_results(args.out, results, given)
    print_table(results)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; its exit code."""
    args = read_arguments(arguments)
    try:
        measure(args)
        sys.stdout.flush()
    except CoreError as problem:
        tell(f"core.py: error: {problem}")
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as problem:
        tell(f"core.py: error: {problem.filename or 'a file'}: {problem.strerror}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def stop(*_: object) -> None:
    """Let what was started end before this program does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
