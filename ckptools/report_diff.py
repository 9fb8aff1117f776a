"""How `ckptools diff` shows what it found: terminal, JSON and one HTML page. Uses `report`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ckptools.diff import KINDS, Difference, fit_in_words, kind_of
from ckptools.errors import OutputError, counted
from ckptools.hubref import shown
from ckptools.measure import Pair
from ckptools.report import _row, _show_table, _table, gigabytes, show_line, show_message
from ckptools.tensors import TensorSpec
from ckptools.writer import PartFile, output_error, whole_file

_MOST_NAMES = 8
_TEMPLATE = Path(__file__).with_name("diff.html")


def diff_json(found: Difference, *, top: int) -> dict[str, object]:
    """The contract keys of `diff`, and more."""
    return {
        "a": shown(found.a.checkpoint.path),
        "b": shown(found.b.checkpoint.path),
        "family": found.family.id,
        "same": found.same,
        "explanation": found.explanation,
        "notes": list(found.notes),
        "tensors": found.tensors,
        "changed": found.changed,
        "only_a": list(found.only_a),
        "only_b": list(found.only_b),
        "reshaped": [
            {"name": name, "a": list(a.shape), "b": list(b.shape), "compared": name in found.pairs}
            for name, a, b in found.reshaped
        ],
        "dtypes": [{"a": a, "b": b, "tensors": n} for (a, b), n in found.dtypes.items()],
        "metadata": [{"key": key, "a": a, "b": b} for key, a, b in found.metadata],
        "groups": {name: _pair_json(pair) for name, pair in found.groups.items()},
        "top": [{"name": n, **_pair_json(found.pairs[n])} for n in most_changed(found)[:top]],
        "low_rank": None if found.low_rank is None else {
            "changed": found.low_rank.changed, "sampled": found.low_rank.sampled,
            "low": found.low_rank.low, "rank": found.low_rank.rank,
        },
        "fits": {
            name: {
                "coefficients": dict(zip(found.fit_labels, fit.coefficients, strict=True)),
                "sum": sum(fit.coefficients),
                "residual": fit.residual,
                "formula": fit_in_words(fit, [*found.fit_labels]),
            }
            for name, fit in found.fits.items()
        },
        "fitted": {label: str(path) for label, path in found.fit_labels.items()},
        "left_out_of_fits": found.left_out,
    }  # fmt: skip


def _pair_json(pair: Pair) -> dict[str, object]:
    return {
        "max_abs": _number(pair.max_abs),
        "mean_abs": _number(pair.mean_abs),
        "rel_l2": _number(pair.rel_l2),
        "cosine": _number(pair.cosine),
        "changed_share": pair.changed_share,
        "nonfinite": pair.nonfinite,
        "values": pair.count,
    }


def _number(value: float) -> float | None:
    """JSON has neither NaN nor Inf."""
    return value if math.isfinite(value) else None


def most_changed(found: Difference) -> list[str]:
    """The names of changed tensors, the largest relative change first."""
    changed = [name for name, pair in found.pairs.items() if pair.changed]
    return sorted(changed, key=lambda name: (-found.pairs[name].rel_l2, name))


def show_diff(found: Difference, *, top: int) -> None:
    """The verdict, groups, and the tensors that changed most."""
    show_line(found.explanation)
    for note in found.notes:
        show_line(f"note: {note}")
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        _show_names(f"only in {side}", names)
    for name, a, b in found.reshaped[:_MOST_NAMES]:
        show_line(f"shape: {name}: A is {list(a.shape)}, B is {list(b.shape)}")
    for (one, two), count in found.dtypes.items():
        show_line(f"dtype: {counted(count, 'tensor', 'is')} {one} in A, {two} in B")
    if found.metadata:
        show_line(f"metadata differs: {', '.join(key for key, _, _ in found.metadata)}")
    changed = {name: pair for name, pair in found.groups.items() if pair.changed}
    if changed:
        _show_groups(changed)
        unchanged = [name for name in found.groups if name not in changed]
        if unchanged:
            show_line(f"unchanged: {' '.join(unchanged)}")
        if most := most_changed(found)[:top]:
            _show_tensors({name: found.pairs[name] for name in most})
    _show_fits(found)
    told = f"{found.changed:,} of {found.tensors:,} shared tensors differ"
    if found.has_values:
        show_line(told)


def _show_names(title: str, names: Sequence[str]) -> None:
    for name in names[:_MOST_NAMES]:
        show_line(f"{title}: {name}")
    if len(names) > _MOST_NAMES:
        show_line(f"{title}: … {len(names) - _MOST_NAMES:,} more (--json lists them)")


def _show_tensors(pairs: dict[str, Pair]) -> None:
    """Lines, not a table: names are long, and are copied."""
    show_line(f"{'rel L2':>8}  {'max':>9}  {'changed':>7}  tensor")
    for name, pair in pairs.items():
        figures = f"{pair.rel_l2:>8.3g}  {pair.max_abs:>9.3g}  {pair.changed_share:>7.1%}"
        nonfinite = f"  ({pair.nonfinite:,} NaN or Inf)" if pair.nonfinite else ""
        show_line(f"{figures}  {name}{nonfinite}")


def _show_groups(pairs: dict[str, Pair]) -> None:
    table = _table("group", "rel L2", "cosine", "max", "mean", "changed", "NaN/Inf",
                   numbers=(1, 2, 3, 4, 5, 6), names=(0,))  # fmt: skip
    for name, pair in pairs.items():
        _row(table, name, f"{pair.rel_l2:.3g}", f"{pair.cosine:.6f}", f"{pair.max_abs:.3g}",
             f"{pair.mean_abs:.3g}", f"{pair.changed_share:.1%}",
             f"{pair.nonfinite:,}" if pair.nonfinite else "·")  # fmt: skip
    _show_table(table)


def _show_fits(found: Difference) -> None:
    if not found.fits:
        return
    table = _table("group", "B ≈", "sum", "residual / |B - A|", numbers=(2, 3), wide=(1,))
    for name, fit in found.fits.items():
        _row(table, name, fit_in_words(fit, [*found.fit_labels]), f"{sum(fit.coefficients):.4g}",
             f"{fit.residual:.2g}")  # fmt: skip
    _show_table(table)
    named = {**found.fit_labels, "B": found.b.checkpoint.path}
    show_line(", ".join(f"{label} is {named[label].name}" for label in sorted(named)))
    if found.left_out:
        show_line(f"{counted(found.left_out, 'tensor', 'is')} in no fit: not all models have them")


# --- HTML --------------------------------------------------------------------------------------


def check_html(path: Path) -> None:
    """Raise `OutputError` where no page can be written, before the models are read.

    A page of ours is replaced, any other file is not: it may be one of the models.
    """
    if not path.absolute().parent.is_dir():
        raise OutputError(
            f"there is no folder {str(path.parent)!r}", where="--html", fix="make it first"
        )
    if path.is_file():
        with path.open("rb") as stream:
            begin = stream.read(1024)
        if begin and b"<title>ckptools" not in begin:
            raise OutputError(
                f"{str(path)!r} exists, and is no page of `ckptools diff`",
                where="--html",
                fix="give another name",
            )


def write_html(found: Difference, path: Path, *, quiet: bool = False) -> None:
    """Write one page that loads nothing. Raises `OutputError` where it cannot be written."""
    data = html_page(found).encode()
    if path.exists() and not path.is_file():  # a pipe, or /dev/stdout
        try:
            path.write_bytes(data)
        except OSError as exc:
            raise output_error(exc, path) from exc
    else:
        with PartFile(whole_file(path, data)) as part:
            part.commit()
    if not quiet:
        show_message(f"wrote {path}")


def html_page(found: Difference) -> str:
    """The page; names and metadata reach it as data only, never as markup."""
    sides = []
    for label, model in (("A", found.a), ("B", found.b)):
        detection = model.detection
        what = " ".join(filter(None, [detection.family or detection.kind, detection.variant]))
        sides.append({
            "label": label, "file": model.checkpoint.path.name, "what": what,
            "size": gigabytes(model.checkpoint.file_bytes), "tensors": len(model.checkpoint),
        })  # fmt: skip
    data = {
        "sides": sides,
        "explanation": found.explanation,
        "notes": list(found.notes),
        "same": found.same,
        "kinds": list(KINDS),
        "places": [*found.family.components, "other", *found.family.blocks],
        "groups": {name: _pair_json(pair) for name, pair in found.groups.items()},
        "fits": [
            {"group": name, "formula": fit_in_words(fit, [*found.fit_labels]),
             "residual": fit.residual}
            for name, fit in found.fits.items()
        ],
        "only": {"A": list(found.only_a), "B": list(found.only_b)},
        "metadata": [{"key": key, "a": a, "b": b} for key, a, b in found.metadata],
        "tensors": [_tensor_json(found, name, pair) for name, pair in found.pairs.items()],
    }  # fmt: skip
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)


def _tensor_json(found: Difference, name: str, pair: Pair) -> dict[str, object]:
    a, b = found.a.spec(name), found.b.spec(name)
    return {
        "name": name,
        "kind": kind_of(name),
        "place": _place(found, name),
        "what": str(a) if (a.dtype, a.shape) == (b.dtype, b.shape) else _both(a, b),
        "changed": pair.changed,
        "squares": _number(pair.sum_squares) or 0,
        "norm": _number(pair.a_squares) or 0,
        **_pair_json(pair),
    }


def _place(found: Difference, name: str) -> str:
    """The block; the component where blocks do not tell components apart (BASE)."""
    block = found.family.block_of(name)
    return block if block not in ("", "BASE") else found.family.component_of(name)


def _both(a: TensorSpec, b: TensorSpec) -> str:
    return f"{a} → {b}"
