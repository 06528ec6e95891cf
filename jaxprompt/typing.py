"""The words every room shares: shape letters, the batch, prompt values, and the user's error.

Shape letters, used as suffixes of array names (`ids_BS` is int [batch rows, encoder length]):
B batch rows, S encoder length, T decoder length, P prompt slots, G segments of a row, Q prompts of
a bank, N layers, H heads, K head size, D model size, F mlp size, V vocabulary, C candidates.
"""

import dataclasses
from typing import Any, NamedTuple

import jax

Array = jax.Array
ArrayTree = Any  # a pytree whose leaves are arrays; in this project nested dicts with str keys


class UserError(Exception):
    """Something only the user can put right, in one sentence: what, where, what would be right."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Laid-out rows of text and slots; the only thing the compiled program reads beside parameters.

    A row holds one or more segments (examples). Segment ids are 1..G, contiguous, 0 is padding, so
    attention is allowed exactly where segment ids agree; T5 has relative positions only, hence an
    array index is all the position there is. Fields are int32 unless noted, numpy on the host.

    Attributes:
      encoder_ids_BS: token ids, pad id at slots and padding.
      encoder_slots_BS: index of the prompt slot standing there, -1 for a token.
      encoder_segments_BS: segment id, 0 = padding.
      decoder_ids_BT: decoder inputs, start token first in each segment.
      decoder_slots_BT: as encoder_slots_BS, for decoder slots.
      decoder_segments_BT: segment id, 0 = padding.
      targets_BT: token that follows decoder_ids_BT.
      loss_weights_BT: float32, 1 where the target counts, 0 at padding and slots.
      prompt_index_BG: which prompt of a bank the segment uses, 0 with a single prompt.
      example_index_BG: the segment's example number in its source, -1 for an empty segment.
      task_index_BG: which task of a mixture the segment is of; None = there is one.
    """

    encoder_ids_BS: Array
    encoder_slots_BS: Array
    encoder_segments_BS: Array
    decoder_ids_BT: Array
    decoder_slots_BT: Array
    decoder_segments_BT: Array
    targets_BT: Array
    loss_weights_BT: Array
    prompt_index_BG: Array
    example_index_BG: Array
    task_index_BG: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
    """Answers to rank for the examples of a batch: its decoder side once for each of C candidates.

    Fields as in `Batch`, with C in front: [C, B, T]. An example with fewer candidates than C has
    zero loss weights at the missing ones.
    """

    decoder_ids_CBT: Array
    decoder_slots_CBT: Array
    decoder_segments_CBT: Array
    targets_CBT: Array
    loss_weights_CBT: Array


class Outputs(NamedTuple):
    """What the backbone makes of a batch with teacher forcing.

    logits_BTV are float32; encoded_BSD and decoded_BTD, the last hidden states of encoder and
    decoder, in the compute dtype.
    """

    logits_BTV: Array
    encoded_BSD: Array
    decoded_BTD: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Trained keys and values put before a stack's own.

    Attributes:
      keys, values: [N, Q, P, H, K].
      mask_QP: bool, False at places of a prompt that is shorter than P; None = all have P.
      before_text: whether they stand at the P positions before a segment and take the relative bias
        there; else they stand nowhere and have none.
    """

    keys: Array
    values: Array
    mask_QP: Array | None = None
    before_text: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerSlots:
    """What the encoder's slots hold from its second layer on; the first has slot embeddings.

    Attributes:
      values: [N - 1, Q, P, D], before layers 1 to N - 1.
      adds_Q: bool, added to the hidden states there (True) or in their place (False).
    """

    values: Array
    adds_Q: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptValues:
    """What a prompt method hands the backbone; the backbone knows this and never a method.

    Attributes:
      encoder: embeddings of encoder slots, [Q, P, D].
      encoder_layers: what encoder slots hold in later layers.
      decoder: embeddings of decoder slots, [Q, P, D].
      encoder_self: keys and values of every encoder self-attention.
      decoder_self: keys and values of every decoder self-attention.
      decoder_cross: keys and values of every encoder-decoder attention.
      input_delta: added to the encoder's input embeddings, [B, S, D].
      prompt_index_BG: which of the Q prompts a segment uses, for methods that make values per
        segment; None = the batch's own `prompt_index_BG`.
    """

    encoder: Array | None = None
    encoder_layers: LayerSlots | None = None
    decoder: Array | None = None
    encoder_self: KeysValues | None = None
    decoder_self: KeysValues | None = None
    decoder_cross: KeysValues | None = None
    input_delta: Array | None = None
    prompt_index_BG: Array | None = None
