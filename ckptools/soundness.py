"""`ckptools verify`: is a file sound, whole, and what it is said to be?

Stricter than readers need to be: what a header may hold but no tool should write is a problem
here. Values are looked at only where they are asked for, in one read, without torch. (Whether a
merge wrote what was planned is another question: see `verify`.)
"""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckptools.checkpoint import Checkpoint, SourceFile
from ckptools.errors import CkptError, InvalidFileError, UnsafeError, UsageError, counted, nearest
from ckptools.family import KINDS, Detection, detect, load_families
from ckptools.hashing import (
    Lane,
    Progress,
    Silent,
    data_start,
    from_byte,
    stream_file,
)
from ckptools.hub import look
from ckptools.known import incomplete_parts
from ckptools.manifest import HASH_KEY, embedded_metadata, with_hash
from ckptools.plan import Plan
from ckptools.progress import Progress as MergeProgress
from ckptools.recipe import Recipe
from ckptools.tensors import DTYPES, TensorSpec
from ckptools.workflow import check_pins, planned, tasks_of
from ckptools.writer import MANIFEST_SCHEMA, MANIFEST_SUFFIX, Layout, is_shard, lay_out

if TYPE_CHECKING:
    from ckptools.measure import Values

_LEAST_DIGITS = 10  # of a sha256 that is given short: the length of AutoV2
_HEX_DIGITS = 64
_FLOOD = 0.5  # share of a tensor's non-zero values
_F16_MAX = DTYPES["F16"].finite_max
_HEADROOM = 2.0  # a merge adds differences: values above half of the range are near its end
_MOST_IDS = 1 << 16
_INDEX = ".index.json"


@dataclass(frozen=True)
class Problem:
    """Something wrong, or something to look at.

    code    a word for scripts: "invalid-file", "unsafe", "nan", "sha256" …
    tensor  "" where it concerns the whole
    """

    code: str
    message: str
    tensor: str = ""


@dataclass(frozen=True)
class Soundness:
    """What `verify` found in one source.

    problems   what makes it invalid
    warnings   what is legal and still odd
    checked    what was looked at, in words
    detection  what the file is; None where it could not be opened
    unsafe     whether it was refused as unsafe
    """

    path: Path
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    checked: tuple[str, ...]
    detection: Detection | None = None
    unsafe: bool = False

    @property
    def valid(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass
class _Findings:
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)


def verify_source(
    path: Path,
    *,
    deep: bool = False,
    expect: str | None = None,
    sha256: str | None = None,
    recipe: Recipe | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> Soundness:
    """Look at one source as strictly as can be.

    deep    read every value: NaN, Inf, floods of denormals, zeros, head-room, position ids, and
            the hashes that the file and its manifest hold of its data
    expect  a family ("sd1", "sd1/inpainting") or a kind ("lora") that it must be
    sha256  of the whole file, at least 10 hex digits
    recipe  compute this merge again, without writing it, and compare
    Of a model on the Hub the header alone is read; what asks for values needs a file that is here.
    Raises `InputError` where the source cannot be read at all, `UsageError` for what cannot be
    asked; everything else is in the result.
    """
    wanted_family, wanted_sha256 = _family_wanted(expect), _sha256_wanted(sha256)
    found = _Findings()
    progress = progress or Silent()
    with ExitStack() as stack:
        try:
            checkpoint = stack.enter_context(look(path))
        except (InvalidFileError, UnsafeError) as exc:  # the file's own fault
            problem = Problem(exc.code, _in_words(exc, path))
            unsafe = isinstance(exc, UnsafeError)
            return Soundness(path, (problem,), (), ("structure",), unsafe=unsafe)
        detection = detect(checkpoint, checkpoint.metadata)
        found.checked.append("structure")
        _check_names(checkpoint, found)
        _check_header(checkpoint, found)
        _check_family(detection, wanted_family, found)
        _check_whole(checkpoint, detection, found, is_asked=expect is not None)
        manifest = _check_manifest(checkpoint, found)
        _check_data(
            checkpoint,
            found,
            deep=deep,
            sha256=wanted_sha256,
            manifest=manifest,
            threads=threads,
            progress=progress,
        )
        if recipe is not None:
            _check_recipe(checkpoint, recipe, found, threads=threads, progress=progress)
        checkpoint.check_unchanged()
    return Soundness(
        path, tuple(found.problems), tuple(found.warnings), tuple(found.checked), detection
    )


def _in_words(error: CkptError, path: Path) -> str:
    where = f"{error.where}: " if error.where not in ("", str(path)) else ""
    return f"{where}{error.what}" + (f" ({error.fix})" if error.fix else "")


# --- what is asked -----------------------------------------------------------------------------


def _family_wanted(expect: str | None) -> tuple[str, str]:
    """(family or kind, variant or "")."""
    if expect is None:
        return "", ""
    name, _, variant = expect.partition("/")
    families = load_families()
    if name not in families and name not in KINDS:
        raise UsageError(
            f"{name!r} is no family and no kind of file", fix=nearest(name, [*families, *KINDS])
        )
    variants = families[name].variants if name in families else {}
    if variant and variant not in variants:
        raise UsageError(f"{name} has no variant {variant!r}", fix=nearest(variant, variants))
    return name, variant


def _sha256_wanted(text: str | None) -> str:
    if text is None:
        return ""
    wanted = text.strip().lower().removeprefix("sha256:").removeprefix("0x")
    fits = _LEAST_DIGITS <= len(wanted) <= _HEX_DIGITS and not wanted.strip("0123456789abcdef")
    if not fits:  # least of all an empty one, of a script whose variable is not set
        raise UsageError(
            f"{text!r} is not a sha256", fix="give all 64 hex digits, or the first 10 or more"
        )
    return wanted


# --- headers -----------------------------------------------------------------------------------


def _check_names(checkpoint: Checkpoint, found: _Findings) -> None:
    """Names that the format allows and that no tool should have to handle."""
    for name in checkpoint:
        if not name:
            found.problems.append(Problem("empty-name", "a tensor has no name"))
        elif _odd_characters(name):
            message = f"control characters in its name: {_odd_characters(name)}"
            found.problems.append(Problem("control-character", message, name))
    for key in checkpoint.metadata:
        if _odd_characters(key):
            message = f"control characters in the metadata key {key!r}"
            found.problems.append(Problem("control-character", message))


def _odd_characters(text: str) -> str:
    """The characters that steer a terminal or hide, as escapes; "" if there are none."""
    odd = sorted({char for char in text if not char.isprintable()})
    return " ".join(char.encode("unicode_escape").decode() for char in odd)


def _check_header(checkpoint: Checkpoint, found: _Findings) -> None:
    found.warnings += [Problem("header", text) for text in checkpoint.warnings]
    misaligned = [
        name
        for name, spec in checkpoint.items()
        for extent in checkpoint.extents(name)
        if extent.nbytes and extent.start % max(1, DTYPES[spec.dtype].bits // 8)
    ]
    if misaligned:
        message = (
            f"{counted(len(misaligned), 'tensor', 'does')} not begin at a multiple of the values' "
            "size: readers that map the file must copy them"
        )
        found.warnings.append(Problem("misaligned", message, misaligned[0]))
    if not checkpoint:
        found.warnings.append(Problem("no-tensors", "there are no tensors in this file"))


def _check_family(detection: Detection, wanted: tuple[str, str], found: _Findings) -> None:
    name, variant = wanted
    if not name:
        return
    found.checked.append("family")
    what = detection.family or detection.kind
    if name not in (detection.family, detection.kind):
        reasons = [one.reason for one in detection.rejected if one.family == name]
        because = f": {reasons[0]}" if reasons else ""
        found.problems.append(Problem("family", f"this is {what}, not {name}{because}"))
    elif variant and variant != detection.variant:
        message = f"this is {what}/{detection.variant}, not {name}/{variant}"
        found.problems.append(Problem("family", message))


def _check_whole(
    checkpoint: Checkpoint, detection: Detection, found: _Findings, *, is_asked: bool
) -> None:
    """A component that is there in part: a warning, a problem where a family is asked for."""
    for component, names in incomplete_parts(detection, checkpoint).items():
        message = f"{component} lacks {counted(len(names), 'tensor')}, such as {names[0]}"
        (found.problems if is_asked else found.warnings).append(Problem("incomplete", message))


# --- the manifest beside it --------------------------------------------------------------------


def _check_manifest(checkpoint: Checkpoint, found: _Findings) -> dict[Path, str]:
    """Compare sizes and headers with the manifest; file -> the data hash that it tells."""
    name = checkpoint.path.name.removesuffix(_INDEX) + MANIFEST_SUFFIX
    path = checkpoint.path.with_name(name)
    if not path.is_file():
        return {}
    found.checked.append("manifest")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != MANIFEST_SCHEMA:
            raise ValueError(f"the schema is {document['schema']!r}")
        rows = {
            str(row["file"]): (
                int(row["bytes"]),
                str(row["header_sha256"]),
                str(row["sha256_data"]),
            )
            for row in document["outputs"]
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        message = f"{path.name} is not a manifest: {type(exc).__name__} {exc}"
        found.problems.append(Problem("manifest", message))
        return {}
    told: dict[Path, str] = {}
    for file in checkpoint.files:
        if file.path.name not in rows:
            message = f"{path.name} does not list {file.path.name} (was it renamed?)"
            found.warnings.append(Problem("manifest", message))
            continue
        nbytes, header, told[file.path] = rows[file.path.name]
        if nbytes != file.header.file_bytes:
            message = f"{path.name} says {nbytes:,} bytes, the file has {file.header.file_bytes:,}"
            found.problems.append(Problem("manifest", message))
        elif header != file.header.sha256:
            message = f"the header is not the one that {path.name} tells of"
            found.problems.append(Problem("manifest", message))
    return told


# --- values ------------------------------------------------------------------------------------


def _check_data(
    checkpoint: Checkpoint,
    found: _Findings,
    *,
    deep: bool,
    sha256: str,
    manifest: Mapping[Path, str],
    threads: int,
    progress: Progress,
) -> None:
    """What needs the bytes of the files."""
    if sha256 and len(checkpoint.files) > 1:
        raise UsageError(
            f"a sha256 is of one file, {checkpoint.path.name} is {len(checkpoint.files)}",
            fix="verify the files one by one",
        )
    hashed = deep and (bool(manifest) or HASH_KEY in checkpoint.metadata)
    if sha256 or hashed:
        _check_hashes(checkpoint, found, sha256, manifest if hashed else {}, progress)
    if deep:
        _check_values(checkpoint, found, threads, progress)


def _check_hashes(
    checkpoint: Checkpoint,
    found: _Findings,
    sha256: str,
    manifest: Mapping[Path, str],
    progress: Progress,
) -> None:
    """Read the files once, in order, for all the hashes that are told of them."""
    whole, total = hashlib.sha256(), hashlib.sha256()
    data = {file.path: hashlib.sha256() for file in checkpoint.files}
    starts = [data_start(file.path) for file in checkpoint.files]
    progress.start("hashing", checkpoint.file_bytes)
    for file, start in zip(checkpoint.files, starts, strict=True):
        lanes: list[Lane] = [from_byte(0, whole.update)] if sha256 else []
        if start is not None and file.path in manifest:
            lanes.append(from_byte(start, data[file.path].update))
        if start is not None and HASH_KEY in checkpoint.metadata:
            lanes.append(from_byte(start, total.update))
        stream_file(file.path, file.header.file_bytes, lanes, progress.advance)
    if sha256:
        found.checked.append("sha256")
        if not whole.hexdigest().startswith(sha256):
            message = f"the sha256 is {whole.hexdigest()}, not {sha256}"
            found.problems.append(Problem("sha256", message))
    if HASH_KEY in checkpoint.metadata and None not in starts and not is_shard(checkpoint.path):
        _check_embedded(checkpoint, total.hexdigest(), found)
    for written, told in manifest.items():
        if data[written].hexdigest() != told:
            message = f"the data of {written.name} is not what its manifest tells of"
            found.problems.append(Problem("manifest", message))


def _check_values(
    checkpoint: Checkpoint, found: _Findings, threads: int, progress: Progress
) -> None:
    from ckptools.measure import Values, measure_values, rows_of

    found.checked.append("values")
    wanted = [n for n, spec in checkpoint.items() if spec.is_float or spec.dtype == "BOOL"]
    progress.start("reading values", sum(checkpoint[name].nbytes for name in wanted))
    values = measure_values(
        rows_of([checkpoint], wanted), threads=threads, advance=progress.advance
    )
    for name in wanted:
        _judge(checkpoint[name], values.get(name, Values()), found)
    for name, spec in checkpoint.items():
        if name.endswith("position_ids") and spec.numel <= _MOST_IDS:
            _judge_ids(spec, checkpoint.read(name), found)


def _check_embedded(checkpoint: Checkpoint, sha256: str, found: _Findings) -> None:
    told = checkpoint.metadata.get(HASH_KEY, "").strip().lower().removeprefix("0x")
    if not told:
        return
    found.checked.append(HASH_KEY)
    if told == sha256:
        return
    message = f"{HASH_KEY} is {told[:16]!r}…, the data hashes to {sha256[:16]}…"
    if "ckptools.version" in checkpoint.metadata:
        found.problems.append(Problem("embedded-hash", message))
    else:  # others hash in the order of their own dictionary, or before an edit
        found.warnings.append(Problem("embedded-hash", message))


def _judge(spec: TensorSpec, values: Values, found: _Findings) -> None:
    """What one tensor's values say."""

    def problem(code: str, message: str) -> None:
        found.problems.append(Problem(code, message, spec.name))

    def warning(code: str, message: str) -> None:
        found.warnings.append(Problem(code, message, spec.name))

    of = f"of {values.count:,} values"
    if values.nan:
        problem("nan", f"{values.nan:,} NaN {of}")
    if values.inf:
        problem("inf", f"{values.inf:,} Inf {of}")
    if not spec.is_float:
        if values.max > 1:
            warning("bool", "some of its bytes are neither 0 nor 1")
        return
    if values.count and values.zeros == values.count and len(spec.shape) > 1:
        warning("zeros", f"all {values.count:,} values are zero")
    nonzero = values.finite - values.zeros
    if values.denormals > max(1, _FLOOD * nonzero):
        share = values.denormals / nonzero
        message = f"{share:.0%} of its non-zero values are too small for {spec.dtype} to hold well"
        warning("denormal", message)
    largest = max(values.max, -values.min, 0.0)
    if largest > _F16_MAX:
        warning("head-room", f"values up to {largest:g} do not fit fp16 (65504)")
    elif largest * _HEADROOM > _F16_MAX:
        warning("head-room", f"values up to {largest:g} are near the end of fp16 (65504)")


def _judge_ids(spec: TensorSpec, raw: bytes, found: _Findings) -> None:
    """Position ids count 0, 1, 2 …; merges in fp16 have turned 76 into 75.9975, or 75."""
    import numpy as np

    if spec.dtype == "BF16":
        wide = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        ids = wide.view(np.float32).astype(np.float64)
    else:
        known = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8"}
        if spec.dtype not in known:
            return
        ids = np.frombuffer(raw, known[spec.dtype]).astype(np.float64)
    wrong = np.flatnonzero(~(ids == np.arange(ids.size)))
    if wrong.size:
        first = int(wrong[0])
        message = f"{wrong.size:,} position ids drifted: number {first} is {ids[first]:g}"
        found.problems.append(Problem("position-ids", message, spec.name))
    elif spec.is_float:
        message = f"position ids are stored as {spec.dtype}; I64 cannot drift"
        found.warnings.append(Problem("position-ids", message, spec.name))


# --- the recipe again --------------------------------------------------------------------------


def _check_recipe(
    checkpoint: Checkpoint, recipe: Recipe, found: _Findings, *, threads: int, progress: Progress
) -> None:
    """Compute the merge of the recipe again and compare; nothing is written."""
    found.checked.append("recipe")
    output = checkpoint.path.absolute()
    output = output.with_name(output.name.removesuffix(_INDEX))
    recipe = replace(recipe, output=replace(recipe.output, path=str(output)))
    told = _Told(progress)
    with planned(recipe, threads=threads, write=False, progress=told) as plan:
        hash_inputs = _recorded_inputs(checkpoint)
        sha256s = check_pins(plan.sources, hash_inputs=hash_inputs, progress=told)
        before = len(found.problems)
        found.problems += _planned_otherwise(plan, checkpoint)
        if len(found.problems) == before:
            _compare(plan, checkpoint, sha256s, found, progress)


class _Told(MergeProgress):
    """Hands on what a merge tells."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def start(self, stage: str, total_bytes: int) -> None:
        """A stage begins."""
        self._progress.start(stage, total_bytes)

    def advance(self, nbytes: int) -> None:
        """So many bytes more."""
        self._progress.advance(nbytes)


def _recorded_inputs(checkpoint: Checkpoint) -> bool:
    """Whether the file's own recipe records the sha256 of its inputs."""
    try:
        models = json.loads(checkpoint.metadata.get("ckptools.recipe", "{}")).get("models", {})
        return any("sha256" in model for model in models.values())
    except (ValueError, AttributeError, TypeError, RecursionError):
        return False


def _planned_otherwise(plan: Plan, checkpoint: Checkpoint) -> Iterator[Problem]:
    """Tensors whose names, dtypes or shapes are not those of the plan."""
    planned = {step.spec.name: step.spec for step in plan.steps}
    for name, spec in planned.items():
        if name not in checkpoint:
            yield Problem("recipe", "the recipe makes this tensor, the file lacks it", name)
        elif checkpoint[name] != spec:
            message = f"the recipe makes {spec}, the file has {checkpoint[name]}"
            yield Problem("recipe", message, name)
    for name in checkpoint:
        if name not in planned:
            yield Problem("recipe", "the recipe does not make this tensor", name)


def _compare(
    plan: Plan,
    checkpoint: Checkpoint,
    sha256s: Mapping[str, str],
    found: _Findings,
    progress: Progress,
) -> None:
    from ckptools.engine import Settings, run

    entries = embedded_metadata(plan, sha256s).entries
    layouts = [lay_out(specs, entries, path) for path, specs in plan.shards]
    settings = Settings(plan.threads, plan.recipe.seed, allow_nonfinite=plan.recipe.allow_nonfinite)
    total = hashlib.sha256()
    differing: list[tuple[str, int]] = []
    progress.start("computing again", plan.output_bytes)
    for layout in layouts:
        sink = _Comparison(layout, checkpoint)
        run(
            tasks_of(plan.steps, layout),
            sources=[source.checkpoint for source in plan.sources],
            labels=[source.name for source in plan.sources],
            sink=sink,
            settings=settings,
            progress=progress.advance,
            hashers=(total,),
        )
        differing += [(s.name, sink.first[s.name]) for s in layout.specs if s.name in sink.first]
    for name, element in differing:
        message = f"differs from what the recipe makes, from value {element:,} on"
        found.problems.append(Problem("recipe", message, name))
    if not differing:
        headers = [with_hash(layout, total.hexdigest()).header for layout in layouts]
        _compare_headers(checkpoint.files, headers, entries, found)


class _Comparison:
    """A sink that compares what it is given with a checkpoint, tensor by tensor.

    first  tensor -> the first element that differs
    """

    def __init__(self, layout: Layout, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._specs = [spec for spec in layout.specs if spec.nbytes]
        self._starts = [layout.starts[spec.name] for spec in self._specs]
        self._lock = threading.Lock()
        self.first: dict[str, int] = {}

    def write(self, data: memoryview, offset: int) -> None:
        """Compare `data`, which belongs at byte `offset` of the planned file."""
        number = bisect_right(self._starts, offset) - 1
        while data:
            spec, inside = self._specs[number], offset - self._starts[number]
            piece = data[: spec.nbytes - inside]
            stored = bytearray(len(piece))
            self._checkpoint.read_into(spec.name, memoryview(stored), inside)
            if stored != piece:
                self._note(spec, inside + _first_difference(stored, piece))
            data, offset, number = data[len(piece) :], offset + len(piece), number + 1

    def _note(self, spec: TensorSpec, byte: int) -> None:
        element = byte * 8 // DTYPES[spec.dtype].bits
        with self._lock:  # pieces of a tensor may come in any order
            self.first[spec.name] = min(element, self.first.get(spec.name, element))


def _first_difference(one: bytearray, other: memoryview) -> int:
    import numpy as np

    return int(np.argmax(np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8)))


def _compare_headers(
    files: Sequence[SourceFile],
    headers: Sequence[bytes],
    entries: Mapping[str, str],
    found: _Findings,
) -> None:
    """The values are the recipe's; are the files so to the byte?"""
    planned = [hashlib.sha256(header).hexdigest() for header in headers]
    if planned == [file.header.sha256 for file in files]:
        found.checked.append("same bytes as the recipe makes")
        return
    found.checked.append("same values as the recipe makes")
    metadata = files[0].header.metadata
    keys = sorted(
        key
        for key in metadata.keys() | entries.keys()
        if key != HASH_KEY and metadata.get(key) != entries.get(key)
    )
    what = f"in metadata: {', '.join(keys)}" if keys else "in the order of tensors or in padding"
    message = f"all tensors are what the recipe makes; the header differs {what}"
    found.warnings.append(Problem("recipe-header", message))
