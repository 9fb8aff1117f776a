"""Adapters baked into models by a merge: every kind, exactly, or an error that says why not."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from kernels import portable_kernels
from models import UNET, Specs, shrunk, with_channels, write_model, write_tensors
from safetensors.torch import load_file
from torch import Tensor

import ckptools.evaluation
import ckptools.plain
from ckptools.cli import run
from ckptools.errors import CkptError, InputError, ManyErrors, NonFiniteError, RecipeError
from ckptools.lora import bake_bias, bake_weight, group, scale_of
from ckptools.native import KERNELS
from ckptools.plan import Plan, Step, make_plan
from ckptools.recipe import load_recipe
from ckptools.sources import open_checkpoint
from ckptools.workflow import merge

Tensors = dict[str, Tensor]
Parts = dict[str, Tensor]
CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model."
NOISE = 4e-6  # of the largest magnitude: what fp32 sums lose before the one rounding


# --- helpers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Narrow models: A, B and C are SD1, I is SD1 inpainting, D is SD2, X is SDXL."""
    folder = tmp_path_factory.mktemp("models")
    specs = {name: shrunk("sd1") for name in "ABC"}
    specs |= {"I": with_channels(shrunk("sd1"), 9), "D": shrunk("sd2"), "X": shrunk("sdxl")}
    return {
        name: write_model(folder / f"{name}.safetensors", spec, seed=seed)
        for seed, (name, spec) in enumerate(specs.items(), 1)
    }


def noise(*shape: int, seed: int = 0, size: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator) * size


def lora(stem: str, rows: int, columns: int, *, rank: int = 2, seed: int = 0) -> Tensors:
    """A plain LoRA with alpha 1."""
    return {
        f"{stem}.lora_up.weight": noise(rows, rank, seed=seed),
        f"{stem}.lora_down.weight": noise(rank, columns, seed=seed + 1),
        f"{stem}.alpha": torch.tensor(1.0),
    }


def adapter(folder: Path, tensors: Tensors, name: str = "lora") -> Path:
    return write_tensors(folder / f"{name}.safetensors", tensors)


def recipe_file(folder: Path, sources: Mapping[str, Path], merge_line: str, **more: object) -> Path:
    """A recipe as JSON, which is YAML, too."""
    document: dict[str, object] = {
        "ckptools": 1,
        "models": {name: str(path) for name, path in sources.items()},
        "merge": merge_line,
        "output": {},
    }
    document |= more
    document["output"] = {"path": "out.safetensors", "overwrite": True} | dict(document["output"])
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(document, indent=1, default=str))
    return path


def baked(
    folder: Path, sources: Mapping[str, Path], merge_line: str = "A", *, threads: int = 2,
    **more: object,
) -> Tensors:  # fmt: skip
    """The tensors that a recipe gives."""
    result = merge(load_recipe(recipe_file(folder, sources, merge_line, **more)), threads=threads)
    return load_file(result.output)


def planned(folder: Path, sources: Mapping[str, Path], merge_line: str, **more: object) -> Plan:
    plan = make_plan(load_recipe(recipe_file(folder, sources, merge_line, **more)))
    plan.close()
    return plan


def step_of(plan: Plan, tensor: str) -> Step:
    return next(step for step in plan.steps if step.spec.name == tensor)


def errors_of(folder: Path, sources: Mapping[str, Path], merge_line: str = "A",
              **more: object) -> tuple[CkptError, ...]:  # fmt: skip
    """What stands in the way, from planning to the last byte."""
    with pytest.raises(CkptError) as caught:
        baked(folder, sources, merge_line, **more)
    assert not (folder / "out.safetensors").exists()
    return caught.value.errors if isinstance(caught.value, ManyErrors) else (caught.value,)


def line_of(folder: Path, text: str) -> str:
    """ "recipe.yaml:7", the first line with a text."""
    path = folder / "recipe.yaml"
    number = next(n for n, line in enumerate(path.read_text().splitlines(), 1) if text in line)
    return f"{path}:{number}"


def assert_rounded(found: Tensor, exact: Tensor, *, noise_of: float = 1.0) -> None:
    """Found is the exact value rounded once: off by half a unit at most, but for fp32's noise."""
    assert found.shape == exact.shape
    exact = exact.double()
    info = torch.finfo(found.dtype)
    _, exponent = torch.frexp(exact.clamp(min=-info.max, max=info.max))
    unit = torch.ldexp(torch.full_like(exact, info.eps), exponent - 1)
    unit = unit.clamp(min=info.smallest_normal * info.eps)
    allowed = unit / 2 + NOISE * noise_of * float(exact.abs().max())
    if found.dtype == torch.float32:
        allowed = unit / 2 * (1 + 1e-6)
    assert bool(((found.double() - exact).abs() <= allowed).all())


def untouched(result: Tensors, model: Path, *changed: str) -> None:
    """All but these tensors are the model's, to the bit."""
    before = load_file(model)
    assert result.keys() == before.keys()
    different = {
        name
        for name, tensor in before.items()
        if result[name].dtype != tensor.dtype
        or result[name].numpy().tobytes() != tensor.numpy().tobytes()
    }
    assert different == set(changed)


def oracle(path: Path, stem: str, weight: Tensor, *, strength: float = 1.0, dora: str = "trained",
           bias: bool = False) -> Tensor:  # fmt: skip
    """One module's work on a whole tensor, in fp64."""
    tensors = load_file(path)
    with open_checkpoint(path) as opened:
        module = group(opened, opened.metadata).modules[stem]
    parts = {
        part: tensors[name].double() if tensors[name].is_floating_point() else tensors[name]
        for part, name in module.arrays.items()
    }
    numbers = {part: float(tensors[module.parts[part]]) for part in module.numbers}
    scale = scale_of(module, numbers)
    if bias:
        return bake_bias(module, weight.double(), parts, scale=scale, strength=strength)
    return bake_weight(
        module, weight.double(), parts, scale=scale, strength=strength, dora=dora
    )  # fmt: skip


# --- every kind ----------------------------------------------------------------------------------

# Weights of the narrow UNet: attn1 is (10, 10), attn2's k and v are (10, 24).
ATTN = "input_blocks.1.1.transformer_blocks.0."
CONV = "input_blocks.1.0.in_layers.2"  # (10, 10, 3, 3), with a bias
Q = f"{ATTN}attn1.to_q"
K = f"{ATTN}attn2.to_k"
FF = f"{ATTN}ff.net.2"  # (10, 40), with a bias

KINDS: dict[str, tuple[str, Parts]] = {
    "lora": (K, {"lora_up.weight": noise(10, 2), "lora_down.weight": noise(2, 24),
                 "alpha": torch.tensor(1.0)}),
    "lora-conv1": (f"{ATTN[:-21]}proj_in", {"lora_up.weight": noise(10, 2, 1, 1),
                                            "lora_down.weight": noise(2, 10, 1, 1)}),
    "locon": (CONV, {"lora_up.weight": noise(10, 2, 1, 1), "lora_down.weight": noise(2, 10, 3, 3),
                     "alpha": torch.tensor(4.0)}),
    "tucker": (CONV, {"lora_up.weight": noise(10, 2, 1, 1), "lora_down.weight": noise(2, 10, 1, 1),
                      "lora_mid.weight": noise(2, 2, 3, 3), "alpha": torch.tensor(1.0)}),
    "lora-bias": (FF, {"lora_A.weight": noise(2, 40), "lora_B.weight": noise(10, 2),
                       "lora_B.bias": noise(10)}),
    "loha": (K, {"hada_w1_a": noise(10, 2), "hada_w1_b": noise(2, 24), "hada_w2_a": noise(10, 2),
                 "hada_w2_b": noise(2, 24), "alpha": torch.tensor(1.0)}),
    "loha-tucker": (CONV, {"hada_t1": noise(2, 2, 3, 3), "hada_w1_a": noise(2, 10),
                           "hada_w1_b": noise(2, 10), "hada_t2": noise(2, 2, 3, 3, seed=1),
                           "hada_w2_a": noise(2, 10), "hada_w2_b": noise(2, 10),
                           "alpha": torch.tensor(2.0)}),
    "lokr": (K, {"lokr_w1": noise(2, 4), "lokr_w2_a": noise(5, 2), "lokr_w2_b": noise(2, 6),
                 "alpha": torch.tensor(1.0)}),
    "lokr-whole": (K, {"lokr_w1": noise(5, 3), "lokr_w2": noise(2, 8),
                       "alpha": torch.tensor(7e9)}),
    "lokr-conv": (CONV, {"lokr_w1": noise(2, 2), "lokr_w2": noise(5, 5, 3, 3)}),
    "ia3-out": (K, {"weight": noise(10, 1), "on_input": torch.tensor(False)}),
    "ia3-in": (K, {"weight": noise(1, 24), "on_input": torch.tensor(True)}),
    "ia3-peft": (FF, {"ia3_l": 1 + noise(1, 40)}),
    "glora": (K, {"a1.weight": noise(24, 2), "a2.weight": noise(2, 24), "b1.weight": noise(10, 2),
                  "b2.weight": noise(2, 24), "alpha": torch.tensor(1.0)}),
    "glora-old": (K, {"a1.weight": noise(2, 24), "a2.weight": noise(24, 2),
                      "b1.weight": noise(2, 24), "b2.weight": noise(10, 2)}),
    "diff": (FF, {"diff": noise(10, 40), "diff_b": noise(10)}),
    "diff-b-alone": (FF, {"diff_b": noise(10)}),
    "norm": ("input_blocks.1.0.in_layers.0", {"w_norm": noise(10), "b_norm": noise(10)}),
    "oft": (K, {"oft_blocks": noise(2, 5, 5), "alpha": torch.tensor(0.001)}),
    "oft-conv": (CONV, {"oft_blocks": noise(5, 2, 2), "rescale": 1 + noise(10, 1, 1, 1)}),
    "oft-diag": (Q, {"oft_diag": torch.eye(5).repeat(2, 1, 1) + noise(2, 5, 5)}),
    "boft": (Q, {"oft_blocks": noise(1, 5, 2, 2)}),
    "dora-rows": (K, {"lora_up.weight": noise(10, 2), "lora_down.weight": noise(2, 24),
                      "dora_scale": 1 + noise(10, 1)}),
    "dora-columns": (K, {"lora_up.weight": noise(10, 2), "lora_down.weight": noise(2, 24),
                         "dora_scale": 1 + noise(1, 24)}),
    "dora-peft": (K, {"lora_A.weight": noise(2, 24), "lora_B.weight": noise(10, 2),
                      "lora_magnitude_vector": 1 + noise(10)}),
    "set-weight": (K, {"set_weight": noise(10, 24)}),
}  # fmt: skip


@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_does_what_its_mathematics_says(
    kind: str, strength: float, models: dict[str, Path], tmp_path: Path
) -> None:
    layer, parts = KINDS[kind]
    stem = f"lora_unet_{layer.replace('.', '_')}"
    path = adapter(tmp_path, {f"{stem}.{part}": tensor for part, tensor in parts.items()})
    before = load_file(models["A"])
    weight, bias = f"{UNET}{layer}.weight", f"{UNET}{layer}.bias"
    changes_bias = bool({"lora_B.bias", "diff_b", "b_norm"} & parts.keys())
    changes_weight = kind != "diff-b-alone"

    result = baked(tmp_path, models_of(models, "A"), loras=[{"path": path, "weight": strength}])

    if changes_weight:
        exact = oracle(path, stem, before[weight], strength=strength)
        assert float((exact - before[weight].double()).abs().max()) > 0.01
        assert_rounded(result[weight], exact)
    if changes_bias:
        exact = oracle(path, stem, before[bias], strength=strength, bias=True)
        assert float((exact - before[bias].double()).abs().max()) > 0.01
        assert_rounded(result[bias], exact)
    untouched(result, models["A"], *[weight] * changes_weight, *[bias] * changes_bias)


def models_of(models: Mapping[str, Path], names: str) -> dict[str, Path]:
    return {name: models[name] for name in names}


@pytest.mark.parametrize("kind", ["dora-rows", "dora-columns"])
def test_dora_may_be_read_as_comfyui_reads_it(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Only where the magnitude belongs to rows do the readings differ."""
    layer, parts = KINDS[kind]
    stem = f"lora_unet_{layer.replace('.', '_')}"
    path = adapter(tmp_path, {f"{stem}.{part}": tensor for part, tensor in parts.items()})
    before = load_file(models["A"])[f"{UNET}{layer}.weight"]

    found = {
        reading: baked(tmp_path, models_of(models, "A"), loras=[{"path": path, "dora": reading}])
        for reading in ("trained", "comfy")
    }

    tensors = {reading: result[f"{UNET}{layer}.weight"] for reading, result in found.items()}
    assert torch.equal(*tensors.values()) == (kind == "dora-columns")
    for reading, tensor in tensors.items():
        assert_rounded(tensor, oracle(path, stem, before, dora=reading))


SCHEMES = {
    "sd1": ("A", f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_v.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"),
    "sd1-text": ("A", f"{CLIP}encoder.layers.3.mlp.fc1.weight",
                 "text_encoder.text_model.encoder.layers.3.mlp.fc1"),
    "sd2": ("D", f"{UNET}output_blocks.5.1.proj_in.weight",
            "unet.up_blocks.1.attentions.2.proj_in"),
    "sd2-text": ("D", f"{OPEN_CLIP}transformer.resblocks.2.mlp.c_proj.weight",
                 "text_encoder.text_model.encoder.layers.2.mlp.fc2"),
    "sdxl": ("X", f"{UNET}input_blocks.7.1.transformer_blocks.9.ff.net.0.proj.weight",
             "unet.down_blocks.2.attentions.0.transformer_blocks.9.ff.net.0.proj"),
    "sdxl-text-1": ("X", "conditioner.embedders.0.transformer.text_model.encoder.layers.3.mlp."
                    "fc1.weight", "text_encoder.text_model.encoder.layers.3.mlp.fc1"),
    "sdxl-text-2": ("X", "conditioner.embedders.1.model.transformer.resblocks.4.mlp.c_fc.weight",
                    "text_encoder_2.text_model.encoder.layers.4.mlp.fc1"),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEMES)
def test_a_plain_lora_is_w_plus_scale_up_down(
    case: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Against algebra of its own, in numpy, under PEFT's names."""
    model, tensor, module = SCHEMES[case]
    before = load_file(models[model])[tensor]
    rows, columns = before.shape[0], before.numel() // before.shape[0]
    up, down = noise(rows, 3), noise(3, columns, seed=5)
    path = adapter(tmp_path, {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up})

    result = baked(tmp_path, models_of(models, model), model,
                   loras=[{"path": path, "weight": 0.75}])  # fmt: skip

    change = 0.75 * up.numpy().astype(np.float64) @ down.numpy().astype(np.float64)
    exact = before.numpy().astype(np.float64) + change.reshape(before.shape)
    assert_rounded(result[tensor], torch.from_numpy(exact))
    untouched(result, models[model], tensor)


@pytest.mark.skipif(KERNELS is None, reason="built without a C compiler")
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_a_lora_is_the_same_by_kernels_and_nearly_so_by_torch(
    dtype: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler, or a processor that fuses, torch makes the products in its own order."""
    _, tensor, module = SCHEMES["sd1"]
    before = load_file(models["A"])[tensor]
    down, up = noise(3, before.shape[1], seed=5), noise(before.shape[0], 3)
    path = adapter(tmp_path, {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up})
    unfused = copy(KERNELS)
    assert unfused is not None
    unfused.fuses = False
    found = []
    for kernels in (KERNELS, portable_kernels(), unfused, None):
        for user in (ckptools.plain, ckptools.evaluation):
            monkeypatch.setattr(user, "KERNELS", kernels)
        found.append(
            baked(tmp_path, {name: models[name] for name in "AB"}, "A * 0.4 + B * 0.6",
                  loras=[{"path": path, "weight": 0.75}], output={"dtype": dtype})[tensor]
        )  # fmt: skip

    one, two = (load_file(models[name])[tensor].double() for name in "AB")
    exact = one * 0.4 + two * 0.6 + 0.75 * up.double() @ down.double()
    for result in found:
        assert_rounded(result, exact)
    assert torch.equal(found[0], found[1])


@pytest.mark.skipif(KERNELS is None or not KERNELS.fuses, reason="no kernels for LoRAs here")
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_plain_lora_is_baked_without_torch(
    dtype: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Where the output is fp32, and with it the arithmetic fp64, torch does it."""
    _, tensor, module = SCHEMES["sd1"]
    before = load_file(models["A"])[tensor]
    down, up = noise(3, before.shape[1]), noise(before.shape[0], 3)
    path = adapter(tmp_path, {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up})
    recipe = recipe_file(tmp_path, models_of(models, "A"), "A", loras=[str(path)],
                         output={"dtype": dtype})  # fmt: skip
    script = (
        "import sys; from pathlib import Path; from ckptools.recipe import load_recipe\n"
        "from ckptools.workflow import merge; merge(load_recipe(Path(sys.argv[1])))\n"
        "print('torch' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, str(recipe)], check=True, capture_output=True, text=True
    )

    assert done.stdout == f"{dtype == 'fp32'}\n"


# --- fused, transposed, reshaped -----------------------------------------------------------------


@pytest.mark.parametrize("given", ["q", "k", "v", "kv", "qkv"])
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_fused_in_proj_takes_each_of_q_k_and_v(
    given: str, decomposed: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    """q, k and v are modules of their own to trainers: a DoRA's norms are over each alone."""
    tensor = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    before = load_file(models["X"])[tensor]
    width = before.shape[1]
    stem = "lora_te2_text_model_encoder_layers_1_self_attn_{}_proj".format
    tensors: Tensors = {}
    for letter in given:
        tensors |= lora(stem(letter), width, width, seed=ord(letter))
        if decomposed:
            tensors[f"{stem(letter)}.dora_scale"] = 1 + noise(1, width)
    path = adapter(tmp_path, tensors)

    result = baked(tmp_path, models_of(models, "X"), "X", loras=[str(path)])

    exact = before.double()
    for letter in given:
        rows = slice("qkv".index(letter) * width, ("qkv".index(letter) + 1) * width)
        exact[rows] = oracle(path, stem(letter), before[rows])
    assert_rounded(result[tensor], exact)
    untouched(result, models["X"], tensor)
    for position, letter in enumerate("qkv"):
        if letter not in given:  # rows that no module is for keep their bytes
            rows = slice(position * width, (position + 1) * width)
            assert torch.equal(result[tensor][rows], before[rows])


@pytest.mark.parametrize("by_kernels", [True, False])
def test_rows_that_no_module_is_for_keep_the_signs_of_their_zeros(
    by_kernels: bool,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not by_kernels:
        for user in (ckptools.plain, ckptools.evaluation):
            monkeypatch.setattr(user, "KERNELS", None)
    tensor = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    tensors = load_file(models["X"])
    tensors[tensor][:, ::2] = -0.0
    tensors[tensor][:, 1::4] = 0.0
    model = write_tensors(tmp_path / "zeros.safetensors", tensors)
    width = tensors[tensor].shape[1]
    stem = "lora_te2_text_model_encoder_layers_1_self_attn_k_proj"
    path = adapter(tmp_path, lora(stem, width, width))

    result = baked(tmp_path, {"X": model}, "X", loras=[str(path)])[tensor]

    for rows in (slice(0, width), slice(2 * width, 3 * width)):
        assert result[rows].numpy().tobytes() == tensors[tensor][rows].numpy().tobytes()
    assert not torch.equal(result, tensors[tensor])


def test_the_transposed_text_projection_takes_a_transposed_change(
    models: dict[str, Path], tmp_path: Path
) -> None:
    tensor = "conditioner.embedders.1.model.text_projection"
    before = load_file(models["X"])[tensor]
    path = adapter(tmp_path, lora("lora_te2_text_projection", *before.shape))

    result = baked(tmp_path, models_of(models, "X"), "X", loras=[str(path)])

    assert_rounded(result[tensor], oracle(path, "lora_te2_text_projection", before.T).T)
    untouched(result, models["X"], tensor)


# --- weights and order ---------------------------------------------------------------------------

STEM_K = f"lora_unet_{K.replace('.', '_')}"
TENSOR_K = f"{UNET}{K}.weight"
KOHYA_TEXT = "lora_te_text_model_encoder_layers_3_mlp_fc1"
TEXT = f"{CLIP}encoder.layers.3.mlp.fc1.weight"
OUT = f"{UNET}output_blocks.9.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("flux") / "F.safetensors", shrunk("flux", 64), seed=4
    )


HALVES: dict[str, Parts] = {
    "lora": {"lora_up.weight": noise(96, 2), "lora_down.weight": noise(2, 48)},
    "dora": {"lora_up.weight": noise(96, 2), "lora_down.weight": noise(2, 48),
             "dora_scale": 1 + noise(1, 48)},
    "oft": {"oft_blocks": noise(2, 48, 48, size=0.05)},
    "boft": {"oft_blocks": noise(2, 24, 4, 4, size=0.05)},  # mixes rows of both halves
    "diff": {"diff": noise(96, 48), "diff_b": noise(96)},
}  # fmt: skip


@pytest.mark.parametrize("kind", HALVES)
def test_a_weight_whose_halves_diffusers_swaps_is_changed_as_diffusers_has_it(
    kind: str, flux: Path, tmp_path: Path
) -> None:
    stem = "transformer.norm_out.linear"
    tensor = f"{UNET}final_layer.adaLN_modulation.1"
    path = adapter(tmp_path, {f"{stem}.{part}": t for part, t in HALVES[kind].items()})
    before = load_file(flux)
    changed = [f"{tensor}.weight", *[f"{tensor}.bias"] * ("diff_b" in HALVES[kind])]

    result = baked(tmp_path, {"F": flux}, "F", loras=[{"path": path, "weight": 0.7}])

    for name in changed:
        swapped = before[name].roll(48, 0)  # rows of shift, then scale; diffusers: scale first
        exact = oracle(path, stem, swapped, strength=0.7, bias=name.endswith("bias")).roll(48, 0)
        assert float((exact - before[name].double()).abs().max()) > 0.01
        assert_rounded(result[name], exact)
    untouched(result, flux, *changed)


def wide_lora(folder: Path, models: Mapping[str, Path], name: str = "lora", seed: int = 0) -> Path:
    """A LoRA for a block at either end of the UNet, and for the text encoder."""
    shapes = {key: tuple(t.shape) for key, t in load_file(models["A"]).items()}
    out = "lora_unet_output_blocks_9_1_transformer_blocks_0_attn2_to_k"
    tensors = lora(STEM_K, *shapes[TENSOR_K], seed=seed)
    tensors |= lora(out, *shapes[OUT], seed=seed + 2)
    return adapter(folder, tensors | lora(KOHYA_TEXT, *shapes[TEXT], seed=seed + 4), name)


def test_an_adapter_needs_weights_where_it_has_modules_and_nowhere_else(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = wide_lora(tmp_path, models)
    sources = models_of(models, "A")

    (error,) = errors_of(tmp_path, sources, loras=[{"path": path, "weight": {"unet": 0.5}}])
    assert error.what == f"param 'loras[0].weight': no value for {TEXT}"
    assert error.fix == "add `default:`, or a line for text_encoder"

    weight = {"unet": 0.5, "text_encoder": 0.5, "vae": 0.5, "IN00": 0.1}
    notes = planned(tmp_path, sources, "A", loras=[{"path": path, "weight": weight}]).notes
    idle = [note.split(": ", 1)[1] for note in notes if "has no say" in note]
    assert idle == [
        "'vae' has no say: loras[0] changes nothing there",
        "'IN00' has no say: loras[0] changes nothing there",
    ]


def test_the_command_line_may_set_an_adapters_weight(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = wide_lora(tmp_path, models)
    recipe = recipe_file(tmp_path, models_of(models, "A"), "A", loras=[{"path": path, "weight": 1}])

    loaded = load_recipe(recipe, overrides={"loras[0].weight": 0.25})
    result = load_file(merge(loaded).output)

    before = load_file(models["A"])
    assert_rounded(result[OUT], oracle(path, STEMS[OUT], before[OUT], strength=0.25))


STEMS = {
    TENSOR_K: STEM_K,
    OUT: "lora_unet_output_blocks_9_1_transformer_blocks_0_attn2_to_k",
    TEXT: KOHYA_TEXT,
}


@pytest.mark.parametrize(
    ("weight", "wanted"),
    [
        ({"default": 0.5}, {TENSOR_K: 0.5, OUT: 0.5, TEXT: 0.5}),
        ({"default": 0.8, "text_encoder": 0.25}, {TENSOR_K: 0.8, OUT: 0.8, TEXT: 0.25}),
        ({"default": 0, "OUT03-OUT11": -1}, {OUT: -1.0}),
        ({"default": 0, "*input_blocks.1.1*attn2*": 2}, {TENSOR_K: 2.0}),
        ({"mbw": [0.5] + [0.0] * 12 + [0.1] * 13}, {OUT: 0.1, TEXT: 0.5}),
        ({"unet": 0.5, "text_encoder": 0.25}, {TENSOR_K: 0.5, OUT: 0.5, TEXT: 0.25}),
    ],
)
def test_weights_go_by_component_block_and_glob(
    weight: object, wanted: dict[str, float], models: dict[str, Path], tmp_path: Path
) -> None:
    path = wide_lora(tmp_path, models)
    before = load_file(models["A"])

    result = baked(tmp_path, models_of(models, "A"), loras=[{"path": path, "weight": weight}])

    untouched(result, models["A"], *wanted)
    for tensor, strength in wanted.items():
        assert_rounded(
            result[tensor], oracle(path, STEMS[tensor], before[tensor], strength=strength)
        )


def test_an_adapter_of_weight_zero_changes_no_byte_and_that_is_told(
    models: dict[str, Path], tmp_path: Path
) -> None:
    loras = [{"path": wide_lora(tmp_path, models), "weight": 0}]

    result = baked(tmp_path, models_of(models, "A"), loras=loras)
    plan = planned(tmp_path, models_of(models, "A"), "A", loras=loras)

    untouched(result, models["A"])
    assert {step.action for step in plan.steps} <= {"copied", "carried"}
    assert (
        "loras[0] changes nothing: its weight is 0 for all that it has modules for" in plan.warnings
    )


def test_untouched_tensors_are_copied_as_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    plan = planned(tmp_path, models_of(models, "A"), "A", loras=[str(wide_lora(tmp_path, models))])

    assert plan.counts["merged"] == 3
    assert plan.counts["cast"] == 0
    assert {step.spec.name for step in plan.steps if step.action == "merged"} == set(STEMS)


def test_additive_adapters_commute(models: dict[str, Path], tmp_path: Path) -> None:
    one = wide_lora(tmp_path, models, "one")
    two = wide_lora(tmp_path, models, "two", seed=50)
    before = load_file(models["A"])
    results = [
        baked(tmp_path, models_of(models, "A"),
              loras=[{"path": path, "weight": w} for path, w in order])
        for order in ([(one, 0.5), (two, 0.7)], [(two, 0.7), (one, 0.5)])
    ]  # fmt: skip

    for tensor, stem in STEMS.items():
        exact = oracle(one, stem, before[tensor], strength=0.5)
        exact = oracle(two, stem, exact, strength=0.7)
        for result in results:
            assert_rounded(result[tensor], exact)


def test_adapters_that_read_the_weight_are_baked_in_order(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """A LoRA before an OFT is turned with the weight; after it, it is not."""
    oft = adapter(tmp_path, {f"{STEM_K}.oft_blocks": noise(2, 5, 5)}, "oft")
    plain = adapter(tmp_path, lora(STEM_K, 10, 24), "plain")
    before = load_file(models["A"])[TENSOR_K]
    found = []
    for order in ((oft, plain), (plain, oft)):
        result = baked(tmp_path, models_of(models, "A"), loras=[str(path) for path in order])
        exact = before
        for path in order:
            exact = oracle(path, STEM_K, exact)
        assert_rounded(result[TENSOR_K], exact)
        found.append(result[TENSOR_K])

    assert float((found[0] - found[1]).abs().max()) > 0.01


# --- on top of merges ----------------------------------------------------------------------------


def test_adapters_go_on_top_of_a_merge_with_one_rounding(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = wide_lora(tmp_path, models)
    a, b, c = (load_file(models[name]) for name in "ABC")

    result = baked(tmp_path, models_of(models, "ABC"), "A + (B - C) * M", params={"M": 0.7},
                   loras=[{"path": path, "weight": 0.5}])  # fmt: skip

    for tensor in a:
        if a[tensor].is_floating_point() and tensor in STEMS:
            merged = a[tensor].double() + 0.7 * (b[tensor].double() - c[tensor].double())
            assert_rounded(result[tensor], oracle(path, STEMS[tensor], merged, strength=0.5))


def test_bake_in_formulas_and_lets_is_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    sources = models_of(models, "ABC") | {"L": wide_lora(tmp_path, models)}
    loras = [{"path": sources["L"], "weight": 0.5}]

    listed = baked(tmp_path, models_of(models, "ABC"), "A + (B - C) * 0.7", loras=loras)
    called = baked(tmp_path, sources, "bake(A + (B - C) * 0.7, L, weight=w / 2)", params={"w": 1})
    named = baked(tmp_path, sources, "styled + (B - C) * 0.7", let={"styled": "bake(A, L, 0.5)"})

    for tensor, value in listed.items():
        assert torch.equal(value, called[tensor])
        assert torch.equal(value, named[tensor])


def test_the_difference_that_an_adapter_makes_can_be_taken(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """bake(B, L) - B is a difference: what is left of it is the adapter's delta."""
    path = wide_lora(tmp_path, models)
    before = load_file(models["A"])

    result = baked(tmp_path, models_of(models, "AB") | {"L": path}, "A + (bake(B, L) - B) * 0.5")

    for tensor, stem in STEMS.items():
        assert_rounded(result[tensor], oracle(path, stem, before[tensor], strength=0.5))
    untouched(result, models["A"], *STEMS)


@pytest.mark.parametrize("kind", ["lora", "oft"])
def test_adapters_go_on_and_into_methods(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    _, parts = KINDS[kind]
    path = adapter(tmp_path, {f"{STEM_K}.{part}": tensor for part, tensor in parts.items()})
    sources = models_of(models, "AB") | {"L": path}
    a, b = (load_file(models[name])[TENSOR_K] for name in "AB")

    on_top = baked(tmp_path, sources, "bake(slerp(A, B, t=0.4), L)")[TENSOR_K]
    inside = baked(tmp_path, sources, "slerp(bake(A, L), B, t=0.4)")[TENSOR_K]

    assert_rounded(on_top, oracle(path, STEM_K, slerp(a, b, 0.4)), noise_of=10)
    assert_rounded(inside, slerp(oracle(path, STEM_K, a), b, 0.4), noise_of=10)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Along the sphere by the angle of the directions, lengths by weighted sum."""
    a, b = a.double(), b.double()
    one, two = a / a.norm(), b / b.norm()
    angle = torch.arccos((one * two).sum())
    between = (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * two) / torch.sin(angle)
    return between * ((1 - t) * a.norm() + t * b.norm())


CONV_IN = f"{UNET}input_blocks.0.0.weight"


def conv_in_lora(folder: Path, channels: int, name: str = "lora") -> Path:
    return adapter(folder, {
        "lora_unet_conv_in.lora_up.weight": noise(10, 2, 1, 1),
        "lora_unet_conv_in.lora_down.weight": noise(2, channels, 3, 3),
    }, name)  # fmt: skip


def test_a_change_of_four_channels_goes_to_the_first_four_of_nine(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = conv_in_lora(tmp_path, 4)
    before = load_file(models["I"])[CONV_IN]

    result = baked(tmp_path, models_of(models, "I"), "I", loras=[{"path": path, "weight": 0.5}])

    exact = oracle(path, "lora_unet_conv_in", before[:, :4], strength=0.5)
    assert_rounded(result[CONV_IN][:, :4], exact)
    assert torch.equal(result[CONV_IN][:, 4:], before[:, 4:])
    untouched(result, models["I"], CONV_IN)


@pytest.mark.parametrize("formula", ["A + (I - C)", "I + (A - C)"])
@pytest.mark.parametrize("channels", [4, 9])
def test_adapters_go_into_a_model_that_is_widened(
    formula: str, channels: int, models: dict[str, Path], tmp_path: Path
) -> None:
    path = conv_in_lora(tmp_path, channels)
    tensors = {name: load_file(models[name])[CONV_IN].double() for name in "AIC"}

    result = baked(tmp_path, models_of(models, "AIC"), formula,
                   loras=[{"path": path, "weight": 0.5}])  # fmt: skip

    exact = tensors["I"].clone()
    exact[:, :4] += tensors["A"] - tensors["C"]
    changed = oracle(path, "lora_unet_conv_in", exact[:, :channels], strength=0.5)
    assert_rounded(result[CONV_IN], torch.cat([changed, exact[:, channels:]], 1))


def test_a_change_of_all_channels_that_reads_the_weight_is_refused_where_it_is_widened(
    models: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(conv_in_lora(tmp_path, 9))
    path = adapter(tmp_path, tensors | {"lora_unet_conv_in.dora_scale": torch.ones(10, 1, 1, 1)})

    (error,) = errors_of(tmp_path, models_of(models, "AIC"), "A + (I - C)", loras=[str(path)])

    assert error.what == "loras[0] changes all 9 input channels, of which only 4 are merged"
    assert error.where == CONV_IN
    assert "second recipe" in error.fix


def test_a_change_of_nine_channels_does_not_fit_a_model_of_four(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = conv_in_lora(tmp_path, 9)

    (error,) = errors_of(tmp_path, models_of(models, "A"), loras=[str(path)])

    assert "the adapter is for 10 x 81, the weight is 10 x 36" in error.what
    assert error.where == f"{line_of(tmp_path, str(path))}: lora_unet_conv_in"


def test_what_another_model_lacks_is_the_bases_with_the_adapter(
    models: dict[str, Path], tmp_path: Path
) -> None:
    tensors = {k: v for k, v in load_file(models["B"]).items() if k not in (TENSOR_K, OUT)}
    sources = {"A": models["A"], "B": write_tensors(tmp_path / "B.safetensors", tensors)}
    path = adapter(tmp_path, lora(STEM_K, 10, 24))
    a = load_file(models["A"])

    result = baked(tmp_path, sources, "A * 0.5 + B * 0.5", loras=[str(path)])
    plan = planned(tmp_path, sources, "A * 0.5 + B * 0.5", loras=[str(path)])
    (error, _) = errors_strict(tmp_path, sources, "A * 0.5 + B * 0.5", loras=[str(path)])

    assert_rounded(result[TENSOR_K], oracle(path, STEM_K, a[TENSOR_K]))
    assert torch.equal(result[OUT], a[OUT])
    assert step_of(plan, TENSOR_K).why == "B lacks it; adapters go into the base's"
    told = "1 tensor is carried from A: B lacks it"
    assert {told, f"{told}; adapters go into the base's"} <= set(plan.warnings)
    assert "strict: B lacks it" in error.what


@pytest.mark.parametrize("text", ["0.5 * bake(A, L) + 0.5 * B", "slerp(bake(A, L), B, t=0.5)"])
def test_an_adapter_of_what_another_model_lacks_goes_into_the_base_where_it_stands(
    text: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """A DoRA, which is no delta, too: the same as with the base in the other model's place."""
    tensors = {k: v for k, v in load_file(models["B"]).items() if k != TENSOR_K}
    sources = {"A": models["A"], "B": write_tensors(tmp_path / "B.safetensors", tensors)}
    dora = lora(STEM_K, 10, 24) | {f"{STEM_K}.dora_scale": 1 + noise(10, 1)}
    sources["L"] = adapter(tmp_path, dora)

    plan = planned(tmp_path, sources, text)
    found = baked(tmp_path, sources, text)[TENSOR_K]
    alike = baked(tmp_path, sources, text.replace("B", "A"))[TENSOR_K]

    assert not any("changes nothing" in warning for warning in plan.warnings)
    assert not torch.equal(found, load_file(models["A"])[TENSOR_K])
    assert torch.equal(found, alike)


@pytest.mark.parametrize(
    "text",
    [
        "bake(A * M, L)",
        "0.5 * bake(A * M, L) + 0.5 * B",
        "slerp(bake(A * M, L), B)",
        "bake(A - B * M, L) + A",
    ],
)
def test_a_bake_into_nothing_is_refused(text: str, models: dict[str, Path], tmp_path: Path) -> None:
    sources = models_of(models, "AB") | {"L": adapter(tmp_path, lora(STEM_K, 10, 24))}
    number = 1.0 if "A -" in text else 0.0

    with pytest.raises(RecipeError, match="bake: with these numbers") as caught:
        planned(tmp_path, sources, text, params={"M": number})

    assert "'model'" in caught.value.what


@pytest.mark.parametrize("kinds", [("dora", "lora"), ("lora", "dora"), ("ia3", "lora")])
def test_where_a_model_lacks_a_tensor_no_adapter_is_lost(
    kinds: tuple[str, str], models: dict[str, Path], tmp_path: Path
) -> None:
    """The same as of the base alone, in the order of the list."""
    parts = {
        "lora": lora(STEM_K, 10, 24),
        "dora": lora(STEM_K, 10, 24, seed=9) | {f"{STEM_K}.dora_scale": 1 + noise(10, 1)},
        "ia3": {f"{STEM_K}.weight": noise(10, 1), f"{STEM_K}.on_input": torch.tensor(False)},
    }
    paths = [str(adapter(tmp_path, parts[kind], kind)) for kind in kinds]
    tensors = {k: v for k, v in load_file(models["B"]).items() if k != TENSOR_K}
    other = write_tensors(tmp_path / "B.safetensors", tensors)

    lacking = baked(tmp_path, {"A": models["A"], "B": other}, "A * 0.5 + B * 0.5", loras=paths)
    alone = baked(tmp_path, models_of(models, "A"), loras=paths)

    assert torch.equal(lacking[TENSOR_K], alone[TENSOR_K])


@pytest.mark.parametrize(("model", "channels"), [("I", 5), ("I", 8), ("A", 3)])
def test_a_change_of_other_channels_than_the_latents_is_refused(
    model: str, channels: int, models: dict[str, Path], tmp_path: Path
) -> None:
    """Those of a depth model's fifth channel are not an inpainting model's mask."""
    path = conv_in_lora(tmp_path, channels)

    (error,) = errors_of(tmp_path, models_of(models, model), model, loras=[str(path)])
    assert "input_blocks.0.0" in str(error) or "conv_in" in str(error)


def errors_strict(
    folder: Path, sources: Mapping[str, Path], line: str, **more: object
) -> tuple[CkptError, ...]:
    (folder / "out.safetensors").unlink()
    return errors_of(folder, sources, line, strict=True, **more)


# --- stored ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_result_is_rounded_once_to_what_is_stored(
    dtype: str, models: dict[str, Path], tmp_path: Path
) -> None:
    path = wide_lora(tmp_path, models)
    a, b = (load_file(models[name]) for name in "AB")

    result = baked(tmp_path, models_of(models, "AB"), "A * 0.3 + B * 0.7",
                   loras=[{"path": path, "weight": 0.9}], output={"dtype": dtype})  # fmt: skip

    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for tensor, stem in STEMS.items():
        assert result[tensor].dtype == names[dtype]
        mixed = a[tensor].double() * 0.3 + b[tensor].double() * 0.7
        assert_rounded(result[tensor], oracle(path, stem, mixed, strength=0.9))


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with tensors of several spans each, and adapters of all sorts for it."""
    folder = tmp_path_factory.mktemp("larger")
    specs: Specs = {
        name: spec for name, spec in shrunk("sd1", 4).items() if not name.startswith("first_")
    }
    specs |= {name: spec for name, spec in shrunk("sd1", 4).items() if name.startswith("first_")}
    model = write_model(folder / "A.safetensors", specs, seed=1)
    tensors: Tensors = {}
    for number, (name, spec) in enumerate(specs.items()):
        if not name.startswith(UNET) or len(spec.shape) not in (2, 4):
            continue
        stem = "lora_unet_" + name.removeprefix(UNET).removesuffix(".weight").replace(".", "_")
        rows, columns = spec.shape[0], math.prod(spec.shape[1:])
        if number % 7 == 0 and rows % 4 == 0:
            tensors[f"{stem}.oft_blocks"] = noise(rows // 4, 4, 4, seed=number, size=0.05)
        elif len(spec.shape) == 2 or spec.shape[2] == 1:
            tensors |= lora(stem, rows, columns, rank=5, seed=number)
        else:
            tensors |= {
                f"{stem}.lora_up.weight": noise(rows, 3, 1, 1, seed=number),
                f"{stem}.lora_down.weight": noise(3, *spec.shape[1:], seed=number),
            }
    return model, adapter(folder, tensors)


def test_the_bytes_do_not_depend_on_threads(larger: tuple[Path, Path], tmp_path: Path) -> None:
    model, path = larger
    loras = [{"path": path, "weight": 0.8}, {"path": path, "weight": -0.3}]
    files = []
    for threads in (1, 2, 4):
        recipe = recipe_file(tmp_path, {"A": model}, "A", loras=loras)
        files.append(merge(load_recipe(recipe), threads=threads).output.read_bytes())

    assert len(files[0]) > 30_000_000
    assert files[0] == files[1] == files[2]


_MEASURED = """
import sys
from pathlib import Path
from ckptools.recipe import load_recipe
from ckptools.workflow import merge
plan = merge(load_recipe(Path(sys.argv[1])), threads=2).plan
status = Path("/proc/self/status").read_text()
print(plan.peak_bytes, 1024 * int(status.split("VmHWM:")[1].split()[0]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_predicted_memory_counts_the_adapters(
    kind: str, larger: tuple[Path, Path], tmp_path: Path
) -> None:
    """Factors of 46 MB in fp32, which a worker holds: more than all that a plain merge takes."""
    layer = f"{UNET}input_blocks.7.1.transformer_blocks.0.ff.net.0.proj"
    rows, columns, rank = 2560, 320, 4000
    tensors = lora("lora_unet_" + layer.removeprefix(UNET).replace(".", "_"), rows, columns,
                   rank=rank)  # fmt: skip
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    if kind == "dora":
        stem = next(iter(tensors)).partition(".")[0]
        tensors[f"{stem}.dora_scale"] = torch.ones(rows, 1).half()
    path = adapter(tmp_path, tensors)

    def peaks(**more: object) -> tuple[int, int]:
        recipe = recipe_file(tmp_path, {"A": larger[0]}, "A", **more)
        run = subprocess.run(
            [sys.executable, "-c", _MEASURED, str(recipe)],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        predicted, measured = map(int, run.stdout.split())
        return predicted, measured

    (plain, plain_measured), (predicted, measured) = peaks(), peaks(loras=[path])

    factors = (rows + columns) * rank * 4
    assert measured - plain_measured > factors
    assert measured <= predicted
    assert predicted - plain < 4 * (measured - plain_measured)


# --- scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "config", "scale"),
    [
        (None, None, 1.0),
        (0.0, None, 1.0),
        (1.0, None, 0.25),
        (None, {"r": 4, "lora_alpha": 2}, 0.5),
        (None, {"r": 4, "lora_alpha": 2, "use_rslora": True}, 1.0),
        (None, {"r": 4, "lora_alpha": 0}, 0.0),
        (None, {"r": 4, "lora_alpha": 2, "alpha_pattern": {".*to_k": 8}}, 2.0),
    ],
)
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_alpha_from_tensors_and_from_pefts_config(
    alpha: float | None, config: dict[str, object] | None, scale: float, place: str,
    models: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{module}.lora_A.weight": noise(4, 24), f"{module}.lora_B.weight": noise(10, 4)}
    if alpha is not None:
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    metadata: dict[str, str] = {}
    if config is not None and place == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    elif config is not None:
        flat = {f"unet.{key}": value for key, value in config.items()}
        metadata["lora_adapter_metadata"] = json.dumps(flat)
    path = write_tensors(tmp_path / "lora.safetensors", tensors, metadata)
    before = load_file(models["A"])[TENSOR_K]

    result = baked(tmp_path, models_of(models, "A"), loras=[str(path)])
    plan = planned(tmp_path, models_of(models, "A"), "A", loras=[str(path)])

    up, down = tensors[f"{module}.lora_B.weight"], tensors[f"{module}.lora_A.weight"]
    assert_rounded(result[TENSOR_K], before.double() + scale * (up.double() @ down.double()))
    assert plan.bakings[0].used_scales == (scale,)
    assert any("have no alpha" in note for note in plan.notes) == (alpha is None and not config)


def test_the_manifest_keeps_what_counts_of_a_config_beside_an_adapter(
    models: dict[str, Path], tmp_path: Path
) -> None:
    counts = {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": ["to_k"],
              "rank_pattern": {".*to_q": 8}, "peft_type": "LORA"}  # fmt: skip
    private = {"base_model_name_or_path": "/home/somebody/model", "alpha_pattern": {"/home/x/y": 1}}
    config = json.dumps(counts | private | {"eps": math.nan, "lora_dropout": 0.1})
    (tmp_path / "adapter_config.json").write_text(config)
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{module}.lora_A.weight": noise(4, 24), f"{module}.lora_B.weight": noise(10, 4)}
    loras = [adapter(tmp_path, tensors)]
    recipe = recipe_file(tmp_path, models_of(models, "A"), "A", loras=loras)

    result = merge(load_recipe(recipe), hash_inputs=True)

    model, lora_entry = json.loads(result.manifest.read_text("utf-8"))["inputs"]
    assert "adapter_config" not in model
    assert lora_entry["adapter_config"] == counts
    assert lora_entry["sha256"] == hashlib.sha256(loras[0].read_bytes()).hexdigest()
    assert lora_entry["bytes"] == loras[0].stat().st_size


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
     torch.int64, torch.uint8],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("alpha", [3.0, 0.0, 0.00390625])
def test_alpha_may_be_stored_as_any_number(
    dtype: torch.dtype, alpha: float, models: dict[str, Path], tmp_path: Path
) -> None:
    stored = torch.tensor(alpha).to(dtype)
    path = adapter(tmp_path, lora(STEM_K, 10, 24) | {f"{STEM_K}.alpha": stored})

    plan = planned(tmp_path, models_of(models, "A"), "A", loras=[str(path)])

    assert plan.bakings[0].used_scales == (float(stored) / 2 or 1.0,)


# --- strictness ----------------------------------------------------------------------------------


def test_modules_that_match_nothing_are_listed_with_the_base_they_fit(
    models: dict[str, Path], tmp_path: Path
) -> None:
    text_2 = "lora_te2_text_model_encoder_layers_1_self_attn_q_proj"
    path = adapter(tmp_path, lora(STEM_K, 10, 24) | lora(text_2, 1280, 1280))

    (error,) = errors_of(tmp_path, models_of(models, "A"), loras=[str(path)])

    assert isinstance(error, InputError)
    assert error.exit_code == 2
    assert error.what == f"1 of 2 modules of loras[0] match nothing in the model: {text_2!r}"
    assert error.where == line_of(tmp_path, str(path))
    assert error.fix == (
        "they fit sd3 (its second text encoder is 1280 wide) or sdxl (its second text encoder "
        "is 1280 wide); use the base model it was "
        "trained for, or set `allow_unmatched: true`"
    )


def test_unmatched_modules_may_be_allowed_but_not_all_of_them(
    models: dict[str, Path], tmp_path: Path
) -> None:
    odd = lora("lora_unet_nowhere", 10, 24)
    path = adapter(tmp_path, lora(STEM_K, 10, 24) | odd)
    nothing = adapter(tmp_path, odd, "nothing")
    entry = {"path": path, "allow_unmatched": True}

    result = baked(tmp_path, models_of(models, "A"), loras=[entry])
    plan = planned(tmp_path, models_of(models, "A"), "A", loras=[entry])
    (tmp_path / "out.safetensors").unlink()
    (error,) = errors_of(tmp_path, models_of(models, "A"), loras=[entry | {"path": nothing}])

    untouched(result, models["A"], TENSOR_K)
    assert plan.warnings == (
        "1 of 2 modules of loras[0] match nothing in the model: 'lora_unet_nowhere': left out",
    )
    assert "1 of 1 modules of loras[0] match nothing" in error.what


def test_an_sdxl_adapter_on_sd1_is_one_sentence(models: dict[str, Path], tmp_path: Path) -> None:
    """Its modules have names that SD1 has, too, but other widths."""
    path = adapter(tmp_path, lora("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
                                  640, 2048) | lora(STEM_K, 320, 2048))  # fmt: skip

    (error,) = errors_of(tmp_path, models_of(models, "A"), loras=[str(path)])

    assert error.what.startswith(
        "loras[0] is for sdxl (cross-attention takes 2048), the model is sd1: "
    )
    assert "does not fit" in error.what
    assert error.where == line_of(tmp_path, str(path))
    assert error.fix == "use the base model it was trained for"


def test_an_adapter_of_another_family_that_fits_is_warned_of(
    models: dict[str, Path], tmp_path: Path
) -> None:
    stem = "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_q"
    path = adapter(tmp_path, lora(STEM_K, 10, 24) | lora(stem, 40, 40))

    plan = planned(tmp_path, models_of(models, "A"), "A",
                   loras=[{"path": path, "allow_unmatched": True}])  # fmt: skip

    assert any(
        warning.startswith("loras[0] is for sdxl (ten transformer blocks in the middle), the model")
        for warning in plan.warnings
    )


def without(tensors: Tensors, end: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


BROKEN: dict[str, tuple[Tensors, str, str]] = {
    "no up": (without(lora(STEM_K, 10, 24), "up.weight"), "LoRA lacks 'up'", "incomplete"),
    "no down": (without(lora(STEM_K, 10, 24), "down.weight"), "LoRA lacks 'down'", "incomplete"),
    "ranks": (lora(STEM_K, 10, 24) | {f"{STEM_K}.lora_up.weight": noise(10, 3)},
              "the parts disagree on the rank: up says 3, down says 2", ""),
    "narrower": (lora(STEM_K, 10, 48), "the adapter is for 10 x 48, the weight is 10 x 24",
                 "use the base model"),
    "integers": (lora(STEM_K, 10, 24) | {f"{STEM_K}.lora_up.weight": torch.ones(10, 2).int()},
                 "up is I32, not a number", ""),
    "alpha": (lora(STEM_K, 10, 24) | {f"{STEM_K}.alpha": torch.tensor(math.nan)},
              "alpha is nan", ""),
    "no bias": (lora(STEM_K, 10, 24) | {f"{STEM_K}.diff_b": noise(10)},
                f"changes a bias, and {TENSOR_K} has none", "use the base model"),
    "not an adapter": ({"a.weight": noise(3, 3)}, "1 tensor is no part of an adapter", "models"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_named_with_its_module_and_line(
    case: str, models: dict[str, Path], tmp_path: Path
) -> None:
    tensors, what, fix = BROKEN[case]
    path = adapter(tmp_path, tensors)

    (error,) = errors_of(tmp_path, models_of(models, "A"), loras=[str(path)])

    assert error.exit_code == 2
    assert error.what.startswith("adapter 'loras[0]': ")
    assert what in error.what
    assert error.where.startswith(f"{line_of(tmp_path, str(path))}: ")
    assert error.fix
    assert fix in error.fix


def test_two_schemes_in_one_file_are_duplicate_targets(
    models: dict[str, Path], tmp_path: Path
) -> None:
    other = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    path = adapter(tmp_path, lora(STEM_K, 10, 24) | lora(other, 10, 24))

    (error,) = errors_of(tmp_path, models_of(models, "A"), loras=[str(path)])

    assert f"both change {TENSOR_K}" in error.what
    assert repr(other) in error.what
    assert repr(STEM_K) in error.what
    assert "split it" in error.fix


def test_many_broken_modules_are_shown_as_a_few(models: dict[str, Path], tmp_path: Path) -> None:
    tensors = {f"lora_unet_{n}.lora_up.weight": noise(10, 2) for n in range(50)}
    bad = [adapter(tmp_path, tensors, name) for name in ("one", "two")]

    errors = errors_of(tmp_path, models_of(models, "A"), loras=[str(path) for path in bad])

    assert len(errors) == 18
    assert not any(isinstance(error, ManyErrors) for error in errors)
    assert "and 42 more" in errors[8].what


def test_a_truncated_adapter_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    path = adapter(tmp_path, lora(STEM_K, 10, 24))
    path.write_bytes(path.read_bytes()[:-10])

    (error,) = errors_of(tmp_path, models_of(models, "A"), loras=[str(path)])

    assert error.what.startswith("adapter 'loras[0]': ")
    assert error.code == "invalid-file"
    assert error.where.startswith(line_of(tmp_path, str(path)))
    assert error.fix


@pytest.mark.parametrize("part", ["lora_up.weight", "lora_down.weight"])
@pytest.mark.parametrize("formula", ["bake(A, L)", "ties(bake(A, L), B, base=C)"])
def test_nan_in_an_adapter_names_it_its_tensor_and_the_count(
    part: str, formula: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Also under methods whose comparisons would swallow it."""
    tensors = lora(STEM_K, 10, 24)
    tensors[f"{STEM_K}.{part}"][0, 0] = math.nan
    tensors[f"{STEM_K}.{part}"][1, 1] = math.inf
    sources = models_of(models, "ABC") | {"L": adapter(tmp_path, tensors)}

    (error,) = errors_of(tmp_path, sources, formula)

    total = tensors[f"{STEM_K}.{part}"].numel()
    assert isinstance(error, NonFiniteError)
    assert error.exit_code == 1
    assert error.what == f"L has 2 NaN or Inf of {total} values in '{STEM_K}.{part}'"
    assert error.where == TENSOR_K
    assert error.fix.startswith("use a sound copy of L")


@pytest.mark.parametrize("kind", ["oft", "dora-rows", "loha", "glora", "ia3-out"])
def test_nan_in_any_kind_stops_the_merge(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    _, parts = KINDS[kind]
    tensors = {f"{STEM_K}.{part}": tensor.clone() for part, tensor in parts.items()}
    first = next(name for name, tensor in tensors.items() if tensor.numel() > 1)
    tensors[first].view(-1)[1] = math.nan
    path = adapter(tmp_path, tensors)

    (error,) = errors_of(tmp_path, models_of(models, "A"), loras=[str(path)])

    assert isinstance(error, NonFiniteError)
    assert f"in {first!r}" in error.what


def test_a_model_is_no_adapter_and_an_adapter_no_model(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = adapter(tmp_path, lora(STEM_K, 10, 24))

    (as_adapter,) = errors_of(tmp_path, models_of(models, "A"), loras=[str(models["B"])])
    (as_model,) = errors_of(tmp_path, models_of(models, "A") | {"L": path}, "A * 0.5 + L * 0.5")
    (both,) = errors_of(tmp_path, models_of(models, "A") | {"L": path}, "bake(A + L - A, L)")
    (base,) = errors_of(tmp_path, models_of(models, "A") | {"L": path}, "bake(A, L)", base="L")

    assert as_adapter.what == "adapter 'loras[0]': this is a whole model, not an adapter"
    assert as_model.what == "model 'L': this is an adapter (LoRA), not weights"
    for error in (both, base):
        assert isinstance(error, RecipeError)
        assert error.what == "'L' is baked as an adapter, and used as a model as well"
    assert all(error.fix and error.where for error in (as_adapter, as_model, both, base))


def test_an_adapter_does_not_go_into_a_component_that_is_taken(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = wide_lora(tmp_path, models)
    take = {"text_encoder": "B"}

    (error,) = errors_of(tmp_path, models_of(models, "AB"), loras=[str(path)], take=take)
    (called,) = errors_of(tmp_path, models_of(models, "AB") | {"L": path}, "bake(A, L)", take=take)
    result = baked(tmp_path, models_of(models, "AB"), take=take,
                   loras=[{"path": path, "weight": {"default": 1, "text_encoder": 0}}])  # fmt: skip

    assert error.what == "loras[0] changes 1 tensor of text_encoder, which is taken byte for byte"
    assert error.fix == "set its weight to 0 for text_encoder, or leave out `take`"
    assert called.fix.startswith("bake it through `loras:` with the weight 0 for text_encoder")
    assert torch.equal(result[TEXT], load_file(models["B"])[TEXT])
    assert not torch.equal(result[TENSOR_K], load_file(models["A"])[TENSOR_K])


def test_an_adapter_needs_a_known_family(tmp_path: Path) -> None:
    model = write_tensors(tmp_path / "m.safetensors", {"w": noise(3, 3)})
    path = adapter(tmp_path, lora(STEM_K, 10, 24))

    (error,) = errors_of(tmp_path, {"A": model}, loras=[str(path)])

    assert error.what == "adapters need a known family; A is unknown"
    assert error.where == line_of(tmp_path, str(path))
    assert error.fix


def test_bundled_embeddings_are_left_aside_with_a_note(
    models: dict[str, Path], tmp_path: Path
) -> None:
    tensors = lora(STEM_K, 10, 24) | {"bundle_emb.glow.string_to_param.*": noise(2, 24)}
    path = adapter(tmp_path, tensors)

    result = baked(tmp_path, models_of(models, "A"), loras=[str(path)])
    plan = planned(tmp_path, models_of(models, "A"), "A", loras=[str(path)])

    untouched(result, models["A"], TENSOR_K)
    assert "loras[0]: 1 embeddings are left aside (bundle_emb.glow)" in plan.notes


# --- what the plan and the file say --------------------------------------------------------------


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(list(words)) == 0
    return capsys.readouterr().out


def test_the_plan_shows_each_adapter(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(wide_lora(tmp_path, models)) | lora("lora_unet_nowhere", 4, 4, rank=8)
    path = adapter(tmp_path, tensors)
    loras = [{"path": path, "allow_unmatched": True}]
    recipe = recipe_file(tmp_path, models_of(models, "A"), "A", loras=loras)

    found = json.loads(shown(capsys, "plan", str(recipe), "--json"))
    text = shown(capsys, "plan", str(recipe))

    assert found["adapters"] == {
        "loras[0]": {
            "kind": ["LoRA"],
            "base": [],
            "modules": 4,
            "ranks": [2, 8],
            "scales": [0.125, 0.5],
            "matched": {"text_encoder": 1, "unet": 2},
            "unmatched": ["lora_unet_nowhere"],
        }
    }
    row = next(line for line in text.splitlines() if "in unet" in line)
    for word in ("loras[0]", "LoRA", "2 to 8", "0.125 to 0.5", "1 in text_encoder", "1 match"):
        assert word in row


def test_explain_shows_the_modules_that_change_a_tensor(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, parts = KINDS["oft"]
    oft = adapter(tmp_path, {f"{STEM_K}.{part}": t for part, t in parts.items()}, "oft")
    loras = [{"path": wide_lora(tmp_path, models), "weight": {"default": 0.3, "IN01": 0.8}}, oft]
    recipe = recipe_file(tmp_path, models_of(models, "A"), "A", loras=loras)

    found = json.loads(shown(capsys, "explain", str(recipe), TENSOR_K, "--json"))
    text = shown(capsys, "explain", str(recipe), TENSOR_K)
    other = json.loads(shown(capsys, "explain", str(recipe), f"{UNET}out.2.weight", "--json"))

    lora_row, oft_row = found["adapters"]
    assert lora_row == {
        "adapter": "loras[0]", "module": STEM_K, "kind": "LoRA", "rank": 2, "scale": 0.5,
        "weight": 0.8,
    }  # fmt: skip
    assert (oft_row["adapter"], oft_row["kind"], oft_row["rank"]) == ("loras[1]", "OFT", None)
    assert f"loras[0]: {STEM_K}, LoRA of rank 2, scale 0.5, weight 0.8" in text
    assert other["adapters"] == []


def test_the_embedded_recipe_makes_the_same_file_again(
    models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    for name in "ABC":
        (folder / models[name].name).symlink_to(models[name])
    odd = load_file(wide_lora(folder, models)) | lora("lora_unet_nowhere", 4, 4)
    adapter(folder, odd, "odd")
    _, parts = KINDS["dora-rows"]
    adapter(folder, {f"{STEM_K}.{part}": t for part, t in parts.items()}, "dora")
    weight = {"mbw": [0.4] * 13 + [0.6] * 13, "*attn2*": 0.9}
    recipe = folder / "recipe.yaml"
    document = {
        "ckptools": 1,
        "models": {name: f"{name}.safetensors" for name in "ABC"}
        | {"L": {"path": "dora.safetensors", "dora": "comfy"}},
        "params": {"M": 0.5},
        "merge": "bake(A + (B - C) * M, L, weight=M)",
        "loras": [
            {"path": "lora.safetensors", "weight": weight},
            {"path": "odd.safetensors", "allow_unmatched": True, "weight": -0.2},
        ],
        "output": {"path": "out.safetensors"},
    }
    recipe.write_text(json.dumps(document))
    first = merge(load_recipe(recipe), hash_inputs=True)

    with open_checkpoint(first.output) as opened:
        metadata = dict(opened.metadata)
    again = folder / "again.yaml"
    again.write_text(metadata["ckptools.recipe"])
    before = first.output.read_bytes()
    second = merge(load_recipe(again), force=True, hash_inputs=True)
    written = json.loads(metadata["ckptools.recipe"])
    manifest = json.loads(first.manifest.read_text())

    assert second.output.read_bytes() == before
    assert list(written["models"]) == ["A", "B", "C", "L"]
    assert written["models"]["L"]["dora"] == "comfy"
    assert [row["path"] for row in written["loras"]] == ["lora.safetensors", "odd.safetensors"]
    assert written["loras"][0]["weight"] == weight
    assert written["loras"][1]["allow_unmatched"] is True
    assert all(len(row["sha256"]) == 64 for row in written["loras"])
    assert written["params"] == {"M": {"default": 0.5}}
    assert metadata["modelspec.merged_from"] == "A, B, C, dora, lora, odd"
    assert [row["name"] for row in manifest["inputs"]][-2:] == ["loras[0]", "loras[1]"]
    web = json.loads(metadata["sd_merge_recipe"])
    assert web["models"].keys() == {"A", "B", "C"}
    assert web["adapters"] == {
        "L": "dora.safetensors", "loras[0]": "lora.safetensors", "loras[1]": "odd.safetensors",
    }  # fmt: skip


def test_bad_adapters_exit_with_two_and_nan_with_one(
    models: dict[str, Path], tmp_path: Path
) -> None:
    tensors = lora(STEM_K, 10, 24)
    codes = []
    for name, broken in (
        ("half", without(tensors, "up.weight")),
        ("nan", tensors | {f"{STEM_K}.lora_up.weight": torch.full((10, 2), math.nan)}),
    ):
        path = adapter(tmp_path, broken, name)
        recipe = recipe_file(tmp_path, models_of(models, "A"), "A", loras=[str(path)])
        codes.append(run(["merge", "-q", str(recipe)]))

    assert codes == [2, 1]
