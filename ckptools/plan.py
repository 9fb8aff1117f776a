"""From a recipe and file headers to a plan: what becomes of every tensor, and why.

All that is wrong is reported together. Reads no tensor bytes, no torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from ckptools import footprint
from ckptools.baking import (
    Baking,
    adapter_bases,
    adapters_in,
    changes_of,
    numbers_of,
    over_base,
)
from ckptools.errors import CkptError, InputError, RecipeError, counted, grouped, nearest, raise_all
from ckptools.family import UNKNOWN, Family, family_of
from ckptools.formula import (
    AdapterDelta,
    Applied,
    Baked,
    Leaf,
    Linear,
    Written,
    base_model,
    specialise,
    used_names,
)
from ckptools.hubref import is_hub_text
from ckptools.keymap import key_map_ids
from ckptools.known import Known, incomplete_parts, known_tensors, missing_of
from ckptools.lora.group import AdapterFile, scale_of
from ckptools.lora.match import Match, match, unmatched_error
from ckptools.lora.names import targets
from ckptools.methods import load_methods
from ckptools.opening import WHOLE_KINDS, Source, common_family, each_of, open_source, open_sources
from ckptools.placement import output_problems
from ckptools.program import (
    MAX_F32_TERMS,
    Change,
    Compute,
    Copy,
    Mix,
    PositionIds,
    Precision,
    Program,
    Read,
    Widen,
    applied_in,
    baked_in,
    cast,
    compile_mix,
    reads_of,
)
from ckptools.quantised import not_numbers, quantised_in
from ckptools.recipe import Outline, Recipe, lora_weight
from ckptools.selectors import (
    CompiledParam,
    Param,
    ParamLine,
    compile_param,
    mbw_lines,
    no_value_for,
)
from ckptools.sources import Opener, open_checkpoint
from ckptools.tensors import TensorSpec
from ckptools.writer import index_path, lay_out, shard_paths, split_shards

Action = Literal["merged", "carried", "copied", "cast"]
ACTIONS: tuple[Action, ...] = ("merged", "carried", "copied", "cast")

# What an adapter of `loras:` weighs where its weight has no line: it must have no modules there.
_UNSAID = ParamLine("default", 0.0, may_be_empty=True)
_SHARED_VAE = ({"sd1", "sd2"},)  # families whose VAEs speak the same latent space


@dataclass(frozen=True)
class Step:
    """What happens to one output tensor.

    form    the formula with this tensor's numbers, or None where no formula applies
    why     the reason, in words
    lacking  models of the formula that have no part in it, as one of them or the base has no
             floats for it; it is the base's therefore
    lines   the recipe lines that set each parameter: name -> line
    """

    spec: TensorSpec
    action: Action
    program: Program
    why: str
    component: str
    block: str
    form: Linear | None = None
    lines: Mapping[str, ParamLine] = field(default_factory=dict)
    lacking: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first tensor byte is read.

    steps     one per output tensor, in file order over all shards
    shards    output files: path -> their tensors, in order
    warnings  what a user should look at
    notes     what was decided on the way and is worth a line
    dropped   model -> tensors of it that the base lacks and that are therefore left out
    """

    recipe: Recipe
    sources: tuple[Source, ...]
    base: Source
    family: Family
    variant: str | None
    steps: tuple[Step, ...]
    shards: tuple[tuple[Path, tuple[TensorSpec, ...]], ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    dropped: Mapping[str, tuple[str, ...]]
    threads: int
    bakings: tuple[Baking, ...] = ()

    @cached_property
    def counts(self) -> dict[Action, int]:
        """Output tensors by action; they add up to all of them."""
        counted = Counter(step.action for step in self.steps)
        return {action: counted[action] for action in ACTIONS}

    @cached_property
    def read_bytes(self) -> int:
        """Bytes that will be read from the sources."""
        return sum(read.spec.nbytes for step in self.steps for read in reads_of(step.program))

    @cached_property
    def output_bytes(self) -> int:
        """Bytes of tensor data that will be written (headers come on top: `file_bytes`)."""
        return sum(step.spec.nbytes for step in self.steps)

    @cached_property
    def file_bytes(self) -> int:
        """Size of the files that will be written, headers included but for their metadata."""
        return sum(lay_out(specs, {}, path).file_bytes for path, specs in self.shards)

    @cached_property
    def peak_bytes(self) -> int:
        """Predicted peak of the process's memory."""
        tensors = [(step.spec, step.program) for step in self.steps]
        moved = self.read_bytes + self.output_bytes
        return footprint.peak_bytes(tensors, moved_bytes=moved, threads=self.threads)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Every file that will be written, the shards' index included."""
        paths = tuple(path for path, _ in self.shards)
        return paths if len(paths) == 1 else (*paths, index_path(self.recipe.output_path))

    def close(self) -> None:
        """Close the sources."""
        for source in self.sources:
            source.checkpoint.close()


# --- the plan ----------------------------------------------------------------------------------


def make_plan(
    recipe: Recipe,
    *,
    threads: int = 2,
    force: bool = False,
    write: bool = True,
    opener: Opener = open_checkpoint,
    sources: Sequence[Source] | None = None,
) -> Plan:
    """Open the sources and decide what becomes of every tensor.

    force    plan as if `output.overwrite` were true
    write    False: nothing will be written, so the place of the output is not checked
    opener   what turns a model's path into an open checkpoint
    sources  those of an earlier plan of the same models, still open: to plan again with other
             numbers. They stay open whatever happens
    Raises a `CkptError`, or `ManyErrors`, with all that stands in the way. The caller closes the
    plan's sources.
    """
    if sources is not None:
        return _Planner(recipe, sources).plan(threads, force=force, write=write)
    sources = open_sources(recipe, opener, more=partial(_family_errors, recipe.outline))
    try:
        return _Planner(recipe, sources).plan(threads, force=force, write=write)
    except BaseException:
        for source in sources:
            source.checkpoint.close()
        raise


def outline_errors(outline: Outline, opener: Opener = open_checkpoint) -> Iterator[CkptError]:
    """What the models' files tell of a recipe that has other mistakes.

    Which cannot be opened; and, of the base, what is wrong with components and selectors.
    """
    for ref in outline.models.values():
        if not ref.path or is_hub_text(ref.path):
            continue
        try:
            checkpoint = opener(outline.file_of(ref))
        except CkptError as exc:
            yield from grouped([ref.blamed(one) for one in each_of(exc)])
            continue
        with closing(checkpoint), suppress(CkptError):  # an adapter: told where all else is right
            source = open_source(ref, checkpoint) if ref.name == outline.base else None
            if source is not None and source.detection.kind in WHOLE_KINDS:
                yield from _family_errors(outline, source)


def _family_errors(outline: Outline, base: Source) -> list[CkptError]:
    """What is wrong with components and selectors, so far as the base alone can tell."""
    family = family_of(base.detection)
    if family is UNKNOWN:
        return []
    return _component_errors(outline, family) + _compile_params(outline, family, base)[1]


def _component_errors(outline: Outline, family: Family) -> list[CkptError]:
    """Components in `take:` and `output.dtype`, and `compat:`, must be this family's."""
    known = [*family.components, "other"]
    errors: list[CkptError] = [
        RecipeError(
            f"take: unknown component {component!r}", where=where, fix=nearest(component, known)
        )
        for component, (_, where) in outline.take.items()
        if component not in known
    ]
    errors += [
        RecipeError(
            f"output dtype: unknown component {component!r}",
            where=outline.output.dtypes_where,
            fix=nearest(component, [*known, "default"]),
        )
        for component in outline.output.dtypes
        if component not in (*known, "default")
    ]
    if outline.compat not in ("", *family.compat):
        errors.append(
            RecipeError(
                f"compat: {family.id} has no mapping {outline.compat!r}",
                where=outline.compat_where,
                fix=nearest(outline.compat, family.compat),
            )
        )
    return errors


def _compile_params(
    outline: Outline, family: Family, base: Source
) -> tuple[dict[str, CompiledParam], list[CkptError]]:
    """The params that the formula uses, resolved for the base's tensors; and what cannot be."""
    mergeable = [name for name, own in base.names.items() if base.checkpoint[own].is_float]
    own = [name for name in mergeable if family.component_of(name) not in outline.take]
    weights = {lora_weight(name) for name in outline.models}
    compat = outline.compat if outline.compat in family.compat else ""
    found: dict[str, CompiledParam] = {}
    errors: list[CkptError] = []
    for ref in outline.params.values():
        if ref.name not in outline.used:
            continue
        is_weight = ref.name in weights
        try:
            lines = ref.lines
            if ref.mbw:
                lines = (*mbw_lines(ref.mbw, family, ref.where), *lines)
            if is_weight:
                lines = (_UNSAID, *lines)
            found[ref.name] = compile_param(
                Param(lines), name_of_param=ref.name, family=family,
                names=mergeable if is_weight else own, compat=compat,
                taken=() if is_weight else tuple(outline.take), own=base.names,
            )  # fmt: skip
        except CkptError as exc:
            errors += [error.at(ref.where) for error in each_of(exc)]
    return found, errors


class _Planner:
    """Gathers errors, warnings and notes while it walks over the base's tensors."""

    def __init__(self, recipe: Recipe, sources: Sequence[Source]) -> None:
        self.recipe = recipe
        self.sources = tuple(sources)
        self.by_name = {source.name: source for source in sources}
        self.index = {source.name: number for number, source in enumerate(sources)}
        self.base = self.by_name[recipe.base]
        self.used = [
            name
            for name in used_names(recipe.result, recipe.scope)
            if name in self.by_name and self.by_name[name].adapter is None
        ]
        self.guests = frozenset(source.name for source in sources if source.is_guest)
        self.family = common_family(recipe, self.by_name)
        self._anchor = base_model(recipe.merge, recipe.scope)  # whatever `base:` says
        self.errors: list[CkptError] = []
        self.warnings: list[str] = [*recipe.warnings]
        self.notes: list[str] = []
        self.params: dict[str, CompiledParam] = {}
        self._forms: dict[tuple[float, ...], Linear] = {}
        self._untouched: dict[Linear, Linear] = {}  # forms, for tensors that no adapter changes
        self._formed_by: Counter[Linear] = Counter()
        self._widened: list[str] = []
        self._mixes: dict[tuple[Linear, Written | None], tuple[Mix, bool]] = {}
        self._reads: dict[tuple[str, str], Read] = {}
        self.taken: dict[str, Mapping[str, str]] = {}
        self.bakings: dict[str, Baking] = {}
        self._bad_numbers: dict[str, tuple[CkptError, list[str]]] = {}

    def plan(self, threads: int, *, force: bool, write: bool) -> Plan:
        recipe = self.recipe
        self._check_families()
        self.errors += _component_errors(recipe.outline, self.family)
        self._match_taken()
        names = self._output_names()
        self._compile_params()
        self._match_adapters()
        raise_all(self.errors)  # without families and numbers, per-tensor errors would be noise
        steps = [self._step(name) for name in names]
        self.errors += [*self._codes(steps)]
        raise_all(grouped([*self._number_errors(), *self._nothing_merged(steps), *self.errors]))
        by_name = {step.spec.name: step for step in steps}
        shards = split_shards([step.spec for step in steps], recipe.output.shard_bytes)
        paths = shard_paths(recipe.output_path, len(shards))
        dropped = self._dropped(names)
        self._check_strict(steps, dropped)
        plan = Plan(
            recipe=recipe,
            sources=self.sources,
            base=self.base,
            family=self.family,
            variant=self._variant(),
            steps=tuple(by_name[spec.name] for shard in shards for spec in shard),
            shards=tuple((path, tuple(shard)) for path, shard in zip(paths, shards, strict=True)),
            warnings=(),
            notes=(),
            dropped=dropped,
            threads=threads,
            bakings=tuple(self.bakings.values()),
        )
        if write:
            self.errors += output_problems(plan, force=force or recipe.output.overwrite)
        raise_all(self.errors)
        self._tell(plan)
        return replace(plan, warnings=tuple(self.warnings), notes=tuple(self.notes))

    # --- families ---

    def _check_families(self) -> None:
        """Two models of different families are refused in one sentence."""
        involved = dict.fromkeys([self.base.name, *self.used])
        involved = {name: None for name in involved if name not in self.guests}
        known = {
            name: family_of(self.by_name[name].detection).id
            for name in involved
            if self.by_name[name].detection.family
        }
        if len(set(known.values())) > 1:
            parts = [f"{name} is {self.by_name[name].title}" for name in known]
            kinds = {name: self.by_name[name].detection.kind for name in known}
            lone = [name for name, kind in kinds.items() if kind in ("vae", "text_encoder")]
            fix = f"`take: {{{kinds[lone[0]]}: {lone[0]}}}` takes it as it is" if lone else ""
            self.errors.append(
                InputError(
                    f"models of different families cannot be merged: {', '.join(parts)}",
                    where=self.recipe.merge.where,
                    fix=fix or "use models of one family",
                )
            )
        self._check_predictions(involved)
        for name in involved:
            if name not in known and known:
                self.warnings.append(
                    f"the family of {name} is not known ({_nearest_family(self.by_name[name])}): "
                    "its tensors are matched by name and shape"
                )

    def _check_predictions(self, names: Iterable[str]) -> None:
        """Weights that predict different things may be mixed, but seldom by intention."""
        detections = {name: self.by_name[name].detection for name in names}
        told = {name: found.prediction for name, found in detections.items() if found.prediction}
        if len(set(told.values())) > 1:
            parts = ", ".join(f"{name} predicts {what}" for name, what in told.items())
            self.warnings.append(
                f"the models predict different things: {parts}. A model between them predicts "
                "neither; in a difference, as in A + (B - C), both sides should agree"
            )

    # --- components that are taken ---

    def _match_taken(self) -> None:
        """Find the tensors of every taken component; one that the model has not is an error."""
        for component, (model, where) in self.recipe.take.items():
            source = self.by_name[model]
            found = self.taken[component] = self._taken_names(source, component)
            if component not in (*self.family.components, "other"):
                continue
            if not self._is_relative(component, source):
                continue
            if not found:
                self.errors.append(
                    InputError(
                        f"take: {model} has no {component}; it is {source.title}",
                        where=where,
                        fix=f"take {component} from a model that has one",
                    )
                )
            elif not any(self._is_of(component, name) for name in self.base.names):
                self._check_whole(component, model, where)

    def _taken_names(self, source: Source, component: str) -> dict[str, str]:
        """A component's tensors in a model: their names in the result → their own.

        Files of one family may differ in what stands before a component's names (vae.,
        first_stage_model.): the result has the base's, or the family's usual one.
        """
        found = {n: own for n, own in source.names.items() if self._is_of(component, n)}
        wanted = {n for n in self.base.names if self._is_of(component, n)}
        wanted = wanted or {n for n in self._known if self._is_of(component, n)}
        if wanted <= found.keys():
            return found
        prefixes = self.family.components.get(component, ())
        if found:
            moves = [("", ""), *((old, new) for old in prefixes for new in prefixes if old != new)]
            return max(
                ({_moved(name, *move): own for name, own in found.items()} for move in moves),
                key=lambda moved: len(moved.keys() & wanted),
            )
        if source.detection.kind in WHOLE_KINDS:
            return {}
        named = {prefix + name: own for prefix in prefixes for name, own in source.names.items()}
        return {name: own for name, own in named.items() if name in wanted}

    def _is_relative(self, component: str, source: Source) -> bool:
        """Whether a model's component fits the family; an error where it does not."""
        theirs = family_of(source.detection)
        if theirs.kind != "checkpoint" or self.family in (UNKNOWN, theirs):
            return True
        if component == "vae" and {theirs.id, self.family.id} in _SHARED_VAE:
            return True
        self.errors.append(
            InputError(
                f"{source.name} is {source.title}, the merge is {self.family.title}: "
                "its parts do not fit",
                where=source.ref.where,
                fix="take components from a model of the same family",
            )
        )
        return False

    def _is_of(self, component: str, name: str) -> bool:
        return self.family.component_of(name) == component

    @cached_property
    def _known(self) -> Mapping[str, Known]:
        """What whole models of the base's kind hold."""
        return known_tensors(self.base.detection, self.base.checkpoint)

    def _check_whole(self, component: str, model: str, where: str) -> None:
        """What a base without the component takes must be all of it, in the sizes it has there."""
        source, found = self.by_name[model], self.taken[component]
        known = {n: k for n, k in self._known.items() if self._is_of(component, n)}
        if known.keys().isdisjoint(found):
            return
        misfits: list[CkptError] = [
            _not_in(component, model, name, where) for name in missing_of(known, found)
        ]
        if self._has_full_size():
            misfits += [
                InputError(
                    f"take: {model} is {list(source.checkpoint[found[name]].shape)}, {component} "
                    f"of {self.family.title} is {list(one.shape)}",
                    where=name,
                    fix=f"{model} is {source.title}; take {component} from a model of one size",
                )
                for name, one in known.items()
                if name in found and source.checkpoint[found[name]].numel != math.prod(one.shape)
            ]
        self.errors += grouped(misfits)

    def _has_full_size(self) -> bool:
        """Whether the base is as wide as its family's models are; a narrow relative is not."""
        equal = [
            self.base.checkpoint[own].shape == self._known[name].shape
            for name, own in self.base.names.items()
            if name in self._known
        ]
        return 2 * sum(equal) > len(equal)

    # --- numbers ---

    def _compile_params(self) -> None:
        self.params, errors = _compile_params(self.recipe.outline, self.family, self.base)
        self.errors += errors
        weights = {lora_weight(source.name) for source in self.sources}
        used = set(used_names(self.recipe.result, self.recipe.scope)) - weights
        self.notes += [
            f"{line.where}: {line.selector!r} of {ref.name} has no say: "
            f"`take` takes the {line.selector} from {self.recipe.take[line.selector][0]}"
            for ref in self.recipe.params.values()
            if ref.name in used
            for line in ref.lines
            if line.selector in self.recipe.take
        ]
        for compiled in self.params.values():
            self.warnings += [
                f"{line.where}: {line.selector!r} of {compiled.name} never wins: lines below it "
                "cover all of it (the last line that matches wins)"
                for line in compiled.shadowed
            ]

    def _form(self, name: str) -> tuple[Linear, dict[str, ParamLine]]:
        """The formula with the numbers of one tensor, and where each number came from."""
        lines = {param: compiled.line_of(name) for param, compiled in self.params.items()}
        key = tuple(line.value for line in lines.values())
        if key not in self._forms:
            values = {param: line.value for param, line in lines.items()}
            self._forms[key] = specialise(self.recipe.result, self.recipe.scope, values)
        return self._forms[key], _said(lines)

    # --- adapters ---

    def _match_adapters(self) -> None:
        """Lay every adapter over the base's tensors, under their canonical names."""
        sources = [source for source in self.sources if source.adapter is not None]
        if sources and self.family.id not in key_map_ids():
            self.errors.append(
                InputError(
                    f"adapters need a known family; {self.base.name} is {self.base.title}",
                    where=sources[0].ref.where,
                    fix=f"the families with names for adapters: {', '.join(key_map_ids())}",
                )
            )
            return
        if not sources:
            return
        names = targets(self.family, self._adapter_specs())
        for source in sources:
            if source.adapter is None:
                continue
            try:
                self._match_adapter(source, source.adapter, match(source.adapter, names))
            except CkptError as exc:
                self.errors += self._misfits(source, source.adapter, each_of(exc))

    def _misfits(
        self, source: Source, file: AdapterFile, errors: Sequence[CkptError]
    ) -> list[CkptError]:
        """The errors of laying an adapter over the model; one, where it is for another family."""
        foreign = self._foreign(file)
        if not foreign:
            return [source.ref.blamed(error, "adapter") for error in errors]
        return [
            InputError(
                f"{source.name} is for {foreign}, the model is {self.family.id}: "
                f"{errors[0].where} {errors[0].what}",
                where=source.ref.where,
                fix="use the base model it was trained for",
            )
        ]

    def _foreign(self, file: AdapterFile) -> str:
        """The family that an adapter is for, where that is another than the model's; else ""."""
        fits = adapter_bases(file)
        if not fits or self.family.id in (fit.family for fit in fits):
            return ""
        return " or ".join(f"{fit.family} ({fit.reason})" for fit in fits)

    def _adapter_specs(self) -> dict[str, TensorSpec]:
        """The base's tensors as adapters meet them: with the input channels of the result."""
        specs = {
            name: replace(self.base.checkpoint[own], name=name)
            for name, own in self.base.names.items()
        }
        for name, spec in specs.items():
            if self._may_widen(name, spec) and self.family.component_of(name) not in (
                self.recipe.take
            ):
                reads = [self._read(self.by_name[m], name) for m in self.used if self._has(m, name)]
                if _differ_in_channels([*reads, self._read(self.base, name)]):
                    channels = max([spec.shape[1], *(read.spec.shape[1] for read in reads)])
                    specs[name] = replace(spec, shape=(spec.shape[0], channels, *spec.shape[2:]))
        return specs

    def _match_adapter(self, source: Source, file: AdapterFile, found: Match) -> None:
        where = source.ref.where
        component_of = self.family.component_of
        taken = [
            name
            for name in found.placed
            if component_of(name) in self.recipe.take and self._has_weight(source.name, name)
        ]
        if found.unmatched:
            error = unmatched_error(source.name, file, found, where=where)
            if not source.ref.allow_unmatched or not found.placed:
                self.errors.append(error)
            else:
                self.warnings.append(f"{error.what}: left out")
        foreign = self._foreign(file)
        if foreign and (source.ref.allow_unmatched or not found.unmatched):
            self.warnings.append(
                f"{source.name} is for {foreign}, the model is {self.family.id}: "
                "what its modules have in common may mean something else here"
            )
        if taken:
            component = component_of(taken[0])
            advice = (
                "set its weight to 0"
                if lora_weight(source.name) in self.params
                else ("bake it through `loras:` with the weight 0")
            )
            self.errors.append(
                InputError(
                    f"{source.name} changes {counted(len(taken), 'tensor')} of {component}, which "
                    "is taken byte for byte",
                    where=where,
                    fix=f"{advice} for {component}, or leave out `take`",
                )
            )
        self._check_weight(source, found)
        for note in file.notes:
            self.notes.append(f"{source.name}: {note}")
        if file.embeddings:
            self.notes.append(
                f"{source.name}: {len(file.embeddings)} embeddings are left aside "
                f"({', '.join(list(file.embeddings)[:4])})"
            )
        scales = {
            module.name: scale_of(module, numbers_of(source, module.name))
            for module in file.modules.values()
        }
        self.bakings[source.name] = Baking(source, found, MappingProxyType(scales))

    def _check_weight(self, source: Source, found: Match) -> None:
        """Every tensor that an adapter of `loras:` changes needs a weight; no other does."""
        name = lora_weight(source.name)
        if name not in self.params:
            return
        all_lines = self.params[name].lines
        lines = {tensor: all_lines[tensor] for tensor in found.placed if tensor in all_lines}
        missing = [tensor for tensor, line in lines.items() if line is _UNSAID]
        if missing:
            error = no_value_for(missing, self.family, self.recipe.params[name].where)
            error.what = f"param {name!r}: {error.what}"
            self.errors.append(error)
        idle = {id(line) for line in all_lines.values()} - {id(line) for line in lines.values()}
        self.notes += [
            f"{line.where}: {line.selector!r} has no say: {source.name} changes nothing there"
            for line in self.recipe.params[name].lines
            if id(line) in idle and line.selector != "default"
        ]

    def _has_weight(self, adapter: str, name: str) -> bool:
        """Whether an adapter of `loras:` has another weight than 0 for a tensor."""
        weight = self.params.get(lora_weight(adapter))
        return weight is None or weight.line_of(name).value != 0.0

    def _changes(self, adapter: str, name: str) -> tuple[Change, ...]:
        """What an adapter does to one tensor."""
        return changes_of(self.bakings[adapter], self.index[adapter], name)

    def _resolved(self, form: Linear, name: str) -> Linear:
        """The form with every adapter as what it is for this tensor: nothing, a delta, or a bake.

        Adapters that do not depend on the weights become deltas, so that they commute and the
        weights under them keep their place in the sum.
        """
        if not self.bakings:
            return form
        if any(name in baking.match.placed for baking in self.bakings.values()):
            return self._resolve(form, name)
        if form not in self._untouched:
            self._untouched[form] = self._resolve(form, name)
        return self._untouched[form]

    def _resolve(self, form: Linear, name: str) -> Linear:
        result = Linear(())
        for leaf, value in form.terms:
            result = result + self._resolved_leaf(leaf, name) * value
        return result

    def _resolved_leaf(self, leaf: Leaf, name: str) -> Linear:
        if isinstance(leaf, Applied):
            models = tuple(self._resolve(model, name) for model in leaf.models)
            return Linear.of(replace(leaf, models=models))
        if not isinstance(leaf, Baked):
            return Linear.of(leaf)
        model = self._resolve(leaf.model, name)
        changes = self._changes(leaf.adapter, name)
        if not changes:
            return model
        if all(change.is_delta for change in changes):
            return model + Linear.of(AdapterDelta(leaf.adapter)) * leaf.strength
        return Linear.of(Baked(model, leaf.adapter, leaf.strength))

    # --- tensors ---

    def _output_names(self) -> list[str]:
        """Canonical names of all output tensors: the base's, and what it takes beyond them."""
        taken = dict.fromkeys(name for found in self.taken.values() for name in found)
        return [*self.base.names, *(name for name in taken if name not in self.base.names)]

    def _step(self, name: str) -> Step:
        component = self.family.component_of(name)
        make = self._taken_step if component in self.recipe.take else self._own_step
        step = make(name, component)
        return replace(step, component=component, block=self._block(name))

    def _block(self, name: str) -> str:
        return self.family.block_of(name, self.recipe.compat)

    def _own_step(self, name: str, component: str) -> Step:
        own = self._read(self.base, name)
        spec = own.spec
        if _is_position_ids(name, spec):
            repaired = TensorSpec(spec.name, "I64", spec.shape)
            note = f"position ids stored as {spec.dtype} are repaired to 0, 1, 2, …"
            if spec.dtype != "I64":
                self.notes.append(f"{spec.name}: {note}")
            why = note if spec.dtype != "I64" else "position ids are never averaged"
            return _bare(repaired, "carried", PositionIds(own), why)
        if not spec.is_float:
            step = _bare(spec, "carried", Copy(own), f"{spec.dtype} values are never averaged")
            floats = [
                model
                for model in self.used
                if self._has(model, name) and self._read(self.by_name[model], name).spec.is_float
            ]
            if not floats:
                return step
            theirs = f"{' and '.join(floats)} {'store' if floats[1:] else 'stores'} floats"
            why = f"{self.base.name} stores {spec.dtype}, {theirs}"
            return replace(step, why=why, lacking=tuple(floats))
        if self.family.is_protected(name):
            return _bare(spec, "carried", Copy(own), "protected: part of what the model is")
        dtype = self._output_dtype(component, spec.dtype)
        if dtype != spec.dtype:
            spec = replace(spec, dtype=dtype)
        try:
            form, lines = self._form(name)
            form = self._resolved(form, name)
            if self.guests and not self.family.is_copy(name):
                form = form.without(self.guests)
        except CkptError as exc:
            self._bad_numbers.setdefault(str(exc), (exc, []))[1].append(name)
            return _bare(spec, "carried", Copy(own), "")
        lacking, why = self._lacking(form, name)
        if lacking:
            form = over_base(form, self.base.name)
            if form.terms == ((self.base.name, 1.0),):
                step = replace(_single(spec, own, "carried", why), form=None)
            else:
                step = replace(self._formed(name, spec, form, own), form=form)
                step = replace(step, why=f"{why}; adapters go into the base's")
            return replace(step, lines=lines, lacking=lacking)
        if spec.numel == 0:
            return _single(spec, own, "carried", "empty")
        return replace(self._formed(name, spec, form, own), form=form, lines=lines)

    def _number_errors(self) -> Iterator[CkptError]:
        """What some numbers make impossible, once each, with the lines that set them."""
        for error, names in self._bad_numbers.values():
            lines = {param: compiled.line_of(names[0]) for param, compiled in self.params.items()}
            told = ", ".join(
                f"{param} = {line.value:g} (set by {line.selector!r} at {line.where})"
                for param, line in _said(lines).items()
            )
            count = f"{len(names):,} tensors, such as {names[0]}" if names[1:] else names[0]
            fix = f"for {count}: {told}" if told else error.fix or f"for {count}"
            yield RecipeError(error.what, where=error.where, fix=fix)

    def _nothing_merged(self, steps: Sequence[Step]) -> Iterator[CkptError]:
        """A base without tensors, and models that have none in common."""
        if not steps:
            fix = "download the file again, or name another model"
            yield InputError(f"{self.base.name} has no tensors", where=self.base.ref.where, fix=fix)
        apart = any(step.lacking for step in steps)
        if apart and len(self.used) > 1 and all(step.action == "carried" for step in steps):
            parts = [f"{name} is {self.by_name[name].title}" for name in self.used]
            usual = {own: name for name, own in self.base.names.items()}
            for step in steps:
                if any(self._has(model, usual[step.spec.name]) for model in step.lacking):
                    yield InputError(
                        f"the models have no floats in common: {step.why}",
                        where=step.spec.name,
                        fix="use models that store floats; integers are never averaged",
                    )
                    return
            yield InputError(
                f"the models have no tensor in common: {', '.join(parts)}",
                where=self.recipe.merge.where,
                fix="use models of one family, stored with the same tensor names",
            )

    def _codes(self, steps: Sequence[Step]) -> Iterator[CkptError]:
        """Quantised weights may be copied; there is no calculating with them."""
        computed = [step for step in steps if isinstance(step.program, Compute | Widen)]
        for source in self.sources:
            stored = quantised_in(source.checkpoint)
            if not stored:
                continue
            number = self.index[source.name]
            usual = {own: name for name, own in source.names.items()}
            components = {self.family.component_of(usual.get(own, own)) for own in stored}
            if any(
                source.name in self.used
                or any(r.source == number and r.name in stored for r in reads_of(step.program))
                for step in computed
                if step.component in components
            ):
                yield source.ref.blamed(not_numbers(stored))

    def _formed(self, name: str, spec: TensorSpec, form: Linear, own: Read) -> Step:
        self._formed_by[form] += 1
        if form.is_difference:
            error = RecipeError(
                f"with these numbers the formula is {form}: a difference, not a model",
                where=self.recipe.merge.where,
                fix="choose numbers that add up to 1",
            )
            self._bad_numbers.setdefault(str(error), (error, []))[1].append(name)
            return _bare(spec, "merged", Copy(own), "")
        models = form.models
        reads = [self._read(self.by_name[model], name) for model in models]
        wide = self._widths(name, spec, reads)
        if wide is not None:
            return wide(form, reads)
        if form.terms == ((models[0], 1.0),) and _same_shape(reads[0].spec, spec):
            return _single(spec, reads[0], "copied", f"the formula is {models[0]} here")
        for model, read in zip(models, reads, strict=True):
            if not _same_shape(read.spec, spec):
                self._shape_error(spec.name, own, model, read)
                return _bare(spec, "merged", Copy(own), "")
        return _bare(spec, "merged", self._compute(form, reads, spec, name), "formula")

    def _compute(
        self,
        form: Linear,
        reads: Sequence[Read],
        spec: TensorSpec,
        name: str,
    ) -> Compute:
        adapters = adapters_in(form)
        deltas = [leaf for leaf in adapters if isinstance(leaf, AdapterDelta)]
        key = form, form.written
        if key in self._mixes:
            mix, whole = self._mixes[key]
        else:
            leaves: tuple[Leaf, ...] = (*form.models, *deltas)
            index = {leaf: number for number, leaf in enumerate(leaves)}
            changes = {leaf.adapter: self._changes(leaf.adapter, name) for leaf in adapters}
            mix = compile_mix(form, index, self._anchor, changes)
            whole = _needs_whole(mix)
            if not adapters:  # whose changes are another tensor's next time
                self._mixes[key] = mix, whole
        return Compute(
            mix,
            tuple(reads),
            _precision(spec, reads, form, mix),
            whole,
            tuple(self._changes(leaf.adapter, name) for leaf in deltas),
        )

    def _widths(self, name: str, spec: TensorSpec, reads: Sequence[Read]) -> _WideStep | None:
        """How to merge models that differ in their input channels; None where they do not.

        The models named anywhere in the formula decide, not the numbers, so that a parameter of 0
        in this block does not change the shape of the result.
        """
        candidates = [self._read(self.by_name[m], name) for m in self.used if self._has(m, name)]
        everyone = [*candidates, *reads]
        if len({read.spec.shape for read in everyone}) <= 1:
            return None
        if not self._may_widen(name, spec) or not _differ_in_channels(everyone):
            return None
        counts = sorted({read.spec.shape[1] for read in everyone})
        widened = {r.source for r in everyone if self._has_extra_channels(r)}
        if len(counts) > 2 or widened.issuperset(read.source for read in everyone):
            parts = [f"{self.sources[r.source].name} has {r.spec.shape[1]}" for r in candidates]
            self.errors.append(
                InputError(
                    f"these input channels do not go together: {', '.join(parts)}",
                    where=spec.name,
                    fix="merge one inpainting, edit or depth model at a time",
                )
            )
            return _WideStep(self, spec, counts[0], everyone[0], name)
        extra = next(read for read in everyone if read.spec.shape[1] == counts[-1])
        self._widened.append(
            f"{spec.name}: the first {counts[0]} input channels are merged, "
            f"channels {counts[0] + 1} to {counts[-1]} come from {self.sources[extra.source].name}"
        )
        shape = (spec.shape[0], counts[-1], *spec.shape[2:])
        return _WideStep(self, replace(spec, shape=shape), counts[0], extra, name)

    def _has_extra_channels(self, read: Read) -> bool:
        """Whether a model is a variant (inpainting, edit, depth) that takes more than latents."""
        return self.sources[read.source].detection.variant not in (None, "base")

    def _may_widen(self, name: str, spec: TensorSpec) -> bool:
        if len(spec.shape) != 4:
            return False
        if name in self.family.input_tensors:
            return True
        return name.endswith(("input_blocks.0.0.weight", "conv_in.weight"))

    def _taken_step(self, name: str, component: str) -> Step:
        model, where = self.recipe.take[component]
        source = self.by_name[model]
        actual = self.taken[component].get(name)
        own = self.base.names.get(name)
        out_name = own if own is not None else name
        if actual is None:  # then it is the base's
            kept = self._read(self.base, name)
            if name not in self._known or not self._known[name].may_lack:
                self.errors.append(_not_in(component, model, out_name, where))
            return _bare(kept.spec, "carried", Copy(kept), f"{model} comes without it")
        read = Read(self.index[model], actual, source.checkpoint[actual])
        if own is not None and not _same_shape(read.spec, self.base.checkpoint[own]):
            theirs = self._read(self.base, name)
            wide = self._may_widen(name, read.spec) and _differ_in_channels([read, theirs])
            fix = f"`base: {model}` gives the result the input channels of {model}" if wide else ""
            self._shape_error(out_name, theirs, model, read, fix)
        shape = self.base.checkpoint[own].shape if own is not None else read.spec.shape
        spec = TensorSpec(out_name, read.spec.dtype, shape)
        if component in self.recipe.output.dtypes and spec.is_float:
            spec = replace(spec, dtype=self._output_dtype(component, spec.dtype))
        return _single(spec, read, "copied", f"{component} is taken from {model}")

    def _read(self, source: Source, name: str) -> Read:
        read = self._reads.get((source.name, name))
        if read is None:
            actual = source.names[name]
            read = Read(self.index[source.name], actual, source.checkpoint[actual])
            self._reads[source.name, name] = read
        return read

    def _has(self, model: str, name: str) -> bool:
        return name in self.by_name[model].names

    def _lacking(self, form: Linear, name: str) -> tuple[tuple[str, ...], str]:
        """The models of a form that have no floats of a name, and that in words."""
        absent: list[str] = []
        other: dict[str, str] = {}
        for model in form.models:
            if not self._has(model, name):
                absent.append(model)
            elif not (spec := self._read(self.by_name[model], name).spec).is_float:
                other[model] = spec.dtype
        words = [f"{' and '.join(absent)} {'lack' if absent[1:] else 'lacks'} it"] if absent else []
        words += [f"{model} stores {dtype}, not floats" for model, dtype in other.items()]
        return (*absent, *other), ", ".join(words)

    def _output_dtype(self, component: str, stored: str) -> str:
        dtypes = self.recipe.output.dtypes
        wanted = dtypes.get(component, dtypes["default"])
        return stored if wanted == "keep" else wanted

    def _shape_error(self, name: str, own: Read, model: str, read: Read, fix: str = "") -> None:
        other = self.by_name[model]
        self.errors.append(
            InputError(
                f"{self.sources[own.source].name} is {list(own.spec.shape)}, "
                f"{model} is {list(read.spec.shape)}",
                where=name,
                fix=self._kinds_told(other) + (fix or "use models of one shape"),
            )
        )

    def _kinds_told(self, other: Source) -> str:
        """What the base and another model are, where a family tells."""
        if {self.base.detection.family, other.detection.family} <= {None, UNKNOWN.id}:
            return ""
        titles = f"{other.name} is {other.title}, {self.base.name} is {self.base.title}"
        return f"{titles}; "

    # --- what there is to say ---

    def _check_strict(self, steps: Iterable[Step], dropped: Mapping[str, Sequence[str]]) -> None:
        if not self.recipe.strict:
            return
        for step in steps:
            if step.lacking:
                self.errors.append(
                    InputError(
                        f"strict: {step.why}",
                        where=step.spec.name,
                        fix="use a complete model, or leave out `strict: true`",
                    )
                )
        self.errors += [
            InputError(
                f"strict: {self.base.name} lacks {counted(len(names), 'tensor')} of {model}, such "
                f"as {names[0]}",
                where=self.base.ref.where,
                fix="use a complete model, or leave out `strict: true`",
            )
            for model, names in dropped.items()
        ]
        self.errors = grouped(self.errors)

    def _variant(self) -> str | None:
        """The result's variant: the base's, or that of the model whose channels it got."""
        if self._widened:
            for name in self.used:
                variant = self.by_name[name].detection.variant
                if variant not in (None, "base"):
                    return variant
        return self.base.detection.variant

    def _dropped(self, names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        have = set(names)
        dropped = {}
        for model in self.used:
            extra = tuple(name for name in self.by_name[model].names if name not in have)
            if extra:
                dropped[model] = extra
        return MappingProxyType(dropped)

    def _tell(self, plan: Plan) -> None:
        self.notes += self._widened
        self._tell_sums()
        for why, count in _carried_reasons(plan.steps).items():
            carried = counted(count, "tensor", "is")
            self.warnings.append(f"{carried} carried from {plan.base.name}: {why}")
        for model, names in plan.dropped.items():
            components = Counter(self.family.component_of(name) for name in names)
            parts = ", ".join(f"{count:,} of {part}" for part, count in components.items())
            self.warnings.append(
                f"left out of {model}: {counted(len(names), 'tensor')} that {plan.base.name} "
                f"lacks: {parts}"
            )
        for component, lacking in incomplete_parts(self.base.detection, self.base.names).items():
            if component not in self.recipe.take:
                self.warnings.append(
                    f"{self.base.name} is incomplete, and so is the result: its {component} lacks "
                    f"{counted(len(lacking), 'tensor')}, such as {lacking[0]}"
                )
        for source in self.sources:
            if source.doubles:
                left, kept = source.doubles[0]
                more = f" (and {len(source.doubles) - 1:,} more)" if source.doubles[1:] else ""
                self.warnings.append(
                    f"{source.name} has tensors under two names: {left!r} is left out, "
                    f"{kept!r} is used{more}"
                )
            self.warnings += [f"{source.name}: {text}" for text in source.checkpoint.warnings[:5]]
            self.notes += [f"{source.name}: {text}" for text in source.notes]
        held = {step.component for step in plan.steps}
        self.warnings += [
            f"output dtype: the result has no {component}"
            for component in plan.recipe.output.dtypes
            if component not in ("default", *held)
        ]
        self._tell_taken(plan)
        self._tell_adapters(plan)
        if not any(step.action == "merged" for step in plan.steps) and not self.recipe.take:
            self.warnings.append("nothing is merged: every tensor is copied or carried")

    def _tell_sums(self) -> None:
        """Sums other than 1, of the whole formula and of what methods work on within it."""
        odd: dict[tuple[str, str], tuple[Linear, Counter[Linear]]] = {}
        for form, count in self._formed_by.items():
            for method, part in (("", form), *form.parts):
                total = f"{part.total:.6g}"
                if float(total) != 1.0:
                    counts = odd.setdefault((method, total), (part, Counter()))[1]
                    counts[form] = count
        for (method, total), (example, counts) in odd.items():
            within = f"within {method} " if method else ""
            self.warnings.append(
                f"{within}the coefficients add up to {total}, not 1, for {counts.total():,} "
                f"tensors: {example}, sum {total}"
            )

    def _tell_adapters(self, plan: Plan) -> None:
        working = {
            leaf.adapter
            for step in plan.steps
            if step.form is not None
            for leaf in adapters_in(step.form)
        }
        self.warnings += [
            f"{name} changes nothing: its weight is 0 for all that it has modules for"
            for name in self.bakings
            if name not in working
        ]

    def _tell_taken(self, plan: Plan) -> None:
        for component, (model, _) in self.recipe.take.items():
            steps = [step for step in plan.steps if step.component == component]
            taken = [step.spec for step in steps if step.action != "carried"]
            stored = " and ".join(sorted({spec.dtype for spec in taken if spec.is_float}))
            exact = component not in self.recipe.output.dtypes
            self.notes.append(
                f"{component}: {counted(len(taken), 'tensor')} taken from {model}"
                + (f", {stored}, byte for byte" if exact else "")
            )
            names = self.taken[component]
            more = sum(name not in self.base.names for name in names)
            if 0 < more < len(names):
                self.notes.append(f"{component}: {more:,} of them {self.base.name} lacks")
            if len(taken) < len(steps):
                self.notes.append(
                    f"{component}: {counted(len(steps) - len(taken), 'tensor')} that {model} comes "
                    f"without, from {self.base.name}; loaders need none of them"
                )


@dataclass(frozen=True)
class _WideStep:
    """Makes the step of a tensor whose sources differ in input channels."""

    planner: _Planner
    spec: TensorSpec
    channels: int
    extra: Read
    name: str

    def __call__(self, form: Linear, reads: Sequence[Read]) -> Step:
        narrow = replace(self.spec, shape=(self.spec.shape[0], self.channels, *self.spec.shape[2:]))
        wide = [term for term in form.terms if isinstance(term[0], AdapterDelta)]
        rest = Linear(tuple(t for t in form.terms if t not in wide)) if wide else form
        common = self.planner._compute(rest, reads, narrow, self.name)
        changes_of = self.planner._changes
        deltas = tuple(
            (weight, changes_of(leaf.adapter, self.name))
            for leaf, weight in wide
            if isinstance(leaf, AdapterDelta)
        )
        for leaf in adapters_in(rest):
            changes = changes_of(leaf.adapter, self.name)
            if any(change.shape[1:2] == self.spec.shape[1:2] for change in changes):
                self._refuse(leaf.adapter)
        program = Widen(common, self.extra, self.channels, deltas)
        return _bare(self.spec, "merged", program, "common input channels merged, the rest kept")

    def _refuse(self, adapter: str) -> None:
        """A change that reads the weight, or is inside a method, would need all channels there."""
        self.planner.errors.append(
            InputError(
                f"{adapter} changes all {self.spec.shape[1]} input channels, of which only "
                f"{self.channels} are merged",
                where=self.spec.name,
                fix="bake it into the finished model, in a second recipe",
            )
        )


def _said(lines: Mapping[str, ParamLine]) -> dict[str, ParamLine]:
    """The lines that stand in the recipe."""
    return {param: line for param, line in lines.items() if line is not _UNSAID}


def _bare(spec: TensorSpec, action: Action, program: Program, why: str) -> Step:
    return Step(spec, action, program, why, component="", block="")


def _single(spec: TensorSpec, read: Read, action: Action, why: str) -> Step:
    """A tensor that is one read, as bytes, or cast where the dtypes differ."""
    if read.spec.dtype == spec.dtype:
        return _bare(spec, action, Copy(read), why)
    kept: Action = action if action == "carried" else "cast"
    return _bare(spec, kept, cast(read), f"{why}, {read.spec.dtype} to {spec.dtype}")


def _needs_whole(mix: Mix) -> bool:
    """Whether a mix needs the whole tensor at a time."""
    methods = load_methods()
    if any(methods[node.method].access == "tensor" for node in applied_in(mix)):
        return True
    return any(True for _ in baked_in(mix))


def _precision(spec: TensorSpec, reads: Sequence[Read], form: Linear, mix: Mix) -> Precision:
    """fp64 where it costs little or fp32 could not give the correctly rounded result."""
    wide = {"F32", "F64"}
    if spec.dtype in wide or any(read.spec.dtype == "F64" for read in reads):
        return "F64"
    if all(isinstance(leaf, str) for leaf, _ in form.terms) or len(form.terms) > MAX_F32_TERMS:
        return "F64"
    methods = load_methods()
    return "F64" if any(methods[node.method].doubles for node in applied_in(mix)) else "F32"


def _same_shape(one: TensorSpec, other: TensorSpec) -> bool:
    """Equal but for sizes of 1 at the end: [512, 512] and [512, 512, 1, 1] hold the same."""
    return _stripped(one.shape) == _stripped(other.shape)


def _stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    end = len(shape)
    while end > 2 and shape[end - 1] == 1:
        end -= 1
    return shape[:end]


def _differ_in_channels(reads: Sequence[Read]) -> bool:
    return len({(read.spec.shape[:1], read.spec.shape[2:]) for read in reads}) == 1


def _moved(name: str, old: str, new: str) -> str:
    """The name with another beginning, where it has this one."""
    return new + name[len(old) :] if name.startswith(old) else name


def _not_in(component: str, model: str, name: str, where: str) -> InputError:
    return InputError(
        f"take: {model} has no {name!r}",
        where=where,
        fix=f"take {component} from a model that has all of it",
    )


def _is_position_ids(name: str, spec: TensorSpec) -> bool:
    """[1, 77], or [77] as some tools write them."""
    return name.endswith("position_ids") and spec.shape[-1:] == (spec.numel,)


def _nearest_family(source: Source) -> str:
    rejected = source.detection.rejected
    if not rejected:
        return "no family is near"
    return f"nearest: {rejected[0].family}, but {rejected[0].reason}"


def _carried_reasons(steps: Iterable[Step]) -> dict[str, int]:
    reasons = Counter(step.why for step in steps if step.lacking)
    return {
        re.sub(r"\b(lacks?) it\b", r"\1 them", why) if count > 1 else why: count
        for why, count in reasons.items()
    }
