"""`ckptools inspect`: what a file is, whether it is whole, and where it comes from.

From headers, and from the few small tensors that say what no header can. Loads no torch.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import translate
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ckptools.checkpoint import Checkpoint, open_file, shards_named_in
from ckptools.errors import CkptError, InputError, UsageError, nearest_name
from ckptools.family import UNKNOWN, Detection, Family, detect, family_of, load_families
from ckptools.folders import is_diffusers_folder
from ckptools.hub import look
from ckptools.known import Known, known_tensors, missing_of, tensor_list
from ckptools.lineage import Lineage, read_lineage
from ckptools.tensors import TensorSpec
from ckptools.writer import MANIFEST_SCHEMA, MANIFEST_SUFFIX

if TYPE_CHECKING:
    from ckptools.adapters.inspection import Inspection as AdapterInspection
    from ckptools.measure import Values
    from ckptools.progress import Progress

State = Literal["complete", "incomplete", "absent", "not known"]

SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")
# Empty or tiny tensors that tell loaders how to run a model. Sources: ComfyUI, supported_models.py
# (v_pred, ztsnr, edm_*), controlnet.py (difference, lora_controlnet), ops.py (scaled_fp8).
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min",
           "difference", "lora_controlnet", "scaled_fp8")  # fmt: skip
_MOST_MANIFEST = 16_000_000
_MOST_IDS = 100_000
_SAME_WIDTH = 0.5
_V_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_STD = 0.09
_EMA = "model_ema."
_UNET = "model.diffusion_model."


@dataclass(frozen=True)
class Misshapen:
    """A tensor whose shape is not that of whole models of the family, and theirs."""

    name: str
    shape: tuple[int, ...]
    usual: tuple[int, ...]


@dataclass(frozen=True)
class Component:
    """One component of a model.

    dtypes      dtype → tensors
    state       "absent" has no tensors; "not known" where no list of the family's tensors is known
    missing     names that whole models have
    unexpected  names that they have not
    """

    tensors: int = 0
    nbytes: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict)
    state: State = "not known"
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[Misshapen, ...] = ()


@dataclass(frozen=True)
class PositionIds:
    """A `position_ids` tensor: 0, 1, 2 … in sound files.

    wrong  (index, value) of the first that is not its own index; None where all are
    count  how many are not
    """

    name: str
    dtype: str
    wrong: tuple[int, float] | None
    count: int


@dataclass(frozen=True)
class Vectors:
    """One tensor of a textual inversion: so many vectors, so wide."""

    name: str
    vectors: int
    width: int


@dataclass(frozen=True)
class Manifest:
    """The `.ckptools.json` beside a file.

    is_of_this_file  whether it was written for a file with this header
    inputs           (name, file, sha256 or "") of what the merge read
    problem          why it could not be read; "" where it was
    """

    path: Path
    is_of_this_file: bool = False
    inputs: tuple[tuple[str, str, str], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, object] | None = None
    problem: str = ""


@dataclass(frozen=True)
class TensorRow:
    """One tensor and where it belongs; block "" where it has none."""

    spec: TensorSpec
    component: str
    block: str


@dataclass(frozen=True)
class Statistics:
    """What the values of floating point tensors are like: of each, of each block and component.

    blocks  "unet IN04", "vae", in the family's order
    """

    tensors: Mapping[str, Values]
    blocks: Mapping[str, Values]
    components: Mapping[str, Values]


@dataclass(frozen=True)
class Inspection:
    """What a file is.

    title           the family in words
    prediction      as detected; where the header cannot tell, as the values do
    layout          as detected; "diffusers" for a folder that is shown under single-file names
    whole           whether every component that is there is complete, and not the EMA copy alone;
                    None where no list is known
    value_evidence  what was read from values, in words: evidence, not proof
    ema             "beside" the UNet's own weights, "only" the EMA copy, or ""
    markers, empty  marker tensors; tensors without any element
    """

    path: Path
    nbytes: int
    tensors: int
    files: int
    detection: Detection
    title: str
    prediction: str | None
    layout: str | None
    components: Mapping[str, Component]
    whole: bool | None
    value_evidence: tuple[str, ...]
    position_ids: tuple[PositionIds, ...]
    ema: str
    markers: tuple[str, ...]
    empty: tuple[str, ...]
    vectors: tuple[Vectors, ...]
    adapter: AdapterInspection | None
    lineage: Lineage
    manifest: Manifest | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    rows: tuple[TensorRow, ...] = ()
    statistics: Statistics | None = None

    @property
    def dtypes(self) -> dict[str, int]:
        """Dtype → tensors of the whole file, the most frequent first."""
        total: Counter[str] = Counter()
        for component in self.components.values():
            total.update(component.dtypes)
        return dict(total.most_common())


def inspect(
    path: Path, *, tensors: str = "", statistics: bool = False, progress: Progress | None = None
) -> Inspection:
    """What the file, index of shards or diffusers folder is.

    tensors     a glob: also list the tensors that it matches; one that matches none is a
                `UsageError`
    statistics  read the values, too: of the tensors that `tensors` matches, or of all
    Raises as `open_checkpoint` does, and `InputError` for an adapter that is broken.
    """
    with look(path) as checkpoint:
        detection = detect(checkpoint, checkpoint.metadata)
        family = family_of(detection)
        known = known_tensors(detection, checkpoint)
        canonical = {name: family.canonical_name(name) for name in checkpoint}
        components = _components(checkpoint, canonical, family, known)
        said, value_prediction = _value_evidence(checkpoint, detection)
        manifest = _manifest(checkpoint)
        ema = _ema(checkpoint)
        if ema == "only" and family.id == "unknown":
            components = {"ema": _ema_component(checkpoint), **components}
            components["other"] = _without_ema(checkpoint)
            if not components["other"].tensors:
                del components["other"]
        is_adapter = detection.kind == "lora" and not checkpoint.is_elsewhere
        adapter = _adapter(path) if is_adapter else None
        ids = tuple(_position_ids(checkpoint))
        rows = _rows(checkpoint, family, tensors) if tensors or statistics else ()
        return Inspection(
            path=path,
            nbytes=checkpoint.file_bytes,
            tensors=len(checkpoint),
            files=len(checkpoint.files),
            detection=detection,
            title=family.title if detection.family else "",
            prediction=detection.prediction or value_prediction,
            layout=checkpoint.layout or detection.layout,
            components=components,
            whole=False if ema == "only" else _is_whole(components),
            value_evidence=said,
            position_ids=ids,
            ema=ema,
            markers=tuple(name for name in MARKERS if name in checkpoint),
            empty=tuple(sorted(name for name, spec in checkpoint.items() if not spec.numel)),
            vectors=_vectors(checkpoint) if detection.kind == "embedding" else (),
            adapter=adapter,
            lineage=read_lineage(
                checkpoint.metadata,
                checkpoint.path.name,
                recipe=manifest.recipe if manifest and manifest.is_of_this_file else None,
            ),
            manifest=manifest,
            notes=_notes(checkpoint, detection, family, components),
            warnings=checkpoint.warnings,
            rows=rows if tensors else (),
            statistics=_statistics(checkpoint, family, rows, progress) if statistics else None,
        )


def _adapter(path: Path) -> AdapterInspection:
    from ckptools.adapters.inspection import inspect_adapter  # slow to load, seldom needed

    return inspect_adapter(path)


@dataclass(frozen=True)
class Survey:
    """What was found in the places that a user named.

    found      each file with what it is, or with the error that stopped its reading
    is_single  whether one checkpoint was asked for: its error is raised, not kept here
    """

    found: tuple[tuple[Path, Inspection | CkptError], ...]
    is_single: bool

    @property
    def exit_code(self) -> int:
        """0, or that of the worst error."""
        return max((0, *(one.exit_code for _, one in self.found if isinstance(one, CkptError))))


def survey(
    places: Sequence[Path],
    *,
    tensors: str = "",
    statistics: bool = False,
    progress: Progress | None = None,
) -> Survey:
    """What all the places are; a plain folder stands for the files in it.

    tensors, statistics  as `inspect` has them
    One place that is no plain folder raises as `inspect` does.
    """
    paths = [path for place in places for path in files_in(place) or (place,)]
    if len(paths) == 1:
        one = inspect(paths[0], tensors=tensors, statistics=statistics, progress=progress)
        return Survey(((paths[0], one),), is_single=True)
    found: list[tuple[Path, Inspection | CkptError]] = []
    for path in paths:
        try:
            found.append(
                (path, inspect(path, tensors=tensors, statistics=statistics, progress=progress))
            )
        except CkptError as exc:
            found.append((path, exc))
    return Survey(tuple(found), is_single=False)


def files_in(path: Path) -> tuple[Path, ...]:
    """The checkpoints in a plain folder, sorted; () for anything that is one checkpoint.

    A plain folder holds several files, diffusers folders, or indexes, which stand for their shards.
    """
    if not path.is_dir() or is_diffusers_folder(path):
        return ()
    indexes = sorted(path.glob("*.index.json"))
    shards = shards_named_in(indexes)
    found = [item for item in path.iterdir() if _is_checkpoint(item) and item.name not in shards]
    found = sorted([*indexes, *found])
    return tuple(found) if len(found) > 1 else ()


def _is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return is_diffusers_folder(path) and any(map(_has_suffix, path.glob("*/*")))
    return _has_suffix(path) and path.is_file()


def _has_suffix(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _rows(checkpoint: Checkpoint, family: Family, glob: str) -> tuple[TensorRow, ...]:
    matches = re.compile(translate(glob or "*")).match
    rows = []
    for name in sorted(checkpoint):
        if matches(name):
            usual = family.canonical_name(name)
            rows.append(
                TensorRow(checkpoint[name], _component_of(family, usual), family.block_of(usual))
            )
    if not rows and glob:
        raise UsageError(
            f"no tensor matches {glob!r}",
            where=str(checkpoint.path),
            fix=nearest_name(glob, list(checkpoint), "'*' lists all names"),
        )
    return tuple(rows)


# --- values ------------------------------------------------------------------------------------


def _statistics(
    checkpoint: Checkpoint, family: Family, rows: Sequence[TensorRow], progress: Progress | None
) -> Statistics:
    """Statistics of the rows' floating point tensors, streamed."""
    from ckptools.measure import Values, measure_values, rows_of

    places = {row.spec.name: row for row in rows if row.spec.is_float and row.spec.numel}
    if progress is not None:
        progress.start(
            f"reading {checkpoint.path.name}", sum(row.spec.nbytes for row in places.values())
        )
    found = measure_values(
        rows_of([checkpoint], places), advance=progress.advance if progress else lambda _: None
    )
    checkpoint.check_unchanged()
    blocks: dict[str, Values] = {}
    components: dict[str, Values] = {}
    for name, values in found.items():
        row = places[name]
        label = row.component if row.block in ("", "BASE") else f"{row.component} {row.block}"
        blocks[label] = blocks.get(label, Values()) + values
        components[row.component] = components.get(row.component, Values()) + values
    order = [*family.components, "other"]
    block_order = ["", *family.blocks]

    def position(label: str) -> tuple[int, int]:
        component, _, block = label.partition(" ")
        return order.index(component), block_order.index(block)

    return Statistics(
        tensors=found,
        blocks={label: blocks[label] for label in sorted(blocks, key=position)},
        components={label: components[label] for label in sorted(components, key=position)},
    )


# --- what whole models hold --------------------------------------------------------------------


def _components(
    checkpoint: Checkpoint,
    canonical: Mapping[str, str],
    family: Family,
    known: Mapping[str, Known],
) -> dict[str, Component]:
    """Every component that is there or that whole models have, in the family's order."""
    present: dict[str, dict[str, str]] = {}
    for name, usual in canonical.items():
        present.setdefault(_component_of(family, usual), {})[usual] = name
    wanted: dict[str, dict[str, Known]] = {}
    for usual, one in known.items():
        wanted.setdefault(_component_of(family, usual), {})[usual] = one
    if any(name.startswith(_EMA) for name in canonical) and "ema" in present:
        wanted["ema"] = _ema_of(wanted.get("unet", {}))
    order = [*family.components, "other"]
    return {
        component: _component(
            checkpoint, present.get(component, {}), wanted.get(component, {}), family, component
        )
        for component in order
        if component in present or (component in wanted and _is_expected(component))
    }


def _component_of(family: Family, name: str) -> str:
    """The component of a tensor; a file that is one component by itself has no other."""
    if family.kind != "checkpoint" and len(family.components) == 1:
        return next(iter(family.components))
    return family.component_of(name)


def _is_expected(component: str) -> bool:
    """Whether a model without it lacks something; the noise schedule and estimators are extras."""
    return component not in ("other", "ema", "depth")


def _ema_of(unet: Mapping[str, Known]) -> dict[str, Known]:
    """The EMA copy's names. Source: CompVis/latent-diffusion, `ldm/modules/ema.py`, `LitEma`."""
    return {_ema_name(name): known for name, known in unet.items()}


def _ema_name(name: str) -> str:
    return _EMA + name.removeprefix("model.").replace(".", "")


def _component(
    checkpoint: Checkpoint,
    present: Mapping[str, str],
    wanted: Mapping[str, Known],
    family: Family,
    component: str,
) -> Component:
    """present: usual name → the file's; wanted: usual name → what whole models have."""
    specs = [checkpoint[name] for name in present.values()]
    found = Component(
        tensors=len(specs),
        nbytes=sum(spec.nbytes for spec in specs),
        dtypes=dict(Counter(spec.dtype for spec in specs).most_common()),
    )
    if not wanted or component == "other":
        return found
    missing = missing_of(wanted, present)
    if not specs:
        return replace(found, state="absent", missing=missing)
    return replace(
        found,
        state="incomplete" if missing else "complete",
        missing=missing,
        unexpected=tuple(
            sorted(
                name
                for usual, name in present.items()
                if usual not in wanted and not family.is_protected(usual)
            )
        ),
        misshapen=_misshapen(checkpoint, present, wanted, family),
    )


def _misshapen(
    checkpoint: Checkpoint,
    present: Mapping[str, str],
    wanted: Mapping[str, Known],
    family: Family,
) -> tuple[Misshapen, ...]:
    """Tensors of another shape than their siblings' widths say.

    A relative of another width is compared in its numbers of dims alone.
    """
    inputs = set(family.input_tensors) | {_ema_name(name) for name in family.input_tensors}
    shared = [name for name in wanted if name in present and name not in inputs]
    same = sum(checkpoint[present[name]].shape == wanted[name].shape for name in shared)
    is_same_width = same > _SAME_WIDTH * len(shared)
    found = []
    for name in shared:
        spec = checkpoint[present[name]]
        shape, usual = spec.shape, wanted[name].shape
        differs = shape != usual if is_same_width else len(shape) != len(usual)
        # no float: quantised weights are packed, and position_ids are [77] or [1, 77]
        if differs and spec.is_float and not name.endswith("position_ids"):
            found.append(Misshapen(present[name], shape, usual))
    return tuple(sorted(found, key=lambda one: one.name))


def _is_whole(components: Mapping[str, Component]) -> bool | None:
    there = [one for name, one in components.items() if one.tensors and name != "other"]
    if any(one.state == "incomplete" or one.misshapen for one in there):
        return False
    return True if there and all(one.state == "complete" for one in there) else None


# --- EMA ---------------------------------------------------------------------------------------


def _ema(checkpoint: Checkpoint) -> str:
    if not any(name.startswith(f"{_EMA}diffusion_model") for name in checkpoint):
        return ""
    has_unet = any(name.startswith(_UNET) for name in checkpoint)
    return "beside" if has_unet else "only"


def _ema_component(checkpoint: Checkpoint) -> Component:
    """The EMA copy of a file that holds no UNet beside it, against the nearest family's UNet."""
    names = {name: name for name in checkpoint if name.startswith(_EMA)}
    best: tuple[int, Family, dict[str, Known]] | None = None
    for family in load_families().values():
        unet = {
            name: one
            for name, one in tensor_list(family.id).items()
            if family.component_of(name) == "unet"
        }
        ema = _ema_of(unet)
        score = sum(name in names and checkpoint[name].shape == ema[name].shape for name in ema)
        if score and (best is None or score > best[0]):
            best = score, family, ema
    if best is None:
        return _component(checkpoint, names, {}, UNKNOWN, "ema")
    return _component(checkpoint, names, best[2], best[1], "ema")


def _without_ema(checkpoint: Checkpoint) -> Component:
    names = {name: name for name in checkpoint if not name.startswith(_EMA)}
    return _component(checkpoint, names, {}, UNKNOWN, "other")


# --- what only values tell ---------------------------------------------------------------------


def _value_evidence(
    checkpoint: Checkpoint, detection: Detection
) -> tuple[tuple[str, ...], str | None]:
    """What one small tensor says of epsilon against v prediction; and which it is.

    Source: ComfyUI, `supported_models.py`, `SD20.model_type`: a standard deviation above 0.09 is v.
    """
    spec = checkpoint.get(_V_BIAS)
    if detection.family != "sd2" or detection.variant != "base" or spec is None:
        return (), None
    if not checkpoint.has_values(_V_BIAS):
        return ("not looked at: epsilon or v, for only the header was read",), None
    values = _numbers(checkpoint, _V_BIAS)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return (f"{_V_BIAS} holds no numbers to judge by",), None
    deviation = statistics.stdev(values)
    prediction = "v" if deviation > _V_STD else "epsilon"
    relation = "above" if deviation > _V_STD else "not above"
    measured = f"the standard deviation of {_V_BIAS} is {deviation:.3f}"
    said = f"{prediction}: {measured}, {relation} {_V_STD}"
    return (said,), prediction


def _numbers(checkpoint: Checkpoint, name: str) -> list[float]:
    """The values of a small tensor; [] for a dtype that is not read here."""
    spec = checkpoint[name]
    codes = {"F16": "e", "F32": "f", "F64": "d", "BF16": "f", "I64": "q", "I32": "i", "I16": "h",
             "U8": "B", "I8": "b"}  # fmt: skip
    if spec.dtype not in codes:
        return []
    data = checkpoint.read(name)
    if spec.dtype == "BF16":  # the upper half of an F32
        data = b"".join(b"\0\0" + data[at : at + 2] for at in range(0, len(data), 2))
    return [float(value) for value in struct.unpack(f"<{spec.numel}{codes[spec.dtype]}", data)]


def _position_ids(checkpoint: Checkpoint) -> Iterable[PositionIds]:
    """Every `position_ids`, read: merges in half precision leave 75.9975 where 76 stood."""
    for name in sorted(checkpoint):
        spec = checkpoint[name]
        if not name.endswith("position_ids") or not 0 < spec.numel <= _MOST_IDS:
            continue
        if not checkpoint.has_values(name):
            continue
        values = _numbers(checkpoint, name)
        wrong = [(at, value) for at, value in enumerate(values) if value != at]
        if values:
            yield PositionIds(name, spec.dtype, wrong[-1] if wrong else None, len(wrong))


def _vectors(checkpoint: Checkpoint) -> tuple[Vectors, ...]:
    """The tensors of a textual inversion; one vector may be stored without a dim for the count."""
    found = []
    for name, spec in sorted(checkpoint.items()):
        if spec.is_float and len(spec.shape) in (1, 2):
            count = spec.shape[0] if len(spec.shape) == 2 else 1
            found.append(Vectors(name, count, spec.shape[-1]))
    return tuple(found)


# --- beside the file ---------------------------------------------------------------------------


def _manifest(checkpoint: Checkpoint) -> Manifest | None:
    """The manifest beside a file; None where there is none."""
    path = checkpoint.path.absolute()  # "." has no name
    path = path.with_name(path.name + MANIFEST_SUFFIX)
    if checkpoint.is_elsewhere or not path.is_file():
        return None
    try:
        with open_file(path) as stream:
            length = path.stat().st_size
            if length > _MOST_MANIFEST:
                raise InputError(f"{length:,} bytes are too many for a manifest")
            document = json.loads(stream.read(length, 0))
    except (ValueError, RecursionError, CkptError, OSError) as exc:
        return Manifest(path, problem=exc.what if isinstance(exc, CkptError) else "not JSON")
    if not isinstance(document, dict) or document.get("schema") != MANIFEST_SCHEMA:
        return Manifest(path, problem=f"its schema is not {MANIFEST_SCHEMA}")
    hashes = {file.header.sha256 for file in checkpoint.files}
    written = {one.get("header_sha256") for one in _dicts(document.get("outputs"))}
    recipe, versions = document.get("recipe"), document.get("versions")
    return Manifest(
        path,
        is_of_this_file=hashes <= written,
        inputs=tuple(
            (str(one.get("name", "")), str(one.get("file", "")), str(one.get("sha256") or ""))
            for one in _dicts(document.get("inputs"))
        ),
        versions={str(k): str(v) for k, v in versions.items()}
        if isinstance(versions, dict)
        else {},
        recipe=recipe if isinstance(recipe, dict) else None,
    )


def _dicts(value: object) -> list[dict[str, object]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


# --- notes -------------------------------------------------------------------------------------


def _notes(
    checkpoint: Checkpoint,
    detection: Detection,
    family: Family,
    components: Mapping[str, Component],
) -> tuple[str, ...]:
    """Facts that are worth a sentence, and no faults."""
    notes = []
    lacking = [name for name, one in components.items() if one.state == "absent"]
    if lacking:
        words = {"vae": "its usual VAE", "unet": "a UNet"}
        named = ", ".join(words.get(name, f"its usual {name}") for name in lacking)
        notes.append(f"to run, it needs {named} beside it")
    if detection.kind == "vae" and detection.variant == "4-channel":
        notes.append("no header tells the VAEs of SD1, SD2, SDXL, and SDXL's fp16 fix, apart")
    has_encoder = any(
        one.tensors for name, one in components.items() if name.startswith("text_encoder")
    )
    has_ids = any(name.endswith("position_ids") for name in checkpoint)
    if has_encoder and not has_ids and family.id in ("sd1", "sdxl"):
        notes.append("no position_ids: newer files leave them out, and loaders do without")
    if checkpoint.is_elsewhere:
        notes.append("on the Hub: only headers were read")
    if checkpoint.layout:
        notes.append("a diffusers folder, shown under the names of single files")
    return tuple(notes)
