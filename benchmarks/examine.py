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
from pathlib import Path

from fullsize import write_model
from memory_use import peak_megabytes


def timed(command: list[str]) -> float:
    """Seconds one process takes."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


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
