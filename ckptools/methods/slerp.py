"""slerp: walk from A to B along the sphere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ckptools.methods import merge_method
from ckptools.methods.blocks import dots, in_blocks

if TYPE_CHECKING:
    from torch import Tensor

NEARLY_PARALLEL = 0.9995


@merge_method(
    access="tensor",
    formula="(|A| (1 - t) + |B| t) * (sin((1 - t) w) A/|A| + sin(t w) B/|B|) / sin(w)",
    source="Shoemake 1985, 'Animating rotation with quaternion curves', over whole tensors; "
    "the length is interpolated linearly, as sd-mecha 1.1 does",
    bounds={"t": (0.0, 1.0)},
    scratch=1,
)
def slerp(a: Tensor, b: Tensor, *, t: float = 0.5) -> Tensor:
    """From A to B along the sphere: direction by angle, length by weighted sum.

    a, b  same shape; w is the angle between them, each taken as one long vector
    t     0 is A, 1 is B, both to the bit
    Tensors that are nearly parallel (|cos w| > 0.9995), opposite, or zero are mixed linearly.
    """
    if t in (0.0, 1.0):
        return a if t == 0.0 else b
    sums = dots(a, b)
    length_a, length_b, product = math.sqrt(sums[0, 0]), math.sqrt(sums[1, 1]), sums[0, 1]
    of_a, of_b = 1.0 - t, t
    size = length_a * length_b
    if size != 0.0 and abs(product / size) <= NEARLY_PARALLEL:
        angle = math.acos(product / size)
        length = length_a * (1.0 - t) + length_b * t
        of_a = length * math.sin((1.0 - t) * angle) / (math.sin(angle) * length_a)
        of_b = length * math.sin(t * angle) / (math.sin(angle) * length_b)
    return in_blocks(lambda x, y: x * of_a + y * of_b, a, b)
