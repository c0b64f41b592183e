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


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A matrix as indices.

    Attributes:
        index: (out, L) int32.
        scale: (out,) float32, as it comes back from storage.
        shift: the same, or None.
        error: |W - Ŵ|² / |W|², 0 for a zero matrix.
        output_error: tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ); NaN without H.
    """

    index: np.ndarray
    scale: np.ndarray
    shift: np.ndarray | None
    error: float
    output_error: float


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
    weigh next to nothing. Needs about 4 (in)² doubles.

    Raises:
        PocketError: NaN or Inf in H.
    """
    columns, d = len(hessian), subvector
    count = subvector_count(columns, d)
    length = count * d
    if not np.isfinite(hessian).all():
        raise PocketError("hessian: holds NaN or Inf; the calibration overflowed")
    with _one_thread():
        h = torch.zeros(length, length, dtype=torch.float64)
        h[:columns, :columns] = torch.from_numpy(hessian)
        diagonal = h.diagonal()
        mean = float(diagonal[:columns].mean())
        diagonal += damping * diagonal + (FLOOR * mean if mean > 0 else 1.0)
        mass = diagonal.view(count, d).sum(1)
        order = torch.argsort(mass, descending=True, stable=True)
        columns_of = (order[:, None] * d + torch.arange(d)).flatten()
        h = h[columns_of][:, columns_of]
        inner, feedback = _free(h, count, d)
        blocks = h.view(count, d, count, d)
        fixed = torch.stack([blocks[i, :, i] for i in range(count)])
        fixed_feedback = torch.linalg.solve(fixed, h.view(count, d, -1)).reshape(length, length).T
        return Factors(
            order.numpy(),
            *(x.float().contiguous().numpy() for x in (inner, feedback, fixed, fixed_feedback)),
        )


def _free(h: torch.Tensor, count: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Metric and feedback with h = U D Uᵀ, U unit block upper triangular, D the metrics.

    The lower Cholesky factor of h with its blocks in reverse order, turned round again, is U with
    the roots of D in its diagonal blocks.
    """
    length = count * d
    reverse = h.view(count, d, count, d).flip(0, 2).reshape(length, length)
    blocks = torch.linalg.cholesky(reverse).view(count, d, count, d).flip(0, 2)
    roots = torch.stack([blocks[i, :, i] for i in range(count)])
    # U is blocks times the inverse of each column's root.
    columns = blocks.permute(2, 0, 1, 3).reshape(count, length, d)
    upper = torch.linalg.solve_triangular(roots, columns, upper=False, left=False)
    feedback = upper.view(count, count, d, d).permute(1, 2, 0, 3).reshape(length, length)
    return roots @ roots.mT, feedback


def encode_rows(
    rows: Rows,
    weight: np.ndarray,
    codec: StoredCodec,
    hessian: np.ndarray | None = None,
    *,
    damping: float = DAMPING,
) -> Encoded:
    """Choose the index of every sub-vector of a matrix.

    Args:
        rows: the normalised rows of ``weight`` (see :func:`pocketllm.layout.normalise`).
        weight: (out, in) float32.
        codec: in its stored form. A codec whose decoder needs the whole row is encoded as
            published, by the nearest latent, whatever H is.
        hessian: (in, in) float32, symmetric; None minimises the plain squared error.
        damping: share of H's diagonal added to it.

    Raises:
        PocketError: NaN or Inf in the hessian.
    """
    d = codec.spec.subvector
    if codec.encoder is not None:
        index = codec.codec.assign(rows.values)
        decoded = codec.codec.reconstruct(index)
    else:
        if hessian is None:
            flat = kernels.nearest(rows.values.reshape(-1, d), codec.table)
            index = flat.reshape(len(rows.values), -1)
        else:
            index = _encode_feedback(rows.values, codec.table, factorise(hessian, d, damping))
        decoded = codec.table[index].reshape(rows.values.shape)
    gap = weight - denormalise(decoded, weight.shape[1], rows.scale, rows.shift)
    return Encoded(
        index,
        rows.scale,
        rows.shift,
        _ratio(np.square(gap).sum(dtype=np.float64), np.square(weight).sum(dtype=np.float64)),
        float("nan") if hessian is None else _ratio(_under(gap, hessian), _under(weight, hessian)),
    )


def _encode_feedback(values: np.ndarray, table: np.ndarray, factors: Factors) -> np.ndarray:
    rows, d = len(values), table.shape[1]
    ordered = values.reshape(rows, -1, d)[:, factors.order].reshape(rows, -1)
    found = kernels.encode_feedback(ordered, table, factors.metric, factors.feedback)
    for _ in range(AGAIN):
        found = kernels.encode_feedback(
            ordered, table, factors.fixed_metric, factors.fixed_feedback, found
        )
    index = np.empty_like(found)
    index[:, factors.order] = found
    return index


def _under(rows: np.ndarray, hessian: np.ndarray) -> float:
    """tr(rows H rowsᵀ)."""
    return float(np.einsum("ij,ij->", rows @ hessian, rows, dtype=np.float64))


def _ratio(error: float, whole: float) -> float:
    return float(error / whole) if whole > 0 else 0.0


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK on one thread, so that its rounding does not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
