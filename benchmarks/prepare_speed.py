"""How fast data/prepare.py is, against SentencePiece's own batch encoding of the same documents.

    python benchmarks/prepare_speed.py documents.jsonl tokenizer.model [--rounds 3] [--mib 0]

The documents are one JSON object with "text" a line. SentencePiece has them in memory and keeps its
result there; prepare.py is timed as a command, from its start to the finished dataset: start of
Python and its processes, reading, digests, shards, manifest. Both with one and with two threads or
processes, A B A B; medians. --mib N repeats the documents to N MiB of input. The last line is the
peak memory of the largest process of prepare.py.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sentencepiece import SentencePieceProcessor

PREPARE = Path(__file__).resolve().parent.parent / "data" / "prepare.py"


def seconds(work: Callable[[], object]) -> float:
    """Time how long `work` takes, s."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def repeated(path: Path, size: int, folder: Path) -> Path:
    """Write the lines of a file again and again, each time numbered, `size` bytes."""
    result = folder / "input.jsonl"
    with open(result, "w", encoding="utf-8") as out:
        for turn in itertools.count():
            for line in numbered(path, turn):
                if out.tell() >= size:
                    return result
                out.write(line)


def numbered(path: Path, turn: int) -> Iterator[str]:
    """Yield the lines of a file with a number before their text: other documents."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield (
                json.dumps({"text": f"{turn} {json.loads(line)['text']}"}, ensure_ascii=False)
                + "\n"
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mib", type=int, default=0)
    args = parser.parse_args()
    tokenizer = SentencePieceProcessor(model_file=str(args.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        source = args.documents
        if args.mib:
            source = repeated(source, args.mib * 2**20, Path(folder))

        def prepare(processes: int) -> None:
            command = [sys.executable, PREPARE, source, "--tokenizer", args.tokenizer]
            command += ["--out", folder, "--processes", str(processes), "--force"]
            subprocess.run([*map(str, command)], check=True, capture_output=True)

        prepare(2)  # before this process grows, whose size a new process inherits for a moment
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        # Encoding holds all texts and tokens in memory: 300 MB of text is plenty to compare.
        with open(source, encoding="utf-8") as file:
            lines = file.readlines(300_000_000)
        texts = [json.loads(line)["text"] for line in lines]
        encoded = sum(len(text.encode()) for text in texts) / 1e6
        total = encoded * source.stat().st_size / sum(len(line.encode()) for line in lines)
        for threads in (1, 2):
            times: dict[str, list[float]] = {"SentencePiece": [], "prepare.py": []}
            for _ in range(args.rounds):
                own = seconds(lambda n=threads: tokenizer.encode(texts, num_threads=n))
                times["SentencePiece"].append(encoded / own)
                times["prepare.py"].append(total / seconds(lambda n=threads: prepare(n)))
            speeds = {name: statistics.median(values) for name, values in times.items()}
            text = " ".join(f"{name} {speed:.2f} MB/s" for name, speed in speeds.items())
            share = speeds["prepare.py"] / speeds["SentencePiece"]
            print(f"{threads} thread(s) or process(es): {text} ratio {share:.1%}", flush=True)
    print(f"{total:.0f} MB of text, largest process of prepare.py {peak:.0f} MiB")


if __name__ == "__main__":
    main()
