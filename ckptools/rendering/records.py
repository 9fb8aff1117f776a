"""The words of a rendering: subjects, rows, pictures, checks, and all of it together.

Data only; how any of it comes about is known to the other modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ckptools.errors import CkptError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ckptools.render import Pipeline
    from ckptools.render.probes import Probe

Verdict = Literal["pass", "warn", "fail"]
SCHEMA = "ckptools.render/1"
_GRAVITY: tuple[Verdict, ...] = ("pass", "warn", "fail")


class RenderFailedError(CkptError):
    """The pictures of a merge fail their checks, and the recipe says not to save it then."""

    code = "check"
    exit_code = 1


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
class Score:
    """What a CLIP model makes of one picture: 100 * cosine; information, no verdict.

    text      how well it fits its prompt; None for edits, whose prompts describe no picture
    likeness  parent's label → how like it is to the parent's picture of the same prompt and seed
    """

    text: float | None
    likeness: Mapping[str, float]


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
    wanted       models that were to draw, those that are left out too
    interrupted  it was stopped: pictures are missing
    condition    (height, width, 3) uint8: the ControlNet's picture; None without one
    redrawn      (height, width) bool: what was drawn anew, where there is a mask; else everything
    uncontrolled (label, row number) → the same picture without the ControlNet, of a few rows
    scores       (label, row number) → score, where a CLIP model was given; scored_by: that model
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
    wanted: int = 1
    interrupted: bool = False
    condition: NDArray[np.uint8] | None = None
    redrawn: NDArray[np.bool_] | None = None
    uncontrolled: Mapping[tuple[str, int], Drawn] = field(default_factory=dict)
    scores: Mapping[tuple[str, int], Score] = field(default_factory=dict)
    scored_by: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The gravest of the checks."""
        return max((check.verdict for check in self.checks), key=_GRAVITY.index, default="pass")

    @property
    def kept(self) -> str:
        """What there is of it, in words."""
        done = len(self.pictures)
        wanted = len(self.rows) * self.wanted
        return f"{done} of {wanted} pictures are kept in {self.folder}"

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
