"""Let a trained model go on with a text: from an artifact of train_gpt.py and its tokenizer.

    python lab/generate.py logs/sample/final_model.artifact "The function returns"
    python lab/generate.py a.artifact "Once" --temperature 1 --top-k 50 --samples 3 --seed 7
    python lab/generate.py a.artifact --chat               of a model of conversations
    python lab/generate.py --run sample --every 500 "The"  samples for a run's checkpoints

It writes to the terminal as the text comes. docs/generate.md says more.
"""

import argparse
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from generate_choice import Rule
from generate_text import tell, warn_of_missing
from metrics import MetricsError, find_run


def in_range(
    kind: Callable[[str], Any], low: float, high: float, what: str
) -> Callable[[str], Any]:
    """Make an argparse type: a number from `low` to `high`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what}")
        return value

    return parse


COUNT = in_range(int, 1, 10**6, "a whole number from 1 to 1,000,000")
SAMPLES = in_range(int, 1, 1000, "a whole number from 1 to 1000")


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="generate.py", description=__doc__, formatter_class=raw)
    top.add_argument(
        "words", nargs="*", metavar="ARTIFACT [PROMPT]", help="with --run: PROMPT [PROMPT ...]"
    )
    add = top.add_argument
    heat = in_range(float, 0, 1000, "a number from 0 to 1000")
    ranks = in_range(int, 0, 65536, "a whole number from 0 to 65536")
    share = in_range(float, 1e-9, 1, "a number over 0, at most 1")
    seed = in_range(int, 0, 2**63, "a whole number from 0 up")
    add("--temperature", type=heat, metavar="T", default=0.8, help="0: greedy (%(default)s)")
    add("--top-k", type=ranks, metavar="K", default=0, help="0: all (%(default)s)")
    add("--top-p", type=share, metavar="P", default=1.0, help="of their probability (%(default)s)")
    add("--length", type=COUNT, metavar="N", default=256, help="tokens at most (%(default)s)")
    add("--samples", type=SAMPLES, metavar="N", default=1, help="made side by side (%(default)s)")
    add("--seed", type=seed, metavar="N", default=1337, help="(%(default)s)")
    add("--no-stop", action="store_true", help="go on with the next document where one ends")
    add("--tokenizer", metavar="FILE", help="or TOKENIZER_PATH; default: where the run had it")
    add("--context", type=COUNT, metavar="N", help="tokens that the model reads (the artifact's)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), help="or DEVICE; with --run: cpu")
    add("--dtype", choices=("auto", "bf16", "fp32"), help="or DTYPE")
    talk = top.add_argument_group("conversations")
    talk.add_argument("--chat", action="store_true", help="a line is a turn")
    talk.add_argument("--template", metavar="NAME", help="of the data: plain, chatml, or a file")
    talk.add_argument("--system", metavar="TEXT", help="the conversation's system message")
    run = top.add_argument_group("samples for a run's checkpoints")
    run.add_argument("--run", metavar="RUN_ID", help="or its folder; go on until the run is over")
    run.add_argument("--every", type=COUNT, metavar="N", help="only steps that N divides")
    run.add_argument("--once", action="store_true", help="sample what is there, and end")
    run.add_argument("--out-dir", metavar="DIR", help="or OUT_DIR, where RUN_ID is (logs)")
    return top


def usage_problems(options: argparse.Namespace) -> list[str]:
    """Say what is wrong with the combination of options."""
    is_run = options.run is not None
    talks = options.template is not None or options.system is not None
    follows = options.every or options.once or options.out_dir
    rules = [
        (not is_run and not options.words, "name an artifact, or --run RUN_ID"),
        (not is_run and len(options.words) > 2, "more than one prompt: put it into quotes"),
        (options.chat and is_run, "choose one of --chat and --run"),
        (options.chat and len(options.words) > 1, "--chat reads what is said, and no prompt"),
        (options.chat and options.samples > 1, "--chat gives one answer: no --samples"),
        (options.chat and options.no_stop, "--chat needs the end of an answer: no --no-stop"),
        (talks and not options.chat, "--template, --system: need --chat"),
        (follows and not is_run, "--every, --once, --out-dir: need --run"),
    ]
    return [text for broken, text in rules if broken]


def given_settings(options: argparse.Namespace) -> dict[str, str]:
    """Give the settings of train_gpt.py that the options name."""
    device = options.device
    if options.run is not None and not (device or os.environ.get("DEVICE")):
        device = "cpu"  # the run may need all of the GPU
    values = {
        "TOKENIZER_PATH": options.tokenizer,
        "DEVICE": device,
        "DTYPE": options.dtype,
        "EVAL_SEQ_LEN": options.context and str(options.context),
        "EVAL_STRIDE": options.context and "0",
    }
    return {name: value for name, value in values.items() if value}


# ===================================== OUTPUT =====================================


def show(text: str) -> None:
    """Print text at once. On a terminal, control characters, which could drive it, are escaped."""
    if not sys.stdout:
        return
    if sys.stdout.isatty():
        text = "".join(escape(c) if is_control(c) else c for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def is_control(char: str) -> bool:
    """Tell whether a character drives a terminal."""
    return unicodedata.category(char) == "Cc" and char not in "\n\t"


def escape(char: str) -> str:
    """Write a character as Python does."""
    return char.encode("unicode_escape").decode()


@dataclass
class Printer:
    """Print several texts that grow side by side, one after the other: each part once it may."""

    prompt: str
    count: int
    current: int = 0
    waiting: dict[int, list[str]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)

    def begin(self) -> None:
        """Print what comes before the current text."""
        heading = f"--- sample {self.current + 1} of {self.count}\n" if self.count > 1 else ""
        show(heading + self.prompt)

    def take(self, number: int, part: str | None) -> None:
        """Take in the next part of a text; None ends it."""
        if part is None:
            self.ended.add(number)
        else:
            self.waiting.setdefault(number, []).append(part)
        while self.current < self.count:
            show("".join(self.waiting.pop(self.current, [])))
            if self.current not in self.ended:
                return
            show("\n")
            self.current += 1
            if self.current < self.count:
                self.begin()


# ===================================== MAIN =====================================


def generate(options: argparse.Namespace, asked: Any) -> int:
    """Print what an artifact makes of a prompt, or talk."""
    import generate_model

    artifact, *prompts = options.words
    prompt = generate_model.check_text("".join(prompts), "the prompt")
    if options.chat:
        return talk(options, asked)
    model = generate_model.load_artifact(Path(artifact), given_settings(options))
    warn_of_missing(model.texts, prompt)
    document = model.encode(prompt)
    printer = Printer(model.read(document), asked.samples)
    printer.begin()
    for number, part in generate_model.stream(model, document, asked):
        printer.take(number, part)
    return 0


def talk(options: argparse.Namespace, asked: Any) -> int:
    """Talk with an artifact's model."""
    import generate_chat
    import generate_model

    template = generate_chat.Template(options.template or "plain")
    system = generate_model.check_text(options.system or "", "--system")
    model = generate_model.load_artifact(Path(options.words[0]), given_settings(options))
    warn_of_missing(model.texts, system)
    generate_chat.chat(generate_chat.Conversation(model, template, system, asked), show)
    return 0


def sample_run(options: argparse.Namespace, asked: Any) -> int:
    """Sample the checkpoints of a run; 1 if one of them could not be."""
    import generate_model
    import generate_run

    prompts = [generate_model.check_text(text, "a prompt") for text in options.words or [""]]
    out_dir = options.out_dir or os.environ.get("OUT_DIR") or "logs"
    sampler = generate_run.Sampler(
        folder=find_run(options.run, out_dir),
        prompts=prompts,
        asked=asked,
        every=options.every or 1,
        given=given_settings(options),
        show=show,
    )
    if options.once:
        generate_run.sample_once(sampler)
    else:
        generate_run.follow(sampler)
    return 1 if sampler.problems else 0


def work(options: argparse.Namespace) -> int:
    """Do what the options ask for; the exit code."""
    from generate_model import Asked, UserError  # PyTorch, which takes seconds

    rule = Rule(options.temperature, options.top_k, options.top_p)
    asked = Asked(rule, options.length, options.samples, options.seed, not options.no_stop)
    try:
        return generate(options, asked) if options.run is None else sample_run(options, asked)
    except UserError as problem:
        tell(f"generate.py: error: {' '.join(str(problem).split())}")
        return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    top = parser()
    options = top.parse_intermixed_args(arguments)
    if problems := usage_problems(options):
        top.error("; ".join(problems))
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")
    try:
        return work(options)
    except BrokenPipeError:  # nobody reads on; at the exit, it would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MetricsError as problem:
        tell(f"generate.py: error: {problem}")
        return 1
    except ModuleNotFoundError as problem:
        tell(f"generate.py: error: {problem}: pip install -r lab/requirements.txt")
        return 1
    except OSError as problem:
        tell(f"generate.py: error: {problem.filename or 'a file'}: {problem.strerror}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
