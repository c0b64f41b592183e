"""Products with compressed matrices beside the dense ones a user would otherwise run.

    python benchmarks/inference.py [--threads 1] [--rows 4096 --columns 4096] [--tokens 1,4,16,128]
                                   [--shapes 4x256,4x4096] [--json FILE] [--quick]

For every codebook shape (d x K, int8 tables) and number of tokens: milliseconds with activations
as int16 and as float32, and how often faster than torch's bfloat16 and float32 linear on the same
activations. Weights are cold: the contenders take turns, and each cycles through several copies
that together exceed the last-level cache. With one thread times are processor time, else wall time;
the minimum of many. Before anything is timed, products are compared with those in float64.

Also measured in the same run: what reading memory costs, how fast torch multiplies large float32
matrices, and what one call of a PocketLinear costs beside its kernel.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from pocketllm import kernels
from pocketllm.kernels import CodecView
from pocketllm.linear import CodecBank, PocketLinear
from pocketllm.schema import CodecSpec, index_bits, row_stride_bytes

# What allocation may choose, coarsest first, then shapes that only a user asks for.
SHAPES = [
    *((8, 16), (8, 32), (8, 64), (8, 128)),
    *((4, 16), (4, 32), (4, 64), (4, 128), (4, 256), (4, 512), (4, 1024), (4, 2048), (4, 4096)),
    *((2, 128), (2, 256), (2, 512), (2, 1024), (2, 2048), (2, 4096)),
    *((1, 128), (1, 256)),
    *((8, 4096), (8, 65536), (6, 4096), (3, 512)),
]
QUICK = [(8, 32), (4, 256), (4, 4096), (2, 512), (1, 256), (3, 100)]
COLD_BYTES = 48 << 20


class Packed:
    """Copies of a random compressed matrix, used in turn."""

    def __init__(self, rows: int, columns: int, shape: tuple[int, int], cold: int) -> None:
        subvector, codewords = shape
        random = np.random.default_rng([rows, columns, *shape])
        self.shape, self.rows, self.columns = shape, rows, columns
        bits = index_bits(codewords)
        size = rows * row_stride_bytes(columns, subvector, bits)
        self.bits = 8 * size / (rows * columns)
        table = random.integers(-127, 128, (codewords, subvector)).astype(np.int8)
        self.codec = CodecView(subvector, codewords, bits, table, 0.01)
        self.scale = random.uniform(0.5, 1.5, rows).astype(np.float32)
        count = max(2, min(16, cold // size))
        self.copies = [random.integers(0, 256, size, dtype=np.uint8) for _ in range(count)]

    def product(self, x: np.ndarray, turn: int, activations: str) -> np.ndarray:
        """x times one of the copies."""
        packed = self.copies[turn % len(self.copies)]
        return kernels.matmul(x, packed, self.rows, self.codec, self.scale, activations=activations)

    def check(self, x: np.ndarray) -> None:
        """Compare both forms with the product in float64, over the first and last rows."""
        part = min(self.rows, 128)
        for first in (0, self.rows - part):
            weight = kernels.decode_rows(
                self.copies[0], self.columns, first, part, self.codec, self.scale
            ).astype(np.float64)
            want, size = x @ weight.T, np.abs(x) @ np.abs(weight).T
            step = np.abs(x).max(1, keepdims=True) / 65500 * np.abs(weight).sum(1)
            for activations, bound in (("float32", 1e-6 * size), ("int16", 1e-6 * size + step)):
                product = self.product(x, 0, activations=activations)[:, first : first + part]
                error = np.abs(product - want)
                assert np.all(error <= bound), (self.shape, activations, error.max())


def timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Milliseconds."""
    start = clock()
    call()
    return 1e3 * (clock() - start)


def alternate(
    contenders: dict[Any, Callable[[int], object]], rounds: int, clock: Callable[[], float]
) -> dict[Any, float]:
    """The minimum of each contender's times, which take turns."""
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(rounds):
        for name, call in contenders.items():
            best[name] = min(best[name], timed(lambda call=call, turn=turn: call(turn), clock))
    return best


def measure(
    rows: int,
    columns: int,
    shapes: list[tuple[int, int]],
    tokens: list[int],
    rounds: int,
    cold: int,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """One record for each number of tokens and shape."""
    dense = [torch.randn(rows, columns) for _ in range(max(2, cold // (4 * rows * columns)))]
    half = [w.bfloat16() for w in dense] + [torch.randn(rows, columns).bfloat16() for w in dense]
    matrices = [Packed(rows, columns, shape, cold) for shape in shapes]
    records = []
    for n in tokens:
        x = torch.randn(n, columns)
        values, narrow = x.numpy(), x.bfloat16()
        for matrix in matrices:
            matrix.check(values[:3])
        contenders: dict[Any, Callable[[int], object]] = {
            "bf16": lambda turn, x=narrow: functional.linear(x, half[turn % len(half)]),
            "fp32": lambda turn, x=x: functional.linear(x, dense[turn % len(dense)]),
        }
        for i, matrix in enumerate(matrices):
            for form in ("int16", "float32"):
                contenders[i, form] = functools.partial(matrix.product, values, activations=form)
        best = alternate(contenders, max(3, rounds // max(1, n // 4)), clock)
        for i, matrix in enumerate(matrices):
            fast = best[i, "int16"]
            records.append(
                {
                    "rows": rows,
                    "columns": columns,
                    "tokens": n,
                    "subvector": matrix.shape[0],
                    "codewords": matrix.shape[1],
                    "bits": matrix.bits,
                    "ms": fast,
                    "ms_float32": best[i, "float32"],
                    "ms_bf16": best["bf16"],
                    "ms_fp32": best["fp32"],
                    "times_bf16": best["bf16"] / fast,
                    "times_fp32": best["fp32"] / fast,
                    "ns_per_index": 1e6 * fast * matrix.shape[0] / (rows * columns * n),
                }
            )
    return records


def limits(clock: Callable[[], float], quick: bool) -> dict[str, float]:
    """What the machine can do: GB/s read from memory, GFLOP/s of a float32 product."""
    size = 256 if quick else 1024
    big = np.ones((8 if quick else 64) << 17, np.float64)
    square = torch.randn(size, size)
    best = alternate(
        {"read": lambda turn: big.max(), "fma": lambda turn: square @ square}, 12, clock
    )
    return {
        "read_gb_per_s": big.nbytes / best["read"] / 1e6,
        "float32_gflop_per_s": 2 * size**3 / best["fma"] / 1e6,
    }


def call_overhead(clock: Callable[[], float]) -> dict[str, float]:
    """Microseconds of one call on a matrix too small to take time itself."""
    spec = CodecSpec("c", 4, 256, 1, "input", "table-int8")
    bank = CodecBank([spec])
    bank["c"].table.zero_()
    bank["c"].table_scale.fill_(1.0)
    linear = PocketLinear(16, 4, bank["c"], scale=False)
    linear.weight.zero_()
    result = {}
    with torch.inference_mode():
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            x, dense = (
                torch.zeros(1, 1, 16, dtype=dtype),
                torch.nn.Linear(16, 4, False, dtype=dtype),
            )
            packed = linear.to(dtype)

            def many(module: torch.nn.Module, x: torch.Tensor = x) -> None:
                for _ in range(500):
                    module(x)

            best = alternate(
                {
                    "pocket": lambda turn, m=packed: many(m),
                    "torch": lambda turn, m=dense: many(m),
                },
                12,
                clock,
            )
            result.update({f"{k}_{name}_us": v * 2 for k, v in best.items()})
    return result


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    lines = []
    for n in dict.fromkeys(r["tokens"] for r in records):
        here = [r for r in records if r["tokens"] == n]
        first = here[0]
        lines += [
            f"\n{first['rows']} x {first['columns']}, {n} token{'s' * (n > 1)}; torch bf16 "
            f"{first['ms_bf16']:.2f} ms, fp32 {first['ms_fp32']:.2f} ms\n",
            "| d | K | bits | ms | float32 ms | x bf16 | x fp32 | ns an index |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['subvector']} | {r['codewords']} | {r['bits']:.2f} | {r['ms']:.2f} "
            f"| {r['ms_float32']:.2f} | {r['times_bf16']:.2f} | {r['times_fp32']:.2f} "
            f"| {r['ns_per_index']:.2f} |"
            for r in here
        ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Products with compressed matrices.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--tokens", default="1,4,16,128")
    parser.add_argument("--shapes", help="as in 4x256,8x65536")
    parser.add_argument("--rounds", type=int, default=40, help="for one token; fewer for more")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="seconds; proves only that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    shapes = QUICK if options.quick else SHAPES
    if options.shapes:
        shapes = [tuple(map(int, s.split("x", 1))) for s in options.shapes.split(",")]
    tokens = [1, 5] if options.quick else [int(n) for n in options.tokens.split(",")]
    size = (120, 200) if options.quick else (options.rows, options.columns)
    cold = 1 << 16 if options.quick else COLD_BYTES
    report = {
        "machine": platform.processor() or platform.machine(),
        "kernels": kernels.show_config(),
        "torch": torch.__version__,
        "clock": "processor" if options.threads == 1 else "wall",
        "limits": limits(clock, options.quick),
        "call": call_overhead(clock),
        "products": measure(*size, shapes, tokens, options.rounds, cold, clock),
    }
    print(f"{report['kernels']}; torch {report['torch']}; {report['clock']} time")
    print({**report["limits"], **report["call"]})
    print(table(report["products"]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
