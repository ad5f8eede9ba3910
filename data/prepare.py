"""Make a dataset for train_gpt.py, a tokenizer and token shards, from any text.

    python data/prepare.py input.txt --name mine --vocab-size 1024
    python data/prepare.py corpus.jsonl.zst more/ --name mine --vocab-size 1024
    python data/prepare.py corpus/ --name mine --tokenizer data/tokenizers/fineweb_1024_bpe.model
    python data/prepare.py --sample               the built-in sample, without a download
    python data/prepare.py --sample --vocab-size 8192
    python data/prepare.py corpus.jsonl --name mine --vocab-size 8192 --case-ops
    python data/prepare.py --check data/datasets/mine_sp1024

Below the data folder (--out) it writes tokenizers/ and datasets/<name>_sp<V>/ with the shards and
manifest.json, which says what was made, and from what. The same inputs and options give the same
bytes, whatever the number of processes. A dataset appears whole or not at all; interrupted, the
same command goes on from what is tokenized already.
"""

import argparse
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from build import (
    Job,
    Source,
    build,
    check_place,
    check_tokenizer,
    dataset_folder,
    is_current,
    publish,
)
from checks import check_dataset, find_tokenizer, read_manifest
from console import name_text, steady_console, training_command
from docstrings import PACKAGES, DocstringSource
from filelock import FileLock, Timeout
from rendering import TEMPLATES, add_options, format_from
from shards import DataError
from sources import PIECE_BYTES, SPLIT_TEXT, Problems
from sources import Source as InputSource
from vocabulary import NORMALIZATIONS, file_digest

DATA = Path(__file__).resolve().parent
SAMPLE_VOCAB = 1024
VAL_FRACTION, VAL_FRACTION_OF_TEXT = 0.01, 0.1
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class TextSource:
    """The inputs named on the command line, as `build` reads any source."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.format, self.problems = format_from(args), Problems(args.strict)
        self.reader = InputSource(
            args.inputs,
            self.format,
            self.problems,
            args.max_document_bytes,
            subset=args.subset,
            split=args.split,
            samples=args.samples,
            split_text=args.split_text,
        )
        self.selection = {"subset": args.subset, "split": args.split, "samples": args.samples}
        self.selection |= {"max_document_bytes": args.max_document_bytes}
        self.others = [name for name in args.inputs if name == "-" or name.startswith("hf:")]

    @property
    def total_bytes(self) -> int:
        return 0 if self.others else self.reader.total_bytes

    @property
    def read_bytes(self) -> int:
        return self.reader.read_bytes

    @property
    def skipped(self) -> Counter[str]:
        return self.problems.counts

    @property
    def val_last(self) -> bool:
        """Whether all is plain text that is cut, the end of which is for validation."""
        return self.reader.cuts_texts and self.reader.is_text

    @property
    def val_fraction(self) -> float:
        """The share of the documents that is for validation."""
        return VAL_FRACTION_OF_TEXT if self.val_last else VAL_FRACTION

    def texts(self) -> Iterator[str]:
        """The documents, in order."""
        for number, document in enumerate(self.reader.documents()):
            if number == 0 and self.reader.cuts_texts:
                size = min(PIECE_BYTES, self.reader.limit)
                print(
                    f"plain text is cut at blank lines: documents of about {size:,} bytes", end=""
                )
                print(" (--split-text files: a file is a document)", flush=True)
            yield document.text

    def inputs(self) -> list[dict[str, Any]]:
        """Names, sizes and SHA-256 of the files that were read; names of other inputs."""
        digests = self.reader.digests
        files = [
            {"name": name_text(f.name), "size": f.size, "sha256": digests.get(str(f.path))}
            for f in self.reader.files
        ]
        stdin = {"sha256": digests.get("<stdin>")}
        others = [{"name": name_text(n)} | (stdin if n == "-" else {}) for n in self.others]
        return files + others

    def options(self) -> dict[str, Any]:
        """How the documents are made from the inputs, for the manifest."""
        options = {"records": asdict(self.format) | self.selection}
        if self.reader.cuts_texts:
            options["piece_bytes"] = PIECE_BYTES
        if self.format.uses_template and self.format.template not in TEMPLATES:
            options["template_sha256"] = file_digest(Path(self.format.template))
        return options

    def unchanged(self, inputs: list[dict[str, Any]]) -> bool:
        """Whether a manifest's inputs are these files; standard input and hubs cannot be told."""
        here = [(name_text(f.name), f.size) for f in self.reader.files]
        if self.others or [(i["name"], i.get("size")) for i in inputs] != here:
            return False
        recorded = zip(self.reader.files, inputs, strict=True)
        return all(file_digest(f.path) == i["sha256"] for f, i in recorded)


def whole_number(low: int, high: int) -> Any:
    """An argparse type: a whole number from `low` to `high`, which may be written 100_000."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            if low <= (value := int(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, {low:,} to {high:,}")

    return parse


def fraction(text: str) -> float:
    """An argparse type: a share between 0 and 1."""
    with suppress(ValueError):
        if 0 < (value := float(text)) < 1:
            return value
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number between 0 and 1, such as 0.1")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, dataset = whole_number(1, 2**31 - 1), top.add_argument_group("the dataset")
    top.add_argument("inputs", nargs="*", help="files, folders, globs, - (stdin), hf:<dataset>")
    top.add_argument("--sample", action="store_true", help="docstrings of the installed packages")
    top.add_argument("--check", type=Path, metavar="DIR", help="verify a dataset, make nothing")
    add = dataset.add_argument
    add("--name", default="mine", help="of the dataset (%(default)s)")
    add("--out", type=Path, default=DATA, metavar="DIR", help="data folder (%(default)s)")
    add("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model or byte-level .json")
    add("--vocab-size", type=whole_number(260, 2**16), metavar="N", help="train a BPE of N pieces")
    add("--byte-level", action="store_true", help="the 260 ids of bytes, pad, BOS, EOS, unknown")
    add("--val-docs", type=count, metavar="N", help="documents that are for validation")
    add("--val-fraction", type=fraction, metavar="F", help="or the share of the documents")
    add("--shuffle-seed", type=whole_number(0, 2**63), metavar="N", help="shuffle the documents")
    add("--shard-tokens", type=count, default=100_000_000, metavar="N", help="(%(default)s)")
    add("--byte-sidecar", action="store_true", help="original bytes of each validation token")
    add("--case-ops", action="store_true", help="capitals as control characters and lowercase")
    add(
        "--normalization",
        **{"choices": NORMALIZATIONS, "metavar": "N"},
        help="of a tokenizer that is trained: nmt_nfkc, as the challenge's, or identity, which "
        "keeps the text as it is (default: nmt_nfkc; with --case-ops identity)",
    )
    add("--exclude-val", type=Path, metavar="DIR", help="no validation document of DIR in training")
    add("--tokenizer-bytes", type=count, default=2**28, metavar="N", help="of text to train it on")
    add("--processes", type=whole_number(1, 4096), default=CPUS, metavar="N", help="(%(default)s)")
    add("--force", action="store_true", help="make it again even if it is up to date")
    top.add_argument("--strict", action="store_true", help="stop at the first malformed record")
    limit = whole_number(4, 2**30)
    add_options(top)
    top.add_argument(
        "--split-text",
        **{"choices": SPLIT_TEXT, "default": "auto"},
        help="plain texts: whole files, or cut into pieces; auto cuts few or large ones",
    )
    top.add_argument(
        "--max-document-bytes", type=limit, default=2**23, metavar="N", help="cut longer ones"
    )
    return top


def sample_job(args: argparse.Namespace) -> tuple[Job, Source]:
    """The built-in sample."""
    job = job_from(args, name="sample", vocab_size=args.vocab_size or SAMPLE_VOCAB)
    return job, DocstringSource(PACKAGES, args.processes)


def job_from(args: argparse.Namespace, **changes: Any) -> Job:
    """What the command line asks for."""
    options = {
        **{"name": args.name, "out": args.out.resolve(), "tokenizer": args.tokenizer},
        **{"vocab_size": args.vocab_size or 0, "byte_level": args.byte_level},
        **{"tokenizer_bytes": args.tokenizer_bytes, "val_docs": args.val_docs},
        **{"val_fraction": args.val_fraction, "shuffle_seed": args.shuffle_seed},
        **{"shard_tokens": args.shard_tokens, "byte_sidecar": args.byte_sidecar},
        **{"processes": args.processes, "case_ops": args.case_ops},
        **{"normalization": args.normalization or NORMALIZATIONS[0]},
        **{"exclude_val": args.exclude_val},
    }
    return Job(**(options | changes))


def make(job: Job, source: Source, force: bool) -> None:
    """Make a dataset unless it is there already, and print the outcome."""
    check_tokenizer(job)
    check_place(job)
    folder, start = dataset_folder(job), time.perf_counter()
    work = folder.with_name(f".{folder.name}.work")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            if not force and is_current(job, source):
                shutil.rmtree(work, ignore_errors=True)
                print(f"{folder} is up to date (--force makes it again)")
                print_command(folder, read_manifest(folder))
                return
            work.mkdir(exist_ok=True)
            manifest = build(job, source, work)
            publish(job, work, manifest)
    except Timeout:
        raise DataError(f"{folder}: another prepare.py is making it") from None
    print_summary(folder, manifest, time.perf_counter() - start)


def print_summary(folder: Path, manifest: dict[str, Any], seconds: float) -> None:
    """Say what was made, and how to train on it."""
    print(f"{'split':<6}{'documents':>11}{'text MB':>10}{'tokens':>14}{'bytes/token':>13}")
    for name, n in manifest["splits"].items():
        megabytes, ratio = n["bytes"] / 1e6, n["decoded_bytes"] / n["tokens"]
        print(f"{name:<6}{n['documents']:>11,}{megabytes:>10.2f}{n['tokens']:>14,}{ratio:>13.3f}")
    if skipped := manifest["skipped"]:
        print("skipped:", ", ".join(f"{n:,} {why}" for why, n in skipped.items()))
    for name, n in manifest["splits"].items():
        if lost := n["unknown_bytes"]:
            share = f"{lost:,} bytes ({lost / n['bytes']:.2%}) of the text"
            print(f"{name}: {share} are characters that the tokenizer lacks: unknown pieces")
    splits = manifest["splits"].values()
    total = sum(n["bytes"] for n in splits)
    known = total - sum(n["unknown_bytes"] for n in splits)
    decoded = sum(n["decoded_bytes"] for n in splits)
    if decoded != known:
        rest = "text's" if known == total else "other"
        print(f"tokens decode to {decoded / max(1, known):.2%} of the {rest} bytes (normalization)")
    for name, n in manifest["splits"].items():
        if changed := n.get("changed_documents"):
            print(f"{name}: {changed:,} documents are changed by the tokenizer's normalization")
    print(f"{total / 1e6:.1f} MB of text in {seconds:.1f} s: {total / 1e6 / seconds:.1f} MB/s")
    print_command(folder, manifest)


def print_command(folder: Path, manifest: dict[str, Any]) -> None:
    """Print the line to train with."""
    model = find_tokenizer(folder, manifest).resolve()
    print(training_command(folder, model, manifest["tokenizer"]["vocab_size"]))


def usage_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the combination of options."""
    chosen = sum(map(bool, (args.tokenizer, args.vocab_size, args.byte_level)))
    modes = sum(map(bool, (args.inputs, args.sample, args.check)))
    reused = args.tokenizer or args.byte_level
    rules = [
        (modes != 1, "give inputs, or --sample, or --check DIR"),
        (args.inputs and chosen != 1, "choose one of --tokenizer, --vocab-size and --byte-level"),
        (args.val_docs and args.val_fraction, "choose one of --val-docs and --val-fraction"),
        (args.sample and reused, "--sample trains a tokenizer of its own"),
        (
            args.byte_level and args.case_ops,
            "--byte-level has no pieces for the --case-ops controls",
        ),
        (reused and args.normalization, "--normalization is for a tokenizer that is trained"),
        (args.case_ops and args.normalization == "nmt_nfkc", "--case-ops keeps the text: identity"),
        (args.name != Path(args.name).name, f"--name {args.name}: must be a plain file name"),
        (args.tokenizer and not args.tokenizer.is_file(), f"{args.tokenizer}: no such tokenizer"),
    ]
    return [text for broken, text in rules if broken]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    top = parser()
    args = top.parse_args(argv)
    if problems := usage_problems(args):
        top.error("\n  ".join(problems))
    try:
        if args.check:
            options = (args.tokenizer, args.processes, args.exclude_val)
            return 0 if check_dataset(args.check, *options) else 1
        job, source = sample_job(args) if args.sample else (job_from(args), TextSource(args))
        make(job, source, args.force)
    except (DataError, OSError) as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "" if args.check else "; the same command goes on from here"
        print(f"prepare.py: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    steady_console()
    sys.exit(main())
