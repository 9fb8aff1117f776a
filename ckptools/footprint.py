"""How much memory a merge takes: the sizes that the engine works in, and the peak they lead to.

Must not know recipes or files; reads nothing and loads no numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ckptools.methods import load_methods
from ckptools.plain import needs_torch
from ckptools.program import Change, Compute, Program, Widen, applied_in, baked_in, reads_of
from ckptools.tensors import TensorSpec

# Spans of 1 MB keep what one read brings in within the caches; units are handed round.
SPAN_BYTES = 1 << 20  # of a tensor that a worker makes, or reads, at a time
UNIT_BYTES = 1 << 22  # of the output that are written in one go
BUFFERS_PER_WORKER = 2  # for units

# Measured on Linux, Python 3.11, torch 2.13: interpreter, torch and its arenas; or without torch.
_PROCESS_BYTES = 260_000_000
_PLAIN_PROCESS_BYTES = 50_000_000
_BLOCK_BYTES = 1_000_000  # of a read in the arithmetic's precision
_METHOD_BYTES = 16_000_000  # what a method makes of blocks on the way, and the allocator keeps
_BAKE_SCRATCH = 4  # copies of the tensor that the kinds that depend on it make
_DELTA_SCRATCH = 3  # further copies of a delta's rows while they are made: LoHa's two products

Made = tuple[TensorSpec, Program]  # an output tensor, and how it is made


def peak_bytes(tensors: Sequence[Made], *, moved_bytes: int, threads: int) -> int:
    """Predicted peak of a process that makes these tensors.

    moved_bytes  all that is read and written: workers hold no more
    """
    with_torch = needs_torch((program, spec.dtype) for spec, program in tensors)
    worker = BUFFERS_PER_WORKER * UNIT_BYTES + _most(_worker_bytes(*made) for made in tensors)
    process = _PROCESS_BYTES if with_torch else _PLAIN_PROCESS_BYTES
    return process + min(threads * worker, moved_bytes) + most_whole_bytes(tensors)


def most_whole_bytes(tensors: Iterable[Made]) -> int:
    """`whole_bytes` of the tensor that takes most."""
    return _most(whole_bytes(*made) for made in tensors)


def _worker_bytes(spec: TensorSpec, program: Program) -> int:
    """What each worker holds of a tensor's inputs where it is made span by span."""
    if not isinstance(program, Compute) or program.whole:
        return (SPAN_BYTES + _BLOCK_BYTES) * len(reads_of(program))
    reads = (SPAN_BYTES + _BLOCK_BYTES) * len(program.reads)
    reads += _METHOD_BYTES * any(True for _ in applied_in(program.mix))
    if not program.deltas:
        return reads
    width = _width(program)
    parts = _parts_bytes([change for delta in program.deltas for change in delta], width)
    span = min(spec.numel, SPAN_BYTES * spec.numel // spec.nbytes) * width
    return reads + parts + (len(program.deltas) + _DELTA_SCRATCH) * span


def whole_bytes(spec: TensorSpec, program: Program) -> int:
    """Memory for a tensor that a method needs as a whole; 0 where none does."""
    wide = program.deltas if isinstance(program, Widen) else ()
    if isinstance(program, Widen):
        program = replace(program.common, whole=True)
    if not isinstance(program, Compute) or not program.whole:
        return 0
    width = _width(program)
    methods = load_methods()
    scratches = [methods[node.method].scratch for node in applied_in(program.mix)]
    scratch = max([*scratches, *(_BAKE_SCRATCH for _ in baked_in(program.mix))], default=1)
    # the output's buffer, and those that wait to be written and hashed
    stored = sum(read.spec.nbytes for read in program.reads) + 3 * spec.nbytes
    deltas = (*program.deltas, *(changes for _, changes in wide))
    groups = (*deltas, *((change,) for bake in baked_in(program.mix) for change in bake.changes))
    copies = len(program.reads) + len(deltas) + max(scratch, _DELTA_SCRATCH * bool(deltas))
    parts = _most(_parts_bytes(changes, width) for changes in groups)
    return stored + copies * spec.numel * width + parts


def _parts_bytes(changes: Sequence[Change], width: int) -> int:
    """An adapter's tensors in numbers of so many bytes, and one as it is stored."""
    reads = [read for change in changes for _, read in change.parts]
    held = sum(read.spec.numel * width for read in reads)
    return held + max((read.spec.nbytes for read in reads), default=0)


def _width(program: Compute) -> int:
    """Bytes of a number in the precision of the arithmetic."""
    return 4 if program.precision == "F32" else 8


def _most(sizes: Iterable[int]) -> int:
    return max(sizes, default=0)
