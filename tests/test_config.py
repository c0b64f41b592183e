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
        ({"codec": "qtip"}, "codec: got 'qtip', want one of auto, trellis, codebook"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PocketError) as failure:
        PocketConfig(**values)
    assert sentence in str(failure.value)
    assert "\n" not in str(failure.value)


# Each asks for codebooks.
FOR_CODEBOOKS: list[dict[str, Any]] = [
    {"subvector": 4, "codebook": 256},
    {"prefer": "speed"},
    {"norm": "ln"},
    {"table_dtype": "float16"},
    {"share": "model"},
    {"codebook_init": "normal"},
    {"hidden": 8},
    {"epochs": 3},
    {"batch": 4096},
    {"row_scale": False},
]


@pytest.mark.parametrize("values", FOR_CODEBOOKS, ids=str)
def test_trellis_codes_do_not_go_with_settings_of_codebooks(values: dict[str, Any]) -> None:
    """The sentence names the setting; without a codec asked for, the setting decides."""
    name, value = next(iter(values.items()))
    with pytest.raises(PocketError) as failure:
        PocketConfig(codec="trellis", **values)
    assert f'codec: "trellis" does not go with {name} = {value!r}: leave that' in str(failure.value)
    assert "\n" not in str(failure.value)
    for codec in ("auto", "codebook"):
        assert not PocketConfig(codec=codec, **values).has_trellis


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_no_trellis(name: str) -> None:
    assert not PocketConfig.preset(name).has_trellis
    with pytest.raises(PocketError, match="does not go with subvector = "):
        PocketConfig.preset(name, codec="trellis")


def test_trellis_codes_are_the_default() -> None:
    for values in ({}, {"bits": 2.5}, {"target_size": 10**9}, {"row_shift": True, "seed": 3}):
        assert PocketConfig(**values).has_trellis
        assert PocketConfig(codec="trellis", **values).has_trellis
        assert not PocketConfig(codec="codebook", **values).has_trellis


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
