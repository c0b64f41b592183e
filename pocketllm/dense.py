"""The dense model a compression starts from: loading it, and what can be wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PocketError

if TYPE_CHECKING:
    from torch import nn


def source_folder(model: str | os.PathLike[str]) -> Path:
    """The folder that holds a model: the path itself, or the hub's cached snapshot of a name.

    Raises:
        PocketError: no such folder, not a Hugging Face model folder, or not to be had from the hub.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise PocketError(
                f"{folder}: no config.json, so this is not a Hugging Face model folder"
            )
        return folder
    text = os.fspath(model)
    if folder.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise PocketError(
            f"{text}: no such folder, give a model folder or a hub name like owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "LICENSE*", "*.txt"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
        raise PocketError(
            f"{text}: neither a folder nor a model the hub gives ({type(error).__name__})"
        ) from error


def read_config(folder: Path) -> Any:
    """The model's transformers configuration.

    Raises:
        PocketError: unreadable, of an unknown model type, or already quantised.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise PocketError(
            f"{folder}: transformers cannot read its config.json: {_first_line(error)}"
        ) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = (
            quantization.get("quant_method")
            if isinstance(quantization, dict)
            else type(quantization).__name__
        )
        raise PocketError(f"{folder}: is already quantised ({method}), give the dense model")
    return config


def load_model(folder: Path) -> nn.Module:
    """The causal LM in its stored dtype, on the CPU, in evaluation mode, without gradients.

    Raises:
        PocketError: transformers cannot load it, tensors of it are missing in the file, or hold NaN
            or Inf.
    """
    from transformers import AutoModelForCausalLM

    read_config(folder)
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", output_loading_info=True
            )
    except (
        Exception
    ) as error:  # transformers and safetensors raise many kinds; each means the same to the user
        raise PocketError(
            f"{folder}: transformers cannot load it as a causal LM: {_first_line(error)}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise PocketError(f"{folder}: its files lack {len(missing)} tensors, {missing[0]} for one")
    check_finite(model)
    return model.eval().requires_grad_(False)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing that is not an error, and shows no bars."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def check_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or Inf in a parameter.

    Raises:
        PocketError: names the parameter.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise PocketError(f"{name}: holds NaN or Inf, the source model is damaged")


def meta_model(folder: Path) -> nn.Module:
    """The causal LM's modules without storage, for planning."""
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as error:
        raise PocketError(
            f"{folder}: transformers knows no causal LM for it: {_first_line(error)}"
        ) from error
    model.tie_weights()
    return model


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer.

    Raises:
        PocketError: the folder has none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PocketError(
            f"{folder}: no tokenizer that transformers can load: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
