"""Plain NumPy twins of the search and packing kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def nearest(
    z: NDArray[np.float32],
    codebook: NDArray[np.float32],
    *,
    weight: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
    return_error: bool = False,
) -> NDArray[np.int32] | tuple[NDArray[np.int32], NDArray[np.float32]]:
    """As :func:`pocketllm.kernels.nearest`, from the differences in float64.

    z: (n, d); codebook: (K, d); weight: (d,); bias: (K,). Returns int32 (n,) and, with
    return_error, float32 (n,).
    """
    distance = distances(z, codebook, weight=weight, bias=bias)
    index = distance.argmin(axis=1).astype(np.int32)
    if not return_error:
        return index
    return index, np.take_along_axis(distance, index[:, None], axis=1)[:, 0].astype(np.float32)


class SearchIndex:
    """As :class:`pocketllm.kernels.SearchIndex`: a codebook to be searched several times."""

    def __init__(
        self,
        codebook: NDArray[np.float32],
        *,
        weight: NDArray[np.float32] | None = None,
        bias: NDArray[np.float32] | None = None,
    ) -> None:
        self._codebook, self._weight, self._bias = codebook, weight, bias

    def nearest(
        self,
        z: NDArray[np.float32],
        *,
        previous: NDArray[np.int32] | None = None,
        return_error: bool = False,
    ) -> NDArray[np.int32] | tuple[NDArray[np.int32], NDArray[np.float32]]:
        """As :func:`nearest`; ``previous``, a guess of the result, is not needed here."""
        return nearest(
            z, self._codebook, weight=self._weight, bias=self._bias, return_error=return_error
        )


def distances(
    z: NDArray[np.float32],
    codebook: NDArray[np.float32],
    *,
    weight: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
) -> NDArray[np.float64]:
    """All of ``sum_j weight[j] (z[i, j] - c[k, j])**2 + bias[k]``, float64 (n, K)."""
    rows, columns = z.astype(np.float64), codebook.astype(np.float64)
    total = np.zeros((len(rows), len(columns)))
    for j in range(rows.shape[1]):
        scale = 1.0 if weight is None else float(weight[j])
        total += scale * np.square(rows[:, None, j] - columns[None, :, j])
    return total if bias is None else total + bias.astype(np.float64)


def pack(index: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """As :func:`pocketllm.kernels.pack`: int32 (rows, L) to uint8 (rows, ceil(L * bits / 8))."""
    if not 1 <= bits <= 16:
        raise ValueError(f"bits: got {bits}, want 1..16")
    if index.size and not 0 <= index.min() <= index.max() < 1 << bits:
        raise ValueError(
            f"index: got a value outside 0..{(1 << bits) - 1}, want indices of {bits} bits"
        )
    digits = ((index[:, :, None] >> np.arange(bits)) & 1).astype(np.uint8)
    stream = digits.reshape(len(index), index.shape[1] * bits)
    return np.packbits(stream, axis=1, bitorder="little")


def unpack(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.int32]:
    """As :func:`pocketllm.kernels.unpack`: uint8 (rows, stride) to int32 (rows, count)."""
    stream = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little")
    digits = stream.reshape(len(packed), count, bits).astype(np.int32)
    return (digits << np.arange(bits, dtype=np.int32)).sum(axis=2, dtype=np.int32)


def index_max(packed: NDArray[np.uint8], count: int, bits: int) -> int:
    """As :func:`pocketllm.kernels.index_max`."""
    return int(unpack(packed, count, bits).max(initial=-1))
