"""Encoding in trellis codes against its NumPy twin, and how good the paths are."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pocketllm import kernels, reference
from pocketllm.reference import trellis

pytestmark = pytest.mark.kernels

TABLE = 252


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    monkeypatch.setattr(kernels, "_threads", lambda: request.param)
    return request.param


def normals(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def problem(rows, columns, extra=0, *, fed=True, bits=None):
    """Arguments of encode_trellis, bits of every number in turn unless given."""
    most = 5 if extra else 6
    turn = np.arange(columns) * 3 % (most + 1) if bits is None else np.full(columns, bits)
    return {
        "x": normals(0, rows, columns),
        "weight": np.exp(normals(1, rows)),
        "feedback": normals(2, columns, columns) / np.float32(2 * columns**0.5) if fed else None,
        "bits": turn.astype(np.uint8),
        "extra": extra,
        "factor": np.exp(normals(3, columns) / np.float32(3)),
        "level": np.abs(normals(4, TABLE)),
    }


def costs(p, symbol):
    """What the encoder makes least, of each column of symbols, in float64; without feedback."""
    values = reference.trellis_levels(symbol, p["bits"], p["extra"], p["level"])
    gaps = p["x"].astype(np.float64) / p["factor"] - values
    return p["weight"].astype(np.float64) @ gaps**2


@pytest.mark.parametrize("fed", [True, False])
@pytest.mark.parametrize(
    "rows, columns, extra",
    [(0, 3, 0), (3, 0, 0), (1, 1, 1), (7, 5, 2), (15, 7, 3), (16, 7, 0), (17, 8, 1), (97, 33, 2)]
    + [(255, 4, 3), (256, 5, 0), (257, 7, 1), (511, 3, 2), (512, 4, 3), (520, 7, 1), (20, 260, 1)],
)
def test_kernel_equals_its_twin(isa, threads, rows, columns, extra, fed):
    p = problem(rows, columns, extra, fed=fed)
    got, want = kernels.encode_trellis(**p), reference.encode_trellis(**p)
    assert got.dtype == np.uint8 and got.shape == (rows, columns)
    assert np.array_equal(got, want)
    p["x"] = np.asfortranarray(p["x"])
    p["x"].flags.writeable = False
    assert np.array_equal(kernels.encode_trellis(**p), want)


def test_ties_are_broken_as_in_the_twin(isa):
    p = problem(300, 12, 1, bits=2)
    p["x"], p["level"] = np.rint(p["x"]) / 2, np.rint(p["level"] * 2) / 2
    p["weight"], p["factor"] = np.rint(p["weight"]), np.ones_like(p["factor"])
    assert np.array_equal(kernels.encode_trellis(**p), reference.encode_trellis(**p))


def test_symbols_do_not_depend_on_isa_or_threads(monkeypatch):
    before = kernels.isa()
    for rows, columns, fed in [(1300, 150, True), (800, 70, False)]:
        results = []
        for name in kernels.available_isas():
            for count in (1, 2, 3):
                kernels.set_isa(name)
                monkeypatch.setattr(kernels, "_threads", lambda count=count: count)
                results.append(kernels.encode_trellis(**problem(rows, columns, 3, fed=fed, bits=2)))
        kernels.set_isa(before)
        assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize("rows, bits", [(1, 6), (3, 3), (5, 2), (10, 1)])
def test_short_segments_get_the_best_of_all_symbols(isa, rows, bits):
    p = problem(rows, 4, fed=False, bits=bits)
    got = costs(p, kernels.encode_trellis(**p))
    count = 1 << bits * rows
    every = np.arange(count) >> bits * np.arange(rows)[:, None] & (1 << bits) - 1
    values = reference.trellis_levels(
        every.astype(np.uint8), np.full(count, bits, np.uint8), 0, p["level"]
    )
    for column in range(4):
        target = p["x"][:, column].astype(np.float64) / p["factor"][column]
        least = (p["weight"].astype(np.float64) @ (target[:, None] - values) ** 2).min()
        assert got[column] == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("rows, bits, extra", [(16, 1, 0), (40, 2, 1), (256, 3, 0), (300, 1, 2)])
def test_no_other_path_of_the_same_ends_is_cheaper(isa, rows, bits, extra):
    """Others: any symbols, and those chosen with a few rows changed; the last register stays."""
    random = np.random.default_rng(5)
    p = problem(rows, 1, extra, fed=False, bits=bits)
    chosen = kernels.encode_trellis(**p)
    row = np.arange(rows)
    limit = 1 << bits + (row + 1) * extra // 4 - row * extra // 4
    others = random.integers(0, limit[:, None], (rows, 400)).astype(np.uint8)
    at = random.integers(0, rows - trellis.MEMORY, 400)
    is_near = (np.arange(400) >= 200) & (np.abs(row[:, None] - at) > random.integers(0, 6, 400))
    others = np.where(is_near, chosen, others)
    others[-trellis.MEMORY :] = others[-trellis.MEMORY :] & 0xFE | chosen[-trellis.MEMORY :] & 1
    many = dict(p, x=np.repeat(p["x"], 400, 1), bits=np.repeat(p["bits"], 400))
    many["factor"] = np.repeat(p["factor"], 400)
    assert costs(many, others).min() >= costs(p, chosen)[0] * (1 - 1e-5)


def test_gaussian_numbers_at_two_bits():
    """Near the bound, 1/16, with levels that a few turns of Lloyd's iteration make."""
    x = normals(7, 512, 64)
    p = problem(512, 64, fed=False, bits=2)
    p |= {"x": x, "weight": np.ones(512, np.float32), "factor": np.ones(64, np.float32)}
    own = slice(4, 12)  # magnitudes of two bits
    p["level"][own] = (np.arange(8) + 0.5) * 0.36
    for _ in range(5):
        symbol = kernels.encode_trellis(**p)
        names = np.zeros(TABLE, np.float32)
        names[own] = np.arange(1, 9)
        which = reference.trellis_levels(symbol, p["bits"], 0, names)
        count = np.bincount(np.abs(which).astype(int).ravel(), minlength=9)
        total = np.bincount(np.abs(which).astype(int).ravel(), (np.sign(which) * x).ravel(), 9)
        p["level"][own] = np.abs(total / np.maximum(count, 1))[1:]
    values = reference.trellis_levels(kernels.encode_trellis(**p), p["bits"], 0, p["level"])
    assert 0.0625 < np.square(x - values).mean() < 0.085


def test_numbers_that_are_none_harm_no_others(isa):
    p = problem(300, 20, 1, fed=False, bits=3)
    clean = kernels.encode_trellis(**p)
    p["x"][3, 4], p["x"][200, 7], p["x"][5, 9] = np.nan, np.inf, 1e30
    symbol = kernels.encode_trellis(**p)
    others = [c for c in range(20) if c not in (4, 7, 9)]
    assert np.array_equal(symbol[:, others], clean[:, others])
    assert (symbol < 16).all()


REFUSED = [
    ({"x": np.zeros((20, 6))}, TypeError, "x: got float64 (20, 6), want float32 (n, m)"),
    ({"weight": normals(0, 19)}, ValueError, "weight: got float32 (19,), want float32 (20,)"),
    ({"feedback": normals(0, 6, 5)}, ValueError,
     "feedback: got float32 (6, 5), want float32 (6, 6)"),
    ({"bits": np.zeros(6, np.int32)}, TypeError, "bits: got int32 (6,), want uint8 (6,)"),
    ({"bits": np.zeros(5, np.uint8)}, ValueError, "bits: got uint8 (5,), want uint8 (6,)"),
    ({"bits": np.full(6, 7, np.uint8), "extra": 0}, ValueError, "bits: got 7, want 0..6"),
    ({"bits": np.full(6, 6, np.uint8)}, ValueError, "bits: got 6, want 0..5"),
    ({"extra": 4}, ValueError, "extra: got 4, want 0..3"),
    ({"extra": -1}, ValueError, "extra: got -1, want 0..3"),
    ({"factor": normals(0, 6, 1)}, ValueError, "factor: got float32 (6, 1), want float32 (6,)"),
    ({"level": normals(0, 251)}, ValueError, "level: got float32 (251,), want float32 (252,)"),
    ({"weight": np.full(20, -1, np.float32)}, ValueError,
     "weight: got -1.0, want finite numbers, none negative"),
    ({"weight": np.full(20, np.inf, np.float32)}, ValueError,
     "weight: got inf, want finite numbers, none negative"),
    ({"factor": np.zeros(6, np.float32)}, ValueError,
     "factor: got 0.0, want finite numbers above 0"),
    ({"factor": np.full(6, np.nan, np.float32)}, ValueError,
     "factor: got nan, want finite numbers above 0"),
    ({"level": np.full(252, np.inf, np.float32)}, ValueError,
     "level: got inf, want finite numbers"),
]  # fmt: skip


@pytest.mark.parametrize("change, exception, message", REFUSED, ids=[r[2] for r in REFUSED])
def test_refused_with_one_clear_sentence(change, exception, message):
    with pytest.raises(exception, match="^" + re.escape(message) + "$"):
        kernels.encode_trellis(**(problem(20, 6, 1) | change))
