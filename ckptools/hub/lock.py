"""`recipe.lock.yaml`: which files a recipe meant when it was locked, by commit, sha256 and size.

A lock holds no path of the user's machine, only what the recipe itself says and file names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from ckptools.checkpoint import Checkpoint, file_sha256
from ckptools.errors import (
    CkptError,
    InputError,
    OutputError,
    RecipeError,
    UsageError,
    raise_all,
)
from ckptools.hub.remote import Hub, Progress
from ckptools.hubref import HubRef, is_hub_text, is_safe_file, parse_hub_ref
from ckptools.lora.group import PEFT_CONFIG
from ckptools.opening import Source
from ckptools.recipe import ModelRef, Recipe
from ckptools.sources import open_checkpoint
from ckptools.writer import PartFile, whole_file

VERSION = 1
MAX_LOCK_BYTES = 10_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_AGAIN = "write it again with `ckptools lock`"


@dataclass(frozen=True)
class LockedFile:
    """One file of a model.

    name    within the model's folder or repository
    sha256  "" for small files of a repository, which its commit fixes
    """

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class LockedModel:
    """One model of a recipe.

    path    as the recipe has it; the file's name alone where that is a path of one machine
    commit  of a model on the Hub, else ""
    file    of such a model: the one to open; "" for a folder
    """

    path: str
    commit: str
    file: str
    files: tuple[LockedFile, ...]


@dataclass(frozen=True)
class Lock:
    """All models of a recipe; `where` is the file that says so."""

    where: str
    recipe_sha256: str
    models: Mapping[str, LockedModel]

    def pinned(self, recipe: Recipe) -> Recipe:
        """The recipe with the lock's commits and sha256s; a recipe that changed is refused."""
        if recipe_sha256(recipe.path) != self.recipe_sha256:
            raise RecipeError(
                "the recipe changed since it was locked",
                where=str(recipe.path),
                fix=f"look at what changed, then {_AGAIN}",
            )
        if recipe.models.keys() != self.models.keys():
            raise RecipeError("the lock names other models", where=self.where, fix=_AGAIN)
        models = {name: self._pinned(recipe, model) for name, model in recipe.models.items()}
        return replace(recipe, models=MappingProxyType(models))

    def _pinned(self, recipe: Recipe, model: ModelRef) -> ModelRef:
        locked = self.models[model.name]
        if is_hub_text(model.path) != bool(locked.commit):
            raise RecipeError("the lock names another model", where=self.where, fix=_AGAIN)
        path = recipe.file_of(model)
        if not locked.commit and path.is_file() and len(locked.files) == 1:
            self._check_size(model.name, path, locked.files[0])  # sooner than a plan can fail
        pinned = replace(model, where=f"{self.where}: {model.name}")
        if is_hub_text(model.path):
            repo = parse_hub_ref(model.path).repo
            pinned = replace(pinned, path=str(HubRef(repo, locked.file, locked.commit)))
        if len(locked.files) == 1 and locked.files[0].sha256:
            pinned = replace(pinned, sha256=locked.files[0].sha256)
        return pinned

    def check(self, sources: Sequence[Source], progress: Progress) -> None:
        """Hold the files of opened models against the lock: names, sizes, and sha256s.

        A single file's sha256 is a pin of the recipe by now, and not read twice.
        """
        errors: list[CkptError] = []
        work: list[tuple[Source, Path, LockedFile]] = []
        for source in sources:
            there = _files_of(source.checkpoint)
            locked = {file.name: file for file in self.models[source.name].files}
            if there.keys() != locked.keys():
                names = sorted(there.keys() ^ locked.keys())
                errors.append(self._other(source.name, f"{names[0]!r} is in one of the two only"))
                continue
            for name, path in there.items():
                try:
                    self._check_size(source.name, path, locked[name])
                except InputError as exc:
                    errors.append(exc)
                    continue
                if locked[name].sha256 and len(locked) > 1:
                    work.append((source, path, locked[name]))
        raise_all(errors)
        if work:
            progress.start("checking the lock", sum(file.nbytes for _, _, file in work))
        for source, path, file in work:
            found = file_sha256(path, progress.advance)
            if found != file.sha256:
                said = f"the sha256 of {file.name!r} is {found}, the lock says {file.sha256}"
                errors.append(self._other(source.name, said))
        raise_all(errors)

    def _check_size(self, name: str, path: Path, file: LockedFile) -> None:
        nbytes = path.stat().st_size
        if nbytes != file.nbytes:
            said = f"{file.name!r} has {nbytes:,} bytes, the lock says {file.nbytes:,}"
            raise self._other(name, said)

    def _other(self, name: str, what: str) -> InputError:
        return InputError(
            f"{name} is not the locked model: {what}",
            where=self.where,
            fix=f"get the locked files, or {_AGAIN}",
        )


def lock_path(recipe: Path) -> Path:
    """`recipe.yaml` → `recipe.lock.yaml`."""
    return recipe.with_name(f"{recipe.stem}.lock.yaml")


def recipe_sha256(recipe: Path) -> str:
    """Of the recipe's text; line ends do not count."""
    text = recipe.read_bytes().replace(b"\r\n", b"\n")
    return hashlib.sha256(text).hexdigest()


# --- making one --------------------------------------------------------------------------------


def make_lock(recipe: Recipe, progress: Progress) -> Lock:
    """Look up, or read and hash, every model of a recipe; nothing large is downloaded."""
    hub = Hub(progress)
    models: dict[str, LockedModel] = {}
    errors: list[CkptError] = []
    for model in recipe.models.values():
        try:
            if is_hub_text(model.path):
                models[model.name] = _of_the_hub(hub, model)
            else:
                models[model.name] = _of_this_machine(recipe, model, progress)
        except CkptError as exc:
            exc.what = f"model {model.name!r}: {exc.what}"
            exc.where = f"{model.where}: {exc.where}" if exc.where else model.where
            errors.append(exc)
    raise_all(errors)
    where = lock_path(recipe.path).name
    return Lock(where, recipe_sha256(recipe.path), MappingProxyType(models))


def _of_the_hub(hub: Hub, model: ModelRef) -> LockedModel:
    pinned = hub.pinned_model(model)  # a sha256 of the recipe's own is checked here
    found = hub.find(parse_hub_ref(pinned.path))
    files = hub.files_of(found)
    return LockedModel(
        path=model.path,
        commit=found.snapshot.commit,
        file=found.ref.file,
        files=tuple(
            LockedFile(_below(file.name, found.ref.file), file.nbytes, file.sha256)
            for file in files
            if _is_counted(file.name)
        ),
    )


def _below(name: str, file: str) -> str:
    """A file's name as seen from the folder of the one that is opened."""
    folder = file.rpartition("/")[0]
    return name.removeprefix(f"{folder}/") if folder else name


def _is_counted(name: str) -> bool:
    """Weights, and the scale of a PEFT adapter; other files of a folder say nothing of values."""
    return not name.endswith(".json") or name.rpartition("/")[2] == PEFT_CONFIG


def _of_this_machine(recipe: Recipe, model: ModelRef, progress: Progress) -> LockedModel:
    with open_checkpoint(recipe.file_of(model)) as checkpoint:
        files = _files_of(checkpoint)
        label = checkpoint.path.name
    progress.start(f"hashing {label}", sum(path.stat().st_size for path in files.values()))
    locked = tuple(
        LockedFile(name, path.stat().st_size, file_sha256(path, progress.advance))
        for name, path in sorted(files.items())
    )
    if model.sha256 and [file.sha256 for file in locked[:2]] != [model.sha256]:
        raise InputError(
            "this is not the pinned file: its sha256 is " + locked[0].sha256,
            fix="get the file that the recipe was made for, or change the pin",
        )
    written = Path(model.path)
    is_private = written.is_absolute() or model.path.startswith("~")
    return LockedModel(written.name if is_private else model.path, "", "", locked)


def _files_of(checkpoint: Checkpoint) -> dict[str, Path]:
    """Name within the model → path, of every file whose values count."""
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    paths = [file.path for file in checkpoint.files]
    paths += [path for p in paths if (path := p.with_name(PEFT_CONFIG)).is_file()]
    return {path.relative_to(root).as_posix(): path for path in sorted(set(paths))}


# --- as text -----------------------------------------------------------------------------------


def lock_document(lock: Lock, recipe: Path) -> dict[str, object]:
    """The lock as plain data: what the file holds."""
    return {
        "ckptools-lock": VERSION,
        "recipe": {"file": recipe.name, "sha256": lock.recipe_sha256},
        "models": {
            name: {
                "path": model.path,
                **({"commit": model.commit} if model.commit else {}),
                **({"file": model.file} if model.file else {}),
                "files": [
                    {"name": file.name, "bytes": file.nbytes}
                    | ({"sha256": file.sha256} if file.sha256 else {})
                    for file in model.files
                ],
            }
            for name, model in lock.models.items()
        },
    }


def lock_text(lock: Lock, recipe: Path) -> bytes:
    """The lock as YAML."""
    head = f"# The files that {recipe.name} meant. Written by `ckptools lock`; do not edit.\n"
    body = yaml.safe_dump(lock_document(lock, recipe), sort_keys=False, allow_unicode=True)
    return (head + body).encode()


def write_lock(lock: Lock, recipe: Path) -> None:
    """Put the lock beside its recipe, whole or not at all; only a lock is replaced."""
    path = lock_path(recipe)
    if path.exists() and b"ckptools-lock:" not in path.read_bytes()[:MAX_LOCK_BYTES]:
        raise OutputError(
            "this is in the lock's place, and no lock",
            where=str(path),
            fix="remove it, or give the recipe another name",
        )
    layout = whole_file(path, lock_text(lock, recipe))
    with PartFile(layout) as part:
        part.sync()
        part.commit()


def read_lock(recipe: Path) -> Lock:
    """The lock of a recipe; one that is missing or that does not read is a `UsageError`."""
    path = lock_path(recipe)
    if not path.is_file():
        raise UsageError(
            "there is no lock", where=str(path), fix=f"write it with `ckptools lock {recipe}`"
        )
    raw = path.read_bytes()
    try:
        if len(raw) > MAX_LOCK_BYTES:
            raise ValueError("too large")
        return _parsed(yaml.safe_load(raw), path.name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as exc:
        raise UsageError("this is not a lock", where=str(path), fix=_AGAIN) from exc


def _parsed(document: Any, where: str) -> Lock:
    """A lock from data that anybody may have edited; anything unexpected is a `ValueError`."""
    if document["ckptools-lock"] != VERSION:
        raise ValueError("another version")
    models = {str(name): _model(entry) for name, entry in document["models"].items()}
    sha256 = _matching(_SHA256, document["recipe"]["sha256"])
    return Lock(where, sha256, MappingProxyType(models))


def _model(entry: Mapping[str, Any]) -> LockedModel:
    path, file = str(entry["path"]), entry.get("file", "")
    is_remote = is_hub_text(path)
    files = tuple(
        LockedFile(
            _safe(item["name"]),
            int(item["bytes"]),
            # of a small file of a repository the commit is enough
            _matching(_SHA256, item["sha256"]) if not is_remote or "sha256" in item else "",
        )
        for item in entry["files"]
    )
    if not files:
        raise ValueError("no files")
    commit = _matching(_COMMIT, entry["commit"]) if is_remote else ""
    return LockedModel(path, commit, _safe(file) if file else "", files)


def _safe(name: object) -> str:
    if not isinstance(name, str) or not is_safe_file(name):
        raise ValueError(f"{name!r} is no file's name")
    return name


def _matching(pattern: re.Pattern[str], text: object) -> str:
    """The text, if it is one: YAML reads digits without quotes as a number."""
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise ValueError(f"{text!r} is not what belongs here")
    return text
