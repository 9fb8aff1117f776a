"""Merge methods: what every registered one keeps, and each against the same thing written long."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from memory import bytes_of, merge_one, merge_tensors, tensor_of
from numpy.typing import NDArray
from torch import Tensor

import ckptools.engine
import ckptools.evaluation
import ckptools.plain
from ckptools.engine import Settings
from ckptools.evaluation import ElementRandom
from ckptools.formula import Call, Expr, Linear
from ckptools.methods import Method, load_methods
from ckptools.recipe import Recipe, load_recipe
from ckptools.tensors import TensorSpec

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
METHODS = list(load_methods().values())
SHAPES = [(), (1,), (7,), (5, 3), (4, 3, 3, 3), (0,), (3, 0)]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def model_names(method: Method) -> list[str]:
    """Names for a call: A, B, … in calling order, three for a variadic method."""
    count = len(method.models) + (3 if method.variadic else 0) + len(method.keyword_models)
    return list("ABCDEFG"[:count])


def call_text(method: Method, **numbers: float) -> str:
    """A formula that calls the method with `model_names`."""
    names = model_names(method)
    split = len(names) - len(method.keyword_models)
    parts = names[:split]
    pairs = zip(method.keyword_models, names[split:], strict=True)
    parts += [f"{key}={name}" for key, name in pairs]
    parts += [f"{key}={value!r}" for key, value in numbers.items()]
    return f"{method.name}({', '.join(parts)})"


def call(method: Method, tensors: list[Tensor], **numbers: float) -> Tensor:
    """The method's function on tensors."""
    split = len(tensors) - len(method.keyword_models)
    keywords: dict[str, object] = dict(zip(method.keyword_models, tensors[split:], strict=True))
    if method.random:
        keywords["rng"] = ElementRandom(0, "w", 0, tuple(tensors[0].shape))
    result = method.function(*tensors[:split], **keywords, **numbers)
    assert isinstance(result, Tensor)
    return result


def noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def models_for(method: Method, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [noise(shape, seed, dtype) for seed, _ in enumerate(model_names(method))]


def assert_same_bits(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert bytes_of(found) == bytes_of(wanted)


# --- what every method keeps -------------------------------------------------------------------


def test_there_are_methods() -> None:
    assert {"weighted_sum", "add_difference", "slerp", "ties", "dare"} <= set(load_methods())


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inputs_stay_and_the_shape_and_dtype_are_kept(
    method: Method, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensors = models_for(method, shape, dtype)
    before = [tensor.clone() for tensor in tensors]

    result = call(method, tensors)

    assert result.shape == shape
    assert result.is_floating_point()
    assert bool(torch.isfinite(result).all())
    for tensor, copy in zip(tensors, before, strict=True):
        assert_same_bits(tensor, copy)


@every_method
def test_the_same_call_gives_the_same_bits(method: Method) -> None:
    tensors = models_for(method, (40, 9), torch.float32)

    assert_same_bits(call(method, tensors), call(method, tensors))


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_engine_takes_every_shape(method: Method, shape: tuple[int, ...]) -> None:
    tensors = models_for(method, shape, torch.float16)

    result = merge_one(call_text(method), **dict(zip(model_names(method), tensors, strict=True)))

    assert result.shape == shape
    assert bool(torch.isfinite(result).all())


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_blocks_of_any_size_give_the_bits_of_the_whole(
    method: Method, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = models_for(method, (91, 211), dtype)
    named = dict(zip(model_names(method), tensors, strict=True))
    text = call_text(method)
    whole = merge_one(text, **named)

    for block, span in [(777, 3002), (1, 5000), (1 << 16, 9999)]:
        monkeypatch.setattr(ckptools.evaluation, "BLOCK", block if block > 1 else 13)
        monkeypatch.setattr(ckptools.engine, "SPAN_BYTES", span)
        monkeypatch.setattr(ckptools.engine, "UNIT_BYTES", 3 * span)
        assert_same_bits(merge_one(text, **named), whole)
    if method.access != "linear":  # the planner, not the function, orders linear sums
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        assert_same_bits(whole, call(method, [tensor.to(wide) for tensor in tensors]).to(dtype))


@every_method
def test_the_documentation_names_all_that_goes_in_and_the_source(method: Method) -> None:
    text = inspect.getdoc(method.function) or ""
    summary, *rest = text.split("\n")
    words = set(re.findall(r"\w+", "\n".join(rest)))

    assert summary.endswith(".")
    assert len(summary) > 20
    assert words >= {*method.models, *method.keyword_models, *method.scalars}
    assert not method.variadic or method.variadic in words
    assert "same shape" in text
    assert method.formula
    assert method.source
    for scalar in method.scalars.values():
        assert scalar.default is not None
        assert scalar.minimum <= scalar.default <= scalar.maximum


@every_method
def test_a_shipped_recipe_uses_it(method: Method) -> None:
    assert RECIPES
    recipes = [load_recipe(path) for path in RECIPES]
    called = {name for recipe in recipes for name in called_methods(recipe)}

    assert method.name in called or any(writes_out(recipe, method) for recipe in recipes)


def called_methods(recipe: Recipe) -> set[str]:
    """Methods that a recipe's formulas call by name."""
    found: set[str] = set()

    def walk(expr: Expr) -> None:
        if isinstance(expr, Call):
            found.add(expr.method)
            for part in (*expr.args, *(value for _, value in expr.keywords)):
                walk(part)
        for side in ("left", "right"):
            if hasattr(expr, side):
                walk(getattr(expr, side))

    for formula in (recipe.merge, *recipe.lets.values()):
        walk(formula.tree)
    return found


def writes_out(recipe: Recipe, method: Method) -> bool:
    """Whether a recipe's formula is a linear method's, written with + - * /."""
    from ckptools.formula import specialise

    if method.access != "linear" or method.variadic or len(recipe.scope.params) != 1:
        return False
    (param,), (scalar,) = recipe.scope.params, method.scalars
    form = specialise(recipe.merge, recipe.scope, {param: 0.3})
    if len(form.terms) != len(method.models):
        return False
    orders = itertools.permutations([leaf for leaf, _ in form.terms])
    forms = [method.function(*map(Linear.of, order), **{scalar: 0.3}) for order in orders]
    return any(dict(form.terms) == dict(other.terms) for other in forms)


# --- numbers that need care --------------------------------------------------------------------

ODD_VALUES = [0.0, -0.0, 1.0, -1.0, 6e-8, -6e-8, 65504.0, -65504.0, 1 / 3, 1e-3]


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_identical_models_give_their_own_bits(method: Method, dtype: torch.dtype) -> None:
    """Zeros keep their sign and denormals their value."""
    tensor = torch.cat([torch.tensor(ODD_VALUES), noise((2000,), 1)]).to(dtype)

    result = merge_one(call_text(method), **dict.fromkeys(model_names(method), tensor))

    assert_same_bits(result, tensor)


@every_method
def test_zeros_give_zeros(method: Method) -> None:
    zeros = torch.zeros((33, 5), dtype=torch.float16)

    result = merge_one(call_text(method), **dict.fromkeys(model_names(method), zeros))

    assert_same_bits(result, zeros)


@every_method
def test_opposite_models_give_finite_values(method: Method) -> None:
    names = model_names(method)
    tensor = noise((300,), 5, torch.float16)
    models = {name: tensor * (-1) ** number for number, name in enumerate(names)}

    assert bool(torch.isfinite(merge_one(call_text(method), **models)).all())


# --- each against the long way -----------------------------------------------------------------


def doubles(*tensors: Tensor) -> list[NDArray[np.float64]]:
    return [tensor.double().numpy() for tensor in tensors]


def assert_near(found: Tensor, wanted: NDArray[np.float64]) -> None:
    """float64 against float64: only the order of operations may differ."""
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-13)


def abc(shape: tuple[int, ...] = (23, 17)) -> list[Tensor]:
    return [noise(shape, seed, torch.float64) for seed in (1, 2, 3)]


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.25, 0.7, 1.0, 1.5])
def test_weighted_sum(alpha: float) -> None:
    a, b, _ = abc()
    x, y = doubles(a, b)

    assert_near(call(load_methods()["weighted_sum"], [a, b], alpha=alpha), x + alpha * (y - x))


@pytest.mark.parametrize("multiplier", [-1.0, 0.0, 0.3, 1.0, 2.0])
def test_add_difference(multiplier: float) -> None:
    a, b, c = abc()
    x, y, z = doubles(a, b, c)

    found = call(load_methods()["add_difference"], [a, b, c], multiplier=multiplier)

    assert_near(found, x + multiplier * y - multiplier * z)


def test_n_average() -> None:
    tensors = [noise((50,), seed, torch.float64) for seed in range(7)]

    found = call(load_methods()["n_average"], tensors)

    assert_near(found, np.mean(np.stack(doubles(*tensors)), axis=0))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_slerp_turns_in_the_plane_of_both(t: float) -> None:
    """Against a rotation from A towards the part of B that is square to A."""
    a, b, _ = abc()
    x, y = (values.ravel() for values in doubles(a, b * 3))
    along = x / np.linalg.norm(x)
    across = y - along * (along @ y)
    across /= np.linalg.norm(across)
    turn = t * math.atan2(across @ y, along @ y)
    length = (1 - t) * np.linalg.norm(x) + t * np.linalg.norm(y)

    found = call(load_methods()["slerp"], [a, b * 3], t=t)

    assert_near(found.reshape(-1), length * (math.cos(turn) * along + math.sin(turn) * across))


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_slerp_divides_the_angle_and_the_length(t: float) -> None:
    a, b, _ = abc()
    found = call(load_methods()["slerp"], [a, b], t=t)
    x, y, r = (values.ravel() for values in doubles(a, b, found))

    def angle(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
        return math.acos(one @ other / np.linalg.norm(one) / np.linalg.norm(other))

    assert angle(x, r) == pytest.approx(t * angle(x, y), rel=1e-10)
    assert angle(r, y) == pytest.approx((1 - t) * angle(x, y), rel=1e-10)
    lengths = (1 - t) * np.linalg.norm(x) + t * np.linalg.norm(y)
    assert np.linalg.norm(r) == pytest.approx(lengths, rel=1e-12)


@pytest.mark.parametrize(("t", "end"), [(0.0, 0), (1.0, 1)])
def test_slerp_ends_are_the_models_themselves(t: float, end: int) -> None:
    pair = [torch.cat([torch.tensor(ODD_VALUES), noise((99,), n)]).half() for n in (1, 2)]

    found = merge_one(f"slerp(A, B, t={t})", A=pair[0], B=pair[1])

    assert_same_bits(found, pair[end])


@pytest.mark.parametrize("other", ["parallel", "opposite", "zero"])
def test_slerp_is_linear_where_there_is_no_angle(other: str) -> None:
    a, _, _ = abc()
    b = {"parallel": a * 2.0, "opposite": a * -0.5, "zero": a * 0.0}[other]

    found = call(load_methods()["slerp"], [a, b], t=0.25)

    assert_near(found, 0.75 * a.numpy() + 0.25 * b.numpy())


def test_slerp_hardly_jumps_where_it_becomes_linear() -> None:
    """On both sides of |cos w| = 0.9995 the answers differ by less than w squared."""
    a, b, _ = abc((10_000,))
    results = []
    for factor in (0.0315, 0.0317):
        near = a / a.norm() + factor * b / b.norm()
        results.append(call(load_methods()["slerp"], [a / a.norm(), near], t=0.5))

    assert float((results[0] - results[1]).norm()) < 1e-3


def train_difference_long(a: float, b: float, c: float, alpha: float) -> float:
    if b == c:
        return a
    share = abs(b - a) / (abs(b - c) + abs(b - a))
    return a + 1.8 * alpha * math.copysign(abs(b - c), b - c) * share


@pytest.mark.parametrize("alpha", [-0.4, 0.0, 0.5, 1.0])
def test_train_difference(alpha: float) -> None:
    a, b, c = abc((200,))
    b[:20], c[10:40], a[40:60] = a[:20], b[10:40], b[40:60]
    rows = zip(*(tensor.tolist() for tensor in (a, b, c)), strict=True)

    found = call(load_methods()["train_difference"], [a, b, c], alpha=alpha)

    assert_near(found, np.array([train_difference_long(*row, alpha) for row in rows]))


@pytest.mark.parametrize("alpha", [-0.7, 0.3, 1.0])
def test_train_difference_leaves_a_where_nothing_was_learned(alpha: float) -> None:
    a = torch.cat([torch.tensor(ODD_VALUES), noise((500,), 1)]).half()
    b = noise(tuple(a.shape), 2, torch.float16)
    c = b.clone()
    c[250:] += 1

    found = merge_one(f"train_difference(A, B, C, alpha={alpha})", A=a, B=b, C=c)

    assert_same_bits(found[:250], a[:250])
    assert not torch.equal(found[250:], a[250:])


def ties_long(
    models: list[list[float]], base: list[float], density: float, scale: float
) -> list[float]:
    """Trim by sorting, elect by summing, average by counting: element by element."""
    trimmed = []
    for model in models:
        deltas = [x - y for x, y in zip(model, base, strict=True)]
        keep = math.floor(density * len(deltas))
        order = sorted((abs(delta) for delta in deltas), reverse=True)
        smallest = order[keep - 1] if keep else math.inf
        trimmed.append([delta if abs(delta) >= smallest else 0.0 for delta in deltas])
    result = []
    for place, start in enumerate(base):
        column = [deltas[place] for deltas in trimmed]
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [delta for delta in column if delta * sign > 0]
        result.append(start + scale * sum(agreeing) / max(1, len(agreeing)))
    return result


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_ties(density: float, scale: float, count: int) -> None:
    *models, base = (noise((120,), seed, torch.float64) for seed in range(count + 1))
    wanted = ties_long([model.tolist() for model in models], base.tolist(), density, scale)

    found = call(load_methods()["ties"], [*models, base], density=density, scale=scale)

    assert_near(found, np.array(wanted))


def test_ties_keeps_all_that_tie_with_the_smallest_one_kept() -> None:
    base = torch.zeros(6, dtype=torch.float64)
    one = torch.tensor([3.0, -1.0, 1.0, 1.0, 0.5, 0.0], dtype=torch.float64)

    found = call(load_methods()["ties"], [one, base, base], density=0.4)

    assert found.tolist() == [3.0, -1.0, 1.0, 1.0, 0.0, 0.0]


def test_ties_of_opposite_changes_takes_the_positive_one() -> None:
    """A mass of exactly 0 elects plus."""
    base, delta = torch.zeros(4), torch.tensor([1.0, -2.0, 3.0, -4.0])

    found = call(load_methods()["ties"], [delta, -delta, base], density=1.0)

    assert found.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_ties_with_density_0_is_the_base_to_the_bit() -> None:
    base = torch.cat([torch.tensor(ODD_VALUES), noise((99,), 1)]).half()
    others = {name: noise(tuple(base.shape), seed, torch.float16) for seed, name in enumerate("AB")}

    assert_same_bits(merge_one("ties(A, B, base=C, density=0)", **others, C=base), base)


def test_model_stock() -> None:
    a, b, base = abc()
    a, b = base + a, base + 0.5 * a + 0.3 * b
    x, y, z = (values.ravel() for values in doubles(a, b, base))
    cosine = (x - z) @ (y - z) / np.linalg.norm(x - z) / np.linalg.norm(y - z)
    share = 2 * cosine / (1 + cosine)

    found = call(load_methods()["model_stock"], [a, b, base])

    assert 0.5 < cosine < 0.99
    assert_near(found.reshape(-1), share * (x + y) / 2 + (1 - share) * z)


def test_model_stock_of_four_takes_the_mean_of_all_angles() -> None:
    base, shared = noise((400,), 9, torch.float64), noise((400,), 8, torch.float64)
    models = [base + shared + noise((400,), seed, torch.float64) for seed in range(4)]
    z, *rest = doubles(base, *models)
    units = [(x - z) / np.linalg.norm(x - z) for x in rest]
    gram = np.array([[one @ other for other in units] for one in units])
    cosine = (gram.sum() - 4) / 12
    share = 4 * cosine / (1 + 3 * cosine)

    found = call(load_methods()["model_stock"], [*models, base])

    assert_near(found, share * np.mean(rest, axis=0) + (1 - share) * z)


@pytest.mark.parametrize("other", ["opposite", "same as the base"])
def test_model_stock_is_the_base_where_the_changes_have_nothing_in_common(other: str) -> None:
    base = torch.cat([torch.tensor(ODD_VALUES[:6]), noise((99,), 1)]).half()
    change = torch.ones_like(base)
    b = base.clone() if other == "same as the base" else base - change

    assert_same_bits(merge_one("model_stock(A, B, base=C)", A=base + change, B=b, C=base), base)


# --- dare: random, but addressed ---------------------------------------------------------------


def dare_once(seed: int = 0, name: str = "w", density: float = 0.3, n: int = 200_000) -> Tensor:
    """dare of one model that is 1 over a base that is 0: the mask, rescaled."""
    models = {"A": {name: torch.ones(n)}, "B": {name: torch.zeros(n)}}
    text = f"dare(A, base=B, density={density})"
    return merge_tensors(text, models, settings=Settings(threads=2, seed=seed)).tensors[name]


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_dare_keeps_about_density_and_rescales_the_rest(density: float) -> None:
    result = dare_once(density=density)
    kept = result != 0

    spread = math.sqrt(density * (1 - density) / len(result))
    assert float(kept.double().mean()) == pytest.approx(density, abs=5 * spread)
    assert set(result.tolist()) == {0.0, float(np.float32(1 / density))}


def test_dare_draws_anew_for_each_seed_tensor_and_model() -> None:
    first = dare_once() != 0
    pair = {
        "A": {"w": torch.ones(200_000)},
        "B": {"w": torch.full((200_000,), 2.0)},
        "C": {"w": torch.zeros(200_000)},
    }
    both = merge_tensors("dare(A, B, base=C, density=0.5)", pair).tensors["w"]

    assert torch.equal(dare_once() != 0, first)
    for other in (dare_once(seed=1) != 0, dare_once(name="v") != 0):
        agree = float((other == first).double().mean())
        assert agree == pytest.approx(0.3**2 + 0.7**2, abs=0.006)
    counts = torch.stack([(both == value).sum() for value in (0.0, 2.0, 4.0, 6.0)])
    assert counts.sum() == 200_000
    assert counts.double().div(200_000).sub(0.25).abs().max() < 0.006


def test_dare_at_density_1_adds_the_whole_change() -> None:
    """Task arithmetic: base + 0.5 * ((A - base) + (B - base))."""
    a, b, base = abc()
    x, y, z = doubles(a, b, base)

    found = call(load_methods()["dare"], [a, b, base], density=1.0, scale=0.5)

    assert_near(found, z + 0.5 * ((x - z) + (y - z)))


def test_dare_leaves_the_base_where_all_is_dropped() -> None:
    base = torch.full((1000,), -0.0).half()
    model = noise((1000,), 1, torch.float16)

    found = merge_one("dare(A, base=B, density=0.25)", A=model, B=base)
    dropped = found == 0

    assert 600 < int(dropped.sum()) < 900
    assert_same_bits(found[dropped], base[dropped])


@pytest.mark.parametrize("stream", [0, 1, 5])
@pytest.mark.parametrize("begin", [1, 2, 3, 4, 5, 1000, 1001, 65_536, 123_457])
def test_random_numbers_are_addressed_by_element(begin: int, stream: int) -> None:
    whole = ElementRandom(7, "w", 0, (130_000,)).uniform(stream)

    part = ElementRandom(7, "w", begin, (50, 10)).uniform(stream)

    assert torch.equal(part.reshape(-1), whole[begin : begin + 500])
    assert part.dtype == torch.float64
    assert 0.0 <= float(whole.min()) <= float(whole.max()) < 1.0


def test_random_numbers_far_out_are_no_repeats() -> None:
    """Elements beyond 2^32 exist in large models."""
    near, far = (ElementRandom(0, "w", at, (64,)).uniform(0) for at in (0, 1 << 34))

    assert not torch.equal(near, far)


def test_the_tensor_of_bytes_is_the_tensor() -> None:
    """The tests' own helper."""
    tensor = noise((3, 4), 1, torch.bfloat16)

    assert torch.equal(tensor_of(bytes_of(tensor), TensorSpec("w", "BF16", (3, 4))), tensor)


def test_model_stock_hands_a_nan_on() -> None:
    """Where it is accepted at all, the angle that it has part in is none."""
    base, d = noise((100,), 1), noise((100,), 2)
    a, b = base + d, base + d * 0.9
    a[0] = math.nan

    method = load_methods()["model_stock"]

    assert method.function(a, b, base=base).isnan().all()
    assert torch.equal(method.function(base, base.clone(), base=base), base)
