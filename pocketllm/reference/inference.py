"""Plain NumPy twins of the inference kernels: the oracle of csrc/infer.c.

A compressed matrix (out, in) is a packed index per sub-vector, a codec that turns an index into
d values, and a scale and optional shift per row:
    W[r, l*d + j] = scale[r] * T[index[r, l]][j] + shift[r].
With a decoder codec, T[index] is replaced by the decoder applied to the row of codewords. In
trellis codes a value is what its bits and those of the rows above it stand for. Everything is
computed in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..kernels import TrellisView
from .search import unpack
from .training import decode

if TYPE_CHECKING:
    from ..kernels import AnyView

Array = NDArray[Any]


def decode_row_list(
    packed: Array,
    in_features: int,
    row_index: Array,
    codec: AnyView,
    scale: Array,
    shift: Array | None = None,
) -> Array:
    """Decoded rows (n, in_features) float64 of the rows named in row_index (n,)."""
    row_index = np.asarray(row_index, np.int64)
    if isinstance(codec, TrellisView):
        values = trellis_values(packed, len(scale), in_features, codec)[row_index]
        return _finish(values, row_index, scale, shift)
    count = -(-in_features // codec.subvector)
    stride = -(-count * codec.index_bits // 8)
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
    return _finish(values[:, :in_features], row_index, scale, shift)


def _finish(values: Array, row_index: Array, scale: Array, shift: Array | None) -> Array:
    """Values of rows with their scales and shifts."""
    values = values * np.asarray(scale, np.float64)[row_index, None]
    if shift is not None:
        values = values + np.asarray(shift, np.float64)[row_index, None]
    return np.asarray(values)


def trellis_values(packed: Array, rows: int, columns: int, codec: TrellisView) -> Array:
    """What the bits of a matrix in trellis codes stand for, (rows, columns) float64: a weight at a
    time, without row scales."""
    symbol, bits = unpack_trellis(packed, rows, columns, codec)
    values = np.zeros((rows, columns))
    segments = max(1, rows // 256)
    for row in range(rows):
        segment = min(row // 256, segments - 1)
        first, end = 256 * segment, rows if segment == segments - 1 else 256 * (segment + 1)
        for at in range(columns):
            k = int(bits[row, at])
            if k == 0:
                continue
            window = 0
            for i in range(9):
                before = row - i
                if before < first:  # the register starts as it ends; in short segments with zeros
                    before = before + end - first if end - first >= 16 else -1
                window |= (int(symbol[before, at]) & 1) << i if before >= 0 else 0
            parities = [(window & taps).bit_count() & 1 for taps in (0x98, 0x56, 0x1B1)]
            index = (
                parities[0] + 2 * parities[1] + 4 * parities[2] + 8 * (int(symbol[row, at]) >> 1)
            )
            half = 2 ** (k + 1)
            magnitude = codec.magnitude[half - 4 : 2 * half - 4]
            rest = index % half
            level = -int(magnitude[half - 1 - rest]) if index >= half else int(magnitude[rest])
            factor = 1.0 if codec.factor is None else float(codec.factor[at])
            column = at if codec.order is None else int(codec.order[at])
            values[row, column] = level * factor
    return values


def unpack_trellis(
    packed: Array, rows: int, columns: int, codec: TrellisView
) -> tuple[Array, Array]:
    """Symbols, and how many bits each has: (rows, columns) int64, columns as they are stored."""
    symbol = np.zeros((rows, columns), np.int64)
    bits = np.zeros((rows, columns), np.int64)
    blocks = np.repeat(np.asarray(codec.block_bits, np.int64), 128)[:columns]
    at = 0
    for row in range(rows):
        more = (row + 1) * codec.extra // 4 - row * codec.extra // 4
        bits[row] = np.where(blocks > 0, blocks + more, 0)
        for plane in range(6):
            count = int((bits[row] > plane).sum())
            size = -(-count // 8)
            found = np.unpackbits(packed[at : at + size], bitorder="little")[:count]
            symbol[row, :count] |= found.astype(np.int64) << plane
            at += size
    return symbol, bits


def decode_rows(
    packed: Array,
    in_features: int,
    first_row: int,
    row_count: int,
    codec: AnyView,
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
    codec: AnyView,
    scale: Array,
    shift: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """x (n, in) times the transposed matrix, plus bias: (n, out_features) float64."""
    x = np.asarray(x, np.float64)
    weight = decode_rows(packed, x.shape[1], 0, out_features, codec, scale, shift)
    product = x @ weight.T
    return product if bias is None else product + np.asarray(bias, np.float64)
