"""What the stored values alone tell: names, NaN and Inf, size, and kin to the parents.

Needs no torch, and no knowledge of how the model is built beyond its family's names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckptools.check.verdicts import Check, held
from ckptools.errors import counted
from ckptools.family import UNKNOWN, Family, detect, family_of
from ckptools.measure import (
    Gram,
    Row,
    Values,
    common_shape,
    measure_gram,
    measure_values,
    rows_of,
)
from ckptools.tensors import TensorSpec

F16_MAX = 65504.0

# A block's norm out of the parents' range, as a factor. Measured (examples/tiny/thresholds.py):
# sound merges of kin 1.01 at most, half of two unrelated models 1.4.
NORM_WARN, NORM_FAIL = 1.2, 3.0
# What the parents leave unexplained of a component. Measured: roundings 0.0003, 20 % of noise 0.2,
# a component of another model 1.
REST_WARN, REST_FAIL = 0.2, 0.7
# How far two parents lie apart. Measured: kin 0.16 at most, independent models 1.4 (sqrt(2)).
APART_WARN, APART_FAIL = 0.7, 1.0

_BYSTANDERS = ("vae", "other")  # exchanged freely: a VAE of other parents is no fault
_NAMED = 3


class Weights(Protocol):
    """A model's stored tensors: a `Checkpoint`, or a merge that is not written."""

    @property
    def path(self) -> Path:
        """Where it lies, or would lie."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The strings of its header."""

    def __getitem__(self, name: str, /) -> TensorSpec:
        """What a tensor is."""

    def __iter__(self) -> Iterator[str]:
        """Names of tensors."""

    def __len__(self) -> int:
        """How many tensors there are."""

    def read_into(self, name: str, view: memoryview, offset: int = 0) -> None:
        """Fill `view` with a tensor's bytes from byte `offset` of the tensor on."""


@dataclass(frozen=True)
class Kin:
    """How a component lies to the parents.

    shares   parent → its share in the component, by least squares
    rest     |what no mixture of the parents explains| / |component|
    apart    the largest distance of two parents that both have a share; and their names
    """

    shares: Mapping[str, float]
    rest: float
    apart: float = 0.0
    pair: tuple[str, str] | None = None


@dataclass(frozen=True)
class WeightsFound:
    """Checks of the weights, and the parents' shares in every component."""

    checks: tuple[Check, ...]
    kin: Mapping[str, Kin] = field(default_factory=dict)


@dataclass(frozen=True)
class _Model:
    """Weights with the family's usual name of each tensor of floats → the file's name."""

    name: str
    weights: Weights
    own: Mapping[str, str]


def check_weights(
    model: Weights, parents: Mapping[str, Weights] | None = None, *, threads: int = 2
) -> WeightsFound:
    """Names, NaN, range, norms and kin of a model, against its parents where they are given."""
    detected = (detect(_specs(each), each.metadata) for each in (model, *(parents or {}).values()))
    # a damaged model may not be recognised: then its parents say what it is
    family = next((family_of(one) for one in detected if one.family), UNKNOWN)
    ours = _opened("", model, family)
    theirs = [_opened(name, weights, family) for name, weights in (parents or {}).items()]
    values = measure_values(rows_of([model], ours.own.values()), threads=threads)
    checks = [_finite(values), _range(values)]
    if not theirs:
        return WeightsFound(tuple(checks))
    grams = _grams(ours, theirs, threads)
    kin = _kin(grams, theirs, family, ours)
    checks.insert(0, _names(ours, theirs))
    checks += [_zeros(ours, values, grams), _norms(ours, grams, family), *_kin_checks(kin)]
    return WeightsFound(tuple(checks), kin)


def _specs(weights: Weights) -> dict[str, TensorSpec]:
    return {name: weights[name] for name in weights}


def _opened(name: str, weights: Weights, family: Family) -> _Model:
    own: dict[str, str] = {}
    for tensor in weights:
        usual = family.canonical_name(tensor)
        if weights[tensor].is_float and not family.is_protected(usual):
            own[usual] = tensor if usual == tensor else own.get(usual, tensor)
    return _Model(name, weights, own)


# --- one model ----------------------------------------------------------------------------------


def _finite(values: Mapping[str, Values]) -> Check:
    bad = {name: one for name, one in values.items() if one.nan or one.inf}
    count = sum(one.nan + one.inf for one in bad.values())
    reason = f"all {sum(one.count for one in values.values()):,} values are numbers"
    if bad:
        shown = [f"{one.nan:,} NaN and {one.inf:,} Inf in {name}" for name, one in bad.items()]
        reason = _listed(shown)
    return held("weights.finite", count, warn=0, fail=0, reason=reason, tensors=list(bad))


def _range(values: Mapping[str, Values]) -> Check:
    """fp16 is what most tools load weights as, whatever they are stored as."""
    sizes = {name: max(one.max, -one.min) for name, one in values.items() if one.finite}
    large = [name for name, size in sizes.items() if size > F16_MAX]
    name = max(sizes, key=lambda tensor: sizes[tensor], default="")
    largest = sizes.get(name, 0.0)
    reason = f"the largest is {largest:.4g}, in {name}"
    if large:
        reason += ": it is Inf where weights are loaded as fp16"
    return held("weights.range", largest, warn=F16_MAX, fail=math.inf, reason=reason, tensors=large)


# --- against the parents ------------------------------------------------------------------------


def _names(ours: _Model, theirs: Sequence[_Model]) -> Check:
    """Tensors that every parent has must be there; ones that no parent has are odd."""
    common = set(theirs[0].own).intersection(*(each.own for each in theirs[1:]))
    known = set().union(*(each.own for each in theirs))
    missing = sorted(theirs[0].own[name] for name in common - ours.own.keys())
    extra = sorted(ours.own[name] for name in ours.own.keys() - known)
    if missing:
        reason = f"{counted(len(missing), 'tensor')} of the parents missing: {_listed(missing)}"
        return Check("weights.names", len(missing), 0, "fail", reason, tuple(missing))
    if extra:
        reason = f"{counted(len(extra), 'tensor', 'is')} in no parent: {_listed(extra)}"
        return Check("weights.names", len(extra), 0, "warn", reason, tuple(extra))
    return Check("weights.names", 0, 0, "pass", f"{len(ours.own):,} tensors, as in the parents")


def _grams(ours: _Model, theirs: Sequence[_Model], threads: int) -> dict[str, Gram]:
    """Products of the model and its parents, of every tensor that all of them have."""
    rows = []
    for usual, tensor in ours.own.items():
        if all(usual in each.own for each in theirs):
            reads = ((ours.weights, tensor), *((m.weights, m.own[usual]) for m in theirs))
            row = Row(usual, reads)
            if common_shape(row.specs) is not None:
                rows.append(row)
    return measure_gram(rows, threads=threads)


def _zeros(ours: _Model, values: Mapping[str, Values], grams: Mapping[str, Gram]) -> Check:
    """A tensor of zeros where no parent has one: something was lost on the way."""
    lost = []
    for usual, gram in grams.items():
        own = values[ours.own[usual]]
        if own.count and own.zeros == own.count and np.diag(gram.matrix)[1:].all():
            lost.append(ours.own[usual])
    reason = "none is all zero but where a parent's is"
    if lost:
        zero = counted(len(lost), "tensor", "is")
        reason = f"{zero} all zero, the parents' are not: {_listed(lost)}"
    return held("weights.zeros", len(lost), warn=0, fail=0, reason=reason, tensors=lost)


def _norms(ours: _Model, grams: Mapping[str, Gram], family: Family) -> Check:
    """The block whose norm is farthest out of the parents' range, as a factor of 1 and more."""
    squares: dict[str, NDArray[np.float64]] = {}
    for usual, gram in grams.items():
        if _is_matrix(ours, usual):
            group = f"{family.component_of(usual)} {family.block_of(usual)}".strip()
            own = np.diag(gram.matrix)
            squares[group] = squares[group] + own if group in squares else own
    worst, factor, words = "", 1.0, ""
    for group, found in squares.items():
        norm, *known = (math.sqrt(square) for square in found)
        if norm and min(known):
            high, low = norm / max(known), norm / min(known)
            out = max(high, 1 / low)
            if out > factor:
                worst, factor, words = group, out, f"{high if high > 1 else low:.2f}"
    reason = f"{worst} has {words} times the parents' norm" if worst else "all within the parents'"
    return held("weights.norms", factor, warn=NORM_WARN, fail=NORM_FAIL, reason=reason)


def _is_matrix(ours: _Model, usual: str) -> bool:
    """Norms and biases are alike in all models and say nothing."""
    return sum(size > 1 for size in ours.weights[ours.own[usual]].shape) > 1


# --- kin ----------------------------------------------------------------------------------------


def _kin(
    grams: Mapping[str, Gram], theirs: Sequence[_Model], family: Family, ours: _Model
) -> dict[str, Kin]:
    totals: dict[str, Gram] = {}
    for usual, gram in grams.items():
        if _is_matrix(ours, usual):
            component = family.component_of(usual)
            totals[component] = totals[component] + gram if component in totals else gram
    names = [each.name for each in theirs]
    return {component: _kin_of(gram.matrix, names) for component, gram in totals.items()}


def _kin_of(gram: NDArray[np.float64], names: Sequence[str]) -> Kin:
    """Shares by least squares. Parents that are equal share what is theirs evenly (pinv)."""
    products, mixed = gram[1:, 1:], gram[1:, 0]
    scale = np.sqrt(np.outer(np.diag(products), np.diag(products)))
    scale[scale == 0] = 1.0
    size = np.sqrt(np.diag(scale))
    shares = np.linalg.pinv(products / scale, rcond=1e-9, hermitian=True) @ (mixed / size) / size
    left = gram[0, 0] - 2 * shares @ mixed + shares @ products @ shares
    rest = math.sqrt(max(float(left), 0.0) / gram[0, 0]) if gram[0, 0] else 0.0
    apart, pair = 0.0, None
    used = [i for i, share in enumerate(shares) if abs(share) > 0.02]
    for i in used:
        for j in used:
            square = products[i, i] + products[j, j] - 2 * products[i, j]
            norm = math.sqrt(math.sqrt(products[i, i] * products[j, j])) or 1.0
            distance = math.sqrt(max(float(square), 0.0)) / norm
            if i < j and distance > apart:
                apart, pair = distance, (names[i], names[j])
    found = {name: float(share) for name, share in zip(names, shares, strict=True)}
    return Kin(found, rest, apart, pair)


def _kin_checks(kin: Mapping[str, Kin]) -> Iterator[Check]:
    deciding = {name: one for name, one in kin.items() if name not in _BYSTANDERS}
    if not deciding:
        return
    worst = max(deciding, key=lambda name: deciding[name].rest)
    rest = deciding[worst].rest
    reason = f"of {worst}, {rest:.1%} is in no parent"
    if rest > REST_FAIL:
        reason += ": it comes from another model"
    yield held("weights.kin", rest, warn=REST_WARN, fail=REST_FAIL, reason=reason)
    far = max(deciding, key=lambda name: deciding[name].apart)
    one = deciding[far]
    if one.pair is not None:
        reason = f"{one.pair[0]} and {one.pair[1]} are {one.apart:.2f} apart in {far}"
        if one.apart > APART_FAIL:
            reason += ": trained apart, they cannot be mixed"
        yield held("weights.parents", one.apart, warn=APART_WARN, fail=APART_FAIL, reason=reason)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
