"""What methods share: whole tensors a block at a time, and the last addition.

In blocks, what is made on the way stays in the cache: of large tensors every temporary is fresh
memory, and takes longer to come by than to fill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 16
_SUMMED = 1 << 18  # elements of a dot product at a time: a fixed number, for the same bits


def in_blocks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` of the tensors' blocks, put together: for what it does element by element.

    tensors  of one shape and dtype, which are the result's; `function` gets flat parts of them
    """
    import torch

    result = torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
    room = result.view(-1)
    for part, *blocks in _cut((room, *tensors), _BLOCK):
        part.copy_(function(*blocks))
    return result


def moved_by(start: Tensor, change: Tensor) -> Tensor:
    """`start + change`, and `start` to the bit where the change is zero. It uses `change` up.

    -0.0 + 0.0 would be 0.0; -0.0 - 0.0 is -0.0.
    """
    return start - change.neg_().add_(0.0)


def dots(*tensors: Tensor, base: Tensor | None = None) -> dict[tuple[int, int], float]:
    """The sum of a * b over all elements for each of the tensors and every two, in float64.

    tensors  of one shape, any float dtype
    base     where there is one, it is taken from each of them
    Returns that of the i-th and the j-th as [i, j], where i <= j.
    """
    import torch

    pairs = [*combinations_with_replacement(range(len(tensors)), 2)]
    sums = dict.fromkeys(pairs, 0.0)
    for *blocks, origin in _cut((*tensors, tensors[0] if base is None else base), _SUMMED):
        wide = [(block if base is None else block - origin).double() for block in blocks]
        for i, j in pairs:
            sums[i, j] += float(torch.dot(wide[i], wide[j]))
    return sums


def _cut(tensors: tuple[Tensor, ...], size: int) -> Iterator[list[Tensor]]:
    """Flat parts of so many elements, of all tensors alike."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for begin in range(0, flat[0].numel(), size):
        yield [tensor[begin : begin + size] for tensor in flat]
