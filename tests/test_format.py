"""docs/FORMAT.md says enough: a reader written from it alone reads what the package reads."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import independent_reader
import numpy as np
import pytest
from compressed import random_codec, random_module, simple_checkpoint

from pocketllm.checkpoint import CodecData, ModuleData, open_checkpoint
from pocketllm.schema import index_bits
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
    layout = open_checkpoint(GOLDEN / "v1").layout
    assert {c.storage for c in layout.codecs.values()} == {
        "table-int8",
        "table-float16",
        "decoder",
    }
    assert {m.kind for m in layout.modules.values()} == {"linear", "conv1d", "embedding", "tied"}


@pytest.mark.parametrize("shard_bytes", [200, 10**9])
def test_fresh_checkpoint(tmp_path: Path, shard_bytes: int) -> None:
    compare(simple_checkpoint(tmp_path / "model", shard_bytes=shard_bytes))


@pytest.mark.parametrize("codebook", [2, 3, 4, 5, 127, 256, 300, 4096, 65536])
@pytest.mark.parametrize("columns", [1, 7, 16])
def test_every_width(tmp_path: Path, codebook: int, columns: int) -> None:
    codec = random_codec("c", 3, codebook)
    module = random_module("m", (5, columns), codec, shift=columns == 7)
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


def test_header_is_plain_safetensors(tmp_path: Path) -> None:
    """The header by the container's own description: length, JSON, data without gaps."""
    path = simple_checkpoint(tmp_path / "model") / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert metadata == TensorFile(path).metadata
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0 and spans[-1][1] == len(content) - 8 - length
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
