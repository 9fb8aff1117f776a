"""What swapping variants in memory saves: hot swap against merging to disk and loading again.

python benchmarks/sweep.py                    the tiny family, pictures included
python benchmarks/sweep.py --full             full-size SD1.5 (random weights, three files and
                                              their merge: 8.5 GB of disk), no pictures
python benchmarks/sweep.py --full --family sdxl     28 GB of disk
python benchmarks/sweep.py --device cuda      the same on a GPU
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from fullsize import write_model

import ckptools
from ckptools.engine import Settings
from ckptools.plan import make_plan
from ckptools.recipe import Recipe, load_recipe, with_numbers
from ckptools.render import ModuleSink, load_pipeline
from ckptools.sweep import Draws, sweep
from ckptools.variants import Variants, merged_model
from ckptools.workflow import default_threads, merge, peak_memory_bytes

TINY = Path(ckptools.__file__).parent / "tiny"
NUMBERS = (0.0, 0.25, 0.5, 0.75, 1.0)
FULL_NUMBERS = tuple(number / 8 for number in range(9))
T = TypeVar("T")


def timed(action: Callable[[], T]) -> tuple[float, T]:
    """Seconds that it took, and its result."""
    started = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def recipe_over(models: Path, folder: Path) -> Recipe:
    """Add difference over A, B and C of a folder."""
    path = folder / "recipe.yaml"
    lines = "".join(f"  {name}: {(models / name).as_posix()}.safetensors\n" for name in "ABC")
    path.write_text(
        f"ckptools: 1\nmodels:\n{lines}params: {{M: 1}}\nmerge: A + (B - C) * M\n"
        "output: {path: merged.safetensors, overwrite: true}\n"
    )
    return load_recipe(path)


def tiny(folder: Path, device: str) -> None:
    """A whole sweep, and the same pictures by merging to disk and loading."""
    recipe = recipe_over(TINY, folder)
    draws = Draws(prompts=("a red circle on a navy background",), seeds=(1,), steps=10,
                  device=device)  # fmt: skip
    sweep(recipe, {"M": (0.5,)}, folder / "warm", draws=draws)  # imports, caches
    seconds, found = timed(lambda: sweep(recipe, {"M": NUMBERS}, folder / "sweep", draws=draws))
    swaps = [variant.looks.swap_seconds for variant in found.variants]
    print(f"tiny family on {device}: {len(NUMBERS)} variants and 3 parents")
    print(f"  whole sweep, pictures and losses   {seconds:6.2f} s")
    print(f"  hot swap of a variant              {max(swaps) * 1000:6.1f} ms at most")
    saved, _ = timed(lambda: merge(with_numbers(recipe, {"M": 0.5})))
    loaded, _ = timed(lambda: load_pipeline(recipe.output_path, device=device))
    print(f"  merge to disk, verified            {saved * 1000:6.1f} ms")
    print(f"  load the file                      {loaded * 1000:6.1f} ms")


def full(folder: Path, family: str, device: str, budget: int) -> None:
    """A model of full size: variants in memory and swapped in, and the way over the disk."""
    for seed, name in enumerate("ABC", 1):
        if not (folder / f"{name}.safetensors").exists():
            write_model(folder / f"{name}.safetensors", family, seed=seed)
    recipe = recipe_over(folder, folder)
    first = make_plan(with_numbers(recipe, {"M": FULL_NUMBERS[0]}), threads=default_threads())
    plans = [
        first,
        *(
            make_plan(with_numbers(recipe, {"M": m}), threads=first.threads, sources=first.sources)
            for m in FULL_NUMBERS[1:]
        ),
    ]
    models = [merged_model(f"M={m:g}", plan) for m, plan in zip(FULL_NUMBERS, plans, strict=True)]
    variants = Variants(models, first, Settings(first.threads))
    print(f"{family}, fp16, {len(models)} variants of every tensor, on {device}")
    kept = resident(variants, device, budget)
    first.close()
    gc.collect()  # the pipeline is gone before the next one comes
    away = []
    for number in FULL_NUMBERS[:: len(FULL_NUMBERS) // 2]:
        merged, _ = timed(lambda m=number: merge(with_numbers(recipe, {"M": m})))
        loaded, _ = timed(lambda: load_pipeline(recipe.output_path, device=device))
        gc.collect()
        away.append(merged + loaded)
        print(f"  M={number:<5g} merged to disk in {merged:5.2f} s, loaded in {loaded:5.2f} s")
    disk = statistics.median(away) * len(models)
    print(f"  all over the disk, {len(models)} times the median: {disk:.1f} s, "
          f"{disk / kept:.1f} times in memory")  # fmt: skip
    print(f"  peak memory {peak_memory_bytes() / 1e9:.2f} GB")


def resident(variants: Variants, device: str, budget: int) -> float:
    """Every variant in one resident pipeline, nothing drawn; the seconds of all work."""
    total, swaps = 0.0, []
    pipeline = None
    for numbers in variants.groups(budget):
        seconds, _ = timed(lambda group=numbers: variants.keep(group))
        total += seconds
        size = variants.kept_bytes(numbers) / 1e9
        print(f"  one read, {len(numbers)} variants kept   {seconds:6.2f} s  ({size:.2f} GB)")
        for number in numbers:
            model = variants.models[number]
            if pipeline is None:
                source = variants.as_checkpoint(number, {})
                seconds, pipeline = timed(lambda s=source: load_pipeline(s, device=device))
                variants.holds(number)
                total += seconds
                print(f"  the first is loaded          {seconds:6.2f} s")
                continue
            sink = ModuleSink(pipeline, model.layout)
            seconds, written = timed(lambda n=number, s=sink: variants.swap(n, s))
            total += seconds
            swaps.append(seconds)
            print(f"  hot swap, {model.name:10}         {seconds:6.2f} s  ({written / 1e9:.2f} GB)")
    print(f"  hot swap, median             {statistics.median(swaps):6.2f} s")
    print(f"  all in memory                {total:6.2f} s")
    return total


def main() -> None:
    """Run what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--family", choices=["sd1", "sdxl"], default="sd1")
    parser.add_argument("--keep-gb", type=float, default=6.5, help="for variants in memory")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.full:
            full(Path(folder), options.family, options.device, int(options.keep_gb * 1e9))
        else:
            torch.set_num_threads(1)
            tiny(Path(folder), options.device)


if __name__ == "__main__":
    main()
