"""`take`: a component of another model, or of a file of its own, under the result's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from models import layout, model_values, shrunk, write_tensors
from safetensors.torch import load_file
from torch import Tensor

import ckptools
from ckptools.errors import CkptError, ManyErrors
from ckptools.plan import make_plan
from ckptools.recipe import load_recipe
from ckptools.tensors import TensorSpec
from ckptools.workflow import MergeResult, merge
from ckptools.writer import PartFile, lay_out

TINY = Path(ckptools.__file__).parent / "tiny"
Tensors = dict[str, Tensor]
Files = Mapping[str, Tensors | Path]
TEXT = {
    "sd1": "cond_stage_model.transformer.",
    "sd2": "cond_stage_model.model.",
    "sdxl": "conditioner.embedders.0.transformer.",
}
TEXT_2 = "conditioner.embedders.1.model."
POSITION_IDS = "text_model.embeddings.position_ids"


def values(name: str, seed: int) -> Tensors:
    """A narrow model that is of its family without a text encoder too, by the width it reads."""
    return dict(_values(name, seed))


@cache
def _values(name: str, seed: int) -> Tensors:
    full = layout(name)
    specs = shrunk(name, 64)
    for tensor, spec in specs.items():
        if tensor.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            specs[tensor] = replace(spec, shape=(spec.shape[0], full[tensor].shape[1]))
    return model_values(specs, seed=seed)


def below(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The tensors under a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def without(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def recipe_of(folder: Path, files: Files, take: str) -> Path:
    lines = ["ckptools: 1", "models:"]
    for name, held in files.items():
        path = (
            held if isinstance(held, Path) else write_tensors(folder / f"{name}.safetensors", held)
        )
        lines.append(f'  {name}: "{path}"')
    lines += [f"merge: {next(iter(files))}", f"take: {take}"]
    path = folder / "recipe.yaml"
    path.write_text("\n".join([*lines, "output: {path: out.safetensors}"]))
    return path


def taken(
    folder: Path, files: Mapping[str, Tensors | Path], take: str
) -> tuple[Tensors, MergeResult]:
    result = merge(load_recipe(recipe_of(folder, files, take)))
    return load_file(result.output), result


def errors_of(folder: Path, files: Files, take: str) -> list[CkptError]:
    with pytest.raises(CkptError) as caught:
        make_plan(load_recipe(recipe_of(folder, files, take)))
    assert not (folder / "out.safetensors").exists()
    return list(caught.value.errors) if isinstance(caught.value, ManyErrors) else [caught.value]


def assert_same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)


def openclip_as_transformers(tensors: Mapping[str, Tensor]) -> Tensors:
    """OpenCLIP's text model under transformers' names, written out by hand."""
    plain = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }
    modules = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
               "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    made: Tensors = {}
    for name, tensor in tensors.items():
        if name in plain:
            made[plain[name]] = tensor
        elif name == "text_projection":
            made["text_projection.weight"] = tensor.T.contiguous()
        elif name.startswith("transformer.resblocks."):
            number, _, inner = name.removeprefix("transformer.resblocks.").partition(".")
            layer = f"text_model.encoder.layers.{number}."
            if inner.startswith("attn.in_proj_"):
                kind = inner.removeprefix("attn.in_proj_")
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    made[f"{layer}self_attn.{letter}_proj.{kind}"] = part.contiguous()
            else:
                module, _, kind = inner.rpartition(".")
                made[f"{layer}{modules[module]}.{kind}"] = tensor
    return made


# --- text encoders from files of their own -------------------------------------------------------

# How tools spell a text encoder's tensors, from transformers' names.
SPELLINGS: Mapping[str, Callable[[str], str]] = {
    "transformers": lambda name: name,
    "transformers 5": lambda name: name.removeprefix("text_model."),
    "a component of diffusers": lambda name: f"text_encoder.{name}",
    "ComfyUI": lambda name: f"text_encoders.clip_l.transformer.{name}",
    "ComfyUI, saved alone": lambda name: f"clip_l.transformer.{name}",
    "below cond_stage_model": lambda name: f"transformer.{name}",
    "a checkpoint's": lambda name: f"cond_stage_model.transformer.{name}",
}


@pytest.mark.parametrize("has_encoder", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_clip_encoder_goes_where_the_checkpoint_keeps_it(
    tmp_path: Path, spelling: str, has_encoder: bool
) -> None:
    """Whatever its tensors are called, and whether or not the base has an encoder."""
    base, other = values("sd1", 1), values("sd1", 2)
    spell = SPELLINGS[spelling]
    encoder = {spell(n): t for n, t in below(other, TEXT["sd1"]).items() if n != POSITION_IDS}
    rest = without(base, TEXT["sd1"])
    written, _ = taken(
        tmp_path, {"A": base if has_encoder else rest, "K": encoder}, "{text_encoder: K}"
    )

    expected = rest | {n: t for n, t in other.items() if n.startswith(TEXT["sd1"])}
    if not has_encoder:
        del expected[TEXT["sd1"] + POSITION_IDS]
    assert_same(written, expected)


@pytest.mark.parametrize("has_encoder", [True, False])
@pytest.mark.parametrize("names", ["openclip", "transformers"])
def test_sdxl_s_second_encoder_is_joined_from_either_layout(
    tmp_path: Path, names: str, has_encoder: bool
) -> None:
    base, other = values("sdxl", 1), values("sdxl", 2)
    encoder = below(other, TEXT_2)
    if names == "transformers":
        encoder = openclip_as_transformers(encoder)
    rest = without(base, TEXT_2)
    written, _ = taken(
        tmp_path, {"A": base if has_encoder else rest, "K": encoder}, "{text_encoder_2: K}"
    )

    expected = rest | {n: t for n, t in other.items() if n.startswith(TEXT_2)}
    scale = f"{TEXT_2}logit_scale"  # transformers keeps it elsewhere, and loaders do without
    if names == "transformers":
        expected.pop(scale)
        if has_encoder:
            expected[scale] = base[scale]
    assert_same(written, expected)


def test_both_encoders_of_sdxl_come_from_two_files(tmp_path: Path) -> None:
    base, other = values("sdxl", 1), values("sdxl", 2)
    files = {"A": base, "L": below(other, TEXT["sdxl"]), "G": below(other, TEXT_2)}
    written, result = taken(tmp_path, files, "{text_encoder: L, text_encoder_2: G}")

    encoders = {n: t for n, t in other.items() if n.startswith("conditioner.")}
    assert_same(written, base | encoders)
    assert not result.plan.warnings


def test_what_transformers_never_kept_of_sd2_stays_the_base_s(tmp_path: Path) -> None:
    """The 24th layer is never run; diffusers and transformers leave it out."""
    base, other = values("sd2", 1), values("sd2", 2)
    theirs = {
        name: tensor
        for name, tensor in openclip_as_transformers(below(other, TEXT["sd2"])).items()
        if ".23." not in name and not name.startswith("text_projection")
    }
    written, result = taken(tmp_path, {"A": base, "K": theirs}, "{text_encoder: K}")

    kept = {
        n for n in base if "resblocks.23." in n or n.endswith(("logit_scale", "text_projection"))
    }
    assert len(kept) == 14
    assert_same(written, {n: (base if n in kept or "cond_" not in n else other)[n] for n in base})
    assert any("14 tensors that K comes without, from A" in n for n in result.plan.notes)


def test_of_a_whole_clip_the_image_side_is_left_out_and_said(tmp_path: Path) -> None:
    base, other = values("sd1", 1), values("sd1", 2)
    clip = below(other, TEXT["sd1"]) | {
        "vision_model.embeddings.class_embedding": torch.zeros(4),
        "visual_projection.weight": torch.zeros(4, 4),
    }
    written, result = taken(tmp_path, {"A": base, "K": clip}, "{text_encoder: K}")

    assert_same(
        written, base | {n: t for n, t in other.items() if n.startswith("cond_stage_model.")}
    )
    assert any(
        "K: 2 tensors are no part of text_encoder: vision_model" in w for w in result.plan.warnings
    )


def hollow(path: Path, specs: Mapping[str, TensorSpec]) -> Path:
    """A file of full size that takes no room: all zeros."""
    with PartFile(lay_out(list(specs.values()), {}, path)) as part:
        part.commit()
    return path


def test_an_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    """At full width, where a base without an encoder has nothing of its own to compare with."""
    specs = {n: s for n, s in layout("sd1").items() if not n.startswith("cond_stage_model.")}
    wide = {
        (name := n.removeprefix(TEXT["sd1"])): replace(
            s, name=name, shape=tuple(1024 if size == 768 else size for size in s.shape)
        )
        for n, s in layout("sd1").items()
        if n.startswith(TEXT["sd1"])
    }
    files: Files = {
        "A": hollow(tmp_path / "A.safetensors", specs),
        "K": hollow(tmp_path / "K.safetensors", wide),
    }
    found = errors_of(tmp_path, files, "{text_encoder: K}")

    assert len(found) == 9  # the first of them, and how many more
    assert found[0].what == (
        "take: K is [77, 1024], text_encoder of Stable Diffusion 1.x is [77, 768]"
    )
    assert found[0].fix == "K is text encoder clip-h; take text_encoder from a model of one size"


# --- what a model has not ------------------------------------------------------------------------


def test_a_model_without_the_component_is_one_error(tmp_path: Path) -> None:
    """A bare UNet is no VAE: none of its tensors may pass for one."""
    unet = {n: t for n, t in values("sd1", 1).items() if n.startswith("model.diffusion_model.")}
    other = below({n: t + 1 for n, t in unet.items()}, "model.diffusion_model.")

    for base in (unet, values("sd1", 3)):
        (error,) = errors_of(tmp_path, {"A": base, "B": other}, "{vae: B}")
        assert error.what == "take: B has no vae; it is Stable Diffusion 1.x"
        assert error.fix == "take vae from a model that has one"


def test_a_file_of_unknown_kind_is_no_component(tmp_path: Path) -> None:
    junk = {"layer.0.weight": torch.zeros(3, 3), "layer.0.bias": torch.zeros(3)}
    base = without(values("sd1", 1), "first_stage_model.")

    (error,) = errors_of(tmp_path, {"A": base, "B": junk}, "{vae: B}")
    assert error.what == "take: B has no vae; it is unknown"


def test_an_empty_file_is_no_component(tmp_path: Path) -> None:
    (error,) = errors_of(tmp_path, {"A": values("sd1", 1), "K": {}}, "{text_encoder: K}")
    assert error.what == "take: K has no text_encoder; it is unknown"


def test_a_base_without_the_component_gets_all_of_it_or_nothing(tmp_path: Path) -> None:
    base, other = values("sd1", 1), values("sd1", 2)
    vae = below(other, "first_stage_model.")
    del vae["decoder.conv_out.bias"], vae["encoder.conv_in.weight"]
    found = errors_of(tmp_path, {"A": without(base, "first_stage_model."), "V": vae}, "{vae: V}")

    assert [error.what for error in found] == [
        "take: V has no 'first_stage_model.decoder.conv_out.bias'",
        "take: V has no 'first_stage_model.encoder.conv_in.weight'",
    ]


def test_what_the_taken_model_has_beyond_the_base_comes_with_it(tmp_path: Path) -> None:
    base, other = values("sd1", 1), values("sd1", 2)
    vae = {n: t for n, t in other.items() if n.startswith("first_stage_model.")}
    vae["first_stage_model.decoder.extra.weight"] = torch.ones(3)
    written, result = taken(tmp_path, {"A": base, "V": vae}, "{vae: V}")

    assert_same(written, base | vae)
    assert "vae: 1 of them A lacks" in result.plan.notes


# --- other spellings of a component --------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("has_vae", [True, False])
def test_a_vae_is_called_as_the_base_s_family_calls_it(
    tmp_path: Path, prefix: str, has_vae: bool
) -> None:
    """Flux checkpoints have vae., files of the VAE alone none or another beginning."""
    specs = shrunk("flux", 64)
    base, other = model_values(specs, seed=1), model_values(specs, seed=2)
    vae = {prefix + name: tensor for name, tensor in below(other, "vae.").items()}
    rest = without(base, "vae.")
    written, _ = taken(tmp_path, {"A": base if has_vae else rest, "V": vae}, "{vae: V}")

    assert_same(written, rest | {n: t for n, t in other.items() if n.startswith("vae.")})


def test_the_tiny_family_s_encoder_is_taken_from_a_file_of_its_own(tmp_path: Path) -> None:
    """Trained weights of another width: their names fit, and their sizes are their own."""
    base, other = load_file(TINY / "C.safetensors"), load_file(TINY / "B.safetensors")
    written, _ = taken(tmp_path, {"A": base, "K": below(other, TEXT["sd1"])}, "{text_encoder: K}")

    assert_same(written, base | {n: t for n, t in other.items() if n.startswith(TEXT["sd1"])})
