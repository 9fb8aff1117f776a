"""How locks and reproductions are shown."""

from __future__ import annotations

from pathlib import Path

from ckptools.hub.lock import Lock, lock_document
from ckptools.report import _row, _show_table, _table, gigabytes, show_line, shown_path
from ckptools.reproduce import Output, Reproduction


def lock_json(lock: Lock, recipe: Path) -> dict[str, object]:
    """What the lock file holds."""
    document = lock_document(lock, recipe)
    return {"lock": lock.where, "recipe": document["recipe"], "models": document["models"]}


def show_lock(lock: Lock, path: Path) -> None:
    """A line for each file."""
    table = _table("model", "from", "file", "sha256", "size", numbers=(4,))
    for label, model in lock.models.items():
        name = label
        place = f"{model.path} at {model.commit[:12]}" if model.commit else model.path
        for file in model.files:
            digest = f"{file.sha256[:12]}…" if file.sha256 else "·"
            _row(table, name, place, file.name, digest, gigabytes(file.nbytes))
            name = place = ""
    _show_table(table)
    show_line(f"wrote {shown_path(path)}")


def reproduction_json(found: Reproduction) -> dict[str, object]:
    """The comparison as data."""
    return {
        "manifest": found.manifest,
        "same": found.same,
        "same_data": found.same_data,
        "same_file": found.same_file,
        "outputs": [
            {
                "file": one.file,
                "sha256_data": {"manifest": one.sha256_data, "found": one.found_data},
                "header_sha256": {"manifest": one.header_sha256, "found": one.found_header},
                "beside": one.beside or None,
            }
            for one in found.outputs
        ],
        "first_difference": found.first or None,
        "folder": str(found.folder) if found.folder else None,
        "notes": list(found.notes),
    }


def _verdict(one: Output) -> str:
    if one.beside == "other":
        return "merged again as the manifest says; the file beside the manifest is another now"
    if one.same_file:
        return "the same file" if one.beside else "the same file as the manifest tells of"
    return "the same tensors" if one.same_data else "not the same"


def show_reproduction(found: Reproduction) -> None:
    """One line for each file, then what differs."""
    for one in found.outputs:
        show_line(f"{one.file}: {_verdict(one)}")
        if not one.same_data:
            show_line(f"  sha256 of the data: {one.sha256_data} in the manifest")
            show_line(f"                      {one.found_data or 'no such file'} now")
    if found.first:
        show_line(f"  first difference: {found.first}")
    elif not found.same_data:
        show_line("  the original is not at hand, so no tensor can be named")
    for note in found.notes:
        show_line(f"note: {note}")
    if found.folder:
        show_line(f"kept in {shown_path(found.folder)}")
