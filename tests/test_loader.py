"""Checkpoints in modules: equal to diffusers' own loader, strict, and hot-swapped to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import layout, shrunk, write_tensors
from narrow import TINY, Narrow, in_full, narrow_model, small, write_folder, write_json
from safetensors.torch import load_file
from torch import Tensor

from ckptools.checkpoint import open_safetensors
from ckptools.engine import Settings, run
from ckptools.errors import CkptError, InputError, ManyErrors, UsageError
from ckptools.family import detect
from ckptools.keymap import key_map
from ckptools.plan import make_plan
from ckptools.recipe import load_recipe
from ckptools.render import ModuleSink, load_controlnet, load_pipeline
from ckptools.render import loader as loading
from ckptools.render.configs import draft
from ckptools.render.loader import Names, Pipeline, build_modules, fit
from ckptools.tensors import TensorSpec
from ckptools.workflow import merge, tasks_of
from ckptools.writer import lay_out

Make = Callable[..., Narrow]
Tiny = tuple[dict[str, TensorSpec], dict[str, Any], Names]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Narrow models, each written once."""
    made: dict[tuple[str, int], Narrow] = {}

    def model(family: str, channels: int = 4) -> Narrow:
        key = (family, channels)
        if key not in made:
            made[key] = narrow_model(tmp_path_factory.mktemp(family), family, channels)
        return made[key]

    return model


def load(model: Narrow, **keys: Any) -> Pipeline:
    return load_pipeline(
        model.path, **{"config": model.config, "device": "cpu", "prediction": "epsilon"} | keys
    )


def state(pipeline: Pipeline) -> dict[str, Tensor]:
    return {
        f"{component}.{name}": tensor
        for component, module in pipeline.modules.items()
        for name, tensor in module.state_dict().items()
    }


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert found
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


# --- against diffusers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "channels", "kind"),
    [
        ("sd1", 4, "StableDiffusionPipeline"),
        ("sd1", 9, "StableDiffusionInpaintPipeline"),
        ("sd1", 8, "StableDiffusionInstructPix2PixPipeline"),
        ("sd2", 4, "StableDiffusionPipeline"),
        ("sdxl", 4, "StableDiffusionXLPipeline"),
    ],
)
def test_every_tensor_is_as_diffusers_loads_it(
    make: Make, tmp_path: Path, family: str, channels: int, kind: str
) -> None:
    import diffusers

    model = make(family, channels)
    ours = load(model)
    folder = in_full(tmp_path, ours.modules, diffusers.DDIMScheduler())
    for number in range(len(ours.text_encoders)):
        name = "tokenizer_2" if number else "tokenizer"
        (folder / name).symlink_to(model.config / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = getattr(diffusers, kind).from_single_file(
                str(model.path), config=str(folder), local_files_only=True,
                torch_dtype=torch.float32,
            )  # fmt: skip
        except AttributeError as exc:  # diffusers 0.38 with transformers 5.23
            if "object has no attribute 'text_model'" not in str(exc):
                raise
            pytest.skip(f"this diffusers cannot fill this transformers' modules: {exc}")

    for name, module in ours.modules.items():
        assert_equal(module.state_dict(), getattr(theirs, name).state_dict())
    positions = ours.text_encoders[0].module
    buffers = dict(positions.named_buffers())
    assert all(not tensor.is_meta for tensor in buffers.values())
    assert [torch.equal(t, torch.arange(77)[None]) for n, t in buffers.items() if "ids" in n]


def test_a_folder_saved_by_diffusers_is_loaded_like_the_file(make: Make, tmp_path: Path) -> None:
    ours = load(make("sd2"))
    import diffusers

    folder = in_full(tmp_path, ours.modules, diffusers.DDIMScheduler())
    for name, module in ours.modules.items():
        module.save_pretrained(folder / name)
    (folder / "tokenizer").symlink_to(make("sd2").config / "tokenizer")
    again = load_pipeline(folder, device="cpu")

    assert_equal(state(again), state(ours))
    assert (again.prediction, again.told_by) == ("epsilon", "file")


CONTROL = "control_model."


def control_file(folder: Path) -> Path:
    specs = shrunk("controlnet-sd1")
    tensors = {name: small(spec, 5) for name, spec in specs.items()}
    return write_tensors(folder / "control.safetensors", tensors)


def test_a_controlnet_is_as_diffusers_loads_it(make: Make, tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    pipeline = load(make("sd1"))
    path = control_file(tmp_path)
    ours = load_controlnet(path, pipeline).module
    ours.save_config(tmp_path / "config")
    theirs = ControlNetModel.from_single_file(
        str(path), config=str(tmp_path / "config"), local_files_only=True
    )
    ours.save_pretrained(tmp_path / "saved")
    saved = next((tmp_path / "saved").glob("*.safetensors"))

    assert_equal(ours.state_dict(), theirs.state_dict())
    assert_equal(load_controlnet(saved, pipeline).module.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_public_models_are_built_as_their_folders_say(family: str) -> None:
    """Full width: every name and shape of the public layouts, nothing from a folder."""
    from diffusers_models import _models

    specs = layout(family)
    blueprint = draft(specs, detect(specs), prediction="epsilon")
    modules = build_modules(blueprint)
    with torch.device("meta"):
        wanted = {name: model for name, (model, _) in _models(family).items()}

    fit(specs, modules, Names(key_map(family)))
    for key in ("block_out_channels", "cross_attention_dim", "down_block_types", "up_block_types",
                "use_linear_projection", "addition_embed_type", "addition_time_embed_dim",
                "projection_class_embeddings_input_dim"):  # fmt: skip
        found, public = (models["unet"].config[key] for models in (modules, wanted))
        assert found == public or list(found) == list(public), key
    heads = [
        [m.heads for m in models["unet"].modules() if type(m).__name__ == "Attention"]
        for models in (modules, wanted)
    ]
    assert heads[0] == heads[1]
    for name in blueprint.facts.text_encoders:
        found, public = (models[name].config.to_dict() for models in (modules, wanted))
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
            assert found[key] == public[key], key


# --- strictness ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    with open_safetensors(TINY / "C.safetensors") as checkpoint:
        specs = dict(checkpoint)
    return specs, build_modules(draft(specs, detect(specs))), Names(key_map("sd1"))


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_every_tensor_that_is_missing_or_misshapen_is_named(tiny: Tiny, change: str) -> None:
    """Every tensor of the tiny family, forty at a time."""
    specs, modules, names = tiny
    needed = sorted(fit(specs, modules, names).slots)
    assert len(needed) > 1000

    for start in range(40):
        chosen = set(needed[start::40])
        bad = {name: spec for name, spec in specs.items() if name not in chosen}
        if change == "misshapen":
            bad |= {n: replace(specs[n], shape=(7, *specs[n].shape[1:])) for n in chosen}
        with pytest.raises(ManyErrors) as caught:
            fit(bad, modules, names)
        assert {error.where for error in caught.value.errors} == chosen
        said = "is missing" if change == "missing" else "is [7"
        assert all(error.what.startswith(said) for error in caught.value.errors)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_a_bad_tensor_of_a_public_model_does_not_bend_the_rest(family: str, change: str) -> None:
    """Widths and depths are voted on, so the one that is wrong stands out."""
    whole = layout(family)
    names = [name for name in whole if key_map(family).pieces(whole[name])]
    for name in [*names[:: len(names) // 3], "model.diffusion_model.input_blocks.0.0.weight"]:
        specs, spec = dict(whole), whole[name]
        if change == "missing":
            del specs[name]
        else:
            specs[name] = replace(spec, shape=(*spec.shape[:-1], spec.shape[-1] + 3))
        modules = build_modules(draft(specs, detect(specs), prediction="epsilon"))
        with pytest.raises(InputError) as caught:
            fit(specs, modules, Names(key_map(family)))
        assert caught.value.where == name


def test_all_errors_come_together_before_any_weight_is_read(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("sd1")
    tensors = load_file(model.path)
    gone = "first_stage_model.decoder.conv_in.bias"
    bent = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    counted = "model.diffusion_model.out.0.bias"
    del tensors[gone]
    tensors[bent] = tensors[bent][:-1].clone()
    tensors[counted] = tensors[counted].int()
    path = write_tensors(tmp_path / "bad.safetensors", tensors)
    monkeypatch.setattr(loading, "_fill", lambda *_: pytest.fail("weights were read"))

    with pytest.raises(ManyErrors) as caught:
        load(replace(model, path=path))

    assert {error.where for error in caught.value.errors} == {gone, bent, counted}


def test_a_whole_component_that_is_missing_is_one_error(make: Make, tmp_path: Path) -> None:
    model = make("sd1")
    kept = {n: t for n, t in load_file(model.path).items() if not n.startswith("first_stage")}
    path = write_tensors(tmp_path / "no-vae.safetensors", kept)

    with pytest.raises(InputError, match="has no vae"):
        load(replace(model, path=path))
    with_vae = load(replace(model, path=path), vae=model.path)
    assert_equal(state(with_vae), state(load(model)))


def test_hundreds_of_errors_are_cut_short(
    tiny: Tiny,
) -> None:
    specs, modules, names = tiny
    kept = {name: spec for name, spec in specs.items() if not name.endswith("bias")}

    with pytest.raises(ManyErrors, match="more tensors do not fit") as caught:
        fit(kept, modules, names)
    assert len(caught.value.errors) == 41


def test_the_same_tensor_twice_is_refused(
    tiny: Tiny,
) -> None:
    specs, modules, names = tiny
    usual = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    other = usual.replace("text_model.", "")

    with pytest.raises(InputError, match="is the same tensor as"):
        fit({**specs, other: replace(specs[usual], name=other)}, modules, names)


def test_tensors_that_no_module_wants_are_told(make: Make, tmp_path: Path) -> None:
    model = make("sd1")
    extra = {"model.diffusion_model.middle_block.1.norm.extra": torch.zeros(2)}
    path = write_tensors(tmp_path / "more.safetensors", load_file(model.path) | extra)

    assert "middle_block.1.norm.extra" in load(replace(model, path=path)).notes[0]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flux", "no pictures are made with flux"),
        ("sdxl-refiner", "no pictures are made with sdxl-refiner"),
        ("sd2-depth", "a depth model"),
        ("controlnet-sd1", "not a checkpoint that pictures can be made with"),
    ],
)
def test_other_models_are_refused_by_name(name: str, says: str) -> None:
    specs = layout(name)

    with pytest.raises(InputError, match=says):
        draft(specs, detect(specs))


def test_a_tokenizer_of_another_size_is_refused(make: Make, tmp_path: Path) -> None:
    config = write_folder(tmp_path, "sd1")
    for path in (config / "tokenizer").iterdir():
        path.unlink()

    with pytest.raises(InputError, match="knows 1,544 words, the tokenizer 49,408"):
        load(make("sd1"), config=config)


def test_what_cannot_be_built_is_said(make: Make) -> None:
    with pytest.raises(InputError, match="no unet can be built from these shapes"):
        load(make("sd1"), config=None)


def test_a_broken_folder_is_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        load(make("sd1"), config=tmp_path)
    (tmp_path / "unet/config.json").write_text("[]")
    with pytest.raises(InputError, match="is not a JSON object"):
        load(make("sd1"), config=tmp_path)


def test_a_controlnet_for_other_models_is_refused(make: Make, tmp_path: Path) -> None:
    pipeline, path = load(make("sd2")), control_file(tmp_path)

    with pytest.raises(InputError, match="text is 24 wide; this model's text is 32 wide"):
        load_controlnet(path, pipeline)
    with pytest.raises(InputError, match="not a ControlNet"):
        load_controlnet(make("sd1").path, pipeline)


def test_a_controlnet_that_lacks_a_tensor_is_refused(make: Make, tmp_path: Path) -> None:
    pipeline, path = load(make("sd1")), control_file(tmp_path)
    tensors = load_file(path)
    name = CONTROL + "input_hint_block.4.bias"
    del tensors[name]

    with pytest.raises(InputError, match="is missing") as caught:
        load_controlnet(write_tensors(path, tensors), pipeline)
    assert caught.value.where == name


# --- prediction, device, dtype ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("markers", "config", "argument", "wanted"),
    [
        ((), "", None, ("epsilon", "family", False)),
        ((), "v_prediction", None, ("v", "config", False)),
        ((), "v_prediction", "epsilon", ("epsilon", "argument", False)),
        (("v_pred",), "epsilon", None, ("v", "file", False)),
        (("v_pred", "ztsnr"), "", None, ("v", "file", True)),
    ],
)
def test_the_prediction_is_told_by_the_nearest(
    tmp_path: Path, markers: tuple[str, ...], config: str, argument: str | None,
    wanted: tuple[str, str, bool],
) -> None:  # fmt: skip
    specs = layout("sdxl") | {name: TensorSpec(name, "F16", (0,)) for name in markers}
    if config:
        write_json(tmp_path / "scheduler/scheduler_config.json", prediction_type=config)

    blueprint = draft(specs, detect(specs), config=tmp_path, prediction=argument)

    assert (blueprint.prediction, blueprint.told_by, blueprint.zero_snr) == wanted


def test_what_nothing_tells_one_step_of_the_unet_does(make: Make) -> None:
    model = make("sd2")
    pipeline = load(model, prediction=None)

    assert pipeline.told_by == "probe"
    assert pipeline.prediction == "v"  # a random network predicts no noise


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="no huge pages to ask for")
def test_weights_lie_in_memory_that_may_have_huge_pages(make: Make) -> None:
    """Without, first touching a full-size model's memory takes most of the time of loading it."""
    pipeline = load(make("sd1"))
    advised = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(word, 16) for word in first.split("-"))
        elif first == "VmFlags:" and "hg" in line.split():
            advised.append(range(begin, end))

    places = {name: tensor.data_ptr() for name, tensor in state(pipeline).items()}
    assert [n for n, place in places.items() if not any(place in span for span in advised)] == []


def test_every_weight_is_aligned_and_has_a_storage_of_its_own(make: Make) -> None:
    tensors = state(load(make("sdxl")))

    assert [name for name, tensor in tensors.items() if tensor.data_ptr() % 64] == []
    assert [
        name
        for name, tensor in tensors.items()
        if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous()
    ] == []


def test_a_device_that_holds_nothing_is_given_every_weight(make: Make) -> None:
    """As benchmarks time it: the host's part in loading for another device."""
    pipeline = load(make("sd1"), device="meta")

    assert all(tensor.is_meta for tensor in state(pipeline).values())


def test_predictions_that_cannot_be_drawn_are_refused() -> None:
    specs = layout("sdxl") | {"edm_mean": TensorSpec("edm_mean", "F32", (4,))}

    with pytest.raises(InputError, match="it predicts 'edm'"):
        draft(specs, detect(specs))
    with pytest.raises(UsageError, match="no prediction 'x0'"):
        draft(specs, detect(specs), prediction="x0")


def test_the_dtype_follows_the_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("sd1")
    assert load(model).dtype == torch.float32
    assert load(model, dtype="fp16").unet.dtype == torch.float16
    assert load(model, dtype="fp16").vae.dtype == torch.float32
    monkeypatch.setattr(loading, "free_memory_bytes", lambda _: 1 << 30)

    tight = load(model)

    assert tight.unet.dtype == tight.text_encoders[0].module.dtype == torch.bfloat16
    assert tight.vae.dtype == torch.float32


def test_a_gpu_that_is_short_leaves_the_text_encoders_out(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = load(make("sdxl")).modules
    card = torch.device("cuda")
    monkeypatch.setattr(loading, "free_memory_bytes", lambda _: 1 << 40)
    roomy = loading._homes(modules, card, "auto")
    monkeypatch.setattr(loading, "free_memory_bytes", lambda _: 1 << 30)
    tight = loading._homes(modules, card, "auto")

    assert {home.device.type for home in roomy.values()} == {"cuda"}
    assert roomy["unet"].dtype == torch.float16
    assert roomy["vae"].dtype == torch.float32
    assert tight["unet"] == roomy["unet"]
    assert tight["text_encoder_2"].device.type == "cpu"


def test_unknown_devices_and_dtypes_are_refused(make: Make) -> None:
    with pytest.raises(UsageError, match="no device 'abacus'"):
        load(make("sd1"), device="abacus")
    with pytest.raises(UsageError, match="no dtype 'fp8' to draw with"):
        load(make("sd1"), dtype="fp8")


# --- the sink -----------------------------------------------------------------------------------


def write_recipe(folder: Path, body: str, dtype: str) -> Path:
    path = folder / "recipe.yaml"
    models = "".join(f"  {name}: {TINY / name}.safetensors\n" for name in "ABC" if name in body)
    path.write_text(
        f"ckptools: 1\nmodels:\n{models}{body}output: {{path: out.safetensors, dtype: {dtype}}}\n"
    )
    return path


def pour(recipe: Path, pipeline: Pipeline) -> None:
    """A recipe's merge into a pipeline, by the engine, as a sweep does it."""
    plan = make_plan(load_recipe(recipe), threads=2)
    try:
        ((path, specs),) = plan.shards
        place = lay_out(specs, {}, path)
        sources = [source.checkpoint for source in plan.sources]
        run(
            tasks_of(plan.steps, place),
            sources=sources,
            labels=[source.name for source in plan.sources],
            sink=ModuleSink(pipeline, place),
            settings=Settings(threads=2),
        )
    finally:
        plan.close()


@pytest.mark.parametrize(
    ("body", "dtype"),
    [
        ("merge: A * 0.3 + B * 0.7\n", "fp16"),
        ("merge: A + (B - C) * 0.7\n", "bf16"),
        ("merge: slerp(A, B, t=0.4)\n", "fp32"),
        ("merge: A\n", "fp8_e4m3"),
    ],
)
def test_what_is_rendered_is_what_would_be_saved(tmp_path: Path, body: str, dtype: str) -> None:
    recipe = write_recipe(tmp_path, body, dtype)
    resident = load_pipeline(TINY / "C.safetensors", device="cpu")
    before = {name: tensor.data_ptr() for name, tensor in state(resident).items()}

    pour(recipe, resident)

    saved = load_pipeline(merge(load_recipe(recipe)).output, device="cpu")
    assert_equal(state(resident), state(saved))
    assert {name: tensor.data_ptr() for name, tensor in state(resident).items()} == before


def test_a_baked_adapter_is_rendered_as_it_would_be_saved(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{A: {TINY}/A.safetensors, D: {TINY}/striped.safetensors}}\n"
        "merge: bake(A, D, weight=0.8)\noutput: {path: out.safetensors}\n"
    )
    resident = load_pipeline(TINY / "A.safetensors", device="cpu")
    before = {name: tensor.clone() for name, tensor in state(resident).items()}

    pour(recipe, resident)

    saved = load_pipeline(merge(load_recipe(recipe)).output, device="cpu")
    assert_equal(state(resident), state(saved))
    changed = [n for n, tensor in state(resident).items() if not torch.equal(tensor, before[n])]
    assert changed


@pytest.mark.parametrize("size", [2, 6000])
def test_pieces_of_any_size_land_where_the_whole_does(make: Make, size: int) -> None:
    """Split projections and transposed tensors included: SDXL has both."""
    model = make("sdxl")
    wanted, resident = load(model), load(model)
    named = ("text_projection", "resblocks.0.attn.in_proj", "quant_conv", "mid.attn_1.q.weight")
    with torch.no_grad():
        for tensor in state(resident).values():
            tensor.zero_()
    with open_safetensors(model.path) as checkpoint:
        place = lay_out(checkpoint.values(), {}, Path("never-written.safetensors"))
        sink = ModuleSink(resident, place)
        for spec in place.specs:
            data = bytes(checkpoint.read(spec.name))
            step = size if any(part in spec.name for part in named) else len(data)
            for begin in range(0, len(data), step):
                part = memoryview(data)[begin : begin + step]
                sink.write(part, place.starts[spec.name] + begin)

    assert_equal(state(resident), state(wanted))


def test_runs_of_many_tensors_are_taken_apart(make: Make) -> None:
    model = make("sd1")
    wanted, resident = load(model), load(model)
    with torch.no_grad():
        for tensor in state(resident).values():
            tensor.zero_()
    with open_safetensors(model.path) as checkpoint:
        place = lay_out(checkpoint.values(), {}, Path("never-written.safetensors"))
        whole = b"".join(checkpoint.read(spec.name) for spec in place.specs)
    sink, step = ModuleSink(resident, place), 30_000  # even: values are two bytes wide
    odd = place.data_start % 2

    for begin in range(odd, len(whole), step):
        sink.write(memoryview(whole)[begin : begin + step], place.data_start + begin)

    assert_equal(state(resident), state(wanted))


def test_an_output_that_does_not_fill_the_pipeline_is_refused(make: Make) -> None:
    pipeline = load(make("sd1"))
    specs = [s for s in make("sd1").specs.values() if not s.name.endswith("out.2.bias")]

    with pytest.raises(InputError, match="is missing"):
        ModuleSink(pipeline, lay_out(specs, {}, Path("x.safetensors")))
    other = lay_out(make("sd1", 9).specs.values(), {}, Path("x.safetensors"))
    with pytest.raises(CkptError, match=r"is \[10, 9, 3, 3\]; unet wants \[10, 4, 3, 3\]"):
        ModuleSink(pipeline, other)
