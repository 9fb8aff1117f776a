"""Adapters and models opened for management: what they are, and tensors one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ckptools.checkpoint import Checkpoint, json_beside, read_json_object
from ckptools.errors import InputError, NonFiniteError
from ckptools.family import Detection, Family, detect, family_of, kind_words
from ckptools.hubref import hub_ref_of, shown
from ckptools.keymap import key_map, key_map_ids
from ckptools.lora import AdapterFile, group, load_kinds, scale_of
from ckptools.lora.group import PEFT_CONFIG, Module
from ckptools.lora.names import Fit, NameMap, Target, fitting_families, targets
from ckptools.progress import Progress
from ckptools.sources import open_checkpoint
from ckptools.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """An open adapter file."""

    checkpoint: Checkpoint
    detection: Detection
    file: AdapterFile

    @property
    def path(self) -> Path:
        """The file."""
        return self.checkpoint.path

    @cached_property
    def numbers(self) -> Mapping[str, Mapping[str, float]]:
        """Module → its alpha and scale, those that the file holds as tensors."""
        return {
            name: {part: self.checkpoint.read_number(module.parts[part]) for part in module.numbers}
            for name, module in self.file.modules.items()
        }

    @cached_property
    def scales(self) -> Mapping[str, float]:
        """Module → what multiplies its change, before anybody's weight."""
        return {
            name: scale_of(module, self.numbers[name]) for name, module in self.file.modules.items()
        }

    @cached_property
    def fits(self) -> tuple[Fit, ...]:
        """The families it was made for."""
        return fitting_families(
            {name: module.measure.columns for name, module in self.file.modules.items()}
        )

    @property
    def base(self) -> str:
        """The families it was made for, in one word or two: "sdxl", "sd1 or sd2"; "" unknown."""
        return " or ".join(dict.fromkeys(fit.family for fit in self.fits))

    @property
    def scheme(self) -> str:
        """How it writes names: "kohya", "kohya, LDM blocks", "peft", or the layout as detected."""
        names = list(self.file.modules)
        if all("." not in name and ":" not in name for name in names):
            ldm = any(re.search(r"_(input|output)_blocks_|_middle_block_", name) for name in names)
            return "kohya, LDM blocks" if ldm else "kohya"
        if any(re.search(r"\.lora_[AB]\b", key) for key in self.checkpoint):
            return "peft"
        return self.detection.layout or "full-name"

    def load(self, module: Module) -> dict[str, Tensor]:
        """A module's tensors, as stored: canonical part → tensor; all of them finite."""
        import torch

        parts = {part: load(self.checkpoint, key) for part, key in module.arrays.items()}
        for part, tensor in parts.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                raise NonFiniteError(
                    f"{part} holds NaN or Inf",
                    where=f"{self.path.name}: {module.parts[part]}",
                    fix="the file is damaged; download it again, or ask its author",
                )
        return parts


@dataclass(frozen=True, eq=False)
class Model:
    """An open checkpoint whose family is known.

    own    the family's usual name of a tensor → the file's
    specs  the family's usual name → spec
    names  what adapters call its modules
    """

    checkpoint: Checkpoint
    family: Family
    own: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    names: NameMap

    @property
    def path(self) -> Path:
        """The file."""
        return self.checkpoint.path

    def load(self, name: str) -> Tensor:
        """A tensor by its usual name; fp64 as it is, anything else in fp32."""
        import torch

        values = load(self.checkpoint, self.own[name])
        return values if values.dtype == torch.float64 else values.float()

    def block_of(self, name: str) -> str:
        """Where a tensor counts: "unet IN04", "text_encoder", "vae"."""
        component = self.family.component_of(name)
        block = self.family.block_of(name)
        return component if block in ("", "BASE") else f"{component} {block}"

    def block_order(self, label: str) -> tuple[int, int, str]:
        """Sort key of the labels of `block_of`."""
        component, _, block = label.partition(" ")
        components, blocks = list(self.family.components), list(self.family.blocks)
        return (
            components.index(component) if component in components else len(components),
            blocks.index(block) if block in blocks else -1,
            label,
        )


@contextmanager
def open_adapter(
    path: Path, *, allow_unknown: bool = False, progress: Progress | None = None
) -> Iterator[Adapter]:
    """An adapter file with its modules; anything else is an `InputError`.

    allow_unknown  keep tensors that are no part of an adapter aside instead of refusing
    progress       is told of a download: of one on the Hub the header alone is read, where that
                   holds every alpha
    """
    with ExitStack() as stack:
        checkpoint, config = _open(path, progress)
        stack.enter_context(checkpoint)
        detection = detect(checkpoint, checkpoint.metadata)
        if detection.kind not in ("lora", "unknown"):
            raise InputError(
                f"this is {kind_words(detection)}, not an adapter",
                where=shown(path),
                fix="give a LoRA or LyCORIS file",
            )
        unknown = allow_unknown and detection.kind == "lora"
        file = group(checkpoint, checkpoint.metadata, config=config, allow_unknown=unknown)
        if not file.modules and not file.embeddings:
            raise InputError("there is no adapter in this file", where=shown(path))
        yield Adapter(checkpoint, detection, file)


def _open(path: Path, progress: Progress | None) -> tuple[Checkpoint, dict[str, object] | None]:
    """(the file, the PEFT config beside it), here or on the Hub."""
    ref = hub_ref_of(path)
    if ref is None:
        checkpoint = open_checkpoint(path)
        return checkpoint, json_beside(checkpoint.path, PEFT_CONFIG)
    from ckptools.hub.remote import Hub  # loads the Hub's client

    hub = Hub(progress)
    checkpoint = hub.open_adapter(path)
    config = hub.beside(ref, PEFT_CONFIG)
    return checkpoint, None if config is None else read_json_object(config)


@contextmanager
def open_model(path: Path) -> Iterator[Model]:
    """A checkpoint of a family whose names are known; anything else is an `InputError`."""
    with open_checkpoint(path) as checkpoint:
        detection = detect(checkpoint, checkpoint.metadata)
        family = family_of(detection)
        if family.id not in key_map_ids():
            raise InputError(
                f"this is {kind_words(detection)}, not a model that adapters are known for",
                where=str(path),
                fix=f"give a whole model: {', '.join(key_map_ids())}",
            )
        own: dict[str, str] = {}
        for name in checkpoint:
            usual = family.canonical_name(name)
            if usual not in own or name == usual:
                own[usual] = name
        specs = {name: replace(checkpoint[key], name=name) for name, key in own.items()}
        yield Model(
            checkpoint,
            family,
            MappingProxyType(own),
            MappingProxyType(specs),
            targets(family, specs),
        )


def load(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor as stored, in memory of its own."""
    import numpy as np

    from ckptools.evaluation import as_tensor

    spec = checkpoint[name]
    data = np.empty(spec.nbytes, np.uint8)
    if spec.nbytes:
        checkpoint.read_into(name, data.data)
    return as_tensor(data, spec.dtype).view(spec.shape)


def kind_title(module: Module) -> str:
    """What a module is, in words: "LoRA", "DoRA", "LoRA (Tucker)", "LoHa"."""
    if module.dora:
        return "DoRA"
    title = load_kinds()[module.kind].title
    return f"{title} (Tucker)" if "mid" in module.parts else title


def component_names(family: str) -> list[tuple[str, str]]:
    """(prefix of module names in adapters, component), the longest prefix first."""
    pairs: dict[str, str] = {}
    for id_, component in key_map(family).components.items():
        names = component.adapters
        known = (*names.underscored, *names.dotted, *names.original, *component.prefixes)
        ordinal = (component.ordinal.prefix,) if component.ordinal else ()
        for prefix in (*known, *ordinal):
            pairs.setdefault(prefix, id_)
    return sorted(pairs.items(), key=lambda pair: -len(pair[0]))


def values_of(places: tuple[Target, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    """A module's weight as trainers see it, from the tensors that hold it."""
    first = places[0]
    if len(places) == 1 and first.part is None:
        return seen(first, tensors[first.tensor]).reshape(first.shape)
    whole = next(iter(tensors.values())).new_zeros(first.shape)
    for target in places:
        part = slice(*target.part) if target.part else slice(None)
        whole[part] = seen(target, tensors[target.tensor]).reshape(-1, *first.shape[1:])
    return whole


def seen(target: Target, tensor: Tensor) -> Tensor:
    """The rows of a tensor that a target names, the way round that trainers see them."""
    rows = tensor[slice(*target.rows)] if target.rows else tensor
    return rows.T if target.op == "transpose" else rows


def bias_of(places: tuple[Target, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    """A module's bias as trainers see it."""
    import torch

    ordered = sorted(places, key=lambda target: target.part or (0, 0))
    return torch.cat([tensors[t.bias][slice(*t.rows) if t.rows else slice(None)] for t in ordered])
