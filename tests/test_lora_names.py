"""Names of modules in adapters: every module, under every scheme, is found, and only once.

The names come from the other side: from the modules that diffusers and transformers build
(`tests/layouts-diffusers`), and from the checkpoint's own names, by the rules of the trainers.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import diffusers_models
import pytest
from calls import calls_of
from diffusers_models import Row
from models import Specs, layout, shrunk

from ckptools.family import Family, load_families
from ckptools.keymap import key_map, read_key_map
from ckptools.lora import split_key
from ckptools.lora.names import Fit, NameMap, Target, fitting_families, targets
from ckptools.tensors import TensorSpec

# Tensor names and shapes of the example adapters in github.com/cloneofsimo/lora (Apache-2.0).
ADAPTERS = Path(__file__).parent / "adapters"
UNET = "model.diffusion_model."
FAMILIES = diffusers_models.FAMILIES
LAYER_KINDS = {"Linear", "Conv2d", "LayerNorm", "GroupNorm", "RMSNorm", "T5LayerNorm", "Embedding"}

Rule = Callable[[str], str]


def family_of(family: str) -> Family:
    return load_families().get(family) or Family(id=family, title=family, kind="checkpoint")


def name_map(family: str, specs: Specs | None = None) -> NameMap:
    return _name_map(family) if specs is None else targets(family_of(family), specs)


@cache
def _name_map(family: str) -> NameMap:
    return targets(family_of(family), layout_of(family))


@cache
def layout_of(family: str) -> Specs:
    return layout(family)


@cache
def layers(family: str, component: str) -> list[Row]:
    """The layers of a component that have a weight, as the libraries walk over them."""
    return [
        row
        for row in diffusers_models.listed(family)
        if row.component == component and row.kind in LAYER_KINDS and row.name.endswith(".weight")
    ]


def joined(prefix: str) -> Rule:
    """The rule of kohya's trainer and its kin: "_" for "."."""
    return lambda module: prefix + module.replace(".", "_")


def dotted(prefix: str) -> Rule:
    return lambda module: prefix + module


def peft(key: str) -> Rule:
    """The rule of PEFT's or diffusers' files, read by `split_key`: "{}" is the module."""

    def read(module: str) -> str:
        found = split_key(key.format(module))
        assert found is not None, key.format(module)
        return found[0]

    return read


def without_text_model(rule: Rule) -> Rule:
    """transformers 5 names a text encoder without projection so."""
    return lambda module: rule(module.removeprefix("text_model."))


UNET_RULES = {
    "kohya": joined("lora_unet_"),
    "kohya-oft": joined("oft_unet_"),
    "lycoris": joined("lycoris_"),
    "peft": peft("unet.{}.lora_A.weight"),
    "peft-adapter": peft("unet.{}.lora_B.default.weight"),
    "peft-base-model": peft("base_model.model.{}.lora_A.weight"),
    "peft-unet-base-model": peft("unet.base_model.model.{}.lora_A.default_0.weight"),
    "bare": peft("{}.lora.down.weight"),
    "old-conv": peft("unet.{}.lora.up.weight"),
    "dora": peft("unet.{}.lora_magnitude_vector.weight"),
}
TRANSFORMER_RULES = {
    "onetrainer": joined("lora_transformer_"),
    "kohya": joined("lora_unet_"),
    "lycoris": joined("lycoris_"),
    "peft": peft("transformer.{}.lora_A.weight"),
    "peft-base-model": peft("base_model.model.{}.lora_B.weight"),
    "bare": peft("{}.lora_B.weight"),
}


def text_rules(kohya: str, folder: str, *, is_only: bool, inner: str) -> dict[str, Rule]:
    rules = {
        "kohya": joined(kohya),
        "peft": peft(f"{folder}.{{}}.lora_A.weight"),
        "peft-base-model": peft(f"{folder}.base_model.model.{{}}.lora_A.default.weight"),
        "old-diffusers": peft(f"{folder}.{{}}.lora_linear_layer.up.weight"),
        "comfyui": peft(f"text_encoders.{inner}.transformer.{{}}.lora_up.weight"),
        "onetrainer": dotted(f"{inner.replace('t5xxl', 't5')}."),
        "peft-v5": without_text_model(peft(f"{folder}.{{}}.lora_A.weight")),
        "kohya-v5": without_text_model(joined(kohya)),
    }
    if is_only:
        rules["bare"] = peft("base_model.model.{}.lora_A.weight")
    return rules


RULES: dict[tuple[str, str], dict[str, Rule]] = {
    ("sd1", "unet"): UNET_RULES,
    ("sd1", "text_encoder"): {
        **text_rules("lora_te_", "text_encoder", is_only=True, inner="clip_l"),
        "lycoris": joined("lycoris_"),
    },
    ("sd2", "unet"): UNET_RULES,
    ("sd2", "text_encoder"): text_rules("lora_te_", "text_encoder", is_only=True, inner="clip_h"),
    ("sdxl", "unet"): UNET_RULES,
    ("sdxl", "text_encoder"): text_rules(
        "lora_te1_", "text_encoder", is_only=False, inner="clip_l"
    ),
    ("sdxl", "text_encoder_2"): text_rules(
        "lora_te2_", "text_encoder_2", is_only=False, inner="clip_g"
    ),
    ("sdxl-refiner", "unet"): UNET_RULES,
    ("sdxl-refiner", "text_encoder_2"): text_rules(
        "lora_te2_", "text_encoder_2", is_only=True, inner="clip_g"
    ),
    ("sd3", "transformer"): TRANSFORMER_RULES,
    ("sd3", "text_encoder"): text_rules("lora_te1_", "text_encoder", is_only=False, inner="clip_l"),
    ("sd3", "text_encoder_2"): text_rules(
        "lora_te2_", "text_encoder_2", is_only=False, inner="clip_g"
    ),
    ("sd3", "text_encoder_3"): text_rules(
        "lora_te3_", "text_encoder_3", is_only=False, inner="t5xxl"
    ),
    ("flux", "transformer"): TRANSFORMER_RULES,
    ("flux", "text_encoder"): text_rules(
        "lora_te1_", "text_encoder", is_only=False, inner="clip_l"
    ),
    ("flux", "text_encoder_2"): {
        **text_rules("lora_te3_", "text_encoder_2", is_only=False, inner="t5xxl"),
        "onetrainer-flux": joined("lora_te2_"),
    },
    **{(family, "vae"): {"diffusers": dotted("vae.")} for family in FAMILIES},
}
CASES = [(*key, scheme) for key, rules in RULES.items() for scheme in rules]


def ranges_of_tensors(specs: Iterable[TensorSpec]) -> dict[str, list[tuple[int, int]]]:
    return {spec.name: [(0, spec.shape[0])] for spec in specs}


def ranges_of_targets(found: Iterable[Target], specs: Specs) -> dict[str, list[tuple[int, int]]]:
    """Tensor → the rows that targets take; neighbours are joined, rows taken twice stay apart."""
    taken: dict[str, list[tuple[int, int]]] = {}
    for target in found:
        rows = target.rows or (0, specs[target.tensor].shape[0])
        taken.setdefault(target.tensor, []).append(rows)
    for ranges in taken.values():
        ranges.sort()
        while len(ranges) > 1 and ranges[0][1] == ranges[1][0]:
            ranges[:2] = [(ranges[0][0], ranges[1][1])]
    return taken


def component_weights(family: str, component: str, specs: Specs) -> list[TensorSpec]:
    """The checkpoint's tensors that hold the weights of layers, from their own names and shapes."""
    keys = key_map(family)
    ends = (".weight", "_weight", ".scale", "positional_embedding", "text_projection")
    # parameters that are no layer's: a buffer of positions, OpenCLIP's last layer, which never runs
    left_out = ("diffusion_model.pos_embed", "resblocks.23.") if family in ("sd2", "sd3") else ()
    found = []
    for spec in specs.values():
        split = keys.split(spec.name)
        if split is None or split[0].id != component or not spec.name.endswith(ends):
            continue
        if not any(words in spec.name for words in left_out) and keys.pieces(spec):
            found.append(spec)
    return found


# --- coverage -----------------------------------------------------------------------------------


def test_every_component_with_layers_is_covered_by_rules() -> None:
    components = {(f, row.component) for f in FAMILIES for row in diffusers_models.listed(f)}

    assert components == set(RULES)


@pytest.mark.parametrize(("family", "component", "scheme"), CASES)
def test_every_module_is_found_once_and_every_row_is_reached(
    family: str, component: str, scheme: str
) -> None:
    specs = layout_of(family)
    names = name_map(family)
    rows = layers(family, component)
    rule = RULES[family, component][scheme]

    found = {row.module: names.find(rule(row.module)) for row in rows}

    assert len({rule(row.module) for row in rows}) == len(rows) > 30
    assert [module for module, each in found.items() if not each] == []
    assert {row.module: row.shape for row in rows} == {
        module: each[0].shape for module, each in found.items()
    }
    reached = ranges_of_targets((t for each in found.values() for t in each), specs)
    assert reached == ranges_of_tensors(component_weights(family, component, specs))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_is_where_diffusers_converter_takes_it_from(family: str) -> None:
    specs = layout_of(family)
    names = name_map(family).names("diffusers")
    expected: dict[str, list[tuple[object, ...]]] = {}
    for spec in specs.values():
        for piece in key_map(family).pieces(spec) or ():  # held against the converter elsewhere
            place = (spec.name, piece.rows, piece.part, piece.op)
            expected.setdefault(f"{piece.component}.{piece.name}", []).append(place)

    assert len(names) > 500
    for name, found in names.items():
        places = [(t.tensor, t.rows, t.part, t.op) for t in found]
        assert places == expected[f"{name}.weight"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_is_found_with_its_module(family: str) -> None:
    specs = layout_of(family)
    names = name_map(family).names("diffusers")
    listed = {f"{row.component}.{row.name}": row.shape for row in diffusers_models.listed(family)}

    with_bias = {name for name, found in names.items() if found[0].bias}

    assert with_bias == {name for name in names if f"{name}.bias" in listed}
    for name in with_bias:
        sizes = [t.rows[1] - t.rows[0] if t.rows else specs[t.bias].shape[0] for t in names[name]]
        assert (sum(sizes),) == listed[f"{name}.bias"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["kohya-original", "full", "comfyui", "onetrainer"])
def test_every_module_is_found_under_the_checkpoints_own_names(family: str, scheme: str) -> None:
    specs = layout_of(family)
    names = name_map(family)
    main = "transformer" if family in ("sd3", "flux") else "unet"
    rule = {
        "kohya-original": joined("lora_unet_"),
        "full": peft(UNET + "{}.lora_up.weight"),
        "comfyui": peft("diffusion_model.{}.lora_up.weight"),
        "onetrainer": dotted(f"{main}."),
    }[scheme]
    weights = [s for s in specs.values() if s.name.startswith(UNET) and len(s.shape) > 1]
    modules = {
        s.name: s.name.removeprefix(UNET).removesuffix(".weight")
        for s in weights
        if s.name.endswith(".weight")
    }

    found = {name: names.find(rule(module)) for name, module in modules.items()}

    assert len(modules) > 100
    for name, each in found.items():
        assert [(t.tensor, t.rows, t.op, t.shape) for t in each] == [
            (name, None, "none", specs[name].shape)
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_text_encoder_tensor_is_found_under_its_full_name(family: str) -> None:
    specs = layout_of(family)
    names = name_map(family)
    tensors = [
        name
        for name in specs
        if name.startswith(("cond_stage_model.", "conditioner.", "text_encoders."))
        and name.endswith((".weight", "in_proj_weight", "text_projection", "positional_embedding"))
    ]

    found = {
        name: names.find(name.removesuffix(".weight").removesuffix("_weight")) for name in tensors
    }

    assert len(tensors) > 70
    for name, each in found.items():
        assert [(t.tensor, t.rows, t.op) for t in each] == [(name, None, "none")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["kohya", "diffusers", "original"])
def test_names_that_are_written_are_read_again(family: str, scheme: str) -> None:
    names = name_map(family)

    written = names.names(scheme)  # type: ignore[arg-type]  # pytest hands out str

    assert len(written) > 400
    assert {name: names.find(name) for name in written} == written


def test_no_two_components_claim_a_name() -> None:
    for family in FAMILIES:
        names = name_map(family)
        for scheme in ("kohya", "diffusers", "original"):
            for name in names.names(scheme):
                assert len(names.components_of(name)) == 1


# --- single cases -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
            f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_out.0.weight",
        ),
        (
            "down_blocks.0.attentions.1.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
            f"{UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
        ),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.to_v_lora.up.weight",
            "cond_stage_model.transformer.text_model.encoder.layers.3.self_attn.v_proj.weight",
        ),
        (
            "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_q.down",
            f"{UNET}output_blocks.11.1.transformer_blocks.0.attn1.to_q.weight",
        ),
    ],
)
def test_old_diffusers_names_are_found(key: str, tensor: str) -> None:
    found = split_key(key)

    assert found is not None
    assert [target.tensor for target in name_map("sd1").find(found[0])] == [tensor]


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("sd1", "output_blocks.2.1.conv"),
        ("sd2", "output_blocks.2.1.conv"),
        ("sdxl", "output_blocks.2.2.conv"),
        ("sdxl-refiner", "output_blocks.2.1.conv"),
    ],
)
def test_the_first_upsampler_is_behind_the_attention_if_there_is_one(
    family: str, tensor: str
) -> None:
    found = name_map(family).find("lora_unet_up_blocks_0_upsamplers_0_conv")

    assert [target.tensor for target in found] == [f"{UNET}{tensor}.weight"]


def test_fused_rows_take_query_key_and_value_each_on_its_own() -> None:
    names = name_map("sdxl")
    layer = "lora_te2_text_model_encoder_layers_31_self_attn_"

    rows = [names.find(f"{layer}{letter}_proj")[0].rows for letter in "qkv"]

    assert rows == [(0, 1280), (1280, 2560), (2560, 3840)]


def test_the_text_projection_is_transposed_under_hf_names_only() -> None:
    names = name_map("sdxl")

    hf = names.find("lora_te2_text_projection")
    own = names.find("conditioner.embedders.1.model.text_projection")

    assert [(t.tensor, t.op) for t in hf] == [
        ("conditioner.embedders.1.model.text_projection", "transpose")
    ]
    assert [(t.tensor, t.op) for t in own] == [(hf[0].tensor, "none")]


def test_halves_that_diffusers_swaps_are_two_targets() -> None:
    found = name_map("flux").find("transformer.norm_out.linear")

    assert [(t.rows, t.part, t.shape) for t in found] == [
        ((0, 3072), (3072, 6144), (6144, 3072)),
        ((3072, 6144), (0, 3072), (6144, 3072)),
    ]


@pytest.mark.parametrize("module", ["", "unet", "lora_unet_", "lora_unet_mid_block_1", "unet:144"])
def test_a_name_of_no_module_is_not_found(module: str) -> None:
    names = name_map("sd1")

    assert names.find(module) == ()
    assert names.components_of(module) == ()


@pytest.mark.parametrize(
    "module",
    [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ],
)
def test_a_text_encoder_is_not_taken_for_the_other(module: str) -> None:
    found = name_map("sdxl").find(module)

    assert [target.component for target in found] == ["text_encoder"]


def test_a_bare_name_that_two_text_encoders_share_is_not_guessed() -> None:
    assert name_map("sdxl").find("text_model.encoder.layers.0.mlp.fc1") == ()


def test_a_name_that_two_components_claim_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "twins.yaml").write_text(
        """
adapters: {plain: {dotted: [either.]}}
components:
  one: {prefix: one., names: {a: a, b: b}, adapters: plain}
  two: {prefix: two., names: {a: a}, adapters: plain}
""",
        encoding="utf-8",
    )
    specs = {
        n: TensorSpec(n, "F16", (4, 4)) for n in ("one.a.weight", "one.b.weight", "two.a.weight")
    }

    names = NameMap(family_of("twins"), specs, read_key_map(tmp_path, "twins"))

    assert (names.find("either.a"), names.components_of("either.a")) == ((), ("one", "two"))
    assert [target.tensor for target in names.find("either.b")] == ["one.b.weight"]


def test_a_checkpoint_without_a_module_does_not_have_its_name() -> None:
    specs = {n: s for n, s in layout("sd1").items() if "middle_block" not in n}

    assert name_map("sd1", specs).find("lora_unet_mid_block_resnets_0_conv1") == ()


def test_novelais_names_lead_to_its_own_tensors() -> None:
    specs = {
        n.replace(".text_model.", "."): TensorSpec(n.replace(".text_model.", "."), "F16", s.shape)
        for n, s in layout("sd1").items()
    }

    found = name_map("sd1", specs).find("lora_te_text_model_encoder_layers_0_mlp_fc1")

    assert [t.tensor for t in found] == [
        "cond_stage_model.transformer.encoder.layers.0.mlp.fc1.weight"
    ]


def test_integers_are_no_targets() -> None:
    spec = TensorSpec(f"{UNET}out.2.weight", "I64", (4, 320, 3, 3))

    assert name_map("sd1", {spec.name: spec}).find("lora_unet_conv_out") == ()


# --- input channels -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family", "channels"),
    [("sd1-inpainting", "sd1", 9), ("sd1-ip2p", "sd1", 8), ("sd2-depth", "sd2", 5)],
)
def test_a_four_channel_change_goes_to_the_first_four(
    name: str, family: str, channels: int
) -> None:
    (target,) = name_map(family, layout(name)).find("lora_unet_conv_in")

    assert target.shape == (320, channels, 3, 3)
    assert target.shape_for(36) == (320, 4, 3, 3)
    assert target.index((320, 4, 3, 3)) == (slice(None), slice(0, 4))
    assert target.shape_for(9 * channels) == target.shape_for(None) == target.shape
    assert target.index(target.shape) == (slice(None),)


def test_columns_that_are_no_channels_change_nothing() -> None:
    (target,) = name_map("sd1", layout("sd1-inpainting")).find("lora_unet_input_blocks_0_0")

    assert target.shape_for(35) == target.shape_for(90) == target.shape


def test_other_modules_take_no_fewer_inputs() -> None:
    (target,) = name_map("sd1").find("lora_unet_down_blocks_0_resnets_0_conv1")

    assert target.shape_for(36) == target.shape
    assert not target.takes_fewer_inputs


def test_the_rows_of_a_fused_target_are_its_index() -> None:
    (target,) = name_map("sd2").find("lora_te_text_model_encoder_layers_0_self_attn_k_proj")

    assert target.index(target.shape) == (slice(1024, 2048),)


# --- the layout that counts ---------------------------------------------------------------------


def counted(family: str, component: str) -> list[str]:
    """The linear layers that cloneofsimo/lora's walk over diffusers 0.9 met, in its order."""
    walk = [row.module for row in layers(family, component) if row.kind == "Linear"]
    if component == "text_encoder":
        return [module for module in walk if ".self_attn." in module]
    blocks = dict.fromkeys(m.partition(".attn1.")[0] for m in walk if ".attn1." in m)
    within = [
        *(f"attn1.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj",
        *(f"attn2.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    ]
    return [f"{block}.{module}" for block in blocks for module in within]


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize(("component", "count"), [("unet", 144), ("text_encoder", 48)])
def test_numbers_count_as_the_walk_over_diffusers_does(
    family: str, component: str, count: int
) -> None:
    names = name_map(family)
    modules = counted(family, component)
    count = 92 if (family, component) == ("sd2", "text_encoder") else count

    found = [names.find(f"{component}:{number}") for number in range(count)]

    assert [each[0].module for each in found] == modules
    assert names.find(f"{component}:{count}") == ()


@pytest.mark.parametrize("adapter", ["cloneofsimo-analog", "cloneofsimo-disney"])
def test_a_real_adapter_matches_whole(adapter: str) -> None:
    names = name_map("sd1")
    text = gzip.decompress((ADAPTERS / f"{adapter}.txt.gz").read_bytes()).decode()
    tensors = dict(line.split("\t") for line in text.splitlines())
    parts = {key: split_key(key) for key in tensors}

    modules: dict[str, dict[str, list[int]]] = {}
    for key, found in parts.items():
        assert found is not None, key
        if found[1] != "embedding":
            shape = list(map(int, tensors[key].split(",")))
            modules.setdefault(found[0], {})[found[1]] = shape

    assert len(modules) == 144 + 48
    for module, shapes in modules.items():
        (target,) = names.find(module)
        assert (shapes["up"][0], shapes["down"][1]) == target.shape


# --- which family an adapter fits ---------------------------------------------------------------


def widths(family: str, rule: Rule, component: str) -> dict[str, int | None]:
    rows = [row for row in layers(family, component) if len(row.shape) > 1]
    return {rule(row.module): row.shape[1] for row in rows}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", ["lora_unet_", "unet.", "transformer."])
def test_an_adapter_of_the_main_model_fits_its_family_alone(family: str, prefix: str) -> None:
    main = "transformer" if family in ("sd3", "flux") else "unet"
    rule = dotted(prefix) if prefix.endswith(".") else joined(prefix)

    fits = fitting_families(widths(family, rule, main))

    assert [fit.family for fit in fits] == [family]
    assert "takes" in fits[0].reason


@pytest.mark.parametrize(
    ("modules", "families"),
    [
        ({"lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q": None}, ["sdxl"]),
        ({"lora_unet_double_blocks_0_img_attn_qkv": None}, ["flux"]),
        ({"lora_unet_joint_blocks_0_x_block_attn_qkv": None}, ["sd3"]),
        ({"unet:6": 768, "unet:4": 320}, ["sd1"]),
        ({"unet:6": 1024}, ["sd2"]),
        ({"lora_te_text_model_encoder_layers_0_self_attn_q_proj": 768}, ["sd1"]),
        ({"lora_te_text_model_encoder_layers_0_self_attn_q_proj": 1024}, ["sd2"]),
        ({"lora_te2_text_model_encoder_layers_0_self_attn_q_proj": 1280}, ["sd3", "sdxl"]),
        ({"lora_unet_mid_block_resnets_0_conv1": 1280}, []),
        ({}, []),
    ],
)
def test_few_names_may_be_enough(modules: dict[str, int | None], families: list[str]) -> None:
    assert [fit.family for fit in fitting_families(modules)] == families


def test_the_reason_says_what_was_found() -> None:
    module = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"

    assert fitting_families({module: 2048}) == (Fit("sdxl", "cross-attention takes 2048"),)


# --- cost ---------------------------------------------------------------------------------------


def test_the_names_of_sdxl_take_a_few_calls_for_each_tensor() -> None:
    specs = layout("sdxl")
    key_map("sdxl")

    def find() -> None:
        names = name_map("sdxl", specs)
        for module in ("lora_unet_out_2", "lora_te2_text_projection", "unet.conv_in"):
            assert names.find(module)

    assert len(specs) < calls_of(find) < 300 * len(specs)


def test_a_narrow_relative_has_the_same_names() -> None:
    wide, narrow = name_map("sd1"), name_map("sd1", shrunk("sd1"))

    assert sorted(narrow.names("kohya")) == sorted(wide.names("kohya"))
