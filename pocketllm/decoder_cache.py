"""Space in a cache of transformers for the keys and values of tokens to come, so that one is added
without copying the others."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

# Tokens that a cache gets space for at once, at least.
_SPARE = 64
_held = operator.attrgetter("keys", "values")
_shown = operator.attrgetter("shown")


class Room:
    """Keys and values of one layer of a cache with space for more behind them.

    The cache is shown the part that is filled, by new tensors with every token. Only the cache
    that holds the newest may fill more; copies of it and one that was cropped get other rooms.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        length = keys.shape[2]
        self.size = length + max(_SPARE, length // 2)
        self.keys, self.values = (_with_size(tensor, self.size) for tensor in (keys, values))
        self.shown = keys, values
        self.addresses = self.keys.data_ptr(), self.values.data_ptr(), self.size

    def is_open(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these are the newest and another token fits."""
        return self.shown[0] is keys and self.shown[1] is values and keys.shape[2] < self.size


def _with_size(tensor: Tensor, size: int) -> Tensor:
    """(1, heads, length, width) -> (1, heads, size, width), the rest not set."""
    _, heads, length, width = tensor.shape
    larger = tensor.new_empty(1, heads, size, width)
    larger[:, :, :length] = tensor
    return larger


_rooms: weakref.WeakKeyDictionary[Any, Room] = weakref.WeakKeyDictionary()


def _room_of(layer: Any) -> Room:
    keys, values = layer.keys, layer.values
    room = _rooms.get(layer)
    if room is None or not room.is_open(keys, values):
        room = _rooms[layer] = Room(keys, values)
    return room


class Rooms:
    """Room for another token in layers of a cache that are of one length.

    Attributes:
        shapes: of each layer, heads and their width.
        addresses: for :func:`pocketllm.kernels.token_at`.
        dtype: of keys and values.
    """

    def __init__(self, layers: Sequence[Any], shapes: Sequence[tuple[int, int]]) -> None:
        self.shapes, self._layers = shapes, layers
        self._rooms = list(map(_room_of, layers))
        self._shown = list(map(_shown, self._rooms))
        self._size = min(room.size for room in self._rooms)
        self._keys = [room.keys for room in self._rooms]
        self._values = [room.values for room in self._rooms]
        self.addresses = tuple(itertools.chain(*(room.addresses for room in self._rooms)))
        self.dtype = self._keys[0].dtype

    @property
    def length(self) -> int:
        """Tokens that the layers hold."""
        return self._shown[0][0].shape[2]

    def are_open(self, layers: Sequence[Any], shapes: Sequence[tuple[int, int]]) -> bool:
        """Whether the layers are the same and hold what they were shown last, and another token
        fits."""
        held = itertools.chain.from_iterable(map(_held, layers))
        return (
            len(layers) == len(self._layers)
            and all(map(operator.is_, layers, self._layers))
            and all(map(operator.is_, held, itertools.chain.from_iterable(self._shown)))
            and all(map(operator.is_, map(_shown, self._rooms), self._shown))
            and self.shapes == shapes
            and self.length < self._size
        )

    def show_token(self) -> None:
        """Let the layers have the token that was written behind theirs.

        All get it or none: Python looks for interrupts only between its own instructions, and the
        layers change in a single one. What is interrupted around it leaves rooms that are not open.
        """
        window = tuple(map(itertools.repeat, (2, 0, self.length + 1)))
        keys = list(map(Tensor.narrow, self._keys, *window))
        values = list(map(Tensor.narrow, self._values, *window))
        shown = list(zip(keys, values, strict=True))
        states = [{"keys": k, "values": v} for k, v in shown]
        _call_each(setattr, self._rooms, itertools.repeat("shown"), shown)
        _call_each(dict.update, [layer.__dict__ for layer in self._layers], states)
        self._shown = shown


def _call_each(function: Any, *arguments: Any) -> None:
    deque(map(function, *arguments), maxlen=0)


# How many layers are taken at once, and by the first of them their rooms.
_rooms_of_caches: weakref.WeakKeyDictionary[Any, tuple[int, dict[int, Rooms]]] = (
    weakref.WeakKeyDictionary()
)


def rooms_of(past: Any, first: int, shapes: Sequence[tuple[int, int]]) -> Rooms | None:
    """Room for another token of one sequence.

    Args:
        past: a cache.
        first: of its layers.
        shapes: of that one and those behind it, heads and their width.

    Returns:
        None where the layers do not simply hold all keys and values of as many tokens each, or
        none yet.
    """
    if type(past) is not DynamicCache or past.offloading:
        return None
    layers = past.layers[first : first + len(shapes)]
    count, known = _rooms_of_caches.get(past, (0, {}))
    if count != len(shapes):  # those taken otherwise would keep memory that nobody is shown
        known = {}
        _rooms_of_caches[past] = len(shapes), known
    rooms = known.get(first)
    if rooms is None or not rooms.are_open(layers, shapes):
        if len(layers) < len(shapes) or not all(map(_fits, layers, shapes)):
            return None
        if len({(layer.keys.shape[2], layer.keys.dtype) for layer in layers}) != 1:
            return None
        rooms = known[first] = Rooms(layers, shapes)
    return rooms


def _fits(layer: Any, shape: tuple[int, int]) -> bool:
    if type(layer) is not DynamicLayer or not layer.is_initialized:
        return False
    keys, values = layer.keys, layer.values
    length = keys.shape[2] if keys.dim() == 4 else 0
    return (
        keys.shape == values.shape == (1, shape[0], length, shape[1])
        and keys.dtype is values.dtype
        and keys.is_cpu
        and values.is_cpu
    )
