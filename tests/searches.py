"""What the tests of generation share: models, rows, searches, and how transformers answers them."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jaxprompt import trees
from jaxprompt.t5 import model as t5
from jaxprompt.t5 import stepwise
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.decode import Generated
from jaxprompt.t5.generate import generate
from jaxprompt.t5.search import Rules, Search
from jaxprompt.t5.weights import save_hf
from jaxprompt.typing import Batch, KeysValues, PromptValues

SIZES = {
    "vocab_size": 23, "d_model": 12, "d_kv": 5, "d_ff": 19, "num_layers": 2,
    "num_decoder_layers": 2, "num_heads": 3, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}  # fmt: skip
FAMILIES = {
    "t5-1.0": {
        "activation": "relu", "gated": False, "tie_word_embeddings": True,
        "scale_decoder_outputs": True,
    },
    "t5-1.1": {},
    "umt5": {"model_type": "umt5", "per_layer_relative_bias": True},
}  # fmt: skip
NEW = 9
NOTHING = PromptValues()
ONE_BY_ONE = Compute(scan_unroll=1)  # compiles faster
GOLDEN = Path(__file__).parent / "golden" / "generate.npz"

# Searches that differ in strengths alone are one program; those of `ONCE` meet one family only.
EVERYWHERE = {
    "greedy": Search(NEW),
    "beams": Search(NEW, num_beams=4, num_return_sequences=4),
    "beams short": Search(NEW, num_beams=4, length_penalty=-1.5, num_return_sequences=4),
    "beams long": Search(NEW, num_beams=4, length_penalty=2.0, num_return_sequences=4),
    "beams controlled": Search(
        NEW, num_beams=3, early_stopping=True, length_penalty=0.7, repetition_penalty=1.4,
        no_repeat_ngram_size=2, num_return_sequences=2,
    ),
    "beams encouraged": Search(
        NEW, num_beams=3, early_stopping=True, length_penalty=0.0, repetition_penalty=0.8,
        no_repeat_ngram_size=2, num_return_sequences=2,
    ),
}  # fmt: skip
ONCE = {
    "bigrams penalised": Search(NEW, no_repeat_ngram_size=2, repetition_penalty=1.7),
    "bigrams": Search(NEW, no_repeat_ngram_size=2, repetition_penalty=0.8),
    "trigrams": Search(NEW, no_repeat_ngram_size=3, repetition_penalty=0.7),
    "first": Search(NEW, num_beams=2, length_penalty=2.0, early_stopping=True),
    "better": Search(NEW, num_beams=2, length_penalty=2.0),
    "never": Search(NEW, num_beams=2, length_penalty=2.0, early_stopping="never"),
    "never short": Search(NEW, num_beams=2, length_penalty=-0.5, early_stopping="never"),
}
ONCE_FAMILY = "t5-1.1"
# transformers' class and the seeds of the weights; mT5 is computed as T5 1.1 is
ANSWERED = {
    "t5-1.0": ("T5ForConditionalGeneration", (1, 2, 5)),
    "t5-1.1": ("T5ForConditionalGeneration", (0, 1, 2)),
    "mt5": ("MT5ForConditionalGeneration", (3, 4)),
    "umt5": ("UMT5ForConditionalGeneration", (0, 1, 2)),
}


def make_config(family: str) -> T5Config:
    return T5Config(**SIZES, **FAMILIES["t5-1.1" if family == "mt5" else family])


@functools.cache
def golden() -> dict[str, np.ndarray]:
    """What `golden/make_generate_golden.py` made."""
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def ending_config(family: str) -> T5Config:
    """The family's config with an end token that its models say in the middle of their answers."""
    eos_id = int(golden()[f"{family}/eos_id"])
    return dataclasses.replace(make_config(family), eos_id=eos_id)


def searches_of(family: str) -> dict[str, Search]:
    return EVERYWHERE | ONCE if family == ONCE_FAMILY else EVERYWHERE


def make_params(config: T5Config, seed: int = 0) -> dict:
    """Random weights, scaled so that what is said depends on more than the last token."""
    return _params(dataclasses.replace(config, eos_id=1), seed)


@functools.cache
def _params(config: T5Config, seed: int) -> dict:
    return trees.map_with_path(
        lambda path, leaf: leaf * (0.2 if path == "token_embedder/embedding" else 3.0),
        tiny.make_params(config, seed),
    )


def make_batch(rows: int = 5, slots: int = 0, decoder_slots: int = 0, prompts: int = 1) -> Batch:
    """Rows of 4 to 8 random tokens behind their slots; the last row is empty."""
    rng = np.random.default_rng(0)
    length = 8 + slots
    lengths = rng.integers(4, 9, rows) + slots
    lengths[-1] = 0
    filled = np.arange(length) < lengths[:, None]
    is_slot = filled & (np.arange(length) < slots)
    ids = np.where(filled & ~is_slot, rng.integers(3, 23, (rows, length)), 0)
    beginning = np.zeros((rows, 1 + decoder_slots), np.int32)
    return Batch(
        encoder_ids_BS=ids.astype(np.int32),
        encoder_slots_BS=np.where(is_slot, np.arange(length), -1).astype(np.int32),
        encoder_segments_BS=filled.astype(np.int32),
        decoder_ids_BT=beginning,
        decoder_slots_BT=np.arange(-1, decoder_slots, dtype=np.int32) * np.ones_like(beginning),
        decoder_segments_BT=beginning + 1,
        targets_BT=beginning,
        loss_weights_BT=beginning.astype(np.float32),
        prompt_index_BG=rng.integers(0, prompts, (rows, 1)).astype(np.int32),
        example_index_BG=np.where(np.arange(rows) < rows - 1, np.arange(rows), -1)[:, None].astype(
            np.int32
        ),
    )


def weight_sum(params: dict) -> float:
    """A number that other weights do not have."""
    return float(
        sum(np.abs(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(params))
    )


def every_value(config: T5Config, slots: int, decoder_slots: int, prefix: int) -> PromptValues:
    """Prompt values of every kind for a bank of two prompts."""
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def pair(layers: int) -> KeysValues:
        shape = (layers, 2, prefix, config.num_heads, config.d_kv)
        return KeysValues(draw(*shape), draw(*shape))

    return PromptValues(
        encoder=draw(2, slots, config.d_model),
        decoder=draw(2, decoder_slots, config.d_model),
        encoder_self=pair(config.num_layers),
        decoder_self=pair(config.num_decoder_layers),
        decoder_cross=pair(config.num_decoder_layers),
    )


@functools.cache
def program(config: T5Config) -> Callable:
    """Searching, jitted: (params, batch, values, rules, draw) -> Generated."""

    def run(params: dict, batch: Batch, values: PromptValues, rules: Rules, draw: Any) -> Generated:
        encoded = t5.encode_batch(params, config, ONE_BY_ONE, batch, values)
        return generate(params, config, ONE_BY_ONE, batch, values, encoded, rules, draw)

    return jax.jit(run)


def find(
    config: T5Config,
    batch: Batch,
    search: Search,
    *,
    params: dict | None = None,
    values: PromptValues = NOTHING,
    draw: stepwise.Draw | None = None,
) -> Generated:
    params = make_params(config) if params is None else params
    return jax.device_get(program(config)(params, batch, values, search.rules, draw))


def torch_model(family: str, config: T5Config, seed: int, directory: Path) -> Any:
    """The same model in transformers, by way of `directory`."""
    import torch
    import transformers

    torch.set_num_threads(1)  # models this small only wait for the others
    own = dataclasses.replace(config, model_type="mt5") if family == "mt5" else config
    save_hf(directory, make_params(config, seed), own)
    model = getattr(transformers, ANSWERED[family][0]).from_pretrained(directory)
    # transformers 5 scales decoder outputs, whatever an untied config says
    model.config.tie_word_embeddings = config.tie_word_embeddings
    model.config.scale_decoder_outputs = config.scale_decoder_outputs
    return model


def theirs(model: Any, batch: Batch, search: Search, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [rows, NEW] and scores [rows] of transformers' generate; scores are 0 without beams."""
    import torch

    options = dataclasses.asdict(search)
    if search.num_beams == 1:
        del options["length_penalty"], options["early_stopping"]
    for name in ("temperature", "top_k", "top_p"):
        del options[name]
    out = model.generate(
        input_ids=torch.tensor(batch.encoder_ids_BS[:-1]).long(),
        attention_mask=torch.tensor(batch.encoder_segments_BS[:-1]),
        eos_token_id=None if eos_id < 0 else eos_id,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    ids = out.sequences.numpy()[:, 1:]  # behind the start token, and no longer than needed
    ids = np.pad(ids, ((0, 0), (0, search.max_new_tokens - ids.shape[1])))
    # its beam search fills up with the end token where the pad id is 0
    after = np.cumsum(ids == eos_id, axis=1) - (ids == eos_id) > 0
    scores = getattr(out, "sequences_scores", None)
    scores = np.zeros(len(ids)) if scores is None else scores.numpy()
    return np.where(after, 0, ids), scores
