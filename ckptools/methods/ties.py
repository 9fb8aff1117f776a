"""ties: add several models' task vectors without letting them cancel each other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ckptools.methods import merge_method
from ckptools.methods.blocks import in_blocks, moved_by

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    access="tensor",
    formula="base + scale * mean of the trimmed deltas that agree with the elected sign",
    source="Yadav et al. 2023, arXiv 2306.01708, algorithm 1; sign by total mass, mean by count, "
    "as PEFT's `merge_utils.ties`",
    bounds={"density": (0.0, 1.0)},
    minimum=2,
    scratch=1,
    doubles=True,
)
def ties(*models: Tensor, base: Tensor, density: float = 0.3, scale: float = 1.0) -> Tensor:
    """Trim each task vector, elect a sign per element, average the deltas that agree.

    models, base  same shape; the task vectors are models - base
    density       share of each task vector that is kept: the floor(density * n) largest
                  magnitudes, and all that are tied with the smallest of them
    scale         factor on the merged task vector (the paper's lambda)
    The elected sign is that of the trimmed deltas' sum; where they cancel to 0 it is +, as in PEFT.
    """
    import torch

    thresholds = [_threshold(model, base, density) for model in models]

    def merged(origin: Tensor, *tuned: Tensor) -> Tensor:
        deltas = [
            torch.nn.functional.hardshrink(model - origin, threshold)  # what is not above it is 0
            for model, threshold in zip(tuned, thresholds, strict=True)
        ]
        mass = sum(deltas[1:], deltas[0])
        sign = torch.copysign(torch.ones_like(mass), mass.add(0.0))  # 1 for -0.0, too
        total, count = torch.zeros_like(origin), torch.zeros_like(origin)
        for delta in deltas:
            agreeing = delta.mul_(sign).clamp_(min=0.0)
            total += agreeing
            count += agreeing.sign_()
        mean = total.div_(count.clamp_(min=1.0)).mul_(sign)
        return moved_by(origin, mean.mul_(scale))

    return in_blocks(merged, base, *models)


def _threshold(model: Tensor, base: Tensor, density: float) -> float:
    """What a magnitude has to exceed to be one of the floor(density * n) largest, or tied."""
    import numpy as np

    keep = int(density * base.numel())
    if keep == 0:
        return math.inf
    if keep == base.numel():
        return 0.0
    size = in_blocks(lambda tuned, origin: (tuned - origin).abs_(), model, base).view(-1).numpy()
    size.partition(size.size - keep)
    smallest = size[size.size - keep]
    return float(np.nextafter(smallest, smallest.dtype.type(0.0)))
