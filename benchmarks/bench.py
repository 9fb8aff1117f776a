"""Merges of full-size files, timed side by side with the peers that are installed.

    python benchmarks/bench.py                          SD1.5 and SDXL, 3 runs each
    python benchmarks/bench.py --family sd1 --runs 5
    python benchmarks/bench.py --peer-python ~/peers/bin/python --write docs/benchmarks.md

Every figure is a whole process, start-up included. Programs take turns (A B C A B C …), so that a
machine that slows down slows all of them; ratios are medians of the ratios within one turn.
Needs disk: about 11 GB for SD1.5, 28 GB for SDXL.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fullsize import write_model

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

RECIPE = """\
ckptools: 1
models: {models}
params: {{M: {number}}}
merge: {formula}
output: {{path: out-ckptools.safetensors, overwrite: true}}
"""

# What the web UIs do: every model whole in memory, arithmetic in the stored dtype, save_file.
LOAD_ALL = """
import sys
from safetensors.torch import load_file, save_file
case, out, *paths = sys.argv[1:]
models = [load_file(path) for path in paths]
result = dict(models[0])
for name, a in result.items():
    if not a.is_floating_point():
        continue
    others = [model[name] for model in models[1:]]
    if case == "weighted_sum":
        result[name] = (1 - 0.3) * a + 0.3 * others[0]
    elif case == "add_difference":
        result[name] = a + (others[0] - others[1]) * 0.7
    elif name.startswith("model.diffusion_model."):
        result[name] = (1 - 0.5) * a + 0.5 * others[0]
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

COPY = 'cat "$@" > /dev/null; cp "$1" "$0"'


@dataclass(frozen=True)
class Case:
    """One job that every program does."""

    name: str
    title: str
    models: int
    formula: str
    number: str


CASES = (
    Case("weighted_sum", "two models, weighted sum", 2, "A * (1 - M) + B * M", "0.3"),
    Case("add_difference", "three models, add difference", 3, "A + (B - C) * M", "0.7"),
    Case("unet_only", "two models, the UNet alone", 2, "A * (1 - M) + B * M",
         "{default: 0, unet: 0.5}"),
)  # fmt: skip
FAMILIES = {"sd1": "SD1.5", "sdxl": "SDXL"}
COUNTS = {"sd1": 3, "sdxl": 2}


@dataclass
class Runs:
    """Wall seconds and peak resident bytes of one program's runs."""

    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    failed: str = ""


def measure(command: Sequence[str], folder: Path) -> tuple[float, int]:
    """Wall seconds and peak RSS (largest process, bytes) of one whole process."""
    os.sync()  # earlier runs' writes are not this one's
    with tempfile.TemporaryFile() as messages:  # not a pipe: a progress bar would fill it and wait
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=messages
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            messages.seek(0)
            lines = messages.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(lines[-1] if lines else "failed")
    return seconds, usage.ru_maxrss * 1024


def programs(case: Case, folder: Path, peers: dict[str, str]) -> dict[str, list[str]]:
    """Program -> command line, ours first."""
    names = "ABC"[: case.models]
    paths = [str(folder / f"{name}.safetensors") for name in names]
    models = "{" + ", ".join(f"{name}: {name}.safetensors" for name in names) + "}"
    recipe = folder / f"{case.name}.yaml"
    recipe.write_text(
        RECIPE.format(models=models, number=case.number, formula=case.formula), encoding="utf-8"
    )
    found = {
        "ckptools": [sys.executable, "-m", "ckptools", "merge", "-q", str(recipe)],
        "load all, save_file": [
            sys.executable, "-c", LOAD_ALL, case.name, str(folder / "out.safetensors"), *paths
        ],
        "cat inputs; cp A": ["sh", "-c", COPY, str(folder / "out.safetensors"), *paths],
    }  # fmt: skip
    if "sd-mecha" in peers:
        found["sd-mecha"] = [
            peers["sd-mecha"], "-c", SD_MECHA, case.name, str(folder / "out.safetensors"), *paths
        ]  # fmt: skip
    return found


def find_peers(peer_python: str) -> dict[str, str]:
    """Peer -> the Python that can import it."""
    script = "import sd_mecha"
    found = subprocess.run([peer_python, "-c", script], capture_output=True, check=False)
    return {"sd-mecha": peer_python} if found.returncode == 0 else {}


def run_case(
    case: Case, folder: Path, peers: dict[str, str], runs: int, warmup: bool
) -> dict[str, Runs]:
    """All programs in turn, `runs` times, after one uncounted turn."""
    commands = programs(case, folder, peers)
    results = {name: Runs() for name in commands}
    for turn in range(-1 if warmup else 0, runs):
        for name, command in commands.items():
            result = results[name]
            if result.failed:
                continue
            try:
                seconds, peak = measure(command, folder)
            except RuntimeError as exc:
                result.failed = str(exc)
                continue
            finally:
                for path in folder.glob("out*"):
                    path.unlink()
            print(f"  {name}: {seconds:.2f} s, {peak / 1e6:.0f} MB", flush=True)
            if turn >= 0:
                result.seconds.append(seconds)
                result.peaks.append(peak)
    return results


def table(results: dict[str, Runs]) -> str:
    """A markdown table: medians, and each program's time as a multiple of ours."""
    lines = ["| program | wall s (median) | times ckptools | peak RSS MB |", "|---|---|---|---|"]
    ours = results["ckptools"]
    for name, result in results.items():
        if result.failed:
            lines.append(f"| {name} | failed: {result.failed[:80]} | | |")
            continue
        ratios = [x / y for x, y in zip(result.seconds, ours.seconds, strict=True)]
        lines.append(
            f"| {name} | {statistics.median(result.seconds):.1f} "
            f"| {statistics.median(ratios):.2f} | {max(result.peaks) / 1e6:.0f} |"
        )
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores, memory and versions; no name of the machine."""
    from importlib.metadata import version

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
                  if line.startswith("model name")]  # fmt: skip
        cpu = models[0] if models else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "numpy"))
    return (
        f"{cpu}, {cores} cores, {platform.system()}, Python {platform.python_version()}, {packages}"
    )


def main() -> None:
    """Run the benchmark and print, or write, its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=list(FAMILIES), action="append")
    parser.add_argument("--case", choices=[case.name for case in CASES], action="append")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-warmup", action="store_true")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--folder", type=Path, help="where to put the files (default: temporary)")
    parser.add_argument(
        "--write", type=Path, help="a document with bench:begin and bench:end marks"
    )
    options = parser.parse_args()
    peers = find_peers(options.peer_python)
    parts = [f"{machine()}. Medians of {options.runs} runs in turn, after one that is not counted."]
    for family in options.family or FAMILIES:
        folder = Path(tempfile.mkdtemp(prefix=f"ckptools-bench-{family}-", dir=options.folder))
        try:
            for number, name in enumerate("ABC"[: COUNTS[family]]):
                write_model(folder / f"{name}.safetensors", family, seed=number)
            for case in CASES:
                chosen = not options.case or case.name in options.case
                if not chosen or case.models > COUNTS[family]:
                    continue
                print(f"{FAMILIES[family]}, {case.title}", flush=True)
                results = run_case(case, folder, peers, options.runs, not options.no_warmup)
                parts.append(f"### {FAMILIES[family]} fp16, {case.title}\n\n{table(results)}")
        finally:
            shutil.rmtree(folder)
    text = "\n\n".join(parts)
    print(text)
    if options.write:
        document = options.write.read_text(encoding="utf-8")
        before, rest = document.split(BEGIN)
        after = rest.split(END)[1]
        options.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
