"""Eight-bit row statistics against what the format says they are."""

from __future__ import annotations

import numpy as np
import pytest

from pocketllm import rowcode


def every_value(base: int, signed: bool) -> np.ndarray:
    """What the 256 bytes stand for, by the formula of docs/FORMAT.md, float64."""
    codes = np.arange(256)
    size = codes % 128 if signed else codes
    values = np.where(size > 0, 2.0 ** (base - 127 + size // 16) * (1 + size % 16 / 16), 0.0)
    return np.where(signed & (codes >= 128), -values, values)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("base", [1, 120, 239])
def test_decode_follows_the_formula(base: int, signed: bool) -> None:
    stored = np.array([base, *range(256)], np.uint8)
    decoded = rowcode.decode(stored, signed=signed)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, every_value(base, signed))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e30])
def test_encode_takes_the_nearest(signed: bool, spread: float) -> None:
    rng = np.random.default_rng(3)
    values = (spread * rng.standard_normal(300) * np.exp(rng.standard_normal(300))).astype("f4")
    values = values if signed else np.abs(values)
    values[7] = 0.0
    stored = rowcode.encode(values, signed=signed)
    assert rowcode.in_range(stored, signed=signed) and len(stored) == 301
    grid = every_value(int(stored[0]), signed)
    if not signed:
        grid = np.where(grid == 0, np.inf, grid)  # only a zero is stored as one
    best = np.abs(values[:, None].astype(np.float64) - grid).min(1)
    best[values == 0] = 0
    gap = np.abs(values - rowcode.decode(stored, signed=signed).astype(np.float64))
    # Below the smallest shift, nearest is zero or that one: the writer takes zero.
    smallest = np.abs(every_value(int(stored[0]), signed)[1]) if signed else 0.0
    assert (
        gap <= np.maximum(best * (1 + 1e-6), np.where(np.abs(values) < smallest, smallest, 0))
    ).all()
    assert rowcode.decode(stored, signed=signed)[7] == 0


@pytest.mark.parametrize("signed", [False, True])
def test_what_was_stored_stores_the_same(signed: bool) -> None:
    values = np.random.default_rng(4).standard_normal(100).astype(np.float32)
    values = values if signed else np.abs(values)
    once = rowcode.nearest(values, signed=signed)
    np.testing.assert_array_equal(rowcode.nearest(once, signed=signed), once)


def test_extremes() -> None:
    largest = np.float32(3.4e38)
    scales = rowcode.nearest(np.array([largest, 1.0, 0.0], np.float32), signed=False)
    assert np.isfinite(scales).all() and scales[0] > 0.96 * largest
    assert scales[1] > 0 and scales[2] == 0  # far below the largest, but not gone
    tiny = rowcode.nearest(np.array([1e-38, 0.0], np.float32), signed=False)
    assert 0 < tiny[0] < 2e-38 and tiny[1] == 0
    assert not rowcode.nearest(np.zeros(3, np.float32), signed=True).any()
    assert len(rowcode.encode(np.zeros(0, np.float32), signed=False)) == 1


def test_float16_passes_through() -> None:
    values = np.array([1.5, -2.25], np.float16)
    np.testing.assert_array_equal(rowcode.decode(values, signed=True), [1.5, -2.25])
