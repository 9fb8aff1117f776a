"""`ckptools lock` and `merge --locked`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hub_sources import hub_in
from loopback_hub import LoopbackHub

from ckptools.cli import run
from ckptools.errors import UsageError
from ckptools.hub.lock import read_lock

Models = tuple[Path, Path, Path]
TINY = Path(__file__).parents[1] / "ckptools" / "tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with hub_in(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def recipe(hub: LoopbackHub, sd1_models: Models, tmp_path: Path) -> Path:
    """A from the Hub's main branch, B beside the recipe, C by an absolute path."""
    hub.put("alice/a", {"sub/model.safetensors": sd1_models[0]}, private=False)
    shutil.copy(sd1_models[1], tmp_path / "b.safetensors")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"ckptools: 1\nmodels: {{A: hf://alice/a, B: ./b.safetensors, C: {sd1_models[2]}}}\n"
        "params: {M: 0.5}\nmerge: A + (B - C) * M\noutput: {path: out.safetensors}\n"
    )
    return path


def lock_of(recipe: Path) -> Path:
    return recipe.with_name("recipe.lock.yaml")


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    error = json.loads(capsys.readouterr().out)["error"]
    assert isinstance(error, dict)
    return error


def data_hash(recipe: Path) -> str:
    manifest = json.loads((recipe.parent / "out.safetensors.ckptools.json").read_text())
    return str(manifest["outputs"][0]["sha256_data"])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_lock_names_every_file_by_commit_sha256_and_size(
    hub: LoopbackHub, recipe: Path, sd1_models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["lock", str(recipe), "--json"]) == 0

    shown = json.loads(capsys.readouterr().out)
    document = yaml.safe_load(lock_of(recipe).read_text())
    commit = hub.repos["alice/a"].branches["main"]
    size = sd1_models[0].stat().st_size
    assert document["models"] == shown["models"]
    assert document["models"] == {
        "A": {
            "path": "hf://alice/a", "commit": commit, "file": "sub/model.safetensors",
            "files": [
                {"name": "model.safetensors", "bytes": size, "sha256": sha256(sd1_models[0])}
            ],
        },
        "B": {
            "path": "./b.safetensors",
            "files": [{"name": "b.safetensors", "bytes": size, "sha256": sha256(sd1_models[1])}],
        },
        "C": {
            "path": "C.safetensors",
            "files": [{"name": "C.safetensors", "bytes": size, "sha256": sha256(sd1_models[2])}],
        },
    }  # fmt: skip
    assert str(recipe.parent) not in lock_of(recipe).read_text()
    assert str(sd1_models[2].parent) not in lock_of(recipe).read_text()
    assert hub.requests("GET", "/cdn/") == []  # nothing was downloaded
    assert sorted(p.name for p in recipe.parent.glob("recipe*")) == [
        "recipe.lock.yaml", "recipe.yaml",
    ]  # fmt: skip


def test_a_file_that_is_no_lock_is_left_alone(
    hub: LoopbackHub, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock_of(recipe).write_text("my notes")

    assert run(["lock", str(recipe)]) == 2
    assert "in the lock's place, and no lock" in capsys.readouterr().err
    assert lock_of(recipe).read_text() == "my notes"
    lock_of(recipe).unlink()
    for _ in range(2):
        assert run(["lock", str(recipe), "-q"]) == 0


def test_a_locked_merge_stays_with_its_commit_when_the_branch_moves(
    hub: LoopbackHub, recipe: Path, sd1_models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["lock", str(recipe), "-q"]) == 0
    assert run(["merge", str(recipe), "-q"]) == 0
    first = data_hash(recipe)
    old = hub.repos["alice/a"].branches["main"]
    hub.put("alice/a", {"sub/model.safetensors": sd1_models[1]}, private=False)

    assert run(["merge", str(recipe), "-q", "--force", "--locked"]) == 0
    assert data_hash(recipe) == first
    manifest = json.loads((recipe.parent / "out.safetensors.ckptools.json").read_text())
    assert manifest["recipe"]["models"]["A"]["path"].endswith(f"@{old}")
    assert run(["merge", str(recipe), "-q", "--force"]) == 0
    assert data_hash(recipe) != first
    assert run(["lock", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "recipe.lock.yaml" in out
    assert hub.repos["alice/a"].branches["main"][:12] in out


def longer(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


OTHERS: list[tuple[str, Callable[[Path], None], str]] = [
    ("no lock", lambda r: lock_of(r).unlink(), "there is no lock"),
    ("recipe", lambda r: longer(r, "# more\n"), "the recipe changed since it was locked"),
    ("values", lambda r: flipped(r.parent / "b.safetensors"), "B is not the pinned file"),
    (
        "size",
        lambda r: shutil.copy(TINY / "A.safetensors", r.parent / "b.safetensors") and None,
        "B is not the locked model: 'b.safetensors' has",
    ),
    (
        "commit",
        lambda r: lock_of(r).write_text(
            lock_of(r).read_text().replace("commit: ", f"commit: {'a' * 40} # ")
        ) and None,
        "no revision",
    ),
    ("nonsense", lambda r: lock_of(r).write_text("[1]") and None, "this is not a lock"),
    ("not YAML", lambda r: lock_of(r).write_text("{") and None, "this is not a lock"),
    (
        "traversal",
        lambda r: lock_of(r).write_text(
            lock_of(r).read_text().replace("name: b.saf", "name: ../b.saf")
        ) and None,
        "this is not a lock",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "what"), [row[1:] for row in OTHERS],
                         ids=[row[0] for row in OTHERS])  # fmt: skip
def test_a_locked_merge_refuses_anything_else(
    recipe: Path, change: Callable[[Path], None], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["lock", str(recipe), "-q"]) == 0
    change(recipe)

    assert run(["merge", str(recipe), "--locked", "--json"]) == 2

    error = said(capsys)
    assert what in error["message"]
    assert error["fix"]
    assert not (recipe.parent / "out.safetensors").exists()


def test_a_file_of_the_hub_that_is_not_the_locked_one_is_refused_before_the_download(
    hub: LoopbackHub, recipe: Path, sd1_models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["lock", str(recipe), "-q"]) == 0
    text = lock_of(recipe).read_text()
    lock_of(recipe).write_text(text.replace(sha256(sd1_models[0]), "a" * 64))

    assert run(["merge", str(recipe), "--locked", "--json"]) == 2

    assert "is not the pinned file" in said(capsys)["message"]
    assert hub.requests("GET", "/cdn/") == []


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (("ckptools-lock",), 2),
        (("recipe", "sha256"), 12),
        (("models", "A", "commit"), 0),
        (("models", "A", "commit"), "main"),
        (("models", "A", "file"), "../x.safetensors"),
        (("models", "A", "files"), []),
        (("models", "B", "files", 0, "sha256"), 10**63),
        (("models", "B", "files", 0, "sha256"), ""),
        (("models", "B", "files", 0, "bytes"), "many"),
        (("models", "B", "files", 0, "name"), 3),
    ],
)
def test_a_lock_that_was_edited_into_nonsense_is_refused(
    recipe: Path, part: tuple[str | int, ...], value: object
) -> None:
    assert run(["lock", str(recipe), "-q"]) == 0
    document = yaml.safe_load(lock_of(recipe).read_text())
    place = document
    for key in part[:-1]:
        place = place[key]
    place[part[-1]] = value
    lock_of(recipe).write_text(yaml.safe_dump(document))

    with pytest.raises(UsageError, match="this is not a lock"):
        read_lock(recipe)


def test_a_lock_that_takes_a_model_elsewhere_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["lock", str(recipe), "-q"]) == 0
    document = yaml.safe_load(lock_of(recipe).read_text())
    document["models"]["B"] = document["models"]["A"]
    lock_of(recipe).write_text(yaml.safe_dump(document))

    assert run(["merge", str(recipe), "--locked", "--json"]) == 2
    assert "the lock names another model" in said(capsys)["message"]


def test_set_and_locked_exclude_each_other(recipe: Path) -> None:
    assert run(["lock", str(recipe), "-q"]) == 0

    assert run(["merge", str(recipe), "--locked", "--set", "M=1", "-q"]) == 2


def test_a_lock_of_a_recipe_with_other_models_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["lock", str(recipe), "-q"]) == 0
    document = yaml.safe_load(lock_of(recipe).read_text())
    document["models"]["D"] = document["models"].pop("C")
    lock_of(recipe).write_text(yaml.safe_dump(document))

    assert run(["merge", str(recipe), "--locked", "--json"]) == 2
    assert "the lock names other models" in said(capsys)["message"]


def test_folders_and_adapters_are_locked_file_by_file(
    hub: LoopbackHub, sd1_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    assert run(["convert", str(TINY / "A.safetensors"), str(folder), "-q"]) == 0
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    hub.put("alice/d", files, private=False)
    hub.put("alice/l", {"glow.safetensors": TINY / "glow.safetensors"}, private=False)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "ckptools: 1\nmodels: {A: hf://alice/d, B: folder}\nmerge: A * 0.5 + B * 0.5\n"
        "loras: [hf://alice/l]\noutput: {path: out.safetensors}\n"
    )

    assert run(["lock", str(path), "-q"]) == 0
    lock = read_lock(path)
    local, remote = lock.models["B"].files, lock.models["A"].files
    assert remote == local
    assert len(local) >= 3
    assert [file.name for file in lock.models["loras[0]"].files] == ["glow.safetensors"]
    assert run(["merge", str(path), "--locked", "-q"]) == 0
    weights = next(p for p in sorted(folder.rglob("*.safetensors")) if p.parent.name == "vae")
    flipped(weights)
    assert run(["merge", str(path), "--locked", "--force", "--json"]) == 2
    assert "the sha256 of 'vae/" in said(capsys)["message"]
    weights.unlink()
    assert run(["merge", str(path), "--locked", "--force", "--json"]) == 2


def test_what_cannot_be_locked_is_named_for_every_model(
    hub: LoopbackHub, tmp_path: Path, sd1_models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"ckptools: 1\nmodels: {{A: hf://alice/none, B: none.safetensors, "
        f"C: {{path: {sd1_models[2]}, sha256: {'0' * 64}}}}}\n"
        "merge: A + (B - C)\noutput: {path: out.safetensors}\n"
    )

    assert run(["lock", str(path), "--json"]) == 4

    error = said(capsys)
    messages = [error["message"], *(one["message"] for one in error["others"])]  # type: ignore[attr-defined]
    assert [message[:9] for message in messages] == ["model 'A'", "model 'B'", "model 'C'"]
    assert not lock_of(path).exists()


def test_a_missing_lock_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_lock(tmp_path / "recipe.yaml")

    assert "ckptools lock" in caught.value.fix
