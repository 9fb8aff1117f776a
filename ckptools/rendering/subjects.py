"""The models that draw: in files, or merged in memory into a resident pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ckptools.hashing import hash_source
from ckptools.hubref import short_name
from ckptools.manifest import embedded_metadata
from ckptools.plan import Plan
from ckptools.rendering.orders import Order
from ckptools.rendering.records import Subject
from ckptools.tensors import TensorSpec
from ckptools.writer import Layout, lay_out

if TYPE_CHECKING:
    from ckptools.checkpoint import Checkpoint
    from ckptools.render import Pipeline


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


def sha256s_of(file: Path | None) -> tuple[str, ...]:
    """Of every file of a model; remembered by the hash cache."""
    return tuple(each.sha256 for each in hash_source(file).files) if file is not None else ()
