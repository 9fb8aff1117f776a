"""Stored bytes as numbers and back, in numpy: what measuring and linear merges take, without torch.

Knows dtypes, nothing of models.

fp16 is converted by integer arithmetic on whole arrays: numpy's own conversion takes one value at
a time, ten times as long.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_LINE_BYTES = 64


def aligned(size: int, dtype: str) -> NDArray[Any]:
    """An empty array that starts where a line of the cache does: a third faster in AVX-512."""
    room = np.empty(size * np.dtype(dtype).itemsize + _LINE_BYTES, np.uint8)
    skipped = -room.__array_interface__["data"][0] % _LINE_BYTES
    return room[skipped : room.size - _LINE_BYTES + skipped].view(dtype)


# --- decoding ----------------------------------------------------------------------------------

PLAIN = {
    "F64": "<f8", "F32": "<f4", "I8": "i1", "U8": "u1", "BOOL": "u1", "I16": "<i2", "U16": "<u2",
    "I32": "<i4", "U32": "<u4", "I64": "<i8", "U64": "<u8",
}  # fmt: skip
# (exponent bits, bias, whether it ends in Inf, whether NaN is the negative zero alone)
_FP8 = {
    "F8_E5M2": (5, 15, True, False),
    "F8_E4M3": (4, 7, False, False),
    "F8_E5M2FNUZ": (5, 16, False, True),
    "F8_E4M3FNUZ": (4, 8, False, True),
}
F16_SCALE = np.float32(2.0**112)  # between the exponent biases 15 and 127
_F16_BITS = np.int32(-0x7000_2000)  # 0x8FFFE000: sign, and the rest 13 places up


@np.errstate(invalid="ignore")  # a signalling NaN is converted like any other
def decode(
    data: NDArray[np.uint8], dtype: str, out: NDArray[Any], f16_scale: np.float32 = F16_SCALE
) -> NDArray[Any]:
    """Stored bytes as numbers, in `out` or, where they are stored so, as a view of `data`.

    out        fp32 or fp64, as long as there are elements. F16 in fp32 is converted by integer
               arithmetic: its Inf and NaN become finite, at least 65536 in size; `decode` into
               fp64 keeps them
    f16_scale  `F16_SCALE` times what F16 values are to be multiplied with on the way to fp32:
               exact but for the one rounding of that product
    """
    if dtype == "F16":
        if out.dtype != np.float32:
            np.copyto(out, data.view("<f2"))
            return out
        bits = out.view(np.int32)
        np.copyto(bits, data.view("<i2"))  # the sign spreads over the upper half
        np.left_shift(bits, 13, out=bits)
        np.bitwise_and(bits, _F16_BITS, out=bits)
        np.multiply(out, f16_scale, out=out)
        return out
    if dtype == "BF16":
        wide = out if out.dtype == np.float32 else np.empty(out.size, np.float32)
        bits = wide.view(np.uint32)
        np.copyto(bits, data.view("<u2"))
        np.left_shift(bits, 16, out=bits)
        if wide is not out:
            np.copyto(out, wide)
        return out
    if dtype in _FP8:
        np.take(fp8_values(dtype).astype(out.dtype), data, out=out, mode="clip")
        return out
    stored = data.view(PLAIN[dtype])
    if stored.dtype == out.dtype:
        return stored
    np.copyto(out, stored, casting="unsafe")
    return out


@cache
def fp8_values(dtype: str) -> NDArray[np.float32]:
    """The 256 values of an 8-bit float, by their bits.

    Source: Micikevicius et al. 2022, arXiv 2209.05433, table 1; for FNUZ Noune et al. 2022,
    arXiv 2206.02915.
    """
    exponent_bits, bias, has_inf, is_fnuz = _FP8[dtype]
    mantissa_bits = 7 - exponent_bits
    top = (1 << exponent_bits) - 1
    values = np.empty(256, np.float32)
    for bits in range(128):
        exponent, mantissa = bits >> mantissa_bits, bits & (1 << mantissa_bits) - 1
        lead = (1 << mantissa_bits) if exponent else 0
        size = math.ldexp(lead + mantissa, max(exponent, 1) - bias - mantissa_bits)
        if has_inf and exponent == top:
            size = math.nan if mantissa else math.inf
        elif not has_inf and not is_fnuz and bits == 127:
            size = math.nan
        values[bits], values[bits + 128] = size, -size
    if is_fnuz:
        values[128] = math.nan
    return values


# --- encoding ----------------------------------------------------------------------------------

_EXPONENT = np.int32(0x7F80_0000)
_F16_LOWEST = np.int32((127 - 14) << 23)  # of a normal number; smaller ones share its last place
_F16_ROUNDER = np.int32((13 << 23) + 0x40_0000)  # 1.5 * 2^13 as what is added to an exponent
_F16_SAFE = (127 + 15) << 23  # below 32768 nothing can round to Inf
_F16_DOWN = np.float32(2.0**-112)
_F16_SIGN = np.int32(0x8000)


class Encoder:
    """Rounds numbers to stored dtypes, to nearest, ties to even; keeps the memory that takes.

    One for each thread. fp16's last place is found by adding, and subtracting again, 1.5 times the
    number whose own last place that is, as in Dekker 1971, "A floating-point technique for
    extending the available precision", section 5.
    """

    def __init__(self) -> None:
        self._memory: dict[str, NDArray[Any]] = {}

    def encode(self, values: NDArray[Any], dtype: str, out: NDArray[np.uint8]) -> bool:
        """Store values; whether all are finite as they are stored.

        values  fp32 or fp64, of one dimension; fp64 is rounded to fp32 first where `dtype` is
                narrower than that, as torch does
        dtype   "F16", "BF16", "F32" or "F64"
        out     as many bytes as that takes
        """
        if dtype in ("F32", "F64"):
            stored = out.view(PLAIN[dtype])
            with np.errstate(over="ignore", invalid="ignore"):
                np.copyto(stored, values, casting="same_kind")
            return not count_nonfinite(out, dtype)
        if values.dtype != np.float32:
            with np.errstate(over="ignore", invalid="ignore"):
                narrow = self._block("narrow", "f4", values.size)
                np.copyto(narrow, values, casting="same_kind")
            values = narrow
        if dtype == "BF16":
            return self._encode_bf16(values, out)
        return self._encode_f16(values, out)

    def _block(self, use: str, dtype: str, length: int) -> NDArray[Any]:
        """Memory for one use; contents undefined."""
        found = self._memory.get(use)
        if found is None or found.size < length:
            found = self._memory[use] = aligned(length, dtype)
        return found[:length]

    def _encode_bf16(self, values: NDArray[np.float32], out: NDArray[np.uint8]) -> bool:
        bits, kept = values.view(np.int32), self._block("bits", "i4", values.size)
        np.right_shift(bits, 16, out=kept)
        np.bitwise_and(kept, 1, out=kept)
        np.add(kept, 0x7FFF, out=kept)
        np.add(kept, bits, out=kept)  # a NaN of all ones would wrap; it is found below as it is
        np.right_shift(kept, 16, out=kept)
        np.copyto(out.view("<i2"), kept, casting="unsafe")
        if not count_nonfinite(out, "BF16") and np.isfinite(values.max(initial=0)):
            return True
        nan = np.isnan(values)
        out.view("<u2")[nan] = 0x7FC0
        return False

    def _encode_f16(self, values: NDArray[np.float32], out: NDArray[np.uint8]) -> bool:
        size, bits = values.size, values.view(np.int32)
        spare, kept = (self._block(use, "i4", size) for use in ("spare", "bits"))
        np.bitwise_and(bits, _EXPONENT, out=spare)
        if spare.max(initial=0) >= _F16_SAFE:  # perhaps too large, Inf or NaN: rare
            with np.errstate(over="ignore", invalid="ignore"):
                np.copyto(out.view("<f2"), values, casting="same_kind")
            return not count_nonfinite(out, "F16")
        np.maximum(spare, self._lowest(size), out=spare)
        np.add(spare, _F16_ROUNDER, out=spare)
        rounder, rounded = spare.view(np.float32), kept.view(np.float32)
        np.add(values, rounder, out=rounded)
        np.subtract(rounded, rounder, out=rounded)
        np.multiply(rounded, _F16_DOWN, out=rounded)  # exact: fp16's exponents and small numbers
        np.right_shift(kept, 13, out=kept)
        np.right_shift(bits, 16, out=spare)
        np.bitwise_and(spare, _F16_SIGN, out=spare)
        np.bitwise_or(kept, spare, out=kept)
        np.copyto(out.view("<i2"), kept, casting="unsafe")
        return True

    def _lowest(self, length: int) -> NDArray[np.int32]:
        """An array of `_F16_LOWEST`: numpy compares with one faster than with a number."""
        found = self._memory.get("lowest")
        if found is None or found.size < length:
            found = self._memory["lowest"] = aligned(length, "i4")
            found[:] = _F16_LOWEST
        return found[:length]


# --- finite or not -----------------------------------------------------------------------------

# the integers that hold the bits, mask of exponent (or of all but the sign), first non-finite one
_FINITE_BITS: Mapping[str, tuple[str, int, int]] = {
    "F64": ("<i8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": ("<i4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": ("<i2", 0x7FFF, 0x7C00),
    "BF16": ("<i2", 0x7FFF, 0x7F80),
    "F8_E5M2": ("u1", 0x7F, 0x7C),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F8_E4M3FNUZ": ("u1", 0xFF, 0x80),
    "F8_E5M2FNUZ": ("u1", 0xFF, 0x80),
}
_COUNTED = 1 << 15  # elements at a time: what they take comes from memory used before


def count_nonfinite(data: NDArray[np.uint8], dtype: str) -> int:
    """How many values of a float tensor are NaN or Inf; exact, by their bits, in blocks."""
    integer, mask, limit = _FINITE_BITS[dtype]
    values = data.view(integer)
    exact = dtype.endswith("FNUZ")  # one NaN pattern, the negative zero
    scratch = np.empty(min(_COUNTED, values.size), integer)
    count = 0
    for begin in range(0, values.size, _COUNTED):
        block = values[begin : begin + _COUNTED]
        bits = np.bitwise_and(block, mask, out=scratch[: block.size])
        if exact:
            count += int(np.count_nonzero(bits == limit))
        elif int(bits.max()) >= limit:
            count += int(np.count_nonzero(bits >= limit))
    return count


def has_nonfinite_f16(data: NDArray[np.uint8]) -> bool:
    """Whether fp16 bytes hold a NaN or an Inf: half the work of counting them.

    As signed numbers the positive ones are the largest of all, as unsigned ones the negative.
    """
    if not data.size:
        return False
    return bool(data.view("<i2").max() >= 0x7C00 or data.view("<u2").max() >= 0xFC00)
