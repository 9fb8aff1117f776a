"""What LoRAs add to a tensor, by the compiled kernels: scale * up @ down, without loading torch.

The sums run in an order of their own, which torch's products leave to the processor: the bits are
the same on every machine whose processor fuses. Knows programs and how to read, no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ckptools.codec import aligned
from ckptools.native import LOAD, Formula, Kernels, Step
from ckptools.program import Change, Compute, Read
from ckptools.tensors import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Reader = Callable[[Read, int, memoryview], None]  # a tensor's bytes from an element on


@dataclass(frozen=True)
class _Factors:
    """A change's factors in fp32: scale * up (rows, rank) and down (rank, columns)."""

    up: NDArray[np.float32]
    down: NDArray[np.float32]


class LowRank:
    """Computes the deltas of plain programs; one for each thread.

    Keeps what it read for the tensor that was worked on last: its spans share it.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._spec: TensorSpec | None = None
        self._factors: dict[tuple[int, int], _Factors] = {}
        self._rank, self._memory = 0, kernels.low_rank_memory(0)

    def deltas(
        self, spec: TensorSpec, program: Compute, begin: int, count: int, read: Reader
    ) -> list[NDArray[np.uint8]]:
        """What each of a program's deltas adds to `count` elements from `begin` on: fp32, as bytes.

        spec  of the tensor that the program makes
        """
        if self._spec is not spec:
            self._spec, self._factors = spec, {}
        rows = spec.shape[0] if spec.shape else 1
        columns = spec.numel // max(rows, 1)
        made = []
        for delta, changes in enumerate(program.deltas):
            total = np.empty(count, np.float32)
            is_set = False  # whether all of it has values
            for number, change in enumerate(changes):
                top, bottom = change.target.rows or (0, rows)
                low, high = max(begin, top * columns), min(begin + count, bottom * columns)
                if low >= high:
                    continue
                if not is_set and high - low < count:
                    total[:], is_set = -0.0, True
                factors = self._factors.get((delta, number))
                if factors is None:
                    factors = self._factors[delta, number] = self._read(change, read)
                first = change.target.part[0] if change.target.part else 0
                self._add(
                    factors, low + (first - top) * columns, total[low - begin : high - begin],
                    onto=is_set,
                )  # fmt: skip
                is_set = True
            if not is_set:
                total[:] = -0.0  # which leaves what it is added to as it is, zeros included
            made.append(total.view(np.uint8))
        return made

    def _add(self, factors: _Factors, begin: int, out: NDArray[np.float32], *, onto: bool) -> None:
        rank = len(factors.down)
        if rank > self._rank:
            self._rank, self._memory = rank, self._kernels.low_rank_memory(rank)
        self._kernels.add_low_rank(factors.up, factors.down, begin, out, self._memory, onto=onto)

    def _read(self, change: Change, read: Reader) -> _Factors:
        parts = dict(change.parts)
        up, down = (self._matrix(parts[part], read) for part in ("up", "down"))
        up *= np.float32(change.scale)
        return _Factors(up, down)

    def _matrix(self, stored: Read, read: Reader) -> NDArray[np.float32]:
        """A tensor's values in fp32, all but the first of its dimensions as one."""
        data = aligned(stored.spec.nbytes, "u1")
        read(stored, 0, data.data)
        values = aligned(stored.spec.numel, "<f4")
        as_stored = Formula([Step(LOAD, 0, read=0)], [stored.spec.dtype])
        memory = self._kernels.memory(as_stored.depth)
        self._kernels.mix(as_stored, [data], "F32", values.view(np.uint8), memory)
        rows, *columns = stored.spec.shape
        return values.reshape(rows, math.prod(columns))
