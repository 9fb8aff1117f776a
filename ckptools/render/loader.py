"""Checkpoints into the modules of diffusers and transformers, strictly, tensor by tensor.

Modules are built without memory, every missing or misshapen tensor is named before any weight is
read, then each tensor goes straight from the file to its place, on its device, in its dtype. The
same places take what a merge writes (`ModuleSink`), so that what is rendered is what would be
saved. No Hub, no accelerate, no torchvision.
"""

from __future__ import annotations

import inspect
import mmap
import sys
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ckptools.checkpoint import Checkpoint
from ckptools.errors import CkptError, InputError, UsageError, counted, nearest, raise_all
from ckptools.evaluation import single_threaded, torch_dtype
from ckptools.family import Family, detect, family_of
from ckptools.keymap import KeyMap, Piece, key_map
from ckptools.render.configs import (
    Blueprint,
    Config,
    control_config,
    draft,
    family_facts,
    read_config,
)
from ckptools.render.prompts import TextEncoder, clip_tokenizer, read_tokenizer
from ckptools.sources import open_checkpoint
from ckptools.tensors import RECIPE_DTYPES, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from ckptools.writer import Layout

_CHUNK_BYTES = 1 << 21  # stays in a processor's cache between reading and casting
_ALIGNED_BYTES = 64  # as torch's own memory begins
_SPARE_BYTES = 3 << 30  # what the arithmetic of a 1024 x 1024 picture takes beside the weights
_MOST_NAMED = 40


@dataclass(frozen=True)
class Slot:
    """Where a piece of a checkpoint's tensor goes: the module's own name of it."""

    component: str
    name: str
    piece: Piece


Slots = Mapping[str, tuple[Slot, ...]]
# diffusers' usual name → the module's own name, and the shape
Wanted = Mapping[str, tuple[str, tuple[int, ...]]]
# component and diffusers' name → the tensors that claim to be it
_Taken = Mapping[tuple[str, str], list[tuple[TensorSpec, Piece]]]


@dataclass(frozen=True, eq=False)
class Pipeline:
    """The modules of one checkpoint, resident, ready to draw and to be written into.

    modules     component (unet, vae, text_encoder …) → module
    slots       checkpoint's tensor → its places in the modules
    dtype       of UNet and text encoders; latents and VAE are F32
    prediction  epsilon or v; told_by: "argument", "file", "config", "family" or "probe"
    size        usual width and height of a picture, in pixels
    notes       what was left aside on loading
    """

    blueprint: Blueprint
    modules: Mapping[str, Any]
    text_encoders: tuple[TextEncoder, ...]
    slots: Slots
    device: torch.device
    dtype: torch.dtype
    prediction: str | None
    told_by: str
    size: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def unet(self) -> Any:
        """diffusers' UNet2DConditionModel."""
        return self.modules["unet"]

    @property
    def vae(self) -> Any:
        """diffusers' AutoencoderKL, always in F32: SDXL's overflows in F16."""
        return self.modules["vae"]

    @property
    def pixels_per_latent(self) -> int:
        """The side of what one latent stands for, in pixels: 8."""
        return _pixels_per_latent(self.vae)


@dataclass(frozen=True, eq=False)
class ControlNet:
    """A ControlNet for the pipelines of one family, beside a pipeline's UNet."""

    module: Any
    family: str
    slots: Slots
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fitted:
    """Every tensor's places, and what has none."""

    slots: Slots
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Home:
    """Where a component lives, and as what."""

    device: torch.device
    dtype: torch.dtype


class _Source(Protocol):
    def read_into(self, name: str, view: memoryview, offset: int = 0) -> None:
        """As `Checkpoint.read_into`."""


# --- loading ------------------------------------------------------------------------------------


def load_modules(
    source: Path | Checkpoint,
    *,
    config: Path | None = None,
    vae: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    prediction: str | None = None,
) -> Pipeline:
    """As `pipelines.load_pipeline`, but leaves open what nothing tells of the prediction."""
    with _opened(source) as checkpoint, _opened(vae) as vae_checkpoint:
        if config is None and checkpoint.path.is_dir():
            config = checkpoint.path
        detection = detect(checkpoint, checkpoint.metadata)
        keys = key_map("sd1")  # all VAEs have the same names
        vae_names = _part_names(vae_checkpoint, keys, "vae") if vae_checkpoint is not None else None
        blueprint = draft(
            checkpoint,
            detection,
            config=config,
            vae=_shapes(vae_checkpoint, vae_names, "vae") if vae_names else None,
            prediction=prediction,
        )
        modules = build_modules(blueprint)
        own = {name: m for name, m in modules.items() if not (vae_names and name == "vae")}
        parts = [(checkpoint, fit(checkpoint, own, Names(key_map(blueprint.family))))]
        if vae_names:
            part = {"vae": modules["vae"]}
            parts.append((vae_checkpoint, fit(vae_checkpoint, part, vae_names)))
        text_encoders = _text_encoders(blueprint, modules)
        homes = _homes(modules, choose_device(device), dtype)
        for name, module in modules.items():
            _materialise(module, homes[name])
        for each, fitted in parts:
            _fill(each, each, fitted.slots, modules)
    side = int(blueprint.components["unet"]["sample_size"]) * _pixels_per_latent(modules["vae"])
    return Pipeline(
        blueprint=blueprint,
        modules=MappingProxyType(modules),
        text_encoders=text_encoders,
        slots=parts[0][1].slots,
        device=homes["unet"].device,
        dtype=homes["unet"].dtype,
        prediction=blueprint.prediction,
        told_by=blueprint.told_by,
        size=(side, side),
        notes=tuple(note for _, fitted in parts for note in fitted.notes),
    )


def load_controlnet(
    source: Path | Checkpoint, pipeline: Pipeline, *, config: Path | None = None
) -> ControlNet:
    """A ControlNet for a pipeline, on its device and in its dtype.

    source  in the names of its makers (`control_model.*`) or diffusers'
    config  a folder with the `config.json` of a ControlNet of unusual width; default: where the
            pipeline has a folder, what that says of its UNet

    One made for another family, and every missing or misshapen tensor, is an `InputError`.
    """
    family = pipeline.blueprint.family
    with _opened(source) as checkpoint:
        detection = detect(checkpoint, checkpoint.metadata)
        if detection.kind != "controlnet":
            raise InputError(
                f"a {detection.kind}, not a ControlNet",
                where=str(checkpoint.path),
                fix="give the ControlNet's own file",
            )
        names = _part_names(checkpoint, key_map("_controlnet"), "controlnet")
        shapes = _shapes(checkpoint, names, "controlnet")
        _check_fits_unet(shapes, pipeline)
        keys = control_config(shapes, family_facts(family).unet, 0)
        keys |= _shared_keys(pipeline.blueprint.components["unet"], keys)
        keys |= read_config(config, "")
        module = _control_module(keys)
        fitted = fit(checkpoint, {"controlnet": module}, names)
        _materialise(module, _Home(pipeline.device, pipeline.dtype))
        _fill(checkpoint, checkpoint, fitted.slots, {"controlnet": module})
    return ControlNet(module, family, fitted.slots, fitted.notes)


def _opened(source: Path | Checkpoint | None) -> AbstractContextManager[Any]:
    """A context in which a source is open; one that came open stays open."""
    return open_checkpoint(source) if isinstance(source, Path) else nullcontext(source)


def _check_fits_unet(shapes: Mapping[str, tuple[int, ...]], pipeline: Pipeline) -> None:
    width = pipeline.unet.config.cross_attention_dim
    found = {s[1] for name, s in shapes.items() if name.endswith("attn2.to_k.weight")}
    if width not in found and found:
        raise InputError(
            f"a ControlNet whose text is {max(found)} wide; this model's text is {width} wide",
            fix=f"give one that was made for {pipeline.blueprint.family}",
        )


def _shared_keys(unet: Config, control: Config) -> Config:
    """What a UNet's folder says, beyond its shapes, that holds for its ControlNet too."""
    names = ("norm_num_groups", "attention_head_dim", "num_attention_heads", "norm_eps", "act_fn",
             "flip_sin_to_cos", "freq_shift")  # fmt: skip
    return {name: unet[name] for name in names if unet.get(name) is not None}


# --- building without memory --------------------------------------------------------------------


def build_modules(blueprint: Blueprint) -> dict[str, Any]:
    """The modules of a blueprint on torch's meta device: names and shapes, no memory."""
    _quiet()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    made: dict[str, Any] = {}
    for name, keys in blueprint.components.items():
        with _building(name, blueprint):
            if name == "unet":
                made[name] = _made(UNet2DConditionModel, keys)
            elif name == "vae":
                made[name] = _made(AutoencoderKL, keys)
            else:
                kind = CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection
                dropped = {"architectures", "model_type", "torch_dtype", "dtype"}
                known = {k: v for k, v in keys.items() if k not in dropped}
                made[name] = kind(CLIPTextConfig(**known))
    return {name: module.eval().requires_grad_(False) for name, module in made.items()}


def _control_module(keys: Config) -> Any:
    _quiet()
    from diffusers import ControlNetModel

    with _building("ControlNet", None):
        module = _made(ControlNetModel, keys)
    return module.eval().requires_grad_(False)


def _made(kind: Any, keys: Config) -> Any:
    """A model of the keys that this version's class takes: folders may be older or newer."""
    known = inspect.signature(kind.__init__).parameters
    return kind.from_config({key: value for key, value in keys.items() if key in known})


class _building:  # noqa: N801  # a context, read as a word
    """torch's meta device; what a constructor refuses becomes an `InputError`."""

    def __init__(self, component: str, blueprint: Blueprint | None) -> None:
        self._component, self._blueprint = component, blueprint
        self._meta = torch.device("meta")

    def __enter__(self) -> None:
        self._meta.__enter__()

    def __exit__(self, kind: object, exc: BaseException | None, tb: object) -> None:
        self._meta.__exit__(None, None, None)
        if isinstance(exc, ValueError | TypeError):
            raise InputError(
                f"no {self._component} can be built from these shapes: {exc}",
                fix="give the diffusers folder (its JSON files are enough) with `config`",
            ) from exc


def _quiet() -> None:
    """Importing transformers 5 warns of a torchvision that nothing here needs."""
    import logging

    logging.getLogger("transformers").setLevel(logging.ERROR)


def _text_encoders(blueprint: Blueprint, modules: Mapping[str, Any]) -> tuple[TextEncoder, ...]:
    made = []
    for name, facts in blueprint.facts.text_encoders.items():
        folder = name.replace("text_encoder", "tokenizer")
        tokenizer = read_tokenizer(blueprint.config / folder) if blueprint.config else None
        tokenizer = tokenizer or clip_tokenizer(facts.pad)
        words = modules[name].config.vocab_size
        if words != tokenizer.words:
            raise InputError(
                f"the {name} knows {words:,} words, the tokenizer {tokenizer.words:,}",
                fix="give the diffusers folder (its JSON files are enough) with `config`",
            )
        made.append(TextEncoder(name, modules[name], tokenizer, facts.layers_back))
    return tuple(made)


# --- fitting names and shapes -------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """What a file's tensors are called in the modules.

    alone  the one component that the file holds, where it is no whole checkpoint
    own    its family, whose spellings of a name differ; None in diffusers' own names
    """

    keys: KeyMap
    alone: str = ""
    own: Family | None = None

    def pieces(self, spec: TensorSpec) -> tuple[Piece, ...] | None:
        """As `KeyMap.pieces`."""
        if not self.alone:
            return self.keys.pieces(spec)
        if self.own is not None:
            name = self.own.canonical_name(spec.name)
            return self.keys.pieces(TensorSpec(name, spec.dtype, spec.shape))
        return (Piece(self.alone, spec.name, None, None, "none", spec.shape),)

    def in_file(self, component: str, tensors: Wanted) -> dict[str, tuple[str, tuple[int, ...]]]:
        """diffusers' name → the checkpoint's usual name and shape of the tensor that holds it."""
        if self.alone and self.own is None:
            return {}
        folder = {n: TensorSpec(n, "F32", shape) for n, (_, shape) in tensors.items()}
        made = {}
        for spec in self.keys.checkpoint_specs({component: folder}).values():
            for piece in self.keys.pieces(spec) or ():
                made[piece.name] = (spec.name, spec.shape)
        return made


def _part_names(checkpoint: Checkpoint, keys: KeyMap, component: str) -> Names:
    """The names of a file that may hold one component only, in one of several spellings."""
    detection = detect(checkpoint, checkpoint.metadata)
    if detection.kind == "checkpoint":
        return Names(keys)
    if detection.kind != component:
        raise InputError(
            f"a {detection.kind}, not a {component}",
            where=str(checkpoint.path),
            fix=f"give a {component}, or a whole model that has one",
        )
    is_theirs = detection.layout == "diffusers"
    return Names(keys, component, None if is_theirs else family_of(detection))


def _shapes(
    specs: Mapping[str, TensorSpec], names: Names, component: str
) -> dict[str, tuple[int, ...]]:
    """diffusers' name → shape of one component; rows that cannot be shared out are left out."""
    found = {}
    for spec in specs.values():
        with suppress(InputError):
            for piece in names.pieces(spec) or ():
                if piece.component == component:
                    found[piece.name] = piece.shape
    return found


def fit(specs: Mapping[str, TensorSpec], modules: Mapping[str, Any], names: Names) -> Fitted:
    """Every place in the modules, and the tensor it is filled from.

    names  what a tensor is called in the modules

    All that is missing, misshapen or not a number is raised together; tensors that no module
    wants are told in the notes.
    """
    wanted = {component: _wanted(component, module) for component, module in modules.items()}
    slots: dict[str, tuple[Slot, ...]] = {}
    taken: dict[tuple[str, str], list[tuple[TensorSpec, Piece]]] = {}
    errors: dict[str, CkptError] = {}
    unused: list[str] = []
    for spec in specs.values():
        try:
            pieces = names.pieces(spec)
        except InputError as exc:
            errors[spec.name] = exc
            continue
        mine = [p for p in pieces or () if p.component in wanted]
        known = tuple(p for p in mine if p.name in wanted[p.component])
        if len(known) < len(mine):
            unused.append(spec.name)
        if known:
            slots[spec.name] = tuple(
                Slot(p.component, wanted[p.component][p.name][0], p) for p in known
            )
        for piece in known:
            taken.setdefault((piece.component, piece.name), []).append((spec, piece))
    for component, tensors in wanted.items():
        _judge(component, tensors, taken, names, errors)
    _raise_some(list(errors.values()))
    notes = (
        [f"{counted(len(unused), 'tensor', 'is')} in no module: {unused[0]} …"] if unused else []
    )
    return Fitted(MappingProxyType(slots), tuple(notes))


def _wanted(component: str, module: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """diffusers' usual name → the module's own name, and the shape.

    transformers 5 leaves `text_model.` out of the names of a text encoder without projection.
    """
    made = {}
    for name, tensor in module.state_dict().items():
        is_short = component.startswith("text_encoder") and not name.startswith("text_")
        made[f"text_model.{name}" if is_short else name] = (name, tuple(tensor.shape))
    return made


def _judge(
    component: str,
    tensors: Wanted,
    taken: _Taken,
    names: Names,
    errors: dict[str, CkptError],
) -> None:
    """Add an error for every tensor of one component that is not as the module wants it."""
    if not any((component, name) in taken for name in tensors):
        errors[component] = InputError(
            f"the file has no {component} ({counted(len(tensors), 'tensor', 'is')} missing)",
            fix="give a whole model" + (", or a VAE beside it" if component == "vae" else ""),
        )
        return
    bad = [
        name for name, (_, shape) in tensors.items() if not _is_good(taken, component, name, shape)
    ]
    called = names.in_file(component, tensors) if bad else {}
    for name in bad:
        where, whole = called.get(name, (name, tensors[name][1]))
        found = taken.get((component, name), [])
        if not found and where not in errors:
            errors[where] = InputError(f"is missing; {component} wants {list(whole)}", where=where)
        elif len(found) > 1:
            first, second = (spec.name for spec, _ in found[:2])
            errors[second] = InputError(f"is the same tensor as {first!r}", where=second)
        elif found:
            spec = found[0][0]
            errors[spec.name] = InputError(
                f"is {list(spec.shape)}; {component} wants {list(whole)}"
                if spec.is_float
                else f"is {spec.dtype}, not a float",
                where=spec.name,
            )


def _is_good(taken: _Taken, component: str, name: str, shape: tuple[int, ...]) -> bool:
    """Whether exactly one tensor of floats holds what a module wants, in its shape."""
    found = taken.get((component, name), [])
    return len(found) == 1 and found[0][0].is_float and found[0][1].shape == shape


def _raise_some(errors: list[CkptError]) -> None:
    if len(errors) > _MOST_NAMED:
        rest = len(errors) - _MOST_NAMED
        errors = [
            *errors[:_MOST_NAMED],
            InputError(f"{counted(rest, 'more tensor', 'does')} not fit"),
        ]
    raise_all(errors)


# --- memory -------------------------------------------------------------------------------------


def choose_device(device: str) -> torch.device:
    """The device of a name; "auto" is CUDA where it is, else the processor."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as exc:
        raise UsageError(f"no device {device!r} here", fix="auto, cpu, cuda or mps") from exc
    return chosen


def free_memory_bytes(device: torch.device) -> int | None:
    """What a device has free, None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo")
    if device.type != "cpu" or not lines.exists():
        return None
    found = [line for line in lines.read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(found[0].split()[1]) * 1024 if found else None


def _homes(modules: Mapping[str, Any], device: torch.device, dtype: str) -> dict[str, _Home]:
    """Device and dtype of every component, by the memory that is free."""
    numbers = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}
    rest = sum(count for name, count in numbers.items() if name != "vae")
    free = free_memory_bytes(device)
    chosen = _choose_dtype(dtype, device, rest * 4 + numbers["vae"] * 4, free)
    homes = {name: _Home(device, chosen) for name in modules} | {
        "vae": _Home(device, torch.float32)
    }
    if device.type == "cuda" and free is not None:
        need = rest * chosen.itemsize + numbers["vae"] * 4 + _SPARE_BYTES
        if need > free:  # prompts are read on the processor, once a picture
            cpu = _Home(torch.device("cpu"), torch.float32)
            homes |= {name: cpu for name in modules if name.startswith("text_encoder")}
    return homes


def _choose_dtype(
    dtype: str, device: torch.device, bytes_wide: int, free: int | None
) -> torch.dtype:
    if dtype == "auto":
        if device.type == "cuda":
            return torch.float16
        is_tight = free is not None and bytes_wide + _SPARE_BYTES // 3 > free
        return torch.bfloat16 if is_tight else torch.float32
    if dtype not in ("fp16", "bf16", "fp32"):
        raise UsageError(
            f"no dtype {dtype!r} to draw with", fix=nearest(dtype, ("fp16", "bf16", "fp32"))
        )
    return torch_dtype(RECIPE_DTYPES[dtype])


def _materialise(module: Module, home: _Home) -> None:
    """Give a module on the meta device its memory; its values are undefined but for constants."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    module.load_state_dict(_empty(shapes, home), strict=True, assign=True)
    module.requires_grad_(False)
    for path, buffer in list(module.named_buffers()):
        if buffer.is_meta:  # not saved, so not loaded: CLIP counts its positions
            parent, _, name = path.rpartition(".")
            if name != "position_ids":
                raise TypeError(f"no value is known for {path!r}")
            counted = torch.arange(buffer.shape[-1], device=home.device).expand(buffer.shape)
            setattr(module.get_submodule(parent), name, counted)


def _empty(shapes: Mapping[str, torch.Size], home: _Home) -> dict[str, Tensor]:
    """Tensors of undefined values.

    Linux's memory is asked for in pages of 2 MB: first touched in pages of 4 KB, the gigabytes of a
    model take several times as long to fill.
    """
    if home.device.type != "cpu" or sys.platform != "linux":
        return {
            name: torch.empty(shape, dtype=home.dtype, device=home.device)
            for name, shape in shapes.items()
        }
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name] = end
        end += -(-shape.numel() * home.dtype.itemsize // _ALIGNED_BYTES) * _ALIGNED_BYTES
    memory = mmap.mmap(-1, end, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return {
        name: torch.frombuffer(
            memory, dtype=home.dtype, count=shape.numel(), offset=starts[name]
        ).view(shape)
        for name, shape in shapes.items()
    }


# --- filling ------------------------------------------------------------------------------------


def _fill(
    source: _Source, specs: Mapping[str, TensorSpec], slots: Slots, modules: Mapping[str, Any]
) -> None:
    """Stream every tensor that has a place into it, in the source's order."""
    places = _Places(slots, modules)
    buffer = bytearray(_CHUNK_BYTES)
    with single_threaded():  # chunks are too small to share
        for name in specs:
            if name not in slots:
                continue
            spec = specs[name]
            width = spec.nbytes // spec.numel
            for begin in range(0, spec.nbytes, _CHUNK_BYTES):
                view = memoryview(buffer)[: min(_CHUNK_BYTES, spec.nbytes - begin)]
                source.read_into(name, view, begin)
                places.put(spec, view, begin // width)


class _Places:
    """The memory behind slots; takes runs of a tensor's elements, in any order, from any thread."""

    def __init__(self, slots: Slots, modules: Mapping[str, Any]) -> None:
        tensors = {name: module.state_dict() for name, module in modules.items()}
        self._views = {
            name: tuple((slot.piece.rows, _as_in_checkpoint(slot, tensors)) for slot in its)
            for name, its in slots.items()
        }

    def __contains__(self, name: object) -> bool:
        return name in self._views

    @torch.no_grad()
    def put(self, spec: TensorSpec, data: memoryview, begin: int) -> None:
        """Put the bytes of whole elements, the first of them the tensor's `begin`-th."""
        values = _values(data, spec.dtype)
        row = spec.numel // spec.shape[0] if spec.shape else 1
        for rows, view in self._views[spec.name]:
            first, last = (rows[0] * row, rows[1] * row) if rows else (0, spec.numel)
            low, high = max(first, begin), min(last, begin + len(values))
            if low < high:
                _put_flat(view, low - first, values[low - begin : high - begin].to(view.device))


def _values(data: memoryview, dtype: str) -> Tensor:
    kind = torch_dtype(dtype)
    if data.readonly:  # torch warns of memory that it must not write to
        data = memoryview(bytearray(data))
    address = torch.frombuffer(data, dtype=torch.uint8)
    if address.data_ptr() % kind.itemsize:
        address = address.clone()
    return address.view(kind)


def _as_in_checkpoint(slot: Slot, tensors: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """The module's memory, seen with its dims in the checkpoint's order."""
    tensor = tensors[slot.component][slot.name]
    if slot.piece.part is not None:
        tensor = tensor[slot.piece.part[0] : slot.piece.part[1]]
    return tensor.t() if slot.piece.op == "transpose" else tensor


def _put_flat(view: Tensor, begin: int, values: Tensor) -> None:
    """Write a run of elements, counted in the view's own order of dims."""
    if view.is_contiguous():
        view.view(-1)[begin : begin + len(values)].copy_(values)
        return
    width = view.shape[1]
    end = begin + len(values)
    first, last = -(-begin // width), end // width  # whole rows
    if first > last:  # within one row
        view[last, begin - last * width : end - last * width].copy_(values)
        return
    head, tail = first * width - begin, len(values) - (end - last * width)
    if head:
        view[first - 1, width - head :].copy_(values[:head])
    view[first:last].copy_(values[head:tail].view(-1, width))
    if tail < len(values):
        view[last, : len(values) - tail].copy_(values[tail:])


class ModuleSink:
    """A merge's output written into a resident pipeline, in place: a sink of `engine.run`.

    Give it the layout that the file would have; the engine's tasks must start where that says.
    Bytes come rounded to the output's dtype, so the modules hold what they would after saving and
    loading, to the bit. The pipeline's own VAE stays where the pipeline was loaded with another.

    Raises `InputError` at once where the output does not fill every place of the pipeline.
    """

    def __init__(self, pipeline: Pipeline, layout: Layout) -> None:
        specs = {spec.name: spec for spec in layout.specs}
        components = {slot.component for its in pipeline.slots.values() for slot in its}
        modules = {name: m for name, m in pipeline.modules.items() if name in components}
        fitted = fit(specs, modules, Names(key_map(pipeline.blueprint.family)))
        self._places = _Places(fitted.slots, modules)
        ordered = sorted(
            (layout.starts[name], spec) for name, spec in specs.items() if name in fitted.slots
        )
        self._starts = [start for start, _ in ordered]
        self._specs = [spec for _, spec in ordered]

    def write(self, data: memoryview, offset: int) -> None:
        """Take `data` at byte `offset` of the file that is not written."""
        data = data.cast("B")
        end = offset + len(data)
        for number in range(max(0, bisect_right(self._starts, offset) - 1), len(self._starts)):
            start, spec = self._starts[number], self._specs[number]
            if start >= end:
                break
            low, high = max(start, offset), min(start + spec.nbytes, end)
            if low < high:
                width = spec.nbytes // spec.numel
                part = data[low - offset : high - offset]
                self._places.put(spec, part, (low - start) // width)


def _pixels_per_latent(vae: Any) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))
