"""Tokens per second of a Llama of about one billion parameters, compressed and dense.

    python benchmarks/generate.py [--shape t3] [--layers 16] [--threads N] [--prompt 512]
                                  [--new 32] [--llama-cpp Q4_K_M,Q2_K] [--json FILE] [--quick]

Speed does not depend on what the weights say, so the dense model (bfloat16, random) is made in
memory and the compressed one gets random bits; it goes through the checkpoint format,
from_pretrained and generate like any other. The head is compressed with the layers, the embedding
is only looked up. Before timing, one layer of the loaded model is compared with its dequantised
matrix. The compressed model is timed once more with transformers' decoder layers in place of ours.
The models take turns, five of generation before each with the long prompt; with one thread times
are processor time, else wall time. Each token is timed on its own, from 4 tokens of prompt on.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import llamacpp
import numpy as np
import torch
from common import Shape, column_codes, llama_config, parse_shape
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from pocketllm import decoder_layer, kernels
from pocketllm.checkpoint import ModuleData, write_checkpoint
from pocketllm.linear import PocketLinear
from pocketllm.tensorfile import ArrayTensor

# layers, hidden, intermediate, heads, key-value heads, vocabulary
SIZE = (16, 2048, 8192, 32, 8, 32000)
QUICK = (2, 64, 128, 4, 2, 256)
REPEATS = 5  # of generation for each prompt, the first not counted


def dense_model(config: LlamaConfig) -> nn.Module:
    """Random weights; normal, as an initialised layer's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def write_compressed(folder: Path, dense: nn.Module, shape: Shape) -> Path:
    """The same model with every linear layer as random bits of one codec."""
    random = np.random.default_rng(0)
    codec = shape.codec(random)
    modules, others = [], {}
    linear = {n: m for n, m in dense.named_modules() if isinstance(m, nn.Linear)}
    for name, module in linear.items():
        spec = shape.module(name, *module.weight.shape)
        payload = random.integers(0, 256, spec.payload_bytes(codec.spec), dtype=np.uint8)
        scale = np.full(spec.shape[0], 0.02, np.float16)
        modules.append(ModuleData(spec, payload, scale, columns=column_codes(spec, random)))
    for name, tensor in dense.state_dict().items():
        if name.removesuffix(".weight") not in linear:
            others[name] = ArrayTensor(tensor.view(torch.uint16).numpy(), "BF16")
    return write_checkpoint(
        folder,
        modules=modules,
        codecs=[codec],
        dense_tensors=others,
        config=dense.config.to_dict(),
    )


def check(model: nn.Module) -> None:
    """One layer's product against its dequantised matrix, in both forms of activations."""
    layer = next(m for m in model.modules() if isinstance(m, PocketLinear))
    x = torch.randn(3, layer.in_features)
    want = x.double() @ layer.dequantize().double().T
    before = kernels.activations()
    for form, bound in (("float32", 1e-5), ("integer", 0.02)):
        kernels.set_activations(form)
        error = (layer(x).double() - want).abs().max() / want.abs().max()
        assert error < bound, (form, float(error))
    kernels.set_activations(before)


Clock = Callable[[], float]
Generation = Callable[[], list[float]]


class Stamps(BaseStreamer):
    """When the prompt and each token came."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """A token, or at first the prompt."""
        self.seconds.append(self.clock())

    def end(self) -> None:
        """Nothing is left to do."""


def generation(model: nn.Module, prompt: torch.Tensor, new: int, clock: Clock) -> Generation:
    """A call that generates `new` tokens, greedily, and returns the seconds that each took."""

    def call() -> list[float]:
        stamps = Stamps(clock)
        with torch.inference_mode():
            model.generate(
                prompt,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                streamer=stamps,
            )
        return np.diff(stamps.seconds).tolist()

    return call


def llama_cpp(folder: Path, dense: nn.Module, kinds: list[str]) -> dict[str, Any]:
    """Models for llama.cpp, quantised from the same weights; empty without its packages."""
    if not kinds or not llamacpp.is_installed():
        return {}
    library = importlib.import_module("llama_cpp")
    source = folder / "dense.gguf"
    llamacpp.write_gguf(source, dense)
    models = {}
    for kind in kinds:
        target = folder / f"{kind}.gguf"
        llamacpp.quantise_gguf(source, target, kind)
        models[f"llama.cpp {kind}"] = library.Llama(
            str(target),
            n_ctx=2048,
            n_batch=512,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            verbose=False,
        )
    return models


def llama_generation(model: Any, prompt: list[int], new: int, clock: Clock) -> Generation:
    """The same for a model of llama.cpp."""

    def call() -> list[float]:
        model.reset()
        tokens = model.generate(prompt, temp=0.0, reset=False)
        stamps = [clock()]
        for _ in range(new):
            next(tokens)
            stamps.append(clock())
        return np.diff(stamps).tolist()

    return call


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Tokens per second, compressed and dense.")
    parser.add_argument(
        "--shape",
        type=parse_shape,
        default="t3",
        help="bits of trellis codes, t3c: by column; or a codebook, 4x256, 4x256s: with all signs",
    )
    parser.add_argument("--layers", type=int, default=SIZE[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the long prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--llama-cpp", default="", metavar="KINDS", help="as in Q4_K_M,Q2_K")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model; proves that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    prompt_length = 16 if options.quick else options.prompt
    new = 4 if options.quick else options.new
    size = QUICK if options.quick else (options.layers, *SIZE[1:])
    config = llama_config(size, max_position_embeddings=4096, tie_word_embeddings=False)
    dense = dense_model(config)
    with tempfile.TemporaryDirectory() as folder:
        packed = write_compressed(Path(folder, "packed"), dense, options.shape)
        start = time.perf_counter()
        compressed = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
        loading = time.perf_counter() - start
        check(compressed)
        by_operators = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
        decoder_layer.uninstall(by_operators)
        size = sum(f.stat().st_size for f in packed.glob("*.safetensors"))
        kinds = [k for k in options.llama_cpp.split(",") if k]
        others = llama_cpp(Path(folder), dense, kinds)
        prompt = torch.randint(3, config.vocab_size, (1, prompt_length))
        short = prompt[:, :4]
        runs = {
            name: (
                generation(model, prompt, 1, clock),
                generation(model, short, 1 + new, clock),
            )
            for name, model in (
                ("bf16", dense),
                ("pocketllm", compressed),
                ("pocketllm, transformers' layers", by_operators),
            )
        }
        for name, model in others.items():
            runs[name] = (
                llama_generation(model, prompt[0].tolist(), 1, clock),
                llama_generation(model, short[0].tolist(), 1 + new, clock),
            )
        times = {name: {"first_token_s": [], "token_s": []} for name in runs}
        for turn in range(options.rounds):
            for repeat, (name, (_, tokens)) in itertools.product(range(REPEATS), runs.items()):
                of_tokens = tokens()[1:]
                if turn or repeat:
                    times[name]["token_s"] += of_tokens
            for name, (first, _) in runs.items():
                times[name]["first_token_s"] += first()
    rows = []
    for name, found in times.items():
        rows.append(
            {
                "name": name,
                "tokens_per_s": 1 / float(np.quantile(found["token_s"], 0.1)),
                "tokens_per_s_median": 1 / median(found["token_s"]),
                "first_token_s": min(found["first_token_s"]),
                "first_token_s_median": median(found["first_token_s"]),
            }
        )
    report = {
        "kernels": kernels.show_config(),
        "torch": torch.__version__,
        "clock": "processor" if options.threads == 1 else "wall",
        "parameters": sum(p.numel() for p in dense.parameters()),
        "shape": str(options.shape),
        "file_bytes": size,
        "loading_s": loading,
        "prompt_tokens": prompt_length,
        "models": rows,
    }
    print(f"{report['kernels']}; torch {torch.__version__}; {report['clock']} time")
    print(f"{report['parameters']:,} parameters; {options.shape}: {size:,} bytes")
    print(f"\n| | tokens/s (fastest tenth) | median | first token of {prompt_length}, s | median |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['tokens_per_s']:.2f} | {row['tokens_per_s_median']:.2f} "
            f"| {row['first_token_s']:.2f} | {row['first_token_s_median']:.2f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
