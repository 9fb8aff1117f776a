"""Pictures: text to image, image to image, inpainting, edits by instruction, ControlNet.

One loop for all of them. A picture is drawn alone, from noise of a processor's generator with its
own seed, so it does not depend on its neighbours, and on the processor it is the same to the bit
every time. Latents are kept in fp32, the VAE works in fp32. Nothing is saved or judged here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ckptools.checkpoint import Checkpoint
from ckptools.errors import UsageError
from ckptools.render.configs import CHANNELS
from ckptools.render.loader import ControlNet, Pipeline, free_memory_bytes, load_modules
from ckptools.render.prompts import Conditioning, encode
from ckptools.render.samplers import find_sampler, make_scheduler, set_steps

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Task = Literal["txt2img", "img2img", "inpaint", "edit"]
OnStep = Callable[[int, int, "Tensor"], None]

# Decoding in fp32 takes about this much: 6.5 GB for 1024 x 1024 (diffusers, memory.md)
_DECODE_BYTES_PER_PIXEL = 6500


@dataclass(frozen=True, eq=False)
class Request:
    """What to draw.

    size         (width, height) in pixels, multiples of 8; None: the image's, else the model's
    cfg          classifier-free guidance; at 1 or below the negative prompt is not read
    cfg_rescale  0 to 1, for models whose noise ends at zero signal (arXiv 2305.08891, eq. 16)
    clip_skip    1: as the model was trained
    image        (height, width, 3) uint8: what to start from, to edit or to inpaint
    mask         (height, width) uint8: redrawn where it is 128 or more
    strength     0 to 1, how much of the image is drawn anew (not for edits)
    image_cfg    guidance by the image, for edits
    control      (height, width, 3) uint8: the ControlNet's picture; control_scale: its weight
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 20
    sampler: str = "DPM++ 2M Karras"
    cfg: float = 7.0
    cfg_rescale: float = 0.0
    size: tuple[int, int] | None = None
    clip_skip: int = 1
    image: NDArray[np.uint8] | None = None
    mask: NDArray[np.uint8] | None = None
    strength: float = 0.75
    image_cfg: float = 1.5
    control: NDArray[np.uint8] | None = None
    control_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Picture:
    """What was drawn.

    pixels   (height, width, 3) uint8; NaN is black
    values   (height, width, 3) fp32 before clamping, 0 black to 1 white: NaN, Inf and what was
             clipped can be counted here
    latents  (channels, height / 8, width / 8) fp32
    facts    what it was made with: family, variant, task, sampler, scheduler, steps, seed …
    """

    pixels: NDArray[np.uint8]
    values: NDArray[np.float32]
    latents: NDArray[np.float32]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        """Whether every value of latents and picture is a number."""
        return bool(np.isfinite(self.latents).all() and np.isfinite(self.values).all())


def load_pipeline(
    source: Path | Checkpoint,
    *,
    config: Path | None = None,
    vae: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    prediction: str | None = None,
) -> Pipeline:
    """The pipeline of a whole checkpoint: SD1, SD2, SDXL, inpainting, instruct-pix2pix.

    source      a path, or an open checkpoint, which stays open
    config      a diffusers folder (its JSON files and tokenizer are enough) for models of unusual
                width; what it does not say is told from shapes and family. A diffusers folder is
                its own
    vae         a VAE, or a model whose VAE it is, in place of the checkpoint's
    device      "auto": CUDA where it is, else the processor; or as torch spells it
    dtype       of UNet and text encoders: "auto" (fp16 on CUDA; fp32 elsewhere, bf16 where that
                does not fit into memory), fp16, bf16 or fp32. The VAE is always fp32. Where a GPU
                is short of memory the text encoders stay on the processor
    prediction  epsilon or v, whatever file, folder and family say. Where nothing tells, one step
                of the UNet does

    Raises `InputError`, or `ManyErrors`, naming every tensor that is missing or misshapen, before
    any weight is read.
    """
    pipeline = load_modules(
        source, config=config, vae=vae, device=device, dtype=dtype, prediction=prediction
    )
    return settled(pipeline)


def settled(pipeline: Pipeline) -> Pipeline:
    """The pipeline with its prediction: where nothing told it, one step of the UNet does."""
    if pipeline.prediction:
        return pipeline
    told = "epsilon" if noise_correlation(pipeline) > 0.5 else "v"
    return replace(pipeline, prediction=told, told_by="probe")


@torch.no_grad()
def noise_correlation(pipeline: Pipeline, *, seed: int = 0) -> float:
    """How far the UNet's answer to pure noise, at the last timestep, is that noise: -1 to 1.

    Sound models that predict epsilon are near 1 (trained ones 0.995), those that predict v near 0:
    at full noise v is the picture, turned round. NaN where the answer is none. As AUTOMATIC1111
    tells SD2 models apart (modules/sd_models_config.py, is_using_v_parameterization_for_sd2).
    """
    width, height = (side // pipeline.pixels_per_latent for side in pipeline.size)
    noise = _noise(seed, (1, 4, height, width), pipeline.device)
    zeros = torch.zeros(1, _channels(pipeline) - 4, height, width, device=pipeline.device)
    text = encode(pipeline, "")
    sample = torch.cat([noise, zeros], dim=1).to(pipeline.dtype)
    added = _added(pipeline, [text.positive_pooled], pipeline.size)
    out = pipeline.unet(sample, 999, text.positive, added_cond_kwargs=added).sample
    pair = torch.stack([out.float().flatten(), noise.flatten()])
    return float(torch.corrcoef(pair)[0, 1])


@torch.no_grad()
def draw(
    pipeline: Pipeline,
    request: Request,
    *,
    controlnet: ControlNet | None = None,
    on_step: OnStep | None = None,
) -> Picture:
    """One picture.

    controlnet  read with `request.control`
    on_step     called after each step with its number (from 1), the number of steps and the
                latents (1, 4, h, w); what it raises ends the drawing

    What the model cannot draw, or sizes that do not fit, is a `UsageError`.
    """
    task, size = check_request(pipeline, request, controlnet)
    text = encode(pipeline, request.prompt, request.negative, clip_skip=request.clip_skip)
    scheduler = make_scheduler(
        request.sampler,
        pipeline.blueprint.scheduler,
        prediction=pipeline.prediction or "epsilon",
        zero_snr=pipeline.blueprint.zero_snr,
    )
    generator = torch.Generator().manual_seed(request.seed)
    canvas = _prepare(pipeline, request, task, size, scheduler, generator)
    predict = _predictor(pipeline, request, task, size, text, canvas, controlnet)
    step_keys = inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if "generator" in step_keys else {}
    latents = canvas.latents
    for number, moment in enumerate(canvas.moments, start=1):
        noise = predict(scheduler.scale_model_input(latents, moment), moment)
        latents = scheduler.step(noise, moment, latents, **extra).prev_sample
        if canvas.keep is not None:
            last = number == len(canvas.moments)
            kept = canvas.known
            if not last:
                after = canvas.moments[number : number + 1]
                kept = scheduler.add_noise(canvas.known, canvas.noise, after)
            latents = torch.where(canvas.keep, kept, latents)
        if on_step is not None:
            on_step(number, len(canvas.moments), latents)
    values, tiled = decode(pipeline, latents)
    pixels = to_pixels(values)
    if task == "inpaint" and request.image is not None and request.mask is not None:
        pixels = np.where(request.mask[..., None] >= 128, pixels, request.image)
    facts = {
        "family": pipeline.blueprint.family,
        "variant": pipeline.blueprint.variant,
        "task": task,
        "prediction": pipeline.prediction,
        "zero_snr": pipeline.blueprint.zero_snr,
        "sampler": find_sampler(request.sampler).name,
        "scheduler": type(scheduler).__name__,
        "spacing": scheduler.config.get("timestep_spacing"),
        "steps": request.steps,
        "passes": len(canvas.moments),
        "strength": request.strength if task in ("img2img", "inpaint") else None,
        "seed": request.seed,
        "cfg": request.cfg,
        "clip_skip": request.clip_skip,
        "size": size,
        "tokens": text.tokens,
        "chunks": text.chunks,
        "device": pipeline.device.type,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "vae_tiling": tiled,
        "control_scale": request.control_scale if controlnet else None,
    }
    return Picture(pixels, values, latents[0].cpu().numpy(), MappingProxyType(facts))


def check_request(
    pipeline: Pipeline, request: Request, controlnet: ControlNet | None = None
) -> tuple[Task, tuple[int, int]]:
    """What a request comes to with this pipeline, and its (width, height); draws nothing.

    Raises `UsageError` for what cannot be drawn.
    """
    _check_numbers(request)
    task = _task(pipeline, request)
    image, side = request.image, pipeline.pixels_per_latent
    size = request.size or (image.shape[1::-1] if image is not None else pipeline.size)
    width, height = int(size[0]), int(size[1])
    levels = len(pipeline.unet.config.block_out_channels) - 1
    if width % side or height % side or min(width, height) < side * 2**levels:
        raise UsageError(
            f"no picture of {width} x {height}",
            fix=f"width and height are multiples of {side}, {side * 2**levels} at least",
        )
    for what, shape in (("image", (height, width, 3)), ("mask", (height, width)),
                        ("control", (height, width, 3))):  # fmt: skip
        given = getattr(request, what)
        if given is not None and (given.shape != shape or given.dtype != np.uint8):
            raise UsageError(
                f"the {what} is {given.dtype} {list(given.shape)}, not uint8 {list(shape)}",
                fix="scale it to the picture's size",
            )
    if (request.control is None) != (controlnet is None):
        raise UsageError("a ControlNet and its picture go together", fix="give both, or none")
    if controlnet is not None:
        if controlnet.family != pipeline.blueprint.family:
            raise UsageError(
                f"a ControlNet for {controlnet.family}, the model is {pipeline.blueprint.family}",
                fix="give a ControlNet that was made for this family",
            )
        if task == "edit":
            raise UsageError("an instruct-pix2pix model takes no ControlNet", fix="leave it out")
    return task, (width, height)


def _check_numbers(request: Request) -> None:
    if not 1 <= request.steps <= 1000:
        raise UsageError(f"no picture in {request.steps} steps", fix="from 1 to 1000")
    if not 0 < request.strength <= 1:
        raise UsageError(f"no strength {request.strength}", fix="above 0, up to 1")
    if not 0 <= request.seed < 2**63:
        raise UsageError(f"no seed {request.seed}", fix="a whole number from 0 on")
    find_sampler(request.sampler)


def _task(pipeline: Pipeline, request: Request) -> Task:
    variant = pipeline.blueprint.variant
    if request.mask is not None and request.image is None:
        raise UsageError("a mask without an image", fix="give the image to redraw")
    if variant == "ip2p":
        if request.image is None or request.mask is not None:
            raise UsageError(
                "an instruct-pix2pix model edits a whole image", fix="give an image, no mask"
            )
        return "edit"
    if variant == "inpainting" and request.mask is None:
        raise UsageError("an inpainting model redraws a hole", fix="give an image and a mask")
    if request.image is None:
        return "txt2img"
    return "img2img" if request.mask is None else "inpaint"


# --- before the loop ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Canvas:
    """What the loop starts from.

    moments  timesteps to take
    extra    (1, n, h, w) more channels for the UNet: mask and masked image, or image
    keep     (1, 1, h, w) where the known latents are put back after each step; None: nowhere
    """

    latents: Tensor
    moments: Tensor
    extra: Tensor | None
    known: Tensor
    noise: Tensor
    keep: Tensor | None


def _prepare(
    pipeline: Pipeline,
    request: Request,
    task: Task,
    size: tuple[int, int],
    scheduler: Any,
    generator: torch.Generator,
) -> _Canvas:
    side = pipeline.pixels_per_latent
    shape = (1, 4, size[1] // side, size[0] // side)
    noise = torch.randn(shape, generator=generator).to(pipeline.device)
    moments = set_steps(scheduler, request.steps, pipeline.device)
    latents, known, extra, keep = None, noise, None, None
    if request.image is not None and task in ("img2img", "inpaint"):
        known = encode_image(pipeline, request.image)
        count = min(int(request.steps * request.strength), request.steps) or 1
        first = (request.steps - count) * getattr(scheduler, "order", 1)
        moments = moments[first:]
        if first:
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(first)
            latents = scheduler.add_noise(known, noise, moments[:1])
    if request.image is not None and task == "edit":
        extra = encode_image(pipeline, request.image, scaled=False)
    if request.image is not None and request.mask is not None:
        hole = torch.from_numpy(request.mask >= 128).to(pipeline.device)[None, None]
        small = torch.nn.functional.interpolate(hole.float(), shape[2:])  # nearest
        if pipeline.blueprint.variant == "inpainting":
            grey = np.where(request.mask[..., None] >= 128, np.float32(127.5), request.image)
            extra = torch.cat([small, encode_image(pipeline, grey)], dim=1)
        else:
            keep = small < 0.5
    if latents is None:
        latents = noise * scheduler.init_noise_sigma
    return _Canvas(latents, moments, extra, known, noise, keep)


def _noise(seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _channels(pipeline: Pipeline) -> int:
    return CHANNELS[pipeline.blueprint.variant]


# --- within the loop ----------------------------------------------------------------------------


def _predictor(
    pipeline: Pipeline,
    request: Request,
    task: Task,
    size: tuple[int, int],
    text: Conditioning,
    canvas: _Canvas,
    controlnet: ControlNet | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided answer of the UNet to scaled latents at a timestep, as a function."""
    sides, guide, images = _guidance(request, task, canvas.extra)
    states = torch.cat([text.positive if side else text.negative for side in sides])
    pooled = [text.positive_pooled if side else text.negative_pooled for side in sides]
    added = _added(pipeline, pooled, size)
    control = None
    if controlnet is not None and request.control is not None:
        pixels = torch.from_numpy(request.control).permute(2, 0, 1)[None].float() / 255
        control = pixels.to(pipeline.device, pipeline.dtype).repeat(len(sides), 1, 1, 1)

    def predict(latents: Tensor, moment: Tensor) -> Tensor:
        sample = latents.repeat(len(sides), 1, 1, 1).to(pipeline.dtype)
        more = {}
        if controlnet is not None:
            down, middle = controlnet.module(
                sample,
                moment,
                encoder_hidden_states=states,
                controlnet_cond=control,
                conditioning_scale=request.control_scale,
                added_cond_kwargs=added,
                return_dict=False,
            )
            more = {
                "down_block_additional_residuals": down,
                "mid_block_additional_residual": middle,
            }
        if images is not None:
            sample = torch.cat([sample, images.to(pipeline.dtype)], dim=1)
        out = pipeline.unet(sample, moment, states, added_cond_kwargs=added, **more).sample
        return guide(out.float())

    return predict


def _guidance(
    request: Request, task: Task, extra: Tensor | None
) -> tuple[list[bool], Callable[[Tensor], Tensor], Tensor | None]:
    """Which prompts are read at once (True: the positive), how their answers are put together,
    and the further channels of each.

    Source of an edit's three: Brooks et al. 2023, arXiv 2211.09800, equation 3.
    """
    if task == "edit" and extra is not None:
        blank = torch.zeros_like(extra)

        def by_both(out: Tensor) -> Tensor:
            full, image, none = out.chunk(3)
            return none + request.cfg * (full - image) + request.image_cfg * (image - none)

        return [True, False, False], by_both, torch.cat([extra, extra, blank])
    if request.cfg <= 1:
        return [True], lambda out: out, extra

    def by_text(out: Tensor) -> Tensor:
        without, with_ = out.chunk(2)
        guided = without + request.cfg * (with_ - without)
        if request.cfg_rescale:
            dims = tuple(range(1, out.ndim))
            scale = with_.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
            guided = guided * (request.cfg_rescale * scale + (1 - request.cfg_rescale))
        return guided

    return [False, True], by_text, None if extra is None else extra.repeat(2, 1, 1, 1)


def _added(
    pipeline: Pipeline, pooled: list[Tensor | None], size: tuple[int, int]
) -> dict[str, Tensor] | None:
    """SDXL's pooled text and sizes: original height, width; top, left; target height, width."""
    rows = [row for row in pooled if row is not None]
    if not rows:
        return None
    width, height = size
    ids = [float(n) for n in (height, width, 0, 0, height, width)]
    times = torch.tensor([ids] * len(rows), device=pipeline.device, dtype=pipeline.dtype)
    return {"text_embeds": torch.cat(rows), "time_ids": times}


# --- the VAE ------------------------------------------------------------------------------------


@torch.no_grad()
def encode_image(pipeline: Pipeline, image: NDArray[Any], *, scaled: bool = True) -> Tensor:
    """The latents (1, 4, h / 8, w / 8) of a picture (h, w, 3) of 0 to 255: the likeliest ones."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    pixels = pixels.to(pipeline.device, torch.float32) / 127.5 - 1
    latents: Tensor = pipeline.vae.encode(pixels).latent_dist.mode()
    factor: float = pipeline.vae.config.scaling_factor if scaled else 1.0
    return latents * factor


@torch.no_grad()
def decode(pipeline: Pipeline, latents: Tensor) -> tuple[NDArray[np.float32], bool]:
    """The picture (h, w, 3) of latents, 0 black to 1 white, not clamped; and whether in tiles.

    Tiles are taken where the device is short of memory.
    """
    vae = pipeline.vae
    area = latents.shape[-1] * latents.shape[-2] * pipeline.pixels_per_latent**2
    free = free_memory_bytes(pipeline.device)
    tiled = free is not None and area * _DECODE_BYTES_PER_PIXEL > free
    (vae.enable_tiling if tiled else vae.disable_tiling)()
    values = vae.decode(latents.float() / vae.config.scaling_factor).sample[0] / 2 + 0.5
    return values.permute(1, 2, 0).cpu().numpy(), tiled


def to_pixels(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Values 0 to 1 as bytes: clamped, rounded; NaN is black."""
    clean = np.nan_to_num(values, nan=0.0, posinf=1.0, neginf=0.0)
    return np.asarray((clean.clip(0, 1) * 255).round(), np.uint8)
