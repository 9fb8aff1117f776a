"""Narrow models with what is needed to render them: a single file, and a folder of JSON files.

The folder is what diffusers' own `from_single_file` reads, so that it can be the oracle.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from models import Specs, shrunk, with_channels, write_tensors
from torch import Tensor

import ckptools
from ckptools.tensors import TensorSpec

TINY = Path(ckptools.__file__).parent / "tiny"
MERGES = Path(ckptools.__file__).parent / "render" / "data" / "clip_merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
PADS = {"sd1": [END], "sd2": ["!"], "sdxl": [END, "!"]}


@dataclass(frozen=True)
class Narrow:
    """A family's model with widths divided by 32."""

    family: str
    path: Path
    config: Path
    specs: Specs


def narrow_model(folder: Path, family: str, channels: int = 4, *, seed: int = 1) -> Narrow:
    """Write a narrow model and its folder. Values are small enough for finite pictures."""
    folder.mkdir(exist_ok=True)
    specs = with_channels(shrunk(family), channels)
    tensors = {name: small(spec, seed) for name, spec in specs.items()}
    path = write_tensors(folder / f"{family}-{channels}.safetensors", tensors)
    return Narrow(family, path, write_folder(folder / f"{family}-config", family), specs)


def small(spec: TensorSpec, seed: int) -> Tensor:
    """Seeded F16 values: norms near one, weights of a network that neither dies nor explodes."""
    if spec.name.endswith("position_ids"):
        return torch.arange(spec.numel).reshape(spec.shape)
    import zlib

    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{spec.name}".encode()))
    values = torch.randn(spec.shape, generator=generator)
    if len(spec.shape) < 2:
        return (values * 0.02 + (1.0 if spec.name.endswith("weight") else 0.0)).half()
    fan_in = spec.numel / spec.shape[0]
    return (values * 0.7 / fan_in**0.5).half()


def write_folder(folder: Path, family: str) -> Path:
    """The JSON files and tokenizers that say what the shapes of a narrow model do not."""
    heads = [1, 2, 2, 2] if family != "sdxl" else [1, 2, 2]
    write_json(folder / "unet/config.json", norm_num_groups=5, attention_head_dim=heads)
    write_json(folder / "vae/config.json", norm_num_groups=4)
    for number, pad in enumerate(PADS[family]):
        write_tokenizer(folder / ("tokenizer_2" if number else "tokenizer"), pad)
    return folder


def write_json(path: Path, /, **keys: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(keys))


def write_tokenizer(folder: Path, pad: str, words: int = 49408 // 32) -> None:
    """CLIP's tokenizer with the first merges only: 512 bytes, merges, start, end."""
    folder.mkdir(parents=True)
    merges = gzip.decompress(MERGES.read_bytes()).decode().splitlines()[: words - 514]
    letters = byte_letters()
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary += [*(merge.replace(" ", "") for merge in merges), START, END]
    write_json(folder / "vocab.json", **{word: n for n, word in enumerate(vocabulary)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    write_json(folder / "special_tokens_map.json", **specials)
    write_json(folder / "tokenizer_config.json", **specials, model_max_length=77)


def byte_letters() -> list[str]:
    """A letter for each byte, from transformers."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def in_full(folder: Path, modules: Mapping[str, object], scheduler: object) -> Path:
    """A folder as diffusers wants it, from the configurations of modules that were built."""
    for name, module in modules.items():
        if name.startswith("text_encoder"):
            module.config.save_pretrained(folder / name)
        else:
            module.save_config(folder / name)
    scheduler.save_config(folder / "scheduler")
    index: dict[str, object] = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    kind = "StableDiffusionPipeline"
    if "text_encoder_2" in modules:
        kind = "StableDiffusionXLPipeline"
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    write_json(folder / "model_index.json", _class_name=kind, **index)
    return folder
