"""What is to be built for a checkpoint: constructor arguments, told from its shapes and family.

Names, shapes and data files only: no torch, no diffusers, no values. What shapes cannot tell
stands in `families/render/<id>.yaml`, or in a diffusers folder without weights:

    unet            heads (of every level) or head_width (heads follow from each level's width),
                    and diffusers' own keys where no shape tells them
    vae             scaling_factor
    text_encoder…   hidden_act, head_width, pad (the word that fills prompts up), layers_back (how
                    far before the last layer the model reads; the last one is normed, earlier
                    ones are as they are)
    scheduler       keys of diffusers' schedulers that differ from Stable Diffusion's usual ones
    folders         number of words → a weightless folder inside the package
    zero_empty_negative   an empty negative prompt is all zeros

Widths and depths are put to the vote among many tensors, so that one misshapen tensor is found
out instead of being believed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ckptools.checkpoint import read_json_object
from ckptools.errors import InputError, UsageError
from ckptools.family import Detection, load_families
from ckptools.keymap import KeyMap, key_map
from ckptools.tensors import TensorSpec

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

PACKAGE = Path(__file__).parents[1]
_FOLDER = PACKAGE / "families" / "render"
CHANNELS = {"base": 4, "inpainting": 9, "ip2p": 8}  # of the UNet's input, by variant
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}  # ours → diffusers'

# CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml: linear_start, linear_end.
# The other keys are those of diffusers' schedulers that read them.
_USUAL_SCHEDULER: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class TextFacts:
    """What a text encoder's shapes do not tell: see the top of this module."""

    hidden_act: str
    head_width: int
    pad: str
    layers_back: int = 0


@dataclass(frozen=True)
class FamilyFacts:
    """One data file of `families/render`."""

    id: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoders: Mapping[str, TextFacts]
    scheduler: Mapping[str, Any]
    folders: Mapping[int, str] = field(default_factory=dict)
    zero_empty_negative: bool = False


@dataclass(frozen=True)
class Blueprint:
    """What to build for one checkpoint.

    variant     base, inpainting or ip2p
    components  unet, vae, text_encoder … → arguments of the class
    scheduler   keys of diffusers' schedulers
    prediction  epsilon or v; None where nothing told it
    told_by     who told the prediction: "argument", "file", "config", "family", or ""
    zero_snr    the noise schedule ends at zero signal
    config      the weightless folder that was read, if any
    """

    family: str
    variant: str
    facts: FamilyFacts
    components: Mapping[str, Config]
    scheduler: Mapping[str, Any]
    prediction: str | None
    told_by: str
    zero_snr: bool
    config: Path | None


def family_ids() -> tuple[str, ...]:
    """The families whose pictures can be made, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


@cache
def family_facts(family: str) -> FamilyFacts:
    """What is known about building a family's models; `InputError` for one without a file."""
    import yaml

    path = _FOLDER / f"{family}.yaml"
    if not path.is_file():
        raise InputError(
            f"no pictures are made with {family} models",
            fix=f"the families that can be rendered: {', '.join(family_ids())}",
        )
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    return FamilyFacts(
        id=family,
        unet=data["unet"],
        vae=data["vae"],
        text_encoders={
            name: TextFacts(**facts)
            for name, facts in data.items()
            if name.startswith("text_encoder")
        },
        scheduler={**_USUAL_SCHEDULER, **data["scheduler"]},
        folders=data.get("folders", {}),
        zero_empty_negative=data.get("zero_empty_negative", False),
    )


def shapes_of(keys: KeyMap, specs: Mapping[str, TensorSpec]) -> dict[str, dict[str, Any]]:
    """Component → diffusers' name → shape.

    Tensors that the map does not know, or whose rows it cannot share out, are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for spec in specs.values():
        with suppress(InputError):
            for piece in keys.pieces(spec) or ():
                found.setdefault(piece.component, {})[piece.name] = piece.shape
    return found


def draft(
    specs: Mapping[str, TensorSpec],
    detection: Detection,
    *,
    config: Path | None = None,
    vae: Shapes | None = None,
    prediction: str | None = None,
) -> Blueprint:
    """The blueprint of a whole checkpoint (UNet, VAE, text encoders).

    config      a diffusers folder without weights; what it says counts, but for input channels
    vae         shapes, by diffusers' names, of a VAE that stands in for the checkpoint's
    prediction  "epsilon" or "v", whatever else says otherwise

    A family or variant that cannot be rendered is an `InputError`.
    """
    if prediction not in (None, *PREDICTIONS):
        raise UsageError(f"no prediction {prediction!r}", fix="epsilon or v")
    family = _family_id(detection)
    facts = family_facts(family)
    variant = detection.variant or "base"
    if variant not in CHANNELS:
        raise InputError(
            f"a {variant} model of {family}: no pictures are made with it",
            fix=f"a {', '.join(CHANNELS)} model can be rendered",
        )
    shapes = shapes_of(key_map(family), specs)
    shapes["vae"] = dict(vae or shapes.get("vae", {}))
    config = config or _shipped_folder(facts, shapes)
    resolution = load_families()[family].resolution(variant, detection.prediction)
    derived = {
        "unet": unet_config(shapes.get("unet", {}), facts.unet, _text_width(shapes))
        | {"sample_size": int(resolution.partition("x")[0]) // 8},
        "vae": vae_config(shapes["vae"], facts.vae),
    }
    for name, text in facts.text_encoders.items():
        derived[name] = text_config(shapes.get(name, {}), text)
    components = {name: keys | read_config(config, name) for name, keys in derived.items()}
    components["unet"]["in_channels"] = CHANNELS[variant]
    scheduler = {**facts.scheduler, **read_config(config, "scheduler", "scheduler_config.json")}
    told, told_by = _prediction(specs, detection, config, scheduler, prediction)
    return Blueprint(
        family=family,
        variant=variant,
        facts=facts,
        components=components,
        scheduler=scheduler,
        prediction=told,
        told_by=told_by,
        zero_snr="ztsnr" in specs or bool(scheduler.get("rescale_betas_zero_snr")),
        config=config,
    )


def _family_id(detection: Detection) -> str:
    """The file's family; of a damaged file the nearest: the loader says what it lacks."""
    if detection.kind == "checkpoint" and detection.family:
        return detection.family
    near = [reject for reject in detection.rejected if reject.family in family_ids()]
    if detection.kind == "unknown" and near:
        return near[0].family
    raise InputError(
        "not a checkpoint that pictures can be made with: "
        + "; ".join(detection.evidence[:3] or (detection.kind,)),
        fix=f"give a whole model of one of these families: {', '.join(family_ids())}",
    )


def _shipped_folder(facts: FamilyFacts, shapes: Mapping[str, Shapes]) -> Path | None:
    words = shapes.get("text_encoder", {}).get("text_model.embeddings.token_embedding.weight")
    folder = facts.folders.get(words[0]) if words else None
    return PACKAGE / folder if folder else None


def read_config(config: Path | None, component: str, name: str = "config.json") -> Config:
    """The keys of a component's file in a diffusers folder; {} without folder or file."""
    data = read_json_object(config / component / name) if config else None
    return {key: value for key, value in (data or {}).items() if not key.startswith("_")}


def _prediction(
    specs: Mapping[str, TensorSpec],
    detection: Detection,
    config: Path | None,
    scheduler: Mapping[str, Any],
    argument: str | None,
) -> tuple[str | None, str]:
    """What the model predicts, and who says so: argument, file, folder, family, in this order."""
    if argument:
        return argument, "argument"
    family = load_families()[_family_id(detection)]
    variant = family.variants.get(detection.variant or "")
    usual = (variant.usual_prediction if variant else None) or family.usual_prediction
    is_marked = any(marker in specs for marker in family.prediction_markers)
    is_usual = detection.prediction == usual and not is_marked
    in_folder = scheduler.get("prediction_type") if config else None
    by_folder = next((ours for ours, name in PREDICTIONS.items() if name == in_folder), None)
    if is_usual and by_folder:
        return by_folder, "config"
    told = detection.prediction or by_folder
    if told and told not in PREDICTIONS:
        raise InputError(
            f"it predicts {told!r}, with which no pictures are made",
            fix=f"a model that predicts {' or '.join(PREDICTIONS)} can be rendered",
        )
    if told is None:
        return None, ""
    return told, "config" if not detection.prediction else "family" if is_usual else "file"


# --- from shapes to arguments -------------------------------------------------------------------


def unet_config(shapes: Shapes, facts: Mapping[str, Any], text_width: int) -> Config:
    """Arguments of diffusers' UNet2DConditionModel.

    text_width  of the pooled text, where the family has one
    """
    encoder = encoder_config(shapes, facts)
    down = encoder["down_block_types"]
    up = ["CrossAttnUpBlock2D" if "Attn" in kind else "UpBlock2D" for kind in reversed(down)]
    made = {"in_channels": 4, "out_channels": 4, "up_block_types": up, **encoder}
    if "addition_embed_type" in facts:
        whole = _vote(shapes, r"add_embedding\.linear_1\.weight", 1)
        if whole and whole > text_width and (whole - text_width) % 6 == 0:
            made["projection_class_embeddings_input_dim"] = whole
            made["addition_time_embed_dim"] = (whole - text_width) // 6
    return made


def encoder_config(shapes: Shapes, facts: Mapping[str, Any]) -> Config:
    """What a UNet and a ControlNet have in common: the way down and the middle."""
    levels = _count(shapes, r"down_blocks\.(\d+)\.")
    widths = [
        _vote(shapes, rf"down_blocks\.{i}\.resnets\.\d+\.(conv1|conv2|norm2)\.(weight|bias)", 0)
        for i in range(levels)
    ]
    depths = [
        _count(shapes, rf"down_blocks\.{i}\.attentions\.\d+\.transformer_blocks\.(\d+)\.")
        for i in range(levels)
    ]
    middle = _count(shapes, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    kinds = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    is_linear = _vote_of(len(s) for n, s in shapes.items() if n.endswith("proj_in.weight")) == 2
    known = {key: value for key, value in facts.items() if key not in ("heads", "head_width")}
    width_of_head = facts.get("head_width", 64)
    heads = facts.get("heads") or [max(1, (width or 0) // width_of_head) for width in widths]
    made: Config = {
        **known,
        "block_out_channels": widths,
        "down_block_types": kinds,
        "layers_per_block": _count(shapes, r"down_blocks\.\d+\.resnets\.(\d+)\."),
        # diffusers calls the number of heads so: unet_2d_condition.py, "num_attention_heads"
        "attention_head_dim": heads,
        # a level without attention has no depth; its number must be that of the middle, the last's
        "transformer_layers_per_block": [depth or middle for depth in depths],
        "cross_attention_dim": _vote(shapes, r".*attn2\.to_[kv]\.weight", 1),
        "use_linear_projection": is_linear,
    }
    return {key: value for key, value in made.items() if value}


def control_config(shapes: Shapes, facts: Mapping[str, Any], text_width: int) -> Config:
    """Arguments of diffusers' ControlNetModel."""
    made = unet_config(shapes, facts, text_width)
    for key in ("out_channels", "up_block_types"):
        made.pop(key)
    hint = "controlnet_cond_embedding."
    last = _count(shapes, re.escape(hint) + r"blocks\.(\d+)\.")
    channels = [_vote(shapes, re.escape(hint) + r"conv_in\.(weight|bias)", 0)]
    for i in range(1, last, 2):
        channels.append(_vote(shapes, re.escape(hint) + rf"blocks\.{i}\.(weight|bias)", 0))
    if all(channels) and last:
        made["conditioning_embedding_out_channels"] = channels
    return made


def vae_config(shapes: Shapes, facts: Mapping[str, Any]) -> Config:
    """Arguments of diffusers' AutoencoderKL."""
    levels = _count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    pattern = r"encoder\.down_blocks\.{}\.resnets\.\d+\.(conv1|conv2|norm2)\.(weight|bias)"
    made = {
        **facts,
        "latent_channels": 4,
        "block_out_channels": [_vote(shapes, pattern.format(i), 0) for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _count(shapes, r"encoder\.down_blocks\.\d+\.resnets\.(\d+)\."),
    }
    return {key: value for key, value in made.items() if value}


def text_config(shapes: Shapes, facts: TextFacts) -> Config:
    """Arguments of transformers' CLIPTextConfig."""
    width = _vote(shapes, r".*layers\.\d+\.layer_norm[12]\.(weight|bias)", 0)
    words = _vote(shapes, r".*token_embedding\.weight", 0)
    made: Config = {
        "hidden_act": facts.hidden_act,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": _vote(shapes, r".*layers\.\d+\.mlp\.fc1\.(weight|bias)", 0),
        "num_hidden_layers": _count(shapes, r".*encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, (width or 0) // facts.head_width),
        "max_position_embeddings": 77,
        "vocab_size": words,
    }
    if words:  # the last two words of CLIP's vocabulary begin and end a text
        made |= {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    return {key: value for key, value in made.items() if value}


def _text_width(shapes: Mapping[str, Shapes]) -> int:
    pattern = r".*layers\.\d+\.layer_norm[12]\.(weight|bias)"
    return _vote(shapes.get("text_encoder_2", {}), pattern, 0) or 0


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that the pattern's group 1 takes; 0 where it takes none."""
    find = re.compile(pattern).match
    return max((int(m[1]) + 1 for name in shapes if (m := find(name))), default=0)


def _vote(shapes: Shapes, pattern: str, dim: int) -> int | None:
    """The most common size of `dim` among the tensors whose whole name fits."""
    fits = re.compile(pattern).fullmatch
    return _vote_of(s[dim] for name, s in shapes.items() if len(s) > dim and fits(name))


def _vote_of(sizes: Any) -> int | None:
    common: Sequence[tuple[int, int]] = Counter(sizes).most_common(1)
    return common[0][0] if common else None
