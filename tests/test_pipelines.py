"""Pictures: those of diffusers' own pipelines, the same every time, nothing else touched."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models import shrunk, write_tensors
from narrow import TINY, Narrow, narrow_model, small
from numpy.typing import NDArray
from torch import Tensor

from ckptools.errors import UsageError
from ckptools.render import (
    SAMPLERS,
    Request,
    check_request,
    decode,
    draw,
    encode,
    encode_image,
    load_controlnet,
    load_pipeline,
    noise_correlation,
    pipelines,
    to_pixels,
)
from ckptools.render.loader import ControlNet, Pipeline
from ckptools.render.samplers import make_scheduler

PROMPT = "a red circle on a black background"
BASE = Request(PROMPT, seed=33, steps=5, cfg=3.0, sampler="DDIM")


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return load_pipeline(TINY / "C.safetensors", device="cpu")


@pytest.fixture(scope="module")
def hole() -> Pipeline:
    return load_pipeline(TINY / "I.safetensors", device="cpu")


@pytest.fixture(scope="module")
def picture(tiny: Pipeline) -> NDArray[np.uint8]:
    return draw(tiny, replace(BASE, prompt="a yellow star on a navy background")).pixels


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    """SD1 for edits, SDXL, by name."""
    folder = tmp_path_factory.mktemp("narrow")

    def load(model: Narrow) -> Pipeline:
        return load_pipeline(model.path, config=model.config, device="cpu")

    pipes = {
        "edit": load(narrow_model(folder / "edit", "sd1", 8)),
        "sdxl": load(narrow_model(folder / "sdxl", "sdxl")),
    }
    return {name: replace(pipe, size=(64, 64)) for name, pipe in pipes.items()}


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, ControlNet]:
    folder = tmp_path_factory.mktemp("control")
    model = narrow_model(folder, "sd1")
    pipeline = replace(load_pipeline(model.path, config=model.config, device="cpu"), size=(64, 64))
    specs = shrunk("controlnet-sd1")
    tensors = {name: small(spec, 5) for name, spec in specs.items()}
    path = write_tensors(folder / "control.safetensors", tensors)
    return pipeline, load_controlnet(path, pipeline)


def box(size: int = 64) -> NDArray[np.uint8]:
    mask = np.zeros((size, size), np.uint8)
    mask[16:48, 16:48] = 255
    return mask


def theirs(kind: str, pipeline: Pipeline, sampler: str, **more: Any) -> Any:
    """diffusers' pipeline over the same modules, with a scheduler of the same kind."""
    import diffusers

    scheduler = make_scheduler(sampler, pipeline.blueprint.scheduler, prediction="epsilon")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        their = type(scheduler).from_config(scheduler.config)
    parts = {
        "unet": pipeline.unet,
        "vae": pipeline.vae,
        "text_encoder": None,
        "tokenizer": None,
        "scheduler": their,
        **more,
    }
    if "XL" in kind:
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    made = getattr(diffusers, kind)(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def prompts(pipeline: Pipeline, request: Request) -> dict[str, Tensor]:
    text = encode(pipeline, request.prompt, request.negative)
    return {"prompt_embeds": text.positive, "negative_prompt_embeds": text.negative}


def run(pipe: Any, request: Request, **more: Any) -> NDArray[np.uint8]:
    """The picture that diffusers' pipeline makes of a request."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = pipe(
            num_inference_steps=request.steps,
            guidance_scale=request.cfg,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="np",
            **more,
        )
    return to_pixels(out.images[0])


def assert_near(ours: NDArray[np.uint8], their: NDArray[np.uint8]) -> None:
    """To one step of 255: the sums of a batch of two may round otherwise."""
    assert ours.shape == their.shape
    assert ours.std() > 1
    assert np.abs(ours.astype(int) - their.astype(int)).max() <= 1


# --- against diffusers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler",
    ["DDIM", "Euler", "Euler a", "DPM++ 2M Karras", "UniPC", "Heun", "DPM++ SDE Karras", "DPM2",
     "DPM2 a Karras", "DPM++ 2M SDE Exponential"],
)  # fmt: skip
def test_a_picture_is_that_of_diffusers(tiny: Pipeline, sampler: str) -> None:
    request = replace(BASE, sampler=sampler, negative="blue")
    pipe = theirs("StableDiffusionPipeline", tiny, sampler)

    assert_near(draw(tiny, request).pixels, run(pipe, request, **prompts(tiny, request)))


def test_without_guidance_the_negative_is_not_read(tiny: Pipeline) -> None:
    request = replace(BASE, cfg=1.0)
    pipe = theirs("StableDiffusionPipeline", tiny, "DDIM")
    only = {"prompt_embeds": prompts(tiny, request)["prompt_embeds"]}

    ours = draw(tiny, request).pixels
    assert_near(ours, run(pipe, request, **only))
    assert np.array_equal(ours, draw(tiny, replace(request, negative="blue")).pixels)


def test_sdxl_is_that_of_diffusers(narrow: dict[str, Pipeline]) -> None:
    sdxl = narrow["sdxl"]
    request = Request("a fox", "blurry", seed=2, steps=3, cfg=5.0, sampler="Euler")
    text = encode(sdxl, "a fox", "blurry")
    pipe = theirs("StableDiffusionXLPipeline", sdxl, "Euler", add_watermarker=False)
    # without encoders the pipeline asks them for their width
    object.__setattr__(pipe, "text_encoder_2", sdxl.text_encoders[1].module)
    more = prompts(sdxl, request) | {
        "pooled_prompt_embeds": text.positive_pooled,
        "negative_pooled_prompt_embeds": text.negative_pooled,
    }
    assert_near(draw(sdxl, request).pixels, run(pipe, request, width=64, height=64, **more))


def test_v_prediction_to_zero_signal_is_that_of_diffusers(narrow: dict[str, Pipeline]) -> None:
    sdxl = narrow["sdxl"]
    marked = replace(sdxl, prediction="v", blueprint=replace(sdxl.blueprint, zero_snr=True))
    request = Request("a fox", "x", seed=2, steps=3, cfg=5.0, cfg_rescale=0.7, sampler="Euler")
    text = encode(sdxl, "a fox", "x")
    pipe = theirs("StableDiffusionXLPipeline", sdxl, "Euler", add_watermarker=False)
    object.__setattr__(pipe, "text_encoder_2", sdxl.text_encoders[1].module)
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    more = prompts(sdxl, request) | {
        "pooled_prompt_embeds": text.positive_pooled,
        "negative_pooled_prompt_embeds": text.negative_pooled,
        "guidance_rescale": 0.7,
    }
    found = draw(marked, request)

    assert_near(found.pixels, run(pipe, request, width=64, height=64, **more))
    assert found.facts["zero_snr"]
    assert found.facts["spacing"] == "trailing"
    with pytest.raises(UsageError, match="Heun cannot draw"):
        draw(marked, replace(request, sampler="Heun"))


@pytest.mark.parametrize("sampler", ["DDIM", "Heun", "DPM++ 2M"])
def test_image_to_image_is_that_of_diffusers(
    tiny: Pipeline, picture: NDArray[np.uint8], sampler: str
) -> None:
    request = replace(BASE, image=picture, strength=0.6, sampler=sampler)
    pipe = theirs("StableDiffusionImg2ImgPipeline", tiny, sampler)
    latents = encode_image(tiny, picture)

    found = draw(tiny, request)
    assert_near(
        found.pixels, run(pipe, request, image=latents, strength=0.6, **prompts(tiny, request))
    )
    assert found.facts["task"] == "img2img"


@pytest.mark.parametrize("model", ["tiny", "hole"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_is_that_of_diffusers_and_leaves_the_rest_alone(
    model: str, strength: float, picture: NDArray[np.uint8], request: pytest.FixtureRequest
) -> None:
    pipeline: Pipeline = request.getfixturevalue(model)
    mask = box()
    wanted = replace(BASE, image=picture, mask=mask, strength=strength)
    holed = np.where(mask[..., None] >= 128, np.float32(127.5), picture)
    pipe = theirs("StableDiffusionInpaintPipeline", pipeline, "DDIM")
    found = draw(pipeline, wanted)
    reference = run(
        pipe,
        wanted,
        image=encode_image(pipeline, picture),
        mask_image=torch.from_numpy(mask)[None, None] / 255,
        masked_image_latents=encode_image(pipeline, holed),
        strength=strength,
        width=64,
        height=64,
        **prompts(pipeline, wanted),
    )

    inside = mask >= 128
    assert_near(found.pixels[inside], reference[inside])
    assert np.array_equal(found.pixels[~inside], picture[~inside])
    assert (found.pixels[inside] != picture[inside]).any()


def test_an_edit_is_that_of_diffusers(narrow: dict[str, Pipeline]) -> None:
    edit = narrow["edit"]
    image = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
    request = Request("make it red", "x", seed=4, steps=3, image=image, sampler="Euler")
    pipe = theirs("StableDiffusionInstructPix2PixPipeline", edit, "Euler")
    text = encode(edit, request.prompt, request.negative)
    # the pipeline puts the negative prompt in place itself, from the encoder's own module
    reference = run(
        pipe,
        request,
        image=encode_image(edit, image, scaled=False),
        image_guidance_scale=1.5,
        prompt_embeds=text.positive,
        negative_prompt_embeds=text.negative,
    )
    found = draw(edit, request)

    assert_near(found.pixels, reference)
    assert found.facts["task"] == "edit"


def test_control_is_that_of_diffusers(control: tuple[Pipeline, ControlNet]) -> None:
    pipeline, net = control
    image = np.random.default_rng(5).integers(0, 256, (64, 64, 3), np.uint8)
    request = Request(
        "a fox", "x", seed=4, steps=3, control=image, control_scale=0.8, sampler="DDIM"
    )
    pipe = theirs("StableDiffusionControlNetPipeline", pipeline, "DDIM", controlnet=net.module)
    reference = run(
        pipe,
        request,
        image=torch.from_numpy(image).permute(2, 0, 1)[None] / 255,
        controlnet_conditioning_scale=0.8,
        **prompts(pipeline, request),
    )
    found = draw(pipeline, request, controlnet=net)

    assert_near(found.pixels, reference)
    off = draw(pipeline, replace(request, control_scale=0.0), controlnet=net).pixels
    assert not np.array_equal(found.pixels, off)
    assert np.array_equal(off, draw(pipeline, replace(request, control=None)).pixels)


# --- what pictures are --------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", sorted(name for name in SAMPLERS if "LMS" not in name))
def test_every_sampler_draws_the_same_twice(tiny: Pipeline, sampler: str) -> None:
    request = replace(BASE, sampler=sampler.upper(), steps=3)

    first, second = draw(tiny, request), draw(tiny, request)

    assert first.is_finite
    assert first.pixels.std() > 1
    assert np.array_equal(first.values, second.values)
    assert first.facts["sampler"] == sampler
    assert not np.array_equal(first.values, draw(tiny, replace(request, seed=34)).values)


class _Missing:
    """As diffusers stands in for a class whose needs are not installed."""

    def __init__(self, *_: object, **__: object) -> None:
        raise ImportError("LMSDiscreteScheduler requires the scipy library")


def test_a_sampler_that_needs_more_says_so(tiny: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.LMSDiscreteScheduler", _Missing, raising=False)

    with pytest.raises(UsageError, match="LMS Karras needs SciPy"):
        draw(tiny, replace(BASE, sampler="LMS Karras"))


def test_the_trained_model_draws_what_is_asked(tiny: Pipeline) -> None:
    pixels = draw(tiny, replace(BASE, steps=15)).pixels
    red, green, blue = pixels[24:40, 24:40].reshape(-1, 3).mean(0)

    assert red > 150
    assert max(green, blue) < 60
    assert pixels[:4, :4].mean() < 40


def test_the_steps_are_told_and_can_be_ended(tiny: Pipeline) -> None:
    seen: list[tuple[int, int, tuple[int, ...]]] = []

    def stop(number: int, total: int, latents: Tensor) -> None:
        seen.append((number, total, tuple(latents.shape)))
        if number == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        draw(tiny, BASE, on_step=stop)
    assert seen == [(1, 5, (1, 4, 8, 8)), (2, 5, (1, 4, 8, 8))]


def test_facts_tell_what_a_picture_was_made_with(tiny: Pipeline) -> None:
    facts = draw(tiny, replace(BASE, size=(128, 64), steps=2)).facts

    wanted = {"family": "sd1", "variant": "base", "task": "txt2img", "prediction": "epsilon",
              "sampler": "DDIM", "steps": 2, "seed": 33, "size": (128, 64), "tokens": 7,
              "chunks": 1, "device": "cpu", "dtype": "float32", "vae_tiling": False}  # fmt: skip
    assert wanted.items() <= facts.items()


def test_steps_are_those_that_were_asked_for(tiny: Pipeline) -> None:
    """Heun asks the UNet twice a step, and an image saves the first of them."""
    heun = draw(tiny, replace(BASE, sampler="Heun", steps=3)).facts
    image = np.full((64, 64, 3), 90, np.uint8)
    part = draw(tiny, replace(BASE, steps=4, image=image, strength=0.5)).facts

    assert (heun["steps"], heun["passes"], heun["strength"]) == (3, 5, None)
    assert (part["steps"], part["passes"], part["strength"]) == (4, 2, 0.5)


def test_broken_weights_are_seen_not_hidden(tiny: Pipeline) -> None:
    broken = load_pipeline(TINY / "C.safetensors", device="cpu")
    with torch.no_grad():
        broken.unet.conv_out.bias[0] = torch.nan

    found = draw(broken, replace(BASE, steps=2))

    assert not found.is_finite
    assert found.pixels.max() == 0
    assert np.isnan(noise_correlation(broken))


def test_a_trained_model_answers_noise_with_noise(tiny: Pipeline, hole: Pipeline) -> None:
    assert noise_correlation(tiny) > 0.99
    assert noise_correlation(hole) > 0.9


def test_large_pictures_are_decoded_in_tiles_where_memory_is_short(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.zeros(1, 4, 8, 8)
    assert not decode(tiny, latents)[1]
    monkeypatch.setattr(pipelines, "free_memory_bytes", lambda _: 1 << 20)

    assert decode(tiny, latents)[1]


def test_values_become_bytes_by_rounding() -> None:
    values = np.array([-1, 0, 0.5, 1, 2, np.nan, np.inf, -np.inf], np.float32)

    assert to_pixels(values).tolist() == [0, 0, 128, 255, 255, 0, 255, 0]


# --- refusals -----------------------------------------------------------------------------------


GREY = np.full((64, 64, 3), 128, np.uint8)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": (100, 64)}, "no picture of 100 x 64"),
        ({"size": (32, 64)}, "no picture of 32 x 64"),
        ({"steps": 0}, "no picture in 0 steps"),
        ({"strength": 0.0, "image": GREY}, "no strength"),
        ({"seed": -1}, "no seed -1"),
        ({"sampler": "Eular"}, "no sampler 'Eular'"),
        ({"mask": box()}, "a mask without an image"),
        ({"image": GREY[:32]}, "no picture of 64 x 32"),
        ({"image": GREY, "size": (128, 64)}, r"the image is uint8 \[64, 64, 3\]"),
        ({"image": GREY / 255}, "the image is float64"),
        ({"image": GREY, "mask": box(72)}, "the mask is"),
        ({"control": GREY}, "a ControlNet and its picture go together"),
        ({"clip_skip": 99}, "no clip skip 99"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    tiny: Pipeline, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        draw(tiny, replace(BASE, **changes))


def test_each_model_draws_what_it_is_for(
    hole: Pipeline, narrow: dict[str, Pipeline], control: tuple[Pipeline, ControlNet]
) -> None:
    edit, (_, net) = narrow["edit"], control
    with_control = Request("x", image=GREY, control=GREY)

    with pytest.raises(UsageError, match="an inpainting model redraws a hole"):
        check_request(hole, Request("x"))
    with pytest.raises(UsageError, match="edits a whole image"):
        check_request(edit, Request("x"))
    with pytest.raises(UsageError, match="takes no ControlNet"):
        check_request(edit, with_control, net)
    with pytest.raises(UsageError, match="a ControlNet for sd1"):
        check_request(narrow["sdxl"], with_control, net)


def test_a_mask_keeps_known_latents_of_an_ordinary_model(
    tiny: Pipeline, picture: NDArray[np.uint8]
) -> None:
    nothing = np.zeros((64, 64), np.uint8)
    found = draw(tiny, replace(BASE, image=picture, mask=nothing))

    assert np.array_equal(found.pixels, picture)
    assert torch.equal(torch.from_numpy(found.latents), encode_image(tiny, picture)[0])
