"""Models on the Hub as sources: looked up once, read by their headers, fetched through its cache.

What the Hub says of a repository, or of a file, is asked once; from then on everything is held
against it: sizes, sha256s, the commit. Loads huggingface_hub inside functions, for it is slow.
Must not know what tensors mean.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, Protocol
from urllib.parse import urljoin, urlsplit

from ckptools.checkpoint import (
    Checkpoint,
    SourceFile,
    file_sha256,
    header_by,
    is_index,
    open_index,
    shards_of,
)
from ckptools.errors import CkptError, InputError, NetworkError, nearest_name, raise_all
from ckptools.family import detect
from ckptools.folders import chosen_weights, from_diffusers, open_folder
from ckptools.hub import is_offline, require_client
from ckptools.hubref import (
    HubRef,
    hub_ref_of,
    is_commit,
    is_hub_text,
    is_safe_file,
    parse_hub_ref,
)
from ckptools.lora.group import PEFT_CONFIG
from ckptools.recipe import ModelRef, Recipe
from ckptools.sources import open_checkpoint

FIRST_READ_BYTES = 1 << 19  # holds the header of every SD1, SD2 and SDXL checkpoint
MAX_HEADER_BYTES = 25_000_000  # to fetch more for a look is no look
TIMEOUT_S = 30
_MOST_LISTED = 12
_MOST_HOPS = 5  # a repository that was renamed, and what a mirror puts before it
_LOG_IN = "log in with `hf auth login`"
_MODEL_INDEX = "model_index.json"
_CONFIGS = (_MODEL_INDEX, "scheduler/scheduler_config.json")
_SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WITH_HEADERS = (".safetensors", ".sft")
_SAID = ("x-repo-commit", "x-linked-size", "x-linked-etag")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Progress(Protocol):
    """Who wants to know how far it is."""

    def start(self, stage: str, total_bytes: int) -> None:
        """A stage begins."""

    def advance(self, nbytes: int) -> None:
        """So many bytes more."""


class _Silent:
    def start(self, stage: str, total_bytes: int) -> None: ...

    def advance(self, nbytes: int) -> None: ...


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; sha256 "" for small ones, which git keeps itself."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit.

    folder     where it lies in the Hub's cache, for one that was found there without asking the Hub
    is_listed  whether `files` are all its files, not only one that was asked for by its name
    """

    repo: str
    commit: str
    files: Mapping[str, HubFile]
    folder: Path | None = None
    is_listed: bool = True


@dataclass(frozen=True)
class Found:
    """What a reference names.

    ref      with its commit, and its file where it is a single one or the index of shards
    weights  the files to open: one, an index of shards, or those of a diffusers folder
    """

    ref: HubRef
    snapshot: Snapshot
    weights: tuple[str, ...]

    @property
    def is_folder(self) -> bool:
        """Whether it is a diffusers folder."""
        return not self.ref.file

    @property
    def single(self) -> HubFile | None:
        """The one file that it is, or None."""
        file = self.snapshot.files.get(self.ref.file)
        return None if file is None or is_index(file.name) else file


@dataclass
class _Head:
    """A file as the Hub told of it when it was asked for, and its first bytes.

    ref   with its commit
    url   where its parts lie
    etag  of the parts; they are parts of one file where it is the same
    """

    ref: HubRef
    file: HubFile
    url: str
    data: bytearray = field(default_factory=bytearray)
    etag: str = ""

    def take(self, response: Any, start: int, stop: int) -> bytes:
        """Bytes [start, stop) from an answer: one that sends anything else is refused."""
        _check_range(self.ref, response, start, stop, self.file.nbytes)
        etag = _etag(response.headers.get("etag", ""))
        if self.etag not in ("", etag):
            _moved(self.ref, "its ETag changed")
        self.etag = etag
        data = bytearray()
        for chunk in response.iter_raw():
            data += chunk
            if len(data) > stop - start:
                break
        if len(data) != stop - start:
            said = f"the server sent {len(data):,} bytes where {stop - start:,} were due"
            _refuse(self.ref, said)
        return bytes(data)


class Hub:
    """A session with the Hub: what it once said of a commit, or of a branch, holds to its end."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress or _Silent()
        self._commits: dict[tuple[str, str], str] = {}
        self._snapshots: dict[tuple[str, str], Snapshot] = {}
        self._heads: dict[HubRef, _Head] = {}

    # --- what is there ---

    def find(self, ref: HubRef) -> Found:
        """The commit and the files that a reference names.

        A file that is named is asked for at once; only for other references, and for a file that
        is not there, all files of the repository are listed.
        Raises `NetworkError` where the Hub cannot be asked or does not let this user in, and
        `InputError` where the revision or the file is not there, or it is not clear which one.
        """
        head = self._named_head(ref)
        if head is not None:
            files = MappingProxyType({ref.file: head.file})
            alone = Snapshot(ref.repo, head.ref.revision, files, is_listed=False)
            return Found(head.ref, alone, (ref.file,))
        snapshot = self.snapshot(ref)
        file, weights = _pick(snapshot, ref)
        return Found(HubRef(ref.repo, file, snapshot.commit), snapshot, weights)

    def snapshot(self, ref: HubRef) -> Snapshot:
        """The repository at the reference's revision, with all its files."""
        at = self._at_commit(ref)
        if (at.repo, at.revision) not in self._snapshots:
            found = _in_cache(at) if is_offline() else _ask(at)
            self._commits[_branch(ref)] = found.commit
            self._snapshots[ref.repo, found.commit] = found
            return found
        return self._snapshots[at.repo, at.revision]

    def _at_commit(self, ref: HubRef) -> HubRef:
        """The reference with the commit that its revision means, where that is known."""
        commit = self._commits.get(_branch(ref), ref.revision)
        return replace(ref, revision=commit)

    def _named_head(self, ref: HubRef) -> _Head | None:
        """Of a single file that the reference names; None where a listing is to tell of it."""
        at = self._at_commit(ref)
        is_listed = (at.repo, at.revision) in self._snapshots
        if not ref.file.endswith(_WITH_HEADERS) or is_listed or is_offline():
            return None
        with suppress(InputError):  # no such file, or a server that says little: the listing tells
            return self._head(ref)
        return None

    def pinned(self, recipe: Recipe) -> Recipe:
        """The recipe with commit, file and sha256 of every model on the Hub; asks, fetches nothing.

        A sha256 of the recipe that is not the Hub's is an `InputError`.
        """
        models: dict[str, ModelRef] = {}
        errors: list[CkptError] = []
        for model in recipe.models.values():
            try:
                models[model.name] = self.pinned_model(model) if is_hub_text(model.path) else model
            except CkptError as exc:
                exc.what = f"model {model.name!r}: {exc.what}"
                exc.where = f"{model.where}: {exc.where}" if exc.where else model.where
                errors.append(exc)
        raise_all(errors)
        return replace(recipe, models=MappingProxyType(models))

    def pinned_model(self, model: ModelRef) -> ModelRef:
        """One model on the Hub, as `pinned` has it."""
        found = self.find(parse_hub_ref(model.path))
        sha256 = found.single.sha256 if found.single else ""
        if model.sha256 and sha256 and model.sha256 != sha256:
            raise InputError(
                f"{found.ref.title} is not the pinned file: its sha256 is {sha256}, the pin is "
                f"{model.sha256}",
                fix="give the revision that the pin was made for, or change the pin",
            )
        return replace(model, path=str(found.ref), sha256=model.sha256 or sha256)

    def named(self, ref: HubRef, ending: str) -> HubRef:
        """A file of a repository by how its name ends, with its commit."""
        snapshot = self.snapshot(ref)
        names = [ref.file] if ref.file else [n for n in snapshot.files if n.endswith(ending)]
        if len(names) != 1:
            raise InputError(
                f"{len(names) or 'no'} files that end in {ending!r}", where=ref.title,
                fix=f"give one of them: {', '.join(names[:_MOST_LISTED])}" if names
                else "give a repository that has one",
            )  # fmt: skip
        return HubRef(ref.repo, _file_of(snapshot, names[0]).name, snapshot.commit)

    # --- headers ---

    def open_headers(self, path: Path) -> Checkpoint:
        """Open a source by its headers alone, as a plan needs it; a path of this machine as ever.

        Adapters, whose scales are values, and pickles, which have no header, are fetched.
        """
        ref = hub_ref_of(path)
        if ref is None:
            return open_checkpoint(path)
        found = self.find(ref)
        if _has_pickles(found):
            return self.open_whole(path)
        checkpoint = self._headers(found)
        if detect(checkpoint, checkpoint.metadata).kind != "lora":
            return checkpoint
        checkpoint.close()
        return self.open_whole(path)

    def look(self, path: Path) -> Checkpoint:
        """As `open_headers`, but nothing is ever fetched: a pickle is an `InputError`."""
        ref = hub_ref_of(path)
        if ref is None:
            return open_checkpoint(path)
        found = self.find(ref)
        if _has_pickles(found):
            raise InputError(
                "a pickle has no header to read over the network",
                where=found.ref.title,
                fix=f"download it: `hf download {ref.repo} {found.weights[0]}`",
            )
        return self._headers(found)

    def open_adapter(self, path: Path) -> Checkpoint:
        """Open an adapter as `look` does, if its alphas are in what is read; else it is fetched.

        What is no adapter is not fetched.
        """
        ref = hub_ref_of(path)
        if ref is None:
            return open_checkpoint(path)
        found = self.find(ref)
        if _has_pickles(found):
            return self.open_whole(path)
        checkpoint = self._headers(found)
        numbers = [name for name, spec in checkpoint.items() if spec.numel == 1]
        is_adapter = detect(checkpoint, checkpoint.metadata).kind in ("lora", "unknown")
        if not is_adapter or all(map(checkpoint.has_values, numbers)):
            return checkpoint
        checkpoint.close()
        return self.open_whole(path)

    def beside(self, ref: HubRef, name: str) -> Path | None:
        """A small file beside a model, fetched; None where there is none."""
        found = self.find(ref)
        snapshot = self.snapshot(found.ref)
        file = _joined(found.weights[0].rpartition("/")[0], name)
        if file not in snapshot.files:
            return None
        at = HubRef(ref.repo, file, snapshot.commit)
        return self.fetch_file(at, most_bytes=MAX_HEADER_BYTES)

    def _headers(self, found: Found) -> Checkpoint:
        if found.snapshot.folder is not None:
            return open_checkpoint(found.snapshot.folder / found.ref.file)
        if found.is_folder:
            configs = [name for name in _CONFIGS if name in found.snapshot.files]
            root = self._fetched_small(found.snapshot, configs)
            checkpoint = open_folder(
                root,
                lambda path: self._open_remote(found.snapshot, path.relative_to(root).as_posix()),
                names=(*found.weights, *configs),
            )
        else:
            checkpoint = from_diffusers(self._open_remote(found.snapshot, found.ref.file))
        checkpoint.path = HubRef(found.ref.repo, found.ref.file).path
        return checkpoint

    def _open_remote(self, snapshot: Snapshot, name: str) -> Checkpoint:
        """One file of weights, or shards by their index, header by header."""
        if not is_index(name):
            file = self._source_file(snapshot, name)
            return Checkpoint(file.path, [file])
        root = self._fetched_small(snapshot, [name])

        def shard(path: Path) -> SourceFile:
            return self._source_file(snapshot, path.relative_to(root).as_posix())

        return open_index(root / name, shard)

    def _source_file(self, snapshot: Snapshot, name: str) -> SourceFile:
        """One file: a request that tells where it lies, and one or two for a part of it."""
        file = _file_of(snapshot, name)
        head = self._head(HubRef(snapshot.repo, name, snapshot.commit), file)

        def read(length: int, offset: int) -> bytes:
            if not head.data:
                self._read_on(head, min(FIRST_READ_BYTES, file.nbytes))
            if length > MAX_HEADER_BYTES:
                raise InputError(
                    f"it claims a header of {length:,} bytes; {MAX_HEADER_BYTES:,} are read at "
                    "most over the network",
                    fix="download the file if you trust it",
                )
            if offset + length > len(head.data):
                self._read_on(head, offset + length)
            return bytes(head.data[offset : offset + length])

        try:
            header = header_by(read, file.nbytes, head.ref.path)
        except CkptError as exc:
            exc.where = head.ref.title
            raise
        path = HubRef(snapshot.repo, name).path
        return SourceFile(path, header, None, bytes(head.data))

    def _head(self, ref: HubRef, listed: HubFile | None = None) -> _Head:
        """What the Hub says of a file, asked once: commit, size, sha256, and where it lies.

        listed  what it said before, which must hold
        """
        at = self._at_commit(ref)
        if at not in self._heads:
            head = _ask_for(at, listed)
            self._commits[_branch(ref)] = head.ref.revision
            self._heads[head.ref] = head
            return head
        return self._heads[at]

    def _read_on(self, head: _Head, stop: int) -> None:
        """Read up to byte `stop` of a file."""
        start = len(head.data)
        if stop == start:
            return
        with _asking(head.ref), _request(head.url, start, stop) as response:
            if response.status_code in (401, 403) and not _is_of_the_hub(head.url):
                raise NetworkError(
                    f"the Hub's storage does not give the file out ({response.status_code})",
                    where=head.ref.title, fix="run it again: its addresses hold for a while only",
                )  # fmt: skip
            _raise_for_status(response)
            head.data += head.take(response, start, stop)

    # --- whole files ---

    def open_whole(self, path: Path) -> Checkpoint:
        """Open a source to read its values; what is on the Hub is fetched first."""
        ref = hub_ref_of(path)
        return open_checkpoint(path if ref is None else self.fetch(ref))

    def fetch(self, ref: HubRef) -> Path:
        """The file, the index of shards, or the folder, on this machine, in the Hub's cache.

        Files that came from the network are hashed and held against the Hub's sha256.
        """
        found = self.find(ref)
        if found.snapshot.folder is not None:
            return found.snapshot.folder / found.ref.file
        files = {file.name: file for file in self.files_of(found)}
        if not found.snapshot.is_listed:
            _check_listed(found.ref, found.snapshot.files[found.ref.file], files[found.ref.file])
        return self._fetched(self.snapshot(found.ref), [*files]) / found.ref.file

    def fetch_file(self, ref: HubRef, *, most_bytes: int | None = None) -> Path:
        """Any one file, on this machine, in the Hub's cache.

        most_bytes  a larger one is an `InputError`, and not fetched
        """
        snapshot = self.snapshot(ref)
        if most_bytes is not None:
            _check_small(snapshot, ref.file, most_bytes)
        if snapshot.folder is not None:
            return snapshot.folder / _file_of(snapshot, ref.file).name
        return self._fetched(snapshot, [ref.file]) / ref.file

    def files_of(self, found: Found) -> tuple[HubFile, ...]:
        """Every file that `fetch` brings, by name; to tell, indexes of shards are fetched."""
        snapshot, names = self.snapshot(found.ref), [*found.weights]
        if found.is_folder:
            names += [name for name in _CONFIGS if name in snapshot.files]
        for name in found.weights:
            folder = name.rpartition("/")[0]
            if is_index(name):
                root = snapshot.folder or self._fetched_small(snapshot, [name])
                names += [_joined(folder, shard) for shard in shards_of(root / name)]
            beside = _joined(folder, PEFT_CONFIG)  # the scale of an adapter
            names += [beside] if beside in snapshot.files else []
        return tuple(_file_of(snapshot, name) for name in sorted(set(names)))

    def _fetched_small(self, snapshot: Snapshot, names: Sequence[str]) -> Path:
        """As `_fetched`, for texts: what is too large for one is an `InputError`."""
        for name in names:
            _check_small(snapshot, name, MAX_HEADER_BYTES)
        return self._fetched(snapshot, names)

    def _fetched(self, snapshot: Snapshot, names: Sequence[str]) -> Path:
        """The snapshot's folder in the Hub's cache, with these files in it."""
        files = [_file_of(snapshot, name) for name in dict.fromkeys(names)]
        missing = [file for file in files if _cached_path(snapshot, file.name) is None]
        progress = self._progress if any(file.sha256 for file in missing) else _Silent()
        if missing:
            progress.start("downloading", sum(file.nbytes for file in missing))
        for file in missing:
            self._download(snapshot, file, progress.advance)
        if missing:
            self._keep_branches(snapshot)
        for file in files:
            path = _cached_path(snapshot, file.name)
            if path is not None and path.stat().st_size != file.nbytes:
                _broken(snapshot, file, path, f"it has {path.stat().st_size:,} bytes")
        return _cache_folder(snapshot.repo) / "snapshots" / snapshot.commit

    def _keep_branches(self, snapshot: Snapshot) -> None:
        """Note in the cache which branches mean this commit, for the times without a network."""
        for (repo, revision), commit in self._commits.items():
            if (repo, commit) != (snapshot.repo, snapshot.commit) or is_commit(revision):
                continue
            file = _cache_folder(repo) / "refs" / revision
            with suppress(OSError):  # a cache that may not be written to
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(commit, encoding="ascii")

    def _download(self, snapshot: Snapshot, file: HubFile, advance: Callable[[int], None]) -> None:
        from huggingface_hub import hf_hub_download

        ref = HubRef(snapshot.repo, file.name, snapshot.commit)
        with _asking(ref):
            found = hf_hub_download(
                snapshot.repo, file.name, revision=snapshot.commit, endpoint=_endpoint(),
                library_name="ckptools", etag_timeout=TIMEOUT_S,
                tqdm_class=_bar(advance, file.nbytes),
            )  # fmt: skip
        path = Path(found)
        commit = path.parts[-1 - len(file.name.split("/"))]
        if commit != snapshot.commit:
            _moved(ref, f"the Hub answers for commit {commit[:12]}")
        if file.sha256 and (sha256 := file_sha256(path)) != file.sha256:
            _broken(snapshot, file, path, f"its sha256 is {sha256}")


# --- choosing ----------------------------------------------------------------------------------


def _pick(snapshot: Snapshot, ref: HubRef) -> tuple[str, tuple[str, ...]]:
    """(file, weights): what a reference to this repository means; file "" for a folder."""
    names = snapshot.files.keys()
    if ref.file:
        if ref.file not in names:
            models = [name for name in names if _is_model(name)]
            raise InputError(
                f"no file {ref.file!r} in this revision", where=replace(ref, file="").title,
                fix=nearest_name(ref.file, models, _listed(snapshot)),
            )  # fmt: skip
        if not _is_model(ref.file):
            raise InputError(
                f"{ref.file!r} is not a file of weights", where=ref.title, fix=_listed(snapshot)
            )
        return ref.file, (ref.file,)
    if _MODEL_INDEX in names and (weights := chosen_weights(names)):
        return "", weights
    indexes = [name for name in names if is_index(name)]
    files = [name for name in names if name.endswith(".safetensors") and not _SHARD.match(name)]
    candidates = indexes + files
    if len(candidates) != 1:
        what = f"{len(candidates)} files of weights" if candidates else "no .safetensors file"
        raise InputError(f"{what} in this repository", where=ref.title, fix=_listed(snapshot))
    return candidates[0], (candidates[0],)


def _is_model(name: str) -> bool:
    return name.endswith(_SUFFIXES) or is_index(name)


def _listed(snapshot: Snapshot) -> str:
    """A hint that names the files one may give."""
    models = [name for name in snapshot.files if _is_model(name) and not _SHARD.match(name)]
    if not models:
        return "give a repository with a .safetensors file"
    shown = ", ".join(models[:_MOST_LISTED]) + (", …" if len(models) > _MOST_LISTED else "")
    return f"give one of its files: {shown}"


def _file_of(snapshot: Snapshot, name: str) -> HubFile:
    file = snapshot.files.get(name)
    if file is None:
        raise InputError(
            f"no file {name!r} in this revision",
            where=HubRef(snapshot.repo, "", snapshot.commit).title,
            fix="the repository is not whole; ask its owner",
        )
    return file


def _check_small(snapshot: Snapshot, name: str, most_bytes: int) -> None:
    nbytes = _file_of(snapshot, name).nbytes
    if nbytes > most_bytes:
        raise InputError(
            f"{nbytes:,} bytes; {most_bytes:,} are read at most of such a file",
            where=HubRef(snapshot.repo, name, snapshot.commit).title,
            fix="download it if you trust it",
        )


def _branch(ref: HubRef) -> tuple[str, str]:
    return ref.repo, ref.revision or "main"


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _has_pickles(found: Found) -> bool:
    return any(name.endswith(_PICKLES) for name in found.weights)


# --- asking ------------------------------------------------------------------------------------


def _endpoint() -> str:
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _shown_endpoint() -> str:
    """The Hub's address, without a password that may stand in it."""
    parts = urlsplit(_endpoint())
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _ask(ref: HubRef) -> Snapshot:
    """The commit and the files of a revision, in one request."""
    require_client()
    from huggingface_hub import HfApi

    with _asking(ref):
        api = HfApi(endpoint=_endpoint(), library_name="ckptools")
        info = api.model_info(
            ref.repo, revision=ref.revision or None, files_metadata=True, timeout=TIMEOUT_S
        )
    commit = info.sha or ""
    if not is_commit(commit):
        _refuse(ref, "the server names no commit")
    if ref.is_pinned and commit != ref.revision:
        _moved(ref, f"the Hub answers for commit {commit[:12]}")
    files = {}
    for sibling in info.siblings or ():
        lfs = sibling.lfs
        size = lfs.size if lfs else sibling.size
        sha256 = lfs.sha256 if lfs else ""
        if is_safe_file(sibling.rfilename) and type(size) is int and size >= 0:
            files[sibling.rfilename] = HubFile(sibling.rfilename, size, sha256)
    return Snapshot(ref.repo, commit, MappingProxyType(dict(sorted(files.items()))))


def _ask_for(ref: HubRef, listed: HubFile | None) -> _Head:
    """What the Hub says of one file, in one request; a file that it keeps itself begins with it.

    A revision is resolved by this, too: the answer names the commit.
    """
    require_client()
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(ref.repo, ref.file, revision=ref.revision or None, endpoint=_endpoint())
    said: dict[str, str] = {}
    for _ in range(_MOST_HOPS):
        with _asking(ref), _request(url, 0, FIRST_READ_BYTES) as response:
            _raise_for_status(response)
            said = {
                name: response.headers[name] for name in _SAID if name in response.headers
            } | said
            if not response.has_redirect_location:
                return _head_of(ref, listed, said, url, response)
            url = urljoin(url, response.headers["location"])
        if not _is_of_the_hub(url):
            return _head_of(ref, listed, said, url)
    raise NetworkError(
        "the server redirects again and again", where=ref.title, fix="run it again later"
    )


def _head_of(
    ref: HubRef, listed: HubFile | None, said: Mapping[str, str], url: str, response: Any = None
) -> _Head:
    """A file from the headers of the answers; `response` is the one that holds its beginning."""
    commit = said.get("x-repo-commit", ref.revision)
    if ref.is_pinned and commit != ref.revision:
        _moved(ref, f"the Hub answers for commit {commit[:12]}")
    size, sha256 = said.get("x-linked-size", ""), _etag(said.get("x-linked-etag", ""))
    if response is not None and not size:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        size = found[3] if found else ""
    if not is_commit(commit) or (listed is None and not size.isdecimal()):
        raise InputError("the server does not say enough of this file", where=ref.title)
    file = listed or HubFile(ref.file, int(size), sha256 if _SHA256.fullmatch(sha256) else "")
    _check_listed(ref, file, replace(file, sha256=sha256))
    head = _Head(replace(ref, revision=commit), file, url)
    if response is not None:
        head.data += head.take(response, 0, min(FIRST_READ_BYTES, file.nbytes))
    return head


def _request(url: str, start: int, stop: int) -> Any:
    """A context with the answer to a request for bytes [start, stop); its body is not read."""
    client: Any = importlib.import_module("huggingface_hub.utils")
    headers = client.build_hf_headers(library_name="ckptools")
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    is_of_the_hub = _is_of_the_hub(url)
    if not is_of_the_hub:  # a token goes to the Hub alone
        headers = {name: v for name, v in headers.items() if name.lower() != "authorization"}
    return client.get_session().stream(
        "GET", url, headers=headers, follow_redirects=not is_of_the_hub, timeout=TIMEOUT_S
    )


def _is_of_the_hub(url: str) -> bool:
    ours, theirs = urlsplit(_endpoint()), urlsplit(url)
    return (ours.scheme, ours.netloc) == (theirs.scheme, theirs.netloc)


def _raise_for_status(response: Any) -> None:
    client: Any = importlib.import_module("huggingface_hub.utils")
    if response.status_code >= 400:
        response.read()
        client.hf_raise_for_status(response)


@contextmanager
def _asking(ref: HubRef) -> Iterator[None]:
    """Tells of a failure of the client in a user's words; never with headers, which hold tokens."""
    errors: Any = importlib.import_module("huggingface_hub.errors")
    where = ref.title
    try:
        yield
    except errors.GatedRepoError as exc:
        page = f"{_shown_endpoint()}/{ref.repo}"
        raise NetworkError(
            "this repository is gated, and you have no access to it",
            where=where, fix=f"ask for access at {page}, then {_LOG_IN}",
        ) from exc  # fmt: skip
    except errors.RepositoryNotFoundError as exc:
        raise NetworkError(
            "no such repository, or a private one that you may not see",
            where=where, fix=f"check its name, or {_LOG_IN}",
        ) from exc  # fmt: skip
    except errors.RevisionNotFoundError as exc:
        raise InputError(
            f"no revision {ref.revision!r} in this repository", where=where,
            fix="give a branch, a tag or a commit that is there",
        ) from exc  # fmt: skip
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as exc:
        raise NetworkError(
            "the Hub cannot be reached, and the file is not in its cache", where=where,
            fix="check the network",
        ) from exc  # fmt: skip
    except errors.EntryNotFoundError as exc:
        raise InputError("the Hub has no such file", where=where, fix="check its name") from exc
    except errors.HfHubHTTPError as exc:
        raise _http_error(exc, where) from exc
    except (errors.HTTPError, ConnectionError, TimeoutError) as exc:
        raise NetworkError(
            f"the Hub at {_shown_endpoint()} cannot be reached ({type(exc).__name__})", where=where,
            fix="check the network, or set HF_HUB_OFFLINE=1 to use what is in the cache",
        ) from exc  # fmt: skip
    except OSError as exc:
        if exc.errno is None:  # of the client itself: an answer that is not whole
            raise NetworkError("the download failed", where=where, fix="run it again") from exc
        raise


def _http_error(exc: Exception, where: str) -> NetworkError:
    response = getattr(exc, "response", None)
    status = getattr(response, "status_code", 0)
    if status in (401, 403):
        return NetworkError(
            f"the Hub does not let you in ({status})", where=where,
            fix=f"{_LOG_IN}, with a token that may read this repository",
        )  # fmt: skip
    if status == 429:
        return NetworkError(
            "too many requests (429)", where=where, fix=f"wait some minutes, or {_LOG_IN}"
        )
    return NetworkError(f"the Hub answered with an error ({status})", where=where,
                        fix="run it again later")  # fmt: skip


def _check_range(ref: HubRef, response: Any, start: int, stop: int, size: int) -> None:
    """The answer is the part that was asked for, of a file of the size that is known."""
    if response.status_code != 206:
        status = response.status_code
        _refuse(ref, f"the server ignores ranges (it answered {status}, with the whole file)")
    said = response.headers.get("content-range", "")
    found = _CONTENT_RANGE.fullmatch(said)
    if found is None or tuple(map(int, found.groups())) != (start, stop - 1, size):
        _refuse(
            ref, f"the server sent {said!r} where bytes {start}-{stop - 1}/{size} were asked for"
        )


def _check_listed(ref: HubRef, before: HubFile, now: HubFile) -> None:
    """What the Hub says of a file is what it said before; of one that git keeps, no sha256."""
    if before.sha256 and now.sha256 not in ("", before.sha256):
        _moved(ref, f"its sha256 was {before.sha256[:12]}…, now it is {now.sha256[:12]}…")
    if before.nbytes != now.nbytes:
        _moved(ref, f"it had {before.nbytes:,} bytes, now it has {now.nbytes:,}")


def _etag(text: str) -> str:
    return text.removeprefix("W/").strip('"')


def _refuse(ref: HubRef, what: str) -> NoReturn:
    raise NetworkError(what, where=ref.title, fix=f"download it with `hf download {ref.repo}`")


def _moved(ref: HubRef, what: str) -> NoReturn:
    raise NetworkError(
        f"the revision moved while it was read: {what}", where=ref.title, fix="run it again"
    )


# --- the Hub's cache ---------------------------------------------------------------------------


def _cache_folder(repo: str) -> Path:
    """Source of the layout: huggingface_hub, docs "Understand caching"."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _cached_path(snapshot: Snapshot, name: str) -> Path | None:
    path = _cache_folder(snapshot.repo) / "snapshots" / snapshot.commit / name
    return path if path.is_file() else None


def _in_cache(ref: HubRef) -> Snapshot:
    """A revision as far as it lies in the Hub's cache."""
    root = _cache_folder(ref.repo)
    commit = ref.revision
    if not ref.is_pinned:
        try:
            commit = (root / "refs" / (ref.revision or "main")).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            commit = ""
    folder = root / "snapshots" / commit
    if not is_commit(commit) or not folder.is_dir():
        raise NetworkError(
            "not in the Hub's cache, and the Hub may not be asked (HF_HUB_OFFLINE)",
            where=ref.title, fix="unset HF_HUB_OFFLINE, or fetch it while there is a network",
        )  # fmt: skip
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            blob = path.resolve().name
            sha256 = blob if _SHA256.fullmatch(blob) else ""
            files[name] = HubFile(name, path.stat().st_size, sha256)
    return Snapshot(ref.repo, commit, MappingProxyType(files), folder)


def _broken(snapshot: Snapshot, file: HubFile, path: Path, what: str) -> NoReturn:
    """Refuse a file that is not the Hub's, and put it out of the cache."""
    for wrong in {path.resolve(), path}:
        wrong.unlink(missing_ok=True)
    ref = HubRef(snapshot.repo, file.name, snapshot.commit)
    expected = f"{file.nbytes:,} bytes, sha256 {file.sha256}" if file.sha256 else f"{file.nbytes:,}"
    raise NetworkError(
        f"the downloaded file is not the Hub's: {what}; expected {expected}",
        where=ref.title, fix="run it again: the file is removed from the cache",
    )  # fmt: skip


def _bar(advance: Callable[[int], None], most: int) -> Any:
    """A class of bars, as the client wants one, that shows nothing and tells how far it is."""
    tqdm: Any = importlib.import_module("tqdm").tqdm

    left = most

    class Bar(tqdm):  # type: ignore[misc]  # the client's own dependency has no types
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal left
            step = max(0, min(int(n or 0), left))  # some downloads have two bars
            left -= step
            advance(step)
            return bool(super().update(n))

    return Bar
