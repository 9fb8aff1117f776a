"""Writing: the bytes of the official library, and a file under its name only when whole."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import model_values, shrunk, torch_dtype, write_tensors
from safetensors.torch import save
from torch import Tensor

from ckptools import writer
from ckptools.checkpoint import read_header
from ckptools.errors import OutputError, VerificationError
from ckptools.sources import open_checkpoint
from ckptools.tensors import DTYPES, TensorSpec
from ckptools.verify import check_structure
from ckptools.writer import (
    Layout,
    PartFile,
    PartFolder,
    commit_parts,
    index_document,
    index_path,
    lay_out,
    open_parts,
    output_error,
    shard_paths,
    split_shards,
    whole_file,
)

TORCH_DTYPES = sorted(name for name, row in DTYPES.items() if row.torch_name)
OUT = Path("out.safetensors")


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def spec_of(name: str, tensor: Tensor, dtype: str) -> TensorSpec:
    return TensorSpec(name, dtype, tuple(tensor.shape))


def assembled(tensors: dict[str, tuple[str, Tensor]], metadata: dict[str, str]) -> bytes:
    """The whole file as the layout says, put together in memory."""
    specs = [spec_of(name, tensor, dtype) for name, (dtype, tensor) in tensors.items()]
    layout = lay_out(specs, metadata, OUT)
    data = bytearray(layout.file_bytes)
    data[: layout.data_start] = layout.header
    for spec in layout.specs:
        start = layout.starts[spec.name]
        data[start : start + spec.nbytes] = raw(tensors[spec.name][1])
    return bytes(data)


# --- layout --------------------------------------------------------------------------------------

NAMES = st.text(max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.dictionaries(NAMES, st.tuples(st.sampled_from(TORCH_DTYPES), SHAPES), max_size=12),
    metadata=st.dictionaries(st.text(max_size=12), st.text(max_size=12), max_size=1),
    seed=st.integers(0, 2**31),
)
def test_files_are_byte_for_byte_those_of_the_official_library(
    rows: dict[str, tuple[str, list[int]]], metadata: dict[str, str], seed: int
) -> None:
    """With at most one metadata key: the library writes several in a random order."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (dtype, torch.randint(0, 2, shape, generator=generator).to(torch_dtype(dtype)))
        for name, (dtype, shape) in rows.items()
    }

    expected = save({name: tensor for name, (_, tensor) in tensors.items()}, metadata or None)

    assert assembled(tensors, metadata) == expected


def test_tensors_of_all_dtypes_are_ordered_as_the_official_library_orders_them() -> None:
    """Names against the grain: the order must come from the dtypes."""
    tensors = {
        f"{letter}{99 - number}": (dtype, torch.ones(3).to(torch_dtype(dtype)))
        for number, dtype in enumerate(TORCH_DTYPES)
        for letter in "ba"
    }

    assert len(tensors) >= 38
    assert assembled(tensors, {"format": "pt"}) == save(
        {name: tensor for name, (_, tensor) in tensors.items()}, {"format": "pt"}
    )


def test_metadata_and_tensors_are_sorted_however_they_came() -> None:
    specs = [TensorSpec(name, "F16", (2,)) for name in "cab"]
    metadata = {"z": "1", "format": "pt", "a": "ü"}

    one = lay_out(specs, metadata, OUT)
    other = lay_out(specs[::-1], dict(reversed(metadata.items())), OUT)

    assert one == other
    assert [spec.name for spec in one.specs] == ["a", "b", "c"]
    assert list(json.loads(one.header[8:])["__metadata__"]) == ["a", "format", "z"]


@pytest.mark.parametrize("length", range(9))
def test_the_data_begins_at_a_multiple_of_eight(length: int) -> None:
    layout = lay_out([TensorSpec("n" * length, "U8", (3,))], {}, OUT)

    assert layout.data_start % 8 == 0
    assert int.from_bytes(layout.header[:8], "little") == layout.data_start - 8
    assert layout.file_bytes == layout.data_start + 3


def test_our_reader_finds_what_was_laid_out(tmp_path: Path) -> None:
    specs = shrunk("sdxl")
    layout = lay_out(specs.values(), {"k": "v"}, tmp_path / OUT)
    with PartFile(layout) as part:
        part.commit()

    header = read_header(layout.path)

    assert dict(header.starts) == dict(layout.starts)
    assert dict(header.specs) == specs
    assert header.data_start == layout.data_start


# --- shards --------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=30),
    dtypes=st.lists(st.sampled_from(["F32", "F16", "U8"]), min_size=30, max_size=30),
    shard_bytes=st.integers(1, 120),
)
def test_shards_keep_every_tensor_in_order_and_within_the_size(
    sizes: list[int], dtypes: list[str], shard_bytes: int
) -> None:
    specs = [TensorSpec(f"t{number}", dtypes[number], (size,)) for number, size in enumerate(sizes)]

    shards = split_shards(specs, shard_bytes)

    assert [spec for shard in shards for spec in shard] == split_shards(specs, 0)[0]
    assert sorted(spec.name for shard in shards for spec in shard) == sorted(
        spec.name for spec in specs
    )
    for shard, after in zip(shards, [*shards[1:], []], strict=True):
        nbytes = sum(spec.nbytes for spec in shard)
        assert nbytes <= shard_bytes or len([spec for spec in shard if spec.nbytes]) == 1
        assert not after or nbytes + after[0].nbytes > shard_bytes  # none ends before it is full


def test_shards_and_their_index_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    values = model_values(shrunk("sd1"), seed=1)
    specs = list(shrunk("sd1").values())
    shards = split_shards(specs, 500_000)
    paths = shard_paths(tmp_path / OUT, len(shards))
    layouts = [lay_out(shard, {}, path) for shard, path in zip(shards, paths, strict=True)]
    for layout in layouts:
        with PartFile(layout) as part:
            for spec in layout.specs:
                part.write(raw(values[spec.name]), layout.starts[spec.name])
            part.commit()
    index_path(tmp_path / OUT).write_bytes(index_document(layouts))

    count = len(layouts)
    assert count >= 3
    assert paths[0].name == f"out-00001-of-{count:05d}.safetensors"
    with open_checkpoint(tmp_path / "out.safetensors.index.json") as opened:
        assert dict(opened) == shrunk("sd1")
        assert opened.warnings == ()  # its total size is right
        assert all(opened.read(name) == raw(value) for name, value in values.items())


def test_one_shard_keeps_the_plain_name(tmp_path: Path) -> None:
    assert shard_paths(tmp_path / OUT, 1) == [tmp_path / OUT]


# --- the life of a part --------------------------------------------------------------------------

OLD = b"the file that was there before"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A file of one tensor of 1,000 bytes, laid out over an older file."""
    (tmp_path / OUT).write_bytes(OLD)
    return lay_out([TensorSpec("a", "U8", (1000,))], {}, tmp_path / OUT)


def assert_old_and_alone(layout: Layout) -> None:
    assert layout.path.read_bytes() == OLD
    assert list(layout.path.parent.iterdir()) == [layout.path]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["file", "parts", "folder"])
def test_an_interruption_right_after_opening_leaves_nothing(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, kind: str
) -> None:
    """The part exists before anything can remember that it does."""
    open_for_real = os.open
    opened = []

    def open_then_interrupt(path: Path, *rest: int, **named: int) -> int:
        opened.append(open_for_real(path, *rest, **named))
        if len(opened) == 1:
            signal.raise_signal(number)
        return opened[-1]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def write() -> None:
        with ExitStack() as stack:
            if kind == "parts":
                open_parts(stack, [layout, replace(layout, path=layout.path.with_name("2"))])
            else:
                stack.enter_context(PartFile(layout) if kind == "file" else PartFolder(layout.path))

    monkeypatch.setattr(os, "open", open_then_interrupt)
    before = signal.signal(number, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            write()
    finally:
        signal.signal(number, before)

    assert opened
    assert_old_and_alone(layout)


def test_an_interruption_between_two_names_comes_after_the_last(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file and its manifest either both are new or none is."""
    replace_for_real = Path.replace

    def replace_then_interrupt(self: Path, target: Path) -> Path:
        signal.raise_signal(signal.SIGINT)
        return replace_for_real(self, target)

    monkeypatch.setattr(Path, "replace", replace_then_interrupt)
    manifest = whole_file(layout.path.with_name("manifest"), b"{}")
    with ExitStack() as stack:
        parts = open_parts(stack, [layout, manifest])
        with pytest.raises(KeyboardInterrupt):
            commit_parts(parts)

    assert sorted(layout.path.parent.iterdir()) == sorted([layout.path, manifest.path])
    assert layout.path.stat().st_size == layout.file_bytes


def test_a_file_takes_its_name_in_one_step(layout: Layout) -> None:
    with PartFile(layout) as part:
        part.write(bytes(range(250)) * 4, layout.data_start)
        part.sync()
        assert layout.path.read_bytes() == OLD
        assert layout.part.stat().st_size == layout.file_bytes
        part.commit()

    assert layout.path.read_bytes() == layout.header + bytes(range(250)) * 4
    assert not layout.part.exists()


def test_a_part_without_commit_is_removed(layout: Layout) -> None:
    with PartFile(layout) as part:
        part.write(b"x", layout.data_start)
        assert layout.part.exists()

    assert_old_and_alone(layout)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_a_part_is_removed_whatever_goes_wrong(layout: Layout, error: type[BaseException]) -> None:
    def fail(part: PartFile) -> None:
        part.write(b"x", layout.data_start)
        raise error

    with pytest.raises(error), PartFile(layout) as part:
        fail(part)

    assert_old_and_alone(layout)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("function", ["truncate", "pwrite"])
def test_a_part_is_removed_when_opening_it_fails_half_way(
    layout: Layout,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    error: BaseException | type[BaseException],
) -> None:
    if not hasattr(os, function):
        pytest.skip(f"no os.{function}")

    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, function, failing)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt

    with pytest.raises(expected), PartFile(layout):
        pass

    assert_old_and_alone(layout)


def test_a_part_that_a_killed_process_left_is_taken_over(layout: Layout) -> None:
    for left in (b"", bytes(900), bytes(5000), b'{"ckptools.recipe": "' * 1000, b"{\n "):
        layout.part.write_bytes(left)  # some are longer than the file will be

        with PartFile(layout) as part:
            part.commit()

        assert layout.path.read_bytes() == layout.header + bytes(1000)


def test_a_part_that_this_user_may_not_write_is_told_of(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout.part.write_bytes(b"")

    def refuse(path: Path, mode: str = "r") -> None:
        assert (path, mode) == (layout.part, "r+b")
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    assert writer.part_problem(layout.path) is None
    monkeypatch.setattr(Path, "open", refuse)
    problem = writer.part_problem(layout.path)

    assert problem
    assert problem.what.endswith("is in the way, and cannot be written: Permission denied")
    assert problem.fix == "remove it, or write elsewhere"


def test_a_part_of_somebody_else_is_left_alone(layout: Layout) -> None:
    """As a browser's unfinished download of the same name."""
    layout.part.write_bytes(b"half a model" * 1000)

    with pytest.raises(OutputError, match="is in the way, and nothing that ckptools left"):
        PartFile(layout).__enter__()

    assert layout.part.read_bytes() == b"half a model" * 1000
    assert layout.path.read_bytes() == OLD


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="no O_NOFOLLOW")
def test_a_part_that_is_a_link_is_not_followed(layout: Layout, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    layout.part.symlink_to(victim)

    with pytest.raises(OutputError, match="cannot be written"), PartFile(layout):
        pass

    assert victim.read_bytes() == b"precious"
    assert layout.path.read_bytes() == OLD


HOLDER = """
import sys
from pathlib import Path
from ckptools.tensors import TensorSpec
from ckptools.writer import PartFile, lay_out
with PartFile(lay_out([TensorSpec("a", "U8", (1000,))], {}, Path(sys.argv[1]))) as part:
    print("held", flush=True)
    sys.stdin.readline()
    part.commit()
"""


def needs_locks() -> None:
    pytest.importorskip("fcntl", reason="this system has no flock")


def test_a_part_that_has_another_name_too_is_left_alone(layout: Layout, tmp_path: Path) -> None:
    """As a hard link to a model has: writing into it would destroy the model."""
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"dear")
    os.link(model, layout.part)

    with pytest.raises(OutputError, match="is in the way: a file with other names"):
        PartFile(layout).__enter__()

    assert model.read_bytes() == layout.part.read_bytes() == b"dear"


def test_a_file_that_appears_meanwhile_is_left_alone(layout: Layout) -> None:
    """With hard links and without; and all parts are looked at before the first takes its name."""
    layout.path.unlink()
    other = whole_file(layout.path.with_name("other"), b"new")

    with ExitStack() as stack:
        parts = open_parts(stack, [other, layout], replaces=False)
        layout.path.write_bytes(OLD)
        with pytest.raises(OutputError, match="made by somebody else meanwhile"):
            commit_parts(parts)
    assert not other.path.exists()
    assert_old_and_alone(layout)


@pytest.mark.parametrize("links", [True, False])
def test_a_new_name_is_taken_in_one_step(
    links: bool, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object) -> None:
        layout.path.write_bytes(OLD)
        raise FileExistsError

    def missing(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    layout.path.unlink()
    with PartFile(layout, replaces=False) as part:
        if not links:
            monkeypatch.setattr(os, "link", missing)
        part.commit()
    assert layout.path.read_bytes() == layout.header + bytes(1000)
    assert not layout.part.exists()

    layout.path.unlink()
    monkeypatch.setattr(os, "link", late)
    with pytest.raises(OutputError, match="meanwhile"), PartFile(layout, replaces=False) as part:
        part.commit()
    assert_old_and_alone(layout)


def test_a_part_that_was_given_its_name_when_its_process_was_killed(layout: Layout) -> None:
    os.link(layout.path, layout.part)

    with PartFile(layout) as part:
        assert layout.path.read_bytes() == OLD
        part.commit()

    assert layout.path.read_bytes() == layout.header + bytes(1000)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_beside_with_the_name_of_an_old_one_is_left_alone(
    tmp_path: Path, replaced: bool
) -> None:
    path, beside = tmp_path / "x", tmp_path / "x.old"
    beside.mkdir()
    if replaced:
        path.mkdir()
        (path / "old").touch()
    with PartFolder(path) as folder:
        (folder.part / "new").touch()
        folder.commit()

    assert sorted(tmp_path.iterdir()) == [path, beside]
    assert [item.name for item in path.iterdir()] == ["new"]


def test_a_part_that_another_process_writes_is_refused(layout: Layout) -> None:
    needs_locks()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(layout.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"

        with pytest.raises(OutputError, match="another process is writing"), PartFile(layout):
            pass
        assert layout.part.exists()  # it is the other's

        holder.communicate("go\n", timeout=30)

    assert holder.returncode == 0
    assert layout.path.read_bytes() == layout.header + bytes(1000)


@pytest.mark.parametrize("ending", ["committed", "removed"])
def test_a_part_that_ended_just_before_it_was_locked_is_opened_again(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Opened while another process held it, locked after that one had renamed or removed it."""
    needs_locks()
    first = PartFile(layout).__enter__()
    first.write(b"1" * 1000, layout.data_start)
    lock = writer._lock
    calls = []

    def late_lock(number: int, path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            if ending == "committed":
                first.commit()
            else:
                first.__exit__(None, None, None)
        lock(number, path)

    monkeypatch.setattr(writer, "_lock", late_lock)

    with PartFile(layout) as second:
        finished = layout.header + b"1" * 1000 if ending == "committed" else OLD
        assert layout.path.read_bytes() == finished
        second.write(b"2" * 1000, layout.data_start)
        second.commit()

    assert len(calls) == 2
    assert layout.path.read_bytes() == layout.header + b"2" * 1000
    assert list(layout.path.parent.iterdir()) == [layout.path]


# --- errors of the system ------------------------------------------------------------------------

ERRORS = [
    (errno.ENOSPC, "the disk is full; nothing was left behind", "free some space"),
    (errno.EDQUOT, "the disk is full", "another disk"),
    (errno.EACCES, "the folder cannot be written to", "check its rights"),
    (errno.EPERM, "the folder cannot be written to", "check its rights"),
    (errno.EROFS, "the folder cannot be written to", "check its rights"),
    (errno.EFBIG, "larger than a file may be here; nothing was left", "shard_size"),
    (errno.EIO, f"cannot be written: {os.strerror(errno.EIO)}", ""),
]


@pytest.mark.parametrize(("number", "what", "fix"), ERRORS)
def test_errors_of_the_system_are_told_in_words(number: int, what: str, fix: str) -> None:
    error = output_error(OSError(number, os.strerror(number)), OUT)

    assert what in error.what
    assert fix in error.fix
    assert error.where == str(OUT)
    assert error.exit_code == 2


def failing_after(count: int, number: int, function: Callable[..., int]) -> Callable[..., int]:
    calls = []

    def wrapped(*arguments: object) -> int:
        calls.append(arguments)
        if len(calls) > count:
            raise OSError(number, os.strerror(number))
        return function(*arguments)

    return wrapped


def write_whole(layout: Layout) -> None:
    with PartFile(layout) as part:
        part.write(b"x" * 500, layout.data_start)
        part.write(b"x" * 500, layout.data_start + 500)
        part.sync()
        part.commit()


@pytest.mark.parametrize("name", ["write", "sync", "commit"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_failing_disk_leaves_the_old_file_alone(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    positional = "pwrite" if hasattr(os, "pwrite") else "write"
    if name == "write":
        monkeypatch.setattr(os, positional, failing_after(2, number, getattr(os, positional)))
    elif name == "sync":
        monkeypatch.setattr(os, "fsync", failing_after(0, number, os.fsync))
    else:
        monkeypatch.setattr(Path, "replace", failing_after(0, number, Path.replace))

    with pytest.raises(OutputError) as caught:
        write_whole(layout)

    assert caught.value.what in (ERRORS[0][1], ERRORS[2][1])
    assert_old_and_alone(layout)


def test_a_folder_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="cannot be written: No such file"),
        PartFile(lay_out([], {}, tmp_path / "none" / OUT)),
    ):
        pass


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="no os.pwrite")
def test_short_writes_are_continued(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda number, view, at: whole(number, view[:7], at))

    with PartFile(layout) as part:
        part.write(bytes(range(250)) * 4, layout.data_start)
        part.commit()

    assert layout.path.read_bytes() == layout.header + bytes(range(250)) * 4


@pytest.mark.parametrize("positional", [True, False])
def test_threads_may_write_anywhere_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, positional: bool
) -> None:
    """With and without positional writes (Windows has none)."""
    if not positional:
        seek = os.lseek

        def slow_seek(number: int, offset: int, whence: int) -> int:
            result = seek(number, offset, whence)
            threading.Event().wait(0.0001)  # other threads run
            return result

        monkeypatch.delattr(os, "pwrite", raising=False)
        monkeypatch.setattr(os, "lseek", slow_seek)
    layout = lay_out([TensorSpec("a", "U8", (64_000,))], {}, tmp_path / OUT)
    data = bytes(number * 7 % 251 for number in range(64_000))
    with PartFile(layout) as part:

        def write_every_fourth(first: int) -> None:
            for begin in range(first * 100, 64_000, 400):
                part.write(memoryview(data)[begin : begin + 100], layout.data_start + begin)

        threads = [threading.Thread(target=write_every_fourth, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        part.commit()

    assert layout.path.read_bytes() == layout.header + data


# --- small files ---------------------------------------------------------------------------------


def test_a_small_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(OLD)

    with PartFile(whole_file(path, b"new")) as part:
        part.sync()
        part.commit()

    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(errno.ENOSPC, "full"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_small_file_that_fails_leaves_the_old_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    expected: type[BaseException],
) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(OLD)

    def failing(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(expected), PartFile(whole_file(path, b"new")) as part:
        part.sync()

    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


# --- verification of the structure ---------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    tensors = {"a": torch.ones(3), "b": torch.ones(2, 2).half(), "c": torch.ones(1).half()}
    return write_tensors(tmp_path / OUT, tensors, {"k": "v"}), tensors


def specs_like(**changes: TensorSpec) -> list[TensorSpec]:
    specs = {
        "a": TensorSpec("a", "F32", (3,)),
        "b": TensorSpec("b", "F16", (2, 2)),
        "c": TensorSpec("c", "F16", (1,)),
    }
    return list((specs | changes).values())


def test_a_file_as_planned_passes(written: tuple[Path, dict[str, Tensor]]) -> None:
    check_structure(written[0], lay_out(specs_like(), {"k": "v"}, OUT))


@pytest.mark.parametrize(
    ("specs", "metadata", "words"),
    [
        (specs_like(d=TensorSpec("d", "F16", (1,))), {"k": "v"}, "d: missing in the written file"),
        (specs_like()[:2], {"k": "v"}, "1 tensor too many"),
        (
            specs_like(b=TensorSpec("b", "BF16", (2, 2))),
            {"k": "v"},
            "written as F16 .*planned as B",
        ),
        (specs_like(b=TensorSpec("b", "F16", (4,))), {"k": "v"}, r"F16 \[2, 2\], planned as F16"),
        (specs_like(), {"k": "w"}, "header is not the planned one"),
        (specs_like(), {}, "header is not the planned one"),
    ],
)
def test_a_file_that_is_not_as_planned_is_told(
    written: tuple[Path, dict[str, Tensor]],
    specs: list[TensorSpec],
    metadata: dict[str, str],
    words: str,
) -> None:
    with pytest.raises(VerificationError, match=words):
        check_structure(written[0], lay_out(specs, metadata, OUT))


def test_a_file_that_the_official_library_refuses_is_told(
    written: tuple[Path, dict[str, Tensor]],
) -> None:
    path, _ = written
    os.truncate(path, path.stat().st_size - 1)

    with pytest.raises(VerificationError, match="the safetensors library cannot read it"):
        check_structure(path, lay_out(specs_like(), {"k": "v"}, OUT))


# --- to the disk while it is written ------------------------------------------------------------

syncing = pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="no fdatasync on this system")
CHUNK = 100_000


@pytest.fixture
def chunks(tmp_path: Path) -> tuple[Layout, list[tuple[int, bytes]]]:
    """A file of 25 chunks, and each chunk's offset and bytes."""
    layout = lay_out([TensorSpec("a", "U8", (25 * CHUNK,))], {}, tmp_path / OUT)
    draw = random.Random(1)
    offsets = range(layout.data_start, layout.file_bytes, CHUNK)
    return layout, [(offset, draw.randbytes(CHUNK)) for offset in offsets]


@syncing
def test_what_is_written_goes_to_the_disk_meanwhile(
    chunks: tuple[Layout, list[tuple[int, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four chunks at a time, in a thread that ends with the file."""
    layout, parts = chunks
    synced = threading.Semaphore(0)
    whole = os.fdatasync

    def watched(number: int) -> None:
        whole(number)
        synced.release()

    monkeypatch.setattr(os, "fdatasync", watched)
    monkeypatch.setattr(writer, "_FLUSHED_BYTES", 4 * CHUNK)
    before = threading.active_count()
    with PartFile(layout) as part:
        for number, (offset, data) in enumerate(parts, 1):
            part.write(data, offset)
            if number % 4 == 0:
                assert synced.acquire(timeout=60), "it was not asked for"
        part.sync()
        part.commit()

    assert not synced.acquire(blocking=False), "asked for more often than every four chunks"
    assert threading.active_count() == before
    assert layout.path.read_bytes() == layout.header + b"".join(data for _, data in parts)


@syncing
@pytest.mark.parametrize(
    ("code", "word"),
    [(errno.EIO, "cannot be written"), (errno.ENOSPC, "the disk is full; nothing was left behind")],
)
@pytest.mark.parametrize("asking", ["write", "sync", "commit"])
def test_what_the_disk_says_once_is_not_lost(
    chunks: tuple[Layout, list[tuple[int, bytes]]],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    word: str,
    asking: str,
) -> None:
    """A descriptor is told of a failed write once, whoever asks: here the thread was."""
    layout, parts = chunks

    def fail(number: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr(writer, "_FLUSHED_BYTES", CHUNK)
    before = threading.active_count()

    def write() -> None:
        with PartFile(layout) as part:
            offset, data = parts[0]
            part.write(data, offset)
            while threading.active_count() > before:  # until the thread has been told
                time.sleep(0.001)
            {"write": lambda: part.write(data, offset), "sync": part.sync, "commit": part.commit}[
                asking
            ]()

    with pytest.raises(OutputError, match=word):
        write()

    assert not layout.part.exists()
    assert not layout.path.exists()


@syncing
def test_a_disk_that_is_slow_to_answer_is_asked_once(
    chunks: tuple[Layout, list[tuple[int, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network systems send the whole file each time."""
    layout, parts = chunks
    asked: list[int] = []

    def answer_late(number: int) -> None:
        asked.append(number)
        time.sleep(0.02)

    monkeypatch.setattr(os, "fdatasync", answer_late)
    monkeypatch.setattr(writer, "_FLUSHED_BYTES", CHUNK)
    monkeypatch.setattr(writer, "_PATIENCE_S", 0.01)
    before = threading.active_count()
    with PartFile(layout) as part:
        for offset, data in parts:
            part.write(data, offset)
            while threading.active_count() > before:
                time.sleep(0.001)
        part.commit()

    assert len(asked) == 1
    assert layout.path.read_bytes() == layout.header + b"".join(data for _, data in parts)


def test_a_system_without_these_calls_is_waited_for_at_the_end(
    chunks: tuple[Layout, list[tuple[int, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, parts = chunks
    for name in ("fdatasync", "posix_fadvise"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(writer, "_FLUSHED_BYTES", CHUNK)
    with PartFile(layout) as part:
        for offset, data in parts:
            part.write(data, offset)
        part.sync()
        part.commit()

    assert layout.path.read_bytes() == layout.header + b"".join(data for _, data in parts)


@pytest.mark.skipif(sys.platform != "linux", reason="room is taken beforehand on Linux")
@pytest.mark.parametrize(
    ("code", "word"),
    [
        (errno.EOPNOTSUPP, ""),
        (errno.ENOSYS, ""),
        (errno.EPERM, ""),
        (errno.EINTR, ""),
        (errno.ENOSPC, "the disk is full; nothing was left behind"),
        (errno.EDQUOT, "the disk is full; nothing was left behind"),
        (errno.EFBIG, "larger than a file may be here"),
        (errno.EIO, "cannot be written"),
    ],
)
@pytest.mark.parametrize("name", ["fallocate64", "fallocate"])
def test_room_that_cannot_be_taken_is_an_error_only_where_it_lacks(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, code: int, word: str, name: str
) -> None:
    """As glibc and musl name the call: on some file systems there is none, on a full disk no room.

    An interrupted call is made again.
    """
    asked: list[tuple[int, int, int]] = []

    def refuse(number: int, mode: int, offset: int, nbytes: int) -> int:
        asked.append((mode, offset, nbytes))
        if code == errno.EINTR and len(asked) > 1:
            return 0
        ctypes.set_errno(code)
        return -1

    def tell(number: int, about: ctypes.Array[ctypes.c_long]) -> int:
        about[0] = 0xEF53  # ext4
        return 0

    system = SimpleNamespace(**{name: refuse, "fstatfs": tell})
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **options: system)

    if word:
        with pytest.raises(OutputError, match=word), PartFile(layout):
            pytest.fail("there is no room")
    else:
        with PartFile(layout) as part:
            part.commit()
        assert layout.path.stat().st_size == layout.file_bytes

    assert asked == [(0, 0, layout.file_bytes)] * (2 if code == errno.EINTR else 1)
    assert not layout.part.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="room is taken beforehand on Linux")
def test_no_room_is_taken_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it would clear every page, and nothing else could be done meanwhile."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        pytest.skip("no /dev/shm that can be written to")
    told = ["stat", "-f", "-c", "%T", str(memory)]
    kind = subprocess.run(told, capture_output=True, text=True, check=True).stdout.strip()
    if kind != "tmpfs":
        pytest.skip(f"/dev/shm is {kind}")
    path = memory / f"ckptools-test-{os.getpid()}.safetensors"
    layout = lay_out([TensorSpec("w", "U8", (1 << 20,))], {}, path)

    def taken() -> int:
        with PartFile(layout) as part:
            return 512 * part.layout.part.stat().st_blocks

    assert taken() < 1 << 16
    monkeypatch.setattr(writer, "_TMPFS", 0)
    assert taken() >= 1 << 20
