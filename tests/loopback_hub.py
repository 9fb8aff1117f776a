"""A Hugging Face Hub on this machine, for tests: the routes that uploads and downloads use.

Standard library (and PyYAML, to check model cards); state in memory, large files in a folder. It
speaks to the real `huggingface_hub`, to `hf_xet` (whose own `local://` store stands for the Hub's
chunk store) and to any client that reads files over HTTP:

    with LoopbackHub(tmp_path, xet=False) as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        hub.fail("POST", "/commit/", status=503, retry_after=2)   # the next one only
        …
        assert [request.path for request in hub.log] == […]

`hub.put("alice/m", {"a.safetensors": path_or_bytes})` fills a repository without a client.
As on the Hub, large files lie on another origin: uploads go to addresses that the API hands out,
without a token, and `resolve` answers with a redirect.
Sources: huggingface_hub 2.4.0 and @huggingface/hub 2.17.5 (both recorded and read); git-lfs,
docs/api/batch.md; xet-core, `mdb_shard` (the layout of shards).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "loopback" * 4
_LFS_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".zip", ".gguf")
_LFS_JSON = "application/vnd.git-lfs+json"
_DATE = "2026-01-01T00:00:00.000Z"
_CHUNK = 1 << 16
_LICENSES = {
    "apache-2.0", "mit", "creativeml-openrail-m", "openrail++", "openrail", "cc-by-4.0",
    "cc-by-nc-4.0", "cc0-1.0", "deepfloyd-if-license", "other", "unknown",
}  # fmt: skip
_RELATIONS = {"adapter", "merge", "quantized", "finetune"}


@dataclass(frozen=True)
class Entry:
    """One file of a commit: its bytes, or (large) where they lie."""

    nbytes: int
    oid: str
    data: bytes | None = None
    sha256: str = ""


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    oid: str
    parent: str
    title: str
    message: str
    files: Mapping[str, Entry]


@dataclass
class Repo:
    """A model repository: commits, and the refs that point at them."""

    name: str
    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> Commit | None:
        """The commit that a branch, tag, pull request or (full) commit id names."""
        revision = "main" if revision == "HEAD" else revision
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        pull = re.fullmatch(r"refs/pr/(\d+)", revision)
        oid = self.pulls.get(int(pull[1])) if pull else None
        oid = oid or self.branches.get(name) or self.tags.get(name) or revision
        return self.commits.get(oid)

    def add(self, files: Mapping[str, Entry], *, parent: str, title: str, message: str) -> Commit:
        """A commit on top of `parent`; moves no ref."""
        text = f"{self.name}\0{parent}\0{title}\0{message}\0{sorted(files.items())}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        commit = Commit(oid, parent, title, message, dict(sorted(files.items())))
        self.commits[oid] = commit
        return commit


@dataclass
class Fault:
    """What goes wrong, and how often.

    status       answered instead of doing it; 0 does it
    retry_after  seconds, as a header of that answer
    cut_after    bytes of the body after which the connection is closed: of the request's for PUT
                 and POST, of the answer's otherwise
    lose_reply   it is done, and the connection is closed instead of answered
    ignore_range the whole file with 200 is answered to a request for a part
    without      headers that the answer lacks
    before       called first; it may change the hub
    skip         so many requests are served well first
    """

    method: str
    path: re.Pattern[str]
    status: int = 0
    message: str = "something went wrong"
    retry_after: int | None = None
    cut_after: int | None = None
    lose_reply: bool = False
    ignore_range: bool = False
    without: tuple[str, ...] = ()
    before: Callable[[], None] | None = None
    skip: int = 0
    times: int = 1


@dataclass(frozen=True)
class Request:
    """One line of the log.

    nbytes  of the request's body, as far as it came
    token   what stood in `Authorization: Bearer …`
    storage whether it went to the storage's origin, not to the API's
    """

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    nbytes: int
    token: str
    storage: bool


class LoopbackHub:
    """A Hub in a folder, served from two ports of 127.0.0.1 until it is closed.

    xet           whether it has the Xet routes
    part_bytes    files above it are uploaded in parts of this size (0: never)
    lfs_bytes     files from this size on are large, whatever their name
    role          what the token may do: "write" or "read"
    """

    def __init__(
        self,
        folder: Path,
        *,
        user: str = "alice",
        token: str = TOKEN,
        role: str = "write",
        xet: bool = False,
        part_bytes: int = 0,
        lfs_bytes: int = 10_000_000,
    ) -> None:
        self.folder, self.user, self.token, self.role = folder, user, token, role
        self.xet, self.part_bytes, self.lfs_bytes = xet, part_bytes, lfs_bytes
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()  # one change at a time
        self.log_lock = threading.Lock()  # short: a change may ask the hub itself, see `find`
        self.errors: list[str] = []
        self.xet_hashes: dict[str, str] = {}
        (folder / "lfs").mkdir(parents=True, exist_ok=True)
        (folder / "cas").mkdir(parents=True, exist_ok=True)
        self._servers = [_Server(self, storage=False), _Server(self, storage=True)]

    def __enter__(self) -> LoopbackHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        assert not self.errors, "\n".join(self.errors)

    @property
    def url(self) -> str:
        """The endpoint: what `HF_ENDPOINT` should be."""
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage_url(self) -> str:
        """The origin that large files are sent to and come from."""
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    # --- what tests do with it -----------------------------------------------------------------

    def create(self, name: str, *, private: bool = True) -> Repo:
        """A repository with its first commit on `main`."""
        repo = self.repos[name] = Repo(name, private)
        first = repo.add(
            {".gitattributes": _regular(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")},
            parent="", title="initial commit", message="",
        )  # fmt: skip
        repo.branches["main"] = first.oid
        return repo

    def put(
        self, name: str, files: Mapping[str, Path | bytes], *, revision: str = "main",
        private: bool = True,
    ) -> Commit:  # fmt: skip
        """Commit files without a client; makes the repository where there is none."""
        with self.lock:
            repo = self.repos.get(name) or self.create(name, private=private)
            head = repo.commits[repo.branches[revision]]
            entries = dict(head.files)
            for path, content in files.items():
                data = content.read_bytes() if isinstance(content, Path) else content
                entries[path] = self.stored(data) if self.is_large(path, data) else _regular(data)
            commit = repo.add(entries, parent=head.oid, title="put", message="")
            repo.branches[revision] = commit.oid
            return commit

    def put_sparse(self, name: str, path: str, file: Path) -> Commit:
        """Commit a file too large to hash or to copy, under a made-up sha256."""
        oid = hashlib.sha256(path.encode()).hexdigest()
        self.object_path(oid).symlink_to(file)
        commit = self.put(name, {}, private=False)
        entries = dict(commit.files) | {path: _pointer(oid, file.stat().st_size)}
        repo = self.repos[name]
        commit = repo.add(entries, parent=commit.oid, title="put", message="")
        repo.branches["main"] = commit.oid
        return commit

    def content(self, name: str, path: str, revision: str = "main") -> bytes:
        """The bytes of a file."""
        commit = self.repos[name].commit_of(revision)
        assert commit is not None, revision
        return self.bytes_of(commit.files[path])

    def files(self, name: str, revision: str = "main") -> set[str]:
        """The paths of a revision, without the Hub's own `.gitattributes`."""
        commit = self.repos[name].commit_of(revision)
        assert commit is not None, revision
        return set(commit.files) - {".gitattributes"}

    def fail(self, method: str, path: str, **what: Any) -> Fault:
        """Let the next request whose path holds the regular expression `path` go wrong."""
        fault = Fault(method, re.compile(path), **what)
        self.faults.append(fault)
        return fault

    def requests(self, method: str, path: str = "") -> list[Request]:
        """The logged requests of a method whose path holds the regular expression `path`."""
        return [r for r in self.log if r.method == method and re.search(path, r.path)]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the bodies of all requests to the storage."""
        return sum(request.nbytes for request in self.log if request.storage)

    # --- storage -------------------------------------------------------------------------------

    def is_large(self, path: str, sample: bytes, nbytes: int | None = None) -> bool:
        """Whether a file is kept outside git: by its name, its size, or because it is binary."""
        size = len(sample) if nbytes is None else nbytes
        return size > 0 and (
            path.endswith(_LFS_SUFFIXES) or size >= self.lfs_bytes or b"\0" in sample[:512]
        )

    def object_path(self, sha256: str) -> Path:
        """Where a large file lies."""
        return self.folder / "lfs" / sha256

    def stored(self, data: bytes) -> Entry:
        """Keep a large file."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.object_path(sha256).write_bytes(data)
        return _pointer(sha256, len(data))

    def bytes_of(self, entry: Entry) -> bytes:
        """The content of a file."""
        return self.object_path(entry.sha256).read_bytes() if entry.data is None else entry.data

    def find(self, sha256: str, nbytes: int) -> bool:
        """Whether a large file has been uploaded, over LFS or Xet; takes it out of Xet's store."""
        path = self.object_path(sha256)
        if not path.exists() and (xet_hash := dict(self._in_xet()).get(sha256)):
            self.xet_hashes[sha256] = xet_hash
            self._fetch(xet_hash, nbytes, path)
        return path.exists() and path.stat().st_size == nbytes

    def _in_xet(self) -> Iterator[tuple[str, str]]:
        """(sha256, Xet's hash) of the files in Xet's store, read off its shards.

        A shard: 48 bytes of header, then per file a 48-byte head (hash, flags, count) with so many
        48-byte segments, as many of verification (flag 31) and one with the sha256 (flag 30); a
        hash of ones ends the list. Hashes are written as four little-endian words.
        """
        for shard in sorted((self.folder / "cas").rglob("shards/*.mdb")):
            data, at = shard.read_bytes(), 48
            while data[at : at + 32] != b"\xff" * 32:
                xet_hash = _words(data[at : at + 32])
                flags, count = struct.unpack_from("<II", data, at + 32)
                at += 48 + 48 * count * (2 if flags >> 31 & 1 else 1)
                if flags >> 30 & 1:
                    yield _words(data[at : at + 32]), xet_hash
                    at += 48

    def _fetch(self, xet_hash: str, nbytes: int, path: Path) -> None:
        """Put a file together from Xet's chunks, as its own client does."""
        import hf_xet

        refresh = f"{self.url}/api/models/-/xet-read-token/main"
        headers = {"authorization": f"Bearer {self.token}"}
        part = path.with_suffix(".part")
        with hf_xet.XetSession().new_file_download_group(
            token_refresh_url=refresh, token_refresh_headers=headers, custom_headers={}
        ) as group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, nbytes), str(part))
        assert hashlib.sha256(part.read_bytes()).hexdigest() == path.name
        part.rename(path)


def _regular(data: bytes) -> Entry:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return Entry(len(data), oid, data)


def _pointer(sha256: str, nbytes: int) -> Entry:
    oid = hashlib.sha1(_pointer_text(sha256, nbytes)).hexdigest()
    return Entry(nbytes, oid, None, sha256)


def _pointer_text(sha256: str, nbytes: int) -> bytes:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {nbytes}\n"
    return text.encode()


def _words(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: LoopbackHub, *, storage: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.storage = hub, storage

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError):  # clients that hang up are part of the tests
            self.hub.errors.append("".join(traceback.format_exception(error)))


class _Reply(Exception):  # noqa: N818  # it is an answer
    """Ends a request with an answer."""

    def __init__(
        self, status: int, body: object = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        self.status, self.headers = status, dict(headers or {})
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers.setdefault("Content-Type", "application/json; charset=utf-8")


def _error(status: int, message: str, code: str = "") -> _Reply:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return _Reply(status, {"error": message}, headers)


_ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REV = r"(?P<rev>refs%2Fpr%2F\d+|refs/pr/\d+|[^/]+)"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    @property
    def hub(self) -> LoopbackHub:
        return self.server.hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  # http.server's names

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        fault = self._fault(parts.path)
        if fault is not None and fault.before is not None:
            fault.before()
        limit = fault.cut_after if fault and self.command in ("PUT", "POST") else None
        body = self._body(limit)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        with self.hub.log_lock:
            self.hub.log.append(
                Request(self.command, parts.path, self.query, dict(self.headers), len(body),
                        bearer, self.server.storage)
            )  # fmt: skip
        if limit is not None:
            self._hang_up()
            return
        try:
            if fault is not None and fault.status:
                reply = _error(fault.status, fault.message)
                if fault.retry_after is not None:
                    reply.headers["Retry-After"] = str(fault.retry_after)
                raise reply
            if fault is not None and fault.ignore_range:
                del self.headers["Range"]
            self.body, self.bearer = body, bearer
            self._route(parts.path)
        except _Reply as reply:
            if fault is not None and fault.lose_reply:
                self._hang_up()
                return
            for name in fault.without if fault else ():
                reply.headers.pop(name, None)
            self._answer(reply, fault.cut_after if fault else None)

    def _fault(self, path: str) -> Fault | None:
        with self.hub.log_lock:
            for fault in self.hub.faults:
                if fault.method != self.command or not fault.path.search(path) or not fault.times:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    return None
                fault.times -= 1
                return fault
        return None

    def _body(self, limit: int | None) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(self._chunks())
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length if limit is None else min(length, limit))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _answer(self, reply: _Reply, cut_after: int | None) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[:cut_after])
        if cut_after is not None:
            self.wfile.flush()
            self._hang_up()

    # --- routes --------------------------------------------------------------------------------

    def _route(self, path: str) -> None:
        routes = _STORAGE_ROUTES if self.server.storage else _ROUTES
        for method, pattern, action in routes:
            found = re.fullmatch(pattern, path)
            if found and method == ("GET" if self.command == "HEAD" else self.command):
                words = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                with nullcontext() if method == "GET" else self.hub.lock:
                    getattr(self, action)(**words)
                raise AssertionError("a route answers")
        raise _error(404, f"no such route: {self.command} {path}")

    def _json(self) -> Any:
        return json.loads(self.body)

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        """The repository, if the request may see (or change) it."""
        allowed = self.bearer == self.hub.token
        repo = self.hub.repos.get(name)
        if self.bearer and not allowed:
            raise _error(401, "Invalid credentials in Authorization header")
        if repo is None or (repo.private and not allowed):
            raise _error(404 if allowed else 401, "Repository not found", "RepoNotFound")
        if repo.gated and not allowed:
            raise _error(401, f"Access to model {name} is restricted", "GatedRepo")
        if write and not allowed:
            raise _error(401, "Invalid username or password.")
        if write and self.hub.role != "write":
            raise _error(403, "You need write permission: use a token with the 'write' role")
        return repo

    def _commit(self, repo: Repo, rev: str) -> Commit:
        commit = repo.commit_of(rev)
        if commit is None:
            raise _error(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return commit

    def whoami(self) -> None:
        if self.bearer != self.hub.token:
            raise _error(401, "Invalid credentials in Authorization header")
        token = {"displayName": "test", "role": self.hub.role}
        raise _Reply(200, {
            "type": "user", "id": "0" * 24, "name": self.hub.user, "fullname": "Alice", "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        })  # fmt: skip

    def create(self) -> None:
        if self.bearer != self.hub.token:
            raise _error(401, "Invalid username or password.")
        if self.hub.role != "write":
            raise _error(403, "You don't have the rights to create a model under this namespace")
        wanted = self._json()
        owner = wanted.get("organization") or self.hub.user
        if owner != self.hub.user:
            raise _error(403, f"You don't have the rights to create a model under {owner!r}")
        name = f"{owner}/{wanted['name']}"
        if name in self.hub.repos:
            body = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            raise _Reply(409, body, {"X-Error-Message": body["error"]})
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        self.hub.create(name, private=bool(private))
        raise _Reply(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": "0" * 24})

    def info(self, repo: str, rev: str = "main") -> None:
        found = self._repo(repo)
        commit = self._commit(found, rev)
        blobs = "blobs" in self.query
        siblings = [
            {"rfilename": path} | (_file_json(path, entry, self.hub) if blobs else {})
            for path, entry in commit.files.items()
        ]
        card = _card_data(commit)
        raise _Reply(200, {
            "_id": "0" * 24, "id": repo, "modelId": repo, "author": repo.split("/", maxsplit=1)[0],
            "sha": commit.oid, "private": found.private, "gated": found.gated, "disabled": False,
            "downloads": 0, "likes": 0, "tags": [], "siblings": siblings, "cardData": card,
            "lastModified": _DATE, "createdAt": _DATE,
        })  # fmt: skip

    def auth_check(self, repo: str) -> None:
        self._repo(repo)
        raise _Reply(200, {})

    def paths_info(self, repo: str, rev: str) -> None:
        commit = self._commit(self._repo(repo), rev)
        if "json" in self.headers.get("Content-Type", ""):
            wanted = self._json()["paths"]
        else:
            wanted = parse_qs(self.body.decode())["paths"]
        found = [(path, commit.files[path]) for path in wanted if path in commit.files]
        raise _Reply(200, [_file_json(path, entry, self.hub) for path, entry in found])

    def tree(self, repo: str, rev: str, folder: str = "") -> None:
        commit = self._commit(self._repo(repo), rev)
        prefix = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        rows: dict[str, object] = {}
        for path, entry in commit.files.items():
            if not path.startswith(prefix):
                continue
            first, deeper, _ = path[len(prefix) :].partition("/")
            if deeper:
                row = {"type": "directory", "oid": "0" * 40, "size": 0, "path": prefix + first}
                rows.setdefault(prefix + first, row)
            if recursive or not deeper:
                rows[path] = _file_json(path, entry, self.hub)
        if prefix and not rows:
            raise _error(404, f"{folder} does not exist on {rev!r}", "EntryNotFound")
        raise _Reply(200, list(rows.values()))

    def validate_yaml(self) -> None:
        content = self._json()["content"]
        errors = _card_errors(content)
        body = {"errors": [{"message": text} for text in errors], "warnings": []}
        raise _Reply(400 if errors else 200, body)

    def preupload(self, repo: str, rev: str) -> None:
        found = self._repo(repo, write=True)
        commit = self._commit(found, rev)
        files = []
        for file in self._json()["files"]:
            sample = base64.b64decode(file["sample"])
            large = self.hub.is_large(file["path"], sample, file["size"])
            row = {
                "path": file["path"], "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
            }  # fmt: skip
            there = commit.files.get(file["path"])
            if there is not None:
                row["oid"] = there.sha256 or there.oid
            files.append(row)
        raise _Reply(200, {"files": files, "commitOid": commit.oid})

    def xet_token(self, repo: str, rev: str, kind: str) -> None:
        if not self.hub.xet:
            raise _error(404, "no Xet here")
        self._repo(repo, write=kind == "write")
        self._xet_token()

    def own_xet_token(self) -> None:
        """For `LoopbackHub.find`, which is a client of Xet itself."""
        self._xet_token()

    def _xet_token(self) -> None:
        store = f"local://{self.hub.folder / 'cas'}"
        expires = int(time.time()) + 3600
        raise _Reply(
            200,
            {"accessToken": "xet", "exp": expires, "casUrl": store},
            {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "xet",
             "X-Xet-Token-Expiration": str(expires)},
        )  # fmt: skip

    def lfs_batch(self, repo: str) -> None:
        self._repo(repo, write=True)
        wanted = self._json()
        rows = [self._lfs_row(item["oid"], item["size"]) for item in wanted["objects"]]
        parts = any("chunk_size" in row.get("actions", {}).get("upload", {}).get("header", {})
                    for row in rows)  # fmt: skip
        body = {"transfer": "multipart" if parts else "basic", "objects": rows}
        raise _Reply(200, body, {"Content-Type": _LFS_JSON})

    def _lfs_row(self, sha256: str, nbytes: int) -> dict[str, Any]:
        row: dict[str, Any] = {"oid": sha256, "size": nbytes, "authenticated": True}
        if self.hub.find(sha256, nbytes):
            return row
        storage, size = self.hub.storage_url, self.hub.part_bytes
        upload: dict[str, Any] = {"href": f"{storage}/lfs/{sha256}"}
        if size and nbytes > size:
            upload["href"] = f"{self.hub.url}/api/complete_multipart?oid={sha256}"
            count = -(-nbytes // size)
            urls = {str(n): f"{storage}/lfs/{sha256}/{n}" for n in range(1, count + 1)}
            upload["header"] = {"chunk_size": str(size), **urls}
        verify = {"href": f"{self.hub.url}/api/lfs-verify", "header": {}}
        return row | {"actions": {"upload": upload, "verify": verify}}

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _error(400, "the content does not have this sha256")
        self.hub.object_path(oid).write_bytes(self.body)
        raise _Reply(200)

    def lfs_put_part(self, oid: str, part: str) -> None:
        self.hub.object_path(f"{oid}.{part}").write_bytes(self.body)
        raise _Reply(200, headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_complete(self) -> None:
        wanted = self._json()
        oid = wanted["oid"]
        paths = [self.hub.object_path(f"{oid}.{part['partNumber']}") for part in wanted["parts"]]
        etags = [f'"{hashlib.md5(path.read_bytes()).hexdigest()}"' for path in paths]
        data = b"".join(path.read_bytes() for path in paths)
        whole = hashlib.sha256(data).hexdigest() == oid
        if not whole or etags != [part["etag"] for part in wanted["parts"]]:
            raise _error(400, "the parts do not make up the object")
        self.hub.object_path(oid).write_bytes(data)
        raise _Reply(200, {"success": True})

    def lfs_verify(self) -> None:
        wanted = self._json()
        if not self.hub.find(wanted["oid"], wanted["size"]):
            raise _error(404, "no such object")
        raise _Reply(200, {})

    def commit(self, repo: str, rev: str) -> None:
        found = self._repo(repo, write=True)
        head = self._commit(found, rev)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        as_pull = self.query.get("create_pr", ["0"])[0] in ("1", "true")
        parent = header.get("parentCommit")
        if parent and as_pull:
            head = self._commit(found, parent)
        elif parent and not head.oid.startswith(parent):
            raise _error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines:
            self._apply(files, line["key"], line["value"])
        made = found.add(
            files, parent=head.oid, title=header["summary"], message=header.get("description", "")
        )
        body: dict[str, object] = {
            "success": True, "commitOid": made.oid, "hookOutput": "",
            "commitUrl": f"{self.hub.url}/{repo}/commit/{made.oid}",
        }  # fmt: skip
        if as_pull:
            number = len(found.pulls) + 1
            found.pulls[number] = made.oid
            body["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        elif pull := re.fullmatch(r"refs/pr/(\d+)", rev):
            found.pulls[int(pull[1])] = made.oid
        else:
            found.branches[rev] = made.oid
        raise _Reply(200, body)

    def _apply(self, files: dict[str, Entry], key: str, value: Mapping[str, Any]) -> None:
        path = value.get("path", "")
        if key == "file":
            files[path] = _regular(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not self.hub.find(value["oid"], value["size"]):
                raise _error(400, "LFS pointer pointed to a file that does not exist")
            files[path] = _pointer(value["oid"], value["size"])
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise _error(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[name]

    def tag(self, repo: str, rev: str) -> None:
        found = self._repo(repo, write=True)
        wanted = self._json()
        commit = self._commit(found, rev)
        if wanted["tag"] in found.tags:
            raise _error(409, "Tag reference exists already")
        found.tags[wanted["tag"]] = commit.oid
        raise _Reply(200)

    def untag(self, repo: str, rev: str) -> None:
        if self._repo(repo, write=True).tags.pop(rev, None) is None:
            raise _error(404, "no such tag", "RevisionNotFound")
        raise _Reply(200)

    def branch(self, repo: str, rev: str) -> None:
        found = self._repo(repo, write=True)
        if rev in found.branches:
            raise _error(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found.branches[rev] = self._commit(found, start).oid
        raise _Reply(200)

    def unbranch(self, repo: str, rev: str) -> None:
        if self._repo(repo, write=True).branches.pop(rev, None) is None:
            raise _error(404, "no such branch", "RevisionNotFound")
        raise _Reply(200)

    def refs(self, repo: str) -> None:
        found = self._repo(repo)

        def rows(prefix: str, refs: Mapping[Any, str]) -> list[dict[str, str]]:
            return [
                {"name": str(name), "ref": f"refs/{prefix}/{name}", "targetCommit": oid}
                for name, oid in refs.items()
            ]

        raise _Reply(200, {
            "branches": rows("heads", found.branches), "converts": [],
            "tags": rows("tags", found.tags), "pullRequests": rows("pr", found.pulls),
        })  # fmt: skip

    def commits(self, repo: str, rev: str) -> None:
        found = self._repo(repo)
        rows, commit = [], self._commit(found, rev)
        while True:
            rows.append({
                "id": commit.oid, "title": commit.title, "message": commit.message,
                "authors": [{"user": self.hub.user}], "date": _DATE,
            })  # fmt: skip
            if not commit.parent:
                raise _Reply(200, rows)
            commit = found.commits[commit.parent]

    def discuss(self, repo: str) -> None:
        found = self._repo(repo)
        if self.bearer != self.hub.token:
            raise _error(401, "Invalid username or password.")
        number = len(found.pulls) + 1
        if self._json().get("pullRequest"):
            found.pulls[number] = found.branches["main"]
        raise _Reply(200, {"num": number, "url": f"{self.hub.url}/{repo}/discussions/{number}"})

    def discussion(self, repo: str, number: str) -> None:
        found = self._repo(repo)
        if int(number) not in found.pulls:
            raise _error(404, "no such discussion")
        raise _Reply(200, {
            "num": int(number), "title": "pull request", "status": "draft", "createdAt": _DATE,
            "isPullRequest": True, "changes": {"base": "refs/heads/main"}, "events": [],
            "filesWithConflicts": [], "author": {"name": self.hub.user},
            "repo": {"name": repo, "type": "model"},
        })  # fmt: skip

    def resolve(self, repo: str, rev: str, path: str) -> None:
        if new := self.hub.renamed.get(repo):
            raise _Reply(307, headers={"Location": f"/{new}/resolve/{rev}/{path}"})
        found = self._repo(repo)
        commit = self._commit(found, rev)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        entry = commit.files.get(path)
        if entry is None:
            reply = _error(404, "Entry not found", "EntryNotFound")
            raise _Reply(404, reply.body, reply.headers | headers)
        if entry.data is not None:
            self._send_bytes(entry.data, headers | {"ETag": f'"{entry.oid}"'})
        target = f"{self.hub.storage_url}/cdn/{entry.sha256}"
        headers |= {
            "Location": target, "X-Linked-Size": str(entry.nbytes),
            "X-Linked-Etag": f'"{entry.sha256}"', "ETag": f'"{entry.oid}"',
        }  # fmt: skip
        if self.hub.xet and (xet_hash := self.hub.xet_hashes.get(entry.sha256)):
            headers["X-Xet-Hash"] = xet_hash
            refresh = f"{self.hub.url}/api/models/{repo}/xet-read-token/{commit.oid}"
            headers["X-Xet-Refresh-Route"] = refresh
            headers["Link"] = f'<{refresh}>; rel="xet-auth"'
        raise _Reply(302, b"Found", headers | {"Content-Type": "text/plain"})

    def raw(self, repo: str, rev: str, path: str) -> None:
        """As git has it: large files as their pointers."""
        entry = self._commit(self._repo(repo), rev).files.get(path)
        if entry is None:
            raise _error(404, "Entry not found", "EntryNotFound")
        pointer = _pointer_text(entry.sha256, entry.nbytes)
        self._send_bytes(pointer if entry.data is None else entry.data, {})

    def cdn(self, oid: str) -> None:
        path = self.hub.object_path(oid)
        if not path.exists():
            raise _error(403, "the signed address has expired")
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        self._send_bytes(path, headers)

    def _send_bytes(self, data: bytes | Path, headers: dict[str, str]) -> None:
        headers["Content-Type"] = "application/octet-stream"
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not wanted or wanted[0] == "bytes=-":
            raise _Reply(200, data if isinstance(data, bytes) else data.read_bytes(), headers)
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        if wanted[1]:
            start, end = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        else:
            start, end = max(0, size - int(wanted[2])), size - 1
        if start > end:
            raise _Reply(416, b"", headers | {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        if isinstance(data, Path):
            with data.open("rb") as stream:
                stream.seek(start)
                raise _Reply(206, stream.read(end + 1 - start), headers)
        raise _Reply(206, data[start : end + 1], headers)


def _file_json(path: str, entry: Entry, hub: LoopbackHub) -> dict[str, object]:
    row: dict[str, object] = {
        "type": "file", "path": path, "size": entry.nbytes, "oid": entry.oid, "blobId": entry.oid,
    }  # fmt: skip
    if entry.sha256:
        pointer = len(_pointer_text(entry.sha256, entry.nbytes))
        row["lfs"] = {"oid": entry.sha256, "sha256": entry.sha256, "size": entry.nbytes,
                      "pointerSize": pointer}  # fmt: skip
        if xet_hash := hub.xet_hashes.get(entry.sha256):
            row["xetHash"] = xet_hash
    return row


def _front_matter(text: str) -> object:
    found = re.match(r"---\r?\n(.*?)\r?\n---(?:\r?\n|\Z)", text, re.DOTALL)
    return yaml.safe_load(found[1]) if found else {}


def _card_data(commit: Commit) -> object:
    readme = commit.files.get("README.md")
    return _front_matter(readme.data.decode()) if readme and readme.data else {}


def _card_errors(content: str) -> list[str]:
    """What the Hub says of a README's front matter; a part of what it checks."""
    try:
        data = _front_matter(content)
    except yaml.YAMLError as exc:
        return [f"YAML: {exc}"]
    if not isinstance(data, dict):
        return ["the front matter is not a mapping"]
    errors = []
    if data.get("license", "other") not in _LICENSES:
        errors.append('"license" must be one of the known licenses')
    if data.get("base_model_relation", "merge") not in _RELATIONS:
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    if not isinstance(data.get("language", ""), str | list):
        errors.append('"language" must be a string or a list of strings')
    bases = data.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+|[\w.-]+", str(base)):
            errors.append(f'"base_model" with value "{base}" is not a valid model id')
    return errors


_API = f"/api/models/{_ID}"
_Route = tuple[str, str, str]
_ROUTES: tuple[_Route, ...] = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/complete_multipart", "lfs_complete"),
    ("POST", r"/api/lfs-verify", "lfs_verify"),
    ("GET", r"/api/models/-/xet-read-token/main", "own_xet_token"),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("GET", _API, "info"),
    ("GET", rf"{_API}/auth-check", "auth_check"),
    ("GET", rf"{_API}/revision/{_REV}", "info"),
    ("POST", rf"{_API}/paths-info/{_REV}", "paths_info"),
    ("GET", rf"{_API}/tree/{_REV}(?:/(?P<folder>.+))?", "tree"),
    ("POST", rf"{_API}/preupload/{_REV}", "preupload"),
    ("GET", rf"{_API}/xet-(?P<kind>read|write)-token/{_REV}", "xet_token"),
    ("POST", rf"{_API}/commit/{_REV}", "commit"),
    ("POST", rf"{_API}/tag/{_REV}", "tag"),
    ("DELETE", rf"{_API}/tag/{_REV}", "untag"),
    ("POST", rf"{_API}/branch/{_REV}", "branch"),
    ("DELETE", rf"{_API}/branch/{_REV}", "unbranch"),
    ("GET", rf"{_API}/refs", "refs"),
    ("GET", rf"{_API}/commits/{_REV}", "commits"),
    ("POST", rf"{_API}/discussions", "discuss"),
    ("GET", rf"{_API}/discussions/(?P<number>\d+)", "discussion"),
    ("GET", rf"/{_ID}/resolve/{_REV}/(?P<path>.+)", "resolve"),
    ("GET", rf"/{_ID}/raw/{_REV}/(?P<path>.+)", "raw"),
)
_STORAGE_ROUTES: tuple[_Route, ...] = (
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", "lfs_put_part"),
    ("GET", r"/cdn/(?P<oid>[0-9a-f]{64})", "cdn"),
)
