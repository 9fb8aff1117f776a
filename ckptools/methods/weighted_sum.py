"""weighted_sum: the mix of two models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptools.methods import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    access="linear",
    formula="A * (1 - alpha) + B * alpha",
    source="AUTOMATIC1111 web UI, checkpoint merger, 'Weighted sum'",
)
def weighted_sum(a: Tensor, b: Tensor, *, alpha: float = 0.5) -> Tensor:
    """A mix of two models: alpha 0 is A, alpha 1 is B, both to the bit.

    a, b   same shape
    alpha  share of B; values outside 0..1 extrapolate
    """
    return a * (1.0 - alpha) + b * alpha
