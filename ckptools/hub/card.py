"""Writes a model's card: the README.md of its repository.

Everything comes in as `Facts`; the text is the same for the same facts. What the owner wrote
outside our two marks stays, and so do the entries of the front matter that are not ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import yaml

from ckptools.errors import InputError, counted
from ckptools.hub.licences import Licence

BEGIN = "<!-- ckptools: begin. Written anew at each publication; write above or below. -->"
END = "<!-- ckptools: end -->"
_BETWEEN = re.compile(r"<!-- ckptools: begin\b.*?<!-- ckptools: end -->", re.DOTALL)
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
_NONE = "·"
_OURS = (
    *("license", "license_name", "license_link", "base_model", "base_model_relation"),
    *("library_name", "pipeline_tag", "widget"),
)
_ACTIVE = re.compile(r"([\\`*_\[\]<>|&#~$])")
# Source: the classes that diffusers 0.38 reads single files with.
_PIPELINES = {
    ("sd1", "inpainting"): "StableDiffusionInpaintPipeline",
    ("sd2", "inpainting"): "StableDiffusionInpaintPipeline",
    ("sd1", "ip2p"): "StableDiffusionInstructPix2PixPipeline",
    ("sd2", "depth"): "StableDiffusionDepth2ImgPipeline",
    ("sdxl", "inpainting"): "StableDiffusionXLInpaintPipeline",
    ("sdxl", "ip2p"): "StableDiffusionXLInstructPix2PixPipeline",
    ("sd1", ""): "StableDiffusionPipeline",
    ("sd2", ""): "StableDiffusionPipeline",
    ("sdxl", ""): "StableDiffusionXLPipeline",
    ("sdxl-refiner", ""): "StableDiffusionXLImg2ImgPipeline",
    ("sd3", ""): "StableDiffusion3Pipeline",
    ("flux", ""): "FluxPipeline",
}
# Where a file of a kind goes: in the web UI, and in ComfyUI below `models`.
_FOLDERS = {
    "checkpoint": ("models/Stable-diffusion", "checkpoints"),
    "lora": ("models/Lora", "loras"),
    "vae": ("models/VAE", "vae"),
    "controlnet": ("models/ControlNet", "controlnet"),
    "embedding": ("embeddings", "embeddings"),
    "text_encoder": ("models/text_encoder", "text_encoders"),
}


@dataclass(frozen=True)
class Weights:
    """One file of weights, by its path in the repository."""

    path: str
    nbytes: int
    sha256: str
    autov2: str
    autov3: str


@dataclass(frozen=True)
class Parent:
    """One model that the merge was made of.

    hub       `owner/name` where it is known, else ""
    revision  its commit, tag or branch there
    sha256    of its file; "" where nobody computed it
    """

    name: str
    file: str
    hub: str
    revision: str
    sha256: str
    licence: str
    nbytes: int = 0


@dataclass(frozen=True)
class Picture:
    """One picture of a test render, by its path in the repository.

    is_merge  whether it shows this model, not a parent
    """

    path: str
    model: str
    prompt: str
    seed: int
    is_merge: bool


@dataclass(frozen=True)
class Facts:
    """What a card tells.

    formula    the recipe's, "" for what is no merge
    params     name -> {selector: number}
    recipe     the recipe's path in the repository, "" for none
    verdict    of the test render: "pass", "warn", "fail", or "" for none
    sheet      the contact sheet's path in the repository
    is_folder  whether the repository is a diffusers folder
    """

    repo: str
    title: str
    weights: tuple[Weights, ...]
    family: str
    family_title: str
    variant: str
    prediction: str
    kind: str
    formula: str
    params: Mapping[str, Mapping[str, Any]]
    parents: tuple[Parent, ...]
    recipe: str
    output: str
    pictures: tuple[Picture, ...]
    sheet: str
    verdict: str
    is_folder: bool
    tags: tuple[str, ...]
    description: str


def make_card(facts: Facts, licence: Licence, existing: str = "") -> str:
    """The card's text.

    existing  the card that is there; its owner's words and entries are kept
    Raises `InputError` where its front matter cannot be read.
    """
    theirs, text = _split(existing)
    front = yaml.safe_dump(
        _front_matter(facts, licence, theirs), sort_keys=False, allow_unicode=True, width=100
    )
    ours = f"{BEGIN}\n\n{_body(facts, licence)}\n\n{END}"
    if _BETWEEN.search(text):
        text = _BETWEEN.sub(lambda _: ours, text, count=1)
    elif text.strip():
        text = f"{text.rstrip()}\n\n{ours}\n"
    else:
        text = f"# {_plain(facts.title)}\n\n{ours}\n"
    return f"---\n{front}---\n\n{text.lstrip()}"


def card_licence(existing: str) -> tuple[str, str]:
    """(licence, link) that a card names; ("", "") where it names none."""
    theirs, _ = _split(existing)
    licence = str(theirs.get("license") or "")
    name = str(theirs.get("license_name") or "")
    return (name or licence if licence == "other" else licence), str(
        theirs.get("license_link") or ""
    )


def _split(existing: str) -> tuple[dict[str, Any], str]:
    """(front matter, the rest) of a card."""
    existing = existing.lstrip("\ufeff")
    found = _FRONT.match(existing)
    if not found:
        return {}, existing
    try:
        front = yaml.safe_load(found[1])
    except (yaml.YAMLError, RecursionError) as exc:
        front = str(exc).splitlines()[0]
    if front is not None and not isinstance(front, dict):
        raise InputError(
            "the front matter of the card on the Hub is not YAML",
            where="README.md",
            fix="mend the lines between the two --- there",
        )
    return dict(front or {}), existing[found.end() :]


def _front_matter(facts: Facts, licence: Licence, theirs: Mapping[str, Any]) -> dict[str, Any]:
    front: dict[str, Any] = {}
    if licence.id:
        front["license"] = licence.id
    if licence.name:
        front["license_name"] = licence.name.lower().replace(" ", "-")
    if licence.link:
        front["license_link"] = licence.link
    bases = list(dict.fromkeys(parent.hub for parent in facts.parents if parent.hub))
    if bases:
        front["base_model"] = bases
    if facts.formula and bases:
        front["base_model_relation"] = "merge"
    front["library_name"] = "diffusers" if facts.is_folder else "diffusion-single-file"
    if tag := _pipeline_tag(facts):
        front["pipeline_tag"] = tag
    own_tags = theirs.get("tags")
    kept = [str(tag) for tag in own_tags] if isinstance(own_tags, list) else []
    made = ["merge"] if facts.formula else []
    style = ["stable-diffusion"] if facts.family.startswith("sd") else []
    front["tags"] = list(dict.fromkeys([*kept, *made, "ckptools", *style, *facts.tags]))
    shown = [picture for picture in facts.pictures if picture.is_merge]
    if shown:
        front["widget"] = [
            {"text": picture.prompt or " ", "output": {"url": picture.path}} for picture in shown
        ]
    rest = {key: value for key, value in theirs.items() if key not in (*_OURS, "tags")}
    return front | rest


def _pipeline_tag(facts: Facts) -> str:
    if facts.kind != "checkpoint" or facts.family in ("", "llm", "llama"):
        return ""
    edits = facts.variant in ("inpainting", "ip2p", "depth") or facts.family == "sdxl-refiner"
    return "image-to-image" if edits else "text-to-image"


# --- the body ----------------------------------------------------------------------------------


def _body(facts: Facts, licence: Licence) -> str:
    parts = [
        _what(facts),
        _how_made(facts) if facts.formula else "",
        _pictures(facts),
        _use(facts),
        _files(facts),
        _again(facts) if facts.recipe else "",
        _licence(licence),
    ]
    return "\n\n".join(part for part in parts if part)


def _what(facts: Facts) -> str:
    kind = facts.family_title or facts.kind
    variant = f", {facts.variant}" if facts.variant not in ("", "base") else ""
    prediction = f", {facts.prediction} prediction" if facts.prediction else ""
    made = (
        f"merged from {counted(len(facts.parents), 'model')} with "
        "[ckptools](https://pypi.org/project/ckptools/)"
        if facts.formula
        else "published with [ckptools](https://pypi.org/project/ckptools/)"
    )
    first = f"{_plain(kind)}{_plain(variant)}{_plain(prediction)}; {made}."
    return f"{_plain(facts.description)}\n\n{first}" if facts.description else first


def _how_made(facts: Facts) -> str:
    lines = ["## How it was made", "", _code(facts.formula, "text"), ""]
    rows = [
        [
            f"**{_plain(parent.name)}**",
            _file_of(parent),
            f"`{parent.revision[:12]}`" if parent.revision else _NONE,
            f"`{parent.sha256}`" if parent.sha256 else "not recorded",
            _plain(parent.licence) or "unknown",
        ]
        for parent in facts.parents
    ]
    lines += _table(["model", "file", "revision", "sha256", "licence"], rows)
    if facts.params:
        lines += ["", *_table(["parameter", "where", "value"], _param_rows(facts.params))]
    return "\n".join(lines)


def _file_of(parent: Parent) -> str:
    if not parent.hub:
        return _plain(parent.file)
    link = f"[{_plain(parent.hub)}](https://huggingface.co/{quote(parent.hub)})"
    return f"{link} {_plain(parent.file)}".rstrip()


def _param_rows(params: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    return [
        [_plain(name), _plain(selector), _plain(_number(value))]
        for name, lines in params.items()
        for selector, value in lines.items()
    ]


def _number(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _pictures(facts: Facts) -> str:
    if not facts.pictures and not facts.sheet:
        return ""
    lines = ["## Pictures", ""]
    if facts.sheet:
        lines += [f"![all pictures]({quote(facts.sheet)})", ""]
    models = list(dict.fromkeys(picture.model for picture in facts.pictures))
    by_row: dict[tuple[str, int], dict[str, str]] = {}
    for picture in facts.pictures:
        row = by_row.setdefault((picture.prompt, picture.seed), {})
        row.setdefault(picture.model, f"![{_plain(picture.model)}]({quote(picture.path)})")
    rows = [
        [_plain(prompt), str(seed), *(row.get(model, _NONE) for model in models)]
        for (prompt, seed), row in by_row.items()
    ]
    if rows:
        lines += _table(["prompt", "seed", *map(_plain, models)], rows)
    if facts.verdict:
        lines += ["", f"Test render: **{_plain(facts.verdict)}** (`ckptools render`)."]
    return "\n".join(lines).rstrip()


def _use(facts: Facts) -> str:
    name = facts.repo or "OWNER/NAME"
    if facts.is_folder:
        code = (
            "import torch\nfrom diffusers import DiffusionPipeline\n\n"
            f'pipeline = DiffusionPipeline.from_pretrained("{name}", torch_dtype=torch.float16)'
        )
        return f"## How to use it\n\n{_code(code, 'python')}"
    first = facts.weights[0].path
    lines = ["## How to use it", ""]
    pipeline = _PIPELINES.get((facts.family, facts.variant)) or _PIPELINES.get((facts.family, ""))
    if pipeline and len(facts.weights) == 1:
        code = (
            "import torch\n"
            f"from diffusers import {pipeline}\n"
            "from huggingface_hub import hf_hub_download\n\n"
            f'path = hf_hub_download("{name}", {json.dumps(first)})\n'
            f"pipeline = {pipeline}.from_single_file(path, torch_dtype=torch.float16)"
        )
        lines += [_code(code, "python"), ""]
    web_ui, comfy = _FOLDERS.get(facts.kind, _FOLDERS["checkpoint"])
    lines += [
        f"* AUTOMATIC1111 web UI, Forge: put the file into `{web_ui}`.",
        f"* ComfyUI: put the file into `models/{comfy}`.",
        f"* `hf download {name} {first} --local-dir .` fetches it.",
    ]
    return "\n".join(lines)


def _files(facts: Facts) -> str:
    rows = [
        [_plain(file.path), f"{file.nbytes:,}", f"`{file.sha256}`", f"`{file.autov2}`",
         f"`{file.autov3}`" if file.autov3 else _NONE]
        for file in facts.weights
    ]  # fmt: skip
    return "\n".join(
        ["## Files", "", *_table(["file", "bytes", "sha256", "AutoV2", "AutoV3"], rows)]
    )


def _again(facts: Facts) -> str:
    command = (
        f"hf download {facts.repo or 'OWNER/NAME'} {facts.recipe} --local-dir .\n"
        f"ckptools merge {facts.recipe}"
    )
    if len(facts.weights) == 1:
        command += f"\nckptools verify {facts.output} --sha256 {facts.weights[0].sha256}"
    where = "" if all(parent.hub for parent in facts.parents) else " Put the parents beside it."
    return (
        "## How to make it again\n\n"
        f"The recipe is [{facts.recipe}]({facts.recipe}); the same parents give the same bytes."
        f"{where}\n\n{_code(command, 'sh')}"
    )


def _licence(licence: Licence) -> str:
    if not licence.id:
        return ""
    name = licence.name or licence.id
    text = (
        f"[{_plain(name)}]({quote(licence.link, safe=':/#?=&%')})" if licence.link else _plain(name)
    )
    why = "; ".join(_plain(reason) for reason in licence.why)
    return f"## Licence\n\n{text} ({why})."


def _plain(text: str) -> str:
    """Any text as Markdown that shows it: on one line, nothing in it active."""
    return _ACTIVE.sub(r"\\\1", " ".join(text.split()))


def _code(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'|'.join(['---'] * len(head))}|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
