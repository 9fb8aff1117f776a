"""What the engine does for one tensor: small frozen programs made from a formula's numbers.

Pure data: made by `plan`, run by `engine`. No torch, no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ckptools.formula import Applied, Linear
from ckptools.tensors import TensorSpec

Precision = Literal["F32", "F64"]

# Beyond this many terms the roundings of fp32 sums come near those of fp16 results.
MAX_F32_TERMS = 4


@dataclass(frozen=True)
class Read:
    """One tensor of one source: `source` is an index into the plan's sources."""

    source: int
    name: str
    spec: TensorSpec


@dataclass(frozen=True)
class Apply:
    """A method that is not linear; `models` are its arguments, `scalars` its numbers."""

    method: str
    models: tuple[Mix, ...]
    scalars: tuple[tuple[str, float], ...]


Node: TypeAlias = "int | Mix | Apply"


@dataclass(frozen=True)
class Mix:
    """A weighted sum, evaluated left to right: (coefficient, node); an int is an index of reads."""

    terms: tuple[tuple[float, Node], ...]

    @property
    def depth(self) -> int:
        """How many scratch buffers evaluating this takes."""
        inner = (node.depth for _, node in self.terms if isinstance(node, Mix))
        return 1 + max([1, *inner])


@dataclass(frozen=True)
class Copy:
    """The read's bytes, as they are."""

    read: Read


@dataclass(frozen=True)
class PositionIds:
    """0, 1, 2, … as I64: what position ids are, whatever the read holds by now."""

    read: Read


@dataclass(frozen=True)
class Compute:
    """A mix of reads of one shape, rounded once to the output dtype.

    whole  whether a method in it needs the whole tensor at a time
    """

    mix: Mix
    reads: tuple[Read, ...]
    precision: Precision
    whole: bool = False


@dataclass(frozen=True)
class Widen:
    """`common` over the first input channels, the rest of them from `extra`, unscaled.

    common's reads may have more channels than `channels`; only the first ones take part.
    """

    common: Compute
    extra: Read
    channels: int


Program: TypeAlias = Copy | PositionIds | Compute | Widen


def reads_of(program: Program) -> tuple[Read, ...]:
    """Every tensor a program reads."""
    match program:
        case Copy(read=read) | PositionIds(read=read):
            return (read,)
        case Compute(reads=reads):
            return reads
        case Widen(common=common, extra=extra):
            return (*common.reads, extra)


def compile_mix(form: Linear, index: Mapping[str, int], base: str = "") -> Mix:
    """The evaluation order of a linear form that keeps its promises in floating point.

    index  model name -> index of its read
    base   the model that is not part of a delta: in A - (C - B) it is A that stays alone

    Opposite coefficients are paired: A + 0.7·B - 0.7·C becomes A - 0.7·(C - B). Where B equals
    C the bracket is +0 whatever their size, -0.7 · +0 is -0, and A + -0 is A to the bit, the
    sign of its zeros included. A + 0.3·B + 0.9·D - 1.2·C becomes A - 0.3·(C - B) - 0.9·(C - D).
    """
    pairs, partner = _pairs(form, base)
    alone: list[tuple[float, Node]] = []
    deltas: list[tuple[float, Node]] = []
    for position, (leaf, value) in enumerate(form.terms):
        if position in pairs:
            other = form.terms[pairs[position]][0]
            first, second = (other, leaf) if value > 0 else (leaf, other)
            bracket = Mix(((1.0, _node(first, index, base)), (-1.0, _node(second, index, base))))
            deltas.append((-abs(value), bracket))
        elif position not in partner:
            alone.append((value, _node(leaf, index, base)))
    return Mix((*alone, *deltas))


def _pairs(form: Linear, base: str) -> tuple[dict[int, int], set[int]]:
    """Position -> position of the term with exactly the opposite coefficient, nearest before.

    Where one of the terms left over makes up for all others, it is the partner of each.
    """
    open_positions: list[int] = []
    pairs: dict[int, int] = {}
    for position, (leaf, value) in enumerate(form.terms):
        if leaf == base:
            continue
        match = next((at for at in reversed(open_positions) if form.terms[at][1] == -value), None)
        if match is None:
            open_positions.append(position)
        else:
            open_positions.remove(match)
            pairs[match] = position
    hub = _hub([(at, form.terms[at][1]) for at in open_positions])
    if hub is not None:
        pairs |= {at: hub for at in open_positions if at != hub}
    return pairs, set(pairs.values())


def _hub(values: Sequence[tuple[int, float]]) -> int | None:
    """The position whose coefficient is minus the sum of all others, which have one sign."""
    largest = max((abs(value) for _, value in values), default=0.0)
    if abs(math.fsum(value for _, value in values)) > 1e-15 * largest:
        return None
    above = [at for at, value in values if value > 0]
    below = [at for at, value in values if value < 0]
    return next((side[0] for side in (below, above) if len(side) == 1), None)


def _node(leaf: str | Applied, index: Mapping[str, int], base: str) -> Node:
    if isinstance(leaf, str):
        return index[leaf]
    models = tuple(compile_mix(model, index, base) for model in leaf.models)
    return Apply(leaf.method, models, leaf.scalars)


def applied_in(mix: Mix) -> Iterator[Apply]:
    """Every method application in a mix, nested ones included."""
    for _, node in mix.terms:
        if isinstance(node, Mix):
            yield from applied_in(node)
        elif isinstance(node, Apply):
            yield node
            for model in node.models:
                yield from applied_in(model)
