"""What `import jaxprompt as jp` does with a prompt: load_prompt, logits, score, generate, stream.

`load_backbone` is in `backbone`, `load_config` in `config`, `train` in `train`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprompt import inference, steps
from jaxprompt.answerer import Answer, Answerer, Partial
from jaxprompt.artifact import BackboneIdentity, PromptArtifact
from jaxprompt.backbone import Backbone
from jaxprompt.data.layout import Layout
from jaxprompt.data.packing import EncodedExample, batch_of_rows
from jaxprompt.data.pipeline import Asked
from jaxprompt.data.tasks import Task
from jaxprompt.data.templates import Hole
from jaxprompt.generation import Generation
from jaxprompt.inference import Prompted, encoder_of, layout_of, put_on, task_of, with_candidates
from jaxprompt.t5.search import Search
from jaxprompt.typing import Array, Batch, UserError

_BATCH_ROWS = 64
_logits = jax.jit(steps.logits, static_argnums=0)


def load_prompt(path: str, *, any_backbone: bool = False) -> PromptArtifact:
    """Reads a prompt: an artifact's or a PEFT directory, or a .npy file with one array [P, D].

    Args:
      any_backbone: forget which backbone it was trained with, so that any of its width will do.
    Raises: UserError that says what is wrong with it.
    """
    prompt = inference.load_prompt(path)
    if not any_backbone:
        return prompt
    width = BackboneIdentity(d_model=prompt.backbone.d_model)
    return dataclasses.replace(prompt, backbone=width)


def logits(
    backbone: Backbone, prompt: PromptArtifact | None, encoder_ids: Any, decoder_ids: Any
) -> Array:
    """Logits after every decoder input.

    Args:
      prompt: None = the bare backbone.
      encoder_ids: int [B, S], the input's token ids, an end token if there is to be one; pad ids
        are masked. Slots are put where the prompt's layout has them, an end token stays last.
      decoder_ids: int [B, T], decoder inputs, the start token first; causal, nothing is masked.
    Returns: float32 [B, T, V].
    Raises: UserError for ids that are no table of token ids, a layout that takes other fields than
      the input, or a prompt of another backbone.
    """
    inputs = _checked_ids("encoder_ids", encoder_ids, backbone)
    outputs = _checked_ids("decoder_ids", decoder_ids, backbone)
    if len(inputs) != len(outputs):
        raise UserError(f"encoder_ids has {len(inputs)} rows, decoder_ids {len(outputs)}")
    prompted = put_on(backbone, prompt)
    batch = dataclasses.replace(
        _laid_batch(inputs, layout_of(prompt), backbone),
        decoder_ids_BT=outputs,
        decoder_slots_BT=np.full_like(outputs, -1),
        decoder_segments_BT=np.ones_like(outputs),
        targets_BT=np.zeros_like(outputs),
        loss_weights_BT=np.zeros(outputs.shape, np.float32),
    )
    return _logits(prompted.graphdef, prompted.trained, prompted.frozen, jax.device_put(batch))


def score(
    backbone: Backbone,
    prompt: PromptArtifact | None,
    inputs: Sequence[str | Mapping[str, Any]],
    candidates: Sequence[str] = (),
) -> np.ndarray:
    """Log-likelihood of every candidate as the answer to every input.

    Args:
      prompt: None = the bare backbone.
      inputs: texts, or rows with the fields of the prompt's task. A text stands for the one field
        that the task takes.
      candidates: answers to compare; empty = those of the prompt's task.
    Returns: float32 [B, C], summed over a candidate's tokens and the end token, in nats.
    Raises: UserError for an input without tokens, candidates missing, or a prompt of another
      backbone.
    """
    task = task_of(prompt)
    if candidates:
        task = with_candidates(task, candidates)
    if not task.candidates:
        raise UserError("score needs candidates: the prompt's task has none of its own")
    answers = _answers(backbone, prompt, task, inputs)
    scores = [list(answer.scores.values()) for answer in answers]
    return np.asarray(scores, np.float32).reshape(len(scores), len(task.candidates))


def generate(
    backbone: Backbone,
    prompt: PromptArtifact | None,
    inputs: Sequence[str | Mapping[str, Any]],
    max_new_tokens: int = 32,
    num_beams: int = 1,
    *,
    stop: Sequence[str] = (),
    seed: int = 0,
    **options: Any,
) -> list[str] | list[list[str]]:
    """Answers to inputs, generated greedily unless the options say otherwise.

    Args:
      prompt: None = the bare backbone.
      inputs: as in `score`.
      max_new_tokens: longest answer, the end token included.
      num_beams: width of a beam search.
      stop: texts at which an answer ends, itself without them.
      seed: of sampling. What an input gets depends on it and the input's place, not on batches.
      options: the other fields of `t5.search.Search`: length_penalty, early_stopping, temperature
        (above 0 samples), top_k, top_p, repetition_penalty, no_repeat_ngram_size,
        num_return_sequences.
    Returns: a text for each input; a list of texts for each with num_return_sequences above 1.
    Raises: UserError for an input without tokens, options that make no sense or not together, or a
      prompt of another backbone.
    """
    generation = _generation(max_new_tokens, stop, seed, {"num_beams": num_beams, **options})
    task = with_candidates(task_of(prompt), ())
    answers = _answers(backbone, prompt, task, inputs, generation)
    if generation.search.num_return_sequences == 1:
        return [answer.text for answer in answers]
    return [[answer.text, *(other.text for other in answer.more)] for answer in answers]


def stream(
    backbone: Backbone,
    prompt: PromptArtifact | None,
    inputs: Sequence[str | Mapping[str, Any]],
    max_new_tokens: int = 32,
    *,
    every: int = 1,
    stop: Sequence[str] = (),
    seed: int = 0,
    **options: Any,
) -> Iterator[Partial]:
    """Answers while they grow: whenever a text has become longer or final, all of it so far.

    Args: as `generate`, without beams.
      every: tokens between two looks.
    Raises: UserError as `generate`, and for a beam.
    """
    if every < 1:
        raise UserError(f"every is {every}, it has to be at least 1")
    generation = _generation(max_new_tokens, stop, seed, options)
    generation.check_streams()
    task = with_candidates(task_of(prompt), ())
    prompted, answerer, asked = _asked(backbone, prompt, task, inputs, generation)
    return answerer.stream(prompted.trained, prompted.frozen, asked, every)


def _generation(
    max_new_tokens: int, stop: Sequence[str], seed: int, options: Mapping[str, Any]
) -> Generation:
    known = [field.name for field in dataclasses.fields(Search)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UserError(f"there is no option {unknown[0]!r}; there are {', '.join(known)}")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return Generation(Search(max_new_tokens=max_new_tokens, **options), stops, seed)


def _answers(
    backbone: Backbone,
    prompt: PromptArtifact | None,
    task: Task,
    inputs: Sequence[str | Mapping[str, Any]],
    generation: Generation | None = None,
) -> list[Answer]:
    prompted, answerer, asked = _asked(backbone, prompt, task, inputs, generation)
    answered = answerer.answers(prompted.trained, prompted.frozen, asked)
    return [answer for chunk in answered for _, answer in chunk]


def _asked(
    backbone: Backbone,
    prompt: PromptArtifact | None,
    task: Task,
    inputs: Sequence[str | Mapping[str, Any]],
    generation: Generation | None,
) -> tuple[Prompted, Answerer, Iterator[Asked]]:
    if isinstance(inputs, str):
        raise UserError("inputs is one text; give a list of texts")
    prompted = put_on(backbone, prompt)
    rows = min(_BATCH_ROWS, 1 << max(0, len(inputs) - 1).bit_length())
    longest = None if generation is None else generation.search.max_new_tokens
    encoder = encoder_of(backbone, prompt, task, batch_size=rows, max_target_length=longest)
    answerer = Answerer(prompted.graphdef, [encoder], generation=generation)
    fields = ({task.text_field: row} if isinstance(row, str) else row for row in inputs)
    asked = (
        Asked(task.example(dict(row), f"inputs[{number}]", with_target=False))
        for number, row in enumerate(fields)
    )
    return prompted, answerer, asked


def _checked_ids(name: str, ids: Any, backbone: Backbone) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{name} is {array.dtype} {list(array.shape)}, it has to be int [rows, n]")
    rows = backbone.config.vocab_size
    if array.min() < 0 or array.max() >= rows:
        raise UserError(
            f"{name} lie in {array.min()}..{array.max()}, the backbone has ids 0..{rows - 1}"
        )
    return array.astype(np.int32)


def _laid_batch(inputs_BS: np.ndarray, layout: Layout, backbone: Backbone) -> Batch:
    """Raw input ids laid out around a prompt's slots; nothing on the decoder side."""
    pad_id, around = backbone.config.pad_id, _around_input(layout, backbone)
    examples = []
    for number, ids in enumerate(inputs_BS):
        length = int(np.flatnonzero(ids != pad_id).max(initial=-1)) + 1
        ended = length > 0 and ids[length - 1] == backbone.config.eos_id
        text, end = np.split(ids[:length], [length - ended])
        parts = [*(_tokens(text) if part is None else part for part in around), _tokens(end)]
        row_ids, row_slots = (np.concatenate(side) for side in zip(*parts, strict=True))
        examples.append(EncodedExample(row_ids, row_slots, (), number))
    batch = batch_of_rows(
        [[example] for example in examples],
        batch_size=len(examples),
        input_length=max(len(example.encoder_ids) for example in examples),
        target_length=1,
        max_segments=1,
        pad_id=pad_id,
        start_id=backbone.config.decoder_start_id,
    )
    seen_BS = (batch.encoder_ids_BS != pad_id) | (batch.encoder_slots_BS >= 0)
    return dataclasses.replace(batch, encoder_segments_BS=seen_BS.astype(np.int32))


_Laid = tuple[np.ndarray, np.ndarray]  # ids, slots


def _around_input(layout: Layout, backbone: Backbone) -> list[_Laid | None]:
    """What a layout has in order; None where the input stands."""
    parts: list[_Laid | None] = []
    slots = 0
    for piece in layout.pieces:
        if isinstance(piece, int):
            indices = np.arange(slots, slots + piece, dtype=np.int32)
            parts.append((np.full_like(indices, backbone.config.pad_id), indices))
            slots += piece
            continue
        for part in piece:
            if isinstance(part, Hole) and part.name != "input":
                raise UserError(
                    f"the layout {layout.template!r} takes field {part.name!r}, token ids stand "
                    "for {input} alone; use score or generate"
                )
            literal = isinstance(part, str)
            parts.append(_tokens(backbone.tokenizer.encode(part)) if literal else None)
    return parts


def _tokens(ids: Sequence[int] | np.ndarray) -> _Laid:
    ids = np.asarray(ids, np.int32)
    return ids, np.full_like(ids, -1)
