"""Every element of a full-size merge against float64 with one rounding.

    python benchmarks/exactness.py                             SD1.5, two formulas, three dtypes
    python benchmarks/exactness.py --dtype fp16 --case add-difference
    python benchmarks/exactness.py --family sdxl --case weighted-sum

Makes files with random weights and real names and shapes, merges them with `ckptools merge`, and
compares the output in a stream. The files lie in a temporary folder and are deleted at the end.
Needs disk: about 11 GB for SD1.5, 35 GB for SDXL (21 GB without fp32 and three-model formulas).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fullsize import read_layout, write_model
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from oracle import FORMATS, NOTHING_COMPARED, Exactness, compare, decoded, rounded, weighted

DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
HEAD = """\
| family | formula | output | values | not numpy's float64 | not the nearest | largest error, ulp \
| error beyond rounding / largest term | s |
|---|---|---|--:|--:|--:|--:|--:|--:|"""
CHUNK = 1 << 19  # elements; what a comparison needs of them stays in tens of MB


@dataclass(frozen=True)
class Case:
    """A formula, its coefficients, one for each model, and the same over arrays."""

    title: str
    formula: str
    factors: tuple[float, ...]
    arrays: Callable[..., NDArray[np.float64]]


CASES = {
    "weighted-sum": Case(
        "weighted sum",
        "A * (1 - 0.3) + B * 0.3",
        (1 - 0.3, 0.3),
        lambda a, b: a * (1 - 0.3) + b * 0.3,
    ),
    "add-difference": Case(
        "add difference", "A + (B - C) * 0.7", (1.0, 0.7, -0.7), lambda a, b, c: a + (b - c) * 0.7
    ),
}


class StoredFile:
    """A safetensors file, read a chunk at a time."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("rb")
        length = int.from_bytes(self._stream.read(8), "little")
        header = json.loads(self._stream.read(length))
        self.metadata = header.pop("__metadata__", {})
        self.entries: dict[str, dict[str, object]] = header
        self._data_start = 8 + length

    def values(self, name: str, begin: int, count: int) -> NDArray[np.float64]:
        """Elements [begin, begin + count) of a float tensor."""
        entry = self.entries[name]
        dtype = str(entry["dtype"])
        first: int = entry["data_offsets"][0]  # type: ignore[index]  # JSON
        width = FORMATS[dtype].nbytes
        self._stream.seek(self._data_start + first + begin * width)
        return decoded(self._stream.read(count * width), dtype)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def chunks(entries: Mapping[str, Mapping[str, object]]) -> Iterator[tuple[str, int, int]]:
    """(tensor, first element, number of elements) over all float tensors."""
    for name, entry in entries.items():
        if entry["dtype"] not in FORMATS:
            continue
        total = int(np.prod(entry["shape"], dtype=np.int64))  # type: ignore[call-overload]  # JSON
        for begin in range(0, total, CHUNK):
            yield name, begin, min(CHUNK, total - begin)


def examine(output: Path, inputs: Sequence[Path], case: Case) -> tuple[Exactness, int]:
    """Compare every float element of an output with the float64 sum of the inputs.

    Either neighbour of a tie will do there, as the decimals of a formula are no doubles. Then how
    many elements are not what the formula over float64 arrays gives, rounded once.
    """
    others = 0
    result, *models = (StoredFile(path) for path in (output, *inputs))
    total = NOTHING_COMPARED
    for name, begin, count in chunks(result.entries):
        terms = [
            (factor, model.values(name, begin, count))
            for factor, model in zip(case.factors, models, strict=True)
        ]
        exact, largest = weighted(terms, np.float64)
        found = result.values(name, begin, count)
        dtype = str(result.entries[name]["dtype"])
        total = total.joined(compare(found, exact, largest, dtype))
        wanted = rounded(case.arrays(*(values for _, values in terms)), dtype)
        others += int(np.count_nonzero(found != wanted))
    for file in (result, *models):
        file.close()
    return total, others


def merge(folder: Path, case: Case, dtype: str) -> Path:
    """Merge with the command line; the output's path."""
    names = "ABC"[: len(case.factors)]
    models = ", ".join(f"{name}: {name}.safetensors" for name in names)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{{models}}}\nmerge: {case.formula}\n"
        f"output: {{path: out.safetensors, dtype: {dtype}, overwrite: true}}\n",
        encoding="utf-8",
    )
    subprocess.run([sys.executable, "-m", "ckptools", "merge", "-q", str(recipe)], check=True)
    return folder / "out.safetensors"


def needed_bytes(family: str, cases: Sequence[Case], dtypes: Sequence[str]) -> int:
    """Disk for the inputs, all F16, and the largest output."""
    elements = sum(int(np.prod(shape, dtype=np.int64)) for _, shape in read_layout(family))
    inputs = max(len(case.factors) for case in cases)
    return elements * (2 * inputs + max(FORMATS[DTYPES[dtype]].nbytes for dtype in dtypes))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=["sd1", "sdxl"], default="sd1")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the files")
    return parser.parse_args()


def main() -> None:
    """Make the models, then merge, compare and delete case by case."""
    options = arguments()
    cases = [CASES[name] for name in options.case or CASES]
    dtypes = options.dtype or list(DTYPES)
    needed = needed_bytes(options.family, cases, dtypes)
    with tempfile.TemporaryDirectory(prefix="exactness-", dir=options.folder) as text:
        folder = Path(text)
        free = shutil.disk_usage(folder).free
        if free < needed * 1.1:
            sys.exit(f"{folder} has {free / 1e9:.1f} GB free, {needed * 1.1 / 1e9:.1f} are needed")
        inputs = [folder / f"{name}.safetensors" for name in "ABC"]
        inputs = inputs[: max(len(case.factors) for case in cases)]
        for seed, path in enumerate(inputs):
            write_model(path, options.family, seed=seed)
        print(HEAD, flush=True)
        for case in cases:
            for dtype in dtypes:
                started = time.perf_counter()
                output = merge(folder, case, dtype)
                found, others = examine(output, inputs[: len(case.factors)], case)
                output.unlink()
                seconds = time.perf_counter() - started
                print(
                    f"| {options.family} | {case.title} | {dtype} | {found.count:,} "
                    f"| {others:,} | {found.wrong:,} | {found.units:.4f} "
                    f"| {found.relative:.1e} | {seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
