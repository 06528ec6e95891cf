"""The loop around a compiled step that `train` and `pretrain` share: metrics, evaluation, saving, stopping.

What a step computes, what is evaluated and what is kept are the callers' business.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax

from jaxprompt.checkpoint import Checkpoints
from jaxprompt.logging import RunLogger
from jaxprompt.steps import TrainState
from jaxprompt.typing import ArrayTree, Batch, UserError


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a run lasts and how often it does what.

    Attributes:
      steps: optimizer steps; 0 = the recipe's, unless `epochs` says how long.
      epochs: passes over the training data instead of `steps`; 0 = off.
      eval_every: steps between evaluations; 0 = only at the end.
      save_every: steps between checkpoints; 0 = only at the end.
      log_every: steps between plain progress lines (metrics.jsonl gets every one of these).
      keep: newest checkpoints kept; two, so that one may be damaged.
      accumulate: microbatches a step.
      early_stopping: evaluations without a better score before the run ends; 0 = off.
    """

    steps: int = 0
    epochs: float = 0.0
    eval_every: int = 500
    save_every: int = 500
    log_every: int = 10
    keep: int = 2
    accumulate: int = 1
    early_stopping: int = 0

    def __post_init__(self):
        for name in ("steps", "epochs", "eval_every", "save_every", "early_stopping"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} is {getattr(self, name)}, it cannot be negative")
        for name in ("log_every", "keep", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}, it has to be at least 1")
        if self.steps and self.epochs:
            raise UserError("train.steps and train.epochs are both set; set one of them to 0")


class Batches(Protocol):
    """What the loop needs of a data pipeline."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    @property
    def shape_counts(self) -> Mapping[Any, int]: ...


@dataclasses.dataclass
class Progress:
    """What a run knows beside its arrays; travels in the checkpoint's metadata.

    Attributes:
      best_score, best_step, best_metrics: of the best evaluation so far.
      waited: evaluations since then.
      finished: the run has ended by itself (steps done or stopped early).
      stopped_early: because evaluations no longer got better.
      train_examples, train_seconds: of the logged windows, without compilation and evaluation.
    """

    best_score: float | None = None
    best_step: int = 0
    best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    waited: int = 0
    finished: bool = False
    stopped_early: bool = False
    train_examples: float = 0.0
    train_seconds: float = 0.0

    @property
    def examples_per_second(self) -> float:
        """Speed of training; 0 if nothing was timed."""
        return self.train_examples / self.train_seconds if self.train_seconds else 0.0


def restore(
    checkpoints: Checkpoints,
    identity: Mapping[str, Any],
    state: TrainState,
    batches: Batches,
    total_steps: int,
) -> tuple[TrainState, Progress, int | None]:
    """Where a run goes on: the newest whole checkpoint, with the data at the same place.

    Args:
      state: a fresh state, which also says structure and shardings.
    Returns: (state, progress, step resumed from or None for a new run).
    Raises: UserError if the directory holds another run, or no checkpoint of it is whole.
    """
    found = checkpoints.restore_latest(_saved(state), identity)
    if found is None:
        return state, Progress(), None
    number, saved, metadata = found
    batches.set_state(metadata["data"])
    progress = Progress(**metadata["progress"])
    if number < total_steps and not progress.stopped_early:
        progress.finished = False  # the run was finished, and has been given more steps since
    saved = jax.device_put(saved)
    rng = jax.random.wrap_key_data(saved.pop("rng"))
    return TrainState(**saved, rng=rng), progress, number


@dataclasses.dataclass(frozen=True)
class Loop:
    """Everything one run of the loop needs.

    Attributes:
      step: (state, frozen, batch) -> (state, metrics), compiled.
      frozen: the frozen tree, an argument of every step.
      batches: the data, resumable.
      put: host batch -> device batch.
      config, total_steps: when to do what, and when to end.
      checkpoints, identity: where the run's state is kept, and what run it is.
      logger: where its metrics go.
      evaluate: (step, trained) -> metrics with the key `score` (higher is better); None = never.
      on_best: (step, trained, metrics), called when an evaluation is the best so far.
    """

    step: Callable[[TrainState, ArrayTree, Batch], tuple[TrainState, dict[str, Any]]]
    frozen: ArrayTree
    batches: Batches
    put: Callable[[Batch], Batch]
    config: LoopConfig
    total_steps: int
    checkpoints: Checkpoints
    identity: Mapping[str, Any]
    logger: RunLogger
    evaluate: Callable[[int, ArrayTree], dict[str, float]] | None = None
    on_best: Callable[[int, ArrayTree, dict[str, float]], None] | None = None

    def run(self, state: TrainState, progress: Progress) -> TrainState:
        """Steps to the end from what `restore` returned; keeps `progress` up to date.

        Returns: the final state; `progress.finished` is False after a SIGTERM.
        Raises: UserError if the loss stops being finite, or a checkpoint cannot be saved.
        """
        if progress.finished:
            return state
        start = int(jax.device_get(state.step))
        with _sigterm_flag() as terminated, jax.transfer_guard("disallow"):
            return self._steps(state, start, progress, terminated)

    def _steps(
        self, state: TrainState, start: int, progress: Progress, terminated: list[bool]
    ) -> TrainState:
        config = self.config
        late = _LateMetrics(self, progress)
        saved = start if start else -1
        for number in range(start + 1, self.total_steps + 1):
            batch = self.put(next(self.batches))
            state, metrics = self.step(state, self.frozen, batch)
            late.add(number, metrics)
            last = number == self.total_steps or terminated[0]
            if last or (config.eval_every and number % config.eval_every == 0):
                late.drain()
            if (
                self.evaluate is not None
                and not terminated[0]
                and (
                    number == self.total_steps
                    or (config.eval_every and number % config.eval_every == 0)
                )
            ):
                self._evaluate(number, state, progress)
                late.restart_clock()
            early = bool(config.early_stopping) and progress.waited >= config.early_stopping
            progress.stopped_early = early
            progress.finished = number == self.total_steps or early
            if last or early or (config.save_every and number % config.save_every == 0):
                late.drain()
                self._save(number, state, progress)
                saved = number
            if early:
                self.logger.note(
                    f"stopped early at step {number}: {progress.waited} evaluations without a better "
                    f"score than {progress.best_score:.2f} of step {progress.best_step}"
                )
                break
            if terminated[0]:
                self.logger.note(
                    f"SIGTERM: stopped and saved at step {number}; the same command goes on"
                )
                break
        late.drain()
        if saved >= 0:
            self.checkpoints.wait()
        return state

    def _evaluate(self, number: int, state: TrainState, progress: Progress) -> None:
        assert self.evaluate is not None
        with jax.transfer_guard("allow"):
            metrics = self.evaluate(number, state.trained)
            score = metrics.pop("score")
            self.logger.log(number, {f"eval/{name}": value for name, value in metrics.items()})
            if progress.best_score is None or score > progress.best_score:
                progress.best_score, progress.best_step, progress.waited = score, number, 0
                progress.best_metrics = metrics
                if self.on_best is not None:
                    self.on_best(number, state.trained, metrics)
            else:
                progress.waited += 1

    def _save(self, number: int, state: TrainState, progress: Progress) -> None:
        with jax.transfer_guard("allow"):
            self.checkpoints.save(
                number,
                _saved(state),
                {
                    "identity": dict(self.identity),
                    "data": self.batches.get_state(),
                    "progress": dataclasses.asdict(progress),
                },
            )


class _LateMetrics:
    """Fetches a step's metrics after the next step was dispatched, checks and logs them."""

    def __init__(self, loop: Loop, progress: Progress):
        self._loop, self._progress = loop, progress
        self._waiting: tuple[int, dict[str, Any]] | None = None
        self._shapes = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what came before (evaluation, compilation) out of examples/s."""
        self._clock = time.perf_counter()
        self._examples = 0.0

    def add(self, number: int, metrics: dict[str, Any]) -> None:
        previous, self._waiting = self._waiting, (number, metrics)
        if previous is not None:
            self._fetch(*previous, newest=number)

    def drain(self) -> None:
        previous, self._waiting = self._waiting, None
        if previous is not None:
            self._fetch(*previous, newest=previous[0])

    def _fetch(self, number: int, metrics: dict[str, Any], newest: int) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        broken = [
            name
            for name in ("loss", "grad_norm", "trained_norm")
            if not math.isfinite(values[name])
        ]
        if broken:
            steps = self._loop.checkpoints.steps()
            kept = (
                f"the last good checkpoint is step {steps[-1]}"
                if steps
                else "no checkpoint was saved yet"
            )
            raise UserError(
                f"{broken[0]} is not finite at step {number} (found by step {newest}); {kept}: lower "
                "optim.learning_rate or use another seed"
            )
        self._examples += values["examples"]
        seconds = time.perf_counter() - self._clock
        values["examples_per_second"] = self._examples / seconds if seconds else 0.0
        self._loop.logger.progress(number)
        if number % self._loop.config.log_every == 0 or number == self._loop.total_steps:
            self._loop.logger.log(number, values)
            if self._is_steady():
                self._progress.train_examples += self._examples
                self._progress.train_seconds += seconds
            self.restart_clock()

    def _is_steady(self) -> bool:
        """Whether nothing was compiled since the last window."""
        before, self._shapes = self._shapes, len(self._loop.batches.shape_counts)
        return before == self._shapes


@contextlib.contextmanager
def _sigterm_flag() -> Iterator[list[bool]]:
    """A flag that SIGTERM sets, so that a step in flight ends and is saved."""
    terminated = [False]

    def set_flag(signum: int, frame: Any) -> None:
        terminated[0] = True

    try:
        previous = signal.signal(signal.SIGTERM, set_flag)
    except ValueError:  # not the main thread: the caller's signals are the caller's
        yield terminated
        return
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, previous)


def _saved(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "trained": state.trained,
        "opt_state": state.opt_state,
        "rng": jax.random.key_data(state.rng),
    }
