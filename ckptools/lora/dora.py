"""DoRA: weight decomposition on top of any additive kind. Direction from W + ΔW, length learnt."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from ckptools.errors import InputError
from ckptools.lora.precision import in_float

if TYPE_CHECKING:
    from torch import Tensor

Axis = Literal["rows", "columns"]
Reading = Literal["trained", "comfy"]

# torch.finfo(torch.float32).eps, whatever we compute in: what the trainer had.
LYCORIS_EPS = 1.1920928955078125e-07


def axis_of(part: str, magnitude: tuple[int, ...], weight: tuple[int, ...]) -> Axis:
    """Whether a magnitude belongs to the weight's rows or to its input columns.

    part       "magnitude" (PEFT's lora_magnitude_vector: (out), or (1, out, 1, 1) for
               convolutions, (width) for embeddings) or "dora_scale" (LyCORIS, kohya:
               (out, 1[, 1, 1]) or, with wd_on_out=False, (1, in[, 1, 1]))
    magnitude  its shape
    weight     (out, in[, kh, kw])
    Where a dora_scale (1, n, …) fits both, it is LyCORIS' columns: PEFT keeps its own name.
    """
    size = math.prod(magnitude)
    rows, columns = weight[0], weight[1] if len(weight) > 1 else 1
    if size == rows and (part == "magnitude" or magnitude[0] == rows):
        return "rows"
    if size == columns:
        return "columns"
    if size == rows:
        return "rows"
    raise InputError(f"{part} is {list(magnitude)}, the weight {list(weight)}")


def decompose(
    weight: Tensor,
    delta: Tensor,
    magnitude: Tensor,
    *,
    part: str,
    strength: float = 1.0,
    reading: Reading = "trained",
) -> Tensor:
    """W + strength * (V * magnitude / ‖V‖ - W), V = W + delta.

    weight     (out, in[, kh, kw])
    delta      scale * ΔW at full strength, of the weight's shape
    magnitude  as `axis_of` says; the norm is over everything but that axis
    reading    "trained": ‖W + ΔW‖, as LyCORIS and PEFT define and train it. "comfy": ‖W‖ where
               the magnitude belongs to rows, as ComfyUI and Forge show it
    At strength 1 this is what was trained; at 0 it is W; in between a straight line, as every
    user interface does it. (LyCORIS' multiplier leaves ΔW whole, PEFT's the magnitude, so that
    their 0 is not W.) Rows of length zero stay zero.
    Source: Liu et al. 2024, arXiv 2402.09353, equation 5; LyCORIS 4.1, functional/general.py
    (_weight_decompose, which adds eps to the norm); PEFT 0.21, tuners/lora/dora.py
    (get_weight_norm, which does not).
    """
    import torch

    held = in_float({"delta": delta, "magnitude": magnitude}, weight)
    base = weight.to(held["delta"].dtype)
    axis = axis_of(part, tuple(magnitude.shape), tuple(weight.shape))
    keep = 0 if axis == "rows" else 1
    changed = base + held["delta"]
    measured = base if reading == "comfy" and axis == "rows" else changed
    norm = torch.linalg.vector_norm(
        measured, dim=[d for d in range(base.dim()) if d != keep], keepdim=True
    )
    if part == "dora_scale":
        norm = norm + LYCORIS_EPS
    gain = held["magnitude"].reshape(norm.shape) / torch.where(norm == 0.0, 1.0, norm)
    if strength == 1.0:
        return changed * gain
    return base * (1.0 - strength) + (changed * gain) * strength
