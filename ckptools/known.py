"""What whole models of a family hold: names and shapes, and what loaders do without.

The lists stand in `families/tensors/`, written by `tools/tensor_lists.py`. No file is opened here.
"""

from __future__ import annotations

import gzip
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ckptools.family import Detection, family_of, load_families

_LISTS = Path(__file__).parent / "families" / "tensors"


@dataclass(frozen=True)
class Known:
    """One tensor of whole models; `may_lack`: loaders do without it."""

    shape: tuple[int, ...]
    may_lack: bool


def known_tensors(detection: Detection, names: Collection[str]) -> Mapping[str, Known]:
    """What whole models of this kind hold, by their usual names; {} where that is not known.

    names  of the file: of the lists of the family and its variant, the one that has most names in
           common with them is taken
    """
    if detection.family is None:
        return {}
    family = load_families()[detection.family]
    present = {family.canonical_name(name) for name in names}
    best: Mapping[str, Known] = {}
    for stem in (f"{family.id}.{detection.variant}", family.id):
        for name in (stem, f"{stem}.{detection.layout}", f"{stem}.diffusers", f"{stem}.openclip"):
            found = tensor_list(name)
            if detection.kind == "text_encoder":  # may stand under any prefix
                prefix = _prefix(found, present)
                found = {prefix + tensor: known for tensor, known in found.items()}
            found = {family.canonical_name(tensor): known for tensor, known in found.items()}
            if len(present & found.keys()) > len(present & best.keys()):
                best = found
    return best


def missing_of(known: Mapping[str, Known], present: Collection[str]) -> tuple[str, ...]:
    """What loaders need of the known tensors and is not among those present, sorted."""
    return tuple(
        sorted(name for name, one in known.items() if name not in present and not one.may_lack)
    )


def incomplete_parts(detection: Detection, names: Collection[str]) -> Mapping[str, tuple[str, ...]]:
    """Component -> what loaders need of it and the file lacks; for those that are there in part."""
    family = family_of(detection)
    own = {family.canonical_name(name) for name in names}
    held = {family.component_of(name) for name in own} - {"other"}
    lacking: dict[str, tuple[str, ...]] = {}
    for name in missing_of(known_tensors(detection, own), own):
        component = family.component_of(name)
        if component in held:
            lacking[component] = (*lacking.get(component, ()), name)
    return lacking


@cache
def tensor_list(name: str) -> Mapping[str, Known]:
    """A list by its name, `family[.variant][.layout]`; {} where there is none."""
    path = _LISTS / f"{name}.txt.gz"
    if not path.is_file():
        return {}
    found = {}
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        tensor, dims, *rest = line.split("\t")
        shape = tuple(map(int, dims.split(","))) if dims else ()
        found[tensor] = Known(shape, may_lack=bool(rest))
    return found


def _prefix(known: Iterable[str], present: Collection[str]) -> str:
    """What stands before the known names in a file: found at the first of them that is there."""
    for tail in known:
        for name in present:
            if name.endswith(tail) and name[: -len(tail)][-1:] in ("", "."):
                return name[: -len(tail)]
    return ""
