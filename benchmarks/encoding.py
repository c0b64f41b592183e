"""Choosing codes with error feedback, against PyTorch and a pass of the calibration.

    python benchmarks/encoding.py [--quick] [--threads N] [--json FILE]

`C` is what `pocketllm compress --calibration` runs on a matrix: with codebooks a first choice along
each row, then two more given all others; with trellis codes the best path down each column, once.
`torch` is the same with PyTorch's products, in blocks of 128 columns, and its argmin, or for paths
its minimum of the two ways to every state, in all segments of a column at once; of trellis codes it
runs one block, from the middle of the matrix, which counts for every block. `of a pass` is C's time
as a part of what the product of the matrix with 65,536 tokens takes, the default calibration text,
in the precision of the calibration. Before anything is timed, errors under second moments must be
those of the NumPy reference (one row) and of PyTorch (all, a block of trellis codes; what rounds
differently chooses differently now and then); of trellis codes a few columns of two segments must
be the reference's, symbol by symbol. With one thread times are processor time, else wall time; the
share of the FMA peak, of all threads, counts the products with the feedback matrix alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from common import (
    arguments,
    compare,
    fma_peak,
    normal_levels,
    print_machine,
    print_table,
    write_json,
)

from pocketllm import kernels, reference, trellis
from pocketllm.config import PocketConfig
from pocketllm.encode import AGAIN, Factors, factorise
from pocketllm.kmeans import kmeans
from pocketllm.planning import WINDOW
from pocketllm.precision import linear_dtype, rounded_factors, rounded_linears
from pocketllm.trellis_encode import level_table, uniform_coding

# d, K
GRID = [(1, 16), (2, 64), (2, 256), (4, 256), (4, 1024), (4, 2048), (4, 4096), (8, 4096)]
QUICK = [(4, 2048)]
BITS, QUICK_BITS = [1.0, 2.0, 2.25, 3.0, 4.0], [2.25, 3.0]
FIGURES = ["ns a weight", "products, peak %", "torch x", "of a pass"]
COLUMNS, TRELLIS_COLUMNS = ["d", "K", *FIGURES], ["bits", *FIGURES]
BLOCK = 128
STATES = 1 << trellis.MEMORY
# Of which the reference chooses trellis codes.
FEW_ROWS, FEW_COLUMNS = 2 * trellis.SEGMENT, 3
TOKENS = PocketConfig.calibration_windows * WINDOW
SOME_TOKENS = 2048


def second_moments(columns: int) -> np.ndarray:
    """H of correlated inputs of different magnitudes."""
    random = np.random.default_rng(0)
    mix = np.eye(columns) + 0.3 * random.standard_normal((columns, columns)) / columns**0.5
    inputs = random.standard_normal((2 * columns, columns)) * np.exp(
        0.5 * random.standard_normal(columns)
    )
    inputs = (inputs @ mix).astype(np.float32)
    return inputs.T @ inputs / len(inputs)


def problem(
    d: int, codewords: int, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Factors]:
    """Rows with tails, as they are encoded, a codebook of theirs, H and its factors."""
    random = np.random.default_rng(1)
    rows, columns = shape
    h = second_moments(columns)
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


class TrellisProblem(NamedTuple):
    """What `encode_trellis` takes."""

    x: np.ndarray
    weight: np.ndarray
    feedback: np.ndarray
    bits: np.ndarray
    extra: int
    factor: np.ndarray
    level: np.ndarray

    def part(self, rows: int, columns: int) -> TrellisProblem:
        """Of the first rows and columns."""
        return self._replace(
            x=np.ascontiguousarray(self.x[:rows, :columns]),
            weight=self.weight[:rows],
            feedback=np.ascontiguousarray(self.feedback[:columns, :columns]),
            bits=self.bits[:columns],
            factor=self.factor[:columns],
        )


def trellis_problem(bits: float, shape: tuple[int, int]) -> tuple[TrellisProblem, np.ndarray]:
    """Rows with tails, as they are encoded in so many bits, and H."""
    random = np.random.default_rng(1)
    rows, columns = shape
    h = second_moments(columns)
    factors = factorise(h, 1, again=False)
    values = random.standard_t(5, shape) * np.sqrt(3 / 5)
    gain = uniform_coding(bits, np.ones(columns), factors).gain
    blocks, extra = trellis.block_bits(bits, columns)
    found = TrellisProblem(
        x=(values / gain).astype(np.float32),
        weight=random.uniform(0.1, 1, rows).astype(np.float32),
        feedback=factors.feedback,
        bits=np.repeat(blocks, trellis.BLOCK)[:columns],
        extra=extra,
        factor=np.ones(columns, np.float32),
        level=level_table(normal_levels()),
    )
    return found, h[factors.order][:, factors.order]


class TrellisInTorch:
    """Trellis codes in PyTorch: the segments of a column side by side, their rows one by one."""

    def __init__(self, p: TrellisProblem) -> None:
        self.x, self.feedback = torch.from_numpy(p.x), torch.from_numpy(p.feedback)
        self.weight = by_segment(torch.from_numpy(p.weight))
        # Windows: the newest bit, above it the state before.
        subsets = [
            sum(((window & taps).bit_count() & 1) << i for i, taps in enumerate(trellis.TAPS))
            for window in range(2 * STATES)
        ]
        self.subset = torch.tensor(subsets)
        richer = torch.from_numpy(trellis.is_richer(p.extra, trellis.SEGMENT))
        few, more = (levels_of(p, int(p.bits[0]) + i) for i in (0, int(p.extra > 0)))
        few = torch.nn.functional.pad(few, (0, 0, 0, len(more) - len(few)), value=torch.inf)
        # (rows of a segment, further bits, subsets)
        self.level = torch.where(richer[:, None, None], more, few)

    def run(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The values of a block of columns as if none were before it, (rows, BLOCK), and what their
        errors mean for the columns behind it."""
        first, last = block * BLOCK, block * BLOCK + BLOCK
        x, feedback = self.x[:, first:last], self.feedback[first:last]
        values, errors = torch.zeros(len(x), BLOCK), torch.zeros(len(x), BLOCK)
        for i in range(BLOCK):
            target = x[:, i] + errors[:, :i] @ feedback[:i, first + i]
            values[:, i] = self.column(by_segment(target)).T.flatten()
            errors[:, i] = x[:, i] - values[:, i]
        return values, errors @ feedback[:, last:]

    def column(self, target: torch.Tensor) -> torch.Tensor:
        """The values of targets, (rows of a segment, segments)."""
        rows, segments = target.shape
        least, further = (target[:, None, None] - self.level[..., None]).square().min(1)
        metric = self.weight[:, None] * least
        ends = reference.trellis.OVERLAP
        around = torch.cat([metric[-ends:], metric[:ends]])
        total, is_upper = self.paths(torch.zeros(STATES, segments), around)
        start = traced(is_upper[ends:], total.argmin(0, keepdim=True))[:1]
        only = torch.full((STATES, segments), torch.inf).scatter(0, start, 0.0)
        states = traced(self.paths(only, metric)[1], start)
        subset = self.subset[states[:-1] << 1 | states[1:] & 1]
        own = further.gather(1, subset[:, None])[:, 0]
        return self.level[torch.arange(rows)[:, None], own, subset]

    def paths(self, total: torch.Tensor, metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The cheapest paths to every state, from these costs (STATES, segments) on, through rows
        of metrics of the subsets (rows, 8, segments).

        Returns:
            their costs, and (rows, STATES, segments): is the state before the upper one of two?
        """
        (rows, _, segments), half = metric.shape, STATES // 2
        is_upper = torch.empty(rows, half, 2, segments, dtype=torch.bool)
        both, total = torch.empty(2, half, 2, segments), total.clone()
        for row, survivor in zip(metric, is_upper, strict=True):
            cost = row.index_select(0, self.subset).view(both.shape)
            torch.add(total.view(2, half, 1, segments), cost, out=both)
            torch.lt(both[1], both[0], out=survivor)
            torch.minimum(both[0], both[1], out=total.view(half, 2, segments))
        return total, is_upper.flatten(1, 2)


def by_segment(column: torch.Tensor) -> torch.Tensor:
    """(rows,) as (rows of a segment, segments)."""
    return column.view(-1, trellis.SEGMENT).T


def traced(is_upper: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """The states before, between and after the rows of the paths to these ends (1, segments)."""
    states = [end]
    for row in reversed(is_upper.unbind()):
        upper = row.gather(0, states[-1])
        states.append(torch.add(states[-1] >> 1, upper, alpha=STATES // 2))
    return torch.cat(states[::-1])


def levels_of(p: TrellisProblem, bits: int) -> torch.Tensor:
    """Of weights of so many bits, (further bits, subsets)."""
    magnitude = torch.from_numpy(p.level[trellis.TABLE[bits - 1]])
    return torch.cat([magnitude, -magnitude.flip(0)]).view(-1, 1 << len(trellis.TAPS))


def error_under(h: np.ndarray, x: np.ndarray, made: np.ndarray) -> float:
    """tr(E H Eᵀ) of the errors E of what x was made."""
    gap = (x - made).astype(np.float64)
    return float(np.einsum("ij,ij->", gap @ h, gap))


def seconds_of_a_pass(shape: tuple[int, int], clock: Any) -> float:
    """Of a product with TOKENS tokens as the calibration does it."""
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    tokens = torch.ones(SOME_TOKENS, shape[1])
    with rounded_factors(), torch.no_grad():
        linear.to(linear_dtype(linear))
        with rounded_linears(linear):
            seconds = compare({"pass": lambda: linear(tokens)}, turns=7, clock=clock)
    return seconds["pass"].minimum * TOKENS / SOME_TOKENS


def check_errors(name: object, got: float, want: float) -> None:
    """Errors must be within 1 %."""
    if abs(want / got - 1) > 0.01:
        raise AssertionError(f"{name}: the error is {got:.4g}, not {want:.4g}")


def figures(
    runs: dict[str, Callable[[], object]],
    shape: tuple[int, int],
    sweeps: int,
    parts: int,
    turns: int,
    threads: int,
) -> dict[str, Any]:
    """The columns that both tables have.

    Args:
        runs: ``"C"``, and ``"torch"`` for one of so many parts of the matrix.
        shape: of the matrix.
        sweeps: how often every error meets the columns behind it.
        parts: of the matrix.
        turns: of each run.
        threads: of each run.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds = {name: t.minimum for name, t in compare(runs, turns=turns, clock=clock).items()}
    peak = fma_peak(2)
    weights = shape[0] * shape[1]
    products = sweeps * weights * shape[1] / seconds["C"] / threads
    return {
        "ns a weight": seconds["C"] * 1e9 / weights,
        "products, peak %": 100 * products / peak if peak else None,
        "torch x": parts * seconds["torch"] / seconds["C"],
        "of a pass": seconds["C"] / seconds_of_a_pass(shape, clock),
    }


def measure(
    book: tuple[int, int], shape: tuple[int, int], turns: int, threads: int
) -> dict[str, Any]:
    """One row of the table of codebooks."""
    d, codewords = book
    x, table, h, factors = problem(d, codewords, shape)
    found = in_c(x, table, factors)
    twin = InTorch(x, table)
    by_reference = in_c(x[:1], table, factors, reference)
    for rows, index in ((x, twin.run(factors)), (x[:1], by_reference)):
        made = [table[i].reshape(rows.shape) for i in (found[: len(rows)], index)]
        check_errors(book, *(error_under(h, rows, m) for m in made))
    runs = {"C": lambda: in_c(x, table, factors), "torch": lambda: twin.run(factors)}
    row: dict[str, Any] = {"d": d, "K": codewords}
    return row | figures(runs, shape, AGAIN + 2, 1, turns, threads)


def measure_trellis(
    bits: float, shape: tuple[int, int], turns: int, threads: int
) -> dict[str, Any]:
    """One row of the table of trellis codes."""
    p, h = trellis_problem(bits, shape)
    found = kernels.encode_trellis(*p)
    few = reference.encode_trellis(*p.part(FEW_ROWS, FEW_COLUMNS))
    if not np.array_equal(found[:FEW_ROWS, :FEW_COLUMNS], few):
        raise AssertionError(f"{bits} bits: the codes are not those of the reference")
    twin = TrellisInTorch(p)
    made = reference.trellis_levels(found[:, :BLOCK], p.bits[:BLOCK], p.extra, p.level)
    block, own = p.x[:, :BLOCK], h[:BLOCK, :BLOCK]
    check_errors(bits, *(error_under(own, block, m) for m in (made, twin.run(0)[0].numpy())))
    blocks = shape[1] // BLOCK
    runs = {"C": lambda: kernels.encode_trellis(*p), "torch": lambda: twin.run(blocks // 2)}
    return {"bits": bits} | figures(runs, shape, 1, blocks, turns, threads)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape, turns = ((256, 256), 2) if options.quick else ((1024, 2048), 2)
    print_machine("torch")
    print(f"Codebooks, {shape[0]} rows of {shape[1]} columns")
    books = QUICK if options.quick else GRID
    report = {"codebooks": [measure(book, shape, turns, options.threads) for book in books]}
    print_table(report["codebooks"], COLUMNS)
    shape = (1024, 256) if options.quick else (8192, 2048)
    print(f"Trellis codes, {shape[0]} rows of {shape[1]} columns")
    rates = QUICK_BITS if options.quick else BITS
    report["trellis"] = [measure_trellis(bits, shape, turns, options.threads) for bits in rates]
    print_table(report["trellis"], TRELLIS_COLUMNS)
    write_json(options.json, "encoding", report, "torch")


if __name__ == "__main__":
    main()
