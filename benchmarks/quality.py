"""Quality at a given size: plain k-means, the published codec, codebooks and trellis codes.

    python benchmarks/quality.py --model MODEL --text FILE [--calibration FILE]
                                 [--llama-cpp Q4_K_M Q2_K] [--json FILE]

Every row is measured through the real path: compressed to a folder, loaded from it, compared with
the dense model. Each number of bits is met with trellis codes, the default, and with codebooks,
without and with calibration. The k-means rows are plain vector quantisation of the same sub-vector
length and codebook size as a preset's, without and with a scale a row; their bits count indices,
codebook and scales as ours do. So do those of the kinds that llama.cpp quantises to, here without
importance matrix: their weights as float32 in the dense model. docs/METHOD.md holds the table for
the reference model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import torch

from pocketllm import PocketConfig, compress, kernels, show_config
from pocketllm.allocate import Shape, payload_bits
from pocketllm.dense import load_model, load_tokenizer
from pocketllm.evaluate import compare, load
from pocketllm.kmeans import kmeans
from pocketllm.layout import matrix_of, normalise, walk

SHARED = Path(os.environ.get("POCKETLLM_SHARED", Path(__file__).parents[1] / "../shared"))
KMEANS_ITERATIONS = 15
# What meets a number of bits, and its name in the table.
CODECS = {"trellis": "trellis codes", "codebook": "codebooks"}


def kmeans_model(model: torch.nn.Module, shape: Shape, *, row_scale: bool, seed: int) -> float:
    """Replace every linear's weight by its k-means quantisation; returns bits per weight."""
    targets, _ = walk(model, embeddings=False)
    d = shape.subvector
    rows = {
        t.name: normalise(matrix_of(model.get_submodule(t.name), t.kind), d, row_scale=row_scale)
        for t in targets
    }
    everything = np.concatenate([r.values.reshape(-1, d) for r in rows.values()])
    book = kmeans(everything, shape.codewords, iterations=KMEANS_ITERATIONS, seed=seed).codebook
    book = book.astype(np.float16).astype(np.float32)
    bits = 16 * book.size
    for target in targets:
        row = rows[target.name]
        decoded = book[kernels.nearest(row.values.reshape(-1, d), book)].reshape(row.values.shape)
        weight = decoded[:, : target.shape[1]] * row.scale.astype(np.float32)[:, None]
        matrix = weight.T if target.kind == "conv1d" else weight
        model.get_submodule(target.name).weight.data.copy_(torch.from_numpy(matrix))
        bits += payload_bits(target, shape, row_scale=row_scale, row_shift=False)
    return bits / sum(t.weights for t in targets)


def llama_cpp_models(
    path: Path, kinds: list[str]
) -> Iterator[tuple[str, float, torch.nn.Module, float]]:
    """What llama.cpp makes of a Llama's decoder matrices, of each kind: name, bits per weight, the
    dense model with their values, seconds of quantising."""
    if not kinds or not llamacpp.is_installed():
        return
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "dense.gguf"), Path(scratch, "quantised.gguf")
        model = load_model(path).float()
        targets, _ = walk(model, embeddings=False)
        llamacpp.write_gguf(source, model)
        for kind in kinds:
            start = time.perf_counter()
            llamacpp.quantise_gguf(source, target, kind)
            seconds = time.perf_counter() - start
            bits = llamacpp.take_weights(model, [t.name for t in targets], target)
            yield f"llama.cpp {kind}", bits, model, seconds


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of the table."""
    tokenizer = load_tokenizer(arguments.model)
    dense = load(arguments.model)
    results = []

    def add(name: str, bits: float, model: torch.nn.Module, seconds: float) -> None:
        entry: dict[str, Any] = {"method": name, "bits_per_weight": bits, "seconds": seconds}
        for text in arguments.text:
            figures = compare(
                dense, model, tokenizer, text, max_windows=arguments.windows, progress=False
            )
            entry[text.name] = figures
        results.append(entry)
        first = entry[arguments.text[0].name]
        print(
            f"{name:44s} {bits:6.3f} bits  kl {first['kl']:.4f}  "
            f"ppl {first['perplexity']:8.2f}  top-1 {first['top1']:.3f}  {seconds:5.0f} s",
            flush=True,
        )

    for d, codewords in arguments.kmeans:
        for row_scale in (False, True):
            model = load_model(arguments.model).float()
            start = time.perf_counter()
            bits = kmeans_model(model, Shape(d, codewords), row_scale=row_scale, seed=0)
            label = f"k-means{' + row scale' if row_scale else ''}, d={d} K={codewords}"
            add(label, bits, model, time.perf_counter() - start)
    for row in llama_cpp_models(arguments.model, arguments.llama_cpp):
        add(*row)
    configs = [(f"preset {p}", PocketConfig.preset(p)) for p in arguments.preset]
    calibrations = {"": None}
    if arguments.calibration:
        calibrations[", calibrated"] = str(arguments.calibration)
    for bits, codec, (label, text) in itertools.product(
        arguments.bits, arguments.codec, calibrations.items()
    ):
        config = PocketConfig(bits=bits, codec=codec, calibration=text)
        configs.append((f"{CODECS[codec]}, {bits} bits{label}", config))
    for name, config in configs:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            result = compress(arguments.model, out, config, progress=False)
            add(name, result.bits_per_weight, load(out), result.seconds)
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=SHARED / "models/reference")
    parser.add_argument(
        "--text", type=Path, nargs="+",
        default=[SHARED / "data/heldout.txt", SHARED / "data/wikitext2_test.txt"],
    )  # fmt: skip
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--windows", type=int, default=64, help="evenly spread windows of a text")
    parser.add_argument("--kmeans", type=shape, nargs="*", default=[(8, 32768)], metavar="DxK")
    parser.add_argument("--preset", nargs="*", default=["paper-16x"])
    parser.add_argument("--bits", type=float, nargs="*", default=[2.0, 3.0, 4.0])
    parser.add_argument("--codec", nargs="*", choices=list(CODECS), default=list(CODECS))
    parser.add_argument("--llama-cpp", nargs="*", default=[], metavar="KIND", help="as in Q4_K_M")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(show_config(), f"torch {torch.__version__}", sep="; ")
    results = measure(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def shape(text: str) -> tuple[int, int]:
    """``8x32768`` as (8, 32768)."""
    d, codewords = text.split("x")
    return int(d), int(codewords)


if __name__ == "__main__":
    main()
