"""Adapters in a plan: what each is, in words, and what its modules do to every tensor.

Reads no tensor bytes but single numbers (alpha, scale); no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptools.formula import AdapterDelta, Applied, Baked, Leaf, Linear
from ckptools.lora.group import AdapterFile, Module
from ckptools.lora.kinds import load_kinds
from ckptools.lora.match import Match
from ckptools.lora.names import Fit, fitting_families
from ckptools.program import Change, Read

if TYPE_CHECKING:
    from ckptools.opening import Source
    from ckptools.plan import Plan, Step


def adapter_title(file: AdapterFile) -> str:
    """What an adapter is, in words: "LoRA of rank 32, for sdxl"."""
    bases = " or ".join(fit.family for fit in adapter_bases(file))
    title = " and ".join(adapter_kinds(file))
    ranks = adapter_ranks(file)
    if ranks:
        title += f" of rank {span(ranks)}"
    return title + (f", for {bases}" if bases else "")


def adapter_kinds(file: AdapterFile) -> tuple[str, ...]:
    """The kinds of an adapter's modules, in words, commonest first."""
    kinds = Counter(map(module_kind, file.modules.values()))
    return tuple(kind for kind, _ in kinds.most_common())


def module_kind(module: Module) -> str:
    """What a module is, in words: "DoRA", "LoHa"."""
    return "DoRA" if module.dora else load_kinds()[module.kind].title


def adapter_ranks(file: AdapterFile) -> tuple[int, ...]:
    """The ranks of an adapter's modules, ascending, each once."""
    ranks = {module.rank for module in file.modules.values() if module.rank is not None}
    return tuple(sorted(ranks))


def adapter_bases(file: AdapterFile) -> tuple[Fit, ...]:
    """The families an adapter may be for; () where nothing tells."""
    columns = {name: module.measure.columns for name, module in file.modules.items()}
    return fitting_families(columns)


def span(numbers: Sequence[float]) -> str:
    """Ascending numbers as the one that they are, or the first and the last."""
    if len(numbers) == 1:
        return f"{numbers[0]:g}"
    return f"{numbers[0]:g} to {numbers[-1]:g}"


@dataclass(frozen=True)
class Baking:
    """An adapter that a plan bakes, and where it goes.

    scales  module -> what multiplies its change, before the weight
    """

    source: Source
    match: Match
    scales: Mapping[str, float]

    @property
    def file(self) -> AdapterFile:
        """The adapter's modules."""
        if self.source.adapter is None:
            raise TypeError(f"{self.source.name} is not an adapter")
        return self.source.adapter

    @property
    def matched(self) -> dict[str, int]:
        """Component of the model -> modules that go into it."""
        found = {
            (placed.target.component, placed.module.name): None
            for places in self.match.placed.values()
            for placed in places
        }
        return dict(Counter(component for component, _ in found))

    @property
    def used_scales(self) -> tuple[float, ...]:
        """The scales of its modules, ascending, each once."""
        return tuple(sorted(set(self.scales.values())))


@dataclass(frozen=True)
class AppliedChange:
    """One module of an adapter, as it changes one tensor of a plan."""

    adapter: str
    change: Change
    weight: float


def changes_in(plan: Plan, step: Step) -> tuple[AppliedChange, ...]:
    """The adapter modules that change a step's tensor, with the weights they have there."""
    bakings = {baking.source.name: baking for baking in plan.bakings}
    found: list[AppliedChange] = []
    for adapter, weight in _weights_in(step.form) if step.form is not None else ():
        source = bakings[adapter].source
        index = plan.sources.index(source)
        changes = changes_of(bakings[adapter], index, _canonical_of(plan, step))
        found += [AppliedChange(adapter, change, weight) for change in changes]
    return tuple(found)


def _canonical_of(plan: Plan, step: Step) -> str:
    own = {actual: name for name, actual in plan.base.names.items()}
    return own.get(step.spec.name, step.spec.name)


def _weights_in(form: Linear) -> Iterator[tuple[str, float]]:
    """(adapter, weight) of every adapter in a form, nested ones included."""
    for leaf, value in form.terms:
        match leaf:
            case AdapterDelta(adapter=adapter):
                yield adapter, value
            case Baked(model=model, adapter=adapter, strength=strength):
                yield from _weights_in(model)
                yield adapter, strength
            case Applied(models=models):
                for model in models:
                    yield from _weights_in(model)


def changes_of(baking: Baking, index: int, name: str) -> tuple[Change, ...]:
    """What an adapter, source number `index`, does to one tensor."""
    source = baking.source
    return tuple(
        Change(
            module=placed.module,
            parts=tuple(
                (part, Read(index, tensor, source.checkpoint[tensor]))
                for part, tensor in placed.module.arrays.items()
            ),
            scale=baking.scales[placed.module.name],
            target=placed.target,
            shape=placed.shape,
            bias=placed.bias,
            dora=source.ref.dora,
        )
        for placed in baking.match.placed.get(name, ())
    )


def adapters_in(form: Linear) -> list[AdapterDelta | Baked]:
    """Every adapter in a form, nested ones included, each delta once."""
    found: dict[AdapterDelta | Baked, None] = {}
    for leaf, _ in form.terms:
        match leaf:
            case AdapterDelta():
                found[leaf] = None
            case Baked(model=model):
                found[leaf] = None
                found |= dict.fromkeys(adapters_in(model))
            case Applied(models=models):
                for model in models:
                    found |= dict.fromkeys(adapters_in(model))
    return list(found)


def over_base(form: Linear, base: str) -> Linear:
    """The base in the place of every model, with what adapters do to it: for what a model lacks.

    0.5 * bake(A, L) + 0.5 * B becomes 0.5 * bake(A, L) + 0.5 * A; without adapters it is A.
    """
    changed = [(leaf, value) for leaf, value in form.terms if adapters_in(Linear.of(leaf))]
    models = [value for leaf, value in changed if not isinstance(leaf, AdapterDelta)]
    rest = 1.0 - math.fsum(models)
    result = Linear.of(base) * (rest if abs(rest) > 1e-12 else 0.0)
    for leaf, value in changed:
        result = result + Linear.of(_leaf_over(leaf, base)) * value
    return result


def _leaf_over(leaf: Leaf, base: str) -> Leaf:
    match leaf:
        case Applied(models=models):
            return replace(leaf, models=tuple(over_base(model, base) for model in models))
        case Baked(model=model):
            return replace(leaf, model=over_base(model, base))
    return leaf


def numbers_of(source: Source, module: str) -> dict[str, float]:
    """The values of a module's alpha and scale: single numbers, read from the file."""
    if source.adapter is None:
        return {}
    parts = source.adapter.modules[module]
    return {part: source.checkpoint.read_number(parts.parts[part]) for part in parts.numbers}
