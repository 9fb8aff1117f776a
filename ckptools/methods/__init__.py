"""The registry of merge methods: content, not machinery.

A method is one file here with one pure function and one decorator; its signature is its schema.
Importing this package loads no torch: methods that need it import it inside the function.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeVar

Access = Literal["linear", "elementwise", "tensor"]


class Random(Protocol):
    """Random numbers that depend only on (seed, tensor name, element), never on blocks or order."""

    def uniform(self, stream: int) -> Any:
        """Numbers in [0, 1), the shape of the block in hand; `stream` tells draws apart."""


@dataclass(frozen=True)
class Scalar:
    """A number a method takes: `minimum` and `maximum` bound it, `default` is None if required."""

    name: str
    default: float | None
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Method:
    """A registered merge method and what its signature says.

    access      "linear": a linear combination, written with + - * / only, so that the planner can
                read its coefficients; "elementwise": any block of elements; "tensor": a whole
                tensor at a time
    formula     the mathematics, as shown to users
    source      where the formula comes from
    models      names of the positional model parameters
    variadic    name of the `*models` parameter, or ""
    minimum     how many models a variadic method needs at least
    keyword_models  model parameters given by keyword (`base=C`)
    scalars     the numbers it takes, in order
    random      whether it draws random numbers (an `rng` parameter)
    doubles     whether it is computed in fp64 whatever is stored
    kinds       model parameter -> the kind of file it must be (`family.KINDS`), where a method
                takes models of several kinds: the result is of its anchor's kind
    """

    name: str
    function: Callable[..., Any]
    access: Access
    formula: str
    source: str
    models: tuple[str, ...]
    variadic: str
    minimum: int
    keyword_models: tuple[str, ...]
    scalars: Mapping[str, Scalar]
    random: bool
    summary: str
    scratch: int = 0
    doubles: bool = False
    kinds: Mapping[str, str] = field(default_factory=dict)

    @property
    def anchor(self) -> str:
        """The model parameter whose tensors the result resembles: `base`, or the first model."""
        if "base" in self.keyword_models:
            return "base"
        return self.models[0] if self.models else self.variadic

    @property
    def ranges(self) -> Mapping[str, tuple[float, float]]:
        """Least and greatest value of the numbers that are bounded: {"t": (0, 1)}."""
        return {
            name: (scalar.minimum, scalar.maximum)
            for name, scalar in self.scalars.items()
            if math.isfinite(scalar.minimum) or math.isfinite(scalar.maximum)
        }


F = TypeVar("F", bound=Callable[..., Any])
_REGISTRY: dict[str, Method] = {}


def merge_method(
    *,
    access: Access,
    formula: str,
    source: str,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    minimum: int = 1,
    scratch: int = 0,
    doubles: bool = False,
    kinds: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Register a function as a merge method; its signature is its schema.

    Parameters annotated `Tensor` are models, `float` numbers, and one named `rng` asks for
    random numbers. `bounds` gives the allowed range of a number; without it any finite number.
    `minimum` is how many models a variadic method needs. `scratch` is how many temporaries, each
    the size of the tensor in the arithmetic's precision, a whole-tensor method makes (for the
    predicted peak memory). `doubles`: results often lie in the middle between two fp16 numbers, or
    so near that fp32 would round more than 0.1 % of them to the other one.
    `kinds` says of every model parameter what kind of file it takes, where they differ.
    """

    def register(function: F) -> F:
        name = function.__name__
        if name in _REGISTRY:
            raise ValueError(f"merge method {name!r} is registered twice")
        models, variadic, keyword_models, scalars, random = _signature(function, bounds or {})
        if access == "linear" and random:
            raise ValueError(f"{name}: a linear method draws no random numbers")
        if kinds and kinds.keys() != {*models, *keyword_models}:
            raise ValueError(f"{name}: every model needs a kind, or none")
        _REGISTRY[name] = Method(
            name=name,
            function=function,
            access=access,
            formula=formula,
            source=source,
            models=models,
            variadic=variadic,
            minimum=minimum,
            keyword_models=keyword_models,
            scalars=MappingProxyType(scalars),
            random=random,
            summary=(inspect.getdoc(function) or "").split("\n", maxsplit=1)[0],
            scratch=scratch,
            doubles=doubles,
            kinds=MappingProxyType(dict(kinds or {})),
        )
        return function

    return register


def _signature(
    function: Callable[..., Any], bounds: Mapping[str, tuple[float, float]]
) -> tuple[tuple[str, ...], str, tuple[str, ...], dict[str, Scalar], bool]:
    """(models, variadic, keyword models, scalars, whether it takes `rng`) of a method."""
    models: list[str] = []
    keyword_models: list[str] = []
    scalars: dict[str, Scalar] = {}
    variadic, random = "", False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "rng":
            random = True
        elif parameter.annotation == "float":
            low, high = bounds.get(parameter.name, (-float("inf"), float("inf")))
            default = None if parameter.default is parameter.empty else float(parameter.default)
            scalars[parameter.name] = Scalar(parameter.name, default, low, high)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            variadic = parameter.name
        elif parameter.kind is parameter.KEYWORD_ONLY:
            keyword_models.append(parameter.name)
        else:
            models.append(parameter.name)
    return tuple(models), variadic, tuple(keyword_models), scalars, random


@functools.cache
def load_methods() -> Mapping[str, Method]:
    """All merge methods by name, sorted; imports every module of this package once."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return MappingProxyType(dict(sorted(_REGISTRY.items())))
