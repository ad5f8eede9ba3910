"""Download the published FineWeb token shards and their tokenizer from the Hugging Face hub.

    python data/download.py                                 variant sp1024, 80 train shards: 16 GB
    python data/download.py --variant sp8192 --train-shards 10
    python data/download.py --variant sp8192_caseops        the published CaseOps data
    python data/download.py --list                          what there is, and what is here already

Below the data folder (--out) it writes datasets/fineweb10B_<variant>/ and tokenizers/. A file gets
its name when it is whole and its digest is that of the repository; until then it is a hidden .part
beside it. Interrupted, the same command goes on from there. datasets/<name>/hub_manifest.json
records which repository and commit the files are from, so that files of two are never mixed.

Environment: HF_TOKEN for a private repository; MATCHED_FINEWEB_REPO_ID and
MATCHED_FINEWEB_REMOTE_ROOT_PREFIX for another repository, and another folder in it than "datasets".
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

import httpx2
import sentencepiece as spm
from console import steady_console, training_command
from filelock import FileLock, Timeout
from hub import (
    DATASET_PREFIX,
    PLAIN_NAME,
    Catalog,
    HubError,
    IncompleteError,
    OfflineError,
    Remote,
    StoppedError,
    Variant,
    digest_of,
    fetch_catalog,
    fetch_json,
    opened,
    read_variant,
    retry,
    variants,
)
from shards import DataError, replacing, shard_name, shard_paths, token_count
from tqdm import tqdm
from vocabulary import byte_level_model, load_vocabulary

DATA = Path(__file__).resolve().parent
DEFAULT_REPO, DEFAULT_PREFIX = "willdepueoai/parameter-golf", "datasets"
CASEOPS = "sp8192_lossless_caps_caseops_v1_reserved"
ALIASES = {"sp8192_caseops": CASEOPS}
OTHER_REPOS = {
    **{"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"},
    CASEOPS: "romeerp/parameter-golf-caseops-v1",
}
TRAIN_SHARDS = 80
DOCS, DOCS_SOURCE = "docs_selected.jsonl", "docs_selected.source_manifest.json"
RECORD = "hub_manifest.json"  # manifest.json is prepare.py's
BODIES = 3  # times at most that a file is fetched whole when what arrives is bad


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    variant: str
    train_shards: int | None  # None: the default number, or as many as there are
    with_docs: bool
    repo_id: str
    prefix: str
    out: Path
    jobs: int

    @property
    def dataset(self) -> str:
        """The dataset's name in the manifest, and its folder's."""
        return DATASET_PREFIX + self.variant

    @property
    def folder(self) -> Path:
        """Where the shards go."""
        return self.out / "datasets" / self.dataset


@dataclass(frozen=True)
class Item:
    """A file to have: `name` is its path below the data folder, and below the prefix."""

    name: str
    path: Path
    remote: Remote

    @property
    def is_shard(self) -> bool:
        return self.name.endswith(".bin")


# ---- the plan


def train_shards(request: Request, variant: Variant) -> int:
    """How many train shards to have. Raises DataError if there are not as many as asked for."""
    if request.train_shards is None:
        if variant.train_shards < TRAIN_SHARDS:
            print(f"{request.variant} has {variant.train_shards} train shards; taking all of them")
        return min(TRAIN_SHARDS, variant.train_shards)
    if request.train_shards > variant.train_shards:
        asked, there = request.train_shards, variant.train_shards
        raise DataError(f"--train-shards {asked}: {request.variant} has {there} train shards")
    return request.train_shards


def val_shards(catalog: Catalog, variant: Variant) -> list[str]:
    """Name the validation shards and their sidecars, those that are absent as well.

    With CaseOps every shard has a sidecar, since nothing else tells its original bytes. A manifest
    that has counted fineweb_val_*.bin has counted the sidecars too; then the listing is right.
    """
    folder = f"datasets/{variant.dataset}/"

    def listed(split: str) -> list[str]:
        name = re.compile(re.escape(folder) + rf"fineweb_{split}_\d{{6}}\.bin")
        return sorted(filter(name.fullmatch, catalog.files))

    shards = listed("val")
    sidecars = listed("val_bytes")
    count = variant.val_shards
    if sidecars and count == len(shards) + len(sidecars):
        print(f"{variant.dataset}: its manifest counts sidecars among the {count} val shards")
        count = len(shards)
    if "caseops" in variant.dataset:
        needed = [folder + shard_name("val_bytes", i) for i in range(count)]
        sidecars = sorted({*sidecars, *needed})
    return [folder + shard_name("val", i) for i in range(count)] + sidecars


def plan(request: Request, catalog: Catalog, variant: Variant) -> tuple[list[Item], list[str]]:
    """The files to have, and the names of those that the repository should have but does not
    list. Raises DataError."""
    folder = f"datasets/{variant.dataset}/"
    names = [*variant.tokenizer_paths]
    names += val_shards(catalog, variant)
    names += [folder + shard_name("train", i) for i in range(train_shards(request, variant))]
    if request.with_docs:
        names += [DOCS_SOURCE] if DOCS_SOURCE in catalog.files else []
        names += [DOCS]
    files = catalog.files
    items = [Item(n, request.out / n, files[n]) for n in names if n in files]
    return items, [name for name in names if name not in files]


def with_docs_digest(items: list[Item], catalog: Catalog) -> list[Item]:
    """The items, where that of the documents must have the digest that their source manifest
    states, if it does. Raises DataError if that is not what the repository lists."""
    if not {DOCS, DOCS_SOURCE} <= {item.name for item in items}:
        return items
    source = fetch_json(catalog, catalog.files[DOCS_SOURCE])
    if not isinstance(source, dict) or "docs_sha256" not in source:
        return items
    stated = f"sha256:{source['docs_sha256']}"
    listed = catalog.files[DOCS].digest or ""
    if not re.fullmatch("sha256:[0-9a-f]{64}", stated):
        raise DataError(f"{DOCS_SOURCE}: its docs_sha256 is not a SHA-256 digest")
    if listed.startswith("sha256:") and listed != stated:
        raise DataError(f"{DOCS}: listed as {listed}, but {DOCS_SOURCE} states {stated}")
    return [
        replace(item, remote=replace(item.remote, digest=stated)) if item.name == DOCS else item
        for item in items
    ]


# ---- what is here


def flaw(item: Item, path: Path, verified: dict[str, str]) -> str | None:
    """Why the file at `path` is not `item`, if it is not. The digests of large files that were
    verified before are not computed again."""
    size, remote = path.stat().st_size, item.remote
    if remote.size is not None and size != remote.size:
        return f"{size:,} bytes instead of {remote.size:,}"
    if item.is_shard:
        try:
            token_count(path)
        except DataError as error:
            return str(error).removeprefix(f"{path}: ")
    known = verified.get(item.name) if item.is_shard or item.name == DOCS else None
    if remote.digest and remote.digest != known:
        with open(path, "rb") as file:
            if digest_of(file, size, remote.digest) != remote.digest:
                return "its contents are not those that the repository lists"
    return None


def missing_items(items: list[Item], verified: dict[str, str], jobs: int) -> list[Item]:
    """The items that are not here, after removing those that are here but are not whole. Raises
    DataError if one is a file of the user's own: prepare.py too writes below tokenizers/."""
    here = [item for item in items if item.path.is_file()]
    unknown = [item for item in here if item.is_shard and item.name not in verified]
    if len(unknown) > 1:
        print(f"checking {len(unknown)} files that are here already ...", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        flaws = list(pool.map(lambda item: flaw(item, item.path, verified), here))
    bad = {item.name: why for item, why in zip(here, flaws, strict=True) if why}
    for item in here:
        if item.name in bad and item.name not in verified and not item.is_shard:
            hint = "nor was it downloaded; move it away, or choose another --out"
            raise DataError(f"{item.path} is not the published file ({bad[item.name]}), {hint}")
    for item in here:
        if item.name in bad:
            print(f"{item.path}: {bad[item.name]}; fetching it again", file=sys.stderr)
            item.path.unlink()
        else:
            verified[item.name] = item.remote.digest or ""
    return [item for item in items if item not in here or item.name in bad]


def save_record(request: Request, catalog: Catalog, verified: dict[str, str]) -> None:
    """Write down where the dataset's files are from and which of them were verified."""
    starts = (f"datasets/{request.dataset}/", "tokenizers/", "docs_selected", "manifest.json")
    files = {name: file for name, file in catalog.files.items() if name.startswith(starts)}
    record = {**asdict(replace(catalog, files=files)), "verified": verified}
    with replacing(request.folder / RECORD) as file:
        file.write(json.dumps(record, indent=1).encode())


def load_record(folder: Path) -> tuple[Catalog | None, dict[str, str]]:
    """What `save_record` wrote; nothing if there is none or it is damaged."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        record = json.loads((folder / RECORD).read_bytes())
        verified = {str(name): str(digest) for name, digest in record.pop("verified").items()}
        files = {str(name): Remote(**file) for name, file in record.pop("files").items()}
        return Catalog(files=files, **record), verified
    return None, {}


def check_space(out: Path, missing: list[Item]) -> None:
    """Raise DataError unless what is still to come fits on the disk, with 5% to spare."""
    needed = sum(max(0, (item.remote.size or 0) - file_size(part_path(item))) for item in missing)
    needed += needed // 20
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(
            f"{out}: {gigabytes(needed)} are needed and {gigabytes(free)} are free; make room, "
            "take fewer --train-shards, or choose another --out"
        )


def gigabytes(size: int) -> str:
    """A number of bytes, to read."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size:,} bytes"


def file_size(path: Path) -> int:
    """The size of a file in bytes; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


# ---- fetching


@dataclass(frozen=True)
class Transfer:
    """What the threads of a download share."""

    catalog: Catalog
    bar: tqdm
    stop: threading.Event

    def count(self, size: int) -> None:
        """Move the progress bar by `size` bytes."""
        with self.bar.get_lock():
            self.bar.update(size)

    def discard(self, part: Path) -> None:
        """Delete what has arrived of a file."""
        self.count(-file_size(part))
        part.unlink(missing_ok=True)


def part_path(item: Item) -> Path:
    """Where a file lies while it is not whole. The name changes with the contents, so that a part
    of a file that has changed since is not continued."""
    key = (item.remote.digest or "").split(":")[-1][:16]
    return item.path.with_name(f".{item.path.name}.{key}.part")


def fetch(item: Item, transfer: Transfer) -> None:
    """Download a file, check it, and give it its name. Raises DataError if it is bad each time."""
    part = part_path(item)
    part.parent.mkdir(parents=True, exist_ok=True)
    for stale in set(part.parent.glob(f".{item.path.name}.*.part")) - {part}:
        stale.unlink()
    if not item.remote.digest:
        transfer.discard(part)  # nothing tells whether it is a part of the same contents
    for bodies_left in reversed(range(BODIES)):
        retry(partial(receive, item, part, transfer), partial(file_size, part), transfer.stop)
        problem = flaw(item, part, {})
        if problem is None:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, item.path)
            return
        transfer.discard(part)
        if bodies_left:
            transfer.bar.write(f"{item.name}: {problem}; fetching it again", sys.stderr)
    raise DataError(f"bad each of {BODIES} times, the last time: {problem}")


def receive(item: Item, part: Path, transfer: Transfer) -> None:
    """Append to `part` what is still to come, over one connection. Raises IncompleteError unless
    that was all, StoppedError, httpx2.RequestError, HfHubHTTPError, OSError."""
    size = item.remote.size
    if size is not None and file_size(part) > size:
        transfer.discard(part)
    with open(part, "ab") as file:
        start = file.tell()
        if start == size:
            return
        with opened(transfer.catalog, item.remote, start) as response:
            if response.status_code == 200 and start:  # the server knows no ranges
                file.seek(0)
                file.truncate()
                transfer.count(-start)
            elif start and not content_range(response).startswith(f"bytes {start}-"):
                transfer.discard(part)
                raise IncompleteError(
                    f"{item.name}: the server does not continue at byte {start:,}"
                )
            for chunk in response.iter_bytes():
                if transfer.stop.is_set():
                    raise StoppedError
                file.write(chunk)
                file.flush()
                transfer.count(len(chunk))
                if size is not None and file.tell() > size:
                    return
        if size is not None and file.tell() < size:
            raise IncompleteError(f"{item.name}: {file.tell():,} of {size:,} bytes arrived")


def content_range(response: httpx2.Response) -> str:
    """Which part of the file a response holds, if it says so."""
    return response.headers.get("Content-Range", "") if response.status_code == 206 else ""


def work(todo: SimpleQueue, done: SimpleQueue, transfer: Transfer) -> None:
    """Fetch the items of `todo`; to `done` goes each with its exception, or None."""
    with suppress(Empty):
        while not transfer.stop.is_set():
            item = todo.get_nowait()
            try:
                fetch(item, transfer)
            except Exception as error:
                done.put((item, error))
                if isinstance(error, OfflineError | OSError):  # no more can be fetched
                    transfer.stop.set()
            else:
                done.put((item, None))


def fetch_all(
    items: list[Item], catalog: Catalog, jobs: int, arrived: Callable[[Item], None]
) -> dict[str, str]:
    """Fetch items in `jobs` threads, calling `arrived` for each. Returns what is wrong with those
    that did not arrive. Raises DataError when no more can: offline, or an error of the disk."""
    todo, done = SimpleQueue(), SimpleQueue()
    for item in items:
        todo.put(item)
    failures: dict[str, str] = {}
    with progress_bar(items) as bar:
        transfer = Transfer(catalog, bar, threading.Event())
        for _ in range(min(jobs, len(items))):
            # A thread that waits for the network must not keep the program from ending.
            threading.Thread(target=work, args=(todo, done, transfer), daemon=True).start()
        try:
            for _ in items:
                item, error = done.get()
                try:
                    if error:
                        raise error
                    arrived(item)
                except (OfflineError, OSError) as problem:
                    cause = getattr(problem, "strerror", None) or problem
                    kept = "what has arrived is kept, and the same command goes on from there"
                    raise DataError(f"{item.path}: {cause}\n  {kept}") from None
                except DataError as problem:
                    failures[item.name] = str(problem)
        finally:
            transfer.stop.set()
    return failures


def progress_bar(items: Collection[Item]) -> tqdm:
    """A bar of all bytes of the items, beginning with those that are here as parts."""
    return tqdm(
        total=sum(item.remote.size or 0 for item in items),
        initial=sum(file_size(part_path(item)) for item in items),
        desc="downloading",
        unit="B",
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )


# ---- the commands


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other downloads out of the data folder. The system lifts the lock when the process ends,
    however it ends. Raises DataError."""
    lock = out / "datasets" / ".download.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise DataError(f"{out}: another download.py is writing there; wait for it") from None


def download(request: Request) -> int:
    """Have here what is asked for, and print how to train with it. Returns the exit code. Raises
    DataError, OSError."""
    if (request.folder / "manifest.json").exists():
        hint = "it was made by prepare.py; move it or choose another --out"
        raise DataError(f"{request.folder} is not a download: {hint}")
    known, verified = load_record(request.folder)
    if known and (known.repo_id, known.prefix) != (request.repo_id, request.prefix):
        known = None
    try:
        catalog = fetch_catalog(request.repo_id, request.prefix, known)
    except HubError as error:
        return without_hub(request, known, verified, error)
    variant = read_variant(catalog, request.variant)
    items, absent = plan(request, catalog, variant)
    items = with_docs_digest(items, catalog)
    missing = missing_items(items, verified, request.jobs)
    check_space(request.out, missing)
    save_record(request, catalog, verified)

    def arrived(item: Item) -> None:
        verified[item.name] = item.remote.digest or ""
        save_record(request, catalog, verified)

    failures = fetch_all(missing, catalog, request.jobs, arrived) if missing else {}
    failures |= dict.fromkeys(absent, f"not in the repository {catalog.repo_id}")
    if failures:
        lines = "".join(f"\n  {name}: {problem}" for name, problem in failures.items())
        raise DataError(f"{len(failures)} file(s) are missing, the others are here:{lines}")
    check_strangers(request, catalog, verified)
    print_outcome(request, variant, len(missing))
    return 0


def without_hub(
    request: Request, known: Catalog | None, verified: dict[str, str], error: HubError
) -> int:
    """Print how to train with what is here if all that is asked for is. Raises `error`, with the
    number of files that are missing, if not."""
    if not known:
        raise error
    variant = read_variant(known, request.variant)
    items, absent = plan(request, known, variant)
    flawed = [i for i in items if not i.path.is_file() or flaw(i, i.path, verified)]
    if flawed or absent:
        count = len(flawed) + len(absent)
        raise type(error)(f"{error}\n  {count} file(s) that were asked for are not here")
    check_strangers(request, known, verified)
    print(f"{error}\nall that was asked for is here and whole, as of the last download")
    print_outcome(request, variant, 0)
    return 0


def check_strangers(request: Request, catalog: Catalog, verified: dict[str, str]) -> None:
    """Raise DataError if the folder has shards that are not those of the repository: beyond the
    ones asked for, from an older commit or another source. train_gpt.py would read them."""
    strangers = []
    for path in sorted(request.folder.glob("fineweb_*.bin")):
        name = f"datasets/{request.dataset}/{path.name}"
        remote = catalog.files.get(name)
        if not remote or flaw(Item(name, path, remote), path, verified):
            strangers.append(f"\n  {path.name}")
    if strangers:
        hint = "delete them, or ask for more --train-shards to have them fetched again"
        listed = "".join(strangers)
        raise DataError(
            f"{request.folder}: these are not the files of {request.repo_id}; {hint}:{listed}"
        )


def print_outcome(request: Request, variant: Variant, fetched: int) -> None:
    """Say what is here, and how to train with it."""
    train, val = (shard_paths(request.folder, split) for split in ("train", "val"))
    tokens = sum(map(token_count, train))
    print(f"fetched {fetched} file(s); {request.folder} has", end=" ")
    print(f"{len(train)} train shard(s) of {tokens:,} tokens and {len(val)} val shard(s)")
    if len(train) == 1:
        print("warning: a model memorizes a single train shard: expect about +0.1 bpb")
    tokenizer = loadable(request.out / variant.tokenizer_paths[0])
    size = vocab_size(tokenizer)
    print(training_command(request.folder, tokenizer, size))


def loadable(tokenizer: Path) -> Path:
    """The tokenizer as train_gpt.py can load it: of the published byte-level description, a
    SentencePiece model beside it. Raises DataError if it describes another vocabulary."""
    if tokenizer.suffix != ".json":
        return tokenizer
    load_vocabulary(tokenizer)
    model = tokenizer.with_suffix(".model")
    with replacing(model) as file:
        file.write(byte_level_model())
    return model


def vocab_size(tokenizer: Path) -> int | None:
    """The number of ids of a SentencePiece model, if known."""
    with suppress(OSError, RuntimeError):
        return len(spm.SentencePieceProcessor(model_proto=tokenizer.read_bytes()))
    return None


def print_list(repo_ids: Sequence[str], prefix: str, out: Path) -> int:
    """Print the variants in repositories and the datasets that are here. Returns the exit code."""
    code = 0
    for repo_id in repo_ids:
        print(f"{repo_id}:")
        try:
            catalog = fetch_catalog(repo_id, prefix, None)
            for name in variants(catalog.manifest):
                print(f"  {name:<48} {offered(catalog, name)}")
        except DataError as error:
            print(f"download.py: error: {error}", file=sys.stderr)
            code = 1
    print(f"here, in {out / 'datasets'}:")
    for folder in sorted((out / "datasets").glob(f"{DATASET_PREFIX}*")):
        train, val = (len(shard_paths(folder, split)) for split in ("train", "val"))
        print(f"  {folder.name.removeprefix(DATASET_PREFIX):<48} {train} train, {val} val shards")
    return code


def offered(catalog: Catalog, name: str) -> str:
    """The numbers of shards of a variant, or what is wrong with its entry."""
    try:
        variant = read_variant(catalog, name)
    except DataError as error:
        return str(error)
    return f"{variant.train_shards} train, {variant.val_shards} val shards"


# ---- the command line


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            if low <= (value := int(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, {low} to {high}")

    return parse


def variant_name(text: str) -> str:
    """An argparse type: a name that is safe as that of a folder."""
    if not PLAIN_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a name such as sp1024")
    return text


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="download.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, count = top.add_argument, whole_number(0, 10**6)
    add("--variant", type=variant_name, default="sp1024", metavar="V", help="(%(default)s)")
    add("--train-shards", type=count, metavar="N", help=f"the first N ({TRAIN_SHARDS}, or all)")
    add("--repo-id", metavar="R", help="dataset repository (each variant knows its own)")
    add("--with-docs", action="store_true", help="the text too, docs_selected.jsonl")
    add("--list", action="store_true", help="print what there is and what is here, and end")
    add("--out", type=Path, default=DATA, metavar="DIR", help="data folder (%(default)s)")
    add("--jobs", type=whole_number(1, 64), default=8, metavar="N", help="at once (%(default)s)")
    return top


def run(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code. Raises DataError, OSError."""
    chosen = args.repo_id or os.environ.get("MATCHED_FINEWEB_REPO_ID")
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", DEFAULT_PREFIX).strip("/")
    out = args.out.resolve()
    if args.list:
        repo_ids = [chosen] if chosen else dict.fromkeys([DEFAULT_REPO, *OTHER_REPOS.values()])
        return print_list(list(repo_ids), prefix, out)
    variant = ALIASES.get(args.variant, args.variant)
    repo_id = chosen or OTHER_REPOS.get(variant, DEFAULT_REPO)
    request = Request(variant, args.train_shards, args.with_docs, repo_id, prefix, out, args.jobs)
    with locked(out):
        return download(request)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (DataError, OSError) as error:
        print(f"download.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the way out is not to be interrupted
        print("download.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    steady_console()
    sys.exit(main())
