"""What a file's metadata tells of where it comes from, and that no metadata stops the telling."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from ckptools.lineage import Ancestor, Lineage, read_lineage

A, B, C, AB = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)


def web_ui(*hashes: str | None, method: str = "Weighted sum", multiplier: float = 0.3) -> dict:
    """`sd_merge_recipe` as AUTOMATIC1111's `run_modelmerger` writes it."""
    padded = [*hashes, None, None, None][:3]
    return {
        "type": "webui",
        "primary_model_hash": padded[0],
        "secondary_model_hash": padded[1],
        "tertiary_model_hash": padded[2],
        "interp_method": method,
        "multiplier": multiplier,
        "save_as_half": True,
        "is_inpainting": False,
    }


def model(name: str, recipe: object = None) -> dict:
    return {"name": name, "legacy_hash": "12345678", "sd_merge_recipe": recipe}


def tree(**entries: object) -> Lineage:
    texts = {key.replace("__", "."): json.dumps(value) for key, value in entries.items()}
    return read_lineage(texts, "it.safetensors")


def outline(one: Ancestor) -> object:
    """A tree as nested lists of names."""
    return [one.name, *map(outline, one.parents)] if one.parents else one.name


# --- trees -------------------------------------------------------------------------------------


def test_a_web_ui_merge_of_merges_is_a_tree() -> None:
    found = tree(
        sd_merge_recipe=web_ui(AB, C, method="Add difference", multiplier=1.0),
        sd_merge_models={
            A: model("a.safetensors"),
            B: model("b.ckpt"),
            C: model("c.safetensors"),
            AB: model("ab.safetensors", web_ui(A, B)),
        },
    )

    assert found.root is not None
    assert outline(found.root) == [
        "it.safetensors", ["ab.safetensors", "a.safetensors", "b.ckpt"], "c.safetensors",
    ]  # fmt: skip
    assert found.root.how == "Add difference, multiplier 1"
    ab, c = found.root.parents
    assert (ab.role, ab.sha256, ab.how) == ("primary", AB, "Weighted sum, multiplier 0.3")
    assert (c.role, c.sha256, c.how) == ("secondary", C, "")
    assert found.told_by == "sd_merge_recipe"
    assert found.tools == ("AUTOMATIC1111 web UI",)


def test_a_recipe_of_a_parent_may_be_text() -> None:
    found = tree(
        sd_merge_recipe=web_ui(AB),
        sd_merge_models={AB: model("ab", json.dumps(web_ui(A))), A: model("a")},
    )

    assert outline(found.root) == ["it.safetensors", ["ab", "a"]]


def test_parents_that_nothing_more_is_known_of_are_named_by_their_hash() -> None:
    found = tree(sd_merge_recipe=web_ui(A, None, C))

    assert outline(found.root) == ["it.safetensors", f"sha256 {A[:12]}", f"sha256 {C[:12]}"]
    assert [one.role for one in found.root.parents] == ["primary", "tertiary"]


def test_our_own_recipe_gives_formula_parameters_and_names() -> None:
    recipe = {
        "ckptools": 1,
        "models": {"A": {"path": "a.safetensors", "sha256": A}, "B": {"path": "b.safetensors"}},
        "params": {"M": {"default": 0.7}, "N": {"mbw": [0.5, 1], "unet": 0.25}},
        "merge": "A * (1 - M) + B * M",
        "loras": [{"path": "detail.safetensors", "weight": {"default": 1}}],
    }
    found = tree(
        ckptools__recipe=recipe,
        ckptools__version="0.1.0",
        sd_merge_recipe=web_ui(C),
        sd_merge_models={"header:12": model("b.safetensors", web_ui(C)), C: model("c")},
    )

    assert found.told_by == "ckptools.recipe"
    assert found.root.how == (
        "A * (1 - M) + B * M, M = 0.7, N = {mbw: [0.5, 1], unet: 0.25}"
    )  # fmt: skip
    a, b, lora = found.root.parents
    assert (a.role, a.name, a.sha256) == ("A", "a.safetensors", A)
    # its hash was not computed: it is found by its name, and what is no hash is not shown as one
    assert (b.role, b.name, b.sha256, outline(b)) == (
        "B",
        "b.safetensors",
        "",
        ["b.safetensors", "c"],
    )
    assert (lora.role, lora.name) == ("adapter", "detail.safetensors")


def test_the_web_uis_key_of_our_merges_names_models_and_adapters() -> None:
    recipe = {
        "type": "ckptools",
        "interp_method": "A + 0.5 * (B - C)",
        "models": {"A": "a.safetensors", "B": "b.safetensors"},
        "adapters": {"detail": "detail.safetensors"},
        "multiplier": {"M": 0.5, "N": "per tensor"},
        "primary_model_hash": A,
        "secondary_model_hash": None,
    }
    found = tree(sd_merge_recipe=recipe)

    assert found.root.how == "A + 0.5 * (B - C), M = 0.5, N = per tensor"
    assert [(one.role, one.name, one.sha256) for one in found.root.parents] == [
        ("A", "a.safetensors", A),
        ("B", "b.safetensors", ""),
        ("detail", "detail.safetensors", ""),
    ]


def test_the_manifests_recipe_serves_where_the_file_lost_its_own() -> None:
    recipe = {"merge": "A", "models": {"A": {"path": "a.safetensors"}}}

    assert outline(read_lineage({}, "it", recipe=recipe).root) == ["it", "a.safetensors"]
    assert "ckptools.recipe" not in read_lineage({}, "it", recipe=recipe).decoded


def test_modelspec_names_parents_in_a_list() -> None:
    found = read_lineage(
        {"modelspec.merged_from": "One , Two,,Three", "modelspec.title": "Sum"}, "it.safetensors"
    )

    assert outline(found.root) == ["it.safetensors", "One", "Two", "Three"]
    assert found.told_by == "modelspec.merged_from"
    assert found.modelspec["title"] == "Sum"


def test_without_such_entries_there_is_no_tree() -> None:
    found = read_lineage({"format": "pt"}, "it")

    assert (found.root, found.told_by, found.tools) == (None, "", ())
    assert found.entries == {"format": "pt"}


# --- circles and floods ------------------------------------------------------------------------


def test_a_circle_ends_where_it_closes() -> None:
    found = tree(
        sd_merge_recipe=web_ui(A),
        sd_merge_models={A: model("a", web_ui(B)), B: model("b", web_ui(A))},
    )

    assert outline(found.root) == ["it.safetensors", ["a", ["b", "a"]]]
    assert found.root.parents[0].parents[0].parents[0].note == "named before"


def test_a_thousand_generations_are_cut_and_so_are_a_billion_ancestors() -> None:
    hashes = [f"{number:064x}" for number in range(1000)]
    line = {one: model(one[-4:], web_ui(other, other)) for one, other in pairwise(hashes)}

    found = tree(sd_merge_recipe=web_ui(hashes[0]), sd_merge_models=line)

    def count(one: Ancestor) -> int:
        return 1 + sum(map(count, one.parents))

    assert 100 < count(found.root) < 1000
    assert "more are named" in str(found.root)


# --- trainers ----------------------------------------------------------------------------------


def test_json_in_kohyas_texts_is_decoded() -> None:
    found = read_lineage(
        {
            "ss_network_module": "networks.lora",
            "ss_tag_frequency": '{"10_cat": {"cat": 12, "1girl": 3}}',
            "ss_network_args": '{"conv_dim": 8}',
            "ss_broken": '{"conv_dim"',
        },
        "it",
    )

    assert found.decoded == {
        "ss_tag_frequency": {"10_cat": {"cat": 12, "1girl": 3}},
        "ss_network_args": {"conv_dim": 8},
    }
    assert found.notes == ("metadata 'ss_broken' is not JSON that can be read",)
    assert found.tools == ("kohya sd-scripts",)


# --- hostile metadata --------------------------------------------------------------------------

HOSTILE = [
    "[" * 100_000, '{"a":' * 50_000, "[" * 300 + "]" * 300, '"\\ud800"', '{"\\udfff": 1}',
    '{"models": ["A"]}', '{"models": {"A": 1e999, "B": [[1]]}, "merge": [1], "params": 3}',
    "not json", "[1, 2]", "null", "", '{"multiplier": 1' + "1" * 5000 + "}", "[NaN, Infinity]",
    '{"primary_model_hash": {"a": 1}, "multiplier": {"M": null}}',
    '{"models": {"A": {"path": 3, "sha256": false}}, "loras": [1, {}], "merge": "A"}',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=[text[:14] or "empty" for text in HOSTILE])
def test_no_metadata_stops_the_telling(text: str) -> None:
    keys = ("ckptools.recipe", "sd_merge_recipe", "sd_merge_models", "ss_tag_frequency")

    found = read_lineage(dict.fromkeys(keys, text), "it")

    json.dumps(found.decoded, allow_nan=False)  # every consumer can walk and write it
    assert set(found.entries) == set(keys)


def test_long_values_are_cut_and_their_length_is_told() -> None:
    found = read_lineage({"a": "x" * 5_000_000, "b": "[" + "1," * 60_000 + "1]"}, "it")

    assert len(found.entries["a"]) == 100_000
    assert found.cut == {"a": 5_000_000, "b": 120_003}
    assert found.decoded == {}


def test_a_flood_of_entries_is_cut() -> None:
    many = {f"{number:06d}": "y" * 3_000 for number in range(2_500)} | {"z" * 200_000: "long key"}

    found = read_lineage(many, "it")

    assert len(found.entries) == 2_000
    assert found.left_out == 501
    assert sum(map(len, found.entries.values())) < 6_000_000
    assert len(found.entries["001999"]) == 300


def test_a_key_of_any_length_is_shown_short() -> None:
    found = read_lineage({"k" * 200_000: "v"}, "it")

    assert [len(key) for key in found.entries] == [300]
