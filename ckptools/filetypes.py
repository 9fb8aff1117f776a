"""What a file that is no model really is, told from its first bytes. Opens no file.

Source of the marks: each format's own specification.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path

SNIFF_BYTES = 512
_MODEL_SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}


@dataclass(frozen=True)
class FileType:
    """What a file is, in words, and what to do about it."""

    what: str
    fix: str


_AGAIN = "download or copy the file again"
_GIVE_MODEL = "give the model's own file"
_UNPACK = "unpack it, and give the model that is in it"
_PICKLE = "give the file itself: pickles are read as models, not as outputs or shards"
_NOT_READ = "give the model as .safetensors"

# (where, the bytes there, what such a file is, what to do)
_MARKS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"PK\x03\x04", "a zip archive: most likely a PyTorch pickle (.ckpt, .pt, .bin)", _PICKLE),
    (0, b"PK\x05\x06", "an empty zip archive", _GIVE_MODEL),
    *(
        (0, b"\x80" + bytes([protocol]), "a Python pickle (an old .ckpt or .pt)", _PICKLE)
        for protocol in (2, 3, 4, 5)
    ),
    (0, b"GGUF", "a GGUF file (quantised)", "use the unquantised file"),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture", _GIVE_MODEL),
    (0, b"\xff\xd8\xff", "a JPEG picture", _GIVE_MODEL),
    (0, b"GIF8", "a GIF picture", _GIVE_MODEL),
    (8, b"WEBP", "a WebP picture", _GIVE_MODEL),
    (4, b"ftyp", "a video or a picture (MP4, HEIC, AVIF)", _GIVE_MODEL),
    (0, b"%PDF-", "a PDF document", _GIVE_MODEL),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", _NOT_READ),
    (0, b"\x93NUMPY", "a NumPy array", _NOT_READ),
    (0, b"SQLite format 3\x00", "an SQLite database", _GIVE_MODEL),
    (0, b"\x7fELF", "a program", _GIVE_MODEL),
    (0, b"MZ", "a program", _GIVE_MODEL),
)
_LFS = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html", b"<head")
_JSON = re.compile(rb"\s*(?:\{\s*(?:[\"}]|\Z)|\[\s*(?:[\[{\"\-\d\]tfn]|\Z))")
_RECIPE = re.compile(r"^ckptools\s*:", re.MULTILINE)
_SHOWN_CHARS = 60


def as_safetensors(path: Path) -> Path:
    """The name of a safetensors file: its suffix replaces one of models, or is put behind."""
    if path.suffix.lower() in _MODEL_SUFFIXES:
        return path.with_suffix(".safetensors")
    return path.with_name(f"{path.name}.safetensors")


def file_type(head: bytes) -> FileType | None:
    """What a file is that begins like this, where that is known and it is no safetensors file.

    head  the first `SNIFF_BYTES` bytes, or all there are
    """
    if not head:
        return FileType("the file is empty (0 bytes)", _AGAIN)
    if head.startswith(_LFS):
        return _lfs_pointer(head.decode("utf-8", "replace"))
    stripped = head.lstrip().lower()
    if stripped.startswith(_PAGES):
        return FileType(
            "an HTML page, not a model: the download got an error or log-in page",
            "download it again, logged in where the site asks for it",
        )
    if stripped.startswith(b"<?xml"):
        return FileType(
            f"an XML document, not a model{_shown(_text(head))}",
            "download it again, logged in where the site asks for it",
        )
    for at, mark, what, fix in _MARKS:
        if head[at : at + len(mark)] == mark and _is_mark(head, mark):
            return FileType(f"{what}, not safetensors", fix)
    if head.count(0) == len(head):
        return FileType("the file begins with zeros only (an unfinished download)", _AGAIN)
    text = _text(head)
    return _text_type(head, text) if text else None


def _is_mark(head: bytes, mark: bytes) -> bool:
    """Short marks may stand at the begin of anything, a safetensors header among them."""
    return len(mark) > 2 or head[8:9] != b"{"


def _text_type(head: bytes, text: str) -> FileType:
    if _JSON.match(head):
        return FileType(
            f"a JSON file, not safetensors{_shown(text)}",
            "give the weights, or the *.index.json of shards",
        )
    if _RECIPE.search(text):
        return FileType("a recipe, not a model", "give the model that `ckptools merge` makes of it")
    return FileType(f"a text file, not a model{_shown(text)}", _GIVE_MODEL)


def _lfs_pointer(text: str) -> FileType:
    oid = re.search(r"oid sha256:([0-9a-f]{64})", text)
    size = re.search(r"size (\d+)", text)
    return FileType(
        "a Git LFS pointer, not the weights"
        + (f" (sha256 {oid[1][:12]}…" if oid else " (")
        + (f", {int(size[1]):,} bytes)" if size else ")"),
        "run `git lfs pull`, or download the file itself",
    )


def _text(head: bytes) -> str:
    """The file's begin as text; "" for what is none."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    try:
        text = head.decode(encoding)
    except UnicodeDecodeError as exc:
        cut = len(head) == SNIFF_BYTES and exc.start > len(head) - 4
        text = head[: exc.start].decode(encoding) if cut else ""
    plain = sum(32 <= byte < 127 or byte in b"\t\n\r" for byte in head)
    accented = sum(byte >= 0xA0 for byte in head)
    if not text and plain + accented == len(head) and plain > 2 * accented:
        text = head.decode("latin-1")
    text = text.removeprefix("\ufeff")
    return text if all(char.isprintable() or char in "\t\n\r\f" for char in text) else ""


def _shown(text: str) -> str:
    """The first words of a text: where a download failed, they say why.

    Only what reads as words or data: the file may hold a token alone.
    """
    line = next(iter(text.strip().splitlines()), "")
    return f" (it begins {line[:_SHOWN_CHARS]!r})" if re.search(r"[ {<\[]", line) else ""


def special_file(mode: int) -> FileType | None:
    """What a path is that is no file with bytes at offsets, from its `st_mode`; None for a file."""
    kinds = (
        (stat.S_ISDIR, "a folder", "give a file in it"),
        (stat.S_ISFIFO, "a pipe", "save it to a file: models are not read from start to end"),
        (stat.S_ISSOCK, "a socket", _GIVE_MODEL),
        (stat.S_ISCHR, "a device", _GIVE_MODEL),
        (stat.S_ISBLK, "a device", _GIVE_MODEL),
    )
    return next(
        (FileType(f"{what}, not a regular file", fix) for is_it, what, fix in kinds if is_it(mode)),
        None,
    )
