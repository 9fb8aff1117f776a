"""`ckptools reproduce`: the same merge again, from its manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_sources import hub_in
from loopback_hub import LoopbackHub

from ckptools.checkpoint import read_header
from ckptools.cli import run
from ckptools.errors import InputError
from ckptools.reproduce import reproduce

Models = tuple[Path, Path, Path]


@pytest.fixture
def merged(tmp_path: Path, sd1_models: Models) -> Path:
    """The manifest of a merge whose models lie beside it."""
    for path in sd1_models:
        shutil.copy(path, tmp_path / path.name)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "ckptools: 1\nmodels: {A: A.safetensors, B: B.safetensors, C: C.safetensors}\n"
        'params: {M: {default: 0.3, "IN00-IN03": 0.8, vae: 0}}\n'
        "let: {d: B - C}\nmerge: A + d * M\n"
        "output: {path: out.safetensors, dtype: {default: fp16, vae: fp32}, metadata: {mine: x}}\n"
    )
    assert run(["merge", str(recipe), "-q", "--hash-inputs"]) == 0
    recipe.unlink()
    return tmp_path / "out.safetensors.ckptools.json"


def edited(manifest: Path, **changes: object) -> Path:
    document = json.loads(manifest.read_text())
    for dotted, value in changes.items():
        part = document
        *way, last = dotted.split("__")
        for key in way:
            part = part[int(key) if key.isdigit() else key]
        part[int(last) if last.isdigit() else last] = value
    manifest.write_text(json.dumps(document))
    return manifest


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_a_merge_is_the_same_file_again(
    merged: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run(["reproduce", str(merged), "--json"]) == 0

    found = answer(capsys)
    assert found["same"] is found["same_data"] is found["same_file"] is True
    assert found["first_difference"] is None
    assert found["notes"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert run(["reproduce", str(merged)]) == 0
    assert "out.safetensors: the same file" in capsys.readouterr().out


def test_a_file_that_was_damaged_since_is_told(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = merged.parent / "out.safetensors"
    whole = original.read_bytes()
    original.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    assert run(["reproduce", str(merged)]) == 1
    assert "the file beside the manifest is another now" in capsys.readouterr().out
    original.unlink()
    assert run(["reproduce", str(merged)]) == 0
    assert "the same file as the manifest tells of" in capsys.readouterr().out


def test_a_damaged_original_is_told_whatever_its_header_says(merged: Path) -> None:
    """As that of another version of ckptools, which has another header around the same data."""
    original = merged.parent / "out.safetensors"
    raw = original.read_bytes()
    nbytes = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + nbytes].replace(b'"mine":"x"', b'"mine":"y"')
    original.write_bytes(raw[:8] + header + raw[8 + nbytes :])
    edited(merged, outputs__0__header_sha256=read_header(original).sha256)
    for data, first in ((raw[8 + nbytes :], ""), (raw[8 + nbytes : -1] + b"\x01", ": byte ")):
        original.write_bytes(raw[:8] + header + data)
        found = reproduce(merged)
        assert found.same_data
        assert first in found.first
        assert found.same is not bool(first)
    original.write_bytes(raw)  # not the manifest's by its header
    assert not reproduce(merged).same


def test_every_shard_and_their_index_are_compared(sd1_models: Models, tmp_path: Path) -> None:
    a, b, _ = (shutil.copy(path, tmp_path / path.name) for path in sd1_models)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{A: {a}, B: {b}}}\nmerge: A * 0.5 + B * 0.5\n"
        "output: {path: s.safetensors, shard_size: 1MB}\n"
    )
    assert run(["merge", str(recipe), "-q"]) == 0
    manifest = tmp_path / "s.safetensors.ckptools.json"
    assert reproduce(manifest).same

    whole = manifest.read_text()
    document = json.loads(whole)
    document["outputs"] = document["outputs"][:1]
    manifest.write_text(json.dumps(document))
    assert not reproduce(manifest).same
    manifest.write_text(whole)
    (tmp_path / "s.safetensors.index.json").write_text('{"weight_map": {}}')
    found = reproduce(manifest)
    assert (found.same_data, found.same, found.outputs[-1].beside) == (True, False, "other")


def test_the_result_is_kept_where_it_is_asked_for(merged: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"

    assert run(["reproduce", str(merged), "-q", "-o", str(kept)]) == 0

    assert sorted(path.name for path in kept.iterdir()) == ["out.safetensors", merged.name]
    original = (tmp_path / "out.safetensors").read_bytes()
    assert (kept / "out.safetensors").read_bytes() == original
    assert (kept / merged.name).read_bytes() == merged.read_bytes()
    assert run(["reproduce", str(merged), "-q", "-o", str(kept)]) == 2  # nothing is replaced
    assert run(["reproduce", str(merged), "-q", "-o", str(merged)]) == 2


def test_another_number_is_another_merge_and_its_first_tensor_is_named(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(merged, recipe__params__M={"default": 0.3, "M00": 0.31})

    assert run(["reproduce", str(merged), "--json"]) == 1

    found = answer(capsys)
    assert found["same"] is found["same_data"] is False
    first = str(found["first_difference"])
    assert ": byte " in first
    (merged.parent / "out.safetensors").unlink()
    assert run(["reproduce", str(merged)]) == 1
    assert "the original is not at hand" in capsys.readouterr().out


def test_shapes_and_names_that_differ_are_named(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(merged, recipe__output__dtype={"default": "bf16"})

    assert run(["reproduce", str(merged)]) == 1

    out = capsys.readouterr().out
    assert "first difference:" in out
    assert "BF16" in out


def test_other_versions_are_a_note(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited(merged, versions__torch="0.1", versions__extra="1")

    assert run(["reproduce", str(merged)]) == 0

    out = capsys.readouterr().out
    assert "note: other versions: " in out
    assert "torch 0.1 then, " in out
    assert "extra 1 then, none now" in out


def test_a_header_that_differs_is_told_and_no_difference(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(merged, recipe__output__metadata={"mine": "y"})

    assert run(["reproduce", str(merged)]) == 0

    out = capsys.readouterr().out
    assert "out.safetensors: the same tensors" in out
    assert "the headers differ" in out


def test_models_that_moved_are_given(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "elsewhere" / "other.safetensors"
    moved.parent.mkdir()
    (tmp_path / "B.safetensors").rename(moved)
    assert run(["reproduce", str(merged), "--json"]) == 2
    error = answer(capsys)["error"]
    assert isinstance(error, dict)
    assert "B, 'B.safetensors', sha256 " in error["message"]
    assert error["fix"] == "give it: --model B=PATH"

    assert run(["reproduce", str(merged), "--json", "--model", f"B={moved}"]) == 0
    assert answer(capsys)["same_file"] is True  # under its old name, which the header repeats


@pytest.mark.parametrize("text", ["B", "B=", "=x"])
def test_a_model_option_that_says_nothing(merged: Path, text: str) -> None:
    assert run(["reproduce", str(merged), "--model", text]) == 2


def test_another_model_is_refused(
    merged: Path, sd1_models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Path(__file__).parents[1] / "ckptools" / "tiny" / "A.safetensors"
    shutil.copy(tiny, merged.parent / "B.safetensors")
    assert run(["reproduce", str(merged)]) == 2
    assert "this is not the B of the merge" in capsys.readouterr().err

    shutil.copy(sd1_models[2], merged.parent / "B.safetensors")
    assert run(["reproduce", str(merged)]) == 2
    assert "B is not the pinned file" in capsys.readouterr().err
    assert run(["reproduce", str(merged), "--model", "Z=x"]) == 2


HOSTILE: list[tuple[dict[str, object], int]] = [
    ({"recipe__models__A__path": "../A.safetensors"}, 3),
    ({"recipe__models__A__path": "/etc/A.safetensors"}, 3),
    ({"recipe__output__path": "../out.safetensors"}, 3),
    ({"outputs__0__file": "../../out.safetensors"}, 3),
    ({"outputs__0__file": ".."}, 3),
    ({"schema": "ckptools.manifest/9"}, 2),
    ({"outputs": []}, 2),
    ({"outputs": [{}]}, 2),
    ({"recipe": 1}, 2),
    ({"recipe__models": [1]}, 2),
    ({"recipe__oops": 1}, 2),
    ({"recipe__models__A__path": "hf://alice/a@main"}, 2),
]


@pytest.mark.parametrize(("changes", "code"), HOSTILE)
def test_a_manifest_that_asks_for_more_is_refused(
    merged: Path, changes: dict[str, object], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(merged, **changes)

    assert run(["reproduce", str(merged), "--json"]) == code

    error = answer(capsys)["error"]
    assert isinstance(error, dict)
    assert error["fix"]


def test_a_manifest_that_would_draw_merges_and_nothing_else(merged: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    render = {"when": "after_save", "folder": str(target), "steps": 1}
    edited(merged, recipe__render=render, recipe__publish={"repo": "bob/m"})

    assert reproduce(merged).same
    assert not target.exists()


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_no_manifest_is_said_to_be_none(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.ckptools.json"
    path.write_bytes(raw)

    assert run(["reproduce", str(path), "-q"]) == 2


def test_an_original_with_other_tensors_is_named(merged: Path) -> None:
    """The original is the merge; what the edited recipe gives has a tensor less, or one more."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = merged.parent
    tensors = load_file(folder / "A.safetensors")
    name = min(tensors)
    for extra in (True, False):
        changed = dict(tensors)
        if extra:
            changed[f"{name}_"] = torch.zeros(3, dtype=torch.float16)
        else:
            del changed[name]
        expected = f"{name}_: not in the original" if extra else f"{name}: not in the repetition"
        save_file(changed, folder / "A.safetensors")
        document = json.loads(merged.read_text())
        document["recipe"]["models"]["A"].pop("sha256", None)
        document["inputs"][0].pop("header_sha256", None)
        merged.write_text(json.dumps(document))

        assert reproduce(merged).first == expected


# --- on the Hub --------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with hub_in(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def published(hub: LoopbackHub, sd1_models: Models, tmp_path: Path) -> LoopbackHub:
    """bob/m: a merge of alice/a and alice/b, with its manifest."""
    for name, path in zip("ab", sd1_models[:2], strict=True):
        hub.put(f"alice/{name}", {"model.safetensors": path}, private=False)
    recipe = tmp_path / "work" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text(
        "ckptools: 1\nmodels: {A: hf://alice/a, B: hf://alice/b}\nmerge: A * 0.5 + B * 0.5\n"
        "output: {path: out.safetensors, shard_size: 1MB}\n"
    )
    assert run(["merge", str(recipe), "-q"]) == 0
    files = {path.name: path for path in recipe.parent.iterdir()}
    assert len(files) > 3
    hub.put("bob/m", files, private=False)
    shutil.rmtree(recipe.parent)
    return hub


def test_a_published_merge_is_reproduced_from_its_parents_commits(
    published: LoopbackHub, sd1_models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    published.put("alice/a", {"model.safetensors": sd1_models[2]}, private=False)

    assert run(["reproduce", "hf://bob/m", "--json"]) == 0

    found = answer(capsys)
    assert found["same_file"] is True
    assert str(found["manifest"]).startswith("hf://bob/m/out.safetensors.ckptools.json@")
    assert not published.requests("GET", r"bob/m/resolve/.*safetensors$")  # only if it differs


def test_a_published_merge_that_is_not_what_its_manifest_says(
    published: LoopbackHub, tmp_path: Path
) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(published.content("bob/m", "out.safetensors.ckptools.json"))
    edited(path, recipe__merge="A * 0.25 + B * 0.75")
    published.put("bob/m", {"out.safetensors.ckptools.json": path}, private=False)

    found = reproduce(Path("hf://bob/m"))

    assert not found.same
    assert ": byte " in found.first


def test_a_repository_without_a_manifest(
    published: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["reproduce", "hf://alice/a"]) == 2
    assert "no files that end in '.ckptools.json'" in capsys.readouterr().err


def test_a_manifest_that_is_too_large_is_not_fetched(
    published: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptools.reproduce.MAX_MANIFEST_BYTES", 1000)
    before = len(published.requests("GET", "/resolve/"))

    with pytest.raises(InputError, match="1,000 are read at most of such a file"):
        reproduce(Path("hf://bob/m"))
    assert len(published.requests("GET", "/resolve/")) == before


def test_a_parent_that_is_another_file_now_is_refused(
    published: LoopbackHub, tmp_path: Path
) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(published.content("bob/m", "out.safetensors.ckptools.json"))
    document = json.loads(path.read_text())
    document["inputs"][0]["header_sha256"] = "0" * 64
    path.write_text(json.dumps(document))

    assert run(["reproduce", str(path), "-q"]) == 2
