"""`ckptools convert`: the same tensors in another shape, and what stands in the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import model_values, shrunk, write_model, write_tensors
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import ckptools
from ckptools import writer
from ckptools.cli import run
from ckptools.convert import Request, convert, planned
from ckptools.errors import CkptError, InputError, NonFiniteError, OutputError
from ckptools.folders import SIDE_FILE
from ckptools.progress import Progress
from ckptools.tensors import TensorSpec

TINY = Path(ckptools.__file__).parent / "tiny"
Tensors = dict[str, Tensor]


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return dict(opened.metadata() or {})


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow SD1 file of fp32 with metadata of a trainer and an owner's path."""
    path = tmp_path_factory.mktemp("sd1") / "A.safetensors"
    metadata = {
        "modelspec.title": "A title", "modelspec.hash_sha256": "0xold", "from": "/home/me/x.ckpt",
    }  # fmt: skip
    return write_model(path, shrunk("sd1", 64), seed=1, dtype="F32", metadata=metadata)


def json_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "ckptools.convert/1"
    return dict(document)


# --- there and back ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "factor", "dtype"),
    [
        ("sd1", 64, "F16"), ("sd1-inpainting", 64, "F32"), ("sd1-ip2p", 64, "BF16"),
        ("sd2", 64, "F32"), ("sd2-depth", 64, ""), ("sdxl", 64, ""), ("sdxl-refiner", 64, ""),
        ("sd3", 64, ""), ("flux", 64, ""),
    ],
)  # fmt: skip
def test_there_and_back_is_the_same_file(
    name: str, factor: int, dtype: str, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "A.safetensors", shrunk(name, factor), seed=2, dtype=dtype)

    convert(Request(source, tmp_path / "folder"))
    convert(Request(tmp_path / "folder", tmp_path / "B.safetensors"))

    assert_same(load_file(tmp_path / "B.safetensors"), load_file(source))


def test_components_of_several_dtypes_come_back(tmp_path: Path) -> None:
    values = model_values(shrunk("sd2", 64), seed=3)
    mixed = {n: t.float() if n.startswith("first_stage") else t for n, t in values.items()}
    source = write_tensors(tmp_path / "A.safetensors", mixed)

    convert(Request(source, tmp_path / "folder"))
    convert(Request(tmp_path / "folder", tmp_path / "B.safetensors"))

    assert_same(load_file(tmp_path / "B.safetensors"), mixed)


def test_shards_come_back(tmp_path: Path) -> None:
    source = write_model(tmp_path / "A.safetensors", shrunk("sd1"), seed=4)
    folder = tmp_path / "folder"

    result = convert(Request(source, folder, shard_bytes=1_000_000))
    convert(Request(folder, tmp_path / "B.safetensors", shard_bytes=1_500_000))
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    convert(Request(tmp_path / "B.safetensors.index.json", tmp_path / "C.safetensors"))

    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    assert all((folder / path).is_file() for path in result.files)
    assert_same(load_file(tmp_path / "C.safetensors"), load_file(source))


def test_shards_are_replaced_as_a_whole_and_only_when_asked(tmp_path: Path) -> None:
    a, b = (
        write_model(tmp_path / f"{seed}.safetensors", shrunk("sd1"), seed=seed) for seed in (4, 5)
    )
    output = tmp_path / "x.safetensors"
    convert(Request(a, output, shard_bytes=1_000_000))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("x*")}

    for shard_bytes in (1_000_000, 0):
        with pytest.raises(OutputError, match="exists"):
            convert(Request(b, output, shard_bytes=shard_bytes))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("x*")} == before
    result = convert(Request(b, output, shard_bytes=1_500_000, force=True))
    assert sorted(path.name for path in tmp_path.glob("x*")) == sorted(result.files)
    assert result.notes == (f"{len(before) - 1} shards of the replaced output are removed",)
    result = convert(Request(a, output, force=True))
    assert result.notes == (f"{output.name}.index.json, an older output of the same name, is left",)


def test_shards_that_are_read_are_not_written_over(tmp_path: Path) -> None:
    a = write_model(tmp_path / "A.safetensors", shrunk("sd1"), seed=4)
    output = tmp_path / "x.safetensors"
    convert(Request(a, output, shard_bytes=1_000_000))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("x*")}

    index = tmp_path / "x.safetensors.index.json"
    with pytest.raises(OutputError, match="one of the inputs"):
        convert(Request(index, output, shard_bytes=1_000_000, force=True))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("x*")} == before


def test_a_model_that_lacks_a_tensor_is_told(sd1: Path, tmp_path: Path) -> None:
    values = load_file(sd1)
    del values["model.diffusion_model.out.2.bias"]
    part = write_tensors(tmp_path / "part.safetensors", values)

    with planned(Request(part, tmp_path / "x.safetensors")) as conversion:
        (warning,) = conversion.warnings
    with planned(Request(sd1, tmp_path / "x.safetensors")) as conversion:
        assert conversion.warnings == ()

    assert warning == (
        "the unet is incomplete: it lacks 1 tensor, such as model.diffusion_model.out.2.bias"
    )


def test_the_same_bytes_every_time(sd1: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "1" / "x.safetensors", tmp_path / "2" / "x.safetensors"]
    for output, threads in zip(outputs, (1, 4), strict=True):
        convert(Request(sd1, output, dtypes={"default": "F16"}), threads=threads)

    assert outputs[0].read_bytes() == outputs[1].read_bytes()


# --- what loaders make of it -------------------------------------------------------------------


def unet_output(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    width = pipeline.unet.config.cross_attention_dim
    states = torch.randn(1, 77, width, generator=generator)
    with torch.no_grad():
        result: Tensor = pipeline.unet(sample, 10, encoder_hidden_states=states).sample
    return result


@pytest.mark.filterwarnings("ignore")  # of the libraries that load
def test_diffusers_loads_the_folder_and_the_file_alike(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers loads: pip install .[render]")
    source = TINY / "A.safetensors"
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    convert(Request(source, folder, dtypes={"default": "F32"}))
    convert(Request(folder, back))

    of_folder = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    of_file = diffusers.StableDiffusionPipeline.from_single_file(
        back, config=str(folder), local_files_only=True
    )

    for name in ("unet", "vae", "text_encoder"):
        assert_same(getattr(of_file, name).state_dict(), getattr(of_folder, name).state_dict())
    # the same weights; kernels round by where in memory those lie
    torch.testing.assert_close(unet_output(of_folder), unet_output(of_file), rtol=1e-4, atol=1e-5)
    stored = load_file(source)
    weights = of_folder.vae.state_dict()
    assert torch.equal(weights["encoder.conv_in.weight"],
                       stored["first_stage_model.encoder.conv_in.weight"].float())  # fmt: skip
    text = of_folder.text_encoder.state_dict()
    (name,) = [n for n in text if n.endswith("layers.3.self_attn.v_proj.weight")]
    own = "cond_stage_model.transformer.text_model.encoder.layers.3.self_attn.v_proj.weight"
    assert torch.equal(text[name], stored[own].float())


@pytest.mark.filterwarnings("ignore")  # of the libraries that load
@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_diffusers_loads_components_of_derived_settings(name: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers loads: pip install .[render]")
    transformers = pytest.importorskip("transformers", reason="loads: pip install .[render]")
    source = write_model(tmp_path / "A.safetensors", shrunk(name, 4), seed=5)
    folder = tmp_path / "folder"
    convert(Request(source, folder))

    vae, report = diffusers.AutoencoderKL.from_pretrained(
        folder / "vae", local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
    )
    text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")

    index = json.loads((folder / "model_index.json").read_text())
    assert not report["missing_keys"]
    assert vae.config.latent_channels == 4
    stored = load_file(folder / "text_encoder" / "model.safetensors")
    for own, tensor in text.state_dict().items():
        there = own if own in stored else f"text_model.{own}"
        assert torch.equal(tensor.half(), stored[there]), own
    assert index["_class_name"].startswith("StableDiffusion")
    assert all((folder / part).is_dir() for part in ("unet", "vae", "scheduler"))


# --- dtypes ------------------------------------------------------------------------------------


def test_dtypes_by_component(sd1: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    convert(Request(sd1, output, dtypes={"default": "BF16", "unet": "F16", "vae": "keep"}))

    wanted = {}
    for name, tensor in load_file(sd1).items():
        if not tensor.is_floating_point() or name.startswith("first_stage_model."):
            wanted[name] = tensor
        elif name.startswith("model.diffusion_model."):
            wanted[name] = tensor.half()
        else:
            wanted[name] = tensor.bfloat16()
    assert_same(load_file(output), wanted)


def test_a_schedule_and_markers_keep_their_dtype(tmp_path: Path) -> None:
    extra = {"betas": torch.rand(10), "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    source = write_model(tmp_path / "A.safetensors", shrunk("sdxl", 64), seed=6, edits=extra)
    output = tmp_path / "out.safetensors"

    convert(Request(source, output, dtypes={"default": "F16"}))
    convert(Request(source, tmp_path / "folder"))
    scheduler = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())

    assert_same({name: load_file(output)[name] for name in extra}, extra)
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == (
        "v_prediction", True,
    )  # fmt: skip


def test_overflow_names_tensor_and_way_out(sd1: Path, tmp_path: Path) -> None:
    name = "first_stage_model.decoder.conv_in.bias"
    tensors = load_file(sd1)
    tensors[name][0] = 70000.0
    source = write_tensors(tmp_path / "A.safetensors", tensors)

    with pytest.raises(NonFiniteError, match="too large for F16") as caught:
        convert(Request(source, tmp_path / "folder", dtypes={"default": "F16"}))
    convert(Request(source, tmp_path / "b.safetensors", dtypes={"default": "BF16"}))

    assert "--dtype vae=bf16 or fp32" in caught.value.fix
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A.safetensors", "b.safetensors"]


def test_nan_is_refused_or_accepted(sd1: Path, tmp_path: Path) -> None:
    tensors = load_file(sd1)
    tensors["first_stage_model.decoder.conv_in.bias"][0] = torch.nan
    source = write_tensors(tmp_path / "A.safetensors", tensors)
    output = tmp_path / "out.safetensors"

    with pytest.raises(NonFiniteError, match="has 1 NaN or Inf"):
        convert(Request(source, output))
    convert(Request(source, output, allow_nonfinite=True))

    assert output.is_file()


# --- fewer tensors -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a trainer leaves: EMA weights, a loss, an optimiser."""
    specs = shrunk("sd1", 64)
    values = model_values(specs, seed=7)
    for name in list(values):
        if name.startswith("model."):
            copy = "model_ema." + name.removeprefix("model.").replace(".", "")
            values[copy] = values[name] + 1
    values |= {
        "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7),
        "first_stage_model.loss.logvar": torch.zeros(1), "callbacks.best": torch.zeros(1),
        "optimizer_states.0.exp_avg": torch.ones(4), "betas": torch.rand(10),
    }  # fmt: skip
    return write_tensors(tmp_path_factory.mktemp("trained") / "A.safetensors", values)


def test_pruning_leaves_the_model(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    result = convert(Request(trained, output, prune=True))

    left = ("model_ema.", "first_stage_model.loss.", "callbacks.", "optimizer_states.")
    wanted = {n: t for n, t in load_file(trained).items() if not n.startswith(left)}
    assert_same(load_file(output), wanted)
    assert "betas" in wanted
    assert {why: len(n) for why, n in result.conversion.dropped.items()} == {
        "EMA weights": 688, "left by training": 3,
    }  # fmt: skip


def test_ema_weights_take_the_trained_ones_place(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    convert(Request(trained, output, ema=True, prune=True))

    before, after = load_file(trained), load_file(output)
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    assert torch.equal(
        after[name], before["model_ema.diffusion_modelinput_blocks10in_layers2weight"]
    )
    assert not any(name.startswith("model_ema.") for name in after)


def test_ema_must_be_there_and_fit(sd1: Path, trained: Path, tmp_path: Path) -> None:
    tensors = load_file(trained)
    del tensors["model_ema.diffusion_modelout2bias"]
    part = write_tensors(tmp_path / "part.safetensors", tensors)

    with pytest.raises(InputError, match="there are no EMA weights"):
        convert(Request(sd1, tmp_path / "out.safetensors", ema=True))
    with pytest.raises(InputError, match="has no EMA copy"):
        convert(Request(part, tmp_path / "out.safetensors", ema=True))


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    source = write_tensors(tmp_path / "A.safetensors", {"optimizer.x": torch.ones(1)})

    with pytest.raises(InputError, match="no tensors are left"):
        convert(Request(source, tmp_path / "out.safetensors", prune=True))


@pytest.mark.parametrize("name", ["file", "folder"])
def test_a_vae_alone_has_its_own_names(name: str, sd1: Path, tmp_path: Path) -> None:
    bare = tmp_path / "vae.safetensors"
    if name == "file":
        convert(Request(sd1, bare, component="vae"))
    else:  # out as diffusers has it, and back
        convert(Request(sd1, tmp_path / "vae", component="vae"))
        assert json.loads((tmp_path / "vae" / "config.json").read_text())["_class_name"]
        convert(Request(tmp_path / "vae", bare))

    prefix = "first_stage_model."
    stored = load_file(sd1)
    assert_same(
        load_file(bare),
        {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)},
    )


# --- what the file says of itself --------------------------------------------------------------


def test_metadata_is_kept_and_the_conversion_noted(sd1: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "folder", tmp_path / "out.safetensors"
    convert(Request(sd1, folder, dtypes={"default": "F16"}))
    result = convert(Request(folder, output))

    found = metadata_of(output)
    assert found["modelspec.title"] == "A title"
    assert found["format"] == "pt"
    assert found["modelspec.hash_sha256"] == "0x" + result.sha256_data["out.safetensors"]
    assert json.loads(found["ckptools.conversion"])["source"] == "folder"
    assert "from" not in found
    main = metadata_of(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert main["format"] == "pt"
    assert json.loads(main["ckptools.conversion"])["dtype"] == {"default": "F16"}


def test_settings_come_from_a_folder_that_is_given(sd1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    convert(Request(sd1, folder, config=TINY / "config"))

    assert (folder / "tokenizer/vocab.json").read_bytes() == (
        TINY / "config/tokenizer/vocab.json"
    ).read_bytes()
    unet = json.loads((folder / "unet/config.json").read_text())
    assert unet == json.loads((TINY / "config/unet/config.json").read_text())


def test_the_input_channels_are_the_models_own(tmp_path: Path) -> None:
    source = write_model(tmp_path / "A.safetensors", shrunk("sd1-inpainting", 64), seed=8)
    convert(Request(source, tmp_path / "folder", config=TINY / "config"))

    assert json.loads((tmp_path / "folder/unet/config.json").read_text())["in_channels"] == 9


# --- what stands in the way --------------------------------------------------------------------


def test_an_unknown_family_makes_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tensors(tmp_path / "A.safetensors", {"x.weight": torch.ones(2)})

    assert run(["convert", str(source), str(tmp_path / "folder"), "--json"]) == 2
    error = json_of(capsys)["error"]
    assert "no diffusers folder can be made of this: it is a" in error["message"]
    assert "sdxl" in error["fix"]
    assert run(["convert", str(source), str(tmp_path / "B.safetensors"), "-q"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A.safetensors", "A.safetensors", "--force"], "is, or holds, the input"),
        (["A.safetensors", "out.ckpt"], "pickles are read and never written"),
        (["A.safetensors", "out", "--to", "single"], "does not end in .safetensors"),
        (["A.safetensors", "out.safetensors", "--to", "diffusers"], "is the name of a file"),
        (["A.safetensors", "full"], "exists"),
        (["A.safetensors", "full", "-f"], "is no diffusers folder"),
        (["A.safetensors", "full.safetensors", "-f"], "is a folder"),
        (["A.safetensors", "."], "is, or holds, the input"),
        (["A.safetensors", "out", "--component", "vea"], "no component 'vea'"),
        (["A.safetensors", "out", "--dtype", "vea=fp16"], "no component 'vea'"),
        (["A.safetensors", "out", "--dtype", "int8"], "is not a dtype"),
        (["A.safetensors", "out", "--dtype", "fp16", "--dtype", "bf16"], "two dtypes for all"),
        (["A.safetensors", "out", "--dtype", "vae=fp16", "--dtype", "vae=bf16"], "two dtypes for"),
        (["A.safetensors", "out", "--shard-size", "5"], "is not a size"),
        (["A.safetensors", "out", "--config", "nowhere"], "no such folder"),
        (["A.safetensors", "out", "--config", "full"], "a folder without settings"),
        (["A.safetensors", "out.safetensor"], "looks like the name of a file"),
        (["A.safetensors", "out.safetensors.index.json"], "looks like the name of a file"),
        (["nowhere.safetensors", "out"], "no such file"),
        (["A.safetensors", "A.safetensors/out"], "is not a folder"),
    ],
)
def test_what_cannot_be_done_is_said(
    words: list[str],
    message: str,
    sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    os.link(sd1, tmp_path / "A.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "full.safetensors").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(str(path) for path in tmp_path.rglob("*"))

    assert run(["convert", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_force_replaces_a_folder_whole(sd1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    convert(Request(sd1, folder))
    old = folder / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    old.write_bytes(b"{}")
    convert(Request(sd1, folder, dtypes={"default": "F16"}, force=True))

    assert not old.exists()
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values()} == {torch.float16}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["my-lora.safetensors", "notes.json", "unet/style.safetensors"])
def test_a_folder_with_files_of_its_owner_is_not_replaced(
    name: str, sd1: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    convert(Request(sd1, folder))
    (folder / name).write_bytes(b"mine")

    with pytest.raises(OutputError, match=f"no conversion wrote '{name}'"):
        convert(Request(sd1, folder, force=True))
    assert (folder / name).read_bytes() == b"mine"


def test_what_appears_meanwhile_is_not_replaced_unasked(sd1: Path, tmp_path: Path) -> None:
    """Files and folders; with --force they are replaced."""
    places = [tmp_path / "x.safetensors", tmp_path / "d"]

    class Other(Progress):
        def start(self, *_: object) -> None:
            for output in places:
                if output.suffix:
                    output.write_bytes(b"theirs")
                else:
                    output.mkdir(exist_ok=True)
                    (output / "thesis.txt").write_text("theirs")

    for output in places:
        with pytest.raises(OutputError, match="made by somebody else meanwhile"):
            convert(Request(sd1, output), progress=Other())
        assert places[0].read_bytes() == b"theirs"
        assert [path.name for path in places[1].iterdir()] == ["thesis.txt"]
        assert sorted(tmp_path.iterdir()) == sorted(places)
        shutil.rmtree(places[1])
        places[0].unlink()


def test_a_source_folder_is_not_written_into(sd1: Path, tmp_path: Path) -> None:
    convert(Request(sd1, tmp_path / "folder"))

    with pytest.raises(OutputError, match="is, or holds, the input"):
        convert(Request(tmp_path / "folder", tmp_path / "folder" / "out.safetensors"))
    unet = tmp_path / "folder" / "unet"
    with pytest.raises(OutputError, match="is, or holds, the input"):
        convert(Request(unet, unet / "out.safetensors"))


# --- nothing is left behind --------------------------------------------------------------------


def no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*_: object) -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("blow", "error"), [(no_space, CkptError), (interrupted, KeyboardInterrupt)]
)
@pytest.mark.parametrize("name", ["new/out.safetensors", "new/folder", "old"])
def test_a_full_disk_or_an_interrupt_leaves_nothing(
    name: str,
    blow: Callable[..., int],
    error: type[BaseException],
    sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    convert(Request(sd1, tmp_path / "old"))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(writer, "_write_once", blow)

    with pytest.raises(error):
        convert(Request(sd1, tmp_path / name, force=True))

    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_killed_run_is_taken_over_and_a_strangers_folder_is_not(
    sd1: Path, tmp_path: Path
) -> None:
    part = tmp_path / "folder.part"
    (part / "unet").mkdir(parents=True)
    (part / "unet" / "half.part").write_text("half")

    with pytest.raises(OutputError, match="is in the way"):
        convert(Request(sd1, tmp_path / "folder"))
    assert (part / "unet" / "half.part").exists()
    (part / ".ckptools-lock").touch()
    (part / "loose").touch()
    convert(Request(sd1, tmp_path / "folder"))

    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert not list((tmp_path / "folder").rglob("*half*"))


def test_a_process_killed_while_a_folder_is_replaced_loses_nothing(
    sd1: Path, tmp_path: Path
) -> None:
    """The old folder is put aside then, and the new one is taken over by the next run."""
    folder = tmp_path / "folder"
    convert(Request(sd1, folder))
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from ckptools.cli import run\n"
        "genuine = Path.replace\n"
        "def killed(self, target):\n"
        "    genuine(self, target)\n"
        "    if target.name == 'folder.old':\n"
        "        os._exit(9)\n"
        "Path.replace = killed\n"
        "run(['convert', sys.argv[1], sys.argv[2], '-f', '-q'])\n"
    )
    words = [sys.executable, "-c", script, str(sd1), str(folder)]
    assert subprocess.run(words, check=False).returncode == 9
    assert {path.name for path in tmp_path.iterdir()} == {"folder.old", "folder.part"}

    convert(Request(sd1, folder))

    assert {path.name for path in tmp_path.iterdir()} == {"folder.old", "folder"}
    assert not [*folder.rglob(".ckptools-lock")]


@pytest.mark.parametrize("name", ["LICENSE", "mine/notes.txt"])
def test_a_folder_with_somebodys_own_files_is_not_replaced(
    name: str, sd1: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    convert(Request(sd1, folder))
    convert(Request(sd1, folder, force=True))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")

    with pytest.raises(OutputError, match="is not replaced: no conversion wrote") as caught:
        convert(Request(sd1, folder, force=True))
    assert name in caught.value.what
    assert (folder / name).read_text() == "mine"


def test_a_folder_that_another_process_writes_is_left_alone(sd1: Path, tmp_path: Path) -> None:
    with writer.PartFolder(tmp_path / "folder"):
        with pytest.raises(OutputError, match="another process is writing"):
            convert(Request(sd1, tmp_path / "folder"))
        assert (tmp_path / "folder.part").is_dir()


# --- the command line --------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_written(
    sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(sd1), str(tmp_path / "folder"), "--dry-run", "--dtype", "unet=fp16"]

    assert run([*words, "--json"]) == 0
    document = json_of(capsys)
    assert run(words) == 0
    text = capsys.readouterr().out

    assert document["dry_run"] is True
    assert (document["family"], document["to"]) == ("sd1", "diffusers")
    assert document["tensors"] == {"copied": 445, "cast": 686, "dropped": 0}
    assert SIDE_FILE in [file["path"] for file in document["files"]]
    assert "would write" in text
    assert "unet/diffusion_pytorch_model.safetensors  686 tensors" in text
    assert list(tmp_path.iterdir()) == []


def test_a_component_that_stands_alone_is_not_looked_for_in_itself(
    sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = str(tmp_path / "vae.safetensors")
    assert run(["convert", str(sd1), vae, "--component", "vae", "-q"]) == 0

    assert run(["convert", vae, str(tmp_path / "x.safetensors"), "--component", "vae"]) == 2
    assert "--component: 'vae.safetensors' is a VAE alone" in capsys.readouterr().err
    assert run(["convert", vae, str(tmp_path / "folder")]) == 2
    assert "no diffusers folder can be made of this: it is a VAE" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["out.safetensors", "folder"])
@pytest.mark.parametrize("options", [[], ["--shard-size", "1MB"]])
def test_sizes_are_those_of_the_files(
    sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, options: list[str]
) -> None:
    (tmp_path / "out").mkdir()
    words = ["convert", str(sd1), str(tmp_path / "out" / output), "--json", *options]
    assert run([*words, "--dry-run"]) == 0
    planned = json_of(capsys)
    assert run(words) == 0
    done = json_of(capsys)

    root = tmp_path / "out" / ("" if output.endswith(".safetensors") else output)
    sizes = {
        path.relative_to(root).as_posix(): path.stat().st_size
        for path in root.rglob("*")
        if path.is_file()
    }
    assert planned["output_bytes"] == done["output_bytes"] == sum(sizes.values())
    assert done["written"] == sizes
    assert all(file["bytes"] == sizes[file["path"]] for file in planned["files"])


def test_the_report_names_what_was_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.safetensors"
    assert (
        run(["convert", str(trained), str(output), "--prune", "--json", "--shard-size", "0"]) == 0
    )
    document = json_of(capsys)
    assert (
        run(["convert", str(output), str(tmp_path / "b.safetensors"), "--shard-size", "1GB"]) == 0
    )
    text = capsys.readouterr().out
    assert run(["convert", str(trained), str(output), "--prune", "--force", "-q"]) == 0

    assert document["written"] == {"out.safetensors": output.stat().st_size}
    assert document["tensors"]["dropped"] == 691
    assert "0 left out" in text
    assert capsys.readouterr().out == ""


def test_a_stale_manifest_goes_with_the_file_it_was_of(sd1: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    convert(Request(sd1, output))
    manifest = tmp_path / "out.safetensors.ckptools.json"
    manifest.write_text("{}")
    convert(Request(sd1, output, force=True))

    assert not manifest.exists()


def test_what_is_no_manifest_is_left_alone(sd1: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    manifest = tmp_path / "out.safetensors.ckptools.json"
    manifest.write_text("mine")
    with pytest.raises(OutputError, match="is in the way, and no manifest"):
        convert(Request(sd1, output))

    assert manifest.read_text() == "mine"
    manifest.unlink()
    manifest.mkdir()
    with pytest.raises(OutputError, match="is in the way, and no manifest"):
        convert(Request(sd1, output, force=True))

    assert not output.exists()


def test_an_input_where_the_output_lies_meanwhile_is_left_alone(sd1: Path, tmp_path: Path) -> None:
    source = tmp_path / "out.safetensors.part"
    source.write_bytes(sd1.read_bytes())
    with pytest.raises(OutputError, match="is, or holds, the input"):
        convert(Request(source, tmp_path / "out.safetensors"))

    assert source.read_bytes() == sd1.read_bytes()


def test_a_vae_in_a_refiner_needs_settings_from_elsewhere(tmp_path: Path) -> None:
    source = write_model(tmp_path / "A.safetensors", shrunk("sdxl-refiner", 64), seed=9)

    with planned(Request(source, tmp_path / "folder")) as conversion:
        assert any("--config" in note for note in conversion.notes)
        assert "model_index.json" not in conversion.settings


def test_two_spellings_of_a_tensor_are_both_kept(sd1: Path, tmp_path: Path) -> None:
    """NovelAI's name of a tensor beside the usual one."""
    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    tensors = load_file(sd1)
    other = name.replace("text_model.", "")
    tensors[other] = tensors[name] + 1
    source = write_tensors(tmp_path / "A.safetensors", tensors)

    convert(Request(source, tmp_path / "folder"))
    convert(Request(tmp_path / "folder", tmp_path / "B.safetensors"))

    assert other in load_file(tmp_path / "folder" / SIDE_FILE)
    assert_same(load_file(tmp_path / "B.safetensors"), tensors)


def test_public_sd2_gets_clips_words(tmp_path: Path) -> None:
    """Many words, narrow widths: the tokenizer is CLIP's wherever there are as many words."""
    specs = shrunk("sd2", 64)
    name = "cond_stage_model.model.token_embedding.weight"
    specs[name] = TensorSpec(name, "F16", (49408, specs[name].shape[1]))
    source = write_model(tmp_path / "A.safetensors", specs, seed=10)

    convert(Request(source, tmp_path / "folder"))
    folder = tmp_path / "folder" / "tokenizer"

    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert (len(vocabulary), vocabulary["<|endoftext|>"], vocabulary["photo</w>"]) == (
        49408, 49407, 1125,
    )  # fmt: skip
    assert json.loads((folder / "special_tokens_map.json").read_text())["pad_token"] == "!"


# --- pickles -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A pickle whose fused projections lie in memory column by column."""
    values = model_values(shrunk("sdxl", 64), seed=11)
    stored = {
        name: tensor.T.contiguous().T if "attn.in_proj_weight" in name else tensor
        for name, tensor in values.items()
    }
    path = tmp_path_factory.mktemp("sdxl") / "A.ckpt"
    torch.save({"state_dict": stored, "global_step": 5}, path)
    return path, values


def test_a_pickle_becomes_a_file_and_a_folder(sdxl: tuple[Path, Tensors], tmp_path: Path) -> None:
    source, values = sdxl
    convert(Request(source, tmp_path / "A.safetensors"))
    convert(Request(source, tmp_path / "folder"))
    convert(Request(tmp_path / "folder", tmp_path / "B.safetensors"))

    assert_same(load_file(tmp_path / "A.safetensors"), values)
    assert_same(load_file(tmp_path / "B.safetensors"), values)


def test_a_folder_of_pickles_becomes_a_file(sdxl: tuple[Path, Tensors], tmp_path: Path) -> None:
    source, values = sdxl
    folder = tmp_path / "folder"
    convert(Request(source, folder))
    for path in list(folder.glob("*/*.safetensors")):
        stem = "pytorch_model" if path.stem == "model" else path.stem
        torch.save(load_file(path), path.with_name(f"{stem}.bin"))
        path.unlink()

    convert(Request(folder, tmp_path / "B.safetensors"))

    assert_same(load_file(tmp_path / "B.safetensors"), values)


def test_the_terminal_hears_of_warnings_and_of_what_is_left_out(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(trained), str(tmp_path / "folder"), "--prune"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert run(["convert", str(tmp_path / "folder"), str(tmp_path / "B.safetensors")]) == 0

    assert "left out, EMA weights: 688 tensors (model_ema." in text
    assert "warning: vae has no weights" in capsys.readouterr().err
