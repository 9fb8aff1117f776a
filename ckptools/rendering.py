"""Test pictures of models, beside their parents, and what the pictures say.

    a file, or a plan in memory ──▶ pictures by prompt and seed ──▶ checks ──▶ folder of reports

A merge is rendered without being written: the engine fills the modules of a resident pipeline with
the bytes that the file would have. Parents draw the same prompts from the same seeds; their
pictures are kept in the user's cache, by what the files hold. Prints nothing.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata as package_metadata
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

from ckptools.errors import CkptError, InputError, OutputError, UsageError
from ckptools.hashing import cache_folder, hash_source
from ckptools.hubref import short_name
from ckptools.manifest import embedded_metadata, planned_id, version
from ckptools.plan import Plan
from ckptools.tensors import TensorSpec
from ckptools.writer import Layout, lay_out

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ckptools.check import Study
    from ckptools.checkpoint import Checkpoint
    from ckptools.recipe import Recipe
    from ckptools.render import ControlNet, Picture, Pipeline, Request
    from ckptools.render.probes import Probe

Verdict = Literal["pass", "warn", "fail"]
_GRAVITY: tuple[Verdict, ...] = ("pass", "warn", "fail")

# A processor takes minutes for a picture of a full-size model; see docs/rendering.md.
_SLOW_FROM_PIXELS = 512
_SLOW_STEPS, _USUAL_STEPS = 8, 20
_USUAL_SAMPLER = "DPM++ 2M Karras"
_CACHE_SCHEMA = "ckptools.picture-cache/1"
_CACHE_BYTES = 500_000_000
_TELLING_SMOOTHNESS = 0.2  # of sound models: 0.4 to 0.6, and 0.05 for 8 x 8 latents
_CONFIG_BYTES = 8_000_000  # a weightless folder's files are smaller


class RenderFailedError(CkptError):
    """The pictures of a merge fail their checks, and the recipe says not to save it then."""

    code = "check"
    exit_code = 1


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


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that draws.

    load       device and dtype, as `load_pipeline` takes them → the resident model
    file       its path; None where it is in memory only
    merge_id   of a merge in memory: what it will be known by when it is a file
    is_parent  it is there to be compared with; its pictures may come from the cache
    """

    label: str
    title: str
    load: Callable[[str, str], Pipeline]
    file: Path | None = None
    is_parent: bool = False
    merge_id: str = ""


@dataclass(frozen=True, eq=False)
class Drawn:
    """One picture and what was measured of it.

    figures  nonfinite (values that are NaN or Inf), contrast (0 to about 0.5), clipped (share of
             pixels beyond black or white), latent_std, smoothness (correlation of neighbouring
             latents), outside_mask (largest change there, of 255; None without a mask)
    cached   it was drawn another day
    """

    pixels: NDArray[np.uint8]
    figures: Mapping[str, Any]
    facts: Mapping[str, Any]
    seconds: float
    cached: bool
    path: Path


@dataclass(frozen=True)
class Check:
    """What one measure says. `cells` are the pictures it is about: (label, row)."""

    id: str
    model: str
    value: float | None
    bound: float | None
    verdict: Verdict
    reason: str
    cells: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Row:
    """A prompt with a seed: the same for every model."""

    probe: Probe
    seed: int

    @property
    def name(self) -> str:
        """A word for file names."""
        return f"{self.probe.id}--seed{self.seed}"


@dataclass(frozen=True, eq=False)
class Rendering:
    """All that was drawn, in `folder`.

    pictures     (label, row number) → picture
    notes        what was left out or chosen
    models       label → sha256 of its files where known, family, variant …
    settings     what all pictures have in common
    interrupted  it was stopped: pictures are missing
    """

    title: str
    folder: Path
    subjects: tuple[Subject, ...]
    rows: tuple[Row, ...]
    pictures: Mapping[tuple[str, int], Drawn]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    models: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]
    seconds: float
    interrupted: bool = False

    @property
    def verdict(self) -> Verdict:
        """The gravest of the checks."""
        return max((check.verdict for check in self.checks), key=_GRAVITY.index, default="pass")

    @property
    def sheet(self) -> Path:
        """All pictures in one."""
        return self.folder / "sheet.png"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.folder / "report.html"


class Progress:
    """What a rendering tells while it runs; this one says nothing."""

    def start(self, pictures: int) -> None:
        """So many pictures are to be drawn or found."""

    def loading(self, label: str) -> None:
        """A model is being loaded."""

    def drawing(self, label: str, row: Row) -> None:
        """A picture begins."""

    def step(self, number: int, steps: int) -> None:
        """Steps done of this picture."""

    def drawn(self) -> None:
        """A picture is there."""


# --- ways in ------------------------------------------------------------------------------------


def render_files(
    sources: Sequence[Path],
    order: Order,
    folder: Path | None = None,
    *,
    beside: Sequence[Path] = (),
    use_cache: bool = True,
    progress: Progress | None = None,
) -> Rendering:
    """Models in files, compared with others (`beside`).

    folder  default: `<name of the first>-render` in the current folder
    """
    check_order(order)
    subjects = [file_subject(path, order) for path in sources]
    subjects += [file_subject(path, order, parent=True) for path in beside]
    return render(
        subjects,
        order,
        folder or Path(f"{short_name(sources[0])}-render"),
        title=", ".join(path.name for path in sources),
        use_cache=use_cache,
        progress=progress,
    )


def render_plan(
    plan: Plan,
    sha256s: Mapping[str, str],
    order: Order,
    folder: Path | None = None,
    *,
    output: Path | None = None,
    beside: Sequence[Path] = (),
    use_cache: bool = True,
    progress: Progress | None = None,
) -> Rendering:
    """What a plan makes, beside its models: in memory, or `output`, the file that was written.

    sha256s  model → sha256, as `merge` would write them into the output's metadata
    """
    check_order(order)
    recipe = plan.recipe
    section = recipe.render
    title = recipe.merge.text.strip()
    if output is None:
        merge = Subject(
            "merge",
            recipe.output_path.name,
            lambda device, dtype: load_plan(plan, order, sha256s, device=device, dtype=dtype),
            merge_id=planned_id(plan),
        )
    else:
        merge = file_subject(output, order, label="merge")
    against = section.against if section is not None else None
    parents = parents_of(plan, order) if against is None else ()
    named = [recipe.path.parent / Path(text).expanduser() for text in against or ()]
    others = [file_subject(path, order, parent=True) for path in (*named, *beside)]
    return render(
        [merge, *parents, *others],
        order,
        folder or default_folder(plan),
        title=title,
        use_cache=use_cache,
        progress=progress,
    )


def render_saved(plan: Plan, output: Path, *, progress: Progress | None = None) -> Rendering:
    """The file that a merge has written, as the recipe's `render:` says."""
    return render_plan(plan, {}, section_order(plan.recipe), output=output, progress=progress)


def render_gate(
    plan: Plan, sha256s: Mapping[str, str], *, progress: Progress | None = None
) -> Rendering:
    """A merge in memory, before it is written; `RenderFailedError` where its checks fail.

    An interruption is one of the merge, too.
    """
    found = render_plan(plan, sha256s, section_order(plan.recipe), progress=progress)
    if found.interrupted:
        raise KeyboardInterrupt
    if found.verdict == "fail":
        reasons = "; ".join(check.reason for check in found.checks if check.verdict == "fail")
        raise RenderFailedError(
            f"the merge is not saved: {reasons}",
            where=plan.recipe.render.where if plan.recipe.render else "",
            fix=f"look at {found.report}; `when: after_save` saves it all the same",
        )
    return found


def default_folder(plan: Plan) -> Path:
    """Where a recipe's pictures go."""
    recipe = plan.recipe
    if recipe.render is not None and recipe.render.folder:
        return recipe.path.parent / Path(recipe.render.folder).expanduser()
    return recipe.output_path.with_name(f"{recipe.output_path.stem}-render")


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
    for name in ("image", "mask", "control", "config", "vae"):
        if name in given:
            given[name] = recipe.path.parent / Path(given[name]).expanduser()
    beside = recipe.path.parent / Path(given.get("condition", "")).expanduser()
    if beside.is_file():
        given["condition"] = str(beside)
    return Order(**given)


def numbered(prompts: Sequence[str]) -> tuple[Probe, ...]:
    """Prompts of the command line, with names for their files."""
    from ckptools.render.probes import Probe

    return tuple(Probe(f"prompt{number}", text) for number, text in enumerate(prompts, start=1))


def check_section(plan: Plan) -> None:
    """Find out what can be known to be wrong with a recipe's `render:` before the merge."""
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


# --- subjects -----------------------------------------------------------------------------------


def file_subject(path: Path, order: Order, *, label: str = "", parent: bool = False) -> Subject:
    """A model in a file or folder."""

    def load(device: str, dtype: str) -> Pipeline:
        from ckptools.render import load_pipeline

        config = None if path.is_dir() else order.config
        return load_pipeline(path, config=config, vae=order.vae, device=device, dtype=dtype)

    return Subject(label or short_name(path), path.name, load, path, parent)


def parents_of(plan: Plan, order: Order) -> tuple[Subject, ...]:
    """The whole models that a plan reads, the base first; adapters draw nothing by themselves."""
    whole = [source for source in plan.sources if source.detection.kind == "checkpoint"]
    whole.sort(key=lambda source: source is not plan.base)
    return tuple(
        replace(
            file_subject(source.checkpoint.path, order, label=source.name, parent=True),
            title=source.label,
        )
        for source in whole
    )


class _Planned(Mapping[str, TensorSpec]):
    """What a plan would write, as if it were a file: names and shapes, and zeros for values."""

    def __init__(self, layout: Layout, metadata: Mapping[str, str], path: Path) -> None:
        self._specs = {spec.name: spec for spec in layout.specs}
        self.metadata = dict(metadata)
        self.path = path

    def __getitem__(self, name: str) -> TensorSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def read_into(self, name: str, view: memoryview, offset: int = 0) -> None:
        """Leave the buffer as it is: the engine fills every place afterwards."""


def load_plan(
    plan: Plan,
    order: Order,
    sha256s: Mapping[str, str],
    *,
    device: str = "auto",
    dtype: str = "auto",
) -> Pipeline:
    """The merge, resident, as it would be after saving and loading; nothing is written."""
    from ckptools.render import load_modules, settled

    layout = memory_layout(plan)
    entries = embedded_metadata(plan, sha256s).entries
    base = plan.base.checkpoint.path
    pipeline = load_modules(
        cast("Checkpoint", _Planned(layout, entries, plan.recipe.output_path)),
        config=order.config or (base if base.is_dir() else None),
        vae=order.vae,
        device=device,
        dtype=dtype,
    )
    fill(pipeline, plan)
    return settled(pipeline)


def memory_layout(plan: Plan) -> Layout:
    """The layout of a plan's whole output as one file that is not written."""
    return lay_out([step.spec for step in plan.steps], {}, plan.recipe.output_path)


def fill(pipeline: Pipeline, plan: Plan) -> None:
    """Compute a plan's output into a resident pipeline, which must be of its shape."""
    from ckptools.engine import Settings, Task, run
    from ckptools.render import ModuleSink

    layout = memory_layout(plan)
    programs = {step.spec.name: step.program for step in plan.steps}
    recipe = plan.recipe
    run(
        [Task(spec, programs[spec.name], layout.starts[spec.name]) for spec in layout.specs],
        sources=[source.checkpoint for source in plan.sources],
        labels=[source.name for source in plan.sources],
        sink=ModuleSink(pipeline, layout),
        settings=Settings(plan.threads, recipe.seed, allow_nonfinite=recipe.allow_nonfinite),
    )


# --- drawing ------------------------------------------------------------------------------------


def render(
    subjects: Sequence[Subject],
    order: Order,
    folder: Path,
    *,
    title: str = "",
    use_cache: bool = True,
    progress: Progress | None = None,
) -> Rendering:
    """Draw, measure and report.

    subjects  the first says what suits it (prompts, size, guidance); parents come last
    folder    made where it is missing; files of the same names are replaced

    A subject that is no parent and cannot draw what is ordered raises; such a parent is left out,
    and a note says why. An interruption ends the drawing; what is done is reported.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    _make(folder)
    studio = _Studio(_labelled(subjects), order, folder, use_cache=use_cache, progress=progress)
    interrupted = False
    try:
        studio.draw_all()
    except KeyboardInterrupt:
        interrupted = True
    except BaseException:
        with suppress(OSError):
            folder.rmdir()  # goes only where nothing was drawn
        raise
    rendering = Rendering(
        title=title,
        folder=folder,
        subjects=tuple(subject for subject in studio.subjects if subject.label in studio.models),
        rows=studio.rows,
        pictures=MappingProxyType(studio.pictures),
        checks=(),
        notes=tuple(studio.notes),
        models=MappingProxyType(studio.models),
        settings=MappingProxyType(studio.settings),
        seconds=time.perf_counter() - started,
        interrupted=interrupted,
    )
    rendering = replace(rendering, checks=(*judge(rendering), *studio.deeper))
    if rendering.pictures:
        _write_reports(rendering)
    return rendering


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(
            exc.strerror or str(exc), where=str(folder), fix="give another folder with -o"
        ) from exc


def _labelled(subjects: Sequence[Subject]) -> tuple[Subject, ...]:
    """The subjects, with a number behind a label that is taken."""
    made: list[Subject] = []
    for subject in subjects:
        taken = {each.label for each in made}
        label, number = subject.label, 2
        while label in taken:
            label, number = f"{subject.label} ({number})", number + 1
        made.append(replace(subject, label=label))
    return tuple(made)


class _Studio:
    """The state of a rendering: what is known and done so far."""

    def __init__(
        self,
        subjects: tuple[Subject, ...],
        order: Order,
        folder: Path,
        *,
        use_cache: bool,
        progress: Progress,
    ) -> None:
        self.subjects, self._order, self._folder = subjects, order, folder
        self._progress, self._cache = progress, Cache(order) if use_cache else None
        self.rows: tuple[Row, ...] = ()
        self.pictures: dict[tuple[str, int], Drawn] = {}
        self.notes: list[str] = []
        self.models: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, Any] = {}
        self.deeper: list[Check] = []
        self._study: Study | None = None
        self._requests: list[Request] = []
        self._place = (order.device, order.dtype)

    def draw_all(self) -> None:
        """Every subject's pictures, one subject resident at a time."""
        if self._order.check:
            self._study_parents()
        for subject in self.subjects:
            try:
                self._draw_subject(subject)
            except CkptError as exc:
                if not subject.is_parent:
                    raise exc.at(str(subject.file or "")) from exc
                self.notes.append(f"{subject.label} is left out: {exc.what}")

    def _draw_subject(self, subject: Subject) -> None:
        sha256s = _sha256s(subject.file)
        pipeline: Pipeline | None = None
        if not self._requests:
            pipeline = self._load(subject)
            self._begin(pipeline)
        found: dict[int, Drawn] = {}
        if subject.is_parent and self._cache is not None:
            for number, request in enumerate(self._requests):
                if known := self._cache.recall(subject, sha256s, self._place, request):
                    found[number] = known
        control = None
        if len(found) < len(self.rows):
            pipeline = pipeline or self._load(subject)
            control = self._load_control(pipeline)
            _check_all(pipeline, self._requests, control)
        first = next(iter(found.values())).facts if found else {}
        self.models[subject.label] = {
            "file": subject.title,
            "sha256": sha256s,
            **({"merge_id": subject.merge_id} if subject.merge_id else {}),
            "parent": subject.is_parent,
            "family": pipeline.blueprint.family if pipeline else first.get("family"),
            "variant": pipeline.blueprint.variant if pipeline else first.get("variant"),
            "prediction": pipeline.prediction if pipeline else first.get("prediction"),
        }
        if pipeline is not None:
            self.notes += [f"{subject.label}: {note}" for note in pipeline.notes]
        for number, row in enumerate(self.rows):
            self._progress.drawing(subject.label, row)
            drawn = found.get(number)
            if drawn is None and pipeline is not None:
                drawn = self._draw(pipeline, control, self._requests[number])
                if subject.is_parent and self._cache is not None:
                    request = self._requests[number]
                    self._cache.keep(subject, sha256s, self._place, request, drawn)
            if drawn is not None:
                self._save(subject, number, drawn, sha256s)
            self._progress.drawn()

        if self._order.check and pipeline is not None and not subject.is_parent:
            self._check(subject, pipeline)

    def _study_parents(self) -> None:
        from ckptools.check import study_parents

        parents = {s.label: s.file for s in self.subjects if s.is_parent and s.file is not None}
        if parents:
            self._study = study_parents(
                parents,
                config=self._order.config,
                device=self._order.device,
                dtype=self._order.dtype,
                tell=self._progress.loading,
            )

    def _check(self, subject: Subject, pipeline: Pipeline) -> None:
        """What `ckptools check` asks of a resident model."""
        from ckptools.check import check_pipeline

        report = check_pipeline(pipeline, parents=self._study, tell=self._progress.loading)
        self.deeper += [
            Check(each.id, subject.label, each.value, each.bound, each.verdict, each.reason)
            for each in report.checks
        ]
        self.notes += [f"{subject.label}: {note}" for note in report.notes]

    def _load(self, subject: Subject) -> Pipeline:
        self._progress.loading(subject.label)
        return subject.load(*self._place)

    def _load_control(self, pipeline: Pipeline) -> ControlNet | None:
        from ckptools.render import load_controlnet

        if self._order.control is None:
            return None
        return load_controlnet(self._order.control, pipeline)

    def _begin(self, pipeline: Pipeline) -> None:
        """Settle what is left open in the order, by the first model."""
        probes, template, notes = settle(pipeline, self._order)
        self.notes += notes
        # parents are drawn on the same device in the same dtype, whatever memory is free then
        dtype = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
        self._place = str(pipeline.device), dtype[str(pipeline.dtype).removeprefix("torch.")]
        self.rows = tuple(Row(probe, seed) for probe in probes for seed in self._order.seeds)
        self._requests = [
            replace(template, prompt=row.probe.prompt, negative=row.probe.negative, seed=row.seed)
            for row in self.rows
        ]
        self.settings = {
            "steps": template.steps,
            "sampler": template.sampler,
            "cfg": template.cfg,
            "size": list(template.size or pipeline.size),
            "clip_skip": template.clip_skip,
            "seeds": list(self._order.seeds),
            "device": self._place[0],
            "dtype": self._place[1],
            "vae_dtype": "fp32",
            "image": self._order.image.name if self._order.image else None,
            "mask": self._order.mask.name if self._order.mask else None,
            "strength": template.strength if template.image is not None else None,
            "image_cfg": template.image_cfg if template.image is not None else None,
            "control": self._order.control.name if self._order.control else None,
            "condition": self._order.condition or None,
            "control_scale": template.control_scale if self._order.control else None,
        }
        self._progress.start(len(self.rows) * len(self.subjects))

    def _draw(self, pipeline: Pipeline, control: ControlNet | None, request: Request) -> Drawn:
        from ckptools.render import draw

        began = time.perf_counter()
        picture = draw(
            pipeline,
            request,
            controlnet=control,
            on_step=lambda number, steps, _: self._progress.step(number, steps),
        )
        seconds = time.perf_counter() - began
        facts = {**picture.facts, "size": list(picture.facts["size"])}
        return Drawn(picture.pixels, measure(picture, request), facts, seconds, False, Path())

    def _save(self, subject: Subject, number: int, drawn: Drawn, sha256s: tuple[str, ...]) -> None:
        from ckptools.render.files import infotext, write_picture

        row = self.rows[number]
        name = _file_word(f"{subject.label}--{row.name}")
        path = self._folder / f"{name}.png"
        said = infotext(
            row.probe.prompt,
            row.probe.negative,
            drawn.facts,
            model=Path(subject.title).stem,
            model_hash=sha256s[0] if len(sha256s) == 1 else "",
            more={"Version": f"ckptools {version()}"},
        )
        write_picture(drawn.pixels, path, {"parameters": said})
        self.pictures[subject.label, number] = replace(drawn, path=path)


def _file_word(text: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")[:120] or "picture"


def _check_all(pipeline: Pipeline, requests: Sequence[Request], control: ControlNet | None) -> None:
    from ckptools.render import check_request

    for request in requests:
        check_request(pipeline, request, control)


def _sha256s(file: Path | None) -> tuple[str, ...]:
    """Of every file of a model; remembered by the hash cache."""
    return tuple(each.sha256 for each in hash_source(file).files) if file is not None else ()


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


# --- measuring and judging ----------------------------------------------------------------------


def measure(picture: Picture, request: Request) -> dict[str, Any]:
    """The figures of one picture: see `Drawn`. Where there is a mask, of what was redrawn."""
    import numpy as np

    finite = np.isfinite(picture.values)
    nonfinite = int((~finite).sum() + (~np.isfinite(picture.latents)).sum())
    inside = np.ones(picture.pixels.shape[:2], bool)
    outside: int | None = None
    if request.mask is not None and request.image is not None:
        inside = request.mask >= 128
        change = np.abs(picture.pixels.astype(int) - request.image)[~inside]
        outside = int(change.max()) if change.size else 0
    pixels = picture.pixels[inside].astype(np.float64) / 255
    values = np.nan_to_num(picture.values[inside], nan=0.0)
    latents = np.nan_to_num(picture.latents.astype(np.float64), posinf=0, neginf=0)
    return {
        "nonfinite": nonfinite,
        "contrast": float(np.sqrt(pixels.var(axis=0).mean())) if len(pixels) else 0.0,
        "clipped": float(((values < 0) | (values > 1)).all(axis=1).mean()) if len(pixels) else 0.0,
        "latent_std": float(latents.std()),
        "smoothness": _smoothness(latents),
        "outside_mask": outside,
    }


def _smoothness(latents: NDArray[np.float64]) -> float:
    """Correlation of latents (c, h, w) with their neighbours to the right and below."""
    import numpy as np

    centred = latents - latents.mean(axis=(1, 2), keepdims=True)
    energy = float((centred**2).sum())
    across = float((centred[:, :, 1:] * centred[:, :, :-1]).sum())
    down = float((centred[:, 1:] * centred[:, :-1]).sum())
    return float(np.clip((across + down) / (2 * energy), -1, 1)) if energy else 0.0


def judge(rendering: Rendering) -> Iterator[Check]:
    """Every check of every model that is no parent."""
    parents = [s.label for s in rendering.subjects if s.is_parent]
    for subject in rendering.subjects:
        cells = _cells(rendering, subject.label)
        if subject.is_parent or not cells:
            continue
        yield _finite(subject.label, cells)
        yield _flat(rendering, subject.label, cells, parents)
        if any(drawn.figures["outside_mask"] is not None for drawn in cells.values()):
            yield _outside(subject.label, cells)
        beside = [_cells(rendering, parent) for parent in parents]
        if any(beside):
            yield _clipped(subject.label, cells, beside)
            yield _strength(subject.label, cells, beside)
            yield from _smooth(subject.label, cells, beside)
        distance = _prompt_distance(rendering, subject.label)
        if distance is not None:
            theirs = [_prompt_distance(rendering, parent) for parent in parents]
            yield _prompts(subject.label, distance, [d for d in theirs if d is not None])


_Cells = Mapping[int, Drawn]


def _cells(rendering: Rendering, label: str) -> dict[int, Drawn]:
    return {row: drawn for (who, row), drawn in rendering.pictures.items() if who == label}


def _figure(cells: _Cells, name: str) -> list[float]:
    return [float(drawn.figures[name]) for drawn in cells.values()]


def _graded(value: float, warn: float, fail: float) -> Verdict:
    """How a value does that should be small."""
    return "fail" if value > fail else "warn" if value > warn else "pass"


def _finite(label: str, cells: _Cells) -> Check:
    bad = {row: drawn.figures["nonfinite"] for row, drawn in cells.items()}
    count = sum(bad.values())
    reason = f"{count:,} values are NaN or Inf" if count else "every value is a number"
    where = tuple((label, row) for row, n in bad.items() if n)
    return Check("finite", label, count, 0, "fail" if count else "pass", reason, where)


def _flat(rendering: Rendering, label: str, cells: _Cells, parents: Sequence[str]) -> Check:
    """Pictures of one colour, where neither prompt nor parents account for it."""
    fail, warn = 0.02, 0.03  # outlines on a pastel ground have 0.037
    low: dict[int, float] = {}
    for row, drawn in cells.items():
        theirs = [rendering.pictures.get((parent, row)) for parent in parents]
        excused = any(p is not None and p.figures["contrast"] < warn for p in theirs)
        if not rendering.rows[row].probe.flat and not excused:
            low[row] = drawn.figures["contrast"]
    value = min(low.values(), default=None)
    if value is None:
        return Check("flat", label, None, fail, "pass", "pictures of one colour are expected here")
    verdict = _graded(-value, -warn, -fail)
    where = tuple((label, row) for row, contrast in low.items() if contrast < warn)
    black = any(drawn.pixels.max() < 8 for row, drawn in cells.items() if (label, row) in where)
    reason = {
        "pass": "every picture has contrast",
        "warn": f"{len(where)} of {len(cells)} pictures are pale",
        "fail": f"{len(where)} of {len(cells)} pictures are "
        + ("black" if black else "of one colour"),
    }[verdict]
    return Check("flat", label, value, fail, verdict, reason, where)


def _outside(label: str, cells: _Cells) -> Check:
    changes = {row: drawn.figures["outside_mask"] for row, drawn in cells.items()}
    largest = max(change for change in changes.values() if change is not None)
    reason = (
        f"pixels outside the mask change by up to {largest} of 255"
        if largest
        else "outside the mask every pixel is the input's"
    )
    where = tuple((label, row) for row, change in changes.items() if change)
    return Check("outside_mask", label, largest, 0, "fail" if largest else "pass", reason, where)


def _clipped(label: str, cells: _Cells, beside: Sequence[_Cells]) -> Check:
    value = max(_figure(cells, "clipped"))
    theirs = max(max(_figure(each, "clipped")) for each in beside if each)
    verdict = _graded(value, max(0.4, theirs), max(0.7, theirs))
    reason = (
        f"{value:.0%} of a picture is beyond black or white, the parents' worst is {theirs:.0%}"
    )
    return Check("clipped", label, value, max(0.7, theirs), verdict, reason)


def _strength(label: str, cells: _Cells, beside: Sequence[_Cells]) -> Check:
    """Broken merges overshoot: latents of a standard deviation of 2 to 9 instead of 1."""
    value = sum(_figure(cells, "latent_std")) / len(cells)
    means = [sum(_figure(each, "latent_std")) / len(each) for each in beside if each]
    low, high = min(means), max(means)
    outside = value / high if value > high else low / value if value else float("inf")
    verdict = _graded(outside, 1.6, 2.5)
    reason = f"latents have a spread of {value:.2f}, the parents' {low:.2f} to {high:.2f}"
    return Check("latents", label, value, 2.5 * high, verdict, reason)


def _smooth(label: str, cells: _Cells, beside: Sequence[_Cells]) -> Iterator[Check]:
    """Noise: neighbours have nothing in common. In pictures of few latents they never have."""
    value = sum(_figure(cells, "smoothness")) / len(cells)
    worst = min(sum(_figure(each, "smoothness")) / len(each) for each in beside if each)
    if worst < _TELLING_SMOOTHNESS:
        return
    verdict = _graded(-value / worst, -0.6, -0.3)
    reason = f"neighbouring latents correlate by {value:.2f}, the parents' by {worst:.2f} or more"
    yield Check("noise", label, value, 0.3 * worst, verdict, reason)


def _prompt_distance(rendering: Rendering, label: str) -> float | None:
    """Mean difference, 0 to 1, of a model's pictures for different prompts at the same seed."""
    import numpy as np

    distances = []
    for (one, first), (two, second) in combinations(sorted(_cells(rendering, label).items()), 2):
        a, b = rendering.rows[one], rendering.rows[two]
        if a.seed == b.seed and a.probe.prompt != b.probe.prompt:
            distances.append(np.abs(first.pixels.astype(int) - second.pixels).mean() / 255)
    return float(np.mean(distances)) if distances else None


def _prompts(label: str, value: float, theirs: Sequence[float]) -> Check:
    if not theirs:
        verdict = _graded(-value, -0.01, -0.002)
        reason = f"pictures of different prompts differ by {value:.1%}"
        return Check("prompts", label, value, 0.002, verdict, reason)
    ratio = value / min(theirs) if min(theirs) > 0 else 1.0
    verdict = _graded(-ratio, -0.5, -0.15)
    reason = (
        f"pictures of different prompts differ by {value:.1%}, the parents' by {min(theirs):.1%}"
    )
    return Check("prompts", label, value, 0.15 * min(theirs), verdict, reason)


# --- reports ------------------------------------------------------------------------------------


def as_json(rendering: Rendering) -> dict[str, object]:
    """The contract keys of `render`, and every figure; pictures by name, never by path."""
    return {
        "verdict": rendering.verdict,
        "checks": [
            {
                "id": check.id,
                "model": check.model,
                "value": _number(check.value),
                "bound": _number(check.bound),
                "verdict": check.verdict,
                "reason": check.reason,
                "images": [rendering.pictures[cell].path.name for cell in check.cells],
            }
            for check in rendering.checks
        ],
        "images": [
            {
                "file": drawn.path.name,
                "model": label,
                "prompt": rendering.rows[row].probe.prompt,
                "negative": rendering.rows[row].probe.negative,
                "probe": rendering.rows[row].probe.id,
                "seed": rendering.rows[row].seed,
                "task": drawn.facts.get("task"),
                "sha256_pixels": hashlib.sha256(drawn.pixels.tobytes()).hexdigest(),
                "seconds": round(drawn.seconds, 3),
                "cached": drawn.cached,
                **{name: _number(value) for name, value in drawn.figures.items()},
            }
            for (label, row), drawn in rendering.pictures.items()
        ],
        "folder": str(rendering.folder),
        "sheet": rendering.sheet.name,
        "report": rendering.report.name,
        "models": {label: dict(facts) for label, facts in rendering.models.items()},
        "settings": dict(rendering.settings),
        "notes": list(rendering.notes),
        "interrupted": rendering.interrupted,
        "seconds": round(rendering.seconds, 3),
        "versions": versions(),
    }


def _number(value: Any) -> Any:
    """JSON has neither NaN nor Inf."""
    is_bad = isinstance(value, float) and not abs(value) < float("inf")
    return None if is_bad else value


def versions() -> dict[str, str]:
    """What pictures depend on beside the models."""
    names = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "pillow")
    return {
        "ckptools": version(),
        "python": platform.python_version(),
        **{name: package_metadata.version(name) for name in names},
    }


def _write_reports(rendering: Rendering) -> None:
    from ckptools.render.files import save_image
    from ckptools.render.page import html_page
    from ckptools.render.sheet import contact_sheet

    order = in_columns(rendering)
    rows = rendering.rows
    image = contact_sheet(
        [
            [
                drawn.pixels if (drawn := rendering.pictures.get((s.label, number))) else None
                for s in order
            ]
            for number in range(len(rows))
        ],
        rows=[f"{row.probe.id}\n{row.probe.prompt}\nseed {row.seed}" for row in rows],
        columns=[s.label if s.label == Path(s.title).stem else f"{s.label}\n{s.title}"
                 for s in order],
        title=rendering.title,
        failed={
            (row, [s.label for s in order].index(label))
            for check in rendering.checks
            if check.verdict == "fail"
            for label, row in check.cells
        },
    )  # fmt: skip
    save_image(image, rendering.sheet)
    document = {"schema": "ckptools.render/1", **as_json(rendering), "folder": "."}
    _write_text(rendering.folder / "report.json", json.dumps(document, indent=2) + "\n")
    _write_text(rendering.report, html_page(_page_data(rendering)))


def in_columns(rendering: Rendering) -> list[Subject]:
    """Parents first, then what was made of them."""
    return sorted(rendering.subjects, key=lambda subject: not subject.is_parent)


def _page_data(rendering: Rendering) -> dict[str, Any]:
    document = as_json(rendering)
    images = {(item["model"], item["probe"], item["seed"]): item for item in document["images"]}  # type: ignore[attr-defined]  # it is the list above
    return {
        "title": rendering.title,
        "verdict": rendering.verdict,
        "interrupted": rendering.interrupted,
        "columns": [
            {"label": s.label, "file": s.title, "parent": s.is_parent}
            for s in in_columns(rendering)
        ],
        "rows": [
            {
                "id": row.probe.id, "prompt": row.probe.prompt, "negative": row.probe.negative,
                "seed": row.seed,
                "cells": [
                    {**images[s.label, row.probe.id, row.seed], "pixels": drawn.pixels}
                    if (drawn := rendering.pictures.get((s.label, number))) is not None else None
                    for s in in_columns(rendering)
                ],
            }
            for number, row in enumerate(rendering.rows)
        ],
        "checks": document["checks"],
        "notes": document["notes"],
        "settings": document["settings"],
        "models": document["models"],
        "versions": document["versions"],
    }  # fmt: skip


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise OutputError(exc.strerror or str(exc), where=str(path)) from exc


# --- the cache ----------------------------------------------------------------------------------


class Cache:
    """Parents' pictures from other days, in the user's cache folder.

    Found by everything that they depend on: the bytes of all files, the request, device, dtype,
    and the versions of the libraries.
    """

    def __init__(self, order: Order) -> None:
        cache = cache_folder()
        self._folder = cache / "pictures" if cache is not None else None
        self._order = order
        beside = [order.control, order.vae]
        self._beside = [_sha256s(path) for path in beside if path is not None]
        self._config = _config_hash(order.config)

    def recall(
        self, subject: Subject, sha256s: Sequence[str], place: tuple[str, str], request: Request
    ) -> Drawn | None:
        """A picture that was kept; None where there is none, or anything about it is odd."""
        import numpy as np
        from PIL import Image

        path = self._path(subject, sha256s, place, request)
        if path is None or not path.is_file():
            return None
        with suppress(OSError, ValueError, KeyError, TypeError, SyntaxError):
            with Image.open(path) as opened:
                pixels = np.asarray(opened.convert("RGB"), np.uint8).copy()
                known = json.loads(opened.info["ckptools"])
            if known["schema"] != _CACHE_SCHEMA or set(known["figures"]) != _FIGURES:
                return None
            path.touch()  # the least used are forgotten first
            facts = dict(known["facts"])
            return Drawn(pixels, known["figures"], facts, float(known["seconds"]), True, path)
        return None

    def keep(
        self,
        subject: Subject,
        sha256s: Sequence[str],
        place: tuple[str, str],
        request: Request,
        drawn: Drawn,
    ) -> None:
        """Keep a picture; a cache that cannot be written to is no reason to fail."""
        from ckptools.render.files import write_picture

        path = self._path(subject, sha256s, place, request)
        if path is None or self._folder is None:
            return
        known = {
            "schema": _CACHE_SCHEMA,
            "figures": {name: _number(value) for name, value in drawn.figures.items()},
            "facts": drawn.facts,
            "seconds": drawn.seconds,
        }
        with suppress(OSError, OutputError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_picture(drawn.pixels, path, {"ckptools": json.dumps(known)})
            self._forget()

    def _path(
        self, subject: Subject, sha256s: Sequence[str], place: tuple[str, str], request: Request
    ) -> Path | None:
        if self._folder is None or subject.file is None:
            return None
        folder = subject.file if subject.file.is_dir() else None
        key = {
            "models": list(sha256s),
            "config": _config_hash(folder) if folder else self._config,
            "beside": self._beside,
            "place": place,
            "versions": versions(),
            "request": {
                name: hashlib.sha256(value.tobytes()).hexdigest()
                if hasattr(value, "tobytes")
                else value
                for name, value in _fields(request)
            },
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:40]
        return self._folder / f"{name}.png"

    def _forget(self) -> None:
        """Remove the pictures that were not used for longest, where all take too much room."""
        if self._folder is None:
            return
        kept = 0
        stats = [(path.stat(), path) for path in self._folder.glob("*.png")]
        for stat, path in sorted(stats, key=lambda item: -item[0].st_mtime):
            kept += stat.st_size
            if kept > _CACHE_BYTES:
                path.unlink(missing_ok=True)


_FIGURES = {"nonfinite", "contrast", "clipped", "latent_std", "smoothness", "outside_mask"}


def _fields(request: Request) -> list[tuple[str, Any]]:
    return [(name, getattr(request, name)) for name in sorted(request.__dataclass_fields__)]


def _config_hash(folder: Path | None) -> str:
    """What the small files of a diffusers folder say."""
    if folder is None or not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".txt", ".model") and path.stat().st_size < _CONFIG_BYTES:
            digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()
