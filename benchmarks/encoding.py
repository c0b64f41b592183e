"""Choosing codewords with error feedback, against PyTorch and a pass of the calibration.

    python benchmarks/encoding.py [--quick] [--threads N] [--json FILE]

`C` is what `pocketllm compress --calibration` runs on a matrix: a first choice along each row, then
two more given all others. `torch` is the same with PyTorch's products and argmin, in blocks of 128
columns. `of a pass` is C's time as a part of what the product of the matrix with 65,536 tokens
takes, the default calibration text, in the precision of the calibration. Before anything is timed,
errors under second moments must be those of the NumPy reference (one row) and of PyTorch (all; what
rounds differently chooses differently now and then). With one thread times are processor time, else
wall time; the share of the FMA peak, of all threads, counts the products with the feedback matrix
alone.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from common import arguments, compare, fma_peak, print_machine, print_table, write_json

from pocketllm import kernels, reference
from pocketllm.config import PocketConfig
from pocketllm.encode import AGAIN, Factors, factorise
from pocketllm.kmeans import kmeans
from pocketllm.planning import WINDOW
from pocketllm.precision import bfloat16_factors, linear_dtype

# d, K
GRID = [(1, 16), (2, 64), (2, 256), (4, 256), (4, 1024), (4, 2048), (4, 4096), (8, 4096)]
QUICK = [(4, 2048)]
COLUMNS = ["d", "K", "ns a weight", "products, peak %", "torch x", "of a pass"]
BLOCK = 128
TOKENS = PocketConfig.calibration_windows * WINDOW
SOME_TOKENS = 2048


def problem(
    d: int, codewords: int, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Factors]:
    """Rows with tails, as they are encoded, a codebook of theirs, H and its factors."""
    random = np.random.default_rng(0)
    rows, columns = shape
    mix = np.eye(columns) + 0.3 * random.standard_normal((columns, columns)) / columns**0.5
    inputs = random.standard_normal((2 * columns, columns)) * np.exp(
        0.5 * random.standard_normal(columns)
    )
    inputs = (inputs @ mix).astype(np.float32)
    h = inputs.T @ inputs / len(inputs)
    factors = factorise(h, d)
    values = random.standard_t(5, (rows, columns // d, d)).astype(np.float32)
    table = kmeans(values.reshape(-1, d), codewords, iterations=3).codebook
    order = (factors.order[:, None] * d + np.arange(d)).ravel()
    return values.reshape(rows, columns), table, h[order][:, order], factors


def in_c(x: np.ndarray, table: np.ndarray, factors: Factors, of: Any = kernels) -> np.ndarray:
    """All choices, by the kernels or by the reference."""
    found = of.encode_feedback(x, table, factors.metric, factors.feedback)
    fixed = factors.fixed_metric, factors.fixed_feedback
    return np.asarray(of.encode_feedback(x, table, *fixed, found, AGAIN))


class InTorch:
    """The same in PyTorch."""

    def __init__(self, x: np.ndarray, table: np.ndarray) -> None:
        self.x, self.table = torch.from_numpy(x), torch.from_numpy(table)
        self.d = table.shape[1]
        self.count = x.shape[1] // self.d
        self.index = torch.zeros(len(x), self.count, dtype=torch.long)

    def sweep(
        self,
        metric: torch.Tensor | None,
        feedback: torch.Tensor,
        other: torch.Tensor | None,
        *,
        back: bool,
    ) -> torch.Tensor:
        """One way through all sub-vectors; chooses where there is a metric. The sums of errors."""
        d, total = self.d, torch.zeros_like(self.x)
        places = torch.arange(self.count)
        for block in (places.flip(0) if back else places).split(BLOCK // d):
            columns = (block[:, None] * d + torch.arange(d)).flatten()
            errors = torch.zeros(len(self.x), len(columns))
            for i, place in enumerate(block.tolist()):
                own = slice(place * d, place * d + d)
                total[:, own] += errors[:, : i * d] @ feedback[columns[: i * d], own]
                if metric is not None:
                    target = self.x[:, own] + total[:, own]
                    target = target if other is None else target + other[:, own]
                    self.index[:, place] = self.nearest(target, metric[place])
                errors[:, i * d : i * d + d] = self.x[:, own] - self.table[self.index[:, place]]
            first, last = int(columns.min()), int(columns.max()) + 1
            ahead = slice(0, first) if back else slice(last, None)
            total[:, ahead] += errors @ feedback[columns, ahead]
        return total

    def nearest(self, target: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        """Of each row, under the metric."""
        offset = (self.table @ metric * self.table).sum(1) / 2
        return torch.addmm(offset, target @ metric, self.table.T, alpha=-1).argmin(1)

    def run(self, factors: Factors) -> np.ndarray:
        """All choices."""
        metric, feedback = torch.from_numpy(factors.metric), torch.from_numpy(factors.feedback)
        self.sweep(metric, feedback, None, back=False)
        metric = torch.from_numpy(factors.fixed_metric)
        feedback = torch.from_numpy(factors.fixed_feedback)
        other = self.sweep(None, feedback, None, back=True)
        for i in range(AGAIN):
            other = self.sweep(metric, feedback, other, back=bool(i % 2))
        return self.index.numpy()


def error_under(h: np.ndarray, x: np.ndarray, table: np.ndarray, index: np.ndarray) -> float:
    """tr(E H Eᵀ) of the errors E."""
    gap = (x - table[index].reshape(x.shape)).astype(np.float64)
    return float(np.einsum("ij,ij->", gap @ h, gap))


def seconds_of_a_pass(shape: tuple[int, int], clock: Any) -> float:
    """Of a product with TOKENS tokens as the calibration does it."""
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    with bfloat16_factors(), torch.inference_mode():
        linear.to(linear_dtype(linear))
        tokens = torch.ones(SOME_TOKENS, shape[1], dtype=linear.weight.dtype)
        seconds = compare({"pass": lambda: linear(tokens)}, turns=7, clock=clock)
    return seconds["pass"].minimum * TOKENS / SOME_TOKENS


def measure(
    book: tuple[int, int], shape: tuple[int, int], turns: int, threads: int
) -> dict[str, Any]:
    """One row of the table."""
    d, codewords = book
    x, table, h, factors = problem(d, codewords, shape)
    found = in_c(x, table, factors)
    twin = InTorch(x, table)
    by_reference = in_c(x[:1], table, factors, reference)
    for rows, index in ((x, twin.run(factors)), (x[:1], by_reference)):
        errors = [error_under(h, rows, table, i) for i in (found[: len(rows)], index)]
        if abs(errors[1] / errors[0] - 1) > 0.01:
            raise AssertionError(f"{book}: the error is {errors[0]:.4g}, not {errors[1]:.4g}")
    clock = time.process_time if threads == 1 else time.perf_counter
    runs = {"C": lambda: in_c(x, table, factors), "torch": lambda: twin.run(factors)}
    seconds = {name: t.minimum for name, t in compare(runs, turns=turns, clock=clock).items()}
    peak = fma_peak(2)
    products = (AGAIN + 2) * x.size * shape[1] / seconds["C"] / threads
    return {
        "d": d,
        "K": codewords,
        "ns a weight": seconds["C"] * 1e9 / x.size,
        "products, peak %": 100 * products / peak if peak else None,
        "torch x": seconds["torch"] / seconds["C"],
        "of a pass": seconds["C"] / seconds_of_a_pass(shape, clock),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape, turns = ((256, 256), 2) if options.quick else ((1024, 2048), 2)
    print_machine("torch")
    print(f"{shape[0]} rows of {shape[1]} columns")
    books = QUICK if options.quick else GRID
    rows = [measure(book, shape, turns, options.threads) for book in books]
    print_table(rows, COLUMNS)
    write_json(options.json, "encoding", rows, "torch")


if __name__ == "__main__":
    main()
