"""The compiled kernels, where there are any: what `kernels.c` does, called from Python.

A package that was built without a C compiler has none, and says so with `KERNELS = None`. Knows no
programs and no files.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

from ckptools.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

LIBRARY = "_kernels.so"
_VERSION = 5  # of `kernels.c`
_DTYPES = {"F16": 0, "BF16": 1, "F32": 2, "F64": 3}
_TABLE = 4

LOAD, SCALE, ADD, SUBTRACT = range(4)


class _Read(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
    )


class Step(ctypes.Structure):
    """One operation on the buffer at `depth`: LOAD of a read, SCALE by a factor, ADD or SUBTRACT of
    the next buffer."""

    _fields_ = (
        ("operation", ctypes.c_int32),
        ("depth", ctypes.c_int32),
        ("read", ctypes.c_int32),
        ("factor", ctypes.c_double),
    )


class Formula:
    """Steps as the kernels take them; the result is in buffer 0."""

    def __init__(self, steps: Sequence[Step], dtypes: Sequence[str]) -> None:
        self.steps = (Step * len(steps))(*steps)
        self.dtypes = tuple(dtypes)
        self.depth = 1 + max(step.depth for step in steps)


class Kernels:
    """A loaded library. `portable` leaves the processor's own fp16 conversions alone: for tests."""

    def __init__(self, library: ctypes.CDLL, *, portable: bool = False) -> None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._mix = library.ckptools_mix
        self._mix.restype = integer
        self._mix.argtypes = [
            pointer, integer, pointer, pointer, integer, pointer, integer, integer
        ]  # fmt: skip
        self._memory = library.ckptools_memory
        self._memory.restype, self._memory.argtypes = integer, [integer]
        self._low_rank = library.ckptools_low_rank
        self._low_rank.restype = None
        self._low_rank.argtypes = [
            pointer, pointer, integer, integer, integer, integer, pointer, pointer, integer, integer
        ]  # fmt: skip
        self._low_rank_memory = library.ckptools_low_rank_memory
        self._low_rank_memory.restype, self._low_rank_memory.argtypes = integer, [integer]
        library.ckptools_fuses.restype = integer
        self.fuses = bool(library.ckptools_fuses())
        self._portable = portable

    def memory(self, depth: int) -> NDArray[np.uint8]:
        """What `mix` works in, for formulas of that depth; one for each thread."""
        from ckptools.codec import aligned

        return aligned(self._memory(depth), "u1")

    def mix(
        self,
        formula: Formula,
        inputs: Sequence[NDArray[np.uint8]],
        dtype: str,
        out: NDArray[np.uint8],
        memory: NDArray[np.uint8],
    ) -> bool:
        """Make equally many elements of every input into bytes of `dtype`; whether all are finite.

        inputs  the bytes of the formula's reads
        memory  from `memory`, for this formula's depth or more
        """
        reads = (_Read * len(inputs))()
        count = out.size * 8 // DTYPES[dtype].bits
        for read, data, stored in zip(reads, inputs, formula.dtypes, strict=True):
            read.data = data.ctypes.data
            read.dtype = _DTYPES.get(stored, _TABLE)
            if read.dtype == _TABLE:
                from ckptools.codec import fp8_values

                read.table = fp8_values(stored).ctypes.data
        return bool(
            self._mix(
                formula.steps, len(formula.steps), reads, memory.ctypes.data,
                _DTYPES[dtype], out.ctypes.data, count, self._portable,
            )
        )  # fmt: skip

    def low_rank_memory(self, rank: int) -> NDArray[np.float32]:
        """What `add_low_rank` works in, for factors of that rank; one for each thread."""
        from ckptools.codec import aligned

        return aligned(self._low_rank_memory(rank) // 4, "<f4")

    def add_low_rank(
        self,
        up: NDArray[np.float32],
        down: NDArray[np.float32],
        begin: int,
        out: NDArray[np.float32],
        memory: NDArray[np.float32],
        *,
        onto: bool,
    ) -> None:
        """Elements of up @ down, in row order from `begin` on, into `out` or `onto` what is there.

        up      (rows, rank), fp32, contiguous
        down    (rank, columns), likewise
        memory  from `low_rank_memory`, for this rank or more
        Each is summed in fp32 in order of the rank by fused multiply-adds: the same bits on every
        processor. Where `fuses` says that this one has none, that takes very long.
        """
        rank, columns = down.shape
        if up.shape[1] != rank or begin + out.size > len(up) * columns:
            raise ValueError(f"no {out.size} elements of {up.shape} @ {down.shape} from {begin} on")
        self._low_rank(
            up.ctypes.data, down.ctypes.data, rank, columns, begin, out.size,
            memory.ctypes.data, out.ctypes.data, onto, self._portable,
        )  # fmt: skip


def _load() -> Kernels | None:
    path = Path(__file__).with_name(LIBRARY)
    try:
        library = ctypes.CDLL(str(path))
        version = library.ckptools_version
    except (OSError, AttributeError):  # not built, or for another machine
        return None
    version.restype = ctypes.c_int64
    return Kernels(library) if version() == _VERSION else None


KERNELS = _load()
