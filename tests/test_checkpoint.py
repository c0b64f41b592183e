"""Checkpoints: what is written is what is read, and every malformation has its own sentence."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import independent_reader
import numpy as np
import pytest
from compressed import random_codec, random_module, simple_checkpoint, simple_parts
from safetensors import safe_open

from pocketllm import checkpoint_write
from pocketllm.checkpoint import (
    ModuleData,
    ModuleSpec,
    decompress,
    open_checkpoint,
    open_weights,
)
from pocketllm.errors import CheckpointError, PocketError
from pocketllm.tensorfile import ArrayTensor, LazyTensor, from_float32, to_float32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint to damage."""
    return simple_checkpoint(tmp_path / "model")


def edit_config(folder: Path, change: Any) -> None:
    """Apply a change to config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def rewrite(folder: Path, change: Any, file: str = "model.safetensors") -> None:
    """Apply a change to a weight file's header and data; offsets and checksums are left alone."""
    path = folder / file
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    header, data = change(header, data) or (header, data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_record(folder: Path, change: Any) -> None:
    """Apply a change to the checksum record."""

    def apply(header: dict[str, Any], data: bytearray) -> None:
        record = json.loads(header["__metadata__"]["pocketllm"])
        change(record)
        header["__metadata__"]["pocketllm"] = json.dumps(record)

    rewrite(folder, apply)


def resum(folder: Path) -> None:
    """Make the checksums right again, so that what they would hide is seen."""

    def apply(header: dict[str, Any], data: bytearray) -> None:
        record = json.loads(header["__metadata__"]["pocketllm"])
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                shape = ",".join(map(str, entry["shape"]))
                text = f"{name}\n{entry['dtype']}\n{shape}\n".encode()
                record["crc32"][name] = f"{zlib.crc32(text + data[start:stop]):08x}"
        header["__metadata__"]["pocketllm"] = json.dumps(record)

    rewrite(folder, apply)


def resum_layout(folder: Path) -> None:
    """Make the layout's checksum that of what stands in config.json."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    layout = {key: quantization[key] for key in ("codecs", "modules")}
    text = json.dumps(layout, sort_keys=True, separators=(",", ":"))
    edit_record(folder, lambda record: record.update(layout=f"{zlib.crc32(text.encode()):08x}"))


def set_bytes(name: str, value: bytes, at: int = 0) -> Any:
    """A change for ``rewrite`` that overwrites bytes of one tensor."""

    def apply(header: dict[str, Any], data: bytearray) -> None:
        start = header[name]["data_offsets"][0] + at
        data[start : start + len(value)] = value

    return apply


# ---- what is written is what is read ----------------------------------------------------------


def test_reads_back_what_was_written(folder: Path) -> None:
    parts = simple_parts()
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    checkpoint = open_checkpoint(folder)
    for module in parts["modules"]:
        for part, array in (
            ("weight", module.packed),
            ("scale", module.scale),
            ("shift", module.shift),
            ("columns", module.columns),
        ):
            assert (f"{module.spec.name}.{part}" in stored) == (array is not None)
            if array is not None:
                np.testing.assert_array_equal(stored[f"{module.spec.name}.{part}"].numpy(), array)
    for codec in parts["codecs"]:
        for part, array in codec.parts.items():
            np.testing.assert_array_equal(
                stored[f"pocketllm_codecs.{codec.spec.name}.{part}"].numpy(), array
            )
    assert set(checkpoint.dense) == set(parts["dense_tensors"])
    for name, tensor in parts["dense_tensors"].items():
        np.testing.assert_array_equal(checkpoint.dense[name].array(), tensor.array)
    assert checkpoint.quantization["seed"] == 0


def test_sizes_follow_their_definitions(folder: Path) -> None:
    parts = simple_parts()
    checkpoint = open_checkpoint(folder)
    payload = sum(
        array.nbytes
        for module in parts["modules"]
        for array in (module.packed, module.scale, module.shift, module.columns)
        if array is not None
    )
    payload += sum(array.nbytes for codec in parts["codecs"] for array in codec.parts.values())
    weights = 10 * 18 + 7 * 20 + 6 * 9 + 12 * 8 + 18 * 20 + 3 * 140
    assert checkpoint.bits_per_weight == pytest.approx(8 * payload / weights)
    assert checkpoint.quantization["bits"] == pytest.approx(8 * payload / weights, abs=1e-4)
    assert checkpoint.bytes == (folder / "model.safetensors").stat().st_size
    assert checkpoint.bytes_bf16 == 2 * (weights + 8 + 10) + 8
    assert checkpoint.bytes_fp32 == 4 * (weights + 8 + 10) + 8
    report = checkpoint.to_json()
    assert set(report) == {"bits_per_weight", "bytes", "bytes_bf16", "tensors"}
    rows = {row["name"]: row for row in report["tensors"]}
    assert rows["a.linear"]["bytes"] == 10 * 4 + 20 and rows["a.linear"]["kind"] == "linear"
    assert rows["a.linear"]["bits"] == pytest.approx(8 * 60 / 180)
    # Four rows of 20 weights in 2, 2, 2 and 3 planes of 3 bytes; rows of 140, 128 and 128 bits.
    assert rows["b.alike"]["bytes"] == (18 // 4 * 9 + 2 * 2) * 3 + 2 * 19
    assert rows["b.apart"]["bytes"] == 3 * (18 + 16 + 16) + 140 + 4
    assert rows["pocketllm_codecs.trellis"]["bytes"] == 252 + 6 * 4
    assert rows["pocketllm_codecs.trellis"]["shape"] == [252]
    assert rows["pocketllm_codecs.table"]["shape"] == [60, 4]
    assert rows["head"]["bytes"] == 0 and rows["head"]["bits"] is None
    assert rows["norm.weight"]["bits"] == 16 and rows["norm.weight"]["kind"] == "dense"
    assert rows["norm.weight"]["share"] == pytest.approx(16 / checkpoint.bytes)
    dense = sum(t.nbytes for t in checkpoint.dense.values())
    assert sum(row["bytes"] for row in report["tensors"]) == payload + dense


def test_same_input_gives_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = simple_checkpoint(tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    assert sorted(os.listdir(folder)) == sorted(os.listdir(again))


def test_shards(tmp_path: Path, folder: Path) -> None:
    sharded = simple_checkpoint(tmp_path / "sharded", shard_bytes=300)
    files = sorted(p.name for p in sharded.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    whole, parts = open_checkpoint(folder), open_checkpoint(sharded)
    assert set(whole.tensors) == set(parts.tensors)
    for name, tensor in whole.tensors.items():
        assert bytes(tensor.data()) == bytes(parts.tensors[name].data())
    assert parts.bytes == sum((sharded / name).stat().st_size for name in files)
    (sharded / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"shard {files[1]} is missing"):
        open_checkpoint(sharded)


def test_files_of_the_source_are_taken_over(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "LICENSE", "README.md", "config.json"):
        (source / name).write_text(name)
    out = simple_checkpoint(tmp_path / "out", copy_from=source, extra_files={"README.md": "card"})
    assert sorted(os.listdir(out)) == [
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (out / "README.md").read_text() == "card"
    assert json.loads((out / "config.json").read_text())["model_type"] == "simple"


def test_tensors_are_aligned(folder: Path) -> None:
    """Whole cache lines to cache lines, whatever stands beside them; all others to elements."""
    starts = [(t.start, t.array()) for t in open_checkpoint(folder).tensors.values()]
    lines = [start for start, array in starts if array.nbytes % 64 == 0]
    assert 0 < len(lines) < len(starts) and all(start % 64 == 0 for start in lines)
    assert all(start % array.itemsize == 0 for start, array in starts)


def test_bfloat16_rounds_like_torch() -> None:
    import torch

    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32)
    edges = np.array([0, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x3F808000])
    values = np.concatenate([bits, edges.astype(np.uint32)]).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    finite = ~np.isnan(values)
    ours = from_float32(values, "BF16")
    np.testing.assert_array_equal(ours[finite], expected.view(torch.uint16).numpy()[finite])
    assert np.isnan(to_float32(ours, "BF16")[~finite]).all()
    np.testing.assert_array_equal(
        to_float32(ours, "BF16")[finite], expected.float().numpy()[finite]
    )


# ---- decompress -------------------------------------------------------------------------------


def test_decompress_gives_the_dense_matrices(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    out = decompress(folder, tmp_path / "dense")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    with safe_open(out / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    assert set(tensors) == {
        "a.linear.weight",
        "a.linear.bias",
        "a.shifted.weight",
        "a.conv.weight",
        "embed.weight",
        "b.alike.weight",
        "b.apart.weight",
        "norm.weight",
        "counter",
    }
    assert str(tensors["a.shifted.weight"].dtype) == "torch.bfloat16"
    assert str(tensors["b.apart.weight"].dtype) == "torch.bfloat16"
    assert tensors["a.conv.weight"].shape == (9, 6)
    for name in ("a.linear", "embed", "b.alike"):
        np.testing.assert_array_equal(
            tensors[f"{name}.weight"].numpy(), checkpoint.load_dequantised(name)
        )
    np.testing.assert_array_equal(
        tensors["a.conv.weight"].numpy(),
        checkpoint.load_dequantised("a.conv").T.astype(np.float16),
    )
    np.testing.assert_array_equal(
        checkpoint.load_dequantised("head"), checkpoint.load_dequantised("embed")
    )


def test_decompress_refuses_an_existing_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PocketError, match="already exists"):
        decompress(folder, tmp_path)


# ---- damage -----------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_not_a_hugging_face_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json"):
        open_checkpoint(tmp_path)


def test_config_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_checkpoint(folder)


def test_config_with_a_repeated_key(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(CheckpointError, match="given twice"):
        open_checkpoint(folder)


def test_config_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        open_checkpoint(folder)


def test_dense_model(folder: Path) -> None:
    edit_config(folder, lambda config: config.pop("quantization_config"))
    with pytest.raises(CheckpointError, match="no quantization_config"):
        open_checkpoint(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        open_checkpoint(folder)


QUANTIZATION = {
    "another method": ({"quant_method": "gptq"}, "quant_method is 'gptq', want 'pocketllm'"),
    "newer version": ({"format_version": 2}, "format_version is 2, this pocketllm reads version 1"),
    "version as text": ({"format_version": "1"}, "format_version is '1'"),
    "version as bool": ({"format_version": True}, "format_version is True"),
    "no codecs": ({"codecs": None}, "no map 'codecs'"),
    "no modules": ({"modules": [1]}, "no map 'modules'"),
}


@pytest.mark.parametrize("case", QUANTIZATION)
def test_quantization_config(folder: Path, case: str) -> None:
    change, message = QUANTIZATION[case]
    edit_config(folder, lambda config: config["quantization_config"].update(change))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


ENTRIES = {
    "subvector": ("codecs", "table", {"subvector": 17}, "subvector is 17, want an integer from 1"),
    "codebook": ("codecs", "table", {"codebook": 1}, "codebook is 1, want an integer from 2"),
    "codebook type": ("codecs", "table", {"codebook": True}, "codebook is True"),
    "index_bits": ("codecs", "table", {"index_bits": 7}, "index_bits is 7, want 6"),
    "storage": ("codecs", "table", {"storage": "zip"}, "storage is 'zip', want one of"),
    "unfoldable": ("codecs", "table", {"norm": "rln"}, "does not fold into a table"),
    "norm": ("codecs", "table", {"norm": ["ln"]}, "norm is \\['ln'\\], want one of"),
    "kind": ("modules", "a.linear", {"kind": "conv"}, "kind is 'conv', want one of"),
    "shape": ("modules", "a.linear", {"shape": [10, -18]}, "want two positive integers"),
    "codec": ("modules", "a.linear", {"codec": "none"}, "names the codec 'none', which is not"),
    "shift": ("modules", "a.linear", {"shift": 1}, "want true or false"),
    "dtype": ("modules", "a.linear", {"dtype": "int8"}, "dtype is 'int8', want one of"),
    "tied": ("modules", "head", {"to": "a.linear"}, "tied to 'a.linear', which is no module of"),
    "bits without a trellis": ("modules", "a.linear", {"bits": 2.0}, "'table' is no trellis"),
    "other codec": ("modules", "b.alike", {"codec": "table"}, "bits is 2.25, want none: its codec"),
    "a trellis": ("modules", "a.linear", {"codec": "trellis"}, "bits is None, want a multiple"),
    "fewer bits": ("modules", "b.alike", {"bits": 2.0}, r"b.alike.weight is U8 \[120\]"),
    "alike for apart": ("modules", "b.apart", {"bits": 2.0}, r"b.apart.weight is U8 \[150\]"),
    "apart for alike": ("modules", "b.alike", {"bits": [[2, 1]]}, r"b.alike.weight is U8 \[120\]"),
    "other shape": ("modules", "a.linear", {"shape": [10, 22]}, r"is U8 \[40\], config.json asks"),
    "other columns": ("modules", "a.linear", {"shape": [10, 17]}, "are not those the weight files"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_entries_of_the_quantization_config(folder: Path, case: str) -> None:
    group, name, change, message = ENTRIES[case]
    edit_config(folder, lambda config: config["quantization_config"][group][name].update(change))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


# Of a module of 18 x 20, one block, or of 3 x 140, two blocks.
BITS = {
    "b.alike": [
        0, 0.75, 6.25, 7, 1.1, -2, 10**400, float("inf"), float("nan"), True, None, "2", {},
        [], [2], [[2]], [[2, 2]], [[7, 1]], [[-1, 1]], [[2.0, 1]], [[2, True]], [[2, 1, 1]],
    ],
    "b.apart": [
        [[3, 1]], [[3, 3]], [[3, 2], [1, 1]], [[1, 1], [3, 1]], [[3, 1], [3, 1]],
        [[3, 1], [2, 0], [1, 1]], [[3, 0], [1, 2]], [["3", 1], [1, 1]], [[3, 1], 1],
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "bits"), [(name, bits) for name, several in BITS.items() for bits in several]
)
def test_bits_of_trellis_codes(folder: Path, module: str, bits: Any) -> None:
    edit_config(
        folder, lambda config: config["quantization_config"]["modules"][module].update(bits=bits)
    )
    with pytest.raises(CheckpointError) as failure:
        open_checkpoint(folder)
    message = str(failure.value)
    assert f"module {module!r}: bits is {bits!r}, want a multiple of 1/4 from 1 to 6" in message
    assert f"of {1 if module == 'b.alike' else 2} blocks" in message and "\n" not in message


def test_whole_bits_may_be_written_without_a_point(tmp_path: Path) -> None:
    """As writers in other languages may; the checksum is of what stands in config.json."""
    codec = random_codec("t", storage="trellis")
    folder = simple_checkpoint(
        tmp_path / "model", codecs=[codec], modules=[random_module("m", (5, 9), codec, bits=2.0)]
    )
    expected = open_checkpoint(folder).load_dequantised("m")

    def whole(config: dict[str, Any]) -> None:
        config["quantization_config"]["modules"]["m"]["bits"] = 2

    edit_config(folder, whole)
    with pytest.raises(CheckpointError, match="are not those the weight files"):
        open_checkpoint(folder)
    resum_layout(folder)
    np.testing.assert_array_equal(open_checkpoint(folder).load_dequantised("m"), expected)


def test_default_statistics_may_be_spelled_out(folder: Path) -> None:
    expected = open_checkpoint(folder).load_dequantised("a.linear")

    def spell_out(config: dict[str, Any]) -> None:
        entry = config["quantization_config"]["modules"]["a.linear"]
        assert "statistics" not in entry
        entry["statistics"] = "float16"

    edit_config(folder, spell_out)
    with pytest.raises(CheckpointError, match="are not those the weight files"):
        open_checkpoint(folder)
    resum_layout(folder)
    np.testing.assert_array_equal(open_checkpoint(folder).load_dequantised("a.linear"), expected)
    np.testing.assert_allclose(independent_reader.read(folder)[0]["a.linear"], expected, rtol=1e-6)


def test_codec_name(folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        codecs = config["quantization_config"]["codecs"]
        codecs["../table"] = codecs.pop("table")

    edit_config(folder, change)
    with pytest.raises(CheckpointError, match="want a name of letters"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["a.linear.scale", "b.apart.columns", "pocketllm_codecs.trellis.magnitude_scale"]
)
def test_missing_compressed_tensor(folder: Path, name: str) -> None:
    def change(header: dict[str, Any], data: bytearray) -> None:
        header["renamed"] = header.pop(name)

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        open_checkpoint(folder)


def test_missing_dense_tensor(folder: Path) -> None:
    def change(header: dict[str, Any], data: bytearray) -> Any:
        first, last = header.pop("counter")["data_offsets"]
        del data[first:last]
        for name, entry in header.items():
            if name != "__metadata__" and entry["data_offsets"][0] >= last:
                entry["data_offsets"] = [n - (last - first) for n in entry["data_offsets"]]
        return header, data

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match="tensor counter is missing"):
        open_checkpoint(folder)


def test_unexpected_tensor(folder: Path) -> None:
    def change(header: dict[str, Any], data: bytearray) -> None:
        end = len(data)
        data += b"1234"
        header["extra"] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match="tensor extra is not expected"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        "b.alike.columns",
        "a.linear.columns",
        "a.linear.shift",
        "head.weight",
        "pocketllm_codecs.trellis.table",
        "pocketllm_codecs.other.table",
    ],
)
def test_part_that_is_not_asked_for(tmp_path: Path, name: str) -> None:
    """It has a checksum as dense tensors do, but is none."""
    dense = {name: ArrayTensor(np.zeros(20, np.uint8), "U8")}
    folder = simple_checkpoint(tmp_path / "model", dense_tensors=dense)
    with pytest.raises(CheckpointError, match=f"tensor {name} is not expected, config.json asks"):
        open_checkpoint(folder)


def test_other_dtype(folder: Path) -> None:
    def change(header: dict[str, Any], data: bytearray) -> None:
        header["a.linear.scale"]["dtype"] = "BF16"

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=r"a.linear.scale is BF16 \[10\], config.json asks"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        "a.linear.weight",
        "norm.weight",
        "pocketllm_codecs.table.table",
        "b.alike.weight",
        "b.apart.columns",
        "pocketllm_codecs.trellis.magnitude",
    ],
)
def test_flipped_bit_in_data(folder: Path, name: str) -> None:
    tensor = open_checkpoint(folder).tensors[name]
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[tensor.start + 3] ^= 0x10
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"tensor {name} does not match its checksum"):
        open_checkpoint(folder)
    open_checkpoint(folder, check=False)


def test_bytes_of_the_file_are_guarded(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    random = np.random.default_rng(0)
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(random.integers(8))
        path.unlink()
        path.write_bytes(damaged)
        try:
            open_checkpoint(folder)
        except CheckpointError:
            continue
        # Only white space after the header's JSON may change without a change of meaning.
        assert content[position : position + 1] == b" " and damaged[position] in b" \t\r\n"


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1])
def test_truncated_file(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(folder)


def test_file_with_more_behind_it(folder: Path) -> None:
    with open(folder / "model.safetensors", "ab") as handle:
        handle.write(b"x")
    with pytest.raises(CheckpointError, match="too long"):
        open_checkpoint(folder)


HEADERS = {
    "no object": (lambda h, d: ([1], d), "no JSON object"),
    "no metadata": (lambda h, d: h.pop("__metadata__") and None, "carries no checksums"),
    "metadata type": (lambda h, d: h["__metadata__"].update(format=1), "no map of strings"),
    "metadata key": (lambda h, d: h["__metadata__"].update(x="1"), "other keys than expected"),
    "entry": (lambda h, d: h.update({"norm.weight": {"dtype": "F16"}}), "damaged at tensor 'norm"),
    "entry type": (lambda h, d: h.update({"norm.weight": 1}), "damaged at tensor 'norm"),
    "dtype": (lambda h, d: h["norm.weight"].update(dtype="X9"), "unknown dtype 'X9'"),
    "shape": (lambda h, d: h["norm.weight"].update(shape=[9]), r"shape \[9\] of BF16 needs 18"),
    "negative": (lambda h, d: h["norm.weight"].update(shape=[-8]), "damaged at tensor 'norm"),
    "overlap": (
        lambda h, d: h["norm.weight"].update(data_offsets=[0, 16]),
        "leaves a gap or overlaps",
    ),
    "record": (lambda h, d: h["__metadata__"].update(pocketllm="{"), "checksums in the header"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_header(folder: Path, case: str) -> None:
    change, message = HEADERS[case]
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


RECORDS = {
    "version": (lambda r: r.update(format_version=2), "format_version is 2, this pocketllm"),
    "key": (lambda r: r.update(more=1), "checksums in the header are damaged"),
    "value": (lambda r: r["crc32"].update({"norm.weight": "1234567"}), "checksums in the header"),
    "layout": (lambda r: r.update(layout="00000000"), "are not those the weight files"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_damaged_record(folder: Path, case: str) -> None:
    change, message = RECORDS[case]
    edit_record(folder, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_index_out_of_range(folder: Path) -> None:
    # 60 codewords in 6 bits: 63 is none of them.
    rewrite(folder, set_bytes("a.linear.weight", b"\x3f", at=4))
    resum(folder)
    with pytest.raises(CheckpointError, match="a.linear has the index 63, its codec table has 60"):
        open_checkpoint(folder)


def test_without_checksums_what_kernels_rely_on_is_checked(folder: Path) -> None:
    rewrite(folder, set_bytes("norm.weight", b"\x01", at=3))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    with pytest.raises(CheckpointError, match="checksum"):
        open_weights([folder / "model.safetensors"], config)
    open_weights([folder / "model.safetensors"], config, checksums=False)
    rewrite(folder, set_bytes("a.linear.weight", b"\x3f", at=4))
    with pytest.raises(CheckpointError, match="a.linear has the index 63"):
        open_weights([folder / "model.safetensors"], config, checksums=False)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("b.apart.columns", b"\x07", "gives columns other bits than config.json gives"),
        ("pocketllm_codecs.trellis.magnitude", b"\xff", "has magnitudes out of range"),
        ("pocketllm_codecs.trellis.magnitude_scale", b"\xff" * 4, "values that are NaN or Inf"),
    ],
)
def test_without_checksums_a_trellis_is_checked(
    folder: Path, name: str, value: bytes, message: str
) -> None:
    rewrite(folder, set_bytes(name, value))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    with pytest.raises(CheckpointError, match=f"tensor {name} .*{message}"):
        open_weights([folder / "model.safetensors"], config, checksums=False)


def test_bits_behind_a_row(folder: Path) -> None:
    # 5 indices of 6 bits leave 2 bits of a row's 4 bytes.
    rewrite(folder, set_bytes("a.linear.weight", b"\x80", at=3))
    resum(folder)
    with pytest.raises(CheckpointError, match="a.linear has bits set after the end of a row"):
        open_checkpoint(folder)


@pytest.mark.parametrize(("name", "at"), [("b.alike", 2), ("b.alike", 3 * 7 - 1), ("b.apart", 17)])
def test_bits_behind_a_plane(folder: Path, name: str, at: int) -> None:
    # 20 columns leave 4 bits of a plane's 3 bytes, 140 leave 4 of 18. The fourth row has 3 planes.
    rewrite(folder, set_bytes(f"{name}.weight", b"\x80", at=at))
    resum(folder)
    with pytest.raises(CheckpointError, match=f"{name} has bits set after the end of a row"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("at", "value", "accepted"),
    [(0, 63, True), (0, 64, False), (11, 64, False), (12, 127, True), (251, -1, False)],
)
def test_magnitudes_out_of_range(folder: Path, at: int, value: int, accepted: bool) -> None:
    """Those of 1 and 2 bits, the first 12, up to 63; the others up to 127."""
    name = "pocketllm_codecs.trellis.magnitude"
    rewrite(folder, set_bytes(name, np.int8(value).tobytes(), at=at))
    resum(folder)
    if accepted:
        assert open_checkpoint(folder).tensors[name].array()[at] == value
        return
    message = f"tensor {name} has magnitudes out of range, want 0 to 63 for up to 2 bits, to 127"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_negative_scale_of_magnitudes(folder: Path) -> None:
    name = "pocketllm_codecs.trellis.magnitude_scale"
    rewrite(folder, set_bytes(name, np.float32(-0.5).tobytes(), at=20))
    resum(folder)
    with pytest.raises(CheckpointError, match=f"tensor {name} has values below 0, want none"):
        open_checkpoint(folder)


@pytest.mark.parametrize("bits", [0, 2, 4, 7])
def test_columns_that_disagree_with_the_bits_of_blocks(folder: Path, bits: int) -> None:
    """128 columns have 3 bits, 12 have 1: another number of either is told, their order is free."""
    codes = open_checkpoint(folder).tensors["b.apart.columns"].array().copy()
    rewrite(folder, set_bytes("b.apart.columns", np.flip(codes).tobytes()))
    resum(folder)
    open_checkpoint(folder)
    rewrite(folder, set_bytes("b.apart.columns", bytes([int(codes[-1]) // 8 * 8 + bits])))
    resum(folder)
    message = "tensor b.apart.columns gives columns other bits than config.json gives their blocks"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a.linear.scale", np.float16("nan").tobytes()),
        ("a.shifted.shift", np.float16("inf").tobytes()),
        ("pocketllm_codecs.table.table_scale", np.float32("inf").tobytes()),
        ("pocketllm_codecs.trellis.magnitude_scale", np.float32("nan").tobytes()),
        ("pocketllm_codecs.half.table", np.float16("nan").tobytes()),
        ("pocketllm_codecs.decoded.codebook", np.float16("nan").tobytes()),
        ("pocketllm_codecs.decoded.decoder", np.float16("-inf").tobytes()),
    ],
)
def test_values_that_are_not_finite(folder: Path, name: str, value: bytes) -> None:
    rewrite(folder, set_bytes(name, value))
    resum(folder)
    with pytest.raises(CheckpointError, match=f"{name} has values that are NaN or Inf"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["embed.scale", "b.apart.scale", "b.alike.shift"])
@pytest.mark.parametrize("byte", [b"\0", b"\xf8"])
def test_base_exponent_out_of_range(folder: Path, name: str, byte: bytes) -> None:
    rewrite(folder, set_bytes(name, byte))
    resum(folder)
    with pytest.raises(CheckpointError, match=f"{name} starts with the exponent"):
        open_checkpoint(folder)


def test_files_of_two_checkpoints(tmp_path: Path) -> None:
    first = simple_checkpoint(tmp_path / "first", shard_bytes=600)
    other = simple_checkpoint(tmp_path / "other", shard_bytes=600, dense_tensors={})
    name = sorted(p.name for p in first.glob("*.safetensors"))[0]
    shutil.copy(sorted(other.glob("*.safetensors"))[0], first / name)
    with pytest.raises(CheckpointError, match="different checkpoints|is also in"):
        open_checkpoint(first)


INDEXES = {
    "no map": ("{}", "no weight_map"),
    "no json": ("{", "no weight_map"),
    "path": ('{"weight_map": {"a": "../model.safetensors"}}', "want a file name in the same"),
    "type": ('{"weight_map": {"a": 3}}', "want a file name|no weight_map"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_damaged_index(tmp_path: Path, case: str) -> None:
    folder = simple_checkpoint(tmp_path / "model", shard_bytes=300)
    text, message = INDEXES[case]
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


# ---- the writer's own checks ------------------------------------------------------------------


def test_output_exists(folder: Path) -> None:
    with pytest.raises(PocketError, match="already exists"):
        simple_checkpoint(folder)


def test_parent_missing(tmp_path: Path) -> None:
    with pytest.raises(PocketError, match="parent folder .* does not exist"):
        simple_checkpoint(tmp_path / "no" / "model")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_parent_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PocketError, match="is not writable"):
            simple_checkpoint(tmp_path / "model")
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*arguments: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint_write, "write_tensors", fail)
    with pytest.raises(PocketError, match=f"cannot be written: {os.strerror(code)}"):
        simple_checkpoint(tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_full_disk(tmp_path: Path) -> None:
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from compressed import simple_checkpoint
from pocketllm.errors import PocketError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    simple_checkpoint(Path({str(tmp_path / "model")!r}))
except PocketError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cannot be written: File too large" in result.stdout, result.stderr
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_after_an_interrupt(tmp_path: Path) -> None:
    def interrupt() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simple_checkpoint(
            tmp_path / "model", dense_tensors={"late": LazyTensor("F32", (3,), interrupt)}
        )
    assert os.listdir(tmp_path) == []


def test_folder_of_a_killed_run_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process.send_signal(signal.SIGKILL)
    process.wait()
    dead, alive = tmp_path / f"model.tmp-{process.pid}", tmp_path / "model.tmp-1"
    dead.mkdir()
    alive.mkdir()
    simple_checkpoint(tmp_path / "model")
    assert not dead.exists() and alive.exists()


def test_writer_checks_what_it_is_given(tmp_path: Path) -> None:
    codec = random_codec()
    good = random_module("m", (4, 8), codec, statistics="float16")
    cases = {
        "m.weight: got uint8 \\[4\\], want U8 \\[8\\]": ModuleData(
            good.spec, good.packed[:4], good.scale
        ),
        "m.scale: got float32": ModuleData(good.spec, good.packed, good.scale.astype(np.float32)),
        "m.scale: missing": ModuleData(good.spec, good.packed),
        "m.shift: not part of": ModuleData(good.spec, good.packed, good.scale, good.scale),
    }
    for message, module in cases.items():
        with pytest.raises(PocketError, match=message):
            simple_checkpoint(tmp_path / "model", modules=[module], codecs=[codec])
    coded = random_codec("t", storage="trellis")
    apart = random_module("m", (3, 140), coded, bits=(3, 1))
    for message, wrong in {
        "m.weight: got uint8 \\[149\\], want U8 \\[150\\]": {"packed": apart.packed[1:]},
        "m.columns: got uint8 \\[139\\]": {"columns": apart.columns[1:]},
        "m.columns: missing, want U8 \\[140\\]": {"columns": None},
        "m.weight: got uint8 \\[150\\], want U8 \\[108\\]": {
            "spec": dataclasses.replace(apart.spec, bits=2.0)
        },
        "module 'm': bits is \\[\\[1, 1\\], \\[3, 1\\]\\], want": {
            "spec": dataclasses.replace(apart.spec, bits=(1, 3)),
            "packed": np.zeros(3 * (18 + 2 * 16), np.uint8),
        },
    }.items():
        module = dataclasses.replace(apart, **wrong)
        with pytest.raises(PocketError, match=message):
            simple_checkpoint(tmp_path / "model", modules=[module], codecs=[coded])
    without = dataclasses.replace(apart, spec=dataclasses.replace(apart.spec, bits=None))
    with pytest.raises(PocketError, match="^module 'm': bits is None, want those of its trellis"):
        simple_checkpoint(tmp_path / "model", modules=[without], codecs=[coded])
    twice = {"m.weight": ArrayTensor(np.zeros(3, np.float32), "F32")}
    with pytest.raises(PocketError, match="both dense and compressed"):
        simple_checkpoint(tmp_path / "model", modules=[good], codecs=[codec], dense_tensors=twice)
    short = {"short": LazyTensor("F32", (3,), lambda: b"1234")}
    with pytest.raises(PocketError, match="short: got 4 bytes, want 12"):
        simple_checkpoint(tmp_path / "model", dense_tensors=short)
    lost = ModuleData(ModuleSpec("head", "tied", (4, 8), tied_to="nowhere"))
    with pytest.raises(PocketError, match="tied to 'nowhere'"):
        simple_checkpoint(tmp_path / "model", modules=[good, lost], codecs=[codec])
    assert os.listdir(tmp_path) == []


def test_empty_tensors(tmp_path: Path) -> None:
    empty = {"empty": ArrayTensor(np.zeros((0, 3), np.float32), "F32")}
    folder = simple_checkpoint(tmp_path / "model", dense_tensors=empty)
    assert open_checkpoint(folder).dense["empty"].shape == (0, 3)
