"""How `ckptools render` shows what it drew on the terminal. Uses `report`."""

from __future__ import annotations

from collections import Counter

from ckptools.rendering import Rendering, as_json
from ckptools.report import _row, _show_table, _table, show_line


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
