"""Recipes: every key, every mistake at once with its line and a fix, YAML without surprises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ckptools.errors import CkptError, ManyErrors, RecipeError
from ckptools.recipe import (
    MAX_RECIPE_BYTES,
    MODEL_KEYS,
    OUTPUT_KEYS,
    TOP_KEYS,
    Recipe,
    load_recipe,
    parse_recipe,
    recipe_schema,
    with_numbers,
)

ROOT = Path(__file__).parent.parent
PIN = "0123456789abcdef" * 4

MINIMAL = """\
ckptools: 1
models: {A: a.safetensors, B: b.safetensors}
merge: A * 0.5 + B * 0.5
output: {path: out.safetensors}
"""

FULL = f"""\
ckptools: 1
models:
  A: a.safetensors
  B: {{path: sub/b.safetensors, sha256: {PIN.upper()}}}
  C: "~/c.safetensors"
  V: v.index.json
params:
  M: 0.7
  N: {{default: 0.5, unet: 1e-3, "*attn2*": -.5, IN00-IN03 M00: 1_0.0}}
  W: {{mbw: [{", ".join(["0.5"] * 26)}], OUT03: 0.25}}
let:
  detail: (B - C) * M
  half: detail * N
merge: |
  A + half
    + detail * W
base: A
take: {{vae: V}}
output:
  path: out/merged.safetensors
  dtype: {{default: fp16, vae: keep, unet: fp8_e4m3}}
  shard_size: 1.5 GiB
  metadata: {{title: "1e-3", author: on, version: 1}}
  overwrite: yes
strict: True
allow_nonfinite: off
seed: 1_000
compat: meh
"""


def parse(text: str, **overrides: float) -> Recipe:
    return parse_recipe(text, Path("folder/recipe.yaml"), overrides=overrides)


def errors_of(text: str, **overrides: float) -> list[CkptError]:
    """Every error of a recipe that has some."""
    with pytest.raises(CkptError) as caught:
        parse(text, **overrides)
    error = caught.value
    return list(error.errors) if isinstance(error, ManyErrors) else [error]


def only_error(text: str, **overrides: float) -> CkptError:
    (error,) = errors_of(text, **overrides)
    return error


def with_line(line: str, text: str = MINIMAL) -> str:
    """The minimal recipe and one line (the fifth)."""
    return text + line + "\n"


# --- every key ---------------------------------------------------------------------------------


def test_every_key_says_what_it_says() -> None:
    recipe = parse(FULL)

    assert list(recipe.models) == ["A", "B", "C", "V"]
    assert recipe.models["B"].sha256 == PIN
    assert recipe.models["B"].where == "folder/recipe.yaml:4"
    assert recipe.file_of(recipe.models["A"]) == Path("folder/a.safetensors")
    assert recipe.file_of(recipe.models["C"]) == Path.home() / "c.safetensors"
    assert [(line.selector, line.value) for line in recipe.params["M"].lines] == [("default", 0.7)]
    assert [(line.selector, line.value) for line in recipe.params["N"].lines] == [
        ("default", 0.5),
        ("unet", 0.001),
        ("*attn2*", -0.5),
        ("IN00-IN03 M00", 10.0),
    ]
    assert recipe.params["W"].mbw == (0.5,) * 26
    assert [line.selector for line in recipe.params["W"].lines] == ["OUT03"]
    assert list(recipe.lets) == ["detail", "half"]
    assert recipe.merge.text == "A + half   + detail * W"
    assert (recipe.base, dict(recipe.take)) == ("A", {"vae": ("V", "folder/recipe.yaml:18")})
    assert recipe.output_path == Path("folder/out/merged.safetensors")
    assert dict(recipe.output.dtypes) == {"default": "F16", "vae": "keep", "unet": "F8_E4M3"}
    assert recipe.output.shard_bytes == int(1.5 * 2**30)
    assert dict(recipe.output.metadata) == {"title": "1e-3", "author": "on", "version": "1"}
    assert recipe.output.overwrite
    assert recipe.strict
    assert not recipe.allow_nonfinite
    assert (recipe.seed, recipe.compat, recipe.warnings) == (1000, "meh", ())


def test_what_is_left_out_has_a_default() -> None:
    recipe = parse(MINIMAL)

    assert recipe.base == "A"
    assert dict(recipe.output.dtypes) == {"default": "keep"}
    assert (recipe.output.shard_bytes, recipe.output.overwrite, dict(recipe.take)) == (0, False, {})
    assert (recipe.strict, recipe.allow_nonfinite, recipe.seed) == (False, False, 0)


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        ("keep", "keep"),
        ("fp32", "F32"),
        ("fp16", "F16"),
        ("bf16", "BF16"),
        ("fp8_e4m3", "F8_E4M3"),
        ("fp8_e5m2", "F8_E5M2"),
    ],
)
def test_output_dtypes(word: str, dtype: str) -> None:
    text = MINIMAL.replace("out.safetensors}", f"out.safetensors, dtype: {word}}}")

    assert parse(text).output.dtypes["default"] == dtype


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        ("5GB", 5_000_000_000),
        ("5 GB", 5_000_000_000),
        ("2GiB", 2**31),
        ("1.5M", 1_500_000),
        ("1000kB", 1_000_000),
        ("3000000", 3_000_000),
    ],
)
def test_sizes(size: str, nbytes: int) -> None:
    text = MINIMAL.replace("out.safetensors}", f"out.safetensors, shard_size: {size}}}")

    assert parse(text).output.shard_bytes == nbytes


def test_block_weights_may_be_pasted_as_the_web_uis_print_them() -> None:
    numbers = ",".join(["1", "0", "0.25"] + ["0.5"] * 23)
    recipe = parse(MINIMAL.replace("B * 0.5", "B * W") + f'params: {{W: {{mbw: "{numbers}"}}}}\n')

    assert recipe.params["W"].mbw == (1.0, 0.0, 0.25, *[0.5] * 23)


def test_anchors_stand_for_what_they_name() -> None:
    text = MINIMAL.replace("B * 0.5", "B * M * N") + "params:\n  M: &m {vae: 0, unet: 1}\n  N: *m\n"

    assert parse(text).params["N"].lines == parse(text).params["M"].lines


# --- mistakes ----------------------------------------------------------------------------------

MISTAKES = [
    # (the line added to the minimal recipe, what, fix)
    ("merj: A", "unknown key 'merj' in the recipe", "did you mean 'merge'?"),
    ("Params: {M: 1}", "unknown key 'Params' in the recipe", "did you mean 'params'?"),
    ("seed: 1.5", "seed must be a whole number from 0 to", "such as 42"),
    ("seed: -1", "seed must be a whole number from 0 to", "such as 42"),
    ("seed: [1]", "it is a list", "such as 42"),
    ("seed: 99999999999999999999", "seed must be a whole number from 0 to", ""),
    ("strict: maybe", "strict must be true or false, it is 'maybe'", "true or false"),
    ("strict: 1", "strict must be true or false, it is '1'", "true or false"),
    ("allow_nonfinite: nan", "allow_nonfinite must be true or false, it is 'nan'", ""),
    ("base: X", "base: unknown model 'X'", "known: A, B"),
    ("base:", "base must be text, it is empty", "give it a value"),
    ("take: {vae: V}", "take 'vae': unknown model 'V'", "known: A, B"),
    ("take: {}", "take is empty", "leave it out"),
    ("take: V", "take must be a mapping, it is 'V'", "key: value"),
    ("params: {M: high}", "parameter 'M' must be a number, it is 'high'", "such as 0.5"),
    ("params: {M: 1:30}", "parameter 'M' must be a number, it is '1:30'", "such as 0.5"),
    ("params: {M: on}", "parameter 'M' must be a number, it is 'on'", "such as 0.5"),
    ("params: {M: 0x10}", "parameter 'M' must be a number, it is '0x10'", "such as 0.5"),
    ("params: {M: nan}", "parameter 'M' must be a number, it is 'nan'", "such as 0.5"),
    ("params: {M: .inf}", "parameter 'M' must be a number, it is '.inf'", "such as 0.5"),
    ("params: {M: '0,5'}", "parameter 'M' must be a number, it is '0,5'", "such as 0.5"),
    ("params: {M: }", "parameter 'M' must be a number, it is empty", "such as 0.5"),
    ("params: {M: [0.5]}", "parameter 'M' must be a number or a map", "{mbw: […]}"),
    ("params: {M: {}}", "parameter 'M' is empty", "add `default: 0.5`"),
    ("params: {M: {unet: x}}", "'unet' of parameter 'M' must be a number, it is 'x'", "0.5"),
    ("params: {M: {unet: 1, mbw: [1]}}", "`mbw` must be the first line", "lines below it"),
    ("params: {M: {mbw: [], default: 1}}", "mbw of parameter 'M' is empty", "one for each block"),
    ("params: {M: {mbw: 0.5}}", "mbw of parameter 'M' must be a list of numbers", ""),
    ("params: {M: {mbw: [0.5, x]}}", "mbw of parameter 'M' must be a number, it is 'x'", "0.5"),
    ("params: {M:0.5}", "'M:0.5' in params has no value", "`M: 0.5`"),
    ("params: {M: 0,5}", "'5' in params has no value", "a decimal has a point"),
    ("let: {x: A ^ 2}", "`^` is not part of formulas\n    A ^ 2\n      ^", "only + - * /"),
    ("let: {x: 'A * (1) % (2)'}", "(1) % (2)\n            ^", "only + - * /"),
    ("let: {x: 'A * 0,5'}", "`,` is not part of formulas", "a decimal has a point"),
    ("let: {x: a}", "unknown name 'a'", "did you mean 'A'?"),
    ("let: {x: A * Q}", "unknown name 'Q'", "numbers of your own go into `params:`"),
    ("params: {A: 0.5}", "'A' is a model too", "another name"),
    ("params: {slerp: 0.5}", "'slerp' is the name of a method", "another name"),
    ("params: {M-1: 0.5}", "'M-1' cannot be the name of a parameter", "letters, digits and _"),
    ("params: {lambda: 0.5}", "'lambda' cannot be the name of a parameter", "Python"),
    ("let: {x: A +}", "this does not read as a formula", "write it like"),
    ("let: {A: B}", "'A' is a model or a parameter too", "use another name"),
    ("let: {x: y * 2, y: A}", "'y' is defined later", "above"),
    ("let: {x: x + A}", "'x' stands for itself", "above"),
    ("let: {x: Q}", "unknown name 'Q'", "known: A, B"),
    ("loras: {L: x}", "loras must be a list, it is a mapping", "write `- {path:"),
    ("loras: [{weight: 1}]", "loras[0] has no 'path'", "add `path:`"),
    ("loras: [{path: x, weigth: 1}]", "unknown key 'weigth' in loras[0]", "'weight'"),
    ("loras: [{path: x, weight: y}]", "'loras[0].weight' must be a number, it is 'y'", "0.5"),
    ("loras: [{path: x, dora: y}]", "unknown dora 'y'", "known: comfy, trained"),
    ("loras: [[x]]", "`path` of loras[0] must be text, it is a list", "give it a value"),
    ("let: {x: bake(A)}", "bake needs 'adapter'", "bake(model, adapter, weight=1)"),
    ("let: {x: 'bake(A - B, B)'}", "into a model, not into a delta", "bake(model"),
    ("let: {x: 'bake(A, B, weight=A)'}", "bake: weight must be a number", "such as"),
    ("let: {x: 'bake(A, A + B)'}", "the adapter must be a name of `models:`", "known"),
    ("publish: [x]", "publish must be a mapping, it is a list", "key: value"),
    ("publish: {token: hf_x}", "unknown key 'token' in publish", "known: branch"),
    ("publish: {hub: {Q: a/b}}", "hub: unknown model 'Q'", "known: A, B"),
    ("publish: {licenses: {A: }}", "licenses 'A' must be text, it is empty", "give it a value"),
    ("publish: {tags: art}", "tags must be a list, it is 'art'", "[art, anime]"),
    ("publish: {public: maybe}", "public must be true or false", "write true or false"),
    ("render: {size: 0x0}", "a side of the size is 0", "such as 512x768"),
    ("render: {size: [0, 8]}", "a side of the size is 0", "such as 512x768"),
    ("render: {size: 8}", "size must be width x height, it is '8'", "such as 512x768"),
    ("render: {prompts: [{prompt: a, id: ../x}]}", "'../x' is no word for file names", "letters"),
    ("render: {prompts: [{prompt: a, id: .x}]}", "'.x' is no word for file names", "letters"),
    ("sweep: {}", "sweep is empty", "such as `M: [0, 0.5, 1]`"),
    ("sweep: [M]", "sweep must be a mapping", "key: value"),
    ("sweep: {N: [0, 1]}", "sweep names the unknown parameter 'N'", "has no `params:`"),
]
SWEEP_MISTAKES = [
    ("[]", "sweep of 'M' has no numbers", "such as [0, 0.5, 1]"),
    ("{a: 1}", "sweep of 'M' must be a list of numbers", "such as"),
    ("[0, x]", "sweep of 'M' must be a number", "such as 0.5"),
    ("0:1", "'0:1' leads nowhere", "write first:last:step"),
    ("0:1:0", "'0:1:0' leads nowhere", "write first:last:step"),
    ("0:1:-0.5", "'0:1:-0.5' leads nowhere", "write first:last:step"),
    ("all", "'all' is no list of numbers", "write first:last:step"),
    ("0:1:nan", "'0:1:nan' is no list of numbers", "write first:last:step"),
    ("0:1:0.001", "0:1:0.001 is more than 100 values", "take a larger step"),
]


@pytest.mark.parametrize(("line", "what", "fix"), MISTAKES)
def test_a_mistake_has_its_line_its_fact_and_a_fix(line: str, what: str, fix: str) -> None:
    error = only_error(with_line(line))

    assert isinstance(error, RecipeError)
    assert error.where.startswith("folder/recipe.yaml:5")
    assert what in error.what
    assert error.fix
    assert fix in error.fix


@pytest.mark.parametrize(("values", "what", "fix"), SWEEP_MISTAKES)
def test_a_mistake_in_a_sweep(values: str, what: str, fix: str) -> None:
    error = only_error(with_line(f"params: {{M: 1}}\nsweep: {{M: {values}}}"))

    assert error.where.startswith("folder/recipe.yaml:6")
    assert what in error.what
    assert fix in error.fix


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ("[0, 0.5, 1, 0.5]", (0.0, 0.5, 1.0)),
        ("0:1:0.1", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        ("1:-0.5:-0.5", (1.0, 0.5, 0.0, -0.5)),
        ("0:1:0.4", (0.0, 0.4, 0.8)),
        ("'0, 1e-3'", (0.0, 0.001)),
        ("0.5", (0.5,)),
    ],
)
def test_a_sweep_is_a_list_or_a_range(values: str, found: tuple[float, ...]) -> None:
    text = with_line(f"params: {{M: 1}}\nsweep: {{M: {values}}}")

    assert dict(parse_recipe(text, Path("recipe.yaml")).sweep) == {"M": found}


def test_numbers_replace_whole_parameters() -> None:
    text = with_line("params: {M: {default: 1, unet: 0.5}}\nloras: [{path: x, weight: 2}]")
    recipe = parse_recipe(text, Path("recipe.yaml"))

    found = with_numbers(recipe, {"M": 0.25, "loras[0].weight": 0.5})

    assert [(line.selector, line.value) for line in found.params["M"].lines] == [("default", 0.25)]
    assert found.params["loras[0].weight"].lines[0].value == 0.5
    assert recipe.params["M"].lines[1].value == 0.5
    with pytest.raises(RecipeError, match="unknown parameter 'N'"):
        with_numbers(recipe, {"N": 1.0})


MODEL_MISTAKES = [
    ("[a.safetensors]", "`path` of model 'A' must be text, it is a list", "give it a value"),
    ("", "`path` of model 'A' must be text, it is empty", "give it a value"),
    ("{sha256: " + PIN + "}", "model 'A' has no 'path'", "add `path:`"),
    ("{path: a.safetensors, sha: x}", "unknown key 'sha' in model 'A'", "did you mean 'sha256'?"),
    ("{path: a.safetensors, sha256: abc}", "'abc' is not a sha256", "64 hexadecimal digits"),
    ("hf://org", "'hf://org' does not name a repository", "write hf://owner/repo"),
    ("hf://org/repo/../../x.safetensors", "does not name a file of the repository", "write hf://"),
    ("hf://org/repo/a.safetensors@", "'' is no revision", "a tag or a commit"),
    ("{path: 'hf://org/repo@v1', revision: v2}", "two revisions, 'v1' in the path and 'v2'", "one"),
    ("{path: a.safetensors, revision: main}", "`revision` is for hf:// sources", "remove it"),
]


@pytest.mark.parametrize(("value", "what", "fix"), MODEL_MISTAKES)
def test_a_mistake_in_a_model(value: str, what: str, fix: str) -> None:
    text = MINIMAL.replace("models: {A: a.safetensors, ", f"models:\n  A: {value}\n  ")
    error = only_error(text.replace("b.safetensors}", "b.safetensors"))

    assert error.where == "folder/recipe.yaml:3"
    assert what in error.what
    assert fix in error.fix


OUTPUT_MISTAKES = [
    ("{}", "output has no 'path'", "add `path:`"),
    ("out.safetensors", "output must be a mapping, it is 'out.safetensors'", "{path: out.safet"),
    ("{path: ~nobody-here/o.safetensors}", "there is no user 'nobody-here'", "in full"),
    ("{path: o.safetensors, dtype: {}}", "dtype is empty", "dtype: fp16"),
    ("{path: o.safetensors, metadata: {'': x}}", "a key of metadata is empty", "a name"),
    ("{path: o.safetensors, metadata: {modelspec.hash_sha256: a}}", "is for ckptools to", "leave"),
    ("{path: out/}", "the output 'out/' does not name a file", "'out/merged.safetensors'"),
    ("{path: .safetensors}", "'.safetensors' does not name a file", "'merged.safetensors'"),
    ("{path: o.safetensors, metadata: {format: tf}}", "'format' is for ckptools to", "leave it"),
    ("{path: o.safetensors, metadata: {ckptools.recipe: x}}", "is for ckptools to", "leave it"),
    ("{path: out.ckpt}", "the output 'out.ckpt' does not end in .safetensors", "'out.safet"),
    ("{path: o.safetensors, dtyp: fp16}", "unknown key 'dtyp' in output", "did you mean 'dtype'?"),
    ("{path: o.safetensors, dtype: fp61}", "unknown dtype 'fp61'", "did you mean 'fp16'?"),
    ("{path: o.safetensors, dtype: {vae: F16}}", "unknown dtype 'F16'", "known: bf16"),
    ("{path: o.safetensors, dtype: [fp16]}", "dtype must be text, it is a list", "value"),
    ("{path: o.safetensors, shard_size: big}", "shard_size must be a size, it is 'big'", "5GB"),
    ("{path: o.safetensors, shard_size: 5000000i}", "shard_size must be a size", "5GB"),
    ("{path: o.safetensors, shard_size: 10kB}", "shard_size of 10,000 bytes is below 1 MB", "5GB"),
    ("{path: o.safetensors, metadata: x}", "metadata must be a mapping, it is 'x'", "key: value"),
    ("{path: o.safetensors, metadata: {a: [1]}}", "metadata 'a' must be text", "value"),
    ("{path: o.safetensors, overwrite: 2}", "overwrite must be true or false, it is '2'", "true"),
]


@pytest.mark.parametrize(("value", "what", "fix"), OUTPUT_MISTAKES)
def test_a_mistake_in_the_output(value: str, what: str, fix: str) -> None:
    error = only_error(MINIMAL.replace("{path: out.safetensors}", value))

    assert error.where == "folder/recipe.yaml:4"
    assert what in error.what
    assert fix in error.fix


@pytest.mark.parametrize("key", ["ckptools", "models", "merge", "output"])
def test_a_missing_key_is_named_with_what_it_is_for(key: str) -> None:
    lines = [line for line in MINIMAL.splitlines() if not line.startswith(key)]
    found = errors_of("\n".join(lines))

    assert f"the recipe has no {key!r}" in [error.what for error in found]
    assert next(e.fix for e in found if key in e.what).startswith(f"add `{key}:` (")
    such = {"ckptools": "such as `ckptools: 1`", "output": "`output: {path: merged.safetensors}`"}
    assert next(e.fix for e in found if key in e.what).endswith(such.get(key, ")"))


@pytest.mark.parametrize(
    ("formula", "what", "fix"),
    [
        ("B - A", "the result is a difference of models, not a model", "add it to a model"),
        ("0.5", "the result is a number, not a model", ""),
        ("A + C", "unknown name 'C'", "known: A, B"),
        ("A + (B", "'(' was never closed", ""),
    ],
)
def test_a_formula_that_is_no_model_is_refused_with_line_and_column(
    formula: str, what: str, fix: str
) -> None:
    error = only_error(MINIMAL.replace("A * 0.5 + B * 0.5", formula))

    assert error.where.startswith("folder/recipe.yaml:3, column ")
    assert what in error.what
    assert fix in error.fix


@pytest.mark.parametrize("version", ["2", "1.0", "'one'", "[1]", ""])
def test_another_version_of_the_language_is_refused(version: str) -> None:
    error = only_error(MINIMAL.replace("ckptools: 1", f"ckptools: {version}"))

    assert "this release reads version 1" in error.what
    assert "ckptools: 1" in error.fix


def test_all_mistakes_come_at_once_by_line() -> None:
    text = """\
ckptools: 2
models: {A: a.safetensors, B: hf://x, C: {pat: c}}
params: {M: high, N: {vae: .nan}}
let: {d: B - C, e: d * A}
merge: A + (B - C) * M +
base: Z
take: {vae: Y}
strict: perhaps
seed: x
oops: 1
output: {path: out, dtype: fp17, shard_size: x}
"""
    found = errors_of(text)

    lines = [int(error.where.split(":")[1].split(",")[0]) for error in found]
    assert lines == [1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11, 11]
    assert all(error.code == "recipe" for error in found)


def test_the_errors_of_a_recipe_are_shown_each_with_its_place() -> None:
    with pytest.raises(ManyErrors) as caught:
        parse(with_line("oops: 1\nbase: X"))

    assert str(caught.value).count("folder/recipe.yaml:") == 2
    assert str(caught.value).count("fix: ") == 2


FOLLOW_UPS = [
    # (what is replaced in the recipe below, by what, the lines of the errors)
    ("models:", "modles:", [2]),
    ("params:", "Params:", [4]),
    ("let:", "lets:", [5]),
    ("merge:", "merg:", [6]),
    ("path: out", "pth: out", [9]),
    ("models: {A: a, B: b, C: c}", "models: [a, b, c]", [2]),
    ("models: {A: a, B: b, C: c}", "models:", [2]),
    ("params: {M: 0.5}", "params: [M, 0.5]", [4]),
    ("let: {learned: B - C}", "let: B - C", [5]),
    ("params: {M: 0.5}", "params: {}\nparams: {M: 0.5}", [5]),
    ("params: {M: 0.5}", "values: {M: 0.5}", [4]),
    ("B: b,", "B:,", [2]),
    ("C: c", "B-2: c, C: c", [2]),
    ("M: 0.5", "M: high", [4]),
    ("M: 0.5", "2M: 0.5", [4, 6]),
    ("learned: B - C", "learned: B -", [5]),
    ("learned: B - C", "learned: 'slrp(A, B)'", [5]),
    ("learned: B - C", "learned: B * C", [5]),
    ("learned: B - C", "learned: B - X", [5]),
    ("learned: B - C", "learned: more * 2, more: B - C", [5]),
    ("A: a, B: b", "A: a, b: b", [3]),
]


@pytest.mark.parametrize(("old", "new", "lines"), FOLLOW_UPS)
def test_what_follows_from_a_mistake_is_not_told_as_well(
    old: str, new: str, lines: list[int]
) -> None:
    text = """\
ckptools: 1
models: {A: a, B: b, C: c}
publish: {hub: {B: owner/b}}
params: {M: 0.5}
let: {learned: B - C}
merge: A + learned * M
sweep: {M: [0, 1]}
take: {vae: B}
output: {path: out.safetensors}
"""
    assert parse(text)
    assert old in text

    found = errors_of(text.replace(old, new))

    assert [int(error.where.split(":")[1].split(",")[0]) for error in found] == lines


def test_a_formula_has_its_own_mistakes_told_beside_those_of_the_names() -> None:
    """A misspelt section is read as what it was meant to be."""
    found = errors_of(MINIMAL.replace("models", "modles").replace("A * 0.5", "A * B"))

    assert [error.what.split("\n")[0] for error in found] == [
        "unknown key 'modles' in the recipe",
        "cannot multiply weights by weights",
    ]


def test_all_mistakes_of_a_formula_come_at_once() -> None:
    found = errors_of(MINIMAL.replace("A * 0.5", "A * B + slerp(A, B, t=Q, u=2) + slrp(X, 1 / 0)"))

    assert sorted(error.what.split("\n")[0] for error in found) == [
        "cannot multiply weights by weights",
        "division by zero",
        "slerp has no 'u'",
        "unknown method 'slrp'",
        "unknown name 'Q'",
        "unknown name 'X'",
    ]


def test_an_unknown_name_is_one_mistake_with_all_its_lines() -> None:
    error = only_error(with_line("let: {x: B - bb, y: bb - A}\nbase: bb\ntake: {vae: bb}"))

    assert error.where.startswith("folder/recipe.yaml:5, column 5")
    assert error.what == "unknown name 'bb' (in lines 6, 7 too)\n    B - bb\n        ^"


# --- YAML --------------------------------------------------------------------------------------

DUPLICATES = [
    ("merge: A", "'merge' is given twice (first in line 3)"),
    ("params: {M: 1, M: 0}", "'M' is given twice (first in line 5)"),
    ("params: {M: {unet: 1, unet: 0}}", "'unet' is given twice (first in line 5)"),
    ("let: {x: A, x: B}", "'x' is given twice (first in line 5)"),
    ("take: {vae: A, vae: B}", "'vae' is given twice (first in line 5)"),
]


@pytest.mark.parametrize(("line", "what"), DUPLICATES)
def test_a_duplicate_key_is_an_error(line: str, what: str) -> None:
    error = only_error(with_line(line))

    assert (error.what, error.where) == (what, "folder/recipe.yaml:5")
    assert error.fix == "keep one of the two"


def test_two_models_of_one_name_are_an_error() -> None:
    error = only_error(MINIMAL.replace("B: b", "B: c.safetensors, B: b"))

    assert error.what == "'B' is given twice (first in line 2)"


@pytest.mark.parametrize(
    ("written", "number"),
    [("1e-3", 1e-3), ("1E2", 100.0), (".5", 0.5), ("+1", 1.0), ("'0.25'", 0.25), ("010", 10.0)],
)
def test_numbers_are_read_as_people_write_them(written: str, number: float) -> None:
    text = MINIMAL.replace("B * 0.5", "B * M") + f"params: {{M: {written}}}\n"

    assert parse(text).params["M"].lines[0].value == number


@pytest.mark.parametrize("word", ["on", "off", "y", "no", "null", "1e5", "2024-01-01", "1:30"])
def test_a_model_may_have_a_file_name_that_yaml_would_read_as_something_else(word: str) -> None:
    recipe = parse(MINIMAL.replace("a.safetensors", f'"{word}"'))

    assert recipe.models["A"].path == word


@pytest.mark.parametrize(
    ("text", "what", "where", "fix"),
    [
        ("", "the recipe is empty", "", "ckptools: 1"),
        ("# nothing\n---\n", "the recipe must be a mapping, it is empty", ":3", "key: value"),
        ("just text", "the recipe must be a mapping, it is 'just text'", ":1", "key: value"),
        ("- a\n- b\n", "the recipe must be a mapping, it is a list", ":1", "key: value"),
        (MINIMAL + "---\n" + MINIMAL, "single document", ":5:1", "one recipe to a file"),
        ("ckptools: 1\n\tmodels: {}\n", "'\\t'", ":2:1", "indent with spaces"),
        ("ckptools: 1\nmodels: {A: a\nmerge: A\n", "not YAML", ":3:6", ""),
        ("ckptools: 1\nmodels:\n   A: a\n  B: b\n", "<block end>", ":4:3", "indent the line as"),
        ("ckptools: 1\nmodels: {\n", "expected the node content", ":3:1", "close what is open"),
        ("ckptools: 1\nmerge: @A\n", "cannot start any token", ":2:8", "in quotes"),
        ("ckptools: 1\nmodels: a: b\n", "not YAML", ":2:10", "space after `:`"),
        (with_line("params: {M: {*attn2*: 1}}"), "not YAML", ":5:20", "in quotes"),
        (with_line("let: &l {x: *l}"), "let 'x' must be text", ":5", "value"),
        (with_line("params:\n  M:\n    *attn: 1"), "undefined alias", ":7:5", "in quotes"),
        (with_line("base: !!python/name:os.system A"), "'!!python/name:os.system'", ":5", "remove"),
        (with_line("base: !include a.yaml"), "the tag '!include'", ":5", "remove it"),
        (with_line("params: !!omap [M: 1]"), "the tag '!!omap'", ":5", "remove it"),
        (with_line("? [A]\n: 1"), "a key of the recipe must be plain text", ":5", ""),
        (with_line("<<: {base: A}"), "unknown key '<<'", ":5", ""),
        (MINIMAL + "\x00", "not YAML", "", "text file"),
        (with_line('base: "\\uD800"'), "half of a character", ":5", "all of it"),
        (with_line('base: "\\UFFFFFFFF"'), "a character that there is not", "", ""),
    ],
)
def test_what_is_no_recipe_says_so(text: str, what: str, where: str, fix: str) -> None:
    first = errors_of(text)[0]

    assert what in first.what
    assert first.where == "folder/recipe.yaml" + where
    assert fix in first.fix


def test_a_name_with_a_sign_in_it_is_told_once() -> None:
    """In the formula it is a difference of two names that nobody meant."""
    text = MINIMAL.replace("merge: A", "merge: A * 0.5 + my-model * 0.5")
    (error,) = errors_of(text.replace("{A:", "{my-model: m.safetensors, A:"))

    assert error.what == "'my-model' cannot be the name of a model"


def test_a_recursive_or_deep_file_is_refused_not_followed() -> None:
    """Nor one whose aliases stand for 9^9 texts."""
    recursive = errors_of(with_line("params: &a\n  M: {default: *a}"))
    deep = errors_of("a: " + "[" * 5000)
    rows = ["a0: &a0 {k: A}"]
    for number in range(1, 10):
        inner = ", ".join(f"k{at}: *a{number - 1}" for at in range(9))
        rows.append(f"a{number}: &a{number} {{{inner}}}")
    many = errors_of(with_line("\n".join(rows) + "\nlet: *a9"))

    assert "it is a mapping" in recursive[0].what
    assert deep[0].what == "nested too deeply"
    assert any("let 'k0' must be text, it is a mapping" in error.what for error in many)


@pytest.mark.parametrize("place", ["let", "merge"])
def test_a_chain_of_lets_is_as_deep_as_a_formula_may_be(place: str) -> None:
    """Each line of the chain is three deeper than the one above it: sum, product, name."""

    def chain(length: int) -> str:
        lets = "".join(f"\n  x{n}: 0.5 * x{n - 1} + 0.5 * A" for n in range(1, length))
        last = f"x{length - 1}"
        text = with_line("let:\n  x0: A" + lets).replace("merge: A", f"merge: {last}")
        return text if place == "merge" else text.replace(f"merge: {last}", f"merge: {last} * 1")

    assert len(parse(chain(60)).lets) == 60
    (error,) = errors_of(chain(600))
    assert error.what == (
        "let 'x67': with the `let`s that it uses, the formula is nested more than 200 deep"
    )
    assert error.fix == "merge in two steps, with a file in between"


def test_a_path_of_a_user_that_is_not_there_is_a_folder_s_name() -> None:
    recipe = parse(MINIMAL.replace("a.safetensors", "~nobody-here/a.safetensors"))

    assert recipe.file_of(recipe.models["A"]) == Path("folder/~nobody-here/a.safetensors")


@given(st.text(max_size=60))
def test_any_text_is_a_recipe_or_an_error(text: str) -> None:
    with pytest.raises(CkptError):
        parse(text)


@given(
    st.sampled_from([*TOP_KEYS]),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)
def test_any_value_of_any_key_is_accepted_or_an_error_with_a_line(key: str, value: object) -> None:
    document = yaml.safe_load(MINIMAL) | {key: value}
    text = yaml.safe_dump(document, allow_unicode=True)

    try:
        recipe = parse(text)
    except CkptError as error:
        parts = error.errors if isinstance(error, ManyErrors) else (error,)
        assert all(part.where.startswith("folder/recipe.yaml") for part in parts)
    else:
        assert math.isfinite(recipe.seed)


# --- files -------------------------------------------------------------------------------------


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())

    assert load_recipe(path).merge.text == "A * 0.5 + B * 0.5"


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (MINIMAL.encode("utf-16"), "the recipe is not UTF-8 text"),
        (MINIMAL.replace("a.safe", "ä.safe").encode("latin-1"), "the recipe is not UTF-8 text"),
        (b"\x80\x04\x95" * 100, "a Python pickle (an old .ckpt or .pt), not a recipe"),
        (bytes([8, 1, 0, 0, 0, 0, 0, 0]) + b'{"\xff', "a safetensors file, not a recipe"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG picture, not a recipe"),
        (b"#" * (MAX_RECIPE_BYTES + 1), "a recipe of more than 1 MB: is it a model?"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, raw: bytes, what: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(raw)

    with pytest.raises(RecipeError) as caught:
        load_recipe(path)

    assert caught.value.what == what
    assert caught.value.where == str(path)
    is_text = what.endswith("UTF-8 text")
    assert caught.value.fix == ("save it as UTF-8" if is_text else "give a .yaml file")


def test_a_recipe_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "recipe.yaml", tmp_path):
        with pytest.raises(RecipeError, match="the recipe cannot be read") as caught:
            load_recipe(path)

        assert caught.value.fix == "check the path"


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL.replace("b.safetensors", "/models/b.safetensors"))
    recipe = load_recipe(path)

    assert recipe.file_of(recipe.models["A"]) == tmp_path / "a.safetensors"
    assert recipe.file_of(recipe.models["B"]) == Path("/models/b.safetensors")
    assert recipe.output_path == tmp_path / "out.safetensors"


# --- --set -------------------------------------------------------------------------------------


def test_set_replaces_a_parameter_its_map_included() -> None:
    text = MINIMAL.replace("B * 0.5", "B * M") + "params: {M: {default: 0.7, vae: 0}}\n"
    lines = parse(text, M=0.25).params["M"].lines

    assert [(line.selector, line.value, line.where) for line in lines] == [
        ("default", 0.25, "--set")
    ]


def test_set_of_an_unknown_parameter_names_the_nearest() -> None:
    text = MINIMAL.replace("B * 0.5", "B * mult") + "params: {mult: 0.7}\n"

    error = only_error(text, mul=0.25)
    assert (error.what, error.where) == ("unknown parameter 'mul'", "--set")
    assert error.fix == "did you mean 'mult'?"
    assert only_error(MINIMAL, M=0.25).fix == "the recipe has no `params:`"


def test_a_long_value_is_shown_shortened() -> None:
    error = only_error("word " * 999)

    assert len(error.what) < 120
    assert "'word word " in error.what


def test_set_of_an_unknown_parameter_hides_no_mistake_of_the_recipe() -> None:
    found = errors_of(with_line("oops: 1\nbase: X"), M=0.25)

    assert [error.where.rpartition(":")[2] for error in found] == ["--set", "5", "6"]


# --- unused ------------------------------------------------------------------------------------


def test_names_that_nothing_uses_are_told_with_their_line() -> None:
    text = """\
ckptools: 1
models:
  A: a.safetensors
  B: b.safetensors
  C: c.safetensors
  D: d.safetensors
  E: e.safetensors
params: {M: 0.5, N: 0.5}
let: {idle: C * N, busy: B * M}
merge: A * 0.5 + busy
take: {vae: D}
base: A
output: {path: out.safetensors}
"""

    assert parse(text).warnings == (
        "folder/recipe.yaml:9: let 'idle' is not used",
        "folder/recipe.yaml:8: parameter 'N' is not used",
        "folder/recipe.yaml:5: model 'C' is not used",
        "folder/recipe.yaml:7: model 'E' is not used",
    )


# --- the schema --------------------------------------------------------------------------------


def valid(text: str) -> bool:
    return Draft202012Validator(recipe_schema()).is_valid(yaml.safe_load(text))


def test_the_schema_is_a_schema_of_every_key() -> None:
    schema = recipe_schema()
    Draft202012Validator.check_schema(schema)
    properties = schema["properties"]
    assert isinstance(properties, dict)

    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(properties) == list(TOP_KEYS)
    assert all(row["description"] for row in properties.values())


def test_the_schema_file_is_the_schema() -> None:
    """Written by `ckptools schema > docs/recipe.schema.json`."""
    written = (ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8")

    assert written == json.dumps(recipe_schema(), indent=2) + "\n"


def test_shipped_recipes_load_and_fit_the_schema() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(recipes) >= 3

    for path in recipes:
        assert valid(path.read_text(encoding="utf-8")), path.name
        assert load_recipe(path).models, path.name


def test_the_schema_accepts_what_the_reader_accepts() -> None:
    assert valid(MINIMAL)
    full = FULL.replace("1e-3}", "0.001}").replace("unet: 1e-3", "unet: 0.001")
    assert valid(full.replace("-.5", "-0.5"))


@pytest.mark.parametrize(
    "text",
    [
        with_line("merj: A"),
        MINIMAL.replace("models:", "model:"),
        MINIMAL.replace("ckptools: 1", "ckptools: 2"),
        MINIMAL.replace("A: a.safetensors", "A: {pth: a.safetensors}"),
        MINIMAL.replace("A: a.safetensors", "A-1: a.safetensors"),
        MINIMAL.replace("path: out", "pat: out"),
        MINIMAL.replace("out.safetensors}", "out.safetensors, dtype: fp61}"),
        MINIMAL.replace("out.safetensors}", "out.safetensors, dtype: {vae: fp61}}"),
        with_line("params: {M: high}"),
        with_line("params: {M: {unet: high}}"),
        with_line("params: {M: {mbw: [high]}}"),
        with_line("strict: perhaps"),
        with_line("seed: -1"),
        with_line("take: {vae: 1}"),
    ],
)
def test_the_schema_refuses_typos_as_the_reader_does(text: str) -> None:
    assert not valid(text)
    assert errors_of(text)


@pytest.mark.parametrize("keys", [TOP_KEYS, MODEL_KEYS, OUTPUT_KEYS])
def test_every_key_is_described(keys: dict) -> None:
    assert all(key.text.endswith(".") and key.schema for key in keys.values())
