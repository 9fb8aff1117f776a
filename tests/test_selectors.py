"""Selectors: which number holds for which tensor, and what is said where none can."""

from __future__ import annotations

import fnmatch
import gzip
import math
from pathlib import Path

import pytest

from ckptools.errors import ManyErrors, RecipeError
from ckptools.family import UNKNOWN, load_families
from ckptools.selectors import CompiledParam, Param, ParamLine, compile_param, mbw_lines

LAYOUTS = Path(__file__).parent / "layouts"
UNET = "model.diffusion_model."
VAE = "first_stage_model.decoder.conv_in.weight"
CLIP = "cond_stage_model.transformer.text_model.encoder.layers.0.layer_norm1.bias"
Lines = dict[str, float]


def names_of(layout: str) -> list[str]:
    lines = gzip.decompress((LAYOUTS / f"{layout}.txt.gz").read_bytes()).decode().splitlines()
    return [line.partition("\t")[0] for line in lines]


def param_of(lines: Lines) -> Param:
    rows = enumerate(lines.items(), 1)
    return Param(tuple(ParamLine(key, value, f"r.yaml:{row}") for row, (key, value) in rows))


def compiled(lines: Lines, layout: str = "sd1", compat: str = "") -> CompiledParam:
    family = load_families()[layout]
    return compile_param(
        param_of(lines), name_of_param="M", family=family, names=names_of(layout), compat=compat
    )


def failure(lines: Lines, layout: str = "sd1", compat: str = "") -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        compiled(lines, layout, compat)
    return caught.value


# --- what is selected -----------------------------------------------------------------------------


def test_a_plain_number_holds_for_every_tensor() -> None:
    family, names = load_families()["sd1"], names_of("sd1")
    param = compile_param(Param.plain(0.7), name_of_param="M", family=family, names=names)

    assert {param.value_of(name) for name in names} == {0.7}
    assert param.line_of(names[0]).selector == "default"


def test_a_component_selects_its_tensors_only() -> None:
    param = compiled({"default": 0.5, "vae": 0.0})

    for name in names_of("sd1"):
        assert param.value_of(name) == (0.0 if name.startswith("first_stage_model.") else 0.5)


def test_a_block_range_selects_both_ends_and_all_between() -> None:
    param = compiled({"default": 0.0, "OUT03-OUT05": 1.0})
    chosen = {name for name in names_of("sd1") if param.value_of(name) == 1.0}

    expected = {
        name
        for number in (3, 4, 5)
        for name in fnmatch.filter(names_of("sd1"), f"{UNET}output_blocks.{number}.*")
    }
    assert chosen == expected
    assert len(chosen) == 38 + 38 + 40  # counted in the layout: blocks 3, 4 and 5 (upsampler)


def test_several_words_select_what_any_of_them_selects() -> None:
    together = compiled({"default": 0.0, "BASE IN00-IN11": 1.0})
    apart = compiled({"default": 0.0, "BASE": 1.0, "IN00-IN11": 1.0})

    assert {n: together.value_of(n) for n in names_of("sd1")} == {
        n: apart.value_of(n) for n in names_of("sd1")
    }
    assert together.value_of(VAE) == 1.0
    assert together.value_of(f"{UNET}middle_block.0.in_layers.0.weight") == 0.0


def test_a_range_may_run_over_the_middle() -> None:
    param = compiled({"default": 0.0, "IN11-OUT00": 1.0})

    assert param.value_of(f"{UNET}input_blocks.11.0.in_layers.0.weight") == 1.0
    assert param.value_of(f"{UNET}middle_block.0.in_layers.0.weight") == 1.0
    assert param.value_of(f"{UNET}output_blocks.0.0.in_layers.0.weight") == 1.0
    assert param.value_of(f"{UNET}output_blocks.1.0.in_layers.0.weight") == 0.0


@pytest.mark.parametrize("glob", ["*attn2*", "*.attn[12].to_k.weight", f"{UNET}out.?.bias", VAE])
def test_a_glob_selects_as_fnmatch_does(glob: str) -> None:
    param = compiled({"default": 0.0, glob: 1.0})

    chosen = {name for name in names_of("sd1") if param.value_of(name) == 1.0}

    assert chosen == {name for name in names_of("sd1") if fnmatch.fnmatchcase(name, glob)}
    assert chosen


def test_a_glob_may_use_the_usual_name_of_a_tensor_named_the_nai_way() -> None:
    nai = CLIP.replace("text_model.", "")
    param = compile_param(
        param_of({"*text_model*": 1.0}),
        name_of_param="M",
        family=load_families()["sd1"],
        names=[nai],
    )

    assert param.value_of(nai) == 1.0


def test_the_last_line_that_matches_wins() -> None:
    attn2 = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"

    assert compiled({"default": 0.1, "unet": 0.2, "IN04": 0.3}).value_of(attn2) == 0.3
    assert compiled({"default": 0.1, "*attn2*": 0.4, "unet": 0.2}).value_of(attn2) == 0.2
    assert compiled({"unet": 0.2, "IN04": 0.3, "default": 0.1}).value_of(attn2) == 0.1


def test_lines_that_win_nowhere_are_told() -> None:
    param = compiled({"unet": 0.2, "vae": 0.5, "default": 0.1, "IN00-IN11 M00": 0.3})

    assert [line.selector for line in param.shadowed] == ["unet", "vae"]
    assert param.values == (0.1, 0.3)


def test_the_line_tells_where_the_number_stands() -> None:
    line = compiled({"default": 0.1, "vae": 0.2}).line_of(VAE)

    assert (line.selector, line.where) == ("vae", "r.yaml:2")


def test_an_unknown_family_merges_by_names() -> None:
    names = ["model.layers.0.q.weight", "lm_head.weight"]
    param = compile_param(
        param_of({"default": 0.5, "*.q.*": 0.9}), name_of_param="M", family=UNKNOWN, names=names
    )

    assert [param.value_of(name) for name in names] == [0.9, 0.5]


@pytest.mark.parametrize(("compat", "value"), [("", 0.25), ("supermerger", 0.25), ("mecha", 0.75)])
def test_time_embed_goes_where_compat_says(compat: str, value: float) -> None:
    lines = {"default": 0.5, "BASE": 0.75, "IN00": 0.25}

    assert compiled(lines, compat=compat).value_of(f"{UNET}time_embed.0.weight") == value


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "selector", "what", "fix"),
    [
        ("sdxl", "IN11", "sdxl has no block 'IN11'", "BASE IN00-IN08 M00 OUT00-OUT08"),
        ("sdxl", "IN05-IN11", "sdxl has no block 'IN11'", "IN00-IN08"),
        ("sd1", "IN1", "sd1 has no block 'IN1'", "did you mean 'IN01'?"),
        ("sd1", "mid-OUT4", "sd1 has no block 'mid'", "did you mean 'M00-OUT04'?"),
        ("sd1", "IN00-IN99", "sd1 has no block 'IN99'", "IN00-IN11"),
        ("sd1", "in04", "no block 'in04'", "upper case: 'IN04'"),
        ("sd1", "in04-IN06", "no block 'in04-IN06'", "upper case: 'IN04-IN06'"),
        ("sd1", "IN06-IN04", "range 'IN06-IN04' runs backwards", "write IN04-IN06"),
        ("sd1", "Unet", "'Unet' is neither a component nor a block of sd1", "'unet'"),
        ("sd1", "text_encodr", "'text_encodr' is neither", "'text_encoder'"),
        ("sd1", "text_encoder_2", "'text_encoder_2' is neither", "'text_encoder'"),
        ("sd1", "nonsense", "'nonsense' is neither", "known: default, unet, text_encoder, vae"),
        ("sd1", "vae nonsense", "'nonsense' is neither", "a glob such as '*attn2*'"),
        ("sd1", "default vae", "'default' is neither", "'default'"),
        ("sd1", " ", "a selector is empty", "`default`"),
        ("sd1", "ema", "'ema' matches none of the 1131 tensors", "holds unet, text_encoder, vae"),
        ("sd1", "*attn9*", "'*attn9*' matches none of the 1131 tensors", "did you mean '*attn"),
        ("sd1", "*zzz*", "'*zzz*' matches none of the 1131 tensors", "the whole name"),
        ("sd1", "*Attn2*", "'*Attn2*' matches none", "globs are case-sensitive: '*attn2*'"),
        ("sd1", "attn2.", "'attn2.' matches none", "'*attn2.*' does"),
    ],
)
def test_a_selector_that_selects_nothing_is_an_error(
    layout: str, selector: str, what: str, fix: str
) -> None:
    error = failure({"default": 0.5, selector: 0.1}, layout)

    assert error.what.startswith(f"param 'M': {what}")
    assert fix in error.fix
    assert error.where == "r.yaml:2"


def test_a_block_for_a_family_without_blocks_is_an_error() -> None:
    with pytest.raises(RecipeError, match="unknown has no block 'IN04'") as caught:
        compile_param(
            param_of({"default": 1.0, "IN04": 0.5}), name_of_param="M", family=UNKNOWN, names=["a"]
        )
    assert caught.value.fix == "use a glob over tensor names"


def test_a_tensor_without_a_value_is_an_error() -> None:
    error = failure({"unet": 0.5, "vae": 0.0})

    assert error.what.startswith("param 'M': no value for cond_stage_model.transformer.")
    assert error.what.endswith("and 195 more")  # 197, one of them position_ids
    assert error.fix == "add `default:`, or a line for text_encoder"
    assert error.where == "r.yaml:1"


def test_protected_tensors_need_no_value() -> None:
    names = ["model_ema.decay", "betas", f"{UNET}out.0.bias"]
    param = compile_param(
        param_of({"unet": 0.5}), name_of_param="M", family=load_families()["sd1"], names=names
    )

    assert set(param.lines) == {names[2]}


@pytest.mark.parametrize("name", ["model_ema.decay", "never.heard.of"])
def test_asking_for_a_tensor_without_a_value_is_an_error(name: str) -> None:
    with pytest.raises(RecipeError, match=f"param 'M': no value for {name}"):
        compiled({"default": 0.5}).value_of(name)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_an_error(value: float) -> None:
    assert "is not finite" in failure({"default": value}).what


def test_all_errors_come_at_once_with_their_places() -> None:
    with pytest.raises(ManyErrors) as caught:
        compiled({"default": 0.5, "IN12": 0.1, "vea": 0.2, "*x*y*z*": 0.3})

    assert [error.where for error in caught.value.errors] == ["r.yaml:2", "r.yaml:3", "r.yaml:4"]


def test_an_unknown_compat_is_an_error() -> None:
    error = failure({"default": 0.5}, compat="mehca")

    assert "sd1 has no block mapping 'mehca'" in error.what
    assert error.fix == "did you mean 'mecha'?"


# --- merge block weighted -------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "count"), [("sd1", 26), ("sd2", 26), ("sdxl", 20)])
def test_mbw_numbers_are_base_in_middle_out(layout: str, count: int) -> None:
    """Oracle: the index rule of bbc-mc's extension: 0-11 in, 12 middle, 13-24 out, base apart."""
    half = (count - 2) // 2
    numbers = [number / 100 for number in range(count)]
    family, names = load_families()[layout], names_of(layout)

    param = compile_param(
        Param(mbw_lines(numbers, family)), name_of_param="M", family=family, names=names
    )

    for name in names:
        area, _, rest = name.removeprefix(UNET).partition(".")
        first = rest.partition(".")[0]
        index = {
            "input_blocks": lambda first=first: 1 + int(first),
            "middle_block": lambda: 1 + half,
            "output_blocks": lambda first=first: 2 + half + int(first),
            "time_embed": lambda: 1,
            "label_emb": lambda: 1,
            "out": lambda: count - 1,
        }.get(area, lambda: 0)()
        assert param.value_of(name) == numbers[index if name.startswith(UNET) else 0], name


@pytest.mark.parametrize(
    ("layout", "count", "fix"),
    [
        ("sd1", 25, "put the number for BASE in front: BASE IN00-IN11 M00 OUT00-OUT11"),
        ("sdxl", 19, "put the number for BASE in front: BASE IN00-IN08 M00 OUT00-OUT08"),
        ("sdxl", 26, "26 is the count of sd1, sd2, svd, sd1-image, "),
        ("sd1", 20, "20 is the count of sdxl, ssd-1b, segmind-vega; sd1 has BASE IN00-IN11"),
        ("sd1", 7, "give one number for each of BASE IN00-IN11 M00 OUT00-OUT11"),
    ],
)
def test_a_wrong_count_of_mbw_numbers_names_the_right_one(
    layout: str, count: int, fix: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        mbw_lines([0.5] * count, load_families()[layout], "r.yaml:4")

    right = {"sd1": 26, "sdxl": 20}[layout]
    assert caught.value.what == f"`mbw` has {count} numbers; {layout} takes {right}"
    assert caught.value.fix.startswith(fix)
    assert caught.value.where == "r.yaml:4"


def test_mbw_for_a_family_without_blocks_is_an_error() -> None:
    with pytest.raises(RecipeError, match="this one is 'unknown'"):
        mbw_lines([0.5], UNKNOWN)


def test_mbw_fits_a_checkpoint_without_vae_and_text_encoder() -> None:
    family = load_families()["sd1"]
    names = [name for name in names_of("sd1") if name.startswith(UNET)]

    lines = mbw_lines([0.5] * 26, family)
    param = compile_param(Param(lines), name_of_param="M", family=family, names=names)

    assert param.values == (0.5,)
    assert param.shadowed == ()


def test_where_a_tool_leaves_tensors_out_its_mbw_numbers_need_another_line() -> None:
    family, names = load_families()["sdxl"], names_of("sdxl")
    lines = mbw_lines([0.5] * 20, family, "r.yaml:1")

    with pytest.raises(RecipeError, match="no value for first_stage_model") as caught:
        compile_param(Param(lines), name_of_param="M", family=family, names=names, compat="mecha")
    both = (*lines, ParamLine("vae", 0.0))
    param = compile_param(
        Param(both), name_of_param="M", family=family, names=names, compat="mecha"
    )

    assert caught.value.fix == "add `default:`, or a line for vae"
    assert param.value_of(VAE) == 0.0
