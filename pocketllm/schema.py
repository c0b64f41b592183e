"""What config.json says about a compressed checkpoint, and which tensors that asks for.

The text of the format is docs/FORMAT.md; names of tensors and keys stand here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from . import trellis
from .errors import CheckpointError, PocketError

QUANT_METHOD = "pocketllm"
FORMAT_VERSION = 1
METADATA_KEY = "pocketllm"
BANK = "pocketllm_codecs"
STORAGES = ("table-int8", "table-float16", "decoder", "trellis")
NORMS = ("input", "ln", "rln")
KINDS = ("linear", "conv1d", "embedding", "tied")
STATISTICS = ("float16", "uint8")
# What a module may have in the file, each under its name and a dot.
PARTS = ("weight", "scale", "shift", "columns")
# Names of config.json -> safetensors dtypes of the dense matrix a module stands for.
MODULE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_CODEC_NAME = re.compile(r"[A-Za-z0-9_-]+")


def index_bits(codebook: int) -> int:
    """Bits of one index: max(1, ceil(log2 K))."""
    return max(1, (codebook - 1).bit_length())


def mlp_parameters(subvector: int, hidden: int) -> int:
    """Parameters of one mlp: W1 (h, d), b1 (h), W2 (d, h), b2 (d)."""
    return 2 * hidden * subvector + hidden + subvector


@dataclasses.dataclass(frozen=True)
class CodecSpec:
    """One entry of ``codecs``.

    Attributes:
        name: letters, digits, ``_`` and ``-``.
        subvector: d, 1 to 16; 1 of a trellis.
        codebook: K, 2 to 65536; 0 of a trellis.
        hidden: h of the decoder that made the table, or of the stored decoder; 0 of a trellis.
        norm: ``"input"``, ``"ln"`` or ``"rln"``.
        storage: ``"table-int8"``, ``"table-float16"``, ``"decoder"`` or ``"trellis"``.
    """

    name: str
    subvector: int
    codebook: int
    hidden: int
    norm: str
    storage: str

    @classmethod
    def trellis(cls, name: str) -> CodecSpec:
        """The codec of trellis codes of this name."""
        return cls(name, 1, 0, 0, "input", "trellis")

    @property
    def is_trellis(self) -> bool:
        """Are these trellis codes (:mod:`pocketllm.trellis`)?"""
        return self.storage == "trellis"

    @property
    def index_bits(self) -> int:
        """Bits of one index; of a trellis 0."""
        return 0 if self.is_trellis else index_bits(self.codebook)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Part name -> (safetensors dtype, shape) of what the bank stores."""
        shape = (self.codebook, self.subvector)
        if self.is_trellis:
            return {
                "magnitude": ("I8", (trellis.MAGNITUDES,)),
                "magnitude_scale": ("F32", (trellis.MAX_BITS,)),
            }
        if self.storage == "decoder":
            size = 3 * mlp_parameters(self.subvector, self.hidden)
            return {"codebook": ("F16", shape), "decoder": ("F16", (size,))}
        if self.storage == "table-int8":
            return {"table": ("I8", shape), "table_scale": ("F32", (1,))}
        return {"table": ("F16", shape)}

    def to_json(self) -> dict[str, Any]:
        """The entry of ``codecs``."""
        if self.is_trellis:
            return {"storage": self.storage}
        return {
            "subvector": self.subvector,
            "codebook": self.codebook,
            "index_bits": self.index_bits,
            "hidden": self.hidden,
            "norm": self.norm,
            "storage": self.storage,
        }


@dataclasses.dataclass(frozen=True)
class ModuleSpec:
    """One entry of ``modules``.

    Attributes:
        name: module name, as in the state dict without ``.weight``.
        kind: ``"linear"``, ``"conv1d"``, ``"embedding"`` or ``"tied"``.
        shape: (out, in); for ``conv1d`` of the transposed weight.
        codec: name of its codec; None for ``"tied"``.
        scale: rows have a stored scale; without it the scale is 1.
        shift: rows have a stored shift.
        dtype: dtype name of the original weight.
        tied_to: for ``"tied"``, the embedding whose payload it reads.
        statistics: how scale and shift are stored, ``"float16"`` (out,) or ``"uint8"`` (out + 1,),
            see :mod:`pocketllm.rowcode`.
        bits: of a module in trellis codes: of every weight, or of each block of columns, which
            then have a tensor ``columns``.
        names_statistics: the entry has the key ``statistics`` although they are ``"float16"``, as
            those without it are: the layout's checksum is of its text.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    codec: str | None = None
    scale: bool = True
    shift: bool = False
    dtype: str = "float32"
    tied_to: str | None = None
    statistics: str = "float16"
    bits: trellis.Bits | None = None
    names_statistics: bool = False

    @property
    def weights(self) -> int:
        """Weights the module owns."""
        return 0 if self.kind == "tied" else self.shape[0] * self.shape[1]

    def tensors(self, codec: CodecSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Part name -> (safetensors dtype, shape) of what the file stores for the module.

        Raises:
            PocketError: trellis codes without bits.
        """
        rows, columns = self.shape
        parts: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight": ("U8", (self.payload_bytes(codec),))
        }
        if isinstance(self.bits, tuple):
            parts["columns"] = ("U8", (columns,))
        stored = ("U8", (rows + 1,)) if self.statistics == "uint8" else ("F16", (rows,))
        if self.scale:
            parts["scale"] = stored
        if self.shift:
            parts["shift"] = stored
        return parts

    def payload_bytes(self, codec: CodecSpec) -> int:
        """Bytes of the packed rows."""
        rows, columns = self.shape
        if codec.is_trellis:
            if self.bits is None:
                raise PocketError(
                    f"module {self.name!r}: bits is None, want those of its trellis codes: a"
                    f" multiple of 1/4 from 1 to {trellis.MAX_BITS}, or a tuple of those of each"
                    " block of columns"
                )
            return trellis.payload_bytes(self.bits, rows, columns)
        return rows * row_stride_bytes(columns, codec.subvector, codec.index_bits)

    def to_json(self) -> dict[str, Any]:
        """The entry of ``modules``."""
        entry: dict[str, Any] = {"kind": self.kind, "shape": list(self.shape), "dtype": self.dtype}
        if self.kind == "tied":
            return {**entry, "to": self.tied_to}
        entry.update(codec=self.codec, scale=self.scale, shift=self.shift)
        if self.bits is not None:
            entry["bits"] = _runs(self.bits) if isinstance(self.bits, tuple) else self.bits
        if self.names_statistics or self.statistics != "float16":
            entry["statistics"] = self.statistics
        return entry


def _runs(blocks: tuple[int, ...]) -> list[list[int]]:
    """Bits of blocks as [bits, how many blocks] of those in a row that have the same."""
    return [[bits, len(list(run))] for bits, run in itertools.groupby(blocks)]


def row_stride_bytes(columns: int, subvector: int, bits: int) -> int:
    """Bytes of one packed row of ceil(columns / d) indices."""
    return -(-(-(-columns // subvector) * bits) // 8)


def codec_tensor(codec: str, part: str) -> str:
    """Name of a codec's tensor in the file."""
    return f"{BANK}.{codec}.{part}"


def module_tensor(module: str, part: str) -> str:
    """Name of a module's tensor in the file."""
    return f"{module}.{part}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The compressed part of a checkpoint: its codecs and modules."""

    codecs: dict[str, CodecSpec]
    modules: dict[str, ModuleSpec]

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor the compressed part consists of: file name -> (safetensors dtype, shape)."""
        expected = {}
        for codec in self.codecs.values():
            for part, spec in codec.tensors().items():
                expected[codec_tensor(codec.name, part)] = spec
        for module in self.modules.values():
            if module.codec is not None:
                for part, spec in module.tensors(self.codecs[module.codec]).items():
                    expected[module_tensor(module.name, part)] = spec
        return expected

    def claims(self, tensor: str) -> bool:
        """Would a tensor of this name be part of a codec or of a module?"""
        owner, _, part = tensor.rpartition(".")
        return tensor.startswith(f"{BANK}.") or (owner in self.modules and part in PARTS)

    @property
    def weights(self) -> int:
        """Weights the compressed modules represent, tied ones once."""
        return sum(module.weights for module in self.modules.values())

    def to_json(self) -> dict[str, Any]:
        """``codecs`` and ``modules`` of the quantization_config."""
        return {
            "codecs": {name: codec.to_json() for name, codec in self.codecs.items()},
            "modules": {name: module.to_json() for name, module in self.modules.items()},
        }

    def crc32(self) -> int:
        """CRC-32 of the canonical JSON of ``codecs`` and ``modules``."""
        return zlib.crc32(
            json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode()
        )


def parse(quantization: Any, where: str) -> Layout:
    """Read and check a quantization_config.

    Args:
        quantization: the object of config.json.
        where: what to name in messages.

    Raises:
        CheckpointError: another method, an unknown format version, or an entry out of its range.
    """
    if not isinstance(quantization, Mapping):
        raise CheckpointError(
            f"{where}: no quantization_config, so this is not a pocketllm checkpoint"
        )
    method = quantization.get("quant_method")
    if method != QUANT_METHOD:
        raise CheckpointError(f"{where}: quant_method is {method!r}, want {QUANT_METHOD!r}")
    version = quantization.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version is {version!r}, this pocketllm reads version"
            f" {FORMAT_VERSION}; update pocketllm"
        )
    codecs = {n: _codec(n, e, where) for n, e in _entries(quantization, "codecs", where)}
    modules = {n: _module(n, e, where, codecs) for n, e in _entries(quantization, "modules", where)}
    for module in modules.values():
        if module.kind == "tied":
            target = modules.get(module.tied_to or "")
            if target is None or target.kind == "tied" or target.shape != module.shape:
                raise CheckpointError(
                    f"{where}: module {module.name} is tied to {module.tied_to!r}, which is no"
                    " module of its shape"
                )
    return Layout(codecs, modules)


def _entries(quantization: Mapping[str, Any], key: str, where: str) -> list[tuple[str, Any]]:
    entries = quantization.get(key)
    if not isinstance(entries, Mapping) or not all(
        isinstance(e, Mapping) for e in entries.values()
    ):
        raise CheckpointError(f"{where}: quantization_config has no map {key!r}")
    return list(entries.items())


def _codec(name: str, entry: Mapping[str, Any], where: str) -> CodecSpec:
    here = f"{where}: codec {name!r}"
    if not _CODEC_NAME.fullmatch(name):
        raise CheckpointError(f"{here}: want a name of letters, digits, _ and -")
    if _choice(entry, "storage", STORAGES, here) == "trellis":
        return CodecSpec.trellis(name)
    codec = CodecSpec(
        name,
        _integer(entry, "subvector", 1, 16, here),
        _integer(entry, "codebook", 2, 65536, here),
        _integer(entry, "hidden", 1, 64, here),
        _choice(entry, "norm", NORMS, here),
        _choice(entry, "storage", STORAGES, here),
    )
    if entry.get("index_bits") != codec.index_bits:
        raise CheckpointError(
            f"{here}: index_bits is {entry.get('index_bits')!r}, want {codec.index_bits} for"
            f" {codec.codebook} codewords"
        )
    if codec.norm == "rln" and codec.storage != "decoder":
        raise CheckpointError(
            f'{here}: norm "rln" does not fold into a table, want storage "decoder"'
        )
    return codec


def _module(
    name: str, entry: Mapping[str, Any], where: str, codecs: Mapping[str, CodecSpec]
) -> ModuleSpec:
    here = f"{where}: module {name!r}"
    kind = _choice(entry, "kind", KINDS, here)
    dtype = _choice(entry, "dtype", tuple(MODULE_DTYPES), here)
    shape = entry.get("shape")
    if (
        not isinstance(shape, list | tuple)
        or len(shape) != 2
        or not all(type(n) is int and 0 < n < 2**31 for n in shape)
    ):
        raise CheckpointError(f"{here}: shape is {shape!r}, want two positive integers")
    rows, columns = shape
    if kind == "tied":
        return ModuleSpec(name, kind, (rows, columns), dtype=dtype, tied_to=str(entry.get("to")))
    codec = entry.get("codec")
    if not isinstance(codec, str) or codec not in codecs:
        raise CheckpointError(f"{here}: names the codec {codec!r}, which is not listed")
    scale, shift = entry.get("scale"), entry.get("shift")
    if not isinstance(scale, bool) or not isinstance(shift, bool):
        raise CheckpointError(
            f"{here}: scale is {scale!r} and shift is {shift!r}, want true or false"
        )
    statistics = _choice({"statistics": "float16", **entry}, "statistics", STATISTICS, here)
    bits = None
    if codecs[codec].is_trellis:
        bits = _bits(entry.get("bits"), columns, here)
    elif "bits" in entry:
        raise CheckpointError(
            f"{here}: bits is {entry['bits']!r}, want none: its codec {codec!r} is no trellis"
        )
    return ModuleSpec(
        name,
        kind,
        (rows, columns),
        codec,
        scale,
        shift,
        dtype,
        statistics=statistics,
        bits=bits,
        names_statistics=entry.get("statistics") == "float16",
    )


def _bits(value: Any, columns: int, here: str) -> trellis.Bits:
    """Bits of a module in trellis codes: a number, as it is given since the layout's checksum is of
    its text, or [bits, blocks] of runs of blocks."""
    blocks = trellis.block_count(columns)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if 1 <= value <= trellis.MAX_BITS and float(value * trellis.QUARTERS).is_integer():
            return value
    elif isinstance(value, list | tuple) and all(
        isinstance(run, list | tuple)
        and len(run) == 2
        and all(type(n) is int for n in run)
        and 0 <= run[0] <= trellis.MAX_BITS
        and 1 <= run[1] <= blocks
        for run in value
    ):
        falling = all(a[0] > b[0] for a, b in itertools.pairwise(value))
        if falling and sum(count for _, count in value) == blocks:
            return tuple(bits for bits, count in value for _ in range(count))
    raise CheckpointError(
        f"{here}: bits is {value!r}, want a multiple of 1/4 from 1 to {trellis.MAX_BITS}, or a list"
        f" of [bits, blocks], bits falling from {trellis.MAX_BITS} or less, of {blocks} blocks"
        " together"
    )


def _integer(entry: Mapping[str, Any], key: str, low: int, high: int, here: str) -> int:
    value = entry.get(key)
    if type(value) is not int or not low <= value <= high:
        raise CheckpointError(f"{here}: {key} is {value!r}, want an integer from {low} to {high}")
    return value


def _choice(entry: Mapping[str, Any], key: str, choices: tuple[str, ...], here: str) -> str:
    value = entry.get(key)
    if value not in choices:
        raise CheckpointError(f"{here}: {key} is {value!r}, want one of {', '.join(choices)}")
    return str(value)
