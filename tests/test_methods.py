"""All prompt methods through the same trials: formulas in numpy, gradients, packing, banks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from method_cases import (
    CASES,
    PARAMS,
    config_of,
    context_of,
    examples_of,
    inputs_of,
    make,
    packed,
    shaken,
    values_of,
)
from method_formulas import (
    DELTAS,
    MIXTURES,
    PAIRS,
    ROWS,
    TASKS,
)
from quantized_params import as_floats, quantized
from run_fixtures import compiled

from jaxprompt import steps, trees
from jaxprompt.losses import cross_entropy, segment_sums
from jaxprompt.model import PromptedT5
from jaxprompt.prompts import METHODS, MethodConfig, NoPrompt, PromptMethod
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.t5.config import Compute
from jaxprompt.t5.model import T5
from jaxprompt.t5.search import Search
from jaxprompt.typing import Batch, PromptValues, UserError

__all__ = ["compiled"]  # fixture

CONFIG = tiny.CONFIG
LOOP = Compute(scan_unroll=1)


UNFOLDED = ("soft", "p-tuning-v2", "dept", "adept", "smop", "pt-moe", "attempt", "per-layer")


PARAMETERS = {  # by the papers' counts, of T5-base and, for residual and DPT, T5-large
    "soft": ({"length": 100}, 768, 76_800),
    "residual": ({"length": 100, "hidden": 400}, 1024, 925_072),
    "dpt": ({"length": 100, "rank": 10}, 1024, 11_240),
    "dept": ({"length": 60, "rank": 30, "positions": 256}, 768, 76_800),
    "adept": ({"length": 60, "rank": 19}, 768, 76_051),
    "smop": ({"length": 5, "prompts": 4}, 768, 18_432),
    "mpt": ({"length": 100}, 768, 77_668),
    "attempt": ({"length": 100}, 768, 231_936),
    # half of 20 slots and of their 16 pieces: a quarter of a soft prompt's
    "xprompt": ({"length": 20}, 768, 20 * 768 // 4),
    "per-layer": ({"length": 10}, 768, 3 * 10 * 768),  # of the tiny backbone's three layers
    # these by the papers' formulas, and biases where their code has some; 4 heads of 5
    "p-tuning": ({"length": 20, "hidden": 768}, 768, 20 * 768 + 3 * (768 + 1) * 768),
    "p-tuning-v2": ({"length": 20, "places": ["encoder"]}, 768, 2 * 3 * 20 * (4 * 5)),
    "prefix": (
        {"length": 10, "hidden": 512, "places": ["encoder"]},
        768,
        10 * 768 + (768 + 1) * 512 + (512 + 1) * 2 * 3 * (4 * 5),
    ),
    "lopt": ({"length": 20, "rank": 5}, 768, 2 * 5 * 768),
    "lopt product": ({"length": 20, "rank": 5, "variant": 1}, 768, 5 * (20 + 768)),
    "superpos": ({"length": 10, "tokens": 128}, 768, 10 * 128),
    "pt-moe": ({"length": 20, "rank": 4, "experts": 3}, 768, 3 * 20 * 4 + 4 * 768 + 3 * (768 + 1)),
    "multitask": ({"length": 100, "tasks": ["a", "b"]}, 768, 3 * 100 * 768),
}


# ---- what all go through -------------------------------------------------------------------------


def losses(
    method: PromptMethod, batch: Batch, params: dict = PARAMS
) -> tuple[np.ndarray, dict[str, Any]]:
    """Loss of each segment [B, G], and the gradient of their weighted sum."""
    graphdef, trained, frozen = trees.split(PromptedT5(T5(CONFIG, params, LOOP), method))
    grads, loss_BG = _gradient(trained, graphdef, frozen, batch)
    return np.asarray(loss_BG), grads["method"]


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.grad, has_aux=True)
def _gradient(trained: dict, graphdef: Any, frozen: dict, batch: Batch) -> tuple:
    """One program for all tests that ask for the same shapes."""
    logits = trees.merge(graphdef, trained, frozen)(batch)
    loss_BT = cross_entropy(logits, batch.targets_BT) * batch.loss_weights_BT
    segments = batch.example_index_BG.shape[1]
    loss_BG = segment_sums(loss_BT, batch.decoder_segments_BT, segments)
    return jnp.sum(loss_BG), loss_BG


def assert_values(case: str, values: PromptValues, v: dict, config: Any, batch: Batch) -> None:
    """Prompt values against the transcription."""
    name, close = config.name, {"rtol": 1e-5, "atol": 1e-5}
    slots_BS, segments_BS = (
        np.asarray(batch.encoder_slots_BS),
        np.asarray(batch.encoder_segments_BS),
    )
    table = np.asarray(PARAMS["token_embedder"]["embedding"])
    text = (slots_BS < 0) & (segments_BS > 0)
    if name in ROWS:
        np.testing.assert_allclose(values.encoder, ROWS[name](v, config)[None], **close)
    for place in ("encoder", "decoder", "cross"):
        field = {"encoder": "encoder_self", "decoder": "decoder_self", "cross": "decoder_cross"}
        found = getattr(values, field[place])
        if name not in PAIRS or place not in config.places:
            assert found is None
            continue
        keys, own = PAIRS[name](v, config, place)
        layers = CONFIG.num_layers if place == "encoder" else CONFIG.num_decoder_layers
        shape = (layers, 1, config.length, CONFIG.num_heads, CONFIG.d_kv)
        assert found.keys.shape == found.values.shape == shape
        np.testing.assert_allclose(found.keys[:, 0], keys, **close)
        np.testing.assert_allclose(found.values[:, 0], own, **close)
    if name != "per-layer":
        assert values.encoder_layers is None
    else:
        assert values.encoder_layers.adds_Q.tolist() == [config.mode == "add"]
        np.testing.assert_allclose(values.encoder_layers.values[:, 0], v["prompts"][1:], **close)
    if name not in DELTAS:
        assert values.input_delta is None
    else:
        for b, g in np.ndindex(2, 3):
            places = np.flatnonzero(text[b] & (segments_BS[b] == g + 1))
            for number, s in enumerate(places):
                embedding = table[batch.encoder_ids_BS[b, s]]
                want = DELTAS[name](v, config, number, embedding)
                np.testing.assert_allclose(values.input_delta[b, s], want, **close)
        assert not np.asarray(values.input_delta)[~text].any()
    if name in TASKS:
        assert values.encoder.shape == (3, METHODS[name].slots(config), CONFIG.d_model)
        np.testing.assert_array_equal(values.prompt_index_BG, batch.task_index_BG)
        assert np.unique(batch.task_index_BG).tolist() == [0, 1, 2]
        for task, rows in enumerate(values.encoder):
            np.testing.assert_allclose(rows, TASKS[name](v, config, task), **close)
    if name in MIXTURES:
        for b, g in np.ndindex(2, 3):
            ids = batch.encoder_ids_BS[b][text[b] & (segments_BS[b] == g + 1)]
            row = values.encoder[values.prompt_index_BG[b, g]]
            np.testing.assert_allclose(row, MIXTURES[name](v, config, table[ids]), **close)


@pytest.mark.parametrize("case", CASES)
class TestEveryMethod:
    """No method is exempt from any of it."""

    def test_it_starts_and_counts(self, case: str):
        config = config_of(case)
        info = METHODS[config.name]
        values = info.initial(jax.random.key(0), config, context_of())
        again = info.initial(jax.random.key(0), config, context_of())
        other = info.initial(jax.random.key(1), config, context_of())
        assert all(value.dtype == np.float32 for value in values.values())
        assert all(np.array_equal(values[name], again[name]) for name in values)
        assert any(not np.array_equal(values[name], other[name]) for name in values)
        method = info.make({name: jnp.asarray(value) for name, value in values.items()}, config)
        _, trained, frozen = trees.split(method)
        assert set(frozen) == set(method.constants) and {*trained, *frozen} == {*values}
        assert trees.count(trained) == info.parameters(config, CONFIG)
        assert info.formula and info.paper and info.cost

    def test_it_is_its_formula(self, case: str):
        config, batch = config_of(case), packed(case)
        v = {name: np.asarray(value, np.float64) for name, value in shaken(config).items()}
        values = values_of(make(case), inputs_of(batch))
        assert_values(case, values, v, config, batch)

    def test_every_trained_array_gets_a_gradient(self, case: str):
        _, grads = losses(make(case), packed(case))
        for path, grad in trees.flatten(grads).items():
            assert np.abs(grad).max() > 1e-6, path

    def test_what_it_folds_to_says_the_same(self, case: str):
        config = config_of(case)
        info = METHODS[config.name]
        if info.fold is None:
            assert config.name in UNFOLDED
            return
        if info.task_parts:
            assert_tasks_fold(case)
            return
        plain = info.fold(shaken(config), config)
        assert plain.config.name in ("soft", "p-tuning-v2")
        assert info.slots(config) == METHODS[plain.config.name].slots(plain.config)
        method = METHODS[plain.config.name].make(plain.values, plain.config)
        batch = packed(case)
        want, _ = losses(make(case), batch)
        np.testing.assert_allclose(losses(method, batch)[0], want, atol=1e-5, rtol=1e-5)

    def test_it_reads_back_from_a_mapping(self, case: str):
        from jaxprompt import schema

        config = config_of(case)
        again = schema.from_mapping(MethodConfig, schema.to_mapping(config), "here")
        assert again == config and type(again) is METHODS[config.name].config


def assert_tasks_fold(case: str) -> None:
    """Of parts for several tasks each one's fold, which then make a bank."""
    config, values = config_of(case), shaken(config_of(case))
    info, alone = METHODS[config.name], config_of(case, tasks=[])
    plain = []
    for task in range(3):
        own = {
            name: value[task : task + 1] if name in info.task_parts else value
            for name, value in values.items()
        }
        folded = info.fold(own, alone)
        assert folded.config.name == "soft" and info.slots(config) == folded.config.length
        plain.append(METHODS["soft"].make(folded.values, folded.config))
    batch = packed(case)
    bank = dataclasses.replace(batch, prompt_index_BG=batch.task_index_BG)
    want, _ = losses(make(case), batch)
    np.testing.assert_allclose(losses(PromptBank(plain), bank)[0], want, atol=1e-5, rtol=1e-5)


def _end(ids: np.ndarray) -> int:
    ends = np.flatnonzero(ids == CONFIG.eos_id)
    return int(ends[0]) + 1 if len(ends) else len(ids)


# ---- what takes longer, for each method once ---------------------------------------------------


@pytest.fixture(scope="module")
def int8() -> dict:
    return quantized(PARAMS, CONFIG, "int8")


@pytest.mark.parametrize("case", METHODS)
def test_packed_rows_of_a_bank_equal_each_prompt_alone(case: str):
    other = {"mode": "add"} if case == "per-layer" else {}
    methods = [make(case), make(case, 1, **other)]
    examples = [examples_of(case, 3, seed=n, prompt=n) for n in (0, 1)]
    first, second = examples
    rows = [[first[0], second[0], first[1]], [second[1], first[2], second[2]]]
    both = tiny.make_batch(rows, 36, 16, 3)
    both_BG, bank_grads = losses(PromptBank(methods), both)
    for number, method in enumerate(methods):
        alone = [dataclasses.replace(example, prompt=0) for example in examples[number]]
        batch = tiny.make_batch([[example] for example in alone], 14, 6, 1)
        loss_BG, grads = losses(method, batch)
        found = both_BG[np.asarray(both.prompt_index_BG) == number]
        np.testing.assert_allclose(found, loss_BG[:, 0], atol=1e-5, rtol=1e-5)
        own = trees.flatten(bank_grads["prompts"][f"{number:04d}"])
        for path, grad in trees.flatten(grads).items():
            np.testing.assert_allclose(own[path], grad, atol=2e-5, rtol=2e-4, err_msg=path)


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("beams", [1, 3], ids=["greedy over int8", "beams"])
def test_cached_decoding_goes_on_as_the_forward_pass_does(case: str, beams: int, int8: dict):
    """What is generated is scored again with teacher forcing: the same log-likelihood."""
    examples, params = examples_of(case, 3), int8 if beams == 1 else PARAMS
    graphdef, trained, frozen = trees.split(PromptedT5(T5(CONFIG, params, LOOP), make(case)))
    batch = tiny.make_batch([[replaced(e, [5])] for e in examples], 14, 1, 1)
    search = Search(4, num_beams=beams)
    run = jax.jit(steps.generate, static_argnums=0)
    found = run(graphdef, trained, frozen, batch, rules=search.rules)
    said = [ids[: _end(ids)].tolist() for ids in np.asarray(found.ids_BT)]
    whole = tiny.make_batch([[replaced(*both)] for both in zip(examples, said, strict=True)],
                            14, 4, 1)  # fmt: skip
    logits_BTV = jax.jit(steps.logits, static_argnums=0)(graphdef, trained, frozen, whole)
    loss_BT = cross_entropy(logits_BTV, jnp.asarray(whole.targets_BT)) * whole.loss_weights_BT
    np.testing.assert_allclose(-loss_BT.sum(1), found.log_likelihood_B, atol=2e-5, rtol=1e-5)
    if beams == 1:
        first_B = np.asarray(logits_BTV)[:, 0].argmax(-1)
        assert first_B.tolist() == [ids[0] for ids in said]


# One set of rows, whatever input and weights: to the backbone these are what `soft` is, and they
# decode over int8 weights above.
AS_SOFT = ("p-tuning", "residual", "dpt", "lopt", "superpos")


@pytest.mark.parametrize("case", [name for name in METHODS if name not in AS_SOFT])
def test_over_int8_weights_it_trains_as_over_what_they_stand_for(case: str, int8: dict):
    """Loss and gradients are those of codes times scales."""
    method, batch = make(case), packed(case)
    (loss_BG, grads), (want_BG, want) = (
        losses(method, batch, params) for params in (int8, as_floats(int8))
    )
    np.testing.assert_allclose(loss_BG, want_BG, atol=1e-5, rtol=1e-5)
    own = trees.flatten(grads)
    for path, grad in trees.flatten(want).items():
        assert np.abs(grad).max() > 1e-6, path
        np.testing.assert_allclose(own[path], grad, atol=2e-5, rtol=2e-4, err_msg=path)


def replaced(example: tiny.Example, target: list[int]) -> tiny.Example:
    return dataclasses.replace(example, target=target)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_papers(name: str):
    options, d_model, count = PARAMETERS[name]
    sizes = dataclasses.replace(CONFIG, d_model=d_model)
    info = METHODS[name.split()[0]]
    assert info.parameters(info.config(**options), sizes) == count


def test_every_method_is_counted():
    assert {name.split()[0] for name in PARAMETERS} == {*METHODS}


def test_no_prompt_has_neither_parameters_nor_values():
    assert trees.split(NoPrompt())[1:] == ({}, {})
    assert jax.tree.leaves(NoPrompt()(inputs_of(packed("soft")))) == []


def test_attempt_scales_its_scores_by_the_width():
    """Without a temperature, e times d_model: 2087 of the code's config on T5-base."""
    batch = packed("attempt")
    own = values_of(make("attempt", temperature=None), inputs_of(batch))
    given = values_of(make("attempt", temperature=np.e * CONFIG.d_model), inputs_of(batch))
    np.testing.assert_allclose(own.encoder, given.encoder, rtol=1e-6)
    assert round(np.e * 768 - 0.5) == 2087


def test_attempt_wants_sources_of_its_shape():
    with pytest.raises(UserError, match=r"method\.sources is empty"):
        shaken(config_of("attempt", sources=[]))
    with pytest.raises(UserError, match=r"one is 4 x 12, the run wants method\.length 3"):
        shaken(config_of("attempt", length=3))


@pytest.mark.parametrize("case", ["per-layer", "per-layer add"])
def test_a_layer_sees_its_own_prompt_in_the_slots(case: str):
    """With one layer that does anything, all is as with a soft prompt of what its slots hold."""
    batch, prompts_NPD = packed(case), np.asarray(shaken(config_of(case))["prompts"])
    token_BS = np.asarray((batch.encoder_slots_BS < 0) & (batch.encoder_segments_BS > 0))

    def encoder(method: PromptMethod) -> Callable:
        graphdef, _, _ = trees.split(PromptedT5(T5(CONFIG, PARAMS, LOOP), method))
        run = jax.jit(lambda trained, params: trees.merge(
            graphdef, trained, {"backbone": {"params": params}}).encode(batch)[1])  # fmt: skip
        return lambda params, values: np.asarray(run({"method": values}, params))[token_BS]

    layered, soft = encoder(make(case)), encoder(make("soft", length=3))
    for only in range(CONFIG.num_layers):
        idle_N = np.arange(CONFIG.num_layers) != only

        def silent(path: str, leaf: jax.Array, idle_N: np.ndarray = idle_N) -> jax.Array:
            ends = path.startswith("encoder/layers") and path.endswith(("out/kernel", "wo/kernel"))
            return jnp.asarray(np.where(idle_N.reshape(-1, *[1] * (leaf.ndim - 1)), 0, leaf)
                               if ends else leaf)  # fmt: skip

        params = trees.map_with_path(silent, PARAMS)
        rows = prompts_NPD[only] if case == "per-layer" else prompts_NPD[: only + 1].sum(0)
        found = layered(params, {"prompts": jnp.asarray(prompts_NPD)})
        np.testing.assert_allclose(found, soft(params, {"prompt": jnp.asarray(rows)}), atol=2e-5)


def test_a_prompt_without_slots_in_layers_has_its_place_in_a_bank():
    bank = PromptBank([NoPrompt(), make("per-layer"), make("per-layer add")])
    layers = bank(inputs_of(packed("per-layer"))).encoder_layers
    assert layers is not None and layers.adds_Q.tolist() == [True, False, True]
    assert layers.values.shape == (CONFIG.num_layers - 1, 3, 3, CONFIG.d_model)
    assert not np.asarray(layers.values[:, 0]).any()


def test_smop_draws_in_training_only():
    """Logits times (1 + e): another choice or share with a key, the same without."""
    batch, method = packed("smop"), make("smop")
    keys = jax.random.split(jax.random.key(0), 2)
    still, again = values_of(method, inputs_of(batch)), values_of(method, inputs_of(batch))
    drawn = values_of(method, inputs_of(batch, keys))
    np.testing.assert_array_equal(still.encoder, again.encoder)
    assert not np.allclose(still.encoder, drawn.encoder)
    assert METHODS["smop"].draws(config_of("smop"))
    assert not METHODS["smop"].draws(config_of("smop", noise=0.0))


WRONG = {
    "rank": ("dpt", {"rank": 5}, "method.rank 5 is larger than the prompt, method.length 4"),
    "moe rank": ("pt-moe", {"rank": 9}, "method.rank 9 is larger than the prompt"),
    "hidden": ("residual", {"hidden": 0}, "method.hidden is 0"),
    "place": ("prefix", {"places": ["encoder", "middle"]}, "method.places is encoder, middle"),
    "no place": ("p-tuning-v2", {"places": []}, "method.places is empty"),
    "std": ("p-tuning-v2", {"init_std": 0}, "method.init_std is 0"),
    "noise": ("smop", {"noise": -1}, "method.noise is -1"),
    "temperature": ("attempt", {"temperature": 0}, "method.temperature is 0"),
    "another's option": ("soft", {"rank": 3}, "unknown key 'rank'"),
    "pieces": ("xprompt", {"pieces": 0}, "method.pieces is 0"),
    "no piece": ("xprompt", {"keep_pieces": 0}, "method.keep_pieces is 0"),
    "no slot": ("xprompt", {"keep_tokens": 0.05}, "0.05 of method.length 6 leaves no slot"),
    "mode": ("per-layer", {"mode": "both"}, "'mode' must be one of replace, add"),
    "encoder": ("p-tuning", {"encoder": "gru"}, "'encoder' must be one of mlp, lstm"),
    "mpt rank": ("mpt", {"rank": 5}, "method.rank 5 is larger than the prompt, method.length 4"),
    "task length": ("multitask", {"task_length": 2}, "method.combine 'add' has none: leave it out"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused(case: str):
    name, options, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        config_of(name, **options)


def test_an_unknown_method_is_named_with_its_neighbour():
    from jaxprompt import schema

    with pytest.raises(UserError, match="name 'residul' is not known; did you mean 'residual'"):
        schema.from_mapping(MethodConfig, {"name": "residul"}, "here")
