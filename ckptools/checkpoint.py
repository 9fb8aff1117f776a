"""Checkpoints on disk: strict header reading, shards, and reads into buffers you own.

Headers are read and checked without torch; values move only through `Checkpoint.read_into`.
Must not know recipes, families or what the numbers mean.

Source of the format: safetensors 0.8.0, README "Format" and `tensor.rs` (`read_metadata`,
`Metadata::validate`). Where the README says MUST, this reader is stricter than the reference:
duplicate keys and a header that does not start with `{` are errors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn, Self

from ckptools.errors import InputError, InvalidFileError, UnsafeError
from ckptools.filetypes import SNIFF_BYTES, FileType, file_type, special_file
from ckptools.hubref import shown
from ckptools.tensors import DTYPES, TensorSpec

MAX_HEADER_BYTES = 100_000_000
MAX_INDEX_BYTES = 100_000_000
_U64_MAX = 2**64 - 1
_STRUCT = {
    "F16": "<e", "F32": "<f", "F64": "<d", "I8": "<b", "I16": "<h", "I32": "<i", "I64": "<q",
    "U8": "<B", "U16": "<H", "U32": "<I", "U64": "<Q", "BOOL": "<?",
}  # fmt: skip
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_INDEX_SUFFIX = ".index.json"
_VARIANT_INDEX = re.compile(
    r".*\.safetensors\.index\.[\w-]+\.json"
)  # x.safetensors.index.fp16.json
_MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_HASH_CHUNK = 1 << 20


@dataclass(frozen=True)
class Header:
    """One parsed safetensors header.

    specs       tensors in file order
    starts      tensor name -> byte offset of its data from the start of the file
    metadata    the `__metadata__` strings
    data_start  byte offset of the data section, 8 + header length
    file_bytes  size of the whole file
    sha256      of the first `data_start` bytes (length field and JSON)
    warnings    legal oddities that the reference accepts and the format's README does not describe
    """

    specs: Mapping[str, TensorSpec]
    starts: Mapping[str, int]
    metadata: Mapping[str, str]
    data_start: int
    file_bytes: int
    sha256: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Identity:
    """What tells whether a file was replaced while it was being read."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, descriptor: int | Path) -> Identity:
        """The identity of an open file or of a path."""
        info = os.stat(descriptor)  # noqa: PTH116  # a descriptor has no Path
        return cls(info.st_size, info.st_mtime_ns, info.st_ino)


# --- one file ----------------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """Parse and check the header of one safetensors file; reads no tensor data.

    Raises `InvalidFileError` with a diagnosis a person can act on, `InputError` where the file
    cannot be opened.
    """
    with open_file(path) as stream:
        return _read_header(stream, path)


def _read_header(stream: Descriptor, path: Path) -> Header:
    return header_by(stream.read, _regular_size(stream, path), path)


def header_by(read: Callable[[int, int], bytes], size: int, path: Path) -> Header:
    """The header of a file that is read by a function of (length, offset), at most twice.

    size  of the whole file, in bytes
    """
    head = read(min(size, SNIFF_BYTES), 0)
    if size < 8:
        diagnosis = _diagnose(head, path)
        raise diagnosis or _invalid(path, f"only {size} bytes, too small for a header", _AGAIN)
    length = int.from_bytes(head[:8], "little")
    if length > min(size - 8, MAX_HEADER_BYTES) or length == 0:
        raise _diagnose(head, path) or _bad_length(path, length, size)
    raw = read(length, 8)
    if not raw.startswith(b"{"):
        raise _diagnose(head, path) or _invalid(
            path, f"the header must begin with '{{', it begins with {raw[:8]!r}", _AGAIN
        )
    digest = hashlib.sha256(head[:8] + raw).hexdigest()
    header = _PARSED.get((digest, size))
    if header is None:
        header = parse_header(raw, data_start=8 + length, file_bytes=size, path=path, sha256=digest)
        if len(_PARSED) >= _MOST_PARSED:
            _PARSED.clear()
        _PARSED[digest, size] = header
    return header


# Models of one family, written by one program, often have the very same header.
_PARSED: dict[tuple[str, int], Header] = {}
_MOST_PARSED = 8


def parse_header(
    raw: bytes, *, data_start: int, file_bytes: int, path: Path, sha256: str = ""
) -> Header:
    """Check the JSON of a header against the size of its file.

    raw         the JSON bytes
    data_start  where tensor data begins, in bytes from the start of the file
    file_bytes  size of the whole file
    """
    document = _parse_json(raw, path)
    warnings: list[str] = []
    metadata = _metadata(document.pop("__metadata__", {}), path, warnings)
    entries = [_entry(name, value, path, warnings) for name, value in document.items()]
    entries.sort(key=lambda entry: (entry[1], entry[2], entry[0].name))
    _check_coverage(entries, file_bytes - data_start, path)
    return Header(
        specs=MappingProxyType({spec.name: spec for spec, _, _ in entries}),
        starts=MappingProxyType({spec.name: data_start + start for spec, start, _ in entries}),
        metadata=MappingProxyType(metadata),
        data_start=data_start,
        file_bytes=file_bytes,
        sha256=sha256,
        warnings=tuple(warnings),
    )


_AGAIN = "download or copy the file again"


def _regular_size(stream: Descriptor, path: Path) -> int:
    info = os.fstat(stream.fileno())
    special = special_file(info.st_mode)
    if special is not None:
        raise InputError(special.what, where=str(path), fix=special.fix)
    return info.st_size


def _invalid(path: Path, what: str, fix: str = _AGAIN) -> InvalidFileError:
    return InvalidFileError(what, where=str(path), fix=fix)


def _bad_length(path: Path, length: int, size: int) -> InvalidFileError:
    if length == 0:
        return _invalid(path, "the header is empty (length 0)")
    if length > MAX_HEADER_BYTES:
        if length > size:
            return _invalid(
                path,
                "not a safetensors file, nor one of another known kind (it would have a header of "
                f"{length:,} bytes; limit 100 MB)",
                "give a .safetensors, .ckpt, .pt or .bin file of a model",
            )
        return _invalid(path, f"the header is too long: {length:,} bytes (limit 100 MB)")
    return _invalid(
        path,
        f"truncated inside the header: it needs {length + 8:,} bytes, the file has {size:,}",
    )


def _diagnose(head: bytes, path: Path) -> InvalidFileError | None:
    """What a file that is not safetensors really is, told from its first bytes."""
    found = file_type(head)
    return _invalid(path, found.what, found.fix) if found else None


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 300
_REPR.maxlist = 12


def _shown(value: object) -> str:
    """A value of a header as a message shows it: a header may hold a name of 100 MB."""
    return _REPR.repr(value)


class _BadJsonError(Exception):
    """A JSON rule that Python's parser does not enforce; carried out of its hooks."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _BadJsonError(f"duplicate key {_shown(key)}")
            seen.add(key)
    return result


def _integer(text: str) -> int:
    if text.startswith("-"):
        raise _BadJsonError(f"negative number {text[:24]}")
    value = int(text) if len(text) <= 20 else _U64_MAX + 1
    if value > _U64_MAX:
        raise _BadJsonError(f"number {text[:24]} does not fit 64 bits")
    return value


def _constant(text: str) -> NoReturn:
    raise _BadJsonError(f"{text} is not JSON")


def _parse_json(
    raw: bytes, path: Path, *, what: str = "header", start: int = 8
) -> dict[str, object]:
    """The JSON object at byte `start` of a file; errors call it `what` and name the byte."""
    try:
        text = raw.decode("utf-8")
        document = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant
        )
    except UnicodeDecodeError as exc:
        raise _invalid(path, f"the {what} is not UTF-8 (byte {exc.start + start})") from exc
    except json.JSONDecodeError as exc:
        byte = start + len(text[: exc.pos].encode())
        raise _invalid(path, f"the {what} is not JSON: {exc.msg} (byte {byte})") from exc
    except _BadJsonError as exc:
        raise _invalid(path, f"the {what} breaks the format: {exc}") from exc
    except RecursionError as exc:
        raise _invalid(path, f"the {what} is nested too deeply") from exc
    if not isinstance(document, dict):
        raise _invalid(path, f"the {what} is a JSON {type(document).__name__}, not an object")
    return document


def _check_text(text: str, path: Path) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise _invalid(path, f"lone surrogate in {_shown(text)}") from exc


def _metadata(value: object, path: Path, warnings: list[str]) -> dict[str, str]:
    if value is None:
        warnings.append("`__metadata__` is null")
        return {}
    if not isinstance(value, dict):
        raise _invalid(path, f"`__metadata__` is a {type(value).__name__}, not an object")
    for key, item in value.items():
        if not isinstance(item, str):
            raise _invalid(path, f"metadata {_shown(key)} is a {type(item).__name__}, not a string")
        _check_text(key, path)
        _check_text(item, path)
    return value


def _entry(
    name: str, value: object, path: Path, warnings: list[str]
) -> tuple[TensorSpec, int, int]:
    """One tensor's (spec, start, end), offsets within the data section."""
    _check_text(name, path)
    if not isinstance(value, dict):
        raise _invalid(path, f"{_shown(name)} is a {type(value).__name__}, not an object")
    missing = _ENTRY_KEYS - value.keys()
    if missing:
        raise _invalid(path, f"{_shown(name)} has no {sorted(missing)[0]!r}")
    for key in sorted(value.keys() - _ENTRY_KEYS):
        if isinstance(value[key], dict | list) or value[key] in (math.inf, -math.inf):
            raise _invalid(path, f"{_shown(name)} has an unknown field {_shown(key)}")
        _check_text(key, path)
        _check_text(value[key] if isinstance(value[key], str) else "", path)
        warnings.append(f"{_shown(name)} has an unknown field {_shown(key)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _invalid(
            path,
            f"{_shown(name)} has the unknown dtype {_shown(dtype)}",
            "is it written by a newer version?",
        )
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise _invalid(path, f"{_shown(name)} has the shape {_shown(shape)}, not a list of sizes")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(offset) is not int for offset in offsets)
    ):
        raise _invalid(path, f"{_shown(name)} has the offsets {_shown(offsets)}, not [start, end]")
    start, end = offsets
    _check_size(name, dtype, shape, end - start, path)
    return TensorSpec(name, dtype, tuple(shape)), start, end


def _check_size(name: str, dtype: str, shape: Sequence[int], nbytes: int, path: Path) -> None:
    numel = 1
    for size in shape:  # in the reference's order: it refuses any overflow on the way
        numel *= size
        if numel > _U64_MAX:
            raise _invalid(path, f"{_shown(name)} has the impossible shape {_shown(list(shape))}")
    bits = numel * DTYPES[dtype].bits
    if bits > _U64_MAX:
        raise _invalid(path, f"{_shown(name)} has the impossible shape {_shown(list(shape))}")
    if bits % 8 or bits // 8 != nbytes:
        raise _invalid(
            path,
            f"{_shown(name)} is {dtype} {_shown(list(shape))}, {bits / 8:,.10g} bytes, "
            f"but its offsets span {nbytes:,}",
        )


def _check_coverage(
    entries: Sequence[tuple[TensorSpec, int, int]], data_bytes: int, path: Path
) -> None:
    """Tensors must touch, from byte 0 of the data to its end: no holes, no overlaps, no rest."""
    position, previous = 0, ""
    for spec, start, end in entries:
        if start != position:
            what = "overlaps" if start < position else "leaves a hole after"
            before = _shown(previous) if previous else "the start"
            name = _shown(spec.name)
            raise _invalid(
                path, f"{name} at bytes {start:,} to {end:,} {what} {before} (at {position:,})"
            )
        position, previous = end, spec.name
    if position > data_bytes:
        percent = 100 * data_bytes / position
        raise _invalid(
            path,
            f"truncated: {data_bytes:,} of {position:,} data bytes are there ({percent:.1f} %)",
        )
    if position < data_bytes:
        raise _invalid(path, f"{data_bytes - position:,} bytes follow the last tensor")


# --- reading at an offset ----------------------------------------------------------------------


def open_file(path: Path) -> Descriptor:
    """A file opened for reads at an offset, or an `InputError` that says why not."""
    try:
        return Descriptor(path)
    except FileNotFoundError as exc:
        raise InputError("no such file", where=str(path), fix=_similar_files(path)) from exc
    except (OSError, ValueError) as exc:  # ValueError: a path with a NUL in it
        special = _special(path)
        if special is not None:  # a socket cannot even be opened
            raise InputError(special.what, where=str(path), fix=special.fix) from exc
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise InputError(
            f"cannot be opened: {reason}", where=str(path), fix="check the path"
        ) from exc


def _special(path: Path) -> FileType | None:
    try:
        return special_file(path.stat().st_mode)
    except (OSError, ValueError):
        return None


def _similar_files(path: Path) -> str:
    """A hint that names files that are there, the one first that may be meant."""
    if path.as_posix().find(":/") > 1:
        return "web addresses are not read: download it, or use hf://owner/repo/file"
    parent = path.parent
    try:
        there = sorted(item.name for item in parent.iterdir() if item.suffix in _MODEL_SUFFIXES)
    except FileNotFoundError:
        return f"the folder {str(parent)!r} does not exist either"
    except OSError:  # not a folder, or one that may not be listed
        return "check the path"
    if not there:
        return "check the path"
    for name in there:
        if Path(name).stem.casefold() == path.stem.casefold():
            return f"did you mean {name!r}?"
    shown = ", ".join(there[:6]) + (", …" if len(there) > 6 else "")
    return f"in that folder: {shown}"


def file_sha256(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """The sha256 of a whole file, read in pieces.

    advance  is told the size of each piece
    """
    digest = hashlib.sha256()
    nbytes = path.stat().st_size
    buffer = memoryview(bytearray(_HASH_CHUNK))
    with open_file(path) as stream:
        for offset in range(0, nbytes, _HASH_CHUNK):
            chunk = buffer[: min(_HASH_CHUNK, nbytes - offset)]
            stream.read_into(chunk, offset)
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


class Descriptor:
    """A file opened for reads at an offset, from any thread. Knows nothing of formats."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        self.path = path
        self._number = os.open(path, flags)
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The open descriptor."""
        return self._number

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from byte `offset` on; the whole of it or `InputError`."""
        done = 0
        while done < len(view):
            try:
                count = self._read_once(view[done:], offset + done)
            except OSError as exc:
                raise InputError(
                    f"cannot be read: {exc.strerror or exc}", where=str(self.path)
                ) from exc
            if count == 0:
                raise InputError(
                    "the file became shorter while it was read", where=str(self.path), fix=_AGAIN
                )
            done += count

    def read(self, length: int, offset: int) -> bytes:
        """The `length` bytes from byte `offset` on: for headers."""
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def _read_once(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._number, [view], offset)
        with self._lock:  # Windows: no positional read
            os.lseek(self._number, offset, os.SEEK_SET)
            data = os.read(self._number, len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the descriptor; later reads fail."""
        if self._number >= 0:
            os.close(self._number)
            self._number = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- checkpoints -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceFile:
    """One file of a checkpoint: where it is, what its header said, what identifies it.

    identity  None for a file that is not on this machine
    head      of such a file, its first bytes as far as they were read
    """

    path: Path
    header: Header
    identity: Identity | None
    head: bytes = field(default=b"", repr=False)


class _Head:
    """The first bytes of a file that is elsewhere, read like a file."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self._data = data

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from byte `offset` on, or raise `InputError`: the rest is not here."""
        data = self._data[offset : offset + len(view)]
        if len(data) < len(view):
            raise InputError(
                "only the header was read, and this needs values",
                where=shown(self.path),
                fix="download the file (`hf download`) and give its path",
            )
        view[:] = data

    def close(self) -> None:
        """Nothing to close."""


def _number(data: bytes, dtype: str, name: str) -> float:
    """One number from its bytes.

    Source of fp8: Micikevicius et al. 2022, arXiv 2209.05433: e5m2 is the upper half of fp16;
    e4m3 has a bias of 7, no infinity, and NaN only where all bits but the sign are set.
    """
    if dtype == "BF16":
        data, dtype = b"\0\0" + data, "F32"
    elif dtype == "F8_E5M2":
        data, dtype = b"\0" + data, "F16"
    elif dtype == "F8_E4M3":
        sign, exponent, mantissa = data[0] >> 7, data[0] >> 3 & 15, data[0] & 7
        size = (
            math.nan
            if data[0] & 127 == 127
            else (math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9))
        )
        return -size if sign else size
    if dtype not in _STRUCT:
        raise InputError(
            f"{name!r} is {dtype}, which is not read as a number", fix="store it as F32"
        )
    return float(struct.unpack(_STRUCT[dtype], data)[0])


@dataclass(frozen=True)
class Extent:
    """Where a run of a tensor's elements lies, in the tensor's own order.

    file     index among the checkpoint's files
    start    byte offset of the run's first element in that file
    nbytes   of the run as the tensor has it, not of what it spans in the file
    strides  (size, stride in elements) of each dim, the outermost first; () where the elements
             follow one another
    """

    file: int
    start: int
    nbytes: int
    strides: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint that does not store them as a safetensors header says.

    specs    by name
    extents  name -> its runs of elements, one after the other
    layout   "diffusers" where the names given here are not the file's own, else ""
    """

    specs: Mapping[str, TensorSpec]
    extents: Mapping[str, tuple[Extent, ...]]
    layout: str = ""


class Checkpoint(Mapping[str, TensorSpec]):
    """A lazy mapping of tensor names to specs, over one file or many.

    Values come only through `read_into`, into memory the caller owns. Close it when done.

    layout  "diffusers" where a folder's tensors are shown under their single-file names, else ""
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[SourceFile],
        metadata: Mapping[str, str] | None = None,
        *,
        tensors: Tensors | None = None,
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.files = tuple(files)
        self.metadata = files[0].header.metadata if metadata is None else metadata
        self._warnings = warnings
        tensors = tensors or _as_stored(self.files)
        self.layout = tensors.layout
        self._specs, self._extents = tensors.specs, tensors.extents
        self._open: dict[int, Descriptor | _Head] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> TensorSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    @property
    def file_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.header.file_bytes for file in self.files)

    @property
    def header_sha256(self) -> str:
        """Identifies names, shapes, dtypes and metadata: sha256 of the header (or headers)."""
        if len(self.files) == 1:
            return self.files[0].header.sha256
        return hashlib.sha256("".join(f.header.sha256 for f in self.files).encode()).hexdigest()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Oddities of the headers or the index that do not stop a merge."""
        return (*self._warnings, *(text for file in self.files for text in file.header.warnings))

    def has_values(self, name: str) -> bool:
        """Whether a tensor can be read; not where its file is elsewhere and only its head here."""
        return all(
            (file := self.files[extent.file]).identity is not None
            or (not extent.strides and extent.start + extent.nbytes <= len(file.head))
            for extent in self._extents[name]
        )

    @property
    def is_elsewhere(self) -> bool:
        """Whether some file of it is not on this machine."""
        return any(file.identity is None for file in self.files)

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Where a tensor's elements lie: runs in its own order."""
        return self._extents[name]

    def read_into(self, name: str, view: memoryview, offset: int = 0) -> None:
        """Fill `view` (bytes) with the tensor's data from byte `offset` of the tensor on."""
        spec = self._specs[name]
        if offset + len(view) > spec.nbytes:
            raise ValueError(f"read past the end of {name!r}")
        for extent in self._extents[name]:
            if offset >= extent.nbytes:
                offset -= extent.nbytes
                continue
            part = view[: extent.nbytes - offset]
            file = self._descriptor(extent.file)
            if extent.strides:
                _gather(file, extent, DTYPES[spec.dtype].bits // 8, part, offset)
            else:
                file.read_into(part, extent.start + offset)
            view, offset = view[len(part) :], 0
            if not view:
                return

    def read(self, name: str) -> bytes:
        """All bytes of one tensor: for small ones."""
        data = bytearray(self._specs[name].nbytes)
        self.read_into(name, memoryview(data))
        return bytes(data)

    def read_number(self, name: str) -> float:
        """The value of a tensor that is one number, such as an adapter's alpha."""
        return _number(self.read(name), self._specs[name].dtype, name)

    def check_unchanged(self) -> None:
        """Raise `InputError` if a file was replaced or written to since it was opened."""
        for file in self.files:
            if file.identity is None:
                continue
            try:
                unchanged = Identity.of(file.path) == file.identity
            except OSError:
                unchanged = False
            if not unchanged:
                raise InputError(
                    "the file changed while it was being read",
                    where=str(file.path),
                    fix="run it again when nothing writes to it",
                )

    def _descriptor(self, number: int) -> Descriptor | _Head:
        found = self._open.get(number)
        if found is None:
            with self._lock:
                found = self._open.get(number) or _opened(self.files[number])
                self._open[number] = found
        return found

    def close(self) -> None:
        """Close every file; the specs stay readable."""
        for descriptor in self._open.values():
            descriptor.close()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _opened(file: SourceFile) -> Descriptor | _Head:
    return _Head(file.path, file.head) if file.identity is None else open_file(file.path)


def _as_stored(files: Sequence[SourceFile]) -> Tensors:
    specs: dict[str, TensorSpec] = {}
    extents: dict[str, tuple[Extent, ...]] = {}
    for number, file in enumerate(files):
        specs.update(file.header.specs)
        for name, start in file.header.starts.items():
            extents[name] = (Extent(number, start, specs[name].nbytes),)
    return Tensors(specs, extents)


def _gather(
    file: Descriptor | _Head, extent: Extent, width: int, view: memoryview, offset: int
) -> None:
    """Fill `view` with elements that do not follow one another, from byte `offset` of the run on.

    Reads what the wanted rows of the outermost dim span, so a transposed tensor is read whole.
    width: bytes of an element; `offset` and `view` hold whole elements.
    """
    import numpy as np

    (_, row_stride), *inner = extent.strides
    row = math.prod(size for size, _ in inner)  # elements of one row
    first, last = offset // width // row, -(-(offset + len(view)) // (width * row))
    shape = (last - first, *(size for size, _ in inner))
    strides = (row_stride, *(stride for _, stride in inner))
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    raw = bytearray(span * width)
    file.read_into(memoryview(raw), extent.start + first * row_stride * width)
    stored = np.frombuffer(raw, np.dtype((np.void, width)))
    rows = np.lib.stride_tricks.as_strided(stored, shape, [stride * width for stride in strides])
    skip = offset - first * row * width
    view[:] = np.ascontiguousarray(rows).tobytes()[skip : skip + len(view)]


def open_safetensors(path: Path) -> Checkpoint:
    """Open a `.safetensors` file, or a `*.index.json` of shards.

    Reads headers only. Raises `InputError`, `InvalidFileError`, or `UnsafeError` for an index
    whose paths leave its folder.
    """
    if is_index(path.name):
        return open_index(path)
    return Checkpoint(path, [source_file_of(path)])


def is_index(name: str) -> bool:
    """Whether a file of this name lists shards."""
    return name.endswith(_INDEX_SUFFIX) or bool(_VARIANT_INDEX.fullmatch(name))


def shards_of(index: Path) -> tuple[str, ...]:
    """The shards that an index names, sorted; `UnsafeError` for one outside its folder."""
    shards = sorted(set(_read_index(index).weight_map.values()))
    for shard in shards:
        _shard_path(index, shard)
    return tuple(shards)


def json_beside(path: Path, name: str) -> dict[str, object] | None:
    """The JSON object in the file `name` beside a checkpoint, or None where there is no such file.

    Raises `InputError` for one that cannot be read or is no object.
    """
    return read_json_object(path.parent / name)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is no such file; raises as `json_beside`."""
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise InputError(f"cannot be read: {exc}", where=str(path)) from exc
    if not isinstance(document, dict):
        raise InputError("is not a JSON object", where=str(path))
    return document


def is_folder(path: Path) -> bool:
    """Whether a path is a folder that may be looked into."""
    try:
        return path.is_dir()
    except OSError:  # no right to look: opening it tells why
        return False


def source_file_of(path: Path) -> SourceFile:
    """One file of this machine, its header read."""
    with open_file(path) as stream:
        header = _read_header(stream, path)
        return SourceFile(path, header, Identity.of(stream.fileno()))


def shards_named_in(indexes: Iterable[Path]) -> set[str]:
    """File names that indexes name; of one that cannot be read none: opening it says why."""
    named: set[str] = set()
    for index in indexes:
        with suppress(InputError):
            named |= set(_read_index(index).weight_map.values())
    return named


def weights_in(folder: Path) -> Path:
    """The one file of weights in a folder, or the index of its shards.

    Raises `InputError` where there is none, or no telling which.
    """
    try:
        there = sorted(folder.iterdir())
    except OSError as exc:
        raise InputError(f"cannot be opened: {exc.strerror}", where=str(folder)) from exc
    indexes = [item for item in there if item.name.endswith(_INDEX_SUFFIX)]
    shards = shards_named_in(indexes)
    candidates = [
        *indexes,
        *(x for x in there if x.suffix == ".safetensors" and x.name not in shards),
    ]
    candidates = candidates or [item for item in there if item.suffix in _MODEL_SUFFIXES]
    if len(candidates) == 1:
        return candidates[0]
    names = ", ".join(item.name for item in candidates[:8])
    raise InputError(
        f"a folder with {len(candidates)} candidate files"
        if candidates
        else "a folder without models",
        where=str(folder),
        fix=f"give one of them: {names}"
        if candidates
        else "give a file, or the folder that it is in",
    )


@dataclass(frozen=True)
class _Index:
    """A parsed `*.index.json`: tensor name -> shard file name, and the size it claims."""

    weight_map: Mapping[str, str]
    total_size: int | None
    metadata: Mapping[str, str] = field(default_factory=dict)


def open_index(
    path: Path, source_file: Callable[[Path], SourceFile] = source_file_of
) -> Checkpoint:
    """Open shards by their index.

    source_file  opens one shard, once it is known that no shard leaves the index's folder
    """
    index = _read_index(path)
    shards = sorted(set(index.weight_map.values()))
    files = _shards_at([_shard_path(path, shard) for shard in shards], path, source_file)
    homes: dict[str, str] = {}
    for shard, file in zip(shards, files, strict=True):
        for name in file.header.specs:
            if name in homes:
                raise _invalid(
                    path, f"{_shown(name)} is in two shards, {homes[name]!r} and {shard!r}"
                )
            homes[name] = shard
    for name, shard in index.weight_map.items():
        if homes.get(name) != shard:
            where = f"it is in {homes[name]!r}" if name in homes else "it is in none"
            raise _invalid(path, f"{_shown(name)} should be in {shard!r}, {where}")
    unlisted = homes.keys() - index.weight_map.keys()
    if unlisted:
        raise _invalid(path, f"{_shown(min(unlisted))} is in a shard but not in the index")
    return Checkpoint(
        path,
        files,
        index.metadata or files[0].header.metadata,
        warnings=_size_warning(index, files),
    )


def _shards_at(
    shards: Sequence[Path], index: Path, source_file: Callable[[Path], SourceFile]
) -> list[SourceFile]:
    """Every shard, open; those that are not there are named in one error, the index's."""
    files: list[SourceFile] = []
    missing: dict[str, str] = {}  # its name -> what is there instead
    for shard in shards:
        try:
            files.append(source_file(shard))
        except InputError as exc:
            if not isinstance(exc.__cause__, FileNotFoundError):
                raise
            missing[shard.name] = exc.fix
    if missing:
        names, fixes = [*missing], [*missing.values()]
        listed = ", ".join(names[:3]) + (", …" if names[3:] else "")
        what = f"{len(names)} of its {len(shards)} shards are" if names[1:] else "a shard is"
        fix = "; ".join(part for part in ("get the whole model again", fixes[0]) if part)
        raise _invalid(index, f"{what} not there: {listed}", fix)
    return files


def _size_warning(index: _Index, files: Sequence[SourceFile]) -> tuple[str, ...]:
    total = sum(spec.nbytes for file in files for spec in file.header.specs.values())
    if index.total_size in (None, total):
        return ()
    return (f"the index says {index.total_size:,} bytes, its shards hold {total:,}",)


def _read_index(path: Path) -> _Index:
    with open_file(path) as stream:
        size = _regular_size(stream, path)
        if size > MAX_INDEX_BYTES:
            raise _invalid(path, "the index is larger than 100 MB")
        raw = stream.read(size, 0)
    document = _parse_json(raw, path, what="index", start=0)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _invalid(path, "the index has no `weight_map`")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise _invalid(path, f"the shard of {_shown(name)} is {_shown(shard)}, not a file name")
        _check_text(shard, path)
    metadata = document.get("metadata")
    entries = metadata if isinstance(metadata, dict) else {}
    for key, text in entries.items():
        _check_text(key, path)
        _check_text(text if isinstance(text, str) else "", path)
    total = entries.get("total_size")
    return _Index(
        MappingProxyType(weight_map),
        total if isinstance(total, int) else None,
        MappingProxyType({key: text for key, text in entries.items() if isinstance(text, str)}),
    )


def _shard_path(index: Path, shard: str) -> Path:
    """The shard's path, if it stays inside the index's folder; else `UnsafeError`.

    Symbolic links may leave it only as the Hub's cache lays them:
    snapshots/<revision>/[folder/]x -> blobs/y.
    """
    pure = PurePosixPath(shard)
    unsafe = (
        not shard
        or pure.is_absolute()
        or ".." in pure.parts
        or any(char in shard for char in "\\:\0")
        or not shard.endswith(".safetensors")
    )
    if not unsafe:
        try:
            root = index.parent.resolve()
            target = (index.parent / pure).resolve()
        except RuntimeError as exc:
            raise _invalid(index, f"the shard {shard!r} is a symbolic link to itself") from exc
        in_cache = any(
            folder.name == "snapshots" and target.parent == folder.parent / "blobs"
            for folder in root.parents
        )
        unsafe = not (target.is_relative_to(root) or in_cache)
    if unsafe:
        raise UnsafeError(
            f"the index points outside its folder: {shard!r}",
            where=str(index),
            fix="do not use this file; a real index names files beside it",
        )
    return index.parent / pure
