"""The page of `ckptools diff --html`, in a real browser where there is one."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from browser import what_a_reader_sees
from models import UNET, model_values, shrunk, write_tensors

from ckptools.cli import run

EVIL = 'evil</script><img src=x onerror="document.title=1">'

# Uses the page as a reader does, then writes down what it sees.
PROBE = """
<script>
"use strict";
const seen = {errors: window.problems};
const text = selector => [...document.querySelectorAll(selector)].map(e => e.textContent);
const type = words => {
  const box = document.getElementById("filter");
  box.value = words; box.dispatchEvent(new Event("input"));
};
seen.verdict = text("#verdict")[0];
seen.sides = text(".side");
seen.cells = document.querySelectorAll("#map .cell").length;
seen.legend = text("#legend span").length;
seen.first = text("#tensors tbody tr:first-child td")[0];
document.querySelectorAll("#tensors th button")[6].click();
seen.byMax = text("#tensors tbody tr td:nth-child(7)").map(Number);
document.querySelectorAll("#tensors th button")[6].click();
seen.byMaxUp = text("#tensors tbody tr td:nth-child(7)").map(Number);
document.querySelectorAll("#tensors th button")[0].click();
seen.byName = text("#tensors tbody tr td:nth-child(1)");
type("attn2.to_k");
seen.filtered = text("#tensors tbody tr td:nth-child(1)");
document.getElementById("only").click();
seen.unchangedToo = text("#tensors tbody tr").length;
document.querySelector("#map .cell[title*='IN01, attention k']").click();
seen.said = text("#said")[0];
seen.cellRows = text("#tensors tbody tr td:nth-child(2)");
type("");
seen.page = text("#tensors tbody tr").length;
document.getElementById("more").click();
seen.more = text("#tensors tbody tr").length;
seen.images = document.images.length;
seen.wide = document.documentElement.scrollWidth > window.innerWidth;
seen.rest = text("#rest details").join();
const out = document.createElement("pre");
out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("html")
    base = model_values(shrunk("sd1"), seed=1)
    other = {
        name: value * (1 + 0.1 * (1 + len(name) % 5))
        if name.startswith(f"{UNET}input_blocks") and value.is_floating_point()
        else value
        for name, value in base.items()
    }
    a = write_tensors(folder / "one.safetensors", base)
    b = write_tensors(folder / "two.safetensors", other | {EVIL: torch.ones(1)}, {EVIL: EVIL})
    out = folder / "report.html"
    assert run(["diff", str(a), str(b), "--html", str(out), "-q"]) == 1
    return out


def test_the_page_loads_nothing_and_holds_no_foreign_markup(page: Path) -> None:
    text = page.read_text(encoding="utf-8")

    assert "{{data}}" not in text
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|https?://", text.split('id="data">')[0])
    assert "default-src 'none'" in text
    assert EVIL not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["only"]["B"] == [EVIL]
    assert len(data["tensors"]) == 1131


@pytest.fixture(scope="module")
def seen(page: Path) -> dict:
    return what_a_reader_sees(page, PROBE)


def test_a_browser_shows_verdict_map_and_legend(seen: dict) -> None:
    assert seen["errors"] == []
    assert seen["verdict"] == "only the UNet differs"
    assert "one.safetensors" in seen["sides"][0]
    assert seen["cells"] > 100
    assert seen["legend"] >= 7
    assert seen["images"] == 0
    assert EVIL in seen["rest"]
    assert not seen["wide"]


def test_tables_sort_and_filter(seen: dict) -> None:
    assert seen["byMax"] == sorted(seen["byMax"], reverse=True)
    assert seen["byMaxUp"] == sorted(seen["byMaxUp"])
    assert seen["byName"] == sorted(seen["byName"])
    assert len(seen["byName"]) == seen["page"] == 100
    assert 0 < len(seen["filtered"]) < seen["unchangedToo"] == 16
    assert all("attn2.to_k" in name for name in seen["filtered"])
    assert seen["more"] > 100


def test_a_cell_tells_its_values_and_lists_its_tensors(seen: dict) -> None:
    assert seen["said"].startswith("IN01, attention k: ")
    assert set(seen["cellRows"]) == {"IN01"}


def test_a_page_that_cannot_be_written_is_an_error(page: Path, capsys) -> None:
    a = str(page.with_name("one.safetensors"))

    assert run(["diff", a, a, "--html", str(page.parent / "none" / "x.html")]) == 2
    assert "--html: there is no folder" in capsys.readouterr().err


def test_a_page_replaces_a_page_and_no_model(page: Path, capsys) -> None:
    model = page.with_name("one.safetensors")
    before = model.read_bytes()

    assert run(["diff", str(model), str(model), "--html", str(model)]) == 2
    assert "exists, and is no page" in capsys.readouterr().err
    assert model.read_bytes() == before
    other = page.with_name("other.html")
    for _ in range(2):
        assert run(["diff", str(model), str(model), "--html", str(other)]) == 0


def test_a_page_on_a_full_disk_leaves_the_old_one(
    page: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = str(page.with_name("one.safetensors"))
    old = page.read_bytes()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)

    assert run(["diff", a, a, "--html", str(page)]) == 2
    assert "the disk is full; nothing was left behind" in capsys.readouterr().err
    assert page.read_bytes() == old
    assert not list(page.parent.glob("*.part"))
