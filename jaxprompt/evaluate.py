"""`jaxprompt evaluate`: measures a prompt, several as an ensemble, or the bare backbone on a task.

`Evaluator` is also what a training run evaluates with.
"""

import argparse
import collections
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxprompt.answerer import Answer, Answerer
from jaxprompt.data.encoder import Cuts, TaskEncoder
from jaxprompt.data.few_shot import with_shots
from jaxprompt.data.pipeline import Asked, examples_of
from jaxprompt.data.sources import Source
from jaxprompt.data.tasks import Example, Task
from jaxprompt.generation import Generation
from jaxprompt.inference import (
    BARE,
    ask_named,
    backbone_of,
    cut_note,
    encoder_of,
    generation_of,
    put_on,
    read_prompts,
    task_of,
)
from jaxprompt.metrics import (
    Extra,
    bootstrap_interval,
    find_metric,
    illegal_count,
    label_distribution,
    majority_baseline,
)
from jaxprompt.tables import table
from jaxprompt.typing import ArrayTree, UserError


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What a model answered to a data set, and what that is worth.

    Attributes:
      task: the task, whose metrics count.
      targets, predictions: one text an example, in the order of the source.
      groups: which examples are scored together, empty if the task has no groups.
      cuts: what was cut off to fit.
      scores: of each example, the log-likelihood of every candidate; empty for generated texts.
      references: every right answer of each example, empty if the task names no field of them.
    """

    task: Task
    targets: list[str]
    predictions: list[str]
    groups: list[str]
    cuts: Cuts
    scores: list[Mapping[str, float]] = dataclasses.field(default_factory=list)
    references: list[Sequence[str]] = dataclasses.field(default_factory=list)

    def add(self, example: Example, answer: Answer) -> None:
        """Takes in one more answer; before any metric is asked for."""
        legal = {_single_spaced(candidate): candidate for candidate in self.task.candidates}
        target = example.target if legal else _single_spaced(example.target or "")
        self.targets.append(target or "")
        self.predictions.append(_prediction(answer, legal))
        if self.task.config.group:
            self.groups.append(example.group)
        if self.task.config.references:
            self.references.append([_single_spaced(text) for text in example.references])
        if answer.scores:
            self.scores.append(answer.scores)

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
        config = self.task.config
        return Extra(self.task.candidates, config.positive_label, self.groups, self.references)

    def _scored(self, predictions: Sequence[str]) -> dict[str, float]:
        return {
            name: find_metric(name)(self.targets, predictions, self._extra)
            for name in self.task.metrics
        }


class Evaluator:
    """Measures one prompt or a bank on examples; compiled once for each batch shape."""

    def __init__(
        self,
        graphdef: Any,
        encoders: Sequence[TaskEncoder],
        *,
        mesh: Mesh | None = None,
        input_buckets: Sequence[int] = (),
        generate: bool = False,
        generation: Generation | None = None,
    ):
        """Args: as `inference.Answerer`."""
        self._encoders = list(encoders)
        self._options = {
            "mesh": mesh,
            "input_buckets": input_buckets,
            "generate": generate,
            "generation": generation,
        }
        self._graphdef = graphdef

    def run(self, trained: ArrayTree, frozen: ArrayTree, source: Source) -> list[EvalResult]:
        """Every prompt answers every row of `source`; one result for each prompt.

        Raises: UserError for a row that is no example of a prompt's task.
        """
        tasks = [encoder.task for encoder in self._encoders]
        asked = (
            Asked(example, number)
            for examples in zip(*(examples_of(task, source) for task in tasks), strict=True)
            for number, example in enumerate(examples)
        )
        return self.run_asked(trained, frozen, asked)

    def run_asked(
        self, trained: ArrayTree, frozen: ArrayTree, asked: Iterable[Asked]
    ) -> list[EvalResult]:
        """Answers examples, each by the prompt it names, and keeps the texts, prompt by prompt.

        With candidates the likeliest one is the prediction; without, or with `generate`, the text
        generated, white space made single.
        """
        answerer = Answerer(self._graphdef, self._encoders, **self._options)
        results = [
            EvalResult(encoder.task, [], [], [], cuts, [])
            for encoder, cuts in zip(self._encoders, answerer.cuts, strict=True)
        ]
        for answered in answerer.answers(trained, frozen, asked):
            for (example, prompt), answer in answered:
                results[prompt].add(example, answer)
        return results


def majority_vote(predictions: Sequence[Sequence[str]]) -> list[str]:
    """The answer most of several models give to each example; of equals the earliest model's.

    Source: Lester et al. 2021, section 6 (prompt ensembling).
    """
    votes = (collections.Counter(said) for said in zip(*predictions, strict=True))
    return [count.most_common(1)[0][0] for count in votes]


def likelihood_vote(scores: Sequence[Sequence[Mapping[str, float]]]) -> list[str]:
    """The candidate that several models together find likeliest, for each example.

    A model's likelihoods are made to sum to 1 over the candidates, then averaged over models; of
    equals the earliest candidate.

    Args:
      scores: of each model and example, the log-likelihood of every candidate, in nats.
    """
    voted = []
    for models in zip(*scores, strict=True):
        candidates = list(models[0])
        scores_MC = np.array([[model[word] for word in candidates] for model in models], np.float64)
        likelihoods_MC = np.exp(scores_MC - np.logaddexp.reduce(scores_MC, axis=1, keepdims=True))
        voted.append(candidates[int(likelihoods_MC.mean(axis=0).argmax())])
    return voted


def main(args: argparse.Namespace) -> None:
    """The command: `jaxprompt evaluate PROMPT [PROMPT ...] --task T | --data FILE [--json]`.

    Several prompts answer in the same batches. Each is reported, and then together: mean and best
    of their scores, majority vote, averaged-likelihood vote. With `--prompt-field F` field F of a
    row names the one prompt that answers it. With `--shots K` the bare backbone reads K training
    examples before every input.
    """
    names, prompts = zip(*read_prompts(args.prompts), strict=True)
    named = next((prompt for prompt in prompts if prompt is not None), None)
    if (named is None and not args.task) or (named is not None and not (named.task or args.task)):
        raise UserError(f"{args.prompts[0]} has no task of its own; name one with --task")
    if args.num_return_sequences > 1:
        raise UserError(
            f"--num-return-sequences is {args.num_return_sequences}; evaluate scores one answer to "
            "each example, `jaxprompt predict` gives several"
        )
    if args.prompt_field and not args.data:
        raise UserError("--prompt-field is for rows of one file; name it with --data")
    owners = prompts if args.prompt_field else [named] * len(prompts)
    tasks, splits = zip(*(_data(task_of(one, args.task), args) for one in owners), strict=True)
    source, split = tasks[0].open(splits[0]), splits[0]
    about = {"split": split}
    if args.shots is not None:
        tasks = tuple(_with_shots(task, args) for task in tasks)
        about |= {"shots": args.shots, "seed": args.seed}
    backbone = backbone_of(named, args.backbone, args.dtype, args.quantize)
    prompted = put_on(backbone, *prompts, allow_other=args.allow_other_backbone)
    encoders = [
        encoder_of(
            backbone,
            prompt,
            task,
            batch_size=args.batch_size,
            max_input_length=args.max_input_length,
            max_target_length=args.max_target_length,
        )
        for prompt, task in zip(prompts, tasks, strict=True)
    ]
    evaluator = Evaluator(
        prompted.graphdef, encoders, generate=args.generate, generation=generation_of(args)
    )
    if args.prompt_field:
        rows = ((source[n], source.where(n)) for n in range(len(source)))
        asked = ask_named(args.prompt_field, names, tasks, rows)
        results = evaluator.run_asked(prompted.trained, prompted.frozen, asked)
    else:
        results = evaluator.run(prompted.trained, prompted.frozen, source)
    about = {"backbone": backbone.name, **about}
    for name, encoder, result in zip(names, encoders, results, strict=True):
        if result.targets:
            _report(args, {"prompt": name, **about}, result)
        note = cut_note(result.cuts, encoder.config.max_input_length)
        if note:
            print(note, file=sys.stderr)
    if len(results) > 1 and not args.prompt_field:
        _report_together(args, {"prompt": list(names), **about}, results)


def _report_together(
    args: argparse.Namespace, about: Mapping[str, Any], results: Sequence[EvalResult]
) -> None:
    """The votes of several prompts, and the mean and best of their own scores."""
    votes = {"majority": majority_vote([result.predictions for result in results])}
    if all(result.scores for result in results):
        votes["likelihood"] = likelihood_vote([result.scores for result in results])
    voted = {
        vote: dataclasses.replace(results[0], predictions=predictions, scores=[])
        for vote, predictions in votes.items()
    }
    for vote, result in voted.items():
        _report(args, {**about, "vote": vote}, result)
    names = list(results[0].metrics)
    values = {name: [result.metrics[name] for result in results] for name in names}
    summary = {
        name: {
            "mean": statistics.fmean(each),
            "stdev": statistics.stdev(each),
            "best": max(each),
            **{f"{vote}_vote": result.metrics[name] for vote, result in voted.items()},
        }
        for name, each in values.items()
    }
    if args.json:
        rounded = {
            name: {key: round(value, 4) for key, value in parts.items()}
            for name, parts in summary.items()
        }
        print(json.dumps({**about, "together": rounded}, ensure_ascii=False), flush=True)
        return
    rows = [[word.replace("_", " "), *(summary[name][word] for name in names)]
            for word in summary[names[0]]]  # fmt: skip
    print(f"\n{table(rows, header=[f'{len(results)} prompts, %', *names])}")


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


def _with_shots(task: Task, args: argparse.Namespace) -> Task:
    """The task for a bare backbone that reads training examples before each input."""
    if any(prompt != BARE for prompt in args.prompts):
        raise UserError(
            f"--shots shows examples to a backbone without a prompt; give `{BARE}` and --backbone "
            "in place of prompts"
        )
    if args.data:
        raise UserError(
            "--shots takes its examples from the task's own training data; leave --data out"
        )
    return with_shots(task, task.open("train"), args.shots, args.seed)


def _report(args: argparse.Namespace, about: Mapping[str, Any], result: EvalResult) -> None:
    """One JSON object, or a small table for people."""
    told = {**about, **result.summary()}
    if args.data:
        told["split"] = args.data
    if args.json:
        print(json.dumps(told, ensure_ascii=False), flush=True)
        return
    prompt = told["prompt"]
    who = prompt if isinstance(prompt, str) else f"{told['vote']} vote of {len(prompt)} prompts"
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
