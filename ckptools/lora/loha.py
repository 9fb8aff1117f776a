"""LoHa: the element-wise product of two low-rank matrices."""

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
from ckptools.lora.precision import in_float

if TYPE_CHECKING:
    from torch import Tensor


def rows(parts: Mapping[str, Tensor], begin: int, end: int, scale: float = 1.0) -> Tensor:
    """Rows begin:end of scale * (w1_a @ w1_b) * (w2_a @ w2_b), (end - begin, columns).

    hada_w1_a, hada_w2_a  (out, rank)
    hada_w1_b, hada_w2_b  (rank, in*kh*kw) or (rank, in, kh, kw)
    hada_t1, hada_t2      (rank, rank, kh, kw): Tucker; then a is (rank, out), b is (rank, in) and
                          each half is sum over i, j of t[i, j] a[i, p] b[j, r]
    Source: Hyeon-Woo et al. 2021, arXiv 2108.06098 (FedPara), proposition 1 and 3; LyCORIS 4.1,
    functional/loha.py (diff_weight). LyCORIS 4.1's own merge multiplies by the scale twice
    (LohaModule.get_diff_weight); its forward pass, which is what was trained, once.
    """
    held = in_float({part: parts[part] for part in _PARTS if part in parts})
    first, second = (_half(held, which, begin, end) for which in "12")
    return first * second * scale


def _half(held: Mapping[str, Tensor], which: str, begin: int, end: int) -> Tensor:
    a, b = held[f"hada_w{which}_a"], held[f"hada_w{which}_b"]
    t = held.get(f"hada_t{which}")
    if t is None:
        return a.flatten(1)[begin:end] @ b.flatten(1)
    return tucker(t, a[:, begin:end], b)


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Sum over i, j of t[i, j] a[i, p] b[j, r], as (p, r*kh*kw).

    t  (i, j, kh, kw);  a  (i, p);  b  (j, r)
    Source: LyCORIS 4.1, functional/general.py, rebuild_tucker.
    """
    import torch

    core = torch.einsum("ijk,jr->irk", t.flatten(2), b)
    return a.T @ core.flatten(1)


def measure(shapes: Shapes, config: Mapping[str, object], name: str) -> Measure:
    """Rank and size from the factors; both halves must agree on all."""
    del config, name
    rank, out, columns = _half_size(shapes, "1")
    if (other := _half_size(shapes, "2")) != (rank, out, columns):
        same_rank(hada_w1=rank, hada_w2=other[0])
        raise InputError(f"hada_w1 makes {out} x {columns}, hada_w2 {other[1]} x {other[2]}")
    core = "hada_t1" if "hada_t1" in shapes else "hada_w1_b"
    return Measure(rank=rank, rows=out, columns=columns, kernel=kernel_of(shapes[core]))


def _half_size(shapes: Shapes, which: str) -> tuple[int, int, int]:
    """(rank, rows, columns) of one half."""
    a, b, t = f"hada_w{which}_a", f"hada_w{which}_b", f"hada_t{which}"
    rank_b, columns = matrix(shapes, b)
    if t not in shapes:
        out, rank_a = matrix(shapes, a)
        return same_rank(**{a: rank_a, b: rank_b}), out, columns
    rank_a, out = matrix(shapes, a)
    core = shapes[t]
    if len(core) < 3:
        raise InputError(f"{t} is {list(core)}; it should be a kernel")
    rank = same_rank(**{a: rank_a, b: rank_b, t: core[0], f"{t}'s second axis": core[1]})
    return rank, out, columns * math.prod(core[2:])


_WEIGHTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_TUCKER = ("hada_t1", "hada_t2")
_PARTS = (*_WEIGHTS, *_TUCKER)

KIND = register(
    Kind(
        name="loha",
        title="LoHa",
        formula="W + s * alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)",
        source="Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS",
        layouts=(Layout(_WEIGHTS), Layout((*_WEIGHTS, *_TUCKER))),
        measure=measure,
        rows=rows,
        scaled=True,
        decomposable=True,
    )
)
