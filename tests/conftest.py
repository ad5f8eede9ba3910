"""What the test files share: train_gpt as a module, a tiny dataset, and ways to run the script."""

import atexit
import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import hypothesis
import numpy as np
import pytest
import sentencepiece as spm
import torch
from programs import TECHNIQUES, Program, Server, loss_lines

REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO / "train_gpt.py"
sys.path.insert(0, str(REPO))

import train_gpt  # noqa: E402

# Under nohup, or in a shell's background, signals are ignored, and would be by all that is started.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
torch.set_num_threads(1)
# The same examples on every run; nothing is written beside the tests.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")

BACKWARD = "torch.Tensor.backward"  # once in priming, then once a step
VOCAB = 512
BOS = 1
WORDS_TEXT = """
the a of and to in is that it was for on with as his they be at one have this from or
had by hot but some what there we can out other were all your when up use word how said an each
she which do their time if will way about many then them would write like so these her long make
thing see him two has look more day could go come did my sound no most number who over know water
than call first people may down side been now find any new work part take get place made live where
after back little only round man year came show every good me give our under name very through just
form much great think say help low line before turn cause same mean differ move right boy old too
does tell sentence set three want air well also play small end put home read hand port large spell
add even land here must big high such follow act why ask men change went light kind off need house
picture try us again animal point mother world near build self earth father head stand own page
country found answer school grow study still learn plant cover food sun four thought let keep eye
never last door between city tree cross since hard start might story saw far sea draw left late run
while press close night real life few stop open seem together next white children begin got walk
"""
WORDS = WORDS_TEXT.split()
MARKS = ["", "", "", "", "", ",", ".", ";", "!", "?", " -", ":"]
RARE = ["café", "naïve", "Zürich", "señor", "Ångström", "🙂", "日本", "€5", "±0.3", "Ω", "🚀🚀"]


@pytest.fixture(autouse=True)
def own_kernels():
    """A test leaves no kernel for packed documents to the next one."""
    yield
    train_gpt.PACKED.clear()


@pytest.fixture(autouse=True, scope="session")
def away_from_the_checkout(tmp_path_factory) -> Iterator[None]:
    """Fixtures of a wide scope, and programs that they start, begin in an empty folder."""
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        yield


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, away_from_the_checkout) -> Iterator[None]:
    """So do tests: no relative path, and no default, finds data, logs or .venv of the checkout."""
    with contextlib.chdir(tmp_path):
        yield


def tracked() -> list[Path]:
    """The repository's own files, whatever else lies in the checkout."""
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    names: list[str | Path] = []
    with contextlib.suppress(OSError):  # no git
        done = subprocess.run(git, cwd=REPO, env=env, capture_output=True, check=False)
        names += filter(None, os.fsdecode(done.stdout).split("\0"))
    made = {".venv", "datasets", "tokenizers", "logs"}
    names = names or [p for p in REPO.rglob("*") if made.isdisjoint(p.relative_to(REPO).parts)]
    return sorted(path for path in (REPO / name for name in names) if path.is_file())


def copy_checkout(target: Path) -> Path:
    """Copy the repository's own files into a folder."""
    for path in tracked():
        copy = target / path.relative_to(REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return target


def compose_documents(count: int = 100, seed: int = 0) -> list[str]:
    """English-looking documents of 5 to 150 words, the same on every machine."""
    rng = random.Random(seed)
    documents = []
    for _ in range(count):
        words = []
        for _ in range(rng.randint(5, 150)):
            kind = rng.random()
            # Squaring makes some words far more frequent than others, as in real text.
            word = WORDS[int(len(WORDS) * rng.random() ** 2)]
            if kind < 0.04:
                word = str(rng.randint(0, 10 ** rng.randint(1, 6)))
            elif kind < 0.06:
                word = rng.choice(RARE)
            elif kind < 0.12:
                word = word.capitalize()
            elif kind < 0.14:
                word = word.upper()
            words.append(word + rng.choice(MARKS))
        documents.append(" ".join(words) + ".")
    return documents


def train_tokenizer(
    path: Path, documents: Iterable[str], vocab_size: int = VOCAB, **changed: object
) -> Path:
    """Train a SentencePiece BPE with the challenge's options (techniques.md 1.5), but for those
    that are changed."""
    model = io.BytesIO()
    usual = {"pad_id": 0, "bos_id": BOS, "eos_id": 2, "unk_id": 3}
    usual |= {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False}
    usual |= {"byte_fallback": True}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.999,
        split_digits=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **usual | changed,
    )
    assert len(spm.SentencePieceProcessor(model_proto=model.getvalue())) == vocab_size
    path.write_bytes(model.getvalue())
    return path


def shard_bytes(tokens, magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    """A shard in the published format: 256 little-endian int32, then uint16 tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.asarray(tokens).astype("<u2").tobytes()


TITLE, CAPITALS, NEXT, ESCAPE = CASE_MARKS = "\ue001\ue002\ue003\ue004"
SPECIAL_TEXTS = [  # for CaseOps
    "  Two blanks  and McDonald's iPhone, USA. \n\n\tA a AB Ab aB aBC ÀB éX ﬁ\u00a0½  ",
    f"marks {TITLE}{ESCAPE}{ESCAPE}x{NEXT}Y {CAPITALS}",
    "日本 🚀 ＡＢＣ e\u0301 E\u0301t \u212b",
]


def small_letters(text: str) -> str:
    """A text as CaseOps writes it (techniques.md 2.14), letter by letter."""
    written, place = [], 0
    while place < len(text):
        end = place
        while end < len(text) and text[end].isascii() and text[end].isalpha():
            end += 1
        word = text[place:end]
        if not word:
            written.append(ESCAPE * (text[place] in CASE_MARKS) + text[place])
            place += 1
            continue
        place = end
        if len(word) > 1 and word.isupper():
            written.append(CAPITALS + word.lower())
            continue
        for number, letter in enumerate(word):
            mark = (NEXT if number else TITLE) if letter.isupper() else ""
            written.append(mark + letter.lower())
    return "".join(written)


def write_validation(folder: Path, parts: Mapping[str, list], border: int) -> None:
    """Write two shards of each kind, "val" or "val_bytes", cut after `border` tokens."""
    for kind, documents in parts.items():
        stream = np.concatenate(documents)
        for number, part in enumerate((stream[:border], stream[border:])):
            path = folder / f"fineweb_{kind}_{number:06d}.bin"
            path.write_bytes(shard_bytes(part))


def resolve(base: Mapping[str, object], **changed: object) -> train_gpt.Hyperparameters:
    """The settings in `base`, but for those that are changed, on a CPU unless they say otherwise;
    what paths name need not exist."""
    values = {"DEVICE": "cpu", **base, **changed}
    texts = {name: str(value) for name, value in values.items()}
    return train_gpt.load_settings(texts, check_places=False)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    """A file that stands for a tokenizer: an artifact knows it only by its digest."""
    path = tmp_path_factory.mktemp("tokenizer") / "some.model"
    path.write_bytes(b"some tokenizer")
    return path


@functools.cache
def process_settings(tokenizer: Path, **values: object) -> train_gpt.Hyperparameters:
    """The settings of a process that knows nothing of the artifact's."""
    return resolve({}, TOKENIZER_PATH=tokenizer, **values)


def load(data: bytes, folder: Path, tokenizer: Path, **values: object):
    """Load an artifact of these bytes in another process: its settings and its weights."""
    path = folder / "a.artifact"
    path.write_bytes(data)
    return train_gpt.load_artifact(path, process_settings(tokenizer, **values))


@dataclass
class LoggedRun:
    """What the functions that pack an artifact need of a run, and the lines that they log."""

    hp: train_gpt.Hyperparameters
    rank: int = 0
    world_size: int = 1
    dir: Path = Path("run")
    lines: list[str] = field(default_factory=list)

    def log(self, line: str, *event: object, **fields: object) -> None:
        self.lines.append(line)


def new_run(base: Mapping[str, object], **changed: object) -> train_gpt.Run:
    """One process with the settings in `base`, but for those that are changed."""
    return train_gpt.Run(resolve(base, **changed))


def optimizers_of(model, hp):
    """The optimizers of all parameters of a model."""
    return train_gpt.build_optimizers(dict(model.named_parameters()), train_gpt.Run(hp))


def trainer_of(model, run, forward=None):
    """The trainer of a model, as a run makes it; `forward` is the model, compiled or watched."""
    stream = train_gpt.part("TokenStream", run.hp)("train", run)
    return train_gpt.part("Trainer", run.hp)(model, forward or model, stream, run)


def packed_operator():
    """A kernel for packed documents that is one operator to the compiler, as those of CUDA and of
    CPUs with AMX are; its gradients are wrong."""

    @torch.library.custom_op("tests::packed", mutates_args=())
    def packed(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        return train_gpt.attend_by_piece(q, k, v, offsets).contiguous()

    packed.register_fake(lambda q, k, v, offsets: torch.empty(q.shape, dtype=q.dtype))
    packed.register_autograd(
        lambda ctx, dy: (dy, *ctx.saved_tensors, None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:3]),
    )
    return packed


def double_model(hp, mean=0.2, deviation=0.6, kind=train_gpt.build_model):
    """A model in float64 (but for its logits) none of whose parameters is as initialized."""
    torch.manual_seed(0)
    model = kind(hp, torch.float64).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean, deviation)
    return model


def document_stream(lengths, seed=0, head=True):
    """Documents of these lengths, their BOS included, in a row, of ids under 23, uint16 (N,); the
    first without its BOS, if not head."""
    tokens = np.random.default_rng(seed).integers(2, 23, sum(lengths)).astype(np.uint16)
    begins = np.cumsum([0, *lengths[:-1]])
    tokens[begins if head else begins[1:]] = BOS
    return tokens


def cut_documents(lengths, rows, longest, device="cpu"):
    """Where documents of these lengths, in so many rows, are cut for attention."""
    begins = np.zeros(sum(lengths), bool)
    begins[np.cumsum(lengths)[:-1]] = True
    return train_gpt.cut(begins.reshape(rows, -1), longest, torch.device(device))


def dense_attention(q, k, v, offsets):
    """By the definition: a masked softmax over all pairs of the batch's tokens, in float64."""
    B, H, T, D = q.shape
    q, k, v = (x.double().transpose(0, 1).flatten(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(H // len(x), 0) for x in (k, v))
    piece = torch.searchsorted(
        offsets.long(), torch.arange(B * T, device=offsets.device), right=True
    )
    mask = (piece[:, None] == piece).tril()
    scores = (q @ k.mT / D**0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).unflatten(1, (B, T)).transpose(0, 1)


def random_model(hp):
    """A model none of whose parameters is as it was initialized: every one gets a gradient."""
    torch.manual_seed(0)
    model = train_gpt.build_model(hp)
    for name, p in model.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.normal_(p, 0.0, 1.0 if name == "tok_emb.weight" else p.size(-1) ** -0.5)
        else:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


@dataclass(frozen=True)
class Dataset:
    """Documents, the tokenizer trained on them, and their shards; val holds the first documents."""

    folder: Path
    tokenizer: Path
    val_documents: list[str]
    val: np.ndarray
    train: np.ndarray

    @property
    def sp(self) -> spm.SentencePieceProcessor:
        return spm.SentencePieceProcessor(model_file=str(self.tokenizer))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Dataset:
    """100 documents, a 512-piece tokenizer, 2 train and 2 val shards; never to be changed."""
    root = tmp_path_factory.mktemp("dataset")
    documents = compose_documents()
    tokenizer = train_tokenizer(root / "tiny_512_bpe.model", documents)
    sp = spm.SentencePieceProcessor(model_file=str(tokenizer))
    encoded = [[BOS, *ids] for ids in sp.encode(documents)]
    folder = root / "shards"
    folder.mkdir()
    split = {}
    for name, chosen in (("val", encoded[:15]), ("train", encoded[15:])):
        middle = len(chosen) // 3
        for number, part in enumerate((chosen[:middle], chosen[middle:])):
            path = folder / f"fineweb_{name}_{number:06d}.bin"
            path.write_bytes(shard_bytes(np.concatenate(part)))
        split[name] = np.concatenate(chosen).astype(np.uint16)
    return Dataset(folder, tokenizer, documents[:15], split["val"], split["train"])


@pytest.fixture
def tiny_env(dataset, tmp_path) -> dict[str, str]:
    """Settings of a CPU run of a second."""
    return tiny_settings(dataset, tmp_path / "logs")


def tiny_settings(dataset: Dataset, out_dir: Path, **overrides: object) -> dict[str, str]:
    """Settings of a CPU run of a second on `dataset`; for fixtures of a wider scope."""
    settings = {
        "DATA_PATH": dataset.folder,
        "TOKENIZER_PATH": dataset.tokenizer,
        "OUT_DIR": out_dir,
        "RUN_ID": "tiny",
        "VOCAB_SIZE": VOCAB,
        "NUM_LAYERS": 2,
        "MODEL_DIM": 64,
        "NUM_HEADS": 4,
        "NUM_KV_HEADS": 2,
        "TRAIN_SEQ_LEN": 64,
        "TRAIN_BATCH_TOKENS": 512,
        "VAL_BATCH_SIZE": 4096,
        "ITERATIONS": 4,
        "WARMDOWN_ITERS": 2,
        "WARMUP_STEPS": 0,
        "VAL_LOSS_EVERY": 0,
        "MAX_WALLCLOCK_SECONDS": 0,
        "DEVICE": "cpu",
        "DTYPE": "fp32",
        "COMPILE": 0,
    } | overrides
    return {name: str(value) for name, value in settings.items()}


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    rc: int
    stdout: str
    stderr: str
    seconds: float


def cli_env(env: dict[str, str]) -> dict[str, str]:
    """The environment of a program that sees only `env`, and what it needs to start."""
    needed = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return {**needed, "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1", **env}


def run_cli(
    env: dict[str, str],
    *args: str,
    copy_to: Path | None = None,
    beside: Iterable[str] = (),
    nproc: int = 1,
    cwd: Path | None = None,
) -> Outcome:
    """Run train_gpt.py as a program that sees only `env`; or its copy in the folder `copy_to`, with
    the files `beside` it. One process is forked from one that has PyTorch loaded."""
    script = SCRIPT
    if copy_to:
        copy_to.mkdir(parents=True, exist_ok=True)
        script = Path(shutil.copy(SCRIPT, copy_to))
        for name in beside:
            shutil.copy(SCRIPT.with_name(name), copy_to)
    start = time.perf_counter()
    if nproc == 1 and "OMP_NUM_THREADS" not in env:  # which PyTorch reads when it is loaded
        code, printed, errors = common_server().call(
            [str(script), *args], cli_env(env), cwd or Path.cwd()
        )
        return Outcome(code, printed, errors, time.perf_counter() - start)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [sys.executable, *(launcher if nproc > 1 else []), str(script), *args]
    done = subprocess.run(
        command,
        env=cli_env(env),
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr, time.perf_counter() - start)


@functools.cache
def common_server() -> Server:
    """What forks the programs of `run_cli`; it ends with the tests."""
    server = Server(Path(tempfile.mkdtemp(prefix="programs")))
    atexit.register(shutil.rmtree, server.folder, ignore_errors=True)
    atexit.register(server.close)
    return server


def run_main(env: dict[str, str], *args: str) -> None:
    """Call train_gpt.main in this process, which is faster, in an environment of `env` alone."""
    basic = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    with mock.patch.dict(os.environ, {**basic, **env}, clear=True):
        train_gpt.main(list(args))


@pytest.fixture
def run(tiny_env, tmp_path):
    """Run train_gpt.main in this process, with changed settings; the run's folder."""

    def start(name: str = "tiny", **changed: object) -> Path:
        texts = {key: str(value) for key, value in changed.items()}
        run_main(tiny_env | {"RUN_ID": name} | texts)
        return tmp_path / "logs" / name

    return start


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """What starts real runs of the script at once."""
    server = Server(tmp_path_factory.mktemp("programs"))
    yield server
    server.close()


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The raw weights that a run left in its folder."""
    return torch.load(folder / "final_model.pt", weights_only=True)


def events(folder: Path, kind: str = "") -> list[dict]:
    """The events in a run's metrics, or those of a kind."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [event for event in found if not kind or event["event"] == kind]


def same_bits(a: Path, b: Path) -> bool:
    """Whether two runs ended on exactly the same weights."""
    first, second = load_weights(a), load_weights(b)
    assert first.keys() == second.keys()
    return all(first[n].numpy().tobytes() == second[n].numpy().tobytes() for n in first)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes] | None]:
    """Every path below `folder`; for files, their time of change and their contents."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# ---- runs that are interrupted


def checkpoints(folder: Path) -> list[int]:
    """The steps of which a folder has checkpoints."""
    return sorted(int(re.findall(r"\d+", path.name)[0]) for path in folder.glob("checkpoint_*"))


def error(run: Program) -> str:
    """The message of a run that has refused to go on, as a user should see it."""
    assert run.returncode == 1, run.output
    assert "Traceback" not in run.output
    found = re.search(r"^train_gpt\.py: error: (.*)", run.output, re.M | re.S)
    assert found, run.output
    return found[1]


class Place:
    """A folder for the runs of a test, and the settings that they share."""

    def __init__(self, server: Server, dataset, out: Path) -> None:
        self.server, self.out = server, out
        self.settings = tiny_settings(dataset, out, **TECHNIQUES, SAVE_EVERY=3, RUN_ID="run")

    @property
    def folder(self) -> Path:
        return self.out / "run"

    @property
    def log(self) -> str:
        return (self.out / "run.txt").read_text(encoding="utf-8")

    def env(self, **changed: object) -> dict[str, str]:
        return self.settings | {name: str(value) for name, value in changed.items()}

    def start(self, *faults: dict, **changed: object) -> Program:
        return self.server.start(self.env(**changed), *faults)

    def run(self, *faults: dict, **changed: object) -> Program:
        return self.start(*faults, **changed).wait()

    def resume(self, *faults: dict, **changed: object) -> Program:
        return self.run(*faults, **{"RESUME": "auto"} | changed)


def at(nth: int, do: str, where: str = BACKWARD, part: str = "") -> dict:
    """What happens before the nth call of a function."""
    return {"at": where, "nth": nth, "do": do, "part": part}


def assert_ended_like(place: Place, whole: Place, *runs: Program) -> None:
    """The last of these runs must have ended as `whole`, with the same losses on the way."""
    assert runs[-1].returncode == 0, runs[-1].output
    assert same_bits(place.folder, whole.folder)
    # A killed run's last line may lack its end.
    lines, printed = loss_lines(whole.output), "\n".join(run.output for run in runs)
    assert sorted(loss_lines(printed)) == sorted(lines)


@pytest.fixture
def place(server, dataset, tmp_path) -> Place:
    """An empty place."""
    return Place(server, dataset, tmp_path / "logs")


@pytest.fixture(scope="session")
def whole(server, dataset, tmp_path_factory) -> Place:
    """A run that no signal has disturbed."""
    place = Place(server, dataset, tmp_path_factory.mktemp("undisturbed"))
    run = place.run(SAVE_EVERY=0)
    assert run.returncode == 0, run.output
    place.output = run.output
    return place


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Make a disk of some bytes; skips where that is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
        return folder

    yield make
    subprocess.run(["umount", str(folder)], capture_output=True)
