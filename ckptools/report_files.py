"""How `ckptools hash`, `verify` and `kinship` show what they found. Uses `report`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptools.hashing import FileHashes, Hashes
from ckptools.kinship import VERDICTS, Kinship, Relation, Suits
from ckptools.report import _row, _show_table, _table, gigabytes, show_line, shown_path
from ckptools.soundness import Problem, Soundness

_MOST_PROBLEMS = 20
_WORDS = {"same": "right", "differs": "differs", "bogus": "bogus", "unchecked": "not checked"}


# --- hash --------------------------------------------------------------------------------------


def hashes_json(found: Sequence[Hashes]) -> dict[str, object]:
    """The contract keys of `hash` where there is one source, and a list of all sources."""
    sources = [_hashes_json(one) for one in found]
    return {**(sources[0] if len(sources) == 1 else {}), "sources": sources}


def _hashes_json(found: Hashes) -> dict[str, object]:
    alone = found.files[0] if len(found.files) == 1 else None
    return {
        "path": shown_path(found.path),
        "bytes": sum(file.nbytes for file in found.files),
        "sha256": alone and alone.sha256,
        "autov1": alone and alone.autov1,
        "autov2": alone and alone.autov2,
        "autov3": found.sha256_data and found.sha256_data[:12],
        "crc32": alone and alone.crc32,
        "blake3": alone and alone.blake3,
        "modelspec": found.modelspec,
        "components": dict(found.components),
        "content": found.content,
        "files": [_file_json(file) for file in found.files],
        "embedded": [
            {"key": one.key, "stored": one.stored, "computed": one.computed or None,
             "verdict": one.verdict, "reason": one.reason}
            for one in found.embedded
        ],
        "notes": list(found.notes),
        "cached": found.cached,
    }  # fmt: skip


def _file_json(file: FileHashes) -> dict[str, object]:
    return {
        "file": file.path.name,
        "bytes": file.nbytes,
        "sha256": file.sha256,
        "autov1": file.autov1,
        "autov2": file.autov2,
        "autov3": file.autov3,
        "crc32": file.crc32,
        "blake3": file.blake3,
    }


def show_hashes(found: Hashes) -> None:
    """Every hash on a line of its own, by the name that people know."""
    nbytes = sum(file.nbytes for file in found.files)
    show_line(f"{shown_path(found.path)}: {gigabytes(nbytes)}")
    for note in found.notes:
        show_line(f"  note: {note}")
    for file in found.files:
        if len(found.files) > 1:
            show_line(f"  {file.path.name}: {gigabytes(file.nbytes)}")
        _show_rows(_rows(file))
    rows = [("ModelSpec", found.modelspec or "")]
    rows += [(component, sha256) for component, sha256 in found.components.items()]
    rows.append(("content", found.content or ""))
    _show_rows(rows)
    for one in found.embedded:
        because = f": {one.reason}" if one.reason else ""
        show_line(f"  {one.key} in its metadata: {_WORDS[one.verdict]}{because}")


def _rows(file: FileHashes) -> list[tuple[str, str]]:
    short = " (of nothing: the file ends before 1 MiB)" if file.nbytes <= 0x100000 else ""
    return [
        ("sha256", file.sha256),
        ("AutoV1", file.autov1 + short),
        ("AutoV2", file.autov2),
        ("AutoV3", file.autov3 or ""),
        ("CRC32", file.crc32),
        ("BLAKE3", file.blake3 or ""),
    ]


def _show_rows(rows: Sequence[tuple[str, str]]) -> None:
    for name, text in rows:
        if text:
            show_line(f"  {name:<16} {text}")


# --- verify ------------------------------------------------------------------------------------


def soundness_json(found: Sequence[Soundness]) -> dict[str, object]:
    """The contract keys of `verify` over all sources, and a list of the sources."""
    return {
        "valid": all(one.valid for one in found),
        "problems": [_problem_json(p, one) for one in found for p in one.problems],
        "warnings": [_problem_json(p, one) for one in found for p in one.warnings],
        "sources": [
            {
                "path": shown_path(one.path),
                "valid": one.valid,
                "checked": list(one.checked),
                "kind": one.detection and one.detection.kind,
                "family": one.detection and one.detection.family,
                "variant": one.detection and one.detection.variant,
            }
            for one in found
        ],
    }


def _problem_json(problem: Problem, found: Soundness) -> dict[str, object]:
    return {
        "code": problem.code,
        "message": problem.message,
        "tensor": problem.tensor or None,
        "path": shown_path(found.path),
    }


def show_soundness(found: Soundness) -> None:
    """One line for what is sound; what is wrong below."""
    what = ""
    if found.detection is not None:
        words = (found.detection.family or found.detection.kind, found.detection.variant)
        what = f" ({', '.join(dict.fromkeys(filter(None, words)))})"
    verdict = "sound" if found.valid else "unsafe" if found.unsafe else "invalid"
    checked = f"; checked: {', '.join(found.checked)}" if found.checked else ""
    show_line(f"{shown_path(found.path)}: {verdict}{what}{checked}")
    _show_problems("", found.problems)
    _show_problems("warning: ", found.warnings)


def _show_problems(before: str, problems: Sequence[Problem]) -> None:
    for problem in problems[:_MOST_PROBLEMS]:
        where = f"{problem.tensor}: " if problem.tensor else ""
        show_line(f"  {before}{problem.code}: {where}{problem.message}")
    rest = len(problems) - _MOST_PROBLEMS
    if rest > 0:
        show_line(f"  {before}and {rest:,} more (--json lists all)")


# --- kinship -----------------------------------------------------------------------------------


def kinship_json(found: Kinship) -> dict[str, object]:
    """The contract keys of `kinship`, of the pair that decides, and all pairs."""
    order = list(VERDICTS)
    worst = max(found.relations, key=lambda one: order.index(one.verdict), default=None)
    return {
        "verdict": found.verdict,
        "meaning": VERDICTS[found.verdict],
        "groups": _groups_json(worst) if worst else {},
        "pairs": [
            {
                "a": shown_path(one.a),
                "b": shown_path(one.b),
                "verdict": one.verdict,
                "reason": one.reason,
                "groups": _groups_json(one),
                "notes": list(one.notes),
            }
            for one in found.relations
        ],
        "adapters": [
            {
                "adapter": shown_path(one.adapter),
                "model": shown_path(one.model),
                "verdict": one.verdict,
                "reason": one.reason,
                "families": list(one.families),
                "trained_on": dict(one.trained_on),
            }
            for one in found.adapters
        ],
    }


def _groups_json(relation: Relation) -> dict[str, object]:
    groups: dict[str, object] = {}
    for name, group in relation.groups.items():
        row: dict[str, object] = {
            "distance": _finite(group.distance),
            "cosine": _finite(group.cosine),
            "tensors": group.tensors,
            "verdict": group.verdict,
        }
        if name in relation.tasks:
            tasks = relation.tasks[name]
            row["from_base"] = {
                "cosine": _finite(tasks.cosine), "a": tasks.size_a, "b": tasks.size_b,
            }  # fmt: skip
        groups[name] = row
    return groups


def _finite(number: float) -> float | None:
    """JSON has no NaN and no Infinity."""
    return number if math.isfinite(number) else None


def show_kinship(found: Kinship) -> None:
    """The verdict of every pair, its components in a table; then the adapter's."""
    for relation in found.relations:
        _show_relation(relation)
    for suits in found.adapters:
        _show_suits(suits)


def _show_relation(relation: Relation) -> None:
    show_line(f"{relation.a.name} and {relation.b.name}: {VERDICTS[relation.verdict]}")
    show_line(f"  {relation.reason}")
    if relation.groups:
        columns = ["component", "distance", "cosine", "matrices"]
        if relation.tasks:
            columns += ["A from base", "B from base", "cosine of both"]
        table = _table(*columns, "kin", numbers=range(1, len(columns)))
        for name, group in relation.groups.items():
            cells = [name, _number(group.distance), _number(group.cosine), f"{group.tensors:,}"]
            if relation.tasks:
                tasks = relation.tasks.get(name)
                numbers = (tasks.size_a, tasks.size_b, tasks.cosine) if tasks else (math.nan,) * 3
                cells += [_number(number) for number in numbers]
            _row(table, *cells, group.verdict)
        _show_table(table)
    for note in relation.notes:
        show_line(f"  note: {note}")


def _number(number: float) -> str:
    return f"{number:.3f}" if math.isfinite(number) else "·"


def _show_suits(suits: Suits) -> None:
    show_line(f"{suits.adapter.name} on {suits.model.name}: {suits.verdict}")
    show_line(f"  {suits.reason}")
    for key, text in suits.trained_on.items():
        show_line(f"  {key}: {text[:200]}")
