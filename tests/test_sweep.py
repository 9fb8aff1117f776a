"""`ckptools sweep` on the tiny family: what is seen, measured, read and written."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from browser import what_a_reader_sees
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from ckptools import report_sweep
from ckptools.checkpoint import Checkpoint
from ckptools.cli import run
from ckptools.errors import OutputError, UsageError
from ckptools.plan import Plan
from ckptools.recipe import load_recipe
from ckptools.render import Pipeline, Request, draw, load_pipeline
from ckptools.render.probes import usual_guidance
from ckptools.sweep import (
    Apart,
    Draws,
    SweepProgress,
    Swept,
    choose,
    draws_of,
    label,
    recipe_text,
    sweep,
)
from ckptools.variants import memory_for
from ckptools.workflow import merge

TINY = Path(report_sweep.__file__).parent / "tiny"
PROMPTS = ("a red circle on a navy background", "a yellow star on a black background")
STEPS = 6
FAST = Draws(prompts=PROMPTS[:1], seeds=(1,), steps=1, device="cpu")
NUMBERS = (0, 0.25, 0.5, 0.75, 1)


def write_recipe(folder: Path, body: str, models: str = "ABC") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    lines = "".join(f"  {name}: {TINY / name}.safetensors  # {name}\n" for name in models)
    path.write_text(
        f"ckptools: 1\nmodels:\n{lines}{body}output: {{path: out/merged.safetensors}}\n",
        encoding="utf-8",
    )
    return path


ADD = "params: {M: 0.8}  # how much\nmerge: A + (B - C) * M\n"


def request(pipeline: Pipeline, prompt: str, **changes: Any) -> Request:
    """What a sweep with these tests' options asks for."""
    wanted = Request(prompt, seed=1, steps=STEPS, cfg=usual_guidance(pipeline))
    return replace(wanted, **changes)


def pixels(path: str | Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


class Reads:
    """Bytes read of every file's tensors, by its name."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.nbytes: Counter[str] = Counter()
        lock, genuine = threading.Lock(), Checkpoint.read_into

        def counting(own: Checkpoint, name: str, view: memoryview, offset: int = 0) -> None:
            with lock:
                self.nbytes[own.path.stem] += len(view)
            genuine(own, name, view, offset)

        patch.setattr(Checkpoint, "read_into", counting)


@dataclass
class Done:
    recipe: Path
    folder: Path
    found: dict[str, Any]
    reads: Counter[str]
    told: str


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A sweep of M from the command line."""
    home = tmp_path_factory.mktemp("sweep")
    recipe = write_recipe(home, ADD + "sweep: {M: 0:1:0.25}\n")
    with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as screen:
        import io
        import sys

        out, err = io.StringIO(), io.StringIO()
        screen.setattr(sys, "stdout", out)
        screen.setattr(sys, "stderr", err)
        reads = Reads(patch)
        words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        code = run(["sweep", str(recipe), *words, "--seed", "1", "--steps", str(STEPS),
                    "--device", "cpu", "--json"])  # fmt: skip
    assert code == 0, err.getvalue()
    found = json.loads(out.getvalue())
    return Done(recipe, home / "out" / "merged-sweep", found, reads.nbytes, err.getvalue())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Three values, one step, everything in memory at once."""
    home = tmp_path_factory.mktemp("plain")
    recipe = load_recipe(write_recipe(home, ADD))
    return sweep(recipe, {"M": (0, 0.5, 1)}, home / "s", draws=FAST)


# --- the claim ----------------------------------------------------------------------------------


def column(done: Done, parent: str, what: str) -> list[float]:
    return [variant["distances"][parent][what] for variant in done.found["variants"]]


def test_the_contract_keys_are_there(done: Done) -> None:
    found = done.found

    assert found["schema"] == "ckptools.sweep/1"
    assert [variant["params"] for variant in found["variants"]] == [{"M": m} for m in NUMBERS]
    assert {variant["verdict"] for variant in found["variants"]} <= {"pass", "warn"}
    assert all(set(variant["distances"]) == set("ABC") for variant in found["variants"])
    for path in (found["sheet"], found["curve"], found["report"], found["variants"][0]["image"]):
        assert Path(path).is_file()


def test_add_difference_moves_from_a_towards_b_as_far_as_m_says(done: Done) -> None:
    for what in ("pixels", "weights"):
        to_b = column(done, "B", what)
        assert all(later < earlier for earlier, later in pairwise(to_b)), what
        from_a = column(done, "A", what)
        assert from_a[0] == 0
        assert all(later > earlier for earlier, later in pairwise(from_a)), what
    loss_on_b = [variant["losses"]["B"] for variant in done.found["variants"]]
    assert all(later < earlier for earlier, later in pairwise(loss_on_b))
    from_c = column(done, "C", "weights")
    assert all(later > earlier for earlier, later in pairwise(from_c))


def test_each_parent_does_best_on_its_own_pictures(done: Done) -> None:
    parents = done.found["parents"]

    assert list(parents) == ["A", "B", "C"]
    for name, parent in parents.items():
        assert min(parents, key=lambda other: parents[other]["losses"][name]) == name
        assert parent["losses"][name] < 0.5
    assert done.found["variants"][0]["losses"] == parents["A"]["losses"]


def test_weights_are_as_far_apart_as_the_formula_says(done: Done) -> None:
    a, b, c = (load_file(TINY / f"{name}.safetensors") for name in "ABC")
    squares, norm = 0.0, 0.0
    for name, value in b.items():
        if value.is_floating_point() and not (a[name].equal(value) and c[name].equal(value)):
            merged = (a[name].double() + (value.double() - c[name].double()) * 0.5).to(value.dtype)
            squares += float((merged.double() - value.double()).square().sum())
            norm += float(value.double().square().sum())

    assert column(done, "B", "weights")[2] == pytest.approx(math.sqrt(squares / norm), rel=1e-3)


# --- what is seen is what would be saved -------------------------------------------------------


def test_the_ends_are_the_parents_to_the_bit(done: Done) -> None:
    """At M = 0 the merge is A, drawn here by itself from A's own file."""
    own = load_pipeline(TINY / "A.safetensors", device="cpu")

    for number, prompt in enumerate(PROMPTS):
        wanted = draw(own, request(own, prompt)).pixels
        assert np.array_equal(pixels(done.found["variants"][0]["images"][number]), wanted)
        assert np.array_equal(pixels(done.found["parents"]["A"]["images"][number]), wanted)
    last = load_pipeline(TINY / "C.safetensors", device="cpu")
    wanted = draw(last, request(last, PROMPTS[1])).pixels
    assert np.array_equal(pixels(done.found["parents"]["C"]["images"][1]), wanted)


def test_every_source_is_read_once(done: Done) -> None:
    for name in "ABC":
        data = sum(v.nbytes for v in load_file(TINY / f"{name}.safetensors").values())
        assert 0.95 * data < done.reads[name] <= data


def test_nothing_is_written_but_pictures_and_the_report(done: Done) -> None:
    written = {path.relative_to(done.recipe.parent).as_posix()
               for path in done.recipe.parent.rglob("*") if path.is_file()}  # fmt: skip
    names = [*"ABC", *(f"M={number:g}" for number in NUMBERS)]
    folder = "out/merged-sweep"
    images = {f"{folder}/images/{name}-p{p}-s1.png" for name in names for p in (1, 2)}

    assert written == images | {
        "recipe.yaml", f"{folder}/sheet.png", f"{folder}/curve.png", f"{folder}/report.html",
        f"{folder}/report.json",
    }  # fmt: skip


def test_the_recipe_says_what_to_draw(tmp_path: Path) -> None:
    body = (
        "render: {prompts: [a red ring, {prompt: a star}], seeds: [3], steps: 4, guidance: 2.5, "
        "size: 128x64, sampler: DDIM, device: cpu, negative: blue}\n"
    )
    recipe = load_recipe(write_recipe(tmp_path, ADD + body))

    assert draws_of(recipe) == Draws(
        ("a red ring", "a star"), "blue", (3,), 4, "DDIM", 2.5, (128, 64), "cpu"
    )
    assert draws_of(load_recipe(write_recipe(tmp_path, ADD))) == Draws()


def test_progress_goes_to_stderr(done: Done) -> None:
    assert "drawing M=0.5   (10 of 16 pictures are done)" in done.told


@pytest.mark.parametrize(
    ("merged", "dtype", "memory_bytes"),
    [("A + (B - C) * M", "bf16", None), ("A + (B - C) * M", "bf16", 0),
     ("slerp(A, B, t=M)", "fp16", 0)],
)  # fmt: skip
def test_a_variant_is_the_saved_file_to_the_bit(
    tmp_path: Path, merged: str, dtype: str, memory_bytes: int | None
) -> None:
    path = write_recipe(tmp_path, f"params: {{M: 0.75}}\nmerge: {merged}\n",
                        "ABC" if "C" in merged else "AB")  # fmt: skip
    path.write_text(path.read_text().replace("safetensors}", f"safetensors, dtype: {dtype}}}"))
    recipe = load_recipe(path)

    found = sweep(recipe, {"M": (0.5, 0.75)}, tmp_path / "s", draws=FAST, memory_bytes=memory_bytes)

    saved = load_pipeline(merge(recipe).output, device="cpu")
    wanted = draw(saved, request(saved, PROMPTS[0], steps=1))
    (seen,) = found.variants[1].looks.pictures
    assert np.array_equal(seen.values, wanted.values)
    assert np.array_equal(seen.latents, wanted.latents)
    count = len(found.parents) + 2
    assert found.groups == ((count,) if memory_bytes is None else (1,) * count)


def test_memory_decides_how_much_is_made_at_a_time(plain: Swept, tmp_path: Path) -> None:
    """Four models at a time: the same pictures and distances as all at once."""
    recipe = load_recipe(write_recipe(tmp_path, ADD))

    found = sweep(recipe, {"M": (0, 0.5, 1)}, tmp_path / "s", draws=FAST, memory_bytes=18_000_000)

    assert plain.groups == (6,)
    assert found.groups == (4, 2)
    for one, other in zip(plain.variants, found.variants, strict=True):
        assert one.looks.losses == other.looks.losses
        for model, apart in one.distances.items():
            again = other.distances[model]
            assert (apart.pixels, apart.latents) == (again.pixels, again.latents)
            # fp32 sums over spans that are cut elsewhere
            assert apart.weights == pytest.approx(again.weights, rel=1e-6)


def test_only_what_changes_is_swapped(tmp_path: Path) -> None:
    body = "params: {M: 0.5}\nmerge: A + (B - C) * M\ntake: {vae: C, text_encoder: C}\n"
    recipe = load_recipe(write_recipe(tmp_path, body))
    tensors = load_file(TINY / "A.safetensors")
    unet = sum(v.nbytes for n, v in tensors.items() if n.startswith("model.diffusion_model."))

    found = sweep(recipe, {"M": (0, 0.25, 0.75)}, tmp_path / "s", draws=FAST)

    assert [variant.looks.swap_bytes for variant in found.variants[1:]] == [unet, unet]


# --- models that the pipeline cannot hold -------------------------------------------------------


def test_parents_of_another_architecture_are_drawn_apart(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, "params: {M: 1}\nmerge: A + (I - C) * M\n", "AIC"))

    found = sweep(recipe, {"M": (0, 1)}, tmp_path / "s", draws=FAST)

    assert list(found.parents) == ["I", "A", "C"]
    assert all(set(parent.losses) == set("AIC") for parent in found.parents.values())
    assert "A is of another architecture: it was read apart" in found.notes
    for variant in found.variants:
        assert variant.distances["A"].weights is None
        assert variant.distances["I"].weights is not None
        assert all(math.isfinite(apart.pixels) for apart in variant.distances.values())


def test_a_source_that_cannot_draw_is_left_out_and_said(tmp_path: Path) -> None:
    """C without a VAE still takes part in the merge of the UNet."""
    tensors = load_file(TINY / "C.safetensors")
    part = {name: value for name, value in tensors.items() if "first_stage" not in name}
    save_file(part, tmp_path / "part.safetensors")
    path = write_recipe(tmp_path, ADD)
    path.write_text(path.read_text().replace(str(TINY / "C.safetensors"), "part.safetensors"))

    found = sweep(load_recipe(path), {"M": (0.5,)}, tmp_path / "s", draws=FAST)

    assert list(found.parents) == ["A", "B"]
    assert any(note.startswith("C ") and "draws no pictures" in note for note in found.notes)


def test_nan_fails_and_is_never_the_best(tmp_path: Path) -> None:
    tensors = load_file(TINY / "B.safetensors")
    name = "model.diffusion_model.out.2.bias"
    save_file(tensors | {name: tensors[name] * math.nan}, tmp_path / "bad.safetensors")
    path = write_recipe(tmp_path, "params: {M: 0}\nmerge: A + (B - C) * M\n")
    path.write_text(path.read_text().replace(str(TINY / "B.safetensors"), "bad.safetensors"))

    found = sweep(load_recipe(path), {"M": (1, 0)}, tmp_path / "s", draws=FAST)

    assert [variant.verdict for variant in found.variants] == ["fail", "pass"]
    assert found.variants[0].reasons == ("NaN or Inf in its pictures",)
    assert choose(found.variants, "far:C") is found.variants[1]
    with pytest.raises(UsageError, match="no variant is sound"):
        choose(found.variants[:1], "loss")
    files = report_sweep.write_report(found)
    text = json.dumps(report_sweep.sweep_json(found, files), allow_nan=False)
    assert '"latents": null' in text
    red = np.all(pixels(files.sheet) == (198, 40, 40), axis=-1)
    assert red.sum() > 1000


# --- interrupted --------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, ADD)

    def stop(own: object, name: str, done: int, total: int) -> None:
        if name == "M=1":
            raise KeyboardInterrupt

    monkeypatch.setattr(report_sweep.SweepWarnings, "drawing", stop)
    words = ["--set", "M=0,0.5,1", "--prompt", PROMPTS[0], "--seed", "1", "--steps", "1",
             "--device", "cpu", "--save-best", "loss", "-q", "--json"]  # fmt: skip

    code = run(["sweep", str(recipe), *words, "-o", str(tmp_path / "s")])

    seen = capsys.readouterr()
    assert code == 130
    assert "interrupted after 2 of 3 variants" in seen.err
    found = json.loads(seen.out)
    assert found["interrupted"]
    assert found["best"] is None
    assert [variant["params"]["M"] for variant in found["variants"]] == [0, 0.5]
    assert Path(found["sheet"]).is_file()
    assert not list(tmp_path.rglob("*.part"))
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


class StopAtOnce(SweepProgress):
    def start(self, stage: str, total_bytes: int) -> None:
        if stage.startswith("merging"):
            raise KeyboardInterrupt


def test_ctrl_c_before_the_first_picture_leaves_nothing(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "r", ADD))

    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, {"M": (0, 1)}, tmp_path / "s", draws=FAST, progress=StopAtOnce())

    assert not (tmp_path / "s").exists()


def test_an_end_that_is_a_copy_is_nothing_to_warn_of(tmp_path: Path) -> None:
    """At M = 0 nothing is merged, which is what a sweep is for."""
    recipe = load_recipe(write_recipe(tmp_path / "r", ADD))
    shown: list[tuple[str, ...]] = []

    class Listening(StopAtOnce):
        def planned(self, plan: Plan) -> None:
            shown.append(plan.warnings)

    for values in ((1, 0), (0,)):
        with pytest.raises(KeyboardInterrupt):
            sweep(recipe, {"M": values}, tmp_path / "s", draws=FAST, progress=Listening())

    assert ["nothing is merged" in " ".join(warnings) for warnings in shown] == [False, True]


# --- the best -----------------------------------------------------------------------------------


def test_the_best_is_merged_by_a_recipe_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With relative paths, an adapter's weight among the parameters, and another folder."""
    for name in ("A", "B", "C", "glow"):
        shutil.copy(TINY / f"{name}.safetensors", tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "ckptools: 1\nmodels: {A: A.safetensors, B: {path: ./B.safetensors}, C: C.safetensors}\n"
        "params: {M: {default: 1, vae: 0}}\nmerge: A + (B - C) * M\nloras: [glow.safetensors]\n"
        "sweep: {M: [0, 1]}\nrender: {steps: 3}\noutput: {path: best.safetensors}\n"
    )
    folder = tmp_path / "far" / "away"
    words = ["--set", "M=0.25,0.75", "--set", "loras[0].weight=0.5", "--prompt", PROMPTS[0],
             "--seed", "1", "--steps", "2", "--device", "cpu", "--save-best", "far:A"]  # fmt: skip

    code = run(["sweep", str(path), *words, "-o", str(folder)])

    seen = capsys.readouterr()
    assert code == 0, seen.err
    again = load_recipe(folder / "best.yaml")
    assert not again.sweep
    assert again.params["M"].lines[0].value == 0.75
    assert again.params["loras[0].weight"].lines[0].value == 0.5
    assert again.output_path.resolve() == tmp_path / "best.safetensors"
    assert "best: M=0.75 loras[0].weight=0.5" in seen.out
    saved = load_pipeline(tmp_path / "best.safetensors", device="cpu")
    wanted = draw(saved, request(saved, PROMPTS[0], steps=2)).pixels
    (image,) = folder.glob("images/M=0.75*.png")
    assert np.array_equal(pixels(image), wanted)
    assert (folder / "best.yaml").read_text().startswith("# M=0.75 loras[0].weight=0.5: the best")


def test_a_recipe_moves_with_its_paths(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "ckptools: 1\n"
        f"models: {{A: {{path: a.safetensors, config: conf}}, B: {TINY}/B.safetensors}}\n"
        "params: {M: 1, N: {unet: 2}}\nmerge: A * (1 - M) + B * M * N\n"
        "loras: [{path: sub/x.safetensors, weight: 0.3, dora: comfy}, y.safetensors]\n"
        "render: true\nsweep: {M: [0, 1]}\noutput: {path: out/o.safetensors, dtype: fp16}\n"
    )
    numbers = {"N": 0.5, "loras[0].weight": 0.25}

    text = recipe_text(load_recipe(path), numbers, tmp_path / "far" / "away")

    assert yaml.safe_load(text) == {
        "ckptools": 1,
        "models": {
            "A": {"path": "../../a.safetensors", "config": "../../conf"},
            "B": f"{TINY}/B.safetensors",
        },
        "params": {"M": 1, "N": 0.5},
        "merge": "A * (1 - M) + B * M * N",
        "loras": [
            {"path": "../../sub/x.safetensors", "dora": "comfy", "weight": 0.25},
            "../../y.safetensors",
        ],
        "output": {"path": "../../out/o.safetensors", "dtype": "fp16"},
    }


def test_a_recipe_moves_with_paths_that_are_aliases(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "ckptools: 1\nmodels: {A: &a a.safetensors, B: b.safetensors, C: *a}\n"
        "params: {M: 1}\nmerge: A * (1 - M) + B * M\noutput: {path: o.safetensors}\n"
    )

    text = recipe_text(load_recipe(path), {"M": 0.5}, tmp_path / "far")

    models = yaml.safe_load(text)["models"]
    assert models == {"A": "../a.safetensors", "B": "../b.safetensors", "C": "../a.safetensors"}


def test_variants_that_are_near_have_names_of_their_own() -> None:
    numbers = [0.1, 0.1000001, 0.1000002, 1.0, 0.30000000000000004]

    names = [label({"M": number}) for number in numbers]

    assert names == ["M=0.1", "M=0.1000001", "M=0.1000002", "M=1", "M=0.3"]


def test_memory_is_what_is_free_less_what_drawing_takes() -> None:
    assert memory_for(1_000_000_000, 10_000_000_000) == 7_000_000_000
    assert memory_for(9_000_000_000, 10_000_000_000) == 0
    assert memory_for(0, None) == 2_000_000_000


def test_measures_choose(plain: Swept) -> None:
    numbers = ((0.0, 0.6, 0.3), (0.2, 0.3, 0.4), (0.5, 0.1, 0.6))
    variants = [
        replace(v, distances={n: Apart(x, x, x) for n, x in zip("ABC", row, strict=True)},
                looks=replace(v.looks, losses={"A": row[0], "B": row[1]}))
        for v, row in zip(plain.variants, numbers, strict=True)
    ]  # fmt: skip

    best = {m: choose(variants, m).params["M"]
            for m in ("near:A", "near:B", "far:C", "between:A:B", "loss:B", "loss")}  # fmt: skip

    assert best == {
        "near:A": 0, "near:B": 1, "far:C": 1, "between:A:B": 0.5, "loss:B": 1, "loss": 0.5
    }  # fmt: skip
    with pytest.raises(UsageError, match="D drew no pictures"):
        choose(variants, "near:D")


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nothing to sweep"),
        (["--set", "N=0,1"], "unknown parameter 'N'"),
        (["--set", "M=0:1"], "'0:1' leads nowhere"),
        (["--set", "M"], "is not NAME=VALUES"),
        (["--set", "M=0,1", "--size", "big"], "is not WIDTHxHEIGHT"),
        (["--set", "M=0,1", "--save-best", "best"], "no measure 'best'"),
        (["--set", "M=0,1", "--save-best", "near"], "no measure 'near'"),
        (["--set", "M=0,1", "--save-best", "near:Q"], "unknown model 'Q'"),
        (["--set", "M=0,1", "-o", "."], "the folder is not empty"),
        (["--set", "M=0,1", "--sampler", "Oiler", "-o", "new"], "sampler"),
        (["--set", "M=0,1", "--size", "63x64", "-o", "new"], "no picture of 63 x 64"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    words: list[str], says: str,
) -> None:  # fmt: skip
    write_recipe(tmp_path, ADD)
    monkeypatch.chdir(tmp_path)

    code = run(["sweep", "recipe.yaml", "--device", "cpu", *words])

    assert code == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_too_many_variants_and_a_file_for_a_folder_are_refused(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, ADD))
    many = tuple(range(500))

    with pytest.raises(UsageError, match="500 variants"):
        sweep(recipe, {"M": many}, tmp_path / "s")
    with pytest.raises(OutputError, match="this is a file"):
        sweep(recipe, {"M": (0, 1)}, recipe.path)


def test_the_output_is_checked_before_anything_is_drawn(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, ADD))
    recipe.output_path.parent.mkdir()
    recipe.output_path.write_text("there already")

    with pytest.raises(OutputError, match="exists"):
        sweep(recipe, {"M": (0, 1)}, tmp_path / "s", draws=FAST, save_best="loss")

    assert not (tmp_path / "s").exists()


# --- sheet, curve and page ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Two parameters, and a name that tries to be markup."""
    home = tmp_path_factory.mktemp("grid")
    body = "params: {M: 1, N: 0}\nmerge: A + (B - C) * M + (A - B) * N\n"
    recipe = load_recipe(write_recipe(home, body))
    draws = replace(FAST, prompts=("</script><img src=x onerror='document.title=1'>",))
    return sweep(recipe, {"M": (0, 0.5, 1), "N": (0, 0.5)}, home / "s", draws=draws)


def test_two_parameters_make_a_grid_and_more_a_list(grid: Swept) -> None:
    sheet = report_sweep.sweep_sheet(grid)
    as_list = report_sweep.sweep_sheet(replace(grid, axes={**grid.axes, "P": (1.0,)}))

    assert [v.params for v in grid.variants][:2] == [{"M": 0, "N": 0}, {"M": 0, "N": 0.5}]
    assert sheet.width > sheet.height  # three columns, three rows with the parents, labels
    assert as_list.height > 3 * as_list.width / 2  # nine rows of one picture


def test_the_curve_has_a_row_for_each_other_value(grid: Swept, done: Done) -> None:
    two, one = report_sweep.sweep_curve(grid), pixels(done.found["curve"])

    assert two.width == one.shape[1]
    assert one.shape[0] < two.height < 2 * one.shape[0]
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0, 0x9E, 0x73)):
        assert np.all(one == colour, axis=-1).sum() > 20


def test_an_empty_sweep_still_makes_a_report(grid: Swept) -> None:
    """Interrupted while the parents were drawn."""
    empty = replace(grid, variants=(), interrupted=True)

    files = report_sweep.write_report(empty)

    assert pixels(files.sheet).size
    assert '"variants": []' in files.report.read_text(encoding="utf-8")


PROBE = """
<script>
"use strict";
const text = selector => [...document.querySelectorAll(selector)].map(e => e.textContent);
const seen = { errors: window.problems, title: text("#title")[0] };
const now = () => document.querySelector("figure.now img").src;
const box = document.getElementById("axis0");
seen.first = now(); seen.said = text("#said")[0];
box.value = box.max; box.dispatchEvent(new Event("input"));
seen.last = now(); seen.saidLast = text("#said")[0];
seen.charts = document.querySelectorAll("#charts svg").length;
seen.lines = document.querySelectorAll("#charts polyline").length;
seen.rows = text("#table tbody tr").length;
document.querySelector("#table tbody button").click();
seen.clicked = text("#said")[0];
seen.images = document.images.length;
seen.wide = document.documentElement.scrollWidth > window.innerWidth;
const out = document.createElement("pre");
out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
</script>
"""


def seen_in_browser(page: Path, folder: Path) -> dict[str, Any]:
    return what_a_reader_sees(page, PROBE, folder=folder, size="1200,1000")


def test_the_page_lets_one_slide_through_the_variants(done: Done, tmp_path: Path) -> None:
    seen = seen_in_browser(Path(done.found["report"]), tmp_path)

    assert seen["errors"] == []
    assert seen["title"] == "A + (B - C) * M"
    assert seen["said"].startswith("M=0.5: ")
    assert seen["saidLast"].startswith("M=1: ")
    assert seen["first"] != seen["last"]
    assert seen["clicked"].startswith("M=0: 0.000 from A")
    assert (seen["charts"], seen["lines"], seen["rows"]) == (3, 9, 5)
    assert seen["images"] == 2 * 4
    assert not seen["wide"]


def test_names_and_prompts_in_the_page_are_text(grid: Swept, tmp_path: Path) -> None:
    files = report_sweep.write_report(grid)

    seen = seen_in_browser(files.report, tmp_path)

    assert seen["errors"] == []
    assert seen["images"] == 4
    assert "src=" not in re.sub(
        r"<script type.*?</script>", "", files.report.read_text(), flags=re.S
    )


# --- GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu_a_variant_is_the_saved_file_too(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    recipe = load_recipe(write_recipe(tmp_path, ADD))

    found = sweep(recipe, {"M": (0.4, 0.8)}, tmp_path / "s", draws=replace(FAST, device="cuda"))

    saved = load_pipeline(merge(recipe).output, device="cuda")
    wanted = draw(saved, request(saved, PROMPTS[0], steps=1))
    assert np.array_equal(found.variants[1].looks.pictures[0].pixels, wanted.pixels)
