"""Peak memory of compressing a model, and of loading and running the result beside the dense model.

    python benchmarks/memory.py --model MODEL [--calibration FILE] [--bits 3]

Each figure is the highest resident size of a process of its own, less that of a process that only
imports the same libraries, so that a small model is not drowned by them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHARED = Path(os.environ.get("POCKETLLM_SHARED", Path(__file__).parents[1] / "../shared"))
IMPORTS = (
    "import resource, torch, transformers; from transformers import AutoModelForCausalLM; "
    "import transformers.models.llama.modeling_llama; from pocketllm import compressor, hf; "
)
PEAK = "; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
LOAD = "m = AutoModelForCausalLM.from_pretrained({folder!r}, dtype='auto')"
RUN = "; m(torch.zeros(1, 16, dtype=torch.long))"
COMPRESS = (
    "from pocketllm import PocketConfig; compressor.compress({model!r}, {out!r}, "
    "PocketConfig(bits={bits}, calibration={calibration!r}), progress=False)"
)


def peak(statement: str) -> int:
    """Peak resident bytes of a fresh interpreter that runs one statement."""
    output = subprocess.run(
        [sys.executable, "-c", IMPORTS + statement + PEAK],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ).stdout
    return int(output.split()[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(SHARED / "models/reference"))
    parser.add_argument("--calibration")
    parser.add_argument("--bits", type=float, default=3.0)
    arguments = parser.parse_args()
    libraries = peak("pass")
    print(f"libraries alone                {libraries / 2**20:8.0f} MiB")

    def show(label: str, statement: str) -> None:
        print(f"{label:30s} {(peak(statement) - libraries) / 2**20:+8.1f} MiB", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        out = str(Path(scratch) / "out")
        calibration = arguments.calibration and str(Path(arguments.calibration).absolute())
        model = str(Path(arguments.model).absolute())
        show(
            "compress",
            COMPRESS.format(model=model, out=out, bits=arguments.bits, calibration=calibration),
        )
        for label, folder in (("dense", model), ("compressed", out)):
            show(f"load {label}", LOAD.format(folder=folder))
            show(f"load and run {label}", LOAD.format(folder=folder) + RUN)


if __name__ == "__main__":
    main()
