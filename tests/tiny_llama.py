"""A tiny Llama with random weights and a byte-level tokenizer, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again and again. " * 80


def make(
    folder: Path, *, hidden: int = 64, layers: int = 3, tied: bool = True, **settings: Any
) -> Path:
    """Write the model; every call with the same arguments writes the same bytes.

    ``settings`` replace those of the LlamaConfig.
    """
    torch.manual_seed(1)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<end>"])}
    values = {
        "vocab_size": len(vocabulary),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tied,
        "eos_token_id": vocabulary["<end>"],
        "bos_token_id": None,
    }
    LlamaForCausalLM(LlamaConfig(**{**values, **settings})).to(torch.bfloat16).save_pretrained(
        folder
    )
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder
