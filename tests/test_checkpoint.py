"""Reading checkpoints: the strict header reader against the official one, shards, and reads."""

from __future__ import annotations

import json
import os
import re
import stat
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors
import torch
from models import model_values, shrunk, write_tensors
from safetensors.torch import save_file

from ckptools import checkpoint as checkpoint_module
from ckptools.checkpoint import (
    Checkpoint,
    Descriptor,
    Extent,
    Identity,
    SourceFile,
    Tensors,
    read_header,
)
from ckptools.cli import run
from ckptools.errors import InputError, InvalidFileError, UnsafeError
from ckptools.sources import open_checkpoint
from ckptools.tensors import TensorSpec

# --- what a path may be --------------------------------------------------------------------------


def test_a_missing_file_names_those_that_are_there(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors", "notes.txt"):
        (tmp_path / name).touch()

    with pytest.raises(InputError, match="no such file") as caught:
        open_checkpoint(tmp_path / "tow.safetensors")

    assert "one.safetensors, two.safetensors" in caught.value.fix
    assert "notes" not in caught.value.fix


@pytest.mark.parametrize("name", ["one.safetensor", "One.safetensors", "one"])
def test_a_file_of_another_ending_is_meant(name: str, tmp_path: Path) -> None:
    for there in ("one.safetensors", "two.safetensors"):
        (tmp_path / there).touch()

    with pytest.raises(InputError, match="no such file") as caught:
        open_checkpoint(tmp_path / name)

    assert caught.value.fix == "did you mean 'one.safetensors'?"


def test_a_web_address_is_no_path() -> None:
    with pytest.raises(InputError, match="no such file") as caught:
        open_checkpoint(Path("folder") / "https://example.org/one.safetensors")

    assert caught.value.fix.startswith("web addresses are not read")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file") as caught:
        open_checkpoint(tmp_path / "modles" / "a.safetensors")

    assert f"{str(tmp_path / 'modles')!r} does not exist either" in caught.value.fix


def test_a_file_where_a_folder_should_be_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(InputError, match="cannot be opened: Not a directory"):
        open_checkpoint(tmp_path / "file" / "a.safetensors")


def test_a_path_that_the_system_cannot_have_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened: embedded null byte"):
        open_checkpoint(tmp_path / "a\0b.safetensors")
    with pytest.raises(InputError, match="cannot be opened: File name too long"):
        open_checkpoint(tmp_path / ("a" * 300 + ".safetensors"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_file_that_may_not_be_read_is_an_input_error(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    path = write_tensors(folder / "a.safetensors", {"a": torch.zeros(1)})
    path.chmod(0)

    with pytest.raises(InputError, match="cannot be opened: Permission denied"):
        open_checkpoint(path)
    folder.chmod(0)
    with pytest.raises(InputError, match="cannot be opened: Permission denied"):
        open_checkpoint(path)
    folder.chmod(stat.S_IRWXU)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["a.safetensors", "a.safetensors.index.json"])
def test_a_named_pipe_is_refused_without_waiting_for_it(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)

    with pytest.raises(InputError, match="not a regular file"):
        open_checkpoint(tmp_path / name)


def test_a_folder_with_one_file_stands_for_it(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})

    with open_checkpoint(tmp_path) as opened:
        assert opened.path == path
        assert list(opened) == ["a"]


def test_a_folder_with_one_pickle_stands_for_it(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.ckpt")

    with open_checkpoint(tmp_path) as opened:
        assert opened.path == tmp_path / "a.ckpt"
        assert list(opened) == ["a"]


def test_a_folder_with_several_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tensors(tmp_path / f"{name}.safetensors", {"a": torch.zeros(2)})

    with pytest.raises(InputError, match="2 candidate files") as caught:
        open_checkpoint(tmp_path)

    assert caught.value.fix == "give one of them: a.safetensors, b.safetensors"


def test_folders_without_a_single_file_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder without models"):
        open_checkpoint(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="a diffusers folder"):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, match="not a regular file"):
        read_header(tmp_path)


# --- shards --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    folder: Path
    index: Path

    def write_index(self, weight_map: object, **more: object) -> None:
        self.index.write_text(json.dumps({"weight_map": weight_map, **more}))


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    """Two sound shards, 1.safetensors (a, b) and 2.safetensors (c), with their index."""
    write_tensors(tmp_path / "1.safetensors", {"a": torch.ones(3), "b": torch.ones(2).half()})
    write_tensors(tmp_path / "2.safetensors", {"c": torch.full((2, 2), 7.0)}, {"from": "two"})
    found = Shards(tmp_path, tmp_path / "m.safetensors.index.json")
    found.write_index(SOUND, metadata={"total_size": 32})
    return found


SOUND = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}


@pytest.mark.parametrize("by_folder", [True, False])
def test_shards_are_read_as_one_checkpoint(shards: Shards, *, by_folder: bool) -> None:
    with open_checkpoint(shards.folder if by_folder else shards.index) as opened:
        assert dict(opened) == {
            "a": TensorSpec("a", "F32", (3,)),
            "b": TensorSpec("b", "F16", (2,)),
            "c": TensorSpec("c", "F32", (2, 2)),
        }
        assert opened.read("a") == torch.ones(3).numpy().tobytes()
        assert opened.read("c") == torch.full((2, 2), 7.0).numpy().tobytes()
        assert opened.file_bytes == sum(
            (shards.folder / f"{number}.safetensors").stat().st_size for number in (1, 2)
        )
        assert opened.warnings == ()
        assert re.fullmatch("[0-9a-f]{64}", opened.header_sha256)
        assert opened.header_sha256 not in {file.header.sha256 for file in opened.files}


def test_the_text_entries_of_an_index_are_metadata(shards: Shards) -> None:
    shards.write_index(SOUND, metadata={"total_size": 32, "format": "pt"})

    with open_checkpoint(shards.index) as opened:
        assert dict(opened.metadata) == {"format": "pt"}


def test_a_wrong_total_size_is_a_warning(shards: Shards) -> None:
    shards.write_index(SOUND, metadata={"total_size": 31})

    with open_checkpoint(shards.index) as opened:
        assert opened.warnings == ("the index says 31 bytes, its shards hold 32",)


def test_a_missing_shard_is_named(shards: Shards) -> None:
    (shards.folder / "2.safetensors").unlink()

    with pytest.raises(InvalidFileError, match=r"a shard is not there: 2\.safe") as caught:
        open_checkpoint(shards.index)

    assert caught.value.where == str(shards.index)
    assert "in that folder: 1.safetensors" in caught.value.fix
    assert run(["verify", str(shards.index), "-q"]) == 1, "the model is not whole"

    (shards.folder / "1.safetensors").unlink()
    with pytest.raises(InvalidFileError, match=r"2 of its 2 shards are not there: 1\.safe.*, 2\."):
        open_checkpoint(shards.index)


def test_a_broken_shard_is_named(shards: Shards) -> None:
    path = shards.folder / "2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(InvalidFileError, match="truncated: 15 of 16") as caught:
        open_checkpoint(shards.index)

    assert caught.value.where == str(path)


def test_a_tensor_in_two_shards_is_refused(shards: Shards) -> None:
    write_tensors(shards.folder / "2.safetensors", {"a": torch.ones(3), "c": torch.ones(1)})

    with pytest.raises(InvalidFileError, match=r"'a' is in two shards, '1\S+ and '2\."):
        open_checkpoint(shards.index)


def test_a_tensor_that_the_index_does_not_list_is_refused(shards: Shards) -> None:
    shards.write_index({"a": "1.safetensors", "c": "2.safetensors"})

    with pytest.raises(InvalidFileError, match="'b' is in a shard but not in the index"):
        open_checkpoint(shards.index)


def test_a_tensor_in_another_shard_than_listed_is_refused(shards: Shards) -> None:
    shards.write_index(SOUND | {"b": "2.safetensors"})

    with pytest.raises(InvalidFileError, match=r"'b' should be in '2\S+ it is in '1\."):
        open_checkpoint(shards.index)


def test_a_listed_tensor_that_no_shard_has_is_refused(shards: Shards) -> None:
    shards.write_index(SOUND | {"d": "2.safetensors"})

    with pytest.raises(InvalidFileError, match=r"'d' should be in '2\S+ it is in none"):
        open_checkpoint(shards.index)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the index is not JSON"),
        (b"\xff{}", r"the index is not UTF-8 \(byte 0\)"),
        (b"[]", "the index is a JSON list"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "the index breaks the format: duplicate key"),
        (b"{}", "no `weight_map`"),
        (b'{"weight_map": {}}', "no `weight_map`"),
        (b'{"weight_map": ["a"]}', "no `weight_map`"),
        (b'{"weight_map": {"a": 1}}', "the shard of 'a' is 1, not a file name"),
        (b'{"weight_map": {"a": null}}', "the shard of 'a' is None"),
        (b'{"weight_map": {"a": ["x.safetensors"]}}', "the shard of 'a' is"),
        (b'{"weight_map": {"a": "\\ud800.safetensors"}}', "lone surrogate"),
        (b'{"metadata": {"k": "\\ud800"}, "weight_map": {"a": "1.safetensors"}}', "lone surrogate"),
        (b'{"weight_map": ' + b"[" * 100_000, "the index is nested too deeply"),
    ],
)
def test_a_broken_index_is_refused(shards: Shards, content: bytes, words: str) -> None:
    shards.index.write_bytes(content)

    with pytest.raises(InvalidFileError, match=words):
        open_checkpoint(shards.index)


def test_an_index_of_more_than_100_mb_is_not_read(shards: Shards) -> None:
    with shards.index.open("wb") as stream:
        stream.truncate(100_000_001)  # sparse: takes no room on the disk

    with pytest.raises(InvalidFileError, match="larger than 100 MB"):
        open_checkpoint(shards.index)


TRAVERSALS = [
    "../1.safetensors", "a/../../1.safetensors", "..", "/etc/passwd", "/tmp/x.safetensors",
    "//host/x.safetensors", "..\\1.safetensors", "C:\\x.safetensors", "C:x.safetensors",
    "C:/x.safetensors", "\\\\host\\share\\x.safetensors", "x.safetensors\0.txt", "", ".",
    "x.safetensors/..", "sub/../../../x.safetensors", "x.bin", "x.safetensors.py", "x.SAFETENSORS",
    "file:///x.safetensors", "https://host/x.safetensors", "x.safetensors\0",
    "x.safetensors:stream.safetensors", "./../x.safetensors", "sub/../1.safetensors",
    "~/../../x.safetensors", "x.pkl",
]  # fmt: skip


@pytest.mark.parametrize("shard", TRAVERSALS)
def test_an_index_that_leaves_its_folder_is_unsafe(shards: Shards, shard: str) -> None:
    inner = Shards(shards.folder / "model", shards.folder / "model" / "m.safetensors.index.json")
    inner.folder.mkdir()
    inner.write_index({"a": shard})

    with pytest.raises(UnsafeError, match="points outside its folder") as caught:
        open_checkpoint(inner.index)

    assert caught.value.exit_code == 3
    assert repr(shard) in caught.value.what


def test_a_shard_in_a_folder_below_is_read(shards: Shards) -> None:
    (shards.folder / "sub").mkdir()
    (shards.folder / "2.safetensors").rename(shards.folder / "sub" / "2.safetensors")
    shards.write_index(SOUND | {"c": "sub/2.safetensors"})

    with open_checkpoint(shards.index) as opened:
        assert len(opened) == 3


def linked(source: Path, target: Path) -> None:
    source.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.symlink_to(target)
    except OSError as exc:
        pytest.skip(f"symbolic links are not permitted: {exc}")


def test_a_link_out_of_the_folder_is_unsafe(shards: Shards, tmp_path: Path) -> None:
    inner = tmp_path / "model"
    linked(inner / "1.safetensors", shards.folder / "1.safetensors")
    index = Shards(inner, inner / "m.safetensors.index.json")
    index.write_index({"a": "1.safetensors", "b": "1.safetensors"})

    with pytest.raises(UnsafeError, match="points outside its folder"):
        open_checkpoint(index.index)


def test_a_link_within_the_folder_is_followed(shards: Shards) -> None:
    (shards.folder / "2.safetensors").rename(shards.folder / "other.safetensors")
    linked(shards.folder / "2.safetensors", shards.folder / "other.safetensors")

    with open_checkpoint(shards.index) as opened:
        assert len(opened) == 3


def test_a_link_to_itself_is_refused(shards: Shards) -> None:
    (shards.folder / "2.safetensors").unlink()
    linked(shards.folder / "2.safetensors", shards.folder / "2.safetensors")

    with pytest.raises(InputError, match=r"symbolic link|cannot be opened"):
        open_checkpoint(shards.index)


@pytest.mark.parametrize("inner", ["", "transformer"])
def test_the_hub_cache_may_link_to_its_blobs(shards: Shards, tmp_path: Path, inner: str) -> None:
    """Source: huggingface_hub, "Understand caching": snapshots/<revision>/x -> blobs/<hash>."""
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("c0ffee" * 6) / inner
    blobs.mkdir(parents=True)
    for number, file in enumerate(("1.safetensors", "2.safetensors", shards.index.name)):
        (shards.folder / file).rename(blobs / f"hash{number}")
        linked(snapshot / file, Path(os.path.relpath(blobs / f"hash{number}", snapshot)))

    with open_checkpoint(snapshot / shards.index.name) as opened:
        assert len(opened) == 3
        assert opened.read("a") == torch.ones(3).numpy().tobytes()


def test_the_hub_cache_may_not_link_elsewhere(shards: Shards, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "c0ffee"
    (repository / "blobs" / "deeper").mkdir(parents=True)
    targets = (shards.folder / "1.safetensors", repository / "blobs" / "deeper" / "x")
    for number, target in enumerate(targets):
        linked(snapshot / f"{number}.safetensors", target)
        index = Shards(snapshot, snapshot / f"{number}.safetensors.index.json")
        index.write_index({"a": f"{number}.safetensors", "b": f"{number}.safetensors"})

        with pytest.raises(UnsafeError):
            open_checkpoint(index.index)


# --- reading bytes -------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A file of mixed dtypes and shapes, and its tensors' bytes by the official library."""
    values = dict(list(model_values(shrunk("sd1"), seed=3).items())[:40])
    values |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "brain": torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).bfloat16(),
    }
    path = write_tensors(tmp_path / "m.safetensors", values)
    official = safetensors.deserialize(path.read_bytes())
    return path, {name: bytes(row["data"]) for name, row in official}


def assert_reads(path: Path, expected: dict[str, bytes]) -> None:
    with open_checkpoint(path) as opened:
        assert opened.keys() == expected.keys()
        for name, data in expected.items():
            assert opened.read(name) == data
            for start, end in (
                (0, 1),
                (len(data) // 2, len(data)),
                (len(data) // 3, len(data) // 2),
            ):
                view = bytearray(len(data[start:end]))
                opened.read_into(name, memoryview(view), start)
                assert view == data[start:end]


def test_reads_at_offsets_equal_the_official_bytes(model: tuple[Path, dict[str, bytes]]) -> None:
    assert_reads(*model)


def test_a_read_past_the_end_of_a_tensor_is_a_mistake_of_ours(
    model: tuple[Path, dict[str, bytes]],
) -> None:
    with open_checkpoint(model[0]) as opened, pytest.raises(ValueError, match="past the end"):
        opened.read_into("bytes", memoryview(bytearray(2)), 255)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no os.preadv")
def test_short_reads_are_continued(
    model: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv
    lengths = []

    def short(number: int, views: list[memoryview], offset: int) -> int:
        lengths.append(len(views[0]))
        return whole(number, [views[0][: max(1, len(views[0]) // 3)]], offset)

    monkeypatch.setattr(os, "preadv", short)

    assert_reads(*model)
    assert len(lengths) > 400


def test_systems_without_positional_reads_read_the_same(
    model: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)

    assert_reads(*model)


def slow(function: Callable[..., int]) -> Callable[..., int]:
    """The same function, with a pause after it in which other threads run."""

    def wrapped(*arguments: int) -> int:
        result = function(*arguments)
        threading.Event().wait(0.0001)
        return result

    return wrapped


@pytest.mark.parametrize("positional", [True, False])
def test_threads_may_share_a_checkpoint(
    model: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, *, positional: bool
) -> None:
    if not positional:
        monkeypatch.delattr(os, "preadv", raising=False)
        monkeypatch.setattr(os, "lseek", slow(os.lseek))
    path, expected = model
    wrong: list[str] = []
    with open_checkpoint(path) as opened:

        def read_all() -> None:
            for _ in range(2):
                wrong.extend(name for name, data in expected.items() if opened.read(name) != data)

        threads = [threading.Thread(target=read_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert wrong == []


def test_a_file_that_shrinks_while_it_is_read_is_an_input_error(
    model: tuple[Path, dict[str, bytes]],
) -> None:
    path, expected = model
    with open_checkpoint(path) as opened:
        last = max(expected, key=lambda name: opened.files[0].header.starts[name])
        os.truncate(path, path.stat().st_size - 1)

        with pytest.raises(InputError, match="became shorter") as caught:
            opened.read(last)

    assert caught.value.where == str(path)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no os.preadv")
def test_an_error_of_the_disk_names_the_file(
    model: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    path, expected = model
    with open_checkpoint(path) as opened:
        monkeypatch.setattr(os, "preadv", broken)
        name = next(name for name, data in expected.items() if data)  # they come in any order
        for attempt in (lambda: opened.read(name), lambda: read_header(path)):
            with pytest.raises(InputError, match="cannot be read: Input/output error") as caught:
                attempt()
            assert caught.value.where == str(path)


def touched(path: Path) -> None:
    info = path.stat()
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1_000_000_000))


def replaced(path: Path) -> None:
    info = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(info.st_atime_ns, info.st_mtime_ns))
    copy.replace(path)


def lengthened(path: Path) -> None:
    info = path.stat()
    os.truncate(path, info.st_size + 1)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


@pytest.mark.parametrize("change", [touched, replaced, lengthened, Path.unlink])
def test_a_file_that_changed_meanwhile_is_noticed(
    model: tuple[Path, dict[str, bytes]], change: Callable[[Path], None]
) -> None:
    path, _ = model
    with open_checkpoint(path) as opened:
        opened.check_unchanged()
        change(path)

        with pytest.raises(InputError, match="changed while it was being read") as caught:
            opened.check_unchanged()

    assert caught.value.where == str(path)


def test_closing_closes_every_descriptor_and_keeps_the_specs(
    model: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_numbers: list[int] = []

    class Recorded(Descriptor):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            opened_numbers.append(self.fileno())

    monkeypatch.setattr(checkpoint_module, "Descriptor", Recorded)
    path, expected = model
    with open_checkpoint(path) as opened:
        opened.read("bytes")

    assert len(opened_numbers) == 3  # to tell what it is, for the header, for the values
    assert opened.keys() == expected.keys()
    for number in set(opened_numbers):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


def test_a_header_beyond_100_mb_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for length in (100_000_001, 2**40):
        with path.open("wb") as stream:
            stream.write(length.to_bytes(8, "little") + b"{}")
            stream.truncate(length + 8)  # sparse

        tracemalloc.start()
        with pytest.raises(InvalidFileError, match="limit 100 MB"):
            read_header(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 1_000_000


# --- tensors whose elements do not follow one another --------------------------------------------


def laid_out(
    tmp_path: Path, values: torch.Tensor, *extents: Extent, shape: list[int]
) -> Checkpoint:
    """A checkpoint whose tensor "x" lies as the extents say in a file of these values."""
    path = tmp_path / "raw.safetensors"
    save_file({"raw": values}, path)
    header = read_header(path)
    start = header.starts["raw"]
    moved = tuple(replace(extent, start=start + extent.start) for extent in extents)
    spec = TensorSpec("x", header.specs["raw"].dtype, tuple(shape))
    file = SourceFile(path, header, Identity.of(path))
    return Checkpoint(path, [file], tensors=Tensors({"x": spec}, {"x": moved}))


@pytest.mark.parametrize(
    "view",
    [
        lambda values: values.t(),
        lambda values: values[3:, ::2],
        lambda values: values.expand(5, 7, 9).permute(2, 0, 1),
        lambda values: values[0, 0].expand(6),
    ],
    ids=["transposed", "every second column", "expanded and permuted", "one number"],
)
def test_strided_tensors_read_as_torch_sees_them_from_any_element_on(
    tmp_path: Path, view: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    values = torch.arange(63, dtype=torch.float32).view(7, 9)
    seen = view(values)
    strides = tuple(zip(seen.shape, seen.stride(), strict=True))
    extent = Extent(0, 4 * seen.storage_offset(), 4 * seen.numel(), strides)
    expected = seen.contiguous().numpy().tobytes()

    with laid_out(tmp_path, values, extent, shape=list(seen.shape)) as checkpoint:
        assert checkpoint.read("x") == expected
        for begin, end in [(0, 1), (1, 3), (5, seen.numel()), (seen.numel() // 2, seen.numel())]:
            part = bytearray(4 * (end - begin))
            checkpoint.read_into("x", memoryview(part), 4 * begin)
            assert bytes(part) == expected[4 * begin : 4 * end]


def test_a_tensor_may_lie_in_several_runs(tmp_path: Path) -> None:
    values = torch.arange(12, dtype=torch.int16)
    runs = [Extent(0, 16, 8), Extent(0, 0, 4), Extent(0, 8, 6, ((3, 1),))]
    expected = torch.cat([values[8:12], values[:2], values[4:7]]).numpy().tobytes()

    with laid_out(tmp_path, values, *runs, shape=[9]) as checkpoint:
        assert checkpoint.read("x") == expected
        for begin in range(9):
            for end in range(begin, 10):
                part = bytearray(2 * (end - begin))
                checkpoint.read_into("x", memoryview(part), 2 * begin)
                assert bytes(part) == expected[2 * begin : 2 * end]
