"""Is a ControlNet alive? Pictures drawn with it, beside those from the same noise without it.

The bounds were fitted on
the tiny family's ControlNet with `examples/tiny/control_thresholds.py`; see `docs/checking.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ckptools.check.figures import STEPS, sample_size
from ckptools.check.verdicts import Check, held
from ckptools.render import ControlNet, Pipeline, Request, draw
from ckptools.render.conditions import draw_condition, find_edges
from ckptools.render.probes import probes_for, usual_guidance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    Places = NDArray[np.bool_]

# Mean difference of pixels, 0 to 1: an untouched picture has 0, an eight-bit step is 0.004
ALIVE_WARN, ALIVE_FAIL = 0.015, 0.002
# What the ControlNet adds to the match of drawn and wanted edges, which is 0 to 1
FOLLOWS_WARN, FOLLOWS_FAIL = 0.3, 0.1
_NEAR = 0.0075  # of the diagonal: Martin, Fowlkes and Malik 2004, section 3
_LINES_MOST, _LINES_PURE = 0.3, 0.98
_PICTURES = 2


def judge_control(
    drawn: Sequence[Pixels],
    without: Sequence[Pixels],
    condition: Pixels,
    *,
    inside: Places | None = None,
) -> Iterator[Check]:
    """Whether the ControlNet does anything, and where its condition is lines, the right thing.

    drawn, without  (height, width, 3) uint8: with and without it, from the same prompts and noise
    inside          (height, width) what was drawn anew, where not all was; then lines are not
                    looked for
    """
    where = np.ones(condition.shape[:2], bool) if inside is None else inside
    changes = [difference(*pair, where) for pair in zip(drawn, without, strict=True)]
    value = float(np.mean(changes))
    yield held(
        "control.alive", value, warn=ALIVE_WARN, fail=ALIVE_FAIL, least=True,
        reason=f"the ControlNet changes pictures by {value:.1%}",
    )  # fmt: skip
    if inside is not None or not is_line_drawing(condition):
        return
    match, alone = (
        float(np.mean([edge_match(picture, condition) for picture in pictures]))
        for pictures in (drawn, without)
    )
    yield held(
        "control.follows", match - alone, warn=FOLLOWS_WARN, fail=FOLLOWS_FAIL, least=True,
        reason=f"drawn and wanted edges match by {match:.2f}, without the ControlNet {alone:.2f}",
    )  # fmt: skip


def draw_control(
    pipeline: Pipeline, controlnet: ControlNet
) -> tuple[tuple[Pixels, ...], tuple[Pixels, ...], Pixels]:
    """Pictures with a ControlNet, the same without it, and the edges that it was given.

    Two of the model's own prompts, from seed 1, in few steps; on a processor large pictures at half
    their size.
    """
    probes = [probe for probe in probes_for(pipeline) if not probe.flat][:_PICTURES]
    size = sample_size(pipeline)
    condition = draw_condition("edges", size)
    asked = [
        Request(probe.prompt, probe.negative, seed=1, steps=STEPS, size=size,
                cfg=usual_guidance(pipeline))
        for probe in probes
    ]  # fmt: skip
    without = tuple(draw(pipeline, request).pixels for request in asked)
    drawn = tuple(
        draw(pipeline, replace(request, control=condition), controlnet=controlnet).pixels
        for request in asked
    )
    return drawn, without, condition


def difference(one: Pixels, other: Pixels, where: Places) -> float:
    """Mean difference of two pictures' pixels in the places that count, 0 to 1."""
    return float(np.abs(one.astype(int) - other)[where].mean() / 255)


def is_line_drawing(condition: Pixels) -> bool:
    """Whether a condition is white lines on black, as edges and scribbles are."""
    white, black = (condition > 223).all(axis=2), (condition < 32).all(axis=2)
    pure = float((white | black).mean())
    return pure >= _LINES_PURE and 0 < float(white.mean()) <= _LINES_MOST


def edge_match(picture: Pixels, lines: Pixels) -> float:
    """How well a picture's edges and white lines cover each other: 0 to 1, the F-measure.

    Edges are Canny's, as `find_edges` has them; near is within 0.0075 of the diagonal.
    Source: Martin, Fowlkes, Malik 2004, "Learning to detect natural image boundaries", section 3;
    each side is matched with its nearest, without their one-to-one assignment.
    """
    drawn, wanted = find_edges(picture)[..., 0] > 127, lines[..., 0] > 127
    if not drawn.any() or not wanted.any():
        return 0.0
    reach = max(1, round(_NEAR * float(np.hypot(*wanted.shape))))
    precision = float((drawn & _near(wanted, reach)).sum() / drawn.sum())
    recall = float((wanted & _near(drawn, reach)).sum() / wanted.sum())
    both = precision + recall
    return 2 * precision * recall / both if both else 0.0


def _near(places: Places, reach: int) -> Places:
    """Everything within `reach` pixels of the places."""
    height, width = places.shape
    padded = np.pad(places, reach)
    found = np.zeros_like(places)
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            if down * down + right * right <= reach * reach:
                top, left = reach + down, reach + right
                found |= padded[top : top + height, left : left + width]
    return found
