"""Where an output is to lie: all that stands in its way, found before anything is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ckptools.checkpoint import read_json_object
from ckptools.errors import CkptError, InputError, OutputError
from ckptools.writer import MANIFEST_SCHEMA, index_path, manifest_path, part_path

if TYPE_CHECKING:
    from ckptools.plan import Plan


def output_problems(plan: Plan, *, force: bool) -> Iterator[CkptError]:
    """What stands in the way of a plan's files. force: what is there may be replaced."""
    where = plan.recipe.output.where
    opened = [s.checkpoint for s in plan.sources if not s.checkpoint.is_elsewhere]
    inputs = [file.path for checkpoint in opened for file in checkpoint.files]
    inputs += [checkpoint.path for checkpoint in opened]  # the index of shards
    for part in map(part_path, (*plan.outputs, manifest_path(plan.recipe.output_path))):
        if any(_same_file(part, other) for other in inputs):
            yield OutputError(
                f"{os.path.normpath(part)!r}, where the output lies until it is whole, is one of "
                "the inputs",
                where=where,
                fix="write to another file",
            )
    in_the_way = manifest_problem(plan.recipe.output_path, force=force)
    if in_the_way:
        yield in_the_way.at(where)
    for path in plan.outputs:
        if any(_same_file(path, other) for other in inputs):
            yield OutputError(
                f"the output {os.path.normpath(path)!r} is one of the inputs",
                where=where,
                fix="write to another file",
            )
        elif path.exists() and not force:
            yield OutputError(
                f"the output {os.path.normpath(path)!r} exists",
                where=where,
                fix="use --force, or `overwrite: true`, to replace it",
            )
        elif path.is_dir():
            yield OutputError(f"the output {os.path.normpath(path)!r} is a folder", where=where)
    other = _other_form(plan)
    if other.exists() and not force:  # one manifest cannot speak of both
        yield OutputError(
            f"{os.path.normpath(other)!r}, an output of the same name, exists",
            where=where,
            fix="write elsewhere; with --force the new manifest speaks of the new output alone",
        )
    folder = existing_folder(plan.recipe.output_path.parent)
    if not folder.is_dir():
        yield OutputError(f"{str(folder)!r} is not a folder", where=where)
        return
    if not os.access(folder, os.W_OK):
        yield OutputError(f"the folder {str(folder)!r} cannot be written to", where=where)
    too_full = room_problem(folder, plan.file_bytes)
    if too_full:
        yield too_full.at(where)


def _other_form(plan: Plan) -> Path:
    """Where the same output lies in one file, for shards; where the shards' index, for one file."""
    output = plan.recipe.output_path
    return index_path(output) if len(plan.outputs) == 1 else output


def room_problem(folder: Path, nbytes: int) -> OutputError | None:
    """That a folder's disk has no room for so many bytes."""
    total, _, free = shutil.disk_usage(folder)
    if nbytes <= free or not total:  # some systems of files do not tell: 0 of 0
        return None
    return OutputError(
        f"the disk is too full: the output needs {nbytes / 1e6:,.1f} MB, "
        f"{free / 1e6:,.1f} MB are free",
        fix="free some space, or write to another disk",
    )


def manifest_problem(output: Path, *, force: bool) -> OutputError | None:
    """What is wrong with the place of an output's manifest: another's file, or a folder.

    By force any file is replaced; a folder cannot be.
    """
    path = manifest_path(output)
    if not os.path.lexists(path) or (force and path.is_file()):
        return None
    try:
        document = read_json_object(path) or {}
    except InputError:
        document = {}
    if document.get("schema") == MANIFEST_SCHEMA:
        return None
    return OutputError(
        f"{os.path.normpath(path)!r} is in the way, and no manifest",
        fix="remove it, or write elsewhere",
    )


def existing_folder(folder: Path) -> Path:
    """The nearest folder, upwards, that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _same_file(one: Path, other: Path) -> bool:
    if one.exists():
        return one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)
