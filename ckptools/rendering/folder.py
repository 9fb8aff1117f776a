"""Folders of pictures: whose they are, and how an earlier result makes room for a new one.

A folder with a report of ours is replaced by the same command, file by file as the report lists
them; anything else in it stays. What holds other things is refused, unless forced.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from ckptools.errors import OutputError

REPORT = "report.json"


def check_folder(folder: Path, schema: str, *, force: bool) -> None:
    """Refuse a folder that holds what no earlier result of this schema is known to have made.

    schema  such as "ckptools.render/1": what the folder's own report.json must say
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError("this is a file", where=str(folder), fix="give a folder")
    if force or not folder.is_dir() or _report(folder, schema) or not any(folder.iterdir()):
        return
    raise OutputError("the folder is not empty", where=str(folder), fix="use --force, or another")


def clear_folder(folder: Path, schema: str) -> int:
    """Remove what an earlier result's report lists, and the report; how many files those were.

    Only files below the folder are touched; call it when the first new picture is there.
    """
    listed = _report(folder, schema).get("files")
    names = [name for name in listed if _is_below(name)] if isinstance(listed, list) else []
    there = [folder / name for name in names if (folder / name).is_file()]
    try:
        for path in there:
            path.unlink()
        if listed is not None:
            (folder / REPORT).unlink(missing_ok=True)
    except OSError as exc:
        raise OutputError(exc.strerror or str(exc), where=str(exc.filename or folder)) from exc
    return len(there)


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
