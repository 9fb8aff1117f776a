"""An adapter file's tensors as modules of one kind each, and the scale of each. Reads no bytes.

Source of the scale rules: kohya sd-scripts `networks/lora.py` (LoRAModule), LyCORIS 4.1
`modules/locon.py`, `loha.py`, `lokr.py`; PEFT 0.21 `tuners/lora/layer.py` (update_layer) and
`utils/other.py` (get_pattern_key); diffusers 0.42 `loaders/lora_base.py` (lora_adapter_metadata).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from ckptools.errors import InputError, counted, raise_all
from ckptools.lora.kinds import Kind, Layout, Measure, Settings, Shapes, load_kinds
from ckptools.lora.parts import EMBEDDING, split_key
from ckptools.tensors import TensorSpec

PEFT_CONFIG = "adapter_config.json"  # the file that lies beside a PEFT adapter
CONFIG_KEY = "lora_adapter_metadata"
DORA_PARTS = ("dora_scale", "magnitude")

# Parts that stand beside those of a kind: numbers, DoRA, a bias, a larger shape to pad to.
_NUMBERS = ("alpha", "scale")
_COMPANIONS = (*_NUMBERS, *DORA_PARTS, "diff_b", "reshape_weight")
_INTEGERS = ("on_input", "sparse_indices", "sparse_size", "reshape_weight")

Config = Mapping[str, object]


@dataclass(frozen=True)
class Module:
    """One layer's adapter.

    name      as in the file, in the file's naming scheme
    kind      a key of `load_kinds()`
    parts     canonical part -> tensor name
    shapes    canonical part -> shape
    measure   what the shapes say: rank, rows and columns of the weight it fits
    alpha     alpha of PEFT's config; None where the config has none, or the file has a tensor
    config_rank  rank of PEFT's config; None without one
    rank_stabilised  whether the config's alpha is divided by sqrt(rank) (rsLoRA)
    """

    name: str
    kind: str
    parts: Mapping[str, str]
    shapes: Shapes
    measure: Measure
    alpha: float | None = None
    config_rank: int | None = None
    rank_stabilised: bool = False

    @property
    def rank(self) -> int | None:
        """The rank that divides alpha, or None."""
        return self.measure.rank

    @property
    def settings(self) -> Settings:
        """What the shapes, or the trainer's config, decide about the formula."""
        return self.measure.settings

    @property
    def dora(self) -> str:
        """The part that holds the magnitude of a weight-decomposed (DoRA) module, or ""."""
        return next((part for part in DORA_PARTS if part in self.parts), "")

    @property
    def additive(self) -> bool:
        """Whether it adds a delta that does not depend on the weight; such modules commute."""
        return load_kinds()[self.kind].additive and not self.dora

    @property
    def touches_weight(self) -> bool:
        """Whether it changes the layer's weight."""
        return self.measure.weight

    @property
    def touches_bias(self) -> str:
        """ "no", "needed" (the layer must have a bias) or "if-any"."""
        return "needed" if "diff_b" in self.parts else self.measure.bias

    @property
    def numbers(self) -> tuple[str, ...]:
        """The parts whose one value `scale_of` needs, in the order alpha, scale."""
        return tuple(part for part in _NUMBERS if part in self.parts)

    @property
    def arrays(self) -> Mapping[str, str]:
        """Canonical part -> tensor name of all a kind's function needs."""
        return {part: name for part, name in self.parts.items() if part != "scale"}

    def misfit(self, shape: Sequence[int]) -> str:
        """Why a weight (or its row slice) of this shape does not fit, or ""."""
        if found := self.measure.misfit(shape):
            return found
        rows = shape[0] if shape else 1
        size = math.prod(self.shapes[self.dora]) if self.dora else rows
        if size not in (rows, *shape[1:2]):
            return f"{self.dora} has {size} numbers, the weight is {list(shape)}"
        return ""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file, sorted into modules.

    modules     module name -> module, sorted by name
    embeddings  embedding name -> names of its tensors; left aside, they change no weight
    unknown     tensors that are no part of an adapter; empty unless asked for
    notes       what a user should know: assumed scales
    """

    modules: Mapping[str, Module]
    embeddings: Mapping[str, tuple[str, ...]]
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def group(
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    *,
    config: Config | None = None,
    allow_unknown: bool = False,
) -> AdapterFile:
    """The modules of an adapter file, each with its kind, parts, rank and PEFT alpha.

    specs     name -> spec of every tensor in the file
    metadata  of the file's header; `lora_adapter_metadata` holds PEFT's configs, by component
    config    the adapter_config.json that lies beside the file, if any
    allow_unknown  keep tensors that are no part of an adapter in `unknown` instead of refusing
    Raises InputError (or ManyErrors) for missing halves, unknown or duplicate parts, mixed kinds,
    and parts whose shapes disagree.
    """
    configs = _Configs.read(metadata, config)
    found, embeddings, unknown, errors = _sort(specs)
    if unknown and not allow_unknown:
        errors.append(_unknown(unknown))
    modules: dict[str, Module] = {}
    for name in sorted(found):
        try:
            modules[name] = _module(name, found[name], specs, configs)
        except InputError as error:
            errors.append(cast("InputError", error.at(name)))
    raise_all(errors)
    return AdapterFile(
        MappingProxyType(modules),
        MappingProxyType({name: tuple(embeddings[name]) for name in sorted(embeddings)}),
        tuple(unknown),
        _notes(modules),
    )


def scale_of(module: Module, numbers: Mapping[str, float]) -> float:
    """What multiplies a module's ΔW, before the user's strength.

    numbers  the value of every part in `module.numbers`
    In this order: a `.scale` tensor is the scale; LoKr with both factors whole has 1, whatever
    alpha says (LyCORIS stores junk there); a tensor alpha gives alpha / rank, where alpha 0 means
    rank (kohya and LyCORIS: "if alpha == 0 or None, alpha is rank"); PEFT's config gives
    alpha / rank, or alpha / sqrt(rank) for rsLoRA, and there 0 is 0; else 1. LyCORIS' own rsLoRA
    needs nothing: it stores alpha * sqrt(rank).
    """
    if "scale" in module.parts:
        return _finite(numbers["scale"], "scale", module)
    alpha = _finite(numbers["alpha"], "alpha", module) if "alpha" in module.parts else None
    if not load_kinds()[module.kind].scaled:
        return 1.0
    if alpha is not None:
        if module.rank is None:
            return 1.0
        return alpha / module.rank if alpha != 0.0 else 1.0
    rank = module.rank if module.rank is not None else module.config_rank
    if module.alpha is None or rank is None:
        return 1.0
    return module.alpha / (math.sqrt(rank) if module.rank_stabilised else rank)


def _finite(value: float, part: str, module: Module) -> float:
    if not math.isfinite(value):
        raise InputError(f"{part} is {value}", where=module.parts[part])
    return value


_Sorted = tuple[dict[str, dict[str, str]], dict[str, list[str]], list[str], list[InputError]]


def _sort(specs: Mapping[str, TensorSpec]) -> _Sorted:
    """(module -> part -> tensor, embedding -> tensors, unknown tensors, duplicates)."""
    found: dict[str, dict[str, str]] = {}
    embeddings: dict[str, list[str]] = {}
    unknown: list[str] = []
    errors: list[InputError] = []
    for key in sorted(specs):
        split = split_key(key)
        if split is None:
            unknown.append(key)
        elif split[1] == EMBEDDING:
            embeddings.setdefault(split[0], []).append(key)
        elif (other := found.setdefault(split[0], {}).setdefault(split[1], key)) != key:
            errors.append(
                InputError(
                    f"{split[0]} has two parts {split[1]!r}: {other!r} and {key!r}",
                    where=key,
                    fix="split the file: it holds two adapters, or one under two schemes",
                )
            )
    _drop_lonely_weights(found, unknown)
    return found, embeddings, unknown, errors


def _drop_lonely_weights(found: dict[str, dict[str, str]], unknown: list[str]) -> None:
    """`x.weight` alone is an ordinary tensor, not half of an IA3."""
    for name in [name for name, parts in found.items() if set(parts) == {"ia3_weight"}]:
        unknown.append(found.pop(name)["ia3_weight"])
    unknown.sort()


def _unknown(names: Sequence[str]) -> InputError:
    shown = ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")
    return InputError(
        f"{counted(len(names), 'tensor', 'is')} no part of an adapter: {shown}",
        where=names[0],
        fix="is this an adapter? a checkpoint goes under `models`",
    )


def _module(
    name: str, parts: Mapping[str, str], specs: Mapping[str, TensorSpec], configs: _Configs
) -> Module:
    shapes = {part: specs[key].shape for part, key in parts.items()}
    _check_dtypes(parts, specs)
    kind = _kind(parts, shapes)
    _check_parts(kind, parts)
    config, relative = configs.of(name)
    measure = kind.measure(shapes, config, relative)
    _check_companions(kind, measure, shapes)
    rank = _number(config, "r", relative, "rank_pattern")
    if rank is not None and "alpha" not in parts and measure.rank not in (None, rank):
        raise InputError(f"the parts say rank {measure.rank}, PEFT's config {rank:g}")
    alpha = _number(config, "lora_alpha", relative, "alpha_pattern")
    if alpha is None:
        alpha = _number(config, "alpha", relative, "alpha_pattern")
    return Module(
        name=name,
        kind=kind.name,
        parts=MappingProxyType(dict(parts)),
        shapes=MappingProxyType(shapes),
        measure=measure,
        alpha=None if "alpha" in parts else alpha,
        config_rank=None if rank is None else int(rank),
        rank_stabilised=bool(config.get("use_rslora")),
    )


def _check_dtypes(parts: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
    for part, key in parts.items():
        spec = specs[key]
        wanted = part not in _INTEGERS and (part not in _NUMBERS or spec.dtype == "BOOL")
        if wanted and not spec.is_float:
            raise InputError(f"{part} is {spec.dtype}, not a number", where=key)
        if part in _NUMBERS and spec.numel != 1:
            raise InputError(f"{part} is {list(spec.shape)}; it should be one number", where=key)


def _kind(parts: Mapping[str, str], shapes: Shapes) -> Kind:
    """The one kind whose parts these are."""
    own = [part for part in parts if part not in _COMPANIONS]
    if not own:
        own = [part for part in parts if part == "diff_b"]
    if not own:
        raise InputError(f"has {_list(parts)}, but nothing to scale")
    kinds = load_kinds()
    fitting = [k for k in kinds.values() if k.marks.issuperset(own) and k.matches(shapes)]
    if len(fitting) == 1:
        return fitting[0]
    named = {part: [k.name for k in kinds.values() if part in k.marks] for part in own}
    told = "; ".join(f"{part} is of {' or '.join(names)}" for part, names in named.items())
    raise InputError(f"mixes kinds of adapter, or their shapes: {told}")


def _check_parts(kind: Kind, parts: Mapping[str, str]) -> None:
    """The parts are those of one layout of the kind, plus companions."""
    own = {part for part in parts if part not in _COMPANIONS or part in kind.marks}

    def badness(layout: Layout) -> tuple[int, int]:
        extra = own.difference(layout.required, layout.optional)
        return len(extra) + len(own.symmetric_difference(layout.required) - own), len(extra)

    layout = min(kind.layouts, key=badness)
    missing = [part for part in layout.required if part not in own]
    extra = sorted(own.difference(layout.required, layout.optional))
    if missing:
        raise InputError(
            f"{kind.title} lacks {_list(missing)}; it has {_list(parts)}",
            fix="the file is incomplete; download it again, or ask its author",
        )
    if extra:
        raise InputError(f"{kind.title} has no part {_list(extra)}")


def _check_companions(kind: Kind, measure: Measure, shapes: Shapes) -> None:
    dora = [part for part in DORA_PARTS if part in shapes]
    if len(dora) > 1 or (dora and not kind.decomposable):
        raise InputError(f"{kind.title} does not go with {_list(dora)}")
    if "diff_b" in shapes and measure.rows not in (None, math.prod(shapes["diff_b"])):
        raise InputError(
            f"diff_b has {math.prod(shapes['diff_b'])} numbers, the weight {measure.rows} rows"
        )
    if "scale" in shapes and not (kind.scaled or kind.additive):
        raise InputError(f"{kind.title} has no scale")


def _list(parts: Sequence[str] | Mapping[str, str]) -> str:
    return ", ".join(map(repr, sorted(parts)))


def _notes(modules: Mapping[str, Module]) -> tuple[str, ...]:
    kinds = load_kinds()
    bare = [
        module
        for module in modules.values()
        if kinds[module.kind].scaled
        and module.rank is not None
        and module.alpha is None
        and not module.numbers
    ]
    if not bare:
        return ()
    return (f"{len(bare)} of {len(modules)} modules have no alpha: scale 1 (alpha = rank)",)


@dataclass(frozen=True)
class _Configs:
    """PEFT's configs: one for all modules, or one per component ("unet", "text_encoder_2")."""

    beside: Config
    inside: Config

    @classmethod
    def read(cls, metadata: Mapping[str, str], config: Config | None) -> _Configs:
        inside: object = {}
        if CONFIG_KEY in metadata:
            try:
                inside = json.loads(metadata[CONFIG_KEY])
            except ValueError as exc:
                raise InputError(f"metadata {CONFIG_KEY!r} is not JSON: {exc}") from exc
        if not isinstance(inside, dict):
            raise InputError(f"metadata {CONFIG_KEY!r} is not an object")
        return cls(config or {}, inside)

    def of(self, module: str) -> tuple[Config, str]:
        """(the config of a module or {}, the module's name as the config's patterns see it)."""
        plain = module.removeprefix("base_model.model.")
        if self.beside:
            return self.beside, plain
        component, _, rest = plain.partition(".")
        prefix = f"{component}."
        own = {
            key.removeprefix(prefix): value
            for key, value in self.inside.items()
            if key.startswith(prefix)
        }
        if own:
            return own, rest
        return (self.inside, plain) if "r" in self.inside else ({}, plain)


def _number(config: Config, key: str, name: str, pattern: str) -> float | None:
    """A number of PEFT's config: that of the first pattern the module's name ends in, or `key`."""
    patterns = config.get(pattern)
    value = config.get(key)
    if isinstance(patterns, Mapping):
        for expression, own in patterns.items():
            try:
                hit = re.match(rf"(.*\.)?({expression})$", name)
            except re.error as exc:
                raise InputError(f"{pattern} {expression!r} is no regular expression") from exc
            if hit:
                value = own
                break
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{key} in PEFT's config is {value!r}, not a number")
    return float(value)
