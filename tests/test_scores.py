"""CLIP scores by a local folder: against transformers' own computation, and never a gate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_models import SIDE, image_processor, save_clip
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

import ckptools
from ckptools.cli import run
from ckptools.errors import InputError
from ckptools.render.probes import Probe
from ckptools.render.scores import (
    check_scorer,
    embed_pictures,
    embed_texts,
    fit_picture,
    likeness,
    load_scorer,
)
from ckptools.rendering import Drawn, Order, Rendering, Row, file_subject, mean_scores
from ckptools.rendering.scoring import scored

TEXTS = ["a red circle on a navy background", "Ünïcode  and   spaces", "a dog, " * 60]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture
def clip(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "tiny-clip"))


def pictures() -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(3)
    shapes = [(64, 64), (40, 100), (97, 33), (20, 24), (512, 300)]
    return [random.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]


def theirs(folder: Path, texts: list[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Embeddings of pictures and texts, by transformers alone."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder)
    tokens = CLIPTokenizer.from_pretrained(folder)(
        texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    pixels = image_processor()(images=pictures(), return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, **pixels)
    return out.image_embeds.double().numpy(), out.text_embeds.double().numpy()


def test_pictures_are_fitted_as_transformers_fits_them(saved: Path) -> None:
    lens = load_scorer(saved, device="cpu").lens
    expected = image_processor()(images=pictures(), return_tensors="np")["pixel_values"]

    for picture, wanted in zip(pictures(), expected, strict=True):
        fitted = fit_picture(picture, lens)
        assert fitted.shape == (3, SIDE, SIDE)
        np.testing.assert_allclose(fitted, wanted, atol=1e-5)


def test_scores_are_those_of_transformers(saved: Path) -> None:
    images, texts = theirs(saved, TEXTS)
    scorer = load_scorer(saved, device="cpu")

    ours = embed_pictures(scorer, pictures()), embed_texts(scorer, TEXTS)

    np.testing.assert_allclose(ours[0], images, atol=1e-5)
    np.testing.assert_allclose(ours[1], texts, atol=1e-5)
    assert likeness(ours[0][0], ours[1][0]) == pytest.approx(100 * images[0] @ texts[0], abs=1e-3)
    assert likeness(ours[0][0], ours[0][0]) == pytest.approx(100)
    assert np.ptp(images @ texts.T) > 0.05  # the model tells them apart
    assert len(scorer.tokenizer.ids(TEXTS[2])) > scorer.longest == 75


@pytest.mark.parametrize("form", ["pickle", "half", "shards"])
def test_weights_may_be_stored_otherwise(clip: Path, form: str) -> None:
    """As a pickle, of which nothing is run; as fp16; in shards."""
    weights = load_file(clip / "model.safetensors")
    expected = embed_texts(load_scorer(clip, device="cpu"), TEXTS[:1])
    (clip / "model.safetensors").unlink()
    if form == "pickle":
        torch.save(weights, clip / "pytorch_model.bin")
    elif form == "half":
        save_file({name: w.half() for name, w in weights.items()}, clip / "model.safetensors")
    else:
        names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        split = sorted(weights)
        parts = {names[0]: split[:20], names[1]: split[20:]}
        for file, its in parts.items():
            save_file({name: weights[name] for name in its}, clip / file)
        where = {name: file for file, its in parts.items() for name in its}
        index = json.dumps({"metadata": {}, "weight_map": where})
        (clip / "model.safetensors.index.json").write_text(index)

    found = embed_texts(load_scorer(clip, device="cpu"), TEXTS[:1])

    np.testing.assert_allclose(found, expected, atol=1e-2 if form == "half" else 1e-12)


def test_a_folder_of_weights_and_config_is_enough_for_a_public_model(clip: Path) -> None:
    """The public vocabulary is ours too, and OpenAI's preprocessing the usual one."""
    expected = load_scorer(clip, device="cpu")
    for name in ("vocab.json", "merges.txt", "preprocessor_config.json"):
        (clip / name).unlink()

    found = load_scorer(clip, device="cpu")

    assert found.lens == expected.lens
    assert found.tokenizer.ids(TEXTS[0]) == expected.tokenizer.ids(TEXTS[0])


def test_a_square_size_is_not_cut(clip: Path) -> None:
    """Some folders scale to a square; transformers 5 keeps the preprocessor elsewhere."""
    (clip / "preprocessor_config.json").unlink()
    square = {"size": {"width": 32, "height": 32}, "crop_size": 32, "resample": 2}
    (clip / "processor_config.json").write_text(json.dumps({"image_processor": square}))

    lens = load_scorer(clip, device="cpu").lens

    assert (lens.shortest, lens.size, lens.resample) == (0, (32, 32), 2)
    assert fit_picture(pictures()[1], lens).shape == (3, 32, 32)


def spoil(folder: Path, how: str) -> Path:
    config = folder / "config.json"
    weights = load_file(folder / "model.safetensors")
    said = json.loads(config.read_text())
    match how:
        case "none":
            return folder / "nothing"
        case "file":
            return folder / "model.safetensors"
        case "no config":
            config.unlink()
        case "other":
            config.write_text(json.dumps({"model_type": "siglip"}))
        case "not JSON":
            config.write_text("{")
        case "a list":
            config.write_text("[]")
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "missing":
            del weights["visual_projection.weight"], weights["logit_scale"]
            save_file(weights, folder / "model.safetensors")
        case "misshapen":
            said["projection_dim"] = 8
            config.write_text(json.dumps(said))
        case "impossible":
            said["vision_config"]["num_attention_heads"] = 7
            config.write_text(json.dumps(said))
        case "words":
            (folder / "vocab.json").unlink()
            said["text_config"]["vocab_size"] = 512
            weights["text_model.embeddings.token_embedding.weight"] = torch.zeros(512, 32)
            save_file(weights, folder / "model.safetensors")
            config.write_text(json.dumps(said))
        case "lens":
            (folder / "preprocessor_config.json").write_text('{"crop_size": "large"}')
    return folder


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("none", "there is no such folder"),
        ("file", "a file, not a CLIP model's folder"),
        ("no config", "it has no config.json"),
        ("other", "says 'siglip'"),
        ("not JSON", "not JSON"),
        ("a list", "not a mapping in JSON"),
        ("no weights", "without weights"),
        ("missing", r"without 'logit_scale' and 1 more tensor"),
        ("misshapen", r"'(text|visual)_projection.weight' is \[16, 32\], config.json says \[8, 32"),
        ("impossible", "no CLIP model can be built"),
        ("words", "512 words without its tokenizer"),
        ("lens", "preprocessor_config.json cannot be read"),
    ],
)
def test_what_is_no_clip_model_is_refused_with_the_fix(clip: Path, how: str, what: str) -> None:
    folder = spoil(clip, how)

    with pytest.raises(InputError, match=what) as caught:
        check_scorer(folder)
    assert caught.value.where
    assert caught.value.fix
    assert caught.value.exit_code == 2


def test_a_whole_folder_passes_without_reading_weights(saved: Path) -> None:
    check_scorer(saved)


# --- in a rendering -----------------------------------------------------------------------------

TINY = Path(ckptools.__file__).parent / "tiny"
PROMPTS = ["a red circle on a navy background", "a yellow star on a black background"]
FEW = ["--steps", "2", "--sampler", "DDIM", "--device", "cpu"]


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).copy()


def by_transformers(folder: Path, paths: list[Path], prompts: list[str]) -> tuple[NDArray, NDArray]:
    """(pictures x prompts, pictures x pictures) of 100 * cosine."""
    from transformers import CLIPModel, CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    images = image_processor()(images=[pixels(path) for path in paths], return_tensors="pt")
    with torch.no_grad():
        out = CLIPModel.from_pretrained(folder)(**tokens, **images)
    drawn, told = out.image_embeds.double().numpy(), out.text_embeds.double().numpy()
    return 100 * drawn @ told.T, 100 * drawn @ drawn.T


def test_a_rendering_is_scored_against_prompts_and_parents(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every figure against transformers'; the verdict and the checks are those without scores."""
    prompts = [word for prompt in PROMPTS for word in ("-p", prompt)]
    words = ["render", str(TINY / "C.safetensors"), "--beside", str(TINY / "A.safetensors"),
             *prompts, *FEW, "--json"]  # fmt: skip
    assert run([*words, "-o", str(tmp_path / "plain")]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert run([*words, "-o", str(tmp_path / "out"), "--scores", str(saved)]) == 0
    found = json.loads(capsys.readouterr().out)

    assert plain["scores"] is None
    assert found["checks"] == plain["checks"]
    assert found["verdict"] == plain["verdict"]
    names = [image["file"] for image in found["images"]]
    texts, likes = by_transformers(saved, [tmp_path / "out" / name for name in names], PROMPTS)
    assert [image["model"] for image in found["images"]] == ["C", "C", "A", "A"]
    for number, image in enumerate(found["images"]):
        row = number % 2
        assert image["scores"]["text"] == pytest.approx(texts[number, row], abs=1e-3)
        expected = {} if number >= 2 else {"A": pytest.approx(likes[number, row + 2], abs=1e-3)}
        assert image["scores"]["likeness"] == expected
    means = found["scores"]["models"]
    assert found["scores"]["model"] == "tiny-clip"
    assert len(found["scores"]["sha256"][0]) == 64
    assert means["C"]["text"] == pytest.approx((texts[0, 0] + texts[1, 1]) / 2, abs=1e-3)
    assert means["C"]["likeness"]["A"] == pytest.approx((likes[0, 2] + likes[1, 3]) / 2, abs=1e-3)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["scores"] == found["scores"]
    assert '"likeness"' in (tmp_path / "out" / "report.html").read_text()


def test_the_terminal_shows_the_means(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["render", str(TINY / "C.safetensors"), "--beside", str(TINY / "A.safetensors")]

    assert run([*words, "-p", PROMPTS[0] + ", big" * 80, *FEW, "-o", str(tmp_path / "out"),
                "--scores", str(saved)]) == 0  # fmt: skip

    text = capsys.readouterr().out
    assert "fits its prompts" in text
    assert "like A" in text
    assert "by the CLIP model tiny-clip, for information" in text
    assert "scores read the first 75 tokens of: prompt1" in text


def test_a_recipe_names_the_folder_and_a_wrong_one_ends_it_before_the_merge(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = (
        f"ckptools: 1\nmodels: {{C: '{TINY.as_posix()}/C.safetensors'}}\nmerge: C\n"
        "output: {path: out.safetensors}\nrender:\n"
        f"  prompts: [{PROMPTS[0]}]\n  steps: 2\n  device: cpu\n  scores: CLIP\n"
    )
    recipe.write_text(text)
    assert run(["merge", str(recipe)]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["recipe.yaml"]

    shutil.copytree(saved, tmp_path / "CLIP")
    assert run(["merge", str(recipe), "-q"]) == 0
    document = json.loads((tmp_path / "out-render" / "report.json").read_text())
    assert document["scores"]["model"] == "CLIP"
    assert set(document["scores"]["models"]) == {"merge", "C"}
    assert document["scores"]["models"]["merge"]["likeness"]["C"] == pytest.approx(100)


def test_nothing_is_drawn_where_the_folder_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    code = run(["render", str(TINY / "C.safetensors"), "-o", str(out), "--scores", str(TINY)])

    assert code == 2
    error = capsys.readouterr().err
    assert "not a CLIP model of transformers" in error
    assert "CLIPModel.save_pretrained" in error
    assert not out.exists()


def test_an_instruction_is_no_description(saved: Path, tmp_path: Path) -> None:
    """Editing models are told what to do: how well the picture fits that says nothing."""
    subject = file_subject(TINY / "C.safetensors", Order())
    drawn = Drawn(pictures()[0], {}, {"task": "edit"}, 0.0, False, tmp_path)
    rendering = Rendering(
        "", tmp_path, (subject,), (Row(Probe("red", "make it red"), 1),), {("C", 0): drawn},
        (), (), {}, {}, 0.0,
    )  # fmt: skip

    found = scored(rendering, saved, device="cpu")

    assert found.scores["C", 0].text is None
    assert mean_scores(found)["C"].text is None


def test_an_interruption_while_scoring_keeps_the_pictures(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptools.rendering.studio.scored", interrupt)
    out = tmp_path / "out"

    assert run(["render", str(TINY / "C.safetensors"), "-p", PROMPTS[0], *FEW, "-o", str(out),
                "--scores", str(saved), "-q"]) == 130  # fmt: skip

    document = json.loads((out / "report.json").read_text())
    assert document["interrupted"]
    assert document["scores"] is None
    assert "interrupted: the pictures are not scored" in document["notes"]
    assert (out / "sheet.png").is_file()


# --- in a sweep ---------------------------------------------------------------------------------


def write_sweep(folder: Path, scores: str = "") -> Path:
    recipe = folder / "recipe.yaml"
    models = ", ".join(f"{name}: '{TINY.as_posix()}/{name}.safetensors'" for name in "ABC")
    recipe.write_text(
        f"ckptools: 1\nmodels: {{{models}}}\nparams: {{M: 1}}\nmerge: A + (B - C) * M\n"
        "output: {path: out.safetensors}\n"
        f"render: {{prompts: [{PROMPTS[0]}], seeds: [1], steps: 2, device: cpu{scores}}}\n"
    )
    return recipe


def test_a_sweep_is_scored_and_judged_as_without(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved, tmp_path / "CLIP")
    recipe = write_sweep(tmp_path, ", scores: CLIP")
    words = ["sweep", str(recipe), "--set", "M=0,1"]
    assert run([*words, "--json", "-o", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert run([*words, "-o", str(tmp_path / "shown"), "--scores", str(saved)]) == 0
    shown = capsys.readouterr().out
    write_sweep(tmp_path)
    assert run([*words, "--json", "-o", str(tmp_path / "plain")]) == 0
    plain = json.loads(capsys.readouterr().out)

    paths = [Path(found["parents"][name]["images"][0]) for name in "ABC"]
    paths += [Path(variant["image"]) for variant in found["variants"]]
    texts, likes = by_transformers(saved, paths, PROMPTS[:1])
    for number, name in enumerate("ABC"):
        assert found["parents"][name]["fits"] == pytest.approx(texts[number, 0], abs=1e-3)
    for number, variant in enumerate(found["variants"], start=3):
        assert variant["fits"] == pytest.approx(texts[number, 0], abs=1e-3)
        for parent, name in enumerate("ABC"):
            alike = variant["distances"][name]["alike"]
            assert alike == pytest.approx(likes[number, parent], abs=1e-3)
    assert found["variants"][0]["distances"]["A"]["alike"] == pytest.approx(100)
    assert [v["verdict"] for v in found["variants"]] == [v["verdict"] for v in plain["variants"]]
    assert plain["variants"][0]["fits"] is None
    assert plain["parents"]["A"]["fits"] is None
    assert "fits its prompts" in shown
    assert "100 x cosine by the CLIP model tiny-clip" in shown


def test_a_sweep_with_a_wrong_folder_draws_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_sweep(tmp_path, ", scores: nowhere")

    assert run(["sweep", str(recipe), "--set", "M=0,1"]) == 2

    assert "there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out-sweep").exists()
