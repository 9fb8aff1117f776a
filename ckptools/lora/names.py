"""What adapter files call a checkpoint's modules, built forward from its own tensor names.

Every weight of the checkpoint gets all the names its module may have in an adapter, from the
family's key map (`ckptools/keymap.py`); an adapter's name is then only looked up. Underscores are
never turned back into dots. Knows names and shapes, no values: no torch here.

    kohya, OneTrainer, LyCORIS   lora_unet_…, lora_te1_…, lycoris_…, oft_unet_…: "_" for "."
    diffusers, PEFT              unet.…, text_encoder_2.…, base_model.model.…, or no prefix
    full names                   diffusion_model.…, the checkpoint's own
    cloneofsimo's numbers        unet:79, text_encoder:5

What `split_key` moves out of old diffusers names (`processor`, `to_out_lora`) is no concern here.

Sources of the prefixes: kohya sd-scripts 48d368f `networks/lora.py`, `networks/oft.py`; the tables
by which OneTrainer converts (omi_model_standards, `convert_sdxl_lora.py`, `convert_flux_lora.py`);
LyCORIS 4.1 `wrapper.py`; diffusers 0.42 `loaders/lora_pipeline.py`; ComfyUI `comfy/lora.py`;
cloneofsimo/lora `lora.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from ckptools.family import Family
from ckptools.keymap import Component, KeyMap, Op, Ordinal, Piece, key_map, key_map_ids
from ckptools.tensors import TensorSpec

Scheme = Literal["kohya", "diffusers", "original"]
_PEFT_PREFIX = "base_model.model."
_BIAS_ENDS = (".bias", "_bias")
_WEIGHT_ENDS = (".weight", "_weight", ".scale")


@dataclass(frozen=True)
class Target:
    """The weight of one module, as the trainers of adapters see it, and where it is stored.

    component  "unet", "text_encoder_2" …
    module     its name in diffusers, without the component; the checkpoint's where diffusers has
               no such module (Flux's fused qkv)
    tensor     the checkpoint's tensor
    shape      of the module's weight as trainers see it: a change has this shape
    rows       rows of the tensor that the module is (q of a fused qkv); None: all
    part       rows of the change that belong there; None: all. Only where diffusers swaps halves
    op         what turns the change into the tensor's: "transpose", or "reshape" (append [1, 1])
    bias       the tensor of the module's bias, of which `rows` and `part` hold as well; or ""
    takes_fewer_inputs  whether a change of fewer input channels goes to the first ones: the first
               convolution of inpainting, instruct-pix2pix and depth models
    """

    component: str
    module: str
    tensor: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    part: tuple[int, int] | None = None
    op: Op = "none"
    bias: str = ""
    takes_fewer_inputs: bool = False

    def shape_for(self, columns: int | None) -> tuple[int, ...]:
        """The shape of the weight that a change of so many columns (inputs times kernel) is for.

        It is `shape`, but on an inpainting model's first convolution, [320, 9, 3, 3], where 36
        columns mean [320, 4, 3, 3]: `index` says where those are.
        """
        if columns is None or not self.takes_fewer_inputs or len(self.shape) < 2:
            return self.shape
        inputs, rest = divmod(columns, math.prod(self.shape[2:]))
        if rest or inputs not in _LATENT_CHANNELS or inputs >= self.shape[1]:
            return self.shape
        return (self.shape[0], inputs, *self.shape[2:])

    def index(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Where in `tensor` a change of `shape` (of `shape_for`) goes: rows, input channels."""
        rows = slice(None) if self.rows is None else slice(*self.rows)
        if shape[1:2] == self.shape[1:2]:
            return (rows,)
        return (rows, slice(0, shape[1]))


_LATENT_CHANNELS = (4, 16)  # what base models take, where their variants take more

Targets = tuple[Target, ...]


class NameMap:
    """All names that the modules of one checkpoint may have in adapters. Made by `targets`."""

    def __init__(self, family: Family, specs: Mapping[str, TensorSpec], keys: KeyMap) -> None:
        self._family = family
        self._specs = specs
        self._keys = keys

    def find(self, module: str) -> Targets:
        """Where an adapter's module belongs; () if nowhere, or if it could be in two components.

        Mostly one target; two where diffusers' weight has its halves the other way round
        (`norm_out.linear` of SD3 and Flux), each with its `part` of the change.
        """
        found = self._found(module)
        return next(iter(found.values())) if len(found) == 1 else ()

    def components_of(self, module: str) -> tuple[str, ...]:
        """The components that the module could be in: more than one means `find` gives ()."""
        return tuple(self._found(module))

    def names(self, scheme: Scheme) -> Mapping[str, Targets]:
        """Module name → targets, for all modules, as that scheme writes them.

        kohya      lora_unet_…, in the names that kohya's trainer uses for the family
        diffusers  unet.…: the names of PEFT and diffusers
        original   the checkpoint's own names
        """
        names: dict[str, Targets] = {}
        for names_of in self._components.values():
            names.update(names_of.written(scheme))
        return MappingProxyType(names)

    def _found(self, module: str) -> dict[str, Targets]:
        name = module.replace(_PEFT_PREFIX, "", 1)
        for prefix, places in self._prefixes:
            if name.startswith(prefix):
                found: dict[str, Targets] = {}
                for component, table in places:
                    belongs = self._components[component].look_up(table, name[len(prefix) :])
                    if belongs:
                        found.setdefault(component, belongs)
                if found:
                    return found
        return {}

    @cached_property
    def _prefixes(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Prefix → (component, table) that it may stand before; longest first."""
        prefixes: dict[str, list[tuple[str, str]]] = {}
        for id_, component in self._keys.components.items():
            for prefix, table in _prefixes_of(component):
                prefixes.setdefault(prefix, []).append((id_, table))
        return sorted(prefixes.items(), key=lambda item: -len(item[0]))

    @cached_property
    def _components(self) -> dict[str, _ComponentNames]:
        grouped: dict[str, list[tuple[str, TensorSpec]]] = {
            id_: [] for id_ in self._keys.components
        }
        for spec in self._specs.values():
            found = self._keys.split(spec.name)
            if found is not None and spec.shape:
                grouped[found[0].id].append((found[1], spec))
        return {
            id_: _ComponentNames(self._keys, component, grouped[id_], self._family.input_tensors)
            for id_, component in self._keys.components.items()
        }


def targets(family: Family, specs: Mapping[str, TensorSpec]) -> NameMap:
    """The names of a checkpoint's modules in adapters; made only as far as they are asked for.

    family  of the checkpoint; one without a key map is an InputError
    specs   the checkpoint's tensors
    """
    return NameMap(family, specs, key_map(family.id))


def _prefixes_of(component: Component) -> Iterator[tuple[str, str]]:
    """Prefixes, each with the table it stands before; a table earlier in the list goes first."""
    names = component.adapters
    for prefix in names.dotted:
        yield prefix, "dotted"
    for prefix in dict.fromkeys((*names.original, *component.prefixes)):
        yield prefix, "original"
    for prefix in names.underscored:
        yield prefix, "underscored"
    if component.ordinal is not None:
        yield component.ordinal.prefix, "ordinal"


class _ComponentNames:
    """The modules of one component, by each way to write their names."""

    def __init__(
        self,
        keys: KeyMap,
        component: Component,
        tensors: list[tuple[str, TensorSpec]],
        input_tensors: tuple[str, ...],
    ) -> None:
        self._keys = keys
        self._component = component
        self._tensors = tensors
        self._input_tensors = frozenset(input_tensors)

    def look_up(self, table: str, name: str) -> Targets:
        tables = {
            "dotted": self.dotted,
            "original": self.original,
            "underscored": self.underscored,
            "ordinal": self.ordinal,
        }
        return tables[table].get(name, ())

    def written(self, scheme: Scheme) -> dict[str, Targets]:
        names = self._component.adapters
        if scheme == "original":
            return {self._component.prefixes[0] + n: t for n, t in self.original.items()}
        if scheme == "diffusers":
            return {names.dotted[0] + n: t for n, t in self._diffusers.items()}
        if not names.underscored:
            return {}
        modules = self.original if names.kohya == "original" else self._diffusers
        return {names.underscored[0] + n.replace(".", "_"): t for n, t in modules.items()}

    @cached_property
    def _both(self) -> tuple[dict[str, Targets], dict[str, Targets]]:
        """Diffusers' modules and the checkpoint's, dotted."""
        ends = [(*_split_end(inner), spec) for inner, spec in self._tensors]
        biases = {module: spec.name for module, is_bias, spec in ends if is_bias}
        diffusers: dict[str, Targets] = {}
        original: dict[str, Targets] = {}
        for module, is_bias, spec in ends:
            if is_bias or not spec.is_float:
                continue
            bias = biases.get(module, "")
            pieces = self._keys.pieces(spec) or ()
            for piece in pieces:
                name = piece.name.removesuffix(".weight")
                if name != piece.name:
                    target = self._target(spec, name, piece, bias)
                    diffusers[name] = (*diffusers.get(name, ()), target)
            original[module] = self._whole(spec, module, pieces, diffusers, bias)
        return diffusers, original

    def _target(self, spec: TensorSpec, module: str, piece: Piece, bias: str) -> Target:
        shape = piece.shape
        if piece.part is not None:  # the halves of one weight
            shape = (spec.shape[0], *shape[1:])
        return Target(
            component=self._component.id,
            module=module,
            tensor=spec.name,
            shape=shape,
            rows=piece.rows,
            part=piece.part,
            op=piece.op,
            bias=bias,
            takes_fewer_inputs=spec.name in self._input_tensors,
        )

    def _whole(
        self,
        spec: TensorSpec,
        module: str,
        pieces: tuple[Piece, ...],
        diffusers: Mapping[str, Targets],
        bias: str,
    ) -> Targets:
        """The tensor under its own name; the same target where diffusers has it unchanged."""
        if len(pieces) == 1 and pieces[0].op == "none":
            same = diffusers.get(pieces[0].name.removesuffix(".weight"), ())
            if same:
                return same
        fewer = spec.name in self._input_tensors
        whole = Target(
            self._component.id, module, spec.name, spec.shape, bias=bias, takes_fewer_inputs=fewer
        )
        return (whole,)

    @property
    def _diffusers(self) -> dict[str, Targets]:
        return self._both[0]

    @cached_property
    def dotted(self) -> dict[str, Targets]:
        optional = self._component.adapters.optional
        if not optional:
            return self._diffusers
        short = {name.removeprefix(optional): t for name, t in self._diffusers.items()}
        return short | self._diffusers

    @property
    def original(self) -> dict[str, Targets]:
        return self._both[1]

    @cached_property
    def underscored(self) -> dict[str, Targets]:
        """Diffusers' names win: `lora_te2_text_projection` is the one that is transposed."""
        both = self.original | self.dotted
        return {name.replace(".", "_"): t for name, t in both.items()}

    @cached_property
    def ordinal(self) -> dict[str, Targets]:
        ordinal = self._component.ordinal
        if ordinal is None:
            return {}
        ranked = sorted(
            (place, name) for name in self._diffusers if (place := _place(ordinal, name))
        )
        return {str(number): self._diffusers[name] for number, (_, name) in enumerate(ranked)}


def _split_end(name: str) -> tuple[str, bool]:
    """The module of a checkpoint's tensor, and whether the tensor is its bias.

    A parameter of its own (`positional_embedding`) is a module.
    """
    for end in _BIAS_ENDS:
        if name.endswith(end):
            return name.removesuffix(end), True
    for end in _WEIGHT_ENDS:
        if name.endswith(end):
            return name.removesuffix(end), False
    return name, False


def _place(ordinal: Ordinal, name: str) -> tuple[int, tuple[int, ...], int] | None:
    """Where in the count a module comes; None where it is not counted."""
    first = name.partition(".")[0]
    if first not in ordinal.first:
        return None
    for position, end in enumerate(ordinal.modules):
        if name.endswith(f".{end}"):
            path = name.removesuffix(end)
            numbers = tuple(int(word) for word in path.split(".") if word.isdecimal())
            return ordinal.first.index(first), numbers, position
    return None


@dataclass(frozen=True)
class Fit:
    """A family that an adapter was made for, and the fact that says so."""

    family: str
    reason: str


def fitting_families(columns: Mapping[str, int | None]) -> tuple[Fit, ...]:
    """The families whose models an adapter fits, told from its module names and widths alone.

    columns  adapter's module → inputs of the weight it is for, None where its parts do not tell
    Mostly one; more where only a text encoder is there that several families share; () where
    nothing speaks for any. Reads every key map (some 40 ms): for messages, not for the way there.

    >>> fitting_families({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": 2048})
    (Fit(family='sdxl', reason='cross-attention takes 2048'),)
    """
    maps = [key_map(id_) for id_ in key_map_ids()]
    for level in range(max(len(keys.fits) for keys in maps)):
        found = tuple(fit for keys in maps if (fit := _fit(keys, level, columns)))
        if found:
            return found
    return ()


def _fit(keys: KeyMap, level: int, columns: Mapping[str, int | None]) -> Fit | None:
    for mark in keys.fits[level] if level < len(keys.fits) else ():
        matches = re.compile(translate(mark.module)).match
        for module, inputs in columns.items():
            if mark.inputs in (None, inputs) and matches(module):
                return Fit(keys.family, mark.says.format(mark.inputs))
    return None
