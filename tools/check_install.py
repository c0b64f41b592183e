"""Check that an installed pocketllm is whole: run by ``make wheel-test`` away from the source tree.

python check_install.py SITE_FOLDER
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pocketllm
from pocketllm import kernels

WANTED = ("py.typed", "demo_data/*.safetensors", "tasks/**/*.yaml")


def main() -> int:
    """Print what is installed; exit with a sentence naming the first thing that is missing."""
    site = Path(sys.argv[1]).resolve()
    package = Path(pocketllm.__file__).resolve().parent
    if package.parent != site:
        return _fail(f"pocketllm was imported from {package}, want {site}")
    for pattern in WANTED:
        if not any(package.glob(pattern)):
            return _fail(f"the wheel has no {pattern}")
    distribution = next(iter(metadata.distributions(path=[str(site)])))
    if distribution.version != pocketllm.__version__:
        return _fail(f"metadata says {distribution.version}, package {pocketllm.__version__}")
    for entry in distribution.entry_points:
        entry.load()
    print(kernels.show_config())
    return 0


def _fail(sentence: str) -> int:
    print(f"check_install: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
