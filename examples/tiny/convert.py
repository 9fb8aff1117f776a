"""Names of Stable Diffusion 1 single files for the tensors of diffusers models, and back.

The rules are the ones of CompVis' ldm modules (openaimodel.py, model.py) against diffusers' blocks;
diffusers' own scripts/convert_diffusers_to_original_stable_diffusion.py states the same mapping.
A ControlNet's are those of lllyasviel's cldm.py, as diffusers' single-file loader reads them.
Knows only names and shapes.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

UNET, VAE, TEXT = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.text_model.",
)
CONTROL = "control_model."
POSITIONS = TEXT + "embeddings.position_ids"

# diffusers name (a pattern) -> name in the single file; {a}, {b} stand for a number computed from
# the block number i and the place j in the block.
_UNET_RULES = (
    (r"time_embedding\.linear_1\.", "time_embed.0."),
    (r"time_embedding\.linear_2\.", "time_embed.2."),
    (r"conv_in\.", "input_blocks.0.0."),
    (r"conv_norm_out\.", "out.0."),
    (r"conv_out\.", "out.2."),
    (r"mid_block\.resnets\.0\.", "middle_block.0."),
    (r"mid_block\.attentions\.0\.", "middle_block.1."),
    (r"mid_block\.resnets\.1\.", "middle_block.2."),
)
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_CONTROL_RULES = (
    (r"controlnet_cond_embedding\.conv_in\.", "input_hint_block.0."),
    (r"controlnet_cond_embedding\.conv_out\.", "input_hint_block.14."),
    (r"controlnet_down_blocks\.(\d+)\.", r"zero_convs.\1.0."),
    (r"controlnet_mid_block\.", "middle_block_out.0."),
)
_VAE_RULES = (
    (r"conv_norm_out\.", "norm_out."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"down_blocks\.(\d)\.resnets\.(\d)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"conv_shortcut\.", "nin_shortcut."),
)


def unet_name(name: str) -> str:
    """The single file's name of a UNet tensor, without its prefix."""
    for pattern, new in _UNET_RULES:
        name = re.sub(rf"^{pattern}", new, name)
    found = re.match(r"(down|up)_blocks\.(\d)\.(\w+?)\.(\d)\.", name)
    if found:
        side, i, kind, j = found[1], int(found[2]), found[3], int(found[4])
        new = {
            ("down", "resnets"): f"input_blocks.{3 * i + j + 1}.0.",
            ("down", "attentions"): f"input_blocks.{3 * i + j + 1}.1.",
            ("down", "downsamplers"): f"input_blocks.{3 * i + 3}.0.",
            ("up", "resnets"): f"output_blocks.{3 * i + j}.0.",
            ("up", "attentions"): f"output_blocks.{3 * i + j}.1.",
            ("up", "upsamplers"): f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.",
        }[side, kind]
        name = new + name[found.end() :]
        if (side, kind) == ("down", "downsamplers"):
            name = name.replace(".conv.", ".op.")
    if re.match(r"(input_blocks\.\d+\.0|middle_block\.[02]|output_blocks\.\d+\.0)\.", name):
        for old, short in _UNET_RESNET.items():
            name = name.replace(f".{old}.", f".{short}.")
    return name


def control_name(name: str) -> str:
    """The single file's name of a ControlNet tensor, without its prefix.

    The hint block's numbers count activations too: convolutions are at 0, 2, ..., 14.
    """
    for pattern, new in _CONTROL_RULES:
        name = re.sub(rf"^{pattern}", new, name)
    found = re.match(r"controlnet_cond_embedding\.blocks\.(\d)\.", name)
    if found:
        name = f"input_hint_block.{2 * int(found[1]) + 2}." + name[found.end() :]
    return unet_name(name)


def vae_name(name: str) -> str:
    """The single file's name of an autoencoder tensor, without its prefix."""
    for pattern, new in _VAE_RULES:
        name = re.sub(rf"(?<=\.){pattern}", new, name)
    found = re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.", name)
    if found:  # the single file counts the decoder's levels from the picture's end
        level = 3 - int(found[1])
        new = f"block.{found[3]}." if found[2] == "resnets" else "upsample."
        name = f"decoder.up.{level}.{new}" + name[found.end() :]
    return name


def text_name(name: str) -> str:
    """The single file's name of a text tensor, without its prefix (transformers 4 or 5)."""
    return name.removeprefix("text_model.")


def to_single_file(
    unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], text: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of one checkpoint, F16, under their single-file names, in order of name.

    The autoencoder's attention becomes 1x1 convolutions, (c, c) -> (c, c, 1, 1), and the position
    numbers, I64 (1, 77), are added: both as SD1's files have them.
    """
    parts = {UNET + unet_name(name): value for name, value in unet.items()}
    parts |= {VAE + vae_name(name): value for name, value in vae.items()}
    parts |= {TEXT + text_name(name): value for name, value in text.items()}
    made = {name: _widened(name, value).half().contiguous() for name, value in parts.items()}
    made[POSITIONS] = torch.arange(77).unsqueeze(0)
    return dict(sorted(made.items()))


def from_single_file(
    tensors: Mapping[str, Tensor],
    *,
    unet: Mapping[str, Tensor],
    vae: Mapping[str, Tensor],
    text: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The three state dicts of a single file, F32; the arguments give their names and shapes."""

    def taken(like: Mapping[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
        return {name: tensors[names[name]].float().reshape(like[name].shape) for name in like}

    return (
        taken(unet, {name: UNET + unet_name(name) for name in unet}),
        taken(vae, {name: VAE + vae_name(name) for name in vae}),
        taken(text, {name: TEXT + text_name(name) for name in text}),
    )


def _widened(name: str, value: Tensor) -> Tensor:
    is_attention = re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$", name)
    return value[:, :, None, None] if is_attention else value
