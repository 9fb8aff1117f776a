"""Linear formulas over floats by the compiled kernels: what most merges are, without loading torch.

Bit for bit what `evaluation` computes: the same operations in the same precision and order, each
rounded once. Knows programs, no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from ckptools.native import ADD, KERNELS, LOAD, SCALE, SUBTRACT, Formula, Kernels, Step
from ckptools.program import Change, Compute, Copy, Mix, PositionIds, Program

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_STORED = frozenset({"F16", "BF16", "F32", "F64"})


def is_plain(program: Program, dtype: str) -> bool:
    """Whether a program that makes a tensor of this dtype is run without torch."""
    match program:
        case Copy() | PositionIds():
            return True
        case Compute(deltas=()):
            return mixes_plainly(program, dtype)
        case Compute(deltas=deltas, precision="F32"):
            changes = (change for delta in deltas for change in delta)
            return (
                mixes_plainly(program, dtype)
                and plain_kernels().fuses
                and all(map(_is_low_rank, changes))
            )
    return False


def mixes_plainly(program: Compute, dtype: str) -> bool:
    """Whether the kernels make a program's sums, once what its adapters add is there."""
    return (
        KERNELS is not None
        and program.is_linear
        and not program.whole
        and dtype in _STORED
        and all(read.spec.is_float for read in program.reads)
    )


def _is_low_rank(change: Change) -> bool:
    """Whether a change is scale * up @ down: a LoRA's, of linear layers and convolutions."""
    parts = dict(change.parts)
    return (
        change.module.kind == "lora"
        and parts.keys() - {"alpha"} == {"up", "down"}  # alpha is in the change's scale
        and parts["up"].spec.is_float
        and parts["down"].spec.is_float
    )


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

        inputs  the bytes of the program's reads, in its order, and of its deltas
        A NaN or Inf of an input is one of the result, too.
        """
        dtypes = (
            *(read.spec.dtype for read in program.reads),
            *[program.precision] * len(program.deltas),
        )
        kernels, formula = plain_kernels(), _formula(program.mix, dtypes)
        memory = self._memory.get(formula.depth)
        if memory is None:
            memory = self._memory[formula.depth] = kernels.memory(formula.depth)
        return kernels.mix(formula, inputs, dtype, out, memory)


def plain_kernels() -> Kernels:
    """The kernels, where something is plain."""
    if KERNELS is None:
        raise RuntimeError("without kernels nothing that computes is plain")
    return KERNELS


@lru_cache(maxsize=256)
def _formula(mix: Mix, dtypes: tuple[str, ...]) -> Formula:
    return Formula([*_steps(mix, 0)], dtypes)


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
