"""A small Hugging Face hub on loopback: what the downloader asks of it, and ways to fail."""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

API = "api"  # names the listing in `Hub.faults` and `Hub.log`


@dataclass
class Fault:
    """How the next `times` answers about a file differ from what they should be."""

    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # instead of the file
    break_after: int | None = None  # bytes of the body; then the connection is closed
    no_ranges: bool = False
    barrier: threading.Barrier | None = None  # to pass before the body is sent


@dataclass(frozen=True)
class Served:
    """A request for a file's contents, and how many bytes of them were sent."""

    name: str
    start: int | None  # of the range asked for
    size: int


class Hub:
    """The server. `repos` maps the names of dataset repositories to their files by path."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.listed: dict[str, dict[str, object]] = {}  # by path: what the listing says instead
        self.faults: dict[str, list[Fault]] = {}
        self.log: list[Served] = []
        self.token: str | None = None  # that a request needs
        self.delay = 0.0  # seconds between pieces of 4 KiB
        self.on_piece = lambda sent: None  # called with the bytes sent of all bodies
        self.sent = 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Stop serving: from now on connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def bodies(self, name: str = "") -> list[Served]:
        """The requests for contents of the files whose path ends with `name`."""
        return [served for served in self.log if served.name.endswith(name)]

    def forget(self) -> None:
        """Clear the log."""
        self.log.clear()
        self.sent = 0

    def fault(self, name: str) -> Fault:
        """The fault that is due for a file, whose path ends with a key of `faults`."""
        with self.lock:
            for key, due in self.faults.items():
                while due and not due[0].times:
                    due.pop(0)
                if due and name.endswith(key):
                    due[0].times -= 1
                    return due[0]
        return Fault()

    def revision(self, repo: str) -> str:
        """The commit that a repository is at: it follows from the contents."""
        state = sorted(
            (path, hashlib.sha256(b).hexdigest()) for path, b in self.repos[repo].items()
        )
        return hashlib.sha1(repr((repo, state)).encode()).hexdigest()

    def info(self, repo: str) -> dict[str, object]:
        """The answer about a repository, with the metadata of its files."""
        siblings = [
            described(path, body) | self.listed.get(path, {})
            for path, body in self.repos[repo].items()
        ]
        return {"id": repo, "sha": self.revision(repo), "siblings": siblings}


def described(path: str, body: bytes) -> dict[str, object]:
    """An entry of the listing. Large files are in LFS, with a digest; small ones are in git."""
    pointer = b"version https://git-lfs.github.com/spec/v1\n" if is_lfs(path) else body
    git = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    entry: dict[str, object] = {"rfilename": path, "size": len(body), "blobId": git}
    if is_lfs(path):
        sha256 = hashlib.sha256(body).hexdigest()
        entry["lfs"] = {"sha256": sha256, "size": len(body), "pointerSize": len(pointer)}
    return entry


def is_lfs(path: str) -> bool:
    """Whether the hub keeps a file outside of git."""
    return path.endswith((".bin", ".model", ".jsonl"))


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer about a repository, redirect to a file in LFS, or send contents."""
        hub: Hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, {"X-Error-Message": "Invalid username or password."})
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)", path):
            return self.answer_info(match[1])
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            return self.answer_file(*match.groups(), redirect=True)
        if match := re.fullmatch(r"/lfs/([^/]+/[^/]+)/(\w+)/(.+)", path):
            return self.answer_file(*match.groups(), redirect=False)
        return self.answer(404)

    def answer_info(self, repo: str) -> None:
        """The listing of a repository."""
        hub: Hub = self.server.hub
        fault = hub.fault(API)
        if fault.status or fault.body is not None:
            return self.answer(fault.status or 200, fault.headers, fault.body or b"")
        if repo not in hub.repos:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        return self.answer(200, {"Content-Type": "application/json"}, dumped(hub.info(repo)))

    def answer_file(self, repo: str, revision: str, path: str, redirect: bool) -> None:
        """A file's contents, or the way to them."""
        hub: Hub = self.server.hub
        if path not in hub.repos.get(repo, {}) or revision != hub.revision(repo):
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        if redirect and is_lfs(path):
            return self.answer(302, {"Location": f"/lfs/{repo}/{revision}/{path}"})
        fault = hub.fault(path)
        if fault.barrier:
            fault.barrier.wait(10)
        if fault.status:
            return self.answer(fault.status, fault.headers)
        body = hub.repos[repo][path] if fault.body is None else fault.body
        return self.send(path, body, fault)

    def send(self, path: str, body: bytes, fault: Fault) -> None:
        """The contents, or the range of them that is asked for."""
        hub: Hub = self.server.hub
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else None
        headers, status, part = {"ETag": '"x"'}, 200, body
        if start is not None and not fault.no_ranges:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            status, part = (206, body[start:]) if start < len(body) else (416, b"")
        self.send_head(status, headers | fault.headers, len(part))
        sent = 0
        try:
            for begin in range(0, len(part), 4096):
                piece = part[begin : min(begin + 4096, fault.break_after or len(part))]
                self.wfile.write(piece)
                sent += len(piece)
                with hub.lock:
                    hub.sent += len(piece)
                hub.on_piece(hub.sent)
                time.sleep(hub.delay)
                if sent == fault.break_after:
                    self.close_connection = True
                    break
        except OSError:
            self.close_connection = True
        hub.log.append(Served(path, start, sent))

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        """A response that is no file."""
        self.send_head(status, headers or {}, len(body))
        self.wfile.write(body)

    def send_head(self, status: int, headers: dict[str, str], size: int) -> None:
        """The start of a response."""
        self.send_response(status)
        for name, value in {"Content-Length": str(size), **headers}.items():
            self.send_header(name, value)
        self.end_headers()


def dumped(value: object) -> bytes:
    """JSON."""
    return json.dumps(value).encode()
