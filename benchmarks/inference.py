"""Products with compressed matrices beside the dense ones a user would otherwise run.

    python benchmarks/inference.py [--threads 1] [--sizes 4096x4096,11008x4096]
                                   [--tokens 1,4,16,128] [--shapes 4x256,4x256s,t2.25,t3c]
                                   [--json FILE] [--plots DIR] [--quick]

For every shape and number of tokens: milliseconds with activations as integers and as float32, and
how often faster than torch's bfloat16 and float32 linear on the same activations; for the sizes
behind the first (rows x columns) of some shapes only. A shape is a codebook (d x K, an int8 table;
s: with all signs) or a number of bits of trellis codes (t3), on average where blocks of columns
have bits of their own (t3c). Weights are cold: the contenders take turns, and each cycles through
several copies that together exceed the last-level cache. With one thread times are processor time,
else wall time; the minimum of many. Before anything is timed, products are compared with those in
float64.

Also measured in the same run: what reading memory costs, how fast torch multiplies large float32
matrices, what one call of a PocketLinear costs beside its kernel, and one token's cost a weight for
sizes that are odd or even.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    Codebook,
    Shape,
    Trellis,
    arguments,
    column_codes,
    compare,
    parse_shape,
    parse_shapes,
    print_machine,
    print_table,
    view_of,
    write_json,
)
from torch.nn import functional

from pocketllm import kernels
from pocketllm.kernels import TrellisView
from pocketllm.linear import CodecBank, PocketLinear

# What allocation may choose, coarsest first, then those with all signs (s) and shapes that only a
# user asks for; and trellis codes.
SHAPES = [
    *parse_shapes("8x16,8x32,8x64,8x128"),
    *parse_shapes("4x16,4x32,4x64,4x128,4x256,4x512,4x1024,4x2048,4x4096"),
    *parse_shapes("2x16,2x32,2x64,2x128,2x256,2x512,2x1024,2x2048,2x4096"),
    *parse_shapes("1x16,1x32,1x64,1x128,1x256"),
    *parse_shapes("4x128s,4x256s,2x64s,2x128s,2x256s,1x32s,1x64s,1x128s,1x256s"),
    *parse_shapes("8x4096,8x65536,6x4096,3x512"),
    *parse_shapes("t1,t1.5,t2,t2.25,t2.5,t3,t3.5,t4,t5,t6,t3c"),
]
MAIN = parse_shapes("4x256,4x256s,2x64,2x64s,4x4096,8x65536,t2,t3,t4")
CALLED = parse_shapes("4x256,t3")
BY_SIZE = parse_shapes("4x256,4x256s,4x4096,t2,t3")
QUICK = parse_shapes("8x32,4x40,4x256,4x256s,4x4096,2x512,1x256,3x100,t3,t2.25,t3c")
COLD_BYTES = 48 << 20
# Rows x columns whose cost a weight should be alike.
ODD_SIZES = [(rows, 4096) for rows in (511, 512, 1000, 1024, 2047, 2048, 4095, 4096, 8192)]
ODD_SIZES += [(4096, n) for n in (511, 512, 513, 1000, 1024, 2047, 2048, 2049, 4095, 4097, 8192)]
COLUMNS = [
    "shape",
    "rows",
    "columns",
    "tokens",
    "d",
    "K",
    "signs",
    "bits",
    "ms",
    "float32 ms",
    "x bf16",
    "x fp32",
]


def aligned(payload: np.ndarray) -> np.ndarray:
    """Where files have it: at a multiple of 64 bytes."""
    room = np.empty(len(payload) + 63, np.uint8)
    first = -room.ctypes.data % 64
    room[first : first + len(payload)] = payload
    return room[first : first + len(payload)]


class Packed:
    """Copies of a random compressed matrix, used in turn."""

    def __init__(self, rows: int, columns: int, shape: Shape, cold: int) -> None:
        random = np.random.default_rng([rows, columns])
        self.shape, self.rows, self.columns = shape, rows, columns
        codec, module = shape.codec(random), shape.module("", rows, columns)
        size = module.payload_bytes(codec.spec)
        self.bits = 8 * size / (rows * columns)
        scale = random.uniform(0.5, 1.5, rows).astype(np.float32)
        self.codec, self.scale = view_of(codec, module, column_codes(module, random), scale)
        count = max(2, min(16, cold // size))
        self.turn = itertools.count()
        self.copies = [aligned(random.integers(0, 256, size, dtype=np.uint8)) for _ in range(count)]

    def product(self, x: np.ndarray, activations: str) -> np.ndarray:
        """x times the next of the copies."""
        packed = self.copies[next(self.turn) % len(self.copies)]
        return kernels.matmul(x, packed, self.rows, self.codec, self.scale, activations=activations)

    def check(self, x: np.ndarray) -> None:
        """Compare both forms with the product in float64, over the first and last rows."""
        part = min(self.rows, 128)
        for first in (0, self.rows - part):
            packed = self.copies[0]
            weight = kernels.decode_rows(
                packed, self.columns, first, part, self.codec, self.scale
            ).astype(np.float64)
            want, size = x @ weight.T, np.abs(x) @ np.abs(weight).T
            rounded = 1e-6 * size + self.rounding(x, weight)
            for activations, bound in (("float32", 1e-6 * size), ("integer", rounded)):
                product = kernels.matmul(
                    x, packed, self.rows, self.codec, self.scale, activations=activations
                )
                error = np.abs(product[:, first : first + part] - want)
                assert np.all(error <= bound), (self.shape, activations, error.max())

    def rounding(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """What rounding activations to integers may add to products with these rows, at most."""
        if isinstance(self.codec, TrellisView) and self.codec.order is not None:
            # Values as they are stored are multiplied by activations times the columns' factors.
            order, factor = self.codec.order, self.codec.factor
            x = x[:, order] * factor
            ones = np.where(factor > 0, factor, 1)  # columns without bits have the factor 0
            weight = weight[:, order] / ones
        x = np.abs(x)
        half_step = np.broadcast_to(x.max(1, keepdims=True) / 65000, x.shape)
        if self.has_bytes:
            blocks = np.maximum.reduceat(x, np.arange(0, self.columns, 32), axis=1)
            half_step = half_step + np.repeat(blocks / 254, 32, axis=1)[:, : self.columns]
        return half_step @ np.abs(weight).T

    @property
    def has_bytes(self) -> bool:
        """Are activations bytes, with a step for each 32 columns, or int16?"""
        shape = self.shape
        return isinstance(shape, Trellis) or (shape.d in (1, 2, 4) and shape.codewords <= 256)


def described(shape: Shape) -> dict[str, Any]:
    """Columns of a table; trellis codes have no d and K."""
    row: dict[str, Any] = {"shape": str(shape), "d": None, "K": None, "signs": ""}
    if isinstance(shape, Codebook):
        row |= {"d": shape.d, "K": shape.codewords, "signs": "all" if shape.symmetric else ""}
    return row


def family(shape: Shape) -> str:
    """Those that make a line of a plot."""
    if isinstance(shape, Trellis):
        return f"trellis codes{', bits by column' if shape.by_column else ''}"
    return f"d = {shape.d}{', all signs' if shape.symmetric else ''}"


def measure(
    size: tuple[int, int],
    shapes: list[Shape],
    tokens: list[int],
    turns: int,
    cold: int,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """One row for each number of tokens and shape."""
    rows, columns = size
    dense = [torch.randn(rows, columns) for _ in range(max(2, cold // (4 * rows * columns)))]
    half = [w.bfloat16() for w in dense] + [torch.randn(rows, columns).bfloat16() for w in dense]
    matrices = [Packed(rows, columns, shape, cold) for shape in shapes]
    found = []
    for n in tokens:
        x = torch.randn(n, columns)
        half_x = x.bfloat16()
        narrow, wide = itertools.cycle(half), itertools.cycle(dense)
        for matrix in matrices:
            matrix.check(x[:3].numpy())
        contenders: dict[Any, Callable[[], object]] = {
            "bf16": lambda x=half_x, w=narrow: functional.linear(x, next(w)),
            "fp32": lambda x=x, w=wide: functional.linear(x, next(w)),
        }
        for i, matrix in enumerate(matrices):
            for form in ("integer", "float32"):
                contenders[i, form] = functools.partial(matrix.product, x.numpy(), activations=form)
        taken = compare(contenders, turns=max(3, turns // max(1, n // 4)), clock=clock)
        best = {name: 1e3 * timing.minimum for name, timing in taken.items()}
        for i, matrix in enumerate(matrices):
            row = described(matrix.shape)
            row |= {"rows": rows, "columns": columns, "tokens": n}
            row |= {"bits": matrix.bits, "ms": best[i, "integer"]}
            row |= {"float32 ms": best[i, "float32"], "bf16 ms": best["bf16"]}
            row |= {"fp32 ms": best["fp32"]}
            for kind in ("bf16", "fp32"):
                row[f"x {kind}"] = best[kind] / best[i, "integer"]
            found.append(row)
    return found


def scaling(
    sizes: list[tuple[int, int]], turns: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Picoseconds a weight of one token, by rows and columns; all sizes take turns."""
    random = np.random.default_rng(0)
    calls, matrices = {}, []
    for rows, columns in sizes:
        x = random.standard_normal((1, columns), np.float32)
        for shape in BY_SIZE:
            matrix = Packed(rows, columns, shape, 0)
            calls[len(matrices)] = functools.partial(matrix.product, x, activations="integer")
            matrices.append(matrix)
    found = []
    for i, timing in compare(calls, turns=turns, clock=clock).items():
        matrix = matrices[i]
        row = described(matrix.shape) | {"rows": matrix.rows, "columns": matrix.columns}
        cost = 1e12 * timing.minimum / (matrix.rows * matrix.columns)
        found.append(row | {"ps a weight": cost})
    return found


def limits(clock: Callable[[], float], quick: bool) -> dict[str, float]:
    """What the machine can do: GB/s read from memory, GFLOP/s of a float32 product."""
    size = 256 if quick else 1024
    big = np.ones((8 if quick else 64) << 17, np.float64)
    square = torch.randn(size, size)
    best = compare({"read": big.max, "fma": lambda: square @ square}, turns=12, clock=clock)
    return {
        "memory read, GB/s": big.nbytes / best["read"].minimum / 1e9,
        "torch float32, GFLOP/s": 2 * size**3 / best["fma"].minimum / 1e9,
    }


def small_linear(shape: Shape) -> PocketLinear:
    """A compressed layer of four outputs and sixteen inputs."""
    codec, module = shape.codec(np.random.default_rng(0)), shape.module("", 4, 16)
    stored = CodecBank([codec.spec])[codec.spec.name]
    for name, part in codec.parts.items():
        getattr(stored, name).copy_(torch.from_numpy(part))
    linear = PocketLinear(16, 4, stored, scale=False, bits=module.bits)
    linear.weight.zero_()
    return linear


def call_overhead(clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Microseconds of one call on a matrix too small to take time itself."""
    linears = {f"PocketLinear {shape}": small_linear(shape) for shape in CALLED}
    calls = 500

    def many(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                module(x)

        return run

    found = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.zeros(1, 1, 16, dtype=dtype)
            dense = torch.nn.Linear(16, 4, False, dtype=dtype)
            contenders = {name: many(linear.to(dtype), x) for name, linear in linears.items()}
            contenders["nn.Linear"] = many(dense, x)
            best = compare(contenders, turns=12, clock=clock)
            row: dict[str, Any] = {"activations": str(dtype).removeprefix("torch.")}
            found.append(row | {f"{k}, us": 1e6 * v.minimum / calls for k, v in best.items()})
    return found


def plot(rows: list[dict[str, Any]], odd: list[dict[str, Any]], folder: Path) -> None:
    """Cost of one token by shape, by rows and by columns."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    first = [r for r in rows if r["tokens"] == 1 and r["rows"] == rows[0]["rows"]]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in first:
        lines.setdefault(family(parse_shape(row["shape"])), []).append(row)
    for name, line in lines.items():
        line.sort(key=lambda r: r["bits"])
        axes[0].plot([r["bits"] for r in line], [r["x bf16"] for r in line], "o-", label=name)
    axes[0].set(xlabel="bits per weight", ylabel="times torch bf16, one token")
    axes[0].axhline(1, color="black", linewidth=0.8)
    for axis, key, other in ((axes[1], "rows", "columns"), (axes[2], "columns", "rows")):
        for shape in BY_SIZE:
            line = [r for r in odd if r["shape"] == str(shape) and r[other] == 4096]
            line.sort(key=lambda r: r[key])
            own = f"{shape.bits:g} bits" if isinstance(shape, Trellis) else f"K = {shape.codewords}"
            name = f"{family(shape)}, {own}"
            axis.plot([r[key] for r in line], [r["ps a weight"] for r in line], "o-", label=name)
        axis.set(xlabel=key, ylabel="ps a weight, one token", ylim=(0, None))
    for axis in axes:
        axis.legend()
    figure.savefig(folder / "inference.png", dpi=120)


def pairs(text: str) -> list[tuple[int, int]]:
    """``4x256,8x65536`` as pairs."""
    split = [tuple(map(int, pair.split("x"))) for pair in text.split(",")]
    return [(a, b) for a, b in split]


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", type=pairs, default=pairs("4096x4096,11008x4096"))
    parser.add_argument("--tokens", default="1,4,16,128")
    parser.add_argument(
        "--shapes",
        type=parse_shapes,
        default=SHAPES,
        help="as in 4x256,4x256s,t2.25,t3c; s: with all signs, c: bits by column",
    )
    parser.add_argument("--turns", type=int, default=40, help="for one token; fewer for more")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    sizes, shapes, cold = options.sizes, options.shapes, COLD_BYTES
    tokens, odd_sizes = [int(n) for n in options.tokens.split(",")], ODD_SIZES
    if options.quick:
        sizes, shapes, cold, tokens = [(120, 200)], QUICK, 1 << 16, [1, 5]
        odd_sizes = [(30, 70)]
    print_machine("torch")
    report: dict[str, Any] = {"limits": limits(clock, options.quick)}
    print({name: round(value, 1) for name, value in report["limits"].items()})
    report["call"] = call_overhead(clock)
    print_table(report["call"], list(report["call"][0]))
    report["products"] = []
    for i, size in enumerate(sizes):
        here = shapes if i == 0 else [shape for shape in shapes if shape in MAIN]
        rows = measure(size, here, tokens, options.turns, cold, clock)
        print_table(rows, COLUMNS)
        report["products"] += rows
    report["scaling"] = scaling(odd_sizes, options.turns, clock)
    print_table(report["scaling"], list(report["scaling"][0]))
    if options.plots:
        plot(report["products"], report["scaling"], options.plots)
    write_json(options.json, "inference", report, "torch")


if __name__ == "__main__":
    main()
