"""Model cards: front matter, licences, and words of the owner's that stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from models import shrunk, write_model
from safetensors.torch import load_file, save_file

from ckptools.cli import run
from ckptools.errors import CkptError, InputError
from ckptools.hub.card import BEGIN, END, Facts, Parent, Picture, Weights, make_card
from ckptools.hub.licences import HUB_LICENCES, Licence, inherit, is_restricted, licence_id
from ckptools.publication import Order, gather, make_card_alone

SHA = "0123456789abcdef" * 4
MIT = Licence("mit", "", "", ("all 2 parents have it",), "", {})
FACTS = Facts(
    repo="me/mixed",
    title="mixed",
    weights=(Weights("mixed.safetensors", 1234567, SHA, SHA[:10], "abcdefabcdef"),),
    family="sd1",
    family_title="Stable Diffusion 1.x",
    variant="base",
    prediction="epsilon",
    kind="checkpoint",
    formula="A + (B - C) * M",
    params={"M": {"default": 0.5, "IN00-IN05": 0.25}, "W": {"mbw": [0.0, 0.5]}},
    parents=(
        Parent("A", "a.safetensors", "org/a", "f" * 40, SHA, "mit"),
        Parent("B", "b|<script>.safetensors", "", "", "", ""),
    ),
    recipe="recipe.yaml",
    output="mixed.safetensors",
    pictures=(
        Picture("renders/a.png", "A", "a red circle", 1, is_merge=False),
        Picture("renders/m.png", "mixed", "a red circle", 1, is_merge=True),
    ),
    sheet="renders/sheet.png",
    verdict="pass",
    is_folder=False,
    tags=("art",),
    description="",
)


def front(text: str) -> dict[str, object]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_the_front_matter_is_what_the_hub_reads() -> None:
    text = make_card(FACTS, MIT)

    assert front(text) == {
        "license": "mit",
        "base_model": ["org/a"],
        "base_model_relation": "merge",
        "library_name": "diffusion-single-file",
        "pipeline_tag": "text-to-image",
        "tags": ["merge", "ckptools", "stable-diffusion", "art"],
        "widget": [{"text": "a red circle", "output": {"url": "renders/m.png"}}],
    }
    card = ModelCard(text)  # the Hub's own reader
    assert card.data.license == "mit"
    assert card.data.base_model == ["org/a"]
    assert card.data.library_name == "diffusion-single-file"


@pytest.mark.parametrize(
    "words",
    [
        "A + (B - C) * M",
        f"| **A** | [org/a](https://huggingface.co/org/a) a.safetensors | `{'f' * 12}` | `{SHA}` |",
        "| M | IN00-IN05 | 0.25 |",
        "| W | mbw | 0, 0.5 |",
        f"| mixed.safetensors | 1,234,567 | `{SHA}` | `{SHA[:10]}` | `abcdefabcdef` |",
        "| prompt | seed | A | mixed |",
        "| a red circle | 1 | ![A](renders/a.png) | ![mixed](renders/m.png) |",
        "![all pictures](renders/sheet.png)",
        "Test render: **pass**",
        "StableDiffusionPipeline.from_single_file(path, torch_dtype=torch.float16)",
        "models/Stable-diffusion",
        "models/checkpoints",
        "ckptools merge recipe.yaml",
        "Stable Diffusion 1.x, epsilon prediction",
        "mit (all 2 parents have it).",
    ],
)
def test_the_body_tells(words: str) -> None:
    assert words in make_card(FACTS, MIT)


def test_names_in_files_do_not_become_markup() -> None:
    text = make_card(replace(FACTS, title="# <b>\n---"), MIT)

    assert "<script>" not in text
    assert "b\\|\\<script\\>" in text
    assert "# \\# \\<b\\> ---" in text


def test_a_folder_is_loaded_by_diffusers() -> None:
    text = make_card(replace(FACTS, is_folder=True), MIT)

    assert front(text)["library_name"] == "diffusers"
    assert 'DiffusionPipeline.from_pretrained("me/mixed"' in text


@pytest.mark.parametrize(
    ("family", "variant", "tag", "pipeline"),
    [
        ("sd1", "inpainting", "image-to-image", "StableDiffusionInpaintPipeline"),
        ("sdxl", "base", "text-to-image", "StableDiffusionXLPipeline"),
        ("sdxl-refiner", "base", "image-to-image", "StableDiffusionXLImg2ImgPipeline"),
        ("llama", "", None, ""),
    ],
)
def test_families_have_their_own_pipeline(
    family: str, variant: str, tag: str | None, pipeline: str
) -> None:
    text = make_card(replace(FACTS, family=family, variant=variant), MIT)

    assert front(text).get("pipeline_tag") == tag
    assert pipeline in text


@pytest.mark.parametrize(
    ("kind", "web_ui", "comfy"),
    [
        ("checkpoint", "models/Stable-diffusion", "models/checkpoints"),
        ("lora", "models/Lora", "models/loras"),
        ("vae", "models/VAE", "models/vae"),
        ("controlnet", "models/ControlNet", "models/controlnet"),
    ],
)
def test_every_kind_of_file_has_its_folder(kind: str, web_ui: str, comfy: str) -> None:
    text = make_card(replace(FACTS, kind=kind), MIT)

    assert f"put the file into `{web_ui}`." in text
    assert f"put the file into `{comfy}`." in text


def test_a_model_that_is_no_merge_has_no_formula() -> None:
    text = make_card(
        replace(FACTS, formula="", parents=(), params={}, recipe="", pictures=(), sheet="",
                verdict="", description="Mine."),
        MIT,
    )  # fmt: skip

    assert "How it was made" not in text
    assert "How to make it again" not in text
    assert "Pictures" not in text
    assert "base_model_relation" not in front(text)
    assert "Mine.\n\nStable Diffusion 1.x" in text


def test_the_owners_words_and_entries_stay() -> None:
    first = make_card(FACTS, MIT)
    head, ours = first.split(BEGIN)
    edited = (
        head.replace("license: mit", "license: mit\nlanguage: en").replace("- art", "- mine")
        + "Above.\n\n" + BEGIN + ours + "\nBelow.\n"
    )  # fmt: skip
    again = make_card(replace(FACTS, verdict="warn"), MIT, edited)

    assert front(again)["language"] == "en"
    assert front(again)["tags"] == ["merge", "ckptools", "stable-diffusion", "mine", "art"]
    assert "Above.\n\n" + BEGIN in again
    assert again.endswith(END + "\n\nBelow.\n")
    assert "**warn**" in again
    assert "**pass**" not in again
    assert make_card(replace(FACTS, verdict="warn"), MIT, again) == again


def test_a_card_without_our_marks_is_added_to() -> None:
    text = make_card(FACTS, MIT, "# My model\n\nAll about it.\n")

    assert text.index("All about it.") < text.index(BEGIN)
    assert make_card(FACTS, MIT, text) == text


def test_front_matter_that_is_not_yaml_is_told() -> None:
    with pytest.raises(InputError, match="not YAML"):
        make_card(FACTS, MIT, "---\na: [b\n---\n\nx")


# --- licences ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("CreativeML Open RAIL++-M License", "openrail++"),
        ("CreativeML OpenRAIL-M", "creativeml-openrail-m"),
        ("CreativeML Open RAIL-M", "creativeml-openrail-m"),
        ("Apache-2.0", "apache-2.0"),
        ("Apache License, Version 2.0", "apache-2.0"),
        ("MIT License", "mit"),
        ("My own", "My own"),
    ],
)
def test_licences_as_they_are_spelt(text: str, found: str) -> None:
    assert licence_id(text) == found


def test_parents_that_agree_pass_theirs_on() -> None:
    found = inherit({"A": "Apache-2.0", "B": "apache-2.0"})

    assert (found.id, found.refused) == ("apache-2.0", "")
    assert found.why == ("all 2 parents have it",)


@pytest.mark.parametrize(
    ("parents", "reason"),
    [
        ({"A": "mit", "B": "apache-2.0"}, "differ"),
        ({"A": "mit", "B": ""}, "the licence of B is not known"),
        ({"A": "", "B": "other", "C": "unknown"}, "of A, B and C is not known"),
        ({"A": "cc-by-nc-4.0", "B": "cc-by-nc-4.0"}, "restricts commercial use"),
        ({"A": "deepfloyd-if-license"}, "restricts commercial use"),
        ({}, "nothing tells"),
    ],
)
def test_doubt_is_refused_until_the_owner_decides(parents: dict[str, str], reason: str) -> None:
    assert reason in inherit(parents).refused

    given = inherit(parents, given="cc-by-nc-4.0")
    assert (given.id, given.refused) == ("cc-by-nc-4.0", "")
    assert given.why[0] == "as given"


def test_a_licence_that_the_hub_does_not_list_is_named() -> None:
    found = inherit({}, given="My Own License", link="https://example.org/l")
    text = make_card(FACTS, found)

    assert front(text)["license"] == "other"
    assert front(text)["license_name"] == "my-own-license"
    assert front(text)["license_link"] == "https://example.org/l"
    assert "[My Own License](https://example.org/l)" in text


def test_a_model_without_parents_has_its_own() -> None:
    assert inherit({}, own="MIT").id == "mit"


def test_what_restricts_is_known_by_name() -> None:
    restricted = {name for name in HUB_LICENCES if is_restricted(name)}

    assert {name for name in HUB_LICENCES if "-nc-" in name} < restricted
    assert not restricted & {"mit", "apache-2.0", "openrail++", "creativeml-openrail-m", "ncsa"}


# --- from files ----------------------------------------------------------------------------------


@pytest.fixture
def lone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_model(tmp_path / "lone.safetensors", shrunk("sd1", 64), seed=1)
    save_file(load_file(path), path, {"modelspec.license": "MIT"})
    return path


def test_the_card_command_prints_it_alone(lone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["card", str(lone), "--repo", "me/lone"]) == 0
    shown = capsys.readouterr()

    assert shown.out == make_card_alone(gather(lone, Order(repo="me/lone")))[0]
    assert front(shown.out)["license"] == "mit"
    assert shown.err == ""


@pytest.mark.parametrize(
    "inputs", [None, [{"name": "A"}], [{"name": "A", "file": "a", "bytes": "x"}]]
)
def test_a_damaged_manifest_is_an_error(
    inputs: object, lone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {"schema": "x", "recipe": {"models": {"A": {"path": "a"}}}, "inputs": inputs}
    lone.with_name(f"{lone.name}.ckptools.json").write_text(json.dumps(document))

    assert run(["card", str(lone)]) in (1, 2)
    assert "error: " in capsys.readouterr().err


def test_the_card_command_tells_the_licence_as_json(
    lone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["card", str(lone), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)

    assert said["schema"] == "ckptools.card/1"
    assert front(said["card"])["license"] == said["license"]["id"] == "mit"
    assert said["license"]["refused"] == ""


def test_the_card_command_says_that_the_licence_is_open(
    lone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(load_file(lone), lone)
    assert run(["card", str(lone)]) == 0
    shown = capsys.readouterr()

    assert "license" not in front(shown.out)
    assert "--license gives one" in shown.err


def test_parents_from_the_hub_are_linked(lone: Path) -> None:
    recipe = {
        "models": {"A": {"path": f"hf://org/a/a.safetensors@{'f' * 40}"}, "B": {"path": "b"}},
        "merge": "A + B",
        "params": {"M": 0.5},
        "output": {"path": "lone.safetensors"},
    }
    inputs = [
        {"name": "A", "file": "a.safetensors", "sha256": SHA},
        {"name": "B", "file": "b.safetensors", "sha256": None},
    ]
    manifest = {"schema": "ckptools.manifest/1", "recipe": recipe, "inputs": inputs, "outputs": []}
    lone.with_name("lone.safetensors.ckptools.json").write_text(json.dumps(manifest))
    gathered = gather(lone, Order(hub={"B": "org/b"}, licenses={"B": "mit"}, force_unchecked=True))

    assert gathered.facts.parents == (
        Parent("A", "a.safetensors", "org/a", "f" * 40, SHA, ""),
        Parent("B", "b.safetensors", "org/b", "", "", "mit"),
    )
    assert gathered.facts.params == {"M": {"default": 0.5}}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nothing.safetensors", None, "no such file"),
        ("hf://me/model", None, "a model of this machine"),
        ("folder", "folder", "not a diffusers folder"),
        ("model.pt", b"\x80\x02.", "pickle"),
        ("model.safetensors", b"\x80\x02}q\x00.", "pickle"),
    ],
)
def test_what_cannot_be_published_is_told(
    tmp_path: Path, name: str, content: bytes | str | None, said: str
) -> None:
    path = tmp_path / name if content or ":" not in name else Path(name)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(CkptError, match=said):
        gather(path, Order())
