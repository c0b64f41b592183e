"""lm-eval on compressed models: the model type ``pocketllm``, and the tasks that ship here.

``lm_eval --model pocketllm --model_args pretrained=DIR`` finds ``PocketLM`` by itself; a script
that does not use the command line imports this module first.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from .errors import PocketError
from .evaluate import LOGITS_BYTES

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from torch import nn

TASKS_FOLDER = Path(__file__).parent / "tasks"
# Where the shipped BLiMP tasks look for the *.jsonl files, as a setting of the task or here.
BLIMP_VARIABLE = "POCKETLLM_BLIMP_DIR"
MAX_BATCH = 64
TYPICAL_TOKENS = 64


@register_model("pocketllm")
class PocketLM(HFLM):
    """lm-eval's Hugging Face model over a compressed folder, or a model already loaded.

    Args:
        pretrained: folder or hub name of a compressed (or dense) model, or the model itself.
        device: ``"cuda"`` when there is one unless named otherwise, else ``"cpu"``.
        dtype: of the computation; float32 unless named otherwise.
        others: as ``HFLM``.
    """

    def __init__(
        self,
        pretrained: str | nn.Module,
        device: str | None = None,
        dtype: str = "float32",
        **others: Any,
    ) -> None:
        # Where progress bars of the model's work go; None leaves standard error as it is.
        self.bars: TextIO | None = None
        if isinstance(pretrained, str):
            from .hf import register

            register()
            import torch

            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            super().__init__(pretrained=pretrained, device=device, dtype=dtype, **others)
        else:
            super().__init__(pretrained=pretrained, **others)

    def loglikelihood(self, *arguments: Any, **settings: Any) -> Any:
        """As ``HFLM``."""
        with self._with_bars():
            return super().loglikelihood(*arguments, **settings)

    def loglikelihood_rolling(self, *arguments: Any, **settings: Any) -> Any:
        """As ``HFLM``."""
        with self._with_bars():
            return super().loglikelihood_rolling(*arguments, **settings)

    def generate_until(self, *arguments: Any, **settings: Any) -> Any:
        """As ``HFLM``."""
        with self._with_bars():
            return super().generate_until(*arguments, **settings)

    def _with_bars(self) -> AbstractContextManager[Any]:
        return redirect_stderr(self.bars) if self.bars is not None else nullcontext()


def blimp_folder(include_path: str | os.PathLike[str] | None) -> Path | None:
    """The folder of BLiMP's ``*.jsonl`` files: ``include_path`` if it holds any, else the
    environment variable's, else None."""
    if include_path is not None and any(Path(include_path).glob("*.jsonl")):
        return Path(include_path).resolve()
    named = os.environ.get(BLIMP_VARIABLE)
    return Path(named).resolve() if named else None


def check_tasks(tasks: Sequence[str], include_path: str | os.PathLike[str] | None) -> list[str]:
    """The tasks' full names; a BLiMP paradigm may be given without its ``blimp_``.

    Raises:
        PocketError: no such folder or task.
    """
    return _resolve(tasks, include_path)[1]


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Run lm-eval tasks on a model.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer; it needs a beginning- or end-of-sequence token.
        tasks: names of lm-eval tasks or groups; ``blimp`` and its paradigms read their data from
            ``include_path`` or the folder that POCKETLLM_BLIMP_DIR names.
        include_path: folder of task definitions (YAML), of BLiMP's ``*.jsonl`` files, or of both.
        limit: first so many examples of every task.
        batch_size: requests a forward pass; None chooses by the vocabulary's size.
        progress: show lm-eval's progress bars of the model's work.

    Returns:
        Task or group name -> metric -> value, groups first.

    Raises:
        PocketError: no such task or folder, or data that cannot be had.
    """
    import lm_eval

    manager, names = _resolve(tasks, include_path)
    bars = sys.stderr if progress else None
    with _quiet():
        if batch_size is None:
            batch_size = LOGITS_BYTES // (4 * len(tokenizer) * TYPICAL_TOKENS)
            batch_size = min(MAX_BATCH, max(1, batch_size))
        try:
            language_model = PocketLM(model, tokenizer=tokenizer, batch_size=batch_size)
            language_model.bars = bars
            found = lm_eval.simple_evaluate(
                model=language_model,
                tasks=names,
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        except (ConnectionError, FileNotFoundError, ValueError) as error:
            raise PocketError(f"tasks: {' '.join(str(error).split())}") from error
    results = {**found.get("groups", {}), **found["results"]}
    return {
        name: {
            metric.removesuffix(",none"): float(value)
            for metric, value in values.items()
            if isinstance(value, int | float) and metric not in ("sample_len", "sample_count")
            and "stderr" not in metric
        }
        for name, values in results.items()
    }  # fmt: skip


def _resolve(
    tasks: Sequence[str], include_path: str | os.PathLike[str] | None
) -> tuple[TaskManager, list[str]]:
    from lm_eval.tasks import TaskManager

    paths: list[Path] = []
    metadata: dict[str, Any] = {}
    if include_path is not None:
        path = Path(include_path)
        if not path.is_dir():
            raise PocketError(f"include_path: no folder {path}")
        paths.append(path.resolve())
    data = blimp_folder(include_path)
    if data is not None:
        paths.insert(0, TASKS_FOLDER)
        metadata["blimp_folder"] = str(data)
    with _quiet(swallow_bars=False):
        manager = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
        names = [_full_name(task, manager) for task in tasks]
        if None in names:
            # lm-eval's own thousands of tasks take seconds to index: only when they are asked for.
            manager = TaskManager(include_path=paths, metadata=metadata)
            names = [_full_name(task, manager) for task in tasks]
    missing = [task for task, name in zip(tasks, names, strict=True) if name is None]
    if missing:
        raise PocketError(
            f"tasks: neither lm-eval nor include_path has a task {missing[0]!r};"
            " `lm_eval ls tasks` lists lm-eval's"
        )
    return manager, [name for name in names if name is not None]


def _full_name(task: str, manager: TaskManager) -> str | None:
    known = manager.task_index
    return next((name for name in (task, f"blimp_{task}") if name in known), None)


@contextmanager
def _quiet(swallow_bars: bool = True) -> Iterator[None]:
    """Without lm-eval's log and, on request, its progress bars: one or more for every task."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()) if swallow_bars else nullcontext():
            yield
    finally:
        logger.setLevel(level)
