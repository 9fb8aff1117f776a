"""Diffusers folders under single-file names, and single files under a folder's.

Either way it is a view: every tensor keeps its bytes where they lie, and the other layout's names,
rows and transpositions become runs of bytes to read. Names come from `keymap`; no values here.

What one layout has and the other has not:

* Tensors without counterpart in a folder (position ids, OpenCLIP's last layer, a sampler's
  buffers) lie beside the components in `SIDE_FILE`, under their single-file names. Loaders of
  folders do not look for it; a folder without it opens without those tensors, as diffusers' own
  conversion leaves it.
* Position ids that a folder's text encoder repeats and its single file never had are left out.
* Anything else that the key map does not know keeps the name `<component>.<tensor>`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptools.checkpoint import Checkpoint, Extent, SourceFile, Tensors, json_beside
from ckptools.errors import CkptError, InputError, counted, raise_all
from ckptools.family import UNKNOWN, detect, family_of, load_families
from ckptools.keymap import KeyMap, Piece, key_map, key_map_ids
from ckptools.tensors import DTYPES, TensorSpec

SIDE_FILE = "single_file_only.safetensors"
# What such a folder's main model is called; its metadata speaks for the whole.
MAIN_COMPONENTS = ("unet", "transformer")
_MODEL_INDEX = "model_index.json"
_LONE_COMPONENTS = ("unet", "transformer", "vae")
# No other layout has names that begin so; the key maps are read only where one does.
_MARKS = (
    "down_blocks.", "up_blocks.", "transformer_blocks.",
    "encoder.down_blocks.", "decoder.up_blocks.",
)  # fmt: skip
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>[\w-]+))?"
    r"\.(?:(?P<kind>safetensors|bin)|safetensors\.index(?:\.(?P<late>[\w-]+))?\.json)"
)
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
_ZERO_SNR = "ztsnr"
_MOST_LISTED = 4

Opener = Callable[[Path], Checkpoint]


# --- opening -----------------------------------------------------------------------------------


def is_diffusers_folder(path: Path) -> bool:
    """Whether a path is a folder of components: a `model_index.json`, or weights in `unet/`."""
    try:
        return (path / _MODEL_INDEX).is_file() or any(
            components_among(f"{name}/{item.name}" for item in (path / name).glob("*"))
            for name in MAIN_COMPONENTS
        )
    except OSError:  # no right to look, no folder: opening it as a file tells
        return False


def open_folder(
    folder: Path, open_file: Opener, *, names: Iterable[str] | None = None
) -> Checkpoint:
    """All components of a diffusers folder as one checkpoint, under single-file names.

    open_file  opens one file of weights, or the index of shards
    names      the files in it, as relative paths; default: those that are there
    A component that is not there is left out, with a warning. Where a file is there in several
    precisions, the full one is taken. Raises `InputError` for tensors that do not make a whole
    (q without k, two dtypes in what is one tensor).
    """
    warnings: list[str] = []
    names = _names_in(folder) if names is None else set(names)
    components = {
        name: open_file(folder / _chosen(name, weights, warnings))
        for name, weights in components_among(names).items()
    }
    if not components:
        raise InputError(
            "a diffusers folder without weights",
            where=str(folder),
            fix="download the folder with its .safetensors files",
        )
    known = {id_ for family in key_map_ids() for id_ in key_map(family).components}
    for name in sorted(components.keys() - known):
        warnings.append(f"{name} is left out: it is no part of a single-file checkpoint")
        components.pop(name).close()
    extra = open_file(folder / SIDE_FILE) if SIDE_FILE in names else None
    warnings += [f"{name} has no weights" for name in _missing(folder, known - components.keys())]
    return _assembled(folder, components, extra, warnings)


def from_diffusers(checkpoint: Checkpoint) -> Checkpoint:
    """A lone component in diffusers' names (a VAE, a UNet) under single-file names.

    Any other checkpoint comes back as it is.
    """
    if not any(name.startswith(_MARKS) for name in checkpoint):
        return checkpoint
    if detect(checkpoint, checkpoint.metadata).kind in ("lora", "embedding", "controlnet"):
        return checkpoint
    for family in key_map_ids():
        for id_, component in key_map(family).components.items():
            if id_ in _LONE_COMPONENTS and all(
                key_map(family).checkpoint_spec(id_, replace(spec, name=component.usual_name(name)))
                for name, spec in checkpoint.items()
            ):
                return _assembled(checkpoint.path, {id_: checkpoint}, None, [])
    return checkpoint


def as_component(checkpoint: Checkpoint, family: str, ids: Sequence[str]) -> Checkpoint | None:
    """Parts of a model from a file of their own, under the names of a family's single files.

    ids  the components that the file is to be: text_encoder, vae …
    A text encoder's names may be those of transformers or of the family, with the prefixes that
    stand before them in other tools' files. None where the family has no such names; tensors that
    it has none for are left out, with a warning. Raises `InputError` for tensors that do not make a
    whole.
    """
    view = _View()
    parts = _parts(view, checkpoint)
    used: set[str] = set()
    for id_ in ids if family in key_map_ids() else ():
        if id_ in key_map(family).components:
            mapped = _named_best(key_map(family), id_, parts)
            raise_all(mapped.errors)
            for name, spec in mapped.specs.items():
                view.add(spec, mapped.extents[name])
            used |= mapped.used
    if not view.specs:
        return None
    warnings = []
    if len(used) < len(parts):
        rest = [name for name in parts if name not in used]
        listed = ", ".join(rest[:_MOST_LISTED]) + (", …" if len(rest) > _MOST_LISTED else "")
        foreign = counted(len(rest), "tensor", "is")
        warnings.append(f"{foreign} no part of {' or '.join(ids)}: {listed}")
    tensors = Tensors(view.specs, view.extents, layout="diffusers")
    return Checkpoint(
        checkpoint.path, view.files, checkpoint.metadata, tensors=tensors, warnings=tuple(warnings)
    )


@dataclass
class _Named:
    """A component's tensors under a family's names; `used`: its own names of them."""

    specs: Mapping[str, TensorSpec]
    extents: Mapping[str, tuple[Extent, ...]]
    used: set[str]
    errors: Sequence[CkptError] = ()


def _named_best(map_: KeyMap, id_: str, parts: Mapping[str, _Part]) -> _Named:
    """The tensors under the family's names, by the spelling that most of them fit."""
    component = map_.components[id_]
    adapters = component.adapters
    tried = []
    for prefix in dict.fromkeys(("", *adapters.dotted, *adapters.original)):
        below = {name[len(prefix) :]: p for name, p in parts.items() if name.startswith(prefix)}
        if below:
            tried.append(_named_from_folder(map_, id_, prefix, below))
            tried += [_named_below(map_, own, prefix, below) for own in component.prefixes]
    return max(tried, key=lambda named: len(named.used), default=_Named({}, {}, set()))


def _named_from_folder(map_: KeyMap, id_: str, prefix: str, parts: Mapping[str, _Part]) -> _Named:
    """Tensors that have diffusers' or transformers' names."""
    mapped = _Mapped(map_, {id_: parts})
    unknown = set(mapped.unknown)
    specs = {name: spec for name, spec in mapped.specs.items() if name not in unknown}
    used = {prefix + name for name in parts if f"{id_}.{prefix}{name}" not in unknown}
    return _Named(specs, mapped.extents, used if specs else set(), mapped.errors)


def _named_below(map_: KeyMap, own: str, prefix: str, parts: Mapping[str, _Part]) -> _Named:
    """Tensors that have the family's names, but for what stands before them."""
    known = {own + name: name for name in parts if map_.is_known(own + name)}
    specs = {name: replace(parts[inner].spec, name=name) for name, inner in known.items()}
    extents = {name: parts[inner].extents for name, inner in known.items()}
    return _Named(specs, extents, {prefix + inner for inner in known.values()})


def _missing(folder: Path, ids: frozenset[str] | set[str]) -> list[str]:
    """Components that the folder's own list names and that are not there."""
    listed = json_beside(folder / _MODEL_INDEX, _MODEL_INDEX) or {}
    return sorted(
        id_ for id_ in ids if isinstance(listed.get(id_), list) and any(_texts(listed[id_]))
    )


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _names_in(folder: Path) -> set[str]:
    """The files in a folder and in its subfolders, as relative paths."""
    return {
        path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*"))
    }


def components_among(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Component → variant ("" is the full one) → the file, or index of shards, to open for it.

    names  files of a diffusers folder, as relative paths with /

    Source of the names: diffusers 0.42, `utils/constants.py` and `models/model_loading_utils.py`
    (`_add_variant`); transformers names its files `model.safetensors` and `pytorch_model.bin`.
    """
    ranked: dict[str, dict[str, tuple[tuple[int, str], str]]] = {}
    for path in sorted(names):
        folder, _, name = path.rpartition("/")
        match = _WEIGHTS.fullmatch(name)
        if match is None or not folder or "/" in folder:
            continue
        variant = match["variant"] or match["late"] or ""
        rank = (["safetensors", None, "bin"].index(match["kind"]), name)
        there = ranked.setdefault(folder, {})
        if variant not in there or rank < there[variant][0]:
            there[variant] = (rank, path)
    return {
        folder: {variant: path for variant, (_, path) in sorted(there.items())}
        for folder, there in ranked.items()
    }


def chosen_weights(names: Iterable[str]) -> tuple[str, ...]:
    """The files of weights, or indexes of shards, that `open_folder` opens among these names."""
    names = set(names)
    known = {id_ for family in key_map_ids() for id_ in key_map(family).components}
    chosen = [
        _chosen(component, weights, [])
        for component, weights in components_among(names).items()
        if component in known
    ]
    return (*chosen, *({SIDE_FILE} & names))


def _chosen(component: str, weights: Mapping[str, str], warnings: list[str]) -> str:
    variant = "" if "" in weights else "fp16" if "fp16" in weights else min(weights)
    if variant:
        others = f" of {', '.join(weights)}" if len(weights) > 1 else ", the only one there"
        warnings.append(f"{component}: the variant {variant!r} is read{others}")
    return weights[variant]


# --- a folder as a single file -------------------------------------------------------------------


@dataclass
class _View:
    """Tensors gathered under new names, over the files of several checkpoints."""

    files: list[SourceFile] = field(default_factory=list)
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    extents: dict[str, tuple[Extent, ...]] = field(default_factory=dict)

    def add_files(self, checkpoint: Checkpoint) -> int:
        """Add a checkpoint's files; the number of the first."""
        first = len(self.files)
        self.files += checkpoint.files
        return first

    def add(self, spec: TensorSpec, extents: Sequence[Extent]) -> None:
        self.specs[spec.name] = spec
        self.extents[spec.name] = tuple(extents)


@dataclass(frozen=True)
class _Part:
    """One tensor of a component, and where it lies among the files of all components."""

    spec: TensorSpec
    extents: tuple[Extent, ...]


Folder = Mapping[str, Mapping[str, _Part]]


def _assembled(
    path: Path,
    components: Mapping[str, Checkpoint],
    extra: Checkpoint | None,
    warnings: list[str],
) -> Checkpoint:
    view = _View()
    folder = {id_: _parts(view, checkpoint) for id_, checkpoint in components.items()}
    _fill(view, folder, warnings)
    metadata = _metadata(path, components)
    if extra is not None:
        for name, part in _parts(view, extra).items():
            if name not in view.specs:
                view.add(part.spec, part.extents)
    _add_markers(view, path, metadata)
    for checkpoint in (*components.values(), *([extra] if extra else [])):
        of_headers = [text for file in checkpoint.files for text in file.header.warnings]
        warnings += [text for text in checkpoint.warnings if text not in of_headers]
        checkpoint.close()
    tensors = Tensors(view.specs, view.extents, layout="diffusers")
    return Checkpoint(path, view.files, metadata, tensors=tensors, warnings=tuple(warnings))


def _parts(view: _View, checkpoint: Checkpoint) -> dict[str, _Part]:
    first = view.add_files(checkpoint)
    return {
        name: _Part(
            spec, tuple(replace(run, file=run.file + first) for run in checkpoint.extents(name))
        )
        for name, spec in checkpoint.items()
    }


def _fill(view: _View, folder: Folder, warnings: list[str]) -> None:
    """Put a folder's tensors into the view, by the key map that they fit."""
    tried = [_Mapped(key_map(family), folder) for family in key_map_ids()]
    tried = [mapped for mapped in tried if folder.keys() <= mapped.map.components.keys()]
    chosen = next((mapped for mapped in tried if mapped.is_of_family), None)
    if chosen is None:  # a part of a model: where its names are the same in every family
        whole = [mapped.canonical() for mapped in tried if not mapped.unknown and not mapped.errors]
        agree = whole and all(mapped.specs == whole[0].specs for mapped in whole)
        chosen = whole[0] if agree else None
    if chosen is None:
        is_alone = len(folder) == 1  # such a file keeps its names
        for component, tensors in folder.items():
            for name, part in tensors.items():
                named = name if is_alone else f"{component}.{name}"
                view.add(replace(part.spec, name=named), part.extents)
        if not is_alone:
            warnings.append("no known family: tensors are called <component>.<tensor>")
        return
    raise_all(chosen.errors)
    for name, spec in chosen.specs.items():
        view.add(spec, chosen.extents[name])
    if chosen.unknown:
        listed = ", ".join(chosen.unknown[:_MOST_LISTED])
        more = ", …" if len(chosen.unknown) > _MOST_LISTED else ""
        warnings.append(
            f"{chosen.map.family} has no place for {counted(len(chosen.unknown), 'tensor')}; kept "
            f"under the same name: {listed}{more}"
        )


class _Mapped:
    """What one family's key map makes of a folder.

    unknown  tensors that the map has no name for, as <component>.<tensor>
    errors   of tensors that do not make a whole
    """

    def __init__(self, map_: KeyMap, folder: Folder) -> None:
        self.map = map_
        self.specs: dict[str, TensorSpec] = {}
        self.extents: dict[str, tuple[Extent, ...]] = {}
        self.unknown: list[str] = []
        self.errors: list[CkptError] = []
        for id_, tensors in folder.items():
            if id_ in map_.components:
                self._add(id_, tensors)

    @property
    def is_of_family(self) -> bool:
        """Whether the result is told to be of the map's family."""
        return detect(self.specs).family == self.map.family

    def canonical(self) -> _Mapped:
        """The same under the names that a part alone usually has: Flux calls its VAE otherwise."""
        usual = family_of(detect(self.specs)).canonical_name
        self.extents = {usual(name): extents for name, extents in self.extents.items()}
        self.specs = {usual(n): replace(spec, name=usual(n)) for n, spec in self.specs.items()}
        return self

    def _add(self, id_: str, tensors: Mapping[str, _Part]) -> None:
        usual = self.map.components[id_].usual_name
        parts = {usual(name): part for name, part in tensors.items()}
        targets: dict[str, TensorSpec] = {}
        for name, part in parts.items():
            spec = self.map.checkpoint_spec(id_, replace(part.spec, name=name))
            if spec is not None:
                targets[spec.name] = spec
                if self.map.pieces(spec) == ():
                    self._take(spec, part.extents)
            elif not name.endswith("position_ids"):
                named = f"{id_}.{part.spec.name}"
                self.unknown.append(named)
                self._take(replace(part.spec, name=named), part.extents)
        for spec in targets.values():
            try:
                self._join(spec, parts)
            except CkptError as exc:
                self.errors.append(exc.at(f"{id_}/{spec.name}"))

    def _join(self, spec: TensorSpec, parts: Mapping[str, _Part]) -> None:
        pieces = self.map.pieces(spec)
        if not pieces:
            return
        extents: list[Extent] = []
        for piece in pieces:
            if piece.name not in parts:
                raise InputError(
                    f"{piece.name!r} is missing", where=spec.name, fix="download the folder again"
                )
            part = parts[piece.name]
            _check_fits(spec, piece, part)
            extents += _shared_out(part, piece)
        self._take(spec, extents)

    def _take(self, spec: TensorSpec, extents: Sequence[Extent]) -> None:
        self.specs[spec.name] = spec
        self.extents[spec.name] = tuple(extents)


def _check_fits(spec: TensorSpec, piece: Piece, part: _Part) -> None:
    if part.spec.dtype != spec.dtype:
        raise InputError(
            f"{part.spec.name!r} is {part.spec.dtype}, the others that make this tensor up are "
            f"{spec.dtype}",
            where=spec.name,
            fix="store the component in one dtype",
        )
    shape = part.spec.shape
    if piece.part is not None:
        shape = (piece.part[1] - piece.part[0], *shape[1:])
    if shape != piece.shape and not (piece.op == "reshape" and shape == (*piece.shape, 1, 1)):
        raise InputError(
            f"{part.spec.name!r} is {list(part.spec.shape)}, {list(piece.shape)} is wanted",
            where=spec.name,
            fix="download the folder again",
        )


def _shared_out(part: _Part, piece: Piece) -> tuple[Extent, ...]:
    """The runs of a folder's tensor that a piece of the single file's is made of."""
    extents = part.extents
    if piece.part is not None:
        extents = _rows(extents, part.spec, *piece.part)
    return _transposed(extents, part.spec) if piece.op == "transpose" else extents


def _metadata(path: Path, components: Mapping[str, Checkpoint]) -> dict[str, str]:
    """The main model's own metadata; what the sampler's settings say of the prediction."""
    main = next((id_ for id_ in MAIN_COMPONENTS if id_ in components), next(iter(components)))
    metadata = {k: v for k, v in components[main].metadata.items() if k != "format"}
    prediction, _ = _scheduler(path)
    if prediction:
        metadata["modelspec.prediction_type"] = prediction
    return metadata


def _scheduler(path: Path) -> tuple[str, bool]:
    """(prediction or "", whether the schedule ends at zero signal), as the folder says."""
    config = json_beside(path / "scheduler" / "_", "scheduler_config.json") or {}
    prediction = _PREDICTIONS.get(str(config.get("prediction_type")), "")
    return prediction, config.get("rescale_betas_zero_snr") is True


def _add_markers(view: _View, path: Path, metadata: Mapping[str, str]) -> None:
    """The empty tensors by which loaders of single files know what a folder's settings say."""
    prediction, is_zero_snr = _scheduler(path)
    family = family_of(detect(view.specs, metadata))
    if prediction in ("", family.usual_prediction) or family.usual_prediction is None:
        return
    marker = next((m for m, p in family.prediction_markers.items() if p == prediction), None)
    for name in ([marker] if marker else []) + ([_ZERO_SNR] if is_zero_snr else []):
        if name not in view.specs:
            view.add(TensorSpec(name, "F32", (0,)), ())


# --- a single file as a folder -------------------------------------------------------------------


@dataclass(frozen=True)
class FolderView:
    """A checkpoint as a diffusers folder sees it.

    components  component → its tensors under diffusers' names
    side        tensors without a place in any of them, under their own names
    """

    components: Mapping[str, Checkpoint]
    side: Checkpoint

    def close(self) -> None:
        """Close every view; the checkpoint they look at stays as it is."""
        for view in (*self.components.values(), self.side):
            view.close()


def as_folder(checkpoint: Checkpoint, family: str, names: Sequence[str]) -> FolderView:
    """The tensors `names` of a checkpoint under a folder's names, by the family's key map.

    Raises `InputError` where the map and the shapes disagree.
    """
    map_ = key_map(family)
    gathered: dict[str, dict[str, list[tuple[Piece, str]]]] = {}
    side = _View(list(checkpoint.files))
    usual = load_families().get(family, UNKNOWN).canonical_name
    for name in sorted(names, key=lambda name: (usual(name) != name, name)):
        pieces = map_.pieces(checkpoint[name]) or ()
        taken = [p for p in pieces if p.part is None and p.name in gathered.get(p.component, {})]
        if not pieces or taken:  # a second spelling of a tensor that has its place
            side.add(checkpoint[name], checkpoint.extents(name))
            continue
        for piece in pieces:
            gathered.setdefault(piece.component, {}).setdefault(piece.name, []).append(
                (piece, name)
            )
    views = {id_: _folder_component(checkpoint, gathered[id_]) for id_ in sorted(gathered)}
    return FolderView(
        {id_: _over(checkpoint, view) for id_, view in views.items()}, _over(checkpoint, side)
    )


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """A view of some tensors of a checkpoint: new name → its own."""
    view = _View(list(checkpoint.files))
    for new, own in names.items():
        view.add(replace(checkpoint[own], name=new), checkpoint.extents(own))
    return _over(checkpoint, view)


def _over(checkpoint: Checkpoint, view: _View) -> Checkpoint:
    tensors = Tensors(view.specs, view.extents, layout="diffusers")
    return Checkpoint(checkpoint.path, checkpoint.files, checkpoint.metadata, tensors=tensors)


def _folder_component(
    checkpoint: Checkpoint, tensors: Mapping[str, Sequence[tuple[Piece, str]]]
) -> _View:
    view = _View(list(checkpoint.files))
    for there, sharers in tensors.items():
        ordered = sorted(sharers, key=lambda pair: pair[0].part or (0, 0))
        dtypes = {checkpoint[name].dtype for _, name in ordered}
        if len(dtypes) > 1:
            raise InputError(
                f"{' and '.join(sorted(dtypes))} would make up one tensor",
                where=there,
                fix="convert with one --dtype for the component",
            )
        extents: list[Extent] = []
        for piece, name in ordered:
            runs = checkpoint.extents(name)
            if piece.rows is not None:
                runs = _rows(runs, checkpoint[name], *piece.rows)
            if piece.op == "transpose":
                runs = _transposed(runs, checkpoint[name])
            extents += runs
        first = ordered[0][0].shape
        rows = sum(piece.shape[0] for piece, _ in ordered) if len(ordered) > 1 else None
        shape = first if rows is None else (rows, *first[1:])
        view.add(TensorSpec(there, dtypes.pop(), shape), extents)
    return view


# --- runs of elements ----------------------------------------------------------------------------


def _rows(extents: Sequence[Extent], spec: TensorSpec, first: int, last: int) -> tuple[Extent, ...]:
    """The runs of rows [first, last) of a tensor."""
    row = spec.nbytes // spec.shape[0] if spec.shape[0] else 0
    return tuple(_cut(extents, spec, first * row, last * row))


def _cut(extents: Sequence[Extent], spec: TensorSpec, begin: int, end: int) -> Iterator[Extent]:
    width = DTYPES[spec.dtype].bits // 8
    position = 0
    for run in extents:
        low, high = max(begin - position, 0), min(end - position, run.nbytes)
        position += run.nbytes
        if low >= high:
            continue
        if not run.strides:
            yield Extent(run.file, run.start + low, high - low)
            continue
        (_, stride), *inner = run.strides
        row = math.prod(size for size, _ in inner) * width
        if low % row or high % row:
            raise InputError("rows of a tensor with strides cannot be shared out", where=spec.name)
        dims = ((high - low) // row, stride), *inner
        yield Extent(run.file, run.start + low // row * stride * width, high - low, dims)


def _transposed(extents: Sequence[Extent], spec: TensorSpec) -> tuple[Extent, ...]:
    """The runs of the transposed matrix; `spec` is the matrix as it stands."""
    if not spec.numel:
        return tuple(extents)
    rows, columns = spec.shape
    if len(extents) != 1:
        raise InputError("a matrix in several runs cannot be transposed", where=spec.name)
    (run,) = extents
    strides = (run.strides or ((rows, columns), (columns, 1)))[::-1]
    follow = ((columns, rows), (rows, 1))
    return (Extent(run.file, run.start, run.nbytes, () if strides == follow else strides),)
