"""`kinship`: distances against torch in fp64, verdicts on trained models and on known geometry."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import UNET, model_values, shrunk, with_channels, write_tensors
from safetensors.torch import load_file

from ckptools import kinship
from ckptools.cli import run
from ckptools.errors import InputError, UsageError
from ckptools.kinship import DISTANT, NEAR, VERDICTS, Kinship, compare_models

TINY = Path(kinship.__file__).parent / "tiny"
Tensors = dict[str, torch.Tensor]


def tiny(name: str) -> Path:
    return TINY / f"{name}.safetensors"


def unet_of(tensors: Tensors) -> Tensors:
    """The UNet's matrices and kernels in fp64."""
    return {
        name: tensor.double()
        for name, tensor in tensors.items()
        if name.startswith(UNET) and sum(size > 1 for size in tensor.shape) > 1
    }


def flat(tensors: Tensors, names: list[str]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


# --- trained models ------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ["AC", "BC", "IC", "AB", "AI", "BI"])
def test_fine_tunes_of_one_model_are_near(pair: str) -> None:
    found = compare_models([tiny(name) for name in pair])

    assert found.verdict == "near"
    assert found.relations[0].groups["unet"].distance < NEAR / 1.8  # the bound has room
    assert found.relations[0].groups["vae"].verdict == "same"


@pytest.mark.parametrize("other", "ABCI")
def test_a_model_trained_independently_is_unrelated(other: str) -> None:
    found = compare_models([tiny("U"), tiny(other)])

    assert found.verdict == "unrelated"
    groups = found.relations[0].groups
    assert groups["unet"].distance > math.sqrt(2) - 0.01 > DISTANT * 1.4
    assert abs(groups["unet"].cosine) < 0.01


def test_the_numbers_are_those_of_the_formulas() -> None:
    a, b, c = (unet_of(load_file(tiny(name))) for name in "ABC")
    names = sorted(a)
    one, two, three = (flat(tensors, names) for tensors in (a, b, c))

    (relation, *_) = compare_models([tiny("A"), tiny("B")], base=tiny("C")).relations

    group, tasks = relation.groups["unet"], relation.tasks["unet"]
    norms = (one.norm() * two.norm()).sqrt()
    assert group.distance == pytest.approx(float((one - two).norm() / norms), rel=1e-4)
    assert group.cosine == pytest.approx(float(torch.cosine_similarity(one, two, 0)), rel=1e-4)
    assert group.tensors == len(names)
    assert tasks.size_a == pytest.approx(float((one - three).norm() / three.norm()), rel=1e-4)
    assert tasks.size_b == pytest.approx(float((two - three).norm() / three.norm()), rel=1e-4)
    expected = float(torch.cosine_similarity(one - three, two - three, 0))
    assert tasks.cosine == pytest.approx(expected, abs=1e-4)


def test_with_a_base_every_pair_is_compared() -> None:
    found = compare_models([tiny("A"), tiny("U")], base=tiny("C"))

    assert [(one.a.stem, one.b.stem, one.verdict) for one in found.relations] == [
        ("A", "U", "unrelated"), ("A", "C", "near"), ("U", "C", "unrelated"),
    ]  # fmt: skip
    assert [bool(one.tasks) for one in found.relations] == [True, False, False]
    assert math.isnan(found.relations[0].tasks["vae"].cosine)  # neither went anywhere


# --- known geometry ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base() -> Tensors:
    return model_values(shrunk("sd1"), seed=1, dtype="F32")


def noise(tensors: Tensors, seed: int) -> Tensors:
    """Independent values of the same sizes."""
    other = model_values(shrunk("sd1"), seed=seed, dtype="F32")
    return {name: other[name] for name in tensors}


def moved(base: Tensors, *steps: tuple[float, Tensors]) -> Tensors:
    """base + the sum of factor * direction; integers stay."""
    result = {}
    for name, tensor in base.items():
        result[name] = tensor
        if tensor.is_floating_point():
            result[name] = tensor + sum(factor * step[name] for factor, step in steps)
    return result


def permuted(tensors: Tensors) -> Tensors:
    """The neurons (rows) of every matrix in another order."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.ndim > 1 and tensor.shape[0] > 1:
            result[name] = tensor.roll(tensor.shape[0] // 2, 0).contiguous()
    return result


def related(folder: Path, a: Tensors, b: Tensors, c: Tensors | None = None) -> Kinship:
    one, two = (
        write_tensors(folder / f"{n}.safetensors", t) for n, t in zip("ab", (a, b), strict=True)
    )
    root = None if c is None else write_tensors(folder / "c.safetensors", c)
    return compare_models([one, two], base=root)


def test_a_copy_is_the_same(tmp_path: Path, base: Tensors) -> None:
    found = related(tmp_path, base, dict(base))

    assert found.verdict == "same"
    assert found.relations[0].groups["unet"].distance == 0.0


@pytest.mark.parametrize(
    ("step", "verdict"), [(0.01, "near"), (0.25, "near"), (0.4, "distant"), (0.9, "distant")]
)
def test_noise_is_as_far_as_it_is_large(
    tmp_path: Path, base: Tensors, step: float, verdict: str
) -> None:
    found = related(tmp_path, base, moved(base, (step, noise(base, 2))))

    distance = step / (1 + step**2) ** 0.25
    assert found.verdict == verdict
    assert found.relations[0].groups["unet"].distance == pytest.approx(distance, rel=0.02)


def test_a_scaled_model_points_the_same_way(tmp_path: Path, base: Tensors) -> None:
    found = related(tmp_path, base, moved(base, (1.0, base)))

    group = found.relations[0].groups["unet"]
    assert found.verdict == "distant"
    assert group.distance == pytest.approx(1 / math.sqrt(2), rel=1e-4)
    assert group.cosine == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_random_weights_are_unrelated_whatever_their_norm(
    tmp_path: Path, base: Tensors, scale: float
) -> None:
    random = {n: t * scale if t.is_floating_point() else t for n, t in noise(base, 3).items()}

    found = related(tmp_path, base, random)

    assert found.verdict == "unrelated"
    assert found.relations[0].groups["unet"].distance > math.sqrt(2) - 0.02


def test_neurons_in_another_order_are_told_from_random_weights(
    tmp_path: Path, base: Tensors
) -> None:
    found = related(tmp_path, base, permuted(base))

    assert found.verdict == "permuted"
    assert found.verdict not in kinship.KIN


def test_the_order_counts_for_trained_models_too(tmp_path: Path) -> None:
    trained = load_file(tiny("A"))

    assert related(tmp_path, trained, permuted(trained)).verdict == "permuted"


@pytest.mark.parametrize(
    ("factor", "cosine"), [((0.1, 0.0), 1.0), ((-0.1, 0.0), -1.0), ((0.0, 0.1), 0.0)]
)
def test_directions_from_the_base(
    tmp_path: Path, base: Tensors, factor: tuple[float, float], cosine: float
) -> None:
    """B goes along A's way, back along it, or aside."""
    way, aside = noise(base, 4), noise(base, 5)
    a = moved(base, (0.2, way))
    b = moved(base, (factor[0], way), (factor[1], aside))

    (relation, *_) = related(tmp_path, a, b, base).relations

    tasks = relation.tasks["unet"]
    assert tasks.cosine == pytest.approx(cosine, abs=0.01)
    assert tasks.size_a == pytest.approx(0.2, rel=0.02)
    assert tasks.size_b == pytest.approx(0.1, rel=0.02)


def test_another_vae_does_not_part_kin(tmp_path: Path, base: Tensors) -> None:
    other = {n: t for n, t in noise(base, 6).items() if n.startswith("first_stage_model.")}

    found = related(tmp_path, base, base | other)

    assert found.relations[0].groups["vae"].verdict == "unrelated"
    assert found.verdict == "same"


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path, base: Tensors) -> None:
    name = f"{UNET}out.2.weight"
    broken = base[name].clone()
    broken.view(-1)[0] = math.nan

    found = related(tmp_path, base, base | {name: broken})

    assert found.verdict == "near"
    assert "1 NaN or Inf values are left out" in found.relations[0].notes


def test_empty_models_tell_nothing(tmp_path: Path) -> None:
    zeros = {"w": torch.zeros(4, 4)}
    assert related(tmp_path, {}, {}).verdict == "unknown"
    assert related(tmp_path, zeros, zeros).verdict == "same"
    found = related(tmp_path, zeros, {"w": torch.ones(4, 4)}, zeros)
    assert found.verdict == "unrelated"
    assert found.relations[0].groups["other"].distance == math.inf


# --- unlike models -------------------------------------------------------------------------------


def test_extra_channels_are_left_out(tmp_path: Path, base: Tensors) -> None:
    name = f"{UNET}input_blocks.0.0.weight"
    wide = torch.cat([base[name], torch.randn(base[name].shape[0], 5, 3, 3)], 1)
    assert wide.shape[1] == with_channels(shrunk("sd1"), 9)[name].shape[1]

    (relation,) = related(tmp_path, base, base | {name: wide}).relations

    assert relation.verdict == "same"
    assert any("variants differ (base, inpainting)" in note for note in relation.notes)


def test_shapes_without_a_common_part_are_told(tmp_path: Path, base: Tensors) -> None:
    name = f"{UNET}middle_block.1.proj_in.weight"

    (relation,) = related(tmp_path, base, base | {name: torch.ones(3, 3, 1, 1)}).relations

    assert any("without a common part" in note for note in relation.notes)


def test_models_of_different_families_share_nothing(tmp_path: Path, base: Tensors) -> None:
    other = model_values(shrunk("sd2"), seed=1)

    found = related(tmp_path, base, other)

    assert found.verdict == "other-family"
    assert found.relations[0].reason == "sd1 and sd2"
    (first, *_) = related(tmp_path, base, base, other).relations
    assert (first.verdict, first.tasks) == ("same", {})


def test_strangers_with_other_names_share_nothing(tmp_path: Path) -> None:
    one = {f"a{number}": torch.ones(3, 3) for number in range(5)}
    two = {f"b{number}": torch.ones(3, 3) for number in range(5)} | {"a0": torch.ones(3, 3)}

    found = related(tmp_path, one, two)

    assert found.verdict == "other-family"
    assert "only 1 of 6 matrices" in found.relations[0].reason


def test_different_predictions_are_noted(tmp_path: Path, base: Tensors) -> None:
    paths = [
        write_tensors(tmp_path / f"{word}.safetensors", base, {"modelspec.prediction_type": word})
        for word in ("epsilon", "v")
    ]

    (relation,) = compare_models(paths).relations

    assert any("predict different things: epsilon and v" in note for note in relation.notes)


def test_one_model_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="only one model"):
        compare_models([tiny("A")])


def test_an_adapter_is_not_a_model() -> None:
    with pytest.raises(InputError, match="this is an adapter") as caught:
        compare_models([tiny("A"), tiny("glow")])
    assert "--for" in caught.value.fix


# --- adapters ------------------------------------------------------------------------------------


def test_an_adapter_suits_near_kin_of_its_base() -> None:
    found = compare_models([tiny("A"), tiny("U")], base=tiny("C"), adapter=tiny("glow"))

    assert [one.verdict for one in found.adapters] == ["near", "unrelated"]
    assert found.verdict == "unrelated"
    assert found.adapters[0].trained_on["ss_sd_model_name"] == "C.safetensors"
    assert [one.b.stem for one in found.relations] == ["C", "C"]


def test_without_its_base_only_the_family_is_told() -> None:
    found = compare_models([tiny("A")], adapter=tiny("glow"))

    (suits,) = found.adapters
    assert found.verdict == "unknown"
    assert "give --base" in suits.reason
    assert "C.safetensors" in suits.reason


KOHYA = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"


def lora(path: Path, width: int, metadata: dict[str, str] | None = None) -> Path:
    tensors = {
        f"{KOHYA}.lora_down.weight": torch.ones(4, width),
        f"{KOHYA}.lora_up.weight": torch.ones(640, 4),
        f"{KOHYA}.alpha": torch.tensor(4.0),
    }
    return write_tensors(path, tensors, metadata)


def test_an_adapter_of_another_family_suits_nothing(tmp_path: Path) -> None:
    adapter = lora(tmp_path / "xl.safetensors", 2048)

    (suits,) = compare_models([tiny("A")], base=tiny("C"), adapter=adapter).adapters

    assert suits.verdict == "other-family"
    assert suits.families == ("sdxl",)
    assert suits.reason == "it is for sdxl, the model is sd1"


def trained_on(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    return {
        "ss_new_sd_model_hash": hashlib.sha256(content).hexdigest(),
        "ss_sd_model_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


@pytest.mark.parametrize(
    ("key", "verdict"), [("ss_new_sd_model_hash", "same"), ("ss_sd_model_hash", "unknown")]
)
def test_the_very_model_is_known_by_its_sha256_and_not_by_autov1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, verdict: str
) -> None:
    """A and C share their AutoV1: the 64 KiB that it sees lie in a VAE that was not trained."""
    assert trained_on(tiny("A"))["ss_sd_model_hash"] == trained_on(tiny("C"))["ss_sd_model_hash"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    adapter = lora(tmp_path / "l.safetensors", 768, {key: trained_on(tiny("C"))[key].upper()})

    found = compare_models([tiny("C"), tiny("A")], adapter=adapter).adapters

    assert [one.verdict for one in found] == [verdict, "unknown"]
    assert ("this very file" in found[0].reason) == (verdict == "same")


def test_the_base_that_peft_names_is_told(tmp_path: Path) -> None:
    adapter = write_tensors(
        tmp_path / "adapter_model.safetensors",
        {
            "base_model.model.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 40),
            "base_model.model.mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(40, 2),
        },
    )
    config = {"base_model_name_or_path": "org/sd", "r": 2, "lora_alpha": 2, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    (suits,) = compare_models([tiny("A")], adapter=adapter).adapters

    assert suits.trained_on == {"base_model_name_or_path": "org/sd"}
    assert "'org/sd'" in suits.reason


def test_a_controlnet_is_judged_by_its_family(tmp_path: Path) -> None:
    kernel = {1: torch.ones(320, 320, 1, 1), 0: torch.ones(320, 320)}
    attention = "control_model.input_blocks.1.1."
    path = tmp_path / "control.safetensors"
    for is_sd1, width, verdict in ((1, 768, "near"), (0, 2048, "other-family")):
        write_tensors(path, {
            "control_model.zero_convs.0.0.weight": torch.ones(320, 320, 1, 1),
            "control_model.input_blocks.0.0.weight": torch.ones(320, 4, 3, 3),
            f"{attention}proj_in.weight": kernel[is_sd1],
            f"{attention}transformer_blocks.0.attn2.to_k.weight": torch.ones(320, width),
        })  # fmt: skip

        (suits,) = compare_models([tiny("A")], base=tiny("C"), adapter=path).adapters

        assert (suits.families, suits.verdict) == (("sd1" if is_sd1 else "sdxl",), verdict)


# --- the command ---------------------------------------------------------------------------------


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = run(["kinship", *words, "--json"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["schema"] == "ckptools.kinship/1"
    return code, document


def test_json_has_the_contract_keys(capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c, u = (str(tiny(name)) for name in "ABCU")

    code, document = asked(capsys, a, b, "--base", c)
    assert (code, document["verdict"]) == (0, "near")
    assert document["meaning"] == VERDICTS["near"]
    assert set(document["groups"]["unet"]) >= {"distance", "cosine"}
    assert set(document["groups"]["unet"]["from_base"]) == {"cosine", "a", "b"}
    assert document["groups"]["vae"]["from_base"]["cosine"] is None
    assert len(document["pairs"]) == 3

    code, document = asked(capsys, a, u)
    assert (code, document["verdict"]) == (1, "unrelated")

    code, document = asked(capsys, a, "--for", str(tiny("glow")))
    assert (code, document["verdict"], document["groups"]) == (0, "unknown", {})
    assert document["adapters"][0]["trained_on"]["ss_base_model_version"] == "sd_v1"

    assert asked(capsys, a)[0] == 2


def test_people_see_a_verdict_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    a, c, i, u = (str(tiny(name)) for name in "ACIU")

    assert run(["kinship", a, i, "--base", c, "-q"]) == 0
    shown = capsys.readouterr().out
    assert "near kin" in shown
    assert "cosine of both" in shown
    assert "variants differ" in shown
    assert run(["kinship", u, "--for", str(tiny("glow")), "--base", c]) == 1
    shown = capsys.readouterr().out
    assert "glow.safetensors on U.safetensors: unrelated" in shown
    assert "ss_sd_model_name: C.safetensors" in shown
