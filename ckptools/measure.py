"""Numbers about stored values, streamed: statistics of one model, differences of two, Gram of many.

All sums are plain sums, so tensor + tensor = block, block + block = component. Needs numpy, never
torch: its start would take longer than most comparisons. Must not know families or reports.

Blocks of 2^18 elements are read and decoded to fp32 (fp64 where a dtype needs it) in reused
scratch; sums of 8,192 products are taken in fp32 and added in fp64. Whatever that cannot hold (NaN,
Inf, squares that overflow or vanish) is measured again in fp64. Much is shared among processes,
little among threads; results do not depend on how many there are.
"""

from __future__ import annotations

import math
import mmap
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

import numpy as np

from ckptools.codec import PLAIN, aligned, decode
from ckptools.crew import CAN_FORK, in_order, usable_cores
from ckptools.tensors import DTYPES, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 1 << 18  # half of it stays in a core's own cache, but calls then cost more than that saves
SPAN_BYTES = 1 << 22
FORK_BYTES = 1 << 26  # less is read and measured sooner than processes are started
THREADS = 2  # more wait for one another
_MOST = 8  # processes, as each takes a few MB
_QUEUED = 4  # batches for each process that are in work or wait for their turn
_CHUNK = 8192  # a dot product of this length is one thread's in every BLAS
_ROW = 2048  # of the four whose sums one product with ones takes, one thread's like that
_SNIFF = 512  # blocks that differ mostly differ here already
_OPAQUE = ("packed", "complex")
_TINY = 1e-15  # differences whose fp32 squares may vanish

Advance = Callable[[int], None]


class Source(Protocol):
    """What is measured: a `Checkpoint`, or anything like it."""

    def __getitem__(self, name: str, /) -> TensorSpec:
        """What the tensor is."""

    def read_into(self, name: str, view: memoryview, offset: int = 0) -> None:
        """Fill `view` with a tensor's bytes from byte `offset` of the tensor on."""


def _no_progress(nbytes: int) -> None:
    """Progress that nobody watches."""


# --- results -----------------------------------------------------------------------------------


_Join = Callable[[list[Any]], Any]
_EXTREMES: Mapping[str, _Join] = {"min": min, "max": max}
_OF_PAIRS: Mapping[str, _Join] = {"max_abs": max, "same_bits": all}


class _Sum:
    """Addition of dataclasses, field by field; `_joined` names the fields that do not add up."""

    _joined: ClassVar[Mapping[str, _Join]] = {}

    def __add__(self, other: Self) -> Self:
        return self.total([self, other])

    @classmethod
    def total(cls, parts: Iterable[Self]) -> Self:
        """All of them added, which is faster than one by one."""
        parts = list(parts)
        if not parts:
            return cls()
        values = {}
        for item in fields(cls):  # type: ignore[arg-type]  # every subclass is a dataclass
            join = cls._joined.get(item.name, sum)
            values[item.name] = join([getattr(part, item.name) for part in parts])
        return cls(**values)


@dataclass(frozen=True)
class Values(_Sum):
    """Statistics of one model's values; `+` joins those of several tensors.

    count      elements, NaN and Inf among them
    nan, inf   how many are; the sums, min and max leave them out
    zeros      how many are zero
    denormals  how many are smaller than the smallest normal number of the stored dtype
    min, max   inf and -inf where there is no finite value
    """

    count: int = 0
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    denormals: int = 0
    sum: float = 0.0
    sum_squares: float = 0.0
    min: float = math.inf
    max: float = -math.inf

    _joined = _EXTREMES

    @property
    def finite(self) -> int:
        """How many values are neither NaN nor Inf."""
        return self.count - self.nan - self.inf

    @property
    def norm(self) -> float:
        """L2 norm."""
        return math.sqrt(self.sum_squares)

    @property
    def mean(self) -> float:
        """Mean; NaN without finite values."""
        return self.sum / self.finite if self.finite else math.nan

    @property
    def std(self) -> float:
        """Standard deviation of the population; NaN without finite values."""
        if not self.finite:
            return math.nan
        if self.min == self.max:
            return 0.0
        variance = self.sum_squares / self.finite - self.mean * self.mean
        return math.sqrt(variance) if not variance < 0.0 else 0.0


@dataclass(frozen=True)
class Pair(_Sum):
    """How the values of A and B differ; `+` joins those of several tensors.

    count        elements
    changed      elements whose values differ: -0 equals 0, NaN equals NaN
    nonfinite    elements that are NaN or Inf in A or in B; the sums and max_abs leave them out
    max_abs      largest |A - B|
    sum_abs      sum of |A - B|
    sum_squares  sum of (A - B)^2
    a_squares    sum of A^2; b_squares: sum of B^2. Where no bit differs in all that was measured
                 together nothing is decoded, and these (and nonfinite) are 0
    same_bits    dtype and bytes are equal too
    """

    count: int = 0
    changed: int = 0
    nonfinite: int = 0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    sum_squares: float = 0.0
    a_squares: float = 0.0
    b_squares: float = 0.0
    same_bits: bool = True

    _joined = _OF_PAIRS

    @property
    def dot(self) -> float:
        """Sum of A * B, by the law of cosines."""
        return (self.a_squares + self.b_squares - self.sum_squares) / 2

    @property
    def distance(self) -> float:
        """L2 norm of A - B."""
        return math.sqrt(self.sum_squares)

    @property
    def without_norms(self) -> Pair:
        """How much is changed, and not by how much."""
        return Pair(self.count, self.changed, self.nonfinite, same_bits=self.same_bits)

    @property
    def mean_abs(self) -> float:
        """Mean of |A - B| over all elements; 0 without any."""
        return self.sum_abs / self.count if self.count else 0.0

    @property
    def changed_share(self) -> float:
        """Share of elements that differ, 0 to 1."""
        return self.changed / self.count if self.count else 0.0

    @property
    def rel_l2(self) -> float:
        """|A - B| / |A|: 0 where nothing differs, Inf where A is zero and B is not."""
        if not self.sum_squares:
            return 0.0
        return math.sqrt(self.sum_squares / self.a_squares) if self.a_squares else math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between A and B: 1 where nothing differs, NaN where one is zero."""
        if not self.sum_squares:
            return 1.0
        norms = math.sqrt(self.a_squares) * math.sqrt(self.b_squares)
        return max(-1.0, min(1.0, self.dot / norms)) if norms else math.nan


@dataclass(frozen=True)
class Gram:
    """Sums of products of N models' values, `matrix[i, j]` = sum of X_i * X_j, fp64.

    `+` joins those of several tensors. count: elements; nonfinite: elements left out because some
    model has NaN or Inf there.
    """

    matrix: NDArray[np.float64]
    count: int = 0
    nonfinite: int = 0

    def __add__(self, other: Gram) -> Gram:
        return Gram(
            self.matrix + other.matrix, self.count + other.count, self.nonfinite + other.nonfinite
        )

    def combined(self, rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
        """The Gram matrix of linear combinations of the models: R G R^T, (len(rows), len(rows)).

        >>> Gram(np.eye(2)).combined([[1.0, -1.0]])  # |A - B|^2 of two orthogonal models
        array([[2.]])
        """
        weights = np.asarray(rows, np.float64)
        result: NDArray[np.float64] = weights @ self.matrix @ weights.T
        return result


# --- what to measure ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The same tensor in one or several models, measured together.

    key      what the result is called
    reads    (source, tensor name) of each model
    """

    key: str
    reads: tuple[tuple[Source, str], ...]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What the tensor is in each model."""
        return tuple(source[name] for source, name in self.reads)

    @property
    def nbytes(self) -> int:
        """Bytes to read, of all models together."""
        return sum(spec.nbytes for spec in self.specs)


def rows_of(sources: Sequence[Source], names: Iterable[str]) -> list[Row]:
    """Rows of tensors that have the same name in every source."""
    return [Row(name, tuple((source, name) for source in sources)) for name in names]


def common_shape(specs: Sequence[TensorSpec]) -> tuple[int, ...] | None:
    """The part that tensors of unequal shapes have in common; None where they have nothing to do.

    Dims of size 1 do not count, so a linear layer [320, 320] equals a 1x1 convolution. Unequal
    shapes have a common part where only dim 1, the input channels, differs. Packed and complex
    dtypes are measured as the bytes they are, so they have one only with the same dtype.
    """
    dtypes = {spec.dtype for spec in specs}
    if len(dtypes) > 1 and any(DTYPES[dtype].kind in _OPAQUE for dtype in dtypes):
        return None
    shapes = [tuple(size for size in spec.shape if size != 1) for spec in specs]
    if len(set(shapes)) == 1:
        return shapes[0]
    shapes = [spec.shape for spec in specs]
    if len({(len(shape), shape[:1], shape[2:]) for shape in shapes}) > 1 or len(shapes[0]) < 2:
        return None
    return (shapes[0][0], min(shape[1] for shape in shapes), *shapes[0][2:])


def measure_values(
    rows: Iterable[Row], *, threads: int | None = None, advance: Advance = _no_progress
) -> dict[str, Values]:
    """Statistics of every row's first model, by key.

    threads  how many work at once: processes, where there is much to read and the system can fork;
             by default as many as there are cores, but two where they are threads
    advance  is told the bytes that were read, from any thread but never two at a time
    """
    found = _measure(rows, _values_of, threads, advance)
    return {key: Values.total(values) for key, values in found.items()}


def measure_pairs(
    rows: Iterable[Row], *, threads: int | None = None, advance: Advance = _no_progress
) -> dict[str, Pair]:
    """How the two models of every row differ, by key.

    Bytes are compared first; while all are equal nothing is decoded. Rows whose shapes differ are
    measured in their common part; a ValueError where they have none.
    """
    pieces = list(_cut(rows))
    with closing(mmap.mmap(-1, 1)) as differ:  # forks see it too

        def first_look(piece: _Piece, scratch: _Scratch) -> Pair | None:
            looks = not differ[0] and piece.is_of_one_dtype
            if looks and all(block.is_same for block in _blocks(piece, scratch)):
                return None  # norms are wanted only if something, somewhere, differs
            differ[0] = 1
            return _pair_of(piece, scratch)

        found = _run(pieces, first_look, threads, advance)
        open_at = [at for at, pair in enumerate(found) if pair is None]
        if differ[0] and open_at:
            # the same bytes a second time, out of the page cache: they are no progress
            closed = _run([pieces[at] for at in open_at], _pair_of, threads, _no_progress)
            for at, pair in zip(open_at, closed, strict=True):
                found[at] = pair
    by_key: dict[str, list[Pair]] = {}
    for piece, measured in zip(pieces, found, strict=True):
        by_key.setdefault(piece.row.key, []).append(measured or Pair(count=piece.length))
    return {key: Pair.total(pairs) for key, pairs in by_key.items()}


def measure_gram(
    rows: Iterable[Row], *, threads: int | None = None, advance: Advance = _no_progress
) -> dict[str, Gram]:
    """The Gram matrix of every row's models, by key; all rows have equally many models."""
    found = _measure(rows, _gram_of, threads, advance)
    return {key: reduce(operator.add, grams) for key, grams in found.items()}


def _measure(
    rows: Iterable[Row],
    work: Callable[[_Piece, _Scratch], Result],
    threads: int | None,
    advance: Advance,
) -> dict[str, list[Result]]:
    """The work's results for the pieces of every row, by key."""
    pieces = list(_cut(rows))
    found: dict[str, list[Result]] = {}
    for piece, result in zip(pieces, _run(pieces, work, threads, advance), strict=True):
        found.setdefault(piece.row.key, []).append(result)
    return found


# --- streaming ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Elements [begin, end) of a row; all of it where shapes differ."""

    row: Row
    specs: tuple[TensorSpec, ...]
    begin: int
    end: int
    crop: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Elements that are measured."""
        return math.prod(self.crop) if self.crop is not None else self.end - self.begin

    @property
    def nbytes(self) -> int:
        """Bytes that are read, of all models together."""
        if self.crop is not None:
            return sum(spec.nbytes for spec in self.specs)
        return sum((self.end - self.begin) * _width(spec.dtype) for spec in self.specs)

    @property
    def is_of_one_dtype(self) -> bool:
        """Whether all models store it alike."""
        return len({spec.dtype for spec in self.specs}) == 1


def _cut(rows: Iterable[Row]) -> Iterator[_Piece]:
    for row in rows:
        specs = row.specs
        common = common_shape(specs)
        if common is None:
            raise ValueError(f"{row.key!r} has shapes without a common part")
        if len({spec.numel for spec in specs}) > 1:
            yield _Piece(row, specs, 0, max(spec.numel for spec in specs), common)
            continue
        if any(DTYPES[spec.dtype].kind in _OPAQUE for spec in specs):
            specs = tuple(TensorSpec(s.name, "U8", (s.nbytes,)) for s in specs)
        step = SPAN_BYTES // max(_width(spec.dtype) for spec in specs)
        numel = specs[0].numel
        for begin in range(0, max(numel, 1), step):
            yield _Piece(row, specs, begin, min(begin + step, numel))


def _width(dtype: str) -> int:
    return DTYPES[dtype].bits // 8


class _Scratch:
    """Reused memory of one thread or process: what was read, and arrays to compute in."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}

    def array(self, dtype: str, size: int) -> NDArray[Any]:
        """The array of this dtype, to write into; contents undefined."""
        found = self._arrays.get(dtype)
        if found is None or found.size < size:
            found = self._arrays[dtype] = aligned(size, dtype)
        return found[:size]


@dataclass
class _Block:
    """The same elements of every model, and scratch to measure them in.

    stored  their bytes, model by model, each followed by zeros up to a multiple of 8,192 elements:
            zeros add nothing to any sum, and nothing has a tail
    length  elements without these zeros; size: with them
    """

    dtypes: tuple[str, ...]
    stored: NDArray[np.uint8]
    length: int
    size: int
    scratch: _Scratch

    def data(self, number: int) -> NDArray[np.uint8]:
        """The bytes of one model's elements alone."""
        begin = sum(self.size * _width(dtype) for dtype in self.dtypes[:number])
        return self.stored[begin : begin + self.length * _width(self.dtypes[number])]

    @property
    def is_same(self) -> bool:
        """Whether two models hold the same bytes of the same dtype."""
        half = self.stored.size // 2
        one, two = self.stored[:half], self.stored[half:]
        if self.dtypes[0] != self.dtypes[1] or one[:_SNIFF].tobytes() != two[:_SNIFF].tobytes():
            return False
        mask = self.scratch.array("?", half // 8)
        return not np.not_equal(one.view(np.uint64), two.view(np.uint64), out=mask).any()

    @property
    def is_long(self) -> bool:
        """Whether both models hold integers that fp64 cannot tell apart."""
        return self.dtypes in (("I64", "I64"), ("U64", "U64"))

    def decode(self, number: int, kind: str) -> NDArray[Any]:
        """One model's elements as `kind`, "f4" or "f8"; not to be written into."""
        out = np.empty(self.length, kind)
        return decode(self.data(number), self.dtypes[number], out)

    def decode_all(self, kind: str) -> NDArray[Any]:
        """All elements as `kind`, zeros too; (models, size), and not to be written into."""
        out = self.scratch.array(kind, len(self.dtypes) * self.size)
        wide = out.reshape(-1, self.size)
        if self.dtypes.count(self.dtypes[0]) == len(self.dtypes):
            return decode(self.stored, self.dtypes[0], out).reshape(wide.shape)
        begin = 0
        for row, dtype in zip(wide, self.dtypes, strict=True):
            end = begin + self.size * _width(dtype)
            np.copyto(row, decode(self.stored[begin:end], dtype, row))
            begin = end
        return wide


def _blocks(piece: _Piece, scratch: _Scratch) -> Iterator[_Block]:
    """The piece block by block; each is gone when the next is read."""
    dtypes = tuple(spec.dtype for spec in piece.specs)
    widths = [_width(dtype) for dtype in dtypes]
    cropped = [_cropped(piece, n) for n in range(len(dtypes))] if piece.crop is not None else []
    for begin in range(0, piece.length, BLOCK):
        length = min(BLOCK, piece.length - begin)
        size = -(-length // _CHUNK) * _CHUNK
        stored = scratch.array("u1", size * sum(widths))
        at = 0
        for number, width in enumerate(widths):
            end = at + length * width
            if cropped:
                stored[at:end] = cropped[number][begin * width : (begin + length) * width]
            else:
                source, name = piece.row.reads[number]
                source.read_into(name, stored[at:end].data, (piece.begin + begin) * width)
            at += size * width
            if end < at:
                stored[end:at] = 0
        yield _Block(dtypes, stored, length, size, scratch)


def _cropped(piece: _Piece, number: int) -> NDArray[np.uint8]:
    """The bytes of a tensor's part that all models have: small, and rare."""
    spec, (source, name) = piece.specs[number], piece.row.reads[number]
    whole = np.empty((*spec.shape, _width(spec.dtype)), np.uint8)
    if whole.size and piece.crop is not None:
        source.read_into(name, memoryview(whole.reshape(-1).data))
        whole = whole[:, : piece.crop[1]]
    return np.ascontiguousarray(whole).reshape(-1)


Result = TypeVar("Result")
_Work = Callable[[_Piece, _Scratch], Result]


def _run(
    pieces: Sequence[_Piece], work: _Work[Result], threads: int | None, advance: Advance
) -> list[Result]:
    """The work's result for every piece, in order; the first error ends it all."""
    batches = list(_batched(pieces))
    is_much = sum(piece.nbytes for piece in pieces) >= FORK_BYTES
    if CAN_FORK and is_much and (processes := threads or min(usable_cores(), _MOST)) > 1:
        found = _in_processes(batches, work, min(processes, len(batches)), advance)
    else:
        found = _in_threads(batches, work, min(threads or THREADS, len(batches)), advance)
    return [result for results in found for result in results]


def _batched(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Neighbours together, as most tensors are small."""
    batch: list[_Piece] = []
    nbytes = 0
    for piece in pieces:
        batch.append(piece)
        nbytes += piece.nbytes
        if nbytes >= SPAN_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _in_processes(
    batches: Sequence[list[_Piece]], work: _Work[Result], workers: int, advance: Advance
) -> list[list[Result]]:
    scratch = _Scratch()  # every fork has its own

    def measure(item: int, _: int) -> list[Result]:
        return [work(piece, scratch) for piece in batches[item]]

    found = []
    slots = workers * _QUEUED
    with closing(in_order(measure, len(batches), workers=workers, slots=slots)) as answers:
        for batch, results in zip(batches, answers, strict=True):
            found.append(results)
            advance(sum(piece.nbytes for piece in batch))
    return found


def _in_threads(
    batches: Sequence[list[_Piece]], work: _Work[Result], workers: int, advance: Advance
) -> list[list[Result]]:
    found: dict[int, list[Result]] = {}
    errors: list[BaseException] = []
    lock = threading.Lock()
    queue = iter(enumerate(batches))

    def take() -> tuple[int, list[_Piece]] | None:
        with lock:
            return None if errors else next(queue, None)

    def loop() -> None:
        scratch = _Scratch()
        try:
            while (item := take()) is not None:
                number, batch = item
                found[number] = [work(piece, scratch) for piece in batch]
                with lock:
                    advance(sum(piece.nbytes for piece in batch))
        except BaseException as exc:  # handed to the caller, below
            errors.append(exc)

    others = [threading.Thread(target=loop) for _ in range(workers - 1)]
    for other in others:
        other.start()
    try:
        loop()
    finally:
        for other in others:
            other.join()
    if errors:
        raise errors[0]
    return [found[number] for number in range(len(batches))]


# --- decoding ----------------------------------------------------------------------------------

_NEEDS_F64 = frozenset({"F64", "I32", "U32", "I64", "U64"})
_F16_LIMIT = 2.0**32  # the square of what exponent 31 becomes
# Where what is asked for is a small difference of fp32 sums, these are made in fp64:
_ALIKE = 0.01  # B's squares beside A's, for what they have in common
_SPREAD = 0.01  # the variance beside the squared mean
_SMALLEST = {
    "F64": 2.0**-1022, "F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-14, "F8_E5M2": 2.0**-14,
    "F8_E4M3": 2.0**-6, "F8_E5M2FNUZ": 2.0**-15, "F8_E4M3FNUZ": 2.0**-7,
}  # fmt: skip


def wide_kind(dtypes: Iterable[str]) -> str:
    """The numpy kind in which tensors of these dtypes are measured, "f4" or "f8"."""
    return "f8" if _NEEDS_F64.intersection(dtypes) else "f4"


# --- arithmetic --------------------------------------------------------------------------------

_ONES = {kind: np.ones(_ROW, kind) for kind in ("f4", "f8")}
_BITS = {"f4": np.int32, "f8": np.int64}
_ALL_BUT_SIGN: Mapping[str, Any] = {"f4": np.int32(2**31 - 1), "f8": np.int64(2**63 - 1)}


def _dots(one: NDArray[Any], two: NDArray[Any]) -> list[float]:
    """Dot products of chunks of two equally long arrays; their sum is the dot product."""
    chunks = np.matmul(one.reshape(-1, 1, _CHUNK), two.reshape(-1, _CHUNK, 1))
    found: list[float] = chunks.reshape(-1).tolist()
    return found


def _sum(values: NDArray[Any], kind: str) -> float:
    """The sum, as products with ones: twice as fast as adding."""
    rows = np.matmul(values.reshape(-1, _CHUNK // _ROW, _ROW), _ONES[kind])
    found: float = sum(rows.reshape(-1).tolist())
    return found


def _count(mask: NDArray[Any]) -> int:
    return int(np.count_nonzero(mask))


def _fits(dtypes: Iterable[str], *squares: float) -> bool:
    """Whether fp32 sums of squares tell the truth: nothing overflowed, no F16 was Inf or NaN."""
    limit = _F16_LIMIT if "F16" in dtypes else math.inf
    return all(total < limit for total in squares)


@np.errstate(over="ignore", invalid="ignore", under="ignore")
def _pair_of(piece: _Piece, scratch: _Scratch) -> Pair:
    pairs = [
        _equal_pair(block) if block.is_same else _fast_pair(block) or _careful_pair(block)
        for block in _blocks(piece, scratch)
    ]
    return Pair.total(pairs) if pairs else Pair(same_bits=piece.is_of_one_dtype)


def _equal_pair(block: _Block) -> Pair:
    """One block of two models that hold the same bytes: norms alone."""
    wide, nonfinite = block.decode_all(wide_kind(block.dtypes))[0], 0
    squares = sum(_dots(wide, wide))
    if not _fits(block.dtypes, squares):
        exact = block.decode(0, "f8")
        finite = exact[np.isfinite(exact)]
        nonfinite = exact.size - finite.size
        squares = float((finite * finite).sum())
    return Pair(count=block.length, nonfinite=nonfinite, a_squares=squares, b_squares=squares)


def _fast_pair(block: _Block) -> Pair | None:
    """The difference in one block; None where it has to be measured with care."""
    kind = wide_kind(block.dtypes)
    wide = block.decode_all(kind)
    dots = _dots(wide, wide)
    chunks = block.size // _CHUNK
    a_squares, b_squares = sum(dots[:chunks]), sum(dots[chunks:])
    small, large = sorted((a_squares, b_squares))
    if not _fits(block.dtypes, a_squares, b_squares) or 0.0 < small < large * _ALIKE:
        return None
    # in place of A where it was decoded: what is in use then stays in the cache
    delta = np.subtract(wide[0], wide[1], out=block.scratch.array(kind, block.size))
    sum_squares = sum(_dots(delta, delta))
    bits: NDArray[Any] = delta.view(_BITS[kind])
    np.bitwise_and(bits, _ALL_BUT_SIGN[kind], out=bits)  # the sizes from here on
    max_abs = float(np.maximum.reduce(delta))
    if not math.isfinite(sum_squares) or 0 < max_abs < _TINY:
        return None
    return Pair(
        count=block.length,
        changed=_count(bits) if not block.is_long else _changed_long(block),
        max_abs=max_abs,
        sum_abs=_sum(delta, kind),
        sum_squares=sum_squares,
        a_squares=a_squares,
        b_squares=b_squares,
        same_bits=False,
    )


def _changed_long(block: _Block) -> int:
    return _count(block.data(0).view("<u8") != block.data(1).view("<u8"))


def _careful_pair(block: _Block) -> Pair:
    """The difference in one block, whatever it holds, in fp64."""
    a, b = block.decode(0, "f8"), block.decode(1, "f8")
    differs = (a != b) & ~(np.isnan(a) & np.isnan(b))
    changed = _count(differs) if not block.is_long else _changed_long(block)
    finite = np.isfinite(a) & np.isfinite(b)
    delta = np.abs(a[finite] - b[finite])
    return Pair(
        count=a.size,
        changed=changed,
        nonfinite=a.size - _count(finite),
        max_abs=float(delta.max(initial=0.0)),
        sum_abs=float(delta.sum()),
        sum_squares=float((delta * delta).sum()),
        a_squares=float((a[finite] ** 2).sum()),
        b_squares=float((b[finite] ** 2).sum()),
        same_bits=False,
    )


@np.errstate(over="ignore", invalid="ignore", under="ignore")
def _values_of(piece: _Piece, scratch: _Scratch) -> Values:
    blocks = _blocks(piece, scratch)
    return Values.total(_fast_values(block) or _careful_values(block) for block in blocks)


def _fast_values(block: _Block) -> Values | None:
    """Statistics of one block; None where it has to be measured with care."""
    kind = wide_kind(block.dtypes)
    padded = block.decode_all(kind)[0]
    squares = sum(_dots(padded, padded))
    if not _fits(block.dtypes, squares):
        return None
    a = padded[: block.length]
    low, high = float(np.minimum.reduce(a)), float(np.maximum.reduce(a))
    if 0 < max(-low, high) < _TINY:
        return None
    total = _sum(padded, kind)
    square = total * total / block.length  # of the mean, as often as there are values
    if squares - square < square * _SPREAD:
        return None
    # in place of the values where they were decoded: what is in use then stays in the cache
    size = np.abs(a, out=block.scratch.array(kind, block.length))
    zeros = block.length - _count(size.view(_BITS[kind]))
    mask = block.scratch.array("?", block.length)
    small = _count(np.less(size, _SMALLEST.get(block.dtypes[0], 0.0), out=mask))
    return Values(
        count=block.length,
        zeros=zeros,
        denormals=max(small - zeros, 0),
        sum=total,
        sum_squares=squares,
        min=low,
        max=high,
    )


def _careful_values(block: _Block) -> Values:
    a = block.decode(0, "f8")
    finite = a[np.isfinite(a)]
    nan, zeros = _count(np.isnan(a)), _count(finite == 0)
    small = _count(np.abs(finite) < _SMALLEST.get(block.dtypes[0], 0.0))
    return Values(
        count=a.size,
        nan=nan,
        inf=a.size - finite.size - nan,
        zeros=zeros,
        denormals=max(small - zeros, 0),
        sum=float(finite.sum()),
        sum_squares=float((finite * finite).sum()),
        min=float(finite.min(initial=math.inf)),
        max=float(finite.max(initial=-math.inf)),
    )


@np.errstate(over="ignore", invalid="ignore", under="ignore")
def _gram_of(piece: _Piece, scratch: _Scratch) -> Gram:
    models = len(piece.specs)
    matrix, nonfinite = np.zeros((models, models)), 0
    for block in _blocks(piece, scratch):
        stack = np.empty((models, block.length))
        for number, dtype in enumerate(block.dtypes):
            stack[number] = block.decode(number, wide_kind((dtype,)))
            if not _fits((dtype,), float(np.abs(stack[number]).max() ** 2)):
                stack[number] = block.decode(number, "f8")
        finite = np.isfinite(stack).all(axis=0)
        if not finite.all():
            stack = stack[:, finite]
            nonfinite += block.length - stack.shape[1]
        for at in range(0, stack.shape[1], _CHUNK):
            chunk = stack[:, at : at + _CHUNK]
            matrix += chunk @ chunk.T
    return Gram(matrix, piece.length, nonfinite)


# --- rounding ----------------------------------------------------------------------------------


def measure_rounding(
    rows: Iterable[Row], *, threads: int | None = None, advance: Advance = _no_progress
) -> dict[str, bool]:
    """Whether the second model's bits are the first's rounded to nearest, ties to even, by key.

    Answers for F32 and F64 rounded to F16, BF16 and F32; False for every other pair of dtypes.
    """
    found = _measure(rows, _is_rounded, threads, advance)
    return {key: all(rounded) for key, rounded in found.items()}


@np.errstate(over="ignore", invalid="ignore", under="ignore")
def _is_rounded(piece: _Piece, scratch: _Scratch) -> bool:
    wide, narrow = (spec.dtype for spec in piece.specs)
    if wide not in ("F32", "F64") or narrow not in ("F16", "BF16", "F32"):
        return False
    return all(_is_rounded_block(block) for block in _blocks(piece, scratch))


def _is_rounded_block(block: _Block) -> bool:
    wide, narrow = block.dtypes
    values, stored = block.data(0).view(PLAIN[wide]), block.data(1)
    if narrow == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return bool((rounded == stored.view("<u2")).all())
    rounded = values.astype("<f2" if narrow == "F16" else "<f4")
    return bool((rounded.view(np.uint8) == stored).all())
