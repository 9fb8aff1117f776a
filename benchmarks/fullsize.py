"""Full-size checkpoint files with random weights, made in a stream: real names, real shapes."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np

LAYOUTS = Path(__file__).parent.parent / "tests" / "layouts"
WIDTHS = {"F16": 2, "BF16": 2, "F32": 4}
_CHUNK = 1 << 20


def read_layout(name: str) -> list[tuple[str, list[int]]]:
    """(tensor name, shape) of a public model, from tests/layouts."""
    with gzip.open(LAYOUTS / f"{name}.txt.gz", "rt", encoding="utf-8") as stream:
        rows = [line.rstrip("\n").split("\t") for line in stream]
    return [(name, [int(size) for size in shape.split(",") if size]) for name, shape in rows]


def write_model(path: Path, layout: str, *, seed: int, dtype: str = "F16") -> None:
    """A file of that layout: normal weights of standard deviation 0.05, position ids as they are.

    dtype  F16, BF16 or F32
    """
    rows = sorted(read_layout(layout))
    ids = [row for row in rows if row[0].endswith("position_ids")]
    rest = [row for row in rows if not row[0].endswith("position_ids")]
    header: dict[str, object] = {}
    position = 0
    for name, shape in [*ids, *rest]:
        kind = "I64" if (name, shape) in ids else dtype
        nbytes = math.prod(shape) * (8 if kind == "I64" else WIDTHS[dtype])
        span = [position, position + nbytes]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": span}
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(seed)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, shape in ids:
            stream.write(np.arange(math.prod(shape), dtype="<i8").tobytes())
        for _, shape in rest:
            left = math.prod(shape)
            while left:
                count = min(left, _CHUNK)
                stream.write(_stored(random.standard_normal(count, np.float32) * 0.05, dtype))
                left -= count


# What kohya's trainer adapts unless told otherwise: sd-scripts, networks/lora.py, LoRANetwork.
_ADAPTED = ("attn", "proj_in", "proj_out", "ff.net", "mlp.fc", "mlp.c_")


def write_lora(path: Path, model: Path, *, rank: int, seed: int) -> dict[str, tuple[str, int, int]]:
    """An fp16 LoRA, in kohya's names, for every attention and MLP layer of a model.

    Gives each module's tensor, first row and the row after the last.
    """
    from safetensors.numpy import save_file

    from ckptools.family import detect, family_of
    from ckptools.lora.names import targets
    from ckptools.sources import open_checkpoint

    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    places: dict[str, tuple[str, int, int]] = {}
    with open_checkpoint(model) as checkpoint:
        names = targets(family_of(detect(checkpoint)), checkpoint).names("kohya")
        for name, (target, *_) in names.items():
            spatial = len(target.shape) - 2
            wanted = target.component != "vae" and any(part in target.module for part in _ADAPTED)
            if not wanted or spatial < 0 or "norm" in target.module.rpartition(".")[2]:
                continue
            outputs, inputs, *kernel = target.shape
            up = random.standard_normal((outputs, rank, *[1] * spatial), np.float32) * 0.01
            down = random.standard_normal((rank, inputs, *kernel), np.float32) * 0.01
            tensors[f"{name}.lora_up.weight"] = up.astype(np.float16)
            tensors[f"{name}.lora_down.weight"] = down.astype(np.float16)
            tensors[f"{name}.alpha"] = np.array(rank / 2, np.float16)
            places[name] = (target.tensor, *(target.rows or (0, outputs)))
    save_file(tensors, path)
    return places


def _stored(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "F16":
        return values.astype(np.float16).tobytes()
    if dtype == "BF16":  # truncated, not rounded: any bits will do
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(np.float32).tobytes()
