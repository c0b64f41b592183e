"""The safetensors container: a checked, memory-mapped reader and a streaming, deterministic writer.

Knows nothing of pocketllm's names. Nothing here is ever unpickled or executed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import mmap
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import CheckpointError, PocketError

# safetensors dtype -> (bytes an element, NumPy dtype of the raw view). BF16 and the 8-bit floats
# have no NumPy type: they are viewed as integers.
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"), "U8": (1, "u1"), "I8": (1, "i1"),
    "F8_E4M3": (1, "u1"), "F8_E5M2": (1, "u1"),
    "U16": (2, "<u2"), "I16": (2, "<i2"), "F16": (2, "<f2"), "BF16": (2, "<u2"),
    "U32": (4, "<u4"), "I32": (4, "<i4"), "F32": (4, "<f4"),
    "U64": (8, "<u8"), "I64": (8, "<i8"), "F64": (8, "<f8"),
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
# Where a file's data starts, so that vectors of mapped weights lie within cache lines: one token
# takes 3 % less.
ALIGNMENT = 64
CHUNK_BYTES = 1 << 24
# Most bytes of one read: systems refuse more than about 2 GiB.
READ_BYTES = 1 << 30
# Small enough for the second-level cache: a block's checksum is computed while it is there.
BLOCK_BYTES = 1 << 18


class TensorSource(Protocol):
    """Anything a writer can store: its type and size are known before its bytes are asked for."""

    @property
    def dtype(self) -> str:
        """safetensors dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""

    def data(self) -> Any:
        """The bytes, little-endian, row-major: a C-contiguous buffer."""


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    """A NumPy array as a tensor to store.

    Attributes:
        array: C-contiguous array, little-endian; uint16 when ``dtype`` is BF16.
        dtype: safetensors dtype.
    """

    array: np.ndarray
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        return tuple(int(n) for n in self.array.shape)

    def data(self) -> Any:
        """The array itself."""
        return self.array


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor whose bytes are made when they are written, so that one at a time is in memory."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Any]

    def data(self) -> Any:
        """Calls ``load``, which returns a C-contiguous buffer or array."""
        return self.load()


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a mapped file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: TensorFile
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.stop - self.start

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def data(self) -> memoryview:
        """The bytes, mapped, not copied."""
        return self.file.view[self.start : self.stop]

    def array(self) -> np.ndarray:
        """Read-only array over the mapped bytes; BF16 comes as uint16."""
        return np.frombuffer(self.data(), DTYPES[self.dtype][1]).reshape(self.shape)

    def read_into(self, buffer: np.ndarray, offset: int = 0) -> None:
        """Fill a uint8 buffer with the bytes from ``offset`` on, read instead of mapped.

        Raises:
            CheckpointError: the file has become shorter, or cannot be read any more.
        """
        with self._opened(offset) as handle:
            self._fill(handle, buffer.data)

    def blocks(self) -> Iterator[memoryview]:
        """All bytes in turn, read instead of mapped into a buffer that is used again."""
        buffer = memoryview(bytearray(min(BLOCK_BYTES, self.nbytes)))
        with self._opened(0) as handle:
            for start in range(0, self.nbytes, BLOCK_BYTES):
                block = buffer[: self.nbytes - start]
                self._fill(handle, block)
                yield block

    @contextmanager
    def _opened(self, offset: int) -> Iterator[io.FileIO]:
        try:
            with open(self.file.path, "rb", buffering=0) as handle:
                handle.seek(self.start + offset)
                yield handle
        except OSError as error:
            raise CheckpointError(f"{self.file.path}: cannot be read: {error.strerror}") from error

    def _fill(self, handle: io.FileIO, view: memoryview) -> None:
        while view:
            done = handle.readinto(view[:READ_BYTES])
            if not done:
                raise CheckpointError(f"{self.file.path}: became shorter while it was read")
            view = view[done:]

    def float32(self) -> np.ndarray:
        """The values as a new float32 array. F8 types are refused with PocketError."""
        return to_float32(self.array(), self.dtype)


class TensorFile:
    """A safetensors file, mapped; its header is checked in full when it is opened.

    Attributes:
        path: the file.
        tensors: name -> StoredTensor.
        metadata: the header's ``__metadata__``.

    Raises:
        CheckpointError: unreadable, truncated, or a header that does not describe the file exactly.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as handle:
                self.nbytes = os.fstat(handle.fileno()).st_size
                if self.nbytes < 8:
                    raise CheckpointError(
                        f"{self.path}: truncated, {self.nbytes} bytes hold no header"
                    )
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
        self.view = memoryview(self._map)
        (header_bytes,) = struct.unpack("<Q", self.view[:8])
        if header_bytes > min(self.nbytes - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{self.path}: header length {header_bytes} does not fit the file of {self.nbytes}"
                " bytes; it is truncated or damaged"
            )
        header = self._parse(bytes(self.view[8 : 8 + header_bytes]))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(
            isinstance(v, str) for v in self.metadata.values()
        ):
            raise CheckpointError(
                f"{self.path}: header is damaged: __metadata__ is no map of strings"
            )
        self.tensors = self._check(header, 8 + header_bytes)

    def _parse(self, text: bytes) -> dict[str, Any]:
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: header is damaged: {error}") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{self.path}: header is damaged: no JSON object")
        return header

    def _check(self, header: Mapping[str, Any], data_start: int) -> dict[str, StoredTensor]:
        spans = []
        for name, entry in header.items():
            try:
                dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
                integers = [*shape, start, stop]
                valid = set(entry) == {"dtype", "shape", "data_offsets"} and all(
                    type(n) is int and 0 <= n < 2**63 for n in integers
                )
            except (KeyError, TypeError, ValueError):
                valid = False
            if not valid:
                raise CheckpointError(f"{self.path}: header is damaged at tensor {name!r}")
            if not isinstance(dtype, str) or dtype not in DTYPES:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} has the unknown dtype {dtype!r}"
                )
            if stop - start != math.prod(shape) * DTYPES[dtype][0]:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} spans {stop - start} bytes, its shape {shape} of"
                    f" {dtype} needs {math.prod(shape) * DTYPES[dtype][0]}"
                )
            spans.append((start, stop, name, dtype, tuple(shape)))
        end = 0
        tensors = {}
        for start, stop, name, dtype, shape in sorted(spans):
            if start != end:
                raise CheckpointError(
                    f"{self.path}: header is damaged: tensor {name!r} leaves a gap or overlaps"
                )
            end = stop
            tensors[name] = StoredTensor(
                name, dtype, shape, self, data_start + start, data_start + stop
            )
        if data_start + end != self.nbytes:
            state = "truncated" if data_start + end > self.nbytes else "too long"
            raise CheckpointError(
                f"{self.path}: {state}, {self.nbytes} bytes where its header asks for"
                f" {data_start + end}"
            )
        return tensors


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` that refuses a repeated key with ValueError."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, in order.

    Raises:
        CheckpointError: none, a damaged index, or a shard that is not there.
    """
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(f"{folder}: neither {WEIGHTS_NAME} nor {INDEX_NAME}")
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(shards.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: damaged, no weight_map of file names in it") from error
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise CheckpointError(
                f"{index}: names the shard {name!r}, want a file name in the same folder"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: shard {name} is missing")
    files = [folder / name for name in names]
    for name, shard in shards.items():
        if not isinstance(name, str) or not isinstance(shard, str):
            raise CheckpointError(f"{index}: damaged, no weight_map of file names in it")
    return files


def open_files(
    paths: Iterable[str | os.PathLike[str]],
) -> tuple[list[TensorFile], dict[str, StoredTensor]]:
    """Open the files of one model; a tensor present in two of them is an error."""
    files, tensors = [], dict[str, StoredTensor]()
    for path in paths:
        file = TensorFile(path)
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{file.path}: tensor {name!r} is also in {tensors[name].file.path.name}"
                )
            tensors[name] = tensor
        files.append(file)
    return files, tensors


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Raw values of a safetensors dtype as float32 (a copy)."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in ("F16", "F32", "F64"):
        return array.astype(np.float32)
    raise PocketError(f"dtype: got {dtype}, want F16, BF16, F32 or F64")


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to nearest even in a safetensors float dtype; BF16 comes as uint16."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (
            bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        ) >> np.uint32(16)
        quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
        return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
    if dtype in ("F16", "F32", "F64"):
        return values.astype(DTYPES[dtype][1])
    raise PocketError(f"dtype: got {dtype}, want F16, BF16, F32 or F64")


def as_bytes(data: Any) -> memoryview:
    """A C-contiguous buffer or array as a flat view of bytes."""
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def crc32(name: str, dtype: str, shape: Iterable[int], data: Any) -> int:
    """CRC-32 (zlib) over ``name\\ndtype\\nd0,d1,...\\n`` in UTF-8, then the data."""
    view = as_bytes(data)
    parts = (view[start : start + CHUNK_BYTES] for start in range(0, len(view), CHUNK_BYTES))
    return _crc32(name, dtype, shape, parts)


def stored_crc32(tensor: StoredTensor) -> int:
    """The same of a tensor in a file, without its bytes staying in memory."""
    return _crc32(tensor.name, tensor.dtype, tensor.shape, tensor.blocks())


def _crc32(name: str, dtype: str, shape: Iterable[int], parts: Iterable[memoryview]) -> int:
    crc = zlib.crc32(f"{name}\n{dtype}\n{','.join(str(n) for n in shape)}\n".encode())
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def split_shards(tensors: Mapping[str, TensorSource], limit: int) -> list[list[str]]:
    """Names a file, in storage order: a file's data stays within ``limit`` bytes, or is one tensor.

    Files are filled in the order of natural names. Inside a file tensors of a multiple of
    ``ALIGNMENT`` bytes come first, so that each of them is aligned to that: kernels read those in
    whole cache lines. Wide types come first among the others, each aligned to its element.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name in sorted(tensors, key=_natural):
        size = tensor_bytes(tensors[name])
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    for shard in shards:
        shard.sort(
            key=lambda name: (
                tensor_bytes(tensors[name]) % ALIGNMENT > 0,
                -DTYPES[tensors[name].dtype][0],
                _natural(name),
            )
        )
    return shards


def tensor_bytes(tensor: TensorSource) -> int:
    """Bytes of a tensor's data."""
    return math.prod(tensor.shape) * DTYPES[tensor.dtype][0]


def shard_names(count: int) -> list[str]:
    """File names of ``count`` weight files, as transformers names them."""
    if count == 1:
        return [WEIGHTS_NAME]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def header_of(
    names: Iterable[str], tensors: Mapping[str, TensorSource], metadata: Mapping[str, str]
) -> bytes:
    """Length and header of a file that holds ``names`` in this order, padded until its data is
    aligned."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        tensor = tensors[name]
        stop = offset + tensor_bytes(tensor)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def write_tensors(
    handle: Any,
    names: Iterable[str],
    tensors: Mapping[str, TensorSource],
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, int]]:
    """Write the data of ``names`` and yield each name with its crc32.

    Raises:
        PocketError: a source gives more or fewer bytes than its shape needs.
    """
    for name in names:
        tensor = tensors[name]
        data = as_bytes(tensor.data())
        if len(data) != tensor_bytes(tensor):
            raise PocketError(
                f"{name}: got {len(data)} bytes, want {tensor_bytes(tensor)} for"
                f" {list(tensor.shape)} of {tensor.dtype}"
            )
        for start in range(0, len(data), CHUNK_BYTES):
            handle.write(data[start : start + CHUNK_BYTES])
        if progress is not None:
            progress(len(data))
        yield name, crc32(name, tensor.dtype, tensor.shape, data)


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts]
