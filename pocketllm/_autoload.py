"""Make transformers and lm-eval know pocketllm without an explicit import.

torch calls :func:`install` when it is imported (entry point of the group ``torch.backends``), and
so does ``import pocketllm``. It imports nothing heavy: it waits for transformers' registry of
quantizers and lm-eval's of models to be imported and registers then. Nothing here may raise:
``import torch`` would fail.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# Registry -> the last thing its module defines: with it in place the module is whole.
REGISTRIES = {"transformers.quantizers.auto": "get_hf_quantizer", "lm_eval.models": "__all__"}


def install() -> None:
    """Register with every registry that is imported, and with the others as soon as they are."""
    waiting = {name for name in REGISTRIES if not _is_whole(name)}
    for name in REGISTRIES.keys() - waiting:
        _register(name)
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(waiting))


def _is_whole(name: str) -> bool:
    return hasattr(sys.modules.get(name), REGISTRIES[name])


def _register(name: str) -> None:
    package = name.partition(".")[0]
    try:
        if package == "lm_eval":
            _register_with_lm_eval()
        else:
            from . import hf

            # Absent while hf itself is being imported: it registers at its end.
            if hasattr(hf, "register"):
                hf.register()
    except Exception as error:  # an incompatible version must not break torch or the package
        warnings.warn(f"pocketllm cannot register with {package}: {error}", stacklevel=2)


def _register_with_lm_eval() -> None:
    """Enter the model type under its name; the class is imported when it is asked for."""
    from lm_eval.api.registry import model_registry

    if "pocketllm" not in model_registry:
        model_registry.register("pocketllm", target="pocketllm.lm_eval_plugin:PocketLM")


class _Finder(importlib.abc.MetaPathFinder):
    """Sees a registry's import, lets the other finders do it, and registers after it."""

    def __init__(self, waiting: set[str]) -> None:
        self._waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """None for everything but the registries."""
        for name in [name for name in self._waiting if _is_whole(name)]:
            self._done(name)
            _register(name)
        if fullname in self._waiting and fullname not in sys.modules:
            self._done(fullname)
            for finder in sys.meta_path:
                find = getattr(finder, "find_spec", None)
                if finder is self or find is None:
                    continue
                spec = find(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader)
                    return spec
        return None

    def _done(self, name: str) -> None:
        self._waiting.discard(name)
        if not self._waiting and self in sys.meta_path:
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
        _register(module.__name__)
