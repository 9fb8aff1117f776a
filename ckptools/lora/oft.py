"""OFT: the weight turned by a block-diagonal rotation. And PEFT's, which turns the inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptools.errors import InputError
from ckptools.lora.kinds import Kind, Layout, Measure, Settings, Shapes, register
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
    """Each block of rows turned by its R, then scaled: rescale * Rᵀ W, or W Rᵀ for PEFT.

    weight      (out, in[, kh, kw])
    oft_blocks  (blocks, size, size) with blocks * size = out: Q = B - Bᵀ, R = (I + Q)(I - Q)⁻¹;
                where alpha > 0, Q is shortened to the norm alpha * out
    oft_diag    (blocks, size, size): R itself, as LyCORIS 2.0 wrote it
    rescale     (out, 1[, 1, 1]) or (blocks, size, 1): a factor for every row
    oft_R       (blocks or 1, size * (size - 1) / 2): PEFT's; the blocks are of input columns
    strength    R becomes I + strength * (R - I), rescale becomes 1 + strength * (rescale - 1)
    Source: Qiu et al. 2023, arXiv 2306.07280; kohya sd-scripts networks/oft.py; LyCORIS 4.1,
    functional/diag_oft.py and modules/diag_oft.py (make_weight; it leaves rescale whole at any
    multiplier, so that its 0 is not W); LyCORIS 4daf1b6 for oft_diag; PEFT 0.21,
    tuners/oft/layer.py (which knows no strength).
    """
    del scale
    held = in_float(parts, weight)
    base = weight.to(held[_main(parts)].dtype)
    if "oft_R" in held:
        return _turn_inputs(base, _peft_rotation(held["oft_R"], settings), strength)
    if "oft_diag" in held:
        rotation = held["oft_diag"]
    else:
        limit = float(held["alpha"]) * base.shape[0] if "alpha" in held else 0.0
        rotation = cayley(held["oft_blocks"], limit)
    rotation = towards_identity(rotation, strength)
    return rescaled(_turn_rows(base, rotation), held, strength)


def cayley(blocks: Tensor, limit: float) -> Tensor:
    """R = (I + Q)(I - Q)⁻¹, Q = B - Bᵀ, for every block (…, size, size).

    limit  > 0: Q, over all blocks, is shortened to this norm
    Source: LyCORIS 4.1, functional/diag_oft.py, get_r; kohya's differs by 1e-8 in the norm.
    Solved in fp64, since fp32 inverses of small blocks lose more than a digit.
    """
    import torch

    q = (blocks - blocks.transpose(-1, -2)).double()
    if limit > 0.0:
        norm = torch.linalg.vector_norm(q) + 1e-8
        if norm > limit:
            q = q * (limit / norm)
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    rotation: Tensor = torch.linalg.solve(eye - q, eye + q, left=False)
    return rotation.to(blocks.dtype)


def towards_identity(rotation: Tensor, strength: float) -> Tensor:
    """I + strength * (R - I); R itself at strength 1."""
    import torch

    if strength == 1.0:
        return rotation
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype)
    return rotation * strength + eye * (1.0 - strength)


def rescaled(weight: Tensor, parts: Mapping[str, Tensor], strength: float) -> Tensor:
    """Every row times 1 + strength * (rescale - 1), where there is a rescale."""
    if "rescale" not in parts:
        return weight
    factor = parts["rescale"].reshape(-1, *[1] * (weight.dim() - 1))
    return weight * (1.0 + strength * (factor - 1.0))


def _turn_rows(weight: Tensor, rotation: Tensor) -> Tensor:
    """Block k of rows times the transpose of R[k].

    Source: kohya networks/oft.py (merge_to): "k n m, k n ... -> k m ...".
    """
    import torch

    blocks, size = rotation.shape[:2]
    flat = weight.reshape(blocks, size, -1)
    return torch.bmm(rotation.transpose(1, 2), flat).reshape(weight.shape)


def _turn_inputs(weight: Tensor, rotation: Tensor, strength: float) -> Tensor:
    """W Rᵀ by blocks of columns; one rotation may be shared by all blocks."""
    import torch

    rotation = towards_identity(rotation, strength)
    flat = weight.reshape(weight.shape[0], -1, rotation.shape[-1])  # (out, blocks, size)
    rotation = rotation.expand(flat.shape[1], -1, -1)
    return torch.einsum("orc,rkc->ork", flat, rotation).reshape(weight.shape)


def _peft_rotation(vectors: Tensor, settings: Settings) -> Tensor:
    """R of PEFT's upper triangles, (blocks, size, size).

    Source: PEFT 0.21, tuners/oft/layer.py: _cayley_batch (a Neumann series, or exact),
    _project_batch (COFT).
    """
    import torch

    size = _block_size(vectors.shape[1])
    q = vectors.new_zeros((vectors.shape[0], size, size))
    row, column = torch.triu_indices(size, size, 1)
    q[:, row, column] = vectors
    q = q - q.transpose(1, 2)
    if settings["coft_eps"] > 0.0:
        limit = settings["coft_eps"] / math.sqrt(q.shape[0])
        norm = torch.linalg.vector_norm(q, dim=(1, 2), keepdim=True)
        q = torch.where(norm <= limit, q, q * (limit / norm))
    eye = torch.eye(size, dtype=q.dtype)
    terms = int(settings["neumann_terms"])
    if terms == 0:
        exact: Tensor = torch.linalg.solve((eye + q).double(), (eye - q).double(), left=False)
        return exact.to(q.dtype)
    total, power = eye.expand_as(q), eye.expand_as(q)
    last = max(terms - 1, 3) if terms > 2 else terms - 1
    for exponent in range(1, last + 1):
        power = power @ q
        total = total + power * (1.0 if exponent == last and terms > 2 else 2.0)
    return total


def _block_size(count: int) -> int:
    """The size whose upper triangle has `count` numbers."""
    return (1 + math.isqrt(1 + 8 * count)) // 2


def _main(parts: Mapping[str, object]) -> str:
    return next(part for part in ("oft_blocks", "oft_diag", "oft_R") if part in parts)


def measure(shapes: Shapes, config: Mapping[str, object], name: str) -> Measure:
    """Rows (PEFT: columns) from the blocks."""
    del name
    part = _main(shapes)
    shape = shapes[part]
    if part == "oft_R":
        return _measure_peft(shape, config)
    if len(shape) != 3 or shape[1] != shape[2]:
        raise InputError(f"{part} is {list(shape)}; it should be (blocks, size, size)")
    out = shape[0] * shape[1]
    if "rescale" in shapes and math.prod(shapes["rescale"]) != out:
        raise InputError(f"rescale is {list(shapes['rescale'])}, {part} is for {out} rows")
    return Measure(rows=out)


def _measure_peft(shape: tuple[int, ...], config: Mapping[str, object]) -> Measure:
    if len(shape) != 2 or _block_size(shape[1]) * (_block_size(shape[1]) - 1) // 2 != shape[1]:
        raise InputError(f"oft_R is {list(shape)}; its rows should be upper triangles")
    if "use_cayley_neumann" not in config:
        raise InputError(
            "oft_R says nothing of its rotation, and use_cayley_neumann is not in the config",
            fix="put the adapter_config.json beside the file",
        )
    terms = config.get("num_cayley_neumann_terms", 5) if config["use_cayley_neumann"] else 0
    eps = config.get("eps", 6e-5) if config.get("coft") else 0.0
    if not isinstance(terms, int) or terms < 0 or not isinstance(eps, int | float):
        raise InputError(f"num_cayley_neumann_terms is {terms!r}, eps {eps!r}: not numbers")
    shared = bool(config.get("block_share"))
    size = _block_size(shape[1])
    return Measure(
        columns=None if shared else shape[0] * size,
        block=size,
        settings={"neumann_terms": float(terms), "coft_eps": float(eps)},
    )


def _matches(shapes: Shapes) -> bool:
    return len(shapes.get("oft_blocks", (1, 1, 1))) != 4


KIND = register(
    Kind(
        name="oft",
        title="OFT",
        formula="rescale * Rᵀ W, R = (I + Q)(I - Q)⁻¹ by blocks",
        source="Qiu et al. 2023, arXiv 2306.07280; kohya sd-scripts; LyCORIS; PEFT",
        layouts=(
            Layout(("oft_blocks",), ("rescale",)),
            Layout(("oft_diag",), ("rescale",)),
            Layout(("oft_R",)),
        ),
        measure=measure,
        apply=apply,
        matches=_matches,
    )
)
