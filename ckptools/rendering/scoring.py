"""Scores of a rendering's pictures by a CLIP model: how well they fit prompts and parents.

For information: what a score is good for depends on model, prompt and taste, so nothing is judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckptools.rendering.records import Rendering, Score
from ckptools.rendering.subjects import sha256s_of

if TYPE_CHECKING:
    from ckptools.render.scores import Scorer


def scored(rendering: Rendering, folder: Path, *, device: str = "auto") -> Rendering:
    """The rendering with scores of all its pictures, and a note where a prompt was cut off.

    folder  of the CLIP model: see `render.scores.load_scorer`
    """
    from ckptools.render.scores import load_scorer

    scorer = load_scorer(folder, device=device)
    cut = [row.probe.id for row in rendering.rows
           if len(scorer.tokenizer.ids(row.probe.prompt)) > scorer.longest]  # fmt: skip
    notes = (f"scores read the first {scorer.longest} tokens of: {', '.join(dict.fromkeys(cut))}",)
    return replace(
        rendering,
        scores=_scores(rendering, scorer),
        scored_by={"model": scorer.name, "sha256": sha256s_of(scorer.weights)},
        notes=(*rendering.notes, *(notes if cut else ())),
    )


def _scores(rendering: Rendering, scorer: Scorer) -> dict[tuple[str, int], Score]:
    from ckptools.render.scores import embed_pictures, embed_texts, likeness

    cells = list(rendering.pictures)
    drawn = embed_pictures(scorer, [picture.pixels for picture in rendering.pictures.values()])
    seen = dict(zip(cells, drawn, strict=True))
    told = embed_texts(scorer, [row.probe.prompt for row in rendering.rows])
    parents = [subject.label for subject in rendering.subjects if subject.is_parent]
    return {
        (label, row): Score(
            None
            if rendering.pictures[label, row].facts.get("task") == "edit"
            else likeness(seen[label, row], told[row]),
            {
                parent: likeness(seen[label, row], seen[parent, row])
                for parent in parents
                if label not in parents and (parent, row) in seen
            },
        )
        for label, row in cells
    }


def mean_scores(rendering: Rendering) -> Mapping[str, Score]:
    """Label → the means over its pictures."""
    found = {}
    for subject in rendering.subjects:
        mine = [score for (label, _), score in rendering.scores.items() if label == subject.label]
        if not mine:
            continue
        texts = [score.text for score in mine if score.text is not None]
        parents = dict.fromkeys(parent for score in mine for parent in score.likeness)
        likes = {
            parent: [score.likeness[parent] for score in mine if parent in score.likeness]
            for parent in parents
        }
        found[subject.label] = Score(
            sum(texts) / len(texts) if texts else None,
            {parent: sum(values) / len(values) for parent, values in likes.items()},
        )
    return found
