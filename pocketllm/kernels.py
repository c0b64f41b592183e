"""The C kernels on NumPy arrays. The only module that imports the extension.

Arrays are float32 unless said otherwise. Strided arrays are accepted (they are copied); another
dtype or shape is refused with a sentence like ``z: got float64 (3, 7), want float32 (n, 8)``
(TypeError for the dtype, ValueError for the shape). The GIL is released while a kernel runs. The
number of threads is torch's when torch is imported, else OpenMP's; no result depends on it, and no
index or packed byte on the instruction set.
Every function has a plain NumPy twin of the same name in :mod:`pocketllm.reference`.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from pocketllm import _kernels

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]


def _threads() -> int:
    torch: Any = sys.modules.get("torch")
    threads = torch.get_num_threads() if hasattr(torch, "get_num_threads") else None
    return threads or _kernels.default_threads()


# ---- instruction set --------------------------------------------------------------------------


def isa() -> str:
    """Name of the instruction set in use: ``scalar``, ``avx2``, ``avx512``, ``amx`` or ``neon``."""
    return _kernels.isa()


def available_isas() -> list[str]:
    """Names of the instruction sets that this build has and this machine runs, best last."""
    return _kernels.available_isas()


def set_isa(name: str) -> None:
    """Use the named instruction set from now on, in the whole process.

    The environment variable POCKETLLM_ISA does the same at import.

    Raises:
        ValueError: this machine or build does not have it.
    """
    _kernels.set_isa(name)


# In the order of enum pllm_activations.
_ACTIVATIONS = ("float32", "integer")


def activations() -> str:
    """How activations meet int8 tables: as ``integer`` or as ``float32`` (see :func:`matmul`)."""
    return _activations


def set_activations(name: str) -> None:
    """Choose ``integer`` (the default, fast) or ``float32`` from now on, in the whole process.

    The environment variable POCKETLLM_ACTIVATIONS does the same at import.

    Raises:
        ValueError: another name.
    """
    global _activations
    if name not in _ACTIVATIONS:
        raise ValueError(f"activations: got {name!r}, want {' or '.join(_ACTIVATIONS)}")
    _activations = name


_activations = os.environ.get("POCKETLLM_ACTIVATIONS") or "integer"
if _activations not in _ACTIVATIONS:
    raise ImportError(
        f"POCKETLLM_ACTIVATIONS: got {_activations!r}, want {' or '.join(_ACTIVATIONS)}"
    )


def show_config() -> str:
    """One line on the kernels in use: instruction set, activations, threads, compiler."""
    compiler, lanes = _kernels.build_info()
    return (
        f"kernels: {isa()} ({lanes} float lanes) of {', '.join(available_isas())}; "
        f"activations: {activations()}; threads: {_threads()}; compiler: {compiler}"
    )


# ---- search and packing -----------------------------------------------------------------------


@overload
def nearest(
    z: Floats,
    codebook: Floats,
    *,
    weight: Floats | None = None,
    bias: Floats | None = None,
    return_error: Literal[False] = False,
) -> Ints: ...
@overload
def nearest(
    z: Floats,
    codebook: Floats,
    *,
    weight: Floats | None = None,
    bias: Floats | None = None,
    return_error: Literal[True],
) -> tuple[Ints, Floats]: ...
def nearest(
    z: Floats,
    codebook: Floats,
    *,
    weight: Floats | None = None,
    bias: Floats | None = None,
    return_error: bool = False,
) -> Ints | tuple[Ints, Floats]:
    """Index of the codeword with the smallest ``sum_j weight[j] (z[j] - c[j])**2 + bias``.

    Exact search in float32, lowest index on ties. Distances are compared as
    ``(|c|**2 + bias) / 2 - z.c``: two codewords whose distances differ by less than the rounding
    of ``|z| |c|`` may swap. A row of z with NaN or Inf in it gets some index in range; so does
    every row when the codebook holds them.

    Args:
        z: (n, d) queries, d in 1..16.
        codebook: (K, d) codewords, K in 1..65536.
        weight: (d,) weight of each dimension, default 1.
        bias: (K,) added to the distance of each codeword, default 0.
        return_error: also return that smallest sum, computed from the differences.

    Returns:
        int32 (n,), and float32 (n,) with ``return_error``.
    """
    index, error = _kernels.nearest(z, codebook, weight, bias, return_error, _threads())
    return (index, error) if return_error else index


class SearchIndex:
    """A codebook made ready for many calls of :func:`nearest`, whose results it gives bit for bit.

    Takes a copy of the codebook. :func:`nearest` builds one by itself where that pays for a single
    call, so this is for a codebook that is searched several times, or with a good guess at hand.

    Args:
        codebook: (K, d) codewords, K in 1..65536, d in 1..16.
        weight: (d,) weight of each dimension, default 1.
        bias: (K,) added to the distance of each codeword, default 0.
    """

    def __init__(
        self, codebook: Floats, *, weight: Floats | None = None, bias: Floats | None = None
    ) -> None:
        self._index = _kernels.search_index(codebook, weight, bias, _threads())

    @overload
    def nearest(
        self, z: Floats, *, previous: Ints | None = None, return_error: Literal[False] = False
    ) -> Ints: ...
    @overload
    def nearest(
        self, z: Floats, *, previous: Ints | None = None, return_error: Literal[True]
    ) -> tuple[Ints, Floats]: ...
    def nearest(
        self, z: Floats, *, previous: Ints | None = None, return_error: bool = False
    ) -> Ints | tuple[Ints, Floats]:
        """Index of the nearest codeword of each row, as :func:`nearest` defines it.

        Args:
            z: (n, d) queries.
            previous: int32 (n,), a guess of each index, which saves time and changes nothing else.
            return_error: also return the weighted squared distance plus bias.

        Returns:
            int32 (n,), and float32 (n,) with ``return_error``.
        """
        index, error = _kernels.search(self._index, z, previous, return_error, _threads())
        return (index, error) if return_error else index


def pack(index: Ints, bits: int) -> Bytes:
    """Rows of indices as LSB-first bit streams, each row padded to whole bytes.

    Index i of a row takes the row's bits ``i*bits .. (i+1)*bits - 1``; bit n is bit ``n % 8`` of
    byte ``n // 8``. The bits behind the last index are zero.

    Args:
        index: int32 (rows, L), each 0 .. 2**bits - 1.
        bits: 1..16.

    Returns:
        uint8 (rows, ceil(L * bits / 8)).

    Raises:
        ValueError: an index does not fit, or bits is out of range.
    """
    return _kernels.pack(index, bits, _threads())


def unpack(packed: Bytes, count: int, bits: int) -> Ints:
    """Inverse of :func:`pack`: int32 (rows, count) from uint8 (rows, ceil(count * bits / 8))."""
    return _kernels.unpack(packed, count, bits, _threads())


def index_max(packed: Bytes, count: int, bits: int) -> int:
    """Largest index in a packed payload of (rows, ceil(count * bits / 8)) bytes, -1 if it has none.

    Made for range checks: nothing the size of the indices is allocated.
    """
    return _kernels.index_max(packed, count, bits, _threads())


# ---- inference --------------------------------------------------------------------------------


class CodecView(NamedTuple):
    """What the kernels need of a codec to turn indices into values.

    Attributes:
        subvector: d, values per index, 1..16.
        codewords: K, 1..65536.
        index_bits: bits of a packed index, 1..16. An index of K or more reads as K - 1.
        table: (K, d) decoded sub-vectors, float32 or int8; with a decoder the codebook, float32.
        table_scale: multiplies an int8 table; not used with a float32 table.
        decoder: flat decoder parameters, float32 (3 * (2*h*d + h + d),), or None.
        hidden: h, width of the decoder's hidden layer, 1..64.
        norm: the decoder's norm, ``"rln"``, ``"ln"`` or ``"input"``.
    """

    subvector: int
    codewords: int
    index_bits: int
    table: NDArray[Any]
    table_scale: float = 1.0
    decoder: Floats | None = None
    hidden: int = 0
    norm: str = "input"


class TrellisView(NamedTuple):
    """How a matrix in trellis codes is stored (docs/FORMAT.md); takes the place of a CodecView.

    Attributes:
        block_bits: uint8 (ceil(in_features / 128),), bits of a weight in each 128 stored columns,
            0..6, never rising.
        extra: of every four rows so many have a bit more, 0..3; then block_bits end at 5.
        magnitude: int8 (252,), none negative: 4, 8, 16, ... 128 of 1 to 6 bits, the first 12 at
            most 63.
        order: int32 (in_features,), the column of W that stands i-th, each once; or None: in order.
        factor: (in_features,) what values of the i-th stored column are multiplied by, or None.
    """

    block_bits: Bytes
    extra: int
    magnitude: NDArray[np.int8]
    order: Ints | None = None
    factor: Floats | None = None


AnyView = CodecView | TrellisView


def decode_rows(
    packed: Bytes,
    in_features: int,
    first_row: int,
    row_count: int,
    codec: AnyView,
    scale: Floats,
    shift: Floats | None = None,
    out: Floats | None = None,
) -> Floats:
    """Consecutive rows of a compressed matrix (out_features, in_features).

    A value is ``(table value * table_scale) * scale[row] + shift[row]``, rounded at each step.

    Args:
        packed: flat uint8, out_features rows of ceil(ceil(in_features / d) * index_bits / 8) bytes.
        in_features: columns, at least 1.
        first_row: first row to decode.
        row_count: number of rows, at least 0.
        codec: what the indices mean.
        scale: (out_features,) scale of each row.
        shift: (out_features,) added to each row.
        out: (row_count, in_features) to write to and return.

    Returns:
        float32 (row_count, in_features).

    Raises:
        ValueError: the rows are not all in the matrix, or a shape is wrong.
    """
    return _kernels.decode_rows(
        packed, in_features, first_row, row_count, codec, scale, shift, out, _threads()
    )


def decode_row_list(
    packed: Bytes,
    in_features: int,
    row_index: NDArray[np.int64],
    codec: AnyView,
    scale: Floats,
    shift: Floats | None = None,
) -> Floats:
    """The rows named in row_index, int64 (n,), in that order: an embedding's look-up.

    Other arguments are those of :func:`decode_rows`. Returns float32 (n, in_features).

    Raises:
        IndexError: a row is not in the matrix.
    """
    return _kernels.decode_row_list(packed, in_features, row_index, codec, scale, shift, _threads())


def matmul(
    x: Floats,
    packed: Bytes,
    out_features: int,
    codec: AnyView,
    scale: Floats,
    shift: Floats | None = None,
    bias: Floats | None = None,
    out: Floats | None = None,
    *,
    activations: str | None = None,
) -> Floats:
    """Activations times a compressed matrix, transposed: ``x @ W.T + bias``.

    W never exists whole: each thread decodes a tile of rows at a time. With ``float32`` sums are
    accumulated in float32, in an order that depends on the number of tokens alone. With ``integer``
    and an int8 table activations are rounded and multiplied exactly, in integers: for d of 1, 2 and
    4 and up to 256 codewords to 127 steps either side of zero for each 32 columns, otherwise to
    32,639 for each span of up to 512; other tables and decoders take ``float32`` in any case.

    Args:
        x: (n, in_features) activations; n may be 0.
        packed: flat uint8, as in :func:`decode_rows`.
        out_features: rows of W.
        codec: what the indices mean.
        scale: (out_features,) scale of each row.
        shift: (out_features,) added to each row.
        bias: (out_features,) added to each product.
        out: (n, out_features) to write to and return; may not overlap x.
        activations: ``float32`` or ``integer``; None: :func:`activations`.

    Returns:
        float32 (n, out_features).
    """
    form = _ACTIVATIONS.index(activations or _activations)
    return _kernels.matmul(
        x, packed, out_features, codec, scale, shift, bias, out, form, _threads()
    )


def hold_matrix(
    packed: Bytes, in_features: int, codec: AnyView, scale: Floats, shift: Floats | None = None
) -> object:
    """A compressed matrix checked once, for :func:`matmul_at`. Keeps its arrays alive.

    Args:
        packed: flat uint8, as in :func:`decode_rows`.
        in_features: columns of W.
        codec: what the indices mean.
        scale: (out_features,) scale of each row.
        shift: (out_features,) added to each row.
    """
    return _kernels.hold_matrix(packed, in_features, codec, scale, shift)


def matmul_at(
    held: object,
    x: int,
    n: int,
    x_is_bfloat16: bool,
    bias: int,
    bias_is_bfloat16: bool,
    product: int,
) -> None:
    """:func:`matmul` on memory that is not NumPy's, with a tenth of its cost for small products.

    Addresses are trusted: who calls answers for shapes, dtypes and contiguous memory.

    Args:
        held: the matrix, from :func:`hold_matrix`.
        x: address of (n, in_features) float32 or bfloat16.
        n: tokens.
        x_is_bfloat16: what x and the product are.
        bias: address of (out_features,), or 0 for none.
        bias_is_bfloat16: what it is.
        product: address of (n, out_features), written; of x's dtype, rounded to nearest, even.
    """
    form = _ACTIVATIONS.index(_activations)
    _kernels.matmul_at(held, x, n, x_is_bfloat16, bias, bias_is_bfloat16, product, form, _threads())


def hold_layer(
    matrices: tuple[object, ...],
    biases: tuple[Floats | None, ...],
    norms: tuple[Floats | None, ...],
    head_width: int,
    epsilon: float,
    scale: float,
) -> object:
    """A decoder layer checked once, for :func:`hold_layers`.

    The layer is ``x += O attention(Q n0(x), K n0(x), V n0(x))``, then ``x += Down (silu(Gate n1(x))
    * Up n1(x))``, with root mean square norms, grouped queries and rotary positions.

    Args:
        matrices: from :func:`hold_matrix`: Q, K, V, O, Gate, Up, Down.
        biases: of each (out_features,), or None.
        norms: n0 and n1 (width,), and of every head of queries and of keys (head_width,) or None.
        head_width: even.
        epsilon: of the norms.
        scale: of the scores.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    return _kernels.hold_layer(matrices, biases, norms, head_width, epsilon, scale)


def hold_layers(layers: tuple[object, ...]) -> object:
    """Layers that tokens pass one after the other, checked once, for :func:`token_at`.

    Args:
        layers: from :func:`hold_layer`, at least one.

    Raises:
        ValueError: layers of different widths.
    """
    return _kernels.hold_layers(layers)


def token_at(
    layers: object,
    x: int,
    is_bfloat16: bool,
    cosine: int,
    sine: int,
    rooms: tuple[int, ...],
    length: int,
    y: int,
) -> None:
    """What the layers make of the next token. Addresses are trusted.

    Args:
        layers: from :func:`hold_layers`.
        x: address of (width,), bfloat16 or float32.
        is_bfloat16: what x, cosine, sine, keys, values and y are, and what a layer leaves to the
            next.
        cosine: address of (head_width,), of the token's position.
        sine: address of (head_width,).
        rooms: of each layer the address of its keys (key heads, room, head_width), of which the
            first `length` are there and the token's own are written behind them; the address of
            its values, the same; and room, more than `length`.
        length: tokens before this one.
        y: address of (width,), written; not x.
    """
    form = _ACTIVATIONS.index(_activations)
    _kernels.token_at(layers, x, is_bfloat16, cosine, sine, rooms, length, y, form, _threads())


# ---- training ---------------------------------------------------------------------------------


class TrainStep(NamedTuple):
    """What one training step returns.

    Attributes:
        loss: reconstruction + codebook_loss * commitment.
        reconstruction: mean of weight * (rows - decoded)**2 over all values.
        commitment: mean of (latents - codeword)**2 over all values.
        indices: int32 (n,), the codeword chosen for each of the n = rows * length / d sub-vectors.
        grad_encoder, grad_decoder: gradients of the loss, flat like the parameters.
        grad_codebook: (K, d).
    """

    loss: float
    reconstruction: float
    commitment: float
    indices: Ints
    grad_encoder: Floats
    grad_codebook: Floats
    grad_decoder: Floats


NORMS = {"input": 0, "ln": 1, "rln": 2}


def _norm(name: str) -> int:
    if name not in NORMS:
        raise ValueError(f"norm: got {name!r}, want one of {', '.join(NORMS)}")
    return NORMS[name]


def rln(x: Floats) -> Floats:
    """Row layer norm: each row of x (rows, length) to mean 0 and variance 1 (biased, eps 1e-5)."""
    return _kernels.rln(x, _threads())


def rln_backward(x: Floats, grad: Floats) -> Floats:
    """Gradient with respect to x of :func:`rln`, given ``grad`` (rows, length) of its output."""
    return _kernels.rln_backward(x, grad, _threads())


def mlp(x: Floats, params: Floats, *, hidden: int) -> Floats:
    """``W2 gelu(W1 x + b1) + b2`` for every row of x.

    Args:
        x: (n, d), d in 1..16.
        params: flat W1 (h, d), b1 (h), W2 (d, h), b2 (d).
        hidden: h, 1..64.

    GELU is the exact form; its error function is within 5e-7 of the true one, as is its slope.
    """
    return _kernels.mlp(x, params, hidden, _threads())


def mlp_backward(x: Floats, params: Floats, grad: Floats, *, hidden: int) -> tuple[Floats, Floats]:
    """(grad_x (n, d), grad_params flat) of :func:`mlp`, given ``grad`` (n, d) of its output."""
    return _kernels.mlp_backward(x, params, grad, hidden, _threads())


def encode(rows: Floats, params: Floats, *, subvector: int, hidden: int, norm: str) -> Floats:
    """The codec's encoder: ``z = mlp0(x); z += mlp1(N(z)); z += mlp2(N(z)); N(z)``.

    Args:
        rows: (rows, length), length a multiple of ``subvector``.
        params: flat mlp0 | mlp1 | mlp2.
        subvector: d, 1..16.
        hidden: h, 1..64.
        norm: what N is: ``"rln"`` (over the row), ``"ln"`` (over the sub-vector), ``"input"``
            (identity).

    Returns:
        Latents (rows, length).
    """
    return _kernels.encode(rows, params, subvector, hidden, _norm(norm), _threads())


def encode_backward(
    rows: Floats, params: Floats, grad: Floats, *, subvector: int, hidden: int, norm: str
) -> tuple[Floats, Floats]:
    """(grad_rows, grad_params) of :func:`encode`, given ``grad`` (rows, length) of the latents."""
    return _kernels.encode_backward(rows, params, grad, subvector, hidden, _norm(norm), _threads())


def decode(latents: Floats, params: Floats, *, subvector: int, hidden: int, norm: str) -> Floats:
    """The codec's decoder: ``y = latents; y += mlp1(N(y)); y += mlp2(N(y)); mlp0(N(y))``.

    ``latents`` are codewords laid out as rows (rows, length); the rest is as in :func:`encode`.
    """
    return _kernels.decode(latents, params, subvector, hidden, _norm(norm), _threads())


def decode_backward(
    latents: Floats, params: Floats, grad: Floats, *, subvector: int, hidden: int, norm: str
) -> tuple[Floats, Floats]:
    """(grad_latents, grad_params) of :func:`decode`, given ``grad`` (rows, length)."""
    return _kernels.decode_backward(
        latents, params, grad, subvector, hidden, _norm(norm), _threads()
    )


def train_step(
    rows: Floats,
    encoder: Floats,
    codebook: Floats,
    decoder: Floats,
    *,
    hidden: int,
    norm: str,
    codebook_loss: float = 0.5,
    weight: Floats | None = None,
) -> TrainStep:
    """Losses and all gradients of one straight-through step: encode, nearest codeword, decode.

    The gradient at the decoder's input goes to the latents as it is; the commitment term pulls
    latents and codewords towards each other. Nothing is updated (see :func:`adam`).

    Args:
        rows: (rows, length), length a multiple of d, at least one value.
        encoder: flat parameters as in :func:`encode`.
        codebook: (K, d).
        decoder: flat parameters as in :func:`decode`.
        hidden: h.
        norm: as in :func:`encode`.
        codebook_loss: lambda, weight of the commitment term.
        weight: (rows, length), or (length,) for all rows: weights of the squared errors.
    """
    reconstruction, commitment, *arrays = _kernels.train_step(
        rows, encoder, codebook, decoder, weight, hidden, _norm(norm), codebook_loss, _threads()
    )
    loss = reconstruction + codebook_loss * commitment
    return TrainStep(loss, reconstruction, commitment, *arrays)


def adam(
    param: Floats,
    grad: Floats,
    mean: Floats,
    variance: Floats,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> None:
    """One Adam update, in place in ``param``, ``mean`` and ``variance`` (all (n,)).

    ``step`` counts from 1. The arrays must be contiguous and writable.
    """
    _kernels.adam(param, grad, mean, variance, step, lr, beta1, beta2, eps, _threads())


def cluster_sums(
    x: Floats, index: Ints, k: int, *, weight: Floats | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weighted sums per codeword, in double, in the order of x: one half of a Lloyd iteration.

    Args:
        x: (n, d), d in 1..16.
        index: int32 (n,), each in 0..k-1.
        k: number of codewords, 1..65536.
        weight: None (all 1), (n,) or (n, d).

    Returns:
        ``sum`` (d, k): of weight * x; ``mass``: of the weights, (k,), or (d, k) for weights (n, d).
    """
    return _kernels.cluster_sums(x, index, k, weight, _threads())


# ---- encoding with error feedback -------------------------------------------------------------


def encode_feedback(
    x: Floats,
    table: Floats,
    metric: Floats,
    feedback: Floats,
    previous: Ints | None = None,
    sweeps: int = 1,
) -> Ints:
    """Choose the sub-vectors of each row in order, feeding every error into the later targets.

    ``q[l] = x[l] + sum over m < l of (x[m] - table[index[m]]) @ feedback[m, l]``, and ``index[l]``
    is the entry t of the smallest ``(q[l] - t) @ metric[l] @ (q[l] - t)``, lowest index on ties;
    x[l] are the columns ``l*d .. l*d + d - 1`` and feedback[m, l] is the (d, d) block. With
    ``previous``, an earlier choice, all are chosen again, each given the newest choice of all
    others: q[l] has the sum over m > l as well. This is done ``sweeps`` times, from the first to
    the last, then from the last to the first, and so on; each after the first costs half as much.

    Args:
        x: (rows, L*d) normalised rows, columns in the order of encoding.
        table: (K, d), d in 1..16, K in 1..65536.
        metric: (L, d, d), symmetric and positive definite.
        feedback: (L*d, L*d); diagonal blocks are not read, those below only with ``previous``.
        previous: int32 (rows, L), each 0..K-1.
        sweeps: at least 1, and 1 without ``previous``.

    Returns:
        int32 (rows, L).
    """
    return _kernels.encode_feedback(x, table, metric, feedback, previous, sweeps, _threads())


# ---- encoding in trellis codes ----------------------------------------------------------------


def encode_trellis(
    x: Floats,
    weight: Floats,
    feedback: Floats | None,
    bits: Bytes,
    extra: int,
    factor: Floats,
    level: Floats,
) -> Bytes:
    """Choose the bits of every weight in a trellis code, feeding errors into the later columns.

    Column by column, ``q[c] = (x[c] + sum over m < c of (x - v)[m] * feedback[m, c]) / factor[c]``,
    where ``v = factor * level`` is what the bits chosen stand for. The bits of a segment of a
    column, 256 rows (the last has those left over, too), are the path through the trellis of the
    least sum of ``weight * (q - level)**2`` that ends with the register it starts with: the one
    that the best way from the segment's last 48 rows into its first 48 has between them. Segments
    of fewer than 16 rows start with an empty register and end with any.
    :func:`pocketllm.reference.trellis_levels` gives the levels of bits.

    Args:
        x: (rows, columns), columns in the order of encoding.
        weight: (rows,) of the squared errors, none negative.
        feedback: (columns, columns), or None: no error is fed; read above its diagonal.
        bits: uint8 (columns,), 0..6, and with ``extra`` 0..5; 0: v is 0 and the symbols are.
        extra: of every four rows so many, 0..3, have a bit more in columns that have bits.
        factor: (columns,), above 0.
        level: (252,) magnitudes of 1, 2, ... 6 bits, ``2 << bits`` of each.

    Returns:
        uint8 (rows, columns): the bits of each weight, the one that enters the register lowest. A
        weight of an x that is not finite gets some bits.

    Raises:
        ValueError: also when ``weight``, ``factor`` or ``level`` are not finite.
    """
    return _kernels.encode_trellis(x, weight, feedback, bits, extra, factor, level, _threads())


# ---- products with rounded factors ------------------------------------------------------------


def rounded_linear(x: Floats, w: Floats) -> Floats:
    """``x @ w.T`` with both factors rounded to integers; on x86 faster than in float32.

    Each 256 values of a row have a scale, and move by at most a 5790th of the largest of them.
    Their products are exact, and so are sums over 256 columns, which are added up in float32. A row
    with NaN or Inf in it gives NaN.

    Args:
        x: (n, k).
        w: (m, k).

    Returns:
        (n, m).
    """
    return _kernels.rounded_linear(x, w, _threads())


def rounded_gram(x: Floats, out: Floats, first: int = 0, end: int | None = None) -> None:
    """Adds ``x @ x.T``, rounded as in :func:`rounded_linear`, on and below the diagonal.

    Args:
        x: (n, k).
        out: (n, n), contiguous; what is above its diagonal stays as it is.
        first, end: rows of out, 0 <= first <= end <= n; all unless given.
    """
    _kernels.rounded_gram(x, out, first, len(x) if end is None else end, _threads())
