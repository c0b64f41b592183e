"""Start-up: the command line, and loading a compressed checkpoint beside its dense original.

    python benchmarks/load.py [--dense DIR --compressed DIR] [--json FILE]

Every figure is from a process of its own, the fastest of several; the contenders take turns. A file
is read from disk where its pages are dropped from the system's cache first ("cold"). Before
anything is timed, products of the loaded model are compared with those of the dense matrices that
its file stands for.
Without folders, the demo model is compressed and used: it shows fixed costs only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[1] / "pocketllm" / "demo_data"
MIB = 2**20
CHILD = """
import json, sys, time
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama
from transformers.utils import logging
import pocketllm.checkpoint, pocketllm.hf, pocketllm.linear
from pocketllm.memory import peak_memory
logging.disable_progress_bar()
folder, tokens = sys.argv[1:3]
base = peak_memory()
wall, cpu = time.perf_counter(), time.process_time()
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
loaded = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
loaded["memory"] = peak_memory() - base
wall = time.perf_counter()
with torch.inference_mode():
    model(torch.zeros(1, int(tokens), dtype=torch.long))
loaded["first"] = time.perf_counter() - wall
print(json.dumps(loaded))
"""
CHECK = """
import sys, torch
from transformers import AutoModelForCausalLM
from pocketllm.checkpoint import open_checkpoint
from pocketllm.linear import PocketLinear
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
stored = open_checkpoint(sys.argv[1], check=False)
names = [n for n, m in model.named_modules() if isinstance(m, PocketLinear)]
for name in (names[0], names[-1]):
    module = model.get_submodule(name)
    dense = torch.from_numpy(stored.load_dequantised(name))
    x = torch.randn(3, module.in_features)
    got, want = module(x), x @ dense.T
    if module.bias is not None:
        want += module.bias.float()
    assert (got - want).abs().max() < 0.02 * want.abs().max(), name
"""
HELP = [sys.executable, "-m", "pocketllm", "--help"]


def weight_bytes(folder: Path) -> int:
    """Size of a model's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def drop(folder: Path) -> None:
    """Take the folder's files out of the system's cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_seconds(folder: Path) -> float:
    """Seconds of reading the weight files from disk, front to back."""
    code = "import sys, time; t = time.perf_counter()\nfor p in sys.argv[1:]:\n"
    code += "  f = open(p, 'rb', buffering=0)\n  while f.read(1 << 24): pass\n"
    code += "print(time.perf_counter() - t)"
    files = [str(path) for path in folder.glob("*.safetensors")]
    return float(subprocess.check_output([sys.executable, "-c", code, *files], text=True))


def load(folder: Path, tokens: int, checksums: bool = True) -> dict[str, float]:
    """Seconds and memory of loading in a fresh process, and of a first forward pass."""
    environment = {
        **os.environ,
        "POCKETLLM_CHECKSUMS": str(int(checksums)),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", CHILD, str(folder), str(tokens)]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ).stdout
    return json.loads(output.splitlines()[-1])


def fastest(runs: list[dict[str, float]]) -> dict[str, float]:
    """The smallest of every figure."""
    return {key: min(run[key] for run in runs) for key in runs[0]}


def help_seconds() -> dict[str, float]:
    """Wall and CPU seconds of ``pocketllm --help``."""
    code = (
        "import resource, subprocess, sys, time; t = time.perf_counter()\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "r = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(time.perf_counter() - t, r.ru_utime + r.ru_stime)"
    )
    output = subprocess.check_output([sys.executable, "-c", code, *HELP], text=True)
    wall, cpu = map(float, output.split())
    return {"wall": wall, "cpu": cpu}


def demo(scratch: Path) -> Path:
    """The demo model, compressed."""
    out = scratch / "compressed"
    command = [sys.executable, "-m", "pocketllm", "compress", str(DEMO), str(out)]
    options = ["--subvector", "4", "--codebook", "256"]
    subprocess.run(
        [*command, *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dense", type=Path, default=DEMO)
    parser.add_argument("--compressed", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="of the first forward pass")
    parser.add_argument("--quick", action="store_true", help="once: proves that it runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    repeat = 1 if arguments.quick else arguments.repeat
    figures: dict[str, Any] = {}
    started = [help_seconds() for _ in range(repeat)]
    figures["help"] = fastest(started)
    print(f"pocketllm --help: {figures['help']['wall']:.2f} s, CPU {figures['help']['cpu']:.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        compressed = arguments.compressed or demo(Path(folder))
        check = [sys.executable, "-c", CHECK, str(compressed)]
        subprocess.run(check, check=True, stderr=subprocess.DEVNULL)
        contenders: dict[str, tuple[Path, bool]] = {
            "dense": (arguments.dense, True),
            "compressed": (compressed, True),
            "compressed, no checksums": (compressed, False),
        }
        runs: dict[str, list[dict[str, float]]] = {}
        for _ in range(repeat):
            for cold in (True, False):
                for label, (model, checksums) in contenders.items():
                    if cold:
                        drop(model)
                    found = load(model, arguments.tokens, checksums)
                    runs.setdefault(f"{label}, {'cold' if cold else 'warm'}", []).append(found)
            for label in ("dense", "compressed"):
                drop(contenders[label][0])
                seconds = read_seconds(contenders[label][0])
                runs.setdefault(f"read {label}", []).append({"wall": seconds})
        for label, size in (("dense", arguments.dense), ("compressed", compressed)):
            figures[f"{label} bytes"] = weight_bytes(size)
            print(f"{label}: {figures[f'{label} bytes'] / MIB:.0f} MiB")
    print(f"{'':32s} {'load':>8s} {'CPU':>8s} {'+ first pass':>13s} {'peak memory':>12s}")
    for label, several in runs.items():
        best = figures[label] = fastest(several)
        line = f"{label:32s} {best['wall']:7.2f}s"
        if "cpu" in best:
            both = best["wall"] + best["first"]
            line += f" {best['cpu']:7.2f}s {both:12.2f}s {best['memory'] / MIB:8.0f} MiB"
        print(line)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
