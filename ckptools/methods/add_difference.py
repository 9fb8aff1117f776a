"""add_difference: bring into A what B learned since C."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptools.methods import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method(
    access="linear",
    formula="A + (B - C) * multiplier",
    source="AUTOMATIC1111 web UI, checkpoint merger, 'Add difference'; "
    "task arithmetic: Ilharco et al. 2022, arXiv 2212.04089",
)
def add_difference(a: Tensor, b: Tensor, c: Tensor, *, multiplier: float = 1.0) -> Tensor:
    """Model A plus what B learned since C, in the degree of the multiplier.

    a, b, c     same shape; where b equals c the result is a, to the bit
    multiplier  0 is A; 1 adds the whole difference
    """
    return a + (b - c) * multiplier
