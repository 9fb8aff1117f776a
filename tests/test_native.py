"""The kernels' roundings against torch: every pattern, or very many; and what loads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kernels import portable_kernels

import ckptools.native
from ckptools.evaluation import store
from ckptools.native import ADD, KERNELS, LIBRARY, LOAD, SCALE, SUBTRACT, Formula, Kernels, Step
from ckptools.tensors import DTYPES

pytestmark = pytest.mark.skipif(KERNELS is None, reason="built without a C compiler")

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


NAMES = {np.dtype("f4"): "F32", np.dtype("f8"): "F64"}


def mixed(
    kernels: Kernels,
    steps: Sequence[Step],
    inputs: Sequence[np.ndarray],
    dtypes: Sequence[str],
    dtype: str,
) -> tuple[np.ndarray, bool]:
    """The bytes that come out, and whether all are finite."""
    formula = Formula(steps, dtypes)
    count = inputs[0].nbytes * 8 // DTYPES[dtypes[0]].bits
    out = np.full(count * DTYPES[dtype].bits // 8 + 8, 0xEE, np.uint8)
    data = [values.view(np.uint8) for values in inputs]
    finite = kernels.mix(formula, data, dtype, out[:-8], kernels.memory(formula.depth))
    assert (out[-8:] == 0xEE).all()
    return out[:-8], finite


def every_kernels() -> list[Kernels]:
    found = [KERNELS, portable_kernels()]
    return [kernels for kernels in found if kernels is not None]


def encoded(kernels: Kernels, values: np.ndarray, dtype: str) -> tuple[np.ndarray, bool]:
    stored = NAMES[values.dtype]
    return mixed(kernels, [Step(LOAD, 0, 0)], [values], [stored], dtype)


def rounded(values: np.ndarray, dtype: str) -> torch.Tensor:
    """As torch does it; but fp64 to 16 bits, where torch rounds twice, in exact arithmetic."""
    if values.dtype != np.float64 or dtype not in BITS:
        return torch.from_numpy(values).to(TORCH[dtype])
    exact = torch.tensor([nearest(float(value), *BITS[dtype]) for value in values])
    return exact.to(TORCH[dtype])


BITS = {"F16": (11, -24), "BF16": (8, -133)}  # of a significand; exponent of the smallest number


def nearest(value: float, digits: int, lowest: int) -> float:
    """The number of so many binary digits that is nearest to a value, ties to even."""
    if not math.isfinite(value) or value == 0:
        return value
    quantum = Fraction(2) ** max(math.frexp(value)[1] - digits, lowest)
    number = round(Fraction(value) / quantum) * quantum
    return math.copysign(float(number) if abs(number) < 2**128 else math.inf, value)


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return np.frombuffer(plain.numpy().tobytes(), np.uint8)


def assert_rounded(values: np.ndarray, dtype: str) -> None:
    wanted = rounded(values, dtype)
    compared = slice(None)
    if dtype in BITS:  # all NaN are one
        wanted[wanted.isnan()] = math.nan
    else:
        compared = ~torch.isnan(wanted).numpy()
    wide = TORCH[dtype].itemsize
    for kernels in every_kernels():
        out, finite = encoded(kernels, values, dtype)

        bits = out.reshape(-1, wide)
        assert np.array_equal(bits[compared], bytes_of(wanted).reshape(-1, wide)[compared])
        found = torch.from_numpy(out).view(TORCH[dtype]) if out.size else torch.empty(0)
        assert np.array_equal(np.isnan(found.double().numpy()), torch.isnan(wanted).numpy())
        assert finite == bool(torch.isfinite(wanted).all())


@pytest.mark.parametrize("source", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_nan_is_the_same_in_any_place_by_kernels_and_by_torch(
    dtype: str, source: str
) -> None:
    patterns = {"F16": [0x7C01, 0x7E01, 0xFE00, 0xFFFF], "BF16": [0x7F81, 0x7FC1, 0xFFC0, 0xFFFF]}
    patterns["F32"] = [0x7F800001, 0x7FC00001, 0xFFC00000, 0xFFFFFFFF]
    words = np.uint32 if source == "F32" else np.uint16
    values = np.tile(np.array([*patterns[source], 0], words), 5)  # 25: whole eights and a rest
    stored = torch.empty(25, dtype=TORCH[dtype])
    store(torch.from_numpy(values).view(TORCH[source]).double() * 0.3, stored)

    assert set(stored.view(torch.int16).tolist()) == {0, 0x7E00 if dtype == "F16" else 0x7FC0}
    for kernels in every_kernels():
        steps = [Step(LOAD, 0, 0), Step(SCALE, 0, factor=0.3)]
        out, finite = mixed(kernels, steps, [values], [source], dtype)

        assert not finite
        assert np.array_equal(out, bytes_of(stored))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_floats_of_all_sizes_are_rounded_as_torch_does(dtype: str) -> None:
    """Every 1,021st of all fp32 patterns: all exponents, both signs, most tails."""
    patterns = np.arange(0, 1 << 32, 1021, dtype=np.uint64).astype(np.uint32).view(np.float32)
    assert len(patterns) > 4_000_000
    magnitude = np.abs(patterns)

    for part in (patterns, patterns[magnitude < 60000], patterns[magnitude < 2**-13]):
        assert_rounded(part, dtype)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_value_and_every_middle_between_two(dtype: str) -> None:
    """Ties go to even, and the neighbours of a tie to their side."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = torch.from_numpy(bits).view(TORCH[dtype]).double().numpy()
    values = np.unique(values[np.isfinite(values)])
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    assert len(middles) > 60_000

    for step in (-np.inf, 0, np.inf):
        shifted = np.nextafter(middles, np.float32(step)) if step else middles
        assert_rounded(shifted[np.abs(shifted) < 60000], dtype)
        assert_rounded(shifted, dtype)
    assert_rounded(np.array([0.0, -0.0] * 9, np.float32), dtype)


@pytest.mark.parametrize("dtype", list(TORCH))
@given(values=arrays(np.float64, st.integers(0, 40), elements=st.floats(width=64)))
def test_doubles_are_rounded_once(dtype: str, values: np.ndarray) -> None:
    assert_rounded(values, dtype)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_doubles_near_a_middle_go_to_their_side(dtype: str) -> None:
    """Closer to it than fp32 tells: by way of fp32 they would be ties."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = torch.from_numpy(bits).view(TORCH[dtype]).double().numpy()
    values = np.unique(values[np.isfinite(values)])
    middles = (values[1:] + values[:-1]) / 2
    wanted = {-np.inf: values[:-1], np.inf: values[1:]}

    for side, ends in wanted.items():
        near = np.nextafter(middles, side)
        for kernels in every_kernels():
            out, _ = encoded(kernels, near, dtype)
            assert np.array_equal(torch.from_numpy(out).view(TORCH[dtype]).double().numpy(), ends)
        stored = torch.empty(len(near), dtype=TORCH[dtype])
        store(torch.from_numpy(near), stored)
        assert np.array_equal(stored.double().numpy(), ends)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@given(values=arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
def test_floats_are_rounded_as_torch_does(dtype: str, values: np.ndarray) -> None:
    assert_rounded(values, dtype)


@pytest.mark.parametrize("stored", ["F16", "BF16"])
@pytest.mark.parametrize(("dtype", "kind"), [("F32", np.float32), ("F64", np.float64)])
def test_every_pattern_is_read_as_torch_reads_it(stored: str, dtype: str, kind: type) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wanted = torch.from_numpy(bits).view(TORCH[stored]).to(TORCH[dtype]).numpy()

    for kernels in every_kernels():
        out, finite = mixed(kernels, [Step(LOAD, 0, 0)], [bits], [stored], dtype)

        np.testing.assert_array_equal(out.view(kind), wanted)  # NaN equals NaN here
        assert np.array_equal(np.signbit(out.view(kind)), np.signbit(wanted))
        assert not finite


@pytest.mark.parametrize("length", [0, 1, 3, 4, 7, 8, 9, 1023, 1024, 1025, 10_001])
@pytest.mark.parametrize("dtype", list(TORCH))
def test_any_length_in_any_place(length: int, dtype: str) -> None:
    """Blocks, vectors and what is left over; reads of four widths, none of them aligned."""
    rng = np.random.default_rng(length)
    values = [rng.standard_normal(length) for _ in TORCH]
    tensors = [torch.from_numpy(v).to(kind) for v, kind in zip(values, TORCH.values(), strict=True)]
    placed = []
    for tensor in tensors:
        data = bytes_of(tensor)
        room = np.empty(data.size + 1, np.uint8)
        room[1:] = data
        placed.append(room[1:])
    steps = [
        Step(LOAD, 0, 0), Step(SCALE, 0, factor=0.3), Step(LOAD, 1, 1), Step(LOAD, 2, 2),
        Step(SUBTRACT, 1), Step(SCALE, 1, factor=-1.7), Step(ADD, 0), Step(LOAD, 1, 3),
        Step(ADD, 0),
    ]  # fmt: skip
    a, b, c, d = (tensor.double() for tensor in tensors)
    total = a * 0.3 + (b - c) * -1.7 + d
    wanted = torch.empty(len(total), dtype=TORCH[dtype])
    store(total, wanted)

    for kernels in every_kernels():
        out, finite = mixed(kernels, steps, placed, list(TORCH), dtype)

        assert np.array_equal(out, bytes_of(wanted))
        assert finite


def test_a_library_of_another_version_is_not_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("not a library", ""):
        (tmp_path / LIBRARY).write_text(text)
        monkeypatch.setattr(ckptools.native, "__file__", str(tmp_path / "native.py"))
        assert ckptools.native._load() is None
    (tmp_path / LIBRARY).unlink()
    assert ckptools.native._load() is None

    monkeypatch.undo()
    assert ckptools.native._load() is not None
    monkeypatch.setattr(ckptools.native, "_VERSION", 0)
    assert ckptools.native._load() is None


# --- products of two factors -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "rank", "columns", "begin", "count"),
    [
        (1, 1, 1, 0, 1), (5, 3, 7, 0, 35), (5, 3, 7, 4, 20), (5, 3, 7, 15, 3), (9, 2, 64, 63, 300),
        (4, 16, 65, 1, 258), (3, 40, 200, 199, 202), (7, 8, 33, 33, 165), (2, 0, 5, 1, 8),
        (6, 4, 130, 0, 0), (11, 130, 96, 96, 96 * 10),
    ],
)  # fmt: skip
def test_products_have_the_same_bits_on_every_processor(
    rows: int, rank: int, columns: int, begin: int, count: int
) -> None:
    generator = np.random.default_rng(rank + columns)
    up = generator.standard_normal((rows, rank)).astype(np.float32)
    down = (generator.standard_normal((rank, columns)) * 10.0 ** -(rank % 5)).astype(np.float32)
    there = generator.standard_normal(count).astype(np.float32)
    wanted = (up.astype(np.float64) @ down.astype(np.float64)).reshape(-1)[begin : begin + count]
    noise = np.abs(up).astype(np.float64) @ np.abs(down) * max(rank, 1) * 2.0**-24
    found = []
    for kernels in every_kernels():
        for onto in (False, True):
            out = np.concatenate([there, np.full(8, 7, np.float32)])
            memory = kernels.low_rank_memory(rank)
            kernels.add_low_rank(up, down, begin, out[:count], memory, onto=onto)

            assert np.all(out[count:] == 7)
            found.append(out[:count])

    alone, added, *again = found
    assert np.all(np.abs(alone - wanted) <= noise.reshape(-1)[begin : begin + count])
    assert np.array_equal(added, there + alone)
    for one, other in zip(again, found[:2], strict=False):
        assert np.array_equal(one.view(np.uint32), other.view(np.uint32))


def test_products_of_factors_that_do_not_fit_are_refused() -> None:
    assert KERNELS is not None
    up, down = np.zeros((3, 2), np.float32), np.zeros((2, 5), np.float32)
    out, memory = np.zeros(4, np.float32), KERNELS.low_rank_memory(2)

    for factors, begin in (((up, down), 12), ((up, down[:1]), 0)):
        with pytest.raises(ValueError, match="elements of"):
            KERNELS.add_low_rank(*factors, begin, out, memory, onto=False)


def test_sums_run_in_order_of_the_rank() -> None:
    """2^24 + 1 - 2^24 is 0 in fp32, from the left; from the right it is 1."""
    up = np.array([[2.0**24, 1, -(2.0**24)], [-(2.0**24), 2.0**24, 1]], np.float32)
    for kernels in every_kernels():
        out = np.empty(2 * 70, np.float32)
        down = np.ones((3, 70), np.float32)
        kernels.add_low_rank(up, down, 0, out, kernels.low_rank_memory(3), onto=False)

        assert np.array_equal(out, np.repeat([0, 1], 70))


def test_each_step_of_a_sum_is_rounded_once() -> None:
    """(1 + 2^-12)^2 - 1 is 2^-11 + 2^-24; of the product alone fp32 keeps 1 + 2^-11."""
    up = np.array([[-1, 1 + 2.0**-12]], np.float32)
    down = np.array([[1] * 3, [1 + 2.0**-12] * 3], np.float32)
    for kernels in every_kernels():
        out = np.empty(3, np.float32)
        kernels.add_low_rank(up, down, 0, out, kernels.low_rank_memory(2), onto=False)

        assert np.all(out == 2.0**-11 + 2.0**-24)
