"""Training kernels against their float64 NumPy twins, and the twins against torch autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pocketllm import kernels
from pocketllm.reference import training as reference

NORMS = ["input", "ln", "rln"]
# (rows, sub-vectors a row, d, h): one lane, full and broken blocks, several units, odd channels
SHAPES = [
    (1, 1, 1, 1),
    (1, 3, 4, 16),
    (3, 17, 8, 16),
    (5, 64, 4, 16),
    (2, 131, 3, 5),
    (7, 43, 16, 33),
]


def normal(seed: int, *shape: int, scale: float = 1.0) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    """Equal within a share of the largest value: sums in float32 against sums in float64."""
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0.0) <= tolerance * (1.0 + np.abs(want).max(initial=0.0))


def coder_params(seed: int, d: int, h: int, mlps: int = 3) -> Any:
    return normal(seed, mlps * reference.mlp_size(d, h), scale=0.5)


@pytest.mark.kernels
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 257])
def test_rln(isa: str, length: int) -> None:
    x, grad = normal(1, 5, length) * 3 + 7, normal(2, 5, length)
    x[2] = 4.0  # constant row
    close(kernels.rln(x), reference.rln(x), 1e-4)
    moving = np.delete(x, 2, axis=0)
    close(
        kernels.rln_backward(moving, np.delete(grad, 2, axis=0)),
        reference.rln_backward(moving, np.delete(grad, 2, axis=0)),
        1e-4,
    )
    assert kernels.rln(x[:0]).shape == (0, length)


@pytest.mark.kernels
def test_gelu_is_within_5e7(isa: str) -> None:
    """mlp with W1 = W2 = 1 is gelu itself; its gradient is the slope."""
    x = np.linspace(-14, 14, 40001, dtype=np.float32)[:, None]
    params = np.array([1, 0, 1, 0], np.float32)
    value, slope = reference._gelu(x.astype(np.float64))
    got = kernels.mlp(x, params, hidden=1)
    # gelu = x Phi(x): an error of erf below 5e-7 is one of Phi below 2.5e-7.
    nonzero = np.abs(x) > 1e-3
    cdf = (got / np.where(nonzero, x, 1))[nonzero]
    assert np.abs(2 * cdf - 2 * (value / np.where(nonzero, x, 1))[nonzero]).max() < 5e-7
    got_slope, _ = kernels.mlp_backward(x, params, np.ones_like(x), hidden=1)
    assert np.abs(got_slope - slope).max() < 5e-7
    far = np.array([[-1e30], [1e30]], np.float32)
    np.testing.assert_allclose(kernels.mlp(far, params, hidden=1), [[0], [1e30]], atol=1e-30)
    far_slope, _ = kernels.mlp_backward(far, params, np.ones_like(far), hidden=1)
    np.testing.assert_allclose(far_slope, [[0], [1]], atol=1e-30)


@pytest.mark.kernels
@pytest.mark.parametrize("n", [0, 1, 16, 63, 64, 65, 257, 1031])
@pytest.mark.parametrize(("d", "h"), [(1, 1), (4, 16), (5, 7), (16, 64)])
def test_mlp(isa: str, n: int, d: int, h: int) -> None:
    x, params, grad = normal(3, n, d), coder_params(4, d, h, 1), normal(5, n, d)
    close(kernels.mlp(x, params, hidden=h), reference.mlp(x, params, hidden=h))
    got = kernels.mlp_backward(x, params, grad, hidden=h)
    for ours, want in zip(got, reference.mlp_backward(x, params, grad, hidden=h), strict=True):
        close(ours, want)


@pytest.mark.kernels
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("rows", "per_row", "d", "h"), SHAPES)
def test_coders(isa: str, rows: int, per_row: int, d: int, h: int, norm: str) -> None:
    x, params = normal(6, rows, per_row * d), coder_params(7, d, h)
    grad, shape = normal(8, rows, per_row * d), {"subvector": d, "hidden": h, "norm": norm}
    for name in ("encode", "decode"):
        close(
            getattr(kernels, name)(x, params, **shape), getattr(reference, name)(x, params, **shape)
        )
        got = getattr(kernels, name + "_backward")(x, params, grad, **shape)
        want = getattr(reference, name + "_backward")(x, params, grad, **shape)
        for ours, theirs in zip(got, want, strict=True):
            close(ours, theirs, 1e-4)


@pytest.mark.kernels
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("weighted", [None, "row", "element"])
@pytest.mark.parametrize(("rows", "per_row", "d", "h"), SHAPES)
def test_train_step(
    isa: str, rows: int, per_row: int, d: int, h: int, norm: str, weighted: str | None
) -> None:
    length, count = per_row * d, 19
    x = normal(9, rows, length)
    weight = None
    if weighted:
        weight = np.abs(normal(10, *((length,) if weighted == "row" else (rows, length)))) + 0.1
    inputs = (x, coder_params(11, d, h), normal(12, count, d), coder_params(13, d, h))
    settings = {"hidden": h, "norm": norm, "codebook_loss": 0.3, "weight": weight}
    got = kernels.train_step(*inputs, **settings)
    want = reference.train_step(*inputs, **settings)
    agree = got.indices == want.indices
    assert agree.mean() > 0.99, "only near-ties may differ between float32 and float64"
    if not agree.all():
        pytest.skip("a near-tie was decided the other way")
    for ours, theirs in zip(got, want, strict=True):
        close(np.asarray(ours), np.asarray(theirs), 1e-4)


@pytest.mark.kernels
def test_train_step_with_a_large_codebook(isa: str) -> None:
    """The latents are searched for all at once; codewords far from them all change nothing."""
    d, h, near = 4, 8, 4000
    x, book = normal(40, 40, 256 * d), normal(41, near, d)
    encoder, decoder = coder_params(42, d, h), coder_params(43, d, h)
    want = kernels.train_step(x, encoder, book, decoder, hidden=h, norm="rln")
    larger = np.concatenate([book, np.full((96, d), 1e4, np.float32)])
    got = kernels.train_step(x, encoder, larger, decoder, hidden=h, norm="rln")
    assert not got.grad_codebook[near:].any()
    for ours, theirs in zip(got, want, strict=True):
        assert np.array_equal(ours[:near] if np.shape(ours) == larger.shape else ours, theirs)


def step_bytes(threads: int, monkeypatch: pytest.MonkeyPatch, norm: str) -> bytes:
    monkeypatch.setattr(kernels, "_threads", lambda: threads)
    d, h = 4, 16
    x = normal(14, 37, 31 * d)
    step = kernels.train_step(
        x, coder_params(15, d, h), normal(16, 300, d), coder_params(17, d, h), hidden=h, norm=norm
    )
    param, mean, variance = step.grad_encoder.copy(), step.grad_encoder * 0, step.grad_encoder**2
    kernels.adam(param, step.grad_encoder, mean, variance, step=3, lr=0.01)
    sums = kernels.cluster_sums(x.reshape(-1, d), step.indices, 300)
    rln = kernels.rln_backward(x, x[::-1].copy())
    return b"".join(
        np.asarray(part).tobytes() for part in (*step, param, mean, variance, *sums, rln)
    )


@pytest.mark.kernels
@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_on_every_isa_and_thread_count(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = kernels.isa(), set()
    try:
        for isa in kernels.available_isas():
            kernels.set_isa(isa)
            seen |= {step_bytes(threads, monkeypatch, norm) for threads in (1, 2, 5)}
    finally:
        kernels.set_isa(before)
    assert len(seen) == 1


@pytest.mark.kernels
@pytest.mark.parametrize("n", [0, 1, 7, 16, 100003])
def test_adam(isa: str, n: int) -> None:
    param, grad, mean = (normal(seed, n) for seed in (18, 19, 20))
    variance = np.abs(normal(21, n))
    want = [a.astype(np.float64) for a in (param, mean, variance)]
    for step in (1, 2, 3):
        kernels.adam(param, grad, mean, variance, step=step, lr=0.1)
        reference.adam(want[0], grad.astype(np.float64), want[1], want[2], step=step, lr=0.1)
    for ours, theirs in zip((param, mean, variance), want, strict=True):
        close(ours, theirs, 1e-5)


@pytest.mark.kernels
@pytest.mark.parametrize("d", [1, 4, 7])
@pytest.mark.parametrize("kind", ["none", "vector", "element"])
def test_cluster_sums(isa: str, d: int, kind: str) -> None:
    n, k = 1001, 37
    x, index = normal(22, n, d), np.random.default_rng(23).integers(0, k, n).astype(np.int32)
    shape = {"none": None, "vector": (n,), "element": (n, d)}[kind]
    weight = None if shape is None else np.abs(normal(24, *shape))
    total, mass = kernels.cluster_sums(x, index, k, weight=weight)
    want = reference.cluster_sums(x, index, k, weight=weight)
    np.testing.assert_allclose(total, want[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(mass, want[1], rtol=1e-12)


@pytest.mark.kernels
def test_strided_and_read_only_input() -> None:
    wide = normal(25, 6, 64)
    strided, frozen = wide[::2, ::2], wide.copy()
    frozen.setflags(write=False)
    params = coder_params(26, 4, 8)
    shape: dict[str, Any] = {"subvector": 4, "hidden": 8, "norm": "rln"}
    np.testing.assert_array_equal(
        kernels.encode(strided, params, **shape), kernels.encode(strided.copy(), params, **shape)
    )
    np.testing.assert_array_equal(kernels.rln(frozen), kernels.rln(wide))
    with pytest.raises(ValueError, match="param: got a strided or read-only array"):
        kernels.adam(frozen[0], wide[0], wide[1], wide[2], step=1, lr=0.1)


@pytest.mark.kernels
def test_boundary_messages() -> None:
    x, params, book = normal(27, 3, 8), coder_params(28, 4, 8), normal(29, 5, 4)
    shape: dict[str, Any] = {"subvector": 4, "hidden": 8, "norm": "input"}
    with pytest.raises(TypeError, match=r"x: got float64 \(3, 8\), want float32 \(r, l\)"):
        kernels.rln(x.astype(np.float64))
    with pytest.raises(ValueError, match=r"grad: got float32 \(2, 8\), want float32 \(3, 8\)"):
        kernels.rln_backward(x, x[:2])
    with pytest.raises(ValueError, match="norm: got 'batch', want one of input, ln, rln"):
        kernels.encode(x, params, subvector=4, hidden=8, norm="batch")
    with pytest.raises(ValueError, match="rows: got length 8, want a multiple of subvector 3"):
        kernels.encode(x, params, subvector=3, hidden=8, norm="ln")
    with pytest.raises(ValueError, match=r"params: got float32 \(228,\), want float32 \(336,\)"):
        kernels.decode(x, params, subvector=4, hidden=12, norm="ln")
    with pytest.raises(ValueError, match=r"subvector: got 17, want 1\.\.16"):
        kernels.encode(x, params, subvector=17, hidden=8, norm="ln")
    with pytest.raises(ValueError, match=r"hidden: got 65, want 1\.\.64"):
        kernels.encode(x, params, subvector=4, hidden=65, norm="ln")
    with pytest.raises(ValueError, match=r"x: length of a row: got 17, want 1\.\.16"):
        kernels.mlp(normal(30, 2, 17), params, hidden=8)
    with pytest.raises(ValueError, match="rows: number of values: got 0"):
        kernels.train_step(x[:0], params, book, params, hidden=8, norm="ln")
    with pytest.raises(ValueError, match=r"weight: got float32 \(7,\), want float32 \(8,\)"):
        kernels.train_step(x, params, book, params, hidden=8, norm="ln", weight=x[0, :7])
    with pytest.raises(TypeError, match="codebook: got list, want a NumPy array"):
        kernels.train_step(x, params, [1.0], params, hidden=8, norm="ln")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"index: got 9, want 0\.\.4"):
        kernels.cluster_sums(book, np.array([0, 9, 1, 2, 3], np.int32), 5)
    with pytest.raises(ValueError, match=r"index: got -1, want 0\.\.4"):
        kernels.cluster_sums(book, np.array([0, -1, 1, 2, 3], np.int32), 5)
    with pytest.raises(ValueError, match="step: got 0"):
        kernels.adam(x[0], x[1], x[1].copy(), x[2], step=0, lr=0.1)
    assert kernels.encode(x[:0], params, **shape).shape == (0, 8)
    grad_rows, grad_params = kernels.decode_backward(x[:0], params, x[:0], **shape)
    assert grad_rows.shape == (0, 8) and not grad_params.any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("rows", "per_row", "d", "h"), SHAPES[1:])
def test_reference_gradients_are_autograds(
    rows: int, per_row: int, d: int, h: int, norm: str
) -> None:
    """The twins' formulas against torch's autograd on the package's PyTorch codec, in float64."""
    import torch

    from pocketllm.codec_torch import TorchCodec

    x = torch.tensor(normal(31, rows, per_row * d), dtype=torch.float64)
    arrays = (coder_params(32, d, h), normal(33, 11, d), coder_params(34, d, h))
    codec = TorchCodec.from_arrays(
        encoder=arrays[0], codebook=arrays[1], decoder=arrays[2], hidden=h, norm=norm
    ).double()
    weight = np.abs(normal(35, per_row * d)) + 0.1
    out = codec.losses(x, codebook_loss=0.3, weight=torch.tensor(weight, dtype=torch.float64))
    out.loss.backward()
    want = reference.train_step(
        x.numpy(), *arrays, hidden=h, norm=norm, codebook_loss=0.3, weight=weight
    )
    np.testing.assert_array_equal(out.indices.numpy(), want.indices)
    np.testing.assert_allclose(out.loss.item(), want.loss, rtol=1e-10)
    grads = codec.flat_gradients()
    for name in ("encoder", "codebook", "decoder"):
        np.testing.assert_allclose(
            grads[name], getattr(want, "grad_" + name), rtol=1e-7, atol=1e-12
        )

    shape: dict[str, Any] = {"subvector": d, "hidden": h, "norm": norm}
    for name, params in (("encode", arrays[0]), ("decode", arrays[2])):
        leaf = x.clone().requires_grad_()
        getattr(codec, name)(leaf).pow(3).sum().backward()
        value = getattr(reference, name)(x.numpy(), params, **shape)
        got, _ = getattr(reference, name + "_backward")(x.numpy(), params, 3 * value**2, **shape)
        assert leaf.grad is not None
        np.testing.assert_allclose(got, leaf.grad.numpy(), rtol=1e-7, atol=1e-9)


def test_kernel_gradients_are_autograds() -> None:
    """The kernel's gradients straight against autograd in float64, at the published shape."""
    import torch

    from pocketllm.codec_torch import TorchCodec

    d, h = 8, 16
    x = normal(36, 9, 29 * d)
    arrays = (coder_params(37, d, h), normal(38, 50, d), coder_params(39, d, h))
    codec = TorchCodec.from_arrays(
        encoder=arrays[0], codebook=arrays[1], decoder=arrays[2], hidden=h, norm="rln"
    ).double()
    out = codec.losses(torch.tensor(x, dtype=torch.float64), codebook_loss=0.5)
    out.loss.backward()
    got = kernels.train_step(x, *arrays, hidden=h, norm="rln")
    np.testing.assert_array_equal(got.indices, out.indices.numpy())
    for name, grad in codec.flat_gradients().items():
        close(getattr(got, "grad_" + name), grad, 1e-4)
