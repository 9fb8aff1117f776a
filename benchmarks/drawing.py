"""Pictures of full-size models on a GPU: loading, steps a second, peak memory.

    python benchmarks/drawing.py                        SD1.5 and SDXL, random weights
    python benchmarks/drawing.py --model A.safetensors --size 512 --device cpu

Random weights take as long as trained ones. Needs 7 GB of disk in the temporary folder.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from bench import FAMILIES, machine
from fullsize import write_model

from ckptools.render import Request, draw, load_pipeline
from ckptools.render.loader import Pipeline, choose_device


def now(device: torch.device) -> float:
    """The time, once the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def loaded(path: Path, device: torch.device) -> tuple[float, Pipeline]:
    """Seconds of loading, and the pipeline."""
    now(device)  # a device's own start is not counted
    started = now(device)
    pipeline = load_pipeline(path, device=str(device))
    return now(device) - started, pipeline


def drawn(pipeline: Pipeline, request: Request) -> str:
    """A row: size, steps a second, seconds of the whole picture, peak memory of the device."""
    device = pipeline.device
    draw(pipeline, replace(request, steps=2))  # kernels are chosen, memory is taken
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    moments: list[float] = []
    started = now(device)
    draw(pipeline, request, on_step=lambda *_: moments.append(now(device)))
    whole = now(device) - started
    rate = (len(moments) - 1) / (moments[-1] - moments[0])
    peak = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    width, height = request.size or pipeline.size
    shown = "not known" if peak is None else f"{peak:,.0f}"
    return f"| {width} x {height} | {rate:.2f} | {whole:.2f} | {shown} |"


def table(path: Path, device: torch.device, sizes: Sequence[int], steps: int) -> str:
    """Loading, twice (the second finds the libraries awake), and a row for every size."""
    first, pipeline = loaded(path, device)
    del pipeline
    second, pipeline = loaded(path, device)
    dtype = str(pipeline.dtype).removeprefix("torch.")
    request = Request("a castle on a hill", seed=1, steps=steps, sampler="Euler")
    rows = [drawn(pipeline, replace(request, size=(side, side))) for side in sizes]
    head = f"| pixels | steps a second ({dtype}, guided) | picture s | peak MB |"
    loading = f"Loaded in {first:.2f} s, again in {second:.2f} s."
    return "\n".join([loading, "", head, "|---|--:|--:|--:|", *rows])


def main() -> None:
    """Draw and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--family", choices=list(FAMILIES), action="append")
    parser.add_argument("--model", type=Path, help="a file, in place of random weights")
    parser.add_argument("--size", type=int, action="append", help="default: 512 and 1024")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where to put the files (default: temporary)")
    options = parser.parse_args()
    device = choose_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    print(f"{name}; {machine('diffusers', 'transformers')}")
    sizes = options.size or (512, 1024)
    if options.model:
        print(table(options.model, device, sizes, options.steps))
        return
    for family in options.family or FAMILIES:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = Path(folder) / "A.safetensors"
            write_model(path, family, seed=1)
            print(f"\n### {FAMILIES[family]}\n\n{table(path, device, sizes, options.steps)}")


if __name__ == "__main__":
    main()
