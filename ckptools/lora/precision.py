"""The precision adapters are computed in: fp32, or fp64 where something given is fp64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def in_float(parts: Mapping[str, Tensor], *more: Tensor) -> dict[str, Tensor]:
    """The parts in one dtype: fp64 if any of them, or of `more`, is fp64; fp32 otherwise."""
    import torch

    wide = any(t.dtype == torch.float64 for t in (*parts.values(), *more))
    dtype = torch.float64 if wide else torch.float32
    return {part: tensor.to(dtype) for part, tensor in parts.items()}
