"""Decoder layers that take one token in one call of the kernels.

While text is generated, a layer sees one token at a time. Its products aside, that is seventy small
operators of PyTorch (norms, rotation, cache, attention, gate), which cost half a millisecond and
compute next to nothing, and the cache copies all keys and values to add one of each. Layers of
Llama, Mistral, Qwen2 and Qwen3 whose matrices are compressed do all of it in C. :func:`install`
gives such layers a subclass of their own class that does so for one token of one sequence on the
CPU, without gradients, and in every other case (several tokens or sequences, masks, other caches,
hooks, adapters, attention that is asked for) leaves the work to transformers.
"""

from __future__ import annotations

import itertools
import operator
import sys
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import kernels, ops
from .linear import PocketLinear

_FAMILIES = {
    f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen2", "qwen3")
}
# In the order of enum pllm_layer_part.
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_CAPTURING = "transformers.utils.output_capturing"
# What is collected of whole layers.
_OF_LAYERS = {"hidden_states", "_hidden_states_layers"}
_version = operator.attrgetter("_version")
# Tokens that a cache gets space for at once, at least.
_SPARE = 64


def install(model: nn.Module) -> None:
    """Let the model's decoder layers, where they are of a known kind, take single tokens in C."""
    for module in model.modules():
        kind = type(module)
        known = kind.__module__ in _FAMILIES and kind.__name__.endswith("DecoderLayer")
        if known and not issubclass(kind, OneTokenLayer):
            module.__class__ = _class_of(kind)


def uninstall(model: nn.Module) -> None:
    """Give the layers their own class back."""
    for module in model.modules():
        if isinstance(module, OneTokenLayer):
            module.__dict__.pop("_plan", None)
            module.__class__ = module.original


class _Watch:
    """Modules whose parts, tensors and hooks are looked at again before every token, which is why
    all of it lies in flat lists that are compared without a loop in Python.

    Args:
        modules: those that compute; nobody may follow or replace what they do.
        codecs: those that only hold tensors.
        places: dictionaries and keys of what else must stay.
    """

    def __init__(
        self, modules: list[nn.Module], codecs: list[nn.Module], places: list[tuple[Any, str]]
    ) -> None:
        places = [*places, *((module.__dict__, "forward") for module in modules)]
        for module in (*modules, *codecs):
            places += [(d, name) for d in (module._parameters, module._buffers) for name in d]
        self._dicts, self._keys = zip(*places, strict=True)
        self._values = list(map(dict.get, self._dicts, self._keys))
        tensors = {id(v): v for v in self._values if isinstance(v, Tensor)}.values()
        # Nobody counts the changes of inference tensors.
        self._counted = [tensor for tensor in tensors if not tensor.is_inference()]
        self._versions = list(map(_version, self._counted))
        self._before = [module._forward_pre_hooks for module in modules]
        self._behind = [module._forward_hooks for module in modules]

    def is_unchanged(self) -> bool:
        """Whether everything is what it was."""
        return (
            all(map(operator.is_, map(dict.get, self._dicts, self._keys), self._values))
            and list(map(_version, self._counted)) == self._versions
        )

    def is_followed(self) -> bool:
        """Whether a hook waits for what the modules compute."""
        return any(self._before) or not all(
            map(_is_idle, itertools.chain.from_iterable(map(dict.values, self._behind)))
        )


class _Plan(NamedTuple):
    """What the kernels were given of a layer.

    Attributes:
        watch: whether it still is that.
        held: for :func:`pocketllm.kernels.token_at`.
        heads: of keys and values.
        width: of a head.
    """

    watch: _Watch
    held: object
    heads: int
    width: int


class _Room:
    """Keys and values of one layer of a cache with space for more behind them, so that a token is
    added without copying the others.

    The cache is shown the part that is filled, by new tensors with every token. Only the cache
    that holds the newest may fill more; copies of it and one that was cropped get other rooms.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        length = keys.shape[2]
        self.size = length + max(_SPARE, length // 2)
        self.keys, self.values = (_with_size(tensor, self.size) for tensor in (keys, values))
        self.shown = keys, values

    def is_open(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these are the newest and another token fits."""
        return self.shown[0] is keys and self.shown[1] is values and keys.shape[2] < self.size

    def show(self, layer: Any, length: int) -> None:
        """Let the cache have so many tokens."""
        self.shown = self.keys.narrow(2, 0, length), self.values.narrow(2, 0, length)
        layer.keys, layer.values = self.shown


def _with_size(tensor: Tensor, size: int) -> Tensor:
    """(1, heads, length, width) -> (1, heads, size, width), the rest not set."""
    _, heads, length, width = tensor.shape
    larger = tensor.new_empty(1, heads, size, width)
    larger[:, :, :length] = tensor
    return larger


_rooms: weakref.WeakKeyDictionary[Any, _Room] = weakref.WeakKeyDictionary()


def _room_of(layer: Any) -> _Room:
    """Room for another token of a layer of a cache."""
    keys, values = layer.keys, layer.values
    room = _rooms.get(layer)
    if room is None or not room.is_open(keys, values):
        room = _rooms[layer] = _Room(keys, values)
    return room


class OneTokenLayer(nn.Module):
    """Mixed into a class of decoder layers by :func:`install`."""

    original: type[nn.Module]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own class: hidden states (batch, tokens, width) -> the same shape."""
        if not args and ops.runs_directly(hidden_states) and hidden_states.shape[:2] == (1, 1):
            made = self._one_token(hidden_states, **kwargs)
            if made is not None:
                return made
        return super().forward(hidden_states, *args, **kwargs)

    def _one_token(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool | None = None,
        **others: Any,
    ) -> Tensor | None:
        """The layer's output for one token, or None where transformers has to do it."""
        if (
            attention_mask is not None
            or position_embeddings is None
            or output_attentions
            or self.training
            or x.dtype not in ops.BY_ADDRESS
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        plan = self._planned()
        cached = None if plan is None else _cached(past_key_values, self.self_attn.layer_idx)
        if plan is None or cached is None:
            return None
        keys, values = cached.keys, cached.values
        cosine, sine = position_embeddings
        length = keys.shape[2] if keys.dim() == 4 else 0
        past, here = (1, plan.heads, length, plan.width), (1, 1, plan.width)
        if keys.shape != past or values.shape != past or not (keys.is_cpu and values.is_cpu):
            return None
        if cosine.shape != here or sine.shape != here:
            return None
        if len({x.dtype, keys.dtype, values.dtype, cosine.dtype, sine.dtype}) != 1:
            return None
        x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
        room, made = _room_of(cached), torch.empty_like(x)
        kernels.token_at(
            plan.held,
            x.data_ptr(),
            x.dtype is torch.bfloat16,
            cosine.data_ptr(),
            sine.data_ptr(),
            room.keys.data_ptr(),
            room.values.data_ptr(),
            length,
            room.size,
            made.data_ptr(),
        )
        room.show(cached, length + 1)
        return made

    def _planned(self) -> _Plan | None:
        """The layer as the kernels take it, kept until a part of it changes; None: it is changed
        so that they cannot."""
        plan: _Plan | None = self.__dict__.get("_plan")
        if plan is None or not plan.watch.is_unchanged():
            plan = self.__dict__["_plan"] = _make_plan(self)
        if plan is None or plan.watch.is_followed() or torch_module._has_any_global_hook():
            return None
        return plan

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "_plan"}
        return _new, (self.original,), state


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _class_of(original: type[nn.Module]) -> type[nn.Module]:
    """The original with OneTokenLayer before it, under its own name: transformers looks for it."""
    if original not in _classes:
        own = {"original": original, "__module__": original.__module__, "__doc__": original.__doc__}
        _classes[original] = type(original.__name__, (OneTokenLayer, original), own)
    return _classes[original]


def _new(original: type[nn.Module]) -> nn.Module:
    module: nn.Module = object.__new__(_class_of(original))
    return module


def _is_idle(hook: Any) -> bool:
    """Whether a hook is one of those that transformers leaves in a model once any output inside it
    was asked for, and none but hidden states is asked for now."""
    if getattr(hook, "__module__", None) != _CAPTURING:
        return False
    collected = sys.modules[_CAPTURING]._active_collector.get()
    return collected is None or not set(collected).difference(_OF_LAYERS)


def _cached(past: Any, index: int) -> Any:
    """The layer of a cache that simply holds all keys and values; None where it is of another kind,
    or empty."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(past) is not DynamicCache or past.offloading or index >= len(past.layers):
        return None
    layer = past.layers[index]
    return layer if type(layer) is DynamicLayer and layer.is_initialized else None


def _places(layer: nn.Module) -> list[tuple[Any, str]]:
    """Where the seven matrices are, the norms (those of heads may be missing), the rest."""
    inside = layer._modules
    attention, mlp = inside.get("self_attn"), inside.get("mlp")
    in_attention = attention._modules if attention is not None else {}
    in_mlp = mlp._modules if mlp is not None else {}
    return [
        *((in_attention, name) for name in _ATTENTION),
        *((in_mlp, name) for name in _MLP),
        (inside, "input_layernorm"),
        (inside, "post_attention_layernorm"),
        (in_attention, "q_norm"),
        (in_attention, "k_norm"),
        (inside, "self_attn"),
        (inside, "mlp"),
        (in_mlp, "act_fn"),
    ]


def _make_plan(layer: nn.Module) -> _Plan | None:
    """None where a part is not what the kernels compute."""
    places = _places(layer)
    parts = [inside.get(name) for inside, name in places]
    matrices, norms, (attention, mlp, activation) = parts[:7], parts[7:11], parts[11:]
    if not all(type(part) is PocketLinear for part in matrices):
        return None
    if any(type(part).__module__ not in _FAMILIES for part in (*norms[:2], attention, mlp)):
        return None
    epsilons = {part.variance_epsilon for part in norms if part is not None}
    if (
        type(activation).__name__ not in ("SiLU", "SiLUActivation")
        or attention.config._attn_implementation not in ("sdpa", "eager")
        or (norms[2] is None) != (norms[3] is None)
        or len(epsilons) != 1
        or any("forward" in part.__dict__ for part in parts if part is not None)
    ):
        return None
    tensors = [part.bias for part in matrices]
    tensors += [None if part is None else part.weight for part in norms]
    if any(tensor is not None and not tensor.is_cpu for tensor in tensors):
        return None
    places += [(part.__dict__, "_codec") for part in matrices]
    modules = [part for part in parts if part is not None]
    watch = _Watch(modules, list(dict.fromkeys(part.codec for part in matrices)), places)
    floats = [None if t is None else t.detach().float().contiguous().numpy() for t in tensors]
    head = attention.head_dim
    held = kernels.hold_layer(
        tuple(part._arrays().held for part in matrices),
        tuple(floats[:7]),
        tuple(floats[7:]),
        head,
        epsilons.pop(),
        attention.scaling,
    )
    return _Plan(watch, held, matrices[1].out_features // head, head)
