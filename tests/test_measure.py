"""Streamed statistics against whole-tensor float64 arithmetic of torch."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from models import torch_dtype, write_tensors
from torch import Tensor

from ckptools import crew, measure
from ckptools.checkpoint import Checkpoint, open_safetensors
from ckptools.errors import InputError
from ckptools.measure import Gram, Pair, Row, Values, measure_gram, measure_pairs, measure_values
from ckptools.tensors import TensorSpec

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
LONG = measure.BLOCK + measure.SPAN_BYTES // 2 + 12_345  # several spans, a broken last block


def noise(size: int, seed: int, dtype: str = "F32") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator) * 0.05).to(torch_dtype(dtype))


def saved(folder: Path, **models: dict[str, Tensor]) -> list[Checkpoint]:
    return [
        open_safetensors(
            write_tensors(
                folder / f"{name}.safetensors",
                {key: tensor.clone() for key, tensor in tensors.items()},
            )
        )
        for name, tensors in models.items()
    ]


def pair_of(folder: Path, a: Tensor, b: Tensor) -> Pair:
    sources = saved(folder, A={"w": a}, B={"w": b})
    return measure_pairs(measure.rows_of(sources, ["w"]))["w"]


def expected(a: Tensor, b: Tensor) -> Pair:
    """The definition, in float64; a and b are finite."""
    x, y = a.double().reshape(-1), b.double().reshape(-1)
    delta = (x - y).abs()
    return Pair(
        count=x.numel(),
        changed=int((x != y).sum()),
        max_abs=float(delta.max()),
        sum_abs=float(delta.sum()),
        sum_squares=float((delta**2).sum()),
        a_squares=float((x**2).sum()),
        b_squares=float((y**2).sum()),
        same_bits=False,
    )


def close(one: Pair, two: Pair, relative: float = 2e-6) -> None:
    """Counts are exact; sums of 8,192 fp32 products are good to about 1e-6."""
    assert (one.count, one.changed, one.same_bits) == (two.count, two.changed, two.same_bits)
    for name in ("max_abs", "sum_abs", "sum_squares", "a_squares", "b_squares"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), rel=relative), name


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_stored_value_is_decoded_as_torch_decodes_it(dtype: str) -> None:
    width = measure._width(dtype)
    if width <= 2:
        raw = np.arange(256**width, dtype=f"<u{width}").view(np.uint8)
    else:
        raw = np.frombuffer(np.random.default_rng(1).bytes(8 * 4096), np.uint8)
    oracle = torch.frombuffer(raw.copy(), dtype=torch_dtype(dtype))

    wide = measure.decode(raw, dtype, np.empty(oracle.numel()))

    np.testing.assert_array_equal(wide, oracle.double().numpy())
    if measure.wide_kind([dtype]) == "f8":
        return
    narrow = measure.decode(raw, dtype, np.empty(oracle.numel(), np.float32))
    finite = oracle.double().isfinite().numpy()
    np.testing.assert_array_equal(narrow[finite], oracle.float().numpy()[finite])
    if dtype == "F16":
        assert (np.abs(narrow[~finite]) >= 65536).all()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64", "F8_E4M3"])
def test_pairs_equal_the_definition(dtype: str, tmp_path: Path) -> None:
    a, b = noise(LONG, 1, dtype), noise(LONG, 2, dtype)

    close(pair_of(tmp_path, a, b), expected(a, b))


@pytest.mark.parametrize(("one", "two"), [("F16", "F32"), ("BF16", "F16"), ("F16", "F64")])
def test_dtypes_are_compared_as_numbers(one: str, two: str, tmp_path: Path) -> None:
    a = noise(5000, 1, one)
    b = a.to(torch_dtype(two))
    b[7] += 0.5

    pair = pair_of(tmp_path, a, b)

    close(pair, expected(a, b))
    assert pair.changed_share < 0.95


def test_properties_are_the_usual_formulas(tmp_path: Path) -> None:
    a, b = noise(3000, 1), noise(3000, 2)

    pair = pair_of(tmp_path, a, b)

    x, y = a.double(), b.double()
    assert pair.cosine == pytest.approx(float(torch.cosine_similarity(x, y, dim=0)), abs=1e-6)
    assert pair.rel_l2 == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-6)
    assert pair.distance == pytest.approx(float((x - y).norm()), rel=1e-6)
    assert pair.mean_abs == pytest.approx(float((x - y).abs().mean()), rel=1e-6)


def test_extreme_pairs_have_plain_answers(tmp_path: Path) -> None:
    zeros, ones = torch.zeros(10), torch.ones(10)

    assert pair_of(tmp_path, zeros, ones).rel_l2 == math.inf
    assert math.isnan(pair_of(tmp_path, zeros, ones).cosine)
    assert pair_of(tmp_path, ones, ones) == Pair(count=10)
    assert pair_of(tmp_path, ones, ones).cosine == 1.0
    assert (Pair().mean_abs, Pair().changed_share, Pair().rel_l2) == (0, 0, 0)


def test_signed_zeros_and_equal_nans_are_no_change(tmp_path: Path) -> None:
    a = torch.tensor([0.0, 1.0, math.nan, math.inf, 2.0], dtype=torch.float16)
    b = torch.tensor([-0.0, 1.0, math.nan, math.inf, 2.5], dtype=torch.float16)

    pair = pair_of(tmp_path, a, b)

    assert (pair.changed, pair.nonfinite, pair.max_abs, pair.sum_abs) == (1, 2, 0.5, 0.5)
    assert (pair.a_squares, pair.b_squares) == (5.0, 7.25)
    assert not pair.same_bits


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_squares_that_fp32_cannot_hold_are_measured_in_fp64(
    dtype: str, scale: float, tmp_path: Path
) -> None:
    a, b = ((noise(999, seed) * scale).to(torch_dtype(dtype)) for seed in (1, 2))

    close(pair_of(tmp_path, a, b), expected(a, b))


def test_large_fp16_values_are_finite(tmp_path: Path) -> None:
    a = torch.full((9000,), 65504.0, dtype=torch.float16)

    pair = pair_of(tmp_path, a, a / 2)

    close(pair, expected(a, a / 2))
    assert pair.nonfinite == 0


def test_norms_cover_the_spans_that_are_equal_too(tmp_path: Path) -> None:
    a = noise(LONG, 1, "F16")
    b = a.clone()
    b[-1] += 1
    sources = saved(tmp_path, A={"w": a, "v": a}, B={"w": b, "v": a})

    pairs = measure_pairs(measure.rows_of(sources, ["v", "w"]))

    close(pairs["w"], expected(a, b))
    assert pairs["v"].same_bits
    assert pairs["v"].a_squares == pytest.approx(float((a.double() ** 2).sum()), rel=2e-6)
    total = pairs["v"] + pairs["w"]
    assert (total.count, total.changed) == (2 * LONG, 1)


def test_nonfinite_values_in_equal_spans_are_left_out_of_norms(tmp_path: Path) -> None:
    a = noise(100, 1, "F16")
    a[3] = math.inf
    sources = saved(tmp_path, A={"v": a, "w": a}, B={"v": a, "w": -a})

    pair = measure_pairs(measure.rows_of(sources, ["v", "w"]))["v"]

    assert pair.nonfinite == 1
    assert pair.a_squares == pytest.approx(float((a[a.isfinite()].double() ** 2).sum()), rel=1e-6)


def test_input_channels_are_compared_in_their_common_part(tmp_path: Path) -> None:
    a = noise(8 * 4 * 9, 1).reshape(8, 4, 3, 3)
    b = torch.cat([a, noise(8 * 5 * 9, 2).reshape(8, 5, 3, 3)], dim=1)

    pair = pair_of(tmp_path, a, b)

    assert pair == Pair(count=a.numel())
    assert pair_of(tmp_path, a, b + 1).changed == a.numel()


def test_progress_counts_what_is_read_of_tensors_with_a_common_part(tmp_path: Path) -> None:
    a, b = torch.ones(8, 4, 3, 3), torch.ones(8, 9, 3, 3)
    rows = measure.rows_of(saved(tmp_path, A={"w": a}, B={"w": b}), ["w"])
    told: list[int] = []

    measure_pairs(rows, advance=told.append)

    assert told == [rows[0].nbytes]


def test_a_linear_layer_equals_a_convolution_of_one_by_one(tmp_path: Path) -> None:
    a = noise(64, 1).reshape(8, 8)

    assert pair_of(tmp_path, a, a.reshape(8, 8, 1, 1)).same_bits


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (("F32", (2, 3)), ("F32", (3, 2))),
        (("F32", (2,)), ("F32", (3,))),
        (("C64", (2,)), ("F32", (2,))),
        (("F32", (2, 3)), ("F32", (2, 3, 4))),
    ],
)
def test_what_cannot_be_compared_has_no_common_part(one: tuple, two: tuple) -> None:
    specs = [TensorSpec("w", *one), TensorSpec("w", *two)]

    class Fake:
        def __init__(self, spec: TensorSpec) -> None:
            self.spec = spec

        def __getitem__(self, name: str) -> TensorSpec:
            return self.spec

        def read_into(self, name: str, view: memoryview, offset: int = 0) -> None:
            raise AssertionError

    assert measure.common_shape(specs) is None
    with pytest.raises(ValueError, match="without a common part"):
        measure_pairs([Row("w", tuple((Fake(spec), "w") for spec in specs))])


def test_integers_and_complex_numbers_are_compared(tmp_path: Path) -> None:
    a = torch.arange(100)
    b = a.clone()
    b[5] = 2**40
    c = torch.ones(4, dtype=torch.complex64)

    assert pair_of(tmp_path, a, b).max_abs == 2.0**40 - 5
    assert pair_of(tmp_path, a.bool(), (a + 1).bool()).changed == 1
    assert pair_of(tmp_path, c, c).same_bits
    assert pair_of(tmp_path, c, 2 * c).changed > 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_long_integers_that_fp64_cannot_tell_apart_differ(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    a = torch.tensor([2**60, 2**53 + 1, 7], dtype=dtype)
    b = torch.tensor([2**60 + 1, 2**53, 7], dtype=dtype)

    found = pair_of(tmp_path, a, b)

    assert (found.changed, found.same_bits) == (2, False)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_models_of_very_different_sizes_have_the_right_angle(dtype: str, tmp_path: Path) -> None:
    a, b = noise(LONG, 1, dtype) * 1e-3, noise(LONG, 2, dtype) * 20

    found = pair_of(tmp_path, a, b)

    dot = float(a.double() @ b.double())
    size = float(a.double().norm() * b.double().norm())
    assert found.dot / size == pytest.approx(dot / size, abs=1e-9)


@pytest.mark.parametrize(
    ("mean", "std", "dtype"),
    [(1.0, 0.001, "F16"), (1000.0, 0.01, "F32"), (1.0, 0.02, "BF16"), (-0.1, 0.0, "F16")],
)
def test_the_spread_of_values_far_from_zero(
    mean: float, std: float, dtype: str, tmp_path: Path
) -> None:
    values = (mean + noise(LONG, 1, "F64") * (std / 0.05)).to(torch_dtype(dtype))
    (source,) = saved(tmp_path, A={"w": values})

    found = measure_values(measure.rows_of([source], ["w"]))["w"]

    wanted = float(values.double().std(correction=0))
    assert found.std == pytest.approx(wanted, rel=1e-4, abs=1e-12)


def test_squares_beyond_fp64_are_no_traceback(tmp_path: Path) -> None:
    values = torch.tensor([1e200, 2e200], dtype=torch.float64)
    (source,) = saved(tmp_path, A={"w": values})

    found = measure_values(measure.rows_of([source], ["w"]))["w"]

    assert found.norm == math.inf
    assert not math.isfinite(found.std)


@pytest.mark.parametrize("dtype", FLOATS)
def test_statistics_of_one_model(dtype: str, tmp_path: Path) -> None:
    w = noise(LONG // 4, 3, dtype).double()
    w[:5] = torch.tensor([math.nan, math.nan, -0.0, 0.0, 2.0])
    w[5] = measure._SMALLEST[dtype] / 2
    stored = w.to(torch_dtype(dtype))
    sources = saved(tmp_path, A={"w": stored})

    values = measure_values(measure.rows_of(sources, ["w"]))["w"]

    x = stored.double()
    good = x[x.isfinite()]
    small = (good.abs() < measure._SMALLEST[dtype]) & (good != 0)
    assert (values.count, values.nan, values.inf) == (x.numel(), 2, 0)
    assert values.zeros == int((good == 0).sum())
    assert values.denormals == int(small.sum()) > 0
    assert (values.min, values.max) == (float(good.min()), float(good.max()))
    assert values.norm == pytest.approx(float(good.norm()), rel=1e-6)
    assert values.mean == pytest.approx(float(good.mean()), abs=1e-8)
    assert values.std == pytest.approx(float(good.std(correction=0)), rel=1e-5)


def test_statistics_of_infinite_tiny_and_absent_values(tmp_path: Path) -> None:
    a = torch.tensor([math.inf, -math.inf, 3.0])
    tiny = torch.full((10,), 1e-30)
    sources = saved(tmp_path, A={"a": a, "tiny": tiny, "none": torch.empty(0)})

    values = measure_values(measure.rows_of(sources, ["a", "tiny", "none"]))

    assert (values["a"].inf, values["a"].finite, values["a"].max) == (2, 1, 3.0)
    assert values["tiny"].norm == pytest.approx(1e-30 * math.sqrt(10))
    assert values["none"] == Values()
    assert math.isnan(Values().mean)
    assert math.isnan(Values().std)
    total = values["a"] + values["tiny"]
    assert (total.count, total.min) == (13, pytest.approx(1e-30))


def test_a_gram_matrix_holds_every_product(tmp_path: Path) -> None:
    tensors = [noise(40_000, seed, dtype) for seed, dtype in enumerate(("F16", "F32", "BF16"))]
    tensors[1][17] = math.nan
    sources = saved(tmp_path, A={"w": tensors[0]}, B={"w": tensors[1]}, C={"w": tensors[2]})

    gram = measure_gram(measure.rows_of(sources, ["w"]))["w"]

    tensors[1][17] = 0
    stack = torch.stack([tensor.double() for tensor in tensors])
    stack[:, 17] = 0
    np.testing.assert_allclose(gram.matrix, (stack @ stack.T).numpy(), rtol=1e-12)
    assert (gram.count, gram.nonfinite) == (40_000, 1)
    apart = gram.combined([[1, -1, 0], [0, 1, -1]])
    rows = torch.stack([stack[0] - stack[1], stack[1] - stack[2]])
    np.testing.assert_allclose(apart, (rows @ rows.T).numpy(), rtol=1e-9)
    assert (gram + gram).count == 80_000
    assert measure_gram([]) == {}


def test_fp16_infinities_stay_out_of_a_gram_matrix(tmp_path: Path) -> None:
    a = torch.tensor([math.inf, 2.0], dtype=torch.float16)
    sources = saved(tmp_path, A={"w": a}, B={"w": a})

    gram = measure_gram(measure.rows_of(sources, ["w"]))["w"]

    assert isinstance(gram, Gram)
    assert gram.nonfinite == 1
    np.testing.assert_array_equal(gram.matrix, np.full((2, 2), 4.0))


def test_threads_change_nothing_and_progress_counts_bytes(tmp_path: Path) -> None:
    models = {
        name: {f"w{n}": noise(LONG // 3, seed + n, "F16") for n in range(4)}
        for seed, name in ((0, "A"), (9, "B"))
    }
    rows = measure.rows_of(saved(tmp_path, **models), models["A"])
    told: list[int] = []

    one = measure_pairs(rows, threads=1, advance=told.append)

    assert one == measure_pairs(rows, threads=3)
    assert sum(told) == sum(row.nbytes for row in rows)


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes for however little there is to measure; their numbers, one by one."""
    if not crew.CAN_FORK:
        pytest.skip("only Linux forks safely")
    numbers: list[int] = []
    fork = os.fork

    def counted() -> int:
        numbers.append(fork())
        return numbers[-1]

    monkeypatch.setattr(os, "fork", counted)
    monkeypatch.setattr(measure, "FORK_BYTES", 0)
    return numbers


def all_gone(numbers: list[int]) -> bool:
    return not any(Path(f"/proc/{number}").exists() for number in numbers)


def test_processes_change_nothing_and_progress_counts_bytes(
    tmp_path: Path, forks: list[int]
) -> None:
    """Tensors that are equal, that differ, that hold NaN, and tiny ones between them."""
    a = {f"w{n}": noise(LONG // (1 + 99 * (n % 2)), n, "F16") for n in range(8)}
    b = {name: w.clone() if name < "w4" else w.flip(0) for name, w in a.items()}
    b["w5"][3] = math.nan
    rows = measure.rows_of(saved(tmp_path, A=a, B=b), a)
    told: list[int] = []

    many = measure_pairs(rows, threads=3, advance=told.append)

    assert len(forks) >= 3  # more, where equal tensors were met before any that differs
    assert all_gone(forks)
    assert sum(told) == sum(row.nbytes for row in rows)
    assert many == measure_pairs(rows, threads=1)
    assert many["w5"].nonfinite == 1
    for name in ("w0", "w4", "w7"):
        assert many[name].changed == int((a[name] != b[name]).sum())
        assert many[name].a_squares == pytest.approx(float((a[name].double() ** 2).sum()), rel=2e-6)


def test_equal_models_are_equal_whoever_looks(tmp_path: Path, forks: list[int]) -> None:
    a = {f"w{n}": noise(LONG, n, "F16") for n in range(3)}
    rows = measure.rows_of(saved(tmp_path, A=a, B=a), a)

    pairs = measure_pairs(rows, threads=2)

    assert len(forks) == 2
    assert all(pair == Pair(count=LONG) for pair in pairs.values())


def test_statistics_and_products_are_the_same_from_processes(
    tmp_path: Path, forks: list[int]
) -> None:
    models = [{"w": noise(LONG, n, "F16"), "v": noise(77, n, "BF16")} for n in range(3)]
    rows = measure.rows_of(saved(tmp_path, A=models[0], B=models[1], C=models[2]), models[0])

    values, grams = measure_values(rows, threads=2), measure_gram(rows, threads=2)

    assert len(forks) == 4
    assert values == measure_values(rows, threads=1)
    for key, gram in measure_gram(rows, threads=1).items():
        np.testing.assert_array_equal(grams[key].matrix, gram.matrix)


@pytest.mark.parametrize("processes", [False, True])
def test_an_interruption_leaves_no_process(
    processes: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    numbers = request.getfixturevalue("forks") if processes else []
    a = {f"w{n}": noise(LONG, n, "F16") for n in range(4)}
    rows = measure.rows_of(saved(tmp_path, A=a, B=a), a)

    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_pairs(rows, threads=2, advance=interrupt)

    assert len(numbers) == 2 * processes
    assert all_gone(numbers)


@pytest.mark.parametrize("processes", [False, True])
def test_an_error_of_a_worker_reaches_the_caller(
    processes: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    numbers = request.getfixturevalue("forks") if processes else []
    sources = saved(tmp_path, A={"w": noise(LONG * 4, 1)}, B={"w": noise(LONG * 4, 2)})
    path = sources[1].path
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 100)

    with pytest.raises(InputError):
        measure_pairs(measure.rows_of(sources, ["w"]), threads=2)

    assert len(numbers) == 2 * processes
    assert all_gone(numbers)


def test_as_many_processes_as_cores_compare(
    tmp_path: Path, forks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = {f"w{n}": noise(LONG, n, "F16") for n in range(4)}
    rows = measure.rows_of(saved(tmp_path, A=a), a)

    for cores, expected_forks in ((1, 0), (3, 3)):
        monkeypatch.setattr(measure, "usable_cores", lambda cores=cores: cores)
        forks.clear()
        measure_values(rows)
        assert len(forks) == expected_forks
