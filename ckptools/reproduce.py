"""`ckptools reproduce`: a merge done again from its manifest, and compared with what it says.

A manifest may come from anybody. What it may do: name files beside it and models on the Hub, and
have them merged into a folder of its own.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn

from ckptools.checkpoint import Checkpoint, Header, open_file, read_header
from ckptools.errors import CkptError, InputError, OutputError, UnsafeError, UsageError, raise_all
from ckptools.hubref import HubRef, hub_ref_of, is_hub_text, is_safe_file, parse_hub_ref
from ckptools.manifest import versions
from ckptools.progress import Progress
from ckptools.recipe import ModelRef, Recipe, parse_recipe
from ckptools.sources import open_checkpoint
from ckptools.workflow import MergeResult, merge
from ckptools.writer import MANIFEST_SCHEMA, MANIFEST_SUFFIX, made_folder

MAX_MANIFEST_BYTES = 16_000_000
_COMPARED = 1 << 20


@dataclass(frozen=True)
class Output:
    """One file of a merge, as the manifest and as the repetition have it.

    beside  what lies under its name beside the manifest, where the repetition's tensors are as the
            manifest says: "same" as the repetition to the last byte, "other", or "" for nothing,
            or for a file that is the manifest's by its header
    """

    file: str
    sha256_data: str
    header_sha256: str
    found_data: str
    found_header: str
    beside: Literal["", "same", "other"] = ""

    @property
    def same_data(self) -> bool:
        """Whether the tensors' bytes are equal."""
        return self.sha256_data == self.found_data

    @property
    def same_file(self) -> bool:
        """Whether all bytes are."""
        return self.same_data and self.header_sha256 == self.found_header


@dataclass(frozen=True)
class Reproduction:
    """What came of merging again.

    folder      where the result was kept; None where it was not asked for
    first       the first tensor that differs, in the original's order, and how; "" where none
                does, or the original is not at hand
    notes       versions that differ, and what they may explain
    """

    manifest: str
    outputs: tuple[Output, ...]
    folder: Path | None
    first: str
    notes: tuple[str, ...]

    @property
    def same_data(self) -> bool:
        """Whether the tensors' bytes are equal, in every file."""
        return all(output.same_data for output in self.outputs)

    @property
    def same_file(self) -> bool:
        """Whether every file is equal to the last byte."""
        return all(output.same_file for output in self.outputs)

    @property
    def same(self) -> bool:
        """The same tensors with the same bytes: headers may tell of another version of ckptools.

        And what lies beside the manifest is what was merged.
        """
        changed = any(output.beside == "other" for output in self.outputs)
        return self.same_data and not self.first and not changed


@dataclass(frozen=True)
class _Manifest:
    """A manifest that was read: where it lies, where models and the original may lie."""

    shown: str
    folder: Path
    recipe: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, Any]]
    outputs: tuple[Mapping[str, Any], ...]
    versions: Mapping[str, str]
    ref: HubRef | None = None


def reproduce(
    path: Path,
    *,
    models: Mapping[str, Path] | None = None,
    output: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Reproduction:
    """Merge again what a manifest describes, and compare.

    path    a manifest, or a path that stands for a repository of the Hub that has one
    models  model name → where it lies now; others are looked for beside the manifest
    output  a folder to keep the result in
    Raises `InputError` for a model that is not there or is another one.
    """
    progress = progress or Progress()
    manifest = _read(path)
    with _folder_for(output) as folder:
        recipe = _recipe(manifest, models or {}, folder)
        done = merge(recipe, threads=threads, progress=progress)
        found = json.loads(done.manifest.read_text(encoding="utf-8"))
        _check_inputs(manifest, found)
        outputs = tuple(
            _beside(one, manifest, done.output.parent)
            for one in (*_outputs(manifest, found), *_index_of(done))
        )
        first = ""
        if not all(one.same_file for one in outputs):
            first = _first_difference(manifest, done, outputs)
        if output is not None:
            _keep(done, output)
    return Reproduction(
        manifest=manifest.shown, outputs=outputs, folder=output, first=first,
        notes=tuple(_notes(manifest, outputs)),
    )  # fmt: skip


# --- the manifest ------------------------------------------------------------------------------


def _read(path: Path) -> _Manifest:
    ref = hub_ref_of(path)
    local = path
    if ref is not None:
        from ckptools.hub.remote import Hub  # loads the Hub's client

        hub = Hub()
        ref = hub.named(ref, MANIFEST_SUFFIX)
        local = hub.fetch_file(ref, most_bytes=MAX_MANIFEST_BYTES)
    where = str(ref or path)
    with open_file(local) as stream:
        size = local.stat().st_size
        if size > MAX_MANIFEST_BYTES:
            raise InputError(f"{size:,} bytes are too many for a manifest", where=where)
        raw = stream.read(size, 0)
    try:
        document = json.loads(raw)
        if document["schema"] != MANIFEST_SCHEMA:
            raise ValueError("another schema")
        manifest = _Manifest(
            shown=where,
            folder=local.parent,
            recipe=dict(document["recipe"]),
            inputs={str(one["name"]): one for one in document["inputs"]},
            outputs=tuple(
                {key: str(one[key]) for key in ("file", "sha256_data", "header_sha256")}
                for one in document["outputs"]
            ),
            versions={str(k): str(v) for k, v in document["versions"].items()},
            ref=ref,
        )
        models = [*manifest.recipe["models"].values(), *manifest.recipe.get("loras", ())]
        names = [str(model["path"]) for model in models if not is_hub_text(str(model["path"]))]
        names += [str(one["file"]) for one in manifest.outputs]
        names.append(str(manifest.recipe["output"]["path"]))
        complete = bool(manifest.outputs)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        _no_manifest(where, exc)
    if not complete:
        _no_manifest(where, None)
    for name in names:
        if "/" in name or not is_safe_file(name):
            raise UnsafeError(
                f"the manifest names a file outside its folder: {name!r}", where=where,
                fix="do not use this manifest; ckptools writes file names alone",
            )  # fmt: skip
    return manifest


def _no_manifest(where: str, cause: Exception | None) -> NoReturn:
    raise InputError(
        "this is not a manifest of a merge", where=where,
        fix=f"give the {MANIFEST_SUFFIX} file that stands beside a merged model",
    ) from cause  # fmt: skip


# --- the recipe --------------------------------------------------------------------------------


def _recipe(manifest: _Manifest, models: Mapping[str, Path], folder: Path) -> Recipe:
    """The manifest's recipe, over files that are there, into a folder of our own."""
    text = json.dumps(manifest.recipe)
    recipe = parse_recipe(text, Path(f"{manifest.shown}#recipe"))
    unknown = models.keys() - recipe.models.keys()
    if unknown:
        raise UsageError(
            f"the merge has no model {min(unknown)!r}",
            fix=f"its models: {', '.join(recipe.models)}",
        )
    errors: list[CkptError] = []
    found: dict[str, ModelRef] = {}
    for ref in recipe.models.values():
        try:
            found[ref.name] = _found(manifest, ref, models.get(ref.name), folder)
        except CkptError as exc:
            errors.append(exc)
    raise_all(errors)
    target = replace(recipe.output, path=str(folder / Path(recipe.output.path).name))
    return replace(  # nothing but a merge: pictures would be written wherever it says
        recipe, path=folder / "recipe.yaml", models=MappingProxyType(found), output=target,
        render=None, publish=None,
    )  # fmt: skip


def _found(manifest: _Manifest, ref: ModelRef, given: Path | None, folder: Path) -> ModelRef:
    """Where a model lies: as given, on the Hub at its commit, or beside the manifest."""
    if given is None and is_hub_text(ref.path):
        if not parse_hub_ref(ref.path).is_pinned:
            raise InputError(
                f"{ref.name} is {ref.path}, without a commit", where=manifest.shown,
                fix=f"give it: --model {ref.name}=PATH",
            )  # fmt: skip
        return ref
    path = given or manifest.folder / ref.path
    known = manifest.inputs.get(ref.name, {})
    if not path.exists():
        sha256 = f", sha256 {known['sha256']}" if known.get("sha256") else ""
        raise InputError(
            f"{ref.name}, {Path(ref.path).name!r}{sha256}, is not here",
            where=str(path), fix=f"give it: --model {ref.name}=PATH",
        )  # fmt: skip
    with open_checkpoint(path) as checkpoint:
        _check_header(ref.name, checkpoint, known)
    return replace(ref, path=str(_named(path.absolute(), ref, folder)))


def _check_header(name: str, checkpoint: Checkpoint, known: Mapping[str, Any]) -> None:
    if known.get("header_sha256") not in (None, checkpoint.header_sha256):
        raise InputError(
            f"this is not the {name} of the merge: their headers differ",
            where=str(checkpoint.path), fix=f"give it: --model {name}=PATH",
        )  # fmt: skip


def _named(path: Path, ref: ModelRef, folder: Path) -> Path:
    """The model under the name it had, which the merged file's header repeats."""
    name = Path(ref.path).name
    if path.name == name or is_hub_text(ref.path):
        return path
    link = folder / f"model-{ref.name.strip('[]')}".replace("[", "-") / name
    link.parent.mkdir()
    try:
        link.symlink_to(path)
    except OSError:  # Windows lets few users do it; the header will tell another name
        return path
    return link


def _check_inputs(manifest: _Manifest, found: Mapping[str, Any]) -> None:
    """The models on the Hub are the merge's, too."""
    for one in found["inputs"]:
        known = manifest.inputs.get(one["name"], {})
        if known.get("header_sha256") not in (None, one["header_sha256"]):
            raise InputError(
                f"{one['name']} is not the model of the merge: their headers differ",
                where=manifest.shown,
            )


# --- comparing ---------------------------------------------------------------------------------


def _outputs(manifest: _Manifest, found: Mapping[str, Any]) -> tuple[Output, ...]:
    there = {one["file"]: one for one in found["outputs"]}
    untold = there.keys() - {one["file"] for one in manifest.outputs}
    more = [Output(file, "", "", there[file]["sha256_data"], "") for file in sorted(untold)]
    told = tuple(
        Output(
            one["file"], one["sha256_data"], one["header_sha256"],
            there.get(one["file"], {}).get("sha256_data", ""),
            there.get(one["file"], {}).get("header_sha256", ""),
        )
        for one in manifest.outputs
    )  # fmt: skip
    return (*told, *more)


def _index_of(done: MergeResult) -> list[Output]:
    """The index of shards, of which a manifest does not speak: the shards make it what it is."""
    if len(done.plan.outputs) == 1:
        return []
    sha256 = hashlib.sha256(done.output.read_bytes()).hexdigest()
    return [Output(done.output.name, sha256, sha256, sha256, sha256)]


def _beside(output: Output, manifest: _Manifest, folder: Path) -> Output:
    """With what became of the original since it was merged: damaged, replaced, moved."""
    path, again = manifest.folder / output.file, folder / output.file
    if manifest.ref is not None or not output.same_data or not path.is_file():
        return output
    if output.same_file:
        is_same = filecmp.cmp(path, again, shallow=False)
        return replace(output, beside="same" if is_same else "other")
    try:
        is_original = read_header(path).sha256 == output.header_sha256
    except CkptError:
        is_original = False
    return output if is_original else replace(output, beside="other")


def _first_difference(manifest: _Manifest, done: MergeResult, outputs: Sequence[Output]) -> str:
    """The first tensor that differs from the original's, where that is at hand."""
    for output in outputs:
        original = _original(manifest, output)
        again = done.output.parent / output.file
        if output.same_file or original is None or not again.is_file():
            continue
        one, other = read_header(original), read_header(again)
        for name, spec in one.specs.items():
            if name not in other.specs:
                return f"{name}: not in the repetition"
            if other.specs[name] != spec:
                return f"{name}: {spec} in the original, {other.specs[name]} in the repetition"
            at = _differ(original, one, again, other, name)
            if at is not None:
                return f"{name}: byte {at:,} of its data"
        extra = sorted(other.specs.keys() - one.specs.keys())
        if extra:
            return f"{extra[0]}: not in the original"
    return ""


def _original(manifest: _Manifest, output: Output) -> Path | None:
    """The file that the manifest is about: beside it, or in its repository."""
    path = manifest.folder / output.file
    if manifest.ref is not None:
        from ckptools.hub.remote import Hub

        folder = manifest.ref.file.rpartition("/")[0]
        file = f"{folder}/{output.file}" if folder else output.file
        with suppress(CkptError):
            path = Hub().fetch_file(replace(manifest.ref, file=file))
    if not path.is_file():
        return None
    with suppress(CkptError):
        if read_header(path).sha256 == output.header_sha256:
            return path
    return None


def _differ(one: Path, first: Header, other: Path, second: Header, name: str) -> int | None:
    """The first byte of a tensor in which two files differ, or None."""
    nbytes = first.specs[name].nbytes
    with open_file(one) as a, open_file(other) as b:
        for offset in range(0, nbytes, _COMPARED):
            count = min(_COMPARED, nbytes - offset)
            left = a.read(count, first.starts[name] + offset)
            right = b.read(count, second.starts[name] + offset)
            if left != right:
                return offset + next(i for i in range(count) if left[i] != right[i])
    return None


def _notes(manifest: _Manifest, outputs: Sequence[Output]) -> Iterator[str]:
    own = versions()
    differing = [
        f"{name} {theirs} then, {own.get(name, 'none')} now"
        for name, theirs in manifest.versions.items()
        if own.get(name) != theirs
    ]
    if differing:
        yield f"other versions: {', '.join(differing)}"
    if any(one.same_data and not one.same_file for one in outputs):
        yield "the headers differ, the tensors' bytes do not"


# --- the result --------------------------------------------------------------------------------


@contextmanager
def _folder_for(output: Path | None) -> Iterator[Path]:
    """A folder to merge into: on the disk that the result is to stay on."""
    if output is not None and output.exists() and not output.is_dir():
        raise OutputError(f"{str(output)!r} is not a folder", fix="give a folder")
    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(made_folder(output))
        yield Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix=".ckptools-", dir=output))
        )


def _keep(done: MergeResult, folder: Path) -> None:
    """Move what was written to its folder; nothing there is replaced."""
    paths = [*done.plan.outputs, done.manifest]
    for path in paths:
        if (folder / path.name).exists():
            raise OutputError(
                f"the output {str(folder / path.name)!r} exists", fix="give an empty folder"
            )
    for path in paths:
        path.replace(folder / path.name)
