"""Trellis codes in Python: payloads, levels, bits of columns, and matrices chosen under H."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from compressed import random_columns, random_symbols

from pocketllm import kernels, ops, reference, trellis, trellis_bits
from pocketllm.encode import factorise
from pocketllm.layout import row_statistics
from pocketllm.trellis_encode import (
    Coding,
    column_coding,
    column_energy,
    decode,
    encode_trellis,
    fit_magnitudes,
    level_table,
    uniform_coding,
)

BITS: list[trellis.Bits] = [
    1.0,
    2.0,
    2.25,
    3.5,
    4.75,
    6.0,
    (5, 3, 1, 0),
    (2, 2, 2, 2),
    (1, 0, 0, 0),
]


def symbols_of(bits: trellis.Bits, rows: int, columns: int) -> np.ndarray:
    """Always the same random symbols."""
    return random_symbols(bits, rows, columns, np.random.default_rng(0))


def random_matrix(bits: trellis.Bits, rows: int, columns: int) -> ops.Matrix:
    """A random matrix as the operators take it, with row scales."""
    rng = np.random.default_rng(1)
    packed = trellis.pack(symbols_of(bits, rows, columns), bits)
    codes = random_columns(bits, columns, rng)
    return ops.Matrix(
        torch.from_numpy(packed),
        torch.from_numpy(np.r_[120, rng.integers(100, 140, rows)].astype(np.uint8)),
        None,
        torch.from_numpy(rng.integers(0, 64, trellis.MAGNITUDES).astype(np.int8)),
        torch.from_numpy(rng.uniform(0.01, 0.1, trellis.MAX_BITS).astype(np.float32)),
        None,
        None if codes is None else torch.from_numpy(codes),
        rows,
        columns,
        0,
        0,
        "input",
        [*bits] if isinstance(bits, tuple) else [bits],
    )


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_payload_is_what_the_twin_unpacks(bits: trellis.Bits, rows: int) -> None:
    columns = 500
    symbol = symbols_of(bits, rows, columns)
    packed = trellis.pack(symbol, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (trellis.payload_bytes(bits, rows, columns),)
    blocks, extra = trellis.block_bits(bits, columns)
    view = kernels.TrellisView(blocks, extra, np.zeros(trellis.MAGNITUDES, np.int8))
    found, _ = reference.inference.unpack_trellis(packed, rows, columns, view)
    np.testing.assert_array_equal(found, symbol)
    assert not trellis.has_spare_bits(packed, bits, rows, columns)


def test_bits_behind_a_plane_are_seen() -> None:
    for bits, columns in itertools.product([2.0, 2.5, (3, 1)], [130, 200]):
        clean = trellis.pack(symbols_of(bits, 9, columns), bits)
        first = trellis.plane_columns(bits, columns)[0]
        spoiled = clean.copy()
        spoiled[-(-first // 8) - 1] |= 128 if first % 8 else 0
        assert trellis.has_spare_bits(spoiled, bits, 9, columns) == bool(first % 8)


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("rows", [1, 15, 16, 255, 600])
def test_torch_reads_what_the_kernels_read(bits: trellis.Bits, rows: int) -> None:
    matrix = random_matrix(bits, rows, 500)
    index = torch.arange(rows).flip(0)
    got = ops.decode_rows_torch(matrix, index)
    torch.testing.assert_close(got, ops.dequantise(matrix)[index], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2.25, (4, 2, 0, 0)], ids=str)
def test_products_and_gradients_are_those_of_the_dense_matrix(bits: trellis.Bits) -> None:
    matrix = random_matrix(bits, 40, 500)
    dense = ops.dequantise(matrix)
    x = torch.randn(3, 500, requires_grad=True)
    before = kernels.activations()
    kernels.set_activations("float32")
    try:
        product = ops.matmul(x, matrix)
        product.sum().backward()
    finally:
        kernels.set_activations(before)
    torch.testing.assert_close(product, x @ dense.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ops.matmul_torch(x, matrix), x @ dense.T, rtol=1e-4, atol=1e-4)


def test_level_index_is_the_twin_of_the_contract() -> None:
    """Rows that are read one by one, with the parities written out."""
    rng = np.random.default_rng(2)
    for rows in (3, 15, 16, 40, 530):
        symbol = rng.integers(0, 64, (rows, 5)).astype(np.uint8)
        index = trellis.level_index(symbol)
        for part in trellis.segments(rows):
            size = part.stop - part.start
            for row in range(part.start, part.stop):
                w = []
                for i in range(9):
                    before = row - i
                    wrapped = before + size if before < part.start else before
                    there = before >= part.start or size >= 16
                    w.append(symbol[wrapped].astype(int) & 1 if there else np.zeros(5, int))
                want = w[3] ^ w[4] ^ w[7]
                want = want + 2 * (w[1] ^ w[2] ^ w[4] ^ w[6])
                want = want + 4 * (w[0] ^ w[4] ^ w[5] ^ w[7] ^ w[8]) + 8 * (symbol[row] >> 1)
                np.testing.assert_array_equal(index[row], want)


def test_segments_cover_all_rows_once() -> None:
    assert trellis.segments(0) == []
    for rows in (1, 255, 256, 511, 512, 513, 1000):
        parts = trellis.segments(rows)
        assert [r for s in parts for r in range(s.start, s.stop)] == list(range(rows))
        assert all(s.stop - s.start == 256 for s in parts[:-1])


@pytest.fixture(scope="module")
def levels() -> dict[str, np.ndarray]:
    """Fitted to normal values."""
    sample = np.random.default_rng(3).standard_normal((1024, 64)).astype(np.float32)
    return fit_magnitudes(sample)


def test_levels_err_as_expected(levels: dict[str, np.ndarray]) -> None:
    """On other normal values than those they were fitted to; and above what any code can reach."""
    x = np.random.default_rng(4).standard_normal((1024, 24)).astype(np.float32)
    assert levels["magnitude"].dtype == np.int8 and trellis.are_magnitudes(levels["magnitude"])
    table = level_table(levels)
    for bits in np.arange(1, 6.25, 0.25):
        each = np.full(24, int(bits), np.uint8)
        extra = int(bits * 4) % 4
        ones = np.ones(24, np.float32)
        symbol = kernels.encode_trellis(
            x, np.ones(1024, np.float32), None, each, extra, ones, table
        )
        packed = trellis.pack(symbol, float(bits))
        made = decode(packed, float(bits), None, levels, np.ones(1024, np.float32), None, 24)
        error = float(np.square(x - made).mean())
        assert 4.0**-bits < error < 1.06 * trellis_bits.expected_error(float(bits)), bits


def test_bits_go_where_they_save_most() -> None:
    """Against every way of giving out the same bits."""
    rng = np.random.default_rng(5)
    for columns, budget in ((400, 100), (384, 96), (512, 50), (130, 60)):
        harm = np.sort(rng.lognormal(0, 3, columns))[::-1]
        blocks = trellis_bits.share_bits(harm, budget)
        size = [-(-min(128, columns - at) // 8) for at in range(0, columns, 128)]
        assert (np.diff(blocks) <= 0).all()
        assert (blocks * size).sum() <= budget
        whole = np.add.reduceat(harm, np.arange(0, columns, 128))

        def cost(bits: Any, whole: np.ndarray = whole) -> float:
            return float((whole * np.array(trellis_bits.ERRORS)[list(bits)]).sum())

        ways = itertools.product(range(7), repeat=len(size))
        fitting = [b for b in ways if np.dot(b, size) <= budget and list(b) == sorted(b)[::-1]]
        assert cost(blocks) <= 1.02 * min(map(cost, fitting))
        shuffled = rng.permutation(harm)
        shared = trellis_bits.Sharing(shuffled)
        np.testing.assert_array_equal(shared.bits(budget), blocks)
        assert shared.error(budget) == pytest.approx(cost(blocks))


def layer(rows: int, columns: int, spread: float, seed: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A weight and second moments of correlated inputs, whose magnitudes are `spread` apart."""
    rng = np.random.default_rng(seed)
    size = np.exp(spread * rng.standard_normal(columns))
    mixing = rng.standard_normal((columns, columns)) / np.sqrt(columns) + np.eye(columns)
    inputs = rng.standard_normal((4 * columns, columns)) @ mixing * size
    hessian = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    weight = rng.standard_normal((rows, columns)) * np.exp(0.3 * rng.standard_normal((rows, 1)))
    return weight.astype(np.float32), hessian


def output_error(weight: np.ndarray, made: np.ndarray, hessian: np.ndarray) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ) in float64."""
    gap = (weight - made).astype(np.float64)
    w = weight.astype(np.float64)
    return float(((gap @ hessian) * gap).sum() / ((w @ hessian) * w).sum())


def coded(
    weight: np.ndarray,
    coding: Coding,
    levels: dict[str, np.ndarray],
    hessian: np.ndarray | None,
    factors: Any,
) -> tuple[np.ndarray, Any]:
    """What a matrix is stored as, and the matrix that this stands for."""
    scale, _ = row_statistics(lambda: [weight])
    made = encode_trellis(lambda: [weight], scale, None, coding, levels, hessian, factors)
    columns = weight.shape[1]
    again = decode(made.packed, coding.bits, coding.codes, levels, made.scale, None, columns)
    return again, made


@pytest.mark.parametrize("rows", [40, 300])
def test_feedback_lowers_the_output_error(rows: int, levels: dict[str, np.ndarray]) -> None:
    weight, hessian = layer(rows, 256, 0.5)
    factors = factorise(hessian, 1, again=False)
    scale, _ = row_statistics(lambda: [weight])
    energy = column_energy([weight], scale, None)
    assert energy.mean() == pytest.approx(1, rel=0.1)
    errors = []
    for own in (None, factors):
        coding = uniform_coding(2.5, energy, own)
        made, encoded = coded(weight, coding, levels, hessian, own)
        errors.append(output_error(weight, made, hessian))
        plain, total, under, whole = encoded.squares
        gap = np.square((weight - made).astype(np.float64)).sum()
        assert plain == pytest.approx(gap, rel=1e-5)
        assert total == pytest.approx(np.square(weight.astype(np.float64)).sum(), rel=1e-5)
        assert under / whole == pytest.approx(errors[-1], rel=1e-3)
    assert errors[1] < 0.8 * errors[0]


def test_columns_with_bits_of_their_own(levels: dict[str, np.ndarray]) -> None:
    """Where inputs differ much, bits shared out by column err less, in the same bytes."""
    weight, hessian = layer(256, 640, 1.5)
    factors = factorise(hessian, 1, again=False)
    scale, _ = row_statistics(lambda: [weight])
    energy = column_energy([weight], scale, None)
    made, encoded = coded(weight, uniform_coding(2.0, energy, factors), levels, hessian, factors)
    alike, size = output_error(weight, made, hessian), len(encoded.packed)
    coding = column_coding(2 * 640 // 8, energy, np.ones(640), factors)
    assert coding.codes is not None and isinstance(coding.bits, tuple)
    assert trellis.matches_blocks(coding.codes, coding.bits)
    made, encoded = coded(weight, coding, levels, hessian, factors)
    assert len(encoded.packed) <= size
    assert output_error(weight, made, hessian) < 0.5 * alike


def test_without_second_moments_a_cost_says_which_columns_matter(
    levels: dict[str, np.ndarray],
) -> None:
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((64, 512)).astype(np.float32)
    cost = np.exp(2 * rng.standard_normal(512))
    energy = np.ones(512)
    coding = column_coding(2 * 512 // 8, energy, cost, None)
    assert coding.codes is not None
    bits = trellis.column_bits(coding.codes)
    assert cost[bits == bits.max()].min() >= cost[bits == bits.min()].max()
    made, _ = coded(weight, coding, levels, None, None)
    alike, _ = coded(weight, uniform_coding(2.0, energy, None), levels, None, None)
    gaps = [(np.square(weight - m) * cost).sum() for m in (made, alike)]
    assert gaps[0] < 0.6 * gaps[1]


def test_parts_of_a_matrix_are_coded_as_the_whole(levels: dict[str, np.ndarray]) -> None:
    weight, hessian = layer(800, 130, 0.5)
    factors = factorise(hessian, 1, again=False)
    scale, _ = row_statistics(lambda: [weight])
    coding = uniform_coding(2.25, column_energy([weight], scale, None), factors)
    results = [
        encode_trellis(lambda parts=parts: parts, scale, None, coding, levels, hessian, factors)
        for parts in ([weight], [weight[:256], weight[256:]], [weight[:512], weight[512:]])
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(other.packed, results[0].packed)
        np.testing.assert_allclose(other.squares, results[0].squares, rtol=1e-6)


def test_zero_rows_and_columns(levels: dict[str, np.ndarray]) -> None:
    weight, hessian = layer(40, 256, 0.5)
    weight[3] = 0
    weight[:, 5] = 0
    factors = factorise(hessian, 1, again=False)
    scale, _ = row_statistics(lambda: [weight])
    energy = column_energy([weight], scale, None)
    for coding in (
        uniform_coding(3.0, energy, factors),
        column_coding(96, energy, np.ones(256), factors),
    ):
        made, _ = coded(weight, coding, levels, hessian, factors)
        assert np.isfinite(made).all() and (made[3] == 0).all()
    empty = np.zeros((20, 256), np.float32)
    for coding in (
        uniform_coding(3.0, np.zeros(256), None),
        column_coding(96, np.zeros(256), np.ones(256), None),
    ):
        made, _ = coded(empty, coding, levels, None, None)
        assert (made == 0).all()
