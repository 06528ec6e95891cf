"""A step's metrics: fetched after the next step was dispatched, checked, logged, timed."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprompt.checkpoint import Checkpoints
from jaxprompt.logging import RunLogger
from jaxprompt.members import Member, Progress, log_together
from jaxprompt.sharding import to_host
from jaxprompt.steps import FINITE
from jaxprompt.typing import UserError


class StepMetrics:
    """Fetches a step's metrics after the next step was dispatched, checks and logs them."""

    def __init__(
        self,
        members: Sequence[Member],
        all_progress: Sequence[Progress],
        logger: RunLogger,
        checkpoints: Checkpoints,
        count_shapes: Callable[[], int],
        log_every: int,
    ):
        """
        Args:
          all_progress: of each member; marks as diverged those whose numbers are not finite.
          logger: where what concerns all members goes.
          count_shapes: how many shapes of batches there were so far.
          log_every: steps between records; the last step of all always is one.
        """
        self._members, self._progress, self._logger = members, all_progress, logger
        self._checkpoints, self._count_shapes = checkpoints, count_shapes
        self._log_every = log_every
        self._last_step = max(member.total_steps for member in members)
        self._waiting: tuple[int, dict[str, Any]] | None = None
        self._shapes = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what came before (evaluation, compilation) out of examples/s."""
        self._clock = time.perf_counter()
        self._examples = np.zeros(len(self._progress))

    @property
    def _live(self) -> list[int]:
        return [n for n, progress in enumerate(self._progress) if not progress.finished]

    def add(self, number: int, metrics: dict[str, Any]) -> None:
        """Takes a step's metrics, [N] each, and works on those of the step before."""
        previous, self._waiting = self._waiting, (number, metrics)
        if previous is not None:
            self._fetch(*previous, newest=number)

    def drain(self) -> None:
        """Works on the metrics that wait.

        Raises: UserError if the numbers of a run of one were not finite.
        """
        previous, self._waiting = self._waiting, None
        if previous is not None:
            self._fetch(*previous, newest=previous[0])

    def _fetch(self, number: int, metrics: dict[str, Any], newest: int) -> None:
        fetched = {name: np.asarray(value) for name, value in to_host(metrics).items()}
        for n in self._live:
            broken = [name for name in FINITE if not math.isfinite(fetched[name][n])]
            if broken:
                self._diverged(n, broken[0], number, newest)
        live = self._live
        self._examples[live] += fetched["examples"][live]
        seconds = time.perf_counter() - self._clock
        self._logger.progress(number)
        if number % self._log_every == 0 or number == self._last_step:
            self._log(number, fetched, seconds)
            self.restart_clock()

    def _log(self, number: int, fetched: Mapping[str, np.ndarray], seconds: float) -> None:
        steady, together = self._is_steady(), []
        for n in self._live:
            member, progress = self._members[n], self._progress[n]
            values = {name: float(each[n]) for name, each in fetched.items()}
            values["examples_per_second"] = self._examples[n] / seconds if seconds else 0.0
            values["learning_rate"] = member.learning_rate(number - 1)
            member.logger.log(number, values)
            together.append(values)
            if steady:
                progress.train_examples += float(self._examples[n])
                progress.train_seconds += seconds
        if self._members[0].logger is not self._logger and together:
            log_together(self._logger, number, together)

    def _diverged(self, n: int, name: str, number: int, newest: int) -> None:
        """Takes a member out of the run; one without a name is the run, and ends it."""
        what = f"{name} is not finite at step {number} (found by step {newest})"
        member, progress = self._members[n], self._progress[n]
        if member.name:
            progress.diverged, progress.ended, progress.finished = number, number, True
            self._logger.note(f"{member.name}: {what}; it is taken out")
            return
        with contextlib.suppress(UserError):
            self._checkpoints.wait()
        steps = self._checkpoints.steps()
        kept = (
            f"the last good checkpoint is step {steps[-1]}"
            if steps
            else "no checkpoint was saved yet"
        )
        raise UserError(f"{what}; {kept}: lower optim.learning_rate or use another seed")

    def _is_steady(self) -> bool:
        """Whether nothing was compiled since the last window."""
        before, self._shapes = self._shapes, self._count_shapes()
        return before == self._shapes
