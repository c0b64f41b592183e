"""What the benchmarks share: timing by turns, the machine's FMA peak, tables and JSON.

Wall time is worth little on a busy machine, so contenders run in turns within one process, CPU
time is taken unless a contender waits for something else than the processor, and the minimum is
what counts.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import importlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pocketllm import kernels, trellis
from pocketllm.checkpoint import CodecData, CodecSpec, ModuleSpec, codec_view
from pocketllm.kernels import AnyView
from pocketllm.stored import largest_value, with_signs
from pocketllm.trellis_encode import fit_magnitudes

ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-DPLLM_ISA_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-DPLLM_ISA_AVX512",
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi", "-mavx512vnni"),
        *("-mbmi2", "-mavx2", "-mfma", "-mf16c"),
    ],
    "neon": ["-DPLLM_ISA_NEON"],
}
ISA_FLAGS["amx"] = ISA_FLAGS["avx512"]

# What blocks of columns have more or less than the bits of a matrix, in equal parts.
SPREAD = (2, 1, 1, 0, 0, -1, -1, -2)


class Codebook(NamedTuple):
    """A codebook shape, on the command line ``4x256``, or ``4x256s`` for one that is symmetric."""

    d: int
    codewords: int
    symmetric: bool = False

    def __str__(self) -> str:
        return f"{self.d}x{self.codewords}{'s' if self.symmetric else ''}"

    def codec(self, random: np.random.Generator) -> CodecData:
        """A table of about normal values: free int8 (K, d), or magnitudes with all their signs as
        compression has them."""
        rows = self.codewords >> (self.d if self.symmetric else 0)
        most = largest_value(self.d, self.symmetric)
        values = np.rint(random.standard_normal((rows, self.d)) * most / 3.5)
        values = np.clip(values, -most, most).astype(np.int8)
        table = with_signs(np.abs(values)) if self.symmetric else values
        spec = CodecSpec("codebook", self.d, self.codewords, 1, "input", "table-int8")
        return CodecData(spec, {"table": table, "table_scale": np.array([3.5 / most], np.float32)})

    def module(self, name: str, rows: int, columns: int) -> ModuleSpec:
        """A linear layer of this shape, with row scales in float16."""
        return ModuleSpec(name, "linear", (rows, columns), "codebook", dtype="bfloat16")


class Trellis(NamedTuple):
    """Trellis codes, on the command line ``t2.25``: bits of every weight; or ``t3c``: blocks of
    columns have bits of their own, as many on average, and columns random scales."""

    bits: float
    by_column: bool = False

    def __str__(self) -> str:
        return f"t{self.bits:g}{'c' if self.by_column else ''}"

    def codec(self, random: np.random.Generator) -> CodecData:
        """Levels that are fitted to normal values."""
        return CodecData(CodecSpec.trellis("trellis"), normal_levels())

    def module(self, name: str, rows: int, columns: int) -> ModuleSpec:
        """A linear layer of this kind, with row scales in float16."""
        bits: trellis.Bits = self.bits
        if self.by_column:
            count = trellis.block_count(columns)
            parts = (np.arange(count) + 0.5) * len(SPREAD) / count
            bits = tuple(int(self.bits) + SPREAD[int(part)] for part in parts)
        shape = (rows, columns)
        return ModuleSpec(name, "linear", shape, "trellis", dtype="bfloat16", bits=bits)


Shape = Codebook | Trellis


def parse_shape(text: str) -> Shape:
    """A shape from the command line."""
    if found := re.fullmatch(r"(\d+)x(\d+)(s?)", text):
        return Codebook(int(found[1]), int(found[2]), bool(found[3]))
    if found := re.fullmatch(r"t(\d(?:\.\d+)?)(c?)", text):
        bits, by_column = float(found[1]), bool(found[2])
        quarters = bits * trellis.QUARTERS
        if bits in (2, 3, 4) if by_column else 1 <= bits <= 6 and quarters.is_integer():
            return Trellis(bits, by_column)
    raise argparse.ArgumentTypeError(
        f"got {text!r}, want a codebook as in 4x256 or 4x256s, or bits of trellis codes: t1, t1.25,"
        " ... t6, or t2c, t3c, t4c"
    )


def parse_shapes(text: str) -> list[Shape]:
    """Several, with commas between."""
    return [parse_shape(shape) for shape in text.split(",")]


@functools.cache
def normal_levels() -> dict[str, np.ndarray]:
    """Levels of trellis codes, fitted to normal values of variance 1."""
    return fit_magnitudes(np.random.default_rng(0).standard_normal((1024, 64), np.float32))


def column_codes(module: ModuleSpec, random: np.random.Generator) -> np.ndarray | None:
    """Random ones where blocks have bits of their own, uint8 (columns,); else None."""
    if not isinstance(module.bits, tuple):
        return None
    columns = module.shape[1]
    bits = np.repeat(np.array(module.bits), trellis.BLOCK)[:columns]
    scale = random.integers(0, trellis.SCALE_CODES, columns)
    return trellis.column_codes(random.permutation(bits), scale)


def view_of(
    codec: CodecData, module: ModuleSpec, codes: np.ndarray | None, scale: np.ndarray
) -> tuple[AnyView, np.ndarray]:
    """What the kernels take of a matrix, and the row scales that go with it."""
    if module.bits is None:
        return codec_view(codec.spec, codec.parts), scale
    levels = codec.parts["magnitude"], codec.parts["magnitude_scale"]
    return trellis.view(*levels, module.bits, scale, module.shape[1], codes)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one contender over all its turns."""

    minimum: float
    median: float


def compare(
    contenders: Mapping[str, Callable[[], object]],
    *,
    turns: int = 5,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Timing]:
    """Time each contender `turns` times, in turns: a, b, c, a, b, c, ...

    clock: ``time.process_time`` counts the CPU seconds of all threads, ``time.perf_counter`` wall
    time. Callers check the results before; the first turn also warms caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, run in contenders.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: Timing(min(s), statistics.median(s)) for name, s in seconds.items()}


@functools.cache
def _peak_library(isa: str) -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="pocketllm-peak-"))
    target = folder / "peak.so"
    source = Path(__file__).with_name("peak.c")
    flags = ["-std=c11", "-O3", "-shared", "-fPIC", "-ffp-contract=off", *ISA_FLAGS[isa]]
    try:
        subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
        library = ctypes.CDLL(str(target))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    library.fma_chain.restype = ctypes.c_float
    library.fma_chain.argtypes = [ctypes.c_long]
    library.flops_per_round.restype = ctypes.c_long
    return library


def fma_peak(turns: int = 5) -> float | None:
    """float32 operations a second that one core reaches with the vectors in use, an FMA being two.

    Measured with independent chains of FMAs in registers; None without a C compiler.
    """
    library = _peak_library(kernels.isa())
    if library is None:
        return None
    rounds = 2_000_000
    chain = {"peak": lambda: library.fma_chain(rounds)}
    best = compare(chain, turns=turns, clock=time.thread_time)["peak"].minimum
    return library.flops_per_round() * rounds / best


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(*packages: str) -> dict[str, str]:
    """What a figure depends on: processor, instruction set, threads, versions."""
    found = {"cpu": _cpu_name(), "cores": str(os.cpu_count()), "kernels": kernels.show_config()}
    for package in ("numpy", *packages):
        try:
            found[package] = str(getattr(importlib.import_module(package), "__version__", "?"))
        except ImportError:
            continue
    return found


def print_machine(*packages: str) -> None:
    """One line on the machine, for the head of a table."""
    print("; ".join(f"{name}: {value}" for name, value in machine(*packages).items()))


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Rows as a Markdown table; numbers with three significant digits, missing ones as a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "–"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [[cell(row.get(column)) for column in columns] for row in rows]
    width = [max(len(x) for x in column) for column in zip(columns, *lines, strict=True)]
    for line in [list(columns), ["-" * w for w in width], *lines]:
        print("| " + " | ".join(x.rjust(w) for x, w in zip(line, width, strict=True)) + " |")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark understands."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the plots into DIR")
    return parser


def write_json(path: Path | None, benchmark: str, rows: object, *packages: str) -> None:
    """All figures of a run, with the machine; nothing when path is None."""
    if path is not None:
        content = {"benchmark": benchmark, "machine": machine(*packages), "rows": rows}
        path.write_text(json.dumps(content, indent=1) + "\n")


def llama_config(size: tuple[int, ...], **options: Any) -> Any:
    """A LlamaConfig in bfloat16 of (layers, hidden, intermediate, heads, kv heads, vocabulary)."""
    import torch
    from transformers import LlamaConfig

    layers, hidden, intermediate, heads, kv_heads, vocabulary = size
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        dtype=torch.bfloat16,
        **options,
    )
