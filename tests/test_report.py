"""Tables, the picture and the model card say what the files hold."""

from __future__ import annotations

import builtins
import struct
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model, write_tiny

from pocketllm import report
from pocketllm.checkpoint import open_checkpoint
from pocketllm.errors import PocketError
from pocketllm.report import Point

POINTS = [
    Point("dense", 4_000_000, 12.5),
    Point("3-bit", 1_000_000, 13.25, 3.01, 0.0312, 0.871),
    Point("2-bit", 800_000, 15.0, 2.02, 0.125, 0.75),
]


def test_table_has_a_line_a_model() -> None:
    lines = report.size_quality_table(POINTS, bytes_bf16=4_000_000).splitlines()
    assert len(lines) == 5
    assert lines[0].split("  ")[0] == "model"
    assert lines[3].split() == (
        ["3-bit", "1.00", "MB", "4.00x", "8.00x", "3.010", "13.250", "0.0312", "87.1", "%"]
    )
    assert lines[2].split() == ["dense", "4.00", "MB", "1.00x", "2.00x", "-", "12.500", "-", "-"]


def test_picture_is_a_png_and_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = [
        report.plot_size_quality(POINTS, tmp_path / name, title="A title", text_name="a text")
        for name in ("one.png", "two.png")
    ]
    content = paths[0].read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 600
    assert height > 400
    assert content == paths[1].read_bytes()


def test_picture_shows_every_model(tmp_path: Path, monkeypatch: Any) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    original = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure,
        "savefig",
        lambda self, *a, **k: (drawn.append(self), original(self, *a, **k)),
    )
    report.plot_size_quality(POINTS, tmp_path / "x.png", title="A title", text_name="a text")
    axes = drawn[0].axes[0]
    curve = axes.get_lines()[0].get_xydata().tolist()
    assert curve == [[0.8, 15.0], [1.0, 13.25], [4.0, 12.5]]
    assert [text.get_text().splitlines()[0] for text in axes.texts] == ["2-bit", "3-bit", "dense"]
    assert "a text" in axes.get_ylabel()


def test_picture_without_points_or_matplotlib(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(PocketError, match="points: got none"):
        report.plot_size_quality([], tmp_path / "x.png", title="", text_name="")
    original = builtins.__import__

    def without(name: str, *arguments: Any, **settings: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PocketError, match="matplotlib is not installed"):
        report.plot_size_quality(POINTS, tmp_path / "x.png", title="", text_name="")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed tiny model, embeddings dense."""
    out = tmp_path_factory.mktemp("report") / "small"
    return write_tiny(out, tiny_model("llama"), embeddings=False)


def test_card_names_base_sizes_and_what_is_dense(small: Path) -> None:
    checkpoint = open_checkpoint(small)
    card = report.model_card(
        checkpoint,
        base_model="owner/base",
        license="apache-2.0",
        calibration="wiki.txt, 128 windows of 512 tokens",
        perplexity={"wiki.txt": (11.0, 10.0), "other.txt": (7.5, None)},
        command="pocketllm eval small --text wiki.txt --against owner/base",
    )
    head, body = card.split("---\n")[1:]
    fields = dict(line.split(": ") for line in head.splitlines() if ": " in line)
    assert fields == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": "owner/base",
        "base_model_relation": "quantized",
    }
    assert "- pocketllm" in head.splitlines()
    assert body.index("import pocketllm") < body.index("## Size")
    model = tiny_model("llama")
    weights = sum(p.numel() for p in model.parameters())
    total = sum(file.stat().st_size for file in small.glob("*.safetensors"))
    assert f"{total:,} bytes" in body
    assert f"{2 * weights / total:.2f}x larger" in body
    assert f"{4 * weights / total:.2f}x larger" in body
    assert f"{checkpoint.bits_per_weight:.3f}" in body
    assert "| wiki.txt | 11.000 | 10.000 | +10.0 % |" in body
    assert "| other.txt | 7.500 | - | - |" in body
    assert "--against owner/base`" in body
    assert "wiki.txt, 128 windows" in body
    embedding = 4 * model.get_input_embeddings().weight.numel()
    assert f"| model.embed_tokens.weight | 7.20 kB | {100 * embedding / total:.1f} % |" in body
    kept = 4 * weights - 4 * checkpoint.layout.weights
    assert f"{100 * kept / total:.1f} % of the weight" in body


def test_card_of_a_folder_does_not_pose_as_a_hub_model(small: Path) -> None:
    card = report.model_card(open_checkpoint(small), base_model="reference")
    lines = card.splitlines()
    assert lines[lines.index("base_model: reference") - 1].startswith("# compressed from a folder")
    assert "Not measured yet" in card
    assert "Calibration data: none" in card
    assert not any(line.startswith("license:") for line in lines)


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ("---\nlicense: mit\ntags:\n- x\n---\n# Card\n", "mit"),
        ("---\ntags: x\n---\nlicense: mit\n", None),
        ("# Card\nlicense: mit\n", None),
        (None, None),
    ],
)
def test_licence_comes_from_the_base_models_card(
    tmp_path: Path, content: str | None, want: str | None
) -> None:
    if content is not None:
        (tmp_path / "README.md").write_text(content, encoding="utf-8")
    assert report.card_license(tmp_path) == want


def test_writing_the_card_leaves_the_checkpoint_whole(small: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    path = report.write_model_card(small, base_model="owner/base", source=tmp_path)
    assert "license: mit" in path.read_text(encoding="utf-8")
    open_checkpoint(small, check=True)
