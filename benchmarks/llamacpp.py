"""Models for llama.cpp from models in memory: what its kinds of quantisation are compared with.

Needs llama-cpp-python and gguf, which are not among the project's dependencies.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

# Names of a decoder layer's matrices and norms, and of the others.
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def is_installed() -> bool:
    """Whether both packages are; says so if not."""
    try:
        importlib.import_module("gguf")
        importlib.import_module("llama_cpp")
    except ImportError as error:
        print(f"no comparison with llama.cpp: {error}")
        return False
    return True


def gguf_name(module: str) -> str:
    """What a module of a Llama is called in a GGUF file, without ``.weight``."""
    if module in NAMES:
        return NAMES[module]
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[part]}"


def write_gguf(path: Path, model: nn.Module) -> None:
    """A Llama as a GGUF file: matrices as float16, rows in the order they have. (llama.cpp wants
    those of queries and keys in another; neither speed nor a row's error depends on that.) Tokens
    have no text."""
    gguf = importlib.import_module("gguf")
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(1)
    writer.add_tokenizer_model("llama")
    tokens = [b"<unk>", b"<s>", b"</s>", *(b"t%d" % i for i in range(3, config.vocab_size))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[1] * (len(tokens) - 3)])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        kind = np.float32 if tensor.dim() == 1 else np.float16
        short = gguf_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{short}.weight", tensor.float().numpy().astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise_gguf(source: Path, target: Path, kind: str) -> None:
    """`target` = the file quantised by llama.cpp, as in ``Q4_K_M``, without importance matrix."""
    library = importlib.import_module("llama_cpp")
    options = library.llama_model_quantize_default_params()
    options.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    status = library.llama_model_quantize(str(source).encode(), str(target).encode(), options)
    assert status == 0, f"llama.cpp could not quantise to {kind}"


def take_weights(model: nn.Module, modules: list[str], path: Path) -> float:
    """The modules' weights become those of a quantised file; returns its bits per weight."""
    gguf = importlib.import_module("gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    size = weights = 0
    for name in modules:
        weight = model.get_submodule(name).weight
        tensor = tensors[f"{gguf_name(name)}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight.data.copy_(torch.from_numpy(values.reshape(tuple(weight.shape))))
        size += int(tensor.n_bytes)
        weights += weight.numel()
    return 8 * size / weights
