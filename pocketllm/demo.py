"""``pocketllm demo``: the whole path on a small model that ships with the package, no network."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import text
from .config import PocketConfig
from .errors import PocketError

if TYPE_CHECKING:
    from torch import nn

    from .report import Point

DATA = Path(__file__).parent / "demo_data"
HELDOUT, CALIBRATION = DATA / "heldout.txt", DATA / "calibration.txt"
SIZES = (3.0, 2.0)
CALIBRATION_WINDOWS = 32
PROMPT = "Return a list of"
NEW_TOKENS = 48
FIGURES, PICTURE = "demo.json", "size-quality.png"


def run_demo(
    out: str | os.PathLike[str] = "pocketllm-demo",
    *,
    sizes: Sequence[float] = SIZES,
    progress: bool = True,
) -> dict[str, Any]:
    """Compress the embedded model at a few sizes, load, measure and run each, and report.

    Prints what it does. The folder gets one checkpoint a size, ``size-quality.png`` (if matplotlib
    is installed) and ``demo.json``; those of an earlier demo in the same folder are replaced.

    Args:
        out: the folder to make.
        sizes: bits per weight, one compression each.
        progress: show progress bars.

    Returns:
        ``models``: ``label``, ``folder``, ``bytes``, ``bits_per_weight``, ``perplexity``, ``kl``,
        ``top1`` and ``sample`` of each, the dense one first; ``bytes_bf16``; ``picture``: its path
        or None; ``seconds``: wall time.

    Raises:
        PocketError: ``out`` holds something else, or cannot be written.
    """
    from .compressor import compress
    from .evaluate import compare, load
    from .report import Point, plot_size_quality, size_quality_table

    started = time.monotonic()
    names = {f"{bits:g}-bit": bits for bits in sizes}
    folder = _prepare(Path(out), names)
    tokenizer = _tokenizer(DATA)
    dense = load(DATA)
    weights = sum(parameter.numel() for parameter in dense.parameters())
    print(
        f"A Llama-type model of {weights / 1e6:.1f} million weights, trained on the text inside"
        " CPython, compressed on this machine, embeddings included.\n"
    )
    bytes_bf16 = 2 * weights
    points: list[Point] = []
    samples = {"dense": _sample(dense, tokenizer)}
    for name, bits in names.items():
        config = PocketConfig(
            bits=bits,
            embeddings=True,
            calibration=str(CALIBRATION),
            calibration_windows=CALIBRATION_WINDOWS,
        )
        result = compress(DATA, folder / name, config, progress=progress)
        for warning in result.warnings:
            print(f"{name}: {warning}")
        model = load(folder / name)
        figures = compare(dense, model, tokenizer, HELDOUT, progress=progress)
        points.append(
            Point(
                label=name,
                bytes=result.bytes,
                perplexity=figures["perplexity"],
                bits_per_weight=result.bits_per_weight,
                kl=figures["kl"],
                top1=figures["top1"],
            )
        )
        samples[name] = _sample(model, tokenizer)
        print(f"{name}: compressed in {text.duration(result.seconds)}")
    dense_bytes = (DATA / "model.safetensors").stat().st_size
    points.insert(0, Point("dense", dense_bytes, figures["perplexity_dense"]))

    print(f"\n{size_quality_table(points, bytes_bf16)}")
    print("\nPerplexity, KL and top-1 agreement with the dense model: on text kept from training.")
    print(f"\nThe models continue {PROMPT!r}:")
    for name, sample in samples.items():
        print(f"\n[{name}]\n{sample}")

    picture = _picture(points, folder / PICTURE, plot_size_quality)
    report = {
        "models": [
            {
                "label": point.label,
                "folder": str(DATA if point.label == "dense" else folder / point.label),
                "bytes": point.bytes,
                "bits_per_weight": point.bits_per_weight,
                "perplexity": point.perplexity,
                "kl": point.kl,
                "top1": point.top1,
                "sample": samples[point.label],
            }
            for point in points
        ],
        "bytes_bf16": bytes_bf16,
        "picture": None if picture is None else str(picture),
        "seconds": time.monotonic() - started,
    }
    (folder / FIGURES).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    where = [("checkpoints", ", ".join(str(folder / name) for name in names))]
    if picture is not None:
        where.append(("picture", str(picture)))
    where += [
        ("figures", str(folder / FIGURES)),
        ("dense model", str(DATA)),
        ("took", text.duration(report["seconds"])),
        ("next", f'pocketllm generate {folder / next(iter(names))} --prompt "{PROMPT}"'),
    ]
    print(f"\n{text.facts(where)}")
    return report


def _prepare(folder: Path, names: dict[str, float]) -> Path:
    """The empty output folder; what an earlier demo left in it is removed, nothing else is."""
    if not names:
        raise PocketError("sizes: got none, want at least one number of bits per weight")
    for path in (DATA / "config.json", HELDOUT, CALIBRATION):
        if not path.is_file():
            raise PocketError(f"{path}: missing from the installed package, install it again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PocketError(f"out: cannot make the folder {folder}: {error.strerror}") from error
    made = {FIGURES, PICTURE} | {f"{name}{end}" for name in names for end in ("", ".partial")}
    present = list(folder.iterdir())
    foreign = sorted(entry.name for entry in present if entry.name not in made)
    if foreign:
        raise PocketError(
            f"out: {folder} holds {foreign[0]}, which is not from this demo; name another folder"
        )
    for entry in present:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return folder


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _sample(model: nn.Module, tokenizer: Any) -> str:
    """A continuation of the prompt, sampled with a fixed seed."""
    import torch

    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            do_sample=True,
            temperature=0.7,
            top_k=50,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=tokenizer.eos_token_id,
        )
    torch.set_rng_state(generator_state)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _picture(points: list[Point], path: Path, plot: Any) -> Path | None:
    """The curve, or a hint where matplotlib is missing."""
    try:
        return Path(
            plot(
                points,
                path,
                title="pocketllm demo: size and quality",
                text_name="held-out text",
            )
        )
    except PocketError as error:
        print(f"\nNo picture: {error}")
        return None
