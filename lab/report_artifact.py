"""Where the bytes of an artifact go, tensor by tensor, and how far its weights are from raw ones.

A file of train_gpt.py has a preamble with a digest, one zstd stream of header and floats, and one
stream of coded levels (docs/artifact.md). The bytes of a stream are shared out among what is in it:
of a zstd stream, in proportion to what each part takes when it is compressed alone; of a rANS
stream, in proportion to the information of each matrix's levels under the stored histograms. So
each share is an estimate, and their sum is exact.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
from numpy import ndarray

FIXED = 48  # bytes of the preamble and of the digest


class ArtifactError(Exception):
    """Why an artifact, or what belongs to it, cannot be shown; one line for a person."""


@dataclass
class Part:
    """A part of an artifact: a tensor, or what belongs to all of them."""

    name: str
    role: str
    shape: list[int] = field(default_factory=list)
    stored: str = ""
    floats: int = 0  # bytes in the stream of header and floats
    levels: int = 0  # bytes in the stream of levels
    error: float | None = None  # relative RMS error of its weights

    @property
    def total(self) -> int:
        """Count its bytes."""
        return self.floats + self.levels

    @property
    def bits(self) -> float:
        """Give its bits a weight."""
        return 8 * self.total / math.prod(self.shape)


def trainer() -> ModuleType:
    """Import train_gpt.py, which takes seconds. Raises ArtifactError."""
    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        import train_gpt
    except ImportError as error:
        raise ArtifactError(f"train_gpt.py cannot be imported here: {error}") from None
    return train_gpt


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` into whole numbers in proportion to weights; evenly, if those are all 0."""
    whole = sum(weights)
    if not whole:
        return share_out(total, [1.0] * len(weights))
    exact = [total * weight / whole for weight in weights]
    parts = [math.floor(part) for part in exact]
    by_rest = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in by_rest[: total - sum(parts)]:
        parts[i] += 1
    return parts


def role_of(name: str, layout: list[list[Any]]) -> str:
    """Say what a tensor is for, in the words of the settings."""
    if layout[0][0] == "<f4" and len(layout) == 1:
        return "gains and scales"
    if name.startswith("bigram."):
        return "token pairs"
    if name.startswith(("tok_emb", "lm_head")):
        return "embeddings"
    if ".attn." in name:
        return "attention"
    return "MLP" if name.startswith("blocks.") else "others"


class Artifact:
    """What is in an artifact. Raises ArtifactError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.core = trainer()
        try:
            self.data = path.read_bytes()
            self.read()
        except FileNotFoundError:
            raise ArtifactError(f"{path}: not there") from None
        except Exception as error:  # crafted content can raise anything
            said = str(error).partition("\n")[0] or type(error).__name__
            raise ArtifactError(f"{path}: {said}") from None

    def read(self) -> None:
        """Read all arrays but for levels, after the checks that loading makes of their sizes."""
        core = self.core
        header, head, self.coded = core.open_artifact(self.data)
        hp = core.load_settings({"DEVICE": "cpu"}, check_places=False)
        self.hp = core.read_settings(header, hp)
        with core.torch.device("meta"):
            state = core.build_model(self.hp).state_dict()
        self.bits = {name: core.bits_of(name, w, self.hp) for name, w in state.items()}
        self.table = {name: core.layout(name, w, self.hp) for name, w in state.items()}
        core.require(header["tensors"] == self.table, "its tensors are not those of its settings")
        self.header_size = core.PREAMBLE.unpack(self.data[:16])[2]
        self.floats = {name: self.kept(head, arrays) for name, arrays in self.table.items()}

    def kept(self, head: IO[bytes], arrays: list[list[Any]]) -> list[ndarray]:
        """Read the arrays of a tensor that are in the stream of floats."""
        return [self.core.read_array(head, *array) for array in arrays if "i" not in array[0]]

    @property
    def matrices(self) -> list[str]:
        """Name the tensors that are stored as levels."""
        return [name for name, arrays in self.table.items() if "i" in arrays[-1][0]]

    def alone(self, raw: bytes, level: int) -> int:
        """Count the bytes of data that zstd compresses alone, but for those of an empty frame."""
        compress = self.core.zstd().compress
        return len(compress(raw, level)) - len(compress(b"", level))

    def share_head(self) -> list[int]:
        """Share out the stream of header and floats: the header, then each tensor."""
        stream = self.core.zstd().ZstdDecompressor().stream_reader(self.data[FIXED:])
        sizes = [self.alone(stream.read(self.header_size), 22)]
        for arrays in self.floats.values():
            planes = [array.reshape(-1, 1).view("u1").T.tobytes() for array in arrays]
            sizes.append(self.alone(b"".join(planes), 22))
        return share_out(len(self.data) - FIXED - len(self.coded), sizes)

    def plain_weights(self) -> list[float]:
        """Say what the levels of each matrix take in a zstd stream of their own."""
        levels = self.core.zstd().ZstdDecompressor().decompress(self.coded)
        shapes = [self.table[name][-1][1] for name in self.matrices]
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        parts = np.split(np.frombuffer(levels, np.int8), ends[:-1])
        return [self.alone(part.tobytes(), 1) for part in parts]

    def rans_weights(self) -> tuple[int, list[float]]:
        """Count the bytes of the histograms, and the bits of each matrix's levels under them."""
        coder = self.core.quantizer(self.hp)
        shapes = [self.table[name][-1][1] for name in self.matrices]
        stored = [self.floats[name] for name in self.matrices]
        classes = coder.contexts_of(stored, shapes, self.hp)
        states = self.hp.quant_trellis if self.hp.quant_method == "gptq" else 1
        codes = coder.rans_decode(self.coded, classes, states)
        decoder = coder.Decoder(self.coded, 2 * max(int(kind.max()) for kind in classes) + 2)
        bits = -np.log2(np.maximum(decoder.f, 1) / coder.RANS_TOTAL)
        found = []
        for kind, code in zip(classes, codes, strict=True):
            context = 2 * kind.astype(int) + (code & 1)
            found.append(float(bits[context, (code >> 1) - decoder.low].sum()))
        return len(self.coded) - 2 * len(decoder.words), found

    def share_levels(self) -> tuple[int, list[int]]:
        """Share out the stream of levels: what belongs to no matrix, then each matrix."""
        if not self.matrices:
            return len(self.coded), []
        if self.core.is_plain(self.hp):
            return 0, share_out(len(self.coded), self.plain_weights())
        histograms, bits = self.rans_weights()
        return histograms, share_out(len(self.coded) - histograms, bits)

    def stored(self, name: str) -> str:
        """Say in what form a tensor is stored."""
        if name not in self.matrices:
            return "fp32" if self.table[name][0][0] == "<f4" else "fp16"
        return "trellis" if self.hp.quant_method == "gptq" else f"int{self.bits[name]}"

    def parts(self) -> list[Part]:
        """List all parts; their bytes sum up to those of the file."""
        header, *floats = self.share_head()
        shared, levels = self.share_levels()
        rows = [
            Part("preamble and digest", "file", floats=FIXED),
            Part("header", "file", floats=header),
        ]
        if shared:
            name = "histograms of levels" if levels else "empty stream of levels"
            rows.append(Part(name, "file", levels=shared))
        of_levels = dict(zip(self.matrices, levels, strict=True))
        for (name, arrays), size in zip(self.table.items(), floats, strict=True):
            shape = arrays[-1][1]
            form = self.stored(name)
            role = role_of(name, arrays)
            rows.append(Part(name, role, shape, form, size, of_levels.get(name, 0)))
        return rows


def raw_weights(path: Path, core: ModuleType) -> dict[str, Any]:
    """Read the weights before they were quantized. Raises ArtifactError."""
    try:
        weights = core.torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ArtifactError(f"{path}: not there") from None
    except Exception as error:  # damaged content can raise anything
        said = str(error).partition("\n")[0].rstrip(".")
        raise ArtifactError(f"{path}: cannot be read as weights: {said:.200}") from None
    if not isinstance(weights, dict):
        raise ArtifactError(f"{path}: not a file of weights by their names")
    return weights


def relative_error(stored: Any, raw: Any) -> float | None:
    """Give the RMS of the difference over the RMS of the raw weights; None if those are all 0."""
    size = float(raw.double().square().mean().sqrt())
    difference = float((stored.double() - raw.double()).square().mean().sqrt())
    return difference / size if size and math.isfinite(difference / size) else None


def errors(folder: Path, tokenizer: str) -> dict[str, float | None]:
    """Give the relative RMS error of each tensor of a run's artifact. Raises ArtifactError."""
    core = trainer()
    raw = raw_weights(folder / "final_model.pt", core)
    path = folder / "final_model.artifact"
    if not Path(tokenizer).is_file():
        advice = "name it by TOKENIZER_PATH in the environment"
        raise ArtifactError(f"the run's tokenizer {tokenizer!r} is not there; {advice}")
    given = {"TOKENIZER_PATH": tokenizer, "DEVICE": "cpu"}
    try:
        hp = core.load_settings(given, check_places=False)
        _, weights = core.load_artifact(path, hp)
    except (core.UserError, OSError) as error:
        raise ArtifactError(str(error).partition("\n")[0]) from None
    same = weights.keys() == raw.keys()
    if not same or any(weights[name].shape != raw[name].shape for name in weights):
        raise ArtifactError(f"{folder}: final_model.pt holds other tensors than the artifact")
    return {name: relative_error(weights[name], raw[name]) for name in weights}
