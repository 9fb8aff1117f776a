"""How well a model takes noise off given pictures: the loss it was trained to make small.

No data set: the pictures are what the merge's parents draw. Between kin the loss of a merge stays
near the straight line between its parents' losses; between models that were trained apart it
rises over it, a barrier (Frankle et al. 2020, arXiv 1912.05671, section 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ckptools.errors import UsageError
from ckptools.render import Conditioning, Pipeline, encode
from ckptools.render.samplers import make_scheduler

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

MOMENTS = (100, 300, 500, 700, 900)
_BATCH_PIXELS = 64 * 64  # of latents


def denoise_loss(
    pipeline: Pipeline,
    latents: Sequence[NDArray[np.float32]],
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    moments: Sequence[int] = MOMENTS,
) -> NDArray[np.float64]:
    """Mean squared error of the noise that the UNet sees in noised pictures, (pictures, moments).

    latents  (4, height / 8, width / 8) of each picture, as `Picture.latents`
    prompts  what each picture shows, one each
    seeds    of the noise; every picture meets every one of them, and the mean is taken
    moments  timesteps, 0 to 999

    The same noise for every model, so losses of models can be subtracted. A model that predicts v
    is judged by the noise its v implies. One that takes nine channels paints the picture's middle
    and is shown the rest; one that takes eight is shown no picture to edit. 0.02 to 0.1 is usual,
    1 is what a model without any idea has; NaN where an answer is none.
    """
    losses = np.zeros((len(latents), len(moments)))
    for row, part, noise, (seen,) in _answers(pipeline, latents, [prompts], seeds, moments):
        losses[row, part] += _error(seen, noise)
    return losses / len(seeds)


def prompt_losses(
    pipeline: Pipeline,
    latents: Sequence[NDArray[np.float32]],
    prompts: Sequence[str],
    others: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    moments: Sequence[int] = MOMENTS,
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """What right and wrong prompts do: losses as `denoise_loss` with either, and the sensitivity.

    others  a prompt for each picture that is not its own
    The sensitivity is |answer to one - answer to the other| / |answer|, root mean squares.
    """
    right = np.zeros((len(latents), len(moments)))
    wrong, apart, size = right.copy(), 0.0, 0.0
    for row, part, noise, (one, other) in _answers(
        pipeline, latents, [prompts, others], seeds, moments
    ):
        right[row, part] += _error(one, noise)
        wrong[row, part] += _error(other, noise)
        apart += float((one - other).square().sum())
        size += float(one.square().sum())
    sensitivity = (apart / size) ** 0.5 if size else 0.0
    return right / len(seeds), wrong / len(seeds), sensitivity


@torch.no_grad()
def _answers(
    pipeline: Pipeline,
    latents: Sequence[NDArray[np.float32]],
    prompts: Sequence[Sequence[str]],
    seeds: Sequence[int],
    moments: Sequence[int],
) -> Iterator[tuple[int, slice, Tensor, list[Tensor]]]:
    """(picture, its moments, the noise, the noise seen in it with each of its prompts)."""
    if any(len(each) != len(latents) for each in prompts):
        raise UsageError(f"{len(latents)} pictures and {len(prompts[0])} prompts", fix="one each")
    texts = {text: encode(pipeline, text) for each in prompts for text in dict.fromkeys(each)}
    for row, picture in enumerate(latents):
        clean = torch.from_numpy(np.asarray(picture, np.float32))[None].to(pipeline.device)
        extra = extra_channels(pipeline, clean)
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(clean.shape, generator=generator).to(pipeline.device)
            for first in range(0, len(moments), _batch(clean)):
                part = slice(first, first + _batch(clean))
                times = torch.tensor(moments[part], device=pipeline.device)
                noised = _add_noise(pipeline, clean, noise, times)
                yield (
                    row,
                    part,
                    noise,
                    [
                        predict_noise(pipeline, noised, times, texts[each[row]], extra)
                        for each in prompts
                    ],
                )


def _error(seen: Tensor, noise: Tensor) -> NDArray[np.float64]:
    return (seen - noise).double().square().mean((1, 2, 3)).cpu().numpy()


def _batch(clean: Tensor) -> int:
    """How many timesteps at once: what takes no more memory than one of a 512 x 512 picture."""
    return max(1, _BATCH_PIXELS // (clean.shape[2] * clean.shape[3]))


@torch.no_grad()
def predict_noise(
    pipeline: Pipeline,
    noised: Tensor,
    times: Tensor,
    text: Conditioning,
    extra: Tensor | None = None,
) -> Tensor:
    """The noise in (n, 4, h, w) latents at n timesteps, as the model sees it, F32, unguided.

    text   of one prompt, for all of them
    extra  (1, c, h, w): the UNet's channels beyond four, from `extra_channels`
    """
    count = len(noised)
    more = [] if extra is None else [extra.expand(count, -1, -1, -1)]
    out: Tensor = pipeline.unet(
        torch.cat([noised, *more], dim=1).to(pipeline.dtype),
        times,
        text.positive.expand(count, -1, -1),
        added_cond_kwargs=_added(pipeline, text, noised),
    ).sample.float()
    if pipeline.prediction != "v":
        return out
    kept = _kept(pipeline)[times].view(-1, 1, 1, 1)
    # Salimans & Ho 2022, arXiv 2202.00512, appendix D
    return kept.sqrt() * out + (1 - kept).sqrt() * noised


def extra_channels(pipeline: Pipeline, clean: Tensor) -> Tensor | None:
    """What a UNet of nine or eight channels reads beside noise: mask and seen part, or a blank."""
    variant = pipeline.blueprint.variant
    if variant == "base":
        return None
    if variant == "ip2p":
        return torch.zeros_like(clean)
    hole = torch.zeros_like(clean[:, :1])
    height, width = hole.shape[2:]
    hole[..., height // 4 : -(height // 4) or None, width // 4 : -(width // 4) or None] = 1
    return torch.cat([hole, _without(pipeline, clean, hole)], dim=1)


def _without(pipeline: Pipeline, clean: Tensor, hole: Tensor) -> Tensor:
    """Latents of the picture with grey in the hole: what inpainting models were trained to see."""
    vae = pipeline.vae
    pixels = vae.decode(clean / vae.config.scaling_factor).sample.clamp(-1, 1)
    large = torch.nn.functional.interpolate(hole, pixels.shape[2:])
    latents: Tensor = vae.encode(pixels * (1 - large)).latent_dist.mode()
    return latents * float(vae.config.scaling_factor)


def _added(pipeline: Pipeline, text: Conditioning, noised: Tensor) -> dict[str, Tensor] | None:
    """SDXL's pooled text and sizes: original height, width; top, left; target height, width."""
    if text.positive_pooled is None:
        return None
    height, width = (side * pipeline.pixels_per_latent for side in noised.shape[2:])
    ids = [float(n) for n in (height, width, 0, 0, height, width)]
    times = torch.tensor([ids] * len(noised), device=pipeline.device, dtype=pipeline.dtype)
    return {"text_embeds": text.positive_pooled.expand(len(noised), -1), "time_ids": times}


def _add_noise(pipeline: Pipeline, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    kept = _kept(pipeline)[times].view(-1, 1, 1, 1)
    return kept.sqrt() * clean + (1 - kept).sqrt() * noise  # Ho et al. 2020, equation 4


def _kept(pipeline: Pipeline) -> Tensor:
    """How much of a picture's variance each timestep keeps, (1000,)."""
    keys: Mapping[str, Any] = pipeline.blueprint.scheduler
    zero_snr = pipeline.blueprint.zero_snr
    scheduler = make_scheduler("DDIM", keys, prediction="epsilon", zero_snr=zero_snr)
    kept: Tensor = scheduler.alphas_cumprod.to(pipeline.device)
    return kept
