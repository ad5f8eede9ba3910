"""The Hugging Face hub: what a repository lists, its manifest, and the bytes of its files."""

import hashlib
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, parse_ratelimit_headers
from shards import DataError

DATASET_PREFIX = "fineweb10B_"
RETRIES = 4  # in a row, of requests that brought nothing new
LONGEST_WAIT = 60  # seconds that a server may ask for
LARGEST_JSON = 2**26  # bytes
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
T = TypeVar("T")


class HubError(DataError):
    """The hub does not answer the question: a failure of the server, or OfflineError."""


class OfflineError(HubError):
    """The hub cannot be reached, or it refuses to serve for now: asking for more is of no use."""


class IncompleteError(Exception):
    """A response was less than what was asked for; asking again may bring the rest."""


class StoppedError(Exception):
    """The run is over; a thread has nothing left to do."""


@dataclass(frozen=True)
class Remote:
    """A file of a repository, as its listing describes it."""

    path: str  # in the repository
    size: int | None  # bytes
    digest: str | None  # sha256:<hex>, or git:<hex>, the object id that git gives a small file


@dataclass(frozen=True)
class Catalog:
    """What a repository offers at one commit."""

    repo_id: str
    prefix: str  # its folder that holds manifest.json; "" for the root
    revision: str
    files: dict[str, Remote]  # by path below the prefix
    manifest: Any


@dataclass(frozen=True)
class Variant:
    """What the manifest says of a dataset."""

    dataset: str
    train_shards: int
    val_shards: int
    tokenizer_paths: tuple[str, ...]  # below the prefix; the one to train with comes first


# ---- asking the hub


def retry(action: Callable[[], T], progress: Callable[[], int], stop: threading.Event) -> T:
    """The result of `action`, repeated after failures that may pass; those that follow progress do
    not count. Raises StoppedError, or a DataError that explains the last failure."""
    best, failures = progress(), 0
    while True:
        try:
            return action()
        except OfflineModeIsEnabled:
            raise OfflineError("HF_HUB_OFFLINE is set; unset it to download") from None
        except (httpx2.RequestError, httpx2.InvalidURL, HfHubHTTPError, IncompleteError) as error:
            if progress() > best:
                best, failures = progress(), 0
            wait = waiting_time(error, failures)
            failures += 1
            if wait is None or failures > RETRIES:
                raise explained(error) from None
        if stop.wait(wait):
            raise StoppedError


def waiting_time(error: Exception, failures: int) -> float | None:
    """Seconds to wait before asking again, or None if that is of no use."""
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.InvalidURL):
        return None
    seconds = 0.0 if isinstance(error, IncompleteError) else 2.0**failures / 2
    if isinstance(error, HfHubHTTPError):
        status, headers = error.response.status_code, error.response.headers
        if status not in (408, 429) and status < 500:
            return None
        limit = parse_ratelimit_headers(headers)
        if headers.get("Retry-After", "").isdecimal():
            seconds = float(headers["Retry-After"])
        elif status == 429 and limit and not limit.remaining:
            seconds = limit.reset_in_seconds + 1.0
    return seconds if seconds <= LONGEST_WAIT else None


def explained(error: Exception) -> DataError:
    """What a failed request means to a person."""
    if isinstance(error, IncompleteError):
        return DataError(str(error))
    if not isinstance(error, HfHubHTTPError):
        cause = f"{type(error).__name__}: {error}".rstrip(": ")
        if isinstance(error, httpx2.ReadError | httpx2.ReadTimeout | httpx2.RemoteProtocolError):
            return HubError(f"{constants.ENDPOINT} broke off an answer ({cause})")
        hint = "are you online, and are HF_ENDPOINT and the proxy settings right?"
        return OfflineError(f"cannot reach {constants.ENDPOINT} ({cause}): {hint}")
    status, url = error.response.status_code, error.response.url
    again = "; wait a while and run it again: it goes on from here"
    if status == 429:
        return OfflineError(
            f"{url.host}: too many requests (429){again}; with HF_TOKEN set, more pass"
        )
    if status >= 500 or status == 408:
        return HubError(f"{url.host}: server error {status} for {url.path}{again}")
    if status in (401, 403, 404):
        return DataError(
            f"{url.host} answers {status} for {url.path}: it is missing, private or gated; check "
            "--repo-id, and set HF_TOKEN to a token that may read it"
        )
    return DataError(f"{url.host} answers {status} for {url.path}")


def ask(repo_id: str) -> tuple[str, dict[str, Remote]]:
    """The commit that a dataset repository is at, and its files by path. Raises DataError, which is
    OfflineError at once if there is no connection: a person may be waiting to hear just that."""
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        info = HfApi().dataset_info(repo_id, files_metadata=True, timeout=timeout)
        files = [described(entry) for entry in info.siblings or []]
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise explained(error) from None
    except HFValidationError as error:
        raise DataError(f"{repo_id!r} is no name of a repository: {error}") from None
    except HfHubHTTPError:
        raise
    except UnicodeEncodeError as error:
        bad = error.object[error.start]
        raise DataError(f"HF_TOKEN, or the login, has {bad!a}: no token has that") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OfflineError(
            f"{constants.ENDPOINT} does not answer as the hub does: a proxy or login page between?"
        ) from None
    return info.sha or "main", {file.path: file for file in files}


def described(entry: Any) -> Remote:
    """A Remote of an entry of the hub's listing."""
    if entry.lfs:
        return Remote(entry.rfilename, entry.lfs.size, f"sha256:{entry.lfs.sha256}")
    return Remote(entry.rfilename, entry.size, entry.blob_id and f"git:{entry.blob_id}")


def fetch_catalog(repo_id: str, prefix: str, known: Catalog | None) -> Catalog:
    """What the repository offers now. The manifest is taken from `known` if it has not changed.
    Raises DataError."""
    stop = threading.Event()
    revision, listing = retry(lambda: ask(repo_id), lambda: 0, stop)
    root = f"{prefix}/" if prefix else ""
    files = {p.removeprefix(root): file for p, file in listing.items() if p.startswith(root)}
    remote = files.get("manifest.json")
    if not remote:
        hint = "set MATCHED_FINEWEB_REMOTE_ROOT_PREFIX to the folder that has it"
        raise DataError(f"{repo_id}: there is no {root}manifest.json; {hint}")
    catalog = Catalog(repo_id, prefix, revision, files, None)
    same = known and known.files.get("manifest.json") == remote and remote.digest
    manifest = known.manifest if same else fetch_json(catalog, remote)
    return replace(catalog, manifest=manifest)


def fetch_json(catalog: Catalog, remote: Remote) -> Any:
    """The contents of a small JSON file. Raises DataError."""

    def action() -> bytes:
        if (remote.size or 0) > LARGEST_JSON:
            raise DataError(f"{catalog.repo_id}: {remote.path}: {remote.size:,} bytes are too many")
        body = io.BytesIO()
        with opened(catalog, remote, 0) as response:
            for chunk in response.iter_bytes():
                body.write(chunk)
        if remote.digest and digest_of(body, body.tell(), remote.digest) != remote.digest:
            raise IncompleteError(f"what arrives as {remote.path} is not what the repository lists")
        return body.getvalue()

    body = retry(action, lambda: 0, threading.Event())
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{catalog.repo_id}: {remote.path} is not JSON: {error}") from None


@contextmanager
def opened(catalog: Catalog, remote: Remote, start: int) -> Iterator[httpx2.Response]:
    """The response to a request for a file from byte `start` on, its body not yet read."""
    url = hf_hub_url(catalog.repo_id, remote.path, repo_type="dataset", revision=catalog.revision)
    # A compressed body could neither be continued nor be counted.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        if not (start and response.status_code == 416):
            hf_raise_for_status(response)
        yield response


# ---- the manifest, which is not to be trusted


def field(entry: Any, name: str, kind: type[T], where: str) -> T:
    """entry[name], which must be of the type `kind`. Raises DataError."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}[kind]
        raise DataError(f"the manifest is malformed: {where}: {name!r} should be {expected}")
    return value


def named(manifest: Any, kind: str, name: str) -> Any:
    """The entry of that name in a list of the manifest, or None. Raises DataError."""
    entries = field(manifest, kind, list, "at its top")
    return next((e for e in entries if isinstance(e, dict) and e.get("name") == name), None)


def shard_count(stats: Any, name: str, lowest: int, where: str) -> int:
    """A number of shards. Raises DataError."""
    count = field(stats, name, int, where)
    if not lowest <= count <= 10**6:
        raise DataError(f"the manifest is malformed: {where}: {name} is {count}")
    return count


def tokenizer_paths(manifest: Any, name: str) -> tuple[str, ...]:
    """The files of a tokenizer, all of them below tokenizers/. Raises DataError."""
    where = f"tokenizer {name!r}"
    entry = named(manifest, "tokenizers", name)
    if entry is None:
        raise DataError(f"the manifest is malformed: {where} is missing from 'tokenizers'")
    keys = [key for key in ("model_path", "path", "vocab_path") if entry.get(key) is not None]
    paths = [field(entry, key, str, where) for key in keys]
    if not paths:
        raise DataError(f"the manifest is malformed: {where} has no model_path, path or vocab_path")
    for path in paths:
        first, *rest = path.split("/")
        if first != "tokenizers" or not rest or not all(map(PLAIN_NAME.fullmatch, rest)):
            raise DataError(f"the manifest is refused: {where}: {path!r} is not below tokenizers/")
    return tuple(dict.fromkeys(paths))


def variants(manifest: Any) -> list[str]:
    """The variants in a manifest. Raises DataError."""
    entries = field(manifest, "datasets", list, "at its top")
    names = [entry.get("name") for entry in entries if isinstance(entry, dict)]
    plain = [name for name in names if isinstance(name, str) and PLAIN_NAME.fullmatch(name)]
    starts = [name for name in plain if name.startswith(DATASET_PREFIX)]
    return [name.removeprefix(DATASET_PREFIX) for name in starts]


def read_variant(catalog: Catalog, variant: str) -> Variant:
    """What the manifest says of a variant. Raises DataError."""
    dataset = DATASET_PREFIX + variant
    entry = named(catalog.manifest, "datasets", dataset)
    if entry is None:
        there = ", ".join(variants(catalog.manifest)) or "none"
        hint = "elsewhere? --list, --repo-id"
        raise DataError(f"{catalog.repo_id} has no variant {variant!r}; it has: {there} ({hint})")
    where = f"dataset {dataset!r}"
    stats = field(entry, "stats", dict, where)
    train = shard_count(stats, "files_train", 0, where)
    val = shard_count(stats, "files_val", 1, where)
    tokenizer = field(entry, "tokenizer_name", str, where)
    return Variant(dataset, train, val, tokenizer_paths(catalog.manifest, tokenizer))


def digest_of(file: BinaryIO, size: int, like: str) -> str:
    """The digest of a file of `size` bytes, of the kind of `like`: "sha256:..." or "git:..."."""
    kind = like.split(":")[0]
    file.seek(0)
    start = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size)
    return f"{kind}:{hashlib.file_digest(file, start.copy).hexdigest()}"
