"""LoKr: the Kronecker product of two matrices, each whole or factored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptools.errors import InputError
from ckptools.lora.kinds import (
    Kind,
    Layout,
    Measure,
    Shapes,
    kernel_of,
    matrix,
    register,
    same_rank,
)
from ckptools.lora.loha import tucker
from ckptools.lora.precision import in_float

if TYPE_CHECKING:
    from torch import Tensor


def rows(parts: Mapping[str, Tensor], begin: int, end: int, scale: float = 1.0) -> Tensor:
    """Rows begin:end of scale * kron(w1, w2), (end - begin, columns); only those are computed.

    w1  (a, c): lokr_w1, or lokr_w1_a (a, rank) @ lokr_w1_b (rank, c)
    w2  (b, d[, kh, kw]): lokr_w2, or lokr_w2_a (b, rank) @ lokr_w2_b (rank, d[, kh, kw]), or
        Tucker: lokr_t2 (rank, rank, kh, kw), lokr_w2_a (rank, b), lokr_w2_b (rank, d)
    Row i*b + j of the product is w1[i] (c) times w2[j] (d*kh*kw), in that order.
    Source: Edalati et al. 2022, arXiv 2212.10650; LyCORIS 4.1, functional/lokr.py (kron_weight).
    LyCORIS 4.1's own merge multiplies by the scale twice (LokrModule.get_diff_weight).
    """
    import torch

    held = in_float({part: parts[part] for part in _PARTS if part in parts})
    first = _whole(held, "1") * scale
    second = _whole(held, "2")
    index = torch.arange(begin, end)
    one = first[index // second.shape[0]]  # (rows, c)
    two = second[index % second.shape[0]]  # (rows, d*kh*kw)
    return (one[:, :, None] * two[:, None, :]).flatten(1)


def _whole(held: Mapping[str, Tensor], which: str) -> Tensor:
    """w1 or w2 as a matrix: all but the first axis flattened."""
    whole = held.get(f"lokr_w{which}")
    if whole is not None:
        return whole.flatten(1)
    a, b = held[f"lokr_w{which}_a"], held[f"lokr_w{which}_b"]
    if which == "2" and "lokr_t2" in held:
        return tucker(held["lokr_t2"], a, b)
    return a @ b.flatten(1)


def measure(shapes: Shapes, config: Mapping[str, object], name: str) -> Measure:
    """Size from both factors; the rank from the b halves, None where both factors are whole.

    Source of the rank: LyCORIS' weights are (…, rank) and (rank, …) in that order, and Tucker
    stores both halves rank first, so that the b halves start with the rank in every layout.
    """
    del config, name
    ranks: dict[str, int] = {}
    a, c = _size(shapes, "1", ranks)
    b, d = _size(shapes, "2", ranks)
    rank = same_rank(**ranks) if ranks else None
    core = next(part for part in ("lokr_w2", "lokr_t2", "lokr_w2_b") if part in shapes)
    return Measure(rank=rank, rows=a * b, columns=c * d, kernel=kernel_of(shapes[core]))


def _size(shapes: Shapes, which: str, ranks: dict[str, int]) -> tuple[int, int]:
    """(rows, columns) of w1 or w2; adds what its factors say of the rank to `ranks`."""
    whole, a, b, t = (f"lokr_{part}" for part in (f"w{which}", f"w{which}_a", f"w{which}_b", "t2"))
    if whole in shapes:
        return matrix(shapes, whole)
    ranks[b], columns = matrix(shapes, b)
    if which == "2" and t in shapes:
        core = shapes[t]
        if len(core) < 3:
            raise InputError(f"{t} is {list(core)}; it should be a kernel")
        ranks[a], out = matrix(shapes, a)
        ranks[t], ranks[f"{t}'s second axis"] = core[:2]
        return out, columns * math.prod(core[2:])
    out, ranks[a] = matrix(shapes, a)
    return out, columns


_FIRST = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
_SECOND = (
    ("lokr_w2",),
    ("lokr_w2_a", "lokr_w2_b"),
    ("lokr_t2", "lokr_w2_a", "lokr_w2_b"),
)
_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

KIND = register(
    Kind(
        name="lokr",
        title="LoKr",
        formula="W + s * alpha / rank * kron(w1, w2)",
        source="Edalati et al. 2022, arXiv 2212.10650; LyCORIS",
        layouts=tuple(Layout((*one, *two)) for one in _FIRST for two in _SECOND),
        measure=measure,
        rows=rows,
        scaled=True,
        decomposable=True,
    )
)
