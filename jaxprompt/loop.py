"""The loop around a compiled step that `training` and `pretrain` share: metrics, saving, stopping.

A run trains one thing, or several prompts side by side: members, each with a length, a score and an
end of its own. What a step computes, what is evaluated and what is kept are the callers' business.
"""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxprompt.checkpoint import Checkpoints
from jaxprompt.hosts import Agreement
from jaxprompt.logging import RunLogger
from jaxprompt.members import Member, Progress, log_together
from jaxprompt.sharding import put_whole
from jaxprompt.step_metrics import StepMetrics
from jaxprompt.steps import TrainState
from jaxprompt.typing import ArrayTree, UserError


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
    """What the loop needs of a data pipeline; what it gives out is for `Loop.put` and `step`."""

    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    @property
    def shape_counts(self) -> Mapping[Any, int]: ...


def restore(
    checkpoints: Checkpoints,
    identity: Mapping[str, Any],
    state: TrainState,
    batches: Batches,
    lengths: Sequence[int],
) -> tuple[TrainState, list[Progress], int | None]:
    """Where a run goes on: the newest whole checkpoint, with the data at the same place.

    Args:
      state: a fresh state, which also says structure and shardings.
      lengths: steps of each member, of this start.
    Returns: (state, progress of each member, step resumed from or None for a new run).
    Raises: UserError if the directory holds another run or one that is further than its steps, or
      if no checkpoint in it is whole.
    """
    found = checkpoints.restore_latest(_saved(state), identity)
    if found is None:
        return state, [Progress() for _ in lengths], None
    number, saved, metadata = found
    if number > max(lengths):
        raise UserError(
            f"run directory {checkpoints.directory.parent} is at step {number} already, this run "
            f"has {max(lengths)}: raise train.steps or choose another output_dir"
        )
    batches.set_state(metadata["data"])
    known = {field.name for field in dataclasses.fields(Progress)}
    all_progress = [
        Progress(**{k: v for k, v in entry.items() if k in known}) for entry in metadata["progress"]
    ]
    saved = jax.tree.map(lambda leaf, like: put_whole(leaf, like.sharding), saved, _saved(state))
    rng = jax.random.wrap_key_data(saved.pop("rng"))
    return TrainState(**saved, rng=rng, live=state.live), all_progress, number


@dataclasses.dataclass(frozen=True)
class Loop:
    """Everything one run of the loop needs.

    Attributes:
      step: (state, frozen, batch) -> (state, metrics [N] of each member), compiled.
      frozen: the frozen tree, an argument of every step.
      batches: the data, resumable.
      put: host batch -> device batch.
      config: when to do what.
      members: what is trained.
      checkpoints, identity: where the run's state is kept, and what run it is.
      logger: where what concerns all members goes; the only one's own logger if there is one.
      evaluate: (step, trained, members) -> metrics of each of these, with the key `score` (higher
        is better); None = never.
      on_best: (member, step, trained, metrics), called when an evaluation is its best so far.
      on_end: (member), called when one of several has ended and the others go on.
    """

    step: Callable[[TrainState, ArrayTree, Any], tuple[TrainState, dict[str, Any]]]
    frozen: ArrayTree
    batches: Batches
    put: Callable[[Any], Any]
    config: LoopConfig
    members: Sequence[Member]
    checkpoints: Checkpoints
    identity: Mapping[str, Any]
    logger: RunLogger
    evaluate: Callable[[int, ArrayTree, Sequence[int]], Sequence[dict[str, float]]] | None = None
    on_best: Callable[[int, int, ArrayTree, dict[str, float]], None] | None = None
    on_end: Callable[[int], None] | None = None

    def run(self, state: TrainState, all_progress: Sequence[Progress]) -> TrainState:
        """Steps to the end from what `restore` returned; keeps `all_progress` up to date.

        Returns: the final state; some `Progress.finished` is False after a SIGTERM.
        Raises: UserError if the loss of a run of one stops being finite, if a checkpoint cannot be
          saved, or if a member that ended before others is to go on.
        """
        start = int(jax.device_get(state.step))
        for member, progress in zip(self.members, all_progress, strict=True):
            if progress.finished and not member.ends(progress.ended, progress):
                if progress.ended < start:
                    raise UserError(
                        f"{member.name} ended at step {progress.ended}, the others are at step "
                        f"{start}: it cannot go on with them; give it an output_dir of its own"
                    )
                progress.finished, progress.ended = False, 0
        run = _Run(self, list(all_progress))
        if run.is_over:
            self.logger.note(
                f"the run ended at step {start:,} already; train.steps makes it longer"
            )
            return state
        with _sigterm_flag() as terminated, jax.transfer_guard("disallow"):
            return run.steps(state, start, Agreement(lambda: terminated[0]))


class _Run:
    """One start of a loop."""

    def __init__(self, loop: Loop, all_progress: list[Progress]):
        self.loop, self.progress = loop, all_progress
        self.total_steps = max(member.total_steps for member in loop.members)
        self._live: list[int] | None = None

    @property
    def live(self) -> list[int]:
        """The members that go on."""
        return [n for n, progress in enumerate(self.progress) if not progress.finished]

    @property
    def is_over(self) -> bool:
        return not self.live

    def steps(self, state: TrainState, start: int, terminated: Callable[[], bool]) -> TrainState:
        """Steps from `start` to the end, or until the run is told to."""
        loop = self.loop
        late = StepMetrics(
            loop.members,
            self.progress,
            loop.logger,
            loop.checkpoints,
            lambda: len(loop.batches.shape_counts),
            loop.config.log_every,
        )
        number, ended = start, False
        state = self._with_live(state)
        if self._awaiting(start):  # a SIGTERM came in between
            state, ended = self._after(start, state, late, terminated)
        while not ended:
            number += 1
            batch = self.loop.put(next(self.loop.batches))
            state, metrics = self.loop.step(state, self.loop.frozen, batch)
            late.add(number, metrics)
            state, ended = self._after(number, state, late, terminated)
        self.loop.checkpoints.wait()
        return state

    def _after(
        self, number: int, state: TrainState, late: StepMetrics, terminated: Callable[[], bool]
    ) -> tuple[TrainState, bool]:
        """Evaluates and saves if that is due after a step; whether the loop ends with it."""
        if self._awaiting(number) and not terminated():
            late.drain()
            self._evaluate(number, state)
            late.restart_clock()
        terminates = terminated()  # asked once: a SIGTERM from here on ends a later step
        awaiting = self._awaiting(number)
        ending = [
            n
            for n in self.live
            if n not in awaiting and self.loop.members[n].ends(number, self.progress[n])
        ]
        if ending:
            late.drain()
        for n in ending:
            self.progress[n].finished, self.progress[n].ended = True, number
        if terminates or self.is_over or self._is_due(self.loop.config.save_every, number):
            late.drain()
            self._save(number, state)
        self._tell_early(number, ending)
        if terminates and not self.is_over:
            self.loop.logger.note(
                f"SIGTERM: stopped and saved at step {number}; the same command goes on"
            )
        return self._with_live(state), terminates or self.is_over

    def _with_live(self, state: TrainState) -> TrainState:
        """The state, told which members go on; those that do not are dropped from the data."""
        live, before = self.live, self._live
        if live == before or len(self.progress) == 1:
            return state
        self._live = live
        for n in range(len(self.progress)):
            if n not in live and (before is None or n in before) and self.loop.on_end is not None:
                self.loop.on_end(n)
        flags = np.array([n in live for n in range(len(self.progress))])
        return dataclasses.replace(state, live=put_whole(flags, state.live.sharding))

    def _tell_early(self, number: int, ending: Sequence[int]) -> None:
        for n in ending:
            member, progress = self.loop.members[n], self.progress[n]
            if number < member.total_steps and not progress.diverged:
                self.loop.logger.note(
                    f"{member.name + ': ' if member.name else ''}stopped early at step {number}: "
                    f"{progress.waited} evaluations without a better score than "
                    f"{progress.best_score:.2f} of step {progress.best_step}"
                )

    def _is_due(self, every: int, number: int) -> bool:
        return number == self.total_steps or (every > 0 and number % every == 0)

    def _awaiting(self, number: int) -> list[int]:
        """The members to evaluate after a step, if that was not done yet."""
        if self.loop.evaluate is None or number < 1:
            return []
        every = self._is_due(self.loop.config.eval_every, number)
        return [
            n
            for n in self.live
            if (every or number == self.loop.members[n].total_steps)
            and self.progress[n].evaluated < number
        ]

    def _evaluate(self, number: int, state: TrainState) -> None:
        assert self.loop.evaluate is not None
        members = self._awaiting(number)
        with jax.transfer_guard("allow"):
            results = self.loop.evaluate(number, state.trained, members) if members else []
            scores = [metrics.pop("score") for metrics in results]
            for n, metrics, score in zip(members, results, scores, strict=True):
                progress = self.progress[n]
                values = {f"eval/{name}": value for name, value in metrics.items()}
                self.loop.members[n].logger.log(number, values)
                progress.evaluated = number
                if progress.best_score is None or score > progress.best_score:
                    progress.best_score, progress.best_step, progress.waited = score, number, 0
                    progress.best_metrics = metrics
                    if self.loop.on_best is not None:
                        self.loop.on_best(n, number, state.trained, metrics)
                else:
                    progress.waited += 1
            if self.loop.members[0].logger is not self.loop.logger and results:
                named = [
                    {f"eval/{name}": value for name, value in metrics.items()}
                    for metrics in results
                ]
                log_together(self.loop.logger, number, named)

    def _save(self, number: int, state: TrainState) -> None:
        with jax.transfer_guard("allow"):
            self.loop.checkpoints.save(
                number,
                _saved(state),
                {
                    "identity": dict(self.loop.identity),
                    "data": self.loop.batches.get_state(),
                    "progress": [dataclasses.asdict(progress) for progress in self.progress],
                },
            )


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
