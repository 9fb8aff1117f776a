"""Diffusers folders, and components alone, open under the names of single files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import layout, model_values, shrunk, with_channels, write_tensors
from safetensors.torch import load_file
from torch import Tensor

from ckptools.errors import CkptError, InputError
from ckptools.family import detect
from ckptools.folders import SIDE_FILE
from ckptools.keymap import key_map
from ckptools.plan import make_plan
from ckptools.recipe import load_recipe
from ckptools.sources import open_checkpoint
from ckptools.tensors import DTYPES
from ckptools.workflow import merge

Tensors = dict[str, Tensor]
Q = "text_model.encoder.layers.0.self_attn.q_proj.weight"


def as_components(family: str, tensors: Tensors) -> dict[str, Tensors]:
    """What a diffusers folder holds of a single file, made with torch."""
    from ckptools.tensors import TensorSpec

    names = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
    folder: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        spec = TensorSpec(name, names[tensor.dtype], tuple(tensor.shape))
        for piece in key_map(family).pieces(spec) or ():
            part = tensor[slice(*piece.rows)] if piece.rows else tensor
            part = part.T if piece.op == "transpose" else part.reshape(piece.shape)
            folder.setdefault(piece.component, {})[piece.name] = part.contiguous()
    return folder


def weights_name(component: str) -> str:
    stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
    return f"{stem}.safetensors"


def write_folder(path: Path, components: dict[str, Tensors], prediction: str = "") -> Path:
    for component, tensors in components.items():
        (path / component).mkdir(parents=True)
        write_tensors(path / component / weights_name(component), tensors, {"format": "pt"})
    (path / "model_index.json").write_text(
        json.dumps({"_class_name": "X"} | {c: ["diffusers", "Y"] for c in components})
    )
    if prediction:
        (path / "scheduler").mkdir()
        (path / "scheduler" / "scheduler_config.json").write_text(
            json.dumps({"prediction_type": prediction, "rescale_betas_zero_snr": True})
        )
    return path


def read_all(path: Path) -> Tensors:
    """Every tensor, through our own reader."""
    with open_checkpoint(path) as checkpoint:
        found = {}
        for name, spec in checkpoint.items():
            dtype = getattr(torch, DTYPES[spec.dtype].torch_name)
            data = bytearray(checkpoint.read(name))
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            found[name] = flat.reshape(spec.shape)
        return found


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def sd1() -> Tensors:
    return model_values(shrunk("sd1"), seed=1)


@pytest.fixture(scope="module")
def sd2() -> Tensors:
    return model_values(shrunk("sd2"), seed=2)


def in_folder(family: str, tensors: Tensors) -> Tensors:
    """The single file's tensors that a folder holds."""
    from ckptools.tensors import TensorSpec

    return {
        name: tensor
        for name, tensor in tensors.items()
        if key_map(family).pieces(TensorSpec(name, "F16", tuple(tensor.shape)))
    }


# --- whole folders -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1", "sd1-inpainting", "sd2", "sdxl", "sdxl-refiner"])
def test_a_folder_is_the_single_file_under_its_own_names(name: str, tmp_path: Path) -> None:
    family = "sdxl-refiner" if name == "sdxl-refiner" else name.partition("-")[0]
    tensors = model_values(shrunk(name, 64), seed=3)
    folder = write_folder(tmp_path / name, as_components(family, tensors))

    with open_checkpoint(folder) as checkpoint:
        found = detect(checkpoint, checkpoint.metadata)
        assert (found.family, checkpoint.layout, checkpoint.warnings) == (family, "diffusers", ())
    assert_same(read_all(folder), in_folder(family, tensors))


def test_reads_at_any_offset_agree(sd2: Tensors, tmp_path: Path) -> None:
    """Rows from three tensors; the byte runs may begin and end anywhere."""
    folder = write_folder(tmp_path / "F", as_components("sd2", sd2))
    name = "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight"
    whole = sd2[name].numpy().tobytes()

    with open_checkpoint(folder) as checkpoint:
        for begin, end in [(0, 10), (len(whole) // 3 - 6, len(whole) // 3 + 6), (8, len(whole))]:
            view = bytearray(end - begin)
            checkpoint.read_into(name, memoryview(view), begin)
            assert bytes(view) == whole[begin:end]


def test_a_transposed_matrix_is_turned_back(tmp_path: Path) -> None:
    tensors = model_values(shrunk("sdxl", 64), seed=4)
    folder = write_folder(tmp_path / "F", as_components("sdxl", tensors))
    name = "conditioner.embedders.1.model.text_projection"

    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.read(name) == tensors[name].numpy().tobytes()


def test_merging_a_folder_with_a_file_is_merging_two_files(sd1: Tensors, tmp_path: Path) -> None:
    write_folder(tmp_path / "A", as_components("sd1", sd1))
    write_tensors(tmp_path / "A.safetensors", in_folder("sd1", sd1))
    write_tensors(tmp_path / "B.safetensors", model_values(shrunk("sd1"), seed=5))
    results = {}
    for source in ("A", "A.safetensors"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"ckptools: 1\nmodels: {{A: {source}, B: B.safetensors}}\nparams: {{M: 0.3}}\n"
            f"merge: A + (B - A) * M\noutput: {{path: out-{source}.safetensors}}\n"
        )
        results[source] = merge(load_recipe(recipe), hash_inputs=True)

    manifest = results["A"].manifest.read_text()
    inputs = {entry["name"]: entry for entry in json.loads(manifest)["inputs"]}

    assert results["A"].sha256_data == results["A.safetensors"].sha256_data
    assert inputs["A"]["file"] == "A"
    assert str(tmp_path) not in manifest


def test_adapters_fit_a_folder(tmp_path: Path) -> None:
    from ckptools.convert import Request, convert

    tiny = Path(__import__("ckptools").__file__).parent / "tiny"
    convert(Request(tiny / "A.safetensors", tmp_path / "A"))
    results = []
    for number, model in enumerate([tmp_path / "A", tiny / "A.safetensors"]):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"ckptools: 1\nmodels: {{A: {model}}}\nmerge: A\n"
            f"loras: [{{path: {tiny / 'glow.safetensors'}, weight: 0.5}}]\n"
            f"output: {{path: out{number}.safetensors}}\n"
        )
        results.append(merge(load_recipe(recipe)).sha256_data)

    assert results[0] == results[1]


# --- spellings ---------------------------------------------------------------------------------


def older_vae(tensors: Tensors) -> Tensors:
    """As diffusers before 0.18 called the attention."""
    words = {"to_q": "query", "to_k": "key", "to_v": "value"}
    return {
        ".".join(words.get(w, w) for w in name.replace("to_out.0", "proj_attn").split(".")): tensor
        for name, tensor in tensors.items()
    }


def test_names_of_earlier_and_later_libraries_are_known(sd1: Tensors, tmp_path: Path) -> None:
    components = as_components("sd1", sd1)
    components["vae"] = older_vae(components["vae"])
    text = components["text_encoder"]
    components["text_encoder"] = {n.removeprefix("text_model."): t for n, t in text.items()}
    assert any(".query." in name for name in components["vae"])

    folder = write_folder(tmp_path / "F", components)

    assert_same(read_all(folder), in_folder("sd1", sd1))


def test_position_ids_are_kept_where_single_files_have_them(
    sd1: Tensors, sd2: Tensors, tmp_path: Path
) -> None:
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    for family, tensors in (("sd1", sd1), ("sd2", sd2)):
        components = as_components(family, tensors)
        components["text_encoder"] |= ids
        write_folder(tmp_path / family, components)
    own = {name: tensor for name, tensor in sd1.items() if name.endswith("position_ids")}

    assert_same(read_all(tmp_path / "sd1"), in_folder("sd1", sd1) | own)
    assert_same(read_all(tmp_path / "sd2"), in_folder("sd2", sd2))


def test_what_the_map_does_not_know_keeps_its_name(sd1: Tensors, tmp_path: Path) -> None:
    components = as_components("sd1", sd1)
    components["unet"]["ip_adapter.scale"] = torch.ones(3)
    folder = write_folder(tmp_path / "F", components)

    with open_checkpoint(folder) as checkpoint:
        assert "unet.ip_adapter.scale" in checkpoint
        assert checkpoint.warnings == (
            "sd1 has no place for 1 tensor; kept under the same name: unet.ip_adapter.scale",
        )


# --- files of a component ----------------------------------------------------------------------


def test_a_variant_is_read_where_there_is_no_full_file(sd1: Tensors, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "F", as_components("sd1", sd1))
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    vae = folder / "vae"
    write_tensors(vae / "diffusion_pytorch_model.fp16.safetensors", {"x": torch.ones(1)})

    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.warnings == ("unet: the variant 'fp16' is read, the only one there",)
    assert_same(read_all(folder), in_folder("sd1", sd1))


@pytest.mark.parametrize(
    "index", ["diffusion_pytorch_model.safetensors.index.json",
              "diffusion_pytorch_model.safetensors.index.fp16.json"],
)  # fmt: skip
def test_shards_of_a_component_are_joined(index: str, sd1: Tensors, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "F", as_components("sd1", sd1))
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, share in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        write_tensors(folder / "unet" / shard, {name: tensors[name] for name in share})
        weight_map |= dict.fromkeys(share, shard)
    (folder / "unet" / index).write_text(json.dumps({"weight_map": weight_map}))

    assert_same(read_all(folder), in_folder("sd1", sd1))


def test_a_missing_component_is_told(sd1: Tensors, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "F", as_components("sd1", sd1))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()

    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.warnings == ("vae has no weights",)
        assert not any(name.startswith("first_stage_model.") for name in checkpoint)


def test_a_safety_checker_is_left_out(sd1: Tensors, tmp_path: Path) -> None:
    components = as_components("sd1", sd1) | {"safety_checker": {"x": torch.ones(2)}}
    folder = write_folder(tmp_path / "F", components)

    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.warnings == (
            "safety_checker is left out: it is no part of a single-file checkpoint",
        )


def test_a_vae_and_a_text_encoder_alone_make_a_part(sd1: Tensors, tmp_path: Path) -> None:
    """The text encoder of sd1 and sd2 have the same names: nothing tells which it is."""
    components = as_components("sd1", sd1)
    vae = {"vae": components["vae"]}
    write_folder(tmp_path / "vae", vae)
    write_folder(tmp_path / "both", vae | {"text_encoder": components["text_encoder"]})

    of_vae = {n: t for n, t in sd1.items() if n.startswith("first_stage_model.")}

    assert_same(read_all(tmp_path / "vae"), of_vae)
    with open_checkpoint(tmp_path / "both") as checkpoint:
        assert f"text_encoder.{Q}" in checkpoint
        assert checkpoint.warnings == ("no known family: tensors are called <component>.<tensor>",)


def test_a_component_of_no_known_family_keeps_its_names(tmp_path: Path) -> None:
    """What is merged by names alone has the names that it had."""
    odd = {"conv_in.weight": torch.ones(3, 7), "odd.weight": torch.ones(3)}
    write_folder(tmp_path / "F", {"unet": odd})

    for path in (tmp_path / "F", tmp_path / "F" / "unet", *(tmp_path / "F" / "unet").glob("*.s*")):
        with open_checkpoint(path) as checkpoint:
            assert {*checkpoint} == {*odd}
            assert not checkpoint.warnings


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")

    with pytest.raises(InputError, match="a diffusers folder without weights"):
        open_checkpoint(tmp_path)


# --- tensors that make no whole ----------------------------------------------------------------


def drop_q(tensors: Tensors) -> None:
    del tensors[Q]


def widen_q(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q].float()


def cut_q(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q][:-1].contiguous()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_q, "q_proj.weight' is missing"),
        (widen_q, "is F32, the others that make this tensor up are F16|is F16, the others"),
        (cut_q, r"\[31, 32\], \[32, 32\] is wanted|is wanted"),
    ],
    ids=["missing", "dtype", "shape"],
)
def test_a_part_that_does_not_fit_is_named(
    damage: Callable[[Tensors], None], message: str, sd2: Tensors, tmp_path: Path
) -> None:
    components = as_components("sd2", sd2)
    damage(components["text_encoder"])
    folder = write_folder(tmp_path / "F", components)

    with pytest.raises(CkptError, match=message) as caught:
        open_checkpoint(folder)
    assert "resblocks.0.attn.in_proj" in str(caught.value)


# --- what settings say -------------------------------------------------------------------------


def test_prediction_comes_from_the_scheduler(sd2: Tensors, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "F", as_components("sd2", sd2), "v_prediction")

    with open_checkpoint(folder) as checkpoint:
        assert detect(checkpoint, checkpoint.metadata).prediction == "v"
        assert "v_pred" not in checkpoint  # no loader of SD2 reads it


def test_v_prediction_of_sdxl_gets_the_markers_that_single_files_have(tmp_path: Path) -> None:
    tensors = model_values(shrunk("sdxl", 64), seed=6)
    folder = write_folder(tmp_path / "F", as_components("sdxl", tensors), "v_prediction")

    with open_checkpoint(folder) as checkpoint:
        assert [checkpoint[name].numel for name in ("v_pred", "ztsnr")] == [0, 0]
        assert checkpoint.read("v_pred") == b""
        assert detect(checkpoint).prediction == "v"


def test_the_side_file_gives_what_folders_lack(sd2: Tensors, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "F", as_components("sd2", sd2))
    there = in_folder("sd2", sd2)
    rest = {name: t for name, t in sd2.items() if name not in there}
    assert any("resblocks.23" in name for name in rest)
    taken = next(iter(there))
    write_tensors(folder / SIDE_FILE, rest | {taken: torch.zeros(3)})

    assert_same(read_all(folder), sd2)


# --- a component alone -------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_diffusers_vae_can_be_taken(where: str, sd1: Tensors, tmp_path: Path) -> None:
    other = model_values(shrunk("sd1"), seed=7)
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "config.json").write_text("{}")
    file = write_tensors(
        vae / "diffusion_pytorch_model.safetensors", as_components("sd1", other)["vae"]
    )
    write_tensors(tmp_path / "A.safetensors", sd1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{A: A.safetensors, V: {file if where == 'file' else vae}}}\n"
        "merge: A\ntake: {vae: V}\noutput: {path: out.safetensors}\n"
    )

    merge(load_recipe(recipe))
    result = load_file(tmp_path / "out.safetensors")

    assert_same(
        result, sd1 | {n: t for n, t in other.items() if n.startswith("first_stage_model.")}
    )


def test_a_diffusers_unet_alone_is_of_its_family(tmp_path: Path) -> None:
    """At full width, by the header alone: the width tells the family."""
    from ckptools.tensors import TensorSpec
    from ckptools.writer import PartFile, lay_out

    pieces = [
        piece
        for spec in with_channels(layout("sdxl"), 9).values()
        for piece in key_map("sdxl").pieces(spec) or ()
        if piece.component == "unet"
    ]
    specs = [TensorSpec(piece.name, "F16", piece.shape) for piece in pieces]
    path = tmp_path / "unet.safetensors"
    with PartFile(lay_out(specs, {}, path)) as part:  # 5 GB of nothing
        part.commit()

    with open_checkpoint(path) as checkpoint:
        found = detect(checkpoint)
    path.unlink()

    assert (found.family, found.variant) == ("sdxl", "inpainting")


def test_adapters_in_diffusers_names_stay_as_they_are(tmp_path: Path) -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(2, 8),
        f"{name}.lora_B.weight": torch.ones(8, 2),
    }
    path = write_tensors(tmp_path / "lora.safetensors", tensors)

    assert_same(read_all(path), tensors)


def test_unknown_names_like_diffusers_stay_as_they_are(tmp_path: Path) -> None:
    tensors = {"down_blocks.0.mystery": torch.ones(2), "other": torch.ones(1)}
    path = write_tensors(tmp_path / "x.safetensors", tensors)

    assert_same(read_all(path), tensors)


def test_a_plan_reads_a_folder_through_headers_only(sd1: Tensors, tmp_path: Path) -> None:
    write_folder(tmp_path / "A", as_components("sd1", sd1))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ckptools: 1\nmodels: {A: A}\nmerge: A\noutput: {path: out.safetensors}\n")

    plan = make_plan(load_recipe(recipe))
    plan.close()

    assert plan.family.id == "sd1"
    assert plan.counts["copied"] == len(in_folder("sd1", sd1))
