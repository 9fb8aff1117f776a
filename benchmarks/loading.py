"""Full-size checkpoints into modules on the processor: ckptools beside diffusers, offline.

    python benchmarks/loading.py                        SD1.5 and SDXL, 5 turns each
    python benchmarks/loading.py --family sd1 --turns 3
    python benchmarks/loading.py --write docs/benchmarks.md

diffusers' `from_single_file` gets the configuration from a weightless folder that is written here.
Programs take turns, page cache warm; ratios are medians of the ratios within one turn. Memory is
looked at every 5 ms in a run of its own. Needs Linux, and 7 GB of disk in the temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from documents import write_between
from fullsize import write_model

BEGIN, END = "<!-- loading:begin -->", "<!-- loading:end -->"
FAMILIES = {"sd1": "SD1.5", "sdxl": "SDXL"}
OURS, THEIRS, FRAME = "ckptools", "from_single_file", "ckptools, before any weight is read"
KINDS = {
    "fp32": "in fp32, what both give on a processor unless told otherwise",
    "fp16": "in fp16, as stored",
    "passed": "in fp16, every weight handed on once and not kept: the host's part with a GPU",
}
PADS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
_LOOK_EVERY_S = 0.005
_CHUNK = 1 << 20
Load = Callable[[], Mapping[str, Any]]


# --- one program, in a process of its own -------------------------------------------------------


def ours(path: Path, kind: str) -> Load:
    """Imports what ckptools needs; what comes back loads."""
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTextModelWithProjection  # noqa: F401

    from ckptools.render import load_pipeline

    # what is put on the meta device has been read and is gone
    device, dtype = ("meta", "fp16") if kind == "passed" else ("cpu", kind)
    return lambda: load_pipeline(path, device=device, dtype=dtype).modules


def theirs(path: Path, kind: str) -> Load:
    """Imports what diffusers needs; what comes back loads."""
    import diffusers
    import torch

    config = path.parent / "config"
    name = json.loads((config / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, name)
    keys: dict[str, Any] = {} if kind == "fp32" else {"torch_dtype": torch.float16}

    def load() -> Mapping[str, Any]:
        made = pipeline.from_single_file(
            str(path), config=str(config), local_files_only=True, **keys
        )
        modules = {name: module for name, module in made.components.items()
                   if isinstance(module, torch.nn.Module)}  # fmt: skip
        if kind == "passed":
            pass_on(modules)
        return modules

    return load


def pass_on(modules: Mapping[str, Any]) -> None:
    """Copy every weight out once, 2 MB at a time: what is mapped is read only now."""
    import torch

    buffer = torch.empty(_CHUNK, dtype=torch.float16)
    for module in modules.values():
        for tensor in module.state_dict().values():
            for part in tensor.view(-1).split(_CHUNK):
                buffer[: len(part)].copy_(part)


def frame(path: Path, _: str) -> Load:
    """The modules and every tensor's place in them, without a weight."""
    ours(path, "fp16")
    from ckptools.family import detect
    from ckptools.keymap import key_map
    from ckptools.render.configs import draft
    from ckptools.render.loader import Names, build_modules, fit
    from ckptools.sources import open_checkpoint

    def load() -> Mapping[str, Any]:
        with open_checkpoint(path) as checkpoint:
            blueprint = draft(checkpoint, detect(checkpoint, checkpoint.metadata))
            modules = build_modules(blueprint)
            fit(checkpoint, modules, Names(key_map(blueprint.family)))
        return modules

    return load


PROGRAMS = {OURS: ours, THEIRS: theirs, FRAME: frame}


def one(program: str, path: Path, kind: str) -> None:
    """Load; print the seconds that it took, imports left out."""
    load = PROGRAMS[program](path, kind)
    started = time.perf_counter()
    modules = load()
    print(time.perf_counter() - started)
    os._exit(0 if modules else 1)  # taking gigabytes apart is no part of loading


# --- all programs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """Seconds of a whole process, and of the loading alone."""

    whole: float
    load: float


def started(program: str, path: Path, kind: str) -> subprocess.Popen[bytes]:
    """A program in a process of its own, without a network."""
    command = [sys.executable, __file__, "--one", program, str(path), kind]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=quiet)


def timed(program: str, path: Path, kind: str) -> Turn:
    """One turn of a program."""
    begin = time.perf_counter()
    process = started(program, path, kind)
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{program} {kind} failed with {process.returncode}")
    return Turn(time.perf_counter() - begin, float(out.split()[-1]))


def peaks(program: str, path: Path, kind: str) -> tuple[float, float]:
    """Peak MB of memory of its own, and with the pages of files that are mapped."""
    process = started(program, path, kind)
    own = total = 0.0
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
        if "RssAnon" in found:
            anonymous, mapped = (int(found[name]) * 1024 / 1e6 for name in ("RssAnon", "RssFile"))
            own, total = max(own, anonymous), max(total, anonymous + mapped)
        time.sleep(_LOOK_EVERY_S)
    return own, total


def write_config(path: Path) -> None:
    """The folder "config" beside a checkpoint: what diffusers wants beside the weights."""
    from diffusers import DDIMScheduler

    from ckptools.render.prompts import clip_words

    modules = frame(path, "")()
    folder = path.parent / "config"
    is_sdxl = "text_encoder_2" in modules
    index = {"_class_name": f"StableDiffusion{'XL' * is_sdxl}Pipeline",
             "scheduler": ["diffusers", "DDIMScheduler"]}  # fmt: skip
    DDIMScheduler().save_config(folder / "scheduler")
    for name, module in modules.items():
        is_text = name.startswith("text_encoder")
        index[name] = ["transformers" if is_text else "diffusers", type(module).__name__]
        if is_text:
            module.config.save_pretrained(folder / name)
        else:
            module.save_config(folder / name)
    vocabulary, merges = clip_words()
    start, end = list(vocabulary)[-2:]
    for name, pad in list(PADS.items())[: 1 + is_sdxl]:
        index[name] = ["transformers", "CLIPTokenizer"]
        words = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
        (folder / name).mkdir()
        (folder / name / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = "\n".join(["#version: 0.2", *merges, ""])
        (folder / name / "merges.txt").write_text(lines, encoding="utf-8")
        (folder / name / "special_tokens_map.json").write_text(json.dumps(words))
        settings = json.dumps(words | {"model_max_length": 77})
        (folder / name / "tokenizer_config.json").write_text(settings)
    (folder / "model_index.json").write_text(json.dumps(index))


def row(name: str, turns: list[Turn], base: list[Turn], peak: tuple[float, float]) -> str:
    """A line of the table."""
    whole, load = (statistics.median(getattr(t, key) for t in turns) for key in ("whole", "load"))
    ratios = (
        statistics.median(
            getattr(t, key) / getattr(b, key) for t, b in zip(turns, base, strict=True)
        )
        for key in ("whole", "load")
    )
    shown = " | ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"| {name} | {whole:.1f} | {load:.2f} | {shown} | {peak[0]:,.0f} | {peak[1]:,.0f} |"


def compared(path: Path, kind: str, turns: int) -> str:
    """Both programs in turn, after one uncounted turn, as a table."""
    taken: dict[str, list[Turn]] = {OURS: [], THEIRS: []}
    for number in range(-1, turns):
        for program, its in taken.items():
            turn = timed(program, path, kind)
            print(f"  {kind} {program}: {turn.load:.2f} s of {turn.whole:.2f} s", flush=True)
            if number >= 0:
                its.append(turn)
    lines = [
        "| program | whole s | load s | whole, times from_single_file | load, times "
        "| peak MB of its own | with mapped files |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(row(p, its, taken[THEIRS], peaks(p, path, kind)) for p, its in taken.items()),
    ]
    return "\n".join(lines)


def fits_in_memory(path: Path, kind: str) -> bool:
    """Whether the modules fit beside the file's pages in the cache and 2 GB of other things."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    copies = {"fp32": 3, "fp16": 2, "passed": 1}[kind]
    return path.stat().st_size * copies + 2e9 < free


def main() -> None:
    """Make the files, take turns, print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--family", choices=list(FAMILIES), action="append")
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to put the files (default: temporary)")
    parser.add_argument("--write", type=Path, help=f"a document with {BEGIN} and {END}")
    options = parser.parse_args()
    if options.one:
        one(options.one[0], Path(options.one[1]), options.one[2])
    from bench import machine

    parts = [f"{machine('diffusers', 'transformers')}. Medians of {options.turns} turns."]
    for family in options.family or FAMILIES:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = Path(folder) / "A.safetensors"
            write_model(path, family, seed=1)
            write_config(path)
            subprocess.run(["cat", path], check=True, stdout=subprocess.DEVNULL)
            bare = peaks(FRAME, path, "")[0]
            parts.append(
                f"### {FAMILIES[family]}\n\nBefore the first weight is read, modules built and a "
                f"place found for every tensor, ckptools takes {bare:,.0f} MB, libraries included."
            )
            for kind in options.kind or KINDS:
                if not fits_in_memory(path, kind):
                    print(f"  {family} {kind}: left out, the memory is too small")
                    continue
                table = compared(path, kind, options.turns)
                parts.append(f"An fp16 file {KINDS[kind]}:\n\n{table}")
    text = "\n\n".join(parts)
    print(text)
    if options.write:
        write_between(options.write, BEGIN, END, text)


if __name__ == "__main__":
    main()
