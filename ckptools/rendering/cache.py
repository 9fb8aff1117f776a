"""Parents' pictures from other days, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptools.errors import OutputError
from ckptools.hashing import cache_folder
from ckptools.rendering.orders import Order
from ckptools.rendering.records import Drawn, Subject
from ckptools.rendering.reports import json_number, versions
from ckptools.rendering.subjects import sha256s_of

if TYPE_CHECKING:
    from ckptools.render import Request

_CACHE_SCHEMA = "ckptools.picture-cache/1"
_CACHE_BYTES = 500_000_000
_CONFIG_BYTES = 8_000_000  # a weightless folder's files are smaller


class Cache:
    """Parents' pictures from other days, in the user's cache folder.

    Found by everything that they depend on: the bytes of all files, the request, device, dtype,
    and the versions of the libraries.
    """

    def __init__(self, order: Order) -> None:
        cache = cache_folder()
        self._folder = cache / "pictures" if cache is not None else None
        self._order = order
        beside = [order.control, order.vae]
        self._beside = [sha256s_of(path) for path in beside if path is not None]
        self._config = _config_hash(order.config)

    def recall(
        self, subject: Subject, sha256s: Sequence[str], place: tuple[str, str], request: Request
    ) -> Drawn | None:
        """A picture that was kept; None where there is none, or anything about it is odd."""
        import numpy as np
        from PIL import Image

        path = self._path(subject, sha256s, place, request)
        if path is None or not path.is_file():
            return None
        with suppress(OSError, ValueError, KeyError, TypeError, SyntaxError):
            with Image.open(path) as opened:
                pixels = np.asarray(opened.convert("RGB"), np.uint8).copy()
                known = json.loads(opened.info["ckptools"])
            if known["schema"] != _CACHE_SCHEMA or set(known["figures"]) != _FIGURES:
                return None
            path.touch()  # the least used are forgotten first
            facts = dict(known["facts"])
            return Drawn(pixels, known["figures"], facts, float(known["seconds"]), True, path)
        return None

    def keep(
        self,
        subject: Subject,
        sha256s: Sequence[str],
        place: tuple[str, str],
        request: Request,
        drawn: Drawn,
    ) -> None:
        """Keep a picture; a cache that cannot be written to is no reason to fail."""
        from ckptools.render.files import write_picture

        path = self._path(subject, sha256s, place, request)
        if path is None or self._folder is None:
            return
        known = {
            "schema": _CACHE_SCHEMA,
            "figures": {name: json_number(value) for name, value in drawn.figures.items()},
            "facts": drawn.facts,
            "seconds": drawn.seconds,
        }
        with suppress(OSError, OutputError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_picture(drawn.pixels, path, {"ckptools": json.dumps(known)})
            self._forget()

    def _path(
        self, subject: Subject, sha256s: Sequence[str], place: tuple[str, str], request: Request
    ) -> Path | None:
        if self._folder is None or subject.file is None:
            return None
        folder = subject.file if subject.file.is_dir() else None
        key = {
            "models": list(sha256s),
            "config": _config_hash(folder) if folder else self._config,
            "beside": self._beside,
            "place": place,
            "versions": versions(),
            "request": {
                name: hashlib.sha256(value.tobytes()).hexdigest()
                if hasattr(value, "tobytes")
                else value
                for name, value in _fields(request)
            },
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:40]
        return self._folder / f"{name}.png"

    def _forget(self) -> None:
        """Remove the pictures that were not used for longest, where all take too much room."""
        if self._folder is None:
            return
        kept = 0
        stats = [(path.stat(), path) for path in self._folder.glob("*.png")]
        for stat, path in sorted(stats, key=lambda item: -item[0].st_mtime):
            kept += stat.st_size
            if kept > _CACHE_BYTES:
                path.unlink(missing_ok=True)


_FIGURES = {"nonfinite", "contrast", "clipped", "latent_std", "smoothness", "outside_mask"}


def _fields(request: Request) -> list[tuple[str, Any]]:
    return [(name, getattr(request, name)) for name in sorted(request.__dataclass_fields__)]


def _config_hash(folder: Path | None) -> str:
    """What the small files of a diffusers folder say."""
    if folder is None or not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".txt", ".model") and path.stat().st_size < _CONFIG_BYTES:
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()
