"""Pictures for ControlNets: edges against OpenCV's, scenes against geometry."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ckptools.errors import UsageError
from ckptools.render.conditions import CONDITIONS, draw_condition, find_edges, star
from ckptools.rendering import Order, numbered, render_files

TINY = Path(__file__).parent.parent / "ckptools" / "tiny"
Pixels = NDArray[np.uint8]
SIZES = [(64, 64), (96, 72), (200, 333), (512, 512)]
any_size = pytest.mark.parametrize("size", SIZES, ids=str)


def noise(height: int, width: int, seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clouds(height: int, width: int, seed: int) -> Pixels:
    """Noise, blurred with whole numbers: long edges, the same on every machine."""
    values = noise(height, width, seed).astype(np.int64)
    for _ in range(3):
        values = np.roll(values, 1, 0) + values + np.roll(values, -1, 0)
        values = np.roll(values, 1, 1) + values + np.roll(values, -1, 1)
    low, high = values.min(), values.max()
    return ((values - low) * 255 // (high - low)).astype(np.uint8)


@any_size
@pytest.mark.parametrize("kind", CONDITIONS)
def test_every_condition_is_a_picture_of_any_size(kind: str, size: tuple[int, int]) -> None:
    picture = draw_condition(kind, size)

    assert picture.shape == (size[1], size[0], 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 5
    assert np.array_equal(picture, draw_condition(kind, size))


def test_an_unknown_condition_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no condition 'edge'") as caught:
        draw_condition("edge", (64, 64))

    assert "edges" in caught.value.fix


# --- edges -------------------------------------------------------------------------------------


# sha256 of `cv2.Canny(picture, low, high)`, opencv-python-headless 5.0.0
CANNY = [
    (noise(40, 56, 4), 100, 200, 830,
     "73a1b52489cbabb9dbde76cbf8bdc3b88ae3c45a0d7acf30e0c6b5b5d009ece9"),
    (clouds(96, 80, 7), 100, 200, 2548,
     "403b30e95b8015d774979384d01e2cb1dddd9497b14617d37a9507e5e46f1ea2"),
    (clouds(90, 130, 8), 30, 250, 3884,
     "8e097525de30be349145244a0b8ab9d71244d355da8067d64606209041504251"),
    (noise(3, 3, 1), 0, 1, 5,
     "f03aa2b254b6336ce11c4ac1e65aff1c7d0d86a0bd9fa36a5e35e713c4070f2b"),
    (clouds(120, 60, 9), 20, 60, 2481,
     "58fea58b4b3db118dfc5da4c9ba310befda559d766e48bfd0b5c0e11df30b945"),
]  # fmt: skip


@pytest.mark.parametrize(("picture", "low", "high", "count", "sha256"), CANNY)
def test_edges_are_those_of_opencv(
    picture: Pixels, low: int, high: int, count: int, sha256: str
) -> None:
    edges = find_edges(picture, low=low, high=high)

    assert np.count_nonzero(edges[..., 0]) == count
    assert hashlib.sha256(edges[..., 1].tobytes()).hexdigest() == sha256
    assert set(np.unique(edges)) == {0, 255}


def test_a_step_is_one_line_and_a_plain_picture_has_none() -> None:
    picture = np.full((20, 30, 3), 40, np.uint8)
    assert not find_edges(picture).any()
    picture[:, 12:, 1] = 160  # in one channel only

    edges = find_edges(picture)[..., 0] > 0

    assert edges.sum() == 20
    assert edges[:, 11:13].any(axis=1).all()


def test_weak_edges_count_where_they_are_joined_to_strong_ones() -> None:
    """A line that fades: as far as it is over the lower bound, and nothing elsewhere."""
    picture = np.zeros((24, 40, 3), np.uint8)
    picture[12:, :20] = 80  # a gradient of 320
    picture[12:, 20:] = 30  # of 120
    picture[4, 30:36] = 30  # as weak, joined to nothing

    whole, strong = (find_edges(picture, low=low, high=200)[..., 0] for low in (100, 200))

    assert whole[11:13, 24:].any(axis=0).all()
    assert not strong[11:13, 24:].any()
    assert not whole[:8].any()


@any_size
def test_the_star_is_inside_its_edges(size: tuple[int, int]) -> None:
    edges, inside = draw_condition("edges", size)[..., 0] > 0, star(size)
    grown = inside.copy()
    for axis in (0, 1):
        grown |= np.roll(grown, 1, axis) | np.roll(grown, -1, axis)
    shrunk = ~inside
    for axis in (0, 1):
        shrunk |= np.roll(shrunk, 1, axis) | np.roll(shrunk, -1, axis)

    assert 0.14 < inside.sum() / min(size) ** 2 < 0.3
    assert not (edges & ~(grown & shrunk)).any()
    assert edges.sum() > 2 * min(size)


# --- the scene ---------------------------------------------------------------------------------


def distance_of(depth: Pixels) -> NDArray[np.float64]:
    """Distances up to a factor, from 255 levels of 1 / distance; the wall is at 7."""
    near = depth[..., 0].astype(float) / 255
    floor_at = 1.6 / (1 - 1 / len(depth))  # where the lowest row meets the floor
    return 1 / (1 / 7 + near * (1 / floor_at - 1 / 7))


def test_depth_is_white_near_and_black_far() -> None:
    depth = draw_condition("depth", (300, 300))[..., 0].astype(int)

    assert depth[0, 0] == 0
    assert depth[-1, 0] == 255
    assert (np.diff(depth[200:, 5]) >= 0).all()
    assert depth[170, 95] > depth[100, 60]  # the ball is before the wall


def test_distances_are_those_of_the_scene() -> None:
    """The ball's nearest point on its own axis, and the box's front."""
    distance = distance_of(draw_condition("depth", (512, 512)))

    middle = (round(256 * (1 - 1.6 * -0.3 / 2.8)), round(256 * (1 + 1.6 * -0.65 / 2.8)))
    ray = np.array([-0.65, -0.3, 2.8])
    length = np.linalg.norm(ray)
    assert distance[middle] == pytest.approx(2.8 * (length - 0.7) / length, rel=0.01)
    front = (round(256 * (1 - 1.6 * -0.2 / 2.6)), round(256 * (1 + 1.6 * 0.7 / 2.6)))
    assert distance[front] == pytest.approx(2.6, rel=0.01)


def test_normals_have_one_length_and_the_colours_of_the_protocol() -> None:
    picture = draw_condition("normal", (512, 512))
    normals = picture.astype(float) / 127.5 - 1

    np.testing.assert_allclose(np.linalg.norm(normals, axis=2), 1, atol=0.015)
    assert picture[0, 0].tolist() == [128, 128, 255]  # the wall
    assert picture[-1, 0].tolist() == [128, 255, 128]  # the floor
    row = picture[330]
    assert row[:300, 0].max() > 230  # the ball's left side
    assert row[:300, 0].min() < 25


def test_normals_stand_on_the_surfaces_that_depth_shows() -> None:
    """On the ball: against the cross product of neighbouring points, from the distances."""
    side = 1024
    distance = distance_of(draw_condition("depth", (side, side)))
    picture = draw_condition("normal", (side, side))
    across = (np.arange(side) + 0.5 - side / 2) / (side / 2)
    x, y = np.meshgrid(across, -across)
    points = np.stack([x, y, np.full_like(x, 1.6)], axis=2) / 1.6 * distance[..., None]
    top, left = round(512 * (1 + 1.6 * 0.3 / 2.8)), round(512 * (1 - 1.6 * 0.65 / 2.8))
    step = 40
    for row, column in ((top, left), (top - 90, left), (top, left + 90), (top + 90, left - 60)):
        right = points[row, column + step] - points[row, column - step]
        up = points[row - step, column] - points[row + step, column]
        normal = np.cross(up, right)
        normal = normal / np.linalg.norm(normal) * (-1, 1, -1)

        np.testing.assert_allclose(picture[row, column] / 127.5 - 1, normal, atol=0.15)


# --- lines and a person ------------------------------------------------------------------------


@any_size
def test_the_room_is_made_of_white_lines(size: tuple[int, int]) -> None:
    drawn = draw_condition("lines", size)[..., 0] > 0
    height, width = drawn.shape

    assert set(np.unique(draw_condition("lines", size))) == {0, 255}
    assert drawn.mean() < 0.12
    left, right = (round(width / 2 + sign * width / 4) for sign in (-1, 1))
    middle = height // 2
    assert drawn[middle, left - 2 : left + 2].any()  # the back wall's sides
    assert drawn[middle, right - 2 : right + 2].any()
    top = round(height / 2 - height / 2 * 0.45)
    assert drawn[top - 2 : top + 2, left + 2 : right - 2].any(axis=0).all()
    assert not drawn[0, left + 2 : right - 2].any()


def test_a_person_has_openpose_s_colours_in_their_places() -> None:
    picture = draw_condition("pose", (512, 512))

    def at(x: float, y: float) -> list[int]:
        return picture[round(256 * (1 - y) - 0.5), round(256 * (1 + x) - 0.5)].tolist()

    assert at(0.0, 0.62) == [255, 0, 0]  # nose
    assert at(0.0, 0.45) == [255, 85, 0]  # neck
    assert at(-0.17, 0.45) == [255, 170, 0]  # right shoulder
    assert at(0.17, 0.45) == [85, 255, 0]  # left shoulder
    assert at(-0.09, 0.64) == [255, 0, 170]  # right ear
    assert at(0.09, 0.64) == [255, 0, 85]  # left ear
    assert at(-0.085, 0.45) == [153, 0, 0]  # neck to right shoulder: 0.6 of red
    assert at(0.085, 0.45) == [153, 51, 0]
    assert len({tuple(colour) for colour in picture.reshape(-1, 3)}) == 1 + 17 + 18


# --- with a ControlNet -------------------------------------------------------------------------


def draw_with(condition: str, folder: Path) -> Pixels:
    """What the tiny model draws with the tiny ControlNet."""
    order = Order(
        prompts=numbered(["a yellow circle on a black background"]), steps=12,
        control=TINY / "control.safetensors", condition=condition,
    )  # fmt: skip
    found = render_files([TINY / "C.safetensors"], order, folder)
    (drawn,) = found.pictures.values()
    return drawn.pixels


def test_a_controlnet_draws_where_the_edges_are(tmp_path: Path) -> None:
    """After edges drawn here, and after those of a picture in a file: the prompt says circle."""
    aim = star((64, 64))
    shape = np.repeat(np.where(aim, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
    Image.fromarray(shape).save(tmp_path / "star.png")

    drawn = draw_with("edges", tmp_path / "one")
    again = draw_with(f"edges:{tmp_path / 'star.png'}", tmp_path / "two")

    inside = drawn.max(axis=2) > 128
    assert (inside & aim).sum() / (inside | aim).sum() > 0.6
    assert np.array_equal(drawn, again)


def test_a_condition_that_is_neither_kind_nor_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no condition 'edges:none\.png'"):
        draw_with("edges:none.png", tmp_path / "out")
