"""A reader of compressed checkpoints written from docs/FORMAT.md alone: standard library and NumPy.

It shares no code with the package, on purpose: when both read a file alike, the document is
complete.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

ELEMENT = {"U8": "u1", "I8": "i1", "F16": "<f2", "F32": "<f4", "BF16": "<u2", "I64": "<i8"}


def read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Decoded matrices by module name (float64), and the dense tensors by tensor name (raw)."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "pocketllm" and quantization["format_version"] == 1
    raw, records = {}, set()
    for path in weight_paths(folder):
        header, data = read_safetensors(path)
        metadata = header.pop("__metadata__")
        assert metadata.keys() == {"format", "pocketllm"} and metadata["format"] == "pt"
        records.add(metadata["pocketllm"])
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            raw[name] = (entry["dtype"], entry["shape"], data[start:stop])
    (record,) = records
    check_sums(json.loads(record), raw, quantization)

    tensors = {
        name: np.frombuffer(data, ELEMENT[dtype]).reshape(shape)
        for name, (dtype, shape, data) in raw.items()
    }
    matrices: dict[str, np.ndarray] = {}
    used = set()
    for name, module in quantization["modules"].items():
        if module["kind"] == "tied":
            continue
        used |= {f"{name}.{part}" for part in ("weight", "scale", "shift", "columns")}
        matrices[name] = decode_module(name, module, quantization["codecs"], tensors)
    for name, module in quantization["modules"].items():
        if module["kind"] == "tied":
            matrices[name] = matrices[module["to"]]
    dense = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in used and not name.startswith("pocketllm_codecs.")
    }
    return matrices, dense


def weight_paths(folder: Path) -> list[Path]:
    """The weight files."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def check_sums(record: dict[str, Any], raw: dict[str, Any], quantization: dict[str, Any]) -> None:
    """Compare every checksum."""
    assert record["format_version"] == 1
    assert record["crc32"].keys() == raw.keys()
    for name, (dtype, shape, data) in raw.items():
        text = f"{name}\n{dtype}\n{','.join(map(str, shape))}\n".encode()
        assert f"{zlib.crc32(text + data):08x}" == record["crc32"][name], name
    layout = {key: quantization[key] for key in ("codecs", "modules")}
    text = json.dumps(layout, sort_keys=True, separators=(",", ":")).encode()
    assert f"{zlib.crc32(text):08x}" == record["layout"]


def decode_module(
    name: str, module: dict[str, Any], codecs: dict[str, Any], tensors: dict[str, np.ndarray]
) -> np.ndarray:
    """W of a module, float64."""
    codec = codecs[module["codec"]]
    rows, columns = module["shape"]
    if codec["storage"] == "trellis":
        return finished(name, module, trellis(name, module, tensors), tensors)
    d, bits = codec["subvector"], codec["index_bits"]
    assert bits == max(1, math.ceil(math.log2(codec["codebook"])))
    count = math.ceil(columns / d)
    stride = math.ceil(count * bits / 8)
    payload = bytes(tensors[f"{name}.weight"])
    assert len(payload) == rows * stride
    bank = f"pocketllm_codecs.{module['codec']}"
    result = np.empty((rows, columns))
    for row in range(rows):
        stream = int.from_bytes(payload[row * stride : (row + 1) * stride], "little")
        index = [(stream >> (item * bits)) & ((1 << bits) - 1) for item in range(count)]
        assert stream >> (count * bits) == 0 and max(index) < codec["codebook"]
        if codec["storage"] == "decoder":
            y = tensors[f"{bank}.codebook"].astype(np.float64)[index]
            values = decoder(y, tensors[f"{bank}.decoder"].astype(np.float64), codec)
        else:
            values = tensors[f"{bank}.table"].astype(np.float64)[index]
            if codec["storage"] == "table-int8":
                values = values * float(tensors[f"{bank}.table_scale"][0])
        result[row] = values.reshape(-1)[:columns]
    return finished(name, module, result, tensors)


def trellis(name: str, module: dict[str, Any], tensors: dict[str, np.ndarray]) -> np.ndarray:
    """What the bits of a module in trellis codes stand for, without row scales and shifts."""
    rows, columns = module["shape"]
    bank = f"pocketllm_codecs.{module['codec']}"
    magnitude = tensors[f"{bank}.magnitude"].tolist()
    step = tensors[f"{bank}.magnitude_scale"].tolist()
    order, factor = list(range(columns)), [1.0] * columns
    if isinstance(module["bits"], list):
        blocks = [bits for bits, count in module["bits"] for _ in range(count)]
        codes = tensors[f"{name}.columns"].tolist()
        order = sorted(range(columns), key=lambda column: -(codes[column] % 8))
        factor = [2 ** (-(codes[column] // 8) / 4) for column in order]
        richer = [0] * rows
        for at, column in enumerate(order):
            assert codes[column] % 8 == blocks[at // 128]
    else:
        quarters = int(4 * module["bits"])
        blocks = [quarters // 4] * math.ceil(columns / 128)
        extra = quarters % 4
        richer = [(r + 1) * extra // 4 - r * extra // 4 for r in range(rows)]
    payload = bytes(tensors[f"{name}.weight"])
    symbols, at = [], 0
    for row in range(rows):
        k = [blocks[c // 128] + (richer[row] if blocks[c // 128] else 0) for c in range(columns)]
        line = [0] * columns
        for plane in range(6):
            count = sum(bits > plane for bits in k)
            stream = int.from_bytes(payload[at : at + math.ceil(count / 8)], "little")
            at += math.ceil(count / 8)
            assert stream >> count == 0
            for c in range(count):
                line[c] |= (stream >> c & 1) << plane
        symbols.append((k, line))
    assert at == len(payload)
    result = np.zeros((rows, columns))
    segments = max(1, rows // 256)
    for row, (k, line) in enumerate(symbols):
        segment = min(row // 256, segments - 1)
        first = 256 * segment
        size = (rows if segment == segments - 1 else first + 256) - first
        for c in range(columns):
            if k[c] == 0:
                continue
            window = []
            for i in range(9):
                before = row - i
                if before < first and size >= 16:
                    before += size
                window.append(symbols[before][1][c] & 1 if before >= first else 0)
            index = line[c] // 2 * 8
            index += window[3] ^ window[4] ^ window[7]
            index += 2 * (window[1] ^ window[2] ^ window[4] ^ window[6])
            index += 4 * (window[0] ^ window[4] ^ window[5] ^ window[7] ^ window[8])
            half = 2 ** (k[c] + 1)
            m = magnitude[half - 4 : 2 * half - 4]
            level = m[index] if index < half else -m[2 * half - 1 - index]
            result[row, order[c]] = level * step[k[c] - 1] * factor[c]
    return result


def finished(
    name: str, module: dict[str, Any], result: np.ndarray, tensors: dict[str, np.ndarray]
) -> np.ndarray:
    """Values with their row scales and shifts."""
    if module["scale"]:
        result *= statistics(module, tensors[f"{name}.scale"], signed=False)[:, None]
    if module["shift"]:
        result += statistics(module, tensors[f"{name}.shift"], signed=True)[:, None]
    return result


def statistics(module: dict[str, Any], stored: np.ndarray, *, signed: bool) -> np.ndarray:
    """Row scales or shifts, float64."""
    if module.get("statistics", "float16") == "float16":
        return stored.astype(np.float64)
    exponent, *codes = (int(byte) for byte in stored)
    assert 1 <= exponent <= (247 if signed else 239)
    values = []
    for code in codes:
        size = code % 128 if signed else code
        value = 2.0 ** (exponent - 127 + size // 16) * (1 + size % 16 / 16) if size else 0.0
        values.append(-value if signed and code >= 128 else value)
    return np.array(values)


def decoder(y: np.ndarray, parameters: np.ndarray, codec: dict[str, Any]) -> np.ndarray:
    """Sub-vectors (L, d) of one row from its codewords."""
    h, d = codec["hidden"], codec["subvector"]

    def mlp(number: int, x: np.ndarray) -> np.ndarray:
        w = parameters[number * (2 * h * d + h + d) :]
        w1, b1 = w[: h * d].reshape(h, d), w[h * d : h * d + h]
        w = w[h * d + h :]
        w2, b2 = w[: d * h].reshape(d, h), w[d * h : d * h + d]
        t = x @ w1.T + b1
        gelu = t * (1 + np.vectorize(math.erf)(t / math.sqrt(2))) / 2
        return gelu @ w2.T + b2

    def norm(x: np.ndarray) -> np.ndarray:
        if codec["norm"] == "input":
            return x
        axis = None if codec["norm"] == "rln" else 1
        mean = x.mean(axis, keepdims=True)
        return (x - mean) / np.sqrt(x.var(axis, keepdims=True) + 1e-5)

    y1 = y + mlp(1, norm(y))
    y2 = norm(y1 + mlp(2, norm(y1)))
    return mlp(0, y2)
