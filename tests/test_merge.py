"""Merges from recipe to file, against a plain load-everything-in-float64 one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from memory import bytes_of
from models import model_values, shrunk, with_channels, write_model, write_tensors
from oracle import NOTHING_COMPARED, Exactness, compare, decoded, weighted
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import ckptools.engine
import ckptools.evaluation
import ckptools.plain
from ckptools.errors import InputError, NonFiniteError, VerificationError
from ckptools.progress import Progress
from ckptools.recipe import Recipe, parse_recipe
from ckptools.tensors import DTYPES
from ckptools.workflow import MergeResult, merge
from ckptools.writer import PartFile

NAMES = {getattr(torch, row.torch_name): row.name for row in DTYPES.values() if row.torch_name}
Factors = Callable[[str], list[float]]


def recipe(folder: Path, formula: str, *, files: Mapping[str, str] | None = None, more: str = "",
           output: str = "path: out.safetensors") -> Recipe:  # fmt: skip
    """A recipe in a folder; its models are the files that the formula names."""
    files = files or {}
    names = sorted({*re.findall(r"\b[A-LN-Z]\b", formula), *files})  # M is a number
    lines = [f"  {name}: {files.get(name, name + '.safetensors')}" for name in names]
    text = "\n".join(
        ["ckptools: 1", "models:", *lines, f"merge: {formula}", f"output: {{{output}}}", more]
    )
    return parse_recipe(text, folder / "recipe.yaml")


def make(folder: Path, layout: str, *, dtypes: Mapping[str, str]) -> dict[str, Path]:
    """Shrunk files of a layout, one for each model name."""
    specs = shrunk(layout)
    return {
        name: write_model(folder / f"{name}.safetensors", specs, seed=seed, dtype=dtype)
        for seed, (name, dtype) in enumerate(dtypes.items(), 1)
    }


def compare_all(
    found: Mapping[str, Tensor], models: Mapping[str, Mapping[str, Tensor]], factors: Factors
) -> Exactness:
    """Every float tensor against the weighted sum in wide floats."""
    total = NOTHING_COMPARED
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            continue
        terms = [
            (factor, decoded(bytes_of(model[name]), NAMES[model[name].dtype]))
            for factor, model in zip(factors(name), models.values(), strict=True)
        ]
        dtype = NAMES[tensor.dtype]
        exact, largest = weighted(terms)
        total = total.joined(compare(decoded(bytes_of(tensor), dtype), exact, largest, dtype))
    return total


def data_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "formula", "factors", "dtype"),
    [
        ("sd1", "A * (1 - 0.3) + B * 0.3", [0.7, 0.3], "fp16"),
        ("sd1", "A + (B - C) * 0.7", [1, 0.7, -0.7], "fp16"),
        ("sd1", "A + (B - C) * 0.7", [1, 0.7, -0.7], "bf16"),
        ("sd1", "A + (B - C) * 0.7", [1, 0.7, -0.7], "fp32"),
        ("sd2", "n_average(A, B, C)", [1 / 3] * 3, "fp16"),
        ("sdxl", "weighted_sum(A, B, alpha=0.45)", [0.55, 0.45], "fp16"),
        ("sdxl-refiner", "A * 0.5 + B * 0.5", [0.5, 0.5], "bf16"),
    ],
)
def test_a_merge_is_the_plain_one_correctly_rounded(
    tmp_path: Path, layout: str, formula: str, factors: list[float], dtype: str
) -> None:
    files = make(tmp_path, layout, dtypes=dict.fromkeys("ABC"[: len(factors)], "F16"))

    result = merge(recipe(tmp_path, formula, output=f"path: out.safetensors, dtype: {dtype}"))
    found = load_file(result.output)
    models = {name: load_file(path) for name, path in files.items()}
    exactness = compare_all(found, models, lambda name: factors)

    assert list(found) == list(models["A"])
    assert exactness.count > 900_000
    assert exactness.share >= 0.999
    assert exactness.units < 0.75
    assert exactness.relative <= 2**-22
    floats = {NAMES[tensor.dtype] for tensor in found.values() if tensor.is_floating_point()}
    assert floats == {{"fp16": "F16", "bf16": "BF16", "fp32": "F32"}[dtype]}
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, models["A"][name])


def test_models_of_different_dtypes(tmp_path: Path) -> None:
    files = make(tmp_path, "sd1", dtypes={"A": "F16", "B": "F32", "C": "BF16"})

    result = merge(recipe(tmp_path, "A + (B - C) * 0.7"))
    models = {name: load_file(path) for name, path in files.items()}
    found = load_file(result.output)

    assert compare_all(found, models, lambda name: [1, 0.7, -0.7]).share >= 0.999
    assert {NAMES[t.dtype] for t in found.values()} == {"F16", "I64"}


def test_numbers_by_block_component_and_glob(tmp_path: Path) -> None:
    files = make(tmp_path, "sd1", dtypes={"A": "F16", "B": "F16"})
    params = 'params: {M: {default: 0.7, OUT03-OUT06: 0.3, vae: 0, "*attn2*": 0.9}}'

    def factors(name: str) -> list[float]:
        factor = 0.7
        if re.match(r"model\.diffusion_model\.output_blocks\.[3-6]\.", name):
            factor = 0.3
        if name.startswith("first_stage_model."):
            factor = 0.0
        if "attn2" in name:
            factor = 0.9
        return [1 - factor, factor]

    result = merge(recipe(tmp_path, "A * (1 - M) + B * M", more=params))
    models = {name: load_file(path) for name, path in files.items()}
    found = load_file(result.output)

    assert compare_all(found, models, factors).share >= 0.999
    vae = [name for name in found if name.startswith("first_stage_model.")]
    assert len(vae) == 248
    assert all(bytes_of(found[name]) == bytes_of(models["A"][name]) for name in vae)


@pytest.mark.parametrize(
    ("formula", "same_as"),
    [
        ("A * (1 - 0) + B * 0", "A"),
        ("weighted_sum(A, B, alpha=1)", "B"),
        ("A + (B - D) * 0.35", "A"),
        ("A + 0.3 * (D - B)", "A"),
        ("slerp(A, B, t=0)", "A"),
        ("ties(B, D, base=B)", "B"),
        ("dare(B, base=D, density=0.5)", "B"),
    ],
)
def test_formulas_that_change_nothing_give_the_same_data(
    tmp_path: Path, sd1_models: tuple[Path, Path, Path], formula: str, same_as: str
) -> None:
    """D is a copy of B. The data section is that of the file to the byte."""
    a, b, _ = sd1_models
    files = {"A": str(a), "B": str(b), "D": str(shutil.copy(b, tmp_path / "D.safetensors"))}

    result = merge(recipe(tmp_path, formula, files=files))

    assert data_of(result.output) == data_of(Path(files[same_as]))


@pytest.mark.parametrize("formula", ["A + (I - C)", "I + (A - C)", "(I - C) * 1.0 + A"])
def test_an_inpainting_model_at_any_operand_order(tmp_path: Path, formula: str) -> None:
    specs = shrunk("sd1")
    write_model(tmp_path / "A.safetensors", specs, seed=1)
    write_model(tmp_path / "C.safetensors", specs, seed=3)
    write_model(tmp_path / "I.safetensors", with_channels(specs, 9), seed=2)
    name = "model.diffusion_model.input_blocks.0.0.weight"

    found = load_file(merge(recipe(tmp_path, formula)).output)
    a, i, c = (load_file(tmp_path / f"{model}.safetensors")[name] for model in "AIC")
    terms = [(1, a), (1, i[:, :4]), (-1, c)]
    exact, largest = weighted([(f, t.double().numpy()) for f, t in terms])
    result = found[name]

    assert result.shape == i.shape
    assert torch.equal(result[:, 4:], i[:, 4:])
    assert compare(result[:, :4].double().numpy(), exact, largest, "F16").wrong == 0


def test_what_a_model_lacks_is_carried_and_integers_are_never_averaged(tmp_path: Path) -> None:
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    values = model_values(shrunk("sd1"), seed=1)
    drifted = torch.arange(77.0).reshape(1, 77)
    drifted[0, 76] = 75.9975
    extra = {
        "counter": torch.tensor([5]), "flags": torch.tensor([True, False]),
        "v_pred": torch.empty(0), "only.in.a": torch.randn(3).half(), "scalar": torch.tensor(2.5),
    }  # fmt: skip
    write_tensors(tmp_path / "A.safetensors", values | extra | {ids: drifted})
    b = model_values(shrunk("sd1"), seed=2) | extra | {"counter": torch.tensor([9])}
    del b["only.in.a"]
    write_tensors(tmp_path / "B.safetensors", b)

    found = load_file(merge(recipe(tmp_path, "A * 0.5 + B * 0.5")).output)

    assert torch.equal(found[ids], torch.arange(77).reshape(1, 77))
    assert found["counter"].tolist() == [5]
    assert found["flags"].tolist() == [True, False]
    assert found["v_pred"].shape == (0,)
    assert found["scalar"].item() == 2.5
    assert bytes_of(found["only.in.a"]) == bytes_of(extra["only.in.a"])


# --- the same bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize("formula", ["A + (B - C) * 0.7", "dare(A, B, base=C, density=0.4)"])
def test_threads_and_block_sizes_do_not_show_in_the_file(
    tmp_path: Path, sd1_models: tuple[Path, Path, Path], formula: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    files = {name: str(path) for name, path in zip("ABC", sd1_models, strict=True)}
    loaded = recipe(tmp_path, formula, files=files)
    first = merge(loaded, threads=1).output.read_bytes()

    monkeypatch.setattr(ckptools.engine, "ALONE_BYTES", -1)
    for threads in (1, 4):
        assert merge(loaded, threads=threads, force=True).output.read_bytes() == first
    monkeypatch.setattr(ckptools.evaluation, "BLOCK", 4999)
    monkeypatch.setattr(ckptools.engine, "SPAN_BYTES", 54_321)
    monkeypatch.setattr(ckptools.engine, "UNIT_BYTES", 200_000)
    assert merge(loaded, threads=3, force=True).output.read_bytes() == first


def test_the_hash_of_the_data_is_in_the_header_and_the_manifest(
    tmp_path: Path, sd1_models: tuple[Path, Path, Path]
) -> None:
    result = merge(recipe(tmp_path, "A", files={"A": str(sd1_models[0])}))
    wanted = hashlib.sha256(data_of(result.output)).hexdigest()
    manifest = json.loads(result.manifest.read_text("utf-8"))

    with safe_open(result.output, "pt") as opened:
        assert opened.metadata()["modelspec.hash_sha256"] == f"0x{wanted}"
    assert result.sha256_data == wanted
    assert manifest["outputs"][0]["sha256_data"] == wanted
    assert manifest["outputs"][0]["bytes"] == result.output.stat().st_size


# --- shards ------------------------------------------------------------------------------------


class Holder(torch.nn.Module):
    """Modules whose state dict has the given names."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            inside: torch.nn.Module = self
            for part in path:
                if not hasattr(inside, part):
                    inside.add_module(part, torch.nn.Module())
                inside = getattr(inside, part)
            inside.register_buffer(last, torch.zeros_like(tensor))


def test_shards_hold_the_tensors_of_the_single_file(
    tmp_path: Path, sd1_models: tuple[Path, Path, Path]
) -> None:
    """Read through the index by the official loader."""
    from huggingface_hub import load_torch_model

    files = {name: str(path) for name, path in zip("AB", sd1_models, strict=False)}
    single = merge(recipe(tmp_path, "A * 0.5 + B * 0.5", files=files))
    output = "path: many/model.safetensors, shard_size: 1MB"
    many = merge(recipe(tmp_path, "A * 0.5 + B * 0.5", files=files, output=output))
    wanted = load_file(single.output)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text("utf-8"))
    model = Holder(wanted)

    loaded = load_torch_model(model, tmp_path / "many", strict=True)

    assert many.output.name == "model.safetensors.index.json"
    assert len(set(index["weight_map"].values())) == 3
    assert set(index["weight_map"]) == set(wanted)
    assert index["metadata"]["total_size"] == sum(len(bytes_of(t)) for t in wanted.values())
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    for name, tensor in model.state_dict().items():
        assert bytes_of(tensor) == bytes_of(wanted[name])
    assert many.sha256_data == single.sha256_data
    for shard in set(index["weight_map"].values()):
        with safe_open(tmp_path / "many" / shard, "pt") as opened:
            assert opened.metadata()["modelspec.hash_sha256"] == f"0x{many.sha256_data}"
            assert all(index["weight_map"][name] == shard for name in opened.keys())  # noqa: SIM118


def test_sharded_inputs_are_read_as_one_model(
    tmp_path: Path, sd1_models: tuple[Path, Path, Path]
) -> None:
    from huggingface_hub import save_torch_state_dict

    a, b, _ = sd1_models
    (tmp_path / "A").mkdir()
    save_torch_state_dict(load_file(a), tmp_path / "A", max_shard_size="500KB")
    assert len(list((tmp_path / "A").glob("*.safetensors"))) > 2

    plain = merge(recipe(tmp_path, "A * 0.4 + B * 0.6", files={"A": str(a), "B": str(b)}))
    sharded = merge(
        recipe(
            tmp_path, "A * 0.4 + B * 0.6", output="path: other.safetensors",
            files={"A": "A/model.safetensors.index.json", "B": str(b)},
        )
    )  # fmt: skip

    assert data_of(sharded.output) == data_of(plain.output)


# --- whole and checked, or not at all ----------------------------------------------------------


def tiny_models(folder: Path) -> None:
    """Two models of five tensors, so that all of them are computed again."""
    for seed, name in enumerate("AB"):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"{n}": torch.randn(100 + n, 9, generator=generator).half() for n in range(5)}
        write_tensors(folder / f"{name}.safetensors", tensors)


@pytest.mark.parametrize("position", [0, 1, 4000, -1])
def test_one_wrong_bit_on_the_disk_is_found(
    tmp_path: Path, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models(tmp_path)
    write = PartFile.write

    def flipped(self: PartFile, data: bytes | memoryview, offset: int) -> None:
        data = bytearray(data)
        if offset:
            data[position] ^= 1
        write(self, bytes(data), offset)

    monkeypatch.setattr(PartFile, "write", flipped)

    with pytest.raises(VerificationError, match="differ from the computed ones"):
        merge(recipe(tmp_path, "A * 0.5 + B * 0.5"))
    assert left_in(tmp_path) == {"A.safetensors", "B.safetensors"}


def test_a_damaged_header_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_models(tmp_path)
    write = PartFile.write

    def damaged(self: PartFile, data: bytes | memoryview, offset: int) -> None:
        write(self, bytes(data).replace(b'"shape":[100,9]', b'"shape":[9,100]'), offset)

    monkeypatch.setattr(PartFile, "write", damaged)

    with pytest.raises(VerificationError, match=r"written as F16 \[9, 100\]"):
        merge(recipe(tmp_path, "A * 0.5 + B * 0.5"))
    assert left_in(tmp_path) == {"A.safetensors", "B.safetensors"}


def test_the_file_has_its_name_only_when_it_is_whole(
    tmp_path: Path, sd1_models: tuple[Path, Path, Path]
) -> None:
    seen: list[set[str]] = []

    class Watch(Progress):
        def advance(self, nbytes: int) -> None:
            seen.append(left_in(tmp_path))

    files = {"A": str(sd1_models[0]), "B": str(sd1_models[1])}
    merge(recipe(tmp_path, "A * 0.5 + B * 0.5", files=files), progress=Watch())

    assert seen
    assert all(names == {"out.safetensors.part"} for names in seen)
    assert left_in(tmp_path) == {"out.safetensors", "out.safetensors.ckptools.json"}


@pytest.mark.parametrize("failure", ["nan", "interrupt"])
def test_a_failed_merge_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, sd1_models: tuple[Path, Path, Path], failure: str
) -> None:
    class Interrupting(Progress):
        def advance(self, nbytes: int) -> None:
            if failure == "interrupt":
                raise KeyboardInterrupt

    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    bad = load_file(sd1_models[1])[name]
    bad.view(-1)[:3] = float("nan") if failure == "nan" else 0.0
    write_model(tmp_path / "B.safetensors", shrunk("sd1"), seed=2, edits={name: bad})
    (tmp_path / "out.safetensors").write_bytes(b"old")
    before = left_in(tmp_path)
    wanted = recipe(tmp_path, "A * 0.5 + B * 0.5", files={"A": str(sd1_models[0])})

    with pytest.raises((NonFiniteError, KeyboardInterrupt)) as caught:
        merge(wanted, force=True, progress=Interrupting())

    assert left_in(tmp_path) == before
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"
    if failure == "nan":
        assert isinstance(caught.value, NonFiniteError)
        assert caught.value.where == name
        assert caught.value.what.startswith("B has 3 NaN or Inf of ")


# --- pins --------------------------------------------------------------------------------------


def pinned(folder: Path, sha256: str) -> Recipe:
    return recipe(folder, "A", files={"A": f"{{path: A.safetensors, sha256: {sha256}}}"})


def test_the_right_pin_passes_and_is_recorded(tmp_path: Path) -> None:
    tiny_models(tmp_path)
    sha256 = hashlib.sha256((tmp_path / "A.safetensors").read_bytes()).hexdigest()

    result = merge(pinned(tmp_path, sha256))

    assert inputs_of(result) == {"A": sha256}


def test_a_wrong_pin_refuses_before_anything_is_written(tmp_path: Path) -> None:
    tiny_models(tmp_path)
    before = left_in(tmp_path)
    sha256 = hashlib.sha256((tmp_path / "A.safetensors").read_bytes()).hexdigest()

    with pytest.raises(InputError) as caught:
        merge(pinned(tmp_path, "ab" * 32))

    assert sha256 in caught.value.what
    assert "ab" * 32 in caught.value.what
    assert left_in(tmp_path) == before


@pytest.mark.parametrize("hash_inputs", [True, False])
def test_hash_inputs_records_every_input(tmp_path: Path, hash_inputs: bool) -> None:
    tiny_models(tmp_path)
    wanted: dict[str, str | None] = {
        name: hashlib.sha256((tmp_path / f"{name}.safetensors").read_bytes()).hexdigest()
        for name in "AB"
    }

    result = merge(recipe(tmp_path, "A * 0.5 + B * 0.5"), hash_inputs=hash_inputs)

    assert inputs_of(result) == (wanted if hash_inputs else dict.fromkeys("AB"))


def inputs_of(result: MergeResult) -> dict[str, str | None]:
    manifest = json.loads(result.manifest.read_text("utf-8"))
    return {row["name"]: row["sha256"] for row in manifest["inputs"]}


# --- memory ------------------------------------------------------------------------------------

_MEASURED_MERGE = """
import sys
from pathlib import Path
from ckptools.recipe import load_recipe
from ckptools.workflow import merge
print(merge(load_recipe(Path(sys.argv[1])), threads=2).peak_bytes)  # workers' memory as well
"""


def peak_bytes_of_merge(folder: Path, tensors: int) -> int:
    """Peak memory of a process that merges two models of so many tensors of half a megabyte."""
    folder.mkdir()
    noise = np.random.default_rng(0).standard_normal(512 * 512).astype(np.float16)
    for shift, name in enumerate("AB"):
        state = {
            f"{n}.weight": torch.from_numpy(np.roll(noise, n + shift)).view(512, 512)
            for n in range(tensors)
        }
        write_tensors(folder / f"{name}.safetensors", state)
    text = "ckptools: 1\nmodels: {A: A.safetensors, B: B.safetensors}\n"
    text += "merge: A * 0.3 + B * 0.7\noutput: {path: out.safetensors}\n"
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-c", _MEASURED_MERGE, str(folder / "recipe.yaml")],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert (folder / "out.safetensors").stat().st_size > tensors * 2**19
    shutil.rmtree(folder)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_models(tmp_path: Path) -> None:
    """8 MB a file against 130 MB a file; loading them would take 250 MB more."""
    small = peak_bytes_of_merge(tmp_path / "small", 16)
    large = peak_bytes_of_merge(tmp_path / "large", 250)

    assert small > 40_000_000
    assert large - small < 60_000_000
    assert large < 160_000_000
