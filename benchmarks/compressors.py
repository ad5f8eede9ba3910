"""What general compressors make of the validation text, in the unit of the game.

    python benchmarks/compressors.py DATA_PATH TOKENIZER_PATH

Bits per byte is the size of the compressed text over the size of the text, in the same bytes that
BPB counts: what the validation tokens decode to. A compressor starts from nothing, where a model
has read the training text; xz and zstd see the whole validation text as one file.
"""

import lzma
import sys
from pathlib import Path

import numpy as np
import zstandard
from sentencepiece import SentencePieceProcessor

HEADER_BYTES = 1024


def validation_text(data: Path, tokenizer: Path) -> bytes:
    """Decode the validation shards in `data` into UTF-8, documents one after the other."""
    sp = SentencePieceProcessor(model_file=str(tokenizer))
    shards = sorted(data.glob("fineweb_val_[0-9]*.bin"))
    if not shards:
        raise SystemExit(f"{data}: no fineweb_val_*.bin in it")
    tokens = np.concatenate([np.fromfile(path, "<u2", offset=HEADER_BYTES) for path in shards])
    documents = np.split(tokens, np.flatnonzero(tokens == sp.bos_id()))
    return "".join(sp.decode([ids.tolist() for ids in documents])).encode()


def main(arguments: list[str]) -> None:
    """Print a Markdown table of compressors and their bits per byte."""
    if len(arguments) != 2:
        raise SystemExit("usage: python benchmarks/compressors.py DATA_PATH TOKENIZER_PATH")
    text = validation_text(Path(arguments[0]), Path(arguments[1]))
    sizes = {
        "zstd -22": len(zstandard.ZstdCompressor(level=22).compress(text)),
        "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    print(f"{len(text):,} bytes of validation text\n\n| | bytes | bits per byte |\n|---|---|---|")
    for name, size in sizes.items():
        print(f"| {name} | {size:,} | {8 * size / len(text):.4f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
