"""What diffusers and transformers call the tensors of public models, from their published configs.

`listed` reads the lists that `tests/layouts-diffusers/` keeps, so that the names can be checked
where diffusers is not installed; `built` makes the same lists from the libraries. Run this file to
write the lists anew.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LISTS = Path(__file__).parent / "layouts-diffusers"
FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner", "sd3", "flux")


@dataclass(frozen=True)
class Row:
    """A tensor of a component; `kind` is the class of the module that holds it."""

    component: str
    kind: str
    name: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


@cache
def listed(family: str) -> list[Row]:
    lines = gzip.decompress((LISTS / f"{family}.txt.gz").read_bytes()).decode().splitlines()
    rows = []
    for line in lines:
        component, kind, name, dims = line.split("\t")
        rows.append(Row(component, kind, name, tuple(map(int, dims.split(",")))))
    return rows


def built(family: str) -> list[Row]:
    """The same from the libraries; needs diffusers and transformers. No memory is used."""
    import torch

    with torch.device("meta"):
        models = _models(family)
    rows = []
    for component, (model, left_out) in models.items():
        for path, module in model.named_modules():
            tensors = {**module._parameters, **module._buffers}
            for name, tensor in tensors.items():
                full = f"{path}.{name}" if path else name
                is_kept = name not in module._non_persistent_buffers_set and full not in left_out
                if tensor is not None and is_kept:
                    kind = type(module).__name__
                    rows.append(Row(component, kind, full, tuple(tensor.shape)))
    return rows


def _models(family: str) -> Mapping[str, tuple[object, frozenset[str]]]:
    """Component → model, and tensors that its published files do not hold."""
    match family:
        case "sd1":
            return {"unet": _unet(cross_attention_dim=768), "text_encoder": _clip(768, 12)} | _vae()
        case "sd2":
            unet = _unet(
                cross_attention_dim=1024,
                attention_head_dim=[5, 10, 20, 20],
                use_linear_projection=True,
            )
            return {"unet": unet, "text_encoder": _clip(1024, 23)} | _vae()
        case "sdxl":
            unet = _unet(
                block_out_channels=[320, 640, 1280],
                down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                transformer_layers_per_block=[1, 2, 10],
                attention_head_dim=[5, 10, 20],
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            )
            encoders = {"text_encoder": _clip(768, 12), "text_encoder_2": _clip(1280, 32, True)}
            return {"unet": unet, **encoders} | _vae()
        case "sdxl-refiner":
            down = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
            unet = _unet(
                block_out_channels=[384, 768, 1536, 1536],
                down_block_types=down,
                up_block_types=[
                    "UpBlock2D",
                    "CrossAttnUpBlock2D",
                    "CrossAttnUpBlock2D",
                    "UpBlock2D",
                ],
                transformer_layers_per_block=4,
                attention_head_dim=[6, 12, 24, 24],
                cross_attention_dim=1280,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2560,
            )
            return {"unet": unet, "text_encoder_2": _clip(1280, 32, True)} | _vae()
        case "sd3":
            encoders = {
                "text_encoder": _clip(768, 12, True),
                "text_encoder_2": _clip(1280, 32, True),
                "text_encoder_3": _t5(),
            }
            return {"transformer": _sd3(), **encoders} | _vae(latent_channels=16)
        case "flux":
            encoders = {"text_encoder": _clip(768, 12), "text_encoder_2": _t5()}
            return {"transformer": _flux(), **encoders} | _vae(latent_channels=16)
    raise ValueError(family)


def _unet(**config: object) -> tuple[object, frozenset[str]]:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**config), frozenset()


def _vae(latent_channels: int = 4) -> dict[str, tuple[object, frozenset[str]]]:
    from diffusers import AutoencoderKL

    has_quant_conv = latent_channels == 4
    model = AutoencoderKL(
        latent_channels=latent_channels,
        block_out_channels=[128, 256, 512, 512],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        use_quant_conv=has_quant_conv,
        use_post_quant_conv=has_quant_conv,
    )
    return {"vae": (model, frozenset())}


def _clip(width: int, layers: int, has_projection: bool = False) -> tuple[object, frozenset[str]]:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
    )
    # transformers 5 no longer writes `text_model.` for the model without projection; the published
    # folders all have it.
    left_out = frozenset() if has_projection else frozenset({"text_projection.weight"})
    return CLIPTextModelWithProjection(config), left_out


def _t5() -> tuple[object, frozenset[str]]:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_heads=64,
        num_layers=24,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config), frozenset({"encoder.embed_tokens.weight"})


def _sd3() -> tuple[object, frozenset[str]]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )
    return model, frozenset()


def _flux() -> tuple[object, frozenset[str]]:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True), frozenset()


if __name__ == "__main__":
    LISTS.mkdir(exist_ok=True)
    for each in FAMILIES:
        text = "".join(
            f"{row.component}\t{row.kind}\t{row.name}\t{','.join(map(str, row.shape))}\n"
            for row in built(each)
        )
        (LISTS / f"{each}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
