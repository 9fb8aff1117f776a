"""One checkpoint in another shape: single file, diffusers folder, another dtype, fewer tensors.

Nothing is computed but casts: every output tensor is a view of input bytes, streamed through the
engine that merges use. Must not know how results are shown.

What `--prune` drops: the EMA copy (CompVis/latent-diffusion, `modules/ema.py`: `model_ema.` and
the trained name without its dots), the loss of the VAE's training (`first_stage_model.loss.`) and
what PyTorch Lightning keeps beside the weights (`optimizer_states`, `callbacks` …).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from ckptools.checkpoint import Checkpoint
from ckptools.convert_settings import Wanted, settings_of
from ckptools.errors import (
    InputError,
    NonFiniteError,
    NonFiniteSourceError,
    OutputError,
    UsageError,
    closest,
    counted,
    nearest,
    raise_all,
)
from ckptools.family import Detection, Family, detect, family_of, kind_words
from ckptools.filetypes import as_safetensors
from ckptools.folders import MAIN_COMPONENTS, SIDE_FILE, as_folder, is_diffusers_folder, renamed
from ckptools.keymap import KeyMap, key_map, key_map_ids
from ckptools.known import incomplete_parts
from ckptools.manifest import (
    HASH_KEY,
    HASH_PLACEHOLDER,
    names_local_path,
    version,
    with_hash,
)
from ckptools.placement import Place, folder_problems
from ckptools.program import Compute, Copy, Program, Read, cast
from ckptools.progress import Progress
from ckptools.quantised import not_numbers, quantised_in
from ckptools.sources import open_checkpoint
from ckptools.tensors import TensorSpec
from ckptools.workflow import default_threads, peak_memory_bytes
from ckptools.writer import (
    Layout,
    PartFile,
    PartFolder,
    commit_parts,
    index_document,
    index_path,
    lay_out,
    made_folder,
    manifest_path,
    open_parts,
    part_path,
    shard_paths,
    split_shards,
    sync_folder,
    whole_file,
)

Target = Literal["single", "diffusers"]
TARGETS: tuple[Target, ...] = ("single", "diffusers")
KEEP = "keep"
CONVERSION_KEY = "ckptools.conversion"

_SHARD_BYTES = 10_000_000_000  # diffusers 0.42, `ModelMixin.save_pretrained`, max_shard_size
_FILE_SUFFIXES = {".json", ".yaml", ".yml", ".gguf", ".zip", ".part"}
_PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_EMA = "model_ema."
_LEFTOVERS = (
    _EMA, "optimizer", "lr_schedulers", "callbacks", "loops", "hyper_parameters", "hparams",
    "epoch", "global_step", "pytorch-lightning_version", "loss.", "first_stage_model.loss.",
)  # fmt: skip
_ENOUGH_KNOWN = 0.9  # of the tensors, for a family that only a key map describes
# What lies in a folder of diffusers or transformers: weights, whole or in shards, and settings.
_WEIGHTS_FILE = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model)"
    r"(\.(fp16|bf16|fp32|ema|non_ema))?(-\d{5}-of-\d{5})?(\.(fp16|bf16|fp32|ema|non_ema))?"
    r"\.(safetensors|bin)(\.index(\.\w+)?\.json|\.part)?"
)
_SETTINGS_FILES = {
    SIDE_FILE, "model_index.json", "config.json", "scheduler_config.json",
    "preprocessor_config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What is asked for.

    to           "single" or "diffusers"; "" leaves it to the output's name
    dtypes       component, or "default" → dtype of a header ("F16") or "keep"
    prune        leave out EMA weights and what training left behind
    ema          take the EMA weights in place of the trained ones
    component    only this one
    config       a diffusers folder without weights, whose settings a folder gets
    shard_bytes  largest data section of one file, 0 for no limit; None: 10 GB in a folder
    """

    source: Path
    output: Path
    to: str = ""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    prune: bool = False
    ema: bool = False
    component: str = ""
    config: Path | None = None
    shard_bytes: int | None = None
    allow_nonfinite: bool = False
    force: bool = False

    @property
    def target(self) -> Target:
        """What the output becomes; `UsageError` for a name that no output can have."""
        suffix = self.output.suffix
        if self.to not in ("", *TARGETS):
            raise UsageError(f"no target {self.to!r}", fix=nearest(self.to, TARGETS))
        if suffix in _PICKLE_SUFFIXES:
            raise UsageError(
                f"pickles are read and never written: {self.output.name!r}",
                fix=f"write {self.output.with_suffix('.safetensors').name!r}",
            )
        if suffix == ".safetensors":
            if self.to == "diffusers":
                raise UsageError(f"{self.output.name!r} is the name of a file", fix="name a folder")
            return "single"
        if self.to == "single":
            raise UsageError(
                f"the output {self.output.name!r} does not end in .safetensors",
                fix=f"write {as_safetensors(self.output).name!r}",
            )
        if suffix in _FILE_SUFFIXES or closest(suffix, [".safetensors"]):
            raise UsageError(
                f"{self.output.name!r} looks like the name of a file",
                fix=f"write {self.output.with_suffix('.safetensors').name!r}, or name a folder",
            )
        return "diffusers"


@dataclass(frozen=True)
class Written:
    """One file of weights to write: its path below the output, and where its tensors come from."""

    path: Path
    component: str
    view: Checkpoint
    programs: Mapping[str, tuple[TensorSpec, Program]]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Conversion:
    """Everything that is decided before the first tensor byte is read.

    written  files of weights; `settings` the small files of a folder, by path below the output
    dropped  why → the source's tensors that are left out
    """

    request: Request
    target: Target
    checkpoint: Checkpoint
    detection: Detection
    family: str | None
    written: tuple[Written, ...]
    settings: Mapping[str, bytes]
    dropped: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Tensors that are copied, cast and dropped."""
        programs = [p for file in self.written for _, p in file.programs.values()]
        computed = sum(isinstance(program, Compute) for program in programs)
        dropped = sum(map(len, self.dropped.values()))
        return {"copied": len(programs) - computed, "cast": computed, "dropped": dropped}

    @property
    def output_bytes(self) -> int:
        """Bytes of tensor data to write."""
        return sum(s.nbytes for file in self.written for s, _ in file.programs.values())

    @cached_property
    def files(self) -> Mapping[str, int]:
        """Path below the output's folder → size of the file, headers included."""
        layouts = [
            lay_out([spec for spec, _ in file.programs.values()], file.metadata, file.path)
            for file in self.written
        ]
        small = {Path(path): len(data) for path, data in self.settings.items()}
        for shards in _sharded(layouts):
            small[index_path(_unsharded(shards[0].path))] = len(index_document(shards))
        sizes = {layout.path: layout.file_bytes for layout in layouts} | small
        return {path.as_posix(): nbytes for path, nbytes in sizes.items()}

    @property
    def file_bytes(self) -> int:
        """Size of all files together."""
        return sum(self.files.values())

    def close(self) -> None:
        """Close the source and every view of it."""
        for file in self.written:
            file.view.close()
        self.checkpoint.close()


@dataclass(frozen=True)
class Result:
    """What a conversion did.

    files        path below the output's folder → bytes
    sha256_data  path → sha256 of its tensor data
    recomputed   tensors that were read back and compared
    notes        what became of an older output of the same name
    """

    conversion: Conversion
    files: Mapping[str, int]
    sha256_data: Mapping[str, str]
    recomputed: int
    notes: tuple[str, ...]
    seconds: float
    peak_bytes: int


# --- what to do ----------------------------------------------------------------------------------


@contextmanager
def planned(request: Request) -> Iterator[Conversion]:
    """A conversion whose files are closed at the end; raises for all that stands in its way."""
    target = request.target
    checkpoint = open_checkpoint(request.source)
    try:
        _check_output(request, target, checkpoint)
        conversion = _Planner(request, target, checkpoint).plan()
        if target == "single":
            raise_all(list(_place_of(conversion).problems(force=request.force)))
        _check_space(conversion)
        yield conversion
        conversion.close()
    finally:
        checkpoint.close()


class _Planner:
    """Gathers notes and warnings while it chooses tensors."""

    def __init__(self, request: Request, target: Target, checkpoint: Checkpoint) -> None:
        self.request, self.target, self.checkpoint = request, target, checkpoint
        self.detection = detect(checkpoint, checkpoint.metadata)
        self.family: Family = family_of(self.detection)
        self.map = _map_of(self.detection, checkpoint)
        self.warnings: list[str] = [*checkpoint.warnings]
        self.notes: list[str] = []
        self.dropped: dict[str, list[str]] = {}

    def plan(self) -> Conversion:
        names = self._names()
        components = sorted({self._component_of(name) for name in names})
        self._check_components(components)
        self._check_codes()
        self.warnings += [
            f"the {component} is incomplete: it lacks {counted(len(lacking), 'tensor')}, such as "
            f"{lacking[0]}"
            for component, lacking in incomplete_parts(self.detection, self.checkpoint).items()
            if self.request.component in ("", component)
        ]
        if self.request.component:
            names = {
                n: o for n, o in names.items() if self._component_of(n) == self.request.component
            }
        settings: Mapping[str, bytes] = {}
        if self.target == "single":
            written = self._single(names)
        else:
            written, settings = self._folder(names)
        return Conversion(
            request=self.request,
            target=self.target,
            checkpoint=self.checkpoint,
            detection=self.detection,
            family=self.detection.family or (self.map.family if self.map else None),
            written=tuple(written),
            settings=settings,
            dropped={why: tuple(tensors) for why, tensors in self.dropped.items()},
            warnings=tuple(self.warnings),
            notes=tuple(self.notes),
        )

    # --- which tensors ---

    def _names(self) -> dict[str, str]:
        """Output name (the source's) → the tensor whose values it gets."""
        names = {name: name for name in self.checkpoint}
        if self.request.ema:
            names = self._with_ema(names)
        if self.request.prune:
            for name in [name for name in names if name.startswith(_LEFTOVERS)]:
                del names[name]
                why = "EMA weights" if name.startswith(_EMA) else "left by training"
                self.dropped.setdefault(why, []).append(name)
        if not names:
            raise InputError("no tensors are left", where=str(self.request.source))
        return names

    def _with_ema(self, names: Mapping[str, str]) -> dict[str, str]:
        """The trained weights' names with the EMA's values.

        Source: CompVis/latent-diffusion, `ldm/modules/ema.py`, LitEma: of "model.x.y" it keeps
        "model_ema." and "xy".
        """
        chosen = {name: own for name, own in names.items() if not name.startswith(_EMA)}
        copies = {
            name: _EMA + name.removeprefix("model.").replace(".", "")
            for name in chosen
            if name.startswith("model.")
        }
        found = {name: copy for name, copy in copies.items() if copy in names}
        if not found:
            raise InputError(
                "there are no EMA weights in it",
                where=str(self.request.source),
                fix="leave out --ema, or use the release of the model that holds them",
            )
        for name, copy in copies.items():
            if copy not in names or self.checkpoint[copy].shape != self.checkpoint[name].shape:
                raise InputError("has no EMA copy of its shape", where=name, fix="leave out --ema")
        self.dropped["replaced by the EMA weights"] = sorted(found)
        unused = [n for n in names if n.startswith(_EMA) and n not in set(found.values())]
        if unused:
            self.dropped["EMA counters"] = unused
        return chosen | found

    def _component_of(self, name: str) -> str:
        component = self.family.component_of(name)
        if component == "other" and self.map is not None:
            split = self.map.split(name)
            return split[0].id if split else component
        return component

    def _check_codes(self) -> None:
        """Quantised weights keep their dtype, or their scales would speak of other numbers."""
        dtypes = self.request.dtypes
        stored = {
            name: how
            for name, how in quantised_in(self.checkpoint).items()
            if dtypes.get(self._component_of(name), dtypes.get("default", KEEP)) != KEEP
        }
        if stored:
            raise not_numbers(stored).at(str(self.request.source))

    def _check_components(self, there: Sequence[str]) -> None:
        asked = [self.request.component] if self.request.component else []
        for component in asked:
            if component == self.detection.kind:
                raise UsageError(
                    f"{self.request.source.name!r} is {kind_words(self.detection)} alone",
                    where="--component",
                    fix="leave it out",
                )
            if component not in there:
                raise UsageError(
                    f"there is no component {component!r} in it", fix=nearest(component, there)
                )
        for component in self.request.dtypes:
            if component not in (*there, "default"):
                raise UsageError(
                    f"--dtype: there is no component {component!r} in it",
                    fix=nearest(component, there),
                )

    # --- into what ---

    def _single(self, names: Mapping[str, str]) -> list[Written]:
        alone = {self._component_of(name) for name in names}
        is_bare = bool(self.request.component) or (
            self.checkpoint.layout == "diffusers" and len(alone) == 1
            and not is_diffusers_folder(self.request.source)
        )  # fmt: skip
        out = {(self._bare(name) if is_bare else name): own for name, own in names.items()}
        view = renamed(self.checkpoint, out)
        of_name = {self._bare(n) if is_bare else n: self._component_of(n) for n in names}
        programs = {
            name: self._program(spec, of_name[name], self._is_protected(name, names))
            for name, spec in view.items()
        }
        path = Path(self.request.output.name)
        return self._shards(
            path, "", view, programs, self._metadata() | {HASH_KEY: HASH_PLACEHOLDER}
        )

    def _is_protected(self, name: str, names: Mapping[str, str]) -> bool:
        return name in names and self.family.is_protected(name)

    def _bare(self, name: str) -> str:
        """The component's own name of a tensor, as tools that load it alone want it."""
        split = self.map.split(name) if self.map is not None else None
        if split is not None:
            return split[1]
        prefixes = self.family.components.get(self._component_of(name), ())
        return next((name[len(p) :] for p in prefixes if name.startswith(p)), name)

    def _folder(self, names: Mapping[str, str]) -> tuple[list[Written], Mapping[str, bytes]]:
        if self.map is None:
            is_model = self.detection.kind == "checkpoint"
            what = family_of(self.detection).title if is_model else kind_words(self.detection)
            raise InputError(
                f"no diffusers folder can be made of this: it is {what} "
                f"({'; '.join(self.detection.evidence[:2])})",
                where=str(self.request.source),
                fix=f"give a model of one of these families: {', '.join(key_map_ids())}; "
                "or write a .safetensors file",
            )
        view = renamed(self.checkpoint, names)
        split = as_folder(view, self.map.family, list(view))
        whole = not self.request.component
        main = next((c for c in MAIN_COMPONENTS if c in split.components), "")
        written: list[Written] = []
        for id_, component in split.components.items():
            stem = "model" if id_.startswith("text_encoder") else "diffusion_pytorch_model"
            path = Path(id_ if whole else "", f"{stem}.safetensors")
            programs = {n: self._program(s, id_) for n, s in component.items()}
            metadata = self._metadata() if id_ == main or not whole else {"format": "pt"}
            written += self._shards(path, id_, component, programs, metadata)
        if len(split.side):
            written += self._side(split.side)
        wanted = Wanted(
            family=self.map.family,
            detection=self.detection,
            specs=self.checkpoint,
            components=tuple(split.components),
            config=self.request.config,
            source=self.request.source if is_diffusers_folder(self.request.source) else None,
            alone=self.request.component,
        )
        settings, notes = settings_of(wanted)
        self.notes += notes
        view.close()
        return written, settings

    def _side(self, side: Checkpoint) -> list[Written]:
        """Tensors without a place in the folder, kept so that the way back gives the same file."""
        if self.request.component:
            self.dropped["without a place in the component's folder"] = list(side)
            return []
        programs = {
            n: self._program(s, self._component_of(n), self.family.is_protected(n))
            for n, s in side.items()
        }
        self.notes.append(
            f"tensors without a place in a diffusers folder, kept in {SIDE_FILE}: {len(side):,}"
        )
        return self._shards(Path(SIDE_FILE), "", side, programs, {"format": "pt"}, shard_bytes=0)

    def _program(
        self, spec: TensorSpec, component: str, is_protected: bool = False
    ) -> tuple[TensorSpec, Program]:
        read = Read(0, spec.name, spec)
        dtypes = self.request.dtypes
        wanted = dtypes.get(component, dtypes.get("default", KEEP))
        is_kept = not spec.is_float or not spec.numel or is_protected
        if wanted in (KEEP, spec.dtype) or is_kept:
            return spec, Copy(read)
        return replace(spec, dtype=wanted), cast(read)

    def _shards(
        self,
        path: Path,
        component: str,
        view: Checkpoint,
        programs: Mapping[str, tuple[TensorSpec, Program]],
        metadata: Mapping[str, str],
        *,
        shard_bytes: int | None = None,
    ) -> list[Written]:
        limit = self.request.shard_bytes if shard_bytes is None else shard_bytes
        if limit is None:
            limit = _SHARD_BYTES if self.target == "diffusers" else 0
        shards = split_shards([spec for spec, _ in programs.values()], limit)
        return [
            Written(file, component, view, {s.name: programs[s.name] for s in shard}, metadata)
            for file, shard in zip(shard_paths(path, len(shards)), shards, strict=True)
        ]

    def _metadata(self) -> dict[str, str]:
        """The source's own, without what is untrue by now, and a note of this conversion."""
        kept: dict[str, str] = {}
        for key, value in self.checkpoint.metadata.items():
            if key in (HASH_KEY, "sshs_model_hash", "sshs_legacy_hash"):
                continue
            if names_local_path(key) or names_local_path(value):
                self.notes.append(f"metadata {key!r} names a local path and is left out")
            else:
                kept[key] = value
        request = self.request
        note: dict[str, object] = {
            "version": version(),
            "source": self.checkpoint.path.name,
            "source_header_sha256": self.checkpoint.header_sha256,
        }
        if request.dtypes:
            note["dtype"] = dict(sorted(request.dtypes.items()))
        note |= {key: True for key in ("prune", "ema") if getattr(request, key)}
        if request.component:
            note["component"] = request.component
        text = json.dumps(note, separators=(",", ":"), ensure_ascii=False)
        return {**kept, "format": "pt", CONVERSION_KEY: text}


def _map_of(detection: Detection, checkpoint: Checkpoint) -> KeyMap | None:
    """The key map of the family, or the one that knows nearly all of the names."""
    if detection.family in key_map_ids():
        return key_map(detection.family or "")
    if detection.kind == "vae":  # its names are the same in every family
        return key_map("sd1") if _known_share("sd1", checkpoint) == 1 else None
    if detection.kind != "unknown" or not checkpoint:
        return None
    shares = {family: _known_share(family, checkpoint) for family in key_map_ids()}
    best = max(shares, key=lambda family: shares[family])
    others = [family for family in shares if family != best and shares[family] == shares[best]]
    return key_map(best) if shares[best] >= _ENOUGH_KNOWN and not others else None


def _known_share(family: str, checkpoint: Checkpoint) -> float:
    map_ = key_map(family)
    return sum(map_.is_known(name) for name in checkpoint) / len(checkpoint)


# --- what may be written -------------------------------------------------------------------------


def _check_output(request: Request, target: Target, checkpoint: Checkpoint) -> None:
    output = request.output
    inputs = [checkpoint.path, *(file.path for file in checkpoint.files)]
    inside = {parent for path in inputs for parent in path.resolve().parents}
    resolved = output.resolve()
    written = [path for path in (output, part_path(output.absolute())) if path.exists()]
    is_input = any(place.samefile(path) for place in written for path in inputs)
    holds_input = target == "diffusers" and resolved in inside
    folders = [path.resolve() for path in (checkpoint.path, request.source) if path.is_dir()]
    is_within = any(folder in resolved.parents for folder in folders)
    if is_input or holds_input or is_within:
        raise OutputError(
            f"the output {str(output)!r} is, or holds, the input",
            fix="write somewhere else",
        )
    if target == "single":
        if output.is_dir():
            raise OutputError(f"the output {str(output)!r} is a folder", fix="give a file's name")
        return  # its shards are known when the conversion is planned
    if output.exists() and not request.force:
        raise OutputError(f"the output {str(output)!r} exists", fix="use --force to replace it")
    if output.exists() and not _may_replace(output):
        raise OutputError(
            f"{str(output)!r} is no diffusers folder; it is not replaced",
            fix="write to a new folder",
        )
    others = _files_of_others(output) if output.is_dir() else []
    if others:
        raise OutputError(
            f"{str(output)!r} is not replaced: no conversion wrote {others[0]!r} in it",
            fix="write to a new folder",
        )


def _place_of(conversion: Conversion) -> Place:
    """Where a single file, or its shards, go."""
    output, checkpoint = conversion.request.output.absolute(), conversion.checkpoint
    files = tuple(output.parent / name for name in conversion.files)
    return Place(output, files, (checkpoint.path, *(file.path for file in checkpoint.files)))


def _files_of_others(folder: Path) -> list[str]:
    """Files in a diffusers folder that no folder of a model has: somebody's own."""
    there = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return [
        path.relative_to(folder).as_posix()
        for path in there
        if not (_WEIGHTS_FILE.fullmatch(path.name) or path.name in _SETTINGS_FILES)
    ]


def _may_replace(folder: Path) -> bool:
    """Whether a folder is one that a conversion makes, so that nobody loses another's files."""
    if not folder.is_dir():
        return False
    is_component = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return is_diffusers_folder(folder) or is_component or not any(folder.iterdir())


def _check_space(conversion: Conversion) -> None:
    output = conversion.request.output
    problems = folder_problems(output.parent, conversion.file_bytes)
    raise_all([problem.at(str(output)) for problem in problems])


# --- doing it ------------------------------------------------------------------------------------


def convert(
    request: Request, *, threads: int | None = None, progress: Progress | None = None
) -> Result:
    """Convert one checkpoint, or raise and leave everything as it was."""
    started = time.perf_counter()
    progress = progress or Progress()
    with planned(request) as conversion:
        writer = _Writer(conversion, threads or default_threads(), progress)
        if conversion.target == "single":
            files, sha256s = writer.single()
        else:
            files, sha256s = writer.folder()
        return Result(
            conversion, files, sha256s, writer.recomputed, writer.notes,
            time.perf_counter() - started, peak_memory_bytes(),
        )  # fmt: skip


class _Writer:
    """Streams a conversion's files into place."""

    def __init__(self, conversion: Conversion, threads: int, progress: Progress) -> None:
        from ckptools.engine import Settings

        self.conversion, self.progress = conversion, progress
        self.settings = Settings(threads, allow_nonfinite=conversion.request.allow_nonfinite)
        self.recomputed = 0
        self.notes: tuple[str, ...] = ()

    def single(self) -> tuple[dict[str, int], dict[str, str]]:
        place = _place_of(self.conversion)
        parent, stale = place.output.parent, place.stale()
        with made_folder(parent), ExitStack() as stack:
            layouts = self._layouts(parent)
            replaces = self.conversion.request.force
            parts = open_parts(stack, layouts, replaces=replaces)
            sha256s = self._stream(parts)
            if len(layouts) > 1:
                index = whole_file(index_path(place.output), index_document(layouts))
                parts += open_parts(stack, [index], replaces=replaces)
            commit_parts(parts)
        manifest_path(place.output).unlink(missing_ok=True)  # of the file that was replaced
        self.notes = place.clear(stale)
        sync_folder(parent)
        return {part.layout.path.name: part.layout.file_bytes for part in parts}, sha256s

    def folder(self) -> tuple[dict[str, int], dict[str, str]]:
        conversion = self.conversion
        with made_folder(conversion.request.output.absolute().parent), ExitStack() as stack:
            request = conversion.request
            folder = PartFolder(request.output.absolute(), replaces=request.force)
            whole = stack.enter_context(folder)
            layouts = self._layouts(whole.part)
            small = {whole.part / path: data for path, data in conversion.settings.items()}
            for shards in _sharded(layouts):
                small[index_path(_unsharded(shards[0].path))] = index_document(shards)
            for path in (*(layout.path for layout in layouts), *small):
                path.parent.mkdir(parents=True, exist_ok=True)
            parts = open_parts(stack, layouts)
            sha256s = self._stream(parts)
            parts += open_parts(stack, [whole_file(path, data) for path, data in small.items()])
            commit_parts(parts)
            whole.commit()
        laid_out = [part.layout for part in parts]
        return {
            layout.path.relative_to(whole.part).as_posix(): layout.file_bytes for layout in laid_out
        }, sha256s

    def _layouts(self, root: Path) -> list[Layout]:
        return [
            lay_out([s for s, _ in file.programs.values()], file.metadata, root / file.path)
            for file in self.conversion.written
        ]

    def _stream(self, parts: Sequence[PartFile]) -> dict[str, str]:
        from ckptools.engine import Task, run
        from ckptools.verify import check_part

        self.progress.start("converting", self.conversion.output_bytes)
        sha256s: dict[str, str] = {}
        label = self.conversion.checkpoint.path.name
        for part, file in zip(parts, self.conversion.written, strict=True):
            layout = part.layout
            tasks = [Task(s, file.programs[s.name][1], layout.starts[s.name]) for s in layout.specs]
            with _named(file.component):
                outcome = run(
                    tasks, sources=[file.view], labels=[label], sink=part,
                    settings=self.settings, progress=self.progress.advance,
                )  # fmt: skip
            if HASH_KEY in file.metadata:
                layout = with_hash(layout, outcome.sha256)
                part.write(layout.header, 0)
            self.recomputed += check_part(
                part, layout, tasks, seed=outcome.sha256, sources=[file.view], labels=[label],
                settings=self.settings,
            )  # fmt: skip
            sha256s[file.path.as_posix()] = outcome.sha256
        self.conversion.checkpoint.check_unchanged()
        return sha256s


@contextmanager
def _named(component: str) -> Iterator[None]:
    """Say what to do about NaN, Inf and overflow in a conversion's own words."""
    try:
        yield
    except NonFiniteSourceError as exc:
        exc.fix = "get a sound copy of it, or accept such values with --allow-nonfinite"
        raise
    except NonFiniteError as exc:
        part = f"{component}=" if component else "COMPONENT="
        exc.fix = (
            f"keep this component as it is or store it wider (--dtype {part}bf16 or fp32), "
            "or accept such values with --allow-nonfinite"
        )
        raise


def _sharded(layouts: Sequence[Layout]) -> list[list[Layout]]:
    """The layouts that are shards of one file, together."""
    groups: dict[Path, list[Layout]] = {}
    for layout in layouts:
        groups.setdefault(_unsharded(layout.path), []).append(layout)
    return [group for name, group in groups.items() if group[0].path != name]


def _unsharded(path: Path) -> Path:
    """`x.safetensors` for `x-00001-of-00003.safetensors`."""
    stem, dash, rest = path.stem.rpartition("-of-")
    if not dash or not rest.isdigit():
        return path
    return path.with_name(f"{stem.rpartition('-')[0]}{path.suffix}")
