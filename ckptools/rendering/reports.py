"""A rendering as files: sheet.png, report.json and report.html."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any

from ckptools.errors import OutputError
from ckptools.manifest import version
from ckptools.rendering.records import Rendering, Score, Subject
from ckptools.rendering.scoring import mean_scores


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


def write_reports(rendering: Rendering) -> None:
    """Write the folder's three files."""
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
        "scores": document["scores"],
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
