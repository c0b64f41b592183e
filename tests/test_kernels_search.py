"""Codebook search against a float64 NumPy reference, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from pocketllm import kernels, reference

pytestmark = pytest.mark.kernels

SIZES = [0, 1, 2, 7, 31, 63, 64, 65, 127, 521]
CODEWORDS = [1, 2, 3, 31, 32, 33, 100, 257]


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


def spread(kind, seed, n, d):
    """Data that is hard for a search tree in one way each."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    match kind:
        case "heavy tails":
            x = rng.standard_t(3, size=(n, d))
        case "ties":
            x = np.round(x * 2)
        case "clusters":
            x = rng.normal(size=(12, d))[rng.integers(12, size=n)] + 1e-3 * x
        case "outliers":
            x[:: max(1, n // 7)] *= 1e6
        case "denormal":
            x *= 1e-40
        case "far from zero":
            x = 1e4 + 1e-2 * x
        case "all equal":
            x[:] = 0.5
        case "one line":
            x = x[:, :1] * np.arange(1, d + 1)
    return x.astype(np.float32)


SPREADS = ["normal", "heavy tails", "ties", "clusters", "outliers", "denormal", "far from zero"]
SPREADS += ["all equal", "one line"]


def scan(z, codebook, **options):
    """The search over all codewords: what `nearest` does with few queries."""
    parts = [kernels.nearest(z[i : i + 100], codebook, **options) for i in range(0, len(z), 100)]
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


@pytest.mark.parametrize("kind", SPREADS)
def test_an_index_gives_what_the_scan_gives(isa, threads, kind):
    for d, count in [(1, 3000), (2, 2500), (4, 4100), (7, 1500), (8, 4097), (16, 700)]:
        codebook, z = spread(kind, 1, count, d), spread(kind, 2, 300, d)
        codebook[-50:] = codebook[:50]
        weight = np.abs(normals(3, d)) if d & 1 else None
        bias = np.abs(normals(4, count)) if d > 4 else None
        expected = scan(z, codebook, weight=weight, bias=bias)
        index = kernels.SearchIndex(codebook, weight=weight, bias=bias)
        assert np.array_equal(index.nearest(z), expected)  # may choose the scan
        for guess in (None, np.zeros(300, np.int32), expected):
            for first in range(0, 300, 64):  # so few queries always go through the tree
                part = slice(first, first + 64)
                previous = None if guess is None else guess[part]
                assert np.array_equal(index.nearest(z[part], previous=previous), expected[part])


@pytest.mark.parametrize("kind", SPREADS)
def test_queries_in_the_lists_of_their_cells(isa, threads, kind):
    for d, count in [(2, 1100), (4, 1500), (6, 1024)]:
        codebook, z = spread(kind, 1, count, d), spread(kind, 2, 201, d)
        codebook[-50:] = codebook[:50]
        weight = np.abs(normals(3, d)) if d == 4 else None
        bias = np.abs(normals(4, count)) if d == 6 else None
        expected = scan(z, codebook, weight=weight, bias=bias)
        order = np.random.default_rng(5).permutation(np.arange(40 * len(z)) % len(z))
        many = z[order]  # so many that they share cells
        index = kernels.SearchIndex(codebook, weight=weight, bias=bias)
        assert np.array_equal(index.nearest(many), expected[order])
        few, error = index.nearest(z, return_error=True)
        again, errors = index.nearest(many, return_error=True)
        assert np.array_equal(few, expected) and np.array_equal(again, expected[order])
        assert np.array_equal(errors, error[order])


def test_index_error_and_optimality(isa):
    z, codebook, bias = normals(1, 64, 8), normals(2, 5000, 8), np.abs(normals(3, 5000))
    weight = np.abs(normals(4, 8))
    index, error = kernels.SearchIndex(codebook, weight=weight, bias=bias).nearest(
        z, return_error=True
    )
    exact = reference.distances(z, codebook, weight=weight, bias=bias)
    chosen = exact[np.arange(64), index]
    assert (chosen <= exact.min(axis=1) + score_tolerance(z, codebook, weight, bias)).all()
    np.testing.assert_allclose(error, chosen, rtol=1e-5)
    twin = reference.SearchIndex(codebook, weight=weight, bias=bias)
    assert np.array_equal(twin.nearest(z, previous=index), index)


@pytest.mark.parametrize(
    ("d", "count"),
    [(1, 4096), (2, 4096), (3, 1024), (4, 8192), (7, 2048), (8, 16384), (16, 4096)],
)
def test_many_queries_give_what_few_give(isa, threads, d, count):
    many = max(40000 // d, 5000) + 77
    codebook, z = spread("heavy tails", 1, count, d), spread("heavy tails", 2, many, d)
    z[5], z[100, 0] = np.nan, 1e30
    index, error = kernels.nearest(z, codebook, return_error=True)  # builds a tree
    some = np.r_[0:5, 6:100, 101:400, len(z) - 200 : len(z)]
    assert np.array_equal(index[some], scan(z[some], codebook))
    assert index.min() >= 0 and index.max() < count
    rows = codebook[index[some]].astype(np.float64)
    distance = np.square(z[some].astype(np.float64) - rows).sum(axis=1)
    np.testing.assert_allclose(error[some], distance, rtol=1e-5, atol=1e-30)


def test_an_index_does_not_depend_on_threads_and_outlives_its_codebook(monkeypatch):
    codebook, z = normals(1, 4096, 4), normals(2, 30000, 4)
    expected = scan(z, codebook)
    for threads in (1, 2, 3):
        monkeypatch.setattr(kernels, "_threads", lambda threads=threads: threads)
        copy = codebook.copy()
        index = kernels.SearchIndex(copy)
        copy[:] = 0
        assert np.array_equal(index.nearest(z), expected)
        assert np.array_equal(index.nearest(z, previous=expected), expected)


def test_an_index_belongs_to_its_instruction_set():
    before = kernels.isa()
    codebook, z = normals(1, 3000, 5), normals(2, 64, 5)
    for builder in kernels.available_isas():
        kernels.set_isa(builder)
        index = kernels.SearchIndex(codebook)
        for searcher in kernels.available_isas():
            kernels.set_isa(searcher)
            assert np.array_equal(index.nearest(z), scan(z, codebook))
    kernels.set_isa(before)


def test_index_without_queries_and_of_few_codewords(isa):
    for count in (1, 2, 7, 8, 9):
        index = kernels.SearchIndex(normals(1, count, 3))
        assert index.nearest(np.empty((0, 3), np.float32)).shape == (0,)
        z = normals(2, 20, 3)
        assert np.array_equal(index.nearest(z), scan(z, normals(1, count, 3)))


def test_index_refuses_what_does_not_fit():
    index = kernels.SearchIndex(normals(1, 50, 4))
    z = normals(2, 10, 4)
    with pytest.raises(ValueError, match=r"previous: got a value outside 0..49"):
        index.nearest(z, previous=np.full(10, 50, np.int32))
    with pytest.raises(ValueError, match=r"previous: got int32 \(9,\), want int32 \(10,\)"):
        index.nearest(z, previous=np.zeros(9, np.int32))
    with pytest.raises(TypeError, match=r"z: got float64 \(10, 4\), want float32 \(n, 4\)"):
        index.nearest(z.astype(np.float64))
    with pytest.raises(ValueError, match=r"z: got float32 \(10, 3\), want float32 \(n, 4\)"):
        index.nearest(normals(2, 10, 3))
    with pytest.raises(ValueError, match="bias: got"):
        kernels.SearchIndex(normals(1, 50, 4), bias=np.zeros(49, np.float32))
