"""Runs a plan's tasks: reads blocks, does the arithmetic, checks, hashes and writes them.

The result does not depend on threads or blocks: every element is computed by the same float
operations wherever its block begins, and fused multiply-add is never used.

Must not know recipes, families or where sources came from.
"""

from __future__ import annotations

import hashlib
import math
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ckptools.errors import NonFiniteError
from ckptools.lora.bake import bake_module, by_module, delta_elements
from ckptools.methods import load_methods
from ckptools.program import (
    Apply,
    Bake,
    Change,
    Compute,
    Copy,
    Mix,
    Node,
    PositionIds,
    Precision,
    Program,
    Read,
    Widen,
    applied_in,
    reads_of,
)
from ckptools.tensors import DTYPES, TensorSpec
from ckptools.writer import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

# Blocks of 2^17 elements keep every operand near the second-level cache; spans of 2 MB keep what
# one read brings in within the third. Measured side by side, one run's seconds: spans of 0.25 MB
# 5.2, 0.5 MB 4.0, 1 MB 3.1, 2 MB 2.7, 4 MB 4.3, 8 MB 5.3.
BLOCK = 1 << 17
SPAN_BYTES = 1 << 21
BUFFERS_PER_WORKER = 4

Parts = tuple[tuple[str, Read], ...]


class Source(Protocol):
    """What the engine reads from."""

    def read_into(self, name: str, view: memoryview, offset: int = 0) -> None:
        """Fill `view` with a tensor's bytes from byte `offset` of the tensor on."""


class Sink(Protocol):
    """Where finished bytes go."""

    def write(self, data: memoryview, offset: int) -> None:
        """Take `data` at byte `offset` of the file."""


@dataclass(frozen=True)
class Task:
    """One output tensor: what it is, how it is made, where its bytes go.

    start  byte offset of its data in the output file
    """

    spec: TensorSpec
    program: Program
    start: int


@dataclass(frozen=True)
class Settings:
    """How to run.

    threads          worker threads; the bytes do not depend on it
    seed             of methods that draw random numbers
    allow_nonfinite  accept NaN and Inf instead of raising
    """

    threads: int
    seed: int = 0
    allow_nonfinite: bool = False


@dataclass
class Outcome:
    """What a run found out.

    sha256        of the data section, in file order
    nonfinite     tensor -> count of NaN and Inf values that were accepted
    repaired      tensors whose position ids were wrong and are right now
    """

    sha256: str = ""
    nonfinite: dict[str, int] = field(default_factory=dict)
    repaired: list[str] = field(default_factory=list)


# --- units: what a worker does at a time -------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Elements [begin, end) of one task's tensor."""

    task: Task
    begin: int
    end: int


@dataclass(frozen=True)
class Unit:
    """A run of output bytes made in one go: many small tensors, or a part of a large one."""

    start: int
    nbytes: int
    pieces: tuple[Piece, ...]


def cut_units(tasks: Sequence[Task]) -> Iterator[Unit]:
    """Cut the output, in file order, into runs of about `SPAN_BYTES`.

    Tensors that need to be whole are never cut; empty tensors belong to no unit's bytes.
    """
    gathered: list[Piece] = []
    gathered_bytes = 0

    def flush() -> Iterator[Unit]:
        nonlocal gathered_bytes
        if gathered:
            yield Unit(gathered[0].task.start, gathered_bytes, tuple(gathered))
            gathered.clear()
            gathered_bytes = 0

    for task in tasks:
        spec = task.spec
        small = spec.nbytes <= SPAN_BYTES // 2 and not is_whole(task.program)
        if small or not spec.numel:
            if gathered_bytes + spec.nbytes > SPAN_BYTES:
                yield from flush()
            gathered.append(Piece(task, 0, spec.numel))
            gathered_bytes += spec.nbytes
            continue
        yield from flush()
        step = spec.numel if is_whole(task.program) else SPAN_BYTES * 8 // DTYPES[spec.dtype].bits
        for begin in range(0, spec.numel, step):
            end = min(begin + step, spec.numel)
            first, last = (_byte_offset(spec, at) for at in (begin, end))
            yield Unit(task.start + first, last - first, (Piece(task, begin, end),))
    yield from flush()


def is_whole(program: Program) -> bool:
    """Whether a program needs its whole tensor at a time."""
    return isinstance(program, Widen) or (isinstance(program, Compute) and program.whole)


def _byte_offset(spec: TensorSpec, element: int) -> int:
    return element * DTYPES[spec.dtype].bits // 8


# --- scratch memory ----------------------------------------------------------------------------


class Buffer:
    """Reusable bytes that grow on demand, seen as bytes, numpy or torch."""

    def __init__(self) -> None:
        self._array = self._usual()

    def view(self, nbytes: int, position: int = 0) -> NDArray[np.uint8]:
        """`nbytes` bytes whose address is as far into a page as `position` is.

        What goes to byte `position` of a file can then go past the page cache: see `writer`.
        """
        if nbytes + PAGE_BYTES > self._array.size:
            self._array = np.empty(nbytes + PAGE_BYTES, np.uint8)
        start = (position - self._array.ctypes.data) % PAGE_BYTES
        return self._array[start : start + nbytes]

    def shrink(self) -> None:
        """Give back what a large tensor took."""
        if self._array.size > SPAN_BYTES + PAGE_BYTES:
            self._array = self._usual()

    @staticmethod
    def _usual() -> NDArray[np.uint8]:
        return np.empty(SPAN_BYTES + PAGE_BYTES, np.uint8)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name that has one."""
    found = getattr(torch, DTYPES[name].torch_name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} has no torch dtype")
    return found


def as_tensor(data: NDArray[np.uint8], dtype: str) -> Tensor:
    """Bytes seen as a flat tensor of `dtype`, without copying."""
    if not data.size:
        return torch.empty(0, dtype=torch_dtype(dtype))
    width = DTYPES[dtype].bits // 8
    if data.ctypes.data % width:  # only where a tensor lies unaligned in a shared run of bytes
        raise ValueError("unaligned bytes")
    return torch.frombuffer(data.data, dtype=torch_dtype(dtype))


class Scratch:
    """One worker's memory: a buffer per read, and a stack of blocks to compute in.

    parts  of the adapter modules that go into the tensor that was worked on last
    """

    def __init__(self) -> None:
        self.inputs: list[Buffer] = []
        self.parts: dict[Parts, dict[str, Tensor]] = {}
        self._task: Task | None = None
        self._blocks: dict[torch.dtype, list[Tensor]] = {}

    def input(self, number: int) -> Buffer:
        """The buffer of the `number`-th read."""
        while len(self.inputs) <= number:
            self.inputs.append(Buffer())
        return self.inputs[number]

    def block(self, depth: int, dtype: torch.dtype, length: int) -> Tensor:
        """The `depth`-th block of the stack; contents undefined."""
        blocks = self._blocks.setdefault(dtype, [])
        while len(blocks) <= depth:
            blocks.append(torch.empty(BLOCK, dtype=dtype))
        return blocks[depth] if length == BLOCK else blocks[depth][:length]

    def turn_to(self, task: Task) -> None:
        """Give back the adapter's parts if they were another tensor's."""
        if self._task is not task:
            self._task, self.parts = task, {}

    def shrink(self) -> None:
        """Give back what whole tensors took."""
        for buffer in self.inputs:
            buffer.shrink()


# --- arithmetic --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ElementRandom:
    """Random numbers addressed by (seed, tensor name, stream, element): see `Random`.

    Philox 4x64 gives 4 numbers per counter step, so a block may start at any multiple of 4.
    Source: Salmon et al. 2011, 'Parallel random numbers: as easy as 1, 2, 3'; numpy's `Philox`.
    """

    seed: int
    tensor: str
    begin: int
    shape: tuple[int, ...]

    def uniform(self, stream: int) -> Tensor:
        """Numbers in [0, 1), float64, of `shape`, from element `begin` of the tensor on."""
        name = hashlib.sha256(self.tensor.encode()).digest()
        key = [
            self.seed % 2**64,
            int.from_bytes(name[:8], "little") ^ zlib.crc32(str(stream).encode()),
        ]
        skip, length = self.begin % 4, math.prod(self.shape)
        generator = np.random.Generator(
            np.random.Philox(key=np.array(key, np.uint64), counter=self.begin // 4)
        )
        return torch.from_numpy(generator.random(skip + length)[skip:]).view(self.shape)


class Evaluator:
    """Evaluates a mix over flat inputs of equal length, into scratch blocks."""

    def __init__(
        self,
        scratch: Scratch,
        dtype: torch.dtype,
        random: Callable[[int, tuple[int, ...]], ElementRandom],
    ) -> None:
        self._scratch, self._dtype, self._random = scratch, dtype, random

    def block(self, mix: Mix, inputs: Sequence[Tensor], begin: int) -> Tensor:
        """The mix of one block; `begin` is the block's first element within its tensor."""
        return self._mix(mix, inputs, begin, 0)

    def _mix(self, mix: Mix, inputs: Sequence[Tensor], begin: int, depth: int) -> Tensor:
        (first, node), *rest = mix.terms
        total = self._node(node, inputs, begin, depth)
        if first != 1.0:
            total.mul_(first)
        for factor, node in rest:
            term = self._node(node, inputs, begin, depth + 1)
            if factor == 1.0:
                total.add_(term)
            elif factor == -1.0:
                total.sub_(term)
            else:  # never add_(term, alpha=factor): it is fused on some processors
                total.add_(term.mul_(factor))
        return total

    def _node(self, node: Node, inputs: Sequence[Tensor], begin: int, depth: int) -> Tensor:
        """The value of a node, in the block at `depth`."""
        if isinstance(node, int):
            target = self._scratch.block(depth, self._dtype, len(inputs[0]))
            return target.copy_(inputs[node])
        if isinstance(node, Mix):
            return self._mix(node, inputs, begin, depth)
        if isinstance(node, Bake):
            raise TypeError("adapters that depend on the weight need the whole of it")
        models = [
            self._mix(model, inputs, begin, depth + 1 + number)
            for number, model in enumerate(node.models)
        ]
        result = call_method(node, models, self._random(begin, (len(inputs[0]),)))
        target = self._scratch.block(depth, self._dtype, len(inputs[0]))
        return target.copy_(result)


@dataclass(frozen=True)
class WholeEvaluator:
    """Evaluates a mix over whole tensors of one shape; allocates what it needs.

    bake  makes an adapter's changes to a tensor that it may change in place
    """

    dtype: torch.dtype
    random: ElementRandom
    bake: Callable[[Bake, Tensor], Tensor]

    def mix(self, mix: Mix, inputs: Sequence[Tensor]) -> Tensor:
        """The mix of the inputs, shape kept."""
        total: Tensor | None = None
        for factor, node in mix.terms:
            term = self._node(node, inputs)
            if factor != 1.0:
                term.mul_(factor)
            total = term if total is None else total.add_(term)
        if total is None:
            raise ValueError("a mix without terms")
        return total

    def _node(self, node: Node, inputs: Sequence[Tensor]) -> Tensor:
        """The value of a node in memory that the caller may change."""
        match node:
            case int():
                return inputs[node].to(self.dtype, copy=True)
            case Mix():
                return self.mix(node, inputs)
            case Bake(model=model):
                return self.bake(node, self.mix(model, inputs))
            case Apply(models=nodes):
                models = [self.mix(model, inputs) for model in nodes]
                result = call_method(node, models, self.random)
                shared = any(result is model for model in models)
                return result.to(self.dtype, copy=True) if shared else result.to(self.dtype)


def call_method(node: Apply, models: Sequence[Tensor], random: ElementRandom) -> Tensor:
    """Call a registered method with its models in calling order."""
    method = load_methods()[node.method]
    count = len(models) - len(method.keyword_models)
    keywords: dict[str, Any] = dict(zip(method.keyword_models, models[count:], strict=True))
    if method.random:
        keywords["rng"] = random
    result: Tensor = method.function(*models[:count], **keywords, **dict(node.scalars))
    return result


def store(values: Tensor, target: Tensor) -> None:
    """Round values to the target's dtype; what is too large becomes NaN or Inf.

    Since 2.12 torch turns even Inf into 448 for float8_e4m3fn. Beyond 464 the nearest number of
    that format is no longer 448. Source: https://github.com/pytorch/pytorch/pull/178817.
    """
    if target.dtype == torch.float8_e4m3fn and values.dtype != target.dtype:
        wide = values.float() if values.element_size() == 1 else values
        values = torch.where(wide.abs() > 464.0, math.nan, wide)
    target.copy_(values)


# --- finite checks -----------------------------------------------------------------------------

# name of the integer type, mask of exponent (or of all but the sign), first non-finite value
_FINITE_BITS: Mapping[str, tuple[torch.dtype, int, int]] = {
    "F64": (torch.int64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": (torch.int32, 0x7FFF_FFFF, 0x7F80_0000),
    "F16": (torch.int16, 0x7FFF, 0x7C00),
    "BF16": (torch.int16, 0x7FFF, 0x7F80),
    "F8_E5M2": (torch.uint8, 0x7F, 0x7C),
    "F8_E4M3": (torch.uint8, 0x7F, 0x7F),
    "F8_E4M3FNUZ": (torch.uint8, 0xFF, 0x80),
    "F8_E5M2FNUZ": (torch.uint8, 0xFF, 0x80),
}


def count_nonfinite(data: NDArray[np.uint8], dtype: str) -> int:
    """How many values of a float tensor are NaN or Inf; exact, by their bits, in blocks."""
    integer, mask, limit = _FINITE_BITS[dtype]
    if not data.size:
        return 0
    exact = dtype.endswith("FNUZ")  # one NaN pattern, the negative zero
    values = torch.frombuffer(data.data, dtype=integer)
    scratch = torch.empty(min(BLOCK, len(values)), dtype=integer)
    count = 0
    for begin in range(0, len(values), BLOCK):
        block = values[begin : begin + BLOCK]
        bits = torch.bitwise_and(block, mask, out=scratch[: len(block)])
        if exact:
            count += int((bits == limit).sum())
        elif int(bits.amax()) >= limit:
            count += int((bits >= limit).sum())
    return count


# --- the run -----------------------------------------------------------------------------------


class Engine:
    """Makes the bytes of tasks; one per run, shared by its workers."""

    def __init__(
        self, sources: Sequence[Source], labels: Sequence[str], settings: Settings
    ) -> None:
        self._sources, self._labels, self._settings = sources, labels, settings
        self._whole = threading.Lock()
        self._found = threading.Lock()
        self.nonfinite: dict[str, int] = {}
        self.repaired: list[str] = []

    def fill(self, piece: Piece, out: NDArray[np.uint8], scratch: Scratch) -> None:
        """Make the bytes of one piece in `out`; raises `NonFiniteError` for NaN and Inf."""
        program = piece.task.program
        if is_whole(program):
            with self._whole:  # one at a time: memory holds one whole tensor, not one per thread
                self._fill_whole(piece.task, out)
        elif isinstance(program, Copy):
            self._read(program.read, piece.begin, out.data)
        elif isinstance(program, PositionIds):
            self._fill_ids(piece, program, out)
        elif isinstance(program, Compute):
            self._fill_blocks(piece, program, out, scratch)
        self._check(piece, out)

    def _read(self, read: Read, begin: int, view: memoryview) -> None:
        offset = _byte_offset(read.spec, begin)
        self._sources[read.source].read_into(read.name, view, offset)

    def _fill_ids(self, piece: Piece, program: PositionIds, out: NDArray[np.uint8]) -> None:
        ids = np.arange(piece.begin, piece.end, dtype="<i8").tobytes()
        stored = bytearray(program.read.spec.nbytes)
        self._read(program.read, 0, memoryview(stored))
        out[:] = np.frombuffer(ids, np.uint8)
        if bytes(stored) != ids:
            with self._found:
                self.repaired.append(piece.task.spec.name)

    def _random(self, task: Task) -> Callable[[int, tuple[int, ...]], ElementRandom]:
        name, seed = task.spec.name, self._settings.seed
        return lambda begin, shape: ElementRandom(seed, name, begin, shape)

    def _fill_blocks(
        self, piece: Piece, program: Compute, out: NDArray[np.uint8], scratch: Scratch
    ) -> None:
        length = piece.end - piece.begin
        if not length:
            return
        inputs: list[Tensor] = []
        for number, read in enumerate(program.reads):
            data = scratch.input(number).view(_byte_offset(read.spec, length))
            self._read(read, piece.begin, data.data)
            inputs.append(as_tensor(data, read.spec.dtype))
        shape = piece.task.spec.shape
        scratch.turn_to(piece.task)
        for changes in program.deltas:
            parts = [self._parts(change, program.precision, scratch) for change in changes]
            inputs.append(delta_elements(changes, parts, shape, piece.begin, piece.end))
        if any(True for _ in applied_in(program.mix)):
            self._check_inputs(piece.task, inputs)
        result = as_tensor(out, piece.task.spec.dtype)
        if program.mix.terms == ((1.0, 0),):
            store(inputs[0], result)
            return
        evaluator = Evaluator(scratch, torch_dtype(program.precision), self._random(piece.task))
        for low in range(0, length, BLOCK):
            high = min(low + BLOCK, length)
            block = [tensor[low:high] for tensor in inputs]
            store(evaluator.block(program.mix, block, piece.begin + low), result[low:high])

    def _fill_whole(self, task: Task, out: NDArray[np.uint8]) -> None:
        program = task.program
        result = as_tensor(out, task.spec.dtype).view(task.spec.shape)
        if isinstance(program, Compute):
            store(self._whole_result(task, program, None).view(task.spec.shape), result)
        elif isinstance(program, Widen):
            channels, common = program.channels, program.common
            wide = self._load(program.extra).to(torch_dtype(common.precision))
            wide[:, :channels] = self._whole_result(task, common, channels)
            for weight, changes in program.deltas:
                parts = [self._parts(change, common.precision) for change in changes]
                shape = task.spec.shape
                delta = delta_elements(changes, parts, shape, 0, wide.numel()).view(shape)
                wide += delta * weight
            store(wide, result)

    def _whole_result(self, task: Task, program: Compute, channels: int | None) -> Tensor:
        inputs = [self._load(read) for read in program.reads]
        if channels is not None:
            inputs = [tensor[:, :channels].contiguous() for tensor in inputs]
        else:
            inputs = [tensor.reshape(task.spec.shape) for tensor in inputs]
        shape = tuple(inputs[0].shape)
        for changes in program.deltas:
            parts = [self._parts(change, program.precision) for change in changes]
            delta = delta_elements(changes, parts, shape, 0, inputs[0].numel())
            inputs.append(delta.view(shape))
        if any(True for _ in applied_in(program.mix)):
            self._check_inputs(task, inputs)

        def bake(node: Bake, weight: Tensor) -> Tensor:
            for changes in by_module(node.changes):
                parts = self._parts(changes[0], program.precision)
                bake_module(changes, parts, weight, node.strength)
            if any(True for _ in applied_in(program.mix)):
                self._check_inputs(task, [weight])
            return weight

        random = self._random(task)(0, shape)
        evaluator = WholeEvaluator(torch_dtype(program.precision), random, bake)
        return evaluator.mix(program.mix, inputs)

    def _parts(
        self, change: Change, precision: Precision, scratch: Scratch | None = None
    ) -> dict[str, Tensor]:
        """A module's tensors, floats in the precision of the arithmetic.

        Kept in the scratch while one tensor is worked on: its pieces share them.
        """
        if scratch is not None and change.parts in scratch.parts:
            return scratch.parts[change.parts]
        parts = {}
        for part, read in change.parts:
            values = self._load(read)
            if read.spec.is_float:  # copied even so: matrix products depend on the alignment
                values = values.to(torch_dtype(precision), copy=True)
            parts[part] = values
        if scratch is not None:
            scratch.parts[change.parts] = parts
        return parts

    def _load(self, read: Read) -> Tensor:
        data = np.empty(read.spec.nbytes, np.uint8)
        self._read(read, 0, data.data)
        return as_tensor(data, read.spec.dtype).view(read.spec.shape)

    def _check_inputs(self, task: Task, inputs: Sequence[Tensor]) -> None:
        """Methods with comparisons can swallow a NaN, so theirs are looked for beforehand."""
        if self._settings.allow_nonfinite:
            return
        for tensor in inputs:
            wide = tensor.float() if tensor.element_size() == 1 else tensor
            if not bool(torch.isfinite(wide).all()):
                raise self._nonfinite_error(task, 0)

    def _check(self, piece: Piece, out: NDArray[np.uint8]) -> None:
        spec = piece.task.spec
        if not spec.is_float:
            return
        count = count_nonfinite(out, spec.dtype)
        if not count:
            return
        if not self._settings.allow_nonfinite:
            raise self._nonfinite_error(piece.task, count)
        with self._found:
            self.nonfinite[spec.name] = self.nonfinite.get(spec.name, 0) + count

    def _nonfinite_error(self, task: Task, count: int) -> NonFiniteError:
        """Who is to blame: an input that holds NaN or Inf, or a result too large for its dtype."""
        spec = task.spec
        for read in reads_of(task.program):
            bad = self._count_in(read)
            if bad:
                label = self._labels[read.source]
                named = f" in {read.name!r}" if read.name != spec.name else ""
                return NonFiniteError(
                    f"{label} has {bad:,} NaN or Inf of {read.spec.numel:,} values{named}",
                    where=spec.name,
                    fix=f"use a sound copy of {label}, or set `allow_nonfinite: true`",
                )
        largest = DTYPES[spec.dtype].finite_max
        return NonFiniteError(
            f"{count:,} values of the result are too large for {spec.dtype} "
            f"(largest {largest:g}), or not numbers",
            where=spec.name,
            fix="store this component as fp32 (`output.dtype`), or lower the coefficients",
        )

    def _count_in(self, read: Read) -> int:
        if not read.spec.is_float:
            return 0
        step = SPAN_BYTES // 8 * 8
        count = 0
        for offset in range(0, read.spec.nbytes, step):
            data = np.empty(min(step, read.spec.nbytes - offset), np.uint8)
            self._sources[read.source].read_into(read.name, data.data, offset)
            count += count_nonfinite(data, read.spec.dtype)
        return count


class _Ring:
    """Output buffers handed round: filled and written by workers, hashed in order, used again.

    A worker takes a buffer before it takes a unit, so the unit that the hash waits for always
    has one: the ring cannot lock up.
    """

    def __init__(self, units: Iterator[Unit], buffers: int) -> None:
        self._units = units
        self._free = deque(Buffer() for _ in range(buffers))
        self._done: dict[int, tuple[Buffer, NDArray[np.uint8]]] = {}
        self._working: set[int] = set()
        self._taken = 0
        self._ended = False
        self._changed = threading.Condition()
        self.errors: list[tuple[int, BaseException]] = []

    def take(self) -> tuple[int, Unit, Buffer] | None:
        """The next unit with a buffer to fill, or None at the end or after an error."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._ended or self.errors)
            if self._ended or self.errors:
                return None
            unit = next(self._units, None)
            if unit is None:
                self._ended = True
                self._changed.notify_all()
                return None
            number = self._taken
            self._taken += 1
            self._working.add(number)
            return number, unit, self._free.popleft()

    def finish(self, number: int, buffer: Buffer, data: NDArray[np.uint8]) -> None:
        """Hand what was written, and the buffer it lies in, over to be hashed."""
        with self._changed:
            self._done[number] = (buffer, data)
            self._working.discard(number)
            self._changed.notify_all()

    def next_done(self, number: int) -> tuple[Buffer, NDArray[np.uint8]] | None:
        """The `number`-th buffer and its data once written; None when there is none to come."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    number in self._done or self.errors or (self._ended and number >= self._taken)
                )
            )
            return self._done.pop(number, None)

    def release(self, buffer: Buffer) -> None:
        """Give a hashed buffer back."""
        buffer.shrink()
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()

    def fail(self, number: int, error: BaseException) -> None:
        """Stop everybody."""
        with self._changed:
            self.errors.append((number, error))
            self._working.discard(number)
            self._changed.notify_all()

    def wait_idle(self) -> None:
        """Wait until no unit is in work; after an error none will be taken up again."""
        with self._changed:
            self._changed.wait_for(lambda: not self._working)


def run(
    tasks: Sequence[Task],
    *,
    sources: Sequence[Source],
    labels: Sequence[str],
    sink: Sink,
    settings: Settings,
    progress: Callable[[int], None] = lambda nbytes: None,
    hashers: Sequence[Any] = (),
) -> Outcome:
    """Make every task's bytes and write them to the sink.

    tasks     in file order, without gaps between their bytes
    sources   by index, as the programs' reads name them; labels their names in messages
    progress  called with the number of bytes just finished
    hashers   further hashlib objects to feed with the data, in order
    Raises the first error in file order; the sink then holds an unfinished file.
    """
    engine = Engine(sources, labels, settings)
    ring = _Ring(cut_units(tasks), settings.threads * BUFFERS_PER_WORKER)
    workers = [
        threading.Thread(target=_work, args=(engine, ring, sink), daemon=True)
        for _ in range(settings.threads)
    ]
    digest = hashlib.sha256()
    with single_threaded():
        try:
            for worker in workers:
                worker.start()
            _hash_all(ring, (digest, *hashers), progress)
        except BaseException as exc:
            ring.fail(-1, exc)
            raise
        finally:
            ring.wait_idle()
            for worker in workers:
                if worker.is_alive():  # an interrupt may have come before it was
                    worker.join()
    if ring.errors:
        raise min(ring.errors, key=lambda item: item[0])[1]
    return Outcome(digest.hexdigest(), engine.nonfinite, sorted(engine.repaired))


def _work(engine: Engine, ring: _Ring, sink: Sink) -> None:
    scratch = Scratch()
    number = 0
    try:
        while (taken := ring.take()) is not None:
            number, unit, buffer = taken
            data = buffer.view(unit.nbytes, unit.start)
            position = 0
            for piece in unit.pieces:
                spec = piece.task.spec
                nbytes = _byte_offset(spec, piece.end) - _byte_offset(spec, piece.begin)
                engine.fill(piece, data[position : position + nbytes], scratch)
                position += nbytes
            sink.write(data.data, unit.start)
            scratch.shrink()
            ring.finish(number, buffer, data)
    except BaseException as exc:  # carried to the caller's thread, whatever it is
        ring.fail(number, exc)


def _hash_all(ring: _Ring, hashers: Sequence[Any], progress: Callable[[int], None]) -> None:
    number = 0
    while (done := ring.next_done(number)) is not None:
        buffer, data = done
        for hasher in hashers:
            hasher.update(data.data)
        ring.release(buffer)
        progress(data.size)
        number += 1


def recompute(
    task: Task, *, sources: Sequence[Source], labels: Sequence[str], settings: Settings
) -> Iterator[tuple[int, memoryview]]:
    """One task's bytes made again: (offset in the file, bytes), valid until the next step."""
    engine = Engine(sources, labels, settings)
    scratch, buffer = Scratch(), Buffer()
    with single_threaded():
        for unit in cut_units([task]):
            data = buffer.view(unit.nbytes)
            engine.fill(unit.pieces[0], data, scratch)
            yield unit.start, data.data


@contextmanager
def single_threaded() -> Iterator[None]:
    """Torch without threads of its own: blocks are too small to share, workers share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
