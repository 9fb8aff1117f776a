"""Is a ControlNet alive? Against pictures made by hand, and the shipped one, sound and broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

import ckptools
from ckptools.check import judge_control
from ckptools.check.control import difference, edge_match, is_line_drawing
from ckptools.cli import run
from ckptools.render.conditions import CONDITIONS, draw_condition, find_edges
from ckptools.render.probes import drawn_shape

TINY = Path(ckptools.__file__).parent / "tiny"
PROMPTS = ["-p", "a red circle on a navy background", "-p", "a white ring on a brown background"]
Pixels = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def square(left: int, *, side: int = 64) -> Pixels:
    picture = np.zeros((side, side, 3), np.uint8)
    picture[16:48, left : left + 32] = (250, 220, 30)
    return picture


# --- the figures --------------------------------------------------------------------------------


def test_edges_match_where_they_lie_on_the_lines() -> None:
    """By hand: of 124 pixels of outline, moved by 8, 2 x 24 and one more each stay near."""
    lines = find_edges(square(16))

    assert edge_match(square(16), lines) == 1
    assert edge_match(square(17), lines) == 1  # within a pixel
    assert edge_match(square(24), lines) == pytest.approx(50 / 124)
    assert edge_match(np.zeros((64, 64, 3), np.uint8), lines) == 0
    assert edge_match(square(16), np.zeros_like(lines)) == 0
    far = np.zeros_like(lines)
    far[2, 2:60] = 255
    assert edge_match(square(16), far) == 0


def test_near_is_a_share_of_the_diagonal() -> None:
    lines = find_edges(square(16, side=512))
    moved = np.roll(lines, 4, axis=1)

    assert edge_match(square(16, side=512), moved) == 1


def test_edges_and_lines_are_line_drawings_and_nothing_else() -> None:
    kinds = {kind: is_line_drawing(draw_condition(kind, (64, 64))) for kind in CONDITIONS}

    assert kinds == {"edges": True, "lines": True, "depth": False, "normal": False, "pose": False}
    assert is_line_drawing(draw_condition("edges", (512, 768)))
    assert not is_line_drawing(np.zeros((64, 64, 3), np.uint8))
    assert not is_line_drawing(drawn_shape((64, 64)))


def test_differences_count_where_something_was_drawn() -> None:
    one, other = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    other[:2] = 51
    where = np.zeros((4, 4), bool)
    where[:2] = True

    assert difference(one, other, where) == pytest.approx(0.2)
    assert difference(one, other, ~where) == 0
    assert difference(one, other, where | True) == pytest.approx(0.1)


def test_verdicts_come_with_figure_bound_and_reason() -> None:
    lines, right, wrong = find_edges(square(16)), square(16), square(0)

    alive, follows = judge_control([right], [wrong], lines)
    assert (alive.id, alive.verdict, follows.id, follows.verdict) == (
        "control.alive", "pass", "control.follows", "pass",
    )  # fmt: skip
    assert follows.value == pytest.approx(1 - edge_match(wrong, lines))
    assert follows.bound == 0.3
    assert "1.00, without" in follows.reason
    dead, lost = judge_control([wrong], [wrong], lines)
    assert (dead.value, dead.verdict, lost.value, lost.verdict) == (0, "fail", 0, "fail")
    depth = draw_condition("depth", (64, 64))
    assert [check.id for check in judge_control([right], [wrong], depth)] == ["control.alive"]
    inside = np.ones((64, 64), bool)
    found = judge_control([right], [wrong], lines, inside=inside)
    assert [check.id for check in found] == ["control.alive"]


# --- the shipped ControlNet ---------------------------------------------------------------------


def damaged(folder: Path, how: str) -> Path:
    """The tiny ControlNet, spoilt."""
    made = load_file(TINY / "control.safetensors")
    random = torch.Generator().manual_seed(0)
    for name, value in made.items():
        wide = value.float()
        if how == "silent" and ("zero_convs" in name or "middle_block_out" in name):
            wide = torch.zeros_like(wide)
        elif how == "noise":
            spread = wide.std(unbiased=False)
            wide = wide + 3 * spread * torch.randn(wide.shape, generator=random)
        elif how == "unrelated":
            order = torch.randperm(wide.numel(), generator=random)
            wide = wide.flatten()[order].view(wide.shape)
        made[name] = wide.half().contiguous()
    path = folder / f"{how}.safetensors"
    save_file(made, path)
    return path


def rendered(folder: Path, control: Path, *more: str) -> tuple[int, dict]:
    out = folder / "out"
    words = ["render", str(TINY / "C.safetensors"), "--control", str(control), *PROMPTS, "-q",
             "--condition", "edges", "--steps", "8", "--device", "cpu", "-o", str(out)]  # fmt: skip
    code = run([*words, *more])
    return code, json.loads((out / "report.json").read_text())


def test_a_rendering_with_a_sound_controlnet_passes_and_shows_why(tmp_path: Path) -> None:
    code, found = rendered(
        tmp_path, TINY / "control.safetensors", "--beside", str(TINY / "A.safetensors")
    )

    assert code == 0
    checks = {check["id"]: check for check in found["checks"]}
    assert checks["control.alive"]["verdict"] == "pass"
    assert checks["control.follows"]["verdict"] == "pass"
    assert checks["control.follows"]["value"] > 0.5
    assert checks["control.follows"]["bound"] == 0.3
    out = tmp_path / "out"
    assert found["control"]["condition"] == "condition.png"
    with Image.open(out / "condition.png") as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), draw_condition("edges", (64, 64)))
    without = found["control"]["without"]
    assert [each["model"] for each in without] == ["C", "C"]
    assert [each["probe"] for each in without] == ["prompt1", "prompt2"]
    drawn = {image["model"] for image in found["images"]}
    assert drawn == {"C", "A"}
    pictures = [edge_match(pixels(out / each["file"]), draw_condition("edges", (64, 64)))
                for each in without]  # fmt: skip
    assert max(pictures) < 0.4
    page = (out / "report.html").read_text()
    assert '"label": "C, no control"' in page
    assert '"label": "condition"' in page


def pixels(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).copy()


@pytest.mark.parametrize(
    ("how", "failing"),
    [
        ("silent", {"control.alive", "control.follows"}),
        ("noise", {"control.follows"}),
        ("unrelated", {"control.follows"}),
    ],
)
def test_a_broken_controlnet_fails(tmp_path: Path, how: str, failing: set[str]) -> None:
    code, found = rendered(tmp_path, damaged(tmp_path, how))

    assert code == 1
    failed = [check for check in found["checks"] if check["verdict"] == "fail"]
    assert {check["id"] for check in failed} >= failing
    assert all(check["images"] for check in failed)
    alive = next(check for check in found["checks"] if check["id"] == "control.alive")
    assert (alive["value"] == 0) == (how == "silent")


def test_less_than_its_whole_weight_is_not_judged(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{C: '{TINY.as_posix()}/C.safetensors'}}\nmerge: C\n"
        "output: {path: out.safetensors}\n"
        "render:\n  prompts: [a red circle]\n  steps: 2\n  against: none\n  condition: edges\n"
        f"  control: '{TINY.as_posix()}/control.safetensors'\n  control_scale: 0.5\n"
    )

    assert run(["render", str(recipe), "-q"]) == 0

    found = json.loads((tmp_path / "out-render" / "report.json").read_text())
    assert not [check for check in found["checks"] if check["id"].startswith("control")]
    assert "ControlNet" in " ".join(found["notes"])


def test_with_an_image_only_the_change_is_judged(tmp_path: Path) -> None:
    """What the image shows stays: its edges are not the ControlNet's."""
    Image.fromarray(drawn_shape((64, 64))).save(tmp_path / "start.png")

    _, found = rendered(
        tmp_path, TINY / "control.safetensors", "--image", str(tmp_path / "start.png")
    )

    ids = [check["id"] for check in found["checks"] if check["id"].startswith("control")]
    assert ids == ["control.alive"]


# --- `ckptools check` ---------------------------------------------------------------------------


def checked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, dict]]:
    code = run(["check", *words, "--json"])
    found = json.loads(capsys.readouterr().out)
    return code, {check["id"]: check for check in found["checks"]}


def test_check_draws_with_a_controlnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_ = ["--with", str(TINY / "C.safetensors")]

    code, checks = checked(capsys, str(TINY / "control.safetensors"), *with_)
    assert code == 0
    assert {"weights.finite", "modules", "control.alive", "control.follows"} <= checks.keys()
    assert checks["control.follows"]["value"] > 0.5
    for how in ("silent", "noise", "unrelated"):
        code, checks = checked(capsys, str(damaged(tmp_path, how)), *with_)
        assert code == 1
        assert checks["control.follows"]["verdict"] == "fail"
        assert (checks["control.alive"]["verdict"] == "fail") == (how == "silent")


def test_a_transferred_controlnet_is_checked_before_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "transfer.yaml"
    names = ("control", "A", "C")
    models = ", ".join(f"{name}: '{TINY.as_posix()}/{name}.safetensors'" for name in names)
    recipe.write_text(
        f"ckptools: 1\nmodels: {{{models}}}\nmerge: transfer_control(control, A, C)\n"
        "output: {path: out.safetensors}\n"
    )

    code, checks = checked(capsys, str(recipe), "--with", str(TINY / "A.safetensors"))

    assert code == 0
    assert checks["control.follows"]["verdict"] == "pass"
    assert not (tmp_path / "out.safetensors").exists()


def test_check_says_what_a_controlnet_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control, model = str(TINY / "control.safetensors"), str(TINY / "C.safetensors")

    assert run(["check", control]) == 2
    assert "give the model's file with --with" in capsys.readouterr().err
    assert run(["check", control, "--with", model, "--against", model]) == 2
    assert "has no parents" in capsys.readouterr().err
    assert run(["check", model, "--with", model]) == 2
    assert "--with is for ControlNets" in capsys.readouterr().err
    code, checks = checked(capsys, control, "--quick")
    assert code == 0
    assert "control.alive" not in checks
    made = load_file(control)
    del made["control_model.zero_convs.3.0.weight"]
    save_file(made, tmp_path / "short.safetensors")
    code, checks = checked(capsys, str(tmp_path / "short.safetensors"), "--with", model)
    assert code == 1
    assert "zero_convs.3.0.weight" in checks["modules"]["reason"]
