"""`ckptools inspect`: what a file is, whether it is whole, where it comes from."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import listed
from models import Specs, layout, model_values, shrunk, with_channels, write_model, write_tensors

import ckptools
from ckptools.cli import run
from ckptools.errors import InputError, InvalidFileError, UsageError
from ckptools.family import load_families
from ckptools.inspection import Inspection, inspect, survey
from ckptools.recipe import load_recipe
from ckptools.sources import open_checkpoint
from ckptools.tensors import TensorSpec
from ckptools.workflow import merge
from ckptools.writer import index_document, lay_out

TINY = Path(ckptools.__file__).parent / "tiny"
LISTS = Path(ckptools.__file__).parent / "families" / "tensors"
UNET = "model.diffusion_model."
V_BIAS = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def sparse(
    path: Path, specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None
) -> Path:
    """A file of any size that takes no room: a true header, and a hole where the values are."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + end)
    return path


def renamed(specs: Specs, old: str, new: str) -> Specs:
    """The specs under `old`, under `new` instead; others are left out."""
    return {
        new + name[len(old) :]: TensorSpec(new + name[len(old) :], spec.dtype, spec.shape)
        for name, spec in specs.items()
        if name.startswith(old)
    }


def without(specs: Specs, *names: str) -> Specs:
    assert set(names) <= specs.keys()
    return {name: spec for name, spec in specs.items() if name not in names}


def diffusers_specs(family: str, component: str) -> Specs:
    rows = [row for row in listed(family) if row.component == component]
    assert rows
    return {row.name: TensorSpec(row.name, "F16", row.shape) for row in rows}


def states(found: Inspection) -> dict[str, tuple[int, str]]:
    return {name: (one.tensors, one.state) for name, one in found.components.items()}


def shown(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert run(["inspect", *map(str, arguments)]) == code
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    return json.loads(shown(capsys, *arguments, "--json", code=code))


# --- whole and broken models -------------------------------------------------------------------

# Sizes of components, counted in the public files' headers.
WHOLE = {
    "sd1": ("sd1", "base", {"unet": 686, "text_encoder": 197, "vae": 248}),
    "sd1-inpainting": ("sd1", "inpainting", {"unet": 686, "text_encoder": 197, "vae": 248}),
    "sd1-ip2p": ("sd1", "ip2p", {"unet": 686, "text_encoder": 197, "vae": 248}),
    "sd2": ("sd2", "base", {"unet": 686, "text_encoder": 294, "vae": 248}),
    "sd2-depth": ("sd2", "depth", {"unet": 686, "text_encoder": 294, "vae": 248, "depth": 368}),
    "sdxl": (
        "sdxl",
        "base",
        {"unet": 1680, "text_encoder": 197, "text_encoder_2": 390, "vae": 248},
    ),
    "sdxl-refiner": ("sdxl-refiner", "base", {"unet": 1220, "text_encoder_2": 390, "vae": 248}),
    "controlnet-sd1": ("controlnet", "sd1", {"controlnet": 340}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_public_files_are_whole(name: str, tmp_path: Path) -> None:
    family, variant, components = WHOLE[name]

    found = inspect(sparse(tmp_path / "a.safetensors", layout(name).values()))

    assert (found.detection.family, found.detection.variant) == (family, variant)
    assert states(found) == {name: (count, "complete") for name, count in components.items()}
    assert found.whole is True
    assert sum(one.nbytes for one in found.components.values()) == sum(
        spec.nbytes for spec in layout(name).values()
    )
    assert found.tensors == len(layout(name)) == sum(found.dtypes.values())


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_narrow_relatives_are_compared_by_name(name: str, tmp_path: Path) -> None:
    found = inspect(sparse(tmp_path / "a.safetensors", shrunk(name).values()))

    assert found.whole is True
    assert {one.state for one in found.components.values()} == {"complete"}


@pytest.mark.parametrize("name", ["A", "B", "C", "I", "U"])
def test_the_tiny_family_is_whole(name: str) -> None:
    assert inspect(TINY / f"{name}.safetensors").whole is True


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_one_tensor_less_is_named_in_any_component(name: str, tmp_path: Path) -> None:
    specs = shrunk(name)
    family = load_families()[name]
    lost = {family.component_of(tensor): tensor for tensor in sorted(specs)
            if tensor.endswith((".weight", ".bias"))}  # fmt: skip
    assert len(lost) >= 3

    found = inspect(sparse(tmp_path / "a.safetensors", without(specs, *lost.values()).values()))

    assert found.whole is False
    for component, tensor in lost.items():
        assert found.components[component].missing == (tensor,)
        assert found.components[component].state == "incomplete"


def test_what_loaders_do_without_is_not_missing(tmp_path: Path) -> None:
    """SD2 as converters from diffusers write it: 23 layers, no projection, no logit scale."""
    specs = shrunk("sd2")
    encoder = "cond_stage_model.model."
    lost = [name for name in specs if name.startswith(f"{encoder}transformer.resblocks.23.")]
    assert len(lost) == 12
    lost += [f"{encoder}logit_scale", f"{encoder}text_projection"]

    found = inspect(sparse(tmp_path / "a.safetensors", without(specs, *lost).values()))

    assert found.whole is True
    assert found.components["text_encoder"].tensors == 294 - 14


def test_position_ids_may_be_lacking_and_that_is_told(tmp_path: Path) -> None:
    found = inspect(sparse(tmp_path / "a.safetensors", without(shrunk("sd1"), IDS).values()))

    assert found.whole is True
    assert found.position_ids == ()
    assert any("no position_ids" in note for note in found.notes)


def test_a_component_that_is_not_there_is_absent_with_all_its_names(tmp_path: Path) -> None:
    specs = shrunk("sd1")
    vae = [name for name in specs if name.startswith("first_stage_model.")]

    found = inspect(sparse(tmp_path / "a.safetensors", without(specs, *vae).values()))

    assert found.components["vae"].state == "absent"
    assert found.components["vae"].missing == tuple(sorted(vae))
    assert found.whole is True  # all that is there is whole
    assert "to run, it needs its usual VAE beside it" in found.notes


def test_quantised_weights_are_not_called_misshapen(tmp_path: Path) -> None:
    specs = layout("sd1")
    packed = [name for name in specs if name.startswith(UNET) and name.endswith("to_q.weight")]
    assert len(packed) == 32
    for name in packed:
        specs[name] = TensorSpec(name, "U8", (specs[name].numel // 2, 1))

    assert inspect(sparse(tmp_path / "a.safetensors", specs.values())).whole is True


def test_strange_tensors_are_named(tmp_path: Path) -> None:
    name = f"{UNET}input_blocks.1.1.extra.weight"
    specs = shrunk("sd1") | {name: TensorSpec(name, "F16", (4,))}

    found = inspect(sparse(tmp_path / "a.safetensors", specs.values()))

    assert found.components["unet"].unexpected == (name,)


def test_the_nai_way_of_naming_is_complete(tmp_path: Path) -> None:
    specs = shrunk("sd1")
    old = "cond_stage_model.transformer.text_model."
    nai = without(specs, *renamed(specs, old, old)) | renamed(
        specs, old, "cond_stage_model.transformer."
    )

    found = inspect(sparse(tmp_path / "a.safetensors", nai.values()))

    assert found.whole is True
    assert states(found)["text_encoder"] == (197, "complete")


def test_shapes_that_differ_from_their_siblings_are_told(tmp_path: Path) -> None:
    specs = with_channels(layout("sd1"), 9)  # inpainting: its input layer is no fault
    odd = f"{UNET}out.0.weight"
    specs[odd] = TensorSpec(odd, "F16", (319,))

    found = inspect(sparse(tmp_path / "a.safetensors", specs.values()))

    (one,) = found.components["unet"].misshapen
    assert (one.name, one.shape, one.usual) == (odd, (319,), (320,))
    assert found.whole is False


def test_narrow_relatives_are_compared_in_dims(tmp_path: Path) -> None:
    specs = shrunk("sd1")
    odd = "first_stage_model.encoder.mid.attn_1.q.weight"
    specs[odd] = TensorSpec(odd, "F16", specs[odd].shape[:2])

    found = inspect(sparse(tmp_path / "a.safetensors", specs.values()))

    assert [one.name for one in found.components["vae"].misshapen] == [odd]


def test_unknown_files_are_never_called_complete(tmp_path: Path) -> None:
    specs = [TensorSpec(f"layers.{n}.weight", "F32", (2, 2)) for n in range(40)]

    found = inspect(sparse(tmp_path / "a.safetensors", specs))

    assert found.detection.kind == "unknown"
    assert states(found) == {"other": (40, "not known")}
    assert found.whole is None


# --- single components -------------------------------------------------------------------------


def _bare_components() -> dict[str, tuple[Specs, str, str]]:
    sd1, sd2, sdxl = layout("sd1"), layout("sd2"), layout("sdxl")
    clip_l = "cond_stage_model.transformer."
    return {
        "vae": (renamed(sd1, "first_stage_model.", ""), "vae", "vae"),
        "vae in place": (renamed(sd1, "first_stage_model.", "first_stage_model."), "vae", "vae"),
        "vae of diffusers": (diffusers_specs("sd1", "vae"), "vae", "vae"),
        "vae of sd3": (renamed(layout("sd3"), "first_stage_model.", ""), "vae", "vae"),
        "clip-l": (renamed(sd1, clip_l, ""), "text_encoder", "text_encoder"),
        "clip-l in place": (renamed(sd1, clip_l, clip_l), "text_encoder", "text_encoder"),
        "clip-h": (renamed(sd2, "cond_stage_model.model.", ""), "text_encoder", "text_encoder"),
        "clip-h of diffusers": (diffusers_specs("sd2", "text_encoder"), "text_encoder",
                                "text_encoder"),
        "clip-g in place": (renamed(sdxl, *["conditioner.embedders.1.model."] * 2), "text_encoder",
                            "text_encoder"),
        "clip-g of diffusers": (diffusers_specs("sdxl", "text_encoder_2"), "text_encoder",
                                "text_encoder"),
        "t5": (diffusers_specs("sd3", "text_encoder_3"), "text_encoder", "text_encoder"),
    }  # fmt: skip


BARE = _bare_components()


@pytest.mark.parametrize("name", BARE)
def test_components_by_themselves_are_compared(name: str, tmp_path: Path) -> None:
    specs, kind, component = BARE[name]
    whole = inspect(sparse(tmp_path / "whole.safetensors", specs.values()))
    lost = max(name for name in specs if re.search(r"norm2\.weight$|layer|ln_2", name))
    broken = inspect(sparse(tmp_path / "broken.safetensors", without(specs, lost).values()))

    assert whole.detection.kind == kind
    assert states(whole) == {component: (len(specs), "complete")}
    assert len(broken.components[component].missing) == 1
    # diffusers' names are shown as those of single files, which end alike here
    assert broken.components[component].missing[0].endswith(".".join(lost.split(".")[-2:]))


# --- EMA ---------------------------------------------------------------------------------------


def test_an_ema_copy_alone_is_told_and_compared(tmp_path: Path) -> None:
    specs = layout("sd1-ema-only-unet")
    lost = "model_ema.diffusion_modeltime_embed0weight"

    found = inspect(sparse(tmp_path / "a.safetensors", specs.values()))
    broken = inspect(sparse(tmp_path / "b.safetensors", without(specs, lost).values()))

    assert (found.ema, found.whole) == ("only", False)
    assert states(found)["ema"] == (686, "complete")
    assert broken.components["ema"].missing == (lost,)


def test_an_ema_copy_beside_the_unet_is_a_component(tmp_path: Path) -> None:
    ema = {
        name: TensorSpec(name, "F32", spec.shape)
        for name, spec in layout("sd1-ema-only-unet").items()
    }

    found = inspect(sparse(tmp_path / "a.safetensors", [*layout("sd1").values(), *ema.values()]))

    assert found.ema == "beside"
    assert states(found)["ema"] == (686, "complete")
    assert found.dtypes == {"F16": 1130, "F32": 686, "I64": 1}
    assert found.whole is True


# --- what values tell --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("spread", "prediction"), [(0.3, "v"), (0.02, "epsilon")])
def test_one_small_tensor_tells_v_from_epsilon(
    dtype: torch.dtype, spread: float, prediction: str, tmp_path: Path
) -> None:
    values = model_values(shrunk("sd2"), seed=1)
    values[V_BIAS] = (values[V_BIAS].float() / values[V_BIAS].float().std() * spread).to(dtype)

    found = inspect(write_tensors(tmp_path / "a.safetensors", values))

    assert found.detection.prediction is None  # the header cannot tell
    assert found.prediction == prediction
    (said,) = found.value_evidence
    assert said.startswith(f"{prediction}: ")
    assert f"{values[V_BIAS].double().std().item():.3f}" in said


def test_values_that_are_no_numbers_tell_nothing(tmp_path: Path) -> None:
    values = model_values(shrunk("sd2"), seed=1)
    values[V_BIAS][3] = torch.nan

    found = inspect(write_tensors(tmp_path / "a.safetensors", values))

    assert found.prediction is None
    assert "no numbers to judge by" in found.value_evidence[0]


def test_position_ids_that_drifted_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.arange(77, dtype=torch.float32).reshape(1, 77)
    sound, drifted = ids.half(), ids.clone()
    drifted[0, 76] = 75.9975
    specs = shrunk("sd1")
    one = write_model(tmp_path / "one.safetensors", specs, seed=1, edits={IDS: sound})
    two = write_model(tmp_path / "two.safetensors", specs, seed=1, edits={IDS: drifted})

    assert inspect(one).position_ids[0].wrong is None
    found = inspect(two).position_ids[0]
    assert (found.name, found.dtype, found.count) == (IDS, "F32", 1)
    assert found.wrong == (76, pytest.approx(75.9975))
    assert "has drifted: 1 of its numbers, 75.9975 at 76" in shown(capsys, two)
    assert as_json(capsys, one)["position_ids"][0]["wrong"] == 0


def test_markers_and_tensors_without_elements_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = [TensorSpec("v_pred", "F32", (0,)), TensorSpec("ztsnr", "F32", (0,)),
             TensorSpec(f"{UNET}nothing.weight", "F16", (0, 4))]  # fmt: skip
    path = sparse(tmp_path / "a.safetensors", [*shrunk("sdxl").values(), *extra])

    body = as_json(capsys, path)

    assert body["prediction"] == "v"
    assert body["markers"] == ["v_pred", "ztsnr"]
    assert body["empty"] == [f"{UNET}nothing.weight", "v_pred", "ztsnr"]
    text = shown(capsys, path)
    assert f"no elements in {UNET}nothing.weight" in text
    assert "markers:    v_pred, ztsnr" in text


# --- adapters, embeddings ----------------------------------------------------------------------


def test_an_adapter_tells_kind_base_and_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{module}.lora_down.weight": torch.ones(8, 768),
        f"{module}.lora_up.weight": torch.ones(320, 8),
        f"{module}.alpha": torch.tensor(4.0),
    }
    metadata = {"ss_network_module": "networks.lora", "modelspec.trigger_phrase": "blue \x1b[31m"}
    path = write_tensors(tmp_path / "a.safetensors", tensors, metadata)

    body = as_json(capsys, path)

    assert (body["kind"], body["family"], body["layout"]) == ("lora", None, "kohya")
    assert body["adapter"]["base"] == "sd1"
    assert body["adapter"]["ranks"] == {"8": 1}
    assert body["adapter_components"]["unet"]["modules"] == 1
    text = shown(capsys, path)
    assert "LoRA for sd1" in text
    assert "ranks:      8 (1)" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("tensors", "base", "told"),
    [
        ({"emb_params": (4, 768)}, "sd1", [("emb_params", 4, 768)]),
        ({"<cat>": (1024,)}, "sd2", [("<cat>", 1, 1024)]),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "sdxl",
         [("clip_g", 2, 1280), ("clip_l", 2, 768)]),
    ],
)  # fmt: skip
def test_an_embedding_tells_its_vectors(
    tensors: dict[str, tuple[int, ...]], base: str, told: list[tuple[str, int, int]],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    specs = [TensorSpec(name, "F32", shape) for name, shape in tensors.items()]
    path = sparse(tmp_path / "a.safetensors", specs)

    body = as_json(capsys, path)

    assert (body["kind"], body["variant"]) == ("embedding", base)
    assert [(one["tensor"], one["vectors"], one["width"]) for one in body["embedding"]] == told
    assert f"textual inversion for {base}" in shown(capsys, path)


# --- lineage and the manifest ------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of a merge of the tiny family, as `ckptools merge` writes it. Do not change."""
    folder = tmp_path_factory.mktemp("merged")
    for name, models, formula in (
        ("first", {"B": TINY / "B.safetensors", "C": TINY / "C.safetensors"}, "B * 0.5 + C * 0.5"),
        ("second", {"A": TINY / "A.safetensors", "F": folder / "first.safetensors"},
         "A * (1 - M) + F * M"),
    ):  # fmt: skip
        recipe = folder / f"{name}.yaml"
        recipe.write_text(
            json.dumps(
                {
                    "ckptools": 1,
                    "models": {key: str(path) for key, path in models.items()},
                    "merge": formula,
                    "output": {"path": f"{name}.safetensors"},
                }
                | ({"params": {"M": 0.25}} if "M" in formula else {})
            )
        )
        merge(load_recipe(recipe), hash_inputs=True)
    return folder / "second.safetensors"


def test_a_merge_shows_its_parents_and_theirs(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, merged)

    lines = [line.strip() for line in text.splitlines()]
    start = lines.index("made from (as ckptools.recipe tells):")
    tree = [line.partition(" [")[0] for line in lines[start + 1 : start + 6]]
    assert tree[0] == "second.safetensors = A * (1 - M) + F * M, M = 0.25"
    assert tree[1:] == [
        "├─ A: A.safetensors", "└─ F: first.safetensors",
        "├─ B: B.safetensors", "└─ C: C.safetensors",
    ]  # fmt: skip
    assert "= B * 0.5 + C * 0.5" in lines[start + 3]
    assert (
        "manifest: second.safetensors.ckptools.json, of a file with this header (ckptools" in text
    )
    assert "written by: ckptools" in text


def test_the_json_has_the_contract_keys_the_tree_and_the_manifest(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = as_json(capsys, merged)

    assert body["schema"] == "ckptools.inspect/1"
    assert (body["kind"], body["family"], body["variant"]) == ("checkpoint", "sd1", "base")
    assert (body["prediction"], body["layout"], body["whole"]) == ("epsilon", "ldm", True)
    assert body["components"]["unet"]["missing"] == []
    assert body["components"]["unet"]["dtypes"] == {"F16": 686}
    assert body["evidence"]
    assert "sd2" in {one["family"] for one in body["rejected"]}
    assert body["metadata"]["modelspec.title"] == "second"
    assert body["decoded"]["ckptools.recipe"]["merge"] == "A * (1 - M) + F * M"
    assert [one["role"] for one in body["lineage"]["parents"]] == ["A", "F"]
    assert body["manifest"]["is_of_this_file"] is True
    assert [one["name"] for one in body["manifest"]["inputs"]] == ["A", "F"]


def test_a_manifest_of_another_file_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], merged: Path
) -> None:
    path = write_model(tmp_path / "a.safetensors", shrunk("sd1"), seed=1)
    beside = tmp_path / "a.safetensors.ckptools.json"
    text = merged.with_name("second.safetensors.ckptools.json").read_text()
    beside.write_text(text)

    assert "is of another file: their headers differ" in shown(capsys, path)
    assert as_json(capsys, path)["lineage"] is None


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "its schema is not"),
        (b'{"schema": "ckptools.manifest/9"}', "its schema is not"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_told(
    content: bytes, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_model(tmp_path / "a.safetensors", shrunk("sd1"), seed=1)
    (tmp_path / "a.safetensors.ckptools.json").write_bytes(content)

    assert f"a.safetensors.ckptools.json cannot be read: {why}" in shown(capsys, path)
    assert why in as_json(capsys, path)["manifest"]["problem"]


def test_a_manifest_with_odd_fields_and_one_of_any_length_do_not_stop_it(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.safetensors", shrunk("sd1"), seed=1)
    beside = tmp_path / "a.safetensors.ckptools.json"
    odd = {
        "schema": "ckptools.manifest/1",
        "outputs": 3,
        "inputs": [1, {}],
        "recipe": [],
        "versions": 1,
    }
    beside.write_text(json.dumps(odd))

    found = inspect(path).manifest

    assert found is not None
    assert (found.is_of_this_file, found.inputs, found.recipe) == (False, (("", "", ""),), None)
    os.truncate(beside, 17_000_000)
    assert "too many" in inspect(path).manifest.problem


# --- hostile files -----------------------------------------------------------------------------


def test_nothing_in_a_file_can_move_the_cursor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\x07\u202eevil\n"
    specs = [TensorSpec(f"{UNET}{evil}.weight", "F16", (2,)), *shrunk("sd1").values()]
    metadata = {
        evil: evil,
        "modelspec.title": evil,
        "sd_merge_recipe": json.dumps({"type": evil, "interp_method": evil,
                                       "primary_model_hash": evil}),
        "modelspec.merged_from": evil,
        "long": "x" * 1_000_000,
    }  # fmt: skip
    path = sparse(tmp_path / "a.safetensors", specs, metadata)

    for text in (shown(capsys, path), shown(capsys, path, "--tensors", "*evil*"),
                 shown(capsys, path, "--json")):  # fmt: skip
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
        assert len(text) < 400_000
    assert "(1,000,000 characters)" in shown(capsys, path)


def test_a_thousand_entries_are_counted_not_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = {f"key{number:04d}": "value" for number in range(1000)}
    path = sparse(tmp_path / "a.safetensors", shrunk("sd1").values(), metadata)

    text = shown(capsys, path)

    assert "976 more (--json has them)" in text
    assert len(as_json(capsys, path)["metadata"]) == 1000


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "the file is empty"), (b"<!DOCTYPE html>", "an HTML page"),
     (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer")],
)  # fmt: skip
def test_unsound_files_are_named_errors(
    content: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)

    body = as_json(capsys, path, code=2)

    assert body["error"]["code"] == "invalid-file"
    assert says in body["error"]["message"]
    with pytest.raises(InvalidFileError):
        inspect(path)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        survey([tmp_path / "a.safetensors"])


# --- several files, single tensors -------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow SD1, a narrow SDXL that lacks a tensor, a broken file, a text. Do not change."""
    folder = tmp_path_factory.mktemp("models")
    sparse(folder / "one.safetensors", shrunk("sd1").values())
    sparse(folder / "two.safetensors", without(shrunk("sdxl"), f"{UNET}out.0.bias").values())
    (folder / "three.safetensors").write_bytes(b"<html>")
    (folder / "README.txt").write_text("hello")
    (folder / "config").mkdir()
    (folder / "config" / "model_index.json").write_text("{}")
    return folder


def test_a_folder_of_files_is_listed_and_its_broken_file_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, folder, code=2)

    rows = [line.split()[0] for line in text.splitlines() if ".safetensors" in line]
    assert rows == ["one.safetensors", "three.safetensors", "two.safetensors"]
    assert "invalid-file: an HTML page" in text
    body = as_json(capsys, folder, code=2)
    assert [Path(one["file"]).name for one in body["files"]] == rows
    assert [one.get("whole") for one in body["files"]] == [True, None, False]
    assert body["files"][1]["error"]["code"] == "invalid-file"


def test_an_index_stands_for_its_shards_beside_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = list(shrunk("sd1").values())
    layouts = [
        lay_out(part, {}, tmp_path / f"big-0000{number}-of-00002.safetensors")
        for number, part in ((1, specs[:500]), (2, specs[500:]))
    ]
    for part in layouts:
        sparse(part.path, part.specs)
    (tmp_path / "big.safetensors.index.json").write_bytes(index_document(layouts))

    assert "tensors in 2 files" in shown(capsys, tmp_path)
    sparse(tmp_path / "small.safetensors", specs)
    names = [Path(one["file"]).name for one in as_json(capsys, tmp_path)["files"]]

    assert names == ["big.safetensors.index.json", "small.safetensors"]
    with pytest.raises(InputError, match="2 candidate files"):
        open_checkpoint(tmp_path)


def test_several_files_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, folder / "one.safetensors", folder / "two.safetensors")

    assert "Stable Diffusion 1.x" in text
    assert "Stable Diffusion XL" in text
    assert "evidence" not in text


def test_every_kind_has_its_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare_vae = renamed(shrunk("sd1"), "first_stage_model.", "")
    files = {
        "ControlNet for sd1": layout("controlnet-sd1").values(),
        "unknown: only the EMA copy of a UNet": layout("sd1-ema-only-unet").values(),
        "vae, 4-channel": bare_vae.values(),
        "unknown": [TensorSpec("a.b", "F32", (2,)), TensorSpec("a.c", "BF16", (2,))],
    }

    for number, (words, specs) in enumerate(files.items()):
        text = shown(capsys, sparse(tmp_path / f"{number}.safetensors", specs))
        assert f"  what:       {words}\n" in text
    assert "whole:      not known" in text
    assert "F32 (1), BF16 (1)" in text
    assert "whole:      no: only the EMA copy" in shown(capsys, tmp_path / "1.safetensors")
    assert "no header tells the VAEs" in shown(capsys, tmp_path / "2.safetensors")


def test_what_speaks_by_values_and_misshapen_tensors_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = layout("sd2")
    odd = f"{UNET}out.0.weight"
    specs[odd] = TensorSpec(odd, "F16", (319,))

    text = shown(capsys, sparse(tmp_path / "a.safetensors", specs.values()))

    assert "no: unet has 1 misshapen tensor" in text
    assert f"misshapen: {odd}: [319], usually [320]" in text
    assert "by its values" in text  # a sparse file holds zeros
    assert "prediction: epsilon" in text


def test_adapters_have_a_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "LoRA for" in shown(capsys, TINY / "glow.safetensors", TINY / "A.safetensors")


def test_missing_tensors_are_listed_up_to_a_few(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = shrunk("sd1")
    lost = sorted(name for name in specs if name.startswith(f"{UNET}middle_block.0."))
    path = sparse(tmp_path / "a.safetensors", without(specs, *lost).values())

    text = shown(capsys, path)

    assert f"no: unet lacks {len(lost)} tensors" in text
    assert f"lacks {len(lost)} of 686" in text
    assert f"missing in unet: {lost[0]}" in text
    assert f"… and {len(lost) - 5} more (--json lists all)" in text
    assert as_json(capsys, path)["components"]["unet"]["missing"] == lost


def test_a_diffusers_folder_says_that_it_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
    sparse(tmp_path / "vae" / "diffusion_pytorch_model.safetensors",
           diffusers_specs("sd1", "vae").values())  # fmt: skip

    body = as_json(capsys, tmp_path)

    assert body["layout"] == "diffusers"
    assert body["components"]["vae"]["state"] == "complete"


def test_single_tensors_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "one.safetensors"

    text = shown(capsys, path, "--tensors", "*input_blocks.4.1.norm.*")
    body = as_json(capsys, path, "--tensors", "*input_blocks.4.1.norm.*")

    assert f"{UNET}input_blocks.4.1.norm.bias" in text
    assert "2 of 1,131 tensors" in text
    assert body["listed"][0] == {
        "name": f"{UNET}input_blocks.4.1.norm.bias", "dtype": "F16", "shape": [20], "bytes": 40,
        "block": "IN04", "component": "unet",
    }  # fmt: skip


def test_a_pipe_gets_every_name_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "one.safetensors"
    named = "*input_blocks.4.1.transformer_blocks.0.*"

    for more in ((), ("--stats",)):
        text = shown(capsys, path, "--tensors", named, *more)
        rows = [row["name"] for row in as_json(capsys, path, "--tensors", named)["listed"]]
        assert len(rows) == 20
        assert max(map(len, rows)) > 80
        lines = [line.split()[0] for line in text.splitlines() if line.strip()]
        assert set(rows) <= set(lines)


def test_single_tensors_of_several_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, folder / "one.safetensors", folder / "two.safetensors", "--tensors",
                 "*label_emb.0.0.bias", code=2)  # fmt: skip

    assert "two.safetensors" in text
    assert f"{UNET}label_emb.0.0.bias" in text
    assert "usage: no tensor matches" in text


def test_a_glob_that_matches_nothing_is_an_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="no tensor matches") as caught:
        inspect(folder / "one.safetensors", tensors="model.diffusion_model.time_embed.0.wieght")

    assert "time_embed.0.weight" in caught.value.fix


def test_quiet_prints_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, folder / "one.safetensors", "-q") == ""
    assert shown(capsys, folder, "-q", code=2) == ""


# --- statistics --------------------------------------------------------------------------------


def test_statistics_are_those_of_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, bad = f"{UNET}middle_block.1.norm.weight", f"{UNET}out.0.bias"
    values = model_values(shrunk("sd1"), seed=3, dtype="F32")
    values[bad][0] = torch.nan
    values[name][:5] = 0
    path = write_tensors(tmp_path / "a.safetensors", values)

    body = as_json(capsys, path, "--stats")["statistics"]
    text = shown(capsys, path, "--stats")

    one = values[name].double()
    assert body["tensors"][name] == {
        "count": 40, "nan": 0, "inf": 0, "zeros": 5, "denormals": 0,
        "norm": pytest.approx(one.norm().item()), "mean": pytest.approx(one.mean().item()),
        "std": pytest.approx(one.std(correction=0).item()),
        "min": pytest.approx(one.min().item()), "max": pytest.approx(one.max().item()),
    }  # fmt: skip
    middle = torch.cat([value.double().flatten() for key, value in values.items()
                        if key.startswith(f"{UNET}middle_block.")])  # fmt: skip
    assert body["blocks"]["unet M00"]["count"] == middle.numel()
    assert body["blocks"]["unet M00"]["norm"] == pytest.approx(middle.norm().item())
    assert list(body["blocks"])[-2:] == ["text_encoder", "vae"]
    assert body["components"]["unet"]["nan"] == 1
    assert set(body["tensors"]) == {key for key in values if values[key].is_floating_point()}
    assert f"{bad} holds 1 NaN and 0 Inf" in text
    assert "█" in next(line for line in text.splitlines() if "unet M00" in line)
    assert "1, 0" in next(line for line in text.splitlines() if line.startswith(" unet  "))


def test_statistics_of_chosen_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(tmp_path / "a.safetensors", shrunk("sd1"), seed=1)

    body = as_json(capsys, path, "--stats", "--tensors", "*time_embed.0.*")
    text = shown(capsys, path, "--stats", "--tensors", "*time_embed.0.*")

    assert sorted(body["statistics"]["tensors"]) == [
        f"{UNET}time_embed.0.bias", f"{UNET}time_embed.0.weight",
    ]  # fmt: skip
    assert "2 of 1,131 tensors" in text
    assert "values of floating point tensors" in text
    assert "█" not in text


def test_statistics_of_several_files_and_of_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_tensors(tmp_path / "one.safetensors", {"a.weight": torch.full((4,), torch.inf)})
    two = write_tensors(tmp_path / "two.safetensors", {"b.ids": torch.arange(4)})

    text = shown(capsys, one, two, "--stats")
    body = as_json(capsys, one, two, "--stats")

    assert "one.safetensors: the values" in text
    assert "two.safetensors: the values" in text
    assert body["files"][0]["statistics"]["tensors"]["a.weight"]["mean"] is None
    assert body["files"][1]["statistics"] == {"components": {}, "blocks": {}, "tensors": {}}


# --- the lists ---------------------------------------------------------------------------------


def test_the_shipped_lists_are_what_the_script_writes(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "tools" / "tensor_lists.py"
    spec = importlib.util.spec_from_file_location("tensor_lists", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    module.write(tmp_path)
    rows = module.diffusers_controlnet(**module.SDXL_CONTROLNET)
    specs = [TensorSpec(name, "F16", shape) for name, shape in rows.items()]
    controlnet = inspect(sparse(tmp_path / "a.safetensors", specs))

    assert controlnet.detection.variant == "sdxl"
    assert states(controlnet) == {"controlnet": (844, "complete")}
    written = {path.name: path.read_bytes() for path in tmp_path.glob("*.txt.gz")}
    assert len(written) >= 20
    assert written == {path.name: path.read_bytes() for path in LISTS.glob("*.txt.gz")}
