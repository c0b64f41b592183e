"""Compressing a large model: time by phase, peak memory against the model's size, and what that
makes for larger models.

    python benchmarks/compress.py [--parameters 1b] [--windows 128] [--bits 3] [--json FILE]

Builds a sharded Llama with random weights of trained-like statistics (row scales that differ by an
order of magnitude, heavy tails) and compresses it with and without calibration, each in a process
of its own. Before a figure is printed, the result is opened and every checksum verified.

The calibration's own forward passes (each layer once for the second moments, once more with its
compressed weights) are timed in the same run, so that the total can be given as a multiple of them.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# layers, hidden, intermediate, heads, key-value heads, vocabulary
Shape = tuple[int, int, int, int, int, int]
SIZES: dict[str, Shape] = {
    "tiny": (2, 128, 256, 4, 2, 4096),
    "200m": (12, 1024, 2816, 16, 16, 32000),
    "1b": (16, 2048, 8192, 32, 8, 32000),
}
LARGER: dict[str, Shape] = {
    "7B": (32, 4096, 11008, 32, 32, 32000),
    "70B": (80, 8192, 28672, 64, 8, 32000),
}
DEMO = Path(__file__).parents[1] / "pocketllm" / "demo_data"
FORWARD, MOMENTS = "forward passes", "second moments"
SENSITIVITIES = "measuring sensitivities"
CHOOSING = "choosing codes"
STATISTICS = "statistics of rows and columns"
BITS = "bits of columns"
SHARD_BYTES = 500_000_000
MIB = 2**20


def build(folder: str, shape: Shape) -> None:
    """Runs in a process of its own: write the model, with the tokenizer that the demo has."""
    import torch
    from common import llama_config
    from transformers import LlamaForCausalLM

    from pocketllm.demo import DATA
    from pocketllm.hf import tensor_bytes
    from pocketllm.tensorfile import (
        INDEX_NAME,
        LazyTensor,
        header_of,
        shard_names,
        split_shards,
        write_tensors,
    )

    out = Path(folder)
    config = llama_config(shape, max_position_embeddings=2048, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2**22, generator=generator)
    chi = torch.randn(5, 2**22, generator=generator).square().mean(0)
    tails = normal / chi.sqrt()  # Student's t with five degrees of freedom

    def values(shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            return tensor_bytes(torch.ones(shape, dtype=torch.bfloat16))
        spread = torch.exp(0.5 * torch.randn(shape[0], 1, generator=generator)) / shape[1] ** 0.5
        matrix = torch.empty(shape, dtype=torch.bfloat16)
        for row in range(shape[0]):
            at = int(torch.randint(len(tails) - shape[1], (1,), generator=generator))
            matrix[row] = spread[row] * tails[at : at + shape[1]]
        return tensor_bytes(matrix)

    tensors = {
        name: LazyTensor("BF16", tuple(t.shape), lambda s=tuple(t.shape): values(s))
        for name, t in state.items()
    }
    out.mkdir(parents=True)
    config.save_pretrained(out)
    shards = split_shards(tensors, SHARD_BYTES)
    names = shard_names(len(shards))
    for file, shard in zip(names, shards, strict=True):
        with open(out / file, "wb") as handle:
            handle.write(header_of(shard, tensors, {"format": "pt"}))
            for _ in write_tensors(handle, shard, tensors):
                pass
    if len(shards) > 1:
        index = {n: file for file, shard in zip(names, shards, strict=True) for n in shard}
        (out / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file in DATA.glob("tokenizer*"):
        shutil.copy(file, out)


def timed_compression(model: str, out: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs in a process of its own: compress, verify; seconds of wall and CPU time by phase."""
    from pocketllm import (
        calibrate,
        checkpoint,
        compressor,
        config,
        sensitivity,
        weights,
        workspace,
    )

    phases = Phases()
    phases.watch(weights, "_streamed", "opening the model")
    phases.watch(weights.StreamedWeights, "check_finite", "checking for NaN")
    phases.watch(compressor, "fingerprint", "fingerprint of the source")
    phases.watch(sensitivity, "sensitivities", SENSITIVITIES)
    phases.watch(compressor, "train_codecs", "training the codecs")
    phases.watch(calibrate.Calibrator, "_each", FORWARD)
    phases.watch(calibrate.Calibrator, "_add", MOMENTS)
    phases.watch(weights.StreamedWeights, "hold", "reading layers for the passes")
    phases.watch(compressor, "factorise", "factoring second moments")
    phases.watch(compressor, "encode_rows", CHOOSING)
    phases.watch(compressor, "encode_trellis", CHOOSING)
    phases.watch(compressor, "uniform_coding", BITS)
    phases.watch(compressor, "column_coding", BITS)
    phases.watch(compressor, "row_statistics", STATISTICS)
    phases.watch(compressor, "column_energy", STATISTICS)
    phases.watch(workspace.Workspace, "store", "storing parts")
    phases.watch(compressor, "write_checkpoint", "writing the checkpoint")
    with phases.whole():
        result = compressor.compress(model, out, config.PocketConfig(**settings), progress=False)
    peak = peak_memory()
    checkpoint.open_checkpoint(out, check=True)
    return {
        "phases": phases.seconds,
        "peaks": phases.peaks,
        "wall": phases.wall,
        "cpu": phases.cpu,
        "peak": peak,
        "bytes": result.bytes,
        "bits": result.bits_per_weight,
        "bytes_bf16": result.bytes_bf16,
    }


class Phases:
    """Seconds of wall and CPU time inside some functions, what they call included; and the peak
    memory at the end of those calls that raised it.

    The passes that measure sensitivities are counted as that and nothing else.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.peaks: dict[str, int] = {}
        self.wall = self.cpu = 0.0
        self._alone = False

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Count what ``owner.name`` takes; of a generator, what making its values takes."""
        inner = getattr(owner, name)
        if inspect.isgeneratorfunction(inner):

            def outer(*args: Any, **kwargs: Any) -> Any:
                iterator = inner(*args, **kwargs)
                while True:
                    with self._count(label):
                        value = next(iterator, self)
                    if value is self:
                        return
                    yield value
        else:

            def outer(*args: Any, **kwargs: Any) -> Any:
                with self._count(label):
                    return inner(*args, **kwargs)

        setattr(owner, name, outer)

    @contextmanager
    def _count(self, label: str) -> Iterator[None]:
        if self._alone:
            yield
            return
        wall, cpu = time.perf_counter(), time.process_time()
        self._alone = label == SENSITIVITIES
        try:
            yield
        finally:
            self._alone = False
            total = self.seconds.setdefault(label, [0.0, 0.0])
            total[0] += time.perf_counter() - wall
            total[1] += time.process_time() - cpu
            if (peak := peak_memory()) > max(self.peaks.values(), default=0):
                self.peaks[label] = peak

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Count everything."""
        with self._count(""):
            yield
        self.wall, self.cpu = self.seconds.pop("")


def peak_memory() -> int:
    """Highest resident size of this process in bytes, not counting the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def libraries() -> dict[str, Any]:
    """Runs in a process of its own: what importing takes."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pocketllm.compressor  # noqa: F401

    return {"peak": peak_memory()}


def child(what: str, *arguments: Any) -> dict[str, Any]:
    """Call a function of this file in a fresh process."""
    output = subprocess.run(
        [sys.executable, __file__, "--child", what, json.dumps(arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    ).stdout
    return json.loads(output.splitlines()[-1])


CHILDREN = {"build": build, "compress": timed_compression, "libraries": libraries}


def sizes_of(shape: Shape) -> dict[str, float]:
    """What the cost of each phase is proportional to, over all decoder layers.

    ``weights``; ``moments``: squares of the widths of distinct inputs; ``factors``: their cubes;
    ``feedback``: weights times width of their input.
    """
    layers, hidden, intermediate, heads, kv_heads, _ = shape
    kv = hidden * kv_heads // heads
    matrices = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    matrices += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    inputs = [hidden, hidden, hidden, intermediate]
    return {
        "weights": layers * sum(o * i for o, i in matrices),
        "feedback": layers * sum(o * i * i for o, i in matrices),
        "moments": layers * sum(i**2 for i in inputs),
        "factors": layers * sum(i**3 for i in inputs),
    }


# What the time of a phase grows with; None: not with the model. Of choosing codes only the products
# with the feedback matrix and with second moments do grow so, and only with calibration.
GROWS_WITH = {
    FORWARD: "weights",
    MOMENTS: "moments",
    "factoring second moments": "factors",
    CHOOSING: "feedback",
    BITS: "moments",
    "training the codecs": None,
    "opening the model": None,
}


def extrapolate(phases: dict[str, list[float]], shape: Shape, larger: Shape) -> float:
    """CPU seconds of compressing ``larger`` with the same text and settings."""
    here, there = sizes_of(shape), sizes_of(larger)
    grows_with = GROWS_WITH if FORWARD in phases else {**GROWS_WITH, CHOOSING: "weights"}
    total = 0.0
    for name, (_, cpu) in phases.items():
        unit = grows_with.get(name, "weights")
        total += cpu * (there[unit] / here[unit] if unit else 1.0)
    return total


def describe(label: str, figures: dict[str, Any]) -> None:
    """Print what one compression took."""
    allowed = figures["bytes_bf16"] / 3 + 2**30
    print(
        f"\n{label}: {figures['wall']:.0f} s wall, {figures['cpu']:.0f} s CPU, "
        f"{figures['bits']:.3f} bits per weight\n"
        f"  peak {figures['peak'] / MIB:.0f} MiB, {figures['libraries'] / MIB:.0f} of it libraries;"
        f" bf16 {figures['bytes_bf16'] / MIB:.0f} MiB, a third of it plus 1 GiB "
        f"{allowed / MIB:.0f} MiB: {figures['peak'] / allowed:.2f} of that"
    )
    for name, (wall, cpu) in sorted(figures["phases"].items(), key=lambda item: -item[1][0]):
        raised = f"  peak {found / MIB:.0f} MiB" if (found := figures["peaks"].get(name)) else ""
        print(f"  {name:32s} {wall:9.2f} s wall {cpu:9.2f} s CPU{raised}")
    if FORWARD in figures["phases"]:
        passes = figures["phases"][FORWARD]
        print(
            f"  whole / forward passes: {figures['wall'] / passes[0]:.2f} wall, "
            f"{figures['cpu'] / passes[1]:.2f} CPU"
        )
    for name, seconds in figures["extrapolated_cpu"].items():
        print(f"  {name}: about {seconds / 3600:.1f} CPU hours")


def run(arguments: argparse.Namespace, model: Path, scratch: Path) -> dict[str, Any]:
    """Build, compress, print; returns all figures."""
    shape = SIZES[arguments.parameters]
    shape = (arguments.layers or shape[0], *shape[1:])
    if not model.exists():
        child("build", str(model), shape)
    text = scratch / "text.txt"
    sample = (DEMO / "calibration.txt").read_text(encoding="utf-8")
    text.write_text(sample * (1 + arguments.windows // 32), encoding="utf-8")
    base = {"bits": arguments.bits, "embeddings": arguments.embeddings}
    with_text = {"calibration": str(text), "calibration_windows": arguments.windows}
    figures: dict[str, Any] = {"shape": shape, "windows": arguments.windows, "machine": machine()}
    print(figures["machine"])
    imported = child("libraries")["peak"]
    for label, extra in (("plain", {}), ("calibrated", with_text)):
        if arguments.only in (None, label):
            found = child("compress", str(model), str(scratch / label), {**base, **extra})
            found["libraries"] = imported
            found["extrapolated_cpu"] = {
                name: extrapolate(found["phases"], shape, larger)
                for name, larger in LARGER.items()
                if not arguments.quick
            }
            describe(label, found)
            figures[label] = found
    return figures


def machine() -> str:
    """Processor, cores and versions."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    return f"{name}, {os.cpu_count()} cores, Python {sys.version.split()[0]}, {versions}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parameters", choices=list(SIZES), default="1b")
    parser.add_argument("--layers", type=int, help="fewer decoder layers, for a shorter run")
    parser.add_argument("--windows", type=int, default=128, help="of 512 tokens")
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--embeddings", action="store_true")
    parser.add_argument("--model", type=Path, help="where the model is built; kept, and used again")
    parser.add_argument("--scratch", type=Path, help="where results are made, and then removed")
    parser.add_argument("--only", choices=["plain", "calibrated"])
    parser.add_argument("--quick", action="store_true", help="a tiny model: proves that it runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child[0]](*json.loads(arguments.child[1]))))
        return
    if arguments.quick:
        arguments.parameters, arguments.windows = "tiny", 4
    if arguments.scratch is not None:
        arguments.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        figures = run(arguments, arguments.model or scratch / "model", scratch)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
