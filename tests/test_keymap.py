"""Key maps: every tensor of a public checkpoint is what diffusers and transformers call it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import diffusers_models
import pytest
import torch
from models import Specs, layout, shrunk
from torch import Tensor

from ckptools.errors import InputError
from ckptools.keymap import Piece, diffusers_name, key_map, key_map_ids, read_key_map
from ckptools.tensors import TensorSpec

LAYOUTS = [
    ("sd1", "sd1"),
    ("sd1-inpainting", "sd1"),
    ("sd1-ip2p", "sd1"),
    ("sd2", "sd2"),
    ("sd2-inpainting", "sd2"),
    ("sd2-depth", "sd2"),
    ("sdxl", "sdxl"),
    ("sdxl-refiner", "sdxl-refiner"),
    ("sd3", "sd3"),
    ("flux", "flux"),
]
IDS = [row[0] for row in LAYOUTS]
UNET = "model.diffusion_model."
# What a checkpoint holds and no diffusers folder does, by the last words of its name.
WITHOUT_COUNTERPART = {
    "sd1": {"position_ids": 1},
    # OpenCLIP's last layer: 12 tensors
    "sd2": {"logit_scale": 1, "text_projection": 1, "resblocks.23": 12},
    "sdxl": {"position_ids": 1, "logit_scale": 1},
    "sdxl-refiner": {"logit_scale": 1},
    "sd3": {"logit_scale": 3},
    "flux": {},
}
# Of no component: MiDaS, the schedule of the sampler.
UNKNOWN = ("depth_model.", "model.model_sampling.")


def folders_of(family: str, specs: Specs) -> dict[str, Specs]:
    """The diffusers folder that the pieces of `specs` make up."""
    folders: dict[str, Specs] = {}
    for spec in specs.values():
        for piece in key_map(family).pieces(spec) or ():
            tensors = folders.setdefault(piece.component, {})
            shape = piece.shape
            if piece.name in tensors:  # another part of the same tensor
                assert piece.part is not None
                shape = (tensors[piece.name].shape[0] + shape[0], *shape[1:])
            tensors[piece.name] = TensorSpec(piece.name, spec.dtype, shape)
    return folders


def listed_folders(family: str, checkpoint: Specs) -> dict[str, dict[str, tuple[int, ...]]]:
    """The published folder; its first convolution takes as many channels as the checkpoint's."""
    folders: dict[str, dict[str, tuple[int, ...]]] = {}
    for row in diffusers_models.listed(family):
        shape = row.shape
        if (row.component, row.name) == ("unet", "conv_in.weight"):
            shape = checkpoint[f"{UNET}input_blocks.0.0.weight"].shape
        folders.setdefault(row.component, {})[row.name] = shape
    return folders


# --- against diffusers --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "family"), LAYOUTS, ids=IDS)
def test_names_and_shapes_are_those_of_the_published_folder(name: str, family: str) -> None:
    specs = layout(name)
    expected = listed_folders(family, specs)

    found = folders_of(family, specs)

    assert {c: {n: s.shape for n, s in tensors.items()} for c, tensors in found.items()} == expected


@pytest.mark.parametrize("family", diffusers_models.FAMILIES)
def test_the_kept_lists_are_what_the_libraries_build(family: str) -> None:
    pytest.importorskip("diffusers", reason="diffusers builds the models: pip install .[render]")
    pytest.importorskip("transformers", reason="transformers builds them: pip install .[render]")

    assert diffusers_models.built(family) == diffusers_models.listed(family)


@pytest.mark.parametrize(("name", "family"), LAYOUTS, ids=IDS)
def test_what_has_no_counterpart_is_known_and_nothing_else_is_left_out(
    name: str, family: str
) -> None:
    specs = layout(name)
    pieces = {tensor: key_map(family).pieces(spec) for tensor, spec in specs.items()}

    dropped = [tensor for tensor, each in pieces.items() if each == ()]
    unknown = [tensor for tensor, each in pieces.items() if each is None]

    expected = WITHOUT_COUNTERPART[family]
    assert {words: sum(words in tensor for tensor in dropped) for words in expected} == expected
    assert len(dropped) == sum(expected.values())
    assert all(tensor.startswith(UNKNOWN) for tensor in unknown)


def tagged(specs: Specs) -> dict[str, Tensor]:
    """A tensor per spec whose every row holds a number of its own; takes no memory to speak of."""
    tensors = {}
    for number, (name, spec) in enumerate(sorted(specs.items()), 1):
        rows = spec.shape[0] if spec.shape else 1
        values = number * 1e6 + torch.arange(rows, dtype=torch.float64)
        if spec.shape:
            values = values.reshape(-1, *[1] * (len(spec.shape) - 1)).expand(spec.shape)
        tensors[name] = values
    return tensors


def one_column(spec: TensorSpec) -> TensorSpec:
    """The same rows; Flux's converter copies what it splits, 24 GB of it at full width."""
    return TensorSpec(spec.name, spec.dtype, (*spec.shape[:1], *[1] * (len(spec.shape) - 1)))


def assembled(family: str, specs: Specs, component: str) -> dict[str, Tensor]:
    """The component as our pieces make it."""
    values = tagged(specs)
    parts: dict[str, list[tuple[Piece, Tensor]]] = {}
    for spec in specs.values():
        for piece in key_map(family).pieces(spec) or ():
            if piece.component == component:
                tensor = values[spec.name]
                if piece.rows:
                    tensor = tensor[slice(*piece.rows)]
                if piece.op == "transpose":
                    tensor = tensor.T
                elif piece.op == "reshape":
                    tensor = tensor[:, :, 0, 0]
                assert tensor.shape == piece.shape
                parts.setdefault(piece.name, []).append((piece, tensor))
    return {
        name: each[0][1]
        if len(each) == 1
        else torch.cat([t for _, t in sorted(each, key=lambda pair: pair[0].part or (0, 0))])
        for name, each in parts.items()
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.shape == other.shape, name
        assert torch.equal(tensor[..., :1], other[..., :1]), name  # all columns of a row are equal


def their_unet(family: str, specs: Specs) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = {
        "layers_per_block": 2,
        "down_block_types": [None] * (3 if family == "sdxl" else 4),
        "up_block_types": [None] * (3 if family == "sdxl" else 4),
        "addition_embed_type": "text_time" if "sdxl" in family else None,
        "class_embed_type": None,
    }
    unet = {name: value for name, value in tagged(specs).items() if name.startswith(UNET)}
    return convert_ldm_unet_checkpoint(unet, config)


@pytest.mark.parametrize(("name", "family"), LAYOUTS[:8], ids=IDS[:8])
def test_every_unet_row_goes_where_diffusers_own_converter_puts_it(name: str, family: str) -> None:
    pytest.importorskip("diffusers", reason="diffusers converts them: pip install .[render]")
    specs = layout(name)

    assert_same(assembled(family, specs, "unet"), their_unet(family, specs))


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux"])
def test_every_vae_row_goes_where_diffusers_own_converter_puts_it(family: str) -> None:
    pytest.importorskip("diffusers", reason="diffusers converts them: pip install .[render]")
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    specs = layout(family)
    vae = {n: v for n, v in tagged(specs).items() if n.startswith(("first_stage_model.", "vae."))}
    config = {"down_block_types": [None] * 4, "up_block_types": [None] * 4}

    assert_same(assembled(family, specs, "vae"), convert_ldm_vae_checkpoint(vae, config))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_every_transformer_row_goes_where_diffusers_own_converter_puts_it(family: str) -> None:
    pytest.importorskip("diffusers", reason="diffusers converts them: pip install .[render]")
    from diffusers.loaders import single_file_utils

    specs = {name: one_column(spec) for name, spec in layout(family).items()}
    convert = getattr(single_file_utils, f"convert_{family}_transformer_checkpoint_to_diffusers")
    checkpoint = {name: v for name, v in tagged(specs).items() if name.startswith(UNET)}

    assert_same(assembled(family, specs, "transformer"), convert(checkpoint))


@pytest.mark.parametrize(
    ("family", "component", "prefix"),
    [
        ("sd2", "text_encoder", "cond_stage_model.model."),
        ("sdxl", "text_encoder_2", "conditioner.embedders.1.model."),
        ("sdxl-refiner", "text_encoder_2", "conditioner.embedders.0.model."),
    ],
)
def test_openclip_rows_are_query_key_and_value_and_its_projection_is_transposed(
    family: str, component: str, prefix: str
) -> None:
    specs = layout(family)
    values = tagged(specs)
    layer = "text_model.encoder.layers.7."
    fused = values[f"{prefix}transformer.resblocks.7.attn.in_proj_weight"]
    width = fused.shape[1]

    ours = assembled(family, specs, component)

    for index, name in enumerate(["q_proj", "k_proj", "v_proj"]):
        rows = fused[index * width : (index + 1) * width]
        assert torch.equal(ours[f"{layer}self_attn.{name}.weight"][:, 0], rows[:, 0])
    assert torch.equal(
        ours[f"{layer}mlp.fc1.bias"], values[f"{prefix}transformer.resblocks.7.mlp.c_fc.bias"]
    )
    if family != "sd2":
        projection = ours["text_projection.weight"]
        assert torch.equal(projection[0], values[f"{prefix}text_projection"][:, 0])


# --- back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "family"), LAYOUTS, ids=IDS)
def test_the_way_back_gives_the_checkpoint_again(name: str, family: str) -> None:
    specs = layout(name)
    kept = {tensor: spec for tensor, spec in specs.items() if key_map(family).pieces(spec)}

    assert key_map(family).checkpoint_specs(folders_of(family, specs)) == kept


def test_an_unknown_component_is_refused_on_the_way_back() -> None:
    with pytest.raises(InputError, match="no component 'unett'") as caught:
        key_map("sd1").checkpoint_specs({"unett": {}})

    assert caught.value.fix == "did you mean 'unet'?"


def test_an_unknown_tensor_is_refused_on_the_way_back() -> None:
    spec = TensorSpec("conv_middle.weight", "F16", (1, 1))

    with pytest.raises(InputError, match=r"conv_middle.weight: sd1 has no such tensor in unet"):
        key_map("sd1").checkpoint_specs({"unet": {spec.name: spec}})


def test_a_key_without_its_query_is_refused_on_the_way_back() -> None:
    folders = folders_of("sd2", layout("sd2"))
    del folders["text_encoder"]["text_model.encoder.layers.3.self_attn.q_proj.weight"]

    with pytest.raises(InputError, match=r"layers\.3\.self_attn\.q_proj\.weight' is missing"):
        key_map("sd2").checkpoint_specs(folders)


# --- relatives ----------------------------------------------------------------------------------


def test_a_narrow_relative_has_the_same_names() -> None:
    wide = folders_of("sd1", layout("sd1"))

    narrow = folders_of("sd1", shrunk("sd1"))

    assert {c: sorted(tensors) for c, tensors in narrow.items()} == {
        c: sorted(tensors) for c, tensors in wide.items()
    }


def test_novelais_text_encoder_names_are_known() -> None:
    old = "cond_stage_model.transformer.encoder.layers.0.mlp.fc1.bias"

    pieces = diffusers_name("sd1", TensorSpec(old, "F16", (3072,)))

    assert pieces is not None
    assert [piece.name for piece in pieces] == ["text_model.encoder.layers.0.mlp.fc1.bias"]


def test_a_bare_flux_transformer_is_known() -> None:
    spec = TensorSpec("double_blocks.3.img_attn.qkv.bias", "BF16", (9216,))

    pieces = diffusers_name("flux", spec)

    assert pieces is not None
    assert [(piece.name, piece.rows) for piece in pieces] == [
        ("transformer_blocks.3.attn.to_q.bias", (0, 3072)),
        ("transformer_blocks.3.attn.to_k.bias", (3072, 6144)),
        ("transformer_blocks.3.attn.to_v.bias", (6144, 9216)),
    ]


def test_a_tensor_of_another_layout_is_unknown() -> None:
    assert diffusers_name("sd1", TensorSpec("model_ema.decay", "F32", ())) is None
    assert diffusers_name("sd1", TensorSpec(f"{UNET}input_blocksX.0.0.bias", "F16", (4,))) is None


def test_rows_that_do_not_divide_are_refused() -> None:
    name = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"

    with pytest.raises(InputError, match="does not hold 3 equal groups of rows"):
        diffusers_name("sd2", TensorSpec(name, "F16", (1000,)))


def test_a_family_without_key_map_is_refused() -> None:
    with pytest.raises(InputError, match="no key map for 'sd4'"):
        key_map("sd4")


# --- the language -------------------------------------------------------------------------------

MAP = """
ranges: {i: 0-1}
adapters: {plain: {dotted: [net.]}}
components:
  net:
    prefix: model.
    names: {%s}
    adapters: plain
"""


def names_of(folder: Path, names: str, *tensors: str) -> list[list[str] | None]:
    (folder / "own.yaml").write_text(MAP % names, encoding="utf-8")
    keys = read_key_map(folder, "own")
    found = [keys.pieces(TensorSpec(f"model.{tensor}", "F16", (12, 4))) for tensor in tensors]
    return [None if pieces is None else [piece.name for piece in pieces] for pieces in found]


def test_a_line_stands_for_a_module_and_all_below(tmp_path: Path) -> None:
    found = names_of(tmp_path, "a: b, a.c.d: e", "a.c.x", "a.c.d.weight", "ab.c", "a")

    assert found == [["b.c.x"], ["e.weight"], None, ["b"]]


def test_letters_are_written_out_and_negative_numbers_skipped(tmp_path: Path) -> None:
    found = names_of(tmp_path, '"up.{1-i}": "left.{i}", "in.{2*i-1}": "right.{i}"', "up.1", "in.1")

    assert found == [["left.0"], ["right.1"]]


def test_of_two_equal_lines_the_later_one_names_the_tensor_on_the_way_back(tmp_path: Path) -> None:
    names_of(tmp_path, "old: new, usual: new")
    folder = {"net": {"new.bias": TensorSpec("new.bias", "F16", (4,))}}

    assert list(read_key_map(tmp_path, "own").checkpoint_specs(folder)) == ["model.usual.bias"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ('"a.{q}": "b.{q}"', "'q'"),
        ('"a.{i*2}": b', "not a sum: 'i\\*2'"),
        ('"@none.a": "@none.b"', "'none'"),
        ('"@none.a": b', "@none stands on one side only"),
        ("a: b inverted", "not a name with"),
        ("a: [b, ~ c]", "not a name with"),
    ],
)
def test_a_file_that_breaks_the_language_is_named(tmp_path: Path, names: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"own.yaml: not a key map: .*{reason}"):
        names_of(tmp_path, names)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("components: [", "not YAML"),
        ("- 1", "a mapping is wanted"),
        ("component: {}", "unknown key 'component'; did you mean 'components'?"),
        (
            "components: {}\nfits: [[{module: a, says: b, inputs: wide}]]",
            "a whole number is wanted",
        ),
    ],
)
def test_a_file_that_is_no_key_map_is_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")

    with pytest.raises(InputError) as caught:
        read_key_map(tmp_path, "own")

    assert reason in str(caught.value)
    assert caught.value.where == "own.yaml"


def test_every_key_map_can_be_read() -> None:
    assert key_map_ids() == ("flux", "sd1", "sd2", "sd3", "sdxl", "sdxl-refiner")
    for family in key_map_ids():
        assert key_map(family).components


def test_key_maps_cost_nothing_until_they_are_asked_for() -> None:
    code = (
        "import sys, ckptools.keymap, ckptools.family; ckptools.family.load_families();"
        "assert 'torch' not in sys.modules;"
        "assert not ckptools.keymap.key_map.cache_info().currsize"
    )

    subprocess.run([sys.executable, "-c", code], check=True)
