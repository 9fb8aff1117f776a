"""n_average: the mean of any number of models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptools.methods import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    access="linear",
    formula="(A + B + … ) / n",
    source="uniform soup: Wortsman et al. 2022, arXiv 2203.05482",
    minimum=2,
)
def n_average(*models: Tensor) -> Tensor:
    """The plain mean of two or more models (a "uniform soup").

    models  same shape
    """
    total = models[0]
    for model in models[1:]:
        total = total + model
    return total / len(models)
