"""Second moments of the inputs of a causal LM's linears, decoder layer by decoder layer.

H = E[x xᵀ] over the tokens of a calibration text, x the input of a linear. Layers are visited in
order, and a layer sees what the layers before it give *after* the caller has replaced their
weights, so that later layers are fitted to inputs that already carry the earlier layers' errors.

Memory: one decoder layer in float32 (for its linears see precision.py), the second moments of one
layer, and what it computes on a few windows; the hidden states between layers (windows x length x
hidden, float32) wait in a file.
Nothing depends on the number of workers, to the bit: a window is computed by one thread, a block of
a matrix of moments too, and windows are summed in order.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from . import kernels
from .errors import PocketError
from .parallel import worker_threads
from .precision import factor_dtype, kept_dtype, power_of_two, rounded_factors, rounded_linears
from .weights import LoadedWeights, Weights
from .workspace import writing

T = TypeVar("T")
# Modules that read one input.
Names = tuple[str, ...]
# Rows of a matrix of second moments that one thread computes at a time. Only those on and below the
# diagonal are computed, so that smaller blocks save more, and larger ones multiply faster.
MOMENT_ROWS = 1024
# Windows whose inputs are multiplied together where these are kept in bfloat16.
MOMENT_WINDOWS = 4


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
        windows: int64 (n, length) token numbers, or (n, several, length): windows that pass
            together and count as one, whose length is then that of all.
        targets: module names whose input matters.
        workers: threads; None = torch's.
        weights: where the model's parameters are; None: in the model.
        folder: where the hidden states wait; None: in the system's folder for such files.

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
        weights: Weights | None = None,
        folder: Path | None = None,
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
        self._pool = worker_threads(workers or self._threads)
        self.progress: Callable[[float], None] | None = None
        self._local = threading.local()
        self._weights = weights or LoadedWeights(model)
        self._folder = folder
        self._hidden: HiddenStates | None = None
        self._tuples: dict[int, int] = {}
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Calibrator:
        self._patch()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        if self._hidden is not None:
            self._hidden.close()
        torch.set_num_threads(self._threads)
        while self._undo:
            self._undo.pop()()

    def __len__(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)

    def layers(self) -> Iterator[CalibratedLayer]:
        """The decoder layers in order."""
        self._hidden = self.first_inputs()
        for index, module in enumerate(self._layers):
            with self._weights.visit(module):
                yield CalibratedLayer(self, index, f"{self.name}.{index}", module)
                self._advance(index)

    def head_hessian(self) -> np.ndarray | None:
        """H of the output head's input, after all layers; None when the head is never called."""
        head = self.model.get_output_embeddings()
        if head is None:
            return None
        moments = self._collect(len(self._layers), {self._names[id(head)]: head})
        return next(iter(moments.values()), None)

    def first_inputs(self) -> HiddenStates:
        """Input (length, hidden) of the first layer, of every window."""
        windows = range(len(self.windows))
        return self._kept(self._each(lambda w: self._run(w, 0, None, collect=True), windows))

    def forward(self, index: int, states: HiddenStates) -> HiddenStates:
        """Outputs (length, hidden) of a layer for these inputs. To be asked for in order."""
        layer = self._layers[index]
        with self._weights.visit(layer), self._runnable(layer):
            windows = range(len(states))
            return self._kept(self._each(lambda w: self._run(w, index, states[w]), windows))

    @contextmanager
    def _runnable(self, layer: nn.Module) -> Iterator[None]:
        """Within it the layer can be run, with its products as quick as the processor has them."""
        with rounded_factors(), self._weights.run(layer), rounded_linears(layer):
            yield

    def _kept(self, states: Iterator[torch.Tensor]) -> HiddenStates:
        kept: HiddenStates | None = None
        for window, state in enumerate(states):
            if kept is None:
                kept = HiddenStates(len(self.windows), state, self._folder)
            kept[window] = state
        assert kept is not None  # there is a window
        return kept

    @rounded_factors()
    def backward_head(
        self, states: HiddenStates, pull: Callable[[int, torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor]:
        """Gradients (length, hidden) at the last layer's outputs.

        Args:
            states: these outputs.
            pull: from a window and the input (length, hidden) of the output head to the gradient
                there.

        Raises:
            PocketError: the model has no output head.
        """
        head = self.model.get_output_embeddings()
        if head is None:
            raise PocketError(f"model: {type(self.model).__name__} has no output head")

        def gradient(window: int) -> torch.Tensor:
            self._await_inputs(None)
            state = states[window].detach().requires_grad_()
            self._run(window, len(self._layers), state, learn=True)
            ((x, _),) = self._local.inputs
            self._local.inputs = []
            pulled = pull(window, x.detach().reshape(-1, x.shape[-1])).view_as(x)
            return torch.autograd.grad(x, state, pulled)[0]

        handle = head.register_forward_pre_hook(self._hook("head"))
        try:
            return list(self._each(gradient, range(len(states))))
        finally:
            handle.remove()

    def backward(
        self,
        index: int,
        states: HiddenStates,
        gradients: Sequence[torch.Tensor],
        spread: Mapping[str, np.ndarray],
    ) -> tuple[list[torch.Tensor], dict[str, np.ndarray]]:
        """One layer backwards, for its inputs and the gradients at its outputs.

        Args:
            spread: name of each target -> weights (out,) of its rows.

        Returns:
            The gradients (length, hidden) at its inputs, and for every target in it the squares of
            its matrix's gradients by single tokens, summed over the tokens and, weighted, each
            column: (in,) float64.
        """
        layer = self._layers[index]
        targets = CalibratedLayer(self, index, f"{self.name}.{index}", layer).targets
        squares = {name: np.zeros(1) for name in targets}
        before = []
        with self._weights.visit(layer), self._runnable(layer):
            modules = {name: self.model.get_submodule(name) for name in targets}
            handles = [m.register_forward_hook(self._output_hook(n)) for n, m in modules.items()]

            def gradient(window: int) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
                self._local.products = []
                state = states[window].detach().requires_grad_()
                output = self._run(window, index, state, learn=True)
                products, self._local.products = self._local.products, []
                wanted = [state, *(product for _, _, product in products)]
                first, *pulled = torch.autograd.grad(
                    output, wanted, gradients[window], allow_unused=True
                )
                pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
                for (name, x, _), g in zip(products, pulled, strict=True):
                    if g is not None:
                        pairs.setdefault(name, []).append((x, g))
                return first, {n: column_squares(found, spread[n]) for n, found in pairs.items()}

            try:
                for first, columns in self._each(gradient, range(len(states))):
                    before.append(first)
                    for name, column in columns.items():
                        squares[name] = squares[name] + column
            finally:
                for handle in handles:
                    handle.remove()
        return before, squares

    def _hessians(self, index: int, layer: CalibratedLayer) -> dict[str, np.ndarray]:
        with self._runnable(layer.module):
            return self._collect(index, {n: self.model.get_submodule(n) for n in layer.targets})

    @rounded_factors()
    def _collect(self, index: int, modules: dict[str, nn.Module]) -> dict[str, np.ndarray]:
        sums: dict[Names, torch.Tensor] = {}
        tokens: dict[Names, int] = {}
        # Products of bfloat16 are rounded to it: of the same windows with any number of threads.
        step = MOMENT_WINDOWS if factor_dtype() == torch.bfloat16 else 1
        together = -(-self._ahead // step) * step
        # Where each is called once, a window is done when all have been.
        awaited, once = None, True
        handles = [m.register_forward_pre_hook(self._hook(n)) for n, m in modules.items()]
        try:
            for first in range(0, len(self.windows), together):
                group = range(first, min(first + together, len(self.windows)))
                inputs: dict[tuple[Names, int], list[torch.Tensor]] = {}
                work = functools.partial(self._inputs, index=index, awaited=awaited)
                for window, (found, calls) in zip(group, self._each(work, group), strict=True):
                    once = once and sorted(calls) == sorted(modules)
                    for x, readers in found:
                        inputs.setdefault((tuple(readers), window // step), []).append(x)
                awaited = frozenset(modules) if once else None
                columns: dict[Names, list[torch.Tensor]] = {}
                for names, part in list(inputs):
                    xs = inputs.pop((names, part))
                    columns.setdefault(names, []).append(torch.cat(xs, 1) if len(xs) > 1 else xs[0])
                for names, xs in columns.items():
                    tokens[names] = tokens.get(names, 0) + sum(x.shape[1] for x in xs)
                    if names not in sums:
                        sums[names] = torch.zeros(len(xs[0]), len(xs[0]))
                self._add(sums, columns)
        finally:
            for handle in handles:
                handle.remove()
        for total in sums.values():
            _mirror(total)
        return _means(modules, sums, tokens)

    def _inputs(
        self, window: int, index: int, awaited: frozenset[str] | None
    ) -> tuple[list[tuple[torch.Tensor, list[str]]], list[str]]:
        """Distinct inputs of one window as columns, (in, tokens), each with who reads it; and who
        was called, each time."""
        self._await_inputs(awaited)
        self._run(window, index, self._state(window))
        found, self._local.inputs = self._local.inputs, []
        kind = kept_dtype()
        columns = [(x.reshape(-1, x.shape[-1]).to(kind).T.contiguous(), n) for x, n in found]
        return columns, self._local.calls

    def _await_inputs(self, awaited: frozenset[str] | None) -> None:
        """Makes this thread note inputs; a forward pass ends where all ``awaited`` have theirs."""
        self._local.inputs, self._local.calls = [], []
        self._local.awaited = None if awaited is None else set(awaited)

    def _add(
        self,
        sums: dict[Names, torch.Tensor],
        inputs: dict[Names, list[torch.Tensor]],
    ) -> None:
        """Adds x xᵀ of every token, blocks on and below the diagonal only, each by one thread."""
        kind = factor_dtype()

        def add(names: Names, first: int) -> None:
            total = sums[names]
            last = min(first + MOMENT_ROWS, len(total))
            block = total[first:last, :last]
            for x in inputs[names]:
                if kind == torch.int16:
                    kernels.rounded_gram(x.numpy(), total.numpy(), first, last)
                elif kind == torch.bfloat16:
                    block += x[first:last] @ x[:last].T
                else:
                    block.addmm_(x[first:last], x[:last].T)

        blocks = [(n, first) for n in inputs for first in range(0, len(sums[n]), MOMENT_ROWS)]
        # The long rows first: threads end together.
        blocks.sort(key=lambda block: -block[1])
        for done in [self._pool.submit(add, *block) for block in blocks]:
            done.result()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            del module
            local, x = self._local, args[0]
            local.calls.append(name)
            for seen, names in local.inputs:  # tensors held here cannot share an address
                same = seen.data_ptr() == x.data_ptr() and seen.shape == x.shape
                if same and name not in names:
                    names.append(name)
                    break
            else:
                local.inputs.append((x, [name]))
            if local.awaited is not None:
                local.awaited.discard(name)
                if not local.awaited:
                    raise _Done

        return note

    def _output_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def note(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            del module
            self._local.products.append((name, args[0].detach(), output))

        return note

    def _advance(self, index: int) -> None:
        hidden = self._hidden
        assert hidden is not None
        with self._runnable(self._layers[index]):
            windows = range(len(self.windows))
            outputs = self._each(lambda w: self._run(w, index, hidden[w]), windows)
            for window, output in enumerate(outputs):
                hidden[window] = output

    def _state(self, window: int) -> torch.Tensor:
        assert self._hidden is not None
        return self._hidden[window]

    @property
    def _ahead(self) -> int:
        """Windows whose results wait at any time."""
        return 2 * self._pool._max_workers

    def _each(self, work: Callable[[int], T], windows: Sequence[int]) -> Iterator[T]:
        """work(window) of these windows, in order; at most a few results wait at any time."""
        pending: deque[Future[T]] = deque()
        for window in windows:
            pending.append(self._pool.submit(work, window))
            if self.progress is not None:
                self.progress((window + 1) / len(self.windows))
            if len(pending) > self._ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _run(
        self,
        window: int,
        index: int,
        state: torch.Tensor | None,
        *,
        collect: bool = False,
        learn: bool = False,
    ) -> torch.Tensor:
        """Runs the model on a window with every decoder layer but ``index`` passing through.

        Layer ``index`` gets ``state`` (length, hidden) and its output is returned, alike; with
        ``collect`` its input is. An index behind the last layer runs what follows the
        layers. Masks, positions and other arguments are thus the model's own. With ``learn`` the
        graph for gradients is kept.
        """
        local = self._local
        local.index, local.state, local.collect, local.result = index, state, collect, None
        with torch.set_grad_enabled(learn), suppress(_Done):
            self.model(input_ids=torch.atleast_2d(self.windows[window]), use_cache=False)
        result = local.result
        local.state = local.result = None
        return None if result is None else result.flatten(0, -2)

    def _patch(self) -> None:
        for index, layer in enumerate(self._layers):
            self._replace(layer, self._layer_forward(index, layer.forward))
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is not None:
            self._replace(head, lambda x, *args, **kwargs: x)
        self._undo.append(self._weights.hold_embedding(embedding, self.windows))
        handle = embedding.register_forward_hook(lambda module, args, output: output.float())
        self._undo.append(handle.remove)
        skip = {id(m) for layer in self._layers for m in layer.modules()}
        skip |= {id(embedding), id(head)}
        for module in self.model.modules():
            if id(module) not in skip:
                self._undo.append(self._weights.hold(module))

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
                    output = forward(local.state.view_as(hidden), *args[1:], **kwargs)
                    local.result = output[0] if isinstance(output, tuple) else output
                    self._tuples[index] = len(output) if isinstance(output, tuple) else 0
                raise _Done
            if local.index == len(self._layers) and index == len(self._layers) - 1:
                hidden = local.state.view_as(hidden)
            width = self._tuples[index]
            return (hidden, *[None] * (width - 1)) if width else hidden

        return run


class _Done(Exception):
    """Ends a forward pass as soon as what was wanted of it is there."""


def column_squares(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], spread: np.ndarray
) -> np.ndarray:
    """Sums (in,) float64 of the squares of each column of a matrix's gradients by single tokens,
    weighted by row.

    Such a gradient is the outer product of what the token has at the matrix's two sides, and is
    never made.

    Args:
        pairs: an input (..., in) of the matrix and the gradient (..., out) at its product, for each
            time it was used.
        spread: (out,) weights.
    """
    unit = power_of_two(math.sqrt(spread.max(initial=0.0)))
    weights = torch.from_numpy(spread / unit**2).float()
    total = np.zeros(pairs[0][0].shape[-1])
    for pair in pairs:
        if not pair[0].numel():  # an expert that no token was sent to
            continue
        # The larger weights are, the smaller are their gradients and the inputs of those behind.
        units = [power_of_two(float(side.abs().max())) for side in pair]
        x, gradient = (
            side.mul(1 / own).square_().flatten(0, -2)
            for side, own in zip(pair, units, strict=True)
        )
        total += (unit * math.prod(units)) ** 2 * ((gradient @ weights) @ x).double().numpy()
    return total


def _means(
    modules: Iterable[str],
    sums: dict[Names, torch.Tensor],
    tokens: dict[Names, int],
) -> dict[str, np.ndarray]:
    """H of every module that some token reached; a sum that stands alone is divided in place."""
    groups = {name: tuple(names for names in sums if name in names) for name in modules}
    means: dict[tuple[Names, ...], np.ndarray] = {}
    for group in sorted(set(groups.values()), key=len, reverse=True):
        if len(group) == 1:
            means[group] = sums[group[0]].div_(tokens[group[0]]).numpy()
        elif group:
            total = sum((sums[names] for names in group[1:]), sums[group[0]])
            means[group] = (total / sum(tokens[names] for names in group)).numpy()
    return {name: means[group] for name, group in groups.items() if group}


def _mirror(lower: torch.Tensor) -> None:
    """Copies what is below the diagonal to above it, transposed."""
    for first in range(0, len(lower), MOMENT_ROWS):
        rows = slice(first, first + MOMENT_ROWS)
        lower[:first, rows] = lower[rows, :first].T
        block = lower[rows, rows]
        block.tril_().add_(block.tril(-1).T)


class HiddenStates:
    """What goes from layer to layer, in a file that nobody else sees: windows like ``first``.

    Raises:
        PocketError: no space for it.
    """

    def __init__(self, count: int, first: torch.Tensor, folder: Path | None) -> None:
        self._count, self._shape = count, first.shape
        self._bytes = first.numel() * 4
        self._place = folder or Path(tempfile.gettempdir())
        with writing(self._place):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            self._file.truncate(count * self._bytes)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(self.__getitem__, range(self._count))

    def __getitem__(self, window: int) -> torch.Tensor:
        data = bytearray(os.pread(self._file.fileno(), self._bytes, window * self._bytes))
        return torch.frombuffer(data, dtype=torch.float32).view(self._shape)

    def __setitem__(self, window: int, state: torch.Tensor) -> None:
        view = memoryview(state.contiguous().numpy()).cast("B")
        at = window * self._bytes
        with writing(self._place):
            while view:
                done = os.pwrite(self._file.fileno(), view, at)
                view, at = view[done:], at + done

    def close(self) -> None:
        """Gives the space back."""
        self._file.close()
