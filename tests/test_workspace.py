"""Finished parts survive, foreign jobs are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pocketllm.errors import PocketError
from pocketllm.workspace import Workspace, fingerprint


def test_parts_survive_and_foreign_jobs_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "small"
    first = Workspace(out, {"seed": 0, "source": "a"}, resume=False)
    assert first.load("part") is None
    first.store("part", {"x": np.arange(5, dtype=np.int32)})
    with pytest.raises(PocketError, match="add --resume"):
        Workspace(out, {"seed": 0, "source": "a"}, resume=False)
    with pytest.raises(PocketError, match="another process is working on it"):
        Workspace(out, {"seed": 0, "source": "a"}, resume=True)
    first.__exit__()
    with pytest.raises(PocketError, match="begun with another seed"):
        Workspace(out, {"seed": 1, "source": "a"}, resume=True)
    again = Workspace(out, {"seed": 0, "source": "a"}, resume=True)
    part = again.load("part")
    assert part is not None and part["x"].tolist() == [0, 1, 2, 3, 4]
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_resume_without_a_job_starts_one(tmp_path: Path) -> None:
    assert Workspace(tmp_path / "small", {"seed": 0}, resume=True).load("part") is None


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PocketError, match="cannot be written"):
        Workspace(tmp_path / "file" / "small", {}, resume=False)


def test_fingerprint_changes_with_any_byte(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    before = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    assert fingerprint(tmp_path) != before
