"""`ckptools diff`: what it says about changes that the test itself made."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import UNET, Specs, model_values, shrunk, with_channels, write_model, write_tensors
from torch import Tensor

from ckptools import measure
from ckptools.cli import run
from ckptools.diff import fit_models, kind_of

VAE = "first_stage_model."
TEXT = "cond_stage_model."
Model = dict[str, Tensor]


@pytest.fixture(scope="module")
def specs() -> Specs:
    return shrunk("sd1")


@pytest.fixture(scope="module")
def base(specs: Specs) -> Model:
    return model_values(specs, seed=1)


def write(folder: Path, name: str, tensors: Model, metadata: dict[str, str] | None = None) -> Path:
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    return write_tensors(folder / f"{name}.safetensors", copies, metadata)


def diff(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    code = run(["diff", *map(str, words), "--json", "--exit-code"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["same"] else 1)
    assert found["schema"] == "ckptools.diff/1"
    return found


def mixed(parts: dict[float, Model], like: Model) -> Model:
    """The sum of models times numbers, in float64, stored as `like` is."""
    return {
        name: sum(factor * model[name].double() for factor, model in parts.items()).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in like.items()
    }


def test_a_copy_is_identical(base, tmp_path, capsys) -> None:
    a, b = write(tmp_path, "a", base), write(tmp_path, "b", base)

    found = diff(capsys, a, b)

    assert (found["explanation"], found["changed"], found["same"]) == ("identical", 0, True)
    assert set(found["groups"]["unet"]) >= {
        *("max_abs", "mean_abs", "rel_l2", "cosine", "changed_share", "nonfinite"),
    }
    assert found["groups"]["IN04"]["cosine"] == 1


def test_metadata_alone_makes_no_other_model(base, tmp_path, capsys) -> None:
    a, b = write(tmp_path, "a", base, {"k": "1"}), write(tmp_path, "b", base, {"k": "2"})

    found = diff(capsys, a, b)

    assert found["explanation"] == "identical weights; metadata differs"
    assert found["metadata"] == [{"key": "k", "a": "1", "b": "2"}]
    assert found["same"]


def test_statistics_are_those_of_float64(specs, base, tmp_path, capsys) -> None:
    other = model_values(specs, seed=2)
    a, b = write(tmp_path, "a", base), write(tmp_path, "b", other)

    found = diff(capsys, a, b, "--top", 3)

    names = [name for name in specs if name.startswith(VAE)]
    x, y = (torch.cat([m[name].double().flatten() for name in names]) for m in (base, other))
    vae = found["groups"]["vae"]
    assert vae["max_abs"] == pytest.approx(float((x - y).abs().max()), rel=1e-6)
    assert vae["mean_abs"] == pytest.approx(float((x - y).abs().mean()), rel=1e-6)
    assert vae["rel_l2"] == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-6)
    assert vae["cosine"] == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-6)
    assert vae["changed_share"] == float((x != y).double().mean())
    assert len(found["top"]) == 3
    assert found["explanation"] == "differs in the UNet, the text encoder and the VAE"


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (TEXT, "only the text encoder differs"),
        (VAE, "only the VAE differs"),
        (UNET, "only the UNet differs"),
    ],
)
def test_the_one_component_that_differs_is_named(prefix, words, base, tmp_path, capsys) -> None:
    random = torch.Generator().manual_seed(3)
    other = {
        name: value + torch.randn(value.shape, generator=random).to(value.dtype)
        if name.startswith(prefix) and value.is_floating_point()
        else value
        for name, value in base.items()
    }
    a, b = write(tmp_path, "a", base), write(tmp_path, "b", other)

    assert diff(capsys, a, b)["explanation"] == words


@pytest.mark.parametrize(("narrow", "name"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_rounding_is_proven(narrow, name, specs, tmp_path, capsys) -> None:
    wide = model_values(specs, seed=1, dtype="F32")
    rounded = {k: v.to(narrow) if v.is_floating_point() else v for k, v in wide.items()}
    a, b = write(tmp_path, "a", wide), write(tmp_path, "b", rounded)
    rounded[f"{UNET}out.2.bias"] = rounded[f"{UNET}out.2.bias"] * 2
    c = write(tmp_path, "c", rounded)

    said = diff(capsys, a, b)["explanation"]
    turned = diff(capsys, b, a)["explanation"]
    spoilt = diff(capsys, a, c)["explanation"]

    assert said == f"same weights, other dtype: B is A rounded to {name}"
    assert turned == f"same weights, other dtype: A is B rounded to {name}"
    assert "rounded" not in spoilt


def test_a_wider_dtype_of_equal_numbers_is_the_same(base, tmp_path, capsys) -> None:
    wide = {k: v.float() if v.is_floating_point() else v for k, v in base.items()}
    a, b = write(tmp_path, "a", base), write(tmp_path, "b", wide)

    found = diff(capsys, a, b)

    assert found["explanation"] == "same weights, other dtype (F16 and F32)"
    assert found["same"]


def test_names_of_another_layout_are_matched(base, tmp_path, capsys) -> None:
    bare = {name.replace(".text_model.", "."): value for name, value in base.items()}
    a, b = write(tmp_path, "a", base), write(tmp_path, "b", bare)

    found = diff(capsys, a, b)

    assert found["explanation"].startswith("same weights, other layout")
    assert (found["same"], found["only_a"], found["only_b"]) == (True, [], [])


@pytest.mark.parametrize("rank", [1, 4])
def test_a_baked_lora_is_recognised_with_its_rank(rank, tmp_path, capsys) -> None:
    specs = shrunk("sd1", 8)
    keep = {name: s for name, s in specs.items() if not name.startswith(VAE)}
    base = model_values(keep, seed=1)
    random = torch.Generator().manual_seed(5)
    other = dict(base)
    for name, value in base.items():
        if ".attn" in name and value.ndim == 2:
            up, down = (torch.randn(n, rank, generator=random) for n in value.shape)
            other[name] = (value.float() + 0.1 * up @ down.T).half()
    a, b = write(tmp_path, "a", base), write(tmp_path, "b", other)

    found = diff(capsys, a, b)

    low = found["low_rank"]
    assert (low["rank"], low["low"]) == (rank, low["sampled"])
    assert f"as by a LoRA of rank ≈ {rank} on attention (12 of 12" in found["explanation"]


def test_ema_copies_are_told(base, specs, tmp_path, capsys) -> None:
    averaged = model_values(specs, seed=7)
    copies = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): averaged[name]
        for name in base
        if name.startswith(UNET)
    }
    with_ema = write(tmp_path, "a", base | copies)
    without = write(tmp_path, "b", base)
    ema_only = write(tmp_path, "c", base | {n: averaged[n] for n in base if n.startswith(UNET)})

    dropped = diff(capsys, with_ema, without)
    used = diff(capsys, with_ema, ema_only)
    turned = diff(capsys, ema_only, with_ema)

    assert dropped["explanation"] == "A has an EMA copy of the UNet (686 tensors), B not"
    assert used["explanation"] == "the UNet of B is the EMA copy in A"
    assert turned["explanation"] == "the UNet of A is the EMA copy in B"


def test_more_input_channels_are_compared_in_their_common_part(
    base, specs, tmp_path, capsys
) -> None:
    name = f"{UNET}input_blocks.0.0.weight"
    wider = dict(base)
    extra = torch.zeros(base[name].shape[0], 5, 3, 3, dtype=torch.float16)
    wider[name] = torch.cat([base[name], extra], dim=1)
    assert with_channels(specs, 9)[name].shape == tuple(wider[name].shape)
    a, b = write(tmp_path, "a", base), write(tmp_path, "b", wider)

    found = diff(capsys, a, b)

    assert found["reshaped"][0]["compared"]
    assert not found["same"]
    assert "A (base) takes 4 input channels, B (inpainting) 9" in found["explanation"]


def test_integers_are_no_part_of_norms_but_of_what_changed(base, tmp_path, capsys) -> None:
    """Position ids would outweigh a text encoder; a float64 oracle over its floats."""
    ids = f"{TEXT}transformer.text_model.embeddings.position_ids"
    assert not base[ids].is_floating_point()
    other = {
        name: value + 0.01 * torch.ones_like(value) if value.is_floating_point() else value
        for name, value in base.items()
    }
    names = [name for name in base if name.startswith(TEXT) and name != ids]
    ours, theirs = (
        torch.cat([model[name].double().flatten() for name in names]) for model in (base, other)
    )
    a, b = write(tmp_path, "a", base), write(tmp_path, "b", other)
    c = write(tmp_path, "c", {**base, ids: base[ids] + 1})

    group = diff(capsys, a, b)["groups"]["text_encoder"]
    shifted = diff(capsys, a, c)["groups"]["text_encoder"]
    alone = diff(
        capsys,
        write(tmp_path, "d", {"ids": base[ids]}),
        write(tmp_path, "e", {"ids": base[ids] * 2}),
    )["groups"]["other"]

    cosine = float(ours @ theirs / (ours.norm() * theirs.norm()))
    assert group["rel_l2"] == pytest.approx(float((ours - theirs).norm() / ours.norm()), rel=1e-6)
    assert group["cosine"] == pytest.approx(cosine, rel=1e-6)
    assert (shifted["rel_l2"], shifted["cosine"]) == (0, 1)
    assert shifted["changed_share"] == 77 / group["values"]
    assert alone["rel_l2"] == 1


def test_other_shapes_and_missing_tensors_are_listed(base, tmp_path, capsys) -> None:
    other = dict(base)
    other[f"{UNET}out.2.bias"] = torch.zeros(7, dtype=torch.float16)
    del other[f"{UNET}out.2.weight"]
    other["extra"] = torch.zeros(2)
    a, b = write(tmp_path, "a", base), write(tmp_path, "b", other)

    found = diff(capsys, a, b)

    assert found["only_a"] == [f"{UNET}out.2.weight"]
    assert found["only_b"] == ["extra"]
    assert found["reshaped"][0]["compared"] is False
    assert "1 tensor has another shape" in found["explanation"]


def test_explain_by_finds_a_weighted_sum_and_an_added_difference(
    specs, base, tmp_path, capsys
) -> None:
    c, d = model_values(specs, seed=2), model_values(specs, seed=3)
    total = mixed({0.7: base, 0.3: c}, base)
    added = {
        n: (v.double() + 0.4 * (c[n].double() - d[n].double())).to(v.dtype)
        if v.is_floating_point() else v
        for n, v in base.items()
    }  # fmt: skip
    paths = [write(tmp_path, name, model) for name, model in
             (("a", base), ("s", total), ("d", added), ("c", c), ("e", d))]  # fmt: skip
    a, s, x, c_path, d_path = paths

    summed = diff(capsys, a, s, "--explain-by", c_path)["fits"]
    moved = diff(capsys, a, x, "--explain-by", c_path, "--explain-by", d_path)["fits"]

    assert summed["all"]["coefficients"] == pytest.approx({"A": 0.7, "C": 0.3}, abs=1e-4)
    assert summed["all"]["sum"] == pytest.approx(1, abs=1e-4)
    assert summed["all"]["residual"] < 1e-3
    assert summed["IN05"]["formula"] == "0.7·A + 0.3·C"
    assert moved["unet"]["formula"] == "A + 0.4·(C - D)"


def test_a_fit_tells_what_is_left_over() -> None:
    random = torch.Generator().manual_seed(1)
    a, c, noise = (torch.randn(3, 5000, generator=random, dtype=torch.float64)).unbind()
    b = 0.5 * a + 0.5 * c + 0.1 * noise
    stack = torch.stack([b, a, c])

    fit = fit_models((stack @ stack.T).numpy())

    assert fit is not None
    oracle = torch.linalg.lstsq(torch.stack([a, c]).T, b[:, None]).solution[:, 0]
    assert fit.coefficients == pytest.approx(oracle.tolist(), abs=1e-9)
    left = b - oracle[0] * a - oracle[1] * c
    assert fit.residual == pytest.approx(float(left.norm() / (b - a).norm()), rel=1e-6)
    same = torch.stack([a, a, c])
    assert fit_models((same @ same.T).numpy()) is None


def test_models_without_common_tensors_explain_nothing(base, tmp_path, capsys) -> None:
    a = write(tmp_path, "a", base)
    other = write(tmp_path, "o", {"x": torch.ones(3)})

    assert run(["diff", str(a), str(a), "--explain-by", str(other)]) == 2
    assert "no tensors in common" in capsys.readouterr().err
    assert diff(capsys, a, other)["explanation"].startswith("nothing in common")


def test_nan_is_counted(base, tmp_path, capsys) -> None:
    broken = dict(base)
    name = f"{UNET}out.2.bias"
    broken[name] = broken[name].clone()
    broken[name][0] = math.nan
    a, b = write(tmp_path, "a", base), write(tmp_path, "b", broken)

    found = diff(capsys, a, b)

    assert found["groups"]["unet"]["nonfinite"] == 1
    assert found["notes"] == ["1 values are NaN or Inf; norms leave them out"]


def test_structure_reads_no_values(base, specs, tmp_path, capsys, monkeypatch) -> None:
    a, b = write(tmp_path, "a", base), write_model(tmp_path / "b.safetensors", specs, seed=2)
    c = write(tmp_path, "c", {k: v.float() for k, v in base.items()} | {"extra": torch.ones(1)})
    monkeypatch.setattr(measure, "_blocks", None)

    same = diff(capsys, a, b, "--structure")
    other = diff(capsys, a, c, "--structure")

    assert same["explanation"] == "same structure; values were not read"
    assert (same["same"], same["groups"]) == (True, {})
    assert other["explanation"].startswith("structure differs: tensors 1 only in B")
    assert run(["diff", str(a), str(b), "--structure", "--explain-by", str(c)]) == 2


@pytest.mark.parametrize("options", [[], ["--structure"]])
def test_nothing_here_loads_torch(options, base, tmp_path) -> None:
    a = write(tmp_path, "a", base)
    b = write(tmp_path, "b", {k: v * 2 for k, v in base.items()})
    code = (
        "import sys; from ckptools.cli import run; "
        f"run(['diff', {str(a)!r}, {str(b)!r}, *{options!r}]); print('torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"COLUMNS": "200"})  # fmt: skip

    assert done.stdout.splitlines()[-1] == "False"


def test_the_terminal_shows_verdict_groups_and_tensors(specs, base, tmp_path, capsys) -> None:
    other = {k: v.clone() for k, v in base.items()}
    name = f"{UNET}input_blocks.1.1.proj_in.weight"
    other[name] += 1
    c = model_values(specs, seed=2)
    extra = {f"lone{n}\x1b[31m": torch.ones(1) for n in range(9)}
    a = write(tmp_path, "a", base, {"k": "v"})
    b = write(tmp_path, "b", other | extra)

    code = run(["diff", str(a), str(b), "--explain-by", str(write(tmp_path, "c", c))])
    text = capsys.readouterr().out

    assert code == 0
    assert text.startswith("only the UNet differs")
    assert "\x1b" not in text
    assert "only in B: … 1 more" in text
    assert "unchanged: text_encoder vae" in text
    assert "metadata differs: k" in text
    assert "1 of 1,131 shared tensors differ" in text
    assert "residual / |B - A|" in text


def test_quiet_speaks_by_exit_code(base, tmp_path, capsys) -> None:
    a = write(tmp_path, "a", base)
    b = write(tmp_path, "b", {k: v * 2 for k, v in base.items()})

    assert run(["diff", str(a), str(a), "-q"]) == 0
    assert run(["diff", str(a), str(b), "-q"]) == 1
    assert run(["diff", str(a), str(tmp_path / "none.safetensors"), "-q"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight", "attention q"),
        (f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.bias", "attention out"),
        (f"{UNET}input_blocks.1.1.transformer_blocks.0.norm1.weight", "norm"),
        (f"{UNET}input_blocks.1.1.transformer_blocks.0.ff.net.2.weight", "ff"),
        (f"{UNET}input_blocks.1.0.in_layers.0.weight", "norm"),
        (f"{UNET}input_blocks.1.0.in_layers.2.weight", "conv"),
        (f"{UNET}input_blocks.1.0.emb_layers.1.weight", "time"),
        (f"{UNET}input_blocks.3.0.op.weight", "conv"),
        (f"{UNET}input_blocks.1.1.proj_in.weight", "projection"),
        (f"{VAE}decoder.mid.attn_1.q.weight", "attention q"),
        (f"{TEXT}transformer.text_model.encoder.layers.0.self_attn.v_proj.weight", "attention v"),
        (f"{TEXT}transformer.text_model.encoder.layers.0.self_attn.out_proj.bias", "attention out"),
        (f"{TEXT}transformer.text_model.embeddings.token_embedding.weight", "embedding"),
        ("alphas_cumprod", "other"),
    ],
)
def test_tensors_are_sorted_by_what_they_are_for(name: str, kind: str) -> None:
    assert kind_of(name) == kind
