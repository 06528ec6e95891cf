"""One prompt, or a backbone alone, answering a task as a run's config says: a score.

What `compare` and `scale` measure with, and what a measurement says of its machine.
"""

import itertools
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax

from jaxprompt.artifact import load_artifact
from jaxprompt.backbone import Backbone
from jaxprompt.config import RunConfig
from jaxprompt.data.pipeline import Asked, examples_of
from jaxprompt.data.sources import Source
from jaxprompt.data.tasks import Task
from jaxprompt.evaluate import EvalResult, Evaluator
from jaxprompt.inference import cut_note, put_on
from jaxprompt.trainee import encoder_of, mean_of

_TIMED_EXAMPLES = 256


class Answers:
    """What answers a task's rows.

    Attributes: task.
    """

    def __init__(
        self, backbone: Backbone, config: RunConfig, prompt: Path | None, task: Task | None = None
    ):
        """
        Args:
          config: lengths, layout and the metric that counts.
          prompt: its artifact; None = the backbone alone.
          task: in place of the config's.
        """
        self.task = task or Task(config.task)
        self._on = put_on(backbone, None if prompt is None else load_artifact(prompt))
        encoder = encoder_of(config, self.task, backbone, bare=prompt is None)
        self._evaluator = Evaluator(self._on.graphdef, [encoder])
        self._longest = config.data.max_input_length
        metric = config.train.metric
        self._names = [metric] if metric in self.task.metrics else self.task.metrics

    def metrics(self, source: Source) -> dict[str, float]:
        """All of the task's metrics there, percent."""
        return self._run(source).metrics

    def score(self, source: Source) -> float:
        """The mean of those that count."""
        return self.score_of(self.metrics(source))

    def score_of(self, metrics: Mapping[str, float]) -> float:
        """What is told of such metrics as one number."""
        return mean_of(metrics, self._names)

    def baselines(self, source: Source) -> tuple[float, float]:
        """Its own score, and that of always giving the most frequent target."""
        result = self._run(source)
        return mean_of(result.metrics, self._names), mean_of(result.majority, self._names)

    def rate(self, source: Source) -> float:
        """Examples/s, of the first ones there."""
        examples = itertools.islice(examples_of(self.task, source), _TIMED_EXAMPLES)
        asked = [Asked(example, 0) for example in examples]
        start = time.perf_counter()
        self._evaluator.run_asked(self._on.trained, self._on.frozen, asked)
        return len(asked) / (time.perf_counter() - start)

    def _run(self, source: Source) -> EvalResult:
        (result,) = self._evaluator.run(self._on.trained, self._on.frozen, source)
        if note := cut_note(result.cuts, self._longest, "data.max_input_length"):
            print(note, file=sys.stderr)
        return result


def machine() -> str:
    """What this runs on, in words: "2 cores of AMD EPYC", "4 x NVIDIA H200"."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    own = getattr(os, "sched_getaffinity", None)  # Linux alone knows which cores a process may use
    cores = (len(own(0)) if own else os.cpu_count()) or 1
    return f"{cores} core{'s' if cores > 1 else ''} of {processor()}"


def processor() -> str:
    """The name of this machine's processor, as far as it is known."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
