"""The page of `ckptools render`, in a real browser where there is one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from browser import what_a_reader_sees

import ckptools
from ckptools.render.probes import Probe
from ckptools.rendering import Order, file_subject, render

TINY = Path(ckptools.__file__).parent / "tiny"
EVIL = 'evil</script><img src=x onerror="document.title=1">'

# Uses the page as a reader does, with mouse and keys, then writes down what it sees.
PROBE = """
<script>
"use strict";
const seen = {errors: window.problems};
const text = selector => [...document.querySelectorAll(selector)].map(e => e.textContent);
const key = k => dispatchEvent(new KeyboardEvent("keydown", {key: k}));
const look = () => ({
  which: text("#which")[0], prompt: text("#prompt")[0], a: $("a").alt, b: $("b").alt,
  clip: $("b").style.clipPath, front: $("b").style.visibility, cut: !$("cut").hidden,
});
addEventListener("load", () => {
  seen.title = text("#title")[0]; seen.verdict = text("#verdict")[0]; seen.said = text("#said")[0];
  seen.checks = text("#checks tbody tr"); seen.notes = text("#notes li");
  seen.heads = text("#grid thead th"); seen.rows = text("#grid tbody th").length;
  seen.images = [...document.images].filter(i => i.complete && i.naturalWidth === 64).length;
  seen.labelled = [...document.querySelectorAll("button, select, input")].every(
    e => (e.textContent || e.ariaLabel || e.title || e.querySelector("img")?.alt || "").trim());
  seen.start = look();
  $("cut").value = 20; $("cut").dispatchEvent(new Event("input")); seen.slid = look();
  const stage = $("stage").getBoundingClientRect();
  const at = {clientX: stage.left + .8 * stage.width, clientY: stage.top + 9, pointerId: 1,
              buttons: 1};
  $("stage").setPointerCapture = () => {};
  $("stage").dispatchEvent(new PointerEvent("pointerdown", at)); seen.dragged = $("cut").value;
  key("j"); seen.next = look(); key("k"); key("k"); seen.around = look(); key("j");
  key("f"); seen.flipped = look(); key("f"); seen.back = look();
  $("stage").dispatchEvent(new PointerEvent("pointerdown", at)); seen.touched = look();
  key("s"); seen.slider = look(); seen.focused = document.activeElement.id;
  $("left").value = 1; $("left").dispatchEvent(new Event("change")); seen.chosen = look();
  document.querySelectorAll("#grid .cell")[3].click(); seen.clicked = look();
  seen.marked = document.querySelectorAll("#grid .cell.chosen").length;
  seen.bad = document.querySelectorAll("#grid .cell.bad").length;
  seen.wide = document.documentElement.scrollWidth > window.innerWidth;
  seen.settings = text("#settings dd");
  const out = document.createElement("pre");
  out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
});
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("render")
    order = Order(
        prompts=(
            Probe("circle", "a red circle on a navy background"),
            Probe("star", f"a yellow star {EVIL}", negative="blue"),
        ),
        steps=1,
        sampler="DDIM",
        device="cpu",
    )
    subjects = [
        file_subject(TINY / "C.safetensors", order, label="merge"),
        file_subject(TINY / "A.safetensors", order, parent=True),
        file_subject(TINY / "B.safetensors", order, parent=True),
    ]
    return render(subjects, order, folder, title=EVIL, use_cache=False).report


def test_the_page_loads_nothing_and_holds_no_foreign_markup(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    markup = text.split('id="data">')[0]

    assert "{{data}}" not in text
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|https?://", markup)
    assert "default-src 'none'; img-src data:" in text
    assert EVIL not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["title"] == EVIL
    assert [column["label"] for column in data["columns"]] == ["A", "B", "merge"]
    assert all(
        cell["pixels"].startswith("data:image/png;")
        for row in data["rows"]
        for cell in row["cells"]
    )


@pytest.fixture(scope="module")
def seen(page: Path) -> dict:
    return what_a_reader_sees(page, PROBE)


def test_a_browser_shows_verdict_checks_and_pictures(seen: dict) -> None:
    assert seen["errors"] == []
    assert seen["title"] == EVIL
    assert seen["verdict"] in ("pass", "warn", "fail")
    assert seen["said"].startswith("6 pictures, 3 models")
    assert len(seen["checks"]) == 5
    assert seen["rows"] == 2
    assert seen["images"] == 8
    assert seen["heads"][1].startswith("A")
    assert seen["labelled"]
    assert not seen["wide"]
    assert "DDIM" in seen["settings"]


def test_slider_and_flip_compare_a_parent_with_the_merge(seen: dict) -> None:
    assert seen["start"]["a"].startswith("A: a red circle")
    assert seen["start"]["b"].startswith("merge: a red circle")
    assert seen["start"]["clip"] == "inset(0px 0px 0px 50%)"
    assert seen["slid"]["clip"] == "inset(0px 0px 0px 20%)"
    assert int(seen["dragged"]) in (79, 80, 81)
    assert seen["flipped"]["clip"] == "none"
    assert not seen["flipped"]["cut"]
    assert seen["flipped"]["front"] != seen["back"]["front"] != seen["touched"]["front"]
    assert seen["slider"]["cut"]
    assert seen["focused"] == "cut"


def test_keys_and_clicks_choose_what_is_compared(seen: dict) -> None:
    assert seen["next"]["which"].startswith("2 of 2: star")
    assert EVIL in seen["next"]["prompt"]
    assert seen["around"]["which"].startswith("2 of 2")
    assert seen["chosen"]["a"].startswith("B: ")
    assert seen["clicked"]["which"].startswith("2 of 2")
    assert seen["clicked"]["a"].startswith("A: a yellow star")
    assert seen["marked"] == 2
