"""`jaxprompt evaluate`: measures a prompt, several as an ensemble, or the bare backbone on a task.

`Evaluator` is also what a training run evaluates with.
"""

import argparse
import collections
import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from jaxprompt.data.pipeline import Cuts, TaskEncoder, examples_of
from jaxprompt.data.sources import Source
from jaxprompt.data.tasks import Task
from jaxprompt.generation import Generation
from jaxprompt.inference import (
    Answer,
    Answerer,
    backbone_of,
    cut_note,
    encoder_of,
    generation_of,
    put_on,
    read_prompt,
    task_of,
)
from jaxprompt.logging import table
from jaxprompt.metrics import (
    Extra,
    bootstrap_interval,
    find_metric,
    illegal_count,
    label_distribution,
    majority_baseline,
)
from jaxprompt.typing import ArrayTree, UserError


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What a model answered to a data set, and what that is worth.

    Attributes:
      task: the task, whose metrics count.
      targets, predictions: one text an example, in the order of the source.
      groups: which examples are scored together, empty if the task has no groups.
      cuts: what was cut off to fit.
    """

    task: Task
    targets: Sequence[str]
    predictions: Sequence[str]
    groups: Sequence[str]
    cuts: Cuts

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        """The task's metrics in percent."""
        return self._scored(self.predictions)

    @functools.cached_property
    def majority(self) -> dict[str, float]:
        """The same metrics of always answering with the most frequent target."""
        label, _ = majority_baseline(self.targets)
        return self._scored([label] * len(self.targets))

    @functools.cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap interval of each metric, in percent; the same on every call."""
        return {
            name: bootstrap_interval(find_metric(name), self.targets, self.predictions, self._extra)
            for name in self.task.metrics
        }

    def summary(self) -> dict[str, Any]:
        """All of it as JSON-ready values; with candidates also how often each was said."""
        scores = {}
        for name, value in self.metrics.items():
            low, high = self.intervals[name]
            parts = {"value": value, "low": low, "high": high, "majority": self.majority[name]}
            scores[name] = {key: round(number, 4) for key, number in parts.items()}
        told: dict[str, Any] = {
            "task": self.task.config.name,
            "examples": len(self.targets),
            "scores": scores,
            "cut_inputs": self.cuts.cut_inputs,
        }
        if self.task.candidates:
            told["illegal"] = illegal_count(self.predictions, self.task.candidates)
            told["targets"] = label_distribution(self.targets)
            told["predictions"] = label_distribution(self.predictions)
        return told

    @property
    def _extra(self) -> Extra:
        return Extra(self.task.candidates, self.task.config.positive_label, self.groups)

    def _scored(self, predictions: Sequence[str]) -> dict[str, float]:
        return {
            name: find_metric(name)(self.targets, predictions, self._extra)
            for name in self.task.metrics
        }


class Evaluator:
    """Measures trained parameters on the rows of a source; compiled once for each batch shape."""

    def __init__(
        self,
        graphdef: Any,
        encoder: TaskEncoder,
        *,
        mesh: Mesh | None = None,
        input_buckets: Sequence[int] = (),
        generate: bool = False,
        generation: Generation | None = None,
    ):
        """Args: as `inference.Answerer`."""
        self._encoder = encoder
        self._options = {
            "mesh": mesh,
            "input_buckets": input_buckets,
            "generate": generate,
            "generation": generation,
        }
        self._graphdef = graphdef

    def run(self, trained: ArrayTree, frozen: ArrayTree, source: Source) -> EvalResult:
        """Answers every row of `source`, and keeps the texts.

        With candidates the likeliest one is the prediction; without, or with `generate`, the text
        generated, white space made single.

        Raises: UserError for a row that is no example of the task.
        """
        task = self._encoder.task
        answerer = Answerer(self._graphdef, self._encoder, **self._options)
        legal = {_single_spaced(candidate): candidate for candidate in task.candidates}
        targets, predictions, groups = [], [], []
        for answered in answerer.answers(trained, frozen, examples_of(task, source)):
            for example, answer in answered:
                targets.append(example.target if legal else _single_spaced(example.target or ""))
                predictions.append(_prediction(answer, legal))
                groups.append(example.group)
        return EvalResult(
            task, targets, predictions, groups if task.config.group else (), answerer.cuts
        )


def majority_vote(predictions: Sequence[Sequence[str]]) -> list[str]:
    """The answer most of several models give to each example; of equals the earliest model's.

    Source: Lester et al. 2021, section 6 (prompt ensembling).
    """
    votes = (collections.Counter(said) for said in zip(*predictions, strict=True))
    return [count.most_common(1)[0][0] for count in votes]


def main(args: argparse.Namespace) -> None:
    """The command: `jaxprompt evaluate PROMPT [PROMPT ...] --task T | --data FILE [--json]`."""
    prompts = [read_prompt(path) for path in args.prompts]
    named = next((prompt for prompt in prompts if prompt is not None), None)
    if (named is None and not args.task) or (named is not None and not (named.task or args.task)):
        raise UserError(f"{args.prompts[0]} has no task of its own; name one with --task")
    task, split = _data(task_of(named, args.task), args)
    source = task.open(split)
    backbone = backbone_of(named, args.backbone, args.dtype)
    ready = [put_on(backbone, p, allow_other=args.allow_other_backbone) for p in prompts]
    generation = generation_of(args)
    results = []
    for path, prompt, prompted in zip(args.prompts, prompts, ready, strict=True):
        encoder = encoder_of(
            backbone,
            prompt,
            task,
            batch_size=args.batch_size,
            max_input_length=args.max_input_length,
            max_target_length=args.max_target_length,
        )
        evaluator = Evaluator(
            prompted.graphdef, encoder, generate=args.generate, generation=generation
        )
        result = evaluator.run(prompted.trained, prompted.frozen, source)
        results.append(result)
        _report(args, {"prompt": path, "backbone": backbone.name, "split": split}, result)
        note = cut_note(result.cuts, encoder.config.max_input_length)
        if note:
            print(note, file=sys.stderr)
    if len(results) > 1:
        voted = majority_vote([result.predictions for result in results])
        together = dataclasses.replace(results[0], predictions=voted)
        about = {"prompt": args.prompts, "backbone": backbone.name, "split": split}
        _report(args, about, together)


def _data(task: Task, args: argparse.Namespace) -> tuple[Task, str]:
    """The task over the data that the command names, and the split to take."""
    source, split = task.config.source, args.split
    if args.data_dir:
        source = dataclasses.replace(source, data_dir=args.data_dir)
    if args.data:
        split = "test"
        places = {"kind": "", "name": "", "data_dir": "", "train": "", "validation": ""}
        source = dataclasses.replace(source, **places, test=args.data)
    return Task(dataclasses.replace(task.config, source=source)), split


def _report(args: argparse.Namespace, about: Mapping[str, Any], result: EvalResult) -> None:
    """One JSON object, or a small table for people."""
    told = {**about, **result.summary()}
    if args.data:
        told["split"] = args.data
    if args.json:
        print(json.dumps(told, ensure_ascii=False), flush=True)
        return
    prompt = told["prompt"]
    who = prompt if isinstance(prompt, str) else f"majority vote of {len(prompt)} prompts"
    print(
        f"\n{who} over {told['backbone']}, {told['task']} {told['split']}, "
        f"{told['examples']:,} examples"
    )
    rows = [
        [name, score["value"], f"{score['low']:.1f} - {score['high']:.1f}", score["majority"]]
        for name, score in told["scores"].items()
    ]
    print(table(rows, header=["%", "score", "95 % interval", "most frequent target"]))
    if "targets" in told:
        labels = dict.fromkeys([*told["targets"], *told["predictions"]])
        counts = [
            [label, told["targets"].get(label, 0), told["predictions"].get(label, 0)]
            for label in labels
        ]
        print(f"\n{table(counts, header=['label', 'is', 'was predicted'])}")
        if told["illegal"]:
            print(f"{told['illegal']:,} predictions are none of the task's candidates")


def _prediction(answer: Answer, legal: Mapping[str, str]) -> str:
    if answer.scores:
        return answer.text
    text = _single_spaced(answer.text)
    return legal.get(text, text)


def _single_spaced(text: str) -> str:
    return " ".join(text.split())
