"""Curves: ticks, and that lines lie where their numbers say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptools.render.curve import COLOURS, Line, Panel, draw_panels, ticks

numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3))


@given(low=numbers, high=numbers)
def test_ticks_cover_the_range_in_few_even_steps(low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    found = ticks(low, high)

    assert 2 <= len(found) <= 8
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_ticks_are_round() -> None:
    assert ticks(0, 1, most=5) == pytest.approx((0, 0.2, 0.4, 0.6, 0.8, 1))
    assert ticks(0, 0.03) == pytest.approx((0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03))
    assert ticks(2, 2)[0] <= 2 < ticks(2, 2)[-1]


def spots(line: Line, *others: Line) -> np.ndarray:
    """(row, column) of the pixels in a line's colour, or nearly: edges are smooth."""
    panel = Panel("Title", "x", "y", (line, *others))
    picture = np.asarray(draw_panels([[panel]], title="All " * 60, note="a\x1bnote"))
    wanted = tuple(int(COLOURS[line.style][n : n + 2], 16) for n in (1, 3, 5))
    near = abs(picture.astype(int) - wanted).max(axis=-1) < 90
    return np.argwhere(near & (np.ptp(picture, axis=-1) > 70))  # words are grey


def test_a_rising_line_rises() -> None:
    found = spots(Line("", ((0, 0), (0.5, 1), (1, 2)), 0))
    left, right = found[found[:, 1].argmin()], found[found[:, 1].argmax()]

    assert left[0] > right[0] + 200
    middle = found[abs(found[:, 1] - (left[1] + right[1]) / 2) < 3]
    assert abs(middle[:, 0].mean() - (left[0] + right[0]) / 2) < 4


def test_a_gap_is_not_bridged() -> None:
    whole = spots(Line("", ((0, 1), (0.5, 1), (1, 1)), 1))
    broken = spots(Line("", ((0, 1), (0.5, math.nan), (1, 1)), 1))

    assert np.ptp(broken[:, 1]) == np.ptp(whole[:, 1])
    columns = set(broken[:, 1])
    assert len(columns) < 40 < len(set(whole[:, 1]))


def test_a_level_is_dashed_and_has_no_name() -> None:
    dashed = spots(Line("name", ((0, 1), (1, 1)), 2, dashed=True), Line("", ((0, 0), (1, 2)), 3))
    columns = np.unique(dashed[:, 1])

    assert (np.diff(columns) > 2).sum() > 10


@pytest.mark.parametrize("style", range(6))
def test_every_style_has_a_colour_and_a_marker(style: int) -> None:
    assert len(spots(Line("B", ((0, 1), (1, 3)), style))) > 100


def test_a_panel_without_lines_has_axes() -> None:
    picture = draw_panels([[Panel("none", "M", "y", ())], [Panel("two", "M", "y", ())]])

    assert picture.height > 700
