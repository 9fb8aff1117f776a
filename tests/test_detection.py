"""Detection over whole families: public files, files with parts missing, models of the libraries.

What diffusers and transformers build from published configs is the oracle for their own names.
Right, or "unknown" with the nearest candidate; never another family.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import diffusers_models
import pytest
import torch
from calls import calls_of
from models import layout, model_values, shrunk, write_model, write_tensors
from safetensors.torch import load_file

from ckptools.family import Detection, _detect, detect, family_of, load_families
from ckptools.keymap import key_map
from ckptools.recipe import parse_recipe
from ckptools.tensors import TensorSpec
from ckptools.workflow import merge

UNET = "model.diffusion_model."
Specs = dict[str, TensorSpec]
Shapes = Mapping[str, tuple[int, ...]]

# list in tests/layouts → kind, family, variant
LAYOUTS: Mapping[str, tuple[str, str | None, str | None]] = {
    "controlnet-sd1": ("controlnet", "controlnet", "sd1"),
    "flux": ("checkpoint", "flux", "dev"),
    "sd1": ("checkpoint", "sd1", "base"),
    "sd1-ema-only-unet": ("unknown", None, None),
    "sd1-inpainting": ("checkpoint", "sd1", "inpainting"),
    "sd1-ip2p": ("checkpoint", "sd1", "ip2p"),
    "sd2": ("checkpoint", "sd2", "base"),
    "sd2-depth": ("checkpoint", "sd2", "depth"),
    "sd2-inpainting": ("checkpoint", "sd2", "inpainting"),
    "sd3": ("checkpoint", "sd3", "medium"),
    "sdxl": ("checkpoint", "sdxl", "base"),
    "sdxl-refiner": ("checkpoint", "sdxl-refiner", "base"),
}
KNOWN = {name: row for name, row in LAYOUTS.items() if row[1]}


def specs_of(shapes: Shapes) -> Specs:
    return {name: TensorSpec(name, "F16", shape) for name, shape in shapes.items()}


def told(found: Detection) -> tuple[str, str | None, str | None]:
    return found.kind, found.family, found.variant


def without(specs: Specs, *prefixes: str) -> Specs:
    return {name: spec for name, spec in specs.items() if not name.startswith(prefixes)}


def below(specs: Specs, prefix: str, new: str = "") -> Specs:
    """The tensors under a prefix, under another."""
    return specs_of(
        {new + n[len(prefix) :]: s.shape for n, s in specs.items() if n.startswith(prefix)}
    )


# --- public files -------------------------------------------------------------------------------


def test_every_list_is_in_the_table() -> None:
    folder = Path(__file__).parent / "layouts"

    assert {path.name.partition(".")[0] for path in folder.glob("*.gz")} == LAYOUTS.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_public_file_is_recognised(name: str) -> None:
    found = detect(layout(name))

    assert told(found) == LAYOUTS[name]


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.3])
def test_with_tensors_missing_a_file_is_right_or_unknown_but_near(name: str, share: float) -> None:
    """From one tensor to 30 %; a file that lost its deciding tensor may leave its variant open."""
    specs = layout(name)
    kind, family, variant = LAYOUTS[name]
    for seed in range(6):
        lost = set(random.Random(seed).sample(sorted(specs), max(1, int(share * len(specs)))))

        found = detect({n: spec for n, spec in specs.items() if n not in lost})

        if found.kind == "unknown":
            assert family in {row.family for row in found.rejected}
        else:
            assert told(found)[:2] == (kind, family)
            assert found.variant in (variant, None)


@pytest.mark.parametrize("name", [n for n, row in KNOWN.items() if row[0] == "checkpoint"])
def test_with_a_component_missing_a_file_is_right_or_unknown(name: str) -> None:
    specs = layout(name)
    family = family_of(detect(specs))
    components = {family.component_of(n) for n in specs}
    assert len(components) >= 3

    for component in components:
        found = detect({n: s for n, s in specs.items() if family.component_of(n) != component})

        if component in ("unet", "transformer"):
            assert found.kind in ("unknown", "text_encoder", "vae")
        else:
            assert told(found) == LAYOUTS[name]


@pytest.mark.parametrize("name", [n for n, row in KNOWN.items() if row[0] == "checkpoint"])
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", UNET])
def test_a_bare_unet_is_recognised_under_any_prefix(name: str, prefix: str) -> None:
    found = detect(below(layout(name), UNET, prefix))

    assert told(found) == LAYOUTS[name]
    assert found.layout == "ldm"


@pytest.mark.parametrize("name", [n for n, row in KNOWN.items() if row[0] == "checkpoint"])
def test_a_bare_unet_has_the_names_of_its_family(name: str) -> None:
    """So that it merges with whole files."""
    bare = below(layout(name), UNET)
    family = family_of(detect(bare))

    assert {family.canonical_name(n) for n in bare} <= layout(name).keys()


@pytest.mark.parametrize("name", ["sd1", "sd1-inpainting", "sd1-ip2p"])
def test_nai_names_change_nothing(name: str) -> None:
    old = "cond_stage_model.transformer.text_model."
    nai = below(layout(name), old, "cond_stage_model.transformer.")

    assert told(detect(without(layout(name), old) | nai)) == LAYOUTS[name]


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_a_narrow_relative_is_recognised(name: str) -> None:
    assert detect(shrunk(name)).family == name


# --- what adapters hold -------------------------------------------------------------------------

KOHYA = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
DOTTED = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
FULL = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize("module", [KOHYA, DOTTED, FULL])
@pytest.mark.parametrize(
    ("parts", "variant"),
    [
        ({"lora_down.weight": (4, 768), "lora_up.weight": (640, 4), "alpha": ()}, "lora"),
        ({"lora_A.weight": (4, 768), "lora_B.weight": (640, 4)}, "lora"),
        ({"hada_w1_a": (640, 4), "hada_w1_b": (4, 768), "hada_w2_a": (640, 4)}, "loha"),
        ({"lokr_w1": (8, 8), "lokr_w2_a": (80, 4), "lokr_w2_b": (4, 96)}, "lokr"),
        ({"w_norm": (640,), "b_norm": (640,)}, "norm"),
        ({f"{part}.weight": (4, 4) for part in ("a1", "a2", "b1", "b2")}, "glora"),
        ({"oft_blocks": (4, 160, 160), "alpha": ()}, "oft"),
        ({"diff": (640, 768), "diff_b": (640,)}, "full"),
        ({"dora_scale": (1, 768), "lora_down.weight": (4, 768), "lora_up.weight": (640, 4)},
         "dora"),
    ],
)  # fmt: skip
def test_an_adapter_is_no_model_however_like_one_its_names_are(
    module: str, parts: Shapes, variant: str
) -> None:
    found = detect(specs_of({f"{module}.{part}": shape for part, shape in parts.items()}))

    assert told(found) == ("lora", None, variant)


def test_a_list_of_scales_for_inputs_is_an_adapter() -> None:
    assert told(detect(specs_of({f"{KOHYA}.weight": (768,), f"{KOHYA}.on_input": ()}))) == (
        "lora", None, "ia3",
    )  # fmt: skip


def test_an_adapter_of_every_module_of_a_model_is_an_adapter() -> None:
    """Its names hold those of all the base's tensors."""
    modules = [name.removesuffix(".weight") for name in layout("sdxl") if name.endswith("weight")]
    shapes = {f"{m}.lora_{side}.weight": (4, 4) for m in modules for side in ("down", "up")}

    assert detect(specs_of(shapes)).kind == "lora"


@pytest.mark.parametrize(("width", "base"), [(768, "SD1"), (1024, "SD2"), (2048, "SDXL")])
def test_an_adapter_says_whose_cross_attention_it_fits(width: int, base: str) -> None:
    found = detect(specs_of({f"{KOHYA}.lora_down.weight": (4, width)}))

    assert f"attn2.to_k takes {width} inputs, as in {base}" in found.evidence


@pytest.mark.parametrize(
    ("shapes", "expected", "found_layout"),
    [
        ({"ip_adapter.1.to_k_ip.weight": (320, 768), "image_proj.proj.weight": (3072, 1024)},
         ("ip_adapter", "ip-adapter", "sd1"), "ldm"),
        ({"ip_adapter.1.to_k_ip.weight": (640, 2048), "image_proj.latents": (1, 16, 1280)},
         ("ip_adapter", "ip-adapter", "sdxl"), "ldm"),
        ({f"down_blocks.{i}.motion_modules.0.temporal_transformer.norm.weight": (320,)
          for i in range(4)}, ("motion_module", "motion-module", "sd1"), "ldm"),
        ({f"down_blocks.{i}.motion_modules.0.temporal_transformer.norm.weight": (320,)
          for i in range(4)} | {"mid_block.motion_modules.0.temporal_transformer.norm.bias": (8,)},
         ("motion_module", "motion-module", "sd1-v2"), "ldm"),
        ({f"768.{i}.linear.0.weight": (1536, 768) for i in range(2)},
         ("hypernetwork", "hypernetwork", "sd1"), "a1111"),
        ({"lora_controlnet": (0,), "input_hint_block.0.weight": (16, 3, 3, 3),
          "input_blocks.8.1.proj_in.up": (4, 4), "zero_convs.0.0.weight": (4, 4, 1, 1)},
         ("controlnet", "control-lora", "sdxl"), "ldm"),
        ({"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": (4, 4)},
         ("controlnet", "controlnet-lllite", "sdxl"), "kohya"),
        ({"lllite_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.down.0.weight": (4, 4)},
         ("controlnet", "controlnet-lllite", "sd1"), "kohya"),
        ({"body.0.in_conv.weight": (80, 192, 1, 1), "body.0.body.0.block1.weight": (8, 8, 3, 3)},
         ("t2i_adapter", "t2i-adapter", "sd1"), "ldm"),
        ({"conv_in.weight": (320, 768, 3, 3), "body.0.block1.weight": (320, 320, 3, 3)},
         ("t2i_adapter", "t2i-adapter", "sdxl"), "ldm"),
        ({"string_to_param.*": (4, 1024)}, ("embedding", None, "sd2"), "a1111"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, ("embedding", None, "sdxl"), "sdxl"),
    ],
)  # fmt: skip
def test_small_parts_are_recognised_by_their_names(
    shapes: Shapes, expected: tuple[str, str | None, str], found_layout: str
) -> None:
    found = detect(specs_of(shapes))

    assert told(found) == expected
    assert found.layout == found_layout


def test_a_controlnet_made_of_differences_says_so() -> None:
    found = detect(layout("controlnet-sd1") | specs_of({"difference": (0,)}))

    assert found.variant == "sd1"
    assert any("marker difference" in words for words in found.evidence)


# --- traps --------------------------------------------------------------------------------------


def with_channels(specs: Specs, channels: int) -> Specs:
    name = f"{UNET}input_blocks.0.0.weight"
    return specs | specs_of({name: (specs[name].shape[0], channels, 3, 3)})


def with_part(name: str, channels: int, extra: Shapes) -> Specs:
    """A public UNet with other input channels and parts of a cousin, without its text encoder."""
    return without(with_channels(layout(name), channels), "cond_stage_model.") | specs_of(extra)


VISUAL = "cond_stage_model.model.visual.conv1.weight"


@pytest.mark.parametrize(
    ("specs", "family", "variant"),
    [
        (with_part("sd1", 8, {"cc_projection.weight": (768, 772), VISUAL: (1, 3, 14, 14)}),
         "sd1-image", "zero123"),
        (with_part("sd1", 4, {VISUAL: (1, 3, 14, 14)}), "sd1-image", "image-variations"),
        (with_part("sd1", 9, {"cond_stage_model.mapper.resblocks.0.ln_1.bias": (1024,)}),
         "sd1-image", "paint-by-example"),
        (with_part("sd2", 4, {f"{UNET}label_emb.0.0.weight": (1280, 2048)}), "sd2-unclip", "h"),
        (with_part("sd2", 4, {f"{UNET}label_emb.0.0.weight": (1280, 1536)}), "sd2-unclip", "l"),
        (without(with_part("sd2", 7, {f"{UNET}label_emb.weight": (1000, 1024)}),
                 f"{UNET}input_blocks.1.1.", f"{UNET}input_blocks.2.1."), "sd-x4-upscaler", None),
        (with_part("sd2", 8, {f"{UNET}label_emb.0.0.weight": (1280, 768),
                              f"{UNET}input_blocks.1.0.time_stack.in_layers.0.bias": (320,)}),
         "svd", None),
        (with_channels(layout("sdxl"), 9), "sdxl", "inpainting"),
        (with_channels(layout("sdxl"), 8), "sdxl", "ip2p"),
    ],
    ids=["zero123", "image-variations", "paint-by-example", "unclip-h", "unclip-l", "x4", "svd",
         "sdxl-inpainting", "sdxl-ip2p"],
)  # fmt: skip
def test_a_cousin_is_told_from_the_family_that_it_looks_like(
    specs: Specs, family: str, variant: str | None
) -> None:
    assert told(detect(specs)) == ("checkpoint", family, variant)


@pytest.mark.parametrize(
    ("name", "dropped", "family"),
    [
        ("ssd-1b", {4: 2, 7: 4}, "ssd-1b"),
        ("vega", {4: 1, 7: 2}, "segmind-vega"),
        ("neither", {4: 1, 7: 4}, None),
    ],
)
def test_a_distilled_sdxl_is_told_by_its_depths(
    name: str, dropped: Mapping[int, int], family: str | None
) -> None:
    gone = [f"{UNET}middle_block.1.transformer_blocks."]
    for first, depth in dropped.items():
        gone += [
            f"{UNET}input_blocks.{block}.1.transformer_blocks.{i}."
            for block in (first, first + 1)
            for i in range(depth, 10)
        ]

    found = detect(without(layout("sdxl"), *gone))

    assert found.family == family, name
    assert family or "ssd-1b" in {row.family for row in found.rejected}


def test_playground_is_an_sdxl_that_predicts_another_way() -> None:
    found = detect(layout("sdxl") | specs_of({"edm_mean": (4,), "edm_std": (4,)}))

    assert (found.family, found.variant, found.prediction) == ("sdxl", "base", "edm")
    assert any("Playground" in words for words in found.evidence)


@pytest.mark.parametrize(
    ("numbers", "has_guidance", "variant"),
    [(64, True, "dev"), (64, False, "schnell"), (384, True, "fill"), (128, True, "control")],
)
def test_fluxes_are_told_by_their_inputs(numbers: int, has_guidance: bool, variant: str) -> None:
    specs = layout("flux") | specs_of({f"{UNET}img_in.weight": (3072, numbers)})
    if not has_guidance:
        specs = without(specs, f"{UNET}guidance_in.")

    assert told(detect(specs)) == ("checkpoint", "flux", variant)


def test_a_quantised_flux_is_recognised_and_says_so() -> None:
    """Weights quantised to nf4 are columns of bytes; biases and scales keep their shapes."""
    flat = {
        name: (spec.numel // 2, 1)
        for name, spec in layout("flux").items()
        if len(spec.shape) == 2 and name.startswith(UNET)
    }
    marks = {f"{name}.quant_state.bitsandbytes__nf4": (80,) for name in flat}

    found = detect(layout("flux") | specs_of(flat | marks))

    assert told(found) == ("checkpoint", "flux", "dev")
    assert any("nf4" in words for words in found.evidence)


def test_a_flux_in_fp8_says_so() -> None:
    found = detect(layout("flux") | specs_of({"scaled_fp8": (0,)}))

    assert any("fp8" in words for words in found.evidence)


def test_a_chroma_is_no_flux() -> None:
    specs = without(layout("flux"), f"{UNET}vector_in.", f"{UNET}guidance_in.")
    found = detect(specs | specs_of({f"{UNET}distilled_guidance_layer.in_proj.bias": (5120,)}))

    assert found.family == "chroma"


@pytest.mark.parametrize(
    ("shapes", "family", "variant"),
    [
        ({f"blocks.{i}.{part}": (8, 8) for i in range(28)
          for part in ("scale_shift_table", *(f"attn.{n}" for n in range(12)))}
         | {"t_block.1.weight": (8, 8), "y_embedder.y_proj.fc1.weight": (8, 8)},
         "pixart", "sigma"),
        ({"encoder_pooling.0.weight": (8,), "encoder_proj.weight": (8, 4096),
          "input_blocks.0.0.weight": (8, 6, 3, 3)}, "deepfloyd-if", "stage-2"),
        ({"model.double_layers.0.attn.w1q.weight": (8, 8), "cond_seq_linear.weight": (8, 8),
          "single_layers.0.attn.w1q.weight": (8, 8)}, "auraflow", None),
        ({"mlp_t5.0.weight": (8, 8), "model.blocks.0.attn1.Wqkv.weight": (8, 8),
          "text_embedding_padding": (8, 8)}, "hunyuan-dit", None),
    ],
)  # fmt: skip
def test_makers_names_of_other_transformers(
    shapes: Shapes, family: str, variant: str | None
) -> None:
    assert told(detect(specs_of(shapes))) == ("checkpoint", family, variant)


# --- the libraries' own models --------------------------------------------------------------------


@cache
def on_meta(build: str, **config: object) -> Specs:
    """The tensors of a diffusers or transformers model, built without memory."""
    import diffusers
    import transformers

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, of its own parts
        if hasattr(diffusers, build):
            model = getattr(diffusers, build)(**config)
        else:
            made = getattr(transformers, f"{config.pop('config_of')}Config")(**config)
            model = getattr(transformers, build)(made)
    return specs_of({name: tuple(t.shape) for name, t in model.state_dict().items()})


SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
       "use_linear_projection": True}  # fmt: skip
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_UNET = SDXL | {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
IF = {
    "addition_embed_type": "text", "addition_embed_type_num_heads": 64,
    "attention_head_dim": 64, "block_out_channels": (192, 384, 576, 768),
    "cross_attention_dim": 768, "encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj",
    "down_block_types": ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    "layers_per_block": 3, "resnet_time_scale_shift": "scale_shift", "act_fn": "gelu",
    "only_cross_attention": False, "out_channels": 6,
}  # fmt: skip
HUNYUAN = {
    "num_layers": 40, "patch_size": 2, "in_channels": 4, "sample_size": 128, "hidden_size": 1408,
    "attention_head_dim": 88, "pooled_projection_dim": 1024, "mlp_ratio": 4.4,
}  # fmt: skip
PIXART = {"num_layers": 28, "sample_size": 128, "caption_channels": 4096}
LANGUAGE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}  # fmt: skip

# class, config from the published config.json → family, variant
BUILT: list[tuple[str, dict[str, object], str, str | None]] = [
    ("UNet2DConditionModel", {"cross_attention_dim": 768}, "sd1", "base"),
    ("UNet2DConditionModel", {"cross_attention_dim": 768, "in_channels": 9}, "sd1", "inpainting"),
    ("UNet2DConditionModel", {"cross_attention_dim": 768, "in_channels": 8}, "sd1", "ip2p"),
    ("UNet2DConditionModel", SD2, "sd2", "base"),
    ("UNet2DConditionModel", SD2 | {"in_channels": 5}, "sd2", "depth"),
    ("UNet2DConditionModel",
     SD2 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 1536},
     "sd2-unclip", "l"),
    ("UNet2DConditionModel",
     SD2 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
     "sd2-unclip", "h"),
    ("UNet2DConditionModel",
     {"in_channels": 7, "block_out_channels": (256, 512, 512, 1024), "cross_attention_dim": 1024,
      "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
      "up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"), "num_class_embeds": 1000,
      "only_cross_attention": (True, True, True, False), "use_linear_projection": True},
     "sd-x4-upscaler", None),
    ("UNet2DConditionModel", SDXL_UNET, "sdxl", "base"),
    ("UNet2DConditionModel", SDXL_UNET | {"in_channels": 9}, "sdxl", "inpainting"),
    ("UNet2DConditionModel",
     SDXL_UNET | {"transformer_layers_per_block": (1, 2, 4), "mid_block_type": "UNetMidBlock2D",
                  "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1)},
     "ssd-1b", "base"),
    ("UNet2DConditionModel",
     SDXL_UNET | {"transformer_layers_per_block": (1, 2, 5), "mid_block_type": None,
                  "layers_per_block": 1}, "koala", "700m"),
    ("UNet2DConditionModel",
     SDXL_UNET | {"transformer_layers_per_block": (1, 2, 6), "layers_per_block": 1},
     "koala", "1b"),
    ("UNet2DConditionModel",
     {"block_out_channels": (384, 768, 1536, 1536), "cross_attention_dim": 1280,
      "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"),
      "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
      "transformer_layers_per_block": 4, "attention_head_dim": (6, 12, 24, 24),
      "use_linear_projection": True, "addition_embed_type": "text_time",
      "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2560},
     "sdxl-refiner", "base"),
    ("UNet2DConditionModel", IF | {"in_channels": 3}, "deepfloyd-if", "stage-1"),
    ("UNet2DConditionModel", IF | {"in_channels": 6, "class_embed_type": "timestep"},
     "deepfloyd-if", "stage-2"),
    ("UNetSpatioTemporalConditionModel", {}, "svd", None),
    ("SD3Transformer2DModel",
     {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
      "pos_embed_max_size": 192}, "sd3", "medium"),
    ("SD3Transformer2DModel",
     {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
      "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
     "sd3.5-medium", "base"),
    ("SD3Transformer2DModel",
     {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
      "pos_embed_max_size": 192, "qk_norm": "rms_norm"}, "sd3.5-large", "base"),
    ("FluxTransformer2DModel", {"guidance_embeds": True}, "flux", "dev"),
    ("FluxTransformer2DModel", {"guidance_embeds": False}, "flux", "schnell"),
    ("FluxTransformer2DModel", {"guidance_embeds": True, "in_channels": 384, "out_channels": 64},
     "flux", "fill"),
    ("FluxTransformer2DModel", {"guidance_embeds": True, "in_channels": 128, "out_channels": 64},
     "flux", "control"),
    ("ChromaTransformer2DModel", {}, "chroma", None),
    ("PixArtTransformer2DModel", PIXART, "pixart", "alpha-1024"),
    ("PixArtTransformer2DModel", PIXART | {"use_additional_conditions": False}, "pixart", "sigma"),
    ("AuraFlowTransformer2DModel", {}, "auraflow", None),
    ("HunyuanDiT2DModel", HUNYUAN, "hunyuan-dit", None),
    ("ControlNetModel", {"cross_attention_dim": 768}, "controlnet", "sd1"),
    ("ControlNetModel", SD2, "controlnet", "sd2"),
    ("ControlNetModel", SDXL, "controlnet", "sdxl"),
    ("ControlNetModel", SDXL | {"down_block_types": ("DownBlock2D",) * 3,
                                "mid_block_type": "UNetMidBlock2D"}, "controlnet", "sdxl-small"),
    ("SD3ControlNetModel", {"num_layers": 6}, "controlnet", "sd3"),
    ("FluxControlNetModel", {"num_layers": 2, "num_single_layers": 2}, "controlnet", "flux"),
    ("T2IAdapter", {"adapter_type": "full_adapter"}, "t2i-adapter", "sd1"),
    ("T2IAdapter", {"adapter_type": "light_adapter"}, "t2i-adapter", "sd1"),
    ("T2IAdapter", {"adapter_type": "full_adapter_xl", "downscale_factor": 16},
     "t2i-adapter", "sdxl"),
    ("MotionAdapter", {"use_motion_mid_block": False}, "motion-module", "sd1"),
    ("MotionAdapter", {"use_motion_mid_block": True}, "motion-module", "sd1-v2"),
    ("MotionAdapter", {"block_out_channels": (320, 640, 1280), "use_motion_mid_block": False},
     "motion-module", "sdxl"),
    ("AutoencoderKL", {"block_out_channels": (128, 256)}, "vae", "4-channel"),
    ("AutoencoderKL", {"block_out_channels": (128, 256), "latent_channels": 16},
     "vae", "16-channel"),
    ("AutoencoderKLTemporalDecoder", {"block_out_channels": (128, 256)}, "vae", "svd"),
    ("CLIPTextModel", {"config_of": "CLIPText", "hidden_size": 768}, "text-encoder", "clip-l"),
    ("CLIPTextModelWithProjection", {"config_of": "CLIPText", "hidden_size": 1280},
     "text-encoder", "clip-g"),
    ("T5EncoderModel", {"config_of": "T5", "num_layers": 2}, "text-encoder", "t5"),
    ("LlamaForCausalLM", LANGUAGE | {"config_of": "Llama"}, "llama", "llama"),
    ("MistralForCausalLM", LANGUAGE | {"config_of": "Mistral"}, "llama", "llama"),
    ("Qwen2ForCausalLM", LANGUAGE | {"config_of": "Qwen2"}, "llama", "qwen2"),
    ("Qwen3ForCausalLM", LANGUAGE | {"config_of": "Qwen3"}, "llama", "qwen3"),
    ("Gemma2ForCausalLM", LANGUAGE | {"config_of": "Gemma2"}, "llama", "gemma"),
    ("Phi3ForCausalLM", LANGUAGE | {"config_of": "Phi3", "pad_token_id": 0}, "llama", "phi3"),
]  # fmt: skip


def row_id(row: object) -> str | None:
    return row if isinstance(row, str) else None


@pytest.mark.parametrize(("build", "config", "family", "variant"), BUILT, ids=row_id)
def test_a_model_as_the_libraries_name_it(
    build: str, config: dict[str, object], family: str, variant: str | None
) -> None:
    found = detect(on_meta(build, **config))

    assert (found.family, found.variant) == (family, variant)
    assert found.layout in ("diffusers", "transformers", "ldm")
    if found.kind == "checkpoint":
        assert found.layout == "diffusers"


# Opened folders of these have their makers' names: see ckptools/folders.py.
WITH_KEY_MAP = ("sd1", "sd2", "sdxl", "sdxl-refiner", "sd3", "flux", "ssd-1b", "koala")
WHOLE = [row for row in BUILT if load_families()[row[2]].kind == "checkpoint"]


@pytest.mark.parametrize(("build", "config", "family", "variant"), WHOLE, ids=row_id)
def test_the_same_under_the_name_of_its_folder(
    build: str, config: dict[str, object], family: str, variant: str | None
) -> None:
    """As folders of families without a key map are opened: unet.…, beside other components."""
    part = "unet." if build.startswith("UNet") else "transformer."
    specs = below(on_meta(build, **config), "", part)
    vae = below(on_meta("AutoencoderKL", block_out_channels=(128, 256)), "", "vae.")

    found = detect(specs | vae)

    assert (found.family, found.variant, found.layout) == (family, variant, "diffusers")


@pytest.mark.parametrize(("build", "config", "family", "variant"), WHOLE, ids=row_id)
def test_with_tensors_missing_it_is_right_or_unknown_but_near(
    build: str, config: dict[str, object], family: str, variant: str | None
) -> None:
    specs = on_meta(build, **config)
    for seed, share in enumerate([0.0, 0.02, 0.1, 0.3] * 2):
        lost = set(random.Random(seed).sample(sorted(specs), max(1, int(share * len(specs)))))

        found = detect({name: spec for name, spec in specs.items() if name not in lost})

        if found.kind == "unknown":
            assert family in {row.family for row in found.rejected}
        else:
            assert found.family == family


def components() -> Iterator[tuple[str, str, Specs]]:
    for family in diffusers_models.FAMILIES:
        parts: dict[str, Specs] = {}
        for row in diffusers_models.listed(family):
            parts.setdefault(row.component, {})[row.name] = TensorSpec(row.name, "F16", row.shape)
        for component, specs in parts.items():
            yield family, component, specs


@pytest.mark.parametrize(("family", "component", "specs"), list(components()), ids=row_id)
def test_a_component_of_a_public_folder(family: str, component: str, specs: Specs) -> None:
    found = detect(specs)

    if component in ("unet", "transformer"):
        assert (found.kind, found.family, found.layout) == ("checkpoint", family, "diffusers")
    elif component == "vae":
        variant = "16-channel" if family in ("sd3", "flux") else "4-channel"
        assert (found.kind, found.variant, found.layout) == ("vae", variant, "diffusers")
    else:
        assert (found.kind, found.layout) == ("text_encoder", "transformers")


# --- new families in use --------------------------------------------------------------------------


def language_model() -> Specs:
    return on_meta("LlamaForCausalLM", **(LANGUAGE | {"config_of": "Llama"}))


def narrow_transformer(name: str) -> Specs:
    return {n: spec for n, spec in shrunk(name, 64).items() if n.startswith(UNET)}


@pytest.mark.parametrize("name", ["sd3", "flux", "llama"])
def test_two_models_of_a_family_merge_by_names(tmp_path: Path, name: str) -> None:
    specs = language_model() if name == "llama" else narrow_transformer(name)
    values = {}
    for seed, model in enumerate("AB"):
        values[model] = model_values(specs, seed=seed, dtype="F32")
        write_tensors(tmp_path / f"{model}.safetensors", values[model])
    text = (
        "ckptools: 1\nmodels: {A: A.safetensors, B: B.safetensors}\n"
        "merge: A * 0.75 + B * 0.25\noutput: {path: out.safetensors}\n"
    )

    result = merge(parse_recipe(text, tmp_path / "recipe.yaml"))
    merged = load_file(result.output)

    family = load_families()[name]
    assert merged.keys() == specs.keys()
    for tensor, found in merged.items():
        wide = 0.75 * values["A"][tensor].double() + 0.25 * values["B"][tensor].double()
        expected = values["A"][tensor] if family.is_protected(tensor) else wide.float()
        assert torch.equal(found, expected), tensor


def test_a_bare_transformer_merges_into_a_whole_file(tmp_path: Path) -> None:
    whole = narrow_transformer("sd3") | specs_of({"first_stage_model.decoder.x": (4,)})
    bare = below(whole, UNET)
    a = write_model(tmp_path / "A.safetensors", whole, seed=1, dtype="F32")
    b = write_model(tmp_path / "B.safetensors", bare, seed=2, dtype="F32")
    text = (
        "ckptools: 1\nmodels: {A: A.safetensors, B: B.safetensors}\n"
        "merge: A * 0.5 + B * 0.5\noutput: {path: out.safetensors}\n"
    )

    merged = load_file(merge(parse_recipe(text, tmp_path / "recipe.yaml")).output)

    name = "joint_blocks.3.x_block.attn.qkv.weight"
    wide = 0.5 * load_file(a)[UNET + name].double() + 0.5 * load_file(b)[name].double()
    assert torch.equal(merged[UNET + name], wide.float())
    assert torch.equal(merged["first_stage_model.decoder.x"],
                       load_file(a)["first_stage_model.decoder.x"])  # fmt: skip


def test_every_tensor_of_a_flux_has_its_block() -> None:
    family = load_families()["flux"]
    blocks = {n: family.block_of(n) for n in layout("flux") if not n.startswith("vae.")}

    assert set(blocks.values()) == set(family.blocks)
    assert blocks[f"{UNET}double_blocks.18.img_mod.lin.weight"] == "D18"
    assert blocks[f"{UNET}single_blocks.4.linear1.weight"] == "S04"
    assert blocks[f"{UNET}guidance_in.in_layer.weight"] == "IN"


@pytest.mark.parametrize(("build", "config", "family", "_variant"), WHOLE, ids=row_id)
def test_input_tensors_and_components_fit_diffusers_names(
    build: str, config: dict[str, object], family: str, _variant: str | None
) -> None:
    known = load_families()[family]
    specs = on_meta(build, **config)
    usual = {known.canonical_name(name) for name in specs}

    if family not in WITH_KEY_MAP and family not in ("auraflow", "hunyuan-dit"):
        assert usual & set(known.input_tensors)
    if family not in WITH_KEY_MAP:
        assert {known.component_of(name) for name in usual} <= {"unet", "transformer"}


def test_controlnets_are_the_same_in_both_layouts() -> None:
    """A public file in its maker's names against `ControlNetModel`, there and back."""
    theirs = on_meta("ControlNetModel", cross_attention_dim=768)
    keys = key_map("_controlnet")

    public = layout("controlnet-sd1")
    pieces = [piece for spec in public.values() for piece in keys.pieces(spec) or ()]

    assert keys.checkpoint_specs({"controlnet": theirs}) == public
    assert {piece.name: piece.shape for piece in pieces} == {n: s.shape for n, s in theirs.items()}


# --- cost -----------------------------------------------------------------------------------------


def test_detection_looks_at_each_tensor_a_few_times() -> None:
    specs = layout("sdxl")
    detect(specs)
    _detect.cache_clear()  # what was found, so that it is looked for again

    calls = calls_of(lambda: detect(specs))

    assert 10 * len(specs) < calls < 100 * len(specs)  # measured: 35 for each of 2,515 tensors
