"""Several merges of the same sources at once: each source is read once, results stay in memory.

A model here is what one merge would save, tensor by tensor, or one of its sources as it is. For
every span of every tensor what is read is shared, each distinct program runs once, and its bytes
are kept for the models that it belongs to, rounded to the dtype they would be stored in. Knows
nothing of pictures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ckptools.checkpoint import Checkpoint, Tensors
from ckptools.engine import (
    Buffer,
    Engine,
    Piece,
    Scratch,
    Settings,
    Task,
    byte_offset,
    is_whole,
)
from ckptools.evaluation import as_tensor, single_threaded
from ckptools.opening import Source
from ckptools.plan import Plan
from ckptools.program import Copy, Read
from ckptools.tensors import DTYPES, TensorSpec
from ckptools.writer import Layout, lay_out

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Elements of one span: 2 MB of fp16. Small enough that what is read, and what comes of it for
# every model, stays near the processor.
_SPAN = 1 << 20


class Sink(Protocol):
    """Where finished bytes go: `ckptools.render.ModuleSink`."""

    def write(self, data: memoryview, offset: int) -> None:
        """Take `data` at byte `offset` of the layout."""


@dataclass(frozen=True, eq=False)
class Model:
    """What one merge would save, or a source: a task for every tensor, at its place in a layout."""

    name: str
    tasks: Mapping[str, Task]
    layout: Layout


def merged_model(name: str, plan: Plan) -> Model:
    """The model that a plan would save; shards make no difference."""
    layout = lay_out([step.spec for step in plan.steps], {}, plan.recipe.output_path)
    tasks = {s.spec.name: Task(s.spec, s.program, layout.starts[s.spec.name]) for s in plan.steps}
    return Model(name, tasks, layout)


def source_model(plan: Plan, source: Source, needed: Callable[[TensorSpec], bool]) -> Model | None:
    """A source as a model of the same tensors as the plan's output, each as it is stored.

    needed  whether a tensor of the output matters; others may be missing
    None where the source lacks a tensor or has it in another shape: it is another architecture.
    """
    own = {actual: usual for usual, actual in plan.base.names.items()}
    index = plan.sources.index(source)
    made: dict[str, Task] = {}
    for step in plan.steps:
        name = step.spec.name
        actual = source.names.get(own.get(name, name))
        if actual is None or not step.spec.is_float:
            if step.spec.is_float and needed(step.spec):
                return None
            made[name] = Task(step.spec, step.program, 0)
            continue
        spec = source.checkpoint[actual]
        if spec.shape != step.spec.shape:
            return None
        made[name] = Task(
            TensorSpec(name, spec.dtype, spec.shape), Copy(Read(index, actual, spec)), 0
        )
    layout = lay_out([task.spec for task in made.values()], {}, source.checkpoint.path)
    tasks = {name: Task(t.spec, t.program, layout.starts[name]) for name, t in made.items()}
    return Model(source.name, tasks, layout)


@dataclass(frozen=True)
class Distance:
    """How far apart the weights of two models are, over the tensors in which models differ.

    squares    sum of squared differences
    reference  sum of squares of the second model's weights
    """

    squares: float
    reference: float

    def plus(self, other: Distance) -> Distance:
        """Both together."""
        return Distance(self.squares + other.squares, self.reference + other.reference)

    @property
    def relative(self) -> float:
        """|a - b| / |b|; 0 where neither holds anything."""
        return float((self.squares / self.reference) ** 0.5) if self.reference else 0.0


class Variants:
    """Models over the same open sources, and as many of them in memory as fit.

    models  names of tensors are the same in all, shapes too
    plan    whose sources are open
    """

    def __init__(self, models: Sequence[Model], plan: Plan, settings: Settings) -> None:
        self.models = tuple(models)
        self._settings = settings
        self._sources = [source.checkpoint for source in plan.sources]
        self._labels = [source.name for source in plan.sources]
        self._distinct = {name: _distinct([m.tasks[name] for m in self.models])
                          for name in self.models[0].tasks}  # fmt: skip
        self.changing = tuple(n for n, which in self._distinct.items() if max(which))
        self._kept: dict[tuple[str, int], NDArray[np.uint8]] = {}
        self._resident: dict[str, int] = {}

    # --- memory ---

    def kept_bytes(self, numbers: Sequence[int]) -> int:
        """What keeping these models takes: every distinct tensor that changes, once."""
        return sum(
            self.models[number].tasks[name].spec.nbytes
            for name in self.changing
            for number in _first_of_each(self._distinct[name], numbers)
        )

    def groups(self, budget: int) -> list[list[int]]:
        """The models, in order, in runs that fit into so many bytes together; one at least each."""
        made: list[list[int]] = []
        held: set[tuple[str, int]] = set()
        total = 0
        for number, model in enumerate(self.models):
            sizes = {(n, self._distinct[n][number]): model.tasks[n].spec.nbytes
                     for n in self.changing}  # fmt: skip
            more = sum(nbytes for key, nbytes in sizes.items() if key not in held)
            if made and total + more <= budget:
                made[-1].append(number)
            else:
                made.append([number])
                held, total, more = set(), 0, sum(sizes.values())
            held |= sizes.keys()
            total += more
        return made

    def keep(
        self,
        numbers: Sequence[int],
        *,
        pairs: Sequence[tuple[int, int]] = (),
        progress: Callable[[int], None] = lambda nbytes: None,
    ) -> dict[tuple[int, int], Distance]:
        """Make these models in memory, in place of what was kept; one read of every source.

        pairs  (model, reference) whose distance is measured in passing; models beyond `numbers`
               are made for it and not kept
        """
        self._kept = {}
        for name in self.changing:
            for number in _first_of_each(self._distinct[name], numbers):
                nbytes = self.models[number].tasks[name].spec.nbytes
                self._kept[name, self._distinct[name][number]] = np.empty(nbytes, np.uint8)
        return self._pass(numbers, pairs, self._keep_piece, progress)

    def measure(self, pairs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Distance]:
        """The distances alone: reads the sources again."""
        return self._pass([], pairs, lambda *_: None, lambda nbytes: None)

    def stream(
        self,
        number: int,
        sink: Sink,
        *,
        pairs: Sequence[tuple[int, int]] = (),
        progress: Callable[[int], None] = lambda nbytes: None,
    ) -> dict[tuple[int, int], Distance]:
        """Make one model straight into a sink, without keeping it: reads its sources again."""

        def put(name: str, which: int, begin: int, made: NDArray[np.uint8]) -> None:
            if which == self._distinct[name][number]:
                task = self.models[number].tasks[name]
                sink.write(made.data, task.start + byte_offset(task.spec, begin))

        found = self._pass([number], pairs, put, progress)
        self._resident = {name: self._distinct[name][number] for name in self.changing}
        return found

    def is_kept(self, number: int) -> bool:
        """Whether a model can be put into a sink without reading anything."""
        return all((n, self._distinct[n][number]) in self._kept for n in self.changing)

    def is_held(self, number: int) -> bool:
        """Whether the sink holds a model by now."""
        return all(self._resident.get(n) == self._distinct[n][number] for n in self.changing)

    def swap(self, number: int, sink: Sink) -> int:
        """Put a kept model into a sink that holds another: only what differs. Bytes written."""
        written = 0
        for name in self.changing:
            which = self._distinct[name][number]
            if self._resident.get(name) != which:
                data = self._kept[name, which]
                sink.write(data.data, self.models[number].tasks[name].start)
                self._resident[name] = which
                written += data.nbytes
        return written

    def holds(self, number: int) -> None:
        """Say that the sink holds this model by now."""
        self._resident = {name: self._distinct[name][number] for name in self.changing}

    def as_checkpoint(self, number: int, metadata: Mapping[str, str]) -> Checkpoint:
        """A model as a checkpoint that is computed where it is read and not kept."""
        return _Computed(self.models[number], metadata, self._reader(number))

    # --- one read ---

    def _reader(self, number: int) -> Callable[[str, memoryview, int], None]:
        engine = Engine(self._sources, self._labels, self._settings)
        scratch = Scratch()
        last: dict[str, NDArray[np.uint8]] = {}

        def read(name: str, view: memoryview, offset: int) -> None:
            task = self.models[number].tasks[name]
            kept = self._kept.get((name, self._distinct[name][number]))
            if kept is None and is_whole(task.program):
                if name not in last:
                    last.clear()
                    last[name] = np.empty(task.spec.nbytes, np.uint8)
                    with single_threaded():
                        engine.fill(Piece(task, 0, task.spec.numel), last[name], scratch)
                kept = last[name]
            out = np.frombuffer(view, np.uint8)
            if kept is not None:
                out[:] = kept[offset : offset + len(out)]
                return
            bits = DTYPES[task.spec.dtype].bits
            first, end = offset * 8 // bits, (offset + len(out)) * 8 // bits
            for begin in range(first, end, _SPAN):
                piece = Piece(task, begin, min(begin + _SPAN, end))
                low, high = (byte_offset(task.spec, at) - offset for at in (begin, piece.end))
                with single_threaded():
                    engine.fill(piece, out[low:high], scratch)

        return read

    def _keep_piece(self, name: str, which: int, begin: int, made: NDArray[np.uint8]) -> None:
        kept = self._kept.get((name, which))
        if kept is not None:
            spec = self.models[self._distinct[name].index(which)].tasks[name].spec
            low = byte_offset(spec, begin)
            kept[low : low + made.nbytes] = made

    def _pass(
        self,
        numbers: Sequence[int],
        pairs: Sequence[tuple[int, int]],
        put: Callable[[str, int, int, NDArray[np.uint8]], None],
        progress: Callable[[int], None],
    ) -> dict[tuple[int, int], Distance]:
        """Make models span by span, `put` (tensor, which of the distinct, first element, bytes).

        progress  is told of the bytes of distinct tensors of `numbers`
        """
        worker = _Worker(self._sources, self._labels, self._settings)
        references = {number for pair in pairs for number in pair}

        def work(item: tuple[str, int, int]) -> tuple[list[Distance], int]:
            name, begin, end = item
            which = self._distinct[name]
            wanted = {which[number] for number in numbers}
            made: dict[int, NDArray[np.uint8]] = {}
            for each in sorted(wanted | {which[number] for number in references}):
                task = self.models[which.index(each)].tasks[name]
                made[each] = worker.make(Piece(task, begin, end), len(made))
                if each in wanted:
                    put(name, each, begin, made[each])
            worker.forget()
            specs = [model.tasks[name].spec for model in self.models]
            found = [_distance(made, specs, which, a, b) for a, b in pairs]
            return found, sum(made[each].nbytes for each in wanted)

        sums: dict[str, list[Distance]] = {}
        items = list(self._items())
        with single_threaded(), ThreadPoolExecutor(self._settings.threads) as pool:
            try:
                for (name, _, _), (found, nbytes) in zip(items, pool.map(work, items), strict=True):
                    before = sums.get(name)  # spans come in order: sums are the same every time
                    sums[name] = list(map(Distance.plus, before, found)) if before else found
                    progress(nbytes)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        moved = [row for row in sums.values() if any(distance.squares for distance in row)]
        return {
            pair: reduce(Distance.plus, (row[n] for row in moved), Distance(0.0, 0.0))
            for n, pair in enumerate(pairs)
        }

    def _items(self) -> Iterator[tuple[str, int, int]]:
        """(tensor, first element, end) of every span of the tensors that change."""
        for name in self.changing:
            tasks = [model.tasks[name] for model in self.models]
            numel = tasks[0].spec.numel
            step = numel if any(is_whole(task.program) for task in tasks) else _SPAN
            for begin in range(0, numel, max(step, 1)):
                yield name, begin, min(begin + step, numel)


def _distinct(tasks: Sequence[Task]) -> tuple[int, ...]:
    """For every task the number of the first that makes the same bytes, counted without gaps."""
    seen: dict[tuple[object, str], int] = {}
    odd: list[tuple[object, str]] = []  # programs that cannot be hashed: those with adapters
    found = []
    for task in tasks:
        key = (task.program, task.spec.dtype)
        try:
            found.append(seen.setdefault(key, len(seen) + len(odd)))
        except TypeError:
            if key not in odd:
                odd.append(key)
            found.append(-1 - odd.index(key))
    numbers = {each: number for number, each in enumerate(dict.fromkeys(found))}
    return tuple(numbers[each] for each in found)


def _first_of_each(which: Sequence[int], numbers: Sequence[int]) -> list[int]:
    """The first of these models for every distinct tensor among them."""
    firsts: dict[int, int] = {}
    for number in numbers:
        firsts.setdefault(which[number], number)
    return list(firsts.values())


def _distance(
    made: Mapping[int, NDArray[np.uint8]],
    specs: Sequence[TensorSpec],
    which: Sequence[int],
    first: int,
    second: int,
) -> Distance:
    """Of one span; integers have none."""
    if not specs[second].is_float:
        return Distance(0.0, 0.0)
    reference = as_tensor(made[which[second]], specs[second].dtype).float()
    squares = 0.0
    if which[first] != which[second]:
        change = as_tensor(made[which[first]], specs[first].dtype).float().sub_(reference)
        squares = float(change.dot(change))
    return Distance(squares, float(reference.dot(reference)))


@dataclass
class _Local(threading.local):
    """One thread's memory: what it has read for the span in hand, scratch, and output buffers."""

    reads: dict[tuple[int, str, int, int], bytes] = field(default_factory=dict)
    scratch: Scratch = field(default_factory=Scratch)
    buffers: list[Buffer] = field(default_factory=list)


class _Worker:
    """Makes pieces; what several pieces of one span read is read once."""

    def __init__(
        self, sources: Sequence[Checkpoint], labels: Sequence[str], settings: Settings
    ) -> None:
        self._local = _Local()
        shared = [_Shared(number, source, self._local) for number, source in enumerate(sources)]
        self._engine = Engine(shared, labels, settings)

    def make(self, piece: Piece, buffer: int) -> NDArray[np.uint8]:
        """The bytes of a piece, in this thread's buffer of that number until `forget`."""
        buffers = self._local.buffers
        while len(buffers) <= buffer:
            buffers.append(Buffer(piece.nbytes))
        made = buffers[buffer].view(piece.nbytes)
        self._engine.fill(piece, made, self._local.scratch)
        return made

    def forget(self) -> None:
        """The span is done: let go of what was read for it."""
        self._local.reads.clear()


@dataclass(frozen=True, eq=False)
class _Shared:
    """A source that reads every run of bytes once for a span."""

    number: int
    source: Checkpoint
    local: _Local

    def read_into(self, name: str, view: memoryview, offset: int = 0) -> None:
        key = (self.number, name, offset, len(view))
        found = self.local.reads.get(key)
        if found is None:
            self.source.read_into(name, view, offset)
            self.local.reads[key] = bytes(view)
        else:
            view[:] = found


class _Computed(Checkpoint):
    """A checkpoint without a file."""

    def __init__(
        self,
        model: Model,
        metadata: Mapping[str, str],
        read: Callable[[str, memoryview, int], None],
    ) -> None:
        specs = {spec.name: spec for spec in model.layout.specs}
        super().__init__(model.layout.path, (), metadata, tensors=Tensors(specs, {}))
        self._read = read

    def read_into(self, name: str, view: memoryview, offset: int = 0) -> None:
        """As `Checkpoint.read_into`."""
        self._read(name, view, offset)


def memory_for(device_bytes: int, free: int | None) -> int:
    """Bytes that models may be kept in, of `free` ones, where pictures take `device_bytes` too.

    2 GB stay free; where the system does not tell what is free, 4 GB are taken to be.
    """
    return max(0, (free if free is not None else 4_000_000_000) - device_bytes - 2_000_000_000)
