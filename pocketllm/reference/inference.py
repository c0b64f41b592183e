"""Plain NumPy twins of the inference kernels: the oracle of csrc/infer.c.

A compressed matrix (out, in) is a packed index per sub-vector, a codec that turns an index into
d values, and a scale and optional shift per row:
    W[r, l*d + j] = scale[r] * T[index[r, l]][j] + shift[r].
With a decoder codec, T[index] is replaced by the decoder applied to the row of codewords.
Everything is computed in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .search import unpack
from .training import decode

if TYPE_CHECKING:
    from ..kernels import CodecView

Array = NDArray[Any]


def decode_row_list(
    packed: Array,
    in_features: int,
    row_index: Array,
    codec: CodecView,
    scale: Array,
    shift: Array | None = None,
) -> Array:
    """Decoded rows (n, in_features) float64 of the rows named in row_index (n,)."""
    count = -(-in_features // codec.subvector)
    stride = -(-count * codec.index_bits // 8)
    row_index = np.asarray(row_index, np.int64)
    rows = np.asarray(packed).reshape(-1, stride)[row_index]
    index = unpack(rows, count, codec.index_bits)
    table = np.asarray(codec.table, np.float64) * codec.table_scale
    values = table[index].reshape(len(row_index), count * codec.subvector)
    if codec.decoder is not None:
        values = decode(
            values,
            codec.decoder,
            subvector=codec.subvector,
            hidden=codec.hidden,
            norm=codec.norm,
        )
    values = values[:, :in_features] * np.asarray(scale, np.float64)[row_index, None]
    if shift is not None:
        values = values + np.asarray(shift, np.float64)[row_index, None]
    return np.asarray(values)


def decode_rows(
    packed: Array,
    in_features: int,
    first_row: int,
    row_count: int,
    codec: CodecView,
    scale: Array,
    shift: Array | None = None,
) -> Array:
    """Decoded rows first_row .. first_row + row_count - 1, (row_count, in_features) float64."""
    rows = np.arange(first_row, first_row + row_count)
    return decode_row_list(packed, in_features, rows, codec, scale, shift)


def matmul(
    x: Array,
    packed: Array,
    out_features: int,
    codec: CodecView,
    scale: Array,
    shift: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """x (n, in) times the transposed matrix, plus bias: (n, out_features) float64."""
    x = np.asarray(x, np.float64)
    weight = decode_rows(packed, x.shape[1], 0, out_features, codec, scale, shift)
    product = x @ weight.T
    return product if bias is None else product + np.asarray(bias, np.float64)
