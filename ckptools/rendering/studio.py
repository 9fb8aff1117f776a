"""Draws what was ordered, one resident model at a time, and has it measured and reported."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ckptools.errors import CkptError, Interrupted, OutputError
from ckptools.interrupts import held_back
from ckptools.manifest import version
from ckptools.rendering.cache import Cache
from ckptools.rendering.folder import Earlier, check_folder
from ckptools.rendering.judging import judge, measure
from ckptools.rendering.orders import Order, settle
from ckptools.rendering.records import SCHEMA, Check, Drawn, Progress, Rendering, Row, Subject
from ckptools.rendering.reports import write_reports
from ckptools.rendering.scoring import scored
from ckptools.rendering.subjects import sha256s_of
from ckptools.writer import made_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ckptools.check import Study
    from ckptools.render import ControlNet, Pipeline, Request


_ROWS_WITHOUT = 2  # drawn without the ControlNet too: it costs a picture each


def render(
    subjects: Sequence[Subject],
    order: Order,
    folder: Path,
    *,
    title: str = "",
    use_cache: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Rendering:
    """Draw, measure and report.

    subjects  the first says what suits it (prompts, size, guidance); parents come last
    folder    made where it is missing; an earlier rendering in it is replaced when the first
              picture is drawn. One that holds other things is refused, unless `force`

    A subject that is no parent and cannot draw what is ordered raises; such a parent is left out,
    and a note says why. An interruption ends the drawing; what is done is reported. Before the
    first picture, both leave nothing behind.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    check_folder(folder, SCHEMA, force=force)
    studio = _Studio(_labelled(subjects), order, folder, use_cache=use_cache, progress=progress)
    error: CkptError | None = None
    interrupted = False
    with made_folder(folder):
        try:
            studio.draw_all()
        except KeyboardInterrupt:
            interrupted = True
            if not studio.pictures:
                studio.undo()
                raise
        except (CkptError, OSError) as exc:
            if not studio.pictures:
                studio.undo()
                raise
            error = exc if isinstance(exc, CkptError) else _of_system(exc, folder)
            studio.notes.append(f"ended early: {error.what}")
        studio.earlier.drop()
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
        wanted=len(studio.subjects),
        interrupted=interrupted or error is not None,
        condition=studio.condition,
        redrawn=studio.redrawn,
        uncontrolled=MappingProxyType(studio.uncontrolled),
    )
    rendering = replace(rendering, checks=(*judge(rendering), *studio.deeper))
    if order.scores is not None:
        rendering = _scored(rendering, order.scores, order.device, progress)
    try:
        write_reports(rendering)
    except KeyboardInterrupt as exc:
        raise Interrupted(f"interrupted; {rendering.kept}, without a report") from exc
    except OSError as exc:
        said = _of_system(exc, folder)
        said.what = f"{said.what}; {rendering.kept}, without a report"
        said.fix = "free some space, or draw into another folder"
        raise said from exc
    if error is not None:
        raise error
    return rendering


def _of_system(exc: OSError, folder: Path) -> OutputError:
    """What the system says of a file in the folder."""
    return OutputError(exc.strerror or str(exc), where=str(exc.filename or folder))


def _scored(rendering: Rendering, folder: Path, device: str, progress: Progress) -> Rendering:
    """With scores, where nobody is in a hurry: an interruption ends the scoring too."""
    if not rendering.interrupted:
        progress.loading(folder.name)
        try:
            return scored(rendering, folder, device=device)
        except KeyboardInterrupt:
            rendering = replace(rendering, interrupted=True)
    return replace(rendering, notes=(*rendering.notes, "interrupted: the pictures are not scored"))


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
        self.earlier = Earlier(folder, SCHEMA)
        self._names: set[str] = set()
        self._written: list[Path] = []
        self.notes: list[str] = []
        self.models: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, Any] = {}
        self.deeper: list[Check] = []
        self.uncontrolled: dict[tuple[str, int], Drawn] = {}
        self._study: Study | None = None
        self._requests: list[Request] = []
        self._place = (order.device, order.dtype)

    def undo(self) -> None:
        """Leave the folder as it was."""
        with held_back():
            for path in self._written:
                path.unlink(missing_ok=True)
            self.earlier.bring_back()

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
        sha256s = sha256s_of(subject.file)
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
        if pipeline is not None and control is not None and not subject.is_parent:
            if self._order.control_scale >= 1:
                self._draw_without(subject, pipeline, sha256s)
            else:
                self.notes.append(f"{subject.label}: with a weight below 1 the ControlNet is "
                                  "not judged")  # fmt: skip
        if self._order.check and pipeline is not None and not subject.is_parent:
            self._check(subject, pipeline)

    def _draw_without(self, subject: Subject, pipeline: Pipeline, sha256s: tuple[str, ...]) -> None:
        """The first pictures once more without the ControlNet: to see, and to judge it by."""
        for number, row in enumerate(self.rows[:_ROWS_WITHOUT]):
            self._progress.drawing(f"{subject.label} without the ControlNet", row)
            request = replace(self._requests[number], control=None)
            drawn = self._draw(pipeline, None, request)
            path = self._write(subject, number, drawn, sha256s, "--no-control")
            self.uncontrolled[subject.label, number] = replace(drawn, path=path)
            self._progress.drawn()

    @property
    def condition(self) -> NDArray[np.uint8] | None:
        """The ControlNet's picture."""
        return self._requests[0].control if self._requests else None

    @property
    def redrawn(self) -> NDArray[np.bool_] | None:
        """What is drawn anew where there is an image; a mask leaves the rest as it is."""
        first = self._requests[0] if self._requests else None
        if first is None or first.image is None:
            return None
        import numpy as np

        whole = np.ones(first.image.shape[:2], bool)
        return whole if first.mask is None else first.mask >= 128

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
        judged = sum(not subject.is_parent for subject in self.subjects)
        is_judged = self._order.control is not None and self._order.control_scale >= 1
        without = judged * min(_ROWS_WITHOUT, len(self.rows)) if is_judged else 0
        self._progress.start(len(self.rows) * len(self.subjects) + without)

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
        path = self._write(subject, number, drawn, sha256s)
        self.pictures[subject.label, number] = replace(drawn, path=path)

    def _write(
        self,
        subject: Subject,
        number: int,
        drawn: Drawn,
        sha256s: tuple[str, ...],
        ending: str = "",
    ) -> Path:
        """The picture's file."""
        from ckptools.render.files import infotext, write_picture

        row = self.rows[number]
        path = self._free(_file_word(f"{subject.label}--{row.name}{ending}"))
        said = infotext(
            row.probe.prompt,
            row.probe.negative,
            drawn.facts,
            model=Path(subject.title).stem,
            model_hash=sha256s[0] if len(sha256s) == 1 else "",
            more={"Version": f"ckptools {version()}"},
        )
        if not self._written and (count := self.earlier.put_aside()):
            self.notes.append(f"{count} files of an earlier rendering were replaced")
        self._written.append(path)
        write_picture(drawn.pixels, path, {"parameters": said})
        return path

    def _free(self, word: str) -> Path:
        """A file of this rendering's own: words may be cut short, or differ in signs alone."""
        name, number = word, 1
        while name.casefold() in self._names:
            number += 1
            name = f"{word}-{number}"
        self._names.add(name.casefold())
        return self._folder / f"{name}.png"


def _file_word(text: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")[:120] or "picture"


def _check_all(pipeline: Pipeline, requests: Sequence[Request], control: ControlNet | None) -> None:
    from ckptools.render import check_request

    for request in requests:
        check_request(pipeline, request, control)
