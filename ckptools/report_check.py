"""How `ckptools check` shows what it found. Uses `report`."""

from __future__ import annotations

import math

from ckptools.check import Check
from ckptools.checking import Checked
from ckptools.report import _row, _show_table, _table, show_line, shown_path


def check_json(found: Checked) -> dict[str, object]:
    """The contract keys, and what the parents' shares in every component are."""
    return {
        "source": shown_path(found.source),
        "verdict": found.report.verdict,
        "checks": [_one_json(check) for check in found.report.checks],
        "images": [],
        "parents": list(found.parents),
        "shares": {
            component: {name: round(share, 4) for name, share in kin.shares.items()}
            for component, kin in found.kin.items()
        },
        "notes": list(found.report.notes),
    }


def _one_json(check: Check) -> dict[str, object]:
    return {
        "id": check.id,
        "value": _finite_or_none(check.value),
        "bound": _finite_or_none(check.bound),
        "verdict": check.verdict,
        "reason": check.reason,
        "tensors": list(check.tensors),
    }


def show_check(found: Checked, *, quiet: bool = False) -> None:
    """A line per check, the worst verdict last.

    quiet  only what does not pass
    """
    shown = [c for c in found.report.checks if not (quiet and c.verdict == "pass")]
    if shown:
        table = _table("check", "verdict", "figure", "bound", "why", numbers=(2, 3))
        for check in shown:
            _row(table, check.id, check.verdict, _figure(check.value), _figure(check.bound),
                 check.reason)  # fmt: skip
        _show_table(table)
    if quiet and found.report.verdict == "pass":
        return
    for note in found.report.notes:
        show_line(f"note: {note}")
    show_line(f"{shown_path(found.source)}: {found.report.verdict}")


def _figure(value: float | None) -> str:
    finite = _finite_or_none(value)
    return "·" if finite is None else f"{finite:.4g}"


def _finite_or_none(value: float | None) -> float | None:
    """A figure as JSON can hold it."""
    return value if value is not None and math.isfinite(value) else None
