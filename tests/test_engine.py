"""The engine: every element correctly rounded, the same bytes always, no NaN unseen, no lock-up."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import portable_kernels
from memory import (
    MemorySink,
    Merged,
    bytes_of,
    merge_one,
    merge_tensors,
    program_of,
    run_programs,
    spec_of,
    tasks_in_order,
)
from numpy.typing import NDArray
from oracle import FORMATS, compare, decoded, rounded, unit, weighted
from torch import Tensor

import ckptools.engine
import ckptools.evaluation
import ckptools.plain
from ckptools.codec import count_nonfinite
from ckptools.engine import Settings, cut_units, run
from ckptools.errors import NonFiniteError
from ckptools.methods import load_methods
from ckptools.native import KERNELS
from ckptools.program import Copy, PositionIds, Program, Read, Widen
from ckptools.tensors import DTYPES, TensorSpec

TORCH = {name: getattr(torch, row.torch_name) for name, row in DTYPES.items() if row.torch_name}
FLOATS = [name for name, row in DTYPES.items() if row.is_float]
STORED = ["F16", "BF16", "F32"]


def noise(shape: int | tuple[int, ...], seed: int, dtype: str = "F16", size: float = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (shape,) if isinstance(shape, int) else shape
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * size
    return values.to(TORCH[dtype])


def all_patterns(dtype: str) -> Tensor:
    """Every bit pattern of an 8-bit or 16-bit dtype."""
    width = DTYPES[dtype].bits
    kind = np.uint16 if width == 16 else np.uint8
    return torch.from_numpy(np.arange(1 << width, dtype=kind)).view(TORCH[dtype])


def finite_patterns(dtype: str) -> Tensor:
    patterns = all_patterns(dtype)
    return patterns[torch.isfinite(patterns.double())]


def values(tensor: Tensor, dtype: str) -> np.ndarray:
    return decoded(bytes_of(tensor), dtype)


# --- the oracle itself -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_the_oracle_reads_and_rounds_as_torch_does(dtype: str) -> None:
    """All patterns are read alike; numbers, halfway points and their neighbours round alike."""
    patterns = finite_patterns(dtype)
    exact = np.unique(values(patterns, dtype))
    halves = ((exact[1:] + exact[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(halves, np.float32(way)) for way in (-np.inf, np.inf)]

    np.testing.assert_array_equal(values(patterns, dtype), patterns.double().numpy())
    for probe in (exact, halves, *beside):
        cast = torch.from_numpy(np.asarray(probe, np.float32)).to(TORCH[dtype])
        np.testing.assert_array_equal(rounded(probe, dtype), cast.double().numpy())


def test_the_oracle_agrees_with_numpy_on_fp16_and_fp32() -> None:
    probe = np.random.default_rng(0).standard_normal(50_000) * np.exp2(
        np.random.default_rng(1).integers(-30, 15, 50_000)
    )

    np.testing.assert_array_equal(rounded(probe, "F16"), probe.astype(np.float16))
    np.testing.assert_array_equal(rounded(probe, "F32"), probe.astype(np.float32))


def test_the_oracle_sees_a_wrong_bit() -> None:
    exact, largest = weighted([(0.5, np.array([1.0, 2.0])), (0.5, np.array([1.0, 4.0]))])

    right = compare(np.array([1.0, 3.0]), exact, largest, "F16")
    wrong = compare(np.array([1.0, 3.0 + 2**-9]), exact, largest, "F16")

    assert (right.wrong, right.units, right.relative) == (0, 0.0, 0.0)
    assert (wrong.wrong, wrong.units) == (1, 1.0)
    assert wrong.relative == 2**-10 / 2


# --- exactness ---------------------------------------------------------------------------------

FORMULAS: dict[str, list[float]] = {
    "A * (1 - 0.3) + B * 0.3": [0.7, 0.3, 0.0],
    "A * 0.5 + B * 0.5": [0.5, 0.5, 0.0],
    "A + (B - C) * 0.7": [1.0, 0.7, -0.7],
    "A + (B - C)": [1.0, 1.0, -1.0],
    "A - (B - C) * 0.35": [1.0, -0.35, 0.35],
    "A * 0.2 + B * 0.3 + C * 0.5": [0.2, 0.3, 0.5],
    "A * 1.6 - B * 0.6": [1.6, -0.6, 0.0],
}
MIXED = [("F32", "F16", "BF16"), ("F16", "F32", "F32"), ("BF16", "F16", "F16")]
COMBINATIONS = [((kind,) * 3, out) for kind in STORED for out in STORED] + [
    (kinds, out) for kinds in MIXED for out in STORED
]


@pytest.mark.parametrize("text", FORMULAS)
@pytest.mark.parametrize(("kinds", "out"), COMBINATIONS, ids=str)
def test_results_are_correctly_rounded(kinds: tuple[str, ...], out: str, text: str) -> None:
    """Weights as they are: A, and what B and C became of something near it."""
    start = noise(20_000, 1, "F64", 0.05)
    tensors = [
        (start + noise(20_000, seed, "F64", 0.02)).to(TORCH[kind])
        for seed, kind in enumerate(kinds, 2)
    ]
    exact, largest = weighted(
        [
            (factor, values(t, k))
            for factor, t, k in zip(FORMULAS[text], tensors, kinds, strict=True)
        ]
    )

    found = merge_one(text, out, **dict(zip("ABC", tensors, strict=True)))
    result = compare(values(found, out), exact, largest, out)

    assert result.count == 20_000
    assert result.share >= 0.999
    assert result.units < 0.75
    assert result.relative <= 2**-22


NATURAL: dict[str, Callable[..., NDArray[np.float64]]] = {
    "A * (1 - 0.3) + B * 0.3": lambda a, b, c: a * (1 - 0.3) + b * 0.3,
    "weighted_sum(A, B, alpha=0.7)": lambda a, b, c: a * (1 - 0.7) + b * 0.7,
    "A + (B - C) * 0.7": lambda a, b, c: a + (b - c) * 0.7,
    "A * 0.2 + B * 0.3 + C * 0.5": lambda a, b, c: a * 0.2 + b * 0.3 + c * 0.5,
    "n_average(A, B, C)": lambda a, b, c: (a + b + c) / 3,
    "A + (B - A) * 0.1": lambda a, b, c: a + (b - a) * 0.1,
    "A + 0.3 * (B - A) + 0.2 * (C - A)": lambda a, b, c: a + 0.3 * (b - a) + 0.2 * (c - a),
    "A + ((B + C) * 0.5 - A) * 0.7": lambda a, b, c: a + ((b + c) * 0.5 - a) * 0.7,
    "(A * 0.6 + B * 0.4) * 0.7 + C * 0.3": lambda a, b, c: (a * 0.6 + b * 0.4) * 0.7 + c * 0.3,
}


@pytest.mark.parametrize("out", STORED)
@pytest.mark.parametrize("source", ["F16", "BF16"])
@pytest.mark.parametrize("text", NATURAL)
def test_linear_formulas_give_what_float64_gives(text: str, source: str, out: str) -> None:
    """Every bit: in fp32, 0.1 to 0.7 % of fp16 weights would fall on the other side of a tie."""
    models = {name: noise(100_000, seed, source, 0.05) for seed, name in enumerate("ABC")}
    exact = NATURAL[text](*(values(model, source) for model in models.values()))
    used = {name: model for name, model in models.items() if name in text}

    found = merge_one(text, out, **used)

    np.testing.assert_array_equal(values(found, out), rounded(exact, out))


Array: TypeAlias = NDArray[np.float64]


def _slerp(a: Array, b: Array, t: float) -> Array:
    sizes = np.linalg.norm(a), np.linalg.norm(b)
    angle = np.arccos(a @ b / (sizes[0] * sizes[1]))
    way = np.sin((1 - t) * angle) * a / sizes[0] + np.sin(t * angle) * b / sizes[1]
    return np.asarray((sizes[0] * (1 - t) + sizes[1] * t) * way / np.sin(angle))


def _train_difference(a: Array, b: Array, c: Array) -> Array:
    share = np.abs(b - a) / (np.abs(b - c) + np.abs(b - a))
    return np.asarray(a + np.sign(b - c) * np.abs(b - c) * share * 1.8)


def _ties(models: list[Array], base: Array, density: float, scale: float) -> Array:
    kept = []
    for model in models:
        delta = model - base
        threshold = np.sort(np.abs(delta))[-int(density * delta.size)]
        kept.append(np.where(np.abs(delta) >= threshold, delta, 0))
    sign = np.where(sum(kept) >= 0, 1, -1)
    agreeing = [np.where(np.sign(delta) == sign, delta, 0) for delta in kept]
    count = np.maximum(sum(delta != 0 for delta in agreeing), 1)
    return np.asarray(base + sum(agreeing) / count * scale)


def _dare(models: list[Array], base: Array, density: float, scale: float) -> Array:
    random = ckptools.evaluation.ElementRandom(Settings(threads=1).seed, "w", 0, base.shape)
    masks = [random.uniform(number).numpy() < density for number in range(len(models))]
    deltas = [mask * (m - base) / density for mask, m in zip(masks, models, strict=True)]
    return np.asarray(base + scale * sum(deltas))


def _model_stock(models: list[Array], base: Array) -> Array:
    a, b = (model - base for model in models)
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    ratio = 2 * cosine / (1 + cosine)
    return np.asarray(ratio * (models[0] + models[1]) / 2 + (1 - ratio) * base)


METHODS: dict[str, Callable[..., NDArray[np.float64]]] = {
    "slerp(A, B, t=0.3)": lambda a, b, c: _slerp(a, b, 0.3),
    "train_difference(A, B, C)": _train_difference,
    "ties(A, B, base=C, density=0.3, scale=0.7)": lambda a, b, c: _ties([a, b], c, 0.3, 0.7),
    "dare(A, B, base=C, density=0.3, scale=0.7)": lambda a, b, c: _dare([a, b], c, 0.3, 0.7),
    "model_stock(A, B, base=C)": lambda a, b, c: _model_stock([a, b], c),
}


@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize("text", METHODS)
def test_methods_round_as_float64_does(text: str, kind: str) -> None:
    """At least 99.9 % of the values: in fp32 decimals leave up to 0.5 % on the wrong side."""
    models = {name: noise(200_000, seed, kind, 0.05) for seed, name in enumerate("ABC")}
    exact = METHODS[text](*(values(model, kind) for model in models.values()))
    used = {name: model for name, model in models.items() if re.search(rf"\b{name}\b", text)}

    found = merge_one(text, kind, **used)

    assert (values(found, kind) == rounded(exact, kind)).mean() >= 0.999


@pytest.mark.parametrize("text", ["A * 1.6 - B * 0.6", "A + (B - C) * 0.7", "A * 0.5 + B * 0.5"])
@pytest.mark.parametrize(("kinds", "out"), COMBINATIONS, ids=str)
def test_where_terms_cancel_the_error_is_small_beside_them(
    kinds: tuple[str, ...], out: str, text: str
) -> None:
    big = noise(10_000, 1, "F64", 2.0)
    factors = FORMULAS[text]
    near = -big * factors[0] / factors[1]  # makes the first two terms cancel
    tiny = noise(10_000, 3, "F64", 1e-5)
    tensors = [
        tensor.to(TORCH[kind]) for tensor, kind in zip((big, near, tiny), kinds, strict=True)
    ]
    exact, largest = weighted(
        [(factor, values(t, k)) for factor, t, k in zip(factors, tensors, kinds, strict=True)]
    )

    found = merge_one(text, out, **dict(zip("ABC", tensors, strict=True)))
    result = compare(values(found, out), exact, largest, out)

    assert np.median(np.abs(exact) / largest) < 0.01  # they do cancel
    assert result.relative <= 2**-22


@pytest.mark.parametrize("out", STORED)
@pytest.mark.parametrize("source", STORED)
def test_a_chain_of_ten_models(source: str, out: str) -> None:
    names = "ABCDEFGHIJ"
    factors = [0.19, 0.02, 0.17, 0.04, 0.15, 0.06, 0.13, 0.08, 0.11, 0.05]
    models = {name: noise(20_000, seed, source) for seed, name in enumerate(names)}
    text = " + ".join(f"{name} * {factor}" for name, factor in zip(names, factors, strict=True))
    exact, largest = weighted(
        [(f, values(t, source)) for f, t in zip(factors, models.values(), strict=True)]
    )

    found = merge_one(text, out, **models)
    result = compare(values(found, out), exact, largest, out)

    assert result.share >= 0.999
    assert result.units < 0.75
    assert result.relative <= 2**-22


@pytest.mark.parametrize("out", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("source", ["F8_E4M3", "F8_E5M2", "F16"])
def test_fp8(source: str, out: str) -> None:
    a, b = noise(20_000, 1, source), noise(20_000, 2, source)
    exact, largest = weighted([(0.75, values(a, source)), (0.25, values(b, source))])

    found = merge_one("A * 0.75 + B * 0.25", out, A=a, B=b)

    assert compare(values(found, out), exact, largest, out).wrong == 0


@pytest.mark.parametrize("out", [*STORED, "F8_E4M3", "F8_E5M2"])
def test_a_cast_is_one_rounding(out: str) -> None:
    a = torch.cat([noise(20_000, 1, "F32", size) for size in (1e-9, 1e-4, 1.0, 90.0)])

    found = merge_one("A", out, A=a)

    np.testing.assert_array_equal(values(found, out), rounded(values(a, "F32"), out))


# --- bits that must not move -------------------------------------------------------------------


def odd_values(dtype: str) -> Tensor:
    """Zeros of both signs, denormals, the largest and the smallest, and plain noise."""
    form = FORMATS[dtype]
    smallest = 2.0 ** (form.lowest - form.mantissa)
    edge = [0.0, smallest, 3 * smallest, 2.0**form.lowest, 1.0, 1 / 3, 1e-4, form.largest / 4]
    both = torch.tensor([*edge, *(-value for value in edge)], dtype=torch.float64)
    return torch.cat([both.to(TORCH[dtype]), noise(2000, 11, dtype, 0.05)])


def shuffled(tensor: Tensor, seed: int) -> Tensor:
    return tensor[torch.randperm(len(tensor), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("text", ["weighted_sum(A, B, alpha={})", "A * (1 - {0}) + B * {0}"])
@pytest.mark.parametrize(("alpha", "model"), [(0, 0), (1, 1)])
def test_alpha_0_and_1_are_the_models_bits(dtype: str, text: str, alpha: int, model: int) -> None:
    pair = [odd_values(dtype), shuffled(odd_values(dtype), 1)]

    found = merge_one(text.format(alpha), A=pair[0], B=pair[1])

    assert bytes_of(found) == bytes_of(pair[model])


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("factor", [0.3, 0.7, 1, -1, -0.45, 2.5, 1e-6, 100])
@pytest.mark.parametrize(
    "text",
    ["A + (B - C) * {}", "A + {} * (B - C)", "(B - C) * {} + A", "A - (C - B) * {}",
     "add_difference(A, B, C, multiplier={})", "A + (B * {0} - C * {0})"],
)  # fmt: skip
def test_where_b_is_c_the_result_is_a_to_the_bit(dtype: str, factor: float, text: str) -> None:
    """Also where only half of their elements are equal, and whatever A holds there."""
    a = odd_values(dtype)
    b = shuffled(a, 3)
    half = len(a) // 2
    c = torch.cat([b[:half], shuffled(b, 4)[half:] * 0.5])

    same = merge_one(text.format(factor), A=a, B=b, C=b.clone())
    partly = merge_one(text.format(factor), A=a.clamp(-9, 9), B=b.clamp(-9, 9), C=c.clamp(-9, 9))

    assert bytes_of(same) == bytes_of(a)
    assert bytes_of(partly[:half]) == bytes_of(a.clamp(-9, 9)[:half])
    assert abs(factor) < 0.1 or not torch.equal(partly[half:], a.clamp(-9, 9)[half:])


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("factors", [(0.3, 0.9), (1, 1), (0.5, -0.5), (100, 1e-3)], ids=str)
def test_differences_that_are_nothing_leave_a_to_the_bit(
    dtype: str, factors: tuple[float, float]
) -> None:
    a, b, c = (shuffled(odd_values(dtype), seed) for seed in (1, 2, 3))
    text = f"A + (B - C) * {factors[0]} + (D - E) * {factors[1]}"

    found = merge_one(text, A=a, B=b, C=b.clone(), D=c, E=c.clone())

    assert bytes_of(found) == bytes_of(a)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("factors", [(0.3, 0.9), (0.5, 0.5), (1, 0.25)], ids=str)
def test_two_differences_from_one_base(dtype: str, factors: tuple[float, float]) -> None:
    """Task arithmetic, A + (B - C) * M + (D - C) * N: A's bits where B, C and D are equal."""
    a, b = (shuffled(odd_values(dtype), seed) for seed in (1, 2))
    text = f"A + (B - C) * {factors[0]} + (D - C) * {factors[1]}"

    found = merge_one(text, A=a, B=b, C=b.clone(), D=b.clone())

    assert bytes_of(found) == bytes_of(a)


finite = st.floats(allow_nan=False, allow_infinity=False, width=16)


@given(
    st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=40),
    st.floats(-2, 2, allow_nan=False),
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much],  # drawing fp16 values filters
)
def test_any_difference_of_any_values(rows: list[tuple[float, ...]], factor: float) -> None:
    """fp16 into fp32: within 2^-22 of the largest term, and A's bits where B is C."""
    a, b, c = (torch.tensor(column, dtype=torch.float16) for column in zip(*rows, strict=True))
    b = torch.where(torch.arange(len(b)) % 3 == 0, c, b)
    exact, largest = weighted(
        [(f, t.double().numpy()) for f, t in ((1, a), (factor, b), (-factor, c))]
    )

    found = merge_one(f"A + (B - C) * ({factor!r})", "F32", A=a, B=b, C=c)
    same = b.view(torch.int16) == c.view(torch.int16)

    assert compare(found.double().numpy(), exact, largest, "F32").relative <= 2**-22
    assert bytes_of(found[same]) == bytes_of(a.float()[same])


# --- the same bytes, always --------------------------------------------------------------------


def small_model(seed: int) -> dict[str, Tensor]:
    """Large and small tensors of several dtypes, an empty one, a scalar, and integers."""
    return {
        "large": noise((700, 1100), seed, "F16"),
        "wide": noise((300, 1001), seed, "F32"),
        "bf": noise((77, 513), seed, "BF16"),
        **{f"small.{n}": noise((n, 3), seed + n, "F16") for n in range(1, 60)},
        "scalar": noise((), seed, "F32"),
        "empty": noise((0,), seed, "F16"),
        "fp8": noise((33,), seed, "F8_E4M3"),
    }


DETERMINISTIC = [
    "A + (B - C) * 0.7",
    "slerp(A, B, t=0.3)",
    "ties(A, B, base=C, density=0.3)",
    "dare(A, B, base=C, density=0.4)",
    "train_difference(A, weighted_sum(B, C, alpha=0.2), C) * 0.5 + dare(B, base=A) * 0.5",
]


@pytest.mark.parametrize("text", DETERMINISTIC)
def test_the_same_bytes_for_any_threads_blocks_and_spans(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {name: small_model(seed) for seed, name in enumerate("ABC")}
    first = merge_tensors(text, models, settings=Settings(threads=1))

    assert first.outcome.sha256 == hashlib.sha256(first.data).hexdigest()
    for threads in (1, 2, 4):
        again = merge_tensors(text, models, settings=Settings(threads=threads))
        assert again.data == first.data
        assert again.outcome.sha256 == first.outcome.sha256
    for alone in (-1, 1 << 30):
        monkeypatch.setattr(ckptools.engine, "ALONE_BYTES", alone)
        for block, span in [
            (1 << 13, 1 << 16), (99_991, 1 << 20), (1 << 16, 300_001), (5003, 40_000)
        ]:  # fmt: skip
            monkeypatch.setattr(ckptools.evaluation, "BLOCK", block)
            monkeypatch.setattr(ckptools.engine, "SPAN_BYTES", span)
            monkeypatch.setattr(ckptools.engine, "UNIT_BYTES", 3 * span)
            assert merge_tensors(text, models, settings=Settings(threads=3)).data == first.data


def test_units_cover_the_output_once_in_order() -> None:
    specs = [TensorSpec(f"{n:03}", "F16", (n * 999,)) for n in range(60)]
    specs += [TensorSpec("big", "F32", (1_000_001,)), TensorSpec("none", "F32", (0, 4))]
    tasks = tasks_in_order({spec: Copy(Read(0, spec.name, spec)) for spec in specs})

    position = 0
    elements: dict[str, int] = {}
    for part in cut_units(tasks):
        assert part.start == position
        position += part.nbytes
        for piece in part.pieces:
            assert piece.begin == elements.get(piece.task.spec.name, 0)
            elements[piece.task.spec.name] = piece.end

    assert position == sum(spec.nbytes for spec in specs)
    assert elements == {spec.name: spec.numel for spec in specs}


def test_further_hashers_see_the_data_in_order() -> None:
    a = small_model(1)
    programs: dict[TensorSpec, Program] = {
        spec_of(n, t): Copy(Read(0, n, spec_of(n, t))) for n, t in a.items()
    }
    tasks = tasks_in_order(programs)
    sink, extra = MemorySink(sum(task.spec.nbytes for task in tasks)), hashlib.md5()
    seen: list[int] = []

    class Tensors:
        def read_into(self, name: str, view: memoryview, offset: int = 0) -> None:
            view[:] = bytes_of(a[name])[offset : offset + len(view)]

    run(
        tasks, sources=[Tensors()], labels=["A"], sink=sink, settings=Settings(threads=4),
        progress=seen.append, hashers=[extra],
    )  # fmt: skip

    assert extra.hexdigest() == hashlib.md5(sink.data).hexdigest()
    assert sum(seen) == len(sink.data)


# --- NaN and Inf -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [name for name in FLOATS if DTYPES[name].bits <= 16])
def test_nonfinite_values_are_counted_exactly(dtype: str) -> None:
    """Every pattern on its own, and all of them together in shuffled blocks."""
    patterns = all_patterns(dtype)
    bad = ~torch.isfinite(patterns.double())
    shuffled_patterns = shuffled(
        patterns.view(torch.int8 if len(patterns) < 999 else torch.int16), 1
    )
    many = shuffled_patterns.repeat(3)

    raw = np.frombuffer(bytes_of(patterns), np.uint8).reshape(len(patterns), -1)
    alone = [count_nonfinite(row.copy(), dtype) for row in raw[:: len(raw) // 256]]

    assert alone == bad[:: len(raw) // 256].int().tolist()
    assert 0 < int(bad.sum()) < len(patterns)
    assert count_nonfinite(np.frombuffer(bytes_of(many), np.uint8).copy(), dtype) == 3 * bad.sum()
    good = np.frombuffer(bytes_of(patterns[~bad]), np.uint8).copy()
    assert count_nonfinite(good, dtype) == 0
    assert count_nonfinite(good[:0], dtype) == 0


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_nonfinite_values_of_wide_floats_are_counted(dtype: str) -> None:
    kind = np.float32 if dtype == "F32" else np.float64
    info = np.finfo(kind)
    edge = np.array([np.inf, -np.inf, np.nan, -np.nan, info.max, -info.max, 0.0, info.tiny], kind)
    rng = np.random.default_rng(0)
    data = np.concatenate([edge, np.frombuffer(rng.bytes(400_000), kind)])

    wanted = int((~np.isfinite(data)).sum())

    assert wanted > 4
    assert count_nonfinite(data.view(np.uint8).copy(), dtype) == wanted


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "text",
    ["A * 0.5 + B * 0.5", "A + (B - C)", "ties(A, B, base=C)", "train_difference(A, B, C)",
     "slerp(A, B, t=0.5)", "model_stock(A, B, base=C)", "dare(A, B, base=C)"],
)  # fmt: skip
def test_an_unsound_input_is_named_with_its_count(dtype: str, bad: float, text: str) -> None:
    a, b, c = (noise((100, 9000), seed, dtype) for seed in (1, 2, 3))
    b[3, 4], b[99, 8999], b[50, 1] = bad, bad, bad
    models = {"A": {"some.weight": a}, "B": {"some.weight": b}, "C": {"some.weight": c}}

    with pytest.raises(NonFiniteError) as caught:
        merge_tensors(text, models)

    assert caught.value.where == "some.weight"
    assert caught.value.what == "B has 3 NaN or Inf of 900,000 values"
    assert "allow_nonfinite" in caught.value.fix


def test_an_unsound_copy_is_named_too() -> None:
    a = noise(1000, 1)
    a[7] = float("nan")
    spec = spec_of("w", a)

    with pytest.raises(NonFiniteError, match="A has 1 NaN or Inf of 1,000 values"):
        run_programs({spec: Copy(Read(0, "w", spec))}, {"A": {"w": a}})


def test_fp16_overflow_is_named_as_such() -> None:
    a, b = torch.full((100,), 60_000.0).half(), torch.zeros(100).half()
    b[:40] = 60_000

    with pytest.raises(NonFiniteError, match=r"40 values of the result are too large for F16") as e:
        merge_one("A + B", A=a, B=b)

    assert "65504" in e.value.what
    assert "fp32" in e.value.fix


NARROW = [name for name in FLOATS if DTYPES[name].bits <= 16]
WIDER = [
    (out, source)
    for out, source in itertools.product(NARROW, ["F16", "BF16", "F32", "F64"])
    if float(torch.tensor(DTYPES[out].finite_max, dtype=TORCH[source])) == DTYPES[out].finite_max
]


@pytest.mark.parametrize(
    "text", ["A", "A * 0.5 + B * 0.5", "slerp(A, B)", "train_difference(A, B, B)"]
)
@pytest.mark.parametrize(("out", "source"), WIDER)
def test_the_largest_value_is_no_overflow_and_more_is(out: str, source: str, text: str) -> None:
    """No dtype saturates: torch's own cast to float8_e4m3fn makes 448 of everything."""
    largest = DTYPES[out].finite_max
    a = torch.full((10,), largest, dtype=TORCH[source])

    assert merge_one(text, out, A=a, B=a).double().tolist() == [largest] * 10
    if bool(torch.isfinite(a * 1.1).all()):
        with pytest.raises(NonFiniteError, match="10 values of the result are too large"):
            merge_one(text, out, A=a * 1.1, B=a * 1.1)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("source", ["F8_E5M2", "F16", "F32", "F64"])
@pytest.mark.parametrize("out", FLOATS)
def test_a_cast_hides_no_nan_or_inf(out: str, source: str, bad: float) -> None:
    a = noise(1000, 1, source, 0.1)
    a[500] = bad

    with pytest.raises(NonFiniteError, match="A has 1 NaN or Inf of 1,000 values"):
        merge_one("A", out, A=a)


def test_values_that_round_to_the_largest_fp8_are_no_overflow() -> None:
    """464 lies in the middle of 448 and 480, and 448 is the even one."""
    a = torch.tensor([464.0, -464.0, 449.0])

    assert merge_one("A", "F8_E4M3", A=a).double().tolist() == [448.0, -448.0, 448.0]
    with pytest.raises(NonFiniteError, match="1 values of the result are too large"):
        merge_one("A", "F8_E4M3", A=torch.tensor([464.01, 464.0]))


def test_float64_values_beyond_fp32_are_finite_for_methods_too() -> None:
    a, b = torch.full((9,), 1e300, dtype=torch.float64), torch.ones(9, dtype=torch.float64)

    found = merge_one("train_difference(A, B, B)", A=a, B=b)

    assert found.tolist() == [1e300] * 9


@pytest.mark.parametrize("text", ["A * 0.5 + B * 0.5", "train_difference(A, B, B)", "A"])
def test_allow_nonfinite_lets_them_through_and_counts_them(text: str) -> None:
    a, b = noise((30, 40_000), 1), noise((30, 40_000), 2)
    a[0, 0], a[29, 39_999] = float("nan"), float("inf")
    models = {"A": {"w": a, "v": b}, "B": {"w": b, "v": b}}

    merged = merge_tensors(text, models, settings=Settings(threads=2, allow_nonfinite=True))

    assert merged.outcome.nonfinite == {"w": 2}
    assert int((~torch.isfinite(merged.tensors["w"])).sum()) == 2


def test_the_first_error_in_file_order_is_raised() -> None:
    """Whichever worker is faster: two runs of one recipe say the same."""
    model = {f"{n:02}": noise((600, 700), n) for n in range(12)}
    for name in ("03", "04", "07", "11"):
        model[name][5, 5] = float("nan")

    for _ in range(5):
        with pytest.raises(NonFiniteError) as caught:
            merge_tensors("A * 0.5 + B * 0.5", {"A": model, "B": model}, settings=Settings(4))
        assert caught.value.where == "03"


# --- what is not merged ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [n for n, row in DTYPES.items() if not row.is_float])
@pytest.mark.parametrize("count", [0, 8, 1_200_000])
def test_other_dtypes_are_copied_byte_for_byte(dtype: str, count: int) -> None:
    spec = TensorSpec("w", dtype, (count // 8, 8))
    data = np.random.default_rng(0).bytes(spec.nbytes)
    source = type("Raw", (), {"read_into": lambda _, __, view, at=0: _fill(view, data, at)})()
    sink = MemorySink(spec.nbytes)

    run(
        tasks_in_order({spec: Copy(Read(0, "w", spec))}),
        sources=[source], labels=["A"], sink=sink, settings=Settings(threads=2),
    )  # fmt: skip

    assert bytes(sink.data) == data


def _fill(view: memoryview, data: bytes, offset: int) -> None:
    view[:] = data[offset : offset + len(view)]


@pytest.mark.parametrize("stored", ["I64", "F32", "F16"])
def test_position_ids_count_from_0(stored: str) -> None:
    ids = torch.arange(77.0).reshape(1, 77)
    drifted = ids.clone()
    drifted[0, 76] = 75.9975
    spec = TensorSpec("x.position_ids", "I64", (1, 77))
    wrong = drifted.to(TORCH[stored])
    program = PositionIds(Read(0, spec.name, spec_of(spec.name, wrong)))

    merged = run_programs({spec: program}, {"A": {spec.name: wrong}})

    assert torch.equal(merged.tensors[spec.name], torch.arange(77).reshape(1, 77))
    assert merged.outcome.repaired == [spec.name]


def test_sound_position_ids_are_not_called_repaired() -> None:
    ids = torch.arange(77).reshape(1, 77)
    spec = spec_of("x.position_ids", ids)

    merged = run_programs({spec: PositionIds(Read(0, spec.name, spec))}, {"A": {spec.name: ids}})

    assert torch.equal(merged.tensors[spec.name], ids)
    assert merged.outcome.repaired == []


@pytest.mark.parametrize("out", STORED)
@pytest.mark.parametrize("extra_dtype", ["F16", "F32"])
def test_extra_input_channels_come_unscaled_from_their_model(out: str, extra_dtype: str) -> None:
    """A + (I - C) * 0.3 over 4 channels; channels 5 to 9 are I's."""
    a, c = noise((32, 4, 3, 3), 1), noise((32, 4, 3, 3), 3)
    i = noise((32, 9, 3, 3), 2, extra_dtype)
    reads = [Read(number, "w", spec_of("w", tensor)) for number, tensor in enumerate((a, i, c))]
    spec = TensorSpec("w", out, (32, 9, 3, 3))
    common = program_of("A + (B - C) * 0.3", dict(zip("ABC", reads, strict=True)), spec, {})
    program = Widen(common, reads[1], 4)

    merged = run_programs({spec: program}, {"A": {"w": a}, "I": {"w": i}, "C": {"w": c}})
    found = merged.tensors["w"]
    plain = merge_one("A + (B - C) * 0.3", out, A=a, B=i[:, :4].contiguous(), C=c)

    assert found.shape == spec.shape
    assert torch.equal(found[:, 4:], i[:, 4:].to(TORCH[out]))
    assert torch.equal(found[:, :4], plain)
    exact, largest = weighted(
        [(f, t.double().numpy()) for f, t in ((1.0, a), (0.3, i[:, :4]), (-0.3, c))]
    )
    assert compare(found[:, :4].double().numpy(), exact, largest, out).share > 0.999


# --- whole tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize(("largest", "together"), [(99, 1), (141, 2), (500, 4)])
def test_whole_tensors_share_the_memory_of_the_largest(
    monkeypatch: pytest.MonkeyPatch, largest: int, together: int
) -> None:
    """Whatever the number of threads: as many of 99 x 99 as fit, and the largest alone."""
    finished = itertools.count()
    inside: list[int] = []
    most: dict[int, int] = {}
    changed = threading.Condition()
    original = ckptools.evaluation.Evaluation.fill_whole

    def watched(self, spec, program, out):
        size = spec.shape[0]
        with changed:
            inside.append(size)
            most[size] = max(most.get(size, 0), len(inside))
            changed.notify_all()
            # wait a moment for those that may come in as well
            changed.wait_for(lambda: len(inside) > together, timeout=0.02)
            most[size] = max(most.get(size, 0), len(inside))
        original(self, spec, program, out)
        next(finished)
        with changed:
            inside.remove(size)

    monkeypatch.setattr(ckptools.evaluation.Evaluation, "fill_whole", watched)
    monkeypatch.setattr(ckptools.engine, "UNIT_BYTES", 1)  # every tensor is one of its own
    sizes = {f"{n}": 99 for n in range(39)} | {"largest": largest}
    models = {
        name: {key: noise((size, size), number) for number, (key, size) in enumerate(sizes.items())}
        for name in "AB"
    }

    merge_tensors("slerp(A, B, t=0.5)", models, settings=Settings(threads=4))

    assert next(finished) == 40
    assert most[99] == together
    assert most[largest] == 1


def test_methods_that_need_whole_tensors_are_marked() -> None:
    assert {m.name for m in load_methods().values() if m.access == "tensor"} == {
        "slerp", "ties", "model_stock",
    }  # fmt: skip


# --- the ring cannot lock up -------------------------------------------------------------------


def ends_within(seconds: float, work: Callable[[], object]) -> object:
    """The work's result or exception; fails where it does not end."""
    pool = ThreadPoolExecutor(max_workers=1)
    job = pool.submit(work)
    pool.shutdown(wait=False)
    done, _ = wait([job], timeout=seconds)
    if not done:
        pytest.fail(f"still running after {seconds} s")
    pool.shutdown(wait=True)
    return job.result()


@pytest.fixture
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not [thread for thread in threading.enumerate() if thread not in before]


class Broken(Exception):  # noqa: N818  # it is raised by tests only
    pass


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit for every 64 KB, and workers for any amount: many rounds of the ring."""
    monkeypatch.setattr(ckptools.engine, "SPAN_BYTES", 1 << 16)
    monkeypatch.setattr(ckptools.engine, "UNIT_BYTES", 1 << 17)
    monkeypatch.setattr(ckptools.engine, "ALONE_BYTES", -1)


def two_models() -> dict[str, dict[str, Tensor]]:
    """3 MB each, 48 units of 64 KB."""
    return {name: {f"{n}": noise((256, 512), n) for n in range(12)} for name in "AB"}


HALF = "A * 0.5 + B * 0.5"


class FailingSink:
    def __init__(self, after: int, error: BaseException) -> None:
        self.calls = itertools.count()
        self.after, self.error = after, error

    def write(self, data: memoryview, offset: int) -> None:
        if next(self.calls) >= self.after:
            raise self.error


@pytest.mark.usefixtures("no_threads_left", "small_units")
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("after", [0, 5, 23])
def test_an_error_of_the_sink_ends_the_run(threads: int, after: int) -> None:
    sink = FailingSink(after, Broken("disk"))

    with pytest.raises(Broken, match="disk"):
        ends_within(30, lambda: merge_tensors(HALF, two_models(), sink=sink,
                                              settings=Settings(threads)))  # fmt: skip


@pytest.mark.usefixtures("no_threads_left", "small_units")
@pytest.mark.parametrize("error", [KeyboardInterrupt, Broken, SystemExit])
@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupt_in_the_progress_ends_the_run(error: type, after: int) -> None:
    calls = itertools.count()

    def progress(nbytes: int) -> None:
        if next(calls) == after:
            raise error

    with pytest.raises(error):
        ends_within(30, lambda: merge_tensors(HALF, two_models(), progress=progress))


@pytest.mark.usefixtures("no_threads_left", "small_units")
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("place", ["read_into", "cut_units", "fill"])
def test_an_error_anywhere_in_a_worker_ends_the_run(
    place: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise Broken(place)

    def broken_units(tasks: Sequence[object]) -> Iterator[object]:
        yield from itertools.islice(cut_units(tasks), 3)
        raise Broken(place)

    if place == "read_into":
        monkeypatch.setattr("memory.MemorySource.read_into", broken)
    elif place == "fill":
        monkeypatch.setattr(ckptools.engine.Engine, "fill", broken)
    else:
        monkeypatch.setattr(ckptools.engine, "cut_units", broken_units)

    with pytest.raises(Broken, match=place):
        ends_within(30, lambda: merge_tensors(HALF, two_models(), settings=Settings(threads)))


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_while_the_workers_start_is_an_interrupt(
    number: int, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is raised nothing is written any more, even where a worker was just starting."""
    calls, start = itertools.count(), threading.Thread.start
    started: list[threading.Thread] = []

    def interrupted(thread: threading.Thread) -> None:
        last = next(calls) == number
        if last and when == "before":
            raise KeyboardInterrupt
        start(thread)
        started.append(thread)
        if last:
            thread._started.clear()  # as where the interrupt comes while `start` waits for it
            raise KeyboardInterrupt

    sink = MemorySink(2 * 256 * 512 * 12)
    models = two_models()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge_tensors(HALF, models, sink=sink, settings=Settings(threads=4))
    written = bytes(sink.data)
    for thread in started:
        thread._started.set()
        thread.join()

    assert next(calls) == number + 1
    assert bytes(sink.data) == written


# --- without torch ------------------------------------------------------------------------------


needs_kernels = pytest.mark.skipif(KERNELS is None, reason="built without a C compiler")


def every_way(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Merged]) -> list[Merged]:
    """What comes out of the kernels, of the portable ones, and of torch."""
    merged = []
    for kernels in (KERNELS, portable_kernels(), None):
        monkeypatch.setattr(ckptools.plain, "KERNELS", kernels)
        merged.append(work())
    return merged


PLAIN = [
    "A", "A * 0.3", "A * 0.7 + B * 0.3", "A + (B - C) * 0.7", "A - B + C", "A * -1 + B * 2",
    "A + (B - C) * 0.25 + (B - A) * 0.5", "A * 1e-6 + B * 500 - C * 499",
    "A * 0.2 + B * 0.2 + C * 0.2 + D * 0.2 + E * 0.2",
]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("text", PLAIN)
@pytest.mark.parametrize("out", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("stored", ["F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "mixed"])
def test_without_torch_the_bytes_are_the_same(
    text: str, out: str, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From denormals to what is nearly too large, with zeros of both signs."""
    mixed = itertools.cycle(["F16", "F32", "BF16", "F64", "F8_E5M2"])
    sizes = torch.exp(torch.linspace(-19, 2, 40_003)).reshape(40_003, 1)
    models = {}
    for seed, name in enumerate("ABCDE"):
        values = noise((40_003, 5), seed, "F32") * sizes
        values[::7] = 0.0
        values[1::7] = -0.0
        models[name] = {"w": values.to(TORCH[next(mixed) if stored == "mixed" else stored])}

    kernels, portable, by_torch = every_way(
        monkeypatch, lambda: merge_tensors(text, models, dtype=out)
    )

    assert kernels.data == by_torch.data
    assert portable.data == by_torch.data
    assert len(set(by_torch.data)) > 20


@needs_kernels
def test_kernels_do_not_load_torch(tmp_path: Path) -> None:
    """Unless something else in the file needs it."""
    script = (
        "import sys, numpy as np\n"
        "from ckptools.engine import Settings, Task, run\n"
        "from ckptools.program import Compute, Copy, Mix, Read\n"
        "from ckptools.tensors import TensorSpec\n"
        "data = np.linspace(-1, 1, 5_000_000, dtype=np.float16).view(np.uint8)\n"
        "class Memory:\n"
        "    def read_into(self, name, view, offset=0):\n"
        "        view[:] = data[offset:offset + len(view)]\n"
        "    def write(self, view, offset): pass\n"
        "out, spec = sys.argv[1], TensorSpec('w', 'F16', (5_000_000,))\n"
        "program = Compute(Mix(((0.5, 0),)), (Read(0, 'w', spec),), 'F64')\n"
        "task = Task(TensorSpec('w', out, (5_000_000,)), program, 0)\n"
        "run([task], sources=[Memory()], labels=['A'], sink=Memory(), settings=Settings(2))\n"
        "print('torch' in sys.modules)\n"
    )

    said = [
        subprocess.run(
            [sys.executable, "-c", script, out], check=True, capture_output=True, text=True
        ).stdout
        for out in ("BF16", "F8_E5M2")
    ]

    assert said == ["False\n", "True\n"]


@needs_kernels
@pytest.mark.parametrize("stored", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_without_torch_the_same_one_is_to_blame(
    stored: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {name: {"w": noise((3000,), seed, stored)} for seed, name in enumerate("AB")}
    models["B"]["w"][2999] = value
    said = []

    def merge() -> None:
        with pytest.raises(NonFiniteError) as caught:
            merge_tensors("A * 0.5 + B * 0.5", models)
        said.append(str(caught.value))

    every_way(monkeypatch, merge)

    assert said == said[:1] * 3
    assert "B has 1 NaN or Inf of 3,000 values" in said[0]


@pytest.mark.parametrize("out", ["F16", "BF16"])
def test_a_result_that_is_too_large_is_counted(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"A": {"w": torch.tensor([1.0, -60000.0, 65519.0, 65521.0] * 999)}}
    text = "A * 1" if out == "F16" else "A * 1e34"
    count = r"999 values .* F16" if out == "F16" else "2,997 values"

    def merge() -> None:
        with pytest.raises(NonFiniteError, match=count):
            merge_tensors(text, models, dtype=out)

    every_way(monkeypatch, merge)


@needs_kernels
@pytest.mark.parametrize("out", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("stored", ["F16", "BF16", "F32", "F64", "F8_E5M2"])
def test_without_torch_nan_and_inf_stay_what_they_are(
    stored: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are allowed: the same numbers, counted the same."""
    values = noise((3001,), 1, stored)
    values[::3], values[1::300], values[2::300] = math.nan, math.inf, -math.inf
    models = {"A": {"w": values}, "B": {"w": noise((3001,), 2, stored)}}
    settings = Settings(2, allow_nonfinite=True)

    *kernels, by_torch = every_way(
        monkeypatch,
        lambda: merge_tensors("A * 0.3 + B * 0.7", models, dtype=out, settings=settings),
    )

    assert by_torch.outcome.nonfinite == {"w": 1001 + 10 + 10}
    for merged in kernels:
        assert merged.outcome.nonfinite == by_torch.outcome.nonfinite
        found, wanted = merged.tensors["w"].double(), by_torch.tensors["w"].double()
        np.testing.assert_array_equal(found.numpy(), wanted.numpy())  # NaN equals NaN here


def test_nothing_to_do_is_done_at_once() -> None:
    empty = TensorSpec("none", "F16", (0,))
    tasks = {empty: Copy(Read(0, "none", empty))}

    merged = run_programs(tasks, {"A": {"none": torch.empty(0).half()}})
    outcome = run([], sources=[], labels=[], sink=MemorySink(0), settings=Settings(threads=3))

    assert merged.data == b""
    assert outcome.sha256 == merged.outcome.sha256 == hashlib.sha256().hexdigest()


def test_torch_gets_its_threads_back() -> None:
    before = torch.get_num_threads()

    merge_one(HALF, A=noise(9, 1), B=noise(9, 2))

    assert torch.get_num_threads() == before


def test_torch_shares_no_block_among_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a linear merge is torch's, for want of kernels."""
    monkeypatch.setattr(ckptools.plain, "KERNELS", None)
    seen = set()
    fill = ckptools.evaluation.Evaluation.fill

    def watched(*given, **named):
        seen.add(torch.get_num_threads())
        fill(*given, **named)

    monkeypatch.setattr(ckptools.evaluation.Evaluation, "fill", watched)
    torch.set_num_threads(2)
    try:
        merge_one(HALF, A=noise(9, 1), B=noise(9, 2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)

    assert seen == {1}


def test_the_unit_of_the_oracle_is_the_distance_of_neighbours() -> None:
    numbers = values(finite_patterns("F16"), "F16")
    positive = np.sort(numbers[numbers > 0])

    np.testing.assert_array_equal(unit(positive[:-1], "F16"), np.diff(positive))
