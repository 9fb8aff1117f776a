"""`ckptools sweep`: draw and measure a merge at several values of its parameters, in memory.

recipe ──▶ a plan per variant ──▶ one read of every source ──▶ swapped into a resident pipeline
──▶ pictures, how far they are from the parents' pictures, how well noise comes off those ──▶ best

Nothing is written but pictures and, where asked for, the chosen merge. What is drawn is what would
be saved: weights come rounded to the output's dtype.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ckptools.engine import Settings
from ckptools.errors import (
    CkptError,
    Interrupted,
    OutputError,
    RecipeError,
    UsageError,
    nearest,
)
from ckptools.family import detect
from ckptools.formula import used_names
from ckptools.interrupts import held_back
from ckptools.manifest import embedded_metadata
from ckptools.opening import Source
from ckptools.plan import Plan, make_plan
from ckptools.progress import Progress
from ckptools.recipe import Recipe, expanded, load_recipe, lora_weight, parse_recipe, with_numbers
from ckptools.rendering.folder import Earlier, check_folder
from ckptools.tensors import TensorSpec
from ckptools.variants import Variants, memory_for, merged_model, source_model
from ckptools.workflow import (
    MergeResult,
    check_pins,
    default_threads,
    merge,
    planned,
)
from ckptools.writer import made_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ckptools.checkpoint import Checkpoint
    from ckptools.render import Picture, Pipeline, Request

SCHEMA = "ckptools.sweep/1"
MAX_VARIANTS = 400
_BEST = "best.yaml"
_USUAL_PROMPTS = 2
# Calibrated on small trained models, so they warn and do not fail: docs/sweeping.md
_BARRIER, _BURNT, _FLAT = 1.15, 2.5, 0.3
_NAMES = ("loss", "near", "far", "between")


class SweepProgress(Progress):
    """What a sweep tells while it runs; this one says nothing."""

    def drawing(self, name: str, done: int, total: int) -> None:
        """A model's pictures are next: so many of all pictures are done."""


@dataclass(frozen=True)
class Draws:
    """What every model is asked to draw; None and () are what suits the model.

    size    (width, height) in pixels
    device  "auto", "cpu", "cuda" …; dtype: "auto", fp16, bf16 or fp32
    scores  a CLIP model's folder, to score pictures by: information, no verdict
    """

    prompts: tuple[str, ...] = ()
    negative: str = ""
    seeds: tuple[int, ...] = (1, 2)
    steps: int = 20
    sampler: str = "DPM++ 2M Karras"
    guidance: float | None = None
    size: tuple[int, int] | None = None
    device: str = "auto"
    dtype: str = "auto"
    scores: Path | None = None


@dataclass(frozen=True, eq=False)
class Looks:
    """What one model drew, and how it does.

    images        a file for each picture: prompts one after the other, all seeds of each
    losses        parent -> mean loss on the pictures that the parent drew
    swap_seconds  until the pipeline held it; swap_bytes: what was written into the pipeline
    fits          100 * cosine of pictures and prompts by a CLIP model, mean; None without one
    """

    name: str
    pictures: tuple[Picture, ...]
    images: tuple[Path, ...]
    losses: Mapping[str, float] = field(default_factory=dict)
    swap_seconds: float = 0.0
    swap_bytes: int = 0
    fits: float | None = None

    @property
    def loss(self) -> float:
        """The mean over the parents' pictures; NaN where there are none."""
        return float(np.mean(list(self.losses.values()))) if self.losses else float("nan")


@dataclass(frozen=True)
class Apart:
    """How far a variant is from one parent.

    pixels   RMS difference of pictures of the same prompt and seed, 0 to 1, mean over them
    latents  the same of the latents
    weights  |variant - parent| / |parent| over the tensors that change; None for a parent of
             another architecture
    alike    100 * cosine of the same pictures by a CLIP model, mean over them; None without one
    """

    pixels: float
    latents: float
    weights: float | None
    alike: float | None = None


@dataclass(frozen=True, eq=False)
class Variant:
    """One combination of numbers, and what came of it."""

    params: Mapping[str, float]
    looks: Looks
    distances: Mapping[str, Apart]
    verdict: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Swept:
    """What a sweep found.

    axes         parameter -> its numbers
    parents      model of the formula -> its own pictures
    prompts      drawn by every model, with every one of the seeds
    groups       how many variants and parents were made by each read of the sources
    drawn        every picture's file, those of a model that was not finished too
    interrupted  ended by Ctrl-C: what was done until then
    best         what `save_best` chose, its merge, and its recipe
    failure      why there is no merge of the best variant, for the caller to raise in the end
    """

    recipe: Recipe
    axes: Mapping[str, tuple[float, ...]]
    folder: Path
    family: str
    prompts: tuple[str, ...]
    draws: Draws
    parents: Mapping[str, Looks]
    variants: tuple[Variant, ...]
    notes: tuple[str, ...]
    groups: tuple[int, ...]
    seconds: float
    drawn: tuple[Path, ...] = ()
    interrupted: bool = False
    best: Variant | None = None
    best_recipe: Path | None = None
    best_merge: MergeResult | None = None
    failure: CkptError | None = None


def sweep(
    recipe: Recipe,
    axes: Mapping[str, Sequence[float]],
    folder: Path,
    *,
    draws: Draws | None = None,
    save_best: str = "",
    force: bool = False,
    threads: int | None = None,
    memory_bytes: int | None = None,
    progress: SweepProgress | None = None,
) -> Swept:
    """Draw and measure every combination of the parameters' numbers.

    axes          parameter -> numbers to try
    folder        for the pictures; one that holds more than an earlier sweep, which is replaced,
                  is refused unless `force`
    save_best     see `choose`: that variant is merged to the recipe's output
    memory_bytes  that variants may be kept in; default: what is free, less what drawing takes
    """
    if not axes:
        raise UsageError("nothing to sweep", fix="give --set M=0:1:0.25, or `sweep:` in the recipe")
    combined = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    if len(combined) > MAX_VARIANTS:
        raise UsageError(f"{len(combined):,} variants", fix=f"{MAX_VARIANTS} at most: fewer values")
    _check_metric(save_best, [*recipe.models])
    draws = draws or Draws()
    if draws.scores is not None:
        from ckptools.render.scores import check_scorer

        check_scorer(draws.scores)
    check_folder(folder, SCHEMA, force=force)
    _check_best(folder, save_best, force=force)
    started = time.perf_counter()
    may_replace = force or not save_best  # else nothing is written there
    with _planned(recipe, combined, threads or default_threads(), force=may_replace) as plans:
        (progress or Progress()).planned(max(reversed(plans), key=_merged))
        check_pins(plans[0].sources, hash_inputs=False, progress=progress or Progress())
        with made_folder(folder / "images"), Earlier(folder, SCHEMA) as earlier:
            run = _Run(plans, combined, draws, earlier, folder, progress or SweepProgress())
            found = run.all(memory_bytes)
    found = replace(found, recipe=recipe, axes={n: tuple(v) for n, v in axes.items()})
    if save_best and not found.interrupted:
        try:
            found = _save_best(found, save_best, force=force, progress=progress)
        except KeyboardInterrupt:
            notes = (*found.notes, "interrupted: the best variant was not merged")
            found = replace(found, notes=notes, interrupted=True)
        except CkptError as exc:
            notes = (*found.notes, f"the best variant was not merged: {exc.what}")
            found = replace(found, notes=notes, failure=exc)
    return replace(found, seconds=time.perf_counter() - started)


def _merged(plan: Plan) -> int:
    """How many tensors are merged: at M = 0 or 1 often none, which says nothing of the sweep."""
    return sum(step.action == "merged" for step in plan.steps)


def draws_of(recipe: Recipe) -> Draws:
    """What `render:` of a recipe says of pictures; the rest is as usual."""
    if recipe.render is None:
        return Draws()
    names = {
        "negative": "negative", "seeds": "seeds", "steps": "steps", "sampler": "sampler",
        "guidance": "guidance", "size": "size", "device": "device", "dtype": "dtype",
    }  # fmt: skip
    given: dict[str, Any] = {names[k]: v for k, v in recipe.render.options.items() if k in names}
    if "scores" in recipe.render.options:
        given["scores"] = recipe.beside(str(recipe.render.options["scores"]))
    return Draws(prompts=tuple(prompt.text for prompt in recipe.render.prompts), **given)


def choose(variants: Sequence[Variant], metric: str) -> Variant:
    """The best of the variants that did not fail; the first of equals.

    loss         least loss, mean over all parents' pictures; loss:B over B's
    near:B       pictures nearest to B's; far:C farthest from C's
    between:A:B  least distance to the farther of the two
    """
    word, _, rest = metric.partition(":")
    parents = [name for name in rest.split(":") if name]

    def value(variant: Variant) -> float:
        looks = variant.looks
        if word == "loss":
            return looks.losses[parents[0]] if parents else looks.loss
        apart = [variant.distances[name].pixels for name in parents]
        return -apart[0] if word == "far" else max(apart)

    sound = [variant for variant in variants if variant.verdict != "fail"]
    if not sound:
        raise UsageError("no variant is sound: there is no best one", fix="sweep other values")
    missing = [name for name in parents if name not in sound[0].distances]
    if missing:
        raise UsageError(
            f"{missing[0]} drew no pictures to compare with",
            fix=nearest(missing[0], sound[0].distances),
        )
    return min(sound, key=value)


def _check_metric(metric: str, models: Sequence[str]) -> None:
    word, _, rest = metric.partition(":")
    parents = rest.split(":") if rest else []
    wanted = {"": (0,), "loss": (0, 1), "near": (1,), "far": (1,), "between": (2,)}
    if len(parents) not in wanted.get(word, ()):
        raise UsageError(f"no measure {metric!r}", fix="loss, loss:B, near:B, far:C or between:A:B")
    for name in parents:
        if name not in models:
            raise UsageError(f"{metric!r}: unknown model {name!r}", fix=nearest(name, models))


def _check_best(folder: Path, metric: str, *, force: bool) -> None:
    """A recipe that an earlier sweep has written may have been worked on since."""
    if metric and not force and (folder / _BEST).exists():
        raise OutputError(
            "there is one already", where=str(folder / _BEST), fix="use --force, or another folder"
        )


@contextmanager
def _planned(
    recipe: Recipe,
    combined: Sequence[Mapping[str, float]],
    threads: int,
    *,
    force: bool,
) -> Iterator[list[Plan]]:
    """A plan for every combination of numbers, over the same open sources."""
    with planned(with_numbers(recipe, combined[0]), threads=threads, force=force) as first:
        recipes = [with_numbers(first.recipe, numbers) for numbers in combined[1:]]
        rest = [make_plan(r, threads=threads, write=False, sources=first.sources) for r in recipes]
        yield [first, *rest]


# --- the run ------------------------------------------------------------------------------------


class _Run:
    """One sweep: the models, the resident pipeline, and what was found so far."""

    def __init__(
        self,
        plans: Sequence[Plan],
        combined: Sequence[Mapping[str, float]],
        draws: Draws,
        earlier: Earlier,
        folder: Path,
        progress: SweepProgress,
    ) -> None:
        self.plans, self.combined, self.draws = plans, combined, draws
        self.earlier, self.folder, self.progress = earlier, folder, progress
        self.plan = plans[0]
        self.notes: list[str] = []
        self.drawn: list[Path] = []
        self.groups: list[int] = []
        self.parents: dict[str, Looks] = {}
        self.looks: dict[int, Looks] = {}
        self.apart: list[Source] = []  # parents of another architecture
        recipe = self.plan.recipe
        variants = [merged_model(label(n), p) for n, p in zip(combined, plans, strict=True)]
        self.metadata = embedded_metadata(self.plan, {}).entries
        alike = []
        # a variant that overflows fails by its pictures, and does not end the others
        self.settings = Settings(self.plan.threads, recipe.seed, allow_nonfinite=True)
        whole = Variants(variants[:1], self.plan, self.settings).as_checkpoint(0, self.metadata)
        needed = _needed(whole)
        for source in self._drawing_parents():
            model = source_model(self.plan, source, needed)
            if model is None or _traits(source.checkpoint) != _traits(whole):
                self.apart.append(source)
            else:
                alike.append(model)
        self.alike = [model.name for model in alike]
        self.first = len(alike)  # number of the first variant
        self.variants = Variants([*alike, *variants], self.plan, self.settings)
        self.distances: dict[tuple[int, int], float] = {}
        self.pipeline: Pipeline | None = None
        self.sinks: dict[int, Any] = {}
        self.prompts: tuple[str, ...] = draws.prompts
        self.seen: dict[str, NDArray[np.float64]] = {}  # what a CLIP model makes of the pictures
        self.total = (len(combined) + len(self.alike) + len(self.apart)) * len(draws.seeds)

    def _drawing_parents(self) -> list[Source]:
        """The models of the formula that are whole checkpoints, in its order."""
        names = used_names(self.plan.recipe.result, self.plan.recipe.scope)
        by_name = {source.name: source for source in self.plan.sources if source.adapter is None}
        found = [by_name[name] for name in names if name in by_name]
        whole = [source for source in found if source.detection.kind == "checkpoint"]
        self.notes += [f"{s.name} is a {s.detection.kind}: it draws no pictures"
                       for s in found if s not in whole]  # fmt: skip
        return whole

    def all(self, memory_bytes: int | None) -> Swept:
        """Everything, or what was done when Ctrl-C came."""
        interrupted = False
        try:
            self._run(memory_bytes)
        except BaseException as exc:
            is_interrupt, was_drawn = isinstance(exc, KeyboardInterrupt), bool(self.drawn)
            if not (is_interrupt and self.parents):
                self._remove_drawn()
                if is_interrupt and was_drawn:
                    said = "interrupted before one model was drawn whole; its pictures are removed"
                    raise Interrupted(said) from exc
                raise
            interrupted = True
            if self.draws.scores is not None and not self.seen:
                self.notes.append("interrupted: the pictures are not scored")
        variants = tuple(self._variant(number) for number in sorted(self.looks))
        return Swept(
            recipe=self.plan.recipe,
            axes={},
            folder=self.folder,
            family=self.plan.family.id,
            prompts=self.prompts,
            draws=self.draws,
            parents=self.parents,
            variants=variants,
            notes=tuple(self.notes),
            groups=tuple(self.groups),
            seconds=0.0,
            drawn=tuple(self.drawn),
            interrupted=interrupted,
        )

    def _remove_drawn(self) -> None:
        """A report makes pictures a result: without one they would be in the next sweep's way."""
        with held_back(), suppress(OSError):
            for path in self.drawn:
                path.unlink(missing_ok=True)

    def _run(self, memory_bytes: int | None) -> None:
        from ckptools.render.loader import choose_device, free_memory_bytes

        if memory_bytes is None:
            is_cpu = choose_device(self.draws.device).type == "cpu"
            wide = sum(step.spec.numel for step in self.plan.steps) * 4 if is_cpu else 0
            memory_bytes = memory_for(wide, free_memory_bytes(choose_device("cpu")))
        for group in self.variants.groups(memory_bytes):
            self.groups.append(len(group))
            if len(group) > 1:
                self._start_reading(group)
                found = self.variants.keep(
                    group, pairs=self._pairs(group), progress=self.progress.advance
                )
                self._note_distances(found)
            for number in group:
                if number == self.first:
                    self._finish_parents()
                self._show(number)
        if self.draws.scores is not None:
            self._score(self.draws.scores)

    def _score(self, folder: Path) -> None:
        """Have a CLIP model look at all pictures; edits are not held against their prompts."""
        from ckptools.render.scores import embed_pictures, embed_texts, likeness, load_scorer

        scorer = load_scorer(folder, device=self.draws.device)
        told = embed_texts(scorer, [p for p in self.prompts for _ in self.draws.seeds])
        is_edit = self._drawer().blueprint.variant == "ip2p"
        everyone: list[tuple[dict[Any, Looks], Any]] = [
            *((self.parents, name) for name in self.parents),
            *((self.looks, number) for number in self.looks),
        ]
        seen = {}
        for group, key in everyone:
            looks = group[key]
            seen[looks.name] = embed_pictures(scorer, [p.pixels for p in looks.pictures])
            fits = [likeness(*pair) for pair in zip(seen[looks.name], told, strict=True)]
            group[key] = replace(looks, fits=None if is_edit else float(np.mean(fits)))
        self.seen = seen

    # --- parents ---

    def _finish_parents(self) -> None:
        """All parents have drawn: let each meet the pictures of all."""
        for source in self.apart:
            self._show_apart(source)
        for number in reversed(range(len(self.alike))):  # the last one is still resident
            self._hold(number)
            name = self.alike[number]
            self.parents[name] = replace(self.parents[name], losses=self._losses(self._drawer()))
        for source in [source for source in self.apart if source.name in self.parents]:
            with self._loaded(source) as pipeline:
                drawn = self.parents[source.name]
                self.parents[source.name] = replace(drawn, losses=self._losses(pipeline))

    def _show_apart(self, source: Source) -> None:
        """A parent that the resident pipeline cannot hold: another pipeline, for as long."""
        if self.pipeline is None:
            self._hold(self.first)
        try:
            with self._loaded(source) as pipeline:
                pictures, images = self._draw(pipeline, source.name)
        except CkptError as exc:
            self.notes.append(f"{source.name} draws no pictures: {exc.what}")
            return
        self.notes.append(f"{source.name} is of another architecture: it was read apart")
        self.parents[source.name] = Looks(source.name, pictures, images)

    @contextmanager
    def _loaded(self, source: Source) -> Iterator[Pipeline]:
        from ckptools.render import load_pipeline

        yield load_pipeline(source.checkpoint, device=self.draws.device, dtype=self.draws.dtype)

    # --- one model ---

    def _show(self, number: int) -> None:
        started = time.perf_counter()
        written = self._hold(number)
        seconds = time.perf_counter() - started
        name = self.variants.models[number].name
        pictures, images = self._draw(self._drawer(), name)
        looks = Looks(name, pictures, images, {}, seconds, written)
        if number < self.first:
            self.parents[name] = looks
        else:
            losses = self._losses(self._drawer())
            missing = [pair for pair in self._pairs([number]) if pair not in self.distances]
            if missing:  # it was already there: some other model is the same
                self._note_distances(self.variants.measure(missing))
            self.looks[number] = replace(looks, losses=losses)

    def _hold(self, number: int) -> int:
        """Have the resident pipeline hold a model; the bytes that were written into it."""
        from ckptools.render import ModuleSink, load_pipeline

        model, variants = self.variants.models[number], self.variants
        size = sum(task.spec.nbytes for task in model.tasks.values())
        if self.pipeline is None:
            self.pipeline = load_pipeline(
                variants.as_checkpoint(number, self.metadata),
                config=self._config(),
                device=self.draws.device,
                dtype=self.draws.dtype,
            )
            variants.holds(number)
            self._settle_prompts(self.pipeline)
            return size
        sink = self.sinks.get(number) or ModuleSink(self.pipeline, model.layout)
        self.sinks[number] = sink
        if variants.is_held(number):
            return 0
        if variants.is_kept(number):
            return variants.swap(number, sink)
        self._start_reading([number])
        pairs = self._pairs([number])
        found = variants.stream(number, sink, pairs=pairs, progress=self.progress.advance)
        self._note_distances(found)
        return sum(model.tasks[name].spec.nbytes for name in variants.changing)

    def _config(self) -> Path | None:
        """A folder that says how the model is built: the recipe's for the base, or the base."""
        recipe, base = self.plan.recipe, self.plan.base
        if base.ref.config:
            return recipe.beside(base.ref.config)
        return base.checkpoint.path if base.checkpoint.path.is_dir() else None

    def _settle_prompts(self, pipeline: Pipeline) -> None:
        from ckptools.render.probes import probes_for

        probes = self.draws.prompts or [p.prompt for p in probes_for(pipeline)[:_USUAL_PROMPTS]]
        self.prompts = tuple(probes)
        self.total *= len(self.prompts)

    def _drawer(self) -> Pipeline:
        if self.pipeline is None:
            raise AssertionError("nothing is drawn before a model is held")
        return self.pipeline

    def _draw(self, pipeline: Pipeline, name: str) -> tuple[tuple[Picture, ...], tuple[Path, ...]]:
        from ckptools.render import draw
        from ckptools.render.files import infotext, write_picture

        pictures: list[Picture] = []
        images: list[Path] = []
        done = sum(len(looks.pictures) for looks in (*self.parents.values(), *self.looks.values()))
        for number, (spot, request) in enumerate(self._requests()):
            self.progress.drawing(name, done + number, self.total)
            picture = draw(pipeline, request)
            path = self.folder / "images" / f"{_file_name(name)}-{spot}.png"
            text = infotext(request.prompt, request.negative, picture.facts, model=name)
            if not self.drawn and (count := self.earlier.put_aside()):
                self.notes.append(f"{count} files of an earlier sweep were replaced")
            self.drawn.append(path)
            path.parent.mkdir(exist_ok=True)
            write_picture(picture.pixels, path, {"parameters": text})
            pictures.append(picture)
            images.append(path)
        return tuple(pictures), tuple(images)

    def _requests(self) -> Iterator[tuple[str, Request]]:
        """(a word for file names, what to draw), the same for every model."""
        from ckptools.render import Request
        from ckptools.render.probes import drawn_mask, picture_for, probes_for, usual_guidance

        pipeline, draws = self._drawer(), self.draws
        size = draws.size or pipeline.size
        variant = pipeline.blueprint.variant
        image = picture_for(probes_for(pipeline), size) if variant != "base" else None
        mask = drawn_mask(size) if variant == "inpainting" else None
        for number, prompt in enumerate(self.prompts, 1):
            for seed in draws.seeds:
                yield (
                    f"p{number}-s{seed}",
                    Request(
                        prompt=prompt,
                        negative=draws.negative,
                        seed=seed,
                        steps=draws.steps,
                        sampler=draws.sampler,
                        cfg=usual_guidance(pipeline) if draws.guidance is None else draws.guidance,
                        size=size,
                        image=image,
                        mask=mask,
                    ),
                )

    def _losses(self, pipeline: Pipeline) -> dict[str, float]:
        """Parent -> mean loss on its pictures."""
        from ckptools.check import denoise_loss

        if not self.parents:
            return {}
        prompts = [prompt for prompt in self.prompts for _ in self.draws.seeds]
        latents = [p.latents for looks in self.parents.values() for p in looks.pictures]
        losses = denoise_loss(pipeline, latents, prompts * len(self.parents)).mean(axis=1)
        each = losses.reshape(len(self.parents), -1).mean(axis=1)
        return {name: float(loss) for name, loss in zip(self.parents, each, strict=True)}

    # --- distances ---

    def _pairs(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        variants = [number for number in numbers if number >= self.first]
        return [(n, parent) for n in variants for parent in range(self.first)]

    def _note_distances(self, found: Mapping[tuple[int, int], Any]) -> None:
        self.distances |= {pair: distance.relative for pair, distance in found.items()}

    def _start_reading(self, numbers: Sequence[int]) -> None:
        names = [self.variants.models[number].name for number in numbers]
        shown = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        self.progress.start(f"merging {shown}", self.variants.kept_bytes(numbers))

    def _variant(self, number: int) -> Variant:
        looks = self.looks[number]
        distances = {}
        for name, parent in self.parents.items():
            is_alike = name in self.alike
            weights = self.distances.get((number, self.alike.index(name))) if is_alike else None
            pixels = [_rms(a.pixels / 255.0, b.pixels / 255.0) for a, b in _pairs(looks, parent)]
            latents = [_rms(a.latents, b.latents) for a, b in _pairs(looks, parent)]
            alike = self._alike(looks.name, name)
            distances[name] = Apart(float(np.mean(pixels)), float(np.mean(latents)), weights, alike)
        verdict, reasons = judge(looks, list(self.parents.values()))
        return Variant(self.combined[number - self.first], looks, distances, verdict, reasons)

    def _alike(self, one: str, other: str) -> float | None:
        from ckptools.render.scores import likeness

        if not self.seen:
            return None
        pairs = zip(self.seen[one], self.seen[other], strict=True)
        return float(np.mean([likeness(*pair) for pair in pairs]))


def label(numbers: Mapping[str, float]) -> str:
    """A variant's name: "M=0.25" or "M=0.25 N=1"."""
    return " ".join(f"{name}={number:.15g}" for name, number in numbers.items())


def judge(looks: Looks, parents: Sequence[Looks]) -> tuple[str, tuple[str, ...]]:
    """pass, warn or fail, and why: NaN fails; what is far outside the parents' range warns."""
    if not all(picture.is_finite for picture in looks.pictures):
        return "fail", ("NaN or Inf in its pictures",)
    reasons = []
    worst = max((parent.loss for parent in parents), default=float("nan"))
    if looks.loss > _BARRIER * worst:
        reasons.append(f"loss {looks.loss:.3g}, the worst parent has {worst:.3g}")
    spread = _spread(looks)
    spreads = [_spread(parent) for parent in parents]
    if spreads and not _FLAT * min(spreads) <= spread <= _BURNT * max(spreads):
        word = "burnt" if spread > max(spreads) else "flat"
        reasons.append(f"{word}: latents spread {spread:.2g}, parents' {max(spreads):.2g}")
    return ("warn" if reasons else "pass"), tuple(reasons)


def _spread(looks: Looks) -> float:
    return float(np.mean([picture.latents.std() for picture in looks.pictures]))


def _pairs(one: Looks, other: Looks) -> list[tuple[Picture, Picture]]:
    return list(zip(one.pictures, other.pictures, strict=True))


def _rms(one: Any, other: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.float64(one) - np.float64(other)))))


def _file_name(name: str) -> str:
    """A model's name as a part of a file's, on any system."""
    return "".join(char if char.isalnum() or char in "=._-" else "_" for char in name)


def _needed(checkpoint: Checkpoint) -> Callable[[TensorSpec], bool]:
    """Whether a tensor has a place in the modules that draw."""
    from ckptools.keymap import key_map
    from ckptools.render.configs import family_ids

    family = detect(checkpoint, checkpoint.metadata).family
    if family not in family_ids():
        return lambda spec: True  # loading will say that it cannot be drawn with
    keys = key_map(family)

    def needed(spec: TensorSpec) -> bool:
        with suppress(CkptError):
            return bool(keys.pieces(spec))
        return True

    return needed


def _traits(checkpoint: Checkpoint) -> tuple[object, ...]:
    """What two models must share for one pipeline to hold them in turn."""
    from ckptools.render.configs import draft

    config = checkpoint.path if checkpoint.path.is_dir() else None
    try:
        drafted = draft(checkpoint, detect(checkpoint, checkpoint.metadata), config=config)
    except CkptError as exc:
        return (exc.what,)
    return drafted.family, drafted.variant, drafted.prediction, drafted.zero_snr


# --- the best -----------------------------------------------------------------------------------


def _save_best(found: Swept, metric: str, *, force: bool, progress: Progress | None) -> Swept:
    """Write the best variant's recipe into the folder, and merge by it."""
    best = choose(found.variants, metric)
    path = found.folder / _BEST
    text = recipe_text(found.recipe, best.params, found.folder)
    parse_recipe(text, path)  # what is written is what a merge can read
    path.write_text(f"# {label(best.params)}: the best by {metric}\n{text}", encoding="utf-8")
    merged = merge(load_recipe(path), force=force, progress=progress)
    return replace(found, best=best, best_recipe=path, best_merge=merged)


def recipe_text(recipe: Recipe, numbers: Mapping[str, float], folder: Path) -> str:
    """A recipe's YAML with these numbers for its parameters, as it must read in another folder.

    Without `sweep:` and `render:`, which are done; comments are lost.
    """
    root = yaml.compose(recipe.path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError("this is no recipe any more", where=str(recipe.path))
    top = _items(root)
    root.value = [(key, value) for key, value in root.value if key.value not in _DONE]
    weights = [lora_weight(lora) for lora in recipe.loras]
    for name, number in numbers.items():
        scalar = yaml.ScalarNode("tag:yaml.org,2002:float", f"{number!r}")
        if name in weights:
            _set(top["loras"].value, weights.index(name), scalar)
        else:
            params = top["params"]
            params.value = [(k, scalar if k.value == name else v) for k, v in params.value]
    paths = [*_items(top["models"]).values(), *(top["loras"].value if "loras" in top else ())]
    scalars: dict[int, yaml.ScalarNode] = {}  # each once: an alias is the node that it names
    for node in paths:
        fields = _items(node) if isinstance(node, yaml.MappingNode) else {"path": node}
        scalars |= {id(fields[key]): fields[key] for key in fields.keys() & {"path", "config"}}
    for scalar in scalars.values():
        _move(scalar, recipe, folder)
    _move(_items(top["output"])["path"], recipe, folder, to=recipe.output_path)
    return yaml.serialize(root, allow_unicode=True, width=100)


_DONE = ("sweep", "render")


def _items(node: yaml.MappingNode) -> dict[str, Any]:
    return {key.value: value for key, value in node.value}


def _set(entries: list[yaml.Node], position: int, weight: yaml.Node) -> None:
    """Give an entry of `loras:` its weight."""
    entry = entries[position]
    pairs = entry.value if isinstance(entry, yaml.MappingNode) else [(_word("path"), entry)]
    kept = [(key, value) for key, value in pairs if key.value != "weight"]
    entries[position] = yaml.MappingNode(
        "tag:yaml.org,2002:map", [*kept, (_word("weight"), weight)], flow_style=True
    )


def _word(text: str) -> yaml.ScalarNode:
    return yaml.ScalarNode("tag:yaml.org,2002:str", text)


def _move(node: yaml.ScalarNode, recipe: Recipe, folder: Path, to: Path | None = None) -> None:
    """Make a relative path lead to the same file from another folder."""
    written = expanded(node.value)
    if "://" in node.value or written.is_absolute():
        return
    target = (to or recipe.path.parent / written).absolute()
    try:
        node.value = Path(os.path.relpath(target, folder.absolute())).as_posix()
    except ValueError:  # another drive of Windows
        node.value = target.as_posix()
