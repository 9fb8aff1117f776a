"""What swapping variants in memory saves: hot swap against merging to disk and loading again.

python benchmarks/sweep.py                    the tiny family, pictures included
python benchmarks/sweep.py --full FOLDER      full-size SD1.5 UNets (random weights, made in
                                              FOLDER, 3 x 1.7 GB), no pictures
python benchmarks/sweep.py --device cuda      the same on a GPU
"""

from __future__ import annotations

import argparse
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from fullsize import write_model

import ckptools
from ckptools.engine import Settings
from ckptools.plan import make_plan
from ckptools.recipe import Recipe, load_recipe, with_numbers
from ckptools.render import load_pipeline
from ckptools.sweep import Draws, sweep
from ckptools.variants import Variants, merged_model
from ckptools.workflow import default_threads, merge, peak_memory_bytes

TINY = Path(ckptools.__file__).parent / "tiny"
NUMBERS = (0.0, 0.25, 0.5, 0.75, 1.0)
FULL_NUMBERS = (0.25, 0.5, 0.75)  # 5.2 GB kept, 3.4 GB of modules
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


class Modules:
    """A stand-in for a UNet's resident parameters: bytes go where they would, cast to fp32
    (processor) or as they are (GPU).
    """

    def __init__(self, places: Mapping[str, tuple[int, int]], device: str) -> None:
        kind = torch.float32 if device == "cpu" else torch.float16
        ordered = sorted(places.values())
        self._starts = [start for start, _ in ordered]
        self._held = [torch.zeros(n, dtype=kind, device=device) for _, n in ordered]

    def write(self, data: memoryview, offset: int) -> None:
        """Take a run of one tensor's fp16 bytes."""
        if data.nbytes:
            number = bisect_right(self._starts, offset) - 1
            first = (offset - self._starts[number]) // 2
            values = torch.frombuffer(data, dtype=torch.float16)
            self._held[number][first : first + len(values)].copy_(values)


def full(folder: Path, device: str) -> None:
    """SD1.5's UNet at full size: one read for three variants, swaps, and the way over the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate("ABC", 1):
        if not (folder / f"{name}.safetensors").exists():
            write_model(folder / f"{name}.safetensors", "sd1", seed=seed)
    recipe = recipe_over(folder, folder)
    first = make_plan(recipe, threads=default_threads())
    plans = [
        make_plan(with_numbers(recipe, {"M": m}), threads=first.threads, sources=first.sources)
        for m in FULL_NUMBERS
    ]
    models = [merged_model(f"M={m:g}", plan) for m, plan in zip(FULL_NUMBERS, plans, strict=True)]
    variants = Variants(models, first, Settings(first.threads))
    unet = {
        name: (task.start, task.spec.numel)
        for name, task in models[0].tasks.items()
        if name.startswith("model.diffusion_model.")
    }
    variants.changing = tuple(name for name in variants.changing if name in unet)
    sink = Modules(unet, device)
    everyone = range(len(models))
    print(f"SD1.5 UNet, fp16, {len(models)} variants, on {device}")
    size = variants.kept_bytes(everyone)
    seconds, _ = timed(lambda: variants.keep(everyone))
    print(f"  one read, all variants in memory   {seconds:6.2f} s  ({size / 1e9:.2f} GB kept)")
    for number in everyone:
        seconds, written = timed(lambda n=number: variants.swap(n, sink))
        print(f"  hot swap, {models[number].name:7}                  {seconds:6.2f} s  "
              f"({written / 1e9:.2f} GB)")  # fmt: skip
    seconds, _ = timed(lambda: variants.stream(1, sink))
    print(f"  merged straight into the modules   {seconds:6.2f} s  (nothing kept)")
    seconds, _ = timed(lambda: merge(with_numbers(recipe, {"M": 0.5})))
    print(f"  merge to disk, whole model         {seconds:6.2f} s")
    first.close()
    print(f"  peak memory {peak_memory_bytes() / 1e9:.2f} GB")


def main() -> None:
    """Run what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.full:
        full(options.full, options.device)
        return
    with tempfile.TemporaryDirectory() as folder:
        tiny(Path(folder), options.device)


if __name__ == "__main__":
    main()
