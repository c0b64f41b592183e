"""What a person reads after a compression: tables, the size-quality picture, the model card."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import text
from .errors import PocketError

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

CARD = "README.md"
# Dense tensors with at least this share of the weight files are named in the card.
NAMED_SHARE = 0.01
INK, MUTED, LINE = "#1f2933", "#6b7785", "#2563a8"


@dataclasses.dataclass(frozen=True)
class Point:
    """One model on the size-quality curve.

    Attributes:
        label: what to call it, such as ``"3 bits"``.
        bytes: size of all weight files.
        perplexity: on the text that all points share.
        bits_per_weight: over the compressed tensors; None for the dense model.
        kl: mean KL divergence from the dense model in nats; None for the dense model.
        top1: share of positions where both find the same token likeliest.
    """

    label: str
    bytes: int
    perplexity: float
    bits_per_weight: float | None = None
    kl: float | None = None
    top1: float | None = None


def size_quality_table(points: Sequence[Point], bytes_bf16: int) -> str:
    """A line a model: size, ratios against the dense weights in bf16 and fp32, and quality.

    Args:
        points: the models, the dense one among them.
        bytes_bf16: the dense model's weights in bf16.
    """
    header = (
        "model", "weight files", "vs bf16", "vs fp32", "bits/weight", "perplexity", "KL", "top-1"
    )  # fmt: skip
    rows = [
        (
            point.label,
            text.size(point.bytes),
            text.times(bytes_bf16, point.bytes),
            text.times(2 * bytes_bf16, point.bytes),
            _figure(point.bits_per_weight, ".3f"),
            f"{point.perplexity:.3f}",
            _figure(point.kl, ".4f"),
            _figure(point.top1, ".1%").replace("%", " %"),
        )
        for point in points
    ]
    return text.table(header, rows)


def plot_size_quality(
    points: Sequence[Point], path: str | os.PathLike[str], *, title: str, text_name: str
) -> Path:
    """Draw perplexity over the size of the weight files, as a PNG.

    Args:
        points: the models; one without ``bits_per_weight`` is the dense one, drawn as the level
            to reach.
        path: the file to write.
        title: one line above the picture.
        text_name: what the perplexity was measured on.

    Raises:
        PocketError: no points, or matplotlib is not installed.
    """
    if not points:
        raise PocketError("points: got none, want at least one model to draw")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PocketError(
            'plot: matplotlib is not installed, `pip install "pocketllm-codec[plot]"` adds it'
        ) from error

    ordered = sorted(points, key=lambda point: point.bytes)
    unit, scale = ("GB", 1e9) if ordered[-1].bytes >= 1e9 else ("MB", 1e6)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    sizes = [point.bytes / scale for point in ordered]
    values = [point.perplexity for point in ordered]
    axes.plot(sizes, values, color=LINE, linewidth=2, marker="o", markersize=6, clip_on=False)
    for dense in (point for point in ordered if point.bits_per_weight is None):
        axes.axhline(dense.perplexity, color=MUTED, linewidth=1, linestyle=(0, (4, 4)), zorder=1)
    for point, size, value in zip(ordered, sizes, values, strict=True):
        last = point is ordered[-1] and len(ordered) > 1
        axes.annotate(
            f"{point.label}\n{size:.3g} {unit}, {value:.4g}",
            (size, value),
            # The curve falls from left to right: above it on its left end, below it on its right.
            xytext=(-8, -8) if last else (8, 8),
            textcoords="offset points",
            horizontalalignment="right" if last else "left",
            verticalalignment="top" if last else "bottom",
            fontsize=9,
            color=INK,
        )
    axes.set_xlim(left=0)
    axes.margins(y=0.25)
    axes.set_xlabel(f"weight files, {unit}", color=INK)
    axes.set_ylabel(f"perplexity on {text_name} (lower is better)", color=INK)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    out = Path(path)
    figure.savefig(out, dpi=150, metadata={"Software": None})
    return out


def model_card(
    checkpoint: Checkpoint,
    *,
    base_model: str,
    license: str | None = None,
    calibration: str | None = None,
    perplexity: Mapping[str, tuple[float, float | None]] | None = None,
    command: str | None = None,
) -> str:
    """The README.md of a compressed checkpoint. It depends on nothing but its arguments.

    Args:
        checkpoint: the opened folder.
        base_model: hub name of the dense model, or its folder's name.
        license: of the base model, as its card names it.
        calibration: what calibrated it; None when nothing did.
        perplexity: text name -> (compressed, dense or None).
        command: the command that gave these figures.
    """
    total = checkpoint.bytes
    lines = [
        *_front_matter(base_model, license),
        f"# {Path(base_model).name}, compressed with pocketllm",
        "",
        "```python",
        "import pocketllm  # once installed, transformers also finds it by itself",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # where this file lies, or its name on the hub',
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "```",
        "",
        "Needs `pip install pocketllm-codec`. Without it, loading stops with an error.",
        "",
        "## Size",
        "",
        "| | |",
        "|---|---|",
        f"| bits per weight | {checkpoint.bits_per_weight:.3f}, over the"
        f" {checkpoint.layout.weights:,} weights of compressed tensors, codecs and scales"
        " included |",
        f"| weight files | {total:,} bytes ({text.size(total)}) |",
        f"| base model in bf16 | {text.size(checkpoint.bytes_bf16)},"
        f" {text.times(checkpoint.bytes_bf16, total)} larger |",
        f"| base model in fp32 | {text.size(checkpoint.bytes_fp32)},"
        f" {text.times(checkpoint.bytes_fp32, total)} larger (the convention of published ratios)"
        " |",
        "",
        "## Quality",
        "",
        *_quality(perplexity, command),
        "",
        "## How it was made",
        "",
        f"Calibration data: {calibration or 'none; the weights alone were reconstructed'}.",
        "",
        "| codec | values a sub-vector | codewords | stored as |",
        "|---|---|---|---|",
        *(
            f"| {codec.name} | – | – | trellis codes |"
            if codec.is_trellis
            else f"| {codec.name} | {codec.subvector} | {codec.codebook:,} | {codec.storage} |"
            for codec in checkpoint.layout.codecs.values()
        ),
        "",
        "## Left dense",
        "",
        *_left_dense(checkpoint),
        "",
        "## Limits",
        "",
        "- Compression changes the model's answers. Measure it on your own task before you rely"
        " on it.",
        "- The packed weights are frozen: train adapters (LoRA) on top, or `pocketllm decompress`"
        " first.",
        "- It keeps the base model's own limits, biases and licence.",
    ]
    return "\n".join(lines) + "\n"


def write_model_card(
    folder: str | os.PathLike[str],
    *,
    base_model: str,
    source: str | os.PathLike[str] | None = None,
    calibration: str | None = None,
    perplexity: Mapping[str, tuple[float, float | None]] | None = None,
    command: str | None = None,
) -> Path:
    """Write ``README.md`` into a compressed folder, in place of one that is there.

    Args:
        folder: the compressed checkpoint.
        source: the base model's folder; its card says which licence applies.
        base_model, calibration, perplexity, command: as ``model_card``.

    Raises:
        CheckpointError: not a compressed checkpoint.
        OSError: it cannot be written.
    """
    from .checkpoint import open_checkpoint

    card = model_card(
        open_checkpoint(folder, check=False),
        base_model=base_model,
        license=card_license(source) if source is not None else None,
        calibration=calibration,
        perplexity=perplexity,
        command=command,
    )
    path = Path(folder, CARD)
    path.write_text(card, encoding="utf-8")
    return path


def card_license(folder: str | os.PathLike[str]) -> str | None:
    """The licence that a model folder's own card names; None without one."""
    try:
        card = Path(folder, CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    head = re.match(r"---\s*\n(.*?)\n---\s*\n", card, re.DOTALL)
    found = re.search(r"^license:\s*([\w.-]+)\s*$", head.group(1), re.MULTILINE) if head else None
    return found.group(1) if found else None


def _front_matter(base_model: str, license: str | None) -> list[str]:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if license is not None:
        lines.append(f"license: {license}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        lines.append("# compressed from a folder of this name: put its hub name here to publish")
    lines += [f"base_model: {base_model}", "base_model_relation: quantized"]
    return [*lines, "tags:", "- pocketllm", "- quantized", "- vector-quantization", "---", ""]


def _quality(
    perplexity: Mapping[str, tuple[float, float | None]] | None, command: str | None
) -> list[str]:
    if not perplexity:
        return ["Not measured yet: `pocketllm eval DIR --text FILE --against BASE` does."]
    lines = ["| text | perplexity | base model | change |", "|---|---|---|---|"]
    for name, (value, dense) in perplexity.items():
        change = "-" if dense is None else f"{value / dense - 1:+.1%}".replace("%", " %")
        lines.append(f"| {name} | {value:.3f} | {_figure(dense, '.3f')} | {change} |")
    lines += [
        "",
        "Whole text tokenised once, non-overlapping windows of 512 tokens, no beginning-of-sequence"
        " token, float32.",
    ]
    return lines if command is None else [*lines, f"Command: `{command}`"]


def _left_dense(checkpoint: Checkpoint) -> list[str]:
    total = checkpoint.bytes
    dense = sorted(checkpoint.dense.values(), key=lambda tensor: (-tensor.nbytes, tensor.name))
    kept = sum(tensor.nbytes for tensor in dense)
    lines = [
        f"{text.size(kept)} in {len(dense)} tensors, {100 * kept / total:.1f} % of the weight"
        " files, are stored as in the base model."
    ]
    named = [tensor for tensor in dense if tensor.nbytes >= NAMED_SHARE * total]
    if named:
        lines += ["", "| tensor | size | share of the files |", "|---|---|---|"]
        lines += [
            f"| {tensor.name} | {text.size(tensor.nbytes)} | {100 * tensor.nbytes / total:.1f} % |"
            for tensor in named
        ]
    return lines


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
