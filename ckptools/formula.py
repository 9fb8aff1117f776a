"""Formulas: text to a tree, the tree's type, and the tree with its numbers put in.

    "A + (B - C) * M"  --parse_formula-->  Expr  --check_formula-->  weights
                       --specialise(M = 0.7)-->  Linear{A: 1, B: 0.7, C: -0.7}

Knows method signatures, but no files, no tensors and no torch.
"""

from __future__ import annotations

import ast
import hashlib
import math
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

from ckptools.errors import CkptError, RecipeError, closest, nearest, raise_all
from ckptools.methods import Method, load_methods

Kind = Literal["weights", "delta", "scalar"]
MAX_FORMULA_CHARS = 20_000
BAKE = "bake"
BAKE_USAGE = "bake(model, adapter, weight=1)"
MAX_DEPTH = 200  # of nesting; Python's own limit of 1000 frames is met at some 400

# --- the tree ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A literal number."""

    value: float
    column: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Name:
    """A model, a `let`, or a parameter."""

    id: str
    column: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Binary:
    """left op right, op one of + - * /."""

    op: str
    left: Expr
    right: Expr
    column: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Call:
    """method(*args, **keywords)."""

    method: str
    args: tuple[Expr, ...]
    keywords: tuple[tuple[str, Expr], ...]
    column: int = field(default=0, compare=False)


Expr: TypeAlias = Number | Name | Binary | Call

_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
}
_LOOKALIKES = {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "∗": "*"}  # noqa: RUF001
_SIGNS = frozenset("+-*/=(),.0123456789")
_NOT_ZERO = "divide by another number"
# What Python's parser says that is worth passing on, and what to do about it.
_SYNTAX_HINTS = {
    "was never closed": "",
    "unmatched": "",
    "does not match": "",
    "positional argument follows keyword argument": "give the models first",
    "invalid decimal literal": "put a sign between a number and a name: 0.5 * A",
    "invalid imaginary literal": "put a sign between a number and a name: 0.5 * J",
}


@dataclass(frozen=True)
class Formula:
    """A parsed formula with the text it came from, for errors that point into it."""

    text: str
    tree: Expr
    where: str = ""

    def error(self, what: str, column: int, fix: str = "") -> RecipeError:
        """An error that shows the formula and a caret under `column` (1-based)."""
        return _error(self.text, what, column, where=self.where, fix=fix)


def _error(text: str, what: str, column: int, *, where: str, fix: str = "") -> RecipeError:
    pointer = f"\n    {text}\n    {' ' * (column - 1)}^"
    place = f"{where}, column {column} of the formula" if where else f"column {column}"
    return RecipeError(what + pointer, where=place, fix=fix)


def parse_formula(text: str, *, where: str = "") -> Formula:
    """Parse a formula; only + - * /, parentheses, names, numbers and method calls exist.

    Raises `RecipeError` with the column of the first thing that is not one of these.
    """
    flat = "".join(" " if char.isspace() else char for char in text).rstrip()
    if len(flat) > MAX_FORMULA_CHARS:
        raise RecipeError(f"a formula of {len(flat):,} characters", where=where, fix="use `let:`")
    _check_characters(flat, where)
    indent = len(flat) - len(flat.lstrip())
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is refused below
            parsed = ast.parse(flat.lstrip(), mode="eval")
        return Formula(flat, _Builder(flat, where, indent).build(parsed.body), where)
    except SyntaxError as exc:
        # Python says 0 where the text ends too early
        column = min(indent + exc.offset, len(flat) + 1) if exc.offset else len(flat) + 1
        what, fix = "this does not read as a formula", "write it like A + (B - C) * M"
        for words, hint in _SYNTAX_HINTS.items():
            if words in exc.msg:
                what, fix = f"{what}: {exc.msg}", hint or fix
        raise _error(flat, what, column, where=where, fix=fix) from exc
    except (RecursionError, MemoryError) as exc:
        raise RecipeError(
            "the formula is nested too deeply", where=where, fix="use `let:`"
        ) from exc
    except ValueError as exc:  # null bytes
        raise RecipeError(
            f"the formula cannot be read: {exc}", where=where, fix="write it like A + (B - C) * M"
        ) from exc


def _check_characters(text: str, where: str) -> None:
    """Refuse characters that look like signs or that Python would read as a comment."""
    for position, char in enumerate(text):
        if char == "#":
            raise _error(
                text, "`#` is not part of formulas", position + 1, where=where,
                fix="put comments on lines of their own in the YAML",
            )  # fmt: skip
        if not char.isascii():
            plain = _LOOKALIKES.get(char, unicodedata.normalize("NFKC", char))
            if plain in _SIGNS:
                raise _error(
                    text, f"{char!r} ({_character(char)}) is not a sign of formulas",
                    position + 1, where=where, fix=f"write {plain!r}",
                )  # fmt: skip


def _character(char: str) -> str:
    return unicodedata.name(char, f"U+{ord(char):04X}").lower()


class _Builder:
    """Turns Python's syntax tree into ours, refusing every node kind not listed here."""

    def __init__(self, text: str, where: str, indent: int) -> None:
        self._text, self._where, self._indent = text, where, indent
        self._depth = 0

    def build(self, node: ast.expr) -> Expr:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise RecursionError
        built = self._build(node)
        self._depth -= 1
        return built

    def _build(self, node: ast.expr) -> Expr:
        column = self._column(node)
        match node:
            case ast.Constant(value=bool() | str() | bytes() | complex() | None):
                raise self._error(f"{node.value!r} is not a number", node)
            case ast.Constant(value=int() | float() as value):
                return Number(self._finite(value, node), column)
            case ast.Name(id=name):
                return Name(name, column)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.build(operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                inner = self.build(operand)
                if isinstance(inner, Number):
                    return Number(-inner.value, column)
                return Binary("*", Number(-1.0, column), inner, column)
            case ast.BinOp(op=operator) if type(operator) in _OPERATORS:
                left, right = self.build(node.left), self.build(node.right)
                return Binary(_OPERATORS[type(operator)], left, right, column)
            case ast.BinOp(left=left, right=right):
                sign, at = self._between(left, right)
                raise self._error_at(
                    f"`{sign}` is not part of formulas", at, "only + - * / and methods"
                )
            case ast.Tuple(elts=[first, second, *_]):
                _, at = self._between(first, second)
                raise self._error_at(
                    "`,` is not part of formulas", at, "a decimal has a point: 0.5"
                )
            case ast.Call(func=ast.Name(id=name)):
                return self._call(name, node)
        raise self._error(
            "this is not part of formulas", node, "only names, numbers, + - * / and method calls"
        )

    def _call(self, name: str, node: ast.Call) -> Call:
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                raise self._error("`*` is not part of formulas", argument, "name the models")
        keywords: dict[str, Expr] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self._error("`**` is not part of formulas", keyword.value, "name the models")
            if keyword.arg in keywords:
                raise self._error(
                    f"{name}: {keyword.arg!r} is given twice", keyword.value, "remove one of them"
                )
            keywords[keyword.arg] = self.build(keyword.value)
        args = tuple(self.build(argument) for argument in node.args)
        return Call(name, args, tuple(keywords.items()), self._column(node))

    def _finite(self, value: float, node: ast.expr) -> float:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._error("the number is too large", node, "numbers go up to 1.8e308")
        return number

    def _column(self, node: ast.expr) -> int:
        # ast counts UTF-8 bytes; people count characters
        prefix = self._text.lstrip().encode()[: node.col_offset]
        return self._indent + len(prefix.decode("utf-8", "ignore")) + 1

    def _between(self, left: ast.expr, right: ast.expr) -> tuple[str, int]:
        """The sign between two parts, and its column."""
        flat = self._text.lstrip().encode()
        begin = left.end_col_offset or 0
        gap = flat[begin : right.col_offset].decode("utf-8", "ignore")
        sign = gap.strip(" ()")
        before = flat[:begin].decode("utf-8", "ignore")
        return sign, self._indent + len(before) + gap.find(sign) + 1

    def _error(self, what: str, node: ast.expr, fix: str = "") -> RecipeError:
        return self._error_at(what, self._column(node), fix)

    def _error_at(self, what: str, column: int, fix: str = "") -> RecipeError:
        return _error(self._text, what, column, where=self._where, fix=fix)


def formula_depth(formula: Formula, lets: Mapping[str, int]) -> int:
    """How deep a formula is nested, with the `let`s that it uses: name -> their depth."""

    def depth(expr: Expr) -> int:
        match expr:
            case Binary(left=left, right=right):
                return 1 + max(depth(left), depth(right))
            case Call(args=args, keywords=keywords):
                return 1 + max(map(depth, (*args, *(value for _, value in keywords))), default=0)
            case Name(id=name):
                return 1 + lets.get(name, 0)
        return 1

    return depth(formula.tree)


def names_in(expr: Expr) -> Iterator[Name]:
    """Every name of a formula, left to right, repeats included."""
    match expr:
        case Name():
            yield expr
        case Binary(left=left, right=right):
            yield from names_in(left)
            yield from names_in(right)
        case Call(args=args, keywords=keywords):
            for part in (*args, *(value for _, value in keywords)):
                yield from names_in(part)


# --- types -------------------------------------------------------------------------------------

# Every parameter gets a value of its own at each probe, made from its name, that no other
# coefficient cancels by accident: the sum of a linear formula's coefficients is zero at all
# probes exactly when it is zero whatever the parameters are.
_PROBES = 3


def _probe(param: str, number: int) -> float:
    """A number in [0.5, 1.5) that belongs to a parameter."""
    digest = hashlib.sha256(f"{number} {param}".encode()).digest()
    return 0.5 + int.from_bytes(digest[:6], "big") / 2**48


@dataclass(frozen=True)
class _Typed:
    """A type, with the value (scalar) or the sum of coefficients (otherwise) at each probe."""

    kind: Kind
    sums: tuple[float, ...]


@dataclass(frozen=True)
class Scope:
    """The names a formula may use: models, parameters, and earlier `let` formulas.

    types    what `check_formula` found out about the `let`s so far
    told     names whose own mistake is told already: what uses them is not to blame
    is_open  whether there may be more names, for a list of them could not be read
    """

    models: frozenset[str]
    params: frozenset[str]
    lets: Mapping[str, Formula]
    methods: Mapping[str, Method]
    types: dict[str, _Typed] = field(default_factory=dict, compare=False, repr=False)
    told: frozenset[str] = frozenset()
    is_open: bool = False

    @property
    def names(self) -> list[str]:
        """All names in scope."""
        return sorted({*self.models, *self.params, *self.lets})

    def lacks(self, name: str) -> bool:
        """Whether a name is a mistake, and not one that is told already."""
        return not (
            self.is_open
            or name in self.told
            or name in self.models
            or name in self.lets
            or name in self.params
        )


def check_formula(formula: Formula, scope: Scope) -> Kind | None:
    """The type of a formula: "weights", "delta" or "scalar"; None where a name's mistake hides it.

    B - C is a delta and A + delta is weights, because of what their coefficients add up to:
    a difference whose coefficients always add up to 0 is a delta, anything else is weights.
    Raises `RecipeError`, or `ManyErrors`, with the column of every unknown name and of every
    operation without meaning.
    """
    checker = _Checker(formula, scope)
    found = checker.typed(formula.tree)
    raise_all(checker.errors)
    return found.kind if found is not None else None


def unknown_name(formula: Formula, name: Name, scope: Scope) -> RecipeError:
    """The error of a name that is not in scope."""
    if name.id in scope.methods:
        return formula.error(
            f"{name.id!r} is a method", name.column, f"call it: {usage(scope.methods[name.id])}"
        )
    odd = next((char for char in name.id if not char.isascii()), "")
    usable = [known for known in scope.names if known.isidentifier()]
    fix = nearest(name.id, usable)
    if not closest(name.id, usable):
        fix = f"{fix}; numbers of your own go into `params:`".removeprefix("; ")
    return formula.error(
        f"unknown name {name.id!r}" + (f", with a {_character(odd)}" if odd else ""),
        name.column,
        fix,
    )


class _Checker:
    """Types a formula; what is wrong is gathered, and what hangs on it has no type (None)."""

    def __init__(self, formula: Formula, scope: Scope) -> None:
        self._formula, self._scope = formula, scope
        self.errors: list[CkptError] = []

    def _error(self, what: str, column: int, fix: str = "") -> None:
        self.errors.append(self._formula.error(what, column, fix))

    def typed(self, expr: Expr) -> _Typed | None:
        match expr:
            case Number(value=value):
                return _Typed("scalar", (value,) * _PROBES)
            case Name():
                return self._name(expr)
            case Call():
                return self._call(expr)
            case Binary(op="*" | "/"):
                return self._product(expr)
            case Binary():
                return self._sum(expr)

    def _name(self, expr: Name) -> _Typed | None:
        scope = self._scope
        if expr.id in scope.models:
            return _Typed("weights", (1.0,) * _PROBES)
        if expr.id in scope.lets:
            return self._let(expr.id)
        if expr.id in scope.params:
            return _Typed("scalar", tuple(_probe(expr.id, n) for n in range(_PROBES)))
        if scope.lacks(expr.id):
            self.errors.append(unknown_name(self._formula, expr, scope))
        return None

    def _let(self, name: str) -> _Typed | None:
        """Typed once each: lets that use lets would double the work at every step."""
        memo = self._scope.types
        if name not in memo:
            formula = self._scope.lets[name]
            found = _Checker(formula, self._scope).typed(formula.tree)
            if found is None:
                return None
            memo[name] = found
        return memo[name]

    def _product(self, expr: Binary) -> _Typed | None:
        left, right = self.typed(expr.left), self.typed(expr.right)
        if left is None or right is None:
            return None
        if expr.op == "/":
            if right.kind != "scalar":
                self._error(
                    f"cannot divide by {right.kind}", expr.right.column, "divide by a number"
                )
                return None
            if any(value == 0 for value in right.sums):
                self._error("division by zero", expr.right.column, _NOT_ZERO)
                return None
            return _Typed(left.kind, _each(left, right, lambda x, y: x / y))
        if "scalar" not in (left.kind, right.kind):
            self._error(
                f"cannot multiply {left.kind} by {right.kind}",
                expr.right.column,
                "multiply a model by a number, or mix: A * (1 - M) + B * M",
            )
            return None
        kind = left.kind if right.kind == "scalar" else right.kind
        return _Typed(kind, _each(left, right, lambda x, y: x * y))

    def _sum(self, expr: Binary) -> _Typed | None:
        left, right = self.typed(expr.left), self.typed(expr.right)
        if left is None or right is None:
            return None
        sign = 1 if expr.op == "+" else -1
        sums = _each(left, right, lambda x, y: x + sign * y)
        if left.kind == right.kind == "scalar":
            return _Typed("scalar", sums)
        if "scalar" in (left.kind, right.kind):
            other = right.kind if left.kind == "scalar" else left.kind
            self._error(
                f"cannot {'add' if sign > 0 else 'subtract'} a number and {other}",
                expr.right.column,
                "multiply by numbers; add and subtract models",
            )
            return None
        zero = all(abs(total) < 1e-9 for total in sums)
        return _Typed("delta" if zero else "weights", sums)

    def _bake(self, expr: Call) -> _Typed | None:
        try:
            bake = bind_bake(expr, self._formula)
        except RecipeError as exc:
            self._failed_call(expr, exc)
            return None
        model, weight = self.typed(bake.model), self.typed(bake.weight)
        if model is not None and model.kind != "weights":
            self._error(
                f"bake: an adapter goes into a model, not into a {model.kind}",
                bake.model.column,
                BAKE_USAGE,
            )
            model = None
        if weight is not None and weight.kind != "scalar":
            self._error("bake: weight must be a number", bake.weight.column, "such as weight=0.8")
        self._check_adapter(bake.adapter)
        return model

    def _check_adapter(self, adapter: Expr) -> None:
        scope = self._scope
        name = adapter.id if isinstance(adapter, Name) else ""
        if name in scope.models or (name and (scope.is_open or name in scope.told)):
            return
        self._error(
            "bake: the adapter must be a name of `models:`",
            adapter.column,
            nearest(name, sorted(scope.models)),
        )

    def _failed_call(self, expr: Call, error: RecipeError) -> None:
        """A call that cannot be: what is wrong with its arguments is told all the same."""
        self.errors.append(error)
        for part in (*expr.args, *(value for _, value in expr.keywords)):
            self.typed(part)

    def _call(self, expr: Call) -> _Typed | None:
        if expr.method == BAKE:
            return self._bake(expr)
        method = self._scope.methods.get(expr.method)
        try:
            if method is None:
                raise self._no_method(expr)
            bound = bind(expr, method, self._formula)
        except RecipeError as exc:
            self._failed_call(expr, exc)
            return None
        for name, value in (*bound.models, *bound.scalars):
            self._check_argument(method, name, value)
        return _Typed("weights", (1.0,) * _PROBES)

    def _no_method(self, expr: Call) -> RecipeError:
        if expr.method in self._scope.names:
            return self._formula.error(
                f"{expr.method!r} is not a method", expr.column, f"write {expr.method} * (…)"
            )
        return self._formula.error(
            f"unknown method {expr.method!r}",
            expr.column,
            nearest(expr.method, [*self._scope.methods, BAKE]),
        )

    def _check_argument(self, method: Method, name: str, value: Expr) -> None:
        wanted = "scalar" if name in method.scalars else "weights"
        found = self.typed(value)
        if found is not None and found.kind != wanted:
            noun = {"scalar": "a number", "weights": "a model", "delta": "a difference"}
            self._error(
                f"{method.name}: {name!r} is {noun[found.kind]}, it must be {noun[wanted]}",
                value.column,
                usage(method),
            )
        elif isinstance(value, Number):
            try:
                _check_bounds(method, name, value.value, self._formula, value.column)
            except RecipeError as exc:
                self.errors.append(exc)


def _each(
    left: _Typed, right: _Typed, combine: Callable[[float, float], float]
) -> tuple[float, ...]:
    return tuple(combine(x, y) for x, y in zip(left.sums, right.sums, strict=True))


# --- calls -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """A call's arguments matched to the method's parameters, models in calling order."""

    models: tuple[tuple[str, Expr], ...]
    scalars: tuple[tuple[str, Expr], ...]


def bind(call: Call, method: Method, formula: Formula) -> Bound:
    """Match arguments to parameters, or raise with the column of the one that does not fit."""
    models: dict[str, Expr] = {}
    extra: list[tuple[str, Expr]] = []
    scalars: dict[str, Expr] = {}
    for position, value in enumerate(call.args):
        if position < len(method.models):
            models[method.models[position]] = value
        elif method.variadic:
            extra.append((method.variadic, value))
        else:
            what = f"{call.method} takes {len(method.models)} models, this is one more"
            if isinstance(value, Number):
                what = f"{call.method}: a number has its name before it"
            raise formula.error(what, value.column, usage(method))
    for name, value in call.keywords:
        known = (*method.models, *method.keyword_models, *method.scalars)
        if name not in known:
            raise formula.error(
                f"{call.method} has no {name!r}", value.column, nearest(name, known)
            )
        if name in models:
            raise formula.error(
                f"{call.method}: {name!r} is given twice", value.column, "remove one of them"
            )
        (scalars if name in method.scalars else models)[name] = value
    wanted = [*method.models, *method.keyword_models]
    wanted += [name for name, scalar in method.scalars.items() if scalar.default is None]
    for name in wanted:
        if name not in models and name not in scalars:
            raise formula.error(f"{call.method} needs {name!r}", call.column, usage(method))
    if method.variadic and len(extra) < method.minimum:
        raise formula.error(
            f"{call.method} needs at least {method.minimum} models, {len(extra)} given",
            call.column,
            usage(method),
        )
    ordered = [(name, models[name]) for name in method.models]
    ordered += extra
    ordered += [(name, models[name]) for name in method.keyword_models]
    return Bound(tuple(ordered), tuple(scalars.items()))


@dataclass(frozen=True)
class BoundBake:
    """The arguments of a call of `bake`."""

    model: Expr
    adapter: Expr
    weight: Expr


def bind_bake(call: Call, formula: Formula) -> BoundBake:
    """Match a `bake` call's arguments, or raise with the column of the one that does not fit."""
    names = ("model", "adapter", "weight")
    if len(call.args) > len(names):
        raise formula.error("bake takes one model and one adapter", call.args[3].column, BAKE_USAGE)
    found = dict(zip(names, call.args, strict=False))
    for name, value in call.keywords:
        if name not in names:
            raise formula.error(f"bake has no {name!r}", value.column, BAKE_USAGE)
        if name in found:
            raise formula.error(f"bake: {name!r} is given twice", value.column, BAKE_USAGE)
        found[name] = value
    for name in names[:2]:
        if name not in found:
            raise formula.error(f"bake needs {name!r}", call.column, BAKE_USAGE)
    weight = found.get("weight", Number(1.0, call.column))
    return BoundBake(found["model"], found["adapter"], weight)


def usage(method: Method) -> str:
    """How a method is called: "slerp(a, b, t=0.5)"."""
    parts = [*method.models]
    if method.variadic:
        parts.append("model, " * method.minimum + "…")
    parts += [f"{name}=model" for name in method.keyword_models]
    parts += [
        f"{scalar.name}=" + ("number" if scalar.default is None else f"{scalar.default:g}")
        for scalar in method.scalars.values()
    ]
    return f"{method.name}({', '.join(parts)})"


def _check_bounds(method: Method, name: str, value: float, formula: Formula, column: int) -> None:
    scalar = method.scalars[name]
    if not scalar.minimum <= value <= scalar.maximum:
        raise formula.error(
            f"{method.name}: {name} = {value:g} is outside "
            f"{scalar.minimum:g} to {scalar.maximum:g}",
            column,
            "use a number in this range",
        )


def base_model(formula: Formula, scope: Scope) -> str:
    """The leftmost model that is not inside a delta: it gives the list of tensors.

    >>> # (B - C) * M + A  ->  A ;  ties(A, B, base=C)  ->  C
    """
    checker = _Checker(formula, scope)

    def find(expr: Expr) -> str:
        match expr:
            case Name(id=name):
                return find_let(name) if name in scope.lets else name
            case Call(method="bake"):
                return find(bind_bake(expr, formula).model)
            case Call(method=method_name):
                method = scope.methods[method_name]
                models = bind(expr, method, formula).models
                return find(next(value for name, value in models if name == method.anchor))
            case Binary(left=left, right=right):
                is_model = (typed := checker.typed(left)) is not None and typed.kind == "weights"
                return find(left if is_model else right)
        raise formula.error("the formula names no model", expr.column, "as A + (B - C) * M does")

    def find_let(name: str) -> str:
        return base_model(scope.lets[name], scope)

    return find(formula.tree)


# --- numbers put in ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Applied:
    """A method that is not linear, with its models and its numbers: a leaf of a linear form."""

    method: str
    models: tuple[Linear, ...]
    scalars: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Baked:
    """A model with an adapter baked in, where what the adapter does depends on the model."""

    model: Linear
    adapter: str
    strength: float


@dataclass(frozen=True)
class AdapterDelta:
    """What an adapter adds to a tensor, whatever the model: a leaf that is not a model."""

    adapter: str


Leaf: TypeAlias = str | Applied | Baked | AdapterDelta


@dataclass(frozen=True)
class Scaled:
    """What is written as a model, or a sum of models, times a number."""

    of: Written
    factor: float


@dataclass(frozen=True)
class Summed:
    """What is written as left + right, or left - right where `sign` is -1."""

    left: Written
    right: Written
    sign: int


# How a form of models alone is written.
Written: TypeAlias = str | Scaled | Summed
MAX_WRITTEN = 64  # models in it; a `let` that uses a `let` twice, and so on, would have no end


@dataclass(frozen=True)
class Linear:
    """A linear form: (leaf, coefficient) pairs in order of first appearance, zeros left out.

    written  the same as a formula has it; None where that is long, or not of models alone
    Supports + - * / so that a linear method can be called on it instead of on tensors.
    """

    terms: tuple[tuple[Leaf, float], ...]
    written: Written | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, leaf: Leaf) -> Linear:
        """1 * leaf."""
        return cls(((leaf, 1.0),), leaf if isinstance(leaf, str) else None)

    def __add__(self, other: Linear) -> Linear:
        return self._plus(other, 1)

    def __sub__(self, other: Linear) -> Linear:
        return self._plus(other, -1)

    def _plus(self, other: Linear, sign: int) -> Linear:
        if not other.terms:
            return self
        if not self.terms and sign > 0:
            return other
        sums: dict[Leaf, float] = dict(self.terms)
        sizes: dict[Leaf, float] = {leaf: abs(value) for leaf, value in self.terms}
        for leaf, value in other.terms:
            sums[leaf] = sums.get(leaf, 0.0) + sign * value
            sizes[leaf] = sizes.get(leaf, 0.0) + abs(value)
        # what is left of 0.1 + 0.2 - 0.3 is not a coefficient; an overflow is kept to be told
        terms = tuple(
            (leaf, value)
            for leaf, value in sums.items()
            if not abs(value) <= 1e-15 * sizes[leaf] < math.inf
        )
        return Linear(terms, _summed(self.written, other.written, sign))

    def __mul__(self, factor: float) -> Linear:
        if factor == 0:
            return Linear(())
        if factor == 1:
            return self
        terms = tuple((leaf, value * factor) for leaf, value in self.terms)
        return Linear(terms, _scaled(self.written, factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Linear:
        terms = tuple((leaf, value / divisor) for leaf, value in self.terms)
        return Linear(terms, _scaled(self.written, 1.0 / divisor))

    @cached_property
    def total(self) -> float:
        """The sum of the models' coefficients: 1 for a proper mix of models."""
        return math.fsum(value for leaf, value in self.terms if not isinstance(leaf, AdapterDelta))

    @property
    def is_difference(self) -> bool:
        """Whether the coefficients cancel: the form is no model."""
        return abs(self.total) < 1e-12

    @cached_property
    def parts(self) -> tuple[tuple[str, Linear], ...]:
        """Every form within the form, as what a method or a bake works on: (its name, form)."""
        found: list[tuple[str, Linear]] = []
        for leaf, _ in self.terms:
            match leaf:
                case Applied(method=method, models=models):
                    for model in models:
                        found += [(method, model), *model.parts]
                case Baked(model=model):
                    found += [(BAKE, model), *model.parts]
        return tuple(found)

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Every model of the form, nested ones included, each once, in order."""
        found: list[str] = []
        for leaf, _ in self.terms:
            match leaf:
                case str():
                    found.append(leaf)
                case Applied(models=models):
                    found += [name for model in models for name in model.models]
                case Baked(model=model):
                    found += model.models
        return tuple(dict.fromkeys(found))

    def without(self, models: Collection[str]) -> Linear:
        """The form with nothing of these models, which may only stand in it as differences."""
        return Linear(
            tuple(
                (kept, value)
                for leaf, value in self.terms
                if (kept := _leaf_without(leaf, models)) is not None
            )
        )

    def __str__(self) -> str:
        text = ""
        for leaf, value in self.terms:
            name = _leaf_text(leaf)
            sign = ("-" if value < 0 else "") if not text else (" - " if value < 0 else " + ")
            size = abs(value)
            text += sign + (name if size == 1 else f"{size:.6g}*{name}")
        return text or "0"


def is_difference(written: Written) -> bool:
    """Whether the coefficients cancel, but for roundings."""
    values = [value for _, value in occurrences(written)]
    return abs(math.fsum(values)) <= 1e-12 * math.fsum(map(abs, values))


def occurrences(written: Written, factor: float = 1.0) -> Iterator[tuple[str, float]]:
    """Every model that is written, with its coefficient there, repeats included."""
    match written:
        case str():
            yield written, factor
        case Scaled(of=of, factor=more):
            yield from occurrences(of, factor * more)
        case Summed(left=left, right=right, sign=sign):
            yield from occurrences(left, factor)
            yield from occurrences(right, factor * sign)


def _scaled(of: Written | None, factor: float) -> Written | None:
    return None if of is None else Scaled(of, factor)


def _summed(left: Written | None, right: Written | None, sign: int) -> Written | None:
    if left is None or right is None:
        return None
    summed = Summed(left, right, sign)
    return summed if sum(1 for _ in occurrences(summed)) <= MAX_WRITTEN else None


def _leaf_without(leaf: Leaf, models: Collection[str]) -> Leaf | None:
    match leaf:
        case str():
            return None if leaf in models else leaf
        case Applied():
            inner = tuple(model.without(models) for model in leaf.models)
            return replace(leaf, models=inner) if all(each.terms for each in inner) else None
        case Baked(model=model):
            return replace(leaf, model=model.without(models))
        case AdapterDelta():
            return leaf


def _leaf_text(leaf: Leaf) -> str:
    match leaf:
        case str():
            return leaf
        case AdapterDelta(adapter=adapter):
            return adapter
        case Baked(model=model, adapter=adapter, strength=strength):
            return f"bake({model}, {adapter}, weight={strength:.6g})"
        case Applied():
            return _applied_text(leaf)


def _applied_text(leaf: Applied) -> str:
    keywords = load_methods()[leaf.method].keyword_models
    places = [""] * (len(leaf.models) - len(keywords)) + [f"{name}=" for name in keywords]
    parts = [f"{place}{model}" for place, model in zip(places, leaf.models, strict=True)]
    parts += [f"{name}={value:.6g}" for name, value in leaf.scalars]
    return f"{leaf.method}({', '.join(parts)})"


def specialise(formula: Formula, scope: Scope, value_of: Mapping[str, float]) -> Linear:
    """The formula with its parameters' values put in: what one tensor's merge is.

    value_of  parameter name -> its value for the tensor in hand
    Raises `RecipeError` where the values leave a method's bounds, divide by zero or overflow.
    """

    numbers_of_lets: dict[str, float] = {}
    forms_of_lets: dict[str, Linear] = {}

    def scalar(expr: Expr, inside: Formula) -> float:
        match expr:
            case Number(value=value):
                return value
            case Name(id=name):
                if name not in scope.lets:
                    return value_of[name]
                if name not in numbers_of_lets:
                    numbers_of_lets[name] = scalar(scope.lets[name].tree, scope.lets[name])
                return numbers_of_lets[name]
            case Binary(op=op, left=left, right=right):
                x, y = scalar(left, inside), scalar(right, inside)
                if op == "/" and y == 0:
                    raise inside.error("division by zero", right.column, _NOT_ZERO)
                return _finite(
                    {"+": x + y, "-": x - y, "*": x * y}[op] if op != "/" else x / y,
                    inside,
                    expr.column,
                )
        raise inside.error("a method does not give a number", expr.column, "use a parameter")

    def form(expr: Expr, inside: Formula) -> Linear:
        match expr:
            case Name(id=name):
                if name not in scope.lets:
                    return Linear.of(name)
                if name not in forms_of_lets:
                    forms_of_lets[name] = form(scope.lets[name].tree, scope.lets[name])
                return forms_of_lets[name]
            case Binary(op="+", left=left, right=right):
                return form(left, inside) + form(right, inside)
            case Binary(op="-", left=left, right=right):
                return form(left, inside) - form(right, inside)
            case Binary(op="/", left=left, right=right):
                divisor = scalar(right, inside)
                if divisor == 0:
                    raise inside.error("division by zero", right.column, _NOT_ZERO)
                return form(left, inside) / divisor
            case Binary(op="*", left=left, right=right):
                if is_scalar(left, scope):
                    return form(right, inside) * scalar(left, inside)
                return form(left, inside) * scalar(right, inside)
            case Call():
                return called(expr, inside)
        raise inside.error("a number where a model is wanted", expr.column, "name a model")

    def called(call: Call, inside: Formula) -> Linear:
        if call.method == BAKE:
            return baked(call, inside)
        method = scope.methods[call.method]
        bound = bind(call, method, inside)
        numbers = {s.name: s.default for s in method.scalars.values() if s.default is not None}
        for name, value in bound.scalars:
            numbers[name] = scalar(value, inside)
            _check_bounds(method, name, numbers[name], inside, value.column)
        models = [(name, form(value, inside)) for name, value in bound.models]
        if method.access == "linear":
            positional = [value for name, value in models if name not in method.keyword_models]
            keywords = {name: value for name, value in models if name in method.keyword_models}
            result: Linear = method.function(*positional, **keywords, **numbers)
            return result
        for (parameter, model), (_, value) in zip(models, bound.models, strict=True):
            _check_model(method.name, parameter, model, inside, value.column)
        ordered = tuple((name, numbers[name]) for name in method.scalars)
        return Linear.of(Applied(method.name, tuple(value for _, value in models), ordered))

    def baked(call: Call, inside: Formula) -> Linear:
        bake = bind_bake(call, inside)
        model, strength = form(bake.model, inside), scalar(bake.weight, inside)
        _check_model(BAKE, "model", model, inside, bake.model.column)
        if strength == 0 or not isinstance(bake.adapter, Name):
            return model
        return Linear.of(Baked(model, bake.adapter.id, strength))

    return _all_finite(form(formula.tree, formula), formula)


def _check_model(method: str, parameter: str, model: Linear, inside: Formula, column: int) -> None:
    """`RecipeError` where an argument is a difference with these numbers, or nothing at all."""
    if model.is_difference:
        what = f"{parameter!r} is {model}, a difference"
        if not model.terms:
            what = f"nothing is left of {parameter!r}"
        raise inside.error(f"{method}: with these numbers {what}", column, "check the parameters")


def _all_finite(form: Linear, inside: Formula) -> Linear:
    """The form, or `RecipeError` where one of its coefficients is NaN or Inf."""
    for value in _coefficients(form):
        _finite(value, inside, inside.tree.column)
    return form


def _finite(value: float, inside: Formula, column: int) -> float:
    """The value, or `RecipeError` where it is NaN or Inf."""
    if not math.isfinite(value):
        what = "with these numbers a coefficient is too large"
        raise inside.error(what, column, "check the parameters")
    return value


def _coefficients(form: Linear) -> Iterator[float]:
    """Every coefficient of a form, those within methods and bakes included."""
    for each in (form, *(part for _, part in form.parts)):
        yield from (value for _, value in each.terms)


def adapter_names(formula: Formula, scope: Scope) -> frozenset[str]:
    """The names of `models:` that stand where an adapter is wanted, through `let`s."""
    return _names_by_role(formula, scope)[1]


def model_names(formula: Formula, scope: Scope) -> frozenset[str]:
    """The names of `models:` that stand where a model is wanted, through `let`s."""
    return _names_by_role(formula, scope)[0]


def _names_by_role(formula: Formula, scope: Scope) -> tuple[frozenset[str], frozenset[str]]:
    """(models, adapters)."""
    models: set[str] = set()
    found: set[str] = set()
    seen: set[str] = set()

    def walk(expr: Expr, inside: Formula) -> None:
        match expr:
            case Name(id=name) if name in scope.lets and name not in seen:
                seen.add(name)
                walk(scope.lets[name].tree, scope.lets[name])
            case Name(id=name) if name in scope.models:
                models.add(name)
            case Binary(left=left, right=right):
                walk(left, inside)
                walk(right, inside)
            case Call(method="bake"):
                bake = bind_bake(expr, inside)
                walk(bake.model, inside)
                if isinstance(bake.adapter, Name):
                    found.add(bake.adapter.id)
            case Call(args=args, keywords=keywords):
                for part in (*args, *(value for _, value in keywords)):
                    walk(part, inside)

    walk(formula.tree, formula)
    return frozenset(models), frozenset(found)


@dataclass(frozen=True)
class Role:
    """One place where a model stands in a formula.

    kind       the kind of file that is wanted there; "" where any will do
    is_guest   whether the call takes it there and gives another kind
    parameter  whose place it is: "transfer_control: 'new_base'"; "" outside of such calls
    formula    and the name's column in it, for an error that points there
    """

    model: str
    kind: str
    is_guest: bool
    parameter: str
    formula: Formula
    column: int


_Place: TypeAlias = tuple[str, bool, str]  # kind, is_guest, parameter of a `Role`


def model_roles(formula: Formula, scope: Scope) -> tuple[Role, ...]:
    """Every place where a model stands, through `let`s; the nearest call that tells kinds decides.

    Raises `RecipeError` where what such a call gives is of another kind than is wanted there.
    """
    found: dict[Role, None] = {}
    seen: set[tuple[str, _Place]] = set()

    def walk(expr: Expr, inside: Formula, place: _Place) -> None:
        match expr:
            case Name(id=name, column=column) if name in scope.models:
                found[Role(name, *place, inside, column)] = None
            case Name(id=name) if name in scope.lets and (name, place) not in seen:
                seen.add((name, place))
                walk(scope.lets[name].tree, scope.lets[name], place)
            case Binary(left=left, right=right):
                walk(left, inside, place)
                walk(right, inside, place)
            case Call(method="bake"):
                walk(bind_bake(expr, inside).model, inside, place)
            case Call(method=name, column=column):
                kinds = scope.methods[name].kinds
                given = kinds.get(scope.methods[name].anchor, "")
                wanted, _, parameter = place
                if given and wanted not in ("", given):
                    raise inside.error(
                        f"{parameter} must be a {wanted}; {name} gives a {given}", column
                    )
                for argument, value in bind(expr, scope.methods[name], inside).models:
                    kind = kinds.get(argument, "")
                    own = (kind, kind != given, f"{name}: {argument!r}")
                    walk(value, inside, own if kind else place)

    walk(formula.tree, formula, ("", False, ""))
    return tuple(found)


def is_scalar(expr: Expr, scope: Scope) -> bool:
    """Whether an expression that passed `check_formula` is a number."""
    typed = _Checker(Formula("", expr), scope).typed(expr)
    return typed is not None and typed.kind == "scalar"


def used_names(formula: Formula, scope: Scope) -> Iterable[str]:
    """Every model and parameter a formula uses, through `let`s, first use first."""
    seen: dict[str, None] = {}

    def walk(current: Formula) -> None:
        for name in names_in(current.tree):
            if name.id not in seen:
                seen[name.id] = None
                if name.id in scope.lets:
                    walk(scope.lets[name.id])

    walk(formula)
    return tuple(name for name in seen if name not in scope.lets)
