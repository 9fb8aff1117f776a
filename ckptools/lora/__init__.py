"""Adapters: what LoRA files hold, and how each kind changes a weight. Opens no file.

`parts` tells the names of an adapter's tensors, `group` sorts a file into modules, `kinds` is the
registry, and every kind (`linear`, `loha`, `lokr`, `ia3`, `glora`, `full`, `norm`, `oft`, `boft`)
is one file with pure functions; `dora` goes on top of the additive ones. A new kind is a new file.
Importing this package loads no torch.

    file = group(specs, metadata)                      # names and shapes only
    for module in file.modules.values():
        scale = scale_of(module, numbers)              # numbers: values of module.numbers
        weight = bake_weight(module, weight, parts, scale=scale, strength=0.8)

Order matters only for modules that are not `additive`: they read the weight as it then is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptools.lora.group import AdapterFile, Module, group, scale_of
from ckptools.lora.kinds import Kind, Layout, Measure, load_kinds
from ckptools.lora.parts import EMBEDDING, split_key
from ckptools.lora.precision import in_float

if TYPE_CHECKING:
    from torch import Tensor

    from ckptools.lora.dora import Reading

__all__ = [
    "EMBEDDING",
    "AdapterFile",
    "Kind",
    "Layout",
    "Measure",
    "Module",
    "bake_bias",
    "bake_weight",
    "group",
    "load_kinds",
    "scale_of",
    "split_key",
]


def bake_weight(
    module: Module,
    weight: Tensor,
    parts: Mapping[str, Tensor],
    *,
    scale: float,
    strength: float = 1.0,
    dora: Reading = "trained",
) -> Tensor:
    """The weight with the module's change, in fp32, or fp64 where something given is fp64.

    weight    the layer's weight, or the rows of it that the module stands for
    parts     canonical part -> tensor, of `module.arrays`
    scale     of `scale_of`
    strength  the user's; 0 gives the weight
    """
    kind = load_kinds()[module.kind]
    shape = tuple(weight.shape)
    if not module.touches_weight:
        return in_float({"weight": weight})["weight"]
    if module.dora:
        from ckptools.lora.dora import decompose

        delta = kind.delta(parts, shape, scale)
        magnitude = parts[module.dora]
        return decompose(
            weight, delta, magnitude, part=module.dora, strength=strength, reading=dora
        )
    if kind.apply is not None:
        return kind.apply(weight, parts, scale=scale, strength=strength, settings=module.settings)
    delta = kind.delta(parts, shape, scale)
    held = in_float({"weight": weight, "delta": delta})
    return held["weight"] + held["delta"] * strength


def bake_bias(
    module: Module,
    bias: Tensor,
    parts: Mapping[str, Tensor],
    *,
    scale: float,
    strength: float = 1.0,
) -> Tensor:
    """The layer's bias with the module's change, where `module.touches_bias` is not "no".

    bias, parts, scale, strength  as for `bake_weight`; `diff_b` is added to any kind's change
    """
    kind = load_kinds()[module.kind]
    result = in_float({"bias": bias}, *parts.values())["bias"]
    if kind.bias is not None and module.measure.bias != "no":
        result = kind.bias(result, parts, scale=scale, strength=strength, settings=module.settings)
    if "diff_b" in parts:
        change = in_float({"diff_b": parts["diff_b"]}, result)["diff_b"]
        result = result + change.reshape(result.shape) * strength
    return result
