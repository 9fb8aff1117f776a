"""Which tensors are no numbers on their own: weights stored as codes, their scales beside them.

Told by names and dtypes alone. Sources of the names: ComfyUI, `QUANTIZATION.md` and `ops.py`
(scale_weight, weight_scale); bitsandbytes, `functional.py`, QuantState (absmax) and `nn/modules.py`
(SCB); AutoGPTQ and AutoAWQ (qweight, qzeros); compressed-tensors (weight_packed); DeepSeek-V3
(weight_scale_inv).
"""

from __future__ import annotations

from collections.abc import Mapping

from ckptools.errors import InputError, counted
from ckptools.tensors import TensorSpec

# Ends of names: of a tensor of scales → of the weights that it belongs to, and how they are stored.
_SCALES: Mapping[str, tuple[str, str]] = {
    ".scale_weight": (".weight", "scaled fp8"),
    ".weight_scale": (".weight", "scaled 8 or 4 bits"),
    ".weight_scale_inv": (".weight", "fp8 scaled in blocks"),
    ".weight.absmax": (".weight", "4 bits of bitsandbytes"),
    ".SCB": (".weight", "8 bits of bitsandbytes"),
    ".qzeros": (".qweight", "GPTQ or AWQ"),
    ".scales": (".qweight", "GPTQ or AWQ"),
    ".weight_shape": (".weight_packed", "packed integers"),
}
_SUFFIXES = tuple(_SCALES)
_NUMBERS = frozenset({"F16", "BF16", "F32", "F64"})  # scales of such weights are a layer's own


def quantised_in(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The tensors of a file that mean something only together → how they are stored, in words.

    The weights and all that is beside them in their module, biases left aside; {} for a file of
    plain numbers, those of unscaled fp8 included.
    """
    modules: dict[str, str] = {}
    for scales in specs:
        if not scales.endswith(_SUFFIXES):
            continue
        suffix = next(end for end in _SUFFIXES if scales.endswith(end))
        tail, stored = _SCALES[suffix]
        weights = specs.get(scales.removesuffix(suffix) + tail)
        if weights is None:
            continue
        if weights.dtype not in _NUMBERS or suffix == ".weight.absmax":
            modules[scales.removesuffix(suffix)] = stored
    if not modules:
        return {}
    found = {}
    for name in specs:
        module = next((above for above in _parents(name) if above in modules), None)
        if module is not None and name != f"{module}.bias":
            found[name] = modules[module]
    return found


def not_numbers(found: Mapping[str, str]) -> InputError:
    """The error of calculating with some of the tensors that `quantised_in` found."""
    first = min(found)
    return InputError(
        f"{counted(len(found), 'tensor', 'holds')} {found[first]}: codes that are no numbers "
        f"without their scales, such as {first}",
        fix="use the model's release in fp16 or bf16",
    )


def _parents(name: str) -> list[str]:
    """What stands before each "." of a name, the longest first."""
    words = name.split(".")
    return [".".join(words[:end]) for end in range(len(words) - 1, 0, -1)]
