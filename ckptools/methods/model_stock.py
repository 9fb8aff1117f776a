"""model_stock: average fine-tunes, pulled towards their base by how much they disagree."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING

from ckptools.methods import merge_method
from ckptools.methods.blocks import dots, in_blocks

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    access="tensor",
    formula="t * mean(models) + (1 - t) * base, t = n c / (1 + (n - 1) c)",
    source="Jang et al. 2024, arXiv 2403.19522, equations 6 and 7",
    minimum=2,
    scratch=1,
)
def model_stock(*models: Tensor, base: Tensor) -> Tensor:
    """The mean of fine-tunes of one base, as near to the base as their angles say.

    models, base  same shape; c is the mean cosine between the task vectors models - base
    Where the task vectors point apart on average (c <= 0) the result is the base.
    """
    count = len(models)
    sums = dots(*models, base=base)
    cosines = []
    for i, j in combinations(range(count), 2):
        size = math.sqrt(sums[i, i] * sums[j, j])
        cosines.append(sums[i, j] / size if size != 0.0 else 0.0)
    cosine = sum(cosines) / len(cosines)
    if cosine <= 0.0:
        return base
    ratio = count * cosine / (1.0 + (count - 1) * cosine)  # NaN where a model holds one

    def moved(origin: Tensor, *tuned: Tensor) -> Tensor:
        total = tuned[0] - origin
        for model in tuned[1:]:
            total += model - origin
        return origin + total * (ratio / count)

    return in_blocks(moved, base, *models)
