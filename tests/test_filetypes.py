"""Files that are no models: each is called what it is, with what to do about it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import socket
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ckptools.errors import InputError
from ckptools.sources import open_checkpoint


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("model.safetensors", b"x" * 600)
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return stream.getvalue()


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, kind)
    return stream.getvalue()


def array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.ones(100))
    return stream.getvalue()


RECIPE = b"# a mix\nckptools: 1\nmodels: {A: a.safetensors}\n"
# what is written, by its own library where there is one; what it is called; what to do
FILES = [
    (zipped(), "a zip archive", "unpack it"),
    (gzip.compress(b"x" * 900, mtime=0), "a gzip archive", "unpack it"),
    (bz2.compress(b"x" * 900), "a bzip2 archive", "unpack it"),
    (lzma.compress(b"x" * 900), "an xz archive", "unpack it"),
    (tarred(), "a tar archive", "unpack it"),
    (picture("PNG"), "a PNG picture", "the model's own file"),
    (picture("JPEG"), "a JPEG picture", "the model's own file"),
    (picture("GIF"), "a GIF picture", "the model's own file"),
    (picture("WEBP"), "a WebP picture", "the model's own file"),
    (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(99), "a PDF document", "the model's own file"),
    (array(), "a NumPy array", "give the model as .safetensors"),
    (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file", "give the model as .safetensors"),
    (b"\x7fELF\x02\x01\x01" + bytes(99), "a program", "the model's own file"),
    (b"Repository not found", "a text file.*'Repository not found'", "the model's own file"),
    ("Grüße aus Köln, ein Text".encode("latin-1"), "a text file", "the model's own file"),
    ("A text in two bytes a character".encode("utf-16"), "a text file", "the model's own file"),
    (("Wörter " * 400).encode(), "a text file", "the model's own file"),
    (b"hi", "a text file", "the model's own file"),
    (b"a,b\n1,2\n", "a text file", "the model's own file"),
    (b"[section]\nkey = 1\n", "a text file", "the model's own file"),
    (RECIPE, "a recipe, not a model", "`ckptools merge`"),
    (b'{"error": "Unauthorized"}', "a JSON file.*Unauthorized", "give the weights"),
    (b"<?xml version='1.0'?><Error/>", "an XML document", "download it again"),
    (b"", "the file is empty", "download or copy the file again"),
    (bytes(900), "zeros only", "download or copy the file again"),
    (bytes(range(255, 100, -1)), "not a safetensors file, nor one of another known", "give a"),
]


@pytest.mark.parametrize(
    ("data", "what", "fix"), FILES, ids=[f"{number}" for number in range(len(FILES))]
)
def test_a_file_that_is_no_model_is_called_what_it_is(
    tmp_path: Path, data: bytes, what: str, fix: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)

    with pytest.raises(InputError, match=what) as caught:
        open_checkpoint(path)

    assert caught.value.where == str(path)
    assert fix in caught.value.fix


def test_what_may_be_a_token_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("hf_abcdefghijklmnop")

    with pytest.raises(InputError, match="a text file, not a model") as caught:
        open_checkpoint(path)

    assert "hf_" not in str(caught.value)


def test_devices_sockets_and_folders_are_called_what_they_are(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))

        with pytest.raises(InputError, match="a socket, not a regular file"):
            open_checkpoint(tmp_path / "socket")
    with pytest.raises(InputError, match="a device, not a regular file"):
        open_checkpoint(Path("/dev/null"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="a folder without models"):
        open_checkpoint(tmp_path / "folder")
