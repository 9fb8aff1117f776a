"""Full: the whole difference, or a whole new weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptools.errors import InputError
from ckptools.lora.kinds import Kind, Layout, Measure, Settings, Shapes, kernel_of, register
from ckptools.lora.precision import in_float

if TYPE_CHECKING:
    from torch import Tensor


def rows(parts: Mapping[str, Tensor], begin: int, end: int, scale: float = 1.0) -> Tensor:
    """Rows begin:end of scale * diff, (end - begin, columns).

    diff  of the weight's shape; 1-D for norms, embeddings' positions and the like
    Source: LyCORIS 4.1, modules/full.py (get_diff_weight).
    """
    diff = in_float({"diff": parts["diff"]})["diff"]
    return diff.reshape(diff.shape[0], -1)[begin:end] * scale


def apply(
    weight: Tensor,
    parts: Mapping[str, Tensor],
    *,
    scale: float,
    strength: float,
    settings: Settings,
) -> Tensor:
    """W + strength * (set_weight - W): at strength 1 the new weight, to the bit.

    Source: ComfyUI's `set_weight`, which knows no strength; ours interpolates, so that 0 is W.
    """
    del scale, settings
    new = in_float({"set_weight": parts["set_weight"]}, weight)["set_weight"]
    base = weight.to(new.dtype)
    return new.reshape(base.shape) * strength + base * (1.0 - strength)


def measure(shapes: Shapes, config: Mapping[str, object], name: str) -> Measure:
    """Size from the difference; a module may change the bias alone (`diff_b`)."""
    del config, name
    part = next((part for part in ("diff", "set_weight") if part in shapes), "")
    if not part:
        return Measure(weight=False)
    shape = shapes[part]
    if not shape or 0 in shape:
        raise InputError(f"{part} is {list(shape)}")
    columns = 1
    for size in shape[1:]:
        columns *= size
    return Measure(rows=shape[0], columns=columns, kernel=kernel_of(shape))


KIND = register(
    Kind(
        name="full",
        title="full difference",
        formula="W + s * diff",
        source="LyCORIS",
        layouts=(Layout(("diff",), ("diff_b",)), Layout(("diff_b",))),
        measure=measure,
        rows=rows,
    )
)
REPLACE = register(
    Kind(
        name="replace",
        title="new weight",
        formula="W + s * (set_weight - W)",
        source="ComfyUI",
        layouts=(Layout(("set_weight",)),),
        measure=measure,
        apply=apply,
    )
)
