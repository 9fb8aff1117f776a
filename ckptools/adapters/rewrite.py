"""`lora resize` and `lora merge`: adapters to adapters, module by module, without any model.

A sum of low-rank changes is a low-rank change: w₁ up₁ down₁ + w₂ up₂ down₂ is the product of
[w₁ up₁, w₂ up₂] and [down₁; down₂]. Ranks add; singular values of the factors make them smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ckptools.adapters.factors import Budget, difference_norm, product_norm, recompress
from ckptools.adapters.inspection import ranks_of
from ckptools.adapters.reading import Adapter, Model, kind_title, open_adapter, open_model
from ckptools.adapters.writing import (
    SCHEMES,
    AdapterWriter,
    Names,
    Written,
    check_output,
    dtype_of,
)
from ckptools.errors import InputError, UsageError
from ckptools.lora.group import Module
from ckptools.lora.kinds import load_kinds
from ckptools.lora.names import Target, Targets
from ckptools.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

_KEPT_PARTS = ("dora_scale", "magnitude", "diff_b")

_ROUNDING = 1e-6  # of the terms' norms: far above doubles' rounding, far below any LoRA


@dataclass(frozen=True)
class Rewritten:
    """What a resize or a merge did.

    before    rank → modules, of all inputs
    residual  ‖what is written - the exact sum‖ / ‖the exact sum‖, over all low-rank modules
    carried   modules copied as they are, with their kind
    """

    written: Written
    before: Mapping[int, int]
    residual: float
    carried: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


@dataclass
class _Error:
    """How far the written modules are from the exact sums.

    size  what `total` would be if nothing cancelled: of the factors' norms
    """

    total: float = 0.0
    missed: float = 0.0
    size: float = 0.0

    def add(self, exact: tuple[Tensor, Tensor], stored: Mapping[str, Tensor], scale: float) -> None:
        up = stored["up"].flatten(1).double() * scale
        held = (up, stored["down"].flatten(1).double())
        self.total += product_norm(*exact) ** 2
        self.size += float(exact[0].norm() * exact[1].norm()) ** 2
        self.missed += difference_norm(exact, held) ** 2

    @property
    def relative(self) -> float:
        return math.sqrt(self.missed / self.total) if self.total else 0.0

    @property
    def is_rounding(self) -> bool:
        """Whether the exact sums are nothing but what rounding left of terms that cancel."""
        return self.size > 0 and self.total <= _ROUNDING**2 * self.size


@dataclass(frozen=True)
class Factors:
    """ΔW = up @ down.

    up    (out, rank), fp64, the scale in it
    down  (rank, in * kh * kw), fp64
    tail  (in,) or (in, kh, kw): the weight's shape but for its rows
    """

    up: Tensor
    down: Tensor
    tail: tuple[int, ...]

    @property
    def parts(self) -> dict[str, Tensor]:
        """The canonical parts, in the shapes that trainers give them."""
        rank = self.down.shape[0]
        ones = (1,) * (len(self.tail) - 1)
        return {
            "up": self.up.reshape(*self.up.shape, *ones),
            "down": self.down.reshape(rank, *self.tail),
        }

    def within(self, budget: Budget | None) -> Factors:
        """The same, recompressed where the budget asks for it."""
        if budget is None or (budget.rank is not None and self.down.shape[0] <= budget.rank):
            return self
        up, down = recompress(self.up, self.down, budget)
        return Factors(up, down, self.tail)


def is_low_rank(module: Module) -> bool:
    """Whether a module's change is up @ down (or Tucker's), and nothing else."""
    others = {"sparse_indices", "reshape_weight"} & module.parts.keys()
    return module.kind == "lora" and "up" in module.parts and not others


def factors_of(module: Module, parts: Mapping[str, Tensor], scale: float) -> Factors:
    """A low-rank module's factors; a Tucker core goes into down, which is exact."""
    import torch

    up = parts["up"].flatten(1).double() * scale
    down = parts["down"].double()
    tail = tuple(down.shape[1:])
    if "mid" in module.parts:
        mid = parts["mid"].double()
        down = torch.einsum("mnk,nj->mjk", mid.flatten(2), down.flatten(1))
        tail = (tail[0], *mid.shape[2:])
    return Factors(up, down.flatten(1), tail)


# --- resize ------------------------------------------------------------------------------------


def resize(
    path: Path,
    output: Path,
    *,
    budget: Budget,
    names: Names | None = None,
    model: Path | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Rewritten:
    """Write an adapter with smaller ranks; modules that are within the rank stay to the bit.

    names, model  to rename the modules as well: see `concatenate`
    DoRA keeps its magnitudes. Kinds that are no product of two factors are carried as they are.
    """
    check_output(output, [path], force=force)
    with open_adapter(path) as adapter:
        native = _native(adapter.scheme)
        if native is None or (names or native) != native or model is not None:
            return concatenate(
                [path], output, budget=budget, names=names, model=model, dtype=dtype, force=force,
                progress=progress,
            )  # fmt: skip
        progress = progress or Progress()
        progress.start("resizing", adapter.checkpoint.file_bytes)
        error = _Error()
        carried: list[tuple[str, str]] = []
        wanted = dtype or dtype_of(adapter.checkpoint)
        with AdapterWriter(output, names=native, dtype=wanted, replaces=force) as writer:
            for module in adapter.file.modules.values():
                if not _resize_module(adapter, module, writer, budget, error, same=dtype is None):
                    carried.append((module.name, kind_title(module)))
                progress.advance(
                    sum(adapter.checkpoint[key].nbytes for key in module.parts.values())
                )
            _copy_embeddings(adapter, writer)
            family = adapter.fits[0].family if adapter.fits else ""
            written = writer.finish(adapter.checkpoint.metadata, family=family)
        notes = adapter.file.notes
        return Rewritten(written, ranks_of(adapter), error.relative, tuple(carried), notes)


def _resize_module(
    adapter: Adapter,
    module: Module,
    writer: AdapterWriter,
    budget: Budget,
    error: _Error,
    *,
    same: bool,
) -> bool:
    """Write one module; False where it is of a kind that cannot be resized."""
    scale = adapter.scales[module.name]
    fits = budget.rank is not None and (module.rank or 0) <= budget.rank
    if not is_low_rank(module) or (fits and same):
        _carry(adapter, module, writer)
        return is_low_rank(module)
    parts = adapter.load(module)
    exact = factors_of(module, parts, scale)
    small = exact.within(budget)
    rest = {part: t for part, t in parts.items() if part in _KEPT_PARTS}
    if "bias" in parts:
        rest["bias"] = parts["bias"].double() * scale
    stored = writer.add(module.name, {**small.parts, **rest}, rank=small.down.shape[0])
    error.add((exact.up, exact.down), stored, 1.0)
    return True


def _carry(adapter: Adapter, module: Module, writer: AdapterWriter) -> None:
    rank = module.rank if load_kinds()[module.kind].scaled else None
    alpha = None if rank is None else adapter.scales[module.name] * rank
    writer.carry(adapter.checkpoint, module.name, module.parts, rank=rank, alpha=alpha)


def _copy_embeddings(adapter: Adapter, writer: AdapterWriter) -> None:
    for keys in adapter.file.embeddings.values():
        writer.copy(adapter.checkpoint, keys)


def _native(scheme: str) -> Names | None:
    """What `--names` calls a scheme; None for those that are read but not written."""
    if scheme.startswith("kohya"):
        return "kohya"
    return "peft" if scheme == "peft" else None


# --- merge -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a module goes in the output.

    name  the module's name there
    rows  how many it has there, if `to` of them are rows `source` of the module; 0: all are
    """

    name: str
    rows: int = 0
    to: tuple[int, int] = (0, 0)
    source: tuple[int, int] = (0, 0)


@dataclass
class _Sum:
    """What one module of the output is the sum of."""

    items: list[tuple[Adapter, Module, float, _Place]] = field(default_factory=list)

    @property
    def modules(self) -> list[Module]:
        return [module for _, module, _, _ in self.items]


def concatenate(
    paths: Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    budget: Budget | None = None,
    names: Names | None = None,
    model: Path | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Rewritten:
    """Write one adapter whose change is the weighted sum of the others'.

    weights  one for each file (default: 1)
    budget   recompress to it; default: exact, ranks add
    names    default: as the inputs, or kohya's where they differ
    model    a model that they all fit: needed where their names differ, or are to change
    Scales and weights go into up, so that alpha = rank.
    """
    weights = list(weights) if weights is not None else [1.0] * len(paths)
    if len(weights) != len(paths):
        raise UsageError(
            f"{len(paths)} files and {len(weights)} weights", fix="give one weight for each file"
        )
    if not all(map(math.isfinite, weights)):
        raise UsageError(f"weights must be finite numbers, not {weights}")
    check_output(output, [*paths, *([model] if model else [])], force=force)
    with ExitStack() as stack:
        adapters = [stack.enter_context(open_adapter(path)) for path in paths]
        known = stack.enter_context(open_model(model)) if model else None
        chosen = _chosen_names(adapters, names, known)
        sums = _sums(adapters, weights, _Namer(chosen, known))
        wanted = dtype or _widest([dtype_of(adapter.checkpoint) for adapter in adapters])
        writer = stack.enter_context(
            AdapterWriter(output, names=chosen, dtype=wanted, replaces=force)
        )
        error, carried = _Error(), []
        progress = progress or Progress()
        progress.start("merging", len(sums))
        for name in sorted(sums):
            kind = _write_sum(name, sums[name], writer, budget, error, renames=known is not None)
            if kind:
                carried.append((name, kind))
            progress.advance(1)
        if error.is_rounding and all(_is_low_rank_sum(each) for each in sums.values()):
            raise UsageError(
                "the adapters cancel each other out: nothing is left", fix="check --weights"
            )
        for adapter in adapters:
            _copy_embeddings(adapter, writer)
        family = known.family.id if known else next((a.fits[0].family for a in adapters if a.fits),
                                                    "")  # fmt: skip
        written = writer.finish(_merged_metadata(adapters), family=family)
        before: dict[int, int] = {}
        for adapter in adapters:
            for rank, count in ranks_of(adapter).items():
                before[rank] = before.get(rank, 0) + count
        notes = tuple(f"{a.path.name}: {note}" for a in adapters for note in a.file.notes)
    return Rewritten(written, dict(sorted(before.items())), error.relative, tuple(carried), notes)


def _widest(dtypes: Iterable[str]) -> str:
    """The dtype that holds all of these: fp16 and bf16 together take fp32."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else "fp32"


def _chosen_names(adapters: Sequence[Adapter], names: Names | None, model: Model | None) -> Names:
    schemes = list(dict.fromkeys(adapter.scheme for adapter in adapters))
    native = _native(schemes[0]) if len(schemes) == 1 else None
    if model is None and (native is None or (names or native) != native):
        told = ", ".join(f"{a.path.name}: {a.scheme}" for a in adapters)
        what = "their names differ" if len(schemes) > 1 else "the names are to change"
        raise UsageError(f"{what} ({told})", fix="add --model MODEL, a model that they all fit")
    return names or native or "kohya"


class _Namer:
    """The places in the output that a module's change goes to."""

    def __init__(self, names: Names, model: Model | None) -> None:
        self._model = model
        self._known: dict[Targets, str] = {}
        self._by_tensor: dict[str, list[tuple[str, Target]]] = {}
        self._rows = {n: s.shape[0] for n, s in model.specs.items() if s.shape} if model else {}
        if model is not None:
            for name, targets in model.names.names(SCHEMES[names]).items():
                self._known[targets] = name
                for target in targets:
                    self._by_tensor.setdefault(target.tensor, []).append((name, target))

    def places(self, module: Module, adapter: Adapter) -> list[_Place]:
        if self._model is None:
            return [_Place(module.name)]
        targets = self._model.names.find(module.name)
        where = f"{adapter.path.name}: {module.name}"
        if not targets:
            raise InputError(
                f"matches nothing in {self._model.path.name}",
                where=where,
                fix=f"the adapter fits {adapter.base}" if adapter.base else "",
            )
        misfit = module.misfit(targets[0].shape_for(module.measure.columns))
        if module.touches_weight and misfit:
            raise InputError(misfit, where=where)
        if targets in self._known:
            return [_Place(self._known[targets])]
        parts = self._fused(targets) if len(targets) == 1 else []
        if not parts:
            raise InputError("has no name in the scheme to be written", where=where)
        return parts

    def _fused(self, targets: Targets) -> list[_Place]:
        """A fused weight as its parts, or a part as rows of the fused one."""
        own = targets[0]
        rows = self._rows[own.tensor]
        first, last = own.rows or (0, rows)
        places = []
        for name, other in self._by_tensor.get(own.tensor, ()):
            low, high = other.rows or (0, rows)
            begin, end = max(first, low), min(last, high)
            if begin < end and other.part is None and own.part is None and other.op == own.op:
                to, source = (begin - low, end - low), (begin - first, end - first)
                places.append(_Place(name, high - low, to, source))
        return places


def _sums(adapters: Sequence[Adapter], weights: Sequence[float], namer: _Namer) -> dict[str, _Sum]:
    sums: dict[str, _Sum] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for module in adapter.file.modules.values():
            for place in namer.places(module, adapter) if weight else ():
                sums.setdefault(place.name, _Sum()).items.append((adapter, module, weight, place))
    if not sums:
        raise UsageError("all weights are 0: nothing is left")
    return sums


def _write_sum(
    name: str,
    items: _Sum,
    writer: AdapterWriter,
    budget: Budget | None,
    error: _Error,
    *,
    renames: bool,
) -> str:
    """Write one module; its kind where it was carried as it is, else ""."""
    modules = items.modules
    if _is_low_rank_sum(items):
        exact, extra = _stacked(name, items)
        small = exact.within(budget)
        stored = writer.add(name, {**small.parts, **extra}, rank=small.down.shape[0])
        error.add((exact.up, exact.down), stored, 1.0)
        return ""
    if all(module.kind == "full" and not module.dora for module in modules):
        writer.add(name, _full_sum(name, items))
        return ""
    adapter, module, weight, _ = items.items[0]
    if len(modules) == 1 and weight == 1.0 and not renames:
        _carry(adapter, module, writer)
        return kind_title(module)
    kinds = " and ".join(dict.fromkeys(kind_title(module) for module in modules))
    raise InputError(
        f"{kinds} cannot be summed, weighted or renamed: only LoRA, LoCon and differences can",
        where=name,
        fix="bake them into the model one after the other instead",
    )


def _is_low_rank_sum(items: _Sum) -> bool:
    return all(is_low_rank(module) and not module.dora for module in items.modules)


def _stacked(name: str, items: _Sum) -> tuple[Factors, dict[str, Tensor]]:
    """The concatenation, and what else the modules add to a bias."""
    import torch

    ups, downs, tails = [], [], []
    extra: dict[str, Tensor] = {}
    for adapter, module, weight, place in items.items:
        parts = adapter.load(module)
        scale = adapter.scales[module.name]
        factors = factors_of(module, parts, scale * weight)
        ups.append(_placed(factors.up, place))
        downs.append(factors.down)
        tails.append(factors.tail)
        for part, factor in (("bias", scale * weight), ("diff_b", weight)):
            if part in parts:
                value = _placed(parts[part].double().flatten() * factor, place)
                extra[part] = extra[part] + value if part in extra else value
    if len({math.prod(tail) for tail in tails}) > 1 or len({up.shape[0] for up in ups}) > 1:
        told = " and ".join(str([up.shape[0], *tail]) for up, tail in zip(ups, tails, strict=True))
        raise InputError(f"the adapters are for weights of different shapes: {told}", where=name)
    longest = max(tails, key=len)
    return Factors(torch.cat(ups, dim=1), torch.cat(downs, dim=0), longest), extra


def _placed(values: Tensor, place: _Place) -> Tensor:
    """The rows that go to a place, zeros around them."""
    if not place.rows:
        return values
    whole = values.new_zeros(place.rows, *values.shape[1:])
    whole[slice(*place.to)] = values[slice(*place.source)]
    return whole


def _full_sum(name: str, items: _Sum) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for adapter, module, weight, place in items.items:
        parts = adapter.load(module)
        scale = adapter.scales[module.name]
        for part, factor in (("diff", scale * weight), ("diff_b", weight)):
            if part in parts:
                value = _placed(parts[part].double() * factor, place)
                if part in sums and sums[part].shape != value.shape:
                    raise InputError(
                        f"{part} is {list(sums[part].shape)} and {list(value.shape)}", where=name
                    )
                sums[part] = sums[part] + value if part in sums else value
    return sums


def _merged_metadata(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Of one file: all of it. Of several: what they agree on, and where they came from."""
    first = adapters[0].checkpoint.metadata
    if len(adapters) == 1:
        return dict(first)
    shared = {
        key: text
        for key, text in first.items()
        if all(adapter.checkpoint.metadata.get(key) == text for adapter in adapters[1:])
    }
    titles = [
        adapter.checkpoint.metadata.get("modelspec.title") or adapter.path.stem
        for adapter in adapters
    ]
    phrases = [
        phrase
        for adapter in adapters
        if (phrase := adapter.checkpoint.metadata.get("modelspec.trigger_phrase"))
    ]
    if phrases:
        shared["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(phrases))
    return {**shared, "modelspec.merged_from": ", ".join(titles)}
