"""Open a compressed checkpoint: everything is validated before a byte of it is used.

The format is docs/FORMAT.md. Names are in schema.py, the container in tensorfile.py, writing in
checkpoint_write.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import rowcode, schema, trellis
from .checkpoint_write import (
    CodecData,
    ModuleData,
    Progress,
    check_output,
    config_text,
    write_checkpoint,
    write_folder,
)
from .errors import CheckpointError
from .schema import CodecSpec, Layout, ModuleSpec
from .tensorfile import (
    FLOATS,
    LazyTensor,
    StoredTensor,
    TensorFile,
    TensorSource,
    from_float32,
    open_files,
    stored_crc32,
    unique_keys,
    weight_files,
)

if TYPE_CHECKING:
    from .kernels import AnyView, CodecView

__all__ = [
    "Checkpoint",
    "CodecData",
    "CodecSpec",
    "Layout",
    "ModuleData",
    "ModuleSpec",
    "check_output",
    "decompress",
    "open_checkpoint",
    "open_weights",
    "write_checkpoint",
]

CHECK_THREADS = 8


class Checkpoint:
    """A validated checkpoint, memory-mapped.

    Attributes:
        folder: where it is.
        config: config.json, or None when only the weight files were given.
        quantization: its quantization_config.
        layout: codecs and modules.
        files: the weight files.
        tensors: file name -> StoredTensor, dense ones included.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any] | None,
        quantization: Mapping[str, Any],
        layout: Layout,
        files: list[TensorFile],
        tensors: dict[str, StoredTensor],
    ) -> None:
        self.folder = folder
        self.config = config
        self.quantization = quantization
        self.layout = layout
        self.files = files
        self.tensors = tensors
        self._views: dict[str, CodecView] = {}

    @property
    def dense(self) -> dict[str, StoredTensor]:
        """The tensors that are stored as they were."""
        compressed = self.layout.tensors()
        return {name: tensor for name, tensor in self.tensors.items() if name not in compressed}

    @property
    def bits_per_weight(self) -> float:
        """8 x all bytes of the compressed tensors, codecs included / the weights they represent."""
        total = sum(self.tensors[name].nbytes for name in self.layout.tensors())
        return 8 * total / self.layout.weights if self.layout.weights else 0.0

    @property
    def bytes(self) -> int:
        """Size of all weight files."""
        return sum(file.nbytes for file in self.files)

    @property
    def bytes_bf16(self) -> int:
        """Size of the dense model's weights in bf16, tied ones once."""
        return self._dense_bytes(2)

    @property
    def bytes_fp32(self) -> int:
        """Size of the dense model's weights in fp32, tied ones once."""
        return self._dense_bytes(4)

    def _dense_bytes(self, float_bytes: int) -> int:
        kept = sum(
            t.size * float_bytes if t.dtype in FLOATS else t.nbytes for t in self.dense.values()
        )
        return kept + self.layout.weights * float_bytes

    def to_json(self) -> dict[str, Any]:
        """What ``pocketllm inspect --json`` reports.

        A row of ``tensors`` has ``name``, ``kind`` (a module's kind, ``"codec"`` or ``"dense"``),
        ``shape``, ``codec``, ``bits`` per weight (None for codecs and tied heads), ``bytes`` and
        ``share`` of all weight files.
        """
        return {
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.bytes,
            "bytes_bf16": self.bytes_bf16,
            "tensors": self.rows(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row for every module, codec and dense tensor."""
        rows = []
        for module in self.layout.modules.values():
            size = 0
            if module.codec is not None:
                parts = module.tensors(self.layout.codecs[module.codec])
                size = sum(
                    self.tensors[schema.module_tensor(module.name, part)].nbytes for part in parts
                )
            bits = 8 * size / module.weights if module.weights else None
            rows.append(self._row(module.name, module.kind, module.shape, module.codec, bits, size))
        for codec in self.layout.codecs.values():
            size = sum(
                self.tensors[schema.codec_tensor(codec.name, part)].nbytes
                for part in codec.tensors()
            )
            levels = (codec.codebook, codec.subvector)
            shape = (trellis.MAGNITUDES,) if codec.is_trellis else levels
            rows.append(
                self._row(f"{schema.BANK}.{codec.name}", "codec", shape, codec.name, None, size)
            )
        for tensor in self.dense.values():
            bits = 8 * tensor.nbytes / tensor.size if tensor.size else None
            rows.append(self._row(tensor.name, "dense", tensor.shape, None, bits, tensor.nbytes))
        return rows

    def _row(
        self,
        name: str,
        kind: str,
        shape: tuple[int, ...],
        codec: str | None,
        bits: float | None,
        size: int,
    ) -> dict[str, Any]:
        return {
            "name": name,
            "kind": kind,
            "shape": list(shape),
            "codec": codec,
            "bits": bits,
            "bytes": size,
            "share": size / self.bytes,
        }

    def codec_view(self, name: str) -> CodecView:
        """The codec as the kernels take it; not of a trellis."""
        if name not in self._views:
            spec = self.layout.codecs[name]
            parts = {part: self._codec_part(name, part) for part in spec.tensors()}
            self._views[name] = codec_view(spec, parts)
        return self._views[name]

    def load_dequantised(self, name: str) -> np.ndarray:
        """The dense matrix (out, in) float32 of a module; of a tied head, its embedding's."""
        from . import kernels

        module = self.layout.modules[name]
        if module.tied_to is not None:
            return self.load_dequantised(module.tied_to)
        assert module.codec is not None
        rows, columns = module.shape
        scale = (
            rowcode.decode(self._part(name, "scale"), signed=False)
            if module.scale
            else np.ones(rows, np.float32)
        )
        shift = rowcode.decode(self._part(name, "shift"), signed=True) if module.shift else None
        packed = self._part(name, "weight")
        if module.bits is None:
            codec: AnyView = self.codec_view(module.codec)
        else:
            codec, scale = trellis.view(
                self._codec_part(module.codec, "magnitude"),
                self._codec_part(module.codec, "magnitude_scale"),
                module.bits,
                scale,
                columns,
                self._part(name, "columns") if isinstance(module.bits, tuple) else None,
            )
        return kernels.decode_rows(packed, columns, 0, rows, codec, scale, shift)

    def _codec_part(self, codec: str, part: str) -> np.ndarray:
        return self.tensors[schema.codec_tensor(codec, part)].array()

    def _part(self, module: str, part: str) -> np.ndarray:
        return self.tensors[schema.module_tensor(module, part)].array()

    def verify(self, *, checksums: bool = True) -> None:
        """Check every checksum, every index, and that every scale, table and decoder is finite.

        Args:
            checksums: without them, only what the kernels rely on is checked: no index beyond its
                codebook, and finite scales, tables and decoders.

        Raises:
            CheckpointError: the first tensor, by name, that is damaged.
        """
        if checksums:
            wanted = _checksums(self.files, self.layout)
            tensors = [self.tensors[name] for name in sorted(self.tensors)]
            with ThreadPoolExecutor(min(CHECK_THREADS, os.cpu_count() or 1)) as pool:
                for tensor, value in zip(tensors, pool.map(stored_crc32, tensors), strict=True):
                    if value != wanted[tensor.name]:
                        raise CheckpointError(
                            f"{tensor.file.path}: tensor {tensor.name} does not match its checksum"
                        )
        for codec in self.layout.codecs.values():
            for part in codec.tensors():
                self._check_finite(self.tensors[schema.codec_tensor(codec.name, part)])
            if codec.is_trellis:
                self._check_levels(codec)
        for module in self.layout.modules.values():
            if module.codec is not None:
                self._check_module(module, self.layout.codecs[module.codec], checksums)

    def _check_module(self, module: ModuleSpec, codec: CodecSpec, spare_bits: bool) -> None:
        for part, (dtype, _) in module.tensors(codec).items():
            stored = self.tensors[schema.module_tensor(module.name, part)]
            if part == "weight":
                continue
            self._check_finite(stored)
            if part == "columns":
                assert isinstance(module.bits, tuple)
                if not trellis.matches_blocks(stored.array(), module.bits):
                    raise CheckpointError(
                        f"{stored.file.path}: tensor {stored.name} gives columns other bits than"
                        " config.json gives their blocks"
                    )
            elif dtype == "U8" and not rowcode.in_range(stored.array(), signed=part == "shift"):
                raise CheckpointError(
                    f"{stored.file.path}: tensor {stored.name} starts with the exponent"
                    f" {int(stored.array()[0])}, which is out of range"
                )
        tensor = self.tensors[schema.module_tensor(module.name, "weight")]
        rows, columns = module.shape
        damaged = f"{tensor.file.path}: module {module.name} has bits set after the end of a row"
        if module.bits is not None:
            if spare_bits and trellis.has_spare_bits(tensor.array(), module.bits, rows, columns):
                raise CheckpointError(damaged)
            return
        count = -(-columns // codec.subvector)
        packed = tensor.array().reshape(rows, -1)
        spare = packed.shape[1] * 8 - count * codec.index_bits
        if spare_bits and spare and (packed[:, -1] >> (8 - spare)).any():
            raise CheckpointError(damaged)
        if codec.codebook == 1 << codec.index_bits:
            return
        from . import kernels

        largest = kernels.index_max(packed, count, codec.index_bits)
        if largest >= codec.codebook:
            raise CheckpointError(
                f"{tensor.file.path}: module {module.name} has the index {largest}, its codec"
                f" {codec.name} has {codec.codebook} codewords"
            )

    def _check_levels(self, codec: CodecSpec) -> None:
        magnitude, scale = (
            self.tensors[schema.codec_tensor(codec.name, part)]
            for part in ("magnitude", "magnitude_scale")
        )
        if not trellis.are_magnitudes(magnitude.array()):
            raise CheckpointError(
                f"{magnitude.file.path}: tensor {magnitude.name} has magnitudes out of range, want"
                f" 0 to {min(trellis.LARGEST)} for up to 2 bits, to {max(trellis.LARGEST)} above"
            )
        if (scale.array() < 0).any():
            raise CheckpointError(
                f"{scale.file.path}: tensor {scale.name} has values below 0, want none"
            )

    def _check_finite(self, tensor: StoredTensor) -> None:
        if tensor.dtype in FLOATS and not np.isfinite(tensor.array()).all():
            raise CheckpointError(
                f"{tensor.file.path}: tensor {tensor.name} has values that are NaN or Inf"
            )


def codec_view(spec: CodecSpec, parts: Mapping[str, np.ndarray]) -> CodecView:
    """A codec's stored parts as the kernels take them: float16 as float32, int8 as it is."""
    from .kernels import CodecView

    table = parts["codebook"] if spec.storage == "decoder" else parts["table"]
    decoder = parts["decoder"].astype(np.float32) if spec.storage == "decoder" else None
    return CodecView(
        spec.subvector,
        spec.codebook,
        spec.index_bits,
        np.ascontiguousarray(table) if table.dtype == np.int8 else table.astype(np.float32),
        float(parts["table_scale"][0]) if "table_scale" in parts else 1.0,
        decoder,
        spec.hidden,
        spec.norm,
    )


def open_checkpoint(folder: str | os.PathLike[str], *, check: bool = True) -> Checkpoint:
    """Open a compressed checkpoint folder.

    Args:
        folder: the folder.
        check: also read everything: checksums, index ranges, finite scales and tables.

    Raises:
        CheckpointError: not a pocketllm checkpoint, an unknown format version, or damaged.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = _read_config(path)
    quantization = config.get("quantization_config")
    schema.parse(quantization, str(path / "config.json"))
    return open_weights(
        weight_files(path), quantization or {}, check=check, folder=path, config=config
    )


def open_weights(
    paths: Iterable[str | os.PathLike[str]],
    quantization: Mapping[str, Any],
    *,
    check: bool = True,
    checksums: bool = True,
    folder: Path | None = None,
    config: dict[str, Any] | None = None,
) -> Checkpoint:
    """As :func:`open_checkpoint`, of weight files whose quantization_config is at hand.

    With ``check`` but without ``checksums``, only what the kernels rely on is read and checked.
    """
    files_at = [Path(path) for path in paths]
    folder = folder or files_at[0].parent
    layout = schema.parse(quantization, str(folder / "config.json"))
    files, tensors = open_files(files_at)
    expected = layout.tensors()
    for name, (dtype, shape) in expected.items():
        stored = tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{folder}: tensor {name} is missing")
        if (stored.dtype, stored.shape) != (dtype, shape):
            raise CheckpointError(
                f"{stored.file.path}: tensor {name} is {stored.dtype} {list(stored.shape)},"
                f" config.json asks for {dtype} {list(shape)}"
            )
    recorded = _checksums(files, layout)
    for name in recorded:
        if name not in tensors:
            raise CheckpointError(f"{folder}: tensor {name} is missing")
    for name, tensor in tensors.items():
        if name not in recorded:
            raise CheckpointError(
                f"{tensor.file.path}: tensor {name} is not expected, it has no checksum"
            )
        if name not in expected and layout.claims(name):
            raise CheckpointError(
                f"{tensor.file.path}: tensor {name} is not expected, config.json asks for no such"
                " part of its codec or module"
            )
    checkpoint = Checkpoint(folder, config, quantization, layout, files, tensors)
    if check:
        checkpoint.verify(checksums=checksums)
    return checkpoint


def decompress(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, progress: Progress | None = None
) -> Path:
    """Write the dense Hugging Face checkpoint that a compressed one stands for.

    Weights come back in their original dtype and layout, one at a time; tied weights stay tied.
    transformers loads the result without pocketllm.

    Args:
        folder: compressed checkpoint.
        out: folder to make.
        progress: called with the bytes of each tensor written.

    Raises:
        CheckpointError: the checkpoint is damaged.
        PocketError: ``out`` exists or cannot be written.
    """
    check_output(out)
    checkpoint = open_checkpoint(folder)
    tensors: dict[str, TensorSource] = dict(checkpoint.dense)
    for module in checkpoint.layout.modules.values():
        if module.tied_to is None:
            tensors[schema.module_tensor(module.name, "weight")] = _dense_weight(checkpoint, module)
    config = {k: v for k, v in (checkpoint.config or {}).items() if k != "quantization_config"}
    return write_folder(
        out,
        tensors,
        lambda _: {"format": "pt"},
        files={"config.json": config_text(config)},
        copy_from=folder,
        progress=progress,
    )


def _dense_weight(checkpoint: Checkpoint, module: ModuleSpec) -> LazyTensor:
    dtype = schema.MODULE_DTYPES[module.dtype]
    transposed = module.kind == "conv1d"

    def load() -> np.ndarray:
        values = checkpoint.load_dequantised(module.name)
        return np.ascontiguousarray(from_float32(values.T if transposed else values, dtype))

    return LazyTensor(dtype, module.shape[::-1] if transposed else module.shape, load)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no config.json, so this is not a Hugging Face model folder"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return config


def _checksums(files: list[TensorFile], layout: Layout) -> dict[str, int]:
    """The crc32 of every tensor of the checkpoint, which every file carries in full."""
    records = {file.metadata.get(schema.METADATA_KEY) for file in files}
    for file in files:
        if schema.METADATA_KEY not in file.metadata:
            raise CheckpointError(
                f"{file.path}: carries no checksums, so it was not written by pocketllm"
            )
        if file.metadata.get("format") != "pt" or set(file.metadata) != {
            "format",
            schema.METADATA_KEY,
        }:
            raise CheckpointError(
                f"{file.path}: header is damaged: __metadata__ has other keys than expected"
            )
    if len(records) != 1:
        raise CheckpointError(
            f"{files[0].path.parent}: its weight files belong to different checkpoints"
        )
    here = f"{files[0].path}: checksums in the header are damaged"
    try:
        record = json.loads(records.pop() or "", object_pairs_hook=unique_keys)
        keys, version, values, laid_out = (
            set(record),
            record["format_version"],
            record["crc32"],
            record["layout"],
        )
        checksums = {name: _hex(value) for name, value in values.items()}
        known_layout = _hex(laid_out)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(here) from error
    if keys != {"format_version", "crc32", "layout"}:
        raise CheckpointError(here)
    if type(version) is not int or version != schema.FORMAT_VERSION:
        raise CheckpointError(
            f"{files[0].path}: format_version is {version!r}, this pocketllm reads version"
            f" {schema.FORMAT_VERSION}; update pocketllm"
        )
    if known_layout != layout.crc32():
        raise CheckpointError(
            f"{files[0].path.parent}: codecs and modules of config.json are not those the weight"
            " files were written with"
        )
    return checksums


def _hex(text: Any) -> int:
    if not isinstance(text, str) or len(text) != 8 or text.strip("0123456789abcdef"):
        raise ValueError("no crc32")
    return int(text, 16)
