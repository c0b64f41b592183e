"""Codecs trained at the same time: the same as alone, stopped together, one progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llama
import torch

from pocketllm import training
from pocketllm.config import PocketConfig
from pocketllm.errors import PocketError
from pocketllm.planning import Plan, make_plan
from pocketllm.progress import Progress
from pocketllm.stored import StoredCodec
from pocketllm.training import train_codecs
from pocketllm.weights import Weights, open_weights
from pocketllm.workspace import Workspace

CONFIG = PocketConfig(subvector=4, codebook=256, share="tensor", epochs=1)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def source(tmp_path: Path) -> tuple[Plan, Weights]:
    weights, _ = open_weights(tiny_llama.make(tmp_path / "dense"))
    return make_plan(weights.model, CONFIG), weights


def quietly(names: list[str]) -> Callable[[str, float], None]:
    del names
    return lambda name, share: None


def train(source: tuple[Plan, Weights], out: Path, resume: bool = False) -> dict[str, StoredCodec]:
    with Workspace(out, {}, resume=resume) as workspace:
        return train_codecs(*source, CONFIG, workspace, quietly)[0]


def test_any_number_of_threads_gives_the_same(
    source: tuple[Plan, Weights],
    tmp_path: Path,
    threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    for number, count in enumerate((1, 3, 5)):
        threads(count)
        if count == 5:  # each codec by all threads
            monkeypatch.setattr(training, "HELD_TOGETHER", 1)
        made.append(train(source, tmp_path / str(number)))
        assert torch.get_num_threads() == count
    assert len(made[0]) > 3
    for other in made[1:]:
        assert list(other) == list(source[0].codecs)
        for name, codec in other.items():
            for part, array in codec.parts.items():
                np.testing.assert_array_equal(array, made[0][name].parts[part])


def test_the_first_error_stops_the_others_and_keeps_what_is_done(
    source: tuple[Plan, Weights],
    tmp_path: Path,
    threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads(3)
    real, lock, calls, cancelled = training.train_stored_codec, threading.Lock(), [0], [0]

    def failing(rows: Any, spec: Any, config: Any, progress: Any) -> StoredCodec:
        with lock:
            calls[0] += 1
            call = calls[0]
        if call == 1:
            return real(rows, spec, config)
        if call == 3:
            raise PocketError("codewords: too many")
        try:
            for _ in range(3000):
                progress(0.5, "training")
                time.sleep(0.01)
            raise AssertionError("was not stopped")
        except CancelledError:
            cancelled[0] += 1
            raise

    monkeypatch.setattr(training, "train_stored_codec", failing)
    with pytest.raises(PocketError, match="codewords: too many"):
        train(source, tmp_path / "small")
    assert cancelled[0] >= 1 and calls[0] < len(source[0].codecs)

    again = []

    def counting(*arguments: Any) -> StoredCodec:
        again.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(training, "train_stored_codec", counting)
    assert list(train(source, tmp_path / "small", resume=True)) == list(source[0].codecs)
    assert len(again) == len(source[0].codecs) - 1


def test_steps_at_the_same_time_add_up_by_their_work() -> None:
    with Progress("job", 10.0, enabled=False) as progress:
        progress.step("before", 2.0)
        shown: list[float] = []
        progress._show = shown.append  # type: ignore[method-assign]
        show = progress.steps("both", {"long": 6.0, "short": 2.0})
        show("long", 0.5)
        show("short", 1.0)
        show("long", 1.0)
    assert shown == pytest.approx([0.0, 3 / 8, 5 / 8, 1.0])
