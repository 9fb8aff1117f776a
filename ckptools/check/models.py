"""A resident model, checked; its parents before it, one after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ckptools.check.figures import Figures, Sample, draw_samples, measure
from ckptools.check.judge import judge
from ckptools.check.verdicts import Report
from ckptools.checkpoint import Checkpoint
from ckptools.family import detect
from ckptools.render import Pipeline, load_pipeline
from ckptools.sources import open_checkpoint

Tell = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Study:
    """What the parents drew, and their figures on all of it.

    samples  the pictures that a merge of them is asked about
    """

    figures: tuple[Figures, ...]
    samples: tuple[Sample, ...]


def study_parents(
    parents: Mapping[str, Path | Checkpoint],
    *,
    config: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    tell: Tell = lambda stage: None,
) -> Study:
    """Let every parent draw a few pictures, then measure every parent on all of them.

    config  as `load_pipeline` takes it, for all of them
    tell    is told what is done at the moment

    One model is in memory at a time: all but the last are loaded twice. Inpainting and editing
    models draw only where no other parent can.
    """

    def load(name: str) -> Pipeline:
        return load_pipeline(parents[name], config=config, device=device, dtype=dtype)

    names = list(parents)
    drawing = [name for name in names if _variant(parents[name]) == "base"] or names
    own: dict[str, tuple[Sample, ...]] = {}
    found: dict[str, Figures] = {}
    order = [name for name in names if name not in drawing] + drawing  # the last one stays loaded
    pipeline: Pipeline | None = None
    for name in drawing:
        pipeline = None
        _free()
        tell(f"drawing with {name}")
        pipeline = load(name)
        own[name] = draw_samples(pipeline)
    samples = tuple(sample for name in drawing for sample in own[name])
    for name in reversed(order):
        tell(f"measuring {name}")
        if pipeline is None:
            _free()
            pipeline = load(name)
        found[name] = measure(pipeline, samples, name=name, own=own.get(name, ()))
        pipeline = None
    _free()
    return Study(tuple(found[name] for name in names), samples)


def check_pipeline(
    pipeline: Pipeline,
    *,
    parents: Study | None = None,
    shares: Mapping[str, float] | None = None,
    quick: bool = False,
    tell: Tell = lambda stage: None,
) -> Report:
    """Whether a resident model works.

    parents  of `study_parents`: what it is held against. Alone, a model is held against bounds
             that any sound model keeps, on pictures of its own
    shares   parent → its share in the UNet, where it is known (a recipe, or `check_weights`):
             then the loss is held against the straight line between the parents
    quick    draw nothing, compute no losses
    """
    own: Sequence[Sample] = ()
    if not quick:
        tell("drawing")
        own = draw_samples(pipeline)
    samples = parents.samples if parents is not None else own
    tell("measuring")
    found = measure(pipeline, samples, own=own, quick=quick)
    figures = parents.figures if parents is not None else ()
    notes = list(pipeline.notes)
    if not quick and not samples:
        notes.append("nothing was drawn: the model knows the words of no built-in prompt")
    return Report(tuple(judge(pipeline, found, figures, shares)), tuple(notes))


def _variant(source: Path | Checkpoint) -> str | None:
    if isinstance(source, Path):
        with open_checkpoint(source) as checkpoint:
            return detect(checkpoint, checkpoint.metadata).variant
    return detect(source, source.metadata).variant


def _free() -> None:
    """Give back what the last model held, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
