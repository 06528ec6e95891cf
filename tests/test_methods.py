"""All prompt methods through the same trials: formulas in numpy, gradients, packing, banks."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft_cases
import pytest
import tiny
from method_cases import CASES, config_of, context_of, examples_of, make, shaken
from quantized_params import as_floats, quantized
from run_fixtures import compiled

from jaxprompt import steps, trees
from jaxprompt.losses import cross_entropy, segment_sums
from jaxprompt.model import PromptedT5
from jaxprompt.prompts import METHODS, MethodConfig, MethodInputs, NoPrompt, PromptMethod
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.t5.config import Compute
from jaxprompt.t5.model import T5
from jaxprompt.t5.search import Search
from jaxprompt.typing import Batch, PromptValues, UserError

__all__ = ["compiled"]  # fixture

CONFIG = tiny.CONFIG
LOOP = Compute(scan_unroll=1)
PARAMS = tiny.make_params()
Oracle = Callable[[dict[str, np.ndarray], MethodConfig], np.ndarray]


# ---- the formulas, transcribed -------------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def residual(v: dict[str, np.ndarray], config: Any) -> np.ndarray:
    rows = []
    for n, row in enumerate(v["prompt"]):
        own = n if config.per_token else 0
        added = relu(row @ v["down"][own] + v["down_bias"][own]) @ v["up"][own] + v["up_bias"][own]
        if config.layer_norm:
            added = (added - added.mean()) / np.sqrt(added.var() + 1e-5)
            added = added * v["scale"][own] + v["bias"][own]
        rows.append(row + added)
    return np.stack(rows)


def p_tuning(v: dict[str, np.ndarray], config: Any) -> np.ndarray:
    x, last = v["prompt"], 2
    if config.encoder == "lstm":
        last = 1
        for layer in range(config.layers):
            sides = []
            for side in ("forward", "backward"):
                name, h = f"lstm_{layer}_{side}", config.hidden
                hidden, cell, out = np.zeros(h), np.zeros(h), {}
                order = range(len(x)) if side == "forward" else reversed(range(len(x)))
                for n in order:
                    gates = x[n] @ v[f"{name}_input"] + hidden @ v[f"{name}_hidden"]
                    gates = gates + v[f"{name}_bias"]
                    i, f, g, o = (gates[k * h : (k + 1) * h] for k in range(4))
                    cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
                    out[n] = hidden = sigmoid(o) * np.tanh(cell)
                sides.append(np.stack([out[n] for n in range(len(x))]))
            x = np.concatenate(sides, 1)
    for number in range(last + 1):
        x = x @ v[f"linear_{number}"] + v[f"linear_{number}_bias"]
        x = relu(x) if number < last else x
    return x


def lopt(v: dict[str, np.ndarray], config: Any) -> np.ndarray:
    first = v["left"] if config.variant == 1 else sigmoid(v["first"] @ v["left"])
    return first @ v["right"]


def superpos(v: dict[str, np.ndarray], config: Any) -> np.ndarray:
    return np.stack(
        [sum(w * e for w, e in zip(ws, v["rows_of_table"], strict=True)) for ws in v["weights"]]
    )


def xprompt(v: dict[str, np.ndarray], config: Any) -> np.ndarray:
    pieces = iter(v["kept"])
    nothing = np.zeros(v["kept"].shape[1])
    return np.stack([
        np.concatenate([next(pieces) if there else nothing for there in row]) for row in v["mask"]
    ])  # fmt: skip


ROWS: dict[str, Oracle] = {
    "soft": lambda v, config: v["prompt"],
    "p-tuning": p_tuning,
    "residual": residual,
    "dpt": lambda v, config: v["left"] @ v["right"],
    "lopt": lopt,
    "superpos": superpos,
    "dept": lambda v, config: v["prompt"],
    "adept": lambda v, config: v["prompt"],
    "per-layer": lambda v, config: v["prompts"][0],
    "xprompt": xprompt,
}


def prefix(v: dict[str, np.ndarray], config: Any, place: str) -> tuple[np.ndarray, ...]:
    hidden = np.tanh(v[f"{place}_prompt"] @ v[f"{place}_up"] + v[f"{place}_up_bias"])
    out, bias = v[f"{place}_out"], v[f"{place}_out_bias"]
    flat = hidden @ out.reshape(len(out), -1) + bias.reshape(-1)
    keys, values = np.moveaxis(flat.reshape(len(hidden), *bias.shape), 0, 2)
    return keys, values


def p_tuning_v2(v: dict[str, np.ndarray], config: Any, place: str) -> tuple[np.ndarray, ...]:
    name = {"encoder": "encoder_self", "decoder": "decoder_self", "cross": "decoder_cross"}[place]
    return v[f"{name}_keys"], v[f"{name}_values"]


PAIRS: dict[str, Callable] = {"p-tuning-v2": p_tuning_v2, "prefix": prefix}


def dept(v: dict[str, np.ndarray], config: Any, place: int, embedding: np.ndarray) -> np.ndarray:
    if place >= config.positions:
        return np.zeros_like(embedding)
    return 8.0 / np.sqrt(config.rank) * (v["left"][place] @ v["right"])


def adept(v: dict[str, np.ndarray], config: Any, place: int, embedding: np.ndarray) -> np.ndarray:
    return relu(embedding @ v["left"] + v["left_bias"]) @ v["right"] + v["right_bias"]


DELTAS: dict[str, Callable] = {"dept": dept, "adept": adept}


def mean_of(rows: np.ndarray) -> np.ndarray:
    return rows.mean(0) if len(rows) else np.zeros(rows.shape[1])


def smop(v: dict[str, np.ndarray], config: Any, rows: np.ndarray) -> np.ndarray:
    mean = mean_of(rows)
    shares = np.exp(mean @ v["router"])
    shares = shares / shares.sum()
    return shares.max() * v["prompts"][shares.argmax()]


def pt_moe(v: dict[str, np.ndarray], config: Any, rows: np.ndarray) -> np.ndarray:
    shares = np.exp(mean_of(rows) @ v["router"] + v["router_bias"])
    shares = shares / shares.sum()
    return sum(w * (left @ v["right"]) for w, left in zip(shares, v["left"], strict=True))


def attempt(v: dict[str, np.ndarray], config: Any, rows: np.ndarray) -> np.ndarray:
    largest = rows.max(0) if len(rows) else np.zeros(rows.shape[1])
    hidden = largest @ v["down"]
    query = (hidden * sigmoid(hidden)) @ v["up"]
    query = (query - query.mean()) / np.sqrt(query.var() + 1e-5)
    query = query * v["scale"][0, 0] + v["bias"][0, 0]
    prompts = [*v["sources"], v["prompt"]]
    scores = np.exp([prompt.max(0) @ query / config.temperature for prompt in prompts])
    return v["prompt"] + sum(s * p for s, p in zip(scores / scores.sum(), prompts, strict=True))


MIXTURES: dict[str, Callable] = {"smop": smop, "pt-moe": pt_moe, "attempt": attempt}

UNFOLDED = ("soft", "p-tuning-v2", "dept", "adept", "smop", "pt-moe", "attempt", "per-layer")


def multitask(v: dict[str, np.ndarray], config: Any, task: int) -> np.ndarray:
    shared = v["prompt"]
    if config.combine == "project":
        kernel = v["kernels"][task]
        return np.stack([row @ kernel + v["biases"][task] for row in shared])
    own = v["tasks"][task]
    if config.combine == "add":
        return shared + own
    return np.concatenate([shared, own], 0 if config.combine == "concat" else 1)


def mpt(v: dict[str, np.ndarray], config: Any, task: int) -> np.ndarray:
    pairs = zip(v["left"][task].T, v["right"][task], strict=True)
    return v["prompt"] * sum(np.outer(one, other) for one, other in pairs)


TASKS: dict[str, Callable] = {"multitask": multitask, "mpt": mpt}

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


def inputs_of(batch: Batch, keys: jax.Array | None = None) -> MethodInputs:
    embeds = jnp.asarray(PARAMS["token_embedder"]["embedding"])[batch.encoder_ids_BS]
    return MethodInputs(
        embeds, batch.encoder_slots_BS, batch.encoder_segments_BS, batch.prompt_index_BG, keys,
        batch.task_index_BG,
    )  # fmt: skip


def values_of(method: PromptMethod, inputs: MethodInputs) -> PromptValues:
    graphdef, trained, constants = trees.split(method)
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    run = jax.jit(lambda *parts, fields: trees.merge(graphdef, *parts)(MethodInputs(**fields)))
    return run(trained, constants, fields=fields)


def packed(case: str, prompt: int = 0) -> Batch:
    examples = examples_of(case, 5, prompt=prompt)
    return tiny.make_batch([examples[:3], examples[3:]], 32, 12, 3)


def losses(
    method: PromptMethod, batch: Batch, params: dict = PARAMS
) -> tuple[np.ndarray, dict[str, Any]]:
    """Loss of each segment [B, G], and the gradient of their weighted sum."""
    graphdef, trained, frozen = trees.split(PromptedT5(T5(CONFIG, params, LOOP), method))

    def of(trained: dict, frozen: dict, batch: Batch) -> tuple:
        logits = trees.merge(graphdef, trained, frozen)(batch)
        loss_BT = cross_entropy(logits, batch.targets_BT) * batch.loss_weights_BT
        segments = batch.example_index_BG.shape[1]
        loss_BG = segment_sums(loss_BT, batch.decoder_segments_BT, segments)
        return jnp.sum(loss_BG), loss_BG

    grads, loss_BG = jax.jit(jax.grad(of, has_aux=True))(trained, frozen, batch)
    return np.asarray(loss_BG), grads["method"]


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


def test_attempt_attends_as_its_code_in_torch():
    """The published forward pass of one unpacked example, in torch's own layers."""
    torch = pytest.importorskip("torch")
    config, batch = config_of("attempt"), tiny.make_batch([examples_of("attempt", 1)], 14, 6, 1)
    v = {name: torch.tensor(np.asarray(value)) for name, value in shaken(config).items()}
    there = (np.asarray(batch.encoder_slots_BS) < 0) & (np.asarray(batch.encoder_segments_BS) > 0)
    ids = np.asarray(batch.encoder_ids_BS)[there]
    embeds = torch.tensor(np.asarray(PARAMS["token_embedder"]["embedding"])[ids])[None]
    prompts = torch.cat([v["sources"], v["prompt"][None]])[None]
    functional = torch.nn.functional
    x = functional.silu(functional.linear(embeds.max(1).values, v["down"].T))
    x = functional.linear(x, v["up"].T)
    x = functional.layer_norm(x, x.shape[-1:], v["scale"][0, 0], v["bias"][0, 0])
    scores = prompts.max(2).values.bmm(x[..., None])[..., 0] / config.temperature
    want = torch.einsum("bp,bpld->bld", torch.softmax(scores, -1), prompts) + v["prompt"]
    values = values_of(make("attempt"), inputs_of(batch))
    np.testing.assert_allclose(values.encoder, want.numpy(), rtol=1e-5, atol=1e-6)


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


# ---- others' answers -----------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("case", ["residual", "residual plain"])
def test_residual_prompts_are_those_of_the_authors_code(case: str):
    with np.load(GOLDEN / "authors.npz") as golden:
        kept = {
            name.removeprefix(f"{case}/"): golden[name]
            for name in golden
            if name.startswith(f"{case}/")
        }
    linear = {"down": "module.0", "up": "module.2"}
    values = {"prompt": kept["prompt"]}
    for ours, theirs in linear.items():
        values[ours] = kept[f"{theirs}.weight"].T[None]
        values[f"{ours}_bias"] = kept[f"{theirs}.bias"][None]
    if case == "residual":
        values |= {"scale": kept["module.3.weight"][None], "bias": kept["module.3.bias"][None]}
    config = config_of(case)
    assert set(values) == set(shaken(config))
    values = {name: jnp.asarray(value) for name, value in values.items()}
    made = METHODS["residual"].make(values, config)
    found = values_of(made, inputs_of(packed(case))).encoder
    np.testing.assert_allclose(found, kept["made"][None], rtol=1e-5, atol=1e-5)


def test_smop_picks_as_the_authors_code_does_for_each_row_alone():
    with np.load(GOLDEN / "authors.npz") as golden:
        kept = {name.removeprefix("smop/"): golden[name] for name in golden}
    prompts, length = CASES["smop"]["prompts"], CASES["smop"]["length"]
    values = {
        "prompts": kept["embedding.weight"].reshape(prompts, length, -1),
        "router": kept["router.0.weight"].T,
    }
    values = {name: jnp.asarray(value) for name, value in values.items()}
    mask_BS, zeros_BG = jnp.asarray(kept["mask"]), jnp.zeros((4, 1), jnp.int32)
    inputs = MethodInputs(
        jnp.asarray(kept["embeds"]), -jnp.ones_like(mask_BS), mask_BS, zeros_BG, None, zeros_BG
    )
    found = values_of(METHODS["smop"].make(values, config_of("smop")), inputs)
    picked = np.asarray(found.encoder)[np.asarray(found.prompt_index_BG)[:, 0]]
    np.testing.assert_allclose(picked, kept["made"], rtol=1e-5, atol=1e-6)


def test_prefix_tuning_is_that_of_adapters():
    """Three networks with tanh, for encoder, decoder and cross-attention; H K is not d_model."""
    sizes = peft_cases.BACKBONES["shallow decoder"]
    assert sizes.num_heads * sizes.d_kv != sizes.d_model
    with np.load(GOLDEN / "adapters.npz") as golden:
        kept = dict(golden)
    values = {}
    for place, name in (("encoder", "encoder"), ("decoder", "self"), ("cross", "cross")):
        prompt, up, up_bias, out, out_bias = (
            kept[f"{name}_prefix.{part}"]
            for part in ("wte.weight", "control_trans.0.weight", "control_trans.0.bias",
                         "control_trans.2.weight", "control_trans.2.bias")
        )  # fmt: skip
        # there keys and values of a layer stand side by side: [N, 2, H, K]
        shape = (-1, 2, sizes.num_heads, sizes.d_kv)
        out = np.moveaxis(out.T.reshape(len(out.T), *shape), 1, 2)
        out_bias = np.moveaxis(out_bias.reshape(shape), 0, 1)
        parts = {"prompt": prompt, "up": up.T, "up_bias": up_bias, "out": out, "out_bias": out_bias}
        values |= {f"{place}_{part}": jnp.asarray(value) for part, value in parts.items()}
    config = config_of("prefix", length=peft_cases.LENGTH, hidden=7)
    count = METHODS["prefix"].parameters(config, sizes)
    assert count == sum(value.size for value in values.values())
    params = trees.map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "relpos_bias" in path else leaf,
        tiny.make_params(sizes, seed=3),
    )
    decoded = [
        [tiny.Example(ids[ids > 0].tolist(), [*targets[1:], 1])]
        for ids, targets in zip(
            peft_cases.ENCODER_IDS, peft_cases.DECODER_IDS.tolist(), strict=True
        )
    ]
    batch = tiny.make_batch(decoded, 6, 5, 1)
    np.testing.assert_array_equal(batch.decoder_ids_BT, peft_cases.DECODER_IDS)
    backbone, run = T5(sizes, params, LOOP), jax.jit(steps.logits, static_argnums=0)
    for louder in (1.0, 0.0):
        scaled = {name: louder * value for name, value in values.items()}
        own = trees.split(PromptedT5(backbone, METHODS["prefix"].make(scaled, config)))
        apart = np.abs(np.asarray(run(*own, batch)) - kept["logits"]).max()
        assert (apart < 1e-5) if louder else (apart > 0.1)
