"""Linear formulas over floats by the compiled kernels: what most merges are, without loading torch.

Bit for bit what `evaluation` computes: the same operations in the same precision and order, each
rounded once. Knows programs, no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from ckptools.native import ADD, KERNELS, LOAD, SCALE, SUBTRACT, Formula, Kernels, Step
from ckptools.program import Compute, Copy, Mix, PositionIds, Program, applied_in, baked_in

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_STORED = frozenset({"F16", "BF16", "F32", "F64"})


def is_plain(program: Program, dtype: str) -> bool:
    """Whether a program that makes a tensor of this dtype is run without torch."""
    match program:
        case Copy() | PositionIds():
            return True
        case Compute(whole=False, deltas=(), mix=mix, reads=reads, precision="F64"):
            return (
                KERNELS is not None
                and dtype in _STORED
                and all(read.spec.is_float for read in reads)
                and not any(True for _ in (*applied_in(mix), *baked_in(mix)))
            )
    return False


def needs_torch(programs: Iterable[tuple[Program, str]]) -> bool:
    """Whether any of the programs, each with the dtype that it makes, is not plain."""
    return not all(is_plain(program, dtype) for program, dtype in programs)


class PlainEvaluator:
    """Runs programs that are plain and compute something; one for each thread."""

    def __init__(self) -> None:
        self._memory: dict[int, NDArray[np.uint8]] = {}

    def fill(
        self,
        program: Compute,
        inputs: Sequence[NDArray[np.uint8]],
        dtype: str,
        out: NDArray[np.uint8],
    ) -> bool:
        """Make equally many elements of every input into bytes of `dtype`; whether all are finite.

        inputs  the bytes of the program's reads, in its order
        A NaN or Inf of an input is one of the result, too.
        """
        kernels, formula = _kernels(), _formula(program)
        memory = self._memory.get(formula.depth)
        if memory is None:
            memory = self._memory[formula.depth] = kernels.memory(formula.depth)
        return kernels.mix(formula, inputs, dtype, out, memory)


def _kernels() -> Kernels:
    if KERNELS is None:
        raise RuntimeError("without kernels nothing that computes is plain")
    return KERNELS


@lru_cache(maxsize=256)
def _formula(program: Compute) -> Formula:
    dtypes = [read.spec.dtype for read in program.reads]
    return Formula([*_steps(program.mix, 0)], dtypes)


def _steps(mix: Mix, depth: int) -> Iterator[Step]:
    """What leaves a mix's value in the buffer at `depth`, in the order that `evaluation` keeps."""
    for position, (factor, node) in enumerate(mix.terms):
        at = depth if position == 0 else depth + 1
        if isinstance(node, Mix):
            yield from _steps(node, at)
        elif isinstance(node, int):
            yield Step(LOAD, at, read=node)
        else:
            raise TypeError("methods and adapters are not plain")
        is_subtracted = position > 0 and factor == -1.0
        if factor != 1.0 and not is_subtracted:
            yield Step(SCALE, at, factor=factor)
        if position > 0:
            yield Step(SUBTRACT if is_subtracted else ADD, depth)
