"""`verify`: what it finds in sound and unsound files, and in merges computed again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import UNET, shrunk, with_channels, write_model, write_tensors
from safetensors.torch import load_file, save_file

from ckptools.cli import run
from ckptools.errors import InputError, UsageError
from ckptools.hashing import hash_source
from ckptools.report import safe
from ckptools.soundness import Soundness, verify_source

Found = list[tuple[str, str]]


def problems(found: Soundness) -> Found:
    return [(problem.code, problem.tensor) for problem in found.problems]


def warnings(found: Soundness) -> Found:
    return [(warning.code, warning.tensor) for warning in found.warnings]


def deep(path: Path, tensors: Mapping[str, torch.Tensor]) -> Soundness:
    return verify_source(write_tensors(path / "t.safetensors", tensors), deep=True)


def test_a_sound_file_is_sound(sd1_models: tuple[Path, Path, Path]) -> None:
    found = verify_source(sd1_models[0], deep=True, expect="sd1/base")

    assert found.valid
    assert found.warnings == ()
    assert found.checked == ("structure", "family", "values")


# --- headers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("char", ["\x1b", "\x00", "\n", "\x7f", "\u202e", "\u200b", "\x85"])
def test_characters_that_steer_or_hide_are_problems(tmp_path: Path, char: str) -> None:
    name = f"a{char}b"
    path = write_tensors(
        tmp_path / "t.safetensors", {name: torch.ones(1), "größe 文": torch.ones(1)}, {name: "x"}
    )

    found = verify_source(path)

    assert problems(found) == [("control-character", name), ("control-character", "")]
    assert all(safe(problem.message).isascii() for problem in found.problems)


@pytest.mark.parametrize(
    ("expect", "code"),
    [
        ("sd1", None), ("checkpoint", None), ("sd1/base", None),
        ("sdxl", "family"), ("lora", "family"), ("sd1/inpainting", "family"),
    ],
)  # fmt: skip
def test_the_family_can_be_demanded(
    sd1_models: tuple[Path, Path, Path], expect: str, code: str | None
) -> None:
    found = verify_source(sd1_models[0], expect=expect)

    assert [problem.code for problem in found.problems] == ([code] if code else [])
    assert "family" in found.checked


@pytest.mark.parametrize("expect", [None, "sd1"])
def test_a_component_that_is_there_in_part_is_told(
    expect: str | None, sd1_models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """A problem where a family is asked for; components that are not there at all are none."""
    name = "model.diffusion_model.out.2.bias"
    whole = load_file(sd1_models[0])
    part = {key: value for key, value in whole.items() if key != name}
    bare = {key: value for key, value in whole.items() if not key.startswith("first_stage")}

    found = verify_source(write_tensors(tmp_path / "part.safetensors", part), expect=expect)
    fine = verify_source(write_tensors(tmp_path / "bare.safetensors", bare), expect=expect)

    told = [("incomplete", f"unet lacks 1 tensor, such as {name}")]
    assert [(p.code, p.message) for p in found.problems] == (told if expect else [])
    assert [(p.code, p.message) for p in found.warnings] == ([] if expect else told)
    assert "incomplete" not in {p.code for p in (*fine.problems, *fine.warnings)}


def test_a_variant_is_told(tmp_path: Path) -> None:
    path = write_model(tmp_path / "i.safetensors", with_channels(shrunk("sd1"), 9), seed=1)

    assert verify_source(path, expect="sd1/inpainting").valid
    (problem,) = verify_source(path, expect="sd1/base").problems
    assert "sd1/inpainting, not sd1/base" in problem.message


@pytest.mark.parametrize(
    ("expect", "words"),
    [("sdlx", "did you mean 'sdxl'"), ("sd1/inpaint", "did you mean 'inpainting'")],
)
def test_an_unknown_family_is_wrong_usage(
    sd1_models: tuple[Path, Path, Path], expect: str, words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        verify_source(sd1_models[0], expect=expect)

    assert words in caught.value.fix


def test_a_missing_file_is_no_finding(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        verify_source(tmp_path / "none.safetensors")


# --- values --------------------------------------------------------------------------------------

FLOATS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_inf_are_named_and_counted(tmp_path: Path, dtype: torch.dtype) -> None:
    sound = torch.full((300, 7), 0.5)
    bad = sound.clone()
    bad[3, 2] = bad[299, 6] = math.nan
    endless = sound.clone()
    endless[0, 0] = -math.inf
    tensors = {"bad": bad.to(dtype), "sound": sound.to(dtype)}
    has_inf = bool(torch.tensor(math.inf).to(dtype).float().isinf())
    if has_inf:
        tensors["endless"] = endless.to(dtype)

    found = deep(tmp_path, tensors)

    expected = [("nan", "bad")] + ([("inf", "endless")] if has_inf else [])
    assert sorted(problems(found)) == sorted(expected)
    by_tensor = {problem.tensor: problem.message for problem in found.problems}
    assert by_tensor["bad"] == "2 NaN of 2,100 values"
    if has_inf:
        assert by_tensor["endless"] == "1 Inf of 2,100 values"


def test_values_are_looked_at_only_if_asked(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "t.safetensors", {"a": torch.tensor([math.nan])})

    assert verify_source(path).valid
    assert verify_source(path).checked == ("structure",)
    assert not verify_source(path, deep=True).valid


def test_zero_matrices_are_odd_and_zero_biases_are_not(tmp_path: Path) -> None:
    found = deep(
        tmp_path,
        {
            "weight": torch.zeros(4, 4),
            "bias": torch.zeros(4),
            "nearly": torch.eye(4),
            "empty": torch.zeros(0, 4),
            "ids": torch.zeros(4, 4, dtype=torch.int64),
        },
    )

    assert found.valid
    assert warnings(found) == [("zeros", "weight")]


@pytest.mark.parametrize(
    ("dtype", "tiny"), [(torch.float16, 3e-6), (torch.bfloat16, 1e-39), (torch.float32, 1e-39)]
)
def test_a_flood_of_denormals_is_odd(tmp_path: Path, dtype: torch.dtype, tiny: float) -> None:
    flood = torch.full((10, 10), tiny)
    some = torch.full((10, 10), 0.1)
    some[:4] = tiny
    most_zero = torch.zeros(10, 10)
    most_zero[0] = tiny

    found = deep(
        tmp_path,
        {"flood": flood.to(dtype), "some": some.to(dtype), "zeros": most_zero.to(dtype)},
    )

    assert found.valid
    assert warnings(found) == [("denormal", "flood"), ("denormal", "zeros")]
    assert found.warnings[0].message.startswith("100%")


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (70000.0, torch.float32, "do not fit fp16"),
        (-1e300, torch.float64, "do not fit fp16"),
        (70000.0, torch.bfloat16, "do not fit fp16"),
        (-40000.0, torch.float16, "near the end of fp16"),
        (30000.0, torch.float16, ""),
    ],
)
def test_the_room_left_in_fp16_is_told(
    tmp_path: Path, value: float, dtype: torch.dtype, words: str
) -> None:
    found = deep(tmp_path, {"w": torch.tensor([0.1, value], dtype=torch.float64).to(dtype)})

    assert found.valid
    assert len(found.warnings) == bool(words)
    assert all(words in warning.message for warning in found.warnings)


def test_bytes_that_are_no_booleans_are_odd(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "t.safetensors", {"b": torch.tensor([True, False])})
    path.write_bytes(path.read_bytes()[:-1] + b"\x02")

    assert warnings(verify_source(path, deep=True)) == [("bool", "b")]


IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def ids(kind: torch.dtype, change: tuple[int, float] | None = None) -> torch.Tensor:
    values = torch.arange(77, dtype=torch.float64)
    if change:
        values[change[0]] = change[1]
    return values.to(kind)[None]


@pytest.mark.parametrize(
    ("values", "code", "words"),
    [
        (ids(torch.int64), "", ""),
        (ids(torch.int32), "", ""),
        (ids(torch.float32, (76, 75.9975)), "problem", "1 position ids drifted: number 76"),
        (ids(torch.float16, (76, 75.9375)), "problem", "number 76 is 75.9375"),
        (ids(torch.bfloat16, (10, 9.5)), "problem", "number 10 is 9.5"),
        (ids(torch.int64, (76, 75)), "problem", "number 76 is 75"),
        (ids(torch.float32), "warning", "stored as F32"),
        (ids(torch.bfloat16), "warning", "stored as BF16"),
        (ids(torch.uint8), "", ""),
    ],
)  # fmt: skip
def test_position_ids_must_count(
    tmp_path: Path, values: torch.Tensor, code: str, words: str
) -> None:
    found = deep(tmp_path, {IDS: values})

    expected = [("position-ids", IDS)]
    assert problems(found) == (expected if code == "problem" else [])
    assert warnings(found) == (expected if code == "warning" else [])
    assert all(words in one.message for one in (*found.problems, *found.warnings))


# --- hashes --------------------------------------------------------------------------------------


def test_the_sha256_of_the_file_can_be_demanded(sd1_models: tuple[Path, Path, Path]) -> None:
    path = sd1_models[0]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    for text in (sha256, sha256.upper(), f"sha256:{sha256}", sha256[:10], f" {sha256[:12]} "):
        found = verify_source(path, sha256=text)
        assert found.valid
        assert found.checked == ("structure", "sha256")
    wrong = verify_source(path, sha256="0" * 64)
    assert problems(wrong) == [("sha256", "")]
    assert sha256 in wrong.problems[0].message


@pytest.mark.parametrize("text", ["123456789", "x" * 64, "0" * 65, "0x12", "", "0x", " "])
def test_what_is_no_sha256_is_wrong_usage(sd1_models: tuple[Path, Path, Path], text: str) -> None:
    with pytest.raises(UsageError, match="not a sha256"):
        verify_source(sd1_models[0], sha256=text)


def test_an_empty_family_is_wrong_usage(sd1_models: tuple[Path, Path, Path]) -> None:
    with pytest.raises(UsageError, match="no family"):
        verify_source(sd1_models[0], expect="")


def test_another_tools_wrong_hash_is_a_warning(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(8)}
    wrong = {"modelspec.hash_sha256": "0x" + "ab" * 32}
    right = {"modelspec.hash_sha256": "0X" + hashlib.sha256(tensors["w"].numpy()).hexdigest()}
    path = write_tensors(tmp_path / "w.safetensors", tensors, wrong)

    assert warnings(verify_source(path)) == []  # the data was not read
    assert warnings(verify_source(path, deep=True)) == [("embedded-hash", "")]
    write_tensors(path, tensors, right)
    found = verify_source(path, deep=True)
    assert found.warnings == ()
    assert "modelspec.hash_sha256" in found.checked


# --- merges: the manifest, the recipe again ------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a recipe, its output in one file and in shards."""
    made = tmp_path_factory.mktemp("merge")
    specs = shrunk("sd1")
    for seed, name in enumerate("AB"):
        write_model(made / f"{name}.safetensors", specs, seed=seed)
    (made / "r.yaml").write_text(RECIPE.format(output="{path: o.safetensors}"))
    (made / "s.yaml").write_text(RECIPE.format(output="{path: s.safetensors, shard_size: 1MB}"))
    for recipe in ("r", "s"):
        assert run(["merge", str(made / f"{recipe}.yaml"), "-q"]) == 0
    return made


RECIPE = """\
ckptools: 1
models: {{A: A.safetensors, B: B.safetensors}}
params: {{M: {{default: 0.3, vae: 0}}}}
merge: A * (1 - M) + B * M
output: {output}
"""


@pytest.fixture
def merged(folder: Path, tmp_path: Path) -> Path:
    """A folder of one's own with the models, the recipe, and its output and manifest."""
    for item in folder.iterdir():
        (tmp_path / item.name).write_bytes(item.read_bytes())
    return tmp_path / "o.safetensors"


def with_byte(path: Path, offset: int) -> None:
    """Flip the lowest bit of one byte."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_merge_is_what_its_manifest_says(merged: Path) -> None:
    found = verify_source(merged, deep=True)

    assert found.valid
    assert set(found.checked) >= {"manifest", "values", "modelspec.hash_sha256"}
    assert found.warnings == ()


def test_a_changed_value_is_found_by_both_hashes(merged: Path) -> None:
    with_byte(merged, -2)

    assert verify_source(merged).valid  # headers alone cannot tell
    assert {code for code, _ in problems(verify_source(merged, deep=True))} == {
        "embedded-hash", "manifest",
    }  # fmt: skip


def test_shards_have_one_manifest(merged: Path) -> None:
    index = merged.with_name("s.safetensors.index.json")
    found = verify_source(index, deep=True)
    assert found.valid
    assert set(found.checked) >= {"manifest", "values", "modelspec.hash_sha256"}

    for shard in merged.parent.glob("s-*.safetensors"):  # whose headers speak of all of them
        assert verify_source(shard, deep=True).valid
        assert {x.verdict for x in hash_source(shard, use_cache=False).embedded} == {"unchecked"}

    with_byte(sorted(merged.parent.glob("s-*.safetensors"))[1], -1)
    found = verify_source(index, deep=True)
    assert {code for code, _ in problems(found)} == {"embedded-hash", "manifest"}
    assert any("s-00002-of" in problem.message for problem in found.problems)


def test_another_header_is_not_the_manifests(merged: Path) -> None:
    content = merged.read_bytes()
    merged.write_bytes(content.replace(b'"format":"pt"', b'"format":"np"'))
    assert problems(verify_source(merged)) == [("manifest", "")]

    save_file(load_file(merged), merged)
    (problem,) = verify_source(merged).problems
    assert "bytes, the file has" in problem.message


def test_a_renamed_file_is_not_in_its_manifest(merged: Path) -> None:
    other = merged.with_name("other.safetensors")
    merged.rename(other)
    merged.with_name("o.safetensors.ckptools.json").rename(
        merged.with_name("other.safetensors.ckptools.json")
    )

    assert warnings(verify_source(other)) == [("manifest", "")]
    assert verify_source(other).valid


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema": "other/1"}', "[" * 100_000,
                '{"schema": "ckptools.manifest/1", "outputs": [{"file": "o"}]}']
)  # fmt: skip
def test_a_broken_manifest_is_a_problem(merged: Path, content: str) -> None:
    merged.with_name("o.safetensors.ckptools.json").write_text(content)

    (problem,) = verify_source(merged).problems
    assert problem.code == "manifest"
    assert "is not a manifest" in problem.message


def as_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["schema"] == "ckptools.verify/1"
    return document


@pytest.mark.parametrize(
    ("name", "recipe"), [("o.safetensors", "r.yaml"), ("s.safetensors.index.json", "s.yaml")]
)
def test_a_recipe_gives_the_same_bytes_again_and_nothing_is_written(
    merged: Path, capsys: pytest.CaptureFixture[str], name: str, recipe: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in merged.parent.iterdir()}

    code = run(["verify", str(merged.with_name(name)), "--recipe", str(merged.with_name(recipe)),
                "--json"])  # fmt: skip

    document = as_json(capsys)
    assert (code, document["problems"], document["warnings"]) == (0, [], [])
    assert "same bytes as the recipe makes" in document["sources"][0]["checked"]
    assert {path: path.stat().st_mtime_ns for path in merged.parent.iterdir()} == before


def test_the_inputs_hashes_that_a_merge_recorded_are_taken_again(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merged.with_name("r.yaml")
    assert run(["merge", str(recipe), "-q", "-f", "--hash-inputs"]) == 0

    assert run(["verify", str(merged), "--recipe", str(recipe)]) == 0

    assert "same bytes" in capsys.readouterr().out


def test_the_first_values_that_differ_are_named(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(merged)
    wanted = [f"{UNET}out.2.weight", "first_stage_model.decoder.conv_in.bias"]
    tensors[wanted[0]].view(-1)[17:] += 1
    tensors[wanted[1]][0] += 1
    save_file(tensors, merged)
    merged.with_name("o.safetensors.ckptools.json").unlink()

    code = run(["verify", str(merged), "--recipe", str(merged.with_name("r.yaml")), "--json"])

    document = as_json(capsys)
    assert code == 1
    assert {(p["tensor"], p["message"]) for p in document["problems"]} == {
        (wanted[0], "differs from what the recipe makes, from value 17 on"),
        (wanted[1], "differs from what the recipe makes, from value 0 on"),
    }


def test_another_order_of_tensors_has_the_same_values(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(merged)
    shard = dict(list(tensors.items())[: len(tensors) // 2])
    rest = {name: tensor for name, tensor in tensors.items() if name not in shard}
    save_file(shard, merged.with_name("p1.safetensors"))
    save_file(rest, merged.with_name("p2.safetensors"))
    index = merged.with_name("p.safetensors.index.json")
    homes = dict.fromkeys(shard, "p1.safetensors") | dict.fromkeys(rest, "p2.safetensors")
    index.write_text(json.dumps({"weight_map": homes}))

    assert run(["verify", str(index), "--recipe", str(merged.with_name("r.yaml")), "--json"]) == 0

    document = as_json(capsys)
    assert "same values as the recipe makes" in document["sources"][0]["checked"]
    assert [warning["code"] for warning in document["warnings"]] == ["recipe-header"]


def test_a_header_that_differs_is_told_key_by_key(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = merged.with_name("renamed.safetensors")
    merged.rename(other)

    assert run(["verify", str(other), "--recipe", str(merged.with_name("r.yaml"))]) == 0

    shown = capsys.readouterr().out
    assert "same values as the recipe makes" in shown
    assert "modelspec.title" in shown
    assert "modelspec.hash_sha256" not in shown


def test_a_parameter_may_be_set(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(merged.with_name("r.yaml"))
    assert run(["merge", recipe, "-q", "-f", "--set", "M=0.5"]) == 0

    assert run(["verify", str(merged), "--recipe", recipe, "--set", "M=0.5"]) == 0
    assert run(["verify", str(merged), "--recipe", recipe]) == 1
    assert "and " in capsys.readouterr().out  # the list of differing tensors is cut


def test_other_tensors_than_the_recipes_are_named(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(merged)
    first, second = sorted(name for name in tensors if name.startswith(UNET))[:2]
    more = {"extra": torch.ones(1), second: tensors[second].float()}
    save_file({n: t for n, t in tensors.items() if n != first} | more, merged)
    merged.with_name("o.safetensors.ckptools.json").unlink()

    assert run(["verify", str(merged), "--recipe", str(merged.with_name("r.yaml")), "--json"]) == 1

    found = {p["tensor"]: p["message"] for p in as_json(capsys)["problems"]}
    assert set(found) == {first, second, "extra"}
    assert "the file lacks it" in found[first]
    assert "F32" in found[second]
    assert "does not make" in found["extra"]


def test_a_broken_input_of_the_recipe_is_not_the_files_fault(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged.with_name("B.safetensors").write_bytes(b"")

    code = run(["verify", str(merged), "--recipe", str(merged.with_name("r.yaml")), "--json"])

    assert code == 2
    assert as_json(capsys)["error"]["where"].endswith("B.safetensors")


@pytest.mark.parametrize("recipe", ["[]", "7", '{"models": 3}', '{"models": {"A": 3}}', "{"])
def test_a_strange_recipe_inside_the_file_is_no_matter(
    merged: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    save_file(load_file(merged), merged, {"ckptools.recipe": recipe})
    merged.with_name("o.safetensors.ckptools.json").unlink()

    assert run(["verify", str(merged), "--recipe", str(merged.with_name("r.yaml"))]) == 0
    assert "ckptools.recipe" in capsys.readouterr().out


# --- the command ---------------------------------------------------------------------------------


def test_exit_codes_say_the_worst(
    tmp_path: Path, sd1_models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sound = str(sd1_models[0])
    broken = tmp_path / "b.safetensors"
    broken.write_bytes(b"<html>")
    index = tmp_path / "u.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../a.safetensors"}}')

    assert run(["verify", sound]) == 0
    assert run(["verify", sound, str(broken)]) == 1
    assert run(["verify", str(index), str(broken), sound]) == 3
    assert run(["verify", sound, str(tmp_path / "none")]) == 2
    shown = capsys.readouterr().out
    assert f"{sound}: sound (sd1, base); checked: structure" in shown
    assert f"{broken}: invalid" in shown
    assert f"{index}: unsafe" in shown


def test_json_lists_every_problem_with_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tensors(tmp_path / "n.safetensors", {"a": torch.tensor([math.inf])})

    assert run(["verify", str(path), "--deep", "--json"]) == 1

    document = as_json(capsys)
    assert document["valid"] is False
    assert document["problems"] == [
        {"code": "inf", "message": "1 Inf of 1 values", "tensor": "a", "path": str(path)}
    ]


def test_quiet_shows_only_what_is_wrong(
    tmp_path: Path, sd1_models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    many = {f"w{number:02}": torch.tensor([math.nan]) for number in range(30)}
    path = write_tensors(tmp_path / "n.safetensors", many)

    assert run(["verify", str(sd1_models[0]), str(path), "--deep", "-q"]) == 1

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{path}: invalid")
    assert lines[-1] == "  and 10 more (--json lists all)"
    assert len(lines) == 22


@pytest.mark.parametrize(
    "words", [["A", "B", "--sha256", "0" * 64], ["A", "B", "--recipe", "r"], ["A", "--set", "M=1"]]
)
def test_options_about_one_file_are_refused_for_many(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", *words]) == 2


def test_a_sha256_of_shards_is_wrong_usage(folder: Path) -> None:
    with pytest.raises(UsageError, match="sha256 is of one file"):
        verify_source(folder / "s.safetensors.index.json", sha256="0" * 64)
