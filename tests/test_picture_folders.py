"""Folders of pictures: what an earlier rendering or sweep left makes room, anything else stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import ckptools
from ckptools.cli import run
from ckptools.errors import OutputError
from ckptools.render import files
from ckptools.rendering.folder import Earlier, check_folder

TINY = Path(ckptools.__file__).parent / "tiny"
A = str(TINY / "A.safetensors")
C = str(TINY / "C.safetensors")
PROMPT = "a red circle on a navy background"
FEW = ["--steps", "1", "--sampler", "DDIM", "--device", "cpu"]
SCHEMA = "ckptools.render/1"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_pictures_whose_names_would_be_the_same_are_kept_apart(tmp_path: Path) -> None:
    """Signs become "-", and long names are cut."""
    models = [tmp_path / "x y.safetensors", tmp_path / "x-y.safetensors"]
    for model in models:
        shutil.copy(C, model)
    words = ["--prompt", "a red circle", "--seed", "1", "--seed", "2"]

    assert run(["render", *map(str, models), *words, *FEW, "-o", str(tmp_path / "s"), "-q"]) == 0

    files = [image["file"] for image in report(tmp_path / "s")["images"]]
    assert len(files) == len({file.casefold() for file in files}) == 4
    assert all((tmp_path / "s" / file).is_file() for file in files)


# --- whose a folder is --------------------------------------------------------------------------


def test_what_is_no_result_of_ours_is_refused(tmp_path: Path) -> None:
    check_folder(tmp_path / "none", SCHEMA, force=False)
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty", SCHEMA, force=False)
    (tmp_path / "holiday.png").write_bytes(b"")

    with pytest.raises(OutputError, match="not empty") as caught:
        check_folder(tmp_path, SCHEMA, force=False)
    assert caught.value.exit_code == 2
    for text in ("[]", "{", '{"schema": "ckptools.sweep/1"}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(OutputError, match="not empty"):
            check_folder(tmp_path, SCHEMA, force=False)
        assert Earlier(tmp_path, SCHEMA).put_aside() == 0
    check_folder(tmp_path, SCHEMA, force=True)
    assert names(tmp_path) >= {"holiday.png", "report.json"}
    with pytest.raises(OutputError, match="this is a file"):
        check_folder(tmp_path / "holiday.png", SCHEMA, force=True)


def test_a_report_that_names_other_places_removes_nothing_there(tmp_path: Path) -> None:
    """A folder may come from anywhere."""
    own, other = tmp_path / "own", tmp_path / "precious"
    own.mkdir()
    other.write_text("")
    (own / "a.png").write_text("")
    files = ["../precious", str(other), "a.png", "gone.png", "..\\precious", 7, None, "images"]
    (own / "images").mkdir()
    (own / "report.json").write_text(json.dumps({"schema": SCHEMA, "files": files}))

    with Earlier(own, SCHEMA) as earlier:
        assert earlier.put_aside() == 1
        assert "report.json" not in names(own)
    assert other.exists()
    assert names(own) == set()


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A folder with a result of two pictures, and one that is the user's."""
    for name in ("a.png", "images/b.png", "mine.png"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(f"old {name}")
    document = {"schema": SCHEMA, "files": ["a.png", "images/b.png"]}
    (tmp_path / "out" / "report.json").write_text(json.dumps(document))
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


@pytest.mark.parametrize("end", ["an error", "a kill"])
def test_an_earlier_result_comes_back_where_the_new_one_comes_to_nothing(
    earlier: Path, end: str
) -> None:
    before = contents(earlier)
    aside = Earlier(earlier, SCHEMA)
    assert aside.put_aside() == 2
    assert contents(earlier).keys() & before.keys() == {"mine.png"}
    (earlier / "a.png").write_text("new, and half")

    if end == "an error":
        with pytest.raises(KeyboardInterrupt), aside:
            raise KeyboardInterrupt
    else:
        check_folder(earlier, SCHEMA, force=False)  # by the next process
    assert contents(earlier) == before


def test_a_link_to_other_peoples_files_moves_none(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a.png").write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".ckptools-earlier").symlink_to(tmp_path / "precious")

    check_folder(tmp_path / "out", SCHEMA, force=True)

    assert (tmp_path / "precious" / "a.png").exists()


@pytest.mark.parametrize("moves", range(3))
def test_a_kill_between_two_moves_loses_nothing(
    earlier: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    before = contents(earlier)
    genuine, left = Path.replace, [moves]

    def killed(self: Path, target: Path) -> Path:
        if not left[0]:
            raise SystemExit
        left[0] -= 1
        return genuine(self, target)

    for act in (Earlier.put_aside, Earlier.bring_back):
        left[0] = moves
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with pytest.raises(SystemExit):
                act(Earlier(earlier, SCHEMA))
        check_folder(earlier, SCHEMA, force=False)  # by the next process
        assert contents(earlier) == before
        Earlier(earlier, SCHEMA).put_aside()


def test_what_a_killed_process_put_aside_goes_where_the_new_result_stands(earlier: Path) -> None:
    Earlier(earlier, SCHEMA).put_aside()
    (earlier / "report.json").write_text(json.dumps({"schema": SCHEMA, "files": []}))

    check_folder(earlier, SCHEMA, force=False)

    assert contents(earlier).keys() == {"mine.png", "report.json"}


@pytest.mark.parametrize("command", ["render", "sweep"])
@pytest.mark.parametrize("at", ["before it is written", "after it is written"])
def test_ctrl_c_at_the_first_picture_leaves_the_earlier_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, at: str
) -> None:
    out = tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{A: {A}, C: {C}}}\nparams: {{M: 0.5}}\n"
        "merge: A * M + C * (1 - M)\noutput: {path: o.safetensors}\nsweep: {M: [0.5]}\n"
    )
    words = {
        "render": ["render", C, *FEW, "-o", str(out), "--no-cache", "-q"],
        "sweep": ["sweep", str(recipe), "-o", str(out), "--steps", "1", "--seed", "1", "-q"],
    }[command]
    assert run([*words, "-p" if command == "render" else "--prompt", PROMPT]) in (0, 1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    genuine = files.write_picture

    def interrupted(*arguments: Any) -> None:
        if at == "after it is written":
            genuine(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_picture", interrupted)
    assert run([*words, "-p" if command == "render" else "--prompt", "a star"]) == 130

    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not (out / ".ckptools-earlier").exists()


# --- render -------------------------------------------------------------------------------------


def test_an_earlier_rendering_is_replaced_as_a_whole_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["render", C, *FEW, "-o", str(out)]
    assert run([*words, "-p", PROMPT, "-p", "a star", "-q"]) == 0
    (out / "mine.png").write_bytes(b"a picture of mine")

    assert run([*words, "-p", PROMPT]) == 0

    assert "4 files of an earlier rendering were replaced" in capsys.readouterr().out
    expected = {"C--prompt1--seed1.png", "sheet.png", "report.html", "report.json", "mine.png"}
    assert names(out) == expected
    assert [image["probe"] for image in report(out)["images"]] == ["prompt1"]


def test_other_things_are_not_drawn_among_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "C--prompt1--seed1.png").write_bytes(b"mine")
    words = ["render", C, *FEW, "-p", PROMPT, "-o", str(out), "-q"]

    assert run(words) == 2
    assert "the folder is not empty" in capsys.readouterr().err
    assert names(out) == {"C--prompt1--seed1.png"}
    assert run([*words, "-f"]) == 0
    assert (out / "C--prompt1--seed1.png").read_bytes() != b"mine"


def test_a_rendering_that_fails_leaves_the_earlier_one_and_no_folder(tmp_path: Path) -> None:
    out, new = tmp_path / "out", tmp_path / "a" / "b"
    assert run(["render", C, *FEW, "-p", PROMPT, "-o", str(out), "-q"]) == 0
    before = names(out)
    (tmp_path / "broken.safetensors").write_bytes(b"no model at all")

    for folder in (out, new):
        assert run(["render", str(tmp_path / "broken.safetensors"), "-o", str(folder)]) == 2
        assert run(["render", str(tmp_path / "none.safetensors"), "-o", str(folder)]) == 2
        assert run(["render", C, "--size", "33x17", "-o", str(folder)]) == 2

    assert names(out) == before
    assert not (tmp_path / "a").exists()


def test_a_second_model_that_fails_keeps_the_first_one_s_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, out = tmp_path / "broken.safetensors", tmp_path / "out"
    broken.write_bytes(b"no model at all")

    assert run(["render", C, str(broken), *FEW, "-p", PROMPT, "-o", str(out)]) == 2

    assert "broken.safetensors" in capsys.readouterr().err
    found = report(out)
    assert found["interrupted"]
    assert [image["model"] for image in found["images"]] == ["C"]
    assert any(note.startswith("ended early: ") for note in found["notes"])


def test_a_missing_model_to_compare_with_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = str(tmp_path / "none.safetensors")

    assert run(["render", C, "--beside", beside, "-o", str(tmp_path / "out")]) == 2

    assert "there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_merge_refuses_a_folder_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{C: '{TINY.as_posix()}/C.safetensors'}}\nmerge: C\n"
        f"output: {{path: out.safetensors}}\nrender: {{prompts: [{PROMPT}], steps: 1}}\n"
    )
    folder = tmp_path / "out-render"
    folder.mkdir()
    (folder / "holiday.png").write_bytes(b"")

    assert run(["merge", str(recipe), "-q"]) == 2
    assert "the folder is not empty" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
    assert run(["merge", str(recipe), "-q", "--force"]) == 0
    assert "holiday.png" in names(folder)
    assert run(["merge", str(recipe), "-q", "--force"]) == 0


# --- interrupted --------------------------------------------------------------------------------


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the picture after so many."""
    from ckptools import render

    whole, done = render.draw, []

    def draw(*args: object, **kwargs: object) -> object:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(1)
        return whole(*args, **kwargs)

    monkeypatch.setattr("ckptools.render.draw", draw)


def test_an_interruption_before_the_first_picture_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a" / "out"
    stop_after(0, monkeypatch)

    assert run(["render", C, *FEW, "-p", PROMPT, "-o", str(out)]) == 130

    seen = capsys.readouterr()
    assert "interrupted; nothing was left behind" in seen.err
    assert seen.out == ""
    assert not (tmp_path / "a").exists()


def test_an_interruption_keeps_and_counts_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    stop_after(1, monkeypatch)

    words = ["render", C, "--beside", str(TINY / "A.safetensors"), *FEW, "-o", str(out)]
    assert run([*words, "-p", PROMPT, "-p", "a star"]) == 130

    assert "interrupted; 1 of 4 pictures are kept in" in capsys.readouterr().err
    assert len(report(out)["images"]) == 1


def test_an_impatient_person_is_told_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C once more, while the reports are written."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    stop_after(1, monkeypatch)
    monkeypatch.setattr("ckptools.rendering.studio.write_reports", stop)

    words = ["render", C, *FEW, "-p", PROMPT, "-p", "a star", "-o", str(tmp_path / "out")]
    assert run(words) == 130

    assert "1 of 2 pictures are kept in" in capsys.readouterr().err
    assert names(tmp_path / "out") == {"C--prompt1--seed1.png"}


@pytest.mark.parametrize("when", ["the second picture", "the reports"])
def test_a_disk_that_fills_up_says_what_is_kept(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ckptools import render

    whole, done = render.draw, []

    def full(*args: object, **kwargs: object) -> object:
        if done or when == "the reports":
            raise OSError(errno.ENOSPC, "No space left on device", "x.png")
        done.append(1)
        return whole(*args, **kwargs)

    if when == "the second picture":
        monkeypatch.setattr("ckptools.render.draw", full)
    monkeypatch.setattr("ckptools.rendering.studio.write_reports", lambda _: full())
    done += [1] * (when == "the reports")

    words = ["render", C, *FEW, "-p", PROMPT, "-p", "a star", "-o", str(tmp_path / "out")]
    assert run(words) == 2

    count = 1 if when == "the second picture" else 2
    told = capsys.readouterr().err
    assert f"No space left on device; {count} " in told
    assert "kept in" in told
    assert "fix: free some space" in told
    assert len(names(tmp_path / "out")) == count


def test_an_interrupted_gate_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"ckptools: 1\nmodels: {{C: '{TINY.as_posix()}/C.safetensors'}}\nmerge: C\n"
        "output: {path: out.safetensors}\n"
        f"render: {{when: before_save, prompts: [{PROMPT}], steps: 1}}\n"
    )
    stop_after(1, monkeypatch)

    assert run(["merge", str(recipe), "-q"]) == 130

    assert "the merge is not saved; 1 of 2 pictures are kept" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


# --- sweep --------------------------------------------------------------------------------------


def write_sweep(folder: Path) -> list[str]:
    models = ", ".join(f"{name}: '{TINY.as_posix()}/{name}.safetensors'" for name in "AC")
    (folder / "recipe.yaml").write_text(
        f"ckptools: 1\nmodels: {{{models}}}\nparams: {{M: 1}}\nmerge: A + (C - A) * M\n"
        "output: {path: out.safetensors}\n"
    )
    words = ["--prompt", PROMPT, "--seed", "1", "--steps", "1", "--device", "cpu"]
    return ["sweep", str(folder / "recipe.yaml"), *words, "-o", str(folder / "s"), "-q"]


def test_an_earlier_sweep_is_replaced_as_a_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, out = write_sweep(tmp_path), tmp_path / "s"
    assert run([*words, "--set", "M=0,0.5", "--save-best", "loss"]) == 0
    assert {"images/M=0.5-p1-s1.png", "best.yaml", "report.json"} <= names(out)
    first = report(out)
    assert first["schema"] == "ckptools.sweep/1"
    assert first["variants"][1]["image"] == "images/M=0.5-p1-s1.png"
    assert first["sheet"] == "sheet.png"
    assert all((out / name).is_file() for name in first["files"])
    assert first["versions"]["torch"]
    capsys.readouterr()

    assert run([*words, "--set", "M=1", "--save-best", "loss"]) == 2  # it may have been edited
    assert "best.yaml" in capsys.readouterr().err
    assert run([*words, "--set", "M=1"]) == 0
    assert names(out) == {
        "images/A-p1-s1.png", "images/C-p1-s1.png", "images/M=1-p1-s1.png", "best.yaml",
        "curve.png", "report.html", "report.json", "sheet.png",
    }  # fmt: skip
    assert "7 files of an earlier sweep were replaced" in report(out)["notes"]


def test_a_sweep_stopped_in_its_first_model_removes_its_pictures_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = write_sweep(tmp_path)
    stop_after(1, monkeypatch)

    assert run([*words, "--seed", "2", "--set", "M=0,1"]) == 130

    assert "interrupted before one model was drawn whole" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_sweep_whose_best_cannot_be_merged_is_reported_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OutputError("the disk is full")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    words = [*write_sweep(tmp_path), "--set", "M=0", "--save-best", "loss", "--json"]
    monkeypatch.setattr("ckptools.sweep.merge", full)
    assert run(words) == 2
    assert json.loads(capsys.readouterr().out)["error"]["message"] == "the disk is full"
    assert "the best variant was not merged: the disk is full" in report(tmp_path / "s")["notes"]
    monkeypatch.setattr("ckptools.sweep.merge", stop)
    assert run([*words, "-f"]) == 130
    assert json.loads(capsys.readouterr().out)["interrupted"]
    assert "interrupted: the best variant was not merged" in report(tmp_path / "s")["notes"]
    assert not (tmp_path / "out.safetensors").exists()


def test_a_second_ctrl_c_in_a_sweep_s_report_tells_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptools.report_sweep.html_page", stop)

    assert run([*write_sweep(tmp_path), "--set", "M=0"]) == 130
    assert "3 pictures are kept in" in capsys.readouterr().err


# --- as a person does it ------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no groups of processes here")
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("render", "pictures are kept in"),
        ("sweep", "they are kept in"),
    ],
)
def test_ctrl_c_in_a_running_process(tmp_path: Path, kind: str, told: str) -> None:
    """SIGINT once some pictures are there: exit code 130, whole files, a report."""
    words = write_sweep(tmp_path) if kind == "sweep" else ["render", C, "-o", str(tmp_path / "s")]
    more = ["--set", "M=0:1:0.2"] if kind == "sweep" else ["--seed", "1", *seeds(200)]
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptools", *words, *more, *(FEW if kind == "render" else [])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while len(list((tmp_path / "s").rglob("*.png"))) < 4 and process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)

    assert process.returncode == 130, error
    assert told in error
    assert "Traceback" not in error
    found = report(tmp_path / "s")
    assert found["interrupted"]
    assert not list(tmp_path.rglob("*.part"))
    assert found["images" if kind == "render" else "parents"]


def seeds(count: int) -> list[str]:
    return [word for number in range(2, count) for word in ("--seed", str(number))]
