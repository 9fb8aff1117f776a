"""train_difference: add_difference, weighted by how far A still is from B."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptools.methods import merge_method
from ckptools.methods.blocks import moved_by

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    access="elementwise",
    formula="A + 1.8 * alpha * (B - C) * |B - A| / (|B - C| + |B - A|)",
    source="SuperMerger, 'trainDifference'",
)
def train_difference(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Model A as if it had been trained on what took C to B.

    Each element moves by the difference B - C, less where A is already near B.
    a, b, c  same shape
    alpha    strength; 0 is A. The factor 1.8 is part of the method as its users know it.
    """
    learned = b - c
    distance = (b - a).abs_()
    total = learned.abs().add_(distance)
    share = distance.div_(total).nan_to_num_(nan=0.0)  # 0 / 0 where nothing was learned
    return moved_by(a, share.mul_(learned).mul_(1.8 * alpha))
