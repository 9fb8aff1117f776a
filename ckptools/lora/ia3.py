"""(IA)³: every row, or every input channel, of the weight times a number."""

from __future__ import annotations

import math
import re
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
    """W * (1 + strength * w), w along the input channels or along the rows.

    weight      (out, in[, kh, kw])
    ia3_weight, on_input  LyCORIS: w, and whether it is along the inputs
    ia3_l       PEFT: 1 + w; `settings["on_input"]` says where (a feed-forward module: the inputs)
    Source: Liu et al. 2022, arXiv 2205.05638, section 3.3; LyCORIS 4.1, modules/ia3.py
    (_ia3_weight); PEFT 0.21, tuners/ia3/layer.py (merge).
    """
    del scale
    change = _change(parts, weight)
    axis = 1 if _on_input(parts, settings) else 0
    if change.numel() != weight.shape[axis]:
        side = "input channels" if axis else "rows"
        raise InputError(
            f"the (IA)³ is for {change.numel()} {side}, the weight is {list(weight.shape)}",
            fix="use the base model it was trained for",
        )
    shape = [1] * weight.dim()
    shape[axis] = weight.shape[axis]
    return weight.to(change.dtype) * (1.0 + strength * change.reshape(shape))


def bias(
    weight: Tensor,
    parts: Mapping[str, Tensor],
    *,
    scale: float,
    strength: float,
    settings: Settings,
) -> Tensor:
    """Bias * (1 + strength * w) for PEFT's rows: it scales the layer's output, bias and all.

    weight  the layer's bias, (out)
    LyCORIS scales the weight alone. Source: PEFT 0.21, tuners/ia3/layer.py (merge); LyCORIS 4.1,
    modules/ia3.py (get_merged_weight returns no bias).
    """
    del scale, settings
    change = _change(parts, weight)
    return weight.to(change.dtype) * (1.0 + strength * change.reshape(weight.shape))


def _change(parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    held = in_float(
        {part: parts[part] for part in ("ia3_weight", "ia3_l") if part in parts}, weight
    )
    return held["ia3_weight"] if "ia3_weight" in held else held["ia3_l"] - 1.0


def _on_input(parts: Mapping[str, Tensor], settings: Settings) -> bool:
    return bool(parts["on_input"].item()) if "on_input" in parts else bool(settings["on_input"])


def measure(shapes: Shapes, config: Mapping[str, object], name: str) -> Measure:
    """Rows or columns from the vector; PEFT's convolutions need the config to tell which.

    Source: PEFT 0.21, tuners/ia3/model.py, _check_target_module_feedforward; layer.py,
    update_layer: (1, in) or (out, 1) for linear layers, (1, n, 1, 1) for convolutions.
    """
    if "on_input" in shapes:
        if math.prod(shapes["on_input"]) != 1:
            raise InputError(f"on_input is {list(shapes['on_input'])}; it should be one number")
        return Measure(channels=math.prod(shapes["ia3_weight"]))
    shape = shapes["ia3_l"]
    if len(shape) == 2 and 1 in shape:
        on_input = shape[0] == 1 and shape[1] != 1
    elif "feedforward_modules" in config:
        on_input = _is_feedforward(config["feedforward_modules"], name)
    else:
        raise InputError(
            f"ia3_l is {list(shape)}, which may scale inputs or outputs",
            fix="put the adapter_config.json beside the file",
        )
    size = math.prod(shape)
    return Measure(
        rows=None if on_input else size,
        inputs=size if on_input else None,
        bias="no" if on_input else "if-any",
        settings={"on_input": float(on_input)},
    )


def _is_feedforward(modules: object, name: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    if isinstance(modules, list | tuple):
        return any(isinstance(end, str) and name.endswith(end) for end in modules)
    return False


KIND = register(
    Kind(
        name="ia3",
        title="(IA)³",
        formula="W * (1 + s * w)",
        source="Liu et al. 2022, arXiv 2205.05638; LyCORIS; PEFT",
        layouts=(Layout(("ia3_weight", "on_input")), Layout(("ia3_l",))),
        measure=measure,
        apply=apply,
        bias=bias,
    )
)
