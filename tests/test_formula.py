"""Formulas: what is read, what is refused and where, what a formula's type is, what it computes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ckptools.errors import RecipeError
from ckptools.formula import (
    MAX_FORMULA_CHARS,
    Applied,
    Formula,
    Linear,
    Number,
    Scope,
    base_model,
    check_formula,
    names_in,
    parse_formula,
    specialise,
    usage,
    used_names,
)
from ckptools.methods import load_methods
from ckptools.program import Apply, Mix, applied_in, compile_mix

MODELS = ("A", "B", "C", "D")
PARAMS = ("M", "N")
METHODS = load_methods()


def scope(lets: Mapping[str, str] | None = None, params: tuple[str, ...] = PARAMS) -> Scope:
    """Models A to D, parameters M and N, and these `let`s in their order."""
    made = Scope(frozenset(MODELS), frozenset(params), MappingProxyType({}), METHODS)
    for name, text in (lets or {}).items():
        formula = parse_formula(text, where=f"let {name}")
        check_formula(formula, made)
        grown = MappingProxyType({**made.lets, name: formula})
        made = Scope(made.models, made.params, grown, METHODS)
    return made


def kind_of(text: str, **lets: str) -> str:
    return check_formula(parse_formula(text), scope(lets))


def error_of(text: str, **lets: str) -> RecipeError:
    """What checking a formula raises; `test_valid_formulas` shows that not everything does."""
    with pytest.raises(RecipeError) as caught:
        check_formula(parse_formula(text), scope(lets))
    return caught.value


def caret_column(error: RecipeError) -> int:
    """The 1-based column that the caret of a message stands under."""
    return error.what.splitlines()[-1].index("^") + 1 - len("    ")


def form_of(text: str, values: Mapping[str, float] | None = None, **lets: str) -> Linear:
    formula, names = parse_formula(text), scope(lets)
    check_formula(formula, names)
    return specialise(formula, names, values or {})


def coefficients(text: str, values: Mapping[str, float] | None = None, **lets: str) -> dict:
    return dict(form_of(text, values, **lets).terms)


# --- grammar -----------------------------------------------------------------------------------

VALID = [
    "A",
    "-A + 2 * B",
    "+A",
    "A + (B - C) * M",
    "A*(1-M)+B*M",
    "((((A))))",
    "A + 1e-3 * (B - C)",
    "A + .5 * (B - C)",
    "A / 2 + B / 2",
    "slerp(A, B, t=M)",
    "slerp(A + (B - C) * M, D, t=0.25)",
    "weighted_sum(b=B, a=A, alpha=M * N)",
    "ties(A, B, base=C, density=0.3)",
]


@pytest.mark.parametrize("text", VALID)
def test_valid_formulas(text: str) -> None:
    assert kind_of(text) == "weights"


# Every kind of Python expression and statement that is not in the closed list.
REFUSED = [
    ("A if M else B", 1),
    ("A + (B if M else C)", 6),
    ("A and B", 1),
    ("not A", 1),
    ("A == B", 1),
    ("A < B", 1),
    ("A.weight", 1),
    ("A + B.weight", 5),
    ("A[0]", 1),
    ("A + B[1:2]", 5),
    ("[A, B]", 1),
    ("(A, B)", 3),
    ("{A}", 1),
    ("{'a': A}", 1),
    ("[x for x in A]", 1),
    ("(x for x in A)", 1),
    ("lambda: A", 1),
    ("(A := B)", 2),
    ("f'{A}'", 1),
    ("...", 1),
    ("await A", 1),
    ("A ** 2", 3),
    ("A + B ** 2", 7),
    ("A // B", 3),
    ("A % B", 3),
    ("A @ B", 3),
    ("A << 1", 3),
    ("A | B", 3),
    ("A ^ B", 3),
    ("A & B", 3),
    ("~A", 1),
    ("A + ~B", 5),
    ("True * A", 1),
    ("A + None * B", 5),
    ("A * '0.5'", 5),
    ("A * b'0'", 5),
    ("A * 1j", 5),
    ("A * 1e999", 5),
    ("slerp(*A)", 7),
    ("slerp(A, *B)", 10),
    ("slerp(**A)", 9),
    ("slerp(A, B, **C)", 15),
    ("A.slerp(B)", 1),
    ("(A + B)(C)", 1),
    ("0.5(A)", 1),
    ("__import__('os').system('true')", 1),
]


@pytest.mark.parametrize(("text", "column"), REFUSED)
def test_everything_outside_the_closed_list_is_refused_at_its_column(
    text: str, column: int
) -> None:
    error = error_of(text)

    assert error.where == f"column {column}"
    assert caret_column(error) == column
    assert text in error.what


SYNTAX = [
    ("", 1, ""),
    ("A +", 4, ""),
    ("A B", 3, ""),
    ("A + * B", 5, ""),
    ("A = B", 3, ""),
    ("A; B", 2, ""),
    ("import os", 1, ""),
    ("yield A", 1, ""),
    ("A + (B - C * M", 5, "'(' was never closed"),
    ("A + B)", 6, "unmatched ')'"),
    ("A + (B]", 7, "does not match"),
    ("slerp(t=0.5, A, B)", 18, "positional argument follows keyword argument"),
    ("0.3A + 0.7B", 3, "put a sign between a number and a name"),
    ("A + B # and C", 7, "comments"),
    ("A\x00", 3, ""),
]


@pytest.mark.parametrize(("text", "column", "words"), SYNTAX)
def test_what_does_not_parse_is_refused_at_its_column(text: str, column: int, words: str) -> None:
    error = error_of(text)

    assert error.where == f"column {column}"
    assert words in str(error)
    assert error.fix


def test_the_place_of_a_formula_comes_before_the_column() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_formula("A + B.x", where="recipe.yaml:7")

    assert caught.value.where == "recipe.yaml:7, column 5 of the formula"


@pytest.mark.parametrize(
    ("text", "column", "sign"),
    [
        ("A − B", 3, "-"),  # noqa: RUF001
        ("A – B", 3, "-"),  # noqa: RUF001
        ("A × 0.5", 3, "*"),  # noqa: RUF001
        ("A · 0.5", 3, "*"),
        ("A ÷ 2", 3, "/"),
        ("A ＋ B", 3, "+"),  # noqa: RUF001
        ("A + （B - C）", 5, "("),  # noqa: RUF001
        ("slerp(A，B)", 8, ","),  # noqa: RUF001
    ],
)
def test_a_lookalike_sign_is_named_with_the_sign_to_write(
    text: str, column: int, sign: str
) -> None:
    error = error_of(text)

    assert error.where == f"column {column}"
    assert error.fix == f"write {sign!r}"


def test_a_lookalike_name_is_told_apart() -> None:
    error = error_of("\u0410 + (B - C) * M")  # a Cyrillic A

    assert "cyrillic capital letter a" in error.what
    assert error.where == "column 1"


def test_columns_count_characters_not_bytes() -> None:
    error = error_of("é * 0 + B.x")

    assert error.where == "column 9"


def test_a_formula_may_run_over_lines_with_any_spaces() -> None:
    text = "  A +\n\t(B\r\n-\u00a0C)\u3000* M\n"

    assert parse_formula(text).tree == parse_formula("A + (B - C) * M").tree


def test_a_column_counts_from_the_start_of_an_indented_formula() -> None:
    assert error_of("   A.x").where == "column 4"
    assert error_of("A +\nB.x").where == "column 5"


def test_a_comment_cannot_hide_the_rest_of_a_multi_line_formula() -> None:
    assert error_of("A + (B - C) # sharper\n + D - C").where == "column 13"


def test_a_huge_or_deep_formula_is_refused_in_one_sentence() -> None:
    huge = error_of("A + " * MAX_FORMULA_CHARS + "A")
    deep = error_of("(" * 5000 + "A" + ")" * 5000)
    minus = error_of("-" * 15_000 + "A")

    assert huge.fix == "use `let:`"
    assert deep.exit_code == 2
    assert "too deeply" in minus.what


def test_a_long_sum_is_fine_and_a_longer_one_is_refused() -> None:
    def mean(terms: int) -> str:
        return " + ".join([f"A / {terms}"] * terms)

    assert form_of(mean(190)).total == pytest.approx(1.0, rel=1e-12)
    assert "too deeply" in error_of(mean(400)).what


@given(st.text(max_size=40))
@example("A" * 40)
@example("0x1for x in A")
def test_any_text_is_a_formula_or_a_recipe_error(text: str) -> None:
    try:
        formula = parse_formula(text)
    except RecipeError as error:
        assert error.what  # noqa: PT017
    else:
        assert all(name.id for name in names_in(formula.tree)) or isinstance(formula.tree, Number)


# --- types -------------------------------------------------------------------------------------

KINDS = [
    ("A", "weights"),
    ("A + (B - C) * M", "weights"),
    ("(B - C) * M + A", "weights"),
    ("A - (C - B) * M", "weights"),
    ("B - C", "delta"),
    ("(B - C) * M", "delta"),
    ("-(B - C) / 2", "delta"),
    ("(B - C) + (A - D)", "delta"),
    ("A + B - 2 * C", "delta"),
    ("A * M - B * M", "delta"),
    ("A * (1 - M) + B * M", "weights"),
    ("A * (1 - M) + B * M - C", "delta"),
    ("1.5 * A - 0.5 * B", "weights"),
    ("0.3 * A + 0.9 * B", "weights"),
    ("A * M - B * N", "weights"),
    ("A * M + B * N - C * (M + N)", "delta"),
    ("A * M * N - B * N * M", "delta"),
    ("A + B - C", "weights"),
    ("slerp(A, B) - A", "delta"),
    ("slerp(A, B) + (C - D)", "weights"),
    ("M", "scalar"),
    ("1 - M * 2 / N", "scalar"),
]


@pytest.mark.parametrize(("text", "kind"), KINDS)
def test_the_type_of_a_formula(text: str, kind: str) -> None:
    assert kind_of(text) == kind


NONSENSE = [
    ("A * B", 5, "cannot multiply weights by weights"),
    ("(A - B) * C", 11, "cannot multiply delta by weights"),
    ("A * (B - C)", 6, "cannot multiply weights by delta"),
    ("A / B", 5, "cannot divide by weights"),
    ("A / (B - C)", 6, "cannot divide by delta"),
    ("M / A", 5, "cannot divide by weights"),
    ("A + 0.5", 5, "cannot add a number and weights"),
    ("0.5 + A", 7, "cannot add a number and weights"),
    ("A - M", 5, "cannot subtract a number and weights"),
    ("(A - B) + M", 11, "cannot add a number and delta"),
    ("A / 0", 5, "division by zero"),
    ("A / (M - M)", 6, "division by zero"),
    ("A + X", 5, "unknown name 'X'"),
    ("A + slerp", 5, "'slerp' is a method"),
    ("A(B - C)", 1, "'A' is not a method"),
    ("M(B - C)", 1, "'M' is not a method"),
]


@pytest.mark.parametrize(("text", "column", "what"), NONSENSE)
def test_an_operation_without_meaning_is_refused_at_its_column(
    text: str, column: int, what: str
) -> None:
    error = error_of(text)

    assert error.what.startswith(what)
    assert error.where == f"column {column}"


@pytest.mark.parametrize(("one", "other"), [("M1", "N0"), ("ab", "ba"), ("strength", "htgnerts")])
def test_parameters_with_similar_names_do_not_cancel(one: str, other: str) -> None:
    formula = parse_formula(f"A * {one} - B * {other}")

    assert check_formula(formula, scope(params=(one, other))) == "weights"


@given(st.lists(st.sampled_from([*MODELS]), min_size=1, max_size=6), st.integers(0, 2**32))
def test_any_difference_of_equal_sums_is_a_delta(models: list[str], seed: int) -> None:
    """(sum of w_i * X_i) - (sum of the same w_i) * Y adds up to 0 whatever the w_i are."""
    rng = random.Random(seed)
    weights = [rng.choice(["M", "N", "(1 - M)", "0.3", "M * N / 7"]) for _ in models]
    mixed = " + ".join(f"{name} * {weight}" for name, weight in zip(models, weights, strict=True))

    assert kind_of(f"{mixed} - A * ({' + '.join(weights)})") == "delta"
    assert kind_of(f"{mixed} - A * ({' + '.join(weights)}) + D") == "weights"


# --- let ---------------------------------------------------------------------------------------


def test_a_let_may_use_those_above_it() -> None:
    lets = {"detail": "B - C", "half": "detail * 0.5", "strong": "M * 2"}

    assert kind_of("half", **lets) == "delta"
    assert coefficients("A + half * strong", {"M": 0.25}, **lets) == {"A": 1, "B": 0.25, "C": -0.25}


def test_a_let_is_put_in_as_a_whole() -> None:
    """`2 * x` with x = A + B is 2A + 2B, as with parentheses."""
    assert coefficients("2 * x - C", x="A + B") == {"A": 2, "B": 2, "C": -1}


def test_used_names_go_through_lets_once_in_order() -> None:
    names = scope({"delta": "(B - C) * M", "idle": "D * N"})

    assert used_names(parse_formula("A + delta + delta"), names) == ("A", "B", "C", "M")


def test_an_error_within_a_let_points_into_the_let() -> None:
    formula = parse_formula("A + x", where="r.yaml:9")
    inner = parse_formula("(B - C) / M", where="r.yaml:5")
    names = Scope(frozenset("ABC"), frozenset("M"), MappingProxyType({"x": inner}), METHODS)

    with pytest.raises(RecipeError) as caught:
        specialise(formula, names, {"M": 0.0})

    assert caught.value.where == "r.yaml:5, column 11 of the formula"
    assert "division by zero" in caught.value.what


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A + B * (M * M)", 1e200),
        ("A + (B - C) / M", 1e-310),
        ("A + B * M * M", 1e200),
        ("slerp(A * M * M, B)", 1e200),
        ("A + (B - C) * (M - M * 2 * M / M)", 1e308),
    ],
)
def test_a_coefficient_that_overflows_is_refused(text: str, value: float) -> None:
    with pytest.raises(RecipeError, match="a coefficient is too large"):
        specialise(parse_formula(text), scope(), {"M": value})


# --- base --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("A + (B - C) * M", "A"),
        ("(B - C) * M + A", "A"),
        ("(B - C) + (D - A) + A", "A"),
        ("B * M + A * (1 - M)", "B"),
        ("M * B + (1 - M) * A", "B"),
        ("B - C + A", "A"),
        ("1.5 * B - 0.5 * A", "B"),
        ("slerp(B, A)", "B"),
        ("slerp(b=A, a=B)", "B"),
        ("slerp((A - B) + C, A)", "C"),
        ("n_average(D, A, B)", "D"),
        ("ties(A, B, base=C)", "C"),
        ("dare(A, B, base=(A - B) + D)", "D"),
        ("(A - B) * M + ties(A, B, base=C)", "C"),
        ("delta + mix", "D"),
        ("mix", "D"),
    ],
)
def test_the_base_is_the_leftmost_model_outside_a_delta(text: str, base: str) -> None:
    lets = {"delta": "B - C", "mix": "delta * 0.5 + D"}

    assert base_model(parse_formula(text), scope(lets)) == base


# --- methods -----------------------------------------------------------------------------------

BINDING = [
    ("slrep(A, B)", 1, "unknown method 'slrep'", "did you mean 'slerp'?"),
    ("A + tie(A, B, base=C)", 5, "unknown method 'tie'", "did you mean 'ties'?"),
    ("slerp(A)", 1, "slerp needs 'b'", "slerp(a, b, t=0.5)"),
    ("slerp()", 1, "slerp needs 'a'", "slerp(a, b, t=0.5)"),
    ("ties(A, B)", 1, "ties needs 'base'", "base=model"),
    ("n_average(A)", 1, "n_average needs at least 2 models, 1 given", "model, model"),
    ("slerp(A, B, C)", 13, "slerp takes 2 models, this is one more", "slerp(a, b, t=0.5)"),
    ("slerp(A, B, tt=0.5)", 16, "slerp has no 'tt'", "did you mean 't'?"),
    ("slerp(A, B, a=C)", 15, "slerp: 'a' is given twice", ""),
    ("slerp(A, B, t=0.1, t=0.9)", 22, "slerp: 't' is given twice", ""),
    ("ties(A, B, base=C, base=D)", 25, "ties: 'base' is given twice", ""),
    ("slerp(A, B, t=1.5)", 15, "slerp: t = 1.5 is outside 0 to 1", ""),
    ("slerp(A, B, t=-0.1)", 15, "slerp: t = -0.1 is outside 0 to 1", ""),
    ("dare(A, base=C, density=0)", 25, "dare: density = 0 is outside 1e-06 to 1", ""),
    ("slerp(A, B, t=C)", 15, "slerp: 't' is a model, it must be a number", ""),
    ("slerp(A, 0.5)", 10, "slerp: 'b' is a number, it must be a model", ""),
    ("slerp(A, B - C)", 10, "slerp: 'b' is a difference, it must be a model", ""),
    ("ties(A, B, base=C - D)", 17, "ties: 'base' is a difference, it must be a model", ""),
]


@pytest.mark.parametrize(("text", "column", "what", "fix"), BINDING)
def test_a_call_that_does_not_fit_its_method(text: str, column: int, what: str, fix: str) -> None:
    error = error_of(text)

    assert error.what.splitlines()[0] == what
    assert error.where == f"column {column}"
    assert fix in error.fix


@pytest.mark.parametrize(
    "text", ["ties(A, B, base=C, density=0.4, scale=1)", "slerp(A, 0.5*B + 0.5*C, t=0.25)"]
)
def test_a_form_reads_back_as_itself(text: str) -> None:
    form = specialise(parse_formula(text), scope(), {})

    assert specialise(parse_formula(str(form)), scope(), {}) == form
    assert str(form) == text


def test_a_number_for_a_method_is_given_by_name() -> None:
    with pytest.raises(RecipeError, match="slerp: a number has its name before it") as caught:
        check_formula(parse_formula("slerp(A, B, 0.3)"), scope())

    assert caught.value.fix == "slerp(a, b, t=0.5)"


def test_a_bound_is_checked_again_with_the_numbers_of_a_tensor() -> None:
    formula = parse_formula("slerp(A, B, t=M * 2)")

    with pytest.raises(RecipeError, match=r"t = 1\.4 is outside 0 to 1"):
        specialise(formula, scope(), {"M": 0.7})


@pytest.mark.parametrize(
    ("text", "name", "left"),
    [("slerp(A * M - B, C)", "a", "A - B"), ("ties(A, B - C * M, base=C)", "models", "B - C")],
)
def test_what_is_a_difference_with_these_numbers_is_no_argument(
    text: str, name: str, left: str
) -> None:
    formula = parse_formula(text)

    assert specialise(formula, scope(), {"M": 0.5}).terms
    with pytest.raises(RecipeError, match=f"with these numbers {name!r} is {left}, a difference"):
        specialise(formula, scope(), {"M": 1.0})


@pytest.mark.parametrize("text", ["slerp(A, B * M)", "train_difference(A, B * M, C)"])
def test_a_model_of_which_nothing_is_left_is_no_argument(text: str) -> None:
    with pytest.raises(RecipeError, match="with these numbers nothing is left of 'b'"):
        specialise(parse_formula(text), scope(), {"M": 0.0})


def test_usage_shows_a_call_that_would_be_accepted() -> None:
    assert len(METHODS) >= 5
    for method in METHODS.values():
        text = usage(method).replace("…", "C")
        names = dict.fromkeys(method.models, "A") | {"model": "B"}
        call = parse_formula(text).tree
        for word in names_in(call):
            text = text.replace(f"={word.id}", f"={names.get(word.id, word.id)}", 1)
        arguments = text[text.index("(") :]
        for old, new in names.items():
            arguments = arguments.replace(f"({old},", f"({new},").replace(f" {old},", f" {new},")
            arguments = arguments.replace(f" {old})", f" {new})").replace(f"({old})", f"({new})")

        assert kind_of(method.name + arguments.replace("number", "0.5")) == "weights"


# --- numbers put in ----------------------------------------------------------------------------


def evaluate(text: str, values: Mapping[str, float]) -> float:
    """The oracle: Python's own arithmetic on one float64 per model."""
    return float(eval(text, {"__builtins__": {}}, dict(values)))


def scalar_texts() -> st.SearchStrategy[str]:
    numbers = st.floats(0.01, 3.0).map(lambda value: f"{value:.3f}")
    leaves = st.one_of(numbers, st.sampled_from(PARAMS))
    return st.recursive(
        leaves,
        lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
            lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
        ),
        max_leaves=3,
    )


def model_texts() -> st.SearchStrategy[str]:
    """Formulas of models, whatever they add up to."""

    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        scalars = scalar_texts()
        return st.one_of(
            st.tuples(inner, st.sampled_from("+-"), inner).map(
                lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
            ),
            st.tuples(inner, scalars).map(lambda parts: f"{parts[0]} * {parts[1]}"),
            st.tuples(scalars, inner).map(lambda parts: f"{parts[0]} * ({parts[1]})"),
            st.tuples(inner, st.sampled_from(["2", "M", "0.3"])).map(
                lambda parts: f"({parts[0]}) / {parts[1]}"
            ),
            inner.map(lambda text: f"(-{text})"),
        )

    return st.recursive(st.sampled_from(MODELS), grow, max_leaves=12)


@given(
    text=model_texts(),
    models=st.lists(st.floats(-4, 4), min_size=4, max_size=4),
    params=st.lists(st.floats(0.05, 2), min_size=2, max_size=2),
)
@example(text="A + (B - C) * M", models=[1.0, 2.0, 3.0, 0.0], params=[0.7, 1.0])
@example(text="A + B * 0.1 + B * 0.2 - B * 0.3", models=[1.0, 2.0, 3.0, 0.0], params=[0.7, 1.0])
def test_the_linear_form_equals_the_formula(
    text: str, models: list[float], params: list[float]
) -> None:
    values = dict(zip([*MODELS, *PARAMS], [*models, *params], strict=True))
    form = form_of(text, values)
    size = evaluate(
        text.replace("-", "+"), {name: abs(value) for name, value in values.items()}
    )  # every cancelled term counts: what rounding is measured against

    found = math.fsum(coefficient * values[str(leaf)] for leaf, coefficient in form.terms)

    assert found == pytest.approx(evaluate(text, values), rel=1e-12, abs=1e-13 * (1 + abs(size)))


@pytest.mark.parametrize("text", [text for text, kind in KINDS if kind == "delta"])
@given(m=st.floats(-2, 2), n=st.floats(-2, 2))
def test_a_delta_adds_up_to_zero_whatever_the_numbers(text: str, m: float, n: float) -> None:
    assert form_of(text, {"M": m, "N": n}).total == pytest.approx(0.0, abs=1e-12)


def test_terms_that_cancel_are_gone() -> None:
    assert coefficients("A + (B - C) * M", {"M": 0.0}) == {"A": 1.0}
    assert coefficients("A * (1 - M) + B * M", {"M": 1.0}) == {"B": 1.0}
    assert coefficients("A + 0.1 * B + 0.2 * B - 0.3 * B") == {"A": 1.0}
    assert coefficients("A + B - B") == {"A": 1.0}


def test_linear_methods_are_read_as_formulas() -> None:
    assert coefficients("weighted_sum(A, B, alpha=M)", {"M": 0.25}) == {"A": 0.75, "B": 0.25}
    assert coefficients("add_difference(A, B, C, multiplier=M)", {"M": 0.5}) == {
        "A": 1,
        "B": 0.5,
        "C": -0.5,
    }
    assert coefficients("n_average(A, B, C, D)") == dict.fromkeys(MODELS, 0.25)


def test_a_method_that_is_not_linear_is_a_leaf_with_its_numbers() -> None:
    form = form_of("slerp(A, A * (1 - M) + B * M, t=N) + (C - D) * M", {"M": 0.5, "N": 0.25})
    leaf, weight = form.terms[0]

    assert isinstance(leaf, Applied)
    assert (leaf.method, leaf.scalars, weight) == ("slerp", (("t", 0.25),), 1.0)
    assert [dict(model.terms) for model in leaf.models] == [{"A": 1.0}, {"A": 0.5, "B": 0.5}]
    assert form.terms[1:] == (("C", 0.5), ("D", -0.5))
    assert form.models == ("A", "B", "C", "D")


def test_a_form_reads_as_a_formula() -> None:
    assert str(form_of("A + (B - C) * M", {"M": 0.7})) == "A + 0.7*B - 0.7*C"
    assert str(form_of("slerp(A, B, t=M) * 2 - C", {"M": 0.5})) == "2*slerp(A, B, t=0.5) - C"
    assert str(form_of("A * M", {"M": 0.0})) == "0"


@given(text=model_texts(), params=st.lists(st.floats(0.05, 2), min_size=2, max_size=2))
def test_a_shown_form_means_the_same_when_read_again(text: str, params: list[float]) -> None:
    form = form_of(text, dict(zip(PARAMS, params, strict=True)))
    assume(form.terms)

    again = dict(form_of(str(form)).terms)

    assert again.keys() == dict(form.terms).keys()
    for leaf, value in form.terms:
        assert again[leaf] == pytest.approx(value, rel=1e-5)  # shown with six digits


# --- the order of evaluation -------------------------------------------------------------------


def mix_value(mix: Mix, values: list[float]) -> float:
    """A mix evaluated left to right, as the engine does."""
    total: float | None = None
    for weight, node in mix.terms:
        assert not isinstance(node, Apply)
        term = weight * (values[node] if isinstance(node, int) else mix_value(node, values))
        total = term if total is None else total + term
    return 0.0 if total is None else total


@given(
    text=model_texts(),
    models=st.lists(st.floats(-4, 4), min_size=4, max_size=4),
    params=st.lists(st.floats(0.05, 2), min_size=2, max_size=2),
)
def test_a_compiled_mix_is_the_linear_form(
    text: str, models: list[float], params: list[float]
) -> None:
    form = form_of(text, dict(zip(PARAMS, params, strict=True)))
    mix = compile_mix(form, {name: at for at, name in enumerate(MODELS)})
    flat = [*flattened(mix)]
    sums = {at: math.fsum(value for other, value in flat if other == at) for at, _ in flat}

    assert sums == pytest.approx(
        {MODELS.index(str(leaf)): value for leaf, value in form.terms}, rel=1e-12, abs=1e-14
    )
    size = math.fsum(abs(value * models[at]) for at, value in flat)
    expected = math.fsum(value * models[at] for at, value in flat)
    assert mix_value(mix, models) == pytest.approx(expected, rel=1e-12, abs=1e-14 * (1 + size))


def flattened(mix: Mix, factor: float = 1.0) -> Iterator[tuple[int, float]]:
    """(read, coefficient) of every term, nested ones included, repeats too."""
    for weight, node in mix.terms:
        assert isinstance(node, int | Mix)
        if isinstance(node, Mix):
            yield from flattened(node, factor * weight)
        else:
            yield node, factor * weight


WRITTEN = (
    "A * (1 - M) + B * M",
    "A + (B - A) * M",
    "A + (B - C) * M",
    "(B - C) * M + A",
    "A - (C - B) * M",
    "A + M * (B - A) + N * (C - A)",
    "A + (B * M - C * M)",
    "A + (B - C) * 0.5 + (B - D) * 0.3 + (D - C) * 0.2",
    "A + 0.1 * (B - C) + 0.2 * (B - D) + 0.3 * (A - D)",
    "A + ((B - C) - (D - C) * N) * M",
    "A + ((B + D) * 0.5 - C) * M",
    "(A + (B - C) * M) * 0.5 + D * 0.5",
    "((A + B) * 0.5 + C) * 0.5",
    "A * 0.2 + (B * 0.3 + C * 0.5)",
    "A * M * N + B * (1 - M * N)",
)


@pytest.mark.parametrize("text", WRITTEN)
@given(
    models=st.lists(st.floats(-4, 4), min_size=4, max_size=4),
    params=st.lists(st.floats(0.05, 2), min_size=2, max_size=2),
)
def test_a_formula_is_evaluated_as_it_is_written(
    text: str, models: list[float], params: list[float]
) -> None:
    """Every rounding is that of Python's floats: no coefficient is put together with another."""
    assume(1.0 not in params)
    numbers = dict(zip(PARAMS, params, strict=True))
    mix = compile_mix(form_of(text, numbers), {name: at for at, name in enumerate(MODELS)}, "A")

    assert mix_value(mix, models) == eval(text, dict(zip(MODELS, models, strict=True)) | numbers)


@pytest.mark.parametrize(
    "text",
    [
        "A + (B - C) * M",
        "(B - C) * M + A",
        "A - (C - B) * M",
        "A + (B * M - C * M)",
        "A + B * M - C * M",
        "A + (B - C) * M + (B - D) * N + (D - C) * 0.2",
        "A + 0.1 * (B - C) - 0.2 * (D - B) + N * (C - D)",
        "A + ((B - C) - (D - C) * N) * M",
    ],
)
@given(a=st.floats(-4, 4), b=st.floats(-4, 4), m=st.floats(-2, 2), n=st.floats(-2, 2))
@example(a=-0.0, b=3.0, m=0.3, n=0.7)
@example(a=-0.0, b=3.0, m=-0.3, n=-0.7)
def test_differences_of_equal_models_leave_a_to_the_bit(
    text: str, a: float, b: float, m: float, n: float
) -> None:
    """The sign of its zeros included, which A + 0 would lose."""
    mix = compile_mix(form_of(text, {"M": m, "N": n}), {x: at for at, x in enumerate(MODELS)}, "A")
    value = mix_value(mix, [a, b, b, b])

    assert (value, math.copysign(1, value)) == (a, math.copysign(1, a))


@given(
    a=st.floats(allow_nan=False, allow_infinity=False, width=32),
    b=st.floats(-(2.0**100), 2.0**100, width=32),
    m=st.floats(-3, 3, width=16),
)
@example(a=-0.0, b=1e30, m=0.7)
@example(a=0.0, b=-1e30, m=-0.7)
@example(a=1.0, b=1e30, m=1.0)
def test_where_b_equals_c_the_result_is_a_to_the_bit(a: float, b: float, m: float) -> None:
    for text in ("A + (B - C) * M", "(B - C) * M + A", "A - (C - B) * M"):
        index = {"A": 0, "B": 1, "C": 2}
        mix = compile_mix(form_of(text, {"M": m}), index, base="A")
        value = mix_value(mix, [a, b, b])

        assert (value, math.copysign(1, value)) == (a, math.copysign(1, a))


def test_pairs_are_made_where_a_difference_is_not_written_as_one() -> None:
    form = form_of("A * 0.75 + B * 0.5 - C * 0.5 + D * 0.25")
    mix = compile_mix(form, {name: at for at, name in enumerate(MODELS)})

    assert mix.terms == ((0.75, 0), (0.25, 3), (-0.5, Mix(((1.0, 2), (-1.0, 1)))))


def test_a_method_s_models_are_mixes_of_their_own() -> None:
    form = form_of("slerp(A + (B - C) * M, D)", {"M": 0.5})
    mix = compile_mix(form, {name: at for at, name in enumerate(MODELS)})
    (apply,) = applied_in(mix)

    assert apply.models[0].terms == ((1.0, 0), (-0.5, Mix(((1.0, 2), (-1.0, 1)))))
    assert apply.models[1].terms == ((1.0, 3),)


def test_a_formula_keeps_its_text() -> None:
    assert parse_formula("A +\nB").text == "A + B"
    assert isinstance(parse_formula("A"), Formula)


def test_lets_that_double_each_other_take_no_time() -> None:
    """Sixty steps, each using the one before twice, stand for 2^60 uses of A."""
    lets = {"x0": parse_formula("A * M")}
    lets |= {f"x{n}": parse_formula(f"0.5 * x{n - 1} + 0.5 * x{n - 1}") for n in range(1, 61)}
    scope = Scope(frozenset("A"), frozenset("M"), lets, load_methods())
    formula = parse_formula("x60 + x60 - x60 * 1")

    assert check_formula(formula, scope) == "weights"
    assert base_model(formula, scope) == "A"
    assert set(used_names(formula, scope)) == {"A", "M"}
    assert specialise(formula, scope, {"M": 0.5}).terms == (("A", 0.5),)
