"""From examples to answers: a prompt put on its backbone, and the compiled programs that answer.

`evaluate`, `predict` and `api` share it, and through `evaluate` the evaluations of a training run.
"""

import argparse
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxprompt import schema, steps
from jaxprompt.artifact import PromptArtifact, check_backbone, load_artifact
from jaxprompt.backbone import Backbone, load_backbone
from jaxprompt.data.encoder import Cuts, DataConfig, TaskEncoder
from jaxprompt.data.layout import Layout
from jaxprompt.data.pipeline import Asked, EvalBatch, EvalChunk, eval_chunks
from jaxprompt.data.readers import Fields
from jaxprompt.data.tasks import Task, TaskConfig, load_task
from jaxprompt.data.templates import lookup
from jaxprompt.generation import Generation, Generator
from jaxprompt.model import PromptedT5
from jaxprompt.prompts import METHODS, MethodConfig, NoPrompt, PromptMethod
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.sharding import replicate, shard_batch
from jaxprompt.t5.search import Search
from jaxprompt.trees import split
from jaxprompt.typing import ArrayTree, Batch, UserError

BARE = "none"  # in place of a prompt: the backbone alone

# Compiled once for each shape, whoever asks: programs of equal graph definitions are the same.
_scores = jax.jit(steps.candidate_scores, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said to one example.

    Attributes:
      text: the candidate chosen, or the text generated.
      score: log-likelihood of the answer, summed over its tokens and the end token, in nats.
      scores: the same of every candidate; empty where the text was generated.
      complete: False if the generated text came to max_target_length without an end token or stop.
      more: further generated answers, where several were asked for.
    """

    text: str
    score: float
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    complete: bool = True
    more: tuple["Answer", ...] = ()


@dataclasses.dataclass(frozen=True)
class Partial:
    """What a model has said so far.

    Attributes:
      index: the example's number.
      sequence: which of its answers.
      text: all of it so far.
      final: nothing will be added.
    """

    index: int
    sequence: int
    text: str
    final: bool


class Answerer:
    """Answers examples: ranks the candidates of their task, or generates where it has none.

    Attributes: encoders; cuts, of each prompt, counts of what was cut off to fit so far.
    """

    def __init__(
        self,
        graphdef: Any,
        encoders: Sequence[TaskEncoder],
        *,
        mesh: Mesh | None = None,
        input_buckets: Sequence[int] = (),
        generate: bool = False,
        generation: Generation | None = None,
        chunk_batches: int = 16,
    ):
        """
        Args:
          graphdef: of a `PromptedT5`, from `trees.split`.
          encoders: of each of its prompts, the task with its layout, vocabulary and lengths.
          mesh: spreads the rows of a batch over devices.
          input_buckets: lengths to pad to, as `eval_chunks` takes them.
          generate: generate even if the task has candidates.
          generation: how to generate, up to the encoder's max_target_length; None = greedily.
          chunk_batches: batches made, and answered, at a time.
        """
        self.encoders, self.cuts = list(encoders), [Cuts() for _ in encoders]
        self._graphdef, self._mesh = graphdef, mesh
        self._input_buckets, self._chunk_batches = tuple(input_buckets), chunk_batches
        self._generate, self._generation = generate, generation or Generation()
        self._generators: dict[int, Generator] = {}

    def answers(
        self, trained: ArrayTree, frozen: ArrayTree, asked: Iterable[Asked]
    ) -> Iterator[list[tuple[Asked, Answer]]]:
        """Examples with their answers, in the order given, chunk by chunk as they are read."""
        first = 0
        for chunk in self._chunks(asked, generate=self._generate):
            results = [self._run(trained, frozen, batch, first) for batch in chunk.batches]
            answers: dict[int, Answer] = {}
            for made, result in zip(chunk.batches, results, strict=True):
                answers |= self._told(result, made)
            yield [(one, answers[at]) for at, one in enumerate(chunk.asked)]
            first += len(chunk.asked)

    def stream(
        self, trained: ArrayTree, frozen: ArrayTree, asked: Iterable[Asked], every: int = 1
    ) -> Iterator[Partial]:
        """Generated answers as they grow, every so many tokens, batch after batch.

        Raises: UserError with a beam, whose best answer is known only at the end.
        """
        self._generation.check_streams()
        first = 0
        for chunk in self._chunks(asked, generate=True):
            for made in chunk.batches:
                yield from self._partials(trained, frozen, made, first, every)
            first += len(chunk.asked)

    def _chunks(self, asked: Iterable[Asked], *, generate: bool) -> Iterator[EvalChunk]:
        return eval_chunks(
            self.encoders,
            asked,
            generate=generate,
            input_buckets=self._input_buckets,
            chunk_batches=self._chunk_batches,
            row_multiple=1 if self._mesh is None else self._mesh.shape["data"],
            cuts=self.cuts,
        )

    def _generator(self, max_new_tokens: int) -> Generator:
        """What generates answers of up to so many tokens."""
        if max_new_tokens not in self._generators:
            generation = self._generation
            search = dataclasses.replace(generation.search, max_new_tokens=max_new_tokens)
            self._generators[max_new_tokens] = Generator(
                self._graphdef,
                self.encoders[0].tokenizer,
                dataclasses.replace(generation, search=search),
                self._mesh,
            )
        return self._generators[max_new_tokens]

    def _partials(
        self, trained: ArrayTree, frozen: ArrayTree, made: EvalBatch, first: int, every: int
    ) -> Iterator[Partial]:
        batch = _with_beginning(made.batch, self.encoders[0].start_id)
        numbers_B = _numbers(made.batch, first)
        generator = self._generator(made.max_new_tokens)
        told: dict[tuple[int, int], tuple[str, bool]] = {}
        for rows, over in generator.stream(trained, frozen, batch, numbers_B, every):
            for number, said in zip(numbers_B.tolist(), rows, strict=True):
                for sequence, one in enumerate(said):
                    now = (one.text, one.ended or over)
                    if number >= 0 and told.get((number, sequence), ("", False)) != now:
                        told[number, sequence] = now
                        yield Partial(number, sequence, *now)

    def _run(self, trained: ArrayTree, frozen: ArrayTree, made: EvalBatch, first: int) -> Any:
        """Starts a batch on the device; does not wait for it, but to look for stop strings."""
        batch = _with_beginning(made.batch, self.encoders[0].start_id)
        if made.candidates is None:
            generator = self._generator(made.max_new_tokens)
            return generator.begin(trained, frozen, batch, _numbers(made.batch, first))
        candidates = self._put(made.candidates, axis=1)
        return _scores(self._graphdef, trained, frozen, self._put(batch), candidates)

    def _put(self, tree: ArrayTree, axis: int = 0) -> ArrayTree:
        if self._mesh is None:
            return jax.device_put(tree)
        return shard_batch(self._mesh, tree, axis)

    def _told(self, result: Any, made: EvalBatch) -> dict[int, Answer]:
        """Answers to a batch's examples by their numbers, -1 for none."""
        batch = made.batch
        index_BG = np.asarray(batch.example_index_BG)
        if made.candidates is None:
            answers = [
                [Answer(said.text, said.score, complete=said.ended) for said in row]
                for row in self._generator(made.max_new_tokens).read(result)
            ]
            return {
                index: dataclasses.replace(row[0], more=tuple(row[1:]))
                for index, row in zip(index_BG[:, 0].tolist(), answers, strict=True)
            }
        result = jax.device_get(result if self._mesh is None else replicate(self._mesh, result))
        answers = {}
        for index, prompt, scores_C in zip(
            index_BG.ravel().tolist(),
            np.ravel(batch.prompt_index_BG).tolist(),
            result.reshape(-1, result.shape[-1]),
            strict=True,
        ):
            candidates = self.encoders[prompt].task.candidates
            best = int(scores_C[: len(candidates)].argmax())
            scores = dict(zip(candidates, scores_C.tolist(), strict=False))
            answers[index] = Answer(candidates[best], float(scores_C[best]), scores)
        return answers


@dataclasses.dataclass(frozen=True)
class Prompted:
    """One prompt or a bank on a backbone, taken apart as the compiled programs want it."""

    graphdef: Any
    trained: ArrayTree
    frozen: ArrayTree


def put_on(
    backbone: Backbone, *prompts: PromptArtifact | None, allow_other: bool = False
) -> Prompted:
    """Puts one prompt, or several as a bank, on a backbone.

    Args:
      prompts: None = the bare backbone.
      allow_other: accept another backbone than the prompt was trained with, where shapes allow.
    Raises: UserError for a backbone that a prompt does not belong to, an unknown method, or
      prompts of different methods.
    """
    methods = [_method(backbone, prompt, allow_other) for prompt in prompts]
    method = methods[0] if len(methods) == 1 else PromptBank(methods)
    return Prompted(*split(PromptedT5(backbone.module(), method)))


def _method(backbone: Backbone, prompt: PromptArtifact | None, allow_other: bool) -> PromptMethod:
    if prompt is None:
        return NoPrompt()
    check_backbone(
        prompt, backbone.name, backbone.fingerprint, backbone.config.d_model, allow_other
    )
    config = method_config(prompt)
    return METHODS[config.name].make(jax.device_put(dict(prompt.values)), config)


def read_prompts(words: Sequence[str]) -> list[tuple[str, PromptArtifact | None]]:
    """Prompts with their names, from words `PATH` (a path is its own name) or `NAME=PATH`.

    Raises: UserError as `load_artifact`.
    """
    prompts = []
    for word in words:
        name, separator, path = word.partition("=")
        if not separator or os.path.exists(word):
            name = path = word
        prompts.append((name, read_prompt(path)))
    return prompts


def ask_named(
    field: str,
    names: Sequence[str],
    tasks: Sequence[Task],
    rows: Iterable[tuple[Fields, str]],
    *,
    with_target: bool = True,
) -> Iterator[Asked]:
    """Examples of rows that name their prompt in a field.

    Args:
      names, tasks: of each prompt of the bank.
      rows: fields, and where they stand.
    Raises: UserError for a row without the field or with the name of no prompt, or for two prompts
      of one name.
    """
    numbers = {name: number for number, name in enumerate(names)}
    if len(numbers) < len(names):
        twice = next(name for number, name in enumerate(names) if numbers[name] != number)
        raise UserError(f"two prompts are called {twice!r}; call one of them NAME=PATH")
    for row, where in rows:
        name = str(lookup(row, field, where))
        if name not in numbers:
            raise UserError(
                f"{where}: field {field!r} names prompt {name!r}, which was not given; there are "
                f"{', '.join(numbers)}"
            )
        yield Asked(tasks[numbers[name]].example(row, where, with_target), numbers[name])


def read_prompt(path: str) -> PromptArtifact | None:
    """The artifact at `path`; None for "none", the bare backbone.

    Raises: UserError as `load_artifact`.
    """
    return None if path == BARE else load_artifact(path)


def backbone_of(
    prompt: PromptArtifact | None, name: str | None = None, dtype: str = "float32"
) -> Backbone:
    """Loads a prompt's backbone, or the one called `name`.

    Raises: UserError if neither says which, or as `load_backbone`.
    """
    chosen = name or ("" if prompt is None else prompt.backbone.name)
    if not chosen:
        who = "the bare backbone" if prompt is None else f"prompt {prompt.path}"
        raise UserError(f"{who} does not say which backbone to load; name it with --backbone")
    return load_backbone(chosen, dtype=dtype)


def task_of(prompt: PromptArtifact | None, name: str | None = None) -> Task:
    """The task called `name`, or else a prompt's own; free text to free text if it has none."""
    if name:
        return load_task(name)
    if prompt is None or not prompt.task:
        return Task(TaskConfig())
    return Task(schema.from_mapping(TaskConfig, prompt.task, f"the task of prompt {prompt.path}"))


def with_candidates(task: Task, candidates: Sequence[str]) -> Task:
    """The task with other candidates to choose from; with none, one of free generation."""
    options = {"labels": {}, "candidates": tuple(candidates), "positive_label": ""}
    return Task(dataclasses.replace(task.config, **options))


def method_config(prompt: PromptArtifact) -> MethodConfig:
    """The options of a prompt's method.

    Raises: UserError if this version does not know it.
    """
    place = f"the method of prompt {prompt.path}"
    config = schema.from_mapping(MethodConfig, prompt.method, place)
    if config.name not in METHODS:
        raise UserError(f"{place} is {config.name!r}; there are {', '.join(METHODS)}")
    return config


def layout_of(prompt: PromptArtifact | None) -> Layout:
    """Where a prompt's slots stand; the input alone without a prompt.

    Raises: UserError if layout and length do not agree.
    """
    if prompt is None:
        return Layout.parse("{input}", 0)
    return Layout.parse(prompt.layout, method_config(prompt).length)


def encoder_of(
    backbone: Backbone,
    prompt: PromptArtifact | None,
    task: Task,
    *,
    batch_size: int = 64,
    max_input_length: int | None = None,
    max_target_length: int | None = None,
) -> TaskEncoder:
    """What turns a task's examples into rows for this prompt.

    Lengths are those given, else those the prompt was trained with, else the defaults.
    """
    default = DataConfig()
    trained = {} if prompt is None else prompt.lengths
    config = DataConfig(
        eval_batch_size=batch_size,
        max_input_length=max_input_length
        or trained.get("max_input_length", default.max_input_length),
        max_target_length=max_target_length
        or trained.get("max_target_length", default.max_target_length),
    )
    return TaskEncoder(
        task,
        layout_of(prompt),
        backbone.tokenizer,
        config,
        start_id=backbone.config.decoder_start_id,
    )


def generation_of(args: argparse.Namespace) -> Generation:
    """What a command's options say about generating.

    Raises: UserError for options that make no sense or not together.
    """
    fields = (field.name for field in dataclasses.fields(Search))
    search = Search(**{name: getattr(args, name) for name in fields if hasattr(args, name)})
    return Generation(search, tuple(args.stop), args.seed)


def cut_note(cuts: Cuts, longest: int) -> str:
    """A sentence on inputs that were cut off; empty if none was."""
    if not cuts.cut_inputs:
        return ""
    return (
        f"{cuts.cut_inputs:,} of {cuts.examples:,} inputs were cut to {longest} tokens, "
        f"{cuts.cut_input_tokens:,} tokens in all; --max-input-length takes more"
    )


def _with_beginning(batch: Batch, start_id: int) -> Batch:
    """The batch with nothing but the start token on its decoder side."""
    ids = np.full((len(batch.decoder_ids_BT), 1), start_id, np.int32)
    return dataclasses.replace(
        batch,
        decoder_ids_BT=ids,
        decoder_slots_BT=np.full_like(ids, -1),
        decoder_segments_BT=np.ones_like(ids),
        targets_BT=np.zeros_like(ids),
        loss_weights_BT=np.zeros(ids.shape, np.float32),
    )


def _numbers(batch: Batch, first: int) -> np.ndarray:
    """Numbers of a batch's examples over all chunks, the chunk's first one being `first`."""
    index_B = np.asarray(batch.example_index_BG)[:, 0]
    return np.where(index_B < 0, index_B, index_B + first)
