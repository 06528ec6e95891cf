"""The prompted model: packing changes nothing, nothing leaks, ways to compute it agree."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxprompt import trees
from jaxprompt.losses import cross_entropy, segment_sums
from jaxprompt.model import PromptedT5
from jaxprompt.prompts.soft import SoftPrompt
from jaxprompt.t5 import model as t5
from jaxprompt.t5.chunks import Chunked
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.model import T5, layers_unrolled
from jaxprompt.typing import Batch, KeysValues, PromptValues

CONFIG = tiny.CONFIG
SLOTS, DECODER_SLOTS, PREFIX, PROMPTS = 3, 2, 2, 2
LOOP = Compute(scan_unroll=1)  # compiles fastest
FAMILIES = {"t5-1.1": {}, "umt5": {"model_type": "umt5", "per_layer_relative_bias": True}}


def every_value(config: T5Config = CONFIG) -> PromptValues:
    """A bank of two prompts with values of every kind but the delta."""
    draw = np.random.default_rng(5)

    def normal(*shape: int) -> np.ndarray:
        return draw.normal(size=shape).astype(np.float32)

    def pair(layers: int) -> KeysValues:
        shape = (layers, PROMPTS, PREFIX, config.num_heads, config.d_kv)
        before_text = config.per_layer_relative_bias  # of one family
        return KeysValues(normal(*shape), normal(*shape), before_text=before_text)

    return PromptValues(
        encoder=normal(PROMPTS, SLOTS, config.d_model),
        decoder=normal(PROMPTS, DECODER_SLOTS, config.d_model),
        encoder_self=pair(config.num_layers),
        decoder_self=pair(config.num_decoder_layers),
        decoder_cross=pair(config.num_decoder_layers),
    )


EXAMPLES = tiny.make_examples(6, SLOTS, PROMPTS, decoder_slots=DECODER_SLOTS)


def logits_of(
    params: dict,
    values: PromptValues,
    batch: Batch,
    config: T5Config = CONFIG,
    compute: Compute = LOOP,
    **dropout: Any,
) -> jax.Array:
    encoded = t5.encode_batch(params, config, compute, batch, values, **dropout)
    hidden = t5.decode_batch(params, config, compute, batch, values, encoded, **dropout)
    return t5.logits(params, config, hidden)


fast_logits_of = jax.jit(logits_of, static_argnums=(3, 4), static_argnames="dropout_rate")


@functools.partial(jax.jit, static_argnums=(3, 4))
def losses_and_gradient(
    params: dict,
    values: PromptValues,
    batch: Batch,
    config: T5Config = CONFIG,
    compute: Compute = LOOP,
) -> tuple[jax.Array, PromptValues]:
    """Summed loss of each example in its order, and the gradient of a weighted sum of them."""

    def total(values: PromptValues) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(params, values, batch, config, compute)
        loss = cross_entropy(logits, batch.targets_BT) * batch.loss_weights_BT
        sums = segment_sums(loss, batch.decoder_segments_BT, batch.example_index_BG.shape[1])
        index = jnp.where(batch.example_index_BG < 0, len(EXAMPLES), batch.example_index_BG)
        by_example = jnp.zeros(len(EXAMPLES) + 1).at[index].add(sums)[:-1]
        return by_example @ jnp.arange(1.0, len(EXAMPLES) + 1), by_example

    gradient, losses = jax.grad(total, has_aux=True)(values)
    return losses, gradient


CHUNKED = Chunked.__init__  # made with chunks so small that the rows below have several


ROW = {"encoder": 26, "decoder": 16, "segments": 3}


def separate() -> Batch:
    """An example a row and much padding; the shapes of `packed`, so that one program does both."""
    return tiny.make_batch([[example] for example in EXAMPLES], **ROW)


def packed() -> Batch:
    """Three, one and two segments a row, and rows of padding."""
    rows = [EXAMPLES[:3], EXAMPLES[3:4], EXAMPLES[4:], [], [], []]
    return tiny.make_batch(rows, **ROW)


def assert_close(got: object, want: object, tolerance: float = 1e-5) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_separate_rows(family: str):
    """Losses and gradients of soft prompts on both sides and prefixes in all attentions."""
    config = dataclasses.replace(CONFIG, **FAMILIES[family])
    params, values = tiny.make_params(config), every_value(config)
    one_by_one = losses_and_gradient(params, values, separate(), config)
    together = losses_and_gradient(params, values, packed(), config)
    assert np.abs(one_by_one[0]).min() > 0.1
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(one_by_one[1])) > 1e-3
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one_by_one[1]))
    assert_close(together[0], one_by_one[0])
    assert_close(*(jax.tree.map(lambda leaf: leaf / scale, g[1]) for g in (together, one_by_one)))


def test_nothing_leaks_between_segments():
    """Other tokens and prompts in the second segment leave the others' logits bit for bit."""
    params, values, batch = tiny.make_params(), every_value(), packed()
    changed = dataclasses.replace(
        batch,
        encoder_ids_BS=np.where(batch.encoder_segments_BS == 2, 39, batch.encoder_ids_BS),
        decoder_ids_BT=np.where(batch.decoder_segments_BT == 2, 38, batch.decoder_ids_BT),
        prompt_index_BG=batch.prompt_index_BG ^ np.array([[0, 1, 0]], np.int32),
    )
    before = np.asarray(fast_logits_of(params, values, batch))
    after = np.asarray(fast_logits_of(params, values, changed))
    same = (before == after).all(-1)
    assert same[batch.decoder_segments_BT != 2].all()
    assert not same[batch.decoder_segments_BT == 2].any()


@pytest.mark.parametrize(
    "compute",
    [
        Compute(),
        Compute(remat="full"),
        Compute(remat="dots"),
        Compute(attention="chunked"),
        Compute(remat="full", attention="chunked"),
        Compute(attention="windowed"),
        Compute(remat="dots", attention="windowed"),
    ],
    ids=str,
)
def test_ways_to_compute_agree(compute: Compute, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Chunked, "__init__", lambda path, sight, size=7: CHUNKED(path, sight, 7))
    params, values = tiny.make_params(), PromptValues(encoder=every_value().encoder)
    want = losses_and_gradient(params, values, packed())
    assert_close(losses_and_gradient(params, values, packed(), CONFIG, compute), want, 1e-4)


def test_layers_are_unrolled_on_cpu_unless_rematerialised():
    assert layers_unrolled(Compute(), 24) == 24
    assert layers_unrolled(Compute(remat="full"), 24) == 1
    assert layers_unrolled(Compute(remat="full", scan_unroll=6), 24) == 6
    assert layers_unrolled(Compute(scan_unroll=6), 4) == 4


def test_bfloat16_is_close_and_logits_are_float32():
    params, values, batch = tiny.make_params(), every_value(), packed()
    want = fast_logits_of(params, values, batch)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    got = fast_logits_of(half, values, batch, CONFIG, Compute("bfloat16", 1))
    assert got.dtype == want.dtype == jnp.float32
    real = batch.decoder_segments_BT > 0
    error = np.abs(got - want)[real].mean() / np.abs(want)[real].mean()
    assert 1e-4 < error < 0.1


def test_dropout_repeats_with_its_key():
    params, batch = tiny.make_params(), packed()
    run = jax.jit(functools.partial(t5.encode_batch, params, CONFIG, LOOP, dropout_rate=0.3))
    first, again, other = (
        run(batch, PromptValues(), dropout_key=jax.random.key(number)) for number in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2


def test_dropout_needs_a_key():
    """Without one the very same program is traced."""
    arguments = (tiny.make_params(), PromptValues(), packed())
    plain = jax.make_jaxpr(logits_of)(*arguments)
    without_key = jax.make_jaxpr(functools.partial(logits_of, dropout_rate=0.3))(*arguments)
    assert str(without_key) == str(plain)


def test_a_delta_is_added_to_the_input_embeddings():
    """A delta that turns one word's embedding into another's does what the other word does."""
    params, batch = tiny.make_params(), tiny.make_batch([[tiny.Example([5, 6, 7], [8])]], 4, 2, 1)
    other = dataclasses.replace(batch, encoder_ids_BS=np.array([[5, 9, 7, 0]], np.int32))
    table = params["token_embedder"]["embedding"]
    delta = np.zeros((1, 4, CONFIG.d_model), np.float32)
    delta[0, 1] = table[9] - table[6]
    got = fast_logits_of(params, PromptValues(input_delta=delta), batch)
    assert_close(got, fast_logits_of(params, PromptValues(), other))
    assert np.abs(got - fast_logits_of(params, PromptValues(), batch)).max() > 1e-2


def test_a_methods_own_prompt_index_goes_before_the_batchs():
    params, values, batch = tiny.make_params(), every_value(), packed()
    swapped = 1 - batch.prompt_index_BG
    own = dataclasses.replace(values, prompt_index_BG=swapped)
    want = fast_logits_of(params, values, dataclasses.replace(batch, prompt_index_BG=swapped))
    np.testing.assert_array_equal(fast_logits_of(params, own, batch), want)


def test_tied_logits_use_the_embedding_table_and_its_scale():
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True, scale_decoder_outputs=True)
    params = tiny.make_params(config)
    hidden = np.random.default_rng(0).normal(size=(2, 3, CONFIG.d_model)).astype(np.float32)
    want = hidden * CONFIG.d_model**-0.5 @ params["token_embedder"]["embedding"].T
    assert_close(t5.logits(params, config, jnp.asarray(hidden)), want)


@pytest.fixture(params=[True, False], ids=["graph", "tree"])
def nnx_mode(request):
    """Both ways NNX can see modules; tree mode is announced as the coming default."""
    if not hasattr(nnx, "set_graph_mode"):
        pytest.skip("this flax has one mode only")
    with nnx.set_graph_mode(request.param):
        yield


def test_the_module_is_the_functions(nnx_mode):
    """PromptedT5 with a soft prompt, taken apart and merged under jit, against the functions."""
    params, values = tiny.make_params(), every_value()
    batch = tiny.make_batch([tiny.make_examples(3, SLOTS)], **ROW)
    model = PromptedT5(T5(CONFIG, params, LOOP), SoftPrompt(values.encoder[0]))
    graphdef, trained, frozen = trees.split(model)
    got = jax.jit(lambda *args: trees.merge(graphdef, *args)(batch))(trained, frozen)
    want = fast_logits_of(params, PromptValues(encoder=values.encoder[:1]), batch)
    assert got.dtype == jnp.float32 and got.shape == (1, 16, CONFIG.vocab_size)
    assert_close(got, want)


def test_without_a_method_it_is_the_bare_backbone():
    params, batch = tiny.make_params(), packed()
    graphdef, trained, frozen = trees.split(PromptedT5(T5(CONFIG, params, LOOP)))
    got = jax.jit(lambda frozen: trees.merge(graphdef, frozen)(batch))(frozen)
    assert trained == {}
    assert_close(got, fast_logits_of(params, PromptValues(), batch))


def test_the_module_computes_in_the_dtype_it_is_told():
    model = PromptedT5(T5(CONFIG, tiny.make_params(), Compute("bfloat16", 1)))
    _, encoded = jax.eval_shape(model.encode, packed())
    assert encoded.dtype == jnp.bfloat16
    assert jax.eval_shape(model, packed()).dtype == jnp.float32
