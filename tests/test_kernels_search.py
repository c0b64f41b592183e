"""Codebook search against a float64 NumPy reference, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from pocketllm import kernels, reference

pytestmark = pytest.mark.kernels

SIZES = [0, 1, 2, 7, 31, 63, 64, 65, 127, 521]
CODEWORDS = [1, 2, 3, 31, 32, 33, 100, 257]


@pytest.fixture(params=kernels.available_isas())
def isa(request):
    """Runs the test on each instruction set of this machine."""
    before = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    monkeypatch.setattr(kernels, "_threads", lambda: request.param)
    return request.param


def score_tolerance(z, codebook, weight, bias):
    """How far a float32 score may be from the exact distance, per query.

    A score is (sum w c^2 + bias)/2 - sum w z c, two fused chains of d roundings each, so it is off
    by at most (d + 2) 2^-24 times the sum of its terms' magnitudes; twice that separates two
    codewords, and a distance is twice a score.
    """
    w = np.ones(z.shape[1]) if weight is None else weight.astype(np.float64)
    largest = np.abs(codebook.astype(np.float64)).max(axis=0)
    terms = (w * largest**2).sum() + (w * np.abs(z.astype(np.float64)) * largest).sum(axis=1)
    terms += 0.0 if bias is None else np.abs(bias.astype(np.float64)).max()
    return 4 * (z.shape[1] + 2) * 2.0**-24 * terms


def check(z, codebook, weight=None, bias=None):
    index, error = kernels.nearest(z, codebook, weight=weight, bias=bias, return_error=True)
    assert index.dtype == np.int32 and index.shape == (len(z),)
    assert error.dtype == np.float32 and error.shape == (len(z),)
    assert np.array_equal(index, kernels.nearest(z, codebook, weight=weight, bias=bias))
    exact = reference.distances(z, codebook, weight=weight, bias=bias)
    chosen = np.take_along_axis(exact, index[:, None].astype(np.int64), axis=1)[:, 0]
    assert (chosen <= exact.min(axis=1) + score_tolerance(z, codebook, weight, bias)).all()
    # the error is summed from differences: d + 1 roundings of non-negative terms, and the bias
    size = chosen if bias is None else np.abs(chosen) + 2 * np.abs(bias[index])
    assert (np.abs(error - chosen) <= (z.shape[1] + 3) * 2.0**-23 * size + 1e-30).all()
    return index


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("d", range(1, 17))
def test_every_length_of_sub_vector(isa, threads, d):
    for step, count in enumerate(CODEWORDS):
        z = normals(d, SIZES[(d + step) % len(SIZES)], d)
        weight = np.abs(normals(1, d)) if step & 1 else None
        bias = normals(2, count) if step & 2 else None
        check(z, normals(step, count, d), weight, bias)


@pytest.mark.parametrize("n", SIZES)
def test_every_awkward_number_of_queries(isa, threads, n):
    check(normals(n, n, 4), normals(1, 300, 4))
    check(normals(n, n, 8), normals(1, 70, 8), np.abs(normals(3, 8)), normals(4, 70))


def test_indices_do_not_depend_on_isa_or_threads(monkeypatch):
    before = kernels.isa()
    for n, count, d in [(3000, 1000, 4), (1537, 4099, 8), (700, 513, 13)]:
        z, codebook, bias = normals(1, n, d), normals(2, count, d), normals(3, count)
        codebook[count // 2 :] = np.round(codebook[count // 2 :] * 2) / 2  # many near ties
        results = []
        for name in kernels.available_isas():
            for threads in (1, 2, 3):
                kernels.set_isa(name)
                monkeypatch.setattr(kernels, "_threads", lambda threads=threads: threads)
                results.append(kernels.nearest(z, codebook, bias=bias, return_error=True))
        kernels.set_isa(before)
        for index, error in results[1:]:
            assert np.array_equal(index, results[0][0])
            assert np.array_equal(error, results[0][1])


def test_many_codewords(isa):
    check(normals(1, 65, 4), normals(2, 65536, 4))
    check(normals(1, 65, 8), normals(2, 65535, 8))


def test_exact_ties_go_to_the_lowest_index(isa, threads):
    grid = np.array([[x, y] for x in range(-3, 4) for y in range(-3, 4)], dtype=np.float32)
    codebook = np.concatenate([grid, grid, grid[::-1]])  # every codeword three times
    halves = np.arange(-6, 7, dtype=np.float32) / 2  # all distances are exact in float32
    z = np.stack(np.meshgrid(halves, halves), axis=-1).reshape(-1, 2)
    expected = reference.distances(z, codebook).argmin(axis=1)
    assert np.array_equal(kernels.nearest(z, codebook), expected)
    assert np.array_equal(reference.nearest(z, codebook), expected)


def test_equal_codewords_and_zero_weight(isa):
    codebook = np.ones((77, 5), np.float32)
    assert not kernels.nearest(normals(0, 130, 5), codebook).any()
    weight = np.zeros(5, np.float32)
    index, error = kernels.nearest(
        normals(0, 130, 5), normals(1, 77, 5), weight=weight, return_error=True
    )
    assert not index.any() and not error.any()


def test_bias_decides(isa):
    codebook, bias = normals(1, 200, 3), np.full(200, 1000, np.float32)
    bias[137] = -1000
    assert (kernels.nearest(normals(2, 99, 3), codebook, bias=bias) == 137).all()


def test_a_codeword_finds_itself(isa):
    codebook = normals(3, 4096, 8)
    index, error = kernels.nearest(codebook, codebook, return_error=True)
    assert np.array_equal(index, np.arange(4096)) and not error.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_not_finite_input_gives_an_index_in_range(isa, value):
    for count in (1, 5, 40, 1000):
        z, codebook = normals(1, 100, 6), normals(2, count, 6)
        good = kernels.nearest(z, codebook)
        z[::2, 3] = value
        index = kernels.nearest(z, codebook)
        assert index.min() >= 0 and index.max() < count
        assert np.array_equal(index[1::2], good[1::2])  # other rows are not touched
        codebook[::3] = value
        index, _ = kernels.nearest(z, codebook, return_error=True)
        assert index.min() >= 0 and index.max() < count


def test_strided_and_read_only_input(isa):
    wide, codebook = normals(1, 40, 24), normals(2, 90, 8)
    expected = kernels.nearest(np.ascontiguousarray(wide[::2, ::3]), codebook)
    assert np.array_equal(kernels.nearest(wide[::2, ::3], codebook), expected)
    turned = np.asfortranarray(codebook)
    assert np.array_equal(kernels.nearest(wide[::2, ::3], turned), expected)
    fixed = wide[::2, ::3].copy()
    fixed.flags.writeable = False
    assert np.array_equal(kernels.nearest(fixed, codebook[::-1][::-1]), expected)
    raw = np.zeros(4 * 8 * 20 + 1, np.uint8)  # not aligned
    view = raw[1:].view(np.float32).reshape(20, 8)
    view[:] = fixed
    assert np.array_equal(kernels.nearest(view, codebook), expected)
