"""Sums over a whole tensor in float64, in blocks of a fixed size: same bits on every run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 18


def dot(a: Tensor, b: Tensor) -> float:
    """Sum of a * b over all elements; a, b of one shape, any float dtype; float64 inside."""
    import torch

    x, y = a.reshape(-1), b.reshape(-1)
    return sum(
        float(torch.dot(x[i : i + _BLOCK].double(), y[i : i + _BLOCK].double()))
        for i in range(0, x.numel(), _BLOCK)
    )
