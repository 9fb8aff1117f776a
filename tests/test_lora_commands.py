"""`ckptools lora`: what it makes, baked by the merge engine; what it says, against numpy."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import model_values, shrunk, write_tensors
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import ckptools
from ckptools.adapters.check import check_adapter
from ckptools.adapters.extract import Extraction, extract
from ckptools.adapters.factors import (
    Budget,
    decompose,
    difference_norm,
    product_norm,
    recompress,
)
from ckptools.adapters.inspection import component_of, inspect_adapter
from ckptools.adapters.reading import open_adapter, open_model
from ckptools.adapters.rewrite import concatenate, resize
from ckptools.cli import run
from ckptools.errors import CkptError, InputError, NonFiniteError, OutputError, UsageError
from ckptools.recipe import load_recipe
from ckptools.workflow import merge

UNET = "model.diffusion_model."
FULL = Budget(rank=4096)
Tensors = dict[str, Tensor]


def tuned(values: Tensors, seed: int, size: float = 0.02) -> Tensors:
    """The values with noise on every float."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (t.float() + size * torch.randn(t.shape, generator=generator)).to(t.dtype)
        if t.is_floating_point()
        else t
        for name, t in values.items()
    }


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with A.safetensors and B.safetensors of one family. Do not change."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    first = model_values(shrunk(request.param), seed=1)
    write_tensors(folder / "A.safetensors", first)
    write_tensors(folder / "B.safetensors", tuned(first, 2))
    return folder


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for SD1 alone, and C, which is A with another change. No VAE."""
    folder = tmp_path_factory.mktemp("pair")
    specs = shrunk("sd1")
    first = model_values(specs, seed=1)
    kept = {n: t for n, t in first.items() if n.startswith("first_stage")}
    write_tensors(folder / "A.safetensors", first)
    write_tensors(folder / "B.safetensors", tuned(first, 2) | kept)
    write_tensors(folder / "C.safetensors", tuned(first, 3) | kept)
    return folder


def bake(folder: Path, model: Path, *loras: tuple[Path, float], dtype: str = "fp32") -> Tensors:
    """The model with adapters, by the merge engine."""
    recipe = folder / "recipe.yaml"
    lines = "".join(f"  - {{path: {path}, weight: {weight}}}\n" for path, weight in loras)
    recipe.write_text(
        f"ckptools: 1\nmodels: {{A: {model}}}\nmerge: A\nloras:\n{lines}"
        f"output: {{path: baked.safetensors, dtype: {dtype}}}\n"
    )
    merge(load_recipe(recipe), force=True)
    return load_file(folder / "baked.safetensors")


def distance(one: Tensors, other: Tensors, names: list[str] | None = None) -> float:
    keys = names or [name for name, t in other.items() if t.is_floating_point()]
    return math.sqrt(sum(float((one[k].double() - other[k].double()).square().sum()) for k in keys))


def extracted(folder: Path, output: Path, **options: object) -> Extraction:
    return extract(folder / "A.safetensors", folder / "B.safetensors", output, **options)  # type: ignore[arg-type]


# --- extract -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "budget"),
    [("kohya", Budget(rank=4)), ("peft", Budget(energy=0.8))],
    ids=["kohya-rank", "peft-energy"],
)
def test_baking_what_was_extracted_misses_b_by_the_stated_residual(
    pair: Path, names: str, budget: Budget, tmp_path: Path
) -> None:
    done = extracted(pair, tmp_path / "x.safetensors", budget=budget, names=names)
    baked = bake(tmp_path, pair / "A.safetensors", (tmp_path / "x.safetensors", 1.0))
    a, b = load_file(pair / "A.safetensors"), load_file(pair / "B.safetensors")

    assert distance(baked, b) / distance(a, b) == pytest.approx(done.residual.relative, rel=1e-4)
    assert 0.2 < done.residual.relative < 1.0
    total = sum(block.total for block in done.blocks.values())
    assert total == pytest.approx(done.residual.total)
    missed = sum(block.missed for block in done.blocks.values())
    assert missed == pytest.approx(done.residual.missed)


def test_at_full_rank_with_differences_b_is_reproduced(sd1: Path, tmp_path: Path) -> None:
    """In fp32 to fp32's rounding of factors, in fp16 within one rounding of fp16."""
    path = tmp_path / "x.safetensors"
    done = extracted(sd1, path, budget=FULL, dtype="fp32", with_diff=True)
    b = load_file(sd1 / "B.safetensors")
    baked = bake(tmp_path, sd1 / "A.safetensors", (path, 1.0))
    rounded = bake(tmp_path, sd1 / "A.safetensors", (path, 1.0), dtype="fp16")

    assert done.left_out == ()
    assert done.residual.relative < 2e-6
    for name, tensor in b.items():
        assert torch.allclose(baked[name].double(), tensor.double(), atol=1e-6, rtol=1e-6), name
    differing = sum(int((rounded[name] != tensor).sum()) for name, tensor in b.items())
    assert differing < 1e-4 * sum(t.numel() for t in b.values())  # values near 0: finer steps


def test_at_full_rank_fp16_factors_miss_b_by_fp16_rounding(sd1: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    done = extracted(sd1, path, budget=FULL, with_diff=True)
    baked = bake(tmp_path, sd1 / "A.safetensors", (path, 1.0))
    a, b = load_file(sd1 / "A.safetensors"), load_file(sd1 / "B.safetensors")

    assert done.residual.relative < 2**-11
    assert distance(baked, b) / distance(a, b) < 2**-11


def test_kept_energy_is_what_was_asked_for(sd1: Path, tmp_path: Path) -> None:
    """The share of every matrix' squared norm, and not one rank more than it takes."""
    path = tmp_path / "x.safetensors"
    extracted(sd1, path, budget=Budget(energy=0.7), dtype="fp32")
    a, b = load_file(sd1 / "A.safetensors"), load_file(sd1 / "B.safetensors")
    factors = load_file(path)
    tensor = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    up = factors["lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn1_to_q"
                 ".lora_up.weight"]  # fmt: skip
    squares = np.linalg.svd((b[tensor].float() - a[tensor].float()).numpy())[1] ** 2

    shares = np.cumsum(squares) / squares.sum()
    assert up.shape[1] == int((shares < 0.7).sum()) + 1


def test_every_module_written_is_found_in_the_model(pair: Path, tmp_path: Path) -> None:
    for names in ("kohya", "peft"):
        path = tmp_path / f"{names}.safetensors"
        extracted(pair, path, budget=Budget(rank=2), names=names)
        with open_adapter(path) as adapter, open_model(pair / "A.safetensors") as model:
            found = [model.names.find(module) for module in adapter.file.modules]
            assert adapter.scheme.startswith(names)
            assert set(adapter.scales.values()) == {1.0}

        assert len(found) > 300
        assert all(found)
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_fused_rows_become_q_k_and_v(family: str, tmp_path: Path) -> None:
    specs = shrunk(family)
    first = model_values(specs, seed=1)
    name = next(n for n in specs if n.endswith("resblocks.3.attn.in_proj_weight"))
    second = dict(first)
    size = first[name].shape[1]
    second[name] = first[name].clone()
    second[name][size : 2 * size] += 0.125  # k
    a = write_tensors(tmp_path / "A.safetensors", first)
    b = write_tensors(tmp_path / "B.safetensors", second)
    done = extract(a, b, tmp_path / "x.safetensors", budget=Budget(rank=1))
    (up,) = (key for key in load_file(tmp_path / "x.safetensors") if key.endswith("up.weight"))

    assert up.endswith("_layers_3_self_attn_k_proj.lora_up.weight")
    assert done.written.modules == 1
    assert done.residual.relative < 0.03  # fp16's steps near 4 are not 0.125 to the bit
    assert torch.equal(bake(tmp_path, a, (tmp_path / "x.safetensors", 1.0))[name][:size],
                       first[name][:size].float())  # fmt: skip


def test_unchanged_modules_are_skipped_and_equal_models_refused(sd1: Path, tmp_path: Path) -> None:
    first = load_file(sd1 / "A.safetensors")
    name = f"{UNET}input_blocks.1.0.in_layers.2.weight"
    b = write_tensors(tmp_path / "B.safetensors", first | {name: first[name] + 1})
    done = extract(sd1 / "A.safetensors", b, tmp_path / "x.safetensors", budget=Budget(rank=1))
    down = load_file(tmp_path / "x.safetensors")["lora_unet_down_blocks_0_resnets_0_conv1"
                                                 ".lora_down.weight"]  # fmt: skip

    assert (done.written.modules, dict(done.written.ranks)) == (1, {1: 1})
    assert down.shape == (1, *first[name].shape[1:])
    assert done.unchanged > 300
    with pytest.raises(InputError, match="nothing to extract"):
        extract(sd1 / "A.safetensors", sd1 / "A.safetensors", tmp_path / "y.safetensors",
                budget=FULL)  # fmt: skip
    bias = f"{UNET}out.2.bias"
    only = write_tensors(tmp_path / "D.safetensors", first | {bias: first[bias] + 1})
    with pytest.raises(InputError, match="what a LoRA cannot hold"):
        extract(sd1 / "A.safetensors", only, tmp_path / "y.safetensors", budget=FULL)
    extract(sd1 / "A.safetensors", only, tmp_path / "y.safetensors", budget=FULL, with_diff=True)
    assert list(load_file(tmp_path / "y.safetensors")) == ["lora_unet_conv_out.diff_b"]


def test_peft_names_load_into_a_peft_model(sd1: Path, tmp_path: Path) -> None:
    """By PEFT's own loader, with diffusers' metadata; then ΔW is PEFT's."""
    peft = pytest.importorskip("peft")
    path = tmp_path / "x.safetensors"
    extracted(sd1, path, budget=Budget(energy=0.5), names="peft", dtype="fp32")
    stored = load_file(path)
    with safe_open(path, "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    own = {
        k.removeprefix("text_encoder."): v
        for k, v in config.items()
        if k.startswith("text_encoder.")
    }
    tensors = {
        k.removeprefix("text_encoder."): v
        for k, v in stored.items()
        if k.startswith("text_encoder.")
    }
    root = torch.nn.Module()
    for key, up in tensors.items():
        if not key.endswith(".lora_B.weight"):
            continue
        module = key.removesuffix(".lora_B.weight")
        down = tensors[f"{module}.lora_A.weight"]
        parent = root
        *folders, last = module.split(".")
        for folder in folders:
            if not hasattr(parent, folder):
                parent.add_module(folder, torch.nn.Module())
            parent = getattr(parent, folder)
        parent.add_module(last, torch.nn.Linear(down.shape[1], up.shape[0]))
    peft.inject_adapter_in_model(peft.LoraConfig(**own), root)
    outcome = peft.set_peft_model_state_dict(root, tensors)

    assert outcome.unexpected_keys == []
    assert len({own["r"], *own["rank_pattern"].values()}) > 1
    layers = [(n, m) for n, m in root.named_modules() if hasattr(m, "get_delta_weight")]
    assert len(layers) == len(tensors) // 2
    for name, layer in layers:
        wanted = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        assert torch.allclose(layer.get_delta_weight("default"), wanted, atol=1e-6), name


def test_same_models_give_the_same_bytes(sd1: Path, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        extracted(sd1, tmp_path / folder / "x.safetensors", budget=Budget(rank=3))

    one, two = (tmp_path / f / "x.safetensors" for f in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["x.safetensors"]


# --- the algebra -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(400, 300), (300, 900)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_randomised_method_is_as_good_as_the_exact_one(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """On a spectrum that falls slowly, the residual is within 1 % of the best."""
    generator = torch.Generator().manual_seed(5)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator).double(),
                               full_matrices=False)  # fmt: skip
    s = 1.0 / torch.arange(1, min(shape) + 1).double().sqrt()
    matrix = (u * s @ v).to(dtype)
    up, down = decompose(matrix, Budget(rank=24), name="x")
    best = float(s[24:].square().sum().sqrt())

    assert up.shape == (shape[0], 24)
    assert float((matrix - up @ down).norm()) < 1.01 * best
    assert torch.equal(up, decompose(matrix, Budget(rank=24), name="x")[0])


def test_energy_grows_the_sketch_until_it_holds_enough() -> None:
    generator = torch.Generator().manual_seed(5)
    low = torch.randn(600, 12, generator=generator) @ torch.randn(12, 500, generator=generator)
    noise = torch.randn(400, 400, generator=generator)

    assert decompose(low, Budget(energy=0.999999), name="x")[0].shape[1] == 12
    assert decompose(noise, Budget(energy=1.0), name="x")[0].shape[1] >= 398  # but for rounding
    squares = torch.linalg.svdvals(noise.double()).square()
    wanted = int((squares.cumsum(0) < 0.5 * squares.sum()).sum()) + 1
    assert decompose(noise, Budget(energy=0.5), name="x")[0].shape[1] == wanted


@pytest.mark.parametrize("shapes", [((40, 8), (8, 30)), ((5, 8), (8, 30)), ((40, 8), (8, 3))])
def test_factors_recompressed_at_their_rank_keep_the_product(
    shapes: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(shape, generator=generator).double() for shape in shapes)
    small_up, small_down = recompress(up, down, Budget(rank=8))
    one_up, one_down = recompress(up, down, Budget(rank=1))
    s = torch.linalg.svdvals(up @ down)

    assert torch.allclose(small_up @ small_down, up @ down, atol=1e-12)
    assert float((one_up @ one_down - up @ down).norm()) == pytest.approx(float(s[1:].norm()))
    assert product_norm(up, down) == pytest.approx(float((up @ down).norm()), rel=1e-12)
    missed = difference_norm((up, down), (one_up, one_down))
    assert missed == pytest.approx(float(s[1:].norm()), rel=1e-9)


@pytest.mark.parametrize("values", [(None, None), (4, 0.5), (0, None), (None, 0.0), (None, 1.5)])
def test_a_budget_is_a_rank_or_an_energy(values: tuple[int | None, float | None]) -> None:
    with pytest.raises(UsageError):
        Budget(*values)


# --- resize ------------------------------------------------------------------------------------


def test_resizing_to_the_same_rank_changes_no_bit(sd1: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    extracted(sd1, path, budget=Budget(rank=4), with_diff=True)
    done = resize(path, tmp_path / "y.safetensors", budget=Budget(rank=4))
    before, after = load_file(path), load_file(tmp_path / "y.safetensors")

    assert done.residual == 0.0
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_resizing_by_all_the_energy_is_lossless_in_fp32(sd1: Path, tmp_path: Path) -> None:
    """Through the SVD of the factors; alpha and the scale go into them."""
    path = tmp_path / "x.safetensors"
    extracted(sd1, path, budget=Budget(rank=4), dtype="fp32")
    tensors = load_file(path)
    halved = {k: t * 0.5 if k.endswith(".alpha") else t for k, t in tensors.items()}
    path = write_tensors(tmp_path / "half.safetensors", halved)
    done = resize(path, tmp_path / "y.safetensors", budget=Budget(energy=1.0))
    a = sd1 / "A.safetensors"
    before = bake(tmp_path, a, (path, 1.0))
    after = bake(tmp_path, a, (tmp_path / "y.safetensors", 1.0))
    change = distance(load_file(a), before)

    assert done.residual < 1e-7
    assert distance(before, after) / change < 1e-5  # A + ΔW is rounded to fp32


def test_resizing_keeps_the_largest_singular_values(sd1: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    extracted(sd1, path, budget=Budget(rank=8), names="peft", dtype="fp32")
    done = resize(path, tmp_path / "y.safetensors", budget=Budget(rank=3))
    big, small = load_file(path), load_file(tmp_path / "y.safetensors")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    exact = big[f"{name}.lora_B.weight"] @ big[f"{name}.lora_A.weight"]
    got = small[f"{name}.lora_B.weight"] @ small[f"{name}.lora_A.weight"]
    s = torch.linalg.svdvals(exact)

    assert float((exact - got).norm()) == pytest.approx(float(s[3:].norm()), rel=1e-4)
    assert dict(done.written.ranks).keys() == {3}
    assert 0.1 < done.residual < 0.9


def test_tucker_is_resized_and_other_kinds_are_carried_and_listed(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tucker, loha = "lora_unet_mid_block_resnets_0_conv1", "lora_unet_mid_block_resnets_0_conv2"
    tensors = {
        f"{tucker}.lora_up.weight": noise(40, 6, 1, 1),
        f"{tucker}.lora_down.weight": noise(6, 40, 1, 1),
        f"{tucker}.lora_mid.weight": noise(6, 6, 3, 3),
        f"{tucker}.alpha": torch.tensor(3.0),
        **{f"{loha}.hada_w{i}_a": noise(40, 2) for i in (1, 2)},
        **{f"{loha}.hada_w{i}_b": noise(2, 40) for i in (1, 2)},
        "bundle_emb.cat.string_to_param.*": noise(2, 8),
    }
    path = write_tensors(tmp_path / "x.safetensors", tensors, {"ss_tag_frequency": "{}"})
    done = resize(path, tmp_path / "y.safetensors", budget=Budget(energy=1.0))
    got = load_file(tmp_path / "y.safetensors")
    up, down, mid = (tensors[f"{tucker}.lora_{part}.weight"] for part in ("up", "down", "mid"))
    exact = torch.einsum("imxy,mnkl,njxy->ijkl", up, mid, down) / 2
    new_up, new_down = (got[f"{tucker}.lora_{part}.weight"] for part in ("up", "down"))

    assert done.carried == ((loha, "LoHa"),)
    assert new_down.shape == (6, 40, 3, 3)
    assert torch.allclose(torch.einsum("imxy,mjkl->ijkl", new_up, new_down), exact, atol=1e-4)
    assert torch.equal(got[f"{loha}.hada_w1_a"], tensors[f"{loha}.hada_w1_a"])
    assert "bundle_emb.cat.string_to_param.*" in got


# --- merge -------------------------------------------------------------------------------------


def two_loras(sd1: Path, folder: Path, **second: str) -> tuple[Path, Path]:
    """Adapters A to B and A to C, fp32, of ranks 3 and 5."""
    a = sd1 / "A.safetensors"
    one, two = folder / "one.safetensors", folder / "two.safetensors"
    extract(a, sd1 / "B.safetensors", one, budget=Budget(rank=3), dtype="fp32", with_diff=True)
    options = {"with_diff": True} if "names" not in second else second
    extract(a, sd1 / "C.safetensors", two, budget=Budget(rank=5), dtype="fp32",
            **options)  # type: ignore[arg-type]  # fmt: skip
    return one, two


@pytest.mark.parametrize("second", [{}, {"names": "peft"}], ids=["one scheme", "two schemes"])
def test_merging_is_baking_both(sd1: Path, tmp_path: Path, second: dict[str, str]) -> None:
    a = sd1 / "A.safetensors"
    one, two = two_loras(sd1, tmp_path, **second)
    both = tmp_path / "both.safetensors"
    done = concatenate([one, two], both, weights=[0.8, -0.3], model=a if second else None)
    wanted = bake(tmp_path, a, (one, 0.8), (two, -0.3))
    got = bake(tmp_path, a, (both, 1.0))

    assert done.residual < 1e-6
    assert max(done.written.ranks) == 8
    assert distance(wanted, got) / distance(load_file(a), wanted) < 1e-5
    assert inspect_adapter(both).scheme == "kohya"


def test_a_scale_of_a_whole_difference_is_merged_too(sd1: Path, tmp_path: Path) -> None:
    a, one, two = sd1 / "A.safetensors", tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    extracted(sd1, one, budget=FULL, dtype="fp32", with_diff=True)
    held = {n: t for n, t in load_file(one).items() if n.endswith((".diff", ".diff_b"))}
    stems = {n.removesuffix(".diff") for n in held if n.endswith(".diff")}
    assert stems
    write_tensors(one, held | {f"{stem}.scale": torch.tensor(0.25) for stem in stems})

    concatenate([one], two, weights=[2.0])

    wanted, got = bake(tmp_path, a, (one, 2.0)), bake(tmp_path, a, (two, 1.0))
    assert distance(wanted, got) < 1e-5 * distance(load_file(a), wanted)


def test_a_module_that_makes_its_layer_larger_is_carried_as_it_is(
    sd1: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    extracted(sd1, one, budget=Budget(rank=4))
    held = load_file(one)
    stem = next(name.removesuffix(".alpha") for name in held if name.endswith(".alpha"))
    write_tensors(one, held | {f"{stem}.reshape_weight": torch.tensor([64, 9])})

    done = resize(one, two, budget=Budget(rank=2))

    assert [name for name, _ in done.carried] == [stem]
    for name, tensor in load_file(one).items():
        if name.startswith(f"{stem}."):
            assert torch.equal(load_file(two)[name], tensor)
    with pytest.raises(InputError, match="cannot be summed"):
        concatenate([one], two, weights=[0.5], force=True)


def test_metadata_tells_of_dora_and_of_biases(sd1: Path, tmp_path: Path) -> None:
    """Loaders make the modules by it: what it does not tell of is not loaded."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    extracted(sd1, one, budget=Budget(rank=4), names="peft")
    with open_adapter(one) as adapter:
        plain = json.loads(adapter.checkpoint.metadata["lora_adapter_metadata"])
    ups = {n: t for n, t in load_file(one).items() if n.endswith(".lora_B.weight")}
    more = {
        n.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(len(t))
        for n, t in ups.items()
    }
    more |= {n.replace("lora_B.weight", "lora_B.bias"): torch.ones(len(t)) for n, t in ups.items()}
    write_tensors(one, load_file(one) | more)

    resize(one, two, budget=Budget(rank=2))

    with open_adapter(two) as adapter:
        told = json.loads(adapter.checkpoint.metadata["lora_adapter_metadata"])
    assert "unet.use_dora" not in plain
    assert told["unet.use_dora"] is told["unet.lora_bias"] is True


def test_outputs_stay_away_from_inputs_and_from_configs_of_others(
    sd1: Path, tmp_path: Path
) -> None:
    one, out = tmp_path / "out.safetensors.part", tmp_path / "out.safetensors"
    extracted(sd1, tmp_path / "one.safetensors", budget=Budget(rank=4), names="peft")
    (tmp_path / "one.safetensors").rename(one)
    before = one.read_bytes()

    with pytest.raises(OutputError, match="is one of the inputs"):
        resize(one, out, budget=Budget(rank=2))
    assert one.read_bytes() == before
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    with pytest.raises(OutputError, match=r"adapter_config\.json lies there"):
        resize(one, tmp_path / "x.safetensors", budget=Budget(rank=2))


def test_what_merges_carry_is_not_extracted(tmp_path: Path) -> None:
    """Position tables of SD3: a merge keeps the base's, whatever an adapter says."""
    first = model_values(shrunk("sd3"), seed=1)
    name = next(name for name in first if name.endswith("pos_embed"))
    second = tuned(first, 2)
    write_tensors(tmp_path / "A.safetensors", first)
    write_tensors(tmp_path / "B.safetensors", second)

    done = extracted(tmp_path, tmp_path / "x.safetensors", budget=FULL, with_diff=True)
    baked = bake(tmp_path, tmp_path / "A.safetensors", (tmp_path / "x.safetensors", 1.0))

    assert (name, "part of what the model is") in [(o.tensor, o.reason) for o in done.left_out]
    assert distance(baked, second) / distance(first, second) == pytest.approx(
        done.residual.relative, rel=1e-2
    )


def test_nan_in_an_adapter_is_told(sd1: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "nan.safetensors"
    extracted(sd1, path, budget=Budget(rank=4))
    held = load_file(path)
    name = next(name for name in held if name.endswith("lora_up.weight"))
    write_tensors(path, held | {name: held[name] * math.nan})

    for words in (
        ["check", str(path), "--against", str(sd1 / "A.safetensors"), "--json"],
        ["resize", str(path), "-o", str(tmp_path / "x.safetensors"), "--rank", "2", "--json"],
        ["merge", str(path), str(path), "-o", str(tmp_path / "x.safetensors"), "--json"],
    ):
        assert run(["lora", *words]) == 1
        error = json.loads(capsys.readouterr().out)["error"]
        assert error["message"] == "up holds NaN or Inf"
        assert name in error["where"]
    assert not (tmp_path / "x.safetensors").exists()


def test_merging_may_recompress(sd1: Path, tmp_path: Path) -> None:
    one, two = two_loras(sd1, tmp_path)
    done = concatenate([one, two], tmp_path / "both.safetensors", budget=Budget(rank=6))
    a = sd1 / "A.safetensors"
    before = load_file(a)
    wanted = bake(tmp_path, a, (one, 1.0), (two, 1.0))
    got = bake(tmp_path, a, (tmp_path / "both.safetensors", 1.0))
    matrices = [n for n, t in before.items() if n.startswith(UNET) and t.dim() > 1]

    assert max(done.written.ranks) == 6
    relative = distance(wanted, got, matrices) / distance(before, wanted, matrices)
    assert relative == pytest.approx(done.residual, rel=0.1)


def test_a_single_file_is_renamed_to_the_same_change(sd1: Path, tmp_path: Path) -> None:
    """The ordinal names of the first LoRA tool too."""
    a = sd1 / "A.safetensors"
    one, _ = two_loras(sd1, tmp_path)
    extracted(sd1, tmp_path / "x.safetensors", budget=Budget(rank=2), dtype="fp32")
    new = tmp_path / "peft.safetensors"
    concatenate([tmp_path / "x.safetensors"], new, names="peft", model=a)
    ordinal = {
        f"unet:0:{part}": t
        for part, t in (("up", torch.randn(10, 4)), ("down", torch.randn(4, 10)))
    }
    old = write_tensors(tmp_path / "old.safetensors", ordinal)
    resize(old, tmp_path / "new.safetensors", budget=Budget(rank=4), model=a)
    wanted = bake(tmp_path, a, (tmp_path / "x.safetensors", 1.0))
    got = bake(tmp_path, a, (new, 1.0))

    assert inspect_adapter(new).scheme == "peft"
    assert distance(wanted, got) / distance(load_file(a), wanted) < 1e-5
    assert any(
        name.startswith("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q")
        for name in load_file(tmp_path / "new.safetensors")
    )
    with pytest.raises(UsageError, match="names are to change"):
        resize(one, tmp_path / "z.safetensors", budget=Budget(rank=4), names="peft")


def test_a_fused_module_meets_its_parts(tmp_path: Path) -> None:
    """A LoRA of the whole in_proj, merged with one of its k alone, goes to q, k and v."""
    specs = shrunk("sd2")
    model = write_tensors(tmp_path / "A.safetensors", model_values(specs, seed=1))
    tensor = next(n for n in specs if n.endswith("resblocks.3.attn.in_proj_weight"))
    rows, columns = specs[tensor].shape
    generator = torch.Generator().manual_seed(1)
    whole = tensor.removesuffix("_weight")
    k = "lora_te_text_model_encoder_layers_3_self_attn_k_proj"
    one = write_tensors(tmp_path / "one.safetensors", {
        f"{whole}.lora_up.weight": torch.randn(rows, 2, generator=generator),
        f"{whole}.lora_down.weight": torch.randn(2, columns, generator=generator),
    })  # fmt: skip
    two = write_tensors(tmp_path / "two.safetensors", {
        f"{k}.lora_up.weight": torch.randn(rows // 3, 1, generator=generator),
        f"{k}.lora_down.weight": torch.randn(1, columns, generator=generator),
    })  # fmt: skip
    with open_model(model) as opened:
        assert opened.names.find(whole)
    done = concatenate([one, two], tmp_path / "both.safetensors", model=model)
    wanted = bake(tmp_path, model, (one, 1.0), (two, 1.0))
    got = bake(tmp_path, model, (tmp_path / "both.safetensors", 1.0))

    assert dict(done.written.ranks) == {2: 2, 3: 1}
    assert torch.allclose(wanted[tensor], got[tensor], atol=1e-5)


def test_what_cannot_be_merged_is_named(sd1: Path, tmp_path: Path) -> None:
    one, two = two_loras(sd1, tmp_path, names="peft")
    out = tmp_path / "out.safetensors"
    with pytest.raises(UsageError, match="their names differ") as caught:
        concatenate([one, two], out)
    assert "--model" in caught.value.fix
    with pytest.raises(UsageError, match="2 files and 1 weights"):
        concatenate([one, two], out, weights=[1.0])
    with pytest.raises(UsageError, match="finite"):
        concatenate([one], out, weights=[math.nan])
    with pytest.raises(UsageError, match="nothing is left"):
        concatenate([one], out, weights=[0.0])
    loha = {f"lora_unet_conv_in.hada_w{i}_{s}": torch.randn(2, 2) for i in (1, 2) for s in "ab"}
    other = write_tensors(tmp_path / "loha.safetensors", loha)
    with pytest.raises(InputError, match="LoHa cannot be summed"):
        concatenate([other], out, weights=[0.5])
    stray = {f"lora_unet_nowhere.lora_{part}.weight": torch.randn(3, 3) for part in ("up", "down")}
    other = write_tensors(tmp_path / "stray.safetensors", stray)
    with pytest.raises(InputError, match="matches nothing"):
        concatenate([other], out, model=sd1 / "A.safetensors")
    assert not out.exists()


# --- check -------------------------------------------------------------------------------------


def test_strengths_are_those_that_numpy_finds(sd1: Path, tmp_path: Path) -> None:
    """For deltas, biases and DoRA alike."""
    path = tmp_path / "x.safetensors"
    extracted(sd1, path, budget=Budget(rank=3), dtype="fp32", with_diff=True)
    a = load_file(sd1 / "A.safetensors")
    name = "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn1_to_q"
    magnitude = {f"{name}.dora_scale": torch.full((20, 1), 3.0)}
    path = write_tensors(tmp_path / "dora.safetensors", load_file(path) | magnitude)
    found = check_adapter(path, sd1 / "A.safetensors")
    baked = bake(tmp_path, sd1 / "A.safetensors", (path, 1.0))
    block = found.blocks["unet IN04"]
    names = [n for n in a if n.startswith(f"{UNET}input_blocks.4.")]
    before = np.concatenate([a[n].double().numpy().ravel() for n in names])
    after = np.concatenate([baked[n].double().numpy().ravel() for n in names])

    assert found.fits
    assert block.tensors == len(names)
    assert block.weight == pytest.approx(np.linalg.norm(before), rel=1e-9)
    assert block.change == pytest.approx(np.linalg.norm(after - before), rel=1e-4)
    assert found.total.tensors == sum(part.tensors for part in found.blocks.values())
    assert found.components["unet"].modules == found.components["unet"].of
    assert list(found.blocks)[:2] == ["unet IN00", "unet IN01"]


def test_strength_of_one_matrix_is_the_norm_of_its_delta(sd1: Path, tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn1_to_q"
    up, down = torch.randn(20, 2), torch.randn(2, 20)
    path = write_tensors(tmp_path / "x.safetensors", {
        f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down,
        f"{name}.alpha": torch.tensor(1.0),
    })  # fmt: skip
    found = check_adapter(path, sd1 / "A.safetensors")
    delta = up.double().numpy() @ down.double().numpy() / 2

    assert found.total.change == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    assert found.components["unet"].modules == 1
    assert dict(found.ranks) == {2: 1}


def test_what_does_not_fit_is_listed(sd1: Path, tmp_path: Path) -> None:
    good = "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn1_to_q"
    same = "unet.down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"
    wide = "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k"
    stray = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    tensors = {}
    for module, columns in ((good, 20), (same, 20), (wide, 2048), (stray, 20)):
        tensors[f"{module}.lora_up.weight"] = torch.randn(20, 2)
        tensors[f"{module}.lora_down.weight"] = torch.randn(2, columns)
    path = write_tensors(tmp_path / "x.safetensors", tensors)
    found = check_adapter(path, sd1 / "A.safetensors")

    assert not found.fits
    assert found.unmatched == (stray,)
    assert sorted(name for name, _ in found.misfits) == sorted([wide, same])
    assert (found.matched, found.modules) == (1, 4)
    assert [family for family, _ in found.base] == ["sdxl"]


# --- inspect -----------------------------------------------------------------------------------


def test_a_base_that_only_the_metadata_tells_is_told() -> None:
    glow = inspect_adapter(Path(ckptools.__file__).parent / "tiny" / "glow.safetensors")

    assert glow.base == (("sd1", "its metadata says sd_v1"),)


def test_inspection_tells_training_and_triggers(tmp_path: Path) -> None:
    frequency = {"10_cat": {"cat": 10, "sitting": 4}, "5_cat": {"cat": 5}}
    metadata = {
        "ss_tag_frequency": json.dumps(frequency), "modelspec.trigger_phrase": "a cat \x1b[31m",
        "ss_base_model_version": "sd_v1", "ss_network_dim": "4",
    }  # fmt: skip
    unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {
        f"{unet}.lora_up.weight": torch.randn(320, 4), f"{unet}.alpha": torch.tensor(2.0),
        f"{unet}.lora_down.weight": torch.randn(4, 768),
        f"{text}.lora_up.weight": torch.randn(3072, 8),
        f"{text}.lora_down.weight": torch.randn(8, 768),
        f"{text}.dora_scale": torch.randn(3072, 1),
        "something.else": torch.randn(2),
    }  # fmt: skip
    path = write_tensors(tmp_path / "x.safetensors", tensors, metadata)
    found = inspect_adapter(path)

    assert found.kinds == {"LoRA": 1, "DoRA": 1}
    assert found.base == (("sd1", "cross-attention takes 768"),)
    assert (found.ranks, found.alphas, found.scales) == ({4: 1, 8: 1}, {2.0: 1}, {0.5: 1, 1.0: 1})
    assert found.tags == (("cat", 15), ("sitting", 4))
    assert found.triggers == ("a cat \x1b[31m",)
    assert found.training == {"ss_base_model_version": "sd_v1", "ss_network_dim": "4"}
    assert found.components["unet"].nbytes == 4 * (320 * 4 + 4 * 768 + 1)
    assert found.components["text_encoder"].modules == 1
    assert found.unknown == ("something.else",)


@pytest.mark.parametrize(
    ("module", "family", "component"),
    [
        ("lora_unet_input_blocks_1_1_proj_in", "sdxl", "unet"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "sdxl", "text_encoder_2"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "sdxl", "text_encoder_2"),
        ("lycoris_text_model_encoder_layers_0_mlp_fc1", "sd1", "text_encoder"),
        ("lycoris_down_blocks_0_attentions_0_proj_in", "sd1", "unet"),
        ("base_model.model.down_blocks.0.resnets.0.conv1", "sd1", "unet"),
        ("text_encoder:5", "sd1", "text_encoder"),
    ],
)
def test_components_are_told_from_names(module: str, family: str, component: str) -> None:
    assert component_of(module, family) == component


# --- the command line --------------------------------------------------------------------------


def run_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:  # type: ignore[type-arg]
    capsys.readouterr()
    code = run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_commands_answer_in_json(
    sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, x = (
        str(sd1 / "A.safetensors"),
        str(sd1 / "B.safetensors"),
        str(tmp_path / "x.safetensors"),
    )
    y, z = str(tmp_path / "y.safetensors"), str(tmp_path / "z.safetensors")
    code, made = run_json(["lora", "extract", a, b, "-o", x, "--rank", "3"], capsys)
    assert (code, made["schema"], made["ranks"]) == (0, "ckptools.lora-extract/1", {"3": 354})
    assert 0 < made["left_out_share"] < made["residual"] < 1
    code, seen = run_json(["lora", "inspect", x], capsys)
    assert (code, seen["kind"], seen["names"]) == (0, "LoRA", "kohya")
    code, told = run_json(["lora", "check", x, "--against", a], capsys)
    assert (code, told["schema"], told["fits"]) == (0, "ckptools.lora-check/1", True)
    assert (told["matched"], told["unmatched"], told["kind"]) == (354, [], "LoRA")
    assert told["ranks"] == {"3": 354}
    assert "base" in told
    assert told["blocks"]["unet M00"]["ratio"] > 0
    code, small = run_json(["lora", "resize", x, "-o", y, "--rank", "2"], capsys)
    assert (code, small["ranks"], small["ranks_before"]) == (0, {"2": 354}, {"3": 354})
    code, both = run_json(["lora", "merge", x, y, "--weights", "1,0.5", "-o", z], capsys)
    assert (code, both["ranks"]) == (0, {"5": 354})
    assert both["residual"] < 1e-3


def test_the_commands_answer_in_words(
    sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, x = (
        str(sd1 / "A.safetensors"),
        str(sd1 / "B.safetensors"),
        str(tmp_path / "x.safetensors"),
    )
    y = str(tmp_path / "y.safetensors")

    assert run(["lora", "extract", a, b, "-o", x, "--energy", "0.5"]) == 0
    assert "residual: ‖B - A - ΔW‖ / ‖B - A‖" in capsys.readouterr().out
    assert run(["lora", "inspect", x]) == 0
    assert "LoRA (354)" in capsys.readouterr().out
    assert run(["lora", "check", x, "--against", a]) == 0
    out = capsys.readouterr().out
    assert "█" in out
    assert "fits A.safetensors" in out
    assert run(["lora", "resize", x, "-o", y, "--rank", "1"]) == 0
    assert run(["lora", "merge", x, y, "-o", y, "--force"]) == 2
    assert "one of the inputs" in capsys.readouterr().err
    assert run(["lora", "merge", x, y, "-o", str(tmp_path / "z.safetensors"), "-q"]) == 0
    assert run(["lora", "merge", x, y, "--weights", "1;2", "-o", y]) == 2


def test_an_adapter_that_does_not_fit_exits_with_1(
    sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stray = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{stray}.lora_up.weight": torch.randn(5120, 2),
               f"{stray}.lora_down.weight": torch.randn(2, 1280)}  # fmt: skip
    path = write_tensors(tmp_path / "x.safetensors", tensors)
    model = str(sd1 / "A.safetensors")
    assert run(["lora", "check", str(path), "--against", model]) == 1
    assert f"matches nothing: {stray}" in capsys.readouterr().out
    code, told = run_json(["lora", "check", str(path), "--against", model], capsys)
    assert (code, told["matched"], told["unmatched"]) == (1, 0, [stray])


def test_a_folder_is_made_for_the_output_and_not_left_empty(sd1: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "deep" / "L.safetensors"

    with pytest.raises(InputError, match="nothing to extract"):
        extract(sd1 / "A.safetensors", sd1 / "A.safetensors", output, budget=Budget(rank=2))
    assert not (tmp_path / "new").exists()

    extracted(sd1, output, budget=Budget(rank=2))
    assert output.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "A"], "this is a whole model, not an adapter"),
        (["inspect", "missing.safetensors"], "no such file"),
        (["check", "X", "--against", "X"], "not a model that adapters are known for"),
        (["extract", "A", "B", "-o", "out.ckpt"], "does not end in .safetensors"),
        (["extract", "A", "B", "-o", "A", "-f"], "is one of the inputs"),
        (["extract", "A", "B", "-o", "X"], "exists"),
        (["extract", "A", "B", "-o", "X.safetensors/o.safetensors"], "is not a folder"),
        (["extract", "A", "B", "-o", "o.safetensors", "--rank", "4", "--energy", "0.5"], "either"),
        (["extract", "A", "B", "-o", "o.safetensors", "--names", "peft", "--with-diff"], "PEFT"),
        (["check", "X", "--against", "X"], "this is an adapter (LoRA), not a model"),
        (["extract", "A", "B", "-o", "."], "the output '.' is a folder"),
        (["merge", "X", "X", "-o", "o.safetensors", "--weights", "1,-1"], "cancel each other out"),
        (["merge", "X", "-o", "o.safetensors", "--weights", "0"], "all weights are 0"),
        (["resize", "X", "-o", "o.safetensors"], "either a rank or an energy"),
    ],
)
def test_mistakes_have_names(
    arguments: list[str],
    message: str,
    sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "lora_unet_conv_in"
    x = write_tensors(tmp_path / "X.safetensors", {
        f"{name}.lora_up.weight": torch.randn(4, 2), f"{name}.lora_down.weight": torch.randn(2, 4),
    })  # fmt: skip
    files = {"A": sd1 / "A.safetensors", "B": sd1 / "B.safetensors", "X": x}
    words = [str(files.get(word, word)) for word in arguments]
    code, told = run_json(["lora", *words], capsys)

    assert code == 2
    assert message in told["error"]["message"]
    assert told["schema"] == f"ckptools.lora-{arguments[0]}/1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["X.safetensors"]


def test_values_that_are_not_finite_are_refused(sd1: Path, tmp_path: Path) -> None:
    first = load_file(sd1 / "A.safetensors")
    name = f"{UNET}input_blocks.0.0.weight"
    broken = first[name].clone()
    broken[0, 0, 0, 0] = math.inf
    b = write_tensors(tmp_path / "B.safetensors", first | {name: broken})
    with pytest.raises(NonFiniteError, match="NaN or Inf") as caught:
        extract(sd1 / "A.safetensors", b, tmp_path / "x.safetensors", budget=Budget(rank=1))
    assert caught.value.where == name
    large = {n: t.float() for n, t in first.items() if t.is_floating_point()}
    large[name] = large[name] + 1e12
    b = write_tensors(tmp_path / "B.safetensors", first | large)
    with pytest.raises(NonFiniteError, match="too large for F16"):
        extract(sd1 / "A.safetensors", b, tmp_path / "x.safetensors", budget=Budget(rank=1))
    assert [path.name for path in tmp_path.iterdir()] == ["B.safetensors"]


def test_models_of_two_families_are_refused(tmp_path: Path) -> None:
    paths = [
        write_tensors(tmp_path / f"{name}.safetensors", model_values(shrunk(name), seed=1))
        for name in ("sd1", "sd2")
    ]
    with pytest.raises(CkptError, match="different families: sd1 and sd2"):
        extract(*paths, tmp_path / "x.safetensors", budget=FULL)
    (tmp_path / "f.safetensors").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        extract(*paths, tmp_path / "f.safetensors", budget=FULL)


@pytest.mark.skipif(os.name == "nt", reason="no limits of this kind")
def test_a_disk_that_is_full_is_told_by_the_output_s_name(sd1: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the system's answer comes from the same place."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "from ckptools.cli import main; main()"
    )
    words = ["lora", "extract", str(sd1 / "A.safetensors"), str(sd1 / "B.safetensors"), "--rank",
             "4", "-o", str(tmp_path / "l.safetensors")]  # fmt: skip

    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2, done.stderr
    assert "l.safetensors: the file would be larger" in done.stderr
    assert list(tmp_path.iterdir()) == []
