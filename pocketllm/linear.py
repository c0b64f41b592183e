"""Modules that compute from packed weights: PocketLinear, PocketEmbedding, the codecs' bank."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .schema import CodecSpec, ModuleSpec
from .trellis import Bits, payload_bytes

_TORCH = {"U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "F32": torch.float32}


class CodecModule(nn.Module):
    """One codec's tensors, in their stored dtypes whatever the model is cast to.

    Buffers: ``table`` int8 or float16 (K, d), with ``table_scale`` float32 (1,) for int8; or
    ``codebook`` float16 (K, d) and ``decoder`` float16 (3 * P1,); or of a trellis ``magnitude``
    int8 (252,) and ``magnitude_scale`` float32 (6,).
    """

    def __init__(self, spec: CodecSpec, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        for part, (dtype, shape) in spec.tensors().items():
            self.register_buffer(part, torch.empty(shape, dtype=_TORCH[dtype], device=device))
        for part in ("table", "table_scale", "codebook", "decoder", "magnitude", "magnitude_scale"):
            if part not in self._buffers:
                self.register_buffer(part, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodecModule:
        return super()._apply(_keeping_dtype(fn, self._buffers.values()), recurse)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        spec = self.spec
        if spec.is_trellis:
            return spec.storage
        return f"{spec.codebook} x {spec.subvector}, {spec.storage}, norm={spec.norm}"


class CodecBank(nn.ModuleDict):
    """The codecs of a model by name; its modules hold references to them."""

    def __init__(
        self, specs: Iterable[CodecSpec], device: torch.device | str | None = None
    ) -> None:
        ordered = sorted(specs, key=lambda spec: spec.name)
        super().__init__({spec.name: CodecModule(spec, device) for spec in ordered})


class _Packed(nn.Module):
    """What the compressed modules share: packed rows, their statistics, a reference to the codec.

    The codec is a submodule of the bank, not of this module, so it stays outside ``_modules``.
    """

    scale: Tensor | None
    shift: Tensor | None
    columns: Tensor | None

    def _init_packed(
        self,
        rows: int,
        columns: int,
        codec: CodecModule,
        scale: bool,
        shift: bool,
        statistics: str,
        bits: Bits | None,
        device: torch.device | str | None,
    ) -> None:
        self.__dict__["_codec"] = codec
        self.__dict__["_shape"] = (rows, columns)
        self.__dict__["_bits"] = bits
        parts = ModuleSpec(
            "", "linear", (rows, columns), None, scale, shift, statistics=statistics, bits=bits
        ).tensors(codec.spec)
        for name in ("weight", "scale", "shift", "columns"):
            value = None
            if name in parts:
                dtype, shape = parts[name]
                value = torch.empty(shape, dtype=_TORCH[dtype], device=device)
            self.register_buffer(name, value)

    @property
    def codec(self) -> CodecModule:
        """The codec, in the bank."""
        return self.__dict__["_codec"]

    def _arrays(self) -> ops.Arrays:
        """The matrix as the kernels take it, kept until one of its tensors changes."""
        own, shared = self._buffers, self.codec._buffers
        tensors = (*own.values(), *shared.values())
        state = list(map(ops.version, tensors))
        kept = self.__dict__.get("_kept")
        if kept is None or kept[1] != state or any(map(operator.is_not, kept[0], tensors)):
            kept = (tensors, state, ops.arrays_of(self.matrix()))
            self.__dict__["_kept"] = kept
        return kept[2]

    def matrix(self) -> ops.Matrix:
        """The weight as the operators take it."""
        codec, weight = self.codec, self.weight
        if codec.spec.is_trellis:
            table, table_scale = codec.magnitude, codec.magnitude_scale
        else:
            table = codec.table if codec.decoder is None else codec.codebook
            table_scale = codec.table_scale
        decoder, bits = codec.decoder, self.__dict__["_bits"]
        if table.device != weight.device:
            table, table_scale, decoder = (
                None if t is None else t.to(weight.device) for t in (table, table_scale, decoder)
            )
        spec = codec.spec
        rows, columns = self.__dict__["_shape"]
        return ops.Matrix(
            weight,
            self.scale,
            self.shift,
            table,
            table_scale,
            decoder,
            self.columns,
            rows,
            columns,
            spec.index_bits,
            spec.hidden,
            spec.norm,
            [] if bits is None else [*bits] if isinstance(bits, tuple) else [bits],
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix (out, in); of an embedding, without its multiplier."""
        return ops.dequantise(self.matrix(), dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        self.__dict__.pop("_kept", None)
        return super()._apply(_keeping_dtype(fn, self._buffers.values()), recurse)

    def _packed_repr(self) -> str:
        spec, bits = self.codec.spec, self.__dict__["_bits"]
        rows, columns = self.__dict__["_shape"]
        if bits is not None:
            bits = 8 * payload_bytes(bits, rows, columns) / (rows * columns)
        return f"codec={spec.name}, bits={bits or spec.index_bits / spec.subvector:.3g}"


class PocketLinear(_Packed, nn.Linear):
    """``nn.Linear`` whose weight stays packed; products run from the packed bytes.

    ``weight`` is a flat uint8 buffer (out * row stride,), ``scale`` and ``shift`` uint8 (out + 1,)
    or float16 (out,) (docs/FORMAT.md), ``bias`` as in nn.Linear. Input of any float dtype, output
    in the input's dtype (autocast's under autocast); on the CPU sums are float32. Gradients reach
    input and bias, never the weight.

    Args:
        in_features: in.
        out_features: out.
        codec: the bank's codec.
        bias: has a bias.
        scale: has row scales.
        shift: has row shifts.
        statistics: how they are stored, ``"uint8"`` or ``"float16"``.
        bits: of a trellis: of all weights, or of each block of columns.
        device: where the tensors are made.
        dtype: of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        codec: CodecModule,
        *,
        bias: bool = False,
        scale: bool = True,
        shift: bool = False,
        statistics: str = "uint8",
        bits: Bits | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._init_packed(out_features, in_features, codec, scale, shift, statistics, bits, device)
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        kind = input.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        bias = self.bias
        learns = torch.is_grad_enabled()
        trained = learns and bias is not None and bias.requires_grad
        if ops.runs_directly(input) and not (trained or (learns and input.requires_grad)):
            return ops.matmul_direct(input, self._arrays(), bias)
        x = input.reshape(-1, self.in_features)
        product = ops.matmul(x, self.matrix(), None if trained else bias)
        if trained:
            product = product + bias.to(product.dtype)
        return product.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{nn.Linear.extra_repr(self)}, {self._packed_repr()}"


class PocketEmbedding(_Packed, nn.Embedding):
    """``nn.Embedding`` whose rows stay packed; a look-up decodes the rows it needs.

    Args:
        num_embeddings: rows.
        embedding_dim: columns.
        codec: the bank's codec.
        padding_idx: kept for its users; the row is stored like any other.
        multiplier: factor of the output, as in Gemma's scaled embeddings.
        scale: has row scales.
        shift: has row shifts.
        statistics: how they are stored, ``"uint8"`` or ``"float16"``.
        bits: of a trellis: of all weights, or of each block of columns.
        device: where the tensors are made.
        dtype: of the output; follows ``.to(dtype)``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        codec: CodecModule,
        *,
        padding_idx: int | None = None,
        multiplier: float | None = None,
        scale: bool = True,
        shift: bool = False,
        statistics: str = "uint8",
        bits: Bits | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.multiplier = multiplier
        self.dtype = dtype or torch.get_default_dtype()
        self._init_packed(
            num_embeddings, embedding_dim, codec, scale, shift, statistics, bits, device
        )

    def forward(self, input: Tensor) -> Tensor:
        """input (...) of integers -> (..., columns)."""
        rows = ops.embedding(input.reshape(-1).long(), self.matrix(), self.dtype)
        if self.multiplier is not None:
            rows = rows * torch.tensor(self.multiplier, dtype=self.dtype, device=rows.device)
        return rows.view(*input.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PocketEmbedding:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{nn.Embedding.extra_repr(self)}, {self._packed_repr()}"


class PocketTiedLinear(PocketLinear):
    """A head that reads its embedding's packed rows and owns nothing but a bias.

    Args:
        embedding: the compressed embedding, referred to, not registered.
        bias: has a bias.
        device: where the bias is made.
        dtype: of the bias.
    """

    def __init__(
        self,
        embedding: PocketEmbedding,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.__dict__["embedding"] = embedding
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        empty = torch.empty(self.out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))

    @property
    def weight(self) -> Tensor:
        """The embedding's packed rows."""
        return self.__dict__["embedding"].weight

    @property
    def codec(self) -> CodecModule:
        """The embedding's codec."""
        return self.__dict__["embedding"].codec

    def matrix(self) -> ops.Matrix:
        """The embedding's matrix."""
        return self.__dict__["embedding"].matrix()

    def _packed_repr(self) -> str:
        return self.__dict__["embedding"]._packed_repr()

    def _arrays(self) -> ops.Arrays:
        return self.__dict__["embedding"]._arrays()


def build(
    spec: ModuleSpec,
    original: nn.Module,
    bank: CodecBank,
    device: torch.device | str | None = None,
) -> PocketLinear | PocketEmbedding:
    """The compressed module, with empty tensors, that takes the place of ``original``.

    Args:
        spec: not of kind ``"tied"``.
        original: nn.Linear, Conv1D or an nn.Embedding (with ``scalar_embed_scale``: scaled output).
        bank: holds the module's codec.
        device: where the tensors are made.
    """
    assert spec.codec is not None
    codec = bank[spec.codec]
    rows, columns = spec.shape
    dtype = original.weight.dtype
    if spec.kind == "embedding":
        module: PocketLinear | PocketEmbedding = PocketEmbedding(
            rows,
            columns,
            codec,
            padding_idx=getattr(original, "padding_idx", None),
            multiplier=getattr(original, "scalar_embed_scale", None),
            scale=spec.scale,
            shift=spec.shift,
            statistics=spec.statistics,
            bits=spec.bits,
            device=device,
            dtype=dtype,
        )
    else:
        module = PocketLinear(
            columns,
            rows,
            codec,
            bias=getattr(original, "bias", None) is not None,
            scale=spec.scale,
            shift=spec.shift,
            statistics=spec.statistics,
            bits=spec.bits,
            device=device,
            dtype=dtype,
        )
    module.__dict__["original_class"] = type(original)
    module.train(original.training)
    return module


def _keeping_dtype(
    fn: Callable[[Tensor], Tensor], buffers: Iterable[Tensor | None]
) -> Callable[[Tensor], Tensor]:
    """``fn`` that may move the given buffers but not cast them."""
    kept = {id(buffer) for buffer in buffers if buffer is not None}

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if id(tensor) in kept and result.dtype != tensor.dtype:
            return tensor.to(result.device)
        return result

    return apply
