"""How `ckptools sweep` shows what it found: sheet, curve, page, terminal, JSON. Uses `report`."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptools.errors import Interrupted, OutputError
from ckptools.rendering import versions
from ckptools.rendering.folder import REPORT
from ckptools.report import (
    BarProgress,
    WarningsOnly,
    _row,
    _show_table,
    _table,
    merge_json,
    safe,
    show_line,
    show_message,
    shown_path,
)
from ckptools.sweep import SCHEMA, Looks, SweepProgress, Swept, Variant, label

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from ckptools.render.curve import Panel

_TEMPLATE = Path(__file__).with_name("sweep.html")
_MOST_FACETS = 4
_LARGE = 160  # pictures wider than this are JPEG in the page: it stays small enough to send


@dataclass(frozen=True)
class Written:
    """Files that show a sweep as a whole."""

    sheet: Path
    curve: Path
    report: Path


def write_report(found: Swept) -> Written:
    """Write sheet.png, curve.png, report.html and report.json into the sweep's folder."""
    try:
        return _write_report(found)
    except KeyboardInterrupt as exc:
        kept = f"{len(found.drawn)} pictures are kept in {found.folder}"
        raise Interrupted(f"interrupted; {kept}, without a report") from exc


def _write_report(found: Swept) -> Written:
    from ckptools.render.files import save_image

    files = Written(*(found.folder / name for name in ("sheet.png", "curve.png", "report.html")))
    save_image(sweep_sheet(found), files.sheet)
    save_image(sweep_curve(found), files.curve)
    _write_text(files.report, html_page(found))
    document = {
        "schema": SCHEMA,
        **sweep_json(found, files, below=found.folder),
        "versions": versions(),
        "files": [
            *(path.relative_to(found.folder).as_posix() for path in found.drawn),
            *(path.name for path in (files.sheet, files.curve, files.report)),
        ],
    }
    _write_text(found.folder / REPORT, json.dumps(document, indent=2, allow_nan=False) + "\n")
    return files


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as exc:
        raise OutputError(exc.strerror or str(exc), where=str(path)) from exc


# --- JSON and terminal --------------------------------------------------------------------------


def sweep_json(found: Swept, files: Written, *, below: Path | None = None) -> dict[str, object]:
    """The contract keys of `sweep`, and more.

    below  write paths as seen from this folder, which may be moved
    """
    best = {
        "params": dict(found.best.params),
        "recipe": _shown(found.best_recipe, below),
        **merge_json(found.best_merge),
    } if found.best and found.best_recipe and found.best_merge else None  # fmt: skip
    return {
        "recipe": str(found.recipe.path),
        "family": found.family,
        "axes": {name: list(values) for name, values in found.axes.items()},
        "prompts": list(found.prompts),
        "seeds": list(found.draws.seeds),
        "parents": {
            name: {
                "losses": _numbers(looks.losses),
                "fits": looks.fits,
                "images": _paths(looks, below),
            }
            for name, looks in found.parents.items()
        },
        "variants": [_variant_json(variant, below) for variant in found.variants],
        "sheet": _shown(files.sheet, below),
        "curve": _shown(files.curve, below),
        "report": _shown(files.report, below),
        "best": best,
        "interrupted": found.interrupted,
        "notes": list(found.notes),
        "seconds": round(found.seconds, 3),
    }


def _variant_json(variant: Variant, below: Path | None = None) -> dict[str, object]:
    return {
        "params": dict(variant.params),
        "distances": {
            name: _numbers(
                {"pixels": d.pixels, "latents": d.latents, "weights": d.weights, "alike": d.alike}
            )
            for name, d in variant.distances.items()
        },
        "losses": _numbers(variant.looks.losses),
        "fits": variant.looks.fits,
        "verdict": variant.verdict,
        "reasons": list(variant.reasons),
        "image": _paths(variant.looks, below)[0],
        "images": _paths(variant.looks, below),
        "swap_seconds": round(variant.looks.swap_seconds, 4),
    }


def _paths(looks: Looks, below: Path | None) -> list[str]:
    return [_shown(path, below) for path in looks.images]


def _shown(path: Path, below: Path | None) -> str:
    is_inside = below is not None and path.is_relative_to(below)
    return path.relative_to(below).as_posix() if below and is_inside else shown_path(path)


def _numbers(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """JSON has neither NaN nor Inf."""
    return {n: v if v is not None and math.isfinite(v) else None for n, v in values.items()}


def show_sweep(found: Swept, files: Written) -> None:
    """A line per variant: how far from each parent, how well it does; then the files."""
    parents = list(found.parents)
    table = _table(
        "variant", *(f"from {name}" for name in parents),
        *(f"loss on {name}'s" for name in parents), "verdict",
        numbers=range(1, 2 * len(parents) + 1),
    )  # fmt: skip
    for name, looks in found.parents.items():
        blanks = ["0" if other == name else "·" for other in parents]
        _row(table, name, *blanks, *(_short(looks.losses.get(other)) for other in parents), "·")
    for variant in found.variants:
        _row(
            table, label(variant.params),
            *(_short(variant.distances[name].pixels) for name in parents),
            *(_short(variant.looks.losses.get(name)) for name in parents),
            "; ".join([variant.verdict, *variant.reasons]),
        )  # fmt: skip
    _show_table(table)
    show_line("from: RMS difference of the pictures, 0 to 1 · loss: less is nearer to that parent")
    if found.draws.scores is not None and not found.interrupted:
        _show_scores(found, found.draws.scores.resolve().name)
    for note in found.notes:
        show_line(f"note: {note}")
    for path in (files.sheet, files.curve, files.report):
        show_line(f"wrote {shown_path(path)}")
    if found.best and found.best_recipe and found.best_merge:
        show_line(f"best: {label(found.best.params)}, by {shown_path(found.best_recipe)}")
        show_line(f"wrote {shown_path(found.best_merge.output)}")
    show_line(f"  {found.seconds:.1f} s")


def _short(value: float | None) -> str:
    return "·" if value is None else f"{value:.3f}"


def _show_scores(found: Swept, model: str) -> None:
    """What the CLIP model says of every variant, beside what it says of the parents."""
    parents = list(found.parents)
    table = _table("variant", "fits its prompts", *(f"like {name}" for name in parents),
                   numbers=range(1, len(parents) + 2))  # fmt: skip
    for name, looks in found.parents.items():
        _row(table, name, _score(looks.fits), *("·" for _ in parents))
    for variant in found.variants:
        alike = [_score(variant.distances[name].alike) for name in parents]
        _row(table, label(variant.params), _score(variant.looks.fits), *alike)
    _show_table(table)
    show_line(f"100 x cosine by the CLIP model {model}, for information")


def _score(value: float | None) -> str:
    return "·" if value is None else f"{value:.1f}"


class SweepBars(BarProgress, SweepProgress):
    """Bars by bytes while merging, a line for every model that is drawn."""

    _shown = ""

    def __enter__(self) -> SweepBars:
        super().__enter__()
        return self

    def drawing(self, name: str, done: int, total: int) -> None:
        """Say so once for each model."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        if name != self._shown:
            self._bars.console.print(
                safe(f"drawing {name}   ({done} of {total} pictures are done)")
            )
            self._shown = name


class SweepWarnings(WarningsOnly, SweepProgress):
    """Warnings only."""


# --- sheet --------------------------------------------------------------------------------------


def _columns(found: Swept) -> list[tuple[str, Looks, bool]]:
    """(heading, looks, failed) of every model: the base, the variants, the other parents."""
    files = {name: Path(found.recipe.models[name].path).name for name in found.parents}
    parents = [(f"{name}\n{files[name]}", looks, False) for name, looks in found.parents.items()]
    variants = [
        (f"{label(v.params)}\n{_head(v)}", v.looks, v.verdict == "fail") for v in found.variants
    ]
    return [*parents[:1], *variants, *parents[1:]]


def _head(variant: Variant) -> str:
    near = min(variant.distances, key=lambda name: variant.distances[name].pixels, default="")
    far = f"{variant.distances[near].pixels:.3f} from {near}" if near else ""
    return far if variant.verdict == "pass" else f"{variant.verdict} {far}"


def sweep_sheet(found: Swept) -> Image:
    """The contact sheet: one parameter across, two as a grid, more as a list."""
    from ckptools.render.sheet import contact_sheet

    title = f"{found.recipe.merge.text.strip()}   ({found.recipe.path.name})"
    labels = [f"{prompt}\nseed {s}" for prompt in found.prompts for s in found.draws.seeds]
    models = _columns(found)
    axes = list(found.axes)
    if len(axes) == 2 and found.variants:
        return _grid_sheet(found, title)
    rows: list[list[NDArray[Any] | None]]
    if len(axes) > 2:
        rows = [[picture.pixels for picture in looks.pictures] for _, looks, _ in models]
        failed = [(row, c) for row, m in enumerate(models) if m[2] for c in range(len(labels))]
        return contact_sheet(
            rows, rows=[head for head, _, _ in models], columns=labels, title=title, failed=failed
        )
    rows = [[looks.pictures[n].pixels for _, looks, _ in models] for n in range(len(labels))]
    failed = [(r, column) for column, m in enumerate(models) if m[2] for r in range(len(labels))]
    heads = [head for head, _, _ in models]
    return contact_sheet(rows, rows=labels, columns=heads, title=title, failed=failed)


def _grid_sheet(found: Swept, title: str) -> Image:
    """Two parameters: the first across, the second down, the first picture of each."""
    from ckptools.render.sheet import contact_sheet

    (across, xs), (down, ys) = found.axes.items()
    by_params = {tuple(v.params.values()): v for v in found.variants}
    width = max(len(xs), len(found.parents))
    parents = [looks.pictures[0].pixels for looks in found.parents.values()]
    rows: list[list[NDArray[Any] | None]] = [[*parents, *[None] * (width - len(parents))]]
    failed = []
    for y in ys:
        variants = [by_params.get((x, y)) for x in xs]
        failed += [(len(rows), n) for n, v in enumerate(variants) if v and v.verdict == "fail"]
        pictures = [v.looks.pictures[0].pixels if v else None for v in variants]
        rows.append([*pictures, *[None] * (width - len(xs))])
    names = ", ".join(found.parents)
    sides = [f"{names}\nthe parents"] + [f"{down}={y:g}" for y in ys]
    heads = [f"{across}={x:g}" for x in xs] + [""] * (width - len(xs))
    told = f"{title}: {found.prompts[0]}, seed {found.draws.seeds[0]}"
    return contact_sheet(rows, rows=sides, columns=heads, title=told, failed=failed)


# --- curve --------------------------------------------------------------------------------------


def sweep_curve(found: Swept) -> Image:
    """Three panels over the first parameter: pictures, losses, weights; a row for each of the
    other parameters' values.
    """
    from ckptools.render.curve import draw_panels

    rows = [_panels(found, *facet) for facet in _facets(found)[:_MOST_FACETS]]
    count = len(found.prompts) * len(found.draws.seeds)
    note = (
        f"{count} pictures of each model, same prompts and seeds; dashed: what the parent itself "
        "has on its own pictures"
    )
    title = f"{found.recipe.merge.text.strip()}: how near to {', '.join(found.parents)}"
    return draw_panels(rows, title=title, note=note)


def _facets(found: Swept) -> list[tuple[str, list[tuple[float, Variant]]]]:
    """(what the other parameters are, (first parameter, variant) …) of every row."""
    first, *others = found.axes
    made = []
    for values in product(*(found.axes[name] for name in others)):
        fixed = dict(zip(others, values, strict=True))
        mine = [(v.params[first], v) for v in found.variants
                if all(v.params[name] == value for name, value in fixed.items())]  # fmt: skip
        if mine:
            made.append((label(fixed), sorted(mine, key=lambda pair: pair[0])))
    return made or [("", [])]


def _panels(found: Swept, facet: str, points: Sequence[tuple[float, Variant]]) -> list[Panel]:
    from ckptools.render.curve import Line, Panel

    x_label = next(iter(found.axes)) + (f"   ({facet})" if facet else "")
    near, loss, weights = [], [], []
    for style, (name, parent) in enumerate(found.parents.items()):
        pairs = [(x, v.distances[name]) for x, v in points]
        near.append(Line(name, tuple((x, d.pixels) for x, d in pairs), style))
        lost = tuple((x, v.looks.losses.get(name, math.nan)) for x, v in points)
        loss.append(Line(name, lost, style))
        level = parent.losses.get(name, math.nan)
        loss.append(Line(name, tuple((x, level) for x, _ in points), style, dashed=True))
        if any(d.weights is not None for _, d in pairs):
            known = tuple((x, math.nan if d.weights is None else d.weights) for x, d in pairs)
            weights.append(Line(name, known, style))
    return [
        Panel("Pictures: distance to each", x_label, "RMS difference of pixels, 0 to 1",
              tuple(near)),
        Panel("Loss on the pictures of each", x_label, "mean squared error of the noise",
              tuple(loss)),
        Panel("Weights: distance to each", x_label, "|merge - parent| / |parent|", tuple(weights)),
    ]  # fmt: skip


# --- HTML ---------------------------------------------------------------------------------------


def html_page(found: Swept) -> str:
    """One page that loads nothing; names and prompts reach it as data only, never as markup."""
    data = {
        "formula": found.recipe.merge.text.strip(),
        "recipe": found.recipe.path.name,
        "family": found.family,
        "interrupted": found.interrupted,
        "notes": list(found.notes),
        "axes": [{"name": name, "values": list(values)} for name, values in found.axes.items()],
        "rows": [f"{p} (seed {s})" for p in found.prompts for s in found.draws.seeds],
        "parents": [
            {
                "name": name,
                "file": Path(found.recipe.models[name].path).name,
                "losses": _numbers(looks.losses),
                "fits": looks.fits,
                "pictures": _uris(looks),
            }
            for name, looks in found.parents.items()
        ],
        "variants": [
            {**_variant_json(v), "name": label(v.params), "pictures": _uris(v.looks)}
            for v in found.variants
        ],
        "best": label(found.best.params) if found.best else None,
    }
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)


def _uris(looks: Looks) -> list[str]:
    return [_uri(picture.pixels) for picture in looks.pictures]


def _uri(pixels: NDArray[Any]) -> str:
    from PIL.Image import fromarray

    kind = "jpeg" if pixels.shape[1] > _LARGE else "png"
    stream = io.BytesIO()
    fromarray(pixels).save(stream, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def show_interrupted(found: Swept) -> None:
    """What was done before Ctrl-C."""
    done, parents = len(found.variants), len(found.parents)
    total = math.prod(len(values) for values in found.axes.values())
    show_message(
        f"interrupted after {done} of {total} variants and {parents} models: they are kept in "
        f"{found.folder}"
    )
