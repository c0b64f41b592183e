"""Plain NumPy twins of the products with rounded factors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
SPAN, LARGEST = 256, 2895


def rounded(x: Array) -> NDArray[np.float64]:
    """x (n, k) as it is multiplied: whole multiples of a scale for each span of a row."""
    made = np.zeros(x.shape)
    for first in range(0, x.shape[1], SPAN):
        part = x[:, first : first + SPAN].astype(np.float64)
        scale = np.abs(part).max(1, keepdims=True) / LARGEST
        with np.errstate(invalid="ignore"):
            made[:, first : first + SPAN] = scale * np.rint(part / np.where(scale, scale, 1))
    return made


def rounded_linear(x: Array, w: Array) -> NDArray[np.float64]:
    """x (n, k) w (m, k)ᵀ."""
    return rounded(x) @ rounded(w).T


def rounded_gram(x: Array, out: Array, first: int = 0, end: int | None = None) -> None:
    """Adds rows of x (n, k) xᵀ to those of out (n, n), on and below the diagonal."""
    rows = slice(first, end)
    out[rows] += np.tril(rounded_linear(x, x))[rows].astype(out.dtype)
