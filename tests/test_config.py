"""Settings: what is refused, and with which sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pocketllm.config import PRESETS, PocketConfig
from pocketllm.errors import PocketError


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"bits": 0}, "bits: got 0, want a positive number"),
        ({"bits": float("nan")}, "bits: got nan"),
        ({"bits": 17}, "want 0.1 to 16"),
        ({"bits": True}, "bits: got True"),
        ({"bits": 3, "target_size": 10**9}, "bits and target_size: these exclude each other"),
        ({"subvector": 4}, "give both or neither"),
        ({"subvector": 17, "codebook": 256}, "subvector: got 17, want an integer from 1 to 16"),
        ({"subvector": 4, "codebook": 1}, "codebook: got 1, want an integer from 2 to 65536"),
        ({"prefer": "size"}, "prefer: got 'size', want one of quality, speed"),
        ({"norm": "batch"}, "norm: got 'batch', want one of input, ln, rln"),
        ({"share": "layer"}, "share: got 'layer'"),
        ({"seed": -1}, "seed: got -1"),
        ({"workers": 0}, "workers: got 0"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
        ({"norm": "rln", "table_dtype": "int8"}, 'needs a foldable norm ("input" or "ln")'),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PocketError) as failure:
        PocketConfig(**values)
    assert sentence in str(failure.value)
    assert "\n" not in str(failure.value)


def test_presets_are_the_published_settings() -> None:
    for name in PRESETS:
        config = PocketConfig.preset(name, seed=7)
        assert config.norm == "rln" and config.hidden == 16 and config.codebook_loss == 0.5
        assert config.learning_rate == 1.6e-2 and config.batch == 16384 and config.seed == 7
    assert (
        PocketConfig.preset("paper-16x").subvector,
        PocketConfig.preset("paper-16x").codebook,
    ) == (8, 32768)
    with pytest.raises(PocketError, match="preset: got 'paper-20x', want one of"):
        PocketConfig.preset("paper-20x")


def test_file_round_trip(tmp_path: Path) -> None:
    config = PocketConfig(
        subvector=4, codebook=300, calibration="text.txt", modules_to_not_convert=["k_proj"]
    )
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(config.to_dict()))
    assert PocketConfig.from_file(path) == config


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds list, want an object"),
        ('{"bit": 3}', "unknown setting 'bit'"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(content)
    with pytest.raises(PocketError, match=sentence):
        PocketConfig.from_file(path)
    with pytest.raises(PocketError, match="cannot read"):
        PocketConfig.from_file(tmp_path / "missing.json")
