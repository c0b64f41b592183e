"""Compressed tiny models that read tokens one at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tiny_models import random_compression, tiny_model
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from pocketllm import decoder_layer, hf
from pocketllm.decoder_stack import OneTokenModel


def compressed(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, storage: str = "table-int8"
) -> nn.Module:
    """A model with random packed weights."""
    model = tiny_model(architecture, dtype)
    hf.install_compressed(model, *random_compression(model, embeddings=False, storage=storage))
    return model.eval()


def plain(model: nn.Module) -> nn.Module:
    """The same model with transformers' own layers."""
    copied = copy.deepcopy(model)
    decoder_layer.uninstall(copied)
    return copied


def read(model: nn.Module, ids: Tensor, cache: DynamicCache, **options: Any) -> Tensor:
    """Logits of the tokens of a single sequence, one at a time."""
    with torch.inference_mode():
        found = [
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True, **options).logits
            for i in range(ids.shape[1])
        ]
    return torch.cat(found, 1)


def logits_of(model: nn.Module, ids: Tensor, steps: int = 5, **options: Any) -> Tensor:
    """Logits of the tokens after the first four, one at a time."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :4], past_key_values=cache, use_cache=True)
    return read(model, ids[:, 4 : 4 + steps], cache, **options).float()


def difference(a: Tensor, b: Tensor) -> float:
    """Largest, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def layer_by_layer(model: nn.Module) -> nn.Module:
    """The same model with transformers' own loop over our layers."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, OneTokenModel):
            module.__class__ = module.original
    return copied


def begun(model: nn.Module, ids: Tensor) -> DynamicCache:
    """A cache that holds some tokens, of which the kernels took the last three."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :-3], past_key_values=cache, use_cache=True)
    read(model, ids[:, -3:], cache)
    return cache
