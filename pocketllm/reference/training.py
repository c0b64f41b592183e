"""Plain NumPy twins of the training kernels: the oracle of csrc/mlp.c and csrc/train.c.

Everything is computed in float64, loops are written as array formulas, and nothing is tuned.
The notation is the one of docs/METHOD.md: a row of `length` values is `length / subvector`
sub-vectors of `subvector` (d) values; every MLP is `W2 gelu(W1 x + b1) + b2` with h hidden
units and its parameters lie flat as W1 (h, d), b1 (h), W2 (d, h), b2 (d).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NORM_EPS = 1e-5


class TrainStep(NamedTuple):
    """What one training step returns: losses, the chosen codewords, all gradients.

    loss = reconstruction + codebook_loss * commitment, where reconstruction is
    mean(weight * (rows - decoded)**2) and commitment is mean((latents - codeword)**2).
    indices: int32 (rows * length / subvector,).  grad_codebook: (K, subvector).
    grad_encoder, grad_decoder: flat, as the parameters.
    """

    loss: float
    reconstruction: float
    commitment: float
    indices: Array
    grad_encoder: Array
    grad_codebook: Array
    grad_decoder: Array


def mlp_size(subvector: int, hidden: int) -> int:
    """Number of parameters of one MLP; an encoder or a decoder has three of them."""
    return 2 * hidden * subvector + hidden + subvector


def _split(params: Array, subvector: int, hidden: int) -> tuple[Array, Array, Array, Array]:
    d, h = subvector, hidden
    w1, b1, w2, b2 = np.split(params, [h * d, h * d + h, 2 * h * d + h])
    return w1.reshape(h, d), b1, w2.reshape(d, h), b2


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _gelu(x: Array) -> tuple[Array, Array]:
    """gelu(x) in its exact (erf) form, and its derivative."""
    cdf = 0.5 * (1.0 + _erf(x / math.sqrt(2.0))) if x.size else x
    density = np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return x * cdf, cdf + x * density


def rln(x: Array, *, eps: float = NORM_EPS) -> Array:
    """Row layer norm without affine: each row of x (rows, length) to mean 0, variance 1."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)


def rln_backward(x: Array, grad: Array, *, eps: float = NORM_EPS) -> Array:
    """Gradient of rln with respect to x, given the gradient of its output."""
    x, grad = np.asarray(x, np.float64), np.asarray(grad, np.float64)
    centred = x - x.mean(axis=1, keepdims=True)
    inverse = 1.0 / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)
    unit = centred * inverse
    mean_grad = grad.mean(axis=1, keepdims=True)
    mean_product = (grad * unit).mean(axis=1, keepdims=True)
    return inverse * (grad - mean_grad - unit * mean_product)


def mlp(x: Array, params: Array, *, hidden: int) -> Array:
    """W2 gelu(W1 x + b1) + b2 for every row of x (n, d)."""
    x = np.asarray(x, np.float64)
    w1, b1, w2, b2 = _split(np.asarray(params, np.float64), x.shape[1], hidden)
    return _gelu(x @ w1.T + b1)[0] @ w2.T + b2


def mlp_backward(x: Array, params: Array, grad: Array, *, hidden: int) -> tuple[Array, Array]:
    """(grad_x (n, d), grad_params flat) of mlp, given grad (n, d) of its output."""
    x, grad = np.asarray(x, np.float64), np.asarray(grad, np.float64)
    w1, b1, w2, _ = _split(np.asarray(params, np.float64), x.shape[1], hidden)
    active, slope = _gelu(x @ w1.T + b1)
    grad_pre = (grad @ w2) * slope
    grad_params = np.concatenate(
        [
            (grad_pre.T @ x).ravel(),
            grad_pre.sum(axis=0),
            (grad.T @ active).ravel(),
            grad.sum(axis=0),
        ]
    )
    return grad_pre @ w1, grad_params


def _norm(x: Array, norm: str, length: int) -> Array:
    """N(x) of sub-vectors x (n, d): over the row ("rln"), the sub-vector ("ln") or nothing."""
    if norm == "input":
        return x
    return rln(x.reshape(-1, length) if norm == "rln" else x).reshape(x.shape)


def _norm_backward(x: Array, grad: Array, norm: str, length: int) -> Array:
    if norm == "input":
        return grad
    rows = (-1, length) if norm == "rln" else x.shape
    return rln_backward(x.reshape(rows), grad.reshape(rows)).reshape(x.shape)


def encode(rows: Array, params: Array, *, subvector: int, hidden: int, norm: str) -> Array:
    """Latents (rows, length) of rows (rows, length); params: flat encoder (3 MLPs)."""
    rows = np.asarray(rows, np.float64)
    length = rows.shape[1]
    p0, p1, p2 = np.split(np.asarray(params, np.float64), 3)
    z0 = mlp(rows.reshape(-1, subvector), p0, hidden=hidden)
    z1 = z0 + mlp(_norm(z0, norm, length), p1, hidden=hidden)
    z2 = z1 + mlp(_norm(z1, norm, length), p2, hidden=hidden)
    return _norm(z2, norm, length).reshape(rows.shape)


def encode_backward(
    rows: Array, params: Array, grad: Array, *, subvector: int, hidden: int, norm: str
) -> tuple[Array, Array]:
    """(grad_rows, grad_params) of encode, given grad (rows, length) of the latents."""
    rows = np.asarray(rows, np.float64)
    length = rows.shape[1]
    p0, p1, p2 = np.split(np.asarray(params, np.float64), 3)
    x = rows.reshape(-1, subvector)
    z0 = mlp(x, p0, hidden=hidden)
    n0 = _norm(z0, norm, length)
    z1 = z0 + mlp(n0, p1, hidden=hidden)
    n1 = _norm(z1, norm, length)
    z2 = z1 + mlp(n1, p2, hidden=hidden)
    grad_z2 = _norm_backward(z2, np.asarray(grad, np.float64).reshape(x.shape), norm, length)
    grad_n1, grad_p2 = mlp_backward(n1, p2, grad_z2, hidden=hidden)
    grad_z1 = grad_z2 + _norm_backward(z1, grad_n1, norm, length)
    grad_n0, grad_p1 = mlp_backward(n0, p1, grad_z1, hidden=hidden)
    grad_z0 = grad_z1 + _norm_backward(z0, grad_n0, norm, length)
    grad_x, grad_p0 = mlp_backward(x, p0, grad_z0, hidden=hidden)
    return grad_x.reshape(rows.shape), np.concatenate([grad_p0, grad_p1, grad_p2])


def decode(latents: Array, params: Array, *, subvector: int, hidden: int, norm: str) -> Array:
    """Rows (rows, length) decoded from codewords laid out as rows (rows, length)."""
    latents = np.asarray(latents, np.float64)
    length = latents.shape[1]
    p0, p1, p2 = np.split(np.asarray(params, np.float64), 3)
    y0 = latents.reshape(-1, subvector)
    y1 = y0 + mlp(_norm(y0, norm, length), p1, hidden=hidden)
    y2 = y1 + mlp(_norm(y1, norm, length), p2, hidden=hidden)
    return mlp(_norm(y2, norm, length), p0, hidden=hidden).reshape(latents.shape)


def decode_backward(
    latents: Array, params: Array, grad: Array, *, subvector: int, hidden: int, norm: str
) -> tuple[Array, Array]:
    """(grad_latents, grad_params) of decode, given grad (rows, length) of its output."""
    latents = np.asarray(latents, np.float64)
    length = latents.shape[1]
    p0, p1, p2 = np.split(np.asarray(params, np.float64), 3)
    y0 = latents.reshape(-1, subvector)
    n0 = _norm(y0, norm, length)
    y1 = y0 + mlp(n0, p1, hidden=hidden)
    n1 = _norm(y1, norm, length)
    y2 = y1 + mlp(n1, p2, hidden=hidden)
    n2 = _norm(y2, norm, length)
    out_grad = np.asarray(grad, np.float64).reshape(y0.shape)
    grad_n2, grad_p0 = mlp_backward(n2, p0, out_grad, hidden=hidden)
    grad_y2 = _norm_backward(y2, grad_n2, norm, length)
    grad_n1, grad_p2 = mlp_backward(n1, p2, grad_y2, hidden=hidden)
    grad_y1 = grad_y2 + _norm_backward(y1, grad_n1, norm, length)
    grad_n0, grad_p1 = mlp_backward(n0, p1, grad_y1, hidden=hidden)
    grad_y0 = grad_y1 + _norm_backward(y0, grad_n0, norm, length)
    return grad_y0.reshape(latents.shape), np.concatenate([grad_p0, grad_p1, grad_p2])


def train_step(
    rows: Array,
    encoder: Array,
    codebook: Array,
    decoder: Array,
    *,
    hidden: int,
    norm: str,
    codebook_loss: float = 0.5,
    weight: Array | None = None,
) -> TrainStep:
    """Losses and all gradients of one straight-through step on rows (rows, length).

    The gradient at the decoder's input goes to the latents as it is; the commitment term
    pulls latents and codewords towards each other.  weight: (rows, length), (length,) or None.
    """
    rows = np.asarray(rows, np.float64)
    book = np.asarray(codebook, np.float64)
    count, d = book.shape
    shape = {"subvector": d, "hidden": hidden, "norm": norm}
    latents = encode(rows, encoder, **shape)
    z = latents.reshape(-1, d)
    distance = 0.5 * (book**2).sum(axis=1) - z @ book.T
    index = distance.argmin(axis=1).astype(np.int32)
    chosen = book[index]
    decoded = decode(chosen.reshape(rows.shape), decoder, **shape)
    factor = np.ones_like(rows)
    if weight is not None:
        factor = np.broadcast_to(np.asarray(weight, np.float64), rows.shape)
    reconstruction = float((factor * (decoded - rows) ** 2).mean())
    commitment = float(((z - chosen) ** 2).mean())
    grad_decoded = 2.0 / rows.size * factor * (decoded - rows)
    grad_chosen, grad_decoder = decode_backward(
        chosen.reshape(rows.shape), decoder, grad_decoded, **shape
    )
    pull = 2.0 * codebook_loss / rows.size * (z - chosen)
    _, grad_encoder = encode_backward(
        rows, encoder, grad_chosen + pull.reshape(rows.shape), **shape
    )
    grad_codebook = np.zeros((count, d))
    np.add.at(grad_codebook, index, -pull)
    return TrainStep(
        reconstruction + codebook_loss * commitment,
        reconstruction,
        commitment,
        index,
        grad_encoder,
        grad_codebook,
        grad_decoder,
    )


def adam(
    param: Array,
    grad: Array,
    mean: Array,
    variance: Array,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> None:
    """One Adam update in place of param, mean and variance (same size); step counts from 1."""
    mean[...] = beta1 * mean + (1.0 - beta1) * grad
    variance[...] = beta2 * variance + (1.0 - beta2) * np.square(grad)
    corrected = np.sqrt(variance / (1.0 - beta2**step)) + eps
    param[...] -= lr / (1.0 - beta1**step) * mean / corrected


def cluster_sums(
    x: Array, index: Array, k: int, *, weight: Array | None = None
) -> tuple[Array, Array]:
    """(sum (d, k) of weight * x, mass of the weights) per codeword; see pocketllm.kernels."""
    x = np.asarray(x, np.float64)
    full = np.ones(x.shape)
    if weight is not None:
        full = np.broadcast_to(np.asarray(weight, np.float64).reshape(len(x), -1), x.shape)
    total, mass = np.zeros((k, x.shape[1])), np.zeros((k, x.shape[1]))
    np.add.at(total, index, full * x)
    np.add.at(mass, index, full)
    return total.T, mass.T if weight is not None and weight.ndim == 2 else mass[:, 0]
