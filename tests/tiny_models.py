"""Tiny random models of several architectures, and compressed forms of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed import falling_bits, random_codec, random_module
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pocketllm.checkpoint import CodecData, ModuleData, ModuleSpec, write_checkpoint
from pocketllm.layout import walk

_SMALL = {"hidden_size": 36, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 50}
_LLAMA = {**_SMALL, "intermediate_size": 52, "num_key_value_heads": 1, "head_dim": 18}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "tie_word_embeddings": False},
    "llama-tied": {**_LLAMA, "tie_word_embeddings": True},
    "mistral": {**_LLAMA, "tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {**_LLAMA, "tie_word_embeddings": False},
    "qwen3": {**_LLAMA, "tie_word_embeddings": True},
    "gemma": _LLAMA,
    "phi": {**_SMALL, "hidden_size": 40, "intermediate_size": 52, "tie_word_embeddings": False},
    "opt": {**_SMALL, "ffn_dim": 52, "word_embed_proj_dim": 36, "max_position_embeddings": 64},
    "mixtral": {**_LLAMA, "num_local_experts": 3, "tie_word_embeddings": False},
    "gpt2": {"n_embd": 36, "n_head": 2, "n_layer": 2, "vocab_size": 50, "n_positions": 64},
}
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def tiny_model(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A random model; rows are scaled apart so that row statistics matter."""
    torch.manual_seed(seed)
    kind = architecture.removesuffix("-tied")
    config = AutoConfig.for_model(kind, **ARCHITECTURES[architecture], **_IDS)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def random_compression(
    model: nn.Module, *, embeddings: bool = True, shift: bool = False, storage: str = "table-int8"
) -> tuple[list[CodecData], list[ModuleData]]:
    """Random codes of the model's own shapes: what a checkpoint holds, not a good compression.

    With storage ``"trellis"`` every other linear layer has bits for each block of its columns.
    """
    norm = "rln" if storage == "decoder" else "input"
    codec = random_codec("main", 4, 60, storage=storage, norm=norm)
    head = codec if storage == "trellis" else random_codec("embedding", 3, 16, seed=1)
    targets, _ = walk(model, embeddings=embeddings)
    modules = []
    for target in targets:
        dtype = str(model.get_submodule(target.name).weight.dtype).removeprefix("torch.")
        if target.tied_to:
            spec = ModuleSpec(
                target.name, "tied", target.shape, dtype=dtype, tied_to=target.tied_to
            )
            modules.append(ModuleData(spec))
            continue
        used = head if target.kind == "embedding" else codec
        apart = target.kind != "embedding" and len(modules) % 2 == 1
        modules.append(
            random_module(
                target.name,
                target.shape,
                used,
                kind=target.kind,
                shift=shift,
                dtype=dtype,
                bits=falling_bits(target.shape[1]) if apart else 2.25,
            )
        )
    return [codec, head] if embeddings and head is not codec else [codec], modules


def write_tiny(out: Path, model: nn.Module, *, shard_bytes: int = 10**9, **options: Any) -> Path:
    """A compressed checkpoint of the model."""
    from pocketllm.hf import dense_tensors

    codecs, modules = random_compression(model, **options)
    model.config.architectures = [type(model).__name__]
    return write_checkpoint(
        out,
        modules=modules,
        codecs=codecs,
        dense_tensors=dense_tensors(model, [m.spec.name for m in modules]),
        config={**model.config.to_dict(), "architectures": [type(model).__name__]},
        shard_bytes=shard_bytes,
    )


def tokens(count: int = 9, batch: int = 2) -> torch.Tensor:
    """Random token ids (batch, count)."""
    return torch.from_numpy(np.random.default_rng(0).integers(3, 50, (batch, count)))
