"""Where a codec starts: MLPs at the identity or random, codebook from k-means or a distribution.

gelu(a) - gelu(-a) = a, so an MLP with h >= 2 d hidden units can be the identity exactly. With that
as first MLP, zeros behind the residual ones, and a k-means codebook, a codec starts at the k-means
solution and training goes on from there. The published start is random MLPs and a codebook drawn
from a normal distribution with the spread of the latents.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import kernels
from .kmeans import kmeans

# Sub-vectors that the k-means of the start looks at in all but its last two iterations.
SAMPLE_PER_CODEWORD = 64
SAMPLE_LEAST = 65536

# Where gelu is as good as the identity: gelu(u) = u within 1e-4 for u above this.
STRAIGHT = 4.0
# How much of that range a standard deviation of the input takes; 12.8 of them fit.
SLOPE = 0.3125


def mlp_size(subvector: int, hidden: int) -> int:
    """Parameters of one MLP; an encoder or a decoder has three."""
    return 2 * hidden * subvector + hidden + subvector


def join(w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, b2: np.ndarray) -> np.ndarray:
    """One MLP's flat parameters of W1 (h, d), b1 (h), W2 (d, h), b2 (d)."""
    return np.concatenate([w1.ravel(), b1, w2.ravel(), b2]).astype(np.float32)


def linear_mlp(subvector: int, hidden: int, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """An MLP that computes x as well as its width allows.

    Exactly with h >= 2 d, within about 1e-2 with h >= d (one hidden unit a value, shifted to where
    gelu is straight), and on the h strongest principal directions of x (n, d) below that. Hidden
    units left over are random and count nothing yet.
    """
    d, h = subvector, hidden
    w1, b1 = random_layer(d, h, rng)
    w2, b2 = np.zeros((d, h)), np.zeros(d)
    if h >= 2 * d:
        w1[: 2 * d] = np.concatenate([np.eye(d), -np.eye(d)])
        b1[: 2 * d] = 0.0
        w2[:, : 2 * d] = np.concatenate([np.eye(d), -np.eye(d)], axis=1)
        return join(w1, b1, w2, b2)
    basis, rank = np.eye(d), min(d, h)
    if h < d and len(x):
        _, basis = np.linalg.eigh(np.cov(x.T.astype(np.float64), bias=True).reshape(d, d))
        basis = basis[:, ::-1].T
    basis = basis[:rank]
    w1[:rank] = SLOPE * basis
    b1[:rank] = STRAIGHT
    w2[:, :rank] = 1.0 / SLOPE * basis.T
    b2 = -w2[:, :rank] @ np.full(rank, STRAIGHT)
    return join(w1, b1, w2, b2)


def random_layer(
    subvector: int, hidden: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """W1 and b1 as torch.nn.Linear draws them."""
    bound = 1.0 / np.sqrt(subvector)
    return rng.uniform(-bound, bound, (hidden, subvector)), rng.uniform(-bound, bound, hidden)


def random_mlp(subvector: int, hidden: int, rng: np.random.Generator) -> np.ndarray:
    """An MLP as torch.nn.Linear initialises its layers."""
    w1, b1 = random_layer(subvector, hidden, rng)
    bound = 1.0 / np.sqrt(hidden)
    w2, b2 = rng.uniform(-bound, bound, (subvector, hidden)), rng.uniform(-bound, bound, subvector)
    return join(w1, b1, w2, b2)


def zero_mlp(subvector: int, hidden: int, rng: np.random.Generator) -> np.ndarray:
    """An MLP with a random first layer and a second one of zeros: its residual branch is silent."""
    w1, b1 = random_layer(subvector, hidden, rng)
    return join(w1, b1, np.zeros((subvector, hidden)), np.zeros(subvector))


def identity_coder(
    subvector: int, hidden: int, rng: np.random.Generator, x: np.ndarray
) -> np.ndarray:
    """Encoder or decoder parameters that compute N(x) (see :func:`linear_mlp`)."""
    first = linear_mlp(subvector, hidden, rng, x)
    return np.concatenate([first, *(zero_mlp(subvector, hidden, rng) for _ in range(2))])


def random_coder(subvector: int, hidden: int, rng: np.random.Generator) -> np.ndarray:
    """Encoder or decoder parameters as torch.nn.Linear initialises its layers."""
    return np.concatenate([random_mlp(subvector, hidden, rng) for _ in range(3)])


def kmeans_start(
    groups: list[np.ndarray],
    subvector: int,
    codewords: int,
    hidden: int,
    norm: str,
    *,
    iterations: int,
    seed: int,
    progress: Callable[[float], None] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(encoder, decoder, codebook) at the k-means solution of the encoder's latents.

    groups: matrices of normalised rows (R, L*d).
    """
    d = subvector
    rng = np.random.default_rng(seed)
    shape = {"subvector": d, "hidden": hidden}
    x = np.concatenate([rows.reshape(-1, d) for rows in groups])
    encoder = identity_coder(d, hidden, rng, x)
    latents = [kernels.encode(rows, encoder, norm=norm, **shape) for rows in groups]
    z = np.concatenate([rows.reshape(-1, d) for rows in latents])
    sample = max(SAMPLE_PER_CODEWORD * codewords, SAMPLE_LEAST)
    found = kmeans(z, codewords, iterations=iterations, sample=sample, seed=seed, progress=progress)
    decoder = identity_coder(d, hidden, rng, z)
    if norm != "input":
        # N gives what it returns variance 1, codewords have less: the best factor by least squares.
        product, power, first = 0.0, 0.0, 0
        for rows in groups:
            last = first + rows.size // d
            chosen = found.codebook[found.index[first:last]].reshape(rows.shape)
            unit = kernels.decode(chosen, decoder, norm=norm, **shape)
            product += float(np.vdot(unit, rows))
            power += float(np.vdot(unit, unit))
            first = last
        scaled = slice(mlp_size(d, hidden) - d * hidden - d, mlp_size(d, hidden))
        decoder[scaled] *= product / power if power > 0 else 1.0
    return encoder, decoder, found.codebook


def random_start(
    groups: list[np.ndarray],
    subvector: int,
    codewords: int,
    hidden: int,
    norm: str,
    uniform: bool,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(encoder, decoder, codebook) as published: random MLPs, codewords drawn with the mean and
    spread of the latents in each dimension, from a normal or a uniform distribution."""
    d = subvector
    rng = np.random.default_rng(seed)
    encoder, decoder = random_coder(d, hidden, rng), random_coder(d, hidden, rng)
    latents = [
        kernels.encode(rows, encoder, subvector=d, hidden=hidden, norm=norm) for rows in groups
    ]
    z = np.concatenate([rows.reshape(-1, d) for rows in latents])
    if uniform:
        draw = rng.uniform(-np.sqrt(3), np.sqrt(3), (codewords, d))
    else:
        draw = rng.standard_normal((codewords, d))
    book = z.mean(0, dtype=np.float64) + draw * z.std(0, dtype=np.float64)
    return encoder, decoder, book.astype(np.float32)
