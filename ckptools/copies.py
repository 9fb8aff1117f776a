"""A model as a copy of a part of it knows it: a UNet's tensors under a ControlNet's names.

Families say what is a copy of what (`copied`, in `family`). No values here, and no recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod

from ckptools.checkpoint import Checkpoint, Extent, Tensors
from ckptools.errors import InputError
from ckptools.family import Detection, Family, family_of
from ckptools.keymap import key_map
from ckptools.tensors import DTYPES, TensorSpec


def usual_names(specs: Mapping[str, TensorSpec], detection: Detection) -> Callable[[str], str]:
    """What gives a file's tensors the names under which the same tensors go elsewhere.

    Those of the family's makers, for ControlNets in diffusers' names too. A name that has no other
    is its own.
    """
    family = family_of(detection)
    if (detection.kind, detection.layout) != ("controlnet", "diffusers"):
        return family.canonical_name
    names = key_map("_controlnet")
    component = names.components["controlnet"]

    def usual(name: str) -> str:
        theirs = replace(specs[name], name=component.usual_name(name))
        found = names.checkpoint_spec(component.id, theirs)
        return found.name if found is not None else family.canonical_name(name)

    return usual


def as_copy(
    model: Checkpoint,
    names: Mapping[str, str],
    family: Family,
    copy: Mapping[str, TensorSpec],
) -> tuple[Checkpoint, tuple[str, ...]]:
    """A view of the tensors that a copy began as, under the copy's names; and notes on it.

    model   the original: its files are the view's
    names   the usual name of each of its tensors → its own
    family  the copy's
    copy    the copy's tensors by their usual names: where it takes fewer input channels than the
            original (inpainting models take 9), the view has the first ones only

    Raises `InputError` where the model has none of them.
    """
    specs: dict[str, TensorSpec] = {}
    extents: dict[str, tuple[Extent, ...]] = {}
    notes: list[str] = []
    for usual, own in names.items():
        name = family.copy_name(usual)
        if name is None:
            continue
        spec, runs = replace(model[own], name=name), model.extents(own)
        if name in copy and name in family.input_tensors:
            channels = copy[name].shape[1:2]
            if len(runs) == 1 and len(spec.shape) == 4 and channels < spec.shape[1:2]:
                notes.append(f"the first {channels[0]} of {spec.shape[1]} input channels take part")
                spec, runs = _narrowed(spec, runs[0], channels[0])
        specs[name], extents[name] = spec, runs
    if not specs:
        raise InputError(f"no tensors that a {family.title} could be a copy of")
    of_headers = [text for file in model.files for text in file.header.warnings]
    view = Checkpoint(
        model.path,
        model.files,
        model.metadata,
        tensors=Tensors(specs, extents, model.layout),
        warnings=tuple(text for text in model.warnings if text not in of_headers),
    )
    return view, tuple(notes)


def _narrowed(
    spec: TensorSpec, run: Extent, channels: int
) -> tuple[TensorSpec, tuple[Extent, ...]]:
    """The first input channels of a convolution (out, in, height, width)."""
    out, _, *kernel = spec.shape
    narrow = replace(spec, shape=(out, channels, *kernel))
    rows, (_, stride), *inner = run.strides or _contiguous(spec.shape)
    nbytes = narrow.numel * DTYPES[spec.dtype].bits // 8
    return narrow, (replace(run, nbytes=nbytes, strides=(rows, (channels, stride), *inner)),)


def _contiguous(shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(size, stride in elements) of each dim of a tensor whose elements follow one another."""
    return tuple((size, prod(shape[dim + 1 :])) for dim, size in enumerate(shape))
