"""dare: drop most of each task vector at random, scale up what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptools.methods import Random, merge_method
from ckptools.methods.blocks import moved_by

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    access="elementwise",
    formula="base + scale * sum of mask * (model - base) / density",
    source="Yu et al. 2023, arXiv 2311.03099, equations 2 and 3 (rescaled by 1 / density, as in "
    "the paper and PEFT; mergekit rescales by an empirical ratio)",
    bounds={"density": (1e-6, 1.0)},
    doubles=True,
)
def dare(
    *models: Tensor, base: Tensor, density: float = 0.5, scale: float = 1.0, rng: Random
) -> Tensor:
    """Keep each element of each task vector with probability `density`, rescale, and add.

    models, base  same shape; the task vectors are models - base, and they are summed
    density       probability that an element is kept; kept ones are divided by it
    scale         factor on the sum
    The recipe's `seed` fixes the masks; each model draws its own, by its place in the call, so that
    two calls in one formula draw the same.
    """
    import torch

    total = torch.zeros_like(base)
    for stream, model in enumerate(models):
        kept = rng.uniform(stream) < density
        total += (model - base).mul_(kept).div_(density)
    return moved_by(base, total.mul_(scale))
