"""Figures of pictures, and what they say beside the parents': pass, warn or fail."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ckptools.rendering.records import Check, Drawn, Rendering, Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ckptools.render import Picture, Request

_TELLING_SMOOTHNESS = 0.2  # of sound models: 0.4 to 0.6, and 0.05 for 8 x 8 latents


def measure(picture: Picture, request: Request) -> dict[str, Any]:
    """The figures of one picture: see `Drawn`. Where there is a mask, of what was redrawn."""
    import numpy as np

    finite = np.isfinite(picture.values)
    nonfinite = int((~finite).sum() + (~np.isfinite(picture.latents)).sum())
    inside = np.ones(picture.pixels.shape[:2], bool)
    outside: int | None = None
    if request.mask is not None and request.image is not None:
        inside = request.mask >= 128
        change = np.abs(picture.pixels.astype(int) - request.image)[~inside]
        outside = int(change.max()) if change.size else 0
    pixels = picture.pixels[inside].astype(np.float64) / 255
    values = np.nan_to_num(picture.values[inside], nan=0.0)
    latents = np.nan_to_num(picture.latents.astype(np.float64), posinf=0, neginf=0)
    return {
        "nonfinite": nonfinite,
        "contrast": float(np.sqrt(pixels.var(axis=0).mean())) if len(pixels) else 0.0,
        "clipped": float(((values < 0) | (values > 1)).all(axis=1).mean()) if len(pixels) else 0.0,
        "latent_std": float(latents.std()),
        "smoothness": _smoothness(latents),
        "outside_mask": outside,
    }


def _smoothness(latents: NDArray[np.float64]) -> float:
    """Correlation of latents (c, h, w) with their neighbours to the right and below."""
    import numpy as np

    centred = latents - latents.mean(axis=(1, 2), keepdims=True)
    energy = float((centred**2).sum())
    across = float((centred[:, :, 1:] * centred[:, :, :-1]).sum())
    down = float((centred[:, 1:] * centred[:, :-1]).sum())
    return float(np.clip((across + down) / (2 * energy), -1, 1)) if energy else 0.0


def judge(rendering: Rendering) -> Iterator[Check]:
    """Every check of every model that is no parent."""
    parents = [s.label for s in rendering.subjects if s.is_parent]
    for subject in rendering.subjects:
        cells = _cells(rendering, subject.label)
        if subject.is_parent or not cells:
            continue
        yield _finite(subject.label, cells)
        yield _flat(rendering, subject.label, cells, parents)
        if any(drawn.figures["outside_mask"] is not None for drawn in cells.values()):
            yield _outside(subject.label, cells)
        beside = [_cells(rendering, parent) for parent in parents]
        if any(beside):
            yield _clipped(subject.label, cells, beside)
            yield _strength(subject.label, cells, beside)
            yield from _smooth(subject.label, cells, beside)
        yield from _control(rendering, subject.label, cells)
        distance = _prompt_distance(rendering, subject.label)
        if distance is not None:
            theirs = [_prompt_distance(rendering, parent) for parent in parents]
            yield _prompts(subject.label, distance, [d for d in theirs if d is not None])


_Cells = Mapping[int, Drawn]


def _cells(rendering: Rendering, label: str) -> dict[int, Drawn]:
    return _cells_of(rendering.pictures, label)


def _cells_of(pictures: Mapping[tuple[str, int], Drawn], label: str) -> dict[int, Drawn]:
    return {row: drawn for (who, row), drawn in pictures.items() if who == label}


def _figure(cells: _Cells, name: str) -> list[float]:
    return [float(drawn.figures[name]) for drawn in cells.values()]


def _graded(value: float, warn: float, fail: float) -> Verdict:
    """How a value does that should be small."""
    return "fail" if value > fail else "warn" if value > warn else "pass"


def _finite(label: str, cells: _Cells) -> Check:
    bad = {row: drawn.figures["nonfinite"] for row, drawn in cells.items()}
    count = sum(bad.values())
    reason = f"{count:,} values are NaN or Inf" if count else "every value is a number"
    where = tuple((label, row) for row, n in bad.items() if n)
    return Check("finite", label, count, 0, "fail" if count else "pass", reason, where)


def _flat(rendering: Rendering, label: str, cells: _Cells, parents: Sequence[str]) -> Check:
    """Pictures of one colour, where neither prompt nor parents account for it."""
    fail, warn = 0.02, 0.03  # outlines on a pastel ground have 0.037
    low: dict[int, float] = {}
    for row, drawn in cells.items():
        theirs = [rendering.pictures.get((parent, row)) for parent in parents]
        excused = any(p is not None and p.figures["contrast"] < warn for p in theirs)
        if not rendering.rows[row].probe.flat and not excused:
            low[row] = drawn.figures["contrast"]
    value = min(low.values(), default=None)
    if value is None:
        return Check("flat", label, None, fail, "pass", "pictures of one colour are expected here")
    verdict = _graded(-value, -warn, -fail)
    where = tuple((label, row) for row, contrast in low.items() if contrast < warn)
    black = any(drawn.pixels.max() < 8 for row, drawn in cells.items() if (label, row) in where)
    reason = {
        "pass": "every picture has contrast",
        "warn": f"{len(where)} of {len(cells)} pictures are pale",
        "fail": f"{len(where)} of {len(cells)} pictures are "
        + ("black" if black else "of one colour"),
    }[verdict]
    return Check("flat", label, value, fail, verdict, reason, where)


def _outside(label: str, cells: _Cells) -> Check:
    changes = {row: drawn.figures["outside_mask"] for row, drawn in cells.items()}
    largest = max(change for change in changes.values() if change is not None)
    reason = (
        f"pixels outside the mask change by up to {largest} of 255"
        if largest
        else "outside the mask every pixel is the input's"
    )
    where = tuple((label, row) for row, change in changes.items() if change)
    return Check("outside_mask", label, largest, 0, "fail" if largest else "pass", reason, where)


def _clipped(label: str, cells: _Cells, beside: Sequence[_Cells]) -> Check:
    value = max(_figure(cells, "clipped"))
    theirs = max(max(_figure(each, "clipped")) for each in beside if each)
    verdict = _graded(value, max(0.4, theirs), max(0.7, theirs))
    reason = (
        f"{value:.0%} of a picture is beyond black or white, the parents' worst is {theirs:.0%}"
    )
    return Check("clipped", label, value, max(0.7, theirs), verdict, reason)


def _strength(label: str, cells: _Cells, beside: Sequence[_Cells]) -> Check:
    """Broken merges overshoot: latents of a standard deviation of 2 to 9 instead of 1."""
    value = sum(_figure(cells, "latent_std")) / len(cells)
    means = [sum(_figure(each, "latent_std")) / len(each) for each in beside if each]
    low, high = min(means), max(means)
    outside = value / high if value > high else low / value if value else float("inf")
    verdict = _graded(outside, 1.6, 2.5)
    reason = f"latents have a spread of {value:.2f}, the parents' {low:.2f} to {high:.2f}"
    return Check("latents", label, value, 2.5 * high, verdict, reason)


def _smooth(label: str, cells: _Cells, beside: Sequence[_Cells]) -> Iterator[Check]:
    """Noise: neighbours have nothing in common. In pictures of few latents they never have."""
    value = sum(_figure(cells, "smoothness")) / len(cells)
    worst = min(sum(_figure(each, "smoothness")) / len(each) for each in beside if each)
    if worst < _TELLING_SMOOTHNESS:
        return
    verdict = _graded(-value / worst, -0.6, -0.3)
    reason = f"neighbouring latents correlate by {value:.2f}, the parents' by {worst:.2f} or more"
    yield Check("noise", label, value, 0.3 * worst, verdict, reason)


def _control(rendering: Rendering, label: str, cells: _Cells) -> Iterator[Check]:
    """What the ControlNet does, where pictures without it were drawn."""
    from ckptools.check import judge_control

    without = _cells_of(rendering.uncontrolled, label)
    rows = [row for row in without if row in cells]
    if rendering.condition is None or not rows:
        return
    found = judge_control(
        [cells[row].pixels for row in rows],
        [without[row].pixels for row in rows],
        rendering.condition,
        inside=rendering.redrawn,
    )
    for each in found:
        where = tuple((label, row) for row in rows) if each.verdict != "pass" else ()
        yield Check(each.id, label, each.value, each.bound, each.verdict, each.reason, where)


def _prompt_distance(rendering: Rendering, label: str) -> float | None:
    """Mean difference, 0 to 1, of a model's pictures for different prompts at the same seed."""
    import numpy as np

    distances = []
    for (one, first), (two, second) in combinations(sorted(_cells(rendering, label).items()), 2):
        a, b = rendering.rows[one], rendering.rows[two]
        if a.seed == b.seed and a.probe.prompt != b.probe.prompt:
            distances.append(np.abs(first.pixels.astype(int) - second.pixels).mean() / 255)
    return float(np.mean(distances)) if distances else None


def _prompts(label: str, value: float, theirs: Sequence[float]) -> Check:
    if not theirs:
        verdict = _graded(-value, -0.01, -0.002)
        reason = f"pictures of different prompts differ by {value:.1%}"
        return Check("prompts", label, value, 0.002, verdict, reason)
    ratio = value / min(theirs) if min(theirs) > 0 else 1.0
    verdict = _graded(-ratio, -0.5, -0.15)
    reason = (
        f"pictures of different prompts differ by {value:.1%}, the parents' by {min(theirs):.1%}"
    )
    return Check("prompts", label, value, 0.15 * min(theirs), verdict, reason)
