"""Safetensors output: the layout before the first byte, the file under its name only when whole.

Must not know recipes or formulas. Any thread may write anywhere: every offset is known up front.

Source of the format: safetensors 0.8.0, README "Format" and `tensor.rs` (`prepare`).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ckptools.errors import OutputError
from ckptools.interrupts import finished, held_back
from ckptools.tensors import TensorSpec, file_order

PART_SUFFIX = ".part"
MANIFEST_SUFFIX = ".ckptools.json"
MANIFEST_SCHEMA = "ckptools.manifest/1"
_FLUSHED_BYTES = 1 << 26  # what is brought to the disk at a time while more is being made
_PATIENCE_S = 3.0  # a disk that takes longer for that is waited for once, at the end


@dataclass(frozen=True)
class Layout:
    """One output file before it exists.

    path        its final name
    specs       tensors in file order
    starts      tensor name -> byte offset in the file
    header      the first bytes of the file: length field, JSON, padding to 8
    file_bytes  size of the whole file
    """

    path: Path
    specs: tuple[TensorSpec, ...]
    starts: Mapping[str, int]
    header: bytes
    file_bytes: int

    @property
    def data_start(self) -> int:
        """Byte offset of the data section."""
        return len(self.header)

    @property
    def part(self) -> Path:
        """Where the bytes lie until the file is whole."""
        return part_path(self.path)


def lay_out(specs: Iterable[TensorSpec], metadata: Mapping[str, str], path: Path) -> Layout:
    """The header and all offsets of a file, as the safetensors library would write them.

    Tensors by dtype (widest first), then name; metadata sorted by key; so the same tensors and
    metadata always give the same bytes.
    """
    ordered = tuple(sorted(specs, key=file_order))
    document: dict[str, object] = {}
    if metadata:
        document["__metadata__"] = dict(sorted(metadata.items()))
    position = 0
    offsets: dict[str, int] = {}
    for spec in ordered:
        offsets[spec.name] = position
        span = [position, position + spec.nbytes]
        document[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": span}
        position += spec.nbytes
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Layout(
        path=path,
        specs=ordered,
        starts={name: len(header) + offset for name, offset in offsets.items()},
        header=header,
        file_bytes=len(header) + position,
    )


def split_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Tensors dealt into shards, in file order, each at most `shard_bytes` of data.

    A tensor larger than that gets a shard of its own. One list when `shard_bytes` is 0.
    """
    ordered = sorted(specs, key=file_order)
    if shard_bytes == 0:
        return [ordered]
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in ordered:
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return shards


def shard_paths(path: Path, count: int) -> list[Path]:
    """`x.safetensors` for one file; `x-00001-of-00003.safetensors` … for more."""
    if count == 1:
        return [path]
    return [
        path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}.safetensors")
        for number in range(1, count + 1)
    ]


def is_shard(path: Path) -> bool:
    """Whether a file is named as one of several: what its header says is of all together."""
    return _SHARD.search(path.name) is not None


_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


def index_path(path: Path) -> Path:
    """The index beside the shards of `x.safetensors`."""
    return path.with_name(f"{path.name}.index.json")


def part_path(path: Path) -> Path:
    """Where `path` lies until it is whole: `x.safetensors.part`."""
    return path.parent / (path.name + PART_SUFFIX)


def manifest_path(output: Path) -> Path:
    """`x.safetensors` -> `x.safetensors.ckptools.json`."""
    return output.with_name(output.name + MANIFEST_SUFFIX)


def index_document(layouts: Sequence[Layout]) -> bytes:
    """The `*.index.json` of several shards.

    Source: huggingface_hub 2.4, `serialization/_base.py`, `StateDictSplit`.
    """
    total = sum(spec.nbytes for layout in layouts for spec in layout.specs)
    weight_map = {spec.name: layout.path.name for layout in layouts for spec in layout.specs}
    document = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


class PartFile:
    """A file being written at its `.part` name; it takes its final name in `commit`.

    As a context manager it removes the part on any failure. A part left by a killed process is
    taken over; one that another process is writing is refused.

    replaces  whether a file of the final name may be there, or appear meanwhile
    """

    def __init__(self, layout: Layout, *, replaces: bool = True) -> None:
        self.layout = layout
        self._replaces = replaces
        self._number = -1
        self._flusher: _Flusher | None = None
        self._ours = False

    def __enter__(self) -> Self:
        try:
            with held_back():
                _finish_link(self.layout)
                self._number = _open_locked(self.layout.part)
                self._ours = True
            if os.fstat(self._number).st_size:
                os.truncate(self._number, 0)
            os.truncate(self._number, self.layout.file_bytes)
            _reserve(self._number, self.layout.file_bytes)
            self._flusher = _Flusher(self._number)
            self.write(self.layout.header, 0)
        except OSError as exc:
            self._discard()
            raise output_error(exc, self.layout.path) from exc
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._discard()

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at byte `offset`, from any thread."""
        view = memoryview(data)
        try:
            while view:
                count = _write_once(self._number, view, offset)
                view, offset = view[count:], offset + count
                if self._flusher:
                    self._flusher.wrote(count)
        except OSError as exc:
            raise output_error(exc, self.layout.path) from exc

    def sync(self) -> None:
        """Wait until every byte is on the disk."""
        try:
            if self._flusher:
                self._flusher.end()
            os.fsync(self._number)
        except OSError as exc:
            raise output_error(exc, self.layout.path) from exc
        _forget(self._number)

    def check_free(self) -> None:
        """Raise `OutputError` where a file is in the way that may not be replaced."""
        if not self._replaces and os.path.lexists(self.layout.path):
            raise appeared(self.layout.path)

    def commit(self) -> None:
        """Give the file its final name; whatever had that name is replaced in one step."""
        self.check_free()
        try:
            if self._flusher:
                self._flusher.end()
            if os.name == "nt":
                self._close()
            if self._replaces or not self._link():
                self.layout.part.replace(self.layout.path)
        except FileExistsError as exc:
            raise appeared(self.layout.path) from exc
        except OSError as exc:
            raise output_error(exc, self.layout.path) from exc
        finished.append(self.layout.path)
        self._ours = False
        self._close()

    def _link(self) -> bool:
        """Take the final name only if nobody has it; False where the system has no hard links."""
        try:
            os.link(self.layout.part, self.layout.path)
        except FileExistsError:
            raise
        except OSError:
            return False
        with suppress(OSError):
            self.layout.part.unlink()
        return True

    def _close(self) -> None:
        if self._flusher:
            with suppress(OSError):
                self._flusher.end()
        if self._number >= 0:
            os.close(self._number)
        self._number, self._flusher = -1, None

    def _discard(self) -> None:
        if not self._ours:  # another process writes it, or it has its final name
            return
        with held_back():  # from a second Ctrl-C, too
            if os.name == "nt":  # which cannot remove an open file
                self._close()
            with suppress(OSError):
                self.layout.part.unlink()
            self._ours = False
            self._close()


class _Flusher:
    """Brings a file to the disk in a thread of its own while more of it is being written.

    Left to itself the system gathers the file in memory, and the end waits for nearly all of it.

    number  the open file's descriptor; `end` must come before it is closed
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._waiting = 0  # bytes written since the last time
        self._ended = not hasattr(os, "fdatasync")
        self._error: OSError | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def wrote(self, nbytes: int) -> None:
        """Count what was written, from any thread; raises what the disk said of earlier bytes."""
        with self._changed:
            self._raise()
            self._waiting += nbytes
            if self._ended or self._waiting < _FLUSHED_BYTES:
                return
            if self._thread is None:
                with held_back():
                    self._thread = threading.Thread(target=self._run, daemon=True)
                    self._thread.start()
            self._changed.notify()

    def end(self) -> None:
        """Stop; raises what the disk said, which the system says only once."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread:
            self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error:
            raise self._error

    def _run(self) -> None:
        duration = 0.0
        while duration < _PATIENCE_S:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._waiting >= _FLUSHED_BYTES)
                if self._ended:
                    return
                self._waiting = 0
            started = time.monotonic()
            try:
                os.fdatasync(self._number)
            except OSError as exc:
                self._error = exc
                return
            _forget(self._number)
            duration = time.monotonic() - started


def _forget(number: int) -> None:
    """Take what is on the disk out of the page cache, where the system can.

    A file that is read next week needs no room in memory today, and what is checked is read from
    the disk.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)


class PartFolder:
    """A folder being written at its `.part` name; it takes its final name in `commit`.

    As a context manager it removes the part, and all in it, on any failure. A part left by a killed
    process is emptied and taken over; one that another process is writing, or that holds what
    nobody left there, is refused.

    replaces  whether a folder of the final name may be there, or appear meanwhile
    """

    _LOCK = ".ckptools-lock"

    def __init__(self, path: Path, *, replaces: bool = True) -> None:
        self.path = path
        self._replaces = replaces
        self.part = part_path(path)
        self._number = -1

    def __enter__(self) -> Self:
        try:
            with held_back():
                self.part.mkdir(parents=True, exist_ok=True)
                there = {item.name for item in self.part.iterdir()}
                if there and self._LOCK not in there:
                    raise _in_the_way(self.part, "").at(str(self.path))
                self._number = _open_locked(self.part / self._LOCK)
            for item in self.part.iterdir():
                if item.name != self._LOCK:
                    _remove(item)
        except OSError as exc:
            self._discard()
            raise output_error(exc, self.path) from exc
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._discard()

    def commit(self) -> None:
        """Give the folder its final name; a folder of that name is put aside, then removed."""
        if not self._replaces and os.path.lexists(self.path):
            raise appeared(self.path)
        old = _free_name(self.path) if self.path.exists() else None
        try:
            with held_back():
                self._close()
                if old:
                    self.path.replace(old)
                try:
                    self.part.replace(self.path)
                except OSError:
                    if old:
                        old.replace(self.path)
                    raise
                (self.path / self._LOCK).unlink()  # last: by it the next run knows the part
        except OSError as exc:
            _remove(self.part)
            raise output_error(exc, self.path) from exc
        finished.append(self.path)
        if old:
            _remove(old)
        sync_folder(self.path.parent)

    def _close(self) -> None:
        if self._number >= 0:
            os.close(self._number)
            self._number = -1

    def _discard(self) -> None:
        if self._number >= 0:
            with held_back():
                self._close()
                _remove(self.part)


def open_parts(
    stack: ExitStack, layouts: Iterable[Layout], *, replaces: bool = True
) -> list[PartFile]:
    """Parts that the stack removes if they are not committed, whenever an interruption comes."""
    with held_back():
        return [stack.enter_context(PartFile(layout, replaces=replaces)) for layout in layouts]


def commit_parts(parts: Sequence[PartFile]) -> None:
    """Wait for the disk, then give all parts their names, with no interruption in between."""
    for part in parts:
        part.sync()
    with held_back():
        for part in parts:
            part.check_free()
        for part in parts:
            part.commit()


def _free_name(path: Path) -> Path:
    """A name beside a path that nobody uses: `x.old`, `x.old2`, …"""
    names = (path.with_name(f"{path.name}.old{number or ''}") for number in (0, *range(2, 1000)))
    return next(name for name in names if not os.path.lexists(name))


def _remove(path: Path) -> None:
    """Remove a file or a folder with all in it, as far as the system lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def whole_file(path: Path, data: bytes) -> Layout:
    """The layout of a small file that is known whole, such as an index or a manifest."""
    return Layout(path, (), {}, data, len(data))


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    if os.name == "nt":
        return
    with suppress(OSError):  # some network systems cannot sync a folder
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def appeared(path: Path) -> OutputError:
    """The error of an output that was not there when its making began."""
    return OutputError(
        f"the output {os.path.normpath(path)!r} was made by somebody else meanwhile",
        fix="write elsewhere, or use --force to replace it",
    )


def output_error(exc: OSError, path: Path) -> OutputError:
    """The user's view of an operating-system error while writing."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            "the disk is full; nothing was left behind",
            where=str(path),
            fix="free some space or write to another disk",
        )
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(
            "the folder cannot be written to", where=str(path), fix="check its rights"
        )
    if exc.errno == errno.EFBIG:
        return OutputError(
            "the file would be larger than a file may be here; nothing was left behind",
            where=str(path),
            fix="write smaller files (`shard_size: 2GB` of `output`, `--shard-size 2GB` of "
            "`convert`), write to another disk, or raise the limit (`ulimit -f unlimited`)",
        )
    if exc.errno == errno.ENAMETOOLONG:
        return OutputError(
            "the name is too long",
            where=str(path),
            fix=f"shorten it: {MANIFEST_SUFFIX + PART_SUFFIX} is put behind it meanwhile",
        )
    if exc.errno in (errno.EMFILE, errno.ENFILE):
        return OutputError(
            "more files than a process may have open here",
            where=str(path),
            fix="write larger shards (`shard_size`), or raise the limit (`ulimit -n`)",
        )
    return OutputError(f"cannot be written: {exc.strerror or exc}", where=str(path))


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder for what is written in it; where that fails, remove it if it is empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as exc:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if isinstance(exc, OSError):
            raise output_error(exc, folder) from exc
        raise


def _finish_link(layout: Layout) -> None:
    """Remove a part that has its final name already, too: whoever gave it that was killed then."""
    with suppress(OSError):
        if layout.part.samefile(layout.path) and not layout.part.is_symlink():
            layout.part.unlink()


def _open_locked(part: Path) -> int:
    """A descriptor of the part, new or left over, that no other process writes to.

    Between opening and locking, another process may have given the file its final name, or have
    removed it: writing on would damage a finished file. Then it is opened again.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0)  # nor through a link that somebody laid there
    while True:
        number = os.open(part, flags, 0o666)
        try:
            _lock(number, part)
            if _is_open_as(number, part):
                stranger = _stranger(number, part)
                if stranger:
                    raise stranger
                return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)


def part_problem(path: Path) -> OutputError | None:
    """What stands where the part of an output would; what a killed process left does not."""
    part = part_path(path)
    if not os.path.lexists(part) or (path.exists() and part.exists() and path.samefile(part)):
        return None
    if not part.is_file() or part.is_symlink():
        return _in_the_way(part, ": no file")
    try:
        with part.open("r+b") as file:
            return _stranger(file.fileno(), part)
    except OSError as exc:
        return _in_the_way(part, f", and cannot be written: {exc.strerror or exc}")


def _stranger(number: int, part: Path) -> OutputError | None:
    """What is wrong with an open part that was there before."""
    if os.fstat(number).st_nlink > 1:
        return _in_the_way(part, ": a file with other names, too")
    return None if _is_ours(number) else _in_the_way(part, ", and nothing that ckptools left")


def _in_the_way(part: Path, what: str) -> OutputError:
    shown = os.path.normpath(part)
    return OutputError(f"{shown!r} is in the way{what}", fix="remove it, or write elsewhere")


def _is_ours(number: int) -> bool:
    """Whether a part is one that a killed process may have left, by how it begins.

    It is empty, or zeros where its header was yet to come; a header that names ckptools; or the
    text of an index, a manifest, a lock or a page.
    """
    begin = os.pread(number, _SNIFFED, 0) if hasattr(os, "pread") else b""
    return (
        not begin.strip(b"\0")
        or _MARK in begin
        or begin.startswith((b"{\n", b"# The files that", b"<!doctype html"))
    )


_MARK, _SNIFFED = b"ckptools", 1 << 20
_TMPFS = 0x01021994  # linux/magic.h


def _reserve(number: int, nbytes: int) -> None:
    """Take the file's room on the disk at once, where the system can: `OSError` where it lacks.

    Nobody else can take it meanwhile. Not `posix_fallocate`: glibc writes a byte into every block
    where the file system has no such call. Nor in memory: there it clears every page, one after the
    other, before any thread can write.
    """
    if not sys.platform.startswith("linux") or not nbytes:
        return
    system = ctypes.CDLL(None, use_errno=True)
    about = (ctypes.c_long * 64)()  # `struct statfs`, which begins with the type
    if system.fstatfs(number, about) == 0 and about[0] == _TMPFS:
        return
    # musl, whose offsets always have 64 bits, has the short name alone
    fallocate = getattr(system, "fallocate64", None) or system.fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while fallocate(number, 0, 0, nbytes):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM):
            return  # it has no such call, or a sandbox forbids it
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _is_open_as(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


def _lock(number: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows refuses the replace instead
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise OutputError(
            "another process is writing this output", where=str(path), fix="wait for it, or stop it"
        ) from exc
    except OSError:  # a file system without locks
        return


_POSITION_LOCK = threading.Lock()


def _write_once(number: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(number, view, offset)
    with _POSITION_LOCK:  # Windows: the descriptor's position is shared by all threads
        os.lseek(number, offset, os.SEEK_SET)
        return os.write(number, view)
