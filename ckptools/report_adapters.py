"""How `ckptools lora` shows what it found: tables, bars, JSON. Uses `report` for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ckptools.adapters.check import Check, Strength
from ckptools.adapters.extract import Extraction, Residual
from ckptools.adapters.inspection import Inspection
from ckptools.adapters.rewrite import Rewritten
from ckptools.adapters.writing import Written
from ckptools.hubref import is_local, shown
from ckptools.report import _row, _show_table, _table, gigabytes, show_line

_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
_MOST_LINES = 12
_MOST_TEXT = 200


def bar(share: float, width: int = _BAR_WIDTH) -> str:
    """A bar of 0 to 1 of the width, to an eighth of a character.

    >>> bar(0.5, 4)
    '██'
    """
    if not share > 0.0:
        return ""
    eighths = max(1, round(min(share, 1.0) * width * 8))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _counted(numbers: Mapping[int, int] | Mapping[float, int]) -> str:
    """Numbers with how many modules have each: "32 (192), 16 (72)"."""
    if not numbers:
        return "none"
    items = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{number:g} ({count:,})" for number, count in items[:_MOST_LINES])
    more = len(items) - _MOST_LINES
    return shown + (f", and {more} more" if more > 0 else "")


def _short(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…"


def _fits(base: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{family} ({reason})" for family, reason in base) or "unknown"


def _base(base: Sequence[tuple[str, str]]) -> str | None:
    return " or ".join(dict.fromkeys(family for family, _ in base)) or None


def _kind(kinds: Mapping[str, int]) -> str:
    return " and ".join(kinds) or "embeddings"


# --- inspect -----------------------------------------------------------------------------------


def inspection_json(found: Inspection) -> dict[str, object]:
    """Everything `lora inspect` tells, and the whole metadata."""
    return {
        "file": shown(found.path),
        "bytes": found.nbytes,
        "tensors": found.tensors,
        "kind": _kind(found.kinds),
        "kinds": dict(found.kinds),
        "base": _base(found.base),
        "evidence": [f"{family}: {reason}" for family, reason in found.base],
        "layout": found.layout,
        "names": found.scheme,
        "modules": sum(found.kinds.values()),
        "ranks": _keys(found.ranks),
        "alphas": _keys(found.alphas),
        "scales": _keys(found.scales),
        "components": {
            name: {"modules": part.modules, "bytes": part.nbytes}
            for name, part in found.components.items()
        },
        "dtypes": list(found.dtypes),
        "triggers": list(found.triggers),
        "tags": dict(found.tags),
        "training": dict(found.training),
        "embeddings": list(found.embeddings),
        "unknown": list(found.unknown),
        "notes": list(found.notes),
        "metadata": dict(found.metadata),
    }


def _keys(numbers: Mapping[int, int] | Mapping[float, int]) -> dict[str, int]:
    return {f"{number:g}": count for number, count in numbers.items()}


def show_inspection(found: Inspection) -> None:
    """What the file is, in lines; components and training in tables."""
    name = found.path.name if is_local(found.path) else shown(found.path)
    show_line(f"{name}: {gigabytes(found.nbytes)}, {found.tensors:,} tensors")
    kinds = ", ".join(f"{kind} ({count:,})" for kind, count in found.kinds.items())
    show_line(f"  kind:    {kinds or 'no modules'}")
    show_line(f"  base:    {_fits(found.base)}")
    show_line(f"  names:   {found.scheme}")
    show_line(f"  ranks:   {_counted(found.ranks)}")
    show_line(f"  alphas:  {_counted(found.alphas)}")
    show_line(f"  scales:  {_counted(found.scales)}")
    show_line(f"  dtypes:  {' '.join(found.dtypes)}")
    if found.triggers:
        show_line(f"  trigger: {_short('; '.join(found.triggers))}")
    if found.tags:
        tags = ", ".join(f"{tag} ({count:,})" for tag, count in found.tags)
        show_line(f"  tags:    {tags}")
    if found.embeddings:
        show_line(f"  embeddings: {', '.join(found.embeddings)}")
    table = _table("component", "modules", "size", numbers=(1, 2))
    for name, part in found.components.items():
        _row(table, name, f"{part.modules:,}" if part.modules else "·", gigabytes(part.nbytes))
    _show_table(table)
    told = {**found.modelspec, **found.training}
    if told:
        metadata = _table("metadata", "value")
        for key, text in told.items():
            _row(metadata, key, _short(text))
        _show_table(metadata)
    for name in found.unknown[:_MOST_LINES]:
        show_line(f"unknown tensor: {name}")
    for note in found.notes:
        show_line(f"note: {note}")


# --- check -------------------------------------------------------------------------------------


def check_json(found: Check) -> dict[str, object]:
    """The contract keys of `lora check`, and the strengths by block."""
    return {
        "adapter": str(found.adapter),
        "model": str(found.model),
        "fits": found.fits,
        "matched": found.matched,
        "unmatched": list(found.unmatched),
        "misfits": [{"module": name, "message": what} for name, what in found.misfits],
        "modules": found.modules,
        "kind": _kind(found.kinds),
        "kinds": dict(found.kinds),
        "base": _base(found.base),
        "evidence": [f"{family}: {reason}" for family, reason in found.base],
        "model_family": found.family,
        "ranks": _keys(found.ranks),
        "components": {
            name: {"touched": part.modules, "of": part.of}
            for name, part in found.components.items()
        },
        "blocks": {label: _strength_json(part) for label, part in found.blocks.items()},
        "total": _strength_json(found.total),
        "notes": list(found.notes),
    }


def _strength_json(part: Strength) -> dict[str, object]:
    return {
        "change": part.change,
        "weight": part.weight,
        "ratio": part.ratio if math.isfinite(part.ratio) else None,
        "tensors": part.tensors,
    }


def show_check(found: Check) -> None:
    """Whether it fits, what it touches, and a bar for each block."""
    verdict = "fits" if found.fits else "does not fit"
    show_line(f"{found.adapter.name} {verdict} {found.model.name}")
    show_line(
        f"  {found.matched:,} of {found.modules:,} modules matched; {_kind(found.kinds)}, "
        f"ranks {_counted(found.ranks)}"
    )
    made = f"made for {_fits(found.base)}; " if found.base else ""
    show_line(f"  {made}the model is {found.family}")
    for name in found.unmatched[:_MOST_LINES]:
        show_line(f"  matches nothing: {name}")
    if len(found.unmatched) > _MOST_LINES:
        show_line(f"  … and {len(found.unmatched) - _MOST_LINES:,} more")
    for name, what in found.misfits[:_MOST_LINES]:
        show_line(f"  {name}: {what}")
    if len(found.misfits) > _MOST_LINES:
        show_line(f"  … and {len(found.misfits) - _MOST_LINES:,} more")
    if not found.blocks:
        return
    table = _table("component", "changed", "of", "", numbers=(1, 2))
    for name, part in found.components.items():
        _row(table, name, f"{part.modules:,}", f"{part.of:,}", f"{part.modules / part.of:.0%}")
    _show_table(table)
    longest = max((part.ratio for part in found.blocks.values() if math.isfinite(part.ratio)),
                  default=0.0) or 1.0  # fmt: skip
    bars = _table("block", "tensors", "‖ΔW‖/‖W‖", "", numbers=(1, 2))
    for label, one in found.blocks.items():
        _row(bars, label, f"{one.tensors:,}", f"{one.ratio:.2%}", bar(one.ratio / longest))
    _row(bars, "all", f"{found.total.tensors:,}", f"{found.total.ratio:.2%}", "")
    _show_table(bars)
    for note in found.notes:
        show_line(f"note: {note}")


# --- what writes --------------------------------------------------------------------------------


def _written_json(written: Written) -> dict[str, object]:
    return {
        "output": str(written.output),
        "bytes": written.nbytes,
        "modules": written.modules,
        "ranks": _keys(written.ranks),
        "sha256_data": written.sha256_data,
    }


def _show_written(written: Written) -> None:
    show_line(f"wrote {written.output} ({gigabytes(written.nbytes)})")
    show_line(f"  {written.modules:,} modules, ranks {_counted(written.ranks)}")


def _residual_json(part: Residual) -> dict[str, object]:
    return {"residual": part.relative, "left_out_share": part.left_out_share}


def extraction_json(done: Extraction) -> dict[str, object]:
    """What was written, and what it misses of B - A, by block."""
    return {
        **_written_json(done.written),
        "family": done.family,
        **_residual_json(done.residual),
        "blocks": {label: _residual_json(part) for label, part in done.blocks.items()},
        "left_out": [
            {"tensor": one.tensor, "reason": one.reason, "share": one.share}
            for one in done.left_out
        ],
        "unchanged": done.unchanged,
        "notes": list(done.notes),
    }


def show_extraction(done: Extraction) -> None:
    """What was written, and a bar of the residual for each block."""
    _show_written(done.written)
    table = _table("block", "share of ‖B-A‖²", "residual", "", numbers=(1, 2))
    total = done.residual.total
    for label, part in done.blocks.items():
        if part.total:
            share = f"{part.total / total:.1%}"
            _row(table, label, share, f"{part.relative:.2%}", bar(part.relative))
    _row(table, "all", "100.0%", f"{done.residual.relative:.2%}", bar(done.residual.relative))
    _show_table(table)
    show_line("residual: ‖B - A - ΔW‖ / ‖B - A‖, of the factors as stored")
    if done.left_out:
        lost = done.residual.left_out_share
        show_line(
            f"left out: {len(done.left_out):,} tensors, {lost:.2%} of the squared change "
            "(--with-diff holds some)"
        )
        for one in done.left_out[:5]:
            show_line(f"  {one.share:.3%}  {one.tensor} ({one.reason})")
    if done.unchanged:
        show_line(f"unchanged, and skipped: {done.unchanged:,} modules")
    for note in done.notes:
        show_line(f"note: {note}")


def rewritten_json(done: Rewritten) -> dict[str, object]:
    """What was written, and how far it is from the exact sum."""
    return {
        **_written_json(done.written),
        "ranks_before": _keys(done.before),
        "residual": done.residual,
        "carried": [{"module": name, "kind": kind} for name, kind in done.carried],
        "notes": list(done.notes),
    }


def show_rewritten(done: Rewritten) -> None:
    """What was written, and how far it is from the exact sum."""
    _show_written(done.written)
    show_line(f"  ranks before: {_counted(done.before)}")
    show_line(f"  off the exact sum by {done.residual:.2e} of its norm")
    for name, kind in done.carried[:_MOST_LINES]:
        show_line(f"carried as it is: {name} ({kind})")
    if len(done.carried) > _MOST_LINES:
        show_line(f"… and {len(done.carried) - _MOST_LINES:,} more")
    for note in done.notes:
        show_line(f"note: {note}")
