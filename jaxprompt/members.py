"""What a run trains side by side, and how far each of it has come."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from jaxprompt.logging import RunLogger


@dataclasses.dataclass
class Progress:
    """What a run knows of a member beside its arrays; travels in the checkpoint's metadata.

    Attributes:
      best_score, best_step, best_metrics: of the best evaluation so far.
      waited: evaluations since then.
      evaluated: step of the last evaluation.
      finished: it has ended by itself: its steps are done, or it stopped early or diverged.
      ended: the step then; 0 = it goes on.
      diverged: the step whose numbers were not finite; 0 = none.
      baselines: what the caller measured before the first step, by name.
      train_examples, train_seconds: of the logged windows, without compilation and evaluation.
    """

    best_score: float | None = None
    best_step: int = 0
    best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    waited: int = 0
    evaluated: int = 0
    finished: bool = False
    ended: int = 0
    diverged: int = 0
    baselines: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    train_examples: float = 0.0
    train_seconds: float = 0.0

    @property
    def examples_per_second(self) -> float:
        """Speed of training; 0 if nothing was timed."""
        return self.train_examples / self.train_seconds if self.train_seconds else 0.0


@dataclasses.dataclass(frozen=True)
class Member:
    """One of the prompts that a run trains side by side, or all that it trains.

    Attributes:
      name: for people; empty if the member is the whole run.
      total_steps: when it ends.
      early_stopping: as `LoopConfig`.
      learning_rate: finished steps -> the rate of the next one, to be logged.
      logger: where its metrics go.
    """

    name: str
    total_steps: int
    early_stopping: int
    learning_rate: Callable[[int], float]
    logger: RunLogger

    def ends(self, number: int, progress: Progress) -> bool:
        """Whether it has come to its end with a step."""
        return number >= self.total_steps or self.is_stuck(progress) or progress.diverged > 0

    def is_stuck(self, progress: Progress) -> bool:
        """Whether evaluations have not got better for long enough to stop early."""
        return 0 < self.early_stopping <= progress.waited


def log_together(logger: RunLogger, number: int, values: Sequence[Mapping[str, float]]) -> None:
    """Logs what several members have in common: means of their values, their speeds added up."""
    names = dict.fromkeys(name for one in values for name in one)
    own = {name: [one[name] for one in values if name in one] for name in names}
    means = {name: sum(each) / len(each) for name, each in own.items()}
    if "examples_per_second" in means:
        means["examples_per_second"] *= len(values)
    logger.log(number, {**means, "prompts": len(values)})
