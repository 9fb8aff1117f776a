"""Every hash that people know a model by, from one read of its files. Loads no torch.

The reading thread hands each chunk to one thread per hash; a small ring of buffers is all the
memory it takes. What is defined elsewhere, and by whom:

sha256     of the whole file: the Hub, Civitai, the web UIs
AutoV1     sha256 of the 64 KiB at 1 MiB, 8 digits: AUTOMATIC1111 `sd_models.model_hash`
AutoV2     the first 10 digits of sha256: AUTOMATIC1111 `sd_models.calculate_sha256`, Civitai
AutoV3     the first 12 digits of the sha256 of the tensor data alone (all after the header):
           Civitai; kohya's `addnet_hash_safetensors`
CRC32      of the whole file (zlib's polynomial): Civitai
BLAKE3     of the whole file, where the `blake3` package is installed: Civitai, InvokeAI
ModelSpec  "0x" and the sha256 of all tensor content, header left out: ModelSpec 1.0.1,
           `modelspec.hash_sha256`

and what is defined here: the hash of a *component* does not depend on the order, the place or the
number of files in which its tensors are stored, nor on metadata. It is the sha256 over one line
per tensor, sorted by name: the compact JSON array [name, dtype, shape, sha256 of its bytes] and a
line feed. Names are the family's usual ones (`Family.canonical_name`). *content* is the same over
all tensors of the model.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import sys
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ckptools.checkpoint import Checkpoint, open_file
from ckptools.errors import InputError, InvalidFileError, UnsafeError
from ckptools.family import detect, family_of
from ckptools.manifest import HASH_KEY, HASH_PLACEHOLDER, version
from ckptools.sources import open_checkpoint
from ckptools.tensors import file_order
from ckptools.writer import is_shard, lay_out

CHUNK = 1 << 21
BUFFERS = 6
EMPTY_SHA256 = hashlib.sha256().hexdigest()
_LEGACY = slice(0x100000, 0x110000)
_CACHE_SCHEMA = "ckptools.hash-cache/1"
_RACY_S = 2.0  # a file this young may be written to again without its time changing
_HEX = re.compile(r"[0-9a-f]+")

Verdict = Literal["same", "differs", "bogus", "unchecked"]


class Progress(Protocol):
    """Who is told how far it is."""

    def start(self, stage: str, total_bytes: int) -> None:
        """A stage of so many bytes begins."""

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""


class Silent:
    """Tells nobody."""

    def start(self, stage: str, total_bytes: int) -> None:
        """Nothing."""

    def advance(self, nbytes: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class FileHashes:
    """The hashes of one file, in lower-case hex.

    sha256_data  of what follows the header; None where the file is not safetensors
    legacy       sha256 of the 64 KiB at 1 MiB; of nothing where the file ends before
    blake3       None where the package is not installed
    """

    path: Path
    nbytes: int
    sha256: str
    sha256_data: str | None
    legacy: str
    crc32: str
    blake3: str | None

    @property
    def autov1(self) -> str:
        """AUTOMATIC1111's first hash."""
        return self.legacy[:8]

    @property
    def autov2(self) -> str:
        """The web UIs' "Model hash"."""
        return self.sha256[:10]

    @property
    def autov3(self) -> str | None:
        """Civitai's hash of the tensor data."""
        return self.sha256_data[:12] if self.sha256_data is not None else None


@dataclass(frozen=True)
class EmbeddedHash:
    """A hash that a file's own metadata holds.

    computed  what it should be, "" where that cannot be told
    """

    key: str
    stored: str
    computed: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Hashes:
    """What a source hashes to.

    files        one, or the shards, or the files of a folder
    sha256_data  of the tensor data of all files, one after the other; None for other formats
    components   component -> its hash, in the family's order; {} for what is no model
    content      as a component, over all tensors; None for what is no model
    notes        why something is missing
    cached       whether the files were not read this time
    """

    path: Path
    files: tuple[FileHashes, ...]
    sha256_data: str | None
    components: Mapping[str, str]
    content: str | None
    embedded: tuple[EmbeddedHash, ...]
    notes: tuple[str, ...]
    cached: bool

    @property
    def modelspec(self) -> str | None:
        """What `modelspec.hash_sha256` should be."""
        return f"0x{self.sha256_data}" if self.sha256_data is not None else None


def hash_source(path: Path, *, use_cache: bool = True, progress: Progress | None = None) -> Hashes:
    """All hashes of a model, or of any other file.

    A file that is no sound model still has the hashes of its bytes; `notes` says what it is.
    Raises `InputError` where it cannot be read or changes meanwhile.
    """
    with ExitStack() as stack:
        notes: tuple[str, ...] = ()
        checkpoint: Checkpoint | None = None
        try:
            checkpoint = stack.enter_context(open_checkpoint(path))
            paths = [file.path for file in checkpoint.files]
        except (InvalidFileError, UnsafeError) as exc:
            if not path.is_file():
                raise
            notes, paths = (f"not a sound model: {exc.what}",), [path]
        stamps = [_stamp(item) for item in paths]
        known = _recall(path, stamps) if use_cache else None
        measured = known or _measure(path, checkpoint, paths, progress or Silent())
        if [_stamp(item) for item in paths] != stamps:
            raise InputError(
                "the file changed while it was being read",
                where=str(path),
                fix="run it again when nothing writes to it",
            )
        if use_cache and known is None:
            _remember(path, stamps, measured)
        return Hashes(
            path=path,
            files=measured.files,
            sha256_data=measured.sha256_data,
            components=measured.components,
            content=measured.content,
            embedded=_embedded(checkpoint, measured) if checkpoint else (),
            notes=notes,
            cached=known is not None,
        )


@dataclass(frozen=True)
class _Measured:
    """What is kept in the cache."""

    files: tuple[FileHashes, ...]
    sha256_data: str | None
    components: Mapping[str, str]
    content: str | None


def _measure(
    path: Path, checkpoint: Checkpoint | None, paths: Sequence[Path], progress: Progress
) -> _Measured:
    digests = TensorDigests()
    hashers = [_FileHashers(item) for item in paths]
    total = _Total() if len(paths) > 1 else None
    progress.start("hashing", sum(hasher.nbytes for hasher in hashers))
    for number, hasher in enumerate(hashers):
        lanes = hasher.lanes()
        if total is not None and hasher.data_start is not None:
            lanes.append(total.lane(hasher.data_start))
        if checkpoint is not None:
            lanes.append(cut_at_tensors(checkpoint, number, digests))
        stream_file(hasher.path, hasher.nbytes, lanes, progress.advance)
    files = tuple(hasher.result() for hasher in hashers)
    sha256_data = files[0].sha256_data if total is None else total.result(files)
    if checkpoint is None:
        return _Measured(files, sha256_data, {}, None)
    read_scattered(checkpoint, digests)
    components, content = tensor_hashes(checkpoint, digests.result(checkpoint))
    return _Measured(files, sha256_data, components, content)


# --- one read, many readers --------------------------------------------------------------------


Lane = Callable[[memoryview, int], None]
Watcher = Callable[[str, memoryview], None]


def stream_file(
    path: Path, nbytes: int, lanes: Sequence[Lane], advance: Callable[[int], None]
) -> None:
    """Read a file once, in order, and show every chunk to every lane: `lane(data, offset)`.

    Each lane has a thread of its own and sees the chunks in order. The data is only valid during
    the call.
    """
    with ExitStack() as stack:
        stream = stack.enter_context(open_file(path))
        threads = [stack.enter_context(ThreadPoolExecutor(max_workers=1)) for _ in lanes]
        free = deque(memoryview(bytearray(min(CHUNK, max(nbytes, 1)))) for _ in range(BUFFERS))
        shown: deque[tuple[memoryview, list[Future[None]]]] = deque()

        def take_back() -> None:
            buffer, jobs = shown.popleft()
            for job in jobs:
                job.result()
            free.append(buffer)

        for offset in range(0, nbytes, CHUNK):
            if not free:
                take_back()
            buffer = free.popleft()
            chunk = buffer[: min(CHUNK, nbytes - offset)]
            stream.read_into(chunk, offset)
            jobs = [
                thread.submit(lane, chunk, offset)
                for thread, lane in zip(threads, lanes, strict=True)
            ]
            shown.append((buffer, jobs))
            advance(len(chunk))
        while shown:
            take_back()


def cut_at_tensors(checkpoint: Checkpoint, file: int, watch: Watcher) -> Lane:
    """A lane that shows each tensor of the `file`-th file, piece by piece: `watch(name, data)`.

    Tensors that share bytes, or lie in several runs, are left to `read_scattered`.
    """
    runs = _runs(checkpoint, file)
    position = 0

    def lane(data: memoryview, offset: int) -> None:
        nonlocal position
        end = offset + len(data)
        while position < len(runs):
            start, stop, name = runs[position]
            if start >= end:
                return
            watch(name, data[max(start - offset, 0) : min(stop, end) - offset])
            if stop > end:
                return
            position += 1

    return lane


def read_scattered(checkpoint: Checkpoint, watch: Watcher) -> None:
    """Show the tensors that `cut_at_tensors` left out, one after the other."""
    streamed = {
        name for number in range(len(checkpoint.files)) for _, _, name in _runs(checkpoint, number)
    }
    for name, spec in checkpoint.items():
        if name in streamed or not spec.nbytes:
            continue
        strided = any(extent.strides for extent in checkpoint.extents(name))
        step = spec.nbytes if strided else CHUNK  # each part of a transposed one reads all of it
        for offset in range(0, spec.nbytes, step):
            data = memoryview(bytearray(min(step, spec.nbytes - offset)))
            checkpoint.read_into(name, data, offset)
            watch(name, data)


def _runs(checkpoint: Checkpoint, file: int) -> list[tuple[int, int, str]]:
    """(start, stop, tensor) of the tensors that lie in one run of this file, in file order."""
    found = []
    for name in checkpoint:
        extents = checkpoint.extents(name)
        if len(extents) == 1 and extents[0].file == file and not extents[0].strides:
            extent = extents[0]
            if extent.nbytes:
                found.append((extent.start, extent.start + extent.nbytes, name))
    runs: list[tuple[int, int, str]] = []
    for run in sorted(found):
        if not runs or run[0] >= runs[-1][1]:
            runs.append(run)
    return runs


class TensorDigests:
    """A watcher that takes the sha256 of every tensor's bytes."""

    def __init__(self) -> None:
        self._name = ""
        self._digest: Any = None
        self._done: dict[str, str] = {}

    def __call__(self, name: str, data: memoryview) -> None:
        """The next piece of a tensor; its pieces come in order and one after the other."""
        if self._digest is None or name != self._name:
            self._finish()
            self._name, self._digest = name, hashlib.sha256()
        self._digest.update(data)

    def _finish(self) -> None:
        if self._digest is not None:
            self._done[self._name] = self._digest.hexdigest()
            self._digest = None

    def result(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Tensor -> sha256; empty tensors too."""
        self._finish()
        return {name: self._done.get(name, EMPTY_SHA256) for name in checkpoint}


class _FileHashers:
    """The hashes of one file's bytes, as lanes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_file(path) as stream:
            self.nbytes = os.fstat(stream.fileno()).st_size
        self.data_start = data_start(path)
        self._whole, self._data = hashlib.sha256(), hashlib.sha256()
        self._legacy, self._crc = hashlib.sha256(), 0
        self._blake = _blake3()

    def lanes(self) -> list[Lane]:
        """One for each hash that takes a core."""
        lanes: list[Lane] = [self._take_whole, self._take_quick]
        if self.data_start is not None:
            lanes.append(from_byte(self.data_start, self._data.update))
        if self._blake is not None:
            update = self._blake.update
            lanes.append(lambda data, _: update(data))
        return lanes

    def _take_whole(self, data: memoryview, _: int) -> None:
        self._whole.update(data)

    def _take_quick(self, data: memoryview, offset: int) -> None:
        self._crc = zlib.crc32(data, self._crc)
        if offset < _LEGACY.stop:
            self._legacy.update(data[max(_LEGACY.start - offset, 0) : _LEGACY.stop - offset])

    def result(self) -> FileHashes:
        """What was found, once the file was streamed."""
        return FileHashes(
            path=self.path,
            nbytes=self.nbytes,
            sha256=self._whole.hexdigest(),
            sha256_data=self._data.hexdigest() if self.data_start is not None else None,
            legacy=self._legacy.hexdigest(),
            crc32=f"{self._crc:08x}",
            blake3=self._blake.hexdigest() if self._blake is not None else None,
        )


class _Total:
    """The sha256 of several files' data sections, one after the other."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def lane(self, data_start: int) -> Lane:
        """The lane of the next file."""
        return from_byte(data_start, self._digest.update)

    def result(self, files: Iterable[FileHashes]) -> str | None:
        """The digest; None where a file has no data section."""
        whole = all(file.sha256_data is not None for file in files)
        return self._digest.hexdigest() if whole else None


def from_byte(start: int, update: Callable[[memoryview], None]) -> Lane:
    """A lane that sees the bytes from `start` on."""
    return lambda data, offset: update(data[max(start - offset, 0) :])


def data_start(path: Path) -> int | None:
    """The byte at which a safetensors file's data begins; None for a file that cannot be one."""
    with open_file(path) as stream:
        nbytes = os.fstat(stream.fileno()).st_size
        head = stream.read(min(9, nbytes), 0)
    length = int.from_bytes(head[:8], "little")
    fits = len(head) == 9 and head[8:] == b"{" and 8 + length <= nbytes
    return 8 + length if fits else None


def _blake3() -> Any:
    """A BLAKE3 hasher, or None where the package is not installed."""
    try:
        return importlib.import_module("blake3").blake3()
    except ImportError:
        return None


# --- hashes of tensors -------------------------------------------------------------------------


def tensor_hashes(checkpoint: Checkpoint, digests: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """(component -> hash of its tensors, "other" last; the hash of all tensors).

    digests  tensor -> sha256 of its bytes
    """
    family = family_of(detect(checkpoint, checkpoint.metadata))
    groups: dict[str, list[_Row]] = {}
    for own, spec in checkpoint.items():
        name = family.canonical_name(own)
        row = (name, spec.dtype, spec.shape, digests[own])
        groups.setdefault(family.component_of(name), []).append(row)
    order = [*family.components, "other"]
    components = sorted(groups.items(), key=lambda item: order.index(item[0]))
    rows = [row for _, group in components for row in group]
    return {component: _hash_of(group) for component, group in components}, _hash_of(rows)


_Row = tuple[str, str, tuple[int, ...], str]


def _hash_of(rows: Iterable[_Row]) -> str:
    digest = hashlib.sha256()
    for row in sorted(rows):
        line = json.dumps(row, separators=(",", ":"), ensure_ascii=False)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


# --- hashes in metadata ------------------------------------------------------------------------


def _embedded(checkpoint: Checkpoint, measured: _Measured) -> tuple[EmbeddedHash, ...]:
    """What the metadata says of itself, compared with what was found.

    Source: kohya-ss/sd-scripts, `train_util.precalculate_safetensors_hashes`: both `sshs_` hashes
    are taken from a copy of the file that has only the `ss_` metadata.
    """
    metadata = checkpoint.metadata
    data = measured.sha256_data or ""
    found = []
    if HASH_KEY in metadata and is_shard(checkpoint.path):
        reason = "it is of all shards together: ask about their index"
        found.append(EmbeddedHash(HASH_KEY, metadata[HASH_KEY], "", "unchecked", reason))
    elif HASH_KEY in metadata:
        found.append(_judged(HASH_KEY, metadata[HASH_KEY], f"0x{data}" if data else ""))
    if "sshs_model_hash" in metadata:
        found.append(_judged("sshs_model_hash", metadata["sshs_model_hash"], data))
    if "sshs_legacy_hash" in metadata:
        legacy = _legacy_of_copy(checkpoint)
        found.append(_judged("sshs_legacy_hash", metadata["sshs_legacy_hash"], legacy))
    return tuple(found)


def _judged(key: str, stored: str, computed: str) -> EmbeddedHash:
    bare, expected = (text.strip().lower().removeprefix("0x") for text in (stored, computed))

    def verdict(word: Verdict, reason: str) -> EmbeddedHash:
        return EmbeddedHash(key, stored, computed, word, reason)

    if expected and bare == expected:
        return verdict("same", "")
    if bare == EMPTY_SHA256[: len(bare)] and len(bare) >= 8:
        return verdict("bogus", "it is the hash of nothing: the trainer hashed an empty file")
    if bare == HASH_PLACEHOLDER[2:]:
        return verdict("bogus", "it was never filled in")
    if not expected:
        return verdict("unchecked", "the file's layout does not tell what was hashed")
    if not _HEX.fullmatch(bare):
        return verdict("bogus", "it is not a hash")
    return verdict(
        "differs", "the tensors were changed after it was written, or hashed in another order"
    )


def _legacy_of_copy(checkpoint: Checkpoint) -> str:
    """kohya's legacy hash, from the data alone; "" where the copy cannot be told.

    The copy's header has only `ss_` metadata, so its data begins earlier than this file's.
    """
    if len(checkpoint.files) > 1:
        return ""
    header = checkpoint.files[0].header
    training = {key: text for key, text in checkpoint.metadata.items() if key.startswith("ss_")}
    copied = lay_out(header.specs.values(), training, checkpoint.path)
    moved = header.data_start - copied.data_start
    stored = [spec.name for spec in header.specs.values() if spec.nbytes]
    ordered = [s.name for s in sorted(header.specs.values(), key=file_order) if s.nbytes]
    if stored != ordered or copied.data_start > _LEGACY.start:
        return ""
    start = min(_LEGACY.start + moved, header.file_bytes)
    stop = min(_LEGACY.stop + moved, header.file_bytes)
    with open_file(checkpoint.files[0].path) as stream:
        return hashlib.sha256(stream.read(stop - start, start)).hexdigest()[:8]


# --- the cache ---------------------------------------------------------------------------------


def cache_folder() -> Path | None:
    """The user's cache folder for ckptools; None where there is none.

    Sources: XDG Base Directory Specification 0.8 (relative paths are ignored); Apple's File
    System Programming Guide; Windows' known folder LocalAppData.
    """
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    local = os.environ.get("LOCALAPPDATA", "")
    try:
        if os.name == "nt":
            return (Path(local) if local else Path.home() / "AppData" / "Local") / "ckptools"
        if Path(xdg).is_absolute():
            return Path(xdg) / "ckptools"
        mac = sys.platform == "darwin"
        return Path.home() / ("Library/Caches" if mac else ".cache") / "ckptools"
    except RuntimeError:  # a user without a home
        return None


Stamp = tuple[str, int, int, int, int]


def _stamp(path: Path) -> Stamp:
    """What changes when a file does: (path, size, mtime, ctime, inode), times in ns."""
    try:
        info = path.stat()
    except OSError as exc:
        raise InputError(f"cannot be read: {exc.strerror}", where=str(path)) from exc
    where = str(path.absolute())
    return (where, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)


def _cache_file(path: Path) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    return folder / "hashes" / f"{name}.json"


def _recall(path: Path, stamps: Sequence[Stamp]) -> _Measured | None:
    """What was found before, if the files are the same and nothing about the entry is odd."""
    file = _cache_file(path)
    if file is None:
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        ours = (document["schema"], document["version"]) == (_CACHE_SCHEMA, version())
        if not ours or document["stamps"] != [list(stamp) for stamp in stamps]:
            return None
        measured = _from_json(document["hashes"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    newer = _blake3() is not None and any(item.blake3 is None for item in measured.files)
    return None if newer or len(measured.files) != len(stamps) else measured


def _from_json(document: Mapping[str, Any]) -> _Measured:
    """An entry's hashes; `ValueError`, `KeyError` or `TypeError` for what we did not write."""

    def checked(text: object) -> str:
        if not isinstance(text, str) or not _HEX.fullmatch(text):
            raise ValueError("not a hash")
        return text

    def optional(text: object) -> str | None:
        return None if text is None else checked(text)

    return _Measured(
        files=tuple(
            FileHashes(
                path=Path(item["path"]),
                nbytes=int(item["nbytes"]),
                sha256=checked(item["sha256"]),
                sha256_data=optional(item["sha256_data"]),
                legacy=checked(item["legacy"]),
                crc32=checked(item["crc32"]),
                blake3=optional(item["blake3"]),
            )
            for item in document["files"]
        ),
        sha256_data=optional(document["sha256_data"]),
        components={str(name): checked(text) for name, text in document["components"].items()},
        content=optional(document["content"]),
    )


def _remember(path: Path, stamps: Sequence[Stamp], measured: _Measured) -> None:
    """Keep what was found; a cache that cannot be written to is no reason to fail."""
    file = _cache_file(path)
    youngest = max(mtime_ns for _, _, mtime_ns, _, _ in stamps)
    if file is None or time.time_ns() - youngest < _RACY_S * 1e9:
        return
    document = {
        "schema": _CACHE_SCHEMA,
        "version": version(),
        "stamps": stamps,
        "hashes": asdict(measured),
    }
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as part:
            try:
                json.dump(document, part, default=str)
                part.close()
                Path(part.name).replace(file)
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise
