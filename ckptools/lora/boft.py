"""BOFT: the weight turned by a butterfly of block-diagonal rotations. And PEFT's, on the inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptools.errors import InputError
from ckptools.lora.kinds import Kind, Layout, Measure, Settings, Shapes, register
from ckptools.lora.oft import cayley, rescaled, towards_identity
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
    """Stage after stage, blocks of shuffled rows turned by their R; then scaled.

    weight      (out, in[, kh, kw])
    oft_blocks  (stages, blocks, size, size) with blocks * size = out; R and alpha as in OFT. Stage
                i mixes rows that lie 2^i * size / 2 apart
    rescale     (out, 1[, 1, 1]): a factor for every row
    boft_R      (stages, blocks, size, size), blocks * size = in * kh * kw: PEFT's, of the columns,
                with Q = (Bᵀ - B) / 2; boft_s (out, 1) is its rescale
    strength    every stage's R becomes I + strength * (R - I), as LyCORIS has it
    Source: Liu et al. 2023, arXiv 2311.06243, section 4; LyCORIS 4.1, functional/boft.py
    (_diff_weight); PEFT 0.21, tuners/boft/layer.py (get_delta_weight, merge).
    """
    del scale, settings
    if "boft_R" in parts:
        return _peft(weight, parts, strength)
    held = in_float(parts, weight)
    base = weight.to(held["oft_blocks"].dtype)
    limit = float(held["alpha"]) * base.shape[0] if "alpha" in held else 0.0
    rotation = towards_identity(cayley(held["oft_blocks"], limit), strength)
    turned = _stages(base.reshape(base.shape[0], -1), rotation, 1)
    return rescaled(turned.reshape(base.shape), held, strength)


def _peft(weight: Tensor, parts: Mapping[str, Tensor], strength: float) -> Tensor:
    held = in_float(parts, weight)
    base = weight.to(held["boft_R"].dtype)
    rotation = towards_identity(cayley(held["boft_R"] * -0.5, 0.0), strength)
    columns = base.reshape(base.shape[0], -1).T  # (in*kh*kw, out)
    chunk = max(1, rotation.shape[-1] // 2)
    turned = _stages(columns, rotation, chunk).T.reshape(base.shape)
    return rescaled(turned, {"rescale": held["boft_s"]}, strength)


def _stages(rows: Tensor, rotation: Tensor, chunk: int) -> Tensor:
    """All stages, one after the other, on the first axis of (n, m).

    rotation  (stages, blocks, size, size). Stage i brings together rows that lie
              2^i * size / 2 apart, turns each block of `size`, and puts the rows back
    chunk     how many rows move together: 1 in LyCORIS ("(c g k) -> (c k g)"), size / 2 in PEFT
              (block_butterfly_perm), whose first stage so moves none
    """
    import torch

    size = rotation.shape[-1]
    for stage, blocks in enumerate(rotation):
        order = torch.arange(rows.shape[0])
        if size > 1 and not (chunk > 1 and stage == 0):
            apart = 2**stage * (size // 2)
            order = order.reshape(-1, 2, apart // chunk, chunk).transpose(1, 2).reshape(-1)
        turned = torch.bmm(blocks, rows[order].reshape(-1, size, rows.shape[1]))
        rows = torch.empty_like(rows).index_copy_(0, order, turned.reshape(rows.shape))
    return rows


def measure(shapes: Shapes, config: Mapping[str, object], name: str) -> Measure:
    """Rows (PEFT: rows and columns) from the blocks."""
    del config, name
    part = "boft_R" if "boft_R" in shapes else "oft_blocks"
    shape = shapes[part]
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise InputError(f"{part} is {list(shape)}; it should be (stages, blocks, size, size)")
    stages, blocks, size = shape[:3]
    turned = blocks * size
    plain = part == "boft_R" and stages == 1
    if not plain and (size % 2 or turned % (2**stages * (size // 2))):
        raise InputError(f"{part} is {list(shape)}; {stages} stages need more, or even, blocks")
    if part == "boft_R":
        return Measure(rows=math.prod(shapes["boft_s"]), columns=turned)
    if "rescale" in shapes and math.prod(shapes["rescale"]) != turned:
        raise InputError(f"rescale is {list(shapes['rescale'])}, {part} is for {turned} rows")
    return Measure(rows=turned)


def _matches(shapes: Shapes) -> bool:
    return len(shapes.get("oft_blocks", (1, 1, 1, 1))) == 4


KIND = register(
    Kind(
        name="boft",
        title="BOFT",
        formula="rescale * (product of shuffled block rotations) W",
        source="Liu et al. 2023, arXiv 2311.06243; LyCORIS; PEFT",
        layouts=(Layout(("oft_blocks",), ("rescale",)), Layout(("boft_R", "boft_s"))),
        measure=measure,
        apply=apply,
        matches=_matches,
    )
)
