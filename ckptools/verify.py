"""Is the file that was written the file that was planned?

Looks at it from outside: through the official safetensors library, and by computing a sample of
its tensors again.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ckptools.checkpoint import read_header
from ckptools.engine import Settings, Source, Task, recompute
from ckptools.errors import VerificationError, counted
from ckptools.writer import Layout, PartFile

SAMPLE_TENSORS = 12
SAMPLE_BYTES = 48_000_000


def check_structure(path: Path, layout: Layout) -> None:
    """Compare names, dtypes, shapes, offsets and metadata of a file with its layout.

    Read twice, by the official library and by our own reader; `VerificationError` names the
    first difference.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as opened:
            found = set(opened.keys())
            for spec in layout.specs:
                if spec.name not in found:
                    raise VerificationError("missing in the written file", where=spec.name)
                view = opened.get_slice(spec.name)
                dtype, shape = view.get_dtype(), tuple(view.get_shape())
                if (dtype, shape) != (spec.dtype, spec.shape):
                    raise VerificationError(
                        f"written as {dtype} {list(shape)}, planned as {spec}", where=spec.name
                    )
    except SafetensorError as exc:
        raise VerificationError(
            f"the safetensors library cannot read it: {exc}", where=str(path)
        ) from exc
    if len(found) != len(layout.specs):
        raise VerificationError(
            f"{counted(len(found) - len(layout.specs), 'tensor')} too many", where=str(path)
        )
    header = read_header(path)
    if header.sha256 != hashlib.sha256(layout.header).hexdigest():
        raise VerificationError("the header is not the planned one", where=str(path))
    if dict(header.starts) != dict(layout.starts) or header.file_bytes != layout.file_bytes:
        raise VerificationError("tensors are not where they were planned", where=str(path))


def check_part(
    part: PartFile,
    layout: Layout,
    tasks: Sequence[Task],
    *,
    seed: str,
    sources: Sequence[Source],
    labels: Sequence[str],
    settings: Settings,
) -> int:
    """Wait until a part is on the disk, and check it; how many tensors were computed again.

    layout  what its header says by now
    seed    of the sample of tensors, computed again while the disk is waited for
    """
    sample = _sample(tasks, seed)
    with ThreadPoolExecutor(1) as disk:
        flushed = disk.submit(part.sync)
        check_structure(layout.part, layout)
        expected = [
            (task, start, len(data), hashlib.sha256(data).digest())
            for task in sample
            for start, data in recompute(task, sources=sources, labels=labels, settings=settings)
        ]
        flushed.result()
    with layout.part.open("rb") as stream:
        for task, start, nbytes, digest in expected:
            stream.seek(start)
            if hashlib.sha256(stream.read(nbytes)).digest() != digest:
                raise VerificationError(
                    "the written values differ from the computed ones",
                    where=task.spec.name,
                    fix="check the disk and the memory of this machine, then merge again",
                )
    return len(sample)


def _sample(tasks: Sequence[Task], seed: str) -> list[Task]:
    """A seeded sample of tasks, small enough to be computed again in a moment."""
    order = list(tasks)
    random.Random(seed).shuffle(order)
    sample: list[Task] = []
    budget = SAMPLE_BYTES
    for task in order:
        if task.spec.nbytes <= budget and len(sample) < SAMPLE_TENSORS:
            sample.append(task)
            budget -= task.spec.nbytes
    return sample
