"""The codec and its training: against PyTorch, against k-means, and where data is awkward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketllm import kernels
from pocketllm.allocate import SYMMETRIC_ERROR, Shape
from pocketllm.codec import Codec, KernelEngine, index_entropy, train_codec
from pocketllm.codec_init import identity_coder, linear_mlp, random_coder
from pocketllm.codec_torch import TorchCodec, train_torch
from pocketllm.config import PocketConfig
from pocketllm.errors import PocketError
from pocketllm.kmeans import draw_by_error, kmeans, refine_table
from pocketllm.layout import normalise
from pocketllm.schema import CodecSpec
from pocketllm.stored import train_stored_codec, with_signs

NORMS = ["input", "ln", "rln"]


def weights_like(seed: int, rows: int, columns: int, d: int) -> Any:
    """Normalised rows with heavy tails, as trained weights have."""
    rng = np.random.default_rng(seed)
    return normalise(rng.standard_t(6, (rows, columns)).astype(np.float32), d).values


def lloyd(x: Any, codewords: int, iterations: int, seed: int) -> float:
    """Plain k-means in float64: random vectors, means, no tricks. Returns the error per value."""
    rng = np.random.default_rng(seed)
    book = x[rng.choice(len(x), codewords, replace=False)].astype(np.float64)
    for last in range(iterations + 1):
        distance = (book**2).sum(1) - 2 * x @ book.T
        index = distance.argmin(1)
        if last == iterations:
            break
        for k in np.unique(index):
            book[k] = x[index == k].mean(0)
    return float(((x - book[index]) ** 2).mean())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("init", ["kmeans", "normal", "uniform"])
def test_c_loop_and_torch_loop_agree(norm: str, init: str) -> None:
    rows = weights_like(1, 48, 32, 4)
    settings: dict[str, Any] = {
        "subvector": 4,
        "codewords": 32,
        "norm": norm,
        "init": init,
        "epochs": 3,
        "batch": 128,
        "lr": 4e-3,
        "weight": np.linspace(0.5, 1.5, 32, dtype=np.float32),
        "seed": 5,
    }
    ours, theirs = train_codec(rows, **settings), train_torch(rows, **settings)
    for mine, other in zip(ours.history, theirs.history, strict=True):
        np.testing.assert_allclose(mine.loss, other.loss, rtol=2e-3)
        np.testing.assert_allclose(mine.reconstruction, other.reconstruction, rtol=2e-3)
        assert mine.lr == other.lr
    first_loss = (ours.history[0].loss, theirs.history[0].loss)
    np.testing.assert_allclose(*first_loss, rtol=2e-4)
    np.testing.assert_allclose(ours.error, theirs.error, rtol=1e-2)


@pytest.mark.parametrize("norm", NORMS)
def test_single_steps_of_both_engines_agree(norm: str) -> None:
    """Before rounding can grow: a few steps from the same codec."""
    from pocketllm.codec_torch import TorchEngine

    rows = weights_like(2, 24, 40, 5)
    rng = np.random.default_rng(3)
    codec = Codec(
        5,
        8,
        norm,
        random_coder(5, 8, rng),
        random_coder(5, 8, rng),
        rng.standard_normal((30, 5)).astype(np.float32),
    )
    ours, theirs = KernelEngine(codec, 0.5), TorchEngine(codec, 0.5, "cpu")
    for _ in range(3):
        mine, other = ours.step(rows, None, 1e-3), theirs.step(rows, None, 1e-3)
        np.testing.assert_allclose(mine[:3], other[:3], rtol=1e-5)
        assert (mine[3] == other[3]).mean() > 0.99
    np.testing.assert_allclose(ours.latents(rows), theirs.latents(rows), atol=2e-3)


def test_torch_codec_round_trip() -> None:
    rng = np.random.default_rng(4)
    book = rng.standard_normal((9, 4)).astype(np.float32)
    codec = Codec(4, 6, "rln", random_coder(4, 6, rng), random_coder(4, 6, rng), book)
    module = TorchCodec.from_codec(codec)
    back = module.to_codec()
    for name in ("encoder", "decoder", "codebook"):
        np.testing.assert_array_equal(getattr(codec, name), getattr(back, name))
    rows = weights_like(5, 7, 32, 4)
    with torch.no_grad():
        got = module(torch.tensor(rows)).numpy()
    np.testing.assert_allclose(got, codec.reconstruct(codec.assign(rows)), atol=2e-5)


@pytest.mark.parametrize("norm", ["input", "ln"])
def test_fold_is_the_decoder(norm: str) -> None:
    rows = weights_like(6, 40, 48, 4)
    codec = train_codec(rows, subvector=4, codewords=16, norm=norm, epochs=2).codec
    index = codec.assign(rows)
    table = codec.fold()
    assert table.shape == (16, 4) and index.shape == (40, 12)
    np.testing.assert_array_equal(table[index].reshape(rows.shape), codec.reconstruct(index))


def test_rln_does_not_fold() -> None:
    codec = train_codec(weights_like(7, 8, 16, 4), subvector=4, codewords=4, norm="rln").codec
    with pytest.raises(PocketError, match='norm: got "rln"'):
        codec.fold()


@pytest.mark.parametrize(("d", "h"), [(1, 2), (4, 16), (8, 16), (16, 32), (3, 7)])
def test_wide_mlps_start_as_the_identity(d: int, h: int) -> None:
    rng = np.random.default_rng(8)
    x = rng.standard_normal((500, d)).astype(np.float32) * 3
    np.testing.assert_allclose(kernels.mlp(x, linear_mlp(d, h, rng, x), hidden=h), x, atol=3e-6)
    params = identity_coder(d, h, rng, x)
    z = kernels.encode(x, params, subvector=d, hidden=h, norm="input")
    np.testing.assert_allclose(z, x, atol=3e-6)


def test_narrow_mlps_start_near_the_identity() -> None:
    rng = np.random.default_rng(9)
    x = rng.standard_normal((500, 16)).astype(np.float32)
    out = kernels.mlp(x, linear_mlp(16, 16, rng, x), hidden=16)
    assert np.abs(out - x).max() < 2e-2
    flat = x.copy()
    flat[:, 4:] = x[:, :4] @ rng.standard_normal((4, 12)).astype(np.float32)  # rank 4
    out = kernels.mlp(flat, linear_mlp(16, 4, rng, flat), hidden=4)
    assert np.square(out - flat).mean() < 1e-3 * np.square(flat).mean()


@pytest.mark.parametrize("norm", NORMS)
def test_same_seed_same_bytes(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = weights_like(10, 64, 72, 4)
    found = set()
    for threads in (1, 2, 3):
        monkeypatch.setattr(kernels, "_threads", lambda n=threads: n)
        result = train_codec(
            rows, subvector=4, codewords=64, norm=norm, epochs=3, batch=300, seed=3
        )
        codec = result.codec
        found.add(b"".join(a.tobytes() for a in (codec.encoder, codec.decoder, codec.codebook)))
    assert len(found) == 1
    other = train_codec(rows, subvector=4, codewords=64, norm=norm, epochs=3, batch=300, seed=4)
    assert other.codec.codebook.tobytes() not in next(iter(found))


@pytest.mark.parametrize(("d", "codewords"), [(4, 64), (2, 16), (8, 256)])
def test_not_worse_than_plain_kmeans(d: int, codewords: int) -> None:
    """The folded codec, refined, and the published one on rows without a mean of their own."""
    rng = np.random.default_rng(11)
    weight = rng.standard_t(6, (96, 256)).astype(np.float32)
    rows = normalise(weight, d, row_shift=True).values
    x = rows.reshape(-1, d)
    plain = lloyd(x, codewords, 20, 12)
    settings: dict[str, Any] = {"subvector": d, "codewords": codewords, "batch": 1024}
    codec = train_codec(rows, norm="input", **settings).codec
    table = refine_table(codec.fold(), rows)
    _, error = kernels.nearest(x, table, return_error=True)
    assert error.mean() / d <= 1.005 * plain  # local minima differ by more than that
    published = train_codec(rows, norm="rln", **settings)
    assert published.error <= 1.01 * plain


def test_published_start_learns() -> None:
    rows = weights_like(13, 128, 64, 4)
    result = train_codec(
        rows, subvector=4, codewords=32, norm="rln", init="normal", epochs=40, batch=256
    )
    assert result.history[-1].reconstruction < 0.5 * result.history[0].reconstruction
    assert not result.warnings
    assert 0 < result.entropy <= 5


def test_rows_of_several_lengths() -> None:
    rows = [weights_like(14, 32, 64, 4), weights_like(15, 16, 96, 4)]
    result = train_codec(rows, subvector=4, codewords=32, norm="rln", epochs=4, batch=256)
    errors = [np.square(r - result.codec.reconstruct(result.codec.assign(r))).sum() for r in rows]
    np.testing.assert_allclose(result.error, sum(errors) / sum(r.size for r in rows), rtol=1e-5)


def test_dead_codewords_are_revived() -> None:
    rows = weights_like(16, 64, 64, 4)
    codec = train_codec(rows, subvector=4, codewords=32, epochs=0).codec
    codec.codebook[5:] = 1e3  # 27 codewords that nothing chooses
    result = train_codec(
        rows,
        subvector=4,
        codewords=32,
        epochs=5,
        batch=256,
        engine=lambda _, w: KernelEngine(codec, w),
    )
    assert result.history[0].usage < 0.2 and result.history[0].revived == 27
    assert result.usage > 0.9 and not result.warnings


def test_collapse_is_reported() -> None:
    rows = np.tile(weights_like(17, 3, 4, 4), (64, 16))  # three different sub-vectors
    result = train_codec(rows, subvector=4, codewords=64, epochs=2)
    assert result.usage <= 3 / 64
    assert len(result.warnings) == 1 and "codebook collapse" in result.warnings[0]


@pytest.mark.parametrize("norm", NORMS)
def test_constant_rows(norm: str) -> None:
    rows = np.zeros((8, 32), np.float32)
    result = train_codec(rows, subvector=4, codewords=8, norm=norm, epochs=2)
    assert np.isfinite(result.error) and np.isfinite(result.codec.codebook).all()
    rows = normalise(np.full((8, 32), 3.0, np.float32), 4).values
    result = train_codec(rows, subvector=4, codewords=8, norm=norm, epochs=2)
    assert np.isfinite(result.codec.reconstruct(result.codec.assign(rows))).all()


def test_bad_settings_say_so() -> None:
    rows = weights_like(18, 2, 16, 4)
    with pytest.raises(PocketError, match="codewords: got 9 for 8 sub-vectors"):
        train_codec(rows, subvector=4, codewords=9)
    with pytest.raises(PocketError, match="codewords: got 9 for 8 sub-vectors"):
        kmeans(rows.reshape(-1, 4), 9)
    with pytest.raises(PocketError, match=r"rows: got shape \(2, 16\), want .* multiple of .* 3"):
        train_codec(rows, subvector=3, codewords=2)
    with pytest.raises(PocketError, match="subvector: got 17, want 1 to 16"):
        train_codec(rows, subvector=17, codewords=2)
    with pytest.raises(PocketError, match="norm: got 'batch'"):
        train_codec(rows, subvector=4, codewords=2, norm="batch")
    with pytest.raises(PocketError, match="init: got 'zeros'"):
        train_codec(rows, subvector=4, codewords=2, init="zeros")
    with pytest.raises(PocketError, match=r"weight: got shape \(3,\), want \(2, 16\) or \(16,\)"):
        train_codec(rows, subvector=4, codewords=2, weight=np.ones(3, np.float32))


def test_kmeans_is_a_fixed_point_of_exact_assignment() -> None:
    x = np.random.default_rng(19).standard_normal((3000, 3)).astype(np.float32)
    seen: list[float] = []
    found = kmeans(x, 50, iterations=12, progress=seen.append)
    distance = ((x[:, None].astype(np.float64) - found.codebook[None]) ** 2).sum(2)
    np.testing.assert_allclose(distance.min(1).mean() / 3, found.error, rtol=1e-5)
    np.testing.assert_array_equal(np.unique(found.index), np.arange(50))
    assert found.used == 50 and seen == sorted(seen) and len(seen) == 12
    assert found.error < lloyd(x, 50, 12, 20) * 1.02


@pytest.mark.parametrize("d", [4, 11])
def test_kmeans_with_a_weight_for_every_value(d: int) -> None:
    rng = np.random.default_rng(21)
    x = rng.standard_normal((800, d)).astype(np.float32)
    weight = rng.uniform(0.1, 3, (800, d)).astype(np.float32)
    found = kmeans(x, 20, weight=weight, iterations=6)
    cost = (weight[:, None] * (x[:, None] - found.codebook[None]).astype(np.float64) ** 2).sum(2)
    np.testing.assert_allclose(cost.min(1).mean() / d, found.error, rtol=1e-5)
    blind = kmeans(x, 20, iterations=6)
    gap = x - blind.codebook[blind.index]
    assert found.error < (weight * gap * gap).mean()


def test_kmeans_with_a_weight_for_every_vector() -> None:
    x = np.array([[0.0], [1.0], [10.0], [11.0]], np.float32)
    weight = np.array([1, 3, 1, 1], np.float32)
    found = kmeans(x, 2, weight=weight, iterations=5, seed=1)
    np.testing.assert_allclose(np.sort(found.codebook[:, 0]), [0.75, 10.5])


def test_refined_table_is_never_worse() -> None:
    rows = weights_like(22, 64, 64, 4)
    weight = np.linspace(0.1, 4, 64, dtype=np.float32)
    full = np.broadcast_to(weight, rows.shape).reshape(-1, 4)

    def error(table: Any) -> float:
        cost = full[:, None] * (rows.reshape(-1, 1, 4) - table[None]) ** 2
        return float(cost.sum(2).min(1).mean())

    start = kmeans(rows.reshape(-1, 4), 32, iterations=10).codebook
    better = refine_table(start, rows, weight=weight, iterations=4)
    assert error(better) < error(start)
    np.testing.assert_array_equal(refine_table(start, rows, weight=weight, iterations=0), start)


def test_draw_by_error_prefers_large_errors() -> None:
    rng = np.random.default_rng(23)
    error = np.array([0, 0, 1e-6, 5, 7, 9], np.float32)
    assert sorted(draw_by_error(error, 3, rng)) == [3, 4, 5]
    assert sorted(draw_by_error(error, 6, rng)) == [2, 3, 4, 5]
    assert len(draw_by_error(np.zeros(4, np.float32), 2, rng)) == 0


def test_index_entropy() -> None:
    assert index_entropy(np.array([4, 4, 4, 4])) == 2.0
    assert index_entropy(np.array([0, 9, 0])) == 0.0


def test_codec_beats_plain_kmeans_on_the_reference_model(reference_model: Path) -> None:
    from safetensors import safe_open

    with safe_open(reference_model / "model.safetensors", "pt") as file:
        name = "model.layers.3.mlp.up_proj.weight"
        weight = file.get_tensor(name).float().numpy()
    rows = normalise(weight[:192], 4).values
    codec = train_codec(rows, subvector=4, codewords=64, batch=1024).codec
    table = refine_table(codec.fold(), rows)
    _, error = kernels.nearest(rows.reshape(-1, 4), table, return_error=True)
    assert error.mean() / 4 <= lloyd(rows.reshape(-1, 4), 64, 20, 24)


@pytest.mark.parametrize(("d", "codewords"), [(2, 64), (4, 200)])
def test_short_training_stores_as_good_a_table_as_the_published_steps(
    d: int, codewords: int
) -> None:
    rows = weights_like(5, 256, 512, d)
    spec = CodecSpec("c", d, codewords, 16, "input", "table-int8")

    def error(**settings: Any) -> float:
        table = train_stored_codec([rows], spec, PocketConfig(**settings)).table
        _, errors = kernels.nearest(rows.reshape(-1, d), table, return_error=True)
        return float(errors.mean())

    assert error() <= 1.005 * error(batch=16384, epochs=75)


def test_magnitudes_with_all_their_signs() -> None:
    magnitudes = np.array([[1, 2, 3], [4, 5, 6]], np.int8)
    table = with_signs(magnitudes)
    assert table.dtype == np.int8
    for row, values in enumerate(table):
        for j, value in enumerate(values):
            sign = -1 if row >> (1 + j) & 1 else 1
            assert value == sign * magnitudes[row % 2, j]


@pytest.mark.parametrize("shape", [Shape(4, 256), Shape(2, 64)])
def test_symmetric_tables_err_as_much_as_predicted(shape: Shape) -> None:
    d, codewords = shape.subvector, shape.codewords
    rows = np.random.default_rng(7).standard_normal((256 * d, 1024), np.float32)
    spec = CodecSpec("c", d, codewords, 16, "input", "table-int8")
    errors = {}
    for prefer in ("quality", "speed"):
        parts = train_stored_codec([rows], spec, PocketConfig(prefer=prefer)).parts
        table = parts["table"].astype(np.float32) * parts["table_scale"]
        _, error = kernels.nearest(rows.reshape(-1, d), table, return_error=True)
        errors[prefer] = float(error.mean())
    magnitudes = parts["table"][: codewords >> d]
    assert (magnitudes >= 0).all()
    np.testing.assert_array_equal(parts["table"], with_signs(magnitudes))
    assert abs(errors["speed"] / errors["quality"] / SYMMETRIC_ERROR[shape] - 1) < 0.02


@pytest.mark.parametrize("kind", ["mean", "correlated", "constant"])
def test_tables_are_not_symmetric_where_signs_are_not_random(kind: str) -> None:
    rows = np.random.default_rng(7).standard_normal((64, 512), np.float32)
    if kind == "mean":
        rows += np.float32(0.5)
    elif kind == "correlated":
        rows[:, 1::2] += rows[:, ::2]
    else:
        rows[:, 1::2] = 0
    spec = CodecSpec("c", 2, 64, 16, "input", "table-int8")
    table = train_stored_codec([rows], spec, PocketConfig(prefer="speed")).parts["table"]
    assert not np.array_equal(table, with_signs(table[:16]))
