"""What a kind of adapter is, and the registry of kinds: content, not machinery.

A kind is one file of this package with pure functions and one `register(Kind(…))`.
Loading the registry loads no torch: kinds import it inside their functions.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

from ckptools.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
Settings = Mapping[str, float]
BiasUse = Literal["no", "needed", "if-any"]


class Rows(Protocol):
    """The function of an additive kind: any rows of its change, without the others."""

    def __call__(
        self, parts: Mapping[str, Tensor], begin: int, end: int, scale: float = 1.0
    ) -> Tensor:
        """Rows begin:end of scale * ΔW, (end - begin, columns)."""


class Apply(Protocol):
    """The function of a kind whose change depends on the weight."""

    def __call__(
        self,
        weight: Tensor,
        parts: Mapping[str, Tensor],
        *,
        scale: float,
        strength: float,
        settings: Settings,
    ) -> Tensor:
        """The adapted weight, of the weight's shape."""


@dataclass(frozen=True)
class Layout:
    """One way a kind is stored: its parts must hold all of `required`, and `optional` at most."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measure:
    """What the shapes of a module's parts say.

    rank      the rank that divides alpha; None where the kind has none
    rows      output rows of the weight it changes; None where any number fits
    columns   numbers per output row of that weight (in * kh * kw); None where any number fits
    inputs    input channels of that weight, whatever its kernel; None where any number fits
    channels  as many rows or input channels: a value in the file, not a shape, says which
    block     the numbers per output row are a multiple of this
    kernel    kernel of that weight, (kh, kw); () where the parts have none, or are stored flat
    weight    whether it changes the weight
    bias      whether it changes the bias: never, always, or where the layer has one
    settings  what the shapes, or the trainer's config, decide about the formula
    """

    rank: int | None = None
    rows: int | None = None
    columns: int | None = None
    inputs: int | None = None
    channels: int | None = None
    block: int = 1
    kernel: tuple[int, ...] = ()
    weight: bool = True
    bias: BiasUse = "no"
    settings: Settings = field(default_factory=dict)

    def misfit(self, shape: Sequence[int]) -> str:
        """Why a weight (or its row slice) of this shape does not fit, or ""."""
        rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
        inputs = shape[1] if len(shape) > 1 else 1
        if self.rows not in (None, rows) or self.columns not in (None, columns):
            told = f"{self.rows or 'any'} x {self.columns or 'any'}"
            return f"the adapter is for {told}, the weight is {rows} x {columns} {list(shape)}"
        if self.inputs not in (None, inputs) or self.channels not in (None, rows, inputs):
            told = f"{self.inputs} inputs" if self.inputs else f"{self.channels} rows or inputs"
            return f"the adapter is for {told}, the weight is {list(shape)}"
        if columns % self.block:
            return f"the adapter turns {self.block} columns at a time, the weight has {columns}"
        if self.kernel not in ((), tuple(shape[2:])):
            kernel = " x ".join(map(str, self.kernel))
            return f"the adapter's kernel is {kernel}, the weight is {list(shape)}"
        return ""


@dataclass(frozen=True)
class Kind:
    """A kind of adapter: its parts, and its mathematics.

    title    as shown to users
    layouts  the ways it is stored, by canonical part names
    measure  (shapes of the parts, PEFT's config or {}, module name) -> Measure; raises InputError
    rows     additive kinds: any rows of the change, which does not depend on the weight
    apply    the other kinds: the adapted weight
    bias     the adapted bias, for kinds that change it; same signature as `apply`
    scaled   whether alpha / rank scales it (alpha is something else in OFT, nothing in others)
    decomposable  whether DoRA may stand on top of it
    matches  tells kinds apart that share part names; by default any shapes do
    """

    name: str
    title: str
    formula: str
    source: str
    layouts: tuple[Layout, ...]
    measure: Callable[[Shapes, Mapping[str, object], str], Measure]
    rows: Rows | None = None
    apply: Apply | None = None
    bias: Apply | None = None
    scaled: bool = False
    decomposable: bool = False
    matches: Callable[[Shapes], bool] = lambda _: True

    @property
    def additive(self) -> bool:
        """Whether the change is a delta that does not depend on the weight: such kinds commute."""
        return self.rows is not None

    @functools.cached_property
    def marks(self) -> frozenset[str]:
        """The parts, any of which says that a module is of this kind (or shares them)."""
        return frozenset(
            part for layout in self.layouts for part in (*layout.required, *layout.optional)
        )

    def delta(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], scale: float) -> Tensor:
        """Return scale * ΔW in the weight's shape; fp32, or fp64 where a part is fp64.

        shape  of the weight, or of the rows of it that the module stands for; only the number of
               rows and the numbers per row must fit, so that 4-D factors fit a 2-D weight
        """
        if self.rows is None:
            raise TypeError(f"{self.name} depends on the weight: use apply")
        change = self.rows(parts, 0, shape[0], scale)
        if change.numel() != math.prod(shape):
            raise InputError(
                f"the adapter's change is {list(change.shape)}, the weight {list(shape)}"
            )
        return change.reshape(shape)


_REGISTRY: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Put a kind into the registry."""
    if kind.name in _REGISTRY:
        raise ValueError(f"adapter kind {kind.name!r} is registered twice")
    if (kind.rows is None) == (kind.apply is None):
        raise ValueError(f"adapter kind {kind.name!r} needs either rows or apply")
    _REGISTRY[kind.name] = kind
    return kind


@functools.cache
def load_kinds() -> Mapping[str, Kind]:
    """All kinds by name, sorted; imports every module of the package once."""
    import ckptools.lora as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return MappingProxyType(dict(sorted(_REGISTRY.items())))


def matrix(shapes: Shapes, part: str) -> tuple[int, int]:
    """(rows, columns) of a part taken as a matrix: all but the first axis flattened."""
    shape = shapes[part]
    if len(shape) < 2 or 0 in shape:
        raise InputError(f"{part} is {list(shape)}; it should be a matrix or a kernel")
    return shape[0], math.prod(shape[1:])


def kernel_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The kernel of a part's shape: what follows its first two axes; () where that is all ones."""
    return shape[2:] if math.prod(shape[2:]) != 1 else ()


def same_rank(**ranks: int) -> int:
    """The one rank that all these parts have, or an InputError that names them."""
    if len(set(ranks.values())) > 1:
        told = ", ".join(f"{part} says {rank}" for part, rank in ranks.items())
        raise InputError(f"the parts disagree on the rank: {told}")
    return next(iter(ranks.values()))
