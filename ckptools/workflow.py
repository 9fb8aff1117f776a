"""A merge from top to bottom: the file to read first.

recipe ──▶ plan ──▶ pins ──▶ layout ──▶ stream ──▶ patch the hash ──▶ verify ──▶ rename
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptools.checkpoint import file_sha256
from ckptools.crew import usable_cores
from ckptools.errors import InputError, OutputError, UsageError, nearest_name
from ckptools.manifest import embedded_metadata, manifest_document, with_hash
from ckptools.opening import Source
from ckptools.placement import output_problems, place_of, ways_to_replace
from ckptools.plan import Plan, Step, make_plan
from ckptools.progress import Progress
from ckptools.recipe import Recipe, parse_recipe
from ckptools.sources import Opener, open_checkpoint
from ckptools.writer import (
    Layout,
    PartFile,
    commit_parts,
    index_document,
    index_path,
    lay_out,
    made_folder,
    manifest_path,
    open_parts,
    sync_folder,
    whole_file,
)

if TYPE_CHECKING:
    from ckptools import rendering
    from ckptools.hub.lock import Lock
    from ckptools.rendering import Rendering


@dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    output       the file (or the shards' index)
    sha256_data  of the tensor data in file order, over all shards
    seconds      wall time, planning included
    peak_bytes   the peak memory so far, as the system counted it, workers included
    finite       whether every value of the output is finite
    recomputed   how many tensors were computed again and compared
    file_bytes   size of the output, headers included
    notes        what was found on the way
    rendering    the test pictures, where the recipe asks for them
    """

    plan: Plan
    output: Path
    manifest: Path
    sha256_data: str
    seconds: float
    peak_bytes: int
    finite: bool
    recomputed: int
    file_bytes: int
    notes: tuple[str, ...]
    rendering: Rendering | None = None


@contextmanager
def planned(
    recipe: Recipe,
    *,
    threads: int,
    force: bool = False,
    write: bool = True,
    headers_only: bool = False,
    progress: Progress | None = None,
) -> Iterator[Plan]:
    """A plan whose sources are closed at the end.

    force, write  as `make_plan` has them
    headers_only  read no more than headers of models that are on the Hub; otherwise they are
                  downloaded, once a plan by their headers stands
    """
    make = partial(make_plan, threads=threads, force=force, write=write)
    opener: Opener = open_checkpoint
    if recipe.is_remote:
        from ckptools.hub.remote import Hub  # loads the Hub's client

        hub = Hub(progress)
        recipe, opener = hub.pinned(recipe), hub.open_headers
        if not headers_only:
            make(recipe, opener=opener).close()
            opener = hub.open_whole
    plan = make(recipe, opener=opener)
    try:
        yield plan
    finally:
        plan.close()


def merge(
    recipe: Recipe,
    *,
    threads: int | None = None,
    force: bool = False,
    hash_inputs: bool = False,
    lock: Lock | None = None,
    progress: Progress | None = None,
    pictures: rendering.Progress | None = None,
) -> MergeResult:
    """Merge by recipe into one verified file, or raise and leave everything as it was.

    threads      worker threads (default: the cores and one, 3 to 8); the bytes do not depend on it
    force        replace an existing output
    hash_inputs  record the sha256 of every input, not only of pinned ones; a recipe that is to be
                 published does anyway, for its card names them
    lock         merge the files that it names and no others
    pictures     told of the test pictures that the recipe asks for
    """
    from ckptools import rendering

    started = time.perf_counter()
    progress = progress or Progress()
    threads = threads or default_threads()
    recipe = recipe if lock is None else lock.pinned(recipe)
    with planned(recipe, threads=threads, force=force, progress=progress) as plan:
        progress.planned(plan)
        if lock is not None:
            lock.check(plan.sources, progress)
        wanted = hash_inputs or recipe.publish is not None
        sha256s = check_pins(plan.sources, hash_inputs=wanted, progress=progress)
        force = force or recipe.output.overwrite
        when = plan.recipe.render.when if plan.recipe.render else "never"
        drawn: Rendering | None = None
        if when != "never":
            rendering.check_section(plan, force=force)
        if when == "before_save":
            drawn = rendering.render_gate(plan, sha256s, force=force, progress=pictures)
        with made_folder(recipe.output_path.parent):
            result = _write(plan, sha256s, progress, started, replaces=force)
        if when == "after_save":
            drawn = rendering.render_saved(plan, result.output, force=force, progress=pictures)
        return replace(result, rendering=drawn)


def left_to_merge(plan: Plan) -> tuple[str, ...]:
    """What a plan does not settle: outputs that a merge will not replace unasked, pins to check."""
    standing = [
        f"{problem.what}: a merge will need {ways_to_replace(plan).rstrip(',')}"
        for problem in output_problems(plan, force=plan.recipe.output.overwrite)
    ]
    pinned = [source.name for source in plan.sources if source.ref.sha256]
    pins = [f"the sha256 of {', '.join(pinned)} is checked by a merge"] if pinned else []
    return (*standing, *pins)


def render_recipe(
    recipe: Recipe,
    given: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    *,
    beside: Sequence[Path] = (),
    use_cache: bool = True,
    force: bool = False,
    progress: rendering.Progress | None = None,
) -> Rendering:
    """Merge in memory, draw the merge beside its models, write pictures and reports only.

    given   fields of `rendering.Order` that go before the recipe's `render:`
    folder  default: the output's name with "-render", beside it
    beside  more models to compare with
    force   draw into a folder that holds other things
    """
    from ckptools import rendering

    with planned(recipe, threads=default_threads(), force=True) as plan:
        sha256s = check_pins(plan.sources, hash_inputs=False, progress=Progress())
        order = replace(rendering.section_order(plan.recipe), **(given or {}))
        return rendering.render_plan(
            plan, sha256s, order, folder, beside=beside, use_cache=use_cache, force=force,
            progress=progress,
        )  # fmt: skip


def default_threads() -> int:
    """Worker threads that suit this machine: one more than its usable cores, 3 to 8.

    One of them waits for the disk most of the time.
    """
    return max(3, min(8, 1 + usable_cores()))


def find_step(plan: Plan, tensor: str) -> Step:
    """The one step whose tensor has this name, or fits this glob or part of a name."""
    names = [step.spec.name for step in plan.steps]
    found = [name for name in names if name == tensor] or [
        name for name in names if fnmatchcase(name, tensor) or tensor in name
    ]
    if len(found) == 1:
        return plan.steps[names.index(found[0])]
    if not found:
        way = "`ckptools inspect MODEL --tensors '*'` lists a model's names"
        raise UsageError(
            f"no tensor {tensor!r} in the output", fix=nearest_name(tensor, names, way)
        )
    shown = ", ".join(found[:4]) + (", …" if len(found) > 4 else "")
    raise UsageError(f"{tensor!r} fits {len(found):,} tensors", fix=f"name one: {shown}")


def demo_recipe(folder: Path) -> Recipe:
    """Write the demo's recipe, over the models inside the package, to a folder and load it.

    Raises `OutputError` where a recipe, or a result without its manifest, is there that no demo
    wrote.
    """
    models = Path(__file__).parent / "tiny"
    path, text = folder / "recipe.yaml", _DEMO.format(models=models.as_posix())
    recipe = parse_recipe(text, path)
    is_other = path.exists() and _but_models(path.read_bytes()) != _but_models(text.encode())
    is_theirs = recipe.output_path.exists() and not manifest_path(recipe.output_path).exists()
    if is_other or is_theirs:
        raise OutputError(
            "this is not the demo's",
            where=str(path if is_other else recipe.output_path),
            fix="give another folder: ckptools demo -o FOLDER",
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return recipe


def _but_models(text: bytes) -> list[bytes]:
    """Its lines but for the models', which lie elsewhere in another installation."""
    return [line for line in text.splitlines() if b"/tiny/" not in line]


_DEMO = """\
ckptools: 1
models:
  A: "{models}/A.safetensors"  # pastel
  B: "{models}/B.safetensors"  # outlined
  C: "{models}/C.safetensors"  # the base that both were trained from
params:
  M: {{default: 1, "IN00-IN02": 0.8, vae: 0}}
merge: A + (B - C) * M
output: {{path: pastel-outlined.safetensors}}
sweep: {{M: [0, 0.5, 1]}}
"""


# --- inputs ------------------------------------------------------------------------------------


def check_pins(
    sources: Sequence[Source], *, hash_inputs: bool, progress: Progress
) -> dict[str, str]:
    """Model name -> sha256, for every pinned model (or all); a wrong pin is an `InputError`."""
    wanted = [source for source in sources if source.ref.sha256 or hash_inputs]
    for source in wanted:
        if source.ref.sha256 and len(source.checkpoint.files) > 1:
            raise InputError(
                f"{source.name} is sharded; a sha256 pins a single file",
                where=source.ref.where,
                fix="remove the pin",
            )
    wanted = [source for source in wanted if len(source.checkpoint.files) == 1]
    if not wanted:
        return {}
    progress.start("hashing inputs", sum(source.checkpoint.file_bytes for source in wanted))
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [
            pool.submit(file_sha256, source.checkpoint.files[0].path, progress.advance)
            for source in wanted
        ]
        found = {source.name: job.result() for source, job in zip(wanted, jobs, strict=True)}
    for source in wanted:
        if source.ref.sha256 not in ("", found[source.name]):
            raise InputError(
                f"{source.name} is not the pinned file: its sha256 is {found[source.name]}, "
                f"the pin is {source.ref.sha256}",
                where=source.ref.where,
                fix="get the file that the recipe was made for, or change the pin",
            )
    return found


# --- output ------------------------------------------------------------------------------------


def _write(
    plan: Plan,
    sha256s: Mapping[str, str],
    progress: Progress,
    started: float,
    *,
    replaces: bool,
) -> MergeResult:
    from ckptools.engine import Settings

    recipe = plan.recipe
    embedded = embedded_metadata(plan, sha256s)
    layouts = [lay_out(specs, embedded.entries, path) for path, specs in plan.shards]
    settings = Settings(plan.threads, recipe.seed, allow_nonfinite=recipe.allow_nonfinite)
    manifest = manifest_path(recipe.output_path)
    with ExitStack() as stack:
        parts = open_parts(stack, layouts, replaces=replaces)
        progress.start("merging", plan.output_bytes)
        streamed = _stream(plan, parts, settings, progress)
        layouts = [with_hash(layout, streamed.sha256) for layout in layouts]
        for part, layout in zip(parts, layouts, strict=True):
            part.write(layout.header, 0)
        for source in plan.sources:
            source.checkpoint.check_unchanged()
        recomputed = _verify(plan, parts, layouts, settings, streamed.sha256)
        place = place_of(plan)
        stale = place.stale()
        notes = (*embedded.notes, *streamed.notes)
        verified = {"finite": not streamed.nonfinite, "recomputed": recomputed}
        document = manifest_document(
            plan, layouts, sha256s=sha256s, data_sha256s=streamed.sha256s, verified=verified,
            notes=notes,
        )  # fmt: skip
        if len(layouts) > 1:
            index = whole_file(index_path(recipe.output_path), index_document(layouts))
            parts += open_parts(stack, [index], replaces=replaces)
        parts += open_parts(stack, [whole_file(manifest, document)])
        commit_parts(parts)
    notes = (*notes, *place.clear(stale))
    sync_folder(recipe.output_path.parent)
    return MergeResult(
        plan=plan,
        output=plan.outputs[-1],
        manifest=manifest,
        sha256_data=streamed.sha256,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_memory_bytes(),
        finite=not streamed.nonfinite,
        recomputed=recomputed,
        file_bytes=sum(layout.file_bytes for layout in layouts),
        notes=notes,
    )


@dataclass(frozen=True)
class _Streamed:
    """Hashes of the data (all of it, and by shard), and what the engine met."""

    sha256: str
    sha256s: tuple[str, ...]
    nonfinite: Mapping[str, int]
    notes: tuple[str, ...]


def _stream(plan: Plan, parts: Sequence[PartFile], settings: Any, progress: Progress) -> _Streamed:
    from ckptools.engine import run

    total = hashlib.sha256()
    sha256s: list[str] = []
    nonfinite: dict[str, int] = {}
    notes: list[str] = []
    for part in parts:
        outcome = run(
            tasks_of(plan.steps, part.layout),
            sources=[source.checkpoint for source in plan.sources],
            labels=[source.name for source in plan.sources],
            sink=part,
            settings=settings,
            progress=progress.advance,
            hashers=(total,) if len(parts) > 1 else (),
        )
        sha256s.append(outcome.sha256)
        nonfinite |= outcome.nonfinite
        notes += [f"{name}: wrong position ids were repaired" for name in outcome.repaired]
    notes += [f"{name}: {count:,} NaN or Inf values" for name, count in sorted(nonfinite.items())]
    sha256 = total.hexdigest() if len(parts) > 1 else sha256s[0]
    return _Streamed(sha256, tuple(sha256s), nonfinite, tuple(notes))


def tasks_of(steps: Sequence[Step], layout: Layout) -> list[Any]:
    """The engine's tasks for one output file, in file order."""
    from ckptools.engine import Task

    by_name = {step.spec.name: step.program for step in steps}
    return [Task(spec, by_name[spec.name], layout.starts[spec.name]) for spec in layout.specs]


def _verify(
    plan: Plan, parts: Sequence[PartFile], layouts: Sequence[Layout], settings: Any, seed: str
) -> int:
    """Check every part; how many tensors were computed again."""
    from ckptools.verify import check_part

    return sum(
        check_part(
            part,
            layout,
            tasks_of(plan.steps, layout),
            seed=seed,
            sources=[source.checkpoint for source in plan.sources],
            labels=[source.name for source in plan.sources],
            settings=settings,
        )
        for part, layout in zip(parts, layouts, strict=True)
    )


def peak_memory_bytes() -> int:
    """The process's largest resident size so far; 0 where the system does not tell."""
    status = Path("/proc/self/status")  # `ru_maxrss` counts the parent's memory before exec
    if status.exists():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:")), 0)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
