"""The loop around a compiled step that `train` and `pretrain` share: metrics, saving, stopping.

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

    def check_batch_size(self, key: str, batch_size: int) -> None:
        """Raises: UserError if rows of a batch do not divide into `accumulate` parts."""
        if batch_size % self.accumulate:
            raise UserError(
                f"{key} {batch_size} does not divide into train.accumulate {self.accumulate} parts"
            )


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
      evaluated: step of the last evaluation.
      finished: the run has ended by itself: its steps are done, or it stopped early.
      baselines: what the caller measured before the first step, by name.
      train_examples, train_seconds: of the logged windows, without compilation and evaluation.
    """

    best_score: float | None = None
    best_step: int = 0
    best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    waited: int = 0
    evaluated: int = 0
    finished: bool = False
    baselines: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
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
    config: LoopConfig,
    total_steps: int,
) -> tuple[TrainState, Progress, int | None]:
    """Where a run goes on: the newest whole checkpoint, with the data at the same place.

    Args:
      state: a fresh state, which also says structure and shardings.
      config, total_steps: of this start; a finished run that was given more steps goes on.
    Returns: (state, progress, step resumed from or None for a new run).
    Raises: UserError if the directory holds another run or one that is further than `total_steps`,
      or if no checkpoint in it is whole.
    """
    found = checkpoints.restore_latest(_saved(state), identity)
    if found is None:
        return state, Progress(), None
    number, saved, metadata = found
    if number > total_steps:
        raise UserError(
            f"run directory {checkpoints.directory.parent} is at step {number} already, this run "
            f"has {total_steps}: raise train.steps or choose another output_dir"
        )
    batches.set_state(metadata["data"])
    known = {field.name for field in dataclasses.fields(Progress)}
    progress = Progress(**{k: v for k, v in metadata["progress"].items() if k in known})
    ends_here = number == total_steps or _is_stuck(config, progress)
    progress.finished = progress.finished and ends_here
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
      learning_rate: finished steps -> the rate of the next one, to be logged.
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
    learning_rate: Callable[[int], float]
    evaluate: Callable[[int, ArrayTree], dict[str, float]] | None = None
    on_best: Callable[[int, ArrayTree, dict[str, float]], None] | None = None

    def run(self, state: TrainState, progress: Progress) -> TrainState:
        """Steps to the end from what `restore` returned; keeps `progress` up to date.

        Returns: the final state; `progress.finished` is False after a SIGTERM.
        Raises: UserError if the loss stops being finite, or a checkpoint cannot be saved.
        """
        start = int(jax.device_get(state.step))
        if progress.finished:
            self.logger.note(
                f"the run ended at step {start:,} already; train.steps makes it longer"
            )
            return state
        with _sigterm_flag() as terminated, jax.transfer_guard("disallow"):
            return self._steps(state, start, progress, terminated)

    def _steps(
        self, state: TrainState, start: int, progress: Progress, terminated: list[bool]
    ) -> TrainState:
        late = _LateMetrics(self, progress)
        number, ended = start, False
        if self._awaits_evaluation(start, progress):  # a SIGTERM came in between
            ended = self._after(start, state, progress, late, terminated)
        while not ended:
            number += 1
            batch = self.put(next(self.batches))
            state, metrics = self.step(state, self.frozen, batch)
            late.add(number, metrics)
            ended = self._after(number, state, progress, late, terminated)
        self.checkpoints.wait()
        return state

    def _after(
        self,
        number: int,
        state: TrainState,
        progress: Progress,
        late: "_LateMetrics",
        terminated: list[bool],
    ) -> bool:
        """Evaluates and saves if that is due after a step; whether the loop ends with it."""
        if self._awaits_evaluation(number, progress) and not terminated[0]:
            late.drain()
            self._evaluate(number, state, progress)
            late.restart_clock()
        terminates = terminated[0]  # read once: a SIGTERM from here on ends the next step
        early = _is_stuck(self.config, progress)
        progress.finished = (early or number == self.total_steps) and (
            not self._awaits_evaluation(number, progress)
        )
        if terminates or progress.finished or self._is_due(self.config.save_every, number):
            late.drain()
            self._save(number, state, progress)
        if progress.finished:
            if early and number < self.total_steps:
                self.logger.note(
                    f"stopped early at step {number}: {progress.waited} evaluations without a "
                    f"better score than {progress.best_score:.2f} of step {progress.best_step}"
                )
        elif terminates:
            self.logger.note(
                f"SIGTERM: stopped and saved at step {number}; the same command goes on"
            )
        return terminates or progress.finished

    def _is_due(self, every: int, number: int) -> bool:
        return number == self.total_steps or (every > 0 and number % every == 0)

    def _awaits_evaluation(self, number: int, progress: Progress) -> bool:
        """Whether a step is one to evaluate after, and that was not done yet."""
        due = number > 0 and self._is_due(self.config.eval_every, number)
        return self.evaluate is not None and due and progress.evaluated < number

    def _evaluate(self, number: int, state: TrainState, progress: Progress) -> None:
        assert self.evaluate is not None
        with jax.transfer_guard("allow"):
            metrics = self.evaluate(number, state.trained)
            score = metrics.pop("score")
            self.logger.log(number, {f"eval/{name}": value for name, value in metrics.items()})
            progress.evaluated = number
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
            with contextlib.suppress(UserError):
                self._loop.checkpoints.wait()
            steps = self._loop.checkpoints.steps()
            kept = (
                f"the last good checkpoint is step {steps[-1]}"
                if steps
                else "no checkpoint was saved yet"
            )
            raise UserError(
                f"{broken[0]} is not finite at step {number} (found by step {newest}); {kept}: "
                "lower optim.learning_rate or use another seed"
            )
        self._examples += values["examples"]
        seconds = time.perf_counter() - self._clock
        values["examples_per_second"] = self._examples / seconds if seconds else 0.0
        self._loop.logger.progress(number)
        if number % self._loop.config.log_every == 0 or number == self._loop.total_steps:
            values["learning_rate"] = self._loop.learning_rate(number - 1)
            self._loop.logger.log(number, values)
            if self._is_steady():
                self._progress.train_examples += self._examples
                self._progress.train_seconds += seconds
            self.restart_clock()

    def _is_steady(self) -> bool:
        """Whether nothing was compiled since the last window."""
        before, self._shapes = self._shapes, len(self._loop.batches.shape_counts)
        return before == self._shapes


def _is_stuck(config: LoopConfig, progress: Progress) -> bool:
    """Whether evaluations have not got better for long enough to stop early."""
    return 0 < config.early_stopping <= progress.waited


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
