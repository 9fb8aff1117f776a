"""`hash`: every hash against its definition, worked out by hashlib and zlib on whole files."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import types
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models import model_values, shrunk, write_model, write_tensors
from safetensors.torch import load_file, save, save_file

from ckptools import hashing
from ckptools.cli import run
from ckptools.errors import InputError
from ckptools.hashing import EMPTY_SHA256, cache_folder, hash_source
from ckptools.tensors import TensorSpec

TINY = Path(hashing.__file__).parent / "tiny"
LONG_AGO = 1_600_000_000


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ckptools" / "hashes"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def data_of(content: bytes) -> bytes:
    return content[8 + int.from_bytes(content[:8], "little") :]


def component_hash(rows: list[tuple[str, str, list[int], bytes]]) -> str:
    """As documented: a line of JSON for each tensor, sorted by name."""
    lines = [
        json.dumps([name, dtype, shape, sha256(data)], separators=(",", ":"), ensure_ascii=False)
        for name, dtype, shape, data in sorted(rows)
    ]
    return sha256("".join(line + "\n" for line in lines).encode())


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def aged(path: Path) -> Path:
    """Make a file old enough to be remembered."""
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def test_every_hash_is_what_its_definition_says() -> None:
    path = TINY / "A.safetensors"
    content = path.read_bytes()

    found = hash_source(path, use_cache=False)

    (file,) = found.files
    assert file.sha256 == sha256(content)
    assert file.autov1 == sha256(content[0x100000:0x110000])[:8]
    assert file.autov2 == sha256(content)[:10]
    assert file.autov3 == sha256(data_of(content))[:12]
    assert int(file.crc32, 16) == zlib.crc32(content)
    assert found.modelspec == "0x" + sha256(data_of(content))
    assert file.nbytes == len(content)


def test_a_component_hash_can_be_worked_out_by_hand() -> None:
    path = TINY / "A.safetensors"
    tensors = load_file(path)
    names = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
    rows = [
        (name, names[tensor.dtype], list(tensor.shape), raw(tensor))
        for name, tensor in tensors.items()
    ]

    found = hash_source(path, use_cache=False)

    prefixes = {
        "unet": "model.diffusion_model.",
        "text_encoder": "cond_stage_model.",
        "vae": "first_stage_model.",
    }
    assert found.components == {
        component: component_hash([row for row in rows if row[0].startswith(prefix)])
        for component, prefix in prefixes.items()
    }
    assert found.content == component_hash(rows)


def in_given_order(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with the tensors in this order."""
    names = {torch.float16: "F16", torch.int64: "I64"}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    data = b""
    for name, tensor in tensors.items():
        piece = raw(tensor)
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(piece)],
        }
        data += piece
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("hashing")
    tensors = model_values(shrunk("sd1"), seed=5)
    tensors["empty"] = torch.empty(0, dtype=torch.float16)
    return write_tensors(folder / "m.safetensors", tensors), tensors


def test_component_hashes_depend_on_no_order_metadata_or_shards(
    tmp_path: Path, model: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, tensors = model
    mixed = dict(sorted(tensors.items(), key=lambda item: sha256(item[0].encode())))
    other = tmp_path / "other.safetensors"
    other.write_bytes(in_given_order(mixed, {"modelspec.title": "another"}))
    shards = tmp_path / "shards"
    shards.mkdir()
    names = list(mixed)
    homes = {name: f"{number % 3}.safetensors" for number, name in enumerate(names)}
    for shard in sorted(set(homes.values())):
        save_file({n: tensors[n] for n in names if homes[n] == shard}, shards / shard)
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": homes}))

    one, two, three = (hash_source(item, use_cache=False) for item in (path, other, index))

    assert one.components == two.components == three.components
    assert one.content == two.content == three.content
    assert one.files[0].sha256 != two.files[0].sha256
    assert one.files[0].autov3 != two.files[0].autov3
    parts = [data_of((shards / shard).read_bytes()) for shard in sorted(set(homes.values()))]
    assert three.modelspec == "0x" + sha256(b"".join(parts))
    assert [file.sha256_data for file in three.files] == [sha256(part) for part in parts]


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_one_changed_value_changes_one_component(
    tmp_path: Path, model: tuple[Path, dict[str, torch.Tensor]], part: str
) -> None:
    path, tensors = model
    prefix = {"unet": "model.d", "text_encoder": "cond_", "vae": "first_"}[part]
    name = [name for name, t in tensors.items() if name.startswith(prefix) and t.numel() > 4][-1]
    changed = tensors[name].clone()
    changed.view(-1)[-1] += 1
    other = write_tensors(tmp_path / "o.safetensors", tensors | {name: changed})

    one, two = (hash_source(item, use_cache=False) for item in (path, other))

    differing = {c for c in one.components if one.components[c] != two.components[c]}
    assert differing == {part}
    assert one.content != two.content


def test_a_name_shape_or_dtype_counts_too(tmp_path: Path) -> None:
    zeros = torch.zeros(4, dtype=torch.float16)
    variants = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.view(2, 2)},
        {"a": torch.zeros(4, dtype=torch.bfloat16)},
        {"a": zeros[:2], "b": zeros[2:]},
        {},
    ]
    contents = []
    for number, tensors in enumerate(variants):
        path = write_tensors(tmp_path / f"{number}.safetensors", tensors)
        contents.append(hash_source(path, use_cache=False).content)

    assert len(set(contents)) == len(variants)
    assert contents[-1] == EMPTY_SHA256


def test_chunks_of_any_size_give_the_same_hashes(
    monkeypatch: pytest.MonkeyPatch, model: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, _ = model
    expected = hash_source(path, use_cache=False)

    for size in (4093, 65536, 10**9):
        monkeypatch.setattr(hashing, "CHUNK", size)
        assert hash_source(path, use_cache=False) == expected


def test_blake3_is_used_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = aged(write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(3)}))
    assert hash_source(path).files[0].blake3 is None
    fake = types.ModuleType("blake3")
    fake.blake3 = hashlib.blake2s  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "blake3", fake)

    found = hash_source(path)

    assert not found.cached  # what was remembered lacks it
    assert found.files[0].blake3 == hashlib.blake2s(path.read_bytes()).hexdigest()
    assert hash_source(path).cached


@pytest.mark.parametrize("content", [b"", b"x", b"PK\3\4 not a model", b"text " * 300_000])
def test_any_file_has_the_hashes_of_its_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(content)

    found = hash_source(path, use_cache=False)

    assert found.files[0].sha256 == sha256(content)
    assert found.files[0].legacy == sha256(content[0x100000:0x110000])
    assert found.files[0].autov3 is None
    assert found.modelspec is None
    assert found.content is None
    assert found.components == {}
    assert "not a sound model" in found.notes[0]


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        hash_source(tmp_path / "none.safetensors")


def test_a_broken_folder_of_shards_is_no_file_to_hash(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors.index.json").write_text("{}")

    with pytest.raises(InputError, match="weight_map"):
        hash_source(tmp_path)


# --- hashes in metadata --------------------------------------------------------------------------


def kohya(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """What kohya's trainer writes into its files, by its own recipe."""
    copy = save(tensors, {key: text for key, text in metadata.items() if key.startswith("ss_")})
    legacy = sha256(copy[0x100000:0x110000])[:8]
    return {"sshs_model_hash": sha256(data_of(copy)), "sshs_legacy_hash": legacy}


LORA = {
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.arange(300_000.0),
    "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(4.0),
}
TRAINING = {"ss_network_dim": "8", "ss_comment": "größer \x1b[31m", "modelspec.title": "x" * 999}


def test_the_hashes_of_kohyas_trainer_are_checked(tmp_path: Path) -> None:
    metadata = TRAINING | kohya(LORA, TRAINING)
    path = write_tensors(tmp_path / "l.safetensors", LORA, metadata)

    embedded = hash_source(path).embedded

    assert [(one.key, one.verdict) for one in embedded] == [
        ("sshs_model_hash", "same"),
        ("sshs_legacy_hash", "same"),
    ]


def test_hashes_of_something_else_are_told_apart(tmp_path: Path) -> None:
    changed = LORA | {next(iter(LORA)): torch.arange(300_000.0) + 1}
    metadata = TRAINING | kohya(LORA, TRAINING) | {"modelspec.hash_sha256": "0x" + "ab" * 32}
    path = write_tensors(tmp_path / "l.safetensors", changed, metadata)

    embedded = hash_source(path).embedded

    assert [one.verdict for one in embedded] == ["differs", "differs", "differs"]
    assert all("changed" in one.reason for one in embedded)


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (EMPTY_SHA256, "hash of nothing"),
        ("0x" + EMPTY_SHA256.upper(), "hash of nothing"),
        (EMPTY_SHA256[:12], "hash of nothing"),
        ("0x" + "0" * 64, "never filled in"),
        ("yes", "not a hash"),
        ("", "not a hash"),
    ],
)
def test_the_bogus_hashes_of_the_wild_are_named(tmp_path: Path, stored: str, reason: str) -> None:
    path = write_tensors(tmp_path / "l.safetensors", LORA, {"sshs_model_hash": stored})

    (one,) = hash_source(path).embedded

    assert one.verdict == "bogus"
    assert reason in one.reason


def test_a_small_file_may_have_the_legacy_hash_of_nothing(tmp_path: Path) -> None:
    tensors = {"lora_unet_x.alpha": torch.ones(1)}
    path = write_tensors(tmp_path / "l.safetensors", tensors, kohya(tensors, {}))

    assert [one.verdict for one in hash_source(path).embedded] == ["same", "same"]


def test_a_legacy_hash_of_an_unknown_layout_is_not_judged(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2, dtype=torch.float16), "a": torch.ones(2, dtype=torch.float16)}
    path = tmp_path / "l.safetensors"
    path.write_bytes(in_given_order(tensors, {"sshs_legacy_hash": "12345678"}))
    index = tmp_path / "s.safetensors.index.json"
    save_file({"c": torch.ones(1)}, tmp_path / "two.safetensors")
    save_file({"d": torch.ones(1)}, tmp_path / "one.safetensors",
              metadata={"sshs_legacy_hash": "12345678"})  # fmt: skip
    index.write_text(json.dumps({"weight_map": {"d": "one.safetensors", "c": "two.safetensors"}}))

    for source in (path, index):
        (one,) = hash_source(source).embedded
        assert (one.verdict, one.computed) == ("unchecked", "")


def test_a_merge_writes_the_right_hash(tmp_path: Path, sd1_models: tuple[Path, Path, Path]) -> None:
    a, b, _ = sd1_models
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{A: {a}, B: {b}}}\nmerge: A * 0.5 + B * 0.5\n"
        "output: {path: o.safetensors, shard_size: 1MB}\n"
    )
    assert run(["merge", str(recipe), "-q"]) == 0

    found = hash_source(tmp_path / "o.safetensors.index.json")

    assert len(found.files) > 1
    assert [(one.key, one.verdict) for one in found.embedded] == [("modelspec.hash_sha256", "same")]


# --- the cache -----------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return aged(write_model(tmp_path / "s.safetensors", {"w": TensorSpec("w", "F16", (64,))},
                            seed=1, metadata={"modelspec.hash_sha256": "0x1"}))  # fmt: skip


def test_a_file_is_read_once(small: Path) -> None:
    first = hash_source(small)
    second = hash_source(small)

    assert (first.cached, second.cached) == (False, True)
    assert first.files == second.files
    assert (first.components, first.content) == (second.components, second.content)
    assert first.embedded == second.embedded
    assert not hash_source(small, use_cache=False).cached


def test_a_file_that_is_still_young_is_not_remembered(small: Path, own_cache: Path) -> None:
    os.utime(small)

    hash_source(small)

    assert not own_cache.exists()


def rewritten(path: Path) -> None:
    """Other bytes of the same length, at the same time."""
    path.write_bytes(path.read_bytes()[:-1] + b"\x7b")
    aged(path)


def replaced(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes()[:-1] + b"\x7b")
    aged(other).replace(path)


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    aged(path)


def touched(path: Path) -> None:
    os.utime(path, (LONG_AGO + 1, LONG_AGO + 1))


@pytest.mark.parametrize("change", [rewritten, replaced, lengthened, touched])
def test_a_changed_file_is_read_again(small: Path, change: types.FunctionType) -> None:
    hash_source(small)
    change(small)

    found = hash_source(small)

    assert not found.cached
    assert found.files[0].sha256 == sha256(small.read_bytes())


def entry(own_cache: Path) -> Path:
    (file,) = own_cache.iterdir()
    return file


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000,
        b'{"schema": "ckptools.hash-cache/2"}',
    ],
)  # fmt: skip
def test_a_broken_entry_is_ignored_and_replaced(
    small: Path, own_cache: Path, content: bytes
) -> None:
    hash_source(small)
    entry(own_cache).write_bytes(content)

    assert not hash_source(small).cached
    assert hash_source(small).cached


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", "0.0.0"), ("stamps", []), ("hashes", {}),
        ("sha256", "<script>"), ("sha256", 7), ("sha256_data", "?"), ("nbytes", "many"),
    ],
)  # fmt: skip
def test_an_entry_that_we_did_not_write_is_ignored(
    small: Path, own_cache: Path, key: str, value: object
) -> None:
    hash_source(small)
    document = json.loads(entry(own_cache).read_text())
    (document if key in document else document["hashes"]["files"][0])[key] = value
    entry(own_cache).write_text(json.dumps(document))

    assert not hash_source(small).cached


def test_a_cache_that_cannot_be_written_to_is_no_reason_to_fail(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert not hash_source(small).cached
    assert not hash_source(small).cached

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None
    assert not hash_source(small).cached


def test_a_full_disk_leaves_no_part_of_an_entry(
    small: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)

    assert hash_source(small).files[0].sha256 == sha256(small.read_bytes())
    assert list(own_cache.iterdir()) == []


def test_processes_may_share_the_cache(small: Path, own_cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: hash_source(small), range(32)))

    assert {one.content for one in found} == {found[0].content}
    assert entry(own_cache).suffix == ".json"
    assert hash_source(small).cached


@pytest.mark.parametrize(
    ("system", "platform", "environment", "expected"),
    [
        ("posix", "linux", {}, "HOME/.cache/ckptools"),
        ("posix", "linux", {"XDG_CACHE_HOME": "/x"}, "/x/ckptools"),
        ("posix", "linux", {"XDG_CACHE_HOME": "relative"}, "HOME/.cache/ckptools"),
        ("posix", "darwin", {}, "HOME/Library/Caches/ckptools"),
        ("nt", "win32", {}, "HOME/AppData/Local/ckptools"),
        ("nt", "win32", {"LOCALAPPDATA": "/local"}, "/local/ckptools"),
    ],
)
def test_the_cache_lies_where_the_platform_wants_it(
    monkeypatch: pytest.MonkeyPatch,
    system: str,
    platform: str,
    environment: dict[str, str],
    expected: str,
) -> None:
    home = Path.home()
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(Path, "home", lambda: home)
    fake_os = types.SimpleNamespace(name=system, environ=os.environ)
    monkeypatch.setattr(hashing, "os", fake_os)
    monkeypatch.setattr(hashing, "sys", types.SimpleNamespace(platform=platform))

    assert str(cache_folder()) == expected.replace("HOME", str(home))


# --- faults --------------------------------------------------------------------------------------


def test_a_file_that_changes_while_it_is_hashed_is_an_input_error(
    small: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    streamed = hashing.stream_file

    def meddle(*arguments: object) -> None:
        streamed(*arguments)  # type: ignore[arg-type]
        touched(small)

    monkeypatch.setattr(hashing, "stream_file", meddle)

    with pytest.raises(InputError, match="changed while"):
        hash_source(small)
    assert not own_cache.exists()


def test_an_error_in_a_lane_is_raised_and_leaves_no_thread(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    before = threading.active_count()

    def broken(data: memoryview, offset: int) -> None:
        raise ArithmeticError("a lane broke")

    with pytest.raises(ArithmeticError, match="a lane broke"):
        hashing.stream_file(path, 100, [broken], lambda nbytes: None)
    assert threading.active_count() == before


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "big"
    with path.open("wb") as stream:
        stream.truncate(150_000_000)
    tracemalloc.start()
    try:
        found = hash_source(path, use_cache=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert found.files[0].nbytes == 150_000_000
    assert peak < (hashing.BUFFERS + 2) * hashing.CHUNK


# --- the command ---------------------------------------------------------------------------------


def test_one_source_has_the_contract_keys(capsys: pytest.CaptureFixture[str], small: Path) -> None:
    assert run(["hash", str(small), "--json"]) == 0

    document = json.loads(capsys.readouterr().out)

    assert document["schema"] == "ckptools.hash/1"
    content = small.read_bytes()
    assert document["sha256"] == sha256(content)
    assert document["autov2"] == sha256(content)[:10]
    assert document["autov3"] == sha256(data_of(content))[:12]
    assert document["modelspec"] == "0x" + sha256(data_of(content))
    assert set(document) >= {"autov1", "crc32", "components", "embedded", "sources"}
    assert document["embedded"][0]["verdict"] == "differs"


def test_several_sources_are_listed(capsys: pytest.CaptureFixture[str], small: Path) -> None:
    other = small.with_name("text.txt")
    other.write_text("hello")
    assert run(["hash", str(small), str(other), "--json", "--no-cache"]) == 0

    document = json.loads(capsys.readouterr().out)

    assert [source["sha256"] for source in document["sources"]] == [
        sha256(item.read_bytes()) for item in (small, other)
    ]
    assert "sha256" not in document


def test_people_see_every_hash_and_what_is_wrong(
    capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path
) -> None:
    index = tmp_path / "m.safetensors.index.json"
    save_file({"c": torch.ones(1)}, tmp_path / "two.safetensors")
    index.write_text(json.dumps({"weight_map": {"w": small.name, "c": "two.safetensors"}}))

    assert run(["hash", str(small), str(index), "-q"]) == 0
    assert run(["hash", str(small.with_name("two.safetensors"))]) == 0

    shown = capsys.readouterr().out
    assert sha256(small.read_bytes()) in shown
    assert "modelspec.hash_sha256 in its metadata: differs: " in shown
    assert "two.safetensors: " in shown
    assert "of nothing" in shown


def test_a_missing_file_exits_with_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["hash", str(tmp_path / "none"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "input"


# --- other formats -------------------------------------------------------------------------------


def test_a_pickle_and_a_folder_hold_the_same_components(
    tmp_path: Path, model: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    """Views that share or transpose their values are read after the stream."""
    _, tensors = model
    square = next(n for n, t in tensors.items() if t.ndim == 2 and t.shape[0] == t.shape[1] > 1)
    changed = tensors | {square: tensors[square].T, "twice": tensors[square]}
    ckpt = tmp_path / "m.ckpt"
    torch.save({"state_dict": changed}, ckpt)
    plain = write_tensors(
        tmp_path / "p.safetensors", {n: t.contiguous().clone() for n, t in changed.items()}
    )

    one, two = (hash_source(item, use_cache=False) for item in (ckpt, plain))

    assert one.components == two.components
    assert one.content == two.content
    assert one.modelspec is None
    assert one.files[0].sha256 == sha256(ckpt.read_bytes())


def test_a_diffusers_folder_hashes_like_the_single_file_it_was(tmp_path: Path) -> None:
    single = tmp_path / "s.safetensors"
    write_model(single, shrunk("sd2"), seed=3)
    folder = tmp_path / "folder"
    assert run(["convert", str(single), str(folder), "-q"]) == 0

    one, two = (hash_source(item) for item in (single, folder))

    assert len(two.files) > 1
    assert one.components["unet"] == two.components["unet"]
    assert one.components["vae"] == two.components["vae"]
