"""`ckptools check`: sound merges of the tiny family pass, damaged ones fail and say why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import write_tensors
from narrow import TINY, narrow_model
from safetensors.torch import load_file
from torch import Tensor

from ckptools import checking
from ckptools.check import (
    Check,
    Merged,
    Report,
    Study,
    check_pipeline,
    check_weights,
    denoise_loss,
    figures,
    study_parents,
)
from ckptools.cli import run
from ckptools.errors import UsageError
from ckptools.recipe import load_recipe
from ckptools.render import Pipeline, encode, load_pipeline
from ckptools.sources import open_checkpoint
from ckptools.workflow import merge, planned

UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."
Model = dict[str, Tensor]


@cache
def member(name: str) -> Mapping[str, Tensor]:
    """Its tensors of floats, F32."""
    tensors = load_file(TINY / f"{name}.safetensors")
    return {key: value.float() for key, value in tensors.items() if value.is_floating_point()}


def mixed(**shares: float) -> Model:
    """A sum of members with four input channels."""
    return {key: sum(member(n)[key] * s for n, s in shares.items()) for key in member("A")}


def noisy(model: Mapping[str, Tensor], share: float, prefix: str = "") -> Model:
    """Noise of a share of every tensor's own standard deviation."""
    generator = torch.Generator().manual_seed(7)
    return {
        key: value + share * value.std() * torch.randn(value.shape, generator=generator)
        if key.startswith(prefix) and value.numel() > 1
        else value
        for key, value in model.items()
    }


def edited(model: Mapping[str, Tensor], **edits: Any) -> Model:
    return {**model, **edits}


def write(folder: Path, model: Mapping[str, Tensor], **metadata: str) -> Path:
    halves = {key: value.half() for key, value in model.items()}
    return write_tensors(folder / "model.safetensors", halves, metadata)


@pytest.fixture(scope="module")
def of_ab() -> Study:
    return study_parents({name: TINY / f"{name}.safetensors" for name in "AB"})


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return load_pipeline(TINY / "C.safetensors", device="cpu")


def judged(path: Path, study: Study, bases: str = "C") -> Report:
    """As `check_source` does it, with the parents studied once for many models."""
    names = [each.name for each in study.figures]
    opened = {name: open_checkpoint(TINY / f"{name}.safetensors") for name in (*names, *bases)}
    with open_checkpoint(path) as model:
        found = check_weights(model, opened)
        pipeline = load_pipeline(model)
    for each in opened.values():
        each.close()
    report = check_pipeline(pipeline, parents=study, shares=found.kin["unet"].shares)
    return Report((*found.checks, *report.checks), report.notes)


def by_id(report: Report) -> dict[str, Check]:
    assert len({check.id for check in report.checks}) == len(report.checks) >= 5
    return {check.id: check for check in report.checks}


def failed(report: Report) -> set[str]:
    return {check.id for check in report.failed}


def shown(report: Report) -> str:
    return "\n".join(f"{c.id} {c.value} {c.verdict} {c.reason}" for c in report.checks)


# --- models that work ---------------------------------------------------------------------------


@pytest.mark.parametrize("m", [0.25, 0.5, 1.0])
def test_an_added_difference_of_kin_passes(m: float, of_ab: Study, tmp_path: Path) -> None:
    report = judged(write(tmp_path, mixed(A=1, B=m, C=-m)), of_ab)

    assert report.verdict == "pass", shown(report)
    assert {"barrier", "noise", "prompts.gain", "vae.decoding"} <= by_id(report).keys()


def test_an_inpainting_merge_passes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{A: {TINY}/A.safetensors, I: {TINY}/I.safetensors, "
        f"C: {TINY}/C.safetensors}}\nmerge: A + (I - C)\noutput: {{path: out.safetensors}}\n"
    )

    stages: list[str] = []
    found = checking.check_recipe(load_recipe(recipe), tell=stages.append)

    assert found.report.verdict == "pass", shown(found.report)
    assert found.parents == ("A", "I", "C")
    shares = found.kin["unet"].shares
    assert [round(shares[name], 2) for name in "AIC"] == [1, 1, -1]
    assert not any("C" in stage for stage in stages)  # it was subtracted: nothing to resemble
    assert {"drawing with A", "measuring A", "measuring I"} <= set(stages)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", ["C", "I"])
def test_a_member_passes_alone(name: str) -> None:
    found = checking.check_source(TINY / f"{name}.safetensors")

    assert found.report.verdict == "pass", shown(found.report)
    assert "prompts.sensitivity" in by_id(found.report)


@pytest.mark.parametrize("name", ["A", "B", "U"])
def test_a_member_passes_the_quick_check(name: str) -> None:
    found = checking.check_source(TINY / f"{name}.safetensors", quick=True)

    assert found.report.verdict == "pass", shown(found.report)
    assert by_id(found.report)["noise"].value == pytest.approx(0.001, abs=0.001)


# --- models that do not -------------------------------------------------------------------------


def test_half_of_an_unrelated_model_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, mixed(C=0.5, U=0.5))
    words = [
        "check",
        path,
        "--against",
        TINY / "C.safetensors",
        "--against",
        TINY / "U.safetensors",
    ]

    code = run([*map(str, words), "--json"])
    document = json.loads(capsys.readouterr().out)

    assert code == 1
    assert document["schema"] == "ckptools.check/1"
    assert document["verdict"] == "fail"
    assert document["images"] == []
    checks = {check["id"]: check for check in document["checks"]}
    assert checks["weights.parents"]["verdict"] == "fail"
    assert "trained apart" in checks["weights.parents"]["reason"]
    assert checks["barrier"]["verdict"] == "fail"
    assert checks["barrier"]["value"] > 5 * checks["barrier"]["bound"]
    assert checks["noise"]["verdict"] == "fail"
    assert checks["prompts.gain"]["verdict"] == "fail"
    assert document["shares"]["unet"] == {"C": pytest.approx(0.5, abs=0.01),
                                          "U": pytest.approx(0.5, abs=0.01)}  # fmt: skip


def test_noise_on_all_weights_fails(of_ab: Study, tmp_path: Path) -> None:
    report = judged(write(tmp_path, noisy(mixed(A=1, B=0.5, C=-0.5), 0.3)), of_ab)

    assert {"noise", "vae.round_trip"} <= failed(report), shown(report)


def test_a_broken_vae_fails_and_nothing_else_does(of_ab: Study, tmp_path: Path) -> None:
    report = judged(write(tmp_path, noisy(mixed(A=0.5, B=0.5), 0.3, VAE)), of_ab)

    assert failed(report) == {"vae.round_trip"}, shown(report)


def test_a_text_encoder_of_another_model_fails(of_ab: Study, tmp_path: Path) -> None:
    half = mixed(A=1, B=0.5, C=-0.5)
    swapped = {key: member("U")[key] if key.startswith(TEXT) else half[key] for key in half}
    report = judged(write(tmp_path, swapped), of_ab)

    assert {"prompts.gain", "weights.kin"} <= failed(report), shown(report)
    assert "text_encoder" in by_id(report)["weights.kin"].reason


def test_a_dead_text_encoder_fails(of_ab: Study, tmp_path: Path) -> None:
    half = mixed(A=1, B=0.5, C=-0.5)
    dead = {k: v * 0 if "text_model.encoder.layers" in k else v for k, v in half.items()}
    report = judged(write(tmp_path, dead), of_ab)

    assert {"prompts.gain", "prompts.sensitivity", "weights.zeros"} <= failed(report)
    assert any("text_model" in name for name in by_id(report)["weights.zeros"].tensors)


@pytest.mark.parametrize(
    ("tensor", "component"),
    [
        (UNET + "middle_block.1.proj_in.weight", "unet"),
        (TEXT + "transformer.text_model.encoder.layers.3.mlp.fc1.weight", "text_encoder"),
        (VAE + "decoder.mid.block_1.conv1.weight", "vae"),
    ],
)
def test_nan_is_named_by_its_tensor(tensor: str, component: str, tmp_path: Path) -> None:
    bad = member("A")[tensor].clone()
    bad.view(-1)[5] = float("nan")
    path = write(tmp_path, edited(member("A"), **{tensor: bad}))

    report = checking.check_source(path, quick=True).report

    checks = by_id(report)
    assert {"weights.finite", "finite"} <= failed(report)
    assert checks["weights.finite"].tensors == (tensor,)
    assert checks["weights.finite"].value == 1
    assert tensor in checks["finite"].tensors
    assert checks["finite"].reason.startswith(component)


def test_a_missing_tensor_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = TEXT + "transformer.text_model.encoder.layers.0.self_attn.k_proj.weight"
    path = write(tmp_path, {key: value for key, value in member("A").items() if key != name})

    assert run(["check", str(path), "--against", str(TINY / "A.safetensors"), "-q"]) == 1
    text = "".join(capsys.readouterr().out.split())

    assert "weights.names" in text
    assert "modules" in text
    assert text.count(name) == 2
    assert "weights.finite" not in text  # it passes, and quiet shows what does not


def test_a_wrong_label_of_the_prediction_fails(tmp_path: Path) -> None:
    metadata = {"modelspec.prediction_type": "v"}
    path = write(tmp_path, member("C"), **metadata)

    report = checking.check_source(path, quick=True).report

    assert failed(report) == {"prediction"}
    assert "says v" in by_id(report)["prediction"].reason


def test_weights_that_fp16_cannot_hold_are_a_warning(tmp_path: Path) -> None:
    name = TEXT + "transformer.text_model.final_layer_norm.bias"
    bias = member("C")[name].clone()
    bias[0] = 70000.0
    path = write_tensors(tmp_path / "wide.safetensors", edited(member("C"), **{name: bias}))

    report = checking.check_source(path, quick=True).report

    assert by_id(report)["weights.range"].verdict == "warn"
    assert by_id(report)["weights.range"].tensors == (name,)
    assert by_id(report)["headroom.text_encoder"].verdict == "warn"
    assert name in by_id(report)["headroom.text_encoder"].tensors


def test_weights_scaled_as_a_whole_are_seen(tmp_path: Path) -> None:
    path = write(tmp_path, edited(mixed(A=4), **{"odd.weight": torch.ones(2, 2)}))

    report = checking.check_source(path, against=[TINY / "A.safetensors"], quick=True).report

    checks = by_id(report)
    assert checks["weights.norms"].verdict == "fail"
    assert checks["weights.norms"].value == pytest.approx(4, rel=0.01)
    assert checks["weights.kin"].verdict == "pass"
    assert checks["weights.names"].verdict == "warn"
    assert checks["weights.names"].tensors == ("odd.weight",)


# --- what can be asked --------------------------------------------------------------------------


def test_a_recipe_is_checked_as_the_file_it_would_write(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{A: {TINY}/A.safetensors, B: {TINY}/B.safetensors}}\n"
        "merge: slerp(A, B, t=0.3)\noutput: {path: out.safetensors, dtype: bf16}\n"
    )
    loaded = load_recipe(recipe)

    with planned(loaded, threads=2) as plan:
        merged = Merged(plan)
        ours = {}
        for name in merged:
            buffer = bytearray(merged[name].nbytes)
            half = len(buffer) // 4 * 2
            merged.read_into(name, memoryview(buffer)[half:], half)
            merged.read_into(name, memoryview(buffer)[:half])
            ours[name] = bytes(buffer)
        metadata = dict(merged.metadata)
    written = merge(loaded).output

    with open_checkpoint(written) as theirs:
        assert ours == {name: theirs.read(name) for name in theirs}
        assert metadata.items() <= dict(theirs.metadata).items() | metadata.items()
        assert {n: merged[n] for n in merged} == dict(theirs)
    in_memory = checking.check_recipe(loaded, quick=True).report
    on_disk = checking.check_source(
        written, against=[TINY / "A.safetensors", TINY / "B.safetensors"], quick=True
    ).report
    assert [replace(c, reason="") for c in in_memory.checks] == [
        replace(c, reason="") for c in on_disk.checks
    ]


def test_a_recipe_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{A: {TINY}/A.safetensors, B: {TINY}/B.safetensors}}\n"
        "params: {M: 0.5}\nmerge: A + (B - A) * M\noutput: {path: out.safetensors}\n"
    )

    assert run(["check", str(recipe), "--quick", "--set", "M=0.25"]) == 0
    out = capsys.readouterr()

    assert out.out.rstrip().endswith("recipe.yaml: pass")
    assert "weights.parents" in out.out
    assert "reading weights" in out.err
    assert run(["check", str(recipe), "--quick", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "words",
    [
        ["RECIPE.yaml", "--against", "A.safetensors"],
        ["A.safetensors", "--set", "M=1"],
        ["glow.safetensors"],
        ["A.safetensors", "--against", "glow.safetensors"],
        ["nowhere.safetensors"],
    ],
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(TINY / word) if word.endswith("safetensors") else word for word in words]

    assert run(["check", *paths]) == 2
    assert "fix" in capsys.readouterr().err


def test_a_parent_of_another_family_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = narrow_model(tmp_path, "sdxl").path

    assert run(["check", str(TINY / "A.safetensors"), "--against", str(other), "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]

    assert (error["code"], error["where"]) == ("input", str(other))
    assert "sdxl" in error["message"]
    assert "sd1" in error["message"]


def test_parents_of_one_name_are_told_apart() -> None:
    path = TINY / "A.safetensors"

    found = checking.check_source(path, against=[path, path], base=path, quick=True)

    assert found.parents == ("A", "A (2)", "A (3)")
    assert list(found.kin["unet"].shares.values()) == pytest.approx([1 / 3] * 3)
    assert found.report.verdict == "pass"


def test_a_recipe_says_how_its_models_are_built(tmp_path: Path) -> None:
    model = narrow_model(tmp_path, "sd1")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{A: {{path: {model.path}, config: {model.config.name}}}}}\n"
        "merge: A\noutput: {path: out.safetensors}\n"
    )

    found = checking.check_recipe(load_recipe(recipe), quick=True)

    assert found.report.notes == ()
    assert by_id(found.report)["modules"].verdict == "pass"


def test_a_model_of_unknown_width_is_checked_by_its_weights(tmp_path: Path) -> None:
    model = narrow_model(tmp_path, "sd1")

    found = checking.check_source(model.path)

    assert "--config" in found.report.notes[0]
    assert {check.id for check in found.report.checks} == {"weights.finite", "weights.range"}


@pytest.mark.parametrize("prefix", [VAE, UNET])
def test_a_part_of_a_model_is_checked_by_its_weights(prefix: str, tmp_path: Path) -> None:
    path = write(tmp_path, {k: v for k, v in member("A").items() if k.startswith(prefix)})

    found = checking.check_source(path)

    assert found.report.verdict == "pass"
    assert "only the weights were checked" in found.report.notes[0]


def test_without_the_libraries_the_weights_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "find_spec", lambda name: None if name == "diffusers" else name)

    found = checking.check_source(TINY / "A.safetensors")

    assert "diffusers not installed" in found.report.notes[0]
    assert found.report.verdict == "pass"


@pytest.mark.parametrize(("family", "channels"), [("sdxl", 4), ("sd1", 8)])
def test_models_of_other_kinds_are_measured(family: str, channels: int, tmp_path: Path) -> None:
    """Random weights: they draw and answer, and predict no noise."""
    model = narrow_model(tmp_path, family, channels)
    pipeline = load_pipeline(model.path, config=model.config, device="cpu")

    report = check_pipeline(replace(pipeline, size=(64, 64)))

    checks = by_id(report)
    assert {"finite", "prediction", "vae.round_trip", "prompts.sensitivity"} <= checks.keys()
    assert checks["finite"].verdict == "pass"
    assert checks["noise"].verdict == "fail"


def test_a_model_that_knows_no_words_draws_nothing(
    monkeypatch: pytest.MonkeyPatch, tiny: Pipeline
) -> None:
    def refuse(pipeline: Pipeline) -> None:
        raise UsageError("no built-in prompt")

    monkeypatch.setattr(figures, "probes_for", refuse)

    report = check_pipeline(tiny)

    assert "nothing was drawn" in report.notes[-1]
    assert {"barrier", "prompts.gain", "prompts.sensitivity"}.isdisjoint(by_id(report))
    assert failed(report) == set(), shown(report)


# --- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_loss_is_that_of_diffusers(tiny: Pipeline, prediction: str) -> None:
    """Noised and read back by diffusers' DDPM scheduler."""
    from diffusers import DDPMScheduler

    pipeline = replace(tiny, prediction=prediction)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    prompts = ["a red circle on a navy background", "a white ring on a brown background"]
    moments = (50, 400, 950)

    ours = denoise_loss(pipeline, list(latents.numpy()), prompts, seeds=(4, 9), moments=moments)

    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction" if prediction == "v" else "epsilon",
    )  # fmt: skip
    theirs = np.zeros((2, 3))
    for i, prompt in enumerate(prompts):
        text = encode(tiny, prompt).positive
        for seed in (4, 9):
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
            for j, t in enumerate(moments):
                when = torch.tensor([t])
                noised = scheduler.add_noise(latents[i : i + 1], noise, when)
                with torch.no_grad():
                    out = tiny.unet(noised, when, text).sample
                clean = scheduler.step(out, t, noised).pred_original_sample
                kept = scheduler.alphas_cumprod[t]
                seen = (noised - kept.sqrt() * clean) / (1 - kept).sqrt()
                theirs[i, j] += float((seen - noise).square().mean()) / 2
    assert ours == pytest.approx(theirs, rel=2e-3)


def test_a_prompt_for_every_picture(tiny: Pipeline) -> None:
    with pytest.raises(UsageError, match="1 pictures and 2 prompts"):
        denoise_loss(tiny, [np.zeros((4, 8, 8), np.float32)], ["a", "b"])
