"""A rendering as files: sheet.png, report.json and report.html."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata as package_metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptools.manifest import version
from ckptools.rendering.records import SCHEMA, Drawn, Rendering, Score, Subject
from ckptools.rendering.scoring import mean_scores
from ckptools.writer import PartFile, whole_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CONDITION = "condition.png"


def as_json(rendering: Rendering) -> dict[str, object]:
    """The contract keys of `render`, and every figure; pictures by name, never by path."""
    return {
        "verdict": rendering.verdict,
        "checks": [
            {
                "id": check.id,
                "model": check.model,
                "value": json_number(check.value),
                "bound": json_number(check.bound),
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
                **{name: json_number(value) for name, value in drawn.figures.items()},
                "scores": _score_json(rendering.scores[label, row])
                if (label, row) in rendering.scores
                else None,
            }
            for (label, row), drawn in rendering.pictures.items()
        ],
        "scores": _scores_json(rendering),
        "control": _control_json(rendering),
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


def _score_json(score: Score) -> dict[str, object]:
    return {"text": score.text, "likeness": dict(score.likeness)}


def _scores_json(rendering: Rendering) -> dict[str, object] | None:
    """The means of every model; None where no CLIP model was given."""
    if not rendering.scores:
        return None
    models = {label: _score_json(score) for label, score in mean_scores(rendering).items()}
    return {**rendering.scored_by, "models": models}


def _control_json(rendering: Rendering) -> dict[str, object] | None:
    """The condition, and what was drawn without the ControlNet; None where there was none."""
    if rendering.condition is None:
        return None
    return {
        "condition": _CONDITION,
        "without": [
            {
                "file": drawn.path.name,
                "model": label,
                "probe": rendering.rows[row].probe.id,
                "seed": rendering.rows[row].seed,
            }
            for (label, row), drawn in rendering.uncontrolled.items()
        ],
    }


def json_number(value: Any) -> Any:
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


@dataclass(frozen=True)
class _Column:
    """A column of sheet and page: a model's pictures, or what they are to be seen beside.

    model   the subject's label; "" for the condition
    parent  what is drawn is there to be compared with
    extra   these are no pictures of a model as it was ordered
    cells   row number → pixels; file: their names
    """

    label: str
    title: str
    model: str
    parent: bool
    extra: bool
    cells: Mapping[int, NDArray[np.uint8]]


def _columns(rendering: Rendering) -> list[_Column]:
    """Parents, what the ControlNet starts from, then what was made of them."""
    columns = []
    subjects = in_columns(rendering)
    for number, subject in enumerate(subjects):
        if not subject.is_parent and (number == 0 or subjects[number - 1].is_parent):
            columns += _before_control(rendering)
        cells = _pixels(rendering.pictures, subject.label)
        columns.append(
            _Column(subject.label, subject.title, subject.label, subject.is_parent, False, cells)
        )
    return columns


def _before_control(rendering: Rendering) -> list[_Column]:
    if rendering.condition is None:
        return []
    labels = dict.fromkeys(label for label, _ in rendering.uncontrolled)
    without = [
        _Column(
            f"{label}, no control", "without the ControlNet", label, True, True,
            _pixels(rendering.uncontrolled, label),
        )
        for label in labels
    ]  # fmt: skip
    rows = dict.fromkeys(range(len(rendering.rows)), rendering.condition)
    name = rendering.settings.get("control") or ""
    return [*without, _Column("condition", f"for {name}", "", True, True, rows)]


def _pixels(pictures: Mapping[tuple[str, int], Drawn], label: str) -> dict[int, NDArray[np.uint8]]:
    return {row: drawn.pixels for (who, row), drawn in pictures.items() if who == label}


def write_reports(rendering: Rendering) -> None:
    """Write the folder's files beside the pictures: sheet, report and page, and the condition."""
    from ckptools.render.files import save_image, write_picture
    from ckptools.render.page import html_page
    from ckptools.render.sheet import contact_sheet

    columns = _columns(rendering)
    rows = rendering.rows
    models = [None if column.extra else column.model for column in columns]
    image = contact_sheet(
        [[column.cells.get(number) for column in columns] for number in range(len(rows))],
        rows=[f"{row.probe.id}\n{row.probe.prompt}\nseed {row.seed}" for row in rows],
        columns=[
            column.label if column.label == Path(column.title).stem
            else f"{column.label}\n{column.title}"
            for column in columns
        ],
        title=rendering.title,
        failed={
            (row, models.index(label))
            for check in rendering.checks
            if check.verdict == "fail"
            for label, row in check.cells
        },
    )  # fmt: skip
    save_image(image, rendering.sheet)
    if rendering.condition is not None:
        write_picture(rendering.condition, rendering.folder / _CONDITION, {})
    document = {"schema": SCHEMA, **as_json(rendering), "folder": ".", "files": _files(rendering)}
    _write_text(rendering.folder / "report.json", json.dumps(document, indent=2) + "\n")
    _write_text(rendering.report, html_page(_page_data(rendering)))


def _files(rendering: Rendering) -> list[str]:
    """Everything that this rendering has written beside its report: the next one removes it."""
    drawn = [*rendering.pictures.values(), *rendering.uncontrolled.values()]
    condition = [] if rendering.condition is None else [_CONDITION]
    return [*(each.path.name for each in drawn), *condition, rendering.sheet.name,
            rendering.report.name]  # fmt: skip


def in_columns(rendering: Rendering) -> list[Subject]:
    """Parents first, then what was made of them."""
    return sorted(rendering.subjects, key=lambda subject: not subject.is_parent)


def _page_data(rendering: Rendering) -> dict[str, Any]:
    document = as_json(rendering)
    images = {(item["model"], item["probe"], item["seed"]): item for item in document["images"]}  # type: ignore[attr-defined]  # it is the list above
    columns = _columns(rendering)

    def cell(column: _Column, number: int) -> dict[str, object] | None:
        pixels, row = column.cells.get(number), rendering.rows[number]
        if pixels is None:
            return None
        known = {} if column.extra else images[column.model, row.probe.id, row.seed]
        return {"outside_mask": None, **known, "pixels": pixels}

    return {
        "title": rendering.title,
        "verdict": rendering.verdict,
        "interrupted": rendering.interrupted,
        "columns": [
            {"label": c.label, "file": c.title, "parent": c.parent, "extra": c.extra}
            for c in columns
        ],
        "rows": [
            {
                "id": row.probe.id, "prompt": row.probe.prompt, "negative": row.probe.negative,
                "seed": row.seed, "cells": [cell(column, number) for column in columns],
            }
            for number, row in enumerate(rendering.rows)
        ],
        "checks": document["checks"],
        "scores": document["scores"],
        "notes": document["notes"],
        "settings": document["settings"],
        "models": document["models"],
        "versions": document["versions"],
    }  # fmt: skip


def _write_text(path: Path, text: str) -> None:
    """Write a file whole, or leave the one that is there."""
    with PartFile(whole_file(path, text.encode())) as part:
        part.commit()
