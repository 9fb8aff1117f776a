"""Numbers about stored values, streamed: statistics of one model, differences of two, Gram of many.

All sums are plain sums, so tensor + tensor = block, block + block = component. Needs numpy, never
torch: its start would take longer than most comparisons. Must not know families or reports.

Blocks of 2^18 elements are decoded to fp32 (fp64 where a dtype needs it) in reused scratch; sums
of 8,192 products are taken in fp32 and added in fp64. Whatever that cannot hold (NaN, Inf, squares
that overflow or vanish) is measured again in fp64. Results do not depend on the number of threads.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

import numpy as np

from ckptools.codec import PLAIN, decode
from ckptools.tensors import DTYPES, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 1 << 18
SPAN_BYTES = 1 << 20  # with the block: larger ones mean fewer calls that wait for one another
THREADS = 2
_CHUNK = 8192  # a dot product of this length is one thread's in every BLAS
_SNIFF = 4096  # spans that differ mostly differ here already
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


_Join = Callable[[Any, Any], Any]
_EXTREMES: Mapping[str, _Join] = {"min": min, "max": max}
_OF_PAIRS: Mapping[str, _Join] = {"max_abs": max, "same_bits": operator.and_}


class _Sum:
    """Addition of dataclasses, field by field; `_joined` names the fields that do not add up."""

    _joined: ClassVar[Mapping[str, _Join]] = {}

    def __add__(self, other: Self) -> Self:
        values = {}
        for item in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            join = self._joined.get(item.name)
            one, two = getattr(self, item.name), getattr(other, item.name)
            values[item.name] = join(one, two) if join else one + two
        return type(self)(**values)


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
        return math.sqrt(max(self.sum_squares / self.finite - self.mean**2, 0.0))


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
    rows: Iterable[Row], *, threads: int = THREADS, advance: Advance = _no_progress
) -> dict[str, Values]:
    """Statistics of every row's first model, by key.

    advance  is told the bytes that were read, from any thread but never two at a time
    """
    return _measure(rows, _values_of, Values(), threads, advance)


def measure_pairs(
    rows: Iterable[Row], *, threads: int = THREADS, advance: Advance = _no_progress
) -> dict[str, Pair]:
    """How the two models of every row differ, by key.

    Bytes are compared first; while all are equal nothing is decoded. Rows whose shapes differ are
    measured in their common part; a ValueError where they have none.
    """
    differ = threading.Event()

    def first_look(reading: _Reading) -> Pair | None:
        if not differ.is_set() and reading.is_same:
            return None  # norms are wanted only if something, somewhere, differs
        differ.set()
        return _pair_of(reading)

    def again(reading: _Reading) -> Pair:
        return _pair_of(reading)

    pieces = list(_cut(rows))
    found = _run(pieces, first_look, threads, advance)
    open_at = [at for at, pair in enumerate(found) if pair is None]
    if differ.is_set() and open_at:
        # the same bytes a second time, out of the page cache: they are no progress
        closed = _run([pieces[at] for at in open_at], again, threads, _no_progress)
        for at, pair in zip(open_at, closed, strict=True):
            found[at] = pair
    totals: dict[str, Pair] = {}
    for piece, measured in zip(pieces, found, strict=True):
        pair = measured or Pair(count=piece.length)
        totals[piece.row.key] = totals.get(piece.row.key, Pair()) + pair
    return totals


def measure_gram(
    rows: Iterable[Row], *, threads: int = THREADS, advance: Advance = _no_progress
) -> dict[str, Gram]:
    """The Gram matrix of every row's models, by key; all rows have equally many models."""
    rows = list(rows)
    size = len(rows[0].reads) if rows else 0
    return _measure(rows, _gram_of, Gram(np.zeros((size, size))), threads, advance)


Result = TypeVar("Result", Values, Gram)


def _measure(
    rows: Iterable[Row],
    work: Callable[[_Reading], Result],
    nothing: Result,
    threads: int,
    advance: Advance,
) -> dict[str, Result]:
    pieces = list(_cut(rows))
    totals: dict[str, Result] = {}
    for piece, result in zip(pieces, _run(pieces, work, threads, advance), strict=True):
        totals[piece.row.key] = totals.get(piece.row.key, nothing) + result
    return totals


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
    """One thread's reused memory: a buffer per model and blocks to compute in."""

    def __init__(self) -> None:
        self._buffers: list[NDArray[np.uint8]] = []
        self._blocks: dict[tuple[int, str], NDArray[Any]] = {}

    def buffer(self, number: int, nbytes: int) -> NDArray[np.uint8]:
        """The first `nbytes` bytes of a model's buffer."""
        while len(self._buffers) <= number:
            self._buffers.append(np.empty(SPAN_BYTES, np.uint8))
        if nbytes > SPAN_BYTES:  # a tensor that has to be whole: small, and rare
            return np.empty(nbytes, np.uint8)
        return self._buffers[number][:nbytes]

    def block(self, number: int, dtype: str, length: int) -> NDArray[Any]:
        """A block to write into; contents undefined."""
        found = self._blocks.get((number, dtype))
        if found is None:
            found = self._blocks[number, dtype] = np.empty(BLOCK, dtype)
        return found[:length]


class _Reading:
    """The bytes of one piece, of every model, and the scratch to measure them with."""

    def __init__(self, piece: _Piece, scratch: _Scratch) -> None:
        self.piece, self.scratch = piece, scratch
        self.dtypes = tuple(spec.dtype for spec in piece.specs)
        self.data = [self._read(number) for number in range(len(piece.specs))]

    def _read(self, number: int) -> NDArray[np.uint8]:
        piece = self.piece
        spec, (source, name) = piece.specs[number], piece.row.reads[number]
        width = _width(spec.dtype)
        begin, end = (0, spec.numel) if piece.crop is not None else (piece.begin, piece.end)
        data = self.scratch.buffer(number, (end - begin) * width)
        if data.size:
            source.read_into(name, memoryview(data.data), begin * width)
        if piece.crop is None:
            return data
        whole = data.reshape(*spec.shape, width)
        return np.ascontiguousarray(whole[:, : piece.crop[1]]).reshape(-1)

    @property
    def is_same(self) -> bool:
        """Whether the first two models hold the same bytes of the same dtype."""
        one, two = self.data
        if self.dtypes[0] != self.dtypes[1] or not np.array_equal(one[:_SNIFF], two[:_SNIFF]):
            return False
        words = one.size // 8 * 8
        for at in range(0, words, BLOCK):
            wide = slice(at, min(at + BLOCK, words))
            mask = self.scratch.block(0, "?", (wide.stop - at) // 8)
            if np.not_equal(one[wide].view("u8"), two[wide].view("u8"), out=mask).any():
                return False
        return bool((one[words:] == two[words:]).all())

    def blocks(self) -> Iterator[slice]:
        """Elements of the piece, block by block."""
        for begin in range(0, self.piece.length, BLOCK):
            yield slice(begin, min(begin + BLOCK, self.piece.length))

    def stored(self, number: int, part: slice) -> NDArray[np.uint8]:
        """The bytes of some elements of one model."""
        width = _width(self.dtypes[number])
        return self.data[number][part.start * width : part.stop * width]

    def decode(self, number: int, part: slice, kind: str) -> NDArray[Any]:
        """Some elements of one model as `kind`, "f4" or "f8"; not to be written into."""
        out = self.scratch.block(number, kind, part.stop - part.start)
        return decode(self.stored(number, part), self.dtypes[number], out)


Work = TypeVar("Work")


def _run(
    pieces: Sequence[_Piece],
    work: Callable[[_Reading], Work],
    threads: int,
    advance: Advance,
) -> list[Work]:
    """The work's result for every piece, in order; the first error ends it all."""
    results: dict[int, Work] = {}
    errors: list[BaseException] = []
    lock = threading.Lock()
    queue = iter(enumerate(pieces))

    def take() -> tuple[int, _Piece] | None:
        with lock:
            return None if errors else next(queue, None)

    def loop() -> None:
        scratch = _Scratch()
        try:
            while (item := take()) is not None:
                number, piece = item
                results[number] = work(reading := _Reading(piece, scratch))
                with lock:
                    advance(sum(data.size for data in reading.data))
        except BaseException as exc:  # handed to the caller, below
            errors.append(exc)

    workers = [threading.Thread(target=loop) for _ in range(min(threads, len(pieces)) - 1)]
    for worker in workers:
        worker.start()
    try:
        loop()
    finally:
        for worker in workers:
            worker.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(pieces))]


# --- decoding ----------------------------------------------------------------------------------

_NEEDS_F64 = frozenset({"F64", "I32", "U32", "I64", "U64"})
_F16_LIMIT = 2.0**32  # the square of what exponent 31 becomes
_SMALLEST = {
    "F64": 2.0**-1022, "F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-14, "F8_E5M2": 2.0**-14,
    "F8_E4M3": 2.0**-6, "F8_E5M2FNUZ": 2.0**-15, "F8_E4M3FNUZ": 2.0**-7,
}  # fmt: skip


def wide_kind(dtypes: Iterable[str]) -> str:
    """The numpy kind in which tensors of these dtypes are measured, "f4" or "f8"."""
    return "f8" if _NEEDS_F64.intersection(dtypes) else "f4"


# --- arithmetic --------------------------------------------------------------------------------


def _dots(one: NDArray[Any], two: NDArray[Any]) -> NDArray[Any]:
    """Dot products of chunks of two equally long arrays; their sum is the dot product."""
    whole = one.size // _CHUNK * _CHUNK
    left, right = one[:whole].reshape(-1, 1, _CHUNK), two[:whole].reshape(-1, _CHUNK, 1)
    return np.append(np.matmul(left, right).reshape(-1), np.dot(one[whole:], two[whole:]))


_ONES = {kind: np.ones(BLOCK, kind) for kind in ("f4", "f8")}


def _count(mask: NDArray[Any]) -> int:
    return int(np.count_nonzero(mask))


@np.errstate(over="ignore", invalid="ignore", under="ignore")
def _pair_of(reading: _Reading) -> Pair:
    if reading.is_same:
        squares, nonfinite = _squares_of(reading)
        return Pair(
            count=reading.piece.length, nonfinite=nonfinite, a_squares=squares, b_squares=squares
        )
    total = Pair(same_bits=reading.dtypes[0] == reading.dtypes[1] and not reading.piece.length)
    for part in reading.blocks():
        total += _fast_pair(reading, part) or _careful_pair(reading, part)
    return total


def _fits(dtypes: Iterable[str], *chunks: NDArray[Any]) -> bool:
    """Whether fp32 sums of squares tell the truth: nothing overflowed, no F16 was Inf or NaN."""
    limit = _F16_LIMIT if "F16" in dtypes else math.inf
    return all(bool((chunk < limit).all()) for chunk in chunks)


def _squares_of(reading: _Reading) -> tuple[float, int]:
    """The sum of the first model's squares, and how many values it leaves out."""
    total, nonfinite = 0.0, 0
    kind = wide_kind(reading.dtypes)
    for part in reading.blocks():
        a = reading.decode(0, part, kind)
        chunks = _dots(a, a)
        if not _fits(reading.dtypes, chunks):
            wide = reading.decode(0, part, "f8")
            finite = wide[np.isfinite(wide)]
            nonfinite += wide.size - finite.size
            chunks = _dots(finite, finite)
        total += float(chunks.sum(dtype=np.float64))
    return total, nonfinite


def _fast_pair(reading: _Reading, part: slice) -> Pair | None:
    """The difference in one block; None where it has to be measured with care."""
    length = part.stop - part.start
    kind = wide_kind(reading.dtypes)
    a, b = (reading.decode(number, part, kind) for number in (0, 1))
    a_squares, b_squares = _dots(a, a), _dots(b, b)
    if not _fits(reading.dtypes, a_squares, b_squares):
        return None
    delta = np.subtract(a, b, out=reading.scratch.block(2, kind, length))
    squares = _dots(delta, delta)
    mask = reading.scratch.block(0, "?", length)
    changed = _count(np.not_equal(delta, 0, out=mask))
    size = np.abs(delta, out=delta)
    max_abs = float(size.max())
    if not math.isfinite(float(squares.sum())) or 0 < max_abs < _TINY:
        return None
    return Pair(
        count=length,
        changed=changed,
        max_abs=max_abs,
        sum_abs=float(_dots(size, _ONES[kind][:length]).sum(dtype=np.float64)),
        sum_squares=float(squares.sum(dtype=np.float64)),
        a_squares=float(a_squares.sum(dtype=np.float64)),
        b_squares=float(b_squares.sum(dtype=np.float64)),
        same_bits=False,
    )


def _careful_pair(reading: _Reading, part: slice) -> Pair:
    """The difference in one block, whatever it holds, in fp64."""
    a, b = (reading.decode(number, part, "f8") for number in (0, 1))
    differs = (a != b) & ~(np.isnan(a) & np.isnan(b))
    finite = np.isfinite(a) & np.isfinite(b)
    delta = np.abs(a[finite] - b[finite])
    return Pair(
        count=a.size,
        changed=_count(differs),
        nonfinite=a.size - _count(finite),
        max_abs=float(delta.max(initial=0.0)),
        sum_abs=float(delta.sum()),
        sum_squares=float((delta * delta).sum()),
        a_squares=float((a[finite] ** 2).sum()),
        b_squares=float((b[finite] ** 2).sum()),
        same_bits=False,
    )


@np.errstate(over="ignore", invalid="ignore", under="ignore")
def _values_of(reading: _Reading) -> Values:
    total = Values()
    for part in reading.blocks():
        total += _fast_values(reading, part) or _careful_values(reading, part)
    return total


def _fast_values(reading: _Reading, part: slice) -> Values | None:
    """Statistics of one block; None where it has to be measured with care."""
    length, dtype = part.stop - part.start, reading.dtypes[0]
    kind = wide_kind(reading.dtypes)
    a = reading.decode(0, part, kind)
    squares = _dots(a, a)
    if not _fits(reading.dtypes, squares):
        return None
    low, high = float(a.min()), float(a.max())
    if 0 < max(-low, high) < _TINY:
        return None
    size = np.abs(a, out=reading.scratch.block(2, kind, length))
    mask = reading.scratch.block(0, "?", length)
    zeros = length - _count(np.not_equal(size, 0, out=mask))
    small = _count(np.less(size, _SMALLEST.get(dtype, 0.0), out=mask))
    return Values(
        count=length,
        zeros=zeros,
        denormals=max(small - zeros, 0),
        sum=float(_dots(a, _ONES[kind][:length]).sum(dtype=np.float64)),
        sum_squares=float(squares.sum(dtype=np.float64)),
        min=low,
        max=high,
    )


def _careful_values(reading: _Reading, part: slice) -> Values:
    a = reading.decode(0, part, "f8")
    finite = a[np.isfinite(a)]
    nan, zeros = _count(np.isnan(a)), _count(finite == 0)
    small = _count(np.abs(finite) < _SMALLEST.get(reading.dtypes[0], 0.0))
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
def _gram_of(reading: _Reading) -> Gram:
    models = len(reading.dtypes)
    matrix, nonfinite = np.zeros((models, models)), 0
    for part in reading.blocks():
        length = part.stop - part.start
        stack = np.empty((models, length))
        for number, dtype in enumerate(reading.dtypes):
            kind = wide_kind((dtype,))
            stack[number] = reading.decode(number, part, kind)
            if not _fits((dtype,), *np.atleast_2d(np.abs(stack[number]).max() ** 2)):
                stack[number] = reading.decode(number, part, "f8")
        finite = np.isfinite(stack).all(axis=0)
        if not finite.all():
            stack = stack[:, finite]
            nonfinite += length - stack.shape[1]
        for at in range(0, stack.shape[1], _CHUNK):
            chunk = stack[:, at : at + _CHUNK]
            matrix += chunk @ chunk.T
    return Gram(matrix, reading.piece.length, nonfinite)


# --- rounding ----------------------------------------------------------------------------------


def measure_rounding(
    rows: Iterable[Row], *, threads: int = THREADS, advance: Advance = _no_progress
) -> dict[str, bool]:
    """Whether the second model's bits are the first's rounded to nearest, ties to even, by key.

    Answers for F32 and F64 rounded to F16, BF16 and F32; False for every other pair of dtypes.
    """
    pieces = list(_cut(rows))
    totals: dict[str, bool] = {}
    for piece, rounded in zip(pieces, _run(pieces, _is_rounded, threads, advance), strict=True):
        totals[piece.row.key] = totals.get(piece.row.key, True) and rounded
    return totals


@np.errstate(over="ignore", invalid="ignore", under="ignore")
def _is_rounded(reading: _Reading) -> bool:
    wide, narrow = reading.dtypes
    if wide not in ("F32", "F64") or narrow not in ("F16", "BF16", "F32"):
        return False
    values, stored = reading.data[0].view(PLAIN[wide]), reading.data[1]
    if narrow == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return bool((rounded == stored.view("<u2")).all())
    rounded = values.astype("<f2" if narrow == "F16" else "<f4")
    return bool((rounded.view(np.uint8) == stored).all())
