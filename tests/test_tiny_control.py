"""The shipped ControlNet: an SD1 one in its names, and trained: it draws where the edges are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import layout
from safetensors import safe_open
from safetensors.torch import load_file

from ckptools.family import detect
from ckptools.sources import open_checkpoint

ROOT = Path(__file__).parents[1]
TINY = ROOT / "ckptools" / "tiny"
CONTROL = TINY / "control.safetensors"
UNET, PREFIX = "model.diffusion_model.", "control_model."


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(CONTROL)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of examples/tiny import each other by their bare names."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "tiny")


def test_names_and_ranks_are_those_of_sd1_controlnets(tensors: dict[str, torch.Tensor]) -> None:
    real = {name: len(spec.shape) for name, spec in layout("controlnet-sd1").items()}

    assert {name: value.ndim for name, value in tensors.items()} == real


def test_its_encoder_fits_the_unet_it_was_copied_from(tensors: dict[str, torch.Tensor]) -> None:
    base = load_file(TINY / "C.safetensors")
    shared = {
        name: value for name, value in tensors.items() if UNET + name.removeprefix(PREFIX) in base
    }

    assert len(shared) == 298  # all but the hint block and the zero convolutions
    for name, value in shared.items():
        assert value.shape == base[UNET + name.removeprefix(PREFIX)].shape, name


def test_every_zero_convolution_was_trained(tensors: dict[str, torch.Tensor]) -> None:
    zeros = [n for n in tensors if "zero_convs" in n or "middle_block_out" in n]

    assert len(zeros) == 2 * 13
    assert all(tensors[name].count_nonzero() > 0 for name in zeros)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert all(value.isfinite().all() for value in tensors.values())


def test_it_is_recognised_and_says_its_licence() -> None:
    with open_checkpoint(CONTROL) as opened:
        found = detect(opened)
    assert (found.kind, found.variant, found.layout) == ("controlnet", "sd1", "ldm")
    with safe_open(CONTROL, "pt") as file:
        assert file.metadata()["modelspec.license"] == "Apache-2.0"


@pytest.mark.usefixtures("examples")
def test_edges_are_thin_lines_where_colours_change() -> None:
    from shapes import find_edges

    picture = np.full((64, 64, 3), (112, 112, 112), np.uint8)
    picture[20:40, 10:50] = (44, 92, 255)

    edges = find_edges(picture)

    inside, outside = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    inside[21:39, 11:49], outside[19:41, 9:51] = True, True
    expected = np.where(outside & ~inside, 255, 0)
    for corner in ((19, 9), (19, 50), (40, 9), (40, 50)):
        expected[corner] = edges[corner][0]  # either way is right
    assert np.array_equal(edges, np.repeat(expected[..., None], 3, axis=2))
    assert not find_edges(np.full_like(picture, 9)).any()


@pytest.mark.usefixtures("examples")
def test_shapes_are_drawn_where_the_edges_are() -> None:
    """With the ControlNet most shapes overlap the wanted ones; with the same noise alone, few."""
    from samples import Edges, build, build_control, find_cover, read, render
    from shapes import SUBJECTS, draw_picture, find_edges

    subjects = SUBJECTS[5::32]  # one of each shape
    wanted = [draw_picture(np.random.default_rng(i), s, "flat") for i, s in enumerate(subjects)]
    edges = Edges(
        build_control(read("control.safetensors")), np.stack([find_edges(p) for p in wanted])
    )
    member = build(read("C.safetensors"))
    prompts = [(subject.caption, i) for i, subject in enumerate(subjects)]

    def hits(drawn: np.ndarray) -> int:
        covers = [(find_cover(p), find_cover(aim)) for p, aim in zip(drawn, wanted, strict=True)]
        return sum((a & b).sum() / (a | b).sum() >= 0.6 for a, b in covers)

    assert hits(render(member, prompts, edges=edges)) >= 5
    assert hits(render(member, prompts)) <= 3
