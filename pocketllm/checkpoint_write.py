"""Write a checkpoint folder: beside its place, checksummed, deterministic, renamed at the end."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import schema
from .errors import PocketError
from .schema import CodecSpec, Layout, ModuleSpec
from .tensorfile import (
    INDEX_NAME,
    ArrayTensor,
    TensorSource,
    header_of,
    shard_names,
    split_shards,
    tensor_bytes,
    write_tensors,
)

SHARD_BYTES = 5_000_000_000
# What a compressed folder takes over from its source beside config.json.
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "generation_config.json", "chat_template*",
    "preprocessor_config.json", "processor_config.json",
    "LICENSE*", "LICENCE*", "License*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
Progress = Callable[[int], None]
_NUMPY = {"U8": np.uint8, "I8": np.int8, "F16": np.float16, "F32": np.float32}


@dataclasses.dataclass(frozen=True)
class CodecData:
    """A codec and what the file stores of it.

    Attributes:
        spec: its description.
        parts: ``table`` int8 or float16 (K, d) with ``table_scale`` float32 (1,) for int8, or
            ``codebook`` float16 (K, d) with ``decoder`` float16 (3 * P1,), or of a trellis
            ``magnitude`` int8 (252,) with ``magnitude_scale`` float32 (6,).
    """

    spec: CodecSpec
    parts: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ModuleData:
    """A compressed matrix, its tensors as arrays or as what gives them when they are written.

    A tied head has a spec only.

    Attributes:
        spec: its description.
        packed: flat uint8, rows of packed indices.
        scale: uint8 (out + 1,) or float16 (out,), as ``spec.statistics`` says; or None.
        shift: the same, or None.
        columns: uint8 (in,), in trellis codes whose blocks have bits of their own; else None.
    """

    spec: ModuleSpec
    packed: np.ndarray | TensorSource | None = None
    scale: np.ndarray | TensorSource | None = None
    shift: np.ndarray | TensorSource | None = None
    columns: np.ndarray | TensorSource | None = None

    @property
    def parts(self) -> dict[str, np.ndarray | TensorSource]:
        """Part name -> tensor of what there is."""
        parts: dict[str, np.ndarray | TensorSource | None] = {
            "weight": self.packed,
            "scale": self.scale,
            "shift": self.shift,
            "columns": self.columns,
        }
        return {name: array for name, array in parts.items() if array is not None}


def layout_of(codecs: Iterable[CodecData], modules: Iterable[ModuleData]) -> Layout:
    """The layout that codecs and modules make up."""
    return Layout({c.spec.name: c.spec for c in codecs}, {m.spec.name: m.spec for m in modules})


def compressed_tensors(
    codecs: Iterable[CodecData], modules: Iterable[ModuleData]
) -> dict[str, TensorSource]:
    """The file's tensors of codecs and modules, checked against their specs.

    Raises:
        PocketError: an array of another dtype or shape than its spec asks for.
    """
    codecs, modules = list(codecs), list(modules)
    arrays: dict[str, np.ndarray | TensorSource] = {}
    for codec in codecs:
        arrays.update(
            {schema.codec_tensor(codec.spec.name, part): a for part, a in codec.parts.items()}
        )
    for module in modules:
        if module.spec.kind != "tied":
            for part, tensor in module.parts.items():
                arrays[schema.module_tensor(module.spec.name, part)] = tensor
    expected = layout_of(codecs, modules).tensors()
    tensors: dict[str, TensorSource] = {}
    for name, (dtype, shape) in expected.items():
        array = arrays.pop(name, None)
        if array is None:
            raise PocketError(f"{name}: missing, want {dtype} {list(shape)}")
        wanted = _NUMPY[dtype] if isinstance(array, np.ndarray) else dtype
        if array.dtype != wanted or array.shape != shape:
            raise PocketError(
                f"{name}: got {array.dtype} {list(array.shape)}, want {dtype} {list(shape)}"
            )
        tensors[name] = ArrayTensor(array, dtype) if isinstance(array, np.ndarray) else array
    if arrays:
        raise PocketError(f"{next(iter(arrays))}: not part of its codec or module")
    return tensors


def metadata_of(layout: Layout, checksums: Mapping[str, int]) -> dict[str, str]:
    """The safetensors metadata of every weight file of a compressed checkpoint."""
    record = {
        "format_version": schema.FORMAT_VERSION,
        "layout": f"{layout.crc32():08x}",
        "crc32": {name: f"{value:08x}" for name, value in checksums.items()},
    }
    return {
        "format": "pt",
        schema.METADATA_KEY: json.dumps(record, sort_keys=True, separators=(",", ":")),
    }


def achieved_bits(layout: Layout, tensors: Mapping[str, TensorSource]) -> float:
    """Bits per weight of the compressed tensors, codecs and scales included."""
    if not layout.weights:
        return 0.0
    return 8 * sum(tensor_bytes(tensors[name]) for name in layout.tensors()) / layout.weights


def write_checkpoint(
    out: str | os.PathLike[str],
    *,
    modules: Iterable[ModuleData],
    codecs: Iterable[CodecData],
    dense_tensors: Mapping[str, TensorSource],
    config: Mapping[str, Any],
    quantization: Mapping[str, Any] | None = None,
    copy_from: str | os.PathLike[str] | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write a compressed checkpoint folder.

    Args:
        out: the folder to make; it must not exist, its parent must.
        modules: compressed matrices.
        codecs: the codecs they name.
        dense_tensors: file name -> everything else of the model. Bytes are asked for one tensor
            at a time.
        config: the dense model's config.json.
        quantization: further keys of quantization_config (``method``, ``seed``, ...).
        copy_from: folder to take tokenizer, generation settings, chat template and licence from.
        extra_files: further files, name -> content.
        shard_bytes: largest data size of one weight file.
        progress: called with the bytes of each tensor written.

    Returns:
        The folder.

    Raises:
        PocketError: the folder exists or cannot be written (nothing is left behind then), or a
            tensor does not fit its description.
    """
    codecs, modules = list(codecs), list(modules)
    layout = layout_of(codecs, modules)
    tensors = compressed_tensors(codecs, modules)
    for name, tensor in dense_tensors.items():
        if name in tensors:
            raise PocketError(f"{name}: given both dense and compressed")
        tensors[name] = tensor
    record = {
        "method": "pocket",
        "modules_to_not_convert": [],
        **(quantization or {}),
        "quant_method": schema.QUANT_METHOD,
        "format_version": schema.FORMAT_VERSION,
        "bits": round(achieved_bits(layout, tensors), 4),
        **layout.to_json(),
    }
    schema.parse(record, str(out))
    files = dict(extra_files or {})
    files["config.json"] = config_text({**config, "quantization_config": record})
    return write_folder(
        out,
        tensors,
        lambda checksums: metadata_of(layout, checksums),
        files=files,
        copy_from=copy_from,
        shard_bytes=shard_bytes,
        progress=progress,
    )


def config_text(config: Mapping[str, Any]) -> str:
    """config.json as transformers writes it."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def check_output(out: str | os.PathLike[str]) -> Path:
    """The folder to be made, once it is clear that it can be.

    Raises:
        PocketError: it exists, or its parent is no writable folder.
    """
    path = Path(out).absolute()
    if os.path.lexists(path):
        raise PocketError(f"{out}: already exists, name a folder that does not")
    if not path.parent.is_dir():
        raise PocketError(f"{out}: its parent folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PocketError(f"{out}: its parent folder {path.parent} is not writable")
    return path


def write_folder(
    out: str | os.PathLike[str],
    tensors: Mapping[str, TensorSource],
    metadata: Callable[[Mapping[str, int]], dict[str, str]],
    *,
    files: Mapping[str, str | bytes],
    copy_from: str | os.PathLike[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write a model folder under a temporary name beside ``out`` and rename it when it is complete.

    Args:
        metadata: makes the safetensors metadata of every file from the crc32 of every tensor; its
            length may not depend on their values.
    """
    path = check_output(out)
    _remove_leftovers(path)
    part = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        try:
            part.mkdir()
            if copy_from is not None:
                _copy_files(Path(copy_from), part, skip=files)
            for name, content in files.items():
                (part / name).write_bytes(content.encode() if isinstance(content, str) else content)
            _write_weights(part, tensors, metadata, shard_bytes, progress)
            _sync(part)
            os.rename(part, path)
        except OSError as error:
            raise PocketError(f"{out}: cannot be written: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync_folder(path.parent)
    return path


def _write_weights(
    part: Path,
    tensors: Mapping[str, TensorSource],
    metadata: Callable[[Mapping[str, int]], dict[str, str]],
    shard_bytes: int,
    progress: Progress | None,
) -> None:
    shards = split_shards(tensors, shard_bytes)
    names = shard_names(len(shards))
    checksums = dict.fromkeys(tensors, 0)
    # The checksums stand before the data, so their place is kept and filled in at the end.
    for file, shard in zip(names, shards, strict=True):
        with open(part / file, "wb") as handle:
            handle.write(header_of(shard, tensors, metadata(checksums)))
            for name, value in write_tensors(handle, shard, tensors, progress):
                checksums[name] = value
    for file, shard in zip(names, shards, strict=True):
        with open(part / file, "r+b") as handle:
            handle.write(header_of(shard, tensors, metadata(checksums)))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor_bytes(t) for t in tensors.values())},
            "weight_map": {
                name: file for file, shard in zip(names, shards, strict=True) for name in shard
            },
        }
        (part / INDEX_NAME).write_text(config_text(index), encoding="utf-8")


def _copy_files(source: Path, part: Path, skip: Iterable[str]) -> None:
    skip = set(skip) | {"config.json"}
    for entry in sorted(source.iterdir()):
        if (
            entry.name not in skip
            and entry.is_file()
            and any(fnmatch.fnmatchcase(entry.name, p) for p in COPIED)
        ):
            shutil.copyfile(entry, part / entry.name)


def _remove_leftovers(path: Path) -> None:
    """Remove unfinished folders of runs that were killed."""
    for entry in path.parent.glob(f"{_glob_escape(path.name)}.tmp-*"):
        process = entry.name.removeprefix(f"{path.name}.tmp-")
        if re.fullmatch(r"\d+", process) and not _alive(int(process)):
            shutil.rmtree(entry, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _glob_escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _sync(folder: Path) -> None:
    for entry in folder.iterdir():
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems refuse to sync a folder; the data itself is synced
        pass
    finally:
        os.close(descriptor)
