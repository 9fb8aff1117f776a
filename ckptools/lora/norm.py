"""Norms: differences of a normalisation layer's weight and bias."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptools.errors import InputError
from ckptools.lora.kinds import Kind, Layout, Measure, Settings, Shapes, register
from ckptools.lora.precision import in_float

if TYPE_CHECKING:
    from torch import Tensor


def rows(parts: Mapping[str, Tensor], begin: int, end: int, scale: float = 1.0) -> Tensor:
    """Numbers begin:end of scale * w_norm, (end - begin, 1).

    w_norm  (channels)
    Source: LyCORIS 4.1, modules/norms.py (get_diff_weight).
    """
    return in_float({"w_norm": parts["w_norm"]})["w_norm"].reshape(-1, 1)[begin:end] * scale


def bias(
    weight: Tensor,
    parts: Mapping[str, Tensor],
    *,
    scale: float,
    strength: float,
    settings: Settings,
) -> Tensor:
    """Bias + strength * b_norm.

    weight  the layer's bias, (channels)
    Source: LyCORIS 4.1, modules/norms.py (get_merged_weight).
    """
    del scale, settings
    change = in_float({"b_norm": parts["b_norm"]}, weight)["b_norm"]
    return weight.to(change.dtype) + change.reshape(weight.shape) * strength


def measure(shapes: Shapes, config: Mapping[str, object], name: str) -> Measure:
    """Channels from w_norm."""
    del config, name
    size = math.prod(shapes["w_norm"])
    if "b_norm" in shapes and math.prod(shapes["b_norm"]) != size:
        raise InputError(f"w_norm has {size} numbers, b_norm {math.prod(shapes['b_norm'])}")
    return Measure(rows=size, columns=1, bias="needed" if "b_norm" in shapes else "no")


KIND = register(
    Kind(
        name="norm",
        title="norm difference",
        formula="W + s * w_norm, bias + s * b_norm",
        source="LyCORIS",
        layouts=(Layout(("w_norm",), ("b_norm",)),),
        measure=measure,
        rows=rows,
        bias=bias,
    )
)
