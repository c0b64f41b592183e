"""Second moments of the inputs of a causal LM's linears, decoder layer by decoder layer.

H = E[x xᵀ] over the tokens of a calibration text, x the input of a linear. Layers are visited in
order, and a layer sees what the layers before it give *after* the caller has replaced their
weights, so that later layers are fitted to inputs that already carry the earlier layers' errors.

Memory: the hidden states (windows x length x hidden, float32), one decoder layer in float32, and
the second moments of one layer. Nothing depends on the number of workers, to the bit: a window is
computed by one thread, and windows are summed in order.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from .errors import PocketError

T = TypeVar("T")
Moments = dict[tuple[str, ...], torch.Tensor]


def read_windows(
    path: str | os.PathLike[str], tokenizer: Any, count: int, length: int = 512
) -> torch.Tensor:
    """Windows of a text: tokenised whole, cut without overlap, spread evenly over the file.

    Args:
        path: a UTF-8 text file.
        tokenizer: of transformers.
        count: windows wanted; a shorter text gives all that it has.
        length: tokens a window.

    Returns:
        int64 (windows, length), 1 <= windows <= count.

    Raises:
        PocketError: unreadable file, not UTF-8, or less text than one window.
    """
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as handle:
            text = handle.read()
    except OSError as error:
        raise PocketError(f"calibration: cannot read {name!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PocketError(f"calibration: {name!r} is not UTF-8 text: {error.reason}") from error
    tokens = torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64
    )
    available = len(tokens) // length
    if available == 0:
        raise PocketError(
            f"calibration: {name!r} has {len(tokens)} tokens, give at least {length} (one window), "
            f"better {count * length}"
        )
    windows = tokens[: available * length].view(available, length)
    chosen = np.linspace(0, available - 1, min(count, available)).astype(np.int64)
    return windows[torch.from_numpy(chosen)].clone()


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name: the outermost nn.ModuleList with most parameters.

    Raises:
        PocketError: the model has no such list.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    outer: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(o + ".") for o in outer):
            outer.append(name)
            weights = sum(p.numel() for p in module.parameters())
            if weights and (best is None or weights > best[0]):
                best = (weights, name, module)
    if best is None:
        raise PocketError(
            f"model: {type(model).__name__} has no list of decoder layers, "
            "compress it without calibration"
        )
    return best[1], best[2]


class CalibratedLayer:
    """One decoder layer during calibration.

    Attributes:
        name: module name of the layer.
        module: the layer; in float32 while it is visited.
        targets: names of the wanted linears inside it, in module order.
    """

    def __init__(self, calibrator: Calibrator, index: int, name: str, module: nn.Module) -> None:
        self._calibrator = calibrator
        self._index = index
        self.name = name
        self.module = module
        self.targets = [
            f"{name}.{n}" for n, _ in module.named_modules() if f"{name}.{n}" in calibrator.targets
        ]

    def hessians(self) -> dict[str, np.ndarray]:
        """Runs the layer on every window and collects H of each target's input.

        Returns:
            Target name -> (in, in) float32, symmetric, mean over tokens of x xᵀ. Targets that read
            the same input share one array. A target that no token reached is missing.
        """
        return self._calibrator._hessians(self._index, self)


class Calibrator:
    """Streams a causal LM over calibration windows, one decoder layer at a time.

    ::

        with Calibrator(model, windows, targets) as calibrator:
            for layer in calibrator.layers():
                for name, h in layer.hessians().items():
                    ...                      # replace the weight of the module `name`
            h = calibrator.head_hessian()

    The layer is run again, with the weights it then has, when the next one is asked for. To resume,
    put the stored weights back and skip ``hessians()``.

    Args:
        model: a causal LM of transformers, on the CPU, in evaluation mode.
        windows: int64 (n, length) token numbers.
        targets: module names whose input matters.
        workers: threads; None = torch's.

    Attributes:
        progress: set by the caller; called with the share of the windows that a pass has done.

    Raises:
        PocketError: no list of decoder layers, or token numbers the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: torch.Tensor,
        targets: Collection[str],
        *,
        workers: int | None = None,
    ) -> None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if windows.numel() and int(windows.max()) >= vocabulary:
            raise PocketError(
                f"calibration: token {int(windows.max())} is outside the model's {vocabulary}, "
                "the tokenizer does not belong to this model"
            )
        self.model = model
        self.windows = windows
        self.targets = frozenset(targets)
        self.name, self._layers = decoder_layers(model)
        self._names = {id(m): n for n, m in model.named_modules()}
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(workers or self._threads, initializer=_one_thread)
        self.progress: Callable[[float], None] | None = None
        self._local = threading.local()
        self._hidden: torch.Tensor | None = None
        self._tuples: dict[int, int] = {}
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Calibrator:
        self._patch()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._threads)
        while self._undo:
            self._undo.pop()()

    def __len__(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)

    def layers(self) -> Iterator[CalibratedLayer]:
        """The decoder layers in order."""
        states = self._each(lambda w: self._run(w, 0, None, collect=True)[0])
        for window, state in enumerate(states):
            if self._hidden is None:
                self._hidden = torch.empty(len(self.windows), *state.shape)
            self._hidden[window] = state
        for index, module in enumerate(self._layers):
            restore = _to_float32(module)
            try:
                yield CalibratedLayer(self, index, f"{self.name}.{index}", module)
                self._advance(index)
            finally:
                restore()

    def head_hessian(self) -> np.ndarray | None:
        """H of the output head's input, after all layers; None when the head is never called."""
        head = self.model.get_output_embeddings()
        if head is None:
            return None
        moments = self._collect(len(self._layers), {self._names[id(head)]: head})
        return next(iter(moments.values()), None)

    def token_frequencies(self) -> np.ndarray:
        """float32 (vocabulary,): share of each token in the windows."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        counts = torch.bincount(self.windows.flatten(), minlength=vocabulary)
        return (counts.double() / max(1, self.windows.numel())).float().numpy()

    def _hessians(self, index: int, layer: CalibratedLayer) -> dict[str, np.ndarray]:
        return self._collect(index, {n: self.model.get_submodule(n) for n in layer.targets})

    def _collect(self, index: int, modules: dict[str, nn.Module]) -> dict[str, np.ndarray]:
        totals: Moments = {}
        counts: dict[tuple[str, ...], int] = {}
        handles = [m.register_forward_pre_hook(self._hook(n)) for n, m in modules.items()]
        try:
            for moments, lengths in self._each(lambda w: self._moments(w, index)):
                for names, moment in moments.items():
                    counts[names] = counts.get(names, 0) + lengths[names]
                    if names in totals:
                        totals[names] += moment
                    else:
                        totals[names] = moment
        finally:
            for handle in handles:
                handle.remove()
        result: dict[str, np.ndarray] = {}
        means: dict[tuple[tuple[str, ...], ...], np.ndarray] = {}
        for name in modules:
            groups = tuple(names for names in totals if name in names)
            if groups and groups not in means:
                tokens = sum(counts[names] for names in groups)
                mean = sum((totals[names] for names in groups[1:]), totals[groups[0]]) / tokens
                means[groups] = mean.numpy()
            if groups:
                result[name] = means[groups]
        return result

    def _moments(self, window: int, index: int) -> tuple[Moments, dict[tuple[str, ...], int]]:
        """Sums of x xᵀ over one window, one for each distinct input tensor."""
        self._local.inputs = []
        self._run(window, index, self._state(window))
        sums: Moments = {}
        tokens: dict[tuple[str, ...], int] = {}
        for x, names in self._local.inputs:
            flat = x.reshape(-1, x.shape[-1]).float()
            key = tuple(names)
            sums[key] = sums[key] + flat.T @ flat if key in sums else flat.T @ flat
            tokens[key] = tokens.get(key, 0) + len(flat)
        self._local.inputs = []
        return sums, tokens

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            del module
            x = args[0]
            for seen, names in self._local.inputs:  # tensors held here cannot share an address
                same = seen.data_ptr() == x.data_ptr() and seen.shape == x.shape
                if same and name not in names:
                    names.append(name)
                    return
            self._local.inputs.append((x, [name]))

        return note

    def _advance(self, index: int) -> None:
        hidden = self._hidden
        assert hidden is not None
        outputs = self._each(lambda w: self._run(w, index, hidden[w])[0])
        for window, output in enumerate(outputs):
            hidden[window] = output

    def _state(self, window: int) -> torch.Tensor:
        assert self._hidden is not None
        return self._hidden[window]

    def _each(self, work: Callable[[int], T]) -> Iterator[T]:
        """work(window) of every window, in order; at most a few results wait at any time."""
        pending: deque[Future[T]] = deque()
        ahead = 2 * self._pool._max_workers
        for window in range(len(self.windows)):
            pending.append(self._pool.submit(work, window))
            if self.progress is not None:
                self.progress((window + 1) / len(self.windows))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _run(
        self, window: int, index: int, state: torch.Tensor | None, *, collect: bool = False
    ) -> torch.Tensor:
        """Runs the model on a window with every decoder layer but ``index`` passing through.

        Layer ``index`` gets ``state`` (length, hidden) and its output is returned as (1, length,
        hidden); with ``collect`` its input is. An index behind the last layer runs what follows the
        layers. Masks, positions and other arguments are thus the model's own.
        """
        local = self._local
        local.index, local.state, local.collect, local.result = index, state, collect, None
        with torch.no_grad(), suppress(_Done):
            self.model(input_ids=self.windows[window : window + 1], use_cache=False)
        result = local.result
        local.state = local.result = None
        return result

    def _patch(self) -> None:
        for index, layer in enumerate(self._layers):
            self._replace(layer, self._layer_forward(index, layer.forward))
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is not None:
            self._replace(head, lambda x, *args, **kwargs: x)
        handle = embedding.register_forward_hook(lambda module, args, output: output.float())
        self._undo.append(handle.remove)
        skip = {id(m) for layer in self._layers for m in layer.modules()}
        skip |= {id(embedding), id(head)}
        for module in self.model.modules():
            if id(module) not in skip:
                self._undo.append(_to_float32(module, recurse=False))

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self._undo.append(lambda: delattr(module, "forward"))

    def _layer_forward(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A decoder layer's forward that looks up what this thread wants of the layer."""
        first = next(iter(inspect.signature(forward).parameters))

        def run(*args: Any, **kwargs: Any) -> Any:
            local = self._local
            hidden = args[0] if args else kwargs.pop(first)
            if index == local.index:
                if local.collect:
                    local.result = hidden.float()
                else:
                    output = forward(local.state[None], *args[1:], **kwargs)
                    local.result = output[0] if isinstance(output, tuple) else output
                    self._tuples[index] = len(output) if isinstance(output, tuple) else 0
                raise _Done
            if local.index == len(self._layers) and index == len(self._layers) - 1:
                hidden = local.state[None]
            width = self._tuples[index]
            return (hidden, *[None] * (width - 1)) if width else hidden

        return run


class _Done(Exception):
    """Ends a forward pass as soon as what was wanted of it is there."""


def _one_thread() -> None:
    torch.set_num_threads(1)


def _to_float32(module: nn.Module, *, recurse: bool = True) -> Callable[[], None]:
    """Casts floating parameters and buffers in place; the function returned casts them back."""
    tensors = [*module.parameters(recurse), *module.buffers(recurse)]
    kept = [(t, t.dtype) for t in tensors if t.is_floating_point() and t.dtype != torch.float32]
    for tensor, _ in kept:
        tensor.data = tensor.data.float()

    def restore() -> None:
        for tensor, dtype in kept:
            tensor.data = tensor.data.to(dtype)

    return restore
