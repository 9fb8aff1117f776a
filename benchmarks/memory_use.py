"""How much memory a program takes, with all the processes it starts. Needs /proc."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

_LOOK_EVERY_S = 0.005


def peak_megabytes(command: Sequence[str], folder: Path | None = None) -> float:
    """Peak MB of a process and all it starts, looked at every few milliseconds.

    folder  where it runs; its messages go nowhere. Raises `RuntimeError` where it fails.

    Pages that several of them share count once: the sum of their proportional set sizes. Looking
    takes time, so this run is not a timed one.
    """
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=folder, stdout=quiet, stderr=quiet)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_megabytes, descendants(process.pid))))
        time.sleep(_LOOK_EVERY_S)
    if process.returncode:
        raise RuntimeError(f"{command} failed with {process.returncode}")
    return peak


def descendants(number: int) -> Iterator[int]:
    """A process, and all it started that still run."""
    yield number
    with suppress(OSError):  # it has ended
        for child in Path(f"/proc/{number}/task/{number}/children").read_text().split():
            yield from descendants(int(child))


def proportional_megabytes(number: int) -> float:
    """A process's memory, each page divided by how many processes share it; 0 once it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{number}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0
