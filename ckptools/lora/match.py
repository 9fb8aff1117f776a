"""An adapter laid over a checkpoint: which module changes which tensor, and what fits nowhere.

Names and shapes only; opens no file and knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ckptools.errors import CkptError, InputError, raise_all
from ckptools.lora.group import AdapterFile, Module
from ckptools.lora.names import NameMap, Target, fitting_families


@dataclass(frozen=True)
class Placed:
    """A module of an adapter at its target.

    shape  of the weight its change is for: the target's, or with fewer input channels
    bias   whether it is the module's bias that changes
    """

    module: Module
    target: Target
    shape: tuple[int, ...]
    bias: bool = False

    @property
    def is_delta(self) -> bool:
        """Whether the change can be added row by row, without the weight or the whole of it."""
        return (
            self.module.additive
            and not self.bias
            and self.target.op != "transpose"
            and self.shape == self.target.shape
        )


@dataclass(frozen=True)
class Match:
    """What an adapter does to a checkpoint.

    placed     tensor of the checkpoint -> the modules that change it, in the adapter's order
    unmatched  modules of the adapter that no tensor of the checkpoint answers to
    """

    placed: Mapping[str, tuple[Placed, ...]]
    unmatched: tuple[str, ...]


def match(file: AdapterFile, names: NameMap) -> Match:
    """Place every module of an adapter.

    Raises `InputError` (or `ManyErrors`) for modules whose shapes do not fit their targets, for
    two modules with one target, and for a bias that the checkpoint does not have.
    """
    placed: dict[str, list[Placed]] = {}
    taken: dict[tuple[object, ...], str] = {}
    unmatched: list[str] = []
    errors: list[CkptError] = []
    for module in file.modules.values():
        targets = names.find(module.name)
        if not targets:
            unmatched.append(module.name)
        for target in targets:
            key = (target.tensor, target.rows, target.part)
            if key in taken:
                errors.append(
                    InputError(
                        f"{taken[key]!r} and {module.name!r} both change {target.tensor}",
                        where=module.name,
                        fix="the file holds two adapters, or one under two schemes: split it",
                    )
                )
                continue
            taken[key] = module.name
            try:
                for one in _place(module, target):
                    tensor = target.bias if one.bias else target.tensor
                    placed.setdefault(tensor, []).append(one)
            except InputError as exc:
                errors.append(exc.at(module.name))
    raise_all(_first(errors))
    return Match(
        MappingProxyType({name: tuple(items) for name, items in placed.items()}), tuple(unmatched)
    )


def _place(module: Module, target: Target) -> list[Placed]:
    shape = target.shape_for(module.measure.columns)
    misfit = module.misfit(shape) if module.touches_weight else ""
    if misfit:
        grown = "reshape_weight" in module.parts
        raise InputError(
            f"does not fit {target.tensor}: {misfit}",
            fix="it makes the layer larger (reshape_weight), and a merge keeps the model's shapes"
            if grown
            else "use the base model it was trained for",
        )
    found = [Placed(module, target, shape)] if module.touches_weight else []
    if module.touches_bias == "needed" and not target.bias:
        raise InputError(
            f"changes a bias, and {target.tensor} has none",
            fix="use the base model it was trained for",
        )
    if module.touches_bias != "no" and target.bias:
        found.append(Placed(module, target, shape, bias=True))
    return found


def _first(errors: list[CkptError], most: int = 8) -> list[CkptError]:
    if len(errors) <= most:
        return errors
    rest = InputError(f"and {len(errors) - most:,} more modules with the same kind of error")
    return [*errors[:most], rest]


def unmatched_error(name: str, file: AdapterFile, found: Match, *, where: str) -> InputError:
    """Why an adapter does not fit, with the modules that fit nowhere and the base they are for."""
    count, total = len(found.unmatched), len(file.modules)
    shown = ", ".join(map(repr, found.unmatched[:4])) + (", …" if count > 4 else "")
    columns = {name: file.modules[name].measure.columns for name in found.unmatched}
    fits = fitting_families(columns)
    told = " or ".join(f"{fit.family} ({fit.reason})" for fit in fits)
    return InputError(
        f"{count:,} of {total:,} modules of {name} match nothing in the model: {shown}",
        where=where,
        fix=(f"they fit {told}; " if told else "")
        + "use the base model it was trained for, or set `allow_unmatched: true`",
    )
