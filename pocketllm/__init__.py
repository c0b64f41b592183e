"""pocketllm: LLM checkpoints several times smaller, run from the small form.

Importing this package is cheap: what needs torch or transformers is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ._autoload import install as _install

__version__ = "0.1.0"

_HOME = {
    "PocketConfig": "config",
    "PocketError": "errors",
    "CheckpointError": "errors",
    "PocketLinear": "linear",
    "PocketEmbedding": "linear",
    "compress": "compressor",
    "plan": "compressor",
    "open_checkpoint": "checkpoint",
    "decompress": "checkpoint",
    "show_config": "kernels",
}
__all__ = [*_HOME, "kernels", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module(".kernels", __name__)
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_install()
