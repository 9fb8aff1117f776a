"""ControlNets for other bases: names across models, input channels, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from models import UNET, Specs, layout, model_values, shrunk, write_model, write_tensors
from numpy.typing import NDArray
from oracle import rounded
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

from ckptools import cli
from ckptools.errors import CkptError, ManyErrors, RecipeError
from ckptools.family import detect
from ckptools.plan import Plan, make_plan
from ckptools.recipe import Recipe, parse_recipe
from ckptools.sources import open_checkpoint
from ckptools.workflow import merge

ROOT = Path(__file__).parent.parent
TINY = ROOT / "ckptools" / "tiny"
COPY = "control_model."
CONV_IN = "input_blocks.0.0.weight"
FORMULA = "transfer_control(control, A, C)"
Values = Mapping[str, NDArray[np.float16]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A narrow ControlNet and models around it, by name. Do not change."""
    folder = tmp_path_factory.mktemp("control")
    specs = {
        "control": shrunk("controlnet-sd1"),
        "other": shrunk("controlnet-sd1"),
        "A": shrunk("sd1"),
        "B": shrunk("sd1"),
        "C": shrunk("sd1"),
        "I": shrunk("sd1-inpainting"),
        "SD2": shrunk("sd2"),
    }
    return {
        name: write_model(folder / f"{name}.safetensors", of, seed=seed)
        for seed, (name, of) in enumerate(specs.items())
    }


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe over model files, its output in the test's own folder."""

    def make(models: Mapping[str, Path], formula: str = FORMULA, more: str = "") -> Recipe:
        lines = [f'  {name}: "{path}"' for name, path in models.items()]
        text = "\n".join(["ckptools: 1", "models:", *lines, f'merge: "{formula}"', more])
        text += f"\noutput: {{path: {tmp_path / 'out.safetensors'}}}\n"
        return parse_recipe(text, tmp_path / "recipe.yaml")

    return make


def of(files: Mapping[str, Path], names: str) -> dict[str, Path]:
    return {name: files[name] for name in names.split()}


def run(recipe: Recipe) -> tuple[Plan, Values]:
    result = merge(recipe)
    return result.plan, load_file(result.output)


def refused(recipe: Recipe) -> str:
    with pytest.raises(CkptError) as caught:
        make_plan(recipe).close()
    error = caught.value
    errors = error.errors if isinstance(error, ManyErrors) else (error,)
    return "\n".join(f"{one.where} {one.what} {one.fix}" for one in errors)


def transferred(control: Values, new: Values, old: Values) -> dict[str, NDArray[np.float64]]:
    """The formula in float64, over names put together here."""
    wanted = {}
    for name, values in control.items():
        theirs = UNET + name.removeprefix(COPY)
        sums = values.astype(np.float64)
        if theirs in new:
            channels = values.shape[1] if name == COPY + CONV_IN else None
            pair = (model[theirs].astype(np.float64) for model in (new, old))
            one, other = (each[:, :channels] if channels else each for each in pair)
            sums = sums + (one - other)
        wanted[name] = rounded(sums, "F16")
    return wanted


def assert_equal(found: Values, wanted: Mapping[str, NDArray[np.floating]]) -> None:
    """To the last bit but for sums that fp32 cannot tell from a middle between two."""
    assert found.keys() == wanted.keys()
    off = 0
    for name, values in wanted.items():
        assert found[name].shape == values.shape
        np.testing.assert_allclose(found[name].astype(float), values, 2**-10, 2**-22, err_msg=name)
        off += int((found[name].astype(float) != values).sum())
    assert off / sum(values.size for values in wanted.values()) < 1e-3


# --- the numbers -------------------------------------------------------------------------------


def test_what_the_new_base_learned_is_added_to_the_copy(
    files: dict[str, Path], recipe: Callable[..., Recipe]
) -> None:
    plan, found = run(recipe(of(files, "control A C")))

    control, new, old = (load_file(files[name]) for name in ("control", "A", "C"))
    assert_equal(found, transferred(control, new, old))
    assert plan.counts == {"merged": 298, "copied": 42, "carried": 0, "cast": 0}
    assert plan.warnings == ()
    assert plan.dropped == {}
    with open_checkpoint(plan.outputs[0]) as written:
        told = detect(written, written.metadata)
        assert (told.kind, told.variant) == ("controlnet", "sd1")
        assert written.metadata["modelspec.architecture"] == "stable-diffusion-v1/controlnet"


def test_what_is_its_own_is_kept_to_the_bit(
    files: dict[str, Path], recipe: Callable[..., Recipe]
) -> None:
    _, found = run(recipe(of(files, "control A C")))
    control = load_file(files["control"])

    own = [n for n in control if any(k in n for k in ("hint", "zero_convs", "middle_block_out"))]
    assert len(own) == 42
    assert all(found[name].tobytes() == control[name].tobytes() for name in own)


def test_equal_bases_give_the_same_bytes(
    files: dict[str, Path], recipe: Callable[..., Recipe]
) -> None:
    models = {"control": files["control"], "A": files["C"], "C": files["C"]}

    _, found = run(recipe(models))

    control = load_file(files["control"])
    assert all(found[name].tobytes() == values.tobytes() for name, values in control.items())


@pytest.mark.parametrize("formula", ["transfer_control(control, I, C)",
                                     "transfer_control(control, C, I)"])  # fmt: skip
def test_of_an_inpainting_model_the_first_channels_take_part(
    files: dict[str, Path], recipe: Callable[..., Recipe], formula: str
) -> None:
    plan, found = run(recipe(of(files, "control I C"), formula))

    control, wide, old = (load_file(files[name]) for name in ("control", "I", "C"))
    pair = (wide, old) if "I, C" in formula else (old, wide)
    assert wide[UNET + CONV_IN].shape[1] == 9
    assert found[COPY + CONV_IN].shape[1] == 4
    assert_equal(found, transferred(control, *pair))
    assert "I: the first 4 of 9 input channels take part" in plan.notes


def test_a_narrower_base_leaves_the_other_channels_as_they_are(
    files: dict[str, Path], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    specs = shrunk("controlnet-sd1")
    wide = torch.randn(specs[COPY + CONV_IN].shape[0], 9, 3, 3, generator=torch.Generator()).half()
    path = write_model(tmp_path / "wide.safetensors", specs, seed=5, edits={COPY + CONV_IN: wide})

    _, found = run(recipe({"control": path, **of(files, "A C")}))

    assert found[COPY + CONV_IN].shape == wide.shape
    np.testing.assert_array_equal(found[COPY + CONV_IN][:, 4:], wide.numpy()[:, 4:])
    assert (found[COPY + CONV_IN][:, :4] != wide.numpy()[:, :4]).mean() > 0.9


def test_the_new_base_may_be_a_merge(files: dict[str, Path], recipe: Callable[..., Recipe]) -> None:
    more = "let: {mine: A * 0.5 + B * 0.5}"
    _, found = run(recipe(of(files, "control A B C"), "transfer_control(control, mine, C)", more))

    control, a, b, c = (load_file(files[name]) for name in ("control", "A", "B", "C"))
    mean = {n: (a[n].astype(np.float64) + b[n].astype(np.float64)) / 2 for n in a}
    assert_equal(found, transferred(control, mean, c))


def test_the_new_base_may_be_a_merge_along_the_sphere(
    files: dict[str, Path], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """What is the ControlNet's own needs no base, so a method that is not linear is left out."""
    text = "transfer_control(control, slerp(A, B, t=0.3), C)"
    plan, found = run(recipe(of(files, "control A B C"), text))

    models = "\n".join(f'  {name}: "{files[name]}"' for name in "AB")
    text = f"ckptools: 1\nmodels:\n{models}\nmerge: slerp(A, B, t=0.3)\n"
    text += "output: {path: s.safetensors, dtype: fp32}\n"
    sphere = load_file(merge(parse_recipe(text, tmp_path / "s.yaml")).output)
    control, c = load_file(files["control"]), load_file(files["C"])
    assert_equal(found, transferred(control, sphere, c))
    assert plan.counts["copied"] == 42


def test_two_controlnets_mix_in_all_that_is_theirs(
    files: dict[str, Path], recipe: Callable[..., Recipe]
) -> None:
    text = "transfer_control(control, A, C) * 0.5 + transfer_control(other, A, C) * 0.5"
    _, found = run(recipe(of(files, "control other A C"), text))

    one, other, a, c = (load_file(files[name]) for name in ("control", "other", "A", "C"))
    mean = {n: (one[n].astype(np.float64) + other[n].astype(np.float64)) / 2 for n in one}
    assert_equal(found, transferred(mean, a, c))


# --- names -------------------------------------------------------------------------------------


def test_the_names_of_diffusers_are_kept(
    monkeypatch: pytest.MonkeyPatch, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Against diffusers' own modules: there a ControlNet and a UNet share their layers' names."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "tiny")
    from samples import build, build_control, read

    control = build_control(read("control.safetensors"))
    theirs = {name: value.half() for name, value in control.state_dict().items()}
    path = write_tensors(tmp_path / "control.safetensors", theirs)
    bases = {name: build(read(f"{name}.safetensors")).unet.state_dict() for name in "AC"}

    models = {"control": path, "A": TINY / "A.safetensors", "C": TINY / "C.safetensors"}
    plan, found = run(recipe(models))

    wanted: dict[str, NDArray[np.float64]] = {}
    for name, value in theirs.items():
        sums = value.double()
        if name in bases["A"]:
            sums = sums + (bases["A"][name].double() - bases["C"][name].double())
        wanted[name] = rounded(sums.numpy(), "F16")
    assert len(set(theirs) & set(bases["A"])) == 298
    assert_equal(found, wanted)
    assert {step.component for step in plan.steps} == {"controlnet"}


def test_both_namings_give_the_same_values(
    monkeypatch: pytest.MonkeyPatch, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """A ControlNet in one naming mixes with one in the other: half of each is itself."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "tiny")
    from samples import build_control, read

    state = build_control(read("control.safetensors")).state_dict()
    path = tmp_path / "theirs.safetensors"
    save_file({name: value.half() for name, value in state.items()}, path)
    ours = TINY / "control.safetensors"

    _, found = run(recipe({"one": ours, "other": path}, "one * 0.5 + other * 0.5"))

    assert_equal(found, {n: v.astype(float) for n, v in load_file(ours).items()})


def test_a_folder_of_diffusers_serves_as_a_base(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = tmp_path / "A"
    assert cli.run(["convert", str(TINY / "I.safetensors"), str(folder), "-q"]) == 0
    control, c = TINY / "control.safetensors", TINY / "C.safetensors"

    plan, found = run(recipe({"control": control, "A": folder, "C": c}))

    new, old = load_file(TINY / "I.safetensors"), load_file(c)
    assert_equal(found, transferred(load_file(control), new, old))
    assert "A: the first 4 of 9 input channels take part" in plan.notes


def test_a_layer_that_a_base_lacks_is_told(
    files: dict[str, Path], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    gap = UNET + "middle_block.0.in_layers.0.weight"
    tensors = model_values(shrunk("sd1"), seed=3)
    del tensors[gap]
    broken = write_tensors(tmp_path / "broken.safetensors", tensors)

    plan, found = run(recipe({"control": files["control"], "A": files["A"], "C": broken}))

    assert plan.warnings == ("1 tensor is carried from control: C lacks it",)
    own = gap.replace(UNET, COPY)
    assert found[own].tobytes() == load_file(files["control"])[own].tobytes()


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "says"),
    [
        ("transfer_control(A, control, C)",
         ["transfer_control: 'control' is A, Stable Diffusion 1.x; it must be a ControlNet",
          "transfer_control: 'new_base' is control, ControlNet sd1; it must be a whole model"]),
        ("transfer_control(control, A, control)",
         ["transfer_control: 'old_base' is control, ControlNet sd1; it must be a whole model"]),
        ("transfer_control(control, transfer_control(control, A, C), C)",
         ["'new_base' must be a checkpoint; transfer_control gives a controlnet"]),
        ("transfer_control(control, A - C, C)", ["'new_base' is a difference"]),
        ("transfer_control(control, A, C) * 0.5 + A * 0.5", ["models of different families"]),
        ("control + (A - C)", ["models of different families"]),
        ("slerp(control, A)", ["models of different families"]),
    ],
)  # fmt: skip
def test_wrong_kinds_are_refused_by_name(
    files: dict[str, Path], recipe: Callable[..., Recipe], formula: str, says: list[str]
) -> None:
    try:
        text = refused(recipe(of(files, "control A C"), formula))
    except RecipeError as exc:  # found while reading
        text = str(exc)

    assert all(words in text for words in says), text


def test_the_error_points_into_the_formula(
    files: dict[str, Path], recipe: Callable[..., Recipe]
) -> None:
    text = refused(recipe(of(files, "control A C"), "transfer_control(control, control, C)"))

    assert "column 27 of the formula" in text
    assert "\n    transfer_control(control, control, C)\n" + " " * 30 + "^" in text


def test_a_let_is_looked_through(files: dict[str, Path], recipe: Callable[..., Recipe]) -> None:
    text = refused(
        recipe(of(files, "control A C"), "transfer_control(mine, A, C)", "let: {mine: A}")
    )

    assert "'control' is A, Stable Diffusion 1.x" in text


def test_models_of_another_family_are_refused(
    files: dict[str, Path], recipe: Callable[..., Recipe]
) -> None:
    text = refused(recipe(of(files, "control SD2 C"), "transfer_control(control, SD2, C)"))

    assert "control is a ControlNet for sd1, SD2 is Stable Diffusion 2.x" in text


def test_another_base_is_refused(files: dict[str, Path], recipe: Callable[..., Recipe]) -> None:
    text = refused(recipe(of(files, "control A C"), more="base: A"))

    assert "base: A is Stable Diffusion 1.x, and the result is not" in text


def test_a_controlnet_stored_as_a_difference_needs_no_transfer(
    files: dict[str, Path], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    marker = {"difference": torch.zeros(0)}
    path = write_model(tmp_path / "d.safetensors", shrunk("controlnet-sd1"), seed=1, edits=marker)

    text = refused(recipe({"control": path, **of(files, "A C")}))

    assert "stored as a difference" in text
    assert "without a transfer" in text


def test_a_controlnet_whose_copies_are_not_known_is_refused(
    files: dict[str, Path], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    names = {"controlnet_blocks.0.weight": (8, 8), "pos_embed_input.proj.weight": (8, 16, 2, 2)}
    tensors: dict[str, Tensor] = {name: torch.ones(shape) for name, shape in names.items()}
    path = write_tensors(tmp_path / "sd3.safetensors", tensors)

    text = refused(recipe({"control": path, **of(files, "A C")}))

    assert "for sd3, whose copies are not known" in text


def test_a_model_without_the_copied_layers_is_refused(
    files: dict[str, Path], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    lone = write_tensors(tmp_path / "odd.safetensors", {"a": torch.ones(3), "b": torch.ones(2)})

    text = refused(recipe({"control": files["control"], "A": lone, "C": files["C"]}))

    assert "model 'A': no tensors that a ControlNet could be a copy of" in text


def test_files_of_no_known_family_are_matched_by_name(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    paths = {
        name: write_tensors(tmp_path / f"{name}.safetensors", {"w": torch.full((4,), value)})
        for name, value in (("control", 1.0), ("A", 5.0), ("C", 2.0))
    }

    _, found = run(recipe(paths))

    np.testing.assert_array_equal(found["w"], [4.0] * 4)


def test_every_layout_of_the_public_file_has_its_original() -> None:
    """Of the public names 298 are copies, and the UNet has every one of them."""
    from ckptools.family import load_families

    family = load_families()["controlnet"]
    control: Specs = layout("controlnet-sd1")
    copies = {family.copy_name(name) for name in layout("sd1")} - {None}

    assert copies == {name for name in control if family.is_copy(name)}
    assert len(copies) == 298


def test_a_method_gives_every_model_a_kind_or_none() -> None:
    from ckptools.methods import merge_method

    def odd(a: Tensor, b: Tensor) -> Tensor:
        return a + b

    with pytest.raises(ValueError, match="every model needs a kind"):
        merge_method(access="linear", formula="", source="", kinds={"a": "controlnet"})(odd)
