"""`ckptools check` from top to bottom: does a model, or the merge of a recipe, still work?

    open ──▶ weights against the parents' ──▶ parents, one by one ──▶ the model ──▶ report

What the weights tell needs no torch; where a model cannot be built here (no `render` extra, a
family without pictures, no config for unusual widths) that is all there is, and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ckptools.check import Check, Report, check_weights
from ckptools.errors import CkptError, InputError, ManyErrors, UsageError
from ckptools.family import detect, kind_words
from ckptools.hubref import short_name
from ckptools.progress import Progress
from ckptools.sources import open_checkpoint
from ckptools.workflow import check_pins, planned

if TYPE_CHECKING:
    from ckptools.check import Kin, Weights
    from ckptools.checkpoint import Checkpoint
    from ckptools.recipe import Recipe

Tell = Callable[[str], None]

_NEGATIVE = -0.02  # a share below this is a subtracted base, not a parent to resemble
_NONE = 0.02
_NEEDED = ("torch", "diffusers", "transformers", "tokenizers")


@dataclass(frozen=True)
class Checked:
    """What was found.

    source   the file, or the recipe
    parents  the models that it was held against
    kin      component → its shares in the parents, by weight
    """

    source: Path
    report: Report
    parents: tuple[str, ...] = ()
    kin: Mapping[str, Kin] = field(default_factory=dict)


def check_source(
    source: Path,
    *,
    against: Sequence[Path] = (),
    base: Path | None = None,
    draws: Path | None = None,
    config: Path | None = None,
    quick: bool = False,
    threads: int = 2,
    tell: Tell = lambda stage: None,
) -> Checked:
    """Check a file, or a folder, that is there.

    against  its parents, or models that it should be like
    base     what the parents were trained from: it has a share in the weights, but no say
    draws    the model that a ControlNet is checked on; given for nothing else
    config   a diffusers folder for models of unusual width, as `render.load_pipeline` takes it
    quick    nothing is drawn and no parent is loaded
    tell     is told what is done at the moment

    A source that cannot be opened is an error; one that can, but is not sound, a failed check.
    """
    with ExitStack() as stack:
        model = stack.enter_context(open_checkpoint(source))
        if detect(model, model.metadata).kind == "controlnet":
            if against or base:
                raise UsageError("a ControlNet has no parents to be like", fix="leave them out")
            found = _check_control(model, draws, config, quick=quick, threads=threads, tell=tell)
            model.check_unchanged()
            return Checked(source, *found)
        _refuse_model(draws)
        _refuse_adapters(model)
        parents: dict[str, Checkpoint] = {}
        for path in (*against, *([base] if base else [])):
            name = _name(path, parents)
            parents[name] = stack.enter_context(open_checkpoint(path))
            _refuse_adapters(parents[name])
            _refuse_strangers(model, parents[name])
        bases = set(list(parents)[len(against) :])
        found = _check(model, parents, bases, config, quick=quick, threads=threads, tell=tell)
        model.check_unchanged()
    return Checked(source, *found)


def check_recipe(
    recipe: Recipe,
    *,
    draws: Path | None = None,
    config: Path | None = None,
    quick: bool = False,
    threads: int = 2,
    tell: Tell = lambda stage: None,
) -> Checked:
    """Check what a recipe would write, without writing it; its models are the parents.

    draws   the model that a ControlNet is checked on, where the recipe makes one
    config  None: what the recipe says of its base
    """
    from ckptools.check import Merged

    with planned(recipe, threads=threads, force=True) as plan:
        check_pins(plan.sources, hash_inputs=False, progress=Progress())
        parents = {
            each.name: each.checkpoint
            for each in plan.sources
            if each.detection.kind == "checkpoint"
        }
        said = plan.base.ref.config
        if config is None and said:
            config = recipe.beside(said)
        model = cast("Checkpoint", Merged(plan))  # it has all of it that is asked for here
        if plan.base.detection.kind == "controlnet":
            found = _check_control(model, draws, config, quick=quick, threads=threads, tell=tell)
            return Checked(recipe.path, *found)
        _refuse_model(draws)
        found = _check(model, parents, set(), config, quick=quick, threads=threads, tell=tell)
    return Checked(recipe.path, *found)


def _refuse_model(draws: Path | None) -> None:
    if draws is not None:
        raise UsageError("--with is for ControlNets, and SRC is none", fix="leave it out")


def _refuse_adapters(checkpoint: Checkpoint) -> None:
    detection = detect(checkpoint, checkpoint.metadata)
    if detection.kind not in ("checkpoint", "unknown", "unet", "vae", "text_encoder"):
        raise InputError(
            f"this is {kind_words(detection)}, not a model",
            where=str(checkpoint.path),
            fix="check a model that it was baked into, or see `ckptools lora check`",
        )


def _refuse_strangers(model: Checkpoint, parent: Checkpoint) -> None:
    ours, theirs = (detect(each, each.metadata).family for each in (model, parent))
    if ours and theirs and ours != theirs:
        raise InputError(
            f"a model of {theirs}; {model.path.name} is one of {ours}",
            where=str(parent.path),
            fix="give models that it was merged from",
        )


def _name(path: Path, taken: Mapping[str, object]) -> str:
    name, number = short_name(path), 2
    while name in taken:
        name, number = f"{short_name(path)} ({number})", number + 1
    return name


def _check(
    model: Checkpoint,
    parents: Mapping[str, Checkpoint],
    bases: set[str],
    config: Path | None,
    *,
    quick: bool,
    threads: int,
    tell: Tell,
) -> tuple[Report, tuple[str, ...], Mapping[str, Kin]]:
    """The report, the parents' names, and the kin."""
    tell("reading weights")
    weights = check_weights(model, cast("Mapping[str, Weights]", parents), threads=threads)
    shares = dict(weights.kin["unet"].shares) if "unet" in weights.kin else {}
    asked = _asked(parents, bases, shares)
    checks, notes = list(weights.checks), []
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        notes.append(f"only the weights were checked: {', '.join(missing)} not installed; "
                     "pip install 'ckptools[render]'")  # fmt: skip
    else:
        studied = {} if quick else {name: parents[name] for name in asked}
        report = _check_modules(model, studied, config, shares, quick=quick, tell=tell)
        checks += report.checks
        notes += report.notes
    return Report(tuple(checks), tuple(notes)), tuple(parents), weights.kin


def _check_control(
    control: Checkpoint,
    draws: Path | None,
    config: Path | None,
    *,
    quick: bool,
    threads: int,
    tell: Tell,
) -> tuple[Report, tuple[str, ...], Mapping[str, Kin]]:
    """What a ControlNet's weights and pictures say; there are no parents."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if draws is None and not quick:
        raise UsageError(
            "a ControlNet is checked on a model that it draws with",
            where=str(control.path),
            fix="give the model's file with --with, or read weights alone with --quick",
        )
    tell("reading weights")
    checks, notes = list(check_weights(control, {}, threads=threads).checks), []
    if missing and not quick:
        notes.append(f"only the weights were checked: {', '.join(missing)} not installed; "
                     "pip install 'ckptools[render]'")  # fmt: skip
    elif draws is not None and not quick:
        checks += _draw_control(control, draws, config, tell)
    return Report(tuple(checks), tuple(notes)), (), {}


def _draw_control(
    control: Checkpoint, draws: Path, config: Path | None, tell: Tell
) -> Iterator[Check]:
    """The checks of its pictures: edges, which all kinds of ControlNets see in some way."""
    from ckptools.check import draw_control, judge_control
    from ckptools.render import load_controlnet, load_pipeline

    tell("loading")
    pipeline = load_pipeline(draws, config=config)
    try:
        loaded = load_controlnet(control, pipeline, config=config)
    except (InputError, ManyErrors) as exc:
        yield from _unloaded(exc).checks
        return
    yield Check("modules", 0, 0, "pass", f"{len(loaded.slots):,} tensors are in their places")
    tell("drawing")
    drawn, without, condition = draw_control(pipeline, loaded)
    yield from judge_control(drawn, without, condition)


def _asked(
    parents: Mapping[str, Checkpoint], bases: set[str], shares: Mapping[str, float]
) -> list[str]:
    """The parents that the model should resemble: not bases, nor models that were subtracted."""
    able = [
        name
        for name, each in parents.items()
        if name not in bases and detect(each, each.metadata).kind == "checkpoint"
    ]
    kept = [name for name in able if shares.get(name, 1.0) > _NONE]
    return kept if sum(shares.get(name, 1.0) for name in kept) > 0.5 else able


def _check_modules(
    model: Checkpoint,
    parents: Mapping[str, Checkpoint],
    config: Path | None,
    shares: Mapping[str, float],
    *,
    quick: bool,
    tell: Tell,
) -> Report:
    """Load the model into modules, strictly, and check what it does."""
    from ckptools.check import check_pipeline, study_parents
    from ckptools.render import load_pipeline

    unable = _unable(model)
    if unable:
        return Report((), (f"only the weights were checked: {unable}",))
    try:
        tell("loading")
        pipeline = load_pipeline(model, config=config)
    except (InputError, ManyErrors) as exc:
        return _unloaded(exc)
    study = None
    if parents:
        del pipeline  # one model at a time; reading it again costs less than the memory
        study = study_parents(parents, config=config, tell=tell)
        tell("loading")
        pipeline = load_pipeline(model, config=config)
    report = check_pipeline(pipeline, parents=study, shares=shares, quick=quick, tell=tell)
    count = sum(1 for _ in pipeline.slots)
    loaded = Check("modules", 0, 0, "pass", f"{count:,} tensors are in their places")
    return Report((loaded, *report.checks), report.notes)


def _unable(model: Checkpoint) -> str:
    """Why no modules can be built for a sound file, in words; "" where they can."""
    from ckptools.render.configs import CHANNELS, family_ids

    detection = detect(model, model.metadata)
    if detection.kind not in ("checkpoint", "unknown"):
        return f"this is a {detection.kind} alone, which draws nothing"
    if detection.family is not None and detection.family not in family_ids():
        return f"no pictures are made with {detection.family} models"
    if detection.family is not None and (detection.variant or "base") not in CHANNELS:
        return f"no pictures are made with {detection.variant} models"
    near = [each.family for each in detection.rejected if each.family in family_ids()]
    return "" if detection.family is not None or near else "what it is, is not told by its names"


def _unloaded(error: CkptError) -> Report:
    """A model that does not load is not sound; one that wants a config may be."""
    errors = error.errors if isinstance(error, ManyErrors) else (error,)
    if all("`config`" in one.fix for one in errors):
        note = f"only the weights were checked: {errors[0].what}; give --config"
        return Report((), (note,))
    tensors = tuple(one.where for one in errors if one.where)
    shown = [f"{one.where}: {one.what}" if one.where else one.what for one in errors[:3]]
    more = len(errors) - len(shown)
    reason = "; ".join(shown) + (f"; and {more:,} more" if more > 0 else "")
    return Report((Check("modules", len(errors), 0, "fail", reason, tensors),))
