"""`lora check`: does an adapter fit a model, how much of it does it touch, and how strongly?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckptools.adapters.inspection import ranks_of
from ckptools.adapters.reading import Adapter, Model, kind_title, open_adapter, open_model
from ckptools.errors import CkptError, ManyErrors
from ckptools.lora.match import Match, Placed, match
from ckptools.lora.names import Target
from ckptools.program import Change
from ckptools.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Touched:
    """How many of a component's layers (matrices and kernels) an adapter changes."""

    modules: int
    of: int


@dataclass(frozen=True)
class Strength:
    """How large an adapter's change of a block is, at weight 1, over the tensors it changes.

    change  ‖W' - W‖, weight ‖W‖: Frobenius norms, the squares summed over the tensors
    """

    change: float
    weight: float
    tensors: int

    @property
    def ratio(self) -> float:
        """‖W' - W‖ / ‖W‖; infinite where all weights are 0."""
        if self.weight == 0.0:
            return math.inf if self.change else 0.0
        return self.change / self.weight


@dataclass(frozen=True)
class Check:
    """Whether an adapter fits a model.

    matched     modules that do
    unmatched   modules that match no tensor of the model
    misfits     what is wrong with the others: shapes, duplicate targets
    base        the families the adapter fits, with reasons; family: the model's
    blocks      label → strength, in the model's order
    """

    adapter: Path
    model: Path
    family: str
    kinds: Mapping[str, int]
    base: tuple[tuple[str, str], ...]
    ranks: Mapping[int, int]
    modules: int
    matched: int
    unmatched: tuple[str, ...]
    misfits: tuple[tuple[str, str], ...]
    components: Mapping[str, Touched]
    blocks: Mapping[str, Strength]
    total: Strength
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every module has its place."""
        return not self.unmatched and not self.misfits and self.matched > 0


def check_adapter(adapter: Path, model: Path, *, progress: Progress | None = None) -> Check:
    """Lay an adapter over a model; reads the tensors that it changes, one by one."""
    with open_adapter(adapter) as opened, open_model(model) as against:
        found, misfits = _placed(opened, against)
        modules = opened.file.modules
        lost = {*found.unmatched, *(name for name, _ in misfits)}
        blocks = _strengths(opened, against, found, progress or Progress())
        return Check(
            adapter=adapter,
            model=model,
            family=against.family.id,
            kinds=dict(Counter(kind_title(m) for m in modules.values()).most_common()),
            base=tuple((fit.family, fit.reason) for fit in opened.fits),
            ranks=ranks_of(opened),
            modules=len(modules),
            matched=len(modules) - len(lost),
            unmatched=found.unmatched,
            misfits=misfits,
            components=_touched(against, found),
            blocks=blocks,
            total=_sum(list(blocks.values())),
            notes=opened.file.notes,
        )


def _placed(adapter: Adapter, model: Model) -> tuple[Match, tuple[tuple[str, str], ...]]:
    """The modules that fit, and (module, what is wrong) of those that have a place but do not."""
    misfits: list[tuple[str, str]] = []
    fitting = {}
    for name, module in adapter.file.modules.items():
        try:
            match(replace(adapter.file, modules={name: module}), model.names)
        except CkptError as exc:
            misfits.append((name, _first(exc).what))
        else:
            fitting[name] = module
    while True:  # what is left are modules with one target
        try:
            return match(replace(adapter.file, modules=fitting), model.names), tuple(misfits)
        except CkptError as exc:
            errors = exc.errors if isinstance(exc, ManyErrors) else (exc,)
            named = [error for error in errors if error.where in fitting]
            if not named:
                raise
            for error in named:
                misfits.append((error.where, error.what))
                del fitting[error.where]


def _first(error: CkptError) -> CkptError:
    return error.errors[0] if isinstance(error, ManyErrors) else error


def _touched(model: Model, found: Match) -> dict[str, Touched]:
    """By component: the layers with a changed weight, of all layers that a LoRA could change."""
    changed: dict[str, list[Target]] = {}
    for places in found.placed.values():
        for placed in places:
            if not placed.bias:
                changed.setdefault(placed.target.tensor, []).append(placed.target)
    counts: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for targets in model.names.names("diffusers").values():
        target = targets[0]
        if len(target.shape) < 2:
            continue
        total[target.component] += 1
        counts[target.component] += any(
            _overlap(target, other) for other in changed.get(target.tensor, ())
        )
    return {
        component: Touched(counts[component], number)
        for component, number in total.items()
        if counts[component] or component != "vae"
    }


def _overlap(one: Target, other: Target) -> bool:
    if one.rows is None or other.rows is None:
        return True
    return one.rows[0] < other.rows[1] and other.rows[0] < one.rows[1]


def _strengths(
    adapter: Adapter, model: Model, found: Match, progress: Progress
) -> dict[str, Strength]:
    sums: dict[str, list[Strength]] = {}
    progress.start("measuring", sum(model.specs[name].nbytes for name in found.placed))
    for name in sorted(found.placed):
        weight = model.load(name)
        change = change_norm(adapter, found.placed[name], weight)
        norm = float(weight.double().norm())
        sums.setdefault(model.block_of(name), []).append(Strength(change, norm, 1))
        progress.advance(model.specs[name].nbytes)
    return {label: _sum(sums[label]) for label in sorted(sums, key=model.block_order)}


def _sum(parts: Sequence[Strength]) -> Strength:
    return Strength(
        change=math.sqrt(sum(part.change**2 for part in parts)),
        weight=math.sqrt(sum(part.weight**2 for part in parts)),
        tensors=sum(part.tensors for part in parts),
    )


def change_norm(adapter: Adapter, places: Sequence[Placed], weight: Tensor) -> float:
    """‖W' - W‖ of one tensor under the modules that change it, each at weight 1.

    weight  the whole tensor, fp32 or fp64; it stays as it is
    """
    from ckptools.lora.bake import bake_module, by_module, delta_elements

    changes = [
        Change(
            module=placed.module,
            target=placed.target,
            shape=placed.shape,
            bias=placed.bias,
            scale=adapter.scales[placed.module.name],
        )
        for placed in places
    ]
    parts = [adapter.load(change.module) for change in changes]
    if all(change.is_delta for change in changes):
        shape = tuple(weight.shape)
        delta = delta_elements(changes, parts, shape, 0, weight.numel())
        return float(delta.double().norm())
    before = weight.double()  # fp32 would lose small changes in the difference
    after = before.clone()
    for own in by_module(changes):
        found = parts[changes.index(own[0])]
        wide = {part: t.double() if t.is_floating_point() else t for part, t in found.items()}
        bake_module(own, wide, after, 1.0)
    return float((after - before).norm())
