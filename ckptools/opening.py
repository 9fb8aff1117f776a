"""The models of a recipe, opened: what each file is, and under which names its tensors take part.

Headers only; no tensor bytes, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ckptools.baking import adapter_title
from ckptools.checkpoint import Checkpoint, json_beside
from ckptools.copies import as_copy, usual_names
from ckptools.errors import CkptError, InputError, ManyErrors, RecipeError, grouped, raise_all
from ckptools.family import UNKNOWN, Detection, Family, detect, family_of, kind_words
from ckptools.folders import as_component
from ckptools.formula import adapter_names, model_names, model_roles, used_names
from ckptools.hubref import is_hub_text, parse_hub_ref
from ckptools.lora.group import PEFT_CONFIG, AdapterFile, group
from ckptools.recipe import ModelRef, Recipe
from ckptools.sources import Opener, open_checkpoint

WHOLE_KINDS = frozenset({"checkpoint", "controlnet"})  # what such a file lacks it has not at all
_ADAPTER_KINDS = {"lora", "embedding"}
_NOUNS = {"controlnet": "a ControlNet", "checkpoint": "a whole model"}
_DIFFERENCE = "difference"  # the marker tensor of a ControlNet that is a difference to a UNet


@dataclass(frozen=True)
class Source:
    """One opened model of the recipe.

    names    canonical tensor name -> the name it has in this file
    doubles  (name left out, name used) of tensors that the file has under two spellings
    adapter  the file's modules, where it stands in the recipe as an adapter
    config   PEFT's adapter_config.json beside it, {} where there is none
    is_guest  whether it stands where a method takes models of another kind than it gives: then
              the checkpoint is a view of what the result is a copy of, under the result's names
    notes    what is worth a line about it
    """

    ref: ModelRef
    checkpoint: Checkpoint
    detection: Detection
    names: Mapping[str, str]
    doubles: tuple[tuple[str, str], ...] = ()
    adapter: AdapterFile | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    is_guest: bool = False
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The model's name in formulas."""
        return self.ref.name

    @property
    def label(self) -> str:
        """The file's name without its folder; for a folder of the Hub, its repository's."""
        if is_hub_text(self.ref.path):
            ref = parse_hub_ref(self.ref.path)
            return (ref.file or ref.repo).rpartition("/")[2]
        return self.checkpoint.path.name

    @property
    def title(self) -> str:
        """What the file is, in words: "Stable Diffusion 1.x inpainting"."""
        if self.adapter is not None:
            return adapter_title(self.adapter)
        if self.detection.family is None:
            return "unknown"
        variant = self.detection.variant or ""
        title = family_of(self.detection).title
        return title if variant in ("", "base") else f"{title} {variant}"


def open_sources(
    recipe: Recipe,
    opener: Opener = open_checkpoint,
    *,
    more: Callable[[Source], Iterable[CkptError]] = lambda base: (),
) -> tuple[Source, ...]:
    """Open every model of a recipe and say what it is; all that cannot be opened at once.

    more  where some cannot be: what else is wrong, as far as the base tells, if that is open
    """
    sources: list[Source] = []
    errors: list[CkptError] = []
    adapters = adapter_names(recipe.result, recipe.scope)
    _check_roles(recipe, adapters)
    for ref in recipe.models.values():
        is_adapter = ref.name in adapters
        try:
            open_one = _open_adapter if is_adapter else open_source
            sources.append(open_one(ref, opener(recipe.file_of(ref))))
        except CkptError as exc:
            noun = "adapter" if is_adapter else "model"
            errors += grouped([ref.blamed(one, noun) for one in each_of(exc)])
    if errors:
        for base in (source for source in sources if source.name == recipe.base):
            errors += more(base)
        for source in sources:
            source.checkpoint.close()
    raise_all(errors)
    try:
        return _with_parts(recipe, _with_guests(recipe, sources))
    except BaseException:
        for source in sources:
            source.checkpoint.close()
        raise


def _with_guests(recipe: Recipe, sources: Sequence[Source]) -> tuple[Source, ...]:
    """The sources, guests as views; wrong kinds of files are errors that point into the formula."""
    by_name = {source.name: source for source in sources}
    roles = model_roles(recipe.result, recipe.scope)
    raise_all(
        [
            role.formula.error(
                f"{role.parameter} is {role.model}, {by_name[role.model].title}; "
                f"it must be {_NOUNS[role.kind]}",
                role.column,
            )
            for role in roles
            if role.kind and by_name[role.model].detection.kind not in (role.kind, "unknown")
        ]
    )
    guests = {role.model for role in roles if role.is_guest}
    guests -= {role.model for role in roles if not role.is_guest}
    host = by_name[recipe.base]
    if host.name in guests:
        raise RecipeError(
            f"base: {host.name} is {host.title}, and the result is not",
            where=recipe.merge.where,
            fix="leave `base` out",
        )
    if not guests or not family_of(host.detection).copied:
        return tuple(sources)
    return tuple(_guest(host, each) if each.name in guests else each for each in sources)


def _guest(host: Source, guest: Source) -> Source:
    """A model as what its copy knows of it."""
    family = family_of(host.detection)
    variant = host.detection.variant
    theirs = guest.detection.family
    of = family.variants[variant].of if variant else theirs
    if _DIFFERENCE in host.checkpoint:
        raise InputError(
            f"{host.name} is stored as a difference to a UNet, which goes with any base as it is",
            where=host.ref.where,
            fix="use it with the new base, without a transfer",
        )
    if not of or theirs not in (of, None):
        made_for = f"for {of}" if of else f"for {variant}, whose copies are not known"
        raise InputError(
            f"{host.name} is a {family.title} {made_for}, {guest.name} is {guest.title}",
            where=guest.ref.where,
            fix="use models of the family that it was made for",
        )
    copy = {usual: host.checkpoint[own] for usual, own in host.names.items()}
    try:
        view, notes = as_copy(guest.checkpoint, guest.names, family, copy)
    except InputError as exc:
        raise guest.ref.blamed(exc) from exc
    guest.checkpoint.close()
    names = MappingProxyType({name: name for name in view})
    return replace(guest, checkpoint=view, names=names, is_guest=True, notes=notes)


def _with_parts(recipe: Recipe, sources: Sequence[Source]) -> tuple[Source, ...]:
    """The sources; a file that is only taken from, and holds a part alone, as the part it gives."""
    family = common_family(recipe, {source.name: source for source in sources})
    taken: dict[str, list[str]] = {}
    for component, (name, _) in recipe.take.items():
        taken.setdefault(name, []).append(component)
    for name in (recipe.base, *used_names(recipe.result, recipe.scope)):
        taken.pop(name, None)
    return tuple(
        _part(source, family, taken[source.name]) if source.name in taken else source
        for source in sources
    )


def _part(source: Source, family: Family, components: Sequence[str]) -> Source:
    """A file of its own under the names that its tensors have in the result's family."""
    named = {family.component_of(name) for name in source.names}
    if source.detection.kind in WHOLE_KINDS or not named.isdisjoint(components):
        return source
    try:
        view = as_component(source.checkpoint, family.id, components)
    except CkptError as exc:
        raise ManyErrors([source.ref.blamed(error) for error in each_of(exc)]) from exc
    if view is None:
        return source
    source.checkpoint.close()
    names = MappingProxyType({name: name for name in view})
    return replace(source, checkpoint=view, names=names)


def common_family(recipe: Recipe, by_name: Mapping[str, Source]) -> Family:
    """The base's family, or another participant's where the base is unknown."""
    for name in (recipe.base, *used_names(recipe.result, recipe.scope)):
        if name in by_name and by_name[name].adapter is None:
            family = family_of(by_name[name].detection)
            if family is not UNKNOWN:
                return family
    return UNKNOWN


def _check_roles(recipe: Recipe, adapters: frozenset[str]) -> None:
    """A name is a model or an adapter, not both."""
    named = (recipe.base, *model_names(recipe.result, recipe.scope))
    models = dict.fromkeys(named, recipe.merge.where) | dict(recipe.take.values())
    raise_all(
        [
            RecipeError(
                f"{name!r} is baked as an adapter, and used as a model as well",
                where=models[name],
                fix="give the model and the adapter a name each",
            )
            for name in sorted(adapters)
            if name in models
        ]
    )


def each_of(error: CkptError) -> tuple[CkptError, ...]:
    """The errors that one error stands for."""
    return error.errors if isinstance(error, ManyErrors) else (error,)


def _open_adapter(ref: ModelRef, checkpoint: Checkpoint) -> Source:
    try:
        detection = detect(checkpoint, checkpoint.metadata)
        if detection.kind not in ("lora", "unknown"):
            raise InputError(
                f"this is {kind_words(detection)}, not an adapter",
                fix="`loras:` and bake() take adapters; name it in `models:` to merge it",
            )
        config = json_beside(checkpoint.path, PEFT_CONFIG) or {}
        adapter = group(checkpoint, checkpoint.metadata, config=config)
        if not adapter.modules:
            raise InputError("there is no adapter in this file", fix="leave it out")
    except BaseException:
        checkpoint.close()
        raise
    names: Mapping[str, str] = MappingProxyType({})
    return Source(ref, checkpoint, detection, names, adapter=adapter, config=config)


def open_source(ref: ModelRef, checkpoint: Checkpoint) -> Source:
    """An open model, and what it is; `InputError`, and closed, where it is an adapter."""
    detection = detect(checkpoint, checkpoint.metadata)
    if detection.kind in _ADAPTER_KINDS:
        checkpoint.close()
        raise InputError(
            f"this is {kind_words(detection)}, not weights",
            fix="bake it: `loras: [{path: …, weight: 0.8}]`, or bake(A, L, weight=0.8)"
            if detection.kind == "lora"
            else "a formula needs whole models",
        )
    canonical = usual_names(checkpoint, detection)
    names: dict[str, str] = {}
    doubles: list[tuple[str, str]] = []
    for name in checkpoint:
        usual = canonical(name)
        if usual in names:
            kept, left = (name, names[usual]) if name == usual else (names[usual], name)
            doubles.append((left, kept))
            names[usual] = kept
        else:
            names[usual] = name
    return Source(ref, checkpoint, detection, MappingProxyType(names), tuple(doubles))
