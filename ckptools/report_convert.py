"""How `ckptools convert` shows what it did. Uses `report` for the terminal."""

from __future__ import annotations

from ckptools.convert import Conversion, Result
from ckptools.errors import counted
from ckptools.report import gigabytes, show_line, show_message, shown_path

_MOST_LISTED = 4


def conversion_json(conversion: Conversion) -> dict[str, object]:
    """What will be written, as the plan has it."""
    return {
        "source": str(conversion.request.source),
        "output": str(conversion.request.output),
        "to": conversion.target,
        "family": conversion.family,
        "variant": conversion.detection.variant,
        "layout": conversion.checkpoint.layout or conversion.detection.layout,
        "tensors": conversion.counts,
        "output_bytes": conversion.file_bytes,
        "files": [
            {
                "path": file.path.as_posix(),
                "component": file.component or None,
                "tensors": len(file.programs),
                "bytes": conversion.files[file.path.as_posix()],
            }
            for file in conversion.written
        ],
        "settings": sorted(conversion.settings),
        "dropped": {why: list(names) for why, names in conversion.dropped.items()},
        "warnings": list(conversion.warnings),
        "notes": list(conversion.notes),
    }


def result_json(result: Result) -> dict[str, object]:
    """What was written."""
    return {
        **conversion_json(result.conversion),
        "written": dict(result.files),
        "notes": [*result.conversion.notes, *result.notes],
        "sha256_data": dict(result.sha256_data),
        "verified": {"recomputed": result.recomputed},
        "seconds": round(result.seconds, 3),
        "peak_bytes": result.peak_bytes,
    }


def show_conversion(conversion: Conversion, *, is_done: bool) -> None:
    """What is written, or would be: files, tensors, and what was left out."""
    counts = conversion.counts
    title = " ".join(filter(None, (conversion.family or "unknown", conversion.detection.variant)))
    verb = "wrote" if is_done else "would write"
    show_line(
        f"{verb} {shown_path(conversion.request.output)} ({title}, "
        f"{gigabytes(conversion.file_bytes)}): {counts['copied']:,} tensors copied, "
        f"{counts['cast']:,} cast, {counts['dropped']:,} left out"
    )
    for file in conversion.written:
        nbytes = conversion.files[file.path.as_posix()]
        show_line(f"  {file.path.as_posix()}  {len(file.programs):,} tensors, {gigabytes(nbytes)}")
    for path in sorted(conversion.settings):
        show_line(f"  {path}")
    for why, names in conversion.dropped.items():
        more = ", …" if len(names) > _MOST_LISTED else ""
        listed = ", ".join(names[:_MOST_LISTED])
        show_line(f"  left out, {why}: {counted(len(names), 'tensor')} ({listed}{more})")
    for note in conversion.notes:
        show_line(f"  note: {note}")


def show_warnings(conversion: Conversion) -> None:
    """What a user should look at, on stderr."""
    for warning in conversion.warnings:
        show_message(f"warning: {warning}")


def show_result(result: Result) -> None:
    """What was written, and what it took."""
    show_conversion(result.conversion, is_done=True)
    for note in result.notes:
        show_line(f"  note: {note}")
    peak = f", peak memory {gigabytes(result.peak_bytes)}" if result.peak_bytes else ""
    show_line(f"  {result.seconds:.1f} s{peak}")
