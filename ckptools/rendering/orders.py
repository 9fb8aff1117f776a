"""What to draw: said on the command line or in a recipe, settled by the model that draws.

Opens pictures and tells what cannot be drawn; draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptools.errors import InputError, UsageError
from ckptools.rendering.folder import check_folder
from ckptools.rendering.records import SCHEMA

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ckptools.plan import Plan
    from ckptools.recipe import Recipe
    from ckptools.render import Pipeline, Request
    from ckptools.render.probes import Probe

# A processor takes minutes for a picture of a full-size model; see docs/rendering.md.
_SLOW_FROM_PIXELS = 512
_SLOW_STEPS, _USUAL_STEPS = 8, 20
_USUAL_SAMPLER = "DPM++ 2M Karras"


@dataclass(frozen=True)
class Order:
    """What to draw. Where something is left out, the model says what suits it.

    prompts    none: the built-in probes; with `probes` they come on top
    negative   for the prompts that have none of their own
    size       (width, height)
    cfg        classifier-free guidance
    image      a picture to start from, to edit or to inpaint; mask: what to redraw (white)
    control    a ControlNet's file; condition: its picture's path, or a kind to draw
    config     a weightless diffusers folder, for models of unusual width
    vae        a VAE's file in place of the models' own
    check      run the checks of `ckptools check` on what is drawn with, too
    scores     a CLIP model's folder, to score pictures by: information, no check
    """

    prompts: tuple[Probe, ...] = ()
    probes: bool = False
    negative: str | None = None
    seeds: tuple[int, ...] = (1,)
    steps: int | None = None
    sampler: str = _USUAL_SAMPLER
    cfg: float | None = None
    size: tuple[int, int] | None = None
    clip_skip: int = 1
    image: Path | None = None
    mask: Path | None = None
    strength: float | None = None
    image_cfg: float = 1.5
    control: Path | None = None
    condition: str = ""
    control_scale: float = 1.0
    config: Path | None = None
    vae: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    check: bool = False
    scores: Path | None = None


def section_order(recipe: Recipe) -> Order:
    """What the recipe's `render:` orders; paths are relative to the recipe."""
    from ckptools.render.probes import Probe

    section = recipe.render
    config = next((m.config for m in recipe.models.values() if m.name == recipe.base), "")
    given: dict[str, Any] = {"config": config} if config else {}
    if section is not None:
        given |= section.options
        given["check"] = section.check
        given["prompts"] = tuple(
            Probe(prompt.id, prompt.text, prompt.negative or "") for prompt in section.prompts
        )
    for theirs, ours in (("guidance", "cfg"), ("image_guidance", "image_cfg")):
        if theirs in given:
            given[ours] = given.pop(theirs)
    for name in ("image", "mask", "control", "config", "vae", "scores"):
        if name in given:
            given[name] = recipe.beside(given[name])
    beside = recipe.beside(given.get("condition", ""))
    if beside.is_file():
        given["condition"] = str(beside)
    return Order(**given)


def numbered(prompts: Sequence[str]) -> tuple[Probe, ...]:
    """Prompts of the command line, with names for their files."""
    from ckptools.render.probes import Probe

    return tuple(Probe(f"prompt{number}", text) for number, text in enumerate(prompts, start=1))


def default_folder(plan: Plan) -> Path:
    """Where a recipe's pictures go."""
    recipe = plan.recipe
    if recipe.render is not None and recipe.render.folder:
        return recipe.beside(recipe.render.folder)
    return recipe.output_path.with_name(f"{recipe.output_path.stem}-render")


def against_files(recipe: Recipe) -> list[Path]:
    """The files that the recipe's `render:` wants to compare with."""
    named = recipe.render.against if recipe.render is not None else None
    return [recipe.beside(text) for text in named or ()]


def check_section(plan: Plan, *, force: bool = False) -> None:
    """Find out what can be known to be wrong with a recipe's `render:` before the merge.

    force  its folder may hold other things
    """
    from ckptools.render.configs import family_ids

    detection = plan.base.detection
    if detection.kind != "checkpoint" or detection.family not in family_ids():
        what = detection.family if detection.kind == "checkpoint" else detection.kind
        raise UsageError(
            f"no pictures are drawn with {what} models",
            where=plan.recipe.render.where if plan.recipe.render else "",
            fix=f"remove `render:`; families that can be drawn with: {', '.join(family_ids())}",
        )
    check_order(section_order(plan.recipe))
    check_folder(default_folder(plan), SCHEMA, force=force)


def check_order(order: Order) -> None:
    """Find out what can be known to be wrong before any model is read."""
    from importlib.util import find_spec

    from ckptools.render.samplers import find_sampler

    missing = [name for name in ("diffusers", "transformers", "PIL") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"pictures need {' and '.join(missing)}", fix="pip install 'ckptools[render]'"
        )
    find_sampler(order.sampler)
    for name in ("image", "mask", "control", "config", "vae"):
        path = getattr(order, name)
        if path is not None and not path.exists():
            raise InputError(f"there is no such {name}", where=str(path), fix="check the path")
    if order.condition and order.control is None:
        raise UsageError(
            "a condition without a ControlNet", fix="give its file with --control, or `control:`"
        )
    if order.scores is not None:
        from ckptools.render.scores import check_scorer

        check_scorer(order.scores)


def settle(pipeline: Pipeline, order: Order) -> tuple[tuple[Probe, ...], Request, list[str]]:
    """What an order comes to with a model: prompts, a request without prompt or seed, notes."""
    from ckptools.render import Request, check_request
    from ckptools.render.probes import probes_for, usual_guidance

    notes: list[str] = []
    is_slow = pipeline.device.type == "cpu" and pipeline.size[0] >= _SLOW_FROM_PIXELS
    size = order.size
    if size is None and is_slow and order.image is None:
        size = pipeline.size[0] // 2, pipeline.size[1] // 2
    steps = order.steps or (_SLOW_STEPS if is_slow else _USUAL_STEPS)
    probes = order.prompts
    if order.probes or not probes:
        built_in = probes_for(pipeline)
        if is_slow and not order.probes:
            built_in = built_in[:1]
        probes = (*probes, *(p for p in built_in if p.id not in {own.id for own in probes}))
    if is_slow and (size != order.size or steps != order.steps or not order.prompts):
        shown = size or pipeline.size
        notes.append(
            f"no GPU: {shown[0]} x {shown[1]} pixels, {steps} steps, {len(probes)} "
            f"prompt{'s' if len(probes) > 1 else ''}; --size, --steps, --probes for more"
        )
    if order.negative is not None:
        probes = tuple(replace(p, negative=p.negative or order.negative) for p in probes)
    template = Request(
        "",
        steps=steps,
        sampler=order.sampler,
        cfg=usual_guidance(pipeline) if order.cfg is None else order.cfg,
        # noise that ends at zero signal wants it: Lin et al. 2023, arXiv 2305.08891, section 3.4
        cfg_rescale=0.7 if pipeline.blueprint.zero_snr else 0.0,
        size=size,
        clip_skip=order.clip_skip,
        strength=_strength_of(pipeline, order),
        image_cfg=order.image_cfg,
        control_scale=order.control_scale,
    )
    template = _with_pictures(pipeline, order, template, probes, notes)
    check_request(pipeline, replace(template, control=None))
    return probes, template, notes


def _strength_of(pipeline: Pipeline, order: Order) -> float:
    """A hole is drawn anew as a whole, a picture in part."""
    if order.strength is not None:
        return order.strength
    is_hole = order.mask is not None or pipeline.blueprint.variant == "inpainting"
    return 1.0 if is_hole else 0.75


def _with_pictures(
    pipeline: Pipeline,
    order: Order,
    template: Request,
    probes: Sequence[Probe],
    notes: list[str],
) -> Request:
    """The request with the image, mask and condition that the order names or the model needs."""
    from ckptools.render.files import picture_size, read_mask, read_picture
    from ckptools.render.probes import drawn_mask, picture_for

    variant = pipeline.blueprint.variant
    size = template.size
    if size is None:
        size = picture_size(order.image) if order.image else pipeline.size
    image = mask = None
    if order.image is not None:
        image = read_picture(order.image, size)
    elif variant in ("inpainting", "ip2p"):
        image = picture_for(probes, size)
        notes.append("no image given: a drawn one is used")
    if order.mask is not None:
        mask = read_mask(order.mask, size)
    elif variant == "inpainting":
        mask = drawn_mask(size)
        notes.append("no mask given: a box in the middle is redrawn")
    control = _condition(order, size) if order.control is not None else None
    return replace(template, size=size, image=image, mask=mask, control=control)


def _condition(order: Order, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A ControlNet's picture: drawn by its kind, read from a file, or the edges of one."""
    from ckptools.render.conditions import CONDITIONS, draw_condition, find_edges
    from ckptools.render.files import read_picture

    if order.condition in CONDITIONS:
        return draw_condition(order.condition, size)
    kind, colon, name = order.condition.partition(":")
    if colon and kind == "edges" and Path(name).is_file():
        return find_edges(read_picture(Path(name), size))
    path = Path(order.condition)
    if not order.condition or not path.is_file():
        raise UsageError(
            f"no condition {order.condition!r} for the ControlNet",
            fix=f"give a picture, or have one drawn: {', '.join(CONDITIONS)}",
        )
    return read_picture(path, size)
