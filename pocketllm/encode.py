"""From normalised rows to indices: nearest codeword, or chosen under H with error feedback.

With H = E[x xᵀ] of the layer's inputs the error that matters is tr((W - Ŵ) H (W - Ŵ)ᵀ). Sub-vectors
of a row are encoded one after another, the ones that matter most first; the error made so far is
fed into the target of the next through the block LDLᵀ factors of H, and each is chosen under the
metric that remains (LDLQ of arXiv 2307.13304, GPTQ of arXiv 2210.17323, in blocks of d columns).
Then every sub-vector is chosen again, given all others, which can only lower the error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from . import kernels
from .errors import PocketError
from .layout import Rows, denormalise, subvector_count
from .parallel import thread_pool
from .precision import power_of_two, rounded_factors
from .stored import StoredCodec

# Share of H's diagonal that is added to it: what the text at hand says about correlations is
# trusted that much less. A share of the mean would drown the many inputs that are mostly near zero.
DAMPING = 0.03
# The same as a share of the mean, for inputs that the text hardly used but another text may.
FLOOR = 1e-3
# Times each sub-vector is chosen again. The output error falls by about 6, 1.4 and 0.9 %.
AGAIN = 2
# Rows of a matrix whose error is computed together, and about how many of them, evenly spread, the
# error under second moments is taken from: it is shown and nothing else.
ROWS_TOGETHER = 512
ROWS_SHOWN = 512
# Rows of H that are factored before the rest is told, and those that each thread has in memory once
# more, several times in float64, when it reads them.
FACTOR_PANEL, FACTOR_ROWS = 512, 128
# Calls a function for each of some numbers, by several threads, and returns when all are done.
Each = Callable[[Callable[[int], None], Iterable[int]], None]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A matrix as indices.

    Attributes:
        index: (out, L) int32.
        scale: (out,) float32, as it comes back from storage.
        shift: the same, or None.
        squares: |W - Ŵ|², |W|², and the same under H of some of the rows, NaN without: float64
            (4,). Those of several parts of a matrix add up.
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
        """tr((W - Ŵ) H (W - Ŵ)ᵀ) / tr(W H Wᵀ), of some of the rows; NaN without H."""
        return relative_errors(self.squares)[1]


@dataclasses.dataclass(frozen=True)
class Factors:
    """H as :func:`pocketllm.kernels.encode_feedback` takes it, in the order of encoding.

    Attributes:
        order: (L,) int64, the sub-vector that is encoded first, second, ...
        metric, feedback: (L, d, d) and (L*d, L*d) float32, for a choice that leaves those later in
            the order free to answer: the block LDLᵀ factors.
        fixed_metric, fixed_feedback: the same shapes, for a choice given all others: the diagonal
            blocks of H, and H over them; None where nothing is chosen again.
    """

    order: np.ndarray
    metric: np.ndarray
    feedback: np.ndarray
    fixed_metric: np.ndarray | None
    fixed_feedback: np.ndarray | None


def factorise(
    hessian: np.ndarray, subvector: int, damping: float = DAMPING, *, again: bool = True
) -> Factors:
    """Factors of H (in, in) in blocks of ``subvector`` columns, in float64.

    ``damping`` is a share of the diagonal that is added to it; ``again`` says whether sub-vectors
    will be chosen again. Columns that pad the last sub-vector weigh next to nothing. Beside H and
    the result, half of (in)² doubles are in memory. Each number is computed by one of torch's
    threads, so that rounding does not depend on how many there are.

    Raises:
        PocketError: NaN or Inf in H.
    """
    columns, d = len(hessian), subvector
    count = subvector_count(columns, d)
    length = count * d
    if not np.isfinite(hessian.sum(dtype=np.float64)):
        raise PocketError(
            "hessian: holds NaN or Inf, the calibration overflowed: compress without calibration"
        )
    with _threads() as each:
        h = torch.from_numpy(hessian)
        if length > columns:
            h = torch.nn.functional.pad(h, (0, length - columns, 0, length - columns))
        diagonal = h.diagonal().double()
        mean = float(diagonal[:columns].mean())
        diagonal += damping * diagonal + (FLOOR * mean if mean > 0 else 1.0)
        order = torch.argsort(diagonal.view(count, d).sum(1), descending=True, stable=True)
        metric, feedback = _free(h, diagonal, order, each)
        fixed = [part.numpy() for part in _fixed(h, diagonal, order, each)] if again else [None] * 2
    return Factors(order.numpy(), metric.numpy(), feedback.numpy(), *fixed)


class _Rows:
    """H with this diagonal, its blocks of d rows and columns in this order."""

    def __init__(self, h: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor) -> None:
        self._h, self._diagonal = h, diagonal
        self._d = len(h) // len(order)
        self._columns = (order[:, None] * self._d + torch.arange(self._d)).flatten()

    def read(self, blocks: slice) -> torch.Tensor:
        """These blocks, (blocks * d, L * d) float64."""
        rows = self._columns[blocks.start * self._d : blocks.stop * self._d]
        part = self._h[rows][:, self._columns].double()
        part.diagonal(blocks.start * self._d)[:] = self._diagonal[rows]
        return part


def _cut(count: int, step: int) -> list[slice]:
    """0..count-1 in slices of ``step``, the last one shorter."""
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _free(
    h: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor, each: Each
) -> tuple[torch.Tensor, torch.Tensor]:
    """Metric and feedback with H = U D Uᵀ, U unit block upper triangular, D the metrics.

    The lower Cholesky factor of H with its blocks in reverse order, turned round again, is U with
    the roots of D in its diagonal blocks.
    """
    count, length = len(order), len(h)
    d = length // count
    rows = _Rows(h, diagonal, order.flip(0))
    slices = _cut(count, FACTOR_PANEL // d)
    shapes = [((s.stop - s.start) * d, length - s.start * d) for s in slices]
    # All in one piece, which the system has back as soon as it is free.
    memory = torch.empty(sum(high * wide for high, wide in shapes), dtype=torch.float64)
    pieces = memory.split([high * wide for high, wide in shapes])
    panels = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def read(at: int) -> None:
        start, stop = slices[at].start, slices[at].stop
        for part in _cut(stop - start, FACTOR_ROWS // d):
            found = rows.read(slice(start + part.start, start + part.stop))
            panels[at][part.start * d : part.stop * d] = found[:, start * d :]

    each(read, range(len(panels)))
    _cholesky(panels, each)
    metric = torch.empty(count, d, d)
    feedback = torch.from_numpy(np.zeros((length, count, d), np.float32))

    def scale(at: int) -> None:
        # U is the factor's columns times the inverse of each column's root.
        start = slices[at].start
        factor = panels[at].view(-1, d, count - start, d)
        for part in _cut(len(factor), FACTOR_ROWS // d):
            these = slice(count - start - part.stop, count - start - part.start)
            blocks = factor[part].flip(0, 2).permute(0, 2, 3, 1)
            roots = torch.stack([factor[i, :, i].T for i in reversed(range(part.start, part.stop))])
            metric[these] = (roots @ roots.mT).float()
            columns = blocks.reshape(len(roots), -1, d)
            upper = torch.linalg.solve_triangular(roots, columns, upper=False, left=False)
            feedback[: columns.shape[1], these] = upper.permute(1, 0, 2)

    each(scale, range(len(panels)))
    return metric, feedback.view(length, length)


def _cholesky(panels: list[torch.Tensor], each: Each) -> None:
    """Writes R, upper triangular with RᵀR = A, over A: panels of rows, from the diagonal on."""
    ends = [panel.shape[1] for panel in panels]

    def columns(at: int) -> slice:
        """Those of a later panel, in the one at hand."""
        return slice(ends[here] - ends[at], ends[here] - ends[at] + len(panels[at]))

    def solve(at: int) -> None:
        part = panels[here][:, columns(at)]
        part[:] = torch.linalg.solve_triangular(own.mT, part, upper=False)

    def subtract(at: int) -> None:
        rest = panels[here][:, columns(at).start :]
        panels[at].addmm_(panels[here][:, columns(at)].mT, rest, alpha=-1)

    for here, panel in enumerate(panels):
        own = panel[:, : len(panel)]
        own[:] = torch.linalg.cholesky(own, upper=True)
        each(solve, range(here + 1, len(panels)))
        each(subtract, range(here + 1, len(panels)))


def _fixed(
    h: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor, each: Each
) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonal blocks of H, and H over them, transposed."""
    count = len(order)
    d = len(h) // count
    metric = torch.empty(count, d, d)
    feedback = torch.empty(len(h), count, d)
    rows = _Rows(h, diagonal, order)
    slices = _cut(count, FACTOR_ROWS // d)

    def divide(at: int) -> None:
        these = slices[at]
        part = rows.read(these).view(-1, d, len(h))
        blocks = part.view(-1, d, count, d)
        own = torch.stack([blocks[i, :, these.start + i] for i in range(len(blocks))])
        metric[these] = own
        feedback[:, these] = torch.linalg.solve(own, part).permute(2, 0, 1)

    each(divide, range(len(slices)))
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
        PocketError: NaN or Inf in the hessian, or in what is stored.
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
        with np.errstate(over="ignore"):  # refused below
            made = denormalise(decode(index[part]), weight.shape[1], rows.scale[part], shift)
        squares += squares_of(weight[part], made, hessian, len(weight))
    return Encoded(index, rows.scale, rows.shift, squares)


def squares_of(
    weight: np.ndarray, made: np.ndarray, hessian: np.ndarray | None, rows: int
) -> np.ndarray:
    """The squares of an :class:`Encoded` for some of ``rows`` rows and what is stored of them.

    Raises:
        PocketError: some of what is stored is infinite.
    """
    every = -(-rows // ROWS_SHOWN)
    largest = float(np.abs(weight).max(initial=0.0))
    unit = power_of_two(largest)
    squares = np.array([_squares(x, unit, hessian, every) for x in (weight - made, weight)])
    if not np.isfinite(squares[0, 0]):
        raise PocketError(
            f"weight: with values up to {largest:.3g} some would come back as infinity: leave it"
            " dense (modules_to_not_convert)"
        )
    return squares.T.ravel()


def _squares(
    x: np.ndarray, unit: float, hessian: np.ndarray | None, every: int
) -> tuple[float, float]:
    """|x|², and the same under H of each ``every``-th row or NaN, squared in this unit."""
    x, under = x * np.float32(1 / unit), np.nan
    if hessian is not None:
        with rounded_factors():
            under = _under(np.ascontiguousarray(x[::every]), hessian)
    plain = float(np.square(x, out=x).sum(1).sum(dtype=np.float64))
    return unit**2 * plain, unit**2 * under


def _encode_feedback(values: np.ndarray, table: np.ndarray, factors: Factors) -> np.ndarray:
    rows, d = len(values), table.shape[1]
    ordered = values.reshape(rows, -1, d)[:, factors.order].reshape(rows, -1)
    found = kernels.encode_feedback(ordered, table, factors.metric, factors.feedback)
    if AGAIN:
        assert factors.fixed_metric is not None and factors.fixed_feedback is not None
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
def _threads() -> Iterator[Each]:
    """As many threads as torch has, each of which computes alone what it is given."""
    with thread_pool(torch.get_num_threads()) as pool:

        def each(work: Callable[[int], None], numbers: Iterable[int]) -> None:
            for _ in pool.map(work, numbers):
                pass

        yield each
