"""What one resident model measures up to: figures only; `judge` says what they mean.

The pictures that models are asked about are drawn by the merge's parents, or by the model itself
where it has none. Of every model only figures, small latents and pictures are kept, so models can
be loaded one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ckptools.check.losses import MOMENTS, prompt_losses
from ckptools.errors import UsageError
from ckptools.render import (
    Pipeline,
    Request,
    decode,
    draw,
    encode,
    encode_image,
    noise_correlation,
    to_pixels,
)
from ckptools.render.probes import (
    Probe,
    drawn_mask,
    picture_for,
    probes_for,
    usual_guidance,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

STEPS = 8
_PICTURES = 2
_LARGE = 256  # pixels: pictures wider than this are halved where a processor draws them
_NO_BASE = ("inpainting", "ip2p")


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture that a model drew.

    latents  (4, h / 8, w / 8) F32; pixels (h, w, 3) uint8
    broken   the first step whose latents were no numbers; 0: none
    """

    prompt: str
    latents: NDArray[np.float32]
    pixels: NDArray[np.uint8]
    broken: int = 0


@dataclass(frozen=True)
class Reading:
    """What the UNet makes of prompts, on the samples.

    losses       (samples, moments): mean squared error of the noise, told what is in the picture
    wrong        the same, told what is in the next picture
    sensitivity  how far the two answers lie apart, relative to their size; 0: prompts do nothing
    """

    losses: NDArray[np.float64]
    wrong: NDArray[np.float64]
    sensitivity: float

    @property
    def loss(self) -> float:
        """Over all samples and moments."""
        return float(self.losses.mean())

    @property
    def gain(self) -> float:
        """How much larger the loss is with a wrong prompt, relative to that with the right one."""
        return float(self.wrong.mean() / self.losses.mean() - 1)


@dataclass(frozen=True)
class Figures:
    """One model.

    name         the parent's; "" for the model that is checked
    noise        correlation of the UNet's answer to pure noise with that noise
    largest      component → largest activation of a pass, and the tensors of that module
    broken       component → the tensors of the first module that gave NaN or Inf
    round_trip   PSNR in dB of a drawn picture and of the samples, encoded and decoded
    decoding     PSNR of the samples' latents, decoded, to the samples; inf where equal; None
                 where there are no samples
    own          what it drew
    reading      on the samples; None where there are none
    """

    name: str
    noise: float
    largest: Mapping[str, tuple[float, tuple[str, ...]]]
    broken: Mapping[str, tuple[str, ...]]
    round_trip: float
    decoding: float | None
    own: tuple[Sample, ...] = ()
    reading: Reading | None = None

    @property
    def spread(self) -> float:
        """Standard deviation of the latents of what it draws; NaN where it drew nothing."""
        return float(np.mean([sample.latents.std() for sample in self.own]))


def draw_samples(pipeline: Pipeline, *, count: int = _PICTURES) -> tuple[Sample, ...]:
    """A few pictures, of prompts that the model's own vocabulary has; seeds 0, 1, 2 …

    They are of few steps; on a processor large pictures are drawn at half their size. A model
    whose words no built-in prompt is made of draws nothing.
    """
    probes = [probe for probe in _probes(pipeline) if not probe.flat]
    size = sample_size(pipeline)
    made = []
    for seed, probe in enumerate(probes[:count]):
        request = _request(pipeline, probe, probes, size, seed)
        broken: list[int] = []

        def look(step: int, steps: int, latents: torch.Tensor, bad: list[int] = broken) -> None:
            if not bad and not bool(torch.isfinite(latents).all()):
                bad.append(step)

        picture = draw(pipeline, request, on_step=look)
        made.append(Sample(probe.prompt, picture.latents, picture.pixels, *broken))
    return tuple(made)


def sample_size(pipeline: Pipeline) -> tuple[int, int]:
    """(width, height) of the pictures that a model is asked for."""
    width, height = pipeline.size
    if pipeline.device.type == "cpu" and width > _LARGE:
        return width // 2, height // 2
    return width, height


def _probes(pipeline: Pipeline) -> tuple[Probe, ...]:
    """The built-in prompts of words that the model knows, if there are any."""
    try:
        return probes_for(pipeline)
    except UsageError:
        return ()


def _request(
    pipeline: Pipeline, probe: Probe, probes: Sequence[Probe], size: tuple[int, int], seed: int
) -> Request:
    given: dict[str, Any] = {}
    if pipeline.blueprint.variant in _NO_BASE:
        given["image"] = picture_for(_probes(pipeline), size)
    if pipeline.blueprint.variant == "inpainting":
        given["mask"] = drawn_mask(size)
    return Request(
        probe.prompt, seed=seed, steps=STEPS, cfg=usual_guidance(pipeline), size=size, **given
    )


def measure(
    pipeline: Pipeline,
    samples: Sequence[Sample],
    *,
    name: str = "",
    own: Sequence[Sample] = (),
    quick: bool = False,
) -> Figures:
    """The figures of a model.

    samples  what it is asked about
    own      what it drew itself
    quick    no losses: one pass of every component
    """
    with _watched(pipeline) as watch:
        encode(pipeline, samples[0].prompt if samples else "a picture")
        noise = noise_correlation(pipeline)
        pictures = [sample.pixels for sample in samples] or [_chart(pipeline)]
        round_trip = _psnr_of([_round_trip(pipeline, picture) for picture in pictures], pictures)
    decoded = [to_pixels(decode(pipeline, _tensor(sample, pipeline))[0]) for sample in samples]
    return Figures(
        name=name,
        noise=noise,
        largest=watch.largest,
        broken=watch.broken,
        round_trip=round_trip,
        decoding=_psnr_of(decoded, [sample.pixels for sample in samples]) if samples else None,
        own=tuple(own),
        reading=_read(pipeline, samples) if samples and not quick else None,
    )


def _read(pipeline: Pipeline, samples: Sequence[Sample]) -> Reading:
    latents = [sample.latents for sample in samples]
    prompts = [sample.prompt for sample in samples]
    others = [_another(prompts, row) for row in range(len(prompts))]
    losses, wrong, sensitivity = prompt_losses(pipeline, latents, prompts, others, moments=MOMENTS)
    return Reading(losses, wrong, sensitivity)


def _another(prompts: Sequence[str], row: int) -> str:
    """The next prompt that is not the row's own."""
    later = (*prompts[row + 1 :], *prompts[:row])
    return next((prompt for prompt in later if prompt != prompts[row]), "")


def _tensor(sample: Sample, pipeline: Pipeline) -> torch.Tensor:
    return torch.from_numpy(sample.latents)[None].to(pipeline.device)


# --- the VAE ------------------------------------------------------------------------------------


def _chart(pipeline: Pipeline) -> NDArray[np.uint8]:
    return picture_for(_probes(pipeline), pipeline.size)


def _round_trip(pipeline: Pipeline, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return to_pixels(decode(pipeline, encode_image(pipeline, picture))[0])


def _psnr_of(made: Sequence[NDArray[np.uint8]], wanted: Sequence[NDArray[np.uint8]]) -> float:
    """Peak signal to noise ratio over all pictures, dB; inf where nothing differs."""
    error = [
        np.mean((one.astype(np.float64) - two) ** 2) for one, two in zip(made, wanted, strict=True)
    ]
    mean = float(np.mean(error)) if error else 0.0
    return float(10 * np.log10(255**2 / mean)) if mean else float("inf")


# --- activations --------------------------------------------------------------------------------


@dataclass
class _Watch:
    largest: dict[str, tuple[float, tuple[str, ...]]]
    broken: dict[str, tuple[str, ...]]


@contextmanager
def _watched(pipeline: Pipeline) -> Iterator[_Watch]:
    """Look at what every module without parts puts out: the largest number, the first that is none.

    Inputs that are no numbers already count too: a NaN in a component comes from its own weights
    only if what went in was sound.
    """
    watch = _Watch({}, {})
    handles = []
    for component, module in pipeline.modules.items():
        named = {id(part): path for path, part in module.named_modules()}
        tensors = tensors_of(pipeline, component)

        def look(
            part: Any, _: Any, out: Any, component: str = component,
            named: Mapping[int, str] = named, tensors: Mapping[str, tuple[str, ...]] = tensors,
        ) -> None:  # fmt: skip
            if not isinstance(out, torch.Tensor) or not out.is_floating_point():
                return
            size = float(out.abs().max()) if out.numel() else 0.0
            names = tensors.get(named[id(part)], (f"{component}: {named[id(part)]}",))
            if not np.isfinite(size):
                watch.broken.setdefault(component, names)
            elif size > watch.largest.get(component, (-1.0, ()))[0]:
                watch.largest[component] = (size, names)

        for part in module.modules():
            if not any(True for _ in part.children()):
                handles.append(part.register_forward_hook(look))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def tensors_of(pipeline: Pipeline, component: str) -> dict[str, tuple[str, ...]]:
    """Path of a module → the checkpoint's tensors that fill it."""
    found: dict[str, tuple[str, ...]] = {}
    for tensor, slots in pipeline.slots.items():
        for slot in slots:
            if slot.component == component:
                path = slot.name.rpartition(".")[0]
                found[path] = tuple(dict.fromkeys((*found.get(path, ()), tensor)))
    return found
