"""Encoding: the kernel against its twin, feedback against nearest, and awkward matrices."""

from __future__ import annotations

import numpy as np
import pytest

from pocketllm import encode, kernels, reference
from pocketllm.codec import train_codec
from pocketllm.encode import Encoded, encode_rows, factorise
from pocketllm.errors import PocketError
from pocketllm.layout import denormalise, normalise
from pocketllm.schema import CodecSpec
from pocketllm.stored import StoredCodec, round_table


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated(columns: int, samples: int, seed: int = 0) -> np.ndarray:
    """Second moments of inputs that share a common part and differ in size."""
    x = normal(seed, samples, columns) + normal(seed + 1, samples, 1)
    x *= np.exp(normal(seed + 2, columns))
    return (x.T @ x / samples).astype(np.float32)


def table_codec(subvector: int, codewords: int, seed: int = 0) -> StoredCodec:
    table = normal(seed, codewords, subvector)
    spec = CodecSpec("test", subvector, codewords, 16, "input", "table-float16")
    return StoredCodec(spec, round_table(table, spec.storage))


def under(gap: np.ndarray, hessian: np.ndarray) -> float:
    return float(np.trace(gap.astype(np.float64) @ hessian.astype(np.float64) @ gap.T))


def decoded(encoded: Encoded, codec: StoredCodec, columns: int) -> np.ndarray:
    values = codec.table[encoded.index].reshape(len(encoded.index), -1)
    assert encoded.scale is not None
    return denormalise(values, columns, encoded.scale, encoded.shift)


# rows, sub-vectors, d, K: empty, single, blocks of columns and of rows exactly full and broken
CASES = [
    (0, 3, 4, 8), (1, 1, 1, 2), (5, 3, 2, 7), (64, 32, 4, 64), (65, 33, 4, 50), (130, 21, 7, 33),
    (3, 150, 1, 4), (66, 9, 16, 100),
]  # fmt: skip


@pytest.mark.parametrize("rows, count, d, k", CASES)
def test_kernel_equals_its_twin(isa: str, rows: int, count: int, d: int, k: int) -> None:
    length = count * d
    x, table = normal(0, rows, length), normal(1, k, d)
    root = normal(2, count, d, d)
    metric = root @ root.transpose(0, 2, 1) + np.eye(d, dtype=np.float32)
    feedback = normal(3, length, length) / np.float32(2 * np.sqrt(length))
    want = reference.encode_feedback(x, table, metric, feedback)
    got = kernels.encode_feedback(x, table, metric, feedback)
    assert got.dtype == np.int32 and got.shape == (rows, count)
    assert np.array_equal(got, want)
    for sweeps in (1, 2, 3):
        again = kernels.encode_feedback(x, table, metric, feedback, got, sweeps)
        twin = reference.encode_feedback(x, table, metric, feedback, want, sweeps)
        assert np.array_equal(again, twin)
    strided = kernels.encode_feedback(np.asfortranarray(x), table, metric, feedback)
    assert np.array_equal(strided, want)


def test_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(encode, "FACTOR_PANEL", 20)
    x, table = normal(0, 200, 96), normal(1, 40, 4)
    results = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        f = factorise(correlated(96, 400), 4)
        assert torch.get_num_threads() == threads
        results.append(f.feedback)
        results.append(f.fixed_feedback)
        found = kernels.encode_feedback(x, table, f.metric, f.feedback)
        results.append(kernels.encode_feedback(x, table, f.metric, f.fixed_feedback, found, 2))
        torch.set_num_threads(before)
    kinds = len(results) // 3
    assert all(np.array_equal(r, results[i % kinds]) for i, r in enumerate(results))


def test_kernel_refuses() -> None:
    x, table, metric = normal(0, 2, 8), normal(1, 5, 4), normal(2, 2, 4, 4)
    feedback = normal(3, 8, 8)
    with pytest.raises(TypeError, match=r"x: got float64 \(2, 8\), want float32 \(n, 8\)"):
        kernels.encode_feedback(x.astype(np.float64), table, metric, feedback)
    with pytest.raises(ValueError, match=r"metric: .* want float32 \(L, 4, 4\)"):
        kernels.encode_feedback(x, table, normal(2, 2, 4, 3), feedback)
    with pytest.raises(ValueError, match=r"feedback: got float32 \(8, 7\)"):
        kernels.encode_feedback(x, table, metric, feedback[:, :7])
    with pytest.raises(ValueError, match="previous: an index: got 5, want 0..4"):
        kernels.encode_feedback(x, table, metric, feedback, np.full((2, 2), 5, np.int32))
    with pytest.raises(ValueError, match=r"sweeps: got 2, want 1..1"):
        kernels.encode_feedback(x, table, metric, feedback, sweeps=2)


@pytest.mark.parametrize("panel, rows", [(encode.FACTOR_PANEL, encode.FACTOR_ROWS), (16, 8)])
@pytest.mark.parametrize("columns, d", [(12, 4), (30, 4), (7, 3), (55, 3), (32, 2), (5, 1), (3, 8)])
def test_factors_multiply_to_h(
    columns: int, d: int, panel: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "FACTOR_PANEL", panel)
    monkeypatch.setattr(encode, "FACTOR_ROWS", rows)
    h = correlated(columns, 200)
    f = factorise(h, d, damping=0.0)
    length = len(f.feedback)
    padded = np.zeros((length, length))
    padded[:columns, :columns] = h
    padded += encode.FLOOR * np.diag(h).mean() * np.eye(length)
    order = (f.order[:, None] * d + np.arange(d)).ravel()
    padded = padded[order][:, order]
    middle = np.zeros((length, length))
    for i, block in enumerate(f.metric):
        middle[i * d : i * d + d, i * d : i * d + d] = block
    close = {"rtol": 0, "atol": 1e-6 * np.abs(padded).max()}
    assert np.allclose(f.feedback @ middle @ f.feedback.T, padded, **close)
    assert np.allclose(np.tril(f.feedback, -d), 0, atol=1e-6)
    for i, block in enumerate(f.fixed_metric):
        here = slice(i * d, i * d + d)
        assert np.allclose(block, padded[here, here], **close)
        assert np.allclose(f.fixed_feedback[:, here] @ block, padded[:, here], **close)
    mass = np.trace(f.fixed_metric, axis1=1, axis2=2)
    assert (np.diff(mass) <= 1e-6 * mass[0]).all()


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("rows, columns, d", [(40, 64, 4), (40, 61, 4), (9, 30, 8), (64, 24, 1)])
def test_feedback_lowers_the_output_error(rows: int, columns: int, d: int) -> None:
    weight, h = normal(5, rows, columns), correlated(columns, 500)
    codec = table_codec(d, 4**d if d < 4 else 64)
    cut = normalise(weight, d)
    plain, fed = encode_rows(cut, weight, codec), encode_rows(cut, weight, codec, h)
    gaps = [weight - decoded(e, codec, columns) for e in (plain, fed)]
    assert under(gaps[1], h) < 0.8 * under(gaps[0], h)
    assert fed.output_error == pytest.approx(under(gaps[1], h) / under(weight, h), rel=1e-4)
    for encoded, gap in zip((plain, fed), gaps, strict=True):
        assert encoded.error == pytest.approx((gap**2).sum() / (weight**2).sum(), rel=1e-4)
    assert np.isnan(plain.output_error)


def test_choosing_again_never_hurts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h = normal(5, 50, 48), correlated(48, 500)
    codec, cut = table_codec(4, 64), normalise(weight, 4)
    errors = []
    for again in range(4):
        monkeypatch.setattr(encode, "AGAIN", again)
        gap = cut.values - codec.table[encode_rows(cut, weight, codec, h).index].reshape(50, -1)
        h_damped = h + np.diag(encode.DAMPING * np.diag(h) + encode.FLOOR * np.diag(h).mean())
        errors.append(under(gap, h_damped))
    assert errors[0] > errors[1] > errors[2] >= errors[3]


def test_feedback_is_the_best_for_few_codewords() -> None:
    """Against all choices of a row: feedback comes near the best, nearest does not."""
    h, codec = correlated(4, 300), table_codec(1, 4, seed=3)
    weight = normal(6, 20, 4)
    cut = normalise(weight, 1)
    index = encode_rows(cut, weight, codec, h).index
    choices = np.stack(np.meshgrid(*[np.arange(4)] * 4, indexing="ij"), -1).reshape(-1, 4)
    for row, chosen in zip(cut.values, index, strict=True):
        gaps = row - codec.table[choices][..., 0]
        best = np.einsum("ni,ij,nj->n", gaps, h, gaps).min()
        gap = row - codec.table[chosen, 0]
        assert gap @ h @ gap <= 3 * best + 1e-6


@pytest.mark.parametrize("columns, d", [(16, 4), (17, 4), (5, 8)])
def test_identity_is_plain_nearest(columns: int, d: int) -> None:
    weight, codec = normal(5, 30, columns), table_codec(d, 40)
    cut = normalise(weight, d)
    plain = encode_rows(cut, weight, codec)
    fed = encode_rows(cut, weight, codec, np.eye(columns, dtype=np.float32))
    whole = columns // d  # the padding of the last sub-vector has no weight under H
    assert np.array_equal(fed.index[:, :whole], plain.index[:, :whole])
    assert fed.error <= plain.error * (1 + 1e-6)


@pytest.mark.parametrize(
    "weight",
    [
        np.zeros((3, 10), np.float32),
        np.vstack([np.zeros((1, 10), np.float32), normal(1, 2, 10)]),
        np.full((2, 10), 3.0, np.float32),
        normal(1, 1, 10),
        normal(1, 4, 1),
    ],
    ids=["zero", "a zero row", "constant", "one row", "one column"],
)
def test_awkward_matrices(weight: np.ndarray) -> None:
    codec = table_codec(4, 16)
    columns = weight.shape[1]
    for shift in (False, True):
        cut = normalise(weight, 4, row_shift=shift)
        for h in (None, correlated(columns, 50), np.zeros((columns, columns), np.float32)):
            encoded = encode_rows(cut, weight, codec, h)
            assert encoded.index.shape == (len(weight), -(-columns // 4))
            assert encoded.index.min() >= 0 and encoded.index.max() < 16
            assert np.isfinite(encoded.error)


def test_moments_of_few_tokens_do() -> None:
    x = normal(0, 3, 40)  # rank 3 of 40
    weight, codec = normal(1, 20, 40), table_codec(4, 64)
    cut, h = normalise(weight, 4), (x.T @ x / 3).astype(np.float32)
    fed = encode_rows(cut, weight, codec, h)
    plain = weight - decoded(encode_rows(cut, weight, codec), codec, 40)
    assert fed.output_error < under(plain, h) / under(weight, h)


def test_not_finite_moments_are_refused() -> None:
    h = np.eye(8, dtype=np.float32)
    h[1, 2] = np.nan
    with pytest.raises(PocketError, match="NaN or Inf"):
        factorise(h, 4)


def test_published_codec_is_encoded_by_the_nearest_latent() -> None:
    weight = normal(1, 60, 32)
    cut = normalise(weight, 4)
    codec = train_codec(cut.values, subvector=4, codewords=32, norm="rln", epochs=2).codec
    spec = CodecSpec("test", 4, 32, 16, "rln", "decoder")
    parts = {
        "codebook": codec.codebook.astype(np.float16),
        "decoder": codec.decoder.astype(np.float16),
    }
    stored = StoredCodec(spec, parts, codec.encoder)
    encoded = encode_rows(cut, weight, stored, correlated(32, 100))
    assert np.array_equal(encoded.index, stored.codec.assign(cut.values))
    values = stored.codec.reconstruct(encoded.index)
    gap = weight - denormalise(values, 32, encoded.scale, None)
    assert encoded.error == pytest.approx((gap**2).sum() / (weight**2).sum(), rel=1e-4)


@pytest.mark.parametrize("exponent", [-130, -70, 0, 70, 123])
def test_errors_of_very_large_and_small_weights(exponent: int) -> None:
    """Their squares are no float32 numbers."""
    weight, made = np.ldexp(normal(0, 40, 12), exponent), np.ldexp(normal(1, 40, 12), exponent)
    hessian = correlated(12, 50)
    squares = encode.squares_of(weight, made, hessian, len(weight))
    gap, whole = weight.astype(np.float64) - made, weight.astype(np.float64)
    want = [(gap**2).sum(), (whole**2).sum(), under(gap, hessian), under(whole, hessian)]
    np.testing.assert_allclose(squares, want, rtol=1e-4)


def test_what_comes_back_as_infinity_is_refused() -> None:
    weight = np.full((3, 4), 3e38, np.float32)
    made = weight.copy()
    made[1, 2] = np.inf
    with pytest.raises(PocketError, match="values up to 3e.38 some would come back as infinity"):
        encode.squares_of(weight, made, None, 3)
