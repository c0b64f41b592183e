"""Exact nearest codeword: the scan, the index, and what one would take instead.

    python benchmarks/search.py [--quick] [--json FILE] [--plots DIR]

One thread, CPU time. `scan` looks at every codeword; `reused` is a SearchIndex that exists, `warm`
the same given the right answer as its guess, `rebuilt` one call of `nearest`, which builds what
pays for so many queries (where nothing does, it is the scan). `torch` is the blocked matmul with
argmin, `faiss` its IndexFlatL2 when it can be imported; both answer without exact ties.
Every index is compared with the scan's before anything is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import arguments, compare, fma_peak, print_machine, print_table, write_json

from pocketllm import kernels

try:
    import faiss
except ImportError:
    faiss = None

GRID = [(1, 256), (1, 4096), (2, 256), (2, 4096), (2, 65536), (4, 256), (4, 1024), (4, 4096)]
GRID += [(4, 32768), (8, 256), (8, 4096), (8, 32768), (8, 65536), (16, 4096), (16, 65536)]
QUICK = [(2, 256), (4, 4096), (8, 4096)]
COLUMNS = ["data", "d", "K", "n", "scan us", "peak %", "reused us", "build ms"]
COLUMNS += ["reused x", "warm x", "rebuilt x", "torch x", "faiss x"]
SCANNED_VALUES = 2e10  # how much of the scan is timed: queries x K x d
SLOWER = 16  # of the others, so many times less
LONG = 12  # longer sub-vectors take their time: fewer queries will do
TORCH_BLOCK = 1 << 22  # scores torch holds at a time


def sample(kind: str, seed: int, n: int, d: int) -> np.ndarray:
    """n independent sub-vectors, normal or with Student's t (5) tails."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) if kind == "normal" else rng.standard_t(5, size=(n, d))
    return x.astype(np.float32)


def scan(z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """The scan over all codewords: what `nearest` does when a tree would not pay."""
    part = 40000 // z.shape[1] - 1
    return np.concatenate(
        [kernels.nearest(z[i : i + part], codebook) for i in range(0, len(z), part)]
    )


def torch_nearest(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Blocks of |c|**2 / 2 - z c' by matmul, then argmin."""
    half = codebook.square().sum(1) / 2
    rows = max(1, TORCH_BLOCK // len(codebook))
    parts = [torch.addmm(half, part, codebook.T, alpha=-1).argmin(1) for part in z.split(rows)]
    return torch.cat(parts)


def measure(
    kind: str, d: int, codewords: int, n: int, turns: int, others: bool = True
) -> dict[str, Any]:
    """One row of the table; times are those of all n queries, the scan's of a part scaled up."""
    codebook, z = sample(kind, 1, codewords, d), sample(kind, 2, n, d)
    few = min(n, max(500, int(SCANNED_VALUES / (codewords * d) / turns)))
    index = kernels.SearchIndex(codebook)
    found = index.nearest(z)
    if not np.array_equal(found[:few], scan(z[:few], codebook)):
        raise AssertionError(f"{kind} d={d} K={codewords}: the index and the scan disagree")
    part = z[: few // SLOWER + 1]
    torch_z, torch_book = torch.from_numpy(part), torch.from_numpy(codebook)
    contenders: dict[str, Callable[[], object]] = {
        "scan": lambda: scan(z[:few], codebook),
        "reused": lambda: index.nearest(z),
        "warm": lambda: index.nearest(z, previous=found),
        "build": lambda: kernels.SearchIndex(codebook),
        "rebuilt": lambda: kernels.nearest(z, codebook),
    }
    share = {"scan": few, "torch": len(part), "faiss": len(part)}
    if others:
        contenders["torch"] = lambda: torch_nearest(torch_z, torch_book)
    if others and faiss is not None:
        flat = faiss.IndexFlatL2(d)
        flat.add(codebook)
        contenders["faiss"] = lambda: flat.search(part, 1)
    seconds = {name: t.minimum for name, t in compare(contenders, turns=turns).items()}
    each = {name: seconds[name] / share.get(name, n) for name in seconds}
    peak = fma_peak(2)
    row: dict[str, Any] = {"data": kind, "d": d, "K": codewords, "n": n}
    row |= {"scan us": each["scan"] * 1e6, "reused us": each["reused"] * 1e6}
    row["peak %"] = 200 * d * codewords / each["scan"] / peak if peak else None
    row["build ms"] = seconds["build"] * 1e3
    row["rebuilt us"] = each["rebuilt"] * 1e6
    for name in ("reused", "warm", "rebuilt"):
        row[f"{name} x"] = each["scan"] / each[name]
    for name in ("torch", "faiss"):  # how many times slower than the index
        row[f"{name} x"] = each[name] / each["reused"] if name in each else None
    return row


def plot(rows: list[dict[str, Any]], over_n: list[dict[str, Any]], folder: Any) -> None:
    """Cost of a query against K, d and n."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for axis, key, fixed, data in (
        (axes[0], "K", "d", [r for r in rows if r["d"] in (2, 4, 8)]),
        (axes[1], "d", "K", [r for r in rows if r["K"] in (4096, 65536)]),
        (axes[2], "n", "d", over_n),
    ):
        for colour, value in enumerate(sorted({r[fixed] for r in data})):
            line = [r for r in data if r[fixed] == value and r["data"] == "normal"]
            line.sort(key=lambda r: r[key])
            x = [r[key] for r in line]
            name = f"{fixed} = {value}"
            axis.plot(x, [r["scan us"] for r in line], "--", color=f"C{colour}")
            axis.plot(x, [r["reused us"] for r in line], "o-", color=f"C{colour}", label=name)
            if axis is axes[2]:
                axis.plot(x, [r["rebuilt us"] for r in line], "x:", color=f"C{colour}")
        axis.set(xscale="log", yscale="log", xlabel=key, ylabel="µs a query, one thread")
        axis.set_title("- - scan, o index reused" + (", x rebuilt" if axis is axes[2] else ""))
        axis.legend()
    figure.savefig(folder / "search.png", dpi=120)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--queries", type=int, help="n of the table, default 1000000")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n = options.queries or (20_000 if options.quick else 1_000_000)
    turns = 2 if options.quick else 3
    print_machine("torch", "faiss")
    peak = fma_peak()
    print("FMA peak of one core: " + (f"{peak / 1e9:.1f} GFLOP/s" if peak else "no C compiler"))
    rows = []
    for kind in ("normal", "t5"):
        for d, codewords in QUICK if options.quick else GRID:
            rows.append(measure(kind, d, codewords, n // 40 if d > LONG else n, turns))
            print(".", end="", flush=True)
    print()
    print_table(rows, COLUMNS)
    shapes = [(4, 4096)] if options.quick else [(4, 32768), (8, 65536)]
    sizes = np.unique(np.logspace(3, math.log10(n), 4 if options.quick else 7).astype(int))
    over_n = [measure("normal", d, k, int(size), turns, False) for d, k in shapes for size in sizes]
    print_table(over_n, ["d", "K", "n", "scan us", "reused us", "rebuilt us"])
    if options.plots:
        plot(rows, over_n, options.plots)
    write_json(options.json, "search", {"table": rows, "over_n": over_n}, "torch", "faiss")


if __name__ == "__main__":
    main()
