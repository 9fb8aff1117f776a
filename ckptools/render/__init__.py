"""Loads checkpoints into diffusers' modules, strictly and offline, and draws with them.

    pipeline = load_pipeline(Path("model.safetensors"))
    picture = draw(pipeline, Request("a red circle", seed=1))

    load_pipeline      a checkpoint, resident: `Pipeline`
    load_modules       the same for weights that are yet to come: `settled` when they are there
    load_controlnet    a ControlNet beside it
    draw               one picture: `Request` → `Picture`
    check_request      what a request comes to, without drawing
    ModuleSink         what a merge would save, written into a resident pipeline instead
    noise_correlation  one step of the UNet: does it predict noise?
    encode_image, decode, to_pixels   pictures to latents and back
    encode             prompts to what the UNet reads
    SAMPLERS           the samplers' names

Needs the `render` extra: diffusers, transformers.
"""

from ckptools.render.loader import ControlNet, ModuleSink, Pipeline, load_controlnet, load_modules
from ckptools.render.pipelines import (
    OnStep,
    Picture,
    Request,
    check_request,
    decode,
    draw,
    encode_image,
    load_pipeline,
    noise_correlation,
    settled,
    to_pixels,
)
from ckptools.render.prompts import Conditioning, encode
from ckptools.render.samplers import SAMPLERS

__all__ = [
    "SAMPLERS",
    "Conditioning",
    "ControlNet",
    "ModuleSink",
    "OnStep",
    "Picture",
    "Pipeline",
    "Request",
    "check_request",
    "decode",
    "draw",
    "encode",
    "encode_image",
    "load_controlnet",
    "load_modules",
    "load_pipeline",
    "noise_correlation",
    "settled",
    "to_pixels",
]
