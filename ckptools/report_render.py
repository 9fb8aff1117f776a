"""How `ckptools render` shows what it drew on the terminal. Uses `report`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ckptools.rendering import Progress, Rendering, Row, as_json, mean_scores
from ckptools.report import _row, _show_table, _table, picture_bars, safe, show_line


class PictureProgress(Progress):
    """A bar for the steps of each picture, and one for all pictures, on stderr."""

    def __init__(self) -> None:
        self._bars = picture_bars()
        self._all: Any = None
        self._one: Any = None

    def __enter__(self) -> PictureProgress:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._all is not None:  # bars that never began would end with an empty line
            self._bars.stop()

    def loading(self, label: str) -> None:
        """The model's name, while it is loaded."""
        self._begin()
        self._bars.update(self._one, description=f"loading {safe(label)}", total=None)

    def start(self, pictures: int) -> None:
        """A bar for all pictures."""
        self._begin()
        self._bars.update(self._all, total=pictures, visible=True)

    def drawing(self, label: str, row: Row) -> None:
        """The bar of the next picture."""
        self._begin()
        words = f"{safe(label)}: {safe(row.probe.id)}, seed {row.seed}"
        self._bars.reset(self._one, description=words, total=None)

    def step(self, number: int, steps: int) -> None:
        """So many steps of it."""
        self._bars.update(self._one, completed=number, total=steps)

    def drawn(self) -> None:
        """One picture more."""
        self._bars.advance(self._all)

    def _begin(self) -> None:
        if self._all is None:
            self._bars.start()
            self._all = self._bars.add_task("pictures", total=None, visible=False)
            self._one = self._bars.add_task("", total=None)


def rendering_json(found: Rendering) -> dict[str, object]:
    """The contract keys of `render`, and more."""
    return as_json(found)


def show_rendering(found: Rendering) -> None:
    """Every check, where the pictures are, and the verdict."""
    many = len({check.model for check in found.checks}) > 1
    table = _table("verdict", "check", *(["model"] if many else []), "what was found")
    for check in found.checks:
        model = [check.model] if many else []
        _row(table, check.verdict, check.id.replace("_", " "), *model, check.reason)
    if found.checks:
        _show_table(table)
    if found.scores:
        _show_scores(found)
    for note in found.notes:
        show_line(f"note: {note}")
    counted = Counter(label for label, _ in found.pictures)
    cached = sum(drawn.cached for drawn in found.pictures.values())
    pictures, models = sum(counted.values()), len(counted)
    drawn = f"{pictures} picture{'s'[: pictures != 1]} of {models} model{'s'[: models != 1]}"
    kept = f", {cached} of them from the cache" if cached else ""
    show_line(f"{drawn}{kept}, in {found.seconds:.1f} s: {found.folder}")
    if found.pictures:
        show_line(f"  look at: {found.report}")
    show_line(f"verdict: {found.verdict}" + (", interrupted" if found.interrupted else ""))


def _show_scores(found: Rendering) -> None:
    """Means of the CLIP scores, by model."""
    parents = [s.label for s in found.subjects if s.is_parent]
    table = _table("model", "fits its prompts", *(f"like {parent}" for parent in parents),
                   numbers=range(1, len(parents) + 2))  # fmt: skip
    for label, score in mean_scores(found).items():
        figures = [score.text, *(score.likeness.get(parent) for parent in parents)]
        _row(table, label, *("·" if value is None else f"{value:.1f}" for value in figures))
    _show_table(table)
    show_line(f"100 x cosine by the CLIP model {found.scored_by['model']}, for information")
