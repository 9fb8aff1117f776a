"""The recipes in `recipes/` and the demo: each runs, on the models that ship with ckptools."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ckptools.checking import check_source
from ckptools.cli import run
from ckptools.family import detect
from ckptools.sources import open_checkpoint
from ckptools.sweep import Draws
from ckptools.workflow import _DEMO

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TINY = ROOT / "ckptools" / "tiny"


def test_there_is_a_recipe_for_every_use() -> None:
    listed = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")

    assert len(RECIPES) >= 13
    assert [path.name for path in RECIPES if f"({path.name})" not in listed] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_gives_a_file_unlike_its_parents(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"

    assert run(["merge", str(recipe), "-q", "-o", str(output)]) == 0

    merged = output.read_bytes()
    assert all(merged != path.read_bytes() for path in TINY.glob("*.safetensors"))
    with open_checkpoint(output) as written:
        is_control = recipe.stem == "transfer-control"
        assert detect(written).family == ("controlnet" if is_control else "sd1")
        assert len(written) == (340 if is_control else 1131)


def test_add_difference_is_what_the_formula_says(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    run(["merge", str(ROOT / "recipes" / "add-difference.yaml"), "-q", "-o", str(output)])
    a, b, c = (load_file(TINY / f"{name}.safetensors") for name in "ABC")
    result = load_file(output)

    for name, values in result.items():
        if values.dtype != np.float16:
            np.testing.assert_array_equal(values, a[name])
            continue
        exact = a[name] + (b[name].astype(float) - c[name]) * 0.8
        np.testing.assert_array_equal(values, exact.astype(np.float16), err_msg=name)


def test_the_inpainting_recipe_takes_nine_channels(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    run(["merge", str(ROOT / "recipes" / "inpainting.yaml"), "-q", "-o", str(output)])
    found = detect(open_checkpoint(output))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    inpainting = load_file(TINY / "I.safetensors")

    assert found.variant == "inpainting"
    np.testing.assert_array_equal(load_file(output)[name][:, 4:], inpainting[name][:, 4:])


@pytest.mark.slow
def test_the_demo_merges_checks_draws_and_sweeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # less of each: what they do in full is for their own tests
    monkeypatch.setattr("ckptools.checking.check_source", partial(check_source, quick=True))
    less = _DEMO.replace("[0, 0.5, 1]", "[0.5]") + "render: {{steps: 6, when: never}}\n"
    monkeypatch.setattr("ckptools.workflow._DEMO", less)
    monkeypatch.setattr("ckptools.sweep.Draws", partial(Draws, steps=4))

    assert run(["demo"]) == 0

    out = capsys.readouterr().out
    told = ["A + (B - C) * M", "wrote", "still work", "verdict: pass", "M=0.5", "report.html"]
    assert [words for words in told if words not in out] == []
    demo = tmp_path / "demo"
    assert (demo / "pastel-outlined.safetensors").is_file()
    for folder in ("pictures", "sweep"):
        assert (demo / folder / "report.html").is_file()
        assert (demo / folder / "sheet.png").is_file()


def test_without_the_render_extra_the_demo_merges_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name)
    )
    monkeypatch.chdir(tmp_path)

    assert run(["demo"]) == 0
    assert run(["demo"]) == 0  # and again

    out = capsys.readouterr().out
    assert "wrote" in out
    assert "pip install 'ckptools[render]', and run this again" in out
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "pastel-outlined.safetensors",
        "pastel-outlined.safetensors.ckptools.json",
        "recipe.yaml",
    ]


@pytest.mark.parametrize("name", ["recipe.yaml", "pastel-outlined.safetensors"])
def test_the_demo_replaces_nothing_but_its_own(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / name
    mine.write_text("mine")

    assert run(["demo", "-o", str(tmp_path)]) == 2
    assert "this is not the demo's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert mine.read_text() == "mine"


def test_an_interrupted_demo_says_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptools.checking.check_source", stop)

    assert run(["demo", "-o", str(tmp_path / "d")]) == 130
    assert f"interrupted; the merge is kept in {tmp_path / 'd'}" in capsys.readouterr().err
    assert (tmp_path / "d" / "pastel-outlined.safetensors").is_file()


@pytest.mark.parametrize("name", ["striped", "glow"])
def test_a_shipped_adapter_fits_the_family_and_is_shown(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, model = str(TINY / f"{name}.safetensors"), str(TINY / "A.safetensors")

    assert run(["lora", "inspect", adapter]) == 0
    assert "rank" in capsys.readouterr().out
    assert run(["lora", "check", adapter, "--against", model]) == 0
    out = capsys.readouterr().out
    assert "unet" in out
    assert "IN04" in out


def test_the_tiny_family_is_what_it_says() -> None:
    """Five models of one layout and their adapters, fp16, finite, of the sizes promised."""
    files = sorted(TINY.glob("*.safetensors"))
    sizes = {path: path.stat().st_size for path in TINY.rglob("*") if path.is_file()}

    stems = ["A", "B", "C", "I", "U", "control", "glow", "striped"]
    assert [path.stem for path in files] == stems
    assert sum(sizes.values()) <= 34_000_000
    assert sum(sizes.values()) - sizes[TINY / "control.safetensors"] <= 32_000_000
    for path in files:
        assert path.stat().st_size < 12_000_000
        assert all(
            np.isfinite(values).all()
            for values in load_file(path).values()
            if values.dtype == np.float16
        )
