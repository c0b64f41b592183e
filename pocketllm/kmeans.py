"""K-means: the start of every codec, the last polish of every table, and the yardstick.

Nothing here depends on the number of threads: assignments are exact with the lowest index on ties,
sums run in the order of the data in float64, and every random choice is seeded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from . import kernels
from .errors import PocketError

Progress = Callable[[float], None]


# How far a codeword moves, as a multiple of the way to the mean of its vectors. Below 2 the error
# still falls with every step, and what takes twenty plain iterations takes about eight.
RELAXATION = 1.8


@dataclasses.dataclass(frozen=True)
class KMeansResult:
    """A codebook and how it fits.

    Attributes:
        codebook: (K, d) float32.
        index: (n,) int32, the nearest codeword of every vector.
        error: mean weighted squared error per value, sum(w (x - c)**2) / (n d).
        used: number of codewords that some vector uses.
    """

    codebook: np.ndarray
    index: np.ndarray
    error: float
    used: int


def kmeans(
    x: np.ndarray,
    codewords: int,
    *,
    weight: np.ndarray | None = None,
    iterations: int = 10,
    seed: int = 0,
    start: np.ndarray | None = None,
    sample: int | None = None,
    relaxation: float = RELAXATION,
    progress: Progress | None = None,
) -> KMeansResult:
    """Lloyd's algorithm with exact search; empty clusters are given to badly represented vectors.

    Args:
        x: (n, d) float32.
        codewords: K, at most n.
        weight: None, (n,) per vector or (n, d) per value; not negative.
        iterations: assignments and updates; the returned index belongs to one more assignment.
        seed: of the start and of reseeding.
        start: (K, d) codebook to start from; default: see :func:`start_codebook`.
        sample: run all but the last two iterations on this many randomly drawn vectors.
        relaxation: 1 is plain Lloyd; the last two iterations always are.
        progress: called with the share of the work done.

    Raises:
        PocketError: fewer vectors than codewords.
    """
    x = np.ascontiguousarray(x, np.float32)
    n = len(x)
    if n < codewords:
        raise PocketError(
            f"codewords: got {codewords} for {n} sub-vectors, want at most as many codewords as "
            "sub-vectors; take a smaller codebook or shorter sub-vectors"
        )
    rng = np.random.default_rng(seed)
    book = start_codebook(x, codewords, rng) if start is None else np.array(start, np.float32)
    part, part_weight = x, weight
    if sample is not None and sample < n:
        chosen = np.sort(rng.choice(n, max(sample, codewords), replace=False))
        part, part_weight = x[chosen], None if weight is None else weight[chosen]
    for i in range(iterations):
        last = i >= iterations - 2
        if last:
            part, part_weight = x, weight
        index, error = assign(part, book, part_weight)
        step = 1.0 if last else relaxation
        book = update(part, index, error, book, part_weight, rng, relaxation=step)
        if progress:
            progress((i + 1) / (iterations + 1))
    index, error = assign(x, book, weight)
    return KMeansResult(
        book, index, float(error.mean(dtype=np.float64)) / x.shape[1], len(np.unique(index))
    )


def start_codebook(x: np.ndarray, codewords: int, rng: np.random.Generator) -> np.ndarray:
    """K random vectors of x, moved outwards by sqrt((d + 2) / d) about their mean.

    Random vectors are distributed like the data, p; the best codewords like p**(d / (d + 2)), which
    for a normal distribution is the same one scaled by that factor.
    """
    chosen = x[np.sort(rng.choice(len(x), codewords, replace=False))]
    centre = chosen.mean(0, dtype=np.float64)
    stretch = np.sqrt((x.shape[1] + 2) / x.shape[1])
    return (centre + stretch * (chosen - centre)).astype(np.float32)


def assign(
    x: np.ndarray, book: np.ndarray, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(index (n,) int32, weighted squared error (n,) float32) of the nearest codewords.

    weight: None, (n,) or (n, d).
    """
    if weight is None or weight.ndim == 1:
        index, error = kernels.nearest(x, book, return_error=True)
        return index, error if weight is None else error * weight
    index = _assign_weighted(x, book, weight)
    gap = x - book[index]
    return index, (weight * gap * gap).sum(1)


def _assign_weighted(x: np.ndarray, book: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Nearest codeword when every value has its own weight.

    sum w (x - c)**2 is, but for a constant, an inner product of (w x, -w/2) with (c, c**2), so the
    plain search finds it in 2 d dimensions once the bias takes the codewords' norms away.
    """
    query = np.concatenate([weight * x, -0.5 * weight], axis=1, dtype=np.float32)
    lifted = np.concatenate([book, book * book], axis=1, dtype=np.float32)
    if lifted.shape[1] <= 16:
        return kernels.nearest(query, lifted, bias=-np.square(lifted).sum(1))
    index = np.empty(len(x), np.int32)
    part = max(1, (1 << 24) // len(book))
    for first in range(0, len(x), part):
        index[first : first + part] = (query[first : first + part] @ lifted.T).argmax(1)
    return index


def update(
    x: np.ndarray,
    index: np.ndarray,
    error: np.ndarray,
    book: np.ndarray,
    weight: np.ndarray | None,
    rng: np.random.Generator,
    *,
    relaxation: float = 1.0,
) -> np.ndarray:
    """Codewords moved to the (weighted) means of their vectors; empty ones reseeded.

    With ``relaxation`` they move that many times as far. A codeword without vectors takes the place
    of a vector drawn with probability proportional to its error. Where the weights of a codeword's
    vectors are all zero it stays.
    """
    total, mass = kernels.cluster_sums(x, index, len(book), weight=weight)
    mass = np.broadcast_to(mass, total.shape)
    means = np.where(mass > 0, total / np.where(mass > 0, mass, 1.0), book.T).T
    new = np.ascontiguousarray(book + relaxation * (means - book), np.float32)
    empty = np.flatnonzero(np.bincount(index, minlength=len(book)) == 0)
    chosen = draw_by_error(error, len(empty), rng)
    new[empty[: len(chosen)]] = x[chosen]
    return new


def draw_by_error(error: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` different positions, drawn with probability proportional to ``error`` (n,).

    Fewer when fewer errors are above zero.
    """
    count = min(count, int(np.count_nonzero(error > 0)))
    if count == 0:
        return np.empty(0, np.int64)
    with np.errstate(divide="ignore"):
        arrival = rng.exponential(size=len(error)) / error
    return np.argpartition(arrival, count - 1)[:count]


def refine_table(
    table: np.ndarray,
    rows: np.ndarray,
    *,
    weight: np.ndarray | None = None,
    iterations: int = 6,
    seed: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """Weighted Lloyd iterations on a folded table: analysis by synthesis.

    Args:
        table: (K, d) float32, what an index decodes to.
        rows: (R, L*d) float32, normalised rows.
        weight: None, or what broadcasts to rows: (L*d,) per column, (R, 1) per row, (R, L*d).
        iterations: Lloyd iterations.
        seed: of reseeding unused entries.
        progress: called with the share of the work done.

    Returns:
        (K, d) float32: the table with the smallest error seen, never worse than the given one.
    """
    d = table.shape[1]
    x = np.ascontiguousarray(rows, np.float32).reshape(-1, d)
    flat = _flat_weight(weight, rows.shape, d)
    rng = np.random.default_rng(seed)
    best, lowest = np.array(table, np.float32), np.inf
    current = best
    for i in range(iterations + 1):
        index, error = assign(x, current, flat)
        mean = float(error.mean(dtype=np.float64)) if len(error) else 0.0
        if mean < lowest:
            best, lowest = current, mean
        if i < iterations:
            step = RELAXATION if i < iterations - 2 else 1.0
            current = update(x, index, error, current, flat, rng, relaxation=step)
        if progress:
            progress((i + 1) / (iterations + 1))
    return best


def _flat_weight(weight: np.ndarray | None, shape: tuple[int, ...], d: int) -> np.ndarray | None:
    if weight is None:
        return None
    full = np.broadcast_to(np.asarray(weight, np.float32), shape)
    return np.ascontiguousarray(full).reshape(-1, d)
