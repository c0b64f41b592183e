"""Products of the passes over a calibration text: ours with rounded factors, and torch's.

    python benchmarks/rounded.py [--quick] [--threads N] [--json FILE]

`linear` is a window's tokens times a matrix, `moments` the second moments of a window's inputs, of
which ours are computed up to the diagonal and torch's in blocks of 1,024 rows up to it, as
calibration had them before. Both are compared with the product in float64 first; "error" is the
root of the mean squared error over that of the product, "bf16 error" the same with factors rounded
to bfloat16. With one thread times are processor time, else wall time. The share of the FMA peak, of
all threads, counts the multiply-adds of `linear`, and of `moments` half of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import arguments, compare, fma_peak, print_machine, print_table, write_json

from pocketllm import kernels
from pocketllm.calibrate import MOMENT_ROWS

# tokens, in, out; moments have no out
GRID = [(512, 2048, 2048), (512, 2048, 8192), (512, 8192, 2048), (512, 4096, 4096)]
GRID += [(128, 2048, 2048), (511, 2047, 2049), (512, 2048, None), (512, 8192, None)]
QUICK = [(64, 300, 200), (64, 300, None)]
COLUMNS = ["product", "tokens", "in", "out", "ms", "peak %", "fp32 x", "bf16 x"]
COLUMNS += ["error", "bf16 error"]


def linear(x: torch.Tensor, w: torch.Tensor) -> dict[str, Callable[[], np.ndarray]]:
    """Every contender."""
    short = x.bfloat16(), w.bfloat16()
    return {
        "ours": lambda: kernels.rounded_linear(x.numpy(), w.numpy()),
        "fp32": lambda: torch.nn.functional.linear(x, w).numpy(),
        "bf16": lambda: torch.nn.functional.linear(*short).float().numpy(),
    }


def moments(x: torch.Tensor) -> dict[str, Callable[[], np.ndarray]]:
    """The same for second moments of the columns of x (tokens, in)."""
    columns = x.T.contiguous()
    short = columns.bfloat16()
    sums = {name: torch.zeros(len(columns), len(columns)) for name in ("ours", "fp32", "bf16")}

    def blocks(name: str, x: torch.Tensor) -> np.ndarray:
        for first in range(0, len(x), MOMENT_ROWS):
            last = first + MOMENT_ROWS
            sums[name][first:last, :last] += x[first:last] @ x[:last].T
        return sums[name].numpy()

    def ours() -> np.ndarray:
        kernels.rounded_gram(columns.numpy(), sums["ours"].numpy())
        return sums["ours"].numpy()

    return {
        "ours": ours,
        "fp32": lambda: blocks("fp32", columns),
        "bf16": lambda: blocks("bf16", short),
    }


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative to the product, on and below the diagonal where that is all there is."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measure(shape: tuple[int, int, int | None], turns: int, threads: int) -> dict[str, Any]:
    """One row of the table."""
    tokens, width, out = shape
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.standard_t(5, (tokens, width)).astype(np.float32))
    if out is None:
        running = moments(x)
        exact = np.tril(x.double().T @ x.double())
        near = np.tril(x.bfloat16().double().T @ x.bfloat16().double())
    else:
        w = torch.from_numpy(random.standard_normal((out, width), np.float32) / width**0.5)
        running = linear(x, w)
        exact = (x.double() @ w.double().T).numpy()
        near = (x.bfloat16().double() @ w.bfloat16().double().T).numpy()
    ours, torchs = (np.tril(run()) if out is None else run() for run in list(running.values())[:2])
    found, bf16 = error(ours, exact), error(near, exact)
    if found > bf16 or error(torchs, exact) > 1e-5:
        raise AssertionError(f"{shape}: errors are {found:.2g} and {error(torchs, exact):.2g}")
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds = {n: t.minimum for n, t in compare(running, turns=turns, clock=clock).items()}
    peak = fma_peak(2)
    flops = tokens * width * (width if out is None else 2 * out)
    row: dict[str, Any] = {"product": "moments" if out is None else "linear"}
    row |= {"tokens": tokens, "in": width, "out": out, "ms": seconds["ours"] * 1e3}
    row["peak %"] = 100 * flops / seconds["ours"] / threads / peak if peak else None
    row |= {f"{name} x": seconds[name] / seconds["ours"] for name in ("fp32", "bf16")}
    return row | {"error": found, "bf16 error": bf16}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_machine("torch")
    shapes, turns = (QUICK, 1) if options.quick else (GRID, 7)
    rows = [measure(shape, turns, options.threads) for shape in shapes]
    print_table(rows, COLUMNS)
    write_json(options.json, "rounded", rows, "torch")


if __name__ == "__main__":
    main()
