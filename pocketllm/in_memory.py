"""Compress a model that transformers has loaded, without a folder: what quantise-on-load does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .compressor import Compression, quantization_record
from .dense import check_finite
from .errors import PocketError
from .planning import make_plan
from .weights import LoadedWeights

if TYPE_CHECKING:
    from torch import nn

    from .checkpoint_write import CodecData, ModuleData
    from .config import PocketConfig


class _Memory:
    """In place of the folder of finished parts: there is nothing to resume."""

    folder = None

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, np.ndarray]] = {}

    def load(self, name: str) -> None:
        """No part is there from an earlier run."""

    def part(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of a part of this run, or None."""
        return self._parts.get(name)

    def store(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Keeps them."""
        self._parts[name] = arrays


def compress_in_memory(
    model: nn.Module, config: PocketConfig
) -> tuple[list[CodecData], list[ModuleData], dict[str, Any]]:
    """Compress a dense transformers model; its weights are only read, unless it is calibrated.

    Args:
        model: loaded causal LM.
        config: settings. Calibration needs the model's folder, for its tokenizer.

    Returns:
        Codecs, matrices, and what quantization_config records of the settings.

    Raises:
        PocketError: as ``compress`` would.
    """
    folder = Path(model.config.name_or_path or "")
    if config.calibration is not None and not (folder / "config.json").is_file():
        raise PocketError(
            "calibration: needs a model loaded from a folder, whose tokenizer it uses;"
            " compress to a folder instead"
        )
    check_finite(model)
    plan = make_plan(model, config)
    weights = LoadedWeights(model)
    run = Compression(weights, folder, config, plan, _Memory(), False)  # type: ignore[arg-type]
    codecs, modules = run.encode_all()
    return codecs, modules, quantization_record(config, run.plan, model)
