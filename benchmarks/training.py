"""One update of the codec's training: the C kernels and the same codec in PyTorch.

    python benchmarks/training.py [--quick] [--threads N] [--json FILE] [--plots DIR]

A step is forward, search, straight-through, backward and Adam on 16,384 sub-vectors. `C` is what
`pocketllm compress` runs, `eager` and `compiled` are pocketllm.codec_torch as it is and through
torch.compile, whose search is a matmul with argmin; `+ search` is the compiled one with our search
in its place. Before anything is timed, all take the same 20 steps from one start, and their losses
must agree. With one thread times are processor time, else wall time; the share of the FMA peak, of
all threads, counts the multiply-adds of the MLPs, forwards and backwards, and of the scan over all
codewords as if every sub-vector were decoded and compared with all of them, which not every step
does (docs/PERFORMANCE.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, compare, fma_peak, print_machine, print_table, write_json

from pocketllm import kernels
from pocketllm.codec import Codec, KernelEngine
from pocketllm.codec_init import random_start
from pocketllm.codec_torch import TorchEngine

# d, K, hidden, norm
GRID = [(4, 256, 16, "input"), (4, 1024, 16, "input"), (4, 4096, 16, "input")]
GRID += [(4, 256, 32, "input"), (2, 256, 16, "input"), (8, 4096, 16, "input")]
GRID += [(4, 256, 16, "rln"), (4, 4096, 16, "rln"), (8, 4096, 16, "rln"), (8, 32768, 16, "rln")]
QUICK = [(4, 256, 16, "rln")]
COLUMNS = ["d", "K", "h", "norm", "C ms", "peak %"]
COLUMNS += ["eager x", "compiled x", "+ search x", "worst loss"]
LENGTH = 1024
STEPS = 20
LR = 1e-3


class SearchingEngine(TorchEngine):
    """PyTorch with the search of the kernels."""

    def __init__(self, codec: Codec, device: str = "cpu") -> None:
        super().__init__(codec, 0.5, device)
        self.module.nearest = self._nearest  # type: ignore[method-assign]

    @torch.compiler.disable
    def _nearest(self, z: torch.Tensor) -> torch.Tensor:
        book = self.module.codebook.detach().numpy()
        return torch.from_numpy(kernels.nearest(z.detach().numpy(), book)).long()


def compiled(engine: TorchEngine) -> TorchEngine:
    """The engine with its forward and backward compiled."""
    engine.module.losses = torch.compile(engine.module.losses)  # type: ignore[method-assign]
    return engine


def flops(d: int, codewords: int, hidden: int) -> float:
    """Of one sub-vector: six MLPs forwards, twice that backwards, and the scan."""
    return 6 * 3 * 4 * d * hidden + 2 * d * codewords


def engines(codec: Codec) -> dict[str, Any]:
    """Every contender at the same start."""
    return {
        "C": KernelEngine(codec, 0.5),
        "eager": TorchEngine(codec, 0.5, "cpu"),
        "compiled": compiled(TorchEngine(codec, 0.5, "cpu")),
        "+ search": compiled(SearchingEngine(codec)),
    }


def measure(
    shape: tuple[int, int, int, str], batch: int, turns: int, threads: int
) -> dict[str, Any]:
    """One row of the table."""
    d, codewords, hidden, norm = shape
    torch.compiler.reset()
    rows = np.random.default_rng(0).standard_normal((batch * d // LENGTH, LENGTH), np.float32)
    start = random_start([rows], d, codewords, hidden, norm, False, 0)
    running = engines(Codec(d, hidden, norm, *start))
    curves = {
        name: [engine.step(rows, None, LR)[0] for _ in range(STEPS)]
        for name, engine in running.items()
    }
    worst = max(np.abs(np.array(c) / curves["C"] - 1).max() for c in curves.values())
    if worst > 1e-3:
        raise AssertionError(f"{shape}: losses differ by {worst:.2g} of their value")

    def step(engine: Any) -> Callable[[], object]:
        return lambda: engine.step(rows, None, LR)

    clock = time.process_time if threads == 1 else time.perf_counter
    steps = {name: step(engine) for name, engine in running.items()}
    seconds = compare(steps, turns=turns, clock=clock)
    least = {name: timing.minimum for name, timing in seconds.items()}
    peak = fma_peak(2)
    row: dict[str, Any] = {"d": d, "K": codewords, "h": hidden, "norm": norm}
    row["C ms"] = least["C"] * 1e3
    share = flops(d, codewords, hidden) * batch / least["C"] / threads
    row["peak %"] = 100 * share / peak if peak else None
    row |= {f"{name} x": least[name] / least["C"] for name in running if name != "C"}
    return row | {"worst loss": float(worst), "curves": curves}


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    """Times of all contenders side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axis = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    at = np.arange(len(rows))
    for i, name in enumerate(("eager", "compiled", "+ search")):
        times = [row[f"{name} x"] for row in rows]
        axis.bar(at + 0.27 * (i - 1), times, 0.25, label=f"PyTorch, {name}")
    labels = [f"d {r['d']}, K {r['K']}\nh {r['h']}, {r['norm']}" for r in rows]
    axis.set_xticks(at, labels, fontsize=7)
    axis.set(ylabel="times the C kernels' CPU time", title="one training step")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.legend()
    figure.savefig(folder / "training.png", dpi=120)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch, turns = (2048, 2) if options.quick else (16384, 7)
    print_machine("torch")
    shapes = QUICK if options.quick else GRID
    rows = [measure(shape, batch, turns, options.threads) for shape in shapes]
    print_table(rows, COLUMNS)
    if options.plots:
        plot(rows, options.plots)
    write_json(options.json, "training", rows, "torch")


if __name__ == "__main__":
    main()
