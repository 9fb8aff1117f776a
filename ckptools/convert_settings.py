"""The small files of a diffusers folder: which classes it is made of, and how they are set up.

What a checkpoint's shapes and family tell is derived (`render.configs`); everything may be taken
from a folder that has it instead. Must not know how weights are written.

Sources: diffusers 0.42, `pipelines/pipeline_utils.py` (`model_index.json`) and the published
folders of the families' first models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptools.checkpoint import read_json_object
from ckptools.errors import CkptError, InputError
from ckptools.family import Detection
from ckptools.tensors import TensorSpec

# Loaders ask which release wrote a folder, and make amends for old ones.
_DIFFUSERS_VERSION = "0.30.0"
_PIPELINES: Mapping[str, Mapping[str, str]] = {
    "sd1": {
        "base": "StableDiffusionPipeline",
        "inpainting": "StableDiffusionInpaintPipeline",
        "ip2p": "StableDiffusionInstructPix2PixPipeline",
    },
    "sd2": {"base": "StableDiffusionPipeline", "inpainting": "StableDiffusionInpaintPipeline"},
    "sdxl": {
        "base": "StableDiffusionXLPipeline",
        "inpainting": "StableDiffusionXLInpaintPipeline",
        "ip2p": "StableDiffusionXLInstructPix2PixPipeline",
    },
}
_SCHEDULERS = {"sd1": "DDIMScheduler", "sd2": "DDIMScheduler", "sdxl": "EulerDiscreteScheduler"}
_CLASSES: Mapping[str, tuple[str, str]] = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}
_MODEL_TYPE = "clip_text_model"
_SMALL_SUFFIXES = (".json", ".txt", ".model")
_SMALL_BYTES = 20_000_000
_BESIDE = ("scheduler", "tokenizer", "feature_extractor")  # and their _2, _3
_START, _END = "<|startoftext|>", "<|endoftext|>"
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}

Json = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """The folder that settings are wanted for.

    specs       the checkpoint's tensors
    components  whose weights are written
    config      a folder whose settings count before all others
    source      the folder that is converted, if it is one
    alone       the only component of the output, if there is only one
    """

    family: str
    detection: Detection
    specs: Mapping[str, TensorSpec]
    components: Sequence[str]
    config: Path | None = None
    source: Path | None = None
    alone: str = ""


def settings_of(wanted: Wanted) -> tuple[dict[str, bytes], list[str]]:
    """(path below the folder → content, notes on what is not known)."""
    notes: list[str] = []
    derived, shipped = _derived(wanted, notes)
    folders = [folder for folder in (wanted.config, wanted.source, shipped) if folder is not None]
    if wanted.config is not None and not wanted.config.is_dir():
        raise InputError("no such folder", where=str(wanted.config), fix="check --config")
    if wanted.config is not None and not _has_settings(wanted.config):
        raise InputError(
            "a folder without settings: neither model_index.json nor a component's config.json",
            where=str(wanted.config),
            fix="give a diffusers folder with --config; weights are not needed",
        )
    if wanted.alone:
        config = _config(wanted.alone, folders, derived, wanted)
        return ({"config.json": _text(config)} if config else {}), notes
    made: dict[str, bytes] = {}
    for component in wanted.components:
        config = _config(component, folders, derived, wanted)
        if config:
            made[f"{component}/config.json"] = _text(config)
    beside = _beside(folders) or _tokenizers(wanted, derived)
    if not any(path.startswith("scheduler/") for path in beside) and "scheduler" in derived:
        made["scheduler/scheduler_config.json"] = _text(derived["scheduler"])
    made |= beside
    if "scheduler/scheduler_config.json" in made and wanted.source is None:
        _set_prediction(made, wanted)
    index = _model_index(folders, wanted, made)
    if index:
        made["model_index.json"] = _text(index)
    if not index or any(f"{component}/config.json" not in made for component in wanted.components):
        notes.append(
            "not all settings of the folder are known: give a folder that has them with --config"
        )
    if index and not any(path.startswith("tokenizer/") for path in made):
        notes.append(
            "tokenizer/ is not in a checkpoint: copy it from the base model's folder, or give "
            "that with --config"
        )
    return made, notes


def _has_settings(folder: Path) -> bool:
    names = ("model_index.json", "config.json", "*/config.json", "*/*_config.json")
    return any(True for name in names for _ in folder.glob(name))


def _derived(wanted: Wanted, notes: list[str]) -> tuple[dict[str, Json], Path | None]:
    """Component (or "scheduler") → its settings, and the folder in the package that has them."""
    from ckptools.render.configs import draft

    try:
        blueprint = draft(wanted.specs, wanted.detection)
    except CkptError:  # a family or variant whose settings are not known, or a part of a model
        return {}, None
    version = {"_diffusers_version": _DIFFUSERS_VERSION}
    derived: dict[str, Json] = {}
    for component, keys in blueprint.components.items():
        library, name = _CLASSES[component]
        if library == "diffusers":
            derived[component] = {"_class_name": name, **version, **keys}
        else:
            derived[component] = {"architectures": [name], "model_type": _MODEL_TYPE, **keys}
    name = _SCHEDULERS[wanted.family]
    keys = {"prediction_type": _PREDICTIONS.get(blueprint.prediction or "", "epsilon")}
    derived["scheduler"] = {"_class_name": name, **version, **blueprint.scheduler, **keys}
    if blueprint.zero_snr:
        derived["scheduler"]["rescale_betas_zero_snr"] = True
    if blueprint.prediction is None:
        notes.append(
            "the file does not tell epsilon from v prediction: scheduler_config.json says epsilon"
        )
    return derived, blueprint.config


def _config(
    component: str, folders: Sequence[Path], derived: Mapping[str, Json], wanted: Wanted
) -> Json:
    found = next(
        (
            read
            for folder in folders
            if (read := read_json_object(folder / component / "config.json"))
        ),
        None,
    )
    config = dict(found or derived.get(component, {}))
    if component == "unet" and config:
        config["in_channels"] = _input_channels(wanted)
    return config


def _input_channels(wanted: Wanted) -> int:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    return wanted.specs[name].shape[1]


def _beside(folders: Sequence[Path]) -> dict[str, bytes]:
    """Schedulers and tokenizers, each from the first folder that has it."""
    found: dict[str, dict[str, bytes]] = {}
    for folder in folders:
        for sub in sorted(path for path in folder.iterdir() if path.is_dir()):
            if sub.name not in found and sub.name.startswith(_BESIDE):
                files = {f"{sub.name}/{path.name}": path for path in sorted(sub.iterdir())}
                small = {name: p.read_bytes() for name, p in files.items() if _is_small(p)}
                if small:
                    found[sub.name] = small
    return {name: data for files in found.values() for name, data in files.items()}


def _tokenizers(wanted: Wanted, derived: Mapping[str, Json]) -> dict[str, bytes]:
    """CLIP's tokenizer for every text encoder that has as many words as CLIP.

    Source of the files: the folders of the families' first models.
    """
    from ckptools.render.configs import family_facts
    from ckptools.render.prompts import clip_words

    encoders = [c for c in wanted.components if c.startswith("text_encoder") and c in derived]
    if not encoders:
        return {}
    vocabulary, merges = clip_words()
    facts = family_facts(wanted.family).text_encoders
    made: dict[str, bytes] = {}
    for encoder in encoders:
        if derived[encoder].get("vocab_size") != len(vocabulary):
            continue
        words = {"bos_token": _START, "eos_token": _END, "unk_token": _END}
        words["pad_token"] = facts[encoder].pad
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
        folder = encoder.replace("text_encoder", "tokenizer")
        made |= {
            f"{folder}/merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
            f"{folder}/vocab.json": json.dumps(vocabulary, ensure_ascii=False).encode(),
            f"{folder}/special_tokens_map.json": _text(words),
            f"{folder}/tokenizer_config.json": _text(config | words),
        }
    return made


def _is_small(path: Path) -> bool:
    is_file = path.is_file() and path.suffix in _SMALL_SUFFIXES
    return is_file and path.stat().st_size <= _SMALL_BYTES


def _set_prediction(made: dict[str, bytes], wanted: Wanted) -> None:
    """What the file says of itself counts before a scheduler's settings from elsewhere."""
    path = "scheduler/scheduler_config.json"
    told = _PREDICTIONS.get(wanted.detection.prediction or "")
    config = json.loads(made[path])
    if told == "v_prediction" and isinstance(config, dict):
        config["prediction_type"] = told
        if "ztsnr" in wanted.specs:
            config["rescale_betas_zero_snr"] = True
        made[path] = _text(config)


def _model_index(folders: Sequence[Path], wanted: Wanted, made: Mapping[str, bytes]) -> Json:
    """The classes of the folder; {} where the family's are not known."""
    there = {path.partition("/")[0] for path in made} | set(wanted.components)
    variant = wanted.detection.variant or "base"
    pipeline = _PIPELINES.get(wanted.family, {}).get(variant)
    for folder in folders:
        index = read_json_object(folder / "model_index.json")
        if index:
            own = {
                key: value if not isinstance(value, list) or key in there else [None, None]
                for key, value in index.items()
            }
            if pipeline and folder not in (wanted.source, wanted.config):
                own["_class_name"] = pipeline
            return own
    if pipeline is None:
        return {}
    scheduler = json.loads(made.get("scheduler/scheduler_config.json", b"{}"))
    index = {
        "_class_name": pipeline,
        "_diffusers_version": _DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler.get("_class_name", _SCHEDULERS[wanted.family])],
    }
    for component in wanted.components:
        index[component] = list(_CLASSES[component])
        if component.startswith("text_encoder"):
            index[component.replace("text_encoder", "tokenizer")] = [
                "transformers",
                "CLIPTokenizer",
            ]
    if wanted.family == "sdxl":
        return index | {"force_zeros_for_empty_prompt": True}
    nothing = {key: [None, None] for key in ("feature_extractor", "safety_checker")}
    return index | nothing | {"requires_safety_checker": False}


def _text(document: Json) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
