"""`ckptools diff` on full-size SD1.5 fp16 files beside `cmp`, page cache warm.

    python benchmarks/examine.py [--runs 5]

Every figure is a whole process, start-up included. `cmp` reads two equal files, as it stops at the
first difference. Programs take turns; ratios are medians of the ratios within one turn. Needs
6.4 GB of disk in the temporary folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fullsize import write_model


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident MB of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed with {process.returncode}")
    return seconds, usage.ru_maxrss / 1000


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
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(runs):
            for name, command in commands.items():
                turns[name].append(timed(command))
    base = [seconds for seconds, _ in turns["cmp, equal files"]]
    print("| program | wall s (median) | times cmp | peak RSS MB |\n|---|--:|--:|--:|")
    for name, figures in turns.items():
        ratios = [seconds / other for (seconds, _), other in zip(figures, base, strict=True)]
        print(
            f"| {name} | {statistics.median(s for s, _ in figures):.2f} "
            f"| {statistics.median(ratios):.2f} | {max(rss for _, rss in figures):.0f} |"
        )


if __name__ == "__main__":
    main()
