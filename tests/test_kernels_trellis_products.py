"""Rows of matrices in trellis codes and products with them, against the NumPy twins."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from packed_matrix import PackedMatrix

from pocketllm import kernels, reference
from pocketllm.kernels import TrellisView

pytestmark = pytest.mark.kernels

# Each of n roundings of a float32 sum is below 2^-24 of the sum of magnitudes, and they add up like
# a random walk.
TOLERANCE = 1e-6
# (rows, columns, bits of all blocks or of each, rows in four with a bit more)
CASES: list[tuple[int, int, int | list[int], int]] = [
    (1, 1, 1, 0),
    (7, 17, 2, 0),
    (15, 130, 3, 1),
    (16, 127, 3, 3),
    (40, 256, 4, 0),
    (33, 600, 5, 2),
    (20, 513, 6, 0),
    (257, 70, 2, 2),
    (263, 8, 1, 1),
    (530, 9, 3, 0),
    (50, 1100, [6, 5, 4, 4, 3, 2, 1, 0, 0], 0),
    (18, 1024, [3, 3, 3, 3, 3, 1, 1, 0], 0),
    (12, 300, [4, 1, 1], 0),
    (9, 200, [0, 0], 0),
]


class Matrix(PackedMatrix):
    """A random matrix in trellis codes."""

    codec: TrellisView

    def __init__(self, case: tuple[int, int, int | list[int], int], seed: int = 0) -> None:
        rng = np.random.default_rng([seed, case[0], case[1]])
        self.out_features, self.in_features, bits, extra = case
        blocks = -(-self.in_features // 128)
        own = not isinstance(bits, int)
        block_bits = np.array(bits if own else [bits] * blocks, np.uint8)
        # 4, 8, 16, ... magnitudes; some are alike and some zero
        most = [64, 64, 128, 128, 128, 128]
        magnitude = [np.sort(rng.integers(0, most[k - 1], 2 << k)) for k in range(1, 7)]
        self.codec = TrellisView(
            block_bits,
            extra,
            np.concatenate(magnitude).astype(np.int8),
            rng.permutation(self.in_features).astype(np.int32) if own else None,
            rng.uniform(0.25, 1, self.in_features).astype(np.float32) if own else None,
        )
        each = np.repeat(block_bits.astype(int), 128)[: self.in_features]
        rows = []
        for row in range(self.out_features):
            more = (row + 1) * extra // 4 - row * extra // 4
            for plane in range(6):
                count = int((np.where(each > 0, each + more, 0) > plane).sum())
                rows.append(np.packbits(rng.integers(0, 2, count), bitorder="little"))
        self.packed = np.concatenate(rows).astype(np.uint8)
        self.scale = rng.random(self.out_features, dtype=np.float32) + np.float32(0.5)
        odd = self.out_features % 2 == 1
        self.shift = rng.standard_normal(self.out_features).astype(np.float32) if odd else None
        self.bias = rng.standard_normal(self.out_features).astype(np.float32)

    def tokens(self, n: int) -> Any:
        """Random activations (n, in_features) of very different magnitudes."""
        x = np.random.default_rng(n).standard_normal((n, self.in_features))
        return (x * np.logspace(0, 2, self.in_features)).astype(np.float32)

    def rounded(self, x: Any) -> Any:
        """Activations as the kernels round them, in float64: whole numbers up to 127 times one of
        up to 257 for each 32 stored columns, times a step for each span of up to 512 of the same
        bits."""
        order = np.arange(self.in_features) if self.codec.order is None else self.codec.order
        factor = np.ones(self.in_features, np.float32)
        factor = factor if self.codec.factor is None else self.codec.factor
        stored, result = x[:, order] * factor, np.zeros(x.shape)
        bits = np.repeat(self.codec.block_bits, 128)[: self.in_features]
        for t, (first, last) in itertools.product(range(len(x)), spans(bits)):
            columns = stored[t, first:last]
            inverse = np.float32(127 * 257) / np.abs(columns).max()
            for at in range(0, last - first, 32):
                block = columns[at : at + 32]
                multiplier = np.ceil(np.abs(block).max() * inverse / np.float32(127))
                multiplier = np.clip(multiplier, np.float32(1), np.float32(257))
                integer = np.rint(block * (inverse / multiplier)).astype(np.float64) * multiplier
                assert np.abs(integer).max() <= 127 * 257
                result[t, order[first + at : last][: len(block)]] = (
                    integer / inverse / factor[first + at : last][: len(block)]
                )
        return result


def spans(bits: Any) -> list[tuple[int, int]]:
    """First and last of up to 512 stored columns with the same bits, of those that have any."""
    found = []
    for value, group in itertools.groupby(range(len(bits)), key=lambda i: bits[i]):
        at = list(group)
        if value:
            found += [(i, min(i + 512, at[-1] + 1)) for i in range(at[0], at[-1] + 1, 512)]
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_the_formula_in_float32(isa: str, case: Any) -> None:
    matrix = Matrix(case)
    rows, columns = matrix.out_features, matrix.in_features
    values = reference.inference.trellis_values(matrix.packed, rows, columns, matrix.codec)
    want = values.astype(np.float32) * matrix.scale[:, None]
    if matrix.shift is not None:
        want = want + matrix.shift[:, None]
    got = matrix.rows(0, rows)
    np.testing.assert_array_equal(got, want)
    half = rows // 2
    np.testing.assert_array_equal(matrix.rows(half, rows - half), want[half:])
    index = np.array([rows - 1, 0, half, half], np.int64)
    listed = kernels.decode_row_list(
        matrix.packed, columns, index, matrix.codec, matrix.scale, matrix.shift
    )
    np.testing.assert_array_equal(listed, want[index])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_those_of_the_twin(isa: str, case: Any) -> None:
    matrix = Matrix(case)
    weight = matrix.twin()
    shift: Any = np.zeros(len(weight)) if matrix.shift is None else matrix.shift
    for n in (0, 1, 2, 3, 4, 7, 16, 33, 130):
        x = matrix.tokens(n)
        size = np.abs(weight) + 2 * np.abs(shift)[:, None]
        bound = np.abs(x) @ size.T + np.abs(matrix.bias)
        exact = x @ weight.T + matrix.bias
        got = matrix.product(x, "float32")
        assert got.shape == exact.shape
        assert np.all(np.abs(got - exact) <= TOLERANCE * bound), n
        integers = matrix.rounded(x) @ (weight - shift[:, None]).T
        want = integers + x.sum(1, dtype=np.float64, keepdims=True) * shift + matrix.bias
        error = np.abs(matrix.product(x, "integer") - want)
        assert np.all(error <= 4 * TOLERANCE * bound), n


def test_same_bits_for_every_thread_count_and_instruction_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = kernels.isa()
    for case in CASES:
        matrix = Matrix(case)
        for n, form in itertools.product((1, 3, 40), ("float32", "integer")):
            results = set()
            for name, threads in itertools.product(kernels.available_isas(), (1, 3)):
                kernels.set_isa(name)
                monkeypatch.setattr(kernels, "_threads", lambda count=threads: count)
                results.add(matrix.product(matrix.tokens(n), form).tobytes())
            assert len(results) == 1, (case, n, form)
    kernels.set_isa(before)


@pytest.mark.parametrize("activations", ["float32", "integer"])
def test_nan_in_one_token_stays_there(isa: str, activations: str) -> None:
    matrix = Matrix((30, 200, 3, 0))
    for n in (2, 7):
        x = matrix.tokens(n)
        x[1, 3] = np.nan
        got = matrix.product(x, activations)
        assert np.isnan(got[1]).all()
        assert np.isfinite(np.delete(got, 1, axis=0)).all()


@pytest.mark.parametrize("case", CASES[4:11:3], ids=str)
def test_bfloat16_at_addresses(isa: str, case: Any) -> None:
    matrix = Matrix(case)
    held = kernels.hold_matrix(
        matrix.packed, matrix.in_features, matrix.codec, matrix.scale, matrix.shift
    )
    matrix.bias[:] = 0
    # The upper half of a float32 is a bfloat16.
    half = (matrix.tokens(2).view(np.uint32) >> 16).astype(np.uint16)
    x = (half.astype(np.uint32) << 16).view(np.float32)
    got = np.full((2, matrix.out_features), 7, np.uint16)
    kernels.matmul_at(held, half.ctypes.data, 2, True, 0, False, got.ctypes.data)
    want = matrix.product(x, kernels.activations()).astype(np.float64)
    found = (got.astype(np.uint32) << 16).view(np.float32)
    assert np.all(np.abs(found - want) <= np.abs(want) * 2.0**-8)


BAD: list[tuple[str, Any, str]] = [
    ("block_bits", lambda a: a[1:], "codec.block_bits: got uint8 (1,), want uint8 (2,)"),
    ("block_bits", lambda a: np.array([7, 1], np.uint8), "bits of a block: got 7, want 0..6"),
    ("block_bits", lambda a: np.array([2, 3], np.uint8), "bits of a block: got 3, want 0..2"),
    ("extra", lambda a: 4, "codec.extra: got 4, want 0..3"),
    ("magnitude", lambda a: -a, "codec.magnitude: a magnitude: got -"),
    (
        "magnitude",
        lambda a: np.maximum(a, 64).astype(np.int8),
        "codec.magnitude: a magnitude: got 64, want 0..63",
    ),
    ("magnitude", lambda a: a[1:], "codec.magnitude: got int8 (251,), want int8 (252,)"),
    ("order", lambda a: np.full(200, 200, np.int32), "codec.order: a column: got 200, want 0..199"),
    (
        "order",
        lambda a: np.arange(200, dtype=np.int32) // 199 * 199,
        "codec.order: got column 0 twice, want every column once",
    ),
    ("factor", lambda a: np.ones(3, np.float32), "codec.factor: got float32 (3,)"),
]


@pytest.mark.parametrize(("field", "spoil", "message"), BAD)
def test_bad_views_are_named(field: str, spoil: Any, message: str) -> None:
    matrix = Matrix((20, 200, 3, 0))
    wrong = spoil(getattr(matrix.codec, field))
    matrix.codec = matrix.codec._replace(**{field: wrong})
    with pytest.raises(ValueError) as caught:
        matrix.rows(0, 20)
    assert message in str(caught.value)


def test_six_bits_have_none_more_and_payloads_their_size() -> None:
    matrix = Matrix((20, 200, 6, 0))
    matrix.codec = matrix.codec._replace(extra=1)
    with pytest.raises(ValueError, match="bits of a block: got 6, want 0..5"):
        matrix.rows(0, 20)
    matrix = Matrix((20, 200, 2, 1))
    matrix.packed = matrix.packed[:-1]
    size = 20 * 50 + 5 * 25
    with pytest.raises(ValueError, match=rf"packed: got uint8 \({size - 1},\), want .*\({size},\)"):
        matrix.rows(0, 20)
