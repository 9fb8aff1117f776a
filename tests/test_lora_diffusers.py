"""The shipped LoRAs, loaded by diffusers beside the model and baked into it: the same pictures."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from narrow import TINY
from numpy.typing import NDArray
from safetensors import safe_open

from ckptools.recipe import load_recipe
from ckptools.workflow import merge

diffusers = pytest.importorskip("diffusers", reason="needs the render extra")
pytest.importorskip("peft", reason="diffusers loads LoRAs through peft")

NAMES = {"striped": "unet.", "glow": "lora_unet_"}  # PEFT's names, and kohya's
Picture = NDArray[np.uint8]


def pipeline_of(path: Path) -> Any:
    """diffusers' own pipeline over a single file, in fp32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = diffusers.StableDiffusionPipeline.from_single_file(
            str(path), config=str(TINY / "config"), local_files_only=True,
            torch_dtype=torch.float32,
        )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture_of(pipeline: Any, **more: Any) -> Picture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = pipeline(
            "a red circle on a navy background", num_inference_steps=6, guidance_scale=3.0,
            height=64, width=64, generator=torch.Generator().manual_seed(3), output_type="np",
            **more,
        )  # fmt: skip
    pixels: Picture = (drawn.images[0] * 255).round().astype(np.uint8)
    return pixels


def furthest(one: Picture, other: Picture) -> int:
    assert one.shape == other.shape == (64, 64, 3)
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.fixture(scope="module")
def plain() -> Picture:
    return picture_of(pipeline_of(TINY / "C.safetensors"))


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", NAMES)
def test_a_baked_lora_draws_what_diffusers_draws_with_it(
    name: str, strength: float, plain: Picture, tmp_path: Path
) -> None:
    lora = TINY / f"{name}.safetensors"
    with safe_open(lora, "pt") as opened:
        assert all(key.startswith(NAMES[name]) for key in opened.keys())  # noqa: SIM118, no mapping
    document = {
        "ckptools": 1,
        "models": {"C": str(TINY / "C.safetensors")},
        "merge": "C",
        "loras": [{"path": str(lora), "weight": strength}],
        "output": {"path": "baked.safetensors", "dtype": "fp32"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(document))
    theirs = pipeline_of(TINY / "C.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name=name)
        theirs.set_adapters([name], [strength])

    ours = pipeline_of(merge(load_recipe(tmp_path / "recipe.yaml")).output)

    with_adapter = picture_of(theirs)
    assert furthest(with_adapter, plain) > 50  # the LoRA is seen
    assert furthest(picture_of(ours), with_adapter) <= 2
