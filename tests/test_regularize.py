"""Regularisers against formulas written down again, and in runs: resumed, on a mesh, in a sweep."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from run_fixtures import World, assert_same_end, compiled, losses, prompt_bytes, world

from jaxprompt import steps, trees
from jaxprompt.backbone import load_backbone
from jaxprompt.losses import cross_entropy
from jaxprompt.model import PromptedT5
from jaxprompt.prompts import MethodConfig, MethodInputs, PromptMethod
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.prompts.soft import SoftPrompt
from jaxprompt.regularize import RegularizeConfig, masked, noise_for
from jaxprompt.steps import StepOptions
from jaxprompt.sweep import sweep
from jaxprompt.sweep_config import load_sweep
from jaxprompt.t5.config import Compute
from jaxprompt.t5.layers import dropout, fold_key
from jaxprompt.t5.model import T5
from jaxprompt.train import train
from jaxprompt.trainee import make_trainee
from jaxprompt.typing import Array, Batch, LayerSlots, PromptValues, UserError

__all__ = ["compiled", "world"]  # fixtures

CONFIG = tiny.CONFIG
PARAMS = tiny.make_params()
SLOTS = 3
SGD = optax.sgd(1.0)
DRAW = np.random.default_rng(0)
PROMPTS = [jnp.asarray(DRAW.normal(size=(SLOTS, CONFIG.d_model)), jnp.float32) for _ in range(2)]


class Given(PromptMethod):
    """Slots of every layer and a change of the text's embeddings as they are handed in."""

    def __init__(self, slots_NQPD: Array, delta_BSD: Array | None = None):
        delta = {} if delta_BSD is None else {"delta": delta_BSD}
        super().__init__({"slots": slots_NQPD, **delta}, MethodConfig())

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        slots = self["slots"]
        own = jnp.arange(len(inputs.embeds_BSD))[:, None] if slots.shape[1] > 1 else None
        later = LayerSlots(slots[1:], jnp.zeros(slots.shape[1], bool)) if len(slots) > 1 else None
        delta = self["delta"] if hasattr(self, "delta") else None
        return PromptValues(slots[0], later, input_delta=delta, prompt_index_BG=own)


def prompted(method: PromptMethod, texts: Any = None) -> PromptedT5:
    return PromptedT5(T5(CONFIG, PARAMS, Compute(scan_unroll=1)), method, texts=texts)


def row_losses(
    method: PromptMethod, batch: Batch, keys_B: Array | None = None, rate: float = 0.0
) -> np.ndarray:
    """Summed loss of each row."""
    graphdef, trained, frozen = trees.split(prompted(method))
    return np.asarray(_row_losses(graphdef, rate, trained, frozen, batch, keys_B))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _row_losses(graphdef: Any, rate: float, trained: dict, frozen: dict, batch: Batch, keys: Any):
    model = trees.merge(graphdef, trained, frozen)
    loss_BT = cross_entropy(model(batch, dropout_key=keys, prompt_dropout=rate), batch.targets_BT)
    return jnp.sum(loss_BT * batch.loss_weights_BT, axis=1)


def alone(count: int = 3) -> Batch:
    """Rows of one example."""
    return tiny.make_batch([[one] for one in tiny.make_examples(count, SLOTS)], 10, 4, 1)


def slots_of(batch: Batch, x_BSD: np.ndarray) -> np.ndarray:
    """What stands in each row's slots, [B, P, D]."""
    return np.stack([x_S[np.asarray(slots_S) >= 0] for x_S, slots_S in
                     zip(np.asarray(x_BSD), batch.encoder_slots_BS, strict=True)])  # fmt: skip


def test_prompt_dropout_sets_numbers_in_the_slots_to_zero_in_every_layer():
    batch, keys_B = alone(), jax.random.split(jax.random.key(1), 3)
    slots_NPD = np.stack([PROMPTS[0], PROMPTS[1], PROMPTS[0] + PROMPTS[1]])[:, None]
    given = Given(jnp.asarray(slots_NPD))
    found = row_losses(given, batch, keys_B, 0.4)
    ones = jnp.ones((3, 10, CONFIG.d_model))
    scale_BPD = slots_of(batch, dropout(ones, 0.4, fold_key(keys_B, 4)))
    assert set(np.round(scale_BPD.ravel(), 4)) == {0.0, np.float32(1.6667)}
    want = row_losses(Given(jnp.asarray(slots_NPD * scale_BPD)), batch)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert (np.abs(found - row_losses(given, batch)) > 1e-3).all()


def test_wayward_adds_the_mean_squared_distance_to_the_texts_embeddings():
    """Its part of loss and gradient, of two prompts, over microbatches of unlike sizes."""
    examples = tiny.make_examples(6, SLOTS, prompts=2)
    batch = tiny.make_batch([[one] for one in examples], 10, 4, 1)
    texts = [np.asarray(DRAW.normal(size=(SLOTS, CONFIG.d_model)), np.float32) for _ in range(2)]
    bank = PromptBank([SoftPrompt(prompt) for prompt in PROMPTS])
    graphdef, trained, frozen = trees.split(
        prompted(bank, dict(enumerate(map(jnp.asarray, texts))))
    )

    @functools.partial(jax.jit, static_argnums=0)
    def step(options: StepOptions, state: steps.TrainState) -> Any:
        return steps.train_step(graphdef, [SGD, SGD], options, state, frozen, batch)

    state = steps.init_state(trained, [SGD, SGD], [0, 1])
    plain, metrics = step(StepOptions(accumulate=2), state)
    pulled, own = step(StepOptions(accumulate=2, wayward=0.25), state)
    for n, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        away = np.asarray(prompt) - text
        want = metrics["loss"][n] + 0.25 * (away**2).sum(1).mean()
        np.testing.assert_allclose(own["loss"][n], want, rtol=1e-5)
        before, after = (
            one.trained["method"]["prompts"][f"{n:04d}"]["prompt"] for one in (plain, pulled)
        )
        np.testing.assert_allclose(before - after, 0.25 * 2 * away / SLOTS, rtol=1e-4, atol=1e-5)


GRAPHDEF, TRAINED, FROZEN = trees.split(prompted(SoftPrompt(PROMPTS[0])))


@functools.partial(jax.jit, static_argnums=0)
def noise_of(config: RegularizeConfig, batch: Batch, keys_B: Array) -> Array:
    def under(noise_BSD: Array) -> Array:
        logits_BTV = trees.merge(GRAPHDEF, TRAINED, FROZEN)(batch, noise_BSD=noise_BSD)
        loss_BT = cross_entropy(logits_BTV, batch.targets_BT)
        return jnp.sum(loss_BT * batch.loss_weights_BT)

    return noise_for(config, batch, CONFIG.d_model, keys_B, under)


def step_loss(options: StepOptions, batch: Batch) -> float:
    """Of a step over one soft prompt, summed."""
    state = steps.init_state(TRAINED, [SGD], [7])
    grads = jax.jit(functools.partial(steps.gradients, GRAPHDEF, options))
    return float(grads(state, FROZEN, batch)[1]["loss"][0])


def test_the_loss_under_gaussian_noise_is_added():
    batch = alone()
    config = RegularizeConfig(noise=0.5, noise_std=0.3, noise_on="both")
    key = jax.random.fold_in(jax.random.key(7), 0)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(batch.example_index_BG[:, 0]))
    noise_BSD = np.asarray(noise_of(config, batch, keys_B))
    there_BS = np.asarray(batch.encoder_segments_BS) > 0
    assert not noise_BSD[~there_BS].any()
    assert abs(noise_BSD[there_BS].std() - 0.3) < 0.05 and abs(noise_BSD[there_BS].mean()) < 0.05
    only = RegularizeConfig(noise=1.0, noise_on="prompt")
    text_BS = np.asarray(batch.encoder_slots_BS) < 0
    assert not np.asarray(noise_of(only, batch, keys_B))[text_BS].any()
    slots_BPD = np.asarray(PROMPTS[0])[None] + slots_of(batch, noise_BSD)
    noisy = Given(jnp.asarray(slots_BPD)[None], jnp.asarray(noise_BSD))
    same = jnp.broadcast_to(PROMPTS[0], slots_BPD.shape)[None]
    clean = row_losses(Given(same, jnp.zeros_like(noise_BSD)), batch).sum()
    want = clean + 0.5 * row_losses(noisy, batch).sum()
    np.testing.assert_allclose(step_loss(StepOptions(regularize=config), batch), want, rtol=1e-5)


def test_adversarial_noise_raises_the_loss_of_each_example_inside_its_ball():
    """Of an example in a packed row the same as of it alone."""
    config = RegularizeConfig(
        noise=1.0, noise_kind="adversarial", noise_rate=0.5, noise_steps=3, noise_radius=0.8
    )
    keys_B = jax.random.split(jax.random.key(0), 3)
    examples = tiny.make_examples(3, SLOTS)
    batch = tiny.make_batch([[one] for one in examples], 30, 12, 3)
    packed = tiny.make_batch([examples, [], []], 30, 12, 3)
    noise_BSD, row_SD = (np.asarray(noise_of(config, one, keys_B)) for one in (batch, packed))
    row_SD = row_SD[0]
    np.testing.assert_allclose(np.sqrt((noise_BSD**2).sum((1, 2))), 0.8, rtol=1e-4)
    assert not slots_of(batch, noise_BSD).any()
    given = jnp.asarray(PROMPTS[0])[None, None]
    down, clean, up, worst = (
        row_losses(Given(given, jnp.asarray(size * noise_BSD)), batch)
        for size in (-0.05, 0, 0.05, 1)
    )
    assert (down < clean).all() and (clean < up).all() and (up < worst).all()
    for n, own_SD in enumerate(noise_BSD):
        its_SD = row_SD[np.asarray(packed.encoder_segments_BS)[0] == n + 1]
        np.testing.assert_allclose(its_SD, own_SD[: len(its_SD)], atol=2e-4)


def test_the_loss_without_masked_tokens_is_added():
    """By embeddings: the mask's less the token's where the ids say so; each row draws its own."""
    mask, end = 38, 5
    config = RegularizeConfig(noise=0.5, noise_kind="mask", noise_share=0.4)
    examples = tiny.make_examples(4, SLOTS)
    batch = tiny.make_batch([[one] for one in examples[:2]] + [examples[2:]], 20, 8, 2)
    key = jax.random.fold_in(jax.random.key(7), 0)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(batch.example_index_BG[:, 0]))
    before_BS = np.asarray(batch.encoder_ids_BS)
    ids_BS = np.asarray(masked(config, batch, keys_B, mask, end).encoder_ids_BS)
    changed_BS = ids_BS != before_BS
    assert changed_BS.any(1).all() and (ids_BS[changed_BS] == mask).all()
    table_VD = np.asarray(PARAMS["token_embedder"]["embedding"])
    delta_BSD = np.where(changed_BS[..., None], table_VD[mask] - table_VD[before_BS], 0)
    given = jnp.asarray(PROMPTS[0])[None, None]
    clean, without = (
        row_losses(Given(given, jnp.asarray(one_BSD)), batch).sum()
        for one_BSD in (np.zeros_like(delta_BSD), delta_BSD)
    )
    options = StepOptions(regularize=config, mask_ids=(mask, end))
    want = clean + 0.5 * without
    np.testing.assert_allclose(step_loss(options, batch), want, rtol=1e-5)
    # what stands beside a row, and in which order, is nothing to it
    turned = jax.tree.map(lambda leaf: leaf[np.asarray([2, 0])], batch)
    own = masked(config, turned, keys_B[jnp.asarray([2, 0])], mask, end).encoder_ids_BS
    np.testing.assert_array_equal(own, ids_BS[[2, 0]])

    many = tiny.make_batch([[examples[0]]] * 400, 10, 4, 1)
    keys_B = jax.random.split(jax.random.key(3), 400)
    end = max(examples[0].encoder)
    ids_BS = np.asarray(masked(config, many, keys_B, mask, end).encoder_ids_BS)
    for s, code in enumerate([*examples[0].encoder, *[0] * 10][:10]):
        is_word = s < len(examples[0].encoder) and code >= 0 and code != end
        share = (ids_BS[:, s] == mask).mean()
        assert abs(share - 0.4) < 0.08 if is_word else share == 0, (s, code, share)


def test_what_is_off_is_not_in_the_program():
    state = steps.init_state(TRAINED, [SGD], [0])

    def program(options: StepOptions) -> str:
        step = functools.partial(steps.train_step, GRAPHDEF, [SGD], options)
        return str(jax.make_jaxpr(step)(state, FROZEN, alone()))

    plain = program(StepOptions())
    assert "random" not in plain
    assert program(StepOptions(regularize=RegularizeConfig(noise_std=0.5))) == plain
    assert program(StepOptions(regularize=RegularizeConfig(prompt_dropout=0.1))) != plain


# ---- in runs -----------------------------------------------------------------------------------

OPTIONS = [
    "train.steps=4", "train.eval_every=2", "train.save_every=2", "optim.recipe=adamw",
    "optim.schedule=constant", "optim.warmup_steps=0", "optim.learning_rate=0.05",
    "data.row_multiple=2", "backbone.dropout=0.0",
]  # fmt: skip
ALL = [
    "regularize.prompt_dropout=0.2", "regularize.wayward=0.01",
    "regularize.wayward_text=good film", "regularize.noise=0.5",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["gaussian", "mask"])
def test_a_regularised_run_goes_on_to_the_bit_and_is_the_same_on_two_devices(
    kind: str, world: World, tmp_path: Path
):
    on = {"gaussian": "both", "mask": "input"}[kind]
    own = [*OPTIONS, *ALL, f"regularize.noise_kind={kind}", f"regularize.noise_on={on}"]
    train(world.load(tmp_path / "whole", *own))
    train(world.load(tmp_path / "broken", *own, "train.steps=2"))
    train(world.load(tmp_path / "broken", *own))
    np.testing.assert_array_equal(losses(tmp_path / "broken"), losses(tmp_path / "whole"))
    assert_same_end(tmp_path / "broken", tmp_path / "whole")
    train(world.load(tmp_path / "two", *own, "mesh.data=2"))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "whole"), rtol=1e-5)


def test_a_run_masks_with_the_first_sentinel(world: World, tmp_path: Path):
    backbone = load_backbone(str(world.root / "backbone"))
    options = ["regularize.noise=1", "regularize.noise_kind=mask"]
    one = make_trainee("", world.load(tmp_path / "run", *options), backbone)
    words = backbone.tokenizer
    assert [words.piece(token) for token in one.options.mask_ids] == ["<extra_id_0>", "</s>"]


def test_a_sweep_regularises_each_prompt_as_its_own_run_does(world: World, tmp_path: Path):
    texts = "sweep.regularize.wayward_text=[good film, bad book]"
    kept = [word for word in ALL if "text" not in word and "noise" not in word]
    options = [*OPTIONS, *kept, "train.steps=2"]
    plan = load_sweep(world.config, [f"output_dir={tmp_path / 'sweep'}", *options, texts])
    sweep(plan)
    for run, text in zip(plan.runs, ("good film", "bad book"), strict=True):
        own = tmp_path / text.replace(" ", "-")
        train(world.load(own, *options, f"regularize.wayward_text={text}"))
        np.testing.assert_allclose(losses(Path(run.config.output_dir)), losses(own), rtol=1e-5)
    assert len({prompt_bytes(Path(run.config.output_dir) / "prompt") for run in plan.runs}) == 2


WRONG = {
    "no text": (["wayward=0.1"], "give it in regularize.wayward_text"),
    "no weight": (["wayward_text=good"], "regularize.wayward, its weight, is 0"),
    "rate": (["prompt_dropout=1"], "prompt_dropout is 1"),
    "negative": (["noise=-1"], "regularize.noise is -1"),
    "std": (["noise_std=0"], "regularize.noise_std is 0"),
    "share": (["noise_share=0"], "regularize.noise_share is 0"),
    "mask": (["noise=1", "noise_kind=mask", "noise_on=both"], "the prompt has none: give noise_on"),
    "long text": (["wayward=1", "wayward_text=good bad good bad good"], "5 tokens, the prompt 4"),
    "no tokens": (["wayward=1", "wayward_text= "], "has 0 tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused(case: str, world: World, tmp_path: Path):
    words, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        options = (f"regularize.{word}" for word in words)
        train(world.load(tmp_path / "run", *OPTIONS, *options))


def test_methods_and_modes_without_one_prompt_in_slots_are_refused(world: World, tmp_path: Path):
    text = ["regularize.wayward=1", "regularize.wayward_text=good"]
    mixture = ["method.name=smop", "method.length=4"]
    with pytest.raises(UserError, match="method smop makes a prompt for each input"):
        train(world.load(tmp_path / "run", *OPTIONS, *mixture, *text))
    with pytest.raises(UserError, match="method p-tuning-v2 has none"):
        own = ["method.name=p-tuning-v2", "regularize.prompt_dropout=0.1"]
        train(world.load(tmp_path / "run", *OPTIONS, *own))
    with pytest.raises(UserError, match="tune: model trains none"):
        world.load(tmp_path / "run", "tune=model", "regularize.prompt_dropout=0.1")
