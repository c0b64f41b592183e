"""What each command does. Heavy imports stay inside the functions: a command pays for its own."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import text
from .config import PRESETS, PocketConfig
from .errors import PocketError

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .compressor import CompressResult
    from .planning import Plan

# A tensor with at least this share of the weight files is named when it stays dense.
LARGE_SHARE = 0.01
SLOW = "slower than dense bf16 for one token here"
# What is faster than codecs that are slow: is it one of trellis codes? -> advice.
FASTER = {
    True: "fewer bits are faster, and so are the codebooks of --prefer speed",
    False: "d = 4 with up to 4,096 codewords is fast",
}
SIZE_SETTINGS = ("bits", "target_size", "subvector", "codebook")


def config_from(arguments: argparse.Namespace) -> PocketConfig:
    """The settings that options and ``--config`` ask for; an option wins over the file.

    A size given as an option replaces every size setting of the file.

    Raises:
        PocketError: unreadable file, unknown setting, or a value out of range.
    """
    values: dict[str, Any] = {}
    if arguments.config:
        values = PocketConfig.from_file(arguments.config).to_dict()
    size = {
        name: getattr(arguments, name)
        for name in SIZE_SETTINGS
        if getattr(arguments, name) is not None
    }
    if arguments.preset:
        size = PRESETS[arguments.preset]
    if size:
        values = {k: v for k, v in values.items() if k not in SIZE_SETTINGS} | size
    if arguments.embeddings is not None:
        values["embeddings"] = arguments.embeddings == "on"
    for name in ("codec", "prefer", "calibration", "seed", "workers"):
        if getattr(arguments, name) is not None:
            values[name] = getattr(arguments, name)
    return PocketConfig.from_dict(values)


def write_json(path: str | None, values: dict[str, Any]) -> None:
    """Write figures to the file that ``--json`` names, if any."""
    if path is not None:
        Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check_json(path: str | None) -> None:
    """Refuse a ``--json`` that cannot be written, before the work rather than after it."""
    if path is None:
        return
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise PocketError(f"--json: no folder {folder} to write {Path(path).name} into")
    if Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise PocketError(f"--json: {path} cannot be written")


def run_demo(arguments: argparse.Namespace) -> None:
    """The whole job on the model that ships with the package."""
    from .demo import run_demo as run

    check_json(arguments.json)
    write_json(arguments.json, run(arguments.out))


def run_compress(arguments: argparse.Namespace) -> None:
    """Compress a model, or with ``--dry-run`` say what that would take."""
    from .compressor import compress, plan

    config = config_from(arguments)
    check_json(arguments.json)
    if arguments.dry_run:
        planned = plan(arguments.model, config)
        print_plan(planned)
        write_json(arguments.json, plan_json(planned))
        return
    result = compress(arguments.model, arguments.out, config, resume=arguments.resume)
    print_result(result)
    write_json(arguments.json, result_json(result))


def print_result(result: CompressResult) -> None:
    """What a compression made: a row for each matrix, the totals, and what a user should know."""
    from .checkpoint import open_checkpoint

    checkpoint = open_checkpoint(result.out, check=False)
    header = ["tensor", "shape", "codec", "bits", "bytes", "error"]
    if result.output_errors:
        header.append("output error")
    rows = []
    for row in checkpoint.rows():
        if row["name"] not in result.errors:
            continue
        cells = [row["name"], _shape(row), row["codec"], f"{row['bits']:.3f}", f"{row['bytes']:,}"]
        cells.append(f"{result.errors[row['name']]:.4f}")
        if result.output_errors:
            error = result.output_errors.get(row["name"])
            cells.append("-" if error is None else f"{error:.4f}")
        rows.append(cells)
    cost = f"{text.duration(result.seconds)}, at most {text.size(result.peak_memory)} of memory"
    lines = [*totals(checkpoint), ("it took", cost), ("it is in", str(result.out))]
    print(f"{text.table(header, rows)}\n\n{text.facts(lines)}")
    for warning in result.warnings:
        print(f"note: {warning}")


def result_json(result: CompressResult) -> dict[str, Any]:
    """A compression's figures as ``--json`` writes them."""
    return {
        "bits_per_weight": result.bits_per_weight,
        "bytes": result.bytes,
        "bytes_bf16": result.bytes_bf16,
        "seconds": result.seconds,
        "peak_memory": result.peak_memory,
        "errors": result.errors,
        "output_errors": result.output_errors,
        "warnings": result.warnings,
    }


def print_plan(plan: Plan) -> None:
    """What a compression would do, predicted."""
    speeds = plan.speeds or {}
    rows = [
        (
            spec.name,
            "-" if spec.is_trellis else str(spec.subvector),
            "-" if spec.is_trellis else f"{spec.codebook:,}",
            spec.storage,
            str(sum(plan.codec_of[t.name] == name for t in plan.targets)),
            f"{sum(t.weights for t in plan.targets if plan.codec_of[t.name] == name):,}",
            f"{speeds[name]:.2g}x" if name in speeds else "-",
        )
        for name, spec in plan.codecs.items()
    ]
    header = ("codec", "d", "K", "stored as", "tensors", "weights", "speed vs bf16")
    print(text.table(header, rows))
    lines = [
        ("memory", f"up to {text.size(plan.memory)}"),
        ("weight files", against("bf16", plan.bytes_bf16, plan.bytes)),
        ("bits per weight", f"{plan.bits_per_weight:.3f} over {plan.weights:,} weights"),
    ]
    if plan.seconds is not None:
        lines.insert(0, ("time", f"about {text.duration(plan.seconds)}"))
    for tensor in plan.dense:
        lines.append(("left dense", f"{tensor.name}: {tensor.weights:,} weights, {tensor.reason}"))
    print(f"\n{text.facts(lines)}")
    for is_trellis, advice in FASTER.items():
        alike = [name for name, spec in plan.codecs.items() if spec.is_trellis == is_trellis]
        slow = [name for name in alike if speeds.get(name, 1) < 1]
        if slow:
            print(f"note: {', '.join(slow)}: {SLOW}; {advice}")


def plan_json(plan: Plan) -> dict[str, Any]:
    """The prediction as ``--dry-run --json`` writes it."""
    return {
        "bits_per_weight": plan.bits_per_weight,
        "bytes": plan.bytes,
        "bytes_bf16": plan.bytes_bf16,
        "seconds": plan.seconds,
        "memory": plan.memory,
        "speeds": plan.speeds,
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "codec": plan.codec_of[t.name]}
            for t in plan.targets
        ],
        "dense": [{"name": t.name, "weights": t.weights, "reason": t.reason} for t in plan.dense],
    }


def run_inspect(arguments: argparse.Namespace) -> None:
    """List the tensors of a compressed folder and its totals."""
    from .checkpoint import open_checkpoint

    check_json(arguments.json)
    checkpoint = open_checkpoint(arguments.folder, check=False)
    rows = checkpoint.rows()
    header = ("tensor", "kind", "shape", "codec", "bits", "bytes", "share")
    print(text.table(header, [_inspect_row(row) for row in rows]))
    print(f"\n{text.facts(totals(checkpoint))}")
    write_json(arguments.json, checkpoint.to_json())


def _inspect_row(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        row["kind"],
        _shape(row),
        row["codec"] or "-",
        "-" if row["bits"] is None else f"{row['bits']:.3f}",
        f"{row['bytes']:,}",
        f"{100 * row['share']:.1f} %",
    ]


def _shape(row: dict[str, Any]) -> str:
    return " x ".join(map(str, row["shape"])) or "scalar"


def totals(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """The summary under a listing: sizes, bits per weight, and what stays dense."""
    total = checkpoint.bytes
    dense = sorted(checkpoint.dense.values(), key=lambda tensor: -tensor.nbytes)
    kept = sum(tensor.nbytes for tensor in dense)
    lines = [
        ("weight files", against("bf16", checkpoint.bytes_bf16, total)),
        ("", against("fp32", checkpoint.bytes_fp32, total)),
        (
            "bits per weight",
            f"{checkpoint.bits_per_weight:.3f} over the {checkpoint.layout.weights:,} weights of"
            " compressed tensors, codecs and scales included",
        ),
        ("left dense", f"{text.size(kept)}, {kept / total:.1%} of the files"),
    ]
    for tensor in dense:
        if tensor.nbytes >= LARGE_SHARE * total:
            share = f"{text.size(tensor.nbytes)}, {tensor.nbytes / total:.1%}"
            lines.append(("", f"{tensor.name}: {share}"))
    return lines


def against(dtype: str, dense: int, compressed: int) -> str:
    """How a size compares with the dense model's in some dtype."""
    ratio = text.times(dense, compressed)
    return f"{text.size(compressed)}, {ratio} smaller than {dtype} ({text.size(dense)})"


def run_eval(arguments: argparse.Namespace) -> None:
    """Measure a model on texts and tasks."""
    from .evaluate import evaluate

    check_json(arguments.json)
    figures = evaluate(
        arguments.folder,
        arguments.text,
        arguments.tasks,
        include_path=arguments.include_path,
        limit=arguments.limit,
        against=arguments.against,
    )
    print_figures(figures)
    write_json(arguments.json, figures)


def print_figures(figures: dict[str, Any]) -> None:
    """Perplexities and divergences by text, metrics by task, and the model's size."""
    columns = {"perplexity": "perplexity", "perplexity_dense": "dense", "kl": "KL", "top1": "top-1"}
    columns = {key: title for key, title in columns.items() if figures.get(key)}
    if columns:
        rows = [
            [name, *(f"{figures[key][name]:.4f}" for key in columns)]
            for name in figures["perplexity"]
        ]
        print(text.table(["text", *columns.values()], rows) + "\n")
    if figures["tasks"]:
        rows = [
            [task, metric, f"{value:.4f}"]
            for task, metrics in figures["tasks"].items()
            for metric, value in metrics.items()
        ]
        print(text.table(["task", "metric", "value"], rows) + "\n")
    size = against("bf16", figures["bytes_bf16"], figures["bytes"])
    bits = f"{figures['bits_per_weight']:.3f}"
    print(text.facts([("weight files", size), ("bits per weight", bits)]))


def run_verify(arguments: argparse.Namespace) -> None:
    """Read everything a compressed folder holds and check it."""
    from .checkpoint import open_checkpoint

    checkpoint = open_checkpoint(arguments.folder, check=True)
    print(
        f"{arguments.folder}: whole: checksums, shapes and index ranges of"
        f" {len(checkpoint.tensors)} tensors agree ({text.size(checkpoint.bytes)})"
    )


def run_decompress(arguments: argparse.Namespace) -> None:
    """Write the dense model that a compressed folder stands for."""
    from tqdm import tqdm

    from .checkpoint import check_output, decompress, open_checkpoint
    from .schema import MODULE_DTYPES
    from .tensorfile import DTYPES

    check_output(arguments.out)
    checkpoint = open_checkpoint(arguments.folder, check=False)
    total = sum(tensor.nbytes for tensor in checkpoint.dense.values())
    for module in checkpoint.layout.modules.values():
        total += module.weights * DTYPES[MODULE_DTYPES[module.dtype]][0]
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=None) as bar:
        decompress(arguments.folder, arguments.out, progress=bar.update)
    print(f"{arguments.out}: dense, {text.size(total)}; transformers loads it without pocketllm")


def run_generate(arguments: argparse.Namespace) -> None:
    """Continue a prompt, streaming the text to standard output."""
    import torch
    from transformers import AutoModelForCausalLM, TextStreamer
    from transformers.utils import logging

    from ._autoload import install
    from .dense import load_tokenizer, source_folder

    folder = source_folder(arguments.folder)
    tokenizer = load_tokenizer(folder)
    install()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise PocketError("--prompt: it has no tokens, give at least one character")
    torch.manual_seed(arguments.seed)
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if arguments.temperature is not None:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            **sampling,
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )
    seconds = time.perf_counter() - start
    added = output.shape[1] - inputs["input_ids"].shape[1]
    print(f"{added} tokens in {seconds:.1f} s, {added / seconds:.1f} tokens/s", file=sys.stderr)
