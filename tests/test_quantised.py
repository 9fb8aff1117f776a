"""Quantised weights: told by what lies beside them, copied as they are, never calculated with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from models import model_values, shrunk, write_tensors
from safetensors.torch import load_file
from torch import Tensor

from ckptools.adapters.extract import extract
from ckptools.adapters.factors import Budget
from ckptools.convert import Request, convert
from ckptools.diff import compare
from ckptools.errors import CkptError, InputError, ManyErrors
from ckptools.quantised import quantised_in
from ckptools.recipe import load_recipe
from ckptools.tensors import TensorSpec
from ckptools.workflow import merge

Tensors = dict[str, Tensor]
FP8 = torch.float8_e4m3fn
LAYER = "model.diffusion_model.middle_block.0.emb_layers.1"
WHAT = "codes that are no numbers without their scales"


def specs_of(**dtypes: str) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, dtype, (4, 4)) for name, dtype in dtypes.items()}


@pytest.mark.parametrize(
    ("weights", "dtype", "scales", "words"),
    [
        ("m.weight", "F8_E4M3", ("m.scale_weight", "m.scale_input"), "scaled fp8"),
        ("m.weight", "F8_E4M3", ("m.weight_scale", "m.input_scale"), "scaled 8 or 4 bits"),
        ("m.weight", "F8_E4M3", ("m.weight_scale_inv",), "fp8 scaled in blocks"),
        ("m.weight", "U8", ("m.weight_scale", "m.weight_scale_2", "m.comfy_quant"),
         "scaled 8 or 4 bits"),
        ("m.weight", "U8", ("m.weight.absmax", "m.weight.quant_map",
                            "m.weight.quant_state.bitsandbytes__nf4"), "4 bits of bitsandbytes"),
        ("m.weight", "BF16", ("m.weight.absmax", "m.weight.quant_map"), "4 bits of bitsandbytes"),
        ("m.weight", "I8", ("m.SCB",), "8 bits of bitsandbytes"),
        ("m.qweight", "I32", ("m.qzeros", "m.scales", "m.g_idx"), "GPTQ or AWQ"),
        ("m.weight_packed", "I32", ("m.weight_shape", "m.weight_scale"), "packed integers"),
    ],
)  # fmt: skip
def test_every_format_is_told_by_its_scales(
    weights: str, dtype: str, scales: tuple[str, ...], words: str
) -> None:
    specs = {name: TensorSpec(name, "F32", (1,)) for name in (*scales, "m.bias", "n.weight")}
    specs[weights] = TensorSpec(weights, dtype, (4, 4))

    assert quantised_in(specs) == dict.fromkeys((weights, *scales), words)


@pytest.mark.parametrize(
    "specs",
    [
        specs_of(**{"m.weight": "F8_E4M3", "m.bias": "F16"}),  # fp8 as it is: numbers
        specs_of(**{"m.weight": "F16", "m.weight_scale": "F32"}),  # a layer with a scale of its own
        specs_of(**{"m.scale_weight": "F32"}),
        specs_of(**{"scales": "F32", "m.scales": "F32", "m.weight": "F16"}),
    ],
)
def test_plain_numbers_are_not_called_codes(specs: Mapping[str, TensorSpec]) -> None:
    assert quantised_in(specs) == {}


# --- what may be done with them ------------------------------------------------------------------


def plain(seed: int) -> Tensors:
    return model_values(shrunk("sd1", 64), seed=seed)


def scaled(seed: int) -> Tensors:
    """One layer of the UNet stored as ComfyUI's scaled fp8 is."""
    tensors = plain(seed)
    weight = tensors[f"{LAYER}.weight"].float()
    scale = weight.abs().max() / 448
    return tensors | {
        f"{LAYER}.weight": (weight / scale).to(FP8),
        f"{LAYER}.scale_weight": scale.reshape(1),
    }


def packed(seed: int) -> Tensors:
    """One layer of the UNet stored as bitsandbytes' nf4 is."""
    tensors = plain(seed)
    numel = tensors[f"{LAYER}.weight"].numel()
    return tensors | {
        f"{LAYER}.weight": torch.zeros(numel // 2, 1, dtype=torch.uint8),
        f"{LAYER}.weight.absmax": torch.ones(numel // 64 + 1),
        f"{LAYER}.weight.quant_map": torch.ones(16),
    }


def run(folder: Path, models: Mapping[str, Tensors], text: str) -> Tensors:
    lines = [f"  {name}: {name}.safetensors" for name in models]
    for name, tensors in models.items():
        write_tensors(folder / f"{name}.safetensors", tensors)
    path = folder / "recipe.yaml"
    path.write_text("\n".join(["ckptools: 1", "models:", *lines, text]))
    return load_file(merge(load_recipe(path)).output)


@pytest.mark.parametrize("make", [scaled, packed])
@pytest.mark.parametrize("quantised", ["A", "B", "AB"])
def test_codes_are_not_merged(
    make: Callable[[int], Tensors], quantised: str, tmp_path: Path
) -> None:
    models = {name: (make if name in quantised else plain)(seed) for seed, name in enumerate("AB")}

    with pytest.raises(CkptError, match=WHAT) as caught:
        run(tmp_path, models, "merge: A * 0.5 + B * 0.5\noutput: {path: o.safetensors}")
    errors = caught.value.errors if isinstance(caught.value, ManyErrors) else (caught.value,)
    assert [error.what[:10] for error in errors] == [f"model {name!r}:" for name in quantised]
    assert {error.fix for error in errors} == {"use the model's release in fp16 or bf16"}
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("make", [scaled, packed])
def test_codes_are_copied_with_their_scales(make: Callable[[int], Tensors], tmp_path: Path) -> None:
    """Where only other components are merged, and where the UNet is taken whole."""
    models = {"A": make(1), "B": make(2)}
    recipe = 'params: {M: {default: 0, text_encoder: 0.5}}\nmerge: "A * (1 - M) + B * M"\n'
    merged = run(tmp_path, models, recipe + "output: {path: o.safetensors}")
    taken = run(tmp_path, models, "merge: B\ntake: {unet: A}\noutput: {path: p.safetensors}")

    for result in (merged, taken):
        for name in (n for n in models["A"] if n.startswith(LAYER)):
            assert torch.equal(result[name].view(torch.uint8), models["A"][name].view(torch.uint8))


def test_codes_are_not_cast(tmp_path: Path) -> None:
    models = {"A": scaled(1), "B": plain(2)}
    with pytest.raises(InputError, match=WHAT):
        run(tmp_path, models, "merge: A\noutput: {path: o.safetensors, dtype: fp16}")
    output = "output: {path: o.safetensors, dtype: {unet: fp16}}"
    with pytest.raises(InputError, match=WHAT):
        run(tmp_path, models, f"merge: B\ntake: {{unet: A}}\n{output}")


def test_conversion_keeps_codes_or_refuses(tmp_path: Path) -> None:
    source = write_tensors(tmp_path / "A.safetensors", scaled(1))

    with pytest.raises(InputError, match=WHAT):
        convert(Request(source, tmp_path / "B.safetensors", dtypes={"default": "F32"}))
    assert not (tmp_path / "B.safetensors").exists()
    convert(Request(source, tmp_path / "C.safetensors", dtypes={"vae": "F32"}))
    assert load_file(tmp_path / "C.safetensors")[f"{LAYER}.weight"].dtype == FP8


def test_no_adapter_is_extracted_from_codes(tmp_path: Path) -> None:
    first = write_tensors(tmp_path / "A.safetensors", plain(1))
    second = write_tensors(tmp_path / "B.safetensors", scaled(2))

    with pytest.raises(InputError, match=WHAT):
        extract(first, second, tmp_path / "lora.safetensors", budget=Budget(rank=2))
    assert not (tmp_path / "lora.safetensors").exists()


def test_a_comparison_says_that_it_compared_codes(tmp_path: Path) -> None:
    first = write_tensors(tmp_path / "A.safetensors", plain(1))
    second = write_tensors(tmp_path / "B.safetensors", scaled(2))

    notes = compare(first, second).notes
    assert "B holds scaled fp8: its codes were compared, not the weights they mean" in notes
    assert "B" not in "".join(n for n in compare(first, first).notes if "codes" in n)
