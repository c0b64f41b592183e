"""Measuring a model: perplexity, divergence from the dense model, and lm-eval tasks.

Protocol of every figure: the whole text is tokenised once without special tokens, cut into
non-overlapping windows, and run in float32 without a beginning-of-sequence token; means are over
predicted tokens (perplexity) or over all positions (KL divergence, top-1 agreement).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .dense import load_tokenizer, source_folder
from .errors import PocketError
from .schema import QUANT_METHOD

if TYPE_CHECKING:
    from torch import nn

WINDOW = 512
# Logits of one batch, and the float32 working copies of a chunk of its positions, stay below this.
LOGITS_BYTES = 256 << 20
CHUNK_BYTES = 32 << 20
MAX_BATCH = 8


def load(folder: str | os.PathLike[str]) -> nn.Module:
    """The causal LM of a folder or hub name, compressed or dense, in float32, for evaluation.

    Raises:
        PocketError: no such model, or one that transformers cannot load.
    """
    from transformers import AutoModelForCausalLM

    from .hf import register

    register()
    path = source_folder(folder)
    try:
        with _quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except PocketError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds, all meaning this
        raise PocketError(f"{path}: transformers cannot load it as a causal LM: {error}") from error
    return model.eval().requires_grad_(False)


def read_text(text: str | os.PathLike[str]) -> str:
    """``text`` itself when it is a ``str``, the UTF-8 file's content when it is a path object.

    Raises:
        PocketError: the file cannot be read or is not UTF-8.
    """
    if isinstance(text, str):
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except OSError as error:
        raise PocketError(f"{os.fspath(text)}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PocketError(
            f"{os.fspath(text)}: not UTF-8 text (byte {error.start}), convert it first"
        ) from error


def token_windows(
    tokenizer: Any,
    text: str | os.PathLike[str],
    *,
    window: int = WINDOW,
    max_windows: int | None = None,
) -> torch.Tensor:
    """The text as windows of tokens, (windows, window) int64.

    The tokens after the last whole window are left out; a text shorter than one window is one
    window of its own length. Of more than ``max_windows``, that many are taken, evenly spread from
    the first to the last: the i-th is number ``floor(i * (windows - 1) / (max_windows - 1))``.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: the text itself (``str``) or a file (path object).
        window: tokens a window, at least 2.
        max_windows: at most so many windows; None for all.

    Raises:
        PocketError: unreadable file, fewer than two tokens, or an argument out of range.
    """
    if window < 2:
        raise PocketError(f"window: got {window}, want at least 2 tokens")
    if max_windows is not None and max_windows < 1:
        raise PocketError(f"max_windows: got {max_windows}, want at least 1, or None for all")
    # verbose=False: the whole text is longer than the model's context, and is meant to be.
    encoded = tokenizer(read_text(text), add_special_tokens=False, verbose=False)
    tokens = torch.as_tensor(encoded["input_ids"], dtype=torch.int64)
    if tokens.numel() < 2:
        name = "text" if isinstance(text, str) else os.fspath(text)
        raise PocketError(f"{name}: has {tokens.numel()} tokens, want at least 2 to predict any")
    window = min(window, tokens.numel())
    count = tokens.numel() // window
    windows = tokens[: count * window].view(count, window)
    if max_windows is not None and max_windows < count:
        steps = max(1, max_windows - 1)
        windows = windows[[i * (count - 1) // steps for i in range(max_windows)]]
    return windows


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str | os.PathLike[str],
    *,
    window: int = WINDOW,
    max_windows: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> float:
    """exp of the mean negative log-likelihood of every token after its window's first.

    Args:
        model: a causal LM; its logits are widened to float32.
        tokenizer: its tokenizer.
        text: the text itself (``str``) or a file (path object).
        window: tokens a window.
        max_windows: at most so many windows, evenly spread over the text; None for all.
        batch_size: windows a forward pass; None keeps the logits below 256 MB.
        progress: show a bar with the remaining time.

    Raises:
        PocketError: as ``token_windows``.
    """
    windows = token_windows(tokenizer, text, window=window, max_windows=max_windows)
    total = 0.0
    for batch in _batches(model, windows, batch_size, progress, _label("perplexity", text)):
        logits = _logits(model, batch)
        total += _negative_log_likelihood(logits, batch)
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def compare(
    dense: nn.Module,
    compressed: nn.Module,
    tokenizer: Any,
    text: str | os.PathLike[str],
    *,
    window: int = WINDOW,
    max_windows: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Both models on the same windows.

    Args: as ``perplexity``; both models share the tokenizer.

    Returns:
        ``perplexity`` of the compressed model, ``perplexity_dense``, ``kl`` = mean over positions
        of KL(dense || compressed) in nats, and ``top1`` = share of positions where both find the
        same token likeliest.

    Raises:
        PocketError: as ``token_windows``, or vocabularies of different sizes.
    """
    windows = token_windows(tokenizer, text, window=window, max_windows=max_windows)
    total = {"perplexity": 0.0, "perplexity_dense": 0.0, "kl": 0.0, "top1": 0.0}
    for batch in _batches(dense, windows, batch_size, progress, _label("comparison", text)):
        reference, logits = _logits(dense, batch), _logits(compressed, batch)
        if reference.shape != logits.shape:
            raise PocketError(
                f"against: its vocabulary has {reference.shape[-1]} tokens, the compressed model's"
                f" {logits.shape[-1]}; give the model that was compressed"
            )
        total["perplexity"] += _negative_log_likelihood(logits, batch)
        total["perplexity_dense"] += _negative_log_likelihood(reference, batch)
        kl, same = _divergence(reference, logits)
        total["kl"] += kl
        total["top1"] += same
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    return {
        "perplexity": math.exp(total["perplexity"] / predicted),
        "perplexity_dense": math.exp(total["perplexity_dense"] / predicted),
        "kl": total["kl"] / windows.numel(),
        "top1": total["top1"] / windows.numel(),
    }


def evaluate(
    folder: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]] = (),
    tasks: Sequence[str] = (),
    include_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    against: str | os.PathLike[str] | None = None,
    *,
    window: int = WINDOW,
    max_windows: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Everything ``pocketllm eval`` reports.

    Args:
        folder: a model folder or hub name, compressed or dense.
        texts: text files to measure perplexity on.
        tasks: lm-eval task names; ``blimp`` and its paradigms come with this package.
        include_path: folder of further task definitions, or of BLiMP's ``*.jsonl`` files.
        limit: first so many examples of every task.
        against: dense model to compare with on the texts.
        window, max_windows, batch_size, progress: as ``perplexity``.

    Returns:
        ``perplexity`` and ``kl`` by file name (``kl`` is empty without ``against``), ``tasks`` by
        task name and metric, ``bits_per_weight``, ``bytes``, ``bytes_bf16``; with ``against`` also
        ``perplexity_dense`` and ``top1`` by file name.

    Raises:
        PocketError: no such model, text, task or data.
    """
    paths = [Path(text) for text in texts]
    for path in paths:
        if not path.is_file():
            raise PocketError(f"text: no file {path}")
    source = source_folder(folder)
    names = _names(paths)
    result: dict[str, Any] = {"perplexity": {}, "kl": {}, "tasks": {}}
    if against is not None:
        result |= {"perplexity_dense": {}, "top1": {}}
    if tasks:
        try:
            from .lm_eval_plugin import check_tasks, run_tasks
        except ImportError as error:
            raise PocketError(
                'tasks: lm-eval is not installed, `pip install "pocketllm-codec[eval]"` adds it'
            ) from error
        check_tasks(tasks, include_path)
    tokenizer = load_tokenizer(source)
    model = load(source)
    dense = load(against) if against is not None and paths else None
    settings: dict[str, Any] = {
        "window": window,
        "max_windows": max_windows,
        "batch_size": batch_size,
        "progress": progress,
    }
    for name, path in zip(names, paths, strict=True):
        if dense is None:
            result["perplexity"][name] = perplexity(model, tokenizer, path, **settings)
            continue
        for key, value in compare(dense, model, tokenizer, path, **settings).items():
            result[key][name] = value
    if tasks:
        result["tasks"] = run_tasks(
            model, tokenizer, tasks, include_path=include_path, limit=limit, progress=progress
        )
    return result | sizes(source)


def is_compressed(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder's config.json says that pocketllm wrote it."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PocketError(
            f"{os.fspath(folder)}: its config.json cannot be read: {error}"
        ) from error
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def sizes(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``bits_per_weight``, ``bytes`` and ``bytes_bf16`` of a model folder, compressed or dense.

    Of a dense folder, bits_per_weight is over all its weights.

    Raises:
        PocketError: no weight files that can be read.
    """
    path = Path(folder)
    if is_compressed(path):
        from .checkpoint import open_checkpoint

        checkpoint = open_checkpoint(path, check=False)
        return {
            "bits_per_weight": checkpoint.bits_per_weight,
            "bytes": checkpoint.bytes,
            "bytes_bf16": checkpoint.bytes_bf16,
        }
    from safetensors import safe_open

    weights, size = 0, 0
    for file in sorted(path.glob("*.safetensors")):
        size += file.stat().st_size
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (not a mapping)
                weights += math.prod(handle.get_slice(name).get_shape())
    if not weights:
        raise PocketError(f"{path}: no *.safetensors file with weights in it")
    return {"bits_per_weight": 8 * size / weights, "bytes": size, "bytes_bf16": 2 * weights}


def _batches(
    model: nn.Module,
    windows: torch.Tensor,
    batch_size: int | None,
    progress: bool,
    label: str,
) -> Iterator[torch.Tensor]:
    """Groups of windows, with a bar that counts windows."""
    if batch_size is None:
        config: Any = getattr(model, "config", None)
        vocabulary = getattr(config.get_text_config(), "vocab_size", 1) if config else 1
        batch_size = LOGITS_BYTES // (4 * vocabulary * windows.shape[1])
        batch_size = min(MAX_BATCH, max(1, batch_size))
    if batch_size < 1:
        raise PocketError(f"batch_size: got {batch_size}, want at least 1, or None")
    disable = None if progress else True
    with tqdm(total=len(windows), desc=label, unit="window", disable=disable, leave=False) as bar:
        for batch in windows.split(batch_size):
            yield batch
            bar.update(len(batch))


@torch.inference_mode()
def _logits(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """(windows, window, vocabulary) in the model's dtype."""
    device = next(model.parameters()).device
    return model(input_ids=batch.to(device), use_cache=False).logits


def _position_chunks(vocabulary: int, positions: int) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // (4 * vocabulary))
    for start in range(0, positions, step):
        yield slice(start, min(positions, start + step))


@torch.inference_mode()
def _negative_log_likelihood(logits: torch.Tensor, batch: torch.Tensor) -> float:
    """Sum over the batch of -log p(token) in nats, each window's first token excepted."""
    total = 0.0
    for window, tokens in zip(logits, batch.to(logits.device), strict=True):
        for part in _position_chunks(logits.shape[-1], len(tokens) - 1):
            total += torch.nn.functional.cross_entropy(
                window[:-1][part].float(), tokens[1:][part], reduction="none"
            ).sum(dtype=torch.float64).item()  # fmt: skip
    return total


@torch.inference_mode()
def _divergence(dense: torch.Tensor, compressed: torch.Tensor) -> tuple[float, float]:
    """Sums over all positions of KL(dense || compressed) in nats, and of equal likeliest tokens."""
    kl, same = 0.0, 0.0
    vocabulary = dense.shape[-1]
    p, q = dense.reshape(-1, vocabulary), compressed.reshape(-1, vocabulary)
    for part in _position_chunks(vocabulary, len(p)):
        log_p = p[part].float().log_softmax(-1)
        log_q = q[part].to(log_p.device).float().log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).sum().item()
        same += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
    return kl, same


def _names(paths: Sequence[Path]) -> list[str]:
    """File names to report under; whole paths where two files share a name."""
    names = [path.name for path in paths]
    return [
        name if names.count(name) == 1 else str(path)
        for name, path in zip(names, paths, strict=True)
    ]


def _label(what: str, text: str | os.PathLike[str]) -> str:
    return what if isinstance(text, str) else f"{what} {Path(text).name}"


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' loading bar, which says nothing about a small model."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
