"""What modules of transformers that take single tokens in C have in common: their class, how they
notice that a part of them changed, and the call."""

from __future__ import annotations

import itertools
import operator
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import kernels, ops
from .decoder_cache import Rooms

FAMILIES = {
    f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen2", "qwen3")
}
_CAPTURING = "transformers.utils.output_capturing"
# What is collected of whole layers.
_OF_LAYERS = {"hidden_states", "_hidden_states_layers"}
Place = tuple[Any, str]
_version = operator.attrgetter("_version")


class Watch:
    """Modules whose parts, tensors and hooks are looked at again before every token, which is why
    all of it lies in flat lists that are compared without a loop in Python.

    Args:
        modules: those that compute; nobody may follow or replace what they do.
        codecs: those that only hold tensors.
        places: dictionaries and keys of what else must stay.
    """

    def __init__(
        self, modules: list[nn.Module], codecs: list[nn.Module], places: list[Place]
    ) -> None:
        self._parts = modules, codecs, places
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

    @classmethod
    def of(cls, watches: list[Watch], modules: list[nn.Module], places: list[Place]) -> Watch:
        """What several watch, and more that computes, and more places, in one."""
        parts = [watch._parts for watch in watches]
        shared = dict.fromkeys(codec for _, codecs, _ in parts for codec in codecs)
        return cls(
            [*modules, *(module for found, _, _ in parts for module in found)],
            list(shared),
            [*places, *(place for _, _, found in parts for place in found)],
        )

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


def _is_idle(hook: Any) -> bool:
    """Whether a hook is one of those that transformers leaves in a model once any output inside it
    was asked for, and none but hidden states is asked for now."""
    if getattr(hook, "__module__", None) != _CAPTURING:
        return False
    collected = sys.modules[_CAPTURING]._active_collector.get()
    return collected is None or not set(collected).difference(_OF_LAYERS)


class Plan(NamedTuple):
    """What the kernels were given of layers.

    Attributes:
        watch: whether they still are that.
        layers: each, from :func:`pocketllm.kernels.hold_layer`.
        held: all of them, from :func:`pocketllm.kernels.hold_layers`.
        shapes: of each, heads of keys and values and their width.
        width: of hidden states.
    """

    watch: Watch
    layers: tuple[object, ...]
    held: object
    shapes: tuple[tuple[int, int], ...]
    width: int


class OneToken(nn.Module):
    """Mixed into a class of transformers by :func:`class_of`.

    Attributes:
        mixed: the class of this package.
        original: that of transformers.
    """

    mixed: type[OneToken]
    original: type[nn.Module]

    def planned(self) -> Plan | None:
        """The module as the kernels take it, kept until a part of it changes; None: it is changed
        so that they cannot."""
        plan: Plan | None = self.__dict__.get("_plan")
        if plan is None or not plan.watch.is_unchanged():
            plan = self.__dict__["_plan"] = self.make_plan()
        return None if plan is None or plan.watch.is_followed() else plan

    def make_plan(self) -> Plan | None:
        """The module as the kernels take it, or None."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "_plan"}
        return _new, (self.mixed, self.original), state


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def class_of(mixed: type[OneToken], original: type[nn.Module]) -> type[nn.Module]:
    """The original with a class of this package before it, under its own name: transformers looks
    for it."""
    if original not in _classes:
        own = {
            "mixed": mixed,
            "original": original,
            "__module__": original.__module__,
            "__doc__": original.__doc__,
        }
        _classes[original] = type(original.__name__, (mixed, original), own)
    return _classes[original]


def _new(mixed: type[OneToken], original: type[nn.Module]) -> nn.Module:
    module: nn.Module = object.__new__(class_of(mixed, original))
    return module


def may_take() -> bool:
    """Whether kernels may stand in for operators now: no gradients, nobody who follows every
    module."""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch_module._has_any_global_hook()
    )


def take(plan: Plan, x: Tensor, cosine: Tensor, sine: Tensor, rooms: Rooms) -> Tensor | None:
    """Hidden states of a token behind the layers, whose keys and values go into the cache.

    Args:
        plan: the layers.
        x: hidden states before them (1, 1, width).
        cosine: of the token's position (1, 1, width of a head).
        sine: the same.
        rooms: of the layers' caches.

    Returns:
        None, and nothing is changed, where the tensors are of other shapes or types.
    """
    angles = (1, 1, plan.shapes[0][1])
    if x.shape != (1, 1, plan.width) or cosine.shape != angles or sine.shape != angles:
        return None
    kinds = {x.dtype, cosine.dtype, sine.dtype, rooms.dtype}
    if len(kinds) != 1 or x.dtype not in ops.BY_ADDRESS:
        return None
    x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
    made = torch.empty_like(x)
    kernels.token_at(
        plan.held,
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        cosine.data_ptr(),
        sine.data_ptr(),
        rooms.addresses,
        rooms.length,
        made.data_ptr(),
    )
    rooms.show_token()
    return made
