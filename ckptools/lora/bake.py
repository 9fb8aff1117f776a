"""An adapter's changes, done to tensors: rows of a delta, or a weight changed as a whole.

Pure: tensors in, tensors out. Must not know files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from ckptools.errors import InputError
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
    Only the rows that hold these elements are computed. Where nothing changes it is -0, which
    leaves what it is added to as it is.
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
        with _placed(change):
            values = kind.rows(own, low + shift, high + shift, change.scale).reshape(-1, width)
        if total is None and (low, high) == (first, last):
            total = values
            continue
        if total is None:
            total = torch.full((last - first, width), -0.0, dtype=values.dtype)
        total[low - first : high - first] += values
    if total is None:
        dtype = next(t.dtype for own in parts for t in own.values() if t.is_floating_point())
        return torch.full((end - begin,), -0.0, dtype=dtype)
    return total.view(-1)[begin - first * width : end - first * width]


def by_module(changes: Sequence[Change]) -> list[tuple[Change, ...]]:
    """The changes in their order, those of one module's halves together."""
    return [tuple(own) for _, own in groupby(changes, key=lambda change: change.module.name)]


def bake_module(
    changes: Sequence[Change], parts: Mapping[str, Tensor], weight: Tensor, strength: float
) -> None:
    """Change a tensor in place: the weight or the bias that a module's targets name.

    changes   one; or one per half, where the tensor has the module's halves the other way round:
              the module then sees its weight whole, in its own order
    parts     of the module, canonical part -> tensor
    weight    the whole tensor, fp32 or fp64
    strength  the user's
    """
    import torch

    first = changes[0]
    held = [weight[_index(change)] for change in changes]
    if first.target.op == "transpose" and not first.bias:
        held = [part.T for part in held]
    order = sorted(range(len(held)), key=lambda i: changes[i].target.part or (0, 0))
    seen = torch.cat([held[i] for i in order])  # a copy, in the module's order
    bake = bake_bias if first.bias else partial(bake_weight, dora=first.dora)
    own = seen if first.bias else seen.reshape(first.shape)
    with _placed(first):
        result = bake(first.module, own, parts, scale=first.scale, strength=strength)
    values, start = result.reshape(seen.shape), 0
    for i in order:
        end = start + held[i].shape[0]
        held[i].copy_(values[start:end])
        start = end


@contextmanager
def _placed(change: Change) -> Iterator[None]:
    """Say which module it is whose values do not fit."""
    try:
        yield
    except InputError as exc:
        exc.at(change.module.name)
        raise


def _index(change: Change) -> tuple[slice, ...]:
    """Where in its tensor a change goes; a bias has rows only."""
    index = change.target.index(change.shape)
    return index[:1] if change.bias else index
