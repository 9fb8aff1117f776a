"""Folders of pictures: whose they are, and how an earlier result makes room for a new one.

A folder with a report of ours is replaced by the same command, file by file as the report lists
them; anything else in it stays. What holds other things is refused, unless forced.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from ckptools.errors import OutputError
from ckptools.interrupts import held_back

REPORT = "report.json"


_ASIDE = ".ckptools-earlier"


def check_folder(folder: Path, schema: str, *, force: bool) -> None:
    """Refuse a folder that holds what no earlier result of this schema is known to have made.

    schema  such as "ckptools.render/1": what the folder's own report.json must say
    What a killed process has put aside is brought back before.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError("this is a file", where=str(folder), fix="give a folder")
    Earlier(folder, schema).recover()
    if force or not folder.is_dir() or _report(folder, schema) or not any(folder.iterdir()):
        return
    raise OutputError("the folder is not empty", where=str(folder), fix="use --force, or another")


class Earlier:
    """An earlier result, put aside within its folder while a new one is made.

    Its files, as its report lists them, and the report move into a folder of their own, and come
    back where the new result comes to nothing. As a context manager it drops them at the end, and
    brings them back on any error or interruption.
    """

    def __init__(self, folder: Path, schema: str) -> None:
        self._folder, self._schema, self._aside = folder, schema, folder / _ASIDE

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc is None:
            self.drop()
        else:
            self.bring_back()

    def put_aside(self) -> int:
        """Move it out of the way, if there is one; how many files it lists."""
        listed = _report(self._folder, self._schema).get("files")
        names = [name for name in listed if _is_below(name)] if isinstance(listed, list) else []
        there = [name for name in names if (self._folder / name).is_file()]
        if listed is not None:
            with held_back():
                # the report first: while it is here, what was put aside is of no use any more
                _move([REPORT, *there], self._folder, self._aside)
        return len(there)

    def bring_back(self) -> None:
        """Move it back to where it was."""
        if self._aside.is_dir() and not self._aside.is_symlink():  # a folder may be anybody's
            with held_back():
                names = [x.relative_to(self._aside).as_posix() for x in self._aside.rglob("*")
                         if x.is_file()]  # fmt: skip
                _move(sorted(names, key=lambda name: name == REPORT), self._aside, self._folder)
                shutil.rmtree(self._aside, ignore_errors=True)

    def drop(self) -> None:
        """Remove it."""
        shutil.rmtree(self._aside, ignore_errors=True)

    def recover(self) -> None:
        """After a killed process: bring it back, or remove it where the new result stands."""
        if _report(self._folder, self._schema):
            self.drop()
        else:
            self.bring_back()


def _move(names: Sequence[str], old: Path, new: Path) -> None:
    try:
        for name in names:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).replace(new / name)
    except OSError as exc:
        raise OutputError(exc.strerror or str(exc), where=str(exc.filename or old)) from exc


def _report(folder: Path, schema: str) -> dict[str, Any]:
    """The folder's own report; {} where there is none of this schema."""
    try:
        found = json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("schema") == schema else {}


def _is_below(name: object) -> bool:
    """Whether a name in a report leads to a file in the folder, and nowhere else."""
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath("/")
    return not path.is_absolute() and ".." not in path.parts and "\\" not in str(path)
