"""LoRA of linear layers and convolutions: LoRA, LoCon, Tucker LoCon, PEFT's embeddings."""

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


def rows(parts: Mapping[str, Tensor], begin: int, end: int, scale: float = 1.0) -> Tensor:
    """Rows begin:end of scale * up @ down, (end - begin, columns); only those are computed.

    up    (out, rank[, 1, 1])
    down  (rank, in[, kh, kw]); flattened, up @ down is the kernel of conv(up) after conv(down)
    mid   (rank, rank, kh, kw) with down (rank, in[, 1, 1]): Tucker,
          ΔW[i, j] = sum over m, n of mid[m, n] up[i, m] down[n, j]
    embedding_a (rank, tokens), embedding_b (width, rank): PEFT's embedding, up = Aᵀ, down = Bᵀ
    sparse_indices (2, n), sparse_values (n): added after scaling (LyCORIS' extract_locon)
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; LyCORIS 4.1, functional/locon.py
    (diff_weight) and utils/__init__.py (extract_diff); PEFT 0.21, tuners/lora/layer.py.
    """
    sparse = {part: t for part, t in parts.items() if part.startswith("sparse_")}
    factors = in_float({part: parts[part] for part in _FACTORS if part in parts})
    if "embedding_a" in factors:
        up, down = factors["embedding_a"].T, factors["embedding_b"].T
    else:
        up, down = factors["up"].flatten(1), factors["down"].flatten(1)
    height = up.shape[0]
    up = up[begin:end] * scale  # (rows, rank)
    if "mid" in factors:
        import torch

        core = torch.einsum("mnk,nj->mjk", factors["mid"].flatten(2), down)
        down = core.flatten(1)  # (rank, in*kh*kw)
    change = up @ down
    return _add_sparse(change, sparse, begin, height) if sparse else change


_FACTORS = ("up", "down", "mid", "embedding_a", "embedding_b")


def _add_sparse(change: Tensor, sparse: Mapping[str, Tensor], begin: int, rows: int) -> Tensor:
    """Return change, rows from `begin` of all `rows`, plus the values that lie in them."""
    indices = sparse["sparse_indices"].long()
    values = sparse["sparse_values"].to(change.dtype)
    width = change.shape[1]
    inside = (indices >= 0) & (indices < indices.new_tensor([[rows], [width]]))
    if not bool(inside.all()):
        raise InputError(
            f"bias_indices name numbers outside of the weight, {rows} x {width}",
            fix="the file is damaged; download it again, or ask its author",
        )
    here = (indices[0] >= begin) & (indices[0] < begin + change.shape[0])
    where = (indices[0][here] - begin, indices[1][here])
    return change.index_put(where, values[here], accumulate=True)


def bias(
    weight: Tensor,
    parts: Mapping[str, Tensor],
    *,
    scale: float,
    strength: float,
    settings: Settings,
) -> Tensor:
    """Bias + strength * scale * lora_B.bias.

    weight  the layer's bias, (out)
    Source: PEFT 0.21, tuners/lora/layer.py, Linear.merge with `lora_bias`.
    """
    del settings
    change = in_float(parts, weight)["bias"]
    return weight.to(change.dtype) + change.reshape(weight.shape) * (scale * strength)


def measure(shapes: Shapes, config: Mapping[str, object], name: str) -> Measure:
    """Rank and size from the factors; the rank is that of down, as alpha / rank needs it."""
    del config, name
    if "embedding_a" in shapes:
        rank_a, tokens = matrix(shapes, "embedding_a")
        width, rank_b = matrix(shapes, "embedding_b")
        rank = same_rank(lora_embedding_A=rank_a, lora_embedding_B=rank_b)
        return Measure(rank=rank, rows=tokens, columns=width)
    out, up_rank = matrix(shapes, "up")
    rank, columns = matrix(shapes, "down")
    if math.prod(shapes["up"][2:]) != 1:
        raise InputError(f"up is a kernel of {list(shapes['up'])}; only down, or mid, can be one")
    if "mid" in shapes:
        mid = shapes["mid"]
        if len(mid) < 3 or math.prod(shapes["down"][2:]) != 1:
            raise InputError(
                f"mid is {list(mid)}, down {list(shapes['down'])}: mid should be the kernel"
            )
        same_rank(up=up_rank, mid=mid[0])
        same_rank(mid=mid[1], down=rank)
        columns *= math.prod(mid[2:])
        kernel = kernel_of(mid)
    else:
        same_rank(up=up_rank, down=rank)
        kernel = kernel_of(shapes["down"])
    _check_sparse(shapes)
    if "bias" in shapes and math.prod(shapes["bias"]) != out:
        raise InputError(f"the bias is {list(shapes['bias'])}, the weight has {out} rows")
    return Measure(
        rank=rank,
        rows=out,
        columns=columns,
        kernel=kernel,
        bias="needed" if "bias" in shapes else "no",
    )


def _check_sparse(shapes: Shapes) -> None:
    """Two indices, row and column, for each value."""
    indices, values = (shapes.get(part) for part in _SPARSE[:2])
    if indices is None and values is None:
        return
    if indices is None or values is None or len(values) != 1 or indices != (2, *values):
        told = " and ".join(
            f"{name} {'missing' if shape is None else list(shape)}"
            for name, shape in (("bias_indices", indices), ("bias_values", values))
        )
        raise InputError(f"{told}: they should be (2, n) and (n)")


_SPARSE = ("sparse_indices", "sparse_values", "sparse_size")

KIND = register(
    Kind(
        name="lora",
        title="LoRA",
        formula="W + s * alpha / rank * up @ down",
        source="Hu et al. 2021, arXiv 2106.09685; kohya sd-scripts; LyCORIS LoCon; PEFT",
        layouts=(
            Layout(("up", "down"), ("mid", "bias", *_SPARSE)),
            Layout(("embedding_a", "embedding_b")),
        ),
        measure=measure,
        rows=rows,
        bias=bias,
        scaled=True,
        decomposable=True,
    )
)
