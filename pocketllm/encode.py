"""From normalised rows to indices: nearest codeword, or chosen under H with error feedback.

With H = E[x xᵀ] of the layer's inputs the error that matters is tr((W - Ŵ) H (W - Ŵ)ᵀ). Sub-vectors of a
row are encoded one after another, the ones that matter most first; the error made so far is fed into
the target of the next through the block LDLᵀ factors of H, and each is chosen under the metric that
remains (LDLQ of arXiv 2307.13304, GPTQ of arXiv 2210.17323, in blocks of d columns).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from . import kernels
from .errors import PocketError
from .layout import Rows, denormalise, subvector_count
from .stored import StoredCodec

# Share of H's mean diagonal that is added to its diagonal.
DAMPING = 0.01


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A matrix as indices.

    Attributes:
        index: (out, L) int32.
        scale: (out,) float16, or None without row scales.
        shift: (out,) float16, or None.
        error: |W - Ŵ|² / |W|², 0 for a zero matrix.
        output_error: tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ); NaN without H.
    """

    index: np.ndarray
    scale: np.ndarray | None
    shift: np.ndarray | None
    error: float
    output_error: float


@dataclasses.dataclass(frozen=True)
class Factors:
    """H in the order of encoding, as the factors that feedback needs.

    Attributes:
        order: (L,) int64, the sub-vector that is encoded first, second, ...
        metric: (L, d, d) float32: of the sub-vector encoded l-th, H given all that come later.
        feedback: (L*d, L*d) float32, in the order of encoding: how a unit error in one column moves
            the target of a later one. Only what lies above the diagonal blocks is used.
    """

    order: np.ndarray
    metric: np.ndarray
    feedback: np.ndarray


def factorise(hessian: np.ndarray, subvector: int, damping: float = DAMPING) -> Factors:
    """Block LDLᵀ of H (in, in), blocks of ``subvector`` columns, in float64 on one thread.

    Columns that pad the last sub-vector weigh nothing but the damping. Needs about 3 (in)² doubles.

    Raises:
        PocketError: NaN or Inf in H.
    """
    import torch

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
        diagonal += damping * mean if mean > 0 else 1.0
        mass = diagonal.view(count, d).sum(1)
        # The factor is found from the last sub-vector to the first: given = later in the order.
        backwards = torch.argsort(mass, stable=True)
        columns_of = (backwards[:, None] * d + torch.arange(d)).flatten()
        lower = torch.linalg.cholesky(h[columns_of][:, columns_of])
        blocks = lower.view(count, d, count, d)
        roots = torch.stack([blocks[i, :, i] for i in range(count)])
        for i in range(count):
            columns_i = lower[:, i * d : i * d + d]
            columns_i.copy_(
                torch.linalg.solve_triangular(roots[i], columns_i, upper=False, left=False)
            )
        feedback = blocks.flip(0, 2).reshape(length, length)
        metric = (roots @ roots.mT).flip(0)
        return Factors(backwards.flip(0).numpy(), metric.float().numpy(), feedback.float().numpy())


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
        codec: in its stored form. A codec whose decoder needs the whole row is encoded as published,
            by the nearest latent, whatever H is.
        hessian: (in, in) float32, symmetric; None minimises the plain squared error.
        damping: share of H's mean diagonal added to its diagonal.

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
        float("nan")
        if hessian is None
        else _ratio(_under(gap, hessian), _under(weight, hessian)),
    )


def _encode_feedback(values: np.ndarray, table: np.ndarray, factors: Factors) -> np.ndarray:
    rows, d = len(values), table.shape[1]
    ordered = values.reshape(rows, -1, d)[:, factors.order].reshape(rows, -1)
    found = kernels.encode_feedback(ordered, table, factors.metric, factors.feedback)
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
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
