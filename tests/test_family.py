"""Families: which files are recognised, as what, and why; what their tensors are called."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ckptools.errors import InputError
from ckptools.family import (
    UNKNOWN,
    Family,
    detect,
    expand_blocks,
    family_of,
    load_families,
    read_families,
)
from ckptools.tensors import TensorSpec

LAYOUTS = Path(__file__).parent / "layouts"
UNET = "model.diffusion_model."
CHECKPOINTS = [
    ("sd1", "sd1", "base", 1131),
    ("sd1-inpainting", "sd1", "inpainting", 1131),
    ("sd1-ip2p", "sd1", "ip2p", 1131),
    ("sd2", "sd2", "base", 1228),
    ("sd2-inpainting", "sd2", "inpainting", 1228),
    ("sd2-depth", "sd2", "depth", 1596),
    ("sdxl", "sdxl", "base", 2515),
    ("sdxl-refiner", "sdxl-refiner", "base", 1858),
]
LAYOUT_IDS = [row[0] for row in CHECKPOINTS]
Specs = dict[str, TensorSpec]
Shapes = dict[str, tuple[int, ...]]


def read_layout(layout: str) -> Specs:
    """The tensors of a public model, as its header lists them (all called F16 here)."""
    lines = gzip.decompress((LAYOUTS / f"{layout}.txt.gz").read_bytes()).decode().splitlines()
    rows = [line.split("\t") for line in lines]
    return specs_of({name: tuple(map(int, dims.split(","))) if dims else () for name, dims in rows})


def specs_of(shapes: Shapes) -> Specs:
    return {name: TensorSpec(name, "F16", shape) for name, shape in shapes.items()}


def without(specs: Specs, *prefixes: str) -> Specs:
    return {name: spec for name, spec in specs.items() if not name.startswith(prefixes)}


def renamed(specs: Specs, old: str, new: str) -> Specs:
    return specs_of({name.replace(old, new): spec.shape for name, spec in specs.items()})


def resized(specs: Specs, sizes: dict[int, int]) -> Specs:
    """The same structure in other sizes; a size that is not listed stays."""
    return specs_of(
        {name: tuple(sizes.get(n, n) for n in spec.shape) for name, spec in specs.items()}
    )


def with_in_channels(specs: Specs, channels: int) -> Specs:
    name = f"{UNET}input_blocks.0.0.weight"
    out, _, *kernel = specs[name].shape
    return {**specs, **specs_of({name: (out, channels, *kernel)})}


def tiny_sd1() -> Specs:
    """SD1's names, narrower: cross-attention 64 wide, like the text encoder; channels 32 to 48."""
    return resized(read_layout("sd1"), {320: 32, 640: 48, 1280: 48, 768: 64, 3072: 256, 512: 64})


# --- detection: real layouts ---------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "family", "variant", "count"), CHECKPOINTS, ids=LAYOUT_IDS)
def test_a_public_checkpoint_is_recognised(
    layout: str, family: str, variant: str | None, count: int
) -> None:
    specs = read_layout(layout)

    found = detect(specs)

    assert len(specs) == count  # the totals that research lists: the layouts are whole
    assert (found.kind, found.family, found.variant) == ("checkpoint", family, variant)
    assert found.layout == "ldm"
    assert family not in {rejection.family for rejection in found.rejected}


@pytest.mark.parametrize(("layout", "family", "variant", "_count"), CHECKPOINTS, ids=LAYOUT_IDS)
def test_a_checkpoint_with_some_tensors_missing_is_still_recognised(
    layout: str, family: str, variant: str | None, _count: int
) -> None:
    specs = read_layout(layout)
    for seed in range(5):
        lost = random.Random(seed).sample(sorted(specs), len(specs) // 30)

        found = detect(without(specs, *[name for name in lost if "blocks.0.0" not in name]))

        assert (found.family, found.variant) == (family, variant)


@pytest.mark.parametrize(("layout", "family", "variant", "_count"), CHECKPOINTS, ids=LAYOUT_IDS)
def test_a_bare_unet_is_recognised_by_its_true_width(
    layout: str, family: str, variant: str | None, _count: int
) -> None:
    specs = {name: spec for name, spec in read_layout(layout).items() if name.startswith(UNET)}

    found = detect(specs)

    assert (found.kind, found.family, found.variant) == ("checkpoint", family, variant)


@pytest.mark.parametrize(("layout", "family", "variant", "_count"), CHECKPOINTS, ids=LAYOUT_IDS)
def test_tensors_of_other_kinds_do_not_hide_a_checkpoint(
    layout: str, family: str, variant: str | None, _count: int
) -> None:
    specs = read_layout(layout)
    ema = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": spec.shape
        for name, spec in specs.items()
        if name.startswith(UNET)
    }
    extra = {"betas": (1000,), "something.new": (3, 3), "embedding.lora_up.weight": (4, 4)}

    found = detect({**specs, **specs_of(ema | extra)})

    assert (found.family, found.variant) == (family, variant)
    assert any("EMA copy" in words for words in found.evidence)


def test_a_text_encoder_named_the_nai_way_is_recognised() -> None:
    specs = renamed(read_layout("sd1"), "transformer.text_model.", "transformer.")

    found = detect(specs)

    assert found.family == "sd1"
    assert any("NAI" in words for words in found.evidence)


@pytest.mark.parametrize("channels", [9, 8])
def test_sdxl_with_more_input_channels_is_a_variant(channels: int) -> None:
    found = detect(with_in_channels(read_layout("sdxl"), channels))

    assert (found.family, found.variant) == ("sdxl", {9: "inpainting", 8: "ip2p"}[channels])


def test_an_unheard_of_number_of_channels_leaves_the_variant_open() -> None:
    found = detect(with_in_channels(read_layout("sd1"), 13))

    assert (found.family, found.variant) == ("sd1", None)
    assert "no known variant of sd1: the UNet takes 13 channels; sd1 takes 4" in found.evidence


def test_without_its_first_convolution_the_variant_is_open() -> None:
    found = detect(without(read_layout("sd2"), f"{UNET}input_blocks.0.0.weight"))

    assert (found.family, found.variant) == ("sd2", None)


def test_the_nearest_rejected_family_comes_with_the_deciding_fact() -> None:
    rejected = {row.family: row.reason for row in detect(read_layout("sd2")).rejected}

    assert rejected["sd1"] == "attn2.to_k takes 1024 inputs; sd1 takes 768"
    assert rejected["sd2-unclip"] == "lacks label_emb"


# --- detection: narrow relatives ------------------------------------------------------------------


def test_a_narrow_sd1_is_recognised_by_its_structure() -> None:
    found = detect(tiny_sd1())

    assert (found.kind, found.family, found.variant) == ("checkpoint", "sd1", "base")
    assert any("reduced width: 64 instead of 768" in words for words in found.evidence)


@pytest.mark.parametrize(("channels", "variant"), [(9, "inpainting"), (8, "ip2p")])
def test_a_narrow_sd1_has_the_same_variants(channels: int, variant: str | None) -> None:
    assert detect(with_in_channels(tiny_sd1(), channels)).variant == variant


def test_a_narrow_sd1_named_the_nai_way_is_recognised() -> None:
    specs = renamed(tiny_sd1(), "transformer.text_model.", "transformer.")

    assert detect(specs).family == "sd1"


def test_a_narrow_sd2_is_recognised_by_its_structure() -> None:
    found = detect(resized(read_layout("sd2"), {320: 32, 640: 48, 1280: 48, 1024: 96, 3072: 288}))

    assert found.family == "sd2"
    assert any("reduced width: 96 instead of 1024" in words for words in found.evidence)


def test_a_narrow_sdxl_is_as_wide_as_its_two_text_encoders_together() -> None:
    sizes = {320: 32, 640: 48, 1280: 80, 768: 64, 2048: 64 + 80, 3072: 256, 2816: 80 + 6 * 16}
    found = detect(resized(read_layout("sdxl"), sizes))

    assert found.family == "sdxl"
    assert any("reduced width: 144 instead of 2048" in words for words in found.evidence)


def test_a_narrow_refiner_is_recognised_by_its_structure() -> None:
    found = detect(resized(read_layout("sdxl-refiner"), {384: 32, 768: 48, 1536: 64, 1280: 80}))

    assert found.family == "sdxl-refiner"


def test_a_narrow_unet_without_a_text_encoder_is_unknown() -> None:
    found = detect(without(tiny_sd1(), "cond_stage_model."))

    assert (found.kind, found.family) == ("unknown", None)
    assert found.rejected[0].family == "sd1"
    assert found.rejected[0].reason == "attn2.to_k takes 64 inputs; sd1 takes 768"


def test_a_width_that_does_not_fit_the_text_encoder_is_unknown() -> None:
    specs = tiny_sd1()
    changes = {n: (s.shape[0], 60) for n, s in specs.items() if n.endswith("attn2.to_k.weight")}

    assert detect({**specs, **specs_of(changes)}).kind == "unknown"


def test_blocks_of_two_families_in_one_file_are_unknown() -> None:
    sd1, sd2 = read_layout("sd1"), read_layout("sd2")
    mixed = {
        name: (sd2 if name.startswith(f"{UNET}output_blocks") else sd1)[name]
        for name in sd1.keys() & sd2.keys()
    }

    found = detect(mixed)

    assert found.kind == "unknown"
    assert "attn2.to_k takes 768, 1024 inputs; sd1 takes 768" in {r.reason for r in found.rejected}


# --- detection: files that are no checkpoint of a known family ------------------------------------


def test_another_architecture_is_unknown_and_near_nothing() -> None:
    specs = specs_of({f"stage{i}.mixer.{j}.weight": (8, 8) for i in range(6) for j in range(5)})

    found = detect(specs)

    assert (found.kind, found.family, found.variant, found.layout) == ("unknown", None, None, None)
    assert found.rejected == ()
    assert "30 tensors, most of them stage0.mixer (5)" in found.evidence[0]


@pytest.mark.parametrize(
    "names",
    [
        ["bert.encoder.layer.0.attention.self.query.weight", "cls.predictions.bias"],
        ["conv1.weight", "layer1.0.conv1.weight", "layer4.1.bn2.running_mean", "fc.weight"],
        ["decoder.block.0.layer.0.SelfAttention.q.weight"],
        ["model.diffusion_model.something"],
        [""],
    ],
)
def test_names_of_other_worlds_are_unknown(names: list[str]) -> None:
    assert detect(specs_of(dict.fromkeys(names, (8, 8)))).kind == "unknown"


def test_a_file_without_tensors_is_unknown() -> None:
    assert detect({}).evidence == ("the file holds no tensors",)


@pytest.mark.parametrize("layout", LAYOUT_IDS)
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
def test_a_random_part_of_a_checkpoint_is_no_checkpoint(layout: str, share: float) -> None:
    specs = read_layout(layout)
    kept = random.Random(7).sample(sorted(specs), int(share * len(specs)))

    found = detect({name: specs[name] for name in kept})

    assert (found.kind, found.family) == ("unknown", None)


def test_an_ema_only_file_is_not_called_a_checkpoint_with_a_unet() -> None:
    found = detect(read_layout("sd1-ema-only-unet"))

    assert (found.kind, found.family) == ("unknown", None)
    assert found.rejected[0].family == "sd1"
    assert found.rejected[0].reason == "has only the EMA copy of the UNet (model_ema)"


@pytest.mark.parametrize(
    ("layout", "extra", "family", "variant", "reason"),
    [
        ("sd2", {f"{UNET}label_emb.0.0.weight": (1280, 1536)}, "sd2-unclip", "l",
         "has label_emb; sd2 has none"),
        ("sd1-ip2p", {"cc_projection.weight": (768, 772)}, "sd1-image", "zero123",
         "an image encoder in place of the text"),
    ],
    ids=["unCLIP", "Zero123"],
)  # fmt: skip
def test_cousins_with_another_conditioning_are_not_taken_for_the_family(
    layout: str, extra: Shapes, family: str, variant: str, reason: str
) -> None:
    found = detect({**read_layout(layout), **specs_of(extra)})

    assert (found.family, found.variant) == (family, variant)
    assert reason in found.rejected[0].reason


def test_a_distilled_sdxl_is_rejected_for_its_depth() -> None:
    specs = read_layout("sdxl")
    shallow = {
        name: spec
        for name, spec in specs.items()
        if not any(f"input_blocks.{i}.1.transformer_blocks.{j}." in name
                   for i in (7, 8) for j in range(4, 10))
    }  # fmt: skip

    found = detect(shallow)

    assert found.kind == "unknown"  # an SSD-1B would have no attention in the middle
    reasons = {row.family: row.reason for row in found.rejected}
    assert reasons["sdxl"] == "transformer depth at input_blocks.7.1 is 4; sdxl has 10"
    assert reasons["ssd-1b"] == "has attention in the middle block; ssd-1b has none"


# --- detection: other kinds -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "layout", "variant"),
    [
        (["lora_unet_mid_block_attn.lora_down.weight", "lora_unet_mid_block_attn.alpha"],
         "kohya", "lora"),
        (["unet.mid_block.attn1.to_q.lora_A.weight", "unet.mid_block.attn1.to_q.lora_B.weight"],
         "peft", "lora"),
        (["unet.mid_block.attn1.processor.to_q_lora.down.weight"], "diffusers", "lora"),
        (["unet:0:up", "unet:0:down", "text_encoder:3:up", "<s1>"], "cloneofsimo", "lora"),
        (["diffusion_model.input_blocks.1.1.proj_in.lora_up.weight",
          "diffusion_model.input_blocks.1.1.proj_in.lora_down.weight"], "full-name", "lora"),
        (["lora_unet_x.hada_w1_a", "lora_unet_x.hada_w1_b", "lora_unet_x.alpha"], "kohya", "loha"),
        (["lycoris_x.lokr_w1", "lycoris_x.lokr_w2_a"], "kohya", "lokr"),
        (["lora_unet_x.oft_blocks"], "kohya", "oft"),
        (["lora_unet_x.weight", "lora_unet_x.on_input"], "kohya", "ia3"),
        (["lora_unet_x.dora_scale", "lora_unet_x.lora_down.weight"], "kohya", "dora"),
        (["lora_unet_x.diff", "lora_unet_x.diff_b"], "kohya", "full"),
    ],
)  # fmt: skip
def test_an_adapter_is_recognised_by_its_names(
    names: list[str], layout: str, variant: str | None
) -> None:
    found = detect(specs_of(dict.fromkeys(names, (4, 768))))

    assert (found.kind, found.family) == ("lora", None)
    assert (found.layout, found.variant) == (layout, variant)


def test_a_controlnet_is_recognised_with_its_base() -> None:
    specs = read_layout("controlnet-sd1")
    bare = renamed(specs, "control_model.", "")
    controlnet = load_families()["controlnet"]

    assert [(d.kind, d.variant) for d in map(detect, (specs, bare))] == [("controlnet", "sd1")] * 2
    assert {controlnet.canonical_name(name) for name in bare} == specs.keys()


@pytest.mark.parametrize("layout", ["sd1", "sdxl"])
def test_a_vae_file_is_recognised_with_and_without_prefix(layout: str) -> None:
    specs = read_layout(layout)
    prefixed = {n: s for n, s in specs.items() if n.startswith("first_stage_model.")}
    bare = renamed(prefixed, "first_stage_model.", "")
    vae = load_families()["vae"]

    for found in map(detect, (prefixed, bare)):
        assert (found.kind, found.family, found.variant) == ("vae", "vae", "4-channel")
    assert {vae.canonical_name(name) for name in bare} == prefixed.keys()
    assert {vae.component_of(vae.canonical_name(name)) for name in bare} == {"vae"}


@pytest.mark.parametrize(
    ("layout", "prefix", "variant"),
    [
        ("sd1", "cond_stage_model.transformer.", "clip-l"),
        ("sd2", "cond_stage_model.model.", "clip-h"),
        ("sdxl", "conditioner.embedders.1.model.", "clip-g"),
    ],
)
def test_a_text_encoder_file_is_recognised_by_its_width(
    layout: str, prefix: str, variant: str | None
) -> None:
    specs = {n: s for n, s in read_layout(layout).items() if n.startswith(prefix)}

    found = [detect(specs), detect(renamed(specs, prefix, ""))]

    assert [(d.kind, d.variant) for d in found] == [("text_encoder", variant)] * 2


@pytest.mark.parametrize(
    ("shapes", "variant"),
    [
        ({"emb_params": (4, 768)}, "sd1"),
        ({"<token>": (1024,)}, "sd2"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "sdxl"),
    ],
)
def test_an_embedding_is_recognised(shapes: Shapes, variant: str | None) -> None:
    found = detect(specs_of(shapes))

    assert (found.kind, found.family, found.variant) == ("embedding", None, variant)


# --- prediction -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "markers", "metadata", "prediction"),
    [
        ("sd1", [], {}, "epsilon"),
        ("sd2", [], {}, None),
        ("sd2", [], {"modelspec.prediction_type": "v"}, "v"),
        ("sd2", [], {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v"),
        ("sd2", [], {"modelspec.prediction_type": "nonsense"}, None),
        ("sd2-inpainting", [], {}, "epsilon"),
        ("sd2-depth", [], {}, "epsilon"),
        ("sdxl", [], {}, "epsilon"),
        ("sdxl", ["v_pred", "ztsnr"], {}, "v"),
        ("sdxl", ["v_pred"], {"modelspec.prediction_type": "epsilon"}, "v"),
        ("sdxl", ["edm_mean", "edm_std"], {}, "edm"),
    ],
)
def test_the_prediction_is_told_only_where_something_tells_it(
    layout: str, markers: list[str], metadata: dict[str, str], prediction: str | None
) -> None:
    specs = {**read_layout(layout), **specs_of(dict.fromkeys(markers, (0,)))}

    assert detect(specs, metadata).prediction == prediction


# --- what tensors are called ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "counts"),
    [
        ("sd1", {"unet": 686, "text_encoder": 197, "vae": 248}),
        ("sd2-depth", {"unet": 686, "text_encoder": 294, "vae": 248, "depth": 368}),
        ("sdxl", {"unet": 1680, "text_encoder": 197, "text_encoder_2": 390, "vae": 248}),
        ("sdxl-refiner", {"unet": 1220, "text_encoder_2": 390, "vae": 248}),
    ],
)
def test_every_tensor_has_one_component(layout: str, counts: dict[str, int]) -> None:
    """The counts are those of the model toolkit's lists (UNET-v1-SD, CLIP-XL-SD, …)."""
    specs = read_layout(layout)
    family = family_of(detect(specs))

    assert Counter(map(family.component_of, specs)) == counts


@pytest.mark.parametrize("layout", LAYOUT_IDS)
@pytest.mark.parametrize("compat", ["", "supermerger", "mecha", "chattiori"])
def test_every_unet_tensor_has_a_block_and_every_block_a_tensor(layout: str, compat: str) -> None:
    specs = read_layout(layout)
    family = family_of(detect(specs))
    blocks = {name: family.block_of(name, compat) for name in specs}

    assert set(family.blocks) == set(blocks.values()) - {""}
    if compat != "chattiori":
        assert all(blocks[name] for name in specs if name.startswith(UNET))


def test_block_names_stand_in_order() -> None:
    counts = {family.id: len(family.blocks) for family in load_families().values() if family.blocks}

    expected = {"sd1": 26, "sd2": 26, "sdxl-refiner": 26, "sdxl": 20, "flux": 3 + 19 + 38 + 1}
    assert counts | expected == counts
    assert load_families()["sdxl"].blocks[:2] == ("BASE", "IN00")
    assert load_families()["sdxl"].blocks[9:12] == ("IN08", "M00", "OUT00")
    assert expand_blocks("A B08-B11") == ("A", "B08", "B09", "B10", "B11")


# tool, family, tensor, block: the table of what the tools do, from their sources
MBW_TABLE = [
    ("", "sd1", f"{UNET}time_embed.0.weight", "IN00"),
    ("", "sd1", f"{UNET}out.2.weight", "OUT11"),
    ("", "sd1", f"{UNET}input_blocks.0.0.weight", "IN00"),
    ("", "sd1", f"{UNET}input_blocks.1.1.proj_in.weight", "IN01"),
    ("", "sd1", f"{UNET}input_blocks.11.0.in_layers.0.weight", "IN11"),
    ("", "sd1", f"{UNET}middle_block.2.in_layers.0.weight", "M00"),
    ("", "sd1", f"{UNET}output_blocks.10.0.in_layers.0.weight", "OUT10"),
    ("", "sd1", "first_stage_model.decoder.conv_in.weight", "BASE"),
    ("", "sd1", "cond_stage_model.transformer.text_model.final_layer_norm.bias", "BASE"),
    ("", "sdxl", f"{UNET}time_embed.0.weight", "IN00"),
    ("", "sdxl", f"{UNET}label_emb.0.0.weight", "IN00"),
    ("", "sdxl", f"{UNET}out.0.bias", "OUT08"),
    ("", "sdxl", "conditioner.embedders.1.model.ln_final.bias", "BASE"),
    ("bbc-mc", "sd1", f"{UNET}time_embed.0.weight", "IN00"),
    ("bbc-mc", "sd1", f"{UNET}out.0.weight", "OUT11"),
    ("meh", "sd1", "first_stage_model.decoder.conv_in.weight", "BASE"),
    ("supermerger", "sdxl", f"{UNET}label_emb.0.0.weight", "IN00"),
    ("supermerger", "sdxl", f"{UNET}out.0.bias", "OUT08"),
    ("supermerger", "sdxl", "first_stage_model.decoder.conv_in.weight", "BASE"),
    ("mecha", "sd1", f"{UNET}time_embed.0.weight", "BASE"),
    ("mecha", "sd1", f"{UNET}out.0.weight", "OUT11"),
    ("mecha", "sd1", "first_stage_model.decoder.conv_in.weight", "BASE"),
    ("mecha", "sdxl", f"{UNET}label_emb.0.0.weight", "BASE"),
    ("mecha", "sdxl", "first_stage_model.decoder.conv_in.weight", ""),
    ("chattiori", "sd1", f"{UNET}time_embed.0.weight", "OUT11"),
    ("chattiori", "sd1", "first_stage_model.decoder.conv_in.weight", ""),
    ("chattiori", "sdxl", f"{UNET}time_embed.0.weight", ""),
    ("chattiori", "sdxl", f"{UNET}label_emb.0.0.weight", ""),
    ("chattiori", "sdxl", f"{UNET}out.0.weight", "OUT08"),
]


@pytest.mark.parametrize(("compat", "family", "tensor", "block"), MBW_TABLE)
def test_tensors_outside_the_blocks_go_where_each_tool_puts_them(
    compat: str, family: str, tensor: str, block: str
) -> None:
    assert load_families()[family].block_of(tensor, compat) == block


def test_an_unknown_block_mapping_is_an_error() -> None:
    with pytest.raises(InputError, match="sd1 has no block mapping 'supermerge'"):
        load_families()["sd1"].block_of("x", "supermerge")


def test_a_block_number_beyond_the_family_is_no_block() -> None:
    assert load_families()["sdxl"].block_of(f"{UNET}input_blocks.11.0.weight") == ""


def test_protected_tensors_are_buffers_and_markers() -> None:
    family = load_families()["sd1"]
    position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    yes = [position_ids, "betas", "alphas_cumprod_prev", "model_ema.decay", "v_pred", "ztsnr"]
    ema = "model_ema.diffusion_modelinput_blocks00weight"
    no = [*without(read_layout("sd1"), position_ids), "xbetas", "model.betas", ema]

    assert [name for name in yes if not family.is_protected(name)] == []
    assert [name for name in no if family.is_protected(name)] == []


def test_nai_names_become_the_usual_ones() -> None:
    specs = read_layout("sd1")
    nai = renamed(specs, "transformer.text_model.", "transformer.")
    family = load_families()["sd1"]

    assert nai.keys() != specs.keys()
    assert {family.canonical_name(name) for name in nai} == specs.keys()
    assert [name for name in specs if family.canonical_name(name) != name] == []
    assert {family.component_of(name) for name in nai} == {"unet", "text_encoder", "vae"}


@pytest.mark.parametrize(
    ("family", "variant", "prediction", "architecture", "resolution"),
    [
        ("sd1", None, None, "stable-diffusion-v1", "512x512"),
        ("sd1", "inpainting", None, "stable-diffusion-v1-inpainting", "512x512"),
        ("sd2", "base", None, "stable-diffusion-v2-512", "512x512"),
        ("sd2", "base", "v", "stable-diffusion-v2-768-v", "768x768"),
        ("sd2", "depth", None, "stable-diffusion-v2-depth", "512x512"),
        ("sdxl", "base", "v", "stable-diffusion-xl-v1-base", "1024x1024"),
        ("sdxl", "ip2p", None, "stable-diffusion-xl-v1-edit", "1024x1024"),
        ("sdxl-refiner", "base", None, "stable-diffusion-xl-v1-refiner", "1024x1024"),
    ],
)
def test_the_architecture_id_is_the_one_of_modelspec(
    family: str, variant: str | None, prediction: str | None, architecture: str, resolution: str
) -> None:
    known = load_families()[family]

    assert known.architecture(variant, prediction) == architecture
    assert known.resolution(variant, prediction) == resolution


def test_a_variant_the_family_lacks_is_an_error() -> None:
    with pytest.raises(InputError, match="sdxl has no variant 'depth'"):
        load_families()["sdxl"].architecture("depth")


@pytest.mark.parametrize("layout", LAYOUT_IDS)
def test_the_input_tensor_is_there(layout: str) -> None:
    specs = read_layout(layout)
    family = family_of(detect(specs))

    assert [name for name in family.input_tensors if name not in specs] == []
    assert family.input_tensors


def test_an_unknown_file_still_merges_by_names() -> None:
    family = family_of(detect(specs_of({"anything": (8, 8)})))

    assert family is UNKNOWN
    assert family.component_of("anything") == "other"
    assert family.block_of("anything") == ""
    assert family.canonical_name("anything") == "anything"
    assert family.architecture(None) == ""


# --- the data files -------------------------------------------------------------------------------


def write_family(folder: Path, text: str) -> Path:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return folder


def one_family(folder: Path, marks: str) -> Family:
    text = f"id: mine\ntitle: Mine\nkind: checkpoint\nmarks:\n{marks}"
    return read_families(write_family(folder, text))["mine"]


def test_every_shipped_family_says_what_it_is() -> None:
    families = load_families()

    assert len(families) >= 9
    for family_id, family in families.items():
        assert family.id == family_id
        assert family.title
        assert family.marks


def test_a_family_may_take_keys_from_another_file(tmp_path: Path) -> None:
    (tmp_path / "_base.yaml").write_text("kind: vae\nprotected: [a]\n", encoding="utf-8")
    text = "extends: _base\nid: mine\ntitle: Mine\nmarks: []\n"

    family = read_families(write_family(tmp_path, text))["mine"]

    assert (family.kind, family.protected) == ("vae", ("a",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "not a mapping"),
        ("id: [\n", "not YAML"),
        ("id: a\n", "kind"),
        ("id: a\ntitle: A\nkind: checkpt\nmarks: []\n", "did you mean 'checkpoint'"),
        ("id: a\ntitle: A\nkind: vae\nmark: []\nmarks: []\n", "unknown key 'mark'"),
        ("extends: b\nid: a\ntitle: A\nkind: vae\nmarks: []\n", "'b'"),
        ("id: a\ntitle: A\nkind: vae\nmarks: [{says: x}]\n", "a mark asks one of any, none"),
        ("id: a\ntitle: A\nkind: vae\nmarks: [{any: x, ndim: 4, says: x}]\n", "'ndim'"),
        ("id: a\ntitle: A\nkind: vae\nmarks: [{each: x, says: x}]\n", "needs `ndim`"),
        ("id: a\ntitle: A\nkind: vae\nmarks: [{any: x, at_least: y, says: x}]\n", "whole number"),
        ("id: a\ntitle: A\nkind: vae\nmarks: [x]\n", "a mapping is wanted, not 'x'"),
    ],
)
def test_a_data_file_that_breaks_the_language_is_an_error(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(InputError, match=r"mine\.yaml") as caught:
        read_families(write_family(tmp_path, text))

    assert message in str(caught.value)


def judge(folder: Path, mark: str, shapes: Shapes, monkeypatch: pytest.MonkeyPatch) -> str:
    """Why the mark does not hold for these tensors; empty where it does."""
    first = '  - {any: "*", says: tensors}\n'
    family = one_family(folder, f"{first}  - {mark}\n")
    monkeypatch.setattr("ckptools.family.load_families", lambda: {"mine": family})
    found = detect(specs_of(shapes))
    return found.rejected[0].reason if found.rejected else ""


@pytest.mark.parametrize(
    ("mark", "shapes", "reason"),
    [
        ("{any: a.*, says: an a}", {"a.b": ()}, ""),
        ("{any: a.*, says: an a}", {"ab": ()}, "lacks an a"),
        ("{any: [x, a.*.c], says: an a}", {"a.b.c": ()}, ""),
        ("{any: a*a, says: an a}", {"a": ()}, "lacks an a"),
        ("{any: a*b*c, says: an a}", {"axbxc": ()}, ""),
        ("{any: a*b*c, says: an a}", {"acxc": ()}, "lacks an a"),
        ('{any: "*b*", says: a b}', {"abc": ()}, ""),
        ('{any: "*", at_most: 1, says: "{} tensors"}', {"a": (), "b": ()},
         "has 2 tensors; mine has at most 1"),
        ('{any: a, at_least: 2, says: "{} tensors"}', {"a": ()},
         "has 1 tensors; mine has at least 2"),
        ("{none: a, says: an a}", {"a": ()}, "has an a; mine has none"),
        ("{none: a, says: an a}", {"b": ()}, ""),
        ("{each: a*, ndim: 2, says: 'a has {} dims'}", {"a": (1, 1), "ab": (2, 2)}, ""),
        ("{each: a*, ndim: 2, says: 'a has {} dims'}", {"a": (1, 1), "ab": (2,)},
         "a has 1, 2 dims; mine has 2"),
        ("{each: a*, ndim: 2, says: 'a has {} dims'}", {"b": ()}, "lacks a"),
        ("{each: a, dim: 1, size: [4, 9], says: 'a takes {}'}", {"a": (1, 9)}, ""),
        ("{each: a, dim: 1, size: [4, 9], says: 'a takes {}'}", {"a": (1, 5)},
         "a takes 5; mine takes 4 or 9"),
        ("{each: a, dim: 1, size: 4, says: 'a takes {}'}", {"a": ()}, "a takes 0; mine takes 4"),
        ("{each: a, dim: 1, width_of: [b, c], says: 'a takes {}'}",
         {"a": (1, 5), "b": (2,), "c": (7, 3)}, ""),
        ("{each: a, dim: 1, width_of: [b, c], says: 'a takes {}'}",
         {"a": (1, 6), "b": (2,), "c": (7, 3)}, "a takes 6; mine takes 5"),
        ("{each: a, dim: 1, size: 9, width_of: [b], says: 'a takes {}'}",
         {"a": (1, 6), "b": ()}, "a takes 6; mine takes 9"),
        ("{numbered: a.#., count: 3, says: 'a has {} parts'}", {"a.2.x": (), "a.10": ()}, ""),
        ("{numbered: a.#., count: 3, says: 'a has {} parts'}", {"a.10.x": ()},
         "a has 11 parts; mine has 3"),
        ("{most: [a*], says: a's}", {"a": (), "b": ()},
         "1 of 2 tensors are a's; mine has more than half"),
        ("{most: [a*], says: a's}", {"a": (), "ab": (), "b": ()}, ""),
    ],
)  # fmt: skip
def test_a_mark_asks_one_thing_and_says_why_it_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mark: str,
    shapes: Shapes,
    reason: str,
) -> None:
    assert judge(tmp_path, mark, shapes, monkeypatch) == reason


# --- cost -----------------------------------------------------------------------------------------


def test_importing_the_module_reads_no_family_and_no_yaml() -> None:
    code = "import sys, ckptools.family; print('yaml' in sys.modules, 'torch' in sys.modules)"

    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout

    assert shown.split() == ["False", "False"]
