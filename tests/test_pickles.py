"""Pickles that `torch.save` writes, against what `torch.load` reads; as inputs of a merge."""

from __future__ import annotations

import argparse
import collections
import io
import json
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path, PosixPath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ckptools.checkpoint import Checkpoint
from ckptools.cli import run
from ckptools.errors import InvalidFileError, UnsafeError
from ckptools.family import detect
from ckptools.pickles import is_pickle, open_pickle
from ckptools.sources import open_checkpoint
from ckptools.tensors import DTYPES

FORMATS = {"zip": True, "legacy": False}
DTYPE_NAMES = [
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0",
    "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64",
]  # fmt: skip


# torch writes them in the legacy format and fails to read them there (2.13).
TORCH_CANNOT = {name for name in DTYPE_NAMES if name.startswith("F8")} | {"U16", "U32", "U64"}


def save(path: Path, value: object, form: str = "zip", **options: object) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=FORMATS[form], **options)
    return path


def bits(tensor: Tensor) -> bytes:
    """A tensor's elements in order, as bytes."""
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def of_dtype(name: str, count: int, seed: int = 0) -> Tensor:
    """Elements of any bits (BOOL: of 0 and 1)."""
    row = DTYPES[name]
    raw = np.random.default_rng(seed).integers(0, 256, count * row.bits // 8, np.uint8)
    if name == "BOOL":
        raw &= 1
    found = torch.from_numpy(raw).view(getattr(torch, row.torch_name))
    assert isinstance(found, Tensor)
    return found


def assert_same(checkpoint: Checkpoint, expected: dict[str, Tensor]) -> None:
    assert set(checkpoint) == set(expected)
    for name, tensor in expected.items():
        spec = checkpoint[name]
        assert spec.shape == tuple(tensor.shape), name
        assert DTYPES[spec.dtype].torch_name == str(tensor.dtype).removeprefix("torch."), name
        assert checkpoint.read(name) == bits(tensor), name


def loaded(path: Path) -> dict[str, Tensor]:
    found = torch.load(path, weights_only=True)
    assert isinstance(found, dict)
    return dict(found)


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_every_dtype_is_read_to_the_bit(tmp_path: Path, dtype: str, form: str) -> None:
    tensors = {"a": of_dtype(dtype, 12).reshape(3, 4)}
    path = save(tmp_path / "m.ckpt", tensors, form)
    if form == "zip" or dtype not in TORCH_CANNOT:
        assert bits(loaded(path)["a"]) == bits(tensors["a"])

    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, tensors)
        assert checkpoint.warnings == ()


def test_the_dtypes_of_both_formats_are_all_tried() -> None:
    assert {row.name for row in DTYPES.values() if row.torch_name} == set(DTYPE_NAMES)


def views() -> dict[str, Tensor]:
    whole = torch.arange(120, dtype=torch.float16).reshape(2, 3, 4, 5)
    return {
        "whole": whole,
        "transposed": whole.transpose(0, 3),
        "permuted": whole.permute(2, 0, 3, 1),
        "every second": whole[..., ::2],
        "middle": whole[1, 1:, 2:3],
        "column": whole[:, :, :, 3],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 7),
        "one value repeated": torch.tensor(3.0).expand(4, 5),
        "channels last": whole.contiguous(memory_format=torch.channels_last),
        "diagonal": torch.arange(25).reshape(5, 5).diagonal(),
        "windows": torch.arange(9).unfold(0, 4, 1),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "scalar inside": whole[1, 2, 3, 4],
        "empty": torch.empty(0),
        "empty, with sizes": torch.empty(4, 0, 3, dtype=torch.bfloat16),
        "empty part": whole[:, 3:],
        "parameter": nn.Parameter(torch.ones(3)),
        "with gradient": torch.ones(2, requires_grad=True),
    }


@pytest.mark.parametrize("form", FORMATS)
def test_views_are_read_to_the_bit_in_any_pieces(tmp_path: Path, form: str) -> None:
    path = save(tmp_path / "m.pt", views(), form)
    expected = loaded(path)

    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, expected)
        for name, spec in checkpoint.items():
            step = 3 * DTYPES[spec.dtype].bits // 8
            pieces = []
            for start in range(0, spec.nbytes, step):
                piece = bytearray(min(step, spec.nbytes - start))
                checkpoint.read_into(name, memoryview(piece), start)
                pieces.append(bytes(piece))
            assert b"".join(pieces) == bits(expected[name]), name


def test_a_view_in_order_is_one_run_of_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"a": torch.arange(24).reshape(1, 4, 1, 6)[:, 1:3]})

    with open_checkpoint(path) as checkpoint:
        (extent,) = checkpoint.extents("a")

    assert extent.strides == ()
    raw = path.read_bytes()[extent.start : extent.start + extent.nbytes]
    assert raw == bits(torch.arange(6, 18))


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors that are views of one to three storages."""
    result: dict[str, Tensor] = {}
    for number in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(DTYPE_NAMES))
        storage = of_dtype(dtype, draw(st.integers(1, 60)), seed=draw(st.integers(0, 99)))
        for _ in range(draw(st.integers(1, 3))):
            shape = draw(st.lists(st.integers(0, 4), max_size=4))
            strides = [draw(st.integers(0, 5)) for _ in shape]
            reach = sum((max(n, 1) - 1) * s for n, s in zip(shape, strides, strict=True))
            if reach < storage.numel():
                offset = draw(st.integers(0, storage.numel() - 1 - reach))
                name = draw(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8))
                result[f"{number}{name}"] = storage.as_strided(shape, strides, offset)
    return result or {"a": torch.zeros(1)}


@given(state_dicts(), st.sampled_from(sorted(FORMATS)), st.sampled_from([2, 3, 4, 5]))
def test_any_views_of_any_storages_are_read_as_torch_reads_them(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], form: str, protocol: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pt"
    save(path, tensors, form, pickle_protocol=protocol)

    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, tensors)


def test_what_shares_values_is_listed_and_read_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    tensors = {
        "tied": whole, "tied.too": whole, "half": whole[:6], "q": torch.ones(6)[:3],
        "k": (fused := torch.arange(6.0))[:3], "v": fused[3:],
    }  # fmt: skip
    path = save(tmp_path / "m.ckpt", tensors)

    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, tensors)
        (warning,) = checkpoint.warnings

    assert warning == "stored once, read as tensors of their own: 'half', 'tied', 'tied.too'"


def test_many_shared_groups_are_counted(tmp_path: Path) -> None:
    ones = [torch.full((2,), float(number)) for number in range(9)]
    tensors = {f"{number}{side}": one for number, one in enumerate(ones) for side in "ab"}
    path = save(tmp_path / "m.ckpt", tensors)

    with open_checkpoint(path) as checkpoint:
        (warning,) = checkpoint.warnings

    assert "'0a', '0b'; '1a', '1b'" in warning
    assert warning.endswith("and 5 more groups")


# --- whose files --------------------------------------------------------------------------------


def lightning_file(path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A training checkpoint as pytorch-lightning writes it; its weights."""
    module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    value = {
        "epoch": 3,
        "global_step": np.int64(470000),
        "pytorch-lightning_version": "1.4.2",
        "state_dict": layer.state_dict(),
        "loops": None,
        "callbacks": {callback: {"best_model_score": np.float64(0.5), "path": "x"}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 3}],
        "hyper_parameters": {
            "lr": 1e-4, "big": -(2**70), "bytes": b"\xff\0", "set": {1}, "frozen": frozenset({2}),
            "args": argparse.Namespace(lr=1e-4), "device": torch.device("cpu"), "type": int,
            "size": torch.Size([1, 2]), "dtype": torch.float16, "path": PosixPath("a/b"),
            "many": collections.defaultdict(int, a=1),
        },
    }  # fmt: skip
    save(path, value, form)
    return {name: tensor.detach() for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("form", FORMATS)
def test_a_training_checkpoint_gives_its_weights_and_says_what_it_leaves(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.ckpt"
    expected = lightning_file(path, form, monkeypatch)

    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, expected)
        assert checkpoint.metadata == {"epoch": "3", "global_step": "470000"}
        (warning,) = checkpoint.warnings

    assert warning.startswith("left out, beside the weights: 'pytorch-lightning_version', 'loops'")
    assert warning.endswith("'callbacks', 'optimizer_states' and 2 more")


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({"params": {"a": 1}, "params_ema": {"a": 2}}, {"a"}),
        ({"model": {"a": 1, "b": 2}, "optimizer": {"state": {0: {"exp": 1}}}}, {"a", "b"}),
        ({"state_dict": {"a": 1}, "loss": 1}, {"a"}),
        ({"unet": {"a": 1}, "vae": {"b": [1, {"c": 1}]}}, {"unet.a", "vae.b.0", "vae.b.1.c"}),
        ({"a": 1, "model": {"b": 1}}, {"a", "model.b"}),
        ({"state_dict": None, "a": 1}, {"a"}),
        ({"state_dict": {"version": "1"}, "a": 1}, {"a"}),
        ({"unet": {"a": 1}, "optimizer": {"b": 1}}, {"unet.a"}),
    ],
)  # fmt: skip
def test_weights_are_found_wherever_they_stand(
    tmp_path: Path, value: dict[str, object], names: set[str]
) -> None:
    def filled(item: object) -> object:
        """Every number a tensor."""
        if isinstance(item, dict):
            return {key: filled(child) for key, child in item.items()}
        if isinstance(item, list):
            return [filled(child) for child in item]
        return torch.full((2,), float(item)) if isinstance(item, int) else item

    path = save(tmp_path / "m.pt", filled(value))

    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint) == names
        if "params_ema" in value:
            assert checkpoint.read("a") == bits(torch.full((2,), 2.0))
            assert checkpoint.warnings == ("left out, beside the weights: 'params'",)


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    value = {
        "a": torch.ones(1), "n": 5, "t": "x", "none": None, ("k", 1): 2.0, "f": True,
        "c": collections.OrderedDict(), "dt": torch.float16,
    }  # fmt: skip
    path = save(tmp_path / "m.pt", value)

    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == ["a"]
        (warning,) = checkpoint.warnings

    assert warning == (
        "left out, for they are no tensors: 'n (int)', 't (str)', 'none (nothing)', "
        "'<a tuple> (float)' and 2 more"
    )


@pytest.mark.parametrize(("width", "variant"), [(768, "sd1"), (1024, "sd2")])
@pytest.mark.parametrize("holder", [dict, nn.ParameterDict])
@pytest.mark.parametrize("form", FORMATS)
def test_an_embedding_of_the_web_ui_is_recognised(
    tmp_path: Path, form: str, holder: Callable[..., object], width: int, variant: str
) -> None:
    vectors = nn.Parameter(torch.randn(2, width))
    value = {
        "string_to_token": {"*": 265}, "string_to_param": holder({"*": vectors}), "name": "sketch",
        "step": 500, "sd_checkpoint": "7460a6fa", "sd_checkpoint_name": None,
    }  # fmt: skip
    path = save(tmp_path / "sketch.pt", value, form)

    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, {"string_to_param.*": vectors})
        assert checkpoint.metadata == {
            "name": "sketch", "step": "500", "sd_checkpoint": "7460a6fa"
        }  # fmt: skip
        found = detect(checkpoint, checkpoint.metadata)

    assert (found.kind, found.layout, found.variant) == ("embedding", "a1111", variant)


def test_a_concept_of_diffusers_is_recognised(tmp_path: Path) -> None:
    path = save(tmp_path / "learned_embeds.bin", {"<cat-toy>": torch.randn(768)})

    with open_checkpoint(path) as checkpoint:
        assert detect(checkpoint, checkpoint.metadata).kind == "embedding"


def test_a_hypernetwork_has_the_widths_in_its_names(tmp_path: Path) -> None:
    layers = (nn.Linear(4, 8).state_dict(), nn.Linear(8, 4).state_dict())
    path = save(tmp_path / "h.pt", {768: layers, "step": 20, "name": "h", "layer_norm": False})

    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint) == {
            f"768.{number}.{name}" for number in range(2) for name in ("weight", "bias")
        }
        assert checkpoint.metadata == {"step": "20", "name": "h"}


def test_tensors_with_attributes_and_buffers_are_tensors(tmp_path: Path) -> None:
    marked = torch.arange(3.0)
    marked.note = "x"  # type: ignore[attr-defined]
    parameter = nn.Parameter(torch.arange(4.0))
    parameter.note = "y"  # type: ignore[attr-defined]
    path = save(tmp_path / "m.pt", {"a": marked, "b": parameter, "c": nn.Buffer(torch.ones(2))})

    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, torch.load(path, weights_only=False))


def test_the_oldest_opcodes_are_read(tmp_path: Path) -> None:
    """Protocol 1: numbers and flags as text."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "step": 2**40}
    path = save(tmp_path / "m.pt", tensors, "zip", pickle_protocol=1)
    with zipfile.ZipFile(path) as archive:
        codes = {code.name for code, _, _ in pickletools.genops(archive.read("m/data.pkl"))}
    assert {"INT", "LONG", "GLOBAL"} <= codes

    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, {"a": tensors["a"]})
        assert checkpoint.metadata == {"step": str(2**40)}


def repacked(
    path: Path, target: Path, edits: dict[str, bytes] | None = None, **options: int
) -> Path:
    """The archive written again by another library, some members changed."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            inner = name.partition("/")[2]
            with new.open(name, "w", force_zip64=inner.startswith("data/")) as member:
                member.write((edits or {}).get(inner, old.read(name)))
    return target


def test_an_archive_packed_by_another_tool_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"a": torch.arange(6)})

    with open_checkpoint(repacked(path, tmp_path / "n.pt")) as checkpoint:
        assert_same(checkpoint, loaded(path))


def test_large_archives_have_their_places_in_the_extra_field(tmp_path: Path) -> None:
    """As zip64 stores what lies beyond 4 GiB; told from the same file with small numbers."""
    path = save(tmp_path / "m.pt", {"a": torch.arange(6)})
    raw = path.read_bytes()
    directory = raw.rindex(b"PK\x06\x06")
    start = raw.index(b"PK\x01\x02")
    entries, grown = raw[start:directory], b""
    while entries:
        fields = list(struct.unpack_from("<4s6H3I5H2I", entries))
        end = 46 + fields[10] + fields[11] + fields[12]
        name = entries[46 : 46 + fields[10]]
        wide = struct.pack("<2HB2H3Q", 7, 1, 0, 1, 24, fields[9], fields[8], fields[16])
        fields[8] = fields[9] = fields[16] = 2**32 - 1
        fields[11], fields[12] = len(wide), 0
        grown += struct.pack("<4s6H3I5H2I", *fields) + name + wide
        entries = entries[end:]
    count = raw[-14:-12]
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0,
                         *[int.from_bytes(count, "little")] * 2, len(grown), start)  # fmt: skip
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(grown), 1)
    tail = b"PK\x05\x06" + bytes(4) + b"\xff" * 12 + bytes(2)
    wide_path = tmp_path / "wide.pt"
    wide_path.write_bytes(raw[:start] + grown + record + locator + tail)
    assert torch.equal(loaded(wide_path)["a"], torch.arange(6))

    with open_checkpoint(wide_path) as checkpoint:
        assert_same(checkpoint, loaded(path))


class PartOfStorage(pickle.Pickler):
    """Writes the legacy format's parts of storages, as torch before 0.4 did."""

    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, str) and obj.startswith("part:"):
            return ("storage", torch.FloatStorage, "7", "cpu", 8, ("9", 2, 4))
        return None


class Rebuilt:
    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return torch._utils._rebuild_tensor, ("part:", 1, (3,), (1,))


def test_parts_of_storages_in_old_files_are_read(tmp_path: Path) -> None:
    stream = io.BytesIO()
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    for value in (0x1950A86A20F9469CFC6C, 1001, system):
        pickle.dump(value, stream, protocol=2)
    PartOfStorage(stream, protocol=2).dump({"a": Rebuilt()})
    pickle.dump(["7"], stream, protocol=2)
    stream.write((8).to_bytes(8, "little") + bits(torch.arange(8.0)))
    path = tmp_path / "m.pt"
    path.write_bytes(stream.getvalue())
    assert torch.equal(torch.load(path, weights_only=False)["a"], torch.tensor([3.0, 4.0, 5.0]))

    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, {"a": torch.tensor([3.0, 4.0, 5.0])})


def test_strings_of_python_2_are_read(tmp_path: Path) -> None:
    """U and T opcodes, and unused storages are told."""
    path = save(tmp_path / "m.pt", {"abc": torch.arange(4)})
    with zipfile.ZipFile(path) as archive:
        code = archive.read("m/data.pkl")
    old = code.replace(b"X\x03\0\0\0abc", b"U\x03abc")
    old = old.replace(b"X\x05\0\0\0cpu", b"T\x03\0\0\0cpu")
    assert old != code

    with open_checkpoint(repacked(path, tmp_path / "n.pt", {"data.pkl": old})) as checkpoint:
        assert_same(checkpoint, {"abc": torch.arange(4)})


def test_storages_that_nothing_uses_are_told(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"a": torch.arange(4)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/data/5", bytes(100))

    with open_checkpoint(path) as checkpoint:
        assert checkpoint.warnings == ("100 bytes of the file belong to no tensor",)


# --- numpy's scalars -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"),
    [(np.int64(-5), "-5"), (np.int32(7), "7"), (np.float64(0.25), "0.25"), (np.uint8(3), "3"),
     (np.bool_(True), "True"), (np.float32(0.5), "0.5"), (np.complex64(1), ""),
     (np.array([5], ">i8")[0], "5"), (np.str_("x"), "")],
)  # fmt: skip
@pytest.mark.parametrize("protocol", [2, 4])
def test_steps_may_be_scalars_of_numpy(
    tmp_path: Path, number: np.generic, text: str, protocol: int
) -> None:
    value = {"a": torch.ones(1), "global_step": number}
    path = save(tmp_path / "m.pt", value, pickle_protocol=protocol)

    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata.get("global_step", "") == text


# --- refused, with the reason ---------------------------------------------------------------------


def sparse() -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2), (4,))


def quantised() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "quantised": (lambda: {"a": quantised()}, "'a' is a quantised tensor"),
    "sparse": (lambda: {"a": {"b": sparse()}}, "'a.b' is a sparse tensor"),
    "meta": (lambda: {"a": torch.empty(2, device="meta")}, "'a' is a tensor without values"),
    "conjugated": (lambda: {"a": torch.ones(2, dtype=torch.complex64).conj()}, "conjugated"),
    "complex128": (lambda: {"a": torch.ones(2, dtype=torch.complex128)}, "'a' is of complex128"),
    "a list": (lambda: [torch.ones(2)], "holds a list, not a dict"),
    "a tensor": (lambda: torch.ones(2), "holds a tensor, not a dict"),
    "no tensors": (lambda: {"a": 1}, "holds no tensors"),
    "twice the same name": (
        lambda: {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "'a.b' is there twice"),
    "a number and a text": (lambda: {1: torch.ones(1), "1": torch.ones(1)}, "'1' is there twice"),
    "a long name": (lambda: {"a" * 2000: torch.ones(1)}, "longer than 1024"),
    "a lone surrogate": (lambda: {"\ud800": torch.ones(1)}, "lone surrogate"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning", "ignore:.*sparse.*:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_no_list_of_plain_tensors_is_refused(tmp_path: Path, name: str, form: str) -> None:
    make, words = REFUSED[name]
    path = save(tmp_path / "m.pt", make(), form)

    with pytest.raises(InvalidFileError, match=words) as caught:
        open_checkpoint(path)

    assert caught.value.where == str(path)
    assert caught.value.fix


def test_unread_tensors_beside_the_weights_do_not_matter(tmp_path: Path) -> None:
    value = {"state_dict": {"a": torch.ones(2)}, "moments": torch.ones(2, dtype=torch.complex128)}

    with open_checkpoint(save(tmp_path / "m.pt", value)) as checkpoint:
        assert list(checkpoint) == ["a"]
        assert checkpoint.warnings == ("left out, beside the weights: 'moments'",)


def test_a_whole_module_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", nn.Linear(2, 2))

    with pytest.raises(UnsafeError, match=r"names 'torch.nn.modules.linear.Linear'"):
        open_checkpoint(path)


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, form: str) -> None:
    raw = save(tmp_path / "m.pt", {"a": torch.ones(3), "b": torch.ones(2)}, form).read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(4, len(raw), 7 if form == "zip" else 1):
        path.write_bytes(raw[:length])
        with pytest.raises(InvalidFileError):
            open_pickle(path)


@pytest.mark.parametrize("form", FORMATS)
def test_bytes_after_the_end_are_refused(tmp_path: Path, form: str) -> None:
    path = save(tmp_path / "m.pt", {"a": torch.ones(3)}, form)
    path.write_bytes(path.read_bytes() + bytes(5))

    with pytest.raises(InvalidFileError, match=r"5 bytes follow|directory"):
        open_checkpoint(path)


# --- the door -----------------------------------------------------------------------------------


def test_the_bytes_decide_not_the_name(tmp_path: Path) -> None:
    pickled = save(tmp_path / "m.safetensors", {"a": torch.ones(2)})
    plain = tmp_path / "n.ckpt"
    header = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.ljust(0x280)
    plain.write_bytes(len(header).to_bytes(8, "little") + header)  # begins as a pickle does
    assert plain.read_bytes().startswith(b"\x80\x02")

    with open_checkpoint(pickled) as one, open_checkpoint(plain) as two:
        assert list(one) == list(two) == ["a"]


def test_what_is_no_file_is_no_pickle(tmp_path: Path) -> None:
    assert not is_pickle(tmp_path)
    assert not is_pickle(tmp_path / "none")
    assert not is_pickle(Path("a\0b"))


def test_a_header_identifies_names_and_shapes(tmp_path: Path) -> None:
    one, same, other = (
        open_checkpoint(save(tmp_path / f"{number}" / "m.pt", {"a": torch.ones(size)}))
        for number, size in enumerate((2, 2, 3))
        if (tmp_path / f"{number}").mkdir() is None
    )

    assert one.header_sha256 == same.header_sha256 != other.header_sha256
    assert one.file_bytes == one.path.stat().st_size
    for checkpoint in (one, same, other):
        checkpoint.close()


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"a": torch.ones(2)})
    with open_checkpoint(path) as checkpoint:
        checkpoint.check_unchanged()
        save(path, {"a": torch.ones(5)})
        with pytest.raises(Exception, match="changed while it was being read"):
            checkpoint.check_unchanged()


READER = """
import sys
from pathlib import Path, PosixPath
from ckptools.sources import open_checkpoint
with open_checkpoint(Path(sys.argv[1])) as checkpoint:
    print(len(checkpoint.read("a")))
heavy = {"torch", "numpy", "pickle", "pickletools", "zipfile"}
print(*sorted(heavy & sys.modules.keys()), file=sys.stderr)
"""


@pytest.mark.parametrize("form", FORMATS)
def test_reading_loads_neither_torch_nor_pickle(tmp_path: Path, form: str) -> None:
    path = save(tmp_path / "m.pt", {"a": torch.ones(2)}, form)
    done = subprocess.run(
        [sys.executable, "-S", "-c", READER, str(path)],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip

    assert done.stdout.split() == ["8"]
    assert done.stderr.split() == []


# --- in a merge -----------------------------------------------------------------------------------

RECIPE = """\
ckptools: 1
models: {{A: {a}, B: {b}}}
params: {{M: 0.3}}
merge: A + (B - A) * M
output: {{path: {out}, metadata: {{title: t}}}}
"""


def merged(folder: Path, a: Path, b: Path, out: str) -> Path:
    recipe = folder / f"{out}.yaml"
    recipe.write_text(RECIPE.format(a=a, b=b, out=f"{out}.safetensors"))
    assert run(["merge", str(recipe), "-q"]) == 0
    return folder / f"{out}.safetensors"


def test_pickles_merge_to_the_same_tensors_as_safetensors(
    tmp_path: Path, sd1_models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, _ = sd1_models
    state = {"state_dict": load_file(a), "global_step": 5, "optimizer_states": []}
    first = save(tmp_path / "A.ckpt", state)
    strided = {
        name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor
        for name, tensor in load_file(b).items()
    }
    second = save(tmp_path / "B.pt", strided, "legacy")

    usual = merged(tmp_path, a, b, "usual")
    pickled = merged(tmp_path, first, second, "pickled")

    one, two = load_file(usual), load_file(pickled)
    assert one.keys() == two.keys()
    assert all(bits(one[name]) == bits(two[name]) for name in one)
    (input_a, input_b) = json.loads(
        (tmp_path / "pickled.safetensors.ckptools.json").read_text(encoding="utf-8")
    )["inputs"]
    assert (input_a["file"], input_b["file"]) == ("A.ckpt", "B.pt")
    assert input_a["bytes"] == first.stat().st_size
    assert (input_a["family"], input_b["family"]) == ("sd1", "sd1")
    assert input_a["header_sha256"] != input_b["header_sha256"]
    with safe_open(pickled, framework="np") as opened:
        assert opened.metadata()["global_step"] == "5"
    assert "left out, beside the weights: 'optimizer_states'" in capsys.readouterr().err


def test_a_pickle_gives_the_same_bytes_as_its_safetensors(
    tmp_path: Path, sd1_models: tuple[Path, Path, Path]
) -> None:
    """Where names and metadata agree, so does every byte of the data and its hash."""
    a, b, _ = sd1_models
    first, second = (
        save(tmp_path / "A.ckpt", load_file(a)),
        save(tmp_path / "B.pt", load_file(b), "legacy"),
    )
    data = []
    for out, one, two in (("usual", a, b), ("pickled", first, second)):
        raw = merged(tmp_path, one, two, out).read_bytes()
        data.append(raw[8 + int.from_bytes(raw[:8], "little") :])

    assert data[0] == data[1]
