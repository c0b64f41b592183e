"""transformers integration: how from_pretrained and save_pretrained meet a compressed model.

Importing this module is light; what needs the kernels is imported when a model is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import schema
from .errors import CheckpointError, PocketError
from .schema import Layout, ModuleSpec
from .tensorfile import LazyTensor, TensorSource

if TYPE_CHECKING:
    from .checkpoint_write import CodecData, ModuleData

_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


# "0" in it: loading does not read the whole file for its checksums.
CHECKSUMS_VARIABLE = "POCKETLLM_CHECKSUMS"


class PocketQuantizationConfig(QuantizationConfigMixin):
    """The quantization_config of a compressed checkpoint, its keys as attributes."""

    def __init__(self, **entries: Any) -> None:
        self.quant_method = schema.QUANT_METHOD
        for key, value in entries.items():
            setattr(self, key, value)


class PocketQuantizer(HfQuantizer):
    """Loads compressed checkpoints, and compresses dense ones while they are loaded.

    With ``from_pretrained(dense, quantization_config=PocketConfig(...))`` the dense model is
    loaded first and compressed in memory afterwards.
    """

    requires_calibration = False
    quantization_config: Any

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        if not self.pre_quantized:
            return model
        entries = self.quantization_config.to_dict()
        layout = schema.parse(entries, getattr(model, "name_or_path", "") or "config.json")
        if checkpoint_files:
            from .checkpoint import open_weights

            others = [file for file in checkpoint_files if not file.endswith(".safetensors")]
            if others:
                raise CheckpointError(f"{others[0]}: not a safetensors file")
            checksums = os.environ.get(CHECKSUMS_VARIABLE, "1") != "0"
            open_weights(checkpoint_files, entries, checksums=checksums)
        layout = replace_modules(model, layout, device="meta")
        self._keep(layout)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            from .in_memory import compress_in_memory

            codecs, modules, record = compress_in_memory(model, self.quantization_config)
            install_compressed(model, codecs, modules, record)
            self.quantization_config = model.config.quantization_config
        model.add_model_tags([schema.QUANT_METHOD])
        return model

    def _keep(self, layout: Layout) -> None:
        for key, value in layout.to_json().items():
            setattr(self.quantization_config, key, value)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Checksums for the files that save_pretrained is about to write."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        from .checkpoint_write import metadata_of
        from .tensorfile import crc32

        tensors = saved_tensors(model)
        layout = schema.parse(self.quantization_config.to_dict(), "quantization_config")
        layout = _rename(layout, tensors, model.base_model_prefix)
        self._keep(layout)
        checksums = {
            name: crc32(name, dtype_name(tensor), tensor.shape, tensor_bytes(tensor))
            for name, tensor in tensors.items()
        }
        return None, metadata_of(layout, checksums)

    def is_serializable(self) -> bool:
        """save_pretrained writes a complete checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top; the packed weights themselves are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile works on the model."""
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        return restore_dense(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def register() -> None:
    """Enter the two classes in transformers' registries; again is harmless."""
    if schema.QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(schema.QUANT_METHOD)(PocketQuantizationConfig)
    if schema.QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(schema.QUANT_METHOD)(PocketQuantizer)


def replace_modules(
    model: nn.Module, layout: Layout, device: torch.device | str | None = None
) -> Layout:
    """Put empty compressed modules, and the bank of codecs, into a transformers model.

    Args:
        model: of the architecture the layout was made from, or a part of it (without head, say).
        layout: codecs and modules.
        device: where their tensors are made.

    Returns:
        The layout with the names that the modules have in this model.

    Raises:
        CheckpointError: a module that the model does not have, or has in another shape.
    """
    from . import decoder_layer
    from .linear import CodecBank, PocketEmbedding, PocketTiedLinear, build

    names = {spec.name: _locate(model, spec.name) for spec in layout.modules.values()}
    layout = _renamed(layout, names)
    bank = CodecBank(layout.codecs.values(), device)
    ordered = sorted(layout.modules.values(), key=lambda spec: spec.kind == "tied")
    for spec in ordered:
        original = model.get_submodule(spec.name)
        _check_shape(spec, original)
        if spec.kind == "tied":
            embedding = model.get_submodule(spec.tied_to or "")
            assert isinstance(embedding, PocketEmbedding)
            has_bias = getattr(original, "bias", None) is not None
            dtype = embedding.dtype
            new: nn.Module = PocketTiedLinear(embedding, bias=has_bias, device=device, dtype=dtype)
        else:
            new = build(spec, original, bank, device)
        model.set_submodule(spec.name, new)
    model.add_module(schema.BANK, bank)
    _untie(model, {f"{name}.weight" for name in layout.modules})
    decoder_layer.install(model)
    return layout


def install_compressed(
    model: nn.Module,
    codecs: Iterable[CodecData],
    modules: Iterable[ModuleData],
    record: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Turn a dense transformers model in memory into the compressed one, as if it were loaded so.

    Args:
        model: dense.
        codecs: codecs of the modules.
        modules: compressed matrices, tied heads included.
        record: further keys of quantization_config.
    """
    from .checkpoint_write import achieved_bits, compressed_tensors, layout_of

    codecs, modules = list(codecs), list(modules)
    layout = layout_of(codecs, modules)
    bits = round(achieved_bits(layout, compressed_tensors(codecs, modules)), 4)
    biases = {
        spec.name: model.get_submodule(spec.name).bias
        for spec in layout.modules.values()
        if getattr(model.get_submodule(spec.name), "bias", None) is not None
    }
    replace_modules(model, layout, device=model.device)
    for name, bias in biases.items():
        model.get_submodule(name).bias = bias
    for codec in codecs:
        _fill(model.get_submodule(f"{schema.BANK}.{codec.spec.name}"), codec.parts)
    for module in modules:
        if module.spec.kind != "tied":
            _fill(model.get_submodule(module.spec.name), module.parts)
    config = PocketQuantizationConfig(
        **{"method": "pocket", **(record or {})},
        format_version=schema.FORMAT_VERSION,
        bits=bits,
        **layout.to_json(),
    )
    model.config.quantization_config = config
    model.hf_quantizer = PocketQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = schema.QUANT_METHOD
    return model


def restore_dense(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every compressed module by its dense one, in place; tied heads are tied again.

    Args:
        model: a compressed transformers model.
        dtype: of the dense weights; None is the model's.
    """
    from . import decoder_layer
    from .linear import PocketEmbedding, PocketLinear, PocketTiedLinear

    decoder_layer.uninstall(model)
    dtype = dtype or model.dtype
    for name, module in list(model.named_modules()):
        if isinstance(module, PocketEmbedding):
            model.set_submodule(name, _dense_embedding(module, dtype))
        elif isinstance(module, PocketTiedLinear):
            model.set_submodule(name, _dense_linear(module, None, dtype))
        elif isinstance(module, PocketLinear):
            model.set_submodule(name, _dense_linear(module, module.dequantize(dtype), dtype))
    delattr(model, schema.BANK)
    for module in model.modules():
        module.__dict__.pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()
    return model


def dense_tensors(model: nn.Module, compressed: Iterable[str]) -> dict[str, TensorSource]:
    """What a dense model's file holds beside the weights of ``compressed`` modules.

    Names are those of the file (transformers renames and splits some), tied tensors come once.

    Args:
        model: a dense transformers model.
        compressed: names of the modules whose weight is stored compressed.
    """
    skipped = {f"{name}.weight" for name in compressed}
    state = {name: t for name, t in model.state_dict().items() if name not in skipped}
    return {
        name: LazyTensor(dtype_name(t), tuple(t.shape), functools.partial(tensor_bytes, t))
        for name, t in saved_tensors(model, state).items()
    }


def saved_tensors(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors that save_pretrained writes, under the names it writes.

    ``state`` is the model's state dict, or a part of it; it is changed.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = model.state_dict() if state is None else state
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    return revert_weight_conversion(model, state)


def dtype_name(tensor: Tensor) -> str:
    """The safetensors name of a tensor's dtype."""
    if tensor.dtype not in _DTYPES:
        raise PocketError(f"dtype: {tensor.dtype} cannot be stored")
    return _DTYPES[tensor.dtype]


def tensor_bytes(tensor: Tensor) -> Any:
    """A tensor's bytes, row-major, as a flat uint8 array."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _fill(module: nn.Module, arrays: Mapping[str, Any]) -> None:
    for name, array in arrays.items():
        buffer = module.get_buffer(name)
        buffer.copy_(torch.from_numpy(array).reshape(buffer.shape))


def _locate(model: nn.Module, name: str) -> str | None:
    """The module's name in this model: as it is, or with the base model's prefix put on or off."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, f"{prefix}{name}", name.removeprefix(prefix)):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    if type(model).__name__ in (model.config.architectures or ()):
        raise CheckpointError(
            f"config.json names the module {name}, which {type(model).__name__} lacks"
        )
    return None


def _rename(layout: Layout, tensors: Mapping[str, Any], prefix: str) -> Layout:
    """The layout under the names that the file's tensors have."""
    names: dict[str, str | None] = {}
    for spec in layout.modules.values():
        stem = f"{prefix}."
        candidates = (spec.name, f"{stem}{spec.name}", spec.name.removeprefix(stem))
        found = [name for name in candidates if f"{name}.weight" in tensors]
        names[spec.name] = found[0] if found else spec.name
    return _renamed(layout, names)


def _renamed(layout: Layout, names: Mapping[str, str | None]) -> Layout:
    modules = {}
    for old, spec in layout.modules.items():
        new = names[old]
        if new is not None:
            tied_to = names.get(spec.tied_to) if spec.tied_to else None
            modules[new] = dataclasses.replace(spec, name=new, tied_to=tied_to)
    return Layout(layout.codecs, modules)


def _check_shape(spec: ModuleSpec, module: nn.Module) -> None:
    shape = tuple(getattr(module, "weight", torch.empty(0)).shape)
    if spec.kind == "conv1d":
        shape = shape[::-1]
    if shape != spec.shape:
        raise CheckpointError(
            f"config.json gives module {spec.name} the shape {list(spec.shape)}, the model's is"
            f" {list(shape)}"
        )


def _untie(model: nn.Module, compressed: set[str]) -> None:
    """Take compressed weights out of transformers' lists of tied parameters."""
    for name, module in model.named_modules():
        tied = getattr(module, "_tied_weights_keys", None)
        if isinstance(tied, dict):
            prefix = f"{name}." if name else ""
            module._tied_weights_keys = {
                target: source
                for target, source in tied.items()
                if f"{prefix}{target}" not in compressed and f"{prefix}{source}" not in compressed
            }
    model.all_tied_weights_keys = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if target not in compressed and source not in compressed
    }


def _dense_linear(module: Any, weight: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """The linear layer or Conv1D a compressed module stands for; without weight, to be tied."""
    from transformers.pytorch_utils import Conv1D

    rows, columns = module.out_features, module.in_features
    if module.__dict__.get("original_class") is Conv1D and weight is not None:
        dense: nn.Module = Conv1D(0, 0)
        dense.nf, dense.nx = rows, columns
        dense.weight = nn.Parameter(weight.T.contiguous())
    else:
        dense = nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
        if weight is not None:
            dense.weight = nn.Parameter(weight)
    dense.bias = module.bias
    return dense.train(module.training)


def _dense_embedding(module: Any, dtype: torch.dtype) -> nn.Module:
    weight = module.dequantize(dtype)
    if module.multiplier is not None:
        dense = module.original_class(
            *weight.shape, module.padding_idx, embed_scale=module.multiplier
        )
    else:
        dense = nn.Embedding(*weight.shape, module.padding_idx, device="meta")
    dense.weight = nn.Parameter(weight)
    return dense.train(module.training)


register()
