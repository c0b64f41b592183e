"""The demo's data are what their README says, and the demo runs from end to end."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pocketllm import demo, evaluate
from pocketllm.checkpoint import open_checkpoint
from pocketllm.errors import PocketError


def record() -> dict[str, Any]:
    """What the training script wrote down."""
    values: dict[str, Any] = json.loads((demo.DATA / "training.json").read_text(encoding="utf-8"))
    return values


def test_data_is_small_and_the_text_is_the_recorded_one() -> None:
    size = sum(path.stat().st_size for path in demo.DATA.iterdir())
    assert 2e6 < size < 6.2e6
    heldout = demo.HELDOUT.read_bytes()
    assert hashlib.sha256(heldout).hexdigest() == record()["heldout_sha256"]
    assert 60_000 < len(heldout) < 100_000


def test_no_heldout_paragraph_is_in_the_calibration_text() -> None:
    def paragraphs(path: Path) -> set[str]:
        found = {" ".join(p.split()) for p in path.read_text(encoding="utf-8").split("\n\n")}
        return {p for p in found if len(p) >= 40}

    held = paragraphs(demo.HELDOUT)
    assert len(held) > 100
    assert not held & paragraphs(demo.CALIBRATION)


def test_dense_model_predicts_the_heldout_text() -> None:
    model, tokenizer = evaluate.load(demo.DATA), evaluate.load_tokenizer(demo.DATA)
    found = evaluate.perplexity(model, tokenizer, demo.HELDOUT, progress=False)
    # The script also counts the last, shorter window.
    assert found == pytest.approx(record()["heldout_perplexity"], rel=0.02)
    assert found < record()["heldout_unigram_perplexity"] / 6


def test_demo_from_end_to_end(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    short = tmp_path / "short.txt"
    short.write_text(demo.HELDOUT.read_text(encoding="utf-8")[:12_000], encoding="utf-8")
    monkeypatch.setattr(demo, "HELDOUT", short)
    monkeypatch.setattr(demo, "CALIBRATION_WINDOWS", 4)
    out = tmp_path / "out"
    report = demo.run_demo(out, sizes=(3.0,), progress=False)

    dense, small = report["models"]
    assert [dense["label"], small["label"]] == ["dense", "3-bit"]
    assert dense["perplexity"] < small["perplexity"] < 1.5 * dense["perplexity"]
    assert 0 < small["kl"] < 0.5
    assert 0.5 < small["top1"] < 1
    checkpoint = open_checkpoint(out / "3-bit", check=True)
    assert small["bytes"] == checkpoint.bytes < dense["bytes"]
    assert small["bits_per_weight"] == checkpoint.bits_per_weight
    assert report["bytes_bf16"] == checkpoint.bytes_bf16
    for model in report["models"]:
        assert model["sample"].startswith(demo.PROMPT)
        assert len(model["sample"]) > len(demo.PROMPT) + 20
    assert json.loads((out / demo.FIGURES).read_text(encoding="utf-8")) == report
    printed = capsys.readouterr().out
    assert small["sample"] in printed
    assert f"{small['perplexity']:.3f}" in printed
    assert str(out / "3-bit") in printed
    if report["picture"] is not None:
        assert Path(report["picture"]).read_bytes().startswith(b"\x89PNG")


def test_an_earlier_demo_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    names = {"3-bit": 3.0}
    for name in ("3-bit", "3-bit.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("old", encoding="utf-8")
    (tmp_path / demo.FIGURES).write_text("{}", encoding="utf-8")
    demo._prepare(tmp_path, names)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "3-bit").mkdir()
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(PocketError, match=r"holds thesis\.txt"):
        demo._prepare(tmp_path, names)
    assert {path.name for path in tmp_path.iterdir()} == {"3-bit", "thesis.txt"}


def test_missing_data_and_an_impossible_folder(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(PocketError, match="cannot make the folder"):
        demo._prepare(tmp_path / "file", {"3-bit": 3.0})
    monkeypatch.setattr(demo, "HELDOUT", tmp_path / "heldout.txt")
    with pytest.raises(PocketError, match="missing from the installed package"):
        demo._prepare(tmp_path / "out", {"3-bit": 3.0})
