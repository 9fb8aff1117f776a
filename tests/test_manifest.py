"""What a merge says about itself, inside the file and beside it: true, repeatable, private."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors
import torch
from models import shrunk, with_channels, write_model
from safetensors import safe_open

from ckptools.errors import OutputError
from ckptools.manifest import HASH_KEY, names_local_path, versions
from ckptools.recipe import load_recipe
from ckptools.sources import open_checkpoint
from ckptools.workflow import MergeResult, merge
from ckptools.writer import MANIFEST_SCHEMA, PartFile, manifest_path

Metadata = dict[str, str]


@dataclass(frozen=True)
class Merged:
    """A finished merge as anybody can see it."""

    output: Path
    metadata: Metadata
    manifest: dict[str, object]
    result: MergeResult

    def json(self, key: str) -> object:
        return json.loads(self.metadata[key])


def recipe_text(
    models: Mapping[str, object], *, merge_line: str = "A * 0.75 + B * 0.25", **more: object
) -> str:
    """A recipe as JSON, which is YAML, too."""
    document = {"ckptools": 1, "models": models, "merge": merge_line, "output": {}} | more
    document["output"] = {"path": "out/merged.safetensors"} | dict(document["output"])
    return json.dumps(document)


def merged(folder: Path, text: str, *, hash_inputs: bool = False, threads: int = 2) -> Merged:
    recipe = folder / "recipe.yaml"
    recipe.write_text(text)
    result = merge(load_recipe(recipe), hash_inputs=hash_inputs, threads=threads)
    first = sorted(result.output.parent.glob("*.safetensors"))[0]
    with safe_open(str(first), framework="np") as opened:
        metadata = dict(opened.metadata())
    manifest = json.loads(result.manifest.read_text(encoding="utf-8"))
    return Merged(result.output, metadata, manifest, result)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def data_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def model(path: Path, seed: int, metadata: Mapping[str, str] | None = None) -> Path:
    return write_model(path, shrunk("sd1"), seed=seed, metadata=metadata)


BASE_METADATA = {
    "format": "pt",
    "note": "trained with care, see https://example.org/models/a",
    "modelspec.author": "Somebody",
    "modelspec.license": "CreativeML Open RAIL-M",
    "modelspec.title": "Painterly",
    "modelspec.date": "2023-01-01",
    "modelspec.thumbnail": "data:image/png;base64,AAAA",
    "modelspec.hash_sha256": "0x" + "ab" * 32,
    "modelspec.architecture": "something-else",
    "modelspec.merged_from": "X, Y",
    "sd_merge_recipe": '{"type":"older"}',
    "sshs_model_hash": "cd" * 32,
    "sshs_legacy_hash": "12345678",
    "ckptools.recipe": "{}",
    "ckptools.version": "0.0.0",
    "ss_output_dir": "/home/somebody/train/out",
    "ss_json": '{"dir": "C:\\\\Users\\\\Somebody\\\\x"}',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A (with metadata of many kinds), B and C. Do not change."""
    folder = tmp_path_factory.mktemp("models")
    model(folder / "A.safetensors", 1, BASE_METADATA)
    model(folder / "B.safetensors", 2)
    model(folder / "C.safetensors", 3)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """A and B merged, with absolute paths in the recipe, inputs hashed, and warnings."""
    models = {name: str(folder / f"{name}.safetensors") for name in "AB"}
    params = {"M": {"default": 0.25, "IN05": 0.5, "unet": 0.25}}
    text = recipe_text(models, merge_line="A * (1 - M) + B * M", params=params)
    return merged(tmp_path_factory.mktemp("plain"), text, hash_inputs=True)


# --- inside the file -----------------------------------------------------------------------------


def test_the_file_carries_what_modelspec_requires(plain: Merged) -> None:
    """Source: ModelSpec 1.0.1, the fields it says MUST be there, resolution for image models."""
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "merged",
        "modelspec.resolution": "512x512",
        "modelspec.merged_from": "Painterly, B",
    }

    assert {key: plain.metadata[key] for key in expected} == expected


def test_an_inpainting_merge_is_called_one(folder: Path, tmp_path: Path) -> None:
    specs = with_channels(shrunk("sd1"), 9)
    write_model(tmp_path / "I.safetensors", specs, seed=9)
    models = {"I": "I.safetensors", "B": str(folder / "B.safetensors")}

    done = merged(tmp_path, recipe_text(models, merge_line="I * 0.5 + B * 0.5"))

    assert done.metadata["modelspec.architecture"] == "stable-diffusion-v1-inpainting"
    assert done.json("sd_merge_recipe")["is_inpainting"] is True


def test_the_hash_is_that_of_the_data(plain: Merged) -> None:
    digest = sha256(data_of(plain.output))

    assert plain.metadata[HASH_KEY] == f"0x{digest}"
    assert plain.result.sha256_data == digest
    assert plain.manifest["outputs"] == [
        {
            "file": "merged.safetensors",
            "bytes": plain.output.stat().st_size,
            "sha256_data": digest,
            "header_sha256": sha256(
                plain.output.read_bytes()[: -len(data_of(plain.output))],
            ),
        }
    ]


def test_the_hash_of_shards_is_that_of_their_data_in_order(folder: Path, tmp_path: Path) -> None:
    models = {name: str(folder / f"{name}.safetensors") for name in "AB"}
    done = merged(tmp_path, recipe_text(models, output={"shard_size": "1MB"}))

    shards = sorted(done.output.parent.glob("*.safetensors"))
    digest = sha256(b"".join(map(data_of, shards)))
    assert len(shards) >= 3
    assert done.result.sha256_data == digest
    assert [row["sha256_data"] for row in done.manifest["outputs"]] == [
        sha256(data_of(shard)) for shard in shards
    ]
    for shard in shards:
        with safe_open(str(shard), framework="np") as opened:
            assert opened.metadata()[HASH_KEY] == f"0x{digest}"
    with open_checkpoint(done.output) as opened:
        assert len(opened) == len(shrunk("sd1"))
        assert opened.warnings == ()


def test_metadata_of_the_base_is_kept_and_what_is_no_longer_true_is_not(plain: Merged) -> None:
    metadata = plain.metadata

    for key in ("note", "modelspec.author", "modelspec.license"):
        assert metadata[key] == BASE_METADATA[key]
    assert metadata["format"] == "pt"
    for key in ("modelspec.date", "modelspec.thumbnail", "sshs_model_hash", "sshs_legacy_hash"):
        assert key not in metadata
    for key in (HASH_KEY, "modelspec.title", "modelspec.architecture", "modelspec.merged_from",
                "sd_merge_recipe", "ckptools.recipe", "ckptools.version"):  # fmt: skip
        assert metadata[key] != BASE_METADATA[key]
    assert metadata["ckptools.version"] == versions()["ckptools"]


def test_metadata_of_other_models_is_not_taken(folder: Path, tmp_path: Path) -> None:
    models = {name: str(folder / f"{name}.safetensors") for name in "AB"}

    done = merged(tmp_path, recipe_text(models, base="B"))

    assert "note" not in done.metadata
    assert "modelspec.author" not in done.metadata


def test_metadata_of_the_recipe_wins(folder: Path, tmp_path: Path) -> None:
    own = {"note": "mine", "modelspec.title": "Mine"}
    models = {name: str(folder / f"{name}.safetensors") for name in "AB"}

    done = merged(tmp_path, recipe_text(models, output={"metadata": own}))

    assert {key: done.metadata[key] for key in own} == own
    assert done.metadata[HASH_KEY] == f"0x{sha256(data_of(done.output))}"


def test_the_header_keeps_its_place_when_the_hash_is_filled_in(plain: Merged) -> None:
    raw = plain.output.read_bytes()
    length = int.from_bytes(raw[:8], "little")

    assert length % 8 == 0
    assert b"0x" + b"0" * 64 not in raw[: length + 8]
    assert {name for name, _ in safetensors.deserialize(raw)} == set(shrunk("sd1"))


# --- privacy -------------------------------------------------------------------------------------

LOCAL = [
    "/home/me/x.ckpt", "at /home/me/x", "file:///home/me/x", "FILE:/x", "~/models/x", "~me/x",
    r"C:\models\x", "d:/x", r"\\nas\share\x", '{"path":"/mnt/data/x"}', r'{"p":"\/mnt\/data"}',
    "a;/opt/x/y", "<path>/opt/x/y</path>", "(/a/b/c)", "path=/a/b", "[/a/b]", "{/a/b}", "|/a/b",
    "https://x.org and /a/b", json.dumps({"p": r"C:\x\y"}), "`/a/b`", "line\n/a/b", "'~/x'",
    "//nas/share/me/x.ckpt",
]  # fmt: skip
PUBLIC = [
    "", "https://example.org/a/b/c", "and/or/both", "1/2/3", "hf://org/repo/file", "models/x.ckpt",
    "a / b", "A + (B - C) * M", "512x512", "see www.example.org/a/b", "~1.5", "km/h", "4:3", "a:b",
    "iVBOR+/9j/abc", "s3://bucket/a/b", "painterly.safetensors", "/slash", "n/a", "// comment",
]  # fmt: skip


@pytest.mark.parametrize("text", LOCAL)
def test_local_paths_are_told(text: str) -> None:
    assert names_local_path(text)


@pytest.mark.parametrize("text", PUBLIC)
def test_other_texts_are_not_taken_for_paths(text: str) -> None:
    assert not names_local_path(text)


def assert_private(done: Merged, *private: str) -> None:
    header = done.output.read_bytes()[: -len(data_of(done.output))]
    manifest = done.result.manifest.read_bytes()
    assert b"merged" in header
    assert b"merged" in manifest
    for text in private:
        assert text.encode() not in header
        assert text.encode() not in manifest


def test_no_path_of_this_machine_is_written_down(plain: Merged, folder: Path) -> None:
    """The recipe names its models by absolute paths; warnings name the recipe's lines."""
    assert plain.manifest["warnings"]
    assert_private(
        plain, str(folder), str(plain.output.parent.parent), folder.parts[-2], str(Path.home()),
        str(Path.cwd()), "/home/", "C:\\", "Users",
    )  # fmt: skip
    host = socket.gethostname()
    assert host not in json.dumps({k: v for k, v in plain.manifest.items() if k != "recipe"})


def test_private_metadata_of_the_base_is_left_out_and_that_is_told(plain: Merged) -> None:
    for key in ("ss_output_dir", "ss_json"):
        assert key not in plain.metadata
        note = f"metadata {key!r} of A names a local path and is left out"
        assert note in plain.manifest["notes"]
        assert note in plain.result.notes


def test_no_private_text_of_a_source_comes_in_by_another_way(folder: Path, tmp_path: Path) -> None:
    """Titles, resolutions and ancestors are taken from sources, too."""
    secret = "/home/somebody/secret.ckpt"
    ancestor = {"name": secret, "legacy_hash": "x", "sd_merge_recipe": None}
    metadata = {
        "modelspec.title": f"from {secret}",
        "modelspec.implementation": secret,
        "modelspec.resolution": secret,
        "modelspec.prediction_type": secret,
        "sd_merge_models": json.dumps({"abc": ancestor}).replace("/", r"\/"),
        "sd_merge_recipe": json.dumps({"primary": secret}).replace("home", r"\u0068ome"),
    }
    for name, seed in (("A", 1), ("B", 2)):
        model(tmp_path / f"{name}.safetensors", seed, metadata)

    done = merged(tmp_path, recipe_text({"A": "A.safetensors", "B": "B.safetensors"}))

    assert_private(done, "somebody", "secret", str(tmp_path))
    assert done.metadata["modelspec.merged_from"] == "A, B"
    assert done.metadata["modelspec.resolution"] == "512x512"
    assert [row["sd_merge_recipe"] for row in done.json("sd_merge_models").values()] == [None] * 2


# --- ancestry ------------------------------------------------------------------------------------


def legacy(path: Path) -> str:
    """The web UI's oldest hash, as its `model_hash` computes it."""
    return sha256(path.read_bytes()[0x100000 : 0x100000 + 0x10000])[:8]


def test_a_merge_of_merges_names_all_its_ancestors(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    models = {name: str(folder / f"{name}.safetensors") for name in "BC"}
    first = merged(tmp_path / "one", recipe_text(models, merge_line="B * 0.5 + C * 0.5"),
                   hash_inputs=True)  # fmt: skip
    models = {"A": str(folder / "A.safetensors"), "one": str(first.output)}

    second = merged(tmp_path / "two", recipe_text(models, merge_line="A * 0.5 + one * 0.5"),
                    hash_inputs=True)  # fmt: skip

    files = [folder / f"{name}.safetensors" for name in "ABC"] + [first.output]
    ancestors = second.json("sd_merge_models")
    assert set(ancestors) == {sha256(path.read_bytes()) for path in files}
    for path in files:
        row = ancestors[sha256(path.read_bytes())]
        assert row["name"] == path.name
        assert row["legacy_hash"] == legacy(path)
    assert legacy(files[0]) != legacy(files[1])  # the files are long enough for it to tell
    assert ancestors[sha256(first.output.read_bytes())]["sd_merge_recipe"] == first.json(
        "sd_merge_recipe"
    )
    recipe = second.json("sd_merge_recipe")
    assert recipe["primary_model_hash"] == sha256(files[0].read_bytes())
    assert recipe["secondary_model_hash"] == sha256(first.output.read_bytes())
    assert recipe["interp_method"] == "A * 0.5 + one * 0.5"


def test_models_that_were_not_hashed_are_named_by_their_headers(
    folder: Path, tmp_path: Path
) -> None:
    models = {name: str(folder / f"{name}.safetensors") for name in "AB"}

    done = merged(tmp_path, recipe_text(models))

    headers = []
    for name in "AB":
        raw = (folder / f"{name}.safetensors").read_bytes()
        headers.append(sha256(raw[: 8 + int.from_bytes(raw[:8], "little")]))
    assert list(done.json("sd_merge_models")) == [f"header:{digest}" for digest in headers]
    assert [row["header_sha256"] for row in done.manifest["inputs"]] == headers
    assert [row["sha256"] for row in done.manifest["inputs"]] == [None, None]


HOSTILE = [
    "[" * 100_000, '{"a":' * 50_000, '"\\ud800"', '{"\\udfff": 1}', "not json", "[1, 2]", "null",
    "", "1" * 5000, '{"a": {"b": {"c": []}}}', "NaN",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=[text[:12] or "empty" for text in HOSTILE])
def test_strange_ancestry_of_a_source_does_not_stop_a_merge(
    folder: Path, tmp_path: Path, text: str
) -> None:
    metadata = {"sd_merge_models": text, "sd_merge_recipe": text}
    model(tmp_path / "A.safetensors", 1, metadata)
    models = {"A": "A.safetensors", "B": str(folder / "B.safetensors")}

    done = merged(tmp_path, recipe_text(models))

    rows = list(done.json("sd_merge_models").values())
    assert [row["name"] for row in rows if "name" in row][-2:] == [
        "A.safetensors", "B.safetensors",
    ]  # fmt: skip
    json.dumps(rows, allow_nan=False).encode()


# --- the manifest --------------------------------------------------------------------------------


def test_the_manifest_lists_inputs_outputs_and_versions(plain: Merged, folder: Path) -> None:
    manifest = plain.manifest

    assert plain.result.manifest == manifest_path(plain.output)
    assert manifest["schema"] == MANIFEST_SCHEMA
    assert [(row["name"], row["file"], row["family"], row["variant"], row["bytes"], row["sha256"])
            for row in manifest["inputs"]] == [
        (name, path.name, "sd1", "base", path.stat().st_size, sha256(path.read_bytes()))
        for name, path in ((name, folder / f"{name}.safetensors") for name in "AB")
    ]  # fmt: skip
    assert sum(manifest["tensors"].values()) == len(shrunk("sd1"))
    assert manifest["tensors"]["merged"] == len(shrunk("sd1")) - 1  # but for the position ids
    assert manifest["verified"] == {"finite": True, "recomputed": 12}
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0] or (
        manifest["versions"]["torch"] == torch.__version__
    )
    assert manifest["recipe"] == plain.json("ckptools.recipe")


FULL: list[dict[str, object]] = [
    {},
    {"merge_line": "A + (B - A) * M", "params": {"M": {"default": 0.7, "OUT03": 0.3, "vae": 0}}},
    {"merge_line": "A + d * M", "params": {"M": 1e-3}, "let": {"d": "B - A"}, "base": "B"},
    {"merge_line": "A * (1 - M) + B * M", "params": {"M": {"mbw": [n / 26 for n in range(26)]}}},
    {"take": {"vae": "B"}, "output": {"dtype": {"unet": "bf16", "default": "fp32"}}},
    {"output": {"shard_size": "1MB", "metadata": {"note": "mine", "a": "b"}}},
    {"merge_line": "dare(A, B, base=A, density=0.5)", "seed": 7},
    {"merge_line": "A * 300 + B", "allow_nonfinite": True, "output": {"dtype": "fp8_e4m3"}},
]  # fmt: skip


@pytest.mark.parametrize("more", FULL, ids=[",".join(more) or "plain" for more in FULL])
def test_the_recipe_in_the_file_makes_the_same_file_again(
    folder: Path, tmp_path: Path, more: dict[str, object]
) -> None:
    """Its pins hold, its names are found beside it, and nothing that shaped the file is missing."""
    again = tmp_path / "again"
    again.mkdir()
    for name in "AB":
        (again / f"{name}.safetensors").symlink_to(folder / f"{name}.safetensors")
    models = {name: str(folder / f"{name}.safetensors") for name in "AB"}
    first = merged(tmp_path, recipe_text(models, **more), hash_inputs=True)
    recipe = first.json("ckptools.recipe")
    assert re.fullmatch("[0-9a-f]{64}", recipe["models"]["A"]["sha256"])
    recipe["output"]["path"] = "out/merged.safetensors"

    second = merged(again, json.dumps(recipe))

    one, other = (
        {path.name: path.read_bytes() for path in done.output.parent.iterdir()}
        for done in (first, second)
    )
    assert len(one) >= 2
    assert one == other


def test_two_runs_give_the_same_bytes_wherever_they_run(tmp_path: Path) -> None:
    """Other folders, threads, hash seeds, time zones and dates of files; twice the same bytes."""
    outputs = []
    for number, seed in enumerate(("1", "2")):
        place = tmp_path / f"place{number}" / ("deeper" * number)
        place.mkdir(parents=True)
        for name, value in (("A", 1), ("B", 2)):
            # several metadata keys would be written in a random order by the official library
            path = model(place / f"{name}.safetensors", value, {"one": "1"})
            os.utime(path, (number * 1e9, number * 1e9))
        text = recipe_text(
            {"A": "A.safetensors", "B": "B.safetensors"},
            output={"shard_size": "1MB", "metadata": {f"k{n}": str(n) for n in range(20)}},
        )
        (place / "recipe.yaml").write_text(text)
        command = [sys.executable, "-m", "ckptools", "merge", "-q", "--threads", str(number + 1)]
        environment = os.environ | {"PYTHONHASHSEED": seed, "TZ": f"UTC{number}"}
        subprocess.run([*command, "recipe.yaml"], cwd=place, env=environment, check=True,
                       timeout=120)  # fmt: skip
        outputs.append({path.name: path.read_bytes() for path in (place / "out").iterdir()})

    one, other = outputs
    assert len(one) >= 5  # shards, their index, the manifest
    assert one == other


def test_no_room_for_the_manifest_leaves_the_old_output_and_its_manifest(
    sd1_models: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output takes its name only when everything beside it is on the disk as well."""
    a, b, _ = sd1_models
    recipe = tmp_path / "r.yaml"
    output = tmp_path / "new" / "out.safetensors"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{A: {a}, B: {b}}}\nmerge: 0.5*A + 0.5*B\n"
        f"output: {{path: {output}}}\n"
    )
    merge(load_recipe(recipe))
    before = {path: path.read_bytes() for path in output.parent.iterdir()}
    sync = PartFile.sync

    def full(part: PartFile) -> None:
        if part.layout.path.name.endswith(".json"):
            raise OutputError("the disk is full")
        sync(part)

    monkeypatch.setattr(PartFile, "sync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        merge(load_recipe(recipe), force=True)
    assert {path: path.read_bytes() for path in output.parent.iterdir()} == before

    fresh = tmp_path / "a" / "b" / "out.safetensors"
    text = recipe.read_text().replace(str(output), str(fresh))
    recipe.write_text(text)
    with pytest.raises(OutputError, match="the disk is full"):
        merge(load_recipe(recipe))
    assert not (tmp_path / "a").exists()
