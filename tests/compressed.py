"""Tiny compressed models made from random codecs, for tests of the format and of the modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pocketllm import kernels, rowcode, trellis
from pocketllm.checkpoint import CodecData, CodecSpec, ModuleData, ModuleSpec, write_checkpoint
from pocketllm.schema import mlp_parameters
from pocketllm.tensorfile import ArrayTensor


def random_codec(
    name: str = "main",
    subvector: int = 4,
    codebook: int = 60,
    *,
    storage: str = "table-int8",
    norm: str = "input",
    hidden: int = 8,
    seed: int = 0,
) -> CodecData:
    """A codec with random content of spread about one; a trellis has none of the other settings."""
    random = np.random.default_rng(seed)
    if storage == "trellis":
        largest = np.repeat(trellis.LARGEST, [own.stop - own.start for own in trellis.TABLE])
        parts = {
            "magnitude": random.integers(0, largest + 1).astype(np.int8),
            "magnitude_scale": (random.uniform(1, 3, 6) / trellis.LARGEST).astype(np.float32),
        }
        return CodecData(CodecSpec.trellis(name), parts)
    spec = CodecSpec(name, subvector, codebook, hidden, norm, storage)
    values = random.standard_normal((codebook, subvector))
    if storage == "table-int8":
        table = np.clip(np.rint(values * 40), -127, 127).astype(np.int8)
        return CodecData(spec, {"table": table, "table_scale": np.array([1 / 40], np.float32)})
    if storage == "table-float16":
        return CodecData(spec, {"table": values.astype(np.float16)})
    decoder = random.standard_normal(3 * mlp_parameters(subvector, hidden)) * 0.3
    return CodecData(
        spec, {"codebook": values.astype(np.float16), "decoder": decoder.astype(np.float16)}
    )


def random_symbols(
    bits: trellis.Bits, rows: int, columns: int, random: np.random.Generator
) -> np.ndarray:
    """Trellis codes (rows, columns) uint8 of weights with these bits, columns in stored order."""
    blocks, extra = trellis.block_bits(bits, columns)
    each = np.repeat(blocks.astype(int), trellis.BLOCK)[:columns]
    more = trellis.is_richer(extra, rows)[:, None]
    size = 1 << np.where(each > 0, each + more, 0)
    return random.integers(0, size).astype(np.uint8)


def random_columns(
    bits: trellis.Bits, columns: int, random: np.random.Generator
) -> np.ndarray | None:
    """Bits and scales of columns, uint8 (columns,), where ``bits`` are those of blocks."""
    if not isinstance(bits, tuple):
        return None
    each = np.repeat(np.array(bits), trellis.BLOCK)[:columns]
    return trellis.column_codes(random.permutation(each), random.integers(0, 32, columns))


def falling_bits(columns: int) -> tuple[int, ...]:
    """Different bits for the blocks of columns: 5, 3, 1 and then none."""
    return tuple(max(0, 5 - 2 * block) for block in range(trellis.block_count(columns)))


def random_module(
    name: str,
    shape: tuple[int, int],
    codec: CodecData,
    *,
    kind: str = "linear",
    scale: bool = True,
    shift: bool = False,
    statistics: str = "uint8",
    dtype: str = "float32",
    seed: int = 0,
    spread: float = 0.05,
    bits: trellis.Bits = 2.25,
) -> ModuleData:
    """A compressed matrix with random indices, or with a trellis codec random codes of ``bits``."""
    random = np.random.default_rng([seed, *name.encode()])
    rows, columns = shape
    used = bits if codec.spec.is_trellis else None
    spec = ModuleSpec(
        name, kind, shape, codec.spec.name, scale, shift, dtype, statistics=statistics, bits=used
    )
    codes = None
    if codec.spec.is_trellis:
        packed = trellis.pack(random_symbols(bits, rows, columns, random), bits)
        codes = random_columns(bits, columns, random)
    else:
        count = -(-columns // codec.spec.subvector)
        index = random.integers(0, codec.spec.codebook, (rows, count)).astype(np.int32)
        packed = np.ascontiguousarray(kernels.pack(index, codec.spec.index_bits)).reshape(-1)
    scales = (spread * random.uniform(0.5, 1.5, rows)).astype(np.float16)
    shifts = (spread * random.standard_normal(rows)).astype(np.float16)
    if statistics == "uint8":
        scales = rowcode.encode(scales, signed=False)
        shifts = rowcode.encode(shifts, signed=True)
    return ModuleData(
        spec,
        packed,
        scales if scale else None,
        shifts if shift else None,
        codes,
    )


def simple_parts(seed: int = 0) -> dict[str, Any]:
    """Arguments of write_checkpoint for a small folder without a transformers model."""
    random = np.random.default_rng(seed)
    codecs = [
        random_codec("table", 4, 60),
        random_codec("half", 3, 32, storage="table-float16", norm="ln", seed=1),
        random_codec("decoded", 4, 16, storage="decoder", norm="rln", seed=2),
        random_codec("trellis", storage="trellis", seed=3),
    ]
    modules = [
        random_module("a.linear", (10, 18), codecs[0], statistics="float16"),
        random_module(
            "a.shifted", (7, 20), codecs[1], shift=True, statistics="float16", dtype="bfloat16"
        ),
        random_module("a.conv", (6, 9), codecs[2], kind="conv1d", dtype="float16", scale=False),
        random_module("embed", (12, 8), codecs[0], kind="embedding"),
        random_module("b.alike", (18, 20), codecs[3], shift=True, bits=2.25),
        random_module("b.apart", (3, 140), codecs[3], bits=(3, 1), dtype="bfloat16"),
        ModuleData(ModuleSpec("head", "tied", (12, 8), tied_to="embed")),
    ]
    dense = {
        "norm.weight": ArrayTensor(random.integers(0, 2**15, 8).astype(np.uint16), "BF16"),
        "a.linear.bias": ArrayTensor(random.standard_normal(10).astype(np.float32), "F32"),
        "counter": ArrayTensor(np.array(7, np.int64), "I64"),
    }
    return {
        "modules": modules,
        "codecs": codecs,
        "dense_tensors": dense,
        "config": {"model_type": "simple", "dtype": "float32"},
        "quantization": {"seed": seed},
    }


def simple_checkpoint(out: Path, **overrides: Any) -> Path:
    """Write :func:`simple_parts`."""
    return write_checkpoint(out, **{**simple_parts(), **overrides})
