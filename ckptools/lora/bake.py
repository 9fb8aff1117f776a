"""An adapter's changes, done to tensors: rows of a delta, or a weight changed as a whole.

Pure: tensors in, tensors out. Must not know files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ckptools.lora import bake_bias, bake_weight
from ckptools.lora.kinds import load_kinds

if TYPE_CHECKING:
    from torch import Tensor

    from ckptools.program import Change


def delta_elements(
    changes: Sequence[Change],
    parts: Sequence[Mapping[str, Tensor]],
    shape: tuple[int, ...],
    begin: int,
    end: int,
) -> Tensor:
    """Elements begin:end of the sum of the changes, flat, in the dtype of the parts.

    changes  additive ones, each for all columns of its rows
    parts    of each change, canonical part -> tensor
    shape    of the tensor they go into
    Only the rows that hold these elements are computed.
    """
    import torch

    rows = shape[0] if shape else 1
    width = 1
    for size in shape[1:]:
        width *= size
    first, last = begin // width, -(-end // width)
    total: Tensor | None = None
    for change, own in zip(changes, parts, strict=True):
        top, bottom = change.target.rows or (0, rows)
        low, high = max(top, first), min(bottom, last)
        if low >= high:
            continue
        kind = load_kinds()[change.module.kind]
        if kind.rows is None:
            raise TypeError(f"{kind.name} depends on the weight")
        shift = (change.target.part[0] if change.target.part else 0) - top
        values = kind.rows(own, low + shift, high + shift, change.scale).reshape(-1, width)
        if total is None and (low, high) == (first, last):
            total = values
            continue
        if total is None:
            total = torch.zeros(last - first, width, dtype=values.dtype)
        total[low - first : high - first] += values
    if total is None:
        dtype = next(t.dtype for own in parts for t in own.values() if t.is_floating_point())
        return torch.zeros(end - begin, dtype=dtype)
    return total.view(-1)[begin - first * width : end - first * width]


def bake_change(
    change: Change, parts: Mapping[str, Tensor], weight: Tensor, strength: float
) -> None:
    """Change a tensor in place: the weight or the bias that the change's target names.

    weight    the whole tensor, fp32 or fp64
    strength  the user's
    """
    target = change.target
    if change.bias:
        rows = slice(*target.rows) if target.rows else slice(None)
        own = weight[rows]
        own.copy_(
            bake_bias(change.module, own.clone(), parts, scale=change.scale, strength=strength)
        )
        return
    held = weight[target.index(change.shape)]
    seen = held.T if target.op == "transpose" else held
    result = bake_weight(
        change.module,
        seen.reshape(change.shape).clone(),
        parts,
        scale=change.scale,
        strength=strength,
        dora=change.dora,
    )
    seen.copy_(result.reshape(seen.shape))
