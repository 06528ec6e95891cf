"""A tiny backbone of odd sizes and batches for it, made with numpy so that nothing is compiled."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt import trees
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.layers import ParamSpec, param_specs
from jaxprompt.typing import Batch

CONFIG = T5Config(
    vocab_size=40, d_model=12, d_kv=5, d_ff=16, num_layers=3, num_decoder_layers=2, num_heads=4,
    relative_attention_num_buckets=8, relative_attention_max_distance=12,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Example:
    """One segment: encoder ids with slots as -1 - slot, target ids, its prompt and its task."""

    encoder: Sequence[int]
    target: Sequence[int]
    prompt: int = 0
    decoder_slots: int = 0
    task: int = 0


def make_params(config: T5Config = CONFIG, seed: int = 0) -> dict:
    """Random float32 weights; norms vary."""
    draw = np.random.default_rng(seed)

    def leaf(spec: ParamSpec) -> jax.Array:
        noise = draw.normal(size=spec.shape)
        values = 1 + 0.2 * noise if spec.stddev is None else spec.stddev * noise
        return jnp.asarray(values, jnp.float32)

    specs: dict[str, ParamSpec] = trees.flatten(param_specs(config))
    return trees.unflatten({path: leaf(spec) for path, spec in specs.items()})


def make_examples(
    count: int, slots: int, prompts: int = 1, seed: int = 0, decoder_slots: int = 0
) -> list[Example]:
    """Slots before, amid or behind 2 to 5 tokens; targets of 1 to 3."""
    draw = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        text = draw.integers(3, CONFIG.vocab_size, draw.integers(2, 6)).tolist()
        cut = int(draw.integers(0, len(text) + 1))
        encoder = [*text[:cut], *(-1 - slot for slot in range(slots)), *text[cut:]]
        target = draw.integers(3, CONFIG.vocab_size, draw.integers(1, 4)).tolist()
        examples.append(Example(encoder, target, number % prompts, decoder_slots))
    return examples


def make_batch(
    rows: Sequence[Sequence[Example]], encoder: int, decoder: int, segments: int
) -> Batch:
    """Rows of segments, padded to `encoder` and `decoder` positions and `segments` segments."""
    count = len(rows)
    fields = {
        "encoder_ids_BS": np.zeros((count, encoder), np.int32),
        "encoder_slots_BS": np.full((count, encoder), -1, np.int32),
        "encoder_segments_BS": np.zeros((count, encoder), np.int32),
        "decoder_ids_BT": np.zeros((count, decoder), np.int32),
        "decoder_slots_BT": np.full((count, decoder), -1, np.int32),
        "decoder_segments_BT": np.zeros((count, decoder), np.int32),
        "targets_BT": np.zeros((count, decoder), np.int32),
        "loss_weights_BT": np.zeros((count, decoder), np.float32),
        "prompt_index_BG": np.zeros((count, segments), np.int32),
        "example_index_BG": np.full((count, segments), -1, np.int32),
        "task_index_BG": np.zeros((count, segments), np.int32),
    }
    number = 0
    for b, row in enumerate(rows):
        s = t = 0
        for g, example in enumerate(row):
            for code in example.encoder:
                fields["encoder_ids_BS"][b, s] = max(code, 0)
                fields["encoder_slots_BS"][b, s] = -1 - code if code < 0 else -1
                fields["encoder_segments_BS"][b, s] = g + 1
                s += 1
            start = t
            for slot in range(example.decoder_slots):
                fields["decoder_slots_BT"][b, t] = slot
                t += 1
            for previous, target in zip([0, *example.target], example.target, strict=False):
                fields["decoder_ids_BT"][b, t] = previous
                fields["targets_BT"][b, t] = target
                fields["loss_weights_BT"][b, t] = 1
                t += 1
            fields["decoder_segments_BT"][b, start:t] = g + 1
            fields["prompt_index_BG"][b, g] = example.prompt
            fields["task_index_BG"][b, g] = example.task
            fields["example_index_BG"][b, g] = number
            number += 1
    return Batch(**fields)
