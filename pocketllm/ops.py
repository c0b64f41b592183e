"""Products with a compressed matrix as PyTorch operators.

``pocketllm::matmul``, ``matmul_transposed`` and ``embedding`` run the C kernels on CPU tensors and
plain PyTorch on every other device, in row tiles: a dense weight never exists whole. A compressed
matrix travels as the tensors of the checkpoint (docs/FORMAT.md): packed indices, row scale and
shift, and its codec's table (or codebook and decoder).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import kernels, rowcode, trellis
from .kernels import AnyView, CodecView

# Weights of one row tile: what is decoded at a time outside the fused C kernels.
TILE_WEIGHTS_CPU = 1 << 20
TILE_WEIGHTS_DEVICE = 1 << 24
EPSILON = 1e-5
# What the kernels read and write by address.
BY_ADDRESS = (torch.float32, torch.bfloat16)
_MATRIX = (
    "Tensor weight, Tensor? scale, Tensor? shift, Tensor table, Tensor? table_scale, "
    "Tensor? decoder, Tensor? codes, int rows, int columns, int index_bits, int hidden, str norm, "
    "float[] bits"
)


class Matrix(NamedTuple):
    """A compressed matrix (rows, columns), in the order of the operators' arguments.

    Attributes:
        weight: uint8 (rows * row stride,), packed indices.
        scale: uint8 (rows + 1,) (:mod:`pocketllm.rowcode`) or float16 (rows,), or None for ones.
        shift: the same, or None for zeros.
        table: int8 or float16 (K, d); the codebook when there is a decoder; the magnitudes of a
            trellis, int8 (252,).
        table_scale: float32 (1,) of an int8 table, (6,) of magnitudes, else None.
        decoder: float16 (3 * P1,), or None.
        codes: uint8 (columns,) of a trellis whose blocks have bits of their own, or None.
        rows: out.
        columns: in.
        index_bits: bits of an index.
        hidden: h of the decoder.
        norm: N of the decoder.
        bits: of a trellis: of all weights, or with ``codes`` of each block; else empty.
    """

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    table: Tensor
    table_scale: Tensor | None
    decoder: Tensor | None
    codes: Tensor | None
    rows: int
    columns: int
    index_bits: int
    hidden: int
    norm: str
    bits: Sequence[float]

    @property
    def trellis_bits(self) -> trellis.Bits:
        """``bits`` as :mod:`pocketllm.trellis` has them."""
        return self.bits[0] if self.codes is None else tuple(int(b) for b in self.bits)


# Fields of a Matrix that are tensors, before the others.
TENSORS = 7


class Arrays(NamedTuple):
    """A compressed matrix as the kernels take it.

    Attributes:
        packed: uint8 (rows * row stride,), over the tensor's memory.
        scale: float32 (rows,).
        shift: float32 (rows,), or None.
        codec: the codec.
        rows: out.
        columns: in.
        held: all of them, for :func:`pocketllm.kernels.matmul_at`.
    """

    packed: np.ndarray
    scale: np.ndarray
    shift: np.ndarray | None
    codec: AnyView
    rows: int
    columns: int
    held: object


def matmul(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """x (n, columns) of any float dtype times the transposed matrix, plus bias.

    Returns (n, rows) in x's dtype. Differentiable with respect to x; a bias that needs a gradient
    is to be added by the caller.
    """
    return torch.ops.pocketllm.matmul(x, bias, *matrix)


def embedding(index: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Rows ``index`` (n,) int64 of a compressed matrix: (n, columns) in ``dtype``.

    Raises:
        IndexError: an index outside the matrix (CPU tensors).
    """
    if runs_directly(index):
        return _rows_cpu(index, arrays_of(matrix)).to(dtype)
    return torch.ops.pocketllm.embedding(index, *matrix).to(dtype)


def dequantise(matrix: Matrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole dense matrix (rows, columns)."""
    dense = torch.empty(matrix.rows, matrix.columns, dtype=dtype, device=matrix.weight.device)
    for first, last in _tiles(matrix):
        dense[first:last] = decode_tile(matrix, first, last).to(dtype)
    return dense


def decode_tile(matrix: Matrix, first: int, last: int) -> Tensor:
    """Rows ``first`` to ``last - 1``: (last - first, columns) float32."""
    if matrix.weight.device.type == "cpu":
        arrays = arrays_of(matrix)
        values = kernels.decode_rows(
            arrays.packed,
            matrix.columns,
            first,
            last - first,
            arrays.codec,
            arrays.scale,
            arrays.shift,
        )
        return torch.from_numpy(values)
    return decode_rows_torch(matrix, torch.arange(first, last, device=matrix.weight.device))


def runs_directly(tensor: Tensor) -> bool:
    """Whether the kernels may be called without the operators, whose dispatch costs more than a
    small product: on plain CPU tensors in eager mode.
    """
    return type(tensor) is Tensor and tensor.is_cpu and not torch.compiler.is_compiling()


def _tiles(matrix: Matrix) -> Iterator[tuple[int, int]]:
    weights = TILE_WEIGHTS_CPU if matrix.weight.device.type == "cpu" else TILE_WEIGHTS_DEVICE
    step = max(1, weights // matrix.columns)
    for first in range(0, matrix.rows, step):
        yield first, min(first + step, matrix.rows)


# ---- CPU: the C kernels -----------------------------------------------------------------------


def matmul_direct(x: Tensor, arrays: Arrays, bias: Tensor | None) -> Tensor:
    """The product of :func:`matmul` on CPU tensors by the kernels, without gradients.

    Args:
        x: (..., columns).
        arrays: the matrix.
        bias: (rows,) or None.

    Returns:
        (..., rows) in x's dtype.

    Raises:
        ValueError: x has another number of columns, or bias another length.
    """
    dtype, (*lead, columns) = x.dtype, x.shape
    if dtype not in BY_ADDRESS:
        return matmul_direct(x.float(), arrays, bias).to(dtype)
    if columns != arrays.columns:
        raise ValueError(f"input: got {columns} features, want {arrays.columns}")
    x = x.contiguous()
    if bias is not None:
        if bias.shape != (arrays.rows,):
            raise ValueError(f"bias: got shape {tuple(bias.shape)}, want ({arrays.rows},)")
        bias = (bias if bias.dtype in BY_ADDRESS else bias.float()).contiguous()
    product = x.new_empty((*lead, arrays.rows))
    kernels.matmul_at(
        arrays.held,
        x.data_ptr(),
        x.numel() // columns,
        dtype is torch.bfloat16,
        0 if bias is None else bias.data_ptr(),
        bias is not None and bias.dtype is torch.bfloat16,
        product.data_ptr(),
    )
    return product


def _rows_cpu(index: Tensor, arrays: Arrays) -> Tensor:
    rows = index.detach().contiguous().numpy()
    return torch.from_numpy(
        kernels.decode_row_list(
            arrays.packed, arrays.columns, rows, arrays.codec, arrays.scale, arrays.shift
        )
    )


class _TensorCache:
    """Values made from a tensor and others, until that tensor dies or any of them changes."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], tuple[Any, ...], Any]] = {}

    def get(self, tensor: Tensor, stamp: tuple[Any, ...]) -> Any:
        """The value, or None."""
        entry = self._entries.get(id(tensor))
        return (
            entry[2] if entry is not None and entry[0]() is tensor and entry[1] == stamp else None
        )

    def put(self, tensor: Tensor, stamp: tuple[Any, ...], value: Any) -> None:
        """Keep a value."""
        key, entries = id(tensor), self._entries

        def forget(dead: weakref.ref[Tensor]) -> None:
            if key in entries and entries[key][0] is dead:
                del entries[key]

        entries[key] = (weakref.ref(tensor, forget), stamp, value)


_matrices = _TensorCache()
_codecs = _TensorCache()


def _stamp(tensor: Tensor | None) -> tuple[int, int] | None:
    if tensor is None:
        return None
    return tensor.data_ptr(), version(tensor)


def version(tensor: Tensor | None) -> int:
    """Counts the changes of a tensor in place; 0 where nobody counts them."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def arrays_of(matrix: Matrix) -> Arrays:
    """The matrix as the kernels take it; conversions are made once."""
    stamp = tuple([_stamp(tensor) for tensor in matrix[:TENSORS]])
    arrays = _matrices.get(matrix.weight, stamp)
    if arrays is None:
        scale = np.ones(matrix.rows, np.float32)
        if matrix.scale is not None:
            scale = rowcode.decode(_numpy(matrix.scale), signed=False)
        shift = matrix.shift
        if shift is not None:
            shift = rowcode.decode(_numpy(shift), signed=True)
        packed = _numpy(matrix.weight)
        if matrix.bits:
            codec, scale = _trellis(matrix, scale)
        else:
            codec = _codec(matrix)
        held = kernels.hold_matrix(packed, matrix.columns, codec, scale, shift)
        arrays = Arrays(packed, scale, shift, codec, matrix.rows, matrix.columns, held)
        _matrices.put(matrix.weight, stamp, arrays)
    return arrays


def _trellis(matrix: Matrix, scale: np.ndarray) -> tuple[AnyView, np.ndarray]:
    assert matrix.table_scale is not None
    return trellis.view(
        _numpy(matrix.table),
        _numpy(matrix.table_scale),
        matrix.trellis_bits,
        scale,
        matrix.columns,
        None if matrix.codes is None else _numpy(matrix.codes),
    )


def _codec(matrix: Matrix) -> CodecView:
    stamp = (*(_stamp(t) for t in matrix[3:6]), matrix.index_bits, matrix.hidden, matrix.norm)
    view = _codecs.get(matrix.table, stamp)
    if view is None:
        codewords, subvector = matrix.table.shape
        view = CodecView(
            subvector,
            codewords,
            matrix.index_bits,
            _numpy(matrix.table) if matrix.table.dtype == torch.int8 else _float32(matrix.table),
            1.0 if matrix.table_scale is None else float(matrix.table_scale),
            None if matrix.decoder is None else _float32(matrix.decoder),
            matrix.hidden,
            matrix.norm,
        )
        _codecs.put(matrix.table, stamp, view)
    return view


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _float32(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return (tensor if tensor.dtype is torch.float32 else tensor.float()).contiguous().numpy()


# ---- every device: plain PyTorch --------------------------------------------------------------


def unpack_torch(packed: Tensor, count: int, bits: int) -> Tensor:
    """Indices (rows, count) int64 of packed rows (rows, row stride) uint8."""
    position = torch.arange(count, device=packed.device) * bits
    first = position >> 3
    # An index of up to 16 bits that starts inside a byte touches at most three.
    padded = functional.pad(packed, (0, 2)).to(torch.int64)
    window = padded[:, first] | padded[:, first + 1] << 8 | padded[:, first + 2] << 16
    return (window >> (position & 7)) & ((1 << bits) - 1)


def decode_rows_torch(matrix: Matrix, index: Tensor) -> Tensor:
    """Rows ``index`` (n,): (n, columns) float32, with PyTorch operations only."""
    if matrix.bits:
        return _finished_torch(_trellis_torch(matrix, index), matrix, index)
    subvector = matrix.table.shape[1]
    count = -(-matrix.columns // subvector)
    packed = matrix.weight.view(matrix.rows, -1)[index]
    values = matrix.table[unpack_torch(packed, count, matrix.index_bits)].float()
    if matrix.table_scale is not None:
        values = values * matrix.table_scale
    if matrix.decoder is not None:
        values = _decode_torch(values, matrix.decoder.float(), matrix.hidden, matrix.norm)
    return _finished_torch(values.flatten(1)[:, : matrix.columns], matrix, index)


def _finished_torch(values: Tensor, matrix: Matrix, index: Tensor) -> Tensor:
    """Rows ``index`` with their scales and shifts."""
    if matrix.scale is not None:
        values = values * _statistics_torch(matrix.scale, index, signed=False)[:, None]
    if matrix.shift is not None:
        values = values + _statistics_torch(matrix.shift, index, signed=True)[:, None]
    return values


def _trellis_torch(matrix: Matrix, index: Tensor) -> Tensor:
    """Rows ``index`` of a matrix in trellis codes, without scales and shifts: docs/FORMAT.md."""
    bits, device = matrix.trellis_bits, index.device
    blocks, extra = trellis.block_bits(bits, matrix.columns)
    last = (max(1, matrix.rows // trellis.SEGMENT) - 1) * trellis.SEGMENT
    segment = (index // trellis.SEGMENT * trellis.SEGMENT).clamp(max=last)
    size = torch.where(segment < last, trellis.SEGMENT, matrix.rows - segment)
    few = trellis.row_bytes(bits, matrix.columns)
    more = trellis.row_bytes(bits, matrix.columns, True) if extra else few

    def richer(rows: Tensor) -> Tensor:
        return rows * extra // trellis.QUARTERS

    def plane(rows: Tensor, number: int, is_richer: bool) -> Tensor:
        """(n, columns of the plane) 0 or 1."""
        columns = trellis.plane_columns(bits, matrix.columns, is_richer)
        start = sum(-(-n // 8) for n in columns[:number])
        at = torch.arange(columns[number], device=device)
        first = rows * few + richer(rows) * (more - few) + start
        return matrix.weight[first[:, None] + at // 8].int() >> (at % 8) & 1

    columns = trellis.plane_columns(bits, matrix.columns)
    window = torch.zeros(len(index), columns[0] if columns else 0, dtype=torch.int32, device=device)
    for i in range(trellis.MEMORY + 1 if columns else 0):
        before = index - i
        wrapped = torch.where(before >= segment, before, before + size).clamp(min=0)
        there = (before >= segment) | (size >= trellis.SHORT)
        window |= torch.where(there[:, None], plane(wrapped, 0, False), 0) << i
    level = torch.zeros_like(window)
    for place, taps in enumerate(trellis.TAPS):
        parity = window & taps
        for shift in (8, 4, 2, 1):
            parity = parity ^ parity >> shift
        level |= (parity & 1) << place
    values = torch.zeros(len(index), matrix.columns, device=device)
    each = torch.from_numpy(np.repeat(blocks, trellis.BLOCK)[: matrix.columns]).to(device).long()
    for is_richer in (False, True) if extra else (False,):
        these = torch.nonzero((richer(index + 1) > richer(index)) == is_richer)[:, 0]
        rows, found = index[these], level[these]
        for number, n in enumerate(trellis.plane_columns(bits, matrix.columns, is_richer)[1:], 1):
            found[:, :n] |= plane(rows, number, is_richer) << (len(trellis.TAPS) + number - 1)
        k = each[: found.shape[1]] + is_richer
        half = 2 << k
        place = found % half
        place = torch.where(found >= half, half - 1 - place, place) + (4 << (k - 1)) - 4
        assert matrix.table_scale is not None
        made = matrix.table[place].float() * torch.where(found >= half, -1.0, 1.0)
        values[these, : found.shape[1]] = made * matrix.table_scale[k - 1]
    if matrix.codes is None:
        return values
    order = torch.argsort(-(matrix.codes.long() & 7), stable=True)
    scale = torch.exp2(-(matrix.codes >> 3).double() / trellis.SCALE_STEPS).float()
    return torch.zeros_like(values).index_copy_(1, order, values * scale[order])


def _statistics_torch(stored: Tensor, index: Tensor, *, signed: bool) -> Tensor:
    """Scales or shifts of rows ``index``, float32: :func:`pocketllm.rowcode.decode` in PyTorch."""
    if stored.dtype != torch.uint8:
        return stored[index].float()
    code = stored[index + 1].int()
    size = code & 127 if signed else code
    value = torch.where(size == 0, 0, (16 * stored[0].int() + size) << 19).view(torch.float32)
    return torch.where(code > 127, -value, value) if signed else value


def _decode_torch(y: Tensor, parameters: Tensor, hidden: int, norm: str) -> Tensor:
    """The decoder on codewords (rows, L, d), as docs/FORMAT.md states it."""
    subvector = y.shape[-1]
    sizes = [hidden * subvector, hidden, hidden * subvector, subvector]
    mlps = [part.split(sizes) for part in parameters.view(3, -1)]

    def mlp(number: int, x: Tensor) -> Tensor:
        w1, b1, w2, b2 = mlps[number]
        active = functional.gelu(functional.linear(x, w1.view(hidden, subvector), b1))
        return functional.linear(active, w2.view(subvector, hidden), b2)

    def normalise(x: Tensor) -> Tensor:
        if norm == "input":
            return x
        return functional.layer_norm(x, x.shape[1:] if norm == "rln" else x.shape[2:], eps=EPSILON)

    y = y + mlp(1, normalise(y))
    return mlp(0, normalise(y + mlp(2, normalise(y))))


def matmul_torch(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """The product of :func:`matmul` with PyTorch operations only, tile by tile."""
    product = x.new_empty(x.shape[0], matrix.rows)
    for first, last in _tiles(matrix):
        tile = decode_rows_torch(matrix, torch.arange(first, last, device=x.device)).to(x.dtype)
        addend = None if bias is None else bias[first:last].to(x.dtype)
        product[:, first:last] = functional.linear(x, tile, addend)
    return product


# ---- operators --------------------------------------------------------------------------------


@torch.library.custom_op(
    "pocketllm::matmul", mutates_args=(), schema=f"(Tensor x, Tensor? bias, {_MATRIX}) -> Tensor"
)
def _matmul(x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
    matrix = Matrix(*parts)
    if x.device.type == "cpu":
        return matmul_direct(x, arrays_of(matrix), bias)
    return matmul_torch(x, matrix, bias)


@_matmul.register_fake
def _matmul_fake(x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
    return x.new_empty(x.shape[0], Matrix(*parts).rows)


@torch.library.custom_op(
    "pocketllm::matmul_transposed",
    mutates_args=(),
    schema=f"(Tensor gradient, {_MATRIX}) -> Tensor",
)
def _matmul_transposed(gradient: Tensor, *parts: Any) -> Tensor:
    """gradient (n, rows) times the matrix: (n, columns), the gradient with respect to x."""
    matrix = Matrix(*parts)
    wide = torch.float32 if gradient.device.type == "cpu" else gradient.dtype
    result = torch.zeros(gradient.shape[0], matrix.columns, dtype=wide, device=gradient.device)
    for first, last in _tiles(matrix):
        result.addmm_(gradient[:, first:last].to(wide), decode_tile(matrix, first, last).to(wide))
    return result.to(gradient.dtype) if gradient.dtype != wide else result


@_matmul_transposed.register_fake
def _matmul_transposed_fake(gradient: Tensor, *parts: Any) -> Tensor:
    return gradient.new_empty(gradient.shape[0], Matrix(*parts).columns)


def _setup_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *parts = inputs
    ctx.save_for_backward(*parts[:TENSORS])
    ctx.constants = parts[TENSORS:]


def _backward_matmul(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x_gradient = None
    if ctx.needs_input_grad[0]:
        x_gradient = torch.ops.pocketllm.matmul_transposed(
            gradient, *ctx.saved_tensors, *ctx.constants
        )
    return (x_gradient, None, *[None] * len(Matrix._fields))


_matmul.register_autograd(_backward_matmul, setup_context=_setup_matmul)


@torch.library.custom_op(
    "pocketllm::embedding", mutates_args=(), schema=f"(Tensor index, {_MATRIX}) -> Tensor"
)
def _embedding(index: Tensor, *parts: Any) -> Tensor:
    matrix = Matrix(*parts)
    return (
        _rows_cpu(index, arrays_of(matrix))
        if index.device.type == "cpu"
        else decode_rows_torch(matrix, index)
    )


@_embedding.register_fake
def _embedding_fake(index: Tensor, *parts: Any) -> Tensor:
    matrix = Matrix(*parts)
    return matrix.weight.new_empty(index.shape[0], matrix.columns, dtype=torch.float32)
