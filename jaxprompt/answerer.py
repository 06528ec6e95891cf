"""Compiled programs that answer: candidates ranked, or texts generated, chunk by chunk.

`evaluate`, `predict` and `api` share it, and through `evaluate` the evaluations of a training run.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxprompt import steps
from jaxprompt.data.encoder import Cuts, TaskEncoder
from jaxprompt.data.pipeline import Asked, EvalBatch, EvalChunk, eval_chunks
from jaxprompt.generation import Generation, Generator
from jaxprompt.sharding import shard_batch, to_host
from jaxprompt.typing import ArrayTree, Batch

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
        result = to_host(result)
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
