"""The command line: exit codes, what goes where, the JSON contract, errors a user can act on."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import click
import pytest
import torch
from models import shrunk, write_model, write_tensors
from safetensors import safe_open
from safetensors.torch import load_file

from ckptools import report, workflow
from ckptools.checkpoint import read_header
from ckptools.cli import group, main, run
from ckptools.errors import ManyErrors, NonFiniteError, RecipeError, UnsafeError
from ckptools.recipe import load_recipe

COMMANDS = tuple(group.list_commands(click.Context(group)))
Captured = pytest.CaptureFixture[str]
ESCAPE = "\x1b[2J\x1b[31m"
HOSTILE = f"{ESCAPE}[red]w[/red]\r\x07\u202e\nwarning: all is well"


@pytest.fixture
def recipe(sd1_models: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    """A recipe of three SD1 models, in the test's own folder."""
    names = [f"  {name}: {path}" for name, path in zip("ABC", sd1_models, strict=True)]
    return write_recipe(
        tmp_path / "recipe.yaml",
        "models:", *names, "params: {M: 0.5}", "merge: A + (B - C) * M",
        "output: {path: out.safetensors}",
    )  # fmt: skip


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A recipe over files whose names of tensors and metadata are made to move the cursor."""
    tensors = {HOSTILE: torch.ones(2), "[bold]n[/bold]\x1b]0;x\x07": torch.tensor([1])}
    write_tensors(tmp_path / "a.safetensors", tensors, {HOSTILE: HOSTILE, "format": "pt"})
    write_tensors(tmp_path / "b.safetensors", {**tensors, "x\x1b[0m": torch.ones(1)})
    return write_recipe(
        tmp_path / "recipe.yaml",
        "models: {A: a.safetensors, B: b.safetensors}", "merge: A * 0.5 + B * 0.5",
        "output: {path: out.safetensors}",
    )  # fmt: skip


def write_recipe(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["ckptools: 1", *lines, ""]), encoding="utf-8")
    return path


def json_of(captured: Captured, command: str) -> dict:
    """The one JSON document on stdout."""
    document = json.loads(captured.readouterr().out)
    assert document["schema"] == f"ckptools.{command}/1"
    return document


def started(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m ckptools …`, as a shell runs it."""
    return subprocess.run(
        [sys.executable, "-m", "ckptools", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd, encoding="utf-8",
    )  # fmt: skip


# --- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_an_example_that_parses(command: str, capsys: Captured) -> None:
    assert len(COMMANDS) >= 7
    code = run([command, "--help"] if command else ["--help"])
    shown = capsys.readouterr().out
    examples = [line.split() for line in shown.splitlines() if line.startswith("    ckptools ")]

    assert code == 0
    assert "Example" in shown
    assert examples
    assert all(example[1] in COMMANDS for example in examples)
    assert command in ("", *(example[1] for example in examples))


def test_help_lists_every_command(capsys: Captured) -> None:
    assert run(["--help"]) == 0

    shown = capsys.readouterr().out
    assert all(f"  {command} " in shown for command in COMMANDS)


def test_version(capsys: Captured) -> None:
    assert run(["--version"]) == 0

    assert capsys.readouterr().out.startswith("ckptools 0.")


# --- plan and explain --------------------------------------------------------------------------


def test_a_planned_size_is_that_of_the_file_but_for_its_metadata(
    recipe: Path, capsys: Captured
) -> None:
    assert run(["plan", str(recipe), "--json"]) == 0
    planned = json_of(capsys, "plan")["output_bytes"]
    assert run(["merge", str(recipe), "--json", "-q"]) == 0
    written = json_of(capsys, "merge")["output_bytes"]

    size = (recipe.parent / "out.safetensors").stat().st_size
    with safe_open(recipe.parent / "out.safetensors", "pt") as opened:
        metadata = json.dumps(opened.metadata())
    assert written == size
    assert 0 < size - planned < 2 * len(metadata)


def test_plan_as_json_has_the_contract_s_keys(recipe: Path, capsys: Captured) -> None:
    assert run(["plan", str(recipe), "--json"]) == 0

    plan = json_of(capsys, "plan")
    assert plan["tensors"] == {"merged": 1130, "carried": 1, "copied": 0, "cast": 0}
    assert plan["output_bytes"] > sum(part["bytes"] for part in plan["components"].values())
    assert plan["read_bytes"] > plan["output_bytes"]
    assert 50_000_000 < plan["peak_bytes"] < 200_000_000
    assert plan["warnings"] == []
    assert plan["components"]["unet"]["forms"] == {"A + 0.5*B - 0.5*C": 686}


def test_plan_shows_models_components_sizes_and_warnings(recipe: Path, capsys: Captured) -> None:
    recipe.write_text(recipe.read_text().replace("A + (B - C) * M", "A + B * M"))
    assert run(["plan", str(recipe)]) == 0

    shown = capsys.readouterr()
    assert "Stable Diffusion 1.x" in shown.out
    assert "A + 0.5*B" in shown.out
    assert "warning: the coefficients add up to 1.5, not 1, for 1,130 tensors" in shown.out
    assert f"output: {recipe.parent / 'out.safetensors'}" in shown.out
    assert shown.err == ""


def test_plan_details_list_what_is_not_merged(
    recipe: Path, capsys: Captured, tmp_path: Path
) -> None:
    extra = {"odd\x1b.name": torch.ones(1)}
    other = write_model(tmp_path / "x.safetensors", shrunk("sd1"), seed=4, edits=extra)
    lines = recipe.read_text().replace("params:", f"  X: {other}\nparams:")
    recipe.write_text(lines.replace("merge: A + (B - C) * M", "merge: A + (B - C) * M + X - X"))
    assert run(["plan", str(recipe), "--details", "--set", "M=0"]) == 0

    shown = capsys.readouterr().out
    assert shown.count("the formula is A here") >= 1130
    assert "position ids are never averaged" in shown
    assert "left out: odd\\x1b.name of X" in shown


def test_plan_of_an_existing_output_says_what_a_merge_will_need(
    recipe: Path, capsys: Captured
) -> None:
    (recipe.parent / "out.safetensors").write_bytes(b"here")
    text = recipe.read_text()
    pinned = re.sub("A: (.*)", rf"A: {{path: \1, sha256: {64 * '0'}}}", text)
    recipe.write_text(pinned)

    assert run(["plan", str(recipe)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "exists: a merge will need --force" in shown
    assert "note: the sha256 of A is checked by a merge" in shown
    recipe.write_text(text.replace("{path: out", "{overwrite: true, path: out"))
    assert run(["plan", str(recipe), "--json"]) == 0
    assert json_of(capsys, "plan")["notes"] == []


def test_explain_names_the_line_that_set_each_number(recipe: Path, capsys: Captured) -> None:
    tensor = "*middle_block.1*attn2.to_k.weight"
    assert run(["explain", str(recipe), tensor, "--json"]) == 0
    explained = json_of(capsys, "explain")
    assert run(["explain", str(recipe), tensor]) == 0
    shown = capsys.readouterr().out

    assert explained["action"] == "merged"
    assert explained["formula"] == "A + (B - C) * M"
    assert explained["with_numbers"] == "A + 0.5*B - 0.5*C"
    assert explained["block"] == "M00"
    assert explained["params"]["M"] == {
        "value": 0.5, "selector": "default", "where": f"{recipe}:6",
    }  # fmt: skip
    assert [read["model"] for read in explained["reads"]] == ["A", "B", "C"]
    assert f"M = 0.5, set by 'default' at {recipe}:6" in shown
    assert "here:    A + 0.5*B - 0.5*C" in shown


def test_set_is_shown_as_the_place_of_a_number(recipe: Path, capsys: Captured) -> None:
    assert run(["explain", str(recipe), "*time_embed.0.weight", "--set", "M=1e-1"]) == 0

    assert "M = 0.1, set by 'default' at --set" in capsys.readouterr().out


def test_explain_of_an_unknown_tensor(recipe: Path, capsys: Captured) -> None:
    assert run(["explain", str(recipe), "nothing"]) == 2

    shown = capsys.readouterr()
    assert shown.out == ""
    assert "error: no tensor 'nothing' in the output" in shown.err
    assert "fix: " in shown.err


# --- merge -------------------------------------------------------------------------------------


def test_merge_as_json_has_the_contract_s_keys(recipe: Path, capsys: Captured) -> None:
    assert run(["merge", str(recipe), "--json", "--threads", "1"]) == 0

    merged = json_of(capsys, "merge")
    assert merged["output"] == str(recipe.parent / "out.safetensors")
    assert Path(merged["manifest"]).is_file()
    assert len(merged["sha256_data"]) == 64
    assert merged["seconds"] > 0
    assert merged["peak_bytes"] > 0
    assert merged["verified"]["finite"] is True
    assert merged["verified"]["recomputed"] > 0


def test_merge_says_what_it_did_on_stdout_and_its_progress_on_stderr(
    recipe: Path, capsys: Captured
) -> None:
    assert run(["merge", str(recipe)]) == 0

    shown = capsys.readouterr()
    assert shown.out.startswith(f"wrote {recipe.parent / 'out.safetensors'} (")
    assert "tensors: 1,130 merged, 1 carried" in shown.out
    assert "all values finite" in shown.out
    assert "A + (B - C) * M" in shown.err


def test_quiet_says_nothing(recipe: Path, capsys: Captured) -> None:
    assert run(["merge", str(recipe), "-q"]) == 0

    assert capsys.readouterr() == ("", "")
    assert (recipe.parent / "out.safetensors").is_file()


def test_quiet_still_prints_the_json_that_was_asked_for(recipe: Path, capsys: Captured) -> None:
    assert run(["merge", str(recipe), "-q", "--json"]) == 0

    assert json_of(capsys, "merge")["verified"]["finite"] is True


def test_an_existing_output_needs_force(recipe: Path, capsys: Captured) -> None:
    output = recipe.parent / "out.safetensors"
    output.write_bytes(b"old")
    refused = run(["merge", str(recipe)])
    shown = capsys.readouterr()
    kept = output.read_bytes()

    assert (refused, kept) == (2, b"old")
    assert "fix: use --force" in shown.err
    assert run(["merge", str(recipe), "--force", "-q"]) == 0
    assert output.stat().st_size > 1_000_000


def test_output_and_set_change_the_run_not_the_recipe(
    recipe: Path, capsys: Captured, tmp_path: Path
) -> None:
    before = recipe.read_bytes()
    other = tmp_path / "other.safetensors"
    assert run(["merge", str(recipe), "-o", str(other), "--set", "M=0", "--json"]) == 0

    merged = json_of(capsys, "merge")
    assert merged["output"] == str(other)
    assert merged["tensors"] == {"merged": 0, "carried": 1, "copied": 1130, "cast": 0}
    assert not (tmp_path / "out.safetensors").exists()
    assert recipe.read_bytes() == before


def test_a_recipe_needs_no_output_where_the_command_line_has_one(
    recipe: Path, capsys: Captured
) -> None:
    text = recipe.read_text()
    recipe.write_text(text.replace("output: {path: out.safetensors}", ""))
    half = recipe.parent / "half.safetensors"

    assert run(["merge", str(recipe), "-q"]) == 2
    assert "the recipe has no 'output'" in capsys.readouterr().err
    assert run(["merge", str(recipe), "-q", "-o", str(half)]) == 0
    assert half.stat().st_size > 1_000_000
    recipe.write_text(text.replace("{path: out.safetensors}", "{dtype: fp32}"))
    assert run(["merge", str(recipe), "-q", "-o", str(half)]) == 2
    assert run(["merge", str(recipe), "-q", "--force", "-o", str(half)]) == 0
    assert {spec.dtype for spec in read_header(half).specs.values()} == {"F32", "I64"}


def test_mistakes_and_missing_files_come_together(recipe: Path, capsys: Captured) -> None:
    """By line; and where only files are missing, selectors are checked against the base."""
    text = recipe.read_text()
    gone = re.sub("B: .*", "B: gone.safetensors", text)
    recipe.write_text(gone.replace("* M", "* N"))
    assert run(["plan", str(recipe)]) == 2
    found = re.findall("error: .*", capsys.readouterr().err)
    assert ["no such file" in found[0], "unknown name 'N'" in found[1], len(found)] == [1, 1, 2]

    recipe.write_text(gone.replace("M: 0.5", 'M: {default: 1, OUT3: 0, "*atn2*": 0}'))
    assert run(["plan", str(recipe)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("error: ") == 3
    for part in ("no such file", "did you mean 'OUT03'?", "did you mean '*attn2*'?"):
        assert part in shown


@pytest.mark.parametrize("command", ["plan", "merge", "sweep"])
def test_what_the_models_family_decides_comes_with_other_mistakes(
    recipe: Path, capsys: Captured, command: str
) -> None:
    """Selectors, components and `compat:`, by line; numbers that no formula uses are let be."""
    recipe.write_text(
        recipe.read_text()
        .replace("M: 0.5", "M: {default: 1, IN22: 0}, L: {unte: 1}")
        .replace("{path: out.safetensors}", "{path: out.safetensors, dtype: {vea: fp16}}")
        + "take: {vaes: A}\nverfy: true\n"
    )

    assert run([command, str(recipe)]) == 2
    shown = capsys.readouterr().err
    parts = ["no block 'IN22'", "dtype: unknown component 'vea'", "unknown component 'vaes'"]
    found = re.findall("error: .*", shown)
    assert [part in line for part, line in zip([*parts, "key 'verfy'"], found, strict=True)] == (
        [True] * 4
    )
    assert "unte" not in shown

    recipe.write_text(recipe.read_text().replace("* M", "* M + Z") + "compat: a1112\n")
    assert run([command, str(recipe)]) == 2
    shown = capsys.readouterr().err
    for part in (*parts, "unknown name 'Z'", "no mapping 'a1112'"):
        assert part in shown


def test_numbers_of_a_formula_that_cannot_be_read_are_checked(
    recipe: Path, capsys: Captured
) -> None:
    """Those it names, against the first model that it names; and files that are no models."""
    (recipe.parent / "vae.safetensors").write_text("<!doctype html><html>")
    text = recipe.read_text().replace("M: 0.5", "M: {default: 1, IN22: 0}, L: {unte: 1}")
    text = text.replace("models:", "models:\n  V: vae.safetensors\n  Z: z.pt")
    recipe.write_text(text.replace("merge: ", "merge: ("))
    assert run(["plan", str(recipe)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("error: ") == 4
    for part in ("HTML", "z.pt", "no block 'IN22'", "never closed"):
        assert part in shown

    recipe.write_text(text.replace("merge: ", "merge: transfer_control(V, B, C) + "))
    assert run(["plan", str(recipe)]) == 2
    assert "IN22" not in capsys.readouterr().err, "blocks of a ControlNet, or of what it is for?"

    recipe.write_text(re.sub("[ABC]: .*safetensors", "A: hf://owner/name/a.safetensors", text))
    assert run(["plan", str(recipe)]) == 2
    assert "IN22" not in capsys.readouterr().err, "no model is at hand"


@pytest.mark.parametrize(
    "numbers", ["{default: a, IN22: 0}", "{mbw: [a], IN00: 1}", "{}", "[0, 1]", "{IN00: }", ""]
)
def test_what_follows_from_a_number_that_cannot_be_read_is_not_told(
    recipe: Path, capsys: Captured, numbers: str
) -> None:
    text = recipe.read_text()
    recipe.write_text(text.replace("M: 0.5", f"M: {numbers}"))
    assert run(["plan", str(recipe)]) == 2
    assert capsys.readouterr().err.count("error: ") == 1

    recipe.write_text(re.sub("A: .*", "A: gone.safetensors", text).replace("M: 0.5", "M: a"))
    assert run(["plan", str(recipe)]) == 2
    assert capsys.readouterr().err.count("error: ") == 2, "nor what another model than the base has"


@pytest.mark.parametrize("place", ["hf://owner/name/x.safetensors", "s3://b/x.safetensors"])
def test_an_output_elsewhere_is_refused(recipe: Path, capsys: Captured, place: str) -> None:
    assert run(["merge", str(recipe), "-q", "-o", place]) == 2
    assert "is no path of this machine" in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace("out.safetensors", f'"{place}"'))
    assert run(["merge", str(recipe), "-q"]) == 2
    assert "`ckptools publish` puts it on the Hub" in capsys.readouterr().err
    assert {path.name for path in recipe.parent.iterdir()} == {"recipe.yaml"}


def test_a_recipe_is_not_replaced_by_its_output(recipe: Path, capsys: Captured) -> None:
    named = recipe.rename(recipe.with_suffix(".safetensors"))
    text = named.read_text()

    assert run(["merge", str(named), "-q", "-f", "-o", str(named)]) == 2

    assert "is one of the inputs" in capsys.readouterr().err
    assert named.read_text() == text


@pytest.mark.parametrize(
    ("selector", "fix"),
    [
        ("unet.*", "did you mean 'unet'?"),
        ("vae*", "did you mean 'vae'?"),
        ("text_encoder.*", "did you mean 'text_encoder'?"),
        ("IN01*", "did you mean 'IN01'?"),
        ("IN00-IN03 vae *attn2*", "a glob stands alone: give each word a line of its own"),
        ("*attn1* *attn2*", "a glob stands alone: give each word a line of its own"),
    ],
)
def test_a_glob_over_what_is_no_part_of_a_name(
    recipe: Path, capsys: Captured, selector: str, fix: str
) -> None:
    recipe.write_text(recipe.read_text().replace("M: 0.5", f'M: {{default: 1, "{selector}": 0}}'))
    assert run(["plan", str(recipe)]) == 2
    assert fix in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="locales are named as on Linux")
def test_a_path_in_letters_that_the_locale_has_not_is_told(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("out.safetensors", "ö.safetensors"), "utf-8")
    old = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    found = subprocess.run(
        [sys.executable, "-m", "ckptools", "merge", str(recipe)],
        capture_output=True, text=True, check=False, env={**os.environ, **old},
    )  # fmt: skip

    assert found.returncode == 2
    assert found.stderr.splitlines()[-1] == "  fix: use UTF-8: PYTHONUTF8=1"
    assert "Traceback" not in found.stderr
    assert not [*recipe.parent.glob("*.part")]


# --- lists -------------------------------------------------------------------------------------


def test_methods_and_families_are_listed_both_ways(capsys: Captured) -> None:
    assert run(["methods", "--json"]) == 0
    methods = json_of(capsys, "methods")["methods"]
    assert run(["methods"]) == 0
    shown_methods = capsys.readouterr().out
    assert run(["families", "--json"]) == 0
    families = json_of(capsys, "families")["families"]
    assert run(["families"]) == 0
    shown_families = capsys.readouterr().out

    assert {"slerp", "ties", "weighted_sum"} <= {method["name"] for method in methods}
    assert all(m["name"] in shown_methods and m["formula"] in shown_methods for m in methods)
    assert {"sd1", "sd2", "sdxl"} <= {family["id"] for family in families}
    assert all(f["id"] in shown_families and f["kind"] in shown_families for f in families)
    sdxl = next(family for family in families if family["id"] == "sdxl")
    assert (len(sdxl["blocks"]), sdxl["blocks"][0]) == (20, "BASE")


def test_schema_is_json(capsys: Captured) -> None:
    assert run(["schema"]) == 0

    assert json.loads(capsys.readouterr().out)["title"] == "ckptools recipe"


# --- wrong usage -------------------------------------------------------------------------------

WRONG = [
    (["merge"], "Missing argument 'RECIPE'"),
    (["mereg", "r.yaml"], "no such command 'mereg': did you mean 'merge'?"),
    (["plan", "RECIPE", "--set", "M"], "'M' is not NAME=NUMBER"),
    (["plan", "RECIPE", "--set", "M=1", "--set", "M=0"], "'M' is given twice"),
    (["plan", "RECIPE", "--set", "M=nan"], "'M=nan' is not NAME=NUMBER"),
    (["plan", "RECIPE", "--set", "=1"], "'=1' is not NAME=NUMBER"),
    (["plan", "RECIPE", "--set", "Q=1"], "unknown parameter 'Q'"),
    (["plan", "RECIPE", "--colour"], "No such option"),
    (["merge", "RECIPE", "--threads", "0"], "0 is not in the range"),
    (["merge", "RECIPE", "-o", "out.ckpt"], "does not end in .safetensors"),
    (["plan", "none.yaml"], "the recipe cannot be read"),
    (["plan", "."], "is a directory"),
    (["merge", "RECIPE", "-o", "x" * 300 + ".safetensors"], "File name too long"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_usage_exits_with_2_and_says_why(
    arguments: list[str], message: str, recipe: Path, capsys: Captured
) -> None:
    words = [str(recipe) if word == "RECIPE" else word for word in arguments]
    assert run(words) == 2
    shown = capsys.readouterr()
    assert run([*words, "--json"]) == 2
    error = json_of(capsys, words[0])["error"]

    assert shown.out == ""
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert message in error["message"]
    assert list(error)[:4] == ["code", "message", "where", "fix"]


@pytest.mark.parametrize(
    ("option", "what"),
    [
        (["-o", "there.safetensors"], "exists"),
        (["-o", "there.safetensors/x.safetensors"], "is not a folder"),
        (["-o", "input.safetensors", "--force"], "is one of the inputs"),
    ],
)
def test_a_mistake_in_an_option_is_placed_at_the_option(
    option: list[str], what: str, recipe: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    Path("there.safetensors").touch()
    Path("input.safetensors").symlink_to(load_recipe(recipe).models["A"].path)

    assert run(["merge", str(recipe), *option, "--json"]) == 2

    error = json_of(capsys, "merge")["error"]
    assert what in error["message"]
    assert error["where"] == "--output"


@pytest.mark.parametrize("columns", [20, 40, 60])
def test_a_narrow_terminal_cuts_no_number_off(
    recipe: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    model = str(load_recipe(recipe).models["A"].path)
    assert run(["inspect", model]) == 0
    wide = capsys.readouterr().out
    sizes = re.findall(r"[\d.]+ [kM]B", wide)
    monkeypatch.setattr(report, "_WIDTH_OF_PIPES", columns)

    assert run(["inspect", model]) == 0

    assert len(sizes) >= 4
    assert re.findall(r"[\d.]+ [kM]B", capsys.readouterr().out) == sizes


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
@pytest.mark.parametrize("command", ["plan", "explain", "inspect"])
def test_tables_are_shown_where_there_are_few_letters(
    recipe: Path, command: str, encoding: str
) -> None:
    words = {
        "plan": [str(recipe), "--details"],
        "explain": [str(recipe), "*out.2.weight"],
        "inspect": [str(load_recipe(recipe).models["A"].path)],
    }[command]

    done = subprocess.run(
        [sys.executable, "-m", "ckptools", command, *words],
        env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "unet" in done.stdout.decode(encoding)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_output_that_goes_to_a_full_disk_is_an_error_without_traceback(
    recipe: Path, options: list[str]
) -> None:
    words = [sys.executable, "-m", "ckptools", "plan", str(recipe), *options]

    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr == (
        f"error: standard output: {os.strerror(errno.ENOSPC)}\n"
        "  fix: free some space, or write to another disk\n"
    )


WHILE_LOADING = """
import signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "ckptools.errors":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from ckptools.__main__ import main
main()
"""


def test_an_interruption_while_modules_are_loaded() -> None:
    words = [sys.executable, "-c", WHILE_LOADING]

    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=25)

    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; nothing was left behind\n"


@pytest.mark.skipif(os.name == "nt", reason="no such shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_streams_that_the_shell_has_closed(recipe: Path, closed: str) -> None:
    """No traceback; and no model opened under a closed one's number, to be written into."""
    before = {path: path.read_bytes() for path in recipe.parent.glob("*.safetensors")}
    words = f"{sys.executable} -m ckptools merge {recipe} {closed}"

    done = subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in before} == before
    assert (recipe.parent / "out.safetensors").stat().st_size > 1_000_000


def test_values_that_are_accepted_are_told(recipe: Path, capsys: Captured) -> None:
    a = Path(re.findall("A: (.*)", recipe.read_text())[0])
    values = load_file(a)
    name = "model.diffusion_model.out.2.bias"
    values[name] = values[name] * float("nan")
    bad = write_tensors(recipe.parent / "nan.safetensors", values)
    text = recipe.read_text().replace(f"A: {a}", f"A: {bad}")
    recipe.write_text(f"{text}allow_nonfinite: true\n")

    assert run(["merge", str(recipe)]) == 0
    assert f"note: {name}: " in " ".join(capsys.readouterr().out.split())
    assert run(["convert", str(bad), str(recipe.parent / "c.safetensors"), "--dtype", "fp32"]) == 1
    assert "get a sound copy of it" in capsys.readouterr().err


# Ctrl-C in a callback that Python calls by itself, where it drops what is raised.
LOST = """
import signal, sys, time, weakref
from ckptools import cli

def command(**_):
    class Thing: pass
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.{name}))
    del thing
    time.sleep(30)

cli.group.main = command
cli.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interruption_that_python_would_drop_is_not_lost(name: str) -> None:
    words = [sys.executable, "-c", LOST.format(name=name)]

    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=25)

    assert done.returncode == 130
    assert done.stderr == "interrupted; nothing was left behind\n"


def test_an_interruption_while_a_class_is_made_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Python 3.11 wraps what is raised in a class's body in a RuntimeError."""

    def stop(**_: object) -> None:
        class Interrupting:
            def __set_name__(self, *_: object) -> None:
                raise KeyboardInterrupt

        type("Holder", (), {"field": Interrupting()})

    monkeypatch.setattr("ckptools.cli.group.main", stop)

    assert run(["plan", "x.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was left behind\n"


def test_another_output_is_not_replaced_because_the_recipes_own_may_be(
    recipe: Path, capsys: Captured
) -> None:
    text = recipe.read_text().replace(
        "{path: out.safetensors}", "{path: o.safetensors, overwrite: true}"
    )
    recipe.write_text(text)
    other = recipe.parent / "other.safetensors"
    other.write_bytes(b"mine")

    assert run(["merge", str(recipe), "-q", "-o", str(other)]) == 2
    assert "exists" in capsys.readouterr().err
    assert other.read_bytes() == b"mine"
    assert run(["merge", str(recipe), "-q", "-o", str(other), "--force"]) == 0
    for words in ([], ["-o", str(recipe.parent / "o.safetensors")], []):
        assert run(["merge", str(recipe), "-q", *words]) == 0


def test_no_arguments_show_the_help(capsys: Captured) -> None:
    assert run([]) == 2

    assert "Commands:" in capsys.readouterr().err


def test_a_recipe_s_mistakes_are_shown_each_with_place_and_fix(
    tmp_path: Path, capsys: Captured
) -> None:
    path = write_recipe(tmp_path / "r.yaml", "models: {A: }", "merje: A", "output: {path: o}")
    assert run(["plan", str(path)]) == 2
    shown = capsys.readouterr()
    assert run(["plan", str(path), "--json"]) == 2
    error = json_of(capsys, "plan")["error"]

    assert shown.out == ""
    assert shown.err.count("error: ") == 3
    assert f"error: {path}:3: unknown key 'merje' in the recipe\n  fix: did you" in shown.err
    assert error["code"] == "recipe"
    assert error["where"] == f"{path}:2"
    assert len(error["others"]) == 2
    assert {tuple(other) for other in error["others"]} == {("code", "message", "where", "fix")}


def test_the_caret_of_a_formula_stands_below_its_column(tmp_path: Path, capsys: Captured) -> None:
    path = write_recipe(
        tmp_path / "r.yaml", "models: {A: a}", "merge: A + Q", "output: {path: o.safetensors}"
    )
    (tmp_path / "a").touch()
    assert run(["plan", str(path)]) == 2

    lines = capsys.readouterr().err.splitlines()
    at = next(number for number, line in enumerate(lines) if line.endswith("A + Q"))
    assert lines[at].index("Q") == lines[at + 1].index("^")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("r"), 2),
        (NonFiniteError("n"), 1),
        (UnsafeError("u"), 3),
        (ManyErrors([RecipeError("one"), RecipeError("two")]), 2),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (OSError(28, "No space left on device"), 2),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, recipe: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(workflow, "merge", fail)

    assert run(["merge", str(recipe), "-q"]) == code
    assert capsys.readouterr().err


def test_a_bug_shows_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(workflow, "merge", fail)

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(["merge", str(recipe), "-q"])


def test_main_exits_with_the_code_and_turns_sigterm_into_an_interrupt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["ckptools", "families", "--json"])
    try:
        with pytest.raises(SystemExit) as caught:
            main()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # nothing is left to stop

        monkeypatch.setattr("ckptools.cli.run", lambda _: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            main()
    finally:
        signal.signal(signal.SIGTERM, before)

    assert caught.value.code == 0


# --- hostile text ------------------------------------------------------------------------------


def is_harmless(shown: str) -> bool:
    return all(char == "\n" or char.isprintable() for char in shown)


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "RECIPE", "--details"],
        ["explain", "RECIPE", "*red*"],
        ["explain", "RECIPE", "none"],
        ["explain", "RECIPE", "*"],
        ["merge", "RECIPE"],
    ],
)
def test_hostile_names_reach_the_terminal_escaped(
    arguments: list[str], hostile: Path, capsys: Captured
) -> None:
    run([str(hostile) if word == "RECIPE" else word for word in arguments])

    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert is_harmless(text)
    assert not any(line.startswith("warning: all is well") for line in text.splitlines())
    if arguments[0] == "explain" and arguments[-1] == "*red*":
        assert "\\x1b[2J\\x1b[31m[red]w[/red]\\r\\x07\\u202e\\nwarning: all is well" in text
    if "--details" in arguments:
        assert "left out: x\\x1b[0m of B" in text
        assert "[bold]n[/bold]\\x1b]0;x\\x07" in text


def test_hostile_names_are_intact_in_json(hostile: Path, capsys: Captured) -> None:
    assert run(["explain", str(hostile), "*red*", "--json"]) == 0
    raw = capsys.readouterr().out

    assert is_harmless(raw)
    assert json.loads(raw)["tensor"] == HOSTILE


def test_a_hostile_name_in_an_error_is_escaped(hostile: Path, capsys: Captured) -> None:
    write_tensors(hostile.parent / "b.safetensors", {HOSTILE: torch.ones(3)})
    assert run(["plan", str(hostile)]) == 2
    shown = capsys.readouterr().err
    assert run(["plan", str(hostile), "--json"]) == 2
    error = json_of(capsys, "plan")["error"]

    assert is_harmless(shown)
    assert "\\nwarning: all is well: A is [2], B is [3]" in shown
    assert error["where"] == HOSTILE


def test_markup_in_a_recipe_is_text(recipe: Path, capsys: Captured) -> None:
    recipe.write_text(recipe.read_text() + "'[red]\\x1b[31m[/nope]': 1\n")
    assert run(["plan", str(recipe)]) == 2

    assert "unknown key '[red]\\\\x1b[31m[/nope]' in the recipe" in capsys.readouterr().err


def test_safe_keeps_what_people_write() -> None:
    assert report.safe("Ünïcode 模型 [x]") == "Ünïcode 模型 [x]"
    assert report.safe("\x9b\x00\ud800") == "\\x9b\\x00\\ud800"


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (2_134_000_000, "2.13 GB"), (4_500_000, "4.5 MB")],
)
def test_sizes_are_decimal(nbytes: int, shown: str) -> None:
    assert report.gigabytes(nbytes) == shown


# --- real processes ----------------------------------------------------------------------------


def test_a_process_ends_with_the_code_and_keeps_stdout_for_data(recipe: Path) -> None:
    done = started("merge", recipe, "--json", cwd=recipe.parent)
    refused = started("merge", recipe, cwd=recipe.parent)

    assert done.returncode == 0
    assert json.loads(done.stdout)["schema"] == "ckptools.merge/1"
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "exists" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_bad_values_end_a_process_with_1_and_leave_nothing(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"w": torch.tensor([1.0, float("nan")])})
    write_tensors(tmp_path / "b.safetensors", {"w": torch.ones(2)})
    path = write_recipe(
        tmp_path / "r.yaml", "models: {A: a.safetensors, B: b.safetensors}",
        "merge: A * 0.5 + B * 0.5", "output: {path: out/o.safetensors}",
    )  # fmt: skip
    done = started("merge", path, "--json", cwd=tmp_path)

    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "non-finite"
    assert not (tmp_path / "out").exists()


def test_an_unsafe_file_ends_a_process_with_3(tmp_path: Path) -> None:
    index = {"weight_map": {"w": "../../etc/passwd.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    path = write_recipe(
        tmp_path / "r.yaml", "models: {A: m.safetensors.index.json}", "merge: A",
        "output: {path: o.safetensors}",
    )  # fmt: skip
    done = started("plan", path, cwd=tmp_path)

    assert done.returncode == 3
    assert "points outside its folder" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise on Windows")
@pytest.mark.parametrize("arguments", [["plan", "RECIPE", "--details"], ["schema"], ["methods"]])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str], recipe: Path) -> None:
    words = [str(recipe) if word == "RECIPE" else word for word in arguments]
    if "--details" in words:
        words += ["--set", "M=0"]  # more than a pipe holds
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptools", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    complaint = process.stderr.read()
    process.stderr.close()

    assert process.wait(60) == 0
    assert complaint == ""


@pytest.mark.skipif(os.name == "nt", reason="no such shell")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("merge RECIPE", 0),
        ("merge RECIPE --json", 0),
        ("diff A B --exit-code", 1),
        ("kinship A B --json", 1),
        ("verify A", 0),
        ("verify A --sha256 00000000000", 1),
        ("plan missing.yaml", 2),
        ("inspect missing.safetensors", 2),
        ("nonsense", 2),
    ],
)
def test_a_reader_that_goes_away_changes_no_exit_code_and_stops_no_work(
    arguments: str, code: int, recipe: Path
) -> None:
    a, b = re.findall("[AB]: (.*)", recipe.read_text())[:2]
    words = [{"RECIPE": str(recipe), "A": a, "B": b}.get(w, w) for w in arguments.split()]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ckptools", *words], stdout=writing, stderr=writing, check=False
        )
    finally:
        os.close(writing)

    assert done.returncode == code
    assert (recipe.parent / "out.safetensors").exists() == ("merge" in arguments)


@pytest.mark.skipif(os.name == "nt", reason="no such shell")
def test_a_script_that_the_shell_left_as_stderr_is_not_written_to(recipe: Path) -> None:
    """As bash does where a script with `2>&-` ends in `exec ckptools …`."""
    with recipe.open("rb") as script:
        done = subprocess.run(
            [sys.executable, "-m", "ckptools", "merge", str(recipe)],
            stdout=subprocess.PIPE, stderr=script, text=True, check=False,
        )  # fmt: skip

    assert done.returncode == 0
    assert done.stdout.startswith("wrote ")


@pytest.mark.parametrize(
    ("output", "what", "fix"),
    [
        ("out/r3", "does not end in .safetensors", "write 'out/r3.safetensors'"),
        ("v1.5", "does not end in .safetensors", "write 'v1.5.safetensors'"),
        ("X.SAFETENSORS", "does not end in .safetensors", "write 'X.safetensors'"),
        ("bad\udcff.safetensors", "is no text in UTF-8", "choose another name"),
    ],
)
def test_an_output_s_name_and_one_to_take_instead(
    output: str, what: str, fix: str, recipe: Path, capsys: Captured
) -> None:
    assert run(["plan", str(recipe), "-o", output]) == 2
    told = capsys.readouterr().err
    assert what in told
    assert fix in told


def test_an_interruption_after_the_output_was_written_says_so(
    recipe: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "sync_folder", interrupt)

    assert run(["merge", str(recipe), "-q"]) == 130
    told = f"interrupted; {recipe.parent / 'out.safetensors'} is written"
    assert capsys.readouterr().err.strip() == told

    monkeypatch.setattr(workflow, "merge", interrupt)
    assert run(["merge", str(recipe), "-q"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted; nothing was left behind"


def test_output_is_plain_text_where_it_is_not_a_terminal(recipe: Path) -> None:
    environment: Mapping[str, str] = {**os.environ, "COLUMNS": "40", "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-m", "ckptools", "plan", str(recipe)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip

    assert "\x1b" not in done.stdout
    assert "Stable Diffusion 1.x" in done.stdout
