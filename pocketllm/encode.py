"""From normalised rows to indices: nearest codeword, or chosen under H with error feedback.

With H = E[x xᵀ] of the layer's inputs the error that matters is tr((W - Ŵ) H (W - Ŵ)ᵀ). Sub-vectors
of a row are encoded one after another, the ones that matter most first; the error made so far is
fed into the target of the next through the block LDLᵀ factors of H, and each is chosen under the
metric that remains (LDLQ of arXiv 2307.13304, GPTQ of arXiv 2210.17323, in blocks of d columns).
Then every sub-vector is chosen again, given all others, which can only lower the error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from . import kernels
from .errors import PocketError
from .layout import Rows, denormalise, subvector_count
from .stored import StoredCodec

# Share of H's diagonal that is added to it: what the text at hand says about correlations is
# trusted that much less. A share of the mean would drown the many inputs that are mostly near zero.
DAMPING = 0.03
# The same as a share of the mean, for inputs that the text hardly used but another text may.
FLOOR = 1e-3
# Times each sub-vector is chosen again. The output error falls by about 5, 2 and 0.5 %.
AGAIN = 2
# Rows of a matrix whose error is computed together.
ROWS_TOGETHER = 512
# Rows of H that are in memory once more, several times in float64, while it is factored.
FACTOR_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A matrix as indices.

    Attributes:
        index: (out, L) int32.
        scale: (out,) float32, as it comes back from storage.
        shift: the same, or None.
        squares: |W - Ŵ|², |W|², and the same under H, NaN without: float64 (4,). Those of several
            parts of a matrix add up.
    """

    index: np.ndarray
    scale: np.ndarray
    shift: np.ndarray | None
    squares: np.ndarray

    @property
    def error(self) -> float:
        """|W - Ŵ|² / |W|², 0 for a zero matrix."""
        return relative_errors(self.squares)[0]

    @property
    def output_error(self) -> float:
        """tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ); NaN without H."""
        return relative_errors(self.squares)[1]


@dataclasses.dataclass(frozen=True)
class Factors:
    """H as :func:`pocketllm.kernels.encode_feedback` takes it, in the order of encoding.

    Attributes:
        order: (L,) int64, the sub-vector that is encoded first, second, ...
        metric, feedback: (L, d, d) and (L*d, L*d) float32, for a choice that leaves those later in
            the order free to answer: the block LDLᵀ factors.
        fixed_metric, fixed_feedback: the same shapes, for a choice given all others: the diagonal
            blocks of H, and H over them.
    """

    order: np.ndarray
    metric: np.ndarray
    feedback: np.ndarray
    fixed_metric: np.ndarray
    fixed_feedback: np.ndarray


def factorise(hessian: np.ndarray, subvector: int, damping: float = DAMPING) -> Factors:
    """Factors of H (in, in) in blocks of ``subvector`` columns, in float64 on one thread.

    ``damping`` is a share of the diagonal that is added to it. Columns that pad the last sub-vector
    weigh next to nothing. Beside H and the result, (in)² doubles are in memory.

    Raises:
        PocketError: NaN or Inf in H.
    """
    columns, d = len(hessian), subvector
    count = subvector_count(columns, d)
    length = count * d
    if not np.isfinite(hessian.sum(dtype=np.float64)):
        raise PocketError("hessian: holds NaN or Inf; the calibration overflowed")
    with _one_thread():
        h = torch.from_numpy(hessian)
        if length > columns:
            h = torch.nn.functional.pad(h, (0, length - columns, 0, length - columns))
        diagonal = h.diagonal().double()
        mean = float(diagonal[:columns].mean())
        diagonal += damping * diagonal + (FLOOR * mean if mean > 0 else 1.0)
        order = torch.argsort(diagonal.view(count, d).sum(1), descending=True, stable=True)
        metric, feedback = _free(h, diagonal, order)
        fixed_metric, fixed_feedback = _fixed(h, diagonal, order)
    parts = (metric, feedback, fixed_metric, fixed_feedback)
    return Factors(order.numpy(), *(part.numpy() for part in parts))


def _rows(
    h: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """H with this diagonal, its blocks in this order: (first block, (blocks, d, L*d) float64)."""
    count = len(order)
    d = len(h) // count
    columns = (order[:, None] * d + torch.arange(d)).flatten()
    step = max(1, FACTOR_ROWS // d)
    for first in range(0, count, step):
        rows = columns[first * d : (first + step) * d]
        part = h[rows][:, columns].double()
        part.diagonal(first * d)[:] = diagonal[rows]
        yield first, part.view(-1, d, len(h))


def _free(
    h: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Metric and feedback with H = U D Uᵀ, U unit block upper triangular, D the metrics.

    The lower Cholesky factor of H with its blocks in reverse order, turned round again, is U with
    the roots of D in its diagonal blocks.
    """
    count = len(order)
    d = len(h) // count
    reverse = torch.empty(count, d, len(h), dtype=torch.float64)
    for first, part in _rows(h, diagonal, order.flip(0)):
        reverse[first : first + len(part)] = part
    # LAPACK writes the factor over what it factors when that is in its own, transposed layout.
    square = reverse.view(len(h), len(h)).mT
    torch.linalg.cholesky_ex(
        square, check_errors=True, out=(square, torch.empty(0, dtype=torch.int32))
    )
    blocks = reverse.view(count, d, count, d)
    roots = torch.stack([blocks[j, :, j].T for j in reversed(range(count))])
    feedback = torch.empty(len(h), count, d)
    step = max(1, FACTOR_ROWS // d)
    for first in range(0, count, step):
        # U is the factor's columns times the inverse of each column's root.
        part = reverse[max(0, count - first - step) : count - first].view(-1, d, count, d)
        columns = part.flip(0, 2).permute(0, 2, 3, 1).reshape(-1, len(h), d)
        these = slice(first, first + len(columns))
        upper = torch.linalg.solve_triangular(roots[these], columns, upper=False, left=False)
        feedback[:, these] = upper.permute(1, 0, 2)
    return (roots @ roots.mT).float(), feedback.view(len(h), len(h))


def _fixed(
    h: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonal blocks of H, and H over them, transposed."""
    count = len(order)
    d = len(h) // count
    metric = torch.empty(count, d, d)
    feedback = torch.empty(len(h), count, d)
    for first, part in _rows(h, diagonal, order):
        blocks = part.view(-1, d, count, d)
        own = torch.stack([blocks[i, :, first + i] for i in range(len(blocks))])
        these = slice(first, first + len(blocks))
        metric[these] = own
        feedback[:, these] = torch.linalg.solve(own, part).permute(2, 0, 1)
    return metric, feedback.view(len(h), len(h))


def encode_rows(
    rows: Rows,
    weight: np.ndarray,
    codec: StoredCodec,
    hessian: np.ndarray | None = None,
    *,
    factors: Factors | None = None,
) -> Encoded:
    """Choose the index of every sub-vector of a matrix.

    Args:
        rows: the normalised rows of ``weight`` (see :func:`pocketllm.layout.normalise`).
        weight: (out, in) float32.
        codec: in its stored form. A codec whose decoder needs the whole row is encoded as
            published, by the nearest latent, whatever H is.
        hessian: (in, in) float32, symmetric; None minimises the plain squared error.
        factors: of the hessian, when they are at hand (see :func:`factorise`).

    Raises:
        PocketError: NaN or Inf in the hessian.
    """
    d = codec.spec.subvector
    if codec.encoder is not None:
        index = codec.codec.assign(rows.values)
        decode = codec.codec.reconstruct
    else:
        if hessian is None:
            flat = kernels.nearest(rows.values.reshape(-1, d), codec.table)
            index = flat.reshape(len(rows.values), -1)
        else:
            index = _encode_feedback(rows.values, codec.table, factors or factorise(hessian, d))
        table = codec.table

        def decode(index: np.ndarray) -> np.ndarray:
            return table[index].reshape(len(index), -1)

    squares = np.zeros(4)
    for first in range(0, len(weight), ROWS_TOGETHER):
        part = slice(first, first + ROWS_TOGETHER)
        shift = None if rows.shift is None else rows.shift[part]
        made = denormalise(decode(index[part]), weight.shape[1], rows.scale[part], shift)
        squares += _squares(weight[part], made, hessian)
    return Encoded(index, rows.scale, rows.shift, squares)


def _squares(weight: np.ndarray, made: np.ndarray, hessian: np.ndarray | None) -> np.ndarray:
    gap = weight - made
    plain = [np.square(x).sum(dtype=np.float64) for x in (gap, weight)]
    under = [np.nan] * 2 if hessian is None else [_under(x, hessian) for x in (gap, weight)]
    return np.array([*plain, *under])


def _encode_feedback(values: np.ndarray, table: np.ndarray, factors: Factors) -> np.ndarray:
    rows, d = len(values), table.shape[1]
    ordered = values.reshape(rows, -1, d)[:, factors.order].reshape(rows, -1)
    found = kernels.encode_feedback(ordered, table, factors.metric, factors.feedback)
    if AGAIN:
        fixed = factors.fixed_metric, factors.fixed_feedback
        found = kernels.encode_feedback(ordered, table, *fixed, found, AGAIN)
    index = np.empty_like(found)
    index[:, factors.order] = found
    return index


def _under(rows: np.ndarray, hessian: np.ndarray) -> float:
    """tr(rows H rowsᵀ), from the blocks of the symmetric H on and above its diagonal."""
    x, h = torch.from_numpy(rows), torch.from_numpy(hessian)
    total = 0.0
    for first in range(0, len(h), ROWS_TOGETHER):
        these = slice(first, first + ROWS_TOGETHER)
        product = x[:, these] @ h[these, these]
        if first:
            product += 2 * (x[:, :first] @ h[:first, these])
        total += float((product * x[:, these]).sum(dtype=torch.float64))
    return total


def relative_errors(squares: np.ndarray) -> tuple[float, float]:
    """``error`` and ``output_error`` of an :class:`Encoded` with these squares."""
    error, weight, output_error, output = (float(x) for x in squares)
    plain = error / weight if weight > 0 else 0.0
    under = output_error / output if output > 0 or np.isnan(output) else 0.0
    return plain, under


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK on one thread, so that its rounding does not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
