"""Writes `ckptools/families/tensors/`: the tensors that whole models of a family hold.

    python tools/tensor_lists.py

The lists come from public files' headers (`tests/layouts`), from diffusers and transformers on the
meta device (`tests/layouts-diffusers`), and, for ControlNets as diffusers writes them, from
`ControlNetModel` itself. One line is one tensor: name, sizes, and "?" where whole files may lack
it. `ckptools/known.py` says how a list is chosen.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
LISTS = ROOT / "ckptools" / "families" / "tensors"
Rows = dict[str, tuple[int, ...]]

# Tensors that loaders do without. Files made from diffusers folders lack logit_scale, SD2's
# text_projection, and the 24th layer of its text encoder, which is never run; embed_tokens is
# shared.weight once more; schnell has no guidance_in.
OPTIONAL = {
    "sd2": r"cond_stage_model\.model\.(logit_scale|text_projection$|transformer\.resblocks\.23\.)",
    "flux": r".*(\.logit_scale|\.text_projection\.weight|embed_tokens\.weight)$|.*\.guidance_in\.",
    "text-encoder.clip-h.openclip": r"logit_scale|text_projection$|transformer\.resblocks\.23\.",
}
ALWAYS_OPTIONAL = r".*(position_ids|logit_scale|embed_tokens\.weight)$"


def stored(name: str) -> Rows:
    """A public file's tensors: name → shape."""
    return dict(_rows(ROOT / "tests" / "layouts" / f"{name}.txt.gz", name_at=0))


def diffusers(family: str, component: str) -> Rows:
    """The tensors of one component of a diffusers folder, by the names they have there."""
    path = ROOT / "tests" / "layouts-diffusers" / f"{family}.txt.gz"
    return dict(_rows(path, name_at=2, component=component))


def _rows(
    path: Path, *, name_at: int, component: str = ""
) -> Iterable[tuple[str, tuple[int, ...]]]:
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        fields = line.split("\t")
        if component in ("", fields[0]):
            dims = fields[name_at + 1]
            yield fields[name_at], tuple(map(int, dims.split(","))) if dims else ()


def below(rows: Rows, prefix: str) -> Rows:
    """The tensors under a prefix, without it."""
    return {name[len(prefix) :]: shape for name, shape in rows.items() if name.startswith(prefix)}


def controlnet_of(unet: Rows, pattern: Rows) -> Rows:
    """An LDM ControlNet: a pattern's names with the shapes of another UNet's same tensors."""
    return {
        name: unet.get(name.replace("control_model.", "model.diffusion_model."), shape)
        for name, shape in pattern.items()
    }


def diffusers_controlnet(**config: object) -> Rows:
    """What `ControlNetModel` holds with this config; no memory is used."""
    import torch
    from diffusers import ControlNetModel

    with torch.device("meta"):
        model = ControlNetModel(**config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


SDXL_CONTROLNET = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD2_CONTROLNET = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}


def lists() -> dict[str, Rows]:
    """Every list by its name: family[.variant][.layout]."""
    sd1, sd2, sdxl = stored("sd1"), stored("sd2-depth"), stored("sdxl")
    controlnet = stored("controlnet-sd1")
    return {
        "sd1": sd1,
        "sd2": sd2,
        "sdxl": sdxl,
        "sdxl-refiner": stored("sdxl-refiner"),
        "sd3.medium": stored("sd3"),
        "flux": stored("flux"),
        "controlnet.sd1": controlnet,
        "controlnet.sd2": controlnet_of(sd2, controlnet),
        "controlnet.sd1.diffusers": diffusers_controlnet(cross_attention_dim=768),
        "controlnet.sd2.diffusers": diffusers_controlnet(**SD2_CONTROLNET),
        "controlnet.sdxl.diffusers": diffusers_controlnet(**SDXL_CONTROLNET),
        "vae.4-channel": below(sd1, "first_stage_model."),
        "vae.4-channel.diffusers": diffusers("sd1", "vae"),
        "vae.16-channel": below(stored("sd3"), "first_stage_model."),
        "vae.16-channel.diffusers": diffusers("sd3", "vae"),
        "text-encoder.clip-l": below(sd1, "cond_stage_model.transformer."),
        "text-encoder.clip-h": diffusers("sd2", "text_encoder"),
        "text-encoder.clip-h.openclip": below(sd2, "cond_stage_model.model."),
        "text-encoder.clip-g": diffusers("sdxl", "text_encoder_2"),
        "text-encoder.clip-g.openclip": below(sdxl, "conditioner.embedders.1.model."),
        "text-encoder.t5": diffusers("sd3", "text_encoder_3"),
    }


def write(folder: Path) -> None:
    """Write every list; the same bytes every time."""
    folder.mkdir(exist_ok=True)
    for name, rows in lists().items():
        may_lack = re.compile(f"{OPTIONAL.get(name, '(?!)')}|{ALWAYS_OPTIONAL}")
        lines = []
        for tensor in sorted(rows):
            fields = [tensor, ",".join(map(str, rows[tensor]))]
            lines.append("\t".join([*fields, *["?"] * bool(may_lack.match(tensor))]) + "\n")
        compressed = gzip.compress("".join(lines).encode(), mtime=0)
        (folder / f"{name}.txt.gz").write_bytes(compressed)


if __name__ == "__main__":
    write(LISTS)
