"""Make transformers know pocketllm checkpoints without an explicit import.

torch calls :func:`install` when it is imported (entry point of the group ``torch.backends``), and
so does ``import pocketllm``. It imports nothing heavy: it waits for transformers' registry of
quantizers to be imported and registers then. Nothing here may raise: ``import torch`` would fail.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

REGISTRY = "transformers.quantizers.auto"
# The last thing the registry module defines: with it in place the module is whole.
LAST_NAME = "get_hf_quantizer"


def install() -> None:
    """Register with transformers now, if its registry is imported, or as soon as it is."""
    if _registry_is_whole():
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _registry_is_whole() -> bool:
    return hasattr(sys.modules.get(REGISTRY), LAST_NAME)


def _register() -> None:
    try:
        from . import hf

        hf.register()
    except Exception as error:  # an incompatible transformers must not break torch or transformers
        warnings.warn(f"pocketllm cannot register with transformers: {error}", stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """Sees the registry's import, lets the other finders do it, and registers after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """None for everything but the registry."""
        if _registry_is_whole():
            self._remove()
            _register()
        elif fullname == REGISTRY and fullname not in sys.modules:
            self._remove()
            for finder in sys.meta_path:
                find = getattr(finder, "find_spec", None)
                spec = find(fullname, path, target) if find is not None else None
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader)
                    return spec
        return None

    def _remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class _Loader(importlib.abc.Loader):
    """The registry's own loader, followed by the registration."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """The original loader's."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """The original loader's, then register."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
