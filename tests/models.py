"""Small model files for tests, always written by the official safetensors library.

Specs come from the layouts of public models (`tests/layouts`); values are seeded noise.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ckptools.tensors import DTYPES, TensorSpec

LAYOUTS = Path(__file__).parent / "layouts"
UNET = "model.diffusion_model."
Specs = dict[str, TensorSpec]


def layout(name: str) -> Specs:
    """The tensors of a public model ("sd1", "sdxl-refiner" …) as its header lists them.

    All are called F16, but `position_ids`, which are I64 as in the public files.
    """
    specs: Specs = {}
    for line in gzip.decompress((LAYOUTS / f"{name}.txt.gz").read_bytes()).decode().splitlines():
        tensor, _, dims = line.partition("\t")
        dtype = "I64" if tensor.endswith("position_ids") else "F16"
        specs[tensor] = TensorSpec(tensor, dtype, tuple(map(int, dims.split(","))) if dims else ())
    return specs


def shrunk(name: str, factor: int = 32) -> Specs:
    """The layout `name` with every width divided by `factor` (a power of two up to 64).

    Names, depths, input channels, kernels and sequence lengths stay; widths keep their relations,
    so the family and the variant are still told. At 32, sd1 and sd2 have about a million values,
    sdxl about three; at 8, sixteen times as many.
    """
    return {
        tensor: TensorSpec(tensor, spec.dtype, tuple(_narrowed(n, factor) for n in spec.shape))
        for tensor, spec in layout(name).items()
    }


def _narrowed(size: int, factor: int) -> int:
    return size // factor if size >= 128 and size % factor == 0 else size


def with_channels(specs: Specs, channels: int) -> Specs:
    """The same UNet for another number of input channels: 9 inpainting, 8 ip2p."""
    name = f"{UNET}input_blocks.0.0.weight"
    spec = specs[name]
    return specs | {name: TensorSpec(name, spec.dtype, (spec.shape[0], channels, *spec.shape[2:]))}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors as they are; returns `path`."""
    save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    return path


def write_model(
    path: Path,
    specs: Mapping[str, TensorSpec],
    *,
    seed: int,
    dtype: str = "",
    metadata: Mapping[str, str] | None = None,
    edits: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the specs with the values of `model_values`; returns `path`.

    edits  tensors to write in place of, or beside, those of the specs
    """
    return write_tensors(path, model_values(specs, seed=seed, dtype=dtype) | dict(edits or {}),
                         metadata)  # fmt: skip


def model_values(
    specs: Mapping[str, TensorSpec], *, seed: int, dtype: str = ""
) -> dict[str, Tensor]:
    """Seeded values for specs: normal floats, `position_ids` counting, other integers 0 to 9.

    dtype  of all floats, as a header spells it ("BF16"); default: as the specs say
    A tensor's values depend on its name, shape, dtype and the seed, not on its neighbours.
    """
    return {name: _values(spec, seed, dtype) for name, spec in specs.items()}


def _values(spec: TensorSpec, seed: int, dtype: str) -> Tensor:
    if spec.name.endswith("position_ids"):
        return torch.arange(spec.numel).reshape(spec.shape)
    key = zlib.crc32(f"{seed}:{spec.name}".encode())  # torch's CPU generator keeps 32 bits
    generator = torch.Generator().manual_seed(key)
    kind = torch_dtype(dtype if dtype and spec.is_float else spec.dtype)
    if spec.is_float:
        return torch.randn(spec.shape, generator=generator).to(kind)
    return torch.randint(0, 10, spec.shape, generator=generator).to(kind)


def torch_dtype(name: str) -> torch.dtype:
    """`torch.float16` for "F16"; fails for a dtype that torch has not."""
    found = getattr(torch, DTYPES[name].torch_name)
    assert isinstance(found, torch.dtype)
    return found
