"""ties: add several models' task vectors without letting them cancel each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptools.methods import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    access="tensor",
    formula="base + scale * mean of the trimmed deltas that agree with the elected sign",
    source="Yadav et al. 2023, arXiv 2306.01708, algorithm 1; sign by total mass, mean by count, "
    "as PEFT's `merge_utils.ties`",
    bounds={"density": (0.0, 1.0)},
    minimum=2,
    scratch=5,
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

    mass = torch.zeros_like(base)
    thresholds = []
    for model in models:
        delta = model - base
        thresholds.append(_threshold(delta, density))
        mass += _trimmed(delta, thresholds[-1])
    plus = mass >= 0.0
    total, count = mass.zero_(), torch.zeros_like(base)
    for model, threshold in zip(models, thresholds, strict=True):
        delta = _trimmed(model - base, threshold)
        delta.masked_fill_(torch.where(plus, delta <= 0.0, delta >= 0.0), 0.0)
        total += delta
        count += delta != 0.0
        del delta  # before the next one is made
    moved = total.div_(count.clamp_(min=1.0)).mul_(scale)
    return torch.where(moved == 0.0, base, base + moved)  # -0.0 + 0.0 would be 0.0


def _threshold(delta: Tensor, density: float) -> float | None:
    """The smallest of the floor(density * n) largest magnitudes; None where none is kept."""
    keep = int(density * delta.numel())
    if keep == 0:
        return None
    if keep == delta.numel():
        return 0.0
    size = delta.abs().reshape(-1).numpy()
    size.partition(size.size - keep)
    return float(size[size.size - keep])


def _trimmed(delta: Tensor, threshold: float | None) -> Tensor:
    """`delta` with all magnitudes below the threshold set to zero, in place."""
    if threshold is None:
        return delta.zero_()
    return delta.masked_fill_(delta.abs() < threshold, 0.0)
