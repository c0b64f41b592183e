"""docs/FORMAT.md says enough: a reader written from it alone reads what the package reads."""

from __future__ import annotations

import json
import re
import struct
import sys
from pathlib import Path

import independent_reader
import numpy as np
import pytest
from compressed import falling_bits, random_codec, random_module, simple_checkpoint

from pocketllm import trellis
from pocketllm.checkpoint import CodecData, ModuleData, open_checkpoint
from pocketllm.schema import KINDS, STATISTICS, STORAGES, index_bits
from pocketllm.tensorfile import TensorFile

GOLDEN = Path(__file__).parent / "golden"


def compare(folder: Path) -> None:
    """Both readers agree on every matrix and every dense tensor."""
    matrices, dense = independent_reader.read(folder)
    checkpoint = open_checkpoint(folder)
    assert set(matrices) == set(checkpoint.layout.modules)
    for name, expected in matrices.items():
        values = checkpoint.load_dequantised(name)
        assert values.dtype == np.float32 and values.shape == expected.shape
        # float32 sums of a few dozen products in the decoder, single products in a table
        np.testing.assert_allclose(values, expected, rtol=2e-5, atol=2e-6)
    assert set(dense) == set(checkpoint.dense)
    for name, expected in dense.items():
        np.testing.assert_array_equal(checkpoint.dense[name].array(), expected)


@pytest.mark.parametrize("golden", sorted(p.name for p in GOLDEN.iterdir()))
def test_golden_checkpoints(golden: str) -> None:
    compare(GOLDEN / golden)


def test_golden_has_every_storage() -> None:
    layouts = [open_checkpoint(folder).layout for folder in GOLDEN.iterdir()]
    codecs = [codec for layout in layouts for codec in layout.codecs.values()]
    modules = [module for layout in layouts for module in layout.modules.values()]
    assert {codec.storage for codec in codecs} == set(STORAGES)
    assert {module.kind for module in modules} == set(KINDS)
    assert {module.statistics for module in modules} == set(STATISTICS)


def test_golden_trellis_has_every_case() -> None:
    """Whole and quarter bits, blocks without bits and short ones, segments of few and many rows."""
    modules = open_checkpoint(GOLDEN / "v1-trellis").layout.modules.values()
    coded = [module for module in modules if module.bits is not None]
    alike = [module for module in coded if not isinstance(module.bits, tuple)]
    apart = [module.bits for module in coded if isinstance(module.bits, tuple)]
    assert {4 * module.bits % 4 for module in alike} == {0, 1, 2, 3}
    assert {module.kind for module in alike} == {"linear", "conv1d", "embedding"}
    assert {0, 6} <= {bits for blocks in apart for bits in blocks}
    assert any(module.shape[1] % 128 and module.shape[1] > 128 for module in coded)
    rows = [module.shape[0] for module in coded]
    assert (
        any(n < 16 for n in rows)
        and any(16 <= n < 256 for n in rows)
        and any(n > 512 and n % 256 for n in rows)
    )


@pytest.mark.parametrize("shard_bytes", [200, 10**9])
def test_fresh_checkpoint(tmp_path: Path, shard_bytes: int) -> None:
    compare(simple_checkpoint(tmp_path / "model", shard_bytes=shard_bytes))


@pytest.mark.parametrize("codebook", [2, 3, 4, 5, 127, 256, 300, 4096, 65536])
@pytest.mark.parametrize("columns", [1, 7, 16])
def test_every_width(tmp_path: Path, codebook: int, columns: int) -> None:
    codec = random_codec("c", 3, codebook)
    module = random_module("m", (5, columns), codec, shift=columns == 7)
    compare(simple_checkpoint(tmp_path / "model", codecs=[codec], modules=[module]))


@pytest.mark.parametrize("bits", [1.0, 2.25, 3.5, 4.75, 6.0, None], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (15, 9), (16, 130), (18, 257), (255, 8), (515, 3)])
def test_trellis_shapes(tmp_path: Path, shape: tuple[int, int], bits: float | None) -> None:
    """None: blocks of columns with bits of their own."""
    codec = random_codec("c", storage="trellis")
    used = falling_bits(shape[1]) if bits is None else bits
    module = random_module("m", shape, codec, shift=shape[1] == 9, bits=used)
    compare(simple_checkpoint(tmp_path / "model", codecs=[codec], modules=[module]))


@pytest.mark.parametrize("norm", ["input", "ln", "rln"])
def test_decoder_norms(tmp_path: Path, norm: str) -> None:
    codec = random_codec("c", 4, 32, storage="decoder", norm=norm)
    module = random_module("m", (5, 21), codec)
    compare(simple_checkpoint(tmp_path / "model", codecs=[codec], modules=[module]))


def test_index_bits() -> None:
    widths = {2: 1, 3: 2, 4: 2, 5: 3, 256: 8, 257: 9, 32768: 15, 65536: 16}
    assert {k: index_bits(k) for k in widths} == widths


def test_by_hand(tmp_path: Path) -> None:
    """Two rows with pen and paper: indices 1, 2, 3 and 0, 3, 1 of two bits, d = 2, in = 5."""
    codec = random_codec("c", 2, 4)
    table = np.array([[0, 1], [2, 3], [4, 5], [-6, 7]], np.int8)
    codec = CodecData(codec.spec, {"table": table, "table_scale": np.array([0.5], np.float32)})
    module = random_module("m", (2, 5), codec, shift=True, statistics="float16")
    packed = np.array([0b11_10_01, 0b01_11_00], np.uint8)
    scale, shift = np.array([2, 10], np.float16), np.array([0, 1], np.float16)
    module = ModuleData(module.spec, packed, scale, shift)
    folder = simple_checkpoint(tmp_path / "model", codecs=[codec], modules=[module])
    expected = [[2, 3, 4, 5, -6], [1, 6, -29, 36, 11]]
    np.testing.assert_array_equal(open_checkpoint(folder).load_dequantised("m"), expected)
    np.testing.assert_array_equal(independent_reader.read(folder)[0]["m"], expected)


def test_eight_bit_statistics_by_hand(tmp_path: Path) -> None:
    """Scales 2 = 2^(118 - 127 + 10) and 3 = 2 (1 + 8/16), a shift of -1.25 = -(1 + 4/16)."""
    codec = random_codec("c", 2, 4)
    table = np.array([[0, 1], [2, 3], [4, 5], [-6, 7]], np.int8)
    codec = CodecData(codec.spec, {"table": table, "table_scale": np.array([1], np.float32)})
    spec = random_module("m", (2, 4), codec, shift=True).spec
    scale = np.array([118, 10 << 4, 10 << 4 | 8], np.uint8)
    shift = np.array([120, 0, 128 | 7 << 4 | 4], np.uint8)
    module = ModuleData(spec, np.array([0b10_01, 0b01_00], np.uint8), scale, shift)
    folder = simple_checkpoint(tmp_path / "model", codecs=[codec], modules=[module])
    expected = [[4, 6, 8, 10], [-1.25, 1.75, 4.75, 7.75]]
    np.testing.assert_array_equal(open_checkpoint(folder).load_dequantised("m"), expected)
    np.testing.assert_array_equal(independent_reader.read(folder)[0]["m"], expected)


def trellis_by_hand(
    tmp_path: Path,
    shape: tuple[int, int],
    bits: trellis.Bits,
    magnitude: dict[int, int],
    packed: list[int],
    scale: list[float],
    columns: list[int] | None = None,
) -> Path:
    """A checkpoint of one matrix; values of 1 and 2 bits have steps of 1/2 and 1/4."""
    codec = random_codec("c", storage="trellis")
    table, steps = np.zeros(252, np.int8), np.array([0.5, 0.25, 1, 1, 1, 1], np.float32)
    table[list(magnitude)] = list(magnitude.values())
    codec = CodecData(codec.spec, {"magnitude": table, "magnitude_scale": steps})
    spec = random_module("m", shape, codec, bits=bits, statistics="float16").spec
    codes = None if columns is None else np.array(columns, np.uint8)
    payload, scales = np.array(packed, np.uint8), np.array(scale, np.float16)
    module = ModuleData(spec, payload, scales, None, codes)
    return simple_checkpoint(tmp_path / "model", codecs=[codec], modules=[module])


def test_trellis_by_hand(tmp_path: Path) -> None:
    """Down the first column the bits 1, 0, 0, 1, 1, down the second 0, 1, 0, 0, 0, zeros before.

    Their indices are 4, 2, 2, 5, 1 and 0, 4, 2, 2, 1; m is 1, 2, 4, 8.
    """
    folder = trellis_by_hand(
        tmp_path, (5, 2), 1.0, {0: 1, 1: 2, 2: 4, 3: 8}, [1, 2, 0, 1, 1], [1, 2, 1, 1, 1]
    )
    expected = [[-4, 0.5], [4, -8], [2, 2], [-2, 2], [1, 1]]
    np.testing.assert_array_equal(open_checkpoint(folder).load_dequantised("m"), expected)
    np.testing.assert_array_equal(independent_reader.read(folder)[0]["m"], expected)


def test_trellis_columns_by_hand(tmp_path: Path) -> None:
    """All columns have two bits but 0 and 5, so that 1 and 129 stand first and last.

    Column 1 has the index 4 + 8, -m[3], and the scale 2^(-4/4); column 129 the index 8, -m[7].
    """
    columns = [2] * 130
    columns[0], columns[1], columns[5] = 0, 2 + 8 * 4, 8 * 3
    packed = [0] * 32
    packed[0], packed[16], packed[31] = 1, 1, 128
    folder = trellis_by_hand(tmp_path, (1, 130), (2, 0), {7: 40, 11: 10}, packed, [3], columns)
    expected = np.zeros((1, 130))
    expected[0, 1], expected[0, 129] = -40 / 4 / 2 * 3, -10 / 4 * 3
    np.testing.assert_array_equal(open_checkpoint(folder).load_dequantised("m"), expected)
    np.testing.assert_array_equal(independent_reader.read(folder)[0]["m"], expected)


def test_independent_reader_is_independent() -> None:
    code = Path(independent_reader.__file__).read_text(encoding="utf-8")
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", code, re.MULTILINE))
    assert "json" in imported and imported <= {*sys.stdlib_module_names, "numpy"}


def test_header_is_plain_safetensors(tmp_path: Path) -> None:
    """The header by the container's own description: length, JSON, data without gaps."""
    path = simple_checkpoint(tmp_path / "model") / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    assert (8 + length) % 64 == 0
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert metadata == TensorFile(path).metadata
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0 and spans[-1][1] == len(content) - 8 - length
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
