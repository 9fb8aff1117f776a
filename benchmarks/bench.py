"""Merges of full-size files, timed side by side with the peers that are installed.

    python benchmarks/bench.py                          SD1.5 and SDXL, 3 runs each
    python benchmarks/bench.py --family sd1 --runs 5
    python benchmarks/bench.py --peer-python ~/peers/bin/python --write docs/benchmarks.md
    python benchmarks/bench.py --outputs /dev/shm       results written into memory, not to a disk

Every figure is a whole process, start-up included. Programs take turns, each turn in a random
order, so that a machine that slows down slows all of them and none always follows the same other;
ratios are medians of the ratios within one turn.
Needs disk: about 11 GB for SD1.5, 28 GB for SDXL.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from documents import write_between
from fullsize import write_lora, write_model
from memory_use import peak_megabytes

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

RECIPE = """\
ckptools: 1
models: {models}
params: {{M: {number}}}
merge: {formula}
output: {{path: {out}, overwrite: true}}
"""

# What the web UIs do: every model whole in memory, arithmetic in the stored dtype, save_file. Or in
# fp32, kohya's default, which gives the nearest fp16 nearly always; the stored dtype does not.
LOAD_ALL = """
import sys, torch
from safetensors.torch import load_file, save_file
precision, case, out, *paths = sys.argv[1:]
models = [load_file(path) for path in paths]
result = dict(models[0])
for name, stored in result.items():
    if not stored.is_floating_point():
        continue
    if case == "unet_only" and not name.startswith("model.diffusion_model."):
        continue
    dtype = torch.float32 if precision == "fp32" else stored.dtype
    a, b, *more = (model[name].to(dtype) for model in models)
    if case == "weighted_sum":
        merged = (1 - 0.3) * a + 0.3 * b
    elif case == "add_difference":
        merged = a + (b - more[0]) * 0.7
    else:
        merged = (1 - 0.5) * a + 0.5 * b
    result[name] = merged.to(stored.dtype)
save_file(result, out)
"""

SD_MECHA = """
import sys, sd_mecha
case, out, *paths = sys.argv[1:]
models = [sd_mecha.model(path) for path in paths]
if case == "weighted_sum":
    recipe = sd_mecha.weighted_sum(*models, alpha=0.3)
elif case == "add_difference":
    recipe = sd_mecha.add_difference(*models, alpha=0.7)
else:
    unet = sd_mecha.weighted_sum(*models, alpha=0.5)
    recipe = sd_mecha.pick_component(unet, "diffuser") | models[0]
sd_mecha.merge(recipe, output=out)
"""

# The only way of sd-mecha 1.1.8 to bake that runs: its own method, below the documented call.
SD_MECHA_BAKE = """
import sys, sd_mecha
from sd_mecha.extensions.builtin.merge_methods import linear
_, out, model, lora = sys.argv[1:]
base = sd_mecha.model(model)
change = sd_mecha.convert(sd_mecha.model(lora), base)
sd_mecha.merge(linear.add_difference(base, change), output=out)
"""

# Places are worked out beforehand and cost nothing here: "places.json", module -> tensor and rows.
LOAD_ALL_BAKE = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
_, _, out, model, lora = sys.argv[1:]
weights, parts = load_file(model), load_file(lora)
for module, (name, begin, end) in json.loads(Path("places.json").read_text()).items():
    up = parts[module + ".lora_up.weight"].float()
    down = parts[module + ".lora_down.weight"].float()
    scale = float(parts[module + ".alpha"]) / down.shape[0]
    rows = weights[name][begin:end]
    delta = scale * (up.flatten(1) @ down.flatten(1))
    rows.copy_(rows.float() + delta.reshape(rows.shape))
save_file(weights, out)
"""

COPY = 'cat "$@" > /dev/null; cp "$1" "$0"'
FLUSH = '; sync "$0"'  # until it is on the disk, as a merge waits
LOADED, COPIED = "load all, save_file", "cat inputs; cp A"
LOADED_FP32 = "load all, in fp32, save_file"
ON_DISK = "; sync it"
RANK = 32


@dataclass(frozen=True)
class Case:
    """One job that every program does: models A, B, C, and an adapter L where it bakes one."""

    name: str
    title: str
    models: int
    formula: str
    number: str
    families: tuple[str, ...] = ("sd1", "sdxl")
    bakes: bool = False

    @property
    def files(self) -> str:
        """The models' names, a letter each."""
        return "ABC"[: self.models] + "L" * self.bakes


CASES = (
    Case("weighted_sum", "two models, weighted sum", 2, "A * (1 - M) + B * M", "0.3"),
    Case("add_difference", "three models, add difference", 3, "A + (B - C) * M", "0.7", ("sd1",)),
    Case("unet_only", "two models, the UNet alone", 2, "A * (1 - M) + B * M",
         "{default: 0, unet: 0.5}"),
    Case("bake", f"a LoRA of rank {RANK} baked into UNet and text encoders", 1,
         "bake(A, L, weight=M)", "1", ("sdxl",), bakes=True),
)  # fmt: skip
FAMILIES = {"sd1": "SD1.5", "sdxl": "SDXL"}


@dataclass
class Runs:
    """Wall seconds of one program's runs, and its peak memory in a run of its own."""

    seconds: list[float] = field(default_factory=list)
    peak_megabytes: float = 0.0
    failed: str = ""


def measure(command: Sequence[str], folder: Path) -> float:
    """Wall seconds of one whole process."""
    os.sync()  # earlier runs' writes are not this one's
    with tempfile.TemporaryFile() as messages:  # not a pipe: a progress bar would fill it and wait
        started = time.perf_counter()
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=messages, check=False
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            messages.seek(0)
            lines = messages.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(lines[-1] if lines else "failed")
    return seconds


def programs(
    case: Case, folder: Path, outputs: Path, peers: dict[str, str]
) -> dict[str, list[str]]:
    """Program -> command line, ours first."""
    out = str(outputs / "out.safetensors")
    paths = [str(folder / f"{name}.safetensors") for name in case.files]
    models = "{" + ", ".join(f"{name}: {name}.safetensors" for name in case.files) + "}"
    recipe = folder / f"{case.name}.yaml"
    recipe.write_text(
        RECIPE.format(models=models, number=case.number, formula=case.formula, out=out),
        encoding="utf-8",
    )
    script = LOAD_ALL_BAKE if case.bakes else LOAD_ALL
    load_all, in_fp32 = (
        [sys.executable, "-c", script, precision, case.name, out, *paths]
        for precision in ("stored", "fp32")
    )
    found = {
        "ckptools": [sys.executable, "-m", "ckptools", "merge", "-q", str(recipe)],
        LOADED: load_all,
        LOADED + ON_DISK: ["sh", "-ec", '"$@"' + FLUSH, out, *load_all],
        LOADED_FP32: in_fp32,
        COPIED: ["sh", "-c", COPY, out, *paths],
        COPIED + ON_DISK: ["sh", "-c", COPY + FLUSH, out, *paths],
    }
    if "sd-mecha" in peers:
        found["sd-mecha"] = [
            peers["sd-mecha"], "-c", SD_MECHA_BAKE if case.bakes else SD_MECHA,
            case.name, out, *paths
        ]  # fmt: skip
    if case.bakes:  # in fp32 anyway
        del found[COPIED], found[COPIED + ON_DISK], found[LOADED_FP32]
        found["cp A"] = ["cp", paths[0], out]
    needed = 1.2 * sum(Path(path).stat().st_size for path in (*paths, paths[0]))
    if needed > memory_bytes():
        print(f"  {LOADED}: left out, it needs {needed / 1e9:.0f} GB of memory")
        found = {
            name: command for name, command in found.items() if not name.startswith("load all")
        }
    return found


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def make_files(folder: Path, family: str, cases: Sequence[Case]) -> None:
    """The models and adapters that the cases need, and where the adapters' modules belong."""
    for number, name in enumerate("ABC"[: max(case.models for case in cases)]):
        write_model(folder / f"{name}.safetensors", family, seed=number)
    if any(case.bakes for case in cases):
        model = folder / "A.safetensors"
        places = write_lora(folder / "L.safetensors", model, rank=RANK, seed=9)
        (folder / "places.json").write_text(json.dumps(places), encoding="utf-8")


def find_peers(peer_python: str) -> dict[str, str]:
    """Peer -> the Python that can import it."""
    script = "import sd_mecha"
    found = subprocess.run([peer_python, "-c", script], capture_output=True, check=False)
    return {"sd-mecha": peer_python} if found.returncode == 0 else {}


def run_case(
    case: Case, folder: Path, outputs: Path, peers: dict[str, str], runs: int
) -> dict[str, Runs]:
    """All programs in turn, `runs` times, after one turn that looks at their memory."""
    commands = programs(case, folder, outputs, peers)
    results = {name: Runs() for name in commands}
    for turn in range(-1, runs):
        for name, command in random.sample([*commands.items()], len(commands)):
            result = results[name]
            if result.failed:
                continue
            try:
                if turn < 0:
                    result.peak_megabytes = peak_megabytes(command, folder)
                    print(f"  {name}: {result.peak_megabytes:.0f} MB", flush=True)
                else:
                    result.seconds.append(measure(command, folder))
                    print(f"  {name}: {result.seconds[-1]:.2f} s", flush=True)
            except RuntimeError as exc:
                result.failed = str(exc)
            finally:
                for path in outputs.glob("out*"):
                    path.unlink()
    return results


def table(results: dict[str, Runs]) -> str:
    """A markdown table: medians, and each program's time as a multiple of ours."""
    lines = ["| program | wall s (median) | times ckptools | peak memory MB |", "|---|---|---|---|"]
    ours = results["ckptools"]
    for name, result in results.items():
        if result.failed:
            lines.append(f"| {name} | failed: {result.failed[:80]} | | |")
            continue
        ratios = [x / y for x, y in zip(result.seconds, ours.seconds, strict=False)]
        lines.append(
            f"| {name} | {statistics.median(result.seconds):.1f} "
            f"| {statistics.median(ratios):.2f} | {result.peak_megabytes:.0f} |"
        )
    return "\n".join(lines)


def machine(*more: str) -> str:
    """Processor, cores and versions, of `more` packages too; no name of the machine."""
    from importlib.metadata import version

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
                  if line.startswith("model name")]  # fmt: skip
        cpu = models[0] if models else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    named = ("torch", "safetensors", "numpy", *more)
    packages = ", ".join(f"{name} {version(name)}" for name in named)
    return (
        f"{cpu}, {cores} cores, {platform.system()}, Python {platform.python_version()}, {packages}"
    )


def main() -> None:
    """Run the benchmark and print, or write, its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=list(FAMILIES), action="append")
    parser.add_argument("--case", choices=[case.name for case in CASES], action="append")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--folder", type=Path, help="where to put the files (default: temporary)")
    parser.add_argument("--outputs", type=Path, help="where to write results (default: beside)")
    parser.add_argument(
        "--write", type=Path, help="a document with bench:begin and bench:end marks"
    )
    options = parser.parse_args()
    # modules are compiled in the first run, as installing does it, and not at every start
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    peers = find_peers(options.peer_python)
    parts = [
        f"{machine()}. Medians of {options.runs} runs in turn, after one that looks at memory: "
        "that of all processes together, shared pages counted once."
    ]
    for family in options.family or FAMILIES:
        prefix = f"ckptools-bench-{family}-"
        with (
            tempfile.TemporaryDirectory(prefix=prefix, dir=options.folder) as inputs,
            tempfile.TemporaryDirectory(prefix=prefix, dir=options.outputs or inputs) as results,
        ):
            folder, outputs = Path(inputs), Path(results)
            wanted = options.case or [case.name for case in CASES]
            cases = [c for c in CASES if family in c.families and c.name in wanted]
            make_files(folder, family, cases)
            for case in cases:
                print(f"{FAMILIES[family]}, {case.title}", flush=True)
                runs = run_case(case, folder, outputs, peers, options.runs)
                parts.append(f"### {FAMILIES[family]} fp16, {case.title}\n\n{table(runs)}")
    text = "\n\n".join(parts)
    print(text)
    if options.write:
        write_between(options.write, BEGIN, END, text)


if __name__ == "__main__":
    main()
