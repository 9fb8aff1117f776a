"""What the engine does for one tensor: small frozen programs made from a formula's numbers.

Pure data: made by `plan`, run by `engine`. No torch, no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ckptools.formula import (
    AdapterDelta,
    Applied,
    Baked,
    Leaf,
    Linear,
    Scaled,
    Summed,
    Written,
    is_difference,
    occurrences,
)
from ckptools.lora.dora import Reading
from ckptools.lora.match import Placed
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


@dataclass(frozen=True)
class Change(Placed):
    """What one module of an adapter does to one tensor, with what it takes to do it.

    parts   canonical part -> the adapter's tensor
    scale   what multiplies the module's change, before the user's strength
    dora    how a DoRA's norm is read
    """

    parts: tuple[tuple[str, Read], ...] = ()
    scale: float = 1.0
    dora: Reading = "trained"


@dataclass(frozen=True)
class Bake:
    """A model with changes that depend on it, applied in order."""

    model: Mix
    changes: tuple[Change, ...]
    strength: float


Node: TypeAlias = "int | Mix | Apply | Bake"


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

    precision  of methods and of what adapters add; sums without methods are in fp64
    whole   whether a method or an adapter in it needs the whole tensor at a time
    deltas  what adapters add, each the sum of its changes: indices beyond `reads` in the mix
    """

    mix: Mix
    reads: tuple[Read, ...]
    precision: Precision
    whole: bool = False
    deltas: tuple[tuple[Change, ...], ...] = ()

    @property
    def is_linear(self) -> bool:
        """Whether it is a sum, without methods or adapters that depend on what they go into."""
        return not any(isinstance(node, Apply | Bake) for node in _nodes(self.mix))


def cast(read: Read) -> Compute:
    """A read's values, rounded once to the output dtype."""
    return Compute(Mix(((1.0, 0),)), (read,), "F64")


@dataclass(frozen=True)
class Widen:
    """`common` over the first input channels, the rest of them from `extra`, unscaled.

    common's reads may have more channels than `channels`; only the first ones take part.
    deltas  what adapters for all channels add at the end: (weight, changes)
    """

    common: Compute
    extra: Read
    channels: int
    deltas: tuple[tuple[float, tuple[Change, ...]], ...] = ()


Program: TypeAlias = Copy | PositionIds | Compute | Widen


def reads_of(program: Program) -> tuple[Read, ...]:
    """Every tensor a program reads."""
    match program:
        case Copy(read=read) | PositionIds(read=read):
            return (read,)
        case Compute(mix=mix, reads=reads, deltas=deltas):
            changes = [change for delta in deltas for change in delta]
            changes += [change for bake in baked_in(mix) for change in bake.changes]
            return (*reads, *_parts_of(changes))
        case Widen(common=common, extra=extra, deltas=wide):
            changes = [change for _, delta in wide for change in delta]
            return (*reads_of(common), extra, *_parts_of(changes))


def _parts_of(changes: Sequence[Change]) -> tuple[Read, ...]:
    return tuple(read for change in changes for _, read in change.parts)


def compile_mix(
    form: Linear,
    index: Mapping[Leaf, int],
    base: str = "",
    changes: Mapping[str, tuple[Change, ...]] | None = None,
) -> Mix:
    """The evaluation order of a linear form that keeps its promises in floating point.

    index  model -> index of its read; adapter delta -> index of it, beyond the reads
    changes  adapter -> what it does to this tensor, for adapters that are not deltas
    base   the model that is not part of a delta: in A - (C - B) it is A that stays alone

    The order is the formula's own wherever that keeps them, with the roundings of the same formula
    over arrays of doubles. A difference that is added is subtracted the other way round, A + (B -
    C) as A - (C - B): A + 0 would lose the sign of A's zeros.

    Elsewhere opposite coefficients are paired: A + 0.7·B - 0.7·C becomes A - 0.7·(C - B). Where B
    equals C the bracket is +0 whatever their size, -0.7 · +0 is -0, and A + -0 is A to the bit, the
    sign of its zeros included. A + 0.3·B + 0.9·D - 1.2·C becomes A - 0.3·(C - B) - 0.9·(C - D).
    Equal coefficients are taken out: A/3 + B/3 + C/3 becomes (A + B + C)/3, whose ties are ties.
    """
    compiler = _Compiler(index, base, changes or {})
    return compiler.mix(form)


@dataclass(frozen=True)
class _Compiler:
    index: Mapping[Leaf, int]
    base: str
    changes: Mapping[str, tuple[Change, ...]]

    def mix(self, form: Linear) -> Mix:
        if form.written is not None and self._keeps_promises(form.written, form):
            return Mix(tuple(self.written(form.written)))
        pairs, partner = _pairs(form, self.base)
        alone: list[tuple[float, Node]] = []
        deltas: list[tuple[float, Node]] = []
        for position, (leaf, value) in enumerate(form.terms):
            if position in pairs:
                other = form.terms[pairs[position]][0]
                first, second = (other, leaf) if value > 0 else (leaf, other)
                bracket = Mix(((1.0, self.node(first)), (-1.0, self.node(second))))
                deltas.append((-abs(value), bracket))
            elif position not in partner:
                alone.append((value, self.node(leaf)))
        factors = {factor for factor, _ in alone}
        if len(alone) > 1 and len(factors) == 1 and factors != {1.0}:
            together = Mix(tuple((1.0, node) for _, node in alone))
            return Mix(((factors.pop(), together), *deltas))
        return Mix((*alone, *deltas))

    def _keeps_promises(self, written: Written, form: Linear) -> bool:
        """Whether a form may be evaluated as it is written.

        Not where a model cancels, as A does in A + (B - A) * 1, which is B to the bit; nor where
        there are pairs to be made outside of differences, as in A + 0.7 * B - 0.7 * C, or with the
        base within one, as in A - B + C.
        """
        if {leaf for leaf, _ in form.terms} != {model for model, _ in occurrences(written)}:
            return False
        alone = Linear(tuple(_alone(written)))
        is_base_in = self.base in alone.models or self.base not in form.models
        return is_base_in and not _pairs(alone, self.base)[0]

    def written(self, written: Written, sign: int = 1) -> list[tuple[float, Node]]:
        """Terms of what is written, or of minus that; where a difference is 0, its zeros are +0."""
        match written:
            case str():
                return [(float(sign), self.index[written])]
            case Scaled(of=of, factor=factor):
                if not is_difference(of):
                    return [(sign * factor, _together(self.written(of)))]
                of_sign = sign if factor > 0 else -sign
                return [(abs(factor), _together(self.written(of, of_sign)))]
            case Summed(left=left, right=right, sign=of_right):
                first, second = (left, sign), (right, sign * of_right)
                if is_difference(left) and not is_difference(right):
                    first, second = second, first
                if not is_difference(second[0]) or is_difference(first[0]):
                    terms = [*self.written(*first), _as_one(self.written(*second))]
                    return terms[::-1] if len(terms) == 2 and terms[0][0] < 0 else terms
                difference, its_sign = second
                factor, node = _as_one(self.written(difference, -its_sign))
                return [*self.written(*first), (-factor, node)]

    def node(self, leaf: Leaf) -> Node:
        match leaf:
            case Applied(method=method, models=models, scalars=scalars):
                return Apply(method, tuple(self.mix(model) for model in models), scalars)
            case Baked(model=model, adapter=adapter, strength=strength):
                return Bake(self.mix(model), self.changes[adapter], strength)
            case _:
                return self.index[leaf]


def _alone(written: Written, factor: float = 1.0) -> Iterator[tuple[str, float]]:
    """Models that are not within a difference, with their coefficients."""
    match written:
        case str():
            yield written, factor
        case _ if is_difference(written):
            return
        case Scaled(of=of, factor=more):
            yield from _alone(of, factor * more)
        case Summed(left=left, right=right, sign=sign):
            yield from _alone(left, factor)
            yield from _alone(right, factor * sign)


def _together(terms: Sequence[tuple[float, Node]]) -> Node:
    """The node whose value is that of the terms."""
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1.0 else Mix(tuple(terms))


def _as_one(terms: Sequence[tuple[float, Node]]) -> tuple[float, Node]:
    return terms[0] if len(terms) == 1 else (1.0, Mix(tuple(terms)))


def _pairs(form: Linear, base: str) -> tuple[dict[int, int], set[int]]:
    """Position -> position of the term with exactly the opposite coefficient, nearest before.

    Where one of the terms left over makes up for all others, it is the partner of each.
    """
    open_positions: list[int] = []
    pairs: dict[int, int] = {}
    for position, (leaf, value) in enumerate(form.terms):
        if leaf == base or isinstance(leaf, AdapterDelta):
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


def applied_in(mix: Mix) -> Iterator[Apply]:
    """Every method application in a mix, nested ones included."""
    return (node for node in _nodes(mix) if isinstance(node, Apply))


def baked_in(mix: Mix) -> Iterator[Bake]:
    """Every adapter in a mix that depends on what it goes into, nested ones included."""
    return (node for node in _nodes(mix) if isinstance(node, Bake))


def _nodes(mix: Mix) -> Iterator[Node]:
    for _, node in mix.terms:
        yield node
        match node:
            case Mix():
                yield from _nodes(node)
            case Apply(models=models):
                for model in models:
                    yield from _nodes(model)
            case Bake(model=model):
                yield from _nodes(model)
