"""Runs a plan's tasks: reads blocks, does the arithmetic, checks, hashes and writes them.

The result does not depend on threads or blocks: every element is computed by the same float
operations wherever its block begins, and fused multiply-add is never used.

Must not know recipes, families or where sources came from.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ckptools.codec import aligned, count_nonfinite
from ckptools.errors import NonFiniteError, NonFiniteSourceError
from ckptools.footprint import (
    BUFFERS_PER_WORKER,
    SPAN_BYTES,
    UNIT_BYTES,
    most_whole_bytes,
    whole_bytes,
)
from ckptools.lowrank import LowRank
from ckptools.plain import PlainEvaluator, is_plain, needs_torch, plain_kernels
from ckptools.program import Compute, Copy, PositionIds, Program, Read, Widen, reads_of
from ckptools.tensors import DTYPES, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ckptools.evaluation import Evaluation, Memory

    Finished = Generator[NDArray[np.uint8], None, None]

ALONE_BYTES = 1 << 23  # less than this is done sooner than threads have shared it out


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

    @property
    def start(self) -> int:
        """Byte offset in the output file."""
        return self.task.start + byte_offset(self.task.spec, self.begin)

    @property
    def nbytes(self) -> int:
        """How many bytes it makes."""
        return byte_offset(self.task.spec, self.end) - byte_offset(self.task.spec, self.begin)


@dataclass(frozen=True)
class Unit:
    """A run of output bytes written in one go: tensors, or parts of them, one after another."""

    start: int
    nbytes: int
    pieces: tuple[Piece, ...]


def cut_units(tasks: Sequence[Task]) -> Iterator[Unit]:
    """Cut the output, in file order, into runs of about `UNIT_BYTES`, of pieces up to `SPAN_BYTES`.

    A piece's inputs are no longer than that either.

    Tensors that need to be whole are never cut; empty tensors belong to no unit's bytes.
    """
    gathered: list[Piece] = []
    nbytes = 0
    for task in tasks:
        for piece in _pieces(task):
            if gathered and nbytes + piece.nbytes > UNIT_BYTES:
                yield Unit(gathered[0].start, nbytes, tuple(gathered))
                gathered, nbytes = [], 0
            gathered.append(piece)
            nbytes += piece.nbytes
    if gathered:
        yield Unit(gathered[0].start, nbytes, tuple(gathered))


def _pieces(task: Task) -> Iterator[Piece]:
    spec = task.spec
    reads = task.program.reads if isinstance(task.program, Compute) else ()
    step = (
        SPAN_BYTES * 8 // max(DTYPES[each.dtype].bits for each in (spec, *(r.spec for r in reads)))
    )
    if is_whole(task.program) or spec.numel <= step:
        step = max(spec.numel, 1)
    for begin in range(0, max(spec.numel, 1), step):
        yield Piece(task, begin, min(begin + step, spec.numel))


def _wider(dtype: str) -> str:
    """What else to do about values that are too large for a dtype: store them as another."""
    wider = {"F32": "", "F64": "", "BF16": "fp32"}.get(dtype, "bf16 or fp32")
    return f"store this component as {wider} (`output.dtype`), or " if wider else ""


def is_whole(program: Program) -> bool:
    """Whether a program needs its whole tensor at a time."""
    return isinstance(program, Widen) or (isinstance(program, Compute) and program.whole)


def byte_offset(spec: TensorSpec, element: int) -> int:
    """Where an element begins, in bytes from the tensor's start on."""
    return element * DTYPES[spec.dtype].bits // 8


# --- scratch memory ----------------------------------------------------------------------------


class Buffer:
    """Reusable bytes that grow on demand, `nbytes` of them as long as that is enough."""

    def __init__(self, nbytes: int) -> None:
        self._usual = nbytes
        self._array: NDArray[np.uint8] = aligned(nbytes, "u1")

    def view(self, nbytes: int) -> NDArray[np.uint8]:
        """The first `nbytes` bytes."""
        if nbytes > self._array.size:
            self._array = aligned(nbytes, "u1")
        return self._array[:nbytes]

    def shrink(self) -> None:
        """Give back what a large tensor took."""
        if self._array.size > self._usual:
            self._array = aligned(self._usual, "u1")


class Scratch:
    """One worker's memory: a buffer per read, and what its arithmetic keeps."""

    def __init__(self) -> None:
        self.inputs: list[Buffer] = []
        self.plain = PlainEvaluator()
        self._low_rank: LowRank | None = None
        self._memory: Memory | None = None

    @property
    def low_rank(self) -> LowRank:
        """What LoRAs' products keep."""
        if self._low_rank is None:
            self._low_rank = LowRank(plain_kernels())
        return self._low_rank

    @property
    def memory(self) -> Memory:
        """What torch's arithmetic keeps; made when it is first asked for."""
        if self._memory is None:
            from ckptools.evaluation import Memory

            self._memory = Memory()
        return self._memory

    def input(self, number: int) -> Buffer:
        """The buffer of the `number`-th read."""
        while len(self.inputs) <= number:
            self.inputs.append(Buffer(SPAN_BYTES))
        return self.inputs[number]

    def shrink(self) -> None:
        """Give back what whole tensors took."""
        for buffer in self.inputs:
            buffer.shrink()


# --- the run -----------------------------------------------------------------------------------


class _Room:
    """Memory for tensors that are needed whole: for those that fit in together, or for one."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes, self._taken = nbytes, 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[None]:
        """Wait for so much of it, and give it back afterwards."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + nbytes <= self._nbytes)
            self._taken += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._taken -= nbytes
                self._changed.notify_all()


class Engine:
    """Makes the bytes of tasks; one per run, shared by its workers.

    room  bytes of memory for tensors that are needed whole; one is let in whatever it takes
    """

    def __init__(
        self,
        sources: Sequence[Source],
        labels: Sequence[str],
        settings: Settings,
        room: int = 0,
    ) -> None:
        self._sources, self._labels, self._settings = sources, labels, settings
        self._evaluation: Evaluation | None = None
        self._room = _Room(room)
        self._found = threading.Lock()
        self.nonfinite: dict[str, int] = {}
        self.repaired: list[str] = []

    def fill(self, piece: Piece, out: NDArray[np.uint8], scratch: Scratch) -> None:
        """Make the bytes of one piece in `out`; raises `NonFiniteError` for NaN and Inf."""
        spec, program = piece.task.spec, piece.task.program
        match program:
            case Copy(read=read):
                self._read(read, piece.begin, out.data)
            case PositionIds():
                self._fill_ids(piece, program, out)
            case Compute(whole=False) if is_plain(program, spec.dtype):
                inputs = self._inputs(piece, program, scratch)
                if program.deltas:
                    inputs += scratch.low_rank.deltas(
                        spec, program, piece.begin, piece.end - piece.begin, self._read
                    )
                if scratch.plain.fill(program, inputs, spec.dtype, out):
                    return
            case Compute(whole=False):
                inputs = self._inputs(piece, program, scratch)
                with self._blaming(piece.task):
                    if self._torch.fill(
                        spec, program, inputs, begin=piece.begin, out=out, memory=scratch.memory
                    ):
                        return
            case Compute() | Widen():
                with self._room.taken(whole_bytes(spec, program)), self._blaming(piece.task):
                    self._torch.fill_whole(spec, program, out)
        self._check(piece, out)

    def make(self, unit: Unit, out: NDArray[np.uint8], scratch: Scratch) -> None:
        """Make all bytes of a unit in `out`."""
        position = 0
        for piece in unit.pieces:
            self.fill(piece, out[position : position + piece.nbytes], scratch)
            position += piece.nbytes

    @property
    def _torch(self) -> Evaluation:
        """What runs programs that are not plain; loads torch when it is first asked for."""
        if self._evaluation is None:
            from ckptools.evaluation import Evaluation

            self._evaluation = Evaluation(
                self._read, self._settings.seed, check_inputs=not self._settings.allow_nonfinite
            )
        return self._evaluation

    def _read(self, read: Read, begin: int, view: memoryview) -> None:
        offset = byte_offset(read.spec, begin)
        self._sources[read.source].read_into(read.name, view, offset)

    def _fill_ids(self, piece: Piece, program: PositionIds, out: NDArray[np.uint8]) -> None:
        ids = np.arange(piece.begin, piece.end, dtype="<i8").tobytes()
        stored = bytearray(program.read.spec.nbytes)
        self._read(program.read, 0, memoryview(stored))
        out[:] = np.frombuffer(ids, np.uint8)
        if bytes(stored) != ids:
            with self._found:
                self.repaired.append(piece.task.spec.name)

    def _inputs(self, piece: Piece, program: Compute, scratch: Scratch) -> list[NDArray[np.uint8]]:
        """The bytes of the piece's elements in every read."""
        inputs = []
        for number, read in enumerate(program.reads):
            nbytes = byte_offset(read.spec, piece.end - piece.begin)
            inputs.append(scratch.input(number).view(nbytes))
            self._read(read, piece.begin, inputs[-1].data)
        return inputs

    @contextmanager
    def _blaming(self, task: Task) -> Iterator[None]:
        """Say who is to blame for a NaN that a method would have swallowed."""
        from ckptools.evaluation import NonFiniteInputError

        try:
            yield
        except NonFiniteInputError as exc:
            raise self._nonfinite_error(task, 0) from exc

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
                return NonFiniteSourceError(
                    f"{label} has {bad:,} NaN or Inf of {read.spec.numel:,} values{named}",
                    where=spec.name,
                    fix=f"use a sound copy of {label}, or set `allow_nonfinite: true`",
                )
        largest = DTYPES[spec.dtype].finite_max
        return NonFiniteError(
            f"{count:,} values of the result are too large for {spec.dtype} "
            f"(largest {largest:g}), or not numbers",
            where=spec.name,
            fix=_wider(spec.dtype) + "lower the coefficients",
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
        self._free = deque(Buffer(UNIT_BYTES) for _ in range(buffers))
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
    room = most_whole_bytes((task.spec, task.program) for task in tasks)
    engine, units = Engine(sources, labels, settings, room), cut_units(tasks)
    with_torch = needs_torch((task.program, task.spec.dtype) for task in tasks)
    if not with_torch and sum(task.spec.nbytes for task in tasks) <= ALONE_BYTES:
        stream = _alone(engine, units, sink)
    else:
        stream = _by_threads(engine, units, sink, settings.threads)
    digest = hashlib.sha256()
    with closing(stream), _single_threaded() if with_torch else nullcontext():
        for data in stream:
            for hasher in (digest, *hashers):
                hasher.update(data.data)
            progress(data.size)
    return Outcome(digest.hexdigest(), engine.nonfinite, sorted(engine.repaired))


def _alone(engine: Engine, units: Iterable[Unit], sink: Sink) -> Finished:
    """Every unit's bytes once they are written, made here and now."""
    scratch, buffer = Scratch(), Buffer(UNIT_BYTES)
    for unit in units:
        data = buffer.view(unit.nbytes)
        engine.make(unit, data, scratch)
        sink.write(data.data, unit.start)
        yield data


def _by_threads(engine: Engine, units: Iterator[Unit], sink: Sink, threads: int) -> Finished:
    """As `_alone`, made in threads: what computes, reads and writes lets go of Python meanwhile."""
    ring = _Ring(units, threads * BUFFERS_PER_WORKER)
    workers = [
        threading.Thread(target=_work, args=(engine, ring, sink), daemon=True)
        for _ in range(threads)
    ]
    number = 0
    try:
        for worker in workers:
            worker.start()
        while (done := ring.next_done(number)) is not None:
            buffer, data = done
            yield data
            ring.release(buffer)
            number += 1
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


def _work(engine: Engine, ring: _Ring, sink: Sink) -> None:
    scratch = Scratch()
    number = 0
    try:
        while (taken := ring.take()) is not None:
            number, unit, buffer = taken
            data = buffer.view(unit.nbytes)
            engine.make(unit, data, scratch)
            sink.write(data.data, unit.start)
            scratch.shrink()
            ring.finish(number, buffer, data)
    except BaseException as exc:  # carried to the caller's thread, whatever it is
        ring.fail(number, exc)


def recompute(
    task: Task, *, sources: Sequence[Source], labels: Sequence[str], settings: Settings
) -> Iterator[tuple[int, memoryview]]:
    """One task's bytes made again: (offset in the file, bytes), valid until the next step."""
    engine = Engine(sources, labels, settings)
    scratch, buffer = Scratch(), Buffer(SPAN_BYTES)
    with nullcontext() if is_plain(task.program, task.spec.dtype) else _single_threaded():
        for piece in _pieces(task):
            data = buffer.view(piece.nbytes)
            engine.fill(piece, data, scratch)
            yield piece.start, data.data


def _single_threaded() -> AbstractContextManager[None]:
    """Torch without threads of its own; loads torch."""
    from ckptools import evaluation

    return evaluation.single_threaded()
