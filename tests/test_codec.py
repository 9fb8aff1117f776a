"""Numbers and their stored bits, both ways, against torch: every pattern, or very many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ckptools.codec import Encoder, count_nonfinite, decode, has_nonfinite_f16

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def encoded(values: np.ndarray, dtype: str) -> tuple[np.ndarray, bool]:
    out = np.full(values.size * TORCH[dtype].itemsize, 0xEE, np.uint8)
    finite = Encoder().encode(values, dtype, out)
    return out, finite


def by_torch(values: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(values).to(TORCH[dtype])


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return np.frombuffer(plain.numpy().tobytes(), np.uint8)


def assert_as_torch(values: np.ndarray, dtype: str) -> None:
    out, finite = encoded(values, dtype)
    wanted = by_torch(values, dtype)
    number = ~torch.isnan(wanted).numpy()  # a NaN has many patterns, and is refused anyway

    wide = TORCH[dtype].itemsize
    bits = out.reshape(-1, wide)[number]
    assert np.array_equal(bits, bytes_of(wanted).reshape(-1, wide)[number])
    found = torch.from_numpy(out).view(TORCH[dtype]) if out.size else torch.empty(0)
    assert np.isnan(found.double().numpy()[~number]).all()
    assert finite == bool(torch.isfinite(wanted).all())


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_floats_of_all_sizes_are_rounded_as_torch_does(dtype: str) -> None:
    """Every 1,021st of all fp32 patterns: all exponents, both signs, most tails."""
    patterns = np.arange(0, 1 << 32, 1021, dtype=np.uint64).astype(np.uint32).view(np.float32)
    assert len(patterns) > 4_000_000
    magnitude = np.abs(patterns)

    for part in (patterns, patterns[magnitude < 60000], patterns[magnitude < 2**-13]):
        assert_as_torch(part, dtype)


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
        assert_as_torch(shifted[np.abs(shifted) < 60000], dtype)
        assert_as_torch(shifted, dtype)
    assert_as_torch(np.array([0.0, -0.0] * 9, np.float32), dtype)


@pytest.mark.parametrize("dtype", list(TORCH))
@given(values=arrays(np.float64, st.integers(0, 40), elements=st.floats(width=64)))
def test_doubles_are_rounded_as_torch_does(dtype: str, values: np.ndarray) -> None:
    """By way of fp32 to what is narrower than that."""
    assert_as_torch(values, dtype)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@given(values=arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
def test_floats_are_rounded_as_torch_does(dtype: str, values: np.ndarray) -> None:
    assert_as_torch(values, dtype)


def test_one_encoder_serves_all_lengths_and_dtypes() -> None:
    encoder = Encoder()
    for length in (5, 70_000, 3, 0):
        values = np.linspace(-3, 3, length, dtype=np.float32)
        for dtype, stored in TORCH.items():
            out = np.empty(length * stored.itemsize, np.uint8)
            assert encoder.encode(values, dtype, out)
            assert np.array_equal(out, bytes_of(by_torch(values, dtype)))


def test_a_factor_on_the_way_is_one_rounding() -> None:
    bits = np.arange(0x7C00, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float32)
    for factor in (0.3, -1.7, 1e-30, 30000.0):
        scale = np.float32(factor) * np.float32(2.0**112)
        found = decode(bits.view(np.uint8), "F16", np.empty(bits.size, np.float32), scale)
        assert np.array_equal(found, values * np.float32(factor))


def test_every_nan_and_inf_of_fp16_is_seen() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    for one in bits:
        data = np.array([one, 1], np.uint16).view(np.uint8)
        assert (
            has_nonfinite_f16(data)
            == (one & 0x7FFF >= 0x7C00)
            == bool(count_nonfinite(data, "F16"))
        )
    assert not has_nonfinite_f16(np.empty(0, np.uint8))
