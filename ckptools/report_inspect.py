"""How `ckptools inspect` shows what it found: tables, trees, JSON. Prints through `report`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ckptools.errors import CkptError, counted
from ckptools.hubref import is_local, shown
from ckptools.inspection import Component, Inspection, Manifest, Statistics, Survey, TensorRow
from ckptools.lineage import Ancestor, Lineage
from ckptools.report import _row, _show_table, _table, error_json, gigabytes, show_line

if TYPE_CHECKING:
    from ckptools.measure import Values

_MOST_LISTED = 5
_MOST_ENTRIES = 24
_MOST_TEXT = 160
_STEPS = {"complete": "complete", "absent": "not in this file", "not known": "not known"}


# --- JSON --------------------------------------------------------------------------------------


def inspect_json(found: Inspection) -> dict[str, object]:
    """The contract keys of `inspect`, and everything else that was found."""
    detection = found.detection
    body: dict[str, object] = {
        "file": shown(found.path),
        "bytes": found.nbytes,
        "tensors": found.tensors,
        "files": found.files,
        "kind": detection.kind,
        "family": detection.family,
        "variant": detection.variant,
        "prediction": found.prediction,
        "layout": found.layout,
        "whole": found.whole,
        "components": {name: _component_json(one) for name, one in found.components.items()},
        "dtypes": found.dtypes,
        "ema": found.ema or None,
        "markers": list(found.markers),
        "empty": list(found.empty),
        "position_ids": [
            {
                "name": one.name,
                "dtype": one.dtype,
                "wrong": one.count,
                "example": None if one.wrong is None else list(one.wrong),
            }
            for one in found.position_ids
        ],
        "evidence": list(detection.evidence),
        "value_evidence": list(found.value_evidence),
        "rejected": [{"family": one.family, "reason": one.reason} for one in detection.rejected],
        "metadata": dict(found.lineage.entries),
        "metadata_cut": dict(found.lineage.cut),
        "metadata_left_out": found.lineage.left_out,
        "decoded": dict(found.lineage.decoded),
        "modelspec": dict(found.lineage.modelspec),
        "tools": list(found.lineage.tools),
        "lineage": _ancestor_json(found.lineage.root) if found.lineage.root else None,
        "lineage_from": found.lineage.told_by or None,
        "manifest": _manifest_json(found.manifest) if found.manifest else None,
        "notes": [*found.notes, *found.lineage.notes],
        "warnings": list(found.warnings),
    }
    if found.statistics is not None:
        body["statistics"] = {
            "components": _values_json(found.statistics.components),
            "blocks": _values_json(found.statistics.blocks),
            "tensors": _values_json(found.statistics.tensors),
        }
    if found.rows:
        body["listed"] = [_row_json(row) for row in found.rows]
    if found.vectors:
        body["embedding"] = [
            {"tensor": one.name, "vectors": one.vectors, "width": one.width}
            for one in found.vectors
        ]
    if found.adapter is not None:
        from ckptools.report_adapters import inspection_json

        told = inspection_json(found.adapter)
        repeated = ("file", "bytes", "tensors", "metadata", "layout", "components")
        body["adapter"] = {key: value for key, value in told.items() if key not in repeated}
        body["adapter_components"] = told["components"]
    return body


def survey_json(survey: Survey) -> dict[str, object]:
    """One file's keys, or `files` with those of each."""
    bodies: list[dict[str, object]] = [
        {"file": str(path), "error": error_json(found)}
        if isinstance(found, CkptError)
        else inspect_json(found)
        for path, found in survey.found
    ]
    return bodies[0] if survey.is_single else {"files": bodies}


def _values_json(groups: Mapping[str, Values]) -> dict[str, object]:
    return {
        label: {
            "count": values.count,
            "nan": values.nan,
            "inf": values.inf,
            "zeros": values.zeros,
            "denormals": values.denormals,
            "norm": values.norm,
            "mean": _finite(values.mean),
            "std": _finite(values.std),
            "min": _finite(values.min),
            "max": _finite(values.max),
        }
        for label, values in groups.items()
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None  # JSON has no NaN


def _row_json(row: TensorRow) -> dict[str, object]:
    return {
        "name": row.spec.name,
        "dtype": row.spec.dtype,
        "shape": list(row.spec.shape),
        "bytes": row.spec.nbytes,
        "block": row.block or None,
        "component": row.component,
    }


def _component_json(one: Component) -> dict[str, object]:
    return {
        "tensors": one.tensors,
        "missing": list(one.missing),
        "bytes": one.nbytes,
        "dtypes": dict(one.dtypes),
        "state": one.state,
        "unexpected": list(one.unexpected),
        "misshapen": [
            {"name": each.name, "shape": list(each.shape), "usual": list(each.usual)}
            for each in one.misshapen
        ],
    }


def _ancestor_json(one: Ancestor) -> dict[str, object]:
    return {
        "name": one.name,
        "role": one.role or None,
        "how": one.how or None,
        "sha256": one.sha256 or None,
        "parents": [_ancestor_json(parent) for parent in one.parents],
        "note": one.note or None,
    }


def _manifest_json(one: Manifest) -> dict[str, object]:
    return {
        "file": shown(one.path),
        "is_of_this_file": one.is_of_this_file,
        "inputs": [
            {"name": name, "file": file, "sha256": sha256 or None}
            for name, file, sha256 in one.inputs
        ],
        "versions": dict(one.versions),
        "problem": one.problem or None,
    }


# --- one file ----------------------------------------------------------------------------------


def show_inspect(found: Inspection) -> None:
    """What the file is, its components, what speaks for it, and where it comes from."""
    parts = f" in {found.files} files" if found.files > 1 else ""
    name = found.path.absolute().name if is_local(found.path) else shown(found.path)
    show_line(f"{name}: {gigabytes(found.nbytes)}, {found.tensors:,} tensors{parts}")
    show_line(f"  what:       {what(found)}")
    if found.prediction:
        show_line(f"  prediction: {found.prediction}")
    if found.layout:
        show_line(f"  layout:     {found.layout}")
    if found.adapter is None and not found.vectors:
        show_line(f"  whole:      {_wholeness(found)}")
    if found.markers:
        show_line(f"  markers:    {', '.join(found.markers)}")
    if found.lineage.tools:
        show_line(f"  written by: {', '.join(found.lineage.tools)}")
    if found.adapter is not None:
        _show_adapter(found)
    elif found.vectors:
        _show_vectors(found)
    else:
        _show_components(found)
    _show_evidence(found)
    _show_metadata(found.lineage)
    _show_lineage(found)
    for note in (*found.notes, *found.lineage.notes):
        show_line(f"note: {note}")
    for warning in (*_faults(found), *found.warnings):
        show_line(f"warning: {warning}")


def what(found: Inspection) -> str:
    """Kind, family and variant in a line: "Stable Diffusion XL (sdxl), inpainting checkpoint"."""
    detection = found.detection
    kind = detection.kind.replace("_", " ")
    if found.adapter is not None:
        kinds = " and ".join(found.adapter.kinds) or "embeddings"
        base = " or ".join(dict.fromkeys(family for family, _ in found.adapter.base))
        return f"{kinds} for {base or 'an unknown base'}"
    if detection.kind == "embedding":
        return f"textual inversion for {detection.variant}"
    if detection.kind == "controlnet":
        return f"ControlNet for {detection.variant or 'an unknown base'}"
    if detection.kind == "checkpoint":
        return f"{found.title} ({detection.family}), {detection.variant or 'unknown variant'}"
    if found.ema == "only":
        return "unknown: only the EMA copy of a UNet"
    return f"{kind}, {detection.variant}" if detection.variant else kind


def _wholeness(found: Inspection) -> str:
    lacking = [name for name, one in found.components.items() if one.state == "absent"]
    without = f"; without {', '.join(lacking)}" if lacking else ""
    if found.whole is None:
        return "not known (there is no list of its tensors to compare with)"
    if found.whole:
        return f"yes{without}"
    reasons = ["only the EMA copy of a UNet"] if found.ema == "only" else []
    for name, one in found.components.items():
        if one.state == "incomplete":
            reasons.append(f"{name} lacks {counted(len(one.missing), 'tensor')}")
        if one.misshapen:
            reasons.append(f"{name} has {counted(len(one.misshapen), 'misshapen tensor')}")
    return f"no: {', '.join(reasons)}{without}"


def _show_components(found: Inspection) -> None:
    table = _table("component", "tensors", "missing", "size", "stored as", "state",
                   numbers=(1, 2, 3))  # fmt: skip
    for name, one in found.components.items():
        missing = f"{len(one.missing):,}" if one.missing else "·"
        _row(table, name, f"{one.tensors:,}" if one.tensors else "·", missing,
             gigabytes(one.nbytes) if one.tensors else "·", _dtypes(one), _state(one))  # fmt: skip
    _show_table(table)
    for name, one in found.components.items():
        if one.state != "absent":
            _list(f"missing in {name}", one.missing)
        _list(f"not in other {name}s", one.unexpected)
        shapes = [f"{m.name}: {list(m.shape)}, usually {list(m.usual)}" for m in one.misshapen]
        _list("misshapen", shapes)


def _state(one: Component) -> str:
    if one.state == "incomplete":
        whole = one.tensors - len(one.unexpected) + len(one.missing)
        return f"lacks {len(one.missing):,} of {whole:,}"
    return _STEPS[one.state]


def _dtypes(one: Component) -> str:
    if len(one.dtypes) == 1:
        return next(iter(one.dtypes))
    return ", ".join(f"{dtype} ({count:,})" for dtype, count in one.dtypes.items()) or "·"


def _list(title: str, names: Sequence[str]) -> None:
    for name in names[:_MOST_LISTED]:
        show_line(f"{title}: {_short(name)}")
    if len(names) > _MOST_LISTED:
        show_line(f"{title}: … and {len(names) - _MOST_LISTED:,} more (--json lists all)")


def _short(text: str, most: int = _MOST_TEXT) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _show_adapter(found: Inspection) -> None:
    adapter = found.adapter
    if adapter is None:
        return
    ranks = ", ".join(f"{rank} ({count:,})" for rank, count in adapter.ranks.items())
    show_line(f"  ranks:      {_short(ranks) or 'none'}")
    show_line(f"  names:      {adapter.scheme}")
    show_line(f"  stored as:  {' '.join(adapter.dtypes)}")
    for words in adapter.triggers[:_MOST_LISTED]:
        show_line(f"  trigger:    {_short(words)}")
    table = _table("component", "modules", "size", numbers=(1, 2))
    for name, part in adapter.components.items():
        _row(table, name, f"{part.modules:,}" if part.modules else "·", gigabytes(part.nbytes))
    _show_table(table)
    show_line("`ckptools lora inspect` tells alphas, scales, tags and training")


def _show_vectors(found: Inspection) -> None:
    table = _table("tensor", "vectors", "width", numbers=(1, 2), names=(0,))
    for one in found.vectors:
        _row(table, one.name, f"{one.vectors:,}", f"{one.width:,}")
    _show_table(table)


def _show_evidence(found: Inspection) -> None:
    detection = found.detection
    facts = list(detection.evidence)
    if found.adapter is not None:
        facts += [f"{family}: {reason}" for family, reason in found.adapter.base]
    table = _table("is it?", "because")
    kind = detection.kind.replace("_", " ")
    _row(table, detection.family or kind, "; ".join(facts))
    for rejection in detection.rejected:
        _row(table, f"not {rejection.family}", rejection.reason)
    for text in found.value_evidence:
        _row(table, "by its values", text)
    _show_table(table)


def _faults(found: Inspection) -> Iterator[str]:
    for ids in found.position_ids:
        if ids.wrong is not None:
            at, value = ids.wrong
            yield (
                f"{ids.name} has drifted: {ids.count:,} of its numbers, {value:g} at {at} "
                "(as merges in half precision leave it; `ckptools merge` repairs it)"
            )
    empty = [name for name in found.empty if name not in found.markers]
    if empty:
        named = ", ".join(_short(name) for name in empty[:_MOST_LISTED])
        more = f" and {len(empty) - _MOST_LISTED:,} more" if len(empty) > _MOST_LISTED else ""
        yield f"no elements in {named}{more}"


# --- where it comes from -----------------------------------------------------------------------


def _show_metadata(lineage: Lineage) -> None:
    shown = {key: value for key, value in lineage.entries.items() if key not in _TOLD_ELSEWHERE}
    if shown:
        table = _table("metadata", "value")
        for key, text in list(shown.items())[:_MOST_ENTRIES]:
            cut = f" ({lineage.cut[key]:,} characters)" if key in lineage.cut else ""
            _row(table, _short(key, 60), _short(text) + cut)
        more = len(shown) - _MOST_ENTRIES + lineage.left_out
        if more > 0:
            _row(table, "…", f"{more:,} more (--json has them)")
        _show_table(table)


_TOLD_ELSEWHERE = ("ckptools.recipe", "sd_merge_recipe", "sd_merge_models",
                   "modelspec.merged_from")  # fmt: skip


def _show_lineage(found: Inspection) -> None:
    lineage = found.lineage
    if lineage.root is not None:
        show_line(f"made from (as {lineage.told_by} tells):")
        for line in tree_lines(lineage.root):
            show_line(f"  {line}")
    manifest = found.manifest
    if manifest is None:
        return
    if manifest.problem:
        show_line(f"manifest: {manifest.path.name} cannot be read: {manifest.problem}")
    elif manifest.is_of_this_file:
        versions = ", ".join(f"{name} {text}" for name, text in manifest.versions.items())
        show_line(
            f"manifest: {manifest.path.name}, of a file with this header ({_short(versions)})"
        )
    else:
        show_line(f"manifest: {manifest.path.name} is of another file: their headers differ")


def tree_lines(root: Ancestor) -> list[str]:
    """The tree of parents, a line for each."""
    return [_ancestor_line(root), *_branches(root, "")]


def _branches(one: Ancestor, indent: str) -> Iterator[str]:
    for position, parent in enumerate(one.parents):
        is_last = position == len(one.parents) - 1
        yield indent + ("└─ " if is_last else "├─ ") + _ancestor_line(parent)
        yield from _branches(parent, indent + ("   " if is_last else "│  "))


def _ancestor_line(one: Ancestor) -> str:
    role = f"{one.role}: " if one.role else ""
    sha256 = one.sha256[:10]
    known = f" [{sha256}]" if sha256 and sha256 not in one.name else ""
    how = f" = {one.how}" if one.how else ""
    note = f" ({one.note})" if one.note else ""
    return f"{role}{one.name}{known}{how}{note}"


# --- several -----------------------------------------------------------------------------------


def show_survey(survey: Survey) -> None:
    """One file at length, or a line for each; the tensors of a file where they were asked for."""
    found = [one for _, one in survey.found if isinstance(one, Inspection)]
    listed = [one for one in found if one.rows]
    for one in listed:
        if not survey.is_single:
            show_line(one.path.name)
        _show_rows(one)
    for one in found:
        if one.statistics is not None:
            _show_statistics(one, one.statistics)
    if any(one.statistics is not None for one in found) and survey.is_single:
        return
    if not survey.is_single and len(listed) < len(survey.found):
        _show_several(survey)
    elif not listed:
        show_inspect(found[0])


def _show_several(survey: Survey) -> None:
    table = _table("file", "what", "whole", "components", "stored as", "size", numbers=(5,),
                   wide=(0, 1, 3))  # fmt: skip
    for path, found in survey.found:
        if isinstance(found, CkptError):
            _row(table, path.name, f"{found.code}: {_short(found.what)}", "·", "·", "·", "·")
            continue
        whole = {True: "yes", False: "no", None: "not known"}[found.whole]
        components = [name for name, one in found.components.items() if one.tensors]
        if found.adapter is not None:
            components, whole = list(found.adapter.components), "·"
        prediction = f", {found.prediction}" if found.prediction else ""
        _row(table, path.name, what(found) + prediction, whole, " ".join(components),
             " ".join(found.dtypes), gigabytes(found.nbytes))  # fmt: skip
    _show_table(table)


def _show_rows(found: Inspection) -> None:
    table = _table("tensor", "dtype", "shape", "size", "component", "block", numbers=(3,),
                   names=(0,))  # fmt: skip
    for row in found.rows:
        spec = row.spec
        _row(table, spec.name, spec.dtype, str(list(spec.shape)), gigabytes(spec.nbytes),
             row.component, row.block or "·")  # fmt: skip
    _show_table(table)
    total = gigabytes(sum(row.spec.nbytes for row in found.rows))
    show_line(f"{len(found.rows):,} of {counted(found.tensors, 'tensor')}, {total}")


def _show_statistics(found: Inspection, statistics: Statistics) -> None:
    """A table of the components, or of the tensors that were asked for; and a bar per block."""
    groups = statistics.tensors if found.rows else statistics.components
    table = _table("tensor" if found.rows else "component", "values", "norm", "mean", "std", "min",
                   "max", "zeros", "NaN, Inf", numbers=range(1, 9), names=(0,))  # fmt: skip
    for label, values in groups.items():
        _row(table, label, f"{values.count:,}", *map(_number, (
            values.norm, values.mean, values.std, values.min, values.max)),
            _share(values.zeros, values.count), _counts(values))  # fmt: skip
    show_line(f"{found.path.name}: the values of floating point tensors")
    _show_table(table)
    if found.rows:
        return
    from ckptools.report_adapters import bar

    sizes = {label: _rms(values) for label, values in statistics.blocks.items()}
    longest = max(sizes.values(), default=0.0) or 1.0
    bars = _table("block", "values", "std", "rms", "", numbers=(1, 2, 3))
    for label, values in statistics.blocks.items():
        _row(bars, label, f"{values.count:,}", _number(values.std), _number(sizes[label]),
             bar(sizes[label] / longest))  # fmt: skip
    _show_table(bars)
    for name, values in statistics.tensors.items():
        if values.nan or values.inf:
            show_line(f"warning: {_short(name)} holds {values.nan:,} NaN and {values.inf:,} Inf")


def _rms(values: Values) -> float:
    return math.sqrt(values.sum_squares / values.finite) if values.finite else 0.0


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "·"


def _share(part: int, whole: int) -> str:
    if not part:
        return "·"
    return f"{part / whole:.2%}" if part >= whole / 10_000 else "<0.01%"


def _counts(values: Values) -> str:
    return f"{values.nan:,}, {values.inf:,}" if values.nan or values.inf else "·"
