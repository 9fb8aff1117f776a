"""GLoRA: a low-rank change of the weight's inputs, and a LoRA, in one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptools.errors import InputError
from ckptools.lora.kinds import (
    Kind,
    Layout,
    Measure,
    Settings,
    Shapes,
    kernel_of,
    matrix,
    register,
    same_rank,
)
from ckptools.lora.precision import in_float

if TYPE_CHECKING:
    from torch import Tensor


def apply(
    weight: Tensor,
    parts: Mapping[str, Tensor],
    *,
    scale: float,
    strength: float,
    settings: Settings,
) -> Tensor:
    """W + strength * scale * (W·a1·a2 + b1 @ b2), products over the input channels.

    weight  (out, in[, kh, kw])
    a1      (in, rank), a2 (rank, in), b1 (out, rank), b2 (rank, in[, kh, kw]), all [, 1, 1]
    bm      (rank, rank, kh, kw) with b2 (rank, in): Tucker
    Old layout (`settings["old"]`, told by the shapes): a1 and a2, b1 and b2 change places.
    Source: Chavan et al. 2023, arXiv 2306.07967; LyCORIS 4.1, modules/glora.py (_glora_weight);
    the old layout as LyCORIS 1.x wrote it.
    """
    import torch

    held = in_float({part: parts[part] for part in _PARTS if part in parts}, weight)
    a1, a2, b1, b2 = (held[part] for part in _order(bool(settings.get("old"))))
    base = weight.to(a1.dtype)
    flat = base.flatten(2) if base.dim() > 2 else base[:, :, None]  # (out, in, kh*kw)
    product = torch.einsum("oik,ij->ojk", flat, a1.flatten(1))
    product = torch.einsum("ojk,jl->olk", product, a2.flatten(1))
    down = b2.flatten(1)
    if "bm" in held:
        down = torch.einsum("mnk,nj->mjk", held["bm"].flatten(2), down).flatten(1)
    change = product.reshape(base.shape) + (b1.flatten(1) @ down).reshape(base.shape)
    return base + change * (scale * strength)


def _order(old: bool) -> tuple[str, str, str, str]:
    return ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")


def measure(shapes: Shapes, config: Mapping[str, object], name: str) -> Measure:
    """Rank, size and layout.

    For a square layer both layouts may fit; then the one of the smaller rank is meant, and the new
    one where the rank is the layer's width.
    """
    del config, name
    found: list[tuple[int, bool]] = []
    for old in (False, True):
        a1, a2, b1, b2 = (matrix(shapes, part) for part in _order(old))
        if a1[1] == a2[0] == b1[1] == b2[0] and a1[0] == a2[1]:
            found.append((a1[1], old))
    if not found:
        told = ", ".join(f"{part} {list(shapes[part])}" for part in ("a1", "a2", "b1", "b2"))
        raise InputError(f"the parts fit neither layout of GLoRA: {told}")
    rank, old = min(found)
    a1, a2, b1, b2 = (matrix(shapes, part) for part in _order(old))
    columns = b2[1]
    if "bm" in shapes:
        core = shapes["bm"]
        if len(core) < 3:
            raise InputError(f"bm is {list(core)}; it should be a kernel")
        same_rank(b1=rank, bm=core[0], **{"bm's second axis": core[1]})
        columns *= math.prod(core[2:])
    if columns % a1[0]:
        raise InputError(f"a is for {a1[0]} inputs, b for {columns} columns")
    return Measure(
        rank=rank,
        rows=b1[0],
        columns=columns,
        inputs=a1[0],
        kernel=kernel_of(shapes["bm" if "bm" in shapes else _order(old)[3]]),
        settings={"old": float(old)},
    )


_PARTS = ("a1", "a2", "b1", "b2", "bm")

KIND = register(
    Kind(
        name="glora",
        title="GLoRA",
        formula="W + s * alpha / rank * (W @ a1 @ a2 + b1 @ b2)",
        source="Chavan et al. 2023, arXiv 2306.07967; LyCORIS",
        layouts=(Layout(("a1", "a2", "b1", "b2"), ("bm",)),),
        measure=measure,
        apply=apply,
        scaled=True,
    )
)
