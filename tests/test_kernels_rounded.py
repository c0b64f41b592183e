"""Products with rounded factors against NumPy in float64, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from pocketllm import kernels, reference

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("isa")]


def factors(*lines, k):
    """Of each so many lines, with columns and lines of other magnitudes."""
    rng = np.random.default_rng(k)
    column = np.exp(rng.standard_normal(k))
    return [
        (np.exp(3 * rng.standard_normal((n, 1))) * rng.standard_normal((n, k)) * column).astype(
            np.float32
        )
        for n in lines
    ]


def relative(got, want):
    return np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)


@pytest.mark.parametrize(("n", "m", "k"), [(1, 1, 1), (3, 50, 255), (100, 49, 256), (49, 300, 600)])
def test_linear(n, m, k):
    x, w = factors(n, m, k=k)
    got = kernels.rounded_linear(x, w)
    assert got.dtype == np.float32 and got.shape == (n, m)
    np.testing.assert_allclose(
        got, reference.rounded_linear(x, w), rtol=0, atol=1e-5 * np.abs(got).max()
    )
    # As near to the exact product as with factors of bfloat16, or nearer.
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    assert relative(got, exact).max() < 2**-8
    np.testing.assert_array_equal(kernels.rounded_linear(np.asfortranarray(x), w[::1]), got)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (60, 300), (700, 40)])
def test_gram_adds_up_to_the_diagonal(n, k):
    (x,) = factors(n, k=k)
    got, want = (np.full((n, n), 2, np.float32) for _ in range(2))
    for first in range(0, n, 33):
        kernels.rounded_gram(x, got, first, min(first + 33, n))
    reference.rounded_gram(x, want)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    whole = np.full((n, n), 2, np.float32)
    kernels.rounded_gram(x, whole)
    np.testing.assert_array_equal(whole, got)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_matter(monkeypatch, threads):
    x, w = factors(101, 203, k=513)
    want = kernels.rounded_linear(x, w)
    monkeypatch.setattr(kernels, "_threads", lambda: threads)
    assert np.array_equal(kernels.rounded_linear(x, w), want)


def test_nothing_to_multiply():
    none, some = np.zeros((0, 5), np.float32), np.ones((3, 5), np.float32)
    assert kernels.rounded_linear(none, some).shape == (0, 3)
    assert kernels.rounded_linear(some, none).shape == (3, 0)
    assert not kernels.rounded_linear(some[:, :0], some[:, :0]).any()
    kernels.rounded_gram(none, np.zeros((0, 0), np.float32))


def test_what_is_refused():
    x = np.ones((3, 5), np.float32)
    with pytest.raises(ValueError, match=r"w: got float32 \(3, 4\), want float32 \(m, 5\)"):
        kernels.rounded_linear(x, x[:, :4])
    with pytest.raises(TypeError, match="x: got float64"):
        kernels.rounded_linear(x.astype(np.float64), x)
    with pytest.raises(ValueError, match=r"out: got float32 \(5, 5\), want float32 \(3, 3\)"):
        kernels.rounded_gram(x, np.zeros((5, 5), np.float32))
    with pytest.raises(ValueError, match="out: got a strided"):
        kernels.rounded_gram(x, np.zeros((3, 6), np.float32)[:, ::2])
    with pytest.raises(ValueError, match=r"end: got 4, want 0\.\.3"):
        kernels.rounded_gram(x, np.zeros((3, 3), np.float32), 0, 4)
    with pytest.raises(ValueError, match=r"first: got 3, want 0\.\.2"):
        kernels.rounded_gram(x, np.zeros((3, 3), np.float32), 3, 2)
