"""Shared fixtures. Reference data lies outside the repository: POCKETLLM_SHARED names it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pocketllm import kernels

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=kernels.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each instruction set of this machine."""
    before = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


@pytest.fixture
def float32_products() -> Iterator[None]:
    """Torch rounds no factor of a float32 product to bfloat16, whatever the processor can."""
    import torch  # not where the extension is tested alone

    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data; skips when it is not there."""
    folder = Path(os.environ.get("POCKETLLM_SHARED", "../shared"))
    folder = folder if folder.is_absolute() else (ROOT / folder).resolve()
    if not (folder / "models" / "reference" / "model.safetensors").is_file():
        pytest.skip(f"no reference data at {folder}: set POCKETLLM_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def reference_model(shared: Path) -> Path:
    """Folder of the reference model."""
    return shared / "models" / "reference"


@pytest.fixture(scope="session")
def calibration_text(shared: Path) -> Path:
    """Calibration text."""
    return shared / "data" / "calibration.txt"


@pytest.fixture(scope="session")
def heldout_text(shared: Path) -> Path:
    """In-domain evaluation text."""
    return shared / "data" / "heldout.txt"


@pytest.fixture(scope="session")
def wikitext_text(shared: Path) -> Path:
    """WikiText-2 test text."""
    return shared / "data" / "wikitext2_test.txt"


class Counter:
    """How often the kernels took a token, and through how many layers in all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = self.layers = 0
        take = kernels.token_at

        def counted(*arguments: Any) -> None:
            self.calls += 1
            self.layers += len(arguments[5]) // 3
            take(*arguments)

        monkeypatch.setattr(kernels, "token_at", counted)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts the calls of this test."""
    return Counter(monkeypatch)


@pytest.fixture
def exact() -> Iterator[None]:
    """Activations as float32."""
    before = kernels.activations()
    kernels.set_activations("float32")
    yield
    kernels.set_activations(before)
