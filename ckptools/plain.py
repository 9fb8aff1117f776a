"""Linear formulas over floats in numpy: what most merges are, without loading torch.

Bit for bit what `evaluation` computes: the same operations in the same precision and order, each
rounded once. Knows programs, no files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ckptools.codec import F16_SCALE, Encoder, aligned, decode, has_nonfinite_f16
from ckptools.program import Compute, Mix
from ckptools.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

BLOCK = 1 << 18  # elements at a time: fewer, and the calls cost more than what caches save

_FOLDED = 2.0**15  # coefficients up to this can be multiplied with `F16_SCALE`


class PlainEvaluator:
    """Runs programs that `is_plain` accepts; one for each thread, as it keeps its memory."""

    def __init__(self) -> None:
        self._encoder = Encoder()
        self._blocks: dict[tuple[int, str], NDArray[Any]] = {}

    def fill(
        self, program: Compute, inputs: Sequence[NDArray[np.uint8]], dtype: str, out: NDArray[Any]
    ) -> bool:
        """Make equally many elements of every input into bytes of the output's dtype.

        inputs  the bytes of the program's reads, in its order
        out     uint8
        Whether all inputs and results are finite; where not, what is in `out` is worth nothing.
        """
        widths = [DTYPES[read.spec.dtype].bits // 8 for read in program.reads]
        width = DTYPES[dtype].bits // 8
        finite = True
        for low in range(0, out.size // width, BLOCK):
            high = min(low + BLOCK, out.size // width)
            block = _Block(
                [data[low * w : high * w] for data, w in zip(inputs, widths, strict=True)],
                [read.spec.dtype for read in program.reads],
                "f4" if program.precision == "F32" else "f8",
            )
            finite &= not any(map(has_nonfinite_f16, block.halves))
            values = self._mix(program.mix, block, 0)
            finite &= self._encoder.encode(values, dtype, out[low * width : high * width])
        return finite

    @np.errstate(over="ignore", under="ignore", invalid="ignore")
    def _mix(self, mix: Mix, block: _Block, depth: int) -> NDArray[Any]:
        """The sum of a mix's terms; alone and with factor 1, a read may be a view of its bytes."""
        (first, node), *rest = mix.terms
        total = self._term(first, node, block, depth, owned=bool(rest))
        for factor, node in rest:
            size = abs(factor) if factor in (1.0, -1.0) else factor
            term = self._term(size, node, block, depth + 1, owned=False)
            if factor == -1.0:
                np.subtract(total, term, out=total)
            else:
                np.add(total, term, out=total)
        return total

    def _term(
        self, factor: float, node: Any, block: _Block, depth: int, *, owned: bool
    ) -> NDArray[Any]:
        """A node times a factor; `owned`: in memory of ours, so that it may be added to."""
        if isinstance(node, Mix):
            values = self._mix(node, block, depth)
        else:
            values, factor = self._read(node, factor, block, depth)
        target = self._memory(depth, block.kind, block.length)
        if factor != 1.0:
            np.multiply(values, values.dtype.type(factor), out=target)
            return target
        if owned and values.base is not target.base:
            np.copyto(target, values)
            return target
        return values

    def _read(
        self, number: int, factor: float, block: _Block, depth: int
    ) -> tuple[NDArray[Any], float]:
        """A read's values, and what of the factor they have not been multiplied with."""
        data, dtype = block.data[number], block.dtypes[number]
        target = self._memory(depth, block.kind, block.length)
        if block.kind == "f4" and dtype != "F64":
            if dtype == "F16" and abs(factor) < _FOLDED:
                return decode(data, dtype, target, np.float32(factor) * F16_SCALE), 1.0
            return decode(data, dtype, target), factor
        if dtype == "F64" or block.kind == "f4":
            return decode(data, dtype, target), factor
        narrow = decode(data, dtype, self._memory(-1, "f4", block.length))
        np.copyto(target, narrow)
        return target, factor

    def _memory(self, depth: int, kind: str, length: int) -> NDArray[Any]:
        found = self._blocks.get((depth, kind))
        if found is None:
            found = self._blocks[depth, kind] = aligned(BLOCK, kind)
        return found[:length]


class _Block:
    """The bytes of some elements of every read; fp16's are looked at before they are decoded."""

    def __init__(self, data: Sequence[NDArray[np.uint8]], dtypes: Sequence[str], kind: str) -> None:
        self.data, self.dtypes, self.kind = data, dtypes, kind
        self.length = data[0].size * 8 // DTYPES[dtypes[0]].bits

    @property
    def halves(self) -> list[NDArray[np.uint8]]:
        """The reads that are fp16, whose NaN and Inf `decode` turns into numbers."""
        return [x for x, dtype in zip(self.data, self.dtypes, strict=True) if dtype == "F16"]
