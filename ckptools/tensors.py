"""TensorSpec and the one dtype table. No torch, no I/O: importing this costs nothing.

Source of names and sizes: safetensors 0.8.0, `safetensors/src/tensor.rs`, enum `Dtype`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["float", "int", "bool", "complex", "packed"]


@dataclass(frozen=True)
class DType:
    """One row of the dtype table.

    name         as a safetensors header spells it: "F16"
    bits         bits per element (sub-byte types are packed)
    order        position in the reference's enum; its writer sorts tensors by this, descending
    kind         "float" values are merged; all others are carried from the base, never averaged
    torch_name   attribute of the torch module, or "" where torch has no such dtype
    recipe_name  how `output.dtype` spells it, or "" where it cannot be an output
    finite_max   largest finite magnitude (float kinds)
    """

    name: str
    bits: int
    order: int
    kind: Kind
    torch_name: str = ""
    recipe_name: str = ""
    finite_max: float = math.inf

    @property
    def is_float(self) -> bool:
        """Whether tensors of this dtype hold numbers that a formula may touch."""
        return self.kind == "float"


_F16_MAX = 65504.0
_BF16_MAX = 3.3895313892515355e38
_F32_MAX = 3.4028234663852886e38

DTYPES: dict[str, DType] = {
    row.name: row
    for row in (
        DType("BOOL", 8, 0, "bool", "bool"),
        DType("F4", 4, 1, "packed"),
        DType("F6_E2M3", 6, 2, "packed"),
        DType("F6_E3M2", 6, 3, "packed"),
        DType("U8", 8, 4, "int", "uint8"),
        DType("I8", 8, 5, "int", "int8"),
        DType("F8_E5M2", 8, 6, "float", "float8_e5m2", "fp8_e5m2", 57344.0),
        DType("F8_E4M3", 8, 7, "float", "float8_e4m3fn", "fp8_e4m3", 448.0),
        DType("F8_E8M0", 8, 8, "packed", "float8_e8m0fnu"),
        DType("F8_E4M3FNUZ", 8, 9, "float", "float8_e4m3fnuz", "", 240.0),
        DType("F8_E5M2FNUZ", 8, 10, "float", "float8_e5m2fnuz", "", 57344.0),
        DType("I16", 16, 11, "int", "int16"),
        DType("U16", 16, 12, "int", "uint16"),
        DType("F16", 16, 13, "float", "float16", "fp16", _F16_MAX),
        DType("BF16", 16, 14, "float", "bfloat16", "bf16", _BF16_MAX),
        DType("I32", 32, 15, "int", "int32"),
        DType("U32", 32, 16, "int", "uint32"),
        DType("F32", 32, 17, "float", "float32", "fp32", _F32_MAX),
        DType("C64", 64, 18, "complex", "complex64"),
        DType("F64", 64, 19, "float", "float64", "", 1.7976931348623157e308),
        DType("I64", 64, 20, "int", "int64"),
        DType("U64", 64, 21, "int", "uint64"),
    )
}

RECIPE_DTYPES: dict[str, str] = {
    row.recipe_name: row.name for row in DTYPES.values() if row.recipe_name
}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (a key of `DTYPES`) and shape of one tensor; no values."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar, 0 for an empty tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data in a file."""
        return self.numel * DTYPES[self.dtype].bits // 8

    @property
    def is_float(self) -> bool:
        """Whether a formula may touch this tensor."""
        return DTYPES[self.dtype].is_float

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def file_order(spec: TensorSpec) -> tuple[int, str]:
    """Sort key of the order in which the reference writes tensors.

    Source: safetensors 0.8.0, `tensor.rs`, `prepare`: dtype descending, then name.
    """
    return (-DTYPES[spec.dtype].order, spec.name)
