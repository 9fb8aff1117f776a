"""`ckptools render`: pictures of models and merges beside their parents, and what they say."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import write_tensors
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

import ckptools
from ckptools import rendering
from ckptools.cli import run
from ckptools.errors import InputError, OutputError, UsageError
from ckptools.recipe import RENDER_KEYS, load_recipe
from ckptools.render import Request, draw, load_pipeline, to_pixels
from ckptools.render.files import infotext, read_mask, read_picture, write_picture
from ckptools.render.page import html_page
from ckptools.render.probes import (
    PHOTOS,
    SHAPES,
    Probe,
    drawn_mask,
    drawn_picture,
    drawn_shape,
    probes_for,
    usual_guidance,
)
from ckptools.render.prompts import clip_tokenizer
from ckptools.render.sheet import contact_sheet
from ckptools.rendering import Order, Progress, Row, file_subject, render, render_files

TINY = Path(ckptools.__file__).parent / "tiny"
PROMPT = "a red circle on a navy background"
QUICK = Order(
    prompts=(Probe("circle", PROMPT), Probe("star", "a yellow star on a black background")),
    steps=3,
    sampler="DDIM",
    device="cpu",
)
RECIPE = """\
ckptools: 1
models: {{A: "{tiny}/A.safetensors", B: "{tiny}/B.safetensors", C: "{tiny}/C.safetensors"}}
merge: {merge}
output: {{path: merged.safetensors, overwrite: true}}
"""
SECTION = """\
render:
  when: {when}
  prompts: [{{id: circle, prompt: a red circle on a navy background}}]
  steps: 3
  sampler: DDIM
  device: cpu
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's is used, and no Hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def write_recipe(folder: Path, merge: str = "A + (B - C)", when: str = "") -> Path:
    path = folder / "recipe.yaml"
    text = RECIPE.format(tiny=TINY.as_posix(), merge=merge)
    path.write_text(text + (SECTION.format(when=when) if when else ""), encoding="utf-8")
    return path


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).copy()


def said(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


# --- a merge and its models ---------------------------------------------------------------------


def test_a_recipe_is_drawn_in_memory_as_the_saved_file_would_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    words = ["-p", PROMPT, "--steps", "3", "--sampler", "DDIM", "--device", "cpu", "--json"]

    assert run(["render", str(recipe), *words]) == 0
    found = said(capsys)
    folder = tmp_path / "merged-render"

    assert found["schema"] == "ckptools.render/1"
    assert found["verdict"] == "pass"
    assert not (tmp_path / "merged.safetensors").exists()
    assert [image["model"] for image in found["images"]] == ["merge", "A", "B", "C"]
    assert {"finite", "flat", "clipped", "latents"} <= {c["id"] for c in found["checks"]}
    assert all({"value", "bound", "verdict", "reason"} <= c.keys() for c in found["checks"])
    names = {path.name for path in folder.iterdir()}
    assert {"sheet.png", "report.html", "report.json", "merge--prompt1--seed1.png"} <= names
    assert len(names) == 7

    assert run(["merge", str(recipe), "-q"]) == 0
    saved = load_pipeline(tmp_path / "merged.safetensors", device="cpu")
    again = draw(saved, Request(PROMPT, seed=1, steps=3, sampler="DDIM", cfg=3.0))
    assert np.array_equal(again.pixels, pixels(folder / "merge--prompt1--seed1.png"))
    parent = draw(
        load_pipeline(TINY / "B.safetensors", device="cpu"),
        Request(PROMPT, seed=1, steps=3, sampler="DDIM", cfg=3.0),
    )
    assert np.array_equal(parent.pixels, pixels(folder / "B--prompt1--seed1.png"))


def test_parents_come_from_the_cache_and_are_the_same(tmp_path: Path) -> None:
    merge, parent = TINY / "C.safetensors", TINY / "A.safetensors"
    order = replace(QUICK, steps=1)

    first = render_files([merge], order, tmp_path / "one", beside=[parent])
    second = render_files([merge], order, tmp_path / "two", beside=[parent])
    fresh = render_files([merge], order, tmp_path / "three", beside=[parent], use_cache=False)
    other = render_files([merge], replace(order, seeds=(2,)), tmp_path / "4", beside=[parent])

    def cached(found: rendering.Rendering) -> list[bool]:
        return [drawn.cached for (label, _), drawn in found.pictures.items() if label == "A"]

    assert cached(first) == cached(fresh) == cached(other) == [False, False]
    assert cached(second) == [True, True]
    assert [d.cached for (who, _), d in second.pictures.items() if who == "C"] == [False, False]
    for cell, drawn in first.pictures.items():
        assert np.array_equal(drawn.pixels, second.pictures[cell].pixels)
        assert np.array_equal(drawn.pixels, fresh.pictures[cell].pixels)
        assert drawn.figures == pytest.approx(second.pictures[cell].figures)
    assert [c.value for c in first.checks] == pytest.approx([c.value for c in second.checks])


def test_a_damaged_cache_is_no_cache(tmp_path: Path) -> None:
    sources = [TINY / "C.safetensors"], replace(QUICK, steps=1)
    render_files(*sources, tmp_path / "one", beside=[TINY / "A.safetensors"])
    entries = sorted((tmp_path / "cache" / "ckptools" / "pictures").glob("*.png"))
    assert len(entries) == 2
    entries[0].write_bytes(b"no picture")
    with Image.open(entries[1]) as image:
        image.copy().save(entries[1])  # without its text

    found = render_files(*sources, tmp_path / "two", beside=[TINY / "A.safetensors"])

    assert not any(drawn.cached for drawn in found.pictures.values())


def test_the_cache_forgets_what_was_not_used_for_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptools.rendering.cache._CACHE_BYTES", 20_000)
    sources = [TINY / "C.safetensors"], replace(QUICK, seeds=(1, 2, 3, 4), steps=1)

    render_files(*sources, tmp_path / "one", beside=[TINY / "A.safetensors"])

    kept = list((tmp_path / "cache" / "ckptools" / "pictures").glob("*.png"))
    assert len(kept) < 8
    assert 0 < sum(path.stat().st_size for path in kept) <= 20_000


def test_a_bad_merge_fails_its_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f'ckptools: 1\nmodels: {{C: "{TINY.as_posix()}/C.safetensors", '
        f'U: "{TINY.as_posix()}/U.safetensors"}}\nmerge: (C + U) * 0.5\n'
        "output: {path: noise.safetensors}\n"
    )
    prompts = ["-p", PROMPT, "-p", "a yellow star on a black background"]
    words = ["--steps", "8", "--sampler", "DDIM", "--device", "cpu", "-o", str(tmp_path / "out")]

    assert run(["render", str(path), *prompts, *words, "--json"]) == 1
    found = said(capsys)

    verdicts = {check["id"]: check["verdict"] for check in found["checks"]}
    assert found["verdict"] == "fail"
    assert "fail" in (verdicts["latents"], verdicts["prompts"])
    assert verdicts["finite"] == "pass"


# --- in a recipe --------------------------------------------------------------------------------


def test_before_save_a_failing_merge_leaves_the_old_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, when="before_save")
    old = tmp_path / "merged.safetensors"
    old.write_bytes(b"what was here")
    monkeypatch.setattr(
        "ckptools.rendering.judging._finite",
        lambda label, cells: rendering.Check("finite", label, 1, 0, "fail", "a NaN", ()),
    )

    assert run(["merge", str(recipe)]) == 1

    text = capsys.readouterr().err
    assert "the merge is not saved: a NaN" in text
    assert "recipe.yaml:6" in text
    assert old.read_bytes() == b"what was here"
    assert {path.name for path in tmp_path.iterdir()} >= {"merged-render", "recipe.yaml"}
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob("*.ckptools.json"))


@pytest.mark.parametrize("when", ["before_save", "after_save"])
def test_a_merge_is_drawn_when_its_recipe_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    recipe = write_recipe(tmp_path, when=when)

    assert run(["merge", str(recipe), "--json"]) == 0
    found = said(capsys)

    assert found["render"]["verdict"] == "pass"
    assert len(found["render"]["images"]) == 4
    assert (tmp_path / "merged-render" / "sheet.png").is_file()
    assert (tmp_path / "merged.safetensors").is_file()


def test_what_cannot_be_drawn_is_said_before_the_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, when="after_save")
    text = recipe.read_text()

    recipe.write_text(text.replace("DDIM", "DDMI"))
    assert run(["merge", str(recipe), "-q"]) == 2
    assert "did you mean 'DDIM'" in capsys.readouterr().err
    control = text.replace("A.safetensors", "control.safetensors").replace("A + (B - C)", "A")
    recipe.write_text(control)
    assert run(["merge", str(recipe), "-q"]) == 2
    assert "no pictures are drawn with controlnet models" in capsys.readouterr().err
    assert not (tmp_path / "merged.safetensors").exists()


def test_every_key_of_render_is_documented_as_the_schema_says() -> None:
    text = (Path(__file__).parents[1] / "docs" / "rendering.md").read_text(encoding="utf-8")

    assert len(RENDER_KEYS) > 20
    for name, key in RENDER_KEYS.items():
        assert f"| `{name}` | {key.text} |" in text


def test_what_a_recipe_orders_is_what_is_drawn(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, when="never")
    image = tmp_path / "start.png"
    Image.fromarray(drawn_shape((64, 64))).save(image)
    more = "  guidance: 2\n  seeds: [4]\n  image: start.png\n  strength: 0.5\n  against: none\n"
    recipe.write_text(recipe.read_text() + more)

    order = rendering.section_order(load_recipe(recipe))

    assert (order.cfg, order.seeds, order.strength, order.steps) == (2, (4,), 0.5, 3)
    assert order.image == image
    assert [probe.id for probe in order.prompts] == ["circle"]
    assert run(["merge", str(recipe), "-q"]) == 0
    assert not (tmp_path / "merged-render").exists()
    assert run(["render", str(recipe), "-q"]) == 0
    document = json.loads((tmp_path / "merged-render" / "report.json").read_text())
    assert [item["task"] for item in document["images"]] == ["img2img"]
    assert document["settings"]["strength"] == 0.5


def test_the_deeper_checks_are_run_where_the_recipe_says(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, when="never")
    recipe.write_text(recipe.read_text() + "  check: true\n  against: none\n")

    assert run(["render", str(recipe), "-q"]) == 0

    document = json.loads((tmp_path / "merged-render" / "report.json").read_text())
    found = {check["id"] for check in document["checks"]}
    assert {"finite", "flat"} < found
    assert len(found) > 5
    assert [image["model"] for image in document["images"]] == ["merge"]


# --- LoRAs, holes, ControlNets ------------------------------------------------------------------


@pytest.mark.parametrize("lora", ["striped", "glow"])
def test_a_baked_lora_is_the_one_that_diffusers_loads(tmp_path: Path, lora: str) -> None:
    """Within 2 of 255: the baked weights are rounded to fp16 once more."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f'ckptools: 1\nmodels: {{C: "{TINY.as_posix()}/C.safetensors"}}\nmerge: C\n'
        f'loras: [{{path: "{TINY.as_posix()}/{lora}.safetensors", weight: 1.0}}]\n'
        "output: {path: baked.safetensors, dtype: fp32}\n"
    )
    words = ["-p", PROMPT, "--seed", "7", "--steps", "5", "--sampler", "DDIM", "--device", "cpu"]
    assert run(["render", str(path), *words, "-q"]) == 0

    plain = load_pipeline(TINY / "C.safetensors", device="cpu")
    request = Request(PROMPT, seed=7, steps=5, sampler="DDIM", cfg=3.0)
    without = draw(plain, request).pixels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = diffusers.DDIMScheduler.from_pretrained(TINY / "config" / "scheduler")
        pipe = diffusers.StableDiffusionPipeline(
            vae=plain.vae, unet=plain.unet, text_encoder=None, tokenizer=None,
            scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        pipe.load_lora_weights(str(TINY), weight_name=f"{lora}.safetensors")
        from ckptools.render import encode

        text = encode(plain, PROMPT)
        pipe.set_progress_bar_config(disable=True)
        out = pipe(
            prompt_embeds=text.positive, negative_prompt_embeds=text.negative,
            num_inference_steps=5, guidance_scale=3.0, output_type="np",
            generator=torch.Generator().manual_seed(7),
        )  # fmt: skip
    theirs = to_pixels(out.images[0]).astype(int)
    ours = pixels(tmp_path / "baked-render" / "merge--prompt1--seed7.png").astype(int)

    assert np.abs(ours - theirs).max() <= 2
    assert np.abs(ours - without).max() > 20


def test_inpainting_leaves_the_rest_as_it_was(tmp_path: Path) -> None:
    given = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(given).save(tmp_path / "photo.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[8:30, 20:50] = 255
    Image.fromarray(mask).save(tmp_path / "hole.png")
    order = replace(QUICK, image=tmp_path / "photo.png", mask=tmp_path / "hole.png")

    found = render_files(
        [TINY / "I.safetensors"], order, tmp_path / "out", beside=[TINY / "A.safetensors"]
    )

    assert len(found.pictures) == 4
    for drawn in found.pictures.values():
        assert drawn.facts["task"] == "inpaint"
        saved = pixels(drawn.path)
        assert np.array_equal(saved[mask == 0], given[mask == 0])
        assert (saved[mask > 0] != given[mask > 0]).any()
    check = next(check for check in found.checks if check.id == "outside_mask")
    assert (check.value, check.bound, check.verdict) == (0, 0, "pass")


def test_an_inpainting_model_gets_a_picture_and_a_hole(tmp_path: Path) -> None:
    found = render_files([TINY / "I.safetensors"], QUICK, tmp_path / "out")

    assert "no image given: a drawn one is used" in found.notes
    assert "no mask given: a box in the middle is redrawn" in found.notes
    outside = drawn_mask((64, 64)) == 0
    for drawn in found.pictures.values():
        assert np.array_equal(drawn.pixels[outside], drawn_picture((64, 64))[outside]) or (
            np.array_equal(drawn.pixels[outside], drawn_shape((64, 64))[outside])
        )


def test_a_controlnet_is_drawn_with(tmp_path: Path) -> None:
    order = replace(QUICK, control=TINY / "control.safetensors", condition="edges")
    found = render_files([TINY / "C.safetensors"], order, tmp_path / "out")
    plain = render_files([TINY / "C.safetensors"], QUICK, tmp_path / "plain")
    Image.fromarray(drawn_shape((100, 80))).save(tmp_path / "edges.png")
    own = render_files(
        [TINY / "C.safetensors"],
        replace(order, condition=str(tmp_path / "edges.png")),
        tmp_path / "own",
    )

    for cell, drawn in found.pictures.items():
        assert drawn.facts["control_scale"] == 1
        assert not np.array_equal(drawn.pixels, plain.pictures[cell].pixels)
        assert not np.array_equal(drawn.pixels, own.pictures[cell].pixels)
    with pytest.raises(UsageError, match="no condition 'edgse'"):
        render_files([TINY / "C.safetensors"], replace(order, condition="edgse"), tmp_path / "none")


# --- judgement ----------------------------------------------------------------------------------


def broken(tmp_path: Path, change: str) -> Path:
    tensors = load_file(TINY / "C.safetensors")
    if change == "nan":
        tensors["model.diffusion_model.out.2.bias"][0] = torch.nan
    elif change == "black":
        tensors["first_stage_model.decoder.conv_out.weight"].zero_()
        tensors["first_stage_model.decoder.conv_out.bias"].fill_(-3)
    elif change == "deaf":
        for name, tensor in tensors.items():
            if ".attn2.to_out.0." in name:
                tensor.zero_()
    return write_tensors(tmp_path / f"{change}.safetensors", tensors)


@pytest.mark.parametrize(
    ("change", "check", "reason"),
    [
        ("nan", "finite", "values are NaN or Inf"),
        ("black", "flat", "2 of 2 pictures are black"),
        ("deaf", "prompts", "pictures of different prompts differ by"),
    ],
)
def test_broken_models_are_told_by_their_pictures(
    tmp_path: Path, change: str, check: str, reason: str
) -> None:
    path = broken(tmp_path, change)

    found = render_files([path], QUICK, tmp_path / "out", beside=[TINY / "C.safetensors"])

    told = next(each for each in found.checks if each.id == check)
    assert found.verdict == told.verdict == "fail"
    assert reason in told.reason
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verdict"] == "fail"
    alone = render_files([path], QUICK, tmp_path / "alone")
    assert alone.verdict == "fail" or change == "deaf"


def test_a_sound_model_passes_without_parents_and_twice_the_same(tmp_path: Path) -> None:
    first = render_files([TINY / "C.safetensors"], QUICK, tmp_path / "one")
    second = render_files([TINY / "C.safetensors"], QUICK, tmp_path / "two")

    assert first.verdict == "pass"
    for cell, drawn in first.pictures.items():
        assert np.array_equal(drawn.pixels, second.pictures[cell].pixels)
    one, two = ((tmp_path / name / "sheet.png").read_bytes() for name in ("one", "two"))
    assert one == two


def test_several_models_have_a_verdict_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [TINY / "C.safetensors", broken(tmp_path, "nan"), TINY / "C.safetensors"]
    words = [str(path) for path in files]
    options = ["-p", PROMPT, "--steps", "2", "--device", "cpu", "-o", str(tmp_path / "out")]

    assert run(["render", *words, *options]) == 1

    text = capsys.readouterr().out
    assert "verdict: fail" in text
    assert "C (2)" in text
    assert "3 pictures of 3 models" in text


def test_a_parent_that_cannot_draw_is_left_out_with_a_note(tmp_path: Path) -> None:
    beside = [TINY / "glow.safetensors", tmp_path / "none.safetensors"]
    beside[1].write_bytes(b"no model at all")

    found = render_files([TINY / "C.safetensors"], QUICK, tmp_path / "out", beside=beside)

    assert [subject.label for subject in found.subjects] == ["C"]
    assert any(note.startswith("glow is left out: ") for note in found.notes)
    assert any(note.startswith("none is left out: ") for note in found.notes)


class _Stop(Progress):
    def __init__(self, after: int) -> None:
        self.left = after

    def drawn(self) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_an_interruption_keeps_what_is_done(tmp_path: Path) -> None:
    order = replace(QUICK, steps=1)
    found = render_files(
        [TINY / "C.safetensors"], order, tmp_path, beside=[TINY / "A.safetensors"],
        progress=_Stop(3),
    )  # fmt: skip

    assert found.interrupted
    assert len(found.pictures) == 3
    assert len(list(tmp_path.glob("*--seed1.png"))) == 3
    assert json.loads((tmp_path / "report.json").read_text())["interrupted"]
    assert found.sheet.is_file()


# --- what is drawn where nothing is said --------------------------------------------------------


def test_the_tiny_family_draws_shapes_and_says_so_on_paper(tmp_path: Path) -> None:
    order = Order(steps=1, device="cpu", sampler="Euler a", seeds=(3,), negative="blue")
    found = render_files([TINY / "C.safetensors"], order, tmp_path)

    assert [row.probe.prompt for row in found.rows] == [probe.prompt for probe in SHAPES]
    assert found.settings["cfg"] == 3
    with Image.open(tmp_path / "C--circle--seed3.png") as image:
        text = image.info["parameters"]
    sha256 = found.models["C"]["sha256"][0]
    assert text.split("\n")[:2] == [PROMPT, "Negative prompt: blue"]
    assert re.fullmatch(
        r"Steps: 1, Sampler: Euler a, CFG scale: 3, Seed: 3, Size: 64x64, "
        rf"Model hash: {sha256[:10]}, Model: C, RNG: CPU, Version: ckptools \S+",
        text.split("\n")[2],
    )


def test_clip_knows_every_word_of_the_photographs() -> None:
    for probe in PHOTOS:
        assert len(clip_tokenizer().ids(probe.prompt)) <= 75
    assert any("hands" in probe.id and "bad fingers" in probe.negative for probe in PHOTOS)


def test_a_full_size_model_without_a_gpu_is_spared(tmp_path: Path) -> None:
    """As large as SD1 in pixels, though not in weights."""
    pipeline = replace(load_pipeline(TINY / "C.safetensors", device="cpu"), size=(512, 512))

    probes, template, notes = rendering.settle(pipeline, Order())
    own = rendering.settle(pipeline, replace(QUICK, size=(64, 64)))
    more = rendering.settle(pipeline, replace(QUICK, probes=True))

    assert (len(probes), template.steps, template.size) == (1, 8, (256, 256))
    assert "no GPU" in notes[0]
    assert own[2] == []
    assert [probe.id for probe in more[0]] == ["circle", "star", *(p.id for p in SHAPES[2:])]


# --- pictures as files --------------------------------------------------------------------------


def test_values_with_commas_are_quoted_as_the_web_uis_do() -> None:
    facts = {"sampler": "DPM++ 2M Karras", "steps": 20, "cfg": 7.5, "seed": 1,
             "size": [512, 768], "clip_skip": 2}  # fmt: skip
    text = infotext("a\nb", "", facts, model="x, y: z", model_hash="0123456789abcdef")

    assert text == (
        "a b\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 1, "
        'Size: 512x768, Model hash: 0123456789, Model: "x, y: z", Clip skip: 2, RNG: CPU'
    )


def test_the_web_uis_are_told_schedule_and_strength() -> None:
    facts = {"sampler": "DPM++ 2M SDE Exponential", "steps": 20, "cfg": 7, "seed": 1,
             "size": [64, 64], "clip_skip": 1, "strength": 0.75}  # fmt: skip

    text = infotext("a", "", facts, model="m")

    assert "Sampler: DPM++ 2M SDE, Schedule type: Exponential, " in text
    assert "Denoising strength: 0.75" in text
    assert "Schedule type" not in infotext("a", "", {**facts, "sampler": "DPM2"}, model="m")


def test_pictures_are_read_upright_on_white_and_filled_in(tmp_path: Path) -> None:
    half = np.zeros((30, 50, 4), np.uint8)
    half[:, 25:] = (255, 0, 0, 255)
    Image.fromarray(half).save(tmp_path / "half.png")

    assert read_picture(tmp_path / "half.png").shape == (24, 48, 3)
    filled = read_picture(tmp_path / "half.png", (32, 32))
    assert filled.shape == (32, 32, 3)
    assert filled[0, 0].tolist() == [255, 255, 255]
    assert filled[0, -1].tolist() == [255, 0, 0]
    assert read_mask(tmp_path / "half.png", (32, 32))[0, [0, -1]].tolist() == [255, 0]
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="not a picture"):
        read_picture(tmp_path / "no.png")
    with pytest.raises(InputError, match="No such file"):
        read_picture(tmp_path / "none.png")


# --- sheets -------------------------------------------------------------------------------------


def test_a_sheet_enlarges_small_pictures_and_frames_failures() -> None:
    red = np.full((64, 64, 3), (200, 10, 10), np.uint8)
    sheet = contact_sheet(
        [[red, None], [red, red]],
        rows=["one\nlong " * 40, "two\x1b[31m"],
        columns=["A", "B" * 200],
        title="A + B",
        failed={(1, 1)},
    )
    found = np.asarray(sheet)

    assert (found == (200, 10, 10)).all(-1).sum() == 3 * 192 * 192
    assert (found == (198, 40, 40)).all(-1).sum() >= 4 * 5 * 192
    assert found.shape[1] == 24 + 230 + 12 + 2 * 192 + 12 + 24


def test_a_sheet_scales_large_pictures_down_and_takes_none() -> None:
    wide = np.zeros((512, 2048, 3), np.uint8)

    assert contact_sheet([[wide]], rows=[""], columns=["x"]).width == 2 * 24 + 512
    assert contact_sheet([[wide] * 300], rows=[""], columns=["x"] * 300).width < 40_000
    assert contact_sheet([], rows=[], columns=[]).width > 0


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sampler", "Eular"], "no sampler 'Eular'"),
        (["--size", "big"], "is not WIDTHxHEIGHT"),
        (["--size", "70x70"], "no picture of 70 x 70"),
        (["--image", "none.png"], "there is no such image"),
        (["--condition", "edges"], "a condition without a ControlNet"),
        (["--mask", "{here}"], "a mask without an image"),
        (["-o", "{here}/x"], "recipe.yaml"),
        (["{here}"], "a recipe is rendered alone"),
    ],
)
def test_a_mistake_says_what_and_draws_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    here = write_recipe(tmp_path)
    if "--mask" in words:
        here = tmp_path / "mask.png"
        Image.fromarray(drawn_mask((64, 64))).save(here)
    source = TINY / "C.safetensors" if words[0] != "{here}" else here
    given = [word.format(here=here) for word in words]
    out = [] if "-o" in words else ["-o", str(tmp_path / "out")]

    assert run(["render", str(source), *given, *out, "--steps", "1"]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.rglob("*--seed1.png"))


def test_a_row_and_a_subject_have_names(tmp_path: Path) -> None:
    subject = file_subject(tmp_path / "a b.safetensors", Order())

    assert (subject.label, subject.title) == ("a b", "a b.safetensors")
    assert Row(Probe("x", "y"), 3).name == "x--seed3"
    assert rendering.versions()["diffusers"]


def test_a_file_named_as_an_attack_becomes_a_word(tmp_path: Path) -> None:
    subject = file_subject(TINY / "C.safetensors", QUICK, label="../x\x1b[31m<b>")

    found = render([subject], replace(QUICK, steps=1), tmp_path / "out")

    assert {path.parent for path in (tmp_path / "out").rglob("*")} == {tmp_path / "out"}
    assert not list(tmp_path.glob("*.png"))
    assert all(drawn.path.is_file() for drawn in found.pictures.values())


# --- the rest -----------------------------------------------------------------------------------


def test_the_words_that_a_model_knows_choose_what_it_draws() -> None:
    tiny = load_pipeline(TINY / "C.safetensors", device="cpu")
    (encoder,) = tiny.text_encoders
    clip = replace(encoder, tokenizer=clip_tokenizer())
    bytewise = replace(encoder.tokenizer, engine=_Bytes())

    large = replace(tiny, text_encoders=(clip,), blueprint=replace(tiny.blueprint, family="sdxl"))
    edit = replace(tiny, blueprint=replace(tiny.blueprint, variant="ip2p"))
    assert (probes_for(large), usual_guidance(large)) == (PHOTOS, 6)
    assert usual_guidance(replace(tiny, text_encoders=(clip,))) == 7
    assert [probe.id for probe in probes_for(edit)] == ["red", "star"]
    with pytest.raises(UsageError, match="no built-in prompt"):
        probes_for(replace(tiny, text_encoders=(replace(encoder, tokenizer=bytewise),)))


class _Bytes:
    """A vocabulary of letters."""

    def encode(self, text: str, add_special_tokens: bool) -> _Bytes:
        self.ids = list(text.encode())
        return self


def test_an_interrupted_gate_ends_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, when="before_save")
    monkeypatch.setattr("ckptools.render.draw", _interrupt)

    assert run(["merge", str(recipe), "-q"]) == 130
    assert not (tmp_path / "merged.safetensors").exists()
    assert run(["render", str(TINY / "C.safetensors"), "-o", str(tmp_path / "x")]) == 130
    assert not list(tmp_path.rglob("sheet.png"))


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_paths_of_a_recipe_are_beside_it(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, when="never")
    Image.fromarray(drawn_shape((64, 64))).save(tmp_path / "edges.png")
    recipe.write_text(
        recipe.read_text() + "  folder: pictures\n  condition: edges.png\n  control: "
        f"{(TINY / 'control.safetensors').as_posix()}\n"
    )

    assert run(["render", str(recipe), "--prompt", PROMPT, "--steps", "1", "-q"]) == 0
    document = json.loads((tmp_path / "pictures" / "report.json").read_text())
    assert document["settings"]["condition"].endswith("edges.png")
    assert document["settings"]["control"] == "control.safetensors"


def test_without_the_libraries_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "diffusers" else found(name)
    )

    with pytest.raises(UsageError, match="pictures need diffusers") as caught:
        rendering.check_order(Order())
    assert "ckptools[render]" in caught.value.fix


def test_large_pictures_are_embedded_as_jpeg() -> None:
    page = html_page({"pixels": np.zeros((512, 512, 3), np.uint8)})

    assert '"data:image/jpeg;base64,' in page


def test_files_that_cannot_be_written_or_are_too_large_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = drawn_shape((64, 64))
    with pytest.raises(OutputError, match="No such file"):
        write_picture(picture, tmp_path / "none" / "x.png", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="this is a file"):
        render_files([TINY / "C.safetensors"], QUICK, tmp_path / "file")
    write_picture(picture, tmp_path / "x.png", {})
    monkeypatch.setattr("ckptools.render.files._MOST_PIXELS", 64)
    with pytest.raises(InputError, match="too many pixels"):
        read_picture(tmp_path / "x.png")


def test_a_rendering_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"

    assert run(["render", str(TINY / "A.safetensors"), "--size", "33x17", "-o", str(folder)]) == 2
    assert not folder.exists()
