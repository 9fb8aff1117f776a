"""A merge that is not written: its tensors are made when they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from ckptools.engine import Settings, Task, recompute
from ckptools.manifest import embedded_metadata
from ckptools.plan import Plan
from ckptools.tensors import TensorSpec


class Merged(Mapping[str, TensorSpec]):
    """What a plan's output would be: the bytes that `ckptools merge` would write.

    Asked for like an open checkpoint. One tensor at a time is kept, so nothing larger is ever in
    memory; tensors are best asked for one after the other. NaN and Inf are let through: they are
    what a check is there to tell.
    """

    def __init__(self, plan: Plan) -> None:
        self._steps = {step.spec.name: step for step in plan.steps}
        self._sources = [source.checkpoint for source in plan.sources]
        self._labels = [source.name for source in plan.sources]
        self._settings = Settings(1, plan.recipe.seed, allow_nonfinite=True)
        self._kept: tuple[str, bytearray] = ("", bytearray())
        self._lock = threading.Lock()
        self.path: Path = plan.recipe.output_path
        self.metadata: Mapping[str, str] = embedded_metadata(plan, {}).entries

    def __getitem__(self, name: str) -> TensorSpec:
        return self._steps[name].spec

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def read_into(self, name: str, view: memoryview, offset: int = 0) -> None:
        """Fill `view` with a tensor's bytes from byte `offset` of the tensor on."""
        with self._lock:
            if self._kept[0] != name:
                self._kept = (name, self._make(name))
            view.cast("B")[:] = self._kept[1][offset : offset + len(view.cast("B"))]

    def _make(self, name: str) -> bytearray:
        step = self._steps[name]
        made = bytearray(step.spec.nbytes)
        pieces = recompute(
            Task(step.spec, step.program, 0),
            sources=self._sources,
            labels=self._labels,
            settings=self._settings,
        )
        for start, data in pieces:
            made[start : start + len(data)] = data
        return made
