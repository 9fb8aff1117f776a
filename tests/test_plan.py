"""Plans: what becomes of every tensor and why, and everything that stands in a merge's way."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import (
    UNET,
    Specs,
    layout,
    model_values,
    shrunk,
    with_channels,
    write_model,
    write_tensors,
)
from safetensors.torch import load_file
from torch import Tensor

from ckptools.errors import CkptError, InputError, ManyErrors, OutputError, RecipeError, UsageError
from ckptools.native import KERNELS
from ckptools.plain import needs_torch
from ckptools.plan import Plan, Step, make_plan
from ckptools.program import Compute, Copy, PositionIds, Widen, reads_of
from ckptools.recipe import parse_recipe
from ckptools.tensors import TensorSpec
from ckptools.workflow import find_step, merge

VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."
POSITION_IDS = f"{TEXT}embeddings.position_ids"
CONV_IN = f"{UNET}input_blocks.0.0.weight"
Planned = Callable[..., Plan]


def recipe_text(models: Mapping[str, Path | str], formula: str, more: str, output: str) -> str:
    lines = [f'  {name}: "{path}"' for name, path in models.items()]
    text = "\n".join(["ckptools: 1", "models:", *lines, f'merge: "{formula}"', more])
    return text + f"\noutput: {{path: {output}}}\n"


@pytest.fixture
def planned(tmp_path: Path) -> Iterator[Planned]:
    """Plan a merge of model files; the plans are closed at the end."""
    with ExitStack() as stack:

        def make(
            models: Mapping[str, Path | str],
            formula: str,
            more: str = "",
            output: str = "out.safetensors",
            *,
            force: bool = False,
        ) -> Plan:
            text = recipe_text(models, formula, more, output)
            plan = make_plan(parse_recipe(text, tmp_path / "recipe.yaml"), force=force)
            stack.callback(plan.close)
            return plan

        yield make


@pytest.fixture
def abc(sd1_models: tuple[Path, Path, Path]) -> dict[str, Path]:
    """Three SD1 models by the names A, B and C."""
    return dict(zip("ABC", sd1_models, strict=True))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Other models, by what they are. Do not change."""
    folder = tmp_path_factory.mktemp("models")
    specs = shrunk("sd1")
    made = {
        "inpainting": shrunk("sd1-inpainting"),
        "ip2p": shrunk("sd1-ip2p"),
        "sd2": shrunk("sd2", 64),
        "sd2-depth": shrunk("sd2-depth", 64),
        "sdxl": shrunk("sdxl", 64),
        "no-vae": {name: spec for name, spec in specs.items() if not name.startswith(VAE)},
    }
    return {
        name: write_model(folder / f"{name}.safetensors", specs, seed=50 + at)
        for at, (name, specs) in enumerate(made.items())
    }


def steps_by_name(plan: Plan) -> dict[str, Step]:
    return {step.spec.name: step for step in plan.steps}


def errors_of(make: Callable[[], object]) -> list[CkptError]:
    with pytest.raises(CkptError) as caught:
        make()
    error = caught.value
    return list(error.errors) if isinstance(error, ManyErrors) else [error]


def only_error(make: Callable[[], object]) -> CkptError:
    (error,) = errors_of(make)
    return error


def sd1_without(prefix: str) -> Specs:
    return {name: spec for name, spec in shrunk("sd1").items() if not name.startswith(prefix)}


# --- counts ------------------------------------------------------------------------------------


def test_counts_are_disjoint_and_add_up(abc: dict[str, Path], planned: Planned) -> None:
    plan = planned(
        abc,
        "A + (B - C) * M",
        'params: {M: {default: 0, unet: 0.5, "*output_blocks*": 0}}\ntake: {vae: C}',
        "out.safetensors, dtype: {text_encoder: bf16}",
    )
    groups = Counter((step.component, step.action) for step in plan.steps)
    unmerged = sum("output_blocks" in name for name in layout("sd1"))
    assert 0 < unmerged < 686

    assert sum(plan.counts.values()) == len(plan.steps) == len(layout("sd1")) == 1131
    assert groups == {
        ("unet", "merged"): 686 - unmerged,
        ("unet", "copied"): unmerged,
        ("text_encoder", "cast"): 196,
        ("text_encoder", "carried"): 1,
        ("vae", "copied"): 248,
    }
    assert list(plan.counts.items()) == [
        ("merged", 686 - unmerged),
        ("carried", 1),
        ("copied", unmerged + 248),
        ("cast", 196),
    ]
    assert plan.output_bytes == sum(step.spec.nbytes for step in plan.steps)
    assert plan.read_bytes == sum(
        read.spec.nbytes for step in plan.steps for read in reads_of(step.program)
    )


def test_copied_tensors_are_read_once_and_merged_ones_from_every_model(
    abc: dict[str, Path], planned: Planned
) -> None:
    plan = planned(abc, "A + (B - C) * M", "params: {M: {default: 0.5, vae: 0}}")
    reads = Counter((step.component, len(reads_of(step.program))) for step in plan.steps)

    assert reads == {("unet", 3): 686, ("text_encoder", 3): 196, ("text_encoder", 1): 1,
                     ("vae", 1): 248}  # fmt: skip


def test_steps_are_in_the_order_the_reference_writes(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    plan = planned(abc, "A * 0.5 + B * 0.5")
    tensors = load_file(abc["A"])
    written = list(load_file(write_tensors(tmp_path / "again.safetensors", tensors)))

    assert {step.spec.name for step in plan.steps} == set(written)
    starts = [step.spec.dtype for step in plan.steps]
    assert starts == ["I64"] + ["F16"] * 1130
    assert [s.spec.name for s in plan.steps[1:]] == sorted(s.spec.name for s in plan.steps[1:])


def test_a_formula_of_one_model_copies_it(abc: dict[str, Path], planned: Planned) -> None:
    plan = planned(abc, "B", "base: A")

    assert plan.base.name == "A"
    assert plan.counts == {"merged": 0, "carried": 1, "copied": 1130, "cast": 0}
    assert "nothing is merged: every tensor is copied or carried" in plan.warnings


# --- numbers -----------------------------------------------------------------------------------


def test_each_tensor_has_the_numbers_of_the_last_line_that_matches(
    abc: dict[str, Path], planned: Planned
) -> None:
    more = """\
params:
  M:
    default: 0.7
    unet: 0.5
    OUT03-OUT06: 0.3
    vae: 0
    "*attn2*": 0.9
"""
    plan = planned(abc, "A + (B - C) * M", more)

    def explained(tensor: str) -> tuple[float, str, str]:
        step = find_step(plan, tensor)
        line = step.lines["M"]
        return line.value, line.selector, str(step.form)

    middle = f"{UNET}middle_block.1.transformer_blocks.0."
    assert explained(f"{middle}attn1.to_k.weight") == (0.5, "unet", "A + 0.5*B - 0.5*C")
    assert explained(f"{middle}attn2.to_k.weight") == (0.9, "*attn2*", "A + 0.9*B - 0.9*C")
    assert explained(f"{UNET}output_blocks.3.0.in_layers.0.weight")[:2] == (0.3, "OUT03-OUT06")
    assert explained(f"{UNET}output_blocks.7.0.in_layers.0.weight")[:2] == (0.5, "unet")
    assert explained(f"{UNET}output_blocks.5.1.*attn2.to_v.weight")[:2] == (0.9, "*attn2*")
    assert explained(f"{TEXT}final_layer_norm.weight")[:2] == (0.7, "default")
    assert explained(f"{VAE}decoder.conv_in.weight") == (0.0, "vae", "A")


def test_block_weights_set_every_tensor_of_their_block(
    abc: dict[str, Path], planned: Planned
) -> None:
    numbers = [n / 100 for n in range(26)]
    plan = planned(
        abc, "A * (1 - M) + B * M", f"params: {{M: {{mbw: {numbers}, vae: 0.5, IN04: 0.99}}}}"
    )
    found = {(step.block, step.lines["M"].value) for step in plan.steps if step.component == "unet"}
    blocks = [f"IN{n:02d}" for n in range(12)] + ["M00"] + [f"OUT{n:02d}" for n in range(12)]
    expected = dict(zip(blocks, numbers[1:], strict=True)) | {"IN04": 0.99}

    assert found == set(expected.items())
    assert {s.lines["M"].value for s in plan.steps if s.component == "vae"} == {0.5}
    merged_text = [s for s in plan.steps if s.component == "text_encoder" and s.form is not None]
    assert {str(step.form) for step in merged_text} == {"A"}  # BASE is 0


def test_block_weights_of_sdxl_are_twenty(shared: dict[str, Path], planned: Planned) -> None:
    models = {"A": shared["sdxl"], "B": shared["sdxl"]}
    numbers = [n / 100 for n in range(20)]
    plan = planned(models, "A * (1 - M) + B * M", f"params: {{M: {{mbw: {numbers}}}}}")
    error = only_error(
        lambda: planned(models, "A * (1 - M) + B * M", f"params: {{M: {{mbw: {[0.5] * 26}}}}}")
    )

    assert find_step(plan, f"{UNET}output_blocks.8.0.in_layers.0.weight").lines["M"].value == 0.19
    assert find_step(plan, f"{UNET}label_emb.0.0.weight").lines["M"].value == 0.01
    assert error.what == "`mbw` has 26 numbers; sdxl takes 20"
    assert "BASE IN00-IN08 M00 OUT00-OUT08" in error.fix


def test_all_wrong_selectors_come_at_once_with_their_lines(
    abc: dict[str, Path], planned: Planned
) -> None:
    more = """\
params:
  M: {default: 0.5, unett: 1}
  N:
    default: 0.5
    OUT12: 1
    "*attn3*": 1
"""
    found = errors_of(lambda: planned(abc, "A * (1 - M * N) + B * M * N", more))

    assert [error.where.rpartition(":")[2] for error in found] == ["8", "11", "12"]
    assert all(isinstance(error, RecipeError) and error.fix for error in found)
    assert "did you mean 'unet'?" in found[0].fix


def test_a_line_that_never_wins_is_told(abc: dict[str, Path], planned: Planned) -> None:
    plan = planned(abc, "A * (1 - M) + B * M", "params: {M: {vae: 0, default: 0.5}}")

    assert [warning for warning in plan.warnings if "never wins" in warning] == [
        f"{plan.recipe.path}:7: 'vae' of M never wins: lines below it cover all of it "
        "(the last line that matches wins)"
    ]


def test_numbers_that_leave_a_method_s_bounds_are_refused_where_they_hold(
    abc: dict[str, Path], planned: Planned
) -> None:
    error = only_error(
        lambda: planned(abc, "slerp(A, B, t=M)", "params: {M: {default: 0.5, vae: 1.5}}")
    )

    assert "slerp: t = 1.5 is outside 0 to 1" in error.what
    assert error.fix.startswith(f"for 248 tensors, such as {VAE}")
    assert "M = 1.5 (set by 'vae' at" in error.fix


def test_numbers_that_leave_no_model_are_refused(abc: dict[str, Path], planned: Planned) -> None:
    found = errors_of(lambda: planned(abc, "A * M", "params: {M: {default: 1, vae: 0}}"))

    (error,) = found
    assert error.what == "with these numbers the formula is 0: a difference, not a model"
    assert error.where.endswith("recipe.yaml:6")
    assert error.fix.startswith(f"for 248 tensors, such as {VAE}")
    assert error.fix.endswith("recipe.yaml:7)")


def test_an_unknown_compat_is_refused_whether_or_not_blocks_are_used(
    abc: dict[str, Path], planned: Planned
) -> None:
    error = only_error(lambda: planned(abc, "A * 0.5 + B * 0.5", "compat: mehh"))

    assert error.what == "compat: sd1 has no mapping 'mehh'"
    assert error.where.endswith("recipe.yaml:7")
    assert error.fix == "did you mean 'meh'?"


def test_compat_moves_tensors_between_blocks(abc: dict[str, Path], planned: Planned) -> None:
    numbers = [0.1, 0.2] + [0.5] * 24
    more = f"params: {{M: {{mbw: {numbers}}}}}\n"
    name = f"{UNET}time_embed.0.weight"
    usual = planned(abc, "A * (1 - M) + B * M", more)
    mecha = planned(abc, "A * (1 - M) + B * M", more + "compat: mecha")

    assert find_step(usual, name).lines["M"].value == 0.2
    assert find_step(mecha, name).lines["M"].value == 0.1


def test_coefficients_that_do_not_add_up_are_shown(abc: dict[str, Path], planned: Planned) -> None:
    plan = planned(abc, "0.3 * A + 0.9 * B")
    fine = planned(abc, "1.5 * A - 0.5 * B + C * 0")

    assert (
        "the coefficients add up to 1.2, not 1, for 1,130 tensors: 0.3*A + 0.9*B, sum 1.2"
        in plan.warnings
    )
    assert fine.warnings == ()


def test_coefficients_within_a_method_are_summed_too(
    abc: dict[str, Path], planned: Planned
) -> None:
    odd = planned(abc, "A * 0.5 + slerp(A + B, slerp(B * 3, C)) * 0.5")
    fine = planned(abc, "slerp(A * 0.5 + B * 0.5, C)")

    assert odd.warnings == (
        "within slerp the coefficients add up to 2, not 1, for 1,130 tensors: A + B, sum 2",
        "within slerp the coefficients add up to 3, not 1, for 1,130 tensors: 3*B, sum 3",
    )
    assert fine.warnings == ()


def test_a_difference_to_what_a_method_gives_is_no_model(
    abc: dict[str, Path], planned: Planned
) -> None:
    found = errors_of(lambda: planned(abc, "slerp(A, B) * M - C", "params: {M: 1}"))

    assert found[0].what == (
        "with these numbers the formula is slerp(A, B, t=0.5) - C: a difference, not a model"
    )
    assert not planned(abc, "slerp(A, B) * M - C", "params: {M: 2}").warnings


@pytest.mark.parametrize("marked", ["A", "B"])
def test_models_that_predict_different_things_are_told(
    marked: str, tmp_path: Path, planned: Planned
) -> None:
    files = {
        name: write_model(
            tmp_path / f"{name}.safetensors", shrunk("sdxl", 64), seed=seed,
            edits={"v_pred": torch.zeros(0)} if name == marked else {},
        )
        for seed, name in enumerate("AB")
    }  # fmt: skip
    other = "B" if marked == "A" else "A"
    warnings = planned(files, "A * 0.5 + B * 0.5").warnings

    assert any(
        "the models predict different things" in text
        and f"{marked} predicts v" in text and f"{other} predicts epsilon" in text
        for text in warnings
    )  # fmt: skip
    assert not any("predict different" in text for text in planned(files, "A").warnings)


def test_a_dtype_for_what_the_result_has_not_is_told(
    shared: dict[str, Path], planned: Planned
) -> None:
    plan = planned(
        {"A": shared["no-vae"]}, "A", "", "o.safetensors, dtype: {vae: fp32, unet: bf16}"
    )

    assert "output dtype: the result has no vae" in plan.warnings
    assert not any("the result has no unet" in text for text in plan.warnings)


def test_globs_may_spell_tensors_as_the_file_does(tmp_path: Path, planned: Planned) -> None:
    """A UNet alone has names without the beginning that whole models give them."""
    specs = {
        (bare := name.removeprefix(UNET)): replace(spec, name=bare)
        for name, spec in shrunk("sd1").items()
        if name.startswith(UNET)
    }
    for name, spec in specs.items():  # the width that tells the family of a UNet alone
        if "attn2.to_k" in name or "attn2.to_v" in name:
            specs[name] = replace(spec, shape=(spec.shape[0], 768))
    files = {
        name: write_model(tmp_path / f"{name}.safetensors", specs, seed=seed)
        for seed, name in enumerate("AB")
    }
    for pattern in ("input_blocks.*", f"{UNET}input_blocks.*"):
        plan = planned(
            files, "A * (1 - M) + B * M", f'params: {{M: {{default: 0, "{pattern}": 1}}}}'
        )
        copied = {s.spec.name for s in plan.steps if s.why == "the formula is B here"}

        assert copied == {name for name in specs if name.startswith("input_blocks.")}


def test_rounding_of_coefficients_is_no_reason_to_warn(
    abc: dict[str, Path], planned: Planned
) -> None:
    plan = planned(abc, "A * 0.1 + B * 0.2 + C * (1 - 0.1 - 0.2)")

    assert plan.warnings == ()


def test_find_step_names_what_is_near(abc: dict[str, Path], planned: Planned) -> None:
    plan = planned(abc, "A * 0.5 + B * 0.5")
    near = only_error(lambda: find_step(plan, f"{UNET}input_blocks.0.0.wieght"))
    many = only_error(lambda: find_step(plan, "*attn2.to_k.weight"))

    assert find_step(plan, CONV_IN).spec.name == CONV_IN
    assert isinstance(near, UsageError)
    assert "did you mean 'model.diffusion_model.input_blocks.0.0." in near.fix
    assert "fits 16 tensors" in many.what
    assert many.fix.startswith("name one: ")


# --- take --------------------------------------------------------------------------------------


def vae_alone(seed: int, prefix: str, dtype: str = "F32", drop: str = "") -> dict[str, Tensor]:
    """A VAE's tensors, with or without the prefix they have in a whole model."""
    specs = {name: spec for name, spec in shrunk("sd1").items() if name.startswith(VAE)}
    values = model_values(specs, seed=seed, dtype=dtype)
    return {
        prefix + name.removeprefix(VAE): value for name, value in values.items() if name != drop
    }


@pytest.mark.parametrize("prefix", [VAE, ""])
def test_a_vae_of_its_own_file_is_taken_byte_for_byte(
    abc: dict[str, Path], planned: Planned, tmp_path: Path, prefix: str
) -> None:
    alone = write_tensors(tmp_path / "vae.safetensors", vae_alone(9, prefix))
    plan = planned({**abc, "V": alone}, "A * 0.5 + B * 0.5", "take: {vae: V}")
    result = merge(plan.recipe)
    written, expected = load_file(result.output), vae_alone(9, VAE)

    assert len(expected) == 248
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name
    assert plan.notes == ("vae: 248 tensors taken from V, F32, byte for byte",)


def test_a_number_for_a_taken_component_has_no_say(abc: dict[str, Path], planned: Planned) -> None:
    more = "params: {M: {default: 0.5, vae: 0}}\ntake: {vae: C}"
    plan = planned(abc, "A * M + B * (1 - M)", more)

    assert any("'vae' of M has no say: `take` takes the vae from C" in n for n in plan.notes)
    assert not plan.warnings


def test_a_component_is_taken_from_a_whole_model(abc: dict[str, Path], planned: Planned) -> None:
    plan = planned(abc, "A", "take: {text_encoder: B}")
    taken = [step for step in plan.steps if step.component == "text_encoder"]

    assert len(taken) == 197
    assert all(isinstance(step.program, Copy) for step in taken)
    assert {plan.sources[r.source].name for step in taken for r in reads_of(step.program)} == {"B"}


def test_a_taken_component_is_stored_in_the_dtype_the_recipe_names(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    alone = write_tensors(tmp_path / "vae.safetensors", vae_alone(9, ""))
    kept = planned({**abc, "V": alone}, "A", "take: {vae: V}", "o.safetensors, dtype: bf16")
    cast = planned({**abc, "V": alone}, "A", "take: {vae: V}", "o.safetensors, dtype: {vae: bf16}")

    assert {step.spec.dtype for step in kept.steps if step.component == "vae"} == {"F32"}
    assert {step.spec.dtype for step in cast.steps if step.component == "vae"} == {"BF16"}
    assert {step.action for step in cast.steps if step.component == "vae"} == {"cast"}
    if KERNELS is not None:
        assert not needs_torch((step.program, step.spec.dtype) for step in cast.steps)


def test_a_base_without_a_vae_gets_one(
    abc: dict[str, Path], shared: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    for source in (abc["B"], write_tensors(tmp_path / "vae.safetensors", vae_alone(9, ""))):
        plan = planned({"A": shared["no-vae"], "V": source}, "A", "take: {vae: V}")
        names = {step.spec.name for step in plan.steps}

        assert names == set(layout("sd1"))


def test_a_taken_component_that_is_not_whole_is_refused(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    drop = f"{VAE}decoder.conv_in.weight"
    alone = write_tensors(tmp_path / "vae.safetensors", vae_alone(9, "", drop=drop))
    error = only_error(lambda: planned({**abc, "V": alone}, "A", "take: {vae: V}"))

    assert error.what == f"take: V has no {drop!r}"
    assert error.fix == "take vae from a model that has all of it"


def test_many_missing_tensors_of_a_component_are_not_a_wall_of_text(
    abc: dict[str, Path], tmp_path: Path, planned: Planned
) -> None:
    half = {n: t for n, t in vae_alone(9, VAE).items() if ".encoder." not in n}
    alone = write_tensors(tmp_path / "vae.safetensors", half)
    found = errors_of(lambda: planned({**abc, "V": alone}, "A", "take: {vae: V}"))

    assert len(found) == 9
    assert found[-1].what == "and 98 more tensors with the same kind of error"


def test_a_component_of_another_family_is_refused(
    abc: dict[str, Path], shared: dict[str, Path], planned: Planned
) -> None:
    error = only_error(lambda: planned({**abc, "X": shared["sdxl"]}, "A", "take: {vae: X}"))

    assert error.what == (
        "X is Stable Diffusion XL, the merge is Stable Diffusion 1.x: its parts do not fit"
    )


def test_a_unet_of_more_input_channels_is_taken_into_a_base_that_has_them(
    abc: dict[str, Path], tmp_path: Path, planned: Planned
) -> None:
    specs = with_channels(shrunk("sd1"), 9)
    models = {**abc, "I": write_model(tmp_path / "I.safetensors", specs, seed=9)}

    error = only_error(lambda: planned(models, "A", "take: {unet: I}"))
    plan = planned(models, "A", "base: I\ntake: {unet: I}")

    assert error.what == "A is [10, 4, 3, 3], I is [10, 9, 3, 3]"
    assert error.fix.endswith("`base: I` gives the result the input channels of I")
    assert find_step(plan, f"{UNET}input_blocks.0.0.weight").spec.shape == (10, 9, 3, 3)
    assert plan.variant == "inpainting"


def test_sd1_may_take_the_vae_of_sd2(tmp_path: Path, planned: Planned) -> None:
    one = write_model(tmp_path / "1.safetensors", shrunk("sd1"), seed=1)
    two = write_model(tmp_path / "2.safetensors", shrunk("sd2"), seed=2)
    plan = planned({"A": one, "V": two}, "A", "take: {vae: V}")

    taken = [reads_of(step.program) for step in plan.steps if step.component == "vae"]
    assert {plan.sources[reads[0].source].name for reads in taken} == {"V"}


def test_an_unknown_component_names_the_nearest(abc: dict[str, Path], planned: Planned) -> None:
    found = errors_of(
        lambda: planned(
            abc, "A * 0.5 + B * 0.5", "take: {vea: C}", "o.safetensors, dtype: {unte: fp16}"
        )
    )

    assert [error.what for error in found] == [
        "take: unknown component 'vea'",
        "output dtype: unknown component 'unte'",
    ]
    assert [error.fix for error in found] == ["did you mean 'vae'?", "did you mean 'unet'?"]


# --- dtypes ------------------------------------------------------------------------------------


def test_keep_stores_every_tensor_as_the_base_does(planned: Planned, tmp_path: Path) -> None:
    specs = {
        name: TensorSpec(name, "F32" if name.startswith(VAE) else spec.dtype, spec.shape)
        for name, spec in shrunk("sd1").items()
    }
    one = write_model(tmp_path / "a.safetensors", specs, seed=1)
    two = write_model(tmp_path / "b.safetensors", specs, seed=2, dtype="BF16")
    plan = planned({"A": one, "B": two}, "B * 0.5 + A * 0.5", "base: A")

    assert {name: step.spec for name, step in steps_by_name(plan).items()} == specs


def test_dtypes_by_component(abc: dict[str, Path], planned: Planned) -> None:
    plan = planned(
        abc, "A * 0.5 + B * 0.5", "",
        "o.safetensors, dtype: {default: fp32, unet: fp8_e4m3, vae: keep}",
    )  # fmt: skip
    stored = Counter((step.component, step.spec.dtype) for step in plan.steps)

    assert stored == {
        ("unet", "F8_E4M3"): 686,
        ("vae", "F16"): 248,
        ("text_encoder", "F32"): 196,
        ("text_encoder", "I64"): 1,
    }


def test_linear_formulas_and_results_in_fp32_are_computed_in_fp64(
    abc: dict[str, Path], planned: Planned
) -> None:
    found = []
    for formula in ("A * 0.5 + B * 0.5", "slerp(A, B)"):
        for dtype in ("fp16", "fp32"):
            plan = planned(abc, formula, "", f"o.safetensors, dtype: {dtype}")
            program = find_step(plan, CONV_IN).program
            assert isinstance(program, Compute)
            found.append(program.precision)
    assert found == ["F64", "F64", "F32", "F64"]


# --- families ----------------------------------------------------------------------------------


def test_models_of_different_families_are_refused_in_one_sentence(
    abc: dict[str, Path], shared: dict[str, Path], planned: Planned
) -> None:
    error = only_error(lambda: planned({**abc, "X": shared["sdxl"]}, "A * 0.5 + X * 0.5"))

    assert isinstance(error, InputError)
    assert error.what == (
        "models of different families cannot be merged: "
        "A is Stable Diffusion 1.x, X is Stable Diffusion XL"
    )
    assert error.where.endswith("recipe.yaml:7")


def test_a_model_that_no_formula_uses_may_be_of_any_family(
    abc: dict[str, Path], shared: dict[str, Path], planned: Planned
) -> None:
    plan = planned({**abc, "X": shared["sdxl"]}, "A * 0.5 + B * 0.5")

    assert plan.counts["merged"] == 1130


def test_an_adapter_where_a_model_is_wanted_is_refused(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    adapter = write_tensors(
        tmp_path / "lora.safetensors",
        {
            f"{stem}.lora_down.weight": torch.zeros(4, 320),
            f"{stem}.lora_up.weight": torch.zeros(320, 4),
            f"{stem}.alpha": torch.tensor(4.0),
        },
    )
    error = only_error(lambda: planned({**abc, "L": adapter}, "A * 0.5 + L * 0.5"))

    assert error.what == "model 'L': this is an adapter (LoRA), not weights"
    assert error.where.endswith("recipe.yaml:6")
    assert error.fix == "bake it: `loras: [{path: …, weight: 0.8}]`, or bake(A, L, weight=0.8)"


def test_models_that_cannot_be_opened_come_all_at_once(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    page = tmp_path / "page.safetensors"
    page.write_text("<!DOCTYPE html><html>")
    found = errors_of(
        lambda: planned({**abc, "X": tmp_path / "none.safetensors", "Y": page}, "A + X - Y")
    )

    assert [error.what.partition(": ")[0] for error in found] == ["model 'X'", "model 'Y'"]
    assert ["no such file" in found[0].what, "an HTML page" in found[1].what] == [True, True]
    assert [":6: " in found[0].where, ":7: " in found[1].where] == [True, True]
    assert found[0].fix.startswith("in that folder: page.safetensors")


def test_models_of_no_known_family_merge_by_name(planned: Planned, tmp_path: Path) -> None:
    one = write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(3), "v": torch.ones(2, 2)})
    two = write_tensors(tmp_path / "b.safetensors", {"w": torch.zeros(3), "x": torch.ones(1)})
    plan = planned(
        {"A": one, "B": two}, "A * (1 - M) + B * M", 'params: {M: {default: 0.5, "w*": 0.25}}'
    )
    steps = steps_by_name(plan)

    assert {name: step.action for name, step in steps.items()} == {"w": "merged", "v": "carried"}
    assert str(steps["w"].form) == "0.75*A + 0.25*B"
    assert plan.dropped == {"B": ("x",)}


def test_an_unknown_model_among_known_ones_is_warned_of(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    some = {n: s for n, s in shrunk("sd1").items() if n.startswith(f"{UNET}input_blocks.1.")}
    part = write_model(tmp_path / "part.safetensors", some, seed=5)
    plan = planned({**abc, "P": part}, "A * 0.5 + P * 0.5")

    assert plan.counts["merged"] == len(some)
    assert any(warning.startswith("the family of P is not known (nearest: sd1, but ")
               for warning in plan.warnings)  # fmt: skip
    assert f"{1130 - len(some):,} tensors are carried from A: P lacks them" in plan.warnings


def test_a_text_encoder_named_the_nai_way_is_matched(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    values = model_values(shrunk("sd1"), seed=7)
    renamed = {name.replace(".text_model.", "."): value for name, value in values.items()}
    nai = write_tensors(tmp_path / "nai.safetensors", renamed)
    assert set(renamed) != set(values)
    other = planned({**abc, "N": nai}, "A * 0.5 + N * 0.5")
    base = planned({**abc, "N": nai}, "N * 0.5 + A * 0.5")

    assert other.counts == base.counts == {"merged": 1130, "carried": 1, "copied": 0, "cast": 0}
    assert {step.spec.name for step in other.steps} == set(values)
    assert {step.spec.name for step in base.steps} == set(renamed)
    assert other.dropped == base.dropped == {}


# --- input channels ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "first"),
    [
        ("A + (I - C)", "A + I - C"),
        ("I + (A - C)", "I + A - C"),
        ("(I - C) + A", "I - C + A"),
        ("I * 0.5 + A * 0.5", "0.5*I + 0.5*A"),
        ("A * 0.5 + I * 0.5", "0.5*A + 0.5*I"),
        ("slerp(A, I)", "slerp(A, I, t=0.5)"),
    ],
)
@pytest.mark.parametrize(("variant", "channels"), [("inpainting", 9), ("ip2p", 8)])
def test_extra_input_channels_survive_any_operand_order(
    abc: dict[str, Path],
    shared: dict[str, Path],
    planned: Planned,
    formula: str,
    first: str,
    variant: str,
    channels: int,
) -> None:
    plan = planned({**abc, "I": shared[variant]}, formula)
    step = find_step(plan, CONV_IN)
    assert isinstance(step.program, Widen)

    assert step.spec.shape == (10, channels, 3, 3)
    assert plan.sources[step.program.extra.source].name == "I"
    assert step.program.channels == 4
    assert str(step.form) == first
    assert plan.variant == variant
    assert plan.notes == (
        f"{CONV_IN}: the first 4 input channels are merged, channels 5 to {channels} come from I",
    )


def test_the_numbers_do_not_decide_the_shape_of_the_result(
    abc: dict[str, Path], shared: dict[str, Path], planned: Planned
) -> None:
    models = {**abc, "I": shared["inpainting"]}
    for formula in ("A + (I - C) * M", "I * M + A * (1 - M)"):
        plan = planned(models, formula, "params: {M: 0}")
        step = find_step(plan, CONV_IN)

        assert step.spec.shape == (10, 9, 3, 3), formula
        assert str(step.form) == "A"


def test_the_extra_channels_are_not_scaled(
    abc: dict[str, Path], shared: dict[str, Path], planned: Planned
) -> None:
    plan = planned({**abc, "I": shared["inpainting"]}, "A + (I - C) * 0.5")
    result = load_file(merge(plan.recipe).output)[CONV_IN]
    a, i, c = (load_file(path)[CONV_IN].double() for path in
               (abc["A"], shared["inpainting"], abc["C"]))  # fmt: skip

    assert torch.equal(result[:, 4:], i[:, 4:].half())
    assert torch.equal(result[:, :4], (a + (i[:, :4] - c) * 0.5).half())


def test_two_inpainting_models_merge_as_a_whole(shared: dict[str, Path], planned: Planned) -> None:
    plan = planned({"I": shared["inpainting"], "J": shared["inpainting"]}, "I * 0.5 + J * 0.5")

    assert isinstance(find_step(plan, CONV_IN).program, Compute)
    assert (plan.variant, plan.notes) == ("inpainting", ())


def test_the_depth_channel_is_kept(planned: Planned, tmp_path: Path, shared: dict) -> None:
    plan = planned({"A": shared["sd2"], "D": shared["sd2-depth"]}, "D * 0.5 + A * 0.5")
    step = find_step(plan, CONV_IN)
    assert isinstance(step.program, Widen)

    assert (step.spec.shape[1], step.program.channels, plan.variant) == (5, 4, "depth")
    assert Counter(s.action for s in plan.steps if s.component == "depth") == {"carried": 368}


def test_inpainting_and_edit_channels_do_not_go_together(
    abc: dict[str, Path], shared: dict[str, Path], planned: Planned
) -> None:
    models = {**abc, "I": shared["inpainting"], "P": shared["ip2p"]}
    two = only_error(lambda: planned(models, "I * 0.5 + P * 0.5"))
    three = only_error(lambda: planned(models, "A + (I - C) + (P - C)"))

    assert two.what == "these input channels do not go together: I has 9, P has 8"
    assert three.what == (
        "these input channels do not go together: A has 4, I has 9, C has 4, P has 8"
    )
    assert two.where == three.where == CONV_IN
    assert two.fix == "merge one inpainting, edit or depth model at a time"


# --- shapes ------------------------------------------------------------------------------------


def test_shapes_that_differ_are_named_for_every_tensor(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    odd = {
        f"{UNET}time_embed.0.weight": torch.zeros(7, 10, dtype=torch.float16),
        f"{UNET}out.2.bias": torch.zeros(5, dtype=torch.float16),
    }
    other = write_model(tmp_path / "odd.safetensors", shrunk("sd1"), seed=3, edits=odd)
    found = errors_of(lambda: planned({**abc, "X": other}, "A * 0.5 + X * 0.5"))

    assert {(error.where, error.what) for error in found} == {
        (f"{UNET}time_embed.0.weight", "A is [40, 10], X is [7, 10]"),
        (f"{UNET}out.2.bias", "A is [4], X is [5]"),
    }
    assert all("use models of one shape" in error.fix for error in found)


def test_a_1x1_convolution_and_a_linear_layer_hold_the_same(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    name = f"{VAE}decoder.mid.attn_1.q.weight"
    shape = shrunk("sd1")[name].shape
    assert shape[2:] == (1, 1)
    flat = {name: torch.ones(shape[:2], dtype=torch.float16)}
    other = write_model(tmp_path / "flat.safetensors", shrunk("sd1"), seed=3, edits=flat)
    plan = planned({**abc, "X": other}, "A * 0.5 + X * 0.5")
    taken = planned({**abc, "X": other}, "A", "take: {vae: X}")

    assert find_step(plan, name).spec.shape == find_step(taken, name).spec.shape == shape
    assert find_step(plan, name).action == "merged"


def test_a_hundred_errors_alike_are_grouped(planned: Planned, tmp_path: Path) -> None:
    one = {f"w{n}": torch.zeros(2) for n in range(100)}
    two = {f"w{n}": torch.zeros(3) for n in range(100)}
    paths = [
        write_tensors(tmp_path / f"{name}.safetensors", tensors)
        for name, tensors in (("a", one), ("b", two))
    ]
    found = errors_of(lambda: planned(dict(zip("AB", paths, strict=True)), "A * 0.5 + B * 0.5"))

    assert len(found) == 9
    assert found[-1].what == "and 92 more tensors with the same kind of error"


# --- carried and dropped -----------------------------------------------------------------------


def test_tensors_that_a_model_lacks_are_carried_counted_and_told(
    abc: dict[str, Path], shared: dict[str, Path], planned: Planned
) -> None:
    plan = planned({**abc, "X": shared["no-vae"]}, "A * 0.5 + X * 0.5")
    carried = [step for step in plan.steps if step.component == "vae"]

    assert plan.counts == {"merged": 882, "carried": 249, "copied": 0, "cast": 0}
    assert {step.why for step in carried} == {"X lacks it"}
    assert "248 tensors are carried from A: X lacks them" in plan.warnings


def test_a_model_whose_coefficient_is_zero_need_not_have_the_tensor(
    abc: dict[str, Path], shared: dict[str, Path], planned: Planned
) -> None:
    plan = planned(
        {**abc, "X": shared["no-vae"]},
        "A * (1 - M) + X * M",
        "params: {M: {default: 0.5, vae: 0}}\nstrict: true",
    )

    assert {step.action for step in plan.steps if step.component == "vae"} == {"copied"}


def test_an_incomplete_base_is_told(abc: dict[str, Path], planned: Planned, tmp_path: Path) -> None:
    values = load_file(abc["A"])
    del values[f"{UNET}out.2.bias"]
    part = write_tensors(tmp_path / "part.safetensors", values)

    plan = planned({**abc, "X": part}, "X * 0.5 + B * 0.5")

    assert plan.warnings[-1] == (
        f"X is incomplete, and so is the result: its unet lacks 1 tensor, such as {UNET}out.2.bias"
    )


def test_an_adapter_file_without_modules_is_refused(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    empty = write_tensors(tmp_path / "L.safetensors", {})

    error = only_error(lambda: planned(abc, "A", f"loras: [{{path: {empty}, weight: 1}}]"))

    assert error.what == "adapter 'loras[0]': there is no adapter in this file"


def test_strict_makes_carries_errors(
    abc: dict[str, Path], shared: dict[str, Path], planned: Planned
) -> None:
    found = errors_of(
        lambda: planned({**abc, "X": shared["no-vae"]}, "A * 0.5 + X * 0.5", "strict: true")
    )
    fine = planned(abc, "A * 0.5 + B * 0.5", "strict: true")

    assert found[0].what == "strict: X lacks it"
    (lacking,) = errors_of(
        lambda: planned({**abc, "X": shared["no-vae"]}, "X * 0.5 + A * 0.5", "strict: true")
    )
    assert lacking.what.startswith("strict: X lacks 248 tensors of A, such as first_stage_model.")
    assert found[0].where.startswith(VAE)
    assert found[-1].what == "and 240 more tensors with the same kind of error"
    assert fine.counts["carried"] == 1  # position ids: never averaged, nothing is lacking


def test_tensors_that_only_another_model_has_are_left_out_and_told(
    abc: dict[str, Path], shared: dict[str, Path], planned: Planned
) -> None:
    plan = planned({**abc, "X": shared["no-vae"]}, "X * 0.5 + A * 0.5")

    assert len(plan.steps) == 883
    assert len(plan.dropped["A"]) == 248
    assert "left out of A: 248 tensors that X lacks: 248 of vae" in plan.warnings


def test_a_file_that_names_a_tensor_twice_is_told_and_keeps_the_usual_name(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    """Files merged by tools that add B's own tensors have both spellings of the text encoder."""
    values = model_values(shrunk("sd1"), seed=7)
    usual = f"{TEXT}final_layer_norm.weight"
    nai = usual.replace(".text_model.", ".")
    both = write_tensors(
        tmp_path / "both.safetensors", values | {nai: torch.full_like(values[usual], 5)}
    )
    for formula in ("X * 0.5 + A * 0.5", "A * 0.5 + X * 0.5"):
        plan = planned({**abc, "X": both}, formula)
        step = find_step(plan, usual)
        read = next(r for r in reads_of(step.program) if plan.sources[r.source].name == "X")

        assert read.name == usual
        assert len(plan.steps) == 1131
        assert (
            f"X has tensors under two names: {nai!r} is left out, {usual!r} is used"
            in plan.warnings
        )


# --- what is never merged ----------------------------------------------------------------------


def test_ema_weights_are_merged_where_every_model_has_them(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    ema = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        "model_ema.diffusion_modelout2bias": torch.ones(4, dtype=torch.float16),
    }
    one, two = (
        write_model(tmp_path / f"{seed}.safetensors", shrunk("sd1"), seed=seed, edits=ema)
        for seed in (1, 2)
    )
    both = steps_by_name(planned({"A": one, "B": two}, "A * 0.5 + B * 0.5"))
    only_a = steps_by_name(planned({"A": one, "B": abc["B"]}, "A * 0.5 + B * 0.5"))

    assert {name: both[name].action for name in ema} == {
        "model_ema.decay": "carried",
        "model_ema.num_updates": "carried",
        "model_ema.diffusion_modelout2bias": "merged",
    }
    assert {only_a[name].action for name in ema} == {"carried"}


def test_buffers_of_the_noise_schedule_are_carried_as_they_are(
    planned: Planned, tmp_path: Path
) -> None:
    buffers = {"betas": torch.rand(10), "alphas_cumprod": torch.rand(10), "logvar": torch.rand(10)}
    one, two = (
        write_model(tmp_path / f"{seed}.safetensors", shrunk("sd1"), seed=seed, edits=buffers)
        for seed in (1, 2)
    )
    plan = planned({"A": one, "B": two}, "A * 0.5 + B * 0.5", "", "o.safetensors, dtype: fp16")
    steps = steps_by_name(plan)

    for name in buffers:
        assert steps[name].why == "protected: part of what the model is"
        assert isinstance(steps[name].program, Copy)
        assert steps[name].spec.dtype == "F32"


@pytest.mark.parametrize("with_markers", ["A", "B", "AB"])
def test_empty_markers_of_a_v_prediction_model_stay_as_the_base_has_them(
    planned: Planned, tmp_path: Path, with_markers: str
) -> None:
    markers = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    models = {
        name: write_model(
            tmp_path / f"{name}.safetensors",
            shrunk("sdxl", 64),
            seed=ord(name),
            edits=markers if name in with_markers else {},
        )
        for name in "AB"
    }
    plan = planned(models, "A * 0.5 + B * 0.5", "", "out.safetensors, dtype: bf16")
    written = load_file(merge(plan.recipe).output)

    assert {name for name in markers if name in written} == (
        set(markers) if "A" in with_markers else set()
    )
    assert all(written[name].shape == (0,) for name in markers if name in written)
    told = any("left out of B: 2 tensors that A lacks" in warning for warning in plan.warnings)
    assert told == (with_markers == "B")


@pytest.mark.parametrize("shape", [(1, 77), (77,)])
def test_position_ids_that_drifted_to_floats_are_repaired_and_told(
    shape: tuple[int, ...], abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    drifted = {POSITION_IDS: torch.arange(77).reshape(shape).float() * 0.987}
    one = write_model(tmp_path / "a.safetensors", shrunk("sd1"), seed=1, edits=drifted)
    plan = planned({"A": one, "B": abc["B"]}, "A * 0.5 + B * 0.5")
    step = find_step(plan, POSITION_IDS)
    written = load_file(merge(plan.recipe).output)[POSITION_IDS]

    assert isinstance(step.program, PositionIds)
    assert step.spec == TensorSpec(POSITION_IDS, "I64", shape)
    assert plan.notes == (f"{POSITION_IDS}: position ids stored as F32 are repaired to 0, 1, 2, …",)
    assert torch.equal(written, torch.arange(77).reshape(shape))


def test_integers_are_carried_from_the_base(planned: Planned, tmp_path: Path) -> None:
    for name, value in (("a", 3), ("b", 9)):
        tensors = {"n": torch.tensor([value]), "on": torch.tensor([value > 5]), "w": torch.ones(2)}
        write_tensors(tmp_path / f"{name}.safetensors", tensors)
    plan = planned({"A": "a.safetensors", "B": "b.safetensors"}, "A * 0.5 + B * 0.5")
    written = load_file(merge(plan.recipe).output)

    assert (written["n"].item(), written["on"].item()) == (3, False)
    assert {s.spec.name: s.why for s in plan.steps if s.action == "carried"} == {
        "n": "I64 values are never averaged",
        "on": "BOOL values are never averaged",
    }


# --- the output --------------------------------------------------------------------------------


@pytest.fixture
def own(sd1_models: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    """A copy of model A in the test's own folder."""
    return Path(shutil.copy(sd1_models[0], tmp_path / "own.safetensors"))


def test_one_file_and_shards_of_one_name_are_not_both_made(
    abc: dict[str, Path], tmp_path: Path, planned: Planned
) -> None:
    """One manifest could not speak of both."""
    whole = planned(abc, "A * 0.5 + B * 0.5")
    shards = planned(abc, "A * 0.2 + B * 0.8", "", "out.safetensors, shard_size: 1MB")

    merge(shards.recipe)
    error = only_error(lambda: make_plan(whole.recipe))
    assert error.what.endswith("out.safetensors.index.json', an output of the same name, exists")
    for path in tmp_path.glob("out*"):
        path.unlink()
    merge(whole.recipe)
    error = only_error(lambda: make_plan(shards.recipe))
    assert error.what.endswith("out.safetensors', an output of the same name, exists")
    make_plan(shards.recipe, force=True).close()


def test_an_output_that_leads_to_itself_is_refused(abc: dict[str, Path], tmp_path: Path) -> None:
    for name, target in (("o.safetensors", "p.safetensors"), ("p.safetensors", "o.safetensors")):
        (tmp_path / name).symlink_to(tmp_path / target)
    recipe = parse_recipe(recipe_text(abc, "A", "", "o.safetensors"), tmp_path / "r.yaml")
    error = only_error(lambda: make_plan(recipe))

    assert isinstance(error, OutputError)
    assert "is a link that leads to itself" in error.what


@pytest.mark.parametrize("way", ["same", "relative", "symlink", "hard link", "linked folder"])
@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_is_an_input_is_refused_whatever_it_is_called(
    abc: dict[str, Path], own: Path, planned: Planned, tmp_path: Path, way: str, force: bool
) -> None:
    output = {
        "same": str(own),
        "relative": "../" + tmp_path.name + "/./own.safetensors",
        "symlink": "soft.safetensors",
        "hard link": "hard.safetensors",
        "linked folder": "folder/own.safetensors",
    }[way]
    (tmp_path / "soft.safetensors").symlink_to(own)
    os.link(own, tmp_path / "hard.safetensors")
    (tmp_path / "folder").symlink_to(tmp_path)
    models = {"A": own, "B": abc["B"]}
    error = only_error(lambda: planned(models, "A * 0.5 + B * 0.5", output=output, force=force))

    assert isinstance(error, OutputError)
    assert error.what.endswith("is one of the inputs")
    assert error.where.endswith("recipe.yaml:7")
    assert error.fix == "write to another file"


def test_an_input_that_is_a_link_to_the_output_is_refused(
    abc: dict[str, Path], own: Path, planned: Planned, tmp_path: Path
) -> None:
    (tmp_path / "link.safetensors").symlink_to(own)
    models = {"A": tmp_path / "link.safetensors", "B": abc["B"]}
    error = only_error(lambda: planned(models, "A * 0.5 + B * 0.5", output="own.safetensors"))

    assert error.what.endswith("is one of the inputs")


@pytest.mark.parametrize("suffix", [".part", ".ckptools.json.part"])
@pytest.mark.parametrize("force", [False, True])
def test_an_input_where_the_output_lies_meanwhile_is_refused(
    abc: dict[str, Path], own: Path, planned: Planned, tmp_path: Path, suffix: str, force: bool
) -> None:
    taken = tmp_path / f"new.safetensors{suffix}"
    os.link(own, taken)
    models = {"A": own, "B": abc["B"]}
    error = only_error(
        lambda: planned(models, "A * 0.5 + B * 0.5", output="new.safetensors", force=force)
    )

    assert isinstance(error, OutputError)
    assert error.what.endswith("where the output lies until it is whole, is one of the inputs")


@pytest.mark.parametrize("kind", ["folder", "text", "other JSON", "manifest"])
@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_manifest_is_not_replaced_by_one(
    abc: dict[str, Path], planned: Planned, tmp_path: Path, kind: str, force: bool
) -> None:
    """Of files, none without force; a folder never: the model would have its name by then."""
    place = tmp_path / "new.safetensors.ckptools.json"
    if kind == "folder":
        place.mkdir()
    else:
        texts = {
            "text": "mine",
            "other JSON": "[1]",
            "manifest": '{"schema": "ckptools.manifest/1"}',
        }
        place.write_text(texts[kind])

    def plan() -> object:
        return planned({"A": abc["A"], "B": abc["B"]}, "A * 0.5 + B * 0.5",
                       output="new.safetensors", force=force)  # fmt: skip

    if kind == "manifest" or (force and kind != "folder"):
        plan()
    else:
        assert only_error(plan).what.endswith("is in the way, and no manifest")


@pytest.mark.parametrize("kind", ["download", "second name", "folder", "link", "left over"])
@pytest.mark.parametrize("force", [False, True])
def test_a_part_that_a_merge_would_refuse_is_told_by_the_plan(
    abc: dict[str, Path], planned: Planned, tmp_path: Path, kind: str, force: bool
) -> None:
    """Before anything is read; what a killed merge left is none."""
    part = tmp_path / "new.safetensors.part"
    if kind == "folder":
        part.mkdir()
    elif kind == "second name":
        os.link(abc["A"], tmp_path / "copy.safetensors")
        (tmp_path / "copy.safetensors").rename(part)
    elif kind == "link":
        part.symlink_to(tmp_path / "elsewhere")
    else:
        part.write_bytes(b"half a model" if kind == "download" else bytes(1000))

    def plan() -> object:
        return planned({"B": abc["B"], "C": abc["C"]}, "B * 0.5 + C * 0.5",
                       output="new.safetensors", force=force)  # fmt: skip

    if kind == "left over":
        plan()
    else:
        assert "new.safetensors.part' is in the way" in only_error(plan).what
        assert only_error(plan).fix == "remove it, or write elsewhere"


def test_an_existing_output_is_refused_without_force(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    (tmp_path / "out.safetensors").write_bytes(b"precious")
    error = only_error(lambda: planned(abc, "A * 0.5 + B * 0.5"))

    assert error.what.endswith("out.safetensors' exists")
    assert error.fix == "use --force, or `overwrite: true`, to replace it"
    assert planned(abc, "A * 0.5 + B * 0.5", force=True).outputs
    assert planned(abc, "A * 0.5 + B * 0.5", output="out.safetensors, overwrite: true").outputs
    assert (tmp_path / "out.safetensors").read_bytes() == b"precious"


def test_a_folder_or_a_file_in_the_way_of_the_output(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("")
    folder = only_error(
        lambda: planned(abc, "A * 0.5 + B * 0.5", output="folder.safetensors", force=True)
    )
    file = only_error(lambda: planned(abc, "A * 0.5 + B * 0.5", output="file/out.safetensors"))

    assert folder.what.endswith("folder.safetensors' is a folder")
    assert file.what.endswith("file' is not a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    error = only_error(lambda: planned(abc, "A * 0.5 + B * 0.5", output="locked/o.safetensors"))

    assert error.what.endswith("locked' cannot be written to")


def test_a_disk_that_is_too_small_is_told_before_anything_is_read(
    abc: dict[str, Path], planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    error = only_error(lambda: planned(abc, "A * 0.5 + B * 0.5"))

    assert error.what == "the disk is too full: the output needs 2.3 MB, 1.0 MB are free"
    assert error.fix == "free some space, or write to another disk"


def test_problems_of_the_output_come_with_those_of_the_tensors(
    abc: dict[str, Path], shared: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    (tmp_path / "out.safetensors").write_bytes(b"")
    found = errors_of(
        lambda: planned({**abc, "X": shared["no-vae"]}, "A * 0.5 + X * 0.5", "strict: true")
    )

    assert {type(error) for error in found} == {InputError, OutputError}


def test_a_plan_leaves_no_file_behind(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    planned(abc, "A * 0.5 + B * 0.5", output="deep/er/out.safetensors")

    assert list(tmp_path.iterdir()) == []


# --- memory and shards -------------------------------------------------------------------------


def test_only_methods_that_need_a_whole_tensor_cost_memory_by_its_size(
    planned: Planned, tmp_path: Path
) -> None:
    big = {"w": torch.zeros(1000, 1000, dtype=torch.float16), "v": torch.zeros(10)}
    models = {name: write_tensors(tmp_path / f"{name}.safetensors", big) for name in "ABC"}
    linear = planned(models, "A + (B - C) * 0.5").peak_bytes
    two = planned(models, "A * 0.5 + B * 0.5").peak_bytes
    whole = planned(models, "slerp(A, B)").peak_bytes
    more = planned(models, "ties(A, B, base=C)").peak_bytes

    assert 50_000_000 < two < linear < 160_000_000
    assert whole > 200_000_000  # torch
    assert whole - two > 2 * 4_000_000  # at least its two models in fp32
    assert more > whole


def test_shards_are_named_as_others_name_them(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    plan = planned(abc, "A * 0.5 + B * 0.5", output="out.safetensors, shard_size: 1MB")
    paths = [path for path, _ in plan.shards]
    count = len(paths)

    assert count >= 2
    assert [path.name for path in paths] == [
        f"out-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)
    ]
    assert plan.outputs == (*paths, tmp_path / "out.safetensors.index.json")
    assert [s.spec for s in plan.steps] == [spec for _, specs in plan.shards for spec in specs]
    for _, specs in plan.shards:
        assert sum(spec.nbytes for spec in specs) <= 1_000_000


def test_an_existing_shard_is_refused_too(
    abc: dict[str, Path], planned: Planned, tmp_path: Path
) -> None:
    (tmp_path / "out.safetensors.index.json").write_text("{}")
    error = only_error(
        lambda: planned(abc, "A * 0.5 + B * 0.5", output="out.safetensors, shard_size: 1MB")
    )

    assert error.what.endswith("out.safetensors.index.json' exists")


def test_channels_of_a_whole_model_are_found_by_name_alone(
    planned: Planned, tmp_path: Path
) -> None:
    """A file of no known family, as a bare UNet: the tensor's name says that it takes images."""
    narrow = {"conv_in.weight": torch.zeros(8, 4, 3, 3)}
    wide = {"conv_in.weight": torch.zeros(8, 9, 3, 3)}
    models = {
        "A": write_tensors(tmp_path / "a.safetensors", narrow),
        "I": write_tensors(tmp_path / "i.safetensors", wide),
    }
    plan = planned(models, "A * 0.5 + I * 0.5")

    assert plan.steps[0].spec.shape == (8, 9, 3, 3)


# --- things that a user met ----------------------------------------------------------------------


def test_integers_where_others_have_floats_are_told_by_their_dtype(
    planned: Planned, tmp_path: Path
) -> None:
    """Where nothing else is in common that is the error; else a warning, apart from what lacks."""
    floats = {"w": torch.ones(3), "x": torch.ones(3)}
    whole = {"w": torch.ones(3, dtype=torch.int32), "x": torch.ones(3)}
    models = {
        "A": write_tensors(tmp_path / "A.safetensors", floats),
        "B": write_tensors(tmp_path / "B.safetensors", whole),
        "C": write_tensors(tmp_path / "C.safetensors", {"x": torch.ones(3)}),
        "W": write_tensors(tmp_path / "W.safetensors", {"w": whole["w"]}),
    }

    plan = planned(models, "(A + B + C) / 3")
    turned = planned({"B": models["B"], "A": models["A"]}, "(A + B) / 2", "base: B")
    alone = write_tensors(tmp_path / "a.safetensors", {"w": floats["w"]})
    with pytest.raises(InputError, match="no floats in common: W stores I32, not floats") as caught:
        planned({"A": alone, "W": models["W"]}, "(A + W) / 2")
    with pytest.raises(InputError, match="no floats in common: W stores I32, A stores floats"):
        planned({"A": alone, "W": models["W"]}, "(W + A) / 2")

    assert "1 tensor is carried from A: C lacks it, B stores I32, not floats" in plan.warnings
    assert "1 tensor is carried from B: B stores I32, A stores floats" in turned.warnings
    assert plan.steps[0].lacking == ("C", "B")
    assert caught.value.where == "w"


def test_models_without_a_common_tensor_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "A.safetensors", {"a.weight": torch.ones(3)})
    write_tensors(tmp_path / "B.safetensors", {"b.weight": torch.ones(3)})
    recipe = parse_recipe(
        "ckptools: 1\nmodels: {A: A.safetensors, B: B.safetensors}\n"
        "merge: 0.5*A + 0.5*B\noutput: {path: o.safetensors}\n",
        tmp_path / "r.yaml",
    )

    with pytest.raises(InputError, match="no tensor in common"):
        make_plan(recipe)


def test_a_base_without_tensors_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "A.safetensors", {})
    recipe = parse_recipe(
        "ckptools: 1\nmodels: {A: A.safetensors}\nmerge: A\noutput: {path: o.safetensors}\n",
        tmp_path / "r.yaml",
    )

    with pytest.raises(InputError, match="A has no tensors"):
        make_plan(recipe)


def test_an_impossible_number_is_told_once_with_the_line_that_set_it(
    sd1_models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    a, b, c = sd1_models
    recipe = parse_recipe(
        f"ckptools: 1\nmodels: {{A: {a}, B: {b}, C: {c}}}\nparams:\n  M:\n    default: 1\n"
        "    IN04: 0\nmerge: A + (B - C) / M\noutput: {path: o.safetensors}\n",
        tmp_path / "r.yaml",
    )

    with pytest.raises(RecipeError, match="division by zero") as caught:
        make_plan(recipe)

    assert "input_blocks.4." in caught.value.fix
    assert "M = 0 (set by 'IN04' at" in caught.value.fix


def test_the_index_of_sharded_inputs_cannot_be_the_output(
    sd1_models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    a, b, _ = sd1_models
    text = "ckptools: 1\nmodels: {{A: {one}, B: {two}}}\nmerge: 0.5*A + 0.5*B\n"
    text += "output: {{path: x.safetensors, shard_size: {size}}}\n"
    merge(parse_recipe(text.format(one=a, two=b, size="1MB"), tmp_path / "r.yaml"))
    index = tmp_path / "x.safetensors.index.json"
    before = index.read_bytes()

    with pytest.raises(OutputError, match="is one of the inputs"):
        make_plan(
            parse_recipe(text.format(one=index, two=b, size="1.5MB"), tmp_path / "r.yaml"),
            force=True,
        )

    assert index.read_bytes() == before


def test_other_shards_of_a_replaced_output_are_removed(
    sd1_models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    a, b, _ = sd1_models
    text = f"ckptools: 1\nmodels: {{A: {a}, B: {b}}}\nmerge: 0.5*A + 0.5*B\n"
    text += "output: {path: x.safetensors, shard_size: SIZE}\n"
    merge(parse_recipe(text.replace("SIZE", "1MB"), tmp_path / "r.yaml"))
    larger = text.replace("SIZE", "1.3MB")
    result = merge(parse_recipe(larger, tmp_path / "r.yaml"), force=True)

    shards = {path.name for path in tmp_path.glob("x-*.safetensors")}
    index = json.loads((tmp_path / "x.safetensors.index.json").read_text())
    assert shards == set(index["weight_map"].values())
    assert "shards of the replaced output are removed" in result.notes[-1]


@pytest.mark.parametrize("index", ['{"weight_map": {}}', '{"weight_map": [1]}', "{}", "no JSON"])
def test_shards_that_the_replaced_index_does_not_name_are_left_alone(
    sd1_models: tuple[Path, Path, Path], tmp_path: Path, index: str
) -> None:
    a, b, _ = sd1_models
    text = f"ckptools: 1\nmodels: {{A: {a}, B: {b}}}\nmerge: 0.5*A + 0.5*B\n"
    text += "output: {path: x.safetensors, shard_size: 1MB}\n"
    other = tmp_path / "x-00001-of-00009.safetensors"
    other.write_text("another's")
    (tmp_path / "x.safetensors.index.json").write_text(index)
    result = merge(parse_recipe(text, tmp_path / "r.yaml"), force=True)

    assert other.read_text() == "another's"
    assert not any("removed" in note for note in result.notes)


def test_an_output_that_is_a_link_stays_one(
    sd1_models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    a, b, _ = sd1_models
    real = tmp_path / "disk" / "real.safetensors"
    real.parent.mkdir()
    real.write_bytes(b"old")
    link = tmp_path / "o.safetensors"
    link.symlink_to(real)
    recipe = parse_recipe(
        f"ckptools: 1\nmodels: {{A: {a}, B: {b}}}\nmerge: 0.5*A + 0.5*B\n"
        "output: {path: o.safetensors}\n",
        tmp_path / "r.yaml",
    )

    merge(recipe, force=True)

    assert link.is_symlink()
    assert real.stat().st_size > 1000
