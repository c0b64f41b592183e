"""Two bars with remaining times: the whole job in units of expected work, and the step at hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType

from tqdm.auto import tqdm

# Redraws in a terminal are cheap, lines in a log file are not.
SECONDS_BETWEEN_REDRAWS = 0.5
OVERALL = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"
STEP = "  {desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"


class Progress:
    """Progress of a job made of steps whose relative cost is known roughly.

    Args:
        what: name of the job.
        work: sum of the work of all steps, in any unit.
        enabled: show anything at all.
    """

    def __init__(self, what: str, work: float, enabled: bool) -> None:
        self._work = max(work, 1e-9)
        self._done = 0.0
        self._step_work = 0.0
        settings = {
            "disable": not enabled,
            "mininterval": SECONDS_BETWEEN_REDRAWS,
            "leave": False,
        }
        self._all = tqdm(total=1.0, desc=what, bar_format=OVERALL, position=0, **settings)
        self._one = tqdm(total=1.0, bar_format=STEP, position=1, **settings)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._one.close()
        self._all.close()

    def expect(self, work: float) -> None:
        """From now on the steps that follow are this much work."""
        self._work = max(self._done + self._step_work + work, 1e-9)

    def step(self, what: str, work: float) -> Callable[[float], None]:
        """Begin a step; the one before it is over.

        Returns:
            A function to call with the share of the step that is done, 0 to 1.
        """
        self._done += self._step_work
        self._step_work = work
        self._one.reset()
        self._one.set_description_str(what)
        self._show(0.0)
        return self._show

    def steps(self, what: str, work: Mapping[str, float]) -> Callable[[str, float], None]:
        """Begin steps that run at the same time, as one; the step before them is over.

        Args:
            what: name of all.
            work: of each by name.

        Returns:
            A function to call, from any thread, with a name and the share of that step that is
            done, 0 to 1.
        """
        lock, shares = threading.Lock(), dict.fromkeys(work, 0.0)
        whole = max(sum(work.values()), 1e-9)
        show = self.step(what, whole)

        def one(name: str, share: float) -> None:
            with lock:
                shares[name] = share
                show(sum(shares[n] * work[n] for n in work) / whole)

        return one

    def _show(self, share: float) -> None:
        whole = min(1.0, (self._done + share * self._step_work) / self._work)
        self._all.update(max(0.0, whole - self._all.n))
        self._one.update(max(0.0, share - self._one.n))
