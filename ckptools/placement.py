"""Where an output is to lie: what stands in its way, and what stays there of an older one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckptools.checkpoint import read_json_object
from ckptools.errors import CkptError, InputError, OutputError
from ckptools.writer import MANIFEST_SCHEMA, index_path, manifest_path, part_path, part_problem

if TYPE_CHECKING:
    from ckptools.plan import Plan


@dataclass(frozen=True)
class Place:
    """Where a model's file goes, or its shards and their index.

    output  the file's name; that of shards is made from it
    files   all that is written there, but for the manifest
    inputs  files that are read meanwhile, and must stay
    """

    output: Path
    files: tuple[Path, ...]
    inputs: tuple[Path, ...]

    @property
    def other_form(self) -> Path:
        """Where the same output lies in one file, for shards; the shards' index, for one file."""
        return index_path(self.output) if len(self.files) == 1 else self.output

    def problems(self, *, force: bool, ways: str = "--force") -> Iterator[OutputError]:
        """What stands in the way. force: what is there may be replaced; ways: how to say so."""
        written = (*self.files, manifest_path(self.output))
        for part in map(part_path, written):
            if self._is_input(part):
                yield OutputError(
                    f"{os.path.normpath(part)!r}, where the output lies until it is whole, is one "
                    "of the inputs",
                    fix="write to another file",
                )
        for in_the_way in (
            *(part_problem(path) for path in written if not self._is_input(part_path(path))),
            manifest_problem(self.output, force=force),
        ):
            if in_the_way:
                yield in_the_way
        read = [path for path in written if self._is_input(path)]
        there = [path for path in self.files if os.path.lexists(path) and path not in read]
        folders = [path for path in there if path.is_dir()] if force else []
        for paths, what, way in (
            (read, "is one of the inputs", "write to another file"),
            ([] if force else there, "exists", f"use {ways} to replace it"),
            (folders, "is a folder", "write to another file"),
        ):
            if paths:  # of many shards, the first stands for all
                more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
                shown = f"the output {os.path.normpath(paths[0])!r}"
                yield OutputError(f"{shown} {what}{more}", fix=way)
        if self.other_form.exists() and not force:  # one manifest cannot speak of both
            yield OutputError(
                f"{os.path.normpath(self.other_form)!r}, an output of the same name, exists",
                fix="write elsewhere, or use --force: its record is then of the new one alone",
            )

    def stale(self) -> list[Path]:
        """Shards that the index that is to be replaced names, and this output has not."""
        if len(self.files) == 1:
            return []
        try:
            named = (read_json_object(index_path(self.output)) or {}).get("weight_map")
        except InputError:  # nobody knows what belonged to it
            return []
        pattern = re.compile(rf"{re.escape(self.output.stem)}-\d{{5}}-of-\d{{5}}\.safetensors")
        names = {str(name) for name in named.values()} if isinstance(named, dict) else set()
        there = [self.output.parent / name for name in sorted(names) if pattern.fullmatch(name)]
        kept = {path.resolve() for path in (*self.files, *self.inputs)}
        return [path for path in there if path.resolve() not in kept]

    def clear(self, stale: Sequence[Path]) -> tuple[str, ...]:
        """Remove shards of the output that was replaced; notes of what went, and of what stays."""
        for path in stale:
            with suppress(OSError):  # what is left of them is no part of any index
                path.unlink()
        notes = [f"{len(stale)} shards of the replaced output are removed"] if stale else []
        if self.other_form.exists():
            notes.append(f"{self.other_form.name}, an older output of the same name, is left")
        return tuple(notes)

    def _is_input(self, path: Path) -> bool:
        return any(_same_file(path, other) for other in self.inputs)


def place_of(plan: Plan) -> Place:
    """Where a plan's output goes."""
    opened = [s.checkpoint for s in plan.sources if not s.checkpoint.is_elsewhere]
    inputs = [file.path for checkpoint in opened for file in checkpoint.files]
    inputs += [checkpoint.path for checkpoint in opened]  # the index of shards
    inputs.append(plan.recipe.path)
    return Place(plan.recipe.output_path, tuple(plan.outputs), tuple(inputs))


def ways_to_replace(plan: Plan) -> str:
    """How a plan's output may be replaced: the recipe's `overwrite` speaks of its own alone."""
    is_recipes = plan.recipe.output.where != "--output"
    return "--force, or `overwrite: true`," if is_recipes else "--force"


def output_problems(plan: Plan, *, force: bool) -> Iterator[CkptError]:
    """What stands in the way of a plan's files. force: what is there may be replaced."""
    where = plan.recipe.output.where
    for problem in place_of(plan).problems(force=force, ways=ways_to_replace(plan)):
        yield problem.at(where)
    for problem in folder_problems(plan.recipe.output_path.parent, plan.file_bytes):
        yield problem.at(where)


def folder_problems(folder: Path, nbytes: int) -> Iterator[OutputError]:
    """Why so many bytes cannot be written into a folder, which is made where there is none."""
    there = existing_folder(folder.absolute())
    if not there.is_dir():
        yield OutputError(f"{str(there)!r} is not a folder", fix="write elsewhere")
        return
    if not os.access(there, os.W_OK):
        what = f"the folder {str(there)!r} cannot be written to"
        yield OutputError(what, fix="check its rights, or write elsewhere")
    too_full = _room_problem(there, nbytes)
    if too_full:
        yield too_full


def _room_problem(folder: Path, nbytes: int) -> OutputError | None:
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
    if one.exists() and other.exists():  # a recipe in hand need not lie anywhere
        return one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)
