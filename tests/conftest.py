"""Shared fixtures. Reference data lies outside the repository: POCKETLLM_SHARED names it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

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
