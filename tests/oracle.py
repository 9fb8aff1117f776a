"""What a merge should be, worked out the long way: every sum in wide floats, one rounding.

numpy only. The rounding is done on integers for every format alike, so it shares nothing with
torch's casts. Used by the tests and by `benchmarks/exactness.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WIDE = np.longdouble  # 64 bits of mantissa on x86; float64 where there is nothing wider


@dataclass(frozen=True)
class Format:
    """A binary float format.

    mantissa   stored bits of the fraction
    lowest     exponent of the smallest normal number
    largest    largest finite value
    nbytes     width in a file
    """

    mantissa: int
    lowest: int
    largest: float
    nbytes: int


FORMATS = {
    "F64": Format(52, -1022, float(np.finfo(np.float64).max), 8),
    "F32": Format(23, -126, float(np.finfo(np.float32).max), 4),
    "F16": Format(10, -14, 65504.0, 2),
    "BF16": Format(7, -126, (2 - 2.0**-7) * 2.0**127, 2),
    "F8_E4M3": Format(3, -6, 448.0, 1),
    "F8_E5M2": Format(2, -14, 57344.0, 1),
}


def decoded(data: bytes | memoryview, dtype: str) -> NDArray[np.float64]:
    """The values of stored floats, exactly."""
    if dtype in ("F16", "F32", "F64"):
        kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
        return np.frombuffer(data, kind).astype(np.float64)
    if dtype == "BF16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    return _small_floats(dtype)[np.frombuffer(data, np.uint8)]


def _small_floats(dtype: str) -> NDArray[np.float64]:
    """The values of all 256 bytes of an fp8 format. Source: Micikevicius et al. 2022, table 1."""
    form = FORMATS[dtype]
    table = np.empty(256)
    for byte in range(256):
        sign = -1.0 if byte & 0x80 else 1.0
        exponent, fraction = (byte & 0x7F) >> form.mantissa, byte & ((1 << form.mantissa) - 1)
        if exponent == 0:
            size = fraction * 2.0 ** (form.lowest - form.mantissa)
        else:
            size = (1 + fraction / 2**form.mantissa) * 2.0 ** (form.lowest + exponent - 1)
        if dtype == "F8_E4M3" and byte & 0x7F == 0x7F:
            size = np.nan
        if dtype == "F8_E5M2" and byte & 0x7C == 0x7C:
            size = np.nan if fraction else np.inf
        table[byte] = sign * size
    return table


def unit(values: NDArray[np.floating], dtype: str) -> NDArray[np.float64]:
    """The distance between neighbours of a format around each value."""
    form = FORMATS[dtype]
    _, exponent = np.frexp(values)  # size in [2^(exponent - 1), 2^exponent)
    return np.ldexp(1.0, np.maximum(exponent - 1, form.lowest) - form.mantissa)


def rounded(values: NDArray[np.floating], dtype: str) -> NDArray[np.float64]:
    """The nearest number of a format, ties to even, in a single rounding; Inf beyond its range."""
    form = FORMATS[dtype]
    step = unit(values, dtype).astype(values.dtype)
    near = (np.rint(values / step) * step).astype(np.float64)  # powers of two: exact but for rint
    return np.where(np.abs(near) > form.largest, np.copysign(np.inf, near), near)


# A coefficient such as 0.7 is known to 2^-53 of itself. Where the sum lies that near to the middle
# between two neighbours, both are right: with such decimals every thirtieth fp16 sum does.
SLACK = 2.0**-50
CANCELLED = 16  # a result this much smaller than its largest term has lost bits to cancellation


@dataclass(frozen=True)
class Exactness:
    """How near results are to the exact sums.

    count      values compared
    wrong      values that are not the nearest number of their format
    units      largest error in units in the last place (0.5: correctly rounded), among values that
               are not small beside their largest term
    relative   largest error beyond half a unit, as a share of the largest term, among all
    """

    count: int
    wrong: int
    units: float
    relative: float

    @property
    def share(self) -> float:
        """The share of correctly rounded values."""
        return 1 - self.wrong / self.count if self.count else 1.0

    def joined(self, other: Exactness) -> Exactness:
        """Both together."""
        return Exactness(
            self.count + other.count,
            self.wrong + other.wrong,
            max(self.units, other.units),
            max(self.relative, other.relative),
        )


NOTHING_COMPARED = Exactness(0, 0, 0.0, 0.0)


def weighted(
    terms: Sequence[tuple[float, NDArray[np.float64]]], wide: type[np.floating] = WIDE
) -> tuple[NDArray[np.floating], NDArray[np.float64]]:
    """(the weighted sum, the size of its largest term) of each element."""
    total = np.zeros(terms[0][1].shape, wide)
    largest = np.zeros(terms[0][1].shape)
    for factor, values in terms:
        term = wide(factor) * values.astype(wide)
        total += term
        largest = np.maximum(largest, np.abs(term).astype(np.float64))
    return total, largest


def compare(
    found: NDArray[np.float64],
    exact: NDArray[np.floating],
    largest: NDArray[np.float64],
    dtype: str,
) -> Exactness:
    """Results against exact sums; `largest` is each sum's largest term."""
    step = unit(rounded(exact, dtype), dtype)
    off = np.abs((found - exact).astype(np.float64))
    beyond = np.maximum(off - step / 2, 0.0) / np.maximum(largest, np.finfo(np.float64).tiny)
    plain = np.abs(exact) * CANCELLED >= largest
    return Exactness(
        count=found.size,
        wrong=int(np.count_nonzero(~(beyond <= SLACK))),
        units=float((off[plain] / step[plain]).max(initial=0.0)),
        relative=float(beyond.max(initial=0.0)),
    )
