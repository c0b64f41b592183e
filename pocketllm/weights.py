"""Where a compression takes the dense weights from: safetensors files, or a model in memory.

A model whose parameters are in its files one for one is never held: its modules are without
storage, and a tensor is read when it is needed. transformers itself says which tensor of the files
a parameter is: it loads tensors that have a shape and share one element, and where each of them
ends up is looked at. Models whose weights it converts while loading (fused experts, for one) are
loaded whole.

Files are read, not mapped: pages of a mapping count as memory of the process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from . import trellis
from .dense import load_model, meta_model, quiet
from .errors import PocketError
from .hf import dense_tensors, dtype_name, saved_tensors, tensor_bytes
from .layout import Target
from .precision import linear_dtype
from .tensorfile import (
    INDEX_NAME,
    WEIGHTS_NAME,
    LazyTensor,
    StoredTensor,
    TensorSource,
    open_files,
    weight_files,
)

_TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
# Bytes looked at together for NaN and Inf.
CHECKED_TOGETHER = 1 << 24
# Weights of a matrix that are in memory together, several times, while it is encoded.
ENCODED_TOGETHER = 1 << 23


class Weights(Protocol):
    """The dense weights of a model.

    Attributes:
        model: its modules; with or without storage.
    """

    model: nn.Module

    def parts(self, target: Target) -> Iterator[np.ndarray]:
        """The target's weight (out, in) in parts of whole rows, float32."""

    def rows(self, target: Target, index: np.ndarray) -> np.ndarray:
        """Some rows of it, float32."""

    def kept(self, targets: Iterable[Target]) -> Mapping[str, TensorSource]:
        """File name -> every tensor beside the weights of the targets."""

    def replace(self, target: Target, decode: Callable[[], np.ndarray]) -> None:
        """From now on the model computes with ``decode()``, float32 (out, in)."""

    def visit(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Surrounds everything that is done with a decoder layer."""

    def run(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Within it the layer can be run: its parameters are there, weights of linears as
        :func:`pocketllm.precision.linear_dtype` says, all else in float32."""

    def hold(self, module: nn.Module) -> Callable[[], None]:
        """The module's own parameters are there in float32 until what it returns is called."""

    def hold_embedding(self, module: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
        """The same, in their own dtype, of an embedding that will look up these tokens only."""


class LoadedWeights:
    """A model in memory. Weights that are replaced stay replaced."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def _matrix(self, target: Target) -> torch.Tensor:
        weight = self.model.get_submodule(target.name).weight.detach()
        return weight.T if target.kind == "conv1d" else weight

    def parts(self, target: Target) -> Iterator[np.ndarray]:
        weight = self._matrix(target)
        for first, count in row_ranges(target.shape):
            yield np.ascontiguousarray(weight[first : first + count].float().cpu().numpy())

    def rows(self, target: Target, index: np.ndarray) -> np.ndarray:
        return self._matrix(target)[torch.from_numpy(index)].float().cpu().numpy()

    def kept(self, targets: Iterable[Target]) -> Mapping[str, TensorSource]:
        return dense_tensors(self.model, [t.name for t in targets])

    def replace(self, target: Target, decode: Callable[[], np.ndarray]) -> None:
        decoded = torch.from_numpy(decode())
        weight = self.model.get_submodule(target.name).weight
        weight.data.copy_(decoded.T if target.kind == "conv1d" else decoded)

    @contextmanager
    def visit(self, layer: nn.Module) -> Iterator[None]:
        restore = to_float32([*layer.parameters(), *layer.buffers()])
        try:
            yield
        finally:
            restore()

    @contextmanager
    def run(self, layer: nn.Module) -> Iterator[None]:
        narrow = [m for m in layer.modules() if linear_dtype(m) == torch.bfloat16]
        kept = [module.weight.data for module in narrow]
        try:
            for module in narrow:
                module.weight.data = module.weight.data.bfloat16()
            yield
        finally:
            for module, weight in zip(narrow, kept, strict=True):
                module.weight.data = weight

    def hold(self, module: nn.Module) -> Callable[[], None]:
        return to_float32([*module.parameters(recurse=False), *module.buffers(recurse=False)])

    def hold_embedding(self, module: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
        del module, tokens
        return lambda: None


class StreamedWeights:
    """A model whose parameters are in its files.

    Args:
        model: without storage, but for buffers; parameters in the dtypes they have once loaded.
        stored: parameter name -> tensor of the files.
    """

    def __init__(self, model: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
        self.model = model
        self._stored = stored
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._decoded: dict[str, Callable[[], np.ndarray]] = {}

    def check_finite(self) -> None:
        """Refuse NaN and Inf in any parameter.

        Raises:
            PocketError: names the parameter.
        """
        for name in self._names.values():
            tensor = self._stored[name]
            if not _TORCH[tensor.dtype].is_floating_point:
                continue
            for first, count in _parts(tensor):
                if not _read(tensor, first, count).isfinite().all():
                    raise PocketError(f"{name}: holds NaN or Inf, the source model is damaged")

    def parts(self, target: Target) -> Iterator[np.ndarray]:
        name, like = self._origin(f"{target.name}.weight")
        if target.kind == "conv1d":
            weight = self._tensor(name).T
            for first, count in row_ranges(target.shape):
                yield np.ascontiguousarray(weight[first : first + count].float().numpy())
            return
        for first, count in row_ranges(target.shape):
            yield _read(self._stored[name], first, count).to(like.dtype).float().numpy()

    def rows(self, target: Target, index: np.ndarray) -> np.ndarray:
        if target.kind == "conv1d":
            return self._tensor(f"{target.name}.weight").T[index].float().numpy()
        return self._rows(f"{target.name}.weight", index).float().numpy()

    def kept(self, targets: Iterable[Target]) -> Mapping[str, TensorSource]:
        skipped = {f"{t.name}.weight" for t in targets}
        state = {n: t for n, t in self.model.state_dict().items() if n not in skipped}
        names = {id(tensor): name for name, tensor in state.items()}
        return {
            file_name: LazyTensor(
                dtype_name(tensor), tuple(tensor.shape), self._bytes_of(names[id(tensor)])
            )
            for file_name, tensor in saved_tensors(self.model, dict(state)).items()
        }

    def _bytes_of(self, name: str) -> Callable[[], np.ndarray]:
        return lambda: tensor_bytes(self._tensor(name))

    def replace(self, target: Target, decode: Callable[[], np.ndarray]) -> None:
        transposed = target.kind == "conv1d"
        self._decoded[f"{target.name}.weight"] = lambda: decode().T if transposed else decode()

    def visit(self, layer: nn.Module) -> AbstractContextManager[None]:
        del layer
        return nullcontext()

    @contextmanager
    def run(self, layer: nn.Module) -> Iterator[None]:
        undo: list[Callable[[], None]] = []
        try:
            for module in layer.modules():
                undo.append(self._held(module, linear_dtype(module)))
            yield
        finally:
            for restore in undo:
                restore()

    def hold(self, module: nn.Module) -> Callable[[], None]:
        return self._held(module, torch.float32)

    def _held(self, module: nn.Module, weight_dtype: torch.dtype) -> Callable[[], None]:
        empty = dict(module._parameters)
        for key, parameter in empty.items():
            if parameter is not None:
                current = self._current(self._names[id(parameter)])
                dtype = weight_dtype if key == "weight" else torch.float32
                module._parameters[key] = _parameter(
                    current.to(dtype) if current.is_floating_point() else current
                )
        undo = to_float32(module.buffers(recurse=False))

        def release() -> None:
            module._parameters.update(empty)
            undo()

        return release

    def hold_embedding(self, module: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
        empty = module._parameters["weight"]
        assert empty is not None
        used, position = torch.unique(tokens), torch.zeros(len(empty), dtype=torch.int64)
        position[used] = torch.arange(len(used))
        module._parameters["weight"] = _parameter(self._rows(self._names[id(empty)], used.numpy()))
        padding = module.padding_idx
        module.padding_idx = None  # may be outside the rows that are there; gradients only
        handle = module.register_forward_pre_hook(lambda _, args: (position[args[0]], *args[1:]))

        def release() -> None:
            handle.remove()
            module.padding_idx = padding
            module._parameters["weight"] = empty

        return release

    def _current(self, name: str) -> torch.Tensor:
        if name in self._decoded:
            return torch.from_numpy(np.ascontiguousarray(self._decoded[name]()))
        return self._tensor(name)

    def _tensor(self, name: str) -> torch.Tensor:
        """A parameter or persistent buffer as it is once loaded."""
        name, like = self._origin(name)
        if name not in self._stored:
            return like
        return _read(self._stored[name]).to(like.dtype)

    def _rows(self, name: str, index: np.ndarray) -> torch.Tensor:
        name, like = self._origin(name)
        stored = self._stored[name]
        runs = np.split(index, np.flatnonzero(np.diff(index) != 1) + 1) if len(index) else []
        parts = [_read(stored, int(run[0]), len(run)) for run in runs]
        return torch.cat([p.reshape(-1, *stored.shape[1:]) for p in parts]).to(like.dtype)

    def _origin(self, name: str) -> tuple[str, torch.Tensor]:
        """The first name of a tied parameter, and the tensor in the model."""
        module, _, key = name.rpartition(".")
        like = getattr(self.model.get_submodule(module), key)
        return self._names.get(id(like), name), like


def open_weights(folder: Path) -> tuple[Weights, list[str]]:
    """The weights of a model folder, streamed where that is possible.

    Returns:
        The weights, and sentences for the user.

    Raises:
        PocketError: no safetensors files, transformers cannot load it as a causal LM, tensors are
            missing, or hold NaN or Inf.
    """
    if not any((folder / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        raise PocketError(
            f"{folder}: holds neither {WEIGHTS_NAME} nor {INDEX_NAME}, and only safetensors files "
            "are read: load the model with transformers and save it again, which writes them"
        )
    _, stored = open_files(weight_files(folder))
    streamed = _streamed(folder, stored)
    if streamed is not None:
        streamed.check_finite()
        return streamed, []
    sentence = (
        f"{type(meta_model(folder)).__name__}: its weights are converted while they are loaded, so "
        "the whole dense model was held in memory"
    )
    return LoadedWeights(load_model(folder)), [sentence]


def _streamed(folder: Path, stored: Mapping[str, StoredTensor]) -> StreamedWeights | None:
    """The model without storage; None where a parameter is not a tensor of the files."""
    if any(tensor.dtype not in _TORCH for tensor in stored.values()):
        return None
    bare = meta_model(folder)
    dtype = bare.config.dtype
    hollow = {name: _hollow(tensor, dtype) for name, tensor in stored.items()}
    origin = {t.untyped_storage().data_ptr(): stored[name] for name, t in hollow.items()}
    try:
        with quiet():
            model, info = type(bare).from_pretrained(
                None, config=bare.config, state_dict=hollow, dtype="auto", output_loading_info=True
            )
    except Exception:  # whatever it is, loading the real tensors will say it properly
        return None
    if info["missing_keys"] or info["mismatched_keys"] or info["error_msgs"]:
        return None
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        source = origin.get(tensor.untyped_storage().data_ptr())
        if source is not None and source.shape == tuple(tensor.shape):
            found[name] = source
        elif isinstance(tensor, nn.Parameter):
            return None
    _empty(model, found)
    state = model.state_dict()
    same = {id(tensor) for tensor in state.values()}
    if any(id(tensor) not in same for tensor in saved_tensors(model, dict(state)).values()):
        return None
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or _shares_more(model):
        return None
    return StreamedWeights(model.eval().requires_grad_(False), found)


def _hollow(tensor: StoredTensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor of that shape whose elements are all the same one."""
    own = _TORCH[tensor.dtype]
    wanted = dtype if dtype is not None and own.is_floating_point else own
    return torch.zeros((), dtype=wanted).expand(tensor.shape)


def _empty(model: nn.Module, found: Mapping[str, StoredTensor]) -> None:
    """Parameters lose their storage, tied ones together; buffers of the files get their values."""
    full = dict(model.named_parameters()).values()
    made = {id(p): _parameter(p.detach().to("meta")) for p in full}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = made[id(parameter)]
        for key, buffer in module._buffers.items():
            name = f"{prefix}.{key}" if prefix else key
            if buffer is not None and name in found:
                module._buffers[key] = _read(found[name]).to(buffer.dtype)


def _shares_more(model: nn.Module) -> bool:
    """Whether a parameter is tied to another one than the head to the embedding."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    seen = {id(module.weight) for module in ends if module is not None}
    for module in model.modules():
        for parameter in module._parameters.values():
            if module not in ends and parameter is not None and id(parameter) in seen:
                return True
            seen.add(id(parameter))
    return False


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def row_ranges(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """First row and number of rows of the parts in which a matrix is encoded: whole segments."""
    rows = shape[0]
    segments = max(1, ENCODED_TOGETHER // max(1, shape[1]) // trellis.SEGMENT)
    step = segments * trellis.SEGMENT
    ends = [*range(step, rows - trellis.SEGMENT + 1, step), rows] if rows else []
    for first, end in itertools.pairwise([0, *ends]):
        yield first, end - first


def _parts(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """Ranges of the first dimension, each of about as many bytes."""
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, CHECKED_TOGETHER * rows // max(1, tensor.nbytes))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def _read(tensor: StoredTensor, first: int = 0, count: int | None = None) -> torch.Tensor:
    """A stored tensor, or ``count`` entries of its first dimension from ``first`` on."""
    shape = tensor.shape
    row = tensor.nbytes // max(1, shape[0]) if shape else tensor.nbytes
    if count is not None and shape:
        shape = (count, *shape[1:])
    values = torch.empty(shape, dtype=_TORCH[tensor.dtype])
    tensor.read_into(values.view(-1).view(torch.uint8).numpy(), first * row)
    return values


def to_float32(tensors: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Casts floating tensors in place; the function returned casts them back."""
    kept = [(t, t.dtype) for t in tensors if t.is_floating_point() and t.dtype != torch.float32]
    for tensor, _ in kept:
        tensor.data = tensor.data.float()

    def restore() -> None:
        for tensor, dtype in kept:
            tensor.data = tensor.data.to(dtype)

    return restore
