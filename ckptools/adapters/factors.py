"""Low-rank factors of matrices: singular values, exact or randomised. Pure; knows no files."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptools.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_RANK = 32
_EXACT_SIZE = 256
_OVERSAMPLE = 16
_POWER_ITERATIONS = 4


@dataclass(frozen=True)
class Budget:
    """How much of a matrix to keep: a rank, or a share of its squared norm. One of them.

    rank    at most this many singular values
    energy  as many as hold this share of the sum of their squares, 0 < energy <= 1
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise UsageError("give either a rank or an energy", fix="--rank 32, or --energy 0.95")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"the rank is {self.rank}; it must be 1 or more")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise UsageError(f"the energy is {self.energy:g}; it must be above 0 and at most 1")

    def count(self, singular: Tensor, total: float) -> int | None:
        """How many of the singular values to keep; None where there are not enough of them.

        singular  the largest ones, fp64
        total     sum of the squares of all of them
        """
        if self.rank is not None:
            return min(self.rank, len(singular))
        held = singular.square().cumsum(0)
        wanted = (self.energy or 1.0) * total
        short = int((held < wanted).sum())
        return short + 1 if short < len(singular) else None


def decompose(matrix: Tensor, budget: Budget, *, name: str) -> tuple[Tensor, Tensor]:
    """(up, down) whose product is the best approximation of a matrix within the budget.

    matrix  (rows, columns), fp32 or fp64
    name    seeds the randomised method, which is used where the matrix is large and the rank small
    up = U * sqrt(S), (rows, rank); down = sqrt(S) * Vᵀ, (rank, columns): both of one size, so
    that neither underflows in fp16.
    Source: Eckart and Young 1936; Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4
    """
    import torch

    smaller = min(matrix.shape)
    total = float(matrix.double().square().sum())
    size = (budget.rank or _OVERSAMPLE * 2) + max(_OVERSAMPLE, (budget.rank or 0) // 2)
    while smaller >= _EXACT_SIZE and size * 4 <= smaller:
        u, s, v = _randomised(matrix, size, zlib.crc32(name.encode()))
        keep = budget.count(s.double(), total)
        # values near the end of a sketch are too small: trust all but the oversampled ones
        if keep is not None and keep <= size - min(_OVERSAMPLE, size // 3):
            return _split(u, s, v, keep)
        size *= 2
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return _split(u, s, v, budget.count(s.double(), total) or smaller)


def recompress(up: Tensor, down: Tensor, budget: Budget) -> tuple[Tensor, Tensor]:
    """(up, down) of a smaller rank, from factors, without their product; exact, in fp64.

    up (rows, rank), down (rank, columns). With up = Q₁R₁ and downᵀ = Q₂R₂ the product is
    Q₁ (R₁R₂ᵀ) Q₂ᵀ, and the singular values are those of the small matrix in the middle.
    """
    import torch

    q1, r1 = torch.linalg.qr(up.double())
    q2, r2 = torch.linalg.qr(down.double().T)
    u, s, v = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    keep = budget.count(s, float(s.square().sum())) or len(s)
    return _split(q1 @ u, s, v @ q2.T, max(1, keep))


def product_norm(up: Tensor, down: Tensor) -> float:
    """The Frobenius norm of up @ down, from the factors alone, in fp64.

    Factors in QR form, not a trace of Gram matrices: a difference of near-equal products, written
    as one product of twice the rank, would cancel there.
    """
    import torch

    r1 = torch.linalg.qr(up.double(), mode="r").R
    r2 = torch.linalg.qr(down.double().T, mode="r").R
    return float(torch.linalg.matrix_norm(r1 @ r2.T))


def difference_norm(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """‖up₁ down₁ - up₂ down₂‖, from the factors alone, in fp64."""
    import torch

    up = torch.cat([one[0].double(), -other[0].double()], dim=1)
    down = torch.cat([one[1].double(), other[1].double()], dim=0)
    return product_norm(up, down)


def _randomised(matrix: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(matrix.shape[1], size, generator=generator, dtype=matrix.dtype)
    q = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(_POWER_ITERATIONS):
        q = torch.linalg.qr(matrix.T @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    u, s, v = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u, s, v


def _split(u: Tensor, s: Tensor, v: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    root = s[:keep].sqrt()
    return u[:, :keep] * root, root[:, None] * v[:keep]
