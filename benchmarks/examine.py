"""`ckptools diff` on full-size SD1.5 fp16 files beside `cmp`, page cache warm.

    python benchmarks/examine.py [--runs 5]

Every figure is a whole program, start-up and all its processes included. `cmp` reads two equal
files, as it stops at the first difference. Programs take turns; ratios are medians of the ratios
within one turn. Needs 6.4 GB of disk in the temporary folder, and /proc.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fullsize import write_model

_LOOK_EVERY_S = 0.005


def timed(command: list[str]) -> float:
    """Seconds one process takes."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def peak_megabytes(command: list[str]) -> float:
    """Peak MB of a process and all it starts, looked at every few milliseconds.

    Pages that several of them share count once: the sum of their proportional set sizes. Looking
    takes time, so this run is not a timed one.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_megabytes, descendants(process.pid))))
        time.sleep(_LOOK_EVERY_S)
    if process.returncode:
        raise SystemExit(f"{command} failed with {process.returncode}")
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


def main() -> None:
    """Make the files, take turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        a, b, copy = (Path(folder) / f"{name}.safetensors" for name in ("a", "b", "copy"))
        write_model(a, "sd1", seed=1)
        write_model(b, "sd1", seed=2)
        shutil.copyfile(a, copy)
        diff = [sys.executable, "-m", "ckptools", "diff", "--json"]
        commands = {
            "cmp, equal files": ["cmp", str(a), str(copy)],
            "ckptools diff, equal files": [*diff, str(a), str(copy)],
            "ckptools diff, every value differs": [*diff, str(a), str(b)],
        }
        for path in (a, b, copy):  # warm the cache
            subprocess.run(["cat", path], check=True, stdout=subprocess.DEVNULL)
        turns: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(runs):
            for name, command in commands.items():
                turns[name].append(timed(command))
        peaks = {name: peak_megabytes(command) for name, command in commands.items()}
    base = turns["cmp, equal files"]
    print("| program | wall s (median) | times cmp | peak PSS MB |\n|---|--:|--:|--:|")
    for name, figures in turns.items():
        ratios = [seconds / other for seconds, other in zip(figures, base, strict=True)]
        print(
            f"| {name} | {statistics.median(figures):.2f} "
            f"| {statistics.median(ratios):.2f} | {peaks[name]:.0f} |"
        )


if __name__ == "__main__":
    main()
